"""The memory estimate of the plan, against what torch and the system count."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from babyllama.planning.execution import build_loss
from babyllama.planning.memory import activation_bytes, estimate_memory
from train import create_model, load_config


@pytest.mark.parametrize("model_type", ["Llama", "GPT2", "GPTJ"])
def test_activations_are_what_the_forward_pass_leaves_in_memory(model_type, config_file, tokenizer):
    """The profiler counts what is allocated, less what is freed, while the graph still exists."""
    config = load_config(str(config_file(model__type=model_type, training__batch_size=5)))
    model = create_model(config, tokenizer)
    loss = build_loss(config, 1, precision="fp32", compile=False)
    state = torch.get_rng_state()
    estimate = activation_bytes(config, model, loss)
    assert torch.equal(torch.get_rng_state(), state)
    input_ids = torch.ones((5, config["data"]["seq_length"]), dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profiler:
        outputs = model.base_model(input_ids=input_ids, use_cache=False)
    left = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert outputs.last_hidden_state.requires_grad
    assert estimate == pytest.approx(left, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the estimate is for CPUs")
def test_the_estimate_adds_up_weights_gradients_and_optimizer(config_file, tokenizer):
    config = load_config(str(config_file(training__ema=0.9, training__chunked_loss=False)))
    model = create_model(config, tokenizer)
    loss = build_loss(config, 1, precision="fp32", compile=False)
    parts = estimate_memory(config, model, loss)
    n = sum(p.numel() for p in model.parameters())
    assert parts["weights"] == parts["gradients"] == 4 * n
    assert parts["optimizer"] == 8 * n + 4 * n  # AdamW's moments and the average
    # a logit and its log-softmax, in float32, of every token of a batch
    tokens = config["training"]["batch_size"] * config["data"]["seq_length"]
    assert parts["logits"] == 8 * tokens * len(tokenizer)

    # with teachers the loss works in slices, whatever the key says
    loss = build_loss({**config, "distillation": {}}, 1, precision="fp32", compile=False)
    in_slices = estimate_memory(config, model, loss)
    loss = build_loss(load_config(str(config_file(training__chunked_loss=True))), 1, "fp32", False)
    assert in_slices["logits"] == estimate_memory(config, model, loss)["logits"] != parts["logits"]


@pytest.mark.slow
def test_the_measured_peak_is_within_a_fifth_of_the_estimate(config_file, tmp_path):
    path = config_file(
        model__hidden_size=256, model__n_layer=4, training__batch_size=128, training__max_steps=4
    )
    command = [sys.executable, "train.py", "--config", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    metrics = json.loads((tmp_path / "models" / "tiny" / "training_metrics.json").read_text())
    estimate = sum(metrics["plan"]["memory_bytes"].values()) / 1e9
    assert metrics["results"]["peak_memory_gb"] == pytest.approx(estimate, rel=0.2)
