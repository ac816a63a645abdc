"""A folder of images: which files it holds, their classes and splits, and their pixels."""

from __future__ import annotations

import array
import collections
import csv
import hashlib
import io
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from components.ingestion.beam import BeamDecoder
from components.ingestion.decoding_processes import Decoded, Decoder
from components.ingestion.decoding_worker import Kind
from components.ingestion.params import FOLDER, Params
from ridgeline.artifacts.dataset import FILES, Dataset, DatasetFacts, Unreadable, write_dataset_split, write_files
from ridgeline.artifacts.examples import Split, batch_size
from ridgeline.component import Source, StepError
from ridgeline.image_decoding import SUFFIXES

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
LABELS = "labels.csv"
NAMED = 20
Reader = Callable[[int, int], np.ndarray]  # returns the images from one row to before another


class FolderError(StepError):
    """A folder of images can't be used; the message names the files, classes or columns."""


class Image(NamedTuple):
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
    known = _Known(previous)
    num_new = sum(digest not in known.rows for digest in source.files.values())
    with (
        tempfile.TemporaryDirectory(prefix="decoded-", dir=output) as folder,
        _decoder(source, params, Path(folder), num_new) as decoder,
    ):
        images, unreadable = find_images(source, params)
        images = _ordered(images, params)
        decoded = decoder.decode([image.file for image in images if image.digest not in known.rows])
        pixels = _Pixels(images, known, decoded)
        log.info("%d images decoded, %d of the previous dataset kept", len(decoded.codes), pixels.num_known)
        unreadable += [
            Unreadable(file=images[row].file, reason=pixels.kinds[pixels.codes[row]][1])
            for row in np.flatnonzero(~pixels.readable).tolist()
        ]
        return _write(params, source, output, images, unreadable, pixels)


def _decoder(source: Source, params: Params, scratch: Path, num_files: int) -> Decoder | BeamDecoder:
    if params.beam_pipeline_options:
        return BeamDecoder(source, params, scratch)
    return Decoder(source, params, scratch, num_files)


