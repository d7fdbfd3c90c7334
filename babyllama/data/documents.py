"""Split text files into documents.

    for path in find_files("data/train", "train"):
        for document in read_documents(path):
            text = "".join(document)

Reads .train, .dev, .valid, .test, .txt and .jsonl files, gzipped or not, and the `text` column of
.parquet files and of the .arrow files that `datasets` saves. Files and documents may be larger than
memory: a document is an iterator over parts of its text. Cleaning is left to the caller, who can
pass a function from cleaners.py.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path

from babyllama.data.text_check import SURROGATE, check_is_text, check_ratio
from babyllama.data.text_files import TABLES, domain_of

# It is part of cache keys: increase it when documents start or texts are cut at other places.
READER_VERSION = 3
BLOCK = 1 << 18  # characters that are read at a time
LONG_LINE = 1 << 20  # characters; a longer line is read in pieces
TABLE_ROWS = 256  # rows of a table that are read at a time
LINE_CHARS = 200  # rows whose median is at most as long can be lines of a text
PART = 1 << 15  # characters of a document that are cleaned or tokenized at a time
WIKI_DOMAINS = ("simple_wiki", "simple_wikipedia", "wikipedia")


def new_report() -> dict:
    """Return a report with all counts at zero; reading a file adds to it.

    documents, words (separated by white space) and bytes (UTF-8) describe the text that was read,
    and bytes_on_disk the files, which may be compressed. rows_joined counts the rows of tables that
    are lines of documents. The other counts are repairs.
    """
    counts = ["files", "empty_files", "bytes_on_disk", "documents", "words", "bytes", "rows_joined"]
    repairs = ["invalid_bytes", "nul_removed", "bom_removed", "surrogates_replaced"]
    return {**dict.fromkeys(counts + repairs, 0), "first_invalid": None}


def rows_joined_text(report: dict) -> str:
    """Return the sentence that says that rows of tables were read as lines."""
    return (
        f"{report['rows_joined']:,} rows of tables look like lines, not documents; they were "
        "joined, and a document starts after a blank row or at a title; prepare_data.py "
        "--one-document-per-row keeps them apart"
    )


# ---- from bytes to lines ------------------------------------------------------------------------


def replace_surrogates(text: str) -> tuple[str, int]:
    """Return (text with U+FFFD for lone surrogates, their number); UTF-8 cannot encode them."""
    if text.isascii():  # encoding a long text would take memory
        return text, 0
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATE.subn("\ufffd", text)
    return text, 0


def _repair(block: str, path: Path, lines_before: int, report: dict) -> str:
    """Return a block of text without NUL, with U+FFFD for each invalid byte; count both."""
    text, invalid_bytes = replace_surrogates(block)
    if invalid_bytes and not report["first_invalid"]:
        line_number = 1 + lines_before + block.count("\n", 0, SURROGATE.search(block).start())
        report["first_invalid"] = f"{path}: line {line_number}"
    report["invalid_bytes"] += invalid_bytes
    report["nul_removed"] += text.count("\0")
    return text.replace("\0", "")


def read_lines(path: Path, report: dict) -> Iterator[str]:
    """Yield the repaired lines of a file, each with a newline at its end.

    Some corpora keep a whole book on one line. A line that long comes in several strings, cut after
    a space if there is one, and only the last of them ends in a newline.
    """
    bytes_before = report["bytes_on_disk"]
    lines_before = 0
    n_characters = 0
    line_start = ""  # of the line that the next block continues
    with path.open("rb") as raw:
        data = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        # this error handler turns each invalid byte into one surrogate, so that they can be counted
        file = io.TextIOWrapper(data, encoding="utf-8", errors="surrogateescape", newline=None)
        try:
            head = file.read(2)
            blocks = iter(partial(file.read, BLOCK), "")
            first_block = next(blocks, "")
            check_is_text(path, head + first_block)
            report["bom_removed"] += head.startswith("\ufeff")
            blocks = itertools.chain([first_block], blocks)
            for block in itertools.chain([head.removeprefix("\ufeff")], blocks):
                report["bytes_on_disk"] = bytes_before + raw.tell()
                n_characters += len(block)
                check_ratio(path, n_characters, raw.tell())
                text = _repair(block, path, lines_before, report)
                lines_before += block.count("\n")
                *lines, line_start = (line_start + text).split("\n")
                for line in lines:
                    yield line + "\n"
                if len(line_start) >= LONG_LINE:
                    end = line_start.rfind(" ") + 1 or len(line_start)
                    yield line_start[:end]
                    line_start = line_start[end:]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: broken gzip file ({error})") from None
    if line_start:
        yield line_start + "\n"


# ---- from lines to bounded parts ----------------------------------------------------------------

# A text may be cut before a blank line, a newline or a space: the GPT-2 pattern starts a new word
# there whatever follows, so the parts together have the same tokens as the text at once.
_CUTS = [re.compile(cut) for cut in (r"(?<=\S)\n\n(?=\S)", r"(?<=\S)\n(?=\S)", r"[ \n](?=\S)")]


def _part_end(text: str, start: int) -> int:
    """Return the end of the part that begins at `start`: the last good cut in its second half."""
    for cut in _CUTS:
        ends = [match.start() for match in cut.finditer(text, start + PART // 2, start + PART)]
        if ends:
            return ends[-1]
    return start + PART


def text_parts(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the text of a document in parts of at most PART characters, with the same tokens."""
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > PART:
            start = 0
            while len(text) - start > PART:
                end = _part_end(text, start)
                yield text[start:end]
                start = end
            text = text[start:]
    if text:
        yield text


