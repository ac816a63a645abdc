"""The page of the served models: versions, champion, history, accuracy over time, and how to roll back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ridgeline.page import render_page
from ridgeline.registry import HistoryEntry, Registry
from ridgeline.store import StoreError

SHOWN = 30  # the latest entries; the history itself keeps all
WIDTH, HEIGHT, MARGIN = 720, 200, 40


@dataclass(frozen=True)
class Point:
    """An entry of the history in the chart, in the SVG's units."""

    x: float
    y: float
    entry: HistoryEntry


@dataclass(frozen=True)
class Chart:
    """The accuracy of each entry of a history, oldest first, and the grid: the height of some accuracies."""

    points: list[Point]
    grid: list[tuple[float, float]]


def _chart(entries: list[HistoryEntry]) -> Chart:
    accuracies = [entry.accuracy for entry in entries]
    middle = (min(accuracies) + max(accuracies)) / 2
    span = max(max(accuracies) - min(accuracies), 0.002)
    step = (WIDTH - 2 * MARGIN) / (len(entries) + 1)

    def height(accuracy: float) -> float:
        return round(HEIGHT / 2 - (accuracy - middle) / span * (HEIGHT - 2 * MARGIN), 1)

    points = [Point(round(MARGIN + step * i, 1), height(e.accuracy), e) for i, e in enumerate(entries, start=1)]
    return Chart(points, [(height(a), a) for a in (middle - span / 2, middle, middle + span / 2)])


def render(registry: Registry, dag_of: Callable[[Collection[str]], Mapping[str, str]]) -> str:
    """Return the page as HTML; a model whose history can't be read is said to be so in its place.

    Args:
        registry: The served models.
        dag_of: Returns, of given runs by id, the DAG of each that the reader may see.
    """
    models: list[dict[str, Any]] = []
    run_ids: set[str] = set()
    for name in registry.model_names():
        try:
            history = registry.history(name)
        except StoreError as error:
            models.append({"name": name, "problem": str(error)})
            continue
        run_ids |= {entry.run_id for entry in history}
        pushes = {entry.version: entry for entry in history if entry.action == "push"}
        models.append(
            {
                "name": name,
                "problem": "",
                "champion": registry.champion(name),
                "chart": _chart(history[-SHOWN:]),
                "versions": [(v, pushes.get(v)) for v in reversed(registry.versions(name))],
                "history": history[: -SHOWN - 1 : -1],
                "num_older": max(0, len(history) - SHOWN),
                "previous": registry.previous(name),
            }
        )
    links = {run: f"dags/{quote(dag, safe='')}/runs/{quote(run, safe='')}" for run, dag in dag_of(run_ids).items()}
    size = {"width": WIDTH, "height": HEIGHT, "margin": MARGIN}
    return render_page(TEMPLATE, models=models, links=links, root=registry.root, size=size, synthetic=False)


