"""The tuned profile's accuracy over seeds, through the pipeline itself: the only part that reads the test split."""

from __future__ import annotations

import statistics

from benchmarks.steps import SYNTHETIC, row
from ridgeline import pipeline
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.settings import Settings

SEEDS = (1, 2, 3, 4, 5)


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    del refs  # the pipeline finds them by itself
    store, plan, accuracies = settings.open_store(), pipeline.plan("evaluate"), []
    print("\nProfile tuned")
    for seed in SEEDS:
        values = {"train.profile": "tuned", "train.seed": seed} | ({} if settings.manual_dir else SYNTHETIC)
        params = pipeline.parse_params(plan, values, settings)
        done = {r.execution.component: r.execution for r in pipeline.run(settings, plan, params, f"tuned-{seed}")}
        validation = store.open(done["train"].output or "", Model).facts.metrics["val_accuracy"]
        accuracies.append(store.open(done["evaluate"].output or "", ModelEvaluation).facts.accuracy)
        seconds = f"validation {validation:.4f}, trained in {done['train'].seconds:.0f} s"
        row(f"test accuracy of seed {seed}", f"{accuracies[-1]:.4f}, {seconds}")
    row("test accuracy, median of the seeds", f"{statistics.median(accuracies):.4f}", ">= 0.900")
    row("  range", f"{min(accuracies):.4f} to {max(accuracies):.4f}")
