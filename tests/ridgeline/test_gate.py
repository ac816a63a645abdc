"""The gate and the registry together, in one sequence of runs on the synthetic images."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import components.export
from ridgeline import pipeline
from ridgeline.artifacts.model_evaluation import ModelEvaluation, ModelEvaluationFacts
from ridgeline.artifacts.pushed_model import ModelSize
from ridgeline.decisions import Decisions
from ridgeline.history import Serving
from ridgeline.pipeline import StepResult
from ridgeline.registry import Registry
from ridgeline.run_summary import summary
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

NAME = "synthetic_garments"
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
STEPS = pipeline.plan("export")
OTHER = {"train.penalty.l2": 0.001}
WORSE = {"train.penalty.l2": 1.0, "evaluate.min_accuracy": 0, "evaluate.min_class_recall": 0}
FORCED = {**WORSE, "evaluate.force_blessing": "a demo"}


@dataclass(frozen=True)
class Run:
    """The outcome of a run."""

    results: list[StepResult]
    explained: list[str]
    facts: ModelEvaluationFacts
    lines: str

    @property
    def states(self) -> list[str]:
        return [result.execution.state for result in self.results]

    @property
    def served(self) -> tuple[bool, int] | None:
        pushed = self.results[-1].pushed
        return (pushed.new, pushed.version) if pushed else None


class RunSequence:
    """Runs in a copy of the synthetic store, which holds the first run."""

    def __init__(self, store: Store, folder: Path) -> None:
        shutil.copytree(store.local, folder / "store")
        self.settings = Settings(store=str(folder / "store"), manual_dir=None)
        self.store: Store = self.settings.open_store()
        self.registry: Registry = self.settings.open_registry()
        self.number = 0
        self.runs: dict[str, Run] = {}

    def run(self, values: Mapping[str, object]) -> Run:
        self.number += 1
        params = pipeline.parse_params(STEPS, {**SYNTHETIC, **values}, self.settings)
        explained = [reason.split(":")[0] for _, reason in pipeline.explain(self.settings, STEPS, params)]
        results = list(pipeline.run(self.settings, STEPS, params, f"run {self.number}", by="ann"))
        records = {result.execution.component: result.execution for result in results}
        facts = self.store.open(records["evaluate"].output or "", ModelEvaluation).facts
        return Run(results, explained, facts, "\n".join(summary(self.settings, records)))


@pytest.fixture(scope="module")
def sequence(synthetic_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunSequence]:
    """The sequence, in which neither the export nor the check of a served version starts a process: others test that.

    As with a fresh process, a model's export has the same bytes each time.
    """
    saved = tmp_path_factory.mktemp("saved")

    @functools.cache
    def sizes(model: Path, compact: bool) -> dict[str, ModelSize]:
        return components.export.save(model, saved / model.name, compact)

    def save(model: Path, folder: Path, compact: bool) -> dict[str, ModelSize]:
        made = sizes(model, compact)
        shutil.copytree(saved / model.name, folder)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ridgeline.registry.check", lambda *_: None)
        patch.setattr("components.export.save_in_a_fresh_process", save)
        yield RunSequence(synthetic_store, tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def first_export_again(sequence: RunSequence, synthetic: tuple[Settings, list[Execution]]) -> StepResult:
    """The first run's export, repeated after the second run pushed."""
    sequence.runs["unchanged"] = sequence.run({})
    sequence.runs["other"] = sequence.run(OTHER)
    inputs = synthetic[1][-1].inputs
    return pipeline.run_step(sequence.settings, STEPS[-1], inputs, STEPS[-1].parse({}), "synthetic", by="ann")


@pytest.fixture(scope="module")
def runs(sequence: RunSequence, first_export_again: StepResult) -> dict[str, Run]:
    """The runs of the sequence, in their order."""
    runs = sequence.runs
    runs["other again"] = sequence.run(OTHER)
    again: dict[str, Mapping[str, object]] = {"worse": WORSE, "forced": FORCED}
    for name, values in again.items():
        runs[name] = sequence.run(values)
        runs[f"{name} again"] = sequence.run(values)
    sequence.registry.rollback(sequence.store, NAME, None, reason="demo over", by="bob", run_id="rollback 1")
    runs["after rollback"] = sequence.run(FORCED)
    (sequence.store.path(f"Model/{runs['other'].facts.model_digest}") / "model.weights.h5").write_bytes(b"damaged")
    runs["without champion"] = sequence.run({**WORSE, "evaluate.num_mistakes": 1})
    runs["without champion again"] = sequence.run({**WORSE, "evaluate.num_mistakes": 1})
    runs["without champion, forced"] = sequence.run({**WORSE, "evaluate.force_blessing": "the files are lost"})
    runs["too large"] = sequence.run({**OTHER, "train.seed": 7, "export.max_size_mib": 0.3})
    runs["without what it replaced"] = sequence.run({**WORSE, "evaluate.num_mistakes": 2})
    runs["canary"] = sequence.run({**OTHER, "train.seed": 7, "export.canary_share": 0.1})
    runs["canary again"] = sequence.run({**OTHER, "train.seed": 7, "export.canary_share": 0.1})
    return runs


def test_the_first_model_is_judged_by_the_thresholds(refs, synthetic_store):
    facts = synthetic_store.open(refs["evaluate"], ModelEvaluation).facts
    assert facts.verdict.blessed
    assert facts.comparison is None
    assert facts.verdict.reasons[-1] == "no other model to compare with: the thresholds decide"


