import importlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from upath import UPath

from ridgeline.artifacts.base import ArtifactError
from ridgeline.executor import execute
from ridgeline.keys import KeyParts
from ridgeline.lineage import lineage
from ridgeline.store import Execution, Store, StoreError


@pytest.fixture
def number(toy_steps):
    return importlib.import_module("toy_steps.number")


def publish(store, number, value="1"):
    with store.stage() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "number.txt").write_text(value)
        return store.publish(number.Number.seal(folder, number.NumberFacts(digits=len(value))))


def execution(component="seed", run_id="run", key="k" * 64, output=None, minutes=0):
    return Execution(
        component=component,
        run_id=run_id,
        state="complete",
        reason="first run",
        key=key,
        parts=KeyParts(component=component, inputs={}, params={}, code={}, libraries={}),
        inputs={},
        output=output,
        started_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes),
        seconds=1.0,
    )


def test_published_artifact_opens_by_its_name(store, number):
    ref = publish(store, number)
    assert ref.startswith("Number/")
    assert store.open(ref, number.Number).facts.digits == 1
    assert store.refs() == [ref]
    assert os.listdir(store.local / "staging") == []


def test_nothing_appears_when_a_step_fails(store, number):
    with pytest.raises(ZeroDivisionError), store.stage() as folder:
        (folder / "number.txt").write_text("half")
        raise ZeroDivisionError
    assert store.refs() == []
    assert os.listdir(store.local / "staging") == []


def test_equal_content_is_published_once(store, number):
    ref = publish(store, number)
    before = (store.path(ref) / "manifest.json").stat().st_ino
    assert publish(store, number) == ref
    assert (store.path(ref) / "manifest.json").stat().st_ino == before


def test_damaged_artifact_is_refused_and_replaced_by_publishing_again(store, number):
    ref = publish(store, number)
    (store.path(ref) / "sub" / "number.txt").write_text("2")
    with pytest.raises(ArtifactError, match="SHA-256"):
        store.open(ref, number.Number)
    assert publish(store, number) == ref
    assert store.open(ref, number.Number).facts.digits == 1
    assert os.listdir(store.local / "staging") == []


def test_artifact_under_another_name_is_refused(store, number):
    ref = publish(store, number)
    other = f"Number/{'0' * 64}"
    shutil.copytree(store.path(ref), store.path(other))
    with pytest.raises(ArtifactError, match="damaged"):
        store.open(other, number.Number)


@pytest.mark.parametrize("name", ["../../etc", "Number/../..", "Number/abc", "", "number/" + "a" * 64])
def test_names_that_leave_the_store_are_refused(store, name):
    with pytest.raises(ArtifactError, match="artifact's name"):
        store.path(name)


def test_find_by_beginning_or_path(store, number):
    ref = publish(store, number)
    digest = ref.split("/")[1]
    for name in (ref, digest, digest[:6], "Num", str(store.path(ref))):
        assert store.find(name) == ref
    publish(store, number, "22")
    for name, received in (("Number", "2 matches"), ("Model", "none"), ("", "2 matches")):
        with pytest.raises(ArtifactError, match=received):
            store.find(name)


