"""Compare the finished runs of a sweep: the best one, or mean and deviation over the seeds.

A row is a dictionary with the `name` of a run, its `values` by key, and its results or `error`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from babyllama.files import describe_environment, read_json, write_json, write_text
from babyllama.runs.run_dir import BENCHMARK_PREFIX, METRICS_FILE

COLUMNS = {  # key in training_metrics.json -> (heading of the table, format)
    "eval_loss": ("held-out loss", ".4f"),
    "eval_bits_per_byte": ("bits per byte", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
RESULTS = "sweep.json"
TABLE = "sweep.txt"
PLOT = "sweep.png"
SEED = "training.seed"


def format_value(value: Any) -> str:
    """Format a value as people write it in YAML: 0.0003, true, null, and text unchanged."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def read_results(run_dir: Path) -> dict[str, float]:
    """Return the results of a finished run that the table shows, and those of its benchmark."""
    metrics = read_json(run_dir / METRICS_FILE)
    results = metrics["results"]
    benchmark = {key: results[key] for key in results if key.startswith(BENCHMARK_PREFIX)}
    return {key: results[key] for key in COLUMNS} | benchmark


def best_run(rows: list[dict]) -> str | None:
    """Return the name of the run with the lowest bits per byte, or None if no run has finished.

    Bits per byte can be compared even if the runs have different tokenizers. Runs that differ only
    in the seed have no best one, because its advantage is luck.
    """
    finished = [row for row in rows if "error" not in row]
    if not finished or list(rows[0]["values"]) == [SEED]:
        return None
    return min(finished, key=lambda row: row["eval_bits_per_byte"])["name"]


def seed_summary(rows: list[dict]) -> dict[str, dict[str, float]] | None:
    """Return `mean` and `standard_deviation` of each result over the seeds, and `n`, their number.

    The standard deviation is that of a sample, with n - 1 in its denominator. Return None if the
    runs differ in more than the seed, or if fewer than two have finished.
    """
    finished = [row for row in rows if "error" not in row]
    if len(finished) < 2 or list(rows[0]["values"]) != [SEED]:
        return None
    summary = {}
    for key in finished[0].keys() - {"name", "values"}:
        values = [row[key] for row in finished]
        summary[key] = {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values),
            "n": len(values),
        }
    return summary


def edge_notes(grid: dict[str, list], rows: list[dict]) -> list[str]:
    """Warn about each key whose best value is the smallest or the largest one that was tried.

    Return one line for each such key. Two values always have the best one at an edge, so only keys
    with three or more numbers count.
    """
    name = best_run(rows)
    if name is None:
        return []
    best_values = next(row["values"] for row in rows if row["name"] == name)
    lines = []
    for key, values in grid.items():
        is_numeric = all(type(value) in (int, float) for value in values)
        if not is_numeric or len(values) < 3 or key == SEED:
            continue
        best = best_values[key]
        for side, edge in (("smallest", min(values)), ("largest", max(values))):
            if best == edge:
                lines.append(
                    f"{key}: the {side} value, {format_value(best)}, is the best; "
                    "a value beyond it may be better"
                )
    return lines


def format_table(grid: dict[str, list], rows: list[dict]) -> str:
    """Format one line for each run: its values and its results or error; the best one is marked.

    Runs that differ only in the seed get two more lines: their mean and standard deviation.
    """
    best = best_run(rows)
    keys = [key.split(".")[1] for key in grid]
    columns = dict(COLUMNS)
    for key in dict.fromkeys(key for row in rows for key in row):
        if key.startswith(BENCHMARK_PREFIX):
            columns[key] = (key.removeprefix(BENCHMARK_PREFIX), ".4f")

    # a line for each run
    headings = [heading for heading, _ in columns.values()]
    lines = [[*keys, *headings, ""]]
    for row in rows:
        values = [format_value(row["values"][key]) for key in grid]
        if "error" in row:
            results = ["-"] * len(columns)
            note = f"failed: {row['error'].splitlines()[0]}"
        else:
            results = [format(row[key], form) for key, (_, form) in columns.items()]
            note = "best" if row["name"] == best else ""
        lines.append([*values, *results, note])

    # mean and standard deviation over the seeds
    summary = seed_summary(rows)
    for figure in ("mean", "standard_deviation") if summary else ():
        cells = [format(summary[key][figure], form) for key, (_, form) in columns.items()]
        lines.append([figure.replace("_", " "), *cells, ""])

    # align the columns
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0  # the note at the end of a line needs no padding
    padded = []
    for cells in lines:
        padded.append("  ".join(map(str.rjust, cells, widths)).rstrip())
    return "\n".join(padded)


def write_sweep(folder: Path, grid: dict[str, list], rows: list[dict]) -> None:
    """Write sweep.json, sweep.txt and sweep.png about the runs that have ended so far."""
    best = best_run(rows)
    document = {
        "grid": grid,
        "best": best,
        "over_seeds": seed_summary(rows),
        "runs": rows,
        "environment": describe_environment(),
    }
    write_json(folder / RESULTS, document)
    write_text(folder / TABLE, format_table(grid, rows) + "\n")
    if best:
        from babyllama.plots import plot_sweep  # here, because matplotlib takes long to import

        plot_sweep(list(grid), rows, best, folder / PLOT)
