import json

import pytest
from conftest import write_file

from babyllama.submission.glue_tasks import GLUE_TASKS, predictions_file, read_examples

ROWS = {  # a row of each task in BabyLM's files, and the two texts that its pipeline makes of it
    "boolq": ({"question": "is it", "passage": "It is."}, ("is it", "It is.")),
    "mnli": ({"premise": "A {b} c.", "hypothesis": "C."}, ("A {b} c.", "C.")),
    "mrpc": ({"sentence1": "One.", "sentence2": "Two."}, ("One.", "Two.")),
    "multirc": (
        {"paragraph": "Text.", "question": "Who?", "answer": "Ann"},
        ("Question: Who? Answer: Ann", "Text."),
    ),
    "qqp": ({"question1": "Why?", "question2": "Why so?"}, ("Why?", "Why so?")),
    "rte": ({"sentence1": "One.", "sentence2": "Two."}, ("One.", "Two.")),
    "wsc": (
        {"span1_text": "Mark", "span2_text": "He", "text": "Mark left. He ran."},
        ('Does "He" refer to "Mark" in this passage?', "Mark left. He ran."),
    ),
}


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_texts_of_each_task_are_those_of_the_pipeline(task, tmp_path):
    fields, texts = ROWS[task]
    last = GLUE_TASKS[task].labels - 1
    lines = [json.dumps({**fields, "label": label, "idx": 7}) for label in (0, last)]
    path = write_file(tmp_path, f"{task}.train.jsonl", "\n".join(lines) + "\n")
    assert read_examples(path, task) == [(texts, 0), (texts, last)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"sentence1": "a", "label": 0}', "row 2: rte needs the field 'sentence2'"),
        ('{"sentence1": "a", "sentence2": "b"}', "row 2: rte needs the field 'label'"),
        ('{"sentence1": "a", "sentence2": "b", "label": 2}', "row 2: label 2 must be 0 to 1"),
        ('{"sentence1": "a", "sentence2": "b", "label": "1"}', "row 2: label '1' must be"),
        ("[1]", "row 2: expected an object"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_malformed_row_is_named(line, problem, tmp_path):
    good = '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
    path = write_file(tmp_path, "rte.train.jsonl", good + line)
    with pytest.raises(ValueError, match=problem) as error:
        read_examples(path, "rte")
    assert str(path) in str(error.value)


def test_an_empty_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        read_examples(write_file(tmp_path, "rte.train.jsonl", ""), "rte")
    with pytest.raises(FileNotFoundError, match="rte.valid.jsonl"):
        read_examples(tmp_path / "rte.valid.jsonl", "rte")


def test_predictions_have_the_format_of_the_pipeline():
    assert json.dumps(predictions_file("boolq", [1, 0])) == (
        '{"boolq": {"predictions": [{"id": "boolq_0", "pred": 1}, {"id": "boolq_1", "pred": 0}]}}'
    )
