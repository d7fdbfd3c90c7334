"""Turn the scores of candidates into the results of tasks: accuracies, comparisons, the overall score."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from babyllama.evaluation.metrics import (
    RESAMPLES,
    Z95,
    bootstrap_macro_mean,
    explained_percent,
    spearman,
    wilson,
)
from babyllama.evaluation.tasks import EYE_TRACKING, TASKS, Item, Task

TIE_TOLERANCE = 1e-5  # nats; two sums that differ by less are equal as far as float32 can tell
CI95 = (2.5, 97.5)  # percentiles of a 95 % interval
SLOW_RESAMPLES = 400  # of the bootstrap of a statistic that is computed anew for each
MIN_DIFFERING = 6  # items that differ; with fewer not even all of one sign are significant (sign test: 2 x 0.5^5 = 0.06)


@dataclass(frozen=True)
class Grades:
    """What became of each item: arrays of length n."""

    credit: np.ndarray  # 1 if right, 1/k if it shares the highest score with k - 1 others, else 0
    official: (
        np.ndarray
    )  # 1 if right when a tie goes to the first candidate, as BabyLM's pipeline has it
    tied: np.ndarray  # whether candidates share the highest score
    choice: np.ndarray  # the candidate chosen (the first of those that tie)


def grade(items: Sequence[Item], scores: np.ndarray) -> Grades:
    """Compare each item's candidates; `scores` holds all candidates of all items in order."""
    counts = np.array([len(item.completions) for item in items])
    starts = np.cumsum(counts) - counts
    best = np.maximum.reduceat(scores, starts)
    top = scores >= np.repeat(best, counts) - TIE_TOLERANCE
    shared = np.add.reduceat(top.astype(np.int64), starts)
    gold = np.array([item.gold for item in items])
    owner = np.repeat(np.arange(len(items)), counts)
    tops = np.flatnonzero(top)
    choice = tops[np.unique(owner[tops], return_index=True)[1]] - starts
    return Grades(top[starts + gold] / shared, (choice == gold).astype(float), shared > 1, choice)


def subset_weights(average: str, subsets: Sequence[str]) -> dict[str, float]:
    """What each subset's accuracy counts in the average of a task; `subsets` names the subset of every item."""
    names, counts = np.unique(np.asarray(subsets), return_counts=True)
    if average == "micro":
        return dict(zip(names.tolist(), (counts / counts.sum()).tolist(), strict=True))
    if average == "macro":
        return dict.fromkeys(names.tolist(), 1 / len(names))
    splits = [re.sub(r"_\d+_ops$", "", name) for name in names.tolist()]
    return {
        n: 1 / len(set(splits)) / splits.count(s)
        for n, s in zip(names.tolist(), splits, strict=True)
    }


def _accuracy(spec: Task, items: Sequence[Item], scores: np.ndarray) -> dict[str, Any]:
    grades = grade(items, scores)
    names = np.array([item.subset for item in items])
    weights = subset_weights(spec.average, names)
    chances = np.array([1 / len(item.completions) for item in items])
    shares, rows = (
        {"accuracy": grades.credit, "accuracy_official": grades.official, "chance": chances},
        {},
    )
    for name in weights:
        own = names == name
        rows[name] = {key: float(values[own].mean()) for key, values in shares.items()}
        rows[name] |= {"n": int(own.sum()), "ties": int(grades.tied[own].sum())}
        rows[name]["accuracy_ci95"] = wilson(rows[name]["accuracy"], rows[name]["n"])
    mean = {
        key: min(1.0, math.fsum(w * rows[name][key] for name, w in weights.items()))
        for key in shares
    }
    effective = 1 / sum(
        w * w / rows[name]["n"] for name, w in weights.items()
    )  # n, were subsets equal in size
    return {
        **mean, "accuracy_ci95": wilson(mean["accuracy"], effective), "n": len(items), "ties": int(grades.tied.sum()),
        "correct": float(grades.credit.sum()), "average": spec.average, "interval": "Wilson", "subsets": rows,
    }  # fmt: skip


def _statistic(
    spec: Task, items: Sequence[Item], scores: np.ndarray
) -> Callable[[np.ndarray], dict[str, float]]:
    """The figures of a task that has no right answers, as a function of the items (indices) that count."""
    column = {name: np.array([item.facts[name] for item in items]) for name in items[0].facts}
    counts = np.array([len(item.completions) for item in items])
    starts = np.cumsum(counts) - counts
    if spec.metric == "spearman":
        ratio = _share(scores[starts] - scores[starts + 1])
        return lambda some: {"spearman": spearman(ratio[some], column["ratio"][some])}
    before = np.where(counts > 1, -scores[np.minimum(starts + 1, len(scores) - 1)], np.nan)
    surprisal = -scores[starts]

    def reading(some: np.ndarray) -> dict[str, float]:
        word = [column[name][some] for name in ("Subtlex_log10", "length", "context_length")]
        spill = [*word, column["prev_length"][some], before[some]]
        eyes = [
            explained_percent(column[name][some], word, surprisal[some]) for name in EYE_TRACKING
        ]
        pace = explained_percent(column["self_paced_reading_time"][some], spill, surprisal[some])
        return {"eye_tracking_percent": float(np.mean(eyes)), "self_paced_reading_percent": pace}

    return reading


