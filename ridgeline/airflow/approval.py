"""Approval of a push in Airflow: the task waits, without a process, until a person answers in the web interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from airflow.sdk import Param, get_current_context
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import TaskAwaitingInput
from airflow.sdk.execution_time.hitl import HITLUser, upsert_hitl_detail

from ridgeline.airflow.operators import TaskWithApproval
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.announcements import announce
from ridgeline.approval import Ask, answer, markdown
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.decisions import Decision, Decisions

APPROVE, REJECT = "Approve", "Reject"
MAX_REASON = 500  # characters


class AskInAirflow:
    """Asks in Airflow's web interface, inside a task that `ridgeline.airflow.operators.task_with_approval` declares."""

    def expect_possible(self) -> None:
        """Do nothing: Airflow can always ask."""

    def __call__(self, asked: Decision, evaluation: ModelEvaluation) -> NoReturn:
        """Show the question under *Required Actions* and let the task wait.

        If the answer arrives before the scheduler has noted that the task's process has ended, as a program's may,
        Airflow 3.3.2 takes the task for failed, discards the answer, and tries the task again, which asks again.

        Raises:
            TaskAwaitingInput: Always. `TaskWithApproval.resume` continues the task.
        """
        settings = AirflowSettings()
        reason = Param("", "For the history.", type="string", title="Reason", minLength=3, maxLength=MAX_REASON)
        upsert_hitl_detail(
            ti_id=get_current_context()["ti"].id,
            options=[APPROVE, REJECT],
            subject=f"Push model {asked.model_digest[:12]} of {asked.model}?",
            body=markdown(asked, evaluation),
            defaults=[REJECT],
            params={"reason": ParamsDict({"reason": reason}).get_param("reason").serialize()},
            assigned_users=[HITLUser(id=name, name=name) for name in settings.approvers],
        )
        raise TaskAwaitingInput(
            method_name=TaskWithApproval.resume.__name__,
            kwargs={"asked": asked.model_dump(mode="json")},
            timeout=timedelta(hours=settings.approval_hours),
        )


def _answer(asked: Decision, options: Sequence[str], params: Mapping[str, Any] | None, user: str) -> Decision:
    """Return what a person chose, as the answer to a question."""
    reason = " ".join(str((params or {}).get("reason") or "").split())[:MAX_REASON]
    return answer(asked, "approved" if list(options) == [APPROVE] else "rejected", user, reason)


_ask_here: Ask | None = None  # how the tasks of this process ask, if not in Airflow's web interface


def ask_at(ask: Ask) -> None:
    """Let the tasks that run in this process ask in another way than in Airflow's web interface.

    Args:
        ask: For example a `Terminal`.
    """
    global _ask_here
    _ask_here = ask


def ask_in_task() -> Ask:
    """Return how a task asks."""
    return _ask_here or AskInAirflow()


def record_answer(event: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Record and announce the answer to a question.

    Args:
        event: The answer, as Airflow gives it.
        asked: The question, as JSON.
    """
    settings, question = AirflowSettings(), Decision.model_validate(asked)
    if event.get("timedout"):
        late = f"nobody answered within {settings.approval_hours:g} hours"
        given = answer(question, "approval_expired", reason=late)
    else:
        user = event.get("responded_by_user") or {}
        by = user.get("name") or user.get("id") or ""
        given = _answer(question, event["chosen_options"], event.get("params_input"), by)
    Decisions(settings.open_store()).add(given)
    announce(settings, given)
