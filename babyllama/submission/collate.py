"""Build, check and score the one file that BabyLM's leaderboard takes.

    needed = requirements("strict-small")
    collated, problems = collate(Path("results/my-model"), Path("evaluation_data"), needed)
    check(read_json(Path("another_team.json")), needed)  # a line for each problem
    score(collated, Path("evaluation_data"))["overall_2026"]

The file holds the predictions of the final model, and the scores of every checkpoint on the fast
tasks. Predictions of a wrong size become null, and the leaderboard counts null as 0.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.evaluation import grading, metrics
from babyllama.evaluation.tasks import TASKS, Item, read_items
from babyllama.files import read_json
from babyllama.submission import official
from babyllama.submission.glue_tasks import GLUE_TASKS, read_examples, summarize
from babyllama.submission.official import OfficialTask, Requirements, Sizes

FAST = "fast_eval_results"
Part = tuple[float, float, float]  # a value and the ends of its interval


# ---- build --------------------------------------------------------------------------------------


def collate(
    results: Path, eval_data: Path, needed: Requirements
) -> tuple[dict[str, Any], list[str]]:
    """Return (content of the collated file, a line for each file that is missing or wrong).

    `results` is the folder results/MODEL of predictions, `eval_data` the folder evaluation_data.
    """
    problems: list[str] = []
    collated: dict[str, Any] = {}

    # the predictions of the final model on the full tasks
    for name, task in needed.zero_shot.items():
        content = _read(official.predictions_file(results, name), problems)
        wrong = _zero_shot_problems(name, task, content, fast=False) if content else []
        problems += wrong
        collated[task.key] = None if wrong else content

    # the age of acquisition
    acquisition = official.acquisition_folder(results)
    surprisals = _read(acquisition / "surprisal.json", problems)
    wrong = _surprisal_problems(surprisals, needed) if surprisals else []
    problems += wrong
    collated["aoa_surprisals"] = None if wrong else surprisals
    collated["aoa"] = _read(acquisition / "aoa_score.json", problems)

    # the predictions of the fine-tuned models
    collated["glue"] = {}
    for name, size in needed.glue_sizes.items():
        content = _read(official.glue_file(results, name), problems)
        wrong = _glue_problems(content, {name: size}) if content else []
        problems += wrong
        if content and not wrong:
            collated["glue"] |= content

    # the scores of each checkpoint on the fast tasks, in the order of the checkpoints
    collated[FAST] = {task.key: [] for task in needed.zero_shot.values() if task.fast}
    absent = [name for name in needed.checkpoints if not (results / name).is_dir()]
    problems += _missing("predictions of checkpoints", absent)
    for checkpoint in needed.checkpoints:
        for name, task in needed.zero_shot.items():
            if task.fast is None:
                continue
            content = None
            if checkpoint not in absent:
                content = _read(official.predictions_file(results, name, checkpoint), problems)
            wrong = _zero_shot_problems(name, task, content, fast=True) if content else []
            problems += [f"{checkpoint}: {line}" for line in wrong]
            scores = None
            if content and not wrong:
                items = read_task(name, eval_data / "fast_eval" / task.fast)
                scores = fast_scores(name, content, items)
            collated[FAST][task.key].append(scores)
    return collated, problems


def _read(path: Path, problems: list[str]) -> Any:
    """Return the content of a JSON file; if there is none, add a line to `problems`."""
    try:
        return read_json(path)
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except ValueError as error:
        problems.append(str(error))
    return None


read_task = functools.cache(read_items)  # once for all checkpoints


def fast_scores(name: str, predictions: dict, items: Sequence[Item]) -> dict[str, float]:
    """Return the scores of a checkpoint on a fast task, as fractions by subset.

    GlobalPIQA has one score. Reading has `spr` (self-paced reading) and `rt` (eye tracking), the
    explained variances.
    """
    scores = candidate_scores(name, predictions, items)
    if TASKS[name].metric != "accuracy":
        eyes, pace = grading.figures(name, items, scores)
        return {"spr": pace / 100, "rt": eyes / 100}
    result = grading.score_items(name, items, scores)
    if any(item.key for item in items):
        return {name: result["accuracy"]}
    subsets = result["subsets"]
    return {subset: subsets[subset]["accuracy"] for subset in predictions}


def candidate_scores(name: str, predictions: dict, items: Sequence[Item]) -> np.ndarray:
    """Return scores of all candidates that express predictions: 1 for the chosen one, else 0.

    A prediction that is not a candidate counts as a wrong one. Reading times have no candidates;
    their scores are the negative surprisals.
    """
    rows = {key: iter(value["predictions"]) for key, value in predictions.items()}
    scores: list[float] = []
    for item in items:
        try:
            row = next(rows[item.key or item.subset])
        except (KeyError, StopIteration):
            subset = item.key or item.subset
            raise ValueError(f"{name}: fewer predictions of {subset} than items") from None
        if TASKS[name].metric != "accuracy":
            surprisals = [row["pred"], row["prev_pred"]][: len(item.completions)]
            scores += [-surprisal for surprisal in surprisals]
            continue
        texts = [item.answer(index).strip() for index in range(len(item.completions))]
        answer = str(row["pred"]).strip()
        wrong = (item.gold + 1) % len(texts)
        chosen = item.gold if answer == texts[item.gold] else wrong
        scores += [float(index == chosen) for index in range(len(texts))]
    return np.array(scores)


# ---- check --------------------------------------------------------------------------------------


def track_of(collated: Any) -> str:
    """Return the track of a collated file, by its number of checkpoints."""
    fast = collated.get(FAST) if isinstance(collated, dict) else None
    lists = [value for value in fast.values() if isinstance(value, list)] if fast else []
    longest = max(map(len, lists), default=0)
    small = len(official.checkpoint_names("strict-small"))
    return "strict" if longest > small else "strict-small"


def check(collated: Any, needed: Requirements) -> list[str]:
    """Return a line for each problem of a collated file: sizes, ids, types, NaN, checkpoints."""
    if not isinstance(collated, dict):
        return ["the file does not hold a JSON object"]
    known = [task.key for task in needed.zero_shot.values()]
    known += ["aoa_surprisals", "aoa", "glue", FAST]
    problems = [f"{key}: unknown key" for key in collated if key not in known]

    # the final model on the full tasks
    for name, task in needed.zero_shot.items():
        content = collated.get(task.key)
        if content is None:
            problems.append(f"{task.key}: no predictions; the leaderboard counts 0")
        else:
            problems += _zero_shot_problems(name, task, content, fast=False)

    # the age of acquisition, fine-tuning and the checkpoints
    if collated.get("aoa_surprisals") is None:
        problems.append("aoa_surprisals: none; the leaderboard counts 0")
    else:
        problems += _surprisal_problems(collated["aoa_surprisals"], needed)
    aoa = collated.get("aoa")
    if not isinstance(aoa, dict) or not _is_number(aoa.get("aoa")) or abs(aoa["aoa"]) > 1:
        problems.append(f'aoa: {_short(aoa)} is not {{"aoa": a correlation from -1 to 1}}')
    problems += _glue_problems(collated.get("glue"), needed.glue_sizes)
    problems += _fast_problems(collated.get(FAST), needed)
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _row_problems(
    label: str, content: Any, size: int, prefix: str | None, is_valid, expected: str
) -> Iterator[str]:
    """Yield the problems of one list of predictions; of many equal ones the first.

    The ids are PREFIX_0, PREFIX_1 and so on, or without a prefix just the numbers.
    """
    rows = content.get("predictions") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        yield f'{label}: {_short(content)} is not {{"predictions": [...]}}'
        return
    if len(rows) != size:
        yield f"{label}: {len(rows):,} predictions, expected {size:,}"
    wrong_ids = []
    wrong_values = []
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        expected_id = number if prefix is None else f"{prefix}_{number}"
        if row.get("id") != expected_id:
            wrong_ids.append(f"{_short(row.get('id'))}, expected {expected_id!r}")
        if not is_valid(row):
            wrong_values.append(f"prediction {number} is {_short(row.get('pred'))}")
    for wrong in (wrong_ids, wrong_values):
        if wrong:
            more = f" ({len(wrong):,} such rows)" if len(wrong) > 1 else ""
            what = f"id {wrong[0]}" if wrong is wrong_ids else f"{wrong[0]}, expected {expected}"
            yield f"{label}: {what}{more}"


def _subset_problems(label: str, names: Iterable[str], expected: Collection[str]) -> Iterator[str]:
    names = set(names)
    yield from _missing(label, [name for name in expected if name not in names])
    for name in sorted(names.difference(expected)):
        yield f"{label}: {name} is not a subset of this task"


def _missing(label: str, names: Sequence[str]) -> Iterator[str]:
    """Yield one line that names what is missing, if anything is."""
    if names:
        verb = "is" if len(names) == 1 else "are"
        yield f"{label}: {', '.join(names)} {verb} missing"


def _zero_shot_problems(name: str, task: OfficialTask, content: Any, fast: bool) -> list[str]:
    if not isinstance(content, dict):
        return [f"{task.key}: {_short(content)} is not an object of subsets"]
    problems = []
    expected: Sizes = task.fast_sizes if fast else task.sizes
    if task.n_items is not None:  # every item is a subset
        if len(content) != task.n_items:
            problems.append(f"{task.key}: {len(content):,} examples, expected {task.n_items:,}")
        sizes = dict.fromkeys(content, 1)
    else:
        # BLiMP's own names have capitals, as in complex_NP_island; the sizes' names have none
        problems += _subset_problems(task.key, map(str.lower, content), expected)
        sizes = {name: expected[name.lower()] for name in content if name.lower() in expected}
    is_reading = TASKS[name].metric != "accuracy"
    is_valid = _is_reading_row if is_reading else _is_text_row
    expected_row = "numbers under pred and prev_pred" if is_reading else "a text"
    for subset, size in sizes.items():
        label = task.key if is_reading else f"{task.key} {subset}"
        prefix = None if is_reading else subset
        problems += _row_problems(label, content[subset], size, prefix, is_valid, expected_row)
    return problems


def _is_text_row(row: dict) -> bool:
    return isinstance(row.get("pred"), str) and bool(row["pred"].strip())


def _is_reading_row(row: dict) -> bool:
    before = row.get("prev_pred")
    return _is_number(row.get("pred")) and (before is None or _is_number(before))


def _glue_problems(content: Any, sizes: Sizes) -> list[str]:
    if not isinstance(content, dict):
        return [f"glue: {_short(content)} is not an object of tasks"]
    problems = [*_subset_problems("glue", content, sizes)]
    for name in sizes.keys() & content.keys():
        labels = range(GLUE_TASKS[name].labels)
        is_valid = functools.partial(_is_label_row, labels)
        expected = f"a label from 0 to {labels[-1]}"
        problems += _row_problems(
            f"glue {name}", content[name], sizes[name], name, is_valid, expected
        )
    return problems


def _is_label_row(labels: range, row: dict) -> bool:
    return type(row.get("pred")) is int and row["pred"] in labels


def _surprisal_problems(content: Any, needed: Requirements) -> list[str]:
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return ["aoa_surprisals: expected an object with a list of rows under results"]
    # what each checkpoint was asked, and how many answers are not numbers
    problems = []
    questions = defaultdict(list)
    invalid = Counter()
    for row in rows:
        step = str(row.get("step"))
        questions[step].append((row.get("target_word"), row.get("context_id")))
        invalid[step] += not _is_number(row.get("surprisal"))

    problems += _subset_problems("aoa_surprisals", questions, needed.checkpoints)
    for step in needed.checkpoints:
        asked = questions.get(step, [])
        if not asked:
            continue
        if len(asked) != needed.aoa_size:
            problems.append(
                f"aoa_surprisals {step}: {len(asked):,} rows, expected {needed.aoa_size:,}"
            )
        if len(set(asked)) < len(asked):
            problems.append(f"aoa_surprisals {step}: a word has the same context twice")
        if invalid[step]:
            problems.append(f"aoa_surprisals {step}: {invalid[step]:,} surprisals are not numbers")
    return problems


def _fast_problems(content: Any, needed: Requirements) -> list[str]:
    if not isinstance(content, dict):
        return [f"{FAST}: {_short(content)} is not an object of tasks"]
    problems = []
    tasks = {task.key: (name, task) for name, task in needed.zero_shot.items() if task.fast}
    problems += _subset_problems(FAST, content, tasks)
    for key, (name, task) in tasks.items():
        if key not in content:
            continue
        label = f"{FAST} {key}"
        scores = content[key]
        n = len(needed.checkpoints)
        if not isinstance(scores, list) or len(scores) != n:
            problems.append(f"{label}: expected a list of {n} checkpoints")
            continue

        # each checkpoint has a score for each subset, or None
        subsets = set(task.fast_sizes or {name})
        if TASKS[name].metric != "accuracy":
            subsets = {"spr", "rt"}
        by_checkpoint = dict(zip(needed.checkpoints, scores, strict=True))
        problems += _missing(label, [name for name, row in by_checkpoint.items() if row is None])
        for checkpoint, row in by_checkpoint.items():
            if row is None:
                continue
            if not isinstance(row, dict) or {subset.lower() for subset in row} != subsets:
                problems.append(f"{label}: {checkpoint} does not have the subsets of this task")
            elif not all(_is_number(value) and value <= 1 for value in row.values()):
                problems.append(f"{label}: {checkpoint} has a score that is not a number up to 1")
    return problems


# ---- score --------------------------------------------------------------------------------------


def score(
    collated: dict[str, Any], eval_data: Path, acquisition: dict | None = None
) -> dict[str, Any]:
    """Return the nine columns of the leaderboard, in percent, and their mean.

    `columns` holds `percent` and `ci95` of each; missing ones are None, count 0 in `overall_2026`
    and are listed under `missing`. `results` has the details of each task. The interval of a mean
    treats its parts as independent. `acquisition` is the result of acquisition_score: without it
    the column aoa has no interval.
    """
    parts: dict[str, list[Part]] = defaultdict(list)  # of each column
    results: dict[str, Any] = {}

    # score the zero-shot tasks
    for name, task in official.ZERO_SHOT.items():
        data = eval_data / "full_eval" / task.full
        if not collated.get(task.key) or not data.exists():
            continue
        items = read_task(name, data)
        scores = candidate_scores(name, collated[task.key], items)
        results[name] = grading.score_items(name, items, scores)
        for figure in grading.FIGURES.get(TASKS[name].metric, ("accuracy",)):
            scale = 100 if figure == "accuracy" else 1
            value = results[name][figure]
            ends = results[name][f"{figure}_ci95"]
            parts[TASKS[name].column].append(tuple(scale * number for number in (value, *ends)))

    # score the fine-tuning tasks
    glue = collated.get("glue") or {}
    for name in official.GLUE_SIZES:
        labels_file = eval_data / "full_eval" / official.GLUE_DATA / f"{name}.valid.jsonl"
        if name not in glue or not labels_file.exists():
            continue
        labels = np.array([label for _, label in read_examples(labels_file, name)])
        predicted = np.array([row["pred"] for row in glue[name]["predictions"]])
        if len(predicted) != len(labels):
            raise ValueError(f"{labels_file}: {len(labels)} labels, {len(predicted)} predictions")
        results[name] = summarize(labels, predicted, GLUE_TASKS[name], seed=0)
        figures = (results[name]["score"], *results[name]["score_ci95"])
        parts["glue"].append(tuple(100 * figure for figure in figures))

    # average the parts of each column
    if parts["glue"]:  # F1 for MRPC and QQP, accuracy for the others; a missing task counts 0
        parts["glue"] += [(0.0, 0.0, 0.0)] * (len(official.GLUE_SIZES) - len(parts["glue"]))
    columns = {name: _mean(column_parts) for name, column_parts in parts.items() if column_parts}
    if collated.get("aoa"):
        value = 100 * collated["aoa"]["aoa"]
        columns["aoa"] = (value, *_correlation_interval(acquisition))

    overall = grading.overall_2026({name: part[0] for name, part in columns.items()})
    return {
        "overall_2026": overall["overall_2026"],
        "columns": {
            name: {"percent": columns[name][0], "ci95": list(columns[name][1:]) or None}
            if name in columns
            else None
            for name in grading.COLUMNS_2026
        },
        "missing": overall["missing"],
        "results": results,
    }


def _mean(parts: Sequence[Part]) -> Part:
    """Return the mean of independent values and its interval (MOVER, Zou and Donner 2008)."""
    n = len(parts)
    value = math.fsum(part[0] for part in parts) / n
    below = math.hypot(*(part[0] - part[1] for part in parts)) / n
    above = math.hypot(*(part[2] - part[0] for part in parts)) / n
    return value, value - below, value + above


def _correlation_interval(acquisition: dict | None) -> list[float]:
    """Return the 95% interval, in percent, of a correlation by Fisher's transformation."""
    if not acquisition or acquisition["r"] is None or acquisition["n_words"] < 4:
        return []
    middle = math.atanh(min(max(acquisition["r"], -0.999999), 0.999999))
    margin = metrics.Z95 / math.sqrt(acquisition["n_words"] - 3)
    return [100 * math.tanh(middle - margin), 100 * math.tanh(middle + margin)]
