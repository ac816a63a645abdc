from __future__ import annotations

import numpy as np
import pytest

from components.training.penalty import KINDS, STRENGTHS, Penalty, proximal_step, regularizer

WEIGHTS = np.array([-2.0, -0.5, -0.0, 0.25, 0.5, 3.0], np.float32)


@pytest.mark.parametrize(
    ("kind", "strengths", "label"),
    [
        ("none", (), "no penalty"),
        ("l1", (0.001,), "L1 0.001"),
        ("l2", (0.01,), "L2 0.01"),
        ("l1_l2", (0.001, 0.01), "L1 + L2 0.001 and 0.01"),
    ],
)
def test_a_penalty_has_the_strengths_and_the_label_of_its_kind(
    kind: str, strengths: tuple[float, ...], label: str
) -> None:
    penalty = Penalty.at(kind, *strengths)
    given = dict(zip(KINDS[kind].strengths, strengths, strict=True))
    assert penalty.strengths == {name: given.get(name, 0.0) for name in STRENGTHS}
    assert penalty.label == label


def test_a_kind_needs_all_of_its_strengths() -> None:
    with pytest.raises(ValueError, match="argument"):
        Penalty.at("l1_l2", 0.001)


@pytest.mark.parametrize("smooth_only", [False, True])
def test_the_regularizer_follows_its_formula_and_smooth_only_leaves_l1_out_of_the_gradient(smooth_only: bool) -> None:
    import tensorflow as tf

    penalty = regularizer(smooth_only)
    for name, strength in {"l1": 0.5, "l2": 0.25}.items():
        penalty.strengths[name].assign(strength)
    weights = tf.Variable(WEIGHTS)
    with tf.GradientTape() as tape:
        value = penalty(weights)
    assert float(value) == pytest.approx(0.5 * np.abs(WEIGHTS).sum() + 0.25 * (WEIGHTS**2).sum())
    expected = 0.5 * WEIGHTS + (0 if smooth_only else 0.5 * np.sign(WEIGHTS))
    np.testing.assert_allclose(tape.gradient(value, weights), expected)


def test_the_proximal_step_is_soft_thresholding() -> None:
    thresholded = proximal_step(WEIGHTS, 2.0, {"l1": 0.25, "l2": 9.0}).numpy()
    np.testing.assert_array_equal(thresholded, [-1.5, 0, 0, 0, 0, 2.5])
    assert not np.signbit(thresholded[1:]).any()  # no negative zeros
