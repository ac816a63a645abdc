"""Processes that the product starts: none takes code from the working directory, and none a long text as argument."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from components.export import save_in_a_fresh_process
from ridgeline.airflow import local_data
from ridgeline.airflow.server import environment
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.serving_check import ServingError, check
from ridgeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
SHADOWS = ("components", "ridgeline", "numpy", "tensorflow", "tensorflow_datasets", "keras", "airflow", "json")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: it holds modules of the names that the product imports, which leave a trace."""
    folder = tmp_path / "hostile"
    (folder / "components").mkdir(parents=True)
    trace = f"open({str(folder / 'imported')!r}, 'a').write(__name__ + ' ')\n"
    (folder / "components" / "__init__.py").write_text(trace)
    for name in SHADOWS[1:]:
        (folder / f"{name}.py").write_text(trace)
    monkeypatch.chdir(folder)
    yield folder
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def commands() -> Iterator[tuple[str, list[ast.expr]]]:
    """Yield each list in the product's code that begins with this Python, and its place."""
    for path in [p for name in ("ridgeline", "components", "dags", "docker") for p in (ROOT / name).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.elts


def test_every_python_that_is_started_is_started_safely() -> None:
    found = dict(commands())
    assert len(found) >= 5
    for place, elements in found.items():
        assert isinstance(elements[1], ast.Constant), place
        assert elements[1].value == "-P", place


def test_airflow_and_all_that_it_starts_are_safe(tmp_path: Path) -> None:
    assert environment(tmp_path, "airflow-run", {"PYTHONSAFEPATH": ""})["PYTHONSAFEPATH"] == "1"
    recipes = [line for line in (ROOT / "Makefile").read_text().splitlines() if "ridgeline.airflow" in line]
    assert len(recipes) == 2
    assert all("python -P -m ridgeline.airflow.local" in line for line in recipes)
    assert "PYTHONSAFEPATH=1" in (ROOT / "docker" / "Dockerfile").read_text()


@pytest.mark.fresh_process
def test_export_imports_nothing_from_the_working_directory(
    hostile: Path, synthetic_store: Store, refs: dict[str, str], tmp_path: Path
) -> None:
    save_in_a_fresh_process(synthetic_store.open(refs["train"], Model).path, tmp_path / "saved")
    assert (tmp_path / "saved" / "saved_model.pb").exists()


@pytest.mark.fresh_process
def test_the_serving_check_imports_nothing_from_there_and_takes_any_number_of_names(
    hostile: Path, synthetic_store: Store, refs: dict[str, str], tmp_path: Path
) -> None:
    model = synthetic_store.open(refs["export"], PushedModel)
    long = [f"{number:04} {'long name ' * 20}" for number in range(1_500)]
    names = [*model.facts.class_names, *long]  # those beyond the model's ten are never compared
    check(model.saved_model, model.check, names)
    expected = Path(shutil.copytree(model.check, tmp_path / "check"))
    np.save(expected / "probabilities.npy", np.zeros_like(np.load(expected / "probabilities.npy")))
    with pytest.raises(ServingError, match="expected the evaluation's probabilities; received others"):
        check(model.saved_model, expected, names)


def test_the_check_of_the_host_imports_nothing_from_there(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_data, "HOST_CHECK", "import json, sys; sys.exit(sys.argv[1] != 'shoes')")
    assert local_data._host_responds("shoes")


def test_a_package_on_pythonpath_is_found(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own" / "own_steps").mkdir(parents=True)
    (tmp_path / "own" / "own_steps" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'own'}:{':'.join(filter(None, sys.path))}")
    monkeypatch.setattr(local_data, "HOST_CHECK", "import own_steps")
    assert local_data._host_responds("shoes")
