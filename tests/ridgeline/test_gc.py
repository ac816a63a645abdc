import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta

import pytest

from ridgeline import files, object_store, pipeline
from ridgeline.artifacts.base import ArtifactError
from ridgeline.executor import execute
from ridgeline.gc import collect_garbage
from ridgeline.history import HistoryEntry
from ridgeline.lineage import lineage, producers
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import LEASE_AGE, Lease, Store, StoreError

NONE = timedelta(0)  # a run is in progress only while a step runs


def test_gc_keeps_the_last_runs(store, runs, tmp_path):
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=2, dry_run=False, recent=NONE)
    assert set(garbage.artifacts) == set(runs[1])
    assert garbage.num_executions == 2
    assert set(store.refs()) == {*runs[2], *runs[3]}
    assert {e.run_id for e in store.executions()} == {"run 2", "run 3"}


def test_gc_dry_run_deletes_nothing(store, runs, tmp_path):
    before = set(store.refs())
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=True, recent=NONE)
    assert set(garbage.artifacts) == {*runs[1], *runs[2]}
    assert all(size > 0 for size in garbage.artifacts.values())
    assert set(store.refs()) == before
    assert len(list(store.executions())) == 6


def test_gc_keeps_the_artifacts_and_ancestors_of_served_versions(store, runs, tmp_path):
    folder = tmp_path / "serving" / "model"
    (folder / "1").mkdir(parents=True)
    lines = [
        HistoryEntry(version=v, action="push", artifact=runs[v][1], model_digest="", accuracy=0.5, run_id=f"run {v}")
        for v in (2, 1)  # the folder of version 2 is gone
    ]
    (folder / "history.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=False, recent=NONE)
    assert set(garbage.artifacts) == set(runs[2])
    assert lineage(store, runs[1][1]).inputs["number"].execution is not None


def test_gc_keeps_what_a_recent_run_reused(store, runs, tmp_path):
    seed = importlib.import_module("toy_steps.seed").seed
    assert execute(store, seed, {}, seed.parse({"value": 1}), "run 4").state == "cached"
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=False, recent=NONE)
    assert runs[1][0] not in garbage.artifacts
    assert execute(store, seed, {}, seed.parse({"value": 1}), "run 5").state == "cached"


def test_gc_refuses_to_keep_no_run(store, tmp_path):
    with pytest.raises(ValueError, match="at least 1 run; received 0"):
        collect_garbage(store, Registry(tmp_path), keep_runs=0, dry_run=True)


def test_gc_deletes_scratch_that_did_not_change_for_a_week(store, runs, tmp_path):
    with pytest.raises(ArithmeticError), store.scratch("key") as scratch:
        (scratch / "checkpoint").write_text("half")
        raise ArithmeticError
    for days, found in ((6, {}), (8, {"key": 4})):
        then = time.time() - days * 86_400
        os.utime(scratch / "checkpoint", (then, then))
        os.utime(scratch, (then, then))
        assert collect_garbage(store, Registry(tmp_path), keep_runs=3, dry_run=False, recent=NONE).scratch == found
    assert not scratch.exists()


# --- beside running work


def collect(store, tmp_path, keep_runs=1, recent=NONE, steps=()):
    return collect_garbage(store, Registry(tmp_path / "serving"), keep_runs, dry_run=False, recent=recent, steps=steps)


