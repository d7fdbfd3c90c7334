"""Text files -> documents: a stream of bounded pieces, whatever the file is like, with a count of what was repaired.

    from documents import find_files, read_documents
    for path in find_files("data/train", "train"):
        for piece in read_documents(path):
            print(piece.first, piece.last, len(piece.text))

Reads .train, .dev, .test, .txt and .jsonl files, also gzipped, of any size and with lines of any length. A document
begins at a wiki title line, where a subtitle numbering starts again at 1, and after two blank lines. It cleans nothing.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PIECE_CHARS = 32_768  # a longer document comes in pieces of about this size
READ_BYTES = 65_536
SPLIT_SUFFIXES = {"train": (".train",), "dev": (".dev", ".test"), "validation": (".dev", ".test")}
COMMON_SUFFIXES = (".txt", ".jsonl")
_TITLE = re.compile(r" ?= (?:[^\s=]|[^\s=][^\n]*[^\s=]) = ?$|= = = [^\n]+ = = =[ \t]*$")
_CUE = re.compile(r"\d{1,2}:\d{2}:\d{2}[,.]\d{1,3} ?-->")


class Piece(NamedTuple):
    """A part of a document: the pieces from one with `first` to one with `last` join to its text."""

    text: str
    first: bool
    last: bool


def new_report() -> dict[str, Any]:
    """Counts that the reader adds to; bytes and words are those of the documents' text."""
    names = "files documents words bytes invalid_bytes nul_removed bom_removed surrogates_replaced empty_files"
    return dict.fromkeys(names.split(), 0)


def domain_of(path: str | Path) -> str:
    """The domain that a file's name states: "data/open_subtitles.train.gz" -> "open_subtitles"."""
    return Path(path).name.split(".")[0]


def find_files(data_dir: str | Path, split: str) -> list[Path]:
    """The text files of a split, sorted: a directory's .train (or .dev, else .test), .txt and .jsonl files, also .gz.

    `data_dir` may be one file. FileNotFoundError says what was looked for and what is there.
    """
    root = Path(data_dir)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory")
    files = []
    for folder, folders, names in os.walk(root):  # does not follow links to directories
        folders.sort()
        files += [Path(folder, name) for name in names if Path(folder, name).is_file()]

    def of(suffix: str) -> list[Path]:
        return [path for path in files if path.name.removesuffix(".gz").endswith(suffix)]

    own = next((found for suffix in SPLIT_SUFFIXES.get(split, (f".{split}",)) if (found := of(suffix))), [])
    found = sorted({*own, *(path for suffix in COMMON_SUFFIXES for path in of(suffix))})
    if not found:
        wanted = ", ".join(dict.fromkeys((*SPLIT_SUFFIXES.get(split, (f".{split}",)), *COMMON_SUFFIXES)))
        there = ", ".join(sorted({path.suffix or path.name for path in files})[:8]) or "nothing"
        raise FileNotFoundError(f"{root}: no text of the {split} split: looked for {wanted} (also .gz), found {there}")
    return found


def _decode(data: bytes, offset: int, final: bool, report: dict) -> tuple[str, bytes]:
    """(text, bytes left over) of a block: invalid bytes become U+FFFD and are counted, with the first one's place."""
    parts = []
    while True:
        try:
            return "".join([*parts, data.decode("utf-8")]), b""
        except UnicodeDecodeError as error:
            parts.append(data[: error.start].decode("utf-8"))
            if not final and error.end == len(data) and error.reason == "unexpected end of data":
                return "".join(parts), data[error.start :]
            report["invalid_bytes"] += error.end - error.start
            report.setdefault("first_invalid", f"byte {offset + error.start}")
            parts.append("\ufffd")
            offset, data = offset + error.end, data[error.end :]


def _blocks(path: Path, report: dict) -> Iterator[str]:
    """The text of a file in blocks: without BOM and NUL, line ends as newlines."""
    rest, carriage, offset = b"", "", 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while True:
            try:
                data = file.read(READ_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path}: not a whole gzip file: {error}") from None
            if offset == 0 and not rest and data.startswith(b"\xef\xbb\xbf"):
                report["bom_removed"] += 1
                offset, data = 3, data[3:]
            text, rest_after = _decode(rest + data, offset - len(rest), not data, report)
            offset, rest = offset + len(data), rest_after
            if "\0" in text:
                report["nul_removed"] += text.count("\0")
                text = text.replace("\0", "")
            text, carriage = carriage + text, ""
            if "\r" in text:
                if text.endswith("\r") and data:
                    text, carriage = text[:-1], "\r"
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield text
            if not data:
                return


