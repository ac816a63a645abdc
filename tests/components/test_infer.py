"""Batch inference: a served model's predictions for a folder, with kills, new files and bad input."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from upath import UPath

from components import infer as module
from components.ingestion import decoding_stream
from ridgeline import executor, pipeline
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.predictions import Predictions
from ridgeline.component import ParameterError, StepError, TransientStepError
from ridgeline.gc import collect_garbage
from ridgeline.image_decoding import decode
from ridgeline.image_form import Form
from ridgeline.settings import Settings
from ridgeline.store import Execution

MODEL = "synthetic_garments"
NUM_IMAGES = 40
RUN = """
import os, signal, sys
from components import infer
from components.ingestion import decoding_stream
from ridgeline import cli

decoding_stream.BATCH_FILES, infer.PART_BATCHES = 4, 2
predict, left = infer.Classifier.predict, int(sys.argv[1])

def predict_or_die(self, images):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(self, images)

infer.Classifier.predict = predict_or_die
cli.app(sys.argv[2:])
"""


@pytest.fixture
def settings(synthetic: tuple[Settings, list[Execution]], tmp_path: Path) -> Settings:
    """A copy of the store with one served version."""
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    return Settings(store=str(tmp_path / "store"), manual_dir=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes and modes in two folders; one file is empty, one is a text, one is cut off."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (28 + number % 3, 28 + number % 2, 4), np.uint8)
        file = folder / f"day {number % 2}" / f"ü {number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(("L", "RGB", "RGBA", "P", "1")[number % 5]).save(file)
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    (folder / "cut off.png").write_bytes((folder / "day 0" / "ü 00.png").read_bytes()[:300])
    return folder


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may change."""
    shutil.copytree(images, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_stream, "BATCH_FILES", 4)
    monkeypatch.setattr(module, "PART_BATCHES", 2)


def run(settings: Settings, where: object, /, **values: Any) -> Execution:
    steps = pipeline.plan("infer")
    given = {"model": MODEL, "folder": str(where)} | values
    params = pipeline.parse_params(steps, {f"infer.{name}": value for name, value in given.items()}, settings)
    (result,) = pipeline.run(settings, steps, params, "predict")
    return result.execution


def predictions(settings: Settings, execution: Execution) -> Predictions:
    assert execution.output, execution
    return settings.open_store().open(execution.output, Predictions)


def rows(settings: Settings, execution: Execution) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(predictions(settings, execution).parquet).to_pylist()
    return table


def test_nothing_but_infer_is_planned() -> None:
    assert [step.name for step in pipeline.plan("infer")] == ["infer"]


def test_each_file_is_a_row_with_what_the_model_predicts(
    settings: Settings, images: Path, refs: dict[str, str], small_parts: None
) -> None:
    execution = run(settings, images)
    found = rows(settings, execution)
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file())
    assert [row["path"] for row in found] == names
    model = settings.open_store().open(refs["train"], Model)
    network = model.load_keras()
    for row in found:
        assert (row["model"], row["version"], row["model_digest"]) == (MODEL, 1, model.digest)
        if row["error"] is None:
            image, _ = decode((images / row["path"]).read_bytes(), Form.of_shape((28, 28)))
            expected = network.predict(np.asarray(image)[None], verbose=0)[0]
            assert row["class_id"] == expected.argmax()
            assert row["class_name"] == model.facts.class_names[row["class_id"]]
            assert row["probability"] == pytest.approx(expected.max(), rel=1e-5)
    unreadable = {row["path"]: row["error"] for row in found if row["error"]}
    assert unreadable.keys() == {"cut off.png", "empty.jpg", "notes.txt"}
    assert unreadable["empty.jpg"] == "empty file"
    assert unreadable["cut off.png"].startswith("damaged: ")
    assert all(row["class_id"] is row["class_name"] is row["probability"] is None for row in found if row["error"])
    facts = predictions(settings, execution).facts
    assert (facts.num_files, facts.num_unreadable, facts.num_covered) == (NUM_IMAGES + 3, 3, NUM_IMAGES + 3)
    assert sum(facts.classes.values()) == NUM_IMAGES
    assert facts.classes.keys() == {*model.facts.class_names}


