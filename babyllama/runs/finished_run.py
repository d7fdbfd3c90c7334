"""Read from the records of a run what reports say about it: its scores, text and seed."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from babyllama.config import read_yaml_file
from babyllama.files import ROOT, read_json
from babyllama.runs.run_dir import CONFIG_FILE, METRICS_FILE

log = logging.getLogger(__name__)


def read_metrics(folder: str | Path) -> dict[str, Any] | None:
    """Return the content of training_metrics.json; None if the folder has none.

    If the file is damaged or of an older version, warn and return None: it says how the model was
    trained, and the model can be measured without that.
    """
    file = Path(folder, METRICS_FILE)
    if not file.is_file():
        return None
    try:
        metrics = read_json(file)
        for read in (scores_of, describe_run, seed_and_config):
            read(metrics)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is damaged or of an older version, so it is ignored: %r", file, error)
        return None
    return metrics


def run_of_checkpoint(folder: str | Path) -> Path | None:
    """Return the directory of the run that a checkpoint is from; None if it is not a checkpoint."""
    folder = Path(folder).resolve()
    return folder.parent if re.fullmatch(r"checkpoint-\d+|chck_\d+M", folder.name) else None


def scores_of(metrics: dict) -> dict[str, Any]:
    """Return the held-out scores of a run and the words it has seen."""
    results = metrics["results"]
    return {
        "eval_loss": float(results["eval_loss"]),
        "eval_perplexity": float(results["eval_perplexity"]),
        "eval_bits_per_byte": results["eval_bits_per_byte"],
        "eval_by_domain": results.get("eval_by_domain", {}),  # none if there is only one
        "floor_bits_per_byte": results["floor_bits_per_byte"],
        "words_trained": results["words_trained"],
    }


def describe_run(metrics: dict) -> dict[str, Any]:
    """Return what was trained in a run, and on what text, for a report."""
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


def seed_and_config(metrics: dict) -> dict[str, int | str]:
    """Return the `seed` of a run and a hash of the rest of its `config` and text.

    Two runs with the same hash differ only in the seed: the name of the model and the logging
    section do not count.
    """
    config = copy.deepcopy(metrics["config"])
    del config["logging"], config["model"]["name"]
    seed = int(config["training"].pop("seed"))
    if config["training"].get("max_minutes"):
        del config["training"]["max_steps"]  # seeds that had the same time
    identity = [config, metrics["data"]["train"]["key"]]
    if "history" in metrics["data"]:
        identity.append(metrics["data"]["history"])
    text = json.dumps(identity, sort_keys=True).encode()
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
