"""Compare our word surprisal with that of minicons, word by word.

    python evaluate.py models/llama-10M --surprisal sentences.txt --output-path words.csv
    python experiments/surprisal_agreement.py models/llama-10M sentences.txt words.csv

The first command runs in the environment of this project, the second one in another, which has
minicons (pip install minicons==0.3.39) and needs nothing of ours. minicons adds up the tokens of a
word; with `bow_correction` it moves the probability of the space, as we do. It wants sentences with
single spaces, one per line.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from itertools import groupby
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def minicons_words(scorer, sentence: str, corrected: bool) -> list[tuple[str, float]]:
    """Return (word, surprisal in bits) of each word of a sentence by minicons."""
    options = {"surprisal": True, "base_two": True}
    (words,) = scorer.word_score_tokenized(
        [sentence], str.split, bow_correction=corrected, **options
    )
    return [(word, float(bits)) for word, bits in words]


def main(argv: list[str] | None = None) -> int:
    """Print the largest and the mean difference of all words, with and without the correction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("sentences", type=Path, help="text file, one sentence per line")
    parser.add_argument("words", type=Path, help="the table of evaluate.py for these sentences")
    args = parser.parse_args(argv)

    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(args.model, "cpu")
    lines = args.sentences.read_text(encoding="utf-8").split("\n")
    with args.words.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column, corrected in (("uncorrected_bits", False), ("surprisal_bits", True)):
        differences = []
        for number, words in groupby(rows, key=lambda row: int(row["sentence"])):
            ours = [(row["word"], float(row[column])) for row in words]
            theirs = minicons_words(scorer, lines[number - 1].strip(), corrected)
            assert [word for word, _ in theirs] == [word for word, _ in ours], lines[number - 1]
            pairs = zip(ours, theirs, strict=True)
            differences += [abs(our_bits - their_bits) for (_, our_bits), (_, their_bits) in pairs]
        mean = sum(differences) / len(differences)
        print(f"{column}: {len(differences):,} words, mean difference {mean:.2g} bits", end="")
        print(f", largest {max(differences):.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
