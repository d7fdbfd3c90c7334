"""Choose how many steps of a run fit into training.max_minutes, by timing a few of them.

The number is chosen once, before step 0, and recorded as training.max_steps. So the schedule ends
with the time, and a resumed run keeps its length, however fast the machine is then.

    max_steps = choose_max_steps(config, plan, execution, make_trainer, started)
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

from babyllama import distributed
from babyllama.planning.execution import Execution
from babyllama.planning.plan import Plan
from babyllama.training.trainer import LMTrainer

log = logging.getLogger(__name__)

# Steps that do not count, because they compile, allocate memory and record CUDA graphs, and steps
# that do: (on a CPU, on a GPU)
WARM_UP_STEPS = (2, 10)
TIMED_STEPS = (60, 100)
TIMED_SHARE = 0.02  # of the time; timing ends then even if it has timed fewer steps
USED_SHARE = 0.98  # of the time; the rest is for a machine that gets a little slower
END_SECONDS = 5  # to save the model, draw samples and curves, and end


class _StepClock(TrainerCallback):
    """Measure the seconds of a step; stop the run after `seconds` of steps that count."""

    def __init__(self, warm_up: int, seconds: float):
        self.warm_up = warm_up
        self.seconds = seconds
        self.started = 0.0
        self.seconds_per_step = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up:
            self.started = _now()
        elif state.global_step > self.warm_up:
            is_over = time.perf_counter() - self.started > self.seconds
            control.should_training_stop |= is_over

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds_per_step = (_now() - self.started) / (state.global_step - self.warm_up)


def _now() -> float:
    """Wait until the GPU has nothing left to do, and return the time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def choose_max_steps(
    config: dict,
    plan: Plan,
    execution: Execution,
    make_trainer: Callable[[dict, Path, list[TrainerCallback]], LMTrainer],
    started: float,
) -> int:
    """Train a few steps, undo them, and return how many fit into training.max_minutes.

    `plan` is that of all epochs, and make_trainer(config, folder, callbacks) returns a trainer of
    the run. The time counts from `started`, a time.perf_counter(). The run will evaluate at its
    intervals, after its last step and once more, and score its benchmark each time. The model is
    unchanged afterwards. Raise ValueError if no step fits, or with several processes, because they
    meet only after the run is planned.
    """
    if distributed.world_size() > 1:
        raise ValueError("training.max_minutes: not with several processes; set training.max_steps")
    training = config["training"]
    minutes = training["max_minutes"]

    if plan.steps <= WARM_UP_STEPS[torch.cuda.is_available()]:
        return plan.steps

    # measure what a step and an evaluation take
    per_step, evaluation = _time_steps(config, make_trainer)
    if execution.benchmark:
        evaluation += execution.benchmark["expected_seconds"]

    # divide the time that is left
    eval_steps = training["eval_steps"] or plan.steps / plan.epochs
    elapsed = time.perf_counter() - started
    left = USED_SHARE * 60 * minutes - elapsed - 2 * evaluation - END_SECONDS
    n_steps = int(left / (per_step + evaluation / eval_steps))
    figures = (
        f"{elapsed:.0f} s have passed, a step takes {per_step:.3f} s and an evaluation "
        f"{evaluation:.1f} s"
    )
    if n_steps < 1:
        raise ValueError(
            f"training.max_minutes: {minutes:g} is too short for a single step: {figures}; "
            "allow more time, or lower data.eval_samples"
        )
    log.info("training.max_minutes: %g: %d steps fit: %s", minutes, n_steps, figures)
    return min(n_steps, plan.steps)


def _time_steps(config: dict, make_trainer) -> tuple[float, float]:
    """Train a few steps and undo them; return the seconds of a step and of an evaluation."""
    # the same run, but short, and it saves, evaluates and reports nothing
    on_gpu = torch.cuda.is_available()
    n_steps = WARM_UP_STEPS[on_gpu] + TIMED_STEPS[on_gpu]
    training = config["training"] | {"max_steps": n_steps, "early_stopping_patience": None}
    config = config | {"training": training, "logging": config["logging"] | {"report_to": []}}
    clock = _StepClock(WARM_UP_STEPS[on_gpu], TIMED_SHARE * 60 * training["max_minutes"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, Path(folder), [clock])
        trainer.args.save_strategy = "no"
        trainer.args.eval_strategy = "no"
        model = trainer.model
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer.train()
    trainer.release_graphs()

    # what was compiled stays, what was learned does not
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.load_state_dict(weights)
    model.zero_grad(set_to_none=True)
    return clock.seconds_per_step, _evaluation_seconds(trainer)


def _evaluation_seconds(trainer: LMTrainer) -> float:
    """Return how long an evaluation of the held-out chunks takes, from that of one batch."""
    chunks = trainer.eval_dataset
    batch_size = trainer.args.per_device_eval_batch_size
    sample = chunks.select(range(min(batch_size, len(chunks))))
    started = time.perf_counter()
    trainer.score_held_out(trainer.model, sample)
    return (time.perf_counter() - started) * len(chunks) / len(sample)
