"""The HTML report of a regularization path: the effect of each penalty, by strength.

The step `select` writes it as part of its output.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from components.reports.figures import BLUE, GREY, VERMILION, Picture, flat, new_figure, plot_style, svg
from components.training.penalties import KINDS
from components.training.penalty import Penalty
from ridgeline.artifacts.sweep_result import SweepResultFacts
from ridgeline.artifacts.trials import Trial
from ridgeline.html_page import render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

NEAR = 0.01  # largest loss of validation accuracy for the table of the strongest penalties
USEFUL = 0.1  # the same for the pictures of distributions; beyond it, only a kind's most accurate trial is shown
SHOWN = 4  # distributions in one picture, besides the one without a penalty
BINS = 120  # at most, in one picture
# By kind of penalty, in its order. The last three are of the same colour-blind-safe palette.
COLOURS = dict(zip(KINDS, cycle((GREY, BLUE, VERMILION, "#cc79a7", "#009e73", "#e69f00")), strict=False))
LINES = dict(zip(KINDS, cycle((":", "o-", "s--", "D", "^-.", "v:")), strict=False))
PATHS = [name for name, kind in KINDS.items() if len(kind.strengths) == 1]  # drawn as curves against the strength
MAPS = [name for name, kind in KINDS.items() if len(kind.strengths) == 2]  # drawn as heat maps

# What a penalty does to the weights: a sentence after its name. It stands here and not in the penalty's module, whose
# code is in the key of each training.
EFFECTS = {
    "l1": "takes the same amount from every weight, regardless of its size. Weights that the data do not support "
    "reach zero and stay there, so few remain.",
    "l2": "shrinks each weight in proportion to its size. Large weights shrink most and small ones hardly at all, so "
    "the network uses many small weights, and none becomes zero.",
    "l1_l2": "zeroes the weights that the data do not support, as L1 does, and shrinks the others, as L2 does.",
    "group": "shrinks the outgoing weights of one pixel, unit or channel together. All of them become zero or none, so "
    "whole pixels and units drop out of the network.",
}


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

    def indices(kind: str, loss: float) -> list[int]:
        """Return the trials of a kind within `loss` of the best accuracy, or else the kind's best, weakest first."""
        found = {i: trial.metrics["val_accuracy"] for i, trial in finished.items() if trial.kind == kind}
        lowest = min(best - loss, max(found.values(), default=0.0))
        return sorted((i for i in found if found[i] >= lowest), key=lambda i: facts.trials[i].strength)

    dense = indices("none", 1.0)
    shown = {kind: found[-SHOWN:] for kind in PATHS if (found := indices(kind, USEFUL))}
    sides = [*dense, *(found[-1] for found in shown.values())]
    strongest = {kind: found[-1] for kind in KINDS if (found := indices(kind, NEAR))}
    totals = {kind: sum(trial.kind == kind for trial in facts.trials) for kind in shown}
    near = [trial for trial in finished.values() if trial.metrics["val_accuracy"] >= best - NEAR]
    with plot_style():
        return render_page(
            TEMPLATE,
            facts=facts,
            synthetic=facts.synthetic,
            winner=facts.trials[facts.winner],
            label=_label,
            best=best,
            near=NEAR,
            useful=USEFUL,
            most=SHOWN,
            hidden=[
                f"{totals[kind] - len(found)} of {totals[kind]} with {KINDS[kind].label}"
                for kind, found in shown.items()
                if len(found) < totals[kind]
            ],
            strongest=[facts.trials[i] for i in strongest.values()],
            sparsest=max(near, key=lambda trial: trial.zero_share),
            spreads=[_distributions(kind, dense, found, facts, counts, edges) for kind, found in shown.items()],
            contrast=_contrast(sides, facts, counts, edges) if sides else None,
            curves=_curves(facts),
            maps=[picture for kind in MAPS if (picture := _heat_map(kind, facts))],
            effects={
                _capital(KINDS[kind].label): effect
                for kind, effect in EFFECTS.items()
                if kind in {t.kind for t in facts.trials}
            },
            eliminated=[
                what
                for what in ("pixels", "units")
                if any(getattr(t, f"num_eliminated_{what}") is not None for t in facts.trials)
            ],
            solvers={t.solver for t in facts.trials if KINDS[t.kind].sparse},
            warm_start=facts.warm_start,
            params=flat(facts.training),
        )


