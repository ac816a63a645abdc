"""Processes that begin their work at the same time, or end at the same time."""

from __future__ import annotations

import subprocess

import psutil


def release(*processes: subprocess.Popen[str]) -> None:
    """Wait until each process has printed ``ready``, then let all of them begin.

    Args:
        processes: Started with pipes, in text mode; each waits for a line of its standard input.
    """
    for process in processes:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started at once, as a power cut does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.wait()
