"""What a DAG file needs: the form of its steps' parameters, its schedule, and the body of a step's task."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable, Param, get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, AirflowTaskTimeout
from pydantic.json_schema import GenerateJsonSchema

from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import Component, ParameterError, Params, StepError, TransientStepError, flatten
from ridgeline.pipeline import (
    StepResult,
    load_components,
    parse_params,
    plan,
    run_records,
    run_step,
    shared_params,
)
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from ridgeline.store import StoreError

log = logging.getLogger(__name__)


def form(*components: Component, first: Iterable[str] = ()) -> dict[str, Param]:
    """Return a DAG's params: those of its steps, flat, by the names that the command line uses.

    Airflow checks a run's values against them before it starts the run. Locations (``exclude=True``) are
    left out: they are the machine's, see `Settings`. So are parameters that a step takes from another one, and those
    that the pipeline fills in (``readOnly``).
    Each step's parameters are a section of the form; Airflow opens one section at a time, so the parameters that
    people change most stand before them, in none. Defaults are the steps' own, unless `Settings` names others.

    Args:
        components: The DAG's steps.
        first: Dotted names of the parameters that stand first, in their order.

    Returns:
        Airflow params by dotted name, for example ``train.penalty.l2``.

    Raises:
        ParameterError: If a default that `Settings` names is unknown, of the wrong type or out of range.
    """
    params = {}
    shared = tuple(f"{step.name}.{other.name}." for step, other in shared_params(components))
    defaults = _defaults(components)
    for component in components:
        schema = component.params.model_json_schema(schema_generator=_GivenTitles)
        for name, default in flatten(component.params().model_dump(mode="json")):
            full_name, field = f"{component.name}.{name}", _field_schema(schema, name)
            if full_name.startswith(shared) or field.get("readOnly"):
                continue
            field.pop("default", None)
            value, field = _as_a_person_types_it(defaults.get(full_name, default), field)
            params[full_name] = Param(value, field.pop("description", None), **field, section=f"Step {component.name}")
    for name in first:
        del params[name].schema["section"]
    return {name: params[name] for name in first} | params


def _defaults(components: Iterable[Component]) -> dict[str, Any]:
    settings, installed = Settings(), load_components()
    if unknown := [name for name in settings.defaults if name.split(".")[0] not in installed]:
        raise ParameterError(
            f"Expected parameters of the steps {', '.join(installed)} in RIDGELINE_DEFAULTS; received "
            f"{', '.join(unknown)}. Name them as on the form, such as train.epochs."
        )
    if "evaluate.force_blessing" in settings.defaults:
        raise ParameterError(
            "Expected no evaluate.force_blessing in RIDGELINE_DEFAULTS, which would bless every model; received one. "
            "Give the reason on the form of the run that it is for."
        )
    names = {component.name for component in components}
    defaults = {name: value for name, value in settings.defaults.items() if name.split(".")[0] in names}
    parse_params(list(components), defaults, settings)
    return defaults


def _as_a_person_types_it(value: Any, field: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a field's default and schema so that Airflow's form keeps what is typed into it, and refuses what is bad.

    Its number fields drop ``1e-4`` and silently move a value into the bounds that they see. So a number is typed as
    text, of a pattern, and whole numbers' bounds stand where only the check of the run's values sees them.
    """
    if field.get("type") == "number":
        neither = {"type": ["null", "boolean", "array", "object"]}
        return str(value), {k: v for k, v in field.items() if k != "type"} | {
            "pattern": _pattern(field),
            "not": neither,
        }
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & field.keys()
    if not bounds:
        return value, field
    return value, {k: v for k, v in field.items() if k not in bounds} | {"allOf": [{k: field[k] for k in bounds}]}


def _pattern(field: Mapping[str, Any]) -> str:
    """Return the pattern of a number that is typed as text: at least 0, or above; at most 1, or below, if it has to be.

    Other bounds are left to the step's own check.
    """
    not_zero = r"(?!0*\.?0*([eE]|$))" if "exclusiveMinimum" in field else ""
    if field.get("maximum", field.get("exclusiveMaximum", math.inf)) > 1:
        return rf"^{not_zero}([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
    one = r"|0*1(\.0*)?" if field.get("maximum") == 1 else ""
    return rf"^{not_zero}(0*\.[0-9]+([eE]-[0-9]+)?|[0-9]+(\.[0-9]*)?[eE]-[0-9]+|0+\.?0*{one})$"


