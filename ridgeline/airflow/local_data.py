"""Choose the data of ``make run``: the official files, a download, or synthetic images.

No other module of the framework names files of data.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ridgeline.airflow.settings import AirflowSettings
from ridgeline.pipeline import explain, load_components, parse_params

DATA_FOLDERS = ("data/fashion-mnist", "../shared/data/fashion-mnist")
OFFICIAL_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
DAGS = ("fashion_mnist_training", "regularization_path")  # whose data is chosen; other DAGs name their own
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
HOST_CHECK = """
import sys, urllib.request
import tensorflow_datasets as tfds
url = next(iter(tfds.builder(sys.argv[1], try_gcs=False).url_infos))
urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
"""
WARNING = """
********************************************************************************
*  NOT THE REAL DATA. This run trains on synthetic images.                     *
*  Its figures say nothing about Fashion-MNIST.                                *
*                                                                              *
*  The official files were not found, and their host does not respond. Put     *
*  the four *-ubyte.gz files into data/fashion-mnist, or set                   *
*  RIDGELINE_MANUAL_DIR to their folder, and run again.                        *
********************************************************************************
"""


def find_official_files(folder: Path) -> Path | None:
    """Return the first of `DATA_FOLDERS` that holds all of the official files, or None.

    Args:
        folder: The folders are relative to it.
    """
    places = (folder / place for place in DATA_FOLDERS)
    return next((p.resolve() for p in places if all((p / name).is_file() for name in OFFICIAL_FILES)), None)


def choose_data(dag_id: str, folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the data, and print the choice. No other function replaces the real data.

    Data that the user chose, with RIDGELINE_MANUAL_DIR or ``ingest.dataset``, is never replaced, nor that of another
    DAG than `DAGS`.

    Args:
        dag_id: The DAG.
        folder: Searched for the official files. RIDGELINE_MANUAL_DIR is set to their folder if they are found.
        values: The user's parameter values by dotted name.

    Returns:
        The parameter values of the run.
    """
    if dag_id not in DAGS:
        return dict(values)
    if "RIDGELINE_MANUAL_DIR" in os.environ:
        print(f"data: files in {os.environ['RIDGELINE_MANUAL_DIR']} (RIDGELINE_MANUAL_DIR)")
    elif "ingest.dataset" in values:
        print(f"data: {values['ingest.dataset']}")
    elif found := find_official_files(folder):
        os.environ["RIDGELINE_MANUAL_DIR"] = str(found)
        print(f"data: official files in {found}")
    elif _is_prepared(values):
        print("data: prepared by an earlier run")
    elif _host_responds(load_components()["ingest"].params().dataset):  # type: ignore[attr-defined]
        print("data: to be downloaded by tfds")
    else:
        print(WARNING)
        return {**SYNTHETIC, **values}
    return dict(values)


def _is_prepared(values: Mapping[str, Any]) -> bool:
    settings, ingest = AirflowSettings(), load_components()["ingest"]
    params = parse_params([ingest], {n: v for n, v in values.items() if n.startswith("ingest.")}, settings)
    return all(sentence.startswith("reused") for _, sentence in explain(settings, [ingest], params))


def _host_responds(dataset: str) -> bool:
    print("data: no official files found; checking whether their host responds ...")
    try:
        command = [sys.executable, "-P", "-c", HOST_CHECK, dataset]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False
