"""The step `evaluate`: a model's metrics on the test split, beside the champion's, the verdict, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import Field, model_validator

from components.evaluating.replay import Flipped, replay
from components.reports.evaluation import MAX_CLASSES, CalibrationBins, render, worst_confusions
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples, Split
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import (
    ClassMetrics,
    Comparison,
    Mistake,
    ModelEvaluation,
    ModelEvaluationFacts,
    Replay,
    Verdict,
)
from ridgeline.component import FOR_ONE_RUN, Champion, Source, SourceFolder, StepError, component
from ridgeline.component import Params as BaseParams
from ridgeline.image_form import Form
from ridgeline.significance import mcnemar_p_value, wilson_interval

if TYPE_CHECKING:
    import keras

BATCH_SIZE = 1000
NUM_BINS = 15


class Params(BaseParams):
    """The parameters of `evaluate`."""

    min_accuracy: float = Field(
        0.75,
        ge=0,
        le=1,
        title="Minimum accuracy",
        description="A model is blessed only if its test accuracy reaches this share, 0 to 1.",
    )
    min_class_recall: float = Field(
        0.2,
        ge=0,
        le=1,
        title="Minimum recall of every class",
        description="A model is blessed only if the recall of each class reaches this share, 0 to 1.",
    )
    worse_significance: float = Field(
        0.05,
        ge=0,
        le=0.5,
        title="Significance of being worse",
        description="Significance level of the one-sided exact McNemar test against the champion on the same test "
        "images, 0 to 0.5. A model is not blessed if the p-value is below this level. A higher level is stricter; 0 "
        "turns the check off.",
    )
    force_blessing: str | None = Field(
        None,
        max_length=500,
        title="Bless although a check fails",
        description="Reason for blessing a model that fails a check, or for serving it again after a rollback. It is "
        "recorded, and applies once per model. Empty: the checks decide.",
        json_schema_extra=FOR_ONE_RUN,
    )
    replay_dir: str | None = Field(
        None,
        exclude=True,
        title="Replay directory",
        description="Folder of unlabelled images, a path or URL, for which the model is compared with the champion. "
        "Empty: no replay.",
    )
    min_agreement: float | None = Field(
        None,
        ge=0,
        le=1,
        title="Minimum agreement",
        description="A model is blessed only if it predicts the champion's class for this share of the images in the "
        "replay directory, 0 to 1. Empty: the agreement is only shown.",
    )
    num_mistakes: int = Field(
        20,
        ge=0,
        le=100,
        title="Number of mistakes",
        description="How many of the most confident mistakes are kept and shown, 0 to 100 images.",
    )

    @model_validator(mode="after")
    def _agreement_has_images(self) -> Self:
        if self.min_agreement is not None and not self.replay_dir:
            raise ValueError(
                "min_agreement: expected a folder of unlabelled images in evaluate.replay_dir, too; received none. Set "
                "it, or RIDGELINE_REPLAY_DIR."
            )
        return self


def find_sources(params: Params) -> Mapping[str, SourceFolder]:
    """Return the folder that `evaluate` replays for the champion, if there is one."""
    return {"replay_dir": SourceFolder(params.replay_dir, used_with="champion")} if params.replay_dir else {}


@component(output=ModelEvaluation, sources=find_sources)
def evaluate(
    examples: Examples,
    model: Model,
    params: Params,
    output: Path,
    sources: Mapping[str, Source],
    dataset: Dataset | None = None,
    champion: Champion[Model] | None = None,
) -> ModelEvaluationFacts:
    """Evaluate a model on the test split and decide whether it may be served.

    If there is a champion, it is evaluated again on the same images, since its own evaluation may have used others. It
    is also compared with the model on the unlabelled images, if there are any.

    Args:
        examples: The examples, of which only the test split is read.
        model: The trained model.
        params: The thresholds and the number of mistakes to keep.
        output: An empty directory; receives ``predictions.npy`` and ``report.html``.
        sources: The folder of unlabelled images, as it was listed; empty if there is none, or no champion.
        dataset: Gives how images were prepared, for the unlabelled ones; the defaults apply if there is none.
        champion: The champion to compare with; None if there is none.

    Returns:
        The metrics and the verdict.

    Raises:
        StepError: If the model does not fit the examples, the test split is empty, or a prediction is not a finite
            number.
    """
    if misfit := model.facts.misfit(examples.facts):
        raise StepError(
            f"Expected a model with the examples' {misfit}. Evaluate it on {model.facts.dataset}, on which it was "
            f"trained, or train on {examples.facts.dataset}."
        )
    test = examples.split("test")
    if not len(test):
        raise StepError(
            "Expected at least 1 image in the test split; received 0. Run transform with a larger test split."
        )
    network = model.load_keras()
    penalty = sum(float(loss) for loss in network.losses) + model.facts.unsaved_penalty
    probabilities = _predict(network, test)
    labels = np.asarray(test.labels)
    bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if bad.size:
        first = bad[0]
        raise StepError(
            f"Expected finite probabilities; received {probabilities[first].tolist()} for test image {first} "
            f"({bad.size} of {len(labels)} images are affected). Train again, for example with a lower "
            "learning rate."
        )
    np.save(output / "predictions.npy", probabilities, allow_pickle=False)

    predicted = probabilities.argmax(axis=1)
    other = champion and champion.artifact
    comparison = replayed = None
    flipped: Flipped = {}
    if other and not other.facts.misfit(examples.facts):
        rival = other.load_keras()
        comparison = _compare(other, rival, test, labels, predicted == labels)
        if sources:
            shape = examples.facts.image_shape
            form = Form.of_shape(shape, *dataset.facts.preparation) if dataset else Form.of_shape(shape)
            replayed, flipped = replay(network, rival, sources["replay_dir"], form, shape)
    classes, matrix = _class_metrics(labels, predicted, examples.facts.class_names)
    accuracy = float(np.mean(predicted == labels))
    cross_entropy = mean_cross_entropy(probabilities, labels)
    bins = calibration_bins(probabilities, labels)
    facts = ModelEvaluationFacts(
        dataset=examples.facts.dataset,
        model_digest=model.digest,
        num_examples=len(labels),
        loss=cross_entropy + penalty,
        cross_entropy=cross_entropy,
        accuracy=accuracy,
        accuracy_interval=wilson_interval(int(np.sum(predicted == labels)), len(labels)),
        calibration_error=calibration_error(bins),
        classes=classes,
        confusion_matrix=tuple(map(tuple, matrix.tolist())) if len(classes) <= MAX_CLASSES else (),
        mistakes=_worst_mistakes(probabilities, labels, params.num_mistakes),
        verdict=_judge(accuracy, classes, comparison, replayed, bool(sources), champion, params),
        synthetic=examples.facts.synthetic or model.facts.synthetic,
        comparison=comparison,
        replay=replayed,
    )
    report = render(facts, bins, examples, model, network, worst_confusions(matrix), flipped)
    (output / "report.html").write_text(report, encoding="utf-8")
    return facts


def _predict(network: keras.Model, split: Split) -> np.ndarray:
    predictions = [network.predict_on_batch(images) for images, _ in split.batches(BATCH_SIZE)]
    return np.concatenate(predictions).astype(np.float32, copy=False)


def mean_cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of ``-log p(label)``.

    Args:
        probabilities: float32 ``[n, classes]``, each in [0, 1]. Values below 1.2e-38, the smallest normal
            float32, are raised to it, so that the mean is finite.
        labels: Integers ``[n]`` in [0, classes).

    Returns:
        Nats, in [0, 87.4].

    Example:
        >>> certain, undecided = [1.0, 0.0], [0.5, 0.5]
        >>> round(mean_cross_entropy(np.array([certain, undecided], np.float32), np.array([0, 1])), 4)
        0.3466
    """
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.mean(np.log(np.clip(chosen, np.finfo(np.float32).tiny, 1.0))))


