"""What this machine can do: devices, number formats, compilation, the speed of matrix products, memory in use.

It looks at the machine only and knows no model; the one setting it changes is keep_freed_memory's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
# Measured, docs/benchmarks.md: compiling takes 20 to 60 s; what it saves, and the share of the speed of matrix products
# that training reaches without and with it. In float32 on a CPU the products take most of the time either way.
COMPILE_WORTH_SECONDS, FP32_COMPILE_WORTH_SECONDS = 300, 1200
SHARES, FP32_SHARES = (0.25, 0.5), (0.5, 0.6)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@functools.cache  # so that the warning comes once
def pick_device(device: str | None = None) -> torch.device:
    """The device for None or "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1" or "mps".

    CUDA asked for on a machine without it is said in one warning line, once, and answered with the CPU.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu(:0)?|mps|cuda(:\d+)?", str(device)):
        raise ValueError(f'device "{device}" is unknown: use auto, cpu, cuda, cuda:N or mps')
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        log.warning("no CUDA device here: running on the CPU")
        return torch.device("cpu")
    devices = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}[chosen.type]
    if (chosen.index or 0) >= devices:
        raise ValueError(f"device {device} does not exist: this machine has {devices} of its kind")
    return chosen


@functools.cache
def cpu_has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX); read from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def fast_dtype(device: torch.device) -> torch.dtype:
    """The number format in which this device multiplies matrices fastest: bfloat16 where it has units for it."""
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = device.type == "cpu" and cpu_has_bf16_units()
    return torch.bfloat16 if has_units else torch.float32


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
        return ("fp16", f"bf16 asked for, but {units}") if cuda else ("bf16", f"as asked, though {units}")
    return asked, "as asked"


def eager_is_faster(precision: str, seq_length: int) -> bool:
    """Whether plain attention beats the CPU's flash kernel here: docs/benchmarks.md."""
    return precision == "bf16" and not torch.cuda.is_available() and seq_length <= 512


def compiler_missing() -> str | None:
    """What torch.compile lacks on this machine, or None: a compiler, Python's headers, for a GPU the triton package."""
    if torch.cuda.is_available():
        names, what = (os.environ.get("CC", ""), "gcc", "clang"), "a C compiler (gcc or clang)"
        if not importlib.util.find_spec("triton"):
            return "the triton package"
    else:
        names, what = (os.environ.get("CXX", ""), "g++", "clang++", "cl"), "a C++ compiler (g++ or clang++)"
    if not any(name and shutil.which(name) for name in names):
        return what
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"Python's headers (python3-dev; there is no {header})"


def _fp32_on_a_cpu(precision: str) -> bool:
    return precision == "fp32" and not torch.cuda.is_available()


def share_of_products(precision: str, compiled: bool) -> float:
    """The share of the speed of matrix products that training is expected to reach here."""
    return (FP32_SHARES if _fp32_on_a_cpu(precision) else SHARES)[compiled]


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
    if seconds < (FP32_COMPILE_WORTH_SECONDS if _fp32_on_a_cpu(precision) else COMPILE_WORTH_SECONDS):
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
    random = torch.Generator(device).manual_seed(0)  # numbers as in training: constant ones would cost a GPU less power
    a, b = (torch.randn((size, size), generator=random, device=device).to(dtype) for _ in "ab")
    best = float("inf")
    for _ in range(6):  # the first warms up
        started = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees for what it needs next (glibc; elsewhere nothing happens).

    Left to itself glibc gives large blocks back at once, and the system hands each out again as fresh pages of zeros: a
    quarter of the time of a training step on a CPU (docs/benchmarks.md). Older releases keep blocks up to 32 MB only.
    """
    if _glibc("mallopt", M_MMAP_THRESHOLD, 1 << 30) or _glibc("mallopt", M_MMAP_THRESHOLD, 1 << 25):
        _glibc("mallopt", M_TRIM_THRESHOLD, (1 << 31) - 1)


def _glibc(function: str, *args: int) -> int:
    """What a function of the C library returns: 1 for done; 0 where there is no such function."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries, other systems
        return getattr(ctypes.CDLL(None), function)(*args)
    return 0


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this because a device, or the CPU, has no memory left."""
    return any(words in str(error).lower() for words in ("out of memory", "can't allocate memory", "alloc_failed"))


def memory_advice(training: dict[str, Any]) -> str:
    """What makes a step of this training section fit in less memory."""
    batch, steps = training["batch_size"], training["gradient_accumulation_steps"]
    half = " --fp16 (or --bf16)" if pick_precision(training)[0] == "fp32" else ""
    further = "--set training.gradient_checkpointing=true and --set training.chunked_loss=true take less still"
    if torch.cuda.is_available():
        further = "--set training.cuda_graphs=false takes less, " + further
    if batch == 1:
        return f"{further}; so do{half and half + ','} a smaller model and a shorter data.seq_length"
    less = f"--batch-size {batch // 2} --gradient-accumulation-steps {steps * 2}{half} --overwrite"
    return f"the same step fits in less with {less}; {further}"


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gb` start anew, where that can be done: CUDA devices and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        _glibc("malloc_trim", 0)  # what keep_freed_memory has kept
        with contextlib.suppress(OSError):  # where it is not allowed the peak stays that of the process so far
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: the peak of the resident memory


def peak_memory_gb(device: torch.device) -> float:
    """Most memory (1e9 bytes) since `forget_peak_memory`: allocated on a CUDA device, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
