"""Compute the statistics that evaluations report.

    from babyllama.evaluation.metrics import ngram_repetition
    ngram_repetition("the cat and the cat and the cat".split())  # 0.4: 2 of 5 4-grams are repeats

There are intervals, correlation, calibration, diversity and BLEU. All of them are functions of
numbers or lists of words; models, tokenizers, tasks and files do not occur here.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy  # scipy.stats takes a second to import and is loaded at its first use
from sacrebleu.metrics import BLEU

CALIBRATION_BINS = 15  # Guo et al. 2017, On Calibration of Modern Neural Networks
RESAMPLES = 2000
DOMINATING_CHANGE = 0.1  # of bits per byte, if a document is left out that dominates them
CI95 = (2.5, 97.5)  # percentiles that bound a 95% interval
Z95 = statistics.NormalDist().inv_cdf(0.975)  # half width of a 95% interval in standard errors


# ---- intervals ----------------------------------------------------------------------------------


def wilson(p: float, n: float) -> list[float]:
    """Return the 95% Wilson score interval of a proportion p of n trials (Wilson 1927).

    scipy's `binomtest` only accepts integer counts. Here a tie can count one half, and n can be an
    effective number of items.
    """
    scale = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / scale
    margin = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / scale
    low = max(0.0, centre - margin)
    high = min(1.0, centre + margin)
    return [min(p, low), max(p, high)]  # a rounding error could exclude p


def bootstrap_interval(
    statistic: Callable[[np.ndarray], Any], n: int, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """Return the 95% percentile interval (2,) of a statistic, or (2, K) of K statistics.

    `statistic` maps the indices (n,) of resampled items to a number or to an array (K,). The
    interval is NaN for fewer than two items, and if the statistic is not finite in every resample.
    """
    # scipy.stats.bootstrap draws the same and takes as long (0.12 s for 2000 times 500 items), but
    # it keeps all that it drew in memory, and warns about statistics that are not finite
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(n, size=n)) for _ in range(resamples)])
    is_defined = n > 1 and np.isfinite(values).all(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(is_defined, np.percentile(values, CI95, axis=0), math.nan)


def bootstrap_macro_mean(
    scores: np.ndarray, groups: np.ndarray, weights: dict[str, float], seed: int
) -> np.ndarray:
    """Return the weighted mean of group means in each bootstrap resample: (RESAMPLES,).

    Scores (N,) are resampled within their group (N,). The bootstrap underestimates the spread of a
    small group by sqrt((n - 1) / n), so deviations are scaled back up. A single score shows no
    spread; groups of one score are pooled (collapsed strata, Cochran 1977).
    """
    rng = np.random.default_rng(seed)

    # split the groups into strata with a spread and singletons
    strata = []
    singletons = []
    for name, weight in weights.items():
        group_scores = scores[groups == name]
        if len(group_scores) > 1:
            strata.append((weight, group_scores))
        else:
            singletons.append(weight * group_scores[0])
    if singletons:
        strata.append((1.0, len(singletons) * np.array(singletons)))

    # scores have few distinct values, so draw how often each value occurs instead of n indices
    means = np.zeros(RESAMPLES)
    for weight, stratum in strata:
        n = len(stratum)
        levels, counts = np.unique(stratum, return_counts=True)
        resampled_means = rng.multinomial(n, counts / n, size=RESAMPLES) @ levels / n
        deviations = resampled_means - stratum.mean()
        means += weight * (stratum.mean() + deviations * math.sqrt(n / max(1, n - 1)))
    return means


# ---- means and rates ----------------------------------------------------------------------------


def mean(values: np.ndarray) -> float:
    """Return the mean, or NaN if there are no values."""
    return float(values.mean()) if len(values) else math.nan


def std(values: np.ndarray) -> float:
    """Return the standard deviation, or NaN if there are no values."""
    return float(values.std()) if len(values) else math.nan


def mean_over_groups(name: str, scores: np.ndarray, seed: int) -> dict[str, Any]:
    """Return {name: mean of scores (P, K), name_ci95: its interval}, ignoring NaN.

    The interval resamples those of the P groups that have a score.
    """
    is_scored = ~np.isnan(scores)
    sums = np.where(is_scored, scores, 0).sum(axis=-1)
    counts = is_scored.sum(axis=-1)
    sums = sums[counts > 0]
    counts = counts[counts > 0]
    if not len(counts):
        return {name: math.nan, f"{name}_ci95": [math.nan, math.nan]}

    def mean_of(drawn: np.ndarray) -> float:
        return sums[drawn].sum() / counts[drawn].sum()

    everything = np.arange(len(counts))
    interval = bootstrap_interval(mean_of, len(counts), seed)
    return {name: float(mean_of(everything)), f"{name}_ci95": interval.tolist()}


def perplexity_metrics(rows: np.ndarray, documents: Sequence, seed: int) -> dict[str, Any]:
    """Return perplexities, nats per token and bits per byte, each with its interval, and totals.

    Rows (N, 4) hold the nats, tokens, bytes and words of each text, and `documents` (N,) names the
    document that each text is from. Texts from one document are alike, so the interval resamples
    documents.
    """
    totals = sum_by_group(rows, documents)

    def rates(drawn: np.ndarray) -> np.ndarray:
        nats, tokens, size, words = totals[drawn].sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            per_token = nats / tokens
            bits_per_byte = nats / math.log(2) / size
            return np.array([np.exp(per_token), per_token, bits_per_byte, np.exp(nats / words)])

    names = ("perplexity", "nats_per_token", "bits_per_byte", "word_perplexity")
    values = rates(np.arange(len(totals))).tolist()
    intervals = bootstrap_interval(rates, len(totals), seed).T.tolist()
    figures = dict(zip(names, values, strict=True))
    for name, interval in zip(names, intervals, strict=True):
        figures[f"{name}_ci95"] = interval
    _, tokens, size, words = totals.sum(axis=0)
    return {
        **figures,
        "num_documents": len(totals),
        "total_tokens": int(tokens),
        "total_bytes": int(size),
        "total_words": int(words),
    }


def dominating_document(rows: np.ndarray, documents: Sequence) -> dict[str, Any] | None:
    """Return the document that changes bits per byte most, if that is by a tenth or more.

    Rows and documents are those of perplexity_metrics. The keys are `document`, its
    `share_of_loss`, and `bits_per_byte_without` it; None if no document dominates.
    """
    names = np.unique(np.asarray(documents))
    totals = sum_by_group(rows, documents)
    nats, _, size, _ = totals.T
    others = size.sum() - size
    is_defined = np.isfinite(nats).all() and nats.sum() > 0 and (others > 0).all()
    if len(names) < 2 or not is_defined:
        return None
    bits_per_byte = nats.sum() / math.log(2) / size.sum()
    without = (nats.sum() - nats) / math.log(2) / others
    changes = np.abs(without / bits_per_byte - 1)
    number = int(changes.argmax())
    if changes[number] < DOMINATING_CHANGE:
        return None
    return {
        "document": names[number].item(),
        "share_of_loss": float(nats[number] / nats.sum()),
        "bits_per_byte_without": float(without[number]),
    }


def sum_by_group(rows: np.ndarray, groups: Sequence) -> np.ndarray:
    """Return the sums (G, K) of the rows (N, K) of each group (N,)."""
    names, group_indices = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, group_indices, rows)
    return sums


# ---- agreement with targets ---------------------------------------------------------------------


def calibration(confidences: np.ndarray, hits: np.ndarray) -> tuple[list[dict[str, Any]], float]:
    """Return (bins of a reliability diagram, expected calibration error).

    Confidences (N,) and hits (N,) are between 0 and 1. Each bin has its mean confidence, its
    accuracy with an interval, and its count. If a confidence is not finite, there are no bins and
    the error is NaN.
    """
    if not len(hits) or not np.isfinite(confidences).all():
        return [], math.nan
    bin_of = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = []
    error = 0.0
    for number in np.unique(bin_of):
        inside = bin_of == number
        count = int(inside.sum())
        confidence = mean(confidences[inside])
        accuracy = mean(hits[inside])
        error += abs(confidence - accuracy) * count / len(hits)
        bins.append(
            {
                "confidence": confidence,
                "accuracy": accuracy,
                "count": count,
                "accuracy_ci95": wilson(accuracy, count),
            }
        )
    return bins, error


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the F1 score of label 1, 2 TP / (2 TP + FP + FN), or 0 if there is no label 1."""
    hits = int(((labels == 1) & (predictions == 1)).sum())
    misses = int(((labels == 1) != (predictions == 1)).sum())
    return 2 * hits / (2 * hits + misses) if hits else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation, or 0 if one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(a, b).statistic)


