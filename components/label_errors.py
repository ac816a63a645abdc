"""The step `label_errors`: images of the training and the validation split whose label is probably wrong.

Confident learning finds them: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset
Labels", Journal of Artificial Intelligence Research 70 (2021) 1373-1411. It needs predictions by a classifier that has
not seen the label of the image. The network has seen those of the training split, and may have memorized wrong ones.
So only its last hidden layer is used: a linear discriminant analysis on it, cross-validated, predicts labels.
The idea is from Lee et al., "Robust Inference via Generative Classifiers for Handling Noisy Labels", ICML 2019.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from components.reports.label_errors import render
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.label_errors import LabelErrors, LabelErrorsFacts, LabelPair, SplitLabels, Suspect
from ridgeline.artifacts.model import Model
from ridgeline.component import Params as BaseParams
from ridgeline.component import StepError, component

if TYPE_CHECKING:
    import keras

SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")
BATCH_SIZE, BATCH_BYTES = 1000, 16 * 2**20  # images at a time, the smaller number of both
FOLDS = 5
MAX_FEATURES = 512  # a wider layer is projected at random
SHRINKAGE = 0.01  # of the covariance towards a multiple of the identity
IMPOSSIBLE = -1e30  # a score
MAX_PAIRS = 50
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # of a cell that spreadsheet programs compute


class Params(BaseParams):
    """The parameters of `label_errors`."""

    num_suspects: int = Field(
        100,
        ge=0,
        le=1000,
        title="Number of suspected label errors",
        description="How many images with a suspicious label are shown, 0 to 1000. All are in suspects.csv.",
    )


@component(output=LabelErrors)
def label_errors(dataset: Dataset, examples: Examples, model: Model, params: Params, output: Path) -> LabelErrorsFacts:
    """Find images whose label is probably wrong.

    Args:
        dataset: Gives the names of the files, if it is a folder.
        examples: Made from it; the test split is not read.
        model: A model that was trained on them.
        params: How many to show.
        output: An empty directory; receives ``suspects.csv`` and ``report.html``.

    Returns:
        The suspects, by split, by pair of labels, and the first ones.

    Raises:
        StepError: If the dataset or the model does not fit the examples, or the network yields infinity or NaN.
    """
    if dataset.facts.name != examples.facts.dataset:
        raise StepError(
            f"Expected the dataset that the examples were made from, {examples.facts.dataset}; received "
            f"{dataset.facts.name}. Pass that dataset."
        )
    if misfit := model.facts.misfit(examples.facts):
        raise StepError(f"Expected a model with the examples' {misfit}. Train on {examples.facts.dataset}.")
    splits = {name: examples.split(name) for name in SPLITS}
    labels = np.concatenate([np.asarray(split.labels) for split in splits.values()])
    features = last_hidden_layer(model.load_keras())
    size = max(1, min(BATCH_SIZE, BATCH_BYTES // math.prod(examples.facts.image_shape)))

    def batches() -> Iterator[np.ndarray]:
        return (features(images) for split in splits.values() for images, _ in split.batches(size))

    scores = cross_validated_scores(batches, labels, len(examples.facts.class_names))
    probabilities = calibrated(scores, labels)
    suggested = suggest_labels(probabilities, labels)
    suspects = np.flatnonzero(suggested != labels)
    doubt = scores[suspects, suggested[suspects]] - scores[suspects, labels[suspects]]
    suspects = suspects[np.argsort(-doubt, kind="stable")]

    num_train, files = len(splits["train"]), dataset.file_names(examples)
    found = []
    for i in suspects.tolist():
        split, row = ("train", i) if i < num_train else ("validation", i - num_train)
        found.append(
            Suspect(
                split=split,
                row=row,
                label=int(labels[i]),
                suggested=int(suggested[i]),
                probability=round(float(probabilities[i, suggested[i]]), 4),
                file=files[split][row] if files[split] else "",
            )
        )
    agrees = np.split(probabilities.argmax(axis=1) == labels, [num_train])
    facts = LabelErrorsFacts(
        dataset=examples.facts.dataset,
        examples_digest=examples.digest,
        model_digest=model.digest,
        class_names=examples.facts.class_names,
        splits={
            name: SplitLabels(
                num_examples=len(agree),
                num_suspects=sum(suspect.split == name for suspect in found),
                agreement=float(np.mean(agree)),
            )
            for name, agree in zip(SPLITS, agrees, strict=True)
        },
        pairs=_pairs(labels, suggested),
        suspects=tuple(found[: params.num_suspects]),
        synthetic=examples.facts.synthetic or model.facts.synthetic,
    )
    _write_csv(output / "suspects.csv", found, examples.facts.class_names)
    (output / "report.html").write_text(render(facts, examples), encoding="utf-8")
    return facts


def last_hidden_layer(network: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that yields what the last layer of a network receives.

    Args:
        network: A network. If its last layer joins several others, what the network yields is taken instead.

    Returns:
        A function from images, uint8 ``[k, ...]``, to features, float64 ``[k, features]``, at most `MAX_FEATURES`. It
        raises a `StepError` if they are infinite or NaN.
    """
    import keras

    received = network.layers[-1].input
    if isinstance(received, list):  # a layer that joins several
        received = network.outputs[0]
    encoder = keras.Model(network.inputs, received)
    width = math.prod(received.shape[1:])
    projection = None
    if width > MAX_FEATURES:
        projection = np.random.default_rng(0).standard_normal((width, MAX_FEATURES), np.float32)
        projection /= np.float32(math.sqrt(width))

    def features(images: np.ndarray) -> np.ndarray:
        found = encoder.predict_on_batch(images).reshape(len(images), width)
        if not np.isfinite(found).all():
            raise StepError(
                "Expected finite values in the network's last hidden layer; received infinity or NaN. Train again, for "
                "example with a lower learning rate."
            )
        return (found if projection is None else found @ projection).astype(np.float64)

    return features


