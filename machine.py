"""What this machine can do: number formats that it has units for, and what is best to take for a run.

It looks at the machine only; it changes no setting and knows no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def cpu_has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX); read from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def pick_precision(training: dict[str, Any]) -> tuple[str, str]:
    """(precision, reason) for a training section on this machine: "fp32", "bf16" or "fp16", and why in one line."""
    asked = "fp16" if training["fp16"] else "bf16" if training["bf16"] else training["precision"]
    if torch.cuda.is_available():
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if asked == "auto":
            return best, f"the fastest that {torch.cuda.get_device_name()} has units for"
        if asked == "bf16" and best == "fp16":
            return "fp16", f"bf16 asked for, but {torch.cuda.get_device_name()} has no units for it"
        return asked, "as asked"
    best = "bf16" if cpu_has_bf16_units() else "fp32"
    units = "has units for bf16" if best == "bf16" else "has no units for bf16"
    if asked == "auto":
        return best, f"no CUDA; this CPU {units}"
    if asked == "fp16":
        return best, f"fp16 asked for, but it needs CUDA; this CPU {units}"
    if asked == "bf16" and best == "fp32":
        return "bf16", "as asked, though this CPU has no units for bf16 and float32 would be faster"
    return asked, "as asked"
