"""`SweepResult`: the same training under many penalties, and the one that validation chose."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts


class KernelFacts(Facts):
    """What is known of one trained kernel.

    Attributes:
        name: The layer's name.
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
    """One training: a point of the grid, and what came of it.

    Attributes:
        kind: Which strengths apply.
        l1: Factor of the sum of absolute weights; 0 where L1 does not apply.
        l2: Factor of the sum of squared weights; 0 where L2 does not apply.
        solver: How L1 acted.
        metrics: The kept epoch's metrics by Keras's names (``loss``, ``accuracy``, ``val_loss``,
            ``val_accuracy``); losses include the penalty. Empty if the training diverged.
        kernels: The penalized kernels, from input to output; empty if the training diverged.
        diverged: Where a loss became NaN or infinite; None if all were finite.
    """

    kind: Literal["none", "l1", "l2", "l1_l2"]
    l1: float
    l2: float
    solver: Literal["subgradient", "proximal"]
    metrics: dict[str, float]
    kernels: tuple[KernelFacts, ...]
    diverged: str | None

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

    @property
    def cross_entropy(self) -> float:
        """Mean cross-entropy on the validation split, in nats, of labels as trained: the loss less the penalty."""
        return self.metrics["val_loss"] - self.l1 * self.l1_norm - self.l2 * self.l2_norm**2

    def __str__(self) -> str:
        strengths = {"none": "", "l1": f" {self.l1:g}", "l2": f" {self.l2:g}", "l1_l2": f" {self.l1:g} + {self.l2:g}"}
        return f"{self.kind}{strengths[self.kind]}"


class SweepResultFacts(Facts):
    """What a sweep tried and chose, on the validation split alone.

    Attributes:
        dataset: tfds name and version of the dataset.
        examples_digest: Digest of the examples that all trials trained on.
        training: What all trials have in common: the training parameters, as `components.train` names them,
            without the penalty.
        trials: The grid's points, in its order.
        winner: Index of the chosen trial.
        winner_params: The chosen trial's training parameters: `training` with its penalty.
        reason: Why it was chosen.
        synthetic: Whether the images were drawn by the project itself.
    """

    dataset: str
    examples_digest: str
    training: dict[str, Any]
    trials: tuple[Trial, ...]
    winner: int
    winner_params: dict[str, Any]
    reason: str
    synthetic: bool


class SweepResult(Artifact[SweepResultFacts]):
    """The regularization path of a training.

    On disk::

        histograms.npy    int64 [trials, kernels, bins]: weights by value, exact zeros left out; a diverged
                          trial has none
        edges.npy         float64 [bins + 1]: the bins' limits; the outermost bins hold what lies beyond, too
        report.html       self-contained report; opens without a network
    """

    facts_type = SweepResultFacts

    @property
    def report(self) -> Path:
        """The report's path."""
        return self.path / "report.html"

    def histograms(self) -> np.ndarray:
        """Return the counts, int64 ``[trials, kernels, bins]``, memory-mapped."""
        return np.load(self.path / "histograms.npy", mmap_mode="r", allow_pickle=False)
