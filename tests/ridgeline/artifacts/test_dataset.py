from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ridgeline.artifacts import dataset
from ridgeline.artifacts.dataset import FILES, Dataset, DatasetFacts, write_dataset_split, write_files

NAMES = ['a"], ["b', 'x"], [', "ü/[x], .jpg", "two\nlines", "back\\slash", "} ]"]


@pytest.mark.parametrize("batch_size", [1, 2, 1_000])
def test_files_are_json_and_can_be_read_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(dataset, "BATCH_SIZE", batch_size)
    files = {
        "test": [("last", "00", "PNG L 1×1")],
        "none": [],
        "train": [(name, f"{name}:7", "JPEG") for name in NAMES],
    }
    write_files(tmp_path / FILES, files)
    text = (tmp_path / FILES).read_text(encoding="utf-8")
    assert json.loads(text) == {split: [list(entry) for entry in listed] for split, listed in files.items()}
    assert '\n["last", "00", "PNG L 1×1"]\n' in text
    splits = {}
    for name in ("train", "test"):
        batch = (np.zeros((2, 1, 1), np.uint8), np.arange(2))
        splits[name] = write_dataset_split(tmp_path / name, [batch], 2, (1, 1), 2)
    facts = DatasetFacts(
        name="x:folder", image_shape=(1, 1), class_names=("a", "b"), splits=splits, raw_files={}, synthetic=False
    )
    sealed = Dataset.seal(tmp_path, facts)
    assert list(sealed.each_file()) == [(split, *entry) for split, listed in files.items() for entry in listed]
    assert sealed.files() == json.loads(text)
    (tmp_path / FILES).unlink()
    assert list(sealed.each_file()) == []
