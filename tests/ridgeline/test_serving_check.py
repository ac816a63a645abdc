"""The check of what a SavedModel serves, in this process; `test_registry` has a push that starts a fresh one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.serving_check import TOLERANCE, main
from ridgeline.store import Store


@pytest.fixture
def model(synthetic_store: Store, refs: dict[str, str]) -> PushedModel:
    return synthetic_store.open(refs["export"], PushedModel)


@pytest.fixture
def expected(model: PushedModel, tmp_path: Path) -> Path:
    """A copy of what the model must serve."""
    return Path(shutil.copytree(model.check, tmp_path / "check"))


def test_a_difference_within_the_tolerance_passes_and_a_larger_one_does_not(model: PushedModel, expected: Path) -> None:
    names = list(model.facts.class_names)
    main(model.saved_model, expected, names)
    probabilities = np.load(expected / "probabilities.npy")
    np.save(expected / "probabilities.npy", probabilities + np.float32(TOLERANCE / 2))
    main(model.saved_model, expected, names)
    for wrong in (probabilities + np.float32(2 * TOLERANCE), np.full_like(probabilities, np.nan)):
        np.save(expected / "probabilities.npy", wrong)
        with pytest.raises(SystemExit, match="expected the evaluation's probabilities; received others, by up to"):
            main(model.saved_model, expected, names)


def test_other_class_names_are_refused(model: PushedModel) -> None:
    with pytest.raises(SystemExit, match="expected class_name to be the name of class_id"):
        main(model.saved_model, model.check, list(reversed(model.facts.class_names)))


@pytest.mark.parametrize(
    ("difference", "passes"), [(5e-6, True), (-5e-6, True), (2e-5, False), (-2e-5, False), (1e-3, False), (5e-2, False)]
)
def test_one_response_of_one_image_that_differs_by_more_than_a_hundred_thousandth_is_refused(
    model: PushedModel, expected: Path, difference: float, passes: bool
) -> None:
    probabilities = np.load(expected / "probabilities.npy")
    probabilities[-1, 0] += np.float32(difference)  # only the largest batch has the last image
    np.save(expected / "probabilities.npy", probabilities)
    names = list(model.facts.class_names)
    if passes:
        main(model.saved_model, expected, names)
    else:
        with pytest.raises(SystemExit, match="received others, by up to"):
            main(model.saved_model, expected, names)
