"""The work of tasks: run a step with the parameters of the DAG run, or change which version of a model is served."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, AirflowTaskTimeout
from airflow.sdk.log import mask_secret

from ridgeline.access import message
from ridgeline.airflow import REASON, RERUN
from ridgeline.airflow.approval import ask_in_task
from ridgeline.airflow.champions import CHAMPIONS, pushed_model
from ridgeline.airflow.form import default_values, flat_params, parse_form, refuse_unknown
from ridgeline.airflow.openlineage import emit_lineage
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.announcements import announce, change_decision
from ridgeline.approval import Terminal
from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.predictions import Predictions
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import Component, ParameterError, Params, StepError, TransientStepError, flatten
from ridgeline.history import HistoryEntry
from ridgeline.masking import known, mask
from ridgeline.pipeline import (
    StepResult,
    optional_steps,
    parse_params,
    plan,
    run_records,
    run_step,
    shared_params,
)
from ridgeline.predictions_output import expect_output, write_output
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings, SettingsError
from ridgeline.store import Execution, StoreError

log = logging.getLogger(__name__)


def run_in_task(
    component: Component, values: Mapping[str, Any] | None = None, **inputs: str | Iterable[str] | None
) -> str:
    """Run or reuse a step inside its Airflow task, with the parameters of the DAG run.

    The parameters of all steps of the DAG are checked first, so a bad value is refused before any step runs.

    Args:
        component: The step.
        values: Parameters by dotted name that replace those of the DAG run.
        **inputs: Store-relative names of the input artifacts, as returned by upstream tasks: several names for an
            input that takes any number of artifacts, None for an input whose task was skipped.

    Returns:
        The store-relative name of the output artifact, the only value that passes through XCom.

    Raises:
        AirflowFailException: If a parameter is bad, or the step cannot process its inputs; not retried.
        AirflowSkipException: If the step has no output.
    """
    return _pass_on(_run(component, values, inputs))


def _run(
    component: Component, values: Mapping[str, Any] | None, inputs: Mapping[str, str | Iterable[str] | None]
) -> StepResult:
    """Run or reuse a step, as `run_in_task` does, and return its result; also that of a step without an output."""
    context, settings = get_current_context(), settings_in_task()
    params, run_id = params_in_task(component, values), context["run_id"]
    shown = flatten(params.model_dump(mode="json"))
    log.info("parameters of %s: %s", component.name, ", ".join(f"{name}={value!r}" for name, value in shown))
    names: dict[str, str] = {}
    for name, given in inputs.items():
        names |= {name: given} if isinstance(given, str) else {f"{name}.{i}": n for i, n in enumerate(given or ())}
    rerun = component.name in context["params"].get(RERUN, ())
    try:
        ask = ask_in_task()
        if isinstance(ask, Terminal):  # no web interface shows the run, and Airflow does not know the user
            by, link = ask.user, ""
        else:
            by, link = context["dag_run"].triggering_user_name or "", link_of_run(context)
        workers = settings.workers if component.distributes else None
        result = run_step(settings, component, names, params, run_id, by, rerun, link, ask, workers)
    except (Exception, AirflowTaskTimeout) as error:
        with contextlib.suppress(Exception):  # the error of the step matters more
            log.error("%s", _resume_command(settings, component, run_id))
        if isinstance(error, StepError | FloatingPointError) and not isinstance(error, TransientStepError):
            context["ti"].xcom_push(REASON, mask(error))
            raise AirflowFailException(mask(error)) from error
        if isinstance(error, PermissionError):
            raise AirflowFailException(message(error)) from error
        raise
    emit_lineage(settings, component, params, result)
    if component.output is PushedModel and not (result.pushed and result.pushed.new):
        states = {record.state for record in run_records(settings, run_id).values()}
        if states <= {"cached", "skipped"}:
            log.info("nothing changed: every step was reused, and the served version stays the same")
    return result


def _pass_on(result: StepResult) -> str:
    """Create the events of the task's assets, and return the name of the output.

    Raises:
        AirflowSkipException: If there is none.
    """
    context, settings, execution = get_current_context(), settings_in_task(), result.execution
    if execution.output is None:
        raise AirflowSkipException(execution.reason)
    for asset in context["task"].outlets:
        if asset != CHAMPIONS:
            context["outlet_events"][asset].extra = _facts(settings, execution)
    if result.pushed:
        model = settings.open_store().open(execution.output, PushedModel).facts.model_name
        champion = settings.open_registry().champion(model)
        # not `pushed.new`: a task that was killed after the push finds the model served, and there was no event yet
        if champion and champion.run_id == context["run_id"]:
            _emit_champion(model, champion, _facts(settings, execution))
    return execution.output


def infer_in_task(component: Component, output: str | None) -> str:
    """Run the step that predicts, as `run_in_task` does, and write its rows.

    Args:
        component: The step.
        output: The file or, with new files only, the folder to write them to, see `write_output`; None for neither.

    Returns:
        The store-relative name of the predictions.

    Raises:
        AirflowFailException: As for `run_in_task`, or if there can't be an output there; not retried.
        AirflowSkipException: If there are no new files.
    """
    settings, params = settings_in_task(), params_in_task(component)
    if output:
        try:
            expect_output(Path(output), component, params)
        except ParameterError as error:
            get_current_context()["ti"].xcom_push(REASON, mask(error))
            raise AirflowFailException(mask(error)) from error
    result = _run(component, None, {})
    execution, store = result.execution, settings.open_store()
    if output:  # also without new files: an earlier run may have been killed before it wrote its rows
        for file in write_output(store, component, params, execution, Path(output)):
            log.info("written: %s", file)
    elif execution.output:
        log.info("the rows are in %s", store.open(execution.output, Predictions).parquet)
    return _pass_on(result)


def link_of_run(context: Any) -> str:
    """Return the URL of a DAG run in Airflow's interface, whose tab Ridgeline shows the report; empty if it has none.

    Args:
        context: Airflow's context of a task of the run.
    """
    log_url: str = getattr(context["ti"], "log_url", "") or ""
    return log_url.partition("/tasks/")[0]


def settings_in_task() -> Settings:
    """Return the settings inside a task; Airflow hides the secrets of their URLs in the task's log from now on.

    Raises:
        AirflowFailException: If an environment variable is bad; not retried.
    """
    try:
        settings = AirflowSettings()
    except SettingsError as error:
        raise AirflowFailException(str(error)) from None
    for secret in known():
        mask_secret(secret)
    return settings


def _facts(settings: Settings, execution: Execution) -> dict[str, Any]:
    """Return the data of an asset event: the name of the artifact, whether it is new, and its scalar facts."""
    assert execution.output is not None
    stated = settings.open_store().manifest(execution.output).facts
    facts: dict[str, Any] = {
        name: value for name, value in stated.items() if isinstance(value, bool | int | float | str)
    }
    facts |= {"artifact": execution.output, "state": execution.state, "reason": execution.reason}
    facts |= stated.get("metrics", {})
    return facts


def _emit_champion(model: str, champion: HistoryEntry, facts: Mapping[str, Any]) -> None:
    """Create an event that a model has another champion, with facts about it, if the task declares `CHAMPIONS`."""
    context = get_current_context()
    if CHAMPIONS in context["task"].outlets:
        extra = dict(facts) | {"artifact": champion.artifact, "served_version": champion.version}
        extra |= {"action": champion.action, "pushed": champion.action == "push"}
        context["outlet_events"][CHAMPIONS].add(pushed_model(model), extra)


def skip(reason: str) -> NoReturn:
    """Skip the task; its log and the report of the run show the reason.

    Args:
        reason: The reason, as a sentence.

    Raises:
        AirflowSkipException: Always.
    """
    get_current_context()["ti"].xcom_push(REASON, mask(reason))
    raise AirflowSkipException(mask(reason))


def _resume_command(settings: Settings, component: Component, run_id: str) -> str:
    """Return advice after a failure, with a command that repeats the step with the parameters of this run."""
    recorded = run_records(settings, run_id)
    extra = [name for name in optional_steps(component.name) if name in recorded]
    steps, all_params = plan(component.name, extra), _params_of_all_steps(settings)
    params = {step.name: all_params[step.name] for step in steps}
    command = ["ridgeline", "run", component.name, *(word for name in extra for word in ("--with", name))]
    if component.name in get_current_context()["params"].get(RERUN, ()):
        command += ["--rerun", component.name]
    shared = tuple(f"{step.name}.{other.name}." for step, other in shared_params(steps))  # the other step provides them
    wanted = {name: value for name, value in flat_params(params).items() if not name.startswith(shared)}
    defaults = default_values(steps)
    given = {name: value for name, value in wanted.items() if value != defaults.get(name)}
    try:  # another value may take the place of a default that is left out
        parsed = flat_params(parse_params(steps, given, settings))
        given |= {name: value for name, value in wanted.items() if value != parsed.get(name)}
    except ParameterError:
        given = wanted
    command += [word for name, value in given.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    places = {"STORE": settings.store, "SERVING": settings.serving}
    places |= {
        name.upper(): getattr(params[step.name], name)
        for step in steps
        for name, field in step.params.model_fields.items()
        if field.exclude
    }
    texts = {name: shlex.join(place) if isinstance(place, tuple) else str(place) for name, place in places.items()}
    variables = [f"RIDGELINE_{name}={shlex.quote(text)}" for name, text in texts.items() if places[name]]
    return (
        "To resume after you removed the cause, clear this task in the UI, or run "
        f"{mask(' '.join([*variables, shlex.join(command)]))}\n"
        "Finished steps are reused; training resumes after its last finished epoch."
    )


def change_in_task(action: str) -> str:
    """Roll a model back, or decide about its canary.

    Args:
        action: ``rollback``, ``canary``, ``promote`` or ``abort``. The DAG has the params `model`, `version` and
            `reason`; ``canary`` also uses `share`.

    Returns:
        A summary of what was done.

    Raises:
        AirflowFailException: If the registry refuses it; not retried.
    """
    context = get_current_context()
    params, run, settings = context["params"], context["dag_run"], settings_in_task()
    who = {"reason": params["reason"], "by": run.triggering_user_name or "", "run_id": run.run_id}
    try:
        refuse_unknown(context["dag"].params, params)
        registry, store, name = settings.open_registry(), settings.open_store(), params["model"]
        version = params["version"]
        if action == "rollback":
            entry = registry.rollback(store, name, version, **who)
        elif action == "canary":
            entry = registry.start_canary(store, name, version, params["share"], **who)
        elif action == "promote":
            entry = registry.promote(store, name, version, **who)
        else:
            entry = registry.abort(name, version, **who)
    except (ParameterError, RegistryError, ArtifactError, StoreError) as error:
        raise AirflowFailException(mask(error)) from error
    except PermissionError as error:
        raise AirflowFailException(message(error)) from error
    decision = change_decision(name, entry, link_of_run(context))
    announce(settings, decision)
    if entry.makes_champion:
        _emit_champion(name, entry, {"accuracy": entry.accuracy, "reason": entry.reason})
    summary = f"{decision.title}, accuracy {entry.accuracy:.4f}: {entry.reason}"
    log.info("%s", summary)
    return summary


def params_in_task(component: Component, values: Mapping[str, Any] | None = None) -> Any:
    """Return a step's parameters of the DAG run, inside a task.

    Args:
        component: The step.
        values: Parameters by dotted name that replace those of the DAG run.

    Raises:
        AirflowFailException: If a parameter of any of the DAG's steps is unknown, of the wrong type or out of range.
    """
    return _params_of_all_steps(settings_in_task(), values)[component.name]


def _params_of_all_steps(settings: Settings, values: Mapping[str, Any] | None = None) -> dict[str, Params]:
    context = get_current_context()
    declared, sent = context["dag"].params, context["dag_run"].conf or {}
    typed = () if declared.keys() <= sent.keys() else sent.keys()  # the form sends all; a command what was typed
    try:
        return parse_form(declared, {**context["params"], **(values or {})}, settings, typed)
    except (ParameterError, PermissionError) as error:
        reason = message(error)
        context["ti"].xcom_push(REASON, reason)
        raise AirflowFailException(reason) from error
