"""Find the text files of a split by their names, which also give their domains.

    find_files("data", "train")  # [Path("data/childes.train"), ...]
    domain_of("data/childes.train")  # "childes"

documents.py reads the files.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from babyllama.files import sha256

logger = logging.getLogger(__name__)
TABLES = (".parquet", ".arrow")
SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}
_NAME = re.compile(
    r"(?s)(?P<domain>.+?)(?:-\d+-of-\d+(?:-[0-9a-f]{16})?)?"
    r"(?:\.(?P<split>train|dev|valid|validation|test))?"
    r"(?:\.(?:txt|jsonl|parquet|arrow))?(?:\.gz)?"
)


def domain_of(path: str | os.PathLike) -> str:
    """Return the domain in a file's name: "childes" for data/CHILDES.train.txt.gz.

    BabyLM's files were called childes.train until 2025 and childes.train.txt in 2026. A saved
    dataset has tables called data or like their split; their domain is the nearest folder that is
    called neither.
    """
    name = Path(path).name.lower()
    domain = file_domain = _NAME.fullmatch(name)["domain"]
    if name.endswith(TABLES):
        folders = iter(Path(path).absolute().parents)
        while domain in (*SPLITS, "data"):
            domain = next(folders).name.lower()
    return domain or file_domain


def _split_of(path: Path) -> str | None:
    """Return the split in a file's name or, for a table, in its folder's; None if it has none."""
    name = path.name.lower()
    split = _NAME.fullmatch(name)["split"]
    if split is None and name.endswith(TABLES):
        words = (re.split("[-.]", name)[0], path.parent.name.lower())
        split = next(filter(SPLITS.get, words), None)
    return SPLITS.get(split)


def source_of(path: Path, name: str = "") -> dict:
    """Return what identifies a text file in a report: its name (or `name`), hash and domain."""
    return {"file": name or path.name, "sha256": sha256(path), "domain": domain_of(path)}


def find_files(data_dir: str | os.PathLike, split: str) -> list[Path]:
    """Return the input files of a split in sorted order; `data_dir` is a folder or a single file.

    A folder is searched with its subfolders. Files of the split have its suffix (.train for
    "train"; for "dev" and "validation" .dev, .valid or .validation, or .test if there are none),
    perhaps before .txt or .jsonl, with or without .gz. Other .txt and .jsonl files and tables
    belong to every split. Files that `datasets` caches beside a saved dataset are not input. Raise
    FileNotFoundError if no files are left.
    """
    root = Path(data_dir)
    if root.is_file():
        return [root]

    # group the input files by the split in their name
    candidates = list(_walk(root))
    any_text = (".txt", ".jsonl", *TABLES)
    endings = (*(f".{name}" for name in SPLITS), *any_text)
    splits = ["dev", "test"] if split in ("dev", "validation") else [split]
    files_of: dict[str | None, list[Path]] = {}
    for path in candidates:
        name = path.name.lower().removesuffix(".gz")
        is_cache = name.startswith("cache-") and name.endswith(".arrow")
        if is_cache or not name.endswith(endings):
            continue
        file_split = _split_of(path)
        if path.is_file():
            files_of.setdefault(file_split, []).append(path)
        elif file_split in (*splits, None):
            logger.warning("skipping %s: it is %s", path, _not_a_file(path))

    # take the first of the splits that has files, and the files of no split
    files = next(filter(None, map(files_of.get, splits)), []) + files_of.get(None, [])
    if files:
        return sorted(files)

    # say what is there instead
    if root.is_dir():
        names = sorted(path.name for path in candidates)
        content = f"the folder has {', '.join(names[:8]) or 'no files'}"
    elif os.path.lexists(root):
        content = f"it is {_not_a_file(root)}"
    else:
        content = "there is no such file or folder"
    split_endings = [f".{name}" for name in SPLITS if SPLITS[name] in splits]
    expected = ", ".join([*split_endings, *any_text])
    raise FileNotFoundError(
        f"{root}: no {split} text; expected a file ending in {expected}, or these and .gz; "
        f"{content}"
    )


def _not_a_file(path: Path) -> str:
    """Return what a path is that exists, but is neither a file nor a folder."""
    if path.exists():
        return "a pipe, socket or device; write its text to a file first"
    return f"a link to {os.readlink(path)}, which does not exist"


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files under a folder, following links but skipping hidden names.

    Hidden folders matter because an interrupted atomic_write can leave one with half of a text.
    Links can form a loop, so each folder is searched once.
    """
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(folder, name)
