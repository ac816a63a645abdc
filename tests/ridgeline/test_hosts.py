"""Two hosts on one object store, whose requests are answered in orders that are drawn from seeds.

``SEEDS=0-300 pytest tests/ridgeline/test_hosts.py`` tries more of them.
"""

import importlib
import os
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from ridgeline import key_lease, object_store
from ridgeline import store as stores
from ridgeline.artifacts.base import MANIFEST
from ridgeline.component import TransientStepError
from ridgeline.decisions import Decision, Decisions
from ridgeline.executor import added_to, execute
from ridgeline.gc import Garbage, collect_garbage
from ridgeline.lineage import producers
from ridgeline.registry import Registry
from ridgeline.store import Execution, Store
from tests.hosts import HostProxy, Turns

FIRST, _, LAST = os.environ.get("SEEDS", "0-4").partition("-")
SEEDS = range(int(FIRST), int(LAST) + 1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(key_lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stores, "MARK_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(object_store, "FIRST_WAIT_SECONDS", 0.01)


class Hosts:
    """Three hosts that share a store."""

    def __init__(self, turns, stores):
        self.turns, self.stores = turns, stores

    def run(self, **actions):
        """Run what each host does with its store, and return the results, or errors, in this order."""
        results = self.turns.run({host: partial(action, self.stores[host]) for host, action in actions.items()})
        print("\n".join([f"--- seed {self.turns.seed}", *self.turns.order, str(results)]))
        return [results[host] for host in actions]


@pytest.fixture
def groups(bucket, s3_endpoint, tmp_path):
    """Hosts for each seed."""
    groups, proxies = [], []
    for seed in SEEDS:
        turns, opened = Turns(seed), {}
        for host in ("here", "there", "third"):
            proxies.append(proxy := HostProxy(s3_endpoint, host, turns))
            proxy.writes = proxies[0].writes
            options = {"endpoint_url": proxy.address}
            opened[host] = Store(f"{bucket}/{seed}", tmp_path / f"{seed}-{host}", options=options)
        groups.append(Hosts(turns, opened))
    yield groups
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


def expect_whole(store, made, step, tmp_path):
    """Check that a host that is new to a store can read what a step made, and knows by which execution."""
    assert isinstance(made, Execution), made
    assert made.output
    fresh = Store(store.root, tmp_path / f"fresh-{store.root.name}")
    assert fresh.open(made.output, step.output).facts.digits
    assert producers(fresh.record_files(), fresh.read_record)(made.output)
    assert not [name for name in object_store.sizes(fresh.root / "artifacts") if stores.MARK in name]


def leftovers(store):
    found = [name for folder in ("keys", "scratch", "leases") for name in object_store.sizes(store.root / folder)]
    return [name for name in found if not name.endswith(object_store.CLOCK)]


@pytest.fixture
def seed_step(toy_steps):
    return importlib.import_module("toy_steps.seed").seed


@pytest.fixture
def collect(tmp_path):
    """The function that collects garbage."""
    registry = Registry(tmp_path / "serving")
    return lambda store: collect_garbage(store, registry, keep_runs=1, dry_run=False, recent=timedelta(0))


@pytest.mark.parametrize("earlier", ["reused", "made again", "half uploaded"])
def test_what_a_host_makes_while_others_collect_garbage_is_whole(groups, age, seed_step, collect, tmp_path, earlier):
    params = [seed_step.parse({"value": value}) for value in (1, 2)]

    def make(store):
        return execute(store, seed_step, {}, params[0], "last", rerun=earlier == "made again")

    for hosts in groups:
        there = hosts.stores["there"]
        old, _ = (execute(there, seed_step, {}, values, f"run {n}") for n, values in enumerate(params))
        if earlier == "half uploaded":
            object_store.delete_object(there.root / "artifacts" / old.output / MANIFEST)
    age(hours=8)
    for hosts in groups:
        made, *collected = hosts.run(there=make, here=collect, third=collect)
        for found in collected:
            assert isinstance(found, Garbage)
        expect_whole(hosts.stores["here"], made, seed_step, tmp_path)
        assert leftovers(hosts.stores["here"]) == []


def test_of_hosts_that_run_one_step_one_works(groups, seed_step, tmp_path):
    def make(store):
        return execute(store, seed_step, {}, seed_step.parse({}), store.local.name)

    for hosts in groups:
        made = hosts.run(here=make, there=make, third=make)
        for found in made:
            expect_whole(hosts.stores["here"], found, seed_step, tmp_path)
        assert sorted(found.state for found in made) == ["cached", "cached", "complete"]
        assert leftovers(hosts.stores["here"]) == []


GATHER = """
from pathlib import Path
from ridgeline.component import Params, component
from toy_steps.number import Number, NumberFacts

class GatherParams(Params):
    shelf: str = ""
    all: bool = True
    host: str = "first"

@component(output=Number, adds_to=("shelf",), uses_earlier=lambda params: not params.all)
def gather(params: GatherParams, output: Path, earlier: Number | None = None) -> NumberFacts:
    before = (earlier.path / "number.txt").read_text() if earlier else ""
    (output / "number.txt").write_text(f"{before} {params.host}")
    return NumberFacts(digits=1)
"""


@pytest.fixture
def gather(toy_steps):
    (toy_steps / "gather.py").write_text(GATHER)
    return importlib.import_module("toy_steps.gather").gather


def add(gather, store):
    """Add the name of a host to the last output."""
    params = gather.parse({"all": False, "host": store.local.name.partition("-")[2]})
    return execute(store, gather, added_to(store, gather, params), params, params.host)


def all_added(gather, store):
    last = next(store.executions(gather.name, with_output=True)).output
    return sorted((store.fetch(last) / "number.txt").read_text().split())


def test_what_hosts_add_to_one_output_is_all_there(groups, gather, tmp_path):
    def until_added(store):
        while True:
            with suppress(TransientStepError):  # another one has added to it meanwhile
                return add(gather, store)

    for hosts in groups:
        execute(hosts.stores["here"], gather, {}, gather.parse({}), "first")
        for found in hosts.run(here=until_added, there=until_added, third=until_added):
            expect_whole(hosts.stores["here"], found, gather, tmp_path)
        assert all_added(gather, hosts.stores["here"]) == ["first", "here", "there", "third"]
        assert leftovers(hosts.stores["here"]) == []


def test_a_host_that_was_stopped_while_it_published_adds_to_no_old_output(bucket, gather, tmp_path, monkeypatch):
    here, there = (Store(f"{bucket}/store", tmp_path / f"0-{host}") for host in ("here", "there"))
    execute(here, gather, {}, gather.parse({}), "first")
    publish = Store.publish

    def slowly(store, artifact):
        if store is here:
            object_store.delete_object(here.root / "keys" / "gather.json")  # it expires
            add(gather, there)
        return publish(store, artifact)

    monkeypatch.setattr(Store, "publish", slowly)
    with pytest.raises(TransientStepError, match="Expected no other run of gather to add to the same output"):
        add(gather, here)
    assert all_added(gather, here) == ["first", "there"]


def test_hosts_record_a_decision_once(groups):
    decision = Decision(kind="pushed", model="shoes", subject="version 3", title="shoes: version 3")

    def add(store):
        return Decisions(store).add(decision)

    for hosts in groups:
        assert sorted(hosts.run(here=add, there=add, third=add)) == [False, False, True]
        assert len(list(Decisions(hosts.stores["here"]).all(datetime.min.replace(tzinfo=UTC)))) == 1
        assert leftovers(hosts.stores["here"]) == []


def test_unfinished_work_outlasts_garbage_collection_beside_it(groups, age, collect):
    def work(store):
        with suppress(ArithmeticError), store.scratch("a") as scratch:
            (scratch / "state").write_text("more")
            raise ArithmeticError

    for hosts in groups:
        object_store.write(hosts.stores["here"].root / "scratch" / "a" / "state", b"half")
    age(hours=24 * 8)
    for hosts in groups:
        worked, *collected = hosts.run(there=work, here=collect, third=collect)
        assert worked is None
        for found in collected:
            assert isinstance(found, Garbage)
        assert object_store.content(hosts.stores["here"].root / "scratch" / "a" / "state") == b"more"
        assert leftovers(hosts.stores["here"]) == ["a/state"]
