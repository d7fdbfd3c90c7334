"""Checkpoints of real tiny runs: when they are written, kept and trusted."""

import json

import train
from babyllama.runs.checkpoints import (
    checkpoint_error,
    checkpoint_step,
    checkpoints,
    seal_checkpoint,
)
from babyllama.runs.run_dir import LOG_FILE


def test_a_checkpoint_saved_twice_is_intact(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"first")
    seal_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"second")
    assert checkpoint_error(tmp_path) == "model.safetensors has changed since it was saved"
    seal_checkpoint(tmp_path)
    assert checkpoint_error(tmp_path) is None


def test_each_checkpoint_has_a_row_in_the_log(config_file, tmp_path):
    """A resumed run starts counting seconds and tokens from this row, however rarely rows are written."""
    path = config_file(training__logging_steps=1000, training__save_steps=3, training__num_epochs=2)
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    rows = [json.loads(line) for line in (run_dir / LOG_FILE).read_text().splitlines()]
    timed = {row["step"]: row["tokens"] for row in rows if "tokens_per_second" in row}
    steps = [checkpoint_step(folder) for folder in checkpoints(run_dir)]
    assert len(steps) == 2
    assert set(steps) <= set(timed)
    assert set(range(3, max(steps) + 1, 3)) <= set(timed)


def test_the_last_two_checkpoints_are_kept_even_if_an_earlier_one_is_better(config_file, tmp_path):
    """The held-out text has only letters that training never shows, so its loss soon rises."""
    held_out = tmp_path / "unseen.txt"
    held_out.write_text("ZQX QZX XZQ " * 200)
    path = config_file(
        data__eval_path=str(held_out),
        training__lr=1e-2,
        training__save_steps=7,
        training__eval_steps=7,
        training__num_epochs=6,
    )
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {
        row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"] % 7 == 0
    }
    kept = [checkpoint_step(folder) for folder in checkpoints(run_dir)]
    assert min(losses, key=losses.get) < min(kept)
    saved = sorted({*losses, rows[-1]["step"]})
    assert kept == saved[:-3:-1]