def r_squared(y: np.ndarray, predictors: Sequence[np.ndarray]) -> float:
    """Return the share of the variance of y that a linear model with intercept explains."""
    x = np.column_stack([np.ones(len(y)), *predictors])
    x /= np.abs(x).max(axis=0).clip(min=1e-300)  # improves the conditioning, not the fit
    residuals = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - float(residuals @ residuals) / float(((y - y.mean()) ** 2).sum())


def explained_percent(
    y: np.ndarray, predictors: Sequence[np.ndarray], surprisal: np.ndarray
) -> float:
    """Return 100 (R2 with surprisal - R2 without) / (1 - R2 without).

    Both linear models have the predictors and their pairwise products. Rows with a NaN are ignored.
    """
    is_complete = ~np.isnan(np.column_stack([y, *predictors, surprisal])).any(axis=1)
    y = y[is_complete]
    columns = [column[is_complete] for column in predictors]
    for i, first in enumerate(columns[:]):
        columns += [first * second for second in columns[i + 1 : len(predictors)]]
    if len(y) < 2 * len(columns):
        raise ValueError(
            f"reading: {len(y)} complete rows are too few for {len(columns)} predictors"
        )
    without = r_squared(y, columns)
    return 100 * (r_squared(y, [*columns, surprisal[is_complete]]) - without) / (1 - without)


