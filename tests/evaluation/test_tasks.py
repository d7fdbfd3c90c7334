"""tasks.py: one literal row for each task with its figure worked out by hand, naive oracles, ties, intervals."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import SHARED

from babyllama.evaluation import tasks
from babyllama.evaluation.grading import official_predictions, score_items
from babyllama.evaluation.tasks import decode_rows, read_items

ROWS = {  # task: (file stem, row, subset, candidates as (prefix, completion), texts of predictions.json)
    "blimp": (
        "x", {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "field": "syntax", "UID": "agreement"},
        "agreement", [("", "Cats sleep."), ("", "Cats sleeps.")], ["Cats sleep.", "Cats sleeps."],
    ),
    "supplement": (
        "turn_taking", {"sentence_good": "A: Hi. B: Hi.", "sentence_bad": "A: Hi. A: Hi.", "UID": "x"},
        "turn_taking", [("", "A: Hi. B: Hi."), ("", "A: Hi. A: Hi.")], ["A: Hi. B: Hi.", "A: Hi. A: Hi."],
    ),
    "ewok": (
        "x", {"Context1": "The ball is red.", "Context2": "The ball is blue.", "Target1": "It is red.",
              "Target2": "It is blue.", "Domain": "material-properties", "ContextType": "direct"},
        "material-properties", [("The ball is red.", " It is red."), ("The ball is red.", " It is blue.")],
        [" It is red.", " It is blue."],
    ),
    "entity_tracking": (
        "regular", {"input_prefix": "Box 1 contains", "options": [" the car.", " the cup.", " nothing."], "numops": 2},
        "regular_2_ops", [("Box 1 contains", " the car."), ("Box 1 contains", " the cup."), ("Box 1 contains", " nothing.")],
        [" the car.", " the cup.", " nothing."],
    ),
    "comps": (
        "comps_wugs_dist-in-between", {"prefix_acceptable": "A robin", "prefix_unacceptable": "A penguin", "property_phrase": "can fly."},
        "wugs_dist_in_between", [("A robin", " can fly."), ("A penguin", " can fly.")],
        ["A robin can fly.", "A penguin can fly."],
    ),
    "wug_adj": ("x", {"sentences": "wuggish ones\twuggable ones", "ratio": 0.7}, "wug_adj",
                [("", "wuggish ones"), ("", "wuggable ones")], ["wuggish ones", "wuggable ones"]),
    "wug_past": ("x", {"sentences": "he wugged\the wog", "ratio": "0.25"}, "wug_past",
                 [("", "he wugged"), ("", "he wog")], ["he wugged", "he wog"]),
    "minimal_pairs": ("toys", {"sentence_good": "a b", "sentence_bad": "b a"}, "toys", [("", "a b"), ("", "b a")], ["a b", "b a"]),
    "multiple_choice": (
        "x", {"prompt": "One and one is", "choices": ["three", "two"], "answer": 1, "subset": "sums"}, "sums",
        [("One and one is", " three"), ("One and one is", " two")], [" three", " two"],
    ),
    "completion": (
        "x", {"prompt": "Snow is", "answer": "white", "wrong": ["red", "green"]}, "x",
        [("Snow is", " white"), ("Snow is", " red"), ("Snow is", " green")], [" white", " red", " green"],
    ),
}  # fmt: skip
READING = {
    "item": "The old man", "word": "sat", "prev_item": "The old", "prev_word": "man", "Subtlex_log10": "3.5",
    "length": "3", "context_length": "3", "prev_length": "3", "RTfirstfix": "200", "RTfirstpass": "220",
    "RTgopast": "NA", "RTrightbound": "240", "self_paced_reading_time": "310.5",
}  # fmt: skip


@pytest.mark.parametrize("task", ROWS)
def test_a_literal_row_of_each_task(task):
    stem, row, subset, candidates, answers = ROWS[task]
    (item,) = decode_rows(task, [row], "file", stem)
    assert (item.subset, list(item.candidates)) == (subset, candidates)
    assert [item.answer(i) for i in range(len(answers))] == answers
    assert item.gold == (1 if task == "multiple_choice" else 0)
    right = [-5.0 if i == item.gold else -9.0 for i in range(len(answers))]
    if tasks.TASKS[task].metric == "accuracy":
        assert score_items(task, [item], right)["accuracy"] == 1.0
        assert (
            score_items(task, [item], right[::-1] if len(right) == 2 else [-9, -9, -5])["accuracy"]
            == 0.0
        )
        tied = score_items(task, [item], [-5.0] * len(right))
        assert (tied["accuracy"], tied["ties"], tied["chance"]) == pytest.approx(
            (1 / len(right), 1, 1 / len(right))
        )
        assert tied["accuracy_official"] == (0.0 if item.gold else 1.0)


def test_every_task_has_a_literal_row():
    assert {*ROWS, "reading", "entity_tracking_filtered"} == set(tasks.TASKS)


def test_entity_tracking_filtered_leaves_out_items_with_nothing():
    stem, row, *_ = ROWS["entity_tracking"]
    kept = {**row, "options": row["options"][:2]}
    (item,) = decode_rows("entity_tracking_filtered", [row, kept], "file", stem)
    assert item.completions == (" the car.", " the cup.")


def test_a_literal_row_of_reading_times():
    first = {
        **READING,
        "item": "None",
        "prev_item": "",
        "prev_word": "",
    }  # "None of them ...", as pandas does not see it
    items = decode_rows("reading", [READING, first], "file", "x")
    assert list(items[0].candidates) == [("The old man", " sat"), ("The old", " man")]
    assert list(items[1].candidates) == [("None", " sat")]
    assert items[0].facts["self_paced_reading_time"] == 310.5
    assert math.isnan(items[0].facts["RTgopast"])
    assert official_predictions("reading", items, [-2.0, -3.0, -4.0]) == {
        "reading": {
            "predictions": [
                {"id": 0, "pred": 2.0, "prev_pred": 3.0},
                {"id": 1, "pred": 4.0, "prev_pred": None},
            ]
        }
    }


def test_mistakes_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n')
    with pytest.raises(ValueError, match="item 2: lacks sentence_bad; it has sentence_good"):
        read_items("blimp", tmp_path)
    file.write_text("\n{oops}\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_items("blimp", file)
    file.write_text('{"sentence_good": "a", "sentence_bad": ""}\n')
    with pytest.raises(ValueError, match="a candidate is empty"):
        read_items("blimp", file)
    file.write_text("")
    with pytest.raises(ValueError, match="no blimp items"):
        read_items("blimp", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_items("ewok", tmp_path / "none")
    with pytest.raises(ValueError, match="put it in quotes"):
        decode_rows("completion", [{"prompt": "a", "answer": True, "wrong": ["b"]}], "f", "x")
    with pytest.raises(ValueError, match="unknown field 'anwser'"):
        decode_rows(
            "completion",
            [{"prompt": "a", "answer": "b", "wrong": ["c"], "anwser": 1}],
            "f",
            "x",
            strict=True,
        )
    with pytest.raises(ValueError, match="wrong 'bird' is not a list"):  # else its letters
        decode_rows("completion", [{"prompt": "a", "answer": "b", "wrong": "bird"}], "f", "x")
    for choices in ("cat", [], ["one"]):
        with pytest.raises(ValueError, match="is not a list of two or more texts"):
            decode_rows(
                "multiple_choice", [{"prompt": "a", "choices": choices, "answer": 0}], "f", "x"
            )
        with pytest.raises(ValueError, match="is not a list of two or more texts"):
            decode_rows(
                "entity_tracking",
                [{"input_prefix": "a", "options": choices, "numops": 1}],
                "f",
                "x",
            )
    with pytest.raises(ValueError, match="answer True is not the place of a choice"):
        decode_rows(
            "multiple_choice", [{"prompt": "a", "choices": ["b", "c"], "answer": True}], "f", "x"
        )
    with pytest.raises(ValueError, match="ratio 'nan' is not a number"):
        decode_rows("wug_adj", [{"sentences": "a\tb", "ratio": "nan"}], "f", "x")
    file.write_bytes(b'{"sentence_good": "a", "sentence_bad": "b"}\n\xff\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: .*not UTF-8"):
        read_items("blimp", file)
    file.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_items("blimp", file)
    with pytest.raises(ValueError, match="all be different"):
        decode_rows("completion", [{"prompt": "a", "answer": "b", "wrong": ["b"]}], "f", "x")
    with pytest.raises(ValueError, match="item 1: .*surrogates not allowed"):
        decode_rows("minimal_pairs", [{"sentence_good": "a", "sentence_bad": "\ud800"}], "f", "x")


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n\n')
    assert [i.subset for i in read_items("supplement", tmp_path)] == ["a", "b"]
    with (tmp_path / "r.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, READING)
        writer.writeheader()
        writer.writerow({**READING, "word": "sat, down"})
    assert read_items("reading", tmp_path)[0].completions[0] == " sat, down"
    for name, text in (("bad.csv", b"a,b\n1,2\n3,\xff\n"), ("bad.jsonl", b"{}\n\n\xff")):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name}: after line .: not UTF-8"):
            list(tasks._rows(tmp_path / name))
    (tmp_path / "bad.csv").write_bytes(b"a,b\n1,2\n3," + b"x" * 200_000 + b"\n")
    with pytest.raises(ValueError, match="bad.csv: line 3 is not CSV"):
        list(tasks._rows(tmp_path / "bad.csv"))


@pytest.mark.skipif(not (SHARED / "blimp").is_dir(), reason="BLiMP is not here")
def test_blimp_as_published():
    items = read_items("blimp", SHARED / "blimp")
    assert len(items) == 34000 and len({i.subset for i in items}) == 34
    constant = score_items("blimp", items, np.zeros(68000))
    assert (constant["accuracy"], constant["accuracy_official"], constant["ties"]) == (
        0.5,
        1.0,
        34000,
    )
    json.dumps(official_predictions("blimp", items[:10], np.zeros(20)), allow_nan=False)
