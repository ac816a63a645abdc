from __future__ import annotations

import os
from pathlib import Path

import pytest

from ridgeline.airflow import local_data
from ridgeline.airflow.local_data import OFFICIAL_FILES, choose_data, find_official_files

DAG = "fashion_mnist_training"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without data, with an empty store and no manual directory."""
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", "recorded, so that it is restored after the test")
    monkeypatch.delenv("RIDGELINE_MANUAL_DIR")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(local_data, "_host_responds", lambda _: False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    return folder


def put_files(folder: Path, names: tuple[str, ...] = OFFICIAL_FILES) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_first_folder_with_all_files_is_used(folder: Path) -> None:
    assert find_official_files(folder) is None
    shared = put_files(folder.parent / "shared/data/fashion-mnist")
    assert find_official_files(folder) == shared
    own = put_files(folder / "data/fashion-mnist", OFFICIAL_FILES[:3])
    assert find_official_files(folder) == shared
    (own / OFFICIAL_FILES[3]).touch()
    assert find_official_files(folder) == own


def test_found_files_are_used_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = put_files(folder / "data/fashion-mnist")
    assert choose_data(DAG, folder, {"train.epochs": 3}) == {"train.epochs": 3}
    assert os.environ["RIDGELINE_MANUAL_DIR"] == str(own)
    assert str(own) in capsys.readouterr().out


def test_data_that_the_user_chose_is_never_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_data(DAG, folder, {"ingest.dataset": "mnist:3.0.1"}) == {"ingest.dataset": "mnist:3.0.1"}
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", str(folder / "empty"))
    assert choose_data(DAG, folder, {}) == {}
    assert os.environ["RIDGELINE_MANUAL_DIR"] == str(folder / "empty")


def test_the_data_of_another_dag_is_never_replaced(folder: Path) -> None:
    put_files(folder / "data/fashion-mnist")
    assert choose_data("product_photos_training", folder, {"train.epochs": 3}) == {"train.epochs": 3}
    assert "RIDGELINE_MANUAL_DIR" not in os.environ


def test_tfds_downloads_if_the_host_responds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(local_data, "_host_responds", lambda dataset: asked.append(dataset) or True)  # type: ignore[func-returns-value]
    assert choose_data(DAG, folder, {}) == {}
    assert asked == ["fashion_mnist:3.0.1"]


def test_without_data_it_warns_and_uses_synthetic_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = choose_data(DAG, folder, {"train.epochs": 3, "transform.validation_examples": 500})
    assert values == {
        "ingest.dataset": "synthetic_garments:1.0.0",
        "train.epochs": 3,
        "transform.validation_examples": 500,
    }
    assert "NOT THE REAL DATA" in capsys.readouterr().out


def test_data_that_an_earlier_run_prepared_needs_no_files_and_no_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_data, "_is_prepared", lambda _: True)
    assert choose_data(DAG, folder, {}) == {}
