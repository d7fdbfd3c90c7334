"""HF Trainer made honest: an exact loss, checkpoints that say whether they are whole, a NaN that stops the run.

What it changes, and why, was read in transformers' source: the stock loss under gradient accumulation and the stock
`eval_loss` are means of batch means; NaN losses are logged as 0; a checkpoint is written in place without a mark that
it is complete. It does not build models or read configs (train.py).
"""

from __future__ import annotations

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
from babyllama.training.loss import NextTokenLoss
from babyllama.training.optimizers import WeightAverage, make_optimizer, schedule
from babyllama.training.run_dir import seal_checkpoint

log = logging.getLogger(__name__)
EVALUATION_LOGITS = 2**27  # held at a time: 0.5 GB in float32
AVERAGE = "average.safetensors"  # the moving average of the weights, in a checkpoint


class TrainingError(ValueError):
    """The run cannot go on; the message says what to change."""

    on_all_ranks = True


# ---- data ---------------------------------------------------------------------------------------


def collate_chunks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Full chunks -> input_ids and labels (B, T) int64; no attention mask, so that attention stays purely causal.

    The first label is -100: nothing predicts it, and Trainer counts the labels to weigh accumulated batches.
    """
    ids = torch.from_numpy(
        np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64)
    )  # (B, T)
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


class ShiftedChunks(TrainerCallback):
    """Chunks cut at another offset in each epoch: row i is the end of chunk i and the beginning of chunk i + 1.

    The offset (0 to T - 1) is drawn from the seed and the epoch alone, so that a resumed run cuts as the first did.
    """

    def __init__(self, chunks, seed: int):
        self.chunks, self.seed, self.offset = chunks, seed, 0
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
        """The rows of a batch, which a DataLoader asks for, in one reading: row by row takes nine times as long."""
        two = np.asarray(
            self.chunks[[i + k for i in indices for k in (0, 1)]]["input_ids"]
        ).reshape(len(indices), -1)
        return [{"input_ids": row[self.offset : self.offset + self.length]} for row in two]


# ---- loss and evaluation ------------------------------------------------------------------------


@torch.no_grad()
def evaluate_chunks(
    model,
    chunks,
    byte_lengths: torch.Tensor,
    batch_size: int,
    mask_from: int | None = None,
    together: bool = False,
) -> dict[str, float]:
    """Loss of a model on full chunks, from sums, so that it does not depend on the batch size.

    Each token of a chunk but the first is predicted from those before it in the chunk, or, with `mask_from` (the id of
    BOS), from those before it in its document. Returns `loss` (nats per predicted token), `perplexity` (exp of it),
    `bits_per_byte` (all nats, those of </s> included, over log 2 and the UTF-8 bytes of the predicted tokens;
    `byte_lengths` (V,) gives each token's), `tokens` and `bytes`. With `together` all processes call this, each takes
    its share of the chunks, and all get the same sums.
    """
    was_training = model.training
    model.eval()
    nll, tokens, n_bytes = 0.0, 0, 0
    loss_of = NextTokenLoss(dtype=torch.float32, mask_from=mask_from)
    logits = (
        len(chunks[0]["input_ids"]) * model.config.vocab_size
    )  # of a chunk; all of a batch stand in memory
    batch_size = min(batch_size, max(1, EVALUATION_LOGITS // logits))
    how = {"batch_size": batch_size}
    if together := together and 1 < distributed.world_size() <= len(chunks):
        how = {
            "batch_sampler": distributed.split_for_rank(
                np.arange(len(chunks)), distributed.batches_per_step(len(chunks), batch_size)
            )
        }
    how["generator"] = (
        torch.Generator()
    )  # else an evaluation would move the global one on, and with it the dropout
    for batch in DataLoader(chunks, collate_fn=collate_chunks, **how):
        ids = batch["input_ids"].to(model.device)
        nll += loss_of(model, ids).item()
        tokens += ids[:, 1:].numel()
        n_bytes += int(byte_lengths[ids[:, 1:].cpu()].sum())
    model.train(was_training)
    if together:
        sums = torch.tensor([nll, tokens, n_bytes], dtype=torch.float64, device=model.device)
        nll, tokens, n_bytes = distributed.all_reduce_sum(
            sums
        ).tolist()  # counts are exact below 2**53
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll / math.log(2) / n_bytes,
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }


class LMTrainer(Trainer):
    """Trainer for full chunks.

    `byte_lengths` (V,) is the number of UTF-8 bytes that each token stands for, `training` the section of the
    configuration (optimizer, schedule, average of the weights), `loss` what turns a model and a batch into nats.
    """

    def __init__(
        self,
        *args,
        byte_lengths: np.ndarray,
        training: dict[str, Any],
        loss: NextTokenLoss,
        **kwargs,
    ):
        super().__init__(*args, data_collator=collate_chunks, **kwargs)
        self.remove_callback(PrinterCallback)  # RunLog tells the same in fewer words
        self.byte_lengths, self.training, self.loss = torch.as_tensor(byte_lengths), training, loss
        self.loss_is_scaled_for_ga = (
            True  # compute_loss divides by the tokens of the whole accumulated batch
        )
        self.model_accepts_loss_kwargs = True
        self._nonfinite = torch.zeros((), device=self.args.device)
        if self.is_fsdp_enabled and (
            self.args.bf16 or self.args.fp16
        ):  # else sums over tokens would be halved too
            half = torch.bfloat16 if self.args.bf16 else torch.float16
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        if training["early_stopping_patience"]:
            self.add_callback(EarlyStoppingCallback(training["early_stopping_patience"]))
        if training["gradient_checkpointing"]:
            older = "gradient_checkpointing_enable"  # the name in older releases
            enable = getattr(
                self.model, "activation_checkpointing_enable", getattr(self.model, older, None)
            )
            enable({"use_reentrant": False})
        self.add_callback(_Intervals())
        self.average = None
        if training["ema"]:
            self.average = WeightAverage(self.model, training["ema"])
            self.add_callback(_UpdateAverage(self.average))
        if isinstance(self.train_dataset, ShiftedChunks):
            self.add_callback(self.train_dataset)
        self.graphs = None
        if loss.recorded:
            self.graphs = CudaGraphStep(
                self._passes, self.model.parameters(), self.args.per_device_train_batch_size
            )

    def best_model(self) -> torch.nn.Module | None:
        """What is evaluated and saved in the end: the average of the weights where there is one, else the model.

        All processes call it. Where the model is sharded (FSDP) it is a whole copy, for rank 0 alone.
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
        """A model directory of what best_model is now. All processes call it; rank 0 writes."""
        if self.average is None:
            self.save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            self.average.module.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def get_train_dataloader(self) -> DataLoader:
        if distributed.world_size() == 1:
            return super().get_train_dataloader()
        return distributed.train_loader(self.train_dataset, self.args, self.data_collator)

    def _run_epoch(self, *args, **kwargs):
        """Nothing, where a resumed run had ended by its steps or by early stopping: Trainer looks only after a step."""
        waits = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in waits)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.training)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            factor = schedule(self.training, num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, factor
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs) -> int:
        return (
            0  # Trainer would walk all modules at each batch for a figure that nothing here reads
        )

    def batch_loss(self, model, inputs: dict[str, torch.Tensor], items) -> torch.Tensor:
        """This batch's part of a step's loss, which is the mean over the `items` predicted tokens of the whole step."""
        return distributed.forward_through_wrapper(model, self.loss, inputs["input_ids"]) / items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():
            loss = (
                self.batch_loss(model, inputs, num_items_in_batch) * self.accelerator.num_processes
            )
        self._note(loss.detach(), inputs["input_ids"].shape[1])
        return loss

    def _note(self, loss: torch.Tensor, length: int) -> None:
        """Count the tokens seen, and whether a batch's loss is a number."""
        per_step = self.get_total_train_batch_size(self.args)
        seen = distributed.chunks_after(
            self.state.global_step + 1, len(self.train_dataset), per_step
        )
        self.state.num_input_tokens_seen = seen * length
        self._nonfinite += ~torch.isfinite(
            loss
        )  # looked at only when logging: no wait for the device here

    def _passes(self, ids: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """A batch's part of a step's loss, with its gradients."""
        with self.accelerator.autocast():
            loss = self.batch_loss(self.model, {"input_ids": ids}, items)
        loss.backward()
        return loss.detach()

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.graphs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        loss = self.graphs(inputs["input_ids"], num_items_in_batch)
        self._note(loss, inputs["input_ids"].shape[1])
        return loss

    def evaluate(self, ignore_keys=None) -> dict[str, float]:
        started = time.perf_counter()
        model = self.average.module if self.average else self.model
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            sums = evaluate_chunks(
                model,
                self.eval_dataset,
                self.byte_lengths,
                batch_size,
                self.loss.mask_from,
                together=True,
            )
        metrics = {f"eval_{key}": value for key, value in sums.items()}
        metrics["eval_seconds"] = time.perf_counter() - started
        self.log(metrics | {"samples": self._samples(model)})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _samples(self, model) -> list[str]:
        """What the model makes of nothing and of the first words of the held-out text, the same draws each time."""
        if self.processing_class is None or self.is_fsdp_enabled or not distributed.is_main():
            return []
        opening = self.processing_class.decode(
            self.eval_dataset[0]["input_ids"][1:9], skip_special_tokens=True
        )
        made = generate(
            model, self.processing_class, ["", opening], max_new_tokens=20, temperature=0.8, seed=0
        )
        return [prompt + text for prompt, (text,) in zip(["", opening], made, strict=True)]

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        acts = self.control.should_log or self.control.should_save or self.control.should_evaluate
        bad_gradient = (
            not self.args.fp16
            and grad_norm is not None
            and acts
            and not math.isfinite(float(grad_norm))
        )
        nonfinite = (
            acts and distributed.all_reduce_sum(self._nonfinite).item()
        )  # all processes come to the same end
        if nonfinite or bad_gradient:  # fp16's loss scaler skips infinite gradients by itself
            raise TrainingError(
                f"the loss or its gradient became NaN or infinite at or before step {self.state.global_step}; nothing "
                "was saved after it. Train again (--overwrite) with a smaller --lr, a longer training.warmup_steps, or "
                "--bf16 instead of --fp16"
            )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        distributed.barrier()  # each process writes the state of its random numbers
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.average:
                save_model(self.average.module, folder / AVERAGE)
            seal_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, folder) -> None:
        if self.average:
            load_model(self.average.module, Path(folder) / AVERAGE)
            self.average.begun = True  # the next weights are averaged in, not copied


