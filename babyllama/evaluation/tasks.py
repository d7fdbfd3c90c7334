"""Read the items of benchmark tasks.

    from babyllama.evaluation.tasks import read_items
    items = read_items("blimp", "data/blimp_filtered")
    for prefix, completion in items[0].candidates:
        print(prefix + completion)

An item has two or more candidates, of which one is right. Each task has a small decoder that turns
a row of its file into an item. The formats are those of BabyLM's evaluation pipeline of July 2026;
tasks that BabyLM asked only in 2025 have no `column`. Grading is the job of grading.py.

Unless the task says otherwise, the score of a candidate is the sum of log p over the tokens that
end after the start of the completion.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# BabyLM's pipeline reads the reading times with pandas, which takes these for missing values.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
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
# The commands that download BabyLM's data, by the first word of the task. They run in the folder
# strict/ of github.com/babylm-org/babylm-eval.
DOWNLOADS = {
    "ewok": "python -m evaluation_pipeline.ewok.dl_and_filter",
    "global": "python evaluation_pipeline/global_piqa/dl.py",
}
DOWNLOAD = "python -m scripts.download_evals"  # of the other tasks, and ewok_fast.zip


@dataclass(frozen=True, slots=True)
class Item:
    """One question: two or more candidates, each with a prefix and a completion."""

    subset: str  # the group whose accuracy is reported separately (BabyLM calls it UID)
    prefixes: tuple[str, ...]
    completions: tuple[str, ...]
    gold: int = 0  # index of the right candidate
    human_data: dict[str, float] = field(default_factory=dict)  # `ratio`, reading times
    phenomenon: str = ""  # BLiMP's linguistics_term; several subsets share one
    key: str = ""  # the item's key in predictions.json, if it is not the subset

    @property
    def candidates(self) -> Iterator[tuple[str, str]]:
        """Iterate over (prefix, completion)."""
        return zip(self.prefixes, self.completions, strict=True)

    def answer(self, choice: int) -> str:
        """Return a candidate's completion, or its full text if all completions are the same."""
        completion = self.completions[choice]
        if len(set(self.completions)) > 1:
            return completion
        return self.prefixes[choice] + completion


@dataclass(frozen=True)
class Task:
    """Describe how the rows of a task are read and how its items are summarized."""

    decode: Callable[[dict, str], Item | None]  # (row, stem of its file); None skips the row
    fields: tuple[str, ...]  # required in every row
    optional: tuple[str, ...] = ()
    metric: str = "accuracy"  # or spearman, or eye_tracking_percent
    average: str = (
        "macro"  # equal weights for all subsets; "micro": all items; "splits": all splits
    )
    scoring: str = "sum"  # of log p; "mean" of log p; "word": see candidates.py
    official: str = ""  # the task's directory in BabyLM's predictions
    column: str = ""  # the column of BabyLM's leaderboard of 2026 that the task belongs to


# ---- decoders -----------------------------------------------------------------------------------


def _after(prefix: str, completion: str) -> str:
    """Return the completion with the space that separates it from its prefix."""
    if not isinstance(completion, str):
        raise TypeError(f"{completion!r} is not text; put it in quotes")
    is_separated = not prefix or prefix[-1].isspace() or completion[:1].isspace()
    return completion if is_separated else " " + completion


def _check_choices(value: Any, name: str) -> tuple[str, ...]:
    is_list = isinstance(value, list) and len(value) >= 2
    if not is_list or not all(isinstance(text, str) for text in value):
        raise ValueError(
            f"{name} {value!r} is not a list of two or more texts; "
            "put numbers and words like true in quotes"
        )
    return tuple(value)


def _pair(row: dict, stem: str) -> Item:
    sentences = (row["sentence_good"], row["sentence_bad"])
    phenomenon = row.get("linguistics_term", "")
    return Item(row.get("UID", stem), ("", ""), sentences, phenomenon=phenomenon)


def _supplement(row: dict, stem: str) -> Item:
    return _pair({**row, "UID": stem}, stem)  # the name of the file is the subset


def _ewok(row: dict, stem: str) -> Item:
    completion = " " + row["Target1"]
    contexts = (row["Context1"], row["Context2"])
    return Item(row["Domain"], contexts, (completion, completion))


def _ewok_2025(row: dict, stem: str) -> Item:
    context = row["Context1"]
    completions = (" " + row["Target1"], " " + row["Target2"])
    return Item(row["Domain"], (context, context), completions)


