import html
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.evaluate import (
    Params,
    calibration_bins,
    calibration_error,
    evaluate,
    mean_cross_entropy,
)
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, write_split
from ridgeline.artifacts.model import Model, ModelFacts
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.component import Champion, ParameterError, StepError
from ridgeline.image_decoding import decode
from ridgeline.image_form import Form
from ridgeline.keys import key_parts
from ridgeline.significance import mcnemar_p_value, wilson_interval
from ridgeline.sources import read_sources

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cat", "<b>&", "dog")
SHAPE = (4, 4)
NUM_TEST = 60
L1, L2 = 0.01, 0.02
NORMALIZATION = Normalization(kind="unit", mean=0, deviation=255)


def make_examples(
    directory, num_test=NUM_TEST, shape=SHAPE, names=NAMES, synthetic=False, max_shard_bytes=10**6, test_labels=None
):
    rng = np.random.default_rng(7)
    sizes = {"train": 3, "validation": 3, "test": num_test}
    for split, size in sizes.items():
        images = rng.integers(0, 256, (size, *shape), np.uint8)
        labels = rng.integers(0, len(names), size)
        if split == "test" and test_labels is not None:
            labels = np.asarray(test_labels)
        if size:
            write_split(directory / split, [(images, labels)], size, shape, max_shard_bytes)
    return Examples.seal(
        directory,
        ExamplesFacts(
            dataset="tiny:1.0.0",
            image_shape=shape,
            class_names=names,
            num_examples=sizes,
            normalization=NORMALIZATION,
            synthetic=synthetic,
        ),
    )


def make_model(directory, kernel, bias, synthetic=False, names=NAMES):
    import keras

    network = keras.Sequential(
        [
            keras.Input(SHAPE, dtype="uint8", name="images"),
            keras.layers.Rescaling(1 / 255, name="normalize"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(
                len(names),
                activation="softmax",
                kernel_regularizer=keras.regularizers.L1L2(L1, L2),
                name="probabilities",
            ),
        ],
        name="tiny",
    )
    network.get_layer("probabilities").set_weights([kernel, bias])
    directory.mkdir()
    (directory / "architecture.json").write_text(network.to_json(), encoding="utf-8")
    with warnings.catch_warnings():
        # Keras 3.15 calls `np.array(variable)`, whose `__array__` does not know NumPy 2's `copy`.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
        network.save_weights(directory / "model.weights.h5")
    history = {"loss": [1.2, 1.0], "val_loss": [1.3, 1.1], "accuracy": [0.3, 0.5], "val_accuracy": [0.3, 0.4]}
    (directory / "history.json").write_text(json.dumps(history), encoding="utf-8")
    return Model.seal(
        directory,
        ModelFacts(
            dataset="tiny:1.0.0",
            image_shape=SHAPE,
            class_names=names,
            normalization=NORMALIZATION,
            params={"epochs": 2},
            num_parameters=kernel.size + bias.size,
            metrics={"loss": 1.0},
            sparsity=(),
            num_eliminated_pixels=0,
            synthetic=synthetic,
        ),
    )


def run(directory, examples, model, champion=None, **params):
    directory.mkdir()
    champion = Champion(champion.digest, champion) if isinstance(champion, Model) else champion
    return evaluate(params=Params(**params), output=directory, examples=examples, model=model, champion=champion)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(3)
    return rng.normal(0, 1.5, (16, 3)).astype(np.float32), np.array([0.1, -0.2, 0.3], np.float32)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return make_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, weights):
    return make_model(tmp_path_factory.mktemp("models") / "model", *weights)


@pytest.fixture(scope="module")
def indifferent_model(tmp_path_factory):
    """A model that gives every class the same probability, for every image."""
    return make_model(
        tmp_path_factory.mktemp("models") / "model", np.zeros((16, 3), np.float32), np.zeros(3, np.float32)
    )


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, examples, model):
    return run(tmp_path_factory.mktemp("evaluations") / "a", examples, model)


@pytest.fixture(scope="module")
def labels(examples):
    return np.asarray(examples.split("test").labels)


@pytest.fixture(scope="module")
def predicted(evaluation):
    return np.asarray(evaluation.predictions()).argmax(axis=1)