def schedule(*assets: Asset) -> AssetOrTimeSchedule | list[Asset]:
    """Return when a DAG runs by itself: by the clock, as `Settings` says, and whenever one of some assets changed.

    Args:
        assets: The assets.
    """
    cron = Settings().schedule
    if cron == "never":
        return list(assets)
    # Without a DAG's start_date, and with this, a new Airflow waits for the next tick instead of running the last one.
    timetable = CronTriggerTimetable(cron, timezone="UTC", run_immediately=timedelta(minutes=5))
    return AssetOrTimeSchedule(timetable=timetable, assets=list(assets))


def run_in_task(
    component: Component, values: Mapping[str, Any] | None = None, **inputs: str | Iterable[str] | None
) -> str:
    """Run or reuse a step inside its Airflow task, with the parameters of the DAG run.

    The parameters of all the DAG's steps are checked, so that a bad one is refused before any step works.

    Args:
        component: The step.
        values: Parameters by dotted name that replace those of the DAG run.
        **inputs: Store-relative names of its input artifacts, as upstream tasks returned them: several for an
            input that takes any number of them, None for one whose task was skipped.

    Returns:
        The output artifact's store-relative name: all that passes through XCom.

    Raises:
        AirflowFailException: If a parameter is bad, or the step can't work with what it was given; not retried.
        AirflowSkipException: If the step has a reason to yield nothing.
    """
    context, settings = get_current_context(), Settings()
    params, run_id = params_in_task(component, values), context["run_id"]
    shown = flatten(params.model_dump(mode="json"))
    log.info("%s got %s", component.name, ", ".join(f"{name}={value!r}" for name, value in shown))
    names: dict[str, str] = {}
    for name, given in inputs.items():
        names |= {name: given} if isinstance(given, str) else {f"{name}.{i}": n for i, n in enumerate(given or ())}
    try:
        by = context["dag_run"].triggering_user_name or ""
        result = run_step(settings, component, names, params, run_id, by)
    except (Exception, AirflowTaskTimeout) as error:
        with contextlib.suppress(Exception):  # the step's own error is the one to show
            log.error("%s", _how_to_go_on(settings, component, run_id))
        if isinstance(error, StepError | FloatingPointError) and not isinstance(error, TransientStepError):
            raise AirflowFailException(str(error)) from error
        raise
    if component.output is PushedModel:
        states = {record.state for record in run_records(settings, run_id).values()}
        if states <= {"cached", "skipped"}:
            log.info("nothing changed: every step was reused, and what is served stays as it is")
    if result.execution.output is None:
        raise AirflowSkipException(result.execution.reason)
    for asset in context["task"].outlets:
        context["outlet_events"][asset].extra = _facts(settings, result)
    return result.execution.output


def _facts(settings: Settings, result: StepResult) -> dict[str, Any]:
    """Return what an asset's event tells of an artifact: its name, whether it is new, and its plain facts."""
    execution = result.execution
    assert execution.output is not None
    stated = settings.open_store().manifest(execution.output).facts
    facts = {name: value for name, value in stated.items() if isinstance(value, bool | int | float | str)}
    facts |= {"artifact": execution.output, "state": execution.state, "reason": execution.reason}
    if result.pushed:
        facts |= {"pushed": result.pushed.new, "served_version": result.pushed.version}
    return facts | stated.get("metrics", {})


def _how_to_go_on(settings: Settings, component: Component, run_id: str) -> str:
    """Return what to do after a failure: the command repeats this step with this run's parameters, and resumes."""
    extra = ["sweep"] if "sweep" in run_records(settings, run_id) and component.name != "sweep" else []
    steps, params = plan(component.name, extra), _params_of_all_steps(settings)
    command = ["ridgeline", "run", component.name, *(word for name in extra for word in ("--with", name))]
    shared = tuple(f"{step.name}.{other.name}." for step, other in shared_params(steps))  # given by the other step
    for step in steps:
        defaults = dict(flatten(step.params().model_dump(mode="json")))
        for name, value in flatten(params[step.name].model_dump(mode="json")):
            if value != defaults.get(name) and not f"{step.name}.{name}".startswith(shared):
                command += ["--set", f"{step.name}.{name}={json.dumps(value)}"]
    places = {"STORE": settings.store, "SERVING": settings.serving, "MANUAL_DIR": settings.manual_dir}
    variables = [f"RIDGELINE_{name}={shlex.quote(str(place))}" for name, place in places.items() if place]
    without_password = re.sub(r"(?<=//)[^/@]*@", "...@", " ".join([*variables, shlex.join(command)]))
    return (
        f"To go on once the cause is mended, clear this task in the UI, or run {without_password}\n"
        "Finished steps are reused; training resumes after its last finished epoch."
    )


