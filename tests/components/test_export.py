import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from components.export import export, save
from ridgeline import pipeline
from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation, Verdict
from ridgeline.artifacts.pushed_model import PushedModel, read_form
from ridgeline.component import StepSkipped
from ridgeline.image_form import Form
from ridgeline.settings import Settings
from tests.conftest import SYNTHETIC


@pytest.fixture(scope="module")
def inputs(synthetic_store, refs):
    return {
        "examples": synthetic_store.open(refs["transform"], Examples),
        "model": synthetic_store.open(refs["train"], Model),
        "evaluation": synthetic_store.open(refs["evaluate"], ModelEvaluation),
    }


def with_facts(evaluation, folder, **changes):
    folder.mkdir()
    return ModelEvaluation.seal(folder, evaluation.facts.model_copy(update=changes))


def assert_serves(pushed, model, images):
    import tensorflow as tf

    serve = tf.saved_model.load(str(pushed.saved_model)).signatures["serving_default"]
    expected = model.load_keras().predict(images, verbose=0)
    for batch in (1, 7, len(images)):
        answers = {name: value.numpy() for name, value in serve(images=tf.constant(images[:batch])).items()}
        assert {n: (v.dtype.kind, v.shape) for n, v in answers.items()} == {
            "probabilities": ("f", (batch, 10)),
            "class_id": ("i", (batch,)),
            "class_name": ("O", (batch,)),
        }
        np.testing.assert_allclose(answers["probabilities"], expected[:batch], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(answers["class_id"], answers["probabilities"].argmax(axis=1))
        names = [name.decode() for name in answers["class_name"]]
        assert names == [pushed.facts.class_names[i] for i in answers["class_id"]]


def test_saved_model_equals_the_live_model(synthetic_store, refs, inputs):
    pushed = synthetic_store.open(refs["export"], PushedModel)
    images = np.asarray(inputs["examples"].split("test").images)
    assert_serves(pushed, inputs["model"], images)


@pytest.mark.fresh_process
def test_signature_takes_raw_uint8_images(synthetic_store, refs):
    saved_model = synthetic_store.open(refs["export"], PushedModel).saved_model
    script = "from tensorflow.python.tools.saved_model_cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", script, "show", "--dir", saved_model, "--tag_set", "serve", "--signature_def",
         "serving_default"], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "inputs['images'] tensor_info:\n      dtype: DT_UINT8\n      shape: (-1, 28, 28)" in shown
    for name, dtype in (("class_id", "INT64"), ("class_name", "STRING"), ("probabilities", "FLOAT")):
        assert f"outputs['{name}'] tensor_info:\n      dtype: DT_{dtype}" in shown


def test_check_holds_the_evaluations_own_predictions(synthetic_store, refs, inputs):
    pushed = synthetic_store.open(refs["export"], PushedModel)
    probabilities = np.load(pushed.check / "probabilities.npy")
    np.testing.assert_array_equal(probabilities, inputs["evaluation"].predictions()[:64])
    np.testing.assert_array_equal(np.load(pushed.check / "images.npy"), inputs["examples"].split("test").images[:64])


@pytest.mark.fresh_process
def test_bytes_depend_on_the_model_alone(synthetic_store, refs, inputs, tmp_path):
    paths = [word for name, artifact in inputs.items() for word in (f"--{name}", str(artifact.path))]
    command = [sys.executable, "-m", "ridgeline.cli", "step", "export", *paths, "--output", str(tmp_path / "again")]
    (temporary := tmp_path / "temporary").mkdir()
    env = {"PYTHONHASHSEED": "7", "PATH": "", "TMPDIR": str(temporary)}
    subprocess.run(command, env=env, check=True, cwd=tmp_path)
    assert PushedModel.load(tmp_path / "again").ref == refs["export"]
    assert list(temporary.iterdir()) == []


def test_each_copy_of_the_saved_model_has_the_card(synthetic_store, refs):
    pushed = synthetic_store.open(refs["export"], PushedModel)
    assert pushed.card == pushed.saved_model / "assets.extra" / "model-card.html"
    assert "Model card: synthetic_garments" in pushed.card.read_text("utf-8")
    card = pushed.card.with_name("model-card.md").read_text("utf-8")
    assert f"| Model | Model/{refs['train'].partition('/')[2]} |" in card
    assert f"| Examples | Examples/{refs['transform'].partition('/')[2]} |" in card


