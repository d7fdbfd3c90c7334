"""Manage the files of a run directory, so that two different runs never mix in it.

Here are the names of the files, what makes a checkpoint valid, and the decision whether a run may
start, resume or replace another one. Nothing here trains, scores or imports torch. The layout:

    models/<name>/
        training_config.yaml  data_report.json             before step 0: what is trained
        status.json                                        running, preempted, failed or finished
        metrics.jsonl  checkpoint-<step>/  chck_<N>M/      during training
        wandb/  wandb_run_id.txt  tensorboard/             with logging.wandb, logging.tensorboard
        damaged-checkpoint-<step>/                         a checkpoint that a resume had to skip
        config.json  generation_config.json  model.safetensors         at the end: the model,
        tokenizer.json  tokenizer_config.json                          its tokenizer
        training_metrics.json  training_curves.png  README.md          and its results
        compliance.json                                    with a babylm section
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babyllama.config import flatten, format_yaml, read_yaml_file
from babyllama.files import (
    LOCK_FILE,
    OWNER_FILE,
    ROOT,
    check_replaceable,
    check_utf8,
    check_weights,
    drafts,
    is_model,
    read_json,
    sha256,
    write_json,
    write_text,
)

log = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
DATA_REPORT_FILE = "data_report.json"
LOG_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
METRICS_FILE = "training_metrics.json"
CURVES_FILE = "training_curves.png"
COMPLIANCE_FILE = "compliance.json"
WANDB_ID_FILE = "wandb_run_id.txt"  # so that a resumed run continues its W&B run
TENSORBOARD_DIR = "tensorboard"  # event files
MANIFEST = "complete.json"  # in a checkpoint: the size and hash of each of its files
KEPT_CHECKPOINTS = 2  # so that one is left if the newest is damaged
BENCHMARK_PREFIX = "benchmark/"  # of the scores of training.benchmark: benchmark/<task>
MILLION = 1_000_000  # words; BabyLM names its checkpoints by millions of words

# Files that a run writes at its end.
RESULTS = (
    METRICS_FILE,
    COMPLIANCE_FILE,
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "README.md",
    CURVES_FILE,
)
# Files that evaluate.py and benchmark.py write beside the model.
MEASURED = (
    "evaluation_results.json",
    "evaluation_plots.png",
    "word_surprisal.csv",
    "benchmark.json",
    "benchmark.html",
    "benchmark.png",
)
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
RETRAIN = "retrain with --overwrite or another --model_name"


# ---- checkpoints --------------------------------------------------------------------------------


def make_weights_readable(folder: Path) -> None:
    """Give the weights the permissions of config.json.

    safetensors creates files that only their owner can read, which surprises people who share a
    model directory.
    """
    config = folder / "config.json"
    if config.is_file():
        for file in folder.glob("*.safetensors"):
            file.chmod(stat.S_IMODE(config.stat().st_mode))


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


def newest_intact_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest intact checkpoint, or None; warn about every one that is skipped."""
    for folder in checkpoints(run_dir):
        error = checkpoint_error(folder)
        if not error:
            return folder
        log.warning("%s: ignored: %s", folder, error)
    return None