def _entity_tracking_2025(row: dict, stem: str) -> Item:
    options = _check_choices(row["options"], "options")
    subset = f"{stem}_{row['numops']}_ops"
    return Item(subset, (row["input_prefix"],) * len(options), options)


def _entity_tracking(row: dict, stem: str) -> Item | None:
    item = _entity_tracking_2025(row, stem)
    return None if any("nothing" in option for option in item.completions) else item


def _comps(row: dict, stem: str) -> Item:
    """Return a property phrase after two prefixes; the space between them is not scored."""
    subset = stem.removeprefix("comps_").replace("-", "_")
    phrase = row["property_phrase"]
    prefixes = (row["prefix_acceptable"] + " ", row["prefix_unacceptable"] + " ")
    return Item(subset, prefixes, (phrase, phrase))


def _global_piqa(solutions: int) -> Callable[[dict, str], Item]:
    def decode(row: dict, stem: str) -> Item:
        completions = tuple(" " + row[f"solution{i}"] for i in range(solutions))
        label = row["label"]
        if type(label) is not int or not 0 <= label < solutions:
            raise ValueError(f"label {label!r} must be the index of a solution")
        key = str(row["example_id"])
        return Item(stem, (row["prompt"],) * solutions, completions, label, key=key)

    return decode


def _wug(name: str) -> Callable[[dict, str], Item]:
    def decode(row: dict, stem: str) -> Item:
        first, second = row["sentences"].split("\t")
        ratio = float(row["ratio"])
        if not math.isfinite(ratio):
            raise ValueError(f"ratio {row['ratio']!r} is not a number")
        return Item(name, ("", ""), (first, second), human_data={"ratio": ratio})

    return decode


def _reading(row: dict, stem: str) -> Item:
    """Return a word in its context, followed by the previous word in its context.

    Readers spend time on the previous word while they see the next one (spill-over). A context that
    pandas reads as missing is the word "None", which BabyLM's pipeline restores.
    """
    prefixes = ["None" if row["item"] in MISSING else row["item"]]
    completions = [row["word"]]
    if row["prev_item"] not in MISSING and row["prev_word"] not in MISSING:
        prefixes.append(row["prev_item"])
        completions.append(row["prev_word"])
    human_data = {
        name: math.nan if row[name] in MISSING else float(row[name]) for name in READING_FIELDS
    }
    return Item("reading", tuple(prefixes), tuple(completions), human_data=human_data)


def _reading_with_space(row: dict, stem: str) -> Item:
    item = _reading(row, stem)
    return replace(item, completions=tuple(_after(*candidate) for candidate in item.candidates))


def _multiple_choice(row: dict, stem: str) -> Item:
    prompt = row["prompt"]
    choices = _check_choices(row["choices"], "choices")
    answer = row["answer"]
    if len(set(choices)) < len(choices):
        raise ValueError(f"choices {list(choices)} must all be different")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"answer {answer!r} must be the index of a choice, 0 to {len(choices) - 1}"
        )
    completions = tuple(_after(prompt, choice) for choice in choices)
    return Item(row.get("subset", stem), (prompt,) * len(choices), completions, answer)


def _completion(row: dict, stem: str) -> Item:
    if not isinstance(row["wrong"], list):
        raise ValueError(f"wrong {row['wrong']!r} is not a list of texts")
    choices = [row["answer"], *row["wrong"]]
    subset = row.get("category", stem)
    choice_row = {"prompt": row["prompt"], "choices": choices, "answer": 0, "subset": subset}
    return _multiple_choice(choice_row, stem)