def test_leftovers_of_a_killed_owner_are_deleted_at_the_next_start(store):
    program = textwrap.dedent(
        """
        import sys, time
        from ridgeline.store import Store
        with Store(sys.argv[1]).stage() as folder:
            (folder / "half").write_text("half")
            print("staged", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout.readline() == "staged\n"
        with store.stage():  # the folder of a live owner stays
            assert len(list(store.local.glob("staging/*/half"))) == 1
        killed.send_signal(signal.SIGKILL)
    with store.stage():
        assert list(store.local.glob("staging/*/half")) == []


def test_executions_are_listed_newest_first(store):
    for minutes in (1, 2, 3):
        store.record(execution(run_id=str(minutes), minutes=minutes))
    store.record(execution("double", minutes=9))
    store.record(execution(key="l" * 64, minutes=5))
    assert [e.run_id for e in store.executions("seed", key="k" * 64)] == ["3", "2", "1"]
    assert next(store.executions()).component == "double"


def test_a_clock_that_is_set_back_keeps_the_order_of_records(store):
    for run_id, minutes in (("1", 70), ("2", 10), ("3", 10), ("4", 75)):
        store.record(execution(run_id=run_id, minutes=minutes))
        store.record(execution("double", run_id=run_id, minutes=minutes + 1))
    assert [e.run_id for e in store.executions("seed")] == ["4", "3", "2", "1"]
    assert list(dict.fromkeys(e.run_id for e in store.executions())) == ["4", "3", "2", "1"]
    assert {e.started_at.minute for e in store.executions("seed", run_id="2")} == {10}  # the record itself is true


def test_unwritable_root_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "store", "/proc/store"):
        with pytest.raises(StoreError, match=r"RIDGELINE_STORE.*earlier content of the store"), Store(root).stage():
            pass


def run_with_mounts(tmp_path: Path, mounts: str, program: str, *arguments: object) -> str:
    """Return what a program prints in a mount namespace of its own, where a shell script mounts file systems."""
    (tmp_path / "mount").mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    probe = subprocess.run([*mounted, mounts], capture_output=True, text=True, check=False)
    if probe.returncode:  # in a chroot, most containers and Ubuntu's default
        pytest.skip(f"a user may not mount a file system of their own here: {probe.stderr.strip()}")
    script = f'{mounts} && exec "$0" -c "$@"'
    command = [*mounted, script, sys.executable, textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_on_a_full_disk(tmp_path: Path, program: str, toy_steps: Path) -> str:
    """Return what a program prints that gets a store on a disk of 1 MB, and the folder of the toy steps."""
    mount = tmp_path / "mount"
    return run_with_mounts(
        tmp_path, f"mount -t tmpfs -o size=1m tmpfs {mount}", program, mount / "store", toy_steps.parent
    )


FILL = """
        def fill():
            with open(sys.argv[1] + "-filler", "wb", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(4096))
                except OSError:
                    pass
"""


def test_full_disk_is_explained_and_leaves_the_store_whole(toy_steps, tmp_path):
    program = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        from toy_steps.seed import seed
        from toy_steps.number import Number
        from ridgeline.executor import execute
        from ridgeline.store import Store, StoreError
        from ridgeline.artifacts.base import verify
        store = Store(sys.argv[1])
        first = execute(store, seed, {}, seed.parse({}), "first").output
        try:
            with store.stage() as folder:
                (folder / "big").write_bytes(bytes(2_000_000))
        except StoreError as error:
            print(error)
        store.open(first, Number)
        assert store.refs() == [first]
        assert execute(store, seed, {}, seed.parse({}), "second").state == "cached"
        """
    )
    printed = run_on_a_full_disk(tmp_path, program, toy_steps)
    assert "No space left on device" in printed
    assert "ridgeline gc" in printed


def test_remote_store_serves_a_fresh_mirror(tmp_path, number):
    root = f"memory://bucket-{tmp_path.name}"
    store = Store(root, mirror=tmp_path / "here")
    assert store.remote
    ref = publish(store, number)
    store.record(execution(output=ref))
    elsewhere = Store(root, mirror=tmp_path / "there")
    assert elsewhere.refs() == [ref]
    assert elsewhere.open(ref, number.Number).path == tmp_path / "there" / "artifacts" / ref
    assert [e.output for e in elsewhere.executions("seed")] == [ref]

    (elsewhere.path(ref) / "sub" / "number.txt").write_text("2")  # a damaged mirror is copied again
    assert elsewhere.open(ref, number.Number).facts.digits == 1

    remote_file = UPath(root) / "artifacts" / ref / "sub" / "number.txt"
    remote_file.write_text("damaged")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        elsewhere.open(ref, number.Number)
    publish(store, number)
    assert elsewhere.open(ref, number.Number).facts.digits == 1
    elsewhere.delete(ref)
    assert store.refs() == []
    with pytest.raises(ArtifactError, match="Expected an artifact"):
        store.open(ref, number.Number)


