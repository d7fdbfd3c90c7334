"""Loss, optimizers, schedules, averages, masks and offsets: each is computed another way and seen to act in a run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tiny_model, rows_of, tiny_config
from datasets import Dataset
from torch.nn import functional as F

import train
from babyllama.config import check_config
from babyllama.device import compiler_missing, fast_dtype, matmul_flops, peak_memory_gb, pick_device
from babyllama.training import kernels, loss, optimizers, plan
from babyllama.training.kernels import expected_mfu, pick_compile
from babyllama.training.loss import (
    NextTokenLoss,
    chunks_are_whole,
    document_mask,
    head_nll,
    slice_nll,
)
from babyllama.training.optimizers import MuonAdamW, make_optimizer, orthogonalize, schedule
from babyllama.training.run_dir import RESULTS, checkpoints
from babyllama.training.trainer import ShiftedChunks


@pytest.fixture(scope="module")
def defaults(tmp_path_factory):
    """The training section with every default filled in."""
    root = tmp_path_factory.mktemp("defaults")
    return check_config(tiny_config(root, root, root))["training"]


# ---- the loss -----------------------------------------------------------------------------------


def naive(states, head, ids):
    """Token by token in float64, with autograd through it."""
    total = 0.0
    for row, own in zip(states.double(), ids, strict=True):
        for t in range(len(own) - 1):
            logits = row[t] @ head.weight.double().T + (
                0 if head.bias is None else head.bias.double()
            )
            total = total - torch.log_softmax(logits, -1)[own[t + 1]]
    return total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_head_nll_equals_a_naive_loop_with_its_gradients(bias, rows, monkeypatch):
    torch.manual_seed(0)
    head, ids = torch.nn.Linear(8, 30, bias=bias), torch.randint(0, 30, (5, 7))
    states = torch.randn(5, 7, 8, requires_grad=True)
    monkeypatch.setattr(
        loss, "SLICE_ELEMENTS", rows * 7 * 30
    )  # slices of `rows` chunks, the last one smaller
    leaves = [states, *head.parameters()]
    expected = naive(states, head, ids)
    wanted = torch.autograd.grad(expected, leaves)
    found = head_nll(states, head, ids, torch.float32)
    for a, b in zip(torch.autograd.grad(3 * found, leaves), wanted, strict=True):
        assert torch.allclose(a, 3 * b.float(), rtol=1e-4, atol=1e-5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "logits", [[[88.0, 90.0, -1e4, 3.0]], [[-2e5, -2e5, -2e5 - 1, -3e5]], [[0.0, 0.0, 0.0, 0.0]]]
)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_slice_nll_of_extreme_logits(logits, target):
    """Against float64; a place that predicts nothing has neither loss nor gradient."""
    exact = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = -exact.log_softmax(-1)[0, target]
    (wanted,) = torch.autograd.grad(expected, exact)
    nll, gradient, scale = slice_nll(torch.tensor(logits).expand(2, -1), torch.tensor([target, -1]))
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(
        gradient * scale, torch.cat([wanted, torch.zeros_like(wanted)]).float(), atol=1e-7
    )


def test_head_nll_in_bf16_is_as_near_as_bf16_allows():
    torch.manual_seed(0)
    head, ids = torch.nn.Linear(64, 300, bias=False), torch.randint(0, 300, (4, 16))
    states = torch.randn(4, 16, 64)
    exact = naive(states, head, ids).item()
    assert head_nll(states, head, ids, torch.bfloat16).item() == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("format", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_into_the_sliced_loss(format):
    """With fp16 its products are in float32, whatever the states came in."""
    torch.manual_seed(0)
    head, ids, states = (
        torch.nn.Linear(8, 30),
        torch.randint(0, 30, (2, 7)),
        torch.randn(2, 7, 8).to(format),
    )
    states.requires_grad_()
    with torch.autocast("cpu", dtype=format):
        found = head_nll(states, head, ids, torch.float32)
    found.backward()
    assert found.item() == pytest.approx(naive(states.detach(), head, ids).item(), rel=1e-6)
    assert states.grad.dtype == format and head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_compiled_chunks_have_no_mask(kind):
    """The graph asks for causal attention, which fused kernels have; left to itself transformers builds a mask."""
    graphs: list = []
    ids = torch.randint(3, 400, (2, 32))

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = build_tiny_model(kind)
    with chunks_are_whole():
        states = torch.compile(model.base_model, backend=keep)(
            input_ids=ids, use_cache=False
        ).last_hidden_state
    torch._dynamo.reset()
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = [
        node.kwargs for graph in graphs for node in graph.graph.nodes if node.target is attention
    ]
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [
        (None, True)
    ] * 2  # layers
    assert torch.allclose(states, model.base_model(input_ids=ids).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_the_sliced_loss_gives_the_gradients_of_the_whole_one(kind):
    ids, gradients, values = (
        torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(0)),
        [],
        [],
    )
    for chunked in (False, True):
        model = build_tiny_model(kind).train()
        nll = NextTokenLoss(chunked=chunked)(model, ids)
        nll.backward()
        values.append(nll.item())
        gradients.append([p.grad for p in model.parameters()])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(compiler_missing() is not None, reason="nothing to compile with")
@pytest.mark.parametrize("chunked", [False, True])
def test_the_compiled_loss_is_the_loss(chunked):
    ids = torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(0))
    model, plain = build_tiny_model("Llama").train(), build_tiny_model("Llama").train()
    compiled = NextTokenLoss(batch_size=4, compile=True, chunked=chunked)
    found, expected = compiled(model, ids), NextTokenLoss()(plain, ids)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    assert compiled(model, ids).item() == pytest.approx(
        expected.item(), rel=1e-5
    )  # compiled once, used again
    last = compiled(model, ids[:3])  # an odd batch is not compiled anew
    assert last.item() == pytest.approx(NextTokenLoss()(plain, ids[:3]).item(), rel=1e-5)


# ---- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPTJ"])
def test_with_a_mask_a_document_is_scored_as_if_alone(kind):
    """Rotary positions are relative, so a document's tokens cost the same wherever it stands."""
    model, rng = build_tiny_model(kind), np.random.default_rng(0)
    first, second = ([1, *rng.integers(3, 400, n)] for n in (12, 20))
    both = torch.tensor([[*first, *second]])
    masked = NextTokenLoss(mask_from=1)(model, both).item()
    alone = sum(NextTokenLoss()(model, torch.tensor([own])).item() for own in (first, second))
    with torch.no_grad():  # the second BOS, predicted from the first document, counts as well
        joint = -F.log_softmax(model(torch.tensor([first])).logits[0, -1], -1)[1].item()
    assert masked == pytest.approx(alone + joint, rel=1e-5)
    assert abs(NextTokenLoss()(model, both).item() - masked) > 1e-2


