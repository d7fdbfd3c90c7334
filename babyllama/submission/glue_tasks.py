"""Describe the seven (Super)GLUE tasks of BabyLM 2026: their texts, recipe and scores.

    read_examples(Path("boolq.train.jsonl"), "boolq")  # [((question, passage), 1), ...]

The numbers are those of `scripts/eval_finetuning.sh` and `evaluation_pipeline/finetune` of
BabyLM's pipeline (July 2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.evaluation import metrics
from babyllama.evaluation.tasks import read_rows


@dataclass(frozen=True)
class GlueTask:
    """The texts of a task and the hyperparameters of fine-tuning on it.

    `first` and `second` are templates of the two texts with the fields of a row. `metric` chooses
    the best epoch and is what the leaderboard shows. `warmup` is a share of all steps; the learning
    rate decays along a cosine to the share `lr_floor` of its peak. Dropout is that of the head.
    """

    first: str
    second: str
    labels: int = 2
    metric: str = "accuracy"
    epochs: int = 10
    batch_size: int = 32
    eval_batch_size: int = 64
    max_length: int = 512
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    lr_floor: float = 0.1
    dropout: float = 0.1


GLUE_TASKS = {
    "boolq": GlueTask("{question}", "{passage}", batch_size=16),
    "mnli": GlueTask("{premise}", "{hypothesis}", labels=3),
    "mrpc": GlueTask("{sentence1}", "{sentence2}", metric="f1"),
    "multirc": GlueTask("Question: {question} Answer: {answer}", "{paragraph}", batch_size=16),
    "qqp": GlueTask("{question1}", "{question2}", metric="f1"),
    "rte": GlueTask("{sentence1}", "{sentence2}"),
    "wsc": GlueTask(
        'Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}", epochs=30
    ),
}


def read_examples(path: Path, name: str) -> list[tuple[tuple[str, str], int]]:
    """Return ((first text, second text), label) of each line of a task's .jsonl file.

    Raise FileNotFoundError if there is no such file. Raise ValueError, with its number, for a row
    without one of the task's fields or with a label that the task does not have.
    """
    task = GLUE_TASKS[name]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; BabyLM's evaluation data has it")
    examples = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            texts = (task.first.format_map(row), task.second.format_map(row))
            label = row["label"]
        except KeyError as error:
            raise ValueError(f"{path}: row {number}: {name} needs the field {error}") from None
        except (TypeError, AttributeError):
            raise ValueError(f"{path}: row {number}: expected an object of fields") from None
        if label not in range(task.labels):
            raise ValueError(
                f"{path}: row {number}: label {label!r} must be 0 to {task.labels - 1}"
            )
        examples.append((texts, int(label)))
    if not examples:
        raise ValueError(f"{path}: no examples")
    return examples


def predictions_file(name: str, predictions: list[int]) -> dict:
    """Return the content of a task's predictions.json in the format of BabyLM's pipeline."""
    rows = [{"id": f"{name}_{index}", "pred": label} for index, label in enumerate(predictions)]
    return {name: {"predictions": rows}}


def score_predictions(
    labels: np.ndarray, predictions: np.ndarray, n_labels: int
) -> dict[str, float]:
    """Return the accuracy and, for two labels, the F1 of label 1."""
    scores = {"accuracy": float((labels == predictions).mean())}
    if n_labels == 2:
        scores["f1"] = metrics.f1(labels, predictions)
    return scores


def summarize(
    labels: np.ndarray, predictions: np.ndarray, settings: GlueTask, seed: int
) -> dict[str, Any]:
    """Return all scores, and the score of the task's metric with its 95% interval.

    The interval is Wilson's for an accuracy, and a bootstrap over examples for F1. It does not
    cover the choice of the best epoch on the same examples, nor the seed.
    """
    scores = score_predictions(labels, predictions, settings.labels)
    score = scores[settings.metric]
    if settings.metric == "accuracy":
        interval = metrics.wilson(score, len(labels))
    else:

        def f1_of(drawn: np.ndarray) -> float:
            return metrics.f1(labels[drawn], predictions[drawn])

        interval = metrics.bootstrap_interval(f1_of, len(labels), seed).tolist()
    return {**scores, "metric": settings.metric, "score": score, "score_ci95": interval}
