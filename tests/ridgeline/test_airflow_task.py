from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from ridgeline import pipeline
from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.dataset import Dataset
from ridgeline.component import Component, ParameterError, Params
from ridgeline.registry import HistoryEntry, Registry
from ridgeline.settings import Settings


@pytest.fixture(scope="module")
def airflow_task(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline import airflow_task
    return airflow_task


# --- the form


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
    found: str = Field("", json_schema_extra={"readOnly": True})


def step(params: type[Params]) -> Component:
    return Component("fit", lambda **_: None, params, {}, Dataset)  # type: ignore[arg-type, return-value]


def test_the_form_has_one_param_a_leaf_by_its_dotted_name(airflow_task: ModuleType) -> None:
    form = airflow_task.form(step(FormParams))
    assert {name: param.value for name, param in form.items()} == {
        "fit.name": "a",
        "fit.penalty.kind": "l2",
        "fit.penalty.l2": "0.25",
        "fit.share": "0.5",
        "fit.limit": None,
        "fit.choice": None,
        "fit.units": [3, 2],
    }


def test_the_form_carries_the_schema(airflow_task: ModuleType) -> None:
    form = airflow_task.form(step(FormParams))

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
    }
    assert form["fit.penalty.l2"].description == "Strength."


def test_every_default_of_the_form_is_valid(airflow_task: ModuleType) -> None:
    for param in airflow_task.form(step(FormParams), *pipeline.load_components().values()).values():
        param.resolve()


def test_the_first_parameters_stand_before_the_sections(airflow_task: ModuleType) -> None:
    form = airflow_task.form(step(FormParams), first=["fit.penalty.l2", "fit.name"])
    assert list(form)[:3] == ["fit.penalty.l2", "fit.name", "fit.penalty.kind"]
    assert [name for name, param in form.items() if "section" not in param.schema] == ["fit.penalty.l2", "fit.name"]


@pytest.mark.parametrize("text", ["0", "1e-4", "1E-05", "0.02", ".5", "12", "3.", "2.5e+3"])
def test_a_number_may_be_typed_in_any_usual_way(airflow_task: ModuleType, text: str) -> None:
    airflow_task.form(step(FormParams))["fit.penalty.l2"].resolve(text)


@pytest.mark.parametrize("text", ["-1", "many", "", "1e", ".", "1,5", "nan", "inf", " 1"])
def test_what_is_no_number_is_refused(airflow_task: ModuleType, text: str) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        airflow_task.form(step(FormParams))["fit.penalty.l2"].resolve(text)


@pytest.mark.parametrize("text", ["0.75", "0", "5e-1", ".5", 0.5])
def test_a_share_may_be_typed_in_any_usual_way(airflow_task: ModuleType, text: str) -> None:
    airflow_task.form(step(FormParams))["fit.share"].resolve(text)


@pytest.mark.parametrize("text", ["75", "1.5", "1.01", "1", "1.0", "2", "10", "1e1", "-0.1", 1.0, None, True, [0.5]])
def test_a_share_outside_its_bounds_is_refused(airflow_task: ModuleType, text: Any) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        airflow_task.form(step(FormParams))["fit.share"].resolve(text)


def test_the_settings_may_name_other_defaults(airflow_task: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(airflow_task, "load_components", lambda: {"fit": step(FormParams), "other": None})
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"fit.limit": 3, "fit.penalty.l2": 0.125, "other.step": 1}')
    form = airflow_task.form(step(FormParams))
    assert (form["fit.limit"].value, form["fit.penalty.l2"].value) == (3, "0.125")
    for bad, message in {
        '{"tif.limit": 3}': "parameters of the steps fit, other in RIDGELINE_DEFAULTS; received tif.limit",
        '{"evaluate.force_blessing": "all"}': "RIDGELINE_DEFAULTS",
    }.items():
        monkeypatch.setenv("RIDGELINE_DEFAULTS", bad)
        with pytest.raises(ParameterError, match=message):
            airflow_task.form(step(FormParams))
    monkeypatch.setenv("RIDGELINE_DEFAULTS", '{"fit.limit": 30}')
    with pytest.raises(ParameterError, match="fit.limit: .* less than or equal to 9; received 30"):
        airflow_task.form(step(FormParams))


