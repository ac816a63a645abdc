import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ridgeline import pipeline
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.cli import app
from ridgeline.component import ParameterError, StepError
from ridgeline.gc import collect_garbage
from ridgeline.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["ingest", "transform", "statistics", "schema", "validate", "train", "evaluate", "label_errors", "export"]
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


def words(output):
    """Return what `ridgeline explain` says of each step: ``reused``, ``runs`` or ``depends``."""
    return {line.split()[0]: line.split()[1].rstrip(":") for line in output.splitlines()}


def replace_once(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def append_comment(file):
    with file.open("a", encoding="utf-8") as stream:
        stream.write("# a comment\n")


def test_steps_are_ordered_by_what_they_need():
    assert [step.name for step in pipeline.plan("export")] == STEPS
    assert [step.name for step in pipeline.plan("transform")] == ["ingest", "transform"]
    with pytest.raises(ParameterError, match="Expected a step of evaluate, export, .* received 'exprot'"):
        pipeline.plan("exprot")


def test_a_step_that_may_be_left_out_runs_if_it_is_named():
    names = [step.name for step in pipeline.plan("train", ["sweep"])]
    assert names == ["ingest", "transform", "statistics", "schema", "validate", "sweep", "select", "train"]
    assert [step.name for step in pipeline.plan("train", ["select"])] == names
    with pytest.raises(ParameterError, match="Expected a step of .*; received 'sweeep'"):
        pipeline.plan("train", ["sweeep"])
    with pytest.raises(ParameterError, match="a step up to transform can use; received sweep"):
        pipeline.plan("transform", ["sweep"])


def test_the_optional_steps_are_those_that_a_run_leaves_out():
    assert pipeline.optional_steps("export") == ["select", "sweep"]
    assert pipeline.optional_steps("transform") == []
    assert pipeline.default_target() == "export"


def test_two_steps_that_yield_one_artifact_type_are_refused(toy_steps, monkeypatch):
    (toy_steps / "triple.py").write_text((toy_steps / "double.py").read_text().replace("def double", "def triple"))
    steps = {name: importlib.import_module(f"toy_steps.{name}").__dict__[name] for name in ("seed", "double", "triple")}
    monkeypatch.setattr(pipeline, "load_components", lambda: steps)
    message = (
        "Expected one step that yields Doubled; received double of toy_steps.double and triple of toy_steps.triple"
    )
    with pytest.raises(ParameterError, match=message):
        pipeline.plan("seed")


def test_entry_points_that_name_one_step_twice_are_refused(toy_steps, monkeypatch):
    entry = importlib.metadata.EntryPoint("seed", "toy_steps.seed:seed", "ridgeline.components")
    other = importlib.metadata.EntryPoint("sead", "toy_steps.seed:seed", "ridgeline.components")
    for entries in ([entry, entry], [other]):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, entries=entries: entries)
        with pytest.raises(ParameterError, match="with the names of their steps, each once; received se"):
            pipeline.load_components()


@pytest.mark.parametrize(
    ("value", "cause"),
    [("toy_steps.lost:seed", "ModuleNotFoundError: No module named"), ("toy_steps.seed:lost", "AttributeError: ")],
)
def test_an_entry_point_that_cannot_be_imported_is_named_by_each_command(toy_steps, monkeypatch, value, cause):
    entry = importlib.metadata.EntryPoint("seed", value, "ridgeline.components")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    for command in ("explain", "run"):
        result = CliRunner().invoke(app, [command, "seed"])
        assert result.exit_code == 1
        assert f"error: Cannot import the step seed: its entry point {value} can't be used: {cause}" in result.output


def test_steps_that_need_their_own_output_are_refused(toy_steps, monkeypatch):
    text = (toy_steps / "seed.py").read_text().replace("def seed(params", "def seed(doubled: Doubled, params")
    (toy_steps / "seed.py").write_text(text.replace("import Number,", "import Doubled, Number,"))
    steps = {name: importlib.import_module(f"toy_steps.{name}").__dict__[name] for name in ("seed", "double")}
    monkeypatch.setattr(pipeline, "load_components", lambda: steps)
    with pytest.raises(ParameterError, match="none needs its own output; received double → seed → double"):
        pipeline.plan("double")


def test_a_step_whose_input_no_step_yields_is_refused(toy_steps, monkeypatch):
    steps = {"double": importlib.import_module("toy_steps.double").double}
    monkeypatch.setattr(pipeline, "load_components", lambda: steps)
    with pytest.raises(ParameterError, match="Expected a step that yields Number, which double needs; received none"):
        pipeline.plan("double")


