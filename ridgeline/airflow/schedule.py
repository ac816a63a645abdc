"""When a DAG runs by itself."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable

from ridgeline.settings import Settings


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
