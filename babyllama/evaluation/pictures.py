"""Draw the pictures of a page about models.

They show the training of each model and what evaluate.py found, from the files in its directory.
Learning curves come from the results of the checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from babyllama import plots
from babyllama.evaluation.model_names import checkpoints_by_run, short_names
from babyllama.files import read_json

log = logging.getLogger(__name__)

ON_UNIT_SCALE = {  # metrics with values up to 1, which the charts show
    "accuracy",
    "completion_accuracy",
    "generation_accuracy",
    "spearman",
    "avg_consistency_score",
    "avg_repetition_score",
}


# ---- learning curves ----------------------------------------------------------------------------


def learning_curves(document: dict) -> list[dict[str, Any]]:
    """Return a curve for plots.draw_learning_curve for each run and each task scored up to 1.

    If the task has phenomena, `lines` has the accuracy of each: the mean over its subsets.
    """
    curves = []
    models = list(document["models"])
    paths = [record["path"] for record in document["models"].values()]
    for run in checkpoints_by_run(paths):
        if len(run.counts) == 1:
            continue
        results = [document["results"][models[index]] for index in run.indices]
        for task, config in document["configs"].items():
            task_results = [checkpoint[task] for checkpoint in results]
            metric = task_results[0]["metric"]
            if metric not in ON_UNIT_SCALE:
                continue

            # one line for each phenomenon
            phenomenon_of = config.get("phenomena", {})  # by subset
            lines = {}
            for phenomenon in sorted(set(phenomenon_of.values())):
                members = [name for name in phenomenon_of if phenomenon_of[name] == phenomenon]
                lines[phenomenon] = [
                    math.fsum(result["subsets"][name]["accuracy"] for name in members)
                    / len(members)
                    for result in task_results
                ]
            curves.append({
                "run": run.run,
                "task": task,
                "words": run.counts_words,
                "at": run.counts,
                "lines": lines,
                "mean": [result[metric] for result in task_results],
                "ci95": [result[f"{metric}_ci95"] for result in task_results],
                "chance": task_results[0].get("chance"),
            })  # fmt: skip

    # replace the directories of the runs by short names
    runs = sorted({curve["run"] for curve in curves})
    run_names = dict(zip(runs, short_names(runs), strict=True))
    return [{**curve, "run": run_names[curve["run"]]} for curve in curves]


# ---- pictures -----------------------------------------------------------------------------------


def pictures(document: dict) -> dict[str, list[tuple[str, str]]]:
    """Return {heading: [(title, source)]} of the panels of all runs, evaluations and curves."""
    # training and evaluation of each model, from the files in its directory
    groups = {}
    for model, record in document["models"].items():
        for heading, make_panels in (
            (f"Training of {model}", _training_panels),
            (f"Held-out text of {model}", _evaluation_panels),
        ):
            try:
                group = [plots.panel_for_page(draw) for draw in make_panels(record)]
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                folder = record["path"]
                log.warning("%s: not drawn; a file in %s is damaged or missing", heading, folder)
                continue
            if group:
                groups[heading] = group

    # learning curves, from the document
    for curve in learning_curves(document):
        draw = partial(plots.draw_learning_curve, curve=curve)
        height = 4 + len(curve["lines"]) / 10
        group = groups.setdefault(f"Learning curves of {curve['run']}", [])
        group.append(plots.panel_for_page(draw, height))
    return groups


def _training_panels(record: dict) -> list[plots.Panel]:
    scores = record.get("training")
    if not scores:
        return []
    lines = Path(record["path"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    floor_nats = None
    if scores["floor_bits_per_byte"]:
        nats_per_bit = scores["eval_loss"] / scores["eval_bits_per_byte"]
        floor_nats = scores["floor_bits_per_byte"] * nats_per_bit
    rows = list(map(json.loads, lines))
    if not any("loss" in row for row in rows):
        raise ValueError("the log has no loss")
    return plots.training_panels(rows, floor_nats)


def _evaluation_panels(record: dict) -> list[plots.Panel]:
    """Return the panels of what evaluate.py wrote; none if it measured other weights."""
    file = Path(record["path"], "evaluation_results.json")
    if not file.is_file():
        return []
    report = read_json(file)
    if report["config"]["weights_sha256"] != record["weights_sha256"]:
        return []
    return plots.evaluation_panels(report)
