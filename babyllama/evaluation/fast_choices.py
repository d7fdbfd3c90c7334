"""Find the best candidate of multiple-choice items in a fraction of the time that float32 takes.

    scores, precision = relative_scores(model, ids, starts, counts)

Most items have a clear winner, which a rough score is enough to find. So a fast pass scores all
candidates, in prefix trees and in the machine's fastest number format, and only the close items are
scored again in float32 by scoring.py. To know what is close, a sample of the items is scored both
ways. Errors of single tokens add up like a random walk, so margins and errors are compared per
square root of the number of tokens. A winner is clear if its margin is more than twice the largest
error measured on any item that float32 scored: the sample and all close items.

That error is measured, not proved. Float32 could choose differently in an item that it did not
score, if the error of that item is larger than any that was measured. `precision` states the
largest one in nats. Use these scores only to choose a candidate; numbers that are reported as
log-probabilities come from scoring.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from babyllama.architectures import MODEL_TYPES
from babyllama.device import fast_dtype
from babyllama.evaluation.loading import check_ids, context_length
from babyllama.evaluation.prefix_tree import PrefixTree, build_trees, shared_length, tree_inputs
from babyllama.evaluation.scoring import (
    MAX_LOGITS,
    batches,
    default_batch_tokens,
    float32_inference,
    ids_logprobs,
)

SAMPLE_ITEMS = 256  # scored both ways, to measure the error
SAFETY_FACTOR = 2.0  # a clear margin is this many times the largest error per sqrt(tokens)
MIN_MARGIN = 1e-4  # nats; a smaller margin is never clear
GPU_FLOPS_WORTH_A_TREE = 1e14  # an H200 takes two or three seconds for them
CPU_HEAD_TILE = (512, 1024)  # states x tokens: 2 MB of float32 logits, which stay in the cache


def relative_scores(
    model, ids: Sequence[list[int]], starts: Sequence[int], counts: Sequence[int]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return (a score in nats of each text, their precision); compare scores of one item only.

    `ids` has the candidates item by item, `counts` the number of candidates of each item, and
    `starts` the first scored token of each candidate. Tokens that all candidates of an item share
    are left out, so only the difference of two scores has a meaning: it is the difference of the
    summed log-probabilities. `precision` has `items`, `float32_items` (how many were scored in
    float32) and, if that is not all of them, `fast` (the number format) and `largest_error_nats`.
    """
    check_ids(model, ids)
    counts = np.asarray(counts)
    starts = skip_shared_tokens(ids, starts, counts, context_length(model))
    item_of_text = np.repeat(np.arange(len(counts)), counts)
    # the error of an item grows with the square root of its tokens
    tokens = [len(text) - start for text, start in zip(ids, starts, strict=True)]
    scale = np.sqrt(np.bincount(item_of_text, tokens).clip(min=1))

    # 1. score everything in the fast format, unless that does not pay
    dtype = fast_dtype(model.device)
    fast_scores = np.full(len(ids), np.nan)
    pending = np.arange(len(counts))  # items to score in float32
    if len(counts) > 2 * SAMPLE_ITEMS and _fast_pass_pays(model, ids):
        pending = np.linspace(0, len(counts) - 1, SAMPLE_ITEMS).astype(int)
        fast_scores = fast_sums(model, ids, starts, dtype)
    margins = _margins(fast_scores, counts)

    # 2. score the sample in float32, then all close items; repeat, since their errors can show
    # that more items are close
    scores = fast_scores.copy()
    in_float32 = np.zeros(len(counts), dtype=bool)
    while len(pending):
        in_float32[pending] = True
        texts = np.flatnonzero(np.isin(item_of_text, pending))
        token_scores = ids_logprobs(
            model, [ids[text] for text in texts], starts=[starts[text] for text in texts]
        )
        scores[texts] = [text.logprobs.sum() for text in token_scores]
        errors = _spreads(scores - fast_scores, counts)  # NaN without a fast score
        measured = in_float32 & ~np.isnan(errors)
        error = (errors / scale)[measured].max() if measured.any() else np.inf
        clear = margins > np.maximum(MIN_MARGIN, SAFETY_FACTOR * error * scale)
        pending = np.flatnonzero(~in_float32 & ~clear)

    precision: dict[str, Any] = {"items": len(counts), "float32_items": int(in_float32.sum())}
    if not in_float32.all():
        precision["fast"] = str(dtype).removeprefix("torch.")
        precision["largest_error_nats"] = float(errors[measured].max())
    return scores, precision


