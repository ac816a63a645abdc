from __future__ import annotations

import numpy as np
import pytest

from components.training.penalties.l1_l2 import ELASTIC_NET, proximal_step, value

WEIGHTS = np.array([-2.0, -0.5, -0.0, 0.25, 0.5, 3.0], np.float32)


@pytest.mark.parametrize("smooth_only", [False, True])
def test_the_value_follows_its_formula_and_smooth_only_leaves_l1_out_of_the_gradient(smooth_only: bool) -> None:
    import tensorflow as tf

    weights = tf.Variable(WEIGHTS)
    with tf.GradientTape() as tape:
        penalty = value(weights, {"l1": 0.5, "l2": 0.25}, smooth_only)
    assert float(penalty) == pytest.approx(0.5 * np.abs(WEIGHTS).sum() + 0.25 * (WEIGHTS**2).sum())
    expected = 0.5 * WEIGHTS + (0 if smooth_only else 0.5 * np.sign(WEIGHTS))
    np.testing.assert_allclose(tape.gradient(penalty, weights), expected)


def test_the_proximal_step_is_soft_thresholding() -> None:
    thresholded = proximal_step(WEIGHTS, 2.0, {"l1": 0.25, "l2": 9.0}).numpy()
    np.testing.assert_array_equal(thresholded, [-1.5, 0, 0, 0, 0, 2.5])
    assert not np.signbit(thresholded[1:]).any()  # no negative zeros


def test_a_saved_model_gets_keras_own_regularizer() -> None:
    regularizer = ELASTIC_NET.keras_regularizer({"l1": 0.5, "l2": 0.25})
    assert regularizer.get_config() == {"l1": 0.5, "l2": 0.25}
    assert ELASTIC_NET.keras_regularizer({"l1": 0.0, "l2": 0.0}) is None
