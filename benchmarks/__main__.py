"""Runs every benchmark: ``python -m benchmarks``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import engine, steps, sweep
from ridgeline import pipeline
from ridgeline.settings import Settings


def main() -> None:
    """Prepare the data once, then print each benchmark's table."""
    manual_dir = Settings().manual_dir
    values = {} if manual_dir else steps.SYNTHETIC
    print(f"data: {manual_dir or 'synthetic images; set RIDGELINE_MANUAL_DIR for the official ones'}")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(store=str(Path(folder) / "store"), manual_dir=manual_dir)
        plan = pipeline.plan("export")
        params = pipeline.parse_params(plan, values, settings)
        refs = {r.execution.component: r.execution.output or "" for r in pipeline.run(settings, plan, params, "bench")}
        steps.main(settings, refs)
        engine.main(settings, refs)
        sweep.main(settings, refs)


if __name__ == "__main__":
    main()
