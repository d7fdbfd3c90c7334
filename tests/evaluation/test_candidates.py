"""Scored spans, and choices of the fast pass against a naive float64 loop, one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import build_tiny_model

from babyllama.evaluation import fast_choices
from babyllama.evaluation.candidates import score_candidates
from babyllama.evaluation.fast_choices import fast_sums, relative_scores, skip_shared_tokens
from babyllama.evaluation.prefix_tree import build_trees, tree_inputs
from babyllama.evaluation.scoring import ids_logprobs
from babyllama.evaluation.tasks import Item


def make_items(n: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Return (texts, candidates per item): pairs and triples with common beginnings, some tied."""
    rng = np.random.default_rng(seed)
    texts = []
    counts = []
    for i in range(n):
        prefix = [1, *rng.integers(3, 60, rng.integers(0, 9)).tolist()]
        count = 2 + i % 2
        candidates = [
            prefix + rng.integers(3, 400, rng.integers(1, 9)).tolist() for _ in range(count)
        ]
        if i % 17 == 0:
            candidates[1] = list(candidates[0])
        texts += candidates
        counts.append(count)
    return texts, counts


def naive_sums(model, texts: list[list[int]]) -> np.ndarray:
    """Return the summed log-probability of ids[1:] of each text, in float64."""
    model = model.double()
    sums = []
    for ids in texts:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        sums.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum().item())
    model.float()
    return np.array(sums)


def split_items(scores: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    return np.split(scores, np.cumsum(counts)[:-1])


def margin(scores: np.ndarray) -> float:
    second, best = np.sort(scores)[-2:]
    return best - second


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_fast_choices_and_ties_are_those_of_a_naive_loop(kind):
    model = build_tiny_model(kind)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # as confident as a trained model
    texts, counts = make_items(700)
    scores, precision = relative_scores(model, texts, [1] * len(texts), counts)
    ties = 0
    naive_scores = split_items(naive_sums(model, texts), counts)
    tolerance = 2 * precision["largest_error_nats"] + 1e-3
    for item_scores, expected in zip(split_items(scores, counts), naive_scores, strict=True):
        assert item_scores - item_scores[0] == pytest.approx(expected - expected[0], abs=tolerance)
        if margin(expected) == 0:
            assert margin(item_scores) == 0
            ties += 1
        elif margin(expected) > 1e-4:
            assert item_scores.argmax() == expected.argmax()
    assert ties > 20
    assert precision["items"] == 700
    assert fast_choices.SAMPLE_ITEMS <= precision["float32_items"] < 700


def test_a_row_of_a_prefix_tree_worked_by_hand():
    """The example in prefix_tree.py: a b c, a b d, e."""
    a, b, c, d, e = range(10, 15)
    (tree,) = build_trees([[e], [a, b, d], [a, b, c]], context=3)
    assert tree.tokens == [a, b, c, d, e]
    assert tree.parents == [0, 0, 1, 1, 4]
    assert tree.depths == [0, 1, 2, 2, 0]
    assert tree.paths == {2: [0, 1, 2], 1: [0, 1, 3], 0: [4]}
    tokens, depths, visible = tree_inputs([tree])
    assert tokens.tolist() == [tree.tokens]
    assert depths.tolist() == [tree.depths]
    assert visible[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_a_prefix_space_scores_a_reading_word_like_a_word_in_a_sentence(spaced_tokenizer):
    model = build_tiny_model("Llama")
    words = [Item("reading", ("The", "The cat"), ("cat", "sees"))]
    with_space = [Item("reading", ("The", "The cat"), (" cat", " sees"))]
    assert len(spaced_tokenizer.encode("cat", add_special_tokens=False)) == 1
    official, _ = score_candidates(model, spaced_tokenizer, words, scoring="word")
    expected, _ = score_candidates(model, spaced_tokenizer, with_space)
    assert official == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tile", [fast_choices.CPU_HEAD_TILE, (7, 33)])
def test_a_text_in_a_tree_scores_as_it_does_alone(monkeypatch, tile):
    monkeypatch.setattr(fast_choices, "CPU_HEAD_TILE", tile)
    model = build_tiny_model("Llama")
    texts, _ = make_items(60, seed=1)
    sums = fast_sums(model, texts, [1] * len(texts), torch.float32)
    assert sums == pytest.approx(naive_sums(model, texts), rel=1e-5)
    trees = build_trees([ids[:-1] for ids in texts], 64)
    assert sum(len(tree.tokens) for tree in trees) < sum(len(ids) - 1 for ids in texts)


def test_tokens_that_all_candidates_share_are_skipped():
    texts = [[1, 5, 6, 7], [1, 5, 8], [1, 5, 6, 9], [1, 4], [1, 4]]

    def skip(n: int, starts: list[int], counts: list[int], context: int) -> list[int]:
        return skip_shared_tokens(texts[:n], starts, np.array(counts), context)

    assert skip(5, [1] * 5, [3, 2], context=3) == [2, 2, 2, 2, 2]
    assert skip(2, [1, 2], [2], context=3) == [1, 2]  # scored in one text, context in the other
    assert skip(5, [1] * 5, [3, 2], context=2) == [1, 1, 1, 2, 2]  # too long for one window


def test_candidates_beyond_the_context_keep_their_shared_tokens():
    """Candidates of different length have different windows, so shared tokens score differently."""
    model = build_tiny_model("Llama")
    rng = np.random.default_rng(3)
    prefix = [1, *rng.integers(3, 400, 90).tolist()]
    texts = [prefix + rng.integers(3, 400, n).tolist() for n in (2, 5, 9, 3)]
    scores, _ = relative_scores(model, texts, [1] * 4, [2, 2])
    expected = np.array([text.logprobs.sum() for text in ids_logprobs(model, texts)])
    assert scores == pytest.approx(expected, rel=1e-6)


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"token ids 1\.\.400 are outside"):
        relative_scores(build_tiny_model("Llama"), [[1, 400], [1, 5]], [1, 1], [2])


def test_float32_decides_everything_if_the_fast_pass_is_wrong(monkeypatch):
    model = build_tiny_model("Llama")
    texts, counts = make_items(600, seed=2)

    def noisy_sums(model, ids, starts, dtype):
        noise = np.random.default_rng(0).normal(0, 50, len(ids))
        return fast_sums(model, ids, starts, dtype) + noise

    monkeypatch.setattr(fast_choices, "fast_sums", noisy_sums)
    scores, precision = relative_scores(model, texts, [1] * len(texts), counts)
    assert precision == {"items": 600, "float32_items": 600}
    starts = skip_shared_tokens(texts, [1] * len(texts), np.array(counts), 64)
    expected = [text.logprobs.sum() for text in ids_logprobs(model, texts, starts=starts)]
    assert scores == pytest.approx(np.array(expected), rel=1e-6)


def test_float32_decides_everything_for_an_architecture_that_we_do_not_train():
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **heads)).eval()
    texts, counts = make_items(600, seed=2)
    _, precision = relative_scores(model, texts, [1] * len(texts), counts)
    assert precision == {"items": 600, "float32_items": 600}
