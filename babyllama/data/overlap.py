"""Measure how much held-out text is also in the training text.

    overlap = Overlap()
    overlap.add("once upon a time".split())  # the words of a held-out document, all or some
    overlap.end_document()
    overlap.start_train()
    overlap.add("once upon a time".split())  # the same for each training document
    overlap.end_document()
    print(overlap.result())

A model that has seen the held-out text can repeat it, and its score is then too good. Equal
documents are counted, and equal runs of 13 words, which also find a text that is copied in part.
Only hashes are compared, so the training text is never in memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

NGRAM = 13  # words; the usual length in contamination checks of language models


@lru_cache(maxsize=1_000_000)
def word_hash(word: str) -> int:
    """Return a 64-bit hash of a word, the same in every process (Python's hash is salted)."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def ngram_hashes(word_hashes: np.ndarray) -> np.ndarray:
    """Return 64-bit hashes of all runs of NGRAM words: (W,) -> (max(0, W - NGRAM + 1),), uint64.

    The hash of a run is a polynomial in an odd number modulo 2^64. It is computed for all positions
    at once, one word of the run after the other.
    """
    n = max(0, len(word_hashes) - NGRAM + 1)
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(NGRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + word_hashes[i : i + n]
    return hashes


class Overlap:
    """Find the held-out documents and n-grams that are also in the training text.

    Add the held-out text first, then the training text, each once. An n-gram does not extend across
    documents. Memory: two 64-bit numbers per held-out word, and nothing for the training text.
    """

    def __init__(self) -> None:
        self.is_train = False
        self.dev_ngrams: list[np.ndarray] = []  # hashes, an array for each portion of words
        self.dev_documents: list[bytes] = []  # digests, in order
        self.shared_documents: set[bytes] = set()
        # state of the current document
        self.digest = hashlib.blake2b(digest_size=16)
        self.last_hashes: Sequence[int] = []  # of its last NGRAM - 1 words

    def start_train(self) -> None:
        """Finish the held-out text; the documents that follow are training text."""
        self.is_train = True
        self.dev_ngrams = np.concatenate([np.zeros(0, dtype=np.uint64), *self.dev_ngrams])
        self.distinct_ngrams = np.unique(self.dev_ngrams)  # sorted
        self.is_shared = np.zeros(len(self.distinct_ngrams), dtype=bool)
        self.distinct_documents = set(self.dev_documents)

    def add(self, words: list[str]) -> None:
        """Add the next words of the current document, in lower case."""
        self.digest.update("".join(f"{word} " for word in words).encode())
        hashes = np.fromiter(
            itertools.chain(self.last_hashes, map(word_hash, words)), dtype=np.uint64
        )
        self.last_hashes = hashes[-(NGRAM - 1) :]
        ngrams = ngram_hashes(hashes)
        if not self.is_train:
            self.dev_ngrams.append(ngrams)
        elif len(self.distinct_ngrams):
            places = np.searchsorted(self.distinct_ngrams, ngrams)
            places[places == len(self.distinct_ngrams)] = 0
            self.is_shared[places[self.distinct_ngrams[places] == ngrams]] = True

    def end_document(self) -> None:
        """Finish the current document."""
        digest = self.digest.digest()
        if not self.is_train:
            self.dev_documents.append(digest)
        elif digest in self.distinct_documents:
            self.shared_documents.add(digest)
        self.digest = hashlib.blake2b(digest_size=16)
        self.last_hashes = []

    def result(self) -> dict[str, Any]:
        """Return the counts for the manifest; a repeated held-out document counts every time.

        `places` has the numbers, from 0, of the held-out documents that the training text repeats.
        """
        places = [i for i, d in enumerate(self.dev_documents) if d in self.shared_documents]
        shared_ngrams = self.is_shared[np.searchsorted(self.distinct_ngrams, self.dev_ngrams)]
        return {
            "ngram_words": NGRAM,
            "dev_documents": len(self.dev_documents),
            "dev_documents_in_train": len(places),
            "dev_ngrams": len(self.dev_ngrams),
            "dev_ngrams_in_train": int(shared_ngrams.sum()),
            "places": places,
        }