def test_a_named_step_runs_again_although_nothing_changed_and_equal_bytes_stop_there(toy_steps, monkeypatch, tmp_path):
    steps = {name: importlib.import_module(f"toy_steps.{name}").__dict__[name] for name in ("seed", "double")}
    monkeypatch.setattr(pipeline, "load_components", lambda: steps)
    settings, planned = Settings(store=str(tmp_path / "store")), pipeline.plan("double")
    params = pipeline.parse_params(planned, {}, settings)
    list(pipeline.run(settings, planned, params, "first"))
    explained = dict(pipeline.explain(settings, planned, params, rerun=["seed"]))
    assert explained["seed"] == "runs: the user asked to run it again"
    again = [result.execution for result in pipeline.run(settings, planned, params, "again", rerun=["seed"])]
    assert [(e.state, e.reason) for e in again] == [
        ("complete", "the user asked to run it again"),
        ("cached", "same inputs, parameters and code"),
    ]
    with pytest.raises(ParameterError, match="Expected steps of this run, seed, double, to rerun; received sead"):
        list(pipeline.run(settings, planned, params, "bad", rerun=["sead"]))


def read(params: Any) -> Any:
    """Return parameters as they are: their type is one of a step."""
    return params


def test_a_sweep_takes_the_parameters_of_train_unless_it_has_its_own():
    values = {"train.epochs": 4, "train.batch_size": 64, "train.penalty.l2": 0.5, "sweep.train.batch_size": 16}
    training = read(pipeline.parse_params(pipeline.plan("train", ["sweep"]), values, Settings())["sweep"]).train
    assert (training.epochs, training.batch_size) == (4, 16)
    alone = pipeline.parse_params(pipeline.plan("sweep"), {"sweep.train.epochs": 3}, Settings())
    assert read(alone["sweep"]).train.epochs == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", {"train.epochs": 3}),
        ("train.mlp.hidden_units=[300, 100]", {"train.mlp.hidden_units": [300, 100]}),
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
    assert read(pipeline.parse_params(steps, {}, settings)["ingest"]).manual_dir == tmp_path
    values = {"ingest.manual_dir": "/elsewhere"}
    assert read(pipeline.parse_params(steps, values, settings)["ingest"]).manual_dir == Path("/elsewhere")


def test_explain_runs_and_writes_nothing(tmp_path):
    settings = Settings(store=str(tmp_path / "store"))
    steps = pipeline.plan("export")
    lines = list(pipeline.explain(settings, steps, pipeline.parse_params(steps, {}, settings)))
    assert lines[0] == ("ingest", "runs: first run of ingest")
    assert lines[5] == ("train", "depends: runs unless examples comes out as before")
    assert not (tmp_path / "store").exists()


def test_pipeline_ends_with_a_served_model(synthetic):
    settings, records = synthetic
    assert [record.state for record in records] == ["complete"] * len(STEPS)
    served = settings.serving_dir() / "synthetic_garments"
    assert [path.name for path in served.iterdir() if path.is_dir()] == ["1"]
    assert (served / "1" / "saved_model.pb").is_file()


def test_comment_in_a_component_reruns_only_what_reaches_it(tree):
    folder, ridgeline = tree
    assert [line.split()[1] for line in ridgeline("explain").splitlines()] == ["reused:"] * len(STEPS)
    append_comment(folder / "components" / "evaluate.py")
    lines = ridgeline("explain").splitlines()
    assert [line.split()[1] for line in lines] == ["reused:"] * 6 + ["runs:", "reused:", "depends:"]
    assert "code of components/evaluate.py changed" in lines[6]


@pytest.mark.fresh_process
def test_captions_help_and_the_tolerance_train_nothing(tree):
    folder, ridgeline = tree
    grid = ("--set", "sweep.l1=[]", "--set", "sweep.l2=[0.01]", "--set", "sweep.train.epochs=1")
    ridgeline("run", "select", *grid)
    explain = ("explain", "select", *grid)
    unchanged = dict.fromkeys(["ingest", "transform", "statistics", "schema", "validate", "sweep", "select"], "reused")
    assert words(ridgeline(*explain)) == unchanged

    replace_once(folder / "ridgeline" / "cli.py", "A step to run even if nothing changed.", "Run it again.")
    append_comment(folder / "ridgeline" / "step_cli.py")
    assert words(ridgeline(*explain)) == unchanged
    assert set(words(ridgeline("explain")).values()) == {"reused"}

    assert "runs: parameter select.tolerance 0.0 → 0.1" in ridgeline(*explain, "--set", "select.tolerance=0.1")
    assert words(ridgeline(*explain, "--set", "select.tolerance=0.1")) == unchanged | {"select": "runs"}

    replace_once(folder / "components/reports/regularization_path.py", "Against strength", "By strength")
    assert words(ridgeline(*explain)) == unchanged | {"select": "runs"}
    assert set(words(ridgeline("explain")).values()) == {"reused"}

    replace_once(folder / "components/reports/evaluation.py", "Most confident mistakes", "Worst mistakes")
    expected = dict.fromkeys(STEPS, "reused") | {"evaluate": "runs", "export": "depends"}
    assert words(ridgeline("explain")) == expected
    assert words(ridgeline(*explain)) == unchanged | {"select": "runs"}


@pytest.mark.fresh_process
def test_equal_output_reruns_nothing_downstream(tree):
    folder, ridgeline = tree
    append_comment(folder / "components" / "transform.py")
    output = ridgeline("run")
    assert "transform runs: code of components/transform.py changed" in output
    for step in ("ingest", "statistics", "schema", "validate", "train", "evaluate", "label_errors", "export"):
        assert f"{step} reused: same inputs, parameters and code" in output
    assert "not pushed: version 1 serves this model already" in output


