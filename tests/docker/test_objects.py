"""The copy of the stack's own object store."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest

from ridgeline import object_store


@pytest.mark.parametrize("small_bytes", [2**24, 10])
def test_what_was_saved_is_loaded_into_another_bucket(
    bucket: str, objects: Any, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(objects, "SMALL_BYTES", small_bytes)
    source, target = (object_store.open_url(url) for url in (bucket, f"{bucket}-copy"))
    target.fs.mkdir(target.path)
    content = {
        "store/artifacts/Model/1/weights": b"x" * 100,
        "serving/shoes/history.jsonl": b"line",
        "serving/keys/history.jsonl": b"a model with this name",
        "probe": b"",
    }
    for name, data in {**content, "store/scratch/key/state": b"half", "store/keys/key.json": b"host"}.items():
        object_store.write(source / name, data)
    archive = io.BytesIO()
    objects.save(source, archive)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as saved:
        assert sorted(saved.getnames()) == sorted(content)
    archive.seek(0)
    objects.load(target, archive)
    assert {name: (target / name).read_bytes() for name in object_store.sizes(target)} == content


def test_what_is_replaced_while_it_is_saved_is_whole(
    bucket: str, objects: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = object_store.open_url(bucket)
    history = source / "serving" / "shoes" / "history.jsonl"
    object_store.write(history, b"line 1")
    sizes = object_store.sizes

    def listed(folder: Any) -> dict[str, int]:
        found = sizes(folder)
        object_store.write(history, b"line 1, line 2")
        return found

    monkeypatch.setattr(object_store, "sizes", listed)
    archive = io.BytesIO()
    objects.save(source, archive)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as saved:
        assert (found := saved.extractfile("serving/shoes/history.jsonl"))
        assert found.read() == b"line 1, line 2"


def test_what_is_deleted_while_it_is_saved_is_an_error_or_left_out(
    bucket: str, objects: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = object_store.open_url(bucket)
    monkeypatch.setattr(objects, "SMALL_BYTES", 0)
    opened = objects._opened
    for before in (True, False):
        object_store.write(source / "store" / "large", b"x" * 100)

        def deleted(path: Any, size: int, before: bool = before) -> Any:
            file = None if before else opened(path, size)
            object_store.delete_object(path)
            return file or opened(path, size)

        monkeypatch.setattr(objects, "_opened", deleted)
        if before:
            objects.save(source, io.BytesIO())
        else:
            with pytest.raises(FileNotFoundError):
                objects.save(source, io.BytesIO())
