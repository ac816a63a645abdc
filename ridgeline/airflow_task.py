"""What a DAG file needs: the trigger form of its steps' parameters, and the body of a step's task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from airflow.sdk import Param, get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from pydantic.json_schema import GenerateJsonSchema

from ridgeline.artifacts.base import ArtifactError
from ridgeline.component import Component, ParameterError, Params, StepError, TransientStepError, flatten
from ridgeline.pipeline import load_components, parse_params, run_step, shared_params
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from ridgeline.store import StoreError

log = logging.getLogger(__name__)


def form(*components: Component) -> dict[str, Param]:
    """Return a DAG's params: those of its steps, flat, by the names that the command line uses.

    Airflow checks a run's values against them before it starts the run. Locations (``exclude=True``) are
    left out: they are the machine's, see `Settings`. So are parameters that a step takes from another one.

    Args:
        components: The DAG's steps.

    Returns:
        Airflow params by dotted name, for example ``train.penalty.l2``.
    """
    params = {}
    shared = tuple(f"{step.name}.{other.name}." for step, other in shared_params(components))
    for component in components:
        schema = component.params.model_json_schema(schema_generator=_GivenTitles)
        for name, default in flatten(component.params().model_dump(mode="json")):
            field = _field_schema(schema, name)
            field.pop("default", None)
            if not f"{component.name}.{name}".startswith(shared):
                params[f"{component.name}.{name}"] = Param(default, field.pop("description", None), **field)
    return params


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
    params, run = params_in_task(component, values), get_current_context()["dag_run"]
    shown = flatten(params.model_dump(mode="json"))
    log.info("%s got %s", component.name, ", ".join(f"{name}={value!r}" for name, value in shown))
    names: dict[str, str] = {}
    for name, given in inputs.items():
        names |= {name: given} if isinstance(given, str) else {f"{name}.{i}": n for i, n in enumerate(given or ())}
    try:
        by = run.triggering_user_name or ""
        execution = run_step(Settings(), component, names, params, run.run_id, by).execution
    except TransientStepError:
        raise
    except (StepError, FloatingPointError) as error:
        raise AirflowFailException(str(error)) from error
    if execution.output is None:
        raise AirflowSkipException(execution.reason)
    return execution.output


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
            by=run.triggering_user_name or run.run_id,
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
    context = get_current_context()
    try:
        return _parse(context["dag"].params, {**context["params"], **(values or {})}, Settings())[component.name]
    except ParameterError as error:
        raise AirflowFailException(str(error)) from error


def _parse(declared: Mapping[str, Any], values: Mapping[str, Any], settings: Settings) -> dict[str, Params]:
    """Validate a run's values for all steps of its DAG."""
    _refuse_unknown(declared, values)
    installed = load_components()
    owners = dict.fromkeys(name.split(".")[0] for name in declared)
    steps = [installed[name] for name in owners if name in installed]
    return parse_params(steps, {n: v for n, v in values.items() if n.split(".")[0] in installed}, settings)


def _refuse_unknown(declared: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse undeclared names, which Airflow itself lets pass."""
    if unknown := sorted(values.keys() - declared.keys()):
        raise ParameterError(
            f"Expected parameters of the DAG's trigger form; received {', '.join(unknown)}. "
            f"Check the spelling; the form has {', '.join(sorted(declared))}."
        )


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
