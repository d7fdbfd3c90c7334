"""Train on full chunks with Hugging Face's Trainer, corrected where it misreports or loses work.

What is corrected, as read in transformers' source: the stock loss under gradient accumulation and
the stock eval_loss are means of batch means; NaN losses are logged as 0; a checkpoint is written
in place, with no mark that it is complete. Models are built and configurations read elsewhere
(train.py).
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from babyllama.evaluation.generation import generate
from babyllama.training import distributed
from babyllama.training.cuda_graphs import CudaGraphStep
from babyllama.training.loss import NextTokenLoss, prepare_for_chunks
from babyllama.training.optimizers import WeightAverage, make_optimizer, schedule
from babyllama.training.run_dir import seal_checkpoint

log = logging.getLogger(__name__)
EVALUATION_LOGITS = 2**27  # in memory at a time: 0.5 GB in float32
AVERAGE_FILE = "average.safetensors"  # in a checkpoint: the moving average of the weights


class TrainingError(ValueError):
    """The run cannot continue; the message says what to change."""

    on_all_ranks = True


# ---- data ---------------------------------------------------------------------------------------


def collate_chunks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return input_ids and labels (B, T) int64 of full chunks.

    The first label is -100: nothing predicts that token, and Trainer counts the labels to weigh
    accumulated batches. Chunks have no padding, so there is no attention mask.
    """
    ids = np.stack([np.asarray(row["input_ids"]) for row in rows])
    input_ids = torch.from_numpy(ids.astype(np.int64))
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


class ShiftedChunks(TrainerCallback):
    """Cut chunks at another offset in each epoch: each row spans two chunks.

    The offset (0 to T - 1) depends on the seed and the epoch alone, so a resumed run cuts as the
    first.
    """

    def __init__(self, chunks, seed: int):
        self.chunks = chunks
        self.seed = seed
        self.offset = 0
        self.length = len(chunks[0]["input_ids"])

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.offset = self.offset_in(int((state.epoch or 0) + 1e-6))

    def offset_in(self, epoch: int) -> int:
        return int(np.random.default_rng((self.seed, epoch)).integers(self.length))

    def __len__(self) -> int:
        return len(self.chunks) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """Return the rows of a batch for DataLoader. Reading row by row takes 9 times as long."""
        neighbours = np.repeat(indices, 2) + np.tile([0, 1], len(indices))
        pairs = np.asarray(self.chunks[neighbours.tolist()]["input_ids"])
        pairs = pairs.reshape(len(indices), 2 * self.length)
        return [{"input_ids": pair[self.offset : self.offset + self.length]} for pair in pairs]


# ---- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_chunks(
    model,
    chunks,
    byte_lengths: torch.Tensor,
    batch_size: int,
    mask_from: int | None = None,
    across_ranks: bool = False,
) -> dict[str, float]:
    """Return the loss of a model on full chunks, from sums: the batch size does not matter.

    Each token but a chunk's first is predicted from the tokens before it in the chunk or, with
    `mask_from` (the id of BOS), in its document. `byte_lengths` (V,) holds the UTF-8 bytes of each
    token. With `across_ranks`, each process takes its share of the chunks, and all return the same
    sums.

    Returns:
        loss: nats per predicted token
        perplexity: exp(loss)
        bits_per_byte: all nats, those of </s> included, over log 2 and `bytes`
        tokens, bytes: the number of predicted tokens, and of their UTF-8 bytes

    """
    was_training = model.training
    model.eval()
    loss = NextTokenLoss(dtype=torch.float32, mask_from=mask_from)

    # split the chunks into batches whose logits fit into memory
    chunk_logits = len(chunks[0]["input_ids"]) * model.config.vocab_size
    batch_size = min(batch_size, max(1, EVALUATION_LOGITS // chunk_logits))
    batches = {"batch_size": batch_size}
    across_ranks = across_ranks and 1 < distributed.world_size() <= len(chunks)
    if across_ranks:
        n_batches = distributed.batches_per_step(len(chunks), batch_size)
        batches = {"batch_sampler": distributed.split_for_rank(np.arange(len(chunks)), n_batches)}
    # DataLoader would draw from the global generator, and so change the dropout of later steps
    loader = DataLoader(chunks, collate_fn=collate_chunks, generator=torch.Generator(), **batches)

    nll = 0.0
    tokens = 0
    n_bytes = 0
    for batch in loader:
        input_ids = batch["input_ids"]
        nll += loss(model, input_ids.to(model.device)).item()
        tokens += input_ids[:, 1:].numel()
        n_bytes += byte_lengths[input_ids[:, 1:]].sum().item()
    model.train(was_training)
    if across_ranks:
        sums = torch.tensor([nll, tokens, n_bytes], dtype=torch.float64, device=model.device)
        nll, tokens, n_bytes = distributed.all_reduce_sum(sums).tolist()  # exact below 2**53
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700.0)),
        "bits_per_byte": nll / math.log(2) / n_bytes,
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }


# ---- the trainer --------------------------------------------------------------------------------


class LMTrainer(Trainer):
    """Train a language model on full chunks.

    `byte_lengths` (V,) is the number of UTF-8 bytes of each token, `training` the section of the
    configuration (optimizer, schedule, weight average) and `loss` the loss of a model and a batch.
    With `cuda_graphs`, full batches are recorded once and replayed (training/cuda_graphs.py).
    """

    def __init__(
        self,
        *args,
        byte_lengths: np.ndarray,
        training: dict[str, Any],
        loss: NextTokenLoss,
        cuda_graphs: bool = False,
        **kwargs,
    ):
        super().__init__(*args, data_collator=collate_chunks, **kwargs)
        prepare_for_chunks(self.model)
        self.byte_lengths = torch.as_tensor(byte_lengths)
        self.training = training
        self.loss = loss
        if distributed.world_size() > 1:
            self.loss = functools.partial(distributed.forward_through_wrapper, loss)
        self.mask_from = loss.mask_from
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the step
        self.model_accepts_loss_kwargs = True
        self._nonfinite_losses = torch.zeros((), device=self.args.device)

        # features of the training section
        if self.is_fsdp_enabled and (self.args.bf16 or self.args.fp16):
            # the default would also compute sums over tokens in half precision
            half = torch.bfloat16 if self.args.bf16 else torch.float16
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        if training["gradient_checkpointing"]:
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            enable = enable or self.model.gradient_checkpointing_enable  # in older releases
            enable({"use_reentrant": False})
        self.average = WeightAverage(self.model, training["ema"]) if training["ema"] else None
        self.graphs = None
        if cuda_graphs:
            batch_size = self.args.per_device_train_batch_size
            self.graphs = CudaGraphStep(
                self._loss_and_gradients, self.model.parameters(), batch_size
            )

        # callbacks
        self.remove_callback(PrinterCallback)  # RunLog prints the same in fewer words
        if training["early_stopping_patience"]:
            self.add_callback(EarlyStoppingCallback(training["early_stopping_patience"]))
        self.add_callback(_Intervals())
        if self.average:
            self.add_callback(_UpdateAverage(self.average))
        if isinstance(self.train_dataset, ShiftedChunks):
            self.add_callback(self.train_dataset)

    # -- a step --

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this batch's part of the step's loss, a mean over the step's predicted tokens.

        `num_items_in_batch` counts the predicted tokens of the step. DDP and FSDP average gradients
        over processes, which the factor undoes.
        """
        with self.accelerator.autocast():
            nll = self.loss(model, inputs["input_ids"])
        loss = nll / num_items_in_batch * self.accelerator.num_processes
        self._note_batch(loss.detach(), inputs["input_ids"].shape[1])
        return loss

    def _note_batch(self, loss: torch.Tensor, length: int) -> None:
        """Count the tokens seen, and the batches whose loss is NaN or infinite."""
        per_step = self.get_total_train_batch_size(self.args)
        chunks = distributed.chunks_after(
            self.state.global_step + 1, len(self.train_dataset), per_step
        )
        self.state.num_input_tokens_seen = chunks * length
        self._nonfinite_losses += ~torch.isfinite(loss)  # read when logging, to not wait for a GPU

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.graphs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        loss = self.graphs(inputs["input_ids"], num_items_in_batch)
        self._note_batch(loss, inputs["input_ids"].shape[1])
        return loss

    def _loss_and_gradients(self, input_ids: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Compute a batch's part of the step's loss and add its gradients (recorded as a graph)."""
        with self.accelerator.autocast():
            loss = self.loss(self.model, input_ids) / items
        loss.backward()
        return loss.detach()

    def floating_point_ops(self, inputs) -> int:
        """Return 0: Trainer would walk all modules per batch for a figure that nothing reads."""
        return 0

    def _run_epoch(self, *args, **kwargs):
        """Skip the epoch if a resumed run had ended: Trainer checks only after a step."""
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """Raise TrainingError for a NaN before anything is logged or saved."""
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate:
            # summed over processes, so that all of them stop at the same step
            nonfinite = distributed.all_reduce_sum(self._nonfinite_losses).item() > 0
            if grad_norm is not None and not self.args.fp16:  # fp16 skips steps with inf gradients
                nonfinite = nonfinite or not math.isfinite(float(grad_norm))
            if nonfinite:
                raise TrainingError(
                    "the loss or its gradient became NaN or infinite at or before step "
                    f"{self.state.global_step}; nothing was saved after it. Train again "
                    "(--overwrite) with a smaller --lr, a longer training.warmup_steps, or --bf16 "
                    "instead of --fp16"
                )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # -- data, optimizer, schedule --

    def get_train_dataloader(self) -> DataLoader:
        if distributed.world_size() == 1:
            return super().get_train_dataloader()
        return distributed.train_loader(self.train_dataset, self.args, self.data_collator)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.training)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            factor = schedule(self.training, num_training_steps)
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- evaluation --

    def evaluate(self, ignore_keys=None) -> dict[str, float]:
        started = time.perf_counter()
        model = self.average.module if self.average else self.model
        with self.accelerator.autocast():
            scores = evaluate_chunks(
                model,
                self.eval_dataset,
                self.byte_lengths,
                self.args.per_device_eval_batch_size,
                self.mask_from,
                across_ranks=True,
            )
        metrics = {f"eval_{key}": value for key, value in scores.items()}
        metrics["eval_seconds"] = time.perf_counter() - started
        self.log(metrics | {"samples": self._samples(model)})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _samples(self, model) -> list[str]:
        """Generate a text from nothing and one from held-out words, with the same seed."""
        if self.processing_class is None or self.is_fsdp_enabled or not distributed.is_main():
            return []
        first_words = self.processing_class.decode(
            self.eval_dataset[0]["input_ids"][1:9], skip_special_tokens=True
        )
        prompts = ["", first_words]
        continuations = generate(
            model,
            self.processing_class,
            prompts,
            max_new_tokens=20,
            temperature=0.8,
            seed=0,
            batch_size=1,  # no padding: the model's attention ignores padding masks
        )
        return [prompt + text for prompt, (text,) in zip(prompts, continuations, strict=True)]

    # -- saving and loading --

    def best_model(self) -> torch.nn.Module | None:
        """Return the model to evaluate and save: the average of the weights if there is one.

        All processes must call it. Under FSDP rank 0 gets a complete copy, the others None.
        """
        if not self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            return self.average.module if self.average else model
        weights = self.accelerator.get_state_dict(self.model)
        if not distributed.is_main():
            return None
        model = AutoModelForCausalLM.from_config(self.model.config)
        model.load_state_dict(weights)
        return model.to(self.args.device)

    def save_plain(self, folder: Path) -> None:
        """Write best_model as a model directory. All processes must call it; rank 0 writes."""
        if self.average is None:
            self.save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            self.average.module.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        distributed.barrier()  # each process writes the state of its random numbers
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.average:
                save_model(self.average.module, folder / AVERAGE_FILE)
            seal_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, folder) -> None:
        if self.average:
            load_model(self.average.module, Path(folder) / AVERAGE_FILE)
            self.average.begun = True  # the next update averages instead of copying


