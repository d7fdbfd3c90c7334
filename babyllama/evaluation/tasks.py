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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
