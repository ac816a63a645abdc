"""The command `ridgeline serve` in a process of its own."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image

from ridgeline.image_form import Form
from ridgeline.registry import Registry
from ridgeline.serving import ServeError, server
from ridgeline.serving.app import Limits, create_app
from ridgeline.serving.batching import Batcher
from ridgeline.serving.server import serve

ROOT = Path(__file__).resolve().parents[3]
NAME = "synthetic_garments"
FILE = io.BytesIO()
Image.fromarray(np.zeros((28, 28), np.uint8)).save(FILE, "PNG")
PNG = FILE.getvalue()


@pytest.fixture
def listen():
    """Serve an application in this process; return its port."""
    servers = []

    def listen(app):
        listening = server._listen("127.0.0.1", 0)
        running = uvicorn.Server(uvicorn.Config(app, http=server.Protocol, log_config=None, timeout_keep_alive=2))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        servers.append((running, thread))
        return listening.getsockname()[1]

    yield listen
    for running, thread in servers:
        running.should_exit = True
        thread.join()


@pytest.fixture
def port(monkeypatch, listen):
    """The port of a server with one route that reads the body and one that does not."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    app = FastAPI()

    @app.post("/read")
    async def read(request: Request):
        return len(await request.body())

    @app.get("/")
    async def get():
        return "here"

    return listen(app)


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


