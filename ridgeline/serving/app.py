"""The HTTP routes: TensorFlow Serving's REST API, image files, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import reprlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import HTTPException
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from ridgeline.registry import STABLE, Registry
from ridgeline.serving.batching import Outputs, OverloadedError
from ridgeline.serving.instances import BadRequestError, Instances, read_instances
from ridgeline.serving.metrics import Metrics
from ridgeline.serving.versions import Models, Predictor, SavedModel

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_BODIES = 16  # of the largest size; more bytes are not kept in memory
CLIENT_LEFT = 499  # as in the logs of nginx; nobody receives it
MODEL = "/v1/models/{name}"
PLACES = (MODEL, f"{MODEL}/versions/{{version}}", f"{MODEL}/labels/{{label}}")


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        request_mib: Size of its body.
        batch: Number of its images; also of a batch of several requests.
        seconds: Until its body has arrived; also to decode its images.
        image_pixels: Pixels of an image file; at most those that the model was trained with, also if it is None.
    """

    request_mib: float = 16.0
    batch: int = 256
    seconds: float = 30.0
    image_pixels: int | None = None


def create_app(
    registry: Registry,
    limits: Limits = Limits(),
    token: str | None = None,
    load: Callable[[str, Path], Predictor] | None = None,
    draw: Callable[[], float] | None = None,
) -> FastAPI:
    """Return the application that serves the models of a registry.

    Args:
        registry: The registry; it is only read.
        limits: What one request may take.
        token: What clients must send as ``Authorization: Bearer TOKEN``, except to ``/health``; None for no check.
        load: Returns the loaded version of a folder, by the model's name; a batched SavedModel if None.
        draw: See `Models`.
    """
    metrics = Metrics()
    cores = os.cpu_count() or 1
    models_pool = ThreadPoolExecutor(cores, "model")  # each version computes one batch at a time
    requests_pool = ThreadPoolExecutor(cores, "request")  # so many bodies at a time are in memory as images
    refresh_pool = ThreadPoolExecutor(1, "refresh")
    bodies = Bodies(limits)

    def load_saved_model(name: str, folder: Path) -> SavedModel:
        return SavedModel(folder, models_pool, limits.batch, metrics.batch_images.labels(name).observe)

    models = Models(registry, load or load_saved_model, metrics, **({"draw": draw} if draw else {}))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(refresh_pool, models.refresh)

        async def poll() -> None:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                try:
                    await loop.run_in_executor(refresh_pool, models.refresh)
                except Exception:
                    log.exception("Cannot look for new versions; the present ones stay")

        task = loop.create_task(poll())
        yield
        task.cancel()
        for pool in (refresh_pool, requests_pool, models_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="ridgeline serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(request: Request, error: HTTPException) -> Response:
        message = f"Expected a request as in docs/serving.md; received {request.method} {request.url.path}."
        return _json({"error": message}, error.status_code, error.headers)

    @app.exception_handler(BadRequestError)
    async def refuse(request: Request, error: BadRequestError) -> Response:
        return _refusal(error)

    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise BadRequestError("Expected the header Authorization: Bearer TOKEN; received none or another.", 401)

    def choose(path: Mapping[str, str]) -> tuple[int, str, Predictor]:
        version = path.get("version")
        if version is not None and not (version.isdecimal() and len(version) < 19):
            raise BadRequestError(f"Expected the number of a version; received {reprlib.repr(version)}.", 404)
        return models.choose(path["name"], None if version is None else int(version), path.get("label"))

    async def answer_to(body: bytes, is_json: bool, predictor: Predictor) -> dict[str, Any]:
        form = predictor.form
        if limits.image_pixels is not None:
            form = replace(form, max_image_pixels=min(form.max_image_pixels, limits.image_pixels))
        given = await asyncio.get_running_loop().run_in_executor(
            requests_pool, read_instances, body, is_json, predictor.image_shape, form, limits.batch, limits.seconds
        )
        return _answer(await predictor.predict(given.images), given)

    async def predict(request: Request) -> Response:
        start = time.monotonic()
        name, number = "", ""
        try:
            version, label, predictor = choose(request.path_params)
            name, number = request.path_params["name"], str(version)
            is_json = "json" in request.headers.get("content-type", "")
            async with bodies.read(request) as body:
                answer = await _unless_the_client_leaves(request, answer_to(body, is_json, predictor))
            response = _json(answer, 200, {"X-Model-Version": number, "X-Model-Label": label})
        except BadRequestError as error:
            response = _refusal(error)
        except OverloadedError as error:
            message = f"Too many requests at present: {error}. Try again later."
            response = _json({"error": message}, 503, {"Retry-After": "1"})
        except Exception:
            log.exception("Cannot answer a request to %s, version %s", name, number)
            response = _json({"error": "Cannot predict: an error of the server, which its log explains."}, 500)
        metrics.requests.labels(name, number, str(response.status_code)).inc()
        if name:
            metrics.seconds.labels(name).observe(time.monotonic() - start)
        return response

    async def status(request: Request) -> Response:
        path = request.path_params
        served = models.status(path["name"])
        if "version" in path or "label" in path or not served:
            number, label, _ = choose(path)
            served = [(number, label)]
        fine = {"error_code": "OK", "error_message": ""}
        found = [{"version": str(number), "state": "AVAILABLE", "status": fine} for number, _ in served]
        return _json({"model_version_status": found})

    async def metadata(request: Request) -> Response:
        path = {"label": STABLE} | request.path_params
        if "version" in path:
            del path["label"]
        number, _, predictor = choose(path)
        spec = {"name": path["name"], "signature_name": "", "version": str(number)}
        return _json({"model_spec": spec, "metadata": predictor.metadata})

    authorized = [Depends(authorize)]
    for place in PLACES:
        app.add_api_route(f"{place}:predict", predict, methods=["POST"], dependencies=authorized)
        app.add_api_route(f"{place}/metadata", metadata, methods=["GET"], dependencies=authorized)
        app.add_api_route(place, status, methods=["GET"], dependencies=authorized)

    @app.get("/health/live")
    async def live() -> Response:
        return _json({"status": "alive"})

    @app.get("/health/ready")
    async def ready() -> Response:
        is_ready = models.is_ready()
        text = "ready" if is_ready else "not ready"
        problems = {} if token else {"problems": models.problems()}  # with names and paths
        return _json({"status": text} | problems, 200 if is_ready else 503)

    @app.get("/metrics", dependencies=authorized)
    async def scrape() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class Bodies:
    """The bodies of requests: each has a limited size, and so have all that are in memory.

    Args:
        limits: What one request may take.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0  # bytes of all

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body of a request. It counts as in memory until the end of the context.

        Args:
            request: The request.

        Raises:
            BadRequestError: If it is too large, encoded, or does not arrive in time.
            OverloadedError: If the bodies in memory are too large.
        """
        if encoding := request.headers.get("content-encoding"):
            raise BadRequestError(f"Expected a body without Content-Encoding; received {encoding!r}.", 415)
        parts: list[bytes] = []
        try:
            await self._gather(request, parts)
            parts[:] = [b"".join(parts)]
            yield parts[0]
        finally:
            self._held -= sum(map(len, parts))

    async def _gather(self, request: Request, parts: list[bytes]) -> None:
        limit, seconds, size = int(self._limits.request_mib * 2**20), self._limits.seconds, 0
        too_large = BadRequestError(
            f"Expected a body of at most {self._limits.request_mib:g} MiB; received a larger one. Send several "
            "requests.",
            413,
        )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    if self._held + len(part) > MAX_BODIES * limit:
                        raise OverloadedError(f"their bodies take {self._held / 2**20:.3g} MiB")
                    self._held += len(part)
                    parts.append(part)
        except TimeoutError:
            message = f"Expected the whole body within {seconds:g} s; received {size} bytes of it."
            raise BadRequestError(message, 408) from None
        except ClientDisconnect:
            raise BadRequestError("The client left before its body had arrived.", CLIENT_LEFT) from None


async def _unless_the_client_leaves(request: Request, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Return what a coroutine returns; cancel it once the client, whose body was read, closes the connection."""
    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise BadRequestError("The client left before the response.", CLIENT_LEFT)
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _answer(outputs: Outputs, given: Instances) -> dict[str, Any]:
    if any(column.dtype.kind == "f" and not np.isfinite(column).all() for column in outputs.values()):
        raise BadRequestError("Cannot predict: the model's probabilities are not finite numbers.", 500)
    values = {name: _plain(column) for name, column in outputs.items()}
    if given.columns:
        return {"outputs": values}
    return {"predictions": [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]}


def _plain(column: np.ndarray) -> list[Any]:
    return [text.decode() for text in column] if column.dtype == object else column.tolist()


def _refusal(error: BadRequestError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status, {})
    unread = {"Connection": "close"} if error.status in (401, 408, 413, 415) else {}  # the body was not read
    return _json({"error": str(error)}, error.status, headers | unread)


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")
