"""Measure the loss of a model on held-out chunks, in total and by domain.

Trainer's eval_loss is a mean of batch means, which changes with the batch size if the last batch is
smaller. Here everything is a sum over tokens, divided once at the end.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from babyllama import distributed
from babyllama.training.batches import batches_per_step, read_rows, split_for_rank
from babyllama.training.loss import token_nlls

MAX_LOGITS = 2**27  # in memory at a time: 0.5 GB in float32


def choose_chunks(n_chunks: int, at_most: int) -> np.ndarray:
    """Choose `at_most` held-out chunks, or all if there are fewer: their numbers, sorted.

    The generator's seed is fixed, so that all models and seeds are scored on the same chunks.
    """
    if n_chunks <= at_most:
        return np.arange(n_chunks)
    return np.sort(np.random.default_rng(0).choice(n_chunks, at_most, replace=False))


class TokenDomains:
    """The domain of each token of some chunks of a prepared text.

    A chunk can extend over several files, so it can have tokens of several domains. BOS and EOS
    are from the domain of their document. `names` are the domains of the text, sorted.
    """

    def __init__(self, sources: list[dict], chunks: np.ndarray, length: int):
        """Take the sources in the report of the text, and chunk numbers (N,) of `length` tokens."""
        self.source_starts = np.cumsum([0] + [source["tokens"] for source in sources[:-1]])
        self.names = sorted({source["domain"] for source in sources})
        self.source_ids = np.array([self.names.index(source["domain"]) for source in sources])
        self.first_tokens = chunks * length
        self.length = length

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Return the index into `names` for each token of the chunks at `rows` (B,): (B, T)."""
        positions = self.first_tokens[rows][:, None] + np.arange(self.length)
        sources = np.searchsorted(self.source_starts, positions, side="right") - 1
        return self.source_ids[sources]


def chunks_per_pass(batch_size: int, length: int, vocab_size: int) -> int:
    """Return how many chunks are evaluated at once: a batch, or what MAX_LOGITS permits."""
    return min(batch_size, max(1, MAX_LOGITS // (length * vocab_size)))


@torch.no_grad()
def evaluate_chunks(
    model,
    chunks,
    byte_lengths: torch.Tensor,
    batch_size: int,
    document_bos_id: int | None = None,
    across_ranks: bool = False,
    domains: TokenDomains | None = None,
) -> dict[str, float | dict]:
    """Return the loss of a model on full chunks.

    Every token of a chunk except the first is predicted from the tokens before it, or only from
    those of its document if `document_bos_id` is the id of BOS. `byte_lengths` (V,) is that of
    data/tokenizer.py. With `across_ranks` the processes share the work, and all of them return the
    same result.

    The keys are `loss` (nats per predicted token), `perplexity` (its exponential), `bits_per_byte`
    (all nats, including those of </s>, over log 2 and `bytes`; None without bytes), and the number
    of predicted `tokens` and of their UTF-8 `bytes`. If predicted tokens are from two or more of
    `domains`, `by_domain` holds the same for each of these.
    """
    was_training = model.training
    model.eval()

    # split the chunks into batches whose logits fit into memory
    batch_size = chunks_per_pass(batch_size, len(chunks[0]["input_ids"]), model.config.vocab_size)
    rows = np.arange(len(chunks))
    batches = np.array_split(rows, math.ceil(len(rows) / batch_size))
    across_ranks = across_ranks and 1 < distributed.world_size() <= len(chunks)
    if across_ranks:
        n_batches = batches_per_step(len(chunks), batch_size)
        batches = split_for_rank(rows, n_batches)

    # sum over the tokens of each domain, in float64, which counts exactly up to 2**53
    names = domains.names if domains else ["all"]
    sums = np.zeros((len(names), 3))  # nats, tokens, bytes
    for batch_rows in batches:
        ids = np.stack([row["input_ids"] for row in read_rows(chunks, batch_rows.tolist())])
        input_ids = torch.from_numpy(ids.astype(np.int64))  # (B, T)
        targets = input_ids[:, 1:]  # (B, T - 1)
        nlls = token_nlls(model, input_ids.to(model.device), document_bos_id).cpu().numpy()
        domain_ids = domains.ids(batch_rows)[:, 1:] if domains else np.zeros(targets.shape, int)
        # BOS has length -1 if the tokenizer adds a space after it, which no text has: take that
        # byte off the next token
        n_bytes = byte_lengths[targets].clamp(min=0) + byte_lengths[input_ids[:, :-1]].clamp(max=0)
        columns = (nlls, np.ones(targets.shape), n_bytes.numpy())
        for number, column in enumerate(columns):
            sums[:, number] += np.bincount(domain_ids.ravel(), column.ravel(), len(names))
    model.train(was_training)
    if across_ranks:
        sums = distributed.all_reduce_sum(torch.tensor(sums, device=model.device)).cpu().numpy()

    scores = _scores(*sums.sum(axis=0).tolist())
    by_domain = {
        name: _scores(*row) for name, row in zip(names, sums.tolist(), strict=True) if row[1]
    }
    return scores | ({"by_domain": by_domain} if len(by_domain) > 1 else {})


def _scores(nll: float, tokens: float, n_bytes: float) -> dict[str, float]:
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700.0)),
        "bits_per_byte": nll / math.log(2) / n_bytes if n_bytes > 0 else None,
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }
