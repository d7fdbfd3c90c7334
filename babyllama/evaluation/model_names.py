"""Give the models of a comparison short names.

Checkpoints of one run are also put in order. It looks at paths only and opens no model.

    from babyllama.evaluation.model_names import short_names
    short_names(["models/a/final", "models/b/final", "c"])  # ["a/final", "b/final", "c"]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT = re.compile(r"(checkpoint-|chck_)(\d+)M?")


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, with as many parents as it takes to be unique."""
    parts = [Path(path).resolve().parts for path in paths]
    for number, path_parts in enumerate(parts):
        if path_parts in parts[:number]:
            raise ValueError(f"{paths[number]}: this model is named twice")
    names = []
    for path_parts in parts:
        depth = 1
        while sum(other[-depth:] == path_parts[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(part for part in path_parts[-depth:] if part != "/"))
    return names


def prediction_folders(paths: Sequence[str]) -> dict[str, Path]:
    """Return the folder in which BabyLM's pipeline looks for each model's predictions.

    It is MODEL/main, or RUN/chck_<N>M for a checkpoint of a run. MODEL and RUN are the stem of the
    directory's name, or its short name if another model has the same stem.
    """
    revisions = {}
    homes = {}
    for path in paths:
        folder = Path(path).resolve()
        is_revision = re.fullmatch(r"chck_\d+M", folder.name)
        revisions[path] = folder.name if is_revision else "main"
        homes[path] = folder.parent if is_revision else folder

    distinct_homes = sorted(set(homes.values()))
    stems = [home.stem for home in distinct_homes]
    names = {}
    for home, name in zip(distinct_homes, short_names(list(map(str, distinct_homes))), strict=True):
        names[home] = home.stem if stems.count(home.stem) == 1 else name.replace("/", "_")
    return {path: Path(names[homes[path]], revisions[path]) for path in paths}


@dataclass(frozen=True)
class RunCheckpoints:
    """The checkpoints of one run, earliest first."""

    run: str  # the directory of the run
    counts_words: bool  # chck_<N>M counts million words, checkpoint-<N> training steps
    counts: list[int]
    indices: list[int]  # positions in the list of paths


def checkpoints_by_run(paths: Sequence[str]) -> list[RunCheckpoints]:
    """Find the checkpoints among the paths of models, sorted by run."""
    by_run: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for index, path in enumerate(map(Path, paths)):
        match = CHECKPOINT.fullmatch(path.name)
        if match:
            run = (str(path.parent), match[1])  # chck_ sorts before checkpoint-
            by_run.setdefault(run, []).append((int(match[2]), index))
    runs = []
    for (run, prefix), checkpoints in sorted(by_run.items()):
        counts, indices = zip(*sorted(checkpoints), strict=True)
        runs.append(RunCheckpoints(run, prefix == "chck_", list(counts), list(indices)))
    return runs


def in_training_order(paths: Sequence[str]) -> list[str]:
    """Sort each run's checkpoints within their positions; a shell lists 10M before 2M."""
    ordered = list(paths)
    for checkpoints in checkpoints_by_run(paths):
        for position, index in zip(sorted(checkpoints.indices), checkpoints.indices, strict=True):
            ordered[position] = paths[index]
    return ordered
