"""The table: it names every part, and a failure prints the command that repeats it."""

import random

from torture.__main__ import PARTS, main, replay
from torture.report import Options, Row, run_cases


def options(tmp_path, **values):
    defaults = {"part": "kills", "seed": 7, "scale": 0.5, "case": None, "tests": (), "folder": tmp_path}
    return Options(**{**defaults, "deadline": float("inf")} | values)


def test_every_part_has_a_module_and_a_test(request):
    root = request.config.rootpath
    assert all((root / "torture" / f"{part}.py").exists() for part in PARTS)
    assert all((root / "tests" / "torture" / f"test_{part}.py").exists() for part in PARTS)


def test_a_failed_case_is_counted_and_can_be_repeated_alone(tmp_path):
    def run(case: int, rng: random.Random) -> list[str]:
        return [f"lost: {rng.random()}"] if case == 3 else []

    row = run_cases(options(tmp_path), "some test", 10, "0 lost", run)
    assert (row.cases, row.measured, row.ok, row.first_failed) == (5, "1 failed: 1 lost", False, 3)
    again = run_cases(options(tmp_path, scale=1.0, case=3), "some test", 10, "0 lost", run)
    assert again.failures == row.failures
    assert replay("kills", 7, 0.5, row) == "python -m torture kills --seed 7 --scale 0.5 --case 3 --test 'some test'"


def test_a_part_that_had_no_time_is_a_failure(tmp_path):
    row = run_cases(options(tmp_path, deadline=0.0), "some test", 10, "0 lost", lambda case, rng: [])
    assert (row.cases, row.ok) == (0, False)


def test_a_failure_is_printed_with_its_command_and_the_exit_status_says_so(capsys, monkeypatch):
    failed = Row("a test", 9, "1 failed: 1 lost", "0 lost", False, ("case 3: lost: it",), "", 3)
    monkeypatch.setattr("torture.__main__.in_a_process_of_its_own", lambda *_: iter([failed]))
    monkeypatch.setattr("sys.argv", ["torture", "clock", "--seed", "7"])
    assert main() == 1
    printed = capsys.readouterr().out
    assert "a test | 9 | 1 failed: 1 lost | 0 lost | FAILED | 7\n    case 3: lost: it\n" in printed
    assert "    replay: python -m torture clock --seed 7 --scale 1 --case 3 --test 'a test'\n" in printed
    monkeypatch.setattr("torture.__main__.in_a_process_of_its_own", lambda *_: iter([Row("a", 1, "", "", True)]))
    assert main() == 0
