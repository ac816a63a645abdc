"""Ridgeline in Airflow's UI: a tab on each DAG run, links to it from tasks, and the page Models.

Every process of Airflow loads this module, so it imports little. The first request imports the pages.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin
from airflow.providers.standard.decorators.python import _PythonDecoratedOperator
from airflow.sdk import BaseOperatorLink

from ridgeline.airflow import RERUN
from ridgeline.airflow.operators import TaskWithApproval

PREFIX = "/ridgeline"
TAB = "ridgeline-report"


class ReportLink(BaseOperatorLink):
    """Links a task to the report of its run, if its step has a report or a servable model as output."""

    name = "Report"
    operators: ClassVar[list[Any]] = [_PythonDecoratedOperator, TaskWithApproval]

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the link, or for other tasks an empty string, which Airflow does not show."""
        # A DAG with steps has a param that lists them. Another DAG may have a task of the same name.
        if RERUN not in operator.dag.params:
            return ""
        if operator.task_id not in operator.dag.params.get_param(RERUN).schema["items"]["enum"]:
            return ""
        if operator.task_id not in _steps_with_report():
            return ""
        root = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
        return f"{root}/dags/{quote(ti_key.dag_id)}/runs/{quote(ti_key.run_id)}/plugin/{TAB}"


@functools.cache
def _steps_with_report() -> set[str]:
    from ridgeline.artifacts.pushed_model import PushedModel
    from ridgeline.pipeline import load_components

    steps = load_components().values()
    return {step.name for step in steps if step.output.report_name or step.output is PushedModel}


async def pages(scope: Any, receive: Any, send: Any) -> None:
    """Serve the pages: an ASGI application, created at the first request."""
    application = await asyncio.to_thread(_application)
    await application(scope, receive, send)


@functools.cache
def _application() -> Any:
    from ridgeline.airflow.plugin.app import create

    return create()


class RidgelinePlugin(AirflowPlugin):
    """The plugin, which Airflow finds by the entry point ``airflow.plugins``."""

    # ruff: noqa: RUF012 - Airflow declares them as variables of the instance
    name = "ridgeline"
    fastapi_apps: list[Any] = [{"name": "Ridgeline", "app": pages, "url_prefix": PREFIX}]
    external_views: list[Any] = [
        {
            "name": "Report",
            "destination": "dag_run",
            "url_route": TAB,
            "href": f"{PREFIX[1:]}/dags/{{DAG_ID}}/runs/{{RUN_ID}}",  # relative: Airflow may be served under a path
        },
        {
            "name": "Models",
            "destination": "nav",
            "nav_top_level": True,
            "url_route": "ridgeline-models",
            "href": f"{PREFIX[1:]}/models",
        },
    ]
    operator_extra_links: list[Any] = [ReportLink()]
