"""Execution keys: the digest of all that decides a step's output, and the difference between two keys."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grimp
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from ridgeline.artifacts.base import Artifact, digest_of, file_entry
from ridgeline.component import Champion, Component, Params, Source, Workers

# Distributions whose name differs from their package's. Any other is found by a search that takes 0.3 s.
OTHER_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "markdown_it": "markdown-it-py"}
# Libraries that compute and write on behalf of another.
IMPLIED = {"keras": ("tensorflow", "h5py"), "tensorflow_datasets": ("tensorflow",)}
# Libraries that do not affect an artifact's bytes. Whatever engine runs the jobs of `ingest`, they do the same.
NOT_IN_BYTES = {"apache_beam", "pydantic", "pydantic_core", "pydantic_settings", "requests", "upath"}


class KeyParts(BaseModel):
    """What an execution's key covers.

    Attributes:
        component: The component's name.
        inputs: Content digest of each input artifact, by input name.
        params: The parameters, flat, by dotted name; locations left out.
        code: SHA-256 of each of the source files that the component can reach, libraries left out, by path.
        libraries: Version of each library that this code imports, by distribution name.
        sources: Fingerprint of each source, by the name by which the step declares it.
        workers: The number of processes that run the step together; their sums have another order than those of one.
            Neither the key nor a record has it if it is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    inputs: dict[str, str]
    params: dict[str, Any]
    code: dict[str, str]
    libraries: dict[str, str]
    sources: dict[str, str] = {}
    workers: int = 1

    @model_serializer(mode="wrap")
    def _without_one_worker(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if self.workers == 1:
            values.pop("workers", None)
        return values

    def key(self) -> str:
        """Return the digest of the parts: 64 hexadecimal digits."""
        return digest_of(self.model_dump(exclude=None if self.sources else {"sources"}))

    def differences(self, earlier: KeyParts, describe: Callable[[str, str], str] | None = None) -> list[str]:
        """Return the changes since an earlier execution, one phrase each.

        Args:
            earlier: What the earlier execution's key covers.
            describe: Returns the phrase about a source that changed, from its name and its earlier fingerprint.

        Example:
            >>> earlier = KeyParts(
            ...     component="train",
            ...     inputs={"examples": "ed28f8e23ae6"},
            ...     params={"epochs": 2, "penalty.l2": 0.01},
            ...     code={"components/train.py": "b0c4"},
            ...     libraries={"keras": "3.14.0"},
            ... )
            >>> now = earlier.model_copy(update={"params": {"epochs": 2, "penalty.l2": 0.001}})
            >>> now.differences(earlier)
            ['parameter train.penalty.l2 0.01 → 0.001']
            >>> now.key() == earlier.key()
            False
        """
        return [
            *(_input_change(n, a, b) for n, a, b in changes(earlier.inputs, self.inputs)),
            *(f"parameter {self.component}.{n} {a} → {b}" for n, a, b in changes(earlier.params, self.params)),
            *(_code_change(n, a, b) for n, a, b in changes(earlier.code, self.code)),
            *(f"library {n} {a} → {b}" for n, a, b in changes(earlier.libraries, self.libraries)),
            *(self._source_change(n, a, b, describe) for n, a, b in changes(earlier.sources, self.sources)),
            *([f"number of workers {earlier.workers} → {self.workers}"] if earlier.workers != self.workers else []),
        ]

    @staticmethod
    def _source_change(name: str, before: str, now: str, describe: Callable[[str, str], str] | None) -> str:
        if describe and "none" not in (before, now):
            return describe(name, before)
        return _content_change(f"source {name}", before, now)


def key_parts(
    component: Component,
    inputs: Mapping[str, Artifact[Any] | Champion[Any]],
    params: Params,
    sources: Mapping[str, Source] | None = None,
    workers: Workers | None = None,
) -> KeyParts:
    """Return what a component's execution key covers; nothing of the component is imported or run.

    Args:
        component: The component.
        inputs: Its input artifacts by name.
        params: Its parameters.
        sources: Its sources by name.
        workers: The processes that run it together, if it distributes; None for one.
    """
    code, libraries = reachable_code(component.module, *component.code(params))
    return KeyParts(
        component=component.name,
        inputs={name: artifact.digest for name, artifact in inputs.items()},
        params=params.in_key(),
        code=code,
        libraries=libraries,
        sources={name: source.digest for name, source in (sources or {}).items()},
        workers=workers.count if workers and component.distributes else 1,
    )


@functools.cache
def reachable_code(*modules: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the source files that modules can reach in their packages and `ridgeline`, and the libraries they import.

    Imports are read from the source, also those inside functions; nothing is imported. The result is cached for
    the process: an imported module runs as it was imported, even if its file changes later.

    Args:
        *modules: Full names of the modules.

    Returns:
        SHA-256 by file (``components/train.py``), and version by distribution name.
    """
    own = {"ridgeline", *(module.split(".")[0] for module in modules)}
    graph = _import_graph(*sorted(own))
    reached = {*modules, *(name for module in modules for name in graph.find_upstream_modules(module))}
    packages = {".".join(name.split(".")[:i]) for name in reached for i in range(1, name.count(".") + 1)}
    code: dict[str, str] = {}
    libraries: dict[str, str] = {}
    for name in reached | packages:
        top = name.split(".")[0]
        if top in own:
            file = _source(name)
            parts = name.count(".") + (2 if file.name == "__init__.py" else 1)
            code["/".join(file.parts[-parts:])] = file_entry(file).sha256
        elif top not in sys.stdlib_module_names and top not in NOT_IN_BYTES:
            for library in {top, *IMPLIED.get(top, ())}:
                libraries |= _versions(library)
    return code, libraries


@functools.cache
def _import_graph(*packages: str) -> grimp.ImportGraph:
    return grimp.build_graph(*packages, include_external_packages=True, cache_dir=None)


def forget_code() -> None:
    """Clear the cached sources, for a process in which they change."""
    reachable_code.cache_clear()
    _import_graph.cache_clear()


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"Expected the source of {module}; received none. Reinstall Ridgeline.")
    return Path(spec.origin)


def _versions(top: str) -> dict[str, str]:
    name = OTHER_NAMES.get(top, top.replace("_", "-"))
    try:
        return {name: importlib.metadata.version(name)}
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(top, [])
        return {name: importlib.metadata.version(name) for name in names}


def _input_change(name: str, before: str, after: str) -> str:
    """Return a changed input as a phrase; a member of a group is named by its number, from 1."""
    group, _, index = name.partition(".")
    return _content_change(f"input {group} {int(index) + 1}" if index else f"input {group}", before, after)


def _code_change(name: str, before: str, after: str) -> str:
    if before == "none":
        return f"code of {name} added"
    return f"code of {name} {'no longer used' if after == 'none' else 'changed'}"


def _content_change(label: str, before: str, after: str) -> str:
    if before == "none":
        return f"{label} added ({_short(after)})"
    if after == "none":
        return f"{label} removed ({_short(before)})"
    return f"{label} changed ({_short(before)} → {_short(after)})"


def _short(digest: str) -> str:
    """Shorten a digest to 12 digits; a word before it stays."""
    words = digest.split()
    return " ".join([*words[:-1], words[-1][:12]])


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each name whose values differ, with both values; the value of a name that is missing is ``none``.

    Args:
        before: Values by name.
        after: The other values.

    Example:
        >>> list(changes({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}))
        [('b', 2, 3), ('c', 'none', 4)]
    """
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "none"), after.get(name, "none")
        if (name in before) != (name in after) or old != new:
            yield name, old, new
