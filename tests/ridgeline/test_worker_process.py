"""Several workers run a step that needs no TensorFlow: what passes to their processes, and who records what."""

import importlib
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ridgeline import executor, keys, step_cli
from ridgeline.artifacts.dataset import Dataset, DatasetFacts
from ridgeline.component import Params, StepError, StepSkipped, TransientStepError, Workers, component
from ridgeline.executor import decide, execute
from ridgeline.keys import key_parts
from ridgeline.store import Store
from ridgeline.worker_process import run_in_process

SHARED_STEP = """
import os
import signal
from pathlib import Path
from typing import Any
from pydantic import Field
from ridgeline.component import Params, StepError, StepSkipped, Workers, component
from toy_steps.number import Doubled, DoubledFacts, Number

class OwnError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

class ShareParams(Params):
    fail: str = ""
    place: Path | None = Field(None, exclude=True)

@component(output=Doubled)
def share(
    number: Number, params: ShareParams, output: Path, scratch: Path | None, workers: Workers | None
) -> DoubledFacts:
    print("worker", workers and workers.index)
    if scratch:
        (scratch / "state").write_text("left")
    if params.fail == "refused":
        raise StepError("Expected 1; received 2.")
    if params.fail == "skipped":
        raise StepSkipped("nothing to do")
    if params.fail == "infinite":
        raise FloatingPointError("infinite")
    if params.fail == "own":
        raise OwnError(1, 2)
    if params.fail == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if params.fail == "alone":
        os.kill(os.getpid(), signal.SIGALRM)
    if params.fail == "chief" and workers.is_chief:
        raise ArithmeticError("only the chief")
    text = (number.path / "number.txt").read_text()
    text += f" {len(workers.addresses) if workers else 1} {os.environ.get('TF_CONFIG')} {params.place}"
    (output / "number.txt").write_text(text)
    return DoubledFacts(digits=len(text))
"""
CHIEF = Workers(("a:1", "b:1"), 0)
OTHER = replace(CHIEF, index=1)


@pytest.fixture
def share(toy_steps, monkeypatch):
    (toy_steps / "share.py").write_text(SHARED_STEP)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(toy_steps.parent), *filter(None, sys.path)]))
    monkeypatch.setenv("TF_CONFIG", "of the parent")
    keys.forget_code()
    return importlib.import_module("toy_steps.share").share


@pytest.fixture
def number(store, share):
    seed = importlib.import_module("toy_steps.seed").seed
    return execute(store, seed, {}, seed.parse({}), "run 0").output


@pytest.fixture
def opened(store, number):
    return store.open(number, importlib.import_module("toy_steps.number").Number)


