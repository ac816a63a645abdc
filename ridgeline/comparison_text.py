"""A comparison as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ridgeline.compare import Change, Comparison, Metric, Side, Value

WIDTH = 30  # of names
DRIFT_SHOWN = 0.01  # effects below are as good as none


def lines(comparison: Comparison, num_images: int) -> Iterator[str]:
    """Yield the lines.

    Args:
        comparison: The comparison.
        num_images: How many images of each kind of disagreement to list.
    """
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        yield f"{letter}  {side.name}: {', '.join(_made(side))}"
    if comparison.a.model.digest == comparison.b.model.digest:
        yield "The models are the same, byte for byte."
    for letter, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        if only:
            yield f"only {letter} has the steps {', '.join(only)}"
    changes = {
        "parameters": comparison.parameters,
        "code": comparison.code,
        "libraries": comparison.libraries,
        "sources": comparison.sources,
    }
    for title, found in changes.items():
        yield from _section(title, _changes(title, found), "no difference")
    yield from _section("data", _data(comparison), "the same images")
    yield from _section("metrics, with 95 % intervals", map(_metric, comparison.metrics), "none")
    yield from _section("test images", _images(comparison, num_images), "none")


def _made(side: Side) -> Iterator[str]:
    yield side.model.ref[:18]
    yield f"dataset {side.model.facts.dataset}"
    if side.run_ids:
        yield f"run {side.run_ids[0]}"
    if side.evaluation is None:
        yield "not evaluated"


def _section(title: str, rows: Iterable[str], without: str) -> Iterator[str]:
    yield ""
    found = list(rows)
    if not found:
        yield f"{title}: {without}"
        return
    yield title
    yield from (f"  {row}" for row in found)


def _changes(title: str, found: tuple[Change, ...]) -> Iterator[str]:
    for change in found:
        hexadecimal = title in ("code", "sources")
        a, b = (str(value)[:12] if hexadecimal else str(value) for value in (change.a, change.b))
        steps = "" if title == "parameters" else f"  ({', '.join(change.steps)})"
        yield f"{change.name:<{WIDTH}} {a} → {b}{steps}"


def _data(comparison: Comparison) -> Iterator[str]:
    if comparison.same_examples:
        return
    for counts in comparison.counts:
        if counts.a != counts.b:
            yield f"{counts.name:<{WIDTH}} {_splits(counts.a)} → {_splits(counts.b)}"
    if comparison.drift is None:
        yield "drift is not known: statistics are missing"
        return
    for name, (effect, p_value) in ((drift.name, drift.shift) for drift in comparison.drift):
        if effect >= DRIFT_SHOWN:
            yield f"{name:<{WIDTH}} differs by {effect:.3f}, p = {p_value:.2g}"
    if not any(drift.shift.effect >= DRIFT_SHOWN for drift in comparison.drift):
        yield f"class balance, brightness, contrast and pixels differ by less than {DRIFT_SHOWN}"


def _splits(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{number:,} {split}" for split, number in counts.items()) if counts else "none"


def _metric(metric: Metric) -> str:
    difference = f"{metric.b.value - metric.a.value:+.4f}" if metric.a and metric.b else ""
    return f"{metric.name:<{WIDTH}} {_value(metric.a):<26} → {_value(metric.b):<26} {difference}".rstrip()


def _value(value: Value | None) -> str:
    if value is None:
        return "–"
    interval = " ({:.4f} to {:.4f})".format(*value.interval) if value.interval else ""
    return f"{value.value:.4f}{interval}"


def _images(comparison: Comparison, num_images: int) -> Iterator[str]:
    pairs = comparison.pairs
    if pairs is None:
        yield f"not compared: {comparison.no_pairs}"
        return
    yield f"{pairs.num_images:,} images: both are right on {pairs.both_right:,}, neither on {pairs.both_wrong:,}"
    yield f"exact McNemar test, two-sided: p = {pairs.p_value:.3g}"
    groups = {
        "only A is right": pairs.only_a_right,
        "only B is right": pairs.only_b_right,
        "wrong in different ways": pairs.wrong_differently,
    }
    for title, found in groups.items():
        listed = " ".join(str(one.index) for one in found[:num_images])
        more = " …" if 0 < num_images < len(found) else ""
        yield f"{title:<{WIDTH}} {len(found):,}{': ' if listed else ''}{listed}{more}"
