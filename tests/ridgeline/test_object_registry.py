"""The registry in an object store: a server of the S3 protocol in a process of its own, behind a proxy."""

import functools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import pytest
import s3fs

from ridgeline import object_registry, object_store
from ridgeline.artifacts.pushed_model import CARD_HTML, EXTRA
from ridgeline.cli import app
from ridgeline.history import HISTORY, Serving
from ridgeline.object_registry import ObjectRegistry
from ridgeline.registry import HistoryChangedError, Registry, RegistryError
from ridgeline.serving.metrics import Metrics
from ridgeline.serving.versions import Models
from ridgeline.settings import Settings
from ridgeline.store import StoreError
from tests.faulty_proxy import Faults
from tests.processes import release
from tests.turns import Turns

NAME = "shoes"
PUSHES = """
import sys, time
from pathlib import Path
import ridgeline.registry
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.object_registry import ObjectRegistry
from ridgeline.object_store import open_url
from ridgeline.store import Store

store, url, mirror, who, *refs = Store(sys.argv[1]), *sys.argv[2:]
ridgeline.registry.check = lambda *_: time.sleep(0.03)
registry = ObjectRegistry(open_url(url), Path(mirror), 99)
print("ready", flush=True)
sys.stdin.readline()
for number, ref in enumerate(refs):
    pushed = registry.push(store.open(ref, PushedModel), f"{who} {number}", who)
    assert pushed.new, pushed.reason
    print(pushed.version)
"""


@pytest.fixture
def open_registry(bucket, proxy, tmp_path, monkeypatch):
    """The function that opens the registry as another host does: with a mirror of its own."""
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    return lambda host="here", keep=10: ObjectRegistry(
        object_store.open_url(f"{bucket}/serving"), tmp_path / "hosts" / host, keep
    )


@pytest.fixture
def publish(store, publish_servable):
    return lambda number: publish_servable(store, number)


@pytest.fixture
def publish_forced(store, publish_servable):
    return lambda number: publish_servable(store, number, accuracy=number / 100, forced=f"reason {number}")


def objects(registry):
    prefix = f"{registry.url.path}/"
    return sorted(path.removeprefix(prefix) for path in registry.url.fs.find(registry.url.path))


def test_what_one_host_pushes_another_serves(open_registry, publish, store):
    here, there = open_registry("here"), open_registry("there")
    assert (there.model_names(), there.history(NAME), there.serving(NAME)) == ([], [], None)
    assert here.push(publish(1), "run 1").version == 1
    assert there.push(publish(2), "run 2").version == 2
    for registry in (here, there):
        assert registry.model_names() == [NAME]
        assert registry.versions(NAME) == [1, 2]
        assert registry.serving(NAME) == Serving(2)
        assert registry.champion(NAME).run_id == "run 2"
        assert registry.verify(store, NAME, 1).version == 1
        assert registry.verify(store, NAME).version == 2
        assert registry.card(NAME, 1) is None
    files = ["saved_model.pb", "variables/variables.index"]
    versions = [f"{NAME}/{version}/{file}" for version in (1, 2) for file in files]
    assert objects(here) == sorted([f"{NAME}/1.json", f"{NAME}/2.json", f"{NAME}/history.jsonl", *versions])
    assert here.push(publish(2), "run 3").unchanged
    entry = here.rollback(store, NAME, None, reason="worse", by="ann", run_id="back")
    assert (entry.version, there.serving(NAME)) == (1, Serving(1))
    there.start_canary(store, NAME, 2, 0.25, reason="try", by="ann", run_id="canary")
    assert here.serving(NAME) == Serving(1, 2, 0.25)


