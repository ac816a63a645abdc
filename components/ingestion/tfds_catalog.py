"""A dataset of the tfds catalog: found, checked, downloaded or read from a manual directory, and read as arrays."""

from __future__ import annotations

import difflib
import io
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from components.ingestion.beam import BeamError, Engine, engine, temporary_files_in
from components.ingestion.params import FOLDER, Params
from components.ingestion.tfds_arrays import Arrays
from ridgeline.artifacts.base import FileEntry
from ridgeline.artifacts.dataset import DatasetFacts, LabelError, write_dataset_split
from ridgeline.component import StepError, TransientStepError
from ridgeline.image_decoding import normalize

log = logging.getLogger(__name__)

REQUIRED_SPLITS = ("train", "test")
BATCH_SIZE = 2_000
CONNECT_TIMEOUT_SECONDS = 10
PROGRESS_SECONDS = 5
SHUFFLED_BYTES = 16 * 2**20  # of a split; beyond, tfds shuffles on disk


class IngestError(StepError):
    """The dataset is unavailable, or is not an image-classification dataset."""


class DownloadError(TransientStepError, IngestError):
    """The dataset's files are missing and can't be downloaded now."""


def ingest_catalog(params: Params, output: Path) -> DatasetFacts:
    """Prepare a dataset with tfds, from the network or a manual directory, and read it as arrays.

    tfds checks the raw files against the SHA-256 sums that it has registered.

    Args:
        params: Which dataset to prepare.
        output: Receives ``train`` and ``test``.

    Returns:
        The dataset's facts.

    Raises:
        BeamError: If the dataset needs Beam, or its options are given, and it can't be used.
        IngestError: If tfds has no such dataset or version, the dataset has no ``image`` and ``label``, its
            files are unavailable or have a wrong checksum, its images differ in size and ``image_size`` is empty, or a
            label is no number of a class.
    """
    with (
        tempfile.TemporaryDirectory(prefix="tfds-", dir=output) as scratch,
        temporary_files_in(Path(scratch)),
        _little_shuffled_in_memory(),
        ExitStack() as stack,
    ):
        builder, beam = _builder_and_engine(params, Path(scratch), stack)
        name = f"{builder.info.full_name.rpartition('/')[0]}:{builder.version}"
        if ":" not in params.dataset:
            log.info("%s has no version: the newest is %s", params.dataset, name)
        shape, class_names = _expect_images_and_labels(builder, name, params)
        log.info("preparing %s with tfds", name)
        with _arrays(builder, Path(scratch) / "pixels") as arrays:
            _prepare(builder, params, Path(scratch), beam)
            sizes = {split: int(builder.info.splits[split].num_examples) for split in REQUIRED_SPLITS}
            try:
                splits = {
                    split: write_dataset_split(
                        output / split, _read(builder, split, shape, params, arrays), size, shape, len(class_names)
                    )
                    for split, size in sizes.items()
                }
            except LabelError as error:
                raise IngestError(
                    f"{error} of {name}. tfds writes -1 where there is no label: choose another split or dataset."
                ) from None
    return DatasetFacts(
        name=f"{params.name}:{name}" if params.name else name,
        image_shape=shape,
        class_names=class_names,
        splits=splits,
        raw_files=_raw_files(builder),
        synthetic=builder.name.startswith("synthetic_"),
        resampling=params.resampling,
        background=params.background,
        max_image_pixels=params.max_image_pixels,
    )


@contextmanager
def _little_shuffled_in_memory() -> Iterator[None]:
    """Let tfds shuffle all but 16 MiB of a split on disk, not all but 1 GiB; small examples take more as objects."""
    from tensorflow_datasets.core import shuffle

    before, shuffle.MAX_MEM_BUFFER_SIZE = shuffle.MAX_MEM_BUFFER_SIZE, SHUFFLED_BYTES
    try:
        yield
    finally:
        shuffle.MAX_MEM_BUFFER_SIZE = before


def _builder_and_engine(params: Params, scratch: Path, stack: ExitStack) -> tuple[Any, Engine | None]:
    """Return the builder, and what runs a pipeline of Beam, if the dataset or the parameters ask for one."""
    import tensorflow_datasets as tfds

    builder = _builder(params.dataset, scratch / "prepared")
    uses_beam = isinstance(builder, tfds.core.BeamBasedBuilder)
    if not uses_beam and not params.beam_pipeline_options:
        return builder, None
    beam = engine(params)
    if uses_beam and beam.shared:
        if "://" in beam.shared and not beam.shared.startswith("gs://"):
            raise BeamError(
                f"Expected in --temp_location a folder or a gs:// URL, in which tfds can write; received "
                f"{beam.shared.partition('://')[0]}://. Name a folder that all workers share."
            )
        builder = _builder(params.dataset, stack.enter_context(beam.shared_folder(scratch)))
    stack.enter_context(beam.running())
    return builder, beam


