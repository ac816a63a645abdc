"""Canaries: started by a push or a command, promoted, aborted, and ended by rollbacks."""

from __future__ import annotations

import json
import re
from datetime import timedelta

import pytest

from ridgeline.announcements import announce, change_decision
from ridgeline.decisions import Decisions
from ridgeline.history import HistoryEntry, parse
from ridgeline.registry import Registry, RegistryError, Serving
from ridgeline.settings import Settings

NAME = "shoes"


@pytest.fixture
def registry(tmp_path, store, monkeypatch):
    monkeypatch.setattr("ridgeline.registry.check", lambda *arguments: None)
    return Registry(tmp_path / "serving", store=store)


@pytest.fixture
def push(registry, store, publish_servable):
    """Push a model by number, judged against the champion."""
    models = {}

    def push(number, by="ann", canary_share=0.0, **facts):
        champion = registry.champion(NAME)
        key = (number, *facts.items(), champion and champion.model_digest)
        if key not in models:
            models[key] = publish_servable(store, number, **facts, champion=champion and champion.model_digest)
        return registry.push(models[key], f"run {number}", by, canary_share)

    return push


@pytest.fixture
def start(registry, store):
    def start(version, share=0.1, run_id="start"):
        return registry.start_canary(store, NAME, version, share, reason="try it", by="bob", run_id=run_id)

    return start


def end(registry, store, action, run_id="end"):
    return getattr(registry, action)(store, NAME, reason="as decided", by="bob", run_id=run_id)


def champion_file(registry):
    return json.loads((registry.root / NAME / "champion.json").read_text())


def config(registry):
    return re.sub(r"\s+", " ", (registry.root / "models.config").read_text())


def test_a_push_with_a_share_starts_a_canary(registry, push):
    push(1)
    pushed = push(2, canary_share=0.1)
    assert (pushed.version, pushed.new, pushed.share) == (2, True, 0.1)
    assert pushed.reason == "pushed as version 2, a canary for 0.1 of the requests"
    assert registry.champion(NAME).version == 1
    assert registry.serving(NAME) == Serving(1, 2, 0.1)
    assert champion_file(registry) == {"version": 1, "canary": {"version": 2, "share": 0.1}}
    assert "specific { versions: 1 versions: 2 }" in config(registry)
    assert 'version_labels { key: "stable" value: 1 } version_labels { key: "canary" value: 2 }' in config(registry)


def test_the_first_model_of_a_name_becomes_the_champion(registry, push):
    assert push(1, canary_share=0.1).reason == "pushed as version 1"
    assert registry.serving(NAME) == Serving(1)


