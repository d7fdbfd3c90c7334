"""Choose the chunks of each batch of each process.

A chunk is a row of a prepared dataset: `input_ids`, exactly T tokens of text and no padding.

    loader = train_loader(train_dataset, Steps(n_chunks, training), args, collate_chunks)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import DataLoader

from babyllama.distributed import rank, world_size
from babyllama.training.steps import Steps

# ---- rows ---------------------------------------------------------------------------------------


def read_rows(chunks, indices: list[int]) -> list[dict]:
    """Return rows of a dataset or list; a dataset reads them together seven times as fast."""
    if hasattr(chunks, "__getitems__"):
        return chunks.__getitems__(indices)
    return [chunks[index] for index in indices]


class ShiftedChunks:
    """Cut the chunks at a different offset in each epoch, so that a row spans two stored chunks.

    The offset (0 to T - 1) depends only on the seed and the epoch, so a resumed run cuts the same
    chunks.
    """

    def __init__(self, chunks, seed: int):
        self.chunks = chunks
        self.seed = seed
        self.offset = 0
        self.length = len(chunks[0]["input_ids"])

    def set_epoch(self, epoch: int) -> None:
        """Move the cuts. accelerate's loader calls this from its own set_epoch."""
        self.offset = self.offset_in(epoch)

    def offset_in(self, epoch: int) -> int:
        return int(np.random.default_rng((self.seed, epoch)).integers(self.length))

    def __len__(self) -> int:
        return len(self.chunks) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """Return the rows of a batch. DataLoader calls this if it exists.

        Reading the rows one by one takes nine times as long.
        """
        neighbours = np.repeat(indices, 2) + np.tile([0, 1], len(indices))
        pairs = np.asarray(self.chunks[neighbours.tolist()]["input_ids"])
        pairs = pairs.reshape(len(indices), 2 * self.length)
        return [{"input_ids": pair[self.offset : self.offset + self.length]} for pair in pairs]


# ---- batches ------------------------------------------------------------------------------------


def batches_per_step(n_chunks: int, batch_size: int, at_most: int | None = None) -> int:
    """Return the number of batches into which each process splits its share of `n_chunks`.

    A batch has up to `batch_size` chunks. Batches become larger, and fewer, if one would be empty
    or if there would be more than `at_most`.
    """
    needed = math.ceil(n_chunks / (batch_size * world_size()))
    batches = max(1, min(needed, n_chunks // world_size()))
    return min(batches, at_most) if at_most else batches


def split_for_rank(chunks: np.ndarray, n_batches: int) -> list[np.ndarray]:
    """Return this process's share of the chunks, as `n_batches` batches.

    Every chunk is in exactly one batch of one process, and batch sizes differ by at most one.
    """
    return np.array_split(chunks, n_batches * world_size())[rank() :: world_size()]


class ExactBatchSampler:
    """Yield this process's batches of an epoch, so that all processes together see each chunk once.

    The steps hold the same chunks as those of a single process. accelerate's sampler and torch's
    DistributedSampler cannot do this: they repeat or drop chunks to make all shares equal.
    """

    drop_last = False

    def __init__(self, sampler, steps: Steps, batch_size: int, accumulation: int):
        """Split the chunks in the order of `sampler`, which is the same in every process."""
        self.sampler = sampler
        self.steps = steps
        self.batch_size = batch_size
        self.accumulation = accumulation

    def _n_batches(self) -> list[int]:
        """Return the number of batches of each step of the sampler's epoch.

        Only the last step of an epoch may have fewer than `accumulation`. Steps before a change of
        their size have as many too, although a batch may then be empty: a resumed run skips them.
        """
        steps = self.steps.slices(self.sampler.epoch)
        last = steps[-1].stop - steps[-1].start
        n_last = batches_per_step(last, self.batch_size, self.accumulation)
        return [self.accumulation] * (len(steps) - 1) + [n_last]

    def __len__(self) -> int:
        return sum(self._n_batches())

    def __iter__(self) -> Iterator[list[int]]:
        slices = self.steps.slices(self.sampler.epoch)
        n_batches = self._n_batches()
        order = np.fromiter(self.sampler, dtype=np.int64)
        for chunks, n in zip(slices, n_batches, strict=True):
            for batch in split_for_rank(order[chunks], n):
                yield batch.tolist()


def train_loader(dataset, steps: Steps, args, collate):
    """Return this process's DataLoader for a Trainer; `args` are its TrainingArguments."""
    order = SeedableRandomSampler(dataset, generator=torch.Generator(), data_seed=args.data_seed)
    loader = DataLoader(
        dataset,
        batch_sampler=ExactBatchSampler(
            order, steps, args.per_device_train_batch_size, args.gradient_accumulation_steps
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        pin_memory=args.dataloader_pin_memory,
        # Otherwise the seeds of the workers come from the global generator, and come again after a
        # resume, which would change every later dropout mask.
        generator=torch.Generator().manual_seed(args.data_seed),
    )
    # accelerate moves the batches to the device and tells the sampler the epoch. It is told that
    # there is one process, because it would split the batches, which are our share already
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=torch.cuda.is_available(),
    )
