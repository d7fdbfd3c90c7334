"""Multiple-choice items and a model -> the score of every candidate, beside the scores of trivial baselines.

It opens no model and defines no figure (tasks.py does); log-probabilities come from evaluation/scoring.py.

    from likelihood import score
    scores, baselines = score(model, tokenizer, read_items("blimp", "data/blimp_filtered"))
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from babyllama.device import fast_dtype
from babyllama.evaluation import tasks
from babyllama.evaluation.loading import check_ids, context_length, encode
from babyllama.evaluation.scoring import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    MAX_LOGITS,
    float32_inference,
    ids_logprobs,
)

log = logging.getLogger(__name__)
UNIGRAM_CHARS = 10_000_000  # of the training text, taken evenly from its files


def score_candidates(
    model,
    tokenizer,
    items: Sequence[tasks.Item],
    bos: bool = True,
    unigram: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the summed log-probability of each candidate of each item in order, the same of the baselines by name).

    `shorter` prefers fewer tokens, as a model does to which all tokens are alike; `unigram` adds up the log p of single
    tokens (`unigram_table`). All candidates go to the model in one call: it can sort them and score equal ones once.
    """
    from babyllama.evaluation.scoring import ids_logprobs

    ids, starts = scored_spans(tokenizer, items, bos)
    scores = np.array([text.logprobs.sum() for text in ids_logprobs(model, ids, starts=starts)])
    return scores, _baselines(ids, starts, unigram)