@pytest.fixture
def run_to(synthetic_store, tmp_path):
    """A copy of the synthetic store's settings, and a function that runs up to a step there."""
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    settings = Settings(store=str(tmp_path / "store"), manual_dir=None)
    values = {name: json.loads(text) if text.isdecimal() else text for name, _, text in map(split_once, SETTINGS)}

    def run(target, run_id, **changed):
        steps = pipeline.plan(target)
        params = pipeline.parse_params(steps, values | {n.replace("__", "."): v for n, v in changed.items()}, settings)
        return {
            result.execution.component: result.execution for result in pipeline.run(settings, steps, params, run_id)
        }

    return settings, run


def split_once(assignment):
    return assignment.partition("=")


def test_an_error_in_the_data_stops_the_run_before_training_also_if_it_is_reused(run_to):
    settings, run = run_to
    for run_id, state in (("first", "complete"), ("second", "cached")):
        with pytest.raises(StepError, match="(?s)Expected examples of .* without errors.*mean image.*report.html"):
            run("train", run_id, validate__min_mean_image_correlation=1.0)
        records = pipeline.run_records(settings, run_id)
        assert set(records) == {"ingest", "transform", "statistics", "schema", "validate"}
        assert records["validate"].state == state


def test_a_reason_accepts_the_error_and_another_verdict_trains_nothing(run_to):
    _, run = run_to
    limit = {"validate__min_mean_image_correlation": 1.0}
    records = run("train", "accepted", **limit, validate__accept_anomalies="a test")
    assert (records["validate"].state, records["train"].state) == ("complete", "cached")


def test_new_examples_are_compared_with_those_of_the_champion_which_gc_keeps(run_to, refs):
    settings, run = run_to
    store = settings.open_store()
    first = run("validate", "other", transform__validation_examples=2_000)["validate"]
    assert first.inputs["champion"] == refs["statistics"]
    assert run("validate", "again")["validate"].state == "cached"  # the champion's own: there is none before it
    run("transform", "last")
    collect_garbage(store, settings.open_registry(), 1, False, timedelta(0), pipeline.load_components().values())
    assert [ref for ref in store.refs() if ref.startswith("ExampleStatistics/")] == [refs["statistics"]]
    assert not [ref for ref in store.refs() if ref.startswith("ExampleAnomalies/")]
    later = run("validate", "later", transform__validation_examples=2_400)["validate"]
    assert later.inputs["champion"] == refs["statistics"]


def test_the_schema_of_the_champion_is_kept_until_another_one_is_asked_for(run_to, refs, tmp_path):
    settings, run = run_to
    store = settings.open_store()
    assert run("validate", "unchanged")["schema"].state == "cached"
    other = run("validate", "other", transform__validation_examples=1_200)
    assert other["schema"].inputs["champion"] == refs["schema"] == other["schema"].output
    assert run("validate", "again", transform__validation_examples=1_200)["schema"].state == "cached"
    inferred = run("schema", "inferred", transform__validation_examples=1_200, schema__infer=True)["schema"]
    assert inferred.output not in (None, refs["schema"])
    assert "champion" not in inferred.inputs
    later = run("schema", "later", transform__validation_examples=1_400)["schema"]
    assert later.output == refs["schema"]  # no model of the examples that the other was inferred from is served
    collect_garbage(store, settings.open_registry(), 1, False, timedelta(0), pipeline.load_components().values())
    assert [ref for ref in store.refs() if ref.startswith("Schema/")] == [refs["schema"]]
    edited = json.loads((store.path(refs["schema"]) / "schema.json").read_text(encoding="utf-8"))
    edited["image_shape"] = [7, 7]
    (tmp_path / "mine.json").write_text(json.dumps(edited), encoding="utf-8")
    with pytest.raises(StepError, match=r"The images have the shape \(28, 28\); the schema states \(7, 7\)"):
        run("train", "mine", schema__file=str(tmp_path / "mine.json"))
    assert run("schema", "unchanged again")["schema"].output == refs["schema"]  # a file applies to its run alone
    assert run("schema", "other again", transform__validation_examples=1_500)["schema"].output == refs["schema"]
    shutil.rmtree(store.path(refs["schema"]))
    with pytest.raises(StepError, match=r"Cannot read the schema of the champion's examples"):
        run("train", "lost", transform__validation_examples=1_600)


def test_without_the_statistics_of_the_champion_the_run_continues_and_says_so(run_to, refs):
    settings, run = run_to
    shutil.rmtree(settings.open_store().path(refs["statistics"]))
    last = run("validate", "other", transform__validation_examples=2_000)["validate"]
    facts = settings.open_store().open(last.output, ExampleAnomalies).facts
    assert [finding.check for finding in facts.findings if finding.severity == "warning"] == ["champion"]


def test_a_step_runs_after_what_it_is_declared_after_and_nothing_of_that_is_its_input():
    (train,) = (step for step in pipeline.plan("train") if step.name == "train")
    assert train.after == (ExampleAnomalies,)
    assert ExampleAnomalies not in {*train.inputs.values(), *train.optional.values()}
