"""Runs parts of `make torture` at a small scale, each in a process of its own, as `make torture` does."""

import pytest

from torture.__main__ import in_a_process_of_its_own


@pytest.fixture
def torture():
    """A function that runs some rows of a part and fails the test with the first failures of each row."""

    def run(part, *tests, scale, seed=1):
        rows = [
            row for row in in_a_process_of_its_own(part, seed, scale, None, tests) if row.skipped != "not asked for"
        ]
        if rows and all(row.skipped for row in rows):
            pytest.skip(rows[0].skipped)
        failures = [f"{row.test}: {row.measured}\n  " + "\n  ".join(row.failures[:5]) for row in rows if not row.ok]
        assert not failures, "\n".join(failures)
        assert sum(row.cases for row in rows) > 0
        return rows

    return run