def score_choices(
    model,
    tokenizer,
    items: Sequence[tasks.Item],
    bos: bool = True,
    unigram: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """As `score`, several times as fast, for where only the best candidate of each item counts; third, the precision.

    The candidates of an item compare as float32 has it (`choices.relative_scores`); the scores have no other meaning.
    """
    pass

    ids, starts = scored_spans(tokenizer, items, bos)
    scores, precision = relative_scores(
        model, ids, starts, [len(item.completions) for item in items]
    )
    return scores, _baselines(ids, starts, unigram), precision


def _baselines(
    ids: list[list[int]], starts: list[int], unigram: np.ndarray | None
) -> dict[str, np.ndarray]:
    scored = [text[start:] for text, start in zip(ids, starts, strict=True)]
    lengths = np.array([len(text) for text in scored])
    if unigram is None:
        return {"shorter": -lengths.astype(float)}
    total = np.concatenate([[0], np.cumsum(unigram[np.concatenate(scored).astype(np.int64)])])
    ends = np.cumsum(lengths)
    return {"shorter": -lengths.astype(float), "unigram": total[ends] - total[ends - lengths]}


def scored_spans(
    tokenizer, items: Sequence[tasks.Item], bos: bool
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every candidate of every item, and where the scored tokens of each begin.

    Scored are the tokens that end after the first character of the completion: tokenisation cannot move the span.
    """

    pairs = [pair for item in items for pair in item.candidates]
    texts: list = [prefix + completion for prefix, completion in pairs]
    first = [0] * len(pairs)
    after = [
        i for i, (prefix, _) in enumerate(pairs) if prefix
    ]  # the others are scored whole, without offsets
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = (
        tokenizer([texts[i] for i in after], **options)
        if after
        else {"input_ids": [], "offset_mapping": []}
    )
    for i, ids, offsets in zip(after, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first[i] = sum(end <= len(pairs[i][0]) for _, end in offsets)  # ends never fall
        if first[i] == len(ids):
            raise ValueError(
                f"the candidate {pairs[i][1]!r} has no token of its own after {pairs[i][0][-40:]!r}"
            )
        texts[i] = ids
    return encode(tokenizer, texts, bos), [max(1, place + bos) for place in first]


def unigram_table(model_path: Path, tokenizer, vocab_size: int) -> np.ndarray | None:
    """log p of each token id (V,) in the model's training text, add-one smoothed; None where that text is unknown."""
    from babyllama.data import documents
    from babyllama.evaluation.loading import training_text_of

    path = training_text_of(model_path, "train_path")
    if path is None:
        return None
    try:
        files = documents.find_files(path, "train")
    except FileNotFoundError as error:
        log.warning(
            "%s: no unigram baseline, since the training text is not here: %s", model_path, error
        )
        return None
    counts = np.ones(vocab_size)
    for file in files:
        left = UNIGRAM_CHARS // len(files)
        for piece in documents.read_documents(file):
            ids = tokenizer(piece.text[:left], add_special_tokens=False, verbose=False)["input_ids"]
            if max(ids, default=0) >= vocab_size:
                raise ValueError(
                    f"the tokenizer makes token {max(ids)}, the model knows 0..{vocab_size - 1}"
                )
            counts += np.bincount(ids, minlength=vocab_size)
            left -= len(piece.text)
            if left <= 0:
                break
    return np.log(counts / counts.sum())


log = logging.getLogger(__name__)
SAMPLE = 256  # items that are scored both ways before the others are decided
SAFETY = 2.0  # a decision of the fast pass needs a margin of this many times the largest error seen
CLOSE = 1e-4  # nats; margins up to this are left to float32 in any case
LITTLE_FOR_A_GPU = 1e14  # floating-point operations: an H200 takes two or three seconds
TREE_TOKENS = 48  # that a tree may hold beyond its first text; more would share more, and attend to more in vain
CPU_HEAD_TILE = (
    512,
    1024,
)  # logits held at a time, places x tokens: 2 MB in float32, which stay in caches


def relative_scores(
    model, ids: Sequence[list[int]], starts: Sequence[int], counts: Sequence[int]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(a score in nats for each text, how precise they are); scores compare within their item only.

    `ids` holds the texts item by item, `counts` how many belong to each item, `starts` where the scored tokens of each
    text begin. The difference of two scores is that of the summed log-probabilities of the texts. Which is the best,
    and whether it is tied, is as float32 has it (`ids_logprobs`); the size of a clear difference is as exact as
    `precision` says: `fast` is the number format, `largest_error_nats` its error as far as measured, and
    `float32_items` how many of `items` have scores of float32.
    """
    counts = np.asarray(counts)
    check_ids(model, ids)
    owner = np.repeat(np.arange(len(counts)), counts)
    begins = _begins(ids, starts, counts, context_length(model))
    lengths = np.array([len(text) - begin for text, begin in zip(ids, begins, strict=True)])
    scale = np.sqrt(
        np.bincount(owner, lengths).clip(min=1)
    )  # the errors of tokens add up like a random walk
    exact, dtype = np.zeros(len(counts), dtype=bool), fast_dtype(model.device)
    fast, asked = np.full(len(ids), np.nan), np.arange(len(counts))
    if len(counts) > 2 * SAMPLE and not _is_little(model, ids):
        asked = np.linspace(0, len(counts) - 1, SAMPLE).astype(int)  # from every part alike
        try:
            fast = fast_sums(model, ids, begins, dtype)
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # an architecture that does not compute like this
            log.warning(
                "%s scores in float32 only: %s", type(model).__name__, str(error).split("\n")[0]
            )
    scores, margins = fast.copy(), _margins(fast, counts)
    while len(asked):
        exact[asked] = True
        texts = np.flatnonzero(np.isin(owner, asked))
        found = ids_logprobs(model, [ids[i] for i in texts], starts=[begins[i] for i in texts])
        scores[texts] = [text.logprobs.sum() for text in found]
        errors = _ranges(scores - fast, counts)
        known = exact & ~np.isnan(errors)
        error = (errors / scale)[known].max() if known.any() else np.inf
        asked = np.flatnonzero(~exact & ~(margins > np.maximum(CLOSE, SAFETY * error * scale)))
    precision: dict[str, Any] = {"items": len(counts), "float32_items": int(exact.sum())}
    if not exact.all():
        precision |= {
            "fast": str(dtype).removeprefix("torch."),
            "largest_error_nats": float(errors[known].max()),
        }
    return scores, precision


def _is_little(model, ids: Sequence[list[int]]) -> bool:
    """Whether a GPU has scored all in float32 before Python has found what the texts share."""
    work = (
        2 * sum(map(len, ids)) * sum(p.numel() for p in model.parameters())
    )  # floating-point operations
    return model.device.type == "cuda" and work < LITTLE_FOR_A_GPU


def _begins(
    ids: Sequence[list[int]], starts: Sequence[int], counts: np.ndarray, context: int
) -> list[int]:
    """Where those terms of each text begin that the other texts of its item do not have as well.

    Beyond the context the windows of an item's texts differ, so what they share has other terms in each: all count.
    """
    begins, at = list(starts), 0
    for count in counts.tolist():
        own = slice(at, at + count)
        within = max(map(len, ids[own])) <= context + 1
        if (
            within and len(set(begins[own])) == 1
        ):  # else what is context in one text may be scored in another
            shared = _shared(
                min(ids[own]), max(ids[own])
            )  # in alphabetical order the first and the last share least
            begins[own] = [max(begins[at], shared)] * count
        at += count
    return begins


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _margins(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """By how much the best of each item lies above the second (n,); NaN where one of its scores is."""
    order = np.lexsort((scores, np.repeat(np.arange(len(counts)), counts)))  # NaN comes last
    best = np.cumsum(counts) - 1
    return np.where(counts > 1, scores[order][best] - scores[order][best - 1], np.inf)


def _ranges(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The largest less the smallest value of each item (n,); NaN where one is."""
    starts = np.cumsum(counts) - counts
    return np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts)


@dataclass
class _Tree:
    """Texts that share beginnings, as one row of tokens in which each knows the one before it."""

    room: int  # for tokens
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(
        default_factory=list
    )  # the place of the token before; the first of a text: its own
    depths: list[int] = field(default_factory=list)  # the position in the text
    paths: list[tuple[int, list[int]]] = field(
        default_factory=list
    )  # of each text: its number, where its tokens are

    def add(self, number: int, inputs: list[int], shared: int) -> None:
        """Append a text whose first `shared` tokens are those of the text before."""
        path = self.paths[-1][1][:shared] if shared else []
        path = [*path, *range(len(self.tokens), len(self.tokens) + len(inputs) - shared)]
        self.tokens += inputs[shared:]
        self.parents += [path[max(0, depth - 1)] for depth in range(shared, len(inputs))]
        self.depths += range(shared, len(inputs))
        self.paths.append((number, path))


def _trees(ids: Sequence[list[int]], context: int) -> Iterator[_Tree]:
    """Trees of the texts that fit the context, in alphabetical order; the last token of a text is no input."""
    tree, before = _Tree(room=-1), []
    for number in sorted(range(len(ids)), key=ids.__getitem__):
        inputs = ids[number][:-1]
        if 0 < len(inputs) <= context:
            shared = _shared(before, inputs)
            if len(tree.tokens) + len(inputs) - shared > tree.room:
                yield tree
                tree, shared = _Tree(room=len(inputs) + TREE_TOKENS), 0
            tree.add(number, inputs, shared)
            before = inputs
    yield tree


def fast_sums(
    model, ids: Sequence[list[int]], begins: Sequence[int], dtype: torch.dtype
) -> np.ndarray:
    """The summed log-probability of the tokens of each text from `begins` on, computed in trees and in `dtype`.

    NaN for a text longer than the context, and for all where the model takes no positions or has no linear head.
    """
    sums, head = np.full(len(ids), np.nan), model.get_output_embeddings()
    takes = {"attention_mask", "position_ids"} <= set(
        inspect.signature(model.base_model.forward).parameters
    )
    if not takes or not isinstance(head, torch.nn.Linear) or model.base_model is model:
        return sums
    trees = [tree for tree in _trees(ids, context_length(model)) if tree.tokens]
    trees.sort(key=lambda tree: -len(tree.tokens))
    weights = {
        name: value.detach().to(dtype) for name, value in model.base_model.named_parameters()
    }
    small = head.weight.detach().to(dtype)
    most = CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
    with float32_inference(model), _eager_on_a_cpu(model):
        while trees:
            width = len(trees[0].tokens)
            batch, trees = trees[: max(1, most // width)], trees[max(1, most // width) :]
            texts = [number for tree in batch for number, _ in tree.paths]
            paths = [
                np.array(path) + row * width
                for row, tree in enumerate(batch)
                for _, path in tree.paths
            ]
            places = [path[begins[i] - 1 :] for i, path in zip(texts, paths, strict=True)]
            targets = [ids[i][begins[i] :] for i in texts]
            values = _logprobs(
                _states(model, weights, batch),
                head,
                small,
                _flat(model, places),
                _flat(model, targets),
            )
            owner = np.repeat(np.arange(len(texts)), [len(own) for own in targets])
            sums[texts] = np.bincount(owner, values, minlength=len(texts))
    return np.where(np.isfinite(sums), sums, np.nan)


def _flat(model, parts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.as_tensor(np.concatenate(parts).astype(np.int64), device=model.device)


@contextmanager
def _eager_on_a_cpu(model) -> Iterator[None]:
    """On a CPU plain matrix products attend faster to short rows than the fused kernel does."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager" if model.device.type == "cpu" else own)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _states(model, weights: dict[str, torch.Tensor], trees: Sequence[_Tree]) -> torch.Tensor:
    """The last hidden state of every token of every tree (B*T, D), each looking at its own path and nothing else."""
    shape = (len(trees), len(trees[0].tokens))  # the first is the widest
    tokens, depths = np.full(shape, trees[0].tokens[0]), np.zeros(shape, dtype=np.int64)  # (B, T)
    parents = np.tile(np.arange(shape[1]), (shape[0], 1))  # so padding is texts of one token
    place, seen = parents.copy(), np.zeros((*shape, shape[1]), dtype=bool)  # (B, T, T)
    for row, tree in enumerate(trees):
        own = slice(len(tree.tokens))
        tokens[row, own], depths[row, own], parents[row, own] = (
            tree.tokens,
            tree.depths,
            tree.parents,
        )
    for _ in range(depths.max() + 1):
        np.put_along_axis(seen, place[..., None], True, axis=2)
        place = np.take_along_axis(parents, place, axis=1)
    tokens, depths, hidden = (
        torch.as_tensor(part, device=model.device) for part in (tokens, depths, ~seen[:, None])
    )
    dtype = next(iter(weights.values())).dtype
    mask = torch.zeros(hidden.shape, dtype=dtype, device=model.device).masked_fill_(
        hidden, torch.finfo(dtype).min
    )
    options = {"attention_mask": mask, "position_ids": depths, "use_cache": False}
    return torch.func.functional_call(
        model.base_model, weights, (tokens,), options
    ).last_hidden_state.flatten(0, 1)


def _logprobs(
    states: torch.Tensor,
    head: torch.nn.Linear,
    small: torch.Tensor,
    places: torch.Tensor,
    targets: torch.Tensor,
) -> np.ndarray:
    """log p(targets[i] | states[places[i]]) (N,): the logit in float32, less log sum exp of all from `small` weights.

    Those logits are taken less a whole number near the result, which keeps exp in its range and rounds them less.
    """
    logits = (states[places].float() * head.weight[targets].float()).sum(-1)
    bias = torch.zeros(len(small), device=states.device) if head.bias is None else head.bias.float()
    logits += bias[targets]
    used, inverse = places.unique(return_inverse=True)
    states = states[used]
    level = F.linear(states[:8], small, bias.to(small.dtype)).float().logsumexp(-1).mean().round()
    bias = (bias - level).to(small.dtype)
    rows, columns = max(1, MAX_LOGITS // len(small)), len(small)
    if states.device.type == "cpu":
        rows, columns = CPU_HEAD_TILE
    sums = torch.zeros(len(states), device=states.device)
    for weight, offset in zip(small.split(columns), bias.split(columns), strict=True):
        for some, total in zip(states.split(rows), sums.split(rows), strict=True):
            total += F.linear(some, weight, offset).exp_().sum(-1, dtype=torch.float32)
    return (logits - level - sums.log()[inverse]).double().cpu().numpy()
