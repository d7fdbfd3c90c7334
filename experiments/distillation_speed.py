"""Time a student with two teachers: run for each batch, read from a cache, and without any.

    python experiments/distillation_speed.py --config config/llama-10M.yaml --steps 4

Student and teachers are randomly initialised and the ids are random: speed depends on neither.
Each turn is what train.py does from the second epoch, with teachers loaded or the cache written;
the first step does not count. Every way once, then all again, --repeats times. Prints median,
minimum and maximum of tokens per second, the ratio to teachers that run for each batch, and how
fast the cache was written. It does not measure what is learned.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, VOCABULARY, chunks_per_step, random_chunks, spread, tokenizer_or_stand_in

from babyllama.cli import Parser, check_at_least, run_script

WARM_UP = 1
TITLES = {"run": "two teachers, run", "cached": "two teachers, cached", "alone": "no teacher"}


def save_teachers(config: dict, tokenizer, folder: Path) -> list[str]:
    """Save two models of a configuration, with different seeds, and return their paths."""
    import transformers

    from train import create_model

    paths = []
    for seed in (1, 2):
        path = folder / str(seed)
        transformers.set_seed(seed)
        create_model(config, tokenizer).save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(str(path))
    return paths


def take_turn(
    config: dict, tokenizer, chunks: list[dict], teachers: list[str], folder: Path
) -> tuple[float, float]:
    """Train once; return (median tokens per second, seconds before the first step)."""
    import numpy as np
    import transformers

    from babyllama.distillation.student import make_distillation_trainer
    from babyllama.planning.execution import build_loss, choose_execution, use_fast_kernels
    from babyllama.planning.plan import make_plan
    from babyllama.training.arguments import training_arguments
    from babyllama.training.run_log import RunLog
    from babyllama.training.trainer import LMTrainer
    from train import create_model

    transformers.set_seed(0)
    model = create_model(config, tokenizer)
    plan = make_plan(config, model, {"train": {"words": 0, "tokens": 1}}, len(chunks))
    execution = choose_execution(config, plan)
    precision = execution.precision
    use_fast_kernels(config, model, precision)
    loss = build_loss(config, tokenizer.bos_token_id, precision, execution.compile)
    config = {**config, "training": {**config["training"], "num_epochs": 1}}
    arguments = training_arguments(config, folder, precision)
    arguments.save_strategy = "no"
    arguments.eval_strategy = "no"
    arguments.logging_steps = 1
    run_log = RunLog(folder / "metrics.jsonl", 1.0, plan.flops_per_token, execution.matmul_flops)
    report = {
        "train": {"key": "random ids"},
        "teachers": [{"path": path, "sha256": path} for path in teachers],
    }

    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        make_trainer = LMTrainer
        if "distillation" in config:
            make_trainer = functools.partial(make_distillation_trainer, config, report)
        trainer = make_trainer(
            model=model,
            args=arguments,
            train_dataset=chunks,
            byte_lengths=np.ones(VOCABULARY, dtype=np.int64),
            training=config["training"],
            loss=loss,
            callbacks=[run_log],
        )
        seconds = time.perf_counter() - start
        trainer.train()
    return statistics.median(row["tokens_per_second"] for row in run_log.rows[WARM_UP:]), seconds


def measure(student: dict, teacher: dict, top_k: int, steps: int, repeats: int) -> None:
    """Measure the three ways and print the table."""
    from babyllama.config import check_config

    tokenizer = tokenizer_or_stand_in(student)
    chunks = random_chunks(student, chunks_per_step(student) * (WARM_UP + steps), len(tokenizer))
    speeds: dict[str, list[float]] = {way: [] for way in TITLES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["BABYLLAMA_CACHE"] = str(folder / "cache")
        teachers = save_teachers(teacher, tokenizer, folder)
        configs = {"alone": student}
        for way, cache in (("run", "none"), ("cached", "top_k")):
            distillation = {"teachers": teachers, "top_k": top_k, "cache": cache}
            configs[way] = check_config({**student, "distillation": distillation})

        _, cache_seconds = take_turn(configs["cached"], tokenizer, chunks, teachers, folder)
        for _ in range(repeats):
            for way, title in TITLES.items():
                speed, _ = take_turn(configs[way], tokenizer, chunks, teachers, folder)
                speeds[way].append(speed)
                print(f"{title}: {speed:,.0f} tokens/s", file=sys.stderr)

    print("tokens per second: median (minimum to maximum), ratio")
    base = statistics.median(speeds["run"])
    for way, title in TITLES.items():
        ratio = statistics.median(speeds[way]) / base
        print(f"{title:24}{spread(speeds[way], ',.0f')} {ratio:.2f}")
    tokens = len(chunks) * student["data"]["seq_length"]
    print(
        f"the cache was written at {tokens / cache_seconds:,.0f} tokens per second, "
        "including the time to load the teachers"
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    configs = ROOT / "config"
    add("--config", default=str(configs / "llama-10M.yaml"), help="the student")
    add("--teacher", default=str(configs / "llama-16M.yaml"), help="both teachers")
    add("--top-k", type=int, default=64, help="tokens kept per position (default 64)")
    add("--compile", action="store_true", help="compile the student, as in long runs")
    add("--steps", type=int, default=4, help="counted steps of a turn (default 4)")
    add("--repeats", type=int, default=3, help="turns of each way (default 3)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        import transformers

        from train import load_config

        check_at_least(args, {"top_k": 1, "steps": 1, "repeats": 1})
        logging.disable(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
        student = load_config(args.config)
        teacher = load_config(args.teacher)
        student["training"]["compile"] = args.compile
        measure(student, teacher, args.top_k, args.steps, args.repeats)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
