"""Against a server of the S3 protocol in a process of its own, behind a proxy that injects faults."""

import importlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from datetime import timedelta

import pytest

from ridgeline import object_store
from ridgeline import store as stores
from ridgeline.artifacts.base import MANIFEST, verify
from ridgeline.cli import app
from ridgeline.decisions import Decision, Decisions
from ridgeline.store import Lease, Store, StoreError
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
    proxy.faults = Faults(unknown_conditions=True)
    with pytest.raises(object_store.ConditionalWritesError, match="does not implement the condition If-None-Match"):
        object_store.expect_conditional_writes(folder)
    proxy.faults = Faults()
    with pytest.raises(object_store.ConditionalWritesError, match="only s3://"):
        object_store.expect_conditional_writes(object_store.open_url("memory://bucket"))
    assert folder.fs.find(folder.path) == []


def test_a_store_of_one_host_needs_no_conditional_writes(bucket, proxy, tmp_path, number):
    proxy.faults = Faults(unknown_conditions=True)
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    refs = [publish(store, number) for _ in range(2)]
    assert refs == [*store.refs(), *store.refs()]
    assert store.reuse(refs[0])


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


def test_a_name_that_no_bucket_has_is_reported(bucket, tmp_path):
    with pytest.raises(StoreError, match='Cannot read s3://a!/store: Invalid bucket name "a!". Correct the name'):
        Store("s3://a!/store", mirror=tmp_path / "here").refs()


def test_a_bucket_that_is_missing_is_not_created(bucket, tmp_path):
    store = Store(f"{bucket}0/store", mirror=tmp_path / "here")
    with store.lease("run") as problem:
        assert "Create the bucket, or correct its name" in str(problem)
    with pytest.raises(StoreError, match="Create the bucket, or correct its name"):
        store.record(execution())
    with pytest.raises(StoreError, match="Create the bucket, or correct its name"):
        Decisions(store).add(Decision(kind="stale", model="shoes", subject="1", title="old"))
    assert not store.root.fs.exists(f"{bucket}0")


def test_what_may_not_be_deleted_is_an_error_and_not_taken_for_deleted(bucket, proxy, tmp_path, number, caplog):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    store.record(execution(output=publish(store, number)))
    proxy.faults = Faults(forbidden=("DELETE",))
    folder = store.root / "artifacts"
    with pytest.raises(PermissionError):
        object_store.delete(folder)
    assert len(object_store.sizes(folder)) == 2
    for action in (lambda: store.delete(store.refs()[0]), lambda: store.delete_records(store.record_files())):
        with pytest.raises(StoreError, match="Correct the credentials, or grant them the rights to list, read, write"):
            action()
    assert (len(store.refs()), len(store.record_files())) == (1, 1)
    with store.lease("run") as problem:
        assert problem is None
    assert "Cannot delete the lease of run, which expires by itself" in caplog.text


def test_names_that_are_patterns_are_deleted(bucket):
    folder = object_store.open_url(f"{bucket}/folder")
    for name in ("[1]", "2*", "3", "4"):
        object_store.write(folder / name, b"1")
    object_store.write(object_store.open_url(f"{bucket}/folder2"), b"1")
    object_store.delete(folder)
    assert list(object_store.sizes(object_store.open_url(bucket))) == ["folder2"]


def test_a_small_object_is_read_with_one_request(bucket, proxy):
    folder = object_store.open_url(f"{bucket}/folder")
    for name in ("a", "b"):
        object_store.write(folder / name, name.encode())
    before = proxy.faults.counts["requests"]
    assert object_store.content(folder / "a") == b"a"
    assert proxy.faults.counts["requests"] == before + 1
    assert object_store.contents(folder, ["a", "b", "missing"]) == {"a": b"a", "b": b"b"}
    assert proxy.faults.counts["requests"] == before + 4


def test_a_thousand_objects_are_deleted_with_one_request(bucket, proxy, monkeypatch):
    monkeypatch.setattr(object_store, "BULK", 20)
    folder = object_store.open_url(f"{bucket}/folder")
    object_store.create(folder / f"{number}" for number in range(50))
    names = [f"{number}" for number in range(45)]
    before = proxy.faults.counts["requests"]
    object_store.delete(folder, [*names, "missing"])
    assert proxy.faults.counts["requests"] == before + 3
    assert sorted(object_store.sizes(folder)) == ["45", "46", "47", "48", "49"]
    object_store.delete(folder)
    assert proxy.faults.counts["requests"] == before + 6  # two listings
    assert not object_store.sizes(folder)