def cross_validated_scores(
    batches: Callable[[], Iterator[np.ndarray]], labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Return how well each label fits each image, by a classifier that was fitted without the image.

    The classifier is a linear discriminant analysis. The images of each class are dealt into `FOLDS` parts, and each
    part is scored by the classifier of the others. Memory does not grow with the number of images, besides the scores.

    Args:
        batches: Yields the features of all images in order, float64 ``[k, features]``; called three times.
        labels: Integers ``[n]`` in [0, num_classes).
        num_classes: Number of classes.

    Returns:
        Log-probabilities up to a constant of the row, float32 ``[n, num_classes]``; `IMPOSSIBLE` for a class of which
        the classifier has seen no image.
    """
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=num_classes)
    parts = np.empty_like(labels)
    parts[order] = (np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]) % FOLDS

    def by_part() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield parts of batches: the number of the part, the rows, their features."""
        start = 0
        for features in batches():
            for part in range(FOLDS):
                own = np.flatnonzero(parts[start : start + len(features)] == part)
                yield part, start + own, features[own]
            start += len(features)

    width = next(batches()).shape[1]
    sums, products = np.zeros((FOLDS, num_classes, width)), np.zeros((FOLDS, width, width))
    for part, rows, features in by_part():
        sums[part] += (labels[rows, None] == np.arange(num_classes)).T.astype(np.float64) @ features
        products[part] += features.T @ features
    weights, biases = np.empty((FOLDS, width, num_classes)), np.empty((FOLDS, num_classes))
    for part in range(FOLDS):
        seen = counts - np.bincount(labels[parts == part], minlength=num_classes)
        total = max(1, seen.sum())
        means = (sums.sum(axis=0) - sums[part]) / np.maximum(seen, 1)[:, None]
        covariance = (products.sum(axis=0) - products[part] - (means.T * seen) @ means) / total
        spread = max(SHRINKAGE * np.trace(covariance) / width, 1e-9)
        weights[part] = np.linalg.solve(covariance + spread * np.eye(width), means.T)
        biases[part] = np.log(np.maximum(seen, 1) / total) - np.sum(means.T * weights[part], axis=0) / 2
        biases[part][seen == 0] = IMPOSSIBLE
    scores = np.empty((len(labels), num_classes), np.float32)
    for part, rows, features in by_part():
        scores[rows] = features @ weights[part] + biases[part]
    return scores


def calibrated(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return probabilities, the softmax of the scores at the temperature that fits the labels best.

    As in Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        scores: As `cross_validated_scores` returns them.
        labels: Integers ``[n]``.

    Returns:
        float32 ``[n, classes]``, rows that sum to 1.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, softmax

    step = -(-len(labels) // 50_000)  # enough images for one number
    some, own = scores[::step].astype(np.float64), labels[::step]
    known = some[np.arange(len(own)), own] > IMPOSSIBLE / 2
    some, own = some[known], own[known]

    def loss(log_factor: float) -> float:
        return -float(np.sum(log_softmax(some * math.exp(log_factor), axis=1)[np.arange(len(own)), own]))

    factor = math.exp(minimize_scalar(loss, bounds=(-7, 3), method="bounded").x)
    return np.asarray(softmax(scores * np.float32(factor), axis=1))


def suggest_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each image's probable label by confident learning: another one than its own if that is suspicious.

    A class is likely for an image if its probability reaches the mean of those of the images with that label. An image
    is suspicious if the most probable of its likely classes is not its label, and its label is not its most probable
    class. The outcome is that of cleanlab's ``find_label_issues(filter_by="confident_learning")``. A label that only
    one image has is never suspicious.

    Args:
        probabilities: Predicted without the image's own label, ``[n, classes]``.
        labels: Integers ``[n]``.

    Returns:
        Integers ``[n]``.

    Example:
        >>> probabilities = [[0.9, 0.1], [0.7, 0.3], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]
        >>> suggest_labels(np.array(probabilities), np.array([0, 0, 1, 1, 1])).tolist()
        [0, 0, 0, 1, 1]
    """
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    means = np.bincount(labels, own, len(counts)) / np.maximum(counts, 1)
    likely = np.where(counts > 0, probabilities >= means - 1e-6, False)
    suggested = np.where(likely, probabilities, -1).argmax(axis=1)
    suspicious = likely.any(axis=1) & (probabilities.argmax(axis=1) != labels) & (counts[labels] > 1)
    return np.where(suspicious, suggested, labels)


def _pairs(labels: np.ndarray, suggested: np.ndarray) -> tuple[LabelPair, ...]:
    counts = np.bincount(labels)
    changed = labels != suggested
    pairs, numbers = np.unique(np.stack([labels, suggested], axis=1)[changed], axis=0, return_counts=True)
    return tuple(
        LabelPair(
            label=int(pairs[i, 0]),
            suggested=int(pairs[i, 1]),
            count=int(numbers[i]),
            num_examples=int(counts[pairs[i, 0]]),
        )
        for i in np.argsort(-numbers, kind="stable")[:MAX_PAIRS]
    )


def _write_csv(path: Path, suspects: Iterable[Suspect], names: tuple[str, ...]) -> None:
    """Write the list, so that no spreadsheet program takes a name for a formula."""

    def cell(text: str, prefix: str) -> str:
        return f"{prefix}{text}" if text.startswith(FORMULA_STARTS) else text

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(["split", "row", "file", "label", "suggested", "probability"])
        for suspect in suspects:
            label, suggested = cell(names[suspect.label], "'"), cell(names[suspect.suggested], "'")
            # ./ changes no path
            writer.writerow(
                [suspect.split, suspect.row, cell(suspect.file, "./"), label, suggested, suspect.probability]
            )
