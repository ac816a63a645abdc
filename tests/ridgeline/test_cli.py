import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.cli import app
from ridgeline.pipeline import load_components
from ridgeline.rebuild import Rebuilt
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import Store


@pytest.fixture
def invoke(monkeypatch, synthetic_store):
    monkeypatch.setenv("RIDGELINE_STORE", str(synthetic_store.local))
    monkeypatch.delenv("RIDGELINE_MANUAL_DIR", raising=False)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_show_verifies_and_prints_the_manifest(invoke, refs):
    result = invoke("show", refs["train"][:20])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{refs['train']}\n")
    assert '"num_parameters": 89610' in result.stdout


def test_lineage_leads_back_to_the_dataset(invoke, refs):
    lines = invoke("lineage", refs["export"]).stdout.splitlines()
    assert lines[0].startswith(refs["export"])
    assert "ingest dataset=synthetic_garments:1.0.0 name=None " in "\n".join(lines)
    assert sum("(above)" in line for line in lines) == 5


def test_lineage_leads_back_to_the_source(invoke, synthetic, tmp_path, monkeypatch):
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    record = synthetic[1][0]
    parts = record.parts.model_copy(update={"sources": {"image_dir": "5" * 64}})
    shutil.rmtree(tmp_path / "store" / "executions" / "ingest")
    Store(tmp_path / "store").record(record.model_copy(update={"parts": parts}))
    line = invoke("lineage", record.output).stdout.splitlines()[1]
    assert line == f"  image_dir  sha256 {'5' * 64} of the names and content of its files"


def test_explain_needs_nothing_but_the_store(invoke):
    result = invoke(
        "explain", "train", "--set", "ingest.dataset=synthetic_garments:1.0.0",
        "--set", "transform.validation_examples=1000", "--set", "train.penalty.l2=0.001",
    )  # fmt: skip
    assert [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()] == [
        *["reused: same inputs, parameters and code"] * 5,
        "runs: parameter train.penalty.l2 0.01 → 0.001",
    ]


def test_explain_with_a_sweep_and_a_profile(invoke):
    result = invoke(
        "explain", "train", "--with", "sweep", "--profile", "tuned", "--set", "ingest.dataset=synthetic_garments:1.0.0",
        "--set", "transform.validation_examples=1000",
    )  # fmt: skip
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines()[5:]] == [
        ["sweep", "runs: first run of sweep"],
        ["select", "depends: runs unless trials comes out as before"],
        ["train", "depends: runs unless sweep comes out as before"],
    ]
    result = invoke(
        "explain", "train", "--profile", "tuned", "--set", "ingest.dataset=synthetic_garments:1.0.0",
        "--set", "transform.validation_examples=1000",
    )  # fmt: skip
    assert "parameter train.profile seed → tuned" in result.stdout


def test_help_names_the_installed_steps_and_the_options_that_their_parameters_declare(invoke):
    words = " ".join(invoke("run", "--help").stdout.replace("│", " ").split())
    assert (
        "evaluate, export, infer, ingest, label_errors, schema, select, statistics, sweep, train, transform, validate. "
        "export if left out." in words
    )
    assert "A step that is left out by default: select, sweep." in words
    assert "--profile VALUE is short for --set train.profile=VALUE." in words
    assert "NAME is one of evaluate, export, infer, ingest" in invoke("step", "--help").stdout


@pytest.mark.parametrize("profile", [["--profile", "tuned"], ["--profile=tuned"], ["--set", "train.profile=tuned"]])
def test_a_declared_option_is_short_for_its_parameter(invoke, profile):
    sets = ["--set", "ingest.dataset=synthetic_garments:1.0.0", "--set", "transform.validation_examples=1000"]
    assert "parameter train.profile seed → tuned" in invoke("explain", "train", *profile, *sets).stdout


def test_an_option_that_two_steps_declare_is_refused(invoke, monkeypatch):
    steps = load_components()
    monkeypatch.setattr(
        "ridgeline.pipeline.load_components", lambda: steps | {"tune": replace(steps["train"], name="tune")}
    )
    message = "error: Expected another option for tune.profile; received --profile, which train.profile has."
    assert invoke("run").stderr.startswith(message)


def test_a_step_can_be_asked_to_run_again(invoke):
    sets = ["--set", "ingest.dataset=synthetic_garments:1.0.0", "--set", "transform.validation_examples=1000"]
    lines = invoke("explain", "train", "--rerun", "transform", *sets).stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "reused: same inputs, parameters and code",
        "runs: the user asked to run it again",
        "depends: runs unless examples comes out as before",
        "depends: runs unless statistics comes out as before",
        "depends: runs unless examples, statistics and schema come out as before",
        "depends: runs unless examples comes out as before",
    ]


