"""The declaration of a pipeline step: its name, parameters, inputs, output and the function that does it."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_jsonable_python

from ridgeline.artifacts.base import Artifact, Facts, digest_of_mapping

A = TypeVar("A", bound=Artifact[Any])

# Set while a step runs, and read by TensorFlow and Keras at their first use in a process. The order of a sum, and so
# its last bits, depends on the number of threads that share it; with one, the number of cores does not matter.
# Keras's backend, float type and image format are the same for every user: no keras.json is read. Tables that it
# draws are as wide in every terminal, and without one.
STEP_ENVIRONMENT = {
    "TF_NUM_INTRAOP_THREADS": "1",
    "KERAS_BACKEND": "tensorflow",
    "KERAS_HOME": os.devnull,
    "COLUMNS": "100",
}


class Params(BaseModel):
    """A step's parameters: frozen, unknown keys refused, defaults given.

    A field declared with ``exclude=True`` is a *location*: it says where to find something, not what to
    compute, so it is no part of the step's key.

    Attributes:
        decided: What the step decides by itself although another step has a parameter for it: a clause, by dotted name.
    """

    decided: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def in_key(self) -> dict[str, Any]:
        """Return the values that are part of the step's key, as JSON values by dotted name.

        Left out are locations, and fields of this model itself that `outside_key` marks.
        """
        marked = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(extra := field.json_schema_extra, dict) and OUTSIDE_KEY in extra
        }
        return dict(flatten(self.model_dump(mode="json", exclude=marked)))


OUTSIDE_KEY = "outside_key"


def outside_key(**extra: Any) -> dict[str, Any]:
    """Return a field's ``json_schema_extra`` for a value that decides what happens to the output, not what it is.

    Args:
        **extra: More members, such as those of `shown_as`.
    """
    return {OUTSIDE_KEY: True, **extra}


class ServedParams(Params):
    """The parameters of a step that uses a served model: the pipeline takes its `PushedModel` from the registry.

    No step before it yields that. Before the step runs, `version` becomes the number of the champion if it is None. So
    the key has the number.
    """

    model: str | None = Field(None, title="Model", description="Name of the served model. It has no default.")
    version: int | None = Field(
        None, ge=1, title="Version", description="Version of the model, from 1. Empty: the champion."
    )


def shown_as(**labels: str) -> dict[str, Any]:
    """Return a field's ``json_schema_extra`` that gives its values labels on Airflow's form.

    Args:
        **labels: Label of each value.

    Example:
        >>> shown_as(sgd="SGD: stochastic gradient descent", adam="Adam")
        {'values_display': {'sgd': 'SGD: stochastic gradient descent', 'adam': 'Adam'}}
    """
    return {"values_display": labels}


FILLED_IN = ("scratch", "previous", "workers")  # arguments that the executor provides, or None

# A field's ``json_schema_extra`` for a value that applies to one run: it can't be made a default of scheduled runs.
FOR_ONE_RUN: dict[str, Any] = {"for_one_run": True}


def with_option(name: str) -> dict[str, Any]:
    """Return a field's ``json_schema_extra`` that gives it an option of its own on the command line.

    Args:
        name: The option, for example ``--profile``; the same as ``--set STEP.FIELD``.
    """
    return {"option": name}


APPLIES_WITH = "applies_with"


def applies_with(**values: Collection[Any]) -> dict[str, Any]:
    """Return the ``json_schema_extra`` of a field that must keep its default unless others have certain values.

    A form sends the values of all fields. Where this one doesn't apply, the value that the form shows counts as left
    out.

    Args:
        **values: The values under which this one applies, by the dotted name of another field of the same model.

    Example:
        >>> applies_with(optimizer=["sgd"])
        {'applies_with': {'optimizer': ['sgd']}}
    """
    return {APPLIES_WITH: {name: list(choices) for name, choices in values.items()}}


def conditions(field: FieldInfo) -> Mapping[str, Collection[Any]]:
    """Return the values of other fields under which a field applies, by name; empty if it always does.

    A field declares them with `applies_with`.

    Args:
        field: The field.
    """
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return cast(Mapping[str, Collection[Any]], extra.get(APPLIES_WITH, {}))


def applies(params: BaseModel, name: str) -> bool:
    """Return whether a field applies under the values of the others, see `applies_with`.

    Args:
        params: Validated parameters.
        name: The field's name.
    """
    return all(
        functools.reduce(getattr, other.split("."), params) in choices
        for other, choices in conditions(type(params).model_fields[name]).items()
    )


@dataclass(frozen=True)
class Champion(Generic[A]):
    """An input that the pipeline takes from the registry: the artifact that a step compares its own with.

    A step declares it as ``champion: Champion[Model] | None = None`` for the served model, or with another type for the
    artifact of that type that was made from what the served model was made from, for example the statistics of the
    examples that it was trained on.

    Attributes:
        artifact_digest: The digest of the artifact.
        artifact: The artifact; None if it is missing or damaged.
        problem: What is wrong with it, by the names of its files.
    """

    artifact_digest: str
    artifact: A | None
    problem: str = "it is missing or damaged"

    @property
    def digest(self) -> str:
        """Its entry in a key: the artifact's digest, marked if it can't be read."""
        return self.artifact_digest if self.artifact else f"unreadable ({self.problem}) {self.artifact_digest}"


@dataclass(frozen=True)
class Workers:
    """The processes that run one step together, on one machine or several, and which of them this one is.

    The chief alone reads and writes what outlives the step: the scratch folder, the output, the record.

    Attributes:
        addresses: ``host:port`` of each, the chief's first.
        index: The place of this one among them.
        key: The key of the execution, by which they check that they do the same.
    """

    addresses: tuple[str, ...]
    index: int
    key: str = ""

    @property
    def count(self) -> int:
        """Their number, at least 2."""
        return len(self.addresses)

    @property
    def is_chief(self) -> bool:
        """Whether this one is the chief."""
        return self.index == 0


# When a person must approve the push of a model, see `ridgeline.approval`.
Approval = Literal["never", "forced", "uncertain", "always"]


@dataclass(frozen=True)
class PushRule:
    """What happens to a servable model after its step. It does not shape the model, so it is part of no key.

    Attributes:
        approval: When a person must approve the push.
        canary_share: The share of the requests that it answers as a canary, 0 to below 1; 0 to become the champion.
    """

    approval: Approval = "never"
    canary_share: float = 0.0


class StepError(ValueError):
    """A step can't use its inputs or parameters; a retry would fail, too."""


