"""Check create_synthetic_data.py: the floor derived another way, agreement, pairs, files."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from functools import cache

import pytest

import create_synthetic_data
from create_synthetic_data import (
    COMPLEXITIES,
    PAIRS,
    Grammar,
    build_grammar,
    entropy_floor,
    sample_document,
)

GRAMMARS = {name: build_grammar(name) for name in COMPLEXITIES}
FILES = ("train/synthetic.train", "dev/synthetic.dev", "minimal_pairs.jsonl", "grammar.json")


def lexical(grammar: Grammar) -> set[str]:
    """Categories: nonterminals that become one word."""
    rules = grammar.rules
    return {
        left
        for left, options in rules.items()
        if all(len(r) == 1 and r[0] not in rules for _, r in options)
    }


def words_of(grammar: Grammar, *categories: str) -> set[str]:
    return {right[0] for category in categories for _, right in grammar.rules.get(category, ())}


def all_words(grammar: Grammar) -> set[str]:
    terminals = {
        symbol for options in grammar.rules.values() for _, right in options for symbol in right
    }
    return terminals - set(grammar.rules) - {",", "\n"}


def read_sentence(grammar: Grammar, text: str) -> list[str]:
    """The words and commas of a written sentence."""
    assert text.endswith(".") and text[0].isupper()
    words = re.findall(r"[A-Za-z]+|,", text[:-1])
    if words[0] not in all_words(grammar):
        words[0] = words[0].lower()
    return words


class Inside:
    """Probability of a sentence as the sum over all its derivations (the inside algorithm), left to right with a memo."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self.words = {
            left: {right[0]: p for p, right in grammar.rules[left]} for left in lexical(grammar)
        }

    def __call__(self, text: str, start: str = "SENTENCE") -> float:
        words = read_sentence(self.grammar, text)

        @cache
        def ends(symbol: str, i: int) -> dict[int, float]:
            """Where the symbol can end if it begins at i, with the probability of the words in between."""
            word = words[i] if i < len(words) else None
            if symbol in self.words:
                return {i + 1: self.words[symbol][word]} if word in self.words[symbol] else {}
            if symbol not in self.grammar.rules:
                return {i + 1: 1.0} if word == symbol else {}
            total: dict[int, float] = defaultdict(float)
            for p, right in self.grammar.rules[symbol]:
                reached = {i: p}
                for child in right:
                    further: dict[int, float] = defaultdict(float)
                    for j, q in reached.items():
                        for k, r in ends(child, j).items():
                            further[k] += q * r
                    reached = further
                for k, q in reached.items():
                    total[k] += q
            return total

        return ends(start, 0).get(len(words), 0.0)


INSIDE = {name: Inside(grammar) for name, grammar in GRAMMARS.items()}


def documents(grammar: Grammar, n: int, seed: int) -> list[tuple[str, float]]:
    rng = random.Random(seed)
    return [sample_document(grammar, rng) for _ in range(n)]


def standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


# ---- the floor ----------------------------------------------------------------------------------


def test_floor_equals_a_worked_example():
    """Two sentences, "a." with 3/4 and "bb, a." with 1/4; a document ends after each sentence with 1/2."""
    rules = {
        "DOCUMENT": ((0.5, ("SENTENCE",)), (0.5, ("SENTENCE", "\n", "DOCUMENT"))),
        "SENTENCE": ((0.75, ("a",)), (0.25, ("bb", ",", "a"))),
    }
    facts = entropy_floor(Grammar(rules, {}))
    sentence_bits = 0.75 * math.log2(4 / 3) + 0.25 * 2
    sentence_bytes = 0.75 * 2 + 0.25 * 6
    assert facts["bits_per_sentence"] == pytest.approx(sentence_bits)
    assert facts["bytes_per_sentence"] == pytest.approx(sentence_bytes)
    assert facts["bits_per_document"] == pytest.approx(
        2 * sentence_bits + 2
    )  # geometric: 2 sentences, 2 bits
    assert facts["bytes_per_document"] == pytest.approx(2 * sentence_bytes + 1)
    assert facts["words_per_document"] == pytest.approx(2 * 1.25)
    assert facts["bits_per_byte"] == pytest.approx(
        (2 * sentence_bits + 2) / (2 * sentence_bytes + 1)
    )


