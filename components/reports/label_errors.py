"""The HTML report on suspected label errors. The step `label_errors` writes it as part of its output."""

from __future__ import annotations

from components.reports.figures import Picture
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.label_errors import LabelErrorsFacts, Suspect
from ridgeline.html_page import render_page
from ridgeline.thumbnail import thumbnail

NUM_PAIRS = 20  # shown
USEFUL_AGREEMENT = 0.7  # below it, the classifier is wrong too often for its list to be of use


def render(facts: LabelErrorsFacts, examples: Examples) -> str:
    """Return the report as one HTML document. Its size is bounded by the number of suspects in the facts.

    Args:
        facts: The suspects.
        examples: The examples, for the images.

    Returns:
        HTML that opens without a network; the same text for the same arguments.
    """
    total = sum(split.num_examples for split in facts.splits.values())
    agreement = sum(split.agreement * split.num_examples for split in facts.splits.values()) / total
    return render_page(
        TEMPLATE,
        facts=facts,
        is_weak=agreement < USEFUL_AGREEMENT,
        synthetic=facts.synthetic,
        names=facts.class_names,
        pairs=facts.pairs[:NUM_PAIRS],
        num_suspects=sum(split.num_suspects for split in facts.splits.values()),
        num_examples=total,
        suspects=[(suspect, _picture(suspect, facts, examples)) for suspect in facts.suspects],
        has_files=any(suspect.file for suspect in facts.suspects),
    )


def _picture(suspect: Suspect, facts: LabelErrorsFacts, examples: Examples) -> Picture:
    images, _ = examples.split(suspect.split).rows(suspect.row, suspect.row + 1)  # type: ignore[arg-type]
    alt = f"Image {suspect.row} of the {suspect.split} split, labelled {facts.class_names[suspect.label]}."
    return Picture(thumbnail(images[0]), alt)


TEMPLATE = """\
{% extends "page" %}
{% block title %}Suspected label errors of {{ facts.dataset }}{% endblock %}
{% block style %}
.suspects td,.suspects th{text-align:left;vertical-align:middle;overflow-wrap:anywhere}
.suspects img{display:block;width:64px;height:64px;object-fit:contain;image-rendering:pixelated}
.suspects .number{text-align:right}
{% endblock %}
{% block body %}
<header>
<h1>Suspected label errors of {{ facts.dataset }}</h1>
<p class="note">Found after training. They do not stop the run.</p>
</header>
<main>
<div class="verdict{{ "" if num_suspects else " blessed" }}">
<h2>{{ "{:,}".format(num_suspects) }} of {{ "{:,}".format(num_examples) }} labels are suspicious</h2>
<ul>
{% for name, split in facts.splits.items() %}
<li>{{ name }}: {{ "{:,}".format(split.num_suspects) }} of {{ "{:,}".format(split.num_examples) }} images. The \
predicted label is the given one for {{ split.agreement|percent }}.</li>
{% endfor %}
{% if is_weak %}
<li><strong>Most suspects have the right label: the network is too weak to find wrong ones.</strong> Train a better \
one first.</li>
{% endif %}
<li>The test split was not read.</li>
</ul>
</div>

{% if num_suspects %}
<section>
<h2>What to do</h2>
<ul>
<li>Look at the images below. The most suspicious come first; further down, the label is right more often.</li>
<li>If a label is wrong, move the file into the folder of its class, or correct it in <code>labels.csv</code> or in \
the dataset. Then run again.</li>
<li>Many suspects of one pair of labels can have one cause, such as a batch that was sorted wrongly. Two classes that \
look alike give many suspects, too, and most of these have the right label.</li>
<li>All suspects are in <code>suspects.csv</code>, beside this report.</li>
</ul>
</section>

<section>
<h2>Pairs of labels</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Pairs of labels">
<table>
<thead><tr><th scope="col">Label</th><th scope="col">Looks like</th><th scope="col">Suspects</th>\
<th scope="col">Images with the label</th><th scope="col">Share</th></tr></thead>
<tbody>
{% for pair in pairs %}
<tr><th scope="row">{{ names[pair.label] }}</th><td>{{ names[pair.suggested] }}</td>\
<td>{{ "{:,}".format(pair.count) }}</td><td>{{ "{:,}".format(pair.num_examples) }}</td>\
<td>{{ (pair.count / pair.num_examples)|percent }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>

<section>
<h2>Suspects</h2>
<p class="note">The first {{ "{:,}".format(suspects|length) }} of {{ "{:,}".format(num_suspects) }}.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Suspects">
<table class="suspects">
<thead><tr><th scope="col">Image</th><th scope="col">Label</th><th scope="col">Looks like</th>\
<th scope="col" class="number">Probability</th><th scope="col">Row</th>\
{% if has_files %}<th scope="col">File</th>{% endif %}</tr></thead>
<tbody>
{% for suspect, picture in suspects %}
<tr><td><img src="{{ picture.uri }}" alt="{{ picture.alt }}"></td><td>{{ names[suspect.label] }}</td>\
<td>{{ names[suspect.suggested] }}</td><td class="number">{{ "%.3f"|format(suspect.probability) }}</td>\
<td>{{ suspect.split }} {{ suspect.row }}</td>{% if has_files %}<td><code>{{ suspect.file }}</code></td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

<section>
<h2>Method</h2>
<p>A linear classifier on the network's last hidden layer predicts the label of each image. It was fitted to the given \
labels of four fifths of the images, without the image itself. The network was trained on the training split, wrong \
labels included: what it has memorized stays hidden there more often than in the validation split.</p>
<table class="plain"><tbody>
<tr><th scope="row">Dataset</th><td><code>{{ facts.dataset }}</code></td></tr>
<tr><th scope="row">Examples</th><td><code>{{ facts.examples_digest }}</code></td></tr>
<tr><th scope="row">Model</th><td><code>{{ facts.model_digest }}</code></td></tr>
</tbody></table>
</section>
</main>
{% endblock %}
"""