def calibration_bins(probabilities: np.ndarray, labels: np.ndarray) -> CalibrationBins:
    """Sort predictions by confidence, the highest probability, into 15 bins of equal width.

    Bin m of 1 to 15 covers ``((m - 1) / 15, m / 15]``.

    Args:
        probabilities: float32 ``[n, classes]``, each in [0, 1].
        labels: Integers ``[n]`` in [0, classes).

    Returns:
        The bins' counts, mean confidences and accuracies.

    Example:
        >>> bins = calibration_bins(np.array([[0.9, 0.1], [0.1, 0.9]], np.float32), np.array([0, 0]))
        >>> [(number, count) for number, count in enumerate(bins.counts.tolist(), start=1) if count]
        [(14, 2)]
        >>> float(bins.accuracy[13])
        0.5
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bin_of, minlength=NUM_BINS)
    total = np.maximum(counts, 1)
    return CalibrationBins(
        counts=counts,
        confidence=np.bincount(bin_of, confidence, NUM_BINS) / total,
        accuracy=np.bincount(bin_of, correct, NUM_BINS) / total,
    )


def calibration_error(bins: CalibrationBins) -> float:
    """Return the expected calibration error: the mean of ``|accuracy - confidence|``, weighted by counts.

    As in Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        bins: Predictions binned by confidence.

    Returns:
        The error, in [0, 1]; 0 is perfect.

    Example:
        >>> confident, half_right = np.array([[0.9, 0.1], [0.1, 0.9]], np.float32), np.array([0, 0])
        >>> round(calibration_error(calibration_bins(confident, half_right)), 4)
        0.4
    """
    return float(np.average(np.abs(bins.accuracy - bins.confidence), weights=bins.counts))


def _class_metrics(
    labels: np.ndarray, predicted: np.ndarray, names: tuple[str, ...]
) -> tuple[tuple[ClassMetrics, ...], np.ndarray]:
    """Return the metrics of each class, and the confusion matrix, int64 ``[classes, classes]``."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    ids = list(range(len(names)))
    columns = precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=0)
    classes = tuple(
        ClassMetrics(name=name, precision=float(p), recall=float(r), f1=float(f1), num_examples=int(n))
        for name, p, r, f1, n in zip(names, *columns, strict=True)
    )
    return classes, confusion_matrix(labels, predicted, labels=ids)


