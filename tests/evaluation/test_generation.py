"""The steps of generation against a model that keeps nothing and sees no padding; on a GPU, recorded ones too."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model

from babyllama.evaluation.generation import LEAST_STEPS, Decoder, StaticKVCache

PROMPTS, STEPS = [[1, 5, 6, 7, 8, 9], [1, 4], [1]], 12


def naive_logits(model, ids: list[int]) -> torch.Tensor:
    """The next token's logits of one text by itself, nothing kept."""
    return (
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        .logits[0, -1]
        .float()
    )


def build(kind: str):
    if kind != "grouped queries":
        return build_tiny_model(kind)
    plain = build_tiny_model("Llama").config
    return type(build_tiny_model("Llama"))(
        type(plain)(**plain.to_dict() | {"num_key_value_heads": 2})
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ", "grouped queries"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[2:]])
@pytest.mark.parametrize("in_room", [False, True])
def test_each_step_has_the_logits_of_the_whole_text_alone(kind, prompts, in_room):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, texts = build(kind).to(device), [list(ids) for ids in prompts]
    width = max(map(len, texts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in texts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in texts], device=device)
    decoder = Decoder(model, mask, STEPS if in_room else LEAST_STEPS - 1)
    if in_room and device == "cpu":  # where nothing is recorded: the steps as they would be
        decoder.room = decoder.cache = StaticKVCache(mask, STEPS, model.dtype)
    step = decoder._in_room if in_room and device == "cpu" else decoder
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(STEPS if in_room else LEAST_STEPS - 1):
        logits = step(tokens, positions)
        expected = torch.stack([naive_logits(model, ids) for ids in texts])
        assert torch.allclose(logits, expected, atol=1e-5)
        tokens = expected.argmax(-1, keepdim=True)
        for ids, token in zip(texts, tokens.flatten().tolist(), strict=True):
            ids.append(token)
        positions = torch.tensor([[len(ids) - 1] for ids in texts], device=device)


def test_a_graph_is_for_a_gpu():
    mask = torch.ones(1, 3, dtype=torch.long)
    assert Decoder(build_tiny_model("Llama"), mask, 100).room is None
