"""The installed networks, found by their entry points in the group ``ridgeline.networks``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ridgeline.component import Params

log = logging.getLogger(__name__)

GROUP = "ridgeline.networks"


@dataclass(frozen=True)
class Network:
    """An installed network.

    Attributes:
        name: The name of its entry point.
        module: The module of its function.
        build: Returns the Keras model from image shape, number of classes, regularizer and options.
        options: The type of its options.
        label: Its name on the form.
        tuned: The values of the training's parameters under the profile ``tuned``; empty if there is no such profile.
        problem: Why it can't be used; empty if it can.
    """

    name: str
    module: str
    build: Callable[..., Any]
    options: type[Params]
    label: str
    tuned: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


class _Unusable(Exception):
    """An entry point does not name a network."""


def load_networks(reserved: Collection[str]) -> dict[str, Network]:
    """Return the installed networks by name; one that can't be used states its problem and has no options.

    Args:
        reserved: Names that other parameters have.
    """
    entries: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        entries.setdefault(entry.name, []).append(entry)
    networks = {}
    for name, found in sorted(entries.items()):
        try:
            networks[name] = _load(found, reserved)
        except (Exception, SystemExit) as error:  # whatever a person's module raises; others can still be used
            value = found[0].value
            cause = f"{error}" if isinstance(error, _Unusable) else describe(error, value.partition(":")[0])
            problem = f"its entry point {value} can't be used: {cause}"
            log.info("cannot use the network %s: %s", name, problem)
            networks[name] = Network(name, "", _none, Params, f"{name}: can't be used", problem=problem)
    return networks


def _none() -> None:
    return None


def describe(error: BaseException, module: str) -> str:
    """Return an error as a sentence, with the last line of a network's own package that led to it.

    Args:
        error: The error.
        module: The network's module.
    """
    package = module.rpartition(".")[0]
    lines = [
        f" ({frame.f_code.co_filename}, line {number})"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if f"{frame.f_globals.get('__name__')}.".startswith(f"{package}.")
    ]
    return f"{type(error).__name__}: {f'{error}'.rstrip('.')}{lines[-1] if lines else ''}."


def _load(entries: list[importlib.metadata.EntryPoint], reserved: Collection[str]) -> Network:
    entry, name = entries[0], entries[0].name
    if len(entries) > 1:
        raise _Unusable(f"{' and '.join(e.value for e in entries)} have the same name. Remove or rename one of them.")
    if not name.isidentifier() or name.startswith("_") or name in reserved or hasattr(Params, name):
        raise _Unusable("its name is that of another parameter, or no identifier. Rename it.")
    top = importlib.util.find_spec(entry.module.partition(".")[0])
    if top is not None and (not top.submodule_search_locations or top.origin is None):
        raise _Unusable(f"{top.name} is no package, so its code can't be followed. Make it a folder with __init__.py.")
    before = set(sys.modules)
    build = entry.load()
    if heavy := sorted({"keras", "tensorflow"} & (sys.modules.keys() - before)):
        raise _Unusable(f"it imports {' and '.join(heavy)} at module level, at each start. Import inside the function.")
    arguments = ("image_shape", "num_classes", "regularizer", "options")
    if not inspect.isfunction(build) or tuple(inspect.signature(build).parameters) != arguments:
        raise _Unusable(f"it is no function of {', '.join(arguments)}.")
    options = _options(build)
    if not (isinstance(options, type) and issubclass(options, Params)):
        raise _Unusable(f"its argument options is annotated with {options!r}, not with a subclass of {Params!r}.")
    if required := [option for option, field in options.model_fields.items() if field.is_required()]:
        raise _Unusable(f"{options.__name__}.{required[0]} has no default. Give it one.")
    options()  # the defaults are valid
    if unknown := _unknown_tuned(options, name, reserved):
        raise _Unusable(f"its tuned values name {', '.join(unknown)}, but no parameter is called so. Correct `tuned`.")
    shown = options.model_json_schema().get("properties", {})
    if hidden := [name for name, field in shown.items() if field.get("type") == "object"]:
        raise _Unusable(f"its options {', '.join(hidden)} have values by name, which a form can't show.")
    tuned = dict(getattr(options, "tuned", {}))
    if fixed := sorted({"network", "profile"} & tuned.keys()):
        raise _Unusable(f"its tuned values set {' and '.join(fixed)}, which select them. Remove it from `tuned`.")
    summary = (inspect.getdoc(build) or "").partition("\n")[0].rstrip(".")
    label = f"{name}: {summary}" if summary else name
    return Network(name, entry.module, build, options, label, tuned)


def _unknown_tuned(options: type[Params], network: str, parameters: Collection[str]) -> list[str]:
    tuned: Mapping[str, Any] = getattr(options, "tuned", {})
    unknown = [name for name in tuned if name not in {*parameters, network}]
    return unknown + [f"{network}.{name}" for name in tuned.get(network, ()) if name not in options.model_fields]


def _options(build: Callable[..., Any]) -> Any:
    """Return the annotation of the argument ``options``; the others may name what only type checkers import."""

    def only() -> None: ...

    only.__annotations__ = {"options": build.__annotations__.get("options", Any)}
    return typing.get_type_hints(only, build.__globals__)["options"]
