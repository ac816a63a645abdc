"""Render the templates of the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from ridgeline.html_page import render_page

FOLDER = Path(__file__).parent / "templates"


def render_template(name: str, **values: Any) -> str:
    """Return a page of the plugin as HTML.

    Args:
        name: ``run`` for ``templates/run.html`` with the style ``templates/run.css``.
        **values: The variables of the template; every text is escaped.
    """
    style = FOLDER / f"{name}.css"
    return render_page(
        (FOLDER / f"{name}.html").read_text(encoding="utf-8"),
        style=Markup(style.read_text(encoding="utf-8") if style.exists() else ""),  # nosec B704 - a file of this package
        **values,
    )
