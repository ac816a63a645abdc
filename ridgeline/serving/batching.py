"""Batches across requests: while a model computes one batch, the next one gathers."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

MAX_WAITING = 64  # batches; further requests are refused, as their clients would not wait for the response

Outputs = dict[str, np.ndarray]


class OverloadedError(Exception):
    """More requests wait than can be answered soon."""


class Batcher:
    """Joins the images of requests into batches. A request alone waits for nothing.

    All of its methods are called in one event loop.

    Args:
        compute: Returns the outputs for some images, by name; one row for each image. Called in a thread.
        executor: Runs the thread.
        max_batch: The largest number of images of a batch, and so of a request.
        observe: Called with the number of images of each batch.
    """

    def __init__(
        self,
        compute: Callable[[np.ndarray], Outputs],
        executor: Executor,
        max_batch: int,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._compute, self._executor, self._max_batch, self._observe = compute, executor, max_batch, observe
        self._waiting: collections.deque[tuple[np.ndarray, asyncio.Future[Outputs]]] = collections.deque()
        self._num_waiting = 0  # images
        self._worker: asyncio.Task[None] | None = None

    async def predict(self, images: np.ndarray) -> Outputs:
        """Return the outputs for the images of a request.

        Args:
            images: uint8 ``[n, ...]``, with n from 1 to the largest batch.

        Raises:
            OverloadedError: If too many requests wait.
        """
        if self._num_waiting + len(images) > MAX_WAITING * self._max_batch:
            raise OverloadedError(f"{self._num_waiting} images wait already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outputs] = loop.create_future()
        self._waiting.append((images, future))
        self._num_waiting += len(images)
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # requests that arrived together form the first batch
        while batch := self._next_batch():
            try:
                images = np.concatenate([images for images, _ in batch]) if len(batch) > 1 else batch[0][0]
                outputs = await loop.run_in_executor(self._executor, self._compute, images)
                self._observe(len(images))
                if odd := {
                    name: values.shape for name, values in outputs.items() if values.shape[:1] != images.shape[:1]
                }:
                    raise ValueError(f"Expected outputs of {len(images)} rows; received {odd}.")
                start = 0
                for own, future in batch:
                    stop = start + len(own)
                    if not future.done():  # its client may have left
                        future.set_result({name: values[start:stop] for name, values in outputs.items()})
                    start = stop
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
        self._worker = None

    def _next_batch(self) -> list[tuple[np.ndarray, asyncio.Future[Outputs]]]:
        batch, size = [], 0
        while self._waiting and size + len(self._waiting[0][0]) <= self._max_batch:
            images, future = self._waiting.popleft()
            self._num_waiting -= len(images)
            if not future.done():
                batch.append((images, future))
                size += len(images)
        return batch
