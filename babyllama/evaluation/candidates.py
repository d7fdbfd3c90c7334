"""Score the candidates of multiple-choice items.

    items = read_items("blimp", "data/blimp_filtered")
    scores, baselines, precision = score_task(model, tokenizer, "blimp", items)

`score_task` picks one of two ways. `score_candidates` returns exact log-probabilities.
fast_choices.py is several times as fast, and it is enough if only the best candidate matters. The
candidates are also scored with trivial baselines, which a model should beat. grading.py turns the
scores into results.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.data.documents import read_parts
from babyllama.data.text_files import find_files
from babyllama.evaluation.fast_choices import relative_scores
from babyllama.evaluation.loading import encode, has_start_token
from babyllama.evaluation.scoring import ids_logprobs
from babyllama.evaluation.tasks import TASKS, Item
from babyllama.runs.finished_run import training_text_of

log = logging.getLogger(__name__)

UNIGRAM_CHARS = 10_000_000  # characters of the training text, equally many from each file


def score_task(
    model, tokenizer, task: str, items: Sequence[Item], unigram: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return (scores, baselines, precision) of all candidates of a task, for grading.py.

    If only the best candidate matters, scores of different items cannot be compared. See
    fast_choices.relative_scores for the meaning of `precision`.
    """
    spec = TASKS[task]
    if spec.metric == "accuracy" and spec.scoring == "sum":  # only the order in an item counts
        ids, starts = scored_spans(tokenizer, items)
        counts = [len(item.completions) for item in items]
        scores, precision = relative_scores(model, ids, starts, counts)
        return scores, _baselines(ids, starts, np.arange(len(ids)), unigram), precision
    scores, baselines = score_candidates(model, tokenizer, items, unigram, spec.scoring)
    return scores, baselines, {"items": len(items), "float32_items": len(items)}


def score_candidates(
    model, tokenizer, items: Sequence[Item], unigram: np.ndarray | None = None, scoring: str = "sum"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (log-probability in nats of each candidate of each item, in order; baselines).

    `scoring` is the "sum" over the tokens of the completion or their "mean", or it is "word": the
    sum as BabyLM scores reading times (`word_spans`).

    The baselines map a name to its scores of the same candidates. `shorter` prefers fewer tokens,
    like a model that finds all tokens equally likely. `unigram` sums log-probabilities of single
    tokens, if there is a table of them (`unigram_table`), or takes their mean.
    """
    if scoring == "word":
        ids, starts, owners = word_spans(tokenizer, items)
    else:
        ids, starts = scored_spans(tokenizer, items)
        owners = np.arange(len(ids))
    sums = [text.logprobs.sum() for text in ids_logprobs(model, ids, starts=starts)]
    scores = np.bincount(owners, sums)
    baselines = _baselines(ids, starts, owners, unigram)
    if scoring == "mean":
        lengths = -baselines["shorter"]
        scores = scores / lengths
        if unigram is not None:
            baselines["unigram"] = baselines["unigram"] / lengths
    return scores, baselines


def _baselines(
    ids: Sequence[list[int]], starts: Sequence[int], owners: np.ndarray, unigram: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the baselines of all candidates; `owners` has the candidate of each text (N,)."""
    targets = [text[start:] for text, start in zip(ids, starts, strict=True)]
    lengths = [len(tokens) for tokens in targets]
    baselines = {"shorter": -np.bincount(owners, lengths)}
    if unigram is not None:
        logprobs = unigram[np.concatenate(targets).astype(np.int64)]
        baselines["unigram"] = np.bincount(np.repeat(owners, lengths), logprobs)
    return baselines


def scored_spans(tokenizer, items: Sequence[Item]) -> tuple[list[list[int]], list[int]]:
    """Return the token ids of every candidate of every item, and the first scored token of each.

    A token is scored if it ends after the start of the completion. Prefix and completion can share
    a token, so it takes the character offsets of the tokens to find the first one.
    """
    bos = has_start_token(tokenizer)
    candidates = [pair for item in items for pair in item.candidates]
    texts: list[str | list[int]] = [prefix + completion for prefix, completion in candidates]
    starts = [0] * len(candidates)

    # offsets are slow, so ask for them only if there is a prefix
    prefixed = [i for i, (prefix, _) in enumerate(candidates) if prefix]
    if prefixed:
        encoding = tokenizer(
            [texts[i] for i in prefixed],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        columns = zip(prefixed, encoding["input_ids"], encoding["offset_mapping"], strict=True)
        for i, ids, offsets in columns:
            prefix, completion = candidates[i]
            starts[i] = sum(end <= len(prefix) for _, end in offsets)
            if starts[i] == len(ids):
                raise ValueError(f"the candidate {completion!r} adds no token to {prefix[-40:]!r}")
            texts[i] = ids
    # without BOS the first token of a text has no score
    return encode(tokenizer, texts, bos), [max(1, start + bos) for start in starts]


def word_spans(tokenizer, items: Sequence[Item]) -> tuple[list[list[int]], list[int], np.ndarray]:
    """Return a text for each token of each completion, as BabyLM's script of reading times has it.

    The last token of a text is the one that is scored. The result is (token ids, index of the last
    token, index of the candidate) of each text.

    The script tokenizes the word alone, without the space before it. The first token follows the
    tokens of the context. For each later one, the text of the tokens before it joins the context,
    which is tokenized again; the token itself becomes text and is tokenized again too.
    """
    candidates = [pair for item in items for pair in item.candidates]
    words = [completion for _, completion in candidates]
    word_ids = tokenizer(words, add_special_tokens=False)["input_ids"]

    # a context and a target for each token of each word
    contexts = []
    targets = []
    owners = []
    for owner, ((context, _), ids) in enumerate(zip(candidates, word_ids, strict=True)):
        for number, token in enumerate(ids):
            text = tokenizer.decode([token])
            contexts.append(context)
            if number > 0:
                token = tokenizer(text, add_special_tokens=False)["input_ids"][0]
            targets.append(token)
            owners.append(owner)
            context += text

    context_ids = encode(tokenizer, contexts, bos=None)
    texts = [[*ids, target] for ids, target in zip(context_ids, targets, strict=True)]
    return texts, [len(text) - 1 for text in texts], np.array(owners)


def unigram_table(model_path: Path, tokenizer, vocab_size: int) -> np.ndarray | None:
    """Return log p of each token id (V,) in the model's training text, with add-one smoothing.

    Return None if the text is unknown or no longer exists.
    """
    path = training_text_of(model_path, "train_path")
    if path is None:
        return None
    try:
        files = find_files(path, "train")
    except FileNotFoundError as error:
        log.warning("%s: no unigram baseline without the training text: %s", model_path, error)
        return None

    # count the tokens at the start of each file
    counts = np.ones(vocab_size)
    for file in files:
        chars_left = UNIGRAM_CHARS // len(files)
        for part in read_parts(file):
            text = part[:chars_left]
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if max(ids, default=0) >= vocab_size:
                raise ValueError(
                    f"the tokenizer yields token {max(ids)}, the model's vocabulary is"
                    f" 0..{vocab_size - 1}"
                )
            counts += np.bincount(ids, minlength=vocab_size)
            chars_left -= len(part)
            if chars_left <= 0:
                break
    return np.log(counts / counts.sum())