def skip_shared_tokens(
    ids: Sequence[list[int]], starts: Sequence[int], counts: np.ndarray, context: int
) -> list[int]:
    """Move the start of each text past the tokens that all texts of its item share.

    Shared tokens have the same log-probability in every candidate, so they do not affect the choice
    and need no score. A text longer than the context is an exception: it is read in windows, which
    differ between candidates, so its start stays.
    """
    starts = list(starts)
    first = 0
    for count in counts.tolist():
        item = slice(first, first + count)
        fits = max(len(text) for text in ids[item]) <= context + 1
        if fits and len(set(starts[item])) == 1:
            # in alphabetical order the first and the last text share the least
            shared = shared_length(min(ids[item]), max(ids[item]))
            starts[item] = [max(starts[first], shared)] * count
        first += count
    return starts


def _fast_pass_pays(model, ids: Sequence[list[int]]) -> bool:
    """Return False for a model that train.py cannot build, because it may not read prefix trees.

    Also return False if a GPU can score all texts in float32 before Python has built the trees.
    """
    if model.config.model_type not in MODEL_TYPES:
        return False
    flops = 2 * sum(map(len, ids)) * sum(p.numel() for p in model.parameters())
    return model.device.type != "cuda" or flops >= GPU_FLOPS_WORTH_A_TREE


