"""Train on full chunks with Hugging Face's Trainer.

Trainer runs the loop; steps.py lays out its steps, and callbacks.py corrects when it logs,
evaluates and saves. LMTrainer replaces the parts that would misreport or lose work: Trainer's
evaluation loss is a mean of batch means, its log shows a NaN loss as 0, it writes checkpoints in
place, and nothing marks a checkpoint as complete. Eight of Trainer's private methods are
overridden, only in this file; tests/training/test_trainer.py lists them, and fails if a release of
transformers changes what we rely on. Building the model and reading the configuration is train.py's
job.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pickle
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME

from babyllama import distributed
from babyllama.device import is_out_of_memory
from babyllama.evaluation.generation import generate
from babyllama.runs.checkpoints import (
    checkpoint_step,
    checkpoints,
    rotate_checkpoints,
    seal_checkpoint,
)
from babyllama.runs.run_dir import RETRAIN
from babyllama.training.attention import prepare_for_chunks
from babyllama.training.batches import train_loader
from babyllama.training.benchmark import TrainingBenchmark
from babyllama.training.callbacks import Intervals, UpdateAverage
from babyllama.training.cuda_graphs import CudaGraphStep
from babyllama.training.held_out import evaluate_chunks
from babyllama.training.loss import NextTokenLoss
from babyllama.training.optimizers import WeightAverage, make_optimizer, schedule
from babyllama.training.steps import Steps

AVERAGE_FILE = "average.safetensors"  # in a checkpoint: the moving average of the weights
# parts of the messages of safetensors and torch.save if a disk is full
DISK_FULL_SIGNS = ("No space left", "File too large", "Disk quota", "inline_container")
# raised by json, safetensors, torch.load and load_state_dict for a file that is damaged or missing
UNREADABLE = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError,
              RuntimeError, pickle.UnpicklingError, SafetensorError)  # fmt: skip


class TrainingError(ValueError):
    """The run cannot continue; the message says what to change."""

    on_all_ranks = True


def collate_chunks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return input_ids and labels (B, T) int64 of a batch of chunks.

    There is no attention mask because chunks have no padding. Our loss does not read the labels,
    but Trainer counts them to weight accumulated batches, so the first one is -100: no token comes
    before it that could predict it.
    """
    ids = np.stack([np.asarray(row["input_ids"]) for row in rows])
    input_ids = torch.from_numpy(ids.astype(np.int64))
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


