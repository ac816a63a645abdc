"""`ridgeline serve`: champions and canaries over the REST API of TensorFlow Serving."""

from __future__ import annotations


class ServeError(RuntimeError):
    """The server can't start. It is here, since the command line imports the server only to serve."""
