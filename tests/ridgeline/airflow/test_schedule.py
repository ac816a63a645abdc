from __future__ import annotations

from datetime import UTC, datetime, timedelta
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


@pytest.mark.parametrize(("minutes", "at_once"), [(10, False), (2, True)])
def test_a_new_airflow_waits_for_the_next_tick_unless_the_last_one_is_fresh(
    schedule_module: ModuleType, monkeypatch: pytest.MonkeyPatch, minutes: int, at_once: bool
) -> None:
    from airflow.serialization.encoders import coerce_to_core_timetable
    from airflow.timetables.base import TimeRestriction

    last = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=minutes)
    monkeypatch.setenv("RIDGELINE_SCHEDULE", f"{last.minute} {last.hour} * * *")
    timetable = coerce_to_core_timetable(schedule_module.schedule(schedule_module.Asset("source")))
    nothing_ran = TimeRestriction(earliest=None, latest=None, catchup=False)
    first = timetable.next_dagrun_info(last_automated_data_interval=None, restriction=nothing_ran)
    assert first is not None
    assert first.run_after == (last if at_once else last + timedelta(days=1))