def test_a_step_runs_by_itself_on_an_artifact_directory(invoke, synthetic_store, refs, tmp_path):
    arguments = ["--dataset", str(synthetic_store.path(refs["ingest"])), "--validation-examples", "1000"]
    result = invoke("step", "transform", *arguments, "--output", str(tmp_path / "examples"))
    assert result.stdout == f"{refs['transform']} in {tmp_path / 'examples'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "nowhere"], "error: Expected a step of"),
        (["explain", "train", "--rerun", "sweep"], "error: Expected steps of this run"),
        (["run", "--set", "train.epochs=-1"], "error: Parameter train.epochs"),
        (["run", "nowhere"], "error: Expected a step of"),
        (["run", "ingest", "--profile", "tuned"], "error: Unknown parameter train.profile"),
        (["run", "train", "--profile", "best"], "error: Parameter train.profile: expected 'seed' or 'tuned'"),
        (["show", "Model/ffff0000"], "error: Expected one artifact"),
        (["diff", "Model", "nothing"], "error: Expected a served version such as shoes/3, a model such as"),
        (["diff", "synthetic_garments/7", "Model"], "error: Expected a version of synthetic_garments; received 7"),
        (["lineage", "nothing"], "error: Expected one artifact"),
        (["models", "show", "fashion"], "error: Expected the name of a served model: synthetic_garments; received"),
        (
            ["models", "verify", "synthetic_garments", "7"],
            "error: Expected a version of synthetic_garments; received 7",
        ),
        (["models", "rollback", "synthetic_garments", "--reason", "x"], "error: Expected another model of"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(invoke, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)


def test_diff_of_two_versions(invoke, two_versions, monkeypatch):
    monkeypatch.setenv("RIDGELINE_STORE", two_versions.store)
    result = invoke("diff", "synthetic_garments/1", "second", "--images", "3")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("A  synthetic_garments/1: Model/")
    assert lines[0].endswith("dataset synthetic_garments:1.0.0, run synthetic")
    assert lines[1].endswith("run second")
    assert lines[2] == "only B has the steps statistics, schema, validate, label_errors"
    words = [" ".join(line.split()) for line in lines]
    assert {"train.epochs 2 → 3", "train.penalty.kind l2 → l1", "code: no difference"} < set(words)
    assert "all 5,000 train, 1,000 validation, 1,000 test → 4,500 train, 1,500 validation, 1,000 test" in words
    assert any(line.startswith("accuracy 0.") and ") → 0." in line for line in words)
    assert any(line.startswith("exact McNemar test, two-sided: p = ") for line in words)
    assert all(re.fullmatch(r"only . is right \d+: \d+ \d+ \d+ …", line) for line in words if "is right" in line)
    alone = invoke("diff", "Model", "Model", "--images", "0").stdout
    assert "The models are the same, byte for byte." in alone
    assert "data: the same images" in alone


@pytest.mark.parametrize("arguments", [["synthetic_garments", "7"], ["nothing"], ["synthetic_garments", "one"]])
def test_rebuild_of_what_can_t_be_built_again_exits_with_2(invoke, arguments):
    result = invoke("rebuild", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_rebuild_tells_what_differs_and_exits_with_1(invoke, monkeypatch):
    outcomes = [
        Rebuilt("ingest", f"Dataset/{'1' * 64}", f"Dataset/{'1' * 64}", 1.5, (), ("code of a.py changed",)),
        Rebuilt("train", f"Model/{'2' * 64}", f"Model/{'3' * 64}", 2, ("model.weights.h5",), ("library keras 3 → 4",)),
    ]
    monkeypatch.setattr("ridgeline.cli.rebuild_version", lambda *_: iter(outcomes))
    result = invoke("rebuild", "synthetic_garments")
    assert result.exit_code == 1
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "ingest same 1.5 s Dataset/111111111111",
        "train different 2.0 s Model/222222222222 → 333333333333: model.weights.h5",
        "",
        "train yields other bytes. These differ from its record:",
        "library keras 3 → 4",
    ]
    outcomes[1] = replace(outcomes[1], differences=())
    assert "train yields other bytes, although its parameters, code files" in invoke("rebuild", "shoes").stdout
    outcomes[1] = replace(outcomes[1], received=None, skipped="too large")
    assert "Model/222222222222 → none: too large" in invoke("rebuild", "shoes").stdout
    outcomes[1:] = []
    result = invoke("rebuild", "shoes")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2:] == [
        "All 1 artifacts have the recorded bytes.",
        "The bytes are the same, although these differ from the record:",
        "  code of a.py changed",
    ]


