"""The columns of a collated file, by worked examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from babyllama.submission.collate import score
from babyllama.submission.glue_tasks import predictions_file


def write_labels(eval_data: Path, task: str, fields: list[str], labels: list[int]) -> None:
    """Write a validation file with these labels."""
    folder = eval_data / "full_eval" / "glue_filtered"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict.fromkeys(fields, "text") | {"label": label} for label in labels]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task}.valid.jsonl").write_text(text)


def test_the_glue_column_is_the_mean_of_seven_scores_with_missing_ones_as_zero(tmp_path):
    write_labels(tmp_path, "rte", ["sentence1", "sentence2"], [0, 1, 1, 0])
    write_labels(tmp_path, "mrpc", ["sentence1", "sentence2"], [1, 1, 0, 0])
    glue = predictions_file("rte", [0, 1, 0, 0])  # three of four are right
    accuracy = 0.75
    scores = score({"glue": glue}, tmp_path)
    assert scores["columns"]["glue"]["percent"] == pytest.approx(100 * accuracy / 7)

    glue |= predictions_file("mrpc", [1, 0, 0, 1])  # one hit, one miss, one false alarm
    f1 = 2 * 1 / (2 * 1 + 1 + 1)
    scores = score({"glue": glue}, tmp_path)
    assert scores["columns"]["glue"]["percent"] == pytest.approx(100 * (accuracy + f1) / 7)
    assert scores["overall_2026"] == pytest.approx(100 * (accuracy + f1) / 7 / 9)
    assert "glue" not in scores["missing"] and len(scores["missing"]) == 8


def test_a_file_without_predictions_has_no_columns(tmp_path):
    scores = score({"glue": {}}, tmp_path)
    assert scores["overall_2026"] == 0
    assert len(scores["missing"]) == 9