def test_the_output_is_a_valid_artifact(evaluation, examples, model):
    assert ModelEvaluation.load(evaluation.path).facts == evaluation.facts
    assert sorted(evaluation.manifest.files) == ["predictions.npy", "report.html"]
    assert evaluation.facts.dataset == examples.facts.dataset
    assert evaluation.facts.model_digest == model.digest
    assert evaluation.facts.num_examples == NUM_TEST


def test_predictions_are_the_softmax_of_the_raw_images(evaluation, examples, weights):
    kernel, bias = weights
    logits = (np.asarray(examples.split("test").images) / 255).reshape(NUM_TEST, 16) @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert evaluation.predictions().dtype == np.float32
    np.testing.assert_allclose(evaluation.predictions(), expected, atol=1e-6)


def test_cross_entropy_and_loss_follow_their_formulas(evaluation, labels, weights):
    chosen = evaluation.predictions()[np.arange(NUM_TEST), labels].astype(np.float64)
    cross_entropy = -np.log(chosen).mean()
    penalty = L1 * np.abs(weights[0]).sum() + L2 * (weights[0] ** 2).sum()
    assert evaluation.facts.cross_entropy == pytest.approx(cross_entropy, rel=1e-12)
    assert evaluation.facts.loss == pytest.approx(cross_entropy + penalty, rel=1e-6)


def test_loss_and_accuracy_are_those_that_keras_reports(evaluation, examples, model):
    network = model.load_keras()
    network.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    test = examples.split("test")
    reported = network.evaluate(np.asarray(test.images), np.asarray(test.labels), verbose=0, return_dict=True)
    assert evaluation.facts.loss == pytest.approx(reported["loss"], rel=1e-5)
    assert evaluation.facts.accuracy == pytest.approx(reported["accuracy"], rel=1e-6)


def test_accuracy_and_wilson_interval_follow_their_formulas(evaluation, labels, predicted):
    accuracy, n, z = (predicted == labels).mean(), NUM_TEST, 1.959963984540054
    center = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    assert 0 < accuracy < 1
    assert evaluation.facts.accuracy == pytest.approx(accuracy, rel=1e-12)
    assert evaluation.facts.accuracy_interval == pytest.approx((center - half, center + half), rel=1e-9)


def test_calibration_error_follows_its_formula(evaluation, labels, predicted):
    confidence = evaluation.predictions().max(axis=1).astype(np.float64)
    error = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gap = (predicted == labels)[inside].mean() - confidence[inside].mean()
            error += inside.mean() * abs(gap)
    assert evaluation.facts.calibration_error == pytest.approx(error, rel=1e-9)


def test_many_classes_with_long_names_make_a_bounded_report_and_manifest(tmp_path):
    names = tuple(f"{number:04} <b> {'a long name of a class ' * 8}" for number in range(1_500))
    examples = make_examples(tmp_path / "examples", num_test=3_000, names=names)
    rng = np.random.default_rng(3)
    model, champion = (
        make_model(tmp_path / name, rng.normal(0, 1.5, (16, 1_500)).astype(np.float32), np.zeros(1_500), names=names)
        for name in ("model", "champion")
    )
    evaluation = run(tmp_path / "evaluation", examples, model, champion, min_accuracy=0, min_class_recall=0)
    report = evaluation.report.read_text(encoding="utf-8")
    assert len(report) < 2**20
    assert (evaluation.path / "manifest.json").stat().st_size < 2**20
    assert evaluation.facts.confusion_matrix == ()
    assert len(evaluation.facts.classes) == 1_500
    labels, predicted = np.asarray(examples.split("test").labels), evaluation.predictions().argmax(axis=1)
    pairs = Counter(zip(labels[labels != predicted], predicted[labels != predicted], strict=True))
    (label, guess), count = pairs.most_common(1)[0]
    assert count > 1
    text = html.unescape(report)
    assert f'<th scope="row">{names[label]}</th><td>{names[guess]}</td><td>{count}</td>' in text
    assert "The 50 most frequent confusions. The matrix of all 1500 classes is left out." in text
    assert "The 50 classes with the lowest F1 of 1500." in text
    other = make_model(tmp_path / "other", np.zeros((16, 3), np.float32), np.zeros(3))
    with pytest.raises(ValueError, match="Expected a model with the examples' class_names") as caught:
        run(tmp_path / "none", examples, other)
    assert len(str(caught.value)) < 1_000


