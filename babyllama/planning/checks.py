"""Find what would go wrong with a run before it starts: missing inputs, wrong flags, leaked text.

The configuration itself has been checked before (babyllama/config.py). Unless Trainer's own
trackers are used, a single process imports no torch here, so that the user learns of a mistake
within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from pathlib import Path

from babyllama import distributed
from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.evaluation.tasks import TASKS
from babyllama.files import ROOT
from babyllama.model_dir import is_model
from babyllama.problems import ConfigError, did_you_mean_path, seen_from
from babyllama.runs.resume import CHANGEABLE
from babyllama.runs.run_dir import check_output_dir
from babyllama.training.tracking import check_trackers

log = logging.getLogger(__name__)


def check_inputs(config: dict) -> None:
    """Check that the texts, the tokenizer, the teachers and the benchmark exist.

    If something is missing, raise FileNotFoundError with the command that creates it.
    """
    data = config["data"]
    tokenizer = data["tokenizer_path"]
    vocabulary = config["model"]["vocab_size"]

    # the texts
    for key in ("train_path", "eval_path"):
        if not Path(data[key]).exists():
            folder = Path(data["train_path"]).parent
            size = "100m" if config.get("babylm", {}).get("track") == "strict" else "10m"
            command = (
                f"python prepare_data.py --babylm-{size} DIR --babylm-dev DIR "
                f"--output-dir {folder} --tokenizer-output {tokenizer}"
            )
            if vocabulary:
                command += f" --tokenizer-vocab {vocabulary}"
            if folder == Path("data/synthetic"):
                command = "python create_synthetic_data.py --num-tokens 300000"
            raise FileNotFoundError(
                f"{data[key]} not found (data.{key}){seen_from(data[key])}: prepare the text "
                f"first: {command}{did_you_mean_path(data[key])}"
            )

    # the tokenizer
    if not Path(tokenizer).exists():
        command = f"python train_tokenizer.py --data-dir {data['train_path']} --output {tokenizer}"
        if vocabulary:
            command += f" --vocab-size {vocabulary}"
        raise FileNotFoundError(
            f"{tokenizer} not found (data.tokenizer_path){seen_from(tokenizer)}: train a tokenizer "
            f"first: {command}{did_you_mean_path(tokenizer)}"
        )

    # the teachers and the benchmark
    for teacher in config.get("distillation", {}).get("teachers", ()):
        check_teacher_exists(teacher)
    if config["training"]["benchmark"]:
        check_item_tasks(config["training"]["benchmark"])


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


def check_item_tasks(path: str) -> None:
    """Raise ConfigError if a task of training.benchmark does not score items."""
    problems = [
        f"tasks.{name}: {task.type} cannot be scored while a model trains; use tasks that compare "
        f"candidates ({', '.join(TASKS)})"
        for name, task in load_tasks(path).items()
        if task.type not in TASKS
    ]
    if problems:
        raise ConfigError(problems, path)


def check_request(args: argparse.Namespace, config: dict, run_dir: Path) -> None:
    """Raise ValueError if the flags contradict each other, the directory or the machine."""
    if args.overwrite and args.resume_from_checkpoint:
        raise ValueError("--overwrite starts over, --resume-from-checkpoint continues; choose one")
    check_allowed_changes(args, config)
    check_output_dir(run_dir, config.get("distillation", {}).get("teachers", ()))
    check_trackers(config["logging"])
    if config["training"]["fsdp"]:
        require_gpus()


def require_gpus() -> None:
    """Check that training.fsdp has GPUs and processes to shard the model over.

    Raise ValueError on CPUs: accelerate's FSDP shards nothing there, so every process would hold
    the complete model. Warn if there is only one process.
    """
    if distributed.world_size() == 1:
        log.warning("training.fsdp: true has no effect in one process (docs/scaling.md)")
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError("training.fsdp: true needs one GPU per process; omit it on CPUs")


def check_allowed_changes(args: argparse.Namespace, config: dict) -> None:
    """Raise ValueError if --allow-change names a key that a resumed run cannot change."""
    allowed = args.allow_change or ()
    if allowed and not args.resume_from_checkpoint:
        raise ValueError("--allow-change needs --resume-from-checkpoint")
    for key in allowed:
        if key not in CHANGEABLE:
            raise ValueError(
                f"--allow-change {key}: a resumed run can only change {', '.join(CHANGEABLE)}"
            )
    if "processes" in allowed and config["training"]["fsdp"]:
        raise ValueError("--allow-change processes: not with training.fsdp, which shards the model")


def warn_about_leaks(report: dict) -> None:
    """Warn if a held-out file is also a training file.

    The model has then seen the text it is tested on, and the scores are too good to be true. Empty
    files are all equal, so they do not count.
    """
    empty = hashlib.sha256(b"").hexdigest()
    train_files = {source["sha256"]: source["file"] for source in report["train"]["sources"]}
    train_files.pop(empty, None)
    for source in report["validation"]["sources"]:
        if source["sha256"] in train_files:
            train_file = train_files[source["sha256"]]
            log.warning(
                "%s: held-out text is training text too: %s. The held-out scores will look better "
                "than they should",
                source["file"],
                train_file,
            )
