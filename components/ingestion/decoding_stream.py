"""Decode files batch by batch: batches are decoded ahead in processes, and never more than a few are in memory."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np

from components.ingestion.decoding_worker import ANSWER, Kind, Task, decode_files
from ridgeline.component import Source, StepError, TransientStepError
from ridgeline.image_form import Form

FEW_FILES = 200  # take less time than a process takes to start, even if they are photos
BATCH_FILES = 128
BATCH_BYTES = 2**23  # of pixels
AHEAD = 4  # batches for each process, so that it has work while other batches are used, or a model is loaded


class Batch(NamedTuple):
    """The images of some files.

    Attributes:
        images: The readable ones in order, uint8 ``[n, h, w]`` or ``[n, h, w, c]``.
        errors: For each file, why it is unreadable; None for an image.
    """

    images: np.ndarray
    errors: list[str | None]


def batches_of(files: Sequence[str], shape: tuple[int, ...]) -> Iterator[Sequence[str]]:
    """Yield files in batches, always the same ones: fewer in a batch if images are large.

    Args:
        files: Their names.
        shape: The shape of an image.
    """
    size = max(1, min(BATCH_FILES, BATCH_BYTES // math.prod(shape)))
    return (files[start : start + size] for start in range(0, len(files), size))


class DecodingStream:
    """Decodes files of a folder, in processes of its own if there are many, which end with this one.

    Args:
        source: The folder as it was listed.
        form: The size and the colours of the images; the size is given.
        shape: The shape of an image in that form.
        num_files: About how many files will be decoded: processes start now, so as not to be waited for.
    """

    def __init__(self, source: Source, form: Form, shape: tuple[int, ...], num_files: int) -> None:
        self._source, self._shape = source, shape
        self._task = Task(source.name, source.location, form)
        count = min(os.cpu_count() or 1, -(-num_files // BATCH_FILES))
        self._num_processes = count if num_files >= FEW_FILES and count > 1 else 0
        self._processes: list[_Process] = []
        self._threads: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        try:
            for _ in range(self._num_processes):
                self._processes.append(_Process(self._task))
                self._idle.put(self._processes[-1])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)
        while self._processes:
            self._processes.pop().end()  # also what a thread waits for
        if self._threads:
            self._threads.shutdown()

    def decode(self, batches: Iterable[Sequence[str]]) -> Iterator[Batch]:
        """Return an iterator over the batches, in order. The first ones are decoded from now on.

        Args:
            batches: Names in the folder.

        Raises:
            TransientStepError: If a file was changed or removed since the folder was listed.
            RuntimeError: If a process fails.
        """
        contents = ({file: self._source.files[file] for file in batch} for batch in batches)
        if not self._processes:
            return map(self._decode_here, contents)
        self._threads = ThreadPoolExecutor(self._num_processes)
        submitted = (self._threads.submit(self._decode_there, content) for content in contents)
        return self._results(submitted, collections.deque(itertools.islice(submitted, AHEAD * self._num_processes)))

    def _results(self, submitted: Iterator[Future[Batch]], ahead: collections.deque[Future[Batch]]) -> Iterator[Batch]:
        while ahead:
            yield ahead.popleft().result()
            ahead += itertools.islice(submitted, 1)

    def _decode_here(self, contents: dict[str, str]) -> Batch:
        pixels = io.BytesIO()
        kinds, codes = decode_files(contents, self._task, pixels)
        return self._batch(pixels.getvalue(), kinds, codes)

    def _decode_there(self, contents: dict[str, str]) -> Batch:
        process = self._idle.get()
        try:
            return self._batch(*process.ask(contents))
        finally:
            self._idle.put(process)

    def _batch(self, pixels: bytes, kinds: Sequence[Sequence[object]], codes: Sequence[int]) -> Batch:
        errors = [None if shape else str(text) for shape, text in kinds]
        return Batch(np.frombuffer(pixels, np.uint8).reshape(-1, *self._shape), [errors[code] for code in codes])


class _Process:
    """A process that runs `decoding_worker.answer`."""

    def __init__(self, task: Task) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", ANSWER, task.text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def ask(self, contents: dict[str, str]) -> tuple[bytes, list[Kind], list[int]]:
        """Return the pixels of files, their kinds, and the place of each file's kind."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(contents).encode() + b"\n")
            self._process.stdin.flush()
            found = json.loads(self._process.stdout.readline() or "null")
        except (OSError, ValueError):  # it died, or was ended while it wrote
            found = None
        if found and len(found) == 2:
            raise (TransientStepError if found[0] == "TransientStepError" else StepError)(found[1])
        pixels = self._process.stdout.read(found[0]) if found else b""
        if not found or len(pixels) != found[0]:
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace").strip()
            raise RuntimeError(
                f"Expected decoded images; received exit status {self._process.wait()} of a process: {text[-2000:]}"
            )
        return pixels, found[1], found[2]

    def end(self) -> None:
        """Stop it; a thread that waits for its answer receives none."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
