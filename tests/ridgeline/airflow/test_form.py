from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from ridgeline import pipeline
from ridgeline.artifacts.dataset import Dataset
from ridgeline.component import FOR_ONE_RUN, Component, ParameterError, Params, applies_with
from ridgeline.settings import Settings


@pytest.fixture(scope="module")
def form_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import form
    return form


class Penalty(BaseModel):
    kind: Literal["l1", "l2"] = "l2"
    l2: float = Field(0.5, ge=0, description="Strength.")


class FormParams(Params):
    name: str = Field("a", pattern="^[a-z]+$", title="The name")
    penalty: Penalty = Penalty(l2=0.25)
    share: float = Field(0.5, ge=0, lt=1)
    limit: int | None = Field(None, gt=0, le=9)
    choice: Literal["x", "y"] | None = None
    units: tuple[int, ...] = (3, 2)
    folder: Path | None = Field(None, exclude=True)
    reason: str | None = Field(None, json_schema_extra=FOR_ONE_RUN)


class OtherParams(Params):
    size: int = 2


def step(params: type[Params]) -> Component:
    return Component("fit", lambda **_: None, params, {}, Dataset)  # type: ignore[arg-type]


def test_the_form_has_one_param_a_leaf_by_its_dotted_name(form_module: ModuleType) -> None:
    form = form_module.form(step(FormParams))
    assert {name: param.value for name, param in form.items()} == {
        "fit.name": "a",
        "fit.penalty.kind": "l2",
        "fit.penalty.l2": "0.25",
        "fit.share": "0.5",
        "fit.limit": None,
        "fit.choice": None,
        "fit.units": [3, 2],
        "fit.reason": None,
        "rerun": [],
    }


def test_the_form_carries_the_schema(form_module: ModuleType) -> None:
    form = form_module.form(step(FormParams))
    assert form.pop("rerun").schema["items"]["enum"] == ["fit"]

    def text(param: Any) -> dict[str, Any]:
        assert not {"type", "section"} & param.schema.keys() - {"section"}
        return {name: param.schema[name] for name in ("pattern", "not")}

    assert {param.schema.pop("section") for param in form.values()} == {"Step fit"}
    assert {name: param.schema for name, param in form.items()} == {
        "fit.name": {"type": "string", "pattern": "^[a-z]+$", "title": "The name"},
        "fit.penalty.kind": {"type": "string", "enum": ["l1", "l2"]},
        "fit.penalty.l2": {"minimum": 0} | text(form["fit.penalty.l2"]),
        "fit.share": {"minimum": 0, "exclusiveMaximum": 1} | text(form["fit.share"]),
        "fit.limit": {"type": ["integer", "null"], "allOf": [{"exclusiveMinimum": 0, "maximum": 9}]},
        "fit.choice": {"type": ["string", "null"], "enum": ["x", "y", None]},
        "fit.units": {"type": "array", "items": {"type": "integer"}},
        "fit.reason": {"type": ["string", "null"]},
    }
    assert form["fit.penalty.l2"].description == "Strength."


def test_every_default_of_the_form_is_valid(form_module: ModuleType) -> None:
    for param in form_module.form(step(FormParams), *pipeline.load_components().values()).values():
        param.resolve()


def test_the_first_parameters_stand_before_the_sections(form_module: ModuleType) -> None:
    form = form_module.form(step(FormParams), first=["fit.penalty.l2", "fit.name"])
    assert list(form)[:3] == ["fit.penalty.l2", "fit.name", "fit.penalty.kind"]
    assert [name for name, param in form.items() if "section" not in param.schema] == ["fit.penalty.l2", "fit.name"]


@pytest.mark.parametrize("text", ["0", "1e-4", "1E-05", "0.02", ".5", "12", "3.", "2.5e+3"])
def test_a_number_may_be_typed_in_any_usual_way(form_module: ModuleType, text: str) -> None:
    form_module.form(step(FormParams))["fit.penalty.l2"].resolve(text)


