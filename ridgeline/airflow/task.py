"""What a task does: run a step with the parameters of the DAG run, or roll a model back."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, AirflowTaskTimeout

from ridgeline.airflow import REASON, RERUN
from ridgeline.airflow.form import parse_form, refuse_unknown
from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import Component, ParameterError, Params, StepError, TransientStepError, flatten
from ridgeline.pipeline import StepResult, optional_steps, plan, run_records, run_step, shared_params
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from ridgeline.store import StoreError

log = logging.getLogger(__name__)


def run_in_task(
    component: Component, values: Mapping[str, Any] | None = None, **inputs: str | Iterable[str] | None
) -> str:
    """Run or reuse a step inside its Airflow task, with the parameters of the DAG run.

    The parameters of all the DAG's steps are checked, so that a bad one is refused before any step works.

    Args:
        component: The step.
        values: Parameters by dotted name that replace those of the DAG run.
        **inputs: Store-relative names of its input artifacts, as upstream tasks returned them: several for an
            input that takes any number of artifacts, None for one whose task was skipped.

    Returns:
        The output artifact's store-relative name: all that passes through XCom.

    Raises:
        AirflowFailException: If a parameter is bad, or the step can't work with what it was given; not retried.
        AirflowSkipException: If the step has a reason to yield nothing.
    """
    context, settings = get_current_context(), Settings()
    params, run_id = params_in_task(component, values), context["run_id"]
    shown = flatten(params.model_dump(mode="json"))
    log.info("%s got %s", component.name, ", ".join(f"{name}={value!r}" for name, value in shown))
    names: dict[str, str] = {}
    for name, given in inputs.items():
        names |= {name: given} if isinstance(given, str) else {f"{name}.{i}": n for i, n in enumerate(given or ())}
    rerun = component.name in context["params"].get(RERUN, ())
    try:
        by = context["dag_run"].triggering_user_name or ""
        result = run_step(settings, component, names, params, run_id, by, rerun)
    except (Exception, AirflowTaskTimeout) as error:
        with contextlib.suppress(Exception):  # the step's own error is the one to show
            log.error("%s", _resume_command(settings, component, run_id))
        if isinstance(error, StepError | FloatingPointError) and not isinstance(error, TransientStepError):
            raise AirflowFailException(str(error)) from error
        raise
    if component.output is PushedModel:
        states = {record.state for record in run_records(settings, run_id).values()}
        if states <= {"cached", "skipped"}:
            log.info("nothing changed: every step was reused, and what is served stays as it is")
    if result.execution.output is None:
        raise AirflowSkipException(result.execution.reason)
    for asset in context["task"].outlets:
        context["outlet_events"][asset].extra = _facts(settings, result)
    return result.execution.output


def _facts(settings: Settings, result: StepResult) -> dict[str, Any]:
    """Return what an asset's event tells of an artifact: its name, whether it is new, and its plain facts."""
    execution = result.execution
    assert execution.output is not None
    stated = settings.open_store().manifest(execution.output).facts
    facts: dict[str, Any] = {
        name: value for name, value in stated.items() if isinstance(value, bool | int | float | str)
    }
    facts |= {"artifact": execution.output, "state": execution.state, "reason": execution.reason}
    if result.pushed:
        facts |= {"pushed": result.pushed.new, "served_version": result.pushed.version}
    facts |= stated.get("metrics", {})
    return facts


def skip(reason: str) -> NoReturn:
    """Skip the task, and say why in its log and on the run's report.

    Args:
        reason: Why, as a sentence.

    Raises:
        AirflowSkipException: Always.
    """
    get_current_context()["ti"].xcom_push(REASON, reason)
    raise AirflowSkipException(reason)


def _resume_command(settings: Settings, component: Component, run_id: str) -> str:
    """Return what to do after a failure: the command repeats this step with this run's parameters, and resumes."""
    recorded = run_records(settings, run_id)
    extra = [name for name in optional_steps(component.name) if name in recorded]
    steps, params = plan(component.name, extra), _params_of_all_steps(settings)
    command = ["ridgeline", "run", component.name, *(word for name in extra for word in ("--with", name))]
    shared = tuple(f"{step.name}.{other.name}." for step, other in shared_params(steps))  # given by the other step
    for step in steps:
        defaults = dict(flatten(step.params().model_dump(mode="json")))
        for name, value in flatten(params[step.name].model_dump(mode="json")):
            if value != defaults.get(name) and not f"{step.name}.{name}".startswith(shared):
                command += ["--set", f"{step.name}.{name}={json.dumps(value)}"]
    places = {"STORE": settings.store, "SERVING": settings.serving, "MANUAL_DIR": settings.manual_dir}
    variables = [f"RIDGELINE_{name}={shlex.quote(str(place))}" for name, place in places.items() if place]
    without_password = re.sub(r"(?<=//)[^/@]*@", "...@", " ".join([*variables, shlex.join(command)]))
    return (
        f"To resume once the cause is removed, clear this task in the UI, or run {without_password}\n"
        "Finished steps are reused; training resumes after its last finished epoch."
    )


def rollback_in_task() -> str:
    """Make an earlier version the champion, inside a task of a DAG with the params `model`, `version` and `reason`.

    Returns:
        What was done, as a sentence.

    Raises:
        AirflowFailException: If the registry refuses; not retried.
    """
    context = get_current_context()
    params, run, settings = context["params"], context["dag_run"], Settings()
    try:
        refuse_unknown(context["dag"].params, params)
        entry = settings.open_registry().rollback(
            settings.open_store(),
            params["model"],
            params["version"],
            reason=params["reason"],
            by=run.triggering_user_name or "",
            run_id=run.run_id,
        )
    except (ParameterError, RegistryError, ArtifactError, StoreError) as error:
        raise AirflowFailException(str(error)) from error
    done = f"{params['model']} is served by version {entry.version}, accuracy {entry.accuracy:.4f}: {entry.reason}"
    log.info("%s", done)
    return done


def params_in_task(component: Component, values: Mapping[str, Any] | None = None) -> Any:
    """Return a step's parameters of the DAG run, inside a task.

    Args:
        component: The step.
        values: Parameters by dotted name that replace those of the DAG run.

    Raises:
        AirflowFailException: If a parameter of any of the DAG's steps is unknown, of the wrong type or out of range.
    """
    return _params_of_all_steps(Settings(), values)[component.name]


def _params_of_all_steps(settings: Settings, values: Mapping[str, Any] | None = None) -> dict[str, Params]:
    context = get_current_context()
    try:
        return parse_form(context["dag"].params, {**context["params"], **(values or {})}, settings)
    except ParameterError as error:
        context["ti"].xcom_push(REASON, str(error))
        raise AirflowFailException(str(error)) from error