def _worst_mistakes(probabilities: np.ndarray, labels: np.ndarray, limit: int) -> tuple[Mistake, ...]:
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    return tuple(
        Mistake(index=int(i), label=int(labels[i]), predicted=int(predicted[i]), probability=float(confidence[i]))
        for i in worst
    )


def _compare(
    champion: Model, network: keras.Model, test: Split, labels: np.ndarray, candidate_right: np.ndarray
) -> Comparison:
    probabilities = _predict(network, test)
    right = (probabilities.argmax(axis=1) == labels) & np.isfinite(probabilities).all(axis=1)
    only_champion, only_candidate = int(np.sum(right & ~candidate_right)), int(np.sum(candidate_right & ~right))
    counts = np.bincount(labels, minlength=len(champion.facts.class_names))
    recalls = np.bincount(labels, right, len(counts)) / np.maximum(counts, 1)
    return Comparison(
        model_digest=champion.digest,
        accuracy=float(np.mean(right)),
        accuracy_interval=wilson_interval(int(np.sum(right)), len(labels)),
        class_recalls=tuple(recalls.tolist()),
        only_champion_right=only_champion,
        only_candidate_right=only_candidate,
        p_value=mcnemar_p_value(only_champion, only_candidate, alternative="greater"),
    )


def _why_no_replay(champion: Champion[Model] | None) -> str:
    if champion is None:
        return "there is no champion to compare with"
    if champion.artifact is None:
        return "the champion can't be read"
    return "the champion was trained on other images or classes"


def _judge(
    accuracy: float,
    classes: tuple[ClassMetrics, ...],
    comparison: Comparison | None,
    replayed: Replay | None,
    has_images: bool,
    champion: Champion[Model] | None,
    params: Params,
) -> Verdict:
    """Check the thresholds and the comparison. A class without test images has recall 0.

    If the champion can't be read, a model is blessed only by force, since the champion may be better.
    """
    weakest = min(classes, key=lambda c: c.recall)
    recall = f"recall of {weakest.name}"
    checks = [
        ("accuracy", "accuracy", accuracy, "min_accuracy", params.min_accuracy),
        (recall, recall, weakest.recall, "min_class_recall", params.min_class_recall),
    ]
    if comparison:
        name = comparison.model_digest[:12]
        what = (
            f"against model {name}, which alone is right on {comparison.only_champion_right} images, this model on "
            f"{comparison.only_candidate_right}: p"
        )
        checks.append(
            ("worse than the champion", what, comparison.p_value, "worse_significance", params.worse_significance)
        )
    if comparison and replayed:
        low, high = replayed.agreement_interval
        what = (
            f"same class as model {comparison.model_digest[:12]} on {replayed.num_images} unlabelled images, "
            f"95 % interval {low:.6g} to {high:.6g}: share"
        )
        agreement = ("agreement with the champion", what, replayed.agreement, "min_agreement")
        checks.append((*agreement, params.min_agreement or 0.0))
    reasons = [
        f"{what} {value:.6g} {'>=' if value >= threshold else '<'} {threshold:.6g} ({parameter})"
        for _, what, value, parameter, threshold in checks
    ]
    unmet = [phrase for phrase, _, value, _, threshold in checks if value < threshold]
    # The folder's name is not in the key: what the verdict says may depend on what was read, but not on the name.
    if not replayed and (has_images or params.min_agreement is not None):
        reasons.append(f"no replay of unlabelled images: {_why_no_replay(champion)}")
    if champion is None:
        reasons.append("no other model to compare with: the thresholds decide")
    elif champion.artifact is None:
        unmet.append("the champion can't be read")
        reasons.append(
            f"the champion, model {champion.artifact_digest[:12]}, can't be read ({champion.problem}): restore it, "
            "roll back, or give a reason in force_blessing"
        )
    elif not comparison:
        reasons.append(
            f"not comparable with model {champion.artifact_digest[:12]}, trained on "
            f"{champion.artifact.facts.dataset} with other images or classes: the thresholds decide"
        )
    force_reason = (params.force_blessing or "").strip() or None
    forced = force_reason if unmet else None
    if forced:
        reasons.append(f"forced: {forced}")
    return Verdict(
        blessed=not unmet or bool(forced),
        reasons=tuple(reasons),
        forced=forced,
        force_reason=force_reason,
        champion=champion.artifact_digest if champion else None,
        unmet=tuple(unmet),
    )
