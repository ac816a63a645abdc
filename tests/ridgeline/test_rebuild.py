import shutil
import tempfile

import pytest

from ridgeline import pipeline
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.rebuild import RebuildError, rebuild
from ridgeline.settings import Settings

NAME = "synthetic_garments"


@pytest.fixture
def copy(synthetic, tmp_path, monkeypatch):
    """A copy of the synthetic store, to be written to; temporary folders are made beside it."""
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Settings(store=str(tmp_path / "store"), manual_dir=None)


def files_in(folder):
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    return {path: time for path, time in kept.items() if "leases" not in path.parts}


def replace_record(settings, step, **values):
    """Replace the one record of a step; `parts` holds changes of its parts."""
    store = settings.open_store()
    record = pipeline.run_records(settings, "synthetic")[step]
    parts = record.parts.model_copy(update=values.pop("parts", {}))
    shutil.rmtree(store.local / "executions" / step)
    store.record(record.model_copy(update={**values, "parts": parts}))
    return record


def other_examples(settings, refs):
    """Make the lineage name examples that `transform` does not yield; return their name."""
    store = settings.open_store()
    examples = store.open(refs["transform"], Examples)
    with store.stage() as folder:
        shutil.copytree(examples.path, folder, dirs_exist_ok=True)
        shutil.copyfile(folder / "test" / "labels-00000-of-00001.npy", folder / "test" / "more.npy")
        ref = store.publish(Examples.seal(folder, examples.facts))
    for step in ("train", "evaluate", "export"):
        inputs = pipeline.run_records(settings, "synthetic")[step].inputs
        replace_record(settings, step, inputs={**inputs, "examples": ref})
    return ref


@pytest.mark.fresh_process
def test_a_version_has_the_same_bytes_again(copy, refs, tmp_path):
    before = files_in(tmp_path)
    outcomes = list(rebuild(copy, NAME))
    assert [outcome.step for outcome in outcomes] == ["ingest", "transform", "train", "evaluate", "export"]
    assert [outcome.received for outcome in outcomes] == [refs[outcome.step] for outcome in outcomes]
    assert all(outcome.same and not outcome.differences and not outcome.files for outcome in outcomes)
    assert files_in(tmp_path) == before


def test_the_step_that_differs_is_named_with_what_differs_from_its_record(copy, refs, tmp_path):
    ref = other_examples(copy, refs)
    libraries = pipeline.run_records(copy, "synthetic")["transform"].parts.libraries
    code = pipeline.run_records(copy, "synthetic")["transform"].parts.code
    parts = {"libraries": {**libraries, "numpy": "1.0"}, "code": {**code, "components/transform.py": "0" * 64}}
    replace_record(copy, "transform", output=ref, parts=parts)
    before = files_in(tmp_path)
    first, second = rebuild(copy, NAME, 1)
    assert first.same
    assert (second.step, second.expected, second.received) == ("transform", ref, refs["transform"])
    assert second.files == ("test/more.npy",)
    numpy = f"library numpy 1.0 → {libraries['numpy']}"
    assert second.differences == ("code of components/transform.py changed", numpy)
    assert files_in(tmp_path) == before


def test_neither_differs(copy, refs):
    replace_record(copy, "transform", output=other_examples(copy, refs))
    *_, last = rebuild(copy, NAME)
    assert (last.step, last.same, last.differences) == ("transform", False, ())


@pytest.mark.fresh_process
def test_a_step_that_makes_nothing_now_differs(copy):
    record = pipeline.run_records(copy, "synthetic")["export"]
    replace_record(copy, "export", parts={"params": {**record.parts.params, "max_size_mib": 0.001}})
    *_, last = rebuild(copy, NAME)
    assert (last.step, last.same, last.received) == ("export", False, None)
    assert last.skipped.startswith("too large: ")


@pytest.mark.fresh_process
def test_the_champion_comes_from_the_store(two_versions):
    *before, export = rebuild(two_versions, NAME, 2)
    assert [outcome.step for outcome in before] == ["ingest", "transform", "train", "evaluate"]
    assert all(outcome.same for outcome in [*before, export])


# --- what can't be built again


def refuse(settings, message, version=None):
    with pytest.raises(RebuildError, match=message) as error:
        list(rebuild(settings, NAME, version))
    assert error.value.exit_code == 2


def test_a_version_that_does_not_exist(copy):
    refuse(copy, r"^Cannot rebuild synthetic_garments version 7: Expected a version of .*; received 7", 7)


def test_a_damaged_version(copy):
    (copy.serving_dir() / NAME / "1" / "saved_model.pb").write_bytes(b"x")
    refuse(copy, r"they were changed: saved_model\.pb")


def test_a_damaged_artifact_of_a_version(copy, refs):
    (copy.open_store().path(refs["export"]) / "check" / "images.npy").unlink()
    refuse(copy, "The artifact is damaged")


@pytest.mark.parametrize("step", ["export", "evaluate", "transform"])
def test_a_missing_record(copy, step, refs):
    shutil.rmtree(copy.open_store().local / "executions" / step)
    refuse(copy, f"expected the record of the execution that made {refs[step]}; received none. Restore executions/")


def test_a_step_that_is_not_installed(copy):
    replace_record(copy, "transform", component="reshape", parts={"component": "reshape"})
    refuse(copy, "expected the step reshape, which made Examples/.*; it is not installed")


def test_a_model_of_several_workers(copy, refs):
    replace_record(copy, "train", parts={"workers": 3})
    refuse(copy, f"3 workers made {refs['train']} together, and one gives other bytes. Run train on as many")


def test_parameters_that_this_release_refuses(copy):
    params = pipeline.run_records(copy, "synthetic")["ingest"].parts.params
    replace_record(copy, "ingest", parts={"params": {**params, "sharpness": 1}})
    refuse(
        copy,
        r"refuses the recorded parameters: Unknown parameter ingest.sharpness.*\. Install the release that made it\.$",
    )


def test_a_folder_that_the_dag_named_and_no_setting_does(copy, tmp_path):
    parts = pipeline.run_records(copy, "synthetic")["evaluate"].parts
    changed = {"params": {**parts.params, "min_agreement": 0.5}, "sources": {"replay_dir": "f" * 64}}
    replace_record(copy, "evaluate", parts=changed)
    refuse(
        copy, r"min_agreement: expected a folder .* received none\..* Set RIDGELINE_REPLAY_DIR to what the step read\.$"
    )


def test_missing_data(copy, tmp_path):
    params = pipeline.run_records(copy, "synthetic")["ingest"].parts.params
    replace_record(copy, "ingest", parts={"params": {**params, "dataset": "folder", "name": "shop"}})
    refuse(copy, "the step ingest failed: .*Set it, or RIDGELINE_IMAGE_DIR")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_missing_champion(copy, synthetic):
    record = pipeline.run_records(copy, "synthetic")["evaluate"]
    champion = f"{Model.__name__}/{'7' * 64}"
    parts = {"inputs": {**record.parts.inputs, "champion": "7" * 64}}
    replace_record(copy, "evaluate", inputs={**record.inputs, "champion": champion}, parts=parts)
    refuse(copy, f"Cannot rebuild the champion of {NAME}: Expected .*{'7' * 64}")
