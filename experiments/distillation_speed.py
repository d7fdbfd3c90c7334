"""Tokens per second of a student with two teachers: asked for each batch, read from a cache, and without any.

    python experiments/distillation_speed.py --config config/llama-10M.yaml --teacher config/llama-16M.yaml --steps 4

Student and teachers are randomly initialised, the ids random: speed depends on neither. Each turn is what train.py does
from the second epoch on: teachers loaded or cache written already; the first step does not count. The order is:
each way once, then all again, --repeats times. Prints median, minimum and maximum of tokens per second, the ratio to
teachers that are asked for each batch, and how fast the cache was written, once. It says nothing of what is learned.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training_speed import VOCABULARY, random_rows, tokenizer_of  # noqa: E402

WARM_UP = 1
WAYS = {"asked": "two teachers, asked", "cached": "two teachers, cached", "alone": "no teacher"}


def make_teachers(config: dict, tokenizer, folder: Path) -> list[str]:
    """Two saved models of the teacher's configuration, of different seeds."""
    import transformers

    from train import create_model

    for seed in (1, 2):
        transformers.set_seed(seed)
        create_model(config, tokenizer).save_pretrained(folder / str(seed))
        tokenizer.save_pretrained(folder / str(seed))
    return [str(folder / str(seed)) for seed in (1, 2)]


def one_turn(
    config: dict, tokenizer, chunks: list[dict], teachers: list[str], folder: Path
) -> tuple[float, float]:
    """(tokens per second: the median of the steps after the warm-up, seconds until the first step could begin)."""
    import numpy as np
    import transformers

    from babyllama.training.callbacks import RunLog
    from babyllama.training.distillation import make_trainer
    from babyllama.training.kernels import build_loss, choose_precision_and_kernels
    from babyllama.training.plan import describe_run
    from babyllama.training.trainer import training_arguments
    from train import create_model

    transformers.set_seed(0)
    model = create_model(config, tokenizer)
    plan = describe_run(config, model, {"words": 0, "tokens": 1}, len(chunks))
    plan |= choose_precision_and_kernels(config, plan)
    loss = build_loss(config, model, plan, tokenizer.bos_token_id)
    arguments = training_arguments(config, folder, plan["precision"])
    arguments.save_strategy = arguments.eval_strategy = "no"
    arguments.num_train_epochs = arguments.logging_steps = 1
    run_log = RunLog(folder / "metrics.jsonl", 1.0, plan["flops_per_token"], plan["matmul_flops"])
    report = {
        "train": {"key": "random ids"},
        "teachers": [{"path": path, "sha256": path} for path in teachers],
    }
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(
            config, report, model=model, args=arguments, train_dataset=chunks,
            byte_lengths=np.ones(VOCABULARY, dtype=np.int64), training=config["training"], loss=loss,
            callbacks=[run_log],
        )  # fmt: skip
        seconds = time.perf_counter() - started
        trainer.train()
    return statistics.median(row["tokens_per_second"] for row in run_log.rows[WARM_UP:]), seconds


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default=str(ROOT / "config" / "llama-10M.yaml"), help="the student"
    )
    parser.add_argument(
        "--teacher", default=str(ROOT / "config" / "llama-16M.yaml"), help="both teachers"
    )
    parser.add_argument(
        "--top-k", type=int, default=64, help="tokens kept for each place (default 64)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the student, as long runs do"
    )
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a turn (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (default 3)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.disable(logging.WARNING)
    import transformers

    from babyllama.config import check_config, read_yaml_file

    transformers.utils.logging.disable_progress_bar()
    student, teacher = (check_config(read_yaml_file(path)) for path in (args.config, args.teacher))
    student["training"]["compile"] = args.compile
    tokenizer = tokenizer_of(student)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["BABYLLAMA_CACHE"] = str(folder / "cache")
        section = {"teachers": make_teachers(teacher, tokenizer, folder), "top_k": args.top_k}
        ways = {way: {**student, "distillation": {**section, "cache": cache}}
                for way, cache in (("asked", "none"), ("cached", "top_k"))}  # fmt: skip
        ways = {
            "asked": check_config(ways["asked"]),
            "cached": check_config(ways["cached"]),
            "alone": student,
        }
        step = (
            student["training"]["batch_size"] * student["training"]["gradient_accumulation_steps"]
        )
        chunks = random_rows(student, step * (WARM_UP + args.steps), len(tokenizer))
        _, writing = one_turn(ways["cached"], tokenizer, chunks, section["teachers"], folder)
        for _ in range(args.repeats):
            for way, config in ways.items():
                speeds[way].append(
                    one_turn(config, tokenizer, chunks, section["teachers"], folder)[0]
                )
                print(f"{WAYS[way]}: {speeds[way][-1]:,.0f} tokens/s", file=sys.stderr)
    base = statistics.median(speeds["asked"])
    print(f"{'':24}{'median':>8}{'min':>8}{'max':>8}{'ratio':>7}   tokens per second")
    for way, found in speeds.items():
        middle = statistics.median(found)
        print(
            f"{WAYS[way]:24}{middle:8,.0f}{min(found):8,.0f}{max(found):8,.0f}{middle / base:7.2f}"
        )
    tokens = len(chunks) * student["data"]["seq_length"]
    print(
        f"the cache was written at {tokens / writing:,.0f} tokens per second, loading the teachers included"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
