"""Compute the surprisal of words, -log2 p(word | words before it).

    for row in word_surprisal(model, tokenizer, ["The cat sat on the mat."]):
        print(row["word"], row["surprisal_bits"])

A word is what str.split() returns, so punctuation belongs to the word that it follows. The tokens
of a byte-level BPE hold the space before a word, not the one after it. Their probability is that of
all words that begin with these tokens, "cats" and "catch" as well as "cat". The probability that
white space follows belongs to the word before it (Pimentel and Meister 2024, How to compute the
probability of a word; Oh and Schuler 2024, Leading whitespaces of language models' subword
vocabulary pose a confound):

    F(k) = -log2 p(tokens up to the end of word k) - log2 p(B | these tokens)
    surprisal of word k = F(k) - F(k - 1),  F(0) = 0

B is the set of tokens after which word k has certainly ended: those that begin with white space,
and the special tokens, which end the text. The surprisals of a sentence add up to F of its last
word, the surprisal of all its tokens and of B after them. The second term of F is 0 if the next
token of the text is not in B, for example because the last one already ended in a space.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from babyllama.data.documents import new_report, read_parts
from babyllama.data.text_files import find_files
from babyllama.data.tokenizer import token_bytes
from babyllama.data.words import is_space
from babyllama.files import atomic_write, read_utf8

COLUMNS = (
    "sentence",  # its number, from 1: the line of a text file, the row of a table
    "word",
    "position",  # of the word in its sentence, from 1
    "start",  # sentence[start:end] is the word
    "end",
    "surprisal_bits",
    "uncorrected_bits",  # the sum over the word's tokens, without the correction
    "entropy_bits",  # of the prediction of the word's first token
    "tokens",
    "log2_frequency",
)
TEXT_COLUMNS = ("text", "sentence")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


# ---- surprisal ----------------------------------------------------------------------------------


def word_surprisal(
    model, tokenizer, texts: Sequence[str], batch_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Return a row for each word of each text, with the keys of COLUMNS but `log2_frequency`.

    A text is scored without the white space at its ends. One that is longer than the context is
    scored in overlapping windows. A figure is NaN if a token holds parts of two words. Raise
    ValueError for a tokenizer that is not byte-level, that has neither BOS nor EOS, or that changes
    where the words of a text begin.
    """
    from babyllama.evaluation.loading import encode, has_start_token
    from babyllama.evaluation.scoring import ids_logprobs

    if not has_start_token(tokenizer):
        raise ValueError("the tokenizer has neither BOS nor EOS: the first word follows nothing")

    texts_of_ids = token_bytes(tokenizer)
    ends_word = _tokens_that_end_words(texts_of_ids, model.get_input_embeddings().weight.shape[0])

    # the last prediction of each sequence says if its last word ends; its target does not matter
    sequences = encode(tokenizer, [text.strip() for text in texts])
    all_scores = ids_logprobs(
        model,
        [[*ids, ids[0]] for ids in sequences],
        batch_tokens=batch_tokens,
        stats=True,
        token_set=ends_word,
    )

    rows = []
    for number, (text, ids, scores) in enumerate(zip(texts, sequences, all_scores, strict=True), 1):
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        if not spans:
            continue
        n_tokens, is_cut = _tokens_through_words([texts_of_ids[i] for i in ids[1:]])  # (K,)
        if len(n_tokens) != len(spans):
            raise ValueError(
                f"sentence {number}: the tokenizer makes {len(n_tokens)} of its {len(spans)} words:"
                f" {text[:40]!r}"
            )
        columns = _figures_of_words(scores, ends_word, n_tokens, is_cut)
        for position, ((start, end), *figures) in enumerate(zip(spans, *columns, strict=True), 1):
            values = (number, text[start:end], position, start, end, *figures)
            rows.append(dict(zip(COLUMNS, values, strict=False)))
    return rows


def _tokens_that_end_words(texts_of_ids: Sequence[bytes], vocab_size: int) -> np.ndarray:
    """Return which tokens can only follow a complete word (V,): B in the module's docstring."""
    ends_word = np.zeros(max(vocab_size, len(texts_of_ids)), dtype=bool)
    for token_id, text in enumerate(texts_of_ids):
        ends_word[token_id] = not text or is_space(text)[0]
    return ends_word[:vocab_size]


