"""Ctrl-C and SIGTERM while a run trains: the step that runs is finished and saved, so that nothing is lost.

    with saved_when_interrupted(trainer):
        trainer.train()  # the first signal raises KeyboardInterrupt after a checkpoint, a second one at once

Several processes cannot agree at which step a signal reached them: there it ends all at once, as it does by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _SaveAndStop(TrainerCallback):
    def __init__(self):
        self.asked, self.process = False, os.getpid()

    def hear(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)  # a second one does not wait
        if os.getpid() == self.process:  # not one that loads batches
            print("\ninterrupted: the step is finished and saved; again to stop at once", file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_log = control.should_save = True  # the row has the clock of the checkpoint

    def on_save(self, args, state, control, **kwargs):
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def saved_when_interrupted(trainer) -> Iterator[None]:
    """See above; in other threads than the main one, which hear no signals, it changes nothing."""
    if ranks.count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop, before = _SaveAndStop(), {number: signal.getsignal(number) for number in SIGNALS}
    trainer.add_callback(stop)
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:  # what runs in the background ignores Ctrl-C
        signal.signal(number, stop.hear)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
        trainer.remove_callback(stop)
