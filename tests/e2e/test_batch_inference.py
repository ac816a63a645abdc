"""The DAG `batch_inference` in Airflow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ridgeline.artifacts.predictions import Predictions
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.settings import Settings
from ridgeline.store import Store

DAG = "batch_inference"
NAME = "predicting"


@pytest.fixture(scope="module")
def photos(
    airflow: Any, tmp_path_factory: pytest.TempPathFactory, synthetic_store: Store, refs: dict[str, str]
) -> Path:
    """A folder with two images and a text; the model `NAME` is served."""
    settings = Settings(store=airflow.store)
    store, registry = settings.open_store(), settings.open_registry()
    model = synthetic_store.open(refs["export"], PushedModel)
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(model.path, folder)
    (folder / "manifest.json").unlink()
    facts = model.facts.model_copy(update={"model_name": NAME, "champion": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ridgeline.registry.check", lambda *_: None)
        registry.push(store.open(store.publish(PushedModel.seal(folder, facts)), PushedModel), "run 1")
    photos = tmp_path_factory.mktemp("photos")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.jpg")
    (photos / "notes.txt").write_text("no image")
    return photos


def test_a_folder_becomes_a_parquet_file_and_only_new_files_follow(airflow: Any, photos: Path) -> None:
    store = Settings(store=airflow.store).open_store()
    conf = {"infer.model": NAME, "infer.folder": str(photos), "infer.new_files_only": True}

    def run() -> tuple[str, Any]:
        run_id = airflow.trigger(DAG, conf)
        assert airflow.wait_for_run(DAG, run_id, 180) == "success"
        return airflow.states(DAG, run_id)["infer"], airflow.records(run_id)["infer"]

    def paths(record: Any) -> list[str]:
        table = pq.read_table(store.open(record.output, Predictions).parquet)
        assert set(table["version"].to_pylist()) == {1}
        found: list[str] = table["path"].to_pylist()
        return found

    state, record = run()
    assert (state, paths(record)) == ("success", ["0.jpg", "1.jpg", "notes.txt"])
    assert airflow.records(record.run_id).keys() == {"infer"}  # nothing is trained
    state, record = run()
    assert (state, record.output) == ("skipped", None)
    shutil.copy(photos / "0.jpg", photos / "2.jpg")
    state, record = run()
    assert (state, paths(record)) == ("success", ["2.jpg"])


def test_an_unknown_model_fails_the_run_without_a_retry(airflow: Any, photos: Path) -> None:
    run_id = airflow.trigger(DAG, {"infer.model": "no_such_model", "infer.folder": str(photos)})
    assert airflow.wait_for_run(DAG, run_id, 120) == "failed"
    assert "Expected the name of a served model" in airflow.log(DAG, run_id, "infer")
