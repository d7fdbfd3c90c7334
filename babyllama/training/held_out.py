"""Measure the loss of a model on held-out chunks.

Trainer's eval_loss is a mean of batch means, which changes with the batch size if the last batch is
smaller. Here everything is a sum over tokens, divided once at the end.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.utils.data import DataLoader

from babyllama.training import distributed
from babyllama.training.chunks import collate_chunks
from babyllama.training.loss import NextTokenLoss

MAX_LOGITS = 2**27  # in memory at a time: 0.5 GB in float32


@torch.no_grad()
def evaluate_chunks(
    model,
    chunks,
    byte_lengths: torch.Tensor,
    batch_size: int,
    document_bos_id: int | None = None,
    across_ranks: bool = False,
) -> dict[str, float]:
    """Return the loss of a model on full chunks.

    Every token of a chunk except the first is predicted from the tokens before it, or only from
    those of its document if `document_bos_id` is the id of BOS. `byte_lengths` (V,) is that of
    data/tokenizer.py. With `across_ranks` the processes share the work, and all
    of them return the same result.


    The keys are `loss` (nats per predicted token), `perplexity` (its exponential), `bits_per_byte`
    (all nats, including those of </s>, over log 2 and `bytes`), and the number of predicted
    `tokens` and of their UTF-8 `bytes`.
    """
    was_training = model.training
    model.eval()
    loss = NextTokenLoss(dtype=torch.float32, document_bos_id=document_bos_id)

    # split the chunks into batches whose logits fit into memory
    chunk_logits = len(chunks[0]["input_ids"]) * model.config.vocab_size
    batch_size = min(batch_size, max(1, MAX_LOGITS // chunk_logits))
    batches = {"batch_size": batch_size}
    across_ranks = across_ranks and 1 < distributed.world_size() <= len(chunks)
    if across_ranks:
        n_batches = distributed.batches_per_step(len(chunks), batch_size)
        batches = {"batch_sampler": distributed.split_for_rank(np.arange(len(chunks)), n_batches)}
    # DataLoader draws a seed even if it does not shuffle. From the global generator that would
    # change the dropout of all later training steps.
    loader = DataLoader(chunks, collate_fn=collate_chunks, generator=torch.Generator(), **batches)

    nll = 0.0
    tokens = 0
    n_bytes = 0
    for batch in loader:
        input_ids = batch["input_ids"]
        nll += loss(model, input_ids.to(model.device)).item()
        tokens += input_ids[:, 1:].numel()
        # the -1 of a BOS corrects the token after it
        n_bytes += byte_lengths[input_ids[:, 1:]].clamp(min=0).sum().item()
        n_bytes += byte_lengths[input_ids[:, :-1]].clamp(max=0).sum().item()
    model.train(was_training)
    if across_ranks:
        # float64 counts exactly up to 2**53
        sums = torch.tensor([nll, tokens, n_bytes], dtype=torch.float64, device=model.device)
        nll, tokens, n_bytes = distributed.all_reduce_sum(sums).tolist()
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700.0)),
        "bits_per_byte": nll / math.log(2) / n_bytes,
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }
