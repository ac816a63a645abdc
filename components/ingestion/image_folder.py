"""A folder of images: which files it holds, their classes and splits, and their pixels."""

from __future__ import annotations

import collections
import contextlib
import csv
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from components.ingestion.decoding import SUFFIXES
from components.ingestion.decoding_processes import decode_files
from components.ingestion.params import FOLDER, Params
from ridgeline.artifacts.dataset import FILES, Dataset, DatasetFacts, Unreadable, write_dataset_split
from ridgeline.component import Source, StepError

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
LABELS = "labels.csv"
NAMED = 20
BATCH_SIZE = 2_000


class FolderError(StepError):
    """A folder of images can't be used; the message names the files, classes or columns."""


@dataclass(frozen=True)
class Image:
    """An image file: its name in the folder, its SHA-256, its class and its split."""

    file: str
    digest: str
    label: str
    split: str


def ingest_folder(params: Params, source: Source, output: Path, previous: Dataset | None) -> DatasetFacts:
    """Decode a folder's images into arrays, those of the previous dataset left out.

    The images of a split are in the order of a digest of seed and content, so that any part of them is a random sample.

    Args:
        params: How to split and normalize.
        source: The folder as it was listed.
        output: Receives ``train``, ``test`` and ``files.json``.
        previous: A dataset that was made with the same parameters of an earlier content, or None.

    Returns:
        The dataset's facts.

    Raises:
        FolderError: If the layout is none of the three, a class is missing in a split, too many images are unreadable,
            or the images differ in size and ``image_size`` is empty.
    """
    images, unreadable = find_images(source, params)
    ordered = sorted(images, key=lambda image: (image.split, _order(image, params), image.file))
    known = _Rows(previous)
    new = [image.file for image in ordered if image.digest not in known.places]
    splits: dict[str, list[Image]] = {name: [] for name in SPLITS}
    with tempfile.TemporaryDirectory(prefix="decoded-", dir=output) as folder:
        pixels = _Pixels(Path(folder) / "pixels")
        decoded = decode_files(source, new, params, Path(folder))
        with pixels.path.open("wb") as file, contextlib.closing(decoded):
            for image in ordered:
                found, text = known.get(image.digest) or next(decoded)
                if found is None:
                    unreadable.append(Unreadable(file=image.file, reason=text))
                else:
                    splits[image.split].append(image)
                    pixels.append(found, text, file)
        log.info("%d images decoded, %d of the previous dataset kept", len(new), len(ordered) - len(new))
        return _write(params, source, output, splits, unreadable, pixels)


def _write(
    params: Params,
    source: Source,
    output: Path,
    splits: Mapping[str, list[Image]],
    unreadable: list[Unreadable],
    pixels: _Pixels,
) -> DatasetFacts:
    """Check what was decoded, and write the dataset."""
    unreadable.sort(key=lambda entry: entry.file)
    _expect_readable(unreadable, len(pixels.kinds), source, params)
    shape = pixels.shape(source)
    names = sorted({image.label for found in splits.values() for image in found})
    _expect_classes(names, splits, source, params)
    ids = {name: number for number, name in enumerate(names)}
    digests, listed, start = {}, {}, 0
    for name in sorted(splits):  # in the order in which they were decoded
        labels = np.array([ids[image.label] for image in splits[name]], np.int64)
        digests[name] = write_dataset_split(
            output / name, pixels.batches(start, labels), len(labels), shape, len(names)
        )
        listed[name] = [[image.file, image.digest, pixels.kinds[start + i]] for i, image in enumerate(splits[name])]
        start += len(labels)
    (output / FILES).write_text(json.dumps(listed, ensure_ascii=False, indent=0), encoding="utf-8")
    return DatasetFacts(
        name=f"{params.name}:{FOLDER}",
        image_shape=shape,
        class_names=tuple(names),
        splits={name: digests[name] for name in SPLITS},
        raw_files={},
        synthetic=False,
        formats=_most_common(pixels.kinds),
        unreadable=tuple(unreadable),
    )


