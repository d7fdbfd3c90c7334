"""Measure how fast a model generates text.

time_generation(model, tokenizer, batch_sizes=[1, 8], max_new_tokens=64, repeats=3)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch

from babyllama.device import peak_memory_gb, reset_peak_memory
from babyllama.evaluation.generation import generate_steps
from babyllama.evaluation.loading import context_length, encode

PROMPT = "Once upon a time there was a little"


def time_generation(
    model, tokenizer, *, batch_sizes: Iterable[int], max_new_tokens: int, repeats: int
) -> list[dict[str, float]]:
    """Return the speed of greedy generation for each batch size, as the median of `repeats` runs.

    The keys of a row are explained in BenchmarkSuite.run_speed_benchmark.
    """
    prompt = encode(tokenizer, [PROMPT], bos=None)[0][:8]
    steps = min(max_new_tokens, context_length(model) - len(prompt))
    return [_time_batch(model, [prompt] * size, steps, repeats) for size in batch_sizes]


def _time_batch(model, prompts: list[list[int]], steps: int, repeats: int) -> dict[str, float]:
    reset_peak_memory(model.device)
    timings = []
    warm_up_steps = min(8, steps)
    for run_steps in [warm_up_steps, *[steps] * repeats]:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        generated = 0
        times = [time.perf_counter()]
        for tokens in generate_steps(model, prompts, max_new_tokens=run_steps, temperature=0):
            # the tokens are already on the CPU, so the device has finished this step
            generated += sum(token is not None for token in tokens)
            times.append(time.perf_counter())
        tokens_per_second = generated / (times[-1] - times[0])
        seconds_between = (times[-1] - times[1]) / max(1, run_steps - 1)
        timings.append((tokens_per_second, seconds_between, times[1] - times[0]))

    columns = zip(*timings[1:], strict=True)  # without the warm-up
    tokens_per_second, between, first = (statistics.median(column) for column in columns)
    return {
        "batch_size": len(prompts),
        "tokens_per_second": tokens_per_second,
        "latency_ms": 1000 * between,
        "first_token_ms": 1000 * first,
        "generated_tokens": generated,
        "memory_gb": peak_memory_gb(model.device),
    }
