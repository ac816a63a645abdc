"""Decode many files in worker processes: Pillow's own code is Python, of which one thread runs at a time."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from components.ingestion.decoding import UnreadableImage, decode, quiet_pillow
from components.ingestion.params import Params
from ridgeline.component import Source, StepError, TransientStepError

log = logging.getLogger(__name__)

FEW_FILES = 2_000  # take less time than a process takes to start
PROGRESS_SECONDS = 5
WORK = "import sys; from components.ingestion.decoding_processes import work; work(sys.argv[1])"


def decode_files(
    source: Source, files: Sequence[str], params: Params, scratch: Path
) -> Generator[tuple[np.ndarray | None, str]]:
    """Decode files of a folder, in worker processes if there are many.

    Args:
        source: The folder as it was listed.
        files: Names in it.
        params: The wanted size and colours.
        scratch: An empty folder for unfinished work.

    Yields:
        For each file, in order: the image, uint8 ``[h, w]`` or ``[h, w, 3]``, and its kind; or None, and why it is
        unreadable.

    Raises:
        TransientStepError: If a file was changed or removed since the folder was listed.
        RuntimeError: If a worker fails.
    """
    num_workers = os.cpu_count() or 1
    if len(files) < FEW_FILES or num_workers == 1:
        with quiet_pillow():
            for file in files:
                yield _decode(source, file, params)
        return
    size = -(-len(files) // num_workers)
    with ExitStack() as stack:
        workers = []
        for number, start in enumerate(range(0, len(files), size)):
            part = {file: source.files[file] for file in files[start : start + size]}
            job = {"name": source.name, "location": source.location, "files": part}
            job["params"] = params.model_dump(mode="json")
            folder = scratch / str(number)
            folder.mkdir(parents=True)
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            workers.append((folder, stack.enter_context(_Worker(folder))))
        for folder, worker in workers:
            worker.wait()
            with (folder / "pixels").open("rb") as pixels, (folder / "results.jsonl").open(encoding="utf-8") as results:
                for shape, text in map(json.loads, results):
                    image = None if shape is None else np.frombuffer(pixels.read(int(np.prod(shape))), np.uint8)
                    yield (None if image is None else image.reshape(shape)), text


def _decode(source: Source, file: str, params: Params) -> tuple[np.ndarray | None, str]:
    content = source.read(file)
    try:
        return decode(content, params)
    except UnreadableImage as error:
        return None, str(error)


class _Worker:
    """A process that decodes the files of a job; it ends with this one, whose end closes its standard input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", WORK, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self) -> None:
        """Wait until it ends; log the progress."""
        while True:
            try:
                code = self.process.wait(PROGRESS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                decoded = self.folder / "pixels"
                size_bytes = decoded.stat().st_size if decoded.exists() else 0
                log.info("decoding: process %s wrote %d MB of pixels", self.folder.name, size_bytes >> 20)
        if code == 0:
            return
        text = (self.folder / "errors").read_text(encoding="utf-8", errors="replace").strip()
        last = self.folder / "error.json"
        if last.exists():
            kind, text = json.loads(last.read_text(encoding="utf-8"))
            raise (TransientStepError if kind == "TransientStepError" else StepError)(text)
        raise RuntimeError(f"Expected decoded images; received exit status {code} of a process: {text[-2000:]}")


def work(folder: str) -> None:
    """Decode the files of a job, in a process of its own.

    Args:
        folder: Holds ``job.json``; receives ``pixels``, all images one after another, and ``results.jsonl``.
    """
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    place = Path(folder)
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    source = Source(job["name"], job["location"], job["files"])
    params = Params.model_validate_json(json.dumps(job["params"]))
    try:
        with (
            (place / "pixels").open("wb") as pixels,
            (place / "results.jsonl").open("w", encoding="utf-8") as results,
            quiet_pillow(),
        ):
            for file in source.files:
                image, text = _decode(source, file, params)
                if image is not None:
                    pixels.write(np.ascontiguousarray(image).data)
                results.write(json.dumps([None if image is None else image.shape, text]) + "\n")
    except StepError as error:
        (place / "error.json").write_text(json.dumps([type(error).__name__, str(error)]), encoding="utf-8")
        sys.exit(1)


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(1)