@pytest.mark.parametrize(
    ("start", "endless"),
    [
        (GET + b"X: ", b"y"),
        (GET, b"X: y\r\n"),
        (b"GET /", b"y"),
        (CHUNKED + b"0\r\nX: ", b"y"),
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
        (CHUNKED + b"2;", b"y"),
    ],
)
def test_what_never_becomes_a_request_is_ended(port, start, endless):
    sent, part = 0, endless * (4_096 // len(endless))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(start)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while sent < 2**25:
                connection.sendall(part)
                sent += len(part)
    assert sent < 2**24  # the system's buffers included


@pytest.mark.parametrize(
    ("request_", "after"),
    [
        (GET + b"\r\n", b"\r\n"),
        (GET + b"\r\n", b"G"),
        (GET + b"Content-Length: 100\r\n\r\n", b"x"),
        (GET + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
def test_a_connection_without_a_further_request_is_ended(port, request_, after):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        connection.sendall(request_)
        assert connection.recv(1_000).endswith(b'"here"')
        started = time.monotonic()
        connection.sendall(after)
        assert refused(connection)
        assert 0.3 < time.monotonic() - started < 1.9


def test_large_bodies_and_further_requests_are_answered(port):
    body = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        for _ in range(3):
            connection.sendall(body)
            assert connection.recv(1_000).endswith(b"3000000")
            time.sleep(0.7)
            connection.sendall(GET + b"\r\n")
            assert connection.recv(1_000).endswith(b'"here"')


class Doubles:
    """A model that waits for `go`; what it computed."""

    image_shape: tuple[int, ...] = (28, 28)
    form = Form.of_shape(image_shape)

    def __init__(self):
        self.metadata = dict[str, Any]()
        self.batches, self.go = [], threading.Event()
        self.predict = Batcher(self.compute, ThreadPoolExecutor(1), 8).predict

    def compute(self, images):
        self.batches.append(images[:, 0, 0].tolist())
        assert self.go.wait(10)
        return {"class_id": images[:, 0, 0] * 2}


@pytest.fixture
def doubles(tmp_path, listen):
    """A served `Doubles`, and a function that asks it for a pixel and returns the connection."""
    (tmp_path / "registry" / "m" / "1").mkdir(parents=True)
    (tmp_path / "registry" / "m" / "champion.json").write_text('{"version": 1}')
    model = Doubles()
    port = listen(create_app(Registry(tmp_path / "registry"), Limits(request_mib=0.01), load=lambda *_: model))

    def ask(pixel, unfinished=False):
        body = json.dumps({"instances": [[[pixel] * 28] * 28]}).encode()
        head = f"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) + unfinished}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", port))
        connection.settimeout(10)
        connection.sendall(head.encode() + body)
        return connection

    while httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code != 200:
        time.sleep(0.01)
    return model, ask


def test_a_request_whose_client_left_is_not_computed(doubles):
    model, ask = doubles
    with ask(1) as first:
        while not model.batches:
            time.sleep(0.01)
        left = [ask(2) for _ in range(5)]
        time.sleep(0.3)
        for connection in left:
            connection.close()
        with ask(3) as last:
            time.sleep(0.3)
            model.go.set()
            for connection, expected in ((first, b'"class_id":2'), (last, b'"class_id":6')):
                assert expected in connection.recv(1_000)
    assert model.batches == [[1], [3]]


def test_the_bodies_in_memory_are_limited(doubles):
    model, ask = doubles
    model.go.set()
    with contextlib.ExitStack() as unfinished:
        for _ in range(100):  # of 2.4 KB; 16 of 10 KB are allowed
            unfinished.enter_context(ask(1, unfinished=True))
        time.sleep(0.3)
        with ask(2) as refused:
            answer = refused.recv(1_000)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Too many requests at present: their bodies take 0.16 MiB" in answer
    time.sleep(0.3)
    with ask(2) as answered:
        assert b'"class_id":4' in answered.recv(1_000)


@pytest.fixture
def start(registry, store, tmp_path):
    """Start the command; return its process and its URL."""
    processes = []

    def start(*options):
        environment = {
            **os.environ,
            "RIDGELINE_STORE": str(store.root),
            "RIDGELINE_SERVING": str(registry.root),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-P", "-m", "ridgeline.cli", "serve", "--port", "0", *options]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stderr=log, cwd=tmp_path)
        processes.append(process)
        for _ in range(600):
            found = re.search(r"on (http://\S+)", (tmp_path / "log").read_text())
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                if found and httpx.get(f"{found[1]}/health/ready").status_code == 200:
                    return process, found[1]
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError((tmp_path / "log").read_text())

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.fresh_process
def test_no_request_fails_while_models_are_pushed_and_rolled_back(start, push, registry, store):
    push()
    process, url = start()
    answers, stop = [], threading.Event()

    def ask():
        with httpx.Client() as client:
            while not stop.is_set():
                response = client.post(f"{url}/v1/models/{NAME}:predict", content=PNG)
                answers.append((response.status_code, response.headers.get("X-Model-Version"), response.text))

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        for number in range(4):
            push()
            time.sleep(0.7)
            registry.rollback(store, NAME, 1, reason="worse", by="", run_id=f"back {number}")
            time.sleep(0.7)
        push()
        time.sleep(2.5)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert {status for status, _, _ in answers} == {200}
    assert len({text for _, _, text in answers}) == 1  # the versions hold the same model
    assert len({version for _, version, _ in answers}) > 3
    assert answers[-1][1] == "6"

    waiting = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))  # a request that is in flight
    head = f"POST /v1/models/{NAME}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PNG)}\r\n\r\n".encode()
    waiting.sendall(head + PNG[:10])
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    waiting.sendall(PNG[10:])
    with waiting:
        assert waiting.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert process.wait(10) == 0


@pytest.mark.fresh_process
def test_slow_clients_are_ended_and_the_token_is_asked_for(start, push, tmp_path):
    push()
    (tmp_path / "token").write_text("secret\n")
    _, url = start("--max-seconds", "0.5", "--token-file", str(tmp_path / "token"))
    assert httpx.post(f"{url}/v1/models/{NAME}:predict", content=PNG).status_code == 401
    headers = {"Authorization": "Bearer secret"}

    def slow():
        yield PNG[:10]
        time.sleep(1.5)
        yield PNG[10:]

    try:
        response = httpx.post(f"{url}/v1/models/{NAME}:predict", content=slow(), headers=headers)
        assert (response.status_code, response.json()["error"]) == (
            408,
            "Expected the whole body within 0.5 s; received 10 bytes of it.",
        )
    except httpx.TransportError:  # the client saw the end of the connection before the response
        pass
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 70_000)
        assert refused(connection)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(server.HEADER_SECONDS + 5)
        connection.sendall(b"GET / HTTP/1.1\r\nHost")
        start_time = time.monotonic()
        assert refused(connection)
        assert time.monotonic() - start_time < server.HEADER_SECONDS + 3
    assert httpx.post(f"{url}/v1/models/{NAME}:predict", content=PNG, headers=headers).status_code == 200


def refused(connection):
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_other_addresses_than_loopback_need_a_token(registry, host):
    with pytest.raises(ServeError, match=f"other machines reach; received --host {host} without one"):
        serve(registry, host, 0, Limits(), None)


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff", "schön".encode(), None])
def test_a_token_that_can_not_be_used_is_refused(registry, tmp_path, content):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(ServeError, match="Expected a token in .*token, ASCII|Cannot read the token in .*token: "):
        serve(registry, "127.0.0.1", 0, Limits(), tmp_path / "token")


def test_a_port_that_is_in_use_is_named(registry):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"Cannot listen on 127.0.0.1, port {port}: Address already in use"):
            serve(registry, "127.0.0.1", port, Limits(), None)