def test_a_step_runs_in_a_process_of_its_own(share, opened, tmp_path, capfd):
    (tmp_path / "output").mkdir()
    params = share.parse({"place": "/shop"})  # a location, which is in no key
    made = run_in_process(share, OTHER, params=params, output=tmp_path / "output", number=opened)
    assert (made.path / "number.txt").read_text() == "21 2 None /shop"
    assert made.facts.digits == len("21 2 None /shop")
    assert "worker 1" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        ("refused", StepError, "Expected 1; received 2."),
        ("skipped", StepSkipped, "nothing to do"),
        ("infinite", FloatingPointError, "infinite"),
        ("own", RuntimeError, "OwnError: 1 and 2"),
        ("killed", TransientStepError, "on worker 0 of 2 ended with status -9 and no result"),
        ("alone", TransientStepError, "Expected 2 workers to start in time; missing one of b:1."),
    ],
)
def test_errors_reach_the_caller(share, opened, tmp_path, fail, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        run_in_process(share, CHIEF, params=share.parse({"fail": fail}), output=tmp_path, number=opened)
    assert type(raised.value) is error


def test_the_worker_that_is_missing_is_another_one(share, opened, tmp_path):
    with pytest.raises(TransientStepError, match="missing one of a:1. Start"):
        run_in_process(share, OTHER, params=share.parse({"fail": "alone"}), output=tmp_path, number=opened)


def together(store, share, number, params, workers, **changed):
    """Run the step as each worker at once; return the executions and errors by index."""
    outcomes: dict[int, Any] = {}

    def run(each):
        try:
            outcomes[each.index] = execute(
                store, share, {"number": number}, share.parse(params), f"run {each.index}", workers=each, **changed
            )
        except Exception as error:
            outcomes[each.index] = error

    threads = [threading.Thread(target=run, args=(each,)) for each in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_the_chief_records_and_the_others_report_its_execution(store, share, number):
    outcomes = together(store, share, number, {}, [CHIEF, OTHER])
    (record,) = store.executions("share")
    assert (record.run_id, record.state, record.parts.workers) == ("run 0", "complete", 2)
    assert outcomes == {0: record, 1: record}
    assert not list((store.local / "staging").glob("*"))
    assert not list((store.local / "scratch").glob("*"))

    reused = together(store, share, number, {}, [CHIEF, OTHER])
    assert {execution.state for execution in reused.values()} == {"cached"}
    assert {execution.output for execution in reused.values()} == {record.output}
    assert [e.run_id for e in store.executions("share") if e.state == "cached"] == ["run 0"]

    again = together(store, share, number, {}, [CHIEF, OTHER], rerun=True)
    assert again[0] == again[1]
    assert again[0].started_at > record.started_at


def test_the_others_fail_with_the_chief(store, share, number):
    outcomes = together(store, share, number, {"fail": "chief"}, [CHIEF, OTHER])
    assert isinstance(outcomes[0], ArithmeticError)
    assert isinstance(outcomes[1], TransientStepError)
    assert "The chief of the workers failed: ArithmeticError: only the chief" in str(outcomes[1])
    (record,) = store.executions("share")
    assert (record.run_id, record.state) == ("run 0", "failed")
    (scratch,) = (store.local / "scratch").glob("*/")
    assert scratch.name == record.key


def test_a_step_that_the_workers_skip_is_skipped_once(store, share, number):
    outcomes = together(store, share, number, {"fail": "skipped"}, [CHIEF, OTHER])
    (record,) = store.executions("share")
    assert (record.run_id, record.state, record.reason) == ("run 0", "skipped", "nothing to do")
    assert outcomes == {0: record, 1: record}


def test_a_worker_does_not_wait_for_ever_for_the_record(store, share, number, monkeypatch):
    monkeypatch.setattr(executor, "CHIEF_SECONDS", 1.0)
    outcomes = together(store, share, number, {}, [OTHER])
    assert "Expected the chief of the workers to record share" in str(outcomes[1])
    assert not list(store.executions("share"))


def test_the_number_of_workers_is_in_the_key_but_not_which_one_it_is_and_where(store, share, opened):
    inputs, params = {"number": opened}, share.parse({})
    alone = key_parts(share, inputs, params)
    elsewhere = replace(OTHER, addresses=("c:3", "d:4"))
    several = [key_parts(share, inputs, params, workers=workers) for workers in (CHIEF, OTHER, elsewhere)]
    assert len({parts.key() for parts in several}) == 1
    assert several[0].key() != alone.key()
    assert several[0].differences(alone) == ["number of workers 1 → 2"]
    assert "workers" not in alone.model_dump_json()
    assert type(alone).model_validate_json(several[0].model_dump_json()) == several[0]
    assert decide(store, share, inputs, params, workers=CHIEF).parts == several[0]
    seed = importlib.import_module("toy_steps.seed").seed
    assert key_parts(seed, {}, seed.parse({}), workers=CHIEF) == key_parts(seed, {}, seed.parse({}))


def test_a_step_with_workers_has_no_sources():
    def shared(params: Params, output: Path, workers: Workers | None) -> DatasetFacts:
        raise NotImplementedError

    with pytest.raises(TypeError, match="neither sources nor an argument previous; received shared"):
        component(output=Dataset, sources=lambda params: {})(shared)


def test_a_record_of_one_worker_is_that_of_earlier_releases(store, number):
    (record,) = Store(store.local).executions("seed")
    assert record.parts.workers == 1
    assert '"workers"' not in next((store.local / "executions" / "seed").glob("*/*.json")).read_text()


def test_ridgeline_step_writes_on_the_chief_alone(share, opened, tmp_path):
    arguments = ["--number", str(opened.path), "--output", str(tmp_path / "new")]
    assert step_cli.run_step(share, arguments, OTHER) is None
    assert not (tmp_path / "new").exists()
    made = step_cli.run_step(share, arguments, CHIEF)
    assert (tmp_path / "new" / "number.txt").read_text() == "21 2 None None"
    assert made.path == tmp_path / "new"
    assert sorted(path.name for path in tmp_path.iterdir() if "new" in path.name) == ["new"]
