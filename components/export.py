"""Export: turns a blessed model into a SavedModel that takes raw uint8 images."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from components.exporting import compaction
from components.reports import model_card
from ridgeline import fresh_process
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.label_errors import LabelErrors
from ridgeline.artifacts.model import Model, ModelFacts
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import (
    CARD_HTML,
    CARD_MARKDOWN,
    EXTRA,
    ModelSize,
    PushedModel,
    PushedModelFacts,
    write_form,
)
from ridgeline.component import Approval, PushRule, StepError, StepSkipped, component, outside_key, shown_as
from ridgeline.component import Params as StepParams
from ridgeline.fresh_process import FreshProcessError
from ridgeline.image_form import Form

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)


class Params(StepParams):
    """How to save the model, and what to put beside it."""

    approval: Approval = Field(
        "never",
        title="Approval",
        description="When a person must approve the push of a blessed model, with a reason for the history. never. "
        "forced: if a reason overrides the gate. uncertain: also if it is not significantly better than the champion. "
        "always.",
        json_schema_extra=outside_key(
            **shown_as(
                never="never",
                forced="forced: if a reason overrides the gate",
                uncertain="uncertain: also if it is not significantly better than the champion",
                always="always",
            )
        ),
    )
    compact: bool = Field(
        False,
        title="Compact",
        description="Remove pixels, units and channels without an effect from the served model. Predictions are the "
        "same up to rounding.",
    )
    max_size_mib: float | None = Field(
        None,
        gt=0,
        title="Maximum size",
        description="A model is exported only if its weights, as they would be served, take at most this many MiB, "
        "above 0. Empty: any size.",
    )
    canary_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        title="Canary share",
        description="Push the model as a canary that answers this share of the requests, until somebody promotes or "
        "aborts it; 0 to below 1. 0: it becomes the champion at once, as does the first model of a name.",
        json_schema_extra=outside_key(),
    )
    check_images: int = Field(
        64,
        ge=8,
        le=1_000,
        title="Check images",
        description="Number of test images, from the first, that check every copy of the model; 8 to 1000.",
    )
    intended_use: str | None = Field(
        None,
        max_length=2_000,
        title="Intended use",
        description="For the model card: what the model is for, who uses it, and what it is not for.",
    )
    data_license: str | None = Field(
        None,
        max_length=200,
        title="Licence of the data",
        description="For the model card: such as CC BY 4.0, or who owns the images. Empty: not stated.",
    )
    ethical_considerations: str | None = Field(
        None,
        max_length=2_000,
        title="Ethical considerations",
        description="For the model card: whom wrong answers may harm, people in the images, what was done about it.",
    )


@component(output=PushedModel, after=(LabelErrors,), push=lambda params: PushRule(params.approval, params.canary_share))
def export(
    examples: Examples,
    model: Model,
    evaluation: ModelEvaluation,
    params: Params,
    output: Path,
    dataset: Dataset | None = None,
) -> PushedModelFacts:
    """Export a blessed model with its model card, how to prepare images for it, and what checks it.

    Normalization is part of the graph.

    Args:
        examples: Gives the check's images.
        model: The trained model.
        evaluation: Its evaluation, whose predictions the export must repeat.
        params: How to save the model, and what to put beside it.
        output: Empty directory to write a `PushedModel` into.
        dataset: Gives how images were prepared, which the examples leave out: where it changes none of them, nothing is
            trained again. The defaults apply if there is none.

    Returns:
        The servable model's facts.

    Raises:
        StepSkipped: If the model was not blessed, or is too large without a reason for serving it.
        StepError: If the evaluation is of another model.
    """
    if evaluation.facts.model_digest != model.digest:
        raise StepError(
            f"Expected the evaluation of model {model.digest}; received that of {evaluation.facts.model_digest}. "
            "Evaluate this model."
        )
    if not evaluation.facts.verdict.blessed:
        raise StepSkipped(f"not blessed: {'; '.join(evaluation.facts.verdict.reasons)}")
    sizes = save_in_a_fresh_process(model.path, output / "saved_model", params.compact)
    exceeded = _exceeded_limit(sizes["size"], params.max_size_mib, evaluation.facts.verdict.force_reason)
    (output / "check").mkdir()
    np.save(output / "check" / "images.npy", examples.split("test").rows(0, params.check_images)[0])
    np.save(output / "check" / "probabilities.npy", evaluation.predictions()[: params.check_images])
    facts = PushedModelFacts(
        model_name=model.facts.model_name,
        model_digest=model.digest,
        evaluation_digest=evaluation.digest,
        accuracy=evaluation.facts.accuracy,
        image_shape=model.facts.image_shape,
        class_names=model.facts.class_names,
        synthetic=model.facts.synthetic,
        champion=evaluation.facts.verdict.champion,
        forced=evaluation.facts.verdict.force_reason,
        dataset=model.facts.dataset,
        exceeded_mib=exceeded,
        **sizes,
    )
    (output / "saved_model" / EXTRA).mkdir()
    shape = facts.image_shape
    form = Form.of_shape(shape, *dataset.facts.preparation) if dataset else Form.of_shape(shape)
    write_form(output / "saved_model", form)
    _write_card(output, facts, examples, model, evaluation, params)
    log.info("%s%s", facts.size_in_words, _why_whole(model) if params.compact and not facts.trained_size else "")
    return facts


def _why_whole(model: Model) -> str:
    """Return why compaction removed nothing."""
    kind = json.loads((model.path / "architecture.json").read_text(encoding="utf-8"))["class_name"]
    if kind == "Sequential":
        return "; there is nothing to remove"
    return "; export.compact did not look for anything to remove, because the network is not a keras.Sequential"


def _write_card(
    output: Path, facts: PushedModelFacts, examples: Examples, model: Model, evaluation: ModelEvaluation, params: Params
) -> None:
    """Write the model card into the SavedModel, so that each copy of it has the card; servers ignore this folder."""
    texts = {name: getattr(params, name) for name in ("intended_use", "data_license", "ethical_considerations")}
    card = model_card.markdown(facts, examples, model, evaluation, **texts)
    folder = output / "saved_model" / EXTRA
    (folder / CARD_MARKDOWN).write_text(card, encoding="utf-8")
    (folder / CARD_HTML).write_text(model_card.html(card, facts), encoding="utf-8")


def save_in_a_fresh_process(model: Path, folder: Path, compact: bool = False) -> dict[str, ModelSize]:
    """Call `save` in a fresh process, since TensorFlow numbers functions by a counter of the process.

    Args:
        model: Directory of a `Model` artifact.
        folder: The folder to create.
        compact: Whether to remove what has no effect.

    Returns:
        What `save` returns.

    Raises:
        RuntimeError: If `save` fails.
    """
    try:
        sizes = fresh_process.call(_save, str(model), str(folder), compact)
    except FreshProcessError as error:
        raise RuntimeError(f"Expected a SavedModel of {model}; received: {error}") from error
    return {name: ModelSize.model_validate(size) for name, size in sizes.items()}


def _save(model: str, folder: str, compact: bool) -> dict[str, Any]:
    return {name: size.model_dump() for name, size in save(Path(model), Path(folder), compact).items()}


def save(model_dir: Path, folder: Path, compact: bool = False) -> dict[str, ModelSize]:
    """Write a SavedModel.

    Keras's own ``model.export`` orders the variables by memory address and writes them twice. A `tf.Module`
    around the same call graph has neither flaw: in a fresh process, its bytes depend on the model alone.

    Args:
        model_dir: Directory of a `Model` artifact.
        folder: The folder to create.
        compact: Whether to remove what has no effect. A model in which everything has one is saved as it is.

    Returns:
        The sizes that the facts state: ``size``, and ``trained_size`` if something was removed.
    """
    artifact = Model.load(model_dir)
    model = artifact.load_keras()
    _write(model, artifact.facts, folder)
    size = compaction.size_of(model)
    # TensorFlow numbers functions by what ran before. So the trained model is saved first, also if another replaces it.
    if not compact or (smaller := compaction.compact(model)) is None:
        return {"size": size}
    shutil.rmtree(folder)
    _write(smaller, artifact.facts, folder)
    return {"size": compaction.size_of(smaller), "trained_size": size}


def _exceeded_limit(size: ModelSize, limit: float | None, force_reason: str | None) -> float | None:
    """Return the limit that a model exceeds by force; None if it fits, or there is no limit.

    Raises:
        StepSkipped: If it is too large, without a reason for serving it.
    """
    if limit is None:
        return None
    fits = size.mib <= limit
    reason = f"{size.mib:.6g} MiB {'<=' if fits else '>'} {limit:.6g} MiB (max_size_mib)"
    if not fits and not force_reason:
        raise StepSkipped(f"too large: {reason}")
    log.info("size %s%s", reason, "" if fits else f"; forced: {force_reason}")
    return None if fits else limit


def _write(model: keras.Model, facts: ModelFacts, folder: Path) -> None:
    """Write the SavedModel of a Keras model."""
    import tensorflow as tf
    from tensorflow.core.protobuf import fingerprint_pb2

    servable = tf.Module(name="classifier")
    servable.weights = [weight.value for weight in model.weights]
    names = tf.constant(facts.class_names)

    @tf.function(input_signature=[tf.TensorSpec((None, *facts.image_shape), tf.uint8, name="images")])
    def serve(images: Any) -> dict[str, Any]:
        probabilities = model(images, training=False)
        class_id = tf.argmax(probabilities, axis=-1, output_type=tf.int64)
        return {"probabilities": probabilities, "class_id": class_id, "class_name": tf.gather(names, class_id)}

    servable.serve = serve
    tf.saved_model.save(servable, str(folder), signatures={"serving_default": serve})

    fingerprint_file = folder / "fingerprint.pb"  # carries a random id
    fingerprint = fingerprint_pb2.FingerprintDef.FromString(fingerprint_file.read_bytes())
    fingerprint.uuid = ""
    fingerprint_file.write_bytes(fingerprint.SerializeToString(deterministic=True))
