"""The pipeline: steps found by entry point, wired by artifact type, run or explained in order."""

from __future__ import annotations

import contextlib
import heapq
import importlib.metadata
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from ridgeline import fresh_process, mlflow_export
from ridgeline.announcements import announce, data_decision, find_evaluation, push_decision
from ridgeline.approval import Ask, expect_askable, find_answer, question, why_needed
from ridgeline.artifacts.base import Artifact, ArtifactError
from ridgeline.artifacts.dataset import served_name
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import Component, ParameterError, Params, PushRule, ServedParams, StepError, Workers
from ridgeline.decisions import Decision, Decisions
from ridgeline.executor import added_to, decide, execute, list_sources, open_inputs
from ridgeline.keys import reachable_code
from ridgeline.lineage import lineage, producer_in
from ridgeline.masking import mask
from ridgeline.registry import Pushed, RegistryError
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")


def load_components() -> dict[str, Component]:
    """Return the installed steps by name, from the entry points ``ridgeline.components``.

    Raises:
        ParameterError: If one can't be imported, or has another name than its step.
    """
    components: dict[str, Component] = {}
    for entry in importlib.metadata.entry_points(group="ridgeline.components"):
        try:
            component = entry.load()
        except Exception as error:  # whatever a person's module raises
            raise ParameterError(
                f"Cannot import the step {entry.name}: its entry point {entry.value} can't be used: "
                f"{type(error).__name__}: {error}. Correct its package, or uninstall it."
            ) from error
        if component.name in components or component.name != entry.name:
            raise ParameterError(
                f"Expected entry points of ridgeline.components with the names of their steps, each once; received "
                f"{entry.name} = {entry.value}, whose step is named {component.name}. Rename one of them."
            )
        components[component.name] = component
    for component in components.values():
        reachable_code(component.module)  # digest the code as imported, before anyone edits it
        for module in component.code(None):
            with contextlib.suppress(Exception):  # a run that uses this code meets the error; others do not
                reachable_code(component.module, module)
    return components


def output_types() -> dict[str, type[Artifact[Any]]]:
    """Return the artifact types that the installed steps yield, by name."""
    return {component.output.__name__: component.output for component in load_components().values()}


def default_target() -> str:
    """Return the name of the step that yields servable models: the last one of a whole run."""
    return step_that_yields(PushedModel)


def step_that_yields(kind: type[Artifact[Any]]) -> str:
    """Return the name of the installed step that yields an artifact type.

    Raises:
        ParameterError: If there is none.
    """
    for component in load_components().values():
        if component.output is kind:
            return component.name
    raise ParameterError(f"Expected a step that yields {kind.__name__}; received none. Install Ridgeline again.")


def optional_steps(target: str) -> list[str]:
    """Return the names of the steps that a run up to a target leaves out unless they are named.

    Args:
        target: Name of the last step.
    """
    planned = {step.name for step in plan(target)}
    optional = []
    for name in load_components().keys() - planned:
        with contextlib.suppress(ParameterError):
            plan(target, [name])
            optional.append(name)
    return sorted(optional)


