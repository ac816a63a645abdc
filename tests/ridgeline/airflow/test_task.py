from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from ridgeline import pipeline
from ridgeline.artifacts.base import ArtifactError
from ridgeline.component import Component
from ridgeline.decisions import Decisions
from ridgeline.history import HistoryEntry
from ridgeline.registry import Registry
from ridgeline.settings import Settings


@pytest.fixture(scope="module")
def task_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import task
    return task


class Task:
    """A stand-in for an Airflow task: its context, and a store of its own."""

    def __init__(self, task_module: ModuleType, patch: pytest.MonkeyPatch, components: list[Component]) -> None:
        self.module = task_module
        self.patch = patch
        from ridgeline.airflow import form

        self.declared = form.form(*components)
        self.outlets: list[Any] = []
        self.events: Any = None
        self.xcoms: dict[str, str] = {}

    def start(self, values: dict[str, Any], conf: dict[str, Any] | None = None, run_id: str = "run-1") -> None:
        """Give the context of a task in a run with these parameters."""
        from airflow.sdk.execution_time.context import OutletEventAccessors

        params = {name: param.value for name, param in self.declared.items()} | values
        context = {"dag": SimpleNamespace(params=self.declared), "params": params, "run_id": run_id}
        self.events = OutletEventAccessors()
        context |= {"task": SimpleNamespace(outlets=self.outlets), "outlet_events": self.events}
        context |= {"dag_run": SimpleNamespace(triggering_user_name="ann", conf=params if conf is None else conf)}
        context |= {"ti": SimpleNamespace(xcom_push=lambda key, value: self.xcoms.update({key: value}))}
        self.patch.setattr(self.module, "get_current_context", lambda: context)

    def __call__(
        self, component: Component, values: dict[str, Any], conf: dict[str, Any] | None = None, **inputs: str
    ) -> str:
        self.start(values, conf)
        return self.module.run_in_task(component, **inputs)

    def champions(self) -> list[tuple[str, dict[str, Any]]]:
        """The name and the data of each event that a model has another champion."""
        from ridgeline.airflow.champions import CHAMPIONS

        return [(event.dest_asset_key.name, event.extra) for event in self.events[CHAMPIONS].asset_alias_events]


@pytest.fixture
def toys(toy_steps: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Component]:
    from toy_steps.double import double
    from toy_steps.seed import seed

    return {"seed": seed, "double": double}


