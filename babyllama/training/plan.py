"""The plan of a run, before its first step: its derived numbers, and what it takes of this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from babyllama.device import fast_dtype, keep_freed_memory, pick_device
from babyllama.training import distributed, optimizers
from babyllama.training.loss import NextTokenLoss

# Measured, docs/results.md: compiling takes 20 to 60 s; what it saves, and the share of the speed of matrix products
# that training reaches without and with it. In float32 on a CPU the products take most of the time either way.
COMPILE_WORTH_SECONDS, FP32_COMPILE_WORTH_SECONDS = 300, 1200
SHARES, FP32_SHARES = (0.25, 0.5), (0.5, 0.6)


def pick_precision(training: dict[str, Any]) -> tuple[str, str]:
    """(precision, reason) for a training section on this machine: "fp32", "bf16" or "fp16", and why in one line."""
    asked = "fp16" if training["fp16"] else "bf16" if training["bf16"] else training["precision"]
    cuda, bf16 = torch.cuda.is_available(), fast_dtype(pick_device()) == torch.bfloat16
    best = "bf16" if bf16 else "fp16" if cuda else "fp32"
    name = torch.cuda.get_device_name() if cuda else "this CPU"
    units = f"{name} has units for bf16" if bf16 else f"{name} has no units for bf16"
    if asked == "auto":
        return best, units if cuda else f"no CUDA; {units}"
    if asked == "fp16" and not cuda:
        return best, f"fp16 asked for, but it needs CUDA; {units}"
    if asked == "bf16" and not bf16:
        return (
            ("fp16", f"bf16 asked for, but {units}")
            if cuda
            else ("bf16", f"as asked, though {units}")
        )
    return asked, "as asked"


def eager_is_faster(precision: str, seq_length: int) -> bool:
    """Whether plain attention beats the CPU's flash kernel here: docs/results.md."""
    return precision == "bf16" and not torch.cuda.is_available() and seq_length <= 512


def compiler_missing() -> str | None:
    """What torch.compile lacks on this machine, or None: a compiler, Python's headers, for a GPU the triton package."""
    if torch.cuda.is_available():
        names, what = (os.environ.get("CC", ""), "gcc", "clang"), "a C compiler (gcc or clang)"
        if not importlib.util.find_spec("triton"):
            return "the triton package"
    else:
        names, what = (
            (os.environ.get("CXX", ""), "g++", "clang++", "cl"),
            "a C++ compiler (g++ or clang++)",
        )
    if not any(name and shutil.which(name) for name in names):
        return what
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"Python's headers (python3-dev; there is no {header})"


def _is_fp32_on_cpu(precision: str) -> bool:
    return precision == "fp32" and not torch.cuda.is_available()


def expected_mfu(precision: str, compiled: bool) -> float:
    """The share of the speed of matrix products that training is expected to reach here."""
    return (FP32_SHARES if _is_fp32_on_cpu(precision) else SHARES)[compiled]


def pick_compile(training: dict[str, Any], seconds: float, precision: str) -> tuple[bool, str]:
    """(whether to compile, reason) for a training section and the seconds that the run would take without.

    ValueError where compilation is asked for and cannot be had.
    """
    asked = training["compile"] if training["torch_compile"] is None else training["torch_compile"]
    missing = compiler_missing()
    if asked is True and missing:
        raise ValueError(
            f"training.compile: true, but torch.compile needs {missing}, not found here; install it or use auto"
        )
    if asked != "auto":
        return asked, "as asked"
    if training["fsdp"]:
        return False, "not with training.fsdp"
    if missing:
        return False, f"torch.compile needs {missing}, not found here"
    if seconds < (
        FP32_COMPILE_WORTH_SECONDS if _is_fp32_on_cpu(precision) else COMPILE_WORTH_SECONDS
    ):
        return False, "a run this short would not win back the time to compile"
    return True, "the run is long enough to win back the time to compile"


