"""The tuned profile's accuracy over seeds, through the pipeline itself: the only part that reads the test split."""

from __future__ import annotations

import statistics

from benchmarks.steps import SYNTHETIC, row
from ridgeline import pipeline
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.settings import Settings

GOALS = {"mlp": (5, ">= 0.905"), "cnn": (3, ">= 0.930")}  # number of seeds, and goal


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    del refs  # the pipeline finds them by itself
    store, plan = settings.open_store(), pipeline.plan("evaluate")
    for network, (num_seeds, goal) in GOALS.items():
        print(f"\nProfile tuned, network {network}")
        accuracies = []
        for seed in range(1, num_seeds + 1):
            values = {"train.network": network, "train.profile": "tuned", "train.seed": seed}
            params = pipeline.parse_params(plan, values | ({} if settings.manual_dir else SYNTHETIC), settings)
            results = pipeline.run(settings, plan, params, f"tuned-{network}-{seed}")
            done = {result.execution.component: result.execution for result in results}
            validation = store.open(done["train"].output or "", Model).facts.metrics["val_accuracy"]
            accuracies.append(store.open(done["evaluate"].output or "", ModelEvaluation).facts.accuracy)
            seconds = f"validation {validation:.4f}, trained in {done['train'].seconds:.0f} s"
            row(f"test accuracy of seed {seed}", f"{accuracies[-1]:.4f}, {seconds}")
        row("test accuracy, median of the seeds", f"{statistics.median(accuracies):.4f}", goal)
        row("  range", f"{min(accuracies):.4f} to {max(accuracies):.4f}")