def test_floor_equals_an_enumeration_of_all_sentences():
    """The simple grammar with two words a category: every sentence written out, its entropy summed term by term."""
    full = GRAMMARS["simple"]
    rules = dict(full.rules)
    for category in lexical(full):
        total = sum(p for p, _ in rules[category][:2])
        rules[category] = tuple((p / total, right) for p, right in rules[category][:2])
    grammar = Grammar(rules, full.twins)

    @cache
    def language(symbol: str) -> list[tuple[float, list[str]]]:
        if symbol not in rules:
            return [(1.0, [symbol])]
        found = []
        for p, right in rules[symbol]:
            partial = [(p, [])]
            for child in right:
                partial = [
                    (p * q, words + more) for p, words in partial for q, more in language(child)
                ]
            found += partial
        return found

    probability = {create_synthetic_data.spell(words) + ".": p for p, words in language("SENTENCE")}
    assert len(probability) == len(language("SENTENCE")) > 10_000  # no text twice
    assert math.fsum(probability.values()) == pytest.approx(1)
    bits = math.fsum(-p * math.log2(p) for p in probability.values())
    size = math.fsum(p * len(text) for text, p in probability.items())
    facts = entropy_floor(grammar)
    assert facts["bits_per_sentence"] == pytest.approx(bits, rel=1e-9)
    assert facts["bytes_per_sentence"] == pytest.approx(size, rel=1e-9)
    lengths = [0.1 * 0.9 ** (k - 1) for k in range(1, 2000)]
    bits_of_length = math.fsum(-p * math.log2(p) for p in lengths)
    assert facts["bits_per_byte"] == pytest.approx(
        (10 * bits + bits_of_length) / (10 * size + 9), rel=1e-9
    )


@pytest.mark.parametrize("complexity", COMPLEXITIES)
def test_floor_equals_the_mean_cost_by_the_inside_algorithm(complexity):
    """-log2 p of fresh documents, by a parser that sums over all derivations of the text, against the closed form."""
    grammar, inside, facts = (
        GRAMMARS[complexity],
        INSIDE[complexity],
        entropy_floor(GRAMMARS[complexity]),
    )
    sample = documents(grammar, 300, seed=11)
    costs = []
    for text, bits in sample:
        lines = text.split("\n")
        costs.append(
            -sum(math.log2(inside(line)) for line in lines)
            - math.log2(0.1)
            - (len(lines) - 1) * math.log2(0.9)
        )
        assert costs[-1] == pytest.approx(
            bits, rel=1e-9
        )  # the one derivation has all of the text's probability
    floor = facts["bits_per_byte"]
    sizes = [len(text.encode()) for text, _ in sample]
    excess = [cost - floor * size for cost, size in zip(costs, sizes, strict=True)]
    assert abs(sum(excess) / len(excess)) < 4 * standard_error(excess)
    assert (
        standard_error(excess) / facts["bytes_per_document"] < 0.01 * floor
    )  # sharp enough to notice 4%
    counts = {"bits": costs, "bytes": sizes, "words": [len(text.split()) for text, _ in sample]}
    for name, values in counts.items():
        assert abs(sum(values) / len(values) - facts[f"{name}_per_document"]) < 4 * standard_error(
            values
        ), name


# ---- the language -------------------------------------------------------------------------------


def test_inflection():
    assert [create_synthetic_data.add_s(w) for w in ("dog", "box", "pony", "toy", "church", "go", "miss", "wash", "cry")] == [
        "dogs", "boxes", "ponies", "toys", "churches", "goes", "misses", "washes", "cries"]  # fmt: skip
    twins = GRAMMARS["complex"].twins
    assert (twins["children"], twins["wolf"], twins["teaches"], twins["play"]) == (
        "child",
        "wolves",
        "teach",
        "plays",
    )
    assert all(twins[twins[word]] == word != twins[word] for word in twins)


@pytest.mark.parametrize(
    "complexity, size", [("simple", (50, 75)), ("medium", (150, 250)), ("complex", (400, 600))]
)
def test_lexicon(complexity, size):
    grammar = GRAMMARS[complexity]
    assert size[0] <= len(all_words(grammar)) <= size[1]
    after_a = [c for c in lexical(grammar) if re.match("N-.*-sg|SIZE|QUALITY", c)]
    assert not [
        word for word in words_of(grammar, *after_a) if word[0] in "aeiou"
    ]  # the grammar has no "an"
    words = all_words(grammar)
    assert len({word.lower() for word in words}) == len(words)
    assert all(re.fullmatch("[A-Za-z]+", word) for word in words)
    capitalized = {word for word in words if word != word.lower()}
    assert capitalized == words_of(grammar, "NAME")  # no misspelt nonterminal
    for options in grammar.rules.values():
        assert math.fsum(p for p, _ in options) == pytest.approx(1)
        assert min(p for p, _ in options) > 0
    for category, right in create_synthetic_data._definitions(create_synthetic_data.LEXICON):
        _, _, largest, *entries = right.split()
        assert len(entries) == len(set(entries)) == int(largest), category