# --- the schedule


def test_the_schedule_is_weekly_and_by_asset(airflow_task: ModuleType) -> None:
    schedule = airflow_task.schedule(airflow_task.Asset("source"))
    assert schedule.timetable.expression == "0 0 * * 0"
    assert [asset.name for asset in schedule.asset_condition.objects] == ["source"]


def test_the_schedule_is_configured(airflow_task: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    source = airflow_task.Asset("source")
    monkeypatch.setenv("RIDGELINE_SCHEDULE", "30 4 * * *")
    assert airflow_task.schedule(source).timetable.expression == "30 4 * * *"
    monkeypatch.setenv("RIDGELINE_SCHEDULE", "never")
    assert airflow_task.schedule(source) == [source]


# --- the task


class Task:
    """A stand-in for an Airflow task: its context, and a store of its own."""

    def __init__(self, airflow_task: ModuleType, patch: pytest.MonkeyPatch, components: list[Component]) -> None:
        self.module = airflow_task
        self.patch = patch
        self.declared = airflow_task.form(*components)
        self.outlets: list[Any] = []
        self.events: dict[Any, Any] = {}

    def __call__(self, component: Component, values: dict[str, Any], **inputs: str) -> str:
        params = {name: param.value for name, param in self.declared.items()} | values
        context = {"dag": SimpleNamespace(params=self.declared), "params": params, "run_id": "run-1"}
        self.events = {asset: SimpleNamespace(extra={}) for asset in self.outlets}
        context |= {"task": SimpleNamespace(outlets=self.outlets), "outlet_events": self.events}
        context |= {"dag_run": SimpleNamespace(triggering_user_name="ann")}
        self.patch.setattr(self.module, "get_current_context", lambda: context)
        return self.module.run_in_task(component, **inputs)


@pytest.fixture
def toys(toy_steps: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Component]:
    from toy_steps.double import double
    from toy_steps.seed import seed

    return {"seed": seed, "double": double}


@pytest.fixture
def task(airflow_task: ModuleType, toys: dict[str, Component], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Task:
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(airflow_task, "load_components", lambda: toys)
    return Task(airflow_task, monkeypatch, list(toys.values()))


def test_a_task_returns_the_name_of_its_artifact(task: Task, toys: dict[str, Component]) -> None:
    number = task(toys["seed"], {})
    doubled = task(toys["double"], {"double.factor": 5}, number=number)
    store = Settings().open_store()
    assert (store.path(doubled) / "number.txt").read_text() == "105"
    assert [(e.component, e.run_id) for e in store.executions()] == [("double", "run-1"), ("seed", "run-1")]


def test_a_task_logs_the_values_that_it_got(
    task: Task, toys: dict[str, Component], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="ridgeline"):
        task(toys["seed"], {"seed.value": 7})
    assert "seed got value=7, fail=False" in caplog.messages


def test_a_skipped_step_skips_its_task_with_the_reason(task: Task, toys: dict[str, Component]) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    number = task(toys["seed"], {"seed.value": 13})
    with pytest.raises(AirflowSkipException, match="13 is not doubled"):
        task(toys["double"], {}, number=number)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"double.factor": "many"}, "Parameter double.factor: .*received 'many'"),
        (
            {"sead.value": 1},
            "received sead.value. Check the spelling; the form has double.factor, seed.fail, seed.value",
        ),
        ({"seed.values": 1}, "received seed.values"),
    ],
)
def test_a_bad_parameter_of_any_step_fails_the_first_task_without_a_retry(
    task: Task, toys: dict[str, Component], values: dict[str, Any], message: str
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=message):
        task(toys["seed"], values)
    assert list(Settings().open_store().executions()) == []


def test_a_step_s_own_error_passes_so_that_airflow_retries(task: Task, toys: dict[str, Component]) -> None:
    with pytest.raises(ArithmeticError, match="asked to fail"):
        task(toys["seed"], {"seed.fail": True})


