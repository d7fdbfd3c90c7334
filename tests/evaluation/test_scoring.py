"""The scoring kernel against naive float64 loops, worked examples and exact properties."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.evaluation.scoring import _windows, ids_logprobs, token_logprobs

KINDS = ["Llama", "GPT2", "GPTJ", "Qwen3"]
BOS = 1


def scale_weights(model, factor: float = 5.0):
    """Enlarge the weights, so that predictions are far from uniform and errors show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def models(tiny_model):
    return {kind: scale_weights(tiny_model(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def texts():
    """Return 130 texts, from empty to the full context of 64 tokens."""
    single = sentences(120, seed=3)
    pairs = [" ".join(single[i : i + 2]) for i in range(7)]
    return [*single, "", "a", "Ünï©ode 🙂", *pairs]


def naive_logprobs(model, ids: list[int]) -> list[float]:
    """Return log p of ids[1:], from one forward pass without padding."""
    if len(ids) < 2:
        return []
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return [logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]


def with_bos(tokenizer, text: str) -> list[int]:
    return [BOS, *tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_a_float64_loop_for_any_batch_and_order(models, tokenizer, texts, kind):
    double = copy.deepcopy(models[kind]).double()
    tolerance = 1e-4 if kind == "Qwen3" else 1e-5  # normalizing queries and keys magnifies rounding
    expected = {text: naive_logprobs(double, with_bos(tokenizer, text)) for text in texts}
    longest = max(len(logprobs) for logprobs in expected.values())
    for rows in (1, 2, 7, 64):
        shuffled = random.Random(rows).sample(texts, len(texts))
        results = token_logprobs(models[kind], tokenizer, shuffled, batch_tokens=rows * longest)
        for text, scores in zip(shuffled, results, strict=True):
            assert scores.logprobs == pytest.approx(expected[text], rel=tolerance)
            assert scores.logprobs.sum() == pytest.approx(sum(expected[text]), rel=tolerance)
            assert tokenizer.decode(scores.ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_model_gives_every_token_one_over_v(tiny_model, tokenizer, texts, kind):
    model = tiny_model(kind)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    vocab_size = model.config.vocab_size
    for scores in token_logprobs(model, tokenizer, texts, stats=True):
        n = len(scores.ids)
        assert scores.logprobs.sum() == pytest.approx(-n * math.log(vocab_size), rel=1e-6)
        assert scores.top_probs == pytest.approx([1 / vocab_size] * n, rel=1e-5)
        assert scores.entropies == pytest.approx([math.log(vocab_size)] * n, rel=1e-6)
        assert scores.ranks.tolist() == [(vocab_size + 1) / 2] * n  # the mean rank of all
        assert scores.hits == pytest.approx([1 / vocab_size] * n)


def test_statistics_equal_a_loop_over_the_vocabulary(models, tokenizer):
    text = "The cat sees the old dog under the tree."
    scores = token_logprobs(models["GPT2"], tokenizer, [text], stats=True)[0]
    ids = with_bos(tokenizer, text)
    with torch.no_grad():
        logits = copy.deepcopy(models["GPT2"]).double()(torch.tensor([ids])).logits[0]
    probs = logits.softmax(-1).tolist()
    for i, token in enumerate(ids[1:]):
        row = probs[i]
        assert scores.ids[i] == token
        assert scores.top_probs[i] == pytest.approx(max(row), rel=1e-5)
        assert scores.entropies[i] == pytest.approx(-sum(p * math.log(p) for p in row), rel=1e-5)
        assert scores.ranks[i] == sorted(row, reverse=True).index(row[token]) + 1
        assert scores.hits[i] == (row[token] == max(row))

    without_stats = token_logprobs(models["GPT2"], tokenizer, [text])[0]
    assert without_stats.logprobs == pytest.approx(scores.logprobs, rel=1e-6)
    assert without_stats.top_probs is None


def test_without_bos_the_first_token_has_no_score(models, tokenizer):
    text = "The cat sleeps."
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert token_logprobs(models["Llama"], tokenizer, [text])[0].ids.tolist() == ids
    scores = token_logprobs(models["Llama"], tokenizer, [text], bos=False)[0]
    assert scores.ids.tolist() == ids[1:]
    assert scores.logprobs == pytest.approx(naive_logprobs(models["Llama"], ids), rel=1e-5)


@settings(deadline=None)
@given(n=st.integers(0, 80), start=st.integers(1, 85), context=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_once_with_enough_context(n, start, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in _windows(np.arange(n), start, context, stride, offset=7):
        assert len(window.inputs) <= context
        assert window.inputs[-1] + 1 == window.targets[-1]  # each token is its own position
        assert window.offset == 7 + window.targets[0] - start
        for token in window.targets:
            assert token - window.inputs[0] >= min(token, context - stride + 1)
            scored.append(token)
    assert scored == list(range(start, n))


@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 64), (64, 1), (10, 3), (1, 1)])
def test_long_text_equals_one_forward_pass_per_token(models, context, stride):
    ids = [BOS, *np.random.default_rng(0).integers(3, 400, 149).tolist()]
    options = {"context": context, "stride": stride, "batch_tokens": 200}
    long_scores, short_scores = ids_logprobs(models["GPT2"], [ids, ids[:30]], **options)

    stride = context // 2 if stride is None else stride
    double = copy.deepcopy(models["GPT2"]).double()
    expected = []
    for i in range(1, len(ids)):
        window = math.ceil(max(0, i - context) / stride)  # the first one that reaches token i
        end = min(context + window * stride, len(ids) - 1)
        expected.append(naive_logprobs(double, ids[max(0, end - context) : i + 1])[-1])
    assert long_scores.logprobs == pytest.approx(expected, rel=1e-5)
    assert len(short_scores.ids) == 29


def test_scores_can_start_at_a_later_token(models):
    rng = np.random.default_rng(1)
    sequences = [rng.integers(3, 400, n).tolist() for n in (0, 1, 5, 40, 150)]
    scores_from_start = ids_logprobs(models["Llama"], sequences)
    for start in (1, 4, 39, 200):
        later_scores = ids_logprobs(models["Llama"], sequences, starts=[start] * 5)
        for all_scores, scores in zip(scores_from_start, later_scores, strict=True):
            assert scores.ids.tolist() == all_scores.ids[start - 1 :].tolist()
            assert scores.logprobs == pytest.approx(all_scores.logprobs[start - 1 :], rel=1e-5)


def test_capped_logits_of_gemma_are_scored_as_the_model_computes_them():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    model = scale_weights(transformers.Gemma2ForCausalLM(config).eval(), 20.0)
    ids = np.random.default_rng(0).integers(0, 120, 30).tolist()
    assert model(torch.tensor([ids])).logits.abs().max() > 1.5  # so the cap changes them
    expected = naive_logprobs(copy.deepcopy(model).double(), ids)
    assert ids_logprobs(model, [ids])[0].logprobs == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_still_give_float32_logits(models, kind):
    model = copy.deepcopy(models[kind]).bfloat16()
    ids = np.random.default_rng(0).integers(3, 400, 40)
    scores = ids_logprobs(model, [ids])[0]
    with torch.no_grad():
        states = model.base_model(torch.tensor(ids[None, :-1])).last_hidden_state[0].double()
        head = model.get_output_embeddings()
        logits = states @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    expected = logits.log_softmax(-1)[torch.arange(39), torch.tensor(ids[1:])]
    assert scores.logprobs == pytest.approx(expected.numpy(), rel=1e-5)


def test_scoring_switches_dropout_off_and_restores_settings(tiny_model, tokenizer):
    model = tiny_model("GPT2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = token_logprobs(model, tokenizer, ["The cat"])[0].logprobs
    model.train()
    torch.set_float32_matmul_precision("high")
    try:
        scores = token_logprobs(model, tokenizer, ["The cat"])[0]
        assert model.training
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert scores.logprobs.tolist() == expected.tolist()


def test_nan_weights_give_nan_scores(tiny_model, tokenizer):
    model = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    scores = token_logprobs(model, tokenizer, ["The cat"], stats=True)[0]
    for values in (scores.logprobs, scores.top_probs, scores.entropies, scores.ranks, scores.hits):
        assert np.isnan(values).all()


def test_no_sequences_have_no_scores(models):
    assert ids_logprobs(models["Llama"], []) == []


def test_impossible_requests_name_the_value_and_the_limit(models):
    model = models["Llama"]
    message = r"text 1: token ids 3\.\.400 are outside the model's vocabulary, 0\.\.399"
    with pytest.raises(ValueError, match=message):
        ids_logprobs(model, [[1, 2], [3, 400]])
    with pytest.raises(ValueError, match=r"starts\[0\] is 0"):
        ids_logprobs(model, [[1, 2]], starts=[0])
    with pytest.raises(ValueError, match=r"context 65 is outside 1\.\.64"):
        ids_logprobs(model, [[1, 2]], context=65)
    with pytest.raises(ValueError, match=r"stride 65 is outside 1\.\.64"):
        ids_logprobs(model, [[1, 2]], stride=65)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_scores_of_the_cpu(models, tokenizer, texts, kind):
    all_cpu_scores = token_logprobs(models[kind], tokenizer, texts)
    all_gpu_scores = token_logprobs(copy.deepcopy(models[kind]).to("cuda"), tokenizer, texts)
    for cpu_scores, gpu_scores in zip(all_cpu_scores, all_gpu_scores, strict=True):
        assert cpu_scores.logprobs == pytest.approx(gpu_scores.logprobs, rel=2e-5)
