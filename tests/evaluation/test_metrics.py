"""metrics.py against hand-worked examples, naive loops, scipy and sacrebleu."""

import math

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from babyllama.evaluation import metrics

# ---- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (8, 10), (10, 10), (417, 1000)])
def test_wilson_equals_scipy_for_whole_counts(right, n):
    test = scipy.stats.binomtest(right, n)
    assert metrics.wilson(right / n, n) == pytest.approx(test.proportion_ci(method="wilson"))


def test_wilson_matches_a_published_example():
    assert metrics.wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_wilson_always_contains_the_proportion():
    for n in range(1, 90):
        for p in (0.0, 1.0):
            low, high = metrics.wilson(p, n)
            assert low <= p <= high


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(5, 2, 400)

    def mean_of(drawn):
        return values[drawn].mean()

    low, high = metrics.bootstrap_interval(mean_of, 400, seed=0)
    half = 1.96 * values.std() / math.sqrt(400)
    expected = (values.mean() - half, values.mean() + half)
    assert (low, high) == pytest.approx(expected, abs=0.15 * half)
    assert (metrics.bootstrap_interval(mean_of, 400, seed=0) == [low, high]).all()
    assert (metrics.bootstrap_interval(mean_of, 400, seed=1) != [low, high]).any()


def test_bootstrap_interval_of_several_statistics():
    values = np.random.default_rng(1).normal(5, 2, 50)

    def both(drawn):
        return np.array([values[drawn].mean(), values[drawn].max()])

    ends = metrics.bootstrap_interval(both, 50, seed=0)
    first = metrics.bootstrap_interval(lambda drawn: both(drawn)[0], 50, seed=0)
    assert ends.shape == (2, 2)
    assert ends[:, 0].tolist() == first.tolist()
    assert ends[0, 1] <= values.max() == ends[1, 1]


def test_bootstrap_interval_is_nan_for_one_item_or_an_undefined_statistic():
    values = np.array([1.0, math.inf, 2.0])
    assert np.isnan(metrics.bootstrap_interval(lambda drawn: 1.0, 1, seed=0)).all()
    assert np.isnan(metrics.bootstrap_interval(lambda drawn: values[drawn].sum(), 3, seed=0)).all()


def test_mean_over_groups_ignores_nan():
    scores = np.array([[0.2, math.nan], [0.4, 0.6], [math.nan, math.nan], [0.4, 0.4]])
    result = metrics.mean_over_groups("x", scores, seed=0)
    assert result["x"] == pytest.approx(0.4)
    assert result["x_ci95"][0] < 0.4 < result["x_ci95"][1]
    undefined = metrics.mean_over_groups("x", np.full((2, 2), math.nan), seed=0)
    assert math.isnan(undefined["x"])
    assert all(math.isnan(end) for end in undefined["x_ci95"])


def test_perplexity_by_hand():
    rows = np.array([[4.0, 2, 10, 1], [8.0, 4, 20, 3]])  # nats, tokens, bytes, words
    result = metrics.perplexity_metrics(rows, ["a", "b"], seed=0)
    assert result["nats_per_token"] == pytest.approx(12 / 6)
    assert result["perplexity"] == pytest.approx(math.exp(12 / 6))
    assert result["bits_per_byte"] == pytest.approx(12 / math.log(2) / 30)
    assert result["word_perplexity"] == pytest.approx(math.exp(12 / 4))
    assert (result["num_documents"], result["total_tokens"]) == (2, 6)
    assert (result["total_bytes"], result["total_words"]) == (30, 4)
    one_document = metrics.perplexity_metrics(rows, ["a", "a"], seed=0)
    assert one_document["perplexity"] == result["perplexity"]
    assert all(math.isnan(end) for end in one_document["perplexity_ci95"])


# ---- agreement with targets ---------------------------------------------------------------------


def test_calibration_worked_by_hand():
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.5])
    hits = np.array([1.0, 1, 1, 0, 1])
    bins, error = metrics.calibration(confidences, hits)
    assert [(b["accuracy"], b["count"]) for b in bins] == [(1.0, 1), (0.75, 4)]
    assert [b["confidence"] for b in bins] == pytest.approx([0.5, 0.95])
    assert [b["accuracy_ci95"] for b in bins] == [metrics.wilson(1.0, 1), metrics.wilson(0.75, 4)]
    assert error == pytest.approx((4 * 0.2 + 1 * 0.5) / 5)
    assert metrics.calibration(np.array([1.0]), np.array([1.0]))[1] == 0


def test_hits_drawn_with_the_stated_confidence_are_calibrated():
    rng = np.random.default_rng(0)
    confidences = rng.random(200_000)
    hits = (rng.random(200_000) < confidences).astype(float)
    assert metrics.calibration(confidences, hits)[1] < 0.01


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_f1_equals_the_formula_of_its_counts(pairs):
    tp, fp, fn = (pairs.count(cell) for cell in ((1, 1), (0, 1), (1, 0)))
    labels, predictions = np.array(pairs).T
    precision = tp / (tp + fp) if tp else 0
    recall = tp / (tp + fn) if tp else 0
    f1 = 2 * precision * recall / (precision + recall) if tp else 0
    assert metrics.f1(labels, predictions) == pytest.approx(f1)


