"""Benchmark tasks: what is asked (a record, and a small decoder for each task) and what the answers are worth.

It reads task files and does arithmetic on scores that it is given; it knows no model and no tokenizer.

    from tasks import TASKS, read_items, score_items
    items = read_items("blimp", "data/blimp_filtered")
    texts = [prefix + completion for item in items for prefix, completion in item.candidates]
    score_items("blimp", items, scores)     # scores: the summed log-probability of each completion, in this order

A completion's score is the sum, not the mean, of log p over the tokens that end after the start of the completion; the
space before it belongs to it. Formats and averages are those of BabyLM's evaluation pipeline (2025 and 2026).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.evaluation.metrics import bootstrap_macro_mean, explained_percent, spearman, wilson

TIE_TOLERANCE = 1e-5  # nats; two sums that differ by less are equal as far as float32 can tell
CI95 = (2.5, 97.5)  # percentiles of a 95 % interval
SLOW_RESAMPLES = 400  # of the bootstrap of a statistic that is computed anew for each
MIN_DIFFERING = 6  # items that differ; with fewer not even all of one sign are significant (sign test: 2 x 0.5^5 = 0.06)
MISSING = {  # in the table of reading times: what pandas, with which BabyLM's pipeline reads it, takes for missing
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
READING_FIELDS = (
    "Subtlex_log10",
    "length",
    "context_length",
    "prev_length",
    *EYE_TRACKING,
    "self_paced_reading_time",
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question: candidates (prefix + completion each), the index of the right one, and the subset (UID)."""

    subset: str
    prefixes: tuple[str, ...]
    completions: tuple[str, ...]
    gold: int = 0
    facts: dict[str, float] = field(
        default_factory=dict
    )  # what people did: `ratio` (wug), reading times
    term: str = ""  # BLiMP's linguistics_term, the phenomenon that several subsets are of

    @property
    def candidates(self) -> Iterator[tuple[str, str]]:
        return zip(self.prefixes, self.completions, strict=True)

    def answer(self, choice: int) -> str:
        """The text that stands for a candidate: its completion, or the whole where the completions are the same."""
        prefix, completion = self.prefixes[choice], self.completions[choice]
        return completion if len(set(self.completions)) > 1 else prefix + completion


@dataclass(frozen=True)
class Task:
    """How to read a task's rows and what to make of the scores."""

    decode: Callable[
        [dict, str], Item | None
    ]  # (row, name of its file) -> Item, None for a row to leave out
    fields: tuple[str, ...]  # that every row has
    optional: tuple[str, ...] = ()
    metric: str = "accuracy"  # accuracy, spearman or eye_tracking_percent
    average: str = "macro"  # over subsets: macro (unweighted), micro (by item), splits (of cells, entity tracking)
    official: str = ""  # the name under which BabyLM's pipeline keeps its predictions


def _after(prefix: str, completion: str) -> str:
    """The completion with the space that parts it from its prefix."""
    if not isinstance(completion, str):
        raise TypeError(f"{completion!r} is not text; put it in quotes")
    bare = not prefix or prefix[-1].isspace() or completion[:1].isspace()
    return completion if bare else " " + completion


def _pair(row: dict, stem: str) -> Item:
    """Two whole sentences; BLiMP names the paradigm in the row, BabyLM's supplement by the file alone."""
    texts = (row["sentence_good"], row["sentence_bad"])
    return Item(row.get("UID", stem), ("", ""), texts, term=row.get("linguistics_term", ""))


def _ewok(row: dict, stem: str) -> Item:
    context = row["Context1"]
    return Item(row["Domain"], (context, context), (" " + row["Target1"], " " + row["Target2"]))


def _choices(value: Any, name: str) -> tuple[str, ...]:
    """Two or more texts; a text alone would fall apart into its letters."""
    if (
        not isinstance(value, list)
        or len(value) < 2
        or not all(isinstance(text, str) for text in value)
    ):
        raise ValueError(
            f"{name} {value!r} is not a list of two or more texts; a number or a word like true: put it in quotes"
        )
    return tuple(value)


def _entity_tracking(row: dict, stem: str) -> Item:
    options = _choices(row["options"], "options")
    return Item(f"{stem}_{row['numops']}_ops", (row["input_prefix"],) * len(options), options)


def _entity_tracking_filtered(row: dict, stem: str) -> Item | None:
    item = _entity_tracking(row, stem)
    return None if any("nothing" in option for option in item.completions) else item


def _comps(row: dict, stem: str) -> Item:
    subset = stem.removeprefix("comps_").replace("-", "_")
    phrase = " " + row["property_phrase"]
    return Item(subset, (row["prefix_acceptable"], row["prefix_unacceptable"]), (phrase, phrase))


def _wug(name: str) -> Callable[[dict, str], Item]:
    def decode(row: dict, stem: str) -> Item:
        (first, second), ratio = row["sentences"].split("\t"), float(row["ratio"])
        if not math.isfinite(ratio):
            raise ValueError(f"ratio {row['ratio']!r} is not a number")
        return Item(name, ("", ""), (first, second), facts={"ratio": ratio})

    return decode


