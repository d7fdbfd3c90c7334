"""Device names, checked on the machine that runs the tests."""

from __future__ import annotations

import logging

import pytest
import torch

from babyllama.device import pick_device


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
