"""Check optimizers and schedules against formulas worked by hand and against torch's versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, tiny_config

from babyllama.config import check_config
from babyllama.training import optimizers
from babyllama.training.loss import NextTokenLoss
from babyllama.training.optimizers import MuonAdamW, make_optimizer, orthogonalize, schedule


@pytest.fixture(scope="module")
def defaults(tmp_path_factory):
    """Return the training section with every default filled in."""
    root = tmp_path_factory.mktemp("defaults")
    return check_config(tiny_config(root, root, root))["training"]


def test_schedules_by_hand(defaults):
    def factors(**keys):
        factor = schedule({**defaults, "lr": 1e-2, **keys}, total_steps=100)
        return [round(factor(step), 6) for step in (0, 5, 10, 55, 80, 90, 100)]

    warm = {"warmup_steps": 10}
    assert factors(**warm, lr_scheduler="constant") == [0, 0.5, 1, 1, 1, 1, 1]
    assert factors(**warm, lr_scheduler="linear") == [0, 0.5, 1, 0.5, 0.222222, 0.111111, 0]
    assert factors(**warm, lr_scheduler="cosine") == [0, 0.5, 1, 0.5, 0.116978, 0.030154, 0]
    assert factors(**warm, lr_scheduler="wsd") == [0, 0.5, 1, 1, 1, 0.5, 0]
    to_a_fifth = factors(**warm, lr_scheduler="linear", min_lr=2e-3)
    assert to_a_fifth == [0, 0.5, 1, 0.6, 0.377778, 0.288889, 0.2]
    assert factors(warmup_ratio=0.1, lr_scheduler="constant") == factors(
        **warm, lr_scheduler="constant"
    )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules_equal_those_of_transformers(defaults, kind):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=60)
    ours = schedule({**defaults, "lr_scheduler": kind, "warmup_steps": 7}, 60)
    for step in range(60):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def train_one_step(model, optimizer):
    ids = torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(0))
    NextTokenLoss()(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (1, 40, 16)])
def test_orthogonalize_maps_singular_values_by_the_published_polynomial(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, c = (3.4445, -4.7750, 2.0315)  # they bring singular values near 1, not to 1
    results = orthogonalize(matrices, (a, b, c), 5, 1e-7)
    for matrix, result in zip(matrices, results, strict=True):
        u, singular, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
        singular = singular / np.linalg.norm(singular)
        for _ in range(5):
            singular = a * singular + b * singular**3 + c * singular**5
        assert np.allclose(result.numpy(), (u * singular) @ v, atol=1e-4)
        assert np.median(singular) > 0.6  # small ones need more iterations
        assert singular.max() < 1.3


@pytest.mark.parametrize("stack_elements", [2**23, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_equals_torchs_muon(monkeypatch, dtype, stack_elements):
    monkeypatch.setattr(optimizers, "fast_dtype", lambda device: dtype)
    monkeypatch.setattr(optimizers, "STACK_ELEMENTS", stack_elements)
    random = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (40, 16), (16, 40), (16, 16), (40, 16)]
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in "ab")
    options = {"lr": 1e-2, "weight_decay": 0.1}
    our_muon = optimizers.Muon(ours, **options)
    their_muon = torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):  # the last one never has a gradient
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        our_muon.step()
        their_muon.step()
    assert torch.equal(ours[-1], weights[-1])
    moved = torch.cat([(b - w).flatten() for b, w in zip(theirs, weights, strict=True)])
    difference = torch.cat([(b - a).flatten() for b, a in zip(theirs, ours, strict=True)])
    assert difference.norm() < 0.02 * moved.norm()  # torch's is in bfloat16


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_optimizer_flops_equal_the_counted_ones(defaults, kind):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_tiny_model(kind)
    for name in ("adamw", "muon"):
        keys = {**defaults, "optimizer": name}
        optimizer = make_optimizer(model, keys)
        NextTokenLoss()(model, torch.arange(3, 35)[None]).backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert counter.get_total_flops() == optimizers.flops_per_step(model, keys)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_muon_moves_matrices_and_adamw_the_rest(defaults, kind):
    keys = {**defaults, "lr": 1e-2, "optimizer": "muon"}
    model = build_tiny_model(kind).train()
    reference = build_tiny_model(kind).train()
    optimizer = make_optimizer(model, keys)
    matrices = [
        p
        for n, p in reference.named_parameters()
        if p.ndim == 2 and not any(w in n for w in ("wte", "wpe", "embed", "lm_head"))
    ]
    muon = optimizers.Muon(matrices, lr=1e-2, weight_decay=0.1)
    assert isinstance(muon, torch.optim.Muon)
    rest = [p for p in reference.parameters() if not any(p is m for m in matrices)]
    decayed = {"params": [p for p in rest if p.ndim == 2]}
    vectors = {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0}
    adamw = torch.optim.AdamW([decayed, vectors], lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(3):
        train_one_step(model, optimizer)
        train_one_step(reference, MuonAdamW(muon, adamw))
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name

    resumed = make_optimizer(model, keys)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["lr"] = 0.123  # as a scheduler does
    assert resumed.parts["muon"].param_groups[0]["lr"] == 0.123
    momentum = optimizer.state_dict()["muon"]["state"][0]["momentum_buffer"]
    assert torch.equal(resumed.state_dict()["muon"]["state"][0]["momentum_buffer"], momentum)


def test_vectors_do_not_decay(defaults):
    model = build_tiny_model("GPT2")
    groups = make_optimizer(
        model, {**defaults, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    ).param_groups
    dimensions = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in groups}
    assert dimensions == {0.1: {2}, 0.0: {1}}
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.95), 1e-6)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
