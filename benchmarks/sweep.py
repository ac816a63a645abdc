"""The sweep against the same number of notebook fits, what L1 removes, and warm starts."""

from __future__ import annotations

import json
import statistics

from benchmarks.steps import python, row
from ridgeline.settings import Settings

NUM_STRENGTHS = 16
NOTEBOOK_FITS = 2  # fits that are measured in a round; the others would do the same work
ROUNDS = 3

# The same as in docs/regularization.md
SPARSE_TRAINING = {"batch_size": 2000, "epochs": 120, "learning_rate": 0.2, "momentum": 0.9, "schedule": "cosine"}
SPARSE = {"l1": [1.5e-4, 2e-4, 2.5e-4], "l2": [], "train": SPARSE_TRAINING}
CHOICE = {"tolerance": 0.01}

PATHS = {
    "l1": [1e-4, 3e-4, 1e-3, 3e-3],
    "l2": [1e-4, 1e-3, 1e-2, 3e-2],
    "group": [3e-5, 1e-4, 3e-4, 1e-3],
}
COLD_EPOCHS = 8
WARM_EPOCHS = (1, 2, 4)

NOTEBOOK = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
import keras, tensorflow
imported = time.perf_counter() - start
from benchmarks.engine import notebook
from ridgeline.artifacts.examples import Examples
examples, seconds = Examples.load(Path(sys.argv[1])), []
for seed in range(int(sys.argv[2])):
    epoch = notebook(examples, seed)
    start = time.perf_counter()
    for number in (1, 2):
        epoch(number)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"imports": imported, "fits": seconds}))
"""
SWEEP = """
import json, sys, tempfile, time
start = time.perf_counter()
from pathlib import Path
from ridgeline import quiet_tensorflow
quiet_tensorflow.install()
import keras, tensorflow
imported = time.perf_counter() - start
from components.select import select
from components.sweep import sweep
from ridgeline.artifacts.examples import Examples
examples, grid, choice = Examples.load(Path(sys.argv[1])), *(json.loads(text) for text in sys.argv[2:])
start = time.perf_counter()
with tempfile.TemporaryDirectory() as trained, tempfile.TemporaryDirectory() as chosen:
    trials = sweep(examples=examples, params=sweep.parse(grid), output=Path(trained))
    facts = select(params=select.parse(choice), output=Path(chosen), **{"trials.0": trials}).facts
trials = [{"name": str(t), "accuracy": t.metrics["val_accuracy"], "zeros": t.zero_share, "kind": t.kind,
           "loss": t.metrics["val_loss"]} for t in facts.trials]
winner = str(facts.trials[facts.winner])
seconds = time.perf_counter() - start
print(json.dumps({"imports": imported, "seconds": seconds, "trials": trials, "winner": winner}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the time of a sweep.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    examples = str(settings.open_store().path(refs["transform"]))
    notebooks, sweeps = [], []
    for _ in range(ROUNDS):
        notebooks.append(python(NOTEBOOK, examples, str(NOTEBOOK_FITS)))
        sweeps.append(python(SWEEP, examples, json.dumps({"dense": False}), "{}"))
    assert all(len(sweep["trials"]) == NUM_STRENGTHS for sweep in sweeps)
    fit = statistics.median(seconds for notebook in notebooks for seconds in notebook["fits"])
    seconds = statistics.median(sweep["seconds"] for sweep in sweeps)
    imports = [statistics.median(run["imports"] for run in runs) for runs in (notebooks, sweeps)]
    print(f"\nA sweep of {NUM_STRENGTHS} strengths, 2 epochs each: medians of {ROUNDS} rounds, in turns")
    row("one fit of the notebook", f"{fit:.2f} s")
    row("sweep, with its compilation and its report", f"{seconds:.2f} s")
    row(f"  times faster than {NUM_STRENGTHS} fits", f"{NUM_STRENGTHS * fit / seconds:.1f}", ">= 11")
    row("imports: notebook, sweep", f"{imports[0]:.2f} s, {imports[1]:.2f} s")
    whole = (imports[0] + NUM_STRENGTHS * fit) / (imports[1] + seconds)
    row("  times faster, imports included", f"{whole:.1f}", ">= 11")
    row("  chosen on validation", sweeps[0]["winner"])


def sparse(settings: Settings, refs: dict[str, str]) -> None:
    """Print how sparse L1 makes the network, and what that costs.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    sweep = python(SWEEP, str(settings.open_store().path(refs["transform"])), json.dumps(SPARSE), json.dumps(CHOICE))
    dense = sweep["trials"][0]["accuracy"]
    print("\nSparsity: a sweep of L1 strengths; the sparsest within 0.01 of the best validation accuracy wins")
    for trial in sweep["trials"]:
        accuracy = f"validation {trial['accuracy']:.4f} ({trial['accuracy'] - dense:+.4f})"
        row(trial["name"], f"{100 * trial['zeros']:.1f} % zero, {accuracy}")
    winner = next(trial for trial in sweep["trials"] if trial["name"] == sweep["winner"])
    row(f"chosen: {winner['name']}", f"{100 * winner['zeros']:.1f} % zero", ">= 80 % within 0.01")


def warm(settings: Settings, refs: dict[str, str]) -> None:
    """Print how many epochs warm starts save along the strengths of each penalty.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    examples = str(settings.open_store().path(refs["transform"]))
    print(f"\nWarm starts: {', '.join(f'{len(v)} strengths of {k}' for k, v in PATHS.items())}; means")
    reached: dict[str, float] = {}
    for start, epochs in (("cold", COLD_EPOCHS), *(("warm", epochs) for epochs in WARM_EPOCHS)):
        grid = {"dense": False, **PATHS, "warm_start": start == "warm", "train": {"epochs": epochs}}
        swept = python(SWEEP, examples, json.dumps(grid), "{}")
        row(f"{start}, {epochs} epochs each", f"{swept['seconds']:.1f} s")
        for kind in PATHS:
            trials = [trial for trial in swept["trials"] if trial["kind"] == kind]
            loss, accuracy, zeros = (sum(t[n] for t in trials) / len(trials) for n in ("loss", "accuracy", "zeros"))
            found = f"loss {loss:.4f}, accuracy {accuracy:.4f}, {100 * zeros:.1f} % zero"
            beside = "at most cold" if loss <= reached.get(kind, loss) else "above cold"
            row(f"  {kind}", found, beside if start == "warm" else "")
            reached.setdefault(kind, loss)
