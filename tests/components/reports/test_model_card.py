import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from components.reports import model_card
from ridgeline.artifacts.examples import Normalization
from ridgeline.artifacts.model import LayerSparsity, Model, ModelFacts
from ridgeline.artifacts.model_evaluation import ClassMetrics, ModelEvaluation, ModelEvaluationFacts, Verdict
from ridgeline.artifacts.pushed_model import ModelSize, PushedModelFacts

SECTIONS = [  # of Mitchell et al. 2019, in its order
    "Model Details",
    "Intended Use",
    "Factors",
    "Metrics",
    "Evaluation Data",
    "Training Data",
    "Quantitative Analyses",
    "Ethical Considerations",
    "Caveats and Recommendations",
]
ODD = "a|b <script>alert(1)</script> [x](javascript:alert(1)) `c` *d* _e_\n# f"
NOTHING: dict[str, Any] = {"intended_use": None, "data_license": None, "ethical_considerations": None}


@pytest.fixture(scope="module")
def inputs(bars, tmp_path_factory):
    """A model of the bars that takes every fourth image for the next class, and its evaluation."""
    names = (ODD, *bars.facts.class_names[1:])
    labels = np.asarray(bars.split("test").labels)
    predicted = np.where(np.arange(len(labels)) % 4, labels, (labels + 1) % 3)
    model_folder, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("evaluation")
    model_facts = ModelFacts(
        dataset="bars:1.0.0",
        image_shape=(6, 5),
        class_names=names,
        normalization=Normalization(kind="standard", mean=60.0, deviation=50.0),
        params={"epochs": 3, "penalty": {"kind": "l1", "l1": 0.5}, "patience": None},
        num_parameters=1_234,
        metrics={},
        sparsity=(LayerSparsity(name="output", num_weights=90, num_zeros=12),),
        num_eliminated_pixels=0,
        synthetic=True,
    )
    model = Model.seal(model_folder, model_facts)
    np.save(folder / "predictions.npy", np.eye(3, dtype=np.float32)[predicted])
    classes = []
    for number, name in enumerate(names):
        right = int(np.sum((predicted == number) & (labels == number)))
        precision, recall = right / np.sum(predicted == number), right / np.sum(labels == number)
        f1 = 2 * precision * recall / (precision + recall)
        count = int(np.sum(labels == number))
        classes.append(ClassMetrics(name=name, precision=precision, recall=recall, f1=f1, num_examples=count))
    evaluation = ModelEvaluation.seal(
        folder,
        ModelEvaluationFacts(
            dataset="bars:1.0.0",
            model_digest=model.digest,
            num_examples=len(labels),
            loss=1.0,
            cross_entropy=0.5,
            accuracy=0.75,
            accuracy_interval=(0.63, 0.84),
            calibration_error=0.1,
            classes=tuple(classes),
            confusion_matrix=(),
            mistakes=(),
            verdict=Verdict(blessed=True, reasons=("accuracy 0.75 >= 0.5 (min_accuracy)",)),
            synthetic=True,
        ),
    )
    facts = PushedModelFacts(
        model_name="bars",
        model_digest=model.digest,
        evaluation_digest=evaluation.digest,
        accuracy=0.75,
        image_shape=(6, 5),
        class_names=names,
        synthetic=True,
        champion="1" * 64,
        dataset="bars:1.0.0",
        size=ModelSize(num_weights=93, num_multiply_adds=90, num_bytes=372),
    )
    return facts, bars, model, evaluation


def test_it_has_the_sections_of_mitchell_et_al(inputs):
    card = model_card.markdown(*inputs, **NOTHING)
    assert re.findall("^## (.*)$", card, re.MULTILINE) == SECTIONS
    assert "Mitchell et al." in card
    assert "**SYNTHETIC" in card


def test_it_has_parameters_lineage_and_size(inputs):
    facts, examples, model, evaluation = inputs
    card = model_card.markdown(*inputs, **NOTHING)
    for line in (
        "| penalty.l1 | 0.5 |",
        "| patience | none |",
        f"| Examples | Examples/{examples.digest} |",
        f"| Model | Model/{model.digest} |",
        f"| Evaluation | ModelEvaluation/{evaluation.digest} |",
        f"| Judged against the champion | Model/{'1' * 64} |",
        f"    ridgeline lineage Model/{facts.model_digest}",
        "- Size, as served: 93 weights, 0.000 MiB, 90 multiply-adds an image",
        "- accuracy 0.75 >= 0.5 (min_accuracy)",
    ):
        assert line in card.splitlines()