def test_document_mask_by_hand():
    seen = document_mask(torch.tensor([[5, 1, 6, 1]]), 1, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


# ---- chunks -------------------------------------------------------------------------------------


def test_shifted_chunks_are_slices_of_the_stream():
    stream = np.arange(50, dtype=np.uint16)
    chunks = Dataset.from_dict(
        {"input_ids": [stream[i : i + 10] for i in range(0, 50, 10)]}
    ).with_format("numpy")
    shifted, offsets = ShiftedChunks(chunks, seed=3), set()
    for epoch in range(20):
        shifted.offset = shifted.offset_in(epoch)
        offsets.add(shifted.offset)
        rows = np.concatenate([shifted[i]["input_ids"] for i in range(len(shifted))])
        assert rows.tolist() == stream[shifted.offset : shifted.offset + 40].tolist()
        assert [r["input_ids"].tolist() for r in shifted.__getitems__([3, 0, 3])] == [
            shifted[i]["input_ids"].tolist() for i in (3, 0, 3)
        ]
    assert len(offsets) > 5
    other = ShiftedChunks(chunks, seed=3)
    other.offset, shifted.offset = other.offset_in(7), shifted.offset_in(7)
    assert other.offset == shifted.offset


# ---- schedules and optimizers -------------------------------------------------------------------


def test_schedules_by_hand(defaults):
    def course(**keys):
        factor = schedule({**defaults, "lr": 1e-2, **keys}, total_steps=100)
        return [round(factor(step), 6) for step in (0, 5, 10, 55, 80, 90, 100)]

    warm = {"warmup_steps": 10}
    assert course(**warm, lr_scheduler="constant") == [0, 0.5, 1, 1, 1, 1, 1]
    assert course(**warm, lr_scheduler="linear") == [0, 0.5, 1, 0.5, 0.222222, 0.111111, 0]
    assert course(**warm, lr_scheduler="cosine") == [0, 0.5, 1, 0.5, 0.116978, 0.030154, 0]
    assert course(**warm, lr_scheduler="wsd") == [0, 0.5, 1, 1, 1, 0.5, 0]
    assert course(**warm, lr_scheduler="linear", min_lr=2e-3) == [
        0,
        0.5,
        1,
        0.6,
        0.377778,
        0.288889,
        0.2,
    ]
    assert course(warmup_ratio=0.1, lr_scheduler="constant") == course(
        **warm, lr_scheduler="constant"
    )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules_are_those_of_transformers(defaults, kind):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=60)
    ours = schedule({**defaults, "lr_scheduler": kind, "warmup_steps": 7}, 60)
    for step in range(60):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def one_step(model, optimizer):
    ids = torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(0))
    NextTokenLoss()(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (1, 40, 16)])
