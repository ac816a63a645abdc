import json
import shutil

import numpy as np
import pytest

from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.registry import Registry, RegistryError
from ridgeline.store import StoreError


@pytest.fixture
def model(synthetic_store, refs):
    return synthetic_store.open(refs["export"], PushedModel)


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the check in a fresh process where a test is about something else."""
    monkeypatch.setattr("ridgeline.registry.check", lambda saved_model, model: None)


def variant(model, folder):
    """Return another servable model: the same SavedModel, other facts."""
    shutil.copytree(model.path, folder)
    (folder / "manifest.json").unlink()
    return PushedModel.seal(folder, model.facts.model_copy(update={"accuracy": 0.5}))


def test_push_serves_checks_and_crowns(model, tmp_path):
    registry = Registry(tmp_path)
    pushed = registry.push(model, "run 1")
    assert (pushed.version, pushed.new, pushed.reason) == (1, True, "pushed as version 1")
    assert sorted(path.name for path in (tmp_path / "synthetic_garments").iterdir() if path.name[0] != ".") == [
        "1",
        "champion.json",
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


def test_versions_only_grow_and_are_never_rewritten(model, tmp_path, unchecked):
    registry = Registry(tmp_path / "serving")
    registry.push(model, "run 1")
    registry.push(variant(model, tmp_path / "variant"), "run 2")
    assert registry.champion("synthetic_garments").version == 2
    shutil.rmtree(tmp_path / "serving" / "synthetic_garments" / "2")
    assert registry.push(model, "run 3").version == 3
    assert [entry.version for entry in registry.history("synthetic_garments")] == [1, 2, 3]


def test_damaged_served_version_is_pushed_anew(model, tmp_path, unchecked):
    registry = Registry(tmp_path)
    first = registry.push(model, "run 1")
    (first.path / "saved_model.pb").write_bytes(b"")
    assert registry.push(model, "run 2").version == 2


def test_rubbish_of_a_killed_push_is_cleared(model, tmp_path, unchecked):
    (tmp_path / "synthetic_garments" / ".push-dead").mkdir(parents=True)
    Registry(tmp_path).push(model, "run 1")
    assert list((tmp_path / "synthetic_garments").glob(".push-*")) == []


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


def test_push_killed_before_the_crown_keeps_the_champion_and_its_number(model, tmp_path, unchecked, monkeypatch):
    registry = Registry(tmp_path / "serving")
    registry.push(model, "run 1")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_crown", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            registry.push(variant(model, tmp_path / "variant"), "run 2")
    assert registry.champion("synthetic_garments").version == 1
    shutil.rmtree(tmp_path / "variant")
    assert registry.push(variant(model, tmp_path / "variant"), "run 3").version == 3


def test_damaged_history_is_refused_and_left_alone(model, tmp_path, unchecked):
    registry = Registry(tmp_path)
    registry.push(model, "run 1")
    path = tmp_path / "synthetic_garments" / "history.jsonl"
    torn = path.read_text()[:-20]
    path.write_text(torn)
    with pytest.raises(StoreError, match="history entry in each line"):
        registry.push(model, "run 2")
    assert path.read_text() == torn


def test_other_class_names_are_refused(model, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(model.path, wrong)
    (wrong / "manifest.json").unlink()
    swapped = (model.facts.class_names[1], model.facts.class_names[0], *model.facts.class_names[2:])
    facts = model.facts.model_copy(update={"class_names": swapped})
    with pytest.raises(RegistryError, match="expected class_name to be the name of class_id"):
        Registry(tmp_path / "serving").push(PushedModel.seal(wrong, facts), "run 1")
