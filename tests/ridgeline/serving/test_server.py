"""The command `ridgeline serve` in a process of its own."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from ridgeline.serving import server
from ridgeline.serving.app import Limits
from ridgeline.serving.errors import ServeError
from ridgeline.serving.server import serve

ROOT = Path(__file__).resolve().parents[3]
NAME = "synthetic_garments"
FILE = io.BytesIO()
Image.fromarray(np.zeros((28, 28), np.uint8)).save(FILE, "PNG")
PNG = FILE.getvalue()


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
