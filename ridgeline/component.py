"""The declaration of a pipeline step: its name, parameters, inputs, output and the function that does it."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, ValidationError, create_model

from ridgeline.artifacts.base import Artifact, Facts

# Set while a step runs, and read by TensorFlow when it first computes in a process. The order of a sum, and so its last
# bits, depends on the number of threads that share it; with one, results do not depend on the machine's cores.
ENVIRONMENT = {"TF_NUM_INTRAOP_THREADS": "1"}


class Params(BaseModel):
    """A step's parameters: frozen, unknown keys refused, defaults given.

    A field declared with ``exclude=True`` is a *location*: it tells where to find something, not what to
    compute, so it is no part of the step's key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def shown_as(**labels: str) -> dict[str, Any]:
    """Return a field's ``json_schema_extra`` that gives its values labels for people, as Airflow's form reads them.

    Args:
        **labels: Label of each value.
    """
    return {"values_display": labels}


class StepError(ValueError):
    """A step can't work with what it was given; another try would fail, too."""


class TransientStepError(StepError):
    """A step lacked something that may be there on another try, such as a network."""


class ParameterError(StepError):
    """A parameter is unknown, of the wrong type or out of its range."""


class StepSkipped(Exception):
    """Raised by a step that has a defined reason to yield nothing, such as a model that was not blessed."""


@dataclass(frozen=True)
class Component:
    """A typed, pure pipeline step: inputs and parameters in, one artifact's files out.

    Attributes:
        name: The step's name, also the first part of its parameters' names (``train.epochs``).
        run: The function; called with the input artifacts by name, ``params`` and ``output``.
        params: The type of its parameters.
        inputs: The artifact type of each named input.
        groups: The artifact type of each input of which there may be any number, also none. A group's artifacts are
            named ``<input>.0``, ``<input>.1`` and so on, wherever inputs are listed by name.
        output: The artifact type that it writes.
        resumes: Whether `run` takes ``scratch``: a folder that survives a failed or killed attempt and is handed
            to the next one with the same key, or None where there is none.
    """

    name: str
    run: Callable[..., Facts]
    params: type[Params]
    inputs: Mapping[str, type[Artifact[Any]]]
    output: type[Artifact[Any]]
    groups: Mapping[str, type[Artifact[Any]]] = field(default_factory=dict)
    resumes: bool = False

    @property
    def module(self) -> str:
        """The module whose code, with all that it imports, is part of the step's key."""
        return self.run.__module__

    def __call__(
        self, *, params: Params, output: Path, scratch: Path | None = None, **inputs: Artifact[Any]
    ) -> Artifact[Any]:
        """Run the step and seal what it wrote.

        Args:
            params: The step's parameters.
            output: An empty directory to write into.
            scratch: For a step that resumes: the folder of an earlier attempt's state; None for no such thing.
            **inputs: The input artifacts by name.

        Returns:
            The sealed output artifact.
        """
        for group in self.groups:
            inputs[group] = tuple(inputs.pop(name) for name in members(inputs, group))  # type: ignore[assignment]
        extra = {"scratch": scratch} if self.resumes else {}
        os.environ.update(ENVIRONMENT)
        return self.output.seal(output, self.run(**inputs, **extra, params=params, output=output))

    def parse(self, values: Mapping[str, Any]) -> Params:
        """Return validated parameters.

        Args:
            values: Parameter values by field name; nested fields as nested mappings.

        Raises:
            ParameterError: If a parameter is unknown, of the wrong type or out of its range.
        """
        try:  # as JSON: strict about types, and yet lists serve as tuples and texts as paths
            return self.params.model_validate_json(json.dumps(dict(values), default=str), strict=True)
        except ValidationError as error:
            raise ParameterError(self._explain(error)) from error

    def _explain(self, error: ValidationError) -> str:
        """Return pydantic's findings as one line each: what was expected, what was received, what to do."""
        known = [name for name, _ in flatten(self.params().model_dump())]
        lines = []
        for item in error.errors(include_url=False):
            name = ".".join([self.name, *map(str, item["loc"])])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name.removeprefix(f"{self.name}."), known, n=1)
                advice = "Did you mean" if near else "Expected one of"
                advice = f"{advice} {', '.join(f'{self.name}.{choice}' for choice in near or known)}."
                lines.append(f"Unknown parameter {name}. {advice}")
            elif item["type"] == "value_error":  # a validator of ours, whose message starts with the field's name
                lines.append(f"Parameter {name}.{item['ctx']['error']}")
            else:
                expected = (
                    item["msg"].replace("Input should be", "expected").replace("String should", "expected text to")
                )
                lines.append(f"Parameter {name}: {expected}; received {item['input']!r}.")
        return "\n".join(lines)

    def main(self, argv: list[str] | None = None) -> None:
        """Run the step by itself from the command line, on artifact directories.

        Args:
            argv: The arguments; those of the process if None.
        """
        from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource

        class CommandLine(BaseSettings):
            """Takes values from the command line alone, none from the environment."""

            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return (init_settings,)

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        paths: dict[str, Any] = {
            name: (DirectoryPath, Field(description=f"Directory of a {kind.__name__} artifact."))
            for name, kind in self.inputs.items()
        }
        paths |= {
            name: (list[DirectoryPath], Field([], description=f"Directories of {kind.__name__} artifacts, or none."))
            for name, kind in self.groups.items()
        }
        model = create_model(
            f"{self.name.capitalize()}Arguments",
            __base__=(self.params, CommandLine),
            __doc__=(inspect.getdoc(self.run) or "").split("\n\n")[0],
            output=(Path, Field(description="New directory for the output artifact.")),
            **paths,
        )
        settings: Any = {
            "cli_prog_name": f"python -m components.{self.name}",
            "cli_kebab_case": True,
            "cli_implicit_flags": True,
            "cli_enforce_required": True,
        }
        model.model_config |= settings
        try:
            arguments = CliApp.run(model, cli_args=argv)
            values = arguments.model_dump(exclude={"output", *self.inputs, *self.groups})
            values |= {n: getattr(arguments, n) for n, f in self.params.model_fields.items() if f.exclude}
            inputs = {name: kind.load(getattr(arguments, name)) for name, kind in self.inputs.items()}
            for name, kind in self.groups.items():
                inputs |= {f"{name}.{i}": kind.load(path) for i, path in enumerate(getattr(arguments, name))}
            artifact = self._write(self.parse(values), arguments.output, inputs)  # type: ignore[attr-defined]
        except ValidationError as error:
            raise SystemExit(f"error: {self._explain(error)}") from None
        except (ValueError, RuntimeError, OSError, ArithmeticError, StepSkipped) as error:
            raise SystemExit(f"error: {error}") from None
        print(f"{artifact.ref} in {artifact.path}")

    def _write(self, params: Params, output: Path, inputs: dict[str, Artifact[Any]]) -> Artifact[Any]:
        if output.exists():
            raise FileExistsError(f"Expected a new directory; received {output}, which exists. Name another.")
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
        staging.mkdir()
        scratch = output.with_name(f".{output.name}-scratch") if self.resumes else None
        try:
            if scratch:
                scratch.mkdir(exist_ok=True)
            self(params=params, output=staging, scratch=scratch, **inputs)
            staging.rename(output)
            if scratch:
                shutil.rmtree(scratch)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):  # an empty one is worth nothing
                if scratch:
                    scratch.rmdir()
        return self.output.load(output)


