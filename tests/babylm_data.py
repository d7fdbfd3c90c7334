"""Write evaluation data in the formats of BabyLM 2026, made of given sentences."""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from babyllama.evaluation.tasks import READING_FIELDS
from babyllama.submission.official import Requirements, requirements

EEG_FIELDS = ("ELAN", "LAN", "N400", "P600", "EPNP", "PNP")  # of reading times; we ignore them
GLUE_FIELDS = {
    "boolq": ("question", "passage"),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "multirc": ("paragraph", "question", "answer"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "wsc": ("text", "span1_text", "span2_text"),
}


def tiny_requirements(checkpoints: list[str]) -> Requirements:
    """Return requirements with few subsets of few items."""
    full = requirements("strict-small")
    tasks = {}
    for name, task in full.zero_shot.items():
        n_items = task.n_items and 5
        sizes = dict.fromkeys(list(task.sizes)[:7], 4)  # complex_np_island is the seventh
        fast_sizes = {subset: 3 for subset in sizes if subset in (task.fast_sizes or ())}
        if name == "reading":
            sizes = fast_sizes = {"reading": 150}
        if name == "entity_tracking":
            sizes = dict.fromkeys(task.sizes, 4)
            fast_sizes = dict.fromkeys(task.fast_sizes, 3)
        tasks[name] = replace(task, sizes=sizes, fast_sizes=fast_sizes, n_items=n_items)
    glue_sizes = dict.fromkeys(("mnli", "mrpc", "rte"), 6)
    return Requirements(checkpoints, tasks, glue_sizes, aoa_size=12)


def write_data(folder: Path, needed: Requirements, sentences: list[str], seed: int = 0) -> None:
    """Write evaluation_data with as many items as `needed` says; wrong candidates are shuffled."""
    rng = random.Random(seed)
    texts = cycle(sentences)
    for part in ("full_eval", "fast_eval"):
        for name, task in needed.zero_shot.items():
            sizes = task.sizes if part == "full_eval" else task.fast_sizes
            source = task.full if part == "full_eval" else task.fast
            if source is None:
                continue
            path = folder / part / source
            if name == "reading":
                _write_reading(path, sizes["reading"], texts, rng)
                continue
            for stem, rows in _files(name, sizes, task.n_items, texts, rng):
                _write_rows(path / f"{stem}.jsonl", rows)

    full = folder / "full_eval"
    for name, size in needed.glue_sizes.items():
        for split, n in (("train", size + 30), ("valid", size)):
            rows = []
            for i in range(n):
                label = rng.randrange(3 if name == "mnli" else 2)
                rows.append(
                    {f: next(texts) for f in GLUE_FIELDS[name]} | {"label": label, "idx": i}
                )
            _write_rows(full / "glue_filtered" / f"{name}.{split}.jsonl", rows)
    _write_acquisition(full / "aoa", needed.aoa_size, texts, rng)


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    while len(words) > 1 and " ".join(words) == text:
        rng.shuffle(words)
    return " ".join(words)


def _files(
    name: str, sizes, n_items, texts: Iterator[str], rng
) -> Iterator[tuple[str, list[dict]]]:
    if name in ("blimp", "supplement"):
        for subset, n in sizes.items():
            # BLiMP's own spelling
            subset = subset.replace("_np_", "_NP_").replace("principle_a_", "principle_A_")
            rows = []
            for _ in range(n):
                good = next(texts)
                row = {"sentence_good": good, "sentence_bad": _shuffled(good, rng), "UID": subset}
                rows.append(row | {"linguistics_term": subset.split("_")[0], "field": "syntax"})
            yield subset, rows
    elif name == "ewok":
        for subset, n in sizes.items():
            keys = ("Context1", "Context2", "Target1", "Target2")
            keys += ("ContextType", "ContextDiff", "TargetDiff")
            rows = [{key: next(texts) for key in keys} | {"Domain": subset} for _ in range(n)]
            yield subset, rows
    elif name == "entity_tracking":
        splits = {subset[: -len("_0_ops")] for subset in sizes}
        for split in sorted(splits):
            rows = []
            for operations in range(6):
                for i in range(sizes[f"{split}_{operations}_ops"] + 2):  # two are ignored
                    options = [" " + next(texts) for _ in range(5)]
                    if i < 2:
                        options[3] = " nothing"
                    row = {"input_prefix": next(texts), "options": options, "numops": operations}
                    rows.append(row)
            yield split, rows
    elif name == "comps":
        for subset, n in sizes.items():
            stem = subset.replace("dist_before", "dist-before")
            stem = stem.replace("dist_in_between", "dist-in-between")
            keys = ("prefix_acceptable", "prefix_unacceptable", "property_phrase")
            yield f"comps_{stem}", [{key: next(texts) for key in keys} for _ in range(n)]
    else:
        k = 4 if name == "global_piqa_parallel" else 2
        rows = []
        for i in range(n_items):
            solutions = {f"solution{j}": next(texts) for j in range(k)}
            row = {"prompt": next(texts), **solutions, "label": rng.randrange(k)}
            rows.append(row | {"example_id": f"eng_{i}", "language": "eng_latn"})
        yield "eng_latn", rows


def _write_reading(path: Path, n: int, texts: Iterator[str], rng) -> None:
    rows = []
    while len(rows) < n:
        words = next(texts).split()
        for i, word in enumerate(words):
            row = {"item": " ".join(words[:i]) or "None", "word": word}
            row["prev_item"] = " ".join(words[: i - 1]) or "None"
            row["prev_word"] = words[i - 1] if i > 1 else ""
            if i <= 1:
                row["prev_item"] = ""
            fields = (*READING_FIELDS, *EEG_FIELDS)
            row |= {field: round(rng.uniform(1, 400), 2) for field in fields}
            rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:n])


def _write_acquisition(folder: Path, n: int, texts: Iterator[str], rng) -> None:
    contexts: dict[str, list[dict]] = {}
    written = 0
    while written < n:
        words = next(texts).split()
        word = words[-1].strip(".,!?").lower()
        if len(word) > 1 and word.isalpha():
            contexts.setdefault(word, []).append({"context": " ".join(words[:-1])})
            written += 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cdi_childes.json").write_text(json.dumps(contexts), encoding="utf-8")
    lines = ["word," + ",".join(str(age) for age in range(16, 31))]
    for word in contexts:
        middle = rng.uniform(18, 28)
        shares = [1 / (1 + 2.7 ** (middle - age)) for age in range(16, 31)]
        lines.append(f"{word}," + ",".join(f"{share:.4f}" for share in shares))
    (folder / "cdi_human.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
