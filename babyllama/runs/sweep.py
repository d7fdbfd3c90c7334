"""Run a sweep: train every combination of some values.

    # sweep.yaml
    training.lr: [3e-4, 1e-3]
    model.n_layer: [4, 8]

`python train.py --config C --sweep sweep.yaml` starts train.py once for each combination, one after
the other. The runs are in <output_dir>/<model.name>-sweep/ and are named after their values. If the
sweep is interrupted, the same command continues it: finished runs are only shown again, and the
interrupted run is resumed.

`--seeds 1 2 3` is a sweep over training.seed in <output_dir>/<model.name>-seeds/. The runs are
compared in sweep_results.py.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama import distributed
from babyllama.cli import ERROR_FILE, EXIT_BAD_INPUT, EXIT_INTERRUPTED, time_left
from babyllama.config import read_yaml_file
from babyllama.files import ROOT
from babyllama.problems import ConfigError, seen_from
from babyllama.runs import ending
from babyllama.runs.run_dir import METRICS_FILE
from babyllama.runs.sweep_results import (
    PLOT,
    RESULTS,
    SEED,
    TABLE,
    edge_notes,
    format_table,
    format_value,
    read_results,
    write_sweep,
)

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


# ---- the grid -----------------------------------------------------------------------------------


@dataclass
class Point:
    """One combination of values and the run that trains it."""

    values: dict[str, Any]
    run_dir: Path

    def __str__(self) -> str:
        return ", ".join(f"{key}={format_value(value)}" for key, value in self.values.items())

    def assignments(self) -> list[str]:
        """Return the assignments that --set needs for this run, as section.key=value."""
        values = {
            **self.values,
            "model.name": self.run_dir.name,
            "logging.output_dir": str(self.run_dir.parent),
        }
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def read_grid(path: str) -> dict[str, list]:
    """Read {section.key: values} from a sweep file.

    Raise one ConfigError that lists everything that is malformed. Whether the keys exist and their
    values are allowed is checked later, by check_points.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: no such file{seen_from(path)}; --sweep takes a YAML file with lines such as "
            "training.lr: [3e-4, 1e-3]"
        )
    raw = read_yaml_file(path)
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(["not a sweep; write lines such as training.lr: [3e-4, 1e-3]"], path)
    problems = []
    for key, values in raw.items():
        if not isinstance(values, list) or not values:
            problems.append(f"{key}: {values!r} is not a list of values, such as [3e-4, 1e-3]")
        elif len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            problems.append(f"{key}: a value appears twice in {values}")
        elif key in ("model.name", "logging.output_dir"):
            problems.append(f"{key}: cannot be swept; the sweep names its runs itself")
        elif not re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", key):
            problems.append(f"{key}: not of the form section.key, such as training.lr")
    if problems:
        raise ConfigError(problems, path)
    return raw


def seed_grid(seeds: list[int]) -> dict[str, list]:
    """Return the grid of --seeds; raise ValueError for a single seed or one that appears twice."""
    given = " ".join(map(str, seeds))
    if len(seeds) < 2:
        raise ValueError(f"--seeds {given}: a spread needs two or more seeds, such as 1 2 3")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {given}: a seed appears twice")
    return {SEED: seeds}


def combinations(grid: dict[str, list]) -> list[dict[str, Any]]:
    """Return every combination of the values; the last key changes fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def run_name(base: str, values: dict[str, Any]) -> str:
    """Name a run after its values, such as llama-10M-lr0.001-n_layer4."""
    parts = [f"{key.split('.')[1]}{format_value(value)}" for key, value in values.items()]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([base, *parts])).rstrip("-")


def plan_points(source: str, grid: dict[str, list], base_config: dict, kind: str) -> list[Point]:
    """Return the points of a grid; raise ConfigError if two runs would have the same name.

    `source` is the file of the grid, or the flag; `kind` is "sweep" or "seeds".
    """
    base = base_config["model"]["name"]
    folder = Path(base_config["logging"]["output_dir"]) / f"{base}-{kind}"
    points = [Point(values, folder / run_name(base, values)) for values in combinations(grid)]
    names = [point.run_dir.name for point in points]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ConfigError([f"several runs would be named {name}" for name in duplicates], source)
    return points


def check_points(
    args: argparse.Namespace, source: str, points: list[Point], load: Callable
) -> None:
    """Check the configuration of every run; raise one ConfigError that lists all problems.

    Runs often share a problem, so each is listed once: alone if all runs have it, otherwise with
    the values of the first run that does.
    """
    # collect the runs that have each problem
    problems: dict[str, list[Point]] = {}
    for point in points:
        assignments = [*(args.set or ()), *point.assignments()]
        try:
            load(argparse.Namespace(**{**vars(args), "set": assignments}))
        except (ValueError, OSError) as error:
            for line in getattr(error, "problems", [str(error)]):
                problems.setdefault(line, []).append(point)
    lines = [
        line if len(affected) == len(points) else f"{affected[0]}: {line}"
        for line, affected in problems.items()
    ]
    if lines:
        raise ConfigError(lines, source)


# ---- the runs -----------------------------------------------------------------------------------


def train_command(argv: list[str], point: Point, overwrite: bool, kind: str) -> list[str]:
    """Return the command that trains a point: the user's flags without --`kind`, and its values."""
    # let argparse drop our flag, which the user may have written in several ways
    our_flag = argparse.ArgumentParser(add_help=False)
    our_flag.add_argument(f"--{kind}", nargs="+" if kind == "seeds" else None)
    _, flags = our_flag.parse_known_args(argv)
    for assignment in point.assignments():
        flags += ["--set", assignment]
    is_finished = (point.run_dir / METRICS_FILE).is_file()  # train.py then only shows its results
    if not (overwrite or is_finished):
        flags += ["--resume-from-checkpoint", "auto"]
    return [sys.executable, str(ROOT / "train.py"), *flags]


