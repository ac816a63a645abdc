"""One of several workers that train together: a process of its own, since TensorFlow connects a process once.

Arguments: a JSON object with the folder of the examples, the addresses, the index, cases by name, and a folder for the
results: ``<case>.npz`` holds the kept weights and the history of each.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ridgeline import quiet_tensorflow
from ridgeline.component import STEP_ENVIRONMENT, Workers


def main():
    os.environ.update(STEP_ENVIRONMENT | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    quiet_tensorflow.install()
    import numpy as np

    from components.train import train
    from components.training import several_workers
    from components.training.checkpoint import Checkpoint
    from components.training.fit import fit
    from ridgeline.artifacts.examples import Examples

    given = json.loads(sys.argv[1])
    several_workers.START_SECONDS = given.get("start_seconds", several_workers.START_SECONDS)
    examples, results = Examples.load(Path(given["examples"])), Path(given["results"])
    workers = Workers(tuple(given["addresses"]), given["index"], given.get("key", ""))
    for name, values in given["cases"].items():
        params: Any = train.parse(values)
        checkpoint = Checkpoint(results / f"{name}.checkpoint") if workers.is_chief else None
        result = fit(several_workers.make_shared_engine(examples, params, workers), params, checkpoint)
        arrays: dict[str, Any] = {**result.history, "epoch": result.epoch}
        np.savez(results / f"{name}.{workers.index}.npz", *result.weights, **arrays)
    time.sleep(0.5)  # another worker may still read the last sum
    os._exit(0)


if __name__ == "__main__":
    main()
