"""Functions called in fresh processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ridgeline.fresh_process import FreshProcessError, call

pytestmark = pytest.mark.fresh_process


def test_a_result_is_returned_and_each_call_has_a_process_of_its_own() -> None:
    assert call(math.gcd, 12, 18) == 6
    processes = [call(os.getpid) for _ in range(2)]
    assert len({os.getpid(), *processes}) == 3
    assert call(os.getppid) == call(os.getppid) != os.getpid()


def test_a_failure_is_reported_with_what_was_printed_and_the_next_call_works() -> None:
    with pytest.raises(FreshProcessError, match=r"Traceback(.|\n)*TypeError: 'str' object cannot be interpreted"):
        call(math.factorial, "x")
    with pytest.raises(FreshProcessError, match="^a reason$"):
        call(sys.exit, "a reason")
    with pytest.raises(FreshProcessError, match=r"\bAborted\b|exit status -6"):
        call(os.abort)
    with pytest.raises(FreshProcessError, match="exit status 3"):
        call(os._exit, 3)
    assert call(math.gcd, 12, 18) == 6


def expect_no_reader(pipe: Path) -> None:
    """Expect that the process that waited for a writer of a named pipe has ended."""
    time.sleep(1)
    with pytest.raises(OSError, match="No such device or address"):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


def test_a_call_that_takes_too_long_is_stopped_with_its_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FreshProcessError, match="no response within 10 seconds"):
        call(os.open, str(tmp_path / "pipe"), os.O_RDONLY, timeout_seconds=10)  # waits for a writer
    expect_no_reader(tmp_path / "pipe")
    assert call(math.gcd, 12, 18) == 6


def test_a_killed_parent_is_replaced_and_takes_its_fork_along(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        os.kill(call(os.getppid), signal.SIGKILL)
        with pytest.raises(FreshProcessError):
            call(math.gcd, 12, 18)
    assert call(math.gcd, 12, 18) == 6
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    os.mkfifo(tmp_path / "pipe")
    threading.Timer(2.0, os.kill, (call(os.getppid), signal.SIGKILL)).start()
    with pytest.raises(FreshProcessError):
        call(os.open, str(tmp_path / "pipe"), os.O_RDONLY)
    expect_no_reader(tmp_path / "pipe")


FORK = """
import os, sys, time
from ridgeline.fresh_process import call, start_ahead
own = call(os.getppid)
if os.fork() == 0:
    sys.exit(call(os.getppid) == own)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert call(os.getppid) == own
if os.fork() == 0:
    time.sleep(20)  # it must not keep the process to fork from alive
    os._exit(0)
print(own, flush=True)
"""


def test_a_fork_of_the_calling_process_neither_uses_nor_keeps_its_process_to_fork_from() -> None:
    with subprocess.Popen([sys.executable, "-P", "-W", "error", "-c", FORK], stdout=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        own = int(done.stdout.readline())
        done.kill()
        start = time.monotonic()
        while Path(f"/proc/{own}").exists():
            assert time.monotonic() - start < 10
            time.sleep(0.1)


def test_a_process_that_was_started_in_vain_does_not_delay_the_end() -> None:
    program = "from ridgeline.fresh_process import start_ahead; start_ahead()"
    start = time.monotonic()
    subprocess.run([sys.executable, "-P", "-W", "error", "-c", program], check=True)
    alone = time.monotonic() - start
    start = time.monotonic()
    subprocess.run([sys.executable, "-P", "-c", f"{program}; from ridgeline.fresh_process import call; call(len, [])"])
    assert alone < time.monotonic() - start
