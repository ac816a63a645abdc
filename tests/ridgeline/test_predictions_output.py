"""Predictions in the file or folder that a person names, and the command that puts them there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from ridgeline.cli import app
from ridgeline.settings import Settings
from ridgeline.store import Execution

MODEL = "synthetic_garments"


@pytest.fixture
def settings(synthetic: tuple[Settings, list[Execution]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A copy of the store with one served version, which the command uses."""
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    return Settings()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        add(folder, number)
    return folder


def add(folder: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")


def infer(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["infer", *map(str, arguments)])
    return done.exit_code, done.output.replace("\n", " ").strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_becomes_a_parquet_file(settings: Settings, folder: Path, tmp_path: Path) -> None:
    (folder / "text.png").write_text("no image")
    output = tmp_path / "new" / "predictions.parquet"
    code, text = infer(MODEL, folder, "--output", output)
    assert code == 0, text
    assert f"written: {output} 4 files, of which 1 are unreadable (column error)" in text
    assert names(output.parent) == [output.name]
    assert pq.read_table(output)["path"].to_pylist() == ["0.png", "1.png", "2.png", "text.png"]
    add(folder, 3)
    assert infer(MODEL, folder, "--output", output)[0] == 0
    assert pq.read_metadata(output).num_rows == 5  # replaced


def test_new_files_only_adds_a_file_for_each_run(settings: Settings, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "classes"
    command = (MODEL, folder, "--new-files-only", "--output", output)
    assert infer(*command)[0] == 0
    code, text = infer(*command)
    assert (code, "no new files in" in text, len(names(output))) == (0, True, 1)
    add(folder, 3)
    (output / names(output)[0]).rename(tmp_path / "moved")
    assert infer(*command)[0] == 0  # also makes up for what a killed run did not write
    assert len(names(output)) == 2
    table = pyarrow.dataset.dataset(output).to_table()
    assert sorted(table["path"].to_pylist()) == ["0.png", "1.png", "2.png", "3.png"]
    newest = max(output.iterdir(), key=lambda file: pq.read_table(file)["path"].to_pylist())
    oldest = next(file for file in output.iterdir() if file != newest)
    newest.unlink()
    oldest.unlink()
    assert infer(*command)[0] == 0
    assert {*output.iterdir()} == {newest, oldest}
    oldest.unlink()  # moved away, by whoever uses it
    assert infer(*command)[0] == 0
    assert [*output.iterdir()] == [newest]


def test_only_predictions_of_new_files_are_added_to(settings: Settings, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "classes"
    command = (MODEL, folder, "--new-files-only", "--output", output)
    for number in (3, 4):
        assert infer(MODEL, folder, "--output", tmp_path / "all.parquet")[0] == 0
        assert infer(*command)[0] == 0
        assert infer(MODEL, folder, "--output", tmp_path / "all.parquet")[0] == 0
        add(folder, number)
        assert infer(*command)[0] == 0
        table = pyarrow.dataset.dataset(output).to_table()
        assert sorted(table["path"].to_pylist()) == [f"{n}.png" for n in range(number + 1)]


def test_rows_that_were_deleted_before_they_were_written_are_an_error(
    settings: Settings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    output, store = tmp_path / "classes", settings.open_store()
    command = (MODEL, folder, "--new-files-only", "--output", output)
    assert infer(*command)[0] == 0
    for number in (3, 4, 5):
        add(folder, number)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", full)
            assert infer(*command)[0] == 1
    middle = [record.output for record in store.executions("infer", with_output=True)][1]
    assert middle
    path = store.path(middle)
    path.rename(tmp_path / "deleted")
    for _ in range(2):
        code, text = infer(*command)
        assert (code, len(names(output))) == (1, 1)
        assert f"Expected {middle} in the store, whose rows are not in {output}" in text
    (tmp_path / "deleted").rename(path)  # restored
    assert infer(*command)[0] == 0
    table = pyarrow.dataset.dataset(output).to_table()
    assert sorted(table["path"].to_pylist()) == [f"{n}.png" for n in range(6)]
    assert len(names(output)) == 4


def test_an_output_that_cannot_be_is_refused_before_anything_runs(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    def refused(*arguments: object) -> str:
        code, text = infer(MODEL, folder, *arguments)
        assert code == 1
        return text

    for url in ("s3://bucket/p.parquet", "file:///p.parquet", "memory://p"):
        assert "Name a path, and copy the file from there." in refused("--output", url)
        assert "Name a path, and copy the file from there." in refused("--output", url, "--new-files-only")
    assert "outside the folder of the images" in refused("--output", folder / "predictions.parquet")
    assert "Name a file in it." in refused("--output", tmp_path)
    assert "name the folder" in refused("--output", tmp_path / "file", "--new-files-only")
    assert "name the folder" in refused("--output", tmp_path / "a.parquet", "--new-files-only")
    assert not list(settings.open_store().executions("infer"))


def test_an_output_that_cannot_be_written_leaves_the_predictions_in_the_store(
    settings: Settings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "predictions.parquet"
    output.write_text("the earlier content")

    def full(source: Path, target: Path) -> Any:
        target.write_bytes(source.read_bytes()[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        code, text = infer(MODEL, folder, "--output", output)
    assert code == 1
    assert f"Cannot write predictions to {output}: No space left on device. Free disk space there" in text
    assert output.read_text() == "the earlier content"
    assert names(tmp_path) == ["photos", "predictions.parquet", "store"]
    (tmp_path / "file").touch()
    assert "Cannot write predictions" in infer(MODEL, folder, "--output", tmp_path / "file" / "p.parquet")[1]
    code, text = infer(MODEL, folder, "--output", output)
    assert code == 0, text
    assert [record.state for record in settings.open_store().executions("infer")] == ["cached", "cached", "complete"]
    assert pq.read_metadata(output).num_rows == 3