def plan(target: str, extra: Collection[str] = ()) -> list[Component]:
    """Return the steps that a target needs, itself last, in the order in which they run.

    Each input of a step is the output of the one step that yields that artifact type. An optional input is left out
    unless `extra` names the step that yields it, or a step that this one needs. What a step is to run after runs before
    it.

    Args:
        target: Name of the last step.
        extra: Names of further steps to run; a step up to the target must be able to use their outputs.

    Raises:
        ParameterError: If there is no such step, or two steps yield one artifact type.
    """
    components = load_components()
    for name in (target, *extra):
        if name not in components:
            raise ParameterError(f"Expected a step of {', '.join(sorted(components))}; received {name!r}.")
    producers = _producers(components.values())

    open_steps: list[str] = []

    def with_needed(component: Component) -> dict[str, Component]:
        """Return a step, by name, after those that it needs."""
        if component.name in open_steps:
            cycle = " → ".join([*open_steps, component.name])
            raise ParameterError(
                f"Expected steps of which none needs its own output; received {cycle}. Give one of them another "
                "input or output type."
            )
        open_steps.append(component.name)
        steps: dict[str, Component] = {}
        for kind in (*_wired(component).values(), *component.groups.values(), *component.after):
            steps |= with_needed(_producer(producers, component, kind))
        for kind in component.optional.values():
            known = kind in producers and producers[kind].name not in open_steps
            optional = with_needed(producers[kind]) if known else {}
            steps |= optional if set(extra) & (optional.keys() - steps.keys()) else {}
        open_steps.pop()
        return {**steps, component.name: component}

    ordered = list(with_needed(components[target]).values())
    if unused := set(extra) - {component.name for component in ordered}:
        raise ParameterError(
            f"Expected steps whose output a step up to {target} can use; received {', '.join(sorted(unused))}."
        )
    return ordered


def _producers(components: Iterable[Component]) -> dict[type[Artifact[Any]], Component]:
    """Return the step that yields each artifact type."""
    producers: dict[type[Artifact[Any]], Component] = {}
    for component in components:
        if (other := producers.setdefault(component.output, component)) is not component:
            raise ParameterError(
                f"Expected one step that yields {component.output.__name__}; received {other.name} of {other.module} "
                f"and {component.name} of {component.module}. Give one of them an artifact type of its own, or remove "
                "its entry point."
            )
    return producers


def _producer(
    producers: Mapping[type[Artifact[Any]], Component], component: Component, kind: type[Artifact[Any]]
) -> Component:
    if kind not in producers:
        raise ParameterError(
            f"Expected a step that yields {kind.__name__}, which {component.name} needs; received none. Add its entry "
            "point, and install again."
        )
    return producers[kind]


def _served(component: Component) -> dict[str, type[Artifact[Any]]]:
    """Return the inputs of a step that are taken from the registry, see `ServedParams`, by name."""
    takes = issubclass(component.params, ServedParams)
    return {name: kind for name, kind in component.inputs.items() if takes and kind is PushedModel}


def _wired(component: Component) -> dict[str, type[Artifact[Any]]]:
    """Return the inputs of a step that must come from steps before it, by name."""
    return {name: kind for name, kind in component.inputs.items() if name not in _served(component)}


def _inputs(component: Component, outputs: Mapping[type[Artifact[Any]], T]) -> dict[str, T]:
    """Return a step's inputs by name, from what earlier steps yielded."""
    inputs = {name: outputs[kind] for name, kind in _wired(component).items()}
    inputs |= {name: outputs[kind] for name, kind in component.optional.items() if kind in outputs}
    return inputs | {f"{name}.0": outputs[kind] for name, kind in component.groups.items() if kind in outputs}


def _filled_in(
    settings: Settings, component: Component, inputs: Mapping[str, str], params: Params
) -> tuple[dict[str, str], Params]:
    """Return a step's inputs with those that the pipeline finds itself, and its parameters with the served version.

    Raises:
        StepError: If there is no such served version, or it is damaged.
    """
    found = {**inputs, **_champions(settings, component, inputs, params)}
    if isinstance(params, ServedParams) and (served := _served(component)).keys() - inputs.keys():
        if not params.model:
            raise ParameterError(
                f"Parameter {component.name}.model: expected the name of a served model; received none. `ridgeline "
                "models list` shows them."
            )
        try:
            entry, _ = settings.open_registry().open_version(settings.open_store(), params.model, params.version)
        except (RegistryError, ArtifactError) as error:
            raise StepError(str(error)) from error
        found |= dict.fromkeys(served, entry.artifact)
        params = params.model_copy(update={"version": entry.version})
    return {**found, **added_to(settings.open_store(), component, params)}, params