class LMTrainer(Trainer):
    """Train a language model on full chunks.

    `byte_lengths` (V,) holds the number of UTF-8 bytes of each token. `training` is that section of
    the configuration, which chooses optimizer, schedule and weight average. loss(model, input_ids)
    returns a sum over the batch. With `cuda_graphs` the passes of full batches are recorded once
    and then replayed (cuda_graphs.py). The `benchmark` is scored at each evaluation; with several
    processes it is None in all but the main one. The `history` of a run that was resumed with
    other settings says how large its earlier steps were (resume.py).
    """

    def __init__(
        self,
        *args,
        byte_lengths: np.ndarray,
        training: dict[str, Any],
        loss: NextTokenLoss,
        cuda_graphs: bool = False,
        benchmark: TrainingBenchmark | None = None,
        history: Sequence[dict[str, Any]] = (),
        **kwargs,
    ):
        super().__init__(*args, data_collator=collate_chunks, **kwargs)
        prepare_for_chunks(self.model)
        self.byte_lengths = torch.as_tensor(byte_lengths)
        self.training_config = training
        self.steps = Steps(len(self.train_dataset), training, history)
        self.loss = loss
        self.benchmark = benchmark
        self.benchmarked: tuple[int, dict] | None = None  # step and scores of the last time
        if distributed.world_size() > 1:
            self.loss = functools.partial(distributed.forward_through_wrapper, loss)
        self.document_bos_id = loss.document_bos_id
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the step
        self.model_accepts_loss_kwargs = True
        self._nonfinite_losses = torch.zeros((), device=self.args.device)

        # features of the training section
        if self.is_fsdp_enabled and (self.args.bf16 or self.args.fp16):
            # FSDP's default policy would also run our sums over tokens in half precision
            half = torch.bfloat16 if self.args.bf16 else torch.float16
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        if training["gradient_checkpointing"]:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.average = WeightAverage(self.model, training["ema"]) if training["ema"] else None
        self.graphs = None
        if cuda_graphs:
            batch_size = self.args.per_device_train_batch_size
            self.graphs = CudaGraphStep(
                self._loss_and_gradients, self.model.parameters(), batch_size
            )

        self.remove_callback(PrinterCallback)  # RunLog prints the same numbers, but readably
        if training["early_stopping_patience"]:
            self.add_callback(EarlyStoppingCallback(training["early_stopping_patience"]))
        self.add_callback(Intervals(self.steps))
        if self.average:
            self.add_callback(UpdateAverage(self.average))

    # -- Trainer's hooks: a step --

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run both passes of a batch, and count its tokens and whether its loss is finite."""
        input_ids = inputs["input_ids"]
        if self.graphs is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            if not model.training:
                model.train()
            loss = self.graphs(input_ids, num_items_in_batch)
        chunks = int(self.steps.chunks_seen[self.state.global_step + 1])
        self.state.num_input_tokens_seen = chunks * input_ids.shape[1]
        # read only when logging, so that steps never wait for the GPU
        self._nonfinite_losses += ~torch.isfinite(loss)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return what a batch, inputs["input_ids"] (B, T), contributes to the loss of its step.

        The loss of a step is the mean over all `num_items_in_batch` tokens that it predicts, in
        every batch and process. CUDA graphs record this method too.
        """
        with self.accelerator.autocast():
            sums = self.loss(model, inputs["input_ids"], *self.slice_inputs(inputs))
        loss = self.keep_parts(sums / num_items_in_batch)
        # DDP and FSDP average gradients over the processes, but the division has done that already
        return loss * self.accelerator.num_processes

    def slice_inputs(self, inputs) -> Sequence[torch.Tensor]:
        """Return what the loss of a slice needs beside the chunks: nothing without teachers."""
        return ()

    def keep_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch; a subclass may have more parts, and keep them for the log."""
        return parts

    def floating_point_ops(self, inputs) -> int:
        """Return 0, because nothing reads the figure, and Trainer would walk all modules for it."""
        return 0

    def set_initial_training_values(self, args, dataloader):
        """Return Trainer's numbers, but take epochs and steps of the run from `steps`."""
        _, *numbers, _ = super().set_initial_training_values(args, dataloader)
        return self.steps.epochs, *numbers, self.steps.total

    def _init_training_state(self, *args, **kwargs):
        """Restore the state; return the epoch to continue, and how many of its batches to skip."""
        super()._init_training_state(*args, **kwargs)
        epoch, steps_done = self.steps.epoch_at(self.state.global_step)
        return epoch, steps_done * self.args.gradient_accumulation_steps

    def _run_epoch(self, *args, epoch, train_dataloader, **kwargs):
        """Run an epoch, which may have another number of steps than the one before.

        Skip it if the checkpoint that we resumed from was the end of its run. Trainer checks only
        after a step, so it would train one step too many.
        """
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # sets the loader's length and the offset of random_offset to those of this epoch; the
        # loader that skips batches after a resume does not pass the epoch on to the dataset
        train_dataloader.set_epoch(epoch)
        kwargs["steps_in_epoch"] = len(train_dataloader)
        kwargs["num_update_steps_per_epoch"] = len(self.steps.slices(epoch))
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """Raise TrainingError if the loss or a weight is NaN, before such a model is saved."""
        # Trainer counts in batches, whose number depends on the batch size
        self.state.epoch = float(
            self.steps.chunks_seen[self.state.global_step] / self.steps.n_chunks
        )
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate:
            # the sum over processes makes all of them stop at the same step
            nonfinite = distributed.all_reduce_sum(self._nonfinite_losses).item() > 0
            nonfinite = nonfinite or self._has_nonfinite_weights()
            # infinite gradients are normal in fp16: the loss scaler skips such steps
            if grad_norm is not None and not self.args.fp16:
                nonfinite = nonfinite or not math.isfinite(float(grad_norm))
            if nonfinite:
                learning_rate = self.lr_scheduler.get_last_lr()[0]
                self.log({"loss": math.nan, "learning_rate": learning_rate})
                raise TrainingError(
                    "the loss, its gradient or a weight became NaN or infinite at or before step "
                    f"{self.state.global_step}; nothing was saved after it. Train again "
                    "(--overwrite) with a smaller --lr, a longer training.warmup_steps, or --bf16 "
                    "instead of --fp16"
                )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # -- Trainer's hooks: data, optimizer, schedule --

    def get_train_dataloader(self) -> DataLoader:
        return train_loader(self.train_dataset, self.steps, self.args, self.data_collator)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = make_optimizer(
                self.model if model is None else model, self.training_config
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            lead = self.steps.schedule_lead
            factor = schedule(self.training_config, num_training_steps + lead)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: factor(max(0, step + lead))
            )
            self._created_lr_scheduler = True  # so that another train() gets another schedule
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Restore both, but take the learning rate from the configuration, which may be new."""
        with named_if_unreadable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = self.lr_scheduler.state_dict()
        lr = self.training_config["lr"]
        current_lr = lr * self.lr_scheduler.lr_lambdas[0](state["last_epoch"])
        groups = self.optimizer.param_groups
        state |= {"base_lrs": [lr] * len(groups), "_last_lr": [current_lr] * len(groups)}
        self.lr_scheduler.load_state_dict(state)
        for group in groups:
            group["initial_lr"] = lr
            group["lr"] = current_lr

    # -- Trainer's hooks: evaluation and checkpoints --

    def evaluate(self, ignore_keys=None) -> dict[str, float]:
        # score the weights that would be kept
        started = time.perf_counter()
        with self.accelerator.autocast():
            scores = self.score_held_out(self.evaluated_model, across_ranks=True)
        if not math.isfinite(scores["loss"]):
            raise TrainingError(
                f"the held-out loss became NaN or infinite at step {self.state.global_step}; train "
                "again with a smaller --lr or a longer training.warmup_steps, under another "
                "--model-name to keep what this run has saved"
            )

        # log the scores, and tell the callbacks, of which early stopping is one
        metrics = {f"eval_{key}": value for key, value in scores.items()}
        metrics["eval_seconds"] = time.perf_counter() - started
        self.log(metrics | {"samples": self._samples(self.evaluated_model)})
        self.log_benchmark()
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model, trial):
        """Save a checkpoint, seal it, and only then delete older ones."""
        run_dir = Path(self.args.output_dir)
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if folder.is_symlink():
            raise TrainingError(f"{folder} is a symlink; nothing is written through it. Delete it")
        try:
            super()._save_checkpoint(model, trial)
            distributed.barrier()  # wait until each process has written its random state
            if self.args.should_save:
                if self.average:
                    save_model(self.average.module, folder / AVERAGE_FILE)
                seal_checkpoint(folder)
                rotate_checkpoints(run_dir, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            if any(sign in str(error) for sign in DISK_FULL_SIGNS):
                raise _disk_full(folder, checkpoints(run_dir)) from None
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with named_if_unreadable(resume_from_checkpoint):
            # Trainer reads its state itself, but would end with a traceback
            TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_average(resume_from_checkpoint)

    def _load_rng_state(self, checkpoint):
        with named_if_unreadable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    # -- what train.py and callbacks call --

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """Return the average of the weights if we keep one, else the model."""
        return self.average.module if self.average else self.model

    def score_held_out(self, model, chunks=None, **options) -> dict[str, float | dict]:
        """Score a model on all held-out chunks, or these; evaluate_chunks gets the `options`."""
        return evaluate_chunks(
            model,
            self.eval_dataset if chunks is None else chunks,
            self.byte_lengths,
            self.args.per_device_eval_batch_size,
            self.document_bos_id,
            **options,
        )

    def release_graphs(self) -> None:
        """Free the memory of the CUDA graphs, which the final evaluation may need."""
        self.graphs = None

    def log_benchmark(self) -> None:
        """Score the benchmark, if there is one, and log the scores, once for the current step.

        Only the main process does it. The others wait for as long as it takes.
        """
        step = self.state.global_step
        with distributed.main_first():
            if self.benchmark is None or (self.benchmarked and self.benchmarked[0] == step):
                return
            scores = self.benchmark.scores(self.evaluated_model)
            self.benchmarked = (step, scores)
            self.log(dict(scores))

    def best_model(self) -> torch.nn.Module | None:
        """Return the model to evaluate and save: the average of the weights if we keep one.

        All processes must call this. Under FSDP, rank 0 gets a model with all of the weights and
        the others get None.
        """
        if not self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            return self.average.module if self.average else model
        weights = self.accelerator.get_state_dict(self.model)
        if not distributed.is_main():
            return None
        model = AutoModelForCausalLM.from_config(self.model.config)
        model.load_state_dict(weights)
        model.generation_config = self.model.generation_config
        return model.to(self.args.device)

    def kept_step(self) -> int:
        """Return the step whose weights are kept: the best with early stopping, else the last."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return checkpoint_step(Path(best)) if best else self.state.global_step

    def save_plain(self, folder: Path) -> None:
        """Write best_model() as a model directory. All processes must call this; rank 0 writes."""
        if self.average is None:
            self.save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            self.average.module.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    # -- helpers --

    def _loss_and_gradients(
        self, input_ids: torch.Tensor, n_predicted: torch.Tensor
    ) -> torch.Tensor:
        """Compute what Trainer's training_step computes, without its bookkeeping.

        CudaGraphStep records this, so nothing in it may wait for the GPU.
        """
        loss = self.compute_loss(
            self.model, {"input_ids": input_ids}, num_items_in_batch=n_predicted
        )
        loss.backward()
        return loss.detach()

    def _has_nonfinite_weights(self) -> bool:
        """Return True if any process holds a weight that is NaN or infinite."""
        count = torch.zeros((), device=self.args.device)
        for parameter in self.model.parameters():
            weights = parameter.detach()
            if self.is_fsdp_enabled:
                weights = weights.to_local()
            count += ~torch.isfinite(weights).all()
        return distributed.all_reduce_sum(count).item() > 0

    def _samples(self, model) -> list[str]:
        """Generate one text from nothing and one from held-out words.

        The seed is fixed, so samples differ between evaluations only because the model has changed.
        """
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
            batch_size=1,  # so nothing is padded: prepare_for_chunks made attention ignore masks
        )
        return [prompt + text for prompt, (text,) in zip(prompts, continuations, strict=True)]

    def _load_average(self, folder) -> None:
        if self.average:
            load_model(self.average.module, Path(folder) / AVERAGE_FILE)
            self.average.begun = True  # otherwise the next update would overwrite it


