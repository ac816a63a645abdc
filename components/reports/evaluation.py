"""The HTML report of one evaluation. The step `evaluate` writes it as part of its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.evaluating.replay import Flipped
from components.reports.figures import BLUE, GREY, VERMILION, Picture, flat, new_figure, plot_style, svg
from ridgeline.artifacts.examples import Examples, Split
from ridgeline.artifacts.model import Model, eliminated_pixels, kernels
from ridgeline.artifacts.model_evaluation import Flip, Mistake, ModelEvaluationFacts
from ridgeline.html_page import render_page
from ridgeline.thumbnail import thumbnail

if TYPE_CHECKING:
    import keras

SHADES = 9
MAX_CLASSES = 100  # with more, the matrix is left out, and of the classes only the worst are shown
NUM_WORST = 50


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions sorted by confidence into bins of equal width that cover (0, 1].

    Attributes:
        counts: Number of predictions in each bin, int64 ``[bins]``.
        confidence: Their mean confidence, float64 ``[bins]`` in [0, 1]; 0 where the bin is empty.
        accuracy: Share of them that is correct, float64 ``[bins]`` in [0, 1]; 0 where the bin is empty.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


@dataclass(frozen=True)
class Confusion:
    """How many test images of one class, by its number, were taken for another."""

    label: int
    predicted: int
    count: int


def render(
    facts: ModelEvaluationFacts,
    bins: CalibrationBins,
    examples: Examples,
    model: Model,
    network: keras.Model,
    confusions: Sequence[Confusion] = (),
    flipped: Flipped | None = None,
) -> str:
    """Return the report as one HTML document. Its size is bounded, whatever the number of classes.

    Args:
        facts: The evaluation's metrics and verdict.
        bins: The test predictions binned by confidence.
        examples: The examples, for the images of the mistakes.
        model: The evaluated model, for its training history, parameters and digest.
        network: The same model as loaded by Keras, for its kernels.
        confusions: The most frequent confusions, shown where the matrix is left out.
        flipped: Some of the unlabelled images for which the champion predicts another class.

    Returns:
        HTML that opens without a network; the same text for the same arguments.
    """
    classes = list(enumerate(facts.classes))
    if len(classes) > MAX_CLASSES:
        classes = sorted(classes, key=lambda item: item[1].f1)[:NUM_WORST]
    with plot_style():
        return render_page(
            TEMPLATE,
            facts=facts,
            classes=classes,
            confusions=confusions,
            synthetic=facts.synthetic,
            bins=bins,
            model=model,
            examples=examples,
            num_zeros=sum(layer.num_zeros for layer in model.facts.sparsity),
            num_weights=sum(layer.num_weights for layer in model.facts.sparsity),
            curves=[_training_curve(model.history(), "loss"), _training_curve(model.history(), "accuracy")],
            matrix=_shaded(facts.confusion_matrix),
            shades=SHADES,
            reliability=_reliability_diagram(bins, facts.calibration_error),
            kernels=[_weight_histogram(name, kernel) for name, kernel in kernels(network).items()],
            eliminated=_eliminated(eliminated_pixels(network)),
            mistakes=[(mistake, _mistake(mistake, facts, examples.split("test"))) for mistake in facts.mistakes],
            params=flat(model.facts.params),
            flips=_flips(facts, flipped or {}),
        )


def worst_confusions(matrix: np.ndarray) -> list[Confusion]:
    """Return the most frequent confusions, at most `NUM_WORST`, the most frequent first.

    Args:
        matrix: Counts, int64 ``[classes, classes]``; row is the true class, column the predicted.

    Example:
        >>> worst_confusions(np.array([[5, 0, 2], [1, 7, 0], [0, 0, 9]]))
        [Confusion(label=0, predicted=2, count=2), Confusion(label=1, predicted=0, count=1)]
    """
    labels, predicted = np.nonzero(matrix - np.diag(np.diag(matrix)))
    counts = matrix[labels, predicted]
    order = np.argsort(-counts, kind="stable")[:NUM_WORST]
    return [Confusion(int(labels[i]), int(predicted[i]), int(counts[i])) for i in order]


def _shaded(matrix: tuple[tuple[int, ...], ...]) -> list[list[tuple[int, int]]]:
    """Pair each count with a shade, 0 to `SHADES`: the square root of its share of the row."""
    return [[(n, round(SHADES * (n / max(1, sum(row))) ** 0.5)) for n in row] for row in matrix]


def _training_curve(history: Mapping[str, list[float]], metric: str) -> Picture:
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    finals = []
    for key, name, color, line in (
        (metric, "train", BLUE, "-"),
        (f"val_{metric}", "validation", VERMILION, "--"),
    ):
        if values := history.get(key):
            epochs = np.arange(1, len(values) + 1)
            axes.plot(epochs, values, line, color=color, marker="o", markersize=3, label=name)
            finals.append(f"{name} {values[-1]:.4f}")
    axes.set(xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if finals:
        axes.legend()
    last = f"After the last epoch: {', '.join(finals) or 'not recorded'}."
    return Picture(svg(figure), f"Line chart of the {metric} by epoch. {last}", f"{metric.capitalize()}. {last}")


def _reliability_diagram(bins: CalibrationBins, error: float) -> Picture:
    figure, axes = new_figure(4.2)
    edges = np.linspace(0, 1, len(bins.counts) + 1)
    centers, width = (edges[:-1] + edges[1:]) / 2, 0.9 / len(bins.counts)
    axes.bar(centers, bins.counts / bins.counts.sum(), width, color="#d1d5db", label="share of images")
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfectly calibrated")
    used = bins.counts > 0
    axes.plot(bins.confidence[used], bins.accuracy[used], "o-", color=BLUE, markersize=5, label="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy, share of images")
    axes.legend(loc="upper left")
    alt = (
        f"Reliability diagram: accuracy against confidence in {len(bins.counts)} bins of equal width. "
        f"Expected calibration error {error:.4f}."
    )
    return Picture(svg(figure), alt)


def _weight_histogram(name: str, kernel: np.ndarray) -> Picture:
    weights = kernel.ravel()
    nonzero = weights[weights != 0]
    num_zeros = weights.size - nonzero.size
    share = f"{100 * num_zeros / weights.size:.1f} % of {weights.size:,} weights are exactly zero"
    figure, axes = new_figure()
    axes.hist(nonzero, bins=61, color=BLUE, log=bool(nonzero.size))
    axes.set(xlabel="weight (zeros left out)", ylabel="count, log scale")
    return Picture(svg(figure), f"Histogram of the nonzero weights of layer {name}. {share}.", f"{name}: {share}.")


def _eliminated(pixels: np.ndarray | None) -> Picture | None:
    """Draw the eliminated pixels, bool ``[h, w]``, in vermilion; None if there are none."""
    if pixels is None:
        return None
    count = int(np.count_nonzero(pixels))
    if not count:
        return None
    text = f"{count:,} of {pixels.size:,} input pixels are eliminated: all their outgoing weights are zero"
    colours = np.where(
        pixels[:, :, None], np.array([0xD5, 0x5E, 0x00], np.uint8), np.array([0xE5, 0xE7, 0xEB], np.uint8)
    )
    return Picture(thumbnail(colours), f"Map of the image: {text}.", f"{text} (orange).")


def _mistake(mistake: Mistake, facts: ModelEvaluationFacts, test: Split) -> Picture:
    label, predicted = facts.classes[mistake.label].name, facts.classes[mistake.predicted].name
    alt = f"Test image {mistake.index}: {label}, taken for {predicted}"
    return Picture(thumbnail(test.rows(mistake.index, mistake.index + 1)[0][0]), alt)


def _flips(facts: ModelEvaluationFacts, flipped: Flipped) -> list[tuple[Flip, list[Picture]]]:
    """Return the most frequent flips with their images."""
    return [
        (flip, [Picture(thumbnail(pixels), name) for name, pixels in flipped.get((flip.champion, flip.candidate), [])])
        for flip in (facts.replay.flips if facts.replay else ())
    ]


TEMPLATE = """\
{% extends "page" %}
{% from "macros" import figure %}
{% block title %}Evaluation on {{ facts.dataset }}{% endblock %}
{% block style %}
.pixels img{width:280px;image-rendering:pixelated}
.matrix td{text-align:center;border:1px solid #fff;min-width:46px;width:{{ (86 / (matrix|length or 1))|round(2) }}%}
.matrix th{border-bottom:0}
.matrix thead th{text-align:center;vertical-align:bottom;font-weight:500;font-size:.8rem;line-height:1.2}
{% for shade in range(1, shades + 1) %}
.hit{{ shade }}{background:rgb(0 90 150/{{ (100 * shade / shades)|round|int }}%);\
color:{{ "#fff" if shade / shades > 0.7 else "#111" }}}
.miss{{ shade }}{background:rgb(213 94 0/{{ (100 * shade / shades)|round|int }}%)}
{% endfor %}
.none{color:#6b7280}
.forced{border:2px solid #d55e00;border-radius:6px;padding:8px 12px}
.bar{display:block;width:100%;min-width:60px;height:10px;background:#e5e7eb;border-radius:3px}
.bar rect{fill:#0072b2}
.mistakes{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:16px;\
margin:12px 0 0;padding:0;list-style:none}
.mistakes img{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;\
background:#000;border-radius:6px}
.mistakes li{font-size:.875rem;line-height:1.35;overflow-wrap:anywhere}
.mistakes li img{margin-bottom:6px}
.mistakes strong{font-weight:600;color:#a84a00}
.flips img{width:48px;height:48px;object-fit:contain;image-rendering:pixelated;background:#000;margin-right:4px}
@media(max-width:600px){.mistakes{grid-template-columns:repeat(3,1fr)}}
{% endblock %}
{% block body %}
<header>
<h1>Evaluation on {{ facts.dataset }}</h1>
<p class="note">{{ "{:,}".format(facts.num_examples) }} test images, {{ facts.classes|length }} classes, \
model <code>{{ facts.model_digest[:12] }}</code></p>
</header>
<main>
<div class="verdict{% if facts.verdict.blessed %} blessed{% endif %}">
<h2>{% if facts.verdict.forced %}&#10003; Blessed by force{% elif facts.verdict.blessed %}&#10003; Blessed\
{% else %}&#10007; Not blessed{% endif %}</h2>
{% if facts.verdict.forced %}
<p class="forced">A person blessed this model although a check failed. Reason: \
<strong>{{ facts.verdict.forced }}</strong></p>
{% endif %}
<ul>
{% for reason in facts.verdict.reasons %}
<li>{{ reason }}</li>
{% endfor %}
</ul>
</div>

<dl class="tiles">
<div><dt>Accuracy</dt><dd>{{ facts.accuracy|percent(2) }}<small>95 % Wilson interval \
{{ "%.2f"|format(100 * facts.accuracy_interval[0]) }} to {{ facts.accuracy_interval[1]|percent(2) }}\
</small></dd></div>
<div><dt>Cross-entropy</dt><dd>{{ "%.4f"|format(facts.cross_entropy) }}<small>nats; loss with penalty \
{{ "%.4f"|format(facts.loss) }}</small></dd></div>
<div><dt>Calibration error</dt><dd>{{ "%.4f"|format(facts.calibration_error) }}<small>expected, over \
{{ bins.counts|length }} bins</small></dd></div>
<div><dt>Trainable parameters</dt><dd>{{ "{:,}".format(model.facts.num_parameters) }}<small>\
{% if num_weights %}{{ (num_zeros / num_weights)|percent }} of the kernels' weights are zero{% endif %}\
</small></dd></div>
</dl>

{% if facts.comparison %}
{% set champion = facts.comparison %}
<section>
<h2>Against the champion</h2>
<p class="note">The champion is model <code>{{ champion.model_digest[:12] }}</code>: the served one, or the one that \
this model replaced. Both were evaluated on the same test images. The champion alone is right on \
{{ "{:,}".format(champion.only_champion_right) }} of them, this model alone on \
{{ "{:,}".format(champion.only_candidate_right) }}. If both were equally good, chance would put the champion at \
least this far ahead with probability p = {{ "%.4g"|format(champion.p_value) }} (one-sided exact McNemar test).</p>
<div class="scroll" tabindex="0" role="region" aria-label="Metrics of this model and of the champion">
<table>
<thead><tr><th scope="col">Metric</th><th scope="col">This model</th><th scope="col">Champion</th>\
<th scope="col">Difference</th></tr></thead>
<tbody>
<tr><th scope="row">Accuracy</th><td>{{ facts.accuracy|percent(2) }}</td><td>{{ champion.accuracy|percent(2) }}</td>\
<td>{{ "%+.2f"|format(100 * (facts.accuracy - champion.accuracy)) }}</td></tr>
<tr><th scope="row">95 % interval</th><td>{{ "%.2f"|format(100 * facts.accuracy_interval[0]) }} to \
{{ "%.2f"|format(100 * facts.accuracy_interval[1]) }}</td>\
<td>{{ "%.2f"|format(100 * champion.accuracy_interval[0]) }} to \
{{ "%.2f"|format(100 * champion.accuracy_interval[1]) }}</td><td></td></tr>
{% for number, class in classes %}
{% set recall = champion.class_recalls[number] %}
<tr><th scope="row">Recall of {{ class.name }}</th><td>{{ class.recall|percent }}</td><td>{{ recall|percent }}</td>\
<td>{{ "%+.1f"|format(100 * (class.recall - recall)) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

{% if facts.replay %}
{% set replay = facts.replay %}
<section>
<h2>Replay of unlabelled images</h2>
<p class="note">This model predicts the champion's class for {{ replay.agreement|percent(2) }} of \
{{ "{:,}".format(replay.num_images) }} unlabelled images, 95 % Wilson interval \
{{ "%.2f"|format(100 * replay.agreement_interval[0]) }} to {{ replay.agreement_interval[1]|percent(2) }}.\
{% if replay.num_unreadable %} {{ "{:,}".format(replay.num_unreadable) }} \
{{ "file is no readable image" if replay.num_unreadable == 1 else "files are no readable images" }}.{% endif %}\
{% if flips %} The table has the pairs of different classes, the most frequent first. No labels say which model is \
right.{% endif %}</p>
{% if flips %}
<div class="scroll" tabindex="0" role="region" aria-label="Images with another class than the champion predicts">
<table>
<thead><tr><th scope="col">Champion</th><th scope="col">This model</th><th scope="col">Images</th>\
<th scope="col">Examples</th></tr></thead>
<tbody>
{% for flip, pictures in flips %}
<tr><th scope="row">{{ facts.classes[flip.champion].name }}</th><td>{{ facts.classes[flip.candidate].name }}</td>\
<td>{{ "{:,}".format(flip.count) }}</td><td class="flips">\
{% for picture in pictures %}<img src="{{ picture.uri }}" alt="{{ picture.alt }}" title="{{ picture.alt }}">\
{% endfor %}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</section>
{% endif %}

<section>
<h2>Training</h2>
<p class="note">Training metrics are means over the epoch, as Keras reports them; validation metrics are \
measured after it.</p>
<div class="pair">
{% for picture in curves %}
{{ figure(picture) }}
{% endfor %}
</div>
</section>

<section>
{% if matrix %}
<h2>Confusion matrix</h2>
<p class="note">Rows are the true class, columns the predicted. Blue is right, orange is wrong; the stronger \
the colour, the larger the share of the row (square-root scale).</p>
<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">
<table class="matrix">
<thead><tr><th scope="col">true \\ predicted</th>
{% for class in facts.classes %}
<th scope="col">{{ class.name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in matrix %}
{% set actual = loop.index0 %}
<tr><th scope="row">{{ facts.classes[actual].name }}</th>
{% for count, shade in row %}
{% set kind = "hit" if loop.index0 == actual else "miss" %}
<td class="{{ kind ~ shade if count else "none" }}">{{ count }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<h2>Worst confusions</h2>
<p class="note">The {{ confusions|length }} most frequent confusions. The matrix of all {{ facts.classes|length }} \
classes is left out.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Worst confusions">
<table>
<thead><tr><th scope="col">True class</th><th scope="col">Predicted</th><th scope="col">Images</th>\
<th scope="col">of</th></tr></thead>
<tbody>
{% for confusion in confusions %}
{% set class = facts.classes[confusion.label] %}
<tr><th scope="row">{{ class.name }}</th><td>{{ facts.classes[confusion.predicted].name }}</td>\
<td>{{ "{:,}".format(confusion.count) }}</td><td>{{ "{:,}".format(class.num_examples) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</section>

<div class="pair">
<section>
<h2>By class</h2>
{% if classes|length < facts.classes|length %}
<p class="note">The {{ classes|length }} classes with the lowest F1 of {{ facts.classes|length }}. \
The manifest has all.</p>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="Metrics by class">
<table>
<thead><tr><th scope="col">Class</th><th scope="col">Precision</th><th scope="col">Recall</th>\
<th scope="col">F1</th><td class="wide"></td><th scope="col">Images</th></tr></thead>
<tbody>
{% for _, class in classes %}
<tr><th scope="row">{{ class.name }}</th><td>{{ "%.3f"|format(class.precision) }}</td>\
<td>{{ "%.3f"|format(class.recall) }}</td><td>{{ "%.3f"|format(class.f1) }}</td>\
<td class="wide"><svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">\
<rect width="{{ "%.1f"|format(100 * class.f1) }}" height="10"/></svg></td>\
<td>{{ "{:,}".format(class.num_examples) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
<section>
<h2>Calibration</h2>
<p class="note">On the dashed line, accuracy equals confidence. Below it, the model is overconfident.</p>
{{ figure(reliability) }}
</section>
</div>

<section>
<h2>Weights</h2>
<div class="pair">
{% for picture in kernels %}
{{ figure(picture) }}
{% endfor %}
</div>
{% if eliminated %}
<div class="pixels">{{ figure(eliminated) }}</div>
{% elif model.facts.num_eliminated_pixels is not none %}
<p class="note">No input pixel is eliminated: each has a weight that is not zero.</p>
{% endif %}
{% if model.facts.num_eliminated_units %}
<p class="note">{{ "{:,}".format(model.facts.num_eliminated_units) }} hidden units or channels are eliminated: their \
incoming or their outgoing weights are all zero.</p>
{% endif %}
</section>

<section>
<h2>Most confident mistakes</h2>
{% if mistakes %}
<p class="note">Under each image: the true class, then in orange the predicted class, with the probability \
that the model gave it.</p>
<ol class="mistakes">
{% for mistake, picture in mistakes %}
<li><img src="{{ picture.uri }}" alt="{{ picture.alt }}">
{{ facts.classes[mistake.label].name }}<br><strong>{{ facts.classes[mistake.predicted].name }}</strong><br>\
{{ mistake.probability|percent }}</li>
{% endfor %}
</ol>
{% else %}
<p>None kept.</p>
{% endif %}
</section>

<div class="pair">
<section>
<h2>Training parameters</h2>
<table class="plain"><tbody>
{% for name, value in params.items() %}
<tr><th scope="row"><code>{{ name }}</code></th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table>
</section>
<section>
<h2>Lineage</h2>
<table class="plain"><tbody>
<tr><th scope="row">Dataset</th><td><code>{{ facts.dataset }}</code></td></tr>
<tr><th scope="row">Examples</th><td><code>{{ examples.digest }}</code></td></tr>
<tr><th scope="row">Model</th><td><code>{{ facts.model_digest }}</code></td></tr>
{% if model.facts.started_from %}
<tr><th scope="row">Started from</th><td><code>{{ model.facts.started_from }}</code></td></tr>
{% endif %}
{% if facts.comparison %}
<tr><th scope="row">Champion</th><td><code>{{ facts.comparison.model_digest }}</code></td></tr>
{% endif %}
</tbody></table>
</section>
</div>
</main>
{% endblock %}
"""