def _champions(settings: Settings, component: Component, inputs: Mapping[str, str], params: Params) -> dict[str, str]:
    """Return the artifact for each champion input of a step, by input name; empty if there is none.

    The present champion is returned even if it can't be read. A champion that it replaced is left out if it can't be
    read, since there is nothing to compare with.
    """
    champions: dict[str, str] = {}
    for name, kind in component.champions.items() if component.uses_champion(params) else ():
        if kind is component.output:
            champions |= _start(settings, component, name, inputs, params)
            continue
        candidate = next(inputs[n] for n, other in component.inputs.items() if other is kind)
        store, registry = settings.open_store(), settings.open_registry()
        own = store.open(candidate, kind)
        if not _is_served(settings, own):
            champions |= {name: ref} if (ref := _made_with_champion(settings, own)) else {}
            continue
        if other := registry.baseline(own.facts.model_name, own.digest):
            ref = f"{kind.__name__}/{other.model_digest}"
            if other != registry.champion(own.facts.model_name):
                try:
                    store.open(ref, kind)
                except (ArtifactError, OSError) as error:
                    log.warning("%s can't read version %d: %s", component.name, other.version, mask(error))
                    continue
            champions[name] = ref
    return champions


def _start(
    settings: Settings, component: Component, name: str, inputs: Mapping[str, str], params: Params
) -> dict[str, str]:
    """Return the champion's artifact that a step starts its own output from, by input name; empty if there is none.

    If the step made that artifact itself, from the same inputs and parameters, this is what it started from then. So
    an unchanged run is reused, although its output has become the champion's meanwhile.
    """
    store, registry = settings.open_store(), settings.open_registry()
    artifacts = (store.open(inputs[given], kind) for given, kind in component.inputs.items())
    dataset = next(artifact.facts.dataset for artifact in artifacts if hasattr(artifact.facts, "dataset"))
    champion = registry.champion(served_name(dataset))
    if champion is None:
        return {}
    ref: str | None = f"{Model.__name__}/{champion.model_digest}"
    if component.output is not Model:
        ref = _made_beside(store, component, champion.model_digest)
    if ref is None:
        return {}
    wanted = params.in_key()
    for made in store.executions(component.name, made=ref):
        if (made.parts.params, made.parts.sources) == (wanted, {}):
            earlier = dict(made.inputs)
            start = earlier.pop(name, None)
            if earlier == dict(inputs):
                return {name: start} if start else {}
    return {name: ref}


def _is_served(settings: Settings, own: Artifact[Any]) -> bool:
    """Return whether champions are of an artifact's type; also if there is no champion yet."""
    champion = settings.open_registry().champion(own.facts.model_name)
    if champion is None or isinstance(own, Model):
        return True
    served = f"{type(own).__name__}/{champion.model_digest}"
    return any(origin.ref == served for _, origin, _ in lineage(settings.open_store(), champion.artifact).walk())


def _made_with_champion(settings: Settings, own: Artifact[Any]) -> str | None:
    """Return the artifact of a type that was made from what the champion was made from; None if there is none.

    If that is this artifact itself, it is that of the champion that the champion replaced, and so on. So an unchanged
    run makes the same comparison as the run before, and is reused.
    """
    store = settings.open_store()
    step = _producers(load_components().values())[type(own)]
    for entry in settings.open_registry().champions(own.facts.model_name):
        ref = _made_beside(store, step, entry.model_digest)
        if ref is None:
            kind = type(own).__name__
            log.warning("no %s of version %d is left: there is nothing to compare with", kind, entry.version)
            return None
        if ref != own.ref:
            return ref
    return None