def test_orthogonalize_maps_singular_values_by_the_published_polynomial(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, c = (
        3.4445,
        -4.7750,
        2.0315,
    )  # published coefficients: singular values end near 1, not at it
    made = orthogonalize(matrices, (a, b, c), 5, 1e-7)
    for one, own in zip(matrices, made, strict=True):
        u, singular, v = np.linalg.svd(one.double().numpy(), full_matrices=False)
        singular = singular / np.linalg.norm(
            singular
        )  # the iteration moves the singular values and nothing else
        for _ in range(5):
            singular = a * singular + b * singular**3 + c * singular**5
        assert np.allclose(own.numpy(), (u * singular) @ v, atol=1e-4)
        assert (
            np.median(singular) > 0.6 and singular.max() < 1.3
        )  # those near 0 need more iterations


@pytest.mark.parametrize("at_once", [2**23, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_equals_torchs_muon(monkeypatch, dtype, at_once):
    monkeypatch.setattr(optimizers, "fast_dtype", lambda device: dtype)
    monkeypatch.setattr(optimizers, "STACK_ELEMENTS", at_once)
    random = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (40, 16), (16, 40), (16, 16), (40, 16)]
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in "ab")
    options = {"lr": 1e-2, "weight_decay": 0.1}
    pair = (
        optimizers.Muon(ours, **options),
        torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):  # the last one never has a gradient
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(ours[-1], weights[-1])
    moved = torch.cat([(b - w).flatten() for b, w in zip(theirs, weights, strict=True)])
    apart = torch.cat([(b - a).flatten() for b, a in zip(theirs, ours, strict=True)])
    assert apart.norm() < 0.02 * moved.norm()  # theirs is in bfloat16


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_optimizer_flops_equal_the_counted_ones(defaults, kind):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_tiny_model(kind)
    for optimizer in ("adamw", "muon"):
        keys = {**defaults, "optimizer": optimizer}
        moved = make_optimizer(model, keys)
        NextTokenLoss()(model, torch.arange(3, 35)[None]).backward()
        with FlopCounterMode(display=False) as counter:
            moved.step()
        assert counter.get_total_flops() == optimizers.flops_per_step(model, keys)


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


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_muon_moves_matrices_and_adamw_the_rest(defaults, kind):
    keys = {**defaults, "lr": 1e-2, "optimizer": "muon"}
    model, same = build_tiny_model(kind).train(), build_tiny_model(kind).train()
    optimizer = make_optimizer(model, keys)
    matrices = [
        p
        for n, p in same.named_parameters()
        if p.ndim == 2 and not any(w in n for w in ("wte", "wpe", "embed", "lm_head"))
    ]
    muon = optimizers.Muon(matrices, lr=1e-2, weight_decay=0.1)
    assert isinstance(muon, torch.optim.Muon)
    rest = [p for p in same.parameters() if not any(p is m for m in matrices)]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.ndim == 2]}, {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0}],
        lr=1e-2, weight_decay=0.1, fused=True,
    )  # fmt: skip
    for _ in range(3):
        one_step(model, optimizer)
        one_step(same, MuonAdamW(muon, adamw))
    for (name, a), b in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    again = make_optimizer(model, keys)
    again.load_state_dict(optimizer.state_dict())
    again.param_groups[0]["lr"] = 0.123  # what a scheduler does
    assert again.parts["muon"].param_groups[0]["lr"] == 0.123
    assert torch.equal(
        again.state_dict()["muon"]["state"][0]["momentum_buffer"],
        optimizer.state_dict()["muon"]["state"][0]["momentum_buffer"],
    )


