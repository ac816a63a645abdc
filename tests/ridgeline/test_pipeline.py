import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ridgeline import pipeline
from ridgeline.component import ParameterError
from ridgeline.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["ingest.dataset=synthetic_garments:1.0.0", "transform.validation_examples=1000"]


@pytest.fixture
def tree(synthetic_store, tmp_path):
    """A copy of the source tree and of the synthetic store, and a function that runs ``ridgeline`` there."""
    for package in ("components", "ridgeline"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(synthetic_store.local, tmp_path / "store")

    def ridgeline(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RIDGELINE_STORE": str(tmp_path / "store")}
        environment.pop("RIDGELINE_MANUAL_DIR", None)
        sets = [word for value in SETTINGS for word in ("--set", value)]
        command = [sys.executable, "-m", "ridgeline.cli", *arguments, *sets]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    return tmp_path, ridgeline


def append_comment(file):
    with file.open("a", encoding="utf-8") as stream:
        stream.write("# a comment\n")


def test_steps_are_ordered_by_what_they_need():
    assert [step.name for step in pipeline.plan("export")] == ["ingest", "transform", "train", "evaluate", "export"]
    assert [step.name for step in pipeline.plan("transform")] == ["ingest", "transform"]
    with pytest.raises(ParameterError, match="Expected a step of evaluate, export, .* received 'exprot'"):
        pipeline.plan("exprot")


def test_a_step_that_may_be_left_out_runs_if_it_is_named():
    names = [step.name for step in pipeline.plan("train", ["sweep"])]
    assert names == ["ingest", "transform", "sweep", "select", "train"]
    assert [step.name for step in pipeline.plan("train", ["select"])] == names
    with pytest.raises(ParameterError, match="Expected a step of .*; received 'sweeep'"):
        pipeline.plan("train", ["sweeep"])
    with pytest.raises(ParameterError, match="a step up to transform can use; received sweep"):
        pipeline.plan("transform", ["sweep"])


def test_a_sweep_takes_the_parameters_of_train_unless_it_has_its_own():
    values = {"train.epochs": 4, "train.batch_size": 64, "train.penalty.l2": 0.5, "sweep.train.batch_size": 16}
    training = pipeline.parse_params(pipeline.plan("train", ["sweep"]), values, Settings())["sweep"].train
    assert (training.epochs, training.batch_size) == (4, 16)
    alone = pipeline.parse_params(pipeline.plan("sweep"), {"sweep.train.epochs": 3}, Settings())
    assert alone["sweep"].train.epochs == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", {"train.epochs": 3}),
        ("train.hidden_units=[300, 100]", {"train.hidden_units": [300, 100]}),
        ("ingest.dataset=mnist:3.0.1", {"ingest.dataset": "mnist:3.0.1"}),
        ("note=a=b", {"note": "a=b"}),
    ],
)
def test_assigned_values_are_json_or_else_text(text, expected):
    assert pipeline.parse_assignments([text]) == expected


@pytest.mark.parametrize("text", ["train.epochs", "=3"])
def test_an_assignment_needs_a_name_and_a_value(text):
    with pytest.raises(ParameterError, match=f"Expected STEP.PARAMETER=VALUE.*received '{text}'"):
        pipeline.parse_assignments([text])


def test_all_bad_parameters_are_named_before_anything_runs():
    values = {"train.epochs": 0, "trian.epochs": 1, "transform.normalization": "log", "epochs": 3}
    with pytest.raises(ParameterError) as caught:
        pipeline.parse_params(pipeline.plan("export"), values, Settings())
    for name in (
        "Unknown parameter trian.epochs",
        "Parameter train.epochs",
        "transform.normalization",
        "parameter epochs",
    ):
        assert name in str(caught.value)


@pytest.mark.parametrize("values", [{"train.penalty": 3}, {"train.penalty.l2.x": 3}, {"train.penalty.l2": [1]}])
def test_values_at_the_wrong_depth_are_refused(values):
    with pytest.raises(ParameterError, match=r"train\.penalty"):
        pipeline.parse_params(pipeline.plan("train"), values, Settings())


def test_settings_give_locations_and_values_override_them(tmp_path):
    settings = Settings(manual_dir=tmp_path)
    steps = pipeline.plan("train")
    assert pipeline.parse_params(steps, {}, settings)["ingest"].manual_dir == tmp_path
    values = {"ingest.manual_dir": "/elsewhere"}
    assert pipeline.parse_params(steps, values, settings)["ingest"].manual_dir == Path("/elsewhere")


def test_explain_runs_and_writes_nothing(tmp_path):
    settings = Settings(store=str(tmp_path / "store"))
    steps = pipeline.plan("export")
    lines = list(pipeline.explain(settings, steps, pipeline.parse_params(steps, {}, settings)))
    assert lines[0] == ("ingest", "runs: first run of ingest")
    assert lines[2] == ("train", "depends: runs unless examples comes out as before")
    assert not (tmp_path / "store").exists()


def test_pipeline_ends_with_a_served_model(synthetic):
    settings, results = synthetic
    assert [r.execution.state for r in results] == ["complete"] * 5
    assert results[-1].pushed.path == settings.serving_dir() / "synthetic_garments" / "1"
    assert (results[-1].pushed.path / "saved_model.pb").is_file()


def test_comment_in_a_component_reruns_only_what_reaches_it(tree):
    folder, ridgeline = tree
    assert [line.split()[1] for line in ridgeline("explain").splitlines()] == ["reused:"] * 5
    append_comment(folder / "components" / "evaluate.py")
    lines = ridgeline("explain").splitlines()
    assert [line.split()[1] for line in lines] == ["reused:"] * 3 + ["runs:", "depends:"]
    assert "code of components/evaluate.py changed" in lines[3]


def test_equal_output_reruns_nothing_downstream(tree):
    folder, ridgeline = tree
    append_comment(folder / "components" / "transform.py")
    output = ridgeline("run")
    assert "transform runs: code of components/transform.py changed" in output
    for step in ("ingest", "train", "evaluate", "export"):
        assert f"{step} reused: same inputs, parameters and code" in output
    assert "not pushed: version 1 serves this model already" in output
