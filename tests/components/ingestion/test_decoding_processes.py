from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.ingest import ingest
from components.ingestion import decoding_processes
from components.ingestion.decoding_processes import Decoded, Decoder
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


def decode(source: Source, scratch: Path, files: list[str] | None = None) -> Decoded:
    scratch.mkdir()
    files = list(source.files) if files is None else files
    with Decoder(source, Params(dataset="folder", name="shop"), scratch, len(files)) as decoder:
        return decoder.decode(files)


def in_processes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(decoding_processes, "FEW_FILES", 2)
    monkeypatch.setattr(decoding_processes, "MAX_JOB_FILES", 4)
    monkeypatch.setattr("os.cpu_count", lambda: number)


@pytest.mark.fresh_process
def test_processes_yield_what_one_process_yields(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode(source, tmp_path / "one")
    in_processes(monkeypatch, 3)
    found = decode(source, tmp_path / "three")
    assert len(list((tmp_path / "three").glob("*.errors"))) == 3
    assert not list((tmp_path / "three").glob("*.job"))  # each was taken
    kinds = [expected.kinds[code] for code in expected.codes]
    assert [found.kinds[code] for code in found.codes] == kinds
    assert collections.Counter(shape for shape, _ in kinds) == {(4, 5, 3): 10, (5, 5, 3): 10, (6, 5, 3): 10, None: 2}
    assert [text for shape, text in kinds if shape is None] == ["empty file", "no image in a known format"]
    assert found.images is None  # since they differ in size


@pytest.mark.fresh_process
@pytest.mark.parametrize("number", [1, 2])
def test_the_images_of_all_jobs_are_in_order(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    in_processes(monkeypatch, number)
    files = ["empty.png", *(f"ü {place:02}.png" for place in (27, 3, 9, 0, 12, 6, 15))]
    found = decode(source, tmp_path / "out", files)
    assert found.images is not None
    expected = [np.asarray(Image.open(Path(source.location) / file)) for file in files[1:]]
    assert np.array_equal(found.images.read(0, 100), expected)
    assert np.array_equal(found.images.read(2, 6), expected[2:6])
    assert [found.kinds[code][0] for code in found.codes] == [None, *[(4, 5, 3)] * 7]


@pytest.mark.fresh_process
@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_changed_ends_all_processes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    in_processes(monkeypatch, number)
    (Path(source.location) / "ü 29.png").write_bytes(b"other")
    with pytest.raises(TransientStepError, match="received another ü 29.png"):
        decode(source, tmp_path / "out")


@pytest.mark.fresh_process
def test_no_process_outlives_its_parent_or_the_block(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_processes(monkeypatch, 2)
    tmp_path.joinpath("out").mkdir()
    with Decoder(source, Params(dataset="folder", name="shop"), tmp_path / "out", 100) as decoder:
        first, second = decoder._processes
        assert first.stdin is not None
        first.stdin.close()  # as the system does when the parent is killed
        assert first.wait(60) == 0  # it had no work yet
        assert second.poll() is None
    assert second.poll() is not None


@pytest.mark.fresh_process
def test_a_process_that_dies_is_reported(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(monkeypatch, 2)
    monkeypatch.setattr(decoding_processes, "WORK", "raise MemoryError('no more')")
    with pytest.raises(RuntimeError, match="(?s)received exit status 1 of a process: .*MemoryError: no more"):
        decode(source, tmp_path / "out")


@pytest.mark.fresh_process
def test_a_process_starts_soon_since_it_imports_little() -> None:
    program = "import sys, components.ingestion.decoding_worker; print({'numpy', 'pydantic'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout == (
        "set()\n"
    )
