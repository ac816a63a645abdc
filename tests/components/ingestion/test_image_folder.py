from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.ingest import find_sources, ingest
from components.ingestion.image_folder import FolderError
from components.transform import transform
from ridgeline.artifacts.dataset import Dataset
from ridgeline.component import ParameterError
from ridgeline.executor import execute
from ridgeline.image_form import Form
from ridgeline.sources import read_sources
from ridgeline.store import Store

CLASSES = ("Bag", "Ankle boot", "Übergröße [XL]")


def pixels(number: int, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)


def write(file: Path, number: int, size: tuple[int, int] = (6, 5)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number, size)).save(file, "PNG")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Twelve training and three test images of three classes; lossless, whatever their names end with."""
    folder = tmp_path / "shop"
    for number in range(12):
        write(folder / "train" / CLASSES[number % 3] / f"é {number}.JPG", number)
    for number in range(12, 15):
        write(folder / "test" / CLASSES[number % 3] / f"{number}.png", number)
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three hundred images in one folder of three classes."""
    for number in range(300):
        write(tmp_path / "classes" / CLASSES[number % 3] / f"{number}.png", number, (2, 2))
    return tmp_path / "classes"


def run(folder: Path, output: Path, **values: Any) -> Dataset:
    output.mkdir()
    params = ingest.parse({"dataset": "folder", "name": "shop", "image_dir": str(folder), **values})
    return ingest(params=params, output=output, sources=read_sources(ingest, params, None))  # type: ignore[return-value]


def rows(dataset: Dataset) -> dict[str, tuple[str, str, bytes]]:
    """Return the split, the class and the pixels of each file."""
    found = {}
    for split, listed in dataset.files().items():
        images, labels = dataset.split(split).images, dataset.split(split).labels
        for row, (file, _, _) in enumerate(listed):
            found[file] = (split, dataset.facts.class_names[labels[row]], images[row].tobytes())
    return found


def splits(found: Mapping[str, tuple[str, str, bytes]]) -> dict[str, str]:
    return {Path(file).name: split for file, (split, _, _) in found.items()}


def test_folders_of_splits_and_classes_become_arrays(shop: Path, tmp_path: Path) -> None:
    dataset = run(shop, tmp_path / "out", name="shop")
    assert dataset.facts.name == "shop:folder"
    assert dataset.facts.image_shape == (6, 5, 3)
    assert dataset.facts.class_names == ("Ankle boot", "Bag", "Übergröße [XL]")
    assert dataset.facts.formats == {"PNG RGB 5×6": 15}
    assert sorted(path.name for path in dataset.path.iterdir()) == ["files.json", "manifest.json", "test", "train"]
    expected = {
        f"{split}/{CLASSES[n % 3]}/{name}": (split, CLASSES[n % 3], pixels(n).tobytes())
        for n in range(15)
        for split, name in [("train", f"é {n}.JPG") if n < 12 else ("test", f"{n}.png")]
    }
    assert rows(dataset) == expected
    labels = dataset.split("train").labels
    assert sorted(labels.tolist()) != labels.tolist()  # shuffled by content: any part of it is a random sample


def test_where_the_folder_is_and_the_files_times_change_nothing(shop: Path, tmp_path: Path) -> None:
    first = run(shop, tmp_path / "first")
    shutil.copytree(shop, tmp_path / "copy")
    assert run(tmp_path / "copy", tmp_path / "second").digest == first.digest


def test_one_folder_of_classes_is_split_by_content(classes: Path, tmp_path: Path) -> None:
    first = rows(run(classes, tmp_path / "first", test_share=0.3))
    share = {name: np.mean([s == "test" for s, c, _ in first.values() if c == name]) for name in CLASSES}
    assert all(0.15 < value < 0.45 for value in share.values())

    for number in range(300, 400):
        write(classes / CLASSES[number % 3] / f"{number}.png", number, (2, 2))
    (classes / CLASSES[0] / "0.png").rename(classes / CLASSES[0] / "renamed.png")
    second = splits(rows(run(classes, tmp_path / "second", test_share=0.3)))
    before = splits(first)
    assert {name: second[name] for name in before if name != "0.png"} == {
        n: s for n, s in before.items() if n != "0.png"
    }
    assert second["renamed.png"] == before["0.png"]
    other = splits(rows(run(classes, tmp_path / "other", test_share=0.3, split_seed=1)))
    assert other != second


