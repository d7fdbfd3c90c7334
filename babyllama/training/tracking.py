"""Send what a run records to Weights & Biases and TensorBoard.

    with open_trackers(config, run_dir, run_hyperparameters(config, plan, report)) as trackers:
        run_log = RunLog(..., trackers=trackers)  # sends each row of metrics.jsonl
        ...
        for tracker in trackers:
            tracker.log_results(metrics, figures)

Both get the same: the configuration and what follows from it, every row of metrics.jsonl, and the
results of training_metrics.json with samples and figures. Other trackers, which logging.report_to
names, are served by Trainer's own callbacks.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from babyllama import distributed
from babyllama.config import flatten
from babyllama.files import describe_environment, write_text
from babyllama.runs.run_dir import BENCHMARK_PREFIX, TENSORBOARD_DIR, WANDB_ID_FILE

log = logging.getLogger(__name__)


# ---- before the run -----------------------------------------------------------------------------


def check_trackers(settings: dict[str, Any]) -> None:
    """Raise ValueError if a tracker of the logging section is not installed."""
    for package in ("wandb", "tensorboard"):
        spec = find_spec(package) if settings[package] else None
        # a folder of that name, such as W&B writes, is a spec without an origin
        if settings[package] and (spec is None or spec.origin is None):
            raise ValueError(
                f"logging.{package}: true, but {package} is not installed: "
                "pip install -r requirements.txt"
            )
    if settings["report_to"]:
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            for make_callback in get_reporting_integration_callbacks(settings["report_to"]):
                make_callback()
        # not installed, or unknown to Trainer
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"logging.report_to: {error}") from None


def run_hyperparameters(config: dict, plan: dict, report: dict) -> dict[str, Any]:
    """Return what a tracker records about a run: the sections of its configuration and more.

    `plan` holds the derived numbers, such as the steps of warm-up, and `report` the hashes of the
    text.
    """
    return {**config, "plan": plan, "data_report": report, "environment": describe_environment()}


# ---- what is sent -------------------------------------------------------------------------------


def row_scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics.jsonl, grouped for a tracker by the part before "/".

    eval_loss becomes eval/loss, and loss becomes train/loss. A benchmark has its own group already.
    """
    scalars = {}
    for key, value in row.items():
        if not isinstance(value, int | float) or key == "step":
            continue
        if key.startswith("eval_"):
            key = f"eval/{key.removeprefix('eval_')}"
        elif not key.startswith(BENCHMARK_PREFIX):
            key = f"train/{key}"
        scalars[key] = value
    return scalars


def final_scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers in the results of training_metrics.json: final/eval_loss and so on."""
    results = flatten({"final": metrics["results"]}, "/")
    return {key: value for key, value in results.items() if isinstance(value, int | float)}


# ---- the trackers -------------------------------------------------------------------------------


@contextlib.contextmanager
def open_trackers(config: dict, run_dir: Path, hyperparameters: dict[str, Any]) -> Iterator[list]:
    """Start the trackers that a configuration asks for, in the main process, and close them."""
    settings = config["logging"]
    trackers = []
    failed = True
    try:
        if settings["wandb"] and distributed.is_main():
            trackers.append(WandbTracker(config, run_dir, hyperparameters))
        if settings["tensorboard"] and distributed.is_main():
            trackers.append(TensorBoardTracker(run_dir, hyperparameters))
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)


class WandbTracker:
    """Log to Weights & Biases, or to files that `wandb sync` uploads if the user is not logged in.

    The run keeps its id in the run directory, so that a resumed run continues it.
    """

    def __init__(self, config: dict, run_dir: Path, hyperparameters: dict[str, Any]):
        import wandb

        self.wandb = wandb  # imported here, because only runs that switch it on need it
        id_file = run_dir / WANDB_ID_FILE
        options = {
            "project": config["logging"]["project"],
            "name": config["model"]["name"],
            "dir": run_dir,
            "config": hyperparameters,
            "id": id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None,
        }
        mode = wandb.setup().settings.mode  # of WANDB_MODE, or of `wandb offline`
        self.run = None
        if mode == "online":
            self.run = self._start_online(options)
            mode = "offline"
        self.run = self.run or wandb.init(**options, mode=mode)
        if not self.run.disabled:
            write_text(id_file, self.run.id + "\n")
        self.samples = []  # (step, text)

    def _start_online(self, options: dict[str, Any]) -> Any:
        """Return a run that is uploaded, or None if that is not possible, with a warning."""
        try:
            # never asks for a key
            if self.wandb.login(prompt=False, verify=False):
                return self.wandb.init(**options, mode="online", resume="allow")
            reason = "not logged in (wandb login)"
        except self.wandb.Error as error:
            reason = str(error).partition("\n")[0]
        folder = options["dir"] / "wandb"
        log.warning("wandb: %s; logging to files in %s, which wandb sync uploads", reason, folder)
        return None

    def log_row(self, row: dict[str, Any]) -> None:
        """Log a row, unless W&B has it already from before a resume."""
        samples = [(row["step"], text) for text in row.get("samples", ())]
        self.samples += samples
        if row["step"] < self.run.step:
            return
        values = row_scalars(row)
        if samples:
            values["samples"] = self.wandb.Table(columns=["step", "text"], data=self.samples)
        self.run.log(values, step=row["step"])

    def log_results(self, metrics: dict[str, Any], figures: list[Path]) -> None:
        """Put scores, samples and figures into the summary of the run."""
        samples = [[text] for text in metrics["samples"]]
        media = {figure.stem: self.wandb.Image(str(figure)) for figure in figures}
        self.run.log({"final/samples": self.wandb.Table(columns=["text"], data=samples), **media})
        self.run.summary.update(final_scalars(metrics))

    def close(self, failed: bool) -> None:
        """Write or upload what is left, and mark the run as finished or failed."""
        self.run.finish(exit_code=int(failed))


class TensorBoardTracker:
    """Write event files into the run directory: `tensorboard --logdir models` shows all runs.

    A resumed run writes its curves from the beginning, because RunLog sends it all rows.
    """

    def __init__(self, run_dir: Path, hyperparameters: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run_dir / TENSORBOARD_DIR)
        self.step = 0
        self._add_text("config", json.dumps(hyperparameters, indent=2))

    def log_row(self, row: dict[str, Any]) -> None:
        """Write the numbers and samples of a row."""
        self.step = row["step"]
        self._add_scalars(row_scalars(row))
        for number, text in enumerate(row.get("samples", ()), 1):
            self._add_text(f"samples/{number}", text)

    def log_results(self, metrics: dict[str, Any], figures: list[Path]) -> None:
        """Write the final scores, samples and figures."""
        from babyllama.plots import read_picture

        self._add_scalars(final_scalars(metrics))
        for number, text in enumerate(metrics["samples"], 1):
            self._add_text(f"final_samples/{number}", text)
        for figure in figures:
            picture = read_picture(figure)
            self.writer.add_image(figure.stem, picture, self.step, dataformats="HWC")

    def _add_scalars(self, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, self.step)

    def _add_text(self, name: str, text: str) -> None:
        # TensorBoard reads Markdown; an indented block keeps the text as it is
        self.writer.add_text(name, "    " + text.replace("\n", "\n    "), self.step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()
