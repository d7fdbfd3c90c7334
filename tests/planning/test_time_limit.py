"""Check that a run fits its steps into training.max_minutes, once and for all."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from conftest import rows_of, timeless

import train
from babyllama.planning import time_limit
from babyllama.runs.checkpoints import checkpoint_step
from babyllama.runs.finished_run import seed_and_config
from babyllama.runs.run_dir import METRICS_FILE


@pytest.fixture
def slow_steps(monkeypatch):
    """Train and undo the steps that are timed, but say that each takes ten minutes."""
    time_steps = time_limit._time_steps

    def ten_minutes(*args):
        assert min(time_steps(*args)) > 0
        return 600.0, 0.0

    monkeypatch.setattr(time_limit, "_time_steps", ten_minutes)


def test_timing_leaves_no_trace_and_happens_once(
    slow_steps, config_file, tmp_path, monkeypatch, capsys, caplog
):
    """Weights and log equal those of a run with this max_steps, dropout included."""
    keys = {"model__type": "GPT2", "model__resid_pdrop": 0.1, "training__save_steps": 3}
    keys["training__warmup_steps"] = 12
    path = str(config_file(**keys, training__max_minutes=100.0))
    assert train.main(["--config", path]) == 0
    timed = tmp_path / "models" / "tiny"
    rows = rows_of(timed)
    weights = (timed / "model.safetensors").read_bytes()
    recorded = yaml.safe_load((timed / "training_config.yaml").read_text())["training"]
    steps = recorded["max_steps"]
    assert recorded["max_minutes"] == 100
    assert steps == rows[-1]["step"] == 9  # of 16
    (warning,) = [message for message in caplog.messages if "warmup_steps" in message]
    assert "has only 9 steps" in warning

    # a run that is resumed keeps the number, and so does one that is asked for again
    monkeypatch.setattr(time_limit, "_time_steps", None)
    assert train.main(["--config", path]) == 0
    assert "is already trained" in capsys.readouterr().out
    (timed / METRICS_FILE).unlink()
    (timed / "model.safetensors").unlink()
    first = sorted(timed.glob("checkpoint-*"), key=checkpoint_step)[0]
    assert checkpoint_step(first) < steps
    assert train.main(["--config", path, "--resume-from-checkpoint", str(first)]) == 0
    assert timeless(rows_of(timed)) == timeless(rows)
    assert (timed / "model.safetensors").read_bytes() == weights

    # the recorded configuration trains the same model without timing anything
    recorded_file = str(timed / "training_config.yaml")
    assert train.main(["--config", recorded_file, "--model-name", "again"]) == 0
    again = tmp_path / "models" / "again"
    assert timeless(rows_of(again)) == timeless(rows)
    assert (again / "model.safetensors").read_bytes() == weights

    # another time is another run
    other = str(config_file(**keys, training__max_minutes=90.0))
    assert train.main(["--config", other, "--resume-from-checkpoint", "latest"]) == 2
    assert "training.max_minutes: was 100.0, is 90.0" in capsys.readouterr().err


def test_seeds_with_the_same_time_are_seeds_of_one_run(finished):
    metrics = json.loads((finished[1] / METRICS_FILE).read_text())

    def identity(seed, minutes, steps):
        section = {"seed": seed, "max_minutes": minutes, "max_steps": steps}
        metrics["config"]["training"] |= section
        return seed_and_config(metrics)

    assert identity(1, 0.3, 10) | {"seed": 2} == identity(2, 0.3, 11)
    assert identity(1, 0.3, 10) != identity(1, 0.4, 10)
    assert identity(1, None, 10) != identity(1, None, 11)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training__max_minutes": 1e-4}, "too short for a single step"),
        ({"training__max_minutes": math.inf}, "training.max_minutes: inf is not allowed"),
        ({"training__max_minutes": 0}, "training.max_minutes: 0 is not allowed"),
    ],
)
def test_impossible_times_are_errors(keys, message, config_file, capsys):
    assert train.main(["--config", str(config_file(**keys))]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_several_processes_need_a_number_of_steps(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"not with several processes; set training\.max_steps"):
        time_limit.choose_max_steps({}, None, None, None, 0.0)
