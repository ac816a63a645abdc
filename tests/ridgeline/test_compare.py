import shutil

import numpy as np
import pytest

from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.compare import CompareError, Side, compare, find_side
from ridgeline.pipeline import run_records
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from ridgeline.significance import mcnemar_p_value

NAME = "synthetic_garments"


@pytest.fixture
def find(two_versions):
    """The function that finds a side in the store with two versions."""
    return lambda name: find_side(two_versions.open_store(), two_versions.open_registry(), name)


@pytest.fixture
def copy(two_versions, tmp_path):
    """A copy of the store with two versions, to be written to."""
    shutil.copytree(two_versions.store, tmp_path / "store")
    return Settings(store=str(tmp_path / "store"), manual_dir=None)


@pytest.fixture
def second(two_versions):
    """What the second run made, by step."""
    return {step: execution.output for step, execution in run_records(two_versions, "second").items()}


# --- names


def test_each_notation_finds_the_same_model(find, second):
    names = [f"{NAME}/2", NAME, "second", "seco", second["train"], second["train"][:18], second["train"][6:18]]
    sides = [find(name) for name in [*names, second["evaluate"], second["export"], "Model", "PushedModel"]]
    assert {side.model.ref for side in sides} == {second["train"]}
    assert {side.evaluation.ref for side in sides} == {second["evaluate"]}
    assert {side.examples.ref for side in sides} == {second["transform"]}
    assert {side.statistics.ref for side in sides} == {second["statistics"]}


def test_a_model_has_the_steps_that_led_to_it_and_a_run_all_of_its_steps(find):
    assert list(find("Model").executions) == ["ingest", "transform", "train", "evaluate"]
    assert list(find(f"{NAME}/1").executions) == ["ingest", "transform", "train", "evaluate", "export"]
    run = find("second").executions
    assert {"statistics", "schema", "validate", "label_errors"} < run.keys()
    assert run["ingest"].state == "cached"  # what the run did, not the run that made the dataset
    assert find("second").run_ids == ["second"]


@pytest.mark.parametrize(
    ("name", "received"),
    [
        ("", "'', the name of none"),
        ("nowhere", "'nowhere', the name of none"),
        ("../../etc/passwd", "'../../etc/passwd', the name of none"),
        ("Dataset", "'Dataset', the name of none"),
        (f"{NAME}/{'9' * 5_000}", f"'{NAME}/{'9' * 5_000}', the name of none"),
        (f"{NAME}/1/..", f"'{NAME}/1/..', the name of none"),
        ("\0", "'\\x00', the name of none"),
        ("Model/", "'Model/', the beginning of Model/"),
        ("s", "'s', the beginning of second, synthetic"),
    ],
)
def test_a_name_of_none_or_of_several_is_refused(find, name, received):
    with pytest.raises(CompareError) as error:
        find(name)
    assert "Expected a served version such as" in str(error.value)
    assert f"received {received}" in str(error.value)


def test_a_version_that_does_not_exist_is_refused(find):
    with pytest.raises(RegistryError, match="received 7, which does not exist. There are versions 1, 2"):
        find(f"{NAME}/7")


def test_a_damaged_version_is_refused(copy):
    saved = copy.serving_dir() / NAME / "1" / "saved_model.pb"
    saved.write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(RegistryError, match=r"they were changed: saved_model\.pb"):
        find_side(copy.open_store(), copy.open_registry(), f"{NAME}/1")


def test_a_damaged_artifact_is_refused(copy, second):
    (copy.open_store().path(second["evaluate"]) / "predictions.npy").unlink()
    with pytest.raises(ArtifactError, match=r"missing, changed or extra: \['predictions\.npy'\]"):
        find_side(copy.open_store(), copy.open_registry(), "second")


def test_a_run_without_a_model_is_refused(copy):
    store = copy.open_store()
    record = run_records(copy, "second")["ingest"]
    store.record(record.model_copy(update={"run_id": "only ingest"}))
    with pytest.raises(CompareError, match=r"received only ingest, which has none: ingest\."):
        find_side(store, copy.open_registry(), "only ingest")


