"""How `ingest` prepares images, as facts of a data set state it: in the keys of all steps, so it holds no more."""

from __future__ import annotations

from typing import Literal

Resampling = Literal["bilinear", "bicubic", "lanczos", "box", "nearest"]  # the names of Pillow's filters
MAX_IMAGE_PIXELS = 50_000_000
