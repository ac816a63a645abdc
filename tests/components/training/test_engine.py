import functools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import components.training.engine
from components.train import train
from components.training.checkpoint import Checkpoint, CheckpointError
from components.training.engine import Engine, Recipe, part_order, row_order
from components.training.network import build_model
from components.training.params import NETWORKS, Params
from components.training.penalty import Penalty
from ridgeline.artifacts.examples import Examples


def parse(values: dict[str, Any]) -> Params:
    params = train.parse(values)
    assert isinstance(params, Params)
    return params


HIDDEN = parse({"mlp": {"hidden_units": [4]}})
CNN = parse({"network": "cnn", "cnn": {"filters": [3, 2], "dropout": 0.5}})
VALUES: dict[str, Any] = {"penalty": Penalty.at("l1_l2", 0.03, 0.01), "learning_rate": 0.05, "seed": 7}


def engine(examples, params=HIDDEN, **recipe):
    return Engine(functools.partial(build_model, examples, params), examples, Recipe(**recipe))


def initial_weights(examples, seed, params=HIDDEN):
    import keras

    keras.utils.set_random_seed(seed)
    return [np.float64(weight) for weight in build_model(examples, params).get_weights()]


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def reference(examples, weights, recipe, penalty, learning_rate, seed, epochs, parts=1):
    """Train one hidden layer in float64; return the weights after every step and each epoch's mean loss."""
    split, (l1, l2) = examples.split("train"), penalty.strengths.values()
    images = ((split.images.astype(np.float64) - 60.0) / 50.0).reshape(len(split), -1)
    targets = np.eye(3)[split.labels] * (1 - recipe.label_smoothing) + recipe.label_smoothing / 3
    rows = -(-len(split) // parts)
    parts_batches = [
        [start + order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        for epoch in range(1, epochs + 1)
        for start in part_order(seed, epoch, range(0, len(split), rows))
        for order in [row_order(seed, epoch, start, min(rows, len(split) - start))]
    ]
    batches = [batch for part in parts_batches for batch in part]
    velocity, steps, losses = [np.zeros_like(w) for w in weights], [], []
    for step, batch in enumerate(batches):
        rate = learning_rate
        if recipe.schedule == "cosine":
            rate *= (1 + np.cos(np.pi * step / len(batches))) / 2
        (w1, b1, w2, b2), x, y = weights, images[batch], targets[batch]
        hidden = np.maximum(x @ w1 + b1, 0)
        p = softmax(hidden @ w2 + b2)
        penalty = sum(l1 * np.abs(w).sum() + l2 * (w**2).sum() for w in (w1, w2))
        losses.append((len(batch), -np.sum(y * np.log(p)) / len(batch) + penalty))
        d2 = (p - y) / len(batch)
        d1 = (d2 @ w2.T) * (hidden > 0)
        gradients = [x.T @ d1 + 2 * l2 * w1, d1.sum(0), hidden.T @ d2 + 2 * l2 * w2, d2.sum(0)]
        new = []
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            kernel = i % 2 == 0
            if kernel and recipe.solver == "subgradient":
                g = g + l1 * np.sign(w)
            moved = w - rate * g + recipe.momentum * velocity[i]
            if kernel and recipe.solver == "proximal":
                moved = np.sign(moved) * np.maximum(np.abs(moved) - rate * l1, 0)
            velocity[i] = moved - w
            new.append(moved)
        weights = new
        steps.append(weights)
    sizes, values = np.array(losses).T
    per_epoch = np.array_split(np.arange(len(batches)), epochs)
    return steps, [np.average(values[i], weights=sizes[i]) for i in per_epoch]


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"batch_size": 48, "momentum": 0.9},  # 640 = 13 * 48 + 16: the last batch is smaller
        {"solver": "proximal"},
        {"solver": "proximal", "momentum": 0.9, "schedule": "cosine"},
        {"schedule": "cosine", "label_smoothing": 0.1, "momentum": 0.5},
    ],
    ids=str,
)
def test_every_step_is_that_of_the_numpy_formula(bars, recipe):
    fit = engine(bars, **recipe).fit(**VALUES, epochs=2)
    steps, losses = reference(bars, initial_weights(bars, 7), Recipe(**recipe), **VALUES, epochs=2)
    for received, expected in zip(fit.weights, steps[-1], strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(fit.history["loss"], losses, rtol=1e-4)
    if recipe.get("solver") == "proximal":
        for received, expected in zip(fit.weights, steps[-1], strict=True):
            np.testing.assert_array_equal(received == 0, expected == 0)
        assert np.sum(fit.weights[0] == 0) > 0


def test_average_is_exponential_over_the_steps(bars):
    fit = engine(bars, average=0.9).fit(**VALUES, epochs=1)
    steps, _ = reference(bars, initial_weights(bars, 7), Recipe(), **VALUES, epochs=1)
    average = steps[0]
    for weights in steps[1:]:
        average = [0.9 * a + 0.1 * w for a, w in zip(average, weights, strict=True)]
    for received, expected in zip(fit.weights, average, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-5)


def test_adam_is_keras_own(bars):
    import keras

    fit = engine(bars, optimizer="adam").fit(**VALUES, epochs=1)
    model = build_model(bars, HIDDEN, keras.regularizers.L1L2(**VALUES["penalty"].strengths))
    model.set_weights(initial_weights(bars, 7))
    model.compile(keras.optimizers.Adam(VALUES["learning_rate"]), "sparse_categorical_crossentropy")
    order = row_order(7, 1, 0, 640)
    images, labels = bars.split("train").images[order], bars.split("train").labels[order]
    model.fit(images, labels, batch_size=32, shuffle=False, verbose=0)
    for received, expected in zip(fit.weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-4)


def test_weight_decay_is_decoupled_and_applies_to_kernels_alone(bars):
    """AdamW (Loshchilov and Hutter, algorithm 2, as Keras scales it): ``w - rate * decay * w - rate * adam``."""
    rate, decay, values = 0.01, 0.5, VALUES | {"learning_rate": 0.01, "penalty": Penalty.at("none")}
    plain, decayed = ({"optimizer": "adam", "batch_size": 640, "weight_decay": d} for d in (0.0, decay))
    start = initial_weights(bars, 7)
    without = engine(bars, **plain).fit(**values, epochs=1).weights
    weights = engine(bars, **decayed).fit(**values, epochs=1).weights
    for i, (received, other, first) in enumerate(zip(weights, without, start, strict=True)):
        is_kernel = i % 2 == 0
        np.testing.assert_allclose(received, other - is_kernel * rate * decay * first, rtol=1e-5, atol=1e-7)


def network_of(monkeypatch, make_layers):
    """Let the network ``mlp`` be a sequence of given layers; return parameters of a training."""

    def build(image_shape, num_classes, regularizer, options):
        import keras

        output = keras.layers.Dense(num_classes, "softmax", kernel_regularizer=regularizer, name="output")
        return keras.Sequential([keras.Input(image_shape), *make_layers(keras.layers), output])

    monkeypatch.setitem(NETWORKS, "mlp", replace(NETWORKS["mlp"], build=build))
    return parse({})


def keras_fit(examples, params, batch_size):
    """Train one epoch by ``model.fit`` in the engine's order, without a penalty; return the model."""
    import keras

    keras.utils.set_random_seed(7)
    model = build_model(examples, params, keras.regularizers.L1L2())
    model.compile(keras.optimizers.SGD(VALUES["learning_rate"]), "sparse_categorical_crossentropy")
    order = row_order(7, 1, 0, 640)
    images, labels = examples.split("train").images[order], examples.split("train").labels[order]
    model.fit(images, labels, batch_size=batch_size, shuffle=False, verbose=0)
    return model


NO_PENALTY = {**VALUES, "penalty": Penalty.at("none")}


@pytest.mark.parametrize("convolution", [False, True], ids=["XLA", "plain"])
def test_batch_statistics_are_keras_own_also_of_a_smaller_last_batch(bars, monkeypatch, convolution):
    def layers(keras_layers):
        first = [keras_layers.Reshape((6, 5, 1)), keras_layers.Conv2D(2, 3, name="first")] if convolution else []
        return [*first, keras_layers.Flatten(), keras_layers.BatchNormalization(momentum=0.9)]

    params = network_of(monkeypatch, layers)
    trainer = engine(bars, params, batch_size=48)  # 640 = 13 * 48 + 16
    fit = trainer.fit(**NO_PENALTY, epochs=1)
    assert trainer._by_xla is not convolution
    model = keras_fit(bars, params, 48)
    assert [w.path.split("/")[-1] for w in model.weights].count("moving_mean") == 1
    for received, expected in zip(fit.weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
def test_penalties_of_a_layers_output_count_as_in_keras(bars, monkeypatch, wrapped):
    def layers(keras_layers):
        hidden = keras_layers.Dense(4, activity_regularizer="l2", bias_regularizer="l1", bias_initializer="ones")
        if wrapped:
            return [keras_layers.TimeDistributed(hidden), keras_layers.Flatten()]
        return [keras_layers.Flatten(), hidden]

    params = network_of(monkeypatch, layers)
    fit = engine(bars, params, batch_size=48).fit(**NO_PENALTY, epochs=1)
    model = keras_fit(bars, params, 48)
    for received, expected in zip(fit.weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-4)
    split = bars.split("validation")
    expected_loss = model.evaluate(split.images, split.labels, batch_size=64, verbose=0)
    assert fit.metrics["val_loss"] == pytest.approx(expected_loss, rel=1e-3)
    p = model.predict(split.images, verbose=0)[np.arange(len(split)), split.labels]
    assert fit.metrics["val_cross_entropy"] == pytest.approx(-np.log(p).mean(), rel=1e-3)
    assert expected_loss > fit.metrics["val_cross_entropy"] + 0.01  # the penalties of the network itself


def test_a_network_that_xla_cannot_compile_is_trained_without_it(bars, monkeypatch, caplog):
    def layers(keras_layers):
        pooling = keras_layers.MaxPooling2D(2)  # its gradient has no deterministic implementation in XLA
        return [keras_layers.Reshape((6, 5, 1)), keras_layers.Dense(2), pooling, keras_layers.Flatten()]

    params = network_of(monkeypatch, layers)
    trainer = engine(bars, params)
    with caplog.at_level(logging.INFO):
        fit = trainer.fit(**NO_PENALTY, epochs=1)
    assert "XLA can't compile the network (" in caplog.text
    assert "trained by the plain compiled loop" in caplog.text
    for received, expected in zip(fit.weights, keras_fit(bars, params, 32).get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-4)


def test_dropout_draws_in_every_step_and_epoch_as_the_seed_says(bars):
    trainer = engine(bars, CNN)
    first, again = (trainer.fit(**VALUES, epochs=2) for _ in range(2))
    assert again.history == first.history
    assert all((a == b).all() for a, b in zip(again.weights, first.weights, strict=True))
    states = [v.numpy() for v in trainer._model.variables if v.path.endswith("seed_generator_state")]
    assert states[0][1] == 2 * trainer.steps_per_epoch
    without = engine(bars, parse({"network": "cnn", "cnn": {"filters": [3, 2], "dropout": 0}}))
    assert without.fit(**VALUES, epochs=2).history != first.history


def test_the_penalized_weights_have_the_names_of_their_layers(bars, monkeypatch):
    def layers(keras_layers):
        return [keras_layers.Flatten(), keras_layers.Dense(4)]  # the regularizer is not given to this one

    names = ["convolution_1", "convolution_2", "output"]
    trainer = engine(bars, CNN)
    assert trainer.penalized_names == names
    fit = trainer.fit(**VALUES, epochs=1)
    assert [w.shape for w in trainer.penalized(fit.weights).values()] == [(3, 3, 1, 3), (3, 3, 3, 2), (8, 3)]
    assert engine(bars, network_of(monkeypatch, layers)).penalized_names == ["output"]


def test_part_and_row_orders_are_golden():
    assert part_order(42, 1, range(0, 50, 10)) == [40, 0, 10, 20, 30]
    assert row_order(42, 1, 0, 10).tolist() == [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]
    assert row_order(42, 2, 0, 10).tolist() == [0, 8, 5, 9, 7, 4, 2, 6, 3, 1]
    assert row_order(42, 1, 10, 10).tolist() == [8, 4, 3, 5, 7, 2, 9, 0, 6, 1]


def test_streamed_parts_are_trained_on_in_their_order(bars, monkeypatch):
    monkeypatch.setattr(components.training.engine, "RESIDENT_BYTES", 640 * 30 // 3)  # 214, 214 and 212 images
    streamed = engine(bars, batch_size=50)
    fit = streamed.fit(**VALUES, epochs=2)
    steps, losses = reference(bars, initial_weights(bars, 7), Recipe(batch_size=50), **VALUES, epochs=2, parts=3)
    assert streamed.steps_per_epoch == len(steps) / 2 == 15
    for received, expected in zip(fit.weights, steps[-1], strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(fit.history["loss"], losses, rtol=1e-4)


def test_blocks_and_progress_change_nothing(bars, monkeypatch, caplog):
    whole = engine(bars).fit(**VALUES, epochs=1)
    monkeypatch.setattr(components.training.engine, "BLOCK_IMAGES", 100)
    monkeypatch.setattr(components.training.engine, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        blocks = engine(bars).fit(**VALUES, epochs=1)
    assert blocks.history == whole.history
    assert all((a == b).all() for a, b in zip(blocks.weights, whole.weights, strict=True))
    assert "epoch 1/1: 96 of 640 images, loss " in caplog.text
    assert "epoch 1/1: loss " in caplog.text


def test_validation_metrics_are_the_formula(bars):
    fit = engine(bars).fit(**VALUES, epochs=1)
    w1, b1, w2, b2 = (np.float64(weight) for weight in fit.weights)
    split = bars.split("validation")
    images = ((split.images.astype(np.float64) - 60.0) / 50.0).reshape(len(split), -1)
    p = softmax(np.maximum(images @ w1 + b1, 0) @ w2 + b2)
    l1, l2 = VALUES["penalty"].strengths.values()
    penalty = sum(l1 * np.abs(w).sum() + l2 * (w**2).sum() for w in (w1, w2))
    entropy = -np.log(p[np.arange(len(split)), split.labels]).mean()
    assert fit.metrics["val_loss"] == pytest.approx(entropy + penalty, rel=1e-5)
    assert fit.metrics["val_cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert fit.metrics["val_accuracy"] == np.mean(p.argmax(1) == split.labels)


def test_other_strengths_rates_and_seeds_reuse_the_compiled_code_and_leave_no_state(bars):
    shared = engine(bars, momentum=0.9)
    first = shared.fit(**VALUES, epochs=2)
    shared.fit(penalty=Penalty.at("l2", 0.5), learning_rate=0.001, seed=8, epochs=1)
    again = shared.fit(**VALUES, epochs=2)
    assert again.history == first.history
    assert all((a == b).all() for a, b in zip(again.weights, first.weights, strict=True))
    assert shared._advance.experimental_get_tracing_count() == 1


def test_patience_keeps_the_best_epoch(bars):
    trainer = engine(bars)
    whole = trainer.fit(**VALUES, epochs=30)
    accuracies = whole.history["val_accuracy"]
    best = int(np.argmax(accuracies)) + 1
    stopped = trainer.fit(**VALUES, epochs=30, patience=3)
    assert best + 3 < 30
    waited = len(stopped.history["loss"]) - stopped.epoch
    assert waited == 3
    assert stopped.metrics["val_accuracy"] == max(stopped.history["val_accuracy"])
    shorter = trainer.fit(**VALUES, epochs=stopped.epoch)
    assert all((a == b).all() for a, b in zip(stopped.weights, shorter.weights, strict=True))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_augmentation_shifts_and_flips_whole_images(bars, shape, flip):
    import tensorflow as tf

    images = np.random.default_rng(1).integers(1, 256, (200, *shape), np.uint8)
    augmented = engine(bars, shift=2, flip=flip)._augment(tf.constant(images), len(images)).numpy()
    seen = set()
    for image, moved in zip(images, augmented, strict=True):
        padded = np.pad(image, [(2, 2), (2, 2), *[(0, 0)] * (image.ndim - 2)])
        candidates = {
            (dy, dx, mirrored): (view[:, ::-1] if mirrored else view)
            for dy in range(5)
            for dx in range(5)
            for view in [padded[dy : dy + 6, dx : dx + 5]]
            for mirrored in ([False, True] if flip else [False])
        }
        matches = [key for key, view in candidates.items() if np.array_equal(view, moved)]
        assert len(matches) == 1
        seen |= set(matches)
    assert {key[0] for key in seen} == {key[1] for key in seen} == set(range(5))
    assert {key[2] for key in seen} == ({False, True} if flip else {False})


def test_shift_share_limits_the_share_of_shifted_images(bars):
    import tensorflow as tf

    images = np.random.default_rng(1).integers(1, 256, (2_000, 6, 5), np.uint8)
    augmented = engine(bars, shift=2, shift_share=0.25)._augment(tf.constant(images), len(images)).numpy()
    moved = np.mean([not np.array_equal(a, b) for a, b in zip(images, augmented, strict=True)])
    assert moved == pytest.approx(0.25 * 24 / 25, abs=0.04)  # one of the 25 shifts is none


@pytest.mark.parametrize(("l2", "epochs", "tolerance"), [(0.0, 1_200, 5e-3), (0.01, 400, 1e-3)])  # L1 alone is flat
def test_proximal_solver_reaches_scikit_learns_optimum(bars, l2, epochs, tolerance):
    """Softmax regression is convex; scikit-learn's penalty is ``a * (r * sum(abs(w)) + (1 - r) / 2 * sum(w**2))``."""
    from sklearn.linear_model import LogisticRegression

    split, l1 = bars.split("train"), 0.02
    images = ((split.images.astype(np.float64) - 60.0) / 50.0).reshape(len(split), -1)
    a = l1 + 2 * l2
    peer = LogisticRegression(solver="saga", l1_ratio=l1 / a, C=1 / (a * len(split)), tol=1e-7, max_iter=20_000)
    peer.fit(images, split.labels)

    def objective(kernel, bias):
        p = softmax(images @ kernel + bias)
        entropy = -np.log(p[np.arange(len(split)), split.labels]).mean()
        return entropy + l1 * np.abs(kernel).sum() + l2 * (kernel**2).sum()

    recipe = {"solver": "proximal", "momentum": 0.9, "batch_size": len(split)}
    fit = engine(bars, parse({"mlp": {"hidden_units": []}}), **recipe).fit(
        penalty=Penalty.at("l1_l2", l1, l2), learning_rate=0.1, seed=1, epochs=epochs
    )
    kernel, bias = (np.float64(weight) for weight in fit.weights)
    assert objective(kernel, bias) == pytest.approx(objective(peer.coef_.T, peer.intercept_), rel=1e-4)
    np.testing.assert_allclose(kernel, peer.coef_.T, atol=tolerance)
    np.testing.assert_array_equal(kernel == 0, np.abs(peer.coef_.T) < 1e-9)
    assert 0.2 < np.mean(kernel == 0) < 1


class Killed(BaseException):
    pass


class KillingCheckpoint(Checkpoint):
    """A checkpoint that kills the training after saving an epoch."""

    def save(self, arrays, facts):
        super().save(arrays, facts)
        if len(facts["history"]["loss"]) == self.identity["killed_after"]:
            raise Killed


@pytest.mark.parametrize(
    ("params", "recipe"),
    [
        (HIDDEN, {"optimizer": "adam", "average": 0.9, "schedule": "cosine", "shift": 1, "flip": True}),
        (HIDDEN, {"solver": "proximal", "momentum": 0.9}),
        (CNN, {"solver": "proximal", "momentum": 0.9, "shift": 1}),
    ],
    ids=lambda value: value.network if isinstance(value, Params) else str(value),
)
def test_resumed_after_any_epoch_gives_the_same_bytes(bars, tmp_path, caplog, params, recipe):
    trainer = engine(bars, params, **recipe)
    whole = trainer.fit(**VALUES, epochs=4, patience=2)
    for epoch in range(1, len(whole.history["loss"]) + 1):
        checkpoint = KillingCheckpoint(tmp_path / str(epoch), {"killed_after": epoch})
        with pytest.raises(Killed):
            trainer.fit(**VALUES, epochs=4, patience=2, checkpoint=checkpoint)
        trainer.fit(**{**VALUES, "seed": 99}, epochs=1)
        with caplog.at_level(logging.INFO):
            resumed = trainer.fit(**VALUES, epochs=4, patience=2, checkpoint=checkpoint)
        assert f"resuming from epoch {epoch + 1} of 4" in caplog.text
        assert resumed.history == whole.history
        assert all((a == b).all() for a, b in zip(resumed.weights, whole.weights, strict=True))
    assert list(tmp_path.glob(".*")) == []


def test_damaged_checkpoint_is_refused_and_training_restarts(bars, tmp_path, caplog):
    trainer, checkpoint = engine(bars), Checkpoint(tmp_path / "checkpoint", {"params": 1})
    whole = trainer.fit(**VALUES, epochs=2, checkpoint=checkpoint)
    content = bytearray(checkpoint.path.read_bytes())
    for damaged in (content[:-1], content[:500] + b"x" + content[501:], b""):
        checkpoint.path.write_bytes(damaged)
        caplog.clear()
        again = trainer.fit(**VALUES, epochs=2, checkpoint=checkpoint)
        assert "checkpoint refused: expected" in caplog.text
        assert "training starts from the beginning" in caplog.text
        assert again.history == whole.history


def test_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "checkpoint"
    Checkpoint(path, {"params": {"epochs": 2, "seed": 1}, "examples": "ab"}).save({"a": np.ones(2)}, {})
    with pytest.raises(
        CheckpointError, match=r"checkpoint of \{'params': \{'seed': 2\}\}; received one of .*'seed': 1"
    ):
        Checkpoint(path, {"params": {"epochs": 2, "seed": 2}, "examples": "ab"}).load()
    checkpoint = Checkpoint(path, {"params": {"epochs": 2, "seed": 1}, "examples": "ab"}).load()
    assert checkpoint is not None
    arrays, facts = checkpoint
    assert (arrays["a"].tolist(), facts) == ([1.0, 1.0], {})


def test_rows_are_read_across_shards(tmp_path, bars):
    from tests.components.conftest import make_bars

    sharded = make_bars(tmp_path, {"train": 640}, max_shard_bytes=100 * 30).split("train")
    whole = Examples.load(bars.path).split("train")
    assert len(sharded.shards) == 7
    for start, stop in [(0, 640), (0, 1), (95, 305), (630, 1000), (640, 700)]:
        images, labels = sharded.rows(start, stop)
        np.testing.assert_array_equal(images, whole.images[start:stop])
        np.testing.assert_array_equal(labels, whole.labels[start:stop])


@pytest.mark.parametrize("recipe", [{"shift": 2}, {"shift": 2, "shift_share": 0.5}, {"flip": True}], ids=str)
def test_every_step_and_every_seed_augments_in_another_way(bars, recipe):
    import tensorflow as tf

    trainer = engine(bars, **recipe)
    images = tf.constant(np.random.default_rng(1).integers(1, 256, (200, 6, 5), np.uint8))

    def augmented(seed, step):
        trainer._seed.assign(seed)
        trainer._optimizer.iterations.assign(step)
        return trainer._augment(images, len(images)).numpy()

    first = augmented(7, 0)
    np.testing.assert_array_equal(augmented(7, 0), first)
    for other in (augmented(7, 1), augmented(7, 2), augmented(8, 0)):
        # another move for each image that has one; a few draws are equal by chance
        same = np.mean([np.array_equal(a, b) for a, b in zip(first, other, strict=True)])
        assert same < 0.65
    if recipe.get("shift_share"):  # other images are shifted, not the same ones elsewhere
        unmoved = [
            {i for i, (a, b) in enumerate(zip(images.numpy(), moved, strict=True)) if np.array_equal(a, b)}
            for moved in (first, augmented(7, 1), augmented(8, 0))
        ]
        assert 60 < len(unmoved[0]) < 140
        assert all(len(unmoved[0] & other) < 0.8 * len(unmoved[0]) for other in unmoved[1:])
