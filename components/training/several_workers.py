"""Trains on several workers: each computes the gradient of its share of every batch, and all apply the sum.

`tf.distribute.MultiWorkerMirroredStrategy` connects the workers and adds up. Weights, optimizer and data are those of
`Engine`, on each worker. They stay equal because all apply the same gradient, and the chief's replace the others' at
the start of each epoch. So nothing but the chief's scratch folder outlives a worker.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from components.training.checkpoint import FACTS, Checkpoint
from components.training.engine import Engine, Fit, Recipe
from components.training.network import build_model
from components.training.params import Params
from components.training.penalties.kind import Formula
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import all_layers
from ridgeline.component import StepError, TransientStepError, Workers

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

START_SECONDS = 600  # for all workers to start: a cluster may have to find machines for them first
SILENCE_SECONDS = 30  # after which a worker counts as lost; one that ends is noticed at once
PROBE_SECONDS = 2.0
SEEDS_APART = 1_000_003  # between the workers' seeds of layers that draw, such as dropout
AGAIN = "Start all workers again with the same command: training resumes after the last finished epoch."
TASK = re.compile(r"/job:worker/replica:0/task:([0-9]+)")


def join(workers: Workers) -> None:
    """Connect this process with those of the other workers; it must not have used TensorFlow before.

    If one has not started in time, the chief's process ends with `signal.SIGALRM`.

    Args:
        workers: The workers.

    Raises:
        StepError: If this worker's port can't be used.
        TransientStepError: If a worker has not started in time.
    """
    _strategy(workers.addresses, workers.index)


def make_shared_engine(examples: Examples, params: Params, workers: Workers) -> Engine:
    """Return an engine that trains together with those of the other workers, after `join`.

    Args:
        examples: The splits, the same on each worker.
        params: The training, the same on each worker.
        workers: The workers.

    Raises:
        StepError: If the training can't be divided, or the workers' keys differ.
        TransientStepError: If a worker is lost.
    """
    build = functools.partial(build_model, examples, params)
    return SharedEngine(build, examples, params.recipe, params.penalty.formula, workers)


class SharedEngine(Engine):
    """An engine that computes a share of each batch, and applies the sum of all workers' gradients.

    The result is that of `Engine` but for the order of sums, unless layers draw random numbers, such as dropout: then
    each worker draws its own. Batch normalization takes the statistics of the whole batch.

    Args:
        build: As for `Engine`.
        examples: As for `Engine`.
        recipe: As for `Engine`; a batch is divided among the workers.
        formula: As for `Engine`.
        workers: The workers.
    """

    by_xla = False  # XLA compiles no communication

    def __init__(
        self,
        build: Callable[[keras.Regularizer], keras.Model],
        examples: Examples,
        recipe: Recipe,
        formula: Formula,
        workers: Workers,
    ) -> None:
        self._workers = workers
        self.worker, self.num_workers = workers.index, workers.count
        if recipe.batch_size < workers.count:
            raise StepError(
                f"Expected a batch of at least one image for each of {workers.count} workers; received "
                f"train.batch_size={recipe.batch_size}. Enlarge it, or use fewer workers."
            )
        self._strategy = _strategy(workers.addresses, workers.index)
        self._sum = _adder(self._strategy)
        super().__init__(build, examples, recipe, formula)
        self._expect_divisible()
        with self._all_present():
            self._expect_same_key()

    def fit(self, *, checkpoint: Checkpoint | None = None, **arguments: Any) -> Fit:
        """Train as `Engine.fit` does, together with the other workers; the chief's checkpoint alone counts.

        Args:
            checkpoint: The chief's; not used on other workers.
            **arguments: As for `Engine.fit`, the same on each worker.

        Raises:
            TransientStepError: If a worker is lost.
        """
        own = checkpoint if self._workers.is_chief else None
        shared = _SharedCheckpoint(path=None, own=own, broadcast=self._broadcast)  # type: ignore[arg-type]
        with self._all_present():
            return super().fit(checkpoint=shared, **arguments)

    # --- what is divided

    def _gradients(self, images: Any, labels: Any, real: Any, total: Any) -> tuple[Any, Any, list[Any]]:
        import tensorflow as tf

        of_share, variables = super()._gradients, self._model.trainable_variables

        def of_batch(*share: Any) -> Any:
            loss, hits, gradients = of_share(*share)
            known = [
                tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
                for variable, gradient in zip(variables, gradients, strict=True)
            ]
            flat = [*(tf.reshape(gradient, [-1]) for gradient in known), [loss, tf.cast(hits, tf.float32)]]
            return tf.distribute.get_replica_context().all_reduce("SUM", tf.concat(flat, 0))  # one message, not many

        summed = self._strategy.run(of_batch, (images, labels, real, total))
        sizes = [variable.shape.num_elements() for variable in (v.value for v in variables)]
        *gradients, loss, hits = tf.split(summed, [*sizes, 1, 1])
        shaped = [tf.reshape(g, variable.shape) for g, variable in zip(gradients, variables, strict=True)]
        return loss[0], tf.cast(hits[0], tf.int32), shaped

    def _draws(self, size: int) -> tuple[Any, Any, Any]:
        """Return what `Engine` draws: XLA and TensorFlow have different generators."""
        import tensorflow as tf

        draw = tf.function(functools.partial(super()._draws, size), jit_compile=self._fits_xla, autograph=False)
        drawn: tuple[Any, Any, Any] = draw()
        return drawn

    def _penalties(self, real: Any, total: Any) -> Any:
        """Return the share of the penalties of the layers' outputs, which are means; on the chief, that of weights."""
        import tensorflow as tf

        losses = self._model.losses
        first = len(losses) - len(self._regularized)
        added = [tf.constant(0.0), *(losses[first:] if self._workers.is_chief else ())]
        return tf.add_n(added) + tf.add_n([tf.constant(0.0), *losses[:first]]) * tf.reduce_sum(real) / total

    def _summed(self, entropy: float, loss: float, hits: int) -> tuple[float, float, int]:
        sums = self._sum(np.array([entropy, loss, hits], np.float64))
        return float(sums[0]), float(sums[1]), int(sums[2])

    def _epoch(self, *arguments: Any) -> dict[str, float]:
        self._take_from_chief()
        return super()._epoch(*arguments)

    # --- what passes between workers

    def _broadcast(self, content: bytes) -> bytes:
        """Return the chief's bytes."""
        padded = np.frombuffer(content + bytes(-len(content) % 4), np.int32)
        size = int(self._sum(np.array([len(content) if self._workers.is_chief else 0], np.int32))[0])
        if not self._workers.is_chief:
            padded = np.zeros(-(-size // 4), np.int32)  # bits plus zero are the same bits
        return self._sum(padded).tobytes()[:size] if size else b""

    def _take_from_chief(self) -> None:
        """Set weights and optimizer to the chief's; layers that draw get a seed for each worker."""
        variables = [*self._model.variables, *self._optimizer.variables]
        values = [np.asarray(variable) for variable in variables]
        content = self._broadcast(b"".join(value.tobytes() for value in values))
        if self._workers.is_chief:
            return
        start, weights = 0, {id(weight) for weight in self._model.weights}
        for variable, value in zip(variables, values, strict=True):
            end = start + value.nbytes
            new = np.frombuffer(content[start:end], value.dtype).reshape(value.shape)
            if id(variable) not in weights and new.dtype == np.uint32 and new.shape == (2,):
                new = new + np.array([SEEDS_APART * self._workers.index, 0], np.uint32)
            variable.assign(new)
            start = end

    # --- what is refused

    def _expect_divisible(self) -> None:
        """Let batch normalization see whole batches; refuse other layers whose state depends on a batch."""
        import keras

        for name, layer in all_layers(self._model).items():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
            elif layer.trainable and layer.non_trainable_weights and not getattr(layer, "layers", None):
                raise StepError(
                    f"Expected a network whose layers can be computed on a part of a batch, or are "
                    f"BatchNormalization, for {self.num_workers} workers; received {name}, a {type(layer).__name__}, "
                    "which has weights that are not trained. Train on one machine, or choose another network."
                )
        sizes = {rows for start in self._starts for _, _, rows in self._calls(self._size(start))}
        if min(sizes) < self.num_workers:
            raise StepError(
                f"Expected at least one image for each of {self.num_workers} workers in every batch; received "
                f"{min(sizes)} in the last one of an epoch. Choose another train.batch_size."
            )

    def _expect_same_key(self) -> None:
        own = np.frombuffer(hashlib.sha256(self._workers.key.encode()).digest(), np.uint8)
        differs = np.zeros(self.num_workers, np.int32)
        differs[self.worker] = self._broadcast(own.tobytes()) != own.tobytes()
        if others := np.flatnonzero(self._sum(differs)).tolist():
            raise StepError(
                "Expected all workers to have the same parameters, inputs, code and libraries as the chief; received "
                f"others on worker {', '.join(map(str, others))}. Start the same command in the same image on each."
            )

    @contextlib.contextmanager
    def _all_present(self) -> Iterator[None]:
        import tensorflow as tf

        errors = tf.errors
        lost = (
            errors.UnavailableError,
            errors.DeadlineExceededError,
            errors.AbortedError,
            errors.CancelledError,
            errors.FailedPreconditionError,
        )
        try:
            yield
        except lost as error:
            missing = _unreachable(self._workers) or sorted({int(task) for task in TASK.findall(str(error))})
            raise TransientStepError(
                f"Expected {self.num_workers} workers until the end of the training; lost "
                f"{_named(self._workers, missing)}. {AGAIN}"
            ) from error


@dataclass(frozen=True)
class _SharedCheckpoint(Checkpoint):
    """The chief's checkpoint: every worker loads it, the chief saves it."""

    own: Checkpoint | None = None
    broadcast: Callable[[bytes], bytes] = bytes

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        if self.own:
            self.own.save(arrays, facts)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        content = io.BytesIO()
        if saved := self.own.load() if self.own else None:
            text = np.frombuffer(json.dumps(saved[1]).encode(), np.uint8)
            np.savez(content, allow_pickle=False, **{FACTS: text}, **saved[0])
        received = self.broadcast(content.getvalue())
        if not received:
            return None
        with np.load(io.BytesIO(received), allow_pickle=False) as file:
            arrays = dict(file)
        return arrays, json.loads(arrays.pop(FACTS).tobytes())


@functools.cache
def _strategy(addresses: tuple[str, ...], index: int) -> Any:
    """Return the strategy that connects this process with the others, once all have started, see `join`."""
    import tensorflow as tf
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context

    workers, distribute, errors = Workers(addresses, index), tf.distribute, tf.errors
    log.info("worker %d of %d at %s: waits for the others", index, workers.count, addresses[index])
    # As the strategy does it, but for the two limits: the other workers would wait for an hour.
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=START_SECONDS * 1_000,
        heartbeat_timeout_in_ms=SILENCE_SECONDS * 1_000,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=workers.count)],
    )
    resolver = distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(addresses)}), task_type="worker", task_id=index, rpc_layer="grpc"
    )
    if workers.is_chief:  # it waits inside TensorFlow without a limit, where no thread can stop it
        signal.alarm(START_SECONDS)
    try:
        strategy = distribute.MultiWorkerMirroredStrategy(resolver)
    except errors.UnknownError as error:
        raise StepError(
            f"Cannot listen at {addresses[index]} as worker {index}: {error.message.splitlines()[0]}. Is the port in "
            "use? Free it, or correct TF_CONFIG."
        ) from error
    except errors.OpError as error:
        missing = _unreachable(workers)
        raise TransientStepError(
            f"Expected {workers.count} workers within {START_SECONDS} seconds; missing "
            f"{_named(workers, missing)}. {AGAIN}"
        ) from error
    finally:
        signal.alarm(0)
    if strategy.num_replicas_in_sync != workers.count:
        raise StepError(
            f"Expected one device for each of {workers.count} workers; received {strategy.num_replicas_in_sync} "
            "devices. Show one GPU to each process, with CUDA_VISIBLE_DEVICES."
        )
    return strategy


def _adder(strategy: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that adds up the arrays that all workers give it, of one type and shape."""
    import tensorflow as tf

    def reduce(part: Any) -> Any:
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(part))

    functions: dict[tuple[str, tuple[int, ...]], Any] = {}  # one for each shape: TensorFlow warns of a fifth in one

    def add(values: np.ndarray) -> np.ndarray:
        kind = values.dtype.str, values.shape
        if kind not in functions:
            functions[kind] = tf.function(functools.partial(strategy.run, reduce), autograph=False)
        return np.asarray(functions[kind]((tf.constant(values),)))

    return add


def _unreachable(workers: Workers) -> list[int]:
    """Return the other workers whose port does not answer."""
    missing = []
    for index, address in enumerate(workers.addresses):
        host, _, port = address.rpartition(":")
        if index != workers.index:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
            except OSError:
                missing.append(index)
    return missing


def _named(workers: Workers, indices: list[int]) -> str:
    return ", ".join(f"worker {i} at {workers.addresses[i]}" for i in indices) or "one, which still answers"
