"""Batch inference beside what a person would write: decode with Pillow, call ``model.predict``, keep the classes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.images import FOLDER
from benchmarks.steps import python, row
from ridgeline.settings import Settings

TURNS = 3
SMALL, PHOTOS = 10_000, 2_000
SCALE = 6  # as many times the files, for the memory

INFER = """
import json, re, shutil, sys, time
from pathlib import Path
start = time.perf_counter()
from ridgeline.artifacts.predictions import Predictions
from ridgeline.pipeline import parse_params, plan, run
from ridgeline.settings import Settings
settings, steps = Settings(store=sys.argv[1]), plan("infer")
store = settings.open_store()
shutil.rmtree(store.local / "sources", ignore_errors=True)  # as if the folder had never been read
params = parse_params(steps, {"infer.model": sys.argv[3], "infer.folder": sys.argv[4]}, settings)
(result,) = run(settings, steps, params, "bench", rerun=["infer"])
seconds = time.perf_counter() - start
count = store.open(result.execution.output, Predictions).facts.num_files
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"seconds": seconds, "count": count, "resident": peak}))
"""
LOOP = """
import json, re, sys, time
from pathlib import Path
start = time.perf_counter()
import numpy as np
from PIL import Image
from ridgeline.artifacts.model import Model
model = Model.load(Path(sys.argv[2])).load_keras()
(height, width, *channels), names = model.input_shape[1:], []
mode = "RGB" if channels else "L"
files = sorted(file for file in Path(sys.argv[4]).rglob("*") if file.is_file())
def decode(file):
    return np.asarray(Image.open(file).convert(mode).resize((width, height), Image.Resampling.BILINEAR))
if sys.argv[5] == "batches":
    for first in range(0, len(files), 32):
        images = np.stack([decode(file) for file in files[first : first + 32]])
        names += model.predict(images, verbose=0).argmax(axis=1).tolist()
else:
    images = np.stack([decode(file) for file in files])
    names += model.predict(images, batch_size=32, verbose=0).argmax(axis=1).tolist()
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"seconds": seconds, "count": len(names), "resident": peak}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store, which has a served model.
        refs: The artifacts of a whole run by step.
    """
    print("\nBatch inference: images a second, from the start of the process, decoding included")
    store = settings.open_store()
    (name,) = settings.open_registry().model_names()
    arguments = (settings.store, str(store.path(refs["train"])), name)
    with tempfile.TemporaryDirectory() as temporary:
        small, photos, large = (Path(temporary) / folder for folder in ("small", "photos", "large"))
        given = os.environ.get(FOLDER)
        folders = {f"JPEGs of 32×32{'' if given else ', drawn'}": small, "drawn JPEGs of 640×480": photos}
        _take(Path(given), small) if given else _draw(small, SMALL, (32, 32))
        _draw(photos, PHOTOS, (480, 640))
        for what, folder in folders.items():
            programs = {"infer": (INFER, ""), "batches": (LOOP, "batches"), "at once": (LOOP, "at once")}
            found: dict[str, list[dict[str, float]]] = {key: [] for key in programs}
            for _ in range(TURNS):
                for key, (program, how) in programs.items():
                    found[key].append(python(program, *arguments, str(folder), how))
            assert len({int(turn["count"]) for turns in found.values() for turn in turns}) == 1
            rate = {k: statistics.median(turn["count"] / turn["seconds"] for turn in v) for k, v in found.items()}
            row(f"infer, {found['infer'][0]['count']:,} {what}", f"{rate['infer']:,.0f} a second")
            for key, label in (("batches", "model.predict of each 32"), ("at once", "one model.predict of all")):
                times = f"{rate[key]:,.0f} a second: infer {rate['infer'] / rate[key]:.1f} times"
                row(f"  plain loop, {label}", times, ">= 2 times" if key == "batches" else "")
        before = python(INFER, *arguments, str(small), "")["resident"]
        for number in range(SCALE):
            shutil.copytree(small, large / str(number), copy_function=os.link)
        after = python(INFER, *arguments, str(large), "")
        row(f"resident memory of infer, {SCALE} times the files", f"{before:.0f} → {after['resident']:.0f} MiB", "flat")


def _take(source: Path, folder: Path) -> None:
    """Copy images, spread evenly over the classes."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    folder.mkdir()
    for number, file in enumerate(files[:: max(1, len(files) // SMALL)][:SMALL]):
        shutil.copy(file, folder / f"{number:06}{file.suffix}")


def _draw(folder: Path, count: int, shape: tuple[int, int]) -> None:
    """Draw smooth images with some noise, which take about as long to decode as photos."""
    from PIL import Image

    generator = np.random.default_rng(1)
    folder.mkdir()
    noise = generator.normal(0, 8, (*shape, 3))
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)) + noise
        Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)).save(folder / f"{number:06}.jpg", quality=90)
