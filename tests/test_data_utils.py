"""Read, tokenize, chunk and cache small real files; compare with naive Python."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama.data import cleaners, documents
from babyllama.data.cleaners import clean_text
from babyllama.data.documents import domain_of, find_files, new_report, read_documents, read_parts
from babyllama.data.tokenizer import SPECIAL_TOKENS, byte_lengths, load_tokenizer
from data_utils import DataProcessor


def documents_of(path, report=None) -> list[str]:
    """Return the text of each document that read_documents yields."""
    return ["".join(lines) for lines in read_documents(path, report)]


def written(tmp_path: Path, name: str, data: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---- the tokenizer


def test_load_tokenizer_sets_the_special_tokens_of_the_file(tokenizer_file, tmp_path):
    for place in (tokenizer_file, tokenizer_file.parent):
        tokenizer = load_tokenizer(place)
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.padding_side == "right"
    tree = json.loads(tokenizer_file.read_text())
    tree["post_processor"] = None
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "<pad>"]
    del tree["model"]["vocab"]["<pad>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert (
        load_tokenizer(tmp_path).pad_token is None and load_tokenizer(tmp_path).bos_token == "<s>"
    )


def test_load_tokenizer_names_a_missing_or_broken_file(tokenizer_file, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none\.json.*python train_tokenizer\.py --data-dir .*--output"
    ):
        load_tokenizer(tmp_path / "none.json")
    tree = json.loads(tokenizer_file.read_text())
    tree["model"]["merges"] = [
        ["a", "zzz"],
        *tree["model"]["merges"],
    ]  # makes the Rust code panic or refuse
    for text in ("{", "[]", '{"model": 3}', json.dumps(tree)):
        broken = written(tmp_path, "broken.json", text)
        with pytest.raises(ValueError, match=r"broken\.json"):
            load_tokenizer(broken)


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_byte_lengths_sum_to_the_bytes_of_a_text(tokenizer, text):
    lengths = byte_lengths(tokenizer)
    assert lengths.shape == (len(tokenizer),) and lengths.dtype == "int64" and not lengths[:3].any()
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in ("<s>", "</s>", "<pad>")):
        assert lengths[ids].sum() == len(text.encode())


def test_byte_lengths_refuses_a_tokenizer_that_is_not_byte_level():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"naïve cat": 0, "x": 1}, unk_token="x"))
    with pytest.raises(ValueError, match="byte-level"):
        byte_lengths(PreTrainedTokenizerFast(tokenizer_object=words))


# ---- files


def test_find_files_returns_the_files_of_a_split_sorted(tmp_path):
    for name in (
        "b.train",
        "a/z.train",
        "a/y.TRAIN.gz",
        "c.dev",
        "d.test",
        "e.txt",
        "f.jsonl",
        ".hidden.train",
        "x.train/in.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.train")

    def names(split):
        return [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, split)]

    assert names("train") == [
        "a/y.TRAIN.gz",
        "a/z.train",
        "b.train",
        "e.txt",
        "f.jsonl",
        "x.train/in.txt",
    ]
    assert names("dev") == names("validation") == ["c.dev", "e.txt", "f.jsonl", "x.train/in.txt"]
    (tmp_path / "c.dev").unlink()
    assert names("validation")[0] == "d.test"
    assert find_files(tmp_path / "b.train", "dev") == [tmp_path / "b.train"]


def test_find_files_lists_expected_and_existing_files(tmp_path):
    written(tmp_path, "notes.md", "x")
    with pytest.raises(FileNotFoundError, match=r"\.dev.*\.test.*\.txt.*\.jsonl.*notes\.md"):
        find_files(tmp_path, "validation")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_files(tmp_path / "nowhere", "train")


def test_domain_of():
    names = {
        "Open_Subtitles.train.gz": "open_subtitles",
        "qed.dev": "qed",
        "my.book.txt": "my.book",
        "a.jsonl.gz": "a",
        "b": "b",
    }
    assert {name: domain_of(Path("x.train", name)) for name in names} == names


# ---- documents


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.txt", "a\nb\n\nc", ["a\nb\n\nc"]),
        ("x.txt", "\n\na\n\n\nb\n\n\n\n\n\nc\n\n", ["a", "b", "c"]),
        ("x.txt", "a\n\n = B = \nc\n\n= = = D = = =\ne", ["a\n\n = B = \nc", "= = = D = = =\ne"]),
        ("wikipedia.train", " = A = \n \n = = B = = \nb\n = C = \nc", [" = A = \n \n = = B = = \nb", " = C = \nc"]),
        ("simple_wiki.dev", '<doc id="1">\na\n</doc>\n<doc id="2">\nb\n</doc>', ['<doc id="1">\na\n</doc>', '<doc id="2">\nb\n</doc>']),
        ("qed.train", "1\n00:00:01,000 --> 00:00:02,000\n1\n\n2\n00:00:03,000 --> 00:00:04,000\n\n\n3\n00:00:05,000 --> 00:00:06,000\nx\n"
         "\n1\n00:00:01,000 --> 00:00:02,000\ny", None),
    ],
)  # fmt: skip
def test_documents_start_at_titles_empty_lines_and_first_subtitles(tmp_path, name, text, expected):
    found = documents_of(written(tmp_path, name, text))
    if (
        expected is None
    ):  # an empty cue makes two blank lines; only a cue numbered 1 begins a document
        assert len(found) == 2 and found[1].startswith("1\n00") and found[0].endswith("x")
    else:
        blank = str.maketrans("", "", " ")
        assert [text.translate(blank) for text in found] == [
            text.translate(blank) for text in expected
        ]


def test_each_json_line_is_a_document(tmp_path):
    lines = ['{"text": "a\\r\\n\\n\\n\\nb", "id": 3}', "", '"c \\ud800\\u0000d"', '{"text": ""}']
    report = new_report()
    assert documents_of(written(tmp_path, "x.jsonl", "\n".join(lines)), report) == [
        "a\n\n\n\nb",
        "c \ufffdd",
    ]
    assert (report["surrogates_replaced"], report["nul_removed"], report["documents"]) == (1, 1, 2)
    for bad, what in (
        ("{", "not JSON"),
        ("3", "neither"),
        ('{"txt": "a"}', "neither"),
        ("[" * 100_000, "not JSON"),
    ):
        with pytest.raises(ValueError, match=rf"bad\.jsonl: line 3 is {what}"):
            documents_of(written(tmp_path, "bad.jsonl", f'"a"\n"b"\n{bad}\n'))


HOSTILE = {
    "bom": (b"\xef\xbb\xbfone two", ["one two"], {"bom_removed": 1}),
    "crlf": (b"one\r\ntwo\rthree\r\n\r\n\r\nfour", ["one\ntwo\nthree", "four"], {}),
    "nul": (b"on\0e\0", ["one"], {"nul_removed": 2}),
    "invalid": (
        b"caf\xe9 \xff\xfe \xed\xa0\x80",
        ["caf\ufffd \ufffd\ufffd \ufffd\ufffd\ufffd"],
        {"invalid_bytes": 6},
    ),
    "invalid_after_bom": (
        b"\xef\xbb\xbfab\xff",
        ["ab\ufffd"],
        {"invalid_bytes": 1, "bom_removed": 1},
    ),
    "cut_character": ("aé".encode()[:-1], ["a\ufffd"], {"invalid_bytes": 1}),
    "replacement_was_there": ("a\ufffdb".encode(), ["a\ufffdb"], {"invalid_bytes": 0}),
    "separators": (
        "a\u2028b\u0085c\x0cd\u200be\u202ef".encode(),
        ["a\u2028b\u0085c\x0cd\u200be\u202ef"],
        {},
    ),
    "empty": (b"", [], {"empty_files": 1, "documents": 0}),
    "newlines": (b"\n\r\n\n\n\n\n", [], {"empty_files": 1}),
    "one_byte": (b"x", ["x"], {"documents": 1, "words": 1, "bytes": 1}),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("packed", [False, True])
def test_invalid_text_is_repaired_and_counted(tmp_path, kind, packed):
    data, expected, counts = HOSTILE[kind]
    path = written(
        tmp_path, "x.txt.gz" if packed else "x.txt", gzip.compress(data) if packed else data
    )
    report = new_report()
    assert documents_of(path, report) == expected
    assert {key: report[key] for key in counts} == counts
    assert report["files"] == 1 and report["bytes_on_disk"] == path.stat().st_size
    if kind.startswith("invalid"):
        assert report["first_invalid"] == f"{path}: line 1"


def test_errors_name_the_broken_file(tmp_path):
    whole = gzip.compress(os.urandom(3000).hex().encode())
    for data in (whole[:-20], b"\x1f\x8b" + b"x" * 50, b"plain text"):
        with pytest.raises(ValueError, match=r"x\.txt\.gz: broken gzip"):
            documents_of(written(tmp_path, "x.txt.gz", data))
    with pytest.raises(ValueError, match=r"x\.txt.*UTF-16"):
        documents_of(written(tmp_path, "x.txt", "text".encode("utf-16")))


def naive_documents(text: str) -> list[str]:
    """Documents between two blank lines or more, by splitting into lines."""
    found, lines, blank = [], [], 0
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), "", "", ""]:
        blank = 0 if line else blank + 1
        if line:
            lines.append(line)
        elif blank == 1:
            lines.append("")
        elif lines[:-1]:
            found.append("\n".join(lines).strip("\n"))
            lines = []
    return [text for text in found if text]


WORDS = st.sampled_from(
    [
        "cat",
        "don't",
        "1984",
        ".",
        ",",
        "é",
        "日本",
        "<s>",
        "</s>",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "x" * 30,
    ]
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(WORDS, max_size=60), block=st.integers(1, 40), part=st.integers(4, 60))
def test_documents_do_not_depend_on_the_sizes_of_blocks_and_parts(
    tmp_path, monkeypatch, words, block, part
):
    text = "".join(words)
    blank = "\n".join(
        "" if line.isspace() else line for line in text.replace("\r\n", "\n").split("\n")
    )
    path = written(tmp_path, "x.txt", text)
    monkeypatch.setattr(documents, "BLOCK", block)
    monkeypatch.setattr(documents, "PART", part)
    assert all(len(text) <= part for text in read_parts(path))
    assert "".join(read_parts(path)) == "".join(documents_of(path))
    report = new_report()
    assert documents_of(path, report) == naive_documents(blank)
    assert report["bytes"] == sum(len(document.encode()) for document in naive_documents(blank))


def test_a_long_line_comes_in_parts_and_stays_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 30)
    monkeypatch.setattr(documents, "LONG_LINE", 50)
    words = " ".join(sentences(40))
    text = f"a\n{words}\n= = = not a title\n{words} = = = nor this = = =\n\n\n{'x' * 500} 1"
    for name in ("x.txt", "x.jsonl"):
        path = written(tmp_path, name, json.dumps(text) if name == "x.jsonl" else text)
        report = new_report()
        found = documents_of(path, report)
        assert "\n\n\n".join(found) == text and len(found) == (1 if name == "x.jsonl" else 2)
        assert report["bytes"] == sum(map(len, found))
    longest = max(len(line) for document in read_documents(tmp_path / "x.txt") for line in document)
    assert longest <= 80
    assert report["words"] == len(text.split())


# ---- chunks


def reference(processor: DataProcessor, texts: list[str]) -> list[int]:
    """BOS, ids of the whole text, EOS for each document; one text at a time."""
    ids: list[int] = []
    for text in texts:
        ids += [1, *processor._backend.encode(text, add_special_tokens=False).ids, 2]
    return ids


def chunks(ids: list[int], n: int) -> list[list[int]]:
    return [ids[i : i + n] for i in range(0, len(ids), n) if i + n <= len(ids)]


@pytest.fixture(scope="module")
def newline_tokenizer():
    """Merges of newlines and blanks too, so that a cut at the wrong place would show."""
    from train_tokenizer import train_bpe_tokenizer

    texts = [
        f"{a}\n\n\n{b}  \n\n{a}\n \n{b}\n\n"
        for a, b in zip(sentences(300), sentences(300, seed=1), strict=True)
    ]
    backend = train_bpe_tokenizer(texts, vocab_size=500)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


GAPS = st.sampled_from([" ", "\n", "\n\n", ".\n\n", "  ", " \n", "\n ", " \n\n ", "\t", ". "])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["The cat", "sees", "don't", "a", "1984", "!?", "é"]), GAPS),
        min_size=1,
        max_size=60,
    )
)
def test_text_in_parts_has_the_same_tokens_as_in_one(
    newline_tokenizer, monkeypatch, tmp_path, parts
):
    text = "".join(word + gap for word, gap in parts)
    processor = DataProcessor(newline_tokenizer, cache_dir=tmp_path)
    monkeypatch.setattr(documents, "PART", 40)
    ids = reference(processor, [text])
    assert processor.tokenize_and_chunk({"text": text}, max_length=7) == {
        "input_ids": chunks(ids, 7)
    }
    assert processor.tokenize_and_chunk({"text": text}, max_length=1)["input_ids"] == [
        [i] for i in ids
    ]


def test_tokenize_and_chunk_empty_text_and_spelled_special_tokens(tokenizer, tmp_path):
    processor = DataProcessor(tokenizer, cache_dir=tmp_path)
    assert processor.tokenize_and_chunk({"text": ""}, max_length=2) == {"input_ids": [[1, 2]]}
    assert processor.tokenize_and_chunk({"text": ""}, max_length=3) == {"input_ids": []}
    marked = processor.tokenize_and_chunk({"text": "a </s> b <s>"}, max_length=1)["input_ids"]
    assert (
        marked[0] == [1] and marked[-1] == [2] and [1] not in marked[1:] and [2] not in marked[:-1]
    )


def test_clean_text_keeps_other_fields(tokenizer, tmp_path):
    example = {"text": "Hello , world !\nHello.World", "source": "a , b", "n": 3}
    clean = DataProcessor(tokenizer, cache_dir=tmp_path).clean_text(example)
    assert clean == {"text": "Hello, world!\nHello. World", "source": "a , b", "n": 3}
    assert example["text"].startswith("Hello ,")


def test_load_text_files_returns_a_row_per_document(tokenizer, tmp_path):
    written(tmp_path, "b.train", "one\n\n\ntwo  words\n")
    written(tmp_path, "a.train", "three")
    dataset = DataProcessor(tokenizer, cache_dir=tmp_path / "cache").load_text_files(
        str(tmp_path), "train"
    )
    assert dataset[:] == {
        "text": ["three", "one", "two  words"],
        "source": ["a.train", "b.train", "b.train"],
    }


@pytest.mark.parametrize("clean", [False, True])
def test_prepare_dataset_equals_tokenizing_one_document_at_a_time(
    tokenizer, corpus_dir, tmp_path, monkeypatch, clean
):
    monkeypatch.setattr(documents, "PART", 200)  # many pieces to a document
    train = tmp_path / "train"
    train.mkdir()
    first = (corpus_dir / "train" / "toy.train").read_text()
    written(train, "a.train", first)
    written(train, "b.train", "Hello , world !\n\n\n \n\nA  </s> dog .Here\r\n")
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    both = processor.prepare_dataset(
        str(train), str(corpus_dir / "dev"), max_length=32, clean=clean, num_proc=1
    )
    texts = [*first.strip("\n").split("\n\n\n"), "Hello , world !", "A  </s> dog .Here"]
    texts = [clean_text(text) for text in texts] if clean else texts
    ids = reference(processor, texts)
    assert both["train"]["input_ids"][:] == chunks(ids, 32)
    report = processor.reports["train"]
    assert (report["tokens"], report["chunks"], report["tokens_left_out"]) == (
        len(ids),
        len(ids) // 32,
        len(ids) % 32,
    )
    assert (report["files"], report["documents"]) == (2, len(texts))
    if not clean:
        assert report["words"] == sum(len(text.split()) for text in texts)
        assert report["bytes"] == sum(len(text.encode()) for text in texts)
    assert report["bytes_on_disk"] == sum(path.stat().st_size for path in train.iterdir())
    assert set(processor.reports) == set(both) == {"train", "validation"}
    feature = both["train"].features["input_ids"]
    assert (feature.length, feature.feature.dtype) == (32, "uint16")
    assert both["train"].cache_files and not list((tmp_path / "cache").glob(".*"))


def test_cache_is_reused_until_text_tokenizer_or_settings_change(tokenizer, corpus_dir, tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    text = (corpus_dir / "train" / "toy.train").read_text()
    source = written(train, "a.train", text)
    cache = tmp_path / "cache"

    def prepare(**more):
        processor = DataProcessor(tokenizer, cache_dir=cache)
        both = processor.prepare_dataset(
            str(train), str(corpus_dir / "dev"), **{"max_length": 32, "clean": False, **more}
        )
        return both["train"]["input_ids"][:], processor.reports["train"]

    def files() -> set[Path]:
        return set(cache.glob("train-*.arrow"))

    first = prepare()
    (arrow,) = files()
    stamp = arrow.stat().st_mtime_ns
    source.touch()
    assert prepare() == first and files() == {arrow} and arrow.stat().st_mtime_ns == stamp
    count = 1
    for change in ({"max_length": 16}, {"clean": True}):
        prepare(**change)
        count += 1
        assert len(files()) == count
    source.write_text(text.replace("cat", "dog"))
    assert prepare()[0] != first[0] and len(files()) == count + 1
    source.write_text(text)
    source.rename(train / "wikipedia.train")
    prepare()
    assert len(files()) == count + 2
    tokenizer_2 = load_tokenizer(written(tmp_path, "t.json", tokenizer.backend_tokenizer.to_str()))
    tokenizer_2.add_tokens(["zebra"])
    DataProcessor(tokenizer_2, cache_dir=cache).prepare_dataset(
        str(train), str(corpus_dir / "dev"), max_length=32, clean=False
    )
    assert len(files()) == count + 3


@pytest.mark.parametrize(
    ("ending", "content"), [(".json", b"{"), (".json", b"\xff"), (".arrow", b""), (".arrow", None)]
)
def test_a_corrupted_cache_file_is_named_and_rebuilt_after_deleting_it(
    ending, content, tokenizer, corpus_dir, tmp_path
):
    def prepare():
        processor = DataProcessor(tokenizer, cache_dir=str(tmp_path))
        return processor.prepare_dataset(str(corpus_dir / "train"), str(corpus_dir / "dev"), 32)

    want = prepare()["train"][:]["input_ids"]
    (arrow,) = tmp_path.glob("train-*.arrow")
    victim = arrow.with_suffix(ending)
    victim.write_bytes(victim.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=f"{arrow.name} is corrupted .*delete it"):
        prepare()
    arrow.unlink()
    assert prepare()["train"][:]["input_ids"] == want


def test_cache_folder_from_the_environment(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "there"))
    assert DataProcessor(tokenizer).cache_dir == tmp_path / "there"
    monkeypatch.delenv("BABYLLAMA_CACHE")
    assert DataProcessor(tokenizer).cache_dir == ROOT / "data" / "cache"


def test_a_failed_run_leaves_no_cache_files(tokenizer, corpus_dir, tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    written(train, "a.train", (corpus_dir / "train" / "toy.train").read_text())
    written(train, "b.jsonl", '{"text": "fine"}\n{"no": 1}\n')
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"b\.jsonl: line 2"):
        processor.prepare_dataset(str(train), str(corpus_dir / "dev"), max_length=32)
    assert not list((tmp_path / "cache").iterdir()) and "train" not in processor.reports


def test_text_that_fills_no_chunk_is_refused(tokenizer, corpus_dir, tmp_path):
    written(tmp_path, "a.dev", "a")
    ids = reference(DataProcessor(tokenizer, cache_dir=tmp_path), ["a"])
    with pytest.raises(ValueError, match=rf"validation: the {len(ids)} tokens.*a\.dev.*128"):
        DataProcessor(tokenizer, cache_dir=tmp_path / "c").prepare_dataset(
            str(corpus_dir / "train"), str(tmp_path), max_length=128
        )


def test_large_vocabularies_are_int32(tokenizer, corpus_dir, tmp_path):
    from transformers import PreTrainedTokenizerFast

    large = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **SPECIAL_TOKENS)
    large.add_tokens([f"zq{i}" for i in range(66_000)])
    written(tmp_path, "a.txt", "zq65999 " * 40)
    both = DataProcessor(large, cache_dir=tmp_path / "c").prepare_dataset(
        str(tmp_path / "a.txt"), str(corpus_dir / "dev"), max_length=16
    )
    assert both["train"].features["input_ids"].feature.dtype == "int32"
    assert large.convert_tokens_to_ids("zq65999") in both["train"][0]["input_ids"]


def test_the_tokenizer_must_be_fast_and_have_bos_and_eos(tokenizer):
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ValueError, match="bos_token"):
        DataProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    with pytest.raises(ValueError, match="fast"):
        DataProcessor(object())


def test_cleaning_in_parts_gives_the_same_text_as_cleaning_at_once(tmp_path, monkeypatch):
    text = "\n\n".join(
        f"MARY: {a}\n[laughs]\nJOHN: {b}"
        for a, b in zip(sentences(80), sentences(80, seed=3), strict=True)
    )
    path = written(tmp_path, "switchboard.train", f"[applause]\n\n\n{text}\n\n\nA.1: Bye .\n")
    cleaner = cleaners.create_cleaner_registry()["switchboard"]
    monkeypatch.setattr(documents, "PART", 500)
    report = new_report()
    first, second = map(list, documents.read_document_parts(path, report, cleaner))
    assert report["documents"] == 3  # "[applause]" is empty when cleaned
    assert len(first) > 8 and max(map(len, first)) <= 502
    assert "".join(first) == cleaner(text) and second == ["Bye."]


SMALL_MEMORY = r"""
import re, sys, data_utils
def peak():  # ru_maxrss would count what the process that started this one took
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
    line = written(tmp_path, "a.txt", b"x" * 1_000_000 + b" the cat sees" * 1_500_000)
    command = [
        sys.executable,
        "-c",
        SMALL_MEMORY,
        tokenizer_file,
        line,
        corpus_dir,
        tmp_path / "cache",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) < 250, "MB"  # in one go the tokenizer would take 3 GB
    reports = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("train-*.json")]
    assert (1, 20_500_000) in [(report["documents"], report["bytes"]) for report in reports]


