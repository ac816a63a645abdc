"""Turn a file or an array into a uint8 image of the wanted size and colours, with Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ridgeline.image_form import Form

if TYPE_CHECKING:
    from PIL import Image

# No format whose decoder starts another program, as EPS does.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
ORIENTATION = 0x0112  # the EXIF tag
HIGH = ("I;16", "I;16B", "I;16L", "I")  # 16 bits; Pillow reads some of these files into 32


class UnreadableImage(Exception):
    """A file that is no image, damaged or too large; the message says which."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Leave out what Pillow warns of: the size is checked here, and odd metadata is of no use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(content: bytes, form: Form) -> tuple[Image.Image, str]:
    """Return an image file's first frame, upright, in the wanted colours and size.

    Args:
        content: The file.
        form: The wanted size and colours; the most pixels.

    Returns:
        The image, of mode L or RGB, and what the file is, such as ``JPEG RGB 32×32``.

    Raises:
        UnreadableImage: If it is no image, damaged or too large.
    """
    from PIL import Image, ImageOps

    if not content:
        raise UnreadableImage("empty file")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > form.max_image_pixels:
                raise UnreadableImage(f"too large: {width}×{height}, over {form.max_image_pixels:,} pixels")
            kind = f"{image.format} {image.mode} {width}×{height}"
            upright = image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
            upright.load()
            return normalize(upright, form), kind
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("no image in a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"too large: over {form.max_image_pixels:,} pixels") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        raise UnreadableImage(f"damaged: {error or type(error).__name__}") from None


def shape_of(image: Image.Image) -> tuple[int, ...]:
    """Return the shape of a normalized image as an array: ``(h, w)``, or ``(h, w, 3)``."""
    return image.size[::-1] if image.mode == "L" else (*image.size[::-1], 3)


def normalize(image: Image.Image, form: Form) -> Image.Image:
    """Return an image in the wanted colours and size.

    Args:
        image: Any image that Pillow opens.
        form: The wanted size and colours.

    Returns:
        An image of mode L for grayscale, else RGB.

    Raises:
        UnreadableImage: If its pixels are floats, which have no stated range.
    """
    from PIL import Image

    if image.mode == "F":
        raise UnreadableImage("pixels are floats, without a stated range")
    if image.mode in HIGH:
        import numpy as np

        high = np.clip(np.asarray(image), 0, 65_535).astype(np.uint32)
        high *= 255  # in place: the array is large
        high += 32_767
        high //= 65_535
        image = Image.fromarray(high.astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, (form.background,) * 3)
        image.paste(rgba, mask=rgba.getchannel("A"))
    wanted = "L" if form.color_mode == "grayscale" else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    if form.image_size and image.size != form.image_size[::-1]:
        image = image.resize(form.image_size[::-1], Image.Resampling[form.resampling.upper()])
    return image
