"""Functions called in fresh processes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
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


def test_a_call_that_takes_too_long_is_stopped_with_its_process(tmp_path: Path) -> None:
    with pytest.raises(FreshProcessError, match="no response within 5 seconds"):
        call(shutil.copyfile, "/dev/zero", str(tmp_path / "endless"), timeout_seconds=5)
    size = (tmp_path / "endless").stat().st_size
    time.sleep(0.2)
    assert (tmp_path / "endless").stat().st_size == size > 0
    assert call(math.gcd, 12, 18) == 6


def test_a_killed_parent_is_replaced() -> None:
    os.kill(call(os.getppid), 9)
    with pytest.raises(FreshProcessError):
        call(math.gcd, 12, 18)
    assert call(math.gcd, 12, 18) == 6


FORK = """
import os
from ridgeline.fresh_process import call
own, pid = call(os.getppid), os.fork()
other = call(os.getppid)
if pid == 0:
    os._exit(other == own)
raise SystemExit(os.waitpid(pid, 0)[1] or other != own)
"""


def test_a_fork_of_the_calling_process_starts_a_process_of_its_own_to_fork_from() -> None:
    subprocess.run([sys.executable, "-P", "-c", FORK], check=True)