@pytest.mark.parametrize("seed", [5, 6])
def test_pushes_of_two_hosts_at_the_same_time_all_end_well(
    bucket, proxy, open_registry, store, publish_forced, tmp_path, seed
):
    registry = open_registry("first", keep=99)
    assert registry.push(publish_forced(1), "push 1").new
    refs = {"ann": [publish_forced(n).ref for n in (2, 3, 4)], "bob": [publish_forced(n).ref for n in (5, 6, 7)]}
    proxy.faults = Faults(seed=seed, rate=0.03)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUSHES, str(store.root), f"{bucket}/serving", str(tmp_path / who), who, *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for who, names in refs.items()
    ]  # fmt: skip
    release(*processes)
    done: list[int] = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        done += map(int, output.split())
    proxy.faults.rate = 0
    history = registry.history(NAME)
    assert len(history) == 7
    assert sorted(entry.artifact for entry in history[1:]) == sorted([*refs["ann"], *refs["bob"]])
    assert [entry.version for entry in history] == sorted([1, *done])
    assert registry.versions(NAME) == sorted([1, *done])
    for version in registry.versions(NAME):
        assert registry.verify(store, NAME, version).version == version
    assert [path for path in objects(registry) if path.endswith(".claim")] == []


class Interrupted(ObjectRegistry):
    """A registry that lets another host do something just before it adds a line to the history."""

    action: Callable[[], object]

    def _append(self, name, *entries):
        action, self.action = self.action, lambda: None
        action()
        super()._append(name, *entries)


def interrupted(registry, action):
    other = Interrupted(registry.url, registry.root, registry.keep_versions)
    other.action = action
    return other


def test_of_two_pushes_judged_against_the_same_champion_one_wins(open_registry, publish, publish_servable, store):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish(1), "run 1")
    other = publish_servable(store, 3, champion=f"{1:064x}")
    pushed = interrupted(here, lambda: there.push(publish(2), "run 2")).push(other, "run 3")
    assert not pushed.new
    assert f"judged against model {1:012x}"[:20] in pushed.reason
    assert [(entry.version, entry.run_id) for entry in there.history(NAME)] == [(1, "run 1"), (3, "run 2")]
    assert [path for path in objects(here) if path.startswith(f"{NAME}/2")] == []  # what it had uploaded


def test_a_push_whose_answer_was_lost_and_to_which_another_host_added_is_done(
    open_registry, publish, publish_forced, monkeypatch
):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish(1), "run 1")
    write, others = object_store.write_if_unchanged, [publish_forced(3)]

    def lost(path, content, tag):
        written = write(path, content, tag)
        if others and path.name == HISTORY:
            there.push(others.pop(), "run 3")
            return False
        return written

    monkeypatch.setattr("ridgeline.object_store.write_if_unchanged", lost)
    assert here.push(publish_forced(2), "run 2").version == 2
    assert [(entry.version, entry.run_id) for entry in there.history(NAME)] == [
        (1, "run 1"),
        (2, "run 2"),
        (3, "run 3"),
    ]
    assert there.versions(NAME) == [1, 2, 3]


def test_a_rollback_that_another_host_overtakes_is_refused(open_registry, publish, store):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish(1), "run 1")
    here.push(publish(2), "run 2")
    with pytest.raises(HistoryChangedError, match="another host changed it meanwhile. Nothing was changed"):
        interrupted(here, lambda: there.push(publish(3), "run 3")).rollback(
            store, NAME, 1, reason="worse", by="ann", run_id="back"
        )
    assert [entry.run_id for entry in here.history(NAME)] == ["run 1", "run 2", "run 3"]


def after_the_next_write(monkeypatch, action, answer=None):
    """Let another host act between this host's next change of a history and the answer to it, True if none is given."""
    write = object_store.write_if_unchanged
    done: list[object] = []

    def replace(path, content, tag):
        written = write(path, content, tag)
        if path.name != "history.jsonl" or done:
            return written
        done.append(path)
        action()
        return answer(path, content, tag) if answer else written

    monkeypatch.setattr(object_store, "write_if_unchanged", replace)


def test_a_push_whose_answer_was_lost_and_that_another_host_followed_is_done(
    open_registry, publish, store, monkeypatch
):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish(1), "run 1")
    after_the_next_write(
        monkeypatch,
        lambda: there.start_canary(store, NAME, 1, 0.1, reason="try", by="ann", run_id="canary"),
        object_store.write_if_unchanged,  # the driver repeats the request
    )
    pushed = here.push(publish(2), "run 2")
    assert (pushed.new, pushed.version) == (True, 2)
    assert there.versions(NAME) == [1, 2]
    assert there.serving(NAME) == Serving(2, 1, 0.1)
    assert there.verify(store, NAME).version == 2


