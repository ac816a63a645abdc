import json
from typing import Any

import numpy as np
import pytest
from upath import UPath

from components.schema import schema
from components.statistics import statistics
from ridgeline.artifacts.schema import SCHEMA, Schema
from ridgeline.component import Champion, ParameterError, SourceError, StepError
from ridgeline.sources import read_sources

from .conftest import make_bars


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Statistics of 600 training images of three classes."""
    folder = tmp_path_factory.mktemp("described")
    examples = make_bars(folder / "examples", {"train": 600, "validation": 30, "test": 30})
    (folder / "statistics").mkdir()
    return statistics(examples=examples, params=statistics.parse({}), output=folder / "statistics")


def run(folder, described, champion=None, **values):
    folder.mkdir()
    params = schema.parse(values)
    other: dict[str, Any] = {"champion": champion} if champion else {}
    return schema(
        statistics=described, params=params, output=folder, sources=read_sources(schema, params, None), **other
    )


def test_a_first_schema_is_inferred_with_some_room(tmp_path, described):
    facts = run(tmp_path / "out", described).facts
    counts = described.facts.splits["train"].class_counts
    assert facts.class_names == ("top", "middle", "bottom")
    assert facts.image_shape == (6, 5)
    assert facts.min_class_examples == {
        name: int(0.6 * count) for name, count in zip(facts.class_names, counts, strict=True)
    }
    brightness = described.array("brightness", "train") @ (np.arange(256) + 0.5) / 600
    assert [facts.brightness.min, facts.brightness.max] == pytest.approx([brightness * 0.8, brightness * 1.2], abs=0.06)


def test_the_room_of_dark_images_is_not_too_small(tmp_path, described, monkeypatch):
    monkeypatch.setattr(type(described), "mean", lambda *_: 3.0)
    facts = run(tmp_path / "out", described).facts
    assert [facts.brightness.min, facts.brightness.max] == [0.0, 8.0]


def test_the_schema_of_the_champion_is_kept_byte_by_byte_unless_another_is_asked_for(tmp_path, described):
    first = run(tmp_path / "first", described)
    edited = json.loads((first.path / SCHEMA).read_text(encoding="utf-8"))
    edited["min_class_examples"] = {"top": 7}
    (tmp_path / "mine.json").write_text(json.dumps(edited), encoding="utf-8")
    mine = run(tmp_path / "mine", described, file=str(tmp_path / "mine.json"))
    assert mine.facts.min_class_examples == {"top": 7}
    for number, made in enumerate((first, mine)):
        read = Schema.load(made.path)
        assert run(tmp_path / f"kept {number}", described, Champion(made.digest, read)).digest == made.digest
    assert schema.uses_champion(schema.parse({}))
    assert not schema.uses_champion(schema.parse({"infer": True}))
    assert not schema.uses_champion(schema.parse({"file": "mine.json"}))


def test_a_champions_schema_that_cannot_be_read_is_not_replaced_silently(tmp_path, described):
    with pytest.raises(StepError, match=r"Cannot read the schema .*Set schema.file to a copy of it, or schema.infer"):
        run(tmp_path / "out", described, Champion("5" * 64, None))


def test_a_file_and_a_new_inference_exclude_each_other():
    with pytest.raises(ParameterError, match="expected infer=true or a file; received both"):
        schema.parse({"file": "mine.json", "infer": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["top"]}, "class_names: Tuple should have at least 2 items"),
        ({"class_names": ["top", "top"], "min_class_examples": {}}, "expected each class once; received"),
        ({"min_class_examples": {"tpo": 3}}, r"expected classes of class_names; received \['tpo'\]"),
        ({"brightness": {"min": 90, "max": 30}}, "brightness: .*received min 90.0 and max 30.0"),
        ({"brightness": {"min": 90, "max": 300}}, "brightness.max: Input should be less than or equal to 255"),
        ({"brigthness": 1}, "brigthness: Extra inputs are not permitted"),
        (None, "mine.json: Invalid JSON"),
    ],
)
def test_a_file_that_is_no_schema_is_refused_with_all_that_is_wrong(tmp_path, described, change, message):
    content = json.loads((run(tmp_path / "first", described).path / SCHEMA).read_text(encoding="utf-8"))
    text = "{" if change is None else json.dumps(content | change)
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(StepError, match=f"(?s)Expected a schema, .*mine.json; received 1 problems.*{message}"):
        run(tmp_path / "out", described, file=str(tmp_path / "mine.json"))


def test_a_file_in_an_object_store_and_a_hidden_one_are_read(tmp_path, described):
    content = (run(tmp_path / "first", described).path / SCHEMA).read_bytes()
    for location in ("memory://schemas/.shop.json", "memory://schemas/shop.json", str(tmp_path / ".shop.json")):
        UPath(location).parent.mkdir(parents=True, exist_ok=True)
        UPath(location).write_bytes(content)
        made = run(tmp_path / str(abs(hash(location))), described, file=location)
        assert (made.path / SCHEMA).read_bytes() == content
    with pytest.raises(SourceError, match="Expected a file; received the folder"):
        run(tmp_path / "folder", described, file="memory://schemas/")
    with pytest.raises(SourceError, match="Expected the file schemas; received memory"):
        run(tmp_path / "prefix", described, file="memory://schemas")


@pytest.mark.parametrize("name", ["none.json", "folder"])
def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path, described, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match=f"Expected a file that can be read; received .*{name}"):
        run(tmp_path / "out", described, file=str(tmp_path / name))
