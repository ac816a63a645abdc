"""Trains Keras models, many steps inside one compiled function.

Seconds for an epoch of the seed model (55,000 images, batches of 32, with validation) on two idle cores of an AMD EPYC,
the best of 5 runs, taken in turns by ``make bench``:

    notebook: model.fit, float64, batch 32           1.78
    model.fit, uint8, steps_per_execution=400        0.61
    a loop in tf.function                            0.33
    the same loop compiled by XLA                    0.23    chosen
    hand-written NumPy loop, one BLAS thread         0.34
    one matrix product of the same FLOPs             0.17

The loop runs on one thread, see `ridgeline.component.STEP_ENVIRONMENT`. On an older machine, an epoch took 0.41 s with
one thread and with two, but 0.70 s of CPU time instead of 0.40 s; with batches of 128, 0.39 s and 0.27 s. Op
determinism has no measurable cost: 0.48 s of CPU time per epoch with it, 0.53 s without; in the profile `tuned` 0.49 s
and 0.47 s. So it can't be switched off. Compilation takes half a second, once for all strengths, rates and seeds.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from components.training.checkpoint import Checkpoint
from components.training.penalties.kind import Formula
from components.training.penalties.l1_l2 import ELASTIC_NET
from components.training.penalty import Penalty, regularizer
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import all_layers, named_weights

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

RESIDENT_BYTES = 64 * 2**20  # images held at once; a larger training split is streamed in equal parts
BLOCK_IMAGES = 2**14  # images per call into the compiled code; progress is logged between calls
SCORE_IMAGES = 1_000
PROGRESS_SECONDS = 5.0
_SEEDED = threading.Lock()  # Keras has one random state per process, and engines may train in several threads


@dataclass(frozen=True)
class Recipe:
    """The settings that are fixed in the compiled code; other arguments of `Engine.fit` need no new compilation.

    Attributes:
        batch_size: Images per update; an epoch's last batch may be smaller.
        optimizer: ``sgd`` or ``adam``, as Keras defines them.
        momentum: Heavy-ball momentum of sgd, in [0, 1).
        schedule: ``constant``, or ``cosine``: ``rate * (1 + cos(pi * step / steps)) / 2`` (Loshchilov and Hutter,
            "SGDR", ICLR 2017).
        solver: ``subgradient`` or ``proximal``, see `Engine`.
        label_smoothing: Share of each label that is spread over all classes, in [0, 1).
        shift: Largest shift of a training image in each direction, in pixels; the gap becomes black.
        shift_share: The share of the images that is shifted, in [0, 1].
        flip: Half of the training images are mirrored left to right.
        average: Decay of the exponential moving average of the weights, which replaces the final weights, in
            [0, 1); 0 for none.
        weight_decay: Before each update of adam, the penalized weights are multiplied by ``1 - rate * weight_decay``
            (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019); 0 for none.
    """

    batch_size: int = 32
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    solver: Literal["subgradient", "proximal"] = "subgradient"
    label_smoothing: float = 0.0
    shift: int = 0
    shift_share: float = 1.0
    flip: bool = False
    average: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        weights: The kept weights, in the order of the model's ``weights``, float32.
        history: Metrics of each epoch by Keras's names: ``loss``, ``accuracy``, ``val_loss``, ``val_accuracy``; and
            ``val_cross_entropy``. Losses include all penalties, also the network's own; training metrics are means
            over the epoch.
        epoch: The epoch whose weights are kept, from 1.
    """

    weights: list[np.ndarray]
    history: dict[str, list[float]]
    epoch: int

    @property
    def metrics(self) -> dict[str, float]:
        """The kept epoch's metrics."""
        return {name: values[self.epoch - 1] for name, values in self.history.items()}


