"""What the command line shows as a message; a module of its own, since the server is imported only to serve."""

from __future__ import annotations


class ServeError(RuntimeError):
    """The server can't start."""
