"""The copy of the stack's own object store."""

from __future__ import annotations

import io
import tarfile
from typing import Any

from ridgeline import object_store


def test_what_was_saved_is_loaded_into_another_bucket(bucket: str, objects: Any) -> None:
    source, target = (object_store.open_url(url) for url in (bucket, f"{bucket}-copy"))
    target.fs.mkdir(target.path)
    content = {"store/artifacts/Model/1/weights": b"x" * 100, "serving/shoes/history.jsonl": b"line"}
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