def _counted(parts: Iterable[str], report: dict) -> Iterator[str]:
    """Yield the parts of a document, and add their words and bytes to the report."""
    splits_word = False  # the last part ended in the middle of a word
    for part in parts:
        report["words"] += len(part.split()) - (splits_word and not part[0].isspace())
        report["bytes"] += len(part.encode())
        splits_word = not part[-1].isspace()
        yield part


def clean_parts(parts: Iterable[str], cleaner: Callable[[str], str]) -> Iterator[str]:
    """Yield the cleaned parts of a document, or nothing if cleaning leaves no text.

    Each part is cleaned without the others. Cleaners strip the white space at both ends of a text,
    so the white space at the cuts is put back.
    """
    is_first = True
    gap = ""  # the white space between the last cleaned part and the next
    for part in parts:
        white_space = part[: len(part) - len(part.lstrip())]
        gap = max(gap, white_space, key=len)
        text = cleaner(part).strip()
        if text:
            yield text if is_first else gap + text
            is_first = False
            gap = ""


# ---- from lines to documents --------------------------------------------------------------------

_TITLE = re.compile(r"= = = [^=\n].{0,250} = = =[ \t]*\n")  # fixed lengths: a title is short
_WIKI_TITLE = re.compile(r" ?= [^=\s](?:.{0,248}[^=\s])? = ?\n|<doc ")
_CUE_NUMBER = re.compile(r"(\d{1,6})[ \t]{0,9}\n")
_CUE_TIME = re.compile(r"[ \t]{0,9}\d\d?:\d\d:\d\d.{0,30}-->")


def _starts_document(line: str, next_line: str, blank_lines: int, is_wiki: bool) -> bool:
    """Return True if a document starts at `line`, given the number of blank lines before it."""
    # a subtitle is a line with its number, a line with its times, and lines of text
    if "-->" in next_line and _CUE_TIME.match(next_line):
        cue = _CUE_NUMBER.fullmatch(line)
        if cue:
            return cue[1] == "1"
    if blank_lines >= 2 or _TITLE.fullmatch(line):
        return True
    return is_wiki and bool(_WIKI_TITLE.match(line))