def test_an_id_of_runs_of_two_datasets_is_refused(copy, second, tmp_path):
    store = copy.open_store()
    record = run_records(copy, "second")["train"]
    other = reseal(store, second["train"], Model, dataset="shop:folder")
    store.record(record.model_copy(update={"output": other}))
    with pytest.raises(CompareError, match="the id of runs of .*shop:folder"):
        find_side(store, copy.open_registry(), "second")


def reseal(store, ref, kind, **facts):
    """Publish an artifact with other facts, and return its name."""
    artifact = store.open(ref, kind)
    with store.stage() as folder:
        shutil.copytree(artifact.path, folder, dirs_exist_ok=True)
        return store.publish(kind.seal(folder, artifact.facts.model_copy(update=facts)))


def test_a_model_that_no_run_made_is_refused(copy, second):
    other = reseal(copy.open_store(), second["train"], Model, dataset="synthetic_garments:1.0.0", num_parameters=7)
    with pytest.raises(CompareError, match="Expected the record of the execution that made Model/"):
        find_side(copy.open_store(), copy.open_registry(), other)


def test_a_model_that_was_not_evaluated_has_no_figures_of_the_test(copy, second):
    store = copy.open_store()
    store.delete(second["evaluate"])
    side = find_side(store, copy.open_registry(), second["train"])
    assert side.evaluation is None
    found = compare(find_side(store, copy.open_registry(), f"{NAME}/1"), side)
    assert (found.pairs, found.no_pairs) == (None, f"{second['train']} was not evaluated")
    known = [metric.name for metric in found.metrics if metric.b]
    assert known == ["validation accuracy"]


# --- the comparison


@pytest.fixture
def comparison(find):
    return compare(find(f"{NAME}/1"), find(f"{NAME}/2"))


def test_it_names_the_parameters_that_differ(comparison):
    assert [(change.name, change.a, change.b) for change in comparison.parameters] == [
        ("transform.validation_examples", 1000, 1500),
        ("train.epochs", 2, 3),
        ("train.penalty.kind", "l2", "l1"),
    ]
    assert (comparison.code, comparison.libraries, comparison.sources) == ((), (), ())
    assert (comparison.only_a, comparison.only_b) == ((), ())


def test_it_names_code_libraries_and_sources_once_with_their_steps(find):
    a = find(f"{NAME}/1")
    executions = {}
    for step, execution in a.executions.items():
        code = execution.parts.code | {"ridgeline/component.py": "0" * 64}
        libraries = {name: "0.1" if name == "numpy" else v for name, v in execution.parts.libraries.items()}
        sources = {"image_dir": "5" * 64} if step == "ingest" else {}
        parts = execution.parts.model_copy(update={"code": code, "libraries": libraries, "sources": sources})
        executions[step] = execution.model_copy(update={"parts": parts})
    b = Side("other", executions, a.model, a.evaluation, a.examples, a.statistics)
    found = compare(a, b)
    (code,), (source,) = found.code, found.sources
    assert (code.name, code.b, code.steps) == ("ridgeline/component.py", "0" * 64, tuple(a.executions))
    assert (source.name, source.a, source.b, source.steps) == ("image_dir", "none", "5" * 64, ("ingest",))
    assert [(change.name, change.b) for change in found.libraries] == [("numpy", "0.1")]
    assert (found.pairs.only_a_right, found.pairs.only_b_right, found.pairs.p_value) == ((), (), 1.0)


def test_it_compares_the_data(comparison):
    assert not comparison.same_examples
    total, *classes = comparison.counts
    assert total.a == {"train": 5_000, "validation": 1_000, "test": 1_000}
    assert total.b == {"train": 4_500, "validation": 1_500, "test": 1_000}
    assert [counts.name for counts in classes] == list(comparison.a.model.facts.class_names)
    for split in total.a:
        assert sum(counts.a[split] for counts in classes) == total.a[split]
    drift = {drift.name: drift.shift for drift in comparison.drift}
    assert drift.keys() == {
        f"{name} of {split}"
        for name in ("class balance", "brightness", "contrast", "pixels")
        for split in ("train", "test")
    }
    assert drift["brightness of test"].effect == 0
    assert 0 < drift["brightness of train"].effect < 0.1


