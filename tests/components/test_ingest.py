import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.ingest import ingest
from components.ingestion.tfds_catalog import IngestError
from ridgeline.artifacts.dataset import Dataset, served_name
from ridgeline.component import ParameterError, SourceError
from ridgeline.sources import read_sources

SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def run(output, **values):
    output.mkdir()
    params = ingest.parse(values)
    return ingest(params=params, output=output, sources=read_sources(ingest, params, None))


def test_a_dataset_may_have_a_name_of_its_own(tmp_path, monkeypatch):
    from components.datasets import synthetic_garments

    monkeypatch.setattr(synthetic_garments, "NUM_TRAIN", 30)
    monkeypatch.setattr(synthetic_garments, "NUM_TEST", 20)
    dataset = run(tmp_path / "out", dataset="synthetic_garments:1.0.0", name="clothes")
    assert dataset.facts.name == "clothes:synthetic_garments:1.0.0"
    assert served_name(dataset.facts.name) == "clothes"
    for name in ("", "Clothes", "a/b", "../a", "a:b"):
        with pytest.raises(ParameterError, match="ingest.name"):
            ingest.parse({"name": name})


def test_dataset_holds_the_arrays_alone(synthetic_store, refs):
    dataset = synthetic_store.open(refs["ingest"], Dataset)
    assert sorted(path.name for path in dataset.path.iterdir()) == ["manifest.json", "test", "train"]
    assert {name: split.num_examples for name, split in dataset.facts.splits.items()} == {"train": 6_000, "test": 1_000}
    assert dataset.facts.image_shape == (28, 28)
    assert dataset.split("train").images.shape == (6_000, 28, 28)
    assert dataset.facts.raw_files == {}
    assert dataset.files() == {}


@pytest.mark.fresh_process
def test_preparations_with_different_hash_seeds_are_equal(synthetic_store, refs, tmp_path):
    command = [sys.executable, "-m", "ridgeline.cli", "step", "ingest", "--dataset", "synthetic_garments:1.0.0"]
    subprocess.run(
        [*command, "--output", str(tmp_path / "again")],
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        check=True,
        cwd=tmp_path,
    )
    assert Dataset.load(tmp_path / "again").ref == refs["ingest"]


@pytest.mark.parametrize(
    "name",
    [
        "../fashion_mnist:3.0.1",
        "/etc/passwd:1.0.0",
        "a/../b:1.0.0",
        "mnist/../../x:1.0.0",
        "x:latest",
        "",
    ],
)
def test_names_out_of_the_folder_are_refused(name):
    with pytest.raises(ParameterError, match=r"ingest\.dataset: expected text to match pattern"):
        ingest.parse({"dataset": name})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnits:3.0.1", "Did you mean fashion_mnist"),
        ("zzzzzz:1.0.0", r"tfds catalog lists the names\. For images of your own, set ingest\.dataset=folder"),
        ("my_images", r"received 'my_images'\. The tfds catalog"),
        ("fashion_mnist:9.9.9", "received 'fashion_mnist:9.9.9'.*only: 3.0.1"),
        ("mnist_corrupted/nothing:1.0.0", "BuilderConfig nothing not found"),
        ("imdb_reviews/plain_text:1.0.0", r"an `image` and a class `label`; received .* \['label', 'text'\]"),
        ("tf_flowers:3.0.1", "images of one height and width; .* Set ingest.image_size"),
    ],
)
def test_datasets_that_do_not_fit_are_refused_before_any_download(no_network, tmp_path, name, message):
    with pytest.raises(IngestError, match=message):
        run(tmp_path / "out", dataset=name)


def test_missing_network_says_which_files_to_put_where(no_network, tmp_path):
    with pytest.raises(IngestError, match="RIDGELINE_MANUAL_DIR") as caught:
        run(tmp_path / "out")
    for name in SHA256:
        assert name in str(caught.value)


def test_no_temporary_folder_is_left(no_network, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with pytest.raises(IngestError):
        run(tmp_path / "out")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert tempfile.tempdir == str(tmp_path / "temporary")


def test_missing_manual_dir_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"received .*nowhere: No such file"):
        run(tmp_path / "out", manual_dir=tmp_path / "nowhere")