class _Intervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as its configuration says now, not as its checkpoint remembers.

    Each checkpoint and evaluation has its row in the log, which all processes gather; a resumed run goes on with the
    clock of its checkpoint's.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if hasattr(state, "compute_steps"):
            state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or control.should_evaluate

    on_epoch_end = on_step_end


class _UpdateAverage(TrainerCallback):
    """After each step the weights enter their exponential moving average."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update(model)


# ---- arguments ---------------------------------------------------------------------------------


def training_arguments(
    config: dict[str, Any], run_dir: Path, precision: str, steps: int = -1
) -> TrainingArguments:
    """The only place where our keys become Trainer's; what it does in silence is said. `steps`: of the whole run."""
    training = config["training"]
    use_wandb = config["logging"]["wandb"]
    stopping = training["early_stopping_patience"] is not None
    if precision == "fp32":  # else Trainer takes what a launcher has set
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    saves = (
        training["eval_steps"] if stopping else training["save_steps"]
    )  # the best weights have to be on disk
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        learning_rate=training["lr"],
        per_device_train_batch_size=training["batch_size"],
        per_device_eval_batch_size=training["batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        num_train_epochs=training["num_epochs"],
        max_steps=steps if training["max_steps"] else -1,
        max_grad_norm=training["max_grad_norm"],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        seed=training["seed"],
        data_seed=training["seed"]
        * 1000,  # the sampler adds the epoch: neighbouring seeds must not share an order
        dataloader_num_workers=training["dataloader_num_workers"],
        dataloader_persistent_workers=training["dataloader_num_workers"] > 0
        and not config["data"]["random_offset"],
        logging_steps=training["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training["eval_steps"] else "epoch",
        eval_steps=training["eval_steps"],
        save_strategy="steps" if saves else "epoch",
        save_steps=saves or 500,
        save_total_limit=2,
        load_best_model_at_end=stopping,
        restore_callback_states_from_checkpoint=stopping,  # how many evaluations it has waited
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        metric_for_best_model="eval_loss"
        if stopping
        else None,  # else its checkpoint would be kept for a later one
        greater_is_better=False if stopping else None,
        remove_unused_columns=False,
        use_cache=True,  # written into config.json; the training forward passes False itself
        disable_tqdm=True,
        report_to=["wandb"] if use_wandb else [],
        run_name=config["model"]["name"],
        **dict.fromkeys(("ddp_find_unused_parameters", "ddp_broadcast_buffers"), False),
        fsdp=training["fsdp"] and distributed.world_size() > 1,
        fsdp_config={"version": 2},
    )
    if (
        arguments.n_gpu > 1
    ):  # Trainer would spread each batch over all GPUs, and batch_size would mean something else
        arguments._n_gpu = 1
    return arguments
