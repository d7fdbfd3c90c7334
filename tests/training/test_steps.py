"""training/steps.py: the chunks of each step against a loop that hands them out one step at a time."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.training.optimizers import schedule
from babyllama.training.steps import Steps

BATCH, ACCUMULATION = "training.batch_size", "training.gradient_accumulation_steps"


def training_section(num_epochs: int, max_steps: int | None = None) -> dict:
    return {"num_epochs": num_epochs, "max_steps": max_steps}


def part(step: int, batch: int, accumulation: int = 1, processes: int = 1) -> dict:
    return {"step": step, BATCH: batch, ACCUMULATION: accumulation, "processes": processes}


sizes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(n=st.integers(9, 60), epochs=st.integers(1, 4),
       parts=st.lists(st.tuples(st.integers(1, 9), sizes), min_size=1, max_size=4))  # fmt: skip
def test_each_epoch_takes_each_chunk_once_whatever_changes(n, epochs, parts):
    history = []
    step = 0
    for length, size in parts:
        history.append(part(step, *size))
        step += length

    # a step takes its chunks, or all that are left if too few would remain for another step
    seen = [0]
    while seen[-1] < n * epochs:
        current = [p for p in history if p["step"] < len(seen)][-1]
        left = n - seen[-1] % n
        if left < current["processes"]:
            with pytest.raises(ValueError, match=f"{left} chunks for {current['processes']} proc"):
                Steps(n, training_section(epochs), history)
            return
        taken = min(left, current[BATCH] * current[ACCUMULATION] * current["processes"])
        seen.append(seen[-1] + (left if left - taken < current["processes"] else taken))

    steps = Steps(n, training_section(epochs), history)
    assert steps.chunks_seen.tolist() == seen
    assert [seen[step] for step in steps.epoch_ends] == [n * epoch for epoch in range(epochs + 1)]
    for epoch in range(epochs):
        taken = [i for chunks in steps.slices(epoch) for i in range(chunks.start, chunks.stop)]
        assert taken == list(range(n))
    for step, chunks in enumerate(seen[:-1]):
        epoch, done = steps.epoch_at(step)
        assert epoch == chunks // n
        assert steps.slices(epoch)[done].start == chunks % n

    for max_steps in (1, len(seen) // 2 or 1, len(seen) - 1, len(seen) + 5):
        fewer = Steps(n, training_section(epochs, max_steps), history)
        assert fewer.total == min(max_steps, len(seen) - 1)
        assert fewer.available == len(seen) - 1
        assert fewer.epochs == math.ceil(seen[fewer.total] / n)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_the_schedule_goes_by_text_seen(kind):
    """After a change of the batch size, each chunk gets the rate that a run of this size gives it."""
    keys = {"lr": 1.0, "min_lr": 0.1, "lr_scheduler": kind, "warmup_steps": 0, "warmup_ratio": 0.2}
    usual = Steps(96, training_section(2), [part(0, 16)])
    expected = schedule(keys, usual.total)
    rates = {int(usual.chunks_seen[step]): expected(step) for step in range(usual.total)}
    changed = Steps(96, training_section(2), [part(0, 8), part(6, 16)])
    factor = schedule(keys, changed.total + changed.schedule_lead)
    for step in range(6, changed.total):
        rate = factor(step + changed.schedule_lead)
        assert rate == pytest.approx(rates[int(changed.chunks_seen[step])])
    assert usual.schedule_lead == 0
