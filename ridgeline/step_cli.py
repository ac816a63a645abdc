"""The command ``ridgeline step NAME``: runs one step by itself, on artifact directories."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from pydantic import DirectoryPath, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource

from ridgeline import worker_process
from ridgeline.artifacts.base import Artifact
from ridgeline.component import Champion, Component, Params, StepSkipped, Workers
from ridgeline.files import move
from ridgeline.keys import key_parts
from ridgeline.masking import mask
from ridgeline.sources import read_sources


class _CommandLine(BaseSettings):
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


def run_step(component: Component, arguments: list[str], workers: Workers | None = None) -> Artifact[Any] | None:
    """Run a step with the inputs and parameters of a command line.

    Args:
        component: The step.
        arguments: For example ``["--dataset", "folder", "--output", "new"]``; ``--help`` describes them.
        workers: For a step that distributes: the processes that run it together; None for one.

    Returns:
        The output artifact, in the directory that ``--output`` names; None on a worker that is not the chief, which
        writes nothing.

    Raises:
        SystemExit: If an argument is bad or the step fails; nothing is left behind but a step's scratch folder.
    """
    singles = {**component.inputs, **component.optional, **component.champions}
    model = _arguments_type(component)
    try:
        given: Any = CliApp.run(model, cli_args=arguments)
        values = given.model_dump(exclude={"output", *singles, *component.groups})
        values |= {name: getattr(given, name) for name, field in component.params.model_fields.items() if field.exclude}
        paths = {name: getattr(given, name) for name in singles}
        inputs: dict[str, Any] = {name: kind.load(paths[name]) for name, kind in singles.items() if paths[name]}
        inputs |= {name: Champion(inputs[name].digest, inputs[name]) for name in component.champions if name in inputs}
        for name, kind in component.groups.items():
            inputs |= {f"{name}.{i}": kind.load(path) for i, path in enumerate(getattr(given, name))}
        return _write(component, component.parse(values), given.output, inputs, workers)
    except ValidationError as error:
        raise SystemExit(f"error: {component.explain(error)}") from None
    except (ValueError, RuntimeError, OSError, ArithmeticError, StepSkipped) as error:
        raise SystemExit(f"error: {mask(error)}") from None


def _arguments_type(component: Component) -> Any:
    """Return the type of a step's command line: its parameters, a directory for each input, the output."""
    paths: dict[str, Any] = {
        name: (DirectoryPath, Field(description=f"Directory of a {kind.__name__} artifact."))
        for name, kind in component.inputs.items()
    }
    paths |= {
        name: (DirectoryPath | None, Field(None, description=f"Directory of a {kind.__name__} artifact, or none."))
        for name, kind in {**component.optional, **component.champions}.items()
    }
    paths |= {
        name: (list[DirectoryPath], Field([], description=f"Directories of {kind.__name__} artifacts."))
        for name, kind in component.groups.items()
    }
    model: Any = create_model(
        f"{component.name.capitalize()}Arguments",
        __base__=(component.params, _CommandLine),
        __doc__=(inspect.getdoc(component.run) or "").split("\n\n")[0],
        output=(Path, Field(description="New directory for the output artifact.")),
        **paths,
    )
    settings: Any = {
        "cli_prog_name": f"ridgeline step {component.name}",
        "cli_kebab_case": True,
        "cli_implicit_flags": True,
        "cli_enforce_required": True,
    }
    model.model_config |= settings
    return model


def _write(
    component: Component, params: Params, output: Path, inputs: dict[str, Any], workers: Workers | None
) -> Artifact[Any] | None:
    if workers:
        workers = dataclasses.replace(workers, key=key_parts(component, inputs, params, workers=workers).key())
        if not workers.is_chief:
            with tempfile.TemporaryDirectory() as folder:
                worker_process.run_in_process(component, workers, params=params, output=Path(folder), **inputs)
            return None
    if output.exists():
        raise FileExistsError(f"Expected a new directory; received {output}, which exists. Name another.")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
    staging.mkdir()
    scratch = output.with_name(f".{output.name}-scratch") if component.resumes else None
    try:
        if scratch:
            scratch.mkdir(exist_ok=True)
        sources = read_sources(component, params, cache=None, inputs=inputs)
        if workers:
            worker_process.run_in_process(component, workers, params=params, output=staging, scratch=scratch, **inputs)
        else:
            component(params=params, output=staging, scratch=scratch, sources=sources, **inputs)
        move(staging, output)
        if scratch:
            shutil.rmtree(scratch)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # only an empty one
            if scratch:
                scratch.rmdir()
    return component.output.load(output)
