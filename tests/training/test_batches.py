"""Check which chunks each process gets in each step."""

import itertools

import numpy as np
import pytest
from accelerate import skip_first_batches
from datasets import Dataset
from transformers import TrainingArguments

from babyllama.training.batches import ExactBatchSampler, ShiftedChunks, train_loader
from babyllama.training.steps import Steps
from babyllama.training.trainer import collate_chunks


@pytest.fixture
def processes(monkeypatch):
    """Return a function: processes(4, rank=1) makes this process the second of four."""

    def set_processes(count, rank=0):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", str(rank))

    return set_processes


class Shuffled:
    """A sampler of the numbers 0 to n - 1 in a fixed random order."""

    epoch = 0

    def __init__(self, n):
        self.order = np.random.default_rng(n).permutation(n).tolist()

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


def training_section(batch_size: int, accumulation: int, num_epochs: int) -> dict:
    """Return the keys of the training section that decide the steps of a run."""
    return {
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_epochs": num_epochs,
        "max_steps": None,
    }


def chunks_by_step(batches_by_rank: list[list[list[int]]], accumulation: int) -> list[list[int]]:
    """Return the sorted chunks of each optimizer step, over all processes."""
    steps = []
    for start in range(0, len(batches_by_rank[0]), accumulation):
        step = []
        for batches in batches_by_rank:
            for batch in batches[start : start + accumulation]:
                step.extend(batch)
        steps.append(sorted(step))
    return steps


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (3, 1), (1, 3), (1, 1)])
def test_every_chunk_is_in_one_batch_of_one_process(processes, count, batch_size, accumulation):
    """Steps are those of one process; what is too little for a step of its own joins the last."""
    per_step = count * batch_size * accumulation
    for n in range(count, 3 * per_step + count + 2):
        order = Shuffled(n)
        batches_by_rank = []
        for rank in range(count):
            processes(count, rank)
            training = training_section(batch_size, accumulation, num_epochs=2)
            layout = Steps(n, training)
            sampler = ExactBatchSampler(order, layout, batch_size, accumulation)
            batches_by_rank.append(list(sampler))
            assert len(sampler) == len(batches_by_rank[-1])
        batches = [batch for rank_batches in batches_by_rank for batch in rank_batches]
        assert len({len(rank_batches) for rank_batches in batches_by_rank}) == 1
        assert sorted(chunk for batch in batches for chunk in batch) == list(range(n))
        assert all(batches), "an empty batch"
        rest = n % per_step
        joins_last_step = 0 < rest < count
        assert max(map(len, batches)) <= batch_size + (joins_last_step or batch_size == 1)

        expected = [sorted(order.order[i : i + per_step]) for i in range(0, n, per_step)]
        if joins_last_step and len(expected) > 1:
            expected[-2:] = [sorted(expected[-2] + expected[-1])]
        steps = chunks_by_step(batches_by_rank, accumulation)
        assert steps == expected
        two_epochs = [len(step) for step in 2 * steps]
        assert layout.chunks_seen.tolist() == list(itertools.accumulate(two_epochs, initial=0))
        assert layout.epoch_ends.tolist() == [0, len(steps), 2 * len(steps)]


def test_more_processes_than_chunks_is_an_error(processes):
    processes(4)
    with pytest.raises(ValueError, match="3 chunks for 4 processes"):
        Steps(3, training_section(1, 1, num_epochs=1))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_random_offset_moves_the_cuts_of_each_epoch(n_workers, tmp_path):
    """The rows of an epoch begin at its offset, also when its first batches are skipped."""
    tokens = np.arange(12 * 8).reshape(12, 8)  # the first token of a row tells where it was cut
    chunks = Dataset.from_dict({"input_ids": tokens}).with_format("numpy")
    shifted = ShiftedChunks(chunks, seed=1)
    steps = Steps(len(shifted), training_section(4, 1, 3))
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        data_seed=5,
        use_cpu=True,
        dataloader_num_workers=n_workers,
    )
    loader = train_loader(shifted, steps, arguments, collate_chunks)
    offsets = [shifted.offset_in(epoch) for epoch in range(3)]
    assert len(set(offsets)) > 1
    for epoch, offset in enumerate(offsets):
        loader.set_epoch(epoch)
        batches = [batch["input_ids"] for batch in loader]
        starts = sorted(int(row[0]) for batch in batches for row in batch)
        assert starts == [8 * row + offset for row in range(11)]
        loader.set_epoch(epoch)  # the sampler has gone on to the next one
        rest = [batch["input_ids"] for batch in skip_first_batches(loader, 1)]
        assert all(a.equal(b) for a, b in zip(rest, batches[1:], strict=True))
