"""Present a submission as one page.

It has the nine columns of the leaderboard beside published ones, and learning curves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from babyllama.evaluation import grading
from babyllama.evaluation.pictures import pictures
from babyllama.evaluation.report import render
from babyllama.evaluation.tasks import TASKS
from babyllama.files import read_json
from babyllama.submission import official
from babyllama.submission.collate import candidate_scores, read_task
from babyllama.submission.official import Requirements

TEMPLATE = Path(__file__).with_suffix(".html.j2")


def fast_document(results: Path, eval_data: Path, needed: Requirements) -> dict[str, Any]:
    """Return the checkpoints' results on the fast tasks, in the shape of pictures.learning_curves.

    A task that some checkpoint lacks is not in it.
    """
    # score the tasks for which every checkpoint has predictions
    by_task: dict[str, dict[str, Any]] = {}
    checkpoints = [name for name in needed.checkpoints if (results / name).is_dir()]
    for task, spec in needed.zero_shot.items():
        if spec.fast is None or TASKS[task].metric != "accuracy":
            continue
        files = [official.predictions_file(results, task, name) for name in checkpoints]
        if not files or not all(file.is_file() for file in files):
            continue
        items = read_task(task, eval_data / "fast_eval" / spec.fast)
        by_task[task] = {}
        for name, file in zip(checkpoints, files, strict=True):
            predictions = read_json(file)
            scores = candidate_scores(task, predictions, items)
            by_task[task][name] = grading.score_items(task, items, scores)

    if not by_task:
        checkpoints = []
    return {
        "configs": {task: {"type": task} for task in by_task},
        "models": {name: {"path": f"{results.name}/{name}"} for name in checkpoints},
        "results": {
            name: {task: rows[name] for task, rows in by_task.items()} for name in checkpoints
        },
    }


def page(model: str, scores: dict[str, Any], problems: list[str], document: dict) -> str:
    """Return the page; `scores` is the content of scores.json."""
    return render(
        TEMPLATE,
        model=model,
        scores=scores,
        problems=problems,
        published=official.PUBLISHED[scores["track"]],
        pictures=pictures(document),
    )
