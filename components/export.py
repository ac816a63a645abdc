"""Export: turns a blessed model into a SavedModel that takes raw uint8 images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel, PushedModelFacts
from ridgeline.component import Params as StepParams
from ridgeline.component import StepSkipped, component

if TYPE_CHECKING:
    import keras


class Params(StepParams):
    """What to put beside the SavedModel."""

    check_images: int = Field(
        64,
        ge=8,
        le=1_000,
        title="Check images",
        description="First test images that every copy is checked with.",
    )


@component(output=PushedModel)
def export(
    examples: Examples, model: Model, evaluation: ModelEvaluation, params: Params, output: Path
) -> PushedModelFacts:
    """Export a blessed model, normalization inside, with what it takes to check a copy of it.

    Args:
        examples: Gives the check's images.
        model: The trained model.
        evaluation: Its evaluation, whose predictions the export must repeat.
        params: What to put beside the SavedModel.
        output: Empty directory to write a `PushedModel` into.

    Returns:
        The servable model's facts.

    Raises:
        StepSkipped: If the model was not blessed.
        ValueError: If the evaluation is another model's.
    """
    if evaluation.facts.model_digest != model.digest:
        raise ValueError(
            f"Expected the evaluation of model {model.digest}; received that of {evaluation.facts.model_digest}. "
            "Evaluate this model."
        )
    if not evaluation.facts.verdict.blessed:
        raise StepSkipped(f"not blessed: {'; '.join(evaluation.facts.verdict.reasons)}")
    save(model.load_keras(), model.facts.class_names, output / "saved_model")
    (output / "check").mkdir()
    np.save(output / "check" / "images.npy", examples.split("test").images[: params.check_images])
    np.save(output / "check" / "probabilities.npy", evaluation.predictions()[: params.check_images])
    return PushedModelFacts(
        model_name=model.facts.dataset.split(":")[0].replace("/", "_"),
        model_digest=model.digest,
        evaluation_digest=evaluation.digest,
        accuracy=evaluation.facts.accuracy,
        image_shape=model.facts.image_shape,
        class_names=model.facts.class_names,
        synthetic=model.facts.synthetic,
    )


def save(model: keras.Model, class_names: tuple[str, ...], folder: Path) -> None:
    """Write a SavedModel whose bytes depend on the model alone.

    Keras's own ``model.export`` orders the variables by memory address and writes them twice; a `tf.Module`
    around the same call graph has neither flaw.

    Args:
        model: Takes uint8 ``[n, *image_shape]``, yields probabilities, float32 ``[n, classes]``.
        class_names: The classes' names in the order of its outputs.
        folder: The folder to create.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf import fingerprint_pb2

    servable = tf.Module(name="classifier")
    servable.weights = [variable.value for variable in model.variables]
    names = tf.constant(class_names)

    @tf.function(input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="images")])
    def serve(images: Any) -> dict[str, Any]:
        probabilities = model(images, training=False)
        class_id = tf.argmax(probabilities, axis=-1, output_type=tf.int64)
        return {
            "probabilities": probabilities,
            "class_id": class_id,
            "class_name": tf.gather(names, class_id),
        }

    servable.serve = serve
    tf.saved_model.save(servable, str(folder), signatures={"serving_default": serve})

    fingerprint_file = folder / "fingerprint.pb"  # carries a random id
    fingerprint = fingerprint_pb2.FingerprintDef.FromString(fingerprint_file.read_bytes())
    fingerprint.uuid = ""
    fingerprint_file.write_bytes(fingerprint.SerializeToString(deterministic=True))


if __name__ == "__main__":
    export.main()
