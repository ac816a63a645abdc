"""Fixtures for all tests: a store, the synthetic pipeline run once, the official files where they are."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from ridgeline import keys, pipeline, quiet_tensorflow
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store
from tests.faulty_proxy import Proxy

ROOT = Path(__file__).resolve().parent.parent
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
os.environ.update(STEP_ENVIRONMENT)  # before a test that runs no step uses TensorFlow
quiet_tensorflow.install()
# Airflow, Keras and the tests are a million objects, which the collector would scan again and again: a quarter of the
# time until the first test, a tenth of the time of the tests.
gc.set_threshold(100_000, 50, 100)
# The stores and the database of Airflow flush to disk thousands of times, which costs nothing in memory. In a
# container, this folder is often small, or no program in it may be run.
MEMORY = "/dev/shm"
MEMORY_BYTES = 6 * 2**30
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > MEMORY_BYTES
):
    os.environ["TMPDIR"] = tempfile.tempdir = MEMORY

# A package of two steps, written to disk so that its code can be changed: `seed` writes a number, `double` doubles it.
TOY_STEPS = {
    "__init__.py": '"""Toy steps."""\n',
    "number.py": """
from ridgeline.artifacts.base import Artifact, Facts

class NumberFacts(Facts):
    digits: int

class Number(Artifact[NumberFacts]):
    facts_type = NumberFacts

class DoubledFacts(NumberFacts):
    pass

class Doubled(Artifact[DoubledFacts]):
    facts_type = DoubledFacts
""",
    "seed.py": """
from pathlib import Path
from typing import Any
from ridgeline.component import Params, component
from toy_steps.number import Number, NumberFacts

class SeedParams(Params):
    value: int = 21
    fail: bool = False

@component(output=Number)
def seed(params: SeedParams, output: Path) -> NumberFacts:
    (output / "number.txt").write_text(str(params.value))
    if params.fail:
        raise ArithmeticError("asked to fail")
    return NumberFacts(digits=len(str(params.value)))
""",
    "double.py": """
from pathlib import Path
from typing import Any
from ridgeline.component import Params, StepSkipped, component
from toy_steps.number import Doubled, DoubledFacts, Number

class DoubleParams(Params):
    factor: int = 2

@component(output=Doubled)
def double(number: Number, params: DoubleParams, output: Path) -> DoubledFacts:
    value = int((number.path / "number.txt").read_text())
    if value == 13:
        raise StepSkipped("13 is not doubled")
    (output / "number.txt").write_text(str(value * params.factor))
    return DoubledFacts(digits=len(str(value * params.factor)))
""",
}


def pytest_configure() -> None:
    # A shell that starts the tests with `&` makes them and their children ignore SIGINT, which some tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# `make test` runs on two workers. The tests of a file stay on one worker, and so do all that share one Airflow. The
# longest groups start first. Each worker takes two groups at a time, so the third one is short.
SHARED_AIRFLOW = (
    "tests/e2e/test_schedule.py",  # first: it counts the runs of the shared Airflow
    "tests/e2e/test_browser.py",
    "tests/e2e/test_approval.py",
    "tests/e2e/test_dag_run.py",
    "tests/e2e/test_retry.py",
    "tests/e2e/test_rollback_model.py",
    "tests/e2e/test_batch_inference.py",
)
FIRST = (
    *SHARED_AIRFLOW,
    "tests/e2e/test_make_ui.py",
    "tests/e2e/test_make_run.py",  # prepares the official files for all
    "tests/e2e/test_watcher.py",
    "tests/ridgeline/test_settings.py",
    "tests/ridgeline/airflow/plugin/test_app.py",
    "tests/e2e/test_regularization_path.py",
    "tests/ridgeline/test_gate.py",
    "tests/ridgeline/serving/test_server.py",
    "tests/ridgeline/serving/test_app.py",
    "tests/docs/test_extending.py",
    "tests/components/test_train.py",
    "tests/components/training/test_several_workers.py",
    "tests/ridgeline/test_workers.py",
    "tests/components/test_infer.py",
    "tests/ridgeline/test_key_lease.py",
    "tests/ridgeline/test_registry.py",
    "tests/ridgeline/test_cli.py",
    "tests/components/training/test_engine.py",
    "tests/components/networks/test_cnn.py",
    "tests/components/test_export.py",
)


class ByGroup(LoadScopeScheduling):
    """Hands out groups of tests: pytest-xdist 3.8's own groups have no effect under pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "airflow" if file in SHARED_AIRFLOW else file


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)