@contextlib.contextmanager
def named_if_unreadable(checkpoint: str | None) -> Iterator[None]:
    """Turn the errors that a file of a checkpoint makes torch raise into one line.

    The manifest shows that no file has changed since it was saved, so such a file was made by other
    means. torch's own advice, to unpickle it without weights_only, would run the code in it.
    """
    try:
        yield
    except UNREADABLE as error:
        if is_out_of_memory(error) or distributed.is_lost_process_error(error):
            raise
        raise ValueError(
            f"{checkpoint} cannot be resumed: a file in it is damaged, or was not written by this "
            f"program ({type(error).__name__}); resume from another checkpoint, or {RETRAIN}"
        ) from error


def _disk_full(folder: Path, saved: list[Path]) -> OSError:
    """Delete a checkpoint that does not fit on the disk; return an error with bytes and advice."""
    shutil.rmtree(folder, ignore_errors=True)
    sizes = [sum(file.stat().st_size for file in old.iterdir()) for old in saved if old != folder]
    needed = f"{max(sizes):,} bytes" if sizes else "about three times the space of the model"
    free = shutil.disk_usage(folder.parent).free
    return OSError(
        f"{folder} cannot be saved: it needs {needed}, and the disk has {free:,} bytes free (or a "
        "limit on the size of files); earlier checkpoints are intact. Make room, and continue with "
        "--resume-from-checkpoint auto"
    )
