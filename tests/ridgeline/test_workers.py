import json
import re
import shutil
import signal
import time

import pytest

from ridgeline.component import ParameterError, Workers
from ridgeline.store import Store
from ridgeline.workers import parse
from tests.cluster import finish, free_addresses, start
from tests.conftest import SYNTHETIC

CLUSTER = {"worker": ["a:1", "b:2"]}


def config(cluster=CLUSTER, kind="worker", index=0):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (config(), Workers(("a:1", "b:2"), 0)),
        (config(index=1), Workers(("a:1", "b:2"), 1)),
        (config(index="1"), Workers(("a:1", "b:2"), 1)),
        (config({"chief": ["c:1"], "worker": ["a:1"]}, "chief"), Workers(("c:1", "a:1"), 0)),
        (config({"chief": ["c:1"], "worker": ["a:1"], "evaluator": ["e:1"]}), Workers(("c:1", "a:1"), 1)),
        (config({"worker": ["a:1"]}), None),
        (config({"chief": ["[::1]:2222"]}, "chief"), None),
    ],
)
def test_tf_config_says_which_worker_this_is(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "expected JSON such as"),
        ("[]", "expected an object such as"),
        ("{}", "expected an object such as"),
        ('{"task": {"type": "worker", "index": 0}}', "expected the addresses of the workers under cluster"),
        (json.dumps({"cluster": CLUSTER}), "expected type and index of this worker under task; received None"),
        (config(kind="master"), "expected a task of the type chief or worker; received 'master'"),
        (config(kind="evaluator"), "expected a task of the type chief or worker; received 'evaluator'"),
        (config(index=2), "expected an index of one of the 2 addresses of worker, from 0; received 2"),
        (config(index=-1), "received -1"),
        (config(index=True), "received True"),
        (config(kind="chief"), "expected an index of one of the 0 addresses of chief, from 0; received 0"),
        (config(CLUSTER | {"ps": ["p:1"]}), "received 'ps', a parameter server. Start the training without it"),
        (config({"worker": "a:1"}), "expected a list of addresses of worker; received 'a:1'"),
        (config({"worker": ["a"]}), "expected addresses of worker such as host-0:2222; received 'a'"),
        (config({"worker": ["http://a:1"]}), "received 'http://a:1'"),
        (config({"worker": ["a:65536"]}), "received 'a:65536'"),
        (config({"worker": ["a:1", "a:1"]}), "expected an address of its own for each worker"),
        (config({"chief": ["a:1", "b:1"]}), "expected one chief; received 2"),
    ],
)
def test_a_bad_tf_config_is_refused(text, problem):
    with pytest.raises(ParameterError, match=re.escape(problem)) as raised:
        parse(text)
    assert str(raised.value).startswith("TF_CONFIG: expected ")
    assert str(raised.value).endswith((".", "unset TF_CONFIG to use one machine."))


def start_workers(store, *arguments, count=2):
    """Start the same command for each worker."""
    cluster = {"worker": free_addresses(count)}
    return [
        start("-m", "ridgeline.cli", *arguments, RIDGELINE_STORE=str(store), TF_CONFIG=config(cluster, index=index))
        for index in range(count)
    ]


def test_a_bad_tf_config_is_refused_before_any_step_runs(tmp_path):
    process = start(
        "-m", "ridgeline.cli", "run", "train", RIDGELINE_STORE=str(tmp_path / "store"), TF_CONFIG=config(index=5)
    )
    (printed,) = finish([process])
    assert process.returncode == 1
    assert "error: TF_CONFIG: expected an index of one of the 2 addresses" in printed
    assert not (tmp_path / "store" / "executions").exists()


COMMAND = ["run", "train", "--set", "train.epochs=30", "--set", "train.batch_size=500"]
COMMAND += [word for name, value in SYNTHETIC.items() for word in ("--set", f"{name}={value}")]


def copied(synthetic, folder):
    """Return a copy of the synthetic store in which nothing was trained."""
    shutil.copytree(synthetic[0].store, folder)
    return folder


def trained(store):
    """Return the records of trainings by several workers, newest first."""
    return [e for e in Store(store).executions("train") if e.parts.workers > 1]


@pytest.mark.fresh_process
def test_a_lost_worker_ends_in_an_error_and_a_rerun_gives_the_same_bytes(synthetic, tmp_path):
    whole = copied(synthetic, tmp_path / "whole")
    processes = start_workers(whole, *COMMAND)
    chief, other = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], chief + other
    (record,) = trained(whole)
    assert (record.state, record.parts.workers) == ("complete", 2)
    assert "number of workers 1 → 2" in record.reason
    for printed in (chief, other):
        assert record.output in printed
    assert "worker 1 of 2: takes part until train" in other
    assert "resuming" not in chief

    killed = copied(synthetic, tmp_path / "killed")
    processes = start_workers(killed, *COMMAND)
    end = time.monotonic() + 100
    while not list(killed.glob("scratch/*/checkpoint")):
        assert time.monotonic() < end
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    chief, _ = finish(processes)
    assert time.monotonic() - started < 40
    assert processes[0].returncode == 1
    assert "Expected 2 workers until the end of the training; lost worker 1 at 127.0.0.1:" in chief
    (failed,) = trained(killed)
    assert failed.state == "failed"
    assert failed.reason.startswith("TransientStepError: Expected 2 workers")

    processes = start_workers(killed, *COMMAND)
    chief, other = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], chief + other
    assert "resuming from epoch" in chief
    assert "resuming from epoch" in other
    assert trained(killed)[0].output == record.output

    # unchanged: each finds the record, and none starts a worker
    processes = start_workers(killed, *COMMAND)
    chief, other = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], chief + other
    assert "waits for the others" not in chief + other
    assert len([e for e in trained(killed) if e.state == "cached"]) == 1  # the chief's alone