def test_how_images_are_prepared_reaches_the_served_model_without_a_training(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    settings = Settings(store=str(tmp_path / "store"), manual_dir=None)
    steps = pipeline.plan("export")
    changed = {"ingest.resampling": "box", "ingest.background": 0}
    params = pipeline.parse_params(steps, {**SYNTHETIC, **changed}, settings)
    records = {r.execution.component: r.execution for r in pipeline.run(settings, steps, params, "changed")}
    assert [name for name, record in records.items() if record.state == "complete"] == (
        ["ingest", "transform", "validate", "evaluate", "label_errors", "export"]
    )
    exported = records["export"].output
    assert exported
    pushed = settings.open_store().open(exported, PushedModel)
    assert read_form(pushed.saved_model, (28, 28)) == Form((28, 28), "box", "grayscale", 0)


def test_each_copy_of_the_saved_model_says_how_to_prepare_images(inputs, synthetic_store, refs, tmp_path, monkeypatch):
    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    dataset = synthetic_store.open(refs["ingest"], Dataset)
    facts = dataset.facts.model_copy(update={"resampling": "lanczos", "background": 0, "max_image_pixels": 100})
    shutil.copytree(dataset.path, tmp_path / "dataset", ignore=shutil.ignore_patterns("manifest.json"))
    (tmp_path / "pushed").mkdir()
    given = inputs | {"dataset": Dataset.seal(tmp_path / "dataset", facts)}
    export(**given, params=export.parse({}), output=tmp_path / "pushed")
    saved_model = tmp_path / "pushed" / "saved_model"
    file = saved_model / "assets.extra" / "images.json"
    expected = {"image_size": [28, 28], "resampling": "lanczos", "color_mode": "grayscale", "background": 0}
    assert json.loads(file.read_text()) == expected | {"max_image_pixels": 100}
    assert read_form(saved_model, (28, 28)) == Form((28, 28), "lanczos", "grayscale", 0, 100)
    file.write_text(json.dumps(expected))  # of an earlier release
    assert read_form(saved_model, (28, 28)) == Form((28, 28), "lanczos", "grayscale", 0, 50_000_000)
    file.write_text('{"image_size": 28}')
    with pytest.raises(ArtifactError, match=r"how to prepare images in .*images.json; it is damaged"):
        read_form(saved_model, (28, 28))
    file.unlink()
    assert read_form(saved_model, (28, 28, 3)) == Form((28, 28), "bilinear", "rgb", 255)


def test_unblessed_model_is_skipped_with_the_reasons(inputs, tmp_path):
    refused = Verdict(blessed=False, reasons=("accuracy 0.1 < 0.75 (min_accuracy)",))
    evaluation = with_facts(inputs["evaluation"], tmp_path / "evaluation", verdict=refused)
    with pytest.raises(StepSkipped, match=r"not blessed: accuracy 0.1 < 0.75"):
        export(**inputs | {"evaluation": evaluation}, params=export.parse({}), output=tmp_path)


def test_the_force_reason_and_the_champion_are_copied(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    forced = Verdict(blessed=True, reasons=("accuracy 0.8 >= 0.75",), force_reason="demo", champion="1" * 64)
    evaluation = with_facts(inputs["evaluation"], tmp_path / "evaluation", verdict=forced)
    shutil.copy(inputs["evaluation"].path / "predictions.npy", evaluation.path)
    (tmp_path / "pushed").mkdir()
    pushed = export(**inputs | {"evaluation": evaluation}, params=export.parse({}), output=tmp_path / "pushed")
    assert (pushed.facts.forced, pushed.facts.champion) == ("demo", "1" * 64)


def test_a_model_that_is_too_large_is_skipped(inputs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    size = sum(np.asarray(weight).nbytes for weight in inputs["model"].load_keras().weights) / 2**20
    reason = rf"^too large: {size:.6g} MiB > 0.3 MiB \(max_size_mib\)$"
    with pytest.raises(StepSkipped, match=reason):
        export(**inputs, params=export.parse({"max_size_mib": 0.3}), output=tmp_path)
    caplog.set_level("INFO", "components.export")
    (tmp_path / "fits").mkdir()
    pushed = export(**inputs, params=export.parse({"max_size_mib": size}), output=tmp_path / "fits")
    assert pushed.facts.size.mib == size
    assert f"size {size:.6g} MiB <= {size:.6g} MiB (max_size_mib)" in caplog.messages

    verdict = inputs["evaluation"].facts.verdict.model_copy(update={"force_reason": "demo"})
    evaluation = with_facts(inputs["evaluation"], tmp_path / "evaluation", verdict=verdict)
    shutil.copy(inputs["evaluation"].path / "predictions.npy", evaluation.path)
    (tmp_path / "forced").mkdir()
    given = inputs | {"evaluation": evaluation}
    forced = export(**given, params=export.parse({"max_size_mib": 0.3}), output=tmp_path / "forced")
    assert f"size {size:.6g} MiB > 0.3 MiB (max_size_mib); forced: demo" in caplog.messages
    assert forced.facts.size_in_words == f"{pushed.facts.size_in_words}; above the limit of 0.3 MiB by force"


def test_evaluation_of_another_model_is_refused(inputs, tmp_path):
    evaluation = with_facts(inputs["evaluation"], tmp_path / "evaluation", model_digest="0" * 64)
    with pytest.raises(ValueError, match="Expected the evaluation of model"):
        export(**inputs | {"evaluation": evaluation}, params=export.parse({}), output=tmp_path)


@pytest.mark.real_data
def test_served_model_equals_the_live_model_on_1000_official_images(fashion_mnist):
    store, refs = fashion_mnist
    images = np.asarray(store.open(refs["transform"], Examples).split("test").images[:1_000])
    assert_serves(store.open(refs["export"], PushedModel), store.open(refs["train"], Model), images)


@pytest.mark.real_data
def test_accuracy_on_the_official_test_set(fashion_mnist):
    store, refs = fashion_mnist
    facts = store.open(refs["evaluate"], ModelEvaluation).facts
    assert facts.accuracy == pytest.approx(0.815, abs=0.015)
    assert facts.verdict.blessed


@pytest.mark.fresh_process
def test_the_saving_process_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "manifest.json")  # its reader, the saving process, waits for its content
    program = "import sys; from pathlib import Path; from components.export import save_in_a_fresh_process as save; "
    command = [sys.executable, "-c", f"{program}save(*map(Path, sys.argv[1:]))", tmp_path / "model", tmp_path / "saved"]
    parent = subprocess.Popen(command)
    with (tmp_path / "model" / "manifest.json").open("wb", buffering=0) as manifest:  # it is being read now
        parent.kill()
        parent.wait()
        with pytest.raises(BrokenPipeError):
            for _ in range(1_000):
                manifest.write(b" ")
                time.sleep(0.01)
