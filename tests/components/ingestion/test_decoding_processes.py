from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.ingest import ingest
from components.ingestion import decoding_processes
from components.ingestion.decoding_processes import decode_files
from components.ingestion.params import Params
from ridgeline.component import Source, TransientStepError
from ridgeline.sources import read_sources


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Thirty images of three sizes, and two unreadable files."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (4 + number % 3, 5, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"ü {number:02}.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    params = ingest.parse({"dataset": "folder", "name": "shop", "image_dir": str(folder)})
    return read_sources(ingest, params, None)["image_dir"]


@pytest.mark.fresh_process
def test_processes_yield_what_one_process_yields(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, params = list(source.files), Params(dataset="folder", name="shop")
    expected = list(decode_files(source, files, params, tmp_path / "one"))
    assert not (tmp_path / "one").exists()
    monkeypatch.setattr(decoding_processes, "FEW_FILES", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    found = list(decode_files(source, files, params, tmp_path / "three"))
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == ["0", "1", "2"]
    assert [(None if i is None else (i.shape, i.tobytes()), kind) for i, kind in found] == [
        (None if i is None else (i.shape, i.tobytes()), kind) for i, kind in expected
    ]
    assert [kind for image, kind in found if image is None] == ["empty file", "no image in a known format"]


@pytest.mark.fresh_process
def test_a_file_that_changed_ends_all_processes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_processes, "FEW_FILES", 2)
    (Path(source.location) / "ü 29.png").write_bytes(b"other")
    with pytest.raises(TransientStepError, match="received another ü 29.png"):
        list(decode_files(source, list(source.files), Params(dataset="folder", name="shop"), tmp_path / "out"))
