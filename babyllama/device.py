"""What this machine can do: devices, number formats, compilation, the speed of matrix products, memory in use.

It looks at the machine only and knows no model; the one setting it changes is keep_freed_memory's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import re
import sys
from pathlib import Path

import torch

log = logging.getLogger(__name__)

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
    devices = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }[chosen.type]
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


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees for what it needs next (glibc; elsewhere nothing happens).

    Left to itself glibc gives large blocks back at once, and the system hands each out again as fresh pages of zeros: a
    quarter of the time of a training step on a CPU (docs/results.md). Older releases keep blocks up to 32 MB only.
    """
    if _call_glibc("mallopt", M_MMAP_THRESHOLD, 1 << 30) or _call_glibc(
        "mallopt", M_MMAP_THRESHOLD, 1 << 25
    ):
        _call_glibc("mallopt", M_TRIM_THRESHOLD, (1 << 31) - 1)


def _call_glibc(function: str, *args: int) -> int:
    """What a function of the C library returns: 1 for done; 0 where there is no such function."""
    with contextlib.suppress(
        OSError, AttributeError, TypeError
    ):  # other C libraries, other systems
        return getattr(ctypes.CDLL(None), function)(*args)
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this because a device, or the CPU, has no memory left."""
    return any(
        words in str(error).lower()
        for words in ("out of memory", "can't allocate memory", "alloc_failed")
    )


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gb` start anew, where that can be done: CUDA devices and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        _call_glibc("malloc_trim", 0)  # what keep_freed_memory has kept
        with contextlib.suppress(
            OSError
        ):  # where it is not allowed the peak stays that of the process so far
            Path("/proc/self/clear_refs").write_text(
                "5", encoding="ascii"
            )  # 5: the peak of the resident memory


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