def test_gc_dry_run_of_one_run_frees_nothing(invoke):
    result = invoke("gc", "--dry-run", "--keep-runs", "1")
    assert result.stdout == (
        "would free 0.0 MB: 0 artifacts, 0 execution records, 0 abandoned scratch folders, 0 folders of killed steps\n"
    )


def test_models_lists_and_shows_what_is_served(invoke, synthetic_store):
    champion = Registry(synthetic_store.local / "serving").champion("synthetic_garments")
    when = f"{champion.at:%Y-%m-%d %H:%M}"
    header, line = invoke("models", "list").stdout.splitlines()
    assert header.split() == ["model", "champion", "accuracy", "since", "versions", "MiB"]
    assert line.split() == ["synthetic_garments", "1", f"{champion.accuracy:.4f}", *when.split(), "1", "0.342"]
    lines = invoke("models", "show", "synthetic_garments").stdout.splitlines()
    assert lines[1].split() == ["*", "1", "push", f"{champion.accuracy:.4f}", *when.split(), champion.model_digest[:12]]
    assert lines[3] == "version 1: 89,610 weights, 0.342 MiB, 89,400 multiply-adds an image"
    served = f"{synthetic_store.local}/serving/synthetic_garments/1"
    assert lines[4:6] == [
        f"version 1: model card {served}/assets.extra/model-card.html",
        f"served from {served}",
    ]


@pytest.mark.fresh_process
def test_models_latency_measures_versions(invoke):
    header, line = invoke("models", "latency", "synthetic_garments").stdout.splitlines()
    assert header.split() == ["version", "1", "image", "1,000", "images"]
    version, single, _, many, _ = line.split()
    assert version == "1"
    assert 0.0 < float(single) < float(many)
    refused = invoke("models", "latency", "synthetic_garments", "7")
    assert (refused.exit_code, "received 7, which does not exist" in refused.stderr) == (1, True)


@pytest.mark.fresh_process
def test_models_latency_of_a_damaged_version_is_an_error(synthetic_store, tmp_path, monkeypatch):
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    (tmp_path / "store" / "serving" / "synthetic_garments" / "1" / "saved_model.pb").write_bytes(b"damaged")
    shown = CliRunner().invoke(app, ["models", "latency", "synthetic_garments"])
    assert (shown.exit_code, shown.stderr.startswith("error: Cannot measure ")) == (1, True)


def test_models_of_an_empty_registry(monkeypatch, tmp_path):
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path))
    assert (
        CliRunner().invoke(app, ["models", "list"]).stdout == f"no model has been served from {tmp_path}/serving yet\n"
    )


def test_a_damaged_history_is_reported_and_the_other_models_are_listed(synthetic_store, tmp_path, monkeypatch):
    shutil.copytree(synthetic_store.local / "serving", tmp_path / "serving")
    (tmp_path / "serving" / "damaged").mkdir()
    (tmp_path / "serving" / "damaged" / "history.jsonl").touch()
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path))
    lines = CliRunner().invoke(app, ["models", "list"]).stdout.splitlines()
    assert lines[1].startswith("damaged             Expected a history entry in each line of")
    assert lines[2].startswith("synthetic_garments         1")
    shown = CliRunner().invoke(app, ["models", "show", "damaged"])
    assert (shown.exit_code, "received none that can be read" in shown.stderr) == (1, True)


