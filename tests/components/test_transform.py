import shutil

import numpy as np
import pytest

import components.transform
from components import datasets
from components.transform import transform
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples
from ridgeline.component import StepError
from ridgeline.image_form import Form
from tests.components.conftest import make_dataset


@pytest.fixture
def dataset(synthetic_store, refs):
    return synthetic_store.open(refs["ingest"], Dataset)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Training and test images and labels as a notebook reads them with tfds."""
    import tensorflow_datasets as tfds

    datasets.register()
    builder = tfds.builder("synthetic_garments:1.0.0", data_dir=tmp_path_factory.mktemp("tfds"), file_format="tfrecord")
    builder.download_and_prepare()
    both = builder.as_dataset(batch_size=-1, as_supervised=True)
    return {name: tfds.as_numpy(both[name]) for name in ("train", "test")}


def run(dataset, output, **values):
    output.mkdir()
    return transform(dataset=dataset, params=transform.parse(values), output=output)


def test_splits_are_the_notebooks(synthetic_store, refs, notebook):
    examples = synthetic_store.open(refs["transform"], Examples)
    images, labels = notebook["train"]
    expected = {
        "train": (images[:-1000], labels[:-1000]),
        "validation": (images[-1000:], labels[-1000:]),
        "test": notebook["test"],
    }
    for name, (split_images, split_labels) in expected.items():
        split = examples.split(name)
        np.testing.assert_array_equal(split.images, split_images[..., 0])
        np.testing.assert_array_equal(split.labels, split_labels)
        assert examples.facts.num_examples[name] == len(split) == len(split_labels)


def test_unit_normalization_divides_by_255(synthetic_store, refs):
    normalization = synthetic_store.open(refs["transform"], Examples).facts.normalization
    assert (normalization.kind, normalization.mean, normalization.deviation) == ("unit", 0.0, 255.0)


def test_standard_normalization_is_of_the_training_split_only(dataset, notebook, tmp_path):
    facts = run(dataset, tmp_path / "out", validation_examples=2_000, normalization="standard").facts
    pixels = notebook["train"][0][:-2000].astype(np.float64)
    assert facts.normalization.mean == pytest.approx(pixels.mean(), rel=1e-12)
    assert facts.normalization.deviation == pytest.approx(pixels.std(), rel=1e-12)


def test_how_images_were_prepared_is_kept(dataset, tmp_path):
    facts = dataset.facts.model_copy(update={"resampling": "box", "background": 7, "max_image_pixels": 100})
    shutil.copytree(dataset.path, tmp_path / "dataset", ignore=shutil.ignore_patterns("manifest.json"))
    examples = run(Dataset.seal(tmp_path / "dataset", facts), tmp_path / "examples")
    assert examples.facts.form == Form((28, 28), "box", "grayscale", 7, 100)


def test_two_runs_are_equal(dataset, tmp_path, synthetic_store, refs):
    assert run(dataset, tmp_path / "out", validation_examples=1_000).ref == refs["transform"]


@pytest.mark.parametrize("held_out", [6_000, 60_000])
def test_split_larger_than_the_data_is_refused(dataset, tmp_path, held_out):
    with pytest.raises(ValueError, match=f"below the 6000 training images .* received {held_out}"):
        run(dataset, tmp_path / "out", validation_examples=held_out)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_one_class_is_refused_with_evidence(tmp_path, split):
    labels = {name: np.full(40, 2) if name == split else np.arange(40) % 3 for name in ("train", "test")}
    dataset = make_dataset(tmp_path / "in", labels["train"], labels["test"])
    size = 30 if split == "train" else 40
    expected = f"at least 2 classes in the {split} split of .*; received {size} images that are all of the class 'c'"
    with pytest.raises(StepError, match=expected):
        run(dataset, tmp_path / "out", validation_examples=10)


def test_an_empty_test_split_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "in", np.arange(40) % 3, np.empty(0, np.int64))
    with pytest.raises(StepError, match="at least 2 classes in the test split of .*; received 0 images"):
        run(dataset, tmp_path / "out", validation_examples=10)


def test_a_class_that_is_only_in_the_validation_split_is_refused_or_split_by_strata(tmp_path):
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    dataset = make_dataset(tmp_path / "in", labels, np.arange(40) % 3)
    expected = r"1 that are only in the last 25 images of drawn:1.0.0: c\. Set transform.validation_split=stratified"
    with pytest.raises(StepError, match=expected):
        run(dataset, tmp_path / "out", validation_examples=25)
    examples = run(dataset, tmp_path / "strata", validation_examples=25, validation_split="stratified")
    images = dataset.split("train").images
    chosen = np.r_[
        38:50, 72:80, 96:101
    ]  # 12.376, 7.426 and 5.198 of 25: the largest remainder gets the one that is left
    np.testing.assert_array_equal(examples.split("validation").images, images[chosen])
    np.testing.assert_array_equal(examples.split("train").images, np.delete(images, chosen, axis=0))
    np.testing.assert_array_equal(examples.split("train").labels, np.delete(labels, chosen))


@pytest.mark.parametrize("count", [1, 7, 33, 100])
def test_strata_hold_out_the_stated_number_from_all_shards(tmp_path, monkeypatch, count):
    monkeypatch.setattr("ridgeline.artifacts.examples.BATCH_BYTES", 7 * 28 * 28)
    labels = np.random.default_rng(1).integers(0, 3, 101)
    dataset = make_dataset(tmp_path / "in", labels, np.arange(40) % 3)
    chosen = components.transform._held_out(labels, count, "stratified")
    assert chosen.sum() == count
    assert np.abs(np.bincount(labels[chosen], minlength=3) - np.bincount(labels) * count / 101).max() < 1
    images = dataset.split("train").images
    read = list(components.transform._read(dataset.split("train"), chosen))
    np.testing.assert_array_equal(np.concatenate([part for part, _ in read]), images[chosen])


@pytest.mark.parametrize("values", [{"validation_examples": 0}, {"validation_examples": 2.5}, {"normalization": "log"}])
def test_bad_parameters_are_refused(values):
    with pytest.raises(ValueError, match=r"Parameter transform\."):
        transform.parse(values)


@pytest.mark.real_data
def test_official_counts_and_digests(fashion_mnist):
    import hashlib

    store, refs = fashion_mnist
    examples = store.open(refs["transform"], Examples)
    assert examples.facts.num_examples == {"train": 55_000, "validation": 5_000, "test": 10_000}
    whole = hashlib.sha256()
    for name in ("train", "validation"):
        whole.update(examples.split(name).images.tobytes())
    assert whole.hexdigest() == "d6f7acb83157a75006f04dbae6822f88b1bb1651cef953707c39831d938776a3"
    assert np.bincount(examples.split("test").labels).tolist() == [1_000] * 10


def test_the_digests_of_a_dataset_are_those_of_the_images_and_labels_that_a_notebook_reads(dataset, notebook):
    import hashlib

    assert dataset.facts.splits.keys() == notebook.keys()
    for name, (images, labels) in notebook.items():
        split = dataset.facts.splits[name]
        assert split.num_examples == len(labels)
        assert split.images_sha256 == hashlib.sha256(images.tobytes()).hexdigest()
        assert split.labels_sha256 == hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    assert len({d for split in dataset.facts.splits.values() for d in (split.images_sha256, split.labels_sha256)}) == 4