class _Intervals(TrainerCallback):
    """Log, evaluate and save at the steps of the configuration, also in a resumed run.

    Trainer would keep the intervals of the checkpoint. Each checkpoint and each evaluation gets a
    row in the log, so a resumed run continues the clock of its checkpoint.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if hasattr(state, "compute_steps"):  # older releases do this by themselves
            state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or control.should_evaluate

    on_epoch_end = on_step_end


class _UpdateAverage(TrainerCallback):
    """Add the weights to their moving average after each step."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update(model)


# ---- arguments ---------------------------------------------------------------------------------


def training_arguments(
    config: dict[str, Any], run_dir: Path, precision: str, steps: int = -1
) -> TrainingArguments:
    """Return the TrainingArguments of a configuration, for a run of `steps` steps in total.

    This is the only place where our keys become Trainer's. Comments mark the defaults that we
    override.
    """
    training = config["training"]
    early_stopping = training["early_stopping_patience"] is not None
    n_workers = training["dataloader_num_workers"]
    # with early stopping every evaluated model must be on disk
    save_steps = training["eval_steps"] if early_stopping else training["save_steps"]
    if precision == "fp32":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # a launcher may have set another
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        run_name=config["model"]["name"],
        # steps
        learning_rate=training["lr"],
        per_device_train_batch_size=training["batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        num_train_epochs=training["num_epochs"],
        max_steps=steps if training["max_steps"] else -1,
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
        # the sampler adds the epoch, so neighbouring seeds would share orders
        data_seed=training["seed"] * 1000,
        dataloader_num_workers=n_workers,
        # persistent workers would keep the offset of the first epoch
        dataloader_persistent_workers=n_workers > 0 and not config["data"]["random_offset"],
        remove_unused_columns=False,
        # logging
        logging_steps=training["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the default logs NaN as 0
        disable_tqdm=True,
        report_to=["wandb"] if config["logging"]["wandb"] else [],
        # evaluation and checkpoints
        eval_strategy="steps" if training["eval_steps"] else "epoch",
        eval_steps=training["eval_steps"],
        per_device_eval_batch_size=training["batch_size"],
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=early_stopping,
        restore_callback_states_from_checkpoint=early_stopping,  # the evaluations it has waited
        # without early stopping the best checkpoint would be kept instead of a later one
        metric_for_best_model="eval_loss" if early_stopping else None,
        greater_is_better=False if early_stopping else None,
        use_cache=True,  # written into config.json; the training forward passes False
    )
    if arguments.n_gpu > 1:
        # Trainer would split each batch over all GPUs, and batch_size would change its meaning
        arguments._n_gpu = 1
    return arguments
