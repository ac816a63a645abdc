"""The operator of a task that may wait for approval. The plugin names it, so this module imports little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from airflow.providers.standard.decorators.python import _PythonDecoratedOperator
from airflow.sdk import Context
from airflow.sdk.bases.decorator import TaskDecorator, task_decorator_factory


class TaskWithApproval(_PythonDecoratedOperator):
    """The operator behind `task_with_approval`."""

    def resume(self, context: Context, event: Mapping[str, Any], asked: Mapping[str, Any]) -> Any:
        """Record the answer and run the function again: it finds the answer.

        Args:
            context: Airflow's context.
            event: The answer, as Airflow gives it.
            asked: The question.
        """
        from ridgeline.airflow.approval import record_answer

        record_answer(event, asked)
        return self.execute(context)


def task_with_approval(function: Callable[..., Any] | None = None, **options: Any) -> TaskDecorator:
    """Declare a task that may ask for approval, see `ridgeline.airflow.approval`; otherwise it is Airflow's ``@task``.

    Args:
        function: The function; it runs a second time after the answer.
        **options: Those of ``@task``.
    """
    return task_decorator_factory(function, decorated_operator_class=TaskWithApproval, **options)
