"""`ExampleAnomalies`: what is wrong with the examples, found before they are trained on."""

from __future__ import annotations

from typing import Literal

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.artifacts.example_statistics import Place


class Evidence(Place):
    """An image that shows a finding.

    Attributes:
        file: Its file in a folder of images; empty for a dataset of tfds.
    """

    file: str = ""


class Finding(Facts):
    """Something that a check found.

    Attributes:
        check: Name of the check.
        severity: ``error`` stops the run, ``warning`` should be looked at, ``info`` is for the record.
        message: What was found, with its number.
        value: The number that decided.
        threshold: What the number was compared with.
        advice: What to do.
        evidence: Groups of images that show it.
    """

    check: str
    severity: Literal["error", "warning", "info"]
    message: str
    value: float
    threshold: float
    advice: str
    evidence: tuple[tuple[Evidence, ...], ...] = ()


class ExampleAnomaliesFacts(Facts):
    """The outcome of all checks.

    Attributes:
        dataset: tfds name and version.
        examples_digest: Digest of the examples.
        schema_digest: Digest of the schema that these were checked against; None before there were schemas.
        champion: Digest of the statistics that these were compared with; None if there were none.
        findings: Errors first.
        num_errors: Number of errors.
        num_warnings: Number of warnings.
        advice: How to train although there are errors.
        accepted: A person's reason for training although there are errors; None if there is none, or no error.
        synthetic: Whether the project drew the images itself.
    """

    dataset: str
    examples_digest: str
    schema_digest: str | None = None
    champion: str | None
    findings: tuple[Finding, ...]
    num_errors: int
    num_warnings: int
    accepted: str | None
    advice: str = ""
    synthetic: bool


class ExampleAnomalies(Artifact[ExampleAnomaliesFacts]):
    """The findings of the checks.

    On disk::

        report.html    self-contained report; opens without a network
    """

    facts_type = ExampleAnomaliesFacts
    report_name = "report.html"

    @property
    def problem(self) -> str | None:
        """The errors, unless a person accepted them."""
        if not self.facts.num_errors or self.facts.accepted:
            return None
        errors = [f"- {f.message}.{_first_files(f)} {f.advice}" for f in self.facts.findings if f.severity == "error"]
        return "\n".join(
            [
                f"Expected examples of {self.facts.dataset} without errors; the checks found {len(errors)}. "
                f"{self.facts.advice}",
                *errors,
            ]
        )


def _first_files(finding: Finding) -> str:
    files = [evidence.file for group in finding.evidence[:1] for evidence in group if evidence.file]
    return f" For example: {', '.join(files)}." if files else ""
