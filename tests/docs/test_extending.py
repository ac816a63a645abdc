"""The examples of docs/extending.md, taken from its text: files written, changes applied, commands run."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.ingest import ingest
from ridgeline.airflow.server import environment
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.store import Store

pytestmark = pytest.mark.fresh_process
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"^`([^`\n]+)`:\n\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MCP = "tests/components/training/penalties/test_mcp.py"
NETWORK = "even-light"  # the folder of the network's package
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
RUN_ALL = """
import json, os, sys
from ridgeline.cli import app
for arguments in json.loads(sys.argv[1]):
    print("$", *arguments, flush=True)
    try:
        app(arguments, standalone_mode=False)
    except SystemExit as end:
        assert not end.code, end.code
"""
LOAD_DAGS = """
import json
from airflow.dag_processing.dagbag import DagBag
bag = DagBag()
def describe(dag):
    assets = dag.schedule if isinstance(dag.schedule, list) else []
    return {
        "params": {name: param.value for name, param in dag.params.items()},
        "upstream": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
        "schedule": [asset.name for asset in assets],
        "watchers": [watcher.trigger.folder for asset in assets for watcher in asset.watchers],
    }
print(json.dumps([bag.import_errors, {dag_id: describe(dag) for dag_id, dag in bag.dags.items()}], default=str))
"""


def apply_change(file: Path, change: str) -> None:
    """Apply the hunks of a documented change: context and removed lines occur exactly once, in this order."""
    text = file.read_text()
    for hunk in change.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
        new = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
        assert text.count(old) == 1, f"{file.name} has {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    file.write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of ``components`` and ``dags``, changed as documented, and the documented files."""
    folder = tmp_path_factory.mktemp("extending")
    for package in ("components", "dags"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, language, text in BLOCK.findall(TEXT):
        file = folder / name
        if language == "diff":
            apply_change(file, text)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            assert not file.exists(), name
            file.write_text(text)
    for project in (folder, folder / NETWORK):
        install(project / "pyproject.toml", project)
    return folder


def install(pyproject: Path, folder: Path) -> None:
    """Write what an installation of the package writes beside it: its name, version and entry points."""
    project = tomllib.loads(pyproject.read_text())["project"]
    name = project["name"].replace("-", "_")
    info = folder / f"{name}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def python(tree: Path, *arguments: str, env: dict[str, str]) -> str:
    env = {
        **env,
        "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / NETWORK, ROOT))),
        "RIDGELINE_STORE": str(tree / "store"),
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def output(tree: Path) -> dict[str, str]:
    """What each documented command printed; all run in one process, on the documented dataset."""
    dataset = next(command[2:] for command in COMMANDS if "ingest.dataset=" in " ".join(command))
    commands = [[*c, *dataset] if c[0] in ("run", "explain") and c[2:] != dataset else c for c in COMMANDS]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RIDGELINE_")}
    printed = python(tree, "-c", RUN_ALL, json.dumps(commands), env=env).split("\n$ ")
    return {" ".join(command): text for command, text in zip(COMMANDS, printed, strict=True)}


@pytest.fixture(scope="module")
def dags(tree: Path) -> dict[str, Any]:
    """Each DAG as Airflow loads it."""
    errors, dags = json.loads(
        python(tree, "-c", LOAD_DAGS, env=environment(tree, "airflow", os.environ)).splitlines()[-1]
    )
    assert errors == {}
    return dags


@pytest.fixture(scope="module")
def tested(tree: Path) -> str:
    """What pytest printed about the documented tests."""
    flags = ["-v", "-p", "no:cacheprovider", "test_label_counts.py", MCP]
    return python(tree, "-m", "pytest", *flags, env=dict(os.environ))


@pytest.fixture
def store(tree: Path, output: dict[str, str]) -> Store:
    """The store that the documented commands wrote."""
    return Store(tree / "store")


def artifacts(store: Store, step: str) -> list[str]:
    """Return the name of each artifact that a step made, oldest first."""
    made = [execution for execution in store.executions() if execution.component == step]
    return [e.output for e in reversed(made) if e.state == "complete" and e.output]


def test_a_step_runs_explains_and_describes_itself(store, output):
    assert "count_labels runs: first run of count_labels" in output["run count_labels"]
    explained = output["explain count_labels --set count_labels.min_count=10"]
    assert "runs: parameter count_labels.min_count 1 → 10" in explained
    assert "--min-count" in output["step count_labels --help"]
    (ref,) = artifacts(store, "count_labels")
    report = (store.path(ref) / "report.html").read_text()
    assert "<th>vertical</th>" in report
    assert "SYNTHETIC" in report


def test_the_test_of_the_step_passes(tested):
    assert len(re.findall(r"^test_label_counts.py::\w+ PASSED", tested, re.MULTILINE)) == 2


def test_the_step_is_a_task_with_parameters_on_the_form(dags):
    dag = dags["fashion_mnist_training"]
    assert "count_labels.min_count" in dag["params"]
    assert dag["upstream"]["count_labels"] == ["transform"]


@pytest.mark.xfail("image_dir" not in ingest.params.model_fields, reason="no folder of images yet", strict=True)
def test_a_folder_of_images_has_a_dag_with_a_watcher(dags):
    dag = dags["product_photos_training"]
    assert dag["params"]["ingest.dataset"] == "folder"
    assert dag["params"]["ingest.image_dir"] == "/data/product_photos"
    assert dag["params"]["ingest.name"] == "product_photos"
    assert dag["params"]["train.profile"] == "tuned"
    assert dag["schedule"] == ["product_photos_source"]
    assert dag["watchers"] == ["/data/product_photos"]


def test_a_dataset_is_prepared(store):
    (ref,) = artifacts(store, "transform")
    facts = store.open(ref, Examples).facts
    assert facts.class_names == ("horizontal", "vertical")
    assert facts.num_examples == {"train": 500, "validation": 100, "test": 100}
    assert facts.synthetic


def test_a_network_trains_and_does_what_it_is_for(store):
    examples = store.open(artifacts(store, "transform")[0], Examples)
    model = store.open(artifacts(store, "train")[0], Model)
    images = examples.split("validation").images
    assert model.facts.metrics["val_accuracy"] > 0.9
    network = model.load_keras()
    assert [layer.name for layer in network.layers[-3:]] == ["light", "hidden", "output"]
    assert network.get_layer("hidden").units == 4
    brighter = network.predict(images + np.uint8(20), verbose=0)
    np.testing.assert_allclose(network.predict(images, verbose=0), brighter, atol=1e-3)


def test_only_a_training_of_the_network_has_its_code_in_the_key(store):
    parts = [e.parts for e in reversed(list(store.executions("train"))) if e.state == "complete"]
    assert {"even_light/network.py", "even_light/__init__.py"} <= parts[0].code.keys()
    assert parts[0].params["even_light.units"] == 4
    assert {name for name in parts[1].code if name.startswith(("even_light", "components/networks/"))} == {
        "components/networks/__init__.py", "components/networks/mlp.py",
    }  # fmt: skip
    assert {name for name in parts[1].params if name.startswith(("even_light", "cnn"))} == set()


def test_the_network_is_on_the_form(dags):
    dag = dags["fashion_mnist_training"]
    assert dag["params"]["train.network"] == "mlp"
    assert dag["params"]["train.even_light.units"] == 50


def test_a_penalty_is_part_of_the_loss_and_its_proximal_operator_acts(store):
    examples = store.open(artifacts(store, "transform")[0], Examples)
    model = store.open(artifacts(store, "train")[1], Model)
    assert model.facts.params["penalty"]["mcp"] == 0.02
    network, validation = model.load_keras(), examples.split("validation")
    probabilities = network.predict(validation.images, verbose=0)
    entropy = -np.mean(np.log(probabilities[np.arange(len(validation)), validation.labels]))
    sizes = np.abs(np.concatenate([np.ravel(w) for w in network.weights if w.name == "kernel"]))
    inner = np.minimum(sizes, 0.06)
    penalty = np.sum(0.02 * inner - inner**2 / 6)
    assert model.facts.unsaved_penalty == pytest.approx(penalty, rel=1e-4)
    np.testing.assert_allclose(model.facts.metrics["val_loss"], entropy + penalty, rtol=1e-4)
    assert sum(layer.num_zeros for layer in model.facts.sparsity) > 0


def test_the_test_of_the_penalty_passes(tested):
    assert len(re.findall(rf"^{MCP}::\w+(\[.*\])? PASSED", tested, re.MULTILINE)) == 2


def test_a_sweep_tries_the_new_penalty_and_its_report_names_it(store):
    (ref,) = artifacts(store, "select")
    result = store.open(ref, SweepResult)
    assert [str(trial) for trial in result.facts.trials] == ["none", "mcp 0.001", "mcp 0.02"]
    report = result.report.read_text()
    assert "<h2>Chosen: MCP 0.0" in report or "<h2>Chosen: no penalty" in report
    assert '<th scope="row">MCP 0.02' in report


def test_every_example_is_complete():
    assert {name for name, _, _ in BLOCK.findall(TEXT)} >= {
        "label_counts/step.py",
        "components/training/penalties/mcp.py",
    }
    named = TEXT.count("```python") + TEXT.count("```toml") + TEXT.count("```diff")
    assert len(BLOCK.findall(TEXT)) == named
    assert importlib.util.find_spec("label_counts") is None
