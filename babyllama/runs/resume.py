"""Decide whether a run starts, resumes or is finished already, so that two runs never mix.

The configuration and the data report in the run directory say which run it holds. A resumed run may
differ from it in a few keys; the history records the changes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babyllama.config import flatten, read_yaml_file, with_defaults
from babyllama.files import read_json
from babyllama.model_dir import check_weights
from babyllama.runs.checkpoints import (
    checkpoint_step,
    find_checkpoint,
    milestones,
    newest_intact_checkpoint,
)
from babyllama.runs.run_dir import CONFIG_FILE, DATA_REPORT_FILE, METRICS_FILE, RESULTS, RETRAIN
from babyllama.schema import SECTIONS

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed, because they do not affect the steps before it.
FREE_ON_RESUME = {
    "training.num_epochs",
    "training.max_steps",
    "training.logging_steps",
    "training.dataloader_num_workers",
    "training.save_steps",
    "training.eval_steps",
    "training.cuda_graphs",
    "training.process_timeout_minutes",
    "training.benchmark",
    "logging.wandb",
    "logging.project",
    "logging.tensorboard",
    "logging.report_to",
    "logging.output_dir",
}
# Keys that may change when a run is resumed with --allow-change. It continues with the first chunk
# that it has not seen.
CHANGEABLE = (
    "processes",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.lr",
    "training.min_lr",
    "training.lr_scheduler",
    "training.warmup_steps",
    "training.warmup_ratio",
)


# ---- the run in the directory -------------------------------------------------------------------


def _read_run_file(path: Path) -> dict:
    """Read a YAML or JSON file of a run; raise ValueError if it is corrupted."""
    try:
        content = read_yaml_file(path) if path.suffix == ".yaml" else read_json(path)
        sections = {CONFIG_FILE: content.values(), METRICS_FILE: [content.get("results")]}
        if all(isinstance(section, dict) for section in sections.get(path.name, ())):
            return content
    except (ValueError, AttributeError, OSError):
        pass
    raise ValueError(f"{path} is corrupted; restore it, or {RETRAIN}")


def recorded_config(run_dir: Path) -> dict:
    """Return the configuration of the run in `run_dir`; raise ValueError if it is corrupted."""
    return _read_run_file(run_dir / CONFIG_FILE)


def config_diff(run_dir: Path, config: dict, report: dict) -> dict[str, str]:
    """Compare the run in `run_dir` with a new configuration and data report.

    Return a dictionary with a sentence for every difference, {key: "key: was ..., is ..."}. It is
    empty if both describe the same run.
    """
    old_config = recorded_config(run_dir)
    # a key that did not exist yet when the run started had its default
    defaults = {name: with_defaults(name, {}) for name in old_config if name in SECTIONS}
    old = flatten(defaults) | flatten(old_config)
    new = flatten(config)
    if new["training.max_minutes"] and not new["training.max_steps"]:
        new["training.max_steps"] = old.get("training.max_steps")  # chosen when the run started
    old_report = _read_run_file(run_dir / DATA_REPORT_FILE)
    new_report = dict(report)

    # the number of processes is a setting too; the history only says what was changed before
    old_report.pop("history", None)
    old["processes"] = old_report.pop("processes", 1)
    new["processes"] = new_report.pop("processes", 1)
    changes = {
        key: f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in old | new
        if old.get(key) != new.get(key)
    }
    if old_report != new_report:
        inputs = "the text, the tokenizer or a teacher"
        if "distillation" not in config:
            inputs = "the text or the tokenizer"
        changes["data"] = f"data: {inputs} has changed ({DATA_REPORT_FILE})"
    return changes


def finished_metrics(run_dir: Path, config: dict, report: dict) -> dict | None:
    """Return the metrics if this configuration has been trained on this text already, else None.

    Raise ValueError if its weights have changed since then.
    """
    if not (run_dir / METRICS_FILE).is_file() or config_diff(run_dir, config, report):
        return None
    check_weights(run_dir)
    return _read_run_file(run_dir / METRICS_FILE)


# ---- the checkpoint to resume from --------------------------------------------------------------


def resolve_checkpoint(
    run_dir: Path,
    config: dict,
    report: dict,
    resume: str | None,
    overwrite: bool,
    allowed: Sequence[str] = (),
) -> Path | None:
    """Decide how the run starts: return the checkpoint to resume from, or None for a new run.

    `resume` is the path of a checkpoint, "latest", or "auto", which starts a new run if there is no
    checkpoint to resume from. A run that was killed before its first checkpoint was complete has
    nothing to lose, so it starts again without being asked. Of the CHANGEABLE keys, those `allowed`
    may differ from those of the checkpoint.

    Raise ValueError if resuming would mix two different runs, or if a new run would replace an
    earlier one without --overwrite.
    """
    # find the newest checkpoint; auto resumes from it, or starts if the run has left nothing
    has_results = any((run_dir / name).exists() for name in RESULTS)
    intact = None
    if resume in (None, "auto") and not overwrite:
        intact = newest_intact_checkpoint(run_dir)
    if resume == "auto":
        resume = str(intact) if intact else None
        if not intact and not has_results:
            return None

    # resume, unless the checkpoint is from a different run
    if resume:
        checkpoint = find_checkpoint(resume, run_dir)
        if checkpoint.parent.resolve() != run_dir.resolve():
            raise ValueError(f"{checkpoint} does not belong to this run, which is in {run_dir}")
        changes = config_diff(run_dir, config, report)
        blocking = changes.keys() - FREE_ON_RESUME - set(allowed)
        if blocking:
            lines = ", ".join(line for key, line in changes.items() if key in blocking)
            advice = "resume with the old values"
            if blocking <= set(CHANGEABLE):
                flags = " ".join(f"--allow-change {key}" for key in CHANGEABLE if key in blocking)
                advice += f", add {flags} to continue with the new ones"
            raise ValueError(
                f"{checkpoint} belongs to a different run ({lines}); {advice}, or {RETRAIN}"
            )
        return checkpoint

    # start, unless that would replace something
    if overwrite or not (intact or milestones(run_dir) or has_results):
        return None
    changes = config_diff(run_dir, config, report)
    state = ", ".join(changes.values()) or "same configuration, not finished"
    remedies = ["--overwrite to replace it", "or choose another --model-name"]
    if intact and changes.keys() <= FREE_ON_RESUME:
        remedies.insert(0, "--resume-from-checkpoint latest to resume it")
    raise ValueError(f"{run_dir} holds another run ({state}); add {', '.join(remedies)}")


def check_checkpoint_step(checkpoint: Path | None, steps: int) -> None:
    """Raise ValueError if a checkpoint is from a later step than the last one of this run."""
    if checkpoint and checkpoint_step(checkpoint) > steps:
        raise ValueError(
            f"{checkpoint} is past the last step of this run, {steps}; train for more, or {RETRAIN}"
        )


# ---- the history of a run -----------------------------------------------------------------------


def run_history(
    run_dir: Path, config: dict, report: dict, checkpoint: Path | None
) -> list[dict[str, Any]]:
    """Return the CHANGEABLE settings of a run and the `step` from which on each of them holds.

    There is one entry for each change, oldest first, and none if nothing has changed.
    """
    if checkpoint is None:
        return []
    step = checkpoint_step(checkpoint)
    old_report = _read_run_file(run_dir / DATA_REPORT_FILE)
    first = {"step": 0, **_settings(recorded_config(run_dir), old_report)}
    # later entries belong to steps that are trained again
    history = [part for part in old_report.get("history", [first]) if part["step"] < step]
    current = _settings(config, report)
    if history[-1] != {"step": history[-1]["step"], **current}:
        history.append({"step": step, **current})
        for key, (before, now) in changes_at(history, step).items():
            log.info("from step %d on: %s: was %r, is %r", step, key, before, now)
    return history if len(history) > 1 else []


def _settings(config: dict, report: dict) -> dict[str, Any]:
    """Return the CHANGEABLE settings of a run."""
    values = flatten(config) | {"processes": report.get("processes", 1)}
    return {key: values.get(key) for key in CHANGEABLE}


def changes_at(history: Sequence[dict[str, Any]], step: int) -> dict[str, list]:
    """Return the settings that changed at this step, {key: [old, new]}."""
    for old, new in itertools.pairwise(history):
        if new["step"] == step:
            return {key: [old[key], new[key]] for key in CHANGEABLE if old[key] != new[key]}
    return {}
