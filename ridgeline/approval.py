"""Approval of pushes by a person: when it is needed, what the person is shown, and asking at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Protocol, TextIO

from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import Approval, Component, ParameterError, Params, StepError
from ridgeline.decisions import ANSWERS, Answer, Decision
from ridgeline.markdown import escape
from ridgeline.masking import mask
from ridgeline.significance import mcnemar_p_value

YES, NO = {"yes", "y"}, {"no", "n"}
SIGNIFICANCE = 0.05  # a gain over the champion is significant if its p-value is below this


class Ask(Protocol):
    """How a person is asked."""

    def expect_possible(self) -> None:
        """Refuse a run that may need approval, if there is no way to ask for it.

        Raises:
            ParameterError: If there is no way to ask.
        """

    def __call__(self, asked: Decision, evaluation: ModelEvaluation) -> Decision:
        """Return the answer, see `answer`.

        Args:
            asked: What is asked.
            evaluation: The model's evaluation.
        """


def why_needed(policy: Approval, model: PushedModel, evaluation: ModelEvaluation) -> str:
    """Return why a push needs approval, as a phrase; empty if it needs none.

    =============  ====================================================================================
    ``never``      no push
    ``forced``     a reason overrides a check of the gate, or the limit of the size
    ``uncertain``  also if there is a champion and the gain over it is not significant: the one-sided exact McNemar
                   test on the test images has p >= 0.05, or nothing can be compared
    ``always``     every push
    =============  ====================================================================================

    Args:
        policy: The value of the parameter.
        model: The model to push.
        evaluation: Its evaluation.
    """
    verdict, comparison = evaluation.facts.verdict, evaluation.facts.comparison
    if policy == "never":
        return ""
    if forced := verdict.forced or (model.facts.exceeded_mib is not None and model.facts.forced):
        return f"a reason overrides the gate: {forced}"
    if policy == "uncertain" and verdict.champion:
        if comparison is None:
            return "it cannot be compared with the champion"
        candidate, champion = comparison.only_candidate_right, comparison.only_champion_right
        if (p_value := mcnemar_p_value(candidate, champion, alternative="greater")) >= SIGNIFICANCE:
            return f"its gain over the champion is not significant: p = {p_value:.4g}"
    return "every push needs it" if policy == "always" else ""


def question(
    model: PushedModel, evaluation: ModelEvaluation, why: str, canary_share: float, run_id: str, by: str, link: str
) -> Decision:
    """Return the question whether a model is to be pushed.

    Args:
        model: The model.
        evaluation: Its evaluation.
        why: Why a person must approve it.
        canary_share: The share of the requests that it would answer as a canary; 0 if it would be the champion.
        run_id: The run that asks.
        by: The user who started the run.
        link: URL of the run's page; empty for the path of the evaluation's report.
    """
    facts, name = evaluation.facts, model.facts.model_name
    canary = (f"it would answer {canary_share:.3g} of the requests, as a canary",) if canary_share else ()
    return Decision(
        kind="approval_asked",
        model=name,
        subject=f"{model.ref} in {run_id}",
        model_digest=facts.model_digest,
        title=f"{name}: model {facts.model_digest[:12]} waits for approval",
        reasons=(f"approval is needed: {why}", *canary, *facts.verdict.reasons),
        figures=figures_of(evaluation),
        report=link or str(evaluation.report or ""),
        run_id=run_id,
        by=by,
    )


def figures_of(evaluation: ModelEvaluation) -> dict[str, float]:
    """Return the figures of an evaluation that decisions state, by name."""
    facts = evaluation.facts
    return {"accuracy": facts.accuracy} | (
        {"accuracy of the champion": facts.comparison.accuracy} if facts.comparison else {}
    )


def answer(asked: Decision, kind: Answer, by: str = "", reason: str = "") -> Decision:
    """Return the answer to a question.

    Args:
        asked: The question.
        kind: What was answered.
        by: The user who answered; empty if the time limit passed.
        reason: Why; secrets in it are hidden.
    """
    model = f"{asked.model}: model {asked.model_digest[:12]}"
    titles = {
        "approved": f"{model} was approved by {by}",
        "rejected": f"{model} was rejected by {by}, and not pushed",
        "approval_expired": f"{model} was not pushed: nobody approved it in time",
    }
    given = {"kind": kind, "title": titles[kind], "answered_by": by, "at": datetime.now(UTC)}
    reason = mask(reason.encode(errors="replace").decode()) or "no reason given"
    return asked.model_copy(update={**given, "reasons": (reason,)})


def find_answer(asked: Decision, decisions: Iterable[Decision]) -> Decision | None:
    """Return the recorded answer to a question, so that a repeated task need not ask again; None if there is none.

    A run that nobody started does not ask again about a model that a person rejected.

    Args:
        asked: The question.
        decisions: The recorded decisions, newest first.
    """
    model = asked.model, asked.model_digest
    for decision in decisions:
        if decision.kind in ANSWERS and decision.subject == asked.subject:
            return decision
        if (
            decision.kind in ("approved", "rejected")
            and (decision.model, decision.model_digest) == model
            and not asked.by
        ):
            return decision if decision.kind == "rejected" else None
    return None


def refusal(model: PushedModel, decisions: Iterable[Decision]) -> str:
    """Return why a model is not served although the gate and the history allow it: how a person answered last.

    Args:
        model: The model.
        decisions: The recorded decisions, newest first.

    Returns:
        A sentence; empty if nobody rejected the model.
    """
    about = model.facts.model_name, model.facts.model_digest
    last = next((d for d in decisions if d.kind in ANSWERS and (d.model, d.model_digest) == about), None)
    if last is None or last.kind == "approved":
        return ""
    who = f"rejected by {last.answered_by}" if last.answered_by else "not approved in time"
    return f"{who} on {last.at:%Y-%m-%d}: {'; '.join(last.reasons)}"


def expect_askable(steps: Iterable[Component], params: Mapping[str, Params], ask: Ask | None) -> None:
    """Refuse a run that may need approval, if there is no way to ask for it.

    Args:
        steps: The steps.
        params: Their parameters by name.
        ask: How a person is asked; None if that is not possible.

    Raises:
        ParameterError: If there is no way to ask.
    """
    for step in steps:
        if step.push(params[step.name]).approval == "never":
            continue
        if ModelEvaluation not in step.inputs.values():
            raise ParameterError(
                f"Expected a ModelEvaluation among the inputs of {step.name}, which asks for approval."
            )
        if ask is None:
            raise ParameterError(f"Expected {step.name} to need no approval, since nobody can be asked.")
        ask.expect_possible()


class Terminal:
    """Asks at the terminal of this process.

    Args:
        user: The user who is asked.
        output: Where to print; standard output if None.
    """

    def __init__(self, user: str, output: TextIO | None = None) -> None:
        self.user = user
        self._output = output or sys.stdout

    def expect_possible(self) -> None:
        """Refuse a run without a terminal.

        Raises:
            ParameterError: If there is none.
        """
        if not (sys.stdin and sys.stdin.isatty() and self._output.isatty()):
            raise ParameterError(
                "Expected a terminal as input and output, to ask for approval of the push; received none, or a "
                "redirected one. Run the command at a terminal, run the DAG in Airflow's web interface, or set the "
                "parameter approval to never."
            )

    def __call__(self, asked: Decision, evaluation: ModelEvaluation) -> Decision:
        """Print where the report is, and read the answer and its reason. The question itself is logged.

        Raises:
            StepError: If the input ends before.
        """
        print(f"The report: {asked.report}\n", file=self._output)
        try:
            while (chosen := self._read("Push it? yes or no: ").lower()) not in YES | NO:
                print(f"Expected yes or no; received {chosen!r}.", file=self._output)
            while not (reason := self._read("Why? It is kept in the history: ")):
                print("Expected a reason; received none.", file=self._output)
        except EOFError:
            raise StepError(f"{asked.title}, but the input ended. Run the command again to answer.") from None
        return answer(asked, "approved" if chosen in YES else "rejected", self.user, reason)

    def _read(self, prompt: str) -> str:
        print(prompt, end="", flush=True, file=self._output)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()


def markdown(asked: Decision, evaluation: ModelEvaluation) -> str:
    """Return a question as Markdown, with the evaluation's main figures and a link to the report.

    Args:
        asked: The question.
        evaluation: The model's evaluation.
    """
    facts, other = evaluation.facts, evaluation.facts.comparison
    low, high = facts.accuracy_interval
    lines = [f"- {escape(reason)}" for reason in asked.reasons]
    own = (
        f"Accuracy {facts.accuracy:.4f}, 95 % interval {low:.4f} to {high:.4f}, on {facts.num_examples:,} test "
        f"images of {escape(facts.dataset)}."
    )
    lines += ["", own]
    if other:
        rival = (
            f"The champion has {other.accuracy:.4f}. It alone is right on {other.only_champion_right:,} images, "
            f"this model on {other.only_candidate_right:,}."
        )
        lines += ["", rival]
    lines += ["", "| class | precision | recall | recall of the champion |", "| --- | --- | --- | --- |"]
    recalls = other.class_recalls if other else (None,) * len(facts.classes)
    for metrics, recall in zip(facts.classes, recalls, strict=True):
        before = "" if recall is None else f"{recall:.4f}"
        lines.append(f"| {escape(metrics.name)} | {metrics.precision:.4f} | {metrics.recall:.4f} | {before} |")
    if "://" in asked.report:
        lines += ["", f"[The run and its report]({asked.report})"]
    return "\n".join(lines)
