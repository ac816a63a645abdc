"""The plugin's pages, behind Airflow's own authorization.

A request names a run and at most one of its tasks, a version of a model, or two sides of a comparison, never a file.
The pages show the artifacts that execution records or the history name, opened through the store, which verifies them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import (
    GetUserDep,
    requires_access_asset,
    requires_access_dag,
)
from airflow.models.dagbag import DBDagBag
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from ridgeline.access import message
from ridgeline.airflow.plugin import compare_page, models_page, run_page
from ridgeline.airflow.plugin.run_page import Run, Task
from ridgeline.airflow.plugin.template import render_template
from ridgeline.airflow.reasons import find_reasons
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.compare import CompareError, compare, find_side
from ridgeline.registry import RegistryError
from ridgeline.settings import SettingsError
from ridgeline.store import StoreError

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
REFRESH_SECONDS = 5
# The state of a mapped task is the first of these that one of its instances has.
STATE_PRIORITY = (
    "failed",
    "upstream_failed",
    "up_for_retry",
    "running",
    "queued",
    "scheduled",
    "none",
    "success",
    "skipped",
)
readers_of_runs = Depends(requires_access_dag("GET", DagAccessEntity.RUN))
readers_of_assets = Depends(requires_access_asset("GET"))


def create() -> FastAPI:
    """Return the application of all pages."""
    app = FastAPI(title="Ridgeline", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def protect(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.exception_handler(StoreError)
    @app.exception_handler(ArtifactError)
    @app.exception_handler(OSError)
    @app.exception_handler(SettingsError)
    async def unreadable(request: Request, error: Exception) -> Response:
        text = message(error)
        log.warning("Cannot show %s: %s", request.url.path, text)
        return _message("Cannot read the store", text, 503)

    @app.exception_handler(CompareError)
    @app.exception_handler(RegistryError)
    async def incomparable(request: Request, error: Exception) -> Response:
        return _message("Cannot compare", message(error), 404)

    @app.get("/dags/{dag_id}/runs/{run_id}", dependencies=[readers_of_runs])
    def run_report(dag_id: str, run_id: str, session: SessionDep) -> Response:
        run = _find_run(session, dag_id, run_id)
        if run is None:
            return _no_such_run(dag_id, run_id)
        refresh = {"Refresh": str(REFRESH_SECONDS)} if run.in_progress else {}
        return HTMLResponse(run_page.render(AirflowSettings(), run), headers=refresh)

    @app.get("/dags/{dag_id}/runs/{run_id}/reports/{task_id}", dependencies=[readers_of_runs])
    def step_report(
        dag_id: str, run_id: str, task_id: str, session: SessionDep, if_none_match: Annotated[str, Header()] = ""
    ) -> Response:
        run = _find_run(session, dag_id, run_id)
        if run is None:
            return _no_such_run(dag_id, run_id)
        artifact = run_page.reported(AirflowSettings().open_store(), run, task_id)
        if artifact is None or artifact.report is None:
            return _message("No such report", f"Expected a task with a report; received {task_id!r}.", 404)
        # The artifact never changes, but permissions do: browsers keep it, and revalidate it at each request.
        headers = {"ETag": f'"{artifact.digest}"', "Cache-Control": "private, no-cache"}
        if if_none_match == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return HTMLResponse(artifact.report.read_text(encoding="utf-8"), headers=headers)

    @app.get("/models", dependencies=[readers_of_assets])
    def models(session: SessionDep, user: GetUserDep) -> Response:
        def dag_of(run_ids: Collection[str]) -> dict[str, str]:
            return _readable_dags(session, user, run_ids)

        return HTMLResponse(models_page.render(AirflowSettings().open_registry(), dag_of))

    @app.get("/compare", dependencies=[readers_of_assets])
    def comparison(session: SessionDep, user: GetUserDep, a: str = "", b: str = "") -> Response:
        settings = AirflowSettings()
        store, registry = settings.open_store(), settings.open_registry()
        sides = [find_side(store, registry, name) for name in (a, b)]
        run_ids = {run_id for side in sides for run_id in side.run_ids}
        readable = _readable_dags(session, user, run_ids)
        # Scheduled runs of several DAGs can have one id: all of these must be readable.
        dags = set(session.scalars(select(DagRun.dag_id).where(DagRun.run_id.in_(run_ids))))
        if dags - get_auth_manager().get_authorized_dag_ids(user=user, session=session):
            return _message("Not allowed", "A run of the comparison is of a DAG whose runs you may not read.", 403)
        return HTMLResponse(compare_page.render(compare(*sides), readable))

    @app.get("/models/{name}/{version}/card", dependencies=[readers_of_assets])
    def model_card(name: str, version: int) -> Response:
        settings = AirflowSettings()
        registry = settings.open_registry()
        history = registry.history(name) if name in registry.model_names() else []
        push = next((entry for entry in history if entry.version == version), None)
        card = settings.open_store().open(push.artifact, PushedModel).card if push else None
        if card is None:
            return _message("No such model card", f"There is no card of version {version} of the model {name!r}.", 404)
        return HTMLResponse(card.read_text(encoding="utf-8"))

    return app


def _readable_dags(session: Session, user: Any, run_ids: Collection[str]) -> dict[str, str]:
    """Return the DAG of each run that Airflow knows and the user may read."""
    readable = get_auth_manager().get_authorized_dag_ids(user=user, session=session)
    runs = select(DagRun.run_id, DagRun.dag_id).where(DagRun.run_id.in_(run_ids), DagRun.dag_id.in_(readable))
    return dict(session.execute(runs).tuples().all())


def _message(title: str, text: str, status: int) -> Response:
    return HTMLResponse(render_template("message", title=title, text=text, synthetic=False), status)


def _no_such_run(dag_id: str, run_id: str) -> Response:
    return _message("No such run", f"Airflow has no run {run_id!r} of the DAG {dag_id!r}. It may be deleted.", 404)


def _find_run(session: Session, dag_id: str, run_id: str) -> Run | None:
    """Return Airflow's data about a run, with its tasks in the order of the DAG; None if there is no such run."""
    found = session.scalar(select(DagRun).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id))
    if found is None:
        return None
    dag = DBDagBag(load_op_links=False).get_dag_for_run(found, session)
    order = [node.node_id for node in dag.task_group.topological_sort()] if dag else []
    instances = session.scalars(
        select(TaskInstance)
        .where(TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id)
        .order_by(TaskInstance.task_id, TaskInstance.map_index)
    )
    reasons = find_reasons(session, dag_id, run_id)
    tasks = [
        _merge(task_id, list(mapped), reasons.get(task_id, ""))
        for task_id, mapped in itertools.groupby(instances, lambda found: found.task_id)
    ]
    if dag:
        tasks = [_with_skipped_upstream(task, tasks, dag) for task in tasks]
    tasks.sort(key=lambda task: order.index(task.name) if task.name in order else len(order))
    defaults = dag.params.dump() if dag else {}
    return Run(
        dag_id=dag_id,
        run_id=run_id,
        state=str(found.state),
        started_at=found.start_date,
        ended_at=found.end_date,
        note=found.note or "",
        changed={
            name: (defaults.get(name), value)
            for name, value in sorted((found.conf or {}).items())
            if name not in defaults or _differs(value, defaults[name])
        },
        tasks=tuple(tasks),
    )