def _reading(row: dict, stem: str) -> Item:
    """A word after its context and, for spill-over, the word before it after its own.

    A missing context is the word None: BabyLM's pipeline, whose reader takes that word for missing, puts it back so.
    """
    context = "None" if row["item"] in MISSING else row["item"]
    pairs = [(context, _after(context, row["word"]))]
    if not MISSING & {row["prev_item"], row["prev_word"]}:
        pairs.append((row["prev_item"], _after(row["prev_item"], row["prev_word"])))
    facts = {
        name: math.nan if row[name] in MISSING else float(row[name]) for name in READING_FIELDS
    }
    return Item("reading", *map(tuple, zip(*pairs, strict=True)), facts=facts)


def _multiple_choice(row: dict, stem: str) -> Item:
    prompt, choices = row["prompt"], _choices(row["choices"], "choices")
    if len(set(choices)) < len(choices):
        raise ValueError(f"choices {list(choices)} must all be different")
    if type(row["answer"]) is not int or not 0 <= row["answer"] < len(choices):
        raise ValueError(
            f"answer {row['answer']!r} is not the place of a choice, 0 to {len(choices) - 1}"
        )
    completions = tuple(_after(prompt, choice) for choice in choices)
    return Item(row.get("subset", stem), (prompt,) * len(choices), completions, row["answer"])


def _completion(row: dict, stem: str) -> Item:
    if not isinstance(row["wrong"], list):
        raise ValueError(f"wrong {row['wrong']!r} is not a list of texts")
    choices, subset = [row["answer"], *row["wrong"]], row.get("category", stem)
    return _multiple_choice(
        {"prompt": row["prompt"], "choices": choices, "answer": 0, "subset": subset}, stem
    )


_GOOD_BAD = ("sentence_good", "sentence_bad")
_ENTITY = {"fields": ("input_prefix", "options", "numops"), "average": "splits"}
_READING = ("item", "word", "prev_item", "prev_word", *READING_FIELDS)
_WUG = {"fields": ("sentences", "ratio"), "metric": "spearman"}
TASKS = {
    "blimp": Task(_pair, _GOOD_BAD, official="blimp"),
    "supplement": Task(lambda row, stem: _pair({**row, "UID": stem}, stem), _GOOD_BAD, official="blimp"),
    "ewok": Task(_ewok, ("Context1", "Target1", "Target2", "Domain"), official="ewok"),
    "entity_tracking": Task(_entity_tracking, **_ENTITY, official="entity_tracking"),
    "entity_tracking_filtered": Task(_entity_tracking_filtered, **_ENTITY, official="entity_tracking_filtered"),
    "comps": Task(_comps, ("prefix_acceptable", "prefix_unacceptable", "property_phrase"), official="comps"),
    "wug_adj": Task(_wug("wug_adj"), **_WUG, official="wug_adj"),
    "wug_past": Task(_wug("wug_past"), **_WUG, official="wug_past"),
    "reading": Task(_reading, _READING, metric="eye_tracking_percent", official="reading"),
    "minimal_pairs": Task(_pair, _GOOD_BAD, ("UID",)),
    "multiple_choice": Task(_multiple_choice, ("prompt", "choices", "answer"), ("subset",), average="micro"),
    "completion": Task(_completion, ("prompt", "answer", "wrong"), ("category",), average="micro"),
}  # fmt: skip


def read_items(task: str, path: str | Path) -> list[Item]:
    """The items of a task from a file, or from every .jsonl (reading: .csv) file of a folder, in the order of names."""
    path, ending = Path(path), ".csv" if task == "reading" else ".jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; {task} needs BabyLM's {ending} files"
        )
    files = (
        [path]
        if path.is_file()
        else sorted(path.glob(f"*{ending}")) or sorted(path.rglob(f"*{ending}"))
    )
    items = [
        item for file in files for item in decode_rows(task, _rows(file), str(file), file.stem)
    ]
    if not items:
        raise ValueError(
            f"{path}: no {task} items in it; expected {ending} rows with {', '.join(TASKS[task].fields)}"
        )
    return items


def _rows(path: Path) -> Iterator[Any]:
    kind, number = ("CSV" if path.suffix == ".csv" else "JSON"), 0

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(file, 1):  # noqa: B007  the errors below name it
            yield line

    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from (
                csv.DictReader(lines())
                if kind == "CSV"
                else map(json.loads, filter(str.strip, lines()))
            )
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: after line {number}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path}: line {number} is not {kind} ({error})") from None


def decode_rows(
    task: str, rows: Iterable[Any], source: str, stem: str, strict: bool = False
) -> list[Item]:
    """Items from rows (dicts); ValueError names the row and what it lacks. `strict` also refuses unknown fields."""
    spec, items = TASKS[task], []
    known = [*spec.fields, *spec.optional]
    for number, row in enumerate(rows, 1):
        where = f"{source}: item {number}"
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: {row!r} is not a record with the fields {', '.join(spec.fields)}"
            )
        if lacking := [name for name in spec.fields if name not in row]:
            raise ValueError(
                f"{where}: lacks {', '.join(lacking)}; it has {', '.join(map(str, row))}"
            )
        if strict and (odd := [name for name in row if name not in known]):
            raise ValueError(f"{where}: unknown field {odd[0]!r}; known: {', '.join(known)}")
        try:
            item = spec.decode(row, stem)
            texts = () if item is None else (item.subset, *item.prefixes, *item.completions)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"{next(t for t in texts if not isinstance(t, str))!r} is not text")
            "".join(texts).encode()  # a lone surrogate is no text
            if item and not all(item.completions):
                raise ValueError("a candidate is empty")
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from None
        if item:
            items.append(item)
    return items


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
