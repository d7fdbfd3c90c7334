"""Generation against an uncached, unbatched loop: greedy texts, sampling, stopping and the cache."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, sentences
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.utils import ModelOutput

from babyllama.evaluation.generation import (
    Decoder,
    GraphDecoder,
    _sample,
    _supports_cuda_graph,
    generate,
    generate_steps,
)
from babyllama.evaluation.loading import encode

KINDS = ["Llama", "GPT2", "GPTJ", "Qwen3"]
BOS = 1
EOS = 2
PROMPTS = ["The cat", "The girl sees the old dog in the garden near", "", "a"]


@pytest.fixture(scope="module")
def models():
    """Return a model of each kind; larger weights make its predictions far from uniform."""
    models = {kind: build_tiny_model(kind) for kind in KINDS}
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                parameter.mul_(5.0)
    return models


def naive_greedy(model, tokenizer, prompt: str, steps: int) -> str:
    """Run the complete text through the model for every token: no cache, padding or mask."""
    ids = [BOS, *tokenizer.encode(prompt, add_special_tokens=False)]
    new_tokens = []
    for _ in range(steps):
        with torch.no_grad():
            token = model(torch.tensor([ids + new_tokens])).logits[0, -1].argmax().item()
        if token == EOS:
            break
        new_tokens.append(token)
    return tokenizer.decode(new_tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_equal_the_uncached_loop_for_any_batch(models, tokenizer, kind):
    model = models[kind]
    options = {"max_new_tokens": 20, "temperature": 0}
    expected = [[naive_greedy(model, tokenizer, prompt, 20)] for prompt in PROMPTS]
    for batch_size in (1, 3, 4):
        assert generate(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == expected
    assert generate(model, tokenizer, PROMPTS[::-1], **options) == expected[::-1]


def test_samples_depend_on_the_seed_and_not_on_the_batch(models, tokenizer):
    model = models["GPT2"]
    state = torch.get_rng_state()
    options = {"max_new_tokens": 15, "num_return_sequences": 3}
    samples = generate(model, tokenizer, PROMPTS, seed=1, **options)
    assert [len(texts) for texts in samples] == [3] * 4
    assert len({text for texts in samples for text in texts}) == 12
    assert samples == generate(model, tokenizer, PROMPTS, seed=1, batch_size=5, **options)
    assert samples[:2] == generate(model, tokenizer, PROMPTS[:2], seed=1, **options)
    assert samples != generate(model, tokenizer, PROMPTS, seed=2, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_more_new_tokens_continue_the_same_sample(models):
    def sample(steps: int) -> list[list[int]]:
        prompts = [[BOS, 60, 70], [BOS]]
        batch = generate_steps(models["Llama"], prompts, max_new_tokens=steps, seed=4)
        return [list(tokens) for tokens in zip(*batch, strict=True)]

    assert [tokens[:5] for tokens in sample(12)] == sample(5)


def test_sampling_follows_the_distribution():
    probs = torch.tensor([[0.05, 0.5, 0.3, 0.15]])
    draws = (torch.arange(1000) + 0.5) / 1000  # an even grid, so that counts are exact

    def counts(temperature, top_p):
        rows = probs.log().expand(1000, 4)
        return torch.bincount(_sample(rows, temperature, top_p, draws), minlength=4).tolist()

    assert counts(1.0, 1.0) == [50, 500, 300, 150]
    assert counts(1.0, 0.7) == [0, 625, 375, 0]  # 0.5 + 0.3 reach 0.7
    assert counts(1.0, 0.81) == pytest.approx([0, 526, 316, 158], abs=1)
    assert counts(1.0, 1e-6) == counts(0, 1.0) == [0, 1000, 0, 0]
    squared = np.array([0.05, 0.5, 0.3, 0.15]) ** 2
    assert counts(0.5, 1.0) == pytest.approx(1000 * squared / squared.sum(), abs=1)


def test_top_p_sorts_the_vocabulary_if_the_distribution_is_flat():
    draws = (torch.arange(3000) + 0.5) / 3000
    sampled = _sample(torch.zeros(3000, 1000), 1.0, 0.5, draws)
    assert len(set(sampled.tolist())) in (500, 501)  # half of 1000 equally likely tokens


def test_eos_ends_a_text_and_is_not_part_of_it(models, tokenizer):
    model = copy.deepcopy(models["GPTJ"])
    options = {"max_new_tokens": 8, "temperature": 0}
    free_tokens = [tokens[0] for tokens in generate_steps(model, [[BOS, 60]], **options)]
    stop = free_tokens[3]
    steps = generate_steps(model, [[BOS, 60]], stop={stop}, **options)
    assert len(free_tokens) == 8
    assert [tokens[0] for tokens in steps] == [*free_tokens[: free_tokens.index(stop)], None]

    with torch.no_grad():
        model.lm_head.bias[EOS] = 1e4
    assert generate(model, tokenizer, ["The cat", "a"], max_new_tokens=8) == [[""], [""]]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_new_tokens_stay_within_the_context(models, tokenizer, caplog, kind):
    model = models[kind]
    long_prompt = " ".join(sentences(40))
    ids = encode(tokenizer, [long_prompt])[0]

    # a long prompt keeps its last tokens
    with caplog.at_level(logging.WARNING):
        options = {"max_new_tokens": 10, "temperature": 0}
        texts = generate(model, tokenizer, [long_prompt, "The cat"], **options)
    messages = [message for message in caplog.messages if "truncating a prompt" in message]
    assert messages == ["truncating a prompt to its last 54 tokens: the context is 64"]
    steps = generate_steps(model, [ids[-54:]], max_new_tokens=10, temperature=0, stop={EOS})
    expected = [tokens[0] for tokens in steps if tokens[0] is not None]
    assert texts[0][0] == tokenizer.decode(expected, skip_special_tokens=True)

    # too many new tokens: the long prompt keeps half of the context, the short one fills it
    steps = list(generate_steps(model, [ids, [BOS]], max_new_tokens=500, temperature=0))
    rows = list(zip(*steps, strict=True))
    assert [sum(token is not None for token in row) for row in rows] == [32, 63]
    single_steps = list(generate_steps(model, [[BOS]], max_new_tokens=500, temperature=0))
    assert [tokens[0] for tokens in single_steps] == [tokens[1] for tokens in steps]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_wrong_options_are_refused(models, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        generate(models["Llama"], tokenizer, ["a"], **options)


def test_no_prompts_give_no_texts(models, tokenizer):
    assert generate(models["Llama"], tokenizer, []) == []


def test_token_ids_outside_the_vocabulary_are_refused(models):
    message = r"text 0: token ids 3\.\.400 are outside the model's vocabulary, 0\.\.399"
    with pytest.raises(ValueError, match=message):
        next(generate_steps(models["Llama"], [[3, 400]], max_new_tokens=2))


def test_nan_weights_are_an_error(tokenizer):
    model = build_tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        generate(model, tokenizer, ["The cat"], max_new_tokens=2)


# ---- the cache ----------------------------------------------------------------------------------

STEPS = 12
PROMPT_IDS = [[1, 5, 6, 7, 8, 9], [1, 4], [1]]


def replay_on_the_cpu(decoder: GraphDecoder):
    """Replay a traced step, as a CUDA graph would: same operations, same memory, no Python.

    Tracing runs the step once, so its effects on the cache and the mask are undone.
    """

    def capture(tokens, positions):
        state = [decoder.step_mask, decoder.place]
        for layer in decoder.cache.layers:
            state += [layer.keys, layer.values, layer.cumulative_length]
        before = [tensor.clone() for tensor in state]
        step = make_fx(lambda *inputs: decoder._step(*inputs))(tokens, positions)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        return step

    step = None

    def decode(tokens, positions):
        nonlocal step
        decoder.calls += 1
        if decoder.calls == 1:
            return decoder._read_prompts(tokens, positions)
        if decoder.calls == 2:
            return decoder._step(tokens, positions)
        step = step or capture(tokens, positions)
        return step(tokens, positions)

    return decode


def build_model(kind: str):
    if kind != "grouped queries":
        return build_tiny_model(kind)
    llama = build_tiny_model("Llama")
    config = type(llama.config)(**llama.config.to_dict() | {"num_key_value_heads": 2})
    return type(llama)(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "grouped queries"])
@pytest.mark.parametrize("prompts", [PROMPT_IDS, PROMPT_IDS[2:]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("uses_graph", [False, True])
def test_each_step_has_the_logits_of_the_uncached_text(kind, prompts, uses_graph):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(kind).to(device)
    texts = [list(ids) for ids in prompts]
    width = max(map(len, texts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in texts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in texts], device=device)
    decode = GraphDecoder(model, mask, STEPS) if uses_graph else Decoder(model, mask)
    if uses_graph and device == "cpu":
        decode = replay_on_the_cpu(decode)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(STEPS):
        logits = decode(tokens, positions)
        expected = []
        for ids in texts:
            inputs = torch.tensor([ids], device=device)
            expected.append(model(input_ids=inputs, use_cache=False).logits[0, -1])
        expected = torch.stack(expected)
        assert torch.allclose(logits, expected, atol=1e-5)
        tokens = expected.argmax(-1, keepdim=True)
        for ids, token in zip(texts, tokens.flatten().tolist(), strict=True):
            ids.append(token)
        positions = torch.tensor([[len(ids) - 1] for ids in texts], device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")
def test_a_cpu_captures_no_graph():
    assert not _supports_cuda_graph(build_tiny_model("Llama"))


@dataclass
class RenamedOutput(ModelOutput):
    logits: torch.Tensor | None = None
    cache: object = None


def test_the_model_may_call_its_cache_by_either_name(models, tokenizer, monkeypatch):
    """transformers 5.24 renamed past_key_values to cache, in the call and in the output."""
    model = copy.deepcopy(models["Llama"])
    prompts = ["The cat", "The dog sees"]
    expected = generate(model, tokenizer, prompts, max_new_tokens=8, seed=1)
    original = model.forward
    arguments = inspect.signature(original).parameters
    name = "cache" if "cache" in arguments else "past_key_values"

    def forward(input_ids, attention_mask, position_ids, cache=None, logits_to_keep=0, **options):
        options |= {"attention_mask": attention_mask, "position_ids": position_ids, name: cache}
        output = original(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        return RenamedOutput(output.logits, output[name])

    monkeypatch.setattr(model, "forward", forward)
    assert generate(model, tokenizer, prompts, max_new_tokens=8, seed=1) == expected
