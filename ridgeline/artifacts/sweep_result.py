"""`SweepResult`: the trials of a sweep, and the one that validation chose."""

from __future__ import annotations

from typing import Any

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.artifacts.trials import Trial


class SweepResultFacts(Facts):
    """What a sweep tried and chose, on the validation split alone.

    Attributes:
        dataset: tfds name and version of the dataset.
        examples_digest: Digest of the examples that all trials trained on.
        training: The training parameters that all trials share: all but the penalty.
        trials: The trials, by kind of penalty and strength.
        winner: Index of the chosen trial.
        winner_params: The chosen trial's training parameters: `training` with its penalty.
        reason: Why it was chosen.
        warm_start: Whether each trial but the strongest started from the weights of the next stronger one of its kind.
        synthetic: Whether the images were drawn by the project itself.
    """

    dataset: str
    examples_digest: str
    training: dict[str, Any]
    trials: tuple[Trial, ...]
    winner: int
    winner_params: dict[str, Any]
    reason: str
    warm_start: bool = False
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
    report_name = "report.html"

    def histograms(self) -> np.ndarray:
        """Return the counts, int64 ``[trials, kernels, bins]``, memory-mapped."""
        histograms: np.ndarray = np.load(self.path / "histograms.npy", mmap_mode="r", allow_pickle=False)
        return histograms
