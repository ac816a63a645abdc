import importlib
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.ingest import ingest
from components.schema import schema
from components.statistics import statistics
from components.transform import transform
from components.validate import validate
from ridgeline.artifacts.dataset import Dataset, DatasetFacts
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, write_split
from ridgeline.component import Champion, StepError
from ridgeline.keys import key_parts
from ridgeline.sources import read_sources

CLASSES = ("cap", "shoe", "belt", "sock")
PATTERNS = np.random.default_rng(5).integers(20, 200, (4, 8, 8))


def arrays(color=False):
    """Return 1,600 training, 200 validation and 400 test images: a pattern for each class, with noise and lighting."""
    rng = np.random.default_rng(3)
    splits = {}
    for name, size in (("train", 1600), ("validation", 200), ("test", 400)):
        labels = np.arange(size) % 4
        light = rng.normal(1, 0.15, (size, 1, 1))
        images = PATTERNS[labels] * light + rng.normal(0, 10, (size, 8, 8))
        images = np.stack([images, images * 0.8, images * 0.6], -1) if color else images
        splits[name] = (np.clip(images, 0, 255).astype(np.uint8), labels)
    return splits


def make(folder, splits, names=CLASSES):
    shape = splits["train"][0].shape[1:]
    for name, (images, labels) in splits.items():
        write_split(folder / name, [(images, labels)], len(labels), shape)
    return Examples.seal(
        folder,
        ExamplesFacts(
            dataset="wardrobe:1.0.0",
            image_shape=shape,
            class_names=names,
            num_examples={name: len(labels) for name, (_, labels) in splits.items()},
            normalization=Normalization(kind="unit", mean=0.0, deviation=255.0),
            synthetic=False,
        ),
    )


def describe(folder, splits, names=CLASSES):
    """Return examples and their statistics."""
    examples = make(folder / "examples", splits, names)
    (folder / "statistics").mkdir()
    return examples, statistics(examples=examples, params=statistics.parse({}), output=folder / "statistics")


def expect(folder, found):
    """Return the schema that is inferred from statistics."""
    folder.mkdir(parents=True)
    return schema(statistics=found, params=schema.parse({}), output=folder)


def check(folder, described, champion=None, **values):
    """Return the anomalies of examples; the schema is the champion's, or inferred."""
    examples, found = described
    folder.mkdir(parents=True)
    (folder / "dataset").mkdir()
    facts = {name: getattr(examples.facts, name) for name in ("image_shape", "class_names", "synthetic")}
    dataset = Dataset.seal(folder / "dataset", DatasetFacts(name="wardrobe:1.0.0", splits={}, raw_files={}, **facts))
    other: dict[str, Any] = {"champion": Champion(champion.digest, champion)} if champion else {}
    expected = expect(folder / "schema", champion or found)
    (folder / "out").mkdir()
    params = validate.parse(values)
    given = {"dataset": dataset, "examples": examples, "statistics": found, "schema": expected}
    return validate(**given, params=params, output=folder / "out", **other)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return describe(tmp_path_factory.mktemp("clean"), arrays())


def errors(anomalies):
    return {finding.check for finding in anomalies.facts.findings if finding.severity == "error"}


def test_clean_examples_pass_alone_and_against_themselves(tmp_path, clean):
    for name, champion in (("alone", None), ("champion", clean[1])):
        found = check(tmp_path / name, clean, champion)
        assert (found.facts.findings, found.problem) == ((), None)
        assert "None found." in found.report.read_text(encoding="utf-8")


def leak(splits):
    splits["train"][0][:40] = splits["test"][0][:40]
    splits["train"][1][:40] = splits["test"][1][:40]


def drop_class(splits):
    for name, (images, labels) in splits.items():
        splits[name] = (images[labels != 2], labels[labels != 2])


def halve_class(splits):
    images, labels = splits["train"]
    keep = np.ones(len(labels), bool)
    keep[np.flatnonzero(labels == 2)[::2]] = False
    splits["train"] = (images[keep], labels[keep])


