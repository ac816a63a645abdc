"""What a run, a rollback and time decide is recorded once and reaches people, whatever the recipients do."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ridgeline import pipeline
from ridgeline.announcements import announce, change_decision, stale_decision
from ridgeline.component import StepError
from ridgeline.decisions import Decision, Decisions
from ridgeline.history import HistoryEntry
from ridgeline.messages import Recipient
from ridgeline.settings import Settings

NOW = datetime(2026, 11, 28, tzinfo=UTC)


def entry(version: int = 3, **values: Any) -> HistoryEntry:
    facts: dict[str, Any] = {
        "action": "push",
        "artifact": f"PushedModel/{version}",
        "model_digest": f"{version}" * 64,
        "run_id": "r",
    }
    return HistoryEntry(**{"version": version, "accuracy": 0.9, "at": NOW - timedelta(days=4), **facts, **values})


def refused(subject: str, *causes: str, days_ago: int = 1) -> Decision:
    title = f"shoes: {subject} was refused"
    at = NOW - timedelta(days=days_ago)
    return Decision(kind="refused", model="shoes", subject=subject, title=title, causes=causes, at=at)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=str(tmp_path / "store"), stale_days=30, refused_in_a_row=3)


@pytest.mark.parametrize(
    ("age_days", "causes", "reason"),
    [
        (29, [], None),
        (30, [], "champion 30 days old"),
        (34, ["recall"] * 4, "champion 34 days old; the last 4 candidates were refused: recall"),
        (2, ["recall"] * 3, "champion 2 days old; the last 3 candidates were refused: recall"),
        (2, ["recall"] * 2, None),
        (2, ["recall", "recall", "accuracy", "recall"], None),
        (40, ["recall", "accuracy"], "champion 40 days old; the last candidate was refused: recall"),
    ],
)
def test_a_champion_is_stale_if_it_is_old_or_its_successors_were_refused_for_one_reason(
    settings: Settings, age_days: int, causes: list[str], reason: str | None
) -> None:
    history = [entry(2, at=NOW - timedelta(days=90)), entry(3, at=NOW - timedelta(days=age_days))]
    decisions = [refused(f"model {i}", cause) for i, cause in enumerate(causes)]
    decisions += [refused("of another champion", "recall", days_ago=89)]
    found = stale_decision("shoes", history, decisions, settings, NOW)
    assert (found and found.reasons) == ((reason,) if reason else None)
    assert stale_decision("boots", [], decisions, settings, NOW) is None
    if found:
        later = stale_decision("shoes", history, decisions, settings, NOW + timedelta(days=1))
        assert later
        assert later.id == found.id  # it is announced once


def test_an_old_champion_is_announced_once(synthetic_store: Any, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    monkeypatch.setattr("ridgeline.announcements.datetime", Later)
    for _ in range(2):
        announce(Settings(store=str(tmp_path / "store")))
    found = [d for d in Decisions(Settings(store=str(tmp_path / "store")).open_store()).all() if d.kind == "stale"]
    assert [(d.title, d.reasons) for d in found] == [
        ("synthetic_garments: version 1 may be stale", ("champion 31 days old",))
    ]


class Later(datetime):
    """A clock that is 31 days ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) + timedelta(days=31)


def test_a_rollback_is_announced_with_its_reason(settings: Settings) -> None:
    announce(settings, change_decision("shoes", entry(2, action="rollback", reason="wrong labels", by="ann")))
    (found,) = Decisions(settings.open_store()).all()
    assert (found.title, found.reasons, found.by) == ("shoes: rolled back to version 2", ("wrong labels",), "ann")


def test_nothing_that_goes_wrong_reaches_the_run(settings: Settings, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "decisions").write_text("a file in the way")
    announce(settings, refused("model 1"))
    assert "Cannot announce a decision" in caplog.text


def test_messages_about_other_kinds_are_not_sent(tmp_path: Path, monkeypatch: Any) -> None:
    sent: list[str] = []

    def send(self: Recipient, title: str, body: str) -> bool:
        sent.append(title)
        return True

    monkeypatch.setattr(Recipient, "send", send)
    settings = Settings(store=str(tmp_path), notify=SecretStr("json://127.0.0.1"), notify_about=("failed", "refused"))
    announce(settings, refused("model 1"), change_decision("shoes", entry(2, action="rollback")))
    assert sent == []  # the refusal was long ago
    now = Decision(kind="refused", model="shoes", subject="model 2", title="model 2 was refused")
    announce(settings, now, None, now)
    assert sent == ["model 2 was refused"]


def test_data_that_stop_a_run_are_announced_and_an_equal_run_is_silent(
    tmp_path: Path, synthetic_store: Any, refs: dict[str, str]
) -> None:
    shutil.copytree(synthetic_store.local, tmp_path / "store")
    schema = json.loads((synthetic_store.path(refs["schema"]) / "schema.json").read_text())
    schema["min_class_examples"] = dict.fromkeys(schema["min_class_examples"], 1_000_000)
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    settings, plan = Settings(store=str(tmp_path / "store")), pipeline.plan("validate")
    values = {
        "ingest.dataset": "synthetic_garments:1.0.0",
        "transform.validation_examples": 1_000,
        "schema.file": str(tmp_path / "schema.json"),
    }
    params = pipeline.parse_params(plan, values, settings)
    for run_id in ("first", "second"):
        with pytest.raises(StepError, match="1,000,000"):
            list(pipeline.run(settings, plan, params, run_id, by="ann"))
    (found,) = [d for d in Decisions(settings.open_store()).all() if d.kind == "data_blocked"]
    assert (found.model, found.run_id, found.by) == ("synthetic_garments", "first", "ann")
    assert found.title == "synthetic_garments: the data stopped the run with 1 error"
    assert "1,000,000" in found.reasons[0]
    assert Path(found.report).name == "report.html"
