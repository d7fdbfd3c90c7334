"""Fine-tune a model as a classifier on a (Super)GLUE task, by the recipe of BabyLM 2026.

    fine_tune(Path("models/run"), "rte", Path("evaluation_data/full_eval/glue_filtered"), output)

The recipe is that of BabyLM's pipeline (July 2026, `evaluation_pipeline/finetune`), with these
differences:

- All weights are trained, as its `--no-lora` does. Its default, LoRA, looks for layers that none of
  our architectures has, and ends with an error.
- Texts are cut to the model's context. The pipeline always reads 512 tokens: GPT-2 with a shorter
  context ends with an error, and Llama reads beyond the positions that it has learned.
- Batches are padded to their longest text instead of 512 tokens, which changes nothing but speed.
- The first token of a text has position 0. In the pipeline, positions count the padding as well,
  which matters to learned positions (GPT-2) but not to rotary ones.
- Nothing is compiled. On a GPU training uses bfloat16 and evaluation float32, as the pipeline does.

Otherwise a model without dropout gets the same batches, weights and predictions, up to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from babyllama.cli import time_left
from babyllama.device import fast_dtype, pick_device
from babyllama.evaluation.loading import check_ids, context_length, load_model
from babyllama.files import write_json
from babyllama.submission.glue_tasks import (
    GLUE_TASKS,
    GlueTask,
    predictions_file,
    read_examples,
    score_predictions,
    summarize,
)
from babyllama.training.arguments import keep_one_gpu

log = logging.getLogger(__name__)


def fine_tune(
    model_dir: Path,
    task: str,
    data_dir: Path,
    output_dir: Path,
    *,
    seed: int = 42,
    device: str | None = "auto",
    **overrides: Any,
) -> dict[str, Any]:
    """Fine-tune a model on a task, write `output_dir`/predictions.json and return the results.

    `data_dir` holds <task>.train.jsonl and <task>.valid.jsonl. As in BabyLM's pipeline, the epoch
    with the best score on the validation file gives the predictions for the same file. `overrides`
    replace fields of GlueTask. A line is logged after each epoch.

    The results are `score` of `metric` with its interval, `accuracy`, and with two labels `f1` (all
    as fractions), `best_epoch`, `epochs`, `n` and `seconds`. On a CPU the same seed gives the same
    predictions. Raise FileNotFoundError or ValueError for input that is missing or wrong, and
    ValueError if training diverges.
    """
    settings = dataclasses.replace(GLUE_TASKS[task], **overrides)
    train_file = Path(data_dir, f"{task}.train.jsonl")
    valid_file = Path(data_dir, f"{task}.valid.jsonl")
    train_examples = read_examples(train_file, task)
    valid_examples = read_examples(valid_file, task)
    if len(train_examples) < settings.batch_size:
        raise ValueError(
            f"{train_file}: {len(train_examples)} examples are fewer than a batch of "
            f"{settings.batch_size}"
        )
    target = pick_device(device)
    if target.index:
        raise ValueError(
            f"device {target}: fine-tuning uses the first GPU; select it with CUDA_VISIBLE_DEVICES"
        )

    # tokenize
    started = time.monotonic()
    model, tokenizer = load_model(model_dir, device="cpu")
    max_length = min(settings.max_length, context_length(model))
    train_set = encode_pairs(tokenizer, train_examples, max_length)
    valid_set = encode_pairs(tokenizer, valid_examples, max_length)
    check_ids(model, [ids for ids, _ in train_set + valid_set])

    # train
    epochs = BestEpoch(task, settings)
    trainer = FineTuner(
        settings=settings,
        # Trainer seeds, and then builds the model: the head gets the pipeline's initial weights
        model_init=lambda: Classifier(copy.deepcopy(model.base_model), settings),
        args=fine_tuning_arguments(settings, len(train_set), Path(output_dir), target, seed),
        train_dataset=train_set,
        eval_dataset=valid_set,
        data_collator=lambda examples: left_pad(examples, tokenizer.pad_token_id or 0),
        compute_metrics=epochs.update,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    write_json(
        Path(output_dir, "predictions.json"), predictions_file(task, epochs.predictions.tolist())
    )
    labels = np.array([label for _, label in valid_set])
    return {
        **summarize(labels, epochs.predictions, settings, seed),
        "best_epoch": epochs.best,
        "epochs": settings.epochs,
        "n": len(labels),
        "seconds": round(time.monotonic() - started, 3),
    }


# ---- texts --------------------------------------------------------------------------------------


def encode_pairs(
    tokenizer, examples: list[tuple[tuple[str, str], int]], max_length: int
) -> list[tuple[list[int], int]]:
    """Return (token ids, label) of each example.

    The tokenizer joins the two texts with its special tokens, and cuts the longer text at its end
    until both fit into `max_length` tokens.
    """
    pairs = [texts for texts, _ in examples]
    encoded = tokenizer(pairs, truncation=True, max_length=max_length)["input_ids"]
    return [(ids, label) for ids, (_, label) in zip(encoded, examples, strict=True)]


def left_pad(examples: list[tuple[list[int], int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return a batch: input_ids and attention_mask (B, T), padded on the left, and labels (B,)."""
    longest = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, _) in enumerate(examples):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    labels = torch.tensor([label for _, label in examples])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# ---- the model ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Classify a text by the last hidden state of its last token."""

    def __init__(self, body: nn.Module, settings: GlueTask):
        """Put a new head on a model that returns hidden states."""
        super().__init__()
        self.body = body
        width = body.config.hidden_size
        self.head = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, elementwise_affine=False),
            nn.Dropout(settings.dropout),
            nn.Linear(width, settings.labels),
        )

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the logits (B, labels) of texts padded on the left, and the mean cross-entropy."""
        device = input_ids.device
        use_bf16 = self.training and device.type == "cuda" and fast_dtype(device) == torch.bfloat16
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            hidden = self.body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state  # (B, T, D)
            logits = self.head(hidden[:, -1])
        logits = logits.float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


# ---- training -----------------------------------------------------------------------------------


def fine_tuning_arguments(
    settings: GlueTask, examples: int, output_dir: Path, device: torch.device, seed: int
) -> TrainingArguments:
    """Return Trainer's arguments for a number of training examples."""
    steps = examples // settings.batch_size * settings.epochs
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=0,  # gradients are not clipped
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.lr_floor},
        warmup_steps=int(settings.warmup * steps),
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    return keep_one_gpu(arguments)


