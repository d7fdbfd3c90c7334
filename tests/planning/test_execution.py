"""Check the choices for a machine and a run: precision, compilation, CUDA graphs, memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, build_tiny_model, tiny_config

from babyllama.config import check_config
from babyllama.device import fast_dtype, matmul_flops, peak_memory_gb, pick_device
from babyllama.planning import execution, plan
from babyllama.planning.execution import (
    choose_execution,
    expected_mfu,
    pick_compile,
    pick_cuda_graphs,
)
from babyllama.training import optimizers


@pytest.fixture(scope="module")
def defaults(tmp_path_factory):
    """Return the training section with every default filled in."""
    root = tmp_path_factory.mktemp("defaults")
    return check_config(tiny_config(root, root, root))["training"]


def test_expected_time_counts_muon_once_per_process(defaults, monkeypatch):
    """Processes share the training, but each computes all of Muon's products."""
    monkeypatch.setattr(execution, "matmul_flops", lambda precision: 1e6)
    model = build_tiny_model("Llama")
    keys = {**defaults, "precision": "fp32", "compile": False, "num_epochs": 3}
    config = {
        "data": {"seq_length": 32, "document_mask": False},
        "distillation": None,
        "model": {"n_layer": 2, "hidden_size": 32},
    }
    n_chunks = 4 * keys["batch_size"] * 6
    report = {"train": {"words": 1, "tokens": 1}}
    steps = {}
    seconds = {}
    for optimizer in ("adamw", "muon"):
        config["training"] = {**keys, "optimizer": optimizer}
        for processes in (1, 2):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            run_plan = plan.make_plan(config, model, report, n_chunks)
            choices = choose_execution(config, run_plan)
            steps[optimizer, processes] = run_plan.steps
            seconds[optimizer, processes] = choices.expected_seconds

    precision = "bf16" if fast_dtype(pick_device()) == torch.bfloat16 else "fp32"
    flops = optimizers.flops_per_step(model, {"optimizer": "muon"})
    muon_seconds_per_step = flops / 1e6 / expected_mfu(precision, False)
    for processes in (1, 2):
        n_steps = steps["muon", processes]
        assert steps["adamw", processes] == n_steps
        muon_seconds = seconds["muon", processes] - seconds["adamw", processes]
        assert muon_seconds == pytest.approx(n_steps * muon_seconds_per_step)
    assert seconds["adamw", 2] == pytest.approx(seconds["adamw", 1] / 2)


def test_compile_auto_compiles_long_runs_only(defaults, monkeypatch):
    def pick(seconds: float, precision: str = "bf16", **keys) -> tuple[bool, str]:
        return pick_compile({**defaults, **keys}, seconds, precision)

    monkeypatch.setattr(execution, "compiler_missing", lambda: None)
    assert [pick(seconds)[0] for seconds in (10, 600, 10_000)] == [False, True, True]
    ten_minutes_suffice = torch.cuda.is_available()  # on a CPU float32 gains less by compilation
    compiled = [pick(seconds, "fp32")[0] for seconds in (10, 600, 10_000)]
    assert compiled == [False, ten_minutes_suffice, True]
    assert pick(10, compile=True) == (True, "as requested")
    assert pick(1e6, torch_compile=False) == (False, "as requested")
    assert pick(1, compile=False, torch_compile=True)[0] is True
    monkeypatch.setattr(execution, "compiler_missing", lambda: "a C++ compiler")
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
    "change, precision, compiled, reason_part",
    [
        ({}, "bf16", False, "one call"),
        ({}, "fp32", True, "one call"),
        ({}, "fp16", True, "fp16"),
        ({"training__cuda_graphs": False}, "bf16", True, "as requested"),
        ({"training__gradient_checkpointing": True}, "bf16", True, "gradient_checkpointing"),
        ({"model__type": "GPTJ"}, "bf16", False, "GPTJ"),
        ({"model__type": "GPTJ"}, "bf16", True, "one call"),
    ],
)
def test_cuda_graphs_are_used_if_possible(change, precision, compiled, reason_part):
    config = check_config(tiny_config(*[ROOT] * 3, **change))
    used, reason = pick_cuda_graphs(config, precision, compiled)
    assert used == (reason_part == "one call")
    assert reason_part in reason


def test_cuda_graphs_are_not_used_with_teachers():
    config = check_config(tiny_config(*[ROOT] * 3)) | {"distillation": {}}
    assert pick_cuda_graphs(config, "bf16", True) == (False, "not with teachers")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_reused_without_page_faults():
    """Count the page faults of a process that allocates and frees a large tensor repeatedly."""
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
    page_faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", code, mode]
        page_faults[mode] = int(subprocess.check_output(command, cwd=ROOT, text=True))
    assert page_faults["keep"] < page_faults["return"] / 3
