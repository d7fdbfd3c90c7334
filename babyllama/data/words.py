"""Count the words that begin in each token of a prepared text.

    counts = WordCounts(dataset["train"], tokenizer, processor.reports["train"]["sources"])
    print(counts.per_chunk().sum(), counts.by_domain(np.ones(counts.n_chunks(), int)))

BabyLM limits the words that a model may see, but a model reads tokens. A word is what str.split()
returns: characters between white space. It is counted in the token that contains its first byte, so
the counts of the chunks add up to the words of the text, wherever the chunks are cut.
training/babylm.py uses the counts; this module knows nothing about training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from babyllama.data.tokenizer import token_bytes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

BLOCK = 4096  # tokens that are counted at a time
OVERLAP = 3  # tokens; white space has at most three bytes in UTF-8, and a token has at least one
_IS_ASCII_SPACE = bytes(byte < 0x80 and chr(byte).isspace() for byte in range(256))
# U+3000 is the last code point that is white space
_WIDE_SPACES = [chr(code).encode() for code in range(0x80, 0x3001) if chr(code).isspace()]


def is_space(text: bytes) -> np.ndarray:
    """Return True for each byte of a UTF-8 text that is white space to str.split(): bool (n,).

    The text may begin or end within a character. The bytes of such a fragment are not white space.
    """
    if not text.isascii():
        # in UTF-8 the bytes of one character never occur within or across other characters
        for space in _WIDE_SPACES:
            text = text.replace(space, b" " * len(space))
    return np.frombuffer(text.translate(_IS_ASCII_SPACE), dtype=bool)


class TokenTables:
    """Tables that give, for each token of a vocabulary, the words that begin in it.

    `texts` has the bytes of each token id, at least one byte each.
    """

    def __init__(self, texts: list[bytes]):
        spaces = [is_space(text) for text in texts]
        self.texts = texts
        self.begins_with_space = np.array([space[0] for space in spaces])  # (V,)
        self.ends_with_space = np.array([space[-1] for space in spaces])  # (V,)
        inner_starts = [np.count_nonzero(space[:-1] & ~space[1:]) for space in spaces]
        self.inner_starts = np.array(inner_starts, dtype=np.uint8)  # (V,), after the first byte
        parts = [space[:n] for space in _WIDE_SPACES for n in range(1, len(space))]
        self.splits_space = np.array([text.endswith(tuple(parts)) for text in texts])  # (V,)

    def word_starts(self, token_ids: np.ndarray) -> np.ndarray:
        """Return how many words begin in each of (n,) tokens: uint8 (n,).

        The text before the first token is assumed to end in white space.
        """
        starts = np.empty(len(token_ids), dtype=np.uint8)
        for first in range(0, len(token_ids), BLOCK):
            # a character can be split over tokens, so take a few tokens around the block as well
            seen_from = max(0, first - OVERLAP)
            block = token_ids[seen_from : first + BLOCK + OVERLAP]
            if self.splits_space[block].any():
                counts = self._starts_from_bytes(block)
            else:  # no white space is split; the tables are 7 times as fast on real text
                counts = self._starts_from_tables(block)
            starts[first : first + BLOCK] = counts[first - seen_from :][:BLOCK]
        return starts

    def _starts_from_tables(self, token_ids: np.ndarray) -> np.ndarray:
        counts = self.inner_starts[token_ids]
        follows_space = np.append(True, self.ends_with_space[token_ids[:-1]])
        counts += follows_space & ~self.begins_with_space[token_ids]
        return counts

    def _starts_from_bytes(self, token_ids: np.ndarray) -> np.ndarray:
        pieces = [self.texts[token_id] for token_id in token_ids.tolist()]
        space = is_space(b"".join(pieces))
        begins = ~space
        begins[1:] &= space[:-1]
        lengths = np.array([len(piece) for piece in pieces])
        first_bytes = np.cumsum(lengths) - lengths
        return np.add.reduceat(begins.view(np.uint8), first_bytes)


class WordCounts:
    """Count the words of a prepared text by chunk, and by domain (the name of the file).

    `offset` moves the borders of all chunks by that many tokens, as data.random_offset does.
    """

    def __init__(self, chunks: Dataset, tokenizer: PreTrainedTokenizerFast, sources: list[dict]):
        """Count the words in all chunks; `sources` comes from the report of the same dataset."""
        column = chunks.data.column("input_ids")
        token_ids = np.concatenate([part.flatten().to_numpy() for part in column.chunks])
        # special tokens separate words
        tables = TokenTables([text or b"\n" for text in token_bytes(tokenizer)])
        self.length = len(chunks[0]["input_ids"])
        self.starts = tables.word_starts(token_ids)  # (tokens,)
        self.domains = [source["domain"] for source in sources]
        self.source_starts = np.cumsum([0] + [source["tokens"] for source in sources[:-1]])

    def n_chunks(self, offset: int = 0) -> int:
        """Return the number of full chunks from `offset` on."""
        return (len(self.starts) - offset) // self.length

    def per_chunk(self, offset: int = 0) -> np.ndarray:
        """Return how many words begin in each chunk: int64 (n_chunks,)."""
        end = offset + self.n_chunks(offset) * self.length
        chunks = self.starts[offset:end].reshape(-1, self.length)
        return chunks.sum(axis=1, dtype=np.int64)

    def by_domain(self, times_seen: np.ndarray, offset: int = 0) -> dict[str, int]:
        """Return the words seen of each domain, if chunk i was seen times_seen[i] times."""
        # a chunk can extend over two files, so cut the tokens into spans of one chunk and one file
        end = offset + self.n_chunks(offset) * self.length
        cuts = np.union1d(np.arange(offset, end, self.length), self.source_starts)
        cuts = cuts[(cuts >= offset) & (cuts < end)]
        chunk = (cuts - offset) // self.length
        source = np.searchsorted(self.source_starts, cuts, side="right") - 1

        words = np.add.reduceat(self.starts[:end], cuts, dtype=np.int64)
        words_seen = dict.fromkeys(self.domains, 0)
        for number, domain in enumerate(self.domains):
            is_of_source = source == number
            words_seen[domain] += int(words[is_of_source] @ times_seen[chunk[is_of_source]])
        return words_seen