_PAIR = ("sentence_good", "sentence_bad")
_EWOK = ("Context1", "Context2", "Target1", "Domain")
_EWOK_2025 = ("Context1", "Target1", "Target2", "Domain")
_ENTITIES = ("input_prefix", "options", "numops")
_COMPS = ("prefix_acceptable", "prefix_unacceptable", "property_phrase")
_GLOBAL_PIQA = ("example_id", "prompt", "solution0", "solution1", "label")
_WUG = ("sentences", "ratio")
_READING = ("item", "word", "prev_item", "prev_word", *READING_FIELDS)
_CHOICE = ("prompt", "choices", "answer")
_COMPLETION = ("prompt", "answer", "wrong")
TASKS = {
    # BabyLM's zero-shot tasks of 2026
    "blimp": Task(_pair, _PAIR, official="blimp", column="blimp"),
    "supplement": Task(_supplement, _PAIR, official="blimp", column="supplement"),
    "ewok": Task(_ewok, _EWOK, official="ewok", column="ewok"),
    "entity_tracking": Task(
        _entity_tracking,
        _ENTITIES,
        average="splits",
        official="entity_tracking",
        column="entity_tracking",
    ),
    "comps": Task(_comps, _COMPS, official="comps", column="comps"),
    "global_piqa_parallel": Task(
        _global_piqa(4),
        (*_GLOBAL_PIQA, "solution2", "solution3"),
        scoring="mean",
        official="global_piqa_parallel",
        column="global_piqa",
    ),
    "global_piqa_nonparallel": Task(
        _global_piqa(2),
        _GLOBAL_PIQA,
        scoring="mean",
        official="global_piqa_nonparallel",
        column="global_piqa",
    ),
    "reading": Task(
        _reading,
        _READING,
        metric="eye_tracking_percent",
        scoring="word",
        official="reading",
        column="reading",
    ),
    # the same words with the space before them, as text has it: no task of BabyLM
    "reading_with_space": Task(_reading_with_space, _READING, metric="eye_tracking_percent"),
    # BabyLM's tasks of 2025 that 2026 replaced or dropped
    "ewok_2025": Task(_ewok_2025, _EWOK_2025, official="ewok_2025"),
    "entity_tracking_2025": Task(
        _entity_tracking_2025, _ENTITIES, average="splits", official="entity_tracking_2025"
    ),
    "wug_adj": Task(_wug("wug_adj"), _WUG, metric="spearman", official="wug_adj"),
    "wug_past": Task(_wug("wug_past"), _WUG, metric="spearman", official="wug_past"),
    # any other test
    "minimal_pairs": Task(_pair, _PAIR, ("UID",)),
    "multiple_choice": Task(_multiple_choice, _CHOICE, ("subset",), average="micro"),
    "completion": Task(_completion, _COMPLETION, ("category",), average="micro"),
}


# ---- files --------------------------------------------------------------------------------------


def read_items(task: str, path: str | Path) -> list[Item]:
    """Read the items of a task from a file, or from a directory of .jsonl (reading: .csv) files.

    Files are read in the order of their names. Subdirectories are only searched if the directory
    has no such file.
    """
    path = Path(path)
    suffix = ".csv" if TASKS[task].fields == _READING else ".jsonl"
    if not path.exists():
        command = download_command(task)
        source = f"; `{command}` in babylm-eval/strict downloads them" if command else ""
        raise FileNotFoundError(f"{path} does not exist; {task} needs {suffix} files{source}")
    if path.is_file():
        files = [path]
    else:
        files = sorted(path.glob(f"*{suffix}")) or sorted(path.rglob(f"*{suffix}"))

    items = []
    for file in files:
        items += decode_rows(task, read_rows(file), str(file), file.stem)
    if not items:
        fields = ", ".join(TASKS[task].fields)
        raise ValueError(f"{path} holds no {task} items; expected {suffix} rows with {fields}")
    return items


def download_command(task: str) -> str | None:
    """Return the command of BabyLM's pipeline that downloads the data of a task."""
    if not TASKS[task].official and TASKS[task].fields != _READING:
        return None
    return DOWNLOADS.get(task.split("_")[0], DOWNLOAD)


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a .csv or .jsonl file; ValueError names a line that is malformed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            return list(reader)
        except csv.Error as error:
            number = reader.line_num + 1  # line_num counts the lines read so far
            raise ValueError(f"{path}: line {number} is not CSV ({error})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def decode_rows(
    task: str, rows: Iterable[Any], source: str, stem: str, strict: bool = False
) -> list[Item]:
    """Return the items of rows (dicts); ValueError names the row and what is wrong with it.

    With `strict`, unknown fields are an error too.
    """
    spec = TASKS[task]
    items = []
    for number, row in enumerate(rows, 1):
        try:
            _check_fields(spec, row, strict)
            item = spec.decode(row, stem)
            if item is not None:
                _check_texts(item)
                items.append(item)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source}: item {number}: {error}") from None
    return items


def _check_fields(spec: Task, row: Any, strict: bool) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is not a record with the fields {', '.join(spec.fields)}")
    missing = [name for name in spec.fields if name not in row]
    if missing:
        fields = ", ".join(map(str, row))
        raise ValueError(f"missing fields: {', '.join(missing)}; the item has: {fields}")
    allowed = [*spec.fields, *spec.optional]
    unknown = [name for name in row if name not in allowed]
    if strict and unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(allowed)}")


def _check_texts(item: Item) -> None:
    for text in (item.subset, *item.prefixes, *item.completions):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not text")
        text.encode()  # raises a ValueError for a lone surrogate
    if not all(item.completions):
        raise ValueError("a candidate is empty")