def matmul_flops(precision: str) -> float:
    """Floating-point operations per second of a product of two square matrices, measured now: the best of five."""
    cuda = torch.cuda.is_available()
    size, dtype = (
        (8192 if cuda else 1024),
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32),
    )
    device = torch.device("cuda" if cuda else "cpu")
    random = torch.Generator(device).manual_seed(
        0
    )  # numbers as in training: constant ones would cost a GPU less power
    a, b = (torch.randn((size, size), generator=random, device=device).to(dtype) for _ in "ab")
    best = float("inf")
    for _ in range(6):  # the first warms up
        started = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def memory_advice(training: dict[str, Any]) -> str:
    """What makes a step of this training section fit in less memory."""
    batch, steps = training["batch_size"], training["gradient_accumulation_steps"]
    half = " --fp16 (or --bf16)" if pick_precision(training)[0] == "fp32" else ""
    further = "--set training.gradient_checkpointing=true and --set training.chunked_loss=true take less still"
    if torch.cuda.is_available():
        further = "--set training.cuda_graphs=false takes less, " + further
    if batch == 1:
        return (
            f"{further}; so do{half and half + ','} a smaller model and a shorter data.seq_length"
        )
    less = f"--batch-size {batch // 2} --gradient-accumulation-steps {steps * 2}{half} --overwrite"
    return f"the same step fits in less with {less}; {further}"


log = logging.getLogger(__name__)


def describe_run(config: dict, model, report: dict, n_chunks: int) -> dict:
    """The derived numbers of a run, before its first step: parameters, tokens per step, steps, words, operations."""
    training, seq_length = config["training"], config["data"]["seq_length"]
    per_step = (
        training["batch_size"] * training["gradient_accumulation_steps"] * distributed.world_size()
    )
    products = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)
    )
    attention = config["model"]["n_layer"] * config["model"]["hidden_size"] * seq_length
    whole = distributed.steps_per_epoch(n_chunks, per_step) * training["num_epochs"]
    steps = min(whole, training["max_steps"] or whole)
    if (training["max_steps"] or 0) > whole:
        log.warning("training.max_steps: %d, but the run's epochs are over after %d; more need training.num_epochs",
                    training["max_steps"], whole)  # fmt: skip
    if training["warmup_steps"] >= steps:
        log.warning("training.warmup_steps: %d, but the run has %d steps: the learning rate never comes to training.lr",
                    training["warmup_steps"], steps)  # fmt: skip
    chunks = distributed.chunks_after(steps, n_chunks, per_step)
    return {
        "parameters": model.num_parameters(),
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "processes": distributed.world_size(),
        "tokens_per_step": per_step * seq_length,
        "steps": steps,
        "epochs": round(chunks / n_chunks, 4),
        "words": round(report["words"] / report["tokens"] * chunks * seq_length),
        "tokens": chunks * seq_length,
        "flops_per_token": 6
        * (products + attention),  # forward 2, backward 4; causal attention sees T / 2 on average
        "optimizer_flops_per_step": optimizers.flops_per_step(model, training),
        "seed": training["seed"],
        "loss": loss_in_words(config.get("distillation")),
    }


def loss_in_words(distillation: dict | None) -> str:
    """What is minimised, in words."""
    if distillation is None:
        return "cross-entropy"
    alpha, temperature = distillation["alpha"], distillation["temperature"]
    kept = (
        f", {distillation['top_k']} tokens of each place from a cache"
        if distillation["cache"] == "top_k"
        else ""
    )
    return (
        f"{alpha:g} x cross-entropy + {1 - alpha:g} x {temperature:g}^2 x KL at temperature {temperature:g} from the "
        f"average of the teachers' {distillation['average']} (reduction {distillation['reduction']}{kept})"
    )


