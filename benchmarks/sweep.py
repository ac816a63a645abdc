"""The sweep against as many fits of the notebook: 16 strengths of 2 epochs each, imports left out on both sides."""

from __future__ import annotations

from benchmarks.steps import python, row
from ridgeline.settings import Settings

NUM_STRENGTHS = 16
NOTEBOOK_FITS = 2  # as many are measured; the others would do the same work

NOTEBOOK = """
import json, sys, time
from pathlib import Path
import keras, tensorflow
from benchmarks.engine import notebook
from ridgeline.artifacts.examples import Examples
examples, seconds = Examples.load(Path(sys.argv[1])), []
for seed in range(int(sys.argv[2])):
    epoch = notebook(examples, seed)
    start = time.perf_counter()
    for number in (1, 2):
        epoch(number)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""
SWEEP = """
import json, sys, tempfile, time
from pathlib import Path
import keras, tensorflow
from components.sweep import sweep
from ridgeline.artifacts.examples import Examples
examples, params = Examples.load(Path(sys.argv[1])), sweep.parse({"dense": False})
start = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    facts = sweep(examples=examples, params=params, output=Path(folder)).facts
seconds = time.perf_counter() - start
best = facts.trials[facts.winner].metrics["val_accuracy"]
near = [t for t in facts.trials if t.metrics["val_accuracy"] >= best - 0.01]
print(json.dumps({"seconds": seconds, "trials": len(facts.trials), "winner": str(facts.trials[facts.winner]),
                  "reason": facts.reason, "sparsest": str(max(near, key=lambda t: t.zero_share)),
                  "zeros": max(t.zero_share for t in near)}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Where a store is in which the pipeline ran.
        refs: Store-relative name of each artifact, by step.
    """
    examples = str(settings.open_store().path(refs["transform"]))
    fits = python(NOTEBOOK, examples, str(NOTEBOOK_FITS))
    sweep = python(SWEEP, examples)
    assert sweep["trials"] == NUM_STRENGTHS
    notebook = NUM_STRENGTHS * sum(fits) / len(fits)
    measured = ", ".join(f"{seconds:.1f}" for seconds in fits)
    row(f"{NUM_STRENGTHS} notebook fits of 2 epochs, by {NOTEBOOK_FITS} of {measured} s", f"{notebook:.1f} s")
    row(f"sweep of {NUM_STRENGTHS} strengths, 2 epochs, with its report", f"{sweep['seconds']:.1f} s")
    row("  times faster", f"{notebook / sweep['seconds']:.1f}", "at least 6")
    row("  chosen on validation", sweep["winner"])
    row("  sparsest within 0.01 of it", f"{sweep['sparsest']}: {100 * sweep['zeros']:.1f} % zero")
