"""Text files -> documents: a stream of bounded pieces, whatever the file is like, with a count of what was repaired.

    from documents import find_files, read_documents
    for path in find_files("data/train", "train"):
        for piece in read_documents(path):
            print(piece.first, piece.last, len(piece.text))

Reads .train, .dev, .test, .txt and .jsonl files, also gzipped, of any size and with lines of any length. It cleans only
with the function that it is given.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)
READER_VERSION = (
    1  # a new number for every change of what a document or a cut is: it is part of cache keys
)
BLOCK = 1 << 18  # bytes read at a time
PIECE = 1 << 15  # characters of a document that are cleaned and tokenised in one go, at most
WIKI_DOMAINS = ("simple_wiki", "simple_wikipedia", "wikipedia")


def domain_of(path: str | os.PathLike) -> str:
    """The domain that a file's name says: "open_subtitles" for data/Open_Subtitles.train.gz."""
    return re.sub(r"(?:\.(?:train|dev|test|txt|jsonl))?(?:\.gz)?$", "", Path(path).name.lower())


def source_of(path: Path, name: str = "") -> dict:
    """What identifies a file of text: `file` (its own name unless another is given), `sha256`, `domain`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": name or path.name, "sha256": digest, "domain": domain_of(path)}


def find_files(data_dir: str | os.PathLike, split: str) -> list[Path]:
    """The input files of a split ("train"; "dev" or "validation"; "test"), sorted: data_dir is a folder or one file.

    A folder is searched to the bottom for files with the split's suffix (.train; .dev, else .test) and for .txt and
    .jsonl, each also .gz. FileNotFoundError says what was looked for and what is there.
    """
    root = Path(data_dir)
    if root.is_file():
        return [root]
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder that was visited
            folders.clear()
            continue
        seen.add(real)
        found += [
            path
            for name in names
            if not name.startswith(".") and (path := Path(folder, name)).is_file()
        ]

    def ending(*suffixes: str) -> list[Path]:
        return [path for path in found if path.name.lower().removesuffix(".gz").endswith(suffixes)]

    own = (".dev", ".test") if split in ("dev", "validation") else (f".{split}",)
    files = next((some for suffix in own if (some := ending(suffix))), []) + ending(
        ".txt", ".jsonl"
    )
    if files:
        return sorted(files)
    there = ", ".join(sorted(path.name for path in found)[:8]) or "no files"
    what = f"there: {there}" if root.is_dir() else "there is no such file or folder"
    wanted = ", ".join((*own, ".txt", ".jsonl"))
    raise FileNotFoundError(
        f"{root}: no {split} text; expected a file ending in {wanted} (or these and .gz); {what}"
    )


class Piece(NamedTuple):
    """A bounded stretch of a document; the document is the pieces from one with `first` to one with `last`, joined."""

    text: str
    first: bool
    last: bool


def new_report() -> dict:
    """The counts that reading fills in: documents, words (between blanks) and UTF-8 bytes of the text, and repairs."""
    counts = "files empty_files bytes_on_disk documents words bytes"
    repairs = "invalid_bytes nul_removed bom_removed surrogates_replaced"
    return {**dict.fromkeys(f"{counts} {repairs}".split(), 0), "first_invalid": None}


def _blocks(path: Path, report: dict) -> Iterator[str]:
    """The file as text, block by block: no byte-order mark, newlines only, U+FFFD for each byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    before = report["bytes_on_disk"]
    offset = 0
    with path.open("rb") as raw:
        source = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        while True:
            try:
                data = source.read(BLOCK)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{path}: broken gzip file after {offset} bytes of text ({error})"
                ) from None
            if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path}: this is UTF-16 text (byte 0); convert it to UTF-8")
            if offset == 0 and data.startswith(codecs.BOM_UTF8):
                report["bom_removed"] += 1
                data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
            report["bytes_on_disk"] = before + raw.tell()
            try:
                text = decoder.decode(data, not data)
            except UnicodeDecodeError as error:
                held = len(decoder.getstate()[0])
                report["first_invalid"] = (
                    report["first_invalid"] or f"{path}: byte {offset - held + error.start}"
                )
                decoder.errors = "surrogateescape"
                text, n = _SURROGATE.subn("\ufffd", decoder.decode(data, not data))
                decoder.errors = "strict"
                report["invalid_bytes"] += n
            offset += len(data)
            text = newlines.decode(text, not data)
            if "\0" in text:
                report["nul_removed"] += text.count("\0")
                text = text.replace("\0", "")
            if text:
                yield text
            if not data:
                return


