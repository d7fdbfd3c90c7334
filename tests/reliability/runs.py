"""Help the reliability tests to run, stop, copy and compare small runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import rows_of, timeless
from transformers import TrainerCallback

import train
from babyllama.runs.checkpoints import checkpoints
from babyllama.runs.run_dir import RESULTS
from babyllama.training.trainer import LMTrainer

AUTO = ["--resume-from-checkpoint", "auto"]
STATE_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def unfinish(run_dir: Path) -> None:
    """Delete the results of a run, as if it had been killed before its end."""
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def final_state(run_dir: Path) -> dict:
    """Return the weights, the last checkpoint's states and the log of a run, byte for byte."""
    last = checkpoints(run_dir)[0]
    state = {name: (last / name).read_bytes() for name in STATE_FILES}
    weights = run_dir / "model.safetensors"
    return state | {
        "checkpoint": last.name,
        "final weights": weights.read_bytes() if weights.is_file() else None,
        "log": timeless(rows_of(run_dir)),
    }


def differences(run_dir: Path, expected: dict) -> list[str]:
    """Return the parts of a run's final state that differ from the expected ones."""
    state = final_state(run_dir)
    return [name for name in expected if state[name] != expected[name]]


class Canary:
    """Create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Stop(TrainerCallback):
    """Interrupt a run as soon as it has saved the checkpoint of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class CopyAt(TrainerCallback):
    """Copy the run directory when it has saved the checkpoint of one of these steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_save(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            target = f"{args.output_dir}-stopped-{state.global_step}"
            shutil.copytree(args.output_dir, target, ignore=shutil.ignore_patterns(".lock"))


def in_child(act: Callable[[], int]) -> int:
    """Call `act` in a forked child; return its exit code, or -n if signal n ended it.

    A fork has all imports already, so it starts much faster than a script.
    """
    pid = os.fork()
    if pid == 0:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        try:
            code = act()
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def kill_self() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(config: Path, *flags: str) -> int:
    """Run train.py in this process; return its exit code."""
    return train.main(["--config", str(config), *flags])


@contextlib.contextmanager
def ledger_of(path: Path) -> Iterator[None]:
    """Write a line "step chunk" to `path` for every chunk that a training step is given."""
    original = LMTrainer.training_step
    with path.open("a") as file:
        file.write("attempt\n")

    def record(self, model, inputs, *args, **kwargs):
        step = self.state.global_step + 1
        with path.open("a") as file:
            file.writelines(
                f"{step} {row.numpy().tobytes().hex()}\n" for row in inputs["input_ids"].cpu()
            )
        return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "training_step", record)
        yield


def read_ledger(path: Path) -> list[tuple[int, str]]:
    """Return (step, chunk) of the steps that count: a step that was trained again counts once."""
    entries: list[tuple[int, str]] = []
    for attempt in path.read_text().split("attempt\n"):
        lines = [line.split() for line in attempt.splitlines()]
        if lines:  # the steps that this attempt trains again are lost, also one half done
            first_step = int(lines[0][0])
            entries = [entry for entry in entries if entry[0] < first_step]
        entries += [(int(step), chunk) for step, chunk in lines]
    return entries