def test_a_store_in_s3_serves_a_fresh_mirror(bucket, tmp_path, number):
    store = Store(f"{bucket}/store", mirror=tmp_path / "here")
    ref = publish(store, number)
    store.record(execution(output=ref))
    elsewhere = Store(f"{bucket}/store", mirror=tmp_path / "there")
    assert elsewhere.refs() == [ref]
    assert elsewhere.open(ref, number.Number).facts.digits == 1
    assert [e.output for e in elsewhere.executions("seed")] == [ref]
    elsewhere.delete(ref)
    assert store.refs() == []


def test_remote_upload_is_complete_only_with_its_manifest(tmp_path, number):
    root = f"memory://bucket2-{tmp_path.name}"
    store = Store(root, mirror=tmp_path / "here")
    ref = publish(store, number)
    (UPath(root) / "artifacts" / ref / "manifest.json").unlink()
    assert Store(root, mirror=tmp_path / "there").refs() == []


def test_staging_folders_do_not_block_each_other(store):
    start = time.monotonic()
    with store.stage() as one, store.stage() as two:
        assert one != two
    assert time.monotonic() - start < 5


def test_damaged_record_is_left_out_with_a_warning(store, caplog):
    store.record(execution(run_id="good"))
    folder = store.local / "executions" / "seed"
    good = next(folder.glob("*/*"))
    (folder / "20260101T000000.000000Z-torn.json").write_text("")
    (folder / "20260101T000000.000000Z-kkkkkkkkkkkkkkkk-00000000.json").mkdir()
    (folder / good.name.replace("00Z", "01Z")).write_bytes(good.read_bytes()[:-9])
    (folder.parent / "file").touch()
    assert [e.run_id for e in store.executions()] == ["good"]
    assert caplog.text.count("can't be read") == 3


def test_records_are_found_by_name_and_only_those_are_read(store, number, monkeypatch):
    for minutes in range(3):
        run_id, key = f"run {minutes}", f"{minutes}" * 64
        store.record(execution(run_id=run_id, key=key, output=f"Number/{key}", minutes=minutes))
        store.record(execution(run_id=run_id, key=key, minutes=minutes).model_copy(update={"state": "failed"}))
    read, work = [], Store.read_record

    def read_record(store, file):
        read.append(file)
        return work(store, file)

    monkeypatch.setattr(Store, "read_record", read_record)
    assert {e.state for e in store.executions(run_id="run 1")} == {"failed", "complete"}
    assert [e.output for e in store.executions("seed", key="2" * 64)] == [f"Number/{'2' * 64}"]
    assert lineage(store, f"Number/{'0' * 64}").execution.run_id == "run 0"
    assert len(read) == 4


def test_records_with_old_names_are_read(store):
    """Version 0.2 named them after start and key alone."""
    folder = store.local / "executions" / "seed"
    folder.mkdir(parents=True)
    for minutes in range(3):
        old = execution(run_id=f"run {minutes}", key=f"{minutes}" * 64, output=f"Number/{minutes}", minutes=minutes)
        name = f"{old.started_at:%Y%m%dT%H%M%S.%fZ}-{old.key[:16]}-0123abcd.json"
        (folder / name).write_text(old.model_dump_json(indent=2))
    store.record(execution(run_id="run 3", minutes=3))
    assert [e.run_id for e in store.executions()] == ["run 3", "run 2", "run 1", "run 0"]
    assert [e.run_id for e in store.executions(key="1" * 64)] == ["run 1"]
    assert [e.run_id for e in store.executions(run_id="run 2")] == ["run 2"]
    assert len(list(store.executions(with_output=True))) == 3
    assert lineage(store, "Number/1").execution.run_id == "run 1"


def test_type_alone_is_the_latest(store, number):
    for minutes, value in enumerate(("1", "22", "333")):
        store.record(execution(output=publish(store, number, value), minutes=minutes))
    assert store.open(store.find("Number"), number.Number).facts.digits == 3