def test_models_verify_and_rollback(synthetic_store, refs, tmp_path, monkeypatch):
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LOGNAME", "ann")
    registry, store = Settings().open_registry(), Settings().open_store()
    model = store.open(refs["export"], PushedModel)
    shutil.copytree(model.path, tmp_path / "second")
    champion = registry.champion("synthetic_garments").model_digest
    facts = model.facts.model_copy(update={"model_digest": "0" * 64, "accuracy": 0.5, "champion": champion})
    second = store.open(store.publish(PushedModel.seal(tmp_path / "second", facts)), PushedModel)
    checked = []
    monkeypatch.setattr("ridgeline.registry.check", lambda *arguments: checked.append(arguments))
    registry.push(second, "run 2")
    checked.clear()
    invoke = CliRunner().invoke
    assert "goes back to version 1" in invoke(app, ["models", "show", "synthetic_garments"]).stdout
    result = invoke(app, ["models", "verify", "synthetic_garments", "1"])
    assert result.stdout.startswith(f"synthetic_garments version 1 holds {refs['export']}, byte for byte")
    assert invoke(app, ["models", "rollback", "synthetic_garments"]).exit_code == 2  # no reason
    result = invoke(app, ["models", "rollback", "synthetic_garments", "--reason", "worse in production"])
    assert result.stdout.startswith("synthetic_garments is served by version 1, ")
    entry = registry.champion("synthetic_garments")
    assert (entry.version, entry.by, entry.reason) == (1, "ann", "worse in production")
    served = registry.root / "synthetic_garments" / "1"
    assert checked == [(served, model.check, model.facts.class_names)] * 2  # by verify and by rollback
    shown = invoke(app, ["models", "show", "synthetic_garments"]).stdout.splitlines()
    assert shown[3].startswith("*       1  rollback")
    assert shown[3].endswith("worse in production")

    started = invoke(app, ["models", "canary", "synthetic_garments", "2", "--share", "0.1", "--reason", "try it"])
    assert started.stdout == "version 2 of synthetic_garments answers 0.1 of the requests: try it\n"
    text = invoke(app, ["models", "show", "synthetic_garments"]).stdout
    marked = [line for line in text.splitlines() if line[:2] in ("* ", "c ")]
    assert marked[0].startswith("*       1  rollback ")
    assert marked[1].startswith("c       2  canary ")
    assert marked[1].endswith(" 0.1 of the requests: try it")
    assert f"canary from {registry.root}/synthetic_garments/2: 0.1 of the requests" in text
    assert invoke(app, ["models", "list"]).stdout.splitlines()[1].split()[1] == "1"
    ended = invoke(app, ["models", "abort", "synthetic_garments", "--reason", "slow"])
    assert ended.stdout == "version 2 of synthetic_garments is no canary any more: slow\n"
    refused = invoke(app, ["models", "promote", "synthetic_garments", "--reason", "fast"])
    assert refused.stderr.startswith("error: Expected a canary of synthetic_garments to promote; there is none")
    invoke(app, ["models", "canary", "synthetic_garments", "2", "--share", "0.1", "--reason", "again"])
    for action in ("promote", "abort"):
        refused = invoke(app, ["models", action, "synthetic_garments", "1", "--reason", "fast"])
        assert refused.stderr.startswith(
            "error: Expected the present canary of synthetic_garments, version 2; received 1"
        )
    promoted = invoke(app, ["models", "promote", "synthetic_garments", "2", "--reason", "fast"])
    assert promoted.stdout == "synthetic_garments is served by version 2, accuracy 0.5000: fast\n"
    assert registry.champion("synthetic_garments").by == "ann"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("transform.validation_examples=60000", "below the 6000 training images"),
        ("ingest.dataset=fashion_mnits:3.0.1", "Did you mean fashion_mnist"),
        ("ingest.manual_dir=/nowhere", "received /nowhere: No such file or directory"),
    ],
)
def test_a_step_error_is_one_message(invoke, synthetic_store, tmp_path, monkeypatch, assignment, message):
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    data = [] if "ingest" in assignment else ["--set", "ingest.dataset=synthetic_garments:1.0.0"]
    result = invoke("run", "transform", *data, "--set", assignment)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: Expected")
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("root", ["foo://bucket/store", "/proc/version/store"])
def test_store_that_cannot_be_opened_is_one_message(invoke, monkeypatch, root):
    monkeypatch.setenv("RIDGELINE_STORE", root)
    result = invoke("run", "ingest", "--set", "ingest.dataset=synthetic_garments:1.0.0")
    assert result.exit_code == 1
    assert "RIDGELINE_STORE" in result.stderr


@pytest.mark.fresh_process
def test_killed_run_is_followed_by_a_whole_one(synthetic_store, refs, tmp_path):
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    environment = {**os.environ, "RIDGELINE_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-m", "ridgeline.cli", "run", "train"]
    sets = ["ingest.dataset=synthetic_garments:1.0.0", "transform.validation_examples=1000", "train.seed=5"]
    command += [word for value in sets for word in ("--set", value)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as killed:
        for line in killed.stdout:
            if line.startswith("epoch 1/2"):
                killed.kill()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "train runs: parameter train.seed 42 → 5" in again
    assert "train complete" in again
    assert not list((tmp_path / "store" / "staging").iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["run", "ingest"],
        ["explain"],
        ["show", "Model"],
        ["lineage", "Model"],
        ["gc", "--dry-run"],
        ["diff", "Model", "Model"],
        ["rebuild", "synthetic_garments"],
        ["models", "list"],
        ["models", "show", "synthetic_garments"],
        ["models", "verify", "synthetic_garments"],
        ["models", "rollback", "synthetic_garments", "--reason", "test"],
    ],
)
def test_a_bad_setting_is_one_line_in_every_command(invoke, monkeypatch, command):
    monkeypatch.setenv("RIDGELINE_LOG_RETENTION_DAYS", "a month")  # none of the commands needs it
    result = invoke(*command)
    assert (result.exit_code, result.stdout) == (2 if command[0] == "rebuild" else 1, "")
    assert result.stderr == (
        "error: Setting RIDGELINE_LOG_RETENTION_DAYS: expected a valid integer; received 'a month'. "
        "Correct or unset the environment variable.\n"
    )
