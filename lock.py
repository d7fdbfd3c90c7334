"""One process at a time in a folder: two runs of one name would write into each other's files.

with alone_in(run_dir, "choose another --model_name"):
    train()
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: Path, remedy: str) -> Iterator[None]:
    """Make a folder and hold it while the block runs; ValueError, with the `remedy`, where another process holds it.

    The lock is one of the system on the directory itself: no file tells of it, and it ends with the process, however
    that ends. Where the system or the file system has no such locks, nothing is kept apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is writing there; wait for its end, or {remedy}") from None
        yield
    finally:
        os.close(place)
