"""The body of a request becomes images, or a refusal that says what was expected: JSON as for TF Serving, or a file."""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import reprlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json

from ridgeline.image_decoding import UnreadableImage, decode, shape_of
from ridgeline.image_form import Form

SIGNATURE = "serving_default"
INPUT = "images"
EXAMPLES = '{"instances": [...]}, {"inputs": [...]}, or the bytes of an image file'


class BadRequestError(Exception):
    """A request that can't be answered; the message says what was expected and received.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Instances:
    """The images of a request.

    Attributes:
        images: uint8 ``[n, *image_shape]``.
        columns: Whether the response has a list for each output, instead of an object for each image.
    """

    images: np.ndarray
    columns: bool = False


def read_instances(
    body: bytes, is_json: bool, image_shape: tuple[int, ...], form: Form, max_instances: int, max_seconds: float
) -> Instances:
    """Return the images of a request's body.

    An image is a nested list of pixels from 0 to 255 in the model's shape; or ``{"b64": "..."}``, an image file of any
    size and colours in base64; or an object with either as ``images``. A body that is no JSON is one image file.

    Args:
        body: The body.
        is_json: Whether the client says that it is JSON; it is, too, if it begins with a brace or a bracket.
        image_shape: ``(h, w)`` or ``(h, w, 3)`` of the model's input.
        form: How to prepare image files.
        max_instances: The largest number of images.
        max_seconds: The longest time to decode them.

    Raises:
        BadRequestError: If there are none or too many, or one of them can't be used.
    """
    if not body:
        raise BadRequestError(f"Expected {EXAMPLES}; received an empty body.")
    if not is_json and not body.lstrip(b" \t\r\n").startswith((b"{", b"[")):
        return Instances(_decoded(body, form, EXAMPLES)[None])
    lists = 3 + sum(math.prod(image_shape[:depth]) for depth in range(len(image_shape)))  # of an image, at most
    if body.count(b"[") + body.count(b"{") > max_instances * lists + 3:  # no other thread runs while JSON is parsed
        raise BadRequestError(
            f"Expected at most {max_instances} images of shape {image_shape} in a request; received more lists than "
            "these have. Send several requests.",
            413,
        )
    try:
        request = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"Expected JSON, without NaN and Infinity; received a body with {error}.") from None
    if not isinstance(request, dict):
        raise BadRequestError(f"Expected {EXAMPLES}; received {_shown(request)}.")
    if unknown := request.keys() - {"instances", "inputs", "signature_name"}:
        raise BadRequestError(
            f"Expected instances or inputs, and signature_name; received also {_shown(sorted(unknown))}."
        )
    if request.get("signature_name", SIGNATURE) not in (SIGNATURE, ""):
        raise BadRequestError(f"Expected signature_name {SIGNATURE!r}; received {_shown(request['signature_name'])}.")
    columns = "inputs" in request
    if columns == ("instances" in request):
        raise BadRequestError(f"Expected either instances or inputs; received {'both' if columns else 'neither'}.")
    given = request["inputs" if columns else "instances"]
    if columns and isinstance(given, dict):
        given = _only_input(given)
    if not isinstance(given, list) or not given:
        what = "an empty list" if given == [] else _shown(given)
        raise BadRequestError(f"Expected a list of at least one image; received {what}.")
    if len(given) > max_instances:
        raise BadRequestError(
            f"Expected at most {max_instances} images in a request; received {len(given)}. Send several requests.", 413
        )
    if not any(isinstance(image, dict) for image in given):
        return Instances(_pixels(given, image_shape, "images"), columns)
    deadline, images = time.monotonic() + max_seconds, []
    for number, image in enumerate(given):
        images.append(_image(image, number, image_shape, form))
        if time.monotonic() > deadline:
            raise BadRequestError(
                f"Expected images that are decoded within {max_seconds:g} s; received larger ones: {number + 1} of "
                f"{len(given)} took longer. Send several requests.",
                413,
            )
    return Instances(np.stack(images), columns)


def _image(given: Any, number: int, image_shape: tuple[int, ...], form: Form) -> np.ndarray:
    where = f"image {number}"
    if isinstance(given, dict) and "b64" not in given:
        given = _only_input(given)
    if not isinstance(given, dict):
        single: np.ndarray = _pixels([given], image_shape, where)[0]
        return single
    text = given["b64"]
    if len(given) > 1 or not isinstance(text, str):
        raise BadRequestError(f'Expected {{"b64": "..."}} as {where}; received {_shown(given)}.')
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"Expected base64 as {where}; received a text that is not: {error}.") from None
    return _decoded(content, form, f"an image file as {where}")


def _only_input(given: dict[str, Any]) -> Any:
    if given.keys() != {INPUT}:
        raise BadRequestError(f"Expected the input {INPUT!r}; received {_shown(sorted(given))}.")
    return given[INPUT]


def _decoded(content: bytes, form: Form, expected: str) -> np.ndarray:
    try:
        image, _ = decode(content, form)
    except UnreadableImage as error:
        raise BadRequestError(f"Expected {expected}; received {len(content)} bytes that are none: {error}.") from None
    return np.frombuffer(image.tobytes(), np.uint8).reshape(shape_of(image))


def _pixels(given: list[Any], image_shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return lists of pixels as images. The lengths are checked before an array is made."""
    flat = given
    for side in image_shape:
        if not all(type(item) is list and len(item) == side for item in flat):
            raise BadRequestError(
                f"Expected {where} of shape {image_shape}; received {_other_shape(given, image_shape)}."
            )
        flat = list(itertools.chain.from_iterable(flat))
    try:
        if set(map(type, flat)) != {int}:  # bytes() takes true and false
            raise ValueError
        pixels = bytes(flat)  # refuses numbers that are no uint8
    except ValueError:
        other = next(value for value in flat if type(value) is not int or not 0 <= value <= 255)
        raise BadRequestError(
            f"Expected pixels as integers from 0 to 255 (uint8) in {where}; received {_shown(other)}. "
            "Send them as they are: normalization is part of the model."
        ) from None
    return np.frombuffer(pixels, np.uint8).reshape(-1, *image_shape)


def _other_shape(given: list[Any], image_shape: tuple[int, ...]) -> str:
    """Say what the first image is that has not the shape, as far as the first item of each list shows it."""
    for image in given:
        if not isinstance(image, list):
            return _shown(image)
        shape: list[int] = []
        first: Any = image
        while isinstance(first, list):
            shape.append(len(first))
            first = first[0] if first else None
        if tuple(shape) != image_shape:
            return str(tuple(shape))
    return "lists of different lengths"


def _shown(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)
