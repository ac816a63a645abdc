"""The Makefile's choice of a Python, with scripts in place of Pythons: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Answers as a Python does to what the Makefile asks, and makes a .venv of copies of itself.
PYTHON = """#!/bin/sh
echo "$0 $*" >>{log}
case "$*" in
  *platform*) echo {version} ;;
  *ensurepip*) exit {ensurepip} ;;
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/pip && cp "$0" .venv/bin/uv ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def write_python(path: Path, version: str, *, ensurepip: int = 0) -> Path:
    """Write a script that answers like a Python; what it was called with is in ``calls`` in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(log=path.parent.parent / "calls", version=version, ensurepip=ensurepip))
    path.chmod(0o755)
    return path


def make_install(checkout: Path, *args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]}
    command = ["make", "--no-print-directory", "install", *args]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("version", ["2.7.18", "3.1.1", "3.10.13", "3.14.1", "3.14.0rc1"])
def test_unsupported_python_is_refused_in_one_line(tmp_path: Path, checkout: Path, version: str) -> None:
    write_python(tmp_path / "bin" / "python3", version)
    result = make_install(checkout, path=tmp_path / "bin")
    assert result.returncode == 2
    assert result.stdout == ""
    assert [line for line in result.stderr.splitlines() if not line.startswith("make: ***")] == [
        f"error: Expected Python 3.11, 3.12 or 3.13; received {version} (python3). Name another: make PYTHON=python3.12"
    ]
    assert not (checkout / ".venv").exists()


def test_missing_python_is_reported(checkout: Path) -> None:
    result = make_install(checkout, "PYTHON=/nowhere/python3")
    assert result.returncode == 2
    assert "Expected Python 3.11, 3.12 or 3.13; received none (/nowhere/python3)." in result.stderr
    assert "not found" not in result.stderr
    assert not (checkout / ".venv").exists()


def test_python_without_ensurepip_is_refused(tmp_path: Path, checkout: Path) -> None:
    python = write_python(tmp_path / "bin" / "python3", "3.13.5", ensurepip=1)
    result = make_install(checkout, f"PYTHON={python}")
    assert result.returncode == 2
    assert f"error: Cannot make .venv: {python} has no ensurepip. Install it: 'apt-get install" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11.0", "3.12.11", "3.13.5"])
def test_supported_python_makes_the_venv(tmp_path: Path, checkout: Path, version: str) -> None:
    python = write_python(tmp_path / "bin" / "python3", version)
    result = make_install(checkout, f"PYTHON={python}")
    assert result.returncode == 0, result.stderr
    assert (checkout / ".venv" / ".installed").exists()


def test_complete_venv_is_kept(tmp_path: Path, checkout: Path) -> None:
    for name in ("python", "pip", "uv"):
        write_python(checkout / ".venv" / "bin" / name, "3.12.1")
    python = write_python(tmp_path / "bin" / "python3", "3.14.1")
    result = make_install(checkout, f"PYTHON={python}")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("version", "names"), [("3.14.1", ["python", "pip"]), ("3.12.1", ["python"])])
def test_venv_of_another_python_or_without_pip_is_made_again(
    tmp_path: Path, checkout: Path, version: str, names: list[str]
) -> None:
    for name in names:
        write_python(checkout / ".venv" / "bin" / name, version)
    python = write_python(tmp_path / "bin" / "python3", "3.12.2")
    result = make_install(checkout, f"PYTHON={python}")
    assert result.returncode == 0, result.stderr
    assert f"{python} -m venv --clear .venv\n" in (tmp_path / "calls").read_text()


def test_supported_pythons_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "3.11.* | 3.12.* | 3.13.*" in (ROOT / "Makefile").read_text(encoding="utf-8")
