from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from ridgeline import pipeline
from ridgeline.artifacts.dataset import Dataset
from ridgeline.component import Component, Params
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
    limit: int | None = Field(None, gt=0, le=9)
    choice: Literal["x", "y"] | None = None
    units: tuple[int, ...] = (3, 2)
    folder: Path | None = Field(None, exclude=True)


def step(params: type[Params]) -> Component:
    return Component("fit", lambda **_: None, params, {}, Dataset)  # type: ignore[arg-type, return-value]


def test_the_form_has_one_param_a_leaf_by_its_dotted_name(airflow_task: ModuleType) -> None:
    form = airflow_task.form(step(FormParams))
    assert {name: param.value for name, param in form.items()} == {
        "fit.name": "a",
        "fit.penalty.kind": "l2",
        "fit.penalty.l2": 0.25,
        "fit.limit": None,
        "fit.choice": None,
        "fit.units": [3, 2],
    }


def test_the_form_carries_the_schema(airflow_task: ModuleType) -> None:
    form = airflow_task.form(step(FormParams))
    assert {name: param.schema for name, param in form.items()} == {
        "fit.name": {"type": "string", "pattern": "^[a-z]+$", "title": "The name"},
        "fit.penalty.kind": {"type": "string", "enum": ["l1", "l2"]},
        "fit.penalty.l2": {"type": "number", "minimum": 0},
        "fit.limit": {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 9},
        "fit.choice": {"type": ["string", "null"], "enum": ["x", "y", None]},
        "fit.units": {"type": "array", "items": {"type": "integer"}},
    }
    assert form["fit.penalty.l2"].description == "Strength."


def test_every_default_of_the_form_is_valid(airflow_task: ModuleType) -> None:
    for param in airflow_task.form(step(FormParams), *pipeline.load_components().values()).values():
        param.resolve()


# --- the task


class Task:
    """A stand-in for an Airflow task: its context, and a store of its own."""

    def __init__(self, airflow_task: ModuleType, patch: pytest.MonkeyPatch, components: list[Component]) -> None:
        self.module = airflow_task
        self.patch = patch
        self.declared = airflow_task.form(*components)

    def __call__(self, component: Component, values: dict[str, Any], **inputs: str) -> str:
        params = {name: param.value for name, param in self.declared.items()} | values
        context = {"dag": SimpleNamespace(params=self.declared), "params": params, "run_id": "run-1"}
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