@pytest.mark.parametrize("change", ["push", "canary"])
def test_a_change_that_is_undone_keeps_what_another_host_added(
    open_registry, publish, publish_forced, store, monkeypatch, change
):
    monkeypatch.setattr(object_registry, "DELETION_SECONDS", 1)
    here, there = open_registry("here"), open_registry("there")
    here.push(publish(1), "run 1")
    here.push(publish(2), "run 2")

    def act():
        there._delete_objects(NAME, 1)
        if change == "push":
            there.push(publish_forced(3), "run 3")
        else:
            there.start_canary(store, NAME, 2, 0.1, reason="try", by="ann", run_id="run 3")

    after_the_next_write(monkeypatch, act)
    with pytest.raises(HistoryChangedError, match="Cannot serve version 1 of shoes: another host deleted version 1"):
        here.rollback(store, NAME, 1, reason="worse", by="ann", run_id="back")
    actions = [(entry.action, entry.version) for entry in there.history(NAME)]
    assert actions[:3] == [("push", 1), ("push", 2), ("rollback", 1)]
    assert actions[3:] == {"push": [("push", 3)], "canary": [("canary", 2), ("rollback", 2)]}[change]


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_push_that_was_taken_for_dead_is_repeated(open_registry, publish_forced, store, monkeypatch, is_taken):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish_forced(1), "run 1")

    def act():
        with monkeypatch.context() as patch:  # 6 hours later
            patch.setattr(object_registry, "CLAIM_AGE", timedelta(seconds=-60))
            there.recover()
        assert [path for path in objects(there) if path.startswith(f"{NAME}/2")] == []
        if is_taken:
            assert there.push(publish_forced(2), "run 2").version == 2

    pushed = interrupted(here, act).push(publish_forced(3), "run 3")
    assert (pushed.new, pushed.version) == (True, 2 + is_taken)
    for version in here.versions(NAME):
        assert here.verify(store, NAME, version).version == version
    assert here.versions(NAME) == list(range(1, pushed.version + 1))


def test_a_number_that_another_host_pushed_since_the_numbers_were_listed_is_left_alone(
    open_registry, publish_forced, store, monkeypatch
):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish_forced(1), "run 1")
    claims, others = ObjectRegistry._claims, [publish_forced(2), publish_forced(3)]

    def slow(self, name, version):
        if self is here and others:
            there.push(others.pop(0), "there")  # from the first request to the last, while the claim is on its way
        return claims(self, name, version)

    monkeypatch.setattr(ObjectRegistry, "_claims", slow)
    assert here.push(publish_forced(4), "here").new
    history = there.history(NAME)
    assert [entry.run_id for entry in history] == ["run 1", "there", "there", "here"]
    assert there.versions(NAME) == sorted(entry.version for entry in history)
    for version in there.versions(NAME):
        assert there.verify(store, NAME, version).version == version
    assert [path for path in objects(there) if path.endswith(".claim")] == []


def test_a_push_that_lost_its_claim_leaves_nothing(open_registry, publish_forced, store):
    here = open_registry("here")
    here.push(publish_forced(1), "run 1")
    late = interrupted(here, lambda: object_store.delete_object(here.url / NAME / "2.claim"))
    version = late.push(publish_forced(2), "run 2").version
    assert here.versions(NAME) == [1, version]
    assert here.verify(store, NAME).version == version
    assert [path for path in objects(here) if path.endswith(".claim")] == []


