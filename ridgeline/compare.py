"""Two runs, models or served versions side by side: what went in, what came out, and on which images they disagree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.artifacts.base import Artifact
from ridgeline.artifacts.dataset import same_dataset
from ridgeline.artifacts.example_statistics import ExampleStatistics
from ridgeline.artifacts.examples import SPLITS, TEST, TRAIN, Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import flatten
from ridgeline.keys import KeyParts, changes
from ridgeline.lineage import ancestors, lineage
from ridgeline.pipeline import load_components
from ridgeline.records import described
from ridgeline.registry import Registry
from ridgeline.significance import Shift, class_shift, ks_test, mcnemar_p_value, wilson_interval
from ridgeline.store import Execution, Store

KINDS: dict[str, type[Artifact[Any]]] = {kind.__name__: kind for kind in (PushedModel, ModelEvaluation, Model)}
NAMED = 5  # matches in a message


class CompareError(RuntimeError):
    """A name is that of no run, model or version, or of several; or two of them can't be compared."""


# --- what is compared


@dataclass(frozen=True)
class Side:
    """One of the two: a trained model with all that led to it and was found out about it.

    Attributes:
        name: The name that was given for it.
        executions: The executions that led to it, by step; of a run, all that have an output. Where a step ran several
            times, its name has a number: ``sweep 2``.
        model: The model.
        evaluation: Its evaluation; None if it was not evaluated.
        examples: What it was evaluated on, or trained on.
        statistics: Their statistics; None if there are none.
    """

    name: str
    executions: Mapping[str, Execution]
    model: Model
    evaluation: ModelEvaluation | None
    examples: Examples
    statistics: ExampleStatistics | None

    @property
    def run_ids(self) -> list[str]:
        """The runs of its executions, each once, that of the last execution first."""
        ordered = sorted(self.executions.values(), key=lambda execution: execution.started_at, reverse=True)
        return list(dict.fromkeys(execution.run_id for execution in ordered))


def find_side(store: Store, registry: Registry, name: str) -> Side:
    """Return the run, model or served version that a name means.

    Args:
        store: The store.
        registry: The served models.
        name: ``NAME/VERSION`` for a served version, ``NAME`` for the champion; ``<Type>/<digest>`` of a model, of its
            evaluation or of what was exported, a unique beginning of either, or the type alone for the latest; or the
            id of a run, or a unique beginning of it.

    Raises:
        CompareError: If the name is that of none or of several, or the run or the artifact has no model.
        RegistryError: If there is no such version, or its files were changed.
        ArtifactError: If an artifact is missing or damaged.
    """
    served, slash, version = name.partition("/")
    if served in registry.model_names() and (not slash or re.fullmatch("[0-9]{1,9}", version)):
        _, pushed = registry.open_version(store, served, int(version) if slash else None)
        return _of_artifact(store, name, pushed.ref)
    if name in KINDS:
        return _of_artifact(store, name, store.find(name))
    if name and (records := list(store.executions(run_id=name))):
        return _of_run(store, name, records)
    refs = [ref for ref in store.refs() if ref.partition("/")[0] in KINDS]
    refs = [ref for ref in refs if ref.startswith(name) or ref.partition("/")[2].startswith(name)]
    runs = [run_id for run_id in _run_ids(store) if run_id.startswith(name)]
    if len(refs) + len(runs) != 1 or not name:
        found = [*refs, *runs]
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        received = f"the beginning of {', '.join(found[:NAMED])}{more}" if found and name else "the name of none"
        raise CompareError(
            f"Expected a served version such as shoes/3, a model such as Model/<digest>, or a run; received "
            f"{name!r}, {received}. Give NAME/VERSION as in `ridgeline models list`, or more of the digest or of the "
            "run's id, as in `ridgeline lineage Model`."
        )
    return _of_artifact(store, name, refs[0]) if refs else _of_run(store, name, list(store.executions(run_id=runs[0])))


def _run_ids(store: Store) -> Iterator[str]:
    """Yield the runs of all records, each once; one record of each is read."""
    seen: set[str] = set()
    for file in described(store.record_files(), store.read_record):
        if file.run not in seen and (execution := store.read_record(file)):
            seen.add(file.run)
            yield execution.run_id


def _of_artifact(store: Store, name: str, ref: str) -> Side:
    """Return the side of a model, of an evaluation or of what was exported."""
    kind = ref.partition("/")[0]
    if kind == Model.__name__:
        return _side(store, name, ref, _evaluation_of(store, ref), {})
    artifact = store.open(ref, KINDS[kind])
    evaluation = f"{ModelEvaluation.__name__}/{getattr(artifact.facts, 'evaluation_digest', artifact.digest)}"
    return _side(store, name, f"{Model.__name__}/{artifact.facts.model_digest}", evaluation, {}, ref)


