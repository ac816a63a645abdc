"""Against a server of the S3 protocol in a process of its own, behind a proxy that injects faults."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ridgeline import object_store
from ridgeline.cli import app
from ridgeline.decisions import Decisions
from ridgeline.store import Store, StoreError
from tests.faulty_proxy import Faults
from tests.ridgeline.test_store import execution, publish


def read(path):
    found = object_store.read(path)
    assert found
    return found


@pytest.fixture
def number(toy_steps):
    return importlib.import_module("toy_steps.number")


RECORD = """
    import sys
    from pathlib import Path
    from tests.ridgeline.test_store import execution
    from ridgeline.store import Store
    store = Store(sys.argv[1], mirror=Path(sys.argv[2]))
    store.record(execution(run_id=sys.argv[3], minutes=int(sys.argv[3])))
    """


def test_a_long_lived_process_sees_what_others_write(bucket, tmp_path):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    seen = []
    for number in range(2):
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(RECORD),
            f"{bucket}/store",
            str(tmp_path / "there"),
            str(number),
        ]
        subprocess.run(command, check=True)
        seen.append([len(list(store.executions())), len(list(Store(f"{bucket}/store", tmp_path / "x").executions()))])
    assert seen == [[1, 1], [2, 2]]


@pytest.mark.parametrize("seed", [1, 2])
def test_faults_of_the_network_cost_time_only(bucket, proxy, tmp_path, number, seed):
    proxy.faults = Faults(seed=seed, rate=0.15)
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    values = ["7" * 3_000_000, *map(str, range(5))]
    refs = [publish(store, number, value) for value in values]
    for minutes, ref in enumerate(refs):
        store.record(execution(output=ref, minutes=minutes))
    elsewhere = Store(f"{bucket}/store", mirror=tmp_path / "there")
    assert [elsewhere.open(ref, number.Number).facts.digits for ref in refs] == [len(value) for value in values]
    assert [e.output for e in elsewhere.executions()] == refs[::-1]
    elsewhere.delete(refs[0])
    assert sorted(store.refs()) == sorted(refs[1:])
    assert proxy.faults.counts["requests"] > 50


def test_an_upload_is_repeated_after_each_kind_of_fault(bucket, proxy, tmp_path, number):
    class All(Faults):
        def draw(self):
            self.counts["requests"] += 1
            kinds = ("latency", "reset_before", "reset_after", "500", "503", "truncation")
            return kinds[self.counts["requests"] // 2 % 6] if self.counts["requests"] % 2 else ""

    proxy.faults = All()
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    ref = publish(store, number)
    assert Store(f"{bucket}/store", mirror=tmp_path / "there").open(ref, number.Number).facts.digits == 1


@pytest.mark.parametrize("seed", [3, 4])
def test_of_writes_at_the_same_time_none_is_lost(bucket, proxy, seed):
    proxy.faults = Faults(seed=seed, rate=0.1)
    path = object_store.open_url(f"{bucket}/lines")

    def add(number):
        done = False
        while not done:
            content, tag = object_store.read(path) or (b"", None)
            done = object_store.write_if_unchanged(path, content + b"%d\n" % number, tag)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content, _ = read(path)
    assert sorted(map(int, content.split())) == list(range(6))


def test_a_write_whose_answer_was_lost_took_place(bucket, proxy):
    class Lost(Faults):
        def draw(self):
            self.counts["requests"] += 1
            return "reset_after" if self.counts["requests"] == 1 else ""

    path = object_store.open_url(f"{bucket}/object")
    proxy.faults = Lost()
    assert object_store.write_if_unchanged(path, b"first", None)
    _, tag = read(path)
    proxy.faults = Lost()
    assert object_store.write_if_unchanged(path, b"second", tag)
    assert not object_store.write_if_unchanged(path, b"third", tag)
    assert read(path)[0] == b"second"


def test_an_object_store_without_conditional_writes_is_recognized(bucket, proxy):
    folder = object_store.open_url(f"{bucket}/serving")
    object_store.expect_conditional_writes(folder)
    proxy.faults = Faults(unconditional=True)
    with pytest.raises(object_store.ConditionalWritesError, match="ignores the condition If-None-Match"):
        object_store.expect_conditional_writes(folder)
    with pytest.raises(object_store.ConditionalWritesError, match="only s3://"):
        object_store.expect_conditional_writes(object_store.open_url("memory://bucket"))
    assert folder.fs.find(folder.path) == []


def test_an_object_store_that_compares_tags_without_quotes_has_conditional_writes(bucket, proxy):
    proxy.faults = Faults(bare_tags=True)
    path = object_store.open_url(f"{bucket}/serving/object")
    object_store.expect_conditional_writes(path.parent)
    assert object_store.write_if_unchanged(path, b"first", None)
    _, tag = read(path)
    assert object_store.write_if_unchanged(path, b"second", tag)
    assert not object_store.write_if_unchanged(path, b"third", tag)
    assert read(path)[0] == b"second"


def test_a_listing_that_fails_is_an_error_and_hides_nothing(bucket, proxy, tmp_path, number):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    store.record(execution(output=publish(store, number)))
    proxy.faults = Faults(forbidden=("GET", "HEAD"))
    for read in (store.refs, store.record_files, store.leases, Decisions(store).all):
        with pytest.raises(StoreError, match="Cannot read s3://.*: AccessDenied. Correct the credentials, or grant"):
            read()
    with pytest.raises(StoreError, match="Correct the credentials"):
        store.manifest(f"Number/{'0' * 64}")


def test_a_bucket_that_is_missing_is_named(bucket, tmp_path, number):
    store = Store(f"{bucket}0/store", mirror=tmp_path / "here")
    for action in (store.refs, store.record_files, lambda: publish(store, number)):
        with pytest.raises(StoreError, match=f"{bucket}0/store: .*bucket.*. Create the bucket, or correct its name"):
            action()


def test_no_bucket_is_made(bucket, tmp_path, number):
    store = Store(f"{bucket}0/store", mirror=tmp_path / "here")
    with store.lease("run") as error:
        assert "Create the bucket, or correct its name" in str(error)
    for action in (lambda: store.record(execution()), lambda: publish(store, number)):
        with pytest.raises(StoreError, match="Create the bucket, or correct its name"):
            action()
    assert f"{bucket}0".removeprefix("s3://") not in store.root.fs.ls("")


def test_an_endpoint_that_does_not_exist_is_an_error_after_retries(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    store = Store(f"{bucket}/store", mirror=tmp_path / "here", options=options)
    with pytest.raises(StoreError, match="Cannot read s3://.*: EndpointConnectionError.*Try again when it can be"):
        store.refs()


def test_the_cache_is_bounded_and_keeps_what_is_in_use(bucket, tmp_path, number):
    here = Store(f"{bucket}/store", mirror=tmp_path / "here")
    refs = [publish(here, number, digit * 1000) for digit in "1234"]
    there = Store(f"{bucket}/store", mirror=tmp_path / "there", cache_bytes=3_000)  # a manifest has 300 bytes

    def copies():
        return [ref for ref in refs if there.path(ref).exists()]

    def used(ref, hours):
        os.utime(there.path(ref), (time.time() - 3600 * hours,) * 2)

    for ref in refs[:3]:
        there.fetch(ref)
    assert copies() == refs[:3]  # each was used within the hour
    for ref, hours in zip(refs, (4, 3, 2), strict=False):
        used(ref, hours)
    there.fetch(refs[1])  # it was used now
    with here.lease("run", [refs[0]]):
        there.fetch(refs[3])
    assert copies() == [refs[0], refs[1], refs[3]]
    assert there.open(refs[2], number.Number).facts.digits == 1000  # copied again
    assert copies() == refs[1:]
    assert list((there.local / "staging").iterdir()) == []


def test_the_command_says_which_rights_are_missing(bucket, proxy, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RIDGELINE_STORE", f"{bucket}/store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proxy.faults = Faults(forbidden=("GET", "HEAD"))
    with pytest.raises(SystemExit):
        app(["show", "Model"], prog_name="ridgeline")
    assert (
        f"error: Cannot read {bucket}/store: AccessDenied. Correct the credentials, or grant" in capfd.readouterr().err
    )
