"""How much of the held-out text stands in the training text too: whole documents, and runs of 13 words.

overlap = Overlap()
overlap.add("Once upon a time".lower().split(), last=True)      # each document of dev, in pieces of any size
overlap.start_train()
overlap.add("Once upon a time".lower().split(), last=True)      # each document of train
print(overlap.result())
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


NGRAM = 13  # words; the usual length in contamination checks of language models


@lru_cache(maxsize=1_000_000)
def word_hash(word: str) -> int:
    """64-bit hash of a word, the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def ngram_hashes(word_hashes: np.ndarray) -> np.ndarray:
    """64-bit hashes of all runs of NGRAM words: uint64 (W,) -> uint64 (max(0, W - NGRAM + 1),).

    A polynomial in an odd number modulo 2^64, all positions at once.
    """
    import numpy as np

    n = max(0, len(word_hashes) - NGRAM + 1)
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(NGRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + word_hashes[i : i + n]
    return hashes


class Overlap:
    """Finds the documents and n-grams of dev that occur in train: reads dev first, then train, once each.

    Words are split at white space and lower-cased, an n-gram does not cross documents. Memory: two 64-bit numbers for
    each word of dev, nothing for train.
    """

    def __init__(self) -> None:
        self.dev_ngrams: list[np.ndarray] = []  # hashes, an array for each piece of text
        self.dev_documents: list[bytes] = []  # digests
        self.shared_documents: set[bytes] = set()  # of dev and train
        self.table: np.ndarray | None = (
            None  # the sorted distinct n-grams of dev; None until train begins
        )
        self.digest = hashlib.blake2b(digest_size=16)  # of the document at hand
        self.tail: Sequence[int] = []  # the hashes of its last NGRAM - 1 words

    def start_train(self) -> None:
        """Dev has been read: sort its n-grams for the search."""
        import numpy as np

        self.dev_ngrams = np.concatenate([np.zeros(0, dtype=np.uint64), *self.dev_ngrams])
        self.table = np.unique(self.dev_ngrams)
        self.found = np.zeros(len(self.table), dtype=bool)
        self.known_documents = set(self.dev_documents)

    def add(self, words: list[str], last: bool) -> None:
        """Take in the next words (lower-cased) of the document at hand, its last ones or not."""
        import numpy as np

        self.digest.update("".join(f"{word} " for word in words).encode())
        hashes = np.fromiter(chain(self.tail, map(word_hash, words)), dtype=np.uint64)
        self.tail = hashes[-(NGRAM - 1) :]
        ngrams = ngram_hashes(hashes)
        if self.table is None:
            self.dev_ngrams.append(ngrams)
        elif len(self.table):
            places = np.searchsorted(self.table, ngrams)
            places[places == len(self.table)] = 0
            self.found[places[self.table[places] == ngrams]] = True
        if last:
            if self.table is None:
                self.dev_documents.append(self.digest.digest())
            elif self.digest.digest() in self.known_documents:
                self.shared_documents.add(self.digest.digest())
            self.digest, self.tail = hashlib.blake2b(digest_size=16), []

    def result(self) -> dict[str, Any]:
        """Counts for the manifest; an n-gram or a document that dev has twice counts twice.

        `places`: which documents of dev, counted from 0, are in train.
        """
        import numpy as np

        places = [
            i for i, digest in enumerate(self.dev_documents) if digest in self.shared_documents
        ]
        return {
            "ngram_words": NGRAM,
            "dev_documents": len(self.dev_documents),
            "dev_documents_in_train": len(places),
            "dev_ngrams": len(self.dev_ngrams),
            "dev_ngrams_in_train": int(
                self.found[np.searchsorted(self.table, self.dev_ngrams)].sum()
            ),
            "places": places,
        }
