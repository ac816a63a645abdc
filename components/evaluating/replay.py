"""The replay check: the champion and a candidate answer the same unlabelled images."""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING

import numpy as np

from components.ingestion.decoding_stream import DecodingStream, batches_of
from ridgeline.artifacts.model_evaluation import Flip, Replay
from ridgeline.component import Source, StepError
from ridgeline.image_form import Form
from ridgeline.significance import wilson_interval

if TYPE_CHECKING:
    import keras

MAX_FLIPS = 100  # pairs of classes
SHOWN_IMAGES = 3  # of each pair
MAX_SHOWN_IMAGES = 300


# Images that the two models answer differently, with their names, by the champion's and the candidate's class.
Flipped = dict[tuple[int, int], list[tuple[str, np.ndarray]]]


def replay(
    candidate: keras.Model, champion: keras.Model, source: Source, form: Form, shape: tuple[int, ...]
) -> tuple[Replay, Flipped]:
    """Compare what two models predict for the images of a folder. Memory does not grow with their number.

    Args:
        candidate: The evaluated model.
        champion: The model that is served.
        source: The folder as it was listed.
        form: What images become; the same for both.
        shape: The shape of an image in that form.

    Returns:
        The figures, and for the report the first images of each pair of classes.

    Raises:
        StepError: If no file is a readable image.
    """
    files, num_images, num_unreadable = list(source.files), 0, 0
    pairs: collections.Counter[tuple[int, int]] = collections.Counter()
    shown: Flipped = collections.defaultdict(list)
    num_shown = 0
    with DecodingStream(source, form, shape, len(files)) as stream:
        batches, again = itertools.tee(batches_of(files, shape))
        for names, (images, errors) in zip(batches, stream.decode(again), strict=True):
            num_unreadable += sum(error is not None for error in errors)
            if not len(images):
                continue
            num_images += len(images)
            readable = [name for name, error in zip(names, errors, strict=True) if error is None]
            before, after = (
                np.asarray(model.predict_on_batch(images)).argmax(axis=1).tolist() for model in (champion, candidate)
            )
            for row, pair in enumerate(zip(before, after, strict=True)):
                if pair[0] != pair[1]:
                    pairs[pair] += 1
                    if pairs[pair] <= SHOWN_IMAGES and num_shown < MAX_SHOWN_IMAGES:
                        shown[pair].append((readable[row], images[row].copy()))
                        num_shown += 1
    if not num_images:
        raise StepError(
            f"Expected images to replay in {source.location}; received {num_unreadable} files, none of which is a "
            "readable image. Name another folder in evaluate.replay_dir."
        )
    num_equal = num_images - pairs.total()
    most = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:MAX_FLIPS]
    figures = Replay(
        num_images=num_images,
        num_unreadable=num_unreadable,
        agreement=num_equal / num_images,
        agreement_interval=wilson_interval(num_equal, num_images),
        flips=tuple(Flip(champion=a, candidate=b, count=count) for (a, b), count in most),
    )
    return figures, dict(shown)
