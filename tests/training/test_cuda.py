"""Compare a GPU with the CPU, and check that training does not wait for the GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import build_tiny_model, tiny_config

from babyllama.config import check_config
from babyllama.evaluation import fast_choices
from babyllama.evaluation.generation import generate
from babyllama.planning.execution import pick_cuda_graphs
from babyllama.training.arguments import training_arguments
from babyllama.training.loss import NextTokenLoss
from babyllama.training.optimizers import make_optimizer
from babyllama.training.trainer import LMTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
KINDS = ("Llama", "GPT2", "GPTJ", "Qwen3")


class ForbidWaiting(transformers.TrainerCallback):
    """Raise an error if training waits for the GPU after step `first` and before step `last`."""

    def __init__(self, first: int, last: int):
        self.first = first
        self.last = last

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


def random_chunks(n: int) -> list[dict[str, np.ndarray]]:
    token_ids = np.random.default_rng(0).integers(3, 400, (n, 32))
    return [{"input_ids": row} for row in token_ids]


def random_batch() -> torch.Tensor:
    """Return the ids of eight chunks, (8, 32)."""
    return torch.as_tensor(np.stack([chunk["input_ids"] for chunk in random_chunks(8)]))


def train(
    folder: Path,
    kind: str = "Llama",
    *,
    extra_chunks: int = 0,
    compiled: bool = False,
    dropout: float = 0.0,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **options,
) -> LMTrainer:
    """Return the trainer after an epoch of 12 full steps and one of `extra_chunks` chunks."""
    torch._dynamo.reset()
    settings = {"training__num_epochs": 1, "training__logging_steps": 1}
    settings |= {f"training__{key}": value for key, value in options.items()}
    config = check_config(tiny_config(folder, folder, folder, **settings))
    config["model"]["type"] = kind
    training = config["training"]
    precision = training["precision"]
    batch_size = training["batch_size"]

    arguments = training_arguments(config, folder, precision)
    arguments.save_strategy = "no"
    arguments.eval_strategy = "no"
    model = build_tiny_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cuda_graphs, _ = pick_cuda_graphs(config, precision, compiled)
    n_chunks = 12 * batch_size * training["gradient_accumulation_steps"] + extra_chunks
    trainer = LMTrainer(
        model=model,
        args=arguments,
        train_dataset=random_chunks(n_chunks),
        byte_lengths=[1] * 400,
        training=training,
        callbacks=list(callbacks),
        loss=NextTokenLoss(dtype=dtype, batch_size=batch_size, compile=compiled),
        cuda_graphs=cuda_graphs,
    )
    trainer.train()
    return trainer


def logged_values(trainer: LMTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_gpu_between_rows_of_the_log(tmp_path, optimizer, compiled):
    try:
        train(
            tmp_path,
            compiled=compiled,
            callbacks=[ForbidWaiting(first=4, last=10)],
            optimizer=optimizer,
            precision="bf16",
            ema=0.9,
            logging_steps=100,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_batches_recorded_as_cuda_graphs_have_the_same_losses(
    tmp_path, kind, accumulation, compiled
):
    """The last batch of the epoch is smaller; with accumulation, others of its step precede it."""
    losses = {}
    gradient_norms = {}
    for cuda_graphs in (True, False):
        trainer = train(
            tmp_path / str(cuda_graphs),
            kind,
            extra_chunks=8 * (accumulation - 1) + 5,
            compiled=compiled,
            gradient_accumulation_steps=accumulation,
            cuda_graphs=cuda_graphs,
            compile=compiled,
        )
        # without compilation, the attention of GPT-J copies from the CPU and cannot be recorded
        is_recorded = cuda_graphs and (compiled or kind != "GPTJ")
        expected_graphs = set()
        if is_recorded:
            expected_graphs = {False, True} if accumulation > 1 else {False}
        graphs = trainer.graphs.graphs if trainer.graphs else {}
        assert set(graphs) == expected_graphs
        losses[cuda_graphs] = logged_values(trainer, "loss")
        gradient_norms[cuda_graphs] = logged_values(trainer, "grad_norm")
    assert len(losses[True]) == 13
    assert losses[True] == pytest.approx(losses[False], abs=2e-4)
    assert gradient_norms[True] == pytest.approx(gradient_norms[False], rel=1e-2)
    assert max(losses[True]) - min(losses[True]) > 0.01


@pytest.mark.parametrize("compiled", [False, True])
def test_each_replay_of_a_cuda_graph_draws_new_dropout(tmp_path, compiled):
    trainer = train(tmp_path, "GPT2", compiled=compiled, dropout=0.5, gradient_accumulation_steps=1)
    graph, loss = trainer.graphs.graphs[False]
    losses = set()
    for _ in range(4):
        graph.replay()
        losses.add(loss.item())
    assert len(losses) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_bf16_batch_has_the_loss_and_gradients_of_float32_on_the_cpu(kind):
    cpu_model = build_tiny_model(kind).train()
    gpu_model = copy.deepcopy(cpu_model).cuda()
    token_ids = random_batch()
    cpu_loss = NextTokenLoss()(cpu_model, token_ids)
    cpu_loss.backward()
    for chunked in (False, True):
        gpu_model.zero_grad()
        compute_loss = NextTokenLoss(
            dtype=torch.bfloat16, batch_size=8, compile=True, chunked=chunked
        )
        with torch.autocast("cuda", dtype=torch.bfloat16):
            gpu_loss = compute_loss(gpu_model, token_ids.cuda())
        gpu_loss.backward()
        assert gpu_loss.item() == pytest.approx(cpu_loss.item(), rel=2e-3)
        named_parameters = gpu_model.named_parameters()
        for (name, gpu), cpu in zip(named_parameters, cpu_model.parameters(), strict=True):
            gap = (gpu.grad.cpu() - cpu.grad).norm() / cpu.grad.norm().clamp(min=1e-6)
            assert gap < 0.05, f"{name}: {gap}"


def test_a_step_of_muon_equals_the_cpu_step():
    path = Path("x")
    config = check_config(tiny_config(path, path, path, training__optimizer="muon"))
    cpu_model = build_tiny_model("Llama").train()
    gpu_model = copy.deepcopy(cpu_model).cuda()
    start = [p.detach().clone() for p in cpu_model.parameters()]
    token_ids = random_batch()
    for model in (cpu_model, gpu_model):
        loss = NextTokenLoss()(model, token_ids.to(model.device)) / token_ids.numel()
        loss.backward()
        make_optimizer(model, config["training"]).step()
    parameters = zip(gpu_model.named_parameters(), cpu_model.parameters(), start, strict=True)
    for (name, gpu), cpu, before in parameters:
        gap = (gpu.detach().cpu() - cpu).norm() / (cpu - before).norm()
        assert gap < 0.05, f"{name}: {gap}"  # the Newton-Schulz iteration runs in bf16


@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_generates_the_same_text_as_the_cpu(kind, tokenizer):
    model = build_tiny_model(kind)
    prompts = ["The cat sees", "The", "The old dog near the river"]
    options = {"max_new_tokens": 24, "temperature": 0}
    expected = generate(model, tokenizer, prompts, **options)
    assert generate(model.cuda(), tokenizer, prompts, **options) == expected
    # a prompt alone has no padding on the left
    assert generate(model, tokenizer, prompts[1:2], **options) == expected[1:2]


def test_a_gpu_scores_few_texts_in_float32():
    rng = np.random.default_rng(1)
    model = build_tiny_model("Llama")
    texts = [[1, *rng.integers(3, 400, n).tolist()] for n in rng.integers(4, 20, 1200)]
    starts = [1] * 1200
    counts = [2] * 600
    cpu_scores, _ = fast_choices.relative_scores(model, texts, starts, counts)
    gpu_scores, precision = fast_choices.relative_scores(model.cuda(), texts, starts, counts)
    assert precision == {"items": 600, "float32_items": 600}
    gpu_gaps = gpu_scores[::2] - gpu_scores[1::2]
    cpu_gaps = cpu_scores[::2] - cpu_scores[1::2]
    # the CPU scores most of them in its fast number format
    assert gpu_gaps == pytest.approx(cpu_gaps, abs=0.05)
