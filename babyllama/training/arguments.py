"""Translate a configuration into Hugging Face's TrainingArguments.

The comments explain the defaults that we change. LMTrainer itself adds early stopping and gradient
checkpointing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from babyllama import distributed
from babyllama.config import flatten


def training_arguments(config: dict[str, Any], run_dir: Path, precision: str) -> TrainingArguments:
    """Return the TrainingArguments of a run."""
    training = config["training"]
    early_stopping = training["early_stopping_patience"] is not None
    n_workers = training["dataloader_num_workers"]
    # early stopping goes back to the best evaluation, so every evaluated model must be on disk
    save_steps = training["eval_steps"] if early_stopping else training["save_steps"]
    if precision == "fp32":
        # a launcher may have set another precision here, which would win over the arguments
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = RunArguments(
        output_dir=str(run_dir),
        run_name=config["model"]["name"],
        # steps
        learning_rate=training["lr"],
        per_device_train_batch_size=training["batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        num_train_epochs=training["num_epochs"],  # LMTrainer stops after training.max_steps
        max_grad_norm=training["max_grad_norm"],
        # the machine
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        fsdp=training["fsdp"] and distributed.world_size() > 1,
        fsdp_config={"version": 2},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # data
        seed=training["seed"],
        # the sampler adds the epoch to the seed, so epoch 1 of seed 42 would have the order of
        # epoch 0 of seed 43
        data_seed=training["seed"] * 1000,
        dataloader_num_workers=n_workers,
        # persistent workers are copies of the dataset that would keep the first epoch's offset
        dataloader_persistent_workers=n_workers > 0 and not config["data"]["random_offset"],
        remove_unused_columns=False,
        # logging
        logging_steps=training["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the default logs a NaN loss as 0
        disable_tqdm=True,
        report_to=config["logging"]["report_to"],
        project=config["logging"]["project"] or "babyllama",
        # evaluation and checkpoints
        eval_strategy="steps" if training["eval_steps"] else "epoch",
        eval_steps=training["eval_steps"],
        per_device_eval_batch_size=training["batch_size"],
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        save_total_limit=None,  # rotate_checkpoints deletes old ones: Trainer would go by mtime
        load_best_model_at_end=early_stopping,
        # restores how many evaluations passed without improvement
        restore_callback_states_from_checkpoint=early_stopping,
        # with a metric Trainer protects the best checkpoint, and deletes a later one instead
        metric_for_best_model="eval_loss" if early_stopping else None,
        greater_is_better=False if early_stopping else None,
        # Trainer writes this into config.json; our forward passes turn the cache off themselves
        use_cache=True,
    )
    arguments.hyperparameters = config  # train.py adds the plan
    return keep_one_gpu(arguments)


class RunArguments(TrainingArguments):
    """Describe a run to Trainer's trackers by our configuration.

    The optimizer and the schedule are ours (optimizers.py), so Trainer's values for them, such as
    weight_decay, are defaults that are not used.
    """

    hyperparameters: ClassVar[dict[str, Any]] = {}

    def to_dict(self) -> dict[str, Any]:
        return flatten(self.hyperparameters)


def keep_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """Return the arguments, changed so that one process uses one GPU.

    Trainer would split each batch over all GPUs, and batch_size would change its meaning.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
