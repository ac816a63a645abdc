"""The model card of a servable model, in Markdown and HTML. The step `export` writes it as part of its output.

The sections are those of Mitchell, Wu, Zaldivar, Barnes, Vasserman, Hutchinson, Spitzer, Raji and Gebru, "Model Cards
for Model Reporting", FAT* 2019, 220-229. The card has no date and no version number: the registry assigns them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ridgeline.artifacts.dataset import VERSION
from ridgeline.artifacts.examples import SPLITS, Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ClassMetrics, ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModelFacts
from ridgeline.component import flatten
from ridgeline.html_page import render_page
from ridgeline.markdown import escape
from ridgeline.significance import wilson_interval

MAX_CLASSES = 100  # with more, the worst are shown
NUM_CONFUSIONS = 5


def markdown(
    facts: PushedModelFacts,
    examples: Examples,
    model: Model,
    evaluation: ModelEvaluation,
    *,
    intended_use: str | None,
    data_license: str | None,
    ethical_considerations: str | None,
) -> str:
    """Return the card as Markdown: CommonMark with tables. Its size is bounded, whatever the number of classes.

    Args:
        facts: The servable model's facts.
        examples: What it was trained and evaluated on.
        model: The trained model.
        evaluation: Its evaluation.
        intended_use: The stated use; None if it is not stated.
        data_license: The licence of the data; None if it is not stated.
        ethical_considerations: The stated risks and harms; None if they are not stated.

    Returns:
        The same text for the same arguments. Every text from outside is escaped.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(  # nosec B701 - not HTML: `finalize` escapes each value for Markdown
        finalize=_escaped, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["as_it_is"] = Markup
    labels: dict[str, np.ndarray] = {split: np.asarray(examples.split(split).labels) for split in SPLITS}
    num_classes = len(facts.class_names)
    counts = {split: np.bincount(found, minlength=num_classes).tolist() for split, found in labels.items()}
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels["test"], evaluation.predictions().argmax(axis=1)), 1)
    classes = list(enumerate(evaluation.facts.classes))
    if num_classes > MAX_CLASSES:
        classes = sorted(classes, key=lambda item: item[1].f1)[:MAX_CLASSES]
    weakest, _ = min(enumerate(evaluation.facts.classes), key=lambda item: item[1].recall)
    return environment.from_string(TEMPLATE).render(
        facts=facts,
        examples=examples,
        model=model,
        evaluation=evaluation.facts,
        rows=[_class_row(metrics, matrix, i, counts) for i, metrics in classes],
        weakest=_class_row(evaluation.facts.classes[weakest], matrix, weakest, counts),
        unseen=[name for name, count in zip(facts.class_names, counts["test"], strict=True) if not count][:MAX_CLASSES],
        confusions=_confusions(matrix),
        catalog=_catalog_page(facts.dataset),
        params=dict(flatten(model.facts.params)),
        intended_use=intended_use,
        data_license=data_license,
        ethical_considerations=ethical_considerations,
    )


def html(card: str, facts: PushedModelFacts) -> str:
    """Return a card as one HTML document that opens without a network.

    Args:
        card: The card as `markdown` returns it.
        facts: The servable model's facts.
    """
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(card)
    return render_page(PAGE, body=Markup(body), name=facts.model_name, synthetic=facts.synthetic)  # nosec B704 - no HTML


def _escaped(value: Any) -> str:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else escape(str(value))


def _class_row(metrics: ClassMetrics, matrix: np.ndarray, number: int, counts: dict[str, list[int]]) -> dict[str, Any]:
    """Return the metrics of a class with intervals, and its number of images in each split."""
    right = int(matrix[number, number])
    return {
        **metrics.model_dump(),
        "precision_interval": _interval(right, int(matrix[:, number].sum())),
        "recall_interval": _interval(right, counts["test"][number]),
        **{split: counts[split][number] for split in SPLITS},
    }


