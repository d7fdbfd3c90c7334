"""Where words begin among the tokens of a text, so that what a model has read is counted in words, exactly.

A word is what str.split() parts: characters between white space. It counts once, in the token in which it begins,
however many tokens, pieces of a document or chunks it spans. DataProcessor writes these counts beside its chunks.

    words = Words(Path("data/cache/train-<key>.arrow"), processor.reports["train"])
    print(words.per_chunk(128).sum(), words.by_domain(np.ones(report["chunks"], int), 128))

It reads no text files and knows nothing of training (training/babylm.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_ASCII = bytes(byte < 0x80 and chr(byte).isspace() for byte in range(256))  # for bytes.translate
_WIDE = [
    chr(code).encode() for code in range(0x80, 0x3001) if chr(code).isspace()
]  # U+3000 is the last blank


def blanks(text: bytes) -> np.ndarray:
    """Which bytes of a UTF-8 text are white space as str.split() knows it: bool (n,)."""
    if not text.isascii():
        for blank in _WIDE:  # no character's bytes lie within those of others
            text = text.replace(blank, b" " * len(blank))
    return np.frombuffer(text.translate(_ASCII), bool)


class WordFile:
    """Writes, as documents become tokens, how many words begin in each token, and sums them up by source file.

    A tokenizer that is not byte-level (byte_lengths is None), or whose tokens are not those of the very bytes of the
    text, gives no file, and None for the words of every source.
    """

    def __init__(self, path: Path, byte_lengths: np.ndarray | None, tokenizer, sources: list[dict]):
        """byte_lengths (V,): bytes of text that each id stands for; each of sources gets `tokens` and `words`."""
        self.path, self.sources = path, sources
        self.lengths = None if byte_lengths is None else byte_lengths.copy()
        if self.lengths is not None:
            self.lengths[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = (
                1  # a newline in the text that is looked at: they part words too
            )
        self.inside = False  # whether the text so far ends within a word
        for source in sources:
            source |= {"tokens": 0, "words": 0}

    def __enter__(self) -> WordFile:
        self.file = self.path.open("wb")
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
        if self.lengths is None or error[0]:
            self.path.unlink()
        if self.lengths is None:
            for source in self.sources:
                source["words"] = None

    def add(self, source: dict, items: Sequence[str | int], ids: np.ndarray) -> None:
        """Take in texts and single special ids of a source, and the tokens of all."""
        starts = self._starts(items, ids)
        source["tokens"] += len(ids)
        if starts is not None:
            source["words"] += int(starts.sum(dtype=np.int64))
            self.file.write(starts.tobytes())

    def _starts(self, items: Sequence[str | int], ids: np.ndarray) -> np.ndarray | None:
        """Words that begin in each token: uint8 (len(ids),); None if they cannot be located."""
        if self.lengths is None:
            return None
        text = "".join(item if isinstance(item, str) else "\n" for item in items).encode()
        ends = np.cumsum(self.lengths[ids])
        if ends[-1] != len(text):
            self.lengths = None
            return None
        blank = blanks(text)
        begins = ~blank
        begins[1:] &= blank[:-1]
        begins[0] &= not self.inside
        self.inside = not blank[-1]
        before = np.cumsum(begins, dtype=np.uint8)[
            ends - 1
        ]  # modulo 256, as are its differences: no token holds more
        return np.diff(before, prepend=np.uint8(0))


class Words:
    """The words of a prepared text: by chunk of its full ones, and by domain (the name of the file)."""

    def __init__(self, arrow: Path, report: dict):
        """From the file beside the chunks and the split's report; ValueError where words could not be located."""
        marks = arrow.with_suffix(".words")
        if not marks.is_file() and report["sources"][0].get("words") is None:
            raise ValueError(
                f"{arrow}: its words are not located, because the tokenizer is not byte-level or changes the text; a "
                "tokenizer of train_tokenizer.py does neither"
            )
        if (
            not marks.is_file()
            or marks.stat().st_size < report["tokens"] - report["tokens_left_out"]
        ):
            raise ValueError(f"{marks}: damaged; delete {arrow}, and the text is read again")
        self.begins = np.asarray(np.memmap(marks, np.uint8, "r"))  # (tokens,)
        self.tokens = report["tokens"] - report["tokens_left_out"]  # in full chunks
        ends = list(itertools.accumulate(source["tokens"] for source in report["sources"]))
        starts = [0, *ends[:-1]]
        self.runs = [
            (s["domain"], a, b) for s, a, b in zip(report["sources"], starts, ends, strict=True)
        ]

    def per_chunk(self, length: int, offset: int = 0) -> np.ndarray:
        """Words that begin in each chunk of `length` tokens from `offset` on: int64 (n,)."""
        n = (self.tokens - offset) // length
        return (
            self.begins[offset : offset + n * length].reshape(n, length).sum(axis=1, dtype=np.int64)
        )

    def by_domain(self, times: np.ndarray, length: int, offset: int = 0) -> dict[str, int]:
        """Words seen of each domain when chunk i of `length` tokens from `offset` on was seen times[i] times."""
        seen = dict.fromkeys((domain for domain, _, _ in self.runs), 0)
        per_chunk, begins = self.per_chunk(length, offset), self.begins[offset:]
        for domain, start, stop in self.runs:
            start, stop = max(0, start - offset), min(len(per_chunk) * length, stop - offset)
            if start < stop:
                first, last = start // length, (stop - 1) // length
                counts = per_chunk[first : last + 1].copy()
                counts[0] -= begins[first * length : start].sum(
                    dtype=np.int64
                )  # of the domains before and after
                counts[-1] -= begins[stop : (last + 1) * length].sum(dtype=np.int64)
                seen[domain] += int(counts @ times[first : last + 1])
        return seen
