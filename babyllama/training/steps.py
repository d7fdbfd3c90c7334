"""Lay out the optimizer steps of a run: which chunks each one takes, in all processes together.

Every epoch takes every chunk once, in an order that the sampler decides. A run that was resumed
with another batch size has steps of several sizes. Its history says at which step each size begins.

    steps = Steps(n_chunks, config["training"])
    print(steps.total, steps.chunks_seen[100])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from babyllama import distributed


class Steps:
    """The steps of a run, which ends after `total` of them.

    `chunks_seen` (steps + 1,) is the number of chunks seen after each step, and `epoch_ends`
    (epochs + 1,) the step at which each epoch ends. Both cover complete epochs, so they may go past
    `total`. training.num_epochs has `available` steps.
    """

    def __init__(
        self, n_chunks: int, training: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()
    ):
        """Lay out the steps of a run; without a history, all of them are of the current size.

        Raise ValueError if an epoch, or the rest of it after a change, has fewer chunks than
        processes.
        """
        # lay out each part of the history to the end of the run; the next one replaces its end
        self.n_chunks = n_chunks
        seen = np.zeros(1, dtype=np.int64)  # chunks after each step
        for part in history or [current_settings(training)]:
            seen = seen[: part["step"] + 1]
            position = int(seen[-1])
            epochs = [seen]
            while position < training["num_epochs"] * n_chunks:
                epoch_end = (position // n_chunks + 1) * n_chunks
                epochs.append(_step_ends(position, epoch_end, part))
                position = epoch_end
            seen = np.concatenate(epochs)
        self._last_part = part

        # end after training.max_steps, but lay out the last epoch completely
        self.available = len(seen) - 1
        self.total = min(self.available, training["max_steps"] or self.available)
        n_epochs = math.ceil(seen[self.total] / n_chunks)
        self.epoch_ends = np.searchsorted(seen, n_chunks * np.arange(n_epochs + 1))
        self.chunks_seen = seen[: self.epoch_ends[-1] + 1]

    @property
    def epochs(self) -> int:
        """Return the number of epochs that the run begins."""
        return len(self.epoch_ends) - 1

    def epoch_at(self, step: int) -> tuple[int, int]:
        """Return the epoch that continues after a step, and how many of its steps are done."""
        epoch = int(np.searchsorted(self.epoch_ends, step, side="right")) - 1
        return epoch, step - int(self.epoch_ends[epoch])

    def slices(self, epoch: int) -> list[slice]:
        """Return the chunks of each step of an epoch, as slices of the epoch's order."""
        first = self.epoch_ends[epoch]
        bounds = self.chunks_seen[first : self.epoch_ends[epoch + 1] + 1] - epoch * self.n_chunks
        return [
            slice(*pair) for pair in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]

    @property
    def schedule_lead(self) -> float:
        """Return by how many steps the schedule is ahead of the run.

        The schedule goes by text seen: it continues as if all steps had had the current size. So
        this is 0, unless the size has changed.
        """
        part = self._last_part
        epoch, rest = divmod(int(self.chunks_seen[part["step"]]), self.n_chunks)
        per_epoch = len(_step_ends(0, self.n_chunks, part))
        return epoch * per_epoch + rest / _chunks_per_step(part) - part["step"]


def current_settings(training: Mapping[str, Any]) -> dict[str, int]:
    """Return the history's entry of a run that has not changed, with what decides its steps."""
    return {
        "step": 0,
        "processes": distributed.world_size(),
        "training.batch_size": training["batch_size"],
        "training.gradient_accumulation_steps": training["gradient_accumulation_steps"],
    }


def _chunks_per_step(part: Mapping[str, Any]) -> int:
    keys = ("processes", "training.batch_size", "training.gradient_accumulation_steps")
    return math.prod(part[key] for key in keys)


def _step_ends(start: int, epoch_end: int, part: Mapping[str, Any]) -> np.ndarray:
    """Return the number of chunks seen after each step from `start` to the end of its epoch.

    The last step takes the chunks that remain. If they are too few to give every process one, they
    join the step before it instead.
    """
    n_chunks = epoch_end - start
    processes = part["processes"]
    if n_chunks < processes:
        raise ValueError(
            f"{n_chunks} chunks for {processes} processes: use fewer processes or more text"
        )
    per_step = _chunks_per_step(part)
    n_steps, rest = divmod(n_chunks, per_step)
    if rest >= processes:
        n_steps += 1
    ends = start + per_step * np.arange(1, max(1, n_steps) + 1, dtype=np.int64)
    ends[-1] = epoch_end
    return ends
