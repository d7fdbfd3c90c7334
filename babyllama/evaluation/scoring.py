"""Compute log-probabilities of tokens: the one kernel behind evaluate.py and benchmark.py.

    for scores in token_logprobs(model, tokenizer, ["Once upon a time", "The end"]):
        print(scores.logprobs.sum())

Perplexity, bits per byte, entropy and the scores of minimal pairs are all sums over its output, so
they agree with each other. Logits are float32. A text longer than the context is scored in
overlapping windows, so that every token has some context, and each token counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from babyllama.evaluation.loading import check_ids, context_length, encode

CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 32768
MAX_LOGITS = 2**23  # in memory at a time: 32 MB in float32


@dataclass(frozen=True)
class TokenScores:
    """The scored tokens of one text, in order: arrays of equal length and float32 precision."""

    ids: np.ndarray  # excludes tokens that only serve as context
    logprobs: np.ndarray  # log p(token | tokens before it), in nats
    top_probs: np.ndarray | None = None  # the highest probability that any token has here
    entropies: np.ndarray | None = None  # of the predicted distribution, in nats
    ranks: np.ndarray | None = None  # of the token; 1 is best, ties share their mean rank
    hits: np.ndarray | None = None  # 1 if the token has the highest logit, 1/k in a tie of k
    set_logprobs: np.ndarray | None = None  # log p(any token of a given set | tokens before it)


def token_logprobs(
    model, tokenizer, texts: Sequence, *, bos: bool = True, **options
) -> list[TokenScores]:
    """Score every token of each text (or list of token ids), in the order given.

    With `bos` the first token is scored after BOS. Without it nothing precedes the first token, so
    it has no score and only serves as context. `options` are those of `ids_logprobs`.
    """
    return ids_logprobs(model, encode(tokenizer, texts, bos), **options)


def ids_logprobs(
    model,
    sequences: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    stats: bool = False,
    token_set: np.ndarray | None = None,
) -> list[TokenScores]:
    """Score ids[i] given ids[:i] in each sequence, for every i from its start (default 1) on.

    A sequence longer than `context` (default and maximum: the model's) is scored in windows that
    move by `stride` (default: half the context). Each token is scored in the first window that
    reaches it, so beyond the first window it sees at least context - stride + 1 tokens. The last
    window is as long as the others.

    `batch_tokens` limits the size of a forward pass and does not change the scores. `stats` fills
    the optional arrays except `set_logprobs`, which needs `token_set` too, a bool for each logit
    (V,). Identical sequences are scored only once. Logits are computed in float32 even if the
    weights are bfloat16, except for architectures whose head is not a single linear layer.
    """
    context = context_length(model) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    sequences = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    starts = [1] * len(sequences) if starts is None else starts
    _check_request(model, sequences, starts, context, stride)

    # reserve a stretch of one array for the scores of each distinct request; cut it into windows
    windows: list[_Window] = []
    offsets = []  # of the scores of each sequence
    offset_of_request = {}
    total = 0
    for ids, start in zip(sequences, starts, strict=True):
        request = (ids.tobytes(), start)
        if request not in offset_of_request:
            offset_of_request[request] = total
            windows += _windows(ids, start, context, stride, total)
            total += len(ids[start:])
        offsets.append(offset_of_request[request])

    # score the longest windows first, so that a batch that does not fit into memory fails at once
    windows.sort(key=lambda window: -len(window.inputs))
    n_arrays = 1
    if stats:
        n_arrays = 5 if token_set is None else 6
    scores = np.empty((n_arrays, total))  # in the order of the fields of TokenScores
    if token_set is not None:
        token_set = torch.as_tensor(token_set, device=model.device)
    if windows:
        limit = batch_tokens or default_batch_tokens(model)
        window_batches = list(batches(windows, lambda window: len(window.inputs), limit))
        with float32_inference(model):
            body, head = _split_model(model, windows[0].inputs[:16])
            for batch in tqdm(window_batches, desc="scoring", disable=None, delay=5):
                batch_scores = _score_batch(model, body, head, batch, stats, token_set)
                for window, values in zip(batch, batch_scores, strict=True):
                    scores[:, window.offset : window.offset + len(window.targets)] = values

    results = []
    for ids, start, offset in zip(sequences, starts, offsets, strict=True):
        targets = ids[start:]
        results.append(TokenScores(targets, *scores[:, offset : offset + len(targets)]))
    return results


def _check_request(
    model, sequences: Sequence[np.ndarray], starts: Sequence[int], context: int, stride: int
) -> None:
    limit = context_length(model)
    if not 1 <= context <= limit:
        raise ValueError(f"context {context} is outside 1..{limit}, the model's context length")
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride} is outside 1..{context}: windows would skip tokens")
    for index, start in enumerate(starts):
        if start < 1:
            raise ValueError(
                f"starts[{index}] is {start}: nothing precedes token 0, so use 1 or more"
            )
    check_ids(model, sequences)


class _Window(NamedTuple):
    """One forward pass over part of a sequence; its last len(targets) predictions are scored."""

    inputs: np.ndarray
    targets: np.ndarray
    offset: int  # of these scores in the array of all scores


def _windows(
    ids: np.ndarray, start: int, context: int, stride: int, offset: int
) -> Iterator[_Window]:
    """Yield the windows that together score ids[start:], each token once."""
    first = 1  # target that the window reaches first
    end = min(len(ids), context + 1)
    while first < end:
        scored_from = max(first, start)
        if scored_from < end:
            inputs = ids[max(0, end - 1 - context) : end - 1]
            yield _Window(inputs, ids[scored_from:end], offset + scored_from - start)
        first = end
        end = min(len(ids), end + stride)


def batches(rows: Sequence, length: Callable, batch_tokens: int) -> Iterator[Sequence]:
    """Yield runs of rows (longest first) whose padded size is at most `batch_tokens`."""
    start = 0
    while start < len(rows):
        end = start + max(1, batch_tokens // length(rows[start]))
        yield rows[start:end]
        start = end


def default_batch_tokens(model) -> int:
    """Return how many tokens, including padding, one forward pass reads by default."""
    return CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS


@contextmanager
def float32_inference(model) -> Iterator[None]:
    """Turn off dropout, gradients and reduced-precision (TF32) products, then restore them."""
    training = model.training
    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)


def _split_model(model, probe: np.ndarray) -> tuple[Callable, Callable]:
    """Return (body, head): ids (B, T) -> states (B, T, D), and states (N, D) -> logits (N, V).

    Most logits are never used, so the head is applied only at the places that are scored, and in
    float32. That is correct only if the model's logits are a linear layer on the last hidden state
    and nothing else, which is checked on the ids `probe`. Otherwise, for example if a model scales
    or caps its logits, the body returns the model's logits and the head just converts them.
    """
    linear = model.get_output_embeddings()
    if isinstance(linear, torch.nn.Linear) and model.base_model is not model:
        ids = torch.as_tensor(probe, device=model.device)[None]  # (1, T)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        states = model.base_model(ids, use_cache=False).last_hidden_state
        if torch.allclose(linear(states).float(), logits, rtol=1e-5, atol=1e-6, equal_nan=True):
            weight = linear.weight.float()
            bias = None if linear.bias is None else linear.bias.float()
            return (
                lambda ids: model.base_model(ids, use_cache=False).last_hidden_state,
                lambda states: F.linear(states.float(), weight, bias),
            )
    return lambda ids: model(input_ids=ids, use_cache=False).logits, torch.Tensor.float


def _score_batch(
    model,
    body: Callable,
    head: Callable,
    batch: Sequence[_Window],
    stats: bool,
    token_set: torch.Tensor | None,
) -> list[np.ndarray]:
    """Return an array (1, n) of log-probabilities for each window.

    It is (5, n) with statistics, and (6, n) with those and a token set.
    """
    # pad on the right; no mask is needed, because a causal model never looks at later tokens
    width = len(batch[0].inputs)  # the longest
    inputs = np.full((len(batch), width), batch[0].inputs[0])  # (B, T)
    places = []  # of the scored predictions among all B*T
    for row, window in enumerate(batch):
        inputs[row, : len(window.inputs)] = window.inputs
        end = row * width + len(window.inputs)
        places.append(np.arange(end - len(window.targets), end))
    places = torch.as_tensor(np.concatenate(places), device=model.device)  # (N,)
    targets = np.concatenate([window.targets for window in batch])
    targets = torch.as_tensor(targets, device=model.device)  # (N,)

    states = body(torch.as_tensor(inputs, device=model.device)).flatten(0, 1)[places]  # (N, D)
    rows = max(1, MAX_LOGITS // model.get_input_embeddings().weight.shape[0])
    slices = zip(states.split(rows), targets.split(rows), strict=True)
    scores = [_score_logits(head(part), ids, stats, token_set) for part, ids in slices]
    scores = torch.cat(scores, dim=1)
    ends = np.cumsum([len(window.targets) for window in batch])
    return np.split(scores.cpu().numpy(), ends[:-1], axis=1)


def _score_logits(
    logits: torch.Tensor, targets: torch.Tensor, stats: bool, token_set: torch.Tensor | None
) -> torch.Tensor:
    """Return log-probabilities (1, N) of targets (N,) by logits (N, V).

    The result is (5, N) with `stats`, and (6, N) with `stats` and a `token_set` (V,).
    """
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    if not stats:
        return logprobs[None]
    probs = logits.softmax(-1)  # (N, V)
    entropies = -torch.xlogy(probs, probs).sum(1)
    target_logits = logits.gather(1, targets[:, None])  # (N, 1)
    higher = (logits > target_logits).sum(1)
    equal = (logits == target_logits).sum(1)  # the target included
    ranks = 1 + higher + (equal - 1) / 2
    hits = (higher == 0) / equal
    scores = [logprobs, probs.amax(1), entropies, ranks, hits]
    if token_set is not None:
        in_set = logits.masked_fill(~token_set, -torch.inf)
        scores.append(in_set.logsumexp(1) - logits.logsumexp(1))
    scores = torch.stack(scores)
    # comparisons with NaN are False, so NaN logits would seem to have a good rank
    return torch.where(logprobs.isnan(), logprobs, scores)