def _made_beside(store: Store, step: Component, model_digest: str) -> str | None:
    """Return the newest output of a step that was made only from what a model was made from; one that is left.

    Other inputs count as well if they were made only from that in their turn, such as statistics of the model's
    examples. Champions do not count. An output that was read from a source is left out: it is not made from the model's
    data.
    """
    model = f"{Model.__name__}/{model_digest}"
    origin = lineage(store, model)
    if origin.execution is None:  # its record was deleted: nothing tells what it was made from
        return None
    ancestors = {other.ref for _, other, _ in origin.walk()}
    kinds = {ref.partition("/")[0] for ref in ancestors}
    champions = {component.name: component.champions for component in load_components().values()}
    producer = producer_in(store)

    def is_beside(made: Execution | None) -> bool:
        return made is not None and all(
            ref in ancestors or (ref.partition("/")[0] not in kinds and is_beside(producer(ref)))
            for name, ref in made.inputs.items()
            if name not in champions.get(made.component, {})
        )

    steps = _producers(load_components().values())

    def made_by(step: Component) -> Iterator[Execution]:
        """Yield the executions of a step in question, newest first."""
        if not step.inputs:
            found = store.executions(step.name, with_output=True)
        else:
            kind = next(iter(step.inputs.values()))
            refs = [ref for ref in ancestors if ref.startswith(f"{kind.__name__}/")]
            if kind.__name__ not in kinds and kind in steps:
                refs = list(dict.fromkeys(made.output for made in made_by(steps[kind]) if made.output))
            using = [store.executions(step.name, used=ref) for ref in refs]
            found = heapq.merge(*using, key=lambda made: made.started_at, reverse=True)
        yield from (made for made in found if not made.parts.sources and is_beside(made))

    found = None
    for made in made_by(step):
        found = found or made.output
        if made.output and store.holds(made.output):
            return made.output
    return found


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the values of ``name=value`` texts: JSON where it is JSON, else the text itself.

    Args:
        assignments: For example ``["train.epochs=3", "train.penalty.kind=l1"]``.

    Raises:
        ParameterError: If one has no name or no ``=``.

    Example:
        >>> parse_assignments(["train.epochs=3", "train.mlp.hidden_units=[300, 100]", "train.patience=null"])
        {'train.epochs': 3, 'train.mlp.hidden_units': [300, 100], 'train.patience': None}
        >>> parse_assignments(["ingest.dataset=mnist:3.0.1"])
        {'ingest.dataset': 'mnist:3.0.1'}
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise ParameterError(f"Expected STEP.PARAMETER=VALUE; received {assignment!r}.")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def parse_params(steps: list[Component], values: Mapping[str, Any], settings: Settings) -> dict[str, Params]:
    """Validate every step's parameters before any step runs, and that a servable model can be served.

    A step's parameters can have a field that is named after another step and holds its parameters. Values for that
    other step then apply to the field, too: ``train.epochs`` also sets ``sweep.train.epochs``, unless that is given.

    Args:
        steps: The steps.
        values: Values by dotted name, for example ``{"train.penalty.l2": 0.001}``.
        settings: Gives the locations that are not among the values.

    Returns:
        The parameters by step.

    Raises:
        ParameterError: If one is unknown, of the wrong type or out of range, or the folder of the served models can't
            be used; all are named.
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
    if any(step.output is PushedModel for step in steps):
        try:
            settings.expect_servable()
        except StoreError as error:
            errors.append(str(error))
    if errors:
        raise ParameterError("\n".join(errors))
    return params


def shared_params(steps: Iterable[Component]) -> list[tuple[Component, Component]]:
    """Return the pairs of steps in which a field of the first one's parameters is named after the second one."""
    by_name = {step.name: step for step in steps}
    return [
        (step, by_name[name])
        for step in by_name.values()
        for name, field in step.params.model_fields.items()
        if name in by_name and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step.

    Attributes:
        execution: Its record.
        pushed: The served version, if the step yields servable models.
    """

    execution: Execution
    pushed: Pushed | None


def run_step(
    settings: Settings,
    component: Component,
    inputs: Mapping[str, str],
    params: Params,
    run_id: str,
    by: str = "",
    rerun: bool = False,
    link: str = "",
    ask: Ask | None = None,
    workers: Workers | None = None,
) -> StepResult:
    """Run or reuse one step, and serve its output if it is a servable model.

    A step that declares a champion receives it. A model that `Registry.decide_push` refuses is not pushed, nor one that
    a person must approve and does not. An artifact
    that states a problem is kept and recorded, so that its report can be read, and ends the run. What is decided about
    the model or the data is announced. After the step that yields servable models, the run is exported to MLflow, if
    that is set up.

    Args:
        settings: Where the store and the served models are.
        component: The step.
        inputs: Store-relative artifact names by input name.
        params: Its parameters.
        run_id: The pipeline run that this belongs to.
        by: The user who asked for it, if one did.
        rerun: Run it even if nothing changed.
        link: URL of the run's report, for messages about decisions; empty if there is none.
        ask: How a person is asked for approval; None if that is not possible.
        workers: The workers of this run; None for one.

    Raises:
        StepError: If the output, new or reused, states a problem.
        ParameterError: If the push may need approval, and there is no way to ask for it.
    """
    expect_askable([component], {component.name: params}, ask)
    store = settings.open_store()
    pushes = component.output is PushedModel
    with store.lease(run_id) if pushes else contextlib.nullcontext():  # a step has a lease of its own, a push has none
        if (component.champions and component.uses_champion(params)) or _served(component):
            settings.open_registry().recover()
        given, params = _filled_in(settings, component, inputs, params)
        execution = execute(store, component, given, params, run_id, rerun, workers)
        pushed, answer = None, None
        if execution.output and pushes:
            model = store.open(execution.output, PushedModel)
            pushed, answer = _push(settings, component.push(params), model, inputs, run_id, by, link, ask)
            if pushed:
                log.info("%s: %s; served from %s", component.name, pushed.reason, pushed.place)
        if pushes:
            rejected = answer is not None and answer.kind != "approved"
            announce(
                settings,
                answer,
                None if rejected else push_decision(store, inputs, execution, pushed, by, link, answer),
            )
            mlflow_export.export_run(store, run_id, pushed.version if pushed and pushed.new else None)
        if execution.output and component.output.problem is not Artifact.problem:
            artifact = store.open(execution.output, component.output)
            if artifact.problem:
                announce(settings, data_decision(artifact, run_id, by, link))
                raise StepError(f"{artifact.problem}\nThe report: {artifact.report or 'none'}")
        return StepResult(execution, pushed)


def _push(
    settings: Settings,
    rule: PushRule,
    model: PushedModel,
    inputs: Mapping[str, str],
    run_id: str,
    by: str,
    link: str,
    ask: Ask | None,
) -> tuple[Pushed | None, Decision | None]:
    """Push a model, if need be after a person approved it.

    Returns:
        The outcome of the push, None if it was not approved; and the answer, None if it needed none.
    """
    store, registry = settings.open_store(), settings.open_registry()
    evaluation = find_evaluation(store, inputs)
    why = why_needed(rule.approval, model, evaluation) if evaluation else ""
    if not (why and evaluation and ask):
        return registry.push(model, run_id, by, rule.canary_share), None
    name = model.facts.model_name
    if not (decision := registry.decide_push(model, by)).push and (champion := registry.champion(name)):
        place, reason = registry.place_of(name, champion.version), f"not pushed: {decision.reason}"
        return Pushed(place, champion.version, reason, new=False, unchanged=decision.unchanged), None
    decisions = Decisions(store)
    share = rule.canary_share if registry.champion(name) else 0.0
    asked = question(model, evaluation, why, share, run_id, by, link)
    answer = find_answer(asked, decisions.about(asked.model_digest))
    if answer is None:
        announce(settings, asked)
        answer = ask(asked, evaluation)
        decisions.add(answer)
    log.info("%s: %s", answer.title, "; ".join(answer.reasons))
    return registry.push(model, run_id, by, rule.canary_share, answer) if answer.kind == "approved" else None, answer


def run(
    settings: Settings,
    steps: list[Component],
    params: Mapping[str, Params],
    run_id: str,
    by: str = "",
    rerun: Collection[str] = (),
    ask: Ask | None = None,
) -> Iterator[StepResult]:
    """Run steps in order, yielding each result; stops after a step that was skipped.

    One of several workers that is not the chief stops after the last step that they run together: the chief does the
    rest.

    Args:
        settings: Where the store and the served models are.
        steps: The steps, as `plan` orders them.
        params: Their parameters, as `parse_params` returns them.
        run_id: Name of this run.
        by: The user who asked for it, if one did.
        rerun: Names of steps to run even if nothing changed.
        ask: How a person is asked for approval; None if that is not possible.
    """
    expect_steps(rerun, steps)
    expect_askable(steps, params, ask)
    workers = _workers(settings, steps)
    if workers and not workers.is_chief:
        last = max(i for i, step in enumerate(steps) if step.distributes)
        log.info("worker %d of %d: takes part until %s", workers.index, workers.count, steps[last].name)
        steps = steps[: last + 1]
    outputs: dict[type[Artifact[Any]], str] = {}
    with settings.open_store().lease(run_id):
        for step in steps:
            inputs = _inputs(step, outputs)
            result = run_step(
                settings, step, inputs, params[step.name], run_id, by, step.name in rerun, ask=ask, workers=workers
            )
            yield result
            if result.execution.output is None:
                return
            outputs[step.output] = result.execution.output
            missing = set(steps[-1].inputs.values()) - outputs.keys()
            if result.execution.state == "complete" and steps[-1].output is PushedModel and len(missing) == 1:
                fresh_process.start_ahead()  # to save the model and to check what is pushed


def _workers(settings: Settings, steps: Iterable[Component]) -> Workers | None:
    """Return the workers of a run; None if none of its steps distributes."""
    return settings.workers if any(step.distributes for step in steps) else None


def expect_steps(names: Iterable[str], steps: Iterable[Component]) -> None:
    """Refuse names of steps that are not part of a run.

    Raises:
        ParameterError: If there is one.
    """
    known = [step.name for step in steps]
    if unknown := [name for name in names if name not in known]:
        raise ParameterError(
            f"Expected steps of this run, {', '.join(known)}, to rerun; received {', '.join(unknown)}."
        )


def explain(
    settings: Settings, steps: list[Component], params: Mapping[str, Params], rerun: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Predict for each step whether it would run or be reused, and why. Nothing is run or written.

    Args:
        settings: Where the store is.
        steps: The steps, as `plan` orders them.
        params: Their parameters, as `parse_params` returns them.
        rerun: Names of steps that would run even if nothing changed.

    Yields:
        The step's name and a sentence that begins with ``reused``, ``runs`` or ``depends``.
    """
    expect_steps(rerun, steps)
    store, workers = settings.open_store(), _workers(settings, steps)
    outputs: dict[type[Artifact[Any]], Artifact[Any] | None] = {}
    for step in steps:
        inputs = _inputs(step, outputs)
        known = {name: artifact for name, artifact in inputs.items() if artifact is not None}
        if len(known) == len(inputs):
            refs = {name: artifact.ref for name, artifact in known.items()}
            refs, values = _filled_in(settings, step, refs, params[step.name])
            artifacts = open_inputs(store, step, refs)
            sources = list_sources(store, step, values, refs, keep=False)
            decision = decide(store, step, artifacts, values, step.name in rerun, sources, workers)
            outputs[step.output] = decision.output
            yield step.name, str(decision)
        else:
            outputs[step.output] = None
            unknown = [name.partition(".")[0] for name in inputs if name not in known]
            *others, last = unknown
            listed = f"{', '.join(others)} and {last} come" if others else f"{last} comes"
            yield step.name, f"depends: runs unless {listed} out as before"


def run_records(settings: Settings, run_id: str) -> dict[str, Execution]:
    """Return the last execution of each step of a run, by step.

    Args:
        settings: Where the store is.
        run_id: The run.
    """
    records: dict[str, Execution] = {}
    for execution in settings.open_store().executions(run_id=run_id):
        records.setdefault(execution.component, execution)  # newest first
    return records
