"""The page of the served models: versions, champion, history, accuracy over time, and how to roll back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ridgeline.airflow.plugin.compare_page import link
from ridgeline.airflow.plugin.template import render_template
from ridgeline.history import DONE, HistoryEntry, canary, champions
from ridgeline.registry import Registry
from ridgeline.store import StoreError

SHOWN = 30  # the latest entries; the history keeps all
WIDTH, HEIGHT, MARGIN = 720, 200, 40
SIZES = {"Weights": "weights", "MiB": "MiB", "Multiply-adds": "multiply-adds an image"}  # columns


@dataclass(frozen=True)
class Point:
    """An entry of the history in the chart, in the SVG's units."""

    x: float
    y: float
    entry: HistoryEntry


@dataclass(frozen=True)
class Chart:
    """The accuracy of each entry of a history, oldest first, and the grid lines: height and accuracy."""

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


def _comparisons(name: str, versions: list[int], champion: int) -> dict[int, list[tuple[int, str]]]:
    """Return the versions that each version is compared with, the champion and the one before, with the links."""
    found = {}
    for version, before in zip(versions, [None, *versions], strict=False):
        others = dict.fromkeys(other for other in (champion, before) if other in versions and other != version)
        found[version] = [(other, link(f"{name}/{other}", f"{name}/{version}")) for other in others if other]
    return found


def render(registry: Registry, dag_of: Callable[[Collection[str]], Mapping[str, str]]) -> str:
    """Return the page as HTML. If the history of a model is unreadable, the page shows the error instead.

    Args:
        registry: The served models.
        dag_of: Returns the DAG of each run, given by id, that the reader may see.
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
        pushes = {entry.version: entry for entry in reversed(history)}  # the first entry of each version
        served = champions(history)
        versions = [(version, pushes.get(version)) for version in reversed(registry.versions(name))]
        models.append(
            {
                "name": name,
                "problem": "",
                "champion": registry.champion(name),
                "canary": canary(history),
                "chart": _chart(served[-SHOWN:]),
                "versions": versions,
                "comparisons": _comparisons(name, [v for v, push in reversed(versions) if push], served[-1].version),
                "sizes": {v: facts.sizes for v, push in versions if push and (facts := registry.facts(push))},
                "cards": {v: f"models/{quote(name)}/{v}/card" for v, _ in versions if registry.card(name, v)},
                "history": history[: -SHOWN - 1 : -1],
                "num_older": max(0, len(history) - SHOWN),
                "previous": registry.previous(name),
            }
        )
    links = {run: f"dags/{quote(dag, safe='')}/runs/{quote(run, safe='')}" for run, dag in dag_of(run_ids).items()}
    size = {"width": WIDTH, "height": HEIGHT, "margin": MARGIN}
    return render_template(
        "models", models=models, done=DONE, links=links, root=registry.root, size=size, columns=SIZES, synthetic=False
    )
