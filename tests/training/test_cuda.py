"""GPU only: the same numbers as on the CPU, and no waiting between the rows of the log."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import build_tiny_model, tiny_config

from babyllama.config import check_config
from babyllama.evaluation import fast_choices
from babyllama.evaluation.generation import generate
from babyllama.training import kernels
from babyllama.training.arguments import training_arguments
from babyllama.training.loss import NextTokenLoss
from babyllama.training.optimizers import make_optimizer
from babyllama.training.trainer import LMTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
KINDS = ("Llama", "GPT2", "GPTJ")


class Watch(transformers.TrainerCallback):
    """From one step on, whatever waits for the device is an error."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


def rows_of(n: int) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": row} for row in np.random.default_rng(0).integers(3, 400, (n, 32))]


def train(
    folder: Path,
    kind: str = "Llama",
    *,
    steps=12,
    extra=0,
    compiled=False,
    dropout=0.0,
    callbacks=(),
    **keys,
):
    """The trainer after `steps` steps and an epoch's last batch of `extra` chunks; its model has seen them once."""
    torch._dynamo.reset()
    keys = {f"training__{key}": value for key, value in keys.items()}
    config = check_config(
        tiny_config(*[folder] * 3, training__num_epochs=1, **{"training__logging_steps": 1, **keys})
    )
    config["model"]["type"], training = kind, config["training"]
    recorded, _ = kernels.pick_cuda_graphs(config, training["precision"], compiled)
    arguments = training_arguments(config, folder, training["precision"])
    arguments.save_strategy = arguments.eval_strategy = "no"
    batch = training["batch_size"]
    dtype = torch.bfloat16 if training["precision"] == "bf16" else torch.float32
    model = build_tiny_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    trainer = LMTrainer(
        model=model, args=arguments, train_dataset=rows_of(steps * batch * training["gradient_accumulation_steps"] + extra),
        byte_lengths=[1] * 400, training=training, callbacks=list(callbacks),
        loss=NextTokenLoss(dtype=dtype, batch_size=batch, compile=compiled), cuda_graphs=recorded,
    )  # fmt: skip
    trainer.train()
    return trainer


def column(trainer: LMTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_gpu_between_rows_of_the_log(tmp_path, optimizer, compiled):
    watch = Watch(4, 10)
    try:
        train(tmp_path, compiled=compiled, callbacks=[watch], optimizer=optimizer, precision="bf16", ema=0.9,
              logging_steps=100)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_batches_have_the_same_losses(tmp_path, kind, accumulation, compiled):
    """Also where the last batch of the epoch is a smaller one, alone or behind others of its step."""
    found = {}
    for on in (True, False):
        keys = {"gradient_accumulation_steps": accumulation, "cuda_graphs": on, "compile": compiled}
        trainer = train(
            tmp_path / str(on), kind, extra=8 * (accumulation - 1) + 5, compiled=compiled, **keys
        )
        recorded = on and (
            compiled or kind != "GPTJ"
        )  # whose attention copies from the CPU where it is not compiled
        kinds = set(trainer.graphs.graphs if trainer.graphs else ())
        assert kinds == (
            {False, True} if recorded and accumulation > 1 else {False} if recorded else set()
        )
        found[on] = column(trainer, "loss"), column(trainer, "grad_norm")
    assert len(found[True][0]) == 13
    assert found[True][0] == pytest.approx(found[False][0], abs=2e-4)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-2)
    assert max(found[True][0]) - min(found[True][0]) > 0.01


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_batch_has_new_dropout_each_time(tmp_path, compiled):
    trainer = train(tmp_path, "GPT2", compiled=compiled, dropout=0.5, gradient_accumulation_steps=1)
    graph, loss = trainer.graphs.graphs[False]
    seen = set()
    for _ in range(4):
        graph.replay()
        seen.add(loss.item())
    assert len(seen) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_bf16_batch_has_the_loss_and_gradients_of_float32_on_the_cpu(kind):
    model, ids = (
        build_tiny_model(kind).train(),
        torch.as_tensor(np.stack([r["input_ids"] for r in rows_of(8)])),
    )
    on_gpu = copy.deepcopy(model).cuda()
    NextTokenLoss()(model, ids).backward()
    for chunked in (False, True):
        on_gpu.zero_grad()
        loss_of = NextTokenLoss(dtype=torch.bfloat16, batch_size=8, compile=True, chunked=chunked)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = loss_of(on_gpu, ids.cuda())
        found.backward()
        with torch.no_grad():
            assert found.item() == pytest.approx(NextTokenLoss()(model, ids).item(), rel=2e-3)
        for (name, own), other in zip(on_gpu.named_parameters(), model.parameters(), strict=True):
            gap = (own.grad.cpu() - other.grad).norm() / other.grad.norm().clamp(min=1e-6)
            assert gap < 0.05, f"{name}: {gap}"


def test_a_step_of_muon_equals_the_cpu_step():
    training = check_config(tiny_config(*[Path("x")] * 3, training__optimizer="muon"))["training"]
    model, ids = (
        build_tiny_model("Llama").train(),
        torch.as_tensor(np.stack([r["input_ids"] for r in rows_of(8)])),
    )
    before = [p.detach().clone() for p in model.parameters()]
    on_gpu = copy.deepcopy(model).cuda()
    for one in (model, on_gpu):
        (NextTokenLoss()(one, ids.to(one.device)) / ids.numel()).backward()
        make_optimizer(one, training).step()
    for (name, own), other, old in zip(
        on_gpu.named_parameters(), model.parameters(), before, strict=True
    ):
        gap = (own.detach().cpu() - other).norm() / (other - old).norm()
        assert gap < 0.05, f"{name}: {gap}"  # Newton and Schulz in bf16


@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_generates_the_same_text_as_the_cpu(kind, tokenizer):
    model = build_tiny_model(kind)
    prompts, options = (
        ["The cat sees", "The", "The old dog near the river"],
        {"max_new_tokens": 24, "temperature": 0},
    )
    expected = generate(model, tokenizer, prompts, **options)
    assert generate(model.cuda(), tokenizer, prompts, **options) == expected
    assert (
        generate(model, tokenizer, prompts[1:2], **options) == expected[1:2]
    )  # nothing on the left


def test_a_gpu_scores_few_texts_in_float32():
    rng, model = np.random.default_rng(1), build_tiny_model("Llama")
    texts = [[1, *rng.integers(3, 400, n).tolist()] for n in rng.integers(4, 20, 1200)]
    expected, _ = fast_choices.relative_scores(model, texts, [1] * 1200, [2] * 600)
    scores, precision = fast_choices.relative_scores(model.cuda(), texts, [1] * 1200, [2] * 600)
    assert precision == {"items": 600, "float32_items": 600}
    gaps = scores[::2] - scores[1::2]
    assert gaps == pytest.approx(
        expected[::2] - expected[1::2], abs=0.05
    )  # most of them from the CPU's fast pass
