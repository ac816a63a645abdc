import hashlib
import importlib
import importlib.metadata
import sys

import pytest

from ridgeline import keys, pipeline
from ridgeline.component import flatten
from ridgeline.keys import KeyParts, key_parts, reachable_code

PARTS = KeyParts(
    component="train",
    inputs={"examples": "a" * 64},
    params={"epochs": 2, "penalty.l2": 0.01},
    code={"components/train.py": "b" * 64},
    libraries={"numpy": "2.0"},
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"params": {"epochs": 2, "penalty.l2": 0.001}}, "parameter train.penalty.l2 0.01 → 0.001"),
        ({"params": {"epochs": 2}}, "parameter train.penalty.l2 0.01 → none"),
        ({"inputs": {"examples": "c" * 64}}, "input examples changed (aaaaaaaaaaaa → cccccccccccc)"),
        ({"code": {"components/train.py": "d" * 64}}, "code of components/train.py changed"),
        (
            {"code": {"components/train.py": "b" * 64, "components/networks/cnn.py": "d" * 64}},
            "code of components/networks/cnn.py added",
        ),
        ({"code": {}}, "code of components/train.py no longer used"),
        ({"libraries": {"numpy": "2.1"}}, "library numpy 2.0 → 2.1"),
        (
            {"inputs": {"examples": "a" * 64, "champion": f"unreadable {'c' * 64}"}},
            "input champion added (unreadable cccccccccccc)",
        ),
        ({"inputs": {"examples": "a" * 64, "trials.1": "c" * 64}}, "input trials 2 added (cccccccccccc)"),
        ({"inputs": {}}, "input examples removed (aaaaaaaaaaaa)"),
        ({"workers": 3}, "number of workers 1 → 3"),
    ],
)
def test_every_part_changes_the_key_and_is_named(change, reason):
    changed = PARTS.model_copy(update=change)
    assert changed.key() != PARTS.key()
    assert changed.differences(PARTS) == [reason]


def test_equal_parts_have_one_key_and_no_difference():
    again = PARTS.model_copy(update={"params": {"penalty.l2": 0.01, "epochs": 2}})
    assert again.key() == PARTS.key()
    assert again.differences(PARTS) == []


def test_flatten_names_leaves_with_dots():
    assert dict(flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None})) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_code_covers_what_a_step_can_reach_and_nothing_else():
    code, libraries = reachable_code("components.transform")
    assert {
        "components/__init__.py",
        "components/transform.py",
        "ridgeline/__init__.py",
        "ridgeline/component.py",
        "ridgeline/artifacts/base.py",
        "ridgeline/artifacts/dataset.py",
        "ridgeline/artifacts/examples.py",
    } <= code.keys()
    assert not {"components/train.py", "ridgeline/store.py", "ridgeline/artifacts/model.py"} & code.keys()
    assert libraries.keys() == {"numpy"}
    assert "tensorflow-datasets" in reachable_code("components.ingest")[1]
    assert "tensorflow" in reachable_code("components.train")[1]
    assert "scikit-learn" in reachable_code("components.evaluate")[1]
    assert "apache-airflow" not in {
        name for step in ("ingest", "train") for name in reachable_code(f"components.{step}")[1]
    }


def test_texts_of_reports_are_in_the_key_of_no_training():
    for step in ("train", "sweep"):
        code = reachable_code(f"components.{step}")[0]
        assert "components/training/penalties/l1.py" in code
        assert not [name for name in code if name.startswith("components/reports/")]
    assert "components/reports/regularization_path.py" in reachable_code("components.select")[0]


@pytest.mark.parametrize("step", pipeline.load_components().values(), ids=lambda step: step.name)
def test_a_step_reaches_only_the_declaration_the_artifacts_and_the_page_frame(step):
    framework = {name for name in reachable_code(step.module)[0] if name.startswith("ridgeline/")}
    allowed = {f"ridgeline/{name}.py" for name in ("__init__", "component", "html_page", "preparation")}
    if step.name in ("ingest", "infer", "evaluate", "export"):
        allowed.add("ridgeline/image_form.py")
    if step.name in ("ingest", "infer", "evaluate"):
        allowed.add("ridgeline/image_decoding.py")
    if step.name in ("validate", "evaluate", "export"):
        allowed.add("ridgeline/significance.py")
    if step.name in ("validate", "evaluate", "label_errors"):
        allowed.add("ridgeline/thumbnail.py")
    if step.name == "export":  # it saves the model in a fresh process, and writes the model card
        allowed |= {"ridgeline/fresh_process.py", "ridgeline/quiet_tensorflow.py", "ridgeline/markdown.py"}
    assert {name for name in framework - allowed if not name.startswith("ridgeline/artifacts/")} == set()
    has_page = step.output.report_name is not None or step.name == "export"  # the model card
    assert ("ridgeline/html_page.py" in framework) == has_page