def test_full_disk_during_a_step_is_explained(toy_steps, tmp_path):
    program = f"""
        import sys
        sys.path.insert(0, sys.argv[2])
        from toy_steps.seed import seed
        from ridgeline.executor import execute
        from ridgeline.store import Store, StoreError
        {FILL}
        store = Store(sys.argv[1])
        fill()
        try:
            execute(store, seed, {{}}, seed.parse({{}}), "first")
        except StoreError as error:
            print(error)
        """
    assert "No space left on device" in run_on_a_full_disk(tmp_path, program, toy_steps)


def test_full_disk_is_explained_however_a_library_reports_it(toy_steps, tmp_path):
    program = """
        import shutil, sys, traceback
        from pathlib import Path
        import numpy as np
        from ridgeline.artifacts.examples import write_split
        from ridgeline.store import Store, StoreError

        def split(folder):
            images = np.zeros((2000, 28, 28), np.uint8)
            write_split(folder / "train", [(images, np.zeros(2000, np.int64))], 2000, (28, 28))

        def short_write(folder):
            np.save(folder / "array.npy", np.zeros(2_000_000, np.uint8))

        def copied(folder):
            source = Path(sys.argv[2]) / "source"
            source.mkdir(exist_ok=True)
            (source / "big").write_bytes(bytes(2_000_000))
            shutil.copytree(source, folder / "copy")

        def cause(folder):
            try:
                (folder / "big").write_bytes(bytes(2_000_000))
            except OSError as error:
                raise ValueError("cannot save the model") from error

        def argument(folder):
            try:
                (folder / "big").write_bytes(bytes(2_000_000))
            except OSError as error:
                kept = error
            raise RuntimeError("worker failed", kept)

        def text(folder):  # as TensorFlow and child processes
            raise RuntimeError(f"{{{{function_node x}}}} {folder}/v; No space left on device [Op:SaveV2]")

        store = Store(sys.argv[1])
        for write in (split, short_write, copied, cause, argument, text):
            try:
                with store.stage() as folder:
                    write(folder)
            except StoreError as error:
                print(write.__name__, error)
        assert list(Path(sys.argv[1], "staging").iterdir()) == []
        """
    printed = run_on_a_full_disk(tmp_path, program, toy_steps).splitlines()
    assert [line.split()[0] for line in printed] == ["split", "short_write", "copied", "cause", "argument", "text"]
    for line in printed:
        assert f"Cannot write to the store {tmp_path}/mount/store: " in line
        assert "Free disk space, for example with `ridgeline gc`, and run again. The earlier content" in line


def test_other_errors_of_a_step_are_not_taken_for_a_full_disk(store):
    for error in (ValueError("out of memory"), OSError(5, "Input/output error"), FileNotFoundError(2, "gone")):
        with pytest.raises(type(error)) as caught, store.stage():
            raise error
        assert caught.value is error


def test_another_disk_that_is_full_is_named(store):
    advice = r"write to /tmp/x: No space .* Free disk space there, and run again"
    with pytest.raises(StoreError, match=advice), store.stage():
        raise OSError(28, "No space left on device", "/tmp/x")