def test_each_class_has_its_metrics_with_wilson_intervals(inputs):
    _, examples, _, evaluation = inputs
    card = model_card.markdown(*inputs, **NOTHING)
    metrics = evaluation.facts.classes[1]
    right = round(metrics.recall * metrics.num_examples)
    interval = binomtest(right, metrics.num_examples).proportion_ci(0.95, method="wilson")
    row = next(line for line in card.splitlines() if line.startswith("| middle | "))
    assert f"| {metrics.recall:.3f} ({interval.low:.3f} to {interval.high:.3f}) | {metrics.f1:.3f} |" in row
    counts = [int(np.sum(np.asarray(examples.split(split).labels) == 1)) for split in ("test", "train", "validation")]
    assert row.endswith("".join(f" | {count}" for count in counts) + " |")
    assert row.count("|") == 8


def test_equal_inputs_give_equal_bytes(inputs):
    first, again = (model_card.markdown(*inputs, **NOTHING) for _ in range(2))
    assert first == again
    assert model_card.html(first, inputs[0]) == model_card.html(again, inputs[0])


def test_it_states_what_a_person_said_or_that_nobody_did(inputs):
    card = model_card.markdown(*inputs, **NOTHING)
    assert "Nobody stated an intended use (`export.intended_use`)." in card
    assert "- Licence of the data: not stated (`export.data_license`)" in card
    assert "Nobody stated any (`export.ethical_considerations`)." in card
    texts: dict[str, Any] = {
        "intended_use": "Sorting.",
        "data_license": "CC BY 4.0",
        "ethical_considerations": "No people.",
    }
    card = model_card.markdown(*inputs, **texts)
    assert "- Licence of the data: CC BY 4.0" in card
    assert "## Intended Use\n\nSorting.\n" in card
    assert "## Ethical Considerations\n\nNo people.\n" in card


def test_texts_from_outside_are_shown_as_they_are(inputs):
    card = model_card.markdown(*inputs, intended_use=ODD, data_license=ODD, ethical_considerations=ODD)
    page = model_card.html(card, inputs[0])
    shown = "a|b &lt;script&gt;alert(1)&lt;/script&gt; [x](javascript:alert(1)) `c` *d* _e_ # f"
    assert f"<p>{shown}</p>" in page
    assert f'<td style="text-align:left">{shown}</td>' in page
    assert "<script" not in page
    assert page.count("<h1") == 1


def test_the_html_has_each_table_and_a_banner(inputs):
    page = model_card.html(model_card.markdown(*inputs, **NOTHING), inputs[0])
    assert page.startswith("<!doctype html>")
    assert page.count("<table>") == 6
    assert "SYNTHETIC</strong>" in page
    assert "<title>Model card: bars</title>" in page
    assert "|" not in re.sub("<td.*?</td>|<li>.*?</li>", "", page[page.index("<main>") :])


@pytest.mark.parametrize(
    ("dataset", "page"),
    [("fashion_mnist:3.0.1", "<https://www.tensorflow.org/datasets/catalog/fashion_mnist>"), ("shop:folder", None)],
)
def test_a_dataset_of_the_catalog_is_linked(inputs, dataset, page):
    facts = inputs[0].model_copy(update={"dataset": dataset})
    card = model_card.markdown(facts, *inputs[1:], **NOTHING)
    assert (page in card) if page else ("datasets/catalog" not in card)


def test_with_many_classes_the_worst_are_shown(inputs, monkeypatch):
    monkeypatch.setattr(model_card, "MAX_CLASSES", 2)
    card = model_card.markdown(*inputs, **NOTHING)
    assert "The 2 classes with the lowest F1 of 3:" in card
    assert len(re.findall(r"^\| .* \(.*\) \| .* \(", card, re.MULTILINE)) == 2
