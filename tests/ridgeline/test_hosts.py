"""Two hosts on one object store, whose requests are answered in orders that are drawn from seeds.

``SEEDS=0-300 pytest tests/ridgeline/test_hosts.py`` tries more of them.
"""

import importlib
import os
import time
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from ridgeline import key_lease, object_store
from ridgeline import store as stores
from ridgeline.executor import execute
from ridgeline.gc import collect_garbage
from ridgeline.lineage import producers
from ridgeline.registry import Registry
from ridgeline.store import Execution, Store
from tests.hosts import HostProxy, Turns

FIRST, _, LAST = os.environ.get("SEEDS", "0-4").partition("-")
SEEDS = range(int(FIRST), int(LAST) + 1)
NONE = timedelta(0)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(key_lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stores, "MARK_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(object_store, "FIRST_WAIT_SECONDS", 0.01)


class Pair:
    """Two hosts with a store of their own."""

    def __init__(self, turns, stores):
        self.turns, (self.here, self.there) = turns, stores

    def run(self, here, there):
        """Run an action on each host; return the results, or errors."""
        results = self.turns.run({"here": here, "there": there})
        print(time.time(), len(self.turns.order), f"--- {self.turns.seed}\n", "\n".join([*self.turns.order, str(results)]))
        return results["here"], results["there"]


@pytest.fixture
def pairs(bucket, s3_endpoint, tmp_path):
    """Two hosts for each seed."""
    pairs, proxies = [], []
    for seed in SEEDS:
        turns, opened = Turns(seed), []
        for host in ("here", "there"):
            proxies.append(proxy := HostProxy(s3_endpoint, host, turns))
            proxy.writes = proxies[0].writes
            options = {"endpoint_url": proxy.address}
            opened.append(Store(f"{bucket}/{seed}", tmp_path / f"{seed}-{host}", options=options))
        pairs.append(Pair(turns, opened))
    yield pairs
    for proxy in proxies:
        proxy.shutdown()
        proxy.server_close()


@pytest.fixture
def age(monkeypatch):
    """The function that lets all that was written before older by some hours."""

    def age(hours):
        time.sleep(1)  # an object states its time in seconds
        before, older = datetime.now(UTC), timedelta(hours=hours)
        modified_at, listing = object_store.modified_at, object_store.listing
        time.sleep(1.5)

        def aged(path):
            found = modified_at(path)
            return found - older if found < before else found

        def aged_listing(folder, suffix=""):
            found = listing(folder, suffix)
            new = datetime.now(UTC) - before
            return {name: f._replace(age=f.age + older) if f.age > new else f for name, f in found.items()}

        monkeypatch.setattr(object_store, "modified_at", aged)
        monkeypatch.setattr(object_store, "listing", aged_listing)

    return age


@pytest.mark.parametrize("rerun", [False, True])
def test_what_a_host_makes_while_another_one_collects_garbage_is_whole(pairs, age, toy_steps, tmp_path, rerun):
    step = importlib.import_module("toy_steps.seed").seed
    registry = Registry(tmp_path / "serving")
    for pair in pairs:
        for value in (1, 2):
            execute(pair.there, step, {}, step.parse({"value": value}), f"run {value}")
    age(hours=8)
    for pair in pairs:
        collected, made = pair.run(
            lambda: collect_garbage(pair.here, registry, keep_runs=1, dry_run=False, recent=NONE),
            lambda: execute(pair.there, step, {}, step.parse({"value": 1}), "run 3", rerun=rerun),
        )
        assert not isinstance(collected, Exception)
        assert isinstance(made, Execution)
        fresh = Store(pair.here.root, tmp_path / f"fresh-{pair.turns.seed}")
        assert fresh.open(made.output, step.output).facts.digits == 1
        assert producers(fresh.record_files(), fresh.read_record)(made.output)
        assert not [name for name in object_store.sizes(fresh.root / "artifacts") if stores.MARK in name]