TEMPLATE = """\
{% extends "page" %}
{% block title %}Models{% endblock %}
{% block style %}
h2{font-size:1.4rem}
h3{font-size:1rem;margin:20px 0 4px}
section .tiles div{padding:0}
.champion{display:inline-block;padding:0 10px;border-radius:99px;background:#cfe5f5}
.plain thead th{text-align:left}
.chart{display:block;width:100%;max-width:860px;height:auto}
.chart line{stroke:#e5e7eb}
.chart polyline{fill:none;stroke:#0072b2;stroke-width:2}
.chart circle{fill:#0072b2}
.chart circle.rollback{fill:#d55e00}
.chart circle.now{stroke:#111;stroke-width:2}
.chart text{font-size:12px;fill:#374151}
pre{margin:8px 0;padding:10px 14px;background:#f3f4f6;border-radius:6px;overflow-x:auto}
{% endblock %}
{% macro day(moment) %}{{ moment.strftime("%Y-%m-%d %H:%M") }} UTC{% endmacro %}
{% macro run(run_id) %}{% if run_id in links %}<a href="{{ links[run_id] }}">{{ run_id }}</a>\
{% else %}{{ run_id }}{% endif %}{% endmacro %}
{% block body %}
<header><h1>Models</h1><p class="note">Served from <code>{{ root }}</code></p></header>
<main>
{% for model in models %}
<section>
<h2>{{ model.name }}</h2>
{% if model.problem %}
<p>{{ model.problem }}</p>
{% else %}
{% set champion = model.champion %}
{% if champion %}
<dl class="tiles">
<div><dt>Champion</dt><dd>Version {{ champion.version }}<small>since {{ day(champion.at) }}</small></dd></div>
<div><dt>Its test accuracy</dt><dd>{{ champion.accuracy|percent(2) }}<small>as measured before it was pushed\
</small></dd></div>
<div><dt>Versions to go back to</dt><dd>{{ model.versions|length - 1 }}<small>\
{% if model.previous %}the one before: version {{ model.previous.version }}{% endif %}</small></dd></div>
</dl>
{% endif %}
<h3>Accuracy over time</h3>
<svg class="chart" viewBox="0 0 {{ size.width }} {{ size.height }}" role="img">
<title>Test accuracy of each champion, oldest first: \
{% for point in model.chart.points %}version {{ point.entry.version }} {{ point.entry.accuracy|percent(2) }}\
{{ ", " if not loop.last }}{% endfor %}</title>
{% for y, accuracy in model.chart.grid %}
<line x1="{{ size.margin + 16 }}" x2="{{ size.width }}" y1="{{ y }}" y2="{{ y }}"/>
<text x="{{ size.margin + 10 }}" y="{{ y + 4 }}" text-anchor="end">{{ accuracy|percent(2) }}</text>
{% endfor %}
<polyline points="{% for point in model.chart.points %}{{ point.x }},{{ point.y }} {% endfor %}"/>
{% for point in model.chart.points %}
<circle cx="{{ point.x }}" cy="{{ point.y }}" r="5" class="{{ point.entry.action }}{{ " now" if loop.last }}">\
<title>{{ point.entry.action }}, version {{ point.entry.version }}, {{ point.entry.accuracy|percent(2) }}, \
{{ day(point.entry.at) }}</title></circle>
<text x="{{ point.x }}" y="{{ size.height - 20 }}" text-anchor="middle">{{ point.entry.version }}</text>
{% if loop.first or loop.last %}
<text x="{{ point.x }}" y="{{ size.height - 4 }}" text-anchor="middle">{{ point.entry.at.date() }}</text>
{% endif %}
{% endfor %}
</svg>
<p class="note">One point each time that a version became the champion, oldest first, with the version below it; \
rollbacks are orange.</p>

<h3>Versions</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Versions of {{ model.name }}">
<table class="plain">
<thead><tr><th scope="col">Version</th><th scope="col">Test accuracy</th><th scope="col">Model</th>\
<th scope="col">Pushed</th><th scope="col">Lineage: its run</th></tr></thead>
<tbody>
{% for version, push in model.versions %}
<tr><th scope="row">{{ version }}{% if champion and version == champion.version %} \
<span class="champion">champion</span>{% endif %}</th>
{% if push %}
<td>{{ push.accuracy|percent(2) }}</td><td><code>{{ push.model_digest[:12] }}</code></td><td>{{ day(push.at) }}</td>\
<td>{{ run(push.run_id) }}</td>
{% else %}
<td colspan="4">not in the history</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
</div>

<h3>History</h3>
<div class="scroll" tabindex="0" role="region" aria-label="History of {{ model.name }}">
<table class="plain">
<thead><tr><th scope="col">When</th><th scope="col">What</th><th scope="col">Who</th><th scope="col">Why</th>\
<th scope="col">Run</th></tr></thead>
<tbody>
{% for entry in model.history %}
<tr><td>{{ day(entry.at) }}</td><td>{{ "pushed" if entry.action == "push" else "rolled back to" }} \
version {{ entry.version }}{{ " by force" if entry.action == "push" and entry.reason }}</td>\
<td>{{ entry.by or "–" }}</td>
<td>{{ entry.reason or ("it was blessed" if entry.action == "push" else "–") }}</td>\
<td>{{ run(entry.run_id) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if model.num_older %}
<p class="note">{{ model.num_older }} older entries are in history.jsonl.</p>
{% endif %}

<h3>Roll back</h3>
<p>Trigger the DAG <em>Models: roll back</em> (<code>rollback_model</code>) with the model, a version and a reason, \
or run on this host:</p>
<pre>ridgeline models rollback {{ model.name }} {{ model.previous.version if model.previous else "VERSION" }} \
--reason "..."</pre>
<p class="note">The version is checked first; nothing is copied or deleted, and the rollback is in the history.</p>
{% endif %}
</section>
{% else %}
<section><h2>None yet</h2>
<p>The first run of the DAG <code>fashion_mnist_training</code> whose model is blessed pushes one.</p></section>
{% endfor %}
</main>
{% endblock %}
"""
