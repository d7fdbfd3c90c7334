"""Turn the scores of candidates into the results of tasks.

    from babyllama.evaluation.grading import score_items
    from babyllama.evaluation.tasks import read_items
    items = read_items("blimp", "data/blimp_filtered")
    score_items("blimp", items, scores)["accuracy"]  # scores: all candidates of all items in order

The score of a candidate is its summed log-probability, and the candidate with the highest score is
the choice of the model. Averages are those of BabyLM's evaluation pipeline. Results of two models
are compared item by item. This module needs no model and reads no files.

If k candidates tie, BabyLM's pipeline of 2026 draws one of them at random. `accuracy` counts 1/k if
the right one is among them, which is the expectation of that draw. A file of predictions has to
name one candidate, so it draws with a seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # scipy.special is loaded at its first use

from babyllama.evaluation import metrics
from babyllama.evaluation.tasks import EYE_TRACKING, TASKS, Item, Task

TIE_TOLERANCE = 1e-5  # nats; sums of float32 numbers that differ by less count as equal
SLOW_RESAMPLES = 400  # for statistics that are slow to compute
# Fewer differing items cannot be significant: five of the same sign have p = 2 x 0.5^5 = 0.06.
MIN_DIFFERING = 6
COLUMNS_2026 = (
    "blimp",
    "supplement",
    "ewok",
    "entity_tracking",
    "comps",
    "glue",
    "global_piqa",
    "reading",
    "aoa",
)
FIGURES = {  # the figures of tasks that have no right answers
    "spearman": ("spearman",),
    "eye_tracking_percent": ("eye_tracking_percent", "self_paced_reading_percent"),
}


# ---- items --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grades:
    """Grades of all items, as arrays (n,)."""

    credit: np.ndarray  # 1 if right, 1/k if the right candidate is one of k with the best score
    tied: np.ndarray  # True if several candidates have the highest score
    choice: np.ndarray  # index of a candidate with the highest score, drawn at random


def grade(items: Sequence[Item], scores: np.ndarray, seed: int = 0) -> Grades:
    """Compare the candidates of each item; `scores` holds all candidates of all items in order."""
    counts = np.array([len(item.completions) for item in items])
    starts = np.cumsum(counts) - counts
    item_of = np.repeat(np.arange(len(items)), counts)
    gold = np.array([item.gold for item in items])

    # find the best candidates of each item; several can tie
    best = np.maximum.reduceat(scores, starts)
    is_best = scores >= best[item_of] - TIE_TOLERANCE
    best_count = np.add.reduceat(is_best.astype(np.int64), starts)
    # sort the candidates of each item by a random key; those that are not the best come first
    keys = np.where(is_best, np.random.default_rng(seed).random(len(scores)), -1)
    last_of_item = np.lexsort((keys, item_of))[starts + counts - 1]
    return Grades(
        credit=is_best[starts + gold] / best_count,
        tied=best_count > 1,
        choice=last_of_item - starts,
    )


def official_predictions(
    task: str, items: Sequence[Item], scores: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Return the content of predictions.json as BabyLM's evaluation pipeline writes it."""
    spec = TASKS[task]
    scores = np.asarray(scores, dtype=np.float64)
    ends = np.cumsum([len(item.completions) for item in items])
    item_scores = np.split(scores, ends[:-1])

    # for reading times: the surprisals of each word and of the word before it
    if spec.metric == "eye_tracking_percent":
        rows = []
        for number, word_scores in enumerate(item_scores):
            surprisals = [float(-score) for score in word_scores]
            before = surprisals[1] if len(surprisals) > 1 else None
            rows.append({"id": number, "pred": surprisals[0], "prev_pred": before})
        return {"reading": {"predictions": rows}}

    # for the other tasks: the chosen candidates by subset
    predictions: dict[str, Any] = {}
    choices = grade(items, scores, seed).choice.tolist()
    for item, candidates, choice in zip(items, item_scores, choices, strict=True):
        key = item.key or item.subset
        rows = predictions.setdefault(key, {"predictions": []})["predictions"]
        row = {"id": f"{key}_{len(rows)}", "pred": item.answer(choice)}
        if spec.metric == "spearman":
            row["prob"] = float(scipy.special.expit(candidates[0] - candidates[1]))  # of the first
        rows.append(row)
    return predictions


# ---- tasks --------------------------------------------------------------------------------------


