"""`LabelErrors`: images whose label is probably wrong, found with a trained network."""

from __future__ import annotations

from ridgeline.artifacts.base import Artifact, Facts


class Suspect(Facts):
    """An image whose label is probably wrong.

    Attributes:
        split: Name of the split.
        row: Its row there, from 0.
        label: Its label.
        suggested: The label that it probably should have.
        probability: Probability of `suggested`, in [0, 1].
        file: Its file, for a dataset that is a folder; else empty.
    """

    split: str
    row: int
    label: int
    suggested: int
    probability: float
    file: str


class LabelPair(Facts):
    """How many images with one label probably should have another.

    Attributes:
        label: The label.
        suggested: The other one.
        count: Number of suspects.
        num_examples: Number of images with the label.
    """

    label: int
    suggested: int
    count: int
    num_examples: int


class SplitLabels(Facts):
    """The labels of one split.

    Attributes:
        num_examples: Number of images.
        num_suspects: Number of images whose label is probably wrong.
        agreement: Share of the images whose label is the predicted one, in [0, 1]. If it is low, many suspects have the
            right label.
    """

    num_examples: int
    num_suspects: int
    agreement: float


class LabelErrorsFacts(Facts):
    """The suspects.

    Attributes:
        dataset: tfds name and version.
        examples_digest: Digest of the examples.
        model_digest: Digest of the model whose last hidden layer the predictions use.
        class_names: The label names in label order.
        splits: The training and the validation split. The test split is not read.
        pairs: The most frequent pairs of labels, most frequent first, at most 50.
        suspects: The most suspicious images first, as many as the parameter says.
        synthetic: Whether the project drew the images itself.
    """

    dataset: str
    examples_digest: str
    model_digest: str
    class_names: tuple[str, ...]
    splits: dict[str, SplitLabels]
    pairs: tuple[LabelPair, ...]
    suspects: tuple[Suspect, ...]
    synthetic: bool


class LabelErrors(Artifact[LabelErrorsFacts]):
    """The images whose label is probably wrong.

    On disk::

        suspects.csv    all of them, most suspicious first: split, row, file, label, suggested, probability
        report.html     self-contained report; opens without a network
    """

    facts_type = LabelErrorsFacts
    report_name = "report.html"