def test_a_deletion_takes_four_requests_for_an_artifact_however_many_files_it_has(bucket, proxy, tmp_path, number):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    counts = []
    for digits in (["1", "2"], [str(digit) for digit in range(100, 112)]):
        refs = [publish(store, number, text) for text in digits]
        before = proxy.faults.counts["requests"]
        with store.deletion() as hide:
            hide(refs)
        counts.append(proxy.faults.counts["requests"] - before)
        assert store.refs() == []
        assert not object_store.sizes(store.root / "artifacts")
    assert counts[1] - counts[0] == 4 * (12 - 2)  # the manifest is read and deleted, a mark written, the files listed


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        ("400", "AuthorizationHeaderMalformed", "Correct the credentials, the region or the address"),
        ("403", "RequestTimeTooSkewed", "Set the clock of this machine"),
        ("403", "AccessDenied", "Correct the credentials, or grant"),
        ("501", "NotImplemented", "Correct the credentials, the region or the address"),
    ],
)
def test_what_s3_refuses_is_reported_with_advice(bucket, proxy, tmp_path, status, code, advice):
    proxy.faults = Faults(answer=(status, code))
    with pytest.raises(StoreError, match=rf"Cannot read s3://\S+/store: {code} at this time\. {advice}"):
        Store(f"{bucket}/store", mirror=tmp_path / "here").refs()


def test_an_endpoint_that_never_responds_is_asked_three_times(bucket, tmp_path):
    timeouts = {"read_timeout": 0.1, "retries": {"total_max_attempts": 1}}
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        options = {"endpoint_url": endpoint, "config_kwargs": timeouts}
        with pytest.raises(StoreError, match="Cannot read s3://.*: ReadTimeoutError: .* Try again later"):
            Store(f"{bucket}/store", mirror=tmp_path / "here", options=options).refs()
        server.settimeout(0)
        connections = []
        with suppress(BlockingIOError):
            while True:
                connections.append(server.accept()[0])
    for connection in connections:
        connection.close()
    assert len(connections) == 3


def test_an_endpoint_that_does_not_exist_is_an_error_after_retries(bucket, tmp_path):
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    store = Store(f"{bucket}/store", mirror=tmp_path / "here", options=options)
    with pytest.raises(StoreError, match="Cannot read s3://.*: EndpointConnectionError.*Try again later"):
        store.refs()


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_what_another_host_records_beside_garbage_collection_is_kept(bucket, tmp_path, number, monkeypatch, moment):
    here, there = (Store(f"{bucket}/store", mirror=tmp_path / host) for host in ("here", "there"))
    ref = publish(there, number)
    monkeypatch.setattr("ridgeline.store.LEASE_EXPIRY", timedelta(seconds=-60))  # it looked at its age before

    def record(now):
        if now == moment:
            there.reuse(ref)
            there.record(execution(output=ref))

    with here.deletion(keep_young=True) as hide:
        record("before")
        hide([ref])
        record("during")
    record("after")
    assert here.open(ref, number.Number).facts.digits == 1


@pytest.mark.parametrize("moment", ["in the middle", "after"])
def test_what_is_published_again_while_it_is_deleted_is_whole(bucket, tmp_path, number, monkeypatch, moment):
    """Garbage collection has hidden it, and deletes it in the middle of the upload by another host, or after it."""
    here, there = (Store(f"{bucket}/store", mirror=tmp_path / name) for name in ("here", "there"))
    ref = publish(here, number)
    upload, deletion = object_store.upload, here.deletion()
    deletion.__enter__()([ref])

    def upload_beside(source, target, names):
        if names == [MANIFEST] and moment == "in the middle":
            deletion.__exit__(None, None, None)
        upload(source, target, names)

    monkeypatch.setattr(object_store, "upload", upload_beside)
    assert publish(there, number) == ref
    monkeypatch.undo()
    there.record(execution(output=ref))
    if moment == "after":
        deletion.__exit__(None, None, None)
    assert here.open(ref, number.Number).facts.digits == 1


def test_an_output_whose_upload_is_deleted_after_its_record_is_uploaded_again(bucket, tmp_path, number, monkeypatch):
    """Garbage collection on another host has listed the records before, and deletes this upload, too."""
    here, there = (Store(f"{bucket}/store", mirror=tmp_path / name) for name in ("here", "there"))
    ref = publish(there, number)
    artifacts, upload, uploaded = there.root / "artifacts", object_store.upload, []
    object_store.delete(artifacts)

    def upload_beside(source, target, names):
        upload(source, target, names)
        uploaded.append(names)
        if len(uploaded) == 2:  # files, manifest
            object_store.delete(artifacts)

    monkeypatch.setattr(object_store, "upload", upload_beside)
    there.record(execution(output=ref))
    assert len(uploaded) == 4
    assert here.open(ref, number.Number).facts.digits == 1


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_recorded_while_its_files_are_deleted_is_whole(bucket, tmp_path, number, monkeypatch, dies):
    """Between the look whether another host has recorded it and the deletion of its files, another host does so."""
    monkeypatch.setattr(stores, "MARK_LOOK_SECONDS", 0.05)
    here, there = (Store(f"{bucket}/store", mirror=tmp_path / name) for name in ("here", "there"))
    ref, delete = publish(here, number), object_store.delete

    def record():
        assert publish(there, number) == ref
        there.record(execution(output=ref))

    recording = threading.Thread(target=record)

    def delete_beside(folder, names=None):
        monkeypatch.setattr(object_store, "delete", delete)
        recording.start()
        recording.join(timeout=3)  # it waits for the end
        if dies:
            raise KeyboardInterrupt
        delete(folder, names)

    monkeypatch.setattr(object_store, "delete", delete_beside)
    with suppress(KeyboardInterrupt):
        here.delete(ref)
    monkeypatch.setattr(stores, "MARK_EXPIRY", timedelta(0))
    recording.join()
    assert here.open(ref, number.Number).facts.digits == 1
    assert [name for name in object_store.sizes(here.root / "artifacts") if stores.MARK in name] == []


