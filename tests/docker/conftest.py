"""Fixtures: the files of docker/, and its scripts as modules."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+):-([^}]*)\}")


@pytest.fixture(scope="session")
def compose_text() -> str:
    return (ROOT / "docker" / "compose.yaml").read_text()


@pytest.fixture(scope="session")
def compose(compose_text: str) -> dict[str, Any]:
    """The compose file with no variable set."""
    return yaml.safe_load(VARIABLE.sub(lambda match: match[2], compose_text))


@pytest.fixture(scope="session")
def dockerfile() -> str:
    return (ROOT / "docker" / "Dockerfile").read_text()


def load(name: str) -> ModuleType:
    """Return a program of ``docker/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def first_start() -> ModuleType:
    return load("first_start")


@pytest.fixture(scope="session")
def health() -> ModuleType:
    return load("health")


@pytest.fixture(scope="session")
def objects() -> ModuleType:
    return load("objects")
