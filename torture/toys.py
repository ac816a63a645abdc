"""Three tiny steps, from a number to a servable model: a whole run takes milliseconds and needs no TensorFlow."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from pydantic import Field

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.artifacts.pushed_model import PushedModel, PushedModelFacts
from ridgeline.component import Champion, Params, component

MODEL_NAME = "toy"


class NumberFacts(Facts):
    """Number of digits."""

    digits: int

    @property
    def model_name(self) -> str:
        """The name in the registry."""
        return MODEL_NAME


class Number(Artifact[NumberFacts]):
    """A number in several files."""

    facts_type = NumberFacts


class DoubledFacts(NumberFacts):
    """The same of the doubled number."""


class Doubled(Artifact[DoubledFacts]):
    """The doubled number: in place of a trained model."""

    facts_type = DoubledFacts


class ToyParams(Params):
    """What a toy step does.

    Attributes:
        value: A number.
        seconds: How long the step works.
    """

    value: int = 21
    seconds: float = Field(0.0, ge=0)


@component(output=Number)
def seed(params: ToyParams, output: Path) -> NumberFacts:
    """Write a number."""
    (output / "parts").mkdir()
    for i in range(3):
        (output / "parts" / f"{i}.txt").write_text(str(params.value) * (i + 1))
        time.sleep(params.seconds / 3)
    return NumberFacts(digits=len(str(params.value)))


@component(output=Doubled)
def double(number: Number, params: ToyParams, output: Path, scratch: Path | None) -> DoubledFacts:
    """Double a number; resume from an unfinished attempt."""
    state = (scratch or output) / "half.txt"
    state.write_text("half")
    time.sleep(params.seconds / 2)
    value = int((number.path / "parts" / "0.txt").read_text())
    time.sleep(params.seconds / 2)
    if value != int((number.path / "parts" / "2.txt").read_text()[: len(str(value))]):
        raise ArithmeticError("read half of the input")
    if not scratch:
        state.unlink()
    (output / "number.txt").write_text(str(2 * value))
    (output / "more.bin").write_bytes(str(value).encode() * 1000)
    return DoubledFacts(digits=len(str(2 * value)))


@component(output=PushedModel)
def deliver(
    doubled: Doubled, params: ToyParams, output: Path, champion: Champion[Doubled] | None = None
) -> PushedModelFacts:
    """Write a servable model, judged against the champion."""
    number = (doubled.path / "number.txt").read_text()
    (output / "saved_model" / "variables").mkdir(parents=True)
    (output / "saved_model" / "saved_model.pb").write_text(number)
    (output / "saved_model" / "variables" / "variables.data-00000-of-00001").write_text(number * 500)
    (output / "saved_model" / "variables" / "variables.index").write_text(number * 5)
    (output / "check").mkdir()
    np.save(output / "check" / "images.npy", np.zeros((2, 3, 3), np.uint8))
    np.save(output / "check" / "probabilities.npy", np.full((2, 2), 0.5, np.float32))
    return PushedModelFacts(
        model_name=MODEL_NAME,
        model_digest=doubled.digest,
        evaluation_digest=doubled.digest,
        accuracy=0.5 + int(number) % 1000 / 2500,
        image_shape=(3, 3),
        class_names=("a", "b"),
        synthetic=True,
        champion=champion.artifact_digest if champion else None,
    )


STEPS = [seed, double, deliver]