SINGULAR = {"a", "this", "every", "each"}
PLURAL = {"these", "some", "many", "two", "three", "several", "most"}


def check_agreement(grammar: Grammar, words: list[str]) -> int:
    """Numbers compared from left to right, without the grammar's rules; returns how many agreements were looked at."""
    number = {}  # of nouns, names, pronouns, finite verbs
    for n in ("sg", "pl"):
        nouns = words_of(grammar, f"N-being-{n}", f"N-thing-{n}", f"N-place-{n}")
        verbs = words_of(
            grammar, *(c for c in lexical(grammar) if c.startswith("V-") and c.endswith(n))
        )
        number |= dict.fromkeys(nouns, ("noun", n)) | dict.fromkeys(verbs, ("verb", n))
    number |= dict.fromkeys([*words_of(grammar, "NAME"), "he", "she"], ("noun", "sg")) | {
        "they": ("noun", "pl")
    }
    number |= {
        "we": ("noun", "pl"),
        "is": ("verb", "sg"),
        "does": ("verb", "sg"),
        "are": ("verb", "pl"),
    }
    looked_at = 0
    for i, word in enumerate(words):
        if word in SINGULAR | PLURAL:
            noun = next(w for w in words[i:] if number.get(w, ("",))[0] == "noun")
            assert number[noun][1] == ("sg" if word in SINGULAR else "pl"), words
            looked_at += 1
    if "not" in words:  # after do and does comes the bare form, written like the plural
        i = words.index("not")
        assert number[words[i + 1]] == ("verb", "pl"), words
        number["do"] = ("verb", "pl")
        words = words[: i + 1] + words[i + 2 :]
    if "," in words:
        words = words[words.index(",") + 1 :]
    marks = [(*number[w], i) for i, w in enumerate(words) if w in number]
    verbs = [(n, i) for kind, n, i in marks if kind == "verb"]
    head = marks[0][1]
    assert marks[0][0] == "noun" and verbs[-1][0] == head, words  # whatever comes between
    if "that" in words:
        (first, _), that = verbs[0], words.index("that")
        inner = next((kind, n) for kind, n, i in marks if i > that)
        assert first == (head if inner[0] == "verb" else inner[1]), words
    return looked_at + len(verbs)


@pytest.mark.parametrize("complexity", ["simple", "medium"])
def test_agreement_holds(complexity):
    grammar, looked_at, relatives = GRAMMARS[complexity], 0, 0
    for text, _ in documents(grammar, 200, seed=31):
        for line in text.split("\n"):
            words = read_sentence(grammar, line)
            if (
                words.count("that") <= 1
            ):  # at most one relative clause: the last verb is the main verb
                looked_at += check_agreement(grammar, words)
                relatives += "that" in words
    assert looked_at > 2000 and (relatives > 100) == (complexity == "medium")
    with pytest.raises(AssertionError):
        check_agreement(grammar, ["the", "dogs", "sees", "the", "cat"])


def test_complex_has_long_dependencies():
    """Nested relative clauses, embedded clauses and clauses before a comma occur and are not everything."""
    lines = [
        line
        for text, _ in documents(GRAMMARS["complex"], 300, seed=41)
        for line in text.split("\n")
    ]
    share = {pattern: sum(bool(re.search(pattern, line)) for line in lines) / len(lines)
             for pattern in (r"that .*that ", r"(say|think|hope)s? that ", r"^(When|While|Because) .*, ", r", (and|but) ")}  # fmt: skip
    assert all(0.005 < value < 0.3 for value in share.values()), share
    assert 6 < sum(len(line.split()) for line in lines) / len(lines) < 12


# ---- minimal pairs ------------------------------------------------------------------------------

BLIMP = {"sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "pairID", "simple_LM_method",
         "one_prefix_method", "two_prefix_method", "lexically_identical"}  # fmt: skip
ONE_PREFIX = {"one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad"}
TWO_PREFIX = {"two_prefix_prefix_good", "two_prefix_prefix_bad", "two_prefix_word"}