def write_labels(folder: Path, lines: list[list[str]], columns: tuple[str, ...] = ("path", "label", "split")) -> None:
    with (folder / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([columns, *lines])


def test_labels_csv_names_classes_and_splits(shop: Path, tmp_path: Path) -> None:
    files = sorted(str(file.relative_to(shop)) for file in shop.rglob("*.*"))
    lines = [[file, "odd, a" if i % 2 else "even", "test" if i > 11 else "train"] for i, file in enumerate(files)]
    write_labels(shop, lines)
    dataset = run(shop, tmp_path / "out")
    assert dataset.facts.class_names == ("even", "odd, a")
    assert {file: (split, label) for file, (split, label, _) in rows(dataset).items()} == {
        file: (split, label) for file, label, split in lines
    }
    write_labels(shop, [line[:2] for line in lines], ("path", "label"))
    assert rows(run(shop, tmp_path / "again", test_share=0.5)).keys() == {*files}


@pytest.mark.parametrize(
    ("columns", "lines", "message"),
    [
        (("file", "label"), [["a", "b"]], "Expected the columns path, label .*; received file, label"),
        (("path", "label", "spilt"), [["a", "b", "c"]], "received path, label, spilt"),
        (
            ("path", "label", "split"),
            [["test/Bag/12.png", "a", "validation"]],
            r"line 2: test/Bag/12\.png,a,validation",
        ),
        (("path", "label"), [["test/Bag/12.png", "a"], ["test/Bag/12.png", "b"]], "line 3"),
        (("path", "label"), [["test/Bag/12.png", ""]], "line 2"),
        (("path", "label"), [["./test/Bag/12.png", "a"]], r"1 other lines of 1.*\n  \./test/Bag/12\.png: named in"),
        (("path", "label"), [["test/Bag/12.png", "x" * 200_000]], "field larger than field limit"),
        (("path", "label"), [["test/Bag/12.png", "a", "more"]], "line 2"),
        (
            ("path", "label"),
            [["../secret.png", "a"], ["test/Bag/12.png", "a"]],
            r"\.\./secret\.png: named in labels\.csv, but",
        ),
        (
            ("path", "label"),
            [["/etc/passwd", "a"], ["test/Bag/12.png", "a"]],
            r"/etc/passwd: named in labels\.csv, but",
        ),
    ],
)
def test_bad_labels_are_refused_by_line(
    shop: Path, tmp_path: Path, columns: tuple[str, ...], lines: list[list[str]], message: str
) -> None:
    write_labels(shop, lines, columns)
    with pytest.raises(FolderError, match=message):
        run(shop, tmp_path / "out")


def test_all_unreadable_files_are_named_with_the_reason(shop: Path, tmp_path: Path) -> None:
    (shop / "train" / "Bag" / "empty.jpg").touch()
    (shop / "train" / "Bag" / "notes.txt").write_text("no image")
    whole = (shop / "train" / "Bag" / "é 0.JPG").read_bytes()
    (shop / "train" / "Bag" / "cut.png").write_bytes(whole[:-40])
    write(shop / "train" / "Bag" / "huge.png", 1, (40, 40))
    write(shop / "stray.png", 2)
    (shop / "README.md").write_text("About the shop.")
    for name in (".DS_Store", "Thumbs.db", "._é 0.JPG"):
        (shop / "train" / "Bag" / name).write_text("x")
    with pytest.raises(FolderError) as caught:
        run(shop, tmp_path / "out", max_image_pixels=1_000)
    lines = str(caught.value).splitlines()
    assert "received 5 unreadable ones" in lines[0]
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "stray.png", "train/Bag/cut.png", "train/Bag/empty.jpg", "train/Bag/huge.png", "train/Bag/notes.txt"
    ]  # fmt: skip
    reasons = ["in no folder of a class", "damaged", "empty file", "too large: 40×40", "no image"]
    assert all(reason in line for reason, line in zip(reasons, lines[1:], strict=True))

    dataset = run(shop, tmp_path / "without", max_image_pixels=1_000, max_unreadable_share=0.4)
    assert len(rows(dataset)) == 15
    assert dataset.facts.max_image_pixels == 1_000
    assert [entry.file for entry in dataset.facts.unreadable][:2] == ["stray.png", "train/Bag/cut.png"]


def test_images_of_several_sizes_need_a_size(shop: Path, tmp_path: Path) -> None:
    write(shop / "train" / "Bag" / "tall.png", 50, (9, 5))
    with pytest.raises(FolderError, match=r"received 2 sizes: 6×5 \(15\), 9×5 \(1\)\. Set ingest.image_size"):
        run(shop, tmp_path / "out")
    dataset = run(shop, tmp_path / "resized", image_size=4, color_mode="grayscale")
    assert dataset.facts.image_shape == (4, 4)
    assert dataset.split("train").images.shape == (13, 4, 4)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("rename test", "Expected the folders train and test .*; received train, validation"),
        ("only one class", "at least 2 classes, .*; received 1 classes"),
        ("class without test", "Bag: 0 in test"),
        ("few", r"(?s)2 or more images.*Ankle boot: 1 in test.*Bag: 1 in test"),
        ("flat", "received 15 files, none in a folder of a class"),
    ],
)
def test_a_layout_or_class_that_can_not_be_used_is_named(shop: Path, tmp_path: Path, action: str, message: str) -> None:
    values: dict[str, Any] = {}
    if action == "rename test":
        (shop / "test").rename(shop / "validation")
    elif action == "only one class":
        for name in CLASSES[1:]:
            shutil.rmtree(shop / "train" / name)
            shutil.rmtree(shop / "test" / name)
    elif action == "class without test":
        shutil.rmtree(shop / "test" / "Bag")
    elif action == "few":
        values["min_class_images"] = 2
    else:
        for number, file in enumerate(sorted(shop.rglob("*.*"))):
            file.rename(shop / f"{number}.gz")
        shutil.rmtree(shop / "train")
        shutil.rmtree(shop / "test")
    with pytest.raises(FolderError, match=message):
        run(shop, tmp_path / "out", **values)


