"""Choose how this machine computes a training step: number format, attention kernel, compilation.

Precision, compilation and CUDA graphs come with a reason, which is printed before step 0, and a key
of the `training` section overrides them. The attention kernel is simply the faster one, because all
of them compute the same up to rounding. The data and Trainer do not matter here.

    execution = choose_execution(config, plan)  # the choices, their reasons, the time
    use_fast_kernels(config, model, execution.precision)
    loss = build_loss(config, bos_token_id, execution.precision, execution.compile)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from babyllama import distributed
from babyllama.architectures import ARCHITECTURES
from babyllama.device import (
    compiler_missing,
    fast_dtype,
    keep_freed_memory,
    matmul_flops,
    pick_device,
)
from babyllama.planning.plan import Plan
from babyllama.training.loss import NextTokenLoss

# Compiling takes 20 to 60 s, so it pays off only in longer runs. In float32 on a CPU it saves less,
# because most of a step is matrix products, compiled or not. All figures are measured
# (docs/results.md).
MIN_SECONDS_TO_COMPILE = 300
MIN_SECONDS_TO_COMPILE_FP32_CPU = 1200
# the share of the speed of bare matrix products that training reaches: (not compiled, compiled)
EXPECTED_MFU = (0.25, 0.5)
EXPECTED_MFU_FP32_CPU = (0.5, 0.6)


@dataclass(frozen=True)
class Execution:
    """The choices of this machine for a run, their reasons, and what the run takes.

    `matmul_flops` is the measured speed of matrix products, of all processes together.
    """

    precision: str
    precision_reason: str
    compile: bool
    compile_reason: str
    matmul_flops: float
    expected_seconds: float
    cuda_graphs: bool
    cuda_graphs_reason: str
    memory_bytes: dict[str, int] | None = None  # of each part of a process, on a CPU
    benchmark: dict[str, Any] | None = None  # TrainingBenchmark.cost


# ---- the choices --------------------------------------------------------------------------------


def pick_precision(training: dict[str, Any]) -> tuple[str, str]:
    """Return ("fp32", "bf16" or "fp16", reason) for a training section on this machine."""
    if training["fp16"]:
        requested = "fp16"
    elif training["bf16"]:
        requested = "bf16"
    else:
        requested = training["precision"]

    # find the fastest format of this machine
    cuda = torch.cuda.is_available()
    has_bf16 = fast_dtype(pick_device()) == torch.bfloat16
    best = "bf16" if has_bf16 else "fp16" if cuda else "fp32"
    name = torch.cuda.get_device_name() if cuda else "this CPU"
    units = f"{name} has {'' if has_bf16 else 'no '}units for bf16"

    if requested == "auto":
        return best, units if cuda else f"no CUDA; {units}"
    if requested == "fp16" and not cuda:
        return best, f"fp16 needs CUDA; {units}"
    if requested == "bf16" and not has_bf16:
        if cuda:
            return "fp16", f"bf16 was requested, but {units}"
        return "bf16", f"as requested, although {units}"
    return requested, "as requested"


def eager_is_faster(precision: str, seq_length: int) -> bool:
    """Return True if plain attention is faster here than torch's flash kernel for CPUs.

    It was in bf16 but not in float32 (docs/results.md). Its memory grows with the square of
    `seq_length`, so long chunks keep the flash kernel.
    """
    return precision == "bf16" and not torch.cuda.is_available() and seq_length <= 512


def pick_compile(training: dict[str, Any], seconds: float, precision: str) -> tuple[bool, str]:
    """Return (compile or not, reason) for a run that would take `seconds` without compilation.

    Raise ValueError if the section asks for compilation and this machine has no compiler.
    """
    requested = training["torch_compile"]
    if requested is None:
        requested = training["compile"]
    missing = compiler_missing()
    if requested is True and missing:
        raise ValueError(
            f"training.compile: true needs {missing}, which was not found; install it or use auto"
        )
    if requested != "auto":
        return requested, "as requested"

    # auto: compile if it saves more time than it takes
    if training["fsdp"]:
        return False, "not with training.fsdp"
    if missing:
        return False, f"torch.compile needs {missing}, which was not found"
    if _is_fp32_on_cpu(precision):
        min_seconds = MIN_SECONDS_TO_COMPILE_FP32_CPU
    else:
        min_seconds = MIN_SECONDS_TO_COMPILE
    if seconds < min_seconds:
        return False, "the run is too short for compilation to pay off"
    return True, "the run is long enough for compilation to pay off"


def pick_cuda_graphs(config: dict, precision: str, compiled: bool) -> tuple[bool, str]:
    """Return (use CUDA graphs or not, reason); cuda_graphs.py explains what they are."""
    training = config["training"]
    if not training["cuda_graphs"]:
        return False, "as requested"
    if distributed.world_size() > 1:
        return False, "not with several processes"
    if precision == "fp16":
        return False, "not with fp16, whose loss scale changes"
    if training["gradient_checkpointing"]:
        return False, "not with training.gradient_checkpointing"
    if "distillation" in config:
        return False, "not with teachers"
    if ARCHITECTURES[config["model"]["type"]].graph_needs_compile and not compiled:
        return False, f"not for {config['model']['type']} without compilation"
    return True, "one call starts all kernels of a batch"


def choose_execution(config: dict, plan: Plan) -> Execution:
    """Return how to compute the run that `plan` describes, and how long that will take."""
    # choose by how long the run takes as it is
    training = config["training"]
    precision, precision_reason = pick_precision(training)
    flops_per_second = matmul_flops(precision) * distributed.world_size()
    ideal_seconds = plan.tokens * plan.flops_per_token / flops_per_second
    uncompiled_seconds = ideal_seconds / expected_mfu(precision, False)
    if training["max_minutes"]:
        uncompiled_seconds = 60 * training["max_minutes"]
    compiled, compile_reason = pick_compile(training, uncompiled_seconds, precision)
    if torch.cuda.is_available():
        cuda_graphs, cuda_graphs_reason = pick_cuda_graphs(config, precision, compiled)
    else:
        cuda_graphs = False
        cuda_graphs_reason = "no CUDA"

    # estimate how long it takes with these choices
    seconds = ideal_seconds / expected_mfu(precision, compiled) + optimizer_seconds(plan)
    if training["max_minutes"] and not training["max_steps"]:
        seconds = 60 * training["max_minutes"]  # the steps will be chosen to take that long
    return Execution(
        precision=precision,
        precision_reason=precision_reason,
        compile=compiled,
        compile_reason=compile_reason,
        matmul_flops=flops_per_second,
        expected_seconds=seconds,
        cuda_graphs=cuda_graphs,
        cuda_graphs_reason=cuda_graphs_reason,
    )


def use_fast_kernels(config: dict, model, precision: str) -> None:
    """Choose the model's attention kernel; on a CPU, also keep the memory that tensors free."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    if eager_is_faster(precision, config["data"]["seq_length"]):
        model.set_attn_implementation("eager")


