"""Check the statistics of babyllama/evaluation/metrics.py against hand-worked examples, scipy and sacrebleu."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.evaluation import metrics


def test_calibration_worked_by_hand():
    confidences, hits = np.array([0.95, 0.95, 0.95, 0.95, 0.5]), np.array([1.0, 1, 1, 0, 1])
    bins, error = metrics.calibration(confidences, hits)
    assert bins == [
        {"confidence": 0.5, "accuracy": 1.0, "count": 1, "accuracy_ci95": metrics.wilson(1.0, 1)},
        {
            "confidence": pytest.approx(0.95),
            "accuracy": 0.75,
            "count": 4,
            "accuracy_ci95": metrics.wilson(0.75, 4),
        },
    ]
    assert error == pytest.approx((4 * 0.2 + 1 * 0.5) / 5)
    rng = np.random.default_rng(0)
    honest = rng.random(200_000)
    assert metrics.calibration(honest, (rng.random(200_000) < honest).astype(float))[1] < 0.01
    assert metrics.calibration(np.array([1.0]), np.array([1.0]))[1] == 0


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_agrees_with_the_normal_one():
    rng = np.random.default_rng(1)
    rows = np.stack([rng.normal(5, 2, 400), np.ones(400)], axis=1)
    low, high = metrics.interval(metrics.resample(rows, 0)[:, 0] / 400, 400)
    half = 1.96 * rows[:, 0].std() / math.sqrt(400)
    assert (low, high) == pytest.approx(
        (rows[:, 0].mean() - half, rows[:, 0].mean() + half), abs=0.15 * half
    )
    assert (metrics.resample(rows, 0) == metrics.resample(rows, 0)).all()
    assert (metrics.resample(rows, 0) != metrics.resample(rows, 1)).any()


def test_means_leave_out_what_is_undefined():
    scores = np.array([[0.2, math.nan], [0.4, 0.6], [math.nan, math.nan], [0.4, 0.4]])
    got = metrics.mean_over_groups("x", scores, seed=0)
    assert got["x"] == pytest.approx(0.4)
    assert got["x_ci95"][0] < 0.4 < got["x_ci95"][1]
    assert math.isnan(metrics.mean_over_groups("x", np.full((2, 2), math.nan), seed=0)["x"])


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)


def test_diversity_and_repetition_worked_by_hand():
    words = ["the", "cat", "and", "the", "cat", "and", "the", "cat"]
    assert metrics.ngram_diversity(words) == pytest.approx((3 / 8 + 3 / 7 + 3 / 6) / 3)
    assert metrics.ngram_repetition(words) == pytest.approx(2 / 5)
    assert (
        metrics.ngram_diversity(["a", "b"]) == 1.0
        and metrics.ngram_repetition(["a", "b", "c", "d"]) == 0.0
    )
    assert math.isnan(metrics.ngram_diversity([])) and math.isnan(
        metrics.ngram_repetition(["a"] * 3)
    )
    assert metrics.distinct([["a", "b"], ["a", "b", "c"]], 1) == pytest.approx(3 / 5)
    assert metrics.distinct([["a", "b"], ["a", "b", "c"]], 2) == pytest.approx(2 / 3)
    assert math.isnan(metrics.distinct([[]], 1))


@given(words=WORDS.filter(bool))
def test_a_text_is_its_own_bleu(words):
    assert metrics.bleu(words, [words]) == pytest.approx(1.0)
    assert metrics.self_bleu([words, words, []]) == pytest.approx(1.0)
    assert metrics.bleu(words, [["z"]]) == 0.0


def test_self_bleu_by_hand():
    # "a b" against "a b c d": both its n-grams are found, but it is short: exp(1 - 4/2); the other way 2/4 and 1/3,
    # then zeros of two 3-grams and one 4-gram, smoothed to 1/2 and 1/4
    short, long = ["a", "b"], ["a", "b", "c", "d"]
    there, back = math.exp(-1), (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
    assert metrics.self_bleu([short, long]) == pytest.approx((there + back) / 2)
    assert math.isnan(metrics.self_bleu([short])) and math.isnan(metrics.self_bleu([short, []]))


@given(words=WORDS.filter(bool), references=st.lists(WORDS.filter(bool), min_size=1, max_size=4))
def test_bleu_equals_sacrebleu(words, references):
    sacrebleu = pytest.importorskip("sacrebleu")
    want = sacrebleu.sentence_bleu(
        " ".join(words), [" ".join(r) for r in references], tokenize="none"
    )
    assert 100 * metrics.bleu(words, references) == pytest.approx(want.score, abs=1e-9)


def test_word_overlap_by_hand():
    assert metrics.word_overlap(["a", "b", "c"], ["b", "c", "d", "e", "e"]) == pytest.approx(
        2 * 2 / 8
    )
    assert metrics.word_overlap(["a", "a"], ["a"]) == pytest.approx(2 / 3)
    assert (metrics.word_overlap([], []), metrics.word_overlap(["a"], [])) == (1.0, 0.0)