def _label(trial: Trial) -> str:
    return Penalty.at(trial.kind, *trial.strengths.values()).label


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _curves(facts: SweepResultFacts) -> list[Picture]:
    if not any(trial.kind in ("none", *PATHS) and not trial.diverged for trial in facts.trials):
        return []

    def curve(title: str, unit: str, value: Callable[[Trial], float], log: bool = False) -> Picture:
        return _curve(facts, title, unit, value, log)

    curves = [
        curve("Validation accuracy", "share of images", lambda t: t.metrics["val_accuracy"]),
        curve("Validation cross-entropy", "nats, without the penalty", lambda t: t.metrics["val_cross_entropy"]),
        curve("Zeros", "% of all weights exactly zero", lambda t: 100 * t.zero_share),
        curve("Training loss", "nats, with the penalty; log scale", lambda t: t.metrics["loss"], log=True),
        curve("L1 norm", "sum of |w|, log scale", lambda t: t.l1_norm, log=True),
        curve("L2 norm", "root of the sum of w², log scale", lambda t: t.l2_norm, log=True),
    ]
    for what in ("pixels", "units"):
        counts = [getattr(trial, f"num_eliminated_{what}") for trial in facts.trials if not trial.diverged]
        if any(counts):  # neither unknown nor zero everywhere
            value = operator.attrgetter(f"num_eliminated_{what}")
            curves.append(curve(f"Eliminated {what}", f"number of {what}", value))
    return curves


def _curve(facts: SweepResultFacts, title: str, unit: str, value: Callable[[Trial], float], log: bool) -> Picture:
    """Draw one quantity against the strength, a line for each penalty."""
    figure, axes = new_figure()
    described = []
    for kind in ("none", *PATHS):
        trials = sorted((t for t in facts.trials if t.kind == kind and not t.diverged), key=lambda t: t.strength)
        values = [value(trial) for trial in trials]
        if not trials:
            continue
        described.append(f"{KINDS[kind].label} {values[0]:.4g}" + (f" to {values[-1]:.4g}" if len(values) > 1 else ""))
        if kind == "none":
            axes.axhline(values[0], color=GREY, linestyle=LINES[kind], label=KINDS[kind].label)
        else:
            drawn = [np.nan if log and v <= 0 else v for v in values]
            strengths = [trial.strength for trial in trials]
            axes.plot(strengths, drawn, LINES[kind], color=COLOURS[kind], markersize=4, label=KINDS[kind].label)
    winner = facts.trials[facts.winner]
    if winner.kind in PATHS:
        place = winner.strength, value(winner)
        axes.plot(*place, "o", color="#111", fillstyle="none", markersize=11, label="chosen")
    axes.set(xlabel="strength, log scale", ylabel=unit, xscale="log", yscale="log" if log else "linear")
    _plain_ticks(axes.xaxis)
    if log:
        _plain_ticks(axes.yaxis, 1, 2, 5)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend()
    alt = f"{title} ({unit}) against the penalty's strength, from weakest to strongest: {'; '.join(described)}."
    return Picture(svg(figure), alt)


