"""Fast choices are those of float32, one text at a time; what is shared is left out and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_tiny_model

from babyllama.evaluation import minimal_pairs
from babyllama.evaluation.loading import encode
from babyllama.evaluation.scoring import ids_logprobs


def items(n: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """(texts, candidates of each item): pairs and triples that share a beginning, some equal, of many lengths."""
    rng, texts, counts = np.random.default_rng(seed), [], []
    for i in range(n):
        shared = [1, *rng.integers(3, 60, rng.integers(0, 9)).tolist()]
        count = 2 + i % 2
        own = [shared + rng.integers(3, 400, rng.integers(1, 9)).tolist() for _ in range(count)]
        if i % 17 == 0:
            own[1] = list(own[0])  # a tie
        texts += own
        counts.append(count)
    return texts, counts


def naive(model, texts: list[list[int]]) -> np.ndarray:
    """Summed log-probabilities of tokens 1 on, a text at a time, in float64."""
    model = model.double()
    with torch.no_grad():
        sums = [
            model(torch.tensor([ids]))
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(1, torch.tensor(ids[1:])[:, None])
            .sum()
            .item()
            for ids in texts
        ]
    model.float()
    return np.array(sums)


def best(scores: np.ndarray, counts: list[int]) -> list[tuple[int, bool]]:
    """(place of the best candidate, whether it is tied) of each item."""
    parts = np.split(scores, np.cumsum(counts)[:-1])
    return [
        (int(np.argmax(own)), bool((np.sort(own)[-1] - np.sort(own)[-2]) < 1e-9)) for own in parts
    ]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_choices_are_those_of_a_naive_loop(kind):
    model = build_tiny_model(kind)
    with torch.no_grad():  # as sure of itself as a trained model
        model.get_output_embeddings().weight.mul_(20)
    texts, counts = items(700)
    scores, precision = minimal_pairs.relative_scores(model, texts, [1] * len(texts), counts)
    expected = naive(model, texts)
    own, wanted = best(scores, counts), best(expected, counts)
    margins = [
        np.sort(part)[-1] - np.sort(part)[-2] for part in np.split(expected, np.cumsum(counts)[:-1])
    ]
    assert [a for a, m in zip(own, margins, strict=True) if m > 1e-4 or m == 0] == [
        a for a, m in zip(wanted, margins, strict=True) if m > 1e-4 or m == 0
    ]
    assert sum(tied for _, tied in own) > 20
    assert precision["items"] == 700
    assert minimal_pairs.SAMPLE <= precision["float32_items"] < 700
    for found, exact in zip(
        *(np.split(s, np.cumsum(counts)[:-1]) for s in (scores, expected)), strict=True
    ):
        assert found - found[0] == pytest.approx(
            exact - exact[0], abs=2 * precision["largest_error_nats"] + 1e-3
        )


@pytest.mark.parametrize("tile", [minimal_pairs.CPU_HEAD_TILE, (7, 33)])
def test_trees_in_float32_are_the_texts_alone(monkeypatch, tile):
    """What shares a beginning goes through the model once and scores as it would alone."""
    monkeypatch.setattr(minimal_pairs, "CPU_HEAD_TILE", tile)
    model = build_tiny_model("Llama")
    texts, _ = items(60, seed=1)
    found = minimal_pairs.fast_sums(model, texts, [1] * len(texts), torch.float32)
    assert found == pytest.approx(naive(model, texts), rel=1e-5)
    tokens = sum(len(tree.tokens) for tree in minimal_pairs._trees(texts, 64))
    assert tokens < sum(len(ids) - 1 for ids in texts)


def test_what_all_candidates_share_is_not_scored():
    texts = [[1, 5, 6, 7], [1, 5, 8], [1, 5, 6, 9], [1, 4], [1, 4]]
    assert minimal_pairs._begins(texts, [1] * 5, np.array([3, 2]), context=3) == [2, 2, 2, 2, 2]
    assert minimal_pairs._begins(texts[:2], [1, 2], np.array([2]), context=3) == [
        1,
        2,
    ]  # context in one, scored in the other
    assert minimal_pairs._begins(texts, [1] * 5, np.array([3, 2]), context=2) == [
        1,
        1,
        1,
        2,
        2,
    ]  # too long for one window


def test_beyond_the_context_all_terms_count():
    """Candidates of other lengths have other windows, so what they share is not the same to the model."""
    model, rng = build_tiny_model("Llama"), np.random.default_rng(3)
    shared = [1, *rng.integers(3, 400, 90).tolist()]
    texts = [shared + rng.integers(3, 400, n).tolist() for n in (2, 5, 9, 3)]
    scores, _ = minimal_pairs.relative_scores(model, texts, [1] * 4, [2, 2])
    assert scores == pytest.approx(
        np.array([s.logprobs.sum() for s in ids_logprobs(model, texts)]), rel=1e-6
    )
    with pytest.raises(ValueError, match=r"token ids 1\.\.400 are outside"):
        minimal_pairs.relative_scores(model, [[1, 400], [1, 5]], [1, 1], [2])


def test_a_fast_pass_that_goes_wrong_decides_nothing(monkeypatch):
    """Noise larger than any margin: every item is left to float32, and the choices stand."""
    model, (texts, counts) = build_tiny_model("Llama"), items(600, seed=2)
    right = minimal_pairs.fast_sums

    def noisy(model, ids, begins, dtype):
        return right(model, ids, begins, dtype) + np.random.default_rng(0).normal(0, 50, len(ids))

    monkeypatch.setattr(minimal_pairs, "fast_sums", noisy)
    scores, precision = minimal_pairs.relative_scores(model, texts, [1] * len(texts), counts)
    assert precision == {"items": 600, "float32_items": 600}
    begins = minimal_pairs._begins(texts, [1] * len(texts), np.array(counts), 64)
    exact = [s.logprobs.sum() for s in ids_logprobs(model, texts, starts=begins)]
    assert scores == pytest.approx(np.array(exact), rel=1e-6)


def test_encode_gives_the_ids_of_the_tokenizer(tokenizer):
    texts = ["The cat sees the dog.", "", " a  b\n", "héllo 123"]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode(tokenizer, texts, bos=False) == expected
