"""Notify people of failed tasks, failed runs and late runs."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Literal

from airflow.sdk import BaseNotifier
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from ridgeline.airflow.settings import AirflowSettings
from ridgeline.masking import mask


class Notifier(BaseNotifier):
    """Logs a message and sends it to the recipients in `Settings.recipients`: e-mail, webhooks, other Apprise services.

    Args:
        event: ``task_failed`` for the failure callback of a task, ``run_failed`` for that of a DAG, ``late`` for the
            deadline of a run. A run that failed because of a task sends no message of its own.
        context: Airflow's context, if it is known in advance.
    """

    def __init__(self, event: Literal["task_failed", "run_failed", "late"], context: Any = None) -> None:
        super().__init__(context=context)
        self.event = event

    def notify(self, context: Any) -> None:
        """Notify from the process of a task, or from the DAG processor, which runs the callbacks of DAGs."""
        if self.event == "run_failed" and context["reason"] == "task_failure":
            return
        self._send(*self._message(context))

    async def async_notify(self, context: Any) -> None:
        """Notify from the triggerer, which runs the callbacks of deadlines."""
        await asyncio.to_thread(self._send, *self._message(context))

    def _send(self, title: str, body: str) -> None:
        settings = AirflowSettings()
        if ("late" if self.event == "late" else "failed") in settings.notify_about:
            for recipient in settings.recipients:
                recipient.send(title, body)

    def _message(self, context: Any) -> tuple[str, str]:
        if self.event == "late":
            run = context["dag_run"]
            title = f"{run['dag_id']} is late"
            body = f"Run {run['dag_run_id']} has not succeeded by its deadline, {context['deadline']['deadline_time']}."
        elif self.event == "run_failed":
            dag, reason = context["dag"], context["reason"]
            cause = f"exceeded its time limit, {dag.dagrun_timeout}" if reason == "timed_out" else f"failed: {reason}"
            title, body = f"{dag.dag_id} failed", f"Run {context['run_id']} {cause}."
        else:
            task = context["ti"]
            title = f"{task.dag_id} failed at {task.task_id}"
            error = mask(context.get("exception"))
            body = f"Run {task.run_id}, try {task.try_number}: {error}\nLog: {task.log_url}"
        self.log.error("%s. %s", title, body)
        return title, body


def deadline() -> DeadlineAlert:
    """Return the alert that reports runs which miss the deadline in `Settings`."""
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(minutes=AirflowSettings().deadline_minutes),
        callback=AsyncCallback(Notifier, kwargs={"event": "late"}),
    )