def score_items(
    task: str, items: Sequence[Item], scores: Sequence[float], seed: int = 0
) -> dict[str, Any]:
    """Return the figures of a task from the scores of all candidates of all items in order.

    Accuracies are fractions. The interval of an accuracy is Wilson's for the effective number of
    items. Other figures have a bootstrap interval that resamples items.
    """
    # check the scores
    spec = TASKS[task]
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) != sum(len(item.completions) for item in items):
        raise ValueError(
            f"{task}: {len(scores)} scores do not match the candidates of {len(items)} items"
        )
    nan_count = int(np.isnan(scores).sum())
    if nan_count:
        raise ValueError(
            f"{task}: {nan_count} of {len(scores)} scores are NaN: the model's weights are broken"
        )

    if spec.metric == "accuracy":
        return {"metric": "accuracy"} | _accuracies(spec, items, scores)
    if len(items) < 2:
        raise ValueError(f"{task}: needs two or more items")

    # correlation or explained variance
    statistic = _statistic(spec, items, scores)
    values = statistic(np.arange(len(items)))
    interval = metrics.bootstrap_interval(statistic, len(items), seed, SLOW_RESAMPLES)
    if spec.metric == "eye_tracking_percent":
        # Explained variance is never below 0, so resampling raises it on average. The basic
        # bootstrap corrects for that: it mirrors the interval at the value.
        low, high = 2 * values - interval[::-1]
        interval = np.array([np.maximum(0, low), np.maximum(values, high)])
    names = FIGURES[spec.metric]
    result = {"metric": spec.metric} | dict(zip(names, values.tolist(), strict=True))
    for name, ends in zip(names, interval.T.tolist(), strict=True):
        result[f"{name}_ci95"] = ends
    return result | {"n": len(items), "chance": 0.0, "interval": "bootstrap by item"}


def figures(task: str, items: Sequence[Item], scores: np.ndarray) -> list[float]:
    """Return the FIGURES of a task that has no right answers, without their intervals."""
    statistic = _statistic(TASKS[task], items, np.asarray(scores, dtype=np.float64))
    return statistic(np.arange(len(items))).tolist()


def subset_weights(average: str, subsets: Sequence[str]) -> dict[str, float]:
    """Return the weight of each subset in the accuracy of a task, given the subset of each item."""
    names, counts = np.unique(np.asarray(subsets), return_counts=True)
    names = names.tolist()
    if average == "micro":  # every item counts the same
        return dict(zip(names, (counts / counts.sum()).tolist(), strict=True))
    if average == "macro":  # every subset counts the same
        return dict.fromkeys(names, 1 / len(names))
    # every split counts the same: the subset regular_2_ops is a cell of the split regular
    splits = [re.sub(r"_\d+_ops$", "", name) for name in names]
    weight_of_split = 1 / len(set(splits))
    return {
        name: weight_of_split / splits.count(split)
        for name, split in zip(names, splits, strict=True)
    }


def _accuracies(spec: Task, items: Sequence[Item], scores: np.ndarray) -> dict[str, Any]:
    grades = grade(items, scores)
    subset_of = np.array([item.subset for item in items])
    weights = subset_weights(spec.average, subset_of)
    item_values = {
        "accuracy": grades.credit,
        "chance": np.array([1 / len(item.completions) for item in items]),
    }

    # the figures of each subset
    subsets = {}
    for name in weights:
        members = subset_of == name
        row: dict[str, Any] = {
            key: float(values[members].mean()) for key, values in item_values.items()
        }
        row["n"] = int(members.sum())
        row["ties"] = int(grades.tied[members].sum())
        row["accuracy_ci95"] = metrics.wilson(row["accuracy"], row["n"])
        subsets[name] = row

    # their weighted means
    means = {}
    for key in item_values:
        weighted = [weight * subsets[name][key] for name, weight in weights.items()]
        means[key] = min(1.0, math.fsum(weighted))
    # this many items of equal weight would have the same variance as the weighted mean
    effective_n = 1 / sum(weight**2 / subsets[name]["n"] for name, weight in weights.items())
    return {
        **means,
        "accuracy_ci95": metrics.wilson(means["accuracy"], effective_n),
        "n": len(items),
        "ties": int(grades.tied.sum()),
        "correct": float(grades.credit.sum()),
        "average": spec.average,
        "interval": "Wilson",
        "subsets": subsets,
    }


