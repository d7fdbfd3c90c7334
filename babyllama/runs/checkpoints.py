"""Keep the checkpoints of a run on disk.

A checkpoint-<step> holds what a run needs to resume. BabyLM's milestones, chck_<N>M, are models.
Both end with a manifest of their files.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from babyllama.files import read_json, sha256, write_json
from babyllama.model_dir import make_weights_readable

log = logging.getLogger(__name__)

MANIFEST = "complete.json"  # in a checkpoint: the size and hash of each of its files
KEPT_CHECKPOINTS = 2  # so that one is left if the newest is damaged
MILLION = 1_000_000  # words; BabyLM names its checkpoints by millions of words


# ---- save ---------------------------------------------------------------------------------------


def seal_checkpoint(folder: Path) -> None:
    """Finish a checkpoint: write its manifest last, so that a checkpoint that has one is complete.

    Trainer's pickled arguments are deleted, because loading a pickle can run any code.
    """
    make_weights_readable(folder)
    # a step that is saved again still has its old manifest
    for name in ("training_args.bin", MANIFEST):
        (folder / name).unlink(missing_ok=True)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def rotate_checkpoints(run_dir: Path, best: str | None) -> None:
    """Delete old checkpoints; keep the newest ones by step, and the `best` one if there is a best.

    Call it once the newest one is sealed, so that the run never lacks a complete checkpoint. Times
    of files do not matter: a clock can be set back, and a copy of a run has new times.
    """
    for folder in checkpoints(run_dir)[KEPT_CHECKPOINTS:]:
        if best is None or folder.name != Path(best).name:
            shutil.rmtree(folder)


# ---- find ---------------------------------------------------------------------------------------


def _numbered_folders(run_dir: Path, pattern: str) -> list[Path]:
    """Return the folders in `run_dir` whose name matches the pattern, sorted by its number."""
    folders = {}
    for path in run_dir.glob("*"):
        match = re.fullmatch(pattern, path.name)
        if match and path.is_dir():
            folders[int(match[1])] = path
    return [folders[number] for number in sorted(folders)]


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint-<step> directories of a run, newest first."""
    return _numbered_folders(run_dir, r"checkpoint-(\d+)")[::-1]


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint-<step> directory."""
    # not resolve(): the name counts, even if it is a link
    return int(Path(os.path.abspath(checkpoint)).name.removeprefix("checkpoint-"))


def milestones(run_dir: Path) -> list[Path]:
    """Return the chck_<N>M directories of a run, fewest words first."""
    return _numbered_folders(run_dir, r"chck_(\d+)M")


def newest_intact_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest intact checkpoint, or None; warn about every one that is skipped."""
    for folder in checkpoints(run_dir):
        error = checkpoint_error(folder)
        if not error:
            return folder
        log.warning("%s: ignored: %s", folder, error)
    return None


def find_checkpoint(name: str, run_dir: Path) -> Path:
    """Return the checkpoint that --resume-from-checkpoint names, by its path or as "latest".

    "latest" is the newest checkpoint of the run that is intact; damaged ones are skipped with a
    warning. Raise FileNotFoundError if there is none, and ValueError for the path of a damaged one.
    """
    if name == "latest":
        newest = newest_intact_checkpoint(run_dir)
        if newest is None:
            raise FileNotFoundError(
                f"{run_dir}: no complete checkpoint; --resume-from-checkpoint auto starts the run "
                "if there is nothing to resume"
            )
        return newest
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint; give its directory or latest")
    inside = checkpoints(folder)
    if inside:
        raise ValueError(
            f"{folder} is a run directory, not a checkpoint; give one of its checkpoints, "
            f"such as {inside[0]}, or latest"
        )
    error = checkpoint_error(folder)
    if error:
        raise ValueError(f"{folder}: cannot resume from it: {error}")
    return folder


# ---- check --------------------------------------------------------------------------------------


def checkpoint_error(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is exactly as it was saved."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"saving it did not finish (no {MANIFEST})"
    try:
        files = read_json(manifest)["files"]
        expected = [(folder / name, file["bytes"], file["sha256"]) for name, file in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not expected:
        return f"{MANIFEST} lists no files"
    for path, size, digest in expected:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"{path.name} has changed since it was saved"
    return None


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint to damaged-<name>, replacing an earlier one of that name."""
    target = folder.with_name(f"damaged-{folder.name}")
    if target.is_dir():
        shutil.rmtree(target)
    folder.rename(target)
    log.warning("%s: renamed to %s", folder, target.name)


# ---- BabyLM's milestones ------------------------------------------------------------------------


def checkpoint_words(track: str) -> list[int]:
    """Return the numbers of words at which BabyLM asks for a checkpoint.

    BabyLM wants one at every million words up to 10 million, then at every ten million up to 100
    million and, on the strict track, at every hundred million up to 1,000 million.
    """
    millions = [*range(1, 10), *range(10, 101, 10)]
    if track == "strict":
        millions += range(200, 1001, 100)
    return [n * MILLION for n in millions]


def milestone_name(words: int) -> str:
    """Return the name of BabyLM's checkpoint at this many words, in millions, rounded down."""
    return f"chck_{words // MILLION}M"