def _builder(dataset: str, data_dir: Any) -> Any:
    import tensorflow_datasets as tfds

    from components import datasets

    datasets.register()

    try:
        return tfds.builder(dataset, data_dir=data_dir, file_format="tfrecord", try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(dataset.split(":")[0], known, cutoff=0.75)
        advice = f"Did you mean {' or '.join(near)}? " if near else ""
        raise IngestError(
            f"Expected a dataset that tfds knows; received {dataset!r}. {advice}The tfds catalog lists the names. For "
            f"images of your own, set ingest.dataset={FOLDER} and ingest.image_dir, or register a tfds dataset: "
            "docs/extending.md."
        ) from error
    except (AssertionError, ValueError) as error:  # for an unknown version or configuration
        cause = str(error).rpartition('}": ')[2]  # without the arguments that tfds prints
        raise IngestError(
            f"Expected a version and configuration that tfds has; received {dataset!r}. {cause}"
        ) from error


def _expect_images_and_labels(builder: Any, dataset: str, params: Params) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the shape of the arrays, and the class names."""
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
    if image.np_dtype != np.uint8:
        raise IngestError(
            f"Expected uint8 images; received {image.np_dtype} images in {dataset}. Choose another dataset."
        )
    height, width, channels = image.shape
    if params.image_size:
        height, width = params.image_size
    if None in (height, width):
        raise IngestError(
            f"Expected images of one height and width; received images of shape {image.shape} in {dataset}. Set "
            "ingest.image_size, for example to [64, 64]."
        )
    if params.color_mode or channels not in (1, 3):
        channels = 1 if params.color_mode == "grayscale" else 3
    return (height, width) if channels == 1 else (height, width, channels), tuple(label.names)


def _arrays(builder: Any, path: Path) -> AbstractContextManager[Arrays | None]:
    """Return where a dataset's images are kept; None if tfds makes them in other processes, or encodes them as JPEG."""
    import tensorflow_datasets as tfds

    image = builder.info.features["image"]
    if isinstance(builder, tfds.core.BeamBasedBuilder) or image.encoding_format == "jpeg":
        return nullcontext()
    return Arrays(image, path)


def _read(
    builder: Any, split: str, shape: tuple[int, ...], params: Params, arrays: Arrays | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of a split, its files one after another: the order of the examples is stable."""
    import tensorflow_datasets as tfds
    from PIL import Image

    options: dict[str, Any] = {"split": split, "read_config": tfds.ReadConfig(interleave_cycle_length=1)}
    if arrays:  # not None, and not empty as for a dataset that yields files
        options["decoders"] = {"image": tfds.decode.SkipDecoding()}
    stored = builder.info.features["image"].shape
    if stored in (shape, (*shape, 1)):
        for batch in tfds.as_numpy(builder.as_dataset(batch_size=BATCH_SIZE, **options)):
            images = np.stack([arrays.find(image) for image in batch["image"]]) if arrays else batch["image"]
            yield images.reshape(-1, *shape), batch["label"]
        return
    wanted = replace(params.form, color_mode="grayscale" if len(shape) == 2 else "rgb")
    for example in tfds.as_numpy(builder.as_dataset(**options)):
        pixels = arrays.find(example["image"]) if arrays else example["image"]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        yield np.asarray(normalize(image, wanted))[None], np.array([example["label"]])


def _prepare(builder: Any, params: Params, scratch: Path, beam: Engine | None) -> None:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    manual_dir = params.manual_dir
    if manual_dir is not None and not manual_dir.is_dir():
        raise IngestError(
            f"Expected the folder of the downloaded files; received {manual_dir}, which is not a folder. "
            "Correct RIDGELINE_MANUAL_DIR or ingest.manual_dir."
        )
    _expect_files_or_network(builder, manual_dir)
    config = tfds.download.DownloadConfig(
        manual_dir=manual_dir,
        try_download_gcs=False,
        beam_runner=beam and beam.runner,
        beam_options=beam and beam.options,
    )
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


def _expect_files_or_network(builder: Any, manual_dir: Path | None) -> None:
    """Fail at once if files are missing and can't be downloaded; tfds would retry for minutes."""
    import requests

    infos = (builder.url_infos or {}).items()
    if folders := [info.filename for _, info in infos if manual_dir and (manual_dir / info.filename).is_dir()]:
        raise IngestError(
            f"Expected the downloaded files in {manual_dir}; received folders named {', '.join(folders)}. Replace them "
            "by the files."
        )
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
