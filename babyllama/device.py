"""Pick the device and probe what this machine can do: number formats, compiler, speed, memory.

Knows nothing about models or configurations.
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

import torch

log = logging.getLogger(__name__)

# options of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


# ---- devices and number formats -----------------------------------------------------------------


@functools.cache  # so that it warns once
def pick_device(device: str | None = None) -> torch.device:
    """Return the device for "cpu", "cuda", "cuda:1" or "mps"; None and "auto" prefer CUDA.

    Falls back to the CPU with a warning if CUDA is requested but unavailable.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu(:0)?|mps|cuda(:\d+)?", str(device)):
        raise ValueError(f'device "{device}" is unknown: use auto, cpu, cuda, cuda:N or mps')
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        log.warning("CUDA is not available; using the CPU")
        return torch.device("cpu")
    available = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }[chosen.type]
    if (chosen.index or 0) >= available:
        raise ValueError(
            f"device {device} does not exist: this machine has {available} of its kind"
        )
    return chosen


@functools.cache
def cpu_has_bf16_units() -> bool:
    """Return True if this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX).

    Reads /proc/cpuinfo, so it is False on systems other than Linux.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the fastest matrix products: bfloat16 if in hardware, else float32."""
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = device.type == "cpu" and cpu_has_bf16_units()
    return torch.bfloat16 if has_units else torch.float32


# ---- compiler and speed -------------------------------------------------------------------------


def compiler_missing() -> str | None:
    """Return what torch.compile needs and this machine lacks, or None if it can compile."""
    if torch.cuda.is_available():
        if not importlib.util.find_spec("triton"):
            return "the triton package"
        requirement = "a C compiler (gcc or clang)"
        compilers = [os.environ.get("CC", ""), "gcc", "clang"]
    else:
        requirement = "a C++ compiler (g++ or clang++)"
        compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        return requirement
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"Python's headers (python3-dev; there is no {header})"
    return None


def matmul_flops(precision: str) -> float:
    """Return the operations per second of a large matrix product, measured: the best of five."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if on_gpu else 1024
    # random numbers, as in training: a GPU multiplies constants with less power, so faster
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn((size, size), generator=generator, device=device).to(dtype)
    b = torch.randn((size, size), generator=generator, device=device).to(dtype)
    best_seconds = float("inf")
    for _ in range(6):  # the first one warms up
        started = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best_seconds = min(best_seconds, time.perf_counter() - started)
    return 2 * size**3 / best_seconds


# ---- memory -------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let the process reuse the memory it frees instead of returning it to the system (glibc only).

    By default glibc returns large blocks at once and the system hands each out again as fresh pages
    of zeros, which takes a quarter of a training step on a CPU (docs/results.md). Python has no
    other way to say so. Older releases of glibc keep blocks of up to 32 MB only.
    """
    if _call_glibc("mallopt", M_MMAP_THRESHOLD, 1 << 30) or _call_glibc(
        "mallopt", M_MMAP_THRESHOLD, 1 << 25
    ):
        _call_glibc("mallopt", M_TRIM_THRESHOLD, (1 << 31) - 1)


def _call_glibc(function: str, *args: int) -> int:
    """Call a function of the C library; returns 0 (failure) if there is no such function."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return getattr(ctypes.CDLL(None), function)(*args)
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if torch raised this error because a device or the CPU ran out of memory."""
    message = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    return any(sign in message for sign in signs)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory_gb` (CUDA and Linux; does nothing elsewhere)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        _call_glibc("malloc_trim", 0)  # return what keep_freed_memory has kept
        with contextlib.suppress(
            OSError
        ):  # not permitted: the peak since the process started stays
            # 5 resets the peak of resident memory
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory since `reset_peak_memory` in units of 1e9 bytes.

    Allocated memory on a CUDA device, else the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