def _confusions(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the most frequent confusions: true class, predicted class, number of images."""
    labels, predicted = np.nonzero(matrix - np.diag(np.diag(matrix)))
    counts = matrix[labels, predicted]
    order = np.argsort(-counts, kind="stable")[:NUM_CONFUSIONS]
    return [(int(labels[i]), int(predicted[i]), int(counts[i])) for i in order]


def _interval(count: int, total: int) -> tuple[float, float]:
    """Return the Wilson score interval of a share; [0, 1] without observations."""
    return wilson_interval(count, total) if total else (0.0, 1.0)


def _catalog_page(dataset: str) -> str | None:
    """Return the page of a tfds dataset in the catalog; None for a folder and for images of our own.

    Example:
        >>> _catalog_page("letters:emnist/letters:3.1.0"), _catalog_page("shop:folder")
        ('https://www.tensorflow.org/datasets/catalog/emnist', None)
    """
    if not VERSION.search(dataset):
        return None
    name = VERSION.sub("", dataset).rpartition(":")[2].partition("/")[0]
    return None if name.startswith("synthetic_") else f"https://www.tensorflow.org/datasets/catalog/{name}"


TEMPLATE = """\
{% macro share(value, interval) %}\
{{ "%.3f"|format(value) }} ({{ "%.3f"|format(interval[0]) }} to {{ "%.3f"|format(interval[1]) }}){% endmacro %}
# Model card: {{ facts.model_name }}

{% if facts.synthetic %}
**SYNTHETIC: the images were drawn by the project itself. These figures say nothing about real data.**

{% endif %}
The sections follow Mitchell et al., "Model Cards for Model Reporting", FAT\\* 2019 \
([doi:10.1145/3287560.3287596](https://doi.org/10.1145/3287560.3287596)). \
The registry knows the version number, who pushed it and when: `ridgeline models show {{ facts.model_name|as_it_is }}`.

## Model Details

- Type: image classifier, a Keras network with {{ "{:,}".format(model.facts.num_parameters) }} trainable parameters
- Classes: {{ facts.class_names|length }}
- Input: raw uint8 images of the shape {{ facts.image_shape|join(" × ") }}, height × width\
{{ " × channels" if facts.image_shape|length == 3 }}; the normalization (pixel − \
{{ "%.6g"|format(model.facts.normalization.mean) }}) / {{ "%.6g"|format(model.facts.normalization.deviation) }} is \
part of the model
- Output: the probability of each class, and the most probable class
{% if facts.size_in_words %}
- Size, as served: {{ facts.size_in_words }}
{% endif %}
- Trained by Ridgeline, a pipeline for regularized classifiers

### Training parameters

| Parameter | Value |
| :-- | :-- |
{% for name, value in params.items() %}
| {{ name }} | {{ "none" if value is none else value }} |
{% endfor %}

### Kernels

| Kernel | Weights | Exactly zero |
| :-- | --: | --: |
{% for layer in model.facts.sparsity %}
| {{ layer.name }} | {{ "{:,}".format(layer.num_weights) }} | {{ "{:,}".format(layer.num_zeros) }} |
{% endfor %}

### Lineage

| Artifact | Name |
| :-- | :-- |
| Dataset | {{ facts.dataset }} |
| Examples | Examples/{{ examples.digest }} |
| Model | Model/{{ facts.model_digest }} |
{% if model.facts.started_from %}
| Started from the weights of | Model/{{ model.facts.started_from }} |
{% endif %}
| Evaluation | ModelEvaluation/{{ facts.evaluation_digest }} |
{% if facts.champion %}
| Judged against the champion | Model/{{ facts.champion }} |
{% endif %}

### How to reproduce

Each name is the digest of the content: equal inputs, parameters, code, seed and library versions give the same name. \
The first command trains the model again from its lineage and compares the bytes of each artifact; VERSION is its \
number in the registry. The second prints every step with its parameters, back to the digests of the raw files:

    ridgeline rebuild {{ facts.model_name|as_it_is }} VERSION
    ridgeline lineage Model/{{ facts.model_digest }}

The records of the steps in the store also hold the digest of each code file and the version of each library.

## Intended Use

{% if intended_use %}
{{ intended_use }}
{% else %}
Nobody stated an intended use (`export.intended_use`).
{% endif %}

- In scope: images that were made and prepared like those of {{ facts.dataset }}, each of which shows one of the \
{{ facts.class_names|length }} classes
- Out of scope: all other images. The model assigns one of its classes to any image; it has no answer "none of these"

## Factors

- Evaluated: the classes, one by one
- Not evaluated: any other group or condition, such as camera, light, place or the people shown. The data does not \
state them

## Metrics

- Accuracy, and precision, recall and F1 of each class, on the test split
- Cross-entropy: the mean of −log p(true class), in nats. Expected calibration error: over 15 bins of equal width
- In parentheses: 95 % Wilson score intervals, each for itself, for the choice of test images. They do not cover the \
variation between trainings
- Decision: the most probable class; there is no threshold

The model {{ "may be served" if evaluation.verdict.blessed else "may not be served" }}, because of these checks:

{% for reason in evaluation.verdict.reasons %}
- {{ reason }}
{% endfor %}
{% if facts.forced %}
- A person gave a reason for serving it: {{ facts.forced }}
{% endif %}

## Evaluation Data

- Dataset: {{ facts.dataset }}, test split, {{ "{:,}".format(evaluation.num_examples) }} images
- Motivation: images that no training and no choice of parameters has used. The test split is read once for each model
- Preprocessing: the same as that of the training data

## Training Data

- Dataset: {{ facts.dataset }}, training split, {{ "{:,}".format(examples.facts.num_examples["train"]) }} images; \
{{ "{:,}".format(examples.facts.num_examples["validation"]) }} more were held out for validation
{% if data_license %}
- Licence of the data: {{ data_license }}
{% else %}
- Licence of the data: not stated (`export.data_license`)
{% endif %}
{% if catalog %}
- Description, source and citation of the data: <{{ catalog|as_it_is }}>
{% endif %}
- Preprocessing: the step `ingest` made all images equal in size and colours, see `ridgeline lineage`; normalization \
"{{ model.facts.normalization.kind }}"
- Images by class: see the next section

## Quantitative Analyses

| Metric | Value |
| :-- | --: |
| Accuracy | {{ share(evaluation.accuracy, evaluation.accuracy_interval) }} |
| Cross-entropy | {{ "%.4f"|format(evaluation.cross_entropy) }} |
| Expected calibration error | {{ "%.4f"|format(evaluation.calibration_error) }} |
{% if evaluation.comparison %}
| Accuracy of the champion on the same images | \
{{ share(evaluation.comparison.accuracy, evaluation.comparison.accuracy_interval) }} |
{% endif %}

{% if rows|length < facts.class_names|length %}
The {{ rows|length }} classes with the lowest F1 of {{ facts.class_names|length }}:

{% endif %}
| Class | Precision | Recall | F1 | Test images | Training images | Validation images |
| :-- | --: | --: | --: | --: | --: | --: |
{% for row in rows %}
| {{ row.name }} | {{ share(row.precision, row.precision_interval) }} | {{ share(row.recall, row.recall_interval) }} \
| {{ "%.3f"|format(row.f1) }} | {{ "{:,}".format(row.test) }} | {{ "{:,}".format(row.train) }} \
| {{ "{:,}".format(row.validation) }} |
{% endfor %}
{% if confusions %}

The most frequent confusions:

| True class | Predicted class | Images |
| :-- | :-- | --: |
{% for label, predicted, count in confusions %}
| {{ facts.class_names[label] }} | {{ facts.class_names[predicted] }} | {{ "{:,}".format(count) }} |
{% endfor %}
{% endif %}

## Ethical Considerations

{% if ethical_considerations %}
{{ ethical_considerations }}
{% else %}
Nobody stated any (`export.ethical_considerations`). Ridgeline does not know what the images show beyond their \
classes, how they were collected, or whom a wrong answer harms.
{% endif %}

## Caveats and Recommendations

- The weakest class is {{ weakest.name }}: recall {{ share(weakest.recall, weakest.recall_interval) }}
{% if unseen %}
- Without test images, so that nothing is known about them: {{ unseen|join(", ") }}
{% endif %}
- The figures hold for images like those of the test split. Check other images first: their accuracy may be much lower
- A probability is the model's own estimate; the expected calibration error states how far it is off on average
- Repeated choices between models by their results on one test split make those results too optimistic
{% if facts.forced %}
- A person decided that the model may be served, see Metrics: a check may have failed
{% endif %}
"""

PAGE = """\
{% extends "page" %}
{% block title %}Model card: {{ name }}{% endblock %}
{% block style %}
main{background:#fff;border-radius:10px;padding:20px;margin:20px auto;overflow-wrap:anywhere}
h2{margin-top:28px;border-top:1px solid #e5e7eb;padding-top:16px}
h3{font-size:1rem;margin:16px 0 4px}
table{display:block;overflow-x:auto;width:auto;margin:8px 0 12px;overflow-wrap:normal}
pre{overflow-x:auto;background:#f3f4f6;padding:8px 12px;border-radius:6px}
{% endblock %}
{% block body %}
<main>
{{ body }}
</main>
{% endblock %}
"""
