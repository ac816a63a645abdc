"""How images are resized: the names of Pillow's filters that `ingest` takes."""

from __future__ import annotations

from typing import Literal

Resampling = Literal["bilinear", "bicubic", "lanczos", "box", "nearest"]
