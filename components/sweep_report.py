"""The self-contained HTML report of a sweep: what L1 and L2 do, against their strength.

Not a step: `components.sweep` writes the page as part of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from components.page import BLUE, GREY, VERMILION, Picture, flat, new_figure, plot_style, render_page, svg
from ridgeline.artifacts.sweep_result import SweepResultFacts, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 0.01  # how much validation accuracy the page's examples of a strong penalty may cost
SHOWN = 4  # distributions in one picture, besides that without a penalty
NAMES = {"none": "no penalty", "l1": "L1", "l2": "L2", "l1_l2": "L1 + L2"}
COLOURS = {"none": GREY, "l1": BLUE, "l2": VERMILION, "l1_l2": "#009e73"}
LINES = {"l1": "o-", "l2": "s--", "l1_l2": "D"}


def render(facts: SweepResultFacts, histograms: np.ndarray, edges: np.ndarray) -> str:
    """Return the report as one HTML document.

    Args:
        facts: The trials and the winner.
        histograms: Each trial's nonzero weights by value, int64 ``[trials, kernels, bins]``.
        edges: The bins' limits, float64 ``[bins + 1]``.

    Returns:
        HTML that opens without a network; the same text for the same arguments.
    """
    counts = histograms.sum(axis=1)
    finished = {i: trial for i, trial in enumerate(facts.trials) if not trial.diverged}
    best = max(trial.metrics["val_accuracy"] for trial in finished.values())
    near = {
        kind: max(
            (i for i, t in finished.items() if t.kind == kind and t.metrics["val_accuracy"] >= best - NEAR),
            key=lambda i: (facts.trials[i].l1, facts.trials[i].l2),
            default=None,
        )
        for kind in NAMES
    }
    chosen = [near[kind] for kind in ("none", "l1", "l2")]
    with plot_style():
        return render_page(
            TEMPLATE,
            facts=facts,
            synthetic=facts.synthetic,
            winner=facts.trials[facts.winner],
            label=_label,
            near_share=NEAR,
            near=[facts.trials[i] for i in chosen if i is not None],
            sparsest=max(
                (t for t in finished.values() if t.metrics["val_accuracy"] >= best - NEAR), key=lambda t: t.zero_share
            ),
            best=best,
            curves=_curves(facts),
            spreads=[
                _distributions([i for i, t in finished.items() if t.kind in ("none", kind)], facts, counts, edges, kind)
                for kind in ("l1", "l2")
                if any(t.kind == kind for t in finished.values())
            ],
            params=flat(facts.training),
        )


def _label(trial: Trial) -> str:
    """Return a trial's name for people: ``L1 0.001``."""
    strengths = [f"{strength:g}" for strength in (trial.l1, trial.l2) if strength]
    return " ".join([NAMES[trial.kind], " and ".join(strengths)]).strip()


def _curves(facts: SweepResultFacts) -> list[Picture]:
    def curve(title: str, unit: str, value: Callable[[Trial], float], log: bool = False) -> Picture:
        return _curve(facts, title, unit, value, log)

    return [
        curve("Validation accuracy", "share of images", lambda t: t.metrics["val_accuracy"]),
        curve("Validation cross-entropy", "nats, without the penalty", lambda t: t.cross_entropy),
        curve("Zeros", "% of all weights exactly zero", lambda t: 100 * t.zero_share),
        curve("Training loss", "nats, with the penalty; log scale", lambda t: t.metrics["loss"], log=True),
        curve("L1 norm", "sum of |w|, log scale", lambda t: t.l1_norm, log=True),
        curve("L2 norm", "root of the sum of w², log scale", lambda t: t.l2_norm, log=True),
    ]


def _curve(facts: SweepResultFacts, title: str, unit: str, value: Callable[[Trial], float], log: bool) -> Picture:
    """Draw one quantity against the strength, a line for each penalty."""
    figure, axes = new_figure()
    described = []
    for kind in NAMES:
        trials = sorted((t for t in facts.trials if t.kind == kind and not t.diverged), key=lambda t: t.l1 + t.l2)
        if not trials:
            continue
        values = [value(trial) for trial in trials]
        described.append(f"{NAMES[kind]} {values[0]:.4g}" + (f" to {values[-1]:.4g}" if len(values) > 1 else ""))
        if kind == "none":
            axes.axhline(values[0], color=GREY, linestyle=":", label=NAMES[kind])
        else:
            strengths = [trial.l1 + trial.l2 for trial in trials]
            axes.plot(strengths, values, LINES[kind], color=COLOURS[kind], markersize=4, label=NAMES[kind])
    winner = facts.trials[facts.winner]
    if winner.kind != "none":
        axes.plot(
            winner.l1 + winner.l2, value(winner), "o", color="#111", fillstyle="none", markersize=11, label="chosen"
        )
    axes.set(xlabel="strength, log scale", ylabel=unit, xscale="log", yscale="log" if log else "linear")
    axes.legend()
    alt = f"{title} ({unit}) against the penalty's strength, from weakest to strongest: {'; '.join(described)}."
    return Picture(svg(figure), alt, f"{title}.")


