"""Device names and peak memory, checked on the machine that runs the tests."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama.device import keep_freed_memory, peak_memory_gb, pick_device, reset_peak_memory


def test_wrong_device_names_list_the_valid_ones():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(ValueError, match="is unknown: use auto"):
            pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_a_missing_cuda_device_falls_back_to_the_cpu_with_one_warning(caplog):
    pick_device.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("cuda", "cuda", None):
            assert pick_device(name) == torch.device("cpu")
    assert caplog.messages == ["CUDA is not available; using the CPU"]
    with pytest.raises(ValueError, match="mps"):
        pick_device("mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_is_cuda_if_there_is_a_gpu():
    assert pick_device(None) == pick_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="does not exist"):
        pick_device("cuda:99")


def test_the_peak_memory_can_be_reset():
    device = torch.device("cpu")
    keep_freed_memory()  # the memory that it keeps must not count either
    block = np.ones(30_000_000)  # 0.24 GB
    peak_with_block = peak_memory_gb(device)
    assert block.nbytes / 1e9 < peak_with_block < 100
    del block
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this machine does not let a process reset its peak memory")
    reset_peak_memory(device)
    assert peak_memory_gb(device) < peak_with_block - 0.15
