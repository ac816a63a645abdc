"""The page of a comparison of two runs, models or served versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from ridgeline.airflow.plugin.template import render_template
from ridgeline.artifacts.examples import TEST
from ridgeline.compare import Comparison, Disagreement
from ridgeline.thumbnail import thumbnail

SHOWN = 40  # images of each kind of disagreement


def link(a: str, b: str) -> str:
    """Return the link to a comparison, relative to the plugin's pages.

    Args:
        a: The name of the one side, see `ridgeline.compare.find_side`.
        b: The name of the other.
    """
    return f"compare?{urlencode({'a': a, 'b': b})}"


def render(comparison: Comparison, dag_of: Mapping[str, str]) -> str:
    """Return the page as HTML.

    Args:
        comparison: The comparison.
        dag_of: The DAG of each run that the reader may see.
    """
    pairs, a, b = comparison.pairs, comparison.a, comparison.b
    groups: dict[str, tuple[Disagreement, ...]] = {}
    if pairs:
        groups = {
            "Only A is right": pairs.only_a_right,
            "Only B is right": pairs.only_b_right,
            "Both are wrong, in different ways": pairs.wrong_differently,
        }
    shown = [(title, len(of), [_shown(comparison, found) for found in of[:SHOWN]]) for title, of in groups.items()]
    changes = {"Code": comparison.code, "Libraries": comparison.libraries, "Sources": comparison.sources}
    return render_template(
        "compare",
        comparison=comparison,
        sides={"A": a, "B": b},
        links={run: f"dags/{quote(dag, safe='')}/runs/{quote(run, safe='')}" for run, dag in dag_of.items()},
        changes=changes,
        pairs=pairs,
        groups=shown,
        swapped=link(b.name, a.name),
        synthetic=a.model.facts.synthetic or b.model.facts.synthetic,
    )


def _shown(comparison: Comparison, found: Disagreement) -> dict[str, Any]:
    """Return a test image on which the two disagree, with the names of the classes."""
    names = comparison.b.model.facts.class_names
    pixels = comparison.b.examples.split(TEST).rows(found.index, found.index + 1)[0][0]
    return {
        "uri": thumbnail(pixels),
        "index": found.index,
        "label": names[found.label],
        "a": f"{names[found.a]} {100 * found.a_probability:.0f} %",
        "b": f"{names[found.b]} {100 * found.b_probability:.0f} %",
    }
