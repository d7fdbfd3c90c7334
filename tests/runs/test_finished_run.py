"""The records of a finished run."""

import pytest

from babyllama.runs.finished_run import read_metrics, run_of_checkpoint
from babyllama.runs.run_dir import METRICS_FILE


@pytest.mark.parametrize("text", ["", "[]", '{"results": {"eval_loss": 1}}'])
def test_damaged_metrics_are_ignored_with_a_warning(text, tmp_path, caplog):
    assert read_metrics(tmp_path) is None
    assert not caplog.messages
    (tmp_path / METRICS_FILE).write_text(text)
    assert read_metrics(tmp_path) is None
    (message,) = caplog.messages
    assert f"{METRICS_FILE} is damaged or of an older version" in message


def test_a_checkpoint_is_in_the_directory_of_its_run(tmp_path):
    assert run_of_checkpoint(tmp_path / "checkpoint-20") == tmp_path
    assert run_of_checkpoint(tmp_path / "chck_10M") == tmp_path
    assert run_of_checkpoint(tmp_path / "tiny") is None