def start(program, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SLOW = """
from pathlib import Path
from ridgeline.component import Params, component
from toy_steps.number import Doubled, DoubledFacts, Number

@component(output=Doubled)
def slow(number: Number, params: Params, output: Path) -> DoubledFacts:
    print("started", flush=True)
    input()
    (output / "number.txt").write_text((number.path / "number.txt").read_text())
    return DoubledFacts(digits=1)
"""
RUN_SLOW = """
import sys
sys.path.insert(0, sys.argv[2])
from toy_steps.slow import slow
from ridgeline.executor import execute
from ridgeline.store import Store
print(execute(Store(sys.argv[1]), slow, {"number": sys.argv[3]}, slow.parse({}), "run 1").state)
"""


@pytest.fixture
def slow(store, runs, toy_steps):
    """A process that runs a step on the outputs of the first run, and works until it gets a line."""
    (toy_steps / "slow.py").write_text(SLOW)
    with start(RUN_SLOW, store.root, toy_steps.parent, runs[1][0]) as process:
        assert process.stdout.readline() == "started\n", process.stderr.read()
        yield process


def test_gc_keeps_what_a_running_step_reads_and_all_of_its_run(store, runs, slow, tmp_path):
    garbage = collect(store, tmp_path)
    assert set(garbage.artifacts) == set(runs[2])
    assert garbage.num_in_progress == 1
    assert slow.communicate("\n")[0] == "complete\n"
    assert list(store.local.glob("leases/*")) == []


def test_a_killed_step_needs_nothing(store, runs, slow, tmp_path):
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    assert set(collect(store, tmp_path).artifacts) == {*runs[1], *runs[2]}
    assert list(store.local.glob("leases/*")) == []


def test_a_step_on_another_host_counts_for_a_day_if_its_lock_cannot_be_seen(store, runs, tmp_path):
    folder = store.local / "leases"
    lease = Lease(host="elsewhere", run_id="run 9", artifacts=[runs[1][1]], lock="/elsewhere/a.lock")
    (folder / "a.json").write_text(lease.model_dump_json())
    assert set(collect(store, tmp_path).artifacts) == set(runs[2])
    (folder / "a.json").write_text(
        lease.model_copy(update={"started_at": datetime.now(UTC) - LEASE_AGE}).model_dump_json()
    )
    assert set(collect(store, tmp_path).artifacts) == set(runs[1])
    assert list(folder.iterdir()) == []


def test_gc_keeps_runs_that_may_be_between_two_steps(store, runs, tmp_path):
    garbage = collect(store, tmp_path, recent=timedelta(hours=1))
    assert (garbage.artifacts, garbage.num_executions, garbage.num_in_progress) == ({}, 0, 2)
    assert collect(store, tmp_path).num_executions == 4


def test_a_run_is_in_progress_from_the_end_of_its_last_step(store, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_newest_start", lambda component: "")  # records are written again, not in their order
    for execution in list(store.executions(run_id="run 1")):  # it began long ago and has just ended
        now = datetime.now(UTC)
        store.record(execution.model_copy(update={"started_at": now - timedelta(days=3), "seconds": 3 * 86_400}))
    for file in store.record_files():
        if not store.read_record(file).started_at < datetime.now(UTC) - timedelta(days=2):
            execution = store.read_record(file)
            store.delete_records([file])
            store.record(execution.model_copy(update={"started_at": execution.started_at - timedelta(days=1)}))
    assert collect(store, tmp_path, recent=timedelta(hours=1)).num_in_progress == 1
    assert set(store.refs()) == {*runs[1], *runs[3]}


def test_reuse_of_what_gc_deletes_meanwhile_runs_the_step_again(store, runs, tmp_path, monkeypatch):
    """The artifact disappears at each moment of a look-up in turn."""
    seed = importlib.import_module("toy_steps.seed").seed
    for method in ("open", "lock", "holds"):
        work = getattr(Store, method)

        def vanish(*args, method=method, work=work):
            monkeypatch.setattr(Store, method, work)
            if method != "open":
                store.delete(runs[1][0])
                return work(*args)
            found = work(*args)
            store.delete(runs[1][0])
            return found

        monkeypatch.setattr(Store, method, vanish)
        assert execute(store, seed, {}, seed.parse({"value": 1}), "again").state == "complete"
        assert store.holds(runs[1][0])


def test_an_artifact_that_vanishes_while_it_is_read_is_missing(store, runs, monkeypatch):
    number = importlib.import_module("toy_steps.number").Number

    def load(path):
        store.delete(runs[1][0])
        return (path / "number.txt").read_text()

    monkeypatch.setattr(number, "load", load)
    with pytest.raises(ArtifactError, match=r"it was deleted\. Rerun the step that writes it"):
        store.open(runs[1][0], number)


def test_gc_keeps_what_a_run_of_the_command_line_has_made_between_two_steps(store, runs, toy_steps, tmp_path):
    seed, double = (getattr(importlib.import_module(f"toy_steps.{name}"), name) for name in ("seed", "double"))
    params = {"seed": seed.parse({"value": 1}), "double": double.parse({"factor": 3})}
    steps = pipeline.run(Settings(store=str(store.root)), [seed, double], params, "between")
    assert next(steps).execution.state == "cached"
    execute(store, seed, {}, seed.parse({"value": 9}), "newest")
    collect(store, tmp_path)
    assert next(steps).execution.state == "complete"
    assert next(steps, None) is None
    assert store.leases() == []


def test_a_push_is_protected_like_its_step(tmp_path, monkeypatch):
    from torture.toys import deliver, double, seed

    settings = Settings(store=str(tmp_path / "store"))
    store, leases = settings.open_store(), []
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: leases.extend(store.leases()))
    result = pipeline.run_step(settings, seed, {}, seed.parse({}), "run")
    result = pipeline.run_step(settings, double, {"number": result.execution.output or ""}, double.parse({}), "run")
    result = pipeline.run_step(settings, deliver, {"doubled": result.execution.output or ""}, deliver.parse({}), "run")
    assert result.pushed
    assert result.pushed.new
    assert [lease.run_id for lease in leases] == ["run"]


def test_a_lease_that_is_being_made_is_deleted_by_nobody(store, runs, tmp_path):
    lease = store.local / "leases" / "0.json"
    lease.write_text(Lease(run_id="new", artifacts=[runs[1][0]], lock="0.lock").model_dump_json())
    lease.with_suffix(".lock").touch()  # its owner holds the store's lock and is about to take this one
    collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=True, recent=NONE)
    assert store.leases() == []
    assert lease.exists()


