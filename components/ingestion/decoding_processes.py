"""Decode many files in worker processes: Pillow's own code is Python, of which one thread runs at a time."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from components.ingestion.decoding_worker import REPORTED_FILES, WORK, Kind, Task, run_job
from components.ingestion.params import Params
from ridgeline.artifacts.examples import ImageRows
from ridgeline.component import Source, StepError, TransientStepError

log = logging.getLogger(__name__)

FEW_FILES = 2_000  # take less time than a process takes to start
MAX_JOB_FILES = 1_000
JOBS_PER_PROCESS = 8  # so that all of them end at about the same time
PROGRESS_SECONDS = 5


@dataclass(frozen=True)
class Decoded:
    """What files became.

    Attributes:
        kinds: The shape of images, and what their files are, such as ``JPEG RGB 32×32``; or None, and why files are
            unreadable.
        codes: For each file, in order, its place in `kinds`, int64 ``[n]``.
        images: The readable images, in order; None if there are none, or if they have several shapes.
    """

    kinds: list[Kind]
    codes: np.ndarray
    images: ImageRows | None


class Decoder:
    """Decodes files of a folder, in processes of its own if there are many, which end with this one.

    Args:
        source: The folder as it was listed.
        params: The wanted size and colours.
        scratch: An empty folder for unfinished work.
        num_files: About how many files will be decoded: processes start now, so as not to be waited for.
    """

    def __init__(self, source: Source, params: Params, scratch: Path, num_files: int) -> None:
        self._source, self._scratch = source, scratch
        self._task = Task(source.name, source.location, params.form)
        cores = os.cpu_count() or 1
        self._num_processes = cores if num_files >= FEW_FILES and cores > 1 else 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        if not self._num_processes:
            return self
        self._task.save(self._scratch / "task.json")
        self._done, written = os.pipe()  # all processes write to it; it ends with the last one
        try:
            for number in range(self._num_processes):
                with (self._scratch / f"{number}.errors").open("wb") as errors:
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-c", WORK, str(self._scratch)],
                        stdin=subprocess.PIPE,
                        stdout=written,
                        stderr=errors,
                    )
                self._processes.append(process)
        except BaseException:
            self.__exit__()
            raise
        finally:
            os.close(written)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        if self._num_processes:
            os.close(self._done)

    def decode(self, files: Sequence[str]) -> Decoded:
        """Decode files; once for each decoder.

        Args:
            files: Names in the folder.

        Raises:
            TransientStepError: If a file was changed or removed since the folder was listed.
            RuntimeError: If a process fails.
        """
        size = max(1, min(MAX_JOB_FILES, -(-len(files) // (JOBS_PER_PROCESS * max(1, self._num_processes)))))
        jobs: list[Path] = []
        for start in range(0, len(files), size):
            jobs.append(self._scratch / f"{len(jobs):06}")
            part = {file: self._source.files[file] for file in files[start : start + size]}
            if self._num_processes:
                jobs[-1].with_suffix(".job").write_text(json.dumps(part), encoding="utf-8")
            else:
                run_job(jobs[-1], part, self._task)
        if self._num_processes:
            self._wait(len(files))
        return collect(jobs)

    def _wait(self, num_files: int) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died: see below
                process.stdin.write(b"\n")
                process.stdin.flush()
        done, logged = 0, time.monotonic()
        while reports := os.read(self._done, 2**16):
            done += len(reports) * REPORTED_FILES
            if time.monotonic() - logged >= PROGRESS_SECONDS:
                logged = time.monotonic()
                log.info("decoding: %d of %d files", min(done, num_files), num_files)
        codes = [process.wait() for process in self._processes]
        if (last := self._scratch / "error.json").exists():
            raise_error_of(last.read_text(encoding="utf-8"))
        for number, code in enumerate(codes):
            if code:
                text = (self._scratch / f"{number}.errors").read_text(encoding="utf-8", errors="replace").strip()
                raise RuntimeError(f"Expected decoded images; received exit status {code} of a process: {text[-2000:]}")


def raise_error_of(text: str) -> None:
    """Raise the error that a job met.

    Args:
        text: The name of its type and its text, as JSON.
    """
    kind, message = json.loads(text)
    raise (TransientStepError if kind == "TransientStepError" else StepError)(message)


def collect(jobs: list[Path]) -> Decoded:
    """Return what jobs left, as one.

    Args:
        jobs: Paths of the jobs in the order of their files, as for `run_job`.
    """
    kinds: dict[Kind, int] = {}
    codes, parts = [np.empty(0, np.int64)], []
    for job in jobs:
        found, places = json.loads(job.with_suffix(".json").read_text(encoding="utf-8"))
        keys: list[Kind] = [(shape and tuple(shape), text) for shape, text in found]
        codes.append(np.array([kinds.setdefault(key, len(kinds)) for key in keys], np.int64)[places])
        num_images = sum(keys[place][0] is not None for place in places)
        parts.append((job.with_suffix(".pixels"), 0, num_images))
    shapes = {shape for shape, _ in kinds if shape is not None}
    images = ImageRows(parts, next(iter(shapes))) if len(shapes) == 1 else None
    return Decoded(list(kinds), np.concatenate(codes), images)
