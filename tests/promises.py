"""Report on the fifteen promises of docs/reliability.md: a pytest plugin that conftest.py loads.

A test names the promise that it checks, and counts what it tried:

    @pytest.mark.promise(1)
    def test_a_killed_run_ends_like_one_that_is_not(figures):
        figures.count("kills survived", survived, tried)
        figures.worst("intervals lost", intervals)

If the slow tests run too (make test-reliability), the summary has one line for each promise. It
says "passed" only if all tests of the promise ran and passed.
"""

from __future__ import annotations

from collections import Counter

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


# how many tests of a promise the command line left out; with pytest-xdist each worker has its own
DESELECTED = pytest.StashKey[Counter]()


def promise_of(item) -> int | None:
    """Return the number of the promise that a test checks, if it checks one."""
    marker = item.get_closest_marker("promise")
    return marker.args[0] if marker else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write the promise of a test into its report, which is all that the summary sees."""
    report = yield
    report.promise = promise_of(item)
    return report


def pytest_deselected(items):
    """Count the tests of each promise that were left out."""
    for item in items:
        item.config.stash.setdefault(DESELECTED, Counter())[promise_of(item)] += 1


def pytest_sessionfinish(session):
    """Send what a worker of pytest-xdist left out to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = dict(session.config.stash.get(DESELECTED, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Receive what a worker left out; all workers collect the same tests."""
    node.config.stash[DESELECTED] = Counter(getattr(node, "workeroutput", {}).get("deselected"))


def pytest_terminal_summary(terminalreporter, config):
    """Print one line for each promise, if the slow tests were asked for and any promise was tested."""
    if "not slow" in config.option.markexpr:
        return
    reports = {
        outcome: [r for r in terminalreporter.stats.get(outcome, ()) if getattr(r, "promise", None)]
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if not any(reports.values()):
        return
    terminalreporter.section("promises (docs/reliability.md)")
    deselected = config.stash.get(DESELECTED, Counter())
    for number, name in PROMISES.items():
        of_promise = {
            outcome: [r for r in group if r.promise == number] for outcome, group in reports.items()
        }
        terminalreporter.write_line(promise_line(number, name, of_promise, deselected[number]))


def promise_line(number: int, name: str, reports: dict[str, list], deselected: int) -> str:
    """Return the line of a promise, from the reports of its tests by their outcome."""
    failed = len(reports["failed"]) + len(reports["error"])
    passed = len(reports["passed"])
    skipped = len(reports["skipped"])
    if failed:
        outcome = "FAILED"
    elif not passed:
        outcome = "not run"
    elif skipped or deselected:
        outcome = "partly"
    else:
        outcome = "passed"

    counts: dict[str, tuple[int, int]] = {}
    worst: dict[str, float] = {}
    for report in [*reports["passed"], *reports["failed"]]:
        for kind, (figure, *values) in report.user_properties:
            if kind == "count":
                so_far = counts.get(figure, (0, 0))
                counts[figure] = (so_far[0] + values[0], so_far[1] + values[1])
            elif kind == "worst":
                worst[figure] = max(values[0], worst.get(figure, values[0]))

    parts = [f"tests passed {passed} of {passed + failed + skipped + deselected}"]
    parts += [f"skipped {skipped}"] if skipped else []
    parts += [f"deselected {deselected}"] if deselected else []
    parts += [f"{figure} {n} of {tried}" for figure, (n, tried) in counts.items()]
    parts += [f"{figure} {value:.3g}" for figure, value in worst.items()]
    return f"{number:>2} {outcome:<7} {name}: {', '.join(parts)}"
