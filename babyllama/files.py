"""Read and write files safely.

Atomic writes, hashes, a lock on a folder, and the environment that a result came from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

ROOT = Path(__file__).resolve().parent.parent  # of the project
LOCK_FILE = ".lock"  # in a folder that a process is writing to; see exclusive_folder


def default_cache_dir() -> Path:
    """Return $BABYLLAMA_CACHE, or data/cache in the project."""
    return Path(os.environ.get("BABYLLAMA_CACHE") or ROOT / "data" / "cache")


# ---- write --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block succeeds.

    The block creates a file or a directory there. An existing file or directory at `path` is
    replaced; if the block fails, what was written is deleted and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder, path.name)
        yield draft
        if draft.is_dir() and path.is_dir():
            path.rename(Path(folder, "replaced"))
        draft.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8 with Unix line ends, and flush it to disk."""
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def nan_to_null(value: Any, name: str, undefined: list[str]) -> Any:
    """Return the value with None for NaN and infinity, which strict JSON cannot hold.

    The dotted names of the replaced numbers, below `name`, are appended to `undefined`.
    """
    if isinstance(value, dict):
        return {
            key: nan_to_null(item, f"{name}.{key}" if name else key, undefined)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [nan_to_null(item, name, undefined) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if name not in undefined:
            undefined.append(name)
        return None
    return value


# ---- existing outputs ---------------------------------------------------------------------------


def check_replaceable(path: Path, is_ours: bool, remedy: str) -> None:
    """Raise ValueError if `path` exists and is not the script's own earlier output.

    The one policy for existing output: a script replaces what it wrote itself and nothing else.
    """
    if path.exists() and not is_ours:
        raise ValueError(f"{path} exists and was not written by this script; {remedy}")


def check_results_file(file: Path, flag: str) -> None:
    """Create the folder of a results file; raise ValueError if the file cannot be written."""
    remedy = f"name another file with {flag}"
    check_replaceable(file, holds_results(file), remedy)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error.strerror}); {remedy}") from None


def holds_results(file: Path) -> bool:
    """Return True for an empty file and for a JSON object with the key "results"."""
    try:
        content = file.read_bytes()
        return not content or "results" in json.loads(content)
    except (OSError, ValueError, TypeError):
        return False


@contextlib.contextmanager
def exclusive_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Create a folder and keep other processes from writing to it while the block runs.

    Raise ValueError with the `remedy` if another process has locked it. The lock is a hidden file
    in the folder. It is deleted at the end, and so is a folder that was created here and stayed
    empty. If the process dies, the system releases the lock; the file remains but blocks nobody.
    """
    was_created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{folder}: another process is writing there; wait until it ends, or {remedy}"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes it on release instead
            (folder / LOCK_FILE).unlink()
        lock.release()
        if was_created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


# ---- where a result comes from ------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_model(folder: str | Path) -> bool:
    """Return True if a directory holds a model that can be loaded: a config.json and weights."""
    return Path(folder, "config.json").is_file() and any(Path(folder).glob("*.safetensors"))


def weights_sha256(folder: str | Path) -> str:
    """Return one hash of a model's config.json and weights."""
    files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def describe_environment(device: str | None = None) -> dict[str, str | None]:
    """Return versions, machine and git commit, for a results file; `device` as in pick_device."""
    import torch

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")
    name = str(device or "auto")
    if torch.cuda.is_available() and name.startswith(("auto", "cuda")):
        device_name = torch.cuda.get_device_name(name.replace("auto", "cuda"))
    else:
        threads = torch.get_num_threads()
        device_name = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "platform": platform.platform(),
        "device": device_name,
        "git_hash": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit of the project, or None if git or the repository is missing."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
