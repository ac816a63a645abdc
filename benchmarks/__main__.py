"""Runs the benchmarks: ``python -m benchmarks [PART ...]``, all of them by default."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks import (
    airflow,
    cifar,
    compaction,
    engine,
    faults,
    images,
    inference,
    memory,
    records,
    scale,
    serving,
    spread,
    steps,
    sweep,
    tuned,
)
from ridgeline import pipeline
from ridgeline.settings import Settings

PARTS = {
    "steps": steps.main,
    "airflow": airflow.main,
    "engine": engine.main,
    "memory": memory.main,
    "cnn": engine.cnn,
    "sweep": sweep.main,
    "sparse": sweep.sparse,
    "compact": compaction.main,
    "warm": sweep.warm,
    "tuned": tuned.main,
    "records": records.main,
    "images": images.main,
    "inference": inference.main,
    "cifar": cifar.main,
    "faults": faults.main,
    "serving": serving.main,
    "spread": spread.main,
    "scale": scale.main,
}
ON_DEMAND = {"scale"}  # an hour, and 25 GB of disk


def main() -> None:
    """Prepare the data once, then print the table, each line as soon as it is measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Print what was measured, and the goal.")
    choices = f"Some of {', '.join(PARTS)}; by default all but {', '.join(ON_DEMAND)}."
    parser.add_argument("parts", nargs="*", metavar="PART", help=choices)
    wanted = parser.parse_args().parts or [part for part in PARTS if part not in ON_DEMAND]
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"expected some of {', '.join(PARTS)}; received {', '.join(unknown)}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    manual_dir = Settings().manual_dir
    steps.row("data", str(manual_dir or "synthetic: set RIDGELINE_MANUAL_DIR"), "goal")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(store=str(Path(folder) / "store"), manual_dir=manual_dir)
        plan = pipeline.plan("export")
        params = pipeline.parse_params(plan, {} if manual_dir else steps.SYNTHETIC, settings)
        refs = {r.execution.component: r.execution.output or "" for r in pipeline.run(settings, plan, params, "bench")}
        for part in wanted:
            start = time.monotonic()
            PARTS[part](settings, refs)
            steps.row(f"  measured in, part {part}", f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
