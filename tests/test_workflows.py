"""CI's workflow and the commit hooks call the Makefile's targets, and no command of their own that could differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MAKE = re.compile(r"make ([a-z-]+)(?: ARGS='[^']*')?")


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_workflow_runs_existing_targets(jobs: dict[str, Any], targets: set[str]) -> None:
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = [match[1] for command in commands if (match := MAKE.fullmatch(command))]
    assert called == ["lint", "test-fast", "test"]
    assert set(called) <= targets
    assert all(command.startswith(("make ", "apt-get ")) for command in commands)


def test_workflow_covers_the_supported_pythons(jobs: dict[str, Any]) -> None:
    supported = re.search(r"case \$\$1 in ([^)]*)\)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert supported is not None
    versions = jobs["test-fast"]["strategy"]["matrix"]["python"]
    assert " | ".join(f"{version}.*" for version in versions) == supported[1]


def test_hooks_run_existing_targets(targets: set[str]) -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["entry"].removeprefix("make ") for hook in hooks} <= targets


def test_own_check_runs_existing_targets(targets: set[str]) -> None:
    called = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert called
    assert set(called) <= targets