@pytest.mark.parametrize("complexity", COMPLEXITIES)
def test_good_sentences_parse_and_bad_ones_do_not(complexity):
    grammar, inside = GRAMMARS[complexity], INSIDE[complexity]
    uids = [uid for uid, (level, _) in PAIRS.items() if level <= COMPLEXITIES.index(complexity)]
    for uid in uids:
        pairs = list(create_synthetic_data.sample_pairs(grammar, uid, 60, random.Random(51)))
        assert len({pair["sentence_good"] for pair in pairs}) == 60 and {
            pair["UID"] for pair in pairs
        } == {uid}
        for pair in pairs:
            good, bad = pair["sentence_good"], pair["sentence_bad"]
            assert inside(good) > 0 and inside(bad) == 0, (good, bad)
            one = good.rstrip(".").split(), bad.rstrip(".").split()
            different = [i for i, (a, b) in enumerate(zip(*one, strict=True)) if a != b]
            assert len(different) == 1
            if pair["one_prefix_method"]:
                assert set(pair) == BLIMP | ONE_PREFIX and not pair["two_prefix_method"]
                prefix = pair["one_prefix_prefix"]
                assert good.startswith(f"{prefix} {pair['one_prefix_word_good']}")
                assert bad.startswith(f"{prefix} {pair['one_prefix_word_bad']}")
            else:
                assert set(pair) == BLIMP | TWO_PREFIX
                assert good.startswith(
                    f"{pair['two_prefix_prefix_good']} {pair['two_prefix_word']}"
                )
                assert bad.startswith(f"{pair['two_prefix_prefix_bad']} {pair['two_prefix_word']}")


def test_pairs_are_balanced_and_attractors_pull_the_wrong_way():
    grammar = GRAMMARS["complex"]
    singular, plural = (words_of(grammar, f"N-being-{n}", f"N-place-{n}") for n in ("sg", "pl"))
    for uid in (
        "subject_verb_across_pp",
        "subject_verb_across_object_relative",
        "subject_verb_across_two_pps",
    ):
        numbers = []
        for pair in create_synthetic_data.sample_pairs(grammar, uid, 40, random.Random(52)):
            nouns = [
                w in plural for w in pair["one_prefix_prefix"].split() if w in singular | plural
            ]
            assert len(set(nouns[1:])) == 1 and nouns[0] != nouns[1]
            numbers.append(nouns[0])
        assert sum(numbers) == 20


# ---- files and the command line -----------------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_grammar_json_describes_the_files(tmp_path, capsys):
    assert (
        create_synthetic_data.main(
            ["--num-tokens", "5000", "--output-dir", str(tmp_path), "--num-pairs", "20"]
        )
        == 0
    )
    output = capsys.readouterr().out
    facts = json.loads((tmp_path / "grammar.json").read_text())
    assert sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()
    ) == sorted(FILES)
    inside = INSIDE["medium"]
    for split, least in (("train", 5000), ("dev", 500)):
        text = (tmp_path / split / f"synthetic.{split}").read_text(encoding="ascii")
        assert text.endswith(".\n")
        parts, counts = text[:-1].split("\n\n\n"), facts["text"][split]
        assert "\n\n" not in "".join(parts) and len(parts) == counts["documents"]
        assert len(text.split()) == counts["words"] and least <= counts["words"] < least + 1000
        assert sum(len(part.encode()) for part in parts) == counts["bytes"]
        lines = [line for part in parts for line in part.split("\n")]
        assert len(lines) == counts["sentences"]
        if split == "dev":
            bits = -sum(math.log2(inside(line)) for line in lines)
            bits -= len(parts) * math.log2(0.1) + (len(lines) - len(parts)) * math.log2(0.9)
            assert counts["true_bits_per_byte"] == pytest.approx(bits / counts["bytes"], rel=1e-8)
    rules = {
        a: tuple((p, tuple(right.split(" "))) for right, p in r.items())
        for a, r in facts["rules"].items()
    }
    assert rules == GRAMMARS["medium"].rules
    assert facts["floor"] == pytest.approx(entropy_floor(Grammar(rules, {})))
    assert f"{entropy_floor(GRAMMARS['medium'])['bits_per_byte']:.4f}" in output
    pairs = [
        json.loads(line) for line in (tmp_path / "minimal_pairs.jsonl").read_text().splitlines()
    ]
    assert Counter(pair["UID"] for pair in pairs) == dict.fromkeys(
        facts["minimal_pairs"]["kinds"], 20
    )
    train = set((tmp_path / "train" / "synthetic.train").read_text().split("\n"))
    assert facts["minimal_pairs"]["good_sentences_in_train"] == len(
        train & {pair["sentence_good"] for pair in pairs}
    )


