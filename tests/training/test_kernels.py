"""Precision, compilation and CUDA graphs: what is chosen for a machine and a run."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, build_tiny_model, tiny_config

from babyllama.config import check_config
from babyllama.device import fast_dtype, matmul_flops, peak_memory_gb, pick_device
from babyllama.training import kernels, optimizers, plan
from babyllama.training.kernels import expected_mfu, pick_compile


@pytest.fixture(scope="module")
def defaults(tmp_path_factory):
    """The training section with every default filled in."""
    root = tmp_path_factory.mktemp("defaults")
    return check_config(tiny_config(root, root, root))["training"]


def test_expected_time_counts_muon_once_per_process(defaults, monkeypatch):
    monkeypatch.setattr(kernels, "matmul_flops", lambda precision: 1e6)
    model, seconds = build_tiny_model("Llama"), {}
    for optimizer in ("adamw", "muon"):
        training = {
            **defaults,
            "optimizer": optimizer,
            "precision": "fp32",
            "compile": False,
            "num_epochs": 3,
        }
        config = {"data": {"seq_length": 32, "document_mask": False}, "training": training, "distillation": None,
                  "model": {"n_layer": 2, "hidden_size": 32}}  # fmt: skip
        for processes in (1, 2):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            found = plan.describe_run(
                config, model, {"words": 1, "tokens": 1}, 4 * training["batch_size"] * 6
            )
            found |= kernels.choose_precision_and_kernels(config, found)
            seconds[optimizer, processes] = found["expected_seconds"], found["steps"]
    own = optimizers.flops_per_step(model, training) / 1e6 / expected_mfu(
        "bf16" if fast_dtype(pick_device()) == torch.bfloat16 else "fp32", False)  # fmt: skip
    for processes in (1, 2):
        (plain, steps), (muon, same) = seconds["adamw", processes], seconds["muon", processes]
        assert steps == same and muon - plain == pytest.approx(steps * own)
    assert seconds["adamw", 2][0] == pytest.approx(seconds["adamw", 1][0] / 2)


def test_compile_auto_compiles_long_runs_only(defaults, monkeypatch):
    def pick(seconds: float, precision: str = "bf16", **keys) -> tuple[bool, str]:
        return pick_compile({**defaults, **keys}, seconds, precision)

    monkeypatch.setattr(kernels, "compiler_missing", lambda: None)
    assert [pick(seconds)[0] for seconds in (10, 600, 10_000)] == [False, True, True]
    slower = torch.cuda.is_available()  # on a CPU float32 gains less, so a run has to be longer
    assert [pick(seconds, "fp32")[0] for seconds in (10, 600, 10_000)] == [False, slower, True]
    assert pick(10, compile=True) == (True, "as requested")
    assert pick(1e6, torch_compile=False) == (False, "as requested")
    assert pick(1, compile=False, torch_compile=True)[0] is True
    monkeypatch.setattr(kernels, "compiler_missing", lambda: "a C++ compiler")
    assert pick(10_000)[0] is False
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, which was not found"):
        pick(1, compile=True)


def test_measuring_speed_keeps_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert matmul_flops("fp32") > 1e8
    assert torch.rand(1) == expected
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 100


@pytest.mark.parametrize(
    "change, precision, compiled, word",
    [
        ({}, "bf16", False, "one call"),
        ({}, "fp32", True, "one call"),
        ({}, "fp16", True, "fp16"),
        ({"training__cuda_graphs": False}, "bf16", True, "as requested"),
        ({"training__gradient_checkpointing": True}, "bf16", True, "gradient_checkpointing"),
        ({"model__type": "GPTJ"}, "bf16", False, "GPT-J"),
        ({"model__type": "GPTJ"}, "bf16", True, "one call"),
    ],
)
def test_cuda_graphs_are_used_if_possible(change, precision, compiled, word):
    config = check_config(tiny_config(*[ROOT] * 3, **change))
    recorded, why = kernels.pick_cuda_graphs(config, precision, compiled)
    assert recorded == (word == "one call") and word in why
    with_teachers, why = kernels.pick_cuda_graphs(
        config | {"distillation": {}}, precision, compiled
    )
    assert not with_teachers and (recorded is False or "teachers" in why)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_reused_without_page_faults():
    """Counted in page faults, of a process that makes and drops the same large tensor again and again."""
    code = """
import resource, sys, torch
from babyllama.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):  # until there is a block with room for its alignment
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    found = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", code, way],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("keep", "give back")
    }
    assert found["keep"] < found["give back"] / 3
