import importlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from upath import UPath

from ridgeline.artifacts.base import ArtifactError
from ridgeline.executor import execute
from ridgeline.keys import KeyParts
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
    for minutes in (3, 1, 2):
        store.record(execution(run_id=str(minutes), minutes=minutes))
    store.record(execution("double", minutes=9))
    store.record(execution(key="l" * 64, minutes=5))
    assert [e.run_id for e in store.executions("seed", "k" * 64)] == ["3", "2", "1"]
    assert next(store.executions()).component == "double"


def test_unwritable_root_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "store", "/proc/store"):
        with pytest.raises(StoreError, match=r"RIDGELINE_STORE.*earlier content of the store"), Store(root).stage():
            pass


def run_on_a_full_disk(tmp_path: Path, program: str, toy_steps: Path) -> str:
    """Return what a program prints that gets a store on a disk of 1 MB, and the folder of the toy steps."""
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    script = f"mount -t tmpfs -o size=1m tmpfs {mount}"
    probe = subprocess.run([*mounted, script], capture_output=True, text=True, check=False)
    if probe.returncode:  # in a chroot, most containers and Ubuntu's default
        pytest.skip(f"a user may not mount a file system of their own here: {probe.stderr.strip()}")
    script = f'{script} && {sys.executable} -c "$0" {mount}/store {toy_steps.parent}'
    done = subprocess.run([*mounted, script, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_unreadable_record_is_left_out_with_a_warning(store, caplog):
    store.record(execution())
    (store.local / "executions" / "seed" / "20260101T000000.000000Z-torn.json").write_text("")
    assert len(list(store.executions())) == 1
    assert "can't be read" in caplog.text
    assert store.delete_executions(lambda _: True, dry_run=False) == 1


def test_type_alone_is_the_latest(store, number):
    for minutes, value in enumerate(("1", "22", "333")):
        store.record(execution(output=publish(store, number, value), minutes=minutes))
    assert store.open(store.find("Number"), number.Number).facts.digits == 3


def test_full_disk_during_a_step_is_explained(toy_steps, tmp_path):
    program = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        from toy_steps.seed import seed
        from ridgeline.executor import execute
        from ridgeline.store import Store, StoreError
        store = Store(sys.argv[1])
        with open(sys.argv[1] + "-filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        try:
            execute(store, seed, {}, seed.parse({}), "first")
        except StoreError as error:
            print(error)
        """
    )
    assert "No space left on device" in run_on_a_full_disk(tmp_path, program, toy_steps)


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
    with store.scratch("key") as scratch:
        (scratch / "state").write_text("mine")
        with Store(store.local).scratch("key") as second:
            assert second is None
        with store.scratch("other") as other:
            assert other.name == "other"
        assert (scratch / "state").read_text() == "mine"
    assert "the same step is running elsewhere" in caplog.text


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
