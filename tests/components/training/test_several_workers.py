import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from components.train import train
from components.training.fit import fit, make_engine
from components.training.penalties import KINDS
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


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def start(examples, results, cases, count, **changed):
    """Start a process for each worker."""
    addresses = free_addresses(count)
    processes = []
    for index in range(count):
        given = {
            "examples": str(examples.path),
            "results": str(results),
            "addresses": addresses,
            "index": index,
            "cases": cases,
        }
        command = [
            sys.executable,
            "-P",
            shared_training.__file__,
            json.dumps(given | changed.get(f"worker_{index}", {})),
        ]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def finish(processes, timeout=300):
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, bars, tmp_path_factory):
    """The folder of what several workers trained together, and their number."""
    folder = tmp_path_factory.mktemp("shared")
    processes = start(bars, folder, CASES, request.param)
    printed = finish(processes)
    assert [process.returncode for process in processes] == [0] * request.param, "\n".join(printed)
    return folder, request.param


@pytest.fixture(scope="module")
def alone(bars):
    """What one worker trains."""
    results = {}
    for name, values in CASES.items():
        params = train.parse(values)
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
