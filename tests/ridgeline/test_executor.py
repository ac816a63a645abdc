import importlib
import signal
import subprocess
import sys
from collections import Counter

import pytest

from ridgeline import keys
from ridgeline.artifacts.base import ArtifactError
from ridgeline.executor import decide, execute
from ridgeline.step_cli import run_step


@pytest.fixture
def steps(toy_steps):
    return importlib.import_module("toy_steps.seed").seed, importlib.import_module("toy_steps.double").double


def run_both(store, steps, run_id="run", **values):
    seed, double = steps
    first = execute(store, seed, {}, seed.parse(values), run_id)
    second = execute(store, double, {"number": first.output or ""}, double.parse({}), run_id)
    return first, second


def test_second_run_reuses_and_says_why(store, steps):
    first = run_both(store, steps)
    second = run_both(store, steps)
    assert [(e.state, e.reason) for e in first] == [("complete", f"first run of {n}") for n in ("seed", "double")]
    assert [(e.state, e.reason) for e in second] == [("cached", "same inputs, parameters and code")] * 2
    assert [e.output for e in first] == [e.output for e in second]


def test_changed_parameter_runs_what_depends_on_it(store, steps):
    run_both(store, steps)
    seed, double = run_both(store, steps, value=22)
    assert (seed.state, seed.reason) == ("complete", "parameter seed.value 21 → 22")
    assert double.state == "complete"
    assert double.reason.startswith("input number changed (")


def test_early_cut_off(store, steps, toy_steps):
    run_both(store, steps)
    with (toy_steps / "seed.py").open("a") as file:
        file.write("# yields the same bytes\n")
    keys.forget_code()
    seed, double = run_both(store, steps)
    assert (seed.state, seed.reason) == ("complete", "code of toy_steps/seed.py changed")
    assert double.state == "cached"


def test_earlier_parameters_reuse_the_older_execution(store, steps):
    first = run_both(store, steps)
    run_both(store, steps, value=22)
    again = run_both(store, steps)
    assert [e.state for e in again] == ["cached", "cached"]
    assert [e.output for e in again] == [e.output for e in first]


def test_damaged_artifact_is_made_again(store, steps):
    first, _ = run_both(store, steps)
    path = store.path(first.output) / "number.txt"
    path.write_text("99")
    seed, double = run_both(store, steps)
    assert seed.state == "complete"
    assert seed.reason.startswith("artifact missing or damaged: ")
    assert double.state == "cached"
    assert path.read_text() == "21"


def test_missing_artifact_is_made_again(store, steps):
    first, _ = run_both(store, steps)
    store.delete(first.output)
    assert run_both(store, steps)[0].reason.startswith("artifact missing or damaged: ")


def test_damaged_input_is_refused(store, steps):
    first, _ = run_both(store, steps)
    (store.path(first.output) / "number.txt").unlink()
    with pytest.raises(ArtifactError, match="missing, changed or extra"):
        execute(store, steps[1], {"number": first.output or ""}, steps[1].parse({}), "run")


def test_wrong_inputs_are_refused(store, steps):
    with pytest.raises(ArtifactError, match=r"inputs \['number'\] for double; received \[\]"):
        execute(store, steps[1], {}, steps[1].parse({}), "run")


def test_a_failed_step_publishes_nothing_is_recorded_and_runs_again(store, steps):
    seed, _ = steps
    with pytest.raises(ArithmeticError):
        execute(store, seed, {}, seed.parse({"fail": True}), "run")
    assert store.refs() == []
    record = next(store.executions("seed"))
    assert (record.state, record.reason, record.output) == ("failed", "ArithmeticError: asked to fail", None)
    assert decide(store, seed, {}, seed.parse({"fail": True})).reason == "last attempt failed"


def test_skipped_step_yields_nothing_and_is_recorded(store, steps):
    first, second = run_both(store, steps, value=13)
    assert (second.state, second.reason, second.output) == ("skipped", "13 is not doubled", None)
    assert store.refs() == [first.output]


