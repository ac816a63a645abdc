import numpy as np
import pytest

from components.statistics import perceptual_hashes, statistics
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, write_split


def make(folder, splits, max_shard_bytes=10**9):
    """Return examples of arrays by split: images and labels."""
    shape = splits["train"][0].shape[1:]
    for name, (images, labels) in splits.items():
        write_split(folder / name, [(images, labels)], len(labels), shape, max_shard_bytes)
    return Examples.seal(
        folder,
        ExamplesFacts(
            dataset="noise:1.0.0",
            image_shape=shape,
            class_names=("a", "b", "c"),
            num_examples={name: len(labels) for name, (_, labels) in splits.items()},
            normalization=Normalization(kind="unit", mean=0.0, deviation=255.0),
            synthetic=True,
        ),
    )


def noise(shape=(12, 10), sizes=(60, 20, 30)):
    rng = np.random.default_rng(1)
    names = ("train", "validation", "test")
    return {
        name: (rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 3, n))
        for name, n in zip(names, sizes, strict=True)
    }


def run(folder, examples, **values):
    folder.mkdir(parents=True)
    return statistics(examples=examples, params=statistics.parse(values), output=folder)


@pytest.mark.parametrize("shape", [(12, 10), (9, 8, 3), (9, 8, 1)])
def test_the_arrays_are_those_of_numpy(tmp_path, shape):
    splits = noise(shape)
    found = run(tmp_path / "out", make(tmp_path / "in", splits))
    for name, (images, labels) in splits.items():
        flat = images.reshape(len(images), -1)
        channels = images.reshape(-1, shape[2] if len(shape) == 3 else 1)
        expected = [np.bincount(channel, minlength=256) for channel in channels.T]
        np.testing.assert_array_equal(found.array("pixels", name), expected)
        means = np.floor(flat.mean(1)).astype(int)
        np.testing.assert_array_equal(found.array("brightness", name), np.bincount(means, minlength=256))
        deviations = np.floor(flat.std(1)).astype(int)
        np.testing.assert_array_equal(found.array("contrast", name), np.bincount(deviations, minlength=128))
        np.testing.assert_allclose(found.array("mean", name), images.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.array("deviation", name), images.std(0), rtol=1e-6)
        assert found.facts.splits[name].class_counts == tuple(np.bincount(labels, minlength=3).tolist())


def test_batches_and_shards_do_not_change_the_bytes(tmp_path, monkeypatch):
    splits = noise()
    whole = run(tmp_path / "a", make(tmp_path / "in", splits))
    monkeypatch.setattr("ridgeline.artifacts.examples.BATCH_BYTES", 700)
    sharded = make(tmp_path / "sharded", splits, max_shard_bytes=1500)
    other = run(tmp_path / "b", sharded)
    assert other.facts.model_copy(update={"examples_digest": ""}) == whole.facts.model_copy(
        update={"examples_digest": ""}
    )
    assert other.manifest.files == whole.manifest.files


def test_repeated_images_are_found_within_and_across_splits_and_labels(tmp_path):
    splits = noise()
    (train, labels), (held_out, held_out_labels), (test, test_labels) = splits.values()
    labels[:4], test_labels[5] = [0, 0, 1, 2], 1
    held_out_labels[3], test_labels[6] = labels[10], held_out_labels[7]
    train[1], train[2] = train[0], train[0]  # the third with another label
    held_out[3], test[5], test[6] = train[10], train[2], held_out[7]
    facts = run(tmp_path / "out", make(tmp_path / "in", splits)).facts
    assert {name: split.num_repeated for name, split in facts.splits.items()} == {
        "train": 2,
        "validation": 0,
        "test": 0,
    }
    assert (facts.leaked["test"].count, facts.leaked["validation"].count) == (2, 1)
    assert [(p.split, p.row) for p in facts.leaked["test"].groups[0]] == [("train", 0), ("test", 5)]
    assert facts.conflicting.count == 1
    assert [(p.split, p.row, p.label) for p in facts.conflicting.groups[0]] == [("train", 0, 0), ("train", 2, 1)]


def test_nearly_equal_and_nearly_constant_images_are_found(tmp_path):
    splits = noise()
    train, labels = splits["train"]
    train[7] = np.clip(train[4].astype(int) + 1, 0, 255)
    labels[[4, 7]] = [0, 2]
    train[9] = 80
    facts = run(tmp_path / "out", make(tmp_path / "in", splits)).facts
    assert facts.near_duplicates.count == facts.near_conflicting.count == 1
    assert [place.row for place in facts.near_conflicting.groups[0]] == [4, 7]
    assert (facts.constant.count, facts.constant.groups[0][0].row) == (1, 9)
    strict = run(tmp_path / "strict", make(tmp_path / "again", splits), near_difference=0.5, constant_deviation=0)
    assert (strict.facts.near_duplicates.count, strict.facts.constant.count) == (0, 0)


def test_hashes_differ_for_different_images():
    images = noise()["train"][0]
    assert len(np.unique(perceptual_hashes(images))) == len(images)


@pytest.mark.real_data
def test_the_official_images_have_no_equal_ones(fashion_mnist):
    store, refs = fashion_mnist
    facts = store.open(refs["statistics"], statistics.output).facts
    assert not any(split.num_repeated for split in facts.splits.values())
    assert facts.leaked["test"].count == facts.conflicting.count == facts.constant.count == 0
