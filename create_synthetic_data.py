"""Make English-like text with a known floor: a seeded, unambiguous probabilistic grammar with number agreement.

    python create_synthetic_data.py --num-tokens 1000000 --output-dir ./data/synthetic --complexity medium
    python create_synthetic_data.py --num-tokens 50000 --complexity simple --seed 7 --num-pairs 100

--num-tokens counts words between blanks of the training text, in whole documents; the held-out text gets a tenth of
that on top. Into the output directory go

    train/synthetic.train, dev/synthetic.dev    one sentence a line, documents separated by two blank lines
    minimal_pairs.jsonl                         BLiMP's fields; good and bad differ in the number of one word
    grammar.json                                rules, seed, counts and the floor in bits per byte

The floor. A document is one or more sentences joined by a newline, without one at the end; how many is geometric. No
text has two derivations, so its entropy is that of its derivation, which solves a linear system over the nonterminals A
with rules r of probability p_r (Grenander 1967; Chi 1999; Nederhof and Satta 2008):

    h(A) = sum_r p_r (-log2 p_r + sum of h(B) over the nonterminals B of r)

Expected lengths solve the same system. The floor is h(DOCUMENT) / expected bytes of a document. Documents are
independent, so no model's expected -log2 p of a document, its end included, over the expected bytes of its text is
below that. On one finite text chance can put a model below the floor; what the grammar itself pays for that very text
is therefore recorded too (true_bits_per_byte).

It does not imitate real English beyond agreement and word order: sentences of one document share no topic.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from math import log, log2
from pathlib import Path
from typing import NamedTuple

from babyllama.data.documents import find_files


def grammar_floor(eval_path: str) -> float | None:
    """The exact entropy of synthetic text, from the grammar.json that create_synthetic_data.py wrote beside it."""
    text = Path(eval_path).resolve()
    path = (text.parent if text.is_file() else text).parent / "grammar.json"
    if not path.is_file() or [file.name for file in find_files(text, "dev")] != [
        "synthetic.dev"
    ]:  # or others besides
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["floor"]["bits_per_byte"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: is not of create_synthetic_data.py; move it, or make the text anew"
        ) from None


COMPLEXITIES = ("simple", "medium", "complex")
SENTENCES_PER_DOCUMENT = 10  # mean of the geometric distribution
MAX_PAIRS = 10_000  # of one kind: the simple grammar does not hold many times more

# How many words simple, medium and complex take, and the words in falling frequency. Nouns (N) and verbs (V) get both
# numbers. No form occurs twice, and no noun or adjective begins with a vowel: the grammar knows "a" but not "an".
LEXICON = {
    "N-being": (12, 24, 64, """dog cat girl boy child/children bird teacher farmer man/men woman/women mouse/mice
        baby horse rabbit king queen friend brother sister mother father cow doctor bear wolf/wolves fox goat duck
        goose/geese frog tiger lion monkey pony puppy kitten princess prince wizard pirate soldier sailor baker dancer
        singer writer driver hunter gardener captain neighbor cousin daughter son student lady knight robot spider
        butterfly turtle donkey dragon thief/thieves"""),
    "N-thing": (0, 14, 40, """ball book box cake cup hat chair table lamp toy coat key bag letter boat basket
        picture candle shoe pencil bottle spoon knife/knives plate pot kite drum bell flower blanket button ladder
        bucket mirror clock coin pie loaf/loaves doll sandwich"""),
    "N-place": (0, 10, 28, """house garden school river park farm road tree barn shop forest hill lake bridge
        village castle tower field mountain beach kitchen market church gate wall cave library pond"""),
    "V-self": (6, 10, 24, """sleep laugh sing jump swim smile dance play cry wait talk work rest dream eat shout
        whisper sneeze listen yawn giggle snore wander complain"""),
    "V-being": (6, 10, 24, """see like help chase hear follow love know visit meet call watch hug teach trust thank
        greet scare tease remember forget protect admire invite"""),
    "V-thing": (0, 8, 18, """carry want find hold buy make keep bring push drop wash fix throw catch pull lift sell
        touch"""),
    "V-go": (0, 4, 6, "go walk run hurry return travel"),
    "V-say": (0, 0, 8, "say think hope believe feel claim guess pretend"),
    "SIZE": (3, 5, 8, "big little small tall tiny huge large short"),
    "QUALITY-being": (5, 8, 22, """happy young sad kind brave tired clever hungry quiet friendly lazy proud gentle
        polite lonely cheerful nervous shy silly wise curious famous"""),
    "QUALITY-thing": (0, 7, 17, """red new heavy blue broken green dirty yellow wooden white black soft round brown
        shiny cheap pretty"""),
    "QUALITY-place": (0, 3, 7, "dark beautiful cold peaceful lovely crowded warm"),
    "PREP": (0, 3, 5, "near behind beside by around"),
    "ADVERB": (0, 5, 10, "often never always sometimes quickly usually rarely happily quietly slowly"),
    "NAME": (0, 6, 20, """Tom Mary Ben Anna Sam Lucy Max Emma Jack Alice Peter Clara Leo Nina Henry Julia David
        Sarah Paul Laura"""),
}  # fmt: skip

# NONTERMINAL = weight symbols | weight symbols ...; {n} runs over sg and pl, {be} and {do} with it, {c} over being,
# thing, place. Each complexity starts from the one before and replaces what it repeats. Nothing is ambiguous: a noun
# takes at most one PP or relative clause, a verb takes no such PP, and "and" joins verbs only after a bare one.
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
        SUBJECT-sg    = 2 NAME | 1 he | 1 she | 8 NP-being-sg | 2 NP-being-sg PP | 2 NP-being-sg REL-being-sg
        SUBJECT-pl    = 1 they | 1 we | 8 NP-being-pl | 2 NP-being-pl PP | 2 NP-being-pl REL-being-pl
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
        NOM-{c}-{n}   = 16 N-{c}-{n} | 3 SIZE N-{c}-{n} | 4 QUALITY-{c} N-{c}-{n} | 1 SIZE QUALITY-{c} N-{c}-{n}
        DET-pl        = 3 these | 3 some | 2 many | 1 two | 1 three
    """,
    "complex": """
        SENTENCE      = 12 CLAUSE | 2 TIME , CLAUSE | 1 WHEN CLAUSE , CLAUSE | 1 CLAUSE , LINK CLAUSE
        WHEN          = 3 when | 2 because | 1 while | 1 before | 1 after
        LINK          = 3 and | 2 but | 1 so
        MOD-{c}-{n}   = 12 NP-{c}-{n} | 1 NP-{c}-{n} PP | 1 NP-{c}-{n} REL-{c}-{n}
        PP            = 5 LOCATION | 1 with ANY-thing | 1 from ANY-place
        REL-being-{n} = 3 that VP-{n} | 1 that INNER-sg V-being-sg | 1 that INNER-pl V-being-pl
        REL-thing-{n} = 1 that {be} STATE-thing | 1 that INNER-sg V-thing-sg | 1 that INNER-pl V-thing-pl
        REL-place-{n} = 1 that {be} STATE-place
        ACT-{n}       = 4 V-self-{n} | 1 V-being-{n} NAME | 6 V-being-{n} ANY-being | 5 V-thing-{n} ANY-thing
                      | 2 V-go-{n} to ANY-place | 2 V-say-{n} that CLAUSE | 1 V-self-{n} and ACT-{n}
        DET           = 12 the | 2 my | 2 her | 2 his | 1 our | 1 their
        DET-sg        = 6 a | 3 this | 1 every | 1 each
        DET-pl        = 3 these | 3 some | 2 many | 1 two | 1 three | 1 several | 1 most
    """,
}  # fmt: skip
NUMBERS = {
    "sg": {"be": "is", "do": "does", "this": "this"},
    "pl": {"be": "are", "do": "do", "this": "these"},
}