def test_confusion_matrix_and_class_metrics_follow_their_formulas(evaluation, labels, predicted):
    matrix = np.zeros((3, 3), int)
    for true, guess in zip(labels, predicted, strict=True):
        matrix[true, guess] += 1
    assert np.array_equal(evaluation.facts.confusion_matrix, matrix)
    for i, metrics in enumerate(evaluation.facts.classes):
        true_positives, row, column = matrix[i, i], matrix[i].sum(), matrix[:, i].sum()
        assert metrics.name == NAMES[i]
        assert metrics.num_examples == row
        assert metrics.precision == pytest.approx(true_positives / column)
        assert metrics.recall == pytest.approx(true_positives / row)
        assert metrics.f1 == pytest.approx(2 * true_positives / (row + column))


def test_a_class_never_predicted_has_zero_metrics(tmp_path, examples, indifferent_model, labels):
    facts = run(tmp_path / "a", examples, indifferent_model).facts
    assert [c.precision for c in facts.classes] == pytest.approx([(labels == 0).mean(), 0, 0])
    assert [c.recall for c in facts.classes] == [1, 0, 0]
    assert [c.f1 for c in facts.classes[1:]] == [0, 0]
    assert facts.cross_entropy == pytest.approx(np.log(3), rel=1e-6)
    assert facts.calibration_error == pytest.approx(abs(facts.accuracy - 1 / 3), abs=1e-6)


def test_mistakes_are_the_most_confident_ones(evaluation, labels, predicted):
    confidence = evaluation.predictions().max(axis=1)
    wrong = sorted(np.flatnonzero(predicted != labels), key=lambda i: (-confidence[i], i))
    kept = evaluation.facts.mistakes
    assert [m.index for m in kept] == wrong[:20]
    assert [m.label for m in kept] == [labels[i] for i in wrong[:20]]
    assert [m.predicted for m in kept] == [predicted[i] for i in wrong[:20]]
    assert [m.probability for m in kept] == [confidence[i] for i in wrong[:20]]


def test_equally_confident_mistakes_come_in_order(tmp_path, examples, indifferent_model, labels):
    mistakes = run(tmp_path / "a", examples, indifferent_model, num_mistakes=5).facts.mistakes
    assert [m.index for m in mistakes] == np.flatnonzero(labels != 0)[:5].tolist()


def test_no_mistakes_are_kept_if_none_are_asked_for(tmp_path, examples, model):
    assert run(tmp_path / "a", examples, model, num_mistakes=0).facts.mistakes == ()


def test_cross_entropy_of_an_impossible_label_is_finite():
    probabilities = np.array([[1, 0], [0.5, 0.5]], np.float32)
    expected = (-np.log(np.finfo(np.float32).tiny) + np.log(2)) / 2
    assert mean_cross_entropy(probabilities, np.array([1, 0])) == pytest.approx(expected, rel=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5], [0.6, 0.4]])
    bins = calibration_bins(probabilities, np.array([0, 1, 0]))
    assert np.flatnonzero(bins.counts).tolist() == [7, 8, 14]
    assert bins.counts.sum() == 3
    assert calibration_error(bins) == pytest.approx((0 + 0.5 + 0.4) / 3)


def test_a_model_that_meets_both_thresholds_is_blessed(evaluation, tmp_path, examples, model):
    facts = evaluation.facts
    weakest = min(facts.classes, key=lambda c: c.recall)
    verdict = run(
        tmp_path / "a", examples, model, min_accuracy=facts.accuracy, min_class_recall=weakest.recall
    ).facts.verdict
    assert verdict.blessed
    assert verdict.reasons == (
        f"accuracy {facts.accuracy:.6g} >= {facts.accuracy:.6g} (min_accuracy)",
        f"recall of {weakest.name} {weakest.recall:.6g} >= {weakest.recall:.6g} (min_class_recall)",
        "no other model to compare with: the thresholds decide",
    )
    assert verdict.forced is None


@pytest.mark.parametrize(("accuracy", "recall"), [(1, 0), (0, 1), (1, 1)])
def test_a_model_that_misses_a_threshold_is_not_blessed(tmp_path, examples, model, accuracy, recall):
    verdict = run(tmp_path / "a", examples, model, min_accuracy=accuracy, min_class_recall=recall).facts.verdict
    assert not verdict.blessed
    assert [" < 1 (" in reason for reason in verdict.reasons[:2]] == [accuracy == 1, recall == 1]
    assert [" >= 0 (" in reason for reason in verdict.reasons[:2]] == [accuracy == 0, recall == 0]


