"""Several hosts that share nothing but an object store: processes with a mirror each, and a step that resumes."""

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from ridgeline import key_lease, object_store
from ridgeline.gc import collect_garbage
from ridgeline.key_lease import KeyLease
from ridgeline.registry import Registry
from ridgeline.store import Lease, Store, StoreError
from tests.faulty_proxy import Faults
from tests.processes import release
from tests.ridgeline.test_store import execution, publish
from torture.clock import clock_off_by

SLOW = """
import logging, os, time
from pathlib import Path
import numpy
from ridgeline.component import Params, component
from toy_steps.number import Number, NumberFacts

class SlowParams(Params):
    steps: int = 8

@component(output=Number)
def slow(params: SlowParams, output: Path, scratch: Path | None) -> NumberFacts:
    state = scratch / "state.txt"
    done = int(state.read_text()) if state.exists() else 0
    logging.getLogger(__name__).info("begins at %d", done)
    while done < params.steps:
        time.sleep(0.1)
        while done == 4 and "WAIT" in os.environ and not Path(os.environ["WAIT"]).exists():
            time.sleep(0.1)
        done += 1
        (scratch / ".unfinished").write_text(str(done))
        (scratch / ".unfinished").rename(state)
    (output / "number.txt").write_text(str(done))
    return NumberFacts(digits=1)
"""
HOST = """
import importlib.metadata, json, logging, sys
from datetime import timedelta
from pathlib import Path
from ridgeline import key_lease
from ridgeline.executor import execute
from ridgeline.store import Store
from toy_steps.slow import slow
from torture.clock import clock_off_by

url, mirror, minutes, numpy = sys.argv[1:]
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
key_lease.EXPIRY, key_lease.RENEWAL_SECONDS = timedelta(seconds=3), 0.5
key_lease.LOOK_SECONDS, key_lease.COPY_SECONDS = 0.2, 0.2
if numpy:
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: numpy if name == "numpy" else version(name)
print("ready", flush=True)
sys.stdin.readline()
with clock_off_by(timedelta(minutes=int(minutes))):
    done = execute(Store(url, mirror=Path(mirror)), slow, {}, slow.parse({}), Path(mirror).name)
print(json.dumps({"state": done.state, "output": done.output, "reason": done.reason}))
"""


