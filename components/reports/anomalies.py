"""The HTML report on the examples. The step `validate` writes it as part of its output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.reports.figures import BLUE, VERMILION, Picture, new_figure, plot_style, svg
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.example_anomalies import Evidence, ExampleAnomaliesFacts, Finding
from ridgeline.artifacts.example_statistics import ExampleStatistics
from ridgeline.artifacts.examples import SPLITS, Examples
from ridgeline.artifacts.schema import Schema
from ridgeline.html_page import render_page
from ridgeline.thumbnail import thumbnail

MAX_CLASSES = 30  # of which samples are shown
NUM_SAMPLES = 10
NUM_GROUPS = 6  # of the evidence of one finding
NUM_UNREADABLE = 200


def render(
    facts: ExampleAnomaliesFacts,
    dataset: Dataset,
    examples: Examples,
    statistics: ExampleStatistics,
    schema: Schema,
    champion: ExampleStatistics | None,
) -> str:
    """Return the report as one HTML document. Its size is bounded, whatever the number of classes.

    Args:
        facts: The findings.
        dataset: What the examples were made from.
        examples: The examples, for the images.
        statistics: Their statistics.
        schema: What the examples were checked against.
        champion: Statistics of the examples that the champion was trained on; None if there are none.

    Returns:
        HTML that opens without a network; the same text for the same arguments.
    """
    with plot_style():
        return render_page(
            TEMPLATE,
            facts=facts,
            synthetic=facts.synthetic,
            findings=[(finding, _evidence(finding, examples)) for finding in facts.findings],
            splits=SPLITS,
            totals=[statistics.facts.splits[name].num_examples for name in SPLITS],
            schema=schema.facts,
            formats=dataset.facts.formats,
            unreadable=dataset.facts.unreadable[:NUM_UNREADABLE],
            num_unreadable=len(dataset.facts.unreadable),
            balance=_balance(statistics, champion, schema),
            figures=[_histogram(name, statistics, champion) for name in ("brightness", "contrast", "pixels")],
            means=[_mean(statistics, name, kind) for name in SPLITS for kind in ("mean", "deviation")],
            samples=_samples(examples),
            examples=examples,
            earlier=champion,
        )


def _image(pixels: np.ndarray, alt: str) -> Picture:
    return Picture(thumbnail(pixels), alt)


def _shown(examples: Examples, place: Evidence) -> tuple[Evidence, str, Picture]:
    images, _ = examples.split(place.split).rows(place.row, place.row + 1)  # type: ignore[arg-type]
    name = examples.facts.class_names[place.label]
    return place, name, _image(images[0], f"Image {place.row} of the {place.split} split, {name}.")


def _evidence(finding: Finding, examples: Examples) -> list[list[tuple[Evidence, str, Picture]]]:
    return [[_shown(examples, place) for place in group] for group in finding.evidence[:NUM_GROUPS]]


def _balance(
    statistics: ExampleStatistics, champion: ExampleStatistics | None, schema: Schema
) -> list[tuple[str, list[int], int | None, int]]:
    """Return each class's name, its counts by split, its count in the champion's training split, and its minimum."""
    facts = statistics.facts
    then = champion.facts if champion else None
    old = dict(zip(then.class_names, then.splits["train"].class_counts, strict=True)) if then else {}
    rows = zip(facts.class_names, *(facts.splits[split].class_counts for split in SPLITS), strict=True)
    fewest = schema.facts.min_class_examples
    return [(name, list(counts), old.get(name), fewest.get(name, 0)) for name, *counts in rows]


def _histogram(name: str, statistics: ExampleStatistics, champion: ExampleStatistics | None) -> Picture:
    """Draw a distribution: training and test split, and the champion's training split."""
    figure, axes = new_figure()
    lines: Sequence[tuple[ExampleStatistics, str, str, str, str]] = [
        (statistics, "train", "train", BLUE, "-"),
        (statistics, "test", "test", BLUE, ":"),
        *([(champion, "train", "train, champion's", VERMILION, "--")] if champion else []),
    ]
    for source, split, label, color, line in lines:
        counts = source.array(name, split)
        counts = counts.sum(axis=0) if counts.ndim > 1 else counts
        shares = counts[: len(counts) // 4 * 4].reshape(-1, 4).sum(axis=1) / max(1, counts.sum())
        axes.step(np.arange(len(shares)) * 4, shares, line, where="post", color=color, label=label)
    labels = {
        "brightness": "mean pixel value of an image",
        "contrast": "standard deviation of an image's pixels",
        "pixels": "pixel value",
    }
    axes.set(xlabel=labels[name], ylabel=f"share of {'pixels' if name == 'pixels' else 'images'}")
    if name == "pixels":
        axes.set_yscale("log")
    axes.legend()
    caption = f"{name.capitalize()}{', all channels' if name == 'pixels' else ''}."
    return Picture(svg(figure), f"Line chart of the distribution of {labels[name]}.", caption)


def _mean(statistics: ExampleStatistics, split: str, kind: str) -> Picture:
    pixels = np.clip(np.rint(statistics.array(kind, split)), 0, 255).astype(np.uint8)
    title = "Mean" if kind == "mean" else "Deviation"
    picture = _image(pixels, f"{title} image of the {split} split.")
    return Picture(picture.uri, picture.alt, f"{split}, {title.lower()}")


def _samples(examples: Examples) -> list[tuple[str, list[Picture]]]:
    """Return the first training images of each class."""
    split = examples.split("train")
    labels = np.asarray(split.labels)
    found = []
    for label, name in enumerate(examples.facts.class_names[:MAX_CLASSES]):
        rows = np.flatnonzero(labels == label)[:NUM_SAMPLES]
        pictures = [_image(split.rows(int(row), int(row) + 1)[0][0], f"Training image {row}, {name}.") for row in rows]
        found.append((name, pictures))
    return found


TEMPLATE = """\
{% extends "page" %}
{% from "macros" import figure %}
{% block title %}Examples of {{ facts.dataset }}{% endblock %}
{% block style %}
.finding{border-left:6px solid #6b7280;padding:0 0 0 14px;margin:0 0 18px}
.finding.error{border-color:#d55e00}
.finding.warning{border-color:#e69f00}
.finding h3{font-size:1rem;margin:0}
.row{display:flex;flex-wrap:wrap;gap:6px 8px;list-style:none;padding:0;margin:6px 0}
.row li{font-size:.75rem;text-align:center;overflow-wrap:anywhere;max-width:110px}
.row img{display:block;width:64px;height:64px;object-fit:contain;image-rendering:pixelated;margin:0 auto}
.group{border:1px solid #e5e7eb;border-radius:8px;padding:4px 8px}
.samples img{width:48px;height:48px}
{% endblock %}
{% block body %}
<header>
<h1>Examples of {{ facts.dataset }}</h1>
<p class="note">Checked before training.</p>
</header>
<main>
<div class="verdict{{ "" if facts.num_errors else " blessed" }}">
<h2>{% if facts.accepted %}Errors accepted{% elif facts.num_errors %}Errors: the run stops before training\
{% else %}No errors{% endif %}</h2>
<ul>
<li>{{ facts.num_errors }} errors, {{ facts.num_warnings }} warnings.</li>
{% if facts.accepted %}
<li>Accepted: {{ facts.accepted }}</li>
{% endif %}
<li>{% if earlier %}Compared with the examples that the champion was trained on.\
{% else %}No champion's examples to compare with: the test split was compared with the training split.{% endif %}</li>
</ul>
</div>

<section>
<h2>Anomalies</h2>
{% for finding, groups in findings %}
<div class="finding {{ finding.severity }}">
<h3>{{ finding.severity|capitalize }}: {{ finding.check }}</h3>
<p>{{ finding.message }}. {{ finding.advice }}</p>
{% if groups %}
<ul class="row">
{% for group in groups %}
<li class="group" style="max-width:none"><ul class="row">
{% for place, name, picture in group %}
<li><img src="{{ picture.uri }}" alt="{{ picture.alt }}">{{ name }}<br>\
{{ place.file or place.split ~ " " ~ place.row }}</li>
{% endfor %}
</ul></li>
{% endfor %}
</ul>
{% endif %}
</div>
{% else %}
<p>None found.</p>
{% endfor %}
</section>

<section>
<h2>Class balance</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Class balance">
<table>
<thead><tr><th scope="col">Class</th>
{% for name in splits %}
<th scope="col">{{ name }}</th>
{% endfor %}
{% if earlier %}<th scope="col">champion's train</th>{% endif %}
<th scope="col">minimum of train</th>
</tr></thead>
<tbody>
{% for name, counts, old, fewest in balance %}
<tr><th scope="row">{{ name }}</th>
{% for count in counts %}
<td>{{ "{:,}".format(count) }}</td>
{% endfor %}
{% if earlier %}<td>{{ "{:,}".format(old) if old is not none else "new" }}</td>{% endif %}
<td>{{ "{:,}".format(fewest) }}</td>
</tr>
{% endfor %}
<tr><th scope="row">All</th>
{% for total in totals %}
<td>{{ "{:,}".format(total) }}</td>
{% endfor %}
{% if earlier %}<td></td>{% endif %}
<td></td>
</tr>
</tbody>
</table>
</div>
</section>

<section>
<h2>Distributions</h2>
<div class="pair">
{% for picture in figures %}
{{ figure(picture) }}
{% endfor %}
</div>
</section>

<section>
<h2>Mean and deviation</h2>
<ul class="row">
{% for picture in means %}
<li><img src="{{ picture.uri }}" alt="{{ picture.alt }}">{{ picture.caption }}</li>
{% endfor %}
</ul>
</section>

<section>
<h2>Samples</h2>
<p class="note">The first training images of each class\
{% if examples.facts.class_names|length > samples|length %}, for the first {{ samples|length }} classes{% endif %}.</p>
{% for name, pictures in samples %}
<p class="note">{{ name }}</p>
<ul class="row samples">
{% for picture in pictures %}
<li><img src="{{ picture.uri }}" alt="{{ picture.alt }}"></li>
{% endfor %}
</ul>
{% endfor %}
</section>

{% if formats or num_unreadable %}
<section>
<h2>Files</h2>
<p class="note">As they are in the folder, before they got one size and one colour mode.</p>
<table class="plain"><tbody>
{% for kind, count in formats.items() %}
<tr><th scope="row">{{ kind }}</th><td>{{ "{:,}".format(count) }}</td></tr>
{% endfor %}
</tbody></table>
{% if num_unreadable %}
<p>{{ "{:,}".format(num_unreadable) }} unreadable files were left out:</p>
<ul>
{% for entry in unreadable %}
<li><code>{{ entry.file }}</code>: {{ entry.reason }}</li>
{% endfor %}
{% if num_unreadable > unreadable|length %}<li>and {{ num_unreadable - unreadable|length }} more</li>{% endif %}
</ul>
{% endif %}
</section>
{% endif %}

<section>
<h2>Schema</h2>
<p class="note">What the examples must look like. To change it, edit a copy of <code>schema.json</code> in
<code>Schema/{{ facts.schema_digest }}</code> and name it in <code>schema.file</code>.</p>
<table class="plain"><tbody>
<tr><th scope="row">Image shape</th><td>{{ schema.image_shape|join(" × ") }}</td></tr>
<tr><th scope="row">Classes</th><td>{{ schema.class_names[:100]|join(", ") }}\
{% if schema.class_names|length > 100 %} and {{ schema.class_names|length - 100 }} more{% endif %}</td></tr>
{% for name, allowed in (("brightness", schema.brightness), ("contrast", schema.contrast)) %}
<tr><th scope="row">Mean {{ name }} of a split</th><td>{{ allowed.min }} to {{ allowed.max }}</td></tr>
{% endfor %}
</tbody></table>
</section>

<section>
<h2>Lineage</h2>
<table class="plain"><tbody>
<tr><th scope="row">Dataset</th><td><code>{{ facts.dataset }}</code></td></tr>
<tr><th scope="row">Examples</th><td><code>{{ facts.examples_digest }}</code></td></tr>
{% if facts.champion %}
<tr><th scope="row">Champion's statistics</th><td><code>{{ facts.champion }}</code></td></tr>
{% endif %}
</tbody></table>
</section>
</main>
{% endblock %}
"""