def test_a_class_without_test_images_is_not_blessed(tmp_path, model):
    examples = make_examples(tmp_path / "examples", num_test=1)
    verdict = run(tmp_path / "a", examples, model, min_accuracy=0).facts.verdict
    assert not verdict.blessed
    assert " 0 < 0.2 (min_class_recall)" in verdict.reasons[1]


# --- the comparison with the champion


@pytest.fixture(scope="module")
def solved(tmp_path_factory, predicted):
    """Examples on which `model` is always right."""
    return make_examples(tmp_path_factory.mktemp("solved"), test_labels=predicted)


def test_the_champion_is_measured_on_the_same_images(tmp_path, examples, model, indifferent_model, evaluation, labels):
    own = run(tmp_path / "own", examples, indifferent_model).facts
    facts = run(tmp_path / "a", examples, model, indifferent_model).facts
    comparison = facts.comparison
    assert facts.model_copy(update={"comparison": None, "verdict": evaluation.facts.verdict}) == evaluation.facts
    assert comparison.model_digest == indifferent_model.digest
    assert (comparison.accuracy, comparison.accuracy_interval) == (own.accuracy, own.accuracy_interval)
    assert comparison.class_recalls == tuple(c.recall for c in own.classes)
    champion_right = labels == 0  # it always says the first class
    candidate_right = np.asarray(evaluation.predictions()).argmax(axis=1) == labels
    assert comparison.only_champion_right == np.sum(champion_right & ~candidate_right)
    assert comparison.only_candidate_right == np.sum(candidate_right & ~champion_right)
    pair = comparison.only_champion_right, comparison.only_candidate_right
    assert comparison.p_value == mcnemar_p_value(*pair, alternative="greater")


def test_a_significantly_worse_model_is_not_blessed(tmp_path, solved, model, indifferent_model):
    thresholds = {"min_accuracy": 0, "min_class_recall": 0}
    facts = run(tmp_path / "a", solved, indifferent_model, model, **thresholds).facts
    missed = facts.num_examples - round(facts.accuracy * facts.num_examples)
    assert (facts.comparison.only_champion_right, facts.comparison.only_candidate_right) == (missed, 0)
    assert not facts.verdict.blessed
    assert facts.verdict.reasons[2] == (
        f"against model {model.digest[:12]}, which alone is right on {missed} images, this model on 0: "
        f"p {0.5**missed:.6g} < 0.05 (worse_significance)"
    )
    assert run(
        tmp_path / "b", solved, indifferent_model, model, **thresholds, worse_significance=0
    ).facts.verdict.blessed


def test_a_better_model_and_an_equal_one_are_blessed(tmp_path, solved, model, indifferent_model):
    for name, champion in (("better", indifferent_model), ("equal", model)):
        verdict = run(tmp_path / name, solved, model, champion).facts.verdict
        assert verdict.blessed
        assert "p 1 >= 0.05 (worse_significance)" in verdict.reasons[2]


def test_the_thresholds_hold_for_a_better_model_too(tmp_path, examples, model, indifferent_model):
    verdict = run(tmp_path / "a", examples, model, indifferent_model, min_accuracy=1).facts.verdict
    assert not verdict.blessed
    assert ">= 0.05 (worse_significance)" in verdict.reasons[2]


def test_champion_predictions_that_are_not_finite_count_as_wrong(tmp_path, solved, model):
    broken = make_model(tmp_path / "broken", np.zeros((16, 3), np.float32), np.full(3, np.nan, np.float32))
    comparison = run(tmp_path / "a", solved, model, broken).facts.comparison
    assert (comparison.accuracy, comparison.only_candidate_right) == (0, NUM_TEST)


@pytest.mark.parametrize("other", [{"image_shape": (5, 5)}, {"class_names": ("cat", "dog", "bird")}])
def test_a_champion_of_other_images_is_not_compared_and_the_thresholds_decide(tmp_path, solved, model, other):
    (tmp_path / "other").mkdir()
    champion = Model.seal(tmp_path / "other", model.facts.model_copy(update={**other, "dataset": "old:1.0.0"}))
    facts = run(tmp_path / "a", solved, model, champion).facts
    assert facts.comparison is None
    assert facts.verdict.blessed
    assert facts.verdict.reasons[2] == (
        f"not comparable with model {champion.digest[:12]}, trained on old:1.0.0 with other images or classes: "
        "the thresholds decide"
    )