@pytest.mark.parametrize("text", ["-1", "many", "", "1e", ".", "1,5", "nan", "inf", " 1"])
def test_what_is_no_number_is_refused(form_module: ModuleType, text: str) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        form_module.form(step(FormParams))["fit.penalty.l2"].resolve(text)


@pytest.mark.parametrize("text", ["0.75", "0", "5e-1", ".5", 0.5])
def test_a_share_may_be_typed_in_any_usual_way(form_module: ModuleType, text: str) -> None:
    form_module.form(step(FormParams))["fit.share"].resolve(text)


@pytest.mark.parametrize("text", ["75", "1.5", "1.01", "1", "1.0", "2", "10", "1e1", "-0.1", 1.0, None, True, [0.5]])
def test_a_share_outside_its_bounds_is_refused(form_module: ModuleType, text: Any) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        form_module.form(step(FormParams))["fit.share"].resolve(text)


def test_the_settings_may_set_other_defaults(form_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_module, "load_components", lambda: {"fit": step(FormParams), "other": step(OtherParams)})
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"fit.limit": 3, "fit.penalty.l2": 0.125, "other.size": 1}')
    form = form_module.form(step(FormParams))
    assert (form["fit.limit"].value, form["fit.penalty.l2"].value) == (3, "0.125")
    for bad, message in {
        '{"tif.limit": 3}': "parameters of the steps fit, other in RIDGELINE_DEFAULTS; received tif.limit",
        '{"fit.reason": "all"}': "Expected no fit.reason in RIDGELINE_DEFAULTS, since it applies to one run",
        '{"fit.lmit": 3}': "Unknown parameter fit.lmit",
    }.items():
        monkeypatch.setenv("RIDGELINE_DEFAULTS", bad)
        with pytest.raises(ParameterError, match=message):
            form_module.form(step(FormParams))
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"fit.limit": 30}')
    with pytest.raises(ParameterError, match="fit.limit: .* less than or equal to 9; received 30"):
        form_module.form(step(FormParams))


