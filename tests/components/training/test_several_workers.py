import functools
import json
import signal
from typing import Any

import numpy as np
import pytest

from components.train import train
from components.training.engine import Engine
from components.training.fit import fit, make_engine
from components.training.network import build_model
from components.training.penalties import KINDS
from tests.cluster import finish, free_addresses, start
from tests.components.training import shared_training

TOLERANCE = 2e-5  # of a weight, after two epochs

TINY = {"mlp": {"hidden_units": [5]}, "epochs": 2, "batch_size": 50, "learning_rate": 0.05}
STRENGTHS = {"l1": 0.02, "l2": 0.01, "group": 0.02}
CNN = {"network": "cnn", "cnn": {"filters": [3, 2], "dropout": 0.0}, "epochs": 2, "batch_size": 50}


def penalty(kind, factor=1):
    return {"kind": kind, **{strength.name: factor * STRENGTHS[strength.name] for strength in KINDS[kind].strengths}}


CASES = {f"{kind} subgradient": TINY | {"penalty": penalty(kind)} for kind in KINDS}
CASES |= {
    f"{kind} proximal": TINY | {"penalty": penalty(kind, 10), "solver": "proximal", "momentum": 0.9}
    for kind in KINDS
    if KINDS[kind].sparse
}
CASES |= {
    "augmented": TINY | {"shift": 1, "shift_share": 0.5, "flip": True, "schedule": "cosine", "label_smoothing": 0.1},
    "adam": TINY | {"optimizer": "adam", "weight_decay": 0.05, "average": 0.9, "learning_rate": 0.003},
    "patience": TINY | {"epochs": 9, "patience": 2, "learning_rate": 0.3},
    "batch normalization": CNN,
}
DROPOUT = {"dropout": CNN | {"cnn": {"filters": [3, 2], "dropout": 0.5}}}


def start_workers(examples, results, cases, count, others=None, chief=None):
    """Start a process for each worker, with arguments of the chief and of the others."""
    addresses, processes = free_addresses(count), []
    for index in range(count):
        given = {"examples": str(examples.path), "results": str(results), "cases": cases}
        given |= {"addresses": addresses, "index": index} | ((others if index else chief) or {})
        processes.append(start(shared_training.__file__, json.dumps(given)))
    return processes


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, bars, tmp_path_factory):
    """The folder of what several workers trained together, and their number."""
    folder = tmp_path_factory.mktemp("shared")
    processes = start_workers(bars, folder, CASES | DROPOUT, request.param)
    printed = finish(processes)
    assert [process.returncode for process in processes] == [0] * request.param, "\n".join(printed)
    return folder, request.param


@pytest.fixture(scope="module")
def alone(bars):
    """What one worker trains."""
    results = {}
    for name, values in CASES.items():
        params: Any = train.parse(values)
        results[name] = fit(make_engine(bars, params), params)
    return results


def weights_of(file):
    return [file[f"arr_{i}"] for i in range(sum(name.startswith("arr_") for name in file.files))]


@pytest.mark.fresh_process
@pytest.mark.parametrize("name", CASES)
def test_several_workers_train_what_one_trains_but_for_the_order_of_sums(shared, alone, name):
    folder, count = shared
    expected = alone[name]
    for index in range(count):
        with np.load(folder / f"{name}.{index}.npz") as file:
            assert int(file["epoch"]) == expected.epoch
            for metric, values in expected.history.items():
                tie = 1 / 640 if "accuracy" in metric else 0.0  # two classes that are equally probable
                np.testing.assert_allclose(file[metric], values, atol=TOLERANCE + 1.01 * tie, err_msg=metric)
            for weight, own in zip(expected.weights, weights_of(file), strict=True):
                np.testing.assert_allclose(own, weight, atol=TOLERANCE)
    if name.endswith("proximal"):
        assert any(np.any(weight == 0) for weight in expected.weights[::2])


@pytest.mark.fresh_process
def test_dropout_differs_between_workers_but_their_weights_do_not(shared, bars):
    folder, count = shared
    params: Any = train.parse(DROPOUT["dropout"])
    alone = fit(make_engine(bars, params), params)
    files = [np.load(folder / f"dropout.{index}.npz") for index in range(count)]
    for weight, *others in zip(*map(weights_of, files), strict=True):
        for other in others:
            np.testing.assert_array_equal(other, weight)
    assert abs(files[0]["loss"][0] - alone.history["loss"][0]) > TOLERANCE
    assert abs(files[0]["val_loss"][-1] - alone.history["val_loss"][-1]) < 0.2


@pytest.mark.fresh_process
def test_workers_with_other_keys_or_batches_that_cannot_be_divided_are_refused(bars, tmp_path):
    processes = start_workers(bars, tmp_path, {"tiny": TINY | {"batch_size": 1}}, 2)
    for printed in finish(processes):
        assert "Expected a batch of at least one image for each of 2 workers; received train.batch_size=1." in printed
    processes = start_workers(bars, tmp_path, {"tiny": TINY}, 3, {"key": "another"})
    for printed in finish(processes):
        assert "inputs, code and libraries as the chief; received others on worker 1, 2." in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.fresh_process
@pytest.mark.parametrize("missing", [0, 1])
def test_a_worker_that_does_not_start_is_not_waited_for_for_ever(bars, tmp_path, missing):
    cases = {"tiny": TINY}
    processes = start_workers(bars, tmp_path, cases, 2, {"start_seconds": 4}, {"start_seconds": 4})
    processes[missing].kill()
    printed = finish(processes)[1 - missing]
    if missing:
        assert processes[0].returncode == -signal.SIGALRM
    else:
        assert "Expected 2 workers within 4 seconds; missing worker 0 at 127.0.0.1:" in printed


class Halves(Engine):
    """One worker that adds the gradients of the two halves of each batch."""

    by_xla = False
    chief = True

    def _gradients(self, images, labels, real, total):
        middle, parts = images.shape[0] // 2, []
        for self.chief, rows in ((True, slice(None, middle)), (False, slice(middle, None))):
            parts.append(super()._gradients(images[rows], labels[rows], real[rows], total))
        (loss, hits, gradients), others = parts
        return loss + others[0], hits + others[1], [a + b for a, b in zip(gradients, others[2], strict=True)]

    def _penalties(self, real, total):
        return super()._penalties(real, total) * float(self.chief)


@pytest.mark.fresh_process
@pytest.mark.parametrize("name", ["l2 subgradient", "l1 proximal", "adam"])
def test_two_workers_give_the_bytes_of_one_that_adds_the_halves(shared, bars, name):
    folder, count = shared
    if count != 2:
        pytest.skip("of three numbers, the sum depends on their order")
    params: Any = train.parse(CASES[name])
    build = functools.partial(build_model, bars, params)
    expected = fit(Halves(build, bars, params.recipe, params.penalty.formula), params)
    with np.load(folder / f"{name}.0.npz") as file:
        for weight, own in zip(expected.weights, weights_of(file), strict=True):
            np.testing.assert_array_equal(own, weight)
