"""What a run tells while it trains: a progress bar with the time left, lines of the log, and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from babyllama.device import peak_memory_gb, reset_peak_memory
from babyllama.training import distributed

log = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """A progress bar with the time left, and metrics.jsonl: one strict JSON object for each row of the log.

    The clock runs while steps run and stands still while the model is evaluated or saved.
    """

    def __init__(
        self, path: Path, words_per_token: float, flops_per_token: float, matmul_flops: float
    ):
        """`matmul_flops` per second is what the machine reaches in bare products of matrices."""
        self.path, self.rows, self.bar = path, [], None
        self.words_per_token, self.share_per_speed = words_per_token, flops_per_token / matmul_flops
        self.seconds, self.tokens, self.clock = 0.0, 0, None
        self.logged_seconds, self.logged_tokens = 0.0, 0
        self.untimed_steps = self.untimed_tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        reset_peak_memory(args.device)
        if (
            state.global_step and self.path.is_file()
        ):  # resumed: rows after the checkpoint will be written anew
            self.rows = [row for row in _whole_rows(self.path) if row["step"] <= state.global_step]
        with self.path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
        self.tokens = self.logged_tokens = state.num_input_tokens_seen
        last = self.rows[-1] if self.rows else {"seconds": 0.0, "tokens": 0, "step": 0}
        self.seconds = self.logged_seconds = last["seconds"]
        # of a log that was torn or taken away: what was seen in a time that is not known counts in no speed
        self.untimed_steps, self.untimed_tokens = (
            state.global_step - last["step"],
            self.tokens - last["tokens"],
        )
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.clock is None:
            self.clock = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)
        if control.should_log or control.should_evaluate or control.should_save:
            self._stop_clock(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_clock(state)

    def _stop_clock(self, state) -> None:
        if self.clock is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.clock
            self.clock, self.tokens = None, state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not {"loss", "eval_loss"} & set(logs or ()):
            return
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "tokens": state.num_input_tokens_seen,
        }
        if "loss" in logs and self.seconds > self.logged_seconds:
            speed = (self.tokens - self.logged_tokens) / (self.seconds - self.logged_seconds)
            step_seconds = self.seconds / (state.global_step - self.untimed_steps)
            row |= {
                "tokens_per_second": speed,
                "words_per_second": speed * self.words_per_token,
                "matmul_share": speed * self.share_per_speed,
                "memory_gb": round(peak_memory_gb(args.device), 3),
                "seconds_left": round(step_seconds * (state.max_steps - state.global_step), 1),
            }
            self.logged_tokens, self.logged_seconds = self.tokens, self.seconds
        row["seconds"] = round(self.seconds, 3)
        row |= {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
        if not math.isfinite(row.get("grad_norm", 0.0)):  # a step that fp16's loss scaler skipped
            row["grad_norm"] = None
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        if "eval_loss" in row:
            line = (
                f"step {row['step']:>6}  held-out loss {row['eval_loss']:.4f}  perplexity {row['eval_perplexity']:.2f}"
                f"  bits per byte {row['eval_bits_per_byte']:.4f}"
            )
            line += "".join(f"\n    {sample!r}" for sample in row["samples"])
        else:
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            speed = (
                f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
            )
            line = f"step {row['step']:>6}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  {speed}"
        tqdm.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run, evaluation and saving left out."""
        return (self.tokens - self.untimed_tokens) / self.seconds


def _whole_rows(path: Path) -> Iterator[dict]:
    """The rows of a log, up to where one was not written to its end."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _SaveAndStop(TrainerCallback):
    def __init__(self):
        self.asked, self.process = False, os.getpid()

    def hear(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)  # a second one does not wait
        if os.getpid() == self.process:  # not one that loads batches
            print(
                "\ninterrupted: the step is finished and saved; again to stop at once",
                file=sys.stderr,
                flush=True,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_log = control.should_save = (
                True  # the row has the clock of the checkpoint
            )

    def on_save(self, args, state, control, **kwargs):
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def save_when_interrupted(trainer) -> Iterator[None]:
    """See above; in other threads than the main one, which hear no signals, it changes nothing."""
    if distributed.world_size() > 1 or threading.current_thread() is not threading.main_thread():
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


def prepare_wandb(config: dict) -> None:
    """Check that wandb is installed, and keep it from asking for a login: without a key it logs to files."""
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "logging.wandb: true, but the wandb package is not installed: pip install wandb"
        )
    os.environ["WANDB_PROJECT"] = config["logging"]["project"]
    keys = Path.home() / ".netrc"
    logged_in = os.environ.get("WANDB_API_KEY") or (
        keys.is_file() and "wandb" in keys.read_text(errors="replace")
    )
    if not logged_in and "WANDB_MODE" not in os.environ:
        os.environ["WANDB_MODE"] = "offline"
        log.warning(
            "wandb: no key on this machine: the log stays on disk (wandb sync sends it later)"
        )