def test_the_first_attempt_after_a_skipped_one_names_the_change(store, steps):
    first, _ = run_both(store, steps, value=13)
    double = steps[1]
    inputs = {"number": store.open(first.output, double.inputs["number"])}
    assert decide(store, double, inputs, double.parse({})).reason == "last attempt skipped"
    changed = decide(store, double, inputs, double.parse({"factor": 3}))
    assert changed.reason == "last attempt skipped; parameter double.factor 2 → 3"


def test_record_holds_the_run_and_the_parts(store, steps):
    first, second = run_both(store, steps, run_id="manual__1")
    assert second.run_id == "manual__1"
    assert second.inputs == {"number": first.output or ""}
    assert second.parts.params == {"factor": 2}
    assert second.key == second.parts.key()
    assert next(store.executions("double")) == second


def test_code_is_what_was_imported_not_what_was_edited_since(store, steps, toy_steps):
    first = run_both(store, steps)
    with (toy_steps / "seed.py").open("a") as file:
        file.write("# edited while the process runs the old code\n")
    assert [e.key for e in run_both(store, steps)] == [e.key for e in first]


def test_reason_is_the_difference_from_the_nearest_execution(store, steps):
    run_both(store, steps, value=21)
    run_both(store, steps, value=13, fail=False)
    seed = steps[0]
    assert decide(store, seed, {}, seed.parse({"value": 21, "fail": True})).reason == "parameter seed.fail False → True"


RESUMES = """
from pathlib import Path
from ridgeline.component import Params, component
from toy_steps.number import Number, NumberFacts

class CountParams(Params):
    to: int = 3

@component(output=Number)
def count(params: CountParams, output: Path, scratch: Path | None) -> NumberFacts:
    state = scratch / "count.txt" if scratch else output / "number.txt"
    done = int(state.read_text()) if state.exists() else 0
    state.write_text(str(done + 1))
    if scratch and done + 1 < params.to:
        raise ArithmeticError(f"stopped after {done + 1}")
    (output / "number.txt").write_text(str(params.to))
    return NumberFacts(digits=1)
"""


@pytest.fixture
def count(toy_steps):
    (toy_steps / "count.py").write_text(RESUMES)
    keys.forget_code()
    return importlib.import_module("toy_steps.count").count


def test_step_that_resumes_finds_what_its_failed_attempt_left(store, count):
    assert count.resumes
    for done in (1, 2):
        with pytest.raises(ArithmeticError, match=f"stopped after {done}"):
            execute(store, count, {}, count.parse({}), "run")
    with pytest.raises(ArithmeticError, match="stopped after 1"):
        execute(store, count, {}, count.parse({"to": 2}), "run")  # another key has a folder of its own
    assert len(list((store.local / "scratch").glob("*/count.txt"))) == 2
    assert execute(store, count, {}, count.parse({}), "run").state == "complete"
    assert execute(store, count, {}, count.parse({}), "run").state == "cached"
    assert len(list((store.local / "scratch").glob("*/count.txt"))) == 1