def _share(margin: np.ndarray) -> np.ndarray:
    """softmax([a, b])[0] from the margin a - b."""
    return 1 / (1 + np.exp(np.clip(-margin, -700, 700)))


def score_items(
    task: str, items: Sequence[Item], scores: Sequence[float], seed: int = 0
) -> dict[str, Any]:
    """The figures of a task from the summed log-probability of each candidate of each item, all in order.

    Accuracies are fractions; a tie of k counts 1/k (`accuracy`) or goes to the first (`accuracy_official`). Their
    interval is Wilson's for n = 1 / sum of weight^2 / n over subsets, a little wide; others bootstrap the items.
    """
    spec, scores = TASKS[task], np.asarray(scores, dtype=np.float64)
    if len(scores) != sum(len(item.completions) for item in items):
        raise ValueError(
            f"{task}: {len(scores)} scores do not fit the candidates of {len(items)} items"
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"{task}: {int(np.isnan(scores).sum())} of {len(scores)} scores are NaN: the model is broken"
        )
    if spec.metric == "accuracy":
        return {"metric": "accuracy"} | _accuracy(spec, items, scores)
    statistic, n = _statistic(spec, items, scores), len(items)
    values, rng = statistic(np.arange(n)), np.random.default_rng(seed)
    draws = [statistic(rng.integers(n, size=n)) for _ in range(SLOW_RESAMPLES)]
    intervals = {key: np.percentile([draw[key] for draw in draws], CI95).tolist() for key in values}
    if (
        spec.metric == "eye_tracking_percent"
    ):  # never below 0, so draws are too high: the basic bootstrap's interval
        ends = {
            key: [2 * values[key] - end for end in reversed(own)] for key, own in intervals.items()
        }
        intervals = {
            key: [max(0.0, low), max(values[key], high)] for key, (low, high) in ends.items()
        }
    intervals = {f"{key}_ci95": own for key, own in intervals.items()}
    return {
        "metric": spec.metric,
        **values,
        **intervals,
        "n": n,
        "chance": 0.0,
        "interval": "bootstrap by item",
    }


def macro_average(types: dict[str, str], results: dict[str, dict]) -> float | None:
    """BabyLM's one figure: the mean over its columns of 100 x the official accuracy, 100 x rank correlation, and both
    figures of reading times. `types` names the task of each result; None where fewer than two are BabyLM's."""
    columns = []
    for result in (
        results[n] for n, kind in types.items() if kind in TASKS and TASKS[kind].official
    ):
        if result["metric"] == "eye_tracking_percent":
            columns += [result["eye_tracking_percent"], result["self_paced_reading_percent"]]
        else:
            columns.append(
                100
                * result[
                    "accuracy_official" if result["metric"] == "accuracy" else result["metric"]
                ]
            )
    return math.fsum(columns) / len(columns) if len(columns) > 1 else None


