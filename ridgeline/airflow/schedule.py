"""When Airflow starts a DAG without a user."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable

from ridgeline.airflow.settings import AirflowSettings
from ridgeline.settings import PUSHED, check_schedule


def schedule(*assets: Asset, expression: str | None = None) -> AssetOrTimeSchedule | list[Asset]:
    """Return the schedule of a training DAG: times, and each change of an asset.

    Args:
        *assets: The assets.
        expression: A cron expression or preset in UTC, or ``never``; `Settings.schedule` if None.

    Raises:
        ValueError: If the expression is none of these.
    """
    timetable = cron(AirflowSettings().schedule if expression is None else check_schedule(expression))
    return AssetOrTimeSchedule(timetable=timetable, assets=list(assets)) if timetable else list(assets)


def inference_schedule(pushed: Asset, expression: str | None = None) -> CronTriggerTimetable | list[Asset] | None:
    """Return the schedule of a DAG that predicts: times, each change of its model's champion, or none.

    Args:
        pushed: The asset that has an event for each change of the champion, see `ridgeline.airflow.champions`.
        expression: A cron expression or preset in UTC, ``pushed`` or ``never``; `Settings.inference_schedule` if None.

    Raises:
        ValueError: If the expression is none of these.
    """
    expression = AirflowSettings().inference_schedule if expression is None else expression
    return [pushed] if expression == PUSHED else cron(check_schedule(expression))


def cron(expression: str) -> CronTriggerTimetable | None:
    """Return the timetable of a cron expression or preset in UTC, or None for ``never``.

    A DAG with this timetable needs no start date: after its first start, Airflow waits for the next tick.

    Args:
        expression: The expression.
    """
    if expression == "never":
        return None
    # Without run_immediately, a new Airflow would run the last tick at once.
    return CronTriggerTimetable(expression, timezone="UTC", run_immediately=timedelta(minutes=5))