def test_file_with_a_wrong_checksum_is_refused(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    for name in SHA256:
        (folder / name).write_bytes(gzip.compress(b"not Fashion-MNIST"))
    with pytest.raises(IngestError, match="wrong checksum"):
        run(tmp_path / "out", manual_dir=folder)


@pytest.mark.real_data
def test_official_files_give_the_official_arrays(manual_dir, fashion_mnist):
    store, refs = fashion_mnist
    facts = store.open(refs["ingest"], Dataset).facts
    assert {name: entry.sha256 for name, entry in facts.raw_files.items()} == SHA256
    assert facts.splits["train"].num_examples == 60_000
    assert facts.splits["test"].num_examples == 10_000
    assert facts.splits["train"].images_sha256 == "d6f7acb83157a75006f04dbae6822f88b1bb1651cef953707c39831d938776a3"
    raw = gzip.decompress((manual_dir / "t10k-images-idx3-ubyte.gz").read_bytes())
    official = np.frombuffer(raw, np.uint8, offset=16).reshape(10_000, -1)
    from ridgeline.artifacts.examples import Examples

    images = store.open(refs["transform"], Examples).split("test").images.reshape(10_000, -1)
    assert sorted(map(bytes, official)) == sorted(map(bytes, images))  # tfds shuffles the images


@pytest.mark.real_data
def test_one_flipped_byte_of_an_official_file_is_refused(manual_dir, tmp_path):
    shutil.copytree(manual_dir, tmp_path / "manual", copy_function=shutil.copyfile)
    (tmp_path / "manual").chmod(0o755)
    path = tmp_path / "manual" / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert hashlib.sha256(content).hexdigest() != SHA256[path.name]
    with pytest.raises(IngestError, match=r"t10k-labels-idx1-ubyte\.gz has wrong checksum|wrong checksum"):
        run(tmp_path / "out", manual_dir=tmp_path / "manual")


def test_a_dataset_of_one_class_is_refused_before_its_images_are_prepared(tmp_path, monkeypatch):
    from components.datasets import synthetic_garments

    monkeypatch.setattr(synthetic_garments, "OUTLINES", {"Dress": synthetic_garments.OUTLINES["Dress"]})
    monkeypatch.setattr(synthetic_garments, "draw", None)
    with pytest.raises(IngestError, match="at least 2 classes; received synthetic_garments:1.0.0 with Dress"):
        run(tmp_path / "out", dataset="synthetic_garments:1.0.0")


def test_a_folder_under_the_name_of_a_manual_file_is_refused(tmp_path):
    (tmp_path / "manual" / "t10k-labels-idx1-ubyte.gz").mkdir(parents=True)
    with pytest.raises(IngestError, match=r"received folders named t10k-labels-idx1-ubyte\.gz"):
        run(tmp_path / "out", manual_dir=tmp_path / "manual")


def builder_of(name, image, examples):
    """Return a tfds builder; ``examples`` gives the images and labels of each split."""
    import tensorflow_datasets as tfds

    def info(self):
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=3)}
        return self.dataset_info_from_configs(description="test", features=tfds.features.FeaturesDict(features))

    def generators(self, dl_manager):
        return {split: enumerate({"image": i, "label": n} for i, n in rows) for split, rows in examples.items()}

    members = {
        "__module__": __name__,
        "pkg_dir_path": Path(__file__).parent,
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": generators,
    }
    return type(name, (tfds.core.GeneratorBasedBuilder,), members | {"_generate_examples": None})


def test_labels_that_are_no_class_are_refused_with_split_count_and_index(tmp_path):
    import tensorflow_datasets as tfds

    image = np.zeros((4, 4, 1), np.uint8)
    rows = {"train": [(image, n % 3) for n in range(30)], "test": [(image, n % 3 if n % 5 else -1) for n in range(20)]}
    builder_of("MinusOne", tfds.features.Image(shape=(4, 4, 1)), rows)
    with pytest.raises(IngestError, match=r"labels from 0 to 2 in the test split; received 4 others in 20 images, the"):
        run(tmp_path / "out", dataset="minus_one:1.0.0")


