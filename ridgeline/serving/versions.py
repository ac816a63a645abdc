"""The versions in memory: loaded and warmed up before they answer, kept while their successor can't be loaded."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ridgeline.access import message
from ridgeline.artifacts.pushed_model import read_form
from ridgeline.history import Serving
from ridgeline.image_form import Form
from ridgeline.registry import CANARY, STABLE, Registry
from ridgeline.serving.batching import Batcher, Outputs
from ridgeline.serving.instances import INPUT, SIGNATURE, BadRequestError
from ridgeline.serving.metrics import Metrics
from ridgeline.store import StoreError

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # a version that can't be loaded may be restored meanwhile
WARM_UP = (1, 8)  # batch sizes


class Predictor(Protocol):
    """A loaded version of a model."""

    image_shape: tuple[int, ...]
    form: Form
    metadata: dict[str, Any]

    async def predict(self, images: np.ndarray) -> Outputs:
        """Return the outputs for images, uint8 ``[n, *image_shape]``, by name."""


class SavedModel:
    """A SavedModel, ready to answer several requests at once.

    Args:
        folder: The version's folder.
        executor: Computes the batches.
        max_batch: The largest number of images of a batch, and so of a request.
        observe: Called with the number of images of each batch.

    Attributes:
        image_shape: ``(h, w)`` or ``(h, w, 3)`` of its input.
        form: How to prepare image files for it.
        metadata: Its signatures, as TF Serving states them.
        predict: Returns the outputs for images, by name, in the order of the names; see `Batcher`.
    """

    def __init__(self, folder: Path, executor: Executor, max_batch: int, observe: Callable[[int], None]) -> None:
        import tensorflow as tf
        from google.protobuf.json_format import MessageToDict
        from tensorflow.core.protobuf import saved_model_pb2

        self._model = tf.saved_model.load(str(folder))  # the function alone does not keep the variables
        self._call = self._model.signatures[SIGNATURE]
        self._constant = tf.constant
        self.image_shape: tuple[int, ...] = tuple(self._call.structured_input_signature[1][INPUT].shape[1:])
        self.form = read_form(folder, self.image_shape)
        definition = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        signature = definition.meta_graphs[0].signature_def[SIGNATURE]
        stated = MessageToDict(signature, preserving_proto_field_name=True)
        self.metadata = {"signature_def": {"signature_def": {SIGNATURE: stated}}}
        for size in WARM_UP:
            self._compute(np.zeros((size, *self.image_shape), np.uint8))
        self.predict = Batcher(self._compute, executor, max_batch, observe).predict

    def _compute(self, images: np.ndarray) -> Outputs:
        outputs = self._call(**{INPUT: self._constant(images)})
        return {name: outputs[name].numpy() for name in sorted(outputs)}


@dataclass(frozen=True)
class _State:
    """What of a model is served.

    Attributes:
        loaded: The versions in memory by label; empty if none could be loaded.
        share: The share of the requests for the canary.
        wanted: What the registry says.
        problem: Why that is not served; empty if it is.
        tried_at: When it was last tried to serve it, in seconds of a monotonic clock.
    """

    loaded: dict[str, tuple[int, Predictor]] = field(default_factory=dict)
    share: float = 0.0
    wanted: Serving | None = None
    problem: str = ""
    tried_at: float = 0.0


class Models:
    """The models of a registry, as they are served.

    One thread calls `refresh`; all other methods return at once and may be called by any thread. A request keeps the
    version that it was given, also if another one takes its place meanwhile.

    Args:
        registry: The registry; it is only read.
        load: Returns the loaded version of a folder, by the model's name.
        metrics: Counts what is loaded.
        draw: Returns a number in [0, 1): a request below the share goes to the canary.
    """

    def __init__(
        self,
        registry: Registry,
        load: Callable[[str, Path], Predictor],
        metrics: Metrics,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.registry, self._load, self._metrics, self._draw = registry, load, metrics, draw
        self._states: dict[str, _State] = {}
        self._problem = ""

    def refresh(self) -> None:
        """Load what the registry serves now, and switch to it. What can't be loaded leaves the present versions."""
        try:
            names = self.registry.model_names()
            self._problem = ""
        except (OSError, StoreError) as error:
            problem = f"Cannot read {self.registry.place}: {message(error)}"
            if problem != self._problem:
                log.error("%s", problem)
            self._problem = problem
            return
        for name in sorted({*names, *self._states}):
            before = self._states.get(name, _State())
            after = self._refreshed(name, before, name in names)
            if after is before:
                continue
            self._states = self._states | {name: after}
            self._metrics.problem.labels(name).set(bool(after.problem))
            if after.problem and after.problem != before.problem:
                log.error("%s: %s", name, after.problem)
            if after.loaded != before.loaded or after.share != before.share:
                self._report(name, after)
            del before  # the last reference to versions that no request uses
            gc.collect()

    def _refreshed(self, name: str, before: _State, is_listed: bool) -> _State:
        try:
            wanted = self.registry.serving(name) if is_listed else None
        except Exception as error:  # whatever a damaged or unreachable folder causes
            return _without_change(before, message(error))
        if wanted is None:
            problem = (
                f"{self.registry.root} has no champion of it any more. It is served until the server is restarted."
            )
            return _without_change(before, problem) if before.loaded else before
        now = time.monotonic()
        if wanted == before.wanted and not (before.problem and now - before.tried_at > RETRY_SECONDS):
            return before
        loaded, problems = {}, []
        present = dict(before.loaded.values())
        for label, number in ((STABLE, wanted.champion), (CANARY, wanted.canary)):
            if number is None:
                continue
            try:
                loaded[label] = (number, present.get(number) or self._loaded(name, number))
            except Exception as error:  # TensorFlow raises many kinds for damaged files
                problems.append(f"Cannot serve version {number}: {message(error)}")
                if label == STABLE and STABLE in before.loaded:
                    loaded[label] = before.loaded[label]
        share = wanted.share if CANARY in loaded else 0.0
        return _State(loaded, share, wanted, " ".join(problems), now)

    def _loaded(self, name: str, number: int) -> Predictor:
        start = time.monotonic()
        try:
            self.registry.expect_whole(name, number)
            predictor = self._load(name, self.registry.folder(name, number))
        except Exception:
            self._metrics.loads.labels(name, "failed").inc()
            raise
        self._metrics.loads.labels(name, "loaded").inc()
        log.info("loaded version %d of %s in %.2f s", number, name, time.monotonic() - start)
        return predictor

    def _report(self, name: str, state: _State) -> None:
        for label in (STABLE, CANARY):
            if label in state.loaded:
                self._metrics.served.labels(name, label).set(state.loaded[label][0])
            else:
                self._metrics.served.remove_by_labels({"model": name, "label": label})
        self._metrics.share.labels(name).set(state.share)
        numbers = {label: number for label, (number, _) in state.loaded.items()}
        canary = f", version {numbers[CANARY]} for {state.share:.3g} of the requests" if CANARY in numbers else ""
        if STABLE in numbers:
            log.info("%s is served by version %d%s", name, numbers[STABLE], canary)

    def choose(self, name: str, version: int | None = None, label: str | None = None) -> tuple[int, str, Predictor]:
        """Return the version that answers a request: its number, its label and itself.

        Args:
            name: The model's name.
            version: The version that the request names; None if it names none.
            label: The label that the request names; None if it names none.

        Raises:
            BadRequestError: If there is no such model, version or label, with status 404; 503 if it is not loaded.
        """
        state = self._states.get(name)
        if state is None:
            known = ", ".join(sorted(self._states)) or "none yet"
            raise BadRequestError(f"Expected the name of a served model: {known}; received {name!r}.", 404)
        loaded = state.loaded
        if version is None and label is None:
            label = CANARY if CANARY in loaded and self._draw() < state.share else STABLE
        for own, (number, predictor) in loaded.items():
            if own == label or number == version:
                return number, own, predictor
        pushed = state.wanted or Serving(0)
        numbers = {STABLE: pushed.champion, CANARY: pushed.canary}
        if numbers.get(label or "") is not None or (version is not None and version in numbers.values()):
            raise BadRequestError(f"This version of {name} can't be served at present. {state.problem}", 503)
        shown = ", ".join(f"{number} ({own})" for own, (number, _) in loaded.items()) or "none"
        received = f"version {version}" if label is None else f"label {label!r}"
        raise BadRequestError(f"Expected a version of {name} that is served: {shown}; received {received}.", 404)

    def status(self, name: str) -> list[tuple[int, str]]:
        """Return the versions that are served, with their labels.

        Args:
            name: The model's name.
        """
        state = self._states.get(name, _State())
        return [(number, label) for label, (number, _) in state.loaded.items()]

    def problems(self) -> list[str]:
        """Return why the registry's versions are not served, or none are; empty if they are."""
        found = [f"{name}: {state.problem}" for name, state in self._states.items() if state.problem]
        if self._problem:
            found.append(self._problem)
        if not self._states and not found:
            found.append(f"No model has been pushed to {self.registry.place} yet.")
        return found

    def is_ready(self) -> bool:
        """Return whether each model has a version that answers, and there is a model."""
        return bool(self._states) and all(STABLE in state.loaded for state in self._states.values())


def _without_change(state: _State, problem: str) -> _State:
    """Keep what is served, and forget what the registry said, so that its next answer counts as a new one."""
    return state if state.problem == problem else replace(state, problem=problem, wanted=None)
