"""Tokens per second of a training step with each number format and attention kernel, side by side in one run.

    python benchmarks/training_speed.py --config config/llama-10M.yaml --steps 8 --repeats 3

Random token ids; the model, batch and length of the configuration; our Trainer without evaluation or saving. The first
steps do not count. The order is: every variant once, then all again, --repeats times. Prints median, minimum and
maximum, and the ratio of the medians to float32 with the default kernel. It says nothing of what is learned.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY, WARM_UP = 16000, 2
VARIANTS = [("fp32", "sdpa"), ("fp32", "eager"), ("bf16", "sdpa"), ("bf16", "eager")]


class Tokenizer:
    """The size and the special ids that create_model asks for."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return VOCABULARY


def one_turn(config: dict, precision: str, attention: str, steps: int, folder: Path) -> float:
    """Tokens per second: the median of `steps` steps after the warm-up."""
    import numpy as np
    import transformers

    from train import create_model
    from trainer import LMTrainer, RunLog, training_arguments

    transformers.set_seed(0)
    model = create_model(config, Tokenizer())
    model.set_attn_implementation(attention)
    arguments = training_arguments(config, folder, precision)
    arguments.save_strategy = arguments.eval_strategy = "no"
    arguments.max_steps, arguments.logging_steps = WARM_UP + steps, 1
    chunks = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * (WARM_UP + steps)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (chunks, config["data"]["seq_length"])).astype(np.uint16)
    run_log = RunLog(folder / "metrics.jsonl")
    with contextlib.redirect_stdout(None):
        LMTrainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row} for row in ids],
            byte_lengths=np.ones(VOCABULARY, dtype=np.int64),
            callbacks=[run_log],
        ).train()
    return statistics.median(row["tokens_per_second"] for row in run_log.rows[WARM_UP:])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "config" / "llama-10M.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="counted steps of a turn (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each variant (default 3)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.disable(logging.WARNING)
    from train import load_config

    config = load_config(args.config)
    speeds: dict[tuple[str, str], list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            for variant in VARIANTS:
                speeds[variant].append(one_turn(config, *variant, args.steps, Path(folder)))
                print(*variant, f"{speeds[variant][-1]:,.0f} tokens/s", file=sys.stderr)
    base = statistics.median(speeds[VARIANTS[0]])
    print(f"{'format':8}{'attention':12}{'median':>8}{'min':>8}{'max':>8}{'ratio':>7}   tokens per second")
    for (precision, attention), found in speeds.items():
        middle = statistics.median(found)
        print(f"{precision:8}{attention:12}{middle:8,.0f}{min(found):8,.0f}{max(found):8,.0f}{middle / base:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
