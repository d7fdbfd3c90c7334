"""Refuse files that are not UTF-8 text, or that hold far too much of it for their size.

A few invalid bytes are not a reason to refuse a file: documents.py repairs them.
"""

from __future__ import annotations

import re
from pathlib import Path

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
SURROGATE = re.compile("[\ud800-\udfff]")  # what reading makes of an invalid byte


def check_is_text(path: Path, block: str) -> None:
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
    invalid = "".join(SURROGATE.findall(block)).encode("utf-8", "surrogateescape")
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


def check_ratio(path: Path, n_characters: int, n_bytes: int) -> None:
    """Raise ValueError if far more text came out than bytes were read (a gzip bomb)."""
    if n_characters > max(SAFE_CHARS, MAX_RATIO * n_bytes):
        raise ValueError(
            f"{path}: its text is more than {MAX_RATIO} times as large as the file, which no real "
            "text is; if it really is text, decompress it first"
        )