def _margins(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return best minus second-best score of each item; NaN if one of its scores is NaN."""
    order = np.lexsort((scores, np.repeat(np.arange(len(counts)), counts)))  # NaN comes last
    best = np.cumsum(counts) - 1
    return np.where(counts > 1, scores[order][best] - scores[order][best - 1], np.inf)


def _spreads(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the largest minus the smallest value of each item; NaN if one of them is NaN."""
    first = np.cumsum(counts) - counts
    return np.maximum.reduceat(values, first) - np.minimum.reduceat(values, first)


# ---- the fast pass ------------------------------------------------------------------------------


def fast_sums(
    model, ids: Sequence[list[int]], starts: Sequence[int], dtype: torch.dtype
) -> np.ndarray:
    """Return the sum of log p of ids[start:] of each text (N,), from prefix trees in `dtype`.

    The model must be one of MODEL_TYPES: its attention uses the mask and the positions that it is
    given, and its head is a linear layer. A text longer than the context gets NaN.
    """
    sums = np.full(len(ids), np.nan)
    head = model.get_output_embeddings()
    # convert the parameters only: buffers such as rotary frequencies need float32
    body_weights = {n: p.detach().to(dtype) for n, p in model.base_model.named_parameters()}
    head_weight = head.weight.detach().to(dtype)

    trees = build_trees([text[:-1] for text in ids], context_length(model))
    with float32_inference(model), _eager_attention_on_a_cpu(model):
        tree_batches = list(
            batches(trees, lambda tree: len(tree.tokens), default_batch_tokens(model))
        )
        for batch in tqdm(tree_batches, desc="scoring", disable=None, delay=5):
            states = _tree_states(model, body_weights, batch)  # (B*T, D)

            # the state at the place of a token predicts the next token of its text
            width = len(batch[0].tokens)
            texts = []
            places = []
            targets = []
            for row, tree in enumerate(batch):
                for text, path in tree.paths.items():
                    texts.append(text)
                    places.append(np.array(path[starts[text] - 1 :], dtype=np.int64) + row * width)
                    targets.append(np.array(ids[text][starts[text] :], dtype=np.int64))
            logprobs = _fast_logprobs(
                states, head, head_weight, np.concatenate(places), np.concatenate(targets)
            )
            owners = np.repeat(np.arange(len(texts)), [len(part) for part in targets])
            sums[texts] = np.bincount(owners, logprobs, minlength=len(texts))
    return np.where(np.isfinite(sums), sums, np.nan)


@contextmanager
def _eager_attention_on_a_cpu(model) -> Iterator[None]:
    """Use plain matrix products for attention on a CPU, where they are faster for short rows."""
    configured = model.config._attn_implementation
    model.set_attn_implementation("eager" if model.device.type == "cpu" else configured)
    try:
        yield
    finally:
        model.set_attn_implementation(configured)


def _tree_states(
    model, weights: dict[str, torch.Tensor], trees: Sequence[PrefixTree]
) -> torch.Tensor:
    """Return the last hidden state of every token of every tree (B*T, D)."""
    tokens, depths, visible = tree_inputs(trees)
    tokens = torch.as_tensor(tokens, device=model.device)  # (B, T)
    depths = torch.as_tensor(depths, device=model.device)  # (B, T)
    hidden = torch.as_tensor(~visible[:, None], device=model.device)  # (B, 1, T, T)
    dtype = next(iter(weights.values())).dtype
    mask = torch.zeros(hidden.shape, dtype=dtype, device=model.device)
    mask.masked_fill_(hidden, torch.finfo(dtype).min)
    options = {"attention_mask": mask, "position_ids": depths, "use_cache": False}
    output = torch.func.functional_call(model.base_model, weights, (tokens,), options)
    return output.last_hidden_state.flatten(0, 1)


def _fast_logprobs(
    states: torch.Tensor,
    head: torch.nn.Linear,
    fast_weight: torch.Tensor,
    places: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """Return log p(targets[i] | states[places[i]]) (N,) without storing all logits.

    log p = logit of the target - log(sum of exp(logit) over the vocabulary). Errors in the sum
    average out, so it uses `fast_weight` (V, D), the head's weight in the fast format. The logit of
    the target is computed in float32.
    """
    places = torch.as_tensor(places, device=states.device)
    targets = torch.as_tensor(targets, device=states.device)
    bias = torch.zeros(len(fast_weight), device=states.device)
    if head.bias is not None:
        bias = head.bias.float()
    target_logits = (states[places].float() * head.weight[targets].float()).sum(-1) + bias[targets]

    # subtract an integer near the result from all logits, by way of the bias: this keeps exp in
    # range, and the fast format represents small numbers with a smaller error
    states_used, place_of = places.unique(return_inverse=True)
    states = states[states_used]  # (M, D)
    sample_logits = F.linear(states[:8], fast_weight, bias.to(fast_weight.dtype)).float()
    offset = sample_logits.logsumexp(-1).mean().round()
    bias = (bias - offset).to(fast_weight.dtype)

    # sum exp over the vocabulary, tile by tile
    rows, columns = CPU_HEAD_TILE
    if states.device.type != "cpu":
        rows = max(1, MAX_LOGITS // len(fast_weight))
        columns = len(fast_weight)
    exp_sums = torch.zeros(len(states), device=states.device)  # (M,)
    for weight_tile, bias_tile in zip(fast_weight.split(columns), bias.split(columns), strict=True):
        for states_tile, sums_tile in zip(states.split(rows), exp_sums.split(rows), strict=True):
            logits = F.linear(states_tile, weight_tile, bias_tile)
            sums_tile += logits.exp_().sum(-1, dtype=torch.float32)  # a view into exp_sums
    logprobs = target_logits - offset - exp_sums.log()[place_of]
    return logprobs.double().cpu().numpy()