class Engine:
    """Data and compiled code for any number of trainings that differ in strengths, learning rate and seed.

    An epoch visits every training image once, in an order that depends on the seed and the epoch alone.

    The loss is ``cross-entropy + sum over kernels of penalty(w)``. The solver ``subgradient`` differentiates all of
    it. The solver ``proximal`` leaves the part of the penalty that is not smooth out of the gradient, and after each
    update with step size ``eta`` applies its proximal operator to the kernels, for L1 ``w = sign(w) * max(abs(w) -
    eta * l1, 0)``: forward-backward splitting (Parikh and Boyd, "Proximal Algorithms", 2014, section 4.2). With
    momentum it is iPiano (Ochs, Chen, Brox and Pock, SIAM J. Imaging Sciences 7(2), 2014, algorithm 4):
    ``w' = prox(w - eta * gradient + momentum * (w - w_before))``. There the momentum continues the step that the
    weights actually made, thresholding included, so the optimizer's velocity is set to ``w' - w``.

    Args:
        build: Returns a new model with Keras's initializers, which maps raw images ``[n, *image_shape]``, uint8,
            to probabilities ``[n, classes]``. Its argument is the regularizer of the penalized weights.
        examples: The splits; the test split is not read.
        recipe: The settings that are fixed in the compiled code.
        formula: The penalty, but for its strengths.
    """

    by_xla = True  # where XLA can compile the network, and is fast
    worker, num_workers = 0, 1  # which share of each batch this engine computes

    def __init__(
        self,
        build: Callable[[keras.Regularizer], keras.Model],
        examples: Examples,
        recipe: Recipe,
        formula: Formula = ELASTIC_NET,
    ) -> None:
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
        self._build, self._examples, self._recipe, self._formula = build, examples, recipe, formula
        self._penalty = regularizer(formula, smooth_only=recipe.solver == "proximal")
        self._rate = _rate(recipe.schedule)
        self._seed = tf.Variable(0, dtype=tf.int32, trainable=False)
        with _SEEDED:
            self._model = build(self._penalty)
        variables = self._model.trainable_variables
        self._optimizer = _optimizer(recipe, self._rate)
        self._optimizer.exclude_from_weight_decay([v for v in variables if v.regularizer is not self._penalty])
        self._optimizer.build(self._model.trainable_variables)
        self._fresh = [variable.numpy() for variable in self._optimizer.variables]
        # By seed, of the last one: weights, and the states from which layers such as dropout draw.
        self._drawn: dict[int, list[np.ndarray]] = {}
        layers = all_layers(self._model).values()
        # Layers that look at a whole batch get no padding: their state and their losses are of the batch alone.
        self._pads = not any(layer.non_trainable_weights or layer.activity_regularizer for layer in layers)
        self._fits_xla = not any("Conv" in type(layer).__name__ for layer in layers)
        self._by_xla = self.by_xla and self._fits_xla
        self._advance = self._compiled()
        self._score = tf.function(self._sums, reduce_retracing=True, autograph=False)

        self._num_train = len(examples.split("train"))
        row_bytes = math.prod(examples.facts.image_shape)
        num_parts = -(-self._num_train * row_bytes // RESIDENT_BYTES)
        self._part_rows = -(-self._num_train // num_parts)
        self._starts = range(0, self._num_train, self._part_rows)
        self._part: tuple[int, Any, Any] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of updates per epoch."""
        return sum(-(-self._size(start) // self._recipe.batch_size) for start in self._starts)

    def fit(
        self,
        *,
        penalty: Penalty,
        learning_rate: float,
        seed: int,
        epochs: int,
        patience: int | None = None,
        checkpoint: Checkpoint | None = None,
        initial: list[np.ndarray] | None = None,
    ) -> Fit:
        """Train from the seed's initial weights or given ones, or from a checkpoint.

        Equal arguments give equal weights, even if the training was killed and resumed.

        Args:
            penalty: What is added to the loss.
            learning_rate: Step size of an update; the initial one under a schedule.
            seed: Decides initial weights, order of images and augmentation.
            epochs: Passes over the training split, at least 1.
            patience: Number of epochs without better validation accuracy after which training stops and keeps the
                weights of the best epoch; None to train all epochs.
            checkpoint: Where the state is saved after each epoch and loaded from; None for no checkpoint.
            initial: The weights to start from, in the order of the model's ``weights``; those of the seed if None.

        Returns:
            The kept weights and the metrics of every epoch.

        Raises:
            FloatingPointError: If a loss becomes NaN or infinite.
            CheckpointError: If the checkpoint belongs to another training.
        """
        import keras

        if seed not in self._drawn:
            with _SEEDED:
                keras.utils.set_random_seed(seed)
                self._drawn = {seed: [variable.numpy() for variable in self._build(self._penalty).variables]}
        _assign(self._model.variables, self._drawn[seed])
        if initial is not None:
            _assign(self._model.weights, initial)
        _assign(self._optimizer.variables, self._fresh)
        for name, factor in penalty.factors.items():
            self._penalty.strengths[name].assign(factor)
        self._rate.base.assign(learning_rate)
        self._rate.steps.assign(float(epochs * self.steps_per_epoch))
        self._seed.assign(seed)
        strengths = " ".join(f"{name}={strength!r}" for name, strength in penalty.strengths.items())
        values = f"{strengths} learning_rate={learning_rate!r} seed={seed!r} {self._recipe!r}"

        names = ("loss", "accuracy", "val_loss", "val_accuracy", "val_cross_entropy")
        history: dict[str, list[float]] = {name: [] for name in names}
        kept: list[np.ndarray] = []
        if saved := checkpoint.load() if checkpoint else None:
            arrays, history = saved[0], saved[1]["history"]
            kept = _unpack(arrays, "kept")
            _assign(self._model.variables, _unpack(arrays, "model"))
            _assign(self._optimizer.variables, _unpack(arrays, "optimizer"))
            log.info("resuming from epoch %d of %d", len(history["loss"]) + 1, epochs)

        while (epoch := len(history["loss"]) + 1) <= epochs:
            best = 1 + int(np.argmax(history["val_accuracy"])) if epoch > 1 else 0
            if patience is not None and epoch - 1 - best >= patience:
                log.info("no better validation accuracy for %d epochs: stopped, epoch %d is kept", patience, best)
                break
            start = time.monotonic()
            metrics = self._epoch(seed, epoch, epochs, values)
            model_weights = [variable.numpy() for variable in self._model.variables]
            self._optimizer.finalize_variable_values(self._model.trainable_variables)
            metrics |= self._validate()
            if not math.isfinite(metrics["val_loss"]):
                raise FloatingPointError(_not_finite("validation loss", metrics["val_loss"], epoch, values))
            if patience is None or all(metrics["val_accuracy"] > value for value in history["val_accuracy"]):
                kept = [variable.numpy() for variable in self._model.weights]
            _assign(self._model.variables, model_weights)
            for name, value in metrics.items():
                history[name].append(value)
            text = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log.info("epoch %d/%d: %s (%.1f s)", epoch, epochs, text, time.monotonic() - start)
            if checkpoint:
                optimizer = [variable.numpy() for variable in self._optimizer.variables]
                arrays = _pack("model", model_weights) | _pack("optimizer", optimizer) | _pack("kept", kept)
                checkpoint.save(arrays, {"history": history})
        accuracies = history["val_accuracy"]
        return Fit(kept, history, len(accuracies) if patience is None else 1 + int(np.argmax(accuracies)))

    def model_with(self, weights: Sequence[np.ndarray]) -> keras.Model:
        """Return the engine's model with given weights, until the next training.

        Args:
            weights: Weights in the order of `Fit.weights`.
        """
        _assign(self._model.weights, list(weights))
        return self._model

    def penalized(self, weights: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the penalized ones of a fit's weights by name, from input to output.

        Args:
            weights: Weights in the order of `Fit.weights`.
        """
        values = {id(variable): value for variable, value in zip(self._model.weights, weights, strict=True)}
        found = named_weights(self._model).items()
        return {
            name: values[id(variable)]
            for name, variable in found
            if variable.regularizer is self._penalty and variable.trainable
        }

    @property
    def penalized_names(self) -> list[str]:
        """The names of the penalized weights, from input to output."""
        return list(self.penalized(self._model.weights))

    # --- an epoch

    def _epoch(self, seed: int, epoch: int, epochs: int, values: str) -> dict[str, float]:
        """Visit every training image once; return the means of loss and accuracy."""
        import tensorflow as tf

        batch_size = self._recipe.batch_size
        loss, hits, logged, seen = tf.constant(0.0, tf.float64), tf.constant(0), time.monotonic(), 0
        for start in part_order(seed, epoch, self._starts):
            images, labels = self._read(start)
            size = self._size(start)
            order = np.zeros(-(-self._part_rows // batch_size) * batch_size, np.int32)
            order[:size] = row_order(seed, epoch, start, size)
            order = tf.constant(order)
            for first, last, rows in self._calls(size):
                step, last_loss, loss, hits = self._call(
                    images, labels, order, tf.constant(size), tf.constant(first), tf.constant(last), loss, hits, rows
                )
                if not math.isfinite(last_loss):
                    place = f"step {int(step) + seen // batch_size} of {self.steps_per_epoch} in epoch"
                    raise FloatingPointError(_not_finite("loss", float(last_loss), epoch, values, place))
                if time.monotonic() - logged >= PROGRESS_SECONDS:
                    logged, done = time.monotonic(), seen + min(last * batch_size, size)
                    log.info(
                        "epoch %d/%d: %d of %d images, loss %.4f accuracy %.4f",
                        *(epoch, epochs, done, self._num_train, float(loss) / done, int(hits) / done),
                    )
            seen += size
            del images, labels  # else the next part would be held beside them
        return {"loss": float(loss) / seen, "accuracy": int(hits) / seen}

    def _calls(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield the updates of a part by call into the compiled code: the first, the one after the last, their rows."""
        batch_size = self._recipe.batch_size
        block, num_steps = max(1, BLOCK_IMAGES // batch_size), -(-size // batch_size)
        whole = num_steps if self._pads else size // batch_size
        for first in range(0, whole, block):
            yield first, min(first + block, whole), batch_size
        if whole < num_steps:
            yield whole, num_steps, size % batch_size

    def _call(self, *arguments: Any) -> tuple[Any, Any, Any, Any]:
        """Call the compiled code. If XLA refuses it, nothing was run, and it is compiled without XLA."""
        import tensorflow as tf

        try:
            return self._advance(*arguments)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            if not self._by_xla:
                raise
            reason = error.message.splitlines()[0]
            log.info("XLA can't compile the network (%s): it is trained by the plain compiled loop", reason)
            self._by_xla = False
            self._advance = self._compiled()
            return self._advance(*arguments)

    def _compiled(self) -> Any:
        import tensorflow as tf

        # A partial: TensorFlow counts the compilations of a method over all engines, and warns of the fifth.
        return tf.function(functools.partial(self._steps), jit_compile=self._by_xla, autograph=False)

    def _size(self, start: int) -> int:
        return min(self._part_rows, self._num_train - start)

    def _read(self, start: int) -> tuple[Any, Any]:
        """Return a part of the training split, padded: uint8 ``[rows, *image_shape]`` and int32 ``[rows]``."""
        import tensorflow as tf

        if self._part is None or self._part[0] != start:
            self._part = None  # so that two parts are never held at once
            split, size = self._examples.split("train"), self._size(start)
            images = _aligned((self._part_rows, *self._examples.facts.image_shape))
            labels = np.zeros(self._part_rows, np.int32)
            for first in range(0, size, BLOCK_IMAGES):
                last = min(first + BLOCK_IMAGES, size)
                images[first:last], labels[first:last] = split.rows(start + first, start + last)
            images[size:] = 0
            # tf.constant would copy the images twice.
            self._part = start, tf.experimental.dlpack.from_dlpack(images.__dlpack__()), tf.constant(labels)
        return self._part[1:]

    def _steps(
        self, images: Any, labels: Any, order: Any, size: Any, first: Any, last: Any, loss: Any, hits: Any, rows: int
    ) -> tuple[Any, Any, Any, Any]:
        """Make the updates `first` to `last` of one part, each on the given number of rows: the compiled code.

        Returns:
            The number of the next step, the loss of the last one, and the sums of losses, float64, and hits so far.
        """
        import tensorflow as tf

        def unfinished(step: Any, last_loss: Any, loss: Any, hits: Any) -> Any:
            return (step < last) & tf.math.is_finite(last_loss)

        def body(step: Any, last_loss: Any, loss: Any, hits: Any) -> tuple[Any, Any, Any, Any]:
            start = step * self._recipe.batch_size
            own = self._share(rows)
            chosen = tf.slice(order, [start + own.start], [len(own)])
            real = tf.cast(start + tf.range(own.start, own.stop) < size, tf.float32)  # 0 where the last batch is padded
            total = tf.cast(tf.minimum(rows, size - start), tf.float32)
            batch = tf.gather(images, chosen), tf.gather(labels, chosen)
            batch_loss, batch_hits = self._update(*batch, real, total, rows)
            return step + 1, batch_loss, loss + tf.cast(batch_loss * total, tf.float64), hits + batch_hits

        return tf.while_loop(unfinished, body, (first, tf.constant(0.0), loss, hits))

    def _share(self, rows: int) -> range:
        """Return which of a batch's rows this engine computes: shares differ by one row at most."""
        return range(rows * self.worker // self.num_workers, rows * (self.worker + 1) // self.num_workers)

    def _update(self, images: Any, labels: Any, real: Any, total: Any, rows: int) -> tuple[Any, Any]:
        """Make one update; return the batch's mean loss, float32, and its number of hits.

        Args:
            images: This engine's share of the batch.
            labels: Theirs.
            real: 1 for each image, 0 where the batch is padded.
            total: The number of images in the whole batch, float32.
            rows: The number of its rows, padding included.
        """
        import tensorflow as tf

        variables, rate = self._model.trainable_variables, self._optimizer.learning_rate
        if self._recipe.shift or self._recipe.flip:
            images = self._augment(images, rows)
        loss, hits, gradients = self._gradients(images, labels, real, total)
        before = [tf.identity(variable.value) for variable in variables]
        self._optimizer.apply(gradients, variables)
        if self._recipe.solver == "proximal" and self._formula.proximal_step:
            for index, (variable, old) in enumerate(zip(variables, before, strict=True)):
                if variable.regularizer is self._penalty:
                    new = self._formula.proximal_step(variable.value, rate, self._penalty.strengths)
                    variable.assign(new)
                    if self._recipe.momentum:
                        self._optimizer.momentums[index].assign(new - old)
        return loss, hits

    def _gradients(self, images: Any, labels: Any, real: Any, total: Any) -> tuple[Any, Any, list[Any]]:
        """Return a batch's mean loss, its number of hits, and the gradients of the trainable variables."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            probabilities = self._model(images, training=True)
            entropy = tf.reduce_sum(self._cross_entropy(labels, probabilities) * real) / total
            loss = entropy + self._penalties(real, total)
        hits = tf.equal(tf.argmax(probabilities, 1, tf.int32), labels) & (real > 0)
        gradients = tape.gradient(loss, [variable.value for variable in self._model.trainable_variables])
        return loss, tf.reduce_sum(tf.cast(hits, tf.int32)), gradients

    def _penalties(self, real: Any, total: Any) -> Any:
        """Return what the model adds to the cross-entropy of the batch that it computed last."""
        import tensorflow as tf

        return tf.add_n([tf.constant(0.0), *self._model.losses])

    def _cross_entropy(self, labels: Any, probabilities: Any) -> Any:
        import keras
        import tensorflow as tf

        share, classes = self._recipe.label_smoothing, probabilities.shape[1]
        target = tf.one_hot(labels, classes) * (1.0 - share) + share / classes
        return keras.ops.categorical_crossentropy(target, probabilities)

    def _augment(self, images: Any, size: int) -> Any:
        """Shift and flip images, uint8 ``[n, h, w]`` or ``[n, h, w, c]``, as the seed and the step determine.

        What is drawn for a row of a batch of the given size does not depend on which rows this engine computes.
        """
        import tensorflow as tf

        share = self._share(size)
        own = slice(share.start, share.stop)
        count, height, width = images.shape[:3]
        draws, chances, flips = self._draws(size)
        moves = tf.where(chances[own] < self._recipe.shift_share, draws[:, own] - self._recipe.shift, 0)
        rows = tf.range(height) + moves[0]
        columns = tf.range(width) + moves[1]
        if self._recipe.flip:
            columns = tf.where(flips[own] < 0.5, width - 1 - columns, columns)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        index = tf.clip_by_value(rows, 0, height - 1)[:, :, None] * width
        index = index + tf.clip_by_value(columns, 0, width - 1)[:, None, :]
        pixels = tf.reshape(images, [count, height * width, *images.shape[3:]])
        moved = tf.gather(pixels, tf.reshape(index, [count, -1]), batch_dims=1)
        moved = tf.reshape(moved, images.shape)
        return moved * tf.cast(tf.reshape(inside, [count, height, width, *[1] * (images.ndim - 3)]), images.dtype)

    def _draws(self, size: int) -> tuple[Any, Any, Any]:
        """Return random numbers for a batch: int32 ``[3, size, 1]`` for shifts, and twice float32 ``[size, 1]``."""
        import tensorflow as tf

        step = tf.cast(self._optimizer.iterations, tf.int32)
        draws = tf.random.stateless_uniform([3, size, 1], [self._seed, step], 0, 2 * self._recipe.shift + 1, tf.int32)
        chances = tf.random.stateless_uniform([size, 1], [-1 - self._seed, step])
        flips = tf.random.stateless_uniform([size, 1], [self._seed, -1 - step])
        return draws, chances, flips

    # --- validation

    def _validate(self) -> dict[str, float]:
        import tensorflow as tf

        split, entropy, loss, hits = self._examples.split("validation"), 0.0, 0.0, 0
        for start in range(self.worker * SCORE_IMAGES, len(split), self.num_workers * SCORE_IMAGES):
            images, labels = split.rows(start, start + SCORE_IMAGES)
            sums = self._score(tf.constant(images), tf.constant(labels, tf.int32))
            entropy, loss, hits = entropy + float(sums[0]), loss + float(sums[1]), hits + int(sums[2])
        entropy, loss, hits = self._summed(entropy, loss, hits)
        penalty = sum(float(variable.regularizer(variable)) for variable in self._regularized)
        metrics = {"val_loss": loss / len(split) + penalty, "val_accuracy": hits / len(split)}
        return metrics | {"val_cross_entropy": entropy / len(split)}

    def _summed(self, entropy: float, loss: float, hits: int) -> tuple[float, float, int]:
        """Return the sums over all validation images from those over this engine's share."""
        return entropy, loss, hits

    def _sums(self, images: Any, labels: Any) -> tuple[Any, Any, Any]:
        """Return the sums of cross-entropies, of losses without the penalty of weights, and of hits."""
        import tensorflow as tf

        probabilities = self._model(images, training=False)
        hits = tf.equal(tf.argmax(probabilities, 1, tf.int32), labels)
        loss = entropy = tf.reduce_sum(self._cross_entropy(labels, probabilities))
        losses = self._model.losses  # those of the layers' outputs, then those of the weights
        if of_outputs := losses[: len(losses) - len(self._regularized)]:
            loss += tf.add_n(of_outputs) * tf.cast(tf.shape(images)[0], loss.dtype)
        return entropy, loss, tf.reduce_sum(tf.cast(hits, tf.int32))

    @property
    def _regularized(self) -> list[Any]:
        return [variable for variable in self._model.trainable_weights if variable.regularizer is not None]


def part_order(seed: int, epoch: int, starts: Sequence[int]) -> list[int]:
    """Return an epoch's order of the parts of the training split.

    Args:
        seed: The training's seed.
        epoch: From 1.
        starts: The first row of each part.
    """
    return np.random.default_rng([seed, epoch]).permutation(starts).tolist()


def row_order(seed: int, epoch: int, start: int, size: int) -> np.ndarray:
    """Return an epoch's order of the rows of one part, int64 ``[size]``: a permutation of 0 to ``size - 1``.

    Args:
        seed: The training's seed.
        epoch: From 1.
        start: The part's first row in the training split.
        size: Its number of rows.

    Example:
        >>> order = row_order(seed=42, epoch=1, start=0, size=5)
        >>> sorted(order.tolist())
        [0, 1, 2, 3, 4]
        >>> np.array_equal(order, row_order(seed=42, epoch=1, start=0, size=5))
        True
    """
    return np.random.default_rng([seed, epoch, start]).permutation(size)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialized uint8 array that TensorFlow can use in place: its address is a multiple of 64."""
    size = math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)


def _rate(kind: str) -> Any:
    """Return a Keras learning-rate schedule whose values can be changed after compilation."""
    import keras
    import tensorflow as tf

    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __init__(self) -> None:
            self.base, self.steps = (tf.Variable(1.0, trainable=False) for _ in range(2))

        def __call__(self, step: Any) -> Any:
            if kind == "constant":
                return tf.identity(self.base)
            return self.base * 0.5 * (1.0 + tf.cos(math.pi * tf.cast(step, tf.float32) / self.steps))

    return Rate()


def _optimizer(recipe: Recipe, rate: Any) -> Any:
    import keras

    average = {"use_ema": recipe.average > 0, "ema_momentum": recipe.average}
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(rate, weight_decay=recipe.weight_decay or None, **average)
    return keras.optimizers.SGD(rate, momentum=recipe.momentum, **average)


def _assign(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _pack(prefix: str, values: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{i:04d}": value for i, value in enumerate(values)}


def _unpack(arrays: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    return [arrays[name] for name in sorted(arrays) if name.startswith(f"{prefix}/")]


def _not_finite(what: str, value: float, epoch: int, values: str, place: str = "epoch") -> str:
    return (
        f"Expected a finite {what}; received {value} in {place} {epoch} with {values}. "
        "Lower train.learning_rate or the penalty's strength."
    )
