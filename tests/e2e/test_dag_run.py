"""The training DAG in Airflow: what it refuses, and what it skips."""

from __future__ import annotations

from typing import Any

import pytest

DAG = "fashion_mnist_training"
STEPS = ["ingest", "transform", "statistics", "schema", "validate", "train", "evaluate", "label_errors", "export"]


def test_a_model_that_is_not_blessed_is_not_exported_and_the_run_succeeds(airflow: Any, not_blessed: str) -> None:
    states = dict.fromkeys(STEPS, "success") | dict.fromkeys(["sweep", "select", "export"], "skipped")
    assert airflow.states(DAG, not_blessed) == states
    assert airflow.records(not_blessed)["export"].reason.startswith("not blessed: accuracy")


def test_an_unknown_parameter_is_refused_before_any_step_works(airflow: Any) -> None:
    run_id = airflow.trigger(DAG, {"train.penalty.l3": 0.001})
    assert airflow.wait_for_run(DAG, run_id, 120) == "failed"
    states = dict.fromkeys([*STEPS, "sweep", "select"], "upstream_failed") | {"ingest": "failed"}
    assert airflow.states(DAG, run_id) == states
    assert airflow.records(run_id) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("train.penalty.l1", "strong"), ("train.penalty.l2", -1), ("train.epochs", 0), ("penalty_from", "x")],
)
def test_a_bad_value_is_refused_before_the_run_starts(airflow: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"400, .*Invalid input for param {name}"):
        airflow.trigger(DAG, {name: value})
