"""Read and write files safely: atomic writes, hashes, locks, and the environment that a result came from."""

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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent  # of the project


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` when the block ends without an error.

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


def check_replaceable(path: Path, is_ours: bool, remedy: str) -> None:
    """Raise ValueError if `path` exists and is not the script's own earlier output.

    The one policy for existing output: a script replaces what it wrote itself and nothing else.
    """
    if path.exists() and not is_ours:
        raise ValueError(f"{path} exists and was not written by this script; {remedy}")


def check_results_file(file: Path, flag: str) -> None:
    """Make the folder of a file of results; ValueError, before any work, where it cannot be written there.

    What stands there already is replaced only if it is a file of results.
    """
    if file.exists() and not _holds_results(file):
        raise ValueError(
            f"{file}: is there already and holds no results; name another file with {flag}"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({error.strerror}); name another file with {flag}"
        ) from None


def _holds_results(file: Path) -> bool:
    try:
        return file.is_file() and (
            not file.stat().st_size or "results" in json.loads(file.read_bytes())
        )
    except (ValueError, TypeError):
        return False


def is_model(folder: str | Path) -> bool:
    """Whether a directory holds a model that can be loaded: a config.json and weights."""
    return (Path(folder) / "config.json").is_file() and any(Path(folder).glob("*.safetensors"))


def weights_sha256(folder: str | Path) -> str:
    """One hash of a model's weights and config.json."""
    files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


# ---- where a figure comes from ------------------------------------------------------------------


def describe_environment(device: str | None = None) -> dict[str, str | None]:
    """Versions, machine (what `device` stands for in inference.pick_device) and git commit, for a file of results."""
    import torch

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:  # no git here
        git = ""
    asked = str(device or "auto")
    on_gpu = torch.cuda.is_available() and asked.startswith(("auto", "cuda"))
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(asked.replace("auto", "cuda"))
        if on_gpu
        else f"CPU, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}",
        "git_hash": git or None,
    }


@contextlib.contextmanager
def exclusive_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Make a folder and hold it while the block runs; ValueError, with the `remedy`, where another process holds it.

    What it made goes again if it stayed empty. The lock is one of the system on the directory itself: no file tells of
    it, and it ends with the process, however that ends. Where there are no such locks, nothing is kept apart.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise ValueError(
            f"{folder}: another process is writing there; wait for its end, or {remedy}"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            fcntl.flock(
                place, fcntl.LOCK_UN
            )  # a process that was forked meanwhile may have it open as well
        os.close(place)


def nan_to_null(value: Any, name: str, undefined: list[str]) -> Any:
    """The value with None for NaN and infinity, whose names go into `undefined`: what strict JSON can hold."""
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


def default_cache_dir() -> Path:
    """$BABYLLAMA_CACHE, or data/cache beside this file."""
    return Path(os.environ.get("BABYLLAMA_CACHE") or ROOT / "data" / "cache")