def find_checkpoint(name: str, run_dir: Path) -> Path:
    """Return the checkpoint that --resume_from_checkpoint names, by its path or as "latest".

    "latest" is the newest checkpoint of the run that is intact; damaged ones are skipped with a
    warning. Raise FileNotFoundError if there is none, and ValueError for the path of a damaged one.
    """
    if name == "latest":
        newest = newest_intact_checkpoint(run_dir)
        if newest is None:
            raise FileNotFoundError(
                f"{run_dir}: no complete checkpoint; --resume_from_checkpoint auto starts the run "
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


# ---- the run that is in the directory already ---------------------------------------------------


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


def config_diff(run_dir: Path, config: dict, report: dict) -> dict[str, str]:
    """Compare the run in `run_dir` with a new configuration and data report.

    Return a dictionary with a sentence for every difference, {key: "key: was ..., is ..."}. It is
    empty if both describe the same run.
    """
    old = flatten(_read_run_file(run_dir / CONFIG_FILE))
    new = flatten(config)
    old_report = _read_run_file(run_dir / DATA_REPORT_FILE)
    new_report = dict(report)
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


def steps_chosen_before(run_dir: Path, config: dict, report: dict) -> int | None:
    """Return the number of steps of this run if it was started before, else None.

    A run with training.max_minutes times a few steps only once. Its length then stays the same,
    however fast the machine is when it is resumed.
    """
    if not all((run_dir / name).is_file() for name in (CONFIG_FILE, DATA_REPORT_FILE)):
        return None
    free = {*FREE_ON_RESUME, *CHANGEABLE}
    if config_diff(run_dir, config, report).keys() - free:
        return None
    return _read_run_file(run_dir / CONFIG_FILE)["training"].get("max_steps")


def check_output_dir(run_dir: Path, teachers: Sequence[str]) -> None:
    """Raise ValueError if the run would overwrite one of its teachers or files of the user's.

    A directory whose name is not UTF-8 is refused too, because no tokenizer can be saved there.
    """
    check_utf8(run_dir)
    for teacher in teachers:
        if Path(teacher).resolve().is_relative_to(run_dir.resolve()):
            raise ValueError(
                f"{teacher}: this teacher (distillation.teachers) is in the run's output directory "
                f"{run_dir}, whose files the run replaces; choose another --model_name"
            )
    is_run = (run_dir / CONFIG_FILE).is_file()
    # a process that was killed while it wrote its first file leaves a temporary folder
    ours = (LOCK_FILE, OWNER_FILE, DATA_REPORT_FILE, STATUS_FILE)
    is_empty = {path.name for path in run_dir.glob("*")} <= {
        *ours,
        *(draft.name for draft in drafts(run_dir)),
    }
    check_replaceable(run_dir, is_run or is_empty, "choose another --model_name")


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
    has_results = any((run_dir / name).exists() for name in RESULTS)
    intact = None
    if resume in (None, "auto") and not overwrite:
        intact = newest_intact_checkpoint(run_dir)
    if resume == "auto":
        resume = str(intact) if intact else None
        if not intact and not has_results:
            return None
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

    if overwrite or not (intact or milestones(run_dir) or has_results):
        return None
    changes = config_diff(run_dir, config, report)
    state = ", ".join(changes.values()) or "same configuration, not finished"
    remedies = ["--overwrite to replace it", "or choose another --model_name"]
    if intact and changes.keys() <= FREE_ON_RESUME:
        remedies.insert(0, "--resume_from_checkpoint latest to resume it")
    raise ValueError(f"{run_dir} holds another run ({state}); add {', '.join(remedies)}")


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
    first = {"step": 0, **_settings(_read_run_file(run_dir / CONFIG_FILE), old_report)}
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


def check_checkpoint_step(checkpoint: Path | None, steps: int) -> None:
    """Raise ValueError if a checkpoint is from a later step than the last one of this run."""
    if checkpoint and checkpoint_step(checkpoint) > steps:
        raise ValueError(
            f"{checkpoint} is past the last step of this run, {steps}; train for more, or {RETRAIN}"
        )


def start_run_dir(run_dir: Path, config: dict, report: dict, checkpoint: Path | None) -> None:
    """Record what is trained, before the first step, and delete the results of an earlier run.

    A new run deletes all earlier checkpoints. A resumed run keeps its milestones, and its
    checkpoints up to `checkpoint`; it deletes the later ones, because its steps may differ from
    here on. Damaged ones are not deleted but renamed, so that somebody can look at them. Event
    files of TensorBoard always go, because a resumed run writes its earlier rows again.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (*RESULTS, *MEASURED):
        (run_dir / name).unlink(missing_ok=True)
    if checkpoint is None:
        outdated = [*checkpoints(run_dir), *milestones(run_dir)]
        (run_dir / WANDB_ID_FILE).unlink(missing_ok=True)
    else:
        step = checkpoint_step(checkpoint)
        outdated = [folder for folder in checkpoints(run_dir) if checkpoint_step(folder) > step]
    shutil.rmtree(run_dir / TENSORBOARD_DIR, ignore_errors=True)
    for folder in outdated:
        if checkpoint and checkpoint_error(folder):
            _set_aside(folder)
        else:
            shutil.rmtree(folder)
    for draft in drafts(run_dir):  # of a process that was killed: the lock is ours
        shutil.rmtree(draft, ignore_errors=True)
    # the configuration first: it marks the directory as that of a run
    write_text(run_dir / CONFIG_FILE, format_yaml(config))
    write_json(run_dir / DATA_REPORT_FILE, report)


def _set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint to damaged-<name>, replacing an earlier one of that name."""
    target = folder.with_name(f"damaged-{folder.name}")
    if target.is_dir():
        shutil.rmtree(target)
    folder.rename(target)
    log.warning("%s: renamed to %s", folder, target.name)


# ---- other models -------------------------------------------------------------------------------


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


def check_teacher_exists(folder: str) -> None:
    """Raise FileNotFoundError if a teacher is missing, with the command that trains it."""
    if is_model(folder):
        return
    config = Path("config", f"{Path(folder).name}.yaml")
    command = f"python train.py --config FILE --model-name {Path(folder).name}"
    if (ROOT / config).is_file():
        command = f"python train.py --config {config}"
    raise FileNotFoundError(
        f"{folder}: no trained model here (distillation.teachers): it needs config.json and "
        f".safetensors weights; train it first: {command}"
    )
