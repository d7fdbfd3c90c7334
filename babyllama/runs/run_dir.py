"""Lay out the directory of a run: the names of its files, and which of them a new run replaces.

The layout:

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

import shutil
from collections.abc import Sequence
from pathlib import Path

from babyllama.config import format_yaml
from babyllama.files import check_replaceable, check_utf8, drafts, write_json, write_text
from babyllama.runs.checkpoints import (
    checkpoint_error,
    checkpoint_step,
    checkpoints,
    milestones,
    set_aside,
)

CONFIG_FILE = "training_config.yaml"
DATA_REPORT_FILE = "data_report.json"
LOG_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
METRICS_FILE = "training_metrics.json"
CURVES_FILE = "training_curves.png"
COMPLIANCE_FILE = "compliance.json"
WANDB_ID_FILE = "wandb_run_id.txt"  # so that a resumed run continues its W&B run
TENSORBOARD_DIR = "tensorboard"  # event files
BENCHMARK_PREFIX = "benchmark/"  # of the scores of training.benchmark: benchmark/<task>
RETRAIN = "retrain with --overwrite or another --model-name"

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


def check_output_dir(run_dir: Path, teachers: Sequence[str]) -> None:
    """Raise ValueError if the run would overwrite one of its teachers or files of the user's.

    A directory whose name is not UTF-8 is refused too, because no tokenizer can be saved there.
    """
    check_utf8(run_dir)
    for teacher in teachers:
        if Path(teacher).resolve().is_relative_to(run_dir.resolve()):
            raise ValueError(
                f"{teacher}: this teacher (distillation.teachers) is in the run's output directory "
                f"{run_dir}, whose files the run replaces; choose another --model-name"
            )
    # the lock and the drafts of a process that was killed are hidden
    visible = {path.name for path in run_dir.glob("[!.]*")}
    is_ours = CONFIG_FILE in visible or visible <= {DATA_REPORT_FILE, STATUS_FILE}
    check_replaceable(run_dir, is_ours, "choose another --model-name")


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
            set_aside(folder)
        else:
            shutil.rmtree(folder)
    for draft in drafts(run_dir):  # of a process that was killed: the lock is ours
        shutil.rmtree(draft, ignore_errors=True)
    # the configuration first: it marks the directory as that of a run
    write_text(run_dir / CONFIG_FILE, format_yaml(config))
    write_json(run_dir / DATA_REPORT_FILE, report)
