"""Apache Beam: the engine that its options name, and the decoding of a folder's files by that engine's workers.

What Beam decodes is what `decoding_processes` decodes, byte for byte: both run the same jobs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from components.ingestion.decoding_processes import MAX_JOB_FILES, Decoded, collect, raise_error_of
from components.ingestion.decoding_worker import Task, run_job
from components.ingestion.params import Params
from ridgeline.component import Source, StepError, TransientStepError

log = logging.getLogger(__name__)

OPTIONS = "ingest.beam_pipeline_options"
JOBS = 256  # at least, of `MIN_JOB_FILES` or more: a worker takes several, so that none is long without work
MIN_JOB_FILES = 50
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az")  # have no folders; to make one could make a bucket
DIRECT_RUNNERS = ("direct", "directrunner")
ERROR = "error.json"
# A worker of the direct runner, which ends with the process that holds the other end of its standard input.
WORKER = """
import logging, os, sys, threading
logging.basicConfig(level=logging.ERROR)  # until Beam sets the level that its options name
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
from apache_beam.runners.worker.sdk_worker_main import main
main(sys.argv)
"""


class BeamError(StepError):
    """Beam is missing, or its options can't be used."""


@dataclass(frozen=True)
class Engine:
    """What runs a Beam pipeline.

    Attributes:
        options: Beam's ``PipelineOptions``.
        runner: Beam's runner, or its name.
        shared: A folder or URL that all workers see, of the option ``--temp_location``; None if none is given.
    """

    options: Any
    runner: Any
    shared: str | None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep what Beam's direct runner starts to itself, and let Beam log errors alone.

        By itself, the runner listens on all interfaces without a password. It also waits forever if one of its
        workers dies, or if the run is interrupted while a worker is busy.

        Raises:
            TransientStepError: If a worker dies.
        """
        from apache_beam.runners.portability import local_job_service
        from apache_beam.runners.portability.fn_api_runner import worker_handlers

        grpc, logger = worker_handlers.grpc, logging.getLogger("apache_beam")
        make_server, level, hook = grpc.server, logger.level, threading.excepthook
        handler = worker_handlers.SubprocessSdkWorkerHandler
        stop, interrupted = handler.stop_worker, False
        workers: list[subprocess.Popen[bytes]] = []
        deaths: list[str] = []

        def local_server(*args: Any, **kwargs: Any) -> Any:
            server = make_server(*args, **kwargs)
            listen = server.add_insecure_port
            server.add_insecure_port = lambda address: listen(address.replace("[::]", "127.0.0.1"))
            return server

        def start_worker(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
            # A session of its own: Ctrl-C interrupts the run, not a worker, whose death would be another error.
            options = {**kwargs, "stdin": subprocess.PIPE, "start_new_session": True}
            workers.append(subprocess.Popen(*args, **options))
            return workers[-1]

        def stop_worker(self: Any) -> None:
            nonlocal interrupted
            if interrupted := sys.exc_info()[0] is not None:  # Beam waits until the worker ends by itself
                for worker in workers:
                    worker.kill()
            stop(self)

        def note_death(failed: threading.ExceptHookArgs) -> None:
            if not str(failed.exc_value).startswith("Worker subprocess exited"):
                hook(failed)
            elif not deaths and not interrupted:
                deaths.append(str(failed.exc_value))
                for worker in workers:
                    worker.kill()
                if (main := threading.main_thread().ident) is not None:
                    signal.pthread_kill(main, signal.SIGINT)

        try:
            logger.setLevel(logging.ERROR)
            if not isinstance(self.runner, str):
                grpc.server = local_server
                local_job_service.subprocess = SimpleNamespace(Popen=start_worker)
                handler.stop_worker = stop_worker
                if threading.current_thread() is threading.main_thread():
                    threading.excepthook = note_death
            yield
        except KeyboardInterrupt:
            if not deaths:
                raise
            raise TransientStepError(
                f"Expected Beam's workers to work to the end; received: {deaths[0]}. -9 means that it was killed, "
                f"perhaps for lack of memory: lower --direct_num_workers in {OPTIONS}."
            ) from None
        finally:
            for worker in workers:
                if worker.stdin:
                    worker.stdin.close()
            threading.excepthook = hook
            local_job_service.subprocess = subprocess
            handler.stop_worker = stop
            grpc.server = make_server
            logger.setLevel(level)

    @contextmanager
    def shared_folder(self, scratch: Path) -> Iterator[Any]:
        """Create a folder for one pipeline, as a path or a `universal_pathlib` path; it is deleted at the end.

        Args:
            scratch: Where it is created if no shared place is given.

        Raises:
            BeamError: If it can't be written.
        """
        from upath import UPath

        folder = UPath(self.shared or scratch) / f"ridgeline-{uuid.uuid4().hex}"
        try:
            if folder.protocol not in OBJECT_STORES:
                folder.mkdir(parents=True)
            (folder / "began").write_bytes(b"")
        except OSError as error:
            raise BeamError(
                f"Expected in --temp_location of {OPTIONS} a place where this machine can write; received "
                f"{self.shared or scratch}: {error}. Correct it, or its credentials."
            ) from error
        try:
            yield folder
        finally:
            with contextlib.suppress(FileNotFoundError):  # an object store has no empty folders
                folder.fs.rm(folder.path, recursive=True)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let tfds, which does not delete its temporary folders, and Beam, which may be killed, make them in a folder.

    Args:
        folder: A folder that is deleted, also after a kill.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def engine(params: Params) -> Engine:
    """Return the engine of the option ``ingest.beam_pipeline_options``; without options, Beam's direct runner.

    Args:
        params: The parameters of `ingest`.

    Raises:
        BeamError: If Beam is not installed, it does not know an option, or it can't use a value or the runner.
    """
    try:
        with _without_warnings_in_log():  # about parts of Google's cloud that are not installed
            import apache_beam  # noqa: F401
    except ImportError:
        raise BeamError(
            f"Expected Apache Beam, for {OPTIONS} or for a dataset that needs it; received an installation without it. "
            "Install the extra: pip install --constraint constraints.txt 'ridgeline[beam]'."
        ) from None
    from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions, WorkerOptions

    words, complaint = list(params.beam_pipeline_options), io.StringIO()
    options = PipelineOptions(words)
    try:
        with redirect_stderr(complaint), _without_warnings_in_log():  # about unknown options: see below
            known = options.get_all_options()
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        raise BeamError(
            f"Expected options of Beam in {OPTIONS}; received one that it can't use: "
            f"{complaint.getvalue().strip().rpartition('error: ')[2]}. Correct it."
        ) from None
    name = options.view_as(StandardOptions).runner or "DirectRunner"
    is_direct = name.lower() in DIRECT_RUNNERS
    if is_direct and (unknown := sorted(given.keys() - known.keys())):  # another runner may know more options
        raise BeamError(
            f"Expected options of Beam in {OPTIONS}; received --{', --'.join(unknown)}, which it does not know. "
            "Correct or remove them."
        )
    harness = options.view_as(WorkerOptions)
    harness.default_sdk_harness_log_level = harness.default_sdk_harness_log_level or "ERROR"
    runner = _direct_runner(options) if is_direct else _expect_runner(name)
    return Engine(options, runner, options.view_as(GoogleCloudOptions).temp_location)


@contextmanager
def _without_warnings_in_log() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _direct_runner(options: Any) -> Any:
    """Return the runner that Beam's DirectRunner chooses, without a try to download another one, Prism."""
    from apache_beam.options.pipeline_options import DirectOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    environment, direct = None, options.view_as(DirectOptions)
    if direct.direct_running_mode == "multi_processing":  # as it would be, but with no code of the working directory
        command = f"exec {shlex.join([sys.executable, '-P', '-c', WORKER])}"
        environment, direct.direct_running_mode = SubprocessSDKEnvironment.from_command_string(command), "in_memory"
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(environment, provision_info=fn_runner.ExtendedProvisionInfo(provision))


