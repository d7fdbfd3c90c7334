"""Generate English-like text whose entropy is known.

    python create_synthetic_data.py --num-tokens 1000000 --output-dir ./data/synthetic
    python create_synthetic_data.py --num-tokens 50000 --complexity simple --seed 7 --num-pairs 100

The text comes from a probabilistic grammar with number agreement, so the lowest possible loss is
known, and a training run shows how close a model gets to it. --num-tokens is the number of words of
the training text, rounded up to complete documents; the held-out text is a tenth as long. The
output directory gets

    train/synthetic.train, dev/synthetic.dev  one sentence a line, two blank lines between documents
    minimal_pairs.jsonl                       BLiMP's fields; one word has the wrong number
    grammar.json                              rules, seed, counts and the floor in bits per byte

The entropy floor. A document is one or more sentences joined by newlines, with no newline at the
end. The number of sentences has a geometric distribution. No text has two derivations, so the
entropy of the text is the entropy of its derivation. It solves a linear system over the
nonterminals A with rules r of probability p_r (Grenander 1967; Chi 1999; Nederhof and Satta 2008):

    h(A) = sum_r p_r (-log2 p_r + sum of h(B) over the nonterminals B of r)

Expected lengths solve the same system. The floor is h(DOCUMENT) / expected bytes of a document.
Documents are independent, so for every model the expected -log2 p of a document (including its
end), divided by the expected bytes of its text, is at or above the floor. A finite text can cost
less by chance, so the cost of each text under the grammar is recorded too (true_bits_per_byte).

It does not imitate English beyond agreement and word order: the sentences of a document have no
common topic.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from math import log, log2
from pathlib import Path

from babyllama.cli import Parser, run_script
from babyllama.data.text_files import find_files
from babyllama.files import atomic_write, check_replaceable, read_json

COMPLEXITIES = ("simple", "medium", "complex")
SENTENCES_PER_DOCUMENT = 10  # mean of the geometric distribution
MAX_PAIRS = 10_000  # of one kind; the simple grammar has not many more

# CATEGORY = sizes words. The sizes are the numbers of words that the simple, medium and complex
# grammars use, and the words go from frequent to rare. Nouns (N) and verbs (V) get both numbers. No
# form occurs twice, and no noun or adjective begins with a vowel, because the grammar has only "a".
LEXICON = """
    N-being = 12 24 64 dog cat girl boy child/children bird teacher farmer man/men woman/women
        mouse/mice baby horse rabbit king queen friend brother sister mother father cow doctor
        bear wolf/wolves fox goat duck goose/geese frog tiger lion monkey pony puppy kitten
        princess prince wizard pirate soldier sailor baker dancer singer writer driver hunter
        gardener captain neighbor cousin daughter son student lady knight robot spider
        butterfly turtle donkey dragon thief/thieves
    N-thing = 0 14 40 ball book box cake cup hat chair table lamp toy coat key bag letter boat
        basket picture candle shoe pencil bottle spoon knife/knives plate pot kite drum bell
        flower blanket button ladder bucket mirror clock coin pie loaf/loaves doll sandwich
    N-place = 0 10 28 house garden school river park farm road tree barn shop forest hill lake
        bridge village castle tower field mountain beach kitchen market church gate wall cave
        library pond
    V-self = 6 10 24 sleep laugh sing jump swim smile dance play cry wait talk work rest dream
        eat shout whisper sneeze listen yawn giggle snore wander complain
    V-being = 6 10 24 see like help chase hear follow love know visit meet call watch hug
        teach trust thank greet scare tease remember forget protect admire invite
    V-thing = 0 8 18 carry want find hold buy make keep bring push drop wash fix throw catch
        pull lift sell touch
    V-go = 0 4 6 go walk run hurry return travel
    V-say = 0 0 8 say think hope believe feel claim guess pretend
    SIZE = 3 5 8 big little small tall tiny huge large short
    QUALITY-being = 5 8 22 happy young sad kind brave tired clever hungry quiet friendly lazy
        proud gentle polite lonely cheerful nervous shy silly wise curious famous
    QUALITY-thing = 0 7 17 red new heavy blue broken green dirty yellow wooden white black
        soft round brown shiny cheap pretty
    QUALITY-place = 0 3 7 dark beautiful cold peaceful lovely crowded warm
    PREP = 0 3 5 near behind beside by around
    ADVERB = 0 5 10 often never always sometimes quickly usually rarely happily quietly slowly
    NAME = 0 6 20 Tom Mary Ben Anna Sam Lucy Max Emma Jack Alice Peter Clara Leo Nina Henry
        Julia David Sarah Paul Laura
