import errno
import itertools
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.pushed_model import PushedModel, read_form, write_form
from ridgeline.image_form import Form
from ridgeline.registry import STILL_LOADED, OtherDatasetError, Registry, RegistryError
from ridgeline.serving_check import ServingError
from ridgeline.store import StoreError


@pytest.fixture
def model(synthetic_store, refs):
    return synthetic_store.open(refs["export"], PushedModel)


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the check in a fresh process; return the list of what was to be checked."""
    checked = []
    monkeypatch.setattr("ridgeline.registry.check", lambda *arguments: checked.append(arguments))
    return checked


def variant(model, folder, **facts):
    """Return another servable model: the same SavedModel, other facts."""
    shutil.copytree(model.path, folder)
    (folder / "manifest.json").unlink()
    return PushedModel.seal(folder, model.facts.model_copy(update=facts or {"accuracy": 0.5}))


NAME = "synthetic_garments"


@pytest.fixture
def models(model, tmp_path, store):
    """Four models, by number, in a store of their own; the last is the first, evaluated again."""
    made = {}
    for number, facts in enumerate(
        [{"model_digest": f"{n:064x}", "accuracy": n / 10} for n in (1, 2, 3)]
        + [{"model_digest": f"{1:064x}", "accuracy": 0.15}],
        start=1,
    ):
        ref = store.publish(variant(model, tmp_path / f"model {number}", **facts))
        made[number] = store.open(ref, PushedModel)
    return made


@pytest.fixture
def registry(tmp_path, unchecked):
    return Registry(tmp_path / "serving")


NUMBERS = itertools.count(1)


def push(registry, model, by="ann"):
    """Push a model that was judged against the present champion, as the pipeline does."""
    other = registry.baseline(model.facts.model_name, model.facts.model_digest)
    model.facts = model.facts.model_copy(update={"champion": other and other.model_digest})
    return registry.push(model, f"run {next(NUMBERS)}", by)


def push_all(registry, *models):
    for model in models:
        push(registry, model)


def back(registry, store, version=None, reason="worse in production"):
    return registry.rollback(store, NAME, version, reason=reason, by="bob", run_id=f"rollback {next(NUMBERS)}")


def test_push_serves_and_makes_champion(model, tmp_path, unchecked):
    registry = Registry(tmp_path)
    pushed = registry.push(model, "run 1")
    assert (pushed.version, pushed.new, pushed.reason) == (1, True, "pushed as version 1")
    assert sorted(path.name for path in (tmp_path / "synthetic_garments").iterdir() if path.name[0] != ".") == [
        "1",
        "champion.json",
        "history-copy.jsonl",
        "history.jsonl",
    ]
    champion = registry.champion("synthetic_garments")
    assert (champion.version, champion.artifact, champion.run_id) == (1, model.ref, "run 1")
    assert list((tmp_path / "synthetic_garments").glob(".push-*")) == []


def test_unchanged_model_is_not_pushed_again(model, tmp_path, unchecked):
    registry = Registry(tmp_path)
    registry.push(model, "run 1")
    pushed = registry.push(model, "run 2")
    assert (pushed.version, pushed.new) == (1, False)
    assert "version 1 serves this model already" in pushed.reason
    assert len(registry.history("synthetic_garments")) == 1


def with_card(model, folder, text):
    shutil.copytree(model.path, folder)
    (folder / "manifest.json").unlink()
    for name in ("model-card.md", "model-card.html"):
        (folder / "saved_model" / "assets.extra" / name).write_text(text)
    return PushedModel.seal(folder, model.facts)


def test_another_model_card_alone_is_no_reason_for_a_push_but_a_damaged_one_is(model, tmp_path, registry):
    registry.push(model, "run 1")
    other = with_card(model, tmp_path / "other", "another card")
    pushed = registry.push(other, "run 2")
    assert (pushed.version, pushed.new) == (1, False)
    card = registry.card(NAME, 1)
    assert card.read_bytes() == model.card.read_bytes()
    card.write_text("damaged")
    pushed = registry.push(other, "run 3")
    assert (pushed.version, pushed.new) == (2, True)
    assert registry.card(NAME, 2).read_text() == "another card"


def with_form(model, folder, form):
    shutil.copytree(model.path, folder)
    (folder / "manifest.json").unlink()
    if form:
        write_form(folder / "saved_model", form)
    else:  # an artifact of an earlier release
        (folder / "saved_model" / "assets.extra" / "images.json").unlink()
    return PushedModel.seal(folder, model.facts)


def test_another_preparation_of_images_is_a_reason_for_a_push_but_a_file_that_states_the_defaults_is_not(
    model, tmp_path, registry
):
    registry.push(with_form(model, tmp_path / "earlier", None), "run 1")
    assert registry.push(model, "run 2").unchanged
    black = with_form(model, tmp_path / "black", Form.of_shape((28, 28), background=0))
    assert registry.push(black, "run 3").reason == "pushed as version 2"
    assert read_form(registry.root / NAME / "2", (28, 28)).background == 0


def test_verify_finds_a_changed_model_card(model, tmp_path, registry, store):
    registry.push(store.open(store.publish(variant(model, tmp_path / "model")), PushedModel), "run 1")
    registry.verify(store, NAME)
    registry.card(NAME, 1).write_text("better figures")
    with pytest.raises(RegistryError, match=r"they were changed: assets.extra/model-card.html"):
        registry.verify(store, NAME)


def test_a_version_without_a_model_card(model, registry):
    registry.push(model, "run 1")
    assert registry.card(NAME, 2) is None
    registry.card(NAME, 1).unlink()
    assert registry.card(NAME, 1) is None


def test_unchanged_model_is_not_pushed_on_a_full_disk_either(model, tmp_path, unchecked, monkeypatch):
    registry = Registry(tmp_path / "serving")
    first = registry.push(model, "run 1")

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert registry.push(model, "run 2").version == first.version


def test_versions_only_grow_and_are_never_rewritten(model, tmp_path, unchecked):
    registry = Registry(tmp_path / "serving")
    registry.push(model, "run 1")
    push(registry, variant(model, tmp_path / "variant", model_digest="1" * 64))
    assert registry.champion("synthetic_garments").version == 2
    shutil.rmtree(tmp_path / "serving" / "synthetic_garments" / "2")
    assert push(registry, model).version == 3
    assert [entry.version for entry in registry.history("synthetic_garments")] == [1, 2, 3]


def test_damaged_served_version_is_pushed_again(model, tmp_path, unchecked):
    registry = Registry(tmp_path)
    first = registry.push(model, "run 1")
    (first.path / "saved_model.pb").write_bytes(b"")
    assert registry.push(model, "run 2").version == 2


def test_a_model_of_another_dataset_is_refused_under_the_same_name(model, tmp_path, registry):
    def of(dataset, digit):
        folder = tmp_path / f"model {digit}"
        return variant(model, folder, model_name="emnist_letters", model_digest=f"{digit:064x}", dataset=dataset)

    push(registry, of("emnist/letters:3.0.0", 1))
    push(registry, of("emnist/letters:3.1.0", 2))
    with pytest.raises(
        OtherDatasetError, match=r"of the dataset emnist/letters:3\.1\.0, which is .* as emnist_letters"
    ):
        push(registry, of("emnist_letters:3.1.0", 3))
    assert [e.dataset for e in registry.history("emnist_letters")] == ["emnist/letters:3.0.0", "emnist/letters:3.1.0"]


def test_the_dataset_of_an_entry_of_an_earlier_release_is_that_of_its_model(
    model, tmp_path, synthetic_store, unchecked
):
    registry = Registry(tmp_path / "serving", store=synthetic_store)
    registry.push(variant(model, tmp_path / "old", dataset=""), "run 1")
    assert registry.history(NAME)[0].dataset == ""
    other = variant(model, tmp_path / "other", dataset="synthetic/garments:1.0.0", model_digest="1" * 64)
    with pytest.raises(OtherDatasetError, match=r"synthetic_garments:1\.0\.0, .* received one of synthetic/garments"):
        push(registry, other)
    registry.store = None  # nothing tells which dataset it was
    assert push(registry, variant(model, tmp_path / "third", dataset="a:1.0.0", model_digest="2" * 64)).version == 2


def test_leftovers_of_a_killed_push_are_deleted(model, tmp_path, unchecked):
    (tmp_path / "synthetic_garments" / ".push-dead").mkdir(parents=True)
    Registry(tmp_path).push(model, "run 1")
    assert list((tmp_path / "synthetic_garments").glob(".push-*")) == []


@pytest.mark.fresh_process
def test_model_that_serves_something_else_is_refused_and_the_champion_stays(model, tmp_path):
    registry = Registry(tmp_path / "serving")
    wrong = tmp_path / "wrong"
    shutil.copytree(model.path, wrong)
    (wrong / "manifest.json").unlink()
    probabilities = np.load(wrong / "check" / "probabilities.npy")
    np.save(wrong / "check" / "probabilities.npy", probabilities[:, ::-1])
    with pytest.raises(RegistryError, match="expected the evaluation's probabilities") as caught:
        registry.push(PushedModel.seal(wrong, model.facts), "run 1")
    assert "the champion is unchanged" in str(caught.value)
    assert registry.champion("synthetic_garments") is None
    assert registry.history("synthetic_garments") == []
    assert [path.name for path in (tmp_path / "serving" / "synthetic_garments").iterdir()] in ([".lock"], [])


def test_pointer_is_json_with_the_version(model, tmp_path, unchecked):
    Registry(tmp_path).push(model, "run 1")
    assert json.loads((tmp_path / "synthetic_garments" / "champion.json").read_text()) == {"version": 1}


def test_a_history_of_which_nothing_is_left_is_refused_and_left_alone(model, tmp_path, unchecked, store):
    registry = Registry(tmp_path)
    registry.push(model, "run 1")
    path = tmp_path / "synthetic_garments" / "history.jsonl"
    path.with_name("history-copy.jsonl").unlink()
    for damaged in (path.read_bytes()[:-20], b"", b"\xff" + path.read_bytes()):
        path.write_bytes(damaged)
        for action in (
            lambda: registry.push(model, "run 2"),
            lambda: registry.verify(store, NAME),
            lambda: back(registry, store),
        ):
            with pytest.raises(StoreError, match=r"history entry in each line of .*none that can be read.* a backup"):
                action()
        assert path.read_bytes() == damaged


# --- the history


def test_history_lines_of_earlier_releases_are_read(model, registry):
    registry.push(model, "run 1")
    path = registry.root / NAME / "history.jsonl"
    line = json.loads(path.read_text())
    assert (line.pop("reason"), line.pop("by"), line.pop("computes")) == ("", "", "")
    assert len(line.pop("sha256")) == len(line.pop("files")) == 64
    path.write_text(json.dumps(line) + "\n")
    assert (registry.champion(NAME).reason, registry.champion(NAME).by) == ("", "")


def test_appending_keeps_earlier_history_lines_byte_for_byte(models, registry, store):
    push_all(registry, models[1], models[2])
    path = registry.root / NAME / "history.jsonl"
    before = path.read_bytes()
    back(registry, store, reason="one\nline\u2028or\x85two")
    assert path.read_bytes().startswith(before)
    assert registry.champion(NAME).reason == "one\nline\u2028or\x85two"


def test_a_push_records_who_and_a_forced_blessing_why(model, registry, tmp_path):
    registry.push(variant(model, tmp_path / "forced", forced="demo"), "run 1", by="ann")
    assert (registry.champion(NAME).by, registry.champion(NAME).reason) == ("ann", "demo")


# --- the baseline


def digest(entry):
    return entry and int(entry.model_digest, 16)


def baseline(registry, number):
    return digest(registry.baseline(NAME, f"{number:064x}"))


def test_a_model_is_compared_with_the_champion_and_the_champion_with_what_it_replaced(models, registry, store):
    assert baseline(registry, 1) is None
    push_all(registry, models[1])
    assert [baseline(registry, n) for n in (1, 2)] == [None, 1]
    push_all(registry, models[2])
    assert [baseline(registry, n) for n in (1, 2, 3)] == [2, 1, 2]
    push_all(registry, models[3])
    assert [baseline(registry, n) for n in (1, 2, 3)] == [3, 3, 2]
    back(registry, store, 2)
    assert [baseline(registry, n) for n in (1, 2, 3)] == [2, 1, 2]
    back(registry, store, 1)
    assert [baseline(registry, n) for n in (1, 2, 3)] == [None, 1, 1]


def test_pushing_a_model_does_not_change_its_baseline(models, registry, store):
    for number in (1, 4, 2, 1, 3, 4, 2):
        model = models[number]
        before = registry.baseline(NAME, model.facts.model_digest)
        push(registry, model)
        assert registry.baseline(NAME, model.facts.model_digest) == before
        if number == 3:
            back(registry, store)


# --- rollback


def test_rollback_makes_the_model_before_the_champion_again(models, registry, store):
    push_all(registry, models[1], models[2])
    entry = back(registry, store)
    assert registry.champion(NAME) == entry == registry.history(NAME)[-1]
    assert (entry.version, entry.action, entry.artifact) == (1, "rollback", models[1].ref)
    assert (entry.reason, entry.by) == ("worse in production", "bob")
    assert json.loads((registry.root / NAME / "champion.json").read_text()) == {"version": 1}
    assert registry.versions(NAME) == [1, 2]


@pytest.mark.parametrize("reason", ["", "  ", "worse \udcff"])
def test_a_reason_that_the_history_cannot_hold_is_refused(models, registry, store, reason):
    push_all(registry, models[1], models[2])
    with pytest.raises(RegistryError, match="Expected a reason"):
        registry.rollback(store, NAME, None, reason=reason, by="bob", run_id="back")
    assert [entry.version for entry in registry.history(NAME)] == [1, 2]


def test_rollback_by_default_goes_further_back_and_skips_the_same_model(models, registry, store, tmp_path):
    forced = store.open(store.publish(variant(models[1], tmp_path / "forced", forced="once more")), PushedModel)
    push_all(registry, models[2], models[1], forced, models[3])  # versions 2 and 3 serve one model
    assert back(registry, store).version == 3
    assert back(registry, store).version == 1
    with pytest.raises(RegistryError, match="another model .* before version 1; received none. There are"):
        back(registry, store)


def test_rollback_goes_forward_again_by_number(models, registry, store):
    push_all(registry, models[1], models[2])
    back(registry, store)
    assert back(registry, store, 2).version == 2
    assert registry.previous(NAME).version == 1


def test_rollback_passes_over_a_version_that_is_gone(models, registry, store):
    push_all(registry, models[1], models[2], models[3])
    shutil.rmtree(registry.root / NAME / "2")
    assert registry.previous(NAME).version == 1
    shutil.rmtree(registry.root / NAME / "3")  # the champion itself
    assert back(registry, store).version == 1


@pytest.mark.parametrize(
    ("version", "reason", "message"),
    [
        (3, "worse", "received 3, which is the champion. There are versions 2, 3"),
        (7, "worse", "received 7, which does not exist. There are versions 2, 3"),
        (1, "worse", "received 1, which was deleted. There are versions 2, 3"),
        (2, " ", "Expected a reason"),
    ],
)
def test_rollback_refuses(models, registry, store, version, reason, message):
    push_all(registry, models[1], models[2], models[3])
    shutil.rmtree(registry.root / NAME / "1")
    before = registry.history(NAME)
    with pytest.raises(RegistryError, match=message):
        back(registry, store, version, reason)
    assert registry.history(NAME) == before


@pytest.mark.parametrize("name", ["fashion", "..", ""])
def test_an_unknown_model_is_refused_and_leaves_no_trace(models, registry, store, name):
    push_all(registry, models[1])
    with pytest.raises(RegistryError, match=f"served model: {NAME}; received '{name}'"):
        registry.rollback(store, name, None, reason="worse", by="", run_id="")
    with pytest.raises(RegistryError, match="served model"):
        registry.verify(store, name)
    assert [path.name for path in registry.root.iterdir() if path.is_dir()] == [NAME]


def test_a_damaged_version_is_refused_and_the_champion_stays(models, registry, store):
    push_all(registry, models[1], models[2])
    for damage in (
        lambda folder: (folder / "extra").write_text("x"),
        lambda f: (f / "saved_model.pb").write_bytes(b""),
    ):
        damage(registry.root / NAME / "1")
        with pytest.raises(RegistryError, match="byte for byte; they were changed"):
            back(registry, store)
    assert registry.champion(NAME).version == 2


def test_a_version_whose_artifact_is_missing_is_refused(models, registry, store):
    push_all(registry, models[1], models[2])
    store.delete(models[1].ref)
    with pytest.raises(ArtifactError, match="Expected an artifact"):
        back(registry, store)


def test_a_push_a_verification_and_a_rollback_check_what_is_served(models, registry, store, unchecked):
    push_all(registry, models[1])
    folder, *expected = unchecked.pop()
    assert folder.name.startswith(".push-")
    assert expected == [models[1].check, models[1].facts.class_names]
    push_all(registry, models[2])
    unchecked.clear()
    assert registry.verify(store, NAME).version == 2
    assert registry.verify(store, NAME, 1).artifact == models[1].ref
    back(registry, store)
    assert unchecked == [
        (registry.root / NAME / str(n), models[n].check, models[n].facts.class_names) for n in (2, 1, 1)
    ]


def test_a_version_that_serves_something_else_is_refused_and_the_champion_stays(models, registry, store, monkeypatch):
    push_all(registry, models[1], models[2])

    def refuse(*_):
        raise ServingError("Expected 1; received 2.")

    monkeypatch.setattr("ridgeline.registry.check", refuse)
    for action in (lambda: registry.verify(store, NAME), lambda: back(registry, store)):
        with pytest.raises(RegistryError, match=r"received 2\. Nothing was changed; the champion is unchanged"):
            action()
    assert registry.champion(NAME).version == 2


def test_a_run_that_is_done_again_does_not_roll_back_twice(models, registry, store):
    push_all(registry, models[1], models[2], models[3])
    entries = [registry.rollback(store, NAME, None, reason="worse", by="bob", run_id="one run") for _ in range(2)]
    assert entries[0] == entries[1] == registry.champion(NAME)
    assert [entry.version for entry in registry.history(NAME)] == [1, 2, 3, 2]
    push_all(registry, models[1])
    with pytest.raises(RegistryError, match="which rolled back to version 2 on .*; version 4 was changed since"):
        registry.rollback(store, NAME, None, reason="worse", by="bob", run_id="one run")
    assert registry.champion(NAME).version == 4
    assert back(registry, store).version == 2


# --- what was rolled back from


def test_a_model_that_was_rolled_back_from_is_not_pushed_again(models, registry, store):
    push_all(registry, models[1], models[2])
    back(registry, store)
    outcome = push(registry, models[2])
    assert (outcome.new, outcome.version) == (False, 1)
    today = registry.champion(NAME).at.date()
    assert outcome.reason == (
        f"not pushed: version 2 served this model and was rolled back from on {today}: worse in production; "
        f"`ridgeline models rollback {NAME} 2 --reason ...` serves it again"
    )
    assert registry.champion(NAME).version == 1


def test_a_model_that_was_rolled_back_from_is_not_pushed_after_another_evaluation(models, registry, store):
    push_all(registry, models[2], models[1])
    back(registry, store)
    assert "rolled back from" in push(registry, models[4]).reason  # the same model as models[1]


def test_a_model_that_was_rolled_back_to_can_be_pushed_again_later(models, registry, store):
    push_all(registry, models[1], models[2])
    back(registry, store)
    back(registry, store, 2)
    assert "serves this model already" in push(registry, models[2]).reason
    push_all(registry, models[3])
    assert push(registry, models[2]).version == 4


def test_a_reason_to_force_it_pushes_it_again_but_only_once(models, registry, store, tmp_path):
    push_all(registry, models[1], models[2])
    back(registry, store)
    forced = variant(models[2], tmp_path / "forced", forced="we need it")
    assert push(registry, forced).version == 3
    assert "version 3 serves this model already" in push(registry, models[2]).reason  # without force
    back(registry, store)
    assert "version 3 served this model and was rolled back from" in push(registry, forced).reason
    other = variant(models[2], tmp_path / "other", forced="we need it again")
    assert push(registry, other).version == 4


def test_the_same_force_does_not_undo_a_rollback_to_any_version(models, registry, store, tmp_path):
    push_all(registry, models[1], models[3], variant(models[2], tmp_path / "a", forced="we need it"))
    back(registry, store, 1)
    forced_again = variant(
        models[2], tmp_path / "b", forced="we need it", accuracy=0.21
    )  # judged against model 1 this time
    assert "version 3 served this model and was rolled back from" in push(registry, forced_again).reason


# --- models that compute the same


@pytest.fixture
def trained(synthetic_store, refs, store, model, tmp_path):
    """Return a function that makes a servable model of the synthetic one, trained again, with other files."""
    numbers = itertools.count()

    def make(change):
        folder = tmp_path / f"trained {next(numbers)}"
        original = synthetic_store.open(refs["train"], Model)
        shutil.copytree(original.path, folder)
        (folder / "manifest.json").unlink()
        change(folder)
        digest = store.publish(Model.seal(folder, original.facts)).partition("/")[2]
        return variant(model, tmp_path / f"servable {next(numbers)}", model_digest=digest)

    return make


def other_summary(folder):
    (folder / "summary.txt").write_text("a table as another release of a library draws it")


def other_description(folder):
    path = folder / "architecture.json"
    described = json.loads(path.read_text())
    described["config"]["layers"][-1]["config"].update(kernel_regularizer={"l2": 0.5}, quantization=None)
    path.write_text(json.dumps(described))


def other_file_layout(folder):
    """Write the same weights into another HDF5 file, as another release of the library may."""
    import h5py

    path = folder / "model.weights.h5"
    with h5py.File(path) as file, h5py.File(folder / "new", "w", libver="latest") as new:
        for name in file:
            file.copy(name, new)
    (folder / "new").rename(path)


def other_weights(folder):
    import h5py

    with h5py.File(folder / "model.weights.h5", "r+") as file:
        weights = next(iter(file["layers"].values()))["vars"]["0"]
        weights[0] += 1


def other_activation(folder):
    path = folder / "architecture.json"
    path.write_text(path.read_text().replace('"relu"', '"tanh"'))


@pytest.mark.parametrize("change", [other_summary, other_description, other_file_layout])
@pytest.mark.parametrize("present", [True, False])
def test_a_model_trained_again_is_recognized_by_what_it_computes(models, registry, store, trained, change, present):
    registry.store = store
    push_all(registry, models[1], trained(lambda folder: None))
    again = trained(change)
    outcome = push(registry, again, by="")
    assert (outcome.new, outcome.reason) == (False, "not pushed: version 2 serves this model already")
    back(registry, store)
    if not present:  # garbage collection took what is not served
        store.delete(f"Model/{registry.history(NAME)[1].model_digest}")
        registry = Registry(registry.root, store=store)
    outcome = push(registry, again, by="")
    assert (outcome.new, outcome.version) == (False, 1)
    assert "version 2 served this model and was rolled back from" in outcome.reason
    assert [entry.version for entry in registry.entries_of(NAME, again.facts.model_digest)] == [2]


@pytest.mark.parametrize("change", [other_weights, other_activation])
def test_a_model_that_computes_something_else_is_another_model(models, registry, store, trained, change):
    registry.store = store
    push_all(registry, models[1], trained(lambda folder: None))
    back(registry, store)
    assert push(registry, trained(change), by="").version == 3


def test_a_model_trained_again_is_compared_with_what_the_champion_replaced(models, registry, store, trained):
    registry.store = store
    first = trained(lambda folder: None)
    push_all(registry, models[1], first)
    again = trained(other_summary).facts.model_digest
    assert registry.baseline(NAME, again) == registry.baseline(NAME, first.facts.model_digest)
    assert registry.baseline(NAME, again).version == 1


def test_entries_of_earlier_releases_are_recognized_while_the_store_has_their_model(models, registry, store, trained):
    push_all(registry, models[1], trained(lambda folder: None))  # without a store: nothing is recorded
    assert [entry.computes for entry in registry.history(NAME)] == ["", ""]
    registry.store = store
    assert "version 2 serves this model already" in push(registry, trained(other_summary)).reason


# --- files of operating systems


OS_FILES = [".DS_Store", "Thumbs.db", "desktop.ini", "._saved_model.pb", ".nfs00000000001a2b3c", "variables/.DS_Store"]


@pytest.mark.parametrize("name", OS_FILES)
def test_a_file_of_an_operating_system_is_no_damage(model, registry, store, name):
    ref = store.publish(variant(model, store.local / "variant", model_digest="1" * 64))
    (store.path(ref) / "saved_model" / name).touch()
    one = store.open(ref, PushedModel)
    push(registry, one)
    served = registry.root / NAME / "1"
    assert not (served / name).exists()
    (served / name).write_text("by the system")
    assert registry.verify(store, NAME).version == 1
    assert "serves this model already" in push(registry, one).reason


def test_real_damage_of_a_served_version_is_named(models, registry, store):
    push_all(registry, models[1])
    (registry.root / NAME / "1" / ".DS_Store").touch()
    (registry.root / NAME / "1" / "variables" / "extra").touch()
    (registry.root / NAME / "1" / "saved_model.pb").write_text("")
    with pytest.raises(RegistryError, match="they were changed: saved_model.pb, variables/extra. Roll back"):
        registry.verify(store, NAME)


# --- what else is not pushed


def test_the_champion_is_not_pushed_again_after_another_evaluation(models, registry, tmp_path):
    push_all(registry, models[1])
    outcome = push(registry, models[4])
    assert (outcome.new, outcome.reason) == (False, "not pushed: version 1 serves this model already")
    (registry.root / NAME / "1" / "extra").write_text("damage")
    assert push(registry, models[4], by="").version == 2


def test_a_verdict_against_another_champion_is_not_pushed(models, registry, tmp_path):
    push_all(registry, models[1], models[2])
    registry.push(models[2], "run 1")
    models[3].facts = models[3].facts.model_copy(update={"champion": f"{1:064x}"})
    outcome = registry.push(models[3], "run 3", by="ann")
    assert (outcome.new, outcome.version) == (False, 2)
    assert outcome.reason == (
        "not pushed: this model was judged against model 000000000000, but the champion is model 000000000000, "
        "version 2; judge it again"
    )
    models[3].facts = models[3].facts.model_copy(update={"forced": "we need it"})
    assert registry.push(models[3], "run 3", by="ann").version == 3


def test_a_replaced_model_is_pushed_again_only_if_a_user_asks(models, registry):
    push_all(registry, models[1], models[2])
    outcome = push(registry, models[1], by="")
    assert (outcome.new, outcome.version) == (False, 2)
    assert outcome.reason == (
        f"not pushed: version 1 served this model and was replaced by version 2 on "
        f"{registry.champion(NAME).at.date()}, and this run is scheduled; `ridgeline models rollback {NAME} 1 "
        "--reason ...` serves it again"
    )
    assert push(registry, models[1], by="ann").version == 3


def test_a_scheduled_run_pushes_a_new_model(models, registry):
    push_all(registry, models[1])
    assert push(registry, models[2], by="").version == 2


# --- pruning


@pytest.fixture
def loaded_at_once(monkeypatch):
    """Let servers load a new champion at once, so that an old one can be deleted at once."""
    monkeypatch.setattr("ridgeline.registry.STILL_LOADED", timedelta(days=-1))


def test_a_push_deletes_old_versions_but_not_the_one_that_a_rollback_goes_to(models, registry, store, loaded_at_once):
    registry.keep_versions = 1
    push_all(registry, models[1], models[2], models[3])
    assert registry.versions(NAME) == [2, 3]
    assert len(registry.history(NAME)) == 3
    back(registry, store)
    push(registry, models[4])
    assert registry.versions(NAME) == [2, 4]  # 2 is what 4 replaced
    assert list((registry.root / NAME).glob(".pruned-*")) == []
    assert push(registry, models[3]).reason.endswith("a run that forces it with another reason pushes it again")


def test_a_version_that_was_champion_a_moment_ago_is_not_deleted(models, registry, store, monkeypatch):
    registry.keep_versions = 1
    push_all(registry, models[1], models[2], models[3])
    assert registry.versions(NAME) == [1, 2, 3]
    later = datetime.now(UTC) + STILL_LOADED + timedelta(seconds=1)
    monkeypatch.setattr("ridgeline.registry.datetime", type("Later", (datetime,), {"now": lambda _: later}))
    push_all(registry, models[1])
    assert registry.versions(NAME) == [3, 4]
    hour_back = later - timedelta(hours=1)  # a clock that is set back deletes nothing
    monkeypatch.setattr("ridgeline.registry.datetime", type("Earlier", (datetime,), {"now": lambda _: hour_back}))
    push_all(registry, models[2])
    assert registry.versions(NAME) == [3, 4, 5]


@pytest.mark.parametrize("number", ["1", "7"])  # of a version that was deleted, and of none
def test_a_folder_that_a_person_put_there_is_not_deleted(models, registry, loaded_at_once, caplog, number):
    registry.keep_versions = 1
    push_all(registry, models[1], models[2], models[3])
    assert registry.versions(NAME) == [2, 3]
    (registry.root / NAME / number).mkdir()
    (registry.root / NAME / number / "mine").write_text("mine")
    for model in (models[1], models[2], models[3]):
        push_all(registry, model)
    assert (registry.root / NAME / number / "mine").read_text() == "mine"
    assert len(registry.versions(NAME)) == 3
    assert ("1 holds other files than were pushed: it is not deleted" in caplog.text) == (number == "1")


def test_a_version_half_deleted_by_a_killed_push_is_deleted(models, registry):
    push_all(registry, models[1])
    (registry.root / NAME / ".pruned-dead").mkdir()
    push_all(registry, models[1])
    assert list((registry.root / NAME).glob(".pruned-*")) == []


# --- TF Serving


def test_a_model_that_cannot_be_read_is_left_out_and_the_others_are_pushed(models, registry, model, tmp_path, caplog):
    push_all(registry, models[1], variant(model, tmp_path / "other", model_name="shoes"))
    (registry.root / "shoes" / "champion.json").write_bytes(b"")
    assert push(registry, models[2]).new  # the history counts
    assert 'name: "shoes"' in (registry.root / "models.config").read_text()
    (registry.root / "shoes" / "history.jsonl").write_bytes(b"")
    (registry.root / "shoes" / "history-copy.jsonl").write_bytes(b"")
    (registry.root / "shoes" / "champion.json").write_bytes(b"")
    assert push(registry, models[3]).new
    config = (registry.root / "models.config").read_text()
    assert "versions: 3 " in config
    assert "shoes" not in config
    assert "leaves out shoes" in caplog.text
    (registry.root / "shoes" / "champion.json").write_text('{"version": 1}')
    assert push(registry, models[1], by="ann").new
    assert 'name: "shoes"' in (registry.root / "models.config").read_text()  # what it served last


def test_models_config_names_the_champion_of_every_model(models, registry, store, model, tmp_path):
    push_all(registry, models[1], models[2])
    registry.base_path = "/models/"
    registry.push(variant(model, tmp_path / "other", model_name='odd"name'), "run 1")
    back(registry, store)
    assert (registry.root / "models.config").read_text() == (
        "model_config_list {\n"
        '  config {\n    name: "odd\\"name"\n    base_path: "/models/odd\\"name"\n    model_platform: "tensorflow"\n'
        "    model_version_policy { specific { versions: 1 } }\n  }\n"
        '  config {\n    name: "synthetic_garments"\n    base_path: "/models/synthetic_garments"\n'
        '    model_platform: "tensorflow"\n    model_version_policy { specific { versions: 1 } }\n  }\n'
        "}\n"
    )
