"""data/words.py: white space as str.split() knows it, and words by a walk over the decoded text."""

import sys

import numpy as np
import pytest
from conftest import sentences, words_in_chunks
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama.data import words
from babyllama.data.words import WordCounts, is_space
from data_utils import DataProcessor

# letters, digits, marks and white space: of one, two and three bytes, and only str.split() knows it
CHARACTERS = "ab7.,!é語😀\u0301 \n\t\x0b\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000\u200b"
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=80)
MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_white_space_is_what_str_split_splits_at():
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    expected = [c.isspace() for c in characters for _ in range(len(c.encode()))]
    assert is_space("".join(characters).encode()).tolist() == expected


def prepare(folder, cache, tokenizer, length) -> tuple[Dataset, dict]:
    processor = DataProcessor(tokenizer, cache_dir=cache)
    datasets = processor.prepare_dataset(str(folder), str(folder), length, clean=False)
    return datasets["train"], processor.reports["train"]


@MANY
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    length=st.integers(2, 9),
    block=st.integers(1, 40),
)
def test_words_of_every_chunk(tmp_path_factory, monkeypatch, tokenizer, texts, length, block):
    """Files of odd text whose chunks and blocks end within words and characters."""
    root = tmp_path_factory.mktemp("text")
    monkeypatch.setattr(words, "BLOCK", block)
    for i, text in enumerate([*texts, "some more words " * 3]):
        (root / f"f{i}.txt").write_text(text, encoding="utf-8", newline="")
    dataset, report = prepare(root, root / "cache", tokenizer, length)
    counts = WordCounts(dataset, tokenizer, report["sources"])

    chunks = dataset["input_ids"]
    assert counts.per_chunk().tolist() == words_in_chunks(tokenizer, chunks)
    ids = [token_id for chunk in chunks for token_id in chunk]
    for offset in (1, length - 1):
        starts = range(offset, len(ids) - length + 1, length)
        shifted = [ids[start : start + length] for start in starts]
        expected = words_in_chunks(tokenizer, [ids[:offset], *shifted])[1:]
        assert counts.per_chunk(offset).tolist() == expected


@pytest.mark.parametrize("change", [None, "NFC", "prefix space"])
def test_the_words_of_a_report_are_those_of_the_tokens(tmp_path, tokenizer, change):
    """Of each file and in total: NFC changes the text, but not its words."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer.add_prefix_space = change == "prefix space"
    if change == "NFC":
        backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    texts = {"a.txt": "\n".join(sentences(20)), "b.txt": "cafe\u0301 \u2000 e\u0301\u3000a\n\n\n1"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    dataset, report = prepare(tmp_path, tmp_path / "cache", tokenizer, 1)
    assert report["tokens_left_out"] == 0
    expected = {name: len(text.split()) for name, text in texts.items()}
    assert {source["file"]: source["words"] for source in report["sources"]} == expected
    assert report["words"] == sum(expected.values())
    counts = WordCounts(dataset, tokenizer, report["sources"])
    once = np.ones(counts.n_chunks(), dtype=np.int64)
    assert counts.by_domain(once) == {name[0]: n for name, n in expected.items()}


@MANY
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    length=st.integers(2, 8),
    data=st.data(),
)
def test_words_by_domain(tokenizer, sizes, length, data):
    """Against a loop over tokens, for chunks seen any number of times that begin at any offset."""
    sizes.append(length)
    n_tokens = sum(sizes) // length * length  # the last partial chunk is dropped
    choices = [tokenizer.encode(text, add_special_tokens=False)[0] for text in (" cat", "e", "\n")]
    ids = data.draw(st.lists(st.sampled_from(choices), min_size=n_tokens, max_size=n_tokens))
    domains = [f"d{i % 3}" for i in range(len(sizes))]
    sources = [{"domain": d, "tokens": size} for d, size in zip(domains, sizes, strict=True)]
    rows = np.array(ids, dtype=np.uint16).reshape(-1, length)
    counts = WordCounts(Dataset.from_dict({"input_ids": rows}), tokenizer, sources)
    offset = data.draw(st.integers(0, length - 1))
    n_chunks = counts.n_chunks(offset)
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n_chunks, max_size=n_chunks)))

    expected = dict.fromkeys(domains, 0)
    starts = words_in_chunks(tokenizer, [[token_id] for token_id in ids])
    domain_of_token = np.repeat(domains, sizes)
    for i, n in enumerate(times):
        for at in range(offset + i * length, offset + (i + 1) * length):
            expected[domain_of_token[at]] += int(n) * starts[at]
    assert counts.by_domain(times.astype(np.int64), offset) == expected