_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which no UTF-8 can hold and no tokenizer takes."""
    return _SURROGATE.sub("\ufffd", text)


_LOOK_AHEAD = 400  # characters that decide whether newlines end a document
_NEXT_TITLE = r"= = = [^=\n][^\n]{0,250} = = =[ \t]*(?:\n|\Z)"
_NEXT_CUE = r"\d{1,6}[ \t]{0,9}\n[ \t]{0,9}\d\d?:\d\d:\d\d[^\n]{0,30}-->"
_END = (
    r"\n(?<!\n\n)\n*+(?:(?<=\n\n\n)(?!"
    + _NEXT_CUE
    + r")|(?=1[ \t]{0,9}\n)(?="
    + _NEXT_CUE
    + r")|(?="
    + _NEXT_TITLE
)
_DOCUMENT_END = re.compile(_END + "))")
_WIKI_END = re.compile(_END + r"| ?= (?![=\s])[^\n]{0,250}(?<![=\s]) = ?(?:\n|\Z)|<doc ))")
_LONG_GAP = re.compile(r"\n{4,}")
_BLANK_LINE = re.compile(r"(?<=\n)[ \t]++(?=\n)")
_CUTS = [re.compile(gap) for gap in (r"(?<=\S)\n\n(?=\S)", r"(?<=\S)\n(?=\S)", r"[ \n](?=\S)")]


def _spans(blocks: Iterable[str], end: re.Pattern) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends behind it), in order; `end` finds the newlines between two documents."""
    buffer = "\n"  # so that a first line of blanks is an empty line too
    for block in blocks:
        buffer += block
        if "\n " in buffer or "\n\t" in buffer:
            buffer = _BLANK_LINE.sub("", buffer)
        if "\n\n\n\n" in buffer:
            buffer = _LONG_GAP.sub("\n\n\n", buffer)
        horizon, start = len(buffer) - _LOOK_AHEAD, 0
        for match in end.finditer(buffer):
            if match.start() >= horizon:
                break
            yield buffer[start : match.start()], True
            start = match.end()
        while horizon > start and buffer[horizon - 1] == "\n":
            horizon -= 1
        horizon = max(horizon, start)
        yield buffer[start:horizon], False
        buffer = buffer[horizon:]
    *whole, rest = end.split(_BLANK_LINE.sub("", buffer + "\n"))
    yield from ((text, True) for text in whole)
    yield rest, True


def cut(text: str, start: int) -> int:
    """Where the piece from `start` on ends: in its second half before a blank line, a newline or a blank, else full.

    The GPT-2 pattern starts a new word there whatever follows, so the tokens of the pieces are those of the whole.
    """
    if len(text) - start <= PIECE:
        return len(text)
    for gap in _CUTS:
        at = 0
        for match in gap.finditer(text, start + PIECE // 2, start + PIECE):
            at = match.start()
        if at:
            return at
    return start + PIECE


def _pieces(spans: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    """Documents, newlines at their ends stripped, in pieces of at most PIECE characters."""
    held, ready, first = "", None, True
    for text, ends in spans:
        held = held + text if held or not first else text.lstrip("\n")
        start = 0
        while len(held) - start > PIECE:
            if ready is not None:
                yield Piece(ready, first, False)
                first = False
            end = cut(held, start)
            ready, start = held[start:end], end
        held = held[start:]
        if ends:
            held = held.rstrip("\n")
            if ready is not None and held:
                yield Piece(ready, first, False)
                first = False
            if ready is not None or held:
                yield Piece(held or ready.rstrip("\n"), first, True)
            held, ready, first = "", None, True


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a file without their newlines."""
    parts: list[str] = []
    for block in blocks:
        *lines, rest = block.split("\n")
        for line in lines:
            yield "".join([*parts, line])
            parts = []
        parts.append(rest)
    yield "".join(parts)


def _json_spans(blocks: Iterable[str], path: Path, report: dict) -> Iterator[tuple[str, bool]]:
    """As _spans, for a file whose lines are JSON: an object with "text" or a string, one document each."""
    for number, line in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise ValueError(f'{path}: line {number} is neither an object with "text" nor a string')
        text, n = _SURROGATE.subn("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
        report["surrogates_replaced"] += n
        report["nul_removed"] += text.count("\0")
        text = text.replace("\0", "")
        for start in range(0, len(text), BLOCK):  # not at once: cutting copies the rest
            yield text[start : start + BLOCK], False
        yield "", True


def read_documents(path: str | os.PathLike, report: dict | None = None) -> Iterator[Piece]:
    """The documents of a file, piece by piece, and in `report` (see new_report) what was found and mended.

    A document ends at two blank lines, before a title line (= = = T = = =; in wiki domains also = T = and <doc>) and
    before a subtitle numbered 1; each line of a .jsonl file is one. ValueError names a broken file and its line.
    """
    path, report = Path(path), new_report() if report is None else report
    blocks = _blocks(path, report)
    report["files"] += 1
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        spans = _json_spans(blocks, path, report)
    else:
        spans = _spans(blocks, _WIKI_END if domain_of(path) in WIKI_DOMAINS else _DOCUMENT_END)
    before, within = report["documents"], False
    for piece in _pieces(spans):
        report["documents"] += piece.first
        within &= not piece.first and bool(piece.text[:1].strip())
        report["words"] += (
            len(piece.text.split()) - within
        )  # a piece can begin within a word of more than its size
        within = bool(piece.text[-1:].strip())
        report["bytes"] += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        yield piece
    report["empty_files"] += report["documents"] == before


def clean_pieces(pieces: Iterable[Piece], cleaner: Callable[[str], str]) -> Iterator[Piece]:
    """The pieces cleaned one by one, joined by what stood at the cut; documents left empty are dropped."""
    held: Piece | None = None
    for piece in pieces:
        if piece.first:
            held, gap = None, ""
        else:
            start = piece.text[:2]
            gap = max(gap, start[: len(start) - len(start.lstrip())], key=len)
        text = cleaner(piece.text)
        if text != piece.text or not held:
            text = text.strip("\n" if text == piece.text else None)
            text = gap + text if held and text else text
        if text:
            if held:
                yield held
            held, gap = Piece(text, held is None, False), ""
        if piece.last and held:
            yield held._replace(last=True)