def test_a_forced_blessing_keeps_the_failed_checks_and_the_reason(tmp_path, solved, model, indifferent_model):
    facts = run(tmp_path / "a", solved, indifferent_model, model, force_blessing=" a demo for <Ann> ").facts
    assert (facts.verdict.blessed, facts.verdict.forced) == (True, "a demo for <Ann>")
    assert "< 0.75 (min_accuracy)" in facts.verdict.reasons[0]
    assert "< 0.05 (worse_significance)" in facts.verdict.reasons[2]
    assert facts.verdict.reasons[-1] == "forced: a demo for <Ann>"


def test_an_unneeded_reason_is_recorded_but_not_a_forced_blessing(tmp_path, solved, model):
    verdict = run(tmp_path / "a", solved, model, force_blessing="a demo").facts.verdict
    assert (verdict.blessed, verdict.forced, verdict.force_reason) == (True, None, "a demo")
    assert not any("forced" in reason for reason in verdict.reasons)


def test_the_verdict_names_the_champion(tmp_path, solved, model, indifferent_model):
    assert run(tmp_path / "none", solved, model).facts.verdict.champion is None
    assert run(tmp_path / "one", solved, model, indifferent_model).facts.verdict.champion == indifferent_model.digest


def test_an_unreadable_champion_blocks_every_blessing_except_a_forced_one(tmp_path, solved, model):
    verdict = run(tmp_path / "a", solved, model, Champion("5" * 64, None)).facts.verdict
    assert (verdict.blessed, verdict.champion) == (False, "5" * 64)
    assert verdict.reasons[2] == (
        "the champion, model 555555555555, can't be read (it is missing or damaged): restore it, roll back, or "
        "give a reason in force_blessing"
    )
    forced = run(tmp_path / "b", solved, model, Champion("5" * 64, None), force_blessing="lost").facts.verdict
    assert (forced.blessed, forced.forced) == (True, "lost")


@pytest.mark.parametrize("blank", ["", " \n", None])
def test_a_blank_reason_forces_nothing(tmp_path, solved, indifferent_model, blank):
    verdict = run(tmp_path / "a", solved, indifferent_model, force_blessing=blank).facts.verdict
    assert (verdict.blessed, verdict.forced) == (False, None)
    assert not any("forced" in reason for reason in verdict.reasons)


def test_batches_and_shards_do_not_change_the_predictions(tmp_path, monkeypatch, evaluation, model):
    sharded = make_examples(tmp_path / "examples", max_shard_bytes=25 * 16)
    assert len(sharded.split("test").shards) == 3
    monkeypatch.setattr("components.evaluate.BATCH_SIZE", 10)
    other = run(tmp_path / "a", sharded, model)
    np.testing.assert_allclose(other.predictions(), evaluation.predictions(), atol=1e-6)
    assert [m.index for m in other.facts.mistakes] == [m.index for m in evaluation.facts.mistakes]


@pytest.mark.fresh_process
def test_equal_input_gives_equal_bytes_also_in_another_process(tmp_path, evaluation, examples, model):
    assert run(tmp_path / "again", examples, model).digest == evaluation.digest
    command = [sys.executable, "-m", "ridgeline.cli", "step", "evaluate", "--output", str(tmp_path / "other")]
    command += ["--examples", str(examples.path), "--model", str(model.path)]
    environment = os.environ | {"PYTHONHASHSEED": "4242", "TZ": "Asia/Tokyo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    other = ModelEvaluation.load(tmp_path / "other")
    assert other.report.read_bytes() == evaluation.report.read_bytes()
    assert other.digest == evaluation.digest


@pytest.mark.parametrize("which", ["examples", "model"])
def test_synthetic_images_on_either_side_make_it_synthetic(tmp_path, weights, evaluation, which):
    examples = make_examples(tmp_path / "examples", synthetic=which == "examples")
    model = make_model(tmp_path / "model", weights[0], weights[1], synthetic=which == "model")
    other = run(tmp_path / "a", examples, model)
    assert other.facts.synthetic
    assert "SYNTHETIC" in other.report.read_text(encoding="utf-8")
    assert not evaluation.facts.synthetic
    assert "SYNTHETIC" not in evaluation.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_accuracy": 1.01}, "evaluate.min_accuracy: .*less than or equal to 1; received 1.01"),
        ({"min_accuracy": float("nan")}, "evaluate.min_accuracy"),
        ({"min_class_recall": -0.1}, "evaluate.min_class_recall: .*greater than or equal to 0; received -0.1"),
        ({"worse_significance": 0.6}, "evaluate.worse_significance: .*less than or equal to 0.5; received 0.6"),
        ({"worse_significance": -0.1}, "evaluate.worse_significance: .*greater than or equal to 0"),
        ({"force_blessing": "x" * 501}, "evaluate.force_blessing: .*at most 500"),
        ({"num_mistakes": 101}, "evaluate.num_mistakes: .*less than or equal to 100; received 101"),
        ({"num_mistakes": 1.5}, "evaluate.num_mistakes: .*a valid integer"),
        ({"batch_size": 10}, "Unknown parameter evaluate.batch_size"),
    ],
)
def test_invalid_parameters_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        evaluate.parse(values)


