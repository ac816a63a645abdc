"""Canaries: started by a push or a command, promoted, aborted, and ended by rollbacks."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from datetime import UTC, datetime, timedelta

import pytest

from ridgeline.announcements import announce, change_decision
from ridgeline.decisions import Decision, Decisions
from ridgeline.history import HistoryEntry, Serving, parse
from ridgeline.keys import KeyParts
from ridgeline.registry import Registry, RegistryError
from ridgeline.settings import Settings
from ridgeline.store import Execution

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
def recorded(store):
    """Whatever is pushed has the record of its run, so that a lost push is found again."""

    def record(ref):
        parts = KeyParts(component="any", inputs={}, params={}, code={}, libraries={})
        values = {"run_id": "run", "state": "complete", "reason": "first run", "key": "k" * 64, "inputs": {}}
        store.record(
            Execution(component="any", parts=parts, output=ref, started_at=datetime.now(UTC), seconds=0, **values)
        )

    return lambda: [record(ref) for ref in store.refs() if ref.startswith("PushedModel/")]


@pytest.fixture
def start(registry, store):
    def start(version, share=0.1, run_id="start"):
        return registry.start_canary(store, NAME, version, share, reason="try it", by="bob", run_id=run_id)

    return start


def end(registry, store, action, run_id="end", version=None):
    where = (store,) if action == "promote" else ()
    return getattr(registry, action)(*where, NAME, version, reason="as decided", by="bob", run_id=run_id)


def damage(registry, *lost):
    """Damage lines of the history, by index, and the same lines of its copy."""
    for file in ("history.jsonl", "history-copy.jsonl"):
        path = registry.root / NAME / file
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line[:-9]}damaged\n" if i in lost else f"{line}\n" for i, line in enumerate(lines)))


def changes(registry):
    return [(entry.action, entry.version) for entry in registry.history(NAME)]


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
    assert push(1, canary_share=0.1).reason == "pushed as version 3"  # repaired at once


def test_a_canary_continues_after_a_repair_of_the_champion(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    (registry.root / NAME / "1" / "saved_model.pb").write_text("damaged")
    assert push(1, by="").reason == "pushed as version 3"
    assert registry.serving(NAME) == Serving(3, 2, 0.1)
    entry = registry.history(NAME)[-1]
    assert (entry.action, entry.version, entry.run_id, entry.by) == ("canary", 2, "run 1", "")
    assert entry.reason == "it continues: version 3 repairs the champion, version 1"
    assert push(2, by="").unchanged
    end(registry, store, "promote")
    assert registry.serving(NAME) == Serving(2)
    assert registry.previous(NAME).version == 3


def test_a_refusal_names_what_ended_the_time_of_the_model(registry, store, push):
    push(1)
    push(2)
    push(3, canary_share=0.1)
    end(registry, store, "abort")
    push(4)
    assert "version 1 served this model and was replaced by version 2 on " in push(1, by="").reason
    assert "version 2 served this model and was replaced by version 4 on " in push(2, by="").reason
    assert "version 3 served this model and was aborted as a canary on " in push(3, by="").reason
    push(5, canary_share=0.1)
    registry.rollback(store, NAME, 2, reason="both are bad", by="", run_id="back")
    assert "version 4 served this model and was rolled back from on " in push(4).reason
    assert re.search("version 5 served .* and was ended as a canary by a rollback on .*: both are bad", push(5).reason)
    push(6, canary_share=0.1)
    end(registry, store, "promote", "promote 6")
    assert "version 2 served this model and was replaced by version 6 on " in push(2, by="").reason


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
    with pytest.raises(RegistryError, match="Expected a reason; received none"):
        registry.promote(store, NAME, reason=" ", by="", run_id="x")
    with pytest.raises(RegistryError, match="Expected the name of a served model"):
        registry.abort("boots", reason="none", by="", run_id="x")
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


@pytest.mark.parametrize("action", ["promote", "abort"])
def test_another_version_than_the_present_canary_is_neither_promoted_nor_aborted(registry, store, push, action):
    push(1)
    push(2, canary_share=0.1)
    for version in (1, 3):
        with pytest.raises(
            RegistryError, match=f"present canary of shoes, version 2; received {version}. Name version 2"
        ):
            end(registry, store, action, version=version)
    assert registry.serving(NAME) == Serving(1, 2, 0.1)
    assert end(registry, store, action, version=2).version == 2
    assert end(registry, store, action, version=2).version == 2  # the run is repeated


def test_a_run_decides_only_once(registry, store, push, start):
    push(1)
    push(2)
    assert start(1) == start(1)
    assert end(registry, store, "abort") == end(registry, store, "abort")
    with pytest.raises(RegistryError, match="received start, which started the canary version 1 on "):
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


def test_the_lines_of_approved_pushes_are_refused_by_earlier_releases(registry, store, push, publish_servable):
    push(1)
    asked = Decision(kind="approved", model=NAME, subject="s", title="t", reasons=("better",), answered_by="ann")
    registry.push(publish_servable(store, 2), "run 2", "bob", approval=asked)
    registry.rollback(store, NAME, None, reason="worse", by="", run_id="back")
    lines = [json.loads(line) for line in (registry.root / NAME / "history.jsonl").read_text().splitlines()]
    assert [line["schema_version"] for line in lines] == [1, 2, 1]
    approvals = [(line.get("approved_by"), line.get("approval")) for line in lines]
    assert approvals == [(None, None), ("ann", "better"), (None, None)]


HISTORIES = [
    "push canary promote canary",
    "push push canary abort",
    "push canary abort canary share",
    "push canary share promote push",
    "push push rollback canary",
    "push canary repair promote push",
    "push canary force canary abort canary",
    "push canary abort push start promote",
]


@pytest.mark.parametrize("steps", HISTORIES)
def test_what_is_served_stays_the_same_whichever_lines_are_lost(registry, store, push, start, recorded, steps):
    for number, step in enumerate(steps.split(), start=1):
        if step in ("push", "canary", "force"):
            force = {"forced": "urgent"} if step == "force" else {}
            assert push(number, canary_share=0.1 if step == "canary" else 0.0, **force).new
        elif step in ("promote", "abort"):
            end(registry, store, step, f"run {number}")
        elif step == "rollback":
            registry.rollback(store, NAME, None, reason="worse", by="", run_id=f"run {number}")
        elif step == "repair":
            (registry.root / NAME / "1" / "saved_model.pb").write_text("damaged")
            assert push(1).new
        elif step in ("share", "start"):
            start(None if step == "share" else 1, 0.5, f"run {number}")
    recorded()
    before, history = registry.serving(NAME), changes(registry)
    folder, whole = registry.root / NAME, registry.root / "whole"
    shutil.copytree(folder, whole)
    lines = range(len(history))
    for lost in [*itertools.combinations(lines, 1), *itertools.combinations(lines, 2)]:
        damage(registry, *lost)
        assert registry.serving(NAME) == before, lost
        registry.recover()
        assert registry.serving(NAME) == before, (lost, changes(registry))
        assert registry.history(NAME) == Registry(registry.root, store=store).history(NAME)
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)


def test_a_lost_promotion_is_read_from_the_pointer_without_records_too(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    end(registry, store, "promote")
    push(3, canary_share=0.1)
    damage(registry, 2)
    registry.recover()
    assert registry.serving(NAME) == Serving(2, 3, 0.1)
    assert changes(registry) == [("push", 1), ("canary", 2), ("canary", 3), ("promote", 2), ("canary", 3)]
    assert {entry.reason for entry in registry.history(NAME)[3:]} == {"champion.json named it"}
    assert registry.previous(NAME).version == 1


@pytest.mark.parametrize("pointer", [True, False])
def test_a_lost_line_of_a_canary_is_found_as_a_canary(registry, store, push, recorded, pointer):
    push(1)
    push(2)
    push(3, canary_share=0.1)
    end(registry, store, "abort")
    recorded()
    damage(registry, 2)
    if not pointer:
        (registry.root / NAME / "champion.json").unlink()
    registry.recover()
    assert changes(registry) == [("push", 1), ("push", 2), ("canary", 3), ("abort", 3)]
    assert registry.serving(NAME) == Serving(2)
    assert "specific { versions: 2 }" in config(registry)


@pytest.mark.parametrize("pointer", ["", "{}", '{"version": 1, "canary": {"version": 2, "share": 7}}'])
def test_a_canary_whose_history_lost_its_end_is_aborted_if_the_pointer_cannot_be_read(registry, store, push, pointer):
    push(1)
    push(2, canary_share=0.1)
    end(registry, store, "promote")
    damage(registry, 2)
    (registry.root / NAME / "champion.json").write_text(pointer)
    registry.recover()
    assert changes(registry) == [("push", 1), ("canary", 2), ("abort", 2)]
    assert registry.serving(NAME) == Serving(1)


def test_lines_lost_in_different_places_of_the_history_and_its_copy(registry, store, push):
    push(1)
    push(2, canary_share=0.1)
    end(registry, store, "promote")
    push(3, canary_share=0.1)
    for file, lost in (("history.jsonl", (2, 3)), ("history-copy.jsonl", (1, 2))):
        path = registry.root / NAME / file
        lines = [b"damaged" if i in lost else line for i, line in enumerate(path.read_bytes().splitlines())]
        path.write_bytes(b"\n".join(lines) + b"\n")
    registry.recover()
    assert registry.serving(NAME) == Serving(2, 3, 0.1)


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