def choose_precision_and_kernels(config: dict, model, plan: dict, bos_token_id: int):
    """Choose number format, compilation and attention kernel for this machine; returns the loss, says why in `plan`."""
    training, cuda = config["training"], torch.cuda.is_available()
    precision, why = pick_precision(training)
    flops_per_second = matmul_flops(precision) * distributed.world_size()
    seconds = plan["tokens"] * plan["flops_per_token"] / flops_per_second
    compiled, why_compiled = pick_compile(
        training, seconds / expected_mfu(precision, False), precision
    )
    if not cuda:
        keep_freed_memory()
    if eager_is_faster(precision, config["data"]["seq_length"]):
        model.set_attn_implementation("eager")
    plan |= {
        "precision": precision, "precision_reason": why, "compile": compiled, "compile_reason": why_compiled,
        "matmul_flops": flops_per_second,
        "expected_seconds": seconds / expected_mfu(precision, compiled) + optimizer_seconds(plan),
    }  # fmt: skip
    plan["cuda_graphs"], plan["cuda_graphs_reason"] = (
        pick_cuda_graphs(config, precision, compiled) if cuda else (False, "no CUDA")
    )
    chunked = training["chunked_loss"] if training["chunked_loss"] != "auto" else not cuda
    return NextTokenLoss(
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32, batch_size=training["batch_size"],
        compile=compiled, chunked=chunked, mask_from=bos_token_id if config["data"]["document_mask"] else None,
        recorded=plan["cuda_graphs"],
    )  # fmt: skip


def pick_cuda_graphs(config: dict, precision: str, compiled: bool) -> tuple[bool, str]:
    """(whether a batch's passes are recorded as a CUDA graph on a GPU, reason); see training/cuda_graphs.py."""
    training = config["training"]
    hindrances = [
        (not training["cuda_graphs"], "as asked"),
        (distributed.world_size() > 1, "not with several processes"),
        (precision == "fp16", "not with fp16, whose scale changes"),
        (training["gradient_checkpointing"], "not with training.gradient_checkpointing"),
        ("distillation" in config, "not with teachers"),
        (config["model"]["type"] == "GPTJ" and not compiled, "not for GPT-J without compilation"),
    ]
    return next(
        ((False, why) for there, why in hindrances if there),
        (True, "one call starts a batch's passes"),
    )


def optimizer_seconds(plan: dict) -> float:
    """What the optimiser's products take of a run: in Muon's own number format, all of them in each process."""
    if not plan["optimizer_flops_per_step"]:
        return 0.0
    own = "bf16" if fast_dtype(pick_device()) == torch.bfloat16 else "fp32"
    flops = plan["steps"] * plan["optimizer_flops_per_step"]
    return flops / matmul_flops(own) / expected_mfu(own, False)


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
    print(
        f"step        {plan['tokens_per_step']:,} tokens (batch x accumulation x processes x seq_length: {batch})"
    )
    print(f"run         {plan['steps']:,} steps, {plan['epochs']:g} epochs, about {plan['words']:,} words, "
          f"{plan['tokens']:,} tokens")  # fmt: skip
    print(f"precision   {plan['precision']} ({plan['precision_reason']})")
    print(f"compile     {'yes' if plan['compile'] else 'no'} ({plan['compile_reason']})")
    if torch.cuda.is_available():
        print(
            f"CUDA graphs {'yes' if plan['cuda_graphs'] else 'no'} ({plan['cuda_graphs_reason']})"
        )
    speed, work = (
        f"{plan['matmul_flops'] / 1e9:,.0f} GFLOP/s",
        f"{plan['flops_per_token'] / 1e6:,.1f} MFLOP",
    )
    teachers = config.get("distillation", {}).get("teachers", [])
    if teachers:
        print(f"teachers    {', '.join(teachers)}; loss = {plan['loss']}")
    time = duration(plan["expected_seconds"]) + (" without the teachers' part" if teachers else "")
    muon = plan["optimizer_flops_per_step"]
    work += " a token" + (f", {muon / 1e9:,.1f} GFLOP of Muon's a step" if muon else "")
    print(f"time        about {time} ({speed} in products of matrices, {work})")
    print(f"example     {example!r}", flush=True)