def test_numbers_that_were_typed_as_text_are_numbers_to_the_step(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = step(FormParams)
    monkeypatch.setattr(form_module, "load_components", lambda: {"fit": fit})
    declared = form_module.form(fit)
    params = form_module.parse_form(declared, {"fit.penalty.l2": "1e-4", "fit.share": 0.25}, Settings())["fit"]
    assert (params.penalty.l2, params.share) == (1e-4, 0.25)
    with pytest.raises(ParameterError, match="fit.share: expected less than 1; received 7.0"):
        form_module.parse_form(declared, {"fit.share": "7"}, Settings())


def test_a_dag_may_have_defaults_and_locations_of_its_own(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"fit.limit": 3, "fit.share": 0.25}')
    monkeypatch.setattr(form_module, "load_components", lambda: {"fit": step(FormParams)})
    form = form_module.form(step(FormParams), defaults={"fit.limit": 4, "fit.name": "a", "fit.folder": "/data"})
    assert (form["fit.limit"].value, form["fit.share"].value) == (4, "0.25")
    assert form["fit.folder"].schema == {"const": "/data"}  # Airflow's form hides it
    values = {name: param.value for name, param in form.items()}
    assert form_module.parse_form(form, values, Settings())["fit"].folder == Path("/data")
    for bad, message in {
        "fit.limit": "fit.limit: expected less than or equal to 9",
        "fit.reason": "Expected no fit.reason in the DAG's defaults",
        "tif.limit": "Expected defaults for parameters of the DAG's steps fit; received tif.limit",
    }.items():
        with pytest.raises(ParameterError, match=message):
            form_module.form(step(FormParams), defaults={bad: 10 if bad == "fit.limit" else "x"})


def test_the_form_offers_each_network_and_all_options(form_module: ModuleType) -> None:
    train = pipeline.load_components()["train"]
    form = form_module.form(train)
    assert form["train.network"].schema["enum"] == ["cnn", "mlp"]
    assert form["train.network"].schema["values_display"]["cnn"] == "cnn: Small convolutional network"
    assert form["train.cnn.filters"].value == [16, 32, 64]
    assert form["train.mlp.hidden_units"].schema["title"] == "Hidden units"
    values = {name: param.value for name, param in form.items() if name != "rerun"}
    chosen = values | {"train.network": "cnn", "train.cnn.dropout": "0.5", "train.mlp.hidden_units": [100, 100]}
    params = form_module.parse_form(form, chosen, Settings())["train"]
    assert params.model_dump()["cnn"] == {"filters": (16, 32, 64), "dropout": 0.5}
    assert "mlp" not in params.model_dump()
    with pytest.raises(ParameterError, match="train.cnn.dropout: expected its default 0.3 with network='mlp'"):
        form_module.parse_form(form, values | {"train.cnn.dropout": "0.5"}, Settings())


class Small(BaseModel):
    units: tuple[int, ...] = (3, 2)


class Strengths(BaseModel):
    kind: Literal["l1", "l2"] = "l2"
    l1: float = Field(0.5, json_schema_extra=applies_with(kind=["l1"]))


class ChoiceParams(Params):
    network: Literal["small", "large"] = "small"
    small: Small = Field(Small(), json_schema_extra=applies_with(network=["small"]))
    large: Small = Field(Small(), json_schema_extra=applies_with(network=["large"]))
    penalty: Strengths = Strengths()


@pytest.mark.parametrize("place", ["settings", "dag"])
def test_a_default_that_does_not_apply_to_a_run_counts_as_left_out(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    defaults = {"fit.small.units": [8], "fit.large.units": [9], "fit.penalty.l1": 0.25}
    if place == "settings":
        monkeypatch.setenv("RIDGELINE_DEFAULTS", json.dumps(defaults))
    monkeypatch.setattr(form_module, "load_components", lambda: {"fit": step(ChoiceParams)})
    form = form_module.form(step(ChoiceParams), defaults=defaults if place == "dag" else None)
    shown = {name: param.value for name, param in form.items()}
    assert {name: shown[name] for name in defaults} == defaults | {"fit.penalty.l1": "0.25"}

    def parsed(typed: Any = (), **values: Any) -> Any:
        return form_module.parse_form(form, shown | values, Settings(), typed)["fit"]

    run = parsed()
    assert (run.small.units, run.large.units, run.penalty.l1) == ((8,), (3, 2), 0.5)
    run = parsed(**{"fit.network": "large", "fit.penalty.kind": "l1"})
    assert (run.small.units, run.large.units, run.penalty.l1) == ((3, 2), (9,), 0.25)
    assert parsed(**{"fit.large.units": [7]}).large.units == (7,)  # it was typed: the step refuses or takes it
    assert parsed(typed=["fit.large.units"]).large.units == (9,)


def test_the_defaults_of_options_that_do_not_apply_need_not_be_retyped(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real steps, each choice of the form works without changing another field."""
    train = pipeline.load_components()["train"]
    monkeypatch.setenv(
        "RIDGELINE_DEFAULTS",
        '{"train.network": "cnn", "train.cnn.filters": [4], "train.mlp.hidden_units": [5], "train.momentum": 0.5, '
        '"train.penalty.kind": "l1", "train.penalty.l1": 0.25, "train.penalty.l2": 0.125, "train.weight_decay": 0.5}',
    )
    form = form_module.form(train)
    shown = {name: param.value for name, param in form.items()}
    for network in ("cnn", "mlp"):
        for optimizer in ("sgd", "adam"):
            for kind in ("none", "l1", "l2", "l1_l2", "group"):
                chosen = {"train.network": network, "train.optimizer": optimizer, "train.penalty.kind": kind}
                params = form_module.parse_form(form, shown | chosen, Settings())["train"]
                assert params.options == type(params.options)(
                    **{"cnn": {"filters": [4]}, "mlp": {"hidden_units": [5]}}[network]
                )
                assert (params.momentum, params.weight_decay) == ((0.5, 0.0) if optimizer == "sgd" else (0.0, 0.5))
                expected = {"l1": 0.25, "l2": 0.125, "group": 0.001}
                assert params.penalty.strengths == {name: expected[name] for name in params.penalty.strengths}
    with pytest.raises(ParameterError, match=r"train.mlp.hidden_units: expected its default .* with network='cnn'"):
        form_module.parse_form(form, shown | {"train.mlp.hidden_units": [6]}, Settings())
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"train.cnn.filterz": [4]}')
    with pytest.raises(ParameterError, match="train.cnn.filterz"):
        form_module.form(train)


@pytest.mark.parametrize(
    "chosen", [{"train.penalty.kind": "l2"}, {"train.optimizer": "adam"}, {"train.average": "0.9"}]
)
def test_a_default_solver_is_left_out_where_any_of_its_conditions_does_not_hold(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch, chosen: Any
) -> None:
    train = pipeline.load_components()["train"]
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"train.solver": "proximal", "train.penalty.kind": "l1"}')
    form = form_module.form(train)
    shown = {name: param.value for name, param in form.items()}
    assert form_module.parse_form(form, shown, Settings())["train"].solver == "proximal"
    assert form_module.parse_form(form, shown | chosen, Settings())["train"].solver == "subgradient"


def test_a_default_share_of_shifted_images_is_left_out_where_none_is_shifted(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = pipeline.load_components()["train"]
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"train.shift": 1, "train.shift_share": 0.5}')
    form = form_module.form(train)
    shown = {name: param.value for name, param in form.items()}
    assert form_module.parse_form(form, shown, Settings())["train"].shift_share == 0.5
    assert form_module.parse_form(form, shown | {"train.shift": 0}, Settings())["train"].shift_share == 1.0


@pytest.mark.parametrize(
    ("defaults", "chosen", "expected"),
    [
        ({"train.momentum": 0.5}, {"train.profile": "tuned"}, ("adam", 0.0, 0.0)),
        ({"train.momentum": 0.5, "train.profile": "tuned"}, {}, ("adam", 0.0, 0.0)),
        ({"train.momentum": 0.5, "train.profile": "tuned"}, {"train.profile": "seed"}, ("sgd", 0.5, 0.0)),
        ({"train.weight_decay": 0.01}, {"train.profile": "tuned", "train.network": "cnn"}, ("adam", 0.0, 0.01)),
        ({"train.weight_decay": 0.01}, {}, ("sgd", 0.0, 0.0)),
    ],
)
def test_whether_a_default_applies_depends_on_what_the_profile_fills_in(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch, defaults: Any, chosen: Any, expected: Any
) -> None:
    train = pipeline.load_components()["train"]
    monkeypatch.setenv("RIDGELINE_DEFAULTS", json.dumps(defaults))
    form = form_module.form(train)
    shown = {name: param.value for name, param in form.items()}
    params = form_module.parse_form(form, shown | chosen, Settings())["train"]
    assert (params.optimizer, params.momentum, params.weight_decay) == expected


class Inner(BaseModel):
    kind: Literal["a", "b"] = "a"
    strength: float = Field(0.5, json_schema_extra=applies_with(kind=["b"]))


class NestedParams(Params):
    network: Literal["small", "large"] = "small"
    large: Inner = Field(Inner(), json_schema_extra=applies_with(network=["large"]))


def test_a_default_may_apply_under_another_one_that_has_conditions_itself(
    form_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"fit.large.kind": "b", "fit.large.strength": 0.25}')
    monkeypatch.setattr(form_module, "load_components", lambda: {"fit": step(NestedParams)})
    form = form_module.form(step(NestedParams))
    shown = {name: param.value for name, param in form.items()}
    assert form_module.parse_form(form, shown, Settings())["fit"].large == Inner()
    run = form_module.parse_form(form, shown | {"fit.network": "large"}, Settings())["fit"]
    assert run.large == Inner(kind="b", strength=0.25)