def invert(splits):
    for images, _ in splits.values():
        images[:] = 255 - images


def darken(splits):
    for images, _ in splits.values():
        images[:] = images * 0.6


def invert_test(splits):
    splits["test"][0][:] = 255 - splits["test"][0]


def crop(splits):
    for name, (images, labels) in splits.items():
        splits[name] = (images[:, 1:, 1:], labels)


def relabel_one(splits):
    splits["train"][0][1] = splits["train"][0][0]  # their labels are 0 and 1


def blank(splits):
    splits["train"][0][:40] = 0
    splits["train"][1][:40] = 0


@pytest.mark.parametrize(
    ("fault", "reason", "alone"),
    [
        (leak, "test images in training", True),
        (drop_class, "missing class", True),
        (halve_class, "class has shrunk", False),
        (halve_class, "class below its minimum", False),
        (invert, "mean image of the train split", False),
        (invert, "brightness outside the schema", False),
        (darken, "brightness of the train split", False),
        (darken, "brightness outside the schema", False),
        (invert_test, "mean image of the test split", True),
        (crop, "image shape", False),
        (crop, "image shape of the champion", False),
        (relabel_one, "image with several labels", True),
        (blank, "nearly constant images", True),
    ],
)
def test_a_planted_fault_is_an_error_with_its_reason(tmp_path, fault, reason, alone):
    color = fault in (invert, darken)
    before = describe(tmp_path / "before", arrays(color))
    splits = arrays(color)
    fault(splits)
    now = describe(tmp_path / "now", splits)
    found = check(tmp_path / "out", now, before[1])
    assert reason in errors(found)
    assert f"the checks found {found.facts.num_errors}. " in found.problem
    by_itself = check(tmp_path / "alone", now)
    assert (reason in errors(by_itself)) == alone
    if reason in ("test images in training", "image with several labels"):
        (finding,) = (finding for finding in found.facts.findings if finding.check == reason)
        assert len(finding.evidence[0]) == 2
        assert "train 0" in found.report.read_text(encoding="utf-8")


def test_a_class_that_is_rarer_in_training_is_a_warning_without_a_champion(tmp_path):
    splits = arrays()
    halve_class(splits)
    found = check(tmp_path / "out", describe(tmp_path / "now", splits))
    assert [(f.check, f.severity) for f in found.facts.findings] == [("class is rarer in training", "warning")]
    assert found.problem is None


def test_classes_that_vanished_or_are_new_are_named(tmp_path, clean):
    now = describe(tmp_path / "now", arrays(), ("cap", "shoe", "belt", "<b>scarf</b>"))
    found = check(tmp_path / "out", now, clean[1])
    messages = [finding.message for finding in found.facts.findings]
    assert "1 class is missing, compared with the schema: sock" in messages
    assert "1 class is new, compared with the schema: <b>scarf</b>" in messages
    assert "1 class is vanished, compared with the champion: sock" in messages
    assert "1 class is added, compared with the champion: <b>scarf</b>" in messages
    assert "<b>scarf" not in found.report.read_text(encoding="utf-8")


def test_another_order_of_the_classes_is_an_error(tmp_path, clean):
    names = ("shoe", "cap", "belt", "sock")
    swap = np.array([1, 0, 2, 3])
    now = describe(
        tmp_path / "now", {name: (images, swap[labels]) for name, (images, labels) in arrays().items()}, names
    )
    assert errors(check(tmp_path / "out", now, clean[1])) == {"order of the classes"}


