"""Find out what this machine can do: its devices, number formats, compiler, speed, memory.

Everything here is about the machine alone: no function needs a model or a configuration.
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

# options of glibc's mallopt; Python has no names for them, these are the numbers in malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


# ---- devices and number formats -----------------------------------------------------------------


@functools.cache  # so that it warns once
def pick_device(device: str | None = None) -> torch.device:
    """Return the device for "cpu", "cuda", "cuda:1" or "mps".

    None and "auto" take a GPU with CUDA, or else the CPU. If CUDA is requested but this machine has
    none, warn and fall back to the CPU: the same command then works on a laptop too. Any other
    device that does not exist is a ValueError.
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
            f"device {device} does not exist; {chosen.type} devices on this machine: {available}"
        )
    return chosen


@functools.cache
def cpu_has_bf16_units() -> bool:
    """Return True if this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX).

    torch does not tell, so this reads /proc/cpuinfo. On systems other than Linux the answer is
    always False.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype with the fastest matrix products: bfloat16 with hardware for it, or float32.

    A processor without that hardware emulates bfloat16, which is slower than float32.
    """
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = device.type == "cpu" and cpu_has_bf16_units()
    return torch.bfloat16 if has_units else torch.float32


# ---- compiler and speed -------------------------------------------------------------------------


def compiler_missing() -> str | None:
    """Name what torch.compile needs but this machine lacks; return None if it can compile."""
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
        return f"Python's headers (the python3-dev package; {header} does not exist)"
    return None


def matmul_flops(precision: str) -> float:
    """Measure the speed of a large matrix product in floating-point operations per second.

    Training cannot be faster than this, so a run reports its speed as a share of it. The fastest of
    five products counts: other processes can only slow one down.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if on_gpu else 1024
    # the numbers are random, as in training: a GPU uses less power on constants and runs faster
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
    """Keep the memory that this process frees, so that it can reuse it (only with glibc, on Linux).

    By default glibc returns every large block to the system at once, and when training asks for it
    again, a moment later, the kernel has to fill new pages with zeros. That was 40,000 to 126,000
    page faults in each training step on a CPU. Without them, and with rotary angles looked up
    instead of computed, training rose from 8,266 to 9,629 tokens per second (docs/results.md).
    """
    gigabyte = 1 << 30
    older_limit = 1 << 25  # older releases of glibc refuse a threshold above 32 MB
    if _call_glibc("mallopt", M_MMAP_THRESHOLD, gigabyte) or _call_glibc(
        "mallopt", M_MMAP_THRESHOLD, older_limit
    ):
        _call_glibc("mallopt", M_TRIM_THRESHOLD, (1 << 31) - 1)


def _call_glibc(function: str, *args: int) -> int:
    """Call a function of the C library; return 0, which means failure, if it does not exist."""
    # musl, macOS and Windows have no such function
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return getattr(ctypes.CDLL(None), function)(*args)
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Return True if torch raised this error because a GPU or the CPU ran out of memory."""
    message = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    return any(sign in message for sign in signs)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring `peak_memory_gb` again from now on.

    This works on CUDA devices and on Linux. Elsewhere the peak is that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # first give back what keep_freed_memory has kept, or it would count as memory in use
        _call_glibc("malloc_trim", 0)
        # writing 5 resets the peak; some containers do not permit it, and then the old peak remains
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_bytes() -> int:
    """Return the resident memory of this process, or 0 on systems without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory since `reset_peak_memory`, in units of 1e9 bytes.

    On a CUDA device this is the memory that torch allocated there; otherwise it is the resident
    memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
