"""Ingest: prepares an image-classification dataset with tfds."""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field

from ridgeline.artifacts.base import FileEntry
from ridgeline.artifacts.dataset import Dataset, DatasetFacts, SplitDigest
from ridgeline.component import Params as StepParams
from ridgeline.component import StepError, TransientStepError, component

log = logging.getLogger(__name__)

DATASET_PATTERN = r"^[a-z][a-z0-9_]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)?:\d+\.\d+\.\d+$"
REQUIRED_SPLITS = ("train", "test")
BATCH_SIZE = 2_000
CONNECT_TIMEOUT_SECONDS = 10
PROGRESS_SECONDS = 5


class IngestError(StepError):
    """The dataset is unavailable, or is not an image-classification dataset."""


class DownloadError(TransientStepError, IngestError):
    """The dataset's files are missing and can't be downloaded now."""


class Params(StepParams):
    """Which dataset to prepare."""

    dataset: str = Field(
        "fashion_mnist:3.0.1",
        pattern=DATASET_PATTERN,
        title="Dataset",
        description="tfds image-classification dataset with its version, as name:version or name/config:version.",
    )
    name: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        max_length=64,
        title="Name",
        description="Name of the dataset's own, by which its model is served: lower-case letters, digits and _. "
        "Empty: the name in tfds.",
    )
    manual_dir: Path | None = Field(
        None,
        exclude=True,
        title="Manual directory",
        description="Folder with the downloaded files, for machines without a network.",
    )


@component(output=Dataset)
def ingest(params: Params, output: Path) -> DatasetFacts:
    """Prepare a dataset with tfds, from the network or a manual directory.

    tfds checks the raw files against the SHA-256 sums that it has registered.

    Args:
        params: Which dataset to prepare.
        output: Empty directory to write a `Dataset` into.

    Returns:
        The dataset's facts.

    Raises:
        IngestError: If tfds has no such dataset or version, the dataset has no ``image`` and ``label``, its
            files are unavailable or have a wrong checksum, or its images differ in size.
    """
    with tempfile.TemporaryDirectory(prefix="downloads-", dir=output) as scratch, _temporary_files_in(scratch):
        builder = _builder(params.dataset, output / "tfds")
        shape, class_names = _expect_images_and_labels(builder, params.dataset)
        log.info("preparing %s with tfds", params.dataset)
        _prepare(builder, params, Path(scratch))
    _sort_fields(builder.data_path)
    splits = {name: _digest(builder, name) for name in REQUIRED_SPLITS}
    return DatasetFacts(
        name=f"{params.name}:{params.dataset}" if params.name else params.dataset,
        image_shape=shape,
        class_names=class_names,
        splits=splits,
        raw_files=_raw_files(builder),
        synthetic=builder.name.startswith("synthetic_"),
    )


@contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Let tfds make its temporary folders, which it does not delete, in a folder that is deleted."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def _builder(dataset: str, data_dir: Path) -> Any:
    import tensorflow_datasets as tfds

    from components import datasets

    datasets.register()

    try:
        return tfds.builder(dataset, data_dir=data_dir, file_format="tfrecord", try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(dataset.split(":")[0], known)
        advice = f"Did you mean {', '.join(near)}?" if near else "The tfds catalog lists the names."
        raise IngestError(f"Expected a dataset that tfds knows; received {dataset!r}. {advice}") from error
    except (AssertionError, ValueError) as error:  # for an unknown version or configuration
        cause = str(error).rpartition('}": ')[2]  # without the arguments that tfds prints
        raise IngestError(
            f"Expected a version and configuration that tfds has; received {dataset!r}. {cause}"
        ) from error


def _expect_images_and_labels(builder: Any, dataset: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    import tensorflow_datasets as tfds

    features = builder.info.features
    image, label = (features[key] if key in features else None for key in ("image", "label"))  # noqa: SIM401 - no dict
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise IngestError(
            f"Expected a dataset with an `image` and a class `label`; received {dataset} with "
            f"{sorted(features)}. Choose an image-classification dataset."
        )
    if len(label.names) < 2:
        raise IngestError(
            f"Expected a dataset of at least 2 classes; received {dataset} with {', '.join(label.names) or 'none'}. "
            "Choose another dataset."
        )
    if None in image.shape or image.np_dtype != np.uint8:
        raise IngestError(
            f"Expected uint8 images of one size; received {image.np_dtype} images of shape {image.shape} in "
            f"{dataset}. Choose a dataset with a fixed image size."
        )
    shape = image.shape[:2] if image.shape[2] == 1 else image.shape
    return tuple(shape), tuple(label.names)


def _prepare(builder: Any, params: Params, scratch: Path) -> None:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    manual_dir = params.manual_dir
    if manual_dir is not None and not manual_dir.is_dir():
        raise IngestError(
            f"Expected the folder of the downloaded files; received {manual_dir}, which is not a folder. "
            "Correct RIDGELINE_MANUAL_DIR or ingest.manual_dir."
        )
    _expect_files_or_network(builder, manual_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        with _progress_in_log():
            builder.download_and_prepare(download_dir=scratch, download_config=config)
    except tfds.download.DownloadError as error:
        raise DownloadError(f"Expected to download {params.dataset}; received: {error}. Try again later.") from error
    except Exception as error:
        if type(error).__name__ == "NonMatchingChecksumError":  # tfds does not export it
            raise IngestError(
                f"Expected files of {params.dataset} with the SHA-256 that tfds registered; received: {error} "
                "Delete the damaged file and download it again."
            ) from error
        if isinstance(error, AssertionError | tf.errors.NotFoundError):
            raise IngestError(
                f"Expected the files of {params.dataset} in the manual directory {manual_dir}; received: {error} "
                f"{builder.MANUAL_DOWNLOAD_INSTRUCTIONS or ''}"
            ) from error
        raise
    if missing := [name for name in REQUIRED_SPLITS if name not in builder.info.splits]:
        raise IngestError(
            f"Expected the splits {REQUIRED_SPLITS} in {params.dataset}; received no {', '.join(missing)}. "
            "Choose a dataset that has both."
        )


def _sort_fields(folder: Path) -> None:
    """Rewrite the records so that equal examples have equal bytes: protobuf orders a map's fields arbitrarily."""
    import tensorflow as tf

    for file in map(Path, sorted(folder.glob("*.tfrecord*"))):
        unsorted = file.rename(file.with_name(f"unsorted-{file.name}"))
        with tf.io.TFRecordWriter(str(file)) as writer:
            for records in tf.data.TFRecordDataset(str(unsorted)).batch(BATCH_SIZE).as_numpy_iterator():
                for record in records:
                    writer.write(tf.train.Example.FromString(record).SerializeToString(deterministic=True))
        unsorted.unlink()


def _expect_files_or_network(builder: Any, manual_dir: Path | None) -> None:
    """Fail at once if files are missing and can't be downloaded; tfds would retry for minutes."""
    import requests

    infos = (builder.url_infos or {}).items()
    missing = {
        url: info.filename for url, info in infos if manual_dir is None or not (manual_dir / info.filename).exists()
    }
    for url in missing:
        try:
            requests.head(url, timeout=CONNECT_TIMEOUT_SECONDS)
        except requests.RequestException as error:
            files = "".join(f"\n  {name} from {url}" for url, name in missing.items())
            raise DownloadError(
                f"Expected a network or the downloaded files; received: no response from {urlsplit(url).hostname} "
                f"({type(error).__name__}). Put these files into a folder and name it in RIDGELINE_MANUAL_DIR "
                f"or ingest.manual_dir (now: {manual_dir}):{files}"
            ) from error


class _ProgressLog(io.TextIOBase):
    """Logs the output of tfds's progress bars, one line every few seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> int:
        lines = re.findall(r"(?:Generating|Dl |Extraction)[^\r\n\x1b]+", text)
        if lines and time.monotonic() - self.last >= PROGRESS_SECONDS:
            self.last = time.monotonic()
            log.info("%s", lines[-1])
        return len(text)


@contextmanager
def _progress_in_log() -> Iterator[None]:
    """Show progress bars on a terminal; elsewhere, log one line every few seconds."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(_ProgressLog()), redirect_stdout(_ProgressLog()):
            yield


def _raw_files(builder: Any) -> dict[str, FileEntry]:
    infos = (builder.url_infos or {}).values()
    return {info.filename: FileEntry(bytes=info.size, sha256=info.checksum) for info in infos}


def _digest(builder: Any, split: str) -> SplitDigest:
    import tensorflow_datasets as tfds

    images, labels, count = hashlib.sha256(), hashlib.sha256(), 0
    config = tfds.ReadConfig(interleave_cycle_length=1)
    for batch in tfds.as_numpy(builder.as_dataset(split=split, batch_size=BATCH_SIZE, read_config=config)):
        images.update(batch["image"].tobytes())
        labels.update(batch["label"].astype("<i8").tobytes())
        count += len(batch["label"])
    return SplitDigest(num_examples=count, images_sha256=images.hexdigest(), labels_sha256=labels.hexdigest())