"""

# NONTERMINAL = weight symbols | weight symbols ...
# {n} is sg or pl, {be} and {do} agree with it, and {c} is being, thing or place. Each complexity
# has the rules of the one before it, except those that it defines again. To keep every sentence
# unambiguous, a noun takes at most one PP or relative clause, a verb takes no such PP, and "and"
# joins verbs only after a bare one.
RULES = {
    "simple": """
        SENTENCE      = 1 CLAUSE
        CLAUSE        = 5 NP-being-sg PLAIN-sg | 4 NP-being-pl PLAIN-pl
        PLAIN-{n}     = 4 V-self-{n} | 6 V-being-{n} ANY-being | 2 {be} QUALITY-being
        ANY-{c}       = 5 NP-{c}-sg | 4 NP-{c}-pl
        NP-{c}-{n}    = 3 DET NOM-{c}-{n} | 2 DET-{n} NOM-{c}-{n}
        NOM-{c}-{n}   = 6 N-{c}-{n} | 1 SIZE N-{c}-{n} | 2 QUALITY-{c} N-{c}-{n}
        DET           = 8 the | 1 my | 1 her
        DET-sg        = 5 a | 3 this | 1 every
        DET-pl        = 3 these | 3 some | 1 many | 1 two
    """,
    "medium": """
        SENTENCE      = 9 CLAUSE | 1 TIME , CLAUSE
        TIME          = 3 today | 2 at night | 1 in the morning | 1 in the evening
        CLAUSE        = 8 SUBJECT-sg VP-sg | 6 SUBJECT-pl VP-pl
                      | 1 MOD-thing-sg is STATE-thing | 1 MOD-thing-pl are STATE-thing
        SUBJECT-sg    = 2 NAME | 1 he | 1 she | 8 NP-being-sg | 2 NP-being-sg PP
                      | 2 NP-being-sg REL-being-sg
        SUBJECT-pl    = 1 they | 1 we | 8 NP-being-pl | 2 NP-being-pl PP
                      | 2 NP-being-pl REL-being-pl
        MOD-{c}-{n}   = 12 NP-{c}-{n} | 1 NP-{c}-{n} PP
        PP            = 4 LOCATION | 1 with ANY-thing
        LOCATION      = 3 PREP ANY-place | 2 PREP ANY-being
        REL-being-{n} = 3 that V-self-{n} | 4 that V-being-{n} ANY-being
                      | 2 that INNER-sg V-being-sg | 2 that INNER-pl V-being-pl
        INNER-sg      = 1 NAME | 1 he | 4 MOD-being-sg
        INNER-pl      = 1 they | 4 MOD-being-pl
        VP-{n}        = 16 PLAIN-{n} | 2 ADVERB ACT-{n} | 1 {do} not ACT-pl
        PLAIN-{n}     = 6 ACT-{n} | 1 {be} STATE-being
        ACT-{n}       = 3 V-self-{n} | 1 V-being-{n} NAME | 4 V-being-{n} ANY-being
                      | 3 V-thing-{n} ANY-thing | 2 V-go-{n} to ANY-place
        ANY-{c}       = 5 MOD-{c}-sg | 4 MOD-{c}-pl
        STATE-{c}     = 1 SIZE | 3 QUALITY-{c} | 1 LOCATION
        NOM-{c}-{n}   = 16 N-{c}-{n} | 3 SIZE N-{c}-{n} | 4 QUALITY-{c} N-{c}-{n}
                      | 1 SIZE QUALITY-{c} N-{c}-{n}
        DET-pl        = 3 these | 3 some | 2 many | 1 two | 1 three
    """,
    "complex": """
        SENTENCE      = 12 CLAUSE | 2 TIME , CLAUSE | 1 WHEN CLAUSE , CLAUSE
                      | 1 CLAUSE , LINK CLAUSE
        WHEN          = 3 when | 2 because | 1 while | 1 before | 1 after
        LINK          = 3 and | 2 but | 1 so
        MOD-{c}-{n}   = 12 NP-{c}-{n} | 1 NP-{c}-{n} PP | 1 NP-{c}-{n} REL-{c}-{n}
        PP            = 5 LOCATION | 1 with ANY-thing | 1 from ANY-place
        REL-being-{n} = 3 that VP-{n} | 1 that INNER-sg V-being-sg | 1 that INNER-pl V-being-pl
        REL-thing-{n} = 1 that {be} STATE-thing | 1 that INNER-sg V-thing-sg
                      | 1 that INNER-pl V-thing-pl
        REL-place-{n} = 1 that {be} STATE-place
        ACT-{n}       = 4 V-self-{n} | 1 V-being-{n} NAME | 6 V-being-{n} ANY-being
                      | 5 V-thing-{n} ANY-thing | 2 V-go-{n} to ANY-place | 2 V-say-{n} that CLAUSE
                      | 1 V-self-{n} and ACT-{n}
        DET           = 12 the | 2 my | 2 her | 2 his | 1 our | 1 their
        DET-sg        = 6 a | 3 this | 1 every | 1 each
        DET-pl        = 3 these | 3 some | 2 many | 1 two | 1 three | 1 several | 1 most
    """,
}

NUMBERS = {
    "sg": {"be": "is", "do": "does", "this": "this"},
    "pl": {"be": "are", "do": "do", "this": "these"},
}

# Minimal pairs: the first complexity that has them, and the sentence. The word at * gets the wrong
# number. {n} is the number that matters and {m} the other one, so a noun in between misleads.
PAIRS = {
    "subject_verb_adjacent": (0, "NP-being-{n} *PLAIN-{n}"),
    "subject_verb_across_pp": (1, "NP-being-{n} PREP NP-being-{m} *PLAIN-{n}"),
    "subject_verb_across_subject_relative": (
        1,
        "NP-being-{n} that V-being-{n} NP-being-{m} *PLAIN-{n}",
    ),
    "subject_verb_across_object_relative": (
        1,
        "NP-being-{n} that NP-being-{m} V-being-{m} *PLAIN-{n}",
    ),
    "verb_in_subject_relative": (1, "NP-being-{n} that *V-being-{n} NP-being-{m} PLAIN-{n}"),
    "verb_in_object_relative": (1, "NP-being-{m} that NP-being-{n} *V-being-{n} PLAIN-{m}"),
    "subject_verb_across_two_pps": (
        1,
        "NP-being-{n} PREP NP-place-{m} PREP NP-place-{m} *PLAIN-{n}",
    ),
    "subject_verb_in_embedded_clause": (2, "NP-being-{m} V-say-{m} that NP-being-{n} *PLAIN-{n}"),
    "noun_after_determiner": (0, "NP-being-{m} V-being-{m} DET-{n} *N-being-{n}"),
    "noun_after_determiner_and_adjective": (
        0,
        "NP-being-{m} V-being-{m} DET-{n} SIZE *N-being-{n}",
    ),
    "determiner_before_noun": (0, "NP-being-{m} V-being-{m} *{this} N-being-{n}"),
}

Rule = tuple[float, tuple[str, ...]]  # probability (or weight), symbols


# ---- the grammar --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar:
    """Rules of a probabilistic context-free grammar with start symbol DOCUMENT.

    rules: nonterminal -> ((probability, symbols), ...). A symbol without rules is a word, "," or a
    newline. twins: word -> its form in the other number.
    """

    rules: dict[str, tuple[Rule, ...]]
    twins: dict[str, str]

    @cached_property
    def tables(self) -> dict[str, tuple[list[float], list[Rule]]]:
        """Return, for the sampler, nonterminal -> (thresholds, [(bits, reversed symbols), ...])."""
        tables = {}
        for left, rules in self.rules.items():
            thresholds = list(accumulate(p for p, _ in rules))[:-1]
            tables[left] = (thresholds, [(-log2(p), right[::-1]) for p, right in rules])
        return tables


def add_s(word: str) -> str:
    """Return the regular plural of a noun, or the third person singular of a verb."""
    if word.endswith(("s", "sh", "ch", "x", "o")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _definitions(text: str) -> Iterator[list[str]]:
    """Yield [left, right] of each `left = right`; a line without " = " continues the last one."""
    for line in re.sub(r"\n(?!.* = )", " ", text.strip()).splitlines():
        yield line.strip().split(" = ")


def read_lexicon(level: int) -> tuple[dict[str, list[Rule]], dict[str, str]]:
    """Return the weighted one-word rules of every category, and the twins.

    The k-th word weighs 1 / (k + 1), similar to Zipf's law.
    """
    rules = {}
    twin_pairs = list(zip(NUMBERS["sg"].values(), NUMBERS["pl"].values(), strict=True))
    for name, right in _definitions(LEXICON):
        numbers_and_words = right.split()
        words = numbers_and_words[3 : 3 + int(numbers_and_words[level])]
        forms = {name: words}
        if name.startswith(("N-", "V-")):
            bare = [word.split("/")[0] for word in words]
            inflected = [word.split("/")[1] if "/" in word else add_s(word) for word in words]
            twin_pairs += zip(bare, inflected, strict=True)
            # the bare form of a noun is its singular, the bare form of a verb is its plural
            singular, plural = (bare, inflected) if name[0] == "N" else (inflected, bare)
            forms = {f"{name}-sg": singular, f"{name}-pl": plural}
        for left, members in forms.items():
            rules[left] = [(1 / (k + 1), (word,)) for k, word in enumerate(members, 1)]
    return rules, dict(twin_pairs) | {b: a for a, b in twin_pairs}


def read_rules(text: str) -> dict[str, list[Rule]]:
    """Return the weighted rules of a table in the notation of RULES."""
    rules = {}
    for left, right in _definitions(text):
        for number, kind in product(NUMBERS, ("being", "thing", "place")):
            names = {"n": number, "c": kind, **NUMBERS[number]}
            options = [option.split() for option in right.format(**names).split(" | ")]
            rules[left.format(**names).strip()] = [
                (float(weight), tuple(symbols)) for weight, *symbols in options
            ]
    return rules


def build_grammar(complexity: str) -> Grammar:
    """Return the grammar named "simple", "medium" or "complex"; ValueError for another name."""
    if complexity not in COMPLEXITIES:
        names = ", ".join(COMPLEXITIES)
        raise ValueError(f"complexity: {complexity!r} is unknown; choose one of {names}")

    # collect the weighted rules; those of a later complexity replace earlier ones
    level = COMPLEXITIES.index(complexity)
    weighted, twins = read_lexicon(level)
    for name in COMPLEXITIES[: level + 1]:
        weighted |= read_rules(RULES[name])
    end = 1 / SENTENCES_PER_DOCUMENT
    weighted["DOCUMENT"] = [(end, ("SENTENCE",)), (1 - end, ("SENTENCE", "\n", "DOCUMENT"))]

    # keep the symbols that DOCUMENT can reach, breadth first, and normalize the weights
    rules = {}
    reachable = ["DOCUMENT"]
    for left in reachable:
        total = sum(weight for weight, _ in weighted[left])
        rules[left] = tuple((weight / total, right) for weight, right in weighted[left])
        for _, right in rules[left]:
            for symbol in right:
                if symbol in weighted and symbol not in reachable:
                    reachable.append(symbol)
    return Grammar(rules, twins)


def entropy_floor(grammar: Grammar) -> dict[str, float]:
    """Return the exact entropy and expected lengths of a document and of a sentence.

    Solve the linear system in the docstring of this module. A sentence includes its full stop, and
    nats_per_word includes the ends of documents. bits_per_byte is bits_per_document divided by
    bytes_per_document.
    """
    import numpy as np

    # set up the linear system
    index = {left: i for i, left in enumerate(grammar.rules)}
    children = np.zeros((len(index), len(index)))  # expected number of nonterminals in an expansion
    increments = np.zeros((len(index), 3))  # bits, bytes and words that an expansion adds
    for left, rules in grammar.rules.items():
        for p, right in rules:
            marks = [symbol for symbol in right if symbol in (",", "\n")]
            words = [symbol for symbol in right if symbol not in index and symbol not in marks]
            # a space or a full stop follows each word
            n_bytes = sum(len(word) + 1 for word in words) + len(marks)
            increments[index[left]] += p * np.array([-log2(p), n_bytes, len(words)])
            for symbol in right:
                if symbol in index:
                    children[index[left], index[symbol]] += p

    solution = np.linalg.solve(np.eye(len(index)) - children, increments)

    bits, n_bytes, words = solution[index["DOCUMENT"]].tolist()
    floor = {"bits_per_byte": bits / n_bytes, "nats_per_word": bits * log(2) / words}
    for unit in ("document", "sentence"):
        values = solution[index[unit.upper()]].tolist()
        for name, value in zip(("bits", "bytes", "words"), values, strict=True):
            floor[f"{name}_per_{unit}"] = value
    return floor


def grammar_floor(eval_path: str) -> float | None:
    """Return the entropy floor in bits per byte of synthetic text, or None for other text.

    The floor is in the grammar.json that this script writes next to the folders of the text.
    """
    text = Path(eval_path).resolve()
    folder = text.parent if text.is_file() else text
    path = folder.parent / "grammar.json"
    if not path.is_file():
        return None
    if [file.name for file in find_files(text, "dev")] != ["synthetic.dev"]:
        return None  # there is other text too
    try:
        return float(read_json(path)["floor"]["bits_per_byte"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: was not written by create_synthetic_data.py; move it, or run the script again"
        ) from None


# ---- sampling -----------------------------------------------------------------------------------


def _derive(grammar: Grammar, symbols: list[str], rng: random.Random) -> tuple[list[str], float]:
    """Expand the symbols at random; return the words and -log2 of the probability."""
    tables = grammar.tables
    stack = symbols[::-1]
    words = []
    bits = 0.0
    while stack:
        symbol = stack.pop()
        if symbol not in tables:
            words.append(symbol)
            continue
        thresholds, options = tables[symbol]
        cost, expansion = options[bisect(thresholds, rng.random())]
        bits += cost
        stack += expansion
    return words, bits


def spell(words: list[str]) -> str:
    """Join words to a sentence with commas and a capital letter, but without the full stop."""
    text = " ".join(words).replace(" ,", ",")
    return text[0].upper() + text[1:]


def sample_document(grammar: Grammar, rng: random.Random) -> tuple[str, float]:
    """Return a random text, sentences joined by newlines, and -log2 of its probability."""
    words, bits = _derive(grammar, ["DOCUMENT"], rng)
    sentences = " ".join(words).split(" \n ")
    return "\n".join(spell(sentence.split()) + "." for sentence in sentences), bits


def sample_pairs(grammar: Grammar, uid: str, number: int, rng: random.Random) -> Iterator[dict]:
    """Yield `number` different minimal pairs of a kind (a key of PAIRS), with BLiMP's fields.

    Singular and plural alternate.
    """
    sentences: set[str] = set()
    while len(sentences) < number:
        # derive the parts of the sentence before, at and after the word that gets the wrong number
        n, m = ("pl", "sg") if len(sentences) % 2 else ("sg", "pl")
        parts = PAIRS[uid][1].format(n=n, m=m, **NUMBERS[n]).split("*")
        prefix, (word, *rest) = (_derive(grammar, part.split(), rng)[0] for part in parts)
        good = [*prefix, word]
        bad = [*prefix, grammar.twins[word]]
        sentence = spell([*good, *rest]) + "."
        if sentence in sentences:
            continue
        pair = {"sentence_good": sentence, "sentence_bad": spell([*bad, *rest]) + "."}

        # fields for BLiMP's two other ways to score a pair
        one_prefix = not uid.startswith("determiner")
        if one_prefix:
            pair["one_prefix_prefix"] = spell(prefix)
            pair["one_prefix_word_good"] = good[-1]
            pair["one_prefix_word_bad"] = bad[-1]
        else:
            pair["two_prefix_prefix_good"] = spell(good)
            pair["two_prefix_prefix_bad"] = spell(bad)
            pair["two_prefix_word"] = rest[0]

        is_about_verb = "verb" in uid
        term = "subject_verb_agreement" if is_about_verb else "determiner_noun_agreement"
        yield pair | {
            "field": "morphology",
            "linguistics_term": term,
            "UID": uid,
            "simple_LM_method": True,
            "one_prefix_method": one_prefix,
            "two_prefix_method": not one_prefix,
            "lexically_identical": not is_about_verb,
            "pairID": str(len(sentences)),
        }
        sentences.add(sentence)


# ---- files --------------------------------------------------------------------------------------


def write_corpus(grammar: Grammar, path: Path, num_words: int, rng: random.Random) -> dict:
    """Write documents until they have num_words words; return counts of their text."""
    from tqdm import tqdm

    counts = Counter(documents=0, sentences=0, words=0, bytes=0)
    bits = 0.0
    progress = tqdm(total=num_words, desc=path.name, unit=" words", unit_scale=True, disable=None)
    with path.open("w", encoding="ascii", newline="\n") as file, progress:
        while counts["words"] < num_words:
            text, cost = sample_document(grammar, rng)
            file.write("\n\n\n" + text if counts["documents"] else text)
            sentences = text.count("\n") + 1
            words = text.count(" ") + sentences
            counts.update(documents=1, sentences=sentences, words=words, bytes=len(text))
            bits += cost
            progress.update(words)
        file.write("\n")
    return {**counts, "true_bits_per_byte": round(bits / counts["bytes"], 10)}


def create_synthetic_data(
    output_dir: str | Path,
    num_tokens: int = 1_000_000,
    complexity: str = "medium",
    seed: int = 42,
    num_pairs: int = 200,
) -> dict:
    """Write the four files into output_dir and return the content of grammar.json.

    `num_tokens` is the number of words of the training text, and `num_pairs` the number of minimal
    pairs of each kind. The same arguments give the same files, byte for byte. Files of an earlier
    call are only replaced when all four are complete. Raise ValueError if a file with one of the
    names is not from this script.
    """
    grammar = build_grammar(complexity)
    if num_tokens < 1:
        raise ValueError(f"num-tokens: {num_tokens} words of training text; give 1 or more")
    if not 1 <= num_pairs <= MAX_PAIRS:
        raise ValueError(f"num-pairs: {num_pairs} pairs of each kind; give 1 to {MAX_PAIRS}")
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output-dir: {output_dir} is a file; give a directory")

    # grammar.json shows that earlier files are ours
    names = ("minimal_pairs.jsonl", "dev/synthetic.dev", "train/synthetic.train", "grammar.json")
    files = [output_dir / name for name in names]
    record = files[-1]
    is_ours = record.is_file() and b'"true_bits_per_byte"' in record.read_bytes()
    for file in files:
        check_replaceable(file, is_ours, "move it away or give another --output-dir")

    # files move into place in reverse order: grammar.json first, because it shows they are ours
    with contextlib.ExitStack() as stack:
        pairs_file, dev_file, train_file, record_file = (
            stack.enter_context(atomic_write(file)) for file in files
        )
        # each file has a separate generator, so it does not depend on the size of the other files
        train_rng, dev_rng, pairs_rng = (
            random.Random(f"{seed} {name}") for name in ("train", "dev", "pairs")
        )

        # the text
        counts = {
            "train": write_corpus(grammar, train_file, num_tokens, train_rng),
            "dev": write_corpus(grammar, dev_file, math.ceil(num_tokens / 10), dev_rng),
        }

        # the minimal pairs, and how many of them the training text happens to contain
        level = COMPLEXITIES.index(complexity)
        kinds = [uid for uid, (first_level, _) in PAIRS.items() if first_level <= level]
        pairs = [pair for uid in kinds for pair in sample_pairs(grammar, uid, num_pairs, pairs_rng)]
        with pairs_file.open("w", encoding="ascii", newline="\n") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        good_sentences = {pair["sentence_good"] for pair in pairs}
        with train_file.open(encoding="ascii") as file:
            in_train = good_sentences.intersection(map(str.rstrip, file))

        content = {
            "complexity": complexity,
            "seed": seed,
            "floor": {name: round(value, 10) for name, value in entropy_floor(grammar).items()},
            "text": counts,
            "minimal_pairs": {
                "kinds": kinds,
                "pairs": len(pairs),
                "good_sentences_in_train": len(in_train),
            },
            "rules": {
                left: {" ".join(right): p for p, right in rules}
                for left, rules in grammar.rules.items()
            },
        }
        record_file.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii", newline="\n")
    return content


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--num-tokens", type=int, default=1_000_000, help="words of the training text")
    add("--output-dir", default="./data/synthetic", help="directory of the files")
    add("--complexity", default="medium", help=" or ".join(COMPLEXITIES))
    add("--seed", type=int, default=42, help="the same seed gives the same files")
    add("--num-pairs", type=int, default=200, help="minimal pairs of each kind")
    return parser


def print_summary(content: dict, output_dir: str) -> None:
    """Print the sizes of the files, the entropy floor and the next command.

    `content` is that of grammar.json.
    """
    for split, counts in content["text"].items():
        print(
            f"{split:<6}{counts['documents']:,} documents, {counts['words']:,} words, "
            f"{counts['bytes']:,} bytes"
        )
    pairs = content["minimal_pairs"]
    floor = content["floor"]["bits_per_byte"]
    dev_bits = content["text"]["dev"]["true_bits_per_byte"]
    print(f"pairs {pairs['pairs']:,} minimal pairs of {len(pairs['kinds'])} kinds")
    print(f"floor {floor:.4f} bits per byte on average, {dev_bits:.4f} on this dev text")
    print(
        f"files {output_dir}: train/synthetic.train dev/synthetic.dev minimal_pairs.jsonl "
        "grammar.json"
    )
    print(
        f"next  python train_tokenizer.py --data-dir {Path(output_dir) / 'train'} --vocab-size 700 "
        "--output models/quickstart-tokenizer.json"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    args = make_parser().parse_args(argv)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the files and print a summary."""
    print_summary(create_synthetic_data(**vars(args)), args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