def test_it_compares_the_figures(comparison):
    metrics = {metric.name: metric for metric in comparison.metrics}
    for side, letter in ((comparison.a, "a"), (comparison.b, "b")):
        facts = side.evaluation.facts
        assert getattr(metrics["accuracy"], letter).value == facts.accuracy
        assert getattr(metrics["accuracy"], letter).interval == facts.accuracy_interval
        for found in facts.classes:
            recall = getattr(metrics[f"recall of {found.name}"], letter)
            assert recall.value == found.recall
            assert recall.interval[0] <= found.recall <= recall.interval[1]


def test_it_finds_the_images_on_which_they_disagree(comparison):
    pairs = comparison.pairs
    labels = np.asarray(comparison.b.examples.split("test").labels)
    a, b = (np.asarray(side.evaluation.predictions()) for side in (comparison.a, comparison.b))
    one, other = a.argmax(axis=1), b.argmax(axis=1)
    found = [*pairs.only_a_right, *pairs.only_b_right, *pairs.wrong_differently]
    assert sorted(image.index for image in found) == np.flatnonzero(one != other).tolist()
    assert pairs.num_images == pairs.both_right + pairs.both_wrong + len(pairs.only_a_right) + len(pairs.only_b_right)
    for image in found:
        i = image.index
        assert (image.label, image.a, image.b) == (labels[i], one[i], other[i])
        assert (image.a_probability, image.b_probability) == (a[i].max(), b[i].max())
    for group in (pairs.only_a_right, pairs.only_b_right, pairs.wrong_differently):
        gaps = [abs(a[image.index, image.label] - b[image.index, image.label]) for image in group]
        assert gaps == sorted(gaps, reverse=True)
    counts = len(pairs.only_a_right), len(pairs.only_b_right)
    assert pairs.p_value == mcnemar_p_value(*counts, "two-sided")
    assert comparison.b.evaluation.facts.comparison.only_champion_right == counts[0]  # the same as in `evaluate`


def test_the_predictions_for_other_test_images_are_not_paired(find):
    a, b = find(f"{NAME}/1"), find(f"{NAME}/2")
    manifest = b.examples.manifest
    files = dict(manifest.files)
    images = "test/images-00000-of-00001.npy"
    files[images] = files[images].model_copy(update={"sha256": "0" * 64})
    other = Examples(b.examples.path, manifest.model_copy(update={"files": files}))
    found = compare(a, Side(b.name, b.executions, b.model, b.evaluation, other, b.statistics))
    assert (found.pairs, found.no_pairs) == (None, "the test images differ")


def test_other_classes_are_counted_and_not_paired(find, copy, second):
    a, store = find(f"{NAME}/1"), copy.open_store()
    classes = ("<b>new</b>", *a.model.facts.class_names[1:])
    model = store.open(reseal(store, second["train"], Model, class_names=classes), Model)
    examples = store.open(reseal(store, second["transform"], Examples, class_names=classes), Examples)
    b = Side("other", {}, model, store.open(second["evaluate"], ModelEvaluation), examples, None)
    found = compare(a, b)
    assert (found.pairs, found.no_pairs, found.drift) == (None, "the classes differ", None)
    counts = {counts.name: counts for counts in found.counts}
    assert counts["<b>new</b>"].a is None
    assert counts[a.model.facts.class_names[0]].b is None
    assert found.only_a == tuple(a.executions)


def test_sides_of_different_datasets_are_refused(find, copy, second):
    a, store = find(f"{NAME}/1"), copy.open_store()
    model = store.open(reseal(store, second["train"], Model, dataset="shop:folder"), Model)
    b = Side("shop/1", {}, model, None, a.examples, None)
    with pytest.raises(CompareError, match=r"Expected two of one dataset; received .* and shop/1 of shop:folder"):
        compare(a, b)