PINNED = {
    "simple": ("5bf2e53cac19164a", "22d7ec338cc4cdc4", "ffcd86a12b9b5e7f"),
    "medium": ("f301a26971c9bb42", "9f05fba9c4223389", "172cf6811dcca4e4"),
    "complex": ("bfc241b5fbc69cb9", "f8e42fb4aac9cfd2", "f58a0251b6476b1d"),
}


@pytest.mark.parametrize("complexity", COMPLEXITIES)
def test_text_of_a_seed_never_changes(tmp_path, complexity):
    """SHA-256 of the files of an earlier version: published figures name the seed, not the text."""
    create_synthetic_data.create_synthetic_data(tmp_path, 20_000, complexity, seed=7, num_pairs=30)
    files = contents(tmp_path)
    digests = [hashlib.sha256(files[name]).hexdigest() for name in FILES[:3]]
    assert tuple(digest[:16] for digest in digests) == PINNED[complexity]


def test_same_seed_same_bytes(tmp_path):
    def make(name, **arguments):
        create_synthetic_data.create_synthetic_data(
            tmp_path / name, **{"num_tokens": 3000, "num_pairs": 10, **arguments}
        )
        return contents(tmp_path / name)

    first = make("a")
    assert make("b") == first
    other = make("c", seed=7)
    assert all(other[name] != first[name] for name in FILES)
    dev_lines = first["dev/synthetic.dev"].split(b"\n\n\n")
    assert not set(dev_lines[:3]) & set(first["train/synthetic.train"].split(b"\n\n\n"))
    fewer = make("a", num_pairs=5)  # into the same place
    assert fewer["train/synthetic.train"] == first["train/synthetic.train"]
    assert fewer["minimal_pairs.jsonl"] != first["minimal_pairs.jsonl"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--num-tokens", "-5"], ["num-tokens", "-5", "1 or more"]),
        (["--num-tokens", "0"], ["num-tokens", "0"]),
        (["--num-pairs", "0"], ["num-pairs", "0", "1 to"]),
        (["--num-pairs", "99999999"], ["num-pairs", "10000"]),
        (["--complexity", "hard"], ["complexity", "'hard'", "simple, medium, complex"]),
    ],
)
def test_a_wrong_value_gets_one_error_line(arguments, words, tmp_path, capsys):
    assert create_synthetic_data.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and all(word in error for word in words)
    )
    assert not (tmp_path / "out").exists()


def test_a_file_instead_of_a_directory_is_an_error_and_nothing_is_lost(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert (
        create_synthetic_data.main(["--num-tokens", "100", "--output-dir", str(tmp_path / "file")])
        == 2
    )
    assert "is a file; give a directory" in capsys.readouterr().err
    assert (
        create_synthetic_data.main(
            ["--num-tokens", "100", "--output-dir", str(tmp_path / "file" / "below")]
        )
        == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
    out = tmp_path / "out"
    create_synthetic_data.create_synthetic_data(out, num_tokens=100, num_pairs=2)
    before = {
        name: content for name, content in contents(out).items() if not name.startswith("train")
    }
    (out / "train" / "synthetic.train").unlink()
    (out / "train").rmdir()
    (out / "train").write_text("mine")
    assert create_synthetic_data.main(["--num-tokens", "200", "--output-dir", str(out)]) == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    assert sorted(p.name for p in out.iterdir()) == [
        "dev",
        "grammar.json",
        "minimal_pairs.jsonl",
        "train",
    ]


def test_files_of_other_programs_are_not_replaced(tmp_path, capsys):
    mine = tmp_path / "train" / "synthetic.train"
    mine.parent.mkdir()
    mine.write_text("mine")
    argv = ["--num-tokens", "100", "--num-pairs", "2", "--output-dir", str(tmp_path)]
    assert create_synthetic_data.main(argv) == 2 and mine.read_text() == "mine"
    assert f"{mine} exists and was not written by this script" in capsys.readouterr().err
    (tmp_path / "grammar.json").write_text("{}")
    assert create_synthetic_data.main(argv) == 2 and mine.read_text() == "mine"
    mine.unlink()
    (tmp_path / "grammar.json").unlink()
    assert (
        create_synthetic_data.main(argv) == create_synthetic_data.main([*argv, "--seed", "2"]) == 0
    )  # its own it replaces