def _plain_ticks(axis: Axis, *steps: float) -> None:
    """Label a log axis with plain numbers: at these multiples of the powers of ten, or at the powers only."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps or (1.0,), numticks=20))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _heat_map(kind: str, facts: SweepResultFacts) -> Picture | None:
    """Draw accuracy and zeros over the two strengths of a kind; None if most of the map would be empty."""
    from matplotlib.figure import Figure

    trials = {tuple(trial.strengths.values()): trial for trial in facts.trials if trial.kind == kind}
    down, across = (sorted({point[axis] for point in trials}) for axis in (0, 1))
    if 2 * len(trials) <= len(down) * len(across):  # none, or pairs that are no grid
        return None
    figure = Figure(figsize=(8.2, 1.3 + 0.4 * len(down)))
    winner = facts.trials[facts.winner]
    texts = []
    for axes, (title, value) in zip(
        figure.subplots(1, 2, sharey=True),
        (
            ("Validation accuracy, %", lambda t: 100 * t.metrics["val_accuracy"]),
            ("Zeros, %", lambda t: 100 * t.zero_share),
        ),
        strict=True,
    ):
        finished = {point: value(trial) for point, trial in trials.items() if not trial.diverged}
        grid = np.array([[finished.get((row, column), np.nan) for column in across] for row in down])
        axes.imshow(grid, cmap="Blues", aspect="auto", origin="lower")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2 if finished else 0.0
        for (i, row), (j, column) in itertools.product(enumerate(down), enumerate(across)):
            if (row, column) in trials:
                number = grid[i, j]
                text = "diverged" if np.isnan(number) else f"{number:.1f}"
                chosen = trials[row, column] == winner
                colour, weight = ("white" if number > middle else "#111"), ("bold" if chosen else "normal")
                axes.text(j, i, text, ha="center", va="center", color=colour, fontweight=weight, fontsize=8)
        first, second = (strength.title for strength in KINDS[kind].strengths)
        axes.set(xlabel=second, xticks=range(len(across)), yticks=range(len(down)))
        axes.set_xticklabels([f"{strength:g}" for strength in across])
        axes.set_yticklabels([f"{strength:g}" for strength in down])
        axes.grid(visible=False)
        axes.set_title(title, loc="left", fontsize=10)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(first)
        if finished:
            texts.append(f"{title}: {min(finished.values()):.1f} to {max(finished.values()):.1f}")
    if len(finished) < len(trials):
        texts.append(f"{len(trials) - len(finished)} diverged")
    return Picture(svg(figure), f"{KINDS[kind].label} by both strengths. {'. '.join(texts)}.")


def _distributions(
    kind: str,
    dense: Sequence[int],
    found: Sequence[int],
    facts: SweepResultFacts,
    counts: np.ndarray,
    edges: np.ndarray,
) -> Picture:
    """Overlay the weight distributions of one penalty by strength, and draw the shares of exact zeros beside."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
    counts, edges = _zoomed(counts[[*dense, *found]], edges)
    colour = np.array(to_rgb(COLOURS[kind]))
    shares: list[tuple[str, float, object]] = []
    for row, i in zip(counts, [*dense, *found], strict=True):
        trial = facts.trials[i]
        if i in dense:
            label, shade = KINDS["none"].label, (0.75, 0.77, 0.8)
            left.stairs(row, edges, color=shade, fill=True)
        else:
            fade = 0.7 * (1 - found.index(i) / max(1, len(found) - 1))
            label, shade = f"{trial.strength:g}", tuple(colour + (1 - colour) * fade)
            left.stairs(row, edges, color=shade, linewidth=1.5)
        shares.append((label, trial.zero_share, shade))
    left.set(yscale="log", xlabel="weight, exact zeros left out", ylabel="count, log scale", xlim=(edges[0], edges[-1]))
    _plain_ticks(left.yaxis)
    left.set_title(f"{_capital(KINDS[kind].label)}, by strength", loc="left", fontsize=10)
    _bars(right, shares)
    text = ", ".join(f"{100 * share:.1f} % at {label}" for label, share, _ in shares)
    return Picture(
        svg(figure), f"Overlaid weight distributions under {KINDS[kind].label}, by strength. Exactly zero: {text}."
    )