def test_reuse_and_gc_work_on_a_full_disk(toy_steps, tmp_path):
    program = f"""
        import os, subprocess, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from toy_steps.seed import seed
        from toy_steps.double import double
        from ridgeline.executor import execute
        from ridgeline.gc import collect_garbage
        from ridgeline.registry import Registry
        from ridgeline.store import Store, StoreError
        {FILL}
        store = Store(sys.argv[1])
        dies = "import os, sys; from ridgeline.store import Store\\nwith Store(sys.argv[1]).stage() as folder:\\n"
        dies += "    (folder / 'half').write_bytes(bytes(500_000)); os.kill(os.getpid(), 9)"
        subprocess.run([sys.executable, "-c", dies, sys.argv[1]])

        def run():
            first = execute(store, seed, {{}}, seed.parse({{}}), "run")
            second = execute(store, double, {{"number": first.output}}, double.parse({{}}), "run")
            return first.state, second.state

        run()
        subprocess.run([sys.executable, "-c", dies, sys.argv[1]])
        fill()
        print(collect_garbage(store, Registry(Path(sys.argv[1]) / "serving"), 1, dry_run=True).freed_bytes)
        assert run() == ("cached", "cached")  # which clears what the killed process left
        assert execute(store, seed, {{}}, seed.parse({{"value": 2}}), "run").state == "complete"
        fill()
        assert run() == ("cached", "cached")
        try:
            execute(store, seed, {{}}, seed.parse({{"value": 3}}), "run")
        except StoreError as error:
            print(error)
        """
    printed = run_on_a_full_disk(tmp_path, program, toy_steps)
    freed, message = printed.splitlines()
    assert freed == "500000"
    assert "Free disk space, for example with `ridgeline gc`" in message


READ_ONLY = """
        import sys
        sys.path.insert(0, sys.argv[2])
        from toy_steps.seed import seed
        from ridgeline.executor import execute
        from ridgeline.gc import collect_garbage
        from ridgeline.registry import Registry
        from ridgeline.store import Store, StoreError
        store = Store(sys.argv[1])
        print(execute(store, seed, {}, seed.parse({}), "run").state)
        print(collect_garbage(store, Registry(store.local / "serving"), 1, dry_run=True).artifacts)
        for work in (
            lambda: execute(store, seed, {}, seed.parse({"value": 2}), "run"),
            lambda: collect_garbage(store, Registry(store.local / "serving"), 1, dry_run=False),
        ):
            try:
                work()
            except StoreError as error:
                print(error)
"""


def test_a_read_only_store_reuses_and_refuses_everything_else(store, toy_steps, tmp_path):
    seed = importlib.import_module("toy_steps.seed").seed
    execute(store, seed, {}, seed.parse({}), "run")
    mounts = f"mount --bind {store.root} {tmp_path}/mount && mount -o remount,ro,bind {tmp_path}/mount"
    printed = run_with_mounts(tmp_path, mounts, READ_ONLY, tmp_path / "mount", toy_steps.parent).splitlines()
    assert printed[:2] == ["cached", "{}"]
    assert len(printed) == 4
    assert all("Name a writable folder in RIDGELINE_STORE" in line for line in printed[2:]), printed


@pytest.mark.parametrize("place", ["artifacts", "artifacts/Number"])
@pytest.mark.parametrize("how", ["-t tmpfs tmpfs", "--bind {tmp_path}/mount"])
def test_artifacts_on_another_disk_are_refused_before_the_work(store, toy_steps, tmp_path, place, how):
    (store.local / place).mkdir(parents=True)
    program = """
        import sys
        sys.path.insert(0, sys.argv[2])
        from toy_steps.seed import seed
        from ridgeline.executor import execute
        from ridgeline.store import Store, StoreError
        try:
            execute(Store(sys.argv[1]), seed, {}, seed.parse({"fail": True}), "run")
        except StoreError as error:
            print(error)
        """
    mounts = f"mount {how.format(tmp_path=tmp_path)} {store.local / place}"
    printed = run_with_mounts(tmp_path, mounts, program, store.root, toy_steps.parent)
    assert "Cannot write to the store" in printed
    assert "Keep artifacts/ and staging/ on one file system" in printed


def test_scratch_outlives_a_failure_and_goes_after_success(store):
    folder = store.local / "scratch" / "key"
    with pytest.raises(ArithmeticError), store.scratch("key") as scratch:
        (scratch / "state").write_text("half")
        raise ArithmeticError
    with store.scratch("key") as scratch:
        assert scratch == folder
        assert (scratch / "state").read_text() == "half"
    assert os.listdir(store.local / "scratch") == []


def test_scratch_without_content_leaves_nothing(store):
    with pytest.raises(ArithmeticError), store.scratch("key"):
        raise ArithmeticError
    assert os.listdir(store.local / "scratch") == []


