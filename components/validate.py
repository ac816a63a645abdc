"""The step `validate`: checks the examples against the schema and the champion's before they are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from components.reports.anomalies import render
from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.example_anomalies import Evidence, ExampleAnomalies, ExampleAnomaliesFacts, Finding
from ridgeline.artifacts.example_statistics import ExampleStatistics, ExampleStatisticsFacts, Place
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.schema import Schema, SchemaFacts
from ridgeline.component import FOR_ONE_RUN, Champion, StepError, component
from ridgeline.component import Params as BaseParams
from ridgeline.significance import class_shift, ks_test

Severity = Literal["error", "warning", "info"]

SIGNIFICANCE = 0.001  # of every test; the effect size decides whether a significant difference matters
WARNING_PART = 0.5  # of a limit at which a warning starts
SEVERITIES = ("error", "warning", "info")
NAMED = 5  # classes in a message


class Params(BaseParams):
    """The limits of `validate`."""

    min_class_examples: int = Field(
        20,
        ge=0,
        title="Minimum images of every class",
        description="A class with fewer images in the training split is a warning. A class without any image in the "
        "training or test split is always an error, in the validation split a warning.",
    )
    max_test_leak: float = Field(
        0.001,
        ge=0,
        le=1,
        title="Maximum share of test images in training",
        description="Share of test images that equal a training or validation image, 0 to 1. More is an error, any is "
        "a warning. Official Fashion-MNIST and CIFAR-10 have none.",
    )
    max_conflicting: int = Field(
        0,
        ge=0,
        title="Maximum images with several labels",
        description="Number of images that occur with more than one label. More is an error, any is a warning. "
        "Official Fashion-MNIST and CIFAR-10 have none.",
    )
    max_constant_share: float = Field(
        0.01,
        ge=0,
        le=1,
        title="Maximum share of nearly constant images",
        description="Share of a split's images whose pixels hardly differ, 0 to 1. More is an error, any is a warning.",
    )
    max_class_shift: float = Field(
        0.1,
        ge=0,
        le=1,
        title="Maximum change of the class balance",
        description="Total variation distance between the class shares now and in the champion's training data, 0 to "
        "1. A significant change above this is an error, above half of it a warning.",
    )
    min_class_ratio: float = Field(
        0.6,
        ge=0,
        le=1,
        title="Minimum part of a class that is left",
        description="Share of a class in the training split, divided by its share in the champion's training data, 0 "
        "to 1. Significantly less is an error: 0.6 finds a class that was halved.",
    )
    max_distribution_shift: float = Field(
        0.15,
        ge=0,
        le=1,
        title="Maximum change of brightness, contrast or pixels",
        description="Kolmogorov-Smirnov distance D between two distributions, 0 to 1: training split against the "
        "champion's, test split against training split. A significant D above this is an error, above half of it a "
        "warning.",
    )
    min_mean_image_correlation: float = Field(
        0.5,
        ge=-1,
        le=1,
        title="Minimum correlation of the mean images",
        description="Pearson correlation of the mean images of the training split and the champion's, and of the test "
        "and the training split, −1 to 1. Below this is an error: inverted, rotated or shifted images.",
    )
    accept_anomalies: str | None = Field(
        None,
        max_length=500,
        title="Train although a check fails",
        description="Reason for training on examples in which the checks found errors. It is recorded. Empty: errors "
        "stop the run.",
        json_schema_extra=FOR_ONE_RUN,
    )


@component(output=ExampleAnomalies)
def validate(
    dataset: Dataset,
    examples: Examples,
    statistics: ExampleStatistics,
    schema: Schema,
    params: Params,
    output: Path,
    champion: Champion[ExampleStatistics] | None = None,
) -> ExampleAnomaliesFacts:
    """Check the examples by themselves, against the schema, and against those of the champion.

    Args:
        dataset: What the examples were made from: names the files of a folder of images.
        examples: The examples, for the images that the report shows.
        statistics: Their statistics.
        schema: What they must look like.
        params: The limits.
        output: An empty directory; receives ``report.html``.
        champion: Statistics of the examples that the champion was trained on; None if there are none.

    Returns:
        The findings, errors first.

    Raises:
        StepError: If the statistics are of other examples.
    """
    if statistics.facts.examples_digest != examples.digest:
        raise StepError(
            f"Expected statistics of the examples {examples.digest}; received those of "
            f"{statistics.facts.examples_digest}. Run statistics on these examples."
        )
    earlier = champion.artifact if champion else None
    found = [
        *_against_schema(statistics, schema.facts),
        *_classes(statistics.facts, params),
        *_copies(statistics.facts, params, dataset.file_names(examples)),
        *_test(statistics, params),
    ]
    if earlier:
        found += _changes(statistics, earlier, params)
    elif champion:
        found.append(
            Finding(
                check="champion",
                severity="warning",
                message=f"The statistics of the champion's examples can't be read ({champion.problem})",
                value=0,
                threshold=0,
                advice="The examples were checked by themselves only. Compare the report with an earlier one.",
            )
        )
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    errors = sum(finding.severity == "error" for finding in found)
    facts = ExampleAnomaliesFacts(
        dataset=examples.facts.dataset,
        examples_digest=examples.digest,
        schema_digest=schema.digest,
        champion=champion.digest if champion else None,
        findings=tuple(found),
        num_errors=errors,
        num_warnings=sum(finding.severity == "warning" for finding in found),
        advice="To train anyway, give a reason in validate.accept_anomalies.",
        accepted=((params.accept_anomalies or "").strip() or None) if errors else None,
        synthetic=examples.facts.synthetic,
    )
    (output / "report.html").write_text(render(facts, dataset, examples, statistics, schema, earlier), encoding="utf-8")
    return facts


def _graded(value: float, limit: float) -> Severity | None:
    """Return the severity of a number that should be small; None if it is."""
    return "error" if value > limit else "warning" if value > WARNING_PART * limit else None


def _count(names: list[str]) -> str:
    return "1 class is" if len(names) == 1 else f"{len(names)} classes are"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _against_schema(statistics: ExampleStatistics, schema: SchemaFacts) -> Iterator[Finding]:
    facts = statistics.facts
    advice = "If this is intended, edit the schema, or set schema.infer=true once."
    if facts.image_shape != schema.image_shape:
        yield _differing_shape("image shape", facts, f"the schema states {schema.image_shape}", advice)
    missing = [name for name in schema.class_names if name not in facts.class_names]
    added = [name for name in facts.class_names if name not in schema.class_names]
    yield from _differing_classes("missing", missing, "new", added, "the schema", advice)
    shared = [name for name in schema.class_names if name in facts.class_names]
    if shared != [name for name in facts.class_names if name in schema.class_names]:
        yield Finding(
            check="order of the classes",
            severity="error",
            message=f"The classes have another order than in the schema: {_listed(list(facts.class_names))}",
            value=0,
            threshold=0,
            advice=f"Whoever reads class_id from the served model would get other classes. {advice}",
        )
    counts = dict(zip(facts.class_names, facts.splits["train"].class_counts, strict=True))
    # A class without images is another finding.
    few = {name: fewest for name, fewest in schema.min_class_examples.items() if 0 < counts.get(name, 0) < fewest}
    if few:
        listed = _listed([f"{name} {counts[name]:,} (at least {fewest:,})" for name, fewest in few.items()])
        worst = min(few, key=lambda name: counts[name] / few[name])
        yield Finding(
            check="class below its minimum",
            severity="error",
            message=f"Fewer training images than the schema requires: {listed}",
            value=counts[worst],
            threshold=few[worst],
            advice=f"Look for images that are missing. {advice}",
        )
    for kind, allowed in (("brightness", schema.brightness), ("contrast", schema.contrast)):
        for split in ("train", "test"):
            value = statistics.mean(kind, split)
            if facts.splits[split].num_examples and not allowed.min <= value <= allowed.max:
                yield Finding(
                    check=f"{kind} outside the schema",
                    severity="error",
                    message=f"The mean {kind} of the {split} split is {value:.1f}; the schema allows {allowed.min:g} "
                    f"to {allowed.max:g}",
                    value=value,
                    threshold=allowed.min if value < allowed.min else allowed.max,
                    advice=f"Compare how the images were prepared. {advice}",
                )


def _differing_shape(check: str, facts: ExampleStatisticsFacts, expected: str, advice: str) -> Finding:
    return Finding(
        check=check,
        severity="error",
        message=f"The images have the shape {facts.image_shape}; {expected}",
        value=0,
        threshold=0,
        advice=f"Whoever sends images to the served model would have to change, too. {advice}",
    )


def _differing_classes(
    gone: str, missing: list[str], come: str, added: list[str], other: str, advice: str
) -> Iterator[Finding]:
    """Report classes that `other` has alone, an error, and those that it has not, a warning."""
    pairs: tuple[tuple[str, Severity, list[str]], ...] = ((gone, "error", missing), (come, "warning", added))
    for what, severity, names in pairs:
        if names:
            yield Finding(
                check=f"{what} classes",
                severity=severity,
                message=f"{_count(names)} {what}, compared with {other}: {_listed(names)}",
                value=len(names),
                threshold=0,
                advice=advice,
            )


def _classes(facts: ExampleStatisticsFacts, params: Params) -> Iterator[Finding]:
    for split, found in facts.splits.items():
        missing = [label for label, count in enumerate(found.class_counts) if not count]
        if missing:
            yield Finding(
                check="missing class",
                severity="warning" if split == "validation" else "error",
                message=f"The {split} split has no image of {len(missing)} of {len(facts.class_names)} classes: "
                f"{_listed([facts.class_names[label] for label in missing])}",
                value=len(missing),
                threshold=0,
                advice="Add images of these classes, or remove the classes from the dataset.",
            )
    counts = facts.splits["train"].class_counts
    few = [label for label, count in enumerate(counts) if 0 < count < params.min_class_examples]
    if few:
        fewest = min(counts[label] for label in few)
        yield Finding(
            check="small class",
            severity="warning",
            message=f"{len(few)} classes have fewer than {params.min_class_examples} training images: "
            f"{_listed([facts.class_names[label] for label in few])}; the smallest has {fewest}",
            value=fewest,
            threshold=params.min_class_examples,
            advice="Add images, or lower min_class_examples.",
        )


def _copies(facts: ExampleStatisticsFacts, params: Params, files: dict[str, list[str]]) -> Iterator[Finding]:
    def shown(groups: Iterable[tuple[Place, ...]]) -> tuple[tuple[Evidence, ...], ...]:
        """Return images with their files."""
        return tuple(tuple(_with_file(place, files) for place in group) for group in groups)

    for split, copies in facts.leaked.items():
        total = max(1, facts.splits[split].num_examples)
        if copies.count:
            leaks = split == "test" and copies.count / total > params.max_test_leak
            where = "training or validation" if split == "test" else "training"
            yield Finding(
                check=f"{split} images in training",
                severity="error" if leaks else "warning",
                message=f"{copies.count:,} of {total:,} {split} images ({copies.count / total:.2%}) are also {where} "
                "images",
                value=copies.count / total,
                threshold=params.max_test_leak if split == "test" else 0,
                advice=f"Remove them from one of the splits: accuracy on {split} images is overstated.",
                evidence=shown(copies.groups),
            )
    if count := facts.conflicting.count:
        yield Finding(
            check="image with several labels",
            severity="error" if count > params.max_conflicting else "warning",
            message=f"{count:,} {'images occur' if count > 1 else 'image occurs'} with more than one label",
            value=count,
            threshold=params.max_conflicting,
            advice="Keep the right label of each.",
            evidence=shown(facts.conflicting.groups),
        )
    if count := facts.near_conflicting.count:
        yield Finding(
            check="similar images with different labels",
            severity="warning",
            message=f"{count:,} {'images nearly equal' if count > 1 else 'image nearly equals'} one with another label",
            value=count,
            threshold=0,
            advice="Look at the labels.",
            evidence=shown(facts.near_conflicting.groups),
        )
    if count := sum(split.num_repeated for split in facts.splits.values()):
        yield Finding(
            check="repeated images",
            severity="info",
            message=f"{count:,} {'images equal' if count > 1 else 'image equals'} an earlier one of the same split",
            value=count,
            threshold=0,
            advice="Remove them if they were not repeated on purpose.",
        )
    if count := facts.near_duplicates.count:
        yield Finding(
            check="near duplicates",
            severity="info",
            message=f"{count:,} {'images nearly equal' if count > 1 else 'image nearly equals'} another one",
            value=count,
            threshold=0,
            advice="Look at them if they are in different splits.",
            evidence=shown(facts.near_duplicates.groups),
        )
    constant = {name: split.num_constant / max(1, split.num_examples) for name, split in facts.splits.items()}
    if facts.constant.count:
        worst = max(constant, key=lambda name: constant[name])
        yield Finding(
            check="nearly constant images",
            severity="error" if constant[worst] > params.max_constant_share else "warning",
            message=f"{facts.constant.count:,} images are nearly constant; {constant[worst]:.2%} of the {worst} split",
            value=constant[worst],
            threshold=params.max_constant_share,
            advice="Remove them: they show nothing.",
            evidence=shown(facts.constant.groups),
        )


def _with_file(place: Place, files: dict[str, list[str]]) -> Evidence:
    named = files[place.split]
    return Evidence(**place.model_dump(), file=named[place.row] if named else "")


def _test(statistics: ExampleStatistics, params: Params) -> Iterator[Finding]:
    advice = "Prepare the images of both splits in the same way."
    yield from _distributions(statistics, "test", statistics, "train", "the training split", advice, params)
    splits, names = statistics.facts.splits, statistics.facts.class_names
    train, test = (dict(zip(names, splits[name].class_counts, strict=True)) for name in ("train", "test"))
    for name, ratio in _shrunk(train, test, params):
        yield Finding(
            check="class is rarer in training",
            severity="warning",
            message=f"The class {name} has {train[name]:,} training images and {test[name]:,} test images. Its share "
            f"in the training split is {ratio:.2f} of that in the test split",
            value=ratio,
            threshold=params.min_class_ratio,
            advice="Look for training images that are missing.",
        )


def _distributions(
    now: ExampleStatistics,
    split: str,
    then: ExampleStatistics,
    other: str,
    label: str,
    advice: str,
    params: Params,
) -> Iterator[Finding]:
    """Compare brightness, contrast, pixels by channel and the mean image of two splits."""
    counts = [now.facts.splits[split].num_examples, then.facts.splits[other].num_examples]
    found, earlier = now.distributions(split), then.distributions(other)
    for name in (name for name in found if name in earlier):
        a, b = found[name], earlier[name]
        shift = ks_test(a, b, counts[0], counts[1])
        severity = _graded(shift.effect, params.max_distribution_shift)
        if severity and shift.p_value < SIGNIFICANCE:
            values = np.arange(len(a))
            means = (float(x @ values / x.sum()) + 0.5 for x in (a, b))
            yield Finding(
                check=f"{name} of the {split} split",
                severity=severity,
                message=f"The distribution of {name} in the {split} split differs from that of {label}: D = "
                f"{shift.effect:.3f}, mean {next(means):.1f} against {next(means):.1f}",
                value=shift.effect,
                threshold=params.max_distribution_shift,
                advice=advice,
            )
    if now.facts.image_shape == then.facts.image_shape and all(counts):
        images = [now.array("mean", split).ravel(), then.array("mean", other).ravel()]
        deviations = [now.array("deviation", split).ravel(), then.array("deviation", other).ravel()]
        # Of the mean images, only what is not chance can be compared.
        noise = [float(np.mean(d**2)) / n for d, n in zip(deviations, counts, strict=True)]
        if all(float(np.var(image)) > 25 * n for image, n in zip(images, noise, strict=True)):
            correlation = float(np.corrcoef(images[0], images[1])[0, 1])
            if correlation < params.min_mean_image_correlation:
                turned = ", as if the images were inverted" if correlation < -0.5 else ""
                yield Finding(
                    check=f"mean image of the {split} split",
                    severity="error",
                    message=f"The mean image of the {split} split does not resemble that of {label}: correlation "
                    f"{correlation:.2f}{turned}",
                    value=correlation,
                    threshold=params.min_mean_image_correlation,
                    advice=advice,
                )


def _changes(now: ExampleStatistics, then: ExampleStatistics, params: Params) -> Iterator[Finding]:
    """Compare with the statistics of the examples that the champion was trained on."""
    advice = "Compare how the images were prepared. If the change is intended, give a reason in accept_anomalies."
    if now.facts.image_shape != then.facts.image_shape:
        expected = f"those of the champion had {then.facts.image_shape}"
        yield _differing_shape("image shape of the champion", now.facts, expected, advice)
    names, before = now.facts.class_names, then.facts.class_names
    vanished = [name for name in before if name not in names]
    added = [name for name in names if name not in before]
    yield from _differing_classes("vanished", vanished, "added", added, "the champion", advice)
    counts = dict(zip(names, now.facts.splits["train"].class_counts, strict=True))
    old = dict(zip(before, then.facts.splits["train"].class_counts, strict=True))
    shared = [name for name in names if name in old]
    yield from _class_balance(shared, counts, old, advice, params)
    for split in ("train", "test"):
        label = f"the champion's {'training' if split == 'train' else split} split"
        yield from _distributions(now, split, then, split, label, advice, params)


def _class_balance(
    names: list[str], counts: dict[str, int], old: dict[str, int], advice: str, params: Params
) -> Iterator[Finding]:
    a, b = (np.array([source[name] for name in names], np.int64) for source in (counts, old))
    shift = class_shift(a, b)
    severity = _graded(shift.effect, params.max_class_shift)
    if severity and shift.p_value < SIGNIFICANCE:
        yield Finding(
            check="class balance",
            severity=severity,
            message=f"The class balance of the training split differs from the champion's: total variation distance "
            f"{shift.effect:.3f}",
            value=shift.effect,
            threshold=params.max_class_shift,
            advice=advice,
        )
    for name, ratio in _shrunk({name: counts[name] for name in names}, {name: old[name] for name in names}, params):
        yield Finding(
            check="class has shrunk",
            severity="error",
            message=f"The class {name} has {counts[name]:,} training images; for the champion it had {old[name]:,}. "
            f"Its share is {ratio:.2f} of that before",
            value=ratio,
            threshold=params.min_class_ratio,
            advice=advice,
        )


def _shrunk(now: dict[str, int], then: dict[str, int], params: Params) -> Iterator[tuple[str, float]]:
    """Yield the classes whose share is significantly smaller, and the ratio of the shares.

    A class without images is left out: that is a finding of its own.
    """
    total, before = sum(now.values()), sum(then.values())
    for name, count in now.items():
        if count and then[name]:
            ratio = (count / total) / (then[name] / before)
            pair = np.array([count, total - count]), np.array([then[name], before - then[name]])
            if ratio < params.min_class_ratio and class_shift(*pair).p_value < SIGNIFICANCE:
                yield name, ratio
