import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ridgeline.serving.batching import MAX_WAITING, Batcher, OverloadedError


class Model:
    """Doubles numbers; waits for `go` while it computes."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()

    def compute(self, images):
        self.batches.append(images.tolist())
        assert self.go.wait(10)
        if 13 in images:
            raise ArithmeticError("13")
        return {"double": images * 2, "same": images}


def images(*values):
    return np.array(values)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def run(model):
    """Run a coroutine with a batcher of the model, whose batches have at most 3 images."""

    def run(test):
        async def main():
            with ThreadPoolExecutor(1) as executor:
                await test(Batcher(model.compute, executor, 3))

        asyncio.run(main())

    return run


async def computing(model, number):
    while len(model.batches) < number:
        await asyncio.sleep(0.001)


def test_what_arrives_during_a_batch_forms_the_next_ones(model, run):
    async def test(batcher):
        first = asyncio.create_task(batcher.predict(images(1)))
        await computing(model, 1)
        others = [asyncio.create_task(batcher.predict(images(*values))) for values in ((2,), (3, 4), (5,), (6, 7, 8))]
        await asyncio.sleep(0.01)
        model.go.set()
        found = await asyncio.gather(first, *others)
        assert [outputs["double"].tolist() for outputs in found] == [[2], [4], [6, 8], [10], [12, 14, 16]]
        assert model.batches == [[1], [2, 3, 4], [5], [6, 7, 8]]
        assert (await batcher.predict(images(9)))["same"].tolist() == [9]  # it starts again

    run(test)


def test_requests_that_arrive_together_form_one_batch(model, run):
    async def test(batcher):
        model.go.set()
        await asyncio.gather(*(batcher.predict(images(value)) for value in (1, 2, 3)))
        assert model.batches == [[1, 2, 3]]

    run(test)


def test_an_error_reaches_the_requests_of_its_batch_alone(model, run):
    async def test(batcher):
        model.go.set()
        bad = [asyncio.create_task(batcher.predict(images(value))) for value in (13, 1, 2)]
        good = asyncio.create_task(batcher.predict(images(3)))
        assert (await good)["double"].tolist() == [6]
        for outcome in await asyncio.gather(*bad, return_exceptions=True):
            assert isinstance(outcome, ArithmeticError)

    run(test)


@pytest.mark.parametrize("outputs", [{"x": np.float32(1)}, {"x": np.zeros((3, 2)), "y": np.zeros(2)}, [], None])
def test_outputs_without_a_row_for_each_image_are_an_error_of_their_batch(run, model, monkeypatch, outputs):
    async def test(batcher):
        model.go.set()
        with monkeypatch.context() as patch:
            patch.setattr(batcher, "_compute", lambda images: outputs)
            for found in await asyncio.gather(
                *(batcher.predict(images(*v)) for v in ((1, 2), (3,))), return_exceptions=True
            ):
                assert isinstance(found, ValueError | AttributeError)
        assert (await batcher.predict(images(9)))["double"].tolist() == [18]

    run(test)


def test_a_request_whose_client_left_is_not_computed(model, run):
    async def test(batcher):
        first = asyncio.create_task(batcher.predict(images(1)))
        await computing(model, 1)
        left, stays = (asyncio.create_task(batcher.predict(images(value))) for value in (2, 3))
        await asyncio.sleep(0)
        left.cancel()
        model.go.set()
        await asyncio.gather(first, stays)
        assert model.batches == [[1], [3]]

    run(test)


def test_too_many_waiting_requests_are_refused(model, run):
    async def test(batcher):
        tasks = [asyncio.create_task(batcher.predict(images(1, 2, 3)))]
        await computing(model, 1)
        tasks += [asyncio.create_task(batcher.predict(images(1, 2, 3))) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="192 images wait already"):
            await batcher.predict(images(1))
        model.go.set()
        await asyncio.gather(*tasks)

    run(test)
