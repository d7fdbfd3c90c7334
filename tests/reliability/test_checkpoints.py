"""Runs that are interrupted, cloned, damaged or out of disk space lose at most one interval."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import added_callback, errors_of, rows_of
from runs import AUTO, CopyAt, Stop, differences, final_state, in_child, kill_self, run, unfinish
from transformers import TrainerCallback

import train
from babyllama.runs.checkpoints import (
    checkpoint_error,
    checkpoint_step,
    checkpoints,
    newest_intact_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
)
from babyllama.runs.run_dir import CONFIG_FILE, DATA_REPORT_FILE, METRICS_FILE
from babyllama.training.trainer import LMTrainer


def make_checkpoint(run_dir: Path, step: int, age: float = 0, sealed: bool = True) -> Path:
    """Make a checkpoint directory with one file; `age` is the age of the directory in seconds."""
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if sealed:
        seal_checkpoint(folder)
    os.utime(folder, (time.time() - age,) * 2)
    return folder


# ---- rotation -------------------------------------------------------------------------------------


@pytest.mark.promise(15)
@pytest.mark.parametrize("ages", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 0, 0, 0), (-9e4, 5, -1e5, 7)])
def test_rotation_goes_by_step_whatever_the_clock_says(ages, tmp_path):
    for step, age in zip((5, 10, 95, 100), ages, strict=True):
        make_checkpoint(tmp_path, step, age)
    rotate_checkpoints(tmp_path, best=None)
    assert [checkpoint_step(folder) for folder in checkpoints(tmp_path)] == [100, 95]


def test_rotation_keeps_the_best_checkpoint_and_no_link_target(tmp_path):
    for step in (5, 10, 15, 20):
        make_checkpoint(tmp_path / "run", step)
    rotate_checkpoints(tmp_path / "run", best="elsewhere/run/checkpoint-5")
    kept = [checkpoint_step(folder) for folder in checkpoints(tmp_path / "run")]
    assert kept == [20, 15, 5]


@pytest.mark.promise(15)
def test_a_clock_that_was_set_back_does_not_end_a_run(config_file, tmp_path):
    path = config_file(training__save_steps=2)
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path), "--set", "training.max_steps=4"]) == 0
    in_an_hour = time.time() + 3600
    for folder in checkpoints(run_dir):
        os.utime(folder, (in_an_hour, in_an_hour))
    assert train.main(["--config", str(path), "--set", "training.max_steps=8", *AUTO]) == 0
    assert [checkpoint_step(folder) for folder in checkpoints(run_dir)] == [8, 6]


@pytest.mark.promise(1)
def test_the_old_checkpoint_is_there_until_the_new_one_is_sealed(
    config_file, tmp_path, monkeypatch
):
    """With early stopping Trainer would delete all others but the best one before that."""
    path = config_file(
        training__eval_steps=2, training__early_stopping_patience=9, training__num_epochs=3
    )
    run_dir = tmp_path / "models" / "tiny"
    gaps = []

    def watch(folder):
        before = [old for old in checkpoints(run_dir) if old != folder]
        intact = [checkpoint_step(old) for old in before if not checkpoint_error(old)]
        if before:
            gaps.append(checkpoint_step(folder) - max(intact))
        seal_checkpoint(folder)

    monkeypatch.setattr("babyllama.training.trainer.seal_checkpoint", watch)
    assert train.main(["--config", str(path)]) == 0
    assert gaps and max(gaps) <= 2


# ---- one command line that can be repeated ---------------------------------------------------------


@pytest.mark.promise(1)
@pytest.mark.parametrize("flags", [[], AUTO])
@pytest.mark.parametrize(
    "left", ["partial checkpoint", "report only", "draft of the configuration"]
)
def test_a_run_killed_before_its_first_checkpoint_starts_again(left, flags, config_file, tmp_path):
    path = config_file(training__num_epochs=1)
    run_dir = tmp_path / "models" / "tiny"
    run_dir.mkdir(parents=True)
    if left == "partial checkpoint":
        assert train.main(["--config", str(path), "--set", "training.max_steps=1"]) == 0
        unfinish(run_dir)
        for folder in checkpoints(run_dir):
            (folder / "complete.json").unlink()
    elif left == "report only":
        (run_dir / DATA_REPORT_FILE).write_text("{}")
    else:
        (run_dir / f".{CONFIG_FILE}.x7_2ab0k~").mkdir()
    assert train.main(["--config", str(path), *flags]) == 0
    assert (run_dir / METRICS_FILE).is_file()
    assert not list(run_dir.glob(f".{CONFIG_FILE}*"))


def test_auto_refuses_to_replace_another_finished_run(finished_copy, capsys):
    config_path, run_dir = finished_copy
    weights = (run_dir / "model.safetensors").read_bytes()
    assert train.main(["--config", str(config_path), *AUTO]) == 0
    assert "already trained" in capsys.readouterr().out
    shutil.rmtree(checkpoints(run_dir)[0])
    shutil.rmtree(checkpoints(run_dir)[0])
    assert train.main(["--config", str(config_path), "--lr", "1e-3", *AUTO]) == 2
    (line,) = errors_of(capsys)
    assert "holds another run" in line
    assert (run_dir / "model.safetensors").read_bytes() == weights


@pytest.mark.promise(2)
def test_a_damaged_newer_checkpoint_is_renamed_not_deleted(finished_copy):
    config_path, run_dir = finished_copy
    unfinish(run_dir)
    newest, earlier = checkpoints(run_dir)
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert train.main(["--config", str(config_path), *AUTO]) == 0
    renamed = run_dir / f"damaged-{newest.name}"
    assert (renamed / "model.safetensors").read_bytes() == b"damaged"
    assert not checkpoint_error(checkpoints(run_dir)[0])


# ---- kill -9 ---------------------------------------------------------------------------------------


def kill_in_save(n: int, events: list[str]) -> None:
    """Kill this process at the n-th operation on files within the saves of a run.

    Operations are those that Python audits, and each fsync before and after it. `events` collects
    their names.
    """
    original = LMTrainer._save_checkpoint
    fsync = os.fsync
    inside = False

    def count(event: str) -> None:
        events.append(event)
        if len(events) == n:
            kill_self()

    def audit(event, arguments):
        if inside and event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            count(event)

    def counted_fsync(descriptor):
        count("before fsync")
        fsync(descriptor)
        count("after fsync")

    def save(self, *args):
        nonlocal inside
        inside = True
        original(self, *args)
        inside = False

    LMTrainer._save_checkpoint = save
    os.fsync = counted_fsync
    sys.addaudithook(audit)


def kill_sweep(path: Path, run_dir: Path, figures, points: int) -> None:
    """Kill a run at `points` operations spread over its save at step 6; each time it must recover.

    Every child begins with the same checkpoints, of steps 2 and 4. After a kill it has lost one
    interval at most, and the resumed run ends like the one that nobody killed.
    """

    def run_to_the_last_checkpoint() -> int:
        with added_callback(Stop(8)):  # drawing the curves would take longer than all steps
            return run(path, *AUTO)

    with added_callback(CopyAt([4])):
        assert run_to_the_last_checkpoint() == 130
    expected = final_state(run_dir)
    stopped = run_dir.with_name("tiny-stopped-4")

    def start_again() -> None:
        shutil.rmtree(run_dir)
        shutil.copytree(stopped, run_dir)

    # count the operations of the save of step 6
    start_again()

    def count_events() -> int:
        events = []
        kill_in_save(0, events)
        with added_callback(Stop(6)):
            assert run(path, *AUTO) == 130
        return len(events)

    n_events = in_child(count_events)
    assert n_events >= points, "fewer operations than points"

    def killed_at(n: int) -> int:
        kill_in_save(n, [])
        return run(path, *AUTO)

    survived = 0
    for n in sorted({round(1 + i * (n_events - 1) / (points - 1)) for i in range(points)}):
        start_again()
        assert in_child(lambda n=n: killed_at(n)) == -signal.SIGKILL
        newest = checkpoint_step(newest_intact_checkpoint(run_dir))
        figures.worst("intervals lost", (6 - newest) / 2)
        assert in_child(run_to_the_last_checkpoint) == 130
        leftovers = [file.name for file in run_dir.iterdir() if file.name.startswith(".")]
        different = differences(run_dir, expected)
        survived += newest >= 4 and not different and not leftovers
        assert newest >= 4 and not different and not leftovers, (n, newest, different, leftovers)
    figures.count("kills survived", survived, points)


KILLED = {
    "model__type": "GPT2",
    "model__resid_pdrop": 0.1,
    "training__save_steps": 2,
    "training__max_steps": 8,
    "training__gradient_accumulation_steps": 1,
}


@pytest.mark.promise(1)
def test_a_run_killed_in_a_save_ends_like_one_that_is_not(config_file, tmp_path, figures):
    kill_sweep(config_file(**KILLED), tmp_path / "models" / "tiny", figures, points=3)


@pytest.mark.slow
@pytest.mark.promise(1)
def test_a_run_killed_at_any_point_of_a_save_ends_like_one_that_is_not(
    config_file, tmp_path, figures
):
    kill_sweep(config_file(**KILLED), tmp_path / "models" / "tiny", figures, points=40)


@pytest.mark.slow
@pytest.mark.promise(1)
def test_a_run_killed_again_and_again_ends_like_one_that_is_not(config_file, tmp_path, figures):
    """Each child is killed before the n-th rename or removal of its run directory."""
    path = config_file(**KILLED)
    assert run(path, "--model-name", "calm") == 0
    run_dir = tmp_path / "models" / "tiny"
    kills = 0

    def killed_at(n: int) -> int:
        calls = 0

        def audit(event, arguments):
            nonlocal calls
            watched = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if watched and str(run_dir) in str(arguments[0]):
                calls += 1
                if calls == n:
                    kill_self()

        sys.addaudithook(audit)
        return run(path, *AUTO)

    for n in (1, 2, 3, 5, 7, 9, 12, 15, 18, 22):
        code = in_child(lambda n=n: killed_at(n))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 5
    assert run(path, *AUTO) == 0
    assert not differences(run_dir, final_state(tmp_path / "models" / "calm"))
    figures.count("kills survived", kills, kills)


# ---- numbers that are NaN or infinite ------------------------------------------------------------


@pytest.mark.promise(6)
@pytest.mark.parametrize("step", [2, 3])
def test_a_checkpoint_with_a_nan_weight_is_never_saved(step, config_file, tmp_path, capsys):
    path = config_file(training__save_steps=1, training__logging_steps=1)
    run_dir = tmp_path / "models" / "tiny"

    class Corrupt(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == step:  # after the update, before anything is saved
                with torch.no_grad():
                    next(model.parameters()).view(-1)[7] = float("nan")

    with added_callback(Corrupt()):
        assert train.main(["--config", str(path)]) == 2
    (line,) = errors_of(capsys)
    assert f"NaN or infinite at or before step {step}" in line
    assert checkpoint_step(checkpoints(run_dir)[0]) == step - 1
    last = rows_of(run_dir)[-1]
    assert last["step"] == step and last["loss"] is None
    assert train.main(["--config", str(path), *AUTO]) == 0


@pytest.mark.promise(6)
def test_a_nan_in_an_evaluation_is_named(config_file, monkeypatch, capsys):
    from babyllama.training import trainer

    exact = trainer.evaluate_chunks
    monkeypatch.setattr(
        trainer, "evaluate_chunks", lambda *a, **k: exact(*a, **k) | {"loss": float("nan")}
    )
    assert train.main(["--config", str(config_file())]) == 2
    (line,) = errors_of(capsys)
    assert "the held-out loss became NaN or infinite at step" in line


@pytest.mark.promise(13)
def test_nothing_is_written_through_a_link(config_file, tmp_path, capsys):
    path = config_file(training__save_steps=2, training__num_epochs=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("mine")
    run_dir = tmp_path / "models" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoint-2").symlink_to(tmp_path / "other")
    train.main(["--config", str(path)])
    assert (tmp_path / "other" / "config.json").read_text() == "mine"
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["config.json"]
