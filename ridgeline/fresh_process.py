"""Calls functions in fresh processes: forks of one that has imported TensorFlow and done nothing else.

The import takes two seconds. With `start_ahead`, it happens before the first call, on another core.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any, NoReturn

from ridgeline import quiet_tensorflow
from ridgeline.component import STEP_ENVIRONMENT

PRINTED_CHARACTERS = 2_000
_lock = threading.Lock()
_parent: _Parent | None = None


class FreshProcessError(RuntimeError):
    """A function failed in a fresh process; the message is the end of what it printed."""


def start_ahead() -> None:
    """Start the process to fork from, and return at once; do nothing if it runs already."""
    with _lock:
        _running()


def call(function: Callable[..., Any], *arguments: Any, timeout_seconds: float | None = None) -> Any:
    """Call a function in a fresh process.

    The process takes no code from the working directory. It ends when this process ends, even if this was killed.

    Args:
        function: A function of a module. It may end with `SystemExit` and a message to fail without a traceback.
        *arguments: Values that JSON has.
        timeout_seconds: Time after which the function is stopped; None for no limit.

    Returns:
        What the function returns: a value that JSON has.

    Raises:
        FreshProcessError: If the function raises, its process crashes or the time is over.

    Example:
        >>> import math
        >>> call(math.gcd, 12, 18)
        6
    """
    request = json.dumps([function.__module__, function.__qualname__, arguments])
    with _lock:
        return _running().call(f"{request}\n".encode(), timeout_seconds)


def _running() -> _Parent:
    global _parent
    if _parent is None or _parent.process.poll() is not None:
        if _parent:
            _parent.end()
        _handle_forks()
        _parent = _Parent()
    return _parent


class _Parent:
    """The process to fork from, seen from the one that started it."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ridgeline.fresh_process"],
            env={**os.environ, **STEP_ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        atexit.register(self.end)

    def end(self) -> None:
        """End the process; its fork ends with it."""
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close the pipes to the process, and leave it as it is."""
        self.process.returncode = self.process.returncode or 0  # else it is waited for
        for file in (self.process.stdin, self.process.stdout, self._errors):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def call(self, request: bytes, timeout_seconds: float | None) -> Any:
        """Return the result of a request, see `call`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answered = False
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(request)
                self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout_seconds)[0]:
                raise FreshProcessError(f"no response within {timeout_seconds} seconds")
            answer = self.process.stdout.readline()
            answered = answer.endswith(b"\n")
            if not answered:
                self._errors.seek(0)
                raise FreshProcessError(_end_of(self._errors.read()) or "no response")
        finally:
            if not answered:  # so that a later answer is not taken for that of the next call
                self.end()
        outcome = json.loads(answer)
        if outcome["status"]:
            raise FreshProcessError(outcome["printed"] or f"exit status {outcome['status']}")
        return outcome["result"]


@functools.cache
def _handle_forks() -> None:
    """Let a fork of the calling process leave the process to fork from to the one that started it."""

    def forget() -> None:
        global _parent, _lock
        if _parent:
            atexit.unregister(_parent.end)
            _parent.forget()
        _parent, _lock = None, threading.Lock()

    os.register_at_fork(after_in_child=forget)


def _end_of(printed: bytes) -> str:
    return printed.decode(errors="replace").strip()[-PRINTED_CHARACTERS:]


# --- in the other process


def serve() -> None:
    """Import TensorFlow; then fork for each request on the standard input, and write the outcome as a line of JSON."""
    quiet_tensorflow.install()
    import keras  # noqa: F401
    import tensorflow  # noqa: F401

    requests, outcomes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that a fork does not keep the pipe open
    for request in requests:
        with tempfile.TemporaryFile() as printed, tempfile.TemporaryDirectory() as temporary:
            result, written = os.pipe()
            fork = os.fork()
            if fork == 0:
                tempfile.tempdir = temporary  # AutoGraph deletes its files only when Python exits
                _end_with_parent()
                outcomes.close()
                _run(request, printed, written)
            os.close(written)
            content = b""
            while True:
                if requests.fileno() in select.select([requests.fileno(), result], [], [])[0]:  # its end
                    os.kill(fork, signal.SIGKILL)
                    return
                if not (part := os.read(result, 2**16)):
                    break
                content += part
            os.close(result)
            status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
            printed.seek(0)
            outcome = {"status": status, "printed": _end_of(printed.read())}
        outcome["result"] = json.loads(content) if status == 0 else None
        outcomes.write(json.dumps(outcome).encode() + b"\n")
        outcomes.flush()


def _end_with_parent() -> None:
    """Let this fork be killed when the process that it was forked from ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.05)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(request: bytes, printed: IO[bytes], written: int) -> NoReturn:
    """Call a function, write its result as JSON, and end this process."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (printed.fileno(), 1), (printed.fileno(), 2)):
            os.dup2(source, target)
        module, name, arguments = json.loads(request)
        result = getattr(importlib.import_module(module), name)(*arguments)
        with os.fdopen(written, "w") as file:
            json.dump(result, file)
        status = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
