"""Faults that are planted into a folder of images: which of them stop a run, where, and for which reason."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from benchmarks.images import FOLDER
from benchmarks.steps import row
from ridgeline import pipeline
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.component import StepError
from ridgeline.settings import Settings

# The default network reaches about 0.4 on CIFAR-10.
GATE = {"evaluate.min_accuracy": 0.1, "evaluate.min_class_recall": 0.0}
SHARE = 0.05  # of a class that gets another label


class Fault(NamedTuple):
    """What is changed in the folder, and the check, or a part of the message, that should name it."""

    name: str
    plant: Callable[[Path], None]
    reason: str


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "train").iterdir())


def _files(folder: Path, *parts: str) -> list[Path]:
    return sorted(path for path in folder.joinpath(*parts).rglob("*") if path.is_file())


def _replace(file: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    """Replace a file, which may be a link to the original, by a changed image."""
    with Image.open(file) as image:
        changed = change(image)
    file.unlink()
    changed.save(file, quality=95)  # of a JPEG; a PNG has none


def relabel(folder: Path) -> None:
    """Move a share of one class's training images into another class."""
    one, other, *_ = _classes(folder)
    files = _files(folder, "train", one)
    for file in np.random.default_rng(1).permutation(np.array(files, object))[: int(SHARE * len(files))]:
        file.rename(folder / "train" / other / f"moved-{file.name}")


def leak(folder: Path) -> None:
    """Copy 200 test images into the training split."""
    for file in _files(folder, "test")[::7][:200]:
        os.link(file, folder / "train" / file.parent.name / f"copy-{file.name}")


def drop_class(folder: Path) -> None:
    """Remove a class."""
    last = _classes(folder)[-1]
    for split in ("train", "test"):
        shutil.rmtree(folder / split / last)


def halve_class(folder: Path) -> None:
    """Remove every second training image of a class."""
    for file in _files(folder, "train", _classes(folder)[3])[::2]:
        file.unlink()


def invert(folder: Path) -> None:
    """Invert all images."""
    for file in _files(folder):
        _replace(file, ImageOps.invert)


def darken(folder: Path) -> None:
    """Lower the brightness of all images by 40 %."""
    for file in _files(folder):
        _replace(file, lambda image: image.point(lambda value: int(value * 0.6)))


def truncate(folder: Path) -> None:
    """Cut off the second half of 20 files."""
    for file in _files(folder, "train")[::101][:20]:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[: len(content) // 2])


def resize(folder: Path) -> None:
    """Give 1 % of the files another size."""
    for file in _files(folder)[::100]:
        _replace(file, lambda image: image.resize((image.width + 8, image.height)))


def label_twice(folder: Path) -> None:
    """Copy one image into another class."""
    one, other, *_ = _classes(folder)
    file = _files(folder, "train", one)[0]
    os.link(file, folder / "train" / other / f"copy-{file.name}")


FAULTS = (
    Fault("200 test images copied into train", leak, "test images in training"),
    Fault("one class missing", drop_class, "missing classes"),
    Fault("all images inverted", invert, "mean image of the train split"),
    Fault("brightness of all images −40 %", darken, "brightness outside the schema"),
    Fault("20 truncated files", truncate, "received 20 unreadable ones"),
    Fault("one class halved", halve_class, "class has shrunk"),
    Fault("1 % of the files of another size", resize, "received 2 sizes"),
    Fault("one image with two labels", label_twice, "image with several labels"),
)


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step; its dataset is used if no folder is given.
    """
    print("\nPlanted faults")
    with tempfile.TemporaryDirectory() as temporary:
        clean = Path(temporary) / "clean"
        if FOLDER in os.environ:
            shutil.copytree(os.environ[FOLDER], clean)
        else:
            _write_images(settings.open_store().open(refs["ingest"], Dataset), clean)
        runs = _Runs(Settings(store=str(Path(temporary) / "store"), manual_dir=None))
        row("data", f"{len(_files(clean)):,} files, {os.environ.get(FOLDER, refs['ingest'])}", "stopped")
        row("no fault", runs.run("export", clean), "not stopped")
        for fault in FAULTS:
            folder = Path(temporary) / "faulty"
            shutil.copytree(clean, folder, copy_function=os.link)
            fault.plant(folder)
            found = runs.run("validate", folder)
            row(fault.name, found, fault.reason if fault.reason in found else f"MISSED: {fault.reason}")
            shutil.rmtree(folder)
        shutil.copytree(clean, folder, copy_function=os.link)
        relabel(folder)
        found = runs.run("label_errors", folder)
        row(f"{SHARE:.0%} of one class mislabelled", f"{found}; {runs.listed(folder)}", "listed after training")


def _write_images(dataset: Dataset, folder: Path) -> None:
    """Write a dataset as PNG files."""
    for split in ("train", "test"):
        part = dataset.split(split)
        for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            name = dataset.facts.class_names[label].replace("/", "_")
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / split / name / f"{number:05d}.png", compress_level=1)


class _Runs:
    """Runs of one pipeline on versions of a folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count = 0

    def run(self, target: str, folder: Path) -> str:
        """Run up to a step; return what stopped the run."""
        self.count += 1
        steps = pipeline.plan(target)
        values: dict[str, Any] = {
            "ingest.dataset": "folder",
            "ingest.name": "faults",
            "ingest.image_dir": str(folder),
            **GATE,
        }
        owners = {step.name for step in steps}
        params = pipeline.parse_params(
            steps, {name: value for name, value in values.items() if name.split(".")[0] in owners}, self.settings
        )
        try:
            for _ in pipeline.run(self.settings, steps, params, f"run {self.count}"):
                pass
        except StepError as error:
            record = pipeline.run_records(self.settings, f"run {self.count}").get("validate")
            if record is None or record.output is None:
                return f"ingest: {str(error).splitlines()[0].split('; ', 1)[1].split('. ')[0]}"
            facts = self.settings.open_store().open(record.output, ExampleAnomalies).facts
            errors = dict.fromkeys(finding.check for finding in facts.findings if finding.severity == "error")
            return f"validate: {', '.join(errors)}"
        return "not stopped"

    def listed(self, folder: Path) -> str:
        """Return how many of the relabelled images the last run listed."""
        record = pipeline.run_records(self.settings, f"run {self.count}")["label_errors"]
        store = self.settings.open_store()
        with (store.path(record.output or "") / "suspects.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        moved = len([file for file in _files(folder, "train") if file.name.startswith("moved-")])
        found = sum("/moved-" in found["file"] for found in rows)
        return f"{found} of {moved} are among {len(rows)} suspects"
