"""A sweep: one training after the other for every combination of some values, then one table and one plot.

    # sweep.yaml
    training.lr: [3e-4, 1e-3]
    model.n_layer: [4, 8]

`python train.py --config C --sweep sweep.yaml` calls run_sweep. Each combination is a run of its own in
<output_dir>/<model.name>-sweep/, named by its values; called again, finished runs are shown, interrupted ones go on.
How a configuration is read and a run is made comes from train.py, as functions.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babyllama.config import ConfigError, read_yaml_file
from babyllama.files import describe_environment, write_json, write_text
from babyllama.training import distributed
from babyllama.training.run_dir import METRICS_FILE, checkpoint_error, checkpoints, milestones

COLUMNS = {  # in training_metrics.json -> (heading of the table, format)
    "eval_loss": ("held-out loss", ".4f"),
    "eval_bits_per_byte": ("bits per byte", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
RESULTS, TABLE, PLOT = "sweep.json", "sweep.txt", "sweep.png"


# ---- the grid -----------------------------------------------------------------------------------


def read_grid(path: str) -> dict[str, list]:
    """{section.key: values} of a sweep file; ConfigError lists what is wrong with its form.

    Whether a key exists and takes its values is found out when the configurations are checked.
    """
    raw = read_yaml_file(path)
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(["not a sweep; it holds lines such as training.lr: [3e-4, 1e-3]"], path)
    problems = []
    for key, values in raw.items():
        if not isinstance(values, list) or not values:
            problems.append(f"{key}: {values!r} is not a list of values, such as [3e-4, 1e-3]")
        elif len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            problems.append(f"{key}: a value stands twice in {values}")
        elif key in ("model.name", "logging.output_dir"):
            problems.append(f"{key}: cannot be swept over: the sweep names its runs itself")
        elif not re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", key):
            problems.append(f"{key}: is not of the form section.key, such as training.lr")
    if problems:
        raise ConfigError(problems, path)
    return raw


def points_of(grid: dict[str, list]) -> list[dict[str, Any]]:
    """Every combination of the values: the last key changes fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def text_of(value: Any) -> str:
    """A value as people write it: 0.0003, true, null, and texts as they are."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def name_of(base: str, point: dict[str, Any]) -> str:
    """The name of a run: that of the model, then key and value, as in llama-10M-lr0.001-n_layer4."""
    parts = [f"{key.split('.')[1]}{text_of(value)}" for key, value in point.items()]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([base, *parts])).rstrip("-")


def point_text(point: dict[str, Any]) -> str:
    return ", ".join(f"{key}={text_of(value)}" for key, value in point.items())


# ---- the runs -----------------------------------------------------------------------------------


def variant(
    args: argparse.Namespace, point: dict[str, Any], name: str, folder: Path
) -> argparse.Namespace:
    """The command line of one run of the sweep."""
    values = {**point, "model.name": name, "logging.output_dir": str(folder)}
    assignments = [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
    ]
    return argparse.Namespace(
        **{**vars(args), "set": [*(args.set or ()), *assignments], "sweep": None}
    )


def continued(args: argparse.Namespace, run_dir: Path) -> argparse.Namespace:
    """The same command line for a run that may have been begun before: from its checkpoint, or anew without one."""
    found = checkpoints(run_dir)
    if args.overwrite or (run_dir / METRICS_FILE).is_file() or not (found or milestones(run_dir)):
        return args
    whole = any(not checkpoint_error(folder) for folder in found)
    how = {"resume_from_checkpoint": "latest"} if whole else {"overwrite": True}
    return argparse.Namespace(**{**vars(args), **how})


def quietly(load: Callable, args: argparse.Namespace) -> dict:
    """load(args) without its warnings, which each run will say for itself."""
    logging.disable(logging.WARNING)
    try:
        return load(args)
    finally:
        logging.disable(logging.NOTSET)


def check_all(
    path: str, variants: list[argparse.Namespace], points: list[dict], load: Callable
) -> None:
    """Read every configuration; one error with all problems of all, those that not all have with their values."""
    found: dict[str, list[str]] = {}
    for args, point in zip(variants, points, strict=True):
        try:
            quietly(load, args)
        except (ValueError, OSError) as error:
            for problem in getattr(error, "problems", [str(error)]):
                found.setdefault(problem, []).append(point_text(point))
    if found:
        lines = [
            f"{'' if len(where) == len(points) else where[0] + ': '}{line}"
            for line, where in found.items()
        ]
        raise ConfigError(lines, path)


def free_memory() -> None:
    """Give back what the last run held: models in cycles of references, compiled code, cached GPU memory, its wandb run
    (else the next one would log into it)."""
    import torch

    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_sweep(args: argparse.Namespace, load: Callable, attempt: Callable) -> int:
    """Train every combination of the values in args.sweep; the exit code, 2 if a run failed, 130 if interrupted.

    `load(args)` returns a checked configuration or raises; `attempt(args)` trains: (exit code, error or None).
    """
    if distributed.world_size() > 1:
        raise ValueError(f"--sweep: runs in one process, not in {distributed.world_size()}")
    grid = read_grid(args.sweep)
    if args.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint: a sweep goes on by itself: leave it out")
    base = quietly(load, args)
    folder = Path(base["logging"]["output_dir"]) / f"{base['model']['name']}-sweep"
    points = points_of(grid)
    names = [name_of(base["model"]["name"], point) for point in points]
    if same := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            [f"several runs would be named {name}" for name in sorted(same)], args.sweep
        )
    variants = [
        variant(args, point, name, folder) for point, name in zip(points, names, strict=True)
    ]
    check_all(args.sweep, variants, points, load)
    print(f"sweep       {len(points)} runs in {folder}/")
    if args.dry_run:
        print(
            "\n".join(
                f"  {name}: {point_text(point)}" for name, point in zip(names, points, strict=True)
            )
        )
        return 0
    rows, seconds = [], []
    for number, (one, point, name) in enumerate(zip(variants, points, names, strict=True), 1):
        print(
            f"\nrun {number} of {len(points)}{time_left(seconds, len(points) - number + 1)}: {point_text(point)}"
        )
        started, fresh = time.perf_counter(), not (folder / name / METRICS_FILE).is_file()
        code, error = attempt(continued(one, folder / name))
        if error:
            distributed.print_error(error)
        free_memory()
        if code == 130:
            print(
                f"{args.sweep}: interrupted in run {number} of {len(points)}; the same command goes on"
            )
            return code
        if not code and fresh:
            seconds.append(time.perf_counter() - started)
        rows.append(
            {
                "name": name,
                "values": point,
                **(measured(folder / name) if not code else {"error": str(error)}),
            }
        )
        write(folder, grid, rows)
    print("\n".join(["", table(grid, rows), *edges(grid, rows)]))
    print(f"table, figures and plot: {folder}/ ({TABLE}, {RESULTS}, {PLOT})")
    return 2 if any("error" in row for row in rows) else 0


def time_left(seconds: list[float], left: int) -> str:
    """', about 12 min left' from the mean of the runs that were trained so far; nothing before the first."""
    from babyllama.training.plan import duration

    return f", about {duration(left * sum(seconds) / len(seconds))} left" if seconds else ""


# ---- what came of it ----------------------------------------------------------------------------


def measured(run_dir: Path) -> dict[str, float]:
    """The figures of a finished run that the table shows."""
    results = json.loads((run_dir / METRICS_FILE).read_text(encoding="utf-8"))["results"]
    return {key: results[key] for key in COLUMNS}


def best_of(rows: list[dict]) -> str | None:
    """The name of the run with the fewest bits per byte, which compare between tokenizers too."""
    done = [row for row in rows if "error" not in row]
    return min(done, key=lambda row: row["eval_bits_per_byte"])["name"] if done else None


def edges(grid: dict[str, list], rows: list[dict]) -> list[str]:
    """A line for each key of which the best value is the smallest or the largest of three or more numbers."""
    name, lines = best_of(rows), []
    for key, values in grid.items() if name else ():
        best = next(row["values"][key] for row in rows if row["name"] == name)
        numbers = all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        )
        if (
            numbers
            and len(values) > 2
            and best in (min(values), max(values))
            and key != "training.seed"
        ):
            side = "smallest" if best == min(values) else "largest"
            lines.append(
                f"{key}: the {side} value, {text_of(best)}, came out best: beyond it may lie a better one"
            )
    return lines


def table(grid: dict[str, list], rows: list[dict]) -> str:
    """A line for each run: its values, its figures or its error, and a mark on the best."""
    lines = [
        [*(key.split(".")[1] for key in grid), *(heading for heading, _ in COLUMNS.values()), ""]
    ]
    for row in rows:
        values = [text_of(row["values"][key]) for key in grid]
        if "error" in row:
            lines.append(
                [*values, *["-"] * len(COLUMNS), f"failed: {row['error'].splitlines()[0]}"]
            )
        else:
            figures = [format(row[key], form) for key, (_, form) in COLUMNS.items()]
            lines.append([*values, *figures, "best" if row["name"] == best_of(rows) else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [*(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]]
        ).rstrip()
        for line in lines
    )


def write(folder: Path, grid: dict[str, list], rows: list[dict]) -> None:
    """sweep.json, sweep.txt and sweep.png of the runs so far."""
    from babyllama.plots import plot_sweep

    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "grid": grid,
        "best": best_of(rows),
        "runs": rows,
        "environment": describe_environment(),
    }
    write_json(folder / RESULTS, document)
    write_text(folder / TABLE, table(grid, rows) + "\n")
    if best_of(rows):
        plot_sweep(list(grid), rows, best_of(rows), folder / PLOT)