@pytest.fixture
def task(task_module: ModuleType, toys: dict[str, Component], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Task:
    from ridgeline.airflow import form

    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    for module in (form, pipeline):
        monkeypatch.setattr(module, "load_components", lambda: toys)
    return Task(task_module, monkeypatch, list(toys.values()))


def test_a_task_returns_the_name_of_its_artifact(task: Task, toys: dict[str, Component]) -> None:
    number = task(toys["seed"], {})
    doubled = task(toys["double"], {"double.factor": 5}, number=number)
    store = Settings().open_store()
    assert (store.path(doubled) / "number.txt").read_text() == "105"
    assert [(e.component, e.run_id) for e in store.executions()] == [("double", "run-1"), ("seed", "run-1")]


def test_a_task_logs_its_parameters(task: Task, toys: dict[str, Component], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ridgeline"):
        task(toys["seed"], {"seed.value": 7})
    assert "parameters of seed: value=7, fail=False" in caplog.messages


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
            "received sead.value. Check the spelling; the form has double.factor, rerun, seed.fail, seed.value",
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


def test_a_folder_of_another_user_fails_the_task_without_a_retry(
    task: Task, toys: dict[str, Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from ridgeline.airflow import task as tasks

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/data/store")

    monkeypatch.setattr(tasks, "parse_form", refuse)
    with pytest.raises(AirflowFailException, match="Cannot use /data/store: Permission denied"):
        task(toys["seed"], {})


@pytest.mark.parametrize(("error", "retried"), [("StepError", False), ("TransientStepError", True)])
def test_only_an_error_that_another_try_may_remove_is_retried(
    task_module: ModuleType,
    toys: dict[str, Component],
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    retried: bool,
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from ridgeline import component

    kind = getattr(component, error)

    def fail(*_: Any, **__: Any) -> None:
        raise kind("no network")

    monkeypatch.setattr(task_module, "run_step", fail)
    with pytest.raises(kind if retried else AirflowFailException, match="no network"):
        task(toys["seed"], {})


def test_a_step_s_own_error_passes_so_that_airflow_retries(task: Task, toys: dict[str, Component]) -> None:
    with pytest.raises(ArithmeticError, match="asked to fail"):
        task(toys["seed"], {"seed.fail": True})


def test_an_asset_event_describes_the_artifact(task: Task, toys: dict[str, Component]) -> None:
    from airflow.sdk import Asset

    numbers = Asset("numbers")
    task.outlets = [numbers]
    name = task(toys["seed"], {"seed.value": 7})
    reason = "first run of seed"
    assert task.events[numbers].extra == {"artifact": name, "state": "complete", "reason": reason, "digits": 1}
    task(toys["seed"], {"seed.value": 7})
    assert task.events[numbers].extra["state"] == "cached"


def test_a_failure_logs_a_command_that_resumes(
    task_module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import shlex

    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", "/data of mine")
    monkeypatch.setenv("RIDGELINE_BEAM_PIPELINE_OPTIONS", "--runner=FlinkRunner '--job_name=of mine'")
    monkeypatch.delenv("RIDGELINE_SERVING", raising=False)
    steps = pipeline.load_components()
    values = {"train.epochs": 3, "evaluate.min_accuracy": 0.8, "ingest.dataset": "synthetic_garments:1.0.0"}
    missing = {"examples": f"Examples/{'0' * 64}"}
    task = Task(task_module, monkeypatch, list(steps.values()))
    with pytest.raises(ArtifactError), caplog.at_level("ERROR", logger="ridgeline"):
        task(steps["train"], values, conf=None, **missing)
    line = next(line for line in caplog.text.splitlines() if "ridgeline run" in line)
    store, data, beam, *command = shlex.split(line.partition("or run ")[2])
    assert (store, data) == (f"RIDGELINE_STORE={tmp_path / 'store'}", "RIDGELINE_MANUAL_DIR=/data of mine")
    assert beam == "RIDGELINE_BEAM_PIPELINE_OPTIONS=--runner=FlinkRunner '--job_name=of mine'"
    assert command[:3] == ["ridgeline", "run", "train"]
    given = pipeline.parse_assignments(command[4::2])
    assert given == {"train.epochs": 3, "ingest.dataset": "synthetic_garments:1.0.0"}
    pipeline.parse_params(pipeline.plan("train"), given, Settings())


TUNED = {"train.profile": "tuned"}


@pytest.mark.parametrize(
    ("conf", "defaults", "epochs", "rate"),
    [
        (None, {}, 120, 0.001),  # from the form, which sends all values
        (TUNED | {"train.epochs": 2}, {}, 2, 0.001),  # typed on a command line or over REST
        (TUNED | {"train.epochs": 2, "train.optimizer": "sgd", "train.momentum": 0.5}, {}, 2, 0.001),
        (None, {"train.epochs": 2}, 2, 0.001),
        (TUNED, {"train.learning_rate": 0.02}, 120, 0.02),
        ({}, TUNED | {"train.penalty.l2": 0.01}, 120, 0.001),  # a scheduled run
    ],
)
def test_a_typed_value_counts_even_if_it_equals_the_default(
    task_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    conf: dict[str, Any] | None,
    defaults: dict[str, Any],
    epochs: int,
    rate: float,
) -> None:
    import shlex

    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RIDGELINE_DEFAULTS", json.dumps(defaults))
    steps, done = pipeline.load_components(), []

    def fail(*arguments: Any) -> None:
        done.append(arguments[3])
        raise ArithmeticError("stop here")

    monkeypatch.setattr(task_module, "run_step", fail)
    task = Task(task_module, monkeypatch, list(steps.values()))
    with pytest.raises(ArithmeticError), caplog.at_level("ERROR", logger="ridgeline"):
        task(steps["train"], TUNED if conf is None else conf, conf, examples=f"Examples/{'0' * 64}")
    (params,) = done
    assert (params.epochs, params.learning_rate, params.profile) == (epochs, rate, "tuned")
    line = next(line for line in caplog.text.splitlines() if "ridgeline run" in line)
    words = shlex.split(line.partition("or run ")[2])
    monkeypatch.delenv("RIDGELINE_DEFAULTS")
    given = pipeline.parse_assignments(words[words.index("--set") + 1 :: 2])
    assert pipeline.parse_params(pipeline.plan("train"), given, Settings())["train"] == params


def test_params_of_the_dag_that_belong_to_no_step_are_ignored(
    task: Task, toys: dict[str, Component], task_module: ModuleType
) -> None:
    from airflow.sdk import Param

    task.declared["note"] = Param("hello")
    assert task(toys["seed"], {"note": "nightly"}).startswith("Number/")


def test_importing_it_does_not_import_tensorflow(tmp_path: Path) -> None:
    import subprocess

    code = "import sys, ridgeline.airflow.task; sys.exit('tensorflow' in sys.modules)"
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120, check=False).returncode == 0


# --- the rollback, canaries


@pytest.fixture
def events() -> list[tuple[str, str, int]]:
    """The events of the tasks that `change` ran: the asset's name, the action and the version of each."""
    return []


@pytest.fixture
def change(
    task_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, events: list[tuple[str, str, int]]
) -> Callable[..., str]:
    """Change one of two versions of a model in a task; return what the task returns."""
    from airflow.sdk.execution_time.context import OutletEventAccessors

    from ridgeline.airflow.champions import CHAMPIONS

    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path))
    monkeypatch.setattr(Registry, "verify", lambda *_: None)  # there is nothing to load
    lines = []
    for version in (1, 2):
        (tmp_path / "serving" / "shoes" / str(version)).mkdir(parents=True)
        values = {"version": version, "action": "push", "model_digest": str(version), "artifact": "", "accuracy": 0.8}
        lines.append(HistoryEntry.model_validate(values | {"run_id": "run"}).model_dump_json())
    (tmp_path / "serving" / "shoes" / "history.jsonl").write_text("\n".join(lines) + "\n")
    numbers = itertools.count(1)

    def change(action: str, user: str | None = None, **values: Any) -> str:
        params = {"model": "shoes", "version": None, "share": 0.1, "reason": "worse"} | values
        run = SimpleNamespace(triggering_user_name=user, run_id=f"manual__{next(numbers)}")
        url = f"http://host/dags/rollback_model/runs/{run.run_id}/tasks/rollback?try_number=1"
        context = {"dag": SimpleNamespace(params=params), "params": params, "dag_run": run}
        context |= {
            "task": SimpleNamespace(outlets=[CHAMPIONS]),
            "outlet_events": (accessors := OutletEventAccessors()),
        }
        monkeypatch.setattr(task_module, "get_current_context", lambda: context | {"ti": SimpleNamespace(log_url=url)})
        done: str = task_module.change_in_task(action)
        for event in accessors[CHAMPIONS].asset_alias_events:
            extra: dict[str, Any] = event.extra
            events.append((event.dest_asset_key.name, extra["action"], extra["served_version"]))
        return done

    return change


def test_a_rollback_has_no_user_if_the_user_is_unknown(change: Callable[..., str]) -> None:
    assert change("rollback") == "shoes: rolled back to version 1, accuracy 0.8000: worse"
    (decision,) = Decisions(Settings().open_store()).all()
    assert (decision.kind, decision.report) == ("rolled_back", "http://host/dags/rollback_model/runs/manual__1")
    entry = Settings().open_registry().history("shoes")[-1]
    assert (entry.version, entry.by, entry.run_id) == (1, "", "manual__1")


def test_a_canary_is_started_and_promoted_or_aborted_in_tasks(change: Callable[..., str]) -> None:
    assert change("canary", "ann", version=1) == (
        "shoes: started the canary version 1, 0.1 of the requests, accuracy 0.8000: worse"
    )
    assert change("canary", "ann", share=0.5).startswith("shoes: started the canary version 1, 0.5 of the requests")
    assert change("abort", "bob").startswith("shoes: aborted the canary version 1, ")
    with pytest.raises(AirflowFailException, match="Expected a canary of shoes to promote; there is none"):
        change("promote")
    change("canary", version=1)
    for action in ("promote", "abort"):
        with pytest.raises(AirflowFailException, match="Expected the present canary of shoes, version 1; received 2"):
            change(action, version=2)
    assert change("promote", "bob", version=1).startswith("shoes: promoted the canary version 1, ")
    settings = Settings()
    history = settings.open_registry().history("shoes")[2:]
    assert [(entry.action, entry.by) for entry in history] == [
        ("canary", "ann"), ("canary", "ann"), ("abort", "bob"), ("canary", ""), ("promote", "bob")
    ]  # fmt: skip
    kinds = [decision.kind for decision in Decisions(settings.open_store()).all()]
    assert kinds == ["promoted", "canary", "aborted", "canary", "canary"]


def test_only_a_change_of_the_champion_creates_an_event(
    change: Callable[..., str], events: list[tuple[str, str, int]]
) -> None:
    change("canary", version=1)
    change("abort")
    assert events == []
    change("canary", version=1)
    change("promote")
    assert events == [("shoes_pushed_model", "promote", 1)]
    change("rollback", version=2)
    assert events[1:] == [("shoes_pushed_model", "rollback", 2)]


# --- the push

SERVE = """
from pathlib import Path
from ridgeline.artifacts.pushed_model import PushedModel, PushedModelFacts
from ridgeline.component import Params, PushRule, component

class ServeParams(Params):
    number: int = 1
    share: float = 0.0

@component(output=PushedModel, push=lambda params: PushRule(canary_share=params.share))
def serve(params: ServeParams, output: Path) -> PushedModelFacts:
    for name in ("saved_model", "check"):
        (output / name).mkdir()
        (output / name / "file").write_text(str(params.number))
    return PushedModelFacts(
        model_name="shoes", model_digest=f"{params.number:064x}", evaluation_digest="", accuracy=0.5,
        image_shape=(1, 1), class_names=("a", "b"), synthetic=True, forced=f"reason {params.number}",
    )
"""


@pytest.fixture
def serve(toy_steps: Path, task_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Component:
    """A step whose output is pushed."""
    import importlib

    from ridgeline.airflow import form

    (toy_steps / "serve.py").write_text(SERVE)
    step: Component = importlib.import_module("toy_steps.serve").serve
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("RIDGELINE_SERVING", raising=False)
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    for module in (form, pipeline):
        monkeypatch.setattr(module, "load_components", lambda: {"serve": step})
    return step


def test_a_push_records_the_user_who_started_the_run_and_none_for_a_scheduled_one(
    task_module: ModuleType, serve: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(task_module, monkeypatch, [serve])
    task(serve, {})
    context = task_module.get_current_context()
    context["dag_run"].triggering_user_name = None  # a scheduled run
    context["run_id"] = "scheduled__1"
    context["params"]["serve.number"] = 2
    task_module.run_in_task(serve)
    history = Settings().open_registry().history("shoes")
    assert [(entry.by, entry.run_id) for entry in history] == [("ann", "run-1"), ("", "scheduled__1")]


def test_a_push_creates_an_event_of_the_model_s_asset_only_if_it_changes_the_champion(
    task_module: ModuleType, serve: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ridgeline.airflow.champions import CHAMPIONS

    task = Task(task_module, monkeypatch, [serve])

    def events(run_id: str, **values: Any) -> list[tuple[str, dict[str, Any]]]:
        task.start({f"serve.{name}": value for name, value in values.items()}, run_id=run_id)
        task_module.run_in_task(serve)
        return task.champions()

    assert events("without the outlet", number=7) == []
    task.outlets = [CHAMPIONS]
    ((name, facts),) = events("first", number=1)
    assert name == "shoes_pushed_model"
    assert (facts["action"], facts["pushed"], facts["served_version"], facts["state"]) == ("push", True, 2, "complete")
    assert facts["artifact"].startswith("PushedModel/")
    assert events("unchanged", number=1) == []
    assert events("canary", number=2, share=0.1) == []
    assert [entry.action for entry in Settings().open_registry().history("shoes")] == ["push", "push", "canary"]
    # a task that is repeated after it was killed between the push and its end
    assert [name for name, _ in events("first", number=1)] == ["shoes_pushed_model"]


@pytest.mark.parametrize(
    ("kind", "created", "unchanged"), [("approved", 1, False), ("rejected", 0, True), ("approval_expired", 0, True)]
)
def test_a_reused_model_that_a_person_decides_about(
    task_module: ModuleType,
    synthetic: tuple[Settings, list[Any]],
    refs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    kind: Any,
    created: int,
    unchanged: bool,
) -> None:
    from components.export import export
    from ridgeline.airflow.champions import CHAMPIONS
    from ridgeline.approval import answer

    ignored = shutil.ignore_patterns("serving", "decisions")
    shutil.copytree(synthetic[0].store, tmp_path / "store", ignore=ignored)
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)

    class Person:
        def expect_possible(self) -> None:
            pass

        def __call__(self, asked: Any, evaluation: Any) -> Any:
            return answer(asked, kind, "ann", "as expected")

    monkeypatch.setattr(task_module, "ask_in_task", Person)
    task = Task(task_module, monkeypatch, [export])
    task.outlets = [CHAMPIONS]
    inputs: dict[str, Any] = {
        "dataset": refs["ingest"],
        "examples": refs["transform"],
        "model": refs["train"],
        "evaluation": refs["evaluate"],
    }
    with caplog.at_level("INFO", logger="ridgeline"):
        task(export, {"export.approval": "always"}, **inputs)
    assert [name for name, _ in task.champions()] == ["synthetic_garments_pushed_model"] * created
    assert ("the served version stays the same" in caplog.text) == unchanged


def test_predictions_are_written_where_the_dag_says(
    task_module: ModuleType, synthetic: tuple[Settings, list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import numpy as np
    from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
    from PIL import Image

    from components.infer import infer

    shutil.copytree(synthetic[0].store, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "photos" / "dark.png")
    given = {
        "infer.model": "synthetic_garments",
        "infer.folder": str(tmp_path / "photos"),
        "infer.new_files_only": True,
    }
    task = Task(task_module, monkeypatch, [infer])

    def predict(output: Path | None, **values: Any) -> str:
        task.start(given | values)
        found: str = task_module.infer_in_task(infer, output and str(output))
        return found

    predicted = predict(None)
    output = tmp_path / "classes"
    with pytest.raises(AirflowSkipException, match="no new files"):
        predict(output)
    (file,) = output.iterdir()  # although there is nothing new: no run has written it
    store = Settings().open_store()
    assert file.read_bytes() == (store.path(predicted) / "predictions.parquet").read_bytes()
    with pytest.raises(AirflowFailException, match="outside the folder of the images"):
        predict(tmp_path / "photos" / "classes")
    assert predict(tmp_path / "all.parquet", **{"infer.new_files_only": False}) == predicted
    assert (tmp_path / "all.parquet").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("new_files_only", [False, True])
def test_a_task_never_writes_the_predictions_of_another_dag_whose_run_has_the_same_name(
    task_module: ModuleType,
    synthetic: tuple[Settings, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    new_files_only: bool,
) -> None:
    import numpy as np
    from PIL import Image

    from components.infer import infer

    shutil.copytree(synthetic[0].store, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    (tmp_path / "shoes").mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "shoes" / "shoe.png")
    task = Task(task_module, monkeypatch, [infer])

    def predict(name: str) -> None:
        values = {"model": "synthetic_garments", "folder": str(tmp_path / name), "new_files_only": new_files_only}
        task.start({f"infer.{name}": value for name, value in values.items()}, run_id="scheduled__2026-11-28")
        task_module.infer_in_task(infer, str(tmp_path / f"{name}.out"))

    predict("shoes")
    assert (tmp_path / "shoes.out").exists()
    with pytest.raises(AirflowFailException, match="No such file"):
        predict("bags")
    assert not (tmp_path / "bags.out").exists()
