"""A checkpoint whose write is interrupted: the last whole one is still there."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from components.training.checkpoint import Checkpoint

OLD, NEW = {"weights": np.arange(100.0)}, {"weights": np.arange(100.0) + 1}


@pytest.fixture
def checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint", {"seed": 1})
    checkpoint.save(OLD, {"epoch": 1})
    return checkpoint


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no file beyond a size: a disk that is full at that byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def expect_old(checkpoint: Checkpoint) -> None:
    saved = checkpoint.load()
    assert saved is not None
    arrays, facts = saved
    np.testing.assert_array_equal(arrays["weights"], OLD["weights"])
    assert facts == {"epoch": 1}
    assert os.listdir(checkpoint.path.parent) == [checkpoint.path.name]


def test_a_disk_that_is_full_at_any_byte_keeps_the_last_checkpoint(checkpoint):
    whole = checkpoint.path.stat().st_size
    for size in (0, 1, 64, 65, 66, 200, whole // 2, whole - 1):
        with pytest.raises(OSError, match="File too large"), largest_file(size):
            checkpoint.save(NEW, {"epoch": 2})
        expect_old(checkpoint)
    with largest_file(whole):
        checkpoint.save(NEW, {"epoch": 2})
    assert checkpoint.load()[1] == {"epoch": 2}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_call_that_fails_keeps_the_last_checkpoint(checkpoint, monkeypatch, call):
    failed = []

    def fail(*_: object, **__: object) -> None:
        failed.append(call)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.save(NEW, {"epoch": 2})
    assert failed == [call]
    expect_old(checkpoint)


def test_who_has_opened_a_checkpoint_reads_it_whole_while_the_next_one_is_saved(checkpoint):
    content = checkpoint.path.read_bytes()
    with Path(checkpoint.path).open("rb") as file:
        assert file.read(70) == content[:70]
        checkpoint.save(NEW, {"epoch": 2})
        assert file.read() == content[70:]
    assert checkpoint.path.read_bytes() != content
