"""`PushedModel`: the SavedModel that is served, with the images and predictions that check it."""

from __future__ import annotations

from pathlib import Path

from ridgeline.artifacts.base import Artifact, Facts


class PushedModelFacts(Facts):
    """What is known of a servable model.

    Attributes:
        model_name: Its name in the registry: the dataset's, for example ``fashion_mnist``.
        model_digest: The trained model's digest.
        evaluation_digest: The digest of the evaluation that blessed it.
        accuracy: Its accuracy on the test split, in [0, 1].
        image_shape: ``(h, w)`` or ``(h, w, c)`` of one input image.
        class_names: The names that it serves.
        synthetic: Whether it was trained on images that the project drew itself.
        champion: Digest of the champion that it was judged against; None if there was none.
        forced: The reason that a person gave for blessing or serving it by force; None if none was given.
        dataset: Name of the dataset that it was trained on; empty in artifacts of earlier releases.
    """

    model_name: str
    model_digest: str
    evaluation_digest: str
    accuracy: float
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    synthetic: bool
    champion: str | None = None
    forced: str | None = None
    dataset: str = ""


class PushedModel(Artifact[PushedModelFacts]):
    """A SavedModel with its check.

    On disk::

        saved_model/                TensorFlow's SavedModel; signature `serving_default`:
                                    images uint8 [n, h, w] -> probabilities float32 [n, classes],
                                    class_id int64 [n], class_name string [n]
        check/images.npy            uint8 [k, h, w]: the first test images
        check/probabilities.npy     float32 [k, classes]: the evaluation's own predictions for them
    """

    facts_type = PushedModelFacts

    @property
    def saved_model(self) -> Path:
        """The SavedModel's folder."""
        return self.path / "saved_model"

    @property
    def check(self) -> Path:
        """The folder of the check's arrays."""
        return self.path / "check"