def _zoomed(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut histograms to the range of 99.9 % of the weights of each; merge bins into at most `BINS`."""
    half = counts.shape[1] // 2
    folded = counts[:, :half][:, ::-1] + counts[:, half:]
    inside = np.cumsum(folded, axis=1) >= 0.999 * folded.sum(axis=1, keepdims=True)
    width = 1 + int(inside.argmax(axis=1).max())
    merged = -(-2 * width // BINS)
    reach = min(half, -(-width // merged) * merged)
    reach -= reach % merged
    rows = counts[:, half - reach : half + reach].reshape(len(counts), -1, merged).sum(axis=2)
    return rows, edges[half - reach : half + reach + 1 : merged]


def _contrast(shown: Sequence[int], facts: SweepResultFacts, counts: np.ndarray, edges: np.ndarray) -> Picture:
    """Draw the cumulative share of weights by size, without a penalty and under the strongest of each kind."""
    figure, axes = new_figure(3.6)
    half = counts.shape[1] // 2
    sizes, texts = edges[half:], []
    for i in shown:
        trial = facts.trials[i]
        larger = np.cumsum(counts[i, :half][::-1] + counts[i, half:])
        zeros = trial.num_weights - larger[-1]
        shares = 100 * np.concatenate([[zeros], zeros + larger]) / trial.num_weights
        axes.plot(sizes, shares, color=COLOURS[trial.kind], label=_label(trial), linewidth=1.8)
        axes.plot(0, shares[0], "o", color=COLOURS[trial.kind], clip_on=False)
        texts.append(f"{_label(trial)} {shares[0]:.1f} % zero")
    limit = _zoomed(counts[shown], edges)[1][-1]
    axes.set(xlim=(0, limit), ylim=(0, 103), xlabel="size of a weight, |w|", ylabel="% of the weights up to this size")
    axes.set_title("The strongest of each kind", loc="left", fontsize=10)
    axes.legend(loc="lower right")
    return Picture(svg(figure), f"Share of the weights by size. {'; '.join(texts)}.")


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
{% macro count(number) %}{{ "unknown" if number is none else "{:,}".format(number) }}{% endmacro %}
{% macro counts(trial, eliminated) %}\
{% for what in eliminated %}<td>{{ count(trial["num_eliminated_" ~ what]) }}</td>{% endfor %}{% endmacro %}
{% block title %}Regularization path on {{ facts.dataset }}{% endblock %}
{% block style %}
.wide-figures img{max-width:860px}
.trials td{white-space:nowrap}
.trials thead th{font-size:.8rem;line-height:1.25;vertical-align:bottom}
tr.chosen th,tr.chosen td{background:#e0effa;font-weight:600}
{% endblock %}
{% block body %}
<header>
<h1>Regularization path on {{ facts.dataset }}</h1>
<p class="note">{{ facts.trials|length }} \
training{{ "s that differ only in their penalty" if facts.trials|length > 1 }}. \
Chosen on the validation split; the test split was not read.</p>
</header>
<main>
<div class="verdict blessed">
<h2>Chosen: {{ label(winner) }}</h2>
<ul><li>{{ facts.reason }}</li></ul>
</div>

<dl class="tiles">
<div><dt>Validation accuracy</dt><dd>{{ winner.metrics.val_accuracy|percent(2) }}<small>the chosen training\
{% if best > winner.metrics.val_accuracy %}; the highest is {{ best|percent(2) }}{% endif %}</small></dd></div>
<div><dt>Weights that are exactly zero</dt><dd>{{ winner.zero_share|percent }}<small>of \
{{ "{:,}".format(winner.num_weights) }} in the kernels</small></dd></div>
<div><dt>Sparsest within {{ near|percent(0) }} of the highest</dt><dd>{{ sparsest.zero_share|percent }}<small>\
{{ label(sparsest) }}, {{ sparsest.metrics.val_accuracy|percent(2) }} accuracy</small></dd></div>
</dl>

<section>
<h2>What each penalty does to the weights</h2>
{% if effects %}
<p>{% for name, effect in effects.items() %}
<strong>{{ name }}</strong> {{ effect }}
{% endfor %}</p>
{% endif %}
{% for picture in spreads %}
<div class="wide-figures">{{ figure(picture) }}</div>
{% endfor %}
{% if hidden %}
<p class="note">The pictures show at most {{ most }} trainings with each penalty: the strongest that lose at most \
{{ useful|percent(0) }} of accuracy against the best one, or the most accurate if all lose more. Not shown: \
{{ hidden|join(", ") }}.</p>
{% endif %}
<div class="pair">
{% if contrast %}
<div>{{ figure(contrast) }}</div>
{% endif %}
<div>
<p class="note">Each line starts at the share of weights that are exactly zero. Where it starts high, few weights \
remain, and the largest among them. Where it starts at the bottom and rises steeply, the network uses all weights, and \
all are small.</p>
</div>
</div>
<p class="note">The strongest of each kind within {{ near|percent(0) }} of the highest validation accuracy, or the \
most accurate of the kind if none is:</p>
<div class="scroll" tabindex="0" role="region" aria-label="The strongest of each kind">
<table>
<thead><tr><th scope="col">Penalty</th><th scope="col">Accuracy</th><th scope="col">Zeros</th>\
{% for what in eliminated %}<th scope="col">Eliminated<br>{{ what }}</th>{% endfor %}\
<th scope="col">L1 norm</th><th scope="col">L2 norm</th></tr></thead>
<tbody>
{% for trial in strongest %}
<tr><th scope="row">{{ label(trial) }}</th><td>{{ trial.metrics.val_accuracy|percent(2) }}</td>\
<td>{{ trial.zero_share|percent }}</td>{{ counts(trial, eliminated) }}<td>{{ "%.1f"|format(trial.l1_norm) }}</td>\
<td>{{ "%.2f"|format(trial.l2_norm) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>

{% if curves or maps %}
<section>
<h2>Against strength</h2>
<div class="pair">
{% for picture in curves %}
{{ figure(picture) }}
{% endfor %}
</div>
{% for picture in maps %}
<div class="wide-figures">{{ figure(picture) }}</div>
{% endfor %}
</section>
{% endif %}

<section>
<h2>All trainings</h2>
<p class="note">Losses are in nats and include the penalty; cross-entropy does not. Zeros are shares of the weights \
that are exactly zero, norms are over all kernels. {% if eliminated %}A pixel or unit is eliminated if all its \
outgoing weights are zero, a unit also if all its incoming ones are. {% endif %}\
{% if solvers %}Penalties that are not smooth use the solver {{ solvers|sort|join(" or ") }}. {% endif %}\
{% if warm_start %}Each training started from the weights of the next stronger strength of its kind, and the strongest \
from random ones.{% endif %}</p>
<div class="scroll" tabindex="0" role="region" aria-label="All trainings">
<table class="trials">
<thead><tr><th scope="col">Penalty</th><th scope="col">Validation<br>accuracy</th>\
<th scope="col">Validation<br>cross-entropy</th><th scope="col">Validation<br>loss</th>\
<th scope="col">Training<br>accuracy</th><th scope="col">Training<br>loss</th><th scope="col">Zeros</th>
{% for kernel in winner.kernels %}
<th scope="col">in<br>{{ kernel.name }}</th>
{% endfor %}
{% for what in eliminated %}<th scope="col">Eliminated<br>{{ what }}</th>{% endfor %}\
<th scope="col">L1<br>norm</th><th scope="col">L2<br>norm</th></tr></thead>
<tbody>
{% for trial in facts.trials %}
<tr{% if loop.index0 == facts.winner %} class="chosen"{% endif %}><th scope="row">{{ label(trial) }}\
{% if loop.index0 == facts.winner %} &#10003;{% endif %}</th>
{% if trial.diverged %}
<td colspan="{{ 8 + winner.kernels|length + eliminated|length }}">diverged</td>
{% else %}
<td>{{ trial.metrics.val_accuracy|percent(2) }}</td><td>{{ "%.4f"|format(trial.metrics.val_cross_entropy) }}</td>\
<td>{{ "%.4f"|format(trial.metrics.val_loss) }}</td><td>{{ trial.metrics.accuracy|percent(2) }}</td>\
<td>{{ "%.4f"|format(trial.metrics.loss) }}</td><td>{{ trial.zero_share|percent }}</td>
{% for kernel in trial.kernels %}
<td>{{ (kernel.num_zeros / kernel.num_weights)|percent }}</td>
{% endfor %}
{{ counts(trial, eliminated) }}<td>{{ "%.1f"|format(trial.l1_norm) }}</td><td>{{ "%.2f"|format(trial.l2_norm) }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% for trial in facts.trials if trial.diverged %}
<p class="note">{{ label(trial) }} diverged: {{ trial.diverged }}</p>
{% endfor %}
</section>

<div class="pair">
<section>
<h2>Training parameters that all share</h2>
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