@pytest.fixture
def start(bucket, toy_steps, tmp_path, monkeypatch):
    """The function that starts the step on a host, in a process of its own.

    In the middle of its work, it waits until a file exists, if one is given.
    """
    (toy_steps / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(toy_steps.parent), str(Path.cwd())]))
    started = []

    def start(host, minutes=0, numpy="", wait=None):
        command = [sys.executable, "-P", "-c", textwrap.dedent(HOST), f"{bucket}/store", str(tmp_path / host)]
        started.append(
            subprocess.Popen(
                [*command, str(minutes), numpy],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **({"WAIT": str(wait)} if wait else {})},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def store(bucket, tmp_path):
    return Store(f"{bucket}/store", mirror=tmp_path / "here")


def ended(process):
    """Return what a host printed at its end, and its log."""
    output, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    return json.loads(output), log


def wait_for_copy(store, steps):
    """Wait until the copy of the unfinished work has come as far."""
    for _ in range(600):
        copies = [name for name in object_store.sizes(store.root / "scratch") if name.endswith("/state.txt")]
        found = object_store.read(store.root / "scratch" / copies[0]) if copies else None
        if found and int(found[0]) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("no copy of the unfinished work")


def leftovers(store):
    found = [name for folder in ("keys", "scratch", "leases") for name in object_store.sizes(store.root / folder)]
    return [name for name in found if name != object_store.CLOCK]


@pytest.mark.parametrize("seed", [7, 8])
def test_of_hosts_with_one_key_one_works_and_the_others_reuse(start, store, proxy, tmp_path, seed):
    proxy.faults = Faults(seed=seed, rate=0.03)
    wait = tmp_path / "wait"
    release(*(hosts := [start(f"host{number}", minutes=10 * number, wait=wait) for number in range(3)]))
    wait_for_copy(store, 4)
    time.sleep(5)  # longer than the lease
    wait.touch()
    results = [ended(host) for host in hosts]
    assert sorted(found["state"] for found, _ in results) == ["cached", "cached", "complete"]
    assert len({found["output"] for found, _ in results}) == 1
    assert sum("begins at" in log for _, log in results) == 1
    assert sum("waits: " in log for _, log in results) >= 1
    assert store.refs() == [results[0][0]["output"]]
    assert leftovers(store) == []


def test_another_host_resumes_the_work_of_a_killed_one(start, store, tmp_path):
    first, second = (
        start("first", minutes=10, wait=tmp_path / "never"),
        start("second"),
    )  # the clock of the first is wrong
    release(first)
    wait_for_copy(store, 4)
    release(second)
    time.sleep(1)
    first.kill()
    found, log = ended(second)
    assert found["state"] == "complete"
    assert "waits: " in log
    assert "fetched the unfinished work" in log
    assert "begins at 4" in log
    assert store.fetch(found["output"]).joinpath("number.txt").read_text() == "8"
    assert [name for name in leftovers(store) if not name.endswith(".json")] == []


def test_a_host_that_was_stopped_for_longer_than_its_lease_ends_well(start, store, tmp_path):
    first, other = start("first", wait=tmp_path / "wait"), start("second")
    release(first)
    wait_for_copy(store, 4)
    first.send_signal(signal.SIGSTOP)
    release(other)
    second, _ = ended(other)
    (tmp_path / "wait").touch()
    first.send_signal(signal.SIGCONT)
    found, log = ended(first)
    assert "another host has taken over" in log
    assert found["state"] == second["state"] == "complete"
    assert [found["output"]] == store.refs()
    assert leftovers(store) == []


def test_a_host_with_another_version_of_a_library_has_another_key(start, store):
    results = []
    for version in ("1.0", "2.0"):
        release(host := start(f"numpy{version}", numpy=version))
        results.append(ended(host)[0])
    assert [found["state"] for found in results] == ["complete", "complete"]
    assert results[1]["reason"] == "library numpy 1.0 → 2.0"
    assert sorted(e.parts.libraries["numpy"] for e in store.executions()) == ["1.0", "2.0"]


def test_several_hosts_are_refused_without_conditional_writes(proxy, store):
    proxy.faults = Faults(unconditional=True)
    with store.lease("here"), store.scratch("a"):  # one host
        pass
    lease = Lease(host="elsewhere", run_id="run", artifacts=[], lock="/elsewhere/x.lock")
    object_store.write(store.root / "leases" / "x.json", lease.model_dump_json().encode())
    with pytest.raises(StoreError) as error, store.scratch("a"):
        pass
    assert "Expected an object store with conditional writes for several hosts" in str(error.value)
    assert "it ignores the condition If-None-Match. Now elsewhere uses it, too." in str(error.value)


def test_hosts_that_add_to_the_same_output_do_so_one_after_the_other(bucket, proxy, store, tmp_path, monkeypatch):
    monkeypatch.setattr(key_lease, "LOOK_SECONDS", 0.05)
    there, order = Store(f"{bucket}/store", mirror=tmp_path / "there"), []

    def add():
        with there.lock(across_hosts="infer"):
            order.append("there")

    with store.lock(across_hosts="infer"):
        (other := threading.Thread(target=add)).start()
        time.sleep(1)
        order.append("here")
    other.join()
    assert order == ["here", "there"]
    assert leftovers(store) == []


def test_who_may_not_delete_is_refused_before_work(proxy, store, caplog):
    proxy.faults = Faults(forbidden=("DELETE", "POST"))
    message = "AccessDenied.*rights to list, read, write and delete"
    with pytest.raises(StoreError, match=message), store.lease("run"), store.scratch("a"):
        raise AssertionError
    assert "Cannot delete the lease of run, which expires" in caplog.text


def test_the_next_process_of_a_host_does_not_wait_for_a_killed_one(store, monkeypatch):
    monkeypatch.setattr(key_lease, "LOOK_SECONDS", 3600.0)
    place = store.root / "keys" / "a.json"
    assert KeyLease(place, store._mirror_name()).acquire() is None  # and dies
    with store.scratch("a"):
        assert KeyLease(place, "another").acquire()
    assert leftovers(store) == []


def test_a_copy_of_a_machine_waits_for_it(store):
    lease, copy = (KeyLease(store.root / "keys" / "a.json", store._mirror_name()) for _ in range(2))
    assert lease.acquire() is None
    copy._holder = copy._holder.model_copy(update={"host": "copy"})
    assert copy.acquire() == lease._holder.host


def test_a_lease_outlasts_a_renewal_that_failed(proxy, store, caplog):
    lease = KeyLease(store.root / "keys" / "a.json", store._mirror_name())
    assert lease.acquire() is None
    proxy.faults = Faults(forbidden=("PUT",))
    with pytest.raises(PermissionError):
        lease.renew()
    proxy.faults = Faults()
    assert lease.renew()
    lease.release()
    assert "another host has taken over" not in caplog.text
    assert leftovers(store) == []


def once(method, end, action):
    """Return what does something after the first request with a method and an end of the path, whose answer is lost."""
    done: list[str] = []

    def loses(sent, path):
        if done or sent != method or not path.endswith(end):
            return False
        done.append(path)
        action()
        return True

    return loses


def test_a_lease_whose_end_is_repeated_ends_no_other(proxy, store):
    first, second = (KeyLease(store.root / "keys" / "a.json", host) for host in ("first", "second"))
    assert first.acquire() is None
    proxy.faults = Faults(loses=once("DELETE", "a.json", lambda: second.acquire()))
    first.release()
    assert object_store.content(first.place) == second._holder.as_bytes()
    second.release()
    assert leftovers(store) == []


def test_a_lease_that_another_one_s_end_deleted_is_made_again(store):
    first, second = (KeyLease(store.root / "keys" / "a.json", host) for host in ("first", "second"))
    assert first.acquire() is None
    object_store.delete_object(first.place)  # repeated, in an object store that ignores the condition
    assert first.is_held()
    assert first.renew()
    assert second.acquire()
    first.release()
    assert leftovers(store) == []


def test_who_waits_for_another_host_does_not_keep_this_one_waiting(store, monkeypatch):
    monkeypatch.setattr(key_lease, "LOOK_SECONDS", 0.05)
    other, held = KeyLease(store.root / "keys" / "infer.json", "there"), threading.Event()
    assert other.acquire() is None

    def add():
        with store.lock(across_hosts="infer"):
            held.set()

    (adding := threading.Thread(target=add)).start()
    time.sleep(0.5)
    with store.lock():
        assert not held.is_set()
    other.release()
    adding.join()
    assert held.is_set()
    assert leftovers(store) == []
    assert list((store.local / "scratch").iterdir()) == []


def test_gc_takes_no_lease_over_from_a_process_of_this_host(store, tmp_path, aged):
    with store.alone("decisions") as is_alone:
        assert is_alone
        before = object_store.read(store.root / "keys" / "decisions.json")
        aged(1)  # it could not be renewed
        collect(store, tmp_path)
        assert object_store.read(store.root / "keys" / "decisions.json") == before


def test_gc_keeps_unfinished_work_that_a_host_has_changed_since_it_looked(bucket, store, tmp_path, aged, monkeypatch):
    object_store.write(store.root / "scratch" / "a" / "state", b"half")
    clock = object_store.clock
    aged(24 * 8)
    there, acquire = Store(f"{bucket}/store", mirror=tmp_path / "there"), KeyLease.acquire
    assert collect(store, tmp_path, dry_run=True).scratch == {"a": 4}

    def later(self):
        monkeypatch.setattr(KeyLease, "acquire", acquire)
        monkeypatch.setattr(object_store, "clock", clock)
        with pytest.raises(ArithmeticError), there.scratch("a") as scratch:
            assert (scratch / "state").read_text() == "half"
            (scratch / "state").write_text("more")
            raise ArithmeticError
        return acquire(self)

    monkeypatch.setattr(KeyLease, "acquire", later)
    collect(store, tmp_path)
    assert object_store.content(store.root / "scratch" / "a" / "state") == b"more"


def test_what_failed_on_one_host_is_there_on_another(bucket, store, tmp_path):
    with pytest.raises(ArithmeticError), store.scratch("a") as scratch:
        (scratch / "part").mkdir()
        (scratch / "part" / "state").write_text("half")
        (scratch / ".hidden").write_text("unfinished")
        raise ArithmeticError
    there = Store(f"{bucket}/store", mirror=tmp_path / "there")
    with there.scratch("a") as scratch:
        assert [path.name for path in scratch.rglob("*") if path.is_file()] == ["state"]
    assert leftovers(store) == []


def test_a_copy_that_fails_is_made_later_and_costs_no_work(proxy, store, monkeypatch, caplog):
    monkeypatch.setattr(key_lease, "COPY_SECONDS", 0.05)
    with store.scratch("a") as scratch:
        proxy.faults = Faults(forbidden=("PUT",))
        (scratch / "state").write_text("1")
        while "Cannot copy the unfinished work" not in caplog.text:
            time.sleep(0.05)
        proxy.faults = Faults()
        while "a/state" not in object_store.sizes(store.root / "scratch"):
            time.sleep(0.05)


@pytest.fixture
def aged(monkeypatch):
    """The function that lets the objects of the store be older by some hours."""

    def aged(hours):
        clock = object_store.clock
        monkeypatch.setattr("ridgeline.object_store.clock", lambda folder: clock(folder) + timedelta(hours=hours))

    return aged


def collect(store, tmp_path, dry_run=False):
    return collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=3, dry_run=dry_run)


