"""Run train.py in forked children, and send them signals at a given place.

A fork costs seconds less than a new Python, which would have to import torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import train
from babyllama.runs.ending import SIGNALS


def start_child(arguments: list[str], errors: Path, prepare: Callable = lambda: None) -> int:
    """Train in a forked child, after `prepare`, with stderr in a file; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for number in SIGNALS:  # pytest may run in the background, where SIGINT is ignored
            signal.signal(number, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        sys.stderr = errors.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prepare()
        code = train.main(arguments)
    finally:
        os._exit(code)


def run_in_child(
    arguments: list[str], folder: Path, prepare: Callable = lambda: None
) -> tuple[int, list[str]]:
    """Train in a forked child; return its exit code and its lines on stderr."""
    errors = folder / "stderr"
    pid = start_child(arguments, errors, prepare)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, errors.read_text().splitlines()


class Fork:
    """Take the place of subprocess.Popen for the command `python train.py ...`."""

    def __init__(self, command: list[str], env: dict[str, str], **options):
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            os.environ.update(env)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            code = train.main(command[2:])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def acting_before(original: Callable, act: Callable[[], None], call: int = 1) -> Callable:
    """Return the function, which calls `act` at the start of its n-th call."""
    calls = 0

    def function(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*args, **kwargs)

    return function


def signal_before(target, name: str, number: int, call: int = 1) -> None:
    """Make this process send itself a signal in the n-th call of a function."""
    function = acting_before(getattr(target, name), lambda: os.kill(os.getpid(), number), call)
    setattr(target, name, function)