def test_spearman_is_pearson_of_average_ranks():
    """Many ties on both sides: a wrong rank for tied values changes the result."""
    rng = np.random.default_rng(4)
    a = rng.integers(4, size=60).astype(float)
    b = a + rng.integers(5, size=60)

    def average_ranks(values):
        return [np.mean(np.flatnonzero(np.sort(values) == value)) for value in values]

    expected = np.corrcoef(average_ranks(a), average_ranks(b))[0, 1]
    lowest_ranks = [[(values < value).sum() for value in values] for values in (a, b)]
    assert abs(np.corrcoef(*lowest_ranks)[0, 1] - expected) > 1e-3
    assert metrics.spearman(a, b) == pytest.approx(expected)


def test_spearman_of_a_constant_is_zero():
    assert metrics.spearman(np.ones(4), np.arange(4.0)) == 0.0


# ---- words --------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12)


def test_diversity_and_repetition_worked_by_hand():
    words = ["the", "cat", "and", "the", "cat", "and", "the", "cat"]
    assert metrics.ngram_diversity(words) == pytest.approx((3 / 8 + 3 / 7 + 3 / 6) / 3)
    assert metrics.ngram_repetition(words) == pytest.approx(2 / 5)
    assert metrics.ngram_repetition(list("abcdabcd")) == pytest.approx(1 - 4 / 5)
    assert metrics.ngram_diversity(["a", "b"]) == 1.0
    assert metrics.ngram_repetition(["a", "b", "c", "d"]) == 0.0
    assert math.isnan(metrics.ngram_diversity([]))
    assert math.isnan(metrics.ngram_repetition(["a"] * 3))


def test_distinct_counts_ngrams_of_all_texts_together():
    assert metrics.distinct([["a", "b"], ["a", "b", "c"]], 1) == pytest.approx(3 / 5)
    assert metrics.distinct([["a", "b"], ["a", "b", "c"]], 2) == pytest.approx(2 / 3)
    assert math.isnan(metrics.distinct([[]], 1))


def test_word_overlap_by_hand():
    overlap = metrics.word_overlap(["a", "b", "c"], ["b", "c", "d", "e", "e"])
    assert overlap == pytest.approx(2 * 2 / 8)
    assert metrics.word_overlap(["a", "a"], ["a"]) == pytest.approx(2 / 3)
    assert metrics.word_overlap([], []) == 1.0
    assert metrics.word_overlap(["a"], []) == 0.0


def test_self_bleu_by_hand():
    """ "a b" against "a b c d" has every n-gram but is short: exp(1 - 4/2). The other way 2 of 4
    words and 1 of 3 pairs match, and the zeros of two 3-grams and one 4-gram are smoothed to 1/2
    and 1/4.
    """
    short = ["a", "b"]
    long = ["a", "b", "c", "d"]
    short_score = math.exp(-1)
    long_score = (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
    assert metrics.self_bleu([short, long]) == pytest.approx((short_score + long_score) / 2)


@given(texts=st.lists(WORDS, min_size=2, max_size=4))
def test_self_bleu_is_the_mean_of_sacrebleus_sentence_scores(texts):
    lines = [" ".join(words) for words in texts]
    scores = []
    for i, line in enumerate(lines):
        others = [other for j, other in enumerate(lines) if j != i]
        scores.append(sacrebleu.sentence_bleu(line, others, tokenize="none").score)
    assert metrics.self_bleu([*texts, []]) == pytest.approx(min(1, np.mean(scores) / 100))


@given(words=WORDS)
def test_self_bleu_of_equal_texts_is_one(words):
    assert metrics.self_bleu([words, words, []]) == pytest.approx(1.0)


def test_self_bleu_needs_two_texts_with_words():
    assert math.isnan(metrics.self_bleu([["a", "b"]]))
    assert math.isnan(metrics.self_bleu([["a", "b"], []]))


def test_a_document_dominates_if_bits_per_byte_without_it_differ_by_a_tenth():
    # nats, tokens, bytes and words; document 7 has two texts
    rows = np.array([[100, 9, 100, 9], [100, 9, 100, 9], [60, 9, 50, 9], [65, 9, 50, 9]], float)
    assert metrics.dominating_document(rows, [1, 2, 7, 7]) is None  # 1.0 against 1.083
    rows[3, 0] = 90
    dominating = metrics.dominating_document(rows, [1, 2, 7, 7])
    assert dominating == {
        "document": 7,
        "share_of_loss": pytest.approx(150 / 350),
        "bits_per_byte_without": pytest.approx(1 / math.log(2)),
    }
    assert metrics.dominating_document(rows[:1], [1]) is None
    assert metrics.dominating_document(rows * [0, 1, 1, 1], [1, 2, 7, 7]) is None  # no loss
