"""Compare the overlap of held-out and training text with plain sets of words."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.data.overlap import Overlap, ngram_hashes

Documents = list[list[str]]  # words


def overlap_of_sets(dev: Documents, train: Documents) -> tuple[int, int, int]:
    """Return the shared documents, the held-out n-grams and the shared n-grams, from sets."""

    def ngrams(documents: Documents) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + 13]) for words in documents for i in range(len(words) - 12)]

    train_ngrams = set(ngrams(train))
    train_documents = {tuple(words) for words in train}
    return (
        sum(tuple(words) in train_documents for words in dev),
        len(ngrams(dev)),
        sum(ngram in train_ngrams for ngram in ngrams(dev)),
    )


def measure_overlap(dev: Documents, train: Documents, portion: int) -> tuple[int, int, int]:
    """Return the same counts from Overlap, which gets `portion` words of a document at a time."""
    overlap = Overlap()

    def add(documents: Documents) -> None:
        for words in documents:
            for i in range(0, len(words), portion):
                overlap.add(words[i : i + portion])
            overlap.end_document()

    add(dev)
    overlap.start_train()
    add(train)
    result = overlap.result()
    return result["dev_documents_in_train"], result["dev_ngrams"], result["dev_ngrams_in_train"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), portion=st.sampled_from([1, 5, 12, 13, 100]))
def test_the_overlap_equals_that_of_sets(seed, portion):
    rng = random.Random(seed)
    vocabulary = ["a", "b"]
    train = [rng.choices(vocabulary, k=rng.randint(1, 300)) for _ in range(rng.randint(0, 4))]
    dev = [rng.choices(vocabulary, k=rng.randint(1, 40)) for _ in range(rng.randint(0, 4))]
    dev += [document for document in train if rng.random() < 0.3]
    assert measure_overlap(dev, train, portion) == overlap_of_sets(dev, train)


def test_ngram_hashes_depend_on_the_words_and_their_order():
    words = np.random.default_rng(0).integers(0, 2**63, size=100, dtype=np.uint64)
    hashes = ngram_hashes(words)
    assert len(hashes) == 88
    assert len(set(hashes.tolist())) == 88
    assert ngram_hashes(words[5:30])[3] == hashes[8]
    assert len(ngram_hashes(words[:12])) == 0
    swapped = words.copy()
    swapped[[0, 8]] = swapped[[8, 0]]
    assert ngram_hashes(swapped)[0] != hashes[0]