def train_point(command: list[str]) -> str | None:
    """Run train.py and wait for it; return its error, or None if it succeeded.

    It prints to our terminal, progress bar included, and leaves its error in a file. It runs in a
    session of its own, so that it gets each signal once, from us. It does not outlive us (Linux
    only). Raise Interrupted if it was interrupted.
    """
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder, "error.txt")
        environment = {**os.environ, ERROR_FILE: str(error_file)}
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=end_with_parent()
        )
        code = wait_and_pass_on_signals(process)
        error = error_file.read_text(encoding="utf-8").strip() if error_file.is_file() else ""
    return None if code == 0 else error or f"train.py ended with exit code {code}"


def end_with_parent() -> Callable[[], None] | None:
    """Return a function by which a new process asks for SIGTERM when its parent dies.

    A run saves its step then, as it does on any SIGTERM. Return None where only Linux can do it.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork, after which little is safe
    parent = os.getpid()

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(EXIT_INTERRUPTED)

    return ask_kernel


def wait_and_pass_on_signals(process: subprocess.Popen) -> int:
    """Wait for train.py and return its exit code; raise Interrupted if it was interrupted."""
    # a Ctrl-C in the terminal reaches only us, because the run has a session of its own
    received = []

    def pass_on(number, frame) -> None:
        received.append(number)
        process.send_signal(number)

    handlers = {number: signal.getsignal(number) for number in ending.SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # a job in the background ignores Ctrl-C, and should
            signal.signal(number, pass_on)
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        raise ending.Interrupted(received[0])
    if code - 128 in ending.SIGNALS:  # somebody sent it to the run itself
        raise ending.Interrupted(code - 128)
    return code


def run_sweep(args: argparse.Namespace, argv: list[str], load: Callable) -> int:
    """Train every combination in the file args.sweep, or every seed of args.seeds.

    Return 0, or 2 if a run failed. A run that fails does not stop the others. `argv` is the command
    line that `args` was parsed from. `load(args)` returns the checked configuration of a command
    line, or raises ValueError or OSError.
    """
    kind = "sweep" if args.sweep else "seeds"
    check_flags(args, kind)
    source = args.sweep or "--seeds"
    grid = read_grid(args.sweep) if args.sweep else seed_grid(args.seeds)

    # find all mistakes that need no text before the first run starts; each run prints its warnings
    logging.disable(logging.WARNING)
    try:
        points = plan_points(source, grid, load(args), kind)
        check_points(args, source, points, load)
    finally:
        logging.disable(logging.NOTSET)
    folder = points[0].run_dir.parent
    print(f"{kind:<11} {len(points)} runs in {folder}/")
    if args.dry_run:
        for point in points:
            print(f"  {point.run_dir.name}: {point}")
        return 0

    # train one run after the other, and write the table after each of them
    rows = []
    seconds = []  # durations of the runs that were trained just now, not only shown again
    for number, point in enumerate(points, 1):
        position = f"{number} of {len(points)}"
        remaining = len(points) - number + 1
        left = time_left(sum(seconds), len(seconds) / (len(seconds) + remaining))
        print(f"\nrun {position}{left}: {point}")

        is_finished = (point.run_dir / METRICS_FILE).is_file()
        started = time.perf_counter()
        try:
            error = train_point(train_command(argv, point, args.overwrite, kind))
        except ending.Interrupted as error:
            raise ending.Interrupted(
                error.number, f"{source}: interrupted in run {position}; the same command continues"
            ) from None
        if error is None and not is_finished:
            seconds.append(time.perf_counter() - started)
        result = {"error": error} if error else read_results(point.run_dir)
        rows.append({"name": point.run_dir.name, "values": point.values, **result})
        write_sweep(folder, grid, rows)

    print("\n".join(["", format_table(grid, rows), *edge_notes(grid, rows)]))
    files = [name for name in (TABLE, RESULTS, PLOT) if (folder / name).is_file()]
    print(f"results: {folder}/ ({', '.join(files)})")
    return EXIT_BAD_INPUT if any("error" in row for row in rows) else 0


def check_flags(args: argparse.Namespace, kind: str) -> None:
    """Raise ValueError for a flag that does not go with --sweep or --seeds."""
    if args.sweep and args.seeds:
        seeds = ", ".join(map(str, args.seeds))
        raise ValueError(f"--seeds: write {SEED}: [{seeds}] into {args.sweep} instead")
    if args.seeds and args.seed is not None:
        raise ValueError("--seed, --seeds: choose one")
    if distributed.world_size() > 1:
        raise ValueError(f"--{kind}: runs in one process, not in {distributed.world_size()}")
    if args.resume_from_checkpoint:
        raise ValueError(
            f"--resume-from-checkpoint: leave it out, --{kind} resumes its runs itself"
        )
    if args.allow_change:
        raise ValueError(f"--allow-change: does not go with --{kind}")
