"""What the reports share: figures as inline images, and the table of parameters."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.html_page import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe blue and vermilion.
BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#6b7280"
STYLE: Mapping[Any, object] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "axes.labelcolor": "#374151",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "svg.hashsalt": "ridgeline",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
}
METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Picture:
    """An inline image: its data URI, its text alternative and its caption."""

    uri: str
    alt: str
    caption: str = ""


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in the reports' style, regardless of the user's matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(height: float = 3.1) -> tuple[Figure, Axes]:
    """Return an empty figure of half a page's width.

    Args:
        height: In inches; the width is 5.4.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, height))
    return figure, figure.subplots()


def svg(figure: Figure) -> str:
    """Return a figure as the data URI of an SVG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=METADATA)
    return data_uri("image/svg+xml", buffer.getvalue())


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters by dotted name, sorted."""
    values: dict[str, Any] = {}
    for name, value in sorted(params.items()):
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return values