def test_what_tfds_shuffles_on_disk_gets_the_same_order(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle

    rows = {
        split: [(np.full((4, 4, 1), n, np.uint8), n % 3) for n in range(count)]
        for split, count in (("train", 200), ("test", 50))
    }
    builder_of("ManyImages", tfds.features.Image(shape=(4, 4, 1)), rows)
    limit = shuffle.MAX_MEM_BUFFER_SIZE
    first = run(tmp_path / "first", dataset="many_images")
    monkeypatch.setattr("components.ingestion.tfds_catalog.SHUFFLED_BYTES", 1_000)
    assert run(tmp_path / "second", dataset="many_images").digest == first.digest
    assert limit == shuffle.MAX_MEM_BUFFER_SIZE


def test_images_of_several_sizes_become_equal(tmp_path):
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (n % 5 + 2, 7, 3), np.uint8) for n in range(12)]
    rows = {"train": [(image, n % 3) for n, image in enumerate(images[:8])]}
    rows["test"] = [(image, n % 3) for n, image in enumerate(images[8:])]
    builder_of("SeveralSizes", tfds.features.Image(shape=(None, None, 3)), rows)
    with pytest.raises(IngestError, match="Set ingest.image_size"):
        run(tmp_path / "first", dataset="several_sizes")
    dataset = run(tmp_path / "out", dataset="several_sizes", image_size=4, color_mode="grayscale")
    assert dataset.facts.name == "several_sizes:1.0.0"  # the newest version
    assert dataset.split("train").images.shape == (8, 4, 4)
    assert sorted(dataset.split("test").labels) == [0, 0, 1, 2]


@pytest.mark.parametrize("files", [(), (0,), (3, 4), range(12)])
def test_arrays_and_files_of_a_dataset_are_read_alike(tmp_path, files):
    import tensorflow_datasets as tfds

    def encoded(image):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        return content.getvalue()

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (12, 5, 7, 3), np.uint8)
    given = [encoded(image) if number in files else image for number, image in enumerate(images)]
    rows = {"train": [(image, n % 3) for n, image in enumerate(given[:8])]}
    rows["test"] = [(image, n % 3) for n, image in enumerate(given[8:], 8)]
    name = f"Mixed{len(files)}{list(files)[:1]}".translate(str.maketrans("", "", "[]"))
    builder_of(name, tfds.features.Image(shape=(5, 7, 3)), rows)
    dataset = run(tmp_path / "out", dataset=tfds.core.naming.camelcase_to_snakecase(name))
    found = [image for split in ("train", "test") for image in dataset.split(split).images]
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in images)
    for split in ("train", "test"):
        part = dataset.split(split)
        numbers = [next(n for n, one in enumerate(images) if np.array_equal(one, image)) for image in part.images]
        assert [number % 3 for number in numbers] == part.labels.tolist()


def test_an_array_of_a_wrong_shape_is_refused_by_tfds(tmp_path):
    import tensorflow_datasets as tfds

    rows = {"train": [(np.zeros((4, 5, 1), np.uint8), 0)], "test": [(np.zeros((4, 4, 1), np.uint8), 1)]}
    builder_of("WrongShape", tfds.features.Image(shape=(4, 4, 1)), rows)
    with pytest.raises(Exception, match=r"Shapes \(4, 5, 1\) and \(4, 4, 1\) are incompatible"):
        run(tmp_path / "out", dataset="wrong_shape:1.0.0")


@pytest.mark.parametrize(("value", "size"), [(32, (32, 32)), ("32", (32, 32)), ("3, 4", (3, 4)), ([3, 4], (3, 4))])
def test_image_size_is_height_and_width_or_one_number(value, size):
    assert ingest.parse({"image_size": value}).model_dump()["image_size"] == size


@pytest.mark.parametrize("value", [0, -1, [0, 5], 100_000, "a", [1, 2, 3], 3.5, True])
def test_other_image_sizes_are_refused(value):
    with pytest.raises(ParameterError, match=r"ingest\.image_size"):
        ingest.parse({"image_size": value})
