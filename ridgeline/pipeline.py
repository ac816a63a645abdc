"""The pipeline: steps found by entry point, wired by artifact type, run or explained in order."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ridgeline.artifacts.base import Artifact, ArtifactError
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.component import Component, ParameterError, Params
from ridgeline.executor import decide, execute
from ridgeline.keys import reachable_code
from ridgeline.registry import Pushed
from ridgeline.settings import Settings
from ridgeline.store import Execution

log = logging.getLogger(__name__)

T = TypeVar("T")

BASELINES = "baselines"  # the input that takes the model to beat: from the registry, never from a step
UNREADABLE = "unreadable_champion"  # the parameter, beside such an input, that takes its digest if it can't be read


def load_components() -> dict[str, Component]:
    """Return the installed steps by name, from the entry points ``ridgeline.components``."""
    components = {entry.name: entry.load() for entry in importlib.metadata.entry_points(group="ridgeline.components")}
    for component in components.values():
        reachable_code(component.module)  # what was imported just now is what will run, whatever is edited meanwhile
    return components


def plan(target: str, extra: Collection[str] = ()) -> list[Component]:
    """Return the steps that a target needs, itself last, in the order in which they run.

    Each input of a step is the output of the one step that yields that artifact type. An input of which there
    may be none is left out, unless its step is named.

    Args:
        target: Name of the last step.
        extra: Names of steps to run besides, if a step before the target can use what they yield.

    Raises:
        ParameterError: If there is no such step.
    """
    components = load_components()
    for name in (target, *extra):
        if name not in components:
            raise ParameterError(f"Expected a step of {', '.join(sorted(components))}; received {name!r}.")
    producers = {component.output: component for component in components.values()}
    ordered: list[Component] = []

    def visit(component: Component) -> None:
        for kind in component.inputs.values():
            visit(producers[kind])
        for kind in component.groups.values():
            if kind in producers and producers[kind].name in extra and producers[kind] is not component:
                visit(producers[kind])
        if component not in ordered:
            ordered.append(component)

    visit(components[target])
    if unused := set(extra) - {component.name for component in ordered}:
        raise ParameterError(
            f"Expected steps whose output a step up to {target} can use; received {', '.join(sorted(unused))}."
        )
    return ordered


def _inputs(component: Component, outputs: Mapping[type[Artifact[Any]], T]) -> dict[str, T]:
    """Return a step's inputs by name, from what earlier steps yielded."""
    groups = {n: kind for n, kind in component.groups.items() if kind in outputs and n != BASELINES}
    return {n: outputs[kind] for n, kind in component.inputs.items()} | {
        f"{n}.0": outputs[k] for n, k in groups.items()
    }


