"""The Dockerfile: lint, and the existence of the files that it names."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_hadolint_reports_nothing() -> None:
    files = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "object-store" / "Dockerfile"]
    command = [Path(sys.executable).with_name("hadolint"), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_copied_files_exist_and_are_not_ignored(dockerfile: str) -> None:
    copied = [
        source for line in re.findall(r"^COPY (?!--from)(.+)", dockerfile, re.MULTILINE) for source in line.split()[:-1]
    ]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_everything_the_wheel_needs_is_in_the_build(dockerfile: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for name in [*packages, project["project"]["readme"], *project["project"]["license-files"]]:
        assert re.search(rf"^COPY .*\b{re.escape(name)} ", dockerfile, re.MULTILINE), name


def test_the_image_is_pinned_unprivileged_and_names_no_registry(dockerfile: str) -> None:
    stages = dockerfile.split("\nFROM ")
    assert "USER 50000:0" in stages[-1]
    assert "uv" not in re.findall(r"\w+", stages[-1])
    assert not re.search(r"\bpip install(?!.*constraint)", dockerfile)
    assert "://" not in dockerfile