def _figures_of_words(
    scores, ends_word: np.ndarray, n_tokens: np.ndarray, is_cut: np.ndarray
) -> tuple[list, list, list, list]:
    """Return surprisal, the same uncorrected, entropy and number of tokens of each word (K,)."""
    # figures after 0, 1, 2, ... tokens, in bits
    token_bits = -scores.logprobs[:-1] / math.log(2)
    bits = np.append(0, np.cumsum(token_bits))
    word_end_bits = -scores.set_logprobs / math.log(2)
    word_end_bits[:-1][~ends_word[scores.ids[:-1]]] = 0
    entropies = scores.entropies / math.log(2)

    # the same after 0, 1, 2, ... words
    places = np.append(0, n_tokens)
    is_cut = np.append(True, is_cut)
    uncorrected = np.where(is_cut, bits[places], math.nan)
    corrected = uncorrected + np.append(0, word_end_bits[n_tokens])
    entropies = np.where(is_cut, entropies[places], math.nan)
    return (
        np.diff(corrected).tolist(),
        np.diff(uncorrected).tolist(),
        entropies[:-1].tolist(),
        np.diff(places).tolist(),
    )


def _tokens_through_words(pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of tokens (K,) up to the end of each word, and if a word can end there.

    `pieces` has the bytes of each token. The second result (K,) is False if the last token of a
    word holds a part of the next one.
    """
    space = is_space(b"".join(pieces))
    is_word = np.concatenate([[False], ~space, [False]])
    starts = np.flatnonzero(is_word[1:] & ~is_word[:-1])
    ends = np.flatnonzero(~is_word[1:] & is_word[:-1])
    token_ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    last_tokens = np.searchsorted(token_ends, ends)
    next_starts = np.append(starts[1:], len(space))
    return last_tokens + 1, token_ends[last_tokens] <= next_starts


# ---- frequency ----------------------------------------------------------------------------------


def log2_frequencies(words: Iterable[str], training_text: Path) -> dict[str, float]:
    """Return log2((n + 1) / (N + 1)) of each word, which occurs n times in N words of text.

    A word must match exactly, with its punctuation. Adding 1 gives a word that never occurs a
    finite frequency.
    """
    counts = Counter(dict.fromkeys(words, 0))
    total = 0
    files = find_files(training_text, "train")
    n_bytes = sum(path.stat().st_size for path in files)
    with tqdm(
        total=n_bytes, desc="counting words", unit="B", unit_scale=True, disable=None, delay=2
    ) as bar:
        report = new_report()
        for path in files:
            for part in read_parts(path, report):
                part_words = part.split()
                total += len(part_words)
                counts.update(word for word in part_words if word in counts)
                bar.update(report["bytes_on_disk"] - bar.n)
    return {word: math.log2((count + 1) / (total + 1)) for word, count in counts.items()}


# ---- files --------------------------------------------------------------------------------------


def read_sentences(path: Path) -> list[str]:
    """Return the lines of a text file, or the column "text" or "sentence" of a .csv or .tsv file.

    Empty lines and cells are returned too, so that the numbers of the sentences fit the file. Raise
    ValueError if the file cannot be read, has no such column, or has no word.
    """
    text = read_utf8(path, "--surprisal takes a file of sentences")
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        sentences = text.split("\n")
    else:
        sentences = _read_column(path, text, delimiter)
    if not any(sentence.strip() for sentence in sentences):
        raise ValueError(f"{path} contains no sentence")
    return sentences


def _read_column(path: Path, text: str, delimiter: str) -> list[str]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        column = next((name for name in TEXT_COLUMNS if name in header), None)
        if column is None:
            raise ValueError(
                f"{path}: no column {' or '.join(TEXT_COLUMNS)}; its columns are "
                f"{', '.join(header[:8]) or 'none'}"
            )
        index = header.index(column)
        # csv skips nothing: an empty line is a row without cells
        return [row[index] if index < len(row) else "" for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows as a CSV file with the columns COLUMNS; NaN and None are empty cells."""
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(row[name]) for name in COLUMNS])


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.6f}" if math.isfinite(value) else ""


def holds_rows(path: Path) -> bool:
    """Return True if write_rows may have written this file: it is empty, or has its header."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.readline() in ("", ",".join(COLUMNS) + "\n")
    except (OSError, UnicodeDecodeError):
        return False
