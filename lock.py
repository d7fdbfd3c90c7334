"""One process at a time in a folder: two runs of one name would write into each other's files.

    with alone_in(run_dir, "choose another --model_name"):
        train()

It keeps apart the processes of one machine.
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

    What it made goes again if it stayed empty. The lock is one of the system on the directory itself: no file tells of
    it, and it ends with the process, however that ends. Where there are no such locks, nothing is kept apart.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise ValueError(f"{folder}: another process is writing there; wait for its end, or {remedy}") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)  # a process that was forked meanwhile may have it open as well
        os.close(place)
