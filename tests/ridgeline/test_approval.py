"""A push waits for a person where the policy asks for one; the answer is recorded and counts once for a run."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from ridgeline import pipeline
from ridgeline.approval import Terminal, answer, find_answer, markdown, why_needed
from ridgeline.artifacts.model_evaluation import Comparison, ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import ParameterError, StepError
from ridgeline.decisions import Answer, Decision, Decisions
from ridgeline.history import HistoryEntry
from ridgeline.masking import remember
from ridgeline.pipeline import StepResult
from ridgeline.registry import PushDecision
from ridgeline.run_summary import summary
from ridgeline.settings import Settings

NAME = "synthetic_garments"
EXPORT = pipeline.load_components()["export"]


class Person:
    """Gives one answer, and keeps what was asked."""

    def __init__(self, kind: Answer, reason: str = "as expected") -> None:
        self.kind, self.reason = kind, reason
        self.asked: list[Decision] = []

    def expect_possible(self) -> None:
        pass

    def __call__(self, asked: Decision, evaluation: ModelEvaluation) -> Decision:
        self.asked.append(asked)
        return answer(asked, self.kind, "" if self.kind == "approval_expired" else "ann", self.reason)


@pytest.fixture
def settings(synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A store with an exported model that was never pushed."""
    shutil.copytree(synthetic[0].store, tmp_path / "store", ignore=shutil.ignore_patterns("serving", "decisions"))
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    return Settings(store=str(tmp_path / "store"))


def export(
    settings: Settings, refs: dict[str, str], ask: Any, run_id: str = "run", by: str = "bob", policy: str = "always"
) -> StepResult:
    names = {"dataset": "ingest", "examples": "transform", "model": "train", "evaluation": "evaluate"}
    inputs = {name: refs[step] for name, step in names.items()}
    return pipeline.run_step(settings, EXPORT, inputs, EXPORT.parse({"approval": policy}), run_id, by, ask=ask)


def history(settings: Settings) -> list[HistoryEntry]:
    return settings.open_registry().history(NAME)


def kinds(settings: Settings) -> list[str]:
    return [decision.kind for decision in reversed(Decisions(settings.open_store()).all())]


def test_the_policy_is_in_no_key(settings: Settings, refs: dict[str, str]) -> None:
    for policy in ("never", "always"):
        assert export(settings, refs, Person("approved"), policy, policy=policy).execution.state == "cached"
    assert "approval" not in EXPORT.parse({"approval": "always"}).in_key()


def test_an_approved_model_is_pushed_and_the_history_keeps_who_and_why(
    settings: Settings, refs: dict[str, str]
) -> None:
    person = Person("approved", "figures look right")
    result = export(settings, refs, person)
    assert result.pushed
    assert result.pushed.new
    (entry,) = history(settings)
    assert (entry.by, entry.approved_by, entry.approval) == ("bob", "ann", "figures look right")
    assert kinds(settings) == ["approval_asked", "approved", "pushed"]
    assert person.asked[0].reasons[0] == "approval is needed: every push needs it"
    pushed = Decisions(settings.open_store()).all()[0]
    assert pushed.reasons[0] == "approved by ann: figures look right"
    assert not export(settings, refs, Person("rejected"), "later").pushed.new
    assert len(kinds(settings)) == 3  # what is served already needs no approval


@pytest.mark.parametrize(
    ("kind", "line"), [("rejected", "rejected by ann on"), ("approval_expired", "not approved in time on")]
)
def test_a_model_without_approval_is_not_pushed(
    settings: Settings, refs: dict[str, str], kind: Answer, line: str
) -> None:
    result = export(settings, refs, Person(kind))
    assert result.pushed is None
    assert result.execution.state == "cached"
    assert history(settings) == []
    assert kinds(settings) == ["approval_asked", kind]
    text = "\n".join(summary(settings, {"export": result.execution}))
    assert f"not pushed   {line}" in text
    assert "as expected" in text


def test_an_answer_counts_for_a_repeated_task_of_its_run(settings: Settings, refs: dict[str, str]) -> None:
    export(settings, refs, Person("rejected"))
    nobody = Person("approved")
    assert export(settings, refs, nobody).pushed is None
    assert nobody.asked == []
    assert export(settings, refs, nobody, "another run").pushed
    assert len(nobody.asked) == 1


def test_a_run_that_nobody_started_does_not_ask_again_about_a_rejected_model(
    settings: Settings, refs: dict[str, str]
) -> None:
    export(settings, refs, Person("rejected"), "first", by="")
    again = Person("approved")
    assert export(settings, refs, again, "second", by="").pushed is None
    assert again.asked == []
    late = Person("approval_expired")
    export(settings, refs, late, "third", by="bob")
    assert len(late.asked) == 1


def test_a_rejection_is_about_the_model_whatever_its_evaluation_says(settings: Settings, refs: dict[str, str]) -> None:
    store, person = settings.open_store(), Person("rejected")
    export(settings, refs, person, "first", by="")
    (asked,) = person.asked
    rejected = Decisions(store).all()[0]
    later = asked.model_copy(update={"subject": "PushedModel/another in second", "run_id": "second"})
    assert find_answer(later, [rejected]) == rejected
    assert find_answer(later.model_copy(update={"by": "bob"}), [rejected]) is None
    assert find_answer(later.model_copy(update={"model_digest": "another"}), [rejected]) is None