def _split_lines(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(line without its newline, True); a very long line comes in parts, cut before a blank, the later with False."""
    tail, starts = "", True
    for block in blocks:
        *lines, tail = (tail + block).split("\n")
        for line in lines:
            yield line, starts
            starts = True
        while len(tail) > PIECE_CHARS:
            cut = tail.rfind(" ", PIECE_CHARS // 2, PIECE_CHARS)
            cut = cut if cut > 0 else PIECE_CHARS
            yield tail[:cut], starts
            tail, starts = tail[cut:], False
    if tail:
        yield tail, starts


class _Assembler:
    """Lines in, pieces out. A piece ends after a whole run of newlines, so that piecewise tokens are the document's."""

    def __init__(self):
        self.parts, self.size, self.blank, self.first = [], 0, 0, True

    def line(self, text: str, starts: bool = True) -> Piece | None:
        """Add a line, or the next part of a long one; returns the piece before it where that is long enough."""
        if not text or text.isspace():
            self.blank += starts
            return None
        piece, joint = None, ""
        if self.parts:
            joint = "\n" * (1 + min(self.blank, 1)) if starts else ""
            if self.size >= PIECE_CHARS and (self.blank or not starts or self.size >= 2 * PIECE_CHARS):
                piece = Piece("".join([*self.parts, joint]), self.first, False)
                self.parts, self.size, self.first, joint = [], 0, False, ""
        self.parts += [joint, text]
        self.size += len(text) + 1
        self.blank = 0
        return piece

    def end(self) -> Piece | None:
        """The last piece of the document, or None where it has no text."""
        piece = Piece("".join(self.parts), self.first, True) if self.parts else None
        self.__init__()
        return piece


def _documents(lines: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    """Cut lines into documents: at a title line, where a subtitle numbering starts again, and at two blank lines."""
    out, one = _Assembler(), False  # one: a line "1" is held back until it is known whether a timing follows
    for line, starts in lines:
        begins = out.blank >= 2 and bool(line) and not line.isspace()
        if starts and (line[:1] == "=" or line[:2] == " =") and _TITLE.match(line):
            begins = True
        pieces = []
        if one:
            if _CUE.match(line):
                pieces.append(out.end())
            pieces.append(out.line("1"))
            one = False
        if begins:
            pieces.append(out.end())
        if starts and line.rstrip() == "1":
            one = True
        else:
            pieces.append(out.line(line, starts))
        yield from filter(None, pieces)
    yield from filter(None, ([out.line("1")] if one else []) + [out.end()])


def _json_documents(path: Path, report: dict) -> Iterator[Piece]:
    """One document for each line of a .jsonl file: an object with "text", or a string."""
    pending = ""
    number = 0
    for part, starts in _split_lines(_blocks(path, report)):
        if starts and pending.strip():
            number += 1
            yield from _json_document(path, number, pending, report)
        pending = part if starts else pending + part
    if pending.strip():
        yield from _json_document(path, number + 1, pending, report)


def _json_document(path: Path, number: int, line: str, report: dict) -> Iterator[Piece]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: row {number} is not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f'{path}: row {number} needs a string or an object with a string "text"')
    if re.search("[\ud800-\udfff]", text):
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        report["surrogates_replaced"] += whole.count("\ufffd") - text.count("\ufffd")
        text = whole
    out = _Assembler()
    for part, starts in _split_lines([text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")]):
        if piece := out.line(part, starts):
            yield piece
    if piece := out.end():
        yield piece


def read_documents(path: str | Path, report: dict | None = None) -> Iterator[Piece]:
    """Stream the documents of a text file as pieces; adds to `report` (see new_report) what was read and repaired."""
    path, report = Path(path), new_report() if report is None else report
    report["files"] += 1
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    before = report["documents"]
    pieces = _json_documents(path, report) if is_json else _documents(_split_lines(_blocks(path, report)))
    for piece in pieces:
        report["documents"] += piece.first
        report["words"] += len(piece.text.split())
        report["bytes"] += len(piece.text.encode("utf-8"))
        yield piece
    report["empty_files"] += report["documents"] == before
    if place := report.pop("first_invalid", None):
        report.setdefault("invalid_bytes_at", f"{path}: {place}")


def clean_documents(path: str | Path, cleaner: Callable[[str], str], report: dict | None = None) -> Iterator[Piece]:
    """read_documents with `cleaner` applied to every piece; documents that it leaves nothing of are dropped."""
    out = _Assembler()
    for piece in read_documents(path, report):
        for line, starts in _split_lines([cleaner(piece.text) + ("" if piece.last else "\n")]):
            if done := out.line(line, starts):
                yield done
        if piece.last and (done := out.end()):
            yield done
