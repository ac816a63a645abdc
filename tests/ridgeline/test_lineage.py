import importlib

import pytest

from ridgeline.decisions import Decision, Decisions
from ridgeline.executor import execute
from ridgeline.journal import Journal
from ridgeline.lineage import lineage
from ridgeline.store import Store


def test_lineage_leads_back_to_the_first_step(store, runs):
    origin = lineage(store, runs[2][1])
    assert origin.execution.component == "double"
    assert origin.inputs["number"].ref == runs[2][0]
    assert origin.inputs["number"].execution.parts.params == {"value": 2, "fail": False}


def test_lineage_of_an_unrecorded_artifact_is_empty(store):
    assert lineage(store, f"Number/{'0' * 64}").execution is None


def test_no_look_up_lists_all_records(store, runs, monkeypatch):
    seed = importlib.import_module("toy_steps.seed").seed
    double = importlib.import_module("toy_steps.double").double
    Decisions(store).add(Decision(kind="refused", model="shoes", subject="0", title=""))  # makes the index
    monkeypatch.setattr(Journal, "_paths", lambda journal, folder: pytest.fail(f"listed all of {folder}"))
    again = Store(store.local)
    assert execute(again, seed, {}, seed.parse({"value": 1}), "run 4").state == "cached"
    assert execute(again, seed, {}, seed.parse({"value": 9}), "run 5").state == "complete"
    assert execute(again, double, {"number": runs[2][0]}, double.parse({}), "run 4").state == "cached"
    assert lineage(again, runs[1][1]).inputs["number"].execution.run_id == "run 1"
    assert [made.component for made in again.executions(run_id="run 4")] == ["double", "seed"]
    assert [made.run_id for made in again.executions("double", used=runs[3][0])] == ["run 3"]  # reused: not once more
    assert [made.run_id for made in again.executions(made=runs[2][1])] == ["run 2"]
    about = {"model": "shoes", "title": "", "model_digest": "a" * 64, "run_id": "run 4"}
    for kind, subject in (("pushed", "1"), ("refused", "2"), ("refused", "2")):
        Decisions(again).add(Decision(kind=kind, subject=subject, **about))
    decisions = Decisions(Store(store.local))
    assert [decision.subject for decision in decisions.newest(kinds=["refused"])] == ["2", "0"]
    assert {decision.subject for decision in decisions.of_run("run 4")} == {"1", "2"}
    assert len(list(decisions.about("a" * 64))) == 2
