"""The plan of a run, before its first step: its derived numbers, and what it takes of this machine."""

from __future__ import annotations

import logging

import torch
from transformers.pytorch_utils import Conv1D

import machine
import optimizers
import ranks
from loss import NextTokenLoss

log = logging.getLogger(__name__)


def describe(config: dict, model, report: dict, n_chunks: int) -> dict:
    """The derived numbers of a run, before its first step: parameters, tokens per step, steps, words, operations."""
    training, seq_length = config["training"], config["data"]["seq_length"]
    per_step = training["batch_size"] * training["gradient_accumulation_steps"] * ranks.count()
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D))
    attention = config["model"]["n_layer"] * config["model"]["hidden_size"] * seq_length
    whole = ranks.steps_per_epoch(n_chunks, per_step) * training["num_epochs"]
    steps = min(whole, training["max_steps"] or whole)
    if (training["max_steps"] or 0) > whole:
        log.warning("training.max_steps: %d, but the run's epochs are over after %d; more need training.num_epochs",
                    training["max_steps"], whole)  # fmt: skip
    if training["warmup_steps"] >= steps:
        log.warning("training.warmup_steps: %d, but the run has %d steps: the learning rate never comes to training.lr",
                    training["warmup_steps"], steps)  # fmt: skip
    chunks = ranks.chunks_after(steps, n_chunks, per_step)
    return {
        "parameters": model.num_parameters(),
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "processes": ranks.count(),
        "tokens_per_step": per_step * seq_length,
        "steps": steps,
        "epochs": round(chunks / n_chunks, 4),
        "words": round(report["words"] / report["tokens"] * chunks * seq_length),
        "tokens": chunks * seq_length,
        "flops_per_token": 6 * (products + attention),  # forward 2, backward 4; causal attention sees T / 2 on average
        "optimizer_flops_per_step": optimizers.flops_per_step(model, training),
        "seed": training["seed"],
        "loss": loss_in_words(config.get("distillation")),
    }


def loss_in_words(distillation: dict | None) -> str:
    """What is minimised, in words."""
    if distillation is None:
        return "cross-entropy"
    alpha, temperature = distillation["alpha"], distillation["temperature"]
    kept = f", {distillation['top_k']} tokens of each place from a cache" if distillation["cache"] == "top_k" else ""
    return (
        f"{alpha:g} x cross-entropy + {1 - alpha:g} x {temperature:g}^2 x KL at temperature {temperature:g} from the "
        f"average of the teachers' {distillation['average']} (reduction {distillation['reduction']}{kept})"
    )


def fit_to_machine(config: dict, model, plan: dict, bos_token_id: int):
    """Choose number format, compilation and attention kernel for this machine; returns the loss, says why in `plan`."""
    training, cuda = config["training"], torch.cuda.is_available()
    precision, why = machine.pick_precision(training)
    matmul_flops = machine.matmul_flops(precision) * ranks.count()
    seconds = plan["tokens"] * plan["flops_per_token"] / matmul_flops
    compiled, why_compiled = machine.pick_compile(
        training, seconds / machine.share_of_products(precision, False), precision
    )
    if not cuda:
        machine.keep_freed_memory()
    if machine.eager_is_faster(precision, config["data"]["seq_length"]):
        model.set_attn_implementation("eager")
    plan |= {
        "precision": precision, "precision_reason": why, "compile": compiled, "compile_reason": why_compiled,
        "matmul_flops": matmul_flops,
        "expected_seconds": seconds / machine.share_of_products(precision, compiled) + optimizer_seconds(plan),
    }  # fmt: skip
    plan["cuda_graphs"], plan["cuda_graphs_reason"] = (
        pick_recording(config, precision, compiled) if cuda else (False, "no CUDA")
    )
    chunked = training["chunked_loss"] if training["chunked_loss"] != "auto" else not cuda
    return NextTokenLoss(
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32, batch_size=training["batch_size"],
        compile=compiled, chunked=chunked, mask_from=bos_token_id if config["data"]["document_mask"] else None,
        recorded=plan["cuda_graphs"],
    )  # fmt: skip


def pick_recording(config: dict, precision: str, compiled: bool) -> tuple[bool, str]:
    """(whether a batch's passes are recorded as a CUDA graph on a GPU, reason); see graphs.py."""
    training = config["training"]
    hindrances = [
        (not training["cuda_graphs"], "as asked"),
        (ranks.count() > 1, "not with several processes"),
        (precision == "fp16", "not with fp16, whose scale changes"),
        (training["gradient_checkpointing"], "not with training.gradient_checkpointing"),
        ("distillation" in config, "not with teachers"),
        (config["model"]["type"] == "GPTJ" and not compiled, "not for GPT-J without compilation"),
    ]
    return next(((False, why) for there, why in hindrances if there), (True, "one call starts a batch's passes"))


def optimizer_seconds(plan: dict) -> float:
    """What the optimiser's products take of a run: in Muon's own number format, all of them in each process."""
    if not plan["optimizer_flops_per_step"]:
        return 0.0
    own = "bf16" if machine.fast_dtype(machine.pick_device()) == torch.bfloat16 else "fp32"
    flops = plan["steps"] * plan["optimizer_flops_per_step"]
    return flops / machine.matmul_flops(own) / machine.share_of_products(own, False)


def duration(seconds: float) -> str:
    """'42 s', '7 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(config: dict, plan: dict, example: str) -> None:
    """The derived numbers and one decoded training example, on stdout."""
    training = config["training"]
    factors = training["batch_size"], training["gradient_accumulation_steps"], plan["processes"]
    batch = " x ".join(str(factor) for factor in (*factors, config["data"]["seq_length"]))
    print(f"model       {config['model']['type']}, {plan['parameters']:,} parameters "
          f"({plan['parameters_without_embeddings']:,} without embeddings)")  # fmt: skip
    print(f"step        {plan['tokens_per_step']:,} tokens (batch x accumulation x processes x seq_length: {batch})")
    print(f"run         {plan['steps']:,} steps, {plan['epochs']:g} epochs, about {plan['words']:,} words, "
          f"{plan['tokens']:,} tokens")  # fmt: skip
    print(f"precision   {plan['precision']} ({plan['precision_reason']})")
    print(f"compile     {'yes' if plan['compile'] else 'no'} ({plan['compile_reason']})")
    if torch.cuda.is_available():
        print(f"CUDA graphs {'yes' if plan['cuda_graphs'] else 'no'} ({plan['cuda_graphs_reason']})")
    speed, work = f"{plan['matmul_flops'] / 1e9:,.0f} GFLOP/s", f"{plan['flops_per_token'] / 1e6:,.1f} MFLOP"
    teachers = config.get("distillation", {}).get("teachers", [])
    if teachers:
        print(f"teachers    {', '.join(teachers)}; loss = {plan['loss']}")
    time = duration(plan["expected_seconds"]) + (" without the teachers' part" if teachers else "")
    muon = plan["optimizer_flops_per_step"]
    work += " a token" + (f", {muon / 1e9:,.1f} GFLOP of Muon's a step" if muon else "")
    print(f"time        about {time} ({speed} in products of matrices, {work})")
    print(f"example     {example!r}", flush=True)
