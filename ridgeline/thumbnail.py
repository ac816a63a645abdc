"""An image as a small inline PNG, for the pages that show images."""

from __future__ import annotations

import io

import numpy as np

from ridgeline.html_page import data_uri

MAX_IMAGE_SIDE = 96  # pixels


def thumbnail(pixels: np.ndarray) -> str:
    """Return an image as the URI of a PNG, reduced if a side exceeds `MAX_IMAGE_SIDE`.

    Args:
        pixels: uint8 ``[h, w]``, ``[h, w, 1]`` or ``[h, w, 3]``.
    """
    from PIL import Image

    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
    picture.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())
