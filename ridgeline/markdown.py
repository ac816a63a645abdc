"""Text in Markdown."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*\[\]<#|&]|(?<![^\W_])_|_(?![^\W_]))")  # inside a word, _ is not special


def escape(text: str) -> str:
    r"""Return a text on one line that Markdown, also in a table, shows as it is.

    Example:
        >>> print(escape("a|b <script>\n[x](javascript:1)"))
        a\|b \<script> \[x\](javascript:1)
    """
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))
