"""Everything done with a trained causal model: load it, score text with it, generate text from it.

The only place that samples (`generate`), and the one that computes log-probabilities (`token_logprobs`; minimal_pairs.py has
a fast pass for where only the best counts). It opens local model directories only, no remote code and no pickles.

    from inference import generate, load_model, token_logprobs
    model, tokenizer = load_model("models/quickstart")
    generate(model, tokenizer, ["Once upon a time"], max_new_tokens=40, seed=1)[0][0]
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from babyllama.evaluation.loading import check_ids, context_length, encode

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32768  # in one forward pass, padding included
HEAD_ELEMENTS = 2**23  # logits held at a time: 32 MB in float32


@dataclass(frozen=True)
class TokenScores:
    """The scored tokens of one text, in order: arrays of the same length (float64 values of float32 precision)."""

    ids: np.ndarray  # the tokens, without the one(s) that only serve as context
    logprobs: np.ndarray  # natural log of p(token | tokens before it)
    top_probs: np.ndarray | None = None  # the highest probability at that place
    entropies: np.ndarray | None = None  # of the whole distribution, in nats
    ranks: np.ndarray | None = (
        None  # of the token, 1 is the best; equal logits share the mean of their ranks
    )
    hits: np.ndarray | None = (
        None  # 1 where the token has the highest logit, 1/k where k tokens share it
    )


def token_logprobs(
    model, tokenizer, texts: Sequence, *, bos: bool = True, **options
) -> list[TokenScores]:
    """Log-probabilities of every token of each text (or list of ids), in the order given.

    With `bos` the text's first token is scored given BOS; without it the first token is context only and has no score.
    `options` are those of `ids_logprobs`.
    """
    return ids_logprobs(model, encode(tokenizer, texts, bos), **options)


def ids_logprobs(
    model, sequences: Sequence[Sequence[int]], *, starts: Sequence[int] | None = None, context: int | None = None,
    stride: int | None = None, batch_tokens: int | None = None, stats: bool = False,
) -> list[TokenScores]:  # fmt: skip
    """log p(ids[i] | ids[:i]) for i from `starts` (default 1) on, for each sequence of ids, as TokenScores.

    A sequence longer than `context` (default and limit: the model's) is scored in windows that move by `stride`
    (default half the context). Each token counts once, in the first window that reaches it, so it has at least
    context - stride + 1 tokens before it; the last window is a full one. `batch_tokens` bounds a forward pass and
    changes nothing else. Logits are float32 products also where the weights are bfloat16 (except what an architecture
    with a head of its own returns). `stats` fills the optional arrays. Equal sequences share their arrays.
    """
    context = context_length(model) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    sequences = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    starts = [1] * len(sequences) if starts is None else starts
    _check(model, sequences, starts, context, stride)
    windows, places, known, total = [], [], {}, 0
    for ids, start in zip(sequences, starts, strict=True):
        key = (ids.tobytes(), start)
        if key not in known:  # identical requests are scored once
            known[key] = total
            windows += _windows(ids, start, context, stride, total)
            total += len(ids[start:])
        places.append(known[key])
    columns = np.empty((5 if stats else 1, total))
    windows.sort(
        key=lambda w: w.begin - w.end
    )  # longest first: a batch too large for the memory fails at once
    if windows:
        batch_tokens = batch_tokens or (
            CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
        )
        with float32_inference(model):
            body, head = _split_head(model, windows[0].ids[:16])
            for batch in tqdm(
                list(_batches(windows, batch_tokens)), desc="scoring", disable=None, delay=5
            ):
                for window, values in zip(
                    batch, _score(body, head, model, batch, stats), strict=True
                ):
                    columns[:, window.at : window.at + values.shape[1]] = values
    return [
        TokenScores(ids[start:], *columns[:, at : at + len(ids[start:])])
        for ids, start, at in zip(sequences, starts, places, strict=True)
    ]


def _check(
    model, sequences: Sequence[np.ndarray], starts: Sequence[int], context: int, stride: int
) -> None:
    longest = context_length(model)
    if not 1 <= context <= longest:
        raise ValueError(f"context {context} is outside 1..{longest}, what the model can look at")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride {stride} is outside 1..{context}, the context: tokens would be left out"
        )
    if (low := min(starts, default=1)) < 1:
        where = f"starts[{list(starts).index(low)}] is {low}"
        raise ValueError(f"{where}: the token at 0 has nothing before it, so use 1 or more")
    check_ids(model, sequences)


class _Window(NamedTuple):
    ids: np.ndarray  # of the whole sequence
    begin: int  # inputs are ids[begin : end - 1]
    first: int  # tokens scored are ids[first : end]
    end: int
    at: int  # where the scores go in the columns of all results


def _windows(ids: np.ndarray, start: int, context: int, stride: int, at: int) -> Iterator[_Window]:
    """The windows that score ids[start:], each token in exactly one; inputs are at most `context` tokens."""
    first, end = 1, min(len(ids), context + 1)
    while first < end:
        scored_from = max(first, start)
        if scored_from < end:
            yield _Window(
                ids, max(0, end - 1 - context), scored_from, end, at + scored_from - start
            )
        first, end = end, min(len(ids), end + stride)


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[Sequence[_Window]]:
    """Runs of windows (sorted by length, longest first) whose padded size stays within `batch_tokens`."""
    while windows:
        rows = max(1, batch_tokens // (windows[0].end - 1 - windows[0].begin))
        yield windows[:rows]
        windows = windows[rows:]


@contextmanager
def float32_inference(model) -> Iterator[None]:
    """No dropout, no gradients, no reduced-precision matrix products; what was set before comes back."""
    training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)


def _split_head(model, probe: np.ndarray):
    """(body, head): body(input_ids) gives states (B, T, D), head(states) float32 logits (N, V).

    The head is applied by us, to the rows and in the pieces we want, where it is a linear layer on the last hidden
    state; that is tried on `probe`. Where it is not (logits scaled or capped), the body returns the model's own logits.
    """
    linear = model.get_output_embeddings()
    if isinstance(linear, torch.nn.Linear) and model.base_model is not model:
        ids = torch.as_tensor(probe, device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        if torch.allclose(
            linear(hidden).float(), logits.float(), rtol=1e-5, atol=1e-6, equal_nan=True
        ):
            weight, bias = (
                linear.weight.float(),
                None if linear.bias is None else linear.bias.float(),
            )
            body = functools.partial(model.base_model, use_cache=False)
            return lambda ids: body(ids).last_hidden_state, lambda states: F.linear(
                states.float(), weight, bias
            )
    return lambda ids: model(input_ids=ids, use_cache=False).logits, torch.Tensor.float


def _score(body, head, model, batch: Sequence[_Window], stats: bool) -> list[np.ndarray]:
    """For each window an array (1, n) of log-probabilities, or (5, n) with the statistics in TokenScores' order."""
    width, device = max(window.end - 1 - window.begin for window in batch), model.device
    # Padding on the right, without a mask: a causal model cannot look at it, and its rows are left out below.
    inputs = np.full((len(batch), width), batch[0].ids[0])  # (B, T)
    for row, window in zip(inputs, batch, strict=True):
        row[: window.end - 1 - window.begin] = window.ids[window.begin : window.end - 1]
    places = [
        np.arange(w.first - 1 - w.begin, w.end - 1 - w.begin) + i * width
        for i, w in enumerate(batch)
    ]
    targets = torch.as_tensor(
        np.concatenate([w.ids[w.first : w.end] for w in batch]), device=device
    )  # (N,)
    states = body(torch.as_tensor(inputs, device=device)).flatten(0, 1)  # (B*T, D)
    states = states[torch.as_tensor(np.concatenate(places), device=device)]  # (N, D)
    rows = max(1, HEAD_ELEMENTS // model.get_input_embeddings().weight.shape[0])
    pairs = zip(states.split(rows), targets.split(rows), strict=True)
    values = (
        torch.cat([_reduce(head(some), gold, stats) for some, gold in pairs], dim=1).cpu().numpy()
    )
    return np.split(values, np.cumsum([w.end - w.first for w in batch])[:-1], axis=1)


def _reduce(logits: torch.Tensor, gold: torch.Tensor, stats: bool) -> torch.Tensor:
    """Logits (N, V) and targets (N,) to (1, N) log-probabilities or (5, N) with the statistics."""
    if not stats:
        return -F.cross_entropy(logits, gold, reduction="none")[None]
    probs, own = logits.softmax(-1), logits.gather(1, gold[:, None])  # (N, V) and (N, 1)
    above, equal = (logits > own).sum(1), (logits == own).sum(1)
    ranks, hits = 1 + above + (equal - 1) / 2, (above == 0) / equal
    logprobs, entropies = (
        -F.cross_entropy(logits, gold, reduction="none"),
        -torch.xlogy(probs, probs).sum(1),
    )
    values = torch.stack([logprobs, probs.amax(1), entropies, ranks, hits])
    return torch.where(
        logprobs.isnan(), logprobs, values
    )  # NaN compares as false: no rank comes from it
