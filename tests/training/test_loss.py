"""The next-token loss: against naive float64 loops, with and without slices and torch.compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from babyllama.device import compiler_missing
from babyllama.training import loss
from babyllama.training.loss import (
    HeadLoss,
    NextTokenLoss,
    document_mask,
    prepare_for_chunks,
    slice_nll,
)

KINDS = ("Llama", "GPT2", "GPTJ")


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
    nll, gradient, scale = slice_nll(torch.tensor(logits).expand(2, -1), torch.tensor([target, -1]))
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


# ---- attention and positions --------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_model_computes_the_same_states_and_gradients(kind, attention):
    ids = random_ids()
    results = []
    for prepared in (False, True):
        model = build_tiny_model(kind).train()
        if kind != "GPTJ":  # whose attention is always eager
            model.set_attn_implementation(attention)
        if prepared:
            prepare_for_chunks(model)
            nll = NextTokenLoss()(model, ids)
        else:  # transformers' mask and angles
            logits = model(input_ids=ids).logits[:, :-1]
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        nll.backward()
        results.append((nll, [p.grad for p in model.parameters()]))
    (expected, expected_gradients), (nll, gradients) = results
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_model_saves_the_same_files(kind, tmp_path):
    model = build_tiny_model(kind)
    model.save_pretrained(tmp_path / "plain")
    prepare_for_chunks(model)
    model.save_pretrained(tmp_path / "prepared")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "prepared" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared")
    expected = "eager" if kind == "GPTJ" else "sdpa"
    assert loaded.config._attn_implementation == expected
    assert torch.allclose(loaded(random_ids()).logits, model(random_ids()).logits, atol=1e-5)


def compiled_graphs(model, ids) -> list:
    """Return the graphs that torch.compile traces from the loss of a model."""
    graphs: list = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    next_token_loss = NextTokenLoss(batch_size=len(ids), compile=True)
    plain = next_token_loss.plain
    next_token_loss.fast = tuple(torch.compile(part, backend=keep) for part in plain)
    next_token_loss(model, ids)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_compiled_attention_is_causal_without_a_mask(kind):
    """Fused kernels are causal by themselves; transformers alone would build a mask."""
    model = build_tiny_model(kind)
    prepare_for_chunks(model)
    nodes = [node for graph in compiled_graphs(model, random_ids()) for node in graph.graph.nodes]
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = [node.kwargs for node in nodes if node.target is attention]
    n_layers = 2
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * n_layers


def test_compiled_llama_looks_up_its_angles():
    model = build_tiny_model("Llama")
    prepare_for_chunks(model)
    nodes = [node for graph in compiled_graphs(model, random_ids()) for node in graph.graph.nodes]
    targets = {str(node.target) for node in nodes}
    assert targets and not targets & {"cos", "sin"}


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


# ---- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPTJ"])
def test_with_a_document_mask_each_document_is_scored_as_if_alone(kind):
    """Rotary positions are relative, so a document costs the same wherever it begins."""
    model = build_tiny_model(kind)
    rng = np.random.default_rng(0)
    first = [1, *rng.integers(3, 400, 12)]
    second = [1, *rng.integers(3, 400, 20)]
    chunk = torch.tensor([[*first, *second]])
    masked = NextTokenLoss(document_bos_id=1)(model, chunk).item()
    alone = sum(NextTokenLoss()(model, torch.tensor([ids])).item() for ids in (first, second))
    with torch.no_grad():  # the second BOS is predicted from the first document
        logits = model(torch.tensor([first])).logits[0, -1]
    second_bos = -F.log_softmax(logits, -1)[1].item()
    assert masked == pytest.approx(alone + second_bos, rel=1e-5)
    assert abs(NextTokenLoss()(model, chunk).item() - masked) > 1e-2


def test_document_mask_by_hand():
    visible = document_mask(torch.tensor([[5, 1, 6, 1]]), 1, torch.float32)[0, 0] == 0
    assert visible.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