def _statistic(
    spec: Task, items: Sequence[Item], scores: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from the indices of items to the task's FIGURES on these items."""
    columns = {
        name: np.array([item.human_data[name] for item in items]) for name in items[0].human_data
    }
    counts = np.array([len(item.completions) for item in items])
    starts = np.cumsum(counts) - counts
    if spec.metric == "spearman":
        # of the first form: the softmax of two scores
        probability = scipy.special.expit(scores[starts] - scores[starts + 1])

        def correlation(drawn: np.ndarray) -> np.ndarray:
            return np.array([metrics.spearman(probability[drawn], columns["ratio"][drawn])])

        return correlation

    # the candidates of an item are the word and, unless there is none, the word before it
    surprisal = -scores[starts]
    second = np.minimum(starts + 1, len(scores) - 1)
    columns["previous_surprisal"] = np.where(counts > 1, -scores[second], np.nan)

    def explained_variance(drawn: np.ndarray) -> np.ndarray:
        def explained(measure: str, *predictors: str) -> float:
            return metrics.explained_percent(
                columns[measure][drawn],
                [columns[name][drawn] for name in predictors],
                surprisal[drawn],
            )

        word = ("Subtlex_log10", "length", "context_length")
        eyes = [explained(measure, *word) for measure in EYE_TRACKING]
        # a reader who presses a key for every word is still busy with the previous word
        spill_over = ("prev_length", "previous_surprisal")
        pace = explained("self_paced_reading_time", *word, *spill_over)
        return np.array([np.mean(eyes), pace])

    return explained_variance


# ---- comparisons --------------------------------------------------------------------------------


def compare(
    task: str, items: Sequence[Item], scores: np.ndarray, other_scores: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Return how much better `scores` do than `other_scores`, by a paired bootstrap over items."""
    spec = TASKS[task]
    if spec.metric == "accuracy":
        gains = grade(items, scores).credit - grade(items, other_scores).credit
        if spec.average == "micro":  # every item has the same weight
            return compare_means(gains, seed)
        subset_of = np.array([item.subset for item in items])
        weights = subset_weights(spec.average, subset_of)
        value = sum(weight * gains[subset_of == name].mean() for name, weight in weights.items())
        means = metrics.bootstrap_macro_mean(gains, subset_of, weights, seed)
        return _difference(value, np.percentile(means, metrics.CI95), np.count_nonzero(gains))

    statistic = _statistic(spec, items, scores)
    other_statistic = _statistic(spec, items, other_scores)

    def gain(drawn: np.ndarray) -> float:
        return statistic(drawn)[0] - other_statistic(drawn)[0]

    interval = metrics.bootstrap_interval(gain, len(items), seed, SLOW_RESAMPLES)
    return _difference(gain(np.arange(len(items))), interval, len(items))


def compare_means(gains: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return the mean of paired differences (n,) with a bootstrap interval over the pairs."""
    one_group = np.full(len(gains), "")
    means = metrics.bootstrap_macro_mean(gains, one_group, {"": 1.0}, seed)
    interval = np.percentile(means, metrics.CI95)
    return _difference(gains.mean(), interval, np.count_nonzero(gains))


def _difference(value: float, interval: np.ndarray, differing: int) -> dict[str, Any]:
    """Return a difference; call it noise if its interval contains 0 or too few items differ."""
    low, high = interval.tolist()
    is_noise = bool(low <= 0 <= high or differing < MIN_DIFFERING)
    return {"difference": float(value), "difference_ci95": [low, high], "noise": is_noise}


def compare_to_baselines(
    task: str,
    items: Sequence[Item],
    result: dict,
    scores: np.ndarray,
    baseline_scores: dict[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Return the trivial baselines of a result, and True if the model clearly beats all of them.

    The baseline `random` is chance, and the model beats it if the whole interval of its figure is
    above chance. The baselines in `baseline_scores` are compared item by item.
    """
    metric = result["metric"]
    baselines = {}
    if metric != "eye_tracking_percent":  # chance is above 0 and unknown
        chance = result["chance"]
        low, high = result[f"{metric}_ci95"]
        baselines["random"] = {
            "score": chance,
            "difference": result[metric] - chance,
            "noise": low <= chance <= high,
        }
    for name, other_scores in baseline_scores.items():
        gap = compare(task, items, scores, other_scores, seed)
        baselines[name] = {"score": result[metric] - gap["difference"], **gap}
    is_better = all(row["difference"] > 0 and not row["noise"] for row in baselines.values())
    return {"baselines": baselines, "better_than_baselines": is_better}


# ---- several tasks ------------------------------------------------------------------------------


def leaderboard_columns(types: dict[str, str], results: dict[str, dict]) -> dict[str, float]:
    """Return the columns of BabyLM's leaderboard of 2026 that results of tasks fill, in percent.

    `types` names the task of each result; if a task has several results, the first counts. The
    column `global_piqa` is the mean of its two tasks, and `reading` the mean of its two figures.
    """
    figures: dict[str, list[float]] = {}
    counted = set()
    for name, task in types.items():
        column = TASKS[task].column if task in TASKS else ""
        if not column or task in counted:
            continue
        counted.add(task)
        result = results[name]
        if result["metric"] == "accuracy":
            values = [100 * result["accuracy"]]
        else:
            values = [result[figure] for figure in FIGURES[result["metric"]]]
        figures.setdefault(column, []).extend(values)
    return {column: math.fsum(values) / len(values) for column, values in figures.items()}


def overall_2026(columns: dict[str, float | None]) -> dict[str, Any]:
    """Return the overall score of BabyLM 2026: the mean of the nine columns of its leaderboard.

    All columns are in percent. Most are accuracies; `glue` is the mean of seven tasks, `reading`
    the mean of two explained variances, and `aoa` 100 x a correlation. A column that is missing or
    None counts 0 and is listed under `missing`.
    """
    unknown = set(columns) - set(COLUMNS_2026)
    if unknown:
        names = ", ".join(COLUMNS_2026)
        raise ValueError(f"unknown column {sorted(unknown)[0]!r}; the columns are {names}")
    values = {name: columns.get(name) for name in COLUMNS_2026}
    measured = [value for value in values.values() if value is not None]
    return {
        "overall_2026": math.fsum(measured) / len(COLUMNS_2026),
        "columns": values,
        "missing": [name for name, value in values.items() if value is None],
    }


def overall_score(results: dict[str, dict], seed: int = 0) -> dict[str, Any]:
    """Return `overall_score`, its interval and its parts from the results of tasks by name.

    The score only measures quality: the mean over tasks of (score - chance) / (1 - chance), times
    1 - mean repetition, and at least 0. A task below chance lowers the mean, because otherwise a
    model that guesses would score above 0 by luck. Consistency contributes score - chance. Its
    chance depends on the model, and dividing by 1 - chance would reward a model that always writes
    the same. Speed and reading times are not included. The interval treats the parts as independent
    and normal.
    """
    rng = np.random.default_rng(seed)

    def value_and_resamples(value: float, interval: Sequence[float]) -> np.ndarray:
        standard_error = (interval[1] - interval[0]) / (2 * metrics.Z95)
        resampled = value + standard_error * rng.standard_normal(metrics.RESAMPLES)
        return np.append(value, resampled)  # (1 + RESAMPLES,)

    # collect the parts
    parts = {}
    repetitions = []
    for name, result in results.items():
        metric = result["metric"]
        if metric == "avg_repetition_score":
            repetitions.append(value_and_resamples(result[metric], result[f"{metric}_ci95"]))
        elif metric == "avg_consistency_score":
            (gap,) = result["baselines"].values()
            parts[name] = value_and_resamples(gap["difference"], gap["difference_ci95"])
        elif metric in ("accuracy", "completion_accuracy", "spearman"):
            values = value_and_resamples(result[metric], result[f"{metric}_ci95"])
            possible_gain = max(1 - result["chance"], 1e-9)
            parts[name] = (values - result["chance"]) / possible_gain

    # combine them
    overall_parts = {name: float(values[0]) for name, values in parts.items()}
    factor = 1 - np.mean(repetitions, axis=0) if repetitions else np.ones(1 + metrics.RESAMPLES)
    if repetitions:
        overall_parts["one_minus_repetition"] = float(factor[0])
    if not parts:
        return {"overall_score": None, "overall_score_ci95": None, "overall_parts": overall_parts}
    scores = (np.mean(list(parts.values()), axis=0) * factor).clip(0, 1)
    return {
        "overall_score": float(scores[0]),
        "overall_score_ci95": np.percentile(scores[1:], metrics.CI95).tolist(),
        "overall_parts": overall_parts,
    }
