"""Tokenize, chunk and cache small real files, and compare with one document at a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, sentences, write_file
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from babyllama.data import documents
from babyllama.data.cleaners import clean_text
from babyllama.data.documents import read_documents
from babyllama.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from data_utils import DataProcessor
from train_tokenizer import train_bpe_tokenizer


def encode_texts(processor: DataProcessor, texts: list[str]) -> list[int]:
    """Return BOS, the ids of a text that is encoded at once, and EOS, for each text."""
    token_ids: list[int] = []
    backend = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    for text in texts:
        token_ids += [1, *backend.encode(text, add_special_tokens=False).ids, 2]
    return token_ids


def split_into_chunks(token_ids: list[int], length: int) -> list[list[int]]:
    """Return the chunks of a token stream, without an incomplete last one."""
    ends = range(length, len(token_ids) + 1, length)
    return [token_ids[end - length : end] for end in ends]


# ---- one text -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "prefix space"])
def newline_tokenizer(request) -> PreTrainedTokenizerFast:
    """Return a tokenizer that merges newlines and blanks too, which reveals a wrong cut."""
    pairs = zip(sentences(300), sentences(300, seed=1), strict=True)
    texts = [f"{first}\n\n\n{second}  \n\n{first}\n \n{second}\n\n" for first, second in pairs]
    backend = train_bpe_tokenizer(texts, vocab_size=500, prefix_space=request.param)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


WORDS = st.sampled_from(["The cat", "sees", "don't", "a", "1984", "!?", "é"])
GAPS = st.sampled_from([" ", "\n", "\n\n", ".\n\n", "  ", " \n", "\n ", " \n\n ", "\t", ". "])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pairs=st.lists(st.tuples(WORDS, GAPS), min_size=1, max_size=60))
def test_a_text_has_the_same_tokens_in_parts_as_at_once(
    newline_tokenizer, monkeypatch, tmp_path, pairs
):
    text = "".join(word + gap for word, gap in pairs)
    processor = DataProcessor(newline_tokenizer, cache_dir=tmp_path)
    monkeypatch.setattr(documents, "PART", 40)
    token_ids = encode_texts(processor, [text])
    for length in (7, 1):
        chunks = processor.tokenize_and_chunk({"text": text}, max_length=length)
        assert chunks == {"input_ids": split_into_chunks(token_ids, length)}


def test_an_empty_text_has_the_two_special_tokens(tokenizer, tmp_path):
    processor = DataProcessor(tokenizer, cache_dir=tmp_path)
    assert processor.tokenize_and_chunk({"text": ""}, max_length=2) == {"input_ids": [[1, 2]]}
    assert processor.tokenize_and_chunk({"text": ""}, max_length=3) == {"input_ids": []}


def test_special_tokens_that_a_text_spells_out_are_plain_text(tokenizer, tmp_path):
    processor = DataProcessor(tokenizer, cache_dir=tmp_path)
    chunks = processor.tokenize_and_chunk({"text": "a </s> b <s>"}, max_length=1)["input_ids"]
    assert chunks[0] == [1]
    assert chunks[-1] == [2]
    assert [1] not in chunks[1:]
    assert [2] not in chunks[:-1]


def test_a_lone_surrogate_is_replaced(tokenizer, tmp_path):
    processor = DataProcessor(tokenizer, tmp_path)
    surrogate = processor.tokenize_and_chunk({"text": "a cat \ud800 sees"}, 2)
    replacement = processor.tokenize_and_chunk({"text": "a cat \ufffd sees"}, 2)
    assert surrogate == replacement
    assert surrogate["input_ids"]


def test_clean_text_keeps_other_fields(tokenizer, tmp_path):
    example = {"text": "Hello , world !\nHello.World", "source": "a , b", "n": 3}
    clean = DataProcessor(tokenizer, cache_dir=tmp_path).clean_text(example)
    assert clean == {"text": "Hello, world!\nHello. World", "source": "a , b", "n": 3}
    assert example["text"].startswith("Hello ,")


def test_load_text_files_returns_a_row_per_document(tokenizer, tmp_path):
    write_file(tmp_path, "b.train", "one\n\n\ntwo  words\n")
    write_file(tmp_path, "a.train", "three")
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    dataset = processor.load_text_files(str(tmp_path), "train")
    assert dataset[:] == {
        "text": ["three", "one", "two  words"],
        "source": ["a.train", "b.train", "b.train"],
    }


# ---- data sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "clean"), [("tokenizer", False), ("tokenizer", True), ("spaced_tokenizer", False)]
)
def test_prepare_dataset_equals_tokenizing_one_document_at_a_time(
    request, corpus_dir, tmp_path, monkeypatch, fixture, clean
):
    tokenizer = request.getfixturevalue(fixture)
    monkeypatch.setattr(documents, "PART", 200)  # a document has many parts
    train = tmp_path / "train"
    train.mkdir()
    toy_text = (corpus_dir / "train" / "toy.train").read_text()
    write_file(train, "a.train", toy_text)
    write_file(train, "b.train", "Hello , world !\n\n\n \n\nA  </s> dog .Here\r\n")
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    datasets = processor.prepare_dataset(
        str(train), str(corpus_dir / "dev"), max_length=32, clean=clean, num_proc=1
    )

    texts = [*toy_text.strip("\n").split("\n\n\n"), "Hello , world !", "A  </s> dog .Here"]
    if clean:
        texts = [clean_text(text) for text in texts]
    token_ids = encode_texts(processor, texts)
    assert datasets["train"]["input_ids"][:] == split_into_chunks(token_ids, 32)

    report = processor.reports["train"]
    assert report["tokens"] == len(token_ids)
    assert report["chunks"] == len(token_ids) // 32
    assert report["tokens_left_out"] == len(token_ids) % 32
    assert report["files"] == 2
    assert report["documents"] == len(texts)
    if not clean:
        assert report["words"] == sum(len(text.split()) for text in texts)
        assert report["bytes"] == sum(len(text.encode()) for text in texts)
    assert report["bytes_on_disk"] == sum(path.stat().st_size for path in train.iterdir())
    assert set(processor.reports) == {"train", "validation"}
    assert set(datasets) == {"train", "validation"}

    feature = datasets["train"].features["input_ids"]
    assert feature.length == 32
    assert feature.feature.dtype == "uint16"
    assert datasets["train"].cache_files
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="needs the shared corpus")
@pytest.mark.parametrize("name", ["qed", "wikipedia", "childes"])
def test_real_files_have_the_tokens_of_their_documents(tmp_path, tokenizer, name):
    path = SHARED / "corpus" / "dev" / f"{name}.dev"
    texts = ["".join(lines) for lines in read_documents(path)]
    processor = DataProcessor(tokenizer, cache_dir=tmp_path)
    dataset = processor.prepare_dataset(path, path, max_length=1, clean=False)["train"]
    assert [token_id for (token_id,) in dataset["input_ids"][:]] == encode_texts(processor, texts)


def test_a_large_vocabulary_is_stored_as_int32(tokenizer, corpus_dir, tmp_path):
    large = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **SPECIAL_TOKENS)
    large.add_tokens([f"zq{i}" for i in range(66_000)])
    path = write_file(tmp_path, "a.txt", "zq65999 " * 40)
    processor = DataProcessor(large, cache_dir=tmp_path / "cache")
    datasets = processor.prepare_dataset(str(path), str(corpus_dir / "dev"), max_length=16)
    assert datasets["train"].features["input_ids"].feature.dtype == "int32"
    assert large.convert_tokens_to_ids("zq65999") in datasets["train"][0]["input_ids"]


MEASURE_MEMORY = r"""
import re, sys, data_utils
def peak():  # ru_maxrss would count the memory of the parent process
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) // 1024
tokenizer, line, corpus, cache = sys.argv[1:]
processor = data_utils.DataProcessor(data_utils.load_tokenizer(tokenizer), cache_dir=cache)
processor.prepare_dataset(corpus + "/train", corpus + "/dev")
libraries = peak()
processor.prepare_dataset(line, corpus + "/dev")
print(peak() - libraries)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_one_huge_line_needs_little_memory(tokenizer_file, corpus_dir, tmp_path):
    line = write_file(tmp_path, "a.txt", b"x" * 1_000_000 + b" the cat sees" * 1_500_000)
    arguments = [tokenizer_file, line, corpus_dir, tmp_path / "cache"]
    command = [sys.executable, "-c", MEASURE_MEMORY, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(process.stdout) < 250, "MB"  # the tokenizer would take 3 GB for the line at once
    reports = [
        json.loads(path.read_text())["report"] for path in (tmp_path / "cache").glob("train-*.json")
    ]
    assert (1, 20_500_000) in [(report["documents"], report["bytes"]) for report in reports]


# ---- the cache ----------------------------------------------------------------------------------


def test_cache_is_reused_until_text_tokenizer_or_settings_change(tokenizer, corpus_dir, tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    text = (corpus_dir / "train" / "toy.train").read_text()
    source = write_file(train, "a.train", text)
    cache = tmp_path / "cache"

    def prepare(tokenizer=tokenizer, max_length=32, clean=False):
        processor = DataProcessor(tokenizer, cache_dir=cache)
        datasets = processor.prepare_dataset(
            str(train), str(corpus_dir / "dev"), max_length=max_length, clean=clean
        )
        return datasets["train"]["input_ids"][:], processor.reports["train"]

    def cache_files() -> set[Path]:
        return set(cache.glob("train-*.arrow"))

    # another time of the source is not a change
    chunks, report = prepare()
    (arrow,) = cache_files()
    write_time = arrow.stat().st_mtime_ns
    source.touch()
    assert prepare() == (chunks, report)
    assert cache_files() == {arrow}
    assert arrow.stat().st_mtime_ns == write_time

    # each of these changes adds a file
    prepare(max_length=16)
    assert len(cache_files()) == 2
    prepare(clean=True)
    assert len(cache_files()) == 3
    source.write_text(text.replace("cat", "dog"))
    changed_chunks, _ = prepare()
    assert changed_chunks != chunks
    assert len(cache_files()) == 4
    source.write_text(text)
    source.rename(train / "wikipedia.train")  # in a wiki domain, documents start elsewhere
    prepare()
    assert len(cache_files()) == 5
    tokenizer_path = write_file(tmp_path, "t.json", tokenizer.backend_tokenizer.to_str())
    larger_tokenizer = load_tokenizer(tokenizer_path)
    larger_tokenizer.add_tokens(["zebra"])
    prepare(tokenizer=larger_tokenizer)
    assert len(cache_files()) == 6


def test_a_saved_dataset_in_a_renamed_folder_has_another_domain(tokenizer, tmp_path):
    rows = {"text": ["\n".join(sentences(40, seed=seed)) for seed in range(3)]}
    for split in ("train", "validation"):
        Dataset.from_dict(rows).save_to_disk(tmp_path / "one" / split)
    for name in ("one", "two"):
        processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
        processor.prepare_dataset(tmp_path / name, tmp_path / name, max_length=8)
        domains = [report["sources"][0]["domain"] for report in processor.reports.values()]
        assert domains == [name, name]
        if name == "one":
            (tmp_path / "one").rename(tmp_path / "two")


def test_a_new_cleaner_only_concerns_text_that_is_cleaned(
    tokenizer, corpus_dir, tmp_path, monkeypatch
):
    folders = (str(corpus_dir / "train"), str(corpus_dir / "dev"))
    for version in (1, 2):
        monkeypatch.setattr("data_utils.CLEANER_VERSION", version)
        for clean in (False, True):
            processor = DataProcessor(tokenizer, cache_dir=tmp_path)
            processor.prepare_dataset(*folders, max_length=32, clean=clean)
    assert len(list(tmp_path.glob("train-*.arrow"))) == 3


def test_the_environment_can_set_the_cache_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    assert DataProcessor(tokenizer).cache_dir == tmp_path / "cache"
    monkeypatch.delenv("BABYLLAMA_CACHE")
    assert DataProcessor(tokenizer).cache_dir == ROOT / "data" / "cache"


def test_a_failed_run_leaves_no_cache_files(tokenizer, corpus_dir, tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    write_file(train, "a.train", (corpus_dir / "train" / "toy.train").read_text())
    write_file(train, "b.jsonl", '{"text": "fine"}\n{"no": 1}\n')
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"b\.jsonl: line 2"):
        processor.prepare_dataset(str(train), str(corpus_dir / "dev"), max_length=32)
    assert not list((tmp_path / "cache").iterdir())
    assert "train" not in processor.reports


# ---- errors -------------------------------------------------------------------------------------


def test_a_text_shorter_than_a_chunk_is_an_error(tokenizer, corpus_dir, tmp_path):
    write_file(tmp_path, "a.dev", "a")
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    token_ids = encode_texts(processor, ["a"])
    with pytest.raises(ValueError, match=rf"validation: the {len(token_ids)} tokens.*a\.dev.*128"):
        processor.prepare_dataset(str(corpus_dir / "train"), str(tmp_path), max_length=128)


def test_the_tokenizer_must_be_fast_and_have_bos_and_eos(tokenizer):
    with pytest.raises(ValueError, match="bos_token"):
        DataProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    with pytest.raises(ValueError, match="fast"):
        DataProcessor(object())


@pytest.mark.parametrize("length", [0, -3, "128", None, True, 1.5])
def test_max_length_must_be_a_positive_integer(tokenizer, corpus_dir, tmp_path, length):
    processor = DataProcessor(tokenizer, tmp_path)
    message = f"max_length must be 1 token or more, not {re.escape(repr(length))}"
    with pytest.raises(ValueError, match=message):
        processor.tokenize_and_chunk({"text": "The cat"}, max_length=length)
    with pytest.raises(ValueError, match="must be 1 token or more"):
        processor.prepare_dataset(corpus_dir / "train", corpus_dir / "dev", max_length=length)


def test_num_proc_may_be_none(tokenizer, corpus_dir, tmp_path):
    processor = DataProcessor(tokenizer, tmp_path)
    train = corpus_dir / "train"
    assert processor.prepare_dataset(train, corpus_dir / "dev", max_length=32, num_proc=None)