def component(*, output: type[Artifact[Any]]) -> Callable[[Callable[..., Facts]], Component]:
    """Declare a function as a pipeline step; its annotations name the inputs and the parameters.

    An input ``sweeps: tuple[SweepResult, ...]`` takes any number of artifacts. A function with a parameter
    ``scratch: Path | None`` is a step that resumes.

    Args:
        output: The artifact type that the function writes.

    Returns:
        A decorator that turns ``def train(examples: Examples, params: Params, output: Path) -> ModelFacts``
        into the `Component` named ``train``.
    """

    def declare(run: Callable[..., Facts]) -> Component:
        hints = get_type_hints(run)
        return Component(
            name=run.__name__,
            run=run,
            params=hints["params"],
            inputs={n: t for n, t in hints.items() if inspect.isclass(t) and issubclass(t, Artifact)},
            output=output,
            groups={n: get_args(t)[0] for n, t in hints.items() if get_origin(t) is tuple},
            resumes="scratch" in hints,
        )

    return declare


def members(names: Iterable[str], group: str) -> list[str]:
    """Return a group's inputs, ``<group>.0``, ``<group>.1`` and so on, in their order."""
    found = [name for name in names if name.rpartition(".")[0] == group]
    return sorted(found, key=lambda name: int(name.rpartition(".")[2]))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a nested mapping's leaves by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