@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="needs the shared corpus")
@pytest.mark.parametrize("name", ["qed", "wikipedia", "childes"])
def test_real_files_have_the_expected_documents_and_tokens(tmp_path, tokenizer, name):
    path = SHARED / "corpus" / "dev" / f"{name}.dev"
    report = new_report()
    found = documents_of(path, report)
    assert (
        report["words"] == len(path.read_text(encoding="utf-8").split())
        and report["invalid_bytes"] == 0
    )
    assert len(found) == {"qed": 8, "childes": 1}.get(name, len(found)) and (
        name != "wikipedia" or len(found) > 60
    )
    processor = DataProcessor(tokenizer, cache_dir=tmp_path)
    dataset = processor.prepare_dataset(path, path, max_length=1, clean=False)
    assert [i for (i,) in dataset["train"]["input_ids"][:]] == reference(processor, found)


@pytest.mark.parametrize("length", [0, -3, "128", None, True, 1.5])
def test_max_length_must_be_a_positive_integer(tokenizer, corpus_dir, tmp_path, length):
    processor = DataProcessor(tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match=f"max_length must be 1 token or more, not {re.escape(repr(length))}"
    ):
        processor.tokenize_and_chunk({"text": "The cat"}, max_length=length)
    with pytest.raises(ValueError, match="must be 1 token or more"):
        processor.prepare_dataset(corpus_dir / "train", corpus_dir / "dev", max_length=length)
    assert processor.prepare_dataset(
        corpus_dir / "train", corpus_dir / "dev", max_length=32, num_proc=None
    )


def test_a_lone_surrogate_is_replaced(tokenizer, tmp_path):
    processor = DataProcessor(tokenizer, tmp_path)
    broken, mended = (
        processor.tokenize_and_chunk({"text": f"a cat {c} sees"}, 2) for c in ("\ud800", "\ufffd")
    )
    assert broken == mended and broken["input_ids"]