class TransientStepError(StepError):
    """A step failed for a temporary cause, such as a missing network; a retry may succeed."""


class ParameterError(StepError):
    """A parameter is unknown, of the wrong type or out of its range."""


class SourceError(StepError):
    """A source is missing, or part of it can't be read."""


@dataclass(frozen=True)
class SourceFolder:
    """Where a step's source is: a folder outside the store.

    Attributes:
        location: A folder, or a `universal_pathlib` URL of an object store's prefix.
        outside_links: Whether links in it may lead out of it.
        only: The one file of it that is read; None for all.
        used_with: Name of the optional input without which the step does not use the folder: then it is not read, and
            not in the key; None if it is always used.
    """

    location: Path | str
    outside_links: bool = False
    only: str | None = None
    used_with: str | None = None


def source_file(location: str) -> SourceFolder:
    """Return the source of a step that reads one file.

    Args:
        location: The file's path or URL.

    Raises:
        SourceError: If it names a folder.

    Example:
        >>> source_file("schemas/shop.json")
        SourceFolder(location='schemas', outside_links=True, only='shop.json', used_with=None)
    """
    folder, slash, name = location.rpartition("/")
    if not name:
        raise SourceError(f"Expected a file; received the folder {location}. Name the file in it.")
    return SourceFolder(folder or slash or ".", outside_links=True, only=name)


