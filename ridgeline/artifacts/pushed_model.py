"""`PushedModel`: the SavedModel that is served, with the images and predictions that check it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ridgeline.artifacts.base import Artifact, ArtifactError, Facts
from ridgeline.image_form import Form

EXTRA = "assets.extra"  # of a SavedModel: TensorFlow loads nothing of it, TF Serving its warm-up requests
IMAGES = "images.json"
CARD_MARKDOWN, CARD_HTML = "model-card.md", "model-card.html"


class ModelSize(Facts):
    """What a model has to store and to compute.

    Attributes:
        num_weights: Number of its weights, biases and statistics included.
        num_multiply_adds: Number of products that its kernels take for one image; None if it has layers with kernels
            other than dense layers and convolutions.
        num_bytes: Size of its weights.
    """

    num_weights: int
    num_multiply_adds: int | None
    num_bytes: int

    @property
    def mib(self) -> float:
        """The size of its weights in MiB."""
        return self.num_bytes / 2**20


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
        size: Its size; None in artifacts of earlier releases.
        trained_size: The trained model's size if compaction removed a part of it; None if it is served as trained.
        exceeded_mib: The limit in MiB that its size exceeds by force; None if it is within the limit or has none.
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
    size: ModelSize | None = None
    trained_size: ModelSize | None = None
    exceeded_mib: float | None = None

    @property
    def sizes(self) -> dict[str, str]:
        """Weights, MiB and multiply-adds, each in words, with that of the trained model if compaction removed a part.

        What is not known is left out.
        """
        measures = {"weights": "num_weights", "MiB": "mib", "multiply-adds an image": "num_multiply_adds"}
        found = {}
        for name, attribute in measures.items():
            numbers = [getattr(size, attribute) for size in (self.size, self.trained_size) if size]
            if numbers and None not in numbers:
                found[name] = " of ".join(f"{n:,}" if isinstance(n, int) else f"{n:.3f}" for n in numbers)
        return found

    @property
    def size_in_words(self) -> str:
        """The sizes, and the limit if it is exceeded, as a part of a sentence; empty if they are not known."""
        sizes = ", ".join(f"{numbers} {name}" for name, numbers in self.sizes.items())
        limit = f"; above the limit of {self.exceeded_mib:.6g} MiB by force" if self.exceeded_mib is not None else ""
        return f"{sizes}{limit}"


class PushedModel(Artifact[PushedModelFacts]):
    """A SavedModel with its check.

    On disk::

        saved_model/                TensorFlow's SavedModel; signature `serving_default`:
                                    images uint8 [n, h, w] -> probabilities float32 [n, classes],
                                    class_id int64 [n], class_name string [n]
        saved_model/assets.extra/   model-card.md, model-card.html, and images.json: how to prepare images, see
                                    `read_form`. So each copy of the SavedModel has them. Earlier releases wrote no
                                    images.json, or none of them
        check/images.npy            uint8 [k, h, w]: the first test images
        check/probabilities.npy     float32 [k, classes]: the evaluation's own predictions for them
    """

    facts_type = PushedModelFacts

    @property
    def saved_model(self) -> Path:
        """The SavedModel's folder."""
        return self.path / "saved_model"

    @property
    def card(self) -> Path | None:
        """The model card in HTML, which one in Markdown lies beside; None in artifacts of earlier releases."""
        card = self.saved_model / EXTRA / CARD_HTML
        return card if card.exists() else None

    @property
    def check(self) -> Path:
        """The folder of the check's arrays."""
        return self.path / "check"


def write_form(saved_model: Path, form: Form) -> None:
    """Write how to prepare images for a model into its SavedModel: ``assets.extra/images.json``.

    Args:
        saved_model: The SavedModel's folder.
        form: What images become.
    """
    (saved_model / EXTRA / IMAGES).write_text(json.dumps(asdict(form), indent=2) + "\n", encoding="utf-8")


def read_form(saved_model: Path, image_shape: tuple[int, ...]) -> Form:
    """Return how to prepare images for a model, as `ingest` prepared those that it was trained on.

    Args:
        saved_model: The SavedModel's folder, such as that of a version in the registry.
        image_shape: ``(h, w)`` or ``(h, w, 3)`` of the model's input, for models of earlier releases: they state
            nothing else, so that the defaults apply.

    Raises:
        ArtifactError: If the file is damaged.
    """
    file = saved_model / EXTRA / IMAGES
    if not file.exists():
        return Form.of_shape(image_shape)
    try:
        return TypeAdapter(Form).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"Expected how to prepare images in {file}; it is damaged: {error}") from error
