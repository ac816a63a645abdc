"""A store and a registry that version 0.1.0 wrote, see tests/fixtures/README.md, in today's hands."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest

from ridgeline import files, pipeline
from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.gc import collect_garbage
from ridgeline.lineage import lineage
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from ridgeline.store import StoreError

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "store-0.1.tar.xz"
NAME = "synthetic_garments"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    return Settings(store=str(tmp_path / "store"), manual_dir=None)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def another_model(settings: Settings, folder: Path) -> PushedModel:
    """A servable model that was judged against the present champion."""
    store, registry = settings.open_store(), settings.open_registry()
    champion = registry.champion(NAME)
    assert champion is not None
    old = store.open(champion.artifact, PushedModel)
    shutil.copytree(old.path, folder)
    (folder / "manifest.json").unlink()
    (folder / "saved_model" / "assets" / "other.txt").parent.mkdir(exist_ok=True)
    (folder / "saved_model" / "assets" / "other.txt").write_text("another model")
    facts = {"model_digest": f"{7:064x}", "accuracy": 0.7, "champion": champion.model_digest}
    ref = store.publish(PushedModel.seal(folder, old.facts.model_copy(update=facts)))
    return store.open(ref, PushedModel)


def test_records_are_read_and_none_is_left_out(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    records = list(settings.open_store().executions())
    assert len(records) == 11
    assert caplog.records == []
    states = {(record.run_id, record.component): record.state for record in records}
    assert states["first", "export"] == states["second", "export"] == "complete"
    assert (states["second", "ingest"], states["failed", "ingest"]) == ("cached", "failed")
    assert [record.run_id for record in records][::-1] == sorted(
        (record.run_id for record in records), key=["first", "second", "failed"].index
    )
    assert set(pipeline.run_records(settings, "second")) == {
        "ingest",
        "transform",
        "train",
        "evaluate",
        "export",
    }


def test_every_artifact_is_read_and_whole(settings: Settings) -> None:
    store, types = settings.open_store(), pipeline.output_types()
    refs = store.refs()
    assert {ref.split("/")[0] for ref in refs} == {"Dataset", "Examples", "Model", "ModelEvaluation", "PushedModel"}
    for ref in refs:
        assert store.open(ref, types[ref.split("/")[0]]).ref == ref


def test_the_lineage_goes_back_to_the_dataset(settings: Settings) -> None:
    champion = settings.open_registry().champion(NAME)
    assert champion is not None
    found = [origin for _, origin, _ in lineage(settings.open_store(), champion.artifact).walk()]
    assert {origin.ref.split("/")[0] for origin in found} >= {"Model", "Examples", "Dataset"}
    assert all(origin.execution and origin.execution.run_id == "first" for origin in found)


def test_the_history_and_the_champion_are_read(settings: Settings) -> None:
    registry = settings.open_registry()
    found = [(entry.action, entry.version, entry.run_id, entry.reason, entry.by) for entry in registry.history(NAME)]
    assert found == [
        ("push", 1, "first", "", "ann"),
        ("push", 2, "second", "", "ann"),
        ("rollback", 1, "back", "worse in production", "bob"),
    ]
    assert registry.versions(NAME) == [1, 2]
    assert registry.verify(settings.open_store(), NAME).version == 1
    assert registry.verify(settings.open_store(), NAME, 2).version == 2


def test_clean_up_counts_what_the_served_versions_need_and_a_dry_run_changes_nothing(settings: Settings) -> None:
    store, registry = settings.open_store(), settings.open_registry()
    before = content(store.local)
    garbage = collect_garbage(store, registry, keep_runs=1, dry_run=True)
    assert (garbage.artifacts, garbage.scratch) == ({}, {})
    assert content(store.local) == before
    collect_garbage(store, registry, keep_runs=1, dry_run=False)
    registry.verify(store, NAME, 1)
    registry.verify(store, NAME, 2)


def test_a_rollback_and_a_push_keep_the_old_entries(settings: Settings, tmp_path: Path) -> None:
    store, registry = settings.open_store(), settings.open_registry()
    old = registry.history(NAME)
    registry.rollback(store, NAME, 2, reason="was better", by="eve", run_id="again")
    pushed = registry.push(another_model(settings, tmp_path / "model"), "third", "ann")
    assert (pushed.version, pushed.new) == (3, True)
    history = settings.open_registry().history(NAME)
    assert history[:3] == old
    assert [(entry.action, entry.version) for entry in history[3:]] == [("rollback", 2), ("push", 3)]
    assert json.loads((registry.root / NAME / "champion.json").read_text()) == {"version": 3}


def test_a_run_names_what_changed_since(settings: Settings) -> None:
    values = {
        "ingest.dataset": "synthetic_garments:1.0.0",
        "transform.validation_examples": 200,
        "train.mlp.hidden_units": [4],
    }
    steps = pipeline.plan("train")
    reasons = dict(pipeline.explain(settings, steps, pipeline.parse_params(steps, values, settings)))
    assert reasons["ingest"].startswith("runs: ")
    assert "code of components/ingest.py changed" in reasons["ingest"]


# --- a newer schema is refused by name


def with_newer_schema(path: Path) -> bytes:
    """Raise the schema version that a file's JSON objects state, with their checksums; return the new content."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    objects = [{**json.loads(files.unsign(line)), "schema_version": 99} for line in lines]
    path.write_text("".join(f"{files.sign(json.dumps(found))}\n" for found in objects), encoding="utf-8")
    return path.read_bytes()


def test_a_newer_artifact_is_refused_by_name(settings: Settings) -> None:
    store = settings.open_store()
    ref = store.find("Examples")
    with_newer_schema(store.path(ref) / "manifest.json")
    with pytest.raises(ArtifactError, match=r"Expected schema version 1 in .*manifest\.json; received 99"):
        store.open(ref, pipeline.output_types()["Examples"])


def test_a_newer_record_is_refused_by_name_and_stays(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    store = settings.open_store()
    path = next(store.local.glob("executions/train/**/*.json"))
    content = with_newer_schema(path)
    with caplog.at_level(logging.WARNING):
        assert len(list(settings.open_store().executions())) == 10
    assert any(path.name in text and "newer version of Ridgeline" in text for text in caplog.messages)
    collect_garbage(settings.open_store(), settings.open_registry(), keep_runs=1, dry_run=False)
    (moved,) = store.local.glob(f"executions/train/*/{path.name}")
    assert moved.read_bytes() == content


def test_a_newer_history_is_refused_by_name_and_stays(settings: Settings, tmp_path: Path) -> None:
    registry, store = settings.open_registry(), settings.open_store()
    path = registry.root / NAME / "history.jsonl"
    model = another_model(settings, tmp_path / "model")
    content = with_newer_schema(path)
    with pytest.raises((StoreError, RegistryError), match=r"history\.jsonl.*newer version of Ridgeline"):
        registry.history(NAME)
    with pytest.raises((StoreError, RegistryError), match="newer version of Ridgeline"):
        registry.push(model, "third", "ann")
    with pytest.raises((StoreError, RegistryError), match="newer version of Ridgeline"):
        registry.rollback(store, NAME, 2, reason="why", by="bob", run_id="again")
    with pytest.raises((StoreError, RegistryError), match="newer version of Ridgeline"):
        collect_garbage(store, registry, keep_runs=1, dry_run=False)
    assert path.read_bytes() == content
