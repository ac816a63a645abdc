"""Tells people what needs them: a task that failed, a run that is late."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import BaseNotifier
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from ridgeline.settings import Settings

if TYPE_CHECKING:
    from apprise import Apprise


class Notifier(BaseNotifier):
    """Writes to the log, and to wherever `Settings.notify` says: e-mail, a webhook, and what else Apprise knows.

    Args:
        event: ``failed`` for a task's failure callback, ``late`` for a run's deadline.
        context: Airflow's context, where it is known beforehand.
    """

    def __init__(self, event: Literal["failed", "late"], context: Any = None) -> None:
        super().__init__(context=context)
        self.event = event

    def notify(self, context: Any) -> None:
        """Notify from a task's process."""
        title, body = self._message(context)
        if (people := _people()) and not people.notify(title=title, body=body):
            self._not_delivered()

    async def async_notify(self, context: Any) -> None:
        """Notify from the triggerer, where deadlines are watched."""
        title, body = self._message(context)
        if (people := _people()) and not await people.async_notify(title=title, body=body):
            self._not_delivered()

    def _message(self, context: Any) -> tuple[str, str]:
        if self.event == "late":
            run = context["dag_run"]
            title = f"{run['dag_id']} is late"
            body = f"Run {run['dag_run_id']} was to be done by {context['deadline']['deadline_time']}; it goes on."
        else:
            task = context["ti"]
            title = f"{task.dag_id} failed at {task.task_id}"
            body = f"Run {task.run_id}, try {task.try_number}: {context.get('exception')}\nIts log: {task.log_url}"
        self.log.error("%s. %s", title, body)
        return title, body

    def _not_delivered(self) -> None:
        self.log.error("Expected RIDGELINE_NOTIFY to take the message; it did not. Check its addresses and passwords.")


def deadline() -> DeadlineAlert:
    """Return what a DAG needs so that people hear of a run that is not done in time, see `Settings`."""
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(minutes=Settings().deadline_minutes),
        callback=AsyncCallback(Notifier, kwargs={"event": "late"}),
    )


def _people() -> Apprise | None:
    """Return whom to tell; None for nobody."""
    urls = Settings().notify.get_secret_value().split()
    if not urls:
        return None
    from apprise import Apprise

    people = Apprise()
    for url in urls:
        people.add(url)
    return people
