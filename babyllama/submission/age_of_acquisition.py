"""Compare the order in which a model and children learn words (BabyLM's age of acquisition).

    contexts = read_contexts("cdi_childes.json")
    rows = {path.name: measure_surprisals(path, contexts, path.name) for path in checkpoints}
    surprisals = surprisal_file(rows, hashes_of_the_weights, "my-model")
    result = acquisition_score(surprisals, "cdi_human.csv", tokenizer, Path("aoa_score.json"))

A model learns a word when its surprisal has fallen half of the way from chance to its minimum
(Chang and Bergen 2022). The tokens, the fit and the files are those of BabyLM's pipeline of 2026.
"""

from __future__ import annotations

import csv
import itertools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import pearsonr
from tqdm import tqdm

from babyllama.evaluation.loading import load_model
from babyllama.evaluation.scoring import ids_logprobs
from babyllama.files import read_json, write_json
from babyllama.runs.checkpoints import MILLION

AGES = range(16, 31)  # months; the columns of cdi_human.csv
CHILDREN = 0.5  # of the children know a word at its age of acquisition
MIN_WORDS = 3  # fewer words give no correlation
MAX_P = 0.1  # a correlation that is less certain counts as 0


# ---- surprisals ---------------------------------------------------------------------------------


def read_contexts(path: str | Path) -> dict[str, list[str]]:
    """Read cdi_childes.json: return the contexts of each word, {word: [text before it, ...]}.

    Words of one letter are not part of the task. Raise ValueError for a file of another format.
    """
    try:
        content = read_json(Path(path))
        contexts = {
            word: [row["context"] for row in rows]
            for word, rows in content.items()
            if len(word) > 1
        }
        "".join(itertools.chain(*contexts.values()))  # a TypeError unless all are strings
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = '{"word": [{"context": "text"}, ...], ...}'
        raise ValueError(f"{path}: expected JSON of the form {expected} ({error!r})") from None
    if not any(contexts.values()):
        raise ValueError(f"{path} holds no contexts")
    return contexts


def measure_surprisals(
    model_dir: Path, contexts: dict[str, list[str]], step: str, device: str | None = "auto"
) -> list[dict]:
    """Return the rows of a checkpoint in surprisal.json: each word in each of its contexts.

    `step` is the checkpoint's name, chck_<N>M, of N million words seen. Surprisals are in nats.
    Raise ValueError if one is not a number.
    """
    millions = float(step.removeprefix("chck_").removesuffix("M"))
    requests = _requests(contexts)
    surprisals = _surprisals(model_dir, requests, device)
    return [
        {
            "step": step,
            "word_count": round(millions * MILLION),
            "target_word": word,
            "context_id": index,
            "context": context,
            "surprisal": surprisal,
        }
        for (word, index, context), surprisal in zip(requests, surprisals, strict=True)
    ]


def surprisal_file(
    rows_of: dict[str, list[dict]], hashes: dict[str, str], model_name: str
) -> dict[str, Any]:
    """Return surprisal.json, in the format of BabyLM's pipeline, from the rows of each checkpoint.

    `hashes` are those of the weights, which we add to the format.
    """
    return {
        "metadata": {
            "model_name": model_name,
            "use_bos_only": False,
            "total_steps": len(rows_of),
            "completed_steps": len(rows_of),
            "weights_sha256": hashes,
        },
        "results": list(itertools.chain(*rows_of.values())),
    }


def _requests(contexts: dict[str, list[str]]) -> list[tuple[str, int, str]]:
    """Return (word, number of the context, context) of every surprisal, in the file's order."""
    requests = []
    for word, texts in contexts.items():
        requests += [(word, index, context) for index, context in enumerate(texts)]
    return requests


def _surprisals(
    folder: Path, requests: list[tuple[str, int, str]], device: str | None
) -> list[float]:
    """Return the surprisal, in nats, of every request under one checkpoint."""
    model, tokenizer = load_model(folder, device)
    sequences = []
    starts = []
    for ids, start in _encode(tokenizer, [(context, word) for word, _, context in requests]):
        sequences.append(ids)
        starts.append(start)
    surprisals = []
    scores = ids_logprobs(model, sequences, starts=starts)
    for (word, _, context), score in zip(requests, scores, strict=True):
        surprisal = -float(score.logprobs.sum())
        if not math.isfinite(surprisal):
            raise ValueError(
                f"{folder}: the surprisal of {word!r} after {context!r} is {surprisal}"
            )
        surprisals.append(surprisal)
    return surprisals


