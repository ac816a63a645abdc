"""Fixtures for all tests: a store, the synthetic pipeline run once, the official files where they are."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ridgeline import keys, pipeline
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.pipeline import StepResult
from ridgeline.settings import Settings
from ridgeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
os.environ.update(STEP_ENVIRONMENT)  # before a test that runs no step uses TensorFlow

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("RIDGELINE_MANUAL_DIR"):
        return
    marked = [item for item in items if item.get_closest_marker("real_data")]
    if marked and os.environ.get("CI"):
        raise pytest.UsageError("CI must run the real_data tests: set RIDGELINE_MANUAL_DIR to the official files")
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="RIDGELINE_MANUAL_DIR is not set"))


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
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, list[StepResult]]:
    """The whole pipeline, run once on the synthetic images; not to be written to."""
    settings = Settings(store=str(tmp_path_factory.mktemp("synthetic") / "store"), manual_dir=None)
    steps = pipeline.plan("export")
    params = pipeline.parse_params(steps, SYNTHETIC, settings)
    return settings, list(pipeline.run(settings, steps, params, "synthetic"))


@pytest.fixture(scope="session")
def refs(synthetic: tuple[Settings, list[StepResult]]) -> dict[str, str]:
    """Store-relative name of each synthetic artifact, by the step that made it."""
    return {r.execution.component: r.execution.output for r in synthetic[1] if r.execution.output}


@pytest.fixture(scope="session")
def synthetic_store(synthetic: tuple[Settings, list[StepResult]]) -> Store:
    return synthetic[0].open_store()


@pytest.fixture(scope="session")
def fashion_mnist(manual_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    """The pipeline with its defaults on the official files: the store, and each artifact by step."""
    settings = Settings(store=str(tmp_path_factory.mktemp("fashion_mnist") / "store"), manual_dir=manual_dir)
    steps = pipeline.plan("export")
    results = pipeline.run(settings, steps, pipeline.parse_params(steps, {}, settings), "fashion_mnist")
    return settings.open_store(), {r.execution.component: r.execution.output or "" for r in results}