def test_records_of_a_newer_release_stop_it_and_damaged_ones_keep_their_output(store, runs, tmp_path):
    newest, oldest = (
        next((store.local / "executions/seed").glob(f"*/*{ref[7:23]}*")) for ref in (runs[3][0], runs[1][0])
    )
    newest.write_text("{")
    garbage = collect(store, tmp_path)
    assert runs[3][0] not in garbage.artifacts
    execute(store, importlib.import_module("toy_steps.seed").seed, {}, seed_params(1), "again")
    oldest = next((store.local / "executions/seed").glob(f"*/*{runs[1][0][7:23]}*"))
    oldest.write_text(files.sign('{"schema_version": 99}'))
    before = store.refs()
    with pytest.raises(StoreError, match=r"a newer version of Ridgeline wrote the record seed/.*nothing was deleted"):
        collect(store, tmp_path)
    assert store.refs() == before


def seed_params(value):
    return importlib.import_module("toy_steps.seed").seed.parse({"value": value})


def test_a_clock_that_was_ahead_keeps_no_run_in_progress(store, runs, tmp_path):
    record = next(store.executions("seed"))
    ahead = datetime.now(UTC) + timedelta(days=300)
    store.record(record.model_copy(update={"started_at": ahead, "run_id": "ahead"}))
    for number in range(3):
        old = {"started_at": datetime.now(UTC) - timedelta(days=10), "run_id": f"old {number}"}
        store.record(record.model_copy(update=old))
    assert collect(store, tmp_path).num_in_progress <= 1


