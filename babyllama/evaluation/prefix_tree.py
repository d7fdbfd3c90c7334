"""Pack texts with common beginnings into one row.

The candidates of a multiple-choice item often differ in a single word, so most of what a model
reads is repeated. In a packed row it reads each beginning once. The texts "a b c", "a b d" and "e"
become a row of five tokens instead of three rows of seven:

    place    0  1  2  3  4
    token    a  b  c  d  e
    parent   0  0  1  1  4    place of the token before it; a first token is its own parent
    depth    0  1  2  2  0    position in its text

A token attends to its ancestors and to itself, and its position is its depth. So its hidden state
is the same as if the model had read the text alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SPARE_TOKENS = 48  # room after the first text; a larger tree shares more, but attention costs more


@dataclass
class PrefixTree:
    """Some texts as one row of tokens; `paths` maps a text number to places in the row."""

    capacity: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)

    def add(self, number: int, ids: Sequence[int], branch: Sequence[int]) -> None:
        """Append a text whose first tokens are already in the row, at the places `branch`."""
        shared = len(branch)
        first_new = len(self.tokens)
        path = [*branch, *range(first_new, first_new + len(ids) - shared)]
        self.tokens += ids[shared:]
        self.parents += [path[max(0, depth - 1)] for depth in range(shared, len(ids))]
        self.depths += range(shared, len(ids))
        self.paths[number] = path


def build_trees(texts: Sequence[Sequence[int]], context: int) -> list[PrefixTree]:
    """Pack token ids into trees, longest first; skip texts that are empty or exceed `context`."""
    trees: list[PrefixTree] = []
    previous: Sequence[int] = []
    path: list[int] = []
    # in alphabetical order each text shares the most with the one before it
    for number in sorted(range(len(texts)), key=texts.__getitem__):
        ids = texts[number]
        if not 0 < len(ids) <= context:
            continue
        shared = shared_length(previous, ids)
        if not trees or len(trees[-1].tokens) + len(ids) - shared > trees[-1].capacity:
            trees.append(PrefixTree(capacity=len(ids) + SPARE_TOKENS))
            shared = 0
        trees[-1].add(number, ids, branch=path[:shared])
        path = trees[-1].paths[number]
        previous = ids
    trees.sort(key=lambda tree: -len(tree.tokens))
    return trees


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts share at their beginning."""
    for length, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return length
    return min(len(a), len(b))


def tree_inputs(trees: Sequence[PrefixTree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens (B, T), depths (B, T) and visibility (B, T, T) of trees, padded on the right.

    visibility[b, i, j] is True if token i attends to token j. Padding sees itself only.
    """
    width = max(len(tree.tokens) for tree in trees)
    shape = (len(trees), width)
    tokens = np.full(shape, trees[0].tokens[0])
    depths = np.zeros(shape, dtype=np.int64)
    parents = np.tile(np.arange(width), (len(trees), 1))
    for row, tree in enumerate(trees):
        length = len(tree.tokens)
        tokens[row, :length] = tree.tokens
        depths[row, :length] = tree.depths
        parents[row, :length] = tree.parents

    # climb from all tokens at once and mark each ancestor; a token at the root stays there
    visible = np.zeros((*shape, width), dtype=bool)
    ancestors = np.tile(np.arange(width), (len(trees), 1))
    for _ in range(depths.max() + 1):
        np.put_along_axis(visible, ancestors[..., None], True, axis=2)
        ancestors = np.take_along_axis(parents, ancestors, axis=1)
    return tokens, depths, visible