def test_vectors_do_not_decay(defaults):
    model = build_tiny_model("GPT2")
    groups = make_optimizer(
        model, {**defaults, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    ).param_groups
    assert {g["weight_decay"]: {p.ndim for p in g["params"]} for g in groups} == {
        0.1: {2},
        0.0: {1},
    }
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.95), 1e-6)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


# ---- in a run -----------------------------------------------------------------------------------


def results_of(run_dir) -> dict:
    return json.loads((run_dir / "training_metrics.json").read_text())["results"]


OPTIONS = {"training__optimizer": "muon", "training__lr_scheduler": "wsd", "training__ema": 0.9, "training__min_lr": 1e-4,
           "training__warmup_ratio": 0.2, "data__random_offset": True, "data__document_mask": True,
           "training__gradient_checkpointing": True}  # fmt: skip


def test_resume_is_exact_with_every_option(config_file, tmp_path):
    path, run_dir = config_file(**OPTIONS), tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    weights, samples = (run_dir / "model.safetensors").read_bytes(), rows_of(run_dir)[-1]["samples"]
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    last, *_ = checkpoints(run_dir)
    assert (last / "average.safetensors").is_file()
    for name in [last]:
        import shutil

        shutil.rmtree(name)
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert rows_of(run_dir)[-1]["samples"] == samples
    assert len(samples) == 2


@pytest.mark.parametrize("option", [*OPTIONS, "training__adam_beta1", "training__adam_beta2"])
def test_each_option_moves_the_weights(option, config_file, tmp_path, finished_weights):
    if option == "training__min_lr":
        value = 1e-3
    else:
        value = {**OPTIONS, "training__adam_beta1": 0.5, "training__adam_beta2": 0.9}[option]
    assert train.main(["--config", str(config_file(**{option: value}))]) == 0
    weights = (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes()
    same = (
        option == "training__gradient_checkpointing"
    )  # that one trades time for memory and changes nothing else
    assert (weights == finished_weights) == same


@pytest.fixture(scope="module")
def finished_weights(tmp_path_factory, tokenizer_file, corpus_dir) -> bytes:
    import yaml

    root = tmp_path_factory.mktemp("plain")
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(root, tokenizer_file, corpus_dir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(root / "tiny.yaml")]) == 0
    return (root / "models" / "tiny" / "model.safetensors").read_bytes()


def test_the_average_is_the_average(config_file, tmp_path, monkeypatch):
    """ema: what is saved is 0.5 x the old average + 0.5 x the new weights after each step, from the first weights on."""
    from babyllama.training import trainer

    seen = []
    update = trainer._UpdateAverage.on_step_end

    def note(self, args, state, control, model=None, **kwargs):
        seen.append(model.lm_head.weight.detach().cpu().clone())
        return update(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(trainer._UpdateAverage, "on_step_end", note)
    assert train.main(["--config", str(config_file(training__ema=0.5))]) == 0
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.5 * expected + 0.5 * weights
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "models" / "tiny" / "model.safetensors")["lm_head.weight"]
    assert len(seen) > 10
    assert torch.allclose(saved, expected, atol=1e-6)
    assert not torch.allclose(saved, seen[-1], atol=1e-4)