def test_change_of_imported_code_changes_the_key_of_importers_only(toy_steps):
    seed = importlib.import_module("toy_steps.seed").seed
    before = {name: reachable_code(f"toy_steps.{name}")[0] for name in ("seed", "double")}
    with (toy_steps / "double.py").open("a") as file:
        file.write("# a comment\n")
    keys.forget_code()
    after = {name: reachable_code(f"toy_steps.{name}")[0] for name in ("seed", "double")}
    assert after["seed"] == before["seed"]
    assert {n for n in after["double"] if after["double"][n] != before["double"][n]} == {"toy_steps/double.py"}
    with (toy_steps / "number.py").open("a") as file:
        file.write("# a comment\n")
    earlier = key_parts(seed, {}, seed.parse({}))
    keys.forget_code()
    assert key_parts(seed, {}, seed.parse({})).differences(earlier) == ["code of toy_steps/number.py changed"]


def test_locations_are_no_part_of_the_key(tmp_path):
    ingest = importlib.import_module("components.ingest").ingest
    here, there = (key_parts(ingest, {}, ingest.parse({"manual_dir": p})) for p in (tmp_path, None))
    assert here == there
    assert not {"manual_dir", "image_dir"} & here.params.keys()


def test_keys_are_made_without_tensorflow():
    import subprocess

    program = (
        "import sys\n"
        "from ridgeline.keys import reachable_code\n"
        "from ridgeline.pipeline import load_components\n"
        "[reachable_code(step.module) for step in load_components().values()]\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'keras', 'sklearn', 'matplotlib', 'airflow'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


LIBRARIES = {
    "ingest": {"numpy", "pillow", "tensorflow", "tensorflow-datasets"},
    "transform": {"numpy"},
    "statistics": {"numpy"},
    "schema": {"numpy"},
    "validate": {"jinja2", "matplotlib", "numpy", "pillow", "scipy"},
    "train": {"h5py", "keras", "numpy", "tensorflow"},
    "sweep": {"h5py", "keras", "numpy", "tensorflow"},
    "select": {"h5py", "jinja2", "keras", "matplotlib", "numpy", "tensorflow"},
    "evaluate": {
        "h5py", "jinja2", "keras", "matplotlib", "numpy", "pillow", "scikit-learn", "scipy", "tensorflow",
    },
    "label_errors": {
        "h5py", "jinja2", "keras", "matplotlib", "numpy", "pillow", "scipy", "tensorflow",
    },
    "infer": {"numpy", "pillow", "pyarrow", "tensorflow"},
    "export": {"h5py", "jinja2", "keras", "markdown-it-py", "markupsafe", "numpy", "scipy", "tensorflow"},
}  # fmt: skip


def test_the_key_of_a_step_changes_with_the_version_of_each_library_that_it_computes_with(monkeypatch):
    steps, version = pipeline.load_components(), importlib.metadata.version
    assert steps.keys() == LIBRARIES.keys()
    keys_of = {}
    try:
        for changed in ("", *sorted(set.union(*LIBRARIES.values()))):
            reachable_code.cache_clear()
            monkeypatch.setattr(importlib.metadata, "version", lambda n, c=changed: "0.0" if n == c else version(n))
            keys_of[changed] = {name: key_parts(step, {}, step.parse({})).key() for name, step in steps.items()}
    finally:
        reachable_code.cache_clear()
    for library, found in keys_of.items():
        rerun = {name for name, key in found.items() if key != keys_of[""][name]}
        assert rerun == {name for name, libraries in LIBRARIES.items() if library in libraries}, library


def test_the_code_of_a_step_is_that_of_when_it_was_loaded(toy_steps, monkeypatch):
    entry = importlib.metadata.EntryPoint("seed", "toy_steps.seed:seed", "ridgeline.components")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    before = hashlib.sha256((toy_steps / "seed.py").read_bytes()).hexdigest()
    seed = pipeline.load_components()["seed"]
    with (toy_steps / "seed.py").open("a") as file:
        file.write("# edited while the process runs the old code, before any key is made\n")
    assert key_parts(seed, {}, seed.parse({})).code["toy_steps/seed.py"] == before
