"""Compute the numbers of a run before step 0: parameters, tokens, steps, words, operations.

All of them follow from the configuration, the model and the text. execution.py decides how the
machine will compute the run, and printout.py prints both.
"""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from babyllama import distributed
from babyllama.runs.checkpoints import KEPT_CHECKPOINTS, checkpoint_words, checkpoints, milestones
from babyllama.schema import MAX_EPOCHS
from babyllama.training import optimizers
from babyllama.training.steps import Steps

log = logging.getLogger(__name__)

# Repeating a text up to four times teaches almost as much as new text (Muennighoff et al. 2023).
# Beyond that a run should forget what it memorizes: published recipes do so over 0.2 to 4 epochs.
FEW_EPOCHS = 4
MAX_DECAY_EPOCHS = 5


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run, as training_metrics.json has them.

    `flops_per_token` counts 2 operations per weight in the forward pass, 4 in the backward pass,
    and causal attention.
    """

    parameters: int
    parameters_without_embeddings: int
    processes: int
    tokens_per_step: int
    steps: int
    warmup_steps: int
    epochs: float
    words: int  # in all epochs, as are the tokens
    tokens: int
    flops_per_token: int
    decay_steps: float | None  # over which the weights forget; None without weight decay
    decay_epochs: float | None
    optimizer_flops_per_step: int
    checkpoint_bytes: int
    loss: str  # its formula


def make_plan(config: dict, model, report: dict, n_chunks: int) -> Plan:
    """Return the derived numbers of a run over `n_chunks` chunks.

    `report` is the data report, whose `train` part holds the numbers of words and tokens.
    """
    training = config["training"]
    seq_length = config["data"]["seq_length"]
    processes = distributed.world_size()
    chunks_per_step = training["batch_size"] * training["gradient_accumulation_steps"] * processes

    counts = report["train"]

    # count the steps: all epochs, or fewer if training.max_steps says so
    layout = Steps(n_chunks, training, report.get("history", ()))
    steps = layout.total
    chunks = int(layout.chunks_seen[steps])
    decay_steps = optimizers.decay_steps(training)
    decay_epochs = decay_steps and decay_steps * chunks_per_step / n_chunks
    is_length_known = training["max_steps"] or not training["max_minutes"]
    if is_length_known:
        _warn_about_length(training, layout, decay_epochs)

    # count the operations: a token attends to T / 2 others on average, once for the scores and once
    # for the values, so attention costs as much as T x hidden_size more weights in each layer
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    weights = sum(layer.weight.numel() for layer in layers)
    attention = config["model"]["n_layer"] * config["model"]["hidden_size"] * seq_length
    return Plan(
        parameters=model.num_parameters(),
        parameters_without_embeddings=model.num_parameters(exclude_embeddings=True),
        processes=processes,
        tokens_per_step=chunks_per_step * seq_length,
        steps=steps,
        warmup_steps=optimizers.warmup_steps(training, steps),
        epochs=round(chunks / n_chunks, 4),
        words=round(counts["words"] / counts["tokens"] * chunks * seq_length),
        tokens=chunks * seq_length,
        flops_per_token=6 * (weights + attention),
        decay_steps=decay_steps,
        decay_epochs=decay_epochs,
        optimizer_flops_per_step=optimizers.flops_per_step(model, training),
        checkpoint_bytes=checkpoint_bytes(model, training),
        loss=describe_loss(config.get("distillation")),
    )


def _warn_about_length(training: dict, layout: Steps, decay_epochs: float | None) -> None:
    """Warn if max_steps, warm-up or weight decay do not fit the length of the run."""
    steps = layout.total
    epochs = int(layout.chunks_seen[steps]) / layout.n_chunks
    if (training["max_steps"] or 0) > layout.available:
        log.warning(
            "training.max_steps: %d, but %d epochs have only %d steps; raise training.num_epochs",
            training["max_steps"],
            training["num_epochs"],
            layout.available,
        )
    if training["warmup_steps"] >= steps:
        log.warning(
            "training.warmup_steps: %d, but the run has only %d steps: the learning rate never "
            "reaches training.lr",
            training["warmup_steps"],
            steps,
        )
    if decay_epochs and epochs > FEW_EPOCHS and decay_epochs > MAX_DECAY_EPOCHS:
        log.warning(
            "training.weight_decay: with %g, weights forget over %.3g epochs, so decay hardly "
            "limits what this run of %.3g epochs memorizes; they forget over 2 epochs with %.3g",
            training["weight_decay"],
            decay_epochs,
            epochs,
            training["weight_decay"] * decay_epochs / 2,
        )


def count_evaluations(config: dict, plan: Plan) -> int:
    """Return at how many steps a run is evaluated or saves one of BabyLM's checkpoints, at most."""
    eval_steps = config["training"]["eval_steps"]
    # a run is evaluated after its last step too
    count = math.ceil(plan.steps / eval_steps if eval_steps else plan.epochs)
    return count + count_milestones(config, plan)


def count_milestones(config: dict, plan: Plan) -> int:
    """Return how many of BabyLM's checkpoints a run saves, at most."""
    if "babylm" not in config:
        return 0
    targets = checkpoint_words(config["babylm"]["track"])
    count = sum(words <= plan.words for words in targets)
    # the end of ten epochs of a smaller text is the last one (BabyLMCallback.due_step)
    is_complete = plan.epochs == MAX_EPOCHS and count == len(targets) - 1
    return count + is_complete


def checkpoint_bytes(model, training: dict[str, Any]) -> int:
    """Return the size of a checkpoint: weights, optimizer state and, if any, moving average."""
    copies = 2 if training["ema"] else 1
    elements = copies * model.num_parameters() + optimizers.state_elements(model, training)
    return 4 * elements


def check_disk_space(config: dict, plan: Plan, run_dir: Path) -> None:
    """Raise OSError if the disk of a run cannot hold what the run will have on it at its fullest.

    That is one checkpoint more than are kept, because an old one is deleted only when the new one
    is complete, the final model, and BabyLM's checkpoints. The run replaces those that are there.
    """
    n_checkpoints = KEPT_CHECKPOINTS + 1
    if config["training"]["early_stopping_patience"]:
        n_checkpoints += 1  # the best one
    n_models = 1 + count_milestones(config, plan)
    needed = n_checkpoints * plan.checkpoint_bytes + n_models * 4 * plan.parameters
    folders = [*checkpoints(run_dir), *milestones(run_dir)]
    replaced = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    disk = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if free + replaced < needed:
        raise OSError(
            f"{run_dir}: the run needs {needed:,} bytes ({n_checkpoints} checkpoints of "
            f"{plan.checkpoint_bytes:,} and {n_models} x the model), and the disk has "
            f"{free + replaced:,} free; make room, or set logging.output_dir to another disk"
        )


def describe_loss(distillation: dict | None) -> str:
    """Return the formula of the training loss as one line of text."""
    if distillation is None:
        return "cross-entropy"
    alpha = distillation["alpha"]
    temperature = distillation["temperature"]
    cached = ""
    if distillation["cache"] == "top_k":
        cached = f", {distillation['top_k']} tokens of each position from a cache"
    return (
        f"{alpha:g} x cross-entropy + {1 - alpha:g} x {temperature:g}^2 x KL at temperature "
        f"{temperature:g} from the average of the teachers' {distillation['average']} "
        f"(reduction {distillation['reduction']}{cached})"
    )