@pytest.mark.fresh_process
def test_processes_do_not_change_the_bytes(
    settings: Settings, images: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(settings, images).output
    monkeypatch.setattr("components.ingestion.decoding_stream.FEW_FILES", 2)
    steps = pipeline.plan("infer")
    params = pipeline.parse_params(steps, {"infer.model": MODEL, "infer.folder": str(images)}, settings)
    (again,) = pipeline.run(settings, steps, params, "again", rerun=["infer"])
    assert (again.execution.state, again.execution.output) == ("complete", output)


def test_an_unchanged_folder_is_reused_and_a_moved_or_changed_one_is_not(settings: Settings, folder: Path) -> None:
    first = run(settings, folder)
    again = run(settings, f"{folder}/")
    assert (again.state, again.output) == ("cached", first.output)
    assert again.parts.params["version"] == 1
    (folder / "notes.txt").write_text("other")
    changed = run(settings, folder)
    assert (changed.state, changed.reason) == ("complete", "source photos changed: 1 file modified")


def test_the_version_decides(two_versions: Settings, images: Path, tmp_path: Path) -> None:
    shutil.copytree(two_versions.store, tmp_path / "store")
    settings = Settings(store=str(tmp_path / "store"), manual_dir=None)
    champion, first = run(settings, images), run(settings, images, version=1)
    assert {row["version"] for row in rows(settings, champion)} == {2}
    assert {row["version"] for row in rows(settings, first)} == {1}
    assert champion.inputs["pushed"] != first.inputs["pushed"]
    assert run(settings, images, version=2).state == "cached"


@pytest.mark.fresh_process
@pytest.mark.parametrize("batches", [0, 3, 10])
def test_a_killed_run_resumes_with_the_same_bytes(
    settings: Settings, images: Path, tmp_path: Path, small_parts: None, batches: int
) -> None:
    output = tmp_path / "predictions.parquet"

    def infer_and_die_after(count: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, str(count), "infer", MODEL, str(images), "--output", str(output)]
        env = os.environ | {"RIDGELINE_STORE": settings.store}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    killed = infer_and_die_after(batches)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    store = settings.open_store()
    assert not list(store.executions("infer", with_output=True))
    parts = list(store.local.glob("scratch/*/part-*.parquet"))
    assert len(parts) == batches // 2
    resumed = infer_and_die_after(1_000)
    assert resumed.returncode == 0, resumed.stderr
    assert ("resuming: " in resumed.stdout) == bool(parts)
    (record,) = store.executions("infer", with_output=True)
    assert output.read_bytes() == predictions(settings, record).parquet.read_bytes()
    assert not list(store.local.glob("scratch/*/part-*"))
    again = run(settings, shutil.copytree(images, tmp_path / "elsewhere"))
    assert again.output == record.output  # that of a run that was never killed


def test_damaged_parts_are_predicted_again(
    settings: Settings, images: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(module, "join", die)
        run(settings, images)
    first, second, third, *others = sorted(settings.open_store().local.glob("scratch/*/part-*.parquet"))
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    second.write_bytes(b"")
    content = third.read_bytes()
    at = content.index(b".png")
    third.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    written: list[int] = []
    write = module.write_part

    def write_part(folder: Path, number: int, *rest: Any) -> Path:
        written.append(number)
        return write(folder, number, *rest)

    monkeypatch.setattr(module, "write_part", write_part)
    found = [row["path"] for row in rows(settings, run(settings, images))]
    assert found == sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*"))
    assert (written, len(others)) == ([0, 1, 2], 3)


def test_only_new_files_have_rows(settings: Settings, folder: Path) -> None:
    first = run(settings, folder, new_files_only=True)
    assert predictions(settings, first).facts.earlier is None
    nothing = run(settings, folder, new_files_only=True)
    assert (nothing.state, nothing.output) == ("skipped", None)
    assert nothing.reason == f"no new files in {folder}: earlier predictions have rows for all of them"
    shutil.copy(folder / "day 0" / "ü 00.png", folder / "day 1" / "copy.png")
    (folder / "notes.txt").write_text("other content")
    (folder / "empty.jpg").unlink()
    second = run(settings, folder, new_files_only=True)
    assert [row["path"] for row in rows(settings, second)] == ["day 1/copy.png", "notes.txt"]
    facts = predictions(settings, second).facts
    assert facts.earlier == predictions(settings, first).digest
    assert (facts.num_files, facts.num_covered) == (2, NUM_IMAGES + 5)
    assert run(settings, folder, new_files_only=True).state == "skipped"
    (folder / "third.png").write_bytes((folder / "day 0" / "ü 02.png").read_bytes())
    assert [row["path"] for row in rows(settings, run(settings, folder, new_files_only=True))] == ["third.png"]
    elsewhere = shutil.copytree(folder, folder.with_name("elsewhere"))
    assert len(rows(settings, run(settings, elsewhere, new_files_only=True))) == NUM_IMAGES + 4  # another folder
    assert len(rows(settings, run(settings, folder))) == NUM_IMAGES + 4  # all files, as asked


def test_predictions_of_new_files_are_kept_with_those_that_they_add_to(settings: Settings, folder: Path) -> None:
    added = [run(settings, folder, new_files_only=True).output]
    for name in ("new.png", "newer.png"):
        (folder / name).write_bytes((folder / "day 0" / "ü 02.png").read_bytes())
        added.append(run(settings, folder, new_files_only=True).output)
    run(settings, folder)
    store = settings.open_store()
    for value in range(2):  # other runs follow
        steps = pipeline.plan("infer")
        other = shutil.copytree(folder / f"day {value}", folder.with_name(f"other {value}"))
        params = pipeline.parse_params(steps, {"infer.model": MODEL, "infer.folder": str(other)}, settings)
        list(pipeline.run(settings, steps, params, f"other {value}"))
    garbage = collect_garbage(
        store, settings.open_registry(), 1, False, timedelta(0), pipeline.load_components().values()
    )
    assert not garbage.artifacts.keys() & {*added}
    assert run(settings, folder, new_files_only=True).state == "skipped"


@pytest.mark.parametrize("first", [False, True])
def test_of_two_runs_at_once_only_one_adds_rows(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    if not first:
        run(settings, folder, new_files_only=True)
    (folder / "new.png").write_bytes((folder / "day 0" / "ü 02.png").read_bytes())
    other: list[Any] = []

    def added_to(*args: Any) -> dict[str, str]:
        found = executor.added_to(*args)
        if not other:  # another run begins and ends here
            other.append(None)
            other[0] = run(settings, folder, new_files_only=True)
            (folder / "newer.png").write_bytes((folder / "day 0" / "ü 02.png").read_bytes())
        return found

    monkeypatch.setattr(pipeline, "added_to", added_to)
    with pytest.raises(TransientStepError, match="one did so meanwhile: Predictions/[0-9a-f]+. Run it again."):
        run(settings, folder, new_files_only=True)
    assert [row["path"] for row in rows(settings, run(settings, folder, new_files_only=True))] == ["newer.png"]
    covered = [*predictions(settings, other[0]).covered()]
    assert len(covered) == len({*covered}) == NUM_IMAGES + 4


def test_an_object_store_has_the_rows_of_the_folder(settings: Settings, images: Path, bucket: str) -> None:
    for path in images.rglob("*"):
        if path.is_file():
            (UPath(bucket) / "photos" / path.relative_to(images).as_posix()).write_bytes(path.read_bytes())
    here, there = rows(settings, run(settings, images)), rows(settings, run(settings, f"{bucket}/photos"))
    assert [row | {"content": ""} for row in here] == [row | {"content": ""} for row in there]
    assert all(":" in row["content"] for row in there)


def test_bad_input_is_refused_in_one_sentence(settings: Settings, folder: Path, tmp_path: Path) -> None:
    def error(where: object = folder, **values: Any) -> str:
        with pytest.raises(StepError) as caught:
            run(settings, where, **values)
        return str(caught.value)

    assert error(model="shirts") == f"Expected the name of a served model: {MODEL}; received 'shirts'."
    assert error(version=7) == f"Expected a version of {MODEL}; received 7, which does not exist. There is version 1."
    assert error(model=None) == (
        "Parameter infer.model: expected the name of a served model; received none. `ridgeline models list` shows them."
    )
    assert error(folder=None) == "Parameter infer.folder: expected the folder of the images; received none. Set it."
    assert "No such file or directory" in error(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty") == (
        f"Expected images in {tmp_path / 'empty'}; received no file. Name another folder."
    )
    assert run(settings, tmp_path / "empty", new_files_only=True).state == "skipped"
    with pytest.raises(ParameterError, match=r"^Parameter infer\.folder: expected a URL without a user"):
        run(settings, "s3://key:secret@host/bucket")
    weights = next((settings.serving_dir() / MODEL / "1" / "variables").glob("*.data*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "they were changed: variables/variables.data" in error()
    assert not list(settings.open_store().executions("infer", with_output=True))


def test_a_version_whose_artifact_is_damaged_is_named(settings: Settings, images: Path) -> None:
    (artifact,) = settings.open_store().local.glob("artifacts/PushedModel/*")
    (artifact / "saved_model" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(StepError, match=r"saved_model/saved_model\.pb.*The artifact is damaged"):
        run(settings, images)


def test_probabilities_that_are_no_numbers_are_an_error_of_their_row(
    settings: Settings, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf

    loaded = tf.saved_model.load

    class Odd:
        def __init__(self, path: str) -> None:
            self.signatures = {"serving_default": self.serve}
            self.model = loaded(path)

        def serve(self, images: Any) -> Any:
            found = self.model.signatures["serving_default"](images=images)
            first = tf.one_hot(0, len(images), on_value=np.float32("nan"), off_value=np.float32(1))
            return found | {"probabilities": found["probabilities"] * first[:, None]}

    monkeypatch.setattr(tf.saved_model, "load", Odd)
    found = rows(settings, run(settings, images / "day 0"))
    assert [row["error"] for row in found[:2]] == ["the model's probabilities are not finite numbers", None]


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Nothing unfinished is left in the store, whatever a test did."""
    yield
    assert not list(tmp_path.glob("store/staging/*/*"))
