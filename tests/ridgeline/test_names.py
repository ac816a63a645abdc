"""The framework knows no step, parameter or dataset by name."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ridgeline import pipeline

ROOT = Path(__file__).resolve().parents[2]
DATA_CHOICE = "ridgeline/airflow/local_data.py"  # the one place that knows data by name
SPLITS = ("train", "validation", "test")  # of a dataset; one is also a step's name
SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("ridgeline/**/*.*") if path.suffix in (".py", ".html")
)


def texts(path: Path) -> Iterator[str]:
    """Yield a file's string constants without docstrings and without names of splits; a template as a whole."""
    if path.suffix == ".html":
        yield path.read_text(encoding="utf-8")
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    splits = {
        element
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"
        for element in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings | splits:
            yield node.value


@functools.cache
def forbidden() -> re.Pattern[str]:
    """Match a step's name that stands alone or names a parameter, a parameter's full name, or a dataset's."""
    steps = pipeline.load_components().values()
    names = [re.escape(step.name) for step in steps]
    leaves = {f"{step.name}.{name}" for step in steps for name in step.defaults()}
    parameters = [re.escape(name) for name in sorted(leaves)]
    datasets = ["fashion.?mnist", "synthetic_garments", "cifar"]
    alone = rf"\A(?:{'|'.join(names)})\Z|\b(?:{'|'.join(names)})\.(?!json\b)[a-z]"
    return re.compile("|".join([alone, *parameters, *datasets]), re.IGNORECASE)


@pytest.mark.parametrize("source", [source for source in SOURCES if source != DATA_CHOICE])
def test_the_framework_names_no_step_parameter_or_dataset(source: str) -> None:
    found = [text for text in texts(ROOT / source) if forbidden().search(text)]
    assert found == []


def test_the_search_finds_what_it_looks_for() -> None:
    found = [text for text in texts(ROOT / DATA_CHOICE) if forbidden().search(text)]
    assert {"ingest", "ingest.dataset", "transform.validation_examples"} <= set(found)
