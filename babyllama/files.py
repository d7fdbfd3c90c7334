"""Write files so that nothing is ever left half-written, overwritten by mistake or unexplained.

The functions write atomically, decide what may be replaced, lock folders, hash files and describe
the environment that a result came from.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

ROOT = Path(__file__).resolve().parent.parent  # the project's folder
log = logging.getLogger(__name__)

LOCK_FILE = ".lock"  # exists in a folder while a process writes to it (exclusive_folder)
OWNER_FILE = ".lock-owner"  # names that process: its machine and its number
DRAFT = "~"  # the end of a temporary folder's name, so that no hidden folder of the user's fits


def default_cache_dir() -> Path:
    """Return the folder for caches: $BABYLLAMA_CACHE, or else data/cache in the project."""
    return Path(os.environ.get("BABYLLAMA_CACHE") or ROOT / "data" / "cache")


# ---- write --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` once the block has succeeded.

    The block creates a file or a directory at the temporary path. Whoever reads `path` therefore
    sees the old content or the new content, but never half of it. If the block fails, what it wrote
    is deleted and `path` stays as it was. With `keep_existing`, what another process has put at
    `path` in the meantime stays: two runs that fill the same cache write the same content.

    A process that is killed leaves the temporary folder, which remove_abandoned_drafts deletes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=DRAFT)
        folder = stack.enter_context(folder)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            stack.enter_context(filelock.FileLock(Path(folder, LOCK_FILE)))
        draft = Path(folder, path.name)
        yield draft
        if keep_existing and path.exists():
            return
        if draft.is_dir() and path.is_dir():
            path.rename(Path(folder, "replaced"))
        try:
            draft.replace(path)
        except OSError:
            if not (keep_existing and path.exists()):
                raise


def drafts(folder: Path) -> list[Path]:
    """Return the temporary folders of atomic_write in a folder."""
    name = re.compile(rf"\..+\.[a-z0-9_]{{8}}{DRAFT}")
    return sorted(path for path in folder.glob(f".*{DRAFT}/") if name.fullmatch(path.name))


def remove_abandoned_drafts(folder: Path) -> None:
    """Delete the drafts of processes that were killed; those of living processes are locked."""
    for draft in drafts(folder):
        # one without a lock may have been created just now
        with contextlib.suppress(OSError):
            if (draft / LOCK_FILE).is_file():
                with filelock.FileLock(draft / LOCK_FILE, timeout=0):
                    shutil.rmtree(draft, ignore_errors=True)


def read_utf8(path: Path, advice: str) -> str:
    """Return the text of a file; raise ValueError, with `advice`, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {advice}") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise ValueError if it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8 with Unix line endings, and flush it to disk.

    A byte of a file name that is not UTF-8 is written as an escape, such as \\udcff.
    """
    with atomic_write(path) as draft, draft.open("wb") as file:
        file.write(text.encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; raise ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def nan_to_null(value: Any, name: str, undefined: list[str]) -> Any:
    """Return a copy of a value in which None replaces NaN and infinity, which JSON does not have.

    The dotted name of every number that was replaced, such as "scores.loss", is appended to
    `undefined`, so that the file can list them. `name` is the name of the value itself.
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
    """Raise ValueError if `path` exists, unless the script wrote it itself (`is_ours`).

    All scripts follow this policy: they replace their own earlier output, but never a file of the
    user's. `remedy` says what the user can do instead.
    """
    if path.exists() and not is_ours:
        raise ValueError(f"{path} exists and was not written by this script; {remedy}")


def check_utf8(folder: Path) -> None:
    """Raise ValueError if a path is not UTF-8, because no model can be saved or read there."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{folder}: the name is not UTF-8; rename it, or choose another") from None


def check_results_file(file: Path, flag: str, is_ours: Callable | None = None) -> None:
    """Raise ValueError if a results file cannot be written, before the work that produces it.

    The file's folder is created if necessary. `flag` is the flag that names the file, and
    is_ours(file) tells if a script wrote it (default: holds_results).
    """
    remedy = f"name another file with {flag}"
    check_replaceable(file, (is_ours or holds_results)(file), remedy)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error.strerror}); {remedy}") from None


def holds_results(file: Path) -> bool:
    """Return True if a script may have written this file: it is empty, or has the key "results"."""
    try:
        return not file.stat().st_size or "results" in read_json(file)
    except (OSError, ValueError, TypeError):
        return False


@contextlib.contextmanager
def exclusive_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Create a folder and keep other processes from writing to it while the block runs.

    If another process has already locked the folder, raise ValueError with the `remedy`. The lock
    is a hidden file, which is deleted at the end; so is the folder, if it was created here and is
    still empty. If the process dies, the operating system releases the lock, so a file that is left
    behind blocks nobody.
    """
    was_created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    owner = _read_owner(folder / OWNER_FILE)
    lock = filelock.FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = f" (process {owner[1]} on {owner[0]})" if owner else ""
        raise ValueError(
            f"{folder}: another process is writing there{who}; wait until it ends, or {remedy}"
        ) from None
    except PermissionError:
        raise
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): start one process only", folder, error.strerror)
    try:
        (folder / OWNER_FILE).unlink(missing_ok=True)  # it might be a link
        (folder / OWNER_FILE).write_text(f"{platform.node()} {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        (folder / OWNER_FILE).unlink(missing_ok=True)
        # delete the file while it is still locked; Windows refuses that and deletes it on release
        with contextlib.suppress(OSError):
            (folder / LOCK_FILE).unlink()
        lock.release()
        # rmdir refuses to delete a folder that holds something, and that is what we want
        if was_created:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _read_owner(file: Path) -> tuple[str, int] | None:
    """Return the machine and the number of the process that holds a lock, if they are known."""
    try:
        machine, number = file.read_text(encoding="utf-8").split()
        return machine, int(number)
    except (OSError, ValueError):
        return None


# ---- the origin of a result ---------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc_now() -> str:
    """Return the date and time in UTC: 2026-11-29T12:00:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe_environment(device: str | None = None) -> dict[str, str | None]:
    """Describe the software and the machine behind a result: versions, device, git commit.

    `device` is a name that pick_device knows.
    """
    import torch

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")
    name = str(device or "auto")
    if torch.cuda.is_available() and name.startswith(("auto", "cuda")):
        device_name = torch.cuda.get_device_name(name.replace("auto", "cuda"))
    elif name == "mps":
        device_name = "Apple GPU"
    else:
        threads = torch.get_num_threads()
        device_name = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "platform": platform.platform(),
        "device": device_name,
        "git_hash": git_commit(),
    }


def git_commit() -> str | None:
    """Return the project's git commit, or None without git or without a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