def test_only_new_and_changed_files_are_decoded_again(
    shop: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.ingestion import decoding_worker

    decoded: list[bytes] = []
    real = decoding_worker.decode

    def decode(content: bytes, form: Form) -> tuple[Image.Image, str]:
        decoded.append(content)
        return real(content, form)

    monkeypatch.setattr(decoding_worker, "decode", decode)
    params = ingest.parse({"dataset": "folder", "name": "shop", "image_dir": str(shop)})
    execute(store, ingest, {}, params, "a")
    assert len(decoded) == 15
    write(shop / "train" / "Bag" / "new.png", 100)
    write(shop / "test" / "Bag" / "12.png", 101)
    (shop / "train" / "Bag" / "é 3.JPG").unlink()
    (shop / "train" / "Bag" / "é 0.JPG").rename(shop / "test" / "Bag" / "moved.png")
    second = execute(store, ingest, {}, params, "b")
    assert second.reason == "source shop changed: 1 file added, 1 modified, 1 removed, 1 renamed"
    assert len(decoded) == 17
    whole = run(shop, tmp_path / "whole")
    assert second.output == whole.ref  # the same bytes as without an earlier dataset

    execute(
        store,
        ingest,
        {},
        ingest.parse({"dataset": "folder", "name": "shop", "image_dir": str(shop), "color_mode": "grayscale"}),
        "c",
    )
    assert len(decoded) == 17 + 15 + 15


def test_the_folder_must_be_named() -> None:
    with pytest.raises(ParameterError, match=r"ingest\.image_dir: expected the folder of the images"):
        find_sources(ingest.parse({"dataset": "folder", "name": "shop"}))  # type: ignore[arg-type]


def test_a_folder_in_s3_is_read_again_if_an_object_changes(
    shop: Path, bucket: str, tmp_path: Path, store: Store
) -> None:
    from upath import UPath

    root = UPath(bucket) / "shop"
    for file in shop.rglob("*.*"):
        (root / file.relative_to(shop).as_posix()).write_bytes(file.read_bytes())
    (root / "train" / ".DS_Store").write_bytes(b"")
    params = ingest.parse({"dataset": "folder", "name": "shop", "image_dir": f"{bucket}/shop"})
    first = execute(store, ingest, {}, params, "a")
    local = run(shop, tmp_path / "local")
    assert first.output
    assert {found[1:] for found in rows(store.open(first.output, Dataset)).values()} == {
        found[1:] for found in rows(local).values()
    }
    name = "train/Bag/é 0.JPG"
    (root / name).write_bytes((shop / name).read_bytes())  # a new time, the same content
    assert execute(store, ingest, {}, params, "b").state == "cached"
    write(shop / name, 100)
    (root / name).write_bytes((shop / name).read_bytes())
    second = execute(store, ingest, {}, params, "c")
    assert second.reason == "source shop changed: 1 file modified"
    (root / name).unlink()
    third = execute(store, ingest, {}, params, "d")
    assert third.reason == "source shop changed: 1 file removed"
    assert len({first.output, second.output, third.output}) == 3


def test_a_folder_needs_a_name_by_which_its_model_is_served():
    with pytest.raises(ParameterError, match=r"ingest\.name: expected the name by which the model is served"):
        ingest.parse({"dataset": "folder", "image_dir": "/shop"})


@pytest.mark.parametrize("kind", ["last", "stratified"])
def test_each_image_of_the_examples_is_found_in_its_file(shop: Path, tmp_path: Path, kind: str) -> None:
    dataset = run(shop, tmp_path / "dataset")
    (tmp_path / "examples").mkdir()
    values = {"validation_examples": 4, "validation_split": kind}
    examples: Any = transform(dataset=dataset, params=transform.parse(values), output=tmp_path / "examples")
    found = dataset.file_names(examples)
    assert [len(found[split]) for split in ("train", "validation", "test")] == [8, 4, 3]
    for split, files in found.items():
        for file, image, label in zip(files, examples.split(split).images, examples.split(split).labels, strict=True):
            assert np.array_equal(np.asarray(Image.open(shop / file)), image)
            assert file.split("/")[1] == dataset.facts.class_names[label]
    (shop / "train" / CLASSES[0] / "one more.png").write_bytes((shop / found["test"][0]).read_bytes())
    with pytest.raises(ValueError, match="Expected the dataset that the examples .* were made from; received"):
        run(shop, tmp_path / "later").file_names(examples)
