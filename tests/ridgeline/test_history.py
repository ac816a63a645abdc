"""Damage to the files of the registry and to records: found, repaired from what is left, the damaged file kept."""

import itertools
import json
import random
import shutil
from datetime import UTC, datetime, timedelta

import pytest

from ridgeline.executor import execute
from ridgeline.history import split_lines
from ridgeline.keys import KeyParts
from ridgeline.registry import Registry
from ridgeline.store import Execution

NAME = "shoes"


@pytest.fixture
def registry(store, servable, tmp_path, monkeypatch):
    """A registry of three pushes and a rollback; each push was made by a run with a record."""
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    monkeypatch.setattr("ridgeline.registry.STILL_LOADED", timedelta(0))
    registry = Registry(tmp_path / "serving", store=store)
    for number in (1, 2, 3):
        registry.push(servable(store, number), f"run {number}", by="ann")
    registry.rollback(store, NAME, None, reason="worse", by="bob", run_id="rollback")
    return registry


@pytest.fixture
def servable(publish_servable):
    """The function that publishes a servable model with the record of its run."""

    def publish(store, number):
        model = publish_servable(store, number)
        record(store, number, model.ref)
        return model

    return publish


def record(store, number, ref):
    store.record(
        Execution(
            component="any",
            run_id=f"run {number}",
            state="complete",
            reason="first run",
            key="k" * 64,
            parts=KeyParts(component="any", inputs={}, params={}, code={}, libraries={}),
            inputs={},
            output=ref,
            started_at=datetime(2026, 1, number, tzinfo=UTC),
            seconds=1.0,
        )
    )


def damages(content: bytes, seed: int = 0):
    """Yield damaged versions of a file of lines: flipped bits, cut ends, lost and doubled lines, zeros, nothing."""
    chance = random.Random(seed)
    for _ in range(40):
        place, bit = chance.randrange(len(content)), chance.randrange(8)
        yield content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
    for _ in range(10):
        yield content[: chance.randrange(len(content))]
    lines = content.splitlines(keepends=True)
    for number in range(len(lines)):
        yield b"".join(lines[:number] + lines[number + 1 :])
    yield b"".join(lines[:1])
    yield bytes(len(content))
    yield b""


def expect_whole(registry, before):
    folder = registry.root / NAME
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    assert "versions: 2 " in (registry.root / "models.config").read_text()


FILES = ("history.jsonl", "history-copy.jsonl", "champion.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_repaired_from_the_others(registry, name):
    before = {file: (registry.root / NAME / file).read_bytes() for file in FILES}
    path = registry.root / NAME / name
    for damaged in [*damages(before[name]), None]:
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert registry.champion(NAME).version == 2  # before anything is repaired, too
        assert [entry.version for entry in registry.history(NAME)] == [1, 2, 3, 2]
        registry.recover()
        expect_whole(registry, before)
        kept = list((registry.root / NAME).glob("*.damaged-*"))
        whole = (
            damaged is None
            or split_lines(path.read_bytes(), path).valid == damaged.decode(errors="replace").splitlines()
        )
        assert [k.read_bytes() for k in kept] == ([] if name != "history.jsonl" or whole else [damaged])
        for k in kept:
            k.unlink()


def test_one_line_says_what_was_repaired_and_where_the_damaged_file_is(registry, caplog):
    path = registry.root / NAME / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:50] + b"\n" + lines[2] + lines[3])
    caplog.clear()
    registry.recover()
    (kept,) = path.parent.glob("*.damaged-*")
    assert [record.getMessage() for record in caplog.records] == [
        f"repaired the history of {NAME}: line 2 damaged, 1 restored; the damaged file is {kept.name}"
    ]


def test_whoever_pushes_or_rolls_back_repairs_first(registry, store, servable):
    path = registry.root / NAME / "history.jsonl"
    for change in (
        lambda: registry.push(servable(store, 4), "run 4", by="ann"),
        lambda: registry.rollback(store, NAME, 1, reason="worse", by="ann", run_id="another"),
    ):
        before = path.read_bytes()
        path.write_bytes(before[:-30])
        change()
        assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_without_the_copy_pushes_come_from_the_version_folders_and_records(registry, lost):
    folder = registry.root / NAME
    path = folder / "history.jsonl"
    before, lines = registry.history(NAME), path.read_bytes().splitlines(keepends=True)
    (folder / "history-copy.jsonl").unlink()
    path.write_bytes(b"".join(line if i not in lost else b"\0" * 99 + b"\n" for i, line in enumerate(lines)))
    registry.recover()
    after = registry.history(NAME)
    assert [(e.version, e.action, e.run_id, e.artifact) for e in after] == [
        (e.version, e.action, e.run_id, e.artifact) for e in before
    ]
    assert after[lost[0]].at.day == lost[0] + 1  # as the record says


@pytest.mark.parametrize("rest", [b"", b"\0" * 500, None])
def test_without_any_line_the_pointer_tells_the_champion(registry, rest):
    folder = registry.root / NAME
    for name in ("history.jsonl", "history-copy.jsonl"):
        (folder / name).unlink()
    if rest is not None:
        (folder / "history.jsonl").write_bytes(rest)
    registry.recover()
    assert [(e.version, e.action) for e in registry.history(NAME)] == [
        (1, "push"),
        (2, "push"),
        (3, "push"),
        (2, "rollback"),
    ]
    assert json.loads((folder / "champion.json").read_text()) == {"version": 2}


def test_a_folder_of_somebody_else_becomes_no_push(registry):
    folder = registry.root / NAME
    shutil.copytree(folder / "1", folder / "9")
    registry.recover()
    assert [entry.version for entry in registry.history(NAME)] == [1, 2, 3, 2]


def test_an_edited_line_without_a_checksum_counts(registry):
    path = registry.root / NAME / "history.jsonl"
    lines = path.read_text().splitlines()
    fields = json.loads(lines[3])
    del fields["sha256"]
    lines[3] = json.dumps({**fields, "reason": "much worse"})
    path.write_text("\n".join(lines) + "\n")
    registry.recover()
    assert [entry.reason for entry in registry.history(NAME)] == ["", "", "", "much worse"]


def test_a_damaged_record_is_left_out_and_its_step_alone_runs_again(toy_steps, store):
    from toy_steps.double import double
    from toy_steps.seed import seed

    def run(run_id):
        first = execute(store, seed, {}, seed.parse({}), run_id)
        return first.state, execute(store, double, {"number": first.output or ""}, double.parse({}), run_id).state

    run("run 1")
    (path,) = store.local.glob("executions/double/*/*.json")
    content = path.read_bytes()
    for damaged in itertools.islice(damages(content), 50):
        path.write_bytes(damaged)
        assert list(store.executions("double")) == [] or damaged.strip() == content.strip()
    assert run("run 2") == ("cached", "complete")


def test_records_of_earlier_releases_are_read(toy_steps, store):
    from toy_steps.seed import seed

    execute(store, seed, {}, seed.parse({}), "run 1")
    (path,) = store.local.glob("executions/seed/*/*.json")
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    assert execute(store, seed, {}, seed.parse({}), "run 2").state == "cached"
