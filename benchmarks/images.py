"""A folder of images: the first ingest beside tfds's own, an unchanged folder, added files, memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.steps import python, row
from ridgeline.settings import Settings

FOLDER = "RIDGELINE_BENCH_IMAGES"  # train/<class>/ and test/<class>/; drawn images without it
DRAWN_PER_CLASS = {"train": 500, "test": 100}
COPIES = 10

TFDS = """
import json, sys, time
import tensorflow, tensorflow_datasets as tfds
start = time.perf_counter()
builder, count = tfds.ImageFolder(sys.argv[1]), 0
for split in ("train", "test"):
    for batch in tfds.as_numpy(builder.as_dataset(split=split, batch_size=2000)):
        count += len(batch["label"])
print(json.dumps({"seconds": time.perf_counter() - start, "count": count}))
"""
STEPS = """
import json, re, sys, threading, time
from pathlib import Path
from ridgeline.pipeline import parse_params, plan, run
from ridgeline.settings import Settings
settings, steps = Settings(store=sys.argv[2]), plan(sys.argv[3])
values = {"ingest.dataset": "folder", "ingest.name": "bench", "ingest.image_dir": sys.argv[1]}
values["transform.validation_examples"] = 100
values["validate.accept_anomalies"] = "copies, on purpose"
owners = {step.name for step in steps}
params = parse_params(steps, {n: v for n, v in values.items() if n.split(".")[0] in owners}, settings)
seconds, peaks, peak = {}, {}, 0.0

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
for result in run(settings, steps, params, "bench"):
    name = result.execution.component
    seconds[name], peaks[name], peak = time.perf_counter() - start, max(peak, status("RssAnon")), 0.0
    start = time.perf_counter()
print(json.dumps({"seconds": seconds, "anonymous": peaks, "resident": status("VmHWM")}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Not used.
        refs: Not used.
    """
    print("\nA folder of images")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = scratch / "images"
        if FOLDER in os.environ:
            shutil.copytree(os.environ[FOLDER], folder)
        else:
            _draw(folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        row("data", f"{len(files):,} files, {os.environ.get(FOLDER, f'drawn: set {FOLDER}')}")

        tfds = python(TFDS, str(folder))["seconds"]
        first = python(STEPS, str(folder), str(scratch / "store"), "transform")["seconds"]
        ours = first["ingest"] + first["transform"]
        row("tfds.ImageFolder and as_dataset, read through", f"{tfds:.2f} s")
        row("first ingest and transform", f"{ours:.2f} s, {ours / tfds:.2f} times", "<= 1 times")
        again = python(STEPS, str(folder), str(scratch / "store"), "ingest")["seconds"]["ingest"]
        row("ingest of the unchanged folder", f"{again:.2f} s", "< 1.5 s")
        for file in files[::100]:
            shutil.copy(file, file.with_name(f"added-{file.name}"))
            with file.with_name(f"added-{file.name}").open("ab") as end:
                end.write(file.name.encode())  # other bytes after the end of the image
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        added = python(STEPS, str(folder), str(scratch / "store"), "ingest")["seconds"]["ingest"]
        row("ingest after 1 % of the files were added", f"{added:.2f} s, {added / first['ingest']:.2f} times", "< 0.2")

        small = python(STEPS, str(folder), str(scratch / "small"), "validate")
        for number in range(1, COPIES):
            for file in files:
                os.link(file, file.with_name(f"{number}-{file.name}"))
        large = python(STEPS, str(folder), str(scratch / "large"), "validate")
        for name, peak in large["anonymous"].items():
            change = f"{small['anonymous'][name]:.0f} → {peak:.0f} MiB in {large['seconds'][name]:.1f} s"
            row(f"peak anonymous memory of {name}, {COPIES} times the files", change, "flat")
        each = (large["anonymous"]["ingest"] - small["anonymous"]["ingest"]) * 2**20 / (len(files) * (COPIES - 1))
        row("memory of ingest for each file: its name and SHA-256", f"{each:.0f} bytes")
        change = f"{small['resident']:.0f} → {large['resident']:.0f} MiB"
        row("peak resident memory up to validate, with pages of files", change, "flat")


def _draw(folder: Path) -> None:
    from PIL import Image

    generator = np.random.default_rng(1)
    for split, count in DRAWN_PER_CLASS.items():
        for name in range(10):
            (folder / split / f"class {name}").mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class {name}" / f"{number}.jpg")
