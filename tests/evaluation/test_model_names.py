"""model_names.py: short names, folders of predictions, checkpoints in the order of training."""

import pytest

from babyllama.evaluation.model_names import in_training_order, prediction_folders, short_names


def test_short_names_are_unique():
    assert short_names(["models/A", "models/B/"]) == ["A", "B"]
    assert short_names(["x/a/final", "x/b/final", "c"]) == ["a/final", "b/final", "c"]
    assert short_names(["b/a/z"]) == ["z"]
    assert len(set(short_names(["a/z", "b/a/z"]))) == 2


def test_a_model_named_twice_is_refused():
    with pytest.raises(ValueError, match="models/../models/A: this model is named twice"):
        short_names(["models/A", "models/../models/A"])


def test_predictions_are_where_babylms_pipeline_looks():
    """The folder is the stem of the model's name, unless two models share a stem."""
    expected = {
        "models/a": "a/main",
        "models/a/chck_1M": "a/chck_1M",
        "models/b.v1/": "b.v1/main",
        "models/b.v2": "b.v2/main",
        "x/c/chck_2M": "x_c/chck_2M",
        "y/c/chck_2M": "y_c/chck_2M",
    }
    folders = prediction_folders(list(expected))
    assert {path: str(folder) for path, folder in folders.items()} == expected
    assert str(prediction_folders(["models/b.v1"])["models/b.v1"]) == "b/main"


def test_checkpoints_are_sorted_within_the_positions_of_their_run():
    shell = [
        "x/chck_100M", "other", "x/chck_10M", "y/checkpoint-9", "x/chck_1M/", "x/chck_20M", "y/checkpoint-10", "x/chck_2M"
    ]  # fmt: skip
    assert in_training_order(shell) == [
        "x/chck_1M/", "other", "x/chck_2M", "y/checkpoint-9", "x/chck_10M", "x/chck_20M", "y/checkpoint-10", "x/chck_100M"
    ]  # fmt: skip
    assert in_training_order(["b", "a"]) == ["b", "a"]
