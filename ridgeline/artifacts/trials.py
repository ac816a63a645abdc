"""`Trials`: the same training under many penalties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import model_validator

from ridgeline.artifacts.base import Artifact, Facts


class KernelFacts(Facts):
    """What is known of one trained kernel.

    Attributes:
        name: Its name, see `ridgeline.artifacts.model.named_weights`.
        num_weights: Number of weights.
        num_zeros: Number of those that are exactly 0.0.
        l1_norm: ``sum(abs(w))``.
        l2_norm: ``sqrt(sum(w ** 2))``.
    """

    name: str
    num_weights: int
    num_zeros: int
    l1_norm: float
    l2_norm: float


class Trial(Facts):
    """One training: a point of the grid, and its outcome.

    Attributes:
        kind: The kind of penalty.
        strengths: Its strengths by name.
        solver: How the part of the penalty that is not smooth acted.
        metrics: The kept epoch's metrics by Keras's names (``loss``, ``accuracy``, ``val_loss``,
            ``val_accuracy``), and ``val_cross_entropy``; losses include all penalties, also the network's own. Empty
            if the training diverged.
        kernels: The penalized kernels, from input to output; empty if the training diverged.
        num_eliminated_pixels: Number of input pixels whose outgoing weights are all exactly zero.
        num_eliminated_units: Number of hidden units whose incoming or outgoing weights are all exactly zero.
        diverged: Where a loss became NaN or infinite; None if all were finite.
    """

    kind: str
    strengths: dict[str, float]
    solver: str
    metrics: dict[str, float]
    kernels: tuple[KernelFacts, ...]
    num_eliminated_pixels: int | None = None
    num_eliminated_units: int | None = None
    diverged: str | None

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_versions(cls, values: Any) -> Any:
        """Read what versions wrote that had L1 and L2 only, or that stated the penalty instead of the cross-entropy."""
        if not isinstance(values, dict) or ("strengths" in values and "penalty" not in values):
            return values
        old = dict(values)
        if "strengths" not in old:
            l1, l2 = old.pop("l1"), old.pop("l2")
            old["strengths"] = {name: value for name, value in {"l1": l1, "l2": l2}.items() if value}
            old["penalty"] = sum(l1 * kernel["l1_norm"] + l2 * kernel["l2_norm"] ** 2 for kernel in old["kernels"])
        penalty = old.pop("penalty")
        if metrics := old["metrics"]:
            old["metrics"] = {**metrics, "val_cross_entropy": metrics["val_loss"] - penalty}
        return old

    @property
    def strength(self) -> float:
        """The sum of its strengths, by which trials of one kind are compared."""
        return sum(self.strengths.values())

    @property
    def num_weights(self) -> int:
        """Number of weights of all kernels."""
        return sum(kernel.num_weights for kernel in self.kernels)

    @property
    def zero_share(self) -> float:
        """Share of all kernels' weights that are exactly 0.0, in [0, 1]."""
        return sum(kernel.num_zeros for kernel in self.kernels) / max(1, self.num_weights)

    @property
    def l1_norm(self) -> float:
        """``sum(abs(w))`` over all kernels."""
        return sum(kernel.l1_norm for kernel in self.kernels)

    @property
    def l2_norm(self) -> float:
        """``sqrt(sum(w ** 2))`` over all kernels."""
        return math.sqrt(sum(kernel.l2_norm**2 for kernel in self.kernels))

    def __str__(self) -> str:
        return f"{self.kind} {' + '.join(f'{strength:g}' for strength in self.strengths.values())}".rstrip()


class TrialsFacts(Facts):
    """The trainings of a grid of penalties, or of a part of it.

    Attributes:
        dataset: tfds name and version of the dataset.
        examples_digest: Digest of the examples that all trials trained on.
        training: The training parameters that all trials share: all but the penalty.
        trials: The grid's points, in its order.
        warm_start: Whether each trial but the strongest started from the weights of the next stronger one of its kind.
        synthetic: Whether the images were drawn by the project itself.
    """

    dataset: str
    examples_digest: str
    training: dict[str, Any]
    trials: tuple[Trial, ...]
    warm_start: bool = False
    synthetic: bool


class Trials(Artifact[TrialsFacts]):
    """The trainings of a grid of penalties.

    On disk::

        histograms.npy    int64 [trials, kernels, bins]: weights by value, exact zeros left out; a diverged
                          trial has none
        edges.npy         float64 [bins + 1]: the bins' limits; the outermost bins hold what lies beyond, too
    """

    facts_type = TrialsFacts

    def histograms(self) -> np.ndarray:
        """Return the counts, int64 ``[trials, kernels, bins]``, memory-mapped."""
        histograms: np.ndarray = np.load(self.path / "histograms.npy", mmap_mode="r", allow_pickle=False)
        return histograms

    def edges(self) -> np.ndarray:
        """Return the bins' limits, float64 ``[bins + 1]``."""
        edges: np.ndarray = np.load(self.path / "edges.npy", allow_pickle=False)
        return edges
