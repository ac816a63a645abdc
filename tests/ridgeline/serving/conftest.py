"""A registry, and a function that pushes models to it."""

import itertools
import shutil

import pytest

from ridgeline.artifacts.pushed_model import PushedModel, write_form
from ridgeline.registry import Registry

NAME = "synthetic_garments"
RUNS = itertools.count()


@pytest.fixture(scope="module")
def model(synthetic_store, refs):
    return synthetic_store.open(refs["export"], PushedModel)


@pytest.fixture
def registry(tmp_path, store, monkeypatch):
    monkeypatch.setattr("ridgeline.registry.check", lambda *arguments: None)
    return Registry(tmp_path / "serving", store=store)


@pytest.fixture
def push(registry, store, model, tmp_path):
    """Push another model with the same SavedModel, judged against the champion."""

    def push(form=None, canary_share=0.0, **facts):
        number = next(RUNS)
        champion = registry.champion(facts.get("model_name", NAME))
        folder = tmp_path / f"model {number}"
        shutil.copytree(model.path, folder)
        (folder / "manifest.json").unlink()
        if form:
            write_form(folder / "saved_model", form)
        facts = {"model_digest": f"{number:064x}", "champion": champion and champion.model_digest} | facts
        ref = store.publish(PushedModel.seal(folder, model.facts.model_copy(update=facts)))
        return registry.push(store.open(ref, PushedModel), f"run {number}", "ann", canary_share).version

    return push