def test_a_promoted_canary_is_the_champion_and_can_be_rolled_back_from(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    entry = end(registry, store, "promote")
    assert (entry.action, entry.version, entry.reason, entry.by) == ("promote", 2, "as decided", "bob")
    assert registry.serving(NAME) == Serving(2)
    assert champion_file(registry) == {"version": 2}
    assert "specific { versions: 2 }" in config(registry)
    assert "version_labels" not in config(registry)
    assert registry.previous(NAME).version == 1
    assert [e.version for e in registry.champions(NAME)] == [2, 1]
    assert push(2).unchanged
    assert push(3).version == 3
    assert registry.rollback(store, NAME, None, reason="worse", by="", run_id="back").version == 2
    assert "was rolled back from" in push(3).reason


def test_an_aborted_canary_leaves_the_champion_and_is_not_pushed_again(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    end(registry, store, "abort")
    assert registry.serving(NAME) == Serving(1)
    assert registry.versions(NAME) == [1, 2]
    for by in ("ann", ""):
        assert "version 2 served this model and was aborted as a canary on " in push(2, by, canary_share=0.1).reason
    assert push(2, forced="we want it").version == 3
    assert registry.serving(NAME) == Serving(3)


def test_nothing_else_is_pushed_while_a_canary_is_undecided(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    again = push(2, canary_share=0.2)
    assert (again.new, again.unchanged, again.version) == (False, True, 1)
    assert again.reason.startswith("not pushed: version 2 is a canary of this model already; `ridgeline models promote")
    for share in (0.0, 0.1):
        other = push(3, canary_share=share)
        assert (other.new, other.unchanged) == (False, False)
        assert "version 2 is a canary of another model since " in other.reason
    assert push(1).unchanged  # the champion
    (registry.root / NAME / "1" / "saved_model.pb").write_text("damaged")
    assert push(1, canary_share=0.1).reason == "pushed as version 3"  # repaired at once; the canary has ended
    assert registry.serving(NAME) == Serving(3)


def test_a_forced_push_ends_a_canary(registry, push):
    push(1)
    push(2, canary_share=0.1)
    assert push(3, forced="urgent").reason == "pushed as version 3"
    assert registry.serving(NAME) == Serving(3)
    assert "was replaced by version 3" in push(2, by="").reason
    assert push(2, by="ann").version == 4


def test_a_rollback_ends_a_canary(registry, store, push, start):
    push(1)
    push(2)
    push(3, canary_share=0.5)
    registry.rollback(store, NAME, None, reason="both are bad", by="", run_id="back")
    assert registry.serving(NAME) == Serving(1)
    assert registry.previous(NAME) is None
    assert start(3).version == 3
    assert registry.serving(NAME) == Serving(1, 3, 0.1)


def test_a_version_becomes_a_canary_by_command_and_its_share_changes(registry, store, push, start):
    push(1)
    push(2)
    with pytest.raises(RegistryError, match="Expected a version, since shoes has no canary"):
        start(None)
    assert start(1).share == 0.1
    assert start(None, 0.5, "more").share == 0.5
    assert registry.serving(NAME) == Serving(2, 1, 0.5)
    assert [entry.action for entry in registry.history(NAME)] == ["push", "push", "canary", "canary"]
    end(registry, store, "promote")
    assert registry.serving(NAME) == Serving(1)
    assert registry.previous(NAME) is None  # as after a rollback: what came later is not gone back to


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(push, start, share):
    push(1)
    with pytest.raises(RegistryError, match="Expected a share above 0 and below 1; received"):
        start(1, share)


def test_what_cannot_be_is_refused_and_changes_nothing(registry, store, push, start):
    push(1)
    push(2)
    push(3)
    for action in ("promote", "abort"):
        with pytest.raises(RegistryError, match=f"Expected a canary of shoes to {action}; there is none"):
            end(registry, store, action)
    with pytest.raises(RegistryError, match="other than the champion; received 3"):
        start(3)
    with pytest.raises(RegistryError, match="received 7, which does not exist"):
        start(7)
    with pytest.raises(RegistryError, match="Expected a reason for the promotion; received none"):
        registry.promote(store, NAME, reason=" ", by="", run_id="x")
    with pytest.raises(RegistryError, match="Expected the name of a served model"):
        registry.abort(store, "boots", reason="none", by="", run_id="x")
    (registry.root / NAME / "2" / "saved_model.pb").write_text("damaged")
    with pytest.raises(RegistryError, match="they were changed: saved_model.pb"):
        start(2)
    start(1)
    with pytest.raises(RegistryError, match="Expected no other canary of shoes than version 1; received 2"):
        start(2, run_id="other")
    (registry.root / NAME / "1" / "saved_model.pb").write_text("damaged")
    with pytest.raises(RegistryError, match="they were changed: saved_model.pb"):
        end(registry, store, "promote")
    assert registry.serving(NAME) == Serving(3, 1, 0.1)


def test_a_run_decides_only_once(registry, store, push, start):
    push(1)
    push(2)
    assert start(1) == start(1)
    assert end(registry, store, "abort") == end(registry, store, "abort")
    with pytest.raises(RegistryError, match="Expected a run without a canary of shoes yet; received start"):
        start(1)
    assert len(registry.history(NAME)) == 4


def test_the_version_of_a_canary_is_not_deleted(registry, store, push, start, monkeypatch):
    monkeypatch.setattr("ridgeline.registry.STILL_LOADED", timedelta(days=-1))
    registry.keep_versions = 1
    for number in (1, 2, 3):
        push(number)
    assert registry.versions(NAME) == [2, 3]
    start(2)
    assert push(4, forced="urgent").version == 4
    assert registry.versions(NAME) == [3, 4]
    push(5, canary_share=0.1)
    assert registry.versions(NAME) == [3, 4, 5]
    end(registry, store, "abort")
    push(6)
    assert registry.versions(NAME) == [4, 6]


def test_the_lines_of_canaries_are_refused_by_earlier_releases_and_other_lines_are_as_before(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    end(registry, store, "promote")
    push(3)
    lines = (registry.root / NAME / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["schema_version"] for line in lines] == [1, 2, 2, 1]
    assert ["share" in json.loads(line) for line in lines] == [False, True, False, False]
    assert [parse(line) for line in lines] == registry.history(NAME)


@pytest.mark.parametrize("lost", [2, 3])  # the canary's line; its end
def test_a_history_that_lost_lines_serves_the_champion(registry, store, push, lost):
    push(1)
    push(2)
    push(3, canary_share=0.1)
    end(registry, store, "abort")
    for file in ("history.jsonl", "history-copy.jsonl"):
        path = registry.root / NAME / file
        lines = path.read_text().splitlines()
        lines[lost] = lines[lost][:-9] + "damaged"
        path.write_text("\n".join(lines) + "\n")
    registry.recover()
    assert registry.serving(NAME) == Serving(2)
    assert "specific { versions: 2 }" in config(registry)


def test_people_hear_of_canaries(registry, store, push, tmp_path):
    settings = Settings(store=str(store.root), serving=registry.root)
    push(1)
    push(2, canary_share=0.25)
    announce(settings, change_decision(NAME, end(registry, store, "abort")))
    decision = Decisions(store).all()[0]
    assert (decision.kind, decision.title, decision.reasons) == (
        "aborted",
        "shoes: aborted the canary version 2",
        ("as decided",),
    )
    started = HistoryEntry(**registry.history(NAME)[1].model_dump())
    assert change_decision(NAME, started).title == "shoes: started the canary version 2, 0.25 of the requests"