def _baselines(
    settings: Settings, component: Component, inputs: Mapping[str, str], params: Params
) -> tuple[dict[str, str], Params]:
    """Return the model that a step is to compare its own with, as an input by name, and the step's parameters.

    There is no such input if there is no such model, or if it can't be read; the parameters say so if it is the
    champion.
    """
    candidate = next((inputs[name] for name, kind in component.inputs.items() if kind is Model), None)
    if BASELINES not in component.groups or candidate is None:
        return {}, params
    store = settings.open_store()
    model = store.open(candidate, Model)
    registry, name = settings.open_registry(), model.facts.model_name
    baselines, unreadable = {}, None
    if other := registry.baseline(name, model.digest):
        try:
            baselines[f"{BASELINES}.0"] = store.open(f"{Model.__name__}/{other.model_digest}", Model).ref
        except (ArtifactError, OSError) as error:
            log.warning("%s can't read the model of %s version %d: %s", component.name, name, other.version, error)
            if other == registry.champion(name):
                unreadable = other.model_digest
    return baselines, params.model_copy(update={UNREADABLE: unreadable})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the values of ``name=value`` texts: JSON where it is JSON, else the text itself.

    Args:
        assignments: For example ``["train.epochs=3", "train.penalty.kind=l1"]``.

    Raises:
        ParameterError: If one has no name or no ``=``.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise ParameterError(f"Expected STEP.PARAMETER=VALUE, such as train.epochs=3; received {assignment!r}.")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def parse_params(steps: list[Component], values: Mapping[str, Any], settings: Settings) -> dict[str, Params]:
    """Validate every step's parameters before any step works.

    Where a step's parameters hold those of another step, by its name, it takes what that step is given: with both
    in a run, ``train.epochs`` is also ``sweep.train.epochs``, unless that is given itself.

    Args:
        steps: The steps.
        values: Values by dotted name, for example ``{"train.penalty.l2": 0.001}``.
        settings: Gives the locations that are not among the values.

    Returns:
        The parameters by step.

    Raises:
        ParameterError: If one is unknown, of the wrong type or out of range; all are named.
    """
    nested: dict[str, Any] = {step.name: dict(settings.locations(step)) for step in steps}
    errors = []
    for name, value in values.items():
        *path, leaf = name.split(".")
        if not path or path[0] not in nested:
            known = ", ".join(step.name for step in steps)
            errors.append(f"Unknown parameter {name}. Expected <step>.<parameter> with a step of {known}.")
            continue
        place = nested
        for part in path:
            place = place.setdefault(part, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[leaf] = value
    for step, other in shared_params(steps):
        known = step.params.model_fields[other.name].annotation.model_fields  # type: ignore[union-attr]
        given = nested[step.name].setdefault(other.name, {})
        if isinstance(given, dict):
            nested[step.name][other.name] = {n: v for n, v in nested[other.name].items() if n in known} | given
    params = {}
    for step in steps:
        try:
            params[step.name] = step.parse(nested[step.name])
        except ParameterError as error:
            errors.append(str(error))
    if errors:
        raise ParameterError("\n".join(errors))
    return params


def shared_params(steps: Iterable[Component]) -> list[tuple[Component, Component]]:
    """Return the pairs of steps of which the first one's parameters hold the second one's, by its name."""
    by_name = {step.name: step for step in steps}
    return [(s, by_name[name]) for s in by_name.values() for name in s.params.model_fields if name in by_name]


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Attributes:
        execution: Its record.
        pushed: The served version, if the step yields servable models.
    """

    execution: Execution
    pushed: Pushed | None


def run_step(
    settings: Settings, component: Component, inputs: Mapping[str, str], params: Params, run_id: str, by: str = ""
) -> StepResult:
    """Run or reuse one step, and serve its output if it is a servable model.

    A step that compares models is given the champion. What `Registry.why_not_pushed` objects to is not pushed.

    Args:
        settings: Where the store and the served models are.
        component: The step.
        inputs: Store-relative artifact names by input name.
        params: Its parameters.
        run_id: The pipeline run that this belongs to.
        by: The user who asked for it, if one did.
    """
    store = settings.open_store()
    baselines, params = _baselines(settings, component, inputs, params)
    execution = execute(store, component, {**inputs, **baselines}, params, run_id)
    pushed = None
    if execution.output and component.output is PushedModel:
        pushed = settings.open_registry().push(store.open(execution.output, PushedModel), run_id, by)
        log.info("%s: %s; served from %s", component.name, pushed.reason, pushed.path)
    return StepResult(execution, pushed)


def run(
    settings: Settings, steps: list[Component], params: Mapping[str, Params], run_id: str, by: str = ""
) -> Iterator[StepResult]:
    """Run steps in order, yielding each result; stops after a step that was skipped.

    Args:
        settings: Where the store and the served models are.
        steps: The steps, as `plan` orders them.
        params: Their parameters, as `parse_params` returns them.
        run_id: Name of this run.
        by: The user who asked for it, if one did.
    """
    outputs: dict[type[Artifact[Any]], str] = {}
    for step in steps:
        inputs = _inputs(step, outputs)
        result = run_step(settings, step, inputs, params[step.name], run_id, by)
        yield result
        if result.execution.output is None:
            return
        outputs[step.output] = result.execution.output


def explain(settings: Settings, steps: list[Component], params: Mapping[str, Params]) -> Iterator[tuple[str, str]]:
    """Tell, for each step, whether it would run or be reused, and why, without running anything.

    Args:
        settings: Where the store is.
        steps: The steps, as `plan` orders them.
        params: Their parameters, as `parse_params` returns them.

    Yields:
        The step's name and a sentence that begins with ``reused``, ``runs`` or ``depends``.
    """
    store = settings.open_store()
    outputs: dict[type[Artifact[Any]], Artifact[Any] | None] = {}
    for step in steps:
        inputs = _inputs(step, outputs)
        known = {name: artifact for name, artifact in inputs.items() if artifact is not None}
        if len(known) == len(inputs):
            refs = {name: artifact.ref for name, artifact in known.items()}
            baselines, filled = _baselines(settings, step, refs, params[step.name])
            known |= {name: store.open(ref, Model) for name, ref in baselines.items()}
            decision = decide(store, step, known, filled)
            outputs[step.output] = decision.output
            yield step.name, str(decision)
        else:
            outputs[step.output] = None
            unknown = ", ".join(name for name in inputs if name not in known)
            yield step.name, f"depends: runs unless {unknown} comes out as before"


def run_records(settings: Settings, run_id: str) -> dict[str, Execution]:
    """Return the last execution of each step of a run, by step.

    Args:
        settings: Where the store is.
        run_id: The run.
    """
    records: dict[str, Execution] = {}
    for execution in settings.open_store().executions():
        if execution.run_id == run_id:
            records.setdefault(execution.component, execution)  # newest first
    return records


def summary(settings: Settings, outcomes: Mapping[str, Execution | str]) -> Iterator[str]:
    """Yield the lines that a person reads after a run: each step, the accuracy, the verdict, where things are.

    Args:
        settings: Where the store and the served models are.
        outcomes: Each step's execution, in order; the state alone of a step that has none.
    """
    yield f"{'step':<11} {'state':<15} seconds  reason"
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            yield f"{name:<11} {outcome}"
        else:
            reason = outcome.reason.partition("\n")[0]
            yield f"{name:<11} {outcome.state:<15} {outcome.seconds:>7.1f}  {reason}"
    yield ""
    store = settings.open_store()
    for ref in (outcome.output for outcome in outcomes.values() if isinstance(outcome, Execution)):
        if ref and ref.startswith(f"{ModelEvaluation.__name__}/"):
            evaluation = store.open(ref, ModelEvaluation)
            facts, (low, high) = evaluation.facts, evaluation.facts.accuracy_interval
            verdict = f"{'' if facts.verdict.blessed else 'not '}blessed{' by force' if facts.verdict.forced else ''}"
            if facts.synthetic:
                yield "SYNTHETIC   drawn images: the figures say nothing about real ones"
            yield (
                f"accuracy    {facts.accuracy:.4f}, 95 % interval {low:.4f} to {high:.4f}, "
                f"on {facts.num_examples} test images of {facts.dataset}"
            )
            if other := facts.comparison:
                yield (
                    f"champion    {other.accuracy:.4f}, model {other.model_digest[:12]}: right alone on "
                    f"{other.only_champion_right} images, this model on {other.only_candidate_right}; "
                    f"p = {other.p_value:.4g}"
                )
            yield f"verdict     {verdict}: {'; '.join(facts.verdict.reasons)}"
            yield f"report      {evaluation.report}"
        if ref and ref.startswith(f"{SweepResult.__name__}/"):
            sweep = store.open(ref, SweepResult)
            yield f"chosen      {sweep.facts.trials[sweep.facts.winner]}: {sweep.facts.reason}"
            yield f"path        {sweep.report}"
        if ref and ref.startswith(f"{PushedModel.__name__}/"):
            model, registry = store.open(ref, PushedModel), settings.open_registry()
            name = model.facts.model_name
            if champion := registry.champion(name):
                if champion.artifact != ref and (reason := registry.why_not_pushed(model)):
                    yield f"export      {reason}"
                yield f"served      {name} version {champion.version} in {registry.root / name / str(champion.version)}"