def _write(
    params: Params,
    source: Source,
    output: Path,
    images: list[Image],
    unreadable: list[Unreadable],
    pixels: _Pixels,
) -> DatasetFacts:
    """Check what was decoded, and write the dataset."""
    unreadable.sort(key=lambda entry: entry.file)
    readable = np.flatnonzero(pixels.readable)
    _expect_readable(unreadable, len(readable), source, params)
    shape = pixels.shape(source)
    found = [images[row] for row in readable.tolist()]
    names = sorted({image.label for image in found})
    ids = {name: number for number, name in enumerate(names)}
    labels = np.fromiter((ids[image.label] for image in found), np.int64, len(found))
    in_split = {name: np.fromiter((image.split == name for image in found), bool, len(found)) for name in SPLITS}
    counts = {name: np.bincount(labels[own], minlength=len(names)).tolist() for name, own in in_split.items()}
    _expect_classes(names, counts, source, params)
    kinds = [kind for _, kind in pixels.kinds]
    digests, listed = {}, {}
    for name in sorted(SPLITS):
        own = np.flatnonzero(in_split[name])
        digests[name] = write_dataset_split(
            output / name, pixels.batches(readable[own], labels[own], shape), len(own), shape, len(names)
        )
        codes = pixels.codes[readable[own]].tolist()
        listed[name] = (
            (found[row].file, found[row].digest, kinds[code]) for row, code in zip(own.tolist(), codes, strict=True)
        )
    write_files(output / FILES, listed)
    formats = collections.Counter[str]()
    for code, count in enumerate(np.bincount(pixels.codes[readable]).tolist()):
        formats[kinds[code]] += count
    return DatasetFacts(
        name=f"{params.name}:{FOLDER}",
        image_shape=shape,
        class_names=tuple(names),
        splits={name: digests[name] for name in SPLITS},
        raw_files={},
        synthetic=False,
        resampling=params.resampling,
        background=params.background,
        max_image_pixels=params.max_image_pixels,
        formats=_most_common(+formats),
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
        images.append(Image(name, digest, sys.intern(parts[depth - 1]), sys.intern(split)))
    if not images:
        raise FolderError(
            f"Expected images in {source.location} as train/CLASS/ and test/CLASS/, as CLASS/, or named in {LABELS}; "
            f"received {len(source.files)} files, none in a folder of a class. Sort the images into folders."
        )
    return images, unreadable


def _labelled(source: Source, params: Params) -> tuple[list[Image], list[Unreadable]]:
    """Return the images that ``labels.csv`` names."""
    where = f"{source.location}/{LABELS}"
    images, unreadable, problems, seen, num_rows = [], [], [], set(), 0
    for num_rows, row in enumerate(_label_rows(source, where), start=1):
        file, label = (row["path"] or "").strip(), (row["label"] or "").strip()
        split = (row.get("split") or "").strip() or None
        if not label or not file or None in row or split not in (None, *SPLITS) or file in seen:
            problems.append(f"line {num_rows + 1}: {','.join(str(value or '') for value in row.values())[:80]}")
        elif file not in source.files:
            unreadable.append(Unreadable(file=file, reason=f"named in {LABELS}, but missing"))
        else:
            digest = source.files[file]
            images.append(Image(file, digest, sys.intern(label), sys.intern(split or _split(digest, params))))
        seen.add(file)
    if not images and not problems:
        problems = [f"{entry.file}: {entry.reason}" for entry in unreadable]
    if problems or not images:
        raise FolderError(
            f"Expected in each line of {where} a path in the folder, each once, a label, and train or test if there is "
            f"a split; received {len(problems)} other lines of {num_rows}. Correct them:{_list(problems)}"
        )
    return images, unreadable


def _label_rows(source: Source, where: str) -> Iterator[dict[str, str]]:
    """Yield the rows of ``labels.csv``."""
    try:
        rows = csv.DictReader(io.StringIO(source.read(LABELS).decode("utf-8-sig")))
        columns = rows.fieldnames or []
        if not {"path", "label"} <= {*columns} or {*columns} - {"path", "label", "split"}:
            raise FolderError(
                f"Expected the columns path, label and, if you like, split in {where}; received "
                f"{', '.join(columns) or 'none'}. Correct its first line."
            )
        yield from rows
    except UnicodeDecodeError as error:
        raise FolderError(f"Expected UTF-8 text in {where}; received {error}. Save it as UTF-8.") from None
    except csv.Error as error:  # for example for a quotation mark that is never closed
        raise FolderError(f"Expected comma-separated values in {where}; received: {error}. Correct it.") from None


def _split(digest: str, params: Params) -> str:
    """Return the split of a content: the same wherever the file is, and whatever other files there are."""
    value = hashlib.sha256(f"{params.split_seed} split {digest}".encode()).digest()
    return "test" if int.from_bytes(value[:8]) < params.test_share * 2**64 else "train"


def _ordered(images: list[Image], params: Params) -> list[Image]:
    """Return images by split, by a digest of seed and content, and by file."""
    images = sorted(images, key=lambda image: image.file)
    names = sorted(SPLITS)
    splits = np.fromiter((names.index(image.split) for image in images), np.int8, len(images))
    text, digests = f"{params.split_seed} order ", bytearray()
    for image in images:
        digests += hashlib.sha256(f"{text}{image.digest}".encode()).digest()
    return [images[row] for row in np.lexsort((np.frombuffer(digests, "S32"), splits))]


class _Known:
    """The images of an earlier dataset.

    Attributes:
        rows: For the SHA-256 of each file: its place among all images, split after split.
        splits: The splits.
        kinds: The kinds of the files.
        codes: For each image, its place in `kinds`.
    """

    def __init__(self, dataset: Dataset | None) -> None:
        self.rows: dict[str, int] = {}
        self.splits: list[Split] = []
        kinds: dict[Kind, int] = {}
        codes = array.array("q")
        names: dict[str, None] = {}
        if dataset is not None:
            for row, (split, _, digest, kind) in enumerate(dataset.each_file()):
                self.rows[digest] = row
                codes.append(kinds.setdefault((dataset.facts.image_shape, kind), len(kinds)))
                names[split] = None
            self.splits = [dataset.split(name) for name in names]
        self.kinds, self.codes = list(kinds), np.array(codes, np.int64)


class _Pixels:
    """The pixels of images: those of an earlier dataset, and those that were decoded.

    Attributes:
        kinds: The kinds of images and of unreadable files, as in `Decoded`.
        codes: For each image, its place in `kinds`.
        readable: Whether each image is readable.
        num_known: The number of images of the earlier dataset.
    """

    def __init__(self, images: list[Image], known: _Known, decoded: Decoded) -> None:
        rows = np.fromiter((known.rows.get(image.digest, -1) for image in images), np.int64, len(images))
        is_new = rows < 0
        self.num_known = len(rows) - int(np.count_nonzero(is_new))
        self.kinds = known.kinds + decoded.kinds
        self.codes = np.empty(len(rows), np.int64)
        self.codes[~is_new] = known.codes[rows[~is_new]]
        self.codes[is_new] = decoded.codes + len(known.kinds)
        is_image = np.array([shape is not None for shape, _ in self.kinds], bool)
        self.readable = is_image[self.codes] if len(rows) else np.empty(0, bool)
        self._readers: list[Reader] = [
            lambda start, stop, split=split: split.rows(start, stop)[0]  # type: ignore[misc]
            for split in known.splits
        ]
        if decoded.images is not None:
            self._readers.append(decoded.images.read)
        ends = np.cumsum([len(split) for split in known.splits], dtype=np.int64)
        self._reader = np.searchsorted(ends, rows, "right")  # for each image, where it is read
        self._reader[is_new] = len(known.splits)
        self._rows = rows - np.concatenate([[0], ends])[self._reader]  # and its row there
        new_images = is_new & self.readable
        self._rows[new_images] = np.arange(np.count_nonzero(new_images))

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of all images."""
        counts = collections.Counter[tuple[int, ...]]()
        for code, count in enumerate(np.bincount(self.codes, minlength=len(self.kinds)).tolist()):
            shape, _ = self.kinds[code]
            if shape is not None and count:
                counts[shape] += count
        if len(counts) > 1:
            sizes = collections.Counter[str]()
            for (height, width, *_), count in counts.items():
                sizes[f"{height}×{width}"] += count
            found = ", ".join(f"{size} ({count:,})" for size, count in sizes.most_common(5))
            raise FolderError(
                f"Expected images of one height and width in {source.location}; received {len(sizes)} sizes: "
                f"{found}. Set ingest.image_size, for example to [64, 64]."
            )
        return next(iter(counts))

    def batches(
        self, images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images of one shape, given by their numbers, and their labels."""
        size = batch_size(shape)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            read = gather(self._readers, self._reader[part], self._rows[part], shape)
            yield read, labels[start : start + size]


def gather(readers: Sequence[Reader], numbers: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return images that several readers have. Of each, one range is read: the wanted rows are near each other.

    Args:
        readers: Each returns the images from one row to before another.
        numbers: For each image, the number of its reader.
        rows: For each image, its row there.
        shape: The shape of each image.

    Returns:
        uint8 ``[n, *shape]``.

    Example:
        >>> pixels = np.arange(12, dtype=np.uint8).reshape(2, 6, 1, 1)
        >>> readers = [lambda start, stop: pixels[0, start:stop], lambda start, stop: pixels[1, start:stop]]
        >>> gather(readers, np.array([0, 1, 1, 0]), np.array([1, 2, 3, 4]), (1, 1)).ravel().tolist()
        [1, 8, 9, 4]
    """
    found = np.empty((len(rows), math.prod(shape)), np.uint8)
    for number in np.unique(numbers).tolist():
        own = np.flatnonzero(numbers == number)
        first, last = int(rows[own].min()), int(rows[own].max())
        read = readers[number](first, last + 1)
        if len(own) == len(rows) and (np.diff(rows) == 1).all():
            return read
        found[own] = read.reshape(len(read), -1).take(rows[own] - first, 0)
    return found.reshape(len(rows), *shape)


def _expect_readable(unreadable: list[Unreadable], num_readable: int, source: Source, params: Params) -> None:
    share = len(unreadable) / max(1, len(unreadable) + num_readable)
    if not unreadable or share <= params.max_unreadable_share:
        return
    raise FolderError(
        f"Expected readable images in {source.location}; received {len(unreadable)} unreadable ones ({share:.2%}; "
        f"ingest.max_unreadable_share is {params.max_unreadable_share:.2%}). Replace or remove them, or raise that "
        f"share to go on without them:{_list([f'{entry.file}: {entry.reason}' for entry in unreadable], 1_000)}"
    )


def _expect_classes(names: list[str], counts: Mapping[str, list[int]], source: Source, params: Params) -> None:
    few = [
        f"{name}: {counts[split][number]} in {split}"
        for number, name in enumerate(names)
        for split in SPLITS
        if counts[split][number] < params.min_class_images
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


def _most_common(kinds: collections.Counter[str]) -> dict[str, int]:
    common = dict(sorted(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:NAMED]))
    others = kinds.total() - sum(common.values())
    return common | ({"others": others} if others else {})