def _position(item: pytest.Item) -> int:
    file = item.nodeid.split("::")[0]
    return FIRST.index(file) if file in FIRST else len(FIRST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "airflow" in getattr(item, "fixturenames", ()):
            assert item.nodeid.split("::")[0] in SHARED_AIRFLOW, f"name the file of {item.nodeid} in SHARED_AIRFLOW"
            item.add_marker(pytest.mark.airflow)
    items.sort(key=_position)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real_data") and not os.environ.get("RIDGELINE_MANUAL_DIR"):
        missing = "CI must run the real_data tests: set RIDGELINE_MANUAL_DIR to the official files"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip("RIDGELINE_MANUAL_DIR is not set")


def make_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that is filled once for all workers: by the first that needs it, while the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def manual_dir() -> Path:
    """The folder of the official Fashion-MNIST files; only for tests marked ``real_data``."""
    return Path(os.environ["RIDGELINE_MANUAL_DIR"]).absolute()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def toy_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an importable package with the toy steps."""
    folder = tmp_path / "source" / "toy_steps"
    folder.mkdir(parents=True)
    for name, text in TOY_STEPS.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder.parent)
    keys.forget_code()
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_steps"]:
        del sys.modules[name]
    keys.forget_code()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of a server of the S3 protocol, a process on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, which s3fs finds by the environment alone."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    name = uuid.uuid4().hex
    s3fs.S3FileSystem.clear_instance_cache()  # another test may have had other credentials
    s3fs.S3FileSystem(endpoint_url=s3_endpoint).mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def proxy(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server of `bucket`, which s3fs finds by the environment alone. Set its `faults`."""
    import s3fs

    proxy = Proxy(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    s3fs.S3FileSystem.clear_instance_cache()  # it would keep the address
    yield proxy
    print(proxy.faults)
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, list[Execution]]:
    """The whole pipeline, run once on the synthetic images: the settings, and each step's record; read-only."""

    def make(folder: Path) -> None:
        settings = Settings(store=str(folder / "store"), manual_dir=None)
        for _ in pipeline.run(settings, steps, pipeline.parse_params(steps, SYNTHETIC, settings), "synthetic"):
            pass

    steps = pipeline.plan("export")
    folder = make_once(tmp_path_factory, "synthetic", make)
    settings = Settings(store=str(folder / "store"), manual_dir=None)
    records = pipeline.run_records(settings, "synthetic")
    return settings, [records[step.name] for step in steps]


@pytest.fixture(scope="session")
def two_versions(synthetic: tuple[Settings, list[Execution]], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A copy of the synthetic store with a second run, whose model is version 2; read-only.

    The run ``second`` holds out more validation images, so that its training images differ, and trains with L1.
    """

    def make(folder: Path) -> None:
        shutil.copytree(synthetic[0].store, folder / "store")
        settings = Settings(store=str(folder / "store"), manual_dir=None)
        changed = {"transform.validation_examples": 1_500, "train.penalty.kind": "l1", "train.epochs": 3}
        params = pipeline.parse_params(steps, {**SYNTHETIC, **changed}, settings)
        for _ in pipeline.run(settings, steps, params, "second"):
            pass

    steps = pipeline.plan("export")
    return Settings(store=str(make_once(tmp_path_factory, "two-versions", make) / "store"), manual_dir=None)


@pytest.fixture(scope="session")
def refs(synthetic: tuple[Settings, list[Execution]]) -> dict[str, str]:
    """Store-relative name of each synthetic artifact, by the step that made it."""
    return {execution.component: execution.output for execution in synthetic[1] if execution.output}


@pytest.fixture(scope="session")
def synthetic_store(synthetic: tuple[Settings, list[Execution]]) -> Store:
    return synthetic[0].open_store()


def start_make_run(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start what ``make run`` runs, in a folder that holds nothing but the DAGs."""
    if not (folder / "dags").exists():
        (folder / "dags").symlink_to(ROOT / "dags")
    env = {key: value for key, value in os.environ.items() if key not in ("RIDGELINE_STORE", "RIDGELINE_SERVING")}
    command = [sys.executable, "-m", "ridgeline.airflow.local", "run", "fashion_mnist_training", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def start_run() -> Callable[..., subprocess.Popen[str]]:
    """The function `start_make_run`."""
    return start_make_run


@pytest.fixture(scope="session")
def official_run(manual_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ``make run`` with its defaults on the official files; ``output.txt`` holds what it printed."""

    def make(folder: Path) -> None:
        with start_make_run(folder) as process:
            output, errors = process.communicate(timeout=800)
        assert process.returncode == 0, output + errors
        (folder / "output.txt").write_text(output)

    return make_once(tmp_path_factory, "official", make)


@pytest.fixture(scope="session")
def fashion_mnist(official_run: Path) -> tuple[Store, dict[str, str]]:
    """The pipeline with its defaults on the official files: the store, and each artifact by step."""
    store = Store(official_run / "var" / "store")
    return store, {e.component: e.output for e in store.executions() if e.state == "complete" and e.output}