# ---- words --------------------------------------------------------------------------------------


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def ngram_diversity(words: Sequence[str]) -> float:
    """Return the mean over n = 1, 2, 3 of the share of distinct n-grams; NaN for no words."""
    counters = [_ngrams(words, n) for n in (1, 2, 3)]
    shares = [len(ngrams) / ngrams.total() for ngrams in counters if ngrams]
    return sum(shares) / len(shares) if shares else math.nan


def ngram_repetition(words: Sequence[str]) -> float:
    """Return the share of 4-grams that repeat an earlier one; NaN for fewer than four words."""
    ngrams = _ngrams(words, 4)
    return 1 - len(ngrams) / ngrams.total() if ngrams else math.nan


def distinct(texts: Iterable[Sequence[str]], n: int) -> float:
    """Return the share of distinct n-grams in all texts together."""
    ngrams = Counter()
    for words in texts:
        ngrams.update(_ngrams(words, n))
    return len(ngrams) / ngrams.total() if ngrams else math.nan


def word_overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Return Dice's coefficient of two bags of words, 2 |a and b| / (|a| + |b|); 1 if empty."""
    if not a and not b:
        return 1.0
    shared = Counter(a) & Counter(b)
    return 2 * shared.total() / (len(a) + len(b))


def self_bleu(texts: Iterable[Sequence[str]]) -> float:
    """Return the mean sentence BLEU, 0 to 1, of each text against the others.

    Texts without words are ignored. The result is NaN if fewer than two texts are left.
    """
    sentences = [" ".join(words) for words in texts if words]
    if len(sentences) < 2:
        return math.nan
    bleu = BLEU(tokenize="none", effective_order=True)
    scores = []
    for i, sentence in enumerate(sentences):
        others = sentences[:i] + sentences[i + 1 :]
        scores.append(bleu.sentence_score(sentence, others).score / 100)
    return min(1.0, statistics.mean(scores))  # sacrebleu's 100 can be 100.00000000000004
