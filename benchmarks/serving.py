"""`ridgeline serve` under load: 16 clients while models are pushed and rolled back, beside plain `model.predict`."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.steps import row
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import Store

CLIENTS, SECONDS, CHANGES, WARM_UP = 16, 60, 50, 3
# The same application with what a user writes without batches: one call of `predict` for each request.
PLAIN = """
import asyncio, sys, threading
from pathlib import Path
from ridgeline import quiet_tensorflow
quiet_tensorflow.install()
import uvicorn
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.pushed_model import read_form
from ridgeline.registry import Registry
from ridgeline.serving import server
from ridgeline.serving.app import create_app

class Plain:
    metadata, lock = {}, threading.Lock()

    def __init__(self, name, folder):
        self.model = Model.load(Path(sys.argv[2])).load_keras()
        self.image_shape = tuple(self.model.input_shape[1:])
        self.form = read_form(folder, self.image_shape)

    def compute(self, images):
        with self.lock:
            probabilities = self.model.predict(images, verbose=0)
        return {"class_id": probabilities.argmax(axis=1), "probabilities": probabilities}

    async def predict(self, images):
        return await asyncio.to_thread(self.compute, images)

socket = server._listen("127.0.0.1", 0)
print(f"on http://127.0.0.1:{socket.getsockname()[1]}", file=sys.stderr, flush=True)
app = create_app(Registry(Path(sys.argv[1])), load=Plain)
uvicorn.Server(uvicorn.Config(app, http=server.Protocol, log_config=None, access_log=False)).run([socket])
"""
WRK = """
local file = io.open("{image}", "rb")
wrk.method, wrk.body = "POST", file:read("*all")
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format('{{"requests": %d, "seconds": %f, "failed": %d, "p50": %f, "p99": %f, "max": %f}}',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.timeout + e.status,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Where the store is.
        refs: The artifacts of a run up to `export`.
    """
    print("\nServing")
    if not shutil.which("wrk"):
        row("left out: the load generator wrk is missing", "apt-get install wrk")
        return
    store = settings.open_store()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model = store.open(refs["export"], PushedModel)
        image = scratch / "image.png"
        image.write_bytes(_png(np.load(model.check / "images.npy")[0]))
        (scratch / "post.lua").write_text(WRK.format(image=image))
        # Without the checks in a fresh process, which would take the cores that are measured.
        with patch("ridgeline.registry.check"), patch.object(Registry, "verify"):
            _measure(scratch, store, model, store.path(refs["train"]))


def _measure(scratch: Path, store: Store, model: PushedModel, trained: Path) -> None:
    registry = Registry(scratch / "serving")
    _push(registry, model, scratch, 0)
    serve = ["-m", "ridgeline.cli", "serve", "--port", "0"]
    environment = {"RIDGELINE_STORE": str(scratch / "empty"), "RIDGELINE_SERVING": str(registry.root)}
    with _server(serve, environment, registry) as (url, process):
        _load(scratch, url, WARM_UP)
        quiet = _load(scratch, url, SECONDS // 3)
        before = _resident_mib(process)
        load = _start(scratch, url, SECONDS)
        for number in range(1, CHANGES + 1):
            began = time.monotonic()
            if number % 2:
                _push(registry, model, scratch, number)
            else:
                registry.rollback(store, model.facts.model_name, None, reason="bench", by="", run_id=f"back {number}")
            time.sleep(max(0.0, SECONDS / CHANGES - (time.monotonic() - began)))
        busy = _result(load)
        after = _resident_mib(process)
        loads = _loads(url)
    with _server(["-c", PLAIN, str(registry.root), str(trained)], {}, registry) as (url, process):
        _load(scratch, url, WARM_UP)
        plain = _load(scratch, url, SECONDS // 3)
    row(f"failed of {busy['requests']:,} requests, {CHANGES} pushes and rollbacks", str(busy["failed"]), "0")
    row("versions loaded meanwhile", str(loads))
    row("memory of the server, before and after", f"{before:.0f} → {after:.0f} MiB")
    for what, found in (
        ("with pushes and rollbacks", busy),
        ("without", quiet),
        ("model.predict behind the same server", plain),
    ):
        rate = found["requests"] / found["seconds"]
        figures = f"{rate:,.0f} requests/s, p50 {found['p50']:.1f}, p99 {found['p99']:.1f}, max {found['max']:.0f} ms"
        row(f"{CLIENTS} clients, {what}", f"{figures}, {found['failed']} failed")


def _push(registry: Registry, model: PushedModel, scratch: Path, number: int) -> None:
    """Push the same SavedModel as that of another model, by force: it replaces every champion."""
    changed = model.facts.model_copy(update={"model_digest": f"{number:064x}", "forced": f"bench {number}"})
    folder = scratch / f"model {number}"
    shutil.copytree(model.path, folder, ignore=shutil.ignore_patterns("manifest.json"))
    registry.push(PushedModel.seal(folder, changed), f"run {number}", "bench")


@contextmanager
def _server(arguments: list[str], environment: dict[str, str], registry: Registry) -> Iterator[tuple[str, Any]]:
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, "-P", *arguments]
        process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=log)
        try:
            yield _ready(Path(log.name), process), process
        finally:
            process.terminate()
            process.wait()


def _ready(log: Path, process: subprocess.Popen[bytes]) -> str:
    while process.poll() is None:
        if found := re.search(r"on (http://\S+)", log.read_text()):
            try:
                with urllib.request.urlopen(f"{found[1]}/health/ready"):
                    return found[1]
            except (urllib.error.URLError, ConnectionError):
                pass
        time.sleep(0.1)
    raise RuntimeError(f"The server ended: {log.read_text()[-2000:]}")


def _start(scratch: Path, url: str, seconds: int) -> subprocess.Popen[str]:
    name = next((scratch / "serving").glob("*/champion.json")).parent.name
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{seconds}s", "--timeout", "60s", "-s", str(scratch / "post.lua")]
    return subprocess.Popen([*command, f"{url}/v1/models/{name}:predict"], stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return found


def _load(scratch: Path, url: str, seconds: int) -> dict[str, Any]:
    return _result(_start(scratch, url, seconds))


def _loads(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    found = re.search(r'ridgeline_loads_total\{.*outcome="loaded"\} (\S+)', text)
    return int(float(found[1])) - 1 if found else 0


def _resident_mib(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