def test_a_reason_accepts_errors_and_is_recorded(tmp_path, clean):
    splits = arrays()
    relabel_one(splits)
    now = describe(tmp_path / "now", splits)
    found = check(tmp_path / "out", now, accept_anomalies=" known, see <ticket> ")
    assert (found.facts.num_errors, found.facts.accepted, found.problem) == (1, "known, see <ticket>", None)
    assert "Accepted: known, see &lt;ticket&gt;" in found.report.read_text(encoding="utf-8")
    assert check(tmp_path / "blank", now, accept_anomalies=" ").problem
    assert check(tmp_path / "unneeded", clean, accept_anomalies="a reason").facts.accepted is None


def test_a_limit_decides(tmp_path):
    splits = arrays()
    relabel_one(splits)
    found = check(tmp_path / "out", describe(tmp_path / "now", splits), max_conflicting=1)
    assert found.problem is None
    assert "warning" in {finding.severity for finding in found.facts.findings}


def test_unreadable_statistics_of_the_champion_are_a_warning(tmp_path, clean):
    for name in ("dataset", "out"):
        (tmp_path / name).mkdir()
    facts = {name: getattr(clean[0].facts, name) for name in ("image_shape", "class_names", "synthetic")}
    found = validate(
        dataset=Dataset.seal(tmp_path / "dataset", DatasetFacts(name="w:1.0.0", splits={}, raw_files={}, **facts)),
        examples=clean[0],
        statistics=clean[1],
        schema=expect(tmp_path / "schema", clean[1]),
        params=validate.parse({}),
        output=tmp_path / "out",
        champion=Champion("5" * 64, None),
    )
    (finding,) = found.facts.findings
    assert (finding.severity, finding.check) == ("warning", "champion")


def test_statistics_of_other_examples_are_refused(tmp_path, clean):
    other = describe(tmp_path / "other", arrays(color=True))
    with pytest.raises(StepError, match="Expected statistics of the examples"):
        check(tmp_path / "out", (clean[0], other[1]))


def test_equal_input_gives_equal_bytes(tmp_path, clean):
    assert check(tmp_path / "a", clean).digest == check(tmp_path / "b", clean).digest


def test_nothing_of_a_check_is_in_the_key_of_a_training(clean):
    for name in ("train", "sweep"):
        step = importlib.import_module(f"components.{name}").__dict__[name]
        parts = key_parts(step, {"examples": clean[0]}, step.parse({}))
        assert step.after == (validate.output,)
        assert parts.inputs.keys() == {"examples"}
        assert not {"components/validate.py", "components/statistics.py", "components/reports/anomalies.py"} & set(
            parts.code
        )


def test_findings_name_the_files_of_a_folder_and_the_report_shows_what_was_left_out(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name in ("cap", "shoe"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    shutil.copy(tmp_path / "images/test/cap/3.png", tmp_path / "images/train/cap/<i>copy.png")
    (tmp_path / "images/train/shoe/broken.png").write_bytes(b"no image")
    made: dict[str, Any] = {}
    given: dict[str, dict[str, Any]] = {
        "ingest": {
            "dataset": "folder",
            "name": "shop",
            "image_dir": str(tmp_path / "images"),
            "max_unreadable_share": 0.1,
        },
        "transform": {"validation_examples": 10},
    }
    for step, inputs in (
        (ingest, []),
        (transform, ["dataset"]),
        (statistics, ["examples"]),
        (schema, ["statistics"]),
        (validate, ["dataset", "examples", "statistics", "schema"]),
    ):
        params = step.parse(given.get(step.name, {}))
        (tmp_path / step.name).mkdir()
        output = step(
            params=params,
            output=tmp_path / step.name,
            sources=read_sources(step, params, None),
            **{name: made[name] for name in inputs},
        )
        made[{"ingest": "dataset", "transform": "examples"}.get(step.name, step.name)] = output
    text = made["validate"].report.read_text(encoding="utf-8")
    assert "For example: train/cap/<i>copy.png, test/cap/3.png." in made["validate"].problem
    assert "train/cap/&lt;i&gt;copy.png" in text
    assert "<code>train/shoe/broken.png</code>: no image in a known format" in text
    assert "PNG RGB 6×6" in text
