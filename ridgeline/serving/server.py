"""Runs the application: uvicorn on one address, with limits for slow clients, until a signal ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import warnings
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ridgeline import quiet_tensorflow
from ridgeline.registry import Registry
from ridgeline.serving import ServeError
from ridgeline.serving.app import Limits, create_app

log = logging.getLogger(__name__)

HEADER_SECONDS = 10.0  # from the start of a connection, or the first byte after a response, until the next headers
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 1_000
KEEP_ALIVE_SECONDS = 60
STOP_SECONDS = 30  # for requests in flight


class Protocol(HttpToolsProtocol):
    """HTTP that ends connections that send no request in time, or too many bytes that are neither headers nor body.

    uvicorn has no such limits. The parser keeps a line until it ends: a header, or a trailer after the body.
    """

    _deadline: asyncio.TimerHandle | None = None
    _unparsed_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the headers of the first request."""
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes; wait for the next request, if these follow a response."""
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > MAX_HEADER_BYTES:
            self.transport.abort()
        elif self.cycle is not None and self.cycle.response_complete:  # uvicorn waits no longer
            self._wait_for_headers()

    def on_headers_complete(self) -> None:
        """Stop waiting."""
        self._unparsed_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """The body has its own limits."""
        self._unparsed_bytes = 0
        super().on_body(body)

    def _wait_for_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def serve(registry: Registry, host: str, port: int, limits: Limits, token_file: Path | None) -> None:
    """Serve the models of a registry until SIGTERM or SIGINT; requests in flight are answered before it returns.

    Args:
        registry: The registry; it is only read.
        host: The address to listen on.
        port: The port; 0 for a free one.
        limits: What one request may take.
        token_file: A file with the token that clients must send; None for no check, on a loopback address alone.

    Raises:
        ServeError: If the address is not a loopback address and there is no token, the token can't be read, or the
            address can't be used.
    """
    token = _token(token_file)
    if token is None and not _is_loopback(host):
        raise ServeError(
            f"Expected a token for an address that other machines reach; received --host {host} without one. Write a "
            "random text into a file and pass it as --token-file."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    quiet_tensorflow.install()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; the size is checked
    listening = _listen(host, port)
    address = f"[{host}]" if ":" in host else host
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    log.info("serving %s on http://%s:%d", registry.place, address, listening.getsockname()[1])
    config = uvicorn.Config(
        create_app(registry, limits, token),
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn sends itself the signal again when all is answered
        signal.signal(number, lambda *_: sys.exit(0))
    uvicorn.Server(config).run([listening])


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ServeError(f"Cannot read the token in {file}: {reason}.") from None
    if not token or not token.isascii() or len(token.split()) > 1:
        raise ServeError(f"Expected a token in {file}, ASCII without spaces; received another text. Write one.")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServeError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Choose another --host or --port."
        ) from None
