"""Processes on this machine that are the workers of a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_addresses(count: int) -> list[str]:
    """Return addresses of this machine that nothing listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start Python, which finds the modules that this process finds; what it prints can be read."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-P", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[str]:
    """Return what processes print until their end; all of them end, also after an error."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
