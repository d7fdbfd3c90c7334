"""words.py: white space as str.split() knows it, and the words of every chunk against a walk over the decoded text."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_utils
from babyllama.data import documents
from babyllama.data.words import Words, blanks
from data_utils import DataProcessor

# letters, digits, marks and every kind of blank: of one, two and three bytes, and those that only str.split() knows
SIGNS = "ab7.,!é語😀\u0301 \n\t\x0b\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000\u200b"
TEXTS = st.text(st.sampled_from(SIGNS), max_size=80)
MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_blanks_are_those_of_str_split():
    signs = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    expected = [sign.isspace() for sign in signs for _ in range(len(sign.encode()))]
    assert blanks("".join(signs).encode()).tolist() == expected


def bytes_of(tokenizer) -> dict[int, bytes]:
    """Token id -> its bytes, by GPT-2's table of characters that stand for bytes; a newline for <s> and </s>."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return {
        index: b"\n" if index in special else bytes(byte.get(sign, 0) for sign in token)
        for token, index in tokenizer.get_vocab().items()
    }


def walk(tokenizer, chunks: list[list[int]]) -> list[int]:
    """How many words begin in each chunk: one character of the decoded stream after the other."""
    table = bytes_of(tokenizer)
    texts = [b"".join(table[i] for i in chunk) for chunk in chunks]
    ends = np.cumsum([len(text) for text in texts])
    counts, at, before = [0] * len(chunks), 0, " "
    for sign in b"".join(texts).decode(
        "utf-8", errors="ignore"
    ):  # the last chunk may end within a character
        if before.isspace() and not sign.isspace():
            counts[int(np.searchsorted(ends, at, side="right"))] += 1
        at, before = at + len(sign.encode()), sign
    return counts


def prepared(folder, cache, tokenizer, length):
    processor = DataProcessor(tokenizer, cache_dir=cache)
    dataset = processor.prepare_dataset(str(folder), str(folder), max_length=length, clean=False)[
        "train"
    ]
    report = processor.reports["train"]
    return dataset, report, Words(Path(dataset.cache_files[0]["filename"]), report)


@MANY
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    length=st.integers(2, 9),
    piece=st.integers(4, 40),
)
def test_words_of_every_chunk(tmp_path_factory, monkeypatch, tokenizer, texts, length, piece):
    """Several files of odd text, pieces cut within words, chunks that end within tokens' words and characters."""
    root = tmp_path_factory.mktemp("text")
    monkeypatch.setattr(documents, "PART", piece)
    monkeypatch.setattr(data_utils, "BATCH", 60)
    for i, text in enumerate([*texts, "some more words " * 3]):
        (root / f"f{i}.txt").write_text(text, encoding="utf-8", newline="")
    dataset, report, words = prepared(root, root / "cache", tokenizer, length)
    chunks = dataset["input_ids"]
    assert words.per_chunk(length).tolist() == walk(tokenizer, chunks)
    for offset in (1, length - 1):  # chunks that begin elsewhere
        flat = [i for chunk in chunks for i in chunk]
        n = (len(flat) - offset) // length
        moved = [flat[offset + i * length : offset + (i + 1) * length] for i in range(n)]
        assert (
            words.per_chunk(length, offset).tolist() == walk(tokenizer, [flat[:offset], *moved])[1:]
        )
    said = {source["file"]: source["words"] for source in report["sources"]}
    texts = DataProcessor(tokenizer).load_text_files(str(root))
    truth = dict.fromkeys(said, 0)
    for text, source in zip(texts["text"], texts["source"], strict=True):
        truth[source] += len(text.split())
    assert said == truth and report["words"] == sum(truth.values()) == words.begins.sum(dtype=int)


@MANY
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    length=st.integers(2, 8),
    data=st.data(),
)
def test_words_by_domain(tmp_path, sizes, length, data):
    """Against a loop over tokens, for chunks seen any number of times that begin at any offset."""
    sizes.append(length)
    begins = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=sum(sizes), max_size=sum(sizes))),
        dtype=np.uint8,
    )
    (tmp_path / "x.words").write_bytes(begins.tobytes())
    domains = [f"d{i % 3}" for i in range(len(sizes))]
    sources = [
        {"domain": domain, "tokens": size} for domain, size in zip(domains, sizes, strict=True)
    ]
    words = Words(
        tmp_path / "x.arrow",
        {"tokens": sum(sizes), "tokens_left_out": sum(sizes) % length, "sources": sources},
    )
    offset = data.draw(st.integers(0, length - 1))
    times = np.array(
        [data.draw(st.integers(0, 3)) for _ in words.per_chunk(length, offset)], dtype=np.int64
    )
    expected = dict.fromkeys(domains, 0)
    owner = [domain for domain, size in zip(domains, sizes, strict=True) for _ in range(size)]
    for i, n in enumerate(times):
        for at in range(offset + i * length, offset + (i + 1) * length):
            expected[owner[at]] += int(n) * int(begins[at])
    assert words.by_domain(times, length, offset) == expected


def test_a_tokenizer_that_changes_the_text_locates_no_words(tmp_path, tokenizer):
    """Its lengths are not those of the text; the chunks are there all the same."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    changed = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    (tmp_path / "a.txt").write_text("\n".join(sentences(20)) + " cafe\u0301")
    with pytest.raises(ValueError, match="its words are not located, because the tokenizer"):
        prepared(tmp_path, tmp_path / "cache", changed, 8)
    assert list((tmp_path / "cache").glob("*.arrow")) and not list(
        (tmp_path / "cache").glob("*.words")
    )
    processor = DataProcessor(changed, cache_dir=tmp_path / "cache")
    processor.prepare_dataset(str(tmp_path), str(tmp_path), max_length=8, clean=False)
    assert [source["words"] for source in processor.reports["train"]["sources"]] == [None]


def test_the_words_lie_beside_the_chunks(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(sentences(20)))
    prepared(tmp_path, tmp_path / "cache", tokenizer, 8)
    kinds = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kinds == [".arrow", ".arrow", ".json", ".json", ".words", ".words"]
