"""Imports TensorFlow and Keras without the lines about this machine that its native code prints, in half of the time.

No setting of TensorFlow turns the lines off, and Airflow logs them as errors. Keras imports scikit-learn and
matplotlib where they are installed, for wrappers and plots that no step uses: 1.0 of 3.3 s. The garbage collector
would scan the objects of the modules repeatedly and free none, which takes 0.6 s. So it is off during the import, and
ignores these objects afterwards.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NOT_IMPORTED = ("matplotlib", "sklearn")  # by Keras; a step that needs one of them imports it as usual
NOISE = (b"I0000 ", b"WARNING: All log messages before absl::InitializeLog")


def install() -> None:
    """Prepare the import of TensorFlow; do nothing if it is imported already."""
    if "tensorflow" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds TensorFlow and Keras as Python does, and changes how they are loaded: either may load the other."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in ("tensorflow", "keras"):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec and spec.loader:
            spec.loader.exec_module = functools.partial(_load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _load(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    sys.stderr.flush()
    terminal = os.dup(2)
    collects = gc.isenabled()
    gc.disable()
    hidden = [name for name in NOT_IMPORTED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: their import raises ImportError
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            load(module)
        finally:
            for name in hidden:
                del sys.modules[name]
            if collects:
                gc.enable()
                gc.freeze()
            os.dup2(terminal, 2)
            os.close(terminal)
            printed.seek(0)
            for line in printed:
                if not line.startswith(NOISE):
                    os.write(2, line)
