"""Read from the records of a run what reports say about it: its scores, text and seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from babyllama.config import read_yaml_file
from babyllama.files import ROOT, read_json
from babyllama.runs.run_dir import CONFIG_FILE, METRICS_FILE


def training_scores(folder: str | Path) -> dict[str, Any] | None:
    """Return the held-out scores of a run and the words it has seen; None if it is not finished."""
    try:
        results = read_json(Path(folder, METRICS_FILE))["results"]
        return {
            "eval_loss": float(results["eval_loss"]),
            "eval_perplexity": float(results["eval_perplexity"]),
            "eval_bits_per_byte": float(results["eval_bits_per_byte"]),
            "eval_by_domain": results.get("eval_by_domain", {}),
            "floor_bits_per_byte": results.get("floor_bits_per_byte"),
            "words_trained": results.get("words_trained"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def facts_of_run(folder: str | Path) -> dict[str, Any] | None:
    """Return what was trained in a run, and on what text, for a report; None if it is unknown.

    `folder` is the directory of a finished run, or of one of its checkpoints.
    """
    folder = Path(folder).resolve()
    if re.fullmatch(r"checkpoint-\d+|chck_\d+M", folder.name):
        folder = folder.parent
    try:
        return facts_of_metrics(read_json(folder / METRICS_FILE))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def facts_of_metrics(metrics: dict) -> dict[str, Any]:
    """Return the facts of facts_of_run from the content of training_metrics.json."""
    words = Counter()  # by domain
    for source in metrics["data"]["train"]["sources"]:
        words[source["domain"]] += source["words"]
    return {
        "name": metrics["config"]["model"]["name"],
        "type": metrics["config"]["model"]["type"],
        "parameters": metrics["plan"]["parameters"],
        "steps": metrics["results"]["steps"],
        "epochs": metrics["results"]["epochs"],
        "words": metrics["data"]["train"]["words"],
        "domains": dict(words.most_common()),
        "is_synthetic": metrics["results"]["floor_bits_per_byte"] is not None,
    }


def seed_and_config(folder: str | Path) -> dict[str, int | str] | None:
    """Return the `seed` of a finished run and a hash of the rest of its `config` and text.

    Two runs with the same hash differ only in the seed: the name of the model and the logging
    section do not count. Return None if the run is not finished or was written by an older version.
    """
    try:
        metrics = read_json(Path(folder, METRICS_FILE))
        config = metrics["config"]
        del config["logging"], config["model"]["name"]
        seed = int(config["training"].pop("seed"))
        if config["training"].get("max_minutes"):
            del config["training"]["max_steps"]  # seeds that had the same time
        facts = [config, metrics["data"]["train"]["key"]]
        if "history" in metrics["data"]:
            facts.append(metrics["data"]["history"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    text = json.dumps(facts, sort_keys=True).encode()
    return {"seed": seed, "config": hashlib.sha256(text).hexdigest()}


def training_text_of(model_path: str | Path, key: str) -> Path | None:
    """Return data.`key` of the run that trained a model or checkpoint, or None without a record.

    A relative path is looked up in the working directory first, then in the project.
    """
    folders = (Path(model_path), Path(model_path).parent)
    config_files = [folder / CONFIG_FILE for folder in folders]
    config_file = next((file for file in config_files if file.is_file()), None)
    if config_file is None:
        return None
    try:
        recorded = Path(read_yaml_file(config_file)["data"][key])
    except (KeyError, TypeError):
        raise ValueError(f"{config_file} has no data.{key}") from None
    for path in (recorded, ROOT / recorded):
        if path.exists():
            return path
    return recorded
