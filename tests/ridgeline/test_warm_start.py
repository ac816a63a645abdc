"""A training that starts from the champion: its key, its reuse, its lineage and what garbage collection keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import components.export
from ridgeline import pipeline
from ridgeline.artifacts.model import Model
from ridgeline.gc import collect_garbage
from ridgeline.lineage import lineage
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
WARM = {"train.warm_start": True}
STEPS = pipeline.plan("export")


@pytest.fixture
def settings(synthetic_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    monkeypatch.setattr("components.export.save_in_a_fresh_process", components.export.save)
    return Settings(store=str(tmp_path / "store"), manual_dir=None)


@pytest.fixture
def run(settings: Settings) -> Callable[..., dict[str, Execution]]:
    numbers = iter(range(1, 100))

    def run(**values: Any) -> dict[str, Execution]:
        given = {**SYNTHETIC, **{name.replace("__", "."): value for name, value in values.items()}}
        params = pipeline.parse_params(STEPS, given, settings)
        results = pipeline.run(settings, STEPS, params, f"run {next(numbers)}", by="ann")
        return {result.execution.component: result.execution for result in results}

    return run


def test_a_champion_is_an_input_only_if_it_is_asked_for(settings: Settings, run: Callable[..., Any]) -> None:
    cold = run()["train"]
    assert (cold.state, set(cold.inputs), set(cold.parts.inputs)) == ("cached", {"examples"}, {"examples"})
    warm = run(train__warm_start=True)["train"]
    assert warm.state == "complete"
    assert warm.inputs["champion"] == cold.output
    assert "parameter train.warm_start False → True" in warm.reason
    model = settings.open_store().open(warm.output, Model)
    assert f"Model/{model.facts.started_from}" == cold.output


def test_an_unchanged_warm_start_is_reused_although_the_champion_is_its_own_model(
    settings: Settings, run: Callable[..., Any]
) -> None:
    run()
    first = run(train__warm_start=True)
    assert settings.open_registry().champion("synthetic_garments").version == 2
    params = pipeline.parse_params(STEPS, {**SYNTHETIC, **WARM}, settings)
    assert {text.split(":")[0] for _, text in pipeline.explain(settings, STEPS, params)} == {"reused"}
    again = run(train__warm_start=True)
    assert {execution.state for execution in again.values()} == {"cached"}
    other = run(train__warm_start=True, transform__validation_examples=1_200)["train"]
    assert (other.state, other.inputs["champion"]) == ("complete", first["train"].output)


def test_lineage_ends_at_the_model_that_it_started_from_and_only_that_is_kept(
    settings: Settings, run: Callable[..., Any]
) -> None:
    store = settings.open_store()
    cold = run()
    first = run(train__warm_start=True)
    last = run(train__warm_start=True, transform__validation_examples=1_200, evaluate__force_blessing="a test")
    names = [origin.ref for _, origin, _ in lineage(store, last["train"].output).walk()]
    assert names.count(first["train"].output) == 1
    assert cold["train"].output not in names
    assert cold["transform"].output not in names
    for version in (1, 2):
        shutil.rmtree(settings.serving_dir() / "synthetic_garments" / str(version))
    collect_garbage(store, settings.open_registry(), keep_runs=1, dry_run=False, recent=timedelta())
    kept = set(store.refs())
    assert {last["train"].output, first["train"].output, last["transform"].output} <= kept
    assert cold["train"].output not in kept  # its examples are: their statistics were compared with the last ones