def test_a_mark_of_a_dead_host_is_deleted(bucket, tmp_path, monkeypatch):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    mark = f"artifacts/Number/{'0' * 64}/{stores.MARK}x"
    object_store.write(store.root / mark, b"")
    store.clear_staging(dry_run=False)
    assert mark in object_store.sizes(store.root)
    monkeypatch.setattr(stores, "MARK_EXPIRY", timedelta(seconds=-1))
    store.clear_staging(dry_run=False)
    assert mark not in object_store.sizes(store.root)


def test_a_lease_that_ends_while_it_is_read_is_no_error(bucket, proxy, tmp_path):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    lease = store.root / "leases" / "x.json"
    object_store.write(lease, Lease(host="there", run_id="run", artifacts=[], lock="/x").model_dump_json().encode())
    assert [found.host for found in store.leases()] == ["there"]

    def end(method, path):
        if "list-type" in path and "leases" in path:
            object_store.delete_object(lease)
        return False

    proxy.faults = Faults(loses=end)
    assert store.leases() == []


def test_a_lease_of_another_host_whose_lock_this_user_may_not_look_for_expires(bucket, tmp_path, monkeypatch):
    store, lock = Store(f"{bucket}/store", mirror=tmp_path / "here"), f"/{'x' * 300}/x.lock"  # an error as in /root
    lease = Lease(host="there", run_id="run", artifacts=[], lock=lock)
    object_store.write(store.root / "leases" / "x.json", lease.model_dump_json().encode())
    assert store.leases() == [lease]
    monkeypatch.setattr(stores, "LEASE_EXPIRY", timedelta(seconds=-1))
    assert store.leases() == []


def test_two_processes_of_a_host_that_fetch_the_same_do_not_disturb_each_other(bucket, tmp_path, number, monkeypatch):
    ref = publish(Store(f"{bucket}/store", mirror=tmp_path / "there"), number)
    one, two = (Store(f"{bucket}/store", mirror=tmp_path / "here") for _ in range(2))
    download, found = object_store.download, []

    def download_beside(source, target, sizes):
        download(source, target, sizes)
        monkeypatch.setattr(object_store, "download", download)
        found.append(two.fetch(ref).stat().st_ino)  # and reads it now

    monkeypatch.setattr(object_store, "download", download_beside)
    assert [one.fetch(ref).stat().st_ino] == found


def test_a_copy_that_is_being_used_is_not_evicted(bucket, tmp_path, number, monkeypatch):
    ref = publish(Store(f"{bucket}/store", mirror=tmp_path / "there"), number)
    here = Store(f"{bucket}/store", mirror=tmp_path / "here", cache_bytes=1)
    os.utime(here.fetch(ref), (0, 0))

    def verify_beside(folder):
        found = verify(folder)
        Store(f"{bucket}/store", mirror=tmp_path / "here", cache_bytes=1)._evict()
        return found

    monkeypatch.setattr(stores, "verify", verify_beside)
    assert here.open(ref, number.Number).facts.digits == 1


def test_the_log_tells_the_progress_within_a_file(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(object_store, "PROGRESS_SECONDS", -1)
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(object_store, "NUM_PARTS", 2)
    (tmp_path / "large").write_bytes(os.urandom(12 * 2**20))
    folder = object_store.open_url(f"{bucket}/folder")
    with caplog.at_level("INFO"):
        object_store.upload(tmp_path, folder, ["large"])
        object_store.download(folder, tmp_path / "copy", {"large": 12 * 2**20})
    assert (tmp_path / "copy" / "large").read_bytes() == (tmp_path / "large").read_bytes()
    lines = [f"{done} {count}.0 of 12.0 MiB" for done in ("uploaded", "downloaded") for count in (5, 10, 12)]
    assert [record.getMessage() for record in caplog.records if "MiB" in record.getMessage()] == lines


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
