"""A proxy in front of a server of the S3 protocol that injects faults, drawn from a seed."""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("latency", "reset_before", "reset_after", "500", "503", "truncation")
CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied", "412": "PreconditionFailed"}


@dataclass
class Faults:
    """What the proxy does to requests.

    Attributes:
        seed: Of the draws.
        rate: Share of the requests that meet a fault.
        unconditional: Whether conditions (If-Match, If-None-Match) are removed.
        unknown_conditions: Whether writes under a condition are refused with the status 501.
        forbidden: Methods that are refused with the status 403. Without DELETE, the deletion of a list of objects is
            refused as S3 does it: with the status 200 and an error for each object.
        answer: Status and code with which each request but the deletions is refused; empty for none.
        loses: Called after each request, with its method and path; returns whether its answer is lost.
        bare_tags: Whether a tag in quotes meets no condition of a write, as in Ceph 16.
        counts: Number of faults of each kind, and of requests.
    """

    seed: int = 0
    rate: float = 0.0
    unconditional: bool = False
    unknown_conditions: bool = False
    bare_tags: bool = False
    loses: Callable[[str, str], bool] = lambda *_: False
    forbidden: tuple[str, ...] = ()
    answer: tuple[str, str] | tuple[()] = ()
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self) -> str:
        """Return the fault of the next request; empty if it meets none."""
        with self._lock:
            self.counts["requests"] += 1
            fault = self._random.choice(FAULTS) if self._random.random() < self.rate else ""
            if fault:
                self.counts[fault] += 1
        return fault

    def __str__(self) -> str:
        return f"seed {self.seed}: " + ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))


class Proxy(ThreadingHTTPServer):
    """Passes requests on to another server of this machine.

    Moto checks a condition and writes in two steps; one writing request at a time makes it one, as in S3.
    """

    daemon_threads = True

    def __init__(self, endpoint: str, port: int = 0, handler: type[Handler] | None = None) -> None:
        self.upstream, self.faults, self.writes = endpoint.partition("://")[2], Faults(), threading.Lock()
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing about clients that went away."""


class Handler(BaseHTTPRequestHandler):
    """Passes one request on."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def pass_on(self) -> None:
        """Pass it on, unless it meets a fault that is drawn."""
        self.answer(self.server.faults.draw())

    def answer(self, fault: str) -> None:
        """Answer it, with a fault if one is named."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        faults, self.close_connection = self.server.faults, True
        if "DELETE" in faults.forbidden and self.command == "POST" and self.path.endswith("?delete"):
            return self._refuse_each(body)
        if faults.answer and self.command != "DELETE":
            status, code = faults.answer
            return self._refuse(status, code, f"{code} at this time")
        if self.command in faults.forbidden:
            return self._refuse("403")
        if fault == "latency":
            time.sleep(0.2)
        if fault == "reset_before":
            return self._reset()
        if fault in CODES:
            return self._refuse(fault)
        headers = dict(self.headers.items())
        if faults.unknown_conditions and self.command == "PUT" and {"If-Match", "If-None-Match"} & headers.keys():
            return self._refuse("501", "NotImplemented")
        if faults.bare_tags and headers.get("If-Match", "").startswith('"') and self.command == "PUT":
            return self._refuse("412")
        if faults.unconditional:
            headers = {k: v for k, v in headers.items() if k.lower() not in ("if-match", "if-none-match")}
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            if self.command in ("PUT", "POST", "DELETE"):
                with self.server.writes:
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
            else:
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                content = answer.read()
        finally:
            upstream.close()
        if faults.loses(self.command, self.path) or fault == "reset_after":
            return self._reset()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        if length is not None:
            self.send_header("Content-Length", length)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "truncation" else content)
        return None

    def _refuse(self, status: str, code: str = "", message: str = "") -> None:
        code = code or CODES[status]
        content = f"<Error><Code>{code}</Code><Message>{message or code}</Message></Error>".encode()
        self.send_response_only(int(status))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse_each(self, body: bytes) -> None:
        errors = (
            f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            for key in re.findall("<Key>([^<]*)</Key>", body.decode())
        )
        content = f"<DeleteResult>{''.join(errors)}</DeleteResult>".encode()
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def do_GET(self) -> None:
        self.pass_on()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815


if __name__ == "__main__":  # ENDPOINT PORT SEED RATE; ends with its input, and says what it did
    server = Proxy(sys.argv[1], int(sys.argv[2]))
    server.faults = Faults(int(sys.argv[3]), float(sys.argv[4]))
    print("ready", flush=True)
    sys.stdin.read()
    print(server.faults, flush=True)