def _differs(value: Any, default: Any) -> bool:
    """Return whether a value differs from the default; numbers may be text, such as ``1e-4``."""
    try:
        return float(value) != float(default)
    except (TypeError, ValueError):
        return bool(value != default)


def _with_skipped_upstream(task: Task, tasks: list[Task], dag: Any) -> Task:
    """Return a task with the reason, if Airflow skipped it because an upstream task was skipped."""
    if task.state != "skipped" or task.reason or not dag.has_task(task.name):
        return task
    upstream = dag.get_task(task.name).upstream_task_ids
    skipped = [other.name for other in tasks if other.name in upstream and other.state == "skipped"]
    verb = "were" if len(skipped) > 1 else "was"
    return replace(task, reason=f"Skipped because {' and '.join(skipped)} {verb} skipped.") if skipped else task


def _merge(task_id: str, mapped: list[TaskInstance], reason: str = "") -> Task:
    """Return the instances of a task as one, from the earliest start to the latest end."""
    states = {str(instance.state or "none") for instance in mapped}
    starts = [instance.start_date for instance in mapped if instance.start_date]
    ends = [instance.end_date for instance in mapped if instance.end_date]
    return Task(
        name=task_id,
        state=next((state for state in STATE_PRIORITY if state in states), min(states)),
        started_at=min(starts, default=None),
        ended_at=max(ends) if len(ends) == len(mapped) else None,
        reason=reason,
    )
