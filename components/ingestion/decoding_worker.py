"""Decode jobs, parts of a folder's files: in this process, or in one of its own, which imports little to start soon."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from ridgeline.image_decoding import UnreadableImage, decode, quiet_pillow, shape_of
from ridgeline.image_form import Form

REPORTED_FILES = 100
MAX_FILE_BYTES = 2**29  # as much memory may each process need besides the image; a film is no image
WORK = "import sys; from components.ingestion.decoding_worker import work; work(sys.argv[1])"
ANSWER = "import sys; from components.ingestion.decoding_worker import answer; answer(sys.argv[1])"

Kind = tuple[tuple[int, ...] | None, str]  # of images: shape, and what the file is; else None, and why it is unreadable


@dataclass(frozen=True)
class Task:
    """What all jobs have in common: the name and the location of the source, and what images become."""

    name: str
    location: str
    form: Form

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, path: Path) -> Task:
        """Return what `save` wrote."""
        return cls.parse(path.read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> Task:
        """Return what `text` returned."""
        fields = json.loads(text)
        form = fields.pop("form")
        size = form.pop("image_size")
        return cls(**fields, form=Form(**form, image_size=size and tuple(size)))

    def read(self, file: str, digest: str) -> bytes:
        """Return a file's content, as `Source.read` does.

        Raises:
            TransientStepError: If it was changed or removed since it was listed.
            UnreadableImage: If it has more than `MAX_FILE_BYTES`. Then it is not read.
        """
        if "://" in self.location:
            _expect_size(int(digest.rpartition(":")[2]))
        else:
            try:
                with io.FileIO(f"{self.location}/{file}") as opened:
                    _expect_size(os.fstat(opened.fileno()).st_size)
                    content = opened.readall()
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
            except FileNotFoundError:
                pass
        from ridgeline.component import Source  # of an object store, or with an error to explain

        return Source(self.name, self.location, {file: digest}).read(file)


def _expect_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise UnreadableImage(f"too large: {num_bytes / 2**20:,.0f} MiB, over {MAX_FILE_BYTES // 2**20} MiB")


def decode_files(
    contents: Mapping[str, str], task: Task, pixels: IO[bytes], report: bool = False
) -> tuple[list[Kind], list[int]]:
    """Decode files.

    Args:
        contents: The files, and the content of each as it was listed.
        task: Where they are, and what they become.
        pixels: Receives the images, one after another; if they have several shapes, only those with the first one's.
        report: Write a byte to the standard output for each `REPORTED_FILES`.

    Returns:
        The kinds of the files, and for each file its place among them.

    Raises:
        TransientStepError: If a file was changed or removed since.
    """
    kinds: dict[Kind, int] = {}
    codes: list[int] = []
    first = None
    with quiet_pillow():
        for file, digest in contents.items():
            try:
                content = task.read(file, digest)
                image, text = decode(content, task.form)
                shape = shape_of(image)
                key: Kind = (shape, text)
                first = first or shape
                if shape == first:  # else none of them can be used
                    pixels.write(image.tobytes())
            except UnreadableImage as error:
                key = (None, str(error))
            codes.append(kinds.setdefault(key, len(kinds)))
            if report and len(codes) % REPORTED_FILES == 0:
                os.write(1, b".")
    return list(kinds), codes


def run_job(job: Path, contents: Mapping[str, str], task: Task, report: bool = False) -> None:
    """Decode files into ``<job>.pixels``, one after another, and ``<job>.json``: their kinds, and each file's kind.

    Args:
        job: Path of the job, without a suffix.
        contents: As for `decode_files`.
        task: As for `decode_files`.
        report: As for `decode_files`.

    Raises:
        TransientStepError: If a file was changed or removed since.
    """
    with job.with_suffix(".pixels").open("wb", buffering=2**20) as pixels:
        found = decode_files(contents, task, pixels, report)
    job.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


def work(folder: str) -> None:
    """Do those jobs in a folder that no other process has taken, in a process of its own.

    Args:
        folder: Holds ``task.json`` and, once a byte comes from the standard input, jobs. If one fails because of the
            source, ``error.json`` says why.
    """
    if not os.read(0, 1):
        return
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    scratch = Path(folder)
    task = Task.load(scratch / "task.json")
    try:
        for job, contents in _take_jobs(scratch):
            run_job(job, contents, task, report=True)
    except ValueError as error:
        from ridgeline.component import StepError

        if not isinstance(error, StepError):
            raise
        unfinished = scratch / f"{os.getpid()}.error"
        unfinished.write_text(json.dumps([type(error).__name__, str(error)]), encoding="utf-8")
        unfinished.rename(scratch / "error.json")
        sys.exit(1)


def answer(text: str) -> None:
    """Decode the files that each line of the standard input names, in a process of its own; end with the input.

    The answer to a line, a JSON object of files and contents, is a JSON line on the standard output, followed by the
    pixels: the number of their bytes, the kinds of the files and the place of each file's kind. If the source changed,
    it is the name of the error and its text, and the process ends.

    Args:
        text: The task, as `Task.text` returns it.
    """
    task, output = Task.parse(text), sys.stdout.buffer
    for line in sys.stdin.buffer:
        pixels = io.BytesIO()
        try:
            kinds, codes = decode_files(json.loads(line), task, pixels)
        except ValueError as error:
            from ridgeline.component import StepError

            if not isinstance(error, StepError):
                raise
            output.write(json.dumps([type(error).__name__, str(error)]).encode() + b"\n")
            return
        output.write(json.dumps([len(pixels.getbuffer()), kinds, codes]).encode() + b"\n")
        output.write(pixels.getbuffer())
        output.flush()


def _take_jobs(scratch: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    for job in sorted(scratch.glob("*.job")):
        if (scratch / "error.json").exists():
            return
        taken = job.with_suffix(".taken")
        try:
            job.rename(taken)
        except FileNotFoundError:  # by another process
            continue
        yield job, json.loads(taken.read_text(encoding="utf-8"))


def _end_with_standard_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