RUNNER = """
import random, sys, time
sys.path.insert(0, sys.argv[2])
from toy_steps.seed import seed
from toy_steps.double import double
from ridgeline.executor import execute
from ridgeline.store import Store
store, chance, end, states = Store(sys.argv[1]), random.Random(sys.argv[3]), time.monotonic() + 3, []
while time.monotonic() < end or set(states) == {"complete"}:
    run_id = f"{sys.argv[3]} {len(states)}"
    with store.lease(run_id):
        first = execute(store, seed, {}, seed.parse({"value": chance.randrange(20, 26)}), run_id)
        second = execute(store, double, {"number": first.output}, double.parse({}), run_id)
        third = execute(store, double, {"number": first.output}, double.parse({"factor": 3}), run_id)
    states += [first.state, second.state, third.state]
print(len(states), set(states) == {"complete", "cached"})
"""


def test_gc_that_keeps_one_run_disturbs_no_runner(store, toy_steps, tmp_path):
    runners = [start(RUNNER, store.root, toy_steps.parent, i) for i in range(3)]
    deleted = 0
    while any(runner.poll() is None for runner in runners):
        deleted += len(collect(store, tmp_path).artifacts)
    for runner in runners:
        printed, errors = runner.communicate()
        assert runner.returncode == 0, errors
        assert printed.split()[1] == "True", printed
    assert deleted > 0
    left = [path.name for place in ("leases", "staging", "scratch") for path in (store.local / place).iterdir()]
    assert left == []


def test_a_remote_store_keeps_what_a_running_step_reads(toy_steps, tmp_path, monkeypatch):
    seed = importlib.import_module("toy_steps.seed").seed
    double = importlib.import_module("toy_steps.double").double
    store = Store(f"memory://gc-{tmp_path.name}", mirror=tmp_path / "mirror")
    first, second = (execute(store, seed, {}, seed.parse({"value": v}), f"run {v}").output or "" for v in (1, 2))
    execute(store, double, {"number": second}, double.parse({}), "run 2")
    with store.lease("running", [first]) as failure:
        assert failure is None
        another_user = Store(str(store.root), mirror=tmp_path / "other")
        assert [lease.artifacts for lease in another_user.leases()] == [[first]]
        assert collect(store, tmp_path).artifacts == {}
    assert collect(store, tmp_path).artifacts == {}  # it was written within the hour
    monkeypatch.setattr("ridgeline.store.LEASE_EXPIRY", timedelta(0))
    assert set(collect(store, tmp_path).artifacts) == {first}
    assert store.leases() == []


@pytest.fixture
def hosts(bucket, tmp_path):
    """A store in S3 as two hosts see it: with a mirror each."""
    return [Store(f"{bucket}/store", mirror=tmp_path / host) for host in ("one", "two")]


@pytest.fixture
def runs_of_hosts(hosts, toy_steps):
    """The outputs of two runs of one step."""
    seed = importlib.import_module("toy_steps.seed").seed
    return [execute(hosts[0], seed, {}, seed.parse({"value": v}), f"run {v}").output or "" for v in (1, 2)]


def wait_until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not become true within 10 seconds")


def test_a_lease_of_another_host_counts_until_it_expires(hosts, runs_of_hosts, tmp_path, monkeypatch):
    one, two = hosts
    monkeypatch.setattr("ridgeline.store.LEASE_EXPIRY", timedelta(seconds=4))
    wait_until(lambda: not two.young())
    lease = Lease(host="dead", run_id="dead", artifacts=[runs_of_hosts[0]], lock="/dead.lock")
    lease = lease.model_copy(update={"started_at": datetime.now(UTC) + timedelta(days=9)})  # its clock does not matter
    (one.root / "leases" / "dead.json").write_text(lease.model_dump_json())
    assert collect(two, tmp_path).artifacts == {}
    wait_until(lambda: not two.leases())
    assert set(collect(two, tmp_path).artifacts) == {runs_of_hosts[0]}
    assert object_store.ages(one.root / "leases", ".json") == {}
    assert one.refs() == [runs_of_hosts[1]]