def _of_run(store: Store, name: str, records: list[Execution]) -> Side:
    """Return the side of a run: its last model, and that model's evaluation if the run has one.

    Args:
        store: The store.
        name: The name that was given for the run.
        records: Its executions, newest first.
    """
    made = [execution for execution in records if execution.output]
    models = [e.output for e in made if e.output and e.output.startswith(f"{Model.__name__}/")]
    if not models:
        raise CompareError(
            f"Expected a run that trained or reused a model; received {name}, which has none: "
            f"{', '.join(dict.fromkeys(execution.component for execution in records))}. Name another run."
        )
    datasets = {store.manifest(ref).facts.get("dataset") for ref in models}
    if len(datasets) > 1:
        raise CompareError(
            f"Expected a run of one dataset; received {name}, the id of runs of {' and '.join(map(str, datasets))}. "
            f"Name the models: {', '.join(dict.fromkeys(models))}."
        )
    kind = f"{ModelEvaluation.__name__}/"
    evaluations = [e.output for e in made if str(e.output).startswith(kind) and models[0] in e.inputs.values()]
    own = {execution.component: execution for execution in reversed(made)}
    return _side(store, name, models[0], next(iter(evaluations), None), own)


def _champions() -> dict[str, Iterable[str]]:
    return {step.name: step.champions for step in load_components().values()}


def _evaluation_of(store: Store, model: str) -> str | None:
    """Return the newest evaluation of a model that is left; None if there is none."""
    champions = _champions()
    for step in load_components().values():
        for made in store.executions(step.name, used=model) if step.output is ModelEvaluation else ():
            own = {ref for name, ref in made.inputs.items() if name not in champions[step.name]}
            if model in own and made.output and store.holds(made.output):
                return made.output
    return None


def _side(
    store: Store, name: str, model: str, evaluation: str | None, own: Mapping[str, Execution], last: str | None = None
) -> Side:
    """Return a side.

    Args:
        store: The store.
        name: The name that was given for it.
        model: Its model.
        evaluation: Its evaluation; None if there is none.
        own: The executions of its run, by step, if it is a run: they say what that run did or reused.
        last: What was made last of it, if neither the evaluation nor the model was.
    """
    executions: dict[str, Execution] = {}
    examples = None
    for origin in ancestors(lineage(store, last or evaluation or model), {n: [*c] for n, c in _champions().items()}):
        if origin.ref.startswith(f"{Examples.__name__}/"):
            examples = origin.ref
        if execution := origin.execution:
            label, number = execution.component, 1
            while label in executions:
                number += 1
                label = f"{execution.component} {number}"
            executions[label] = execution
    if examples is None:
        raise CompareError(
            f"Expected the record of the execution that made {last or evaluation or model}; received none: the "
            f"examples of {name} are unknown. Name a model that a run made."
        )
    return Side(
        name=name,
        executions={**executions, **own},
        model=store.open(model, Model),
        evaluation=store.open(evaluation, ModelEvaluation) if evaluation else None,
        examples=store.open(examples, Examples),
        statistics=_statistics(store, examples),
    )


def _statistics(store: Store, examples: str) -> ExampleStatistics | None:
    """Return the statistics of examples; None if there are none, or none are left."""
    for step in load_components().values():
        for made in store.executions(step.name, used=examples) if step.output is ExampleStatistics else ():
            if made.output and store.holds(made.output):
                return store.open(made.output, ExampleStatistics)
    return None


# --- the comparison


@dataclass(frozen=True)
class Change:
    """Something that differs.

    Attributes:
        name: Its name: of a parameter, a file, a library or a source.
        a: Its value on side A; ``none`` if it has none.
        b: On side B.
        steps: The steps that it concerns.
    """

    name: str
    a: Any
    b: Any
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """The numbers of images of a class, or of all classes, by split; None if a side lacks the class."""

    name: str
    a: Mapping[str, int] | None
    b: Mapping[str, int] | None


@dataclass(frozen=True)
class Drift:
    """How far a distribution on side B is from that on side A, and the p-value of no difference."""

    name: str
    shift: Shift


