"""The memory of each step as the data grows: peak anonymous memory beyond the imports, a process for each step.

Anonymous memory (``RssAnon``) leaves out pages of files, which the system may drop at any time.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.steps import ROOT, environment, row
from ridgeline import pipeline
from ridgeline.artifacts.dataset import Dataset
from ridgeline.settings import Settings

SCALES = (0.1, 1, 10)
IMAGES_PER_HELD_OUT = 12  # training images for each that is held out for validation
NAME = "repeated_images"
LIBRARIES = {
    "ingest": "tensorflow_datasets",
    **dict.fromkeys(("train", "sweep", "evaluate", "label_errors", "export"), "keras"),
}  # that a step imports; the import is not measured
VALUES = {
    "ingest.dataset": f"{NAME}:1.0.0",
    "validate.accept_anomalies": "repeated on purpose",
    "train.epochs": 1,
    "evaluate.min_accuracy": 0.0,
    "evaluate.min_class_recall": 0.0,
}
SWEEP: dict[str, Any] = {"sweep.l1": [1e-4], "sweep.l2": []}

STEP = """
import importlib, itertools, json, os, sys
from ridgeline import pipeline, quiet_tensorflow
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.settings import Settings
name, extra, library, store, values, module, source, scale = sys.argv[1:]
os.environ.update(STEP_ENVIRONMENT)
quiet_tensorflow.install()
settings, steps = Settings(store=store, serving=f"{store}-serving"), pipeline.plan("export", extra.split())
params = pipeline.parse_params(steps, json.loads(values), settings)
before = [step.name for step in steps].index(name)
results = pipeline.run(settings, steps[: before + 1], params, "bench")
if library:
    importlib.import_module(library)
if name == "ingest":
    importlib.import_module(module).register(source, float(scale))
for result in itertools.islice(results, before):
    assert result.execution.state == "cached", result.execution
print("ready", flush=True)
sys.stdin.readline()
print(next(results).execution.state, flush=True)
"""


def register(source: str, scale: float) -> None:
    """Register a tfds dataset that yields the images of another one several times, or the first part of them.

    Args:
        source: Directory of a `Dataset` artifact.
        scale: How many times the images are yielded.
    """
    import tensorflow_datasets as tfds

    dataset = Dataset.load(Path(source))
    height, width, *channels = dataset.facts.image_shape
    shape = (height, width, *(channels or [1]))

    class RepeatedImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(names=list(dataset.facts.class_names)),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            return {name: self._generate_examples(name) for name in ("train", "test")}

        def _generate_examples(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
            split = dataset.split(name)
            number, end = 0, int(scale * len(split))
            while number < end:
                for images, labels in split.batches():
                    for image, label in zip(images.reshape(-1, *shape), labels.tolist(), strict=True):
                        if number < end:
                            yield number, {"image": image, "label": label}
                        number += 1


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    source = settings.open_store().path(refs["ingest"])
    counts = {name: split.num_examples for name, split in Dataset.load(source).facts.splits.items()}
    total = sum(counts.values())
    print(f"\nMemory of each step beyond its imports, data x{', x'.join(map(str, SCALES))} of {total:,} images")
    with tempfile.TemporaryDirectory() as folder:
        for name in [step.name for step in pipeline.plan("export", ["select"])]:
            peaks = []
            for scale in SCALES:
                held_out = int(scale * counts["train"]) // IMAGES_PER_HELD_OUT
                values = VALUES | SWEEP | {"transform.validation_examples": held_out}
                found = measure(name, "select", Path(folder) / str(scale), values, __name__, source, scale)
                peaks.append(found.peak)
            growth = (peaks[-1] - peaks[-2]) * 2**20 / ((SCALES[-1] - SCALES[-2]) * total)
            shown = ", ".join(f"{value:.0f}" for value in peaks)
            row(name, f"{shown} MiB; {growth:.0f} bytes an image at the end", "flat")


class Cost(NamedTuple):
    """What a step took: seconds, those of processors, and the growth of its anonymous memory, in MiB."""

    seconds: float
    processor: float
    peak: float


def measure(
    name: str, extra: str, store: Path, values: Mapping[str, Any], module: str, source: Path, scale: float
) -> Cost:
    """Run a step in a process; those before it have run.

    Args:
        name: The step.
        extra: Steps of the pipeline besides those that a model needs, separated by blanks.
        store: Folder of the store.
        values: Parameters of all steps.
        module: Its ``register`` registers the dataset, from the source and the scale.
        source: Where the images are.
        scale: How many.
    """
    arguments = [name, extra, LIBRARIES.get(name, ""), str(store), json.dumps(values), module, str(source), str(scale)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-c", STEP, *arguments],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        ready = process.stdout.readline()
        before = highest = _anonymous(process.pid)
        start, used = time.monotonic(), _processor_of_ended() + _processor_of(process.pid)
        if ready:  # else it has failed
            print("go", file=process.stdin, flush=True)
        while process.poll() is None:
            highest = max(highest, _anonymous(process.pid))
            time.sleep(0.002)
        seconds = time.monotonic() - start
        if process.returncode != 0 or process.stdout.readline() != "complete\n":
            errors.seek(0)
            raise SystemExit(errors.read())
    return Cost(seconds, _processor_of_ended() - used, highest - before)


def _processor_of_ended() -> float:
    """Return the seconds of processors that this process's ended children took."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def _processor_of(pid: int) -> float:
    """Return the seconds of processors that a running process and its ended children took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _anonymous(pid: int) -> float:
    """Return a process's anonymous memory in MiB; 0 if it has ended."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
