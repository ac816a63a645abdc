from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ridgeline.airflow.plugin.models_page import render
from ridgeline.artifacts.pushed_model import ModelSize, PushedModel
from ridgeline.history import HistoryEntry
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store


def entry(version: int, action: str = "push", **values: object) -> HistoryEntry:
    defaults = {
        "version": version,
        "action": action,
        "artifact": f"PushedModel/{version:064x}",
        "model_digest": f"{version:064x}",
        "accuracy": 0.8 + version / 100,
        "run_id": f"run {version}",
        "at": datetime(2026, 11, version, tzinfo=UTC),
    }
    return HistoryEntry.model_validate(defaults | values)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions, the third pushed by force, rolled back from it to the second; the first is gone."""
    folder = tmp_path / "serving" / "garments"
    for version in (2, 3):
        (folder / str(version)).mkdir(parents=True)
    rollback = entry(2, "rollback", reason="wrong <shoes>", by="ann", run_id="back")
    history = [entry(1), entry(2), entry(3, reason="the licence"), rollback]
    (folder / "history.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in history))
    return Registry(tmp_path / "serving")


def test_it_shows_the_champion_the_versions_and_the_history(registry: Registry) -> None:
    page = render(registry, lambda run_ids: {})
    assert re.search(r"<dt>Champion</dt><dd>Version 2<", page)
    assert re.findall(r'<tr><th scope="row">(\d)', page) == ["3", "2"]
    assert "<td>rolled back to version 2</td><td>ann</td>\n<td>wrong &lt;shoes&gt;</td>" in page
    assert re.findall("<td>(pushed version [^<]*)", page) == [f"pushed version {n}" for n in ("3 by force", "2", "1")]


def test_each_version_links_to_comparisons_with_the_champion_and_the_version_before(registry: Registry) -> None:
    (registry.root / "garments" / "1").mkdir()
    page = render(registry, lambda run_ids: {})
    rows = re.findall(r'<tr><th scope="row">(\d).*?</tr>', page, re.DOTALL)
    links = re.findall(r'<a href="compare\?a=garments%2F(\d)&amp;b=garments%2F(\d)">version (\d)</a>', page)
    assert rows == ["3", "2", "1"]
    assert links == [("2", "3", "2"), ("1", "2", "1"), ("2", "1", "2")]  # the champion is 2; nothing is before 1


def test_it_links_the_model_cards_of_the_versions_that_have_one(registry: Registry) -> None:
    assert "Model card</a>" not in render(registry, lambda run_ids: {})
    card = registry.root / "garments" / "3" / "assets.extra" / "model-card.html"
    card.parent.mkdir()
    card.touch()
    page = render(registry, lambda run_ids: {})
    assert re.findall('<a href="([^"]*)">Model card</a>', page) == ["models/garments/3/card"]


def test_the_chart_has_a_point_for_each_entry(registry: Registry) -> None:
    page = render(registry, lambda run_ids: {})
    chart = page[page.index('<svg class="chart"') : page.index("</svg>")]
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)]
    assert heights[0] > heights[1] > heights[2]
    assert heights[3] == heights[1]
    assert "81.00 %" in chart
    assert chart.count('class="rollback now"') == 1


def test_it_shows_a_canary_and_how_to_decide_about_it(registry: Registry) -> None:
    assert "Canary" not in render(registry, lambda run_ids: {})
    path = registry.root / "garments" / "history.jsonl"
    canary = entry(3, "canary", reason="try it", by="bob", share=0.25, run_id="start")
    path.write_text(path.read_text() + canary.model_dump_json() + "\n")
    page = render(registry, lambda run_ids: {})
    assert re.search(r"<dt>Champion</dt><dd>Version 2<", page)
    assert re.search(r"<dt>Canary</dt><dd>Version 3<small>0.25 of the requests since", page)
    assert '<th scope="row">3 <span class="champion">canary</span></th>' in page
    assert "<td>started the canary version 3, 0.25 of the requests</td><td>bob</td>" in page
    assert "ridgeline models promote garments 3 --reason" in page
    assert page.count("<circle") == 4  # those that became the champion


def test_it_tells_how_to_roll_back(registry: Registry) -> None:
    assert "ridgeline models rollback garments 1 --reason" not in render(registry, lambda run_ids: {})
    assert "rollback_model" in render(registry, lambda run_ids: {})


def test_it_links_only_runs_that_the_reader_may_see(registry: Registry) -> None:
    asked: list[set[str]] = []
    page = render(registry, lambda run_ids: asked.append(set(run_ids)) or {"run 2": "the dag"})  # type: ignore[func-returns-value]
    assert asked == [{"run 1", "run 2", "run 3", "back"}]
    assert '<a href="dags/the%20dag/runs/run%202">run 2</a>' in page
    assert page.count('<a href="dags/') == 2


@pytest.mark.parametrize("content", [b"{}\n", b"", b"\xff\xfe\n"])
def test_a_damaged_history_is_said_to_be_damaged_and_the_other_models_are_shown(
    registry: Registry, content: bytes
) -> None:
    damaged = registry.root / "shoes" / "history.jsonl"
    damaged.parent.mkdir()
    damaged.write_bytes(content)
    page = render(registry, lambda run_ids: {})
    assert f"Expected a history entry in each line of {damaged}" in page
    assert re.search(r"<dt>Champion</dt><dd>Version 2<", page)


def test_without_models_it_says_how_to_get_one(tmp_path: Path) -> None:
    assert "No models yet" in render(Registry(tmp_path / "serving"), lambda run_ids: {})
    assert list(tmp_path.iterdir()) == []


def test_it_shows_what_the_pipeline_served(synthetic: tuple[Settings, list[Execution]]) -> None:
    page = render(synthetic[0].open_registry(), lambda run_ids: {})
    assert "synthetic_garments" in page
    assert "1 <span" in page or "1 \n<span" in page
    assert "<td>89,610</td><td>0.342</td><td>89,400</td>" in page


def test_it_shows_the_size_before_and_after_compaction(
    synthetic: tuple[Settings, list[Execution]], tmp_path: Path
) -> None:
    store = synthetic[0].open_store()
    pushed = store.open(synthetic[1][-1].output or "", PushedModel)
    small = {"size": ModelSize(num_weights=1_200, num_multiply_adds=1_000, num_bytes=4_800)}
    smaller = pushed.facts.model_copy(update={**small, "trained_size": pushed.facts.size})
    copy = Store(tmp_path / "store")
    with copy.stage() as folder:
        ref = copy.publish(PushedModel.seal(folder, smaller))
    folder = tmp_path / "serving" / "garments"
    for version in (1, 2):
        (folder / str(version)).mkdir(parents=True)
    history = [entry(1), entry(2, artifact=ref)]
    (folder / "history.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in history))
    page = render(Registry(tmp_path / "serving", store=copy), lambda run_ids: {})
    assert "<td>1,200 of 89,610</td><td>0.005 of 0.342</td><td>1,000 of 89,400</td>" in page
    assert page.count("<td>–</td><td>–</td><td>–</td>") == 1  # of version 1, whose artifact is gone


def test_it_reads_the_facts_of_versions_that_are_present_alone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(Registry, "facts", lambda self, entry: read.append(entry.version))
    render(registry, lambda run_ids: {})
    assert read == [3, 2]
