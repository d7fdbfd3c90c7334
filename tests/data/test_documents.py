"""Read small real files as documents, and compare with plain Python."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from conftest import SHARED, sentences, write_file
from datasets import Dataset, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama.data import documents
from babyllama.data.cleaners import create_cleaner_registry
from babyllama.data.documents import new_report, read_documents, read_parts
from babyllama.data.text_files import find_files


def read_texts(path: Path, report: dict | None = None) -> list[str]:
    """Return the text of each document that read_documents yields."""
    return ["".join(lines) for lines in read_documents(path, report)]


# ---- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.txt", "a\nb\n\nc", ["a\nb\n\nc"]),
        ("x.txt", "\n\na\n\n\nb\n\n\n\n\n\nc\n\n", ["a", "b", "c"]),
        ("x.txt", "a\n\n = B = \nc\n\n= = = D = = =\ne", ["a\n\n = B = \nc", "= = = D = = =\ne"]),
        (
            "wikipedia.train",
            " = A = \n \n = = B = = \nb\n = C = \nc",
            [" = A = \n \n = = B = = \nb", " = C = \nc"],
        ),
        (
            "simple_wiki.dev",
            '<doc id="1">\na\n</doc>\n<doc id="2">\nb\n</doc>',
            ['<doc id="1">\na\n</doc>', '<doc id="2">\nb\n</doc>'],
        ),
    ],
)
def test_documents_start_at_titles_and_behind_two_empty_lines(tmp_path, name, text, expected):
    def without_blanks(texts: list[str]) -> list[str]:
        return [text.replace(" ", "") for text in texts]

    texts = read_texts(write_file(tmp_path, name, text))
    assert without_blanks(texts) == without_blanks(expected)


def test_only_a_subtitle_numbered_1_starts_a_document(tmp_path):
    """A subtitle without text makes two empty lines, which start no document."""
    first = (
        "1\n00:00:01,000 --> 00:00:02,000\n1\n\n"
        "2\n00:00:03,000 --> 00:00:04,000\n\n\n"
        "3\n00:00:05,000 --> 00:00:06,000\nx"
    )
    second = "1\n00:00:01,000 --> 00:00:02,000\ny"
    path = write_file(tmp_path, "qed.train", f"{first}\n\n{second}")
    assert read_texts(path) == [first, second]


def test_each_json_line_is_a_document(tmp_path):
    lines = ['{"text": "a\\r\\n\\n\\n\\nb", "id": 3}', "", '"c \\ud800\\u0000d"', '{"text": ""}']
    path = write_file(tmp_path, "x.jsonl", "\n".join(lines))
    report = new_report()
    assert read_texts(path, report) == ["a\n\n\n\nb", "c \ufffdd"]
    assert report["surrogates_replaced"] == 1
    assert report["nul_removed"] == 1
    assert report["documents"] == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("3", "neither"),
        ('{"txt": "a"}', "neither"),
        pytest.param("[" * 100_000, "not JSON", id="deeply-nested"),
    ],
)
def test_a_json_line_without_text_is_an_error_with_its_number(tmp_path, line, problem):
    path = write_file(tmp_path, "bad.jsonl", f'"a"\n"b"\n{line}\n')
    with pytest.raises(ValueError, match=rf"bad\.jsonl: line 3 is {problem}"):
        read_texts(path)


SEPARATORS = "a\u2028b\u0085c\x0cd\u200be\u202ef"  # none of them ends a line
INVALID_TEXTS = {  # bytes, texts, counts
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
    "truncated_character": ("aé".encode()[:-1], ["a\ufffd"], {"invalid_bytes": 1}),
    "replacement_character": ("a\ufffdb".encode(), ["a\ufffdb"], {"invalid_bytes": 0}),
    "separators": (SEPARATORS.encode(), [SEPARATORS], {}),
    "empty": (b"", [], {"empty_files": 1, "documents": 0}),
    "newlines": (b"\n\r\n\n\n\n\n", [], {"empty_files": 1}),
    "one_byte": (b"x", ["x"], {"documents": 1, "words": 1, "bytes": 1}),
}


@pytest.mark.parametrize("kind", INVALID_TEXTS)
@pytest.mark.parametrize("is_gzipped", [False, True])
def test_invalid_text_is_repaired_and_counted(tmp_path, kind, is_gzipped):
    data, expected, counts = INVALID_TEXTS[kind]
    if is_gzipped:
        path = write_file(tmp_path, "x.txt.gz", gzip.compress(data))
    else:
        path = write_file(tmp_path, "x.txt", data)
    report = new_report()
    assert read_texts(path, report) == expected
    assert {key: report[key] for key in counts} == counts
    assert report["files"] == 1
    assert report["bytes_on_disk"] == path.stat().st_size
    if kind.startswith("invalid"):
        assert report["first_invalid"] == f"{path}: line 1"


def test_errors_name_the_broken_file(tmp_path):
    complete = gzip.compress(os.urandom(3000).hex().encode())
    for data in (complete[:-20], b"\x1f\x8b" + b"x" * 50, b"plain text"):
        with pytest.raises(ValueError, match=r"x\.txt\.gz: broken gzip"):
            read_texts(write_file(tmp_path, "x.txt.gz", data))
    with pytest.raises(ValueError, match=r"x\.txt.*UTF-16"):
        read_texts(write_file(tmp_path, "x.txt", "text".encode("utf-16")))


# ---- sizes of blocks and parts ------------------------------------------------------------------


def split_at_empty_lines(text: str) -> list[str]:
    """Return the texts between two or more empty lines, found by splitting into lines."""
    texts = []
    lines = []
    empty_lines = 0
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), "", "", ""]:
        empty_lines = 0 if line else empty_lines + 1
        if line:
            lines.append(line)
        elif empty_lines == 1:
            lines.append("")
        elif lines[:-1]:
            texts.append("\n".join(lines).strip("\n"))
            lines = []
    return [text for text in texts if text]


WORDS = ["cat", "don't", "1984", ".", ",", "é", "日本", "<s>", "</s>", "x" * 30]
WHITE_SPACE = [" ", "  ", "\n", "\n\n", "\n\n\n", "\r\n"]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(st.sampled_from(WORDS + WHITE_SPACE), max_size=60),
    block=st.integers(1, 40),
    part=st.integers(4, 60),
)
def test_documents_do_not_depend_on_the_sizes_of_blocks_and_parts(
    tmp_path, monkeypatch, words, block, part
):
    text = "".join(words)
    text_lines = text.replace("\r\n", "\n").split("\n")
    expected = split_at_empty_lines(
        "\n".join("" if line.isspace() else line for line in text_lines)
    )
    path = write_file(tmp_path, "x.txt", text)
    monkeypatch.setattr(documents, "BLOCK", block)
    monkeypatch.setattr(documents, "PART", part)
    assert all(len(text) <= part for text in read_parts(path))
    assert "".join(read_parts(path)) == "".join(read_texts(path))
    report = new_report()
    assert read_texts(path, report) == expected
    assert report["bytes"] == sum(len(text.encode()) for text in expected)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_long_line_is_read_in_parts_and_stays_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "BLOCK", 30)
    monkeypatch.setattr(documents, "LONG_LINE", 50)
    words = " ".join(sentences(40))
    text = f"a\n{words}\n= = = not a title\n{words} = = = nor this = = =\n\n\n{'x' * 500} 1"
    is_json = name == "x.jsonl"
    path = write_file(tmp_path, name, json.dumps(text) if is_json else text)
    report = new_report()
    texts = read_texts(path, report)
    assert "\n\n\n".join(texts) == text
    assert len(texts) == (1 if is_json else 2)
    assert report["bytes"] == sum(map(len, texts))
    if is_json:
        assert report["words"] == len(text.split())
    assert max(map(len, documents.read_lines(path, new_report()))) <= 80


def test_cleaning_in_parts_gives_the_same_text_as_cleaning_at_once(tmp_path, monkeypatch):
    questions = sentences(80)
    answers = sentences(80, seed=3)
    pairs = zip(questions, answers, strict=True)
    text = "\n\n".join(f"MARY: {question}\n[laughs]\nJOHN: {answer}" for question, answer in pairs)
    content = f"[applause]\n\n\n{text}\n\n\nA.1: Bye .\n"
    path = write_file(tmp_path, "switchboard.train", content)
    cleaner = create_cleaner_registry()["switchboard"]
    monkeypatch.setattr(documents, "PART", 500)
    report = new_report()
    first, second = map(list, read_documents(path, report, cleaner))
    assert report["documents"] == 3  # cleaning leaves nothing of "[applause]"
    assert len(first) > 8
    assert max(map(len, first)) <= 502
    assert "".join(first) == cleaner(text)
    assert second == ["Bye."]


# ---- real text ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="needs the shared corpus")
@pytest.mark.parametrize("name", ["qed", "wikipedia", "childes"])
def test_real_files_have_the_expected_documents(name):
    path = SHARED / "corpus" / "dev" / f"{name}.dev"
    report = new_report()
    texts = read_texts(path, report)
    assert report["words"] == len(path.read_text(encoding="utf-8").split())
    assert report["invalid_bytes"] == 0
    if name == "wikipedia":
        assert len(texts) > 60
    else:
        assert len(texts) == {"qed": 8, "childes": 1}[name]


def test_a_word_longer_than_a_long_line_counts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 20)
    monkeypatch.setattr(documents, "LONG_LINE", 50)
    monkeypatch.setattr(documents, "PART", 40)
    text = f"a {'x' * 333} b\n{'y' * 120}\nz\n"
    path = tmp_path / "a.txt"
    path.write_text(text)
    report = documents.new_report()
    read = "".join("".join(document) for document in documents.read_documents(path, report))
    assert report["words"] == len(text.split()) == len(read.split()) == 5


# ---- tables and files that are not text ----------------------------------------------------------


def test_wiki_articles_are_found_under_the_name_of_2026(tmp_path):
    path = write_file(tmp_path, "simple_wiki.train.txt", "= One =\na b\n= Two =\nc\n")
    assert len(read_texts(path)) == 2


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_a_table_has_a_document_in_each_row(kind, tmp_path):
    texts = ["One.\nTwo words.", "", "naïve\r\nend", "x" * 70_000]
    dataset = Dataset.from_dict({"id": [1, 2, 3, 4], "text": texts})
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    else:
        dataset.save_to_disk(tmp_path / "train")
    (path,) = find_files(tmp_path, "train")
    report = new_report()
    documents = ["".join(document) for document in read_documents(path, report)]
    assert documents == ["One.\nTwo words.", "naïve\nend", "x" * 70_000]
    assert report["words"] == 6
    assert report["bytes"] == sum(len(text.encode()) for text in documents)
    with pytest.raises(FileNotFoundError):
        find_files(tmp_path, "dev")


def read_rows(folder: Path, texts: list[str]) -> tuple[list[str], dict]:
    """Return the documents of a table with these rows, and the report."""
    path = folder / "table.parquet"
    Dataset.from_dict({"text": texts}).to_parquet(path)
    report = new_report()
    return read_texts(path, report), report


def test_short_rows_are_lines_of_documents_that_blank_rows_separate(tmp_path):
    texts, report = read_rows(tmp_path, ["one two", "three\n", "", "four", " ", "", "five"])
    assert texts == ["one two\nthree", "four", "five"]
    assert report["rows_joined"] == 7
    assert report["words"] == 5
    assert "7 rows of tables look like lines" in documents.rows_joined_text(report)
    lines = sentences(30)
    assert read_rows(tmp_path, lines)[0] == ["\n".join(lines)]


def test_the_rows_of_wikitext_are_articles(tmp_path):
    line = "word " * 100 + "\n"
    article = ["", " = Title = \n", "", line, line, "", " = = Part = = \n", "", line]
    texts, _ = read_rows(tmp_path, article * 60)
    assert len(texts) == 60
    assert texts[0].split("\n") == [text.strip("\n") for text in article[1:]]


@pytest.mark.parametrize(
    "rows",
    [
        ["A document of one long row. " * 20] * 30 + ["", "short"],
        ["short", "two\nlines", "short"] * 10,
    ],
)
def test_long_rows_and_rows_of_several_lines_are_documents(rows, tmp_path):
    texts, report = read_rows(tmp_path, rows)
    assert texts == [row for row in rows if row]
    assert report["rows_joined"] == 0


def test_files_that_datasets_caches_are_not_read(tmp_path):
    dataset = Dataset.from_dict({"text": ["a\nb", "c\nd"]})
    dataset.save_to_disk(tmp_path / "stories" / "train")
    loaded = load_from_disk(str(tmp_path / "stories" / "train"))
    loaded.map(lambda row: {"text": row["text"].upper()})
    assert list(tmp_path.rglob("cache-*.arrow"))
    (path,) = find_files(tmp_path, "train")
    assert read_texts(path) == ["a\nb", "c\nd"]


def test_a_table_without_text_is_a_one_line_error(tmp_path):
    Dataset.from_dict({"sentence": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet has no column text; its columns are sentence"
    ):
        read_texts(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read"):
        read_texts(tmp_path / "b.parquet")


FRENCH = "Le garçon a mangé une crêpe à l'ombre.\n" * 16


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PAR1" + bytes(range(256)), "Parquet"),
        (b"\x28\xb5\x2f\xfd" + bytes(range(256)), "zstd"),
        (gzip.compress(b"some text", mtime=0), "gzip"),
        (b"PK\x03\x04" + bytes(64), "zip archive"),
        (bytes(range(256)) * 4, "mostly not UTF-8"),
        (("Привет, мир! " * 50).encode("cp1251"), "Latin-1 or cp1251"),
        (("hello world " * 50).encode("utf-16-le"), "UTF-16"),
        (("hello world " * 50).encode("utf-32-be"), "UTF-32"),
        ("short".encode("utf-16"), "UTF-16 text"),
        ("short".encode("utf-32"), "UTF-32 text"),
        (b"\0\0\xfe\xff" + "short".encode("utf-32-be"), "UTF-32 text"),
        (FRENCH.encode("latin-1"), r"Latin-1 \(ISO 8859-1\): 64 of the 64 .*iconv -f ISO-8859-1"),
        (FRENCH.replace("'", "’").encode("cp1252"), r"cp1252 .*: 80 of the 80 .*iconv -f CP1252"),
        (b"a" * 10_000 + FRENCH.encode("latin-1"), "Latin-1"),
    ],
)
def test_a_file_that_is_not_text_is_named(content, problem, tmp_path):
    path = tmp_path / "book.train"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"book\.train is .*{problem}"):
        read_texts(path)


@pytest.mark.parametrize(
    ("content", "invalid_bytes"),
    [
        (FRENCH.encode() + b"\xe9" * 64, 64),  # half of the bytes beyond ASCII
        (b"plain English words\n" * 4000 + FRENCH.encode("latin-1"), 64),  # fewer than 1 in 1,000
        (FRENCH.encode("latin-1")[:144], 15),
    ],
)
def test_a_few_invalid_bytes_are_still_repaired_and_counted(content, invalid_bytes, tmp_path):
    path = write_file(tmp_path, "book.train", content)
    report = new_report()
    list(map(list, read_documents(path, report)))
    assert report["invalid_bytes"] == invalid_bytes


def test_broken_links_and_pipes_are_reported(tmp_path, caplog):
    write_file(tmp_path, "a.train", "text")
    (tmp_path / "b.train").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "c.txt")
    os.mkfifo(tmp_path / "d.dev")
    (tmp_path / ".hidden.train").symlink_to(tmp_path / "gone")
    assert [path.name for path in find_files(tmp_path, "train")] == ["a.train"]
    assert caplog.messages == [
        f"skipping {tmp_path}/b.train: it is a link to {tmp_path}/gone, which does not exist",
        f"skipping {tmp_path}/c.txt: it is a pipe, socket or device; write its text to a file first",
    ]
    with pytest.raises(FileNotFoundError, match="c.txt: no train text.*; it is a pipe"):
        find_files(tmp_path / "c.txt", "train")
    with pytest.raises(FileNotFoundError, match="; it is a link to .*gone, which does not exist"):
        find_files(tmp_path / "b.train", "train")
