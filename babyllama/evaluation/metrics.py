"""Arithmetic behind the figures: rates with bootstrap intervals, calibration, n-gram diversity, repetition and BLEU.

It works on numbers and words that others give it; it knows no model, no tokenizer and no file.

    from metrics import bleu, ngram_repetition, self_bleu
    ngram_repetition("the cat and the cat and the cat".split())      # 0.4: two of the five 4-grams occurred before
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

CALIBRATION_BINS = 15  # Guo et al. 2017, On Calibration of Modern Neural Networks
RESAMPLES = 2000  # of the bootstrap
Z95 = 1.959964  # quantile of the normal distribution for a two-sided 95 % interval


def mean(values) -> float:
    """NaN for no values."""
    return float(values.mean()) if len(values) else math.nan


def perplexity_metrics(totals) -> dict[str, Any]:
    """Figures from (nats, tokens, bytes, words), numbers or arrays of equal length."""
    nats, tokens, size, words = totals
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return {
            "perplexity": np.exp(nats / tokens),
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size,
            "word_perplexity": np.exp(nats / words),
        }


def sums_by(rows: np.ndarray, owners: Sequence) -> np.ndarray:
    """Rows (N, K) summed by what owns them: (number of owners, K)."""
    names, places = np.unique(np.asarray(owners), return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, places, rows)
    return sums


def bootstrap_macro_mean(
    values: np.ndarray, groups: np.ndarray, weights: dict[str, float], seed: int
) -> np.ndarray:
    """Bootstrap draws (RESAMPLES,) of the weighted mean of the groups' means, values resampled within their group.

    Deviations are scaled by sqrt(n / (n - 1)), which a resampled mean of n lacks. Groups of one value say nothing of
    their spread: they are resampled together (collapsed strata, Cochran 1977).
    """
    rng, total = np.random.default_rng(seed), np.zeros(RESAMPLES)
    strata, single = [], []
    for name, weight in weights.items():
        own = values[groups == name]
        if len(own) > 1:
            strata.append((weight, own))
        else:
            single.append(weight * own[0])
    if single:
        strata.append((1.0, len(single) * np.array(single)))
    for weight, own in strata:
        n, (levels, counts) = len(own), np.unique(own, return_counts=True)
        draws = (
            rng.multinomial(n, counts / n, size=RESAMPLES) @ levels / n
        )  # how often each level is drawn
        total += weight * (own.mean() + (draws - own.mean()) * math.sqrt(n / max(1, n - 1)))
    return total


def resample(rows, seed: int):
    """Column sums (RESAMPLES, K) of rows (N, K) drawn N times with replacement."""
    rng = np.random.default_rng(seed)
    n = len(rows)
    return np.array(
        [rows[rng.integers(n, size=n)].sum(0) if n else rows.sum(0) for _ in range(RESAMPLES)]
    )


def interval(values, n: int) -> list[float]:
    """The middle 95 % of values from resampling n texts; NaN for fewer than two and where a value is undefined."""
    if n < 2 or not np.isfinite(values).all():
        return [math.nan, math.nan]
    return np.percentile(values, [2.5, 97.5]).tolist()


def wilson(p: float, n: float) -> list[float]:
    """95 % Wilson score interval of a proportion p of n trials (Wilson 1927)."""
    centre, margin = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    low, high = (centre - margin) / (1 + Z95**2 / n), (centre + margin) / (1 + Z95**2 / n)
    return [min(p, max(0.0, low)), max(p, min(1.0, high))]  # p within, in spite of rounding


def mean_over_groups(name: str, scores, seed: int) -> dict[str, Any]:
    """{name: mean of the scores (P, K) that are not NaN, name_ci95: interval from resampled groups P that have any}."""
    known = ~np.isnan(scores)
    rows = np.stack([np.where(known, scores, 0).sum(-1), known.sum(-1)], axis=-1).reshape(-1, 2)
    rows = rows[rows[:, 1] > 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        total, values = rows.sum(0), resample(rows, seed)
        return {
            name: float(np.divide(*total)),
            f"{name}_ci95": interval(values[:, 0] / values[:, 1], len(rows)),
        }


def calibration(confidences, hits) -> tuple[list[dict[str, float]], float]:
    """(bins with mean confidence, accuracy, its interval and count; expected calibration error).

    The arrays are of equal length. No bins and NaN where a confidence is not finite.
    """
    if not np.isfinite(confidences).all():
        return [], math.nan
    places = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        {
            "confidence": mean(confidences[here]),
            "accuracy": mean(hits[here]),
            "count": int(here.sum()),
        }
        for here in (places == i for i in range(CALIBRATION_BINS))
        if here.any()
    ]
    bins = [{**b, "accuracy_ci95": wilson(b["accuracy"], b["count"])} for b in bins]
    gaps = sum(abs(b["confidence"] - b["accuracy"]) * b["count"] for b in bins)
    return bins, gaps / len(hits) if len(hits) else math.nan


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def ngram_diversity(words: Sequence[str]) -> float:
    """Mean over n = 1, 2, 3 of distinct n-grams per n-gram; NaN for no words."""
    shares = [
        len(grams) / grams.total() for grams in (_ngrams(words, n) for n in (1, 2, 3)) if grams
    ]
    return sum(shares) / len(shares) if shares else math.nan


def ngram_repetition(words: Sequence[str]) -> float:
    """Share of the 4-grams that occurred before in the text; NaN below four words."""
    grams = _ngrams(words, 4)
    return 1 - len(grams) / grams.total() if grams else math.nan


def distinct(texts: Iterable[Sequence[str]], n: int) -> float:
    """Distinct n-grams of all texts per n-gram."""
    grams = Counter(gram for words in texts for gram in _ngrams(words, n).elements())
    return len(grams) / grams.total() if grams else math.nan


def word_overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Dice's coefficient of two bags of words, 2 |a and b| / (|a| + |b|); 1 for two empty ones."""
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b)) if a or b else 1.0


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU, 0 to 1, of each text that has words against the others; NaN for fewer than two."""
    texts = [words for words in texts if words]
    scores = [bleu(words, texts[:i] + texts[i + 1 :]) for i, words in enumerate(texts)]
    return sum(scores) / len(scores) if len(scores) > 1 else math.nan


def bleu(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Sentence BLEU, 0 to 1 (Papineni et al. 2002): n up to 4 or the text's length, exponential smoothing of zeros.

    The same as sacrebleu's sentence_bleu(tokenize="none") / 100.
    """
    logs, smooth = [], 1.0
    for n in range(1, min(4, len(words)) + 1):
        grams, ceiling = _ngrams(words, n), Counter()
        for reference in references:
            ceiling |= _ngrams(reference, n)
        matches = (grams & ceiling).total()
        if n == 1 and not matches:
            return 0.0
        smooth *= 1 if matches else 2
        logs.append(math.log((matches or 1 / smooth) / grams.total()))
    closest = min(
        (len(reference) for reference in references),
        key=lambda size: (abs(size - len(words)), size),
    )
    return math.exp(min(0.0, 1 - closest / len(words)) + sum(logs) / len(logs))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def r_squared(y: np.ndarray, columns: Sequence[np.ndarray]) -> float:
    """Share of the variance of y that a linear model with intercept explains (ordinary least squares)."""
    x = np.column_stack([np.ones(len(y)), *columns])
    x /= np.abs(x).max(axis=0).clip(min=1e-300)  # for the conditioning; the fit is the same
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - float(residual @ residual) / float(((y - y.mean()) ** 2).sum())


def explained_percent(y: np.ndarray, base: Sequence[np.ndarray], surprisal: np.ndarray) -> float:
    """100 (R2_model - R2_base) / (1 - R2_base): base has the predictors and all their pairwise products."""
    keep = ~np.isnan(np.column_stack([y, *base, surprisal])).any(axis=1)
    base = [column[keep] for column in base]
    columns = base + [a * b for i, a in enumerate(base) for b in base[i + 1 :]]
    if keep.sum() < 2 * len(columns):
        raise ValueError(
            f"reading: {keep.sum()} complete rows are too few for {len(columns)} predictors"
        )
    low = r_squared(y[keep], columns)
    return 100 * (r_squared(y[keep], [*columns, surprisal[keep]]) - low) / (1 - low)