def _expect_runner(name: str) -> str:
    from apache_beam.runners import create_runner

    try:
        create_runner(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BeamError(f"Expected a runner of Beam in {OPTIONS}; received {name}: {error}. Correct it.") from None
    return name


class BeamDecoder:
    """Decodes files of a folder with Beam; has the methods of `Decoder`.

    Workers read jobs from a shared folder and write what the files became into it. Beam itself passes numbers alone.

    Args:
        source: The folder as it was listed; workers open it by the same path or URL.
        params: The wanted size and colours, and Beam's options.
        scratch: An empty folder for unfinished work.
    """

    def __init__(self, source: Source, params: Params, scratch: Path) -> None:
        self._source, self._scratch = source, scratch
        self._task = Task(source.name, source.location, params.form)
        self._engine = engine(params)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def decode(self, files: Sequence[str]) -> Decoded:
        """Decode files, as `Decoder.decode` does.

        Args:
            files: Names in the folder.

        Raises:
            TransientStepError: If a file was changed or removed since the folder was listed.
            BeamError: If there are no results where they are expected.
        """
        import apache_beam as beam

        size = max(MIN_JOB_FILES, min(MAX_JOB_FILES, -(-len(files) // JOBS)))
        starts = range(0, len(files), size)
        with self._engine.shared_folder(self._scratch) as folder, self._engine.running():
            for number, start in enumerate(starts):
                part = {file: self._source.files[file] for file in files[start : start + size]}
                (folder / f"{number:06}.job").write_text(json.dumps(part), encoding="utf-8")
            log.info("decoding %d files in %d jobs with Beam", len(files), len(starts))
            with (
                temporary_files_in(self._scratch),
                beam.Pipeline(runner=self._engine.runner, options=self._engine.options) as pipeline,
            ):
                _ = (
                    pipeline
                    | beam.Create(range(len(starts)))
                    | beam.Reshuffle()
                    | beam.Map(_do_job, str(folder), self._task.text())
                )
            if (folder / ERROR).exists():
                raise_error_of((folder / ERROR).read_text(encoding="utf-8"))
            return collect([self._fetch(folder, f"{number:06}") for number in range(len(starts))])

    def _fetch(self, folder: Any, name: str) -> Path:
        """Move the result of a job here."""
        job = self._scratch / name
        try:
            for suffix in (".json", ".pixels"):
                result = folder / f"{name}{suffix}"
                if "://" in str(folder):
                    folder.fs.get_file(result.path, str(job.with_suffix(suffix)))
                    result.unlink()
                else:
                    Path(str(result)).rename(job.with_suffix(suffix))
        except FileNotFoundError:
            raise BeamError(
                f"Expected what Beam's workers wrote in {folder}; received no {name}{suffix}. Workers on other "
                f"machines need a folder or URL that they share with this one: add --temp_location to {OPTIONS}."
            ) from None
        return job


def _do_job(number: int, folder: str, text: str) -> None:
    """Decode the files of a job, on a worker; a problem of the source becomes a file, so that Beam does not retry."""
    from upath import UPath

    shared, name, task = UPath(folder), f"{number:06}", Task.parse(text)
    if (shared / ERROR).exists():
        return
    contents = json.loads((shared / f"{name}.job").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=None if "://" in folder else folder) as own:
        try:
            run_job(Path(own) / name, contents, task)
        except StepError as error:
            (Path(own) / ERROR).write_text(json.dumps([type(error).__name__, str(error)]), encoding="utf-8")
        for file in Path(own).iterdir():  # whole, even if Beam runs a job twice at a time
            if "://" in folder:
                shared.fs.put_file(str(file), (shared / file.name).path)
            else:
                file.rename(Path(folder) / file.name)
