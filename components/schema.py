"""The step `schema`: what the examples must look like, inferred once and then kept, or edited by people."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from ridgeline.artifacts.example_statistics import ExampleStatistics
from ridgeline.artifacts.schema import SCHEMA, Range, Schema, SchemaFacts
from ridgeline.component import FOR_ONE_RUN, Champion, Source, SourceFolder, StepError, component, source_file
from ridgeline.component import Params as BaseParams

log = logging.getLogger(__name__)

# What an inferred schema allows.
MIN_PART = 0.6  # of the images of a class: a class that was halved has fewer
MARGIN = 0.2  # of brightness and contrast
MIN_MARGIN = 5.0  # pixel values


class Params(BaseParams):
    """Where the schema comes from."""

    file: str | None = Field(
        None,
        exclude=True,
        title="Schema file",
        description="A schema.json that you edited: a path or URL. Empty: the schema of the champion's examples, or, "
        "for the first model, one inferred from these examples.",
    )
    infer: bool = Field(
        False,
        title="Infer the schema again",
        description="Infer the schema from these examples, after an intended change such as a new class. It is kept "
        "for the following runs if the model is pushed.",
        json_schema_extra=FOR_ONE_RUN,
    )

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if self.file and self.infer:
            raise ValueError("expected infer=true or a file; received both. Leave one out.")
        return self


def find_sources(params: Params) -> Mapping[str, SourceFolder]:
    """Return the schema file, if there is one.

    Args:
        params: The parameters of `schema`.
    """
    return {"file": source_file(params.file)} if params.file else {}


@component(output=Schema, sources=find_sources, uses_champion=lambda params: not (params.file or params.infer))
def schema(
    statistics: ExampleStatistics,
    params: Params,
    output: Path,
    sources: Mapping[str, Source],
    champion: Champion[Schema] | None = None,
) -> SchemaFacts:
    """Read the schema file, keep the schema of the champion's examples, or infer one from these examples.

    Args:
        statistics: Statistics of the examples.
        params: Where the schema comes from.
        output: An empty directory; receives ``schema.json``.
        sources: The schema file, as it was listed.
        champion: The schema of the champion's examples; None if there is none.

    Returns:
        The schema.

    Raises:
        StepError: If the file is no schema, or the champion's schema can't be read.
    """
    if params.file:
        facts = _read(sources["file"])
    elif champion is None:
        facts = infer(statistics)
        log.info("inferred from %s", statistics.facts.dataset)
    elif champion.artifact:
        facts = champion.artifact.facts
        log.info("kept from the champion's examples")
    else:
        raise StepError(
            f"Cannot read the schema of the champion's examples ({champion.problem}). Set schema.file to a copy of it, "
            "or schema.infer=true to infer it from these examples."
        )
    values = facts.model_dump(mode="json")
    fewest = values["min_class_examples"]  # in a manifest, keys have another order
    values["min_class_examples"] = {name: fewest[name] for name in facts.class_names if name in fewest}
    (output / SCHEMA).write_text(f"{json.dumps(values, indent=2, ensure_ascii=False)}\n", encoding="utf-8")
    return facts


def infer(statistics: ExampleStatistics) -> SchemaFacts:
    """Return a schema that the examples fit, with some room.

    Args:
        statistics: Statistics of the examples. The training split decides.

    Returns:
        The classes and the shape as they are; 60 % of each class's images; brightness and contrast ± 20 %, at least
        5 pixel values.
    """
    facts = statistics.facts
    counts = dict(zip(facts.class_names, facts.splits["train"].class_counts, strict=True))
    return SchemaFacts(
        class_names=facts.class_names,
        image_shape=facts.image_shape,
        min_class_examples={name: int(MIN_PART * count) for name, count in counts.items()},
        brightness=_around(statistics.mean("brightness", "train")),
        contrast=_around(statistics.mean("contrast", "train")),
    )


def _around(value: float) -> Range:
    margin = max(MARGIN * value, MIN_MARGIN)
    return Range(min=round(max(0.0, value - margin), 1), max=round(min(255.0, value + margin), 1))


def _read(source: Source) -> SchemaFacts:
    (name,) = source.files
    try:
        return SchemaFacts.model_validate_json(source.read(name))
    except ValidationError as error:
        problems = "".join(
            f"\n  {'.'.join(map(str, problem['loc'])) or name}: {problem['msg']}" for problem in error.errors()
        )
        raise StepError(
            f"Expected a schema, as the step schema writes it, in {source.location}/{name}; received "
            f"{error.error_count()} problems. Correct them:{problems}"
        ) from None