def test_nobody_is_asked_about_a_model_that_would_not_be_pushed_and_it_stays_so(
    settings: Settings, refs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(settings, refs, Person("approved"))
    answers = iter([PushDecision(False, "a canary waits")])
    monkeypatch.setattr("ridgeline.registry.Registry.decide_push", lambda *_: next(answers, PushDecision(True)))
    person = Person("approved")
    pushed = export(settings, refs, person, "second").pushed  # what refused it ends at that moment
    assert pushed
    assert (pushed.new, pushed.version, pushed.reason) == (False, 1, "not pushed: a canary waits")
    assert person.asked == []
    assert len(history(settings)) == 1


def test_a_reason_is_text_without_secrets() -> None:
    remember("json://user:s3cret-word@example.org")
    asked = Decision(kind="approval_asked", model="shoes", model_digest="ab" * 32, subject="s", title="t")
    given = answer(asked, "approved", "ann", "bad \ud800 s3cret-word")
    assert given.reasons == ("bad ? ***",)
    assert given.title == "shoes: model abababababab was approved by ann"
    assert given.model_dump_json()


def evaluation_with(
    settings: Settings, refs: dict[str, str], comparison: tuple[int, int] | None, **verdict: Any
) -> ModelEvaluation:
    evaluation = settings.open_store().open(refs["evaluate"], ModelEvaluation)
    other = None
    if comparison:
        only_champion, only_candidate = comparison
        recalls = tuple(metrics.recall for metrics in evaluation.facts.classes)
        shared = {"accuracy": 0.5, "accuracy_interval": (0.4, 0.6), "class_recalls": recalls, "p_value": 0.5}
        other = Comparison(
            model_digest="c", only_champion_right=only_champion, only_candidate_right=only_candidate, **shared
        )
    changed = evaluation.facts.verdict.model_copy(update=verdict)
    facts = evaluation.facts.model_copy(update={"comparison": other, "verdict": changed})
    return ModelEvaluation(evaluation.path, evaluation.manifest.model_copy(update={"facts": facts.model_dump()}))


@pytest.mark.parametrize(
    ("policy", "comparison", "verdict", "why"),
    [
        ("never", (9, 9), {"champion": "c", "forced": "a demo"}, ""),
        ("forced", (9, 9), {"champion": "c"}, ""),
        ("forced", None, {"forced": "a demo"}, "a reason overrides the gate: a demo"),
        ("uncertain", None, {}, ""),  # there is no champion
        ("uncertain", None, {"forced": "a demo"}, "a reason overrides the gate: a demo"),
        ("uncertain", None, {"champion": "c"}, "it cannot be compared with the champion"),
        ("uncertain", (9, 12), {"champion": "c"}, "its gain over the champion is not significant: p = 0.3318"),
        ("uncertain", (0, 4), {"champion": "c"}, "its gain over the champion is not significant: p = 0.0625"),
        ("uncertain", (0, 5), {"champion": "c"}, ""),  # p = 1/32
        ("always", (0, 5), {"champion": "c"}, "every push needs it"),
    ],
)
def test_the_policy_says_when_a_person_is_asked(
    settings: Settings, refs: dict[str, str], policy: Any, comparison: Any, verdict: dict[str, str], why: str
) -> None:
    model = settings.open_store().open(refs["export"], PushedModel)
    assert why_needed(policy, model, evaluation_with(settings, refs, comparison, **verdict)) == why


def test_the_question_in_markdown_shows_names_as_they_are(settings: Settings, refs: dict[str, str]) -> None:
    evaluation = evaluation_with(settings, refs, (3, 4))
    asked = Decision(
        kind="approval_asked", model="m", subject="s", title="t", reasons=("<b>*x*</b>",), report="/a/path"
    )
    text = markdown(asked, evaluation)
    assert "- \\<b>\\*x\\*\\</b>" in text
    assert "It alone is right on 3 images, this model on 4." in text
    assert text.count("\n| ") == len(evaluation.facts.classes) + 2
    assert "/a/path" not in text  # a path is no link


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_asks_until_there_is_an_answer_and_a_reason(
    settings: Settings, refs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", FakeTerminal("perhaps\nYes\n\nfigures look right\n"))
    assert export(settings, refs, Terminal("ann", FakeTerminal())).pushed
    assert (history(settings)[0].approved_by, history(settings)[0].approval) == ("ann", "figures look right")


def test_without_a_terminal_nothing_runs(settings: Settings, refs: dict[str, str], tmp_path: Path) -> None:
    other = Settings(store=str(tmp_path / "other"))
    for ask, message in ((Terminal("ann", io.StringIO()), "Expected a terminal"), (None, "nobody can be asked")):
        with pytest.raises(ParameterError, match=message):
            steps = pipeline.plan("export")
            params = pipeline.parse_params(steps, {"export.approval": "uncertain"}, other)
            list(pipeline.run(other, steps, params, "run", ask=ask))
    assert not (tmp_path / "other").exists()


def test_input_that_ends_pushes_nothing(
    settings: Settings, refs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", FakeTerminal("yes\n"))
    with pytest.raises(StepError, match="the input ended"):
        export(settings, refs, Terminal("ann", FakeTerminal()))
    assert history(settings) == []
    assert kinds(settings) == ["approval_asked"]