def test_each_decision_of_the_sequence_is_recorded_once(runs, sequence):
    decisions = Decisions(sequence.store).all()[::-1]
    assert [(decision.kind, decision.causes) for decision in decisions] == [
        ("pushed", ()),
        ("pushed", ()),
        ("not_pushed", ()),
        ("refused", ("worse than the champion",)),
        ("pushed", ()),
        ("not_pushed", ()),
        ("refused", ("the champion can't be read",)),
        ("pushed", ()),
        ("refused", ("too large",)),
        ("canary", ()),
    ]
    assert decisions[1].title == f"{NAME}: version 2 was pushed"
    assert decisions[1].figures == {
        "accuracy": runs["other"].facts.accuracy,
        "accuracy of the champion": runs["unchanged"].facts.accuracy,
    }
    assert decisions[5].reasons[0].startswith("version 3 served this model and was rolled back from on ")


def test_an_unchanged_run_reuses_everything_and_pushes_nothing(runs):
    for name, version in (("unchanged", 1), ("other again", 2), ("forced again", 3)):
        assert runs[name].explained == ["reused"] * len(STEPS)
        assert runs[name].states == ["cached"] * len(STEPS)
        assert runs[name].served == (False, version)


def test_a_model_that_is_not_worse_is_pushed(runs, sequence):
    assert runs["other"].states == [*["cached"] * 5, *["complete"] * 4]
    assert runs["other"].facts.comparison.model_digest == runs["unchanged"].facts.model_digest
    assert runs["other"].facts.comparison.accuracy == runs["unchanged"].facts.accuracy
    assert runs["other"].served == (True, 2)
    assert f"champion     {runs['unchanged'].facts.accuracy:.4f}, model " in runs["other"].lines
    assert sequence.registry.history(NAME)[1].by == "ann"


def test_a_significantly_worse_model_is_not_exported(runs):
    verdict = runs["worse"].facts.verdict
    assert not verdict.blessed
    assert runs["worse"].facts.comparison.model_digest == runs["other"].facts.model_digest
    assert "< 0.05 (worse_significance)" in verdict.reasons[2]
    assert runs["worse"].states[6:] == ["complete", "complete", "skipped"]
    assert runs["worse again"].states[6:] == ["cached", "cached", "skipped"]
    assert "verdict      not blessed: " in runs["worse"].lines


def test_a_forced_blessing_serves_it_and_is_recorded(runs, sequence):
    assert runs["forced"].states == [*["cached"] * 6, "complete", "cached", "complete"]
    assert runs["forced"].served == (True, 3)
    assert runs["forced"].facts.verdict.forced == "a demo"
    assert "verdict      blessed by force: " in runs["forced"].lines
    assert sequence.registry.history(NAME)[2].reason == "a demo"


def test_a_run_after_a_rollback_does_not_undo_it(runs, sequence):
    run = runs["after rollback"]
    assert run.states == ["cached"] * len(STEPS)
    assert run.served == (False, 2)
    assert "version 3 served this model and was rolled back from" in run.results[-1].pushed.reason
    assert "demo over" in run.lines
    assert [entry.run_id for entry in sequence.registry.history(NAME)[3:4]] == ["rollback 1"]
    assert f"served       {NAME} version 2 in " in run.lines


def test_nothing_is_blessed_if_the_champion_cannot_be_read(runs):
    digest = runs["other"].facts.model_digest
    for name, state in (("without champion", "complete"), ("without champion again", "cached")):
        run = runs[name]
        assert run.states[6:] == [state, "cached", "skipped"]
        assert run.facts.comparison is None
        assert not run.facts.verdict.blessed
        assert run.facts.verdict.reasons[2:] == (
            f"the champion, model {digest[:12]}, can't be read (missing, changed or extra: model.weights.h5): "
            "restore it, roll back, or give a reason in force_blessing",
        )
    assert runs["without champion again"].explained[6] == "reused"


def test_a_forced_blessing_passes_without_a_readable_champion(runs, sequence):
    run = runs["without champion, forced"]
    assert run.served == (True, 4)
    assert run.facts.verdict.forced == "the files are lost"
    assert sequence.registry.history(NAME)[4].reason == "the files are lost"


def test_the_champion_itself_stays_blessed_without_the_model_that_it_replaced(runs):
    run = runs["without what it replaced"]
    assert run.facts.verdict.reasons[-1] == "no other model to compare with: the thresholds decide"
    assert run.states[6:] == ["complete", "cached", "complete"]
    assert run.served == (False, 4)
    assert "version 4 serves this model already" in run.results[-1].pushed.reason


def test_a_blessed_model_that_is_too_large_is_not_pushed(runs):
    run = runs["too large"]
    assert run.facts.verdict.blessed
    assert run.states[-1] == "skipped"
    assert run.served is None
    assert "too large: 0.341835 MiB > 0.3 MiB (max_size_mib)" in run.lines
    assert runs["without what it replaced"].served == (False, 4)


def test_a_repeated_export_does_not_replace_a_newer_champion(first_export_again, runs, sequence):
    assert runs["other"].served == (True, 2)
    pushed = first_export_again.pushed
    assert (pushed.new, pushed.version) == (False, 2)
    assert "was judged without a champion, but the champion is model" in pushed.reason
    assert [entry.version for entry in sequence.registry.history(NAME)[:3]] == [1, 2, 3]
    assert runs["other again"].served == (False, 2)


def test_a_model_is_pushed_as_a_canary(runs, sequence):
    pushed = runs["canary"].results[-1].pushed
    assert (pushed.new, pushed.version, pushed.share) == (True, 5, 0.1)
    assert sequence.registry.serving(NAME) == Serving(4, 5, 0.1)
    assert f"{NAME} version 5, for 0.1 of the requests" in runs["canary"].lines
    again = runs["canary again"]
    assert set(again.states) == {"cached"}
    assert again.results[-1].pushed.unchanged
    decision = Decisions(sequence.store).all()[0]
    assert decision.title == f"{NAME}: version 5 was pushed as a canary for 0.1 of the requests"
