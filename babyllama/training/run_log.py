"""Report the progress of a run while it trains, in metrics.jsonl and on the terminal.

run_log = RunLog(run_dir / "metrics.jsonl", words_per_token, flops_per_token, matmul_flops)
trainer = LMTrainer(..., callbacks=[run_log])
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from babyllama.device import peak_memory_gb, reset_peak_memory
from babyllama.files import write_text
from babyllama.runs.resume import changes_at
from babyllama.runs.run_dir import BENCHMARK_PREFIX


class RunLog(TrainerCallback):
    """Show a progress bar with the time left, and log to metrics.jsonl, one JSON object per line.

    The clock stops while the model is evaluated or saved, so that the speed is that of training
    alone. After a resume, `seconds` and `tokens` continue from the log, so they always describe the
    complete run. Each row is also sent to the `trackers` (tracking.py).
    """

    def __init__(
        self,
        path: Path,
        words_per_token: float,
        flops_per_token: float,
        matmul_flops: float,
        history: Sequence[dict[str, Any]] = (),
        trackers: Sequence = (),
    ):
        """Set up a log; `matmul_flops` is the machine's matmul speed in operations per second."""
        self.path = path
        self.words_per_token = words_per_token
        self.flops_per_token = flops_per_token
        self.matmul_flops = matmul_flops
        self.history = history
        self.changes: dict[str, list] = {}  # what the next row records
        self.trackers = trackers
        self.rows: list[dict[str, Any]] = []
        self.bar = None
        self.step_started: float | None = None  # None while the clock is stopped
        # at the last stop of the clock
        self.seconds = 0.0
        self.tokens = 0
        # at the last row that has a speed
        self.logged_seconds = 0.0
        self.logged_tokens = 0
        # steps before a resume whose duration the log does not record
        self.untimed_steps = 0
        self.untimed_tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        reset_peak_memory(args.device)

        # after a resume, keep only the rows up to the checkpoint: training will write the later
        # ones again
        if state.global_step and self.path.is_file():
            rows = _read_rows(self.path)
            self.rows = [row for row in rows if row["step"] <= state.global_step]
        rows = [json.dumps(row, allow_nan=False) + "\n" for row in self.rows]
        write_text(self.path, "".join(rows))  # a new file, even if a link had this name
        for row in self.rows:
            self._send(row)

        self.changes = changes_at(self.history, state.global_step)

        # continue the clock from the last row. Every checkpoint has a row, so the steps up to it
        # are all timed, unless somebody truncated or deleted the log
        last_row = self.rows[-1] if self.rows else {"seconds": 0.0, "tokens": 0, "step": 0}
        self.seconds = last_row["seconds"]
        self.tokens = state.num_input_tokens_seen
        self.logged_seconds = self.seconds
        self.logged_tokens = self.tokens
        self.untimed_steps = state.global_step - last_row["step"]
        self.untimed_tokens = self.tokens - last_row["tokens"]
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.step_started is None:
            self.step_started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_clock(state)

    def _stop_clock(self, state) -> None:
        if self.step_started is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.step_started
        self.step_started = None
        self.tokens = state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not {"loss", "eval_loss", "benchmark_seconds"} & set(logs or ()):
            return
        self._stop_clock(state)  # Trainer logs before it evaluates and saves

        # add where the run is, how fast it is, and what has changed
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "tokens": state.num_input_tokens_seen,
        }
        if "loss" in logs and self.seconds > self.logged_seconds:
            row |= self._speed(args, state)
            self.logged_tokens = self.tokens
            self.logged_seconds = self.seconds
        row["seconds"] = round(self.seconds, 3)
        row |= {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
        if self.changes:
            row["changes"] = self.changes
            self.changes = {}
        # JSON has no NaN. With fp16 the gradient may overflow; the loss scaler then skips the step.
        # A NaN loss ends the run, and this row shows where.
        for key in ("grad_norm", "loss"):
            if not math.isfinite(row.get(key, 0.0)):
                row[key] = None

        # write it everywhere
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._send(row)
        self._print(row)

    def _send(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log_row(row)

    def _speed(self, args, state) -> dict[str, float]:
        """Return the speed since the last row, the peak memory and the estimated time left."""
        seconds = self.seconds - self.logged_seconds
        tokens_per_second = (self.tokens - self.logged_tokens) / seconds
        flops_per_second = tokens_per_second * self.flops_per_token
        seconds_per_step = self.seconds / (state.global_step - self.untimed_steps)
        steps_left = state.max_steps - state.global_step
        return {
            "tokens_per_second": tokens_per_second,
            "words_per_second": tokens_per_second * self.words_per_token,
            "matmul_share": flops_per_second / self.matmul_flops,
            "memory_gb": round(peak_memory_gb(args.device), 3),
            "seconds_left": round(seconds_per_step * steps_left, 1),
        }

    def _print(self, row: dict[str, Any]) -> None:
        """Print a row above the progress bar."""
        if "eval_loss" in row:
            line = (
                f"step {row['step']:>6}  held-out loss {row['eval_loss']:.4f}  "
                f"perplexity {row['eval_perplexity']:.2f}  "
                f"bits per byte {row['eval_bits_per_byte']:.4f}"
            )
            line += "".join(f"\n    {sample!r}" for sample in row["samples"])
        elif "benchmark_seconds" in row:
            scores = [
                f"{key.removeprefix(BENCHMARK_PREFIX)} {value:.4f}"
                for key, value in row.items()
                if key.startswith(BENCHMARK_PREFIX)
            ]
            line = f"step {row['step']:>6}  benchmark  {'  '.join(scores)}"
        else:
            loss = math.nan if row["loss"] is None else row["loss"]
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            line = f"step {row['step']:>6}  loss {loss:.4f}  lr {row['learning_rate']:.2e}  "
            if "tokens_per_second" in row:
                line += f"{row['tokens_per_second']:,.0f} tokens/s"
        tqdm.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def tokens_per_second(self) -> float:
        """Return the speed of the complete run, not counting the time of evaluation and saving."""
        return (self.tokens - self.untimed_tokens) / self.seconds


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log, up to the first one that is not complete."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                float(row["step"] + row["tokens"] + row["seconds"])
            except (ValueError, LookupError, TypeError, RecursionError):
                return
            yield row
