"""Multiple-choice items and a model -> the score of every candidate, beside the scores of trivial baselines.

It opens no model and defines no figure (tasks.py does); log-probabilities come from inference.py.

    from likelihood import score
    scores, baselines = score(model, tokenizer, read_items("blimp", "data/blimp_filtered"))
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tasks

log = logging.getLogger(__name__)
UNIGRAM_CHARS = 10_000_000  # of the training text, taken evenly from its files


def score(
    model, tokenizer, items: Sequence[tasks.Item], bos: bool = True, unigram: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the summed log-probability of each candidate of each item in order, the same of the baselines by name).

    `shorter` prefers fewer tokens, as a model does to which all tokens are alike; `unigram` adds up the log p of single
    tokens (`unigram_table`). All candidates go to the model in one call: it can sort them and score equal ones once.
    """
    import inference

    ids, starts = spans(tokenizer, items, bos)
    scores = np.array([text.logprobs.sum() for text in inference.ids_logprobs(model, ids, starts=starts)])
    return scores, _baselines(ids, starts, unigram)


def choose(
    model, tokenizer, items: Sequence[tasks.Item], bos: bool = True, unigram: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """As `score`, several times as fast, for where only the best candidate of each item counts; third, the precision.

    The candidates of an item compare as float32 has it (`choices.relative_scores`); the scores have no other meaning.
    """
    import choices

    ids, starts = spans(tokenizer, items, bos)
    scores, precision = choices.relative_scores(model, ids, starts, [len(item.completions) for item in items])
    return scores, _baselines(ids, starts, unigram), precision


def _baselines(ids: list[list[int]], starts: list[int], unigram: np.ndarray | None) -> dict[str, np.ndarray]:
    scored = [text[start:] for text, start in zip(ids, starts, strict=True)]
    lengths = np.array([len(text) for text in scored])
    if unigram is None:
        return {"shorter": -lengths.astype(float)}
    total = np.concatenate([[0], np.cumsum(unigram[np.concatenate(scored).astype(np.int64)])])
    ends = np.cumsum(lengths)
    return {"shorter": -lengths.astype(float), "unigram": total[ends] - total[ends - lengths]}


def spans(tokenizer, items: Sequence[tasks.Item], bos: bool) -> tuple[list[list[int]], list[int]]:
    """Token ids of every candidate of every item, and where the scored tokens of each begin.

    Scored are the tokens that end after the first character of the completion: tokenisation cannot move the span.
    """
    import inference

    pairs = [pair for item in items for pair in item.candidates]
    texts: list = [prefix + completion for prefix, completion in pairs]
    first = [0] * len(pairs)
    after = [i for i, (prefix, _) in enumerate(pairs) if prefix]  # the others are scored whole, without offsets
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer([texts[i] for i in after], **options) if after else {"input_ids": [], "offset_mapping": []}
    for i, ids, offsets in zip(after, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first[i] = sum(end <= len(pairs[i][0]) for _, end in offsets)  # ends never fall
        if first[i] == len(ids):
            raise ValueError(f"the candidate {pairs[i][1]!r} has no token of its own after {pairs[i][0][-40:]!r}")
        texts[i] = ids
    return inference.encode(tokenizer, texts, bos), [max(1, place + bos) for place in first]


def unigram_table(model_path: Path, tokenizer, vocab_size: int) -> np.ndarray | None:
    """log p of each token id (V,) in the model's training text, add-one smoothed; None where that text is unknown."""
    import data_utils
    import settings

    path = settings.run_text(model_path, "train_path")
    if path is None:
        return None
    try:
        files = data_utils.find_files(path, "train")
    except FileNotFoundError as error:
        log.warning("%s: no unigram baseline, since the training text is not here: %s", model_path, error)
        return None
    counts = np.ones(vocab_size)
    for file in files:
        left = UNIGRAM_CHARS // len(files)
        for piece in data_utils.read_documents(file):
            ids = tokenizer(piece.text[:left], add_special_tokens=False, verbose=False)["input_ids"]
            if max(ids, default=0) >= vocab_size:
                raise ValueError(f"the tokenizer makes token {max(ids)}, the model knows 0..{vocab_size - 1}")
            counts += np.bincount(ids, minlength=vocab_size)
            left -= len(piece.text)
            if left <= 0:
                break
    return np.log(counts / counts.sum())


def trust(
    task: str, items: Sequence[tasks.Item], result: dict, scores: np.ndarray, others: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Trivial baselines beside a result, and whether the model is better than each of them beyond noise.

    `random` is chance, which the interval of the model's score must leave out; `others` are compared item by item.
    """
    metric, baselines = result["metric"], {}
    low, high = result[f"{metric}_ci95"]
    if metric != "eye_tracking_percent":  # which is above 0 for any numbers
        chance = result["chance"]
        baselines["random"] = {"score": chance, "difference": result[metric] - chance, "noise": low <= chance <= high}
    for name, values in others.items():
        gap = tasks.compare(task, items, scores, values, seed)
        baselines[name] = {"score": result[metric] - gap["difference"], **gap}
    better = all(row["difference"] > 0 and not row["noise"] for row in baselines.values())
    return {"baselines": baselines, "better_than_baselines": better}
