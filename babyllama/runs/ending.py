"""End a run so that nobody has to guess how it ended: signals, the last line, status.json.

    with ending.catch_signals():                  # from the start of main
        with ending.recorded(run_dir, step=0) as status:  # as soon as the run directory is ours
            with ending.deferred_signals():       # a signal waits for the end of this block
                train()

A signal ends a run with exit code 128 + its number, the code that a shell shows for a process that
the signal kills. While the model trains, the run first finishes its step and saves it
(callbacks.SaveWhenInterrupted). What other errors look like is cli.run_script's part.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from babyllama import distributed
from babyllama.files import utc_now, write_json
from babyllama.runs.checkpoints import MANIFEST, checkpoints
from babyllama.runs.run_dir import METRICS_FILE, STATUS_FILE

# Ctrl-C, `kill` and job schedulers, a closed terminal, Slurm's --signal. Windows lacks the last two
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]

# received: number of the first signal, or 0. After `closed` signals do nothing: the run is ending
_state = SimpleNamespace(received=0, deferred=False, closed=False, pid=0)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message says what was saved."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


# ---- signals ------------------------------------------------------------------------------------


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
    """Raise Interrupted at the first signal, unless deferred_signals is active.

    A signal that the process ignores, as it does under nohup or in the background, stays ignored.
    Outside the main thread nothing changes, because only that one may handle signals.
    """
    vars(_state).update(received=0, deferred=False, closed=False, pid=os.getpid())
    previous_handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous_handlers[number] = signal.signal(number, _handle_signal)
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _handle_signal(number: int, frame) -> None:
    # the workers of a data loader inherit this handler; they end with the main process
    if _state.closed or os.getpid() != _state.pid:
        return
    is_first = not _state.received
    _state.received = _state.received or number
    if is_first and _state.deferred:
        notice = b"\ninterrupted: finishing and saving this step; Ctrl-C again stops at once\n"
        if distributed.is_main():
            with contextlib.suppress(OSError):
                os.write(2, notice)  # print could be interrupted in its own middle
    elif is_first or number == signal.SIGINT:
        raise Interrupted(_state.received)


def received_signal() -> int:
    """Return the number of the first signal of this run, or 0."""
    return _state.received


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Let the block finish if a signal comes, then raise Interrupted.

    Only a second signal that is Ctrl-C is not deferred: the user wants to stop at once.
    """
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    if _state.received:
        raise Interrupted(_state.received)


# ---- status.json --------------------------------------------------------------------------------


class Status:
    """Write status.json: `state`, `step`, `message`, and who wrote it when.

    Only the main process writes it. `step` is the last step that was finished.
    """

    def __init__(self, run_dir: Path, step: int = 0):
        self.run_dir = run_dir
        self.step = step

    def write(self, state: str, message: str = "") -> None:
        if not distributed.is_main():
            return
        content = {
            "state": state,
            "step": self.step,
            "message": message,
            "date": utc_now(),
            "pid": os.getpid(),
            "host": platform.node(),
        }
        write_json(self.run_dir / STATUS_FILE, content)


@contextlib.contextmanager
def recorded(run_dir: Path, step: int) -> Iterator[Status]:
    """Keep status.json true: `running` in the block, then `finished`, `preempted` or `failed`.

    A run that is killed leaves `running`, and a process number that is no longer alive. The block
    must hold the lock of the run directory, and `step` is the one that it resumes from.
    """
    status = Status(run_dir, step)
    status.write("running")
    try:
        yield status
    except BaseException as error:
        _state.closed = True
        explained = _explain(error, status)
        state = "preempted" if isinstance(explained, Interrupted) else "failed"
        if (run_dir / METRICS_FILE).is_file():  # it is written last
            state = "finished"
        lines = str(explained).splitlines() or [type(explained).__name__]
        with contextlib.suppress(OSError):  # the disk may be what failed
            status.write(state, lines[0])
        if explained is error:
            raise
        raise explained from None
    _state.closed = True
    status.write("finished")


def _explain(error: BaseException, status: Status) -> BaseException:
    """Return an error that says what happened and how to go on, or the same error if it does."""
    # BrokenPipeError: `python train.py ... | head`
    if isinstance(error, KeyboardInterrupt | BrokenPipeError):
        number = getattr(error, "number", signal.SIGINT)
        return Interrupted(number, _interrupted_message(number, status))
    if isinstance(error, RuntimeError) and distributed.is_lost_process_error(error):
        return distributed.lost_process_error(error)
    return error


def _interrupted_message(number: int, status: Status) -> str:
    """Say what was saved and how to go on; say nothing in processes other than the main one."""
    if not distributed.is_main():
        return ""
    saved = [folder for folder in checkpoints(status.run_dir) if (folder / MANIFEST).is_file()]
    remedy = "nothing was saved yet; the same command starts again"
    if (status.run_dir / METRICS_FILE).is_file():
        remedy = "the results are complete"
    elif saved:
        remedy = f"resume from {saved[0].name} with --resume-from-checkpoint auto"
    return f"interrupted by {signal.Signals(number).name} after step {status.step}; {remedy}"