def _encode(tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return (ids up to the end of the word, place of its first token) for each (context, word).

    The tokens of a word are all that reach into its characters. The tokenizer adds its special
    tokens by itself: without a BOS, the first token of a text has no score, as in the pipeline.
    """
    words = [word.strip() for _, word in pairs]
    texts = [f"{context.strip()} {word}" for (context, _), word in zip(pairs, words, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    result = []
    for text, word, ids, offsets in zip(
        texts, words, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        first_character = len(text) - len(word)
        places = [place for place, (_, end) in enumerate(offsets) if end > first_character]
        end = max(places, default=-1) + 1
        result.append((ids[:end], max(1, min(places, default=1))))
    return result


# ---- ages ---------------------------------------------------------------------------------------


def read_human_ages(path: str | Path) -> dict[str, float | None]:
    """Read cdi_human.csv: return the age, in months, at which half of the children know a word.

    The file has a column `word`, and the share of children who know it in columns `16` to `30`. The
    age is None if the shares do not determine it. Raise ValueError for a file of another format.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = [str(age) for age in AGES if str(age) in (reader.fieldnames or ())]
        if not columns or "word" not in reader.fieldnames:
            raise ValueError(f"{path}: expected the columns word and {AGES[0]} to {AGES[-1]}")
        ages = {}
        for row in reader:
            if row["word"] in ages:  # the first row of a word counts
                continue
            try:
                shares = [
                    math.nan if row[age] in ("", "NA") else float(row[age]) for age in columns
                ]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            ages[row["word"]] = _child_age(np.array(columns, dtype=float), np.array(shares))
    return ages


def acquisition_score(
    surprisals: dict, human_ages_file: str | Path, tokenizer, output: Path | None = None
) -> dict:
    """Correlate the ages at which a model and children learn words; write the score to `output`.

    `surprisals` is the content of surprisal.json, and `tokenizer` that of the final model. Return
    `score`, from -1 to 1: Pearson's `r`, or 0 if its `p` is above 0.1 or fewer than 3 words have
    both ages; the `words` with both (the model's age in log10 of words seen, the child's in
    months); and how many words were left out, and why.
    """
    # the surprisals of each word, by words seen
    human_ages = read_human_ages(human_ages_file)
    values = defaultdict(lambda: defaultdict(list))  # word -> words seen -> surprisals
    for row in surprisals["results"]:
        values[row["target_word"]][row["word_count"]].append(row["surprisal"])

    # the two ages of each word, if both can be determined
    words = []
    left_out = Counter(no_human_data=0, no_child_age=0, no_model_age=0)
    n_prefix = len(tokenizer("The", add_special_tokens=False)["input_ids"])
    for word, by_words_seen in tqdm(values.items(), desc="fitting", disable=None, delay=5):
        if word not in human_ages:
            left_out["no_human_data"] += 1
            continue
        child_age = human_ages[word]
        if child_age is None:
            left_out["no_child_age"] += 1
            continue
        # the surprisal of chance: each of the word's tokens is one of V, all equally likely
        n_tokens = len(tokenizer(f"The {word}", add_special_tokens=False)["input_ids"]) - n_prefix
        chance = max(1, n_tokens) * math.log(tokenizer.vocab_size)
        words_seen = sorted(by_words_seen)
        means = [np.mean(by_words_seen[count]) for count in words_seen]
        model_age = _model_age(np.array(words_seen, dtype=float), np.array(means), chance)
        if model_age is None:
            left_out["no_model_age"] += 1
            continue
        words.append({"word": word, "log10_words_seen": model_age, "child_months": child_age})

    # correlate them
    r = p = None
    if len(words) >= MIN_WORDS:
        model_ages = [row["log10_words_seen"] for row in words]
        child_ages = [row["child_months"] for row in words]
        if len(set(model_ages)) > 1 and len(set(child_ages)) > 1:
            r, p = map(float, pearsonr(model_ages, child_ages))
    score = r if r is not None and p <= MAX_P else 0.0
    if output is not None:
        write_json(output, {"aoa": score})
    return {
        "score": score,
        "r": r,
        "p": p,
        "n_words": len(words),
        "n_left_out": dict(left_out),
        "words": words,
    }


def _child_age(ages: np.ndarray, shares: np.ndarray) -> float | None:
    """Return the age at which half of the children know a word, by a fit to their shares."""
    measured = ~np.isnan(shares)
    ages = ages[measured]
    shares = shares[measured]
    if len(ages) < 3:
        return None
    return _crossing(
        ages,
        shares,
        level=CHILDREN,
        guess=[1.0, 0.1, ages.mean(), 0.0],
        lower=[0.0, 0.0, ages[0], -0.5],
        upper=[2.0, 1.0, ages[-1], 0.5],
        evaluations=1000,
    )


def _model_age(words_seen: np.ndarray, surprisals: np.ndarray, chance: float) -> float | None:
    """Return log10 of the words seen when a word's surprisal is halfway from chance to its minimum.

    `surprisals` are means over contexts, one for each checkpoint.
    """
    if len(surprisals) < 3:
        return None
    measured = ~np.isnan(surprisals)  # other programs write NaN for a context that is too long
    if not measured.any():
        return None
    gains = -surprisals[measured]  # they rise, like the shares of children
    x = np.log10(words_seen[measured] + 1)
    low = gains.min()
    spread = gains.max() - low
    return _crossing(
        x,
        gains,
        level=(gains.max() - chance) / 2,
        guess=[spread, 1.0, x.mean(), low],
        lower=[0.0, 0.0, x.min() - 1, low - 2 * spread - 1],
        upper=[10 * spread + 1, 100.0, x.max() + 1, gains.max() + 1],
        evaluations=20000,
    )


def _sigmoid(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
    return a / (1 + np.exp(-b * (x - c))) + d


def _crossing(
    x: np.ndarray,
    y: np.ndarray,
    *,
    level: float,
    guess: list[float],
    lower: list[float],
    upper: list[float],
    evaluations: int,
) -> float | None:
    """Return the x, within the range of `x`, at which a sigmoid fitted to y reaches `level`.

    Return None if it never does, if it does so outside the range, or if the fit fails.
    """
    try:
        with np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
            (a, b, c, d), _ = curve_fit(
                _sigmoid, x, y, p0=guess, bounds=(lower, upper), maxfev=evaluations
            )
    except (RuntimeError, ValueError):  # no convergence, or a value that is not finite
        return None
    if min(a, b) <= 1e-6 or not d < level < a + d:  # a flat curve, or one that misses the level
        return None
    crossing = float(c - np.log(a / (level - d) - 1) / b)
    return crossing if x[0] <= crossing <= x[-1] else None