def test_a_version_that_another_host_deletes_while_it_is_copied_is_an_error_that_says_so(
    open_registry, publish_forced, store, monkeypatch
):
    here, there = open_registry("here"), open_registry("there")
    for number in (1, 2):
        here.push(publish_forced(number), f"run {number}")
    download = object_store.download

    def late(*args):
        there._delete_objects(NAME, 1)
        download(*args)

    monkeypatch.setattr(object_store, "download", late)
    with pytest.raises(RegistryError, match="/serving/shoes/1; another host deleted it meanwhile. Name one of"):
        open_registry("third").rollback(store, NAME, 1, reason="worse", by="ann", run_id="back")
    assert here.serving(NAME) == Serving(2)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_the_requests_of_hosts_ends_well(open_registry, publish_forced, store, monkeypatch, seed):
    draw = random.Random(seed)
    hosts = {who: open_registry(who, keep=1 + seed % 3) for who in ("ann", "bob")}
    for number in (1, 2):
        hosts["ann"].push(publish_forced(number), f"run {number}")
    plans = {who: ["push", *draw.choices(["push", "rollback", "canary", "promote", "abort"], k=2)] for who in hosts}
    models = {"ann": [publish_forced(n) for n in (3, 4, 5)], "bob": [publish_forced(n) for n in (6, 7, 8)]}
    done = []

    def act(who):
        here = hosts[who]
        for number, action in enumerate(plans[who]):
            told = {"reason": "drawn", "by": who, "run_id": f"{who} {number}"}
            if action == "push":
                model = models[who][number]
                pushed = here.push(model, f"{who} {number}")
                assert pushed.new, pushed.reason
                done.append((pushed.version, model.ref))
                continue
            with suppress(RegistryError):  # the other host may have changed the history, or deleted the version
                if action == "rollback":
                    here.rollback(store, NAME, None, **told)
                elif action == "canary":
                    here.start_canary(store, NAME, here.versions(NAME)[0], 0.1, **told)
                elif action == "promote":
                    here.promote(store, NAME, **told)
                else:
                    here.abort(NAME, **told)

    with monkeypatch.context() as patch:
        patch.setattr("ridgeline.registry.STILL_LOADED", timedelta(0))
        patch.setattr("time.sleep", lambda _: None)
        patch.setattr(object_registry, "DELETION_SECONDS", 50)  # turns, here
        turns = Turns(patch, seed)
        errors = turns.run({who: functools.partial(act, who) for who in hosts})
    assert not errors, (plans, turns.order)
    there = open_registry("there")
    history, versions = there.history(NAME), there.versions(NAME)
    pushes = [(entry.version, entry.artifact) for entry in history if entry.action == "push"]
    assert sorted(pushes[2:]) == sorted(done)
    served = there.serving(NAME)
    for version in {*versions, served.champion, served.canary or served.champion}:
        assert there.verify(store, NAME, version).version == version
    found = {path.removeprefix(f"{NAME}/").partition("/")[0] for path in objects(there) if path[0] != "."}
    assert found == {HISTORY, *(f"{version}{end}" for version in versions for end in ("", ".json"))}


class DeathError(Exception):
    """Every request of a host fails from now on, also those with which it would clean up."""


