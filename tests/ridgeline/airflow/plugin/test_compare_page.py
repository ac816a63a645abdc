from __future__ import annotations

import html
import re
from dataclasses import replace

import pytest

from ridgeline.airflow.plugin.compare_page import SHOWN, link, render
from ridgeline.compare import Change, Comparison, Counts, Drift, compare, find_side
from ridgeline.settings import Settings
from ridgeline.significance import Shift

NAME = "synthetic_garments"


@pytest.fixture(scope="module")
def comparison(two_versions: Settings) -> Comparison:
    store, registry = two_versions.open_store(), two_versions.open_registry()
    return compare(*(find_side(store, registry, f"{NAME}/{version}") for version in (1, 2)))


def test_a_link_leads_to_two_sides() -> None:
    assert link("shoes/1", "run <3> & more") == "compare?a=shoes%2F1&b=run+%3C3%3E+%26+more"


def test_it_shows_parameters_data_and_metrics(comparison: Comparison) -> None:
    page = render(comparison, {"second": "fashion/mnist"})
    assert "<td>synthetic_garments/1</td>" in page
    assert '<a href="dags/fashion%2Fmnist/runs/second">second</a>' in page
    assert "<td>synthetic</td>" in page  # not among the runs that the reader may see
    assert "<code>train.penalty.kind</code></th><td>l2</td><td>l1</td>" in page
    assert "5,000 train, 1,000 validation, 1,000 test</td><td>4,500 train, 1,500 validation, 1,000 test" in page
    assert re.search(r'<th scope="row">brightness of train</th><td>0\.0\d\d</td>', page)
    for side in (comparison.a, comparison.b):
        facts = side.evaluation.facts
        low, high = facts.accuracy_interval
        assert f"{facts.accuracy:.4f} <small>({low:.4f} to {high:.4f})</small>" in page
    assert "SYNTHETIC" in page


def test_it_shows_the_images_on_which_they_disagree(comparison: Comparison) -> None:
    page, pairs, names = render(comparison, {}), comparison.pairs, comparison.a.model.facts.class_names
    for title, found in (("Only A is right", pairs.only_a_right), ("Only B is right", pairs.only_b_right)):
        assert f"<h3>{title}: {len(found)}</h3>" in page
        for image in found[:SHOWN]:
            alt = html.escape(f"Test image {image.index}, {names[image.label]}")
            assert re.search(rf'<img src="data:image/png;base64,[^"]+" alt="{alt}">', page)
    assert f"p = {pairs.p_value:.3g}" in page


def test_few_of_many_images_are_shown(comparison: Comparison) -> None:
    assert comparison.pairs
    many = comparison.pairs.only_b_right[:1] * (SHOWN + 5)
    page = render(replace(comparison, pairs=replace(comparison.pairs, only_b_right=many)), {})
    assert f"<h3>Only B is right: {SHOWN + 5}</h3>" in page
    assert f"ridgeline diff A B --images {SHOWN + 5}" in page
    shown = page[page.index("<h3>Only B is right") : page.index("<h3>Both are wrong")]
    assert shown.count("<figure>") == SHOWN


def test_it_says_what_is_missing(comparison: Comparison) -> None:
    page = render(replace(comparison, pairs=None, no_pairs="the test images differ", drift=None), {})
    assert "Not compared image by image: the test images differ." in page
    assert "Not known: the statistics of one side are missing." in page


def test_the_same_on_both_sides(comparison: Comparison) -> None:
    page = render(compare(comparison.a, comparison.a), {})
    assert "The models are the same, byte for byte." in page
    assert "All parameters of common steps are the same." in page
    assert "Both have the same images, byte for byte." in page
    assert "p = 1." in page


def test_no_text_becomes_a_part_of_the_page(comparison: Comparison) -> None:
    def evil(place: str) -> str:
        return f"\"'><evil onevil='{place}'></evil><script>{place}</script>"

    names = tuple(evil(f"class {i}") for i in range(len(comparison.b.model.facts.class_names)))
    facts = comparison.b.model.facts.model_copy(update={"class_names": names, "dataset": evil("dataset")})
    model = type(comparison.b.model)(
        comparison.b.model.path, comparison.b.model.manifest.model_copy(update={"facts": facts.model_dump(mode="json")})
    )
    made = comparison.b.executions.items()
    executions = {step: execution.model_copy(update={"run_id": evil("run")}) for step, execution in made}
    change = Change(evil("name"), evil("a"), [evil("b")], (evil("step"),))
    found = replace(
        comparison,
        b=replace(comparison.b, name=evil("side"), model=model, executions=executions),
        parameters=(change,),
        code=(replace(change, b=evil("b")),),
        only_a=(evil("only"),),
        counts=(Counts(evil("counts"), {evil("split"): 1}, None),),
        drift=(Drift(evil("drift"), Shift(0.1, 0.1)),),
        metrics=(replace(comparison.metrics[0], name=evil("metric")),),
    )
    for shown in (found, replace(found, pairs=None, no_pairs=evil("pairs"))):
        page = render(shown, {evil("run"): evil("dag")})
        assert not re.search(r"<(evil|script)|onevil='", page)
        for place in ("side", "dataset", "name", "step", "only", "counts", "split", "drift", "metric", "run"):
            assert evil(place) in html.unescape(page), place
