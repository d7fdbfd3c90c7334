"""Look after model directories, which hold config.json, .safetensors weights and a tokenizer.

Hashes of the weights show if a model has changed. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import hashlib
import stat
from pathlib import Path

from babyllama.files import read_json, sha256


def is_model(folder: str | Path) -> bool:
    """Return True if a directory holds a model that can be loaded: a config.json and weights."""
    return Path(folder, "config.json").is_file() and any(Path(folder).glob("*.safetensors"))


def check_model_exists(path: Path) -> None:
    """Raise FileNotFoundError, with the nearest name beside it, if `path` is not a model."""
    if (path / "config.json").is_file():
        return
    models = {
        file.parent.name: file.parent
        for folder in (Path("models"), path.parent)
        for file in folder.glob("*/config.json")
    }
    nearest = difflib.get_close_matches(path.name, models, n=1)
    hint = f"; did you mean {models[nearest[0]]}?" if nearest else ""
    if "*" in path.name:
        hint = "; nothing matches the *"
    raise FileNotFoundError(
        f"no model at {path}: expected a directory with config.json, weights, tokenizer.json "
        f"(nothing is downloaded){hint}"
    )


def make_weights_readable(folder: Path) -> None:
    """Give the weights the permissions of config.json.

    safetensors creates files that only their owner can read, which surprises people who share a
    model directory.
    """
    config = folder / "config.json"
    if config.is_file():
        for file in folder.glob("*.safetensors"):
            file.chmod(stat.S_IMODE(config.stat().st_mode))


def weights_sha256(folder: str | Path) -> str:
    """Return one hash that changes if a model's config.json or its weights change."""
    files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def check_weights(folder: str | Path) -> None:
    """Raise ValueError if a finished run's model is not what its training_metrics.json records."""
    try:
        recorded = read_json(Path(folder, "training_metrics.json"))["weights_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # not a run, or one of an older version
    if not is_model(folder) or weights_sha256(folder) != recorded:
        raise ValueError(
            f"{folder}: the weights or config.json have changed since they were trained. Restore "
            "them, or retrain with --overwrite; if you changed them yourself, move them to another "
            "directory, without training_metrics.json"
        )


def model_sha256(folder: str | Path) -> str:
    """Return one hash of what a score depends on: the weights and, if any, the tokenizer."""
    tokenizer = Path(folder, "tokenizer.json")
    return weights_sha256(folder) + (sha256(tokenizer) if tokenizer.is_file() else "")