def test_a_resuming_step_run_by_itself_keeps_its_scratch_beside_the_output(tmp_path, count, monkeypatch):
    for done in (1, 2):
        with pytest.raises(SystemExit, match=f"error: stopped after {done}"):
            run_step(count, ["--output", str(tmp_path / "out" / "three")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".three-scratch"]
    run_step(count, ["--output", str(tmp_path / "out" / "three")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["three"]


# --- an input that takes any number of artifacts

TOTAL = """
from pathlib import Path
from ridgeline.component import Params, component
from toy_steps.number import Doubled, Number, NumberFacts

class Total(Doubled):
    pass

@component(output=Total)
def total(numbers: tuple[Number, ...], params: Params, output: Path) -> NumberFacts:
    values = [int((number.path / "number.txt").read_text()) for number in numbers]
    (output / "numbers.txt").write_text(repr(values))
    return Total.facts_type(digits=sum(values))
"""


@pytest.fixture
def total(toy_steps):
    (toy_steps / "total.py").write_text(TOTAL)
    return importlib.import_module("toy_steps.total").total


def numbers(store, steps, *values):
    return [execute(store, steps[0], {}, steps[0].parse({"value": value}), "run").output for value in values]


def test_a_group_takes_any_number_of_artifacts_in_their_order(store, steps, total):
    refs = numbers(store, steps, *range(11))
    execution = execute(
        store, total, {f"numbers.{i}": ref for i, ref in reversed(list(enumerate(refs)))}, total.parse({}), "run"
    )
    assert (store.path(execution.output) / "numbers.txt").read_text() == repr(list(range(11)))
    assert execution.inputs["numbers.10"] == refs[10]
    assert (store.path(execute(store, total, {}, total.parse({}), "run").output) / "numbers.txt").read_text() == "[]"


def test_a_group_is_part_of_the_key(store, steps, total):
    one, two = numbers(store, steps, 1, 2)
    execute(store, total, {"numbers.0": one}, total.parse({}), "run")
    again = execute(store, total, {"numbers.0": one, "numbers.1": two}, total.parse({}), "run")
    assert again.reason == f"input numbers 2 added ({two.partition('/')[2][:12]})"
    assert execute(store, total, {"numbers.0": one}, total.parse({}), "run").state == "cached"


def test_an_input_of_no_group_is_refused(store, steps, total):
    (one,) = numbers(store, steps, 1)
    with pytest.raises(ArtifactError, match="Expected the inputs"):
        execute(store, total, {"letters.0": one}, total.parse({}), "run")


# --- several executions of one key at a time

PATIENT = """
import time
from pathlib import Path
from ridgeline.component import Params, component
from toy_steps.number import Number, NumberFacts

class PatientParams(Params):
    go: str
    value: int = 1

@component(output=Number)
def patient(params: PatientParams, output: Path) -> NumberFacts:
    print("works", flush=True)
    while not Path(params.go).exists():
        time.sleep(0.01)
    (output / "number.txt").write_text(str(params.value))
    return NumberFacts(digits=1)
"""
EXECUTE = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
sys.path.insert(0, sys.argv[2])
from toy_steps.patient import patient
from ridgeline.executor import execute
from ridgeline.store import Store
params = patient.parse({"go": sys.argv[3], "value": int(sys.argv[4])})
print(execute(Store(sys.argv[1]), patient, {}, params, sys.argv[5]).state)
"""


@pytest.fixture
def start(store, toy_steps, tmp_path):
    """A function that starts an execution in a process of its own; it works until the file ``go`` is there."""
    (toy_steps / "patient.py").write_text(PATIENT)
    started = []

    def start(value=1, run_id="run"):
        arguments = [str(a) for a in (store.root, toy_steps.parent, tmp_path / "go", value, run_id)]
        command = [sys.executable, "-c", EXECUTE, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_line(process, *words):
    for line in process.stdout:
        if word := next((word for word in words if line.startswith(word)), None):
            return word
    raise AssertionError(f"ended without {words}")


def test_one_execution_of_a_key_works_and_the_others_wait_and_reuse(store, start, tmp_path):
    processes = [start() for _ in range(4)]
    assert Counter(wait_for_line(process, "works", "waits") for process in processes) == {"works": 1, "waits": 3}
    other = start(value=2)
    assert wait_for_line(other, "works", "waits") == "works", "another key waits for nothing"
    (tmp_path / "go").touch()
    states = [process.communicate()[0].splitlines()[-1] for process in [*processes, other]]
    assert Counter(states) == {"complete": 2, "cached": 3}
    assert list(store.local.glob("scratch/*")) == []


def test_a_killed_execution_makes_room_for_one_that_waits(store, start, tmp_path):
    processes = {start() for _ in range(3)}
    worker = next(process for process in processes if wait_for_line(process, "works", "waits") == "works")
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    (tmp_path / "go").touch()
    states = [process.communicate()[0].splitlines()[-1] for process in processes - {worker}]
    assert sorted(states) == ["cached", "complete"]
