"""Score a benchmark on the weights of a model that is being trained.

    benchmark = TrainingBenchmark(load_tasks("blimp.yaml"), model, tokenizer)
    benchmark.scores(model)  # {"benchmark/blimp": 0.61, "benchmark_seconds": 4.2}

The scores are those of benchmark.py. Scoring does not change the training: it draws no random
number, and the model that is trained may be compiled, recorded in CUDA graphs or blind to attention
masks, so a second model computes the scores. It shares the weights, which takes no more memory.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from babyllama import distributed
from babyllama.evaluation import grading
from babyllama.evaluation.benchmark_config import BenchmarkTask, load_tasks
from babyllama.evaluation.candidates import score_task, scored_spans
from babyllama.runs.run_dir import BENCHMARK_PREFIX

# tokenizing and Python; measured on BLiMP's pairs (docs/results.md, "Benchmarks while training")
SECONDS_PER_ITEM = 0.5e-3


def make_benchmark(config: dict, model, tokenizer) -> TrainingBenchmark | None:
    """Return the benchmark of a run, or None without one; only the main process has it."""
    path = config["training"]["benchmark"]
    if path is None or not distributed.is_main():
        return None
    return TrainingBenchmark(load_tasks(path), model, tokenizer)


class TrainingBenchmark:
    """The tasks of a benchmark and the model that scores them; `tokens` counts all texts.

    Make it before the training model gets the attention of prepare_for_chunks, which ignores masks.
    Raise ValueError if an item cannot be scored with this tokenizer.
    """

    def __init__(self, tasks: dict[str, BenchmarkTask], model, tokenizer):
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.tokens = 0
        for name, task in tasks.items():
            try:
                ids, _ = scored_spans(tokenizer, task.items)
            except ValueError as error:
                raise ValueError(f"training.benchmark: tasks.{name}: {error}") from None
            self.tokens += sum(map(len, ids))
        with torch.random.fork_rng(devices=[]):  # the initial weights are drawn and thrown away
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))

    def scores(self, model) -> dict[str, float]:
        """Return the main figure of each task for the weights of `model`, and the time it took."""
        started = time.perf_counter()
        self.model.to(model.device)
        self.model.load_state_dict(model.state_dict(), assign=True)
        scores = {}
        for name, task in self.tasks.items():
            task_scores, _, _ = score_task(self.model, self.tokenizer, task.type, task.items)
            result = grading.score_items(task.type, task.items, task_scores)
            scores[BENCHMARK_PREFIX + name] = result[result["metric"]]
        return {**scores, "benchmark_seconds": time.perf_counter() - started}

    def cost(self, flops_per_token: int, flops_per_second: float) -> dict[str, Any]:
        """Return the numbers of items and tokens, and about how long it takes to score them.

        The time is that of one forward pass over all tokens, and SECONDS_PER_ITEM. A training step
        has `flops_per_token`, and a forward pass a third of that. One process scores, and its
        matrix products run at `flops_per_second`.
        """
        n_items = sum(len(task.items) for task in self.tasks.values())
        forward_seconds = self.tokens * flops_per_token / 3 / flops_per_second
        return {
            "items": {name: len(task.items) for name, task in self.tasks.items()},
            "tokens": self.tokens,
            "expected_seconds": forward_seconds + n_items * SECONDS_PER_ITEM,
        }