def find_images(source: Source, params: Params) -> tuple[list[Image], list[Unreadable]]:
    """Return a folder's images with their classes and splits, and the image files that have none.

    Args:
        source: The folder as it was listed.
        params: The share and seed of the split, where the folder states none.

    Raises:
        FolderError: If the layout is none of the three.

    Example:
        >>> folder = Source("image_dir", "/shop", {"train/Bag/1.jpg": "a0", "test/Bag/2.jpg": "b1", "README": "c2"})
        >>> [(image.file, image.label, image.split) for image in find_images(folder, Params())[0]]
        [('train/Bag/1.jpg', 'Bag', 'train'), ('test/Bag/2.jpg', 'Bag', 'test')]
    """
    if LABELS in source.files:
        return _labelled(source, params)
    folders = {name.split("/")[0] for name in source.files if "/" in name}
    stated = folders & {*SPLITS}
    if stated and folders != {*SPLITS}:
        received = ", ".join(sorted(folders)[:NAMED])
        raise FolderError(
            f"Expected the folders train and test in {source.location}, or one folder for each class; received "
            f"{received}. Rename or move the others; `transform` splits off the validation images."
        )
    images, unreadable = [], []
    for name, digest in source.files.items():
        parts = name.split("/")
        depth = 2 if stated else 1
        if len(parts) <= depth:
            if PurePosixPath(name).suffix.lower() in SUFFIXES:
                unreadable.append(Unreadable(file=name, reason="in no folder of a class"))
            continue
        split = parts[0] if stated else _split(digest, params)
        images.append(Image(name, digest, parts[depth - 1], split))
    if not images:
        raise FolderError(
            f"Expected images in {source.location} as train/CLASS/ and test/CLASS/, as CLASS/, or named in {LABELS}; "
            f"received {len(source.files)} files, none in a folder of a class. Sort the images into folders."
        )
    return images, unreadable


def _labelled(source: Source, params: Params) -> tuple[list[Image], list[Unreadable]]:
    """Return the images that ``labels.csv`` names."""
    where = f"{source.location}/{LABELS}"
    try:
        rows = csv.DictReader(io.StringIO(source.read(LABELS).decode("utf-8-sig")))
        columns = rows.fieldnames or []
        if not {"path", "label"} <= {*columns} or {*columns} - {"path", "label", "split"}:
            raise FolderError(
                f"Expected the columns path, label and, if you like, split in {where}; received "
                f"{', '.join(columns) or 'none'}. Correct its first line."
            )
        listed = list(rows)
    except UnicodeDecodeError as error:
        raise FolderError(f"Expected UTF-8 text in {where}; received {error}. Save it as UTF-8.") from None
    except csv.Error as error:  # for example for a quotation mark that is never closed
        raise FolderError(f"Expected comma-separated values in {where}; received: {error}. Correct it.") from None
    images, unreadable, problems, seen = [], [], [], set()
    for number, row in enumerate(listed, start=2):
        file, label = (row["path"] or "").strip(), (row["label"] or "").strip()
        split = (row.get("split") or "").strip() or None
        if not label or not file or None in row or split not in (None, *SPLITS) or file in seen:
            problems.append(f"line {number}: {','.join(str(value or '') for value in row.values())[:80]}")
        elif file not in source.files:
            unreadable.append(Unreadable(file=file, reason=f"named in {LABELS}, but missing"))
        else:
            digest = source.files[file]
            images.append(Image(file, digest, label, split or _split(digest, params)))
        seen.add(file)
    if not images and not problems:
        problems = [f"{entry.file}: {entry.reason}" for entry in unreadable]
    if problems or not images:
        raise FolderError(
            f"Expected in each line of {where} a path in the folder, each once, a label, and train or test if there is "
            f"a split; received {len(problems)} other lines of {len(listed)}. Correct them:{_list(problems)}"
        )
    return images, unreadable


def _split(digest: str, params: Params) -> str:
    """Return the split of a content: the same wherever the file is, and whatever other files there are."""
    value = hashlib.sha256(f"{params.split_seed} split {digest}".encode()).digest()
    return "test" if int.from_bytes(value[:8]) < params.test_share * 2**64 else "train"