# Minimal pairs: the first complexity that has them, and the sentence, where the word at * gets the wrong number.
# {n} is the number that matters and {m} the other one, so that a noun in between pulls to the wrong side.
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


class Document(NamedTuple):
    text: str
    bits: float  # -log2 of the text's probability


@dataclass(frozen=True)
class Grammar:
    """rules: nonterminal -> ((probability, symbols), ...); a symbol that is no key of it is a word, "," or a newline.

    twins: word -> its form in the other number.
    """

    complexity: str
    rules: dict[str, tuple[Rule, ...]]
    twins: dict[str, str]

    @cached_property
    def tables(self) -> dict[str, tuple[list[float], list[tuple[float, tuple[str, ...]]]]]:
        """For the sampler: nonterminal -> (cumulative probabilities but the last, [(bits, reversed symbols), ...])."""
        return {
            left: (
                list(accumulate(p for p, _ in rules))[:-1],
                [(-log2(p), right[::-1]) for p, right in rules],
            )
            for left, rules in self.rules.items()
        }


def add_s(word: str) -> str:
    """A noun's regular plural, which is also how a verb's third person is spelt: box(es), pony (ponies), toy(s)."""
    if word.endswith(("s", "sh", "ch", "x", "o")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _lexicon(level: int) -> tuple[dict[str, list[Rule]], dict[str, str]]:
    """Weighted one-word rules of every category, and the twins; the k-th word weighs 1 / (k + 1), like Zipf's law."""
    rules, pairs = {}, list(zip(NUMBERS["sg"].values(), NUMBERS["pl"].values(), strict=True))
    for name, (*sizes, text) in LEXICON.items():
        words = text.split()[: sizes[level]]
        forms = {name: words}
        if name[:2] in ("N-", "V-"):
            bare = [word.split("/")[0] for word in words]
            other = [word.split("/")[1] if "/" in word else add_s(word) for word in words]
            numbers = (
                ("sg", "pl") if name[0] == "N" else ("pl", "sg")
            )  # the bare form of a verb is its plural
            forms = {
                f"{name}-{n}": members for n, members in zip(numbers, (bare, other), strict=True)
            }
            pairs += zip(bare, other, strict=True)
        for left, members in forms.items():
            rules[left] = [(1 / (k + 1), (word,)) for k, word in enumerate(members, 1)]
    return rules, dict(pairs) | {b: a for a, b in pairs}


def _read_rules(text: str) -> dict[str, list[Rule]]:
    rules = {}
    for line in re.sub(r"\n *\|", " |", text).strip().splitlines():
        for n, c in product(NUMBERS, ("being", "thing", "place")):
            left, right = line.format(n=n, c=c, **NUMBERS[n]).split(" = ")
            options = [option.split() for option in right.split(" | ")]
            rules[left.strip()] = [(float(weight), tuple(symbols)) for weight, *symbols in options]
    return rules


def build_grammar(complexity: str) -> Grammar:
    """The grammar of "simple", "medium" or "complex", with start symbol DOCUMENT; ValueError for another complexity."""
    if complexity not in COMPLEXITIES:
        raise ValueError(
            f"complexity: {complexity!r} is unknown; known are {', '.join(COMPLEXITIES)}"
        )
    level = COMPLEXITIES.index(complexity)
    weighted, twins = _lexicon(level)
    for name in COMPLEXITIES[: level + 1]:
        weighted |= _read_rules(RULES[name])
    end = 1 / SENTENCES_PER_DOCUMENT
    weighted["DOCUMENT"] = [(end, ("SENTENCE",)), (1 - end, ("SENTENCE", "\n", "DOCUMENT"))]
    rules, reachable = {}, ["DOCUMENT"]
    for left in reachable:
        total = sum(weight for weight, _ in weighted[left])
        rules[left] = tuple((weight / total, right) for weight, right in weighted[left])
        symbols = dict.fromkeys(symbol for _, right in rules[left] for symbol in right)
        reachable += [
            symbol for symbol in symbols if symbol in weighted and symbol not in reachable
        ]
    return Grammar(complexity, rules, twins)


def grammar_facts(grammar: Grammar) -> dict[str, float]:
    """Exact entropy and expected lengths of a document and of a sentence (its full stop counted), as the module says.

    bits_per_byte = bits_per_document / bytes_per_document; nats_per_word counts the ends of documents too.
    """
    import numpy as np

    index = {left: i for i, left in enumerate(grammar.rules)}
    children = np.zeros(
        (len(index), len(index))
    )  # expected number of each nonterminal in one expansion
    own = np.zeros((len(index), 3))  # what one expansion itself adds: bits, bytes, words
    for left, rules in grammar.rules.items():
        for p, right in rules:
            marks = [symbol for symbol in right if symbol in (",", "\n")]
            words = [symbol for symbol in right if symbol not in index and symbol not in marks]
            size = sum(len(word) + 1 for word in words) + len(
                marks
            )  # after every word a blank or a full stop
            own[index[left]] += p * np.array([-log2(p), size, len(words)])
            for symbol in right:
                if symbol in index:
                    children[index[left], index[symbol]] += p
    solution = np.linalg.solve(np.eye(len(index)) - children, own)
    bits, size, words = solution[index["DOCUMENT"]].tolist()
    facts = {"bits_per_byte": bits / size, "nats_per_word": bits * log(2) / words}
    for unit in ("document", "sentence"):
        values = zip(
            ("bits", "bytes", "words"), solution[index[unit.upper()]].tolist(), strict=True
        )
        facts |= {f"{name}_per_{unit}": value for name, value in values}
    return facts


def _derive(grammar: Grammar, symbols: list[str], rng: random.Random) -> tuple[list[str], float]:
    """Words that the symbols expand to at random, and -log2 of the probability of that."""
    tables, stack, words, bits = grammar.tables, symbols[::-1], [], 0.0
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


def _write_out(words: list[str]) -> str:
    """Words as they are written: commas attached, a capital first; without the full stop."""
    text = " ".join(words).replace(" ,", ",")
    return text[0].upper() + text[1:]


def sample_document(grammar: Grammar, rng: random.Random) -> Document:
    """One document: its text (ASCII, sentences joined by a newline) and -log2 of its probability."""
    words, bits = _derive(grammar, ["DOCUMENT"], rng)
    sentences = " ".join(words).split(" \n ")
    return Document("\n".join(_write_out(sentence.split()) + "." for sentence in sentences), bits)


def sample_pairs(grammar: Grammar, uid: str, number: int, rng: random.Random) -> Iterator[dict]:
    """`number` different minimal pairs of a kind (a key of PAIRS), singular and plural in turn, with BLiMP's fields."""
    seen: set[str] = set()
    while len(seen) < number:
        n, m = ("pl", "sg") if len(seen) % 2 else ("sg", "pl")
        parts = PAIRS[uid][1].format(n=n, m=m, **NUMBERS[n]).split("*")
        prefix, (word, *rest) = (_derive(grammar, part.split(), rng)[0] for part in parts)
        versions = {"good": [*prefix, word], "bad": [*prefix, grammar.twins[word]]}
        sentences = {
            f"sentence_{k}": _write_out([*words, *rest]) + "." for k, words in versions.items()
        }
        if sentences["sentence_good"] in seen:
            continue
        about_verb, one_prefix = "verb" in uid, not uid.startswith("determiner")
        if one_prefix:
            method = {"one_prefix_prefix": _write_out(prefix)}
            method |= {f"one_prefix_word_{k}": words[-1] for k, words in versions.items()}
        else:
            method = {f"two_prefix_prefix_{k}": _write_out(words) for k, words in versions.items()}
            method["two_prefix_word"] = rest[0]
        facts = {
            "field": "morphology",
            "linguistics_term": "subject_verb_agreement"
            if about_verb
            else "determiner_noun_agreement",
            "UID": uid,
            "simple_LM_method": True,
            "one_prefix_method": one_prefix,
            "two_prefix_method": not one_prefix,
            "lexically_identical": not about_verb,
            "pairID": str(len(seen)),
        }
        yield sentences | method | facts
        seen.add(sentences["sentence_good"])


def _write_corpus(grammar: Grammar, path: Path, num_words: int, rng: random.Random) -> dict:
    """Write whole documents until there are num_words words; counts are of the documents' texts."""
    from tqdm import tqdm

    count, bits = Counter(documents=0, sentences=0, words=0, bytes=0), 0.0
    path.parent.mkdir()
    progress = tqdm(total=num_words, desc=path.name, unit=" words", unit_scale=True, disable=None)
    with path.open("w", encoding="ascii", newline="\n") as file, progress:
        while count["words"] < num_words:
            text, cost = sample_document(grammar, rng)
            file.write("\n\n\n" + text if count["documents"] else text)
            sentences = text.count("\n") + 1
            words = text.count(" ") + sentences
            count.update(documents=1, sentences=sentences, words=words, bytes=len(text))
            bits += cost
            progress.update(words)
        file.write("\n")
    return {**count, "true_bits_per_byte": round(bits / count["bytes"], 10)}


def _write_all(grammar: Grammar, folder: Path, num_tokens: int, seed: int, num_pairs: int) -> dict:
    # each file has a generator of its own, so that none changes with the size of another
    train, dev, pairs = (random.Random(f"{seed} {name}") for name in ("train", "dev", "pairs"))
    train_file = folder / "train" / "synthetic.train"
    text = {
        "train": _write_corpus(grammar, train_file, num_tokens, train),
        "dev": _write_corpus(
            grammar, folder / "dev" / "synthetic.dev", math.ceil(num_tokens / 10), dev
        ),
    }
    kinds = [
        uid for uid, (first, _) in PAIRS.items() if first <= COMPLEXITIES.index(grammar.complexity)
    ]
    records = [record for uid in kinds for record in sample_pairs(grammar, uid, num_pairs, pairs)]
    with (folder / "minimal_pairs.jsonl").open("w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    with train_file.open(encoding="ascii") as file:
        known = {record["sentence_good"] for record in records}.intersection(map(str.rstrip, file))
    facts = {
        "complexity": grammar.complexity,
        "seed": seed,
        "floor": {name: round(value, 10) for name, value in grammar_facts(grammar).items()},
        "text": text,
        "minimal_pairs": {
            "kinds": kinds,
            "pairs": len(records),
            "good_sentences_in_train": len(known),
        },
        "definition": " ".join(
            __doc__[__doc__.index("The floor. ") : __doc__.index("It does not")].split()
        ),
        "rules": {
            left: {" ".join(right): p for p, right in rules}
            for left, rules in grammar.rules.items()
        },
    }
    (folder / "grammar.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="ascii", newline="\n"
    )
    return facts


def _require_own(folder: Path) -> None:
    """ValueError where a file would be replaced that this script did not write: grammar.json shows that it did."""
    names = ("grammar.json", "train/synthetic.train", "dev/synthetic.dev", "minimal_pairs.jsonl")
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not (
        there[0].name == names[0] and b'"true_bits_per_byte"' in there[0].read_bytes()
    ):
        raise ValueError(
            f"output-dir: {there[0]} is not of this script; move it away or give another directory"
        )


def create_synthetic_data(
    output_dir: str | Path,
    num_tokens: int = 1_000_000,
    complexity: str = "medium",
    seed: int = 42,
    num_pairs: int = 200,
) -> dict:
    """Write the four files into output_dir and return what grammar.json says.

    num_tokens: words of the training text; num_pairs: minimal pairs of each kind. The same arguments give the same
    files byte for byte. Files that it wrote before are replaced once all are complete; ValueError for those of others.
    """
    grammar, output_dir = build_grammar(complexity), Path(output_dir)
    if num_tokens < 1:
        raise ValueError(f"num-tokens: {num_tokens} words of training text; give 1 or more")
    if not 1 <= num_pairs <= MAX_PAIRS:
        raise ValueError(
            f"num-pairs: {num_pairs} minimal pairs of each kind; give 1 to {MAX_PAIRS}"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output-dir: {output_dir} is a file; give a directory")
    _require_own(output_dir)
    for split in ("train", "dev"):
        (output_dir / split).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".unfinished-") as scratch:
        facts = _write_all(grammar, Path(scratch), num_tokens, seed, num_pairs)
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        for path in sorted(
            files, key=lambda path: path.name != "grammar.json"
        ):  # which shows whose they are
            os.replace(path, output_dir / path.relative_to(scratch))
    return facts


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add(
        "--num-tokens",
        "--num_tokens",
        type=int,
        default=1_000_000,
        help="words of the training text",
    )
    add("--output-dir", "--output_dir", default="./data/synthetic", help="where the files go")
    add("--complexity", default="medium", help=" or ".join(COMPLEXITIES))
    add("--seed", type=int, default=42, help="the same seed gives the same files")
    add("--num-pairs", "--num_pairs", type=int, default=200, help="minimal pairs of each kind")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        facts = create_synthetic_data(**vars(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for split, n in facts["text"].items():
        print(f"{split:<6}{n['documents']:,} documents, {n['words']:,} words, {n['bytes']:,} bytes")
    pairs, floor, own = (
        facts["minimal_pairs"],
        facts["floor"],
        facts["text"]["dev"]["true_bits_per_byte"],
    )
    print(f"pairs {pairs['pairs']:,} minimal pairs of {len(pairs['kinds'])} kinds")
    print(
        f"floor {floor['bits_per_byte']:.4f} bits per byte on average; {own:.4f} on this very dev text"
    )
    print(
        f"files {args.output_dir}: train/synthetic.train dev/synthetic.dev minimal_pairs.jsonl grammar.json"
    )
    next_step = (
        f"python train_tokenizer.py --data-dir {Path(args.output_dir) / 'train'} --vocab-size 700"
    )
    print(f"next  {next_step} --output models/quickstart-tokenizer.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
