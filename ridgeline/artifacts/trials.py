"""`Trials`: the same training under many penalties."""

from __future__ import annotations

import math
from typing import Any

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
    """One training: a point of the grid, and its outcome.

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

    kind: str
    l1: float
    l2: float
    solver: str
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
        """Mean validation cross-entropy in nats, with the training's label smoothing: the loss less the penalty."""
        return self.metrics["val_loss"] - self.l1 * self.l1_norm - self.l2 * self.l2_norm**2

    def __str__(self) -> str:
        return f"{self.kind} {' + '.join(f'{strength:g}' for strength in (self.l1, self.l2) if strength)}".rstrip()


class TrialsFacts(Facts):
    """The trainings of a grid of penalties, or of a part of it.

    Attributes:
        dataset: tfds name and version of the dataset.
        examples_digest: Digest of the examples that all trials trained on.
        training: The training parameters that all trials share: all but the penalty.
        trials: The grid's points, in its order.
        synthetic: Whether the images were drawn by the project itself.
    """

    dataset: str
    examples_digest: str
    training: dict[str, Any]
    trials: tuple[Trial, ...]
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