def _order(image: Image, params: Params) -> bytes:
    return hashlib.sha256(f"{params.split_seed} order {image.digest}".encode()).digest()


class _Rows:
    """The rows of an earlier dataset, by the SHA-256 of the file."""

    def __init__(self, dataset: Dataset | None) -> None:
        self.places: dict[str, tuple[str, int, str]] = {}
        self.images: dict[str, list[np.ndarray]] = {}
        if dataset is not None:
            for split, rows in dataset.files().items():
                self.images[split] = [images for images, _ in dataset.split(split).shards]
                self.places |= {digest: (split, row, kind) for row, (_, digest, kind) in enumerate(rows)}

    def get(self, digest: str) -> tuple[np.ndarray, str] | None:
        if digest not in self.places:
            return None
        split, row, kind = self.places[digest]
        for images in self.images[split]:
            if row < len(images):
                return images[row], kind
            row -= len(images)
        return None


class _Pixels:
    """Images one after another in a scratch file, so that memory does not grow with their number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: list[str] = []
        self.shapes: collections.Counter[tuple[int, ...]] = collections.Counter()

    def append(self, image: np.ndarray, kind: str, file: BinaryIO) -> None:
        """Append an image of a kind to the open file."""
        self.shapes[image.shape] += 1
        self.kinds.append(kind)
        if len(self.shapes) == 1:  # else they can't be used
            file.write(np.ascontiguousarray(image).data)

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of all images."""
        if len(self.shapes) > 1:
            sizes = collections.Counter[str]()
            for (height, width, *_), count in self.shapes.items():
                sizes[f"{height}×{width}"] += count
            found = ", ".join(f"{size} ({count:,})" for size, count in sizes.most_common(5))
            raise FolderError(
                f"Expected images of one height and width in {source.location}; received {len(sizes)} sizes: "
                f"{found}. Set ingest.image_size, for example to [64, 64]."
            )
        return next(iter(self.shapes))

    def batches(self, start: int, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images and labels from the scratch file, from an image on."""
        if not len(labels):
            return
        shape = next(iter(self.shapes))
        images = np.memmap(self.path, np.uint8, "r", shape=(len(self.kinds), *shape))
        for i in range(0, len(labels), BATCH_SIZE):
            part = labels[i : i + BATCH_SIZE]
            yield images[start + i : start + i + len(part)], part


def _expect_readable(unreadable: list[Unreadable], num_readable: int, source: Source, params: Params) -> None:
    share = len(unreadable) / max(1, len(unreadable) + num_readable)
    if not unreadable or share <= params.max_unreadable_share:
        return
    raise FolderError(
        f"Expected readable images in {source.location}; received {len(unreadable)} unreadable ones ({share:.2%}; "
        f"ingest.max_unreadable_share is {params.max_unreadable_share:.2%}). Replace or remove them, or raise that "
        f"share to go on without them:{_list([f'{entry.file}: {entry.reason}' for entry in unreadable], 1_000)}"
    )


def _expect_classes(names: list[str], splits: Mapping[str, list[Image]], source: Source, params: Params) -> None:
    counts = {split: collections.Counter(image.label for image in found) for split, found in splits.items()}
    few = [
        f"{name}: {counts[split][name]} in {split}"
        for name in names
        for split in SPLITS
        if counts[split][name] < params.min_class_images
    ]
    if few or len(names) < 2:
        raise FolderError(
            f"Expected at least 2 classes, each with {params.min_class_images} or more images in train and in test; "
            f"received {len(names)} classes in {source.location}. Add images, remove a class, or lower "
            f"ingest.min_class_images:{_list(few)}"
        )


def _list(lines: list[str], most: int = NAMED) -> str:
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


def _most_common(kinds: list[str]) -> dict[str, int]:
    counted = collections.Counter(kinds)
    common = dict(sorted(counted.most_common(NAMED)))
    others = len(kinds) - sum(common.values())
    return common | ({"others": others} if others else {})
