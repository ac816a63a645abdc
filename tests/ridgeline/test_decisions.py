"""The record of decisions, and who has received a message about each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ridgeline.decisions import KINDS, Decision, Decisions
from ridgeline.store import Store

EARLIER = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class Friend:
    """A recipient that fails as told, and the titles that it took."""

    digest: str
    failures: int = 0
    titles: list[str] = field(default_factory=list)

    def send(self, title: str, body: str) -> bool:
        if self.failures:
            self.failures -= 1
            return False
        self.titles.append(title)
        return True


def decision(subject: str = "version 3", **values: Any) -> Decision:
    return Decision(**{"kind": "pushed", "model": "shoes", "subject": subject, "title": subject, **values})


@pytest.fixture(params=["folder", "memory"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Decisions:
    root = tmp_path / "store" if request.param == "folder" else f"memory://{tmp_path.name}"
    return Decisions(Store(root, mirror=tmp_path / "mirror"))


def test_a_decision_is_recorded_once(book: Decisions) -> None:
    assert book.all() == []
    assert book.add(first := decision(reasons=("accuracy 0.9 >= 0.8",), figures={"accuracy": 0.9}))
    assert not book.add(decision(at=datetime.now(UTC) + timedelta(days=1)))
    assert book.add(second := decision("version 4"))
    assert book.add(third := decision(kind="rolled_back"))
    assert book.all() == [third, second, first]


def test_each_recipient_receives_each_decision_once_even_if_another_one_fails(book: Decisions) -> None:
    ann, bob = Friend("a" * 16), Friend("b" * 16, failures=1)
    book.add(decision())
    assert book.deliver([ann, bob], KINDS, EARLIER) == 1
    assert (ann.titles, bob.titles) == (["version 3"], [])
    book.add(decision("version 4"))
    assert book.deliver([ann, bob], KINDS, EARLIER) == 0
    assert ann.titles == ["version 3", "version 4"]
    assert bob.titles == ["version 4", "version 3"]
    assert book.deliver([ann, bob], KINDS, EARLIER) == 0
    assert len(ann.titles) == 2
    assert all(set(done.delivered) == {ann.digest, bob.digest} for done in book.all())


def test_a_recipient_that_fails_twice_delays_a_run_by_no_further_message(book: Decisions) -> None:
    bob = Friend("b" * 16, failures=2)
    for number in range(5):
        book.add(decision(f"version {number}"))
    assert book.deliver([bob], KINDS, EARLIER) == 5
    assert bob.failures == 0  # it was asked twice
    assert book.deliver([bob], KINDS, EARLIER) == 0
    assert bob.titles == [f"version {number}" for number in (4, 3, 2, 1, 0)]


def test_other_kinds_and_old_decisions_are_not_sent(book: Decisions) -> None:
    ann, now = Friend("a" * 16), datetime.now(UTC)
    book.add(decision(kind="refused"))
    book.add(decision("old", at=now - timedelta(days=2)))
    book.add(decision("new"))
    book.deliver([ann], ["pushed"], now - timedelta(days=1))
    assert ann.titles == ["new"]


def test_one_process_sends_at_a_time(tmp_path: Path) -> None:
    book, ann = Decisions(Store(tmp_path)), Friend("a" * 16)
    book.add(decision())
    (tmp_path / "scratch").mkdir(exist_ok=True)
    with FileLock(tmp_path / "scratch" / "decisions.lock"):
        assert book.deliver([ann], KINDS, EARLIER) == 0
    assert ann.titles == []


def test_one_host_sends_at_a_time(tmp_path: Path, bucket: str) -> None:
    here, there = (Decisions(Store(f"{bucket}/store", mirror=tmp_path / name)) for name in ("here", "there"))
    here.add(decision())
    bob = Friend("b" * 16)

    class Slow(Friend):
        def send(self, title: str, body: str) -> bool:
            assert there.deliver([bob], KINDS, EARLIER) == 0
            return super().send(title, body)

    ann = Slow("a" * 16)
    for _ in range(2):
        assert here.deliver([ann], KINDS, EARLIER) == 0
    assert (len(ann.titles), bob.titles) == (1, [])
    assert there.deliver([bob], KINDS, EARLIER) == 0
    assert len(bob.titles) == 1


def test_two_hosts_record_a_decision_once(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.key_lease.LOOK_SECONDS", 0.05)
    books = [Decisions(Store(f"{bucket}/store", mirror=tmp_path / name)) for name in ("here", "there")]
    both = threading.Barrier(2)
    holds = Decisions.holds

    def at_the_same_time(self: Decisions, wanted: Decision) -> bool:
        found = holds(self, wanted)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return found

    monkeypatch.setattr(Decisions, "holds", at_the_same_time)
    with ThreadPoolExecutor(2) as pool:
        added = list(pool.map(lambda book: book.add(decision()), books))
    assert sorted(added) == [False, True]
    assert len(list(books[0].all(EARLIER))) == 1


def test_a_damaged_decision_is_left_out(tmp_path: Path, caplog: Any) -> None:
    book = Decisions(Store(tmp_path))
    book.add(decision())
    book.add(decision("version 4"))
    damaged = min((tmp_path / "decisions").glob("*/*"))
    damaged.write_text(damaged.read_text().replace("version 3", "version 9"))
    assert [found.title for found in book.all()] == ["version 4"]
    assert f"Left out the decision {damaged.name}" in caplog.text


def test_the_body_of_a_message_has_reasons_figures_run_and_report() -> None:
    values: dict[str, Any] = {
        "reasons": ("one", "two"),
        "figures": {"accuracy": 0.91},
        "report": "http://host",
        "run_id": "run 1",
    }
    assert decision(**values, by="ann").body == (
        "one\ntwo\naccuracy 0.9100\nRun run 1, started by ann\nReport: http://host"
    )
