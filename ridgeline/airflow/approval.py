"""Approval of a push in Airflow: the task waits, without a process, until a person answers in the web interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import Context, Param, get_current_context
from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, task_decorator_factory
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import TaskAwaitingInput
from airflow.sdk.execution_time.hitl import HITLUser, upsert_hitl_detail

from ridgeline.airflow.settings import AirflowSettings
from ridgeline.announcements import announce
from ridgeline.approval import Ask, answer, markdown
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.decisions import Decision, Decisions
from ridgeline.masking import mask

APPROVE, REJECT = "Approve", "Reject"
MAX_REASON = 500  # characters


class AskInAirflow:
    """Asks in Airflow's web interface, inside a task that `task_with_approval` declares."""

    def expect_possible(self, parameter: str) -> None:
        """Do nothing: Airflow can always ask."""

    def __call__(self, asked: Decision, evaluation: ModelEvaluation) -> NoReturn:
        """Show the question under *Required Actions* and let the task wait.

        If the answer arrives before the scheduler has noted that the task's process has ended, as a program's may,
        Airflow 3.3.2 takes the task for failed, discards the answer, and tries the task again, which asks again.

        Raises:
            TaskAwaitingInput: Always. `_TaskWithApproval.resume` continues the task.
        """
        settings = AirflowSettings()
        reason = Param("", "For the history.", type="string", title="Reason", minLength=3, maxLength=MAX_REASON)
        upsert_hitl_detail(
            ti_id=get_current_context()["ti"].id,
            options=[APPROVE, REJECT],
            subject=f"Push {asked.title.partition(' waits')[0]}?",
            body=markdown(asked, evaluation),
            defaults=[REJECT],
            params={"reason": ParamsDict({"reason": reason}).get_param("reason").serialize()},
            assigned_users=[HITLUser(id=name, name=name) for name in settings.approvers],
        )
        raise TaskAwaitingInput(
            method_name=_TaskWithApproval.resume.__name__,
            kwargs={"asked": asked.model_dump(mode="json")},
            timeout=timedelta(hours=settings.approval_hours),
        )


def _answer(asked: Decision, options: Sequence[str], params: Mapping[str, Any] | None, user: str) -> Decision:
    """Return what a person chose, as the answer to a question."""
    reason = " ".join(str((params or {}).get("reason") or "").split())[:MAX_REASON]
    return answer(asked, "approved" if list(options) == [APPROVE] else "rejected", user, mask(reason))


class _AskNow:
    """How the tasks of this process ask, if not in Airflow's web interface; see `ask_at`."""

    ask: Ask | None = None


def ask_at(ask: Ask) -> None:
    """Let the tasks that run in this process ask in another way than in Airflow's web interface.

    Args:
        ask: For example a `Terminal`.
    """
    _AskNow.ask = ask


def ask_in_task() -> Ask:
    """Return how a task asks."""
    return _AskNow.ask or AskInAirflow()


class _TaskWithApproval(DecoratedOperator, PythonOperator):
    """The operator behind `task_with_approval`."""

    custom_operator_name = "@task"

    def __init__(self, *, python_callable: Callable[..., Any], op_args: Any, op_kwargs: Any, **options: Any) -> None:
        given = {"python_callable": python_callable, "op_args": op_args, "op_kwargs": op_kwargs}
        super().__init__(kwargs_to_upstream=given, **given, **options)

    def resume(self, context: Context, event: Mapping[str, Any], asked: Mapping[str, Any]) -> Any:
        """Record the answer and run the function again: it finds the answer.

        Args:
            context: Airflow's context.
            event: The answer, as Airflow gives it.
            asked: The question.
        """
        settings, user, question = (
            AirflowSettings(),
            event.get("responded_by_user") or {},
            Decision.model_validate(asked),
        )
        if event.get("timedout"):
            late = f"nobody answered within {settings.approval_hours:g} hours"
            given = answer(question, "approval_expired", reason=late)
        else:
            by = user.get("name") or user.get("id") or ""
            given = _answer(question, event["chosen_options"], event.get("params_input"), by)
        Decisions(settings.open_store()).add(given)
        announce(settings, given)
        return self.execute(context)


def task_with_approval(function: Callable[..., Any] | None = None, **options: Any) -> TaskDecorator:
    """Declare a task that may ask for approval, see `AskInAirflow`; otherwise it is Airflow's ``@task``.

    Args:
        function: The function; it runs a second time after the answer.
        **options: Those of ``@task``.
    """
    return task_decorator_factory(function, decorated_operator_class=_TaskWithApproval, **options)
