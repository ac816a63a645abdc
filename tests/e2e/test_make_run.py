"""``make run``: the DAG in one process, without a scheduler, in a folder and an AIRFLOW_HOME of its own."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ridgeline.registry import Registry
from ridgeline.store import Store

SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
Start = Callable[..., subprocess.Popen[str]]


def make_run(start: Start, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with start(folder, *arguments) as process:
        output, errors = process.communicate(timeout=800)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.mark.airflow
def test_a_failed_run_shows_the_error_and_exits_with_1(start_run: Start, tmp_path: Path) -> None:
    done = make_run(start_run, tmp_path, "--set", "ingest.dataset=synthetic_garments:1.0.0", "--set", "trian.epochs=3")
    assert done.returncode == 1, done.stderr
    assert "ingest failed: Expected parameters of the DAG's trigger form; received trian.epochs." in done.stdout
    assert re.search(r"^export +upstream_failed$", done.stdout, re.MULTILINE)
    assert f"The run failed. Airflow's log: {tmp_path}/var/airflow-run/run.log" in done.stdout
    assert done.stderr == ""


@pytest.mark.airflow
def test_ctrl_c_ends_the_run_instead_of_retrying_the_task(
    start_run: Start, synthetic_store: Store, tmp_path: Path
) -> None:
    shutil.copytree(synthetic_store.local, tmp_path / "var" / "store")
    values = [*(f"{name}={value}" for name, value in SYNTHETIC.items()), "train.epochs=500"]
    with start_run(tmp_path, *(word for value in values for word in ("--set", value))) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "epoch 2/500" in line)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, "")
    assert output.splitlines()[-1] == "Interrupted. The next run resumes after the last finished step."
    records = [e for e in Store(tmp_path / "var/store").executions() if e.run_id != "synthetic"]
    states = {e.component: e.state for e in records}
    assert states == {
        "ingest": "cached",
        "transform": "cached",
        "statistics": "cached",
        "schema": "cached",
        "validate": "cached",
        "train": "failed",
    }


@pytest.mark.airflow
@pytest.mark.real_data
def test_make_run_trains_and_serves_on_the_official_files(official_run: Path) -> None:
    output = (official_run / "output.txt").read_text()
    accuracy = re.search(r"^accuracy +(\S+), .* on 10000 test images of fashion_mnist:3.0.1$", output, re.MULTILINE)
    assert accuracy, output
    assert float(accuracy[1]) == pytest.approx(0.82, abs=0.02)
    assert "NOT THE REAL DATA" not in output
    assert Registry(official_run / "var/store/serving").history("fashion_mnist")[0].version == 1


@pytest.mark.airflow
@pytest.mark.real_data
def test_make_run_again_reuses_every_step(official_run: Path, start_run: Start) -> None:
    again = make_run(start_run, official_run)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(re.findall(r"^\w+ +cached .* same inputs, parameters and code$", again.stdout, re.MULTILINE)) == 9