def test_numbers_that_were_typed_as_text_are_numbers_to_the_step(
    airflow_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = step(FormParams)
    monkeypatch.setattr(airflow_task, "load_components", lambda: {"fit": fit})
    declared = airflow_task.form(fit)
    params = airflow_task._parse(declared, {"fit.penalty.l2": "1e-4", "fit.share": 0.25}, Settings())["fit"]
    assert (params.penalty.l2, params.share) == (1e-4, 0.25)
    with pytest.raises(ParameterError, match="fit.share: expected less than 1; received 7.0"):
        airflow_task._parse(declared, {"fit.share": "7"}, Settings())


def test_an_asset_s_event_tells_of_the_artifact(task: Task, toys: dict[str, Component]) -> None:
    task.outlets = ["numbers"]
    name = task(toys["seed"], {"seed.value": 7})
    reason = "first run of seed"
    assert task.events["numbers"].extra == {"artifact": name, "state": "complete", "reason": reason, "digits": 1}
    task(toys["seed"], {"seed.value": 7})
    assert task.events["numbers"].extra["state"] == "cached"


def test_a_failure_tells_how_to_go_on_with_a_command_that_works(
    airflow_task: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import shlex

    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", "/data of mine")
    monkeypatch.delenv("RIDGELINE_SERVING", raising=False)
    steps = pipeline.load_components()
    values = {"train.epochs": 3, "evaluate.min_accuracy": 0.8, "ingest.dataset": "synthetic_garments:1.0.0"}
    missing = {"examples": f"Examples/{'0' * 64}"}
    task = Task(airflow_task, monkeypatch, list(steps.values()))
    with pytest.raises(ArtifactError), caplog.at_level("ERROR", logger="ridgeline"):
        task(steps["train"], values, **missing)
    line = next(line for line in caplog.text.splitlines() if "ridgeline run" in line)
    store, data, *command = shlex.split(line.partition("or run ")[2])
    assert (store, data) == (f"RIDGELINE_STORE={tmp_path / 'store'}", "RIDGELINE_MANUAL_DIR=/data of mine")
    assert command[:3] == ["ridgeline", "run", "train"]
    given = pipeline.parse_assignments(command[4::2])
    assert given == {"train.epochs": 3, "ingest.dataset": "synthetic_garments:1.0.0"}
    pipeline.parse_params(pipeline.plan("train"), given, Settings())


def test_params_of_the_dag_that_belong_to_no_step_are_left_alone(
    task: Task, toys: dict[str, Component], airflow_task: ModuleType
) -> None:
    task.declared["note"] = airflow_task.Param("hello")
    assert task(toys["seed"], {"note": "nightly"}).startswith("Number/")


def test_importing_it_does_not_import_tensorflow(tmp_path: Path) -> None:
    import subprocess

    code = "import sys, ridgeline.airflow_task; sys.exit('tensorflow' in sys.modules)"
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120, check=False).returncode == 0


# --- the rollback


def test_a_rollback_names_nobody_if_the_user_is_not_known(
    airflow_task: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path))
    monkeypatch.setattr(Registry, "verify", lambda *_: None)  # there is nothing to load
    lines = []
    for version in (1, 2):
        (tmp_path / "serving" / "shoes" / str(version)).mkdir(parents=True)
        values = {"version": version, "action": "push", "model_digest": str(version), "artifact": "", "accuracy": 0.8}
        lines.append(HistoryEntry.model_validate(values | {"run_id": "run"}).model_dump_json())
    (tmp_path / "serving" / "shoes" / "history.jsonl").write_text("\n".join(lines) + "\n")
    params = {"model": "shoes", "version": None, "reason": "worse"}
    run = SimpleNamespace(triggering_user_name=None, run_id="manual__1")
    context = {"dag": SimpleNamespace(params=params), "params": params, "dag_run": run}
    monkeypatch.setattr(airflow_task, "get_current_context", lambda: context)
    airflow_task.rollback_in_task()
    entry = Settings().open_registry().history("shoes")[-1]
    assert (entry.version, entry.by, entry.run_id) == (1, "", "manual__1")