@dataclass(frozen=True)
class Value:
    """A figure, and its 95 % interval if it has one."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Metric:
    """A figure on both sides; None where it is not known."""

    name: str
    a: Value | None
    b: Value | None


@dataclass(frozen=True)
class Disagreement:
    """A test image on which the two predict different classes.

    Attributes:
        index: Its row in the test split.
        label: Its label.
        a: The class that side A predicts.
        b: The class that side B predicts.
        a_probability: The probability, in [0, 1], that side A gives to its class.
        b_probability: That of side B.
    """

    index: int
    label: int
    a: int
    b: int
    a_probability: float
    b_probability: float


@dataclass(frozen=True)
class Pairs:
    """The predictions of both for the same test images.

    The disagreements begin with those in which the probabilities of the true class differ most.

    Attributes:
        num_images: Number of test images.
        both_right: Number that both classify correctly.
        both_wrong: Number that neither does, those with one wrong class included.
        only_a_right: The images that side A alone classifies correctly.
        only_b_right: Those that side B alone classifies correctly.
        wrong_differently: Those that both take for different wrong classes.
        p_value: Of the two-sided exact McNemar test of equal accuracy.
    """

    num_images: int
    both_right: int
    both_wrong: int
    only_a_right: tuple[Disagreement, ...]
    only_b_right: tuple[Disagreement, ...]
    wrong_differently: tuple[Disagreement, ...]
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two sides, and in what they differ.

    Attributes:
        a: The one side.
        b: The other.
        parameters: Parameters of common steps that differ; of the training, with what a sweep chose.
        code: Files that differ by SHA-256.
        libraries: Versions that differ.
        sources: Fingerprints of sources that differ.
        only_a: Steps that side A alone has.
        only_b: Steps that side B alone has.
        same_examples: Whether both have the same examples, byte for byte.
        counts: Numbers of images of all classes, then of each class.
        drift: Distributions of the training and test images; None if statistics are missing.
        metrics: Figures.
        pairs: The predictions for the same test images; None if there are none.
        no_pairs: Why there are none.
    """

    a: Side
    b: Side
    parameters: tuple[Change, ...]
    code: tuple[Change, ...]
    libraries: tuple[Change, ...]
    sources: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    same_examples: bool
    counts: tuple[Counts, ...]
    drift: tuple[Drift, ...] | None
    metrics: tuple[Metric, ...]
    pairs: Pairs | None
    no_pairs: str


def compare(a: Side, b: Side) -> Comparison:
    """Compare two sides of one dataset.

    Args:
        a: The one side, usually the earlier one.
        b: The other.

    Raises:
        CompareError: If they are of different datasets.
    """
    datasets = a.model.facts.dataset, b.model.facts.dataset
    if not same_dataset(*datasets):
        raise CompareError(
            f"Expected two of one dataset; received {a.name} of {datasets[0]} and {b.name} of {datasets[1]}. Compare "
            "runs, models or versions of the same dataset."
        )
    common = [step for step in b.executions if step in a.executions]
    parts = {step: (a.executions[step].parts, b.executions[step].parts) for step in common}
    no_pairs = _no_pairs(a, b)
    return Comparison(
        a=a,
        b=b,
        parameters=tuple(
            Change(f"{step}.{name}", one, other, (step,))
            for step in common
            for name, one, other in changes(_params(a, step), _params(b, step))
        ),
        code=_merged(parts, "code"),
        libraries=_merged(parts, "libraries"),
        sources=_merged(parts, "sources"),
        only_a=tuple(step for step in a.executions if step not in b.executions),
        only_b=tuple(step for step in b.executions if step not in a.executions),
        same_examples=a.examples.digest == b.examples.digest,
        counts=tuple(_counts(a.examples, b.examples)),
        drift=tuple(_drift(a.statistics, b.statistics)) if a.statistics and b.statistics else None,
        metrics=tuple(_metrics(a, b)),
        pairs=None if no_pairs else _pairs(a, b),
        no_pairs=no_pairs,
    )


def _params(side: Side, step: str) -> Mapping[str, Any]:
    """Return the parameters of a step; those of the training as the model states them, with a sweep's choice."""
    execution = side.executions[step]
    return dict(flatten(side.model.facts.params)) if execution.output == side.model.ref else execution.parts.params


def _merged(parts: Mapping[str, tuple[KeyParts, KeyParts]], field: str) -> tuple[Change, ...]:
    """Return what differs in a part of the steps' keys, each difference once, with the steps that it concerns."""
    steps: dict[tuple[str, Any, Any], list[str]] = {}
    for step, pair in parts.items():
        before, after = (getattr(side, field) for side in pair)
        for difference in changes(before, after):
            steps.setdefault(difference, []).append(step)
    return tuple(Change(*difference, tuple(names)) for difference, names in sorted(steps.items()))


