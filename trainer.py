"""HF Trainer made honest: an exact loss, checkpoints that say whether they are whole, a NaN that stops the run.

What it changes, and why, was read in transformers' source: the stock loss under gradient accumulation and the stock
`eval_loss` are means of batch means; NaN losses are logged as 0; a checkpoint is written in place without a mark that
it is complete. It does not build models or read configs (train.py).
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from runs import seal_checkpoint

log = logging.getLogger(__name__)


class TrainingError(ValueError):
    """The run cannot go on; the message says what to change."""


# ---- loss and evaluation ------------------------------------------------------------------------


def collate_chunks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Full chunks -> input_ids and labels (B, T) int64; no attention mask, so that attention stays purely causal.

    The first label is -100: nothing predicts it, and Trainer counts the labels to weigh accumulated batches.
    """
    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64))  # (B, T)
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


def next_token_nll(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of -log p(token | tokens before it), in nats, in float32: logits (B, T, V), ids (B, T)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate_chunks(model, chunks, byte_lengths: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Loss of a model on full chunks, from sums, so that it does not depend on the batch size.

    Each token of a chunk but the first is predicted from those before it in the chunk. Returns `loss` (nats per
    predicted token), `perplexity` (exp of it), `bits_per_byte` (all nats, those of </s> included, over log 2 and
    the UTF-8 bytes of the predicted tokens; `byte_lengths` (V,) gives each token's), `tokens` and `bytes`.
    """
    was_training = model.training
    model.eval()
    nll, tokens, n_bytes = 0.0, 0, 0
    for batch in DataLoader(chunks, batch_size, collate_fn=collate_chunks):
        ids = batch["input_ids"].to(model.device)
        nll += next_token_nll(model(input_ids=ids, use_cache=False).logits, ids).item()
        tokens += ids[:, 1:].numel()
        n_bytes += int(byte_lengths[ids[:, 1:].cpu()].sum())
    model.train(was_training)
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll / math.log(2) / n_bytes,
        "tokens": tokens,
        "bytes": n_bytes,
    }


class LMTrainer(Trainer):
    """Trainer for full chunks; `byte_lengths` (V,) is the number of UTF-8 bytes that each token stands for."""

    def __init__(self, *args, byte_lengths: np.ndarray, **kwargs):
        super().__init__(*args, data_collator=collate_chunks, **kwargs)
        self.remove_callback(PrinterCallback)  # RunLog tells the same in fewer words
        self.byte_lengths = torch.as_tensor(byte_lengths)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole accumulated batch
        self.model_accepts_loss_kwargs = True
        self._nonfinite = torch.zeros((), device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, use_cache=False)
        nll = next_token_nll(outputs.logits, ids)
        items = ids[:, 1:].numel() if num_items_in_batch is None else num_items_in_batch
        loss = nll / items * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        if model.training:
            self.state.num_input_tokens_seen += ids.numel() * self.accelerator.num_processes
            self._nonfinite += ~torch.isfinite(
                loss.detach()
            )  # looked at only when logging: no wait for the device here
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        started = time.perf_counter()
        chunks = self.eval_dataset if eval_dataset is None else eval_dataset
        sums = evaluate_chunks(self.model, chunks, self.byte_lengths, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in sums.items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        acts = self.control.should_log or self.control.should_save or self.control.should_evaluate
        bad_gradient = not self.args.fp16 and grad_norm is not None and acts and not math.isfinite(float(grad_norm))
        if acts and (self._nonfinite.item() or bad_gradient):  # fp16's loss scaler skips infinite gradients by itself
            raise TrainingError(
                f"the loss or its gradient became NaN or infinite at or before step {self.state.global_step}; nothing "
                "was saved after it. Train again (--overwrite) with a smaller --lr, a longer training.warmup_steps, or "
                "--bf16 instead of --fp16"
            )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            seal_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


# ---- what a run tells ---------------------------------------------------------------------------


class RunLog(TrainerCallback):
    """A progress bar with the time left, and metrics.jsonl: one strict JSON object for each row of the log.

    The clock runs while steps run and stands still while the model is evaluated or saved.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self.bar = path, [], None
        self.seconds, self.tokens, self.clock = 0.0, 0, None
        self.logged_seconds, self.logged_tokens = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and self.path.is_file():  # resumed: rows after the checkpoint will be written anew
            with self.path.open(encoding="utf-8") as file:
                self.rows = [row for row in map(json.loads, file) if row["step"] <= state.global_step]
        with self.path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
        if self.rows:
            self.seconds = self.logged_seconds = self.rows[-1]["seconds"]
            self.tokens = self.logged_tokens = state.num_input_tokens_seen
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.clock is None:
            self.clock = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)
        if control.should_log or control.should_evaluate or control.should_save:
            self._stop_clock(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_clock(state)

    def _stop_clock(self, state) -> None:
        if self.clock is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.clock
            self.clock, self.tokens = None, state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not {"loss", "eval_loss"} & set(logs or ()):
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), "tokens": state.num_input_tokens_seen}
        if "loss" in logs and self.seconds > self.logged_seconds:
            row["tokens_per_second"] = (self.tokens - self.logged_tokens) / (self.seconds - self.logged_seconds)
            self.logged_tokens, self.logged_seconds = self.tokens, self.seconds
        row["seconds"] = round(self.seconds, 3)
        row |= {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
        if not math.isfinite(row.get("grad_norm", 0.0)):  # a step that fp16's loss scaler skipped
            row["grad_norm"] = None
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        if "eval_loss" in row:
            line = (
                f"step {row['step']:>6}  held-out loss {row['eval_loss']:.4f}  perplexity {row['eval_perplexity']:.2f}"
                f"  bits per byte {row['eval_bits_per_byte']:.4f}"
            )
        else:
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            speed = f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
            line = f"step {row['step']:>6}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  {speed}"
        tqdm.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run, evaluation and saving left out."""
        return self.tokens / self.seconds


def training_arguments(config: dict[str, Any], run_dir: Path, precision: str) -> TrainingArguments:
    """The only place where our keys become Trainer's; what Trainer would do in silence is set by name."""
    training = config["training"]
    use_wandb = config["logging"]["wandb"]
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        learning_rate=training["lr"],
        per_device_train_batch_size=training["batch_size"],
        per_device_eval_batch_size=training["batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        num_train_epochs=training["num_epochs"],
        warmup_steps=training["warmup_steps"],
        lr_scheduler_type=training["lr_scheduler"] + ("_with_warmup" if training["lr_scheduler"] == "constant" else ""),
        weight_decay=training["weight_decay"],
        max_grad_norm=training["max_grad_norm"],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=training["torch_compile"],
        use_cpu=not torch.cuda.is_available(),
        seed=training["seed"],
        data_seed=training["seed"] * 1000,  # the sampler adds the epoch: neighbouring seeds must not share an order
        dataloader_num_workers=training["dataloader_num_workers"],
        dataloader_persistent_workers=training["dataloader_num_workers"] > 0,
        logging_steps=training["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training["eval_steps"] else "epoch",
        eval_steps=training["eval_steps"],
        save_strategy="steps" if training["save_steps"] else "epoch",
        save_steps=training["save_steps"] or 500,
        save_total_limit=2,
        remove_unused_columns=False,
        use_cache=True,  # written into config.json; the training forward passes False itself
        disable_tqdm=True,
        report_to=["wandb"] if use_wandb else [],
        run_name=config["model"]["name"],
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # Trainer would spread each batch over all GPUs, and batch_size would mean something else
        arguments._n_gpu = 1
    return arguments