def test_a_host_that_dies_at_any_request_of_a_push_leaves_nothing_wrong(
    open_registry, publish_forced, store, monkeypatch
):
    monkeypatch.setattr("ridgeline.registry.STILL_LOADED", timedelta(0))
    there = open_registry("there")
    for number in (1, 2):
        there.push(publish_forced(number), f"run {number}")
    call, left = s3fs.S3FileSystem._call_s3, [0]

    async def call_until_death(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise DeathError
        return await call(self, *args, **kwargs)

    requests, done = 0, False
    while not done:
        model = publish_forced(requests + 3)
        here = ObjectRegistry(there.url, there.root.parent / "here", keep_versions=1)
        here._is_conditional = True  # the requests of this check come before all others
        left[0] = requests
        with monkeypatch.context() as patch, suppress(DeathError):
            patch.setattr(s3fs.S3FileSystem, "_call_s3", call_until_death)
            done = here.push(model, f"dies after {requests}").new
        with monkeypatch.context() as patch:  # 6 hours later
            patch.setattr(object_registry, "CLAIM_AGE", timedelta(seconds=-60))
            there.recover()
        assert there.verify(store, NAME)
        found = {path.removeprefix(f"{NAME}/").partition("/")[0] for path in objects(there) if path[0] != "."}
        versions = there.versions(NAME)
        expected = {f"{version}{end}" for version in versions for end in ("", ".json")}
        assert found == {"history.jsonl", *expected}
        requests += 1
    print(f"{requests - 1} requests of a push, of which each was the last one once")
    assert requests > 15
    assert len(there.versions(NAME)) == 2


def test_old_versions_are_deleted_unless_needed(open_registry, publish, monkeypatch):
    monkeypatch.setattr("ridgeline.registry.STILL_LOADED", timedelta(0))
    registry = open_registry(keep=1)
    for number in (1, 2, 3):
        registry.push(publish(number), f"run {number}")
    assert registry.versions(NAME) == [2, 3]
    assert [path for path in objects(registry) if path.startswith(f"{NAME}/1")] == []
    assert not open_registry("there").folder(NAME, 1).exists()
    assert not registry.folder(NAME, 1).exists()  # deleted from the mirror, too


def test_half_an_upload_of_a_dead_host_is_cleared_after_its_lease(open_registry, publish, monkeypatch):
    registry = open_registry()
    registry.push(publish(1), "run 1")
    object_store.write(registry.url / NAME / "2.claim", b"{}")
    object_store.write(registry.url / NAME / "2" / "saved_model.pb", b"half")
    object_store.write(registry.url / NAME / "1.claim", b"{}")  # it died just before it deleted it
    registry.recover()
    assert [path for path in objects(registry) if path.startswith(f"{NAME}/2")] == [
        f"{NAME}/2.claim",
        f"{NAME}/2/saved_model.pb",
    ]
    assert registry.push(publish(2), "run 2").version == 3  # the number is not used again
    monkeypatch.setattr(object_registry, "CLAIM_AGE", timedelta(seconds=-1))
    registry.recover()
    assert [path for path in objects(registry) if path.startswith(f"{NAME}/2") or "claim" in path] == []
    assert registry.versions(NAME) == [1, 3]


def test_a_damaged_object_is_noticed_and_never_takes_the_place_of_a_whole_version(open_registry, publish, store):
    here, server = open_registry("here"), open_registry("server")
    model = publish(1)
    here.push(model, "run 1")
    server.sync()
    object_store.write(here.url / NAME / "1" / "saved_model.pb", b"damaged")
    with pytest.raises(RegistryError, match="byte for byte; they were changed: saved_model.pb"):
        here.verify(store, NAME)
    with pytest.raises(RegistryError, match="to hold the files that were pushed"):
        server.sync()
    assert (server.root / NAME / "1" / "saved_model.pb").read_bytes() != b"damaged"
    assert here.push(model, "run 2").version == 2  # a repair
    assert server.sync() == {NAME: Serving(2)}


def test_a_damaged_line_is_restored_and_the_damaged_object_kept(open_registry, publish):
    registry = open_registry()
    registry.push(publish(1), "run 1")
    registry.push(publish(2), "run 2")
    place = registry.url / NAME / "history.jsonl"
    content = place.read_bytes()
    object_store.write(place, content.replace(b"run 2", b"run 9"))
    registry.recover()
    assert [entry.version for entry in registry.history(NAME)] == [1]
    assert len([path for path in objects(registry) if "history.jsonl.damaged-" in path]) == 1


def test_an_object_store_without_conditional_writes_is_refused(open_registry, proxy, publish):
    proxy.faults = Faults(unconditional=True)
    with pytest.raises(StoreError, match="ignores the condition If-None-Match. Two hosts that push"):
        open_registry().push(publish(1), "run 1")
    assert objects(open_registry()) == []


def test_credentials_without_the_right_to_delete_are_refused_before_work(open_registry, proxy, publish):
    proxy.faults = Faults(forbidden=("DELETE",))
    with pytest.raises(StoreError, match="AccessDenied. Correct the credentials, or grant them the rights to list"):
        open_registry().push(publish(1), "run 1")
    proxy.faults = Faults(forbidden=("GET", "HEAD", "PUT"))
    with pytest.raises(StoreError, match="Cannot read s3://.*: .*. Correct the credentials"):
        open_registry().model_names()
    proxy.faults = Faults()
    assert open_registry().model_names() == []


def test_a_version_that_another_host_deletes_is_not_served(open_registry, publish, store, monkeypatch):
    monkeypatch.setattr(object_registry, "DELETION_SECONDS", 1)
    here, there = open_registry("here"), open_registry("there")
    here.push(publish(1), "run 1")
    here.push(publish(2), "run 2")
    with pytest.raises(HistoryChangedError, match="Cannot serve version 1 of shoes: another host deleted version 1"):
        interrupted(here, lambda: there._delete_objects(NAME, 1)).rollback(
            store, NAME, 1, reason="worse", by="ann", run_id="back"
        )
    assert there.serving(NAME) == Serving(2)
    assert [entry.version for entry in there.history(NAME)] == [1, 2, 1, 2]


def test_a_server_of_folders_follows(open_registry, publish, store):
    here, there = open_registry("here"), open_registry("folder", keep=1)
    assert there.sync() == {}
    here.push(publish(1), "run 1")
    assert there.sync() == {NAME: Serving(1)}
    folder = Registry(there.root)
    assert json.loads((there.root / NAME / "champion.json").read_text()) == {"version": 1}
    assert f'base_path: "{there.root}/{NAME}"' in (there.root / "models.config").read_text()
    before = (there.root / NAME / "1" / "saved_model.pb").stat().st_ino
    here.push(publish(2), "run 2")
    assert there.sync() == {NAME: Serving(2)}
    here.start_canary(store, NAME, 1, 0.1, reason="try", by="ann", run_id="canary")
    assert there.sync() == {NAME: Serving(2, 1, 0.1)}
    assert folder.serving(NAME) == Serving(2, 1, 0.1)
    assert folder.history(NAME) == here.history(NAME)
    assert folder.verify(store, NAME).version == 2
    assert (there.root / NAME / "1" / "saved_model.pb").stat().st_ino == before
    here.abort(NAME, reason="enough", by="ann", run_id="abort")
    here._delete_objects(NAME, 1)
    for _ in range(2):
        assert there.sync() == {NAME: Serving(2)}
        assert folder.versions(NAME) == [1, 2]  # a server may not know yet that it is no canary any more
    os.utime(there.root / NAME / "champion.json", (0, 0))
    assert there.sync() == {NAME: Serving(2)}
    assert folder.versions(NAME) == [2]
    visible = [path.name for path in (there.root / NAME).iterdir() if path.name[0] != "."]
    assert sorted(visible) == ["2", "champion.json", "history-copy.jsonl", "history.jsonl"]


def test_a_folder_never_follows_to_a_version_that_is_missing(open_registry, publish, store):
    here, there = open_registry("here"), open_registry("folder")
    here.push(publish(1), "run 1")
    here.push(publish(2), "run 2")
    there.sync()
    here.rollback(store, NAME, 1, reason="worse", by="ann", run_id="back")
    here._delete_objects(NAME, 1)
    with pytest.raises(RegistryError, match="shoes: Expected version 1, which is served; it was deleted. Nothing was"):
        there.sync()
    assert Registry(there.root).serving(NAME) == Serving(2)


def test_a_registry_in_a_folder_is_not_overwritten(open_registry, publish, store):
    here = open_registry("here")
    here.push(publish(1), "run 1")
    own = Registry(here.root.parent / "own")
    own.push(publish(2), "run 2")
    with pytest.raises(RegistryError, match="Expected a folder for local copies alone; received .*own, which has a"):
        open_registry("own").sync()
    assert own.verify(store, NAME).run_id == "run 2"


def test_a_copy_that_is_damaged_or_half_done_is_made_again(open_registry, publish):
    registry = open_registry()
    model = publish(1)
    registry.push(model, "run 1")
    copy = registry.folder(NAME, 1) / "saved_model.pb"
    whole, before = copy.read_bytes(), copy.stat().st_ino
    copy.write_bytes(b"")
    assert registry.push(model, "run 2").unchanged  # no repair of what is whole in the object store
    assert copy.read_bytes() == whole
    assert copy.stat().st_ino != before
    before = copy.stat().st_ino
    (registry.root / NAME / ".1.json").unlink()  # a process was killed before it wrote it
    (registry.root / NAME / ".fetch-7").mkdir()
    (registry.root / NAME / ".pruned-7").mkdir()
    registry.folder(NAME, 1)
    assert copy.stat().st_ino == before  # nothing was moved that a server may be reading
    assert sorted(path.name for path in (registry.root / NAME).iterdir() if path.is_dir()) == ["1"]


def test_ridgeline_serve_follows_the_object_store(open_registry, publish, proxy):
    here = open_registry("here")
    loaded: list[str] = []

    def load(name, folder):
        loaded.append(folder.name)
        return folder

    models = Models(open_registry("server"), load, Metrics())
    models.refresh()
    assert "No model has been pushed to s3://" in models.problems()[0]
    here.push(publish(1), "run 1")
    models.refresh()
    here.push(publish(2), "run 2")
    proxy.faults = Faults(forbidden=("GET", "HEAD"))
    models.refresh()
    assert models.status(NAME) == [(1, "stable")]
    assert "Cannot read" in " ".join(models.problems())
    proxy.faults = Faults()
    models.refresh()
    assert models.status(NAME) == [(2, "stable")]
    assert loaded == ["1", "2"]


def test_pages_that_show_one_card_at_the_same_time_all_get_it(open_registry, publish):
    registry = open_registry()
    registry.push(publish(1), "run 1")
    object_store.write(registry.url / NAME / "1" / EXTRA / CARD_HTML, b"card")
    with ThreadPoolExecutor(8) as pool:
        cards = list(pool.map(lambda _: registry.card(NAME, 1), range(40)))
    assert {card.read_bytes() for card in cards} == {b"card"}


def test_settings_name_the_registry(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    registry = Settings(store=f"{bucket}/store").open_registry()
    assert isinstance(registry, ObjectRegistry)
    assert registry.place == f"{bucket}/store/serving"
    assert registry.root.is_relative_to(tmp_path / ".cache" / "ridgeline")
    registry = Settings(store=str(tmp_path), serving=f"{bucket}/models/").open_registry()
    assert registry.place == f"{bucket}/models"
    assert type(Settings(store=f"{bucket}/store", serving=str(tmp_path)).open_registry()) is Registry


def test_threads_that_read_see_whole_versions_while_others_push(open_registry, publish_forced, store):
    here, there = open_registry("here"), open_registry("there")
    here.push(publish_forced(1), "run 1")
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            seen.append(there.open_version(store, NAME)[0].version)

    reader = threading.Thread(target=read)
    reader.start()
    for number in (2, 3):
        here.push(publish_forced(number), f"run {number}")
    while seen[-1:] != [3]:
        assert reader.is_alive()
    done.set()
    reader.join()
    assert seen == sorted(seen)


def test_the_command_sync_follows_until_it_is_interrupted(open_registry, publish, bucket, tmp_path):
    open_registry().push(publish(1), "run 1")
    command = [sys.executable, "-m", "ridgeline.cli", "models", "sync", str(tmp_path / "served"), "--follow"]
    environment = {**os.environ, "RIDGELINE_SERVING": f"{bucket}/serving", "RIDGELINE_SERVING_BASE_PATH": "/models"}
    process = subprocess.Popen(
        [*command, "--every", "0.2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == f"{NAME}: version 1\n"
        assert f"served is equal to {bucket}/serving" in process.stdout.readline()
        open_registry().push(publish(2), "run 2")
        assert process.stdout.readline() == f"{NAME}: version 2\n"
        assert f'base_path: "/models/{NAME}"' in (tmp_path / "served" / "models.config").read_text()
    finally:
        process.terminate()
        process.communicate()


def test_a_folder_that_tensorflow_takes_for_a_pattern_is_refused(bucket, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RIDGELINE_SERVING", f"{bucket}/serving")
    monkeypatch.setattr("sys.argv", ["ridgeline", "models", "sync", str(tmp_path / "models[1]")])
    with pytest.raises(SystemExit):
        app()
    assert "which TensorFlow takes for a pattern; received" in capfd.readouterr().err


def test_a_folder_of_served_models_needs_no_sync(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RIDGELINE_SERVING", str(tmp_path / "serving"))
    monkeypatch.setattr("sys.argv", ["ridgeline", "models", "sync", str(tmp_path / "copy")])
    with pytest.raises(SystemExit):
        app()
    assert "Expected an s3:// URL of served models" in capfd.readouterr().err
