import csv

import numpy as np
import pytest

from components.label_errors import (
    Params,
    calibrated,
    cross_validated_scores,
    label_errors,
    last_hidden_layer,
    suggest_labels,
)
from components.train import train
from ridgeline.artifacts.dataset import FILES, Dataset, DatasetFacts, write_dataset_split, write_files
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, held_out, write_split
from ridgeline.component import StepError
from ridgeline.keys import key_parts

CLASSES = ("cap", "=1+1", '<b>"sock"</b>')
NUM, NUM_VALIDATION = 900, 90
SHAPE = (6, 5)
WRONG = np.arange(0, NUM, 20)  # 45, 5 of them in validation


def labels_and_images(wrong):
    """Return separable images, each class with bright rows of its own, and their labels, some of them wrong."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM) % 3
    images = rng.integers(0, 90, (NUM, *SHAPE), dtype=np.uint8)
    for i, label in enumerate(labels):
        images[i, 2 * label : 2 * label + 2] += 120
    given = labels.copy()
    given[wrong] = (labels[wrong] + 1) % 3
    return given, images


def odd_name(row):
    return ["=cmd()/1.png", "train/a,b\n.png", 'train/"><script>/1.png', "-1.png", "é ü.png"][row // 20 % 5]


def make(folder, wrong, files=True, **training):
    """Return a dataset, examples that were made from it as `transform` does, and a model that was trained on them."""
    labels, images = labels_and_images(wrong)
    validation = held_out(labels, np.bincount(labels[NUM - NUM_VALIDATION :]))
    splits = {
        name: write_dataset_split(folder / "dataset" / name, [(images, labels)], NUM, SHAPE, 3)
        for name in ("train", "test")
    }
    if files:
        listed = {name: [(f"{row}/{odd_name(row)}", "", "") for row in range(NUM)] for name in splits}
        write_files(folder / "dataset" / FILES, listed)
    dataset = Dataset.seal(
        folder / "dataset",
        DatasetFacts(
            name="bars:1.0.0", image_shape=SHAPE, class_names=CLASSES, splits=splits, raw_files={}, synthetic=False
        ),
    )
    rows = {"train": ~validation, "validation": validation}
    for name, chosen in rows.items():
        number = int(chosen.sum())
        write_split(folder / "examples" / name, [(images[chosen], labels[chosen])], number, SHAPE, 200 * 30)
    examples = Examples.seal(
        folder / "examples",
        ExamplesFacts(
            dataset="bars:1.0.0",
            image_shape=SHAPE,
            class_names=CLASSES,
            num_examples={name: int(chosen.sum()) for name, chosen in rows.items()} | {"test": NUM},
            normalization=Normalization(kind="unit", mean=0.0, deviation=255.0),
            synthetic=False,
        ),
    )
    (folder / "model").mkdir()
    params = train.parse({"epochs": 5, "mlp": {"hidden_units": [16]}, "penalty": {"kind": "none"}} | training)
    return dataset, examples, train(examples=examples, params=params, output=folder / "model", scratch=None)


def find(folder, dataset, examples, model, **values):
    folder.mkdir()
    return label_errors(
        dataset=dataset, examples=examples, model=model, params=label_errors.parse(values), output=folder
    )


def rows_of(examples, suspects):
    """Return the rows in the dataset of suspects, as split and row."""
    labels, _ = labels_and_images(WRONG)
    validation = held_out(labels, np.bincount(labels[NUM - NUM_VALIDATION :]))
    places = {"train": np.flatnonzero(~validation), "validation": np.flatnonzero(validation)}
    return [int(places[split][int(row)]) for split, row in suspects]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    made = make(folder, WRONG)
    return *made, find(folder / "out", *made)


def test_wrong_labels_are_found_in_both_splits_and_no_right_one(planted):
    _, examples, model, found = planted
    facts = found.facts
    assert sorted(rows_of(examples, [(s.split, s.row) for s in facts.suspects])) == WRONG.tolist()
    assert (facts.splits["train"].num_suspects, facts.splits["validation"].num_suspects) == (41, 4)
    assert (facts.splits["train"].num_examples, facts.splits["validation"].num_examples) == (810, 90)
    assert facts.splits["train"].agreement == pytest.approx(1 - 41 / 810)
    labels, _ = labels_and_images(WRONG)
    assert {(p.label, p.suggested, p.count, p.num_examples) for p in facts.pairs} == {
        (label, (label - 1) % 3, 15, int(np.sum(labels == label))) for label in range(3)
    }
    assert all(suspect.suggested == (suspect.label - 1) % 3 for suspect in facts.suspects)
    assert all(0.8 < suspect.probability <= 1 for suspect in facts.suspects)
    assert (facts.model_digest, facts.examples_digest, found.problem) == (model.digest, examples.digest, None)


def test_a_network_that_learned_the_wrong_labels_by_heart_does_not_hide_them(tmp_path):
    dataset, examples, model = make(
        tmp_path, WRONG, epochs=60, mlp={"hidden_units": [100, 100]}, optimizer="adam", learning_rate=0.003
    )
    split = examples.split("train")
    learned = model.load_keras().predict_on_batch(split.images).argmax(axis=1) == split.labels
    wrong = rows_of(examples, [("train", row) for row in range(len(split))])
    assert learned[np.isin(wrong, WRONG)].mean() > 0.5
    found = find(tmp_path / "out", dataset, examples, model)
    suspects = rows_of(examples, [(s.split, s.row) for s in found.facts.suspects])
    assert len(set(suspects) & set(WRONG.tolist())) >= 0.8 * len(WRONG)


def test_right_labels_give_no_suspects(tmp_path):
    found = find(tmp_path / "out", *make(tmp_path, WRONG[:0]))
    assert (found.facts.suspects, found.facts.pairs) == ((), ())
    assert "0 of 900 labels are suspicious" in found.report.read_text(encoding="utf-8")
    assert (found.path / "suspects.csv").read_text() == '"split","row","file","label","suggested","probability"\n'


def test_the_list_names_every_suspect_and_holds_no_formula(planted):
    _, examples, _, found = planted
    with (found.path / "suspects.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 45
    for row, suspect in zip(rows, found.facts.suspects, strict=True):
        place = rows_of(examples, [(row["split"], row["row"])])[0]
        assert row["file"] == suspect.file == f"{place}/{odd_name(place)}"
        assert row["label"] == ("'=1+1" if suspect.label == 1 else CLASSES[suspect.label])
        assert float(row["probability"]) == suspect.probability
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())


def test_a_file_name_that_looks_like_a_formula_gets_a_prefix_that_changes_no_path(tmp_path):
    dataset, examples, model = make(tmp_path, WRONG)
    names = {"train": [("=1+1.png", "", "")] * NUM, "test": []}
    write_files(dataset.path / FILES, names)
    found = find(tmp_path / "out", dataset, examples, model)
    assert found.facts.suspects[0].file == "=1+1.png"
    assert '"./=1+1.png"' in (found.path / "suspects.csv").read_text(encoding="utf-8")


def test_the_report_shows_the_first_suspects_and_escapes_names(planted, tmp_path):
    dataset, examples, model, found = planted
    text = found.report.read_text(encoding="utf-8")
    assert "45 of 900 labels are suspicious" in text
    assert text.count("<img src=") == 45
    assert "<script" not in text
    assert "<b>" not in text
    assert "train/&#34;&gt;&lt;script&gt;/1.png" in text
    few = find(tmp_path / "few", dataset, examples, model, num_suspects=3)
    assert few.facts.suspects == found.facts.suspects[:3]
    assert few.report.read_text(encoding="utf-8").count("<img src=") == 3
    assert (few.path / "suspects.csv").read_bytes() == (found.path / "suspects.csv").read_bytes()


def test_a_dataset_without_files_has_no_column_for_them(tmp_path):
    found = find(tmp_path / "out", *make(tmp_path, WRONG, files=False))
    assert {suspect.file for suspect in found.facts.suspects} == {""}
    assert '<th scope="col">File</th>' not in found.report.read_text(encoding="utf-8")


def test_the_report_of_a_weak_network_says_that_most_labels_are_right(planted, tmp_path):
    *_, found = planted
    weak = make(tmp_path, np.flatnonzero(np.arange(NUM) % 2))
    warning = "the network is too weak to find wrong ones"
    assert warning in find(tmp_path / "out", *weak).report.read_text(encoding="utf-8")
    assert warning not in found.report.read_text(encoding="utf-8")


def test_equal_input_gives_equal_bytes(planted, tmp_path):
    dataset, examples, model, found = planted
    assert find(tmp_path / "again", dataset, examples, model).digest == found.digest


def with_facts(artifact, **facts):
    return type(artifact)(
        artifact.path, artifact.manifest.model_copy(update={"facts": artifact.manifest.facts | facts})
    )


def test_other_datasets_and_models_are_refused(planted, tmp_path):
    dataset, examples, model, _ = planted
    with pytest.raises(StepError, match=r"Expected the dataset that the examples were made from, bars:1.0.0"):
        find(tmp_path / "dataset", with_facts(dataset, name="other:1.0.0"), examples, model)
    with pytest.raises(StepError, match="Expected a model with the examples' class_names"):
        find(tmp_path / "model", dataset, examples, with_facts(model, class_names=["a", "b", "c"]))


def test_the_number_of_suspects_is_bounded():
    assert Params().num_suspects == 100
    assert Params.model_fields["num_suspects"].metadata[1].le == 1000


def random_predictions(seed, num_classes=5, number=120):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, number)
    logits = rng.normal(0, 1.5, (number, num_classes))
    logits[np.arange(number), labels] += 2
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def test_the_suspects_are_those_of_cleanlab():
    # find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1) of cleanlab 2.9.0
    expected = {
        0: [
            3,
            6,
            19,
            20,
            29,
            30,
            31,
            34,
            37,
            39,
            43,
            45,
            52,
            55,
            60,
            61,
            68,
            82,
            83,
            84,
            85,
            91,
            106,
            111,
            112,
            113,
            117,
        ],
        1: [
            2,
            7,
            13,
            16,
            18,
            19,
            21,
            25,
            28,
            29,
            37,
            42,
            52,
            63,
            68,
            70,
            79,
            85,
            88,
            90,
            93,
            98,
            105,
            108,
            109,
            110,
            114,
            119,
        ],
    }
    for seed, rows in expected.items():
        probabilities, labels = random_predictions(seed)
        assert np.flatnonzero(suggest_labels(probabilities, labels) != labels).tolist() == rows


def test_an_image_is_suspicious_only_of_a_class_that_is_likely():
    # Image 0 resembles class 1 more than its own, but less than the images of class 1 do.
    probabilities = np.array([[0.45, 0.55], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9]])
    assert suggest_labels(probabilities, np.array([0, 0, 1, 1])).tolist() == [0, 0, 1, 1]


def test_the_only_image_with_a_label_is_not_suspicious():
    labels = np.array([0] * 20 + [1] * 20 + [2])
    features = np.eye(2)[np.array([0] * 20 + [1] * 20 + [0])]
    scores = cross_validated_scores(lambda: iter([features]), labels, 4)
    assert (scores[:, 3] < -1e29).all()
    assert (scores[40, 2] < -1e29).all()
    probabilities = calibrated(scores, labels)
    assert np.isfinite(probabilities).all()
    assert suggest_labels(probabilities, labels).tolist() == labels.tolist()


def test_labels_that_occur_once_and_a_layer_that_yields_nothing_are_no_error():
    labels = np.array([0, 1])
    probabilities = calibrated(cross_validated_scores(lambda: iter([np.eye(2)]), labels, 2), labels)
    assert suggest_labels(probabilities, labels).tolist() == [0, 1]
    labels = np.arange(20) % 2
    scores = cross_validated_scores(lambda: iter([np.zeros((20, 3))]), labels, 2)
    assert np.isfinite(calibrated(scores, labels)).all()


def joined(keras, images):
    return keras.layers.Average()([keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(images)) for _ in range(2)])


def pooled(keras, images):
    maps = keras.layers.Conv2D(3, 2)(keras.layers.Reshape((*SHAPE, 1))(images))
    return keras.layers.Softmax()(keras.layers.GlobalAveragePooling2D()(maps))


def wide(keras, images):
    return keras.layers.Dense(3, "softmax")(keras.layers.Dense(600, "relu")(keras.layers.Flatten()(images)))


@pytest.mark.parametrize("end", [joined, pooled, wide])
def test_any_network_has_a_last_hidden_layer_of_bounded_width(end, planted):
    import keras

    _, examples, _, _ = planted
    keras.utils.set_random_seed(0)
    images = keras.Input(SHAPE, dtype="uint8")
    network = keras.Model(images, end(keras, keras.layers.Rescaling(1 / 255)(images)))
    split = examples.split("train")
    features = last_hidden_layer(network)(split.images)
    assert features.dtype == np.float64
    assert features.shape == (len(split), {joined: 3, pooled: 3, wide: 512}[end])
    if end is wide:
        scores = cross_validated_scores(lambda: iter([features]), split.labels, 3)
        assert np.mean(scores.argmax(axis=1) == split.labels) > 0.9


def test_a_network_that_yields_infinity_is_refused(planted):
    _, examples, model, _ = planted
    network = model.load_keras()
    kernel, bias = network.layers[-2].get_weights()
    network.layers[-2].set_weights([kernel, bias + np.inf])
    with pytest.raises(StepError, match="Expected finite values in the network's last hidden layer"):
        last_hidden_layer(network)(examples.split("train").images)


def test_each_image_is_scored_without_itself():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rng = np.random.default_rng(2)
    labels = np.arange(100) % 2
    features = rng.normal(0, 1, (100, 3)) + 2 * labels[:, None]
    scores = cross_validated_scores(lambda: iter([features[:37], features[37:]]), labels, 2)
    order = np.argsort(labels, kind="stable")
    for part in range(5):
        own = np.sort(np.concatenate([order[part:50:5], order[50 + part :: 5]]))
        rest = np.setdiff1d(np.arange(100), own)
        shrinkage = 0.01 / 1.01  # scikit-learn's is a share, this step's a sum: the same up to the factor 1.01
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        reference.fit(features[rest], labels[rest])
        difference = scores[own, 1] - scores[own, 0]
        correlation = np.corrcoef(difference, reference.decision_function(features[own]))[0, 1]
        assert correlation == pytest.approx(1, abs=1e-6)


def test_calibrated_probabilities_are_as_certain_as_the_labels_are():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 5000)
    right = rng.random(5000) < 0.8
    scores = np.where((labels == 1) == right, 50.0, -50.0)[:, None] * np.array([-1, 1])
    probabilities = calibrated(scores.astype(np.float32), labels)
    assert probabilities.max(axis=1).mean() == pytest.approx(np.mean(right), abs=0.01)


def test_export_runs_after_it_but_nothing_of_it_is_in_its_key(planted):
    from components.export import export

    _, examples, model, _ = planted
    assert label_errors.output in export.after
    parts = key_parts(export, {"examples": examples, "model": model}, export.parse({}))
    assert not {"components/label_errors.py", "components/reports/label_errors.py"} & set(parts.code)


@pytest.mark.real_data
def test_five_percent_of_wrong_labels_of_a_class_are_listed(fashion_mnist, tmp_path):
    store, refs = fashion_mnist
    dataset, examples = (store.open(refs[n], kind) for n, kind in (("ingest", Dataset), ("transform", Examples)))
    labels = np.concatenate([examples.split(name).labels for name in ("train", "validation")])
    bag, sandal = (examples.facts.class_names.index(name) for name in ("Bag", "Sandal"))
    wrong = np.random.default_rng(7).choice(np.flatnonzero(labels == bag), 300, replace=False)
    labels[wrong] = sandal
    start = 0
    for name in ("train", "validation"):
        images = examples.split(name).images
        part = labels[start : start + len(images)]
        write_split(tmp_path / "examples" / name, [(images, part)], len(images), examples.facts.image_shape)
        start += len(images)
    planted = Examples.seal(tmp_path / "examples", examples.facts)
    (tmp_path / "model").mkdir()
    model = train(examples=planted, params=train.parse({}), output=tmp_path / "model", scratch=None)
    facts = find(tmp_path / "out", dataset, planted, model, num_suspects=300).facts
    listed = {(s.split, s.row) for s in facts.suspects}
    num_train = examples.facts.num_examples["train"]
    places = {("train", int(row)) if row < num_train else ("validation", int(row - num_train)) for row in wrong}
    assert len(listed & places) >= 150  # of the 300 most suspicious images of 60,000
    pair = next(p for p in facts.pairs if (p.label, p.suggested) == (sandal, bag))
    assert 220 <= pair.count <= 300
    clean = store.open(refs["label_errors"], label_errors.output).facts
    assert sum(p.count for p in clean.pairs if (p.label, p.suggested) == (sandal, bag)) < 20
    assert sum(split.num_suspects for split in clean.splits.values()) < 0.08 * 60_000
