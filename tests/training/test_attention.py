"""Attention, masks and rotary tables for chunks: against transformers alone, and by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from babyllama.training import loss
from babyllama.training.attention import document_mask, prepare_for_chunks
from babyllama.training.loss import NextTokenLoss

KINDS = ("Llama", "GPT2", "GPTJ", "Qwen3")


def random_ids(n: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 400, (n, length), generator=torch.Generator().manual_seed(0))


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
    expected = model.config._attn_implementation
    prepare_for_chunks(model)
    model.save_pretrained(tmp_path / "prepared")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "prepared" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared")
    assert loaded.config._attn_implementation == expected
    assert torch.allclose(loaded(random_ids()).logits, model(random_ids()).logits, atol=1e-5)


def compiled_graphs(model, ids) -> list:
    """Return the graphs that torch.compile traces from the loss of a model."""
    graphs: list = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_compiled", functools.partial(torch.compile, backend=keep))
        NextTokenLoss(batch_size=len(ids), compile=True)(model, ids)
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


@pytest.mark.parametrize("kind", ["Llama", "GPTJ", "Qwen3"])
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