def _counts(a: Examples, b: Examples) -> Iterator[Counts]:
    totals, by_class = zip(*map(_class_counts, (a, b)), strict=True)
    yield Counts("all", *totals)
    for name in dict.fromkeys([*a.facts.class_names, *b.facts.class_names]):
        yield Counts(name, by_class[0].get(name), by_class[1].get(name))


def _class_counts(examples: Examples) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return the numbers of images by split, and by class and split."""
    names, counts = examples.facts.class_names, {}
    for split in SPLITS:
        counts[str(split)] = np.bincount(examples.split(split).labels, minlength=len(names))
    totals = {split: int(found.sum()) for split, found in counts.items()}
    return totals, {name: {split: int(found[i]) for split, found in counts.items()} for i, name in enumerate(names)}


def _drift(a: ExampleStatistics, b: ExampleStatistics) -> Iterator[Drift]:
    """Yield the differences of the training and the test images, class balance first."""
    for split in (TRAIN, TEST):
        one, other = a.facts.splits[split], b.facts.splits[split]
        balances = [
            dict(zip(facts.class_names, found.class_counts, strict=True))
            for facts, found in ((a.facts, one), (b.facts, other))
        ]
        names = dict.fromkeys([*balances[0], *balances[1]])
        before, after = (np.array([balance.get(name, 0) for name in names], np.int64) for balance in balances)
        yield Drift(f"class balance of {split}", class_shift(after, before))
        earlier, found = a.distributions(split), b.distributions(split)
        for name in (name for name in found if name in earlier):
            shift = ks_test(found[name], earlier[name], other.num_examples, one.num_examples)
            yield Drift(f"{name} of {split}", shift)


def _metrics(a: Side, b: Side) -> Iterator[Metric]:
    found = [_figures(a), _figures(b)]
    for name in dict.fromkeys([*found[0], *found[1]]):
        yield Metric(name, found[0].get(name), found[1].get(name))


def _figures(side: Side) -> dict[str, Value]:
    """Return the figures of a side by name."""
    figures = {}
    if side.evaluation:
        facts = side.evaluation.facts
        figures = {
            "accuracy": Value(facts.accuracy, facts.accuracy_interval),
            "cross-entropy": Value(facts.cross_entropy),
            "calibration error": Value(facts.calibration_error),
        }
        for found in facts.classes:
            right = round(found.recall * found.num_examples)
            interval = wilson_interval(right, found.num_examples) if found.num_examples else None
            figures[f"recall of {found.name}"] = Value(found.recall, interval)
    if (accuracy := side.model.facts.metrics.get("val_accuracy")) is not None:
        figures["validation accuracy"] = Value(accuracy)
    return figures


def _no_pairs(a: Side, b: Side) -> str:
    """Return why the predictions can't be compared image by image; empty if they can."""
    for side in (a, b):
        if side.evaluation is None:
            return f"{side.name} was not evaluated"
    if a.model.facts.class_names != b.model.facts.class_names:
        return "the classes differ"
    tests = [{n: e for n, e in s.examples.manifest.files.items() if n.startswith(f"{TEST}/")} for s in (a, b)]
    return "" if tests[0] == tests[1] else "the test images differ"


def _pairs(a: Side, b: Side) -> Pairs:
    assert a.evaluation
    assert b.evaluation
    labels = np.asarray(b.examples.split(TEST).labels)
    probabilities = [np.asarray(side.evaluation.predictions()) for side in (a, b) if side.evaluation]
    one, other = (found.argmax(axis=1) for found in probabilities)
    rows = np.arange(len(labels))
    gaps = np.abs(probabilities[0][rows, labels] - probabilities[1][rows, labels])
    a_right, b_right = one == labels, other == labels

    def disagreements(chosen: np.ndarray) -> tuple[Disagreement, ...]:
        found = np.flatnonzero(chosen)
        return tuple(
            Disagreement(
                index=int(i),
                label=int(labels[i]),
                a=int(one[i]),
                b=int(other[i]),
                a_probability=float(probabilities[0][i, one[i]]),
                b_probability=float(probabilities[1][i, other[i]]),
            )
            for i in found[np.argsort(-gaps[found], kind="stable")]
        )

    only_a, only_b = disagreements(a_right & ~b_right), disagreements(b_right & ~a_right)
    return Pairs(
        num_images=len(labels),
        both_right=int(np.sum(a_right & b_right)),
        both_wrong=int(np.sum(~a_right & ~b_right)),
        only_a_right=only_a,
        only_b_right=only_b,
        wrong_differently=disagreements(~a_right & ~b_right & (one != other)),
        p_value=mcnemar_p_value(len(only_a), len(only_b), alternative="two-sided"),
    )