def rollback_in_task() -> str:
    """Make an earlier version the champion, inside a task of a DAG with the params `model`, `version` and `reason`.

    Returns:
        What was done, as a sentence.

    Raises:
        AirflowFailException: If the registry refuses; not retried.
    """
    context = get_current_context()
    params, run, settings = context["params"], context["dag_run"], Settings()
    try:
        _refuse_unknown(context["dag"].params, params)
        entry = settings.open_registry().rollback(
            settings.open_store(),
            params["model"],
            params["version"],
            reason=params["reason"],
            by=run.triggering_user_name or "",
            run_id=run.run_id,
        )
    except (ParameterError, RegistryError, ArtifactError, StoreError) as error:
        raise AirflowFailException(str(error)) from error
    done = f"{params['model']} is served by version {entry.version}, accuracy {entry.accuracy:.4f}: {entry.reason}"
    log.info("%s", done)
    return done


def params_in_task(component: Component, values: Mapping[str, Any] | None = None) -> Any:
    """Return a step's parameters of the DAG run, inside a task.

    Args:
        component: The step.
        values: Parameters by dotted name that replace those of the DAG run.

    Raises:
        AirflowFailException: If a parameter of any of the DAG's steps is unknown, of the wrong type or out of range.
    """
    return _params_of_all_steps(Settings(), values)[component.name]


def _params_of_all_steps(settings: Settings, values: Mapping[str, Any] | None = None) -> dict[str, Params]:
    context = get_current_context()
    try:
        return _parse(context["dag"].params, {**context["params"], **(values or {})}, settings)
    except ParameterError as error:
        raise AirflowFailException(str(error)) from error


def _parse(declared: Mapping[str, Any], values: Mapping[str, Any], settings: Settings) -> dict[str, Params]:
    """Validate a run's values for all steps of its DAG."""
    _refuse_unknown(declared, values)
    installed = load_components()
    owners = dict.fromkeys(name.split(".")[0] for name in declared)
    steps = [installed[name] for name in owners if name in installed]
    known = {name: value for name, value in values.items() if name.split(".")[0] in installed}
    return parse_params(steps, known | _typed_numbers(steps, known), settings)


def _refuse_unknown(declared: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse undeclared names, which Airflow itself lets pass."""
    if unknown := sorted(values.keys() - declared.keys()):
        raise ParameterError(
            f"Expected parameters of the DAG's trigger form; received {', '.join(unknown)}. "
            f"Check the spelling; the form has {', '.join(sorted(declared))}."
        )


def _typed_numbers(steps: Iterable[Component], values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that were typed as text into the form's fields, see `_as_a_person_types_it`."""
    numbers = {}
    schemas = {step.name: step.params.model_json_schema() for step in steps}
    for name, value in values.items():
        step, _, field = name.partition(".")
        if isinstance(value, str) and _field_schema(schemas[step], field).get("type") == "number":
            with contextlib.suppress(ValueError):  # the step's own check has the better words
                numbers[name] = float(value)
    return numbers


class _GivenTitles(GenerateJsonSchema):
    """Leaves out titles that pydantic makes up, such as ``L2``: the form then shows the dotted name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _field_schema(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the JSON schema of one field, by its dotted name, self-contained."""
    field = dict(schema)
    for part in name.split("."):
        field = _resolve(field["properties"][part], schema.get("$defs", {}))
    return field


def _resolve(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Replace references by what they name, and ``anyOf [x, null]`` by x with a list of types."""
    if isinstance(schema, list):
        return [_resolve(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    schema = {key: _resolve(value, definitions) for key, value in schema.items()}
    match schema.get("anyOf"):
        case [{"type": str(kind)} as option, {"type": "null"}]:
            del schema["anyOf"]
            nullable: dict[str, list[Any]] = {"type": [kind, "null"]}
            if "enum" in option:
                nullable["enum"] = [*option["enum"], None]
            schema = option | schema | nullable
    return schema
