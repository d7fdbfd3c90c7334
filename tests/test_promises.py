"""Read the lines that the summary of the promises prints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from promises import promise_line


@pytest.mark.parametrize(
    ("outcomes", "deselected", "line"),
    [
        ("passed passed", 0, " 7 passed  signals: tests passed 2 of 2, kills 6 of 8, lost 3"),
        ("passed failed", 0, " 7 FAILED  signals: tests passed 1 of 2, kills 6 of 8, lost 3"),
        ("passed error", 0, " 7 FAILED  signals: tests passed 1 of 2, kills 3 of 4, lost 3"),
        ("passed", 2, " 7 partly  signals: tests passed 1 of 3, deselected 2, kills 3 of 4, lost 3"),
        ("passed skipped", 0, " 7 partly  signals: tests passed 1 of 2, skipped 1, kills 3 of 4, lost 3"),
        ("skipped", 0, " 7 not run signals: tests passed 0 of 1, skipped 1"),
    ],
)  # fmt: skip
def test_a_promise_passes_only_if_all_of_its_tests_do(outcomes, deselected, line):
    figures = [("count", ("kills", 3, 4)), ("worst", ("lost", 3.0))]
    report = SimpleNamespace(user_properties=figures)
    reports = {
        outcome: [report] * outcomes.split().count(outcome)
        for outcome in ("passed", "failed", "error", "skipped")
    }
    assert promise_line(7, "signals", reports, deselected) == line