def _distributions(
    indices: Sequence[int], facts: SweepResultFacts, counts: np.ndarray, edges: np.ndarray, kind: str
) -> Picture:
    """Overlay the weight distributions of one penalty's strengths, and draw the shares of exact zeros beside."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    dense = [i for i in indices if facts.trials[i].kind == "none"]
    others = sorted((i for i in indices if i not in dense), key=lambda i: facts.trials[i].l1 + facts.trials[i].l2)
    picked = np.unique(np.linspace(0, len(others) - 1, SHOWN).round().astype(int))
    shown = [*dense, *(others[i] for i in picked)]
    figure = Figure(figsize=(7.2, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(2.5, 1))
    half_width = _half_width(counts[shown], edges)
    colour = np.array(to_rgb(COLOURS[kind]))
    shares = []
    for rank, i in enumerate(shown):
        trial = facts.trials[i]
        fade = 0.75 * (1 - (rank - len(dense)) / max(1, len(picked) - 1))
        shade = GREY if i in dense else tuple(colour + (1 - colour) * fade)
        label = NAMES["none"] if i in dense else f"{trial.l1 + trial.l2:g}"
        left.stairs(counts[i], edges, color=shade, label=label, fill=i in dense, alpha=0.35 if i in dense else 1)
        shares.append((label, trial.zero_share, shade))
    left.set(xlim=(-half_width, half_width), yscale="log", xlabel="weight, zeros left out", ylabel="count, log scale")
    _bars(right, shares)
    text = ", ".join(f"{100 * share:.1f} % at {label}" for label, share, _ in shares)
    alt = f"Overlaid weight distributions under {NAMES[kind]}, by strength. Exactly zero: {text}."
    return Picture(
        svg(figure), alt, f"{NAMES[kind]}: weights by value, and the share that is exactly zero, by strength."
    )


def _half_width(counts: np.ndarray, edges: np.ndarray) -> float:
    """Return the smallest limit between which lie 99.9 % of the weights of every shown trial."""
    folded = counts[:, : counts.shape[1] // 2][:, ::-1] + counts[:, counts.shape[1] // 2 :]
    inside = np.cumsum(folded, axis=1) >= 0.999 * folded.sum(axis=1, keepdims=True)
    return float(edges[counts.shape[1] // 2 + 1 + int(inside.argmax(axis=1).max())])


def _bars(axes: Axes, shares: Sequence[tuple[str, float, object]]) -> None:
    for position, (_, share, shade) in enumerate(reversed(shares)):
        axes.barh(position, 100 * share, color=shade, height=0.7)
        axes.text(100 * share + 2, position, f"{100 * share:.1f}", va="center", fontsize=8)
    axes.set(xlim=(0, 118), xlabel="% exactly zero", yticks=range(len(shares)))
    axes.set_yticklabels([label for label, _, _ in reversed(shares)])
    axes.grid(visible=False, axis="y")


TEMPLATE = """\
{% extends "page" %}
{% from "macros" import figure %}
{% block title %}Regularization path on {{ facts.dataset }}{% endblock %}
{% block style %}
.wide-figures img{max-width:760px}
tr.chosen th,tr.chosen td{background:#e0effa;font-weight:600}
{% endblock %}
{% block body %}
<header>
<h1>Regularization path on {{ facts.dataset }}</h1>
<p class="note">{{ facts.trials|length }} trainings that differ in their penalty alone. Chosen on the validation \
split; the test split was not read.</p>
</header>
<main>
<div class="verdict blessed">
<h2>Chosen: {{ label(winner) }}</h2>
<ul><li>{{ facts.reason }}</li></ul>
</div>

<dl class="tiles">
<div><dt>Validation accuracy</dt><dd>{{ winner.metrics.val_accuracy|percent(2) }}<small>the chosen training\
{% if best > winner.metrics.val_accuracy %}; the highest is {{ best|percent(2) }}{% endif %}</small></dd></div>
<div><dt>Its weights that are exactly zero</dt><dd>{{ winner.zero_share|percent }}<small>of \
{{ "{:,}".format(winner.num_weights) }} in the kernels</small></dd></div>
<div><dt>Sparsest within {{ near_share|percent(0) }} of the highest</dt><dd>{{ sparsest.zero_share|percent }}<small>\
{{ label(sparsest) }}, {{ sparsest.metrics.val_accuracy|percent(2) }} accuracy</small></dd></div>
</dl>

<section>
<h2>What each penalty does to the weights</h2>
<p><strong>L1</strong> takes the same amount from every weight, whatever its size. Weights that the data do not hold \
up reach zero and stay there: few remain. <strong>L2</strong> shrinks each weight in proportion to its size. Large \
weights lose most, small ones next to nothing: the work is spread over many small weights, and none becomes zero.</p>
{% for picture in spreads %}
<div class="wide-figures">{{ figure(picture) }}</div>
{% endfor %}
{% if near|length > 1 %}
<p class="note">The strongest of each kind within {{ near_share|percent(0) }} of the highest validation accuracy:</p>
<div class="scroll" tabindex="0" role="region" aria-label="The strongest penalties that cost little accuracy">
<table>
<thead><tr><th scope="col">Penalty</th><th scope="col">Validation accuracy</th><th scope="col">Zeros</th>\
<th scope="col">L1 norm</th><th scope="col">L2 norm</th></tr></thead>
<tbody>
{% for trial in near %}
<tr><th scope="row">{{ label(trial) }}</th><td>{{ trial.metrics.val_accuracy|percent(2) }}</td>\
<td>{{ trial.zero_share|percent }}</td><td>{{ "%.1f"|format(trial.l1_norm) }}</td>\
<td>{{ "%.2f"|format(trial.l2_norm) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</section>

<section>
<h2>Against strength</h2>
<div class="pair">
{% for picture in curves %}
{{ figure(picture) }}
{% endfor %}
</div>
</section>

<section>
<h2>All trainings</h2>
<p class="note">Losses are in nats and include the penalty; cross-entropy does not. Norms are over all kernels.</p>
<div class="scroll" tabindex="0" role="region" aria-label="All trainings">
<table>
<thead><tr><th scope="col">Penalty</th><th scope="col">Solver</th><th scope="col">Validation accuracy</th>\
<th scope="col">Validation cross-entropy</th><th scope="col">Validation loss</th><th scope="col">Training accuracy</th>\
<th scope="col">Training loss</th><th scope="col">Zeros</th>
{% for kernel in winner.kernels %}
<th scope="col">in {{ kernel.name }}</th>
{% endfor %}
<th scope="col">L1 norm</th><th scope="col">L2 norm</th></tr></thead>
<tbody>
{% for trial in facts.trials %}
<tr{% if loop.index0 == facts.winner %} class="chosen"{% endif %}><th scope="row">{{ label(trial) }}\
{% if loop.index0 == facts.winner %} &#10003; chosen{% endif %}</th><td>{{ trial.solver }}</td>
{% if trial.diverged %}
<td colspan="{{ 8 + winner.kernels|length }}">diverged</td>
{% else %}
<td>{{ trial.metrics.val_accuracy|percent(2) }}</td><td>{{ "%.4f"|format(trial.cross_entropy) }}</td>\
<td>{{ "%.4f"|format(trial.metrics.val_loss) }}</td><td>{{ trial.metrics.accuracy|percent(2) }}</td>\
<td>{{ "%.4f"|format(trial.metrics.loss) }}</td><td>{{ trial.zero_share|percent }}</td>
{% for kernel in trial.kernels %}
<td>{{ (kernel.num_zeros / kernel.num_weights)|percent }}</td>
{% endfor %}
<td>{{ "%.1f"|format(trial.l1_norm) }}</td><td>{{ "%.2f"|format(trial.l2_norm) }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>

<div class="pair">
<section>
<h2>Training parameters of all</h2>
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
<tr><th scope="row">Examples</th><td><code>{{ facts.examples_digest }}</code></td></tr>
</tbody></table>
</section>
</div>
</main>
{% endblock %}
"""
