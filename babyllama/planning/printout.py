"""Print what a run will do, before step 0: its numbers, choices for this machine, an example."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from babyllama.cli import duration
from babyllama.planning.execution import Execution
from babyllama.planning.plan import Plan, count_evaluations


def print_plan(
    config: dict, plan: Plan, execution: Execution, checkpoint: Path | None, example: str
) -> None:
    """Print the numbers and choices of a run, its checkpoint, and a decoded training example."""
    training = config["training"]
    teachers = config.get("distillation", {}).get("teachers", [])
    step_factors = (
        f"{training['batch_size']} x {training['gradient_accumulation_steps']} x "
        f"{plan.processes} x {config['data']['seq_length']}"
    )
    time = duration(execution.expected_seconds)
    if teachers:
        time += " without the teachers' part"
    speed = f"{execution.matmul_flops / 1e9:,.0f} GFLOP/s in matrix products"
    work = f"{plan.flops_per_token / 1e6:,.1f} MFLOP per token"
    if plan.optimizer_flops_per_step:
        work += f", {plan.optimizer_flops_per_step / 1e9:,.1f} GFLOP per step for Muon"

    # what every run has
    epochs = "epoch" if plan.epochs == 1 else "epochs"
    rows = {
        "model": f"{config['model']['type']}, {plan.parameters:,} parameters "
        f"({plan.parameters_without_embeddings:,} without embeddings)",
        "step": f"{plan.tokens_per_step:,} tokens "
        f"(batch x accumulation x processes x seq_length: {step_factors})",
        "run": f"{plan.steps:,} steps, {plan.epochs:g} {epochs}, "
        f"about {plan.words:,} words, {plan.tokens:,} tokens",
        "decay": "none",
        "precision": f"{execution.precision} ({execution.precision_reason})",
        "compile": f"{'yes' if execution.compile else 'no'} ({execution.compile_reason})",
    }
    if plan.decay_steps:
        rows["decay"] = (
            f"weights forget over {plan.decay_steps:,.0f} steps, {plan.decay_epochs:.3g} "
            "epochs (1 / (lr x weight_decay))"
        )

    # what depends on the machine and the configuration
    if torch.cuda.is_available():
        graphs = "yes" if execution.cuda_graphs else "no"
        rows["CUDA graphs"] = f"{graphs} ({execution.cuda_graphs_reason})"
    if teachers:
        rows["teachers"] = f"{', '.join(teachers)}; loss = {plan.loss}"
    if benchmark := execution.benchmark:
        times = count_evaluations(config, plan)
        items = ", ".join(f"{name} {count:,}" for name, count in benchmark["items"].items())
        rows["benchmark"] = (
            f"items: {items}; {benchmark['tokens']:,} tokens, {times} times, about "
            f"{duration(benchmark['expected_seconds'])} each, not included in the time"
        )
    if execution.memory_bytes:
        rows["memory"] = _memory_text(execution.memory_bytes)
        if teachers:
            rows["memory"] += " without the teachers'"
    rows["time"] = f"about {time} ({speed}, {work})"
    if checkpoint:
        rows["resume"] = f"from {checkpoint}; the time is that of all steps"
    rows["example"] = repr(example)

    for name, text in rows.items():
        print(f"{name:<11} {text}")
    sys.stdout.flush()


def _memory_text(parts: dict[str, int]) -> str:
    """Return the total of the parts of memory.py, and each part from 0.01 GB."""
    listed = [f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size >= 5e6]
    return f"about {sum(parts.values()) / 1e9:.1f} GB ({', '.join(listed)})"
