"""tasks.py: one literal row of each task, mistakes in files, and BLiMP as published."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import SHARED

from babyllama.evaluation.grading import COLUMNS_2026, official_predictions, score_items
from babyllama.evaluation.tasks import TASKS, Item, decode_rows, read_items

BALL = "The ball is red."
BOX = "Box 1 contains"
# task: (stem of the file, row, subset, candidates as (prefix, completion), texts of predictions.json)
ROWS = {
    "blimp": (
        "x",
        {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "field": "syntax", "UID": "agreement"},
        "agreement",
        [("", "Cats sleep."), ("", "Cats sleeps.")],
        ["Cats sleep.", "Cats sleeps."],
    ),
    "supplement": (
        "turn_taking",
        {"sentence_good": "A: Hi. B: Hi.", "sentence_bad": "A: Hi. A: Hi.", "UID": "x"},
        "turn_taking",
        [("", "A: Hi. B: Hi."), ("", "A: Hi. A: Hi.")],
        ["A: Hi. B: Hi.", "A: Hi. A: Hi."],
    ),
    "ewok": (
        "x",
        {"Context1": BALL, "Context2": "The ball is blue.", "Target1": "It is red.", "Target2": "It is blue.",
         "Domain": "material-properties", "ContextType": "direct"},
        "material-properties",
        [(BALL, " It is red."), ("The ball is blue.", " It is red.")],
        ["The ball is red. It is red.", "The ball is blue. It is red."],
    ),
    "ewok_2025": (
        "x",
        {"Context1": BALL, "Context2": "The ball is blue.", "Target1": "It is red.", "Target2": "It is blue.",
         "Domain": "material-properties"},
        "material-properties",
        [(BALL, " It is red."), (BALL, " It is blue.")],
        [" It is red.", " It is blue."],
    ),
    "entity_tracking": (
        "regular",
        {"input_prefix": BOX, "options": [" the car.", " the cup."], "numops": 0},
        "regular_0_ops",
        [(BOX, " the car."), (BOX, " the cup.")],
        [" the car.", " the cup."],
    ),
    "entity_tracking_2025": (
        "regular",
        {"input_prefix": BOX, "options": [" the car.", " the cup.", " nothing."], "numops": 2},
        "regular_2_ops",
        [(BOX, " the car."), (BOX, " the cup."), (BOX, " nothing.")],
        [" the car.", " the cup.", " nothing."],
    ),
    "comps": (
        "comps_wugs_dist-in-between",
        {"prefix_acceptable": "A robin", "prefix_unacceptable": "A penguin", "property_phrase": "can fly."},
        "wugs_dist_in_between",
        [("A robin ", "can fly."), ("A penguin ", "can fly.")],
        ["A robin can fly.", "A penguin can fly."],
    ),
    "global_piqa_parallel": (
        "eng_latn",
        {"example_id": "p-7", "prompt": "To dry a cup,", "solution0": "burn it.", "solution1": "wipe it.",
         "solution2": "sell it.", "solution3": "bend it.", "label": 1},
        "eng_latn",
        [("To dry a cup,", f" {verb} it.") for verb in ("burn", "wipe", "sell", "bend")],
        [f" {verb} it." for verb in ("burn", "wipe", "sell", "bend")],
    ),
    "global_piqa_nonparallel": (
        "eng_latn",
        {"example_id": "n-7", "prompt": "Tea is made with", "solution0": "cold sand.", "solution1": "hot water.",
         "label": 1},
        "eng_latn",
        [("Tea is made with", " cold sand."), ("Tea is made with", " hot water.")],
        [" cold sand.", " hot water."],
    ),
    "wug_adj": (
        "x",
        {"sentences": "wuggish ones\twuggable ones", "ratio": 0.7},
        "wug_adj",
        [("", "wuggish ones"), ("", "wuggable ones")],
        ["wuggish ones", "wuggable ones"],
    ),
    "wug_past": (
        "x",
        {"sentences": "he wugged\the wog", "ratio": "0.25"},
        "wug_past",
        [("", "he wugged"), ("", "he wog")],
        ["he wugged", "he wog"],
    ),
    "minimal_pairs": (
        "toys",
        {"sentence_good": "a b", "sentence_bad": "b a"},
        "toys",
        [("", "a b"), ("", "b a")],
        ["a b", "b a"],
    ),
    "multiple_choice": (
        "x",
        {"prompt": "One and one is", "choices": ["three", "two"], "answer": 1, "subset": "sums"},
        "sums",
        [("One and one is", " three"), ("One and one is", " two")],
        [" three", " two"],
    ),
    "completion": (
        "x",
        {"prompt": "Snow is", "answer": "white", "wrong": ["red", "green"]},
        "x",
        [("Snow is", " white"), ("Snow is", " red"), ("Snow is", " green")],
        [" white", " red", " green"],
    ),
}  # fmt: skip
READING = {
    "item": "The old man", "word": "sat", "prev_item": "The old", "prev_word": "man", "Subtlex_log10": "3.5",
    "length": "3", "context_length": "3", "prev_length": "3", "RTfirstfix": "200", "RTfirstpass": "220",
    "RTgopast": "NA", "RTrightbound": "240", "self_paced_reading_time": "310.5",
}  # fmt: skip


def decode(task, row, stem="x", **options):
    """Return the item of one row."""
    (item,) = decode_rows(task, [row], "file", stem, **options)
    return item


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ROWS)
def test_a_row_becomes_an_item(task):
    stem, row, subset, candidates, answers = ROWS[task]
    item = decode(task, row, stem)
    assert item.subset == subset
    assert list(item.candidates) == candidates
    assert [item.answer(i) for i in range(len(answers))] == answers
    assert item.gold == row.get("answer", row.get("label", 0)) or task == "completion"
    assert item.key == row.get("example_id", "")


@pytest.mark.parametrize("task", [task for task in ROWS if TASKS[task].metric == "accuracy"])
def test_the_right_candidate_gives_an_accuracy_of_one(task):
    stem, row, *_ = ROWS[task]
    item = decode(task, row, stem)
    k = len(item.completions)

    right = np.full(k, -9.0)
    right[item.gold] = -5
    assert score_items(task, [item], right)["accuracy"] == 1.0
    assert score_items(task, [item], -right)["accuracy"] == 0.0
    tied = score_items(task, [item], np.full(k, -5.0))
    assert tied["accuracy"] == tied["chance"] == pytest.approx(1 / k)
    assert tied["ties"] == 1


def test_every_task_has_a_literal_row():
    assert {*ROWS, "reading", "reading_with_space"} == set(TASKS)


def test_entity_tracking_ignores_items_with_nothing_since_2026():
    stem, row, *_ = ROWS["entity_tracking_2025"]
    short = {**row, "options": row["options"][:2]}
    (item,) = decode_rows("entity_tracking", [row, short], "file", stem)
    assert item.completions == (" the car.", " the cup.")


def test_a_row_of_reading_times():
    item = decode("reading", READING)
    assert list(item.candidates) == [("The old man", "sat"), ("The old", "man")]
    spaced = decode("reading_with_space", READING)
    assert list(spaced.candidates) == [("The old man", " sat"), ("The old", " man")]
    assert item.human_data["self_paced_reading_time"] == 310.5
    assert math.isnan(item.human_data["RTgopast"])


def test_the_context_none_is_a_word_although_pandas_reads_it_as_missing():
    item = decode("reading", {**READING, "item": "None", "prev_item": "", "prev_word": ""})
    assert list(item.candidates) == [("None", "sat")]


def test_only_candidates_with_equal_completions_are_answered_in_full():
    assert Item("s", ("A ", "B "), ("x", "x")).answer(1) == "B x"
    assert Item("s", ("A ", "A "), ("x", "y")).answer(1) == "y"


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("completion", {"prompt": "a", "answer": True, "wrong": ["b"]}, "put numbers and words like true in quotes"),
        ("completion", {"prompt": "a", "answer": "b", "wrong": "bird"}, "wrong 'bird' is not a list"),
        ("completion", {"prompt": "a", "answer": "b", "wrong": ["b"]}, "must all be different"),
        ("multiple_choice", {"prompt": "a", "choices": "cat", "answer": 0}, "'cat' is not a list of two or more texts"),
        ("multiple_choice", {"prompt": "a", "choices": [], "answer": 0}, "is not a list of two or more texts"),
        ("multiple_choice", {"prompt": "a", "choices": ["b", "c"], "answer": True}, "answer True must be the index"),
        ("multiple_choice", {"prompt": "a", "choices": ["b", "c"], "answer": 2}, "answer 2 must be the index of a choice, 0 to 1"),
        ("entity_tracking", {"input_prefix": "a", "options": ["one"], "numops": 1}, "is not a list of two or more texts"),
        ("global_piqa_nonparallel", {"example_id": "a", "prompt": "b", "solution0": "c", "solution1": "d", "label": 2}, "label 2 must be the index"),
        ("wug_adj", {"sentences": "a\tb", "ratio": "nan"}, "ratio 'nan' is not a number"),
        ("minimal_pairs", {"sentence_good": "a", "sentence_bad": "\ud800"}, "surrogates not allowed"),
        ("minimal_pairs", {"sentence_good": "a", "sentence_bad": ""}, "a candidate is empty"),
        ("minimal_pairs", {"sentence_good": "a", "sentence_bad": 3}, "3 is not text"),
        ("minimal_pairs", {"sentence_good": "a"}, "missing fields: sentence_bad; the item has: sentence_good"),
        ("minimal_pairs", "a", "'a' is not a record with the fields sentence_good, sentence_bad"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_refused(task, row, message):
    with pytest.raises(ValueError, match=f"file: item 1: .*{message}"):
        decode(task, row)


def test_unknown_fields_are_refused_in_strict_mode_only():
    row = {"prompt": "a", "answer": "b", "wrong": ["c"], "anwser": 1}
    assert decode("completion", row).completions == (" b", " c")
    with pytest.raises(ValueError, match="unknown field 'anwser'; known: prompt, answer"):
        decode("completion", row, strict=True)


# ---- files --------------------------------------------------------------------------------------


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n\n')
    assert [item.subset for item in read_items("supplement", tmp_path)] == ["a", "b"]


def test_reading_times_are_read_from_csv(tmp_path):
    with (tmp_path / "reading_data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, READING)
        writer.writeheader()
        writer.writerow({**READING, "word": "sat, down"})
    assert read_items("reading", tmp_path)[0].completions[0] == "sat, down"


PAIR = '{"sentence_good": "a", "sentence_bad": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PAIR + '{"sentence_good": "a"}\n', "item 2: missing fields: sentence_bad"),
        ("\n{oops}\n", "line 2 is not JSON"),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
        ("", "holds no blimp items; expected .jsonl rows with sentence_good, sentence_bad"),
        (PAIR.encode() + b"\xff\n", r"is not UTF-8 \(byte 44\)"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, message):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_items("blimp", file)


def test_a_malformed_csv_file_is_refused(tmp_path):
    file = tmp_path / "bad.csv"
    file.write_bytes(b"a,b\n1,2\n3," + b"x" * 200_000 + b"\n")
    with pytest.raises(ValueError, match=r"bad.csv: line 3 is not CSV"):
        read_items("reading", file)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("ewok", "jsonl files; `python -m evaluation_pipeline.ewok.dl_and_filter` in babylm-eval/"),
        ("global_piqa_parallel", "`python evaluation_pipeline/global_piqa/dl.py` in babylm-eval/"),
        ("comps", "`python -m scripts.download_evals` in babylm-eval/strict downloads them"),
        ("reading_with_space", "csv files; `python -m scripts.download_evals` in babylm-eval/"),
        ("minimal_pairs", "files$"),
    ],
)
def test_a_missing_file_is_refused_with_the_command_that_downloads_it(tmp_path, task, message):
    with pytest.raises(FileNotFoundError, match=f"none does not exist; {task} needs .*{message}"):
        read_items(task, tmp_path / "none")


def test_the_nine_columns_of_2026_are_those_of_tasks_and_of_fine_tuning_and_age_of_acquisition():
    columns = {task.column for task in TASKS.values() if task.column}
    assert {*columns, "glue", "aoa"} == set(COLUMNS_2026)
    assert all(task.official for task in TASKS.values() if task.column)


@pytest.mark.skipif(not (SHARED / "blimp").is_dir(), reason="BLiMP is not here")
def test_blimp_as_published():
    items = read_items("blimp", SHARED / "blimp")
    assert len(items) == 34000
    assert len({item.subset for item in items}) == 34
    constant = score_items("blimp", items, np.zeros(68000))
    assert constant["accuracy"] == 0.5
    assert constant["ties"] == 34000
    json.dumps(official_predictions("blimp", items[:10], np.zeros(20)), allow_nan=False)