def test_gc_deletes_half_an_upload_of_a_dead_host(bucket, store, tmp_path, aged, toy_steps):
    number = importlib.import_module("toy_steps.number")
    ref = publish(store, number)
    store.record(execution(output=ref))
    half = f"Number/{'0' * 64}"
    object_store.write(store.root / "artifacts" / half / "number.txt", b"12345")
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": "store/artifacts/Number/large"}
    store.root.fs.call_s3("create_multipart_upload", **place)
    assert collect(store, tmp_path).staging == {}  # its host may be at it
    aged(7)
    assert collect(store, tmp_path, dry_run=True).staging == {half: 5}
    assert collect(store, tmp_path).staging == {half: 5}
    assert [name for name in object_store.sizes(store.root / "artifacts") if half in name] == []
    assert store.root.fs.list_multipart_uploads(place["Bucket"]) == []
    assert store.refs() == [ref]


def test_gc_deletes_the_unfinished_work_of_dead_hosts(store, tmp_path, aged):
    for key in ("a", "b", "c"):
        object_store.write(store.root / "scratch" / key / "state", b"half")
    store.record(execution(key="b", output=f"Number/{'1' * 64}"))  # it ended, and its host died
    KeyLease(store.root / "keys" / "a.json", "dead").acquire()
    KeyLease(store.root / "keys" / "b.json", "dead").acquire()
    assert collect(store, tmp_path).scratch == {}  # b is in use
    aged(1)
    assert collect(store, tmp_path, dry_run=True).scratch == {"b": 4}
    assert collect(store, tmp_path).scratch == {"b": 4}
    assert sorted(object_store.ages(store.root / "scratch", "")) == ["a/state", "c/state"]
    assert object_store.ages(store.root / "keys") == {}
    aged(24 * 7)
    assert collect(store, tmp_path).scratch == {"a": 4, "c": 4}
    assert leftovers(store) == []


@pytest.mark.parametrize("hours", [-7, 7])
def test_gc_on_a_host_whose_clock_is_wrong_deletes_nothing_that_is_in_use(store, tmp_path, toy_steps, hours):
    half, key = f"Number/{'0' * 64}", store.root / "keys" / "a.json"
    number = importlib.import_module("toy_steps.number")
    ref = publish(store, number)  # its record follows
    object_store.write(store.root / "artifacts" / half / "number.txt", b"half")
    object_store.write(store.root / "scratch" / "a" / "state", b"half")
    assert KeyLease(key, "there").acquire() is None
    before = object_store.sizes(store.root)
    with clock_off_by(timedelta(hours=hours)):
        collect(store, tmp_path)
        assert KeyLease(key, "here").acquire()
    assert before.items() <= object_store.sizes(store.root).items()
    assert store.refs() == [ref]
