from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.infer import infer
from components.ingestion import decoding_stream, decoding_worker
from components.ingestion.decoding_stream import Batch, DecodingStream
from ridgeline.component import Source, TransientStepError
from ridgeline.image_decoding import decode
from ridgeline.image_form import Form
from ridgeline.sources import read_sources

FORM = Form((4, 5), color_mode="rgb")
SHAPE = (4, 5, 3)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Twenty images of several sizes and modes, and two unreadable files."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (4 + number % 3, 5, 3), np.uint8)
        mode = ("RGB", "L", "CMYK", "P")[number % 4]
        Image.fromarray(pixels).convert(mode).save(folder / f"ü {number:02}.tiff")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    return read_sources(infer, infer.parse({"folder": str(folder)}), None)["images"]


def batches(source: Source, size: int = 4) -> list[list[str]]:
    files = list(source.files)
    return [files[start : start + size] for start in range(0, len(files), size)]


def in_processes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(decoding_stream, "FEW_FILES", 2)
    monkeypatch.setattr(decoding_stream, "BATCH_FILES", 4)
    monkeypatch.setattr("os.cpu_count", lambda: number)


def decoded(source: Source, files: list[list[str]]) -> list[Batch]:
    with DecodingStream(source, FORM, SHAPE, sum(map(len, files))) as stream:
        return list(stream.decode(files))


def test_batches_have_the_images_and_the_reasons_of_unreadable_files(source: Source) -> None:
    found = decoded(source, batches(source))
    errors = [error for batch in found for error in batch.errors]
    assert [error for error in errors if error] == ["empty file", "no image in a known format"]
    names = [name for name, error in zip(source.files, errors, strict=True) if error is None]
    images = np.concatenate([batch.images for batch in found])
    assert images.shape == (20, *SHAPE)
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(image, np.asarray(decode(source.read(name), FORM)[0]))


@pytest.mark.fresh_process
def test_processes_yield_what_this_process_yields(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decoded(source, batches(source))
    in_processes(monkeypatch, 3)
    found = decoded(source, batches(source))
    assert [batch.errors for batch in found] == [batch.errors for batch in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize("where", ["folder", "object store"])
def test_a_file_of_many_bytes_is_unreadable_and_is_not_read(tmp_path: Path, bucket: str, where: str) -> None:
    location = str(tmp_path) if where == "folder" else bucket
    size = decoding_worker.MAX_FILE_BYTES + 2**20
    if where == "folder":
        with (tmp_path / "film.mp4").open("wb") as film:
            film.truncate(size)
    films = Source("images", location, {"film.mp4": f"0:{size}"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (batch,) = decoded(films, [["film.mp4"]])
    assert batch.errors == ["too large: 513 MiB, over 512 MiB"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.fresh_process
def test_few_batches_are_decoded_ahead(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(monkeypatch, 2)
    taken: list[int] = []
    with DecodingStream(source, FORM, SHAPE, 22) as stream:
        found = stream.decode(taken.append(number) or batch for number, batch in enumerate(batches(source, 1)))  # type: ignore[func-returns-value]
        next(found)
        time.sleep(0.5)
        assert len(taken) == 2 * decoding_stream.AHEAD


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.fresh_process)])
def test_a_file_that_changed_since_the_listing_is_named(
    source: Source, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    if processes:
        in_processes(monkeypatch, processes)
    Path(source.location, "ü 07.tiff").write_bytes(b"other")
    with pytest.raises(TransientStepError, match=r"received another ü 07\.tiff"):
        decoded(source, batches(source))


@pytest.mark.fresh_process
def test_the_death_of_a_process_is_an_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(monkeypatch, 2)
    with DecodingStream(source, FORM, SHAPE, 22) as stream:
        for process in stream._processes:
            process._process.kill()
        with pytest.raises(RuntimeError, match="exit status -9"):
            list(stream.decode(batches(source)))


@pytest.mark.fresh_process
def test_processes_end_with_the_one_that_started_them(source: Source) -> None:
    program = (
        "import sys, time\n"
        "from components.ingestion.decoding_stream import DecodingStream\n"
        "from ridgeline.component import Source\n"
        "from ridgeline.image_decoding import Form\n"
        "stream = DecodingStream(Source('images', sys.argv[1], {}), Form((4, 5)), (4, 5, 3), 10_000).__enter__()\n"
        "print(*(process._process.pid for process in stream._processes), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, source.location], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == os.cpu_count()
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").exists() else True
    )
