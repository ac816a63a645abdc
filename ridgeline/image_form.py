"""What images become before a model takes them; `ridgeline.image_decoding` makes it so.

This imports no Pillow, so that its version is only in the keys of steps that decode images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ridgeline.preparation import MAX_IMAGE_PIXELS, Resampling


@dataclass(frozen=True)
class Form:
    """What images become; the names and defaults are those of the parameters of `ingest`.

    Attributes:
        image_size: Height and width; None leaves the size as it is.
        resampling: How images are resized; all but nearest are antialiased.
        color_mode: The colours; None stands for RGB.
        background: Grey level behind transparent pixels.
        max_image_pixels: Larger images are unreadable.
    """

    image_size: tuple[int, int] | None = None
    resampling: Resampling = "bilinear"
    color_mode: Literal["grayscale", "rgb"] | None = None
    background: int = 255
    max_image_pixels: int = MAX_IMAGE_PIXELS

    @classmethod
    def of_shape(
        cls,
        image_shape: tuple[int, ...],
        resampling: Resampling = "bilinear",
        background: int = 255,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> Form:
        """Return the form of images of a shape.

        Args:
            image_shape: ``(h, w)`` of grayscale images, or ``(h, w, 3)``.
            resampling: See `Form`.
            background: See `Form`.
            max_image_pixels: See `Form`.
        """
        height, width, *channels = image_shape
        return cls((height, width), resampling, "rgb" if channels else "grayscale", background, max_image_pixels)
