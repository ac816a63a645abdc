import numpy as np

from components.networks.mlp import Options, mlp


def test_layers_follow_the_options():
    import keras

    regularizer = keras.regularizers.L1L2(0.1)
    network = mlp((6, 5, 3), 4, regularizer, Options(hidden_units=(7, 2)))
    assert [layer.name for layer in network.layers] == ["flatten", "hidden_1", "hidden_2", "output"]
    assert [tuple(w.shape) for w in network.weights] == [(90, 7), (7,), (7, 2), (2,), (2, 4), (4,)]
    assert [w.regularizer is regularizer for w in network.weights] == [True, False] * 3
    np.testing.assert_allclose(np.sum(network(np.ones((3, 6, 5, 3), np.float32)), axis=1), 1, rtol=1e-5)


def test_without_hidden_units_it_is_softmax_regression():
    assert [w.path.split("/")[-2:] for w in mlp((6, 5), 3, None, Options(hidden_units=())).weights] == [
        ["output", "kernel"],
        ["output", "bias"],
    ]
