"""Run the jobs of a submission that are not done yet.

    job = Job("zero_shot", "main blimp", [predictions], [data], command, weights, cost, run)
    failed = run_jobs([job], output_folder, seed=42)

A job is done if its outputs are as it left them and were made from the same weights, data and seed.
made_from.json in the output folder records the hashes. This module knows no task and no model.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from babyllama import cli
from babyllama.files import read_json, sha256, write_json
from babyllama.model_dir import model_sha256

log = logging.getLogger(__name__)
MADE_FILE = "made_from.json"


@dataclass
class Job:
    """One piece of work: it writes `outputs` from a model and data."""

    stage: str
    name: str
    outputs: list[Path]
    data: list[Path]
    download_command: str  # for the data
    weights_hash: str
    cost: float  # relative time
    run: Callable[[], None]


class Record:
    """Remember what the outputs in a folder were made from, by job, in made_from.json."""

    def __init__(self, output: Path, seed: int):
        self.output = output
        self.seed = seed
        try:
            self.made = dict(read_json(output / MADE_FILE))
        except (OSError, ValueError, TypeError):
            self.made = {}  # all jobs run again

    def is_done(self, job: Job) -> bool:
        if not all(path.is_file() for path in job.outputs):
            return False
        return self.made.get(self._key(job)) == self._origin(job)

    def add(self, job: Job) -> None:
        """Record a job that has just written its outputs."""
        self.made[self._key(job)] = self._origin(job)
        write_json(self.output / MADE_FILE, self.made)

    def _key(self, job: Job) -> str:
        return str(job.outputs[-1].relative_to(self.output))

    def _origin(self, job: Job) -> dict[str, str]:
        """Return what the outputs of a job were made from, and their hashes."""
        outputs = {path.name: sha256(path) for path in job.outputs}
        data = "".join(map(data_hash, job.data))
        return {"weights": job.weights_hash, "data": data, "seed": str(self.seed), **outputs}


def run_jobs(jobs: list[Job], output: Path, seed: int, dry_run: bool = False) -> int:
    """Run the jobs whose data are there and that are not done; a dry run only lists them.

    A job that fails does not stop the others. Return the number of those that failed.
    """
    # see what is to do
    ready = [job for job in jobs if all(path.exists() for path in job.data)]
    warn_about_missing_data(jobs)
    if jobs and not ready:
        raise FileNotFoundError("none of the data are there: see the commands above")
    record = Record(output, seed)
    todo = [job for job in ready if not record.is_done(job)]
    log.info("%d of %d steps are done, %d to do", len(ready) - len(todo), len(ready), len(todo))
    if dry_run:
        for job in todo:
            log.info("  %s: %s", job.stage, job.name)
        return 0

    # run it; the time left follows from the cost of what is finished
    failed = 0
    started = time.monotonic()
    finished = 0.0
    total = sum(job.cost for job in todo)
    for number, job in enumerate(todo, 1):
        left = cli.time_left(time.monotonic() - started, finished / max(1, total))
        log.info("[%d/%d%s] %s: %s", number, len(todo), left, job.stage, job.name)
        finished += job.cost
        try:
            job.run()
        except ValueError as error:
            cli.print_error(ValueError(f"{job.stage}: {job.name}: {error}"))
            failed += 1
            continue
        record.add(job)
    return failed


def warn_about_missing_data(jobs: list[Job]) -> None:
    """Warn once about the files that a job lacks, with the command that fetches them."""
    warned: set[Path] = set()
    for job in jobs:
        missing = [path for path in job.data if not path.exists() and path not in warned]
        if missing:
            warned.update(missing)
            paths = ", ".join([str(missing[0]), *(path.name for path in missing[1:])])
            log.warning("missing: %s; in babylm-eval/strict: %s", paths, job.download_command)


# ---- hashes and sizes ---------------------------------------------------------------------------


weights_hash = functools.cache(model_sha256)  # hashing large weights takes seconds


def joint_hash(hashes: Iterable[str]) -> str:
    """Return one hash of several."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def files_of(data: Path) -> list[Path]:
    """Return a file, or the files of a folder in order."""
    return sorted(path for path in data.rglob("*") if path.is_file()) if data.is_dir() else [data]


@functools.cache
def data_hash(data: Path) -> str:
    """Return one hash of the content of a file or a folder."""
    return joint_hash(map(sha256, files_of(data)))


@functools.cache
def size_of(data: Path) -> int:
    """Return the size of a file or a folder in bytes, as an estimate of the work; 0 if missing."""
    return sum(path.stat().st_size for path in files_of(data)) if data.exists() else 0
