"""Turn chunks of token ids into batches for training.

A chunk is a row of a prepared dataset: `input_ids`, exactly T tokens of text and no padding.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import TrainerCallback


def collate_chunks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return input_ids and labels (B, T) int64 of a batch of chunks.

    There is no attention mask because chunks have no padding. Our loss does not read the labels,
    but Trainer counts them to weigh accumulated batches, so the first one is -100: no token comes
    before it that could predict it.
    """
    ids = np.stack([np.asarray(row["input_ids"]) for row in rows])
    input_ids = torch.from_numpy(ids.astype(np.int64))
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


class ShiftedChunks(TrainerCallback):
    """Cut the chunks at a different offset in each epoch, so that a row spans two stored chunks.

    The offset (0 to T - 1) depends only on the seed and the epoch, so a resumed run cuts the same
    chunks. This is a dataset and also a callback, because Trainer tells only callbacks that an
    epoch begins.
    """

    def __init__(self, chunks, seed: int):
        self.chunks = chunks
        self.seed = seed
        self.offset = 0
        self.length = len(chunks[0]["input_ids"])

    def on_epoch_begin(self, args, state, control, **kwargs):
        # state.epoch is a sum of fractions, so an epoch's end may be just below an integer
        self.offset = self.offset_in(int((state.epoch or 0) + 1e-6))

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
