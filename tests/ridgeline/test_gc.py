import importlib
import os
import time

import pytest

from ridgeline.executor import execute
from ridgeline.gc import collect_garbage
from ridgeline.history import HistoryEntry
from ridgeline.lineage import lineage
from ridgeline.registry import Registry


def test_gc_keeps_the_last_runs(store, runs, tmp_path):
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=2, dry_run=False)
    assert set(garbage.artifacts) == set(runs[1])
    assert garbage.num_executions == 2
    assert set(store.refs()) == {*runs[2], *runs[3]}
    assert {e.run_id for e in store.executions()} == {"run 2", "run 3"}


def test_gc_dry_run_deletes_nothing(store, runs, tmp_path):
    before = set(store.refs())
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=True)
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
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=False)
    assert set(garbage.artifacts) == set(runs[2])
    assert lineage(store, runs[1][1]).inputs["number"].execution is not None


def test_gc_keeps_what_a_recent_run_reused(store, runs, tmp_path):
    seed = importlib.import_module("toy_steps.seed").seed
    assert execute(store, seed, {}, seed.parse({"value": 1}), "run 4").state == "cached"
    garbage = collect_garbage(store, Registry(tmp_path / "serving"), keep_runs=1, dry_run=False)
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
        assert collect_garbage(store, Registry(tmp_path), keep_runs=3, dry_run=False).scratch == found
    assert not scratch.exists()
