"""Convert the parameters of steps to the params of a DAG's trigger form, and back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from airflow.sdk import Param
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from ridgeline.airflow import RERUN
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.component import (
    APPLIES_WITH,
    FOR_ONE_RUN,
    Component,
    ParameterError,
    Params,
    applies,
    conditions,
    flatten,
    outside_key,
    with_option,
)
from ridgeline.pipeline import load_components, parse_params, shared_params
from ridgeline.settings import Settings

OWN_DEFAULT = "own_default"  # in the schema of a param whose default the DAG itself gives


def form(
    *components: Component, first: Iterable[str] = (), defaults: Mapping[str, Any] | None = None
) -> dict[str, Param]:
    """Return the params of a DAG: the parameters of its steps, by the dotted names that the command line uses.

    Airflow validates the values of a run against them before it starts the run. The form does not show locations
    (``exclude=True``), which `Settings` or the DAG's defaults provide, and leaves out parameters that a step takes from
    another step. The param ``rerun`` names steps to run even if nothing changed.

    Each step has a section on the form. Airflow opens one section at a time, so the parameters that are changed most
    often precede the sections. Defaults come from the DAG, otherwise from `Settings`, otherwise from the steps.

    Args:
        *components: The DAG's steps.
        first: Dotted names of the parameters that precede the sections, in order.
        defaults: The DAG's own defaults by dotted name.

    Returns:
        Airflow params by dotted name, for example ``train.penalty.l2``.

    Raises:
        ParameterError: If a default of the DAG or in `Settings` is unknown, of the wrong type or out of range.
    """
    params = {}
    shared = tuple(f"{step.name}.{other.name}." for step, other in shared_params(components))
    own = dict(defaults or {})
    values = _defaults(components, own)
    for component in components:
        schema = component.params.model_json_schema(schema_generator=_GivenTitles)
        for name, default in component.defaults().items():
            full_name, field = f"{component.name}.{name}", _field_schema(schema, name)
            if full_name.startswith(shared):
                continue
            for key in ("default", APPLIES_WITH, *FOR_ONE_RUN, *outside_key(), *with_option("")):
                field.pop(key, None)
            value, field = _form_field(values.get(full_name, default), field)
            field |= {OWN_DEFAULT: True} if full_name in own else {}
            params[full_name] = Param(value, field.pop("description", None), **field, section=f"Step {component.name}")
        for name, info in component.params.model_fields.items():
            if info.exclude and (full_name := f"{component.name}.{name}") in own:
                params[full_name] = Param(own[full_name], info.description, const=own[full_name])
    for name in first:
        del params[name].schema["section"]
    names = [component.name for component in components]
    params[RERUN] = Param(
        [],
        "Steps to run even if nothing changed. The other steps are reused as usual.",
        title="Run again",
        type="array",
        items={"type": "string", "enum": names},
        examples=names,
        section="Reuse",
    )
    return {name: params[name] for name in first} | params


def _defaults(components: Iterable[Component], own: Mapping[str, Any]) -> dict[str, Any]:
    settings, installed = AirflowSettings(), load_components()
    if unknown := [name for name in settings.defaults if name.split(".")[0] not in installed]:
        raise ParameterError(
            f"Expected parameters of the steps {', '.join(installed)} in RIDGELINE_DEFAULTS; received "
            f"{', '.join(unknown)}. Name them as on the form, STEP.PARAMETER."
        )
    names = {component.name for component in components}
    if unknown := [name for name in own if name.split(".")[0] not in names]:
        raise ParameterError(
            f"Expected defaults for parameters of the DAG's steps {', '.join(sorted(names))}; received "
            f"{', '.join(unknown)}. Name them as on the form, STEP.PARAMETER."
        )
    defaults = {name: value for name, value in settings.defaults.items() if name.split(".")[0] in names} | dict(own)
    _parse_applying(list(components), defaults, defaults, settings)
    for component in components:
        for name, field in component.params.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if FOR_ONE_RUN.keys() & extra.keys() and (full_name := f"{component.name}.{name}") in defaults:
                place = "the DAG's defaults" if full_name in own else "RIDGELINE_DEFAULTS"
                raise ParameterError(
                    f"Expected no {full_name} in {place}, since it applies to one run; received one. Set it "
                    "on the form of that run."
                )
    return defaults


def _parse_applying(
    steps: list[Component], values: Mapping[str, Any], optional: Collection[str], settings: Settings
) -> dict[str, Params]:
    """Validate values for all steps without those that are optional and do not apply under the others.

    What applies can depend on values that a step fills in. So the optional values that have conditions are first
    validated as the steps' own defaults, then those that apply are restored, until no further one applies.

    Args:
        steps: The steps.
        values: The values by dotted name.
        optional: Names of values that are left out if they do not apply, see `ridgeline.component.applies_with`.
        settings: Provides the locations.
    """
    types, defaults = {step.name: step.params for step in steps}, default_values(steps)
    left_out = {name for name in defaults.keys() & values.keys() & set(optional) if _has_conditions(types, name)}
    while left_out:
        params = parse_params(steps, {**values, **{name: defaults[name] for name in left_out}}, settings)
        if not (applying := {name for name in left_out if _applies(params, name)}):
            break
        left_out -= applying
    return parse_params(steps, {name: value for name, value in values.items() if name not in left_out}, settings)


def _has_conditions(types: Mapping[str, type[BaseModel]], name: str) -> bool:
    """Return whether a parameter, by dotted name, or a model that it is in has conditions."""
    step, *path = name.split(".")
    model, found = types[step], False
    for part in path:
        field = model.model_fields[part]
        found, model = found or bool(conditions(field)), cast(type[BaseModel], field.annotation)
    return found


def _applies(params: Mapping[str, BaseModel], name: str) -> bool:
    """Return whether a parameter, by dotted name, and the models that it is in apply under the others."""
    step, *path = name.split(".")
    model = params[step]
    for part in path:
        if not applies(model, part):
            return False
        model = getattr(model, part)
    return True


def _form_field(value: Any, field: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the default and the schema of a field, adapted to Airflow's form.

    The form's number fields drop ``1e-4`` and silently move values into the bounds that they see. So numbers are text
    with a pattern, and the bounds of whole numbers are placed where only the validation of a run applies them.
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
    """Return the pattern of a number that is typed as text.

    The pattern covers the lower bound 0 and the upper bound 1, both inclusive or exclusive. The step checks others.
    """
    not_zero = r"(?!0*\.?0*([eE]|$))" if "exclusiveMinimum" in field else ""
    if field.get("maximum", field.get("exclusiveMaximum", math.inf)) > 1:
        return rf"^{not_zero}([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
    one = r"|0*1(\.0*)?" if field.get("maximum") == 1 else ""
    return rf"^{not_zero}(0*\.[0-9]+([eE]-[0-9]+)?|[0-9]+(\.[0-9]*)?[eE]-[0-9]+|0+\.?0*{one})$"


def parse_form(
    declared: Mapping[str, Any], values: Mapping[str, Any], settings: Settings, typed: Collection[str] = ()
) -> dict[str, Params]:
    """Validate a run's values for all steps of its DAG.

    The form sends the value of every field. So a value that equals the step's own default counts as left out, unless
    it was typed elsewhere, or the DAG or `Settings.defaults` names it. A value that equals the default on the form also
    counts as left out if it does not apply under the other values, see `ridgeline.component.applies_with`.

    Args:
        declared: The DAG's params by name.
        values: The run's values by name; numbers may be text.
        settings: Provides the locations.
        typed: Names of values that a user typed, even if they equal a default.

    Returns:
        The parameters by step.

    Raises:
        ParameterError: If a parameter is unknown, of the wrong type or out of range.
    """
    refuse_unknown(declared, values)
    installed = load_components()
    owners = dict.fromkeys(name.split(".")[0] for name in declared)
    steps = [installed[name] for name in owners if name in installed]
    known = {name: value for name, value in values.items() if name.split(".")[0] in installed}
    known |= _typed_numbers(steps, known)
    defaults = default_values(steps)
    own = (name for name, param in declared.items() if isinstance(param, Param) and OWN_DEFAULT in param.schema)
    kept = {*typed, *settings.defaults, *own}
    left_out = {name for name in known.keys() & defaults.keys() - kept if known[name] == defaults[name]}
    shown = {name: param.value for name, param in declared.items() if isinstance(param, Param)}
    shown |= _typed_numbers(steps, {name: shown[name] for name in shown.keys() & defaults.keys()})
    given = {name: value for name, value in known.items() if name not in left_out}
    unchanged = {name for name in given.keys() - set(typed) if given[name] == shown.get(name)}
    return _parse_applying(steps, given, unchanged, settings)


def flat_params(params: Mapping[str, Params]) -> dict[str, Any]:
    """Return the parameters of steps by dotted name, as JSON values.

    Args:
        params: The parameters by step.
    """
    return {f"{s}.{n}": value for s, found in params.items() for n, value in flatten(found.model_dump(mode="json"))}


def default_values(steps: Iterable[Component]) -> dict[str, Any]:
    """Return the steps' own defaults of all parameters by dotted name, as JSON values.

    Args:
        steps: The steps.
    """
    return {f"{step.name}.{name}": value for step in steps for name, value in step.defaults().items()}


def refuse_unknown(declared: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse names that the form does not declare. Airflow accepts them.

    Raises:
        ParameterError: If a name is unknown.
    """
    if unknown := sorted(values.keys() - declared.keys()):
        raise ParameterError(
            f"Expected parameters of the DAG's trigger form; received {', '.join(unknown)}. "
            f"Check the spelling; the form has {', '.join(sorted(declared))}."
        )


def _typed_numbers(steps: Iterable[Component], values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that were typed as text into the form's fields, see `_form_field`."""
    numbers = {}
    schemas = {step.name: step.params.model_json_schema() for step in steps}
    for name, value in values.items():
        step, _, field = name.partition(".")
        if isinstance(value, str) and _field_schema(schemas[step], field).get("type") == "number":
            with contextlib.suppress(ValueError):  # the step's validation reports it
                numbers[name] = float(value)
    return numbers


class _GivenTitles(GenerateJsonSchema):
    """Omits titles that pydantic generates, such as ``L2``: the form shows the dotted name instead."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _field_schema(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the JSON schema of one field, by its dotted name, self-contained."""
    field = dict(schema)
    for part in name.split("."):
        field = _resolve(field["properties"][part], schema.get("$defs", {}))
    return field


def _resolve(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Replace references by their definitions, and ``anyOf [x, null]`` by x with a list of types."""
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