@dataclass(frozen=True)
class Source:
    """A source as it was listed before the step: its files and their content.

    Attributes:
        name: The name by which the step declares it.
        location: The folder or URL.
        files: For each file, by its name relative to the folder with ``/``: its SHA-256; in an object store, its
            ETag and size.
    """

    name: str
    location: str
    files: Mapping[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """The fingerprint: the digest of all names and contents."""
        return digest_of_mapping(self.files)

    @property
    def label(self) -> str:
        """The last part of the location: its name in messages."""
        return self.location.rstrip("/").rpartition("/")[2]

    @property
    def is_remote(self) -> bool:
        """Whether it is in an object store."""
        return "://" in self.location

    def read(self, name: str) -> bytes:
        """Return a file's content, as it was listed.

        Of an object, only the size can be checked here; after the step, its ETag is compared again.

        Args:
            name: Its name in `files`.

        Raises:
            TransientStepError: If it was changed or removed since.
        """
        try:
            if self.is_remote:
                from upath import UPath

                path = UPath(self.location) / name
                content: bytes = path.fs.cat_file(path.path)  # a third faster than read_bytes
                as_listed = self.files[name].endswith(f":{len(content)}")
            else:
                with io.FileIO(f"{self.location}/{name}") as file:  # for small files, twice as fast as Path
                    content = file.readall()
                as_listed = hashlib.sha256(content).hexdigest() == self.files[name]
        except FileNotFoundError:
            as_listed = False
        if not as_listed:
            raise TransientStepError(
                f"Expected the files of {self.location} to stay as they were when the step began; received another "
                f"{name}, or none. Run the step again when nothing writes into the folder."
            )
        return content


def _always(params: Params) -> bool:
    return True


def _no_sources(params: Params) -> Mapping[str, SourceFolder]:
    return {}


def _no_code(params: Params | None) -> Iterable[str]:
    return ()


def _push_at_once(params: Params) -> PushRule:
    return PushRule()


class StepSkipped(Exception):
    """Raised by a step that has a defined reason to yield nothing, such as a model that was not blessed."""


@dataclass(frozen=True)
class Component:
    """A typed, pure pipeline step: inputs and parameters in, one artifact's files out.

    Attributes:
        name: The step's name, also the first part of its parameters' names (``train.epochs``).
        run: The function; called with the input artifacts by name, ``params`` and ``output``.
        params: The type of its parameters.
        inputs: The artifact type of each input that it must have.
        output: The artifact type that it writes.
        optional: The artifact type of each input that may be left out.
        groups: The artifact type of each input that takes any number of artifacts. Wherever inputs are listed by
            name, they are ``<input>.0``, ``<input>.1`` and so on.
        champions: The artifact type of each input that the pipeline fills in, see `Champion`.
        uses_champion: Returns, for the step's parameters, whether it takes its champions. If not, they are in no key.
        sources: Returns, for the step's parameters, the folders outside the store that it reads, by name. Their
            content is part of the key; `run` takes them as ``sources``, a mapping of names to `Source`.
        code: Returns, for the step's parameters, modules that the step imports only under these parameters, such as an
            extension that they name; for None, all such modules. Their code is part of the key, too.
        adds_to: Names of the parameters whose values an output shares with those that the step can add it to; empty if
            it adds to none. `run` takes the last of them as its optional input of its own output type, which is part of
            the key.
        uses_earlier: Returns, for the step's parameters, whether it adds to an earlier output.
        continues: Whether `run` takes ``previous``: its last output with the same parameters and code, but other
            content of the sources, or None. It saves work; the output may not depend on it.
        after: Artifact types whose steps run before this one; nothing of them is in its key.
        push: Returns, for the parameters of a step that yields servable models, what happens to them.
        resumes: Whether `run` takes ``scratch``: a folder that survives a failed or killed attempt and is handed
            to the next one with the same key, or None where there is none.
        distributes: Whether `run` takes ``workers``: the `Workers` that run it together, or None for one process. Their
            number is part of the key; which of them runs where is not.
    """

    name: str
    run: Callable[..., Facts]
    params: type[Params]
    inputs: Mapping[str, type[Artifact[Any]]]
    output: type[Artifact[Any]]
    optional: Mapping[str, type[Artifact[Any]]] = field(default_factory=dict)
    groups: Mapping[str, type[Artifact[Any]]] = field(default_factory=dict)
    champions: Mapping[str, type[Artifact[Any]]] = field(default_factory=dict)
    uses_champion: Callable[[Any], bool] = _always
    sources: Callable[[Any], Mapping[str, SourceFolder]] = _no_sources
    code: Callable[[Any], Iterable[str]] = _no_code
    adds_to: tuple[str, ...] = ()
    uses_earlier: Callable[[Any], bool] = _always
    continues: bool = False
    after: tuple[type[Artifact[Any]], ...] = ()
    push: Callable[[Any], PushRule] = _push_at_once
    resumes: bool = False
    distributes: bool = False

    @property
    def earlier(self) -> str | None:
        """Name of the input that takes an output of the step itself; None if it adds to none."""
        return next((name for name, kind in self.optional.items() if self.adds_to and kind is self.output), None)

    def adds(self, params: Params) -> bool:
        """Return whether a step adds to an earlier output.

        Args:
            params: The step's parameters.
        """
        return self.earlier is not None and self.uses_earlier(params)

    def shared(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an output has in common with those that it adds to, or that add to it.

        Args:
            params: The parameters in the output's key, see `Params.in_key`.
        """
        return {name: params.get(name) for name in self.adds_to}

    @property
    def has_sources(self) -> bool:
        """Whether it declares sources."""
        return self.sources is not _no_sources

    @property
    def module(self) -> str:
        """The module whose code, with all that it imports, is part of the step's key."""
        return self.run.__module__

    def defaults(self) -> dict[str, Any]:
        """Return the default of each parameter as a JSON value, by dotted name; locations are left out.

        Parameters that a dump of `params` leaves out because others decide whether they apply are included.
        """
        return dict(_leaves(self.params()))

    def __call__(
        self,
        *,
        params: Params,
        output: Path,
        scratch: Path | None = None,
        sources: Mapping[str, Source] | None = None,
        previous: Artifact[Any] | None = None,
        workers: Workers | None = None,
        **inputs: Artifact[Any] | Champion[Any],
    ) -> Artifact[Any]:
        """Run the step and seal what it wrote.

        Args:
            params: The step's parameters.
            output: An empty directory to write into.
            scratch: For a step that resumes: the folder with an earlier attempt's state; None if it has none.
            sources: For a step that declares sources: each as it was listed, by name.
            previous: For a step that continues: its last output; None if it has none.
            workers: For a step that distributes: the processes that run it together; None for this one alone.
            **inputs: The input artifacts by name.

        Returns:
            The sealed output artifact.
        """
        for group in self.groups:
            inputs[group] = tuple(inputs.pop(name) for name in members(inputs, group))  # type: ignore[assignment]
        extra: dict[str, Any] = {"scratch": scratch} if self.resumes else {}
        extra |= {"sources": sources or {}} if self.has_sources else {}
        extra |= {"previous": previous} if self.continues else {}
        extra |= {"workers": workers} if self.distributes else {}
        os.environ.update(STEP_ENVIRONMENT)
        return self.output.seal(output, self.run(**inputs, **extra, params=params, output=output))

    def parse(self, values: Mapping[str, Any]) -> Params:
        """Return validated parameters.

        Args:
            values: Parameter values by field name; nested fields as nested mappings.

        Raises:
            ParameterError: If a parameter is unknown, of the wrong type or out of its range.
        """
        try:  # as JSON: types are strict, but lists become tuples and strings become paths
            return self.params.model_validate_json(json.dumps(dict(values), default=str), strict=True)
        except ValidationError as error:
            raise ParameterError(self.explain(error)) from error

    def explain(self, error: ValidationError) -> str:
        """Return pydantic's errors about the parameters, one line each: expected, received, what to do."""
        known = [f"{self.name}.{name}" for name in self.defaults()]
        lines = []
        for item in error.errors(include_url=False):
            name = ".".join([self.name, *map(str, item["loc"])])
            if item["type"] == "extra_forbidden":
                decided = self.params.decided.get(name.removeprefix(f"{self.name}."))
                lines.append(
                    f"Cannot set {name}: {decided}. Leave it out."
                    if decided
                    else f"Unknown parameter {name}. {_suggestion(name, known)}"
                )
            else:
                lines.append(f"Parameter {describe_problem(name, item)}")
        return "\n".join(lines)


def describe_problem(name: str, problem: ErrorDetails) -> str:
    """Return a problem that pydantic found as a sentence: what was expected and what was received.

    Args:
        name: The parameter.
        problem: One of `ValidationError.errors`.
    """
    if problem["type"] == "extra_forbidden":
        return f"{name}: expected no such parameter; received {problem['input']!r}."
    if problem["type"] == "value_error":  # from a step's validator: its message starts with the field's name
        text = str(problem["ctx"]["error"])
        whole, _, field = name.rpartition(".")
        return ".".join(filter(None, [whole if text.startswith(f"{field}: ") else name, text]))
    expected = problem["msg"].replace("Input should be", "expected").replace("String should", "expected text to")
    return f"{name}: {expected}; received {problem['input']!r}."


def component(
    *,
    output: type[Artifact[Any]],
    after: tuple[type[Artifact[Any]], ...] = (),
    sources: Callable[[Any], Mapping[str, SourceFolder]] = _no_sources,
    uses_champion: Callable[[Any], bool] = _always,
    code: Callable[[Any], Iterable[str]] = _no_code,
    push: Callable[[Any], PushRule] = _push_at_once,
    adds_to: tuple[str, ...] = (),
    uses_earlier: Callable[[Any], bool] = _always,
) -> Callable[[Callable[..., Facts]], Component]:
    """Declare a function as a pipeline step; its annotations name the inputs and the parameters.

    ===========================================  ==================================================================
    ``examples: Examples``                       an input that the step must have
    ``sweep: SweepResult | None = None``         one that may be left out
    ``trials: tuple[Trials, ...]``               any number of artifacts
    ``champion: Champion[Model] | None = None``  the served artifact, which the pipeline fills in
    ``pushed: PushedModel``                      a served version, if ``params`` are `ServedParams`
    ``earlier: Predictions | None = None``       an output of the step itself that it adds to, see `adds_to`
    ``scratch: Path | None``                     a folder for unfinished work: the step resumes from it
    ``sources: Mapping[str, Source]``            the folders outside the store, for a step that declares `sources`
    ``previous: Dataset | None``                 the step's own last output, before the sources changed
    ``workers: Workers | None``                  the processes that run the step together; None for one alone
    ===========================================  ==================================================================

    Args:
        output: The artifact type that the function writes.
        sources: Returns, for the parameters, the folders outside the store that the function reads, by name.
        uses_champion: Returns, for the parameters, whether the function takes its champions. A function that declares
            it may take a champion of its own output type, to start from.
        code: Returns, for the parameters, modules that the function imports only under these parameters, such as an
            extension that they name; for None, all such modules. Their code is part of the key.
        adds_to: Names of the parameters whose values an output shares with those that it adds to, see `Component`.
        uses_earlier: Returns, for the parameters, whether the step adds to an earlier output.
        after: Artifact types whose steps run before this one, such as checks of its inputs. If one of these artifacts
            states a problem, the run stops there.
        push: Returns, for the parameters of a step that yields servable models, what happens to them.

    Returns:
        A decorator that turns ``def train(examples: Examples, params: Params, output: Path) -> ModelFacts``
        into the `Component` named ``train``.
    """

    def declare(run: Callable[..., Facts]) -> Component:
        hints = get_type_hints(run)
        alternatives = {name: [t for t in get_args(hint) if t is not NoneType] for name, hint in hints.items()}
        optional = {
            n: found[0] for n, found in alternatives.items() if len(found) == 1 and NoneType in get_args(hints[n])
        }
        required = {name for name, value in inspect.signature(run).parameters.items() if value.default is value.empty}
        for name, hint in hints.items():
            unusual = name in optional and name in required and name not in FILLED_IN
            if get_origin(hint) is Champion or unusual:
                raise TypeError(
                    f"Expected `{name}: X | None = None` for an input of {run.__name__} that may be left out; received "
                    f"{hint} {'without a default' if name in required else ''}. Correct its annotation."
                )
        inputs = {name: hint for name, hint in hints.items() if _is_artifact(hint)}
        comparable = [*inputs.values(), *([] if uses_champion is _always else [output])]
        for name, kind in optional.items():
            if get_origin(kind) is Champion and get_args(kind)[0] not in comparable:
                raise TypeError(
                    f"Expected an input of the type of {name} in {run.__name__} to compare the champion with; received "
                    f"{', '.join(inputs) or 'none'}. Add one of type {get_args(kind)[0].__name__}."
                )
        if "workers" in hints and (sources is not _no_sources or "previous" in hints):
            raise TypeError(
                f"Expected a step with workers to have neither sources nor an argument previous; received "
                f"{run.__name__}. Read the source in a step before it."
            )
        return Component(
            name=run.__name__,
            run=run,
            params=hints["params"],
            inputs=inputs,
            output=output,
            optional={n: kind for n, kind in optional.items() if _is_artifact(kind) and n not in FILLED_IN},
            groups={name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is tuple},
            champions={n: get_args(kind)[0] for n, kind in optional.items() if get_origin(kind) is Champion},
            uses_champion=uses_champion,
            sources=sources,
            code=code,
            adds_to=adds_to,
            uses_earlier=uses_earlier,
            continues="previous" in hints,
            after=after,
            push=push,
            resumes="scratch" in hints,
            distributes="workers" in hints,
        )

    return declare


def _suggestion(unknown: str, known: Iterable[str]) -> str:
    """Return the name that a person probably meant, or else those of the innermost group that the unknown one names."""
    group, _, last = unknown.rpartition(".")
    among = [name.removeprefix(f"{group}.") for name in known if name.startswith(f"{group}.")]
    near = difflib.get_close_matches(last, among, n=1)
    choices = ", ".join(f"{group}.{choice}" for choice in near or among)
    return f"Did you mean {choices}?" if near else f"Expected one of {choices}."


def _is_artifact(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Artifact)


def members(names: Iterable[str], group: str) -> list[str]:
    """Return a group's inputs, ``<group>.0``, ``<group>.1`` and so on, in their order.

    Example:
        >>> members(["examples", "trials.10", "trials.9"], "trials")
        ['trials.9', 'trials.10']
    """
    found = [name for name in names if name.rpartition(".")[0] == group]
    return sorted(found, key=lambda name: int(name.rpartition(".")[2]))


def _leaves(params: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of all fields but locations, also nested ones, as JSON values by dotted name."""
    for name, value in params:
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        elif not type(params).model_fields[name].exclude:
            yield from flatten({f"{prefix}{name}": to_jsonable_python(value)})


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a nested mapping's leaves by dotted name.

    Example:
        >>> dict(flatten({"penalty": {"kind": "l2", "l2": 0.01}, "filters": [16, 32]}))
        {'penalty.kind': 'l2', 'penalty.l2': 0.01, 'filters': [16, 32]}
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
