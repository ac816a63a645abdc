"""The watcher of a folder, with real folders and a dictionary in place of Airflow's asset state store."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

STILL = 0.1


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import watcher
    return watcher


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watcher: ModuleType) -> Path:
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(watcher, "WRITTEN_SECONDS", 0.0)
    images = tmp_path / "images"
    (images / "train" / "cat").mkdir(parents=True)
    (images / "train" / "cat" / "1.png").write_bytes(b"first")
    return images


class StateStore:
    """Airflow's asset state store, of one asset."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.broken = False

    async def aget(self, key: str, default: Any = None) -> Any:
        if self.broken:
            raise OSError("no connection")
        return self.values.get(key, default)

    async def aset(self, key: str, value: Any) -> None:
        if self.broken:
            raise OSError("no connection")
        self.values[key] = value


def contents(
    watcher: ModuleType, folder: Path | str, store: StateStore, *changes: Callable[[], Any], events: int
) -> list[str]:
    """Return the contents for which a new trigger fires; a change follows each event, and a pause the last one."""

    async def collect() -> list[str]:
        classpath, arguments = watcher.FolderTrigger("photos_source", str(folder), STILL).serialize()
        assert classpath == "ridgeline.airflow.watcher.FolderTrigger"
        trigger = watcher.FolderTrigger(**arguments)
        trigger.asset_state_store = store
        found: list[str] = []

        async def listen() -> None:
            todo = list(changes)
            async for event in trigger.run():
                found.append(event.payload["content"])
                if todo:
                    todo.pop(0)()

        task = asyncio.create_task(listen())
        for _ in range(600):
            await asyncio.sleep(0.05)
            if len(found) >= events:
                break
        await asyncio.sleep(10 * STILL)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return found

    return asyncio.run(collect())


def test_each_content_fires_once_and_a_touched_file_does_not(watcher: ModuleType, folder: Path) -> None:
    image, store = folder / "train" / "cat" / "1.png", StateStore()
    changes = (lambda: image.with_name("2.png").write_bytes(b"second"), lambda: image.touch())
    found = contents(watcher, folder, store, *changes, events=2)
    assert len(set(found)) == len(found) == 2
    assert store.values == {"last_content": found[-1]}
    assert image.read_bytes() == b"first"


def test_a_restart_fires_only_for_what_changed_meanwhile(watcher: ModuleType, folder: Path) -> None:
    store = StateStore()
    first = contents(watcher, folder, store, events=1)
    assert contents(watcher, folder, store, events=0) == []
    (folder / "train" / "cat" / "1.png").write_bytes(b"other")
    second = contents(watcher, folder, store, events=1)
    assert len(first) == len(second) == 1
    assert first != second
    (folder / "train" / "cat" / "1.png").write_bytes(b"first")
    assert contents(watcher, folder, store, events=1) == first  # the content is not that of the last event


def test_a_folder_that_changes_all_the_time_does_not_fire(
    watcher: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = watcher._fingerprint
    looks: list[str] = []

    def change_and_look(place: str) -> str:
        if len(looks) < 8:
            (folder / "train" / "cat" / f"{len(looks)}.png").write_bytes(b"more")
        looks.append(str(fingerprint(place)))
        return looks[-1]

    monkeypatch.setattr(watcher, "_fingerprint", change_and_look)
    found = contents(watcher, folder, StateStore(), events=1)
    assert found == [looks[-1]]
    assert len(set(looks)) == 8


def test_a_missing_folder_is_reported_once_and_watched_again_when_it_is_there(
    watcher: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    log = SimpleNamespace(info=lambda *_: None, warning=lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(watcher.FolderTrigger, "log", log)
    store = StateStore()
    away = tmp_path / "away"
    shutil.move(folder, away)
    assert contents(watcher, folder, store, events=0) == []
    assert len(warnings) == 1
    assert warnings[0].startswith(f"The watcher of photos_source can't read {folder}: Expected a folder")
    shutil.move(away, folder)
    assert len(contents(watcher, folder, store, events=1)) == 1


def test_an_event_is_remembered_once_the_store_can_be_reached_again(watcher: ModuleType, folder: Path) -> None:
    store = StateStore()

    store.broken = True
    assert contents(watcher, folder, store, events=0) == []
    store.broken = False
    found = contents(watcher, folder, store, lambda: setattr(store, "broken", True), events=1)
    assert len(found) == 1
    assert store.values == {}
    store.broken = False
    assert contents(watcher, folder, store, events=1) == found  # never lost, but repeated


def test_a_prefix_of_an_object_store_is_watched(watcher: ModuleType, folder: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/photos/train/cat/1.png", b"first")
    store = StateStore()
    change = lambda: files.pipe("/photos/train/cat/2.png", b"second")  # noqa: E731 - shorter
    found = contents(watcher, "memory://photos", store, change, events=2)
    assert len(set(found)) == 2
    assert contents(watcher, "memory://photos", store, events=0) == []


def test_a_prefix_of_a_bucket_in_s3_is_watched(watcher: ModuleType, folder: Path, bucket: str) -> None:
    from upath import UPath

    image, store = UPath(bucket) / "photos" / "train" / "cat" / "1.png", StateStore()
    image.write_bytes(b"first")
    (UPath(bucket) / "other.png").write_bytes(b"not below the prefix")
    changes = (lambda: image.write_bytes(b"other"), lambda: image.write_bytes(b"other"))
    found = contents(watcher, f"{bucket}/photos", store, *changes, events=2)
    assert len(set(found)) == len(found) == 2
    assert contents(watcher, f"{bucket}/photos", store, events=0) == []


def test_two_assets_of_one_folder_have_triggers_of_their_own(watcher: ModuleType) -> None:
    one, other = (watcher.watched_asset(name, "/data/photos") for name in ("photos_source", "other_source"))
    triggers = [asset.watchers[0].trigger for asset in (one, other)]
    hashes = {trigger.hash(*trigger.serialize()) for trigger in triggers}
    assert len(hashes) == 2
    assert triggers[0].still_seconds == 60
