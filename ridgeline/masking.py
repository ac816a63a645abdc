"""Hide the secrets of URLs, passwords and the values of query parameters, in every text that people see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

HIDDEN = "***"
MIN_LENGTH = 5  # a shorter secret is hidden inside URLs alone: elsewhere it may be part of any word
_URL = re.compile(r"(?<=://)\S+")
_QUERY_VALUE = re.compile(r"(?<==)[^&\s]+?(?=[&;#]|['\"`()\[\]{}.,:<>]*(?:$|\s))")
_known: set[str] = set()


def remember(url: str) -> None:
    """Hide the secrets of a URL from now on in every text that `mask` returns, also outside of a URL.

    Libraries name files without the scheme of their URL, or print a password alone.

    Args:
        url: The URL; any other text is ignored.
    """
    for match in _URL.finditer(url):
        for secret in _secrets(match[0]):
            _known.update(text for text in (secret, unquote(secret)) if len(text) >= MIN_LENGTH and text != HIDDEN)


def remember_secret(text: str) -> None:
    """Hide a text from now on in every text that `mask` returns, unless it is shorter than `MIN_LENGTH`.

    Args:
        text: The text.
    """
    if len(text) >= MIN_LENGTH:
        _known.add(text)


def known() -> list[str]:
    """Return all remembered secrets, longest first."""
    return sorted(_known, key=len, reverse=True)


def mask(text: object) -> str:
    """Return a text with ``***`` in place of the secrets of the URLs in it, and of all remembered URLs.

    What precedes the last ``@`` is hidden, since a password may hold ``@`` and ``/``, and so is every value of a query.

    Args:
        text: The text, or an object with a text, such as an error.

    Example:
        >>> mask("Cannot read s3://ann:p@ss/w@example.org/store?token=abc: timeout")
        'Cannot read s3://***@example.org/store?token=***: timeout'
        >>> mask("s3://bucket/models@2026/store")
        's3://bucket/models@2026/store'
    """
    masked = _URL.sub(lambda match: _mask_url(match[0]), str(text))
    for secret in known():
        masked = masked.replace(secret, HIDDEN)
    return masked


def _mask_url(rest: str) -> str:
    user, place = _split(rest)
    path, mark, query = _divide(place)
    return f"{HIDDEN}@{path}{mark}{_mask_query(query)}" if user else f"{path}{mark}{_mask_query(query)}"


def _mask_query(query: str) -> str:
    return _QUERY_VALUE.sub(HIDDEN, query)


def _secrets(rest: str) -> Iterator[str]:
    user, place = _split(rest)
    if ":" in user:  # a name alone is no secret outside of the URL
        yield user
        yield user.partition(":")[2]
    yield from (match[0] for match in _QUERY_VALUE.finditer(_divide(place)[2]))


def _split(rest: str) -> tuple[str, str]:
    """Divide a URL, without its scheme, into the user with the password, and the place."""
    user, _, place = rest.rpartition("@")
    is_path = "/" in user and ":" not in user
    return ("", rest) if is_path else (user, place)


def _divide(place: str) -> tuple[str, str, str]:
    """Divide a place at its query or fragment, or at ``&`` if the last ``@`` was in the query."""
    match = re.search(r"[?#&]", place)
    return (place[: match.start()], match[0], place[match.end() :]) if match else (place, "", "")