def compare(
    task: str, items: Sequence[Item], a: np.ndarray, b: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """How much better the scores `a` do than the scores `b` of the same items: paired bootstrap by item."""
    spec = TASKS[task]
    if spec.metric == "accuracy":
        gain = grade(items, a).credit - grade(items, b).credit
        if spec.average == "micro":  # each item counts the same, whatever its subset
            return compare_means(gain, seed)
        names = np.array([item.subset for item in items])
        weights = subset_weights(spec.average, names)
        value = sum(weight * gain[names == name].mean() for name, weight in weights.items())
        return difference(
            float(value), bootstrap_macro_mean(gain, names, weights, seed), np.count_nonzero(gain)
        )
    of_a, of_b, rng = (
        _statistic(spec, items, a),
        _statistic(spec, items, b),
        np.random.default_rng(seed),
    )
    samples = [
        np.arange(len(items)),
        *(rng.integers(len(items), size=len(items)) for _ in range(SLOW_RESAMPLES)),
    ]
    gains = [of_a(some)[spec.metric] - of_b(some)[spec.metric] for some in samples]
    return difference(gains[0], gains[1:], len(items))


def compare_means(gains: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The mean of paired differences: bootstrap over the pairs."""
    draws = bootstrap_macro_mean(gains, np.full(len(gains), ""), {"": 1.0}, seed)
    return difference(float(gains.mean()), draws, np.count_nonzero(gains))


def difference(value: float, draws: Sequence[float], differing: int) -> dict[str, Any]:
    """A difference with the 95 % interval of its bootstrap draws; `noise` where that holds 0 or under LEAST differ."""
    low, high = np.percentile(draws, CI95).tolist()
    noise = bool(low <= 0 <= high or differing < MIN_DIFFERING)
    return {"difference": value, "difference_ci95": [low, high], "noise": noise}


def predictions(task: str, items: Sequence[Item], scores: np.ndarray) -> dict[str, Any]:
    """The content of predictions.json in the layout of BabyLM's pipeline."""
    spec, scores = TASKS[task], np.asarray(scores, dtype=np.float64)
    ends = np.cumsum([len(item.completions) for item in items])
    parts = np.split(scores, ends[:-1])
    if spec.metric == "eye_tracking_percent":
        two = [[float(-score) for score in own] + [None] * (2 - len(own)) for own in parts]
        rows = [
            {"id": i, "pred": pred, "prev_pred": before} for i, (pred, before) in enumerate(two)
        ]
        return {"reading": {"predictions": rows}}
    made: dict[str, Any] = {}
    for item, own, choice in zip(items, parts, grade(items, scores).choice.tolist(), strict=True):
        rows = made.setdefault(item.subset, {"predictions": []})["predictions"]
        rows.append({"id": f"{item.subset}_{len(rows)}", "pred": item.answer(choice)})
        if spec.metric == "spearman":
            rows[-1]["prob"] = float(_share(own[0] - own[1]))
    return made


def compare_to_baselines(
    task: str,
    items: Sequence[Item],
    result: dict,
    scores: np.ndarray,
    others: dict[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Trivial baselines beside a result, and whether the model is better than each of them beyond noise.

    `random` is chance, which the interval of the model's score must leave out; `others` are compared item by item.
    """
    metric, baselines = result["metric"], {}
    low, high = result[f"{metric}_ci95"]
    if metric != "eye_tracking_percent":  # which is above 0 for any numbers
        chance = result["chance"]
        baselines["random"] = {
            "score": chance,
            "difference": result[metric] - chance,
            "noise": low <= chance <= high,
        }
    for name, values in others.items():
        gap = compare(task, items, scores, values, seed)
        baselines[name] = {"score": result[metric] - gap["difference"], **gap}
    better = all(row["difference"] > 0 and not row["noise"] for row in baselines.values())
    return {"baselines": baselines, "better_than_baselines": better}


def overall(results: dict[str, dict], seed: int = 0) -> dict[str, Any]:
    """`overall_score` of quality, `overall_score_ci95` and `overall_parts` from the results of tasks by name.

    The mean over tasks of how far each is above chance, (score - chance) / (1 - chance), times 1 - the mean repetition,
    and at least 0. A task below chance counts against the others: did it count as 0, chance alone would score. Of
    consistency it is score - chance: its chance is the model's own, and to divide by what is left would raise a model
    that always says the same. Speed and reading times have no part in it. The interval takes those of the parts for
    independent normal ones.
    """
    rng = np.random.default_rng(seed)

    def drawn(
        value: float, interval: Sequence[float]
    ) -> np.ndarray:  # (1 + RESAMPLES,): the value, then others
        return np.append(
            value, value + (interval[1] - interval[0]) / (2 * Z95) * rng.standard_normal(RESAMPLES)
        )

    parts, repetition = {}, []
    for name, result in results.items():
        metric = result["metric"]
        if metric == "avg_repetition_score":
            repetition.append(drawn(result[metric], result[f"{metric}_ci95"]))
        elif metric == "avg_consistency_score":
            (gap,) = result["baselines"].values()
            parts[name] = drawn(gap["difference"], gap["difference_ci95"])
        elif metric in ("accuracy", "completion_accuracy", "spearman"):
            above = drawn(result[metric], result[f"{metric}_ci95"]) - result["chance"]
            parts[name] = above / max(1 - result["chance"], 1e-9)
    shown = {name: float(values[0]) for name, values in parts.items()}
    if repetition:
        shown["one_minus_repetition"] = float(1 - np.mean(repetition, axis=0)[0])
    if not parts:
        return {"overall_score": None, "overall_score_ci95": None, "overall_parts": shown}
    scores = np.mean(list(parts.values()), axis=0) * (
        1 - np.mean(repetition, axis=0) if repetition else 1
    )
    scores = scores.clip(0, 1)
    return {
        "overall_score": float(scores[0]),
        "overall_score_ci95": np.percentile(scores[1:], [2.5, 97.5]).tolist(),
        "overall_parts": shown,
    }