def build_loss(config: dict, bos_token_id: int, precision: str, compile: bool) -> NextTokenLoss:
    """Return the loss to train with."""
    training = config["training"]
    chunked = training["chunked_loss"]
    if "distillation" in config:
        chunked = True  # the loss with teachers always works in slices
    elif chunked == "auto":
        chunked = not torch.cuda.is_available()
    return NextTokenLoss(
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        batch_size=training["batch_size"],
        compile=compile,
        chunked=chunked,
        document_bos_id=bos_token_id if config["data"]["document_mask"] else None,
    )


# ---- time ----------------------------------------------------------------------------------------


def _is_fp32_on_cpu(precision: str) -> bool:
    return precision == "fp32" and not torch.cuda.is_available()


def expected_mfu(precision: str, compiled: bool) -> float:
    """Return the share of the speed of bare matrix products that training should reach here."""
    shares = EXPECTED_MFU_FP32_CPU if _is_fp32_on_cpu(precision) else EXPECTED_MFU
    return shares[compiled]


def optimizer_seconds(plan: Plan) -> float:
    """Return how long the optimizer steps of a run take.

    Only Muon's matrix products count. Every process computes all of them, so more processes do not
    make this faster.
    """
    if not plan.optimizer_flops_per_step:
        return 0.0
    # Muon picks its number format itself, whatever the precision of the run
    precision = "bf16" if fast_dtype(pick_device()) == torch.bfloat16 else "fp32"
    flops = plan.steps * plan.optimizer_flops_per_step
    return flops / matmul_flops(precision) / expected_mfu(precision, False)