def test_defaults_are_those_documented():
    assert evaluate.parse({}) == Params(
        min_accuracy=0.75, min_class_recall=0.2, worse_significance=0.05, force_blessing=None, num_mistakes=20
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"shape": (5, 5)}, r"image_shape \(5, 5\); received \(4, 4\)"),
        (
            {"names": ("dog", "cat", "bird")},
            r"class_names \('dog', 'cat', 'bird'\); received \('cat'",
        ),
    ],
)
def test_a_model_of_another_dataset_is_refused_before_any_work(tmp_path, model, other, message):
    examples = make_examples(tmp_path / "examples", **other)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a", examples, model)
    assert list((tmp_path / "a").iterdir()) == []


def test_an_empty_test_split_is_refused_before_any_work(tmp_path, model):
    examples = make_examples(tmp_path / "examples", num_test=0)
    with pytest.raises(ValueError, match="at least 1 image in the test split; received 0"):
        run(tmp_path / "a", examples, model)
    assert list((tmp_path / "a").iterdir()) == []


def test_probabilities_that_are_not_finite_are_refused(tmp_path, examples):
    model = make_model(tmp_path / "model", np.zeros((16, 3), np.float32), np.full(3, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"finite probabilities; received \[nan, nan, nan\] for test image 0"):
        run(tmp_path / "a", examples, model)


def test_importing_the_step_is_light():
    code = (
        "import sys, components.evaluate; heavy = {'tensorflow', 'keras', 'sklearn', 'scipy', 'matplotlib'}; "
        "print(heavy & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """A folder with forty images, of the model's size and of others, and a text."""
    folder = tmp_path_factory.mktemp("unlabelled") / "images"
    folder.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (4 + number % 2, 4), np.uint8)
        Image.fromarray(pixels).save(folder / f"<{number:02}>.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def replay(folder, examples, model, champion, unlabelled, **params):
    folder.mkdir()
    parsed = Params(**{"replay_dir": str(unlabelled), "min_class_recall": 0} | params)
    if champion is not None and not isinstance(champion, Champion):
        champion = Champion(champion.digest, champion)
    given = {"examples": examples, "model": model, "champion": champion}
    sources = read_sources(evaluate, parsed, None, inputs=["champion"] if champion else [])
    return evaluate(params=parsed, output=folder, sources=sources, **given)


def test_unlabelled_images_are_replayed_by_both_models(tmp_path, solved, model, indifferent_model, unlabelled):
    evaluation = replay(tmp_path / "a", solved, model, indifferent_model, unlabelled)
    names = [name for name in sorted(os.listdir(unlabelled)) if name.endswith(".png")]
    images = np.stack([np.asarray(decode((unlabelled / n).read_bytes(), Form.of_shape(SHAPE))[0]) for n in names])
    before, after = (m.load_keras().predict(images, verbose=0).argmax(axis=1) for m in (indifferent_model, model))
    assert 0 < np.sum(before == after) < len(images)
    found = evaluation.facts.replay
    assert (found.num_images, found.num_unreadable) == (40, 1)
    assert found.agreement == np.mean(before == after)
    assert found.agreement_interval == wilson_interval(int(np.sum(before == after)), 40)
    pairs = Counter((int(a), int(b)) for a, b in zip(before, after, strict=True) if a != b)
    assert {(flip.champion, flip.candidate): flip.count for flip in found.flips} == dict(pairs)
    assert [flip.count for flip in found.flips] == sorted(pairs.values(), reverse=True)
    verdict = evaluation.facts.verdict
    assert verdict.blessed  # it is not asked to agree
    low, high = found.agreement_interval
    assert verdict.reasons[3] == (
        f"same class as model {indifferent_model.digest[:12]} on 40 unlabelled images, 95 % interval {low:.6g} to "
        f"{high:.6g}: share {found.agreement:.6g} >= 0 (min_agreement)"
    )
    page = evaluation.report.read_text()
    assert "Replay of unlabelled images" in page
    for flip in found.flips:
        pair = (flip.champion, flip.candidate)
        shown = [name for name, a, b in zip(names, before, after, strict=True) if (a, b) == pair]
        for name in shown[:3]:
            assert f'title="{html.escape(name)}"' in page
        assert not [name for name in shown[3:] if html.escape(name) in page]


def test_a_model_that_disagrees_with_the_champion_is_not_blessed_if_asked_to(
    tmp_path, solved, model, indifferent_model, unlabelled
):
    facts = replay(tmp_path / "a", solved, model, indifferent_model, unlabelled, min_agreement=0.9).facts
    assert not facts.verdict.blessed
    assert facts.verdict.unmet == ("agreement with the champion",)
    assert facts.verdict.reasons[3].endswith(f"share {facts.replay.agreement:.6g} < 0.9 (min_agreement)")
    same = replay(tmp_path / "b", solved, model, model, unlabelled, min_agreement=1).facts
    assert (same.replay.agreement, same.replay.flips, same.verdict.blessed) == (1, (), True)


@pytest.mark.parametrize("min_agreement", [None, 1])
@pytest.mark.parametrize(
    ("champion", "why"),
    [
        ("none", "there is no champion to compare with"),
        ("unreadable", "the champion can't be read"),
        ("misfit", "the champion was trained on other images or classes"),
    ],
)
def test_the_verdict_says_why_nothing_was_replayed(tmp_path, solved, model, unlabelled, champion, why, min_agreement):
    (tmp_path / "misfit").mkdir()
    misfit = model.facts.model_copy(update={"class_names": ("cat", "dog", "bird")})
    champions: dict[str, Any] = {
        "none": None,
        "unreadable": Champion("5" * 64, None),
        "misfit": Model.seal(tmp_path / "misfit", misfit),
    }
    facts = replay(tmp_path / "a", solved, model, champions[champion], unlabelled, min_agreement=min_agreement).facts
    assert facts.replay is None
    assert facts.verdict.blessed == (champion != "unreadable")
    said = [reason for reason in facts.verdict.reasons if "replay" in reason]
    # without a champion and a minimum, nothing in the key tells that there is a folder
    assert said == [f"no replay of unlabelled images: {why}"] * (champion != "none" or min_agreement is not None)


def test_a_folder_without_readable_images_cannot_be_replayed(tmp_path, solved, model, unlabelled):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    with pytest.raises(StepError, match=r"received 1 files, none of which is a\s+readable image"):
        replay(tmp_path / "a", solved, model, model, tmp_path / "texts")


def test_a_minimum_agreement_needs_images(unlabelled):
    with pytest.raises(ParameterError, match=r"^Parameter evaluate\.min_agreement: expected a folder of unlabelled"):
        evaluate.parse({"min_agreement": 0.5})
    assert Params(replay_dir=str(unlabelled), min_agreement=0.5).min_agreement == 0.5


def test_the_content_of_the_replayed_folder_is_in_the_key_and_its_place_is_not(tmp_path, examples, model, unlabelled):
    def key(folder):
        params = evaluate.parse({"replay_dir": folder and str(folder)})
        sources = read_sources(evaluate, params, None, inputs=inputs)
        return key_parts(evaluate, inputs, params, sources).key()

    inputs = {"examples": examples, "model": model, "champion": Champion("5" * 64, None)}
    moved = shutil.copytree(unlabelled, tmp_path / "moved")
    assert key(moved) == key(unlabelled) != key(None)
    (moved / "notes.txt").write_text("other")
    assert key(moved) != key(unlabelled)
    del inputs["champion"]  # there is nothing to replay for
    assert key(moved) == key(tmp_path / "missing") == key(None)
