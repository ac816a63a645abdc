"""Ingest on Apache Beam."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from components.ingest import ingest
from components.ingestion.beam import BeamError, engine
from components.ingestion.params import Params
from ridgeline.artifacts.dataset import Dataset
from ridgeline.component import ParameterError, Source, TransientStepError
from ridgeline.keys import key_parts, reachable_code
from ridgeline.sources import read_sources

needs_beam = pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs the extra beam")
pytestmark = pytest.mark.filterwarnings("default:::apache_beam", "default:::google")
WORKERS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")

WORKER = "apache_beam.runners.worker.sdk_worker_main"
# Beam's own server for portable pipelines, which stands for a cluster's.
JOB_SERVER = """
import sys
from apache_beam.runners.portability.local_job_service import LocalJobServicer
from components.ingestion.beam import engine
from components.ingestion.params import Params
with engine(Params()).running():
    server = LocalJobServicer(sys.argv[1])
    print(server.start_grpc_server(), flush=True)
    sys.stdin.read()
    server.stop()
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred images of two sizes in three classes, and a file that is none."""
    folder = tmp_path_factory.mktemp("beam") / "shop"
    for name in ("Bag", "Boot", "Übergröße [XL]"):
        (folder / name).mkdir(parents=True)
        for number in range(100):
            size = (6, 5) if number % 3 else (9, 9)
            pixels = np.random.default_rng([len(name), number]).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    (folder / "Bag" / "none.png").write_text("no image", encoding="utf-8")
    return folder


VALUES = {"dataset": "folder", "name": "shop", "image_size": [6, 5], "max_unreadable_share": 0.1}


def run(folder: Path | str, output: Path, *options: str) -> Dataset:
    output.mkdir()
    params = ingest.parse({**VALUES, "image_dir": str(folder), "beam_pipeline_options": list(options)})
    sources = read_sources(ingest, params, None)
    return ingest(params=params, output=output, sources=sources)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def in_process(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return run(shop, tmp_path_factory.mktemp("in-process") / "out")


@needs_beam
@pytest.mark.parametrize("options", [("--runner=DirectRunner",), WORKERS], ids=["in this process", "two processes"])
def test_a_folder_becomes_the_same_bytes(
    shop: Path, in_process: Dataset, tmp_path: Path, options: tuple[str, ...]
) -> None:
    dataset = run(shop, tmp_path / "out", *options)
    assert dataset.digest == in_process.digest
    assert [entry.file for entry in dataset.facts.unreadable] == ["Bag/none.png"]
    assert sorted(path.name for path in dataset.path.iterdir()) == ["files.json", "manifest.json", "test", "train"]


@needs_beam
def test_servers_listen_on_the_loopback_interface_and_workers_import_nothing_from_the_working_directory(
    shop: Path, in_process: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grpc = importlib.import_module("grpc")
    with engine(Params()).running():
        server = grpc.server(ThreadPoolExecutor(1))
        port = server.add_insecure_port("[::]:0")
        server.start()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(OSError, match="refused|Cannot assign"):
            socket.create_connection(("::1", port), timeout=5)
        server.stop(None)
    for name in ("components", "numpy", "apache_beam", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert run(shop, tmp_path / "out", *WORKERS).digest == in_process.digest
    assert not (tmp_path / "imported").exists()


@needs_beam
def test_a_shared_folder_is_left_empty(shop: Path, in_process: Dataset, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    dataset = run(shop, tmp_path / "out", f"--temp_location={tmp_path / 'shared'}")
    assert dataset.digest == in_process.digest
    assert list((tmp_path / "shared").iterdir()) == []


@needs_beam
def test_an_object_store_is_all_that_machines_share(
    shop: Path, in_process: Dataset, tmp_path: Path, bucket: str
) -> None:
    from upath import UPath

    for file in shop.rglob("*.*"):
        target = UPath(bucket) / "images" / file.relative_to(shop).as_posix()
        target.write_bytes(file.read_bytes())
    dataset = run(f"{bucket}/images", tmp_path / "out", *WORKERS, f"--temp_location={bucket}/beam")
    assert {
        name: split.images_sha256 for name, split in run(f"{bucket}/images", tmp_path / "here").facts.splits.items()
    } == {name: split.images_sha256 for name, split in dataset.facts.splits.items()}
    assert not (UPath(bucket) / "beam").exists()


@needs_beam
@pytest.mark.parametrize("place", ["{folder}/file/beam", "{bucket}-missing/beam"], ids=["folder", "bucket"])
def test_a_shared_place_that_cannot_be_written_is_refused(shop: Path, tmp_path: Path, bucket: str, place: str) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    shared = place.format(folder=tmp_path, bucket=bucket)
    with pytest.raises(BeamError, match=f"Expected in --temp_location .* a place .*; received {shared}: "):
        run(shop, tmp_path / "out", f"--temp_location={shared}")


@needs_beam
def test_another_runner_gets_its_options(shop: Path, in_process: Dataset, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    command = [sys.executable, "-c", JOB_SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = f"--job_endpoint=127.0.0.1:{server.stdout.readline().strip()}"
        environment = (
            "--environment_type=beam:env:harness_subprocess_python:v1",
            f"--environment_config={sys.executable} -m {WORKER}",
        )
        shared = f"--temp_location={tmp_path / 'shared'}"
        dataset = run(shop, tmp_path / "out", "--runner=PortableRunner", address, *environment, shared)
        server.communicate("", timeout=60)
    assert dataset.digest == in_process.digest
    assert list((tmp_path / "shared").iterdir()) == []


@needs_beam
def test_a_changed_file_stops_the_run(shop: Path, tmp_path: Path) -> None:
    params = ingest.parse({**VALUES, "image_dir": str(shop), "beam_pipeline_options": ["--runner=DirectRunner"]})
    source = read_sources(ingest, params, None)["image_dir"]
    changed = Source(source.name, source.location, {**source.files, "Boot/7.png": "0" * 64})
    with pytest.raises(TransientStepError, match=r"received another Boot/7.png"):
        ingest(params=params, output=tmp_path, sources={"image_dir": changed})


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the workers of a process, as soon as there are some."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if found := [child for child in process.children(recursive=True) if WORKER in " ".join(child.cmdline())]:
                return found
        time.sleep(0.05)
    raise TimeoutError


@needs_beam
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_workers_end_with_the_run(shop: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    values = {"dataset": "folder", "name": "shop", "image_dir": shop, "image_size": 6, "max_unreadable_share": 0.1}
    command = [sys.executable, "-P", "-m", "ridgeline.cli", "run", "ingest"]
    command += [word for name, value in values.items() for word in ("--set", f"ingest.{name}={value}")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RIDGELINE_STORE": str(tmp_path)}
    env["RIDGELINE_BEAM_PIPELINE_OPTIONS"] = " ".join(WORKERS)
    (temporary := tmp_path / "temporary").mkdir()
    env["TMPDIR"] = str(temporary)
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipe) as process:
        workers = workers_of(psutil.Process(process.pid))
        os.killpg(process.pid, number)  # as Ctrl-C and a container that is stopped do
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert [path.name for path in temporary.glob("beam-*")] == []
    assert "Expected Beam's workers" not in printed
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert not alive


@needs_beam
def test_a_killed_worker_ends_the_run(shop: Path, tmp_path: Path) -> None:
    def kill_one() -> None:
        workers_of(psutil.Process())[0].kill()

    hook, killer = threading.excepthook, threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(TransientStepError, match=r"Expected Beam's workers.*received: Worker subprocess exited with"):
        run(shop, tmp_path / "out", *WORKERS)
    killer.join()
    assert list((tmp_path / "out").iterdir()) == []
    assert threading.excepthook is hook


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--direct_num_worker=2"], r"Expected options of Beam.*received --direct_num_worker, which it does not know"),
        (["--direct_num_workers=two"], r"received one that it can't use: argument --direct_num_workers: invalid int"),
        (["--direct_running_mode=fast"], r"argument --direct_running_mode: invalid choice: 'fast'"),
        (["--runner=FastRunner"], r"Expected a runner of Beam.*received FastRunner"),
    ],
)
def test_options_are_checked_before_work_starts(
    shop: Path, tmp_path: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BeamError, match=message):
        run(shop, tmp_path / "out", *options)
    assert capfd.readouterr().err == ""
    assert list((tmp_path / "out").iterdir()) == []


@needs_beam
def test_options_of_other_runners_are_theirs_to_check() -> None:
    params = Params(beam_pipeline_options=("--runner=PortableRunner", "--flink_tuning=7", "--temp_location=s3://a/b"))
    found = engine(params)
    assert (found.runner, found.shared) == ("PortableRunner", "s3://a/b")


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_without_the_extra_the_options_ask_for_it(shop: Path, tmp_path: Path) -> None:
    params = ingest.parse({**VALUES, "image_dir": str(shop), "beam_pipeline_options": ["--runner=DirectRunner"]})
    with pytest.raises(BeamError, match=r"Expected Apache Beam, .*constraints.txt 'ridgeline\[beam\]'"):
        ingest(params=params, output=tmp_path, sources=read_sources(ingest, params, None))


def test_options_are_words_or_text() -> None:
    text = "--runner=FlinkRunner '--flink_conf=a b'"
    expected = ("--runner=FlinkRunner", "--flink_conf=a b")
    assert ingest.parse({"beam_pipeline_options": text}).beam_pipeline_options == expected  # type: ignore[attr-defined]
    assert ingest.parse({"beam_pipeline_options": [*expected]}).beam_pipeline_options == expected  # type: ignore[attr-defined]
    name = "Parameter ingest.beam_pipeline_options: "
    with pytest.raises(ParameterError, match=f"^{name}expected options of Beam as --name or --name=value; received 1 "):
        ingest.parse({"beam_pipeline_options": ["--runner", "FlinkRunner"]})
    with pytest.raises(ParameterError, match=rf"^{name}expected words as in a shell; received others \(No closing"):
        ingest.parse({"beam_pipeline_options": "--runner='FlinkRunner"})


def test_the_engine_is_no_part_of_the_key() -> None:
    values = {**VALUES, "image_dir": "/shop"}
    one, two = (ingest.parse({**values, "beam_pipeline_options": options}) for options in ([], [*WORKERS]))
    assert key_parts(ingest, {}, one, {}).key() == key_parts(ingest, {}, two, {}).key()
    code, libraries = reachable_code(ingest.module)
    assert "components/ingestion/beam.py" in code
    assert not [name for name in libraries if "beam" in name]


def drawn(output: Path, dataset: str, *options: str) -> Dataset:
    importlib.import_module("tests.components.ingestion.beam_drawn")  # registers its datasets
    output.mkdir()
    params = ingest.parse({"dataset": dataset, "name": "drawn", "beam_pipeline_options": list(options)})
    return ingest(params=params, output=output, sources={})  # type: ignore[return-value]


@needs_beam
@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("drawn_by_beam", ()),
        ("drawn_by_beam", ("--runner=DirectRunner",)),
        ("drawn_by_beam", (*WORKERS, "--temp_location=shared")),
        ("drawn_by_both", ("--runner=DirectRunner",)),
        ("drawn_one_by_one", WORKERS),
    ],
)
def test_a_tfds_dataset_becomes_the_same_bytes_in_the_same_order(
    tmp_path: Path, dataset: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "shared").mkdir()
    options = tuple(option.replace("=shared", f"={tmp_path / 'shared'}") for option in options)
    found = drawn(tmp_path / "out", dataset, *options)
    expected = drawn(tmp_path / "in-process", "drawn_one_by_one")
    assert found.facts.splits == expected.facts.splits
    assert [path.name for path in tmp_path.rglob("*ridgeline-*")] == []


@needs_beam
def test_tfds_writes_into_folders(tmp_path: Path) -> None:
    with pytest.raises(BeamError, match=r"Expected in --temp_location a folder or a gs:// URL.*received s3://"):
        drawn(tmp_path / "out", "drawn_by_beam", "--temp_location=s3://bucket/beam")


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_without_the_extra_a_beam_dataset_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(BeamError, match=r"Expected Apache Beam, .* or for a dataset that needs it"):
        drawn(tmp_path / "out", "drawn_by_beam")
