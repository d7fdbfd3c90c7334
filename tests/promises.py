"""Report on the fifteen promises of docs/reliability.md: a pytest plugin that conftest.py loads.

A test names the promise that it holds, and counts what it tried:

    @pytest.mark.promise(1)
    def test_a_killed_run_ends_like_one_that_is_not(figures):
        figures.count("kills survived", survived, tried)
        figures.worst("intervals lost", intervals)

If the slow tests run too (make test-reliability), the summary has one line for each promise.
"""

from __future__ import annotations

import pytest

PROMISES = {
    1: "kill -9 during a save",
    2: "damaged checkpoints",
    3: "exact resume",
    4: "each chunk once an epoch",
    5: "full disk",
    6: "NaN and infinity",
    7: "signals",
    8: "out of memory",
    9: "several processes",
    10: "same figures for any batch size",
    11: "hostile text",
    12: "cleaners in linear time",
    13: "malicious files",
    14: "injection into reports",
    15: "load and soak",
}


class Figures:
    """Collect the figures of one test for the summary."""

    def __init__(self, record_property):
        self._record = record_property

    def count(self, name: str, passed: int, tried: int) -> None:
        """Report that `passed` of `tried` passed; counts of one name are added up over the tests."""
        self._record("count", (name, passed, tried))

    def worst(self, name: str, value: float) -> None:
        """Report a measured value; the largest one of this name over the tests is shown."""
        self._record("worst", (name, value))


@pytest.fixture
def figures(record_property) -> Figures:
    """Return what counts the attempts of a test for the summary."""
    return Figures(record_property)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write the promise of a test into its report, which is all that the summary sees."""
    report = yield
    if marker := item.get_closest_marker("promise"):
        report.promise = marker.args[0]
    return report


def pytest_terminal_summary(terminalreporter, config):
    """Print one line for each promise, if the slow tests were asked for and any promise was tested."""
    if "not slow" in config.option.markexpr:
        return
    reports = {
        outcome: [r for r in terminalreporter.stats.get(outcome, ()) if hasattr(r, "promise")]
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if not any(reports.values()):
        return
    terminalreporter.section("promises (docs/reliability.md)")
    for number, name in PROMISES.items():
        of_promise = {
            outcome: [r for r in group if r.promise == number] for outcome, group in reports.items()
        }
        terminalreporter.write_line(promise_line(number, name, of_promise))


def promise_line(number: int, name: str, reports: dict[str, list]) -> str:
    """Return the line of a promise, from the reports of its tests by their outcome."""
    failed = len(reports["failed"]) + len(reports["error"])
    passed = len(reports["passed"])
    outcome = "FAILED" if failed else "passed" if passed else "not run"
    counts: dict[str, tuple[int, int]] = {}
    worst: dict[str, float] = {}
    for report in [*reports["passed"], *reports["failed"]]:
        for kind, (figure, *values) in report.user_properties:
            if kind == "count":
                so_far = counts.get(figure, (0, 0))
                counts[figure] = (so_far[0] + values[0], so_far[1] + values[1])
            elif kind == "worst":
                worst[figure] = max(values[0], worst.get(figure, values[0]))

    parts = []
    if passed or failed:
        parts.append(f"tests passed {passed} of {passed + failed}")
    parts += [f"{figure} {n} of {tried}" for figure, (n, tried) in counts.items()]
    parts += [f"{figure} {value:.3g}" for figure, value in worst.items()]
    if reports["skipped"]:
        parts.append(f"skipped {len(reports['skipped'])}")
    return f"{number:>2} {outcome:<7} {name}{': ' if parts else ''}{', '.join(parts)}"
