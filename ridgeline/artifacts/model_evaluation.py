"""`ModelEvaluation`: a model's metrics on the test split, and the verdict."""

from __future__ import annotations

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts


class ClassMetrics(Facts):
    """One class's precision, recall and F1, each in [0, 1] (0 if undefined), and its number of examples."""

    name: str
    precision: float
    recall: float
    f1: float
    num_examples: int


class Mistake(Facts):
    """A misclassified test image.

    Attributes:
        index: Its row in the test split.
        label: Its true class.
        predicted: The class that the model gave.
        probability: The probability, in [0, 1], that the model gave to `predicted`.
    """

    index: int
    label: int
    predicted: int
    probability: float


class Comparison(Facts):
    """The champion on the same test images: the model that was served, or the one that the evaluated model replaced.

    Attributes:
        model_digest: The champion's digest.
        accuracy: Its accuracy on these test images, in [0, 1].
        accuracy_interval: 95 % Wilson score interval of that.
        class_recalls: Its recall of each class, in label order, each in [0, 1].
        only_champion_right: Number of test images that it alone classifies correctly.
        only_candidate_right: Number of test images that the evaluated model alone classifies correctly.
        p_value: Of the one-sided exact McNemar test: probability that chance puts the champion at least this far ahead.
    """

    model_digest: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    class_recalls: tuple[float, ...]
    only_champion_right: int
    only_candidate_right: int
    p_value: float


class Flip(Facts):
    """How many replayed images the champion and the evaluated model put into two given classes, by their numbers."""

    champion: int
    candidate: int
    count: int


class Replay(Facts):
    """What the champion and the evaluated model predict for the same unlabelled images.

    Attributes:
        num_images: Number of images.
        num_unreadable: Number of files that are no readable image.
        agreement: Share of the images for which both predict the same class, in [0, 1].
        agreement_interval: 95 % Wilson score interval of that.
        flips: The most frequent pairs of different classes, most frequent first, at most 100.
    """

    num_images: int
    num_unreadable: int
    agreement: float
    agreement_interval: tuple[float, float]
    flips: tuple[Flip, ...]


class Verdict(Facts):
    """Whether the model may be served, always with the reasons.

    Attributes:
        blessed: True if every check is met, or if it is forced.
        reasons: One sentence per check, met or not, and one for a forced blessing.
        forced: Why a person blessed the model although a check failed; None if the checks decided.
        force_reason: The reason that a person gave for blessing or serving the model by force, needed or not.
        champion: Digest of the champion at the time, comparable or not; None if there was none.
        unmet: The checks that were not met, as phrases without numbers; empty in evaluations of earlier releases.
    """

    blessed: bool
    reasons: tuple[str, ...]
    forced: str | None = None
    force_reason: str | None = None
    champion: str | None = None
    unmet: tuple[str, ...] = ()


class ModelEvaluationFacts(Facts):
    """Metrics on the test split.

    Attributes:
        dataset: tfds name and version.
        model_digest: The evaluated model's digest.
        num_examples: Number of test images.
        loss: Mean cross-entropy plus the penalty, as Keras reports it; nats.
        cross_entropy: Mean cross-entropy alone; nats.
        accuracy: Share of test images classified correctly, in [0, 1].
        accuracy_interval: 95 % Wilson score interval of the accuracy.
        calibration_error: Expected calibration error over 15 bins of equal width, in [0, 1].
        classes: Metrics by class, in label order.
        confusion_matrix: Counts; row is the true class, column the predicted. Empty if there are more than 100 classes.
        mistakes: The most confident mistakes, worst first.
        verdict: Blessed or not, with reasons.
        synthetic: Whether the project itself drew the test images or the training images.
        comparison: The champion on the same images; None if there was none to compare with.
        replay: Both on the unlabelled images of ``replay_dir``; None without them, or without a champion.
    """

    dataset: str
    model_digest: str
    num_examples: int
    loss: float
    cross_entropy: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    calibration_error: float
    classes: tuple[ClassMetrics, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]
    verdict: Verdict
    synthetic: bool
    comparison: Comparison | None = None
    replay: Replay | None = None


class ModelEvaluation(Artifact[ModelEvaluationFacts]):
    """A model's evaluation.

    On disk::

        predictions.npy    float32 [n, classes]: the model's probabilities for the test split, in its order
        report.html        self-contained report; opens without a network
    """

    facts_type = ModelEvaluationFacts
    report_name = "report.html"

    def predictions(self) -> np.ndarray:
        """Return the probabilities, float32 ``[n, classes]``, memory-mapped."""
        predictions: np.ndarray = np.load(self.path / "predictions.npy", mmap_mode="r", allow_pickle=False)
        return predictions