def test_scratch_has_one_owner_at_a_time(store, caplog):
    caplog.set_level("INFO", logger="ridgeline")
    order = []

    def second():
        with Store(store.local).scratch("key") as scratch:
            order.append("second")
            assert list(scratch.iterdir()) == []

    thread = threading.Thread(target=second)
    with store.scratch("key") as scratch:
        (scratch / "state").write_text("mine")
        thread.start()
        with store.scratch("other") as other:
            assert other.name == "other"
        while "waits: another process runs the same step" not in caplog.text:
            time.sleep(0.01)
        assert (scratch / "state").read_text() == "mine"
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list((store.local / "scratch").iterdir()) == []


def test_old_scratch_is_cleared_unless_someone_works_in_it(store):
    old = time.time() - 3600
    for key in ("old", "new", "working"):
        with pytest.raises(ArithmeticError), store.scratch(key) as scratch:
            (scratch / "state").write_text("half")
            if key != "new":
                os.utime(scratch / "state", (old, old))
                os.utime(scratch, (old, old))
            raise ArithmeticError
    hour = timedelta(minutes=59)
    with pytest.raises(ArithmeticError), store.scratch("working"):
        assert store.clear_scratch(hour, dry_run=True) == {"old": 4}
        assert store.clear_scratch(hour, dry_run=False) == {"old": 4}
        raise ArithmeticError
    assert {path.name for path in (store.local / "scratch").glob("*[!k]")} == {"new", "working"}
    assert not (store.local / "scratch" / "old.lock").exists()


def test_what_killed_processes_left_is_cleared_at_the_next_start(store, toy_steps):
    seed = importlib.import_module("toy_steps.seed").seed
    done = execute(store, seed, {}, seed.parse({"value": 1}), "run 1")
    scratch, staging = store.local / "scratch", store.local / "staging"
    (store.local / "executions" / "seed" / ".20260101T000000.000000Z-dead.json").touch()
    (staging / f"{'d' * 32}.json").write_text('{"half": ')  # a record
    (staging / ("e" * 32) / "saved_model").mkdir(parents=True)  # written again by a child that outlived its parent
    (staging / f"{'f' * 32}.lock").touch()
    scratch.mkdir(exist_ok=True)
    (scratch / f"{'0' * 64}.lock").touch()
    (scratch / done.key).mkdir()
    (scratch / done.key / "checkpoint").touch()
    earlier = done.started_at.timestamp()
    for path in (scratch / done.key / "checkpoint", scratch / done.key):
        os.utime(path, (earlier, earlier))
    (scratch / ("1" * 64)).mkdir()
    (scratch / ("1" * 64) / "checkpoint").touch()
    for action in (
        lambda: store.clear_leftovers(),
        lambda: execute(store, seed, {}, seed.parse({"value": 1}), "run 2"),
    ):
        action()
        assert list(staging.iterdir()) == []
        assert {path.name for path in scratch.iterdir() if path.suffix != ".lock"} == {"1" * 64}  # not finished
        assert [path for path in (store.local / "executions").rglob("*") if path.name.startswith(".")] == []


def test_scratch_of_a_finished_key_that_runs_again_is_kept(store, toy_steps):
    seed = importlib.import_module("toy_steps.seed").seed
    done = execute(store, seed, {}, seed.parse({}), "run 1")
    with pytest.raises(ArithmeticError), store.scratch(done.key) as scratch:
        (scratch / "checkpoint").write_text("half")
        after = done.started_at.timestamp() + done.seconds + 60
        for path in (scratch / "checkpoint", scratch):
            os.utime(path, (after, after))
        raise ArithmeticError
    store.clear_leftovers()
    assert (scratch / "checkpoint").read_text() == "half"


def test_nothing_of_a_running_step_is_cleared(store):
    with store.scratch("a" * 64) as scratch, store.stage() as folder:
        (folder / "half").touch()
        (scratch / "checkpoint").touch()
        Store(store.local).clear_leftovers()
        assert (folder / "half").exists()
        assert (scratch / "checkpoint").exists()
