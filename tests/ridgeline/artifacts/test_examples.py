import numpy as np
import pytest

from ridgeline.artifacts.examples import ImageRows, Split, write_split


def batches(images, labels, size):
    for start in range(0, len(labels), size):
        yield images[start : start + size], labels[start : start + size]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(10**6, 1), (100, None)])
def test_split_reads_back_as_written(tmp_path, shape, max_shard_bytes, shards):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (23, *shape), dtype=np.uint8), rng.integers(0, 10, 23)
    write_split(tmp_path / "train", batches(images, labels, 7), 23, shape, max_shard_bytes)
    split = Split(tmp_path / "train")
    assert len(split) == 23
    assert len(split.shards) == (shards or -(-23 // (100 // int(np.prod(shape)))))
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int64


def test_one_shard_is_a_memory_map(tmp_path):
    write_split(tmp_path / "train", [(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2))], 2, (4, 4))
    images = Split(tmp_path / "train").images
    assert isinstance(images, np.memmap)
    assert images.shape == (2, 4, 4)
    assert not images.flags.writeable


@pytest.mark.parametrize("max_shard_bytes", [10**6, 100])
def test_rows_and_batches_are_read_across_shards_without_a_map(tmp_path, monkeypatch, max_shard_bytes):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (23, 4, 3), dtype=np.uint8), rng.integers(0, 10, 23)
    write_split(tmp_path / "train", batches(images, labels, 7), 23, (4, 3), max_shard_bytes)
    split = Split(tmp_path / "train")
    for start, stop in [(0, 23), (5, 9), (7, 8), (15, 30), (23, 25), (3, 3)]:
        found = split.rows(start, stop)
        np.testing.assert_array_equal(found[0], images[start:stop])
        np.testing.assert_array_equal(found[1], labels[start:stop])
        assert type(found[0]) is np.ndarray
    monkeypatch.setattr("ridgeline.artifacts.examples.BATCH_BYTES", 5 * 12)
    parts = list(split.batches())
    assert [len(part) for part, _ in parts] == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), images)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), labels)


def test_a_file_that_is_too_short_is_noticed(tmp_path):
    (tmp_path / "pixels").write_bytes(bytes(20))
    rows = ImageRows([(tmp_path / "pixels", 8, 2)], (2, 4))
    assert rows.read(0, 1).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="Expected 2 images in .*pixels; received fewer"):
        rows.read(1, 2)


def test_too_few_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected 3 examples for train; received fewer"):
        write_split(tmp_path / "train", [(np.zeros((2, 4, 4), np.uint8), np.zeros(2))], 3, (4, 4))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
def test_files_are_those_of_numpy_byte_for_byte(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    fortran: np.ndarray = np.asfortranarray(images[2:])
    pieces: list[tuple[np.ndarray, np.ndarray]] = [(images[:2], np.zeros(2)), (fortran.astype(np.int64), np.zeros(3))]
    write_split(tmp_path / "train", pieces, 5, shape)
    mapped = np.lib.format.open_memmap(tmp_path / "mapped.npy", mode="w+", dtype=np.uint8, shape=images.shape)
    mapped[:] = images
    mapped.flush()
    assert (tmp_path / "train" / "images-00000-of-00001.npy").read_bytes() == (tmp_path / "mapped.npy").read_bytes()