def test_a_lease_in_an_object_store_is_renewed(hosts, runs_of_hosts, tmp_path, monkeypatch):
    one, two = hosts
    monkeypatch.setattr("ridgeline.store.RENEWAL_SECONDS", 0.5)
    monkeypatch.setattr("ridgeline.store.LEASE_EXPIRY", timedelta(0))
    with one.lease("running", [runs_of_hosts[0]]):
        time.sleep(4)
        (age,) = object_store.ages(one.root / "leases", ".json").values()
        assert age < timedelta(seconds=3)
        assert collect(two, tmp_path).artifacts == {}
    assert object_store.ages(one.root / "leases", ".json") == {}


def test_what_another_host_is_about_to_record_is_kept(hosts, runs_of_hosts, tmp_path, monkeypatch):
    one, two = hosts
    assert collect(two, tmp_path).artifacts == {}  # it was written within the hour
    monkeypatch.setattr("ridgeline.store.LEASE_EXPIRY", timedelta(seconds=3))
    wait_until(lambda: not two.young())
    assert one.reuse(runs_of_hosts[0])  # a step is about to record it once more
    assert collect(two, tmp_path).artifacts == {}
    assert producers(two.record_files(), two.read_record)(runs_of_hosts[0])  # which step made it is known still
    wait_until(lambda: not two.young())
    assert set(collect(two, tmp_path).artifacts) == {runs_of_hosts[0]}
    assert not one.reuse(runs_of_hosts[0])


# --- what is left of killed processes


def test_gc_frees_what_killed_steps_left_in_staging(store, runs, tmp_path):
    program = """
    import os, sys
    from ridgeline.store import Store
    with Store(sys.argv[1]).stage() as folder:
        (folder / "half").write_bytes(bytes(1000))
        os.kill(os.getpid(), 9)
    """
    with start(program, store.root) as killed:
        killed.wait()
    registry = Registry(tmp_path)
    found = collect_garbage(store, registry, keep_runs=3, dry_run=True)
    assert list(found.staging.values()) == [1000]
    assert list(store.local.glob("staging/*/half"))
    with store.stage():  # that of a running step stays
        assert collect_garbage(store, registry, keep_runs=3, dry_run=False).freed_bytes in (1000, 0)
    assert list((store.local / "staging").iterdir()) == []


GATHER = """
from pathlib import Path
from ridgeline.component import Params, component
from toy_steps.number import Number, NumberFacts

class GatherParams(Params):
    shelves: tuple[str, ...] = ()
    all: bool = True
    seed: int = 0

@component(output=Number, adds_to=("shelves",), uses_earlier=lambda params: not params.all)
def gather(params: GatherParams, output: Path, earlier: Number | None = None) -> NumberFacts:
    before = (earlier.path / "number.txt").read_text() if earlier else ""
    (output / "number.txt").write_text(f"{before} {params.shelves}{params.seed}")
    return NumberFacts(digits=1)
"""


def test_gc_keeps_what_new_output_of_any_step_would_add_to(toy_steps, store, tmp_path, monkeypatch):
    (toy_steps / "gather.py").write_text(GATHER)
    gather = importlib.import_module("toy_steps.gather").gather
    seed = importlib.import_module("toy_steps.seed").seed
    monkeypatch.setattr("ridgeline.pipeline.load_components", lambda: {"gather": gather, "seed": seed})
    settings = Settings(store=str(store.root))

    def gathered(shelf, **values):
        params = gather.parse({"shelves": [shelf], **values})
        return pipeline.run_step(settings, gather, {}, params, f"{shelf} {values}").execution

    outputs = [gathered(shelf, seed=number).output for number, shelf in enumerate(["a", "a", "b"])]
    execute(store, seed, {}, seed.parse({}), "newest")
    assert set(collect(store, tmp_path, steps=[gather, seed]).artifacts) == {outputs[0]}
    for shelf, last in zip("ab", outputs[1:], strict=True):
        assert gathered(shelf, all=False).inputs == {"earlier": last}
