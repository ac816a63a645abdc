from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def schedule_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import schedule
    return schedule


def test_the_schedule_is_weekly_and_by_asset(schedule_module: ModuleType) -> None:
    schedule = schedule_module.schedule(schedule_module.Asset("source"))
    assert schedule.timetable.expression == "0 0 * * 0"
    assert [asset.name for asset in schedule.asset_condition.objects] == ["source"]


def test_the_schedule_is_configured(schedule_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    source = schedule_module.Asset("source")
    monkeypatch.setenv("RIDGELINE_SCHEDULE", "30 4 * * *")
    assert schedule_module.schedule(source).timetable.expression == "30 4 * * *"
    monkeypatch.setenv("RIDGELINE_SCHEDULE", "never")
    assert schedule_module.schedule(source) == [source]
