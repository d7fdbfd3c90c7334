"""The next-token loss: against naive float64 loops, with and without slices and torch.compile."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model

from babyllama.device import compiler_missing
from babyllama.training import loss
from babyllama.training.attention import prepare_for_chunks
from babyllama.training.loss import NO_TARGET, HeadLoss, NextTokenLoss, slice_nll

KINDS = ("Llama", "GPT2", "GPTJ", "Qwen3")


def random_ids(n: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 400, (n, length), generator=torch.Generator().manual_seed(0))


# ---- the output layer in slices -----------------------------------------------------------------


def naive_nll(states, head, ids):
    """Token by token in float64, with autograd through it."""
    total = 0.0
    for state_row, id_row in zip(states.double(), ids, strict=True):
        for t in range(len(id_row) - 1):
            logits = state_row[t] @ head.weight.double().T
            if head.bias is not None:
                logits = logits + head.bias.double()
            total = total - torch.log_softmax(logits, -1)[id_row[t + 1]]
    return total


def head_loss(states, head, ids, dtype=torch.float32):
    return HeadLoss.apply(states, head.weight, head.bias, ids, dtype, slice_nll)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_head_loss_and_gradients_equal_a_naive_loop(bias, rows, monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, bias=bias)
    ids = torch.randint(0, 30, (5, 7))
    states = torch.randn(5, 7, 8, requires_grad=True)
    # slices of `rows` chunks, the last one smaller
    monkeypatch.setattr(loss, "SLICE_ELEMENTS", rows * 7 * 30)
    leaves = [states, *head.parameters()]
    expected = naive_nll(states, head, ids)
    expected_gradients = torch.autograd.grad(expected, leaves)
    nll = head_loss(states, head, ids)
    gradients = torch.autograd.grad(3 * nll, leaves)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, 3 * exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "logits", [[[88.0, 90.0, -1e4, 3.0]], [[-2e5, -2e5, -2e5 - 1, -3e5]], [[0.0, 0.0, 0.0, 0.0]]]
)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_slice_nll_of_extreme_logits_equals_float64(logits, target):
    """A position that predicts nothing has neither loss nor gradient."""
    exact = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = -exact.log_softmax(-1)[0, target]
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    nll, gradient, scale = slice_nll(
        torch.tensor(logits).expand(2, -1), torch.tensor([target, NO_TARGET])
    )
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    both_rows = torch.cat([expected_gradient, torch.zeros_like(expected_gradient)]).float()
    assert torch.allclose(gradient * scale, both_rows, atol=1e-7)


def test_head_loss_in_bf16_is_close_to_float64():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 300, bias=False)
    ids = torch.randint(0, 300, (4, 16))
    states = torch.randn(4, 16, 64)
    exact = naive_nll(states, head, ids).item()
    assert head_loss(states, head, ids, torch.bfloat16).item() == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_does_not_change_the_products_of_the_head(half):
    """With fp16 they are in float32, whatever the format of the states."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30)
    ids = torch.randint(0, 30, (2, 7))
    states = torch.randn(2, 7, 8).to(half).requires_grad_()
    with torch.autocast("cpu", dtype=half):
        nll = head_loss(states, head, ids)
    nll.backward()
    exact = naive_nll(states.detach(), head, ids).item()
    assert nll.item() == pytest.approx(exact, rel=1e-6)
    assert states.grad.dtype == half
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_loss_has_the_gradients_of_the_plain_loss(kind):
    ids = random_ids()
    values = []
    gradients = []
    for chunked in (False, True):
        model = build_tiny_model(kind).train()
        nll = NextTokenLoss(chunked=chunked)(model, ids)
        nll.backward()
        values.append(nll.item())
        gradients.append([p.grad for p in model.parameters()])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for plain, sliced in zip(*gradients, strict=True):
        assert torch.allclose(plain, sliced, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(compiler_missing() is not None, reason="nothing to compile with")
@pytest.mark.parametrize("chunked", [False, True])
def test_the_compiled_loss_equals_the_plain_one(chunked):
    ids = random_ids()
    model = build_tiny_model("Llama").train()
    reference = build_tiny_model("Llama").train()
    prepare_for_chunks(model)
    compiled = NextTokenLoss(batch_size=4, compile=True, chunked=chunked)
    expected = NextTokenLoss()(reference, ids)
    expected.backward()
    nll = compiled(model, ids)
    nll.backward()
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    # compiled once, used again; a smaller batch does not take the compiled code
    assert compiled(model, ids).item() == pytest.approx(expected.item(), rel=1e-5)
    last = NextTokenLoss()(reference, ids[:3]).item()
    assert compiled(model, ids[:3]).item() == pytest.approx(last, rel=1e-5)
