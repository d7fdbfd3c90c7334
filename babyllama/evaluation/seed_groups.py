"""Compare groups of runs that differ only in the seed.

The results of a group are averaged. The spread of two groups is their pooled standard deviation
over seeds: the square root of the mean of their variances, weighted by n - 1. A difference of means
below twice the spread may be noise.
"""

from __future__ import annotations

import math
import os
import statistics
from typing import Any


def seed_groups(document: dict) -> list[dict[str, Any]]:
    """Return the groups of models in a document of results; [] if no two differ only in the seed.

    A group has `name`, `models`, `seeds` and `scores`: for each figure `mean`,
    `standard_deviation` (with n - 1; None for one seed) and `n`. Later groups also have
    `difference` from the first group, `spread` and `noise`. Each other model is its own group.
    """
    # a second run of the same seed would make the spread too small, so it stays alone
    members: dict[str, dict[int | None, str]] = {}
    for model, record in document["models"].items():
        run = record.get("run")
        key = run["config"] if run else model
        seed = run["seed"] if run else None
        if seed in members.get(key, {}):
            key = model
        members.setdefault(key, {})[seed] = model
    if all(len(group) == 1 for group in members.values()):
        return []

    # average the figures that all runs of a group have
    groups = []
    for by_seed in members.values():
        models = list(by_seed.values())
        figures = [_figures(document, model) for model in models]
        shared = [name for name in figures[0] if all(name in row for row in figures)]
        scores = {name: _summary([row[name] for row in figures]) for name in shared}
        name = _group_name(models)
        if any(group["name"] == name for group in groups):
            name = ", ".join(models)
        seeds = [seed for seed in by_seed if seed is not None]
        groups.append({"name": name, "models": models, "seeds": seeds, "scores": scores})

    # compare the other groups with the first
    for group in groups[1:]:
        for name, score in group["scores"].items():
            if name in groups[0]["scores"]:
                score |= _difference(score, groups[0]["scores"][name])
    return groups


def _figures(document: dict, model: str) -> dict[str, float]:
    """Return the figures of a model that a seed changes: all but its speed."""
    results = document["results"][model]
    figures = {}
    for task in document["configs"]:
        metric = results[task]["metric"]
        if metric != "tokens_per_second":
            figures[task] = results[task][metric]
    figures["overall score"] = results["overall_score"]
    training = document["models"][model].get("training")
    if training:
        figures["held-out bits per byte"] = training["eval_bits_per_byte"]
    return {name: value for name, value in figures.items() if value is not None}


def _summary(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "n": len(values)}


def _difference(score: dict, reference: dict) -> dict[str, Any]:
    """Return the difference of two means and its spread; {} for two single runs, without one."""
    pairs = [(row["n"] - 1, row["standard_deviation"] or 0.0) for row in (score, reference)]
    freedom = sum(weight for weight, _ in pairs)
    if not freedom:
        return {}
    spread = math.sqrt(sum(weight * deviation**2 for weight, deviation in pairs) / freedom)
    difference = score["mean"] - reference["mean"]
    is_noise = difference == 0 or abs(difference) < 2 * spread
    return {"difference": difference, "spread": spread, "noise": is_noise}


def _group_name(models: list[str]) -> str:
    """Return the common start of the names, such as tiny for tiny-seed1 and tiny-seed2."""
    if len(models) == 1:
        return models[0]
    start = os.path.commonprefix(models).rstrip("-_.").removesuffix("seed").rstrip("-_.")
    return start or ", ".join(models)
