"""Several processes on one store and one registry: what they do at the same time comes out as if done in turn."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ridgeline.artifacts.base import ArtifactError
from ridgeline.gc import collect_garbage
from ridgeline.keys import KeyParts
from ridgeline.registry import Registry
from ridgeline.store import Execution, Store
from tests.processes import release

NAME = "shoes"
# Pushes the named models; the process of "bob" also rolls back after each push. The check takes a moment, in which
# the other process would get its turn.
PUSHES = """
import sys, time
from pathlib import Path
import ridgeline.registry
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.store import Store

store, root, who, *refs = Store(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
ridgeline.registry.check = lambda *_: time.sleep(0.03)
registry = ridgeline.registry.Registry(root, 99)
print("ready", flush=True)
sys.stdin.readline()
for number, ref in enumerate(refs):
    pushed = registry.push(store.open(ref, PushedModel), f"{who} {number}", who)
    assert pushed.new, pushed.reason
    print("push", pushed.version)
    if who == "bob":
        entry = registry.rollback(store, "shoes", None, reason="worse", by=who, run_id=f"back {number}")
        print("rollback", entry.version)
"""


@pytest.fixture
def publish_forced(store, publish_servable):
    """The function that publishes a model which a person forces: it is pushed whatever the champion is."""
    return lambda number: publish_servable(store, number, accuracy=number / 100, forced=f"reason {number}")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    return Registry(tmp_path / "serving", 99)


def test_pushes_and_rollbacks_of_two_processes_happen_one_after_another(store, registry, publish_forced):
    assert registry.push(publish_forced(1), "push 1").new
    refs = {"ann": [publish_forced(n).ref for n in (2, 3, 4, 5)], "bob": [publish_forced(n).ref for n in (6, 7, 8, 9)]}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUSHES, str(store.root), str(registry.root), who, *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for who, names in refs.items()
    ]  # fmt: skip
    release(*processes)
    done = []
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        done += [(action, int(version)) for action, version in map(str.split, output.splitlines())]
    history = registry.history(NAME)
    assert sorted((e.action, e.version) for e in history) == sorted([("push", 1), *done])
    assert [e.version for e in history if e.action == "push"] == list(range(1, 10))
    assert len([e for e in history if e.action == "rollback"]) == 4
    assert registry.versions(NAME) == list(range(1, 10))
    for version in registry.versions(NAME):
        assert registry.verify(store, NAME, version).version == version
    champion = history[-1].version
    assert json.loads((registry.root / NAME / "champion.json").read_text()) == {"version": champion}
    assert re.findall(r"versions: (\d+)", (registry.root / "models.config").read_text()) == [str(champion)]


class PublishingStore(Store):
    """A store in which another process finishes a step after gc has read the records and before it lists artifacts."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.publishers: list[threading.Thread] = []
        self.published: list[str] = []

    def refs(self) -> list[str]:
        self.publishers.append(threading.Thread(target=self.publish_and_record, args=[len(self.publishers)]))
        self.publishers[-1].start()
        self.publishers[-1].join(0.5)  # with gc's lock in its way, it waits until gc has ended
        return super().refs()

    def publish_and_record(self, value: int) -> None:
        number, store = importlib.import_module("toy_steps.number"), Store(self.root.path)
        parts = KeyParts(component="seed", inputs={}, params={"value": value}, code={}, libraries={})
        with store.stage() as folder:
            (folder / "number.txt").write_text(f"made meanwhile {value}")
            artifact = number.Number.seal(folder, number.NumberFacts(digits=1))
            with store.lock():
                ref = store.publish(artifact)
                store.record(
                    Execution(
                        component="seed", run_id="run 4", state="complete", reason="first run", key=parts.key(),
                        parts=parts, inputs={}, output=ref, started_at=datetime.now(UTC), seconds=0.1,
                    )
                )  # fmt: skip
        self.published.append(ref)


def test_gc_deletes_nothing_that_is_published_while_it_decides(store, runs, tmp_path):
    publishing = PublishingStore(store.local)
    collect_garbage(publishing, Registry(tmp_path / "serving"), 1, False)
    for publisher in publishing.publishers:
        publisher.join(30)
    assert publishing.published
    assert len(publishing.published) == len(publishing.publishers)
    assert set(publishing.published) <= set(store.refs())


def test_gc_keeps_the_artifact_of_every_version_that_is_there(store, runs, registry, publish_forced):
    models = [publish_forced(number) for number in (1, 2, 3)]
    assert all(registry.push(model, f"push {model.facts.forced}").new for model in models)
    refs = [model.ref for model in models]
    collect_garbage(store, registry, keep_runs=1, dry_run=False)
    assert set(refs) <= set(store.refs())
    for version in (1, 2):  # each can still be rolled back to
        registry.rollback(store, NAME, version, reason="worse", by="ann", run_id=f"back {version}")
    collect_garbage(store, registry, keep_runs=1, dry_run=False)
    assert set(refs) <= set(store.refs())


def test_an_artifact_is_moved_into_place_whole_and_never_copied(store, runs):
    number = importlib.import_module("toy_steps.number")
    with store.stage() as folder:
        for name in ("a/number.txt", "b/number.txt"):
            (folder / name).parent.mkdir()
            (folder / name).write_text(name)
        artifact = number.Number.seal(folder, number.NumberFacts(digits=1))
        before = {path.relative_to(folder): path.stat().st_ino for path in (folder, *folder.rglob("*"))}
        ref = store.publish(artifact)
        assert not folder.exists()
    place = store.path(ref)
    assert {path.relative_to(place): path.stat().st_ino for path in (place, *place.rglob("*"))} == before


DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "name",
    [
        f"Number/{DIGEST}0", f"Number/{DIGEST}/", f"Number/{DIGEST}/../../../etc", f"Number/{DIGEST}\n",
        f" Number/{DIGEST}", f"../Number/{DIGEST}", f"Number//{DIGEST}", f"Number/{DIGEST[:-1]}g", f"Number/{DIGEST}\0",
    ],
)  # fmt: skip
def test_a_name_with_anything_before_or_after_an_artifact_s_name_is_refused(store, runs, name):
    number = importlib.import_module("toy_steps.number")
    assert store.path(f"Number/{DIGEST}") == Path(store.local) / "artifacts" / "Number" / DIGEST
    for use in (store.path, lambda ref: store.open(ref, number.Number)):
        with pytest.raises(ArtifactError, match="Expected an artifact's name"):
            use(name)
