"""The summary of a run: each step, the metrics, the verdict, the locations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ridgeline.approval import refusal
from ridgeline.artifacts.base import Artifact
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.artifacts.label_errors import LabelErrors
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.predictions import Predictions
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.decisions import Decisions
from ridgeline.pipeline import output_types
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store


def summary(settings: Settings, outcomes: Mapping[str, Execution | tuple[str, str]]) -> Iterator[str]:
    """Yield the lines.

    Args:
        settings: Where the store and the served models are.
        outcomes: Each step's execution, in order; the state of a step that has none, and the reason if it is known.
    """
    yield f"{'step':<12} {'state':<15} seconds  reason"
    for name, outcome in outcomes.items():
        if isinstance(outcome, Execution):
            reason = outcome.reason.partition("\n")[0]
            yield f"{name:<12} {outcome.state:<15} {outcome.seconds:>7.1f}  {reason}"
        else:
            state, reason = outcome
            yield f"{name:<12} {state:<15} {'':>7}  {reason}".rstrip()
    yield ""
    store, types = settings.open_store(), output_types()
    for outcome in outcomes.values():
        ref = outcome.output if isinstance(outcome, Execution) else None
        kind = types[ref.partition("/")[0]] if ref else Artifact
        if ref and (kind.report_name or kind in (PushedModel, Predictions)):
            artifact = store.open(ref, kind)
            rows = list(_rows(artifact))
            if isinstance(artifact, PushedModel):
                rows += _served(settings.open_registry(), store, artifact)
            if artifact.report:
                rows.append(("report", str(artifact.report)))
            yield from (f"{label:<12} {text}" for label, text in rows)


def _rows(artifact: Artifact[Any]) -> Iterator[tuple[str, str]]:
    """Yield an artifact's lines: a label and a text each."""
    if isinstance(artifact, ModelEvaluation):
        facts, (low, high) = artifact.facts, artifact.facts.accuracy_interval
        if facts.synthetic:
            yield "SYNTHETIC", "drawn images: the figures say nothing about real ones"
        yield (
            "accuracy",
            f"{facts.accuracy:.4f}, 95 % interval {low:.4f} to {high:.4f}, on {facts.num_examples} test images of "
            f"{facts.dataset}",
        )
        if other := facts.comparison:
            yield (
                "champion",
                f"{other.accuracy:.4f}, model {other.model_digest[:12]}: alone right on {other.only_champion_right} "
                f"images, this model on {other.only_candidate_right}; p = {other.p_value:.4g}",
            )
        if replay := facts.replay:
            flips = [
                f"; most often {flip.count:,} {facts.classes[flip.champion].name} become "
                f"{facts.classes[flip.candidate].name}"
                for flip in replay.flips[:1]
            ]
            (low, high) = replay.agreement_interval
            yield (
                "replay",
                f"agrees with the champion on {replay.agreement:.4f}, 95 % interval {low:.4f} to {high:.4f}, of "
                f"{replay.num_images:,} unlabelled images{''.join(flips)}",
            )
        blessed = f"{'' if facts.verdict.blessed else 'not '}blessed{' by force' if facts.verdict.forced else ''}"
        yield "verdict", f"{blessed}: {'; '.join(facts.verdict.reasons)}"
    elif isinstance(artifact, ExampleAnomalies):
        data = artifact.facts
        accepted = f", accepted: {data.accepted}" if data.accepted else ""
        yield "data", f"{data.num_errors} errors, {data.num_warnings} warnings{accepted}"
    elif isinstance(artifact, LabelErrors):
        labels = artifact.facts
        found, total = (sum(getattr(s, n) for s in labels.splits.values()) for n in ("num_suspects", "num_examples"))
        often = [
            f"; most often {pair.count:,} of {pair.num_examples:,} {labels.class_names[pair.label]} look like "
            f"{labels.class_names[pair.suggested]}"
            for pair in labels.pairs[:1]
        ]
        yield "labels", f"{found:,} of {total:,} suspicious{''.join(often)}"
    elif isinstance(artifact, Predictions):
        rows = artifact.facts
        yield "predicted", f"{rows.num_files:,} files, {rows.num_unreadable:,} unreadable: {artifact.parquet}"
    elif isinstance(artifact, SweepResult):
        yield "chosen", f"{artifact.facts.trials[artifact.facts.winner]}: {artifact.facts.reason}"


def _served(registry: Registry, store: Store, model: PushedModel) -> Iterator[tuple[str, str]]:
    name, champion = model.facts.model_name, registry.champion(model.facts.model_name)
    serving = registry.serving(name) if champion else None
    if champion is None or champion.artifact != model.ref:
        decision = registry.decide_push(model)
        own = {entry.version for entry in registry.entries_of(name, model.facts.model_digest)}
        is_canary = serving is not None and serving.canary in own
        reason = refusal(model, Decisions(store).about(model.facts.model_digest)) if decision.push else decision.reason
        if reason and not is_canary:
            yield "not pushed", reason
    if champion:
        yield "served", f"{name} version {champion.version} in {registry.place_of(name, champion.version)}"
    if serving and serving.canary:
        yield "canary", f"{name} version {serving.canary}, for {serving.share:.3g} of the requests"
    if size := model.facts.size_in_words:
        yield "size", size