class FineTuner(Trainer):
    """Train with AdamW on shuffled complete batches."""

    def __init__(self, settings: GlueTask, **options):
        """Take the options of Trainer."""
        self.settings = settings
        super().__init__(**options)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return AdamW with weight decay on all weights; Trainer's spares norms and biases."""
        self.optimizer = torch.optim.AdamW(
            (model or self.model).parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
        )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return shuffled batches without the last incomplete one.

        The order is drawn from the global generator, as in BabyLM's pipeline. Trainer's own
        `dataloader_drop_last` would also skip examples of the evaluation.
        """
        return DataLoader(
            self.train_dataset,
            batch_size=self.settings.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=self.data_collator,
        )


class BestEpoch:
    """Keep the predictions of the epoch with the best score; the earliest one wins a tie."""

    def __init__(self, task: str, settings: GlueTask):
        """Start before the first epoch."""
        self.task = task
        self.settings = settings
        self.started = time.monotonic()
        self.epoch = 0
        self.best = 0
        self.best_score = -np.inf
        self.predictions = np.empty(0, dtype=int)

    def update(self, evaluation) -> dict[str, float]:
        """Take the logits and labels of an epoch's evaluation, and report the epoch."""
        logits = evaluation.predictions  # (N, labels)
        if not np.isfinite(logits).all():
            raise ValueError(
                f"{self.task}: training diverged (a logit is not a number); lower the learning rate"
            )
        predictions = logits.argmax(axis=-1)
        score = score_predictions(evaluation.label_ids, predictions, self.settings.labels)[
            self.settings.metric
        ]

        # keep the best epoch
        self.epoch += 1
        if score > self.best_score:
            self.best = self.epoch
            self.best_score = score
            self.predictions = predictions

        # report this one, with the time left
        epochs = self.settings.epochs
        metric = self.settings.metric
        left = time_left(time.monotonic() - self.started, self.epoch / epochs)
        log.info(
            "  %s: epoch %d of %d, %s %.4f%s", self.task, self.epoch, epochs, metric, score, left
        )
        return {"score": score}
