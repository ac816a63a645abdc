"""`make up` and related commands, without a container engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def stack(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run docker/stack with the commands that are in one folder."""
    command = ["/bin/bash", str(ROOT / "docker" / "stack"), *arguments]
    env = {**os.environ, "PATH": str(path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def with_commands(folder: Path, **commands: str) -> Path:
    for name in ("dirname", "grep", "head", "sed", "sort", "tail"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    for name, body in commands.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return folder


def test_missing_engines_are_named(tmp_path: Path) -> None:
    done = stack(with_commands(tmp_path), "up")
    assert done.returncode == 1
    assert "Expected docker with its compose plugin, or podman with podman-compose" in done.stderr
    assert "received neither" in done.stderr


def test_a_podman_compose_that_is_too_old_counts_as_none(tmp_path: Path) -> None:
    done = stack(with_commands(tmp_path, podman_compose="echo podman-composer version  1.0.3"), "up")
    assert done.returncode == 1
    assert "podman-compose 1.6 or newer; received neither" in done.stderr


def test_the_error_of_the_engine_is_shown(tmp_path: Path) -> None:
    docker = 'case $1 in compose) exit 0 ;; info) echo "no daemon" >&2; exit 1 ;; esac'
    done = stack(with_commands(tmp_path, docker=docker), "up")
    assert done.returncode == 1
    assert "Cannot use docker: no daemon." in done.stderr


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    done = stack(with_commands(tmp_path, docker="exit 0"), "start")
    assert done.returncode == 1
    assert "Expected up, down, logs, backup or restore; received 'start'." in done.stderr


def test_a_backup_is_readable_by_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    with_commands(commands, docker='[ "$1" = info ] || echo content')
    for name in ("mkdir", "rm", "realpath", "date", "sh"):
        (commands / name).symlink_to(shutil.which(name) or "")
    (tmp_path / "old").mkdir()
    for name in ("database.dump", "volumes.tar", "objects.tar"):
        (tmp_path / "old" / name).touch(0o644)
    for folder in ("new", "old"):
        env = {"PATH": str(commands), "BACKUP": str(tmp_path / folder)}
        command = ["/bin/bash", "-c", f"umask 000; exec /bin/bash {ROOT / 'docker' / 'stack'} backup"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / folder).iterdir()}
        assert modes == dict.fromkeys(("database.dump", "volumes.tar", "objects.tar"), "0o600")
        assert (tmp_path / folder / "database.dump").read_text() == "content\n"
    assert oct((tmp_path / "new").stat().st_mode & 0o777) == "0o700"
