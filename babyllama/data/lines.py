"""Read a text file as lines that every tokenizer accepts.

A file may be larger than memory, and so may a line: a very long one is read in pieces. Invalid
UTF-8 and NUL are repaired and counted. A file that is no UTF-8 text at all is an error that says
what it is.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

BLOCK = 1 << 18  # characters that are read at a time
LONG_LINE = 1 << 20  # characters; a longer line is read in pieces
# A compressed file may be a bomb: a few kilobytes that fill the disk. Text shrinks to a fifth.
MAX_RATIO = 200  # characters of text for each byte of the file
SAFE_CHARS = 100_000_000  # less text than this is accepted at any ratio
# how files start that are not text, whatever their names say
MAGIC = {
    b"PAR1": "a Parquet file; its name must end in .parquet",
    b"ARROW1": "an Arrow file; its name must end in .arrow",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it with: unzstd",
    b"\x1f\x8b": "compressed with gzip; its name must end in .gz",
    b"BZh": "compressed with bzip2; decompress it with: bunzip2",
    b"\xfd7zXZ": "compressed with xz; decompress it with: unxz",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"%PDF": "a PDF; convert it to text",
}
BYTE_ORDER_MARKS = {  # UTF-32's first: one of them starts like UTF-16's
    "UTF-32": (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> tuple[str, int]:
    """Return (text with U+FFFD for lone surrogates, their number); UTF-8 cannot encode them."""
    if text.isascii():  # encoding a long text would take memory
        return text, 0
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.subn("\ufffd", text)
    return text, 0


def _repair(block: str, path: Path, lines_before: int, report: dict) -> str:
    """Return a block of text without NUL, with U+FFFD for each invalid byte; count both."""
    text, invalid_bytes = replace_surrogates(block)
    if invalid_bytes and not report["first_invalid"]:
        line_number = 1 + lines_before + block.count("\n", 0, _SURROGATE.search(block).start())
        report["first_invalid"] = f"{path}: line {line_number}"
    report["invalid_bytes"] += invalid_bytes
    report["nul_removed"] += text.count("\0")
    return text.replace("\0", "")


def _check_is_text(path: Path, block: str) -> None:
    """Raise ValueError if the first block of a file shows that it is not UTF-8 text."""
    data = block.encode("utf-8", "surrogateescape")  # the bytes as they are in the file
    for magic, meaning in MAGIC.items():
        if data.startswith(magic):
            raise ValueError(f"{path} is not text but {meaning}")
    for encoding, marks in BYTE_ORDER_MARKS.items():
        if data.startswith(marks):
            raise ValueError(f"{path} is {encoding} text; convert it to UTF-8")

    nulls = data.count(0) / max(1, len(data))
    if nulls > 0.3 and len(data) >= 64:
        encoding = "UTF-32" if nulls > 0.6 else "UTF-16"
        raise ValueError(f"{path} is not UTF-8; many bytes are NUL, as in {encoding}: convert it")

    # a few invalid bytes are repaired, but not a text in another encoding
    invalid = "".join(_SURROGATE.findall(block)).encode("utf-8", "surrogateescape")
    not_ascii = len(data.translate(None, delete=bytes(range(128))))
    if len(data) >= 64 and (len(invalid) > 0.3 * len(data) or nulls > 0.05):
        raise ValueError(
            f"{path} is mostly not UTF-8; it may be binary, or text in an old encoding such as "
            "Latin-1 or cp1251: convert it with iconv"
        )
    if len(invalid) >= 16 and 1000 * len(invalid) > len(data) and 2 * len(invalid) > not_ascii:
        # only cp1252 has letters and quotes at 0x80 to 0x9F
        is_windows = any(byte < 0xA0 for byte in invalid)
        encoding = "cp1252 (Windows)" if is_windows else "Latin-1 (ISO 8859-1)"
        name = "CP1252" if is_windows else "ISO-8859-1"
        raise ValueError(
            f"{path} is not UTF-8 but probably {encoding}: {len(invalid):,} of the {not_ascii:,} "
            f"bytes beyond ASCII at its start are invalid; convert it with: "
            f"iconv -f {name} -t UTF-8"
        )


def _check_ratio(path: Path, n_characters: int, n_bytes: int) -> None:
    """Raise ValueError if more text than can be meant came out of the bytes read so far."""
    if n_characters > max(SAFE_CHARS, MAX_RATIO * n_bytes):
        raise ValueError(
            f"{path}: its text is more than {MAX_RATIO} times as large as the file, which no real "
            "text is; if it is meant, decompress it first"
        )


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
            _check_is_text(path, head + first_block)
            report["bom_removed"] += head.startswith("\ufeff")
            blocks = itertools.chain([first_block], blocks)
            for block in itertools.chain([head.removeprefix("\ufeff")], blocks):
                report["bytes_on_disk"] = bytes_before + raw.tell()
                n_characters += len(block)
                _check_ratio(path, n_characters, raw.tell())
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