@pytest.mark.parametrize("eval_steps", [None, 7])
def test_early_stopping_keeps_the_best_weights(config_file, tmp_path, capsys, eval_steps):
    """A learning rate that soon does harm: the run ends early, with the weights of its best evaluation."""
    harmful = {
        "training__lr": 1e-2,
        "training__lr_scheduler": "constant",
        "training__adam_beta2": 0.5,
    }
    path = config_file(
        **harmful,
        training__num_epochs=60,
        training__early_stopping_patience=2,
        training__eval_steps=eval_steps,
    )
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    losses = [row["eval_loss"] for row in rows_of(run_dir) if "eval_loss" in row]
    assert len(losses) < 60 and (
        eval_steps is None or rows_of(run_dir)[-1]["step"] % eval_steps == 0
    )
    assert min(losses) not in losses[-2:]
    assert results_of(run_dir)["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    kept, ran = results_of(run_dir), rows_of(run_dir)[-1]
    (best,) = (row for row in rows_of(run_dir) if row.get("eval_loss") == min(losses))
    assert (kept["steps"], kept["tokens_trained"], kept["steps_run"]) == (
        best["step"],
        best["tokens"],
        ran["step"],
    )
    assert kept["epochs"] == pytest.approx(best["epoch"], abs=0.1)
    assert f"{best['step']} steps of" in (run_dir / "README.md").read_text()
    assert f"stopped early     after step {ran['step']} of" in capsys.readouterr().out
    # killed after it had stopped, before its results were written: it goes no further
    rows, weights = rows_of(run_dir), (run_dir / "model.safetensors").read_bytes()
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    assert train.main(["--config", str(path), "--resume_from_checkpoint", "latest"]) == 0
    assert [row["step"] for row in rows_of(run_dir)] == [row["step"] for row in rows]
    assert (run_dir / "model.safetensors").read_bytes() == weights


def test_the_log_carries_what_a_run_costs(config_file, tmp_path):
    assert train.main(["--config", str(config_file())]) == 0
    run_dir = tmp_path / "models" / "tiny"
    made, report = (
        json.loads((run_dir / name).read_text())
        for name in ("training_metrics.json", "data_report.json")
    )
    made, rows = made["plan"], [row for row in rows_of(run_dir) if "tokens_per_second" in row]
    for row in rows:
        words = row["tokens_per_second"] * report["train"]["words"] / report["train"]["tokens"]
        assert row["words_per_second"] == pytest.approx(words)
        share = row["tokens_per_second"] * made["flops_per_token"] / made["matmul_flops"]
        assert row["matmul_share"] == pytest.approx(share)
        assert 0.1 < row["memory_gb"] < 100
        assert {"grad_norm", "learning_rate", "seconds_left"} <= set(row)
    assert rows[-1]["seconds_left"] < rows[0]["seconds_left"]
    # 2 layers of 4 D^2 + 3 D F with D = 32, F = 88, a head of D V; causal attention 2 layers x D x T
    vocab_size = json.loads((run_dir / "config.json").read_text())["vocab_size"]
    products = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 32 * vocab_size
    assert made["flops_per_token"] == 6 * (products + 2 * 32 * 32)


# ---- the machine --------------------------------------------------------------------------------


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


def test_our_losses_are_those_of_a_plain_trainer_script(
    tmp_path, tokenizer, corpus_dir, tokenizer_file
):
    """Step by step, at another micro-batch, with the stock collator, loss, optimizer and schedule on the other side."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "training_speed", ROOT / "experiments" / "training_speed.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    config = check_config(
        tiny_config(tmp_path, tokenizer_file, corpus_dir, training__warmup_steps=3)
    )
    ids = np.random.default_rng(0).integers(3, len(tokenizer), (24 * 10, 32))
    rows = [{"input_ids": row.tolist()} for row in ids]
    plain = benchmark.train_once(config, {"micro": 4}, tokenizer, rows, tmp_path / "a").losses
    ours = benchmark.train_once(
        config, {"precision": "fp32", "compile": False}, tokenizer, rows, tmp_path / "b"
    ).losses
    assert len(ours) == 10
    assert ours == pytest.approx(plain, abs=1e-4)
    assert max(ours) - min(ours) > 0.01


# ---- where time went ----------------------------------------------------------------------------


def test_angles_come_from_a_table():
    """The graph of whole chunks takes no cosine, its states are the same, and nothing of it stays in the model."""
    graphs: list = []
    ids = torch.randint(3, 400, (2, 32), generator=torch.Generator().manual_seed(0))

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    model = build_tiny_model("Llama")
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch._dynamo.reset()
    with NextTokenLoss().whole_chunks(model, ids):
        states = torch.compile(model.base_model, backend=keep)(
            input_ids=ids, use_cache=False
        ).last_hidden_state
    torch._dynamo.reset()
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert called and not called & {"cos", "sin"}
    assert torch.allclose(states, expected, atol=1e-6)
    assert "forward" not in vars(model.base_model.rotary_emb)


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
    with_teachers, why = kernels.pick_cuda_graphs(config | {"distillation": {}}, precision, compiled)
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