def _number_lines(lines: Iterable[str], is_wiki: bool) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, each with the number of the document it belongs to.

    A line starts with the newlines that separate it from the previous line of its document. At most
    three of them are kept, which is two empty lines. A line of spaces and tabs counts as empty.
    """
    number = 0
    newlines = "\n"  # before the next line; empty in the middle of a long line
    for line, next_line in itertools.pairwise(itertools.chain(lines, [""])):
        at_line_start = newlines != ""
        if at_line_start and line.strip(" \t") == "\n":
            newlines += "\n"
            continue
        blank_lines = len(newlines) - 1
        starts = at_line_start and _starts_document(line, next_line, blank_lines, is_wiki)
        if starts or number == 0:
            number += 1
            newlines = ""
        text = line.removesuffix("\n")
        yield number, newlines[:3] + text
        newlines = line[len(text) :]


def _repair_record(text: str, report: dict) -> str:
    """Return the text of a record without what no tokenizer accepts; count the repairs."""
    text, surrogates = replace_surrogates(text)
    report["surrogates_replaced"] += surrogates
    report["nul_removed"] += text.count("\0")
    return text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n").strip("\n")


def _number_json_lines(lines: Iterable[str], path: Path, report: dict) -> Iterator[tuple[int, str]]:
    """Yield the texts in a .jsonl file that are not empty, each with the number of its document."""
    record = ""
    number = 0
    for line in lines:
        record += line
        if not line.endswith("\n"):  # the rest of a long line follows
            continue
        number += 1
        text = "" if record.isspace() else _record_text(record, path, number, report)
        record = ""  # a long one takes memory
        if text:
            yield number, text


def _record_text(record: str, path: Path, number: int, report: dict) -> str:
    """Return the text of one line of JSON, which is an object with "text" or a string."""
    try:
        value = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f'{path}: line {number} is neither an object with "text" nor a string')
    return _repair_record(text, report)


# ---- from tables to documents -------------------------------------------------------------------


def _number_rows(path: Path, report: dict, one_per_row: bool) -> Iterator[tuple[int, str]]:
    """Yield the texts of a table that are not empty, with the number of their document.

    Each row is a document, unless the rows look like lines of a text, as in WikiText's tables, and
    `one_per_row` is False: then a document starts after a blank row, or, if there are titles
    (= T =), at a title.
    """
    rows = _read_rows(path, report)
    first_texts = list(itertools.islice(rows, TABLE_ROWS))
    texts = itertools.chain(first_texts, rows)
    if not one_per_row and _are_lines(first_texts):
        has_titles = any(_WIKI_TITLE.match(text + "\n") for text in first_texts)
        lines = _lines_of_rows(texts, "\n" if has_titles else "\n\n", report)
        yield from _number_lines(lines, has_titles)
        return
    for number, text in enumerate(texts, 1):
        if text:
            yield number, text


def _are_lines(texts: list[str]) -> bool:
    """Return True if the rows of a table are lines of a text, not documents.

    They are if no row has two lines, and if at least half of them are short or a tenth are blank.
    """
    lengths = sorted(len(text) for text in texts if text.strip())
    if not lengths or any("\n" in text for text in texts):
        return False
    n_blank = len(texts) - len(lengths)
    return lengths[len(lengths) // 2] <= LINE_CHARS or 10 * n_blank >= len(texts)


def _lines_of_rows(texts: Iterable[str], blank: str, report: dict) -> Iterator[str]:
    """Yield the lines of rows that are lines of a text, with `blank` for a blank row."""
    for text in texts:
        report["rows_joined"] += 1
        if text.strip():
            yield from io.StringIO(text + "\n", newline="\n")
        else:
            yield from blank


def _read_rows(path: Path, report: dict) -> Iterator[str]:
    """Yield the repaired text of each row of a .parquet or .arrow file."""
    import pyarrow
    from pyarrow import ipc, parquet

    report["bytes_on_disk"] += path.stat().st_size
    # both formats are read a few rows at a time
    try:
        if path.suffix.lower() == ".parquet":
            table = parquet.ParquetFile(path)
            names = table.schema_arrow.names
            batches = table.iter_batches(TABLE_ROWS, columns=["text"])
        else:
            batches = ipc.open_stream(pyarrow.memory_map(str(path)))
            names = batches.schema.names
        if "text" not in names:
            raise ValueError(f"{path} has no column text; its columns are {', '.join(names)}")
        number = 0
        for batch in batches:
            for value in batch.column("text"):
                number += 1
                text = value.as_py()
                if not isinstance(text, str):
                    raise ValueError(f"{path}: row {number} has no text, but {text!r}")
                yield _repair_record(text, report)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


# ---- from a file to documents -------------------------------------------------------------------


def read_documents(
    path: str | os.PathLike,
    report: dict | None = None,
    cleaner: Callable[[str], str] | None = None,
    domain: str | None = None,
    one_per_row: bool = False,
) -> Iterator[Iterator[str]]:
    """Yield the documents of a file, each as an iterator over the parts of its text.

    Nothing is kept in memory, so read a document before you ask for the next one. In a text file a
    new document starts after two empty lines, at a title (= = = T = = =; in wiki domains also = T =
    and <doc>) and at a subtitle numbered 1. In a .jsonl file each line is a document, and in a
    table each row, unless its rows look like lines (see _number_rows) and `one_per_row` is False. A
    file is read as wiki text if its name or `domain` is a wiki domain.

    A `cleaner` is applied to each part; a document that has no text left is dropped. The counts of
    what was read, before cleaning, are added to `report` (see new_report). Raise ValueError if the
    file is broken.
    """
    path = Path(path)
    report = new_report() if report is None else report
    documents_before = report["documents"]
    report["files"] += 1

    # the text of the file in pieces, each with the number of its document
    name = path.name.lower()
    if name.endswith(TABLES):
        numbered_pieces = _number_rows(path, report, one_per_row)
    elif name.removesuffix(".gz").endswith(".jsonl"):
        numbered_pieces = _number_json_lines(read_lines(path, report), path, report)
    else:
        is_wiki = domain in WIKI_DOMAINS or domain_of(path) in WIKI_DOMAINS
        numbered_pieces = _number_lines(read_lines(path, report), is_wiki)

    # the documents; asking for the first part shows if cleaning left any text
    for _, document in itertools.groupby(numbered_pieces, key=itemgetter(0)):
        report["documents"] += 1
        parts = _counted(text_parts(map(itemgetter(1), document)), report)
        if cleaner:
            parts = clean_parts(parts, cleaner)
        first_part = next(parts, None)
        if first_part is not None:
            yield itertools.chain([first_part], parts)
    report["empty_files"] += report["documents"] == documents_before


def read_parts(path: str | os.PathLike, report: dict | None = None) -> Iterator[str]:
    """Yield the text of all documents of a file in parts."""
    return itertools.chain.from_iterable(read_documents(path, report))
