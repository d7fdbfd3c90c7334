"""Time training beside a plain script on Hugging Face's Trainer.

    python experiments/training_speed.py --config config/llama-10M.yaml --steps 6 --repeats 3

The plain script is the one of a tutorial: DataCollatorForLanguageModeling, the model's loss,
float32 on a CPU and bf16 on a GPU, at each micro-batch of --micro with accumulation to the
config's batch. Ours is LMTrainer with each number format, compiled and not. Model, ids, effective
batch, seed and AdamW are the same; neither evaluates or saves.

The first steps (two on a CPU, ten on a GPU) do not count. Every variant once, then all again,
--repeats times; on a CPU each turn is its own process, because memory that an earlier turn freed
is cheaper. Prints median, minimum and maximum of the turns (for a single turn: of its steps, on a
GPU in blocks of ten), the ratio to the best plain variant, the share of this machine's speed of
matrix products, the seconds of the first step and the peak memory; on a known GPU also the MFU.
--busy keeps one other process busy meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import (
    ROOT,
    chunks_per_step,
    random_chunks,
    run_child,
    tokenizer_or_stand_in,
    use_default_threads,
)

from babyllama.cli import Parser, check_at_least, run_script

BLOCK = 10  # steps between two synchronisations with a GPU
OURS = ["as it is", "compiled"]
# dense bf16 FLOP/s by NVIDIA's datasheets, by the start of the card's name
DATASHEET = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}


def warm_up_steps() -> int:
    """Return the number of steps that do not count; a GPU records its passes during them."""
    import torch

    return 10 if torch.cuda.is_available() else 2


# ---- training -----------------------------------------------------------------------------------


def make_clock():
    """Return a callback with the end `times` of `steps`, and the logged `losses`."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.times = [time.perf_counter()]
            self.steps = [0]
            self.losses = []

        def on_step_end(self, args, state, control, **kwargs):
            step = state.global_step
            if torch.cuda.is_available():
                if warm_up_steps() < step < state.max_steps and step % BLOCK:
                    return
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            self.steps.append(step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return StepClock()


def plain_trainer(config: dict, micro_batch: int, tokenizer, arguments, common: dict):
    """Return the Trainer of a tutorial."""
    import transformers

    training = config["training"]
    arguments.per_device_train_batch_size = micro_batch
    arguments.gradient_accumulation_steps *= training["batch_size"] // micro_batch
    arguments.lr_scheduler_type = training["lr_scheduler"]
    arguments.warmup_steps = training["warmup_steps"]
    arguments.weight_decay = training["weight_decay"]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return transformers.Trainer(
        args=arguments, data_collator=collator, processing_class=tokenizer, **common
    )


def our_trainer(config: dict, variant: dict, tokenizer, arguments, common: dict):
    """Return our Trainer with a number format, compiled or not."""
    import torch

    from babyllama.planning.execution import build_loss, use_fast_kernels
    from babyllama.training.trainer import LMTrainer

    use_fast_kernels(config, common["model"], variant["precision"])
    return LMTrainer(
        args=arguments,
        byte_lengths=[1] * len(tokenizer),
        training=config["training"],
        loss=build_loss(config, tokenizer.bos_token_id, **variant),
        cuda_graphs=torch.cuda.is_available(),
        **common,
    )


def train_once(
    config: dict, variant: dict, tokenizer, chunks: list[dict], folder: Path, log_every: int = 1
):
    """Train once over the chunks and return the clock.

    `variant` is {"micro": n} for the plain script, {"precision": ..., "compile": ...} for ours.
    """
    import torch
    import transformers

    from babyllama.training.arguments import training_arguments
    from train import create_model

    transformers.set_seed(config["training"]["seed"])
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = create_model(config, tokenizer)
    precision = variant.get("precision", "bf16" if on_gpu else "fp32")
    config = {**config, "training": {**config["training"], "num_epochs": 1}}
    arguments = training_arguments(config, folder, precision)
    arguments.save_strategy = "no"
    arguments.eval_strategy = "no"
    arguments.load_best_model_at_end = False
    arguments.logging_steps = log_every
    clock = make_clock()
    common = {"model": model, "train_dataset": chunks, "callbacks": [clock]}
    if "micro" in variant:
        trainer = plain_trainer(config, variant["micro"], tokenizer, arguments, common)
    else:
        trainer = our_trainer(config, variant, tokenizer, arguments, common)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock


# ---- speed --------------------------------------------------------------------------------------


def take_turn(config: dict, variant: dict, tokenizer, steps: int) -> dict:
    """Train one variant in this process.

    Returns `speeds` in tokens per second of the counted steps or blocks, the seconds of the `first`
    step, and `memory` in GB.
    """
    from babyllama.device import peak_memory_gb, pick_device, reset_peak_memory

    device = pick_device()
    per_step = chunks_per_step(config)
    chunks = random_chunks(config, per_step * (warm_up_steps() + steps), len(tokenizer))
    reset_peak_memory(device)
    with tempfile.TemporaryDirectory() as folder:  # a log row waits for a GPU, so few of them
        clock = train_once(config, variant, tokenizer, chunks, Path(folder), log_every=BLOCK)
    marks = list(zip(clock.times, clock.steps, strict=True))
    step_seconds = [(b - a) / (n - m) for (a, m), (b, n) in itertools.pairwise(marks)]
    tokens = per_step * config["data"]["seq_length"]
    return {
        "speeds": [tokens / seconds for seconds in step_seconds[warm_up_steps() :]],
        "first": step_seconds[0],
        "memory": peak_memory_gb(device),
    }


@contextlib.contextmanager
def other_work(busy: bool):
    """Run another process that counts forever while the block runs, if `busy`."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if child:
            child.kill()
            child.wait()


def measure(
    config: dict, variants: dict[str, dict], tokenizer, args: argparse.Namespace, argv: list[str]
) -> dict[str, list[dict]]:
    """Return the turns of each variant: on a GPU in this process, else each in its own."""
    import torch

    turns: dict[str, list[dict]] = {name: [] for name in variants}
    with other_work(args.busy):
        for name in [*variants] * args.repeats:
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
                torch._dynamo.reset()
                turn = take_turn(config, variants[name], tokenizer, args.steps)
            else:
                turn = run_child(__file__, [*argv, "--turn", name])
            turns[name].append(turn)
            speed = statistics.median(turn["speeds"])
            print(f"{name}: {speed:,.0f} tokens/s", file=sys.stderr)
    return turns


def report(config: dict, tokenizer, turns: dict[str, list[dict]]) -> None:
    """Print a row for each variant."""
    import torch

    from babyllama.device import matmul_flops
    from babyllama.planning.plan import make_plan
    from train import create_model

    # operations of a token, and what this machine can do
    with torch.device("meta"):  # only the shapes matter
        model = create_model(config, tokenizer)
    per_step = chunks_per_step(config)
    plan = make_plan(config, model, {"train": {"words": 0, "tokens": 1}}, per_step)
    flops = plan.flops_per_token
    on_gpu = torch.cuda.is_available()
    formats = {
        name: "bf16" if "bf16" in name or (on_gpu and "plain" in name) else "fp32" for name in turns
    }
    peaks = {name: matmul_flops(name) for name in sorted(set(formats.values()), reverse=True)}
    card = torch.cuda.get_device_name() if on_gpu else ""
    datasheet = next((peak for name, peak in DATASHEET.items() if card.startswith(name)), None)

    speeds = {name: [statistics.median(turn["speeds"]) for turn in turns[name]] for name in turns}
    plain = [statistics.median(speeds[name]) for name in speeds if name.startswith("plain")]
    products = ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
    print(f"matrix products: {products}")
    print(
        f"{config['model']['name']}, {model.num_parameters():,} parameters; {flops / 1e6:,.1f} "
        "MFLOP per token: 6 x (weights in products + layers x width x seq_length); "
        f"{per_step * config['data']['seq_length']:,} tokens per step"
    )
    if datasheet:
        print(f"MFU: tokens per second x FLOP per token / {datasheet / 1e12:.0f} TFLOP/s ({card})")
    mfu_title = "    MFU" if datasheet else ""
    print(
        f"{'':28}{'median':>10}{'min':>10}{'max':>10}{'ratio':>7}{'share':>7}{mfu_title}"
        f"{'first step':>12}{'memory':>10}"
    )
    for name, medians in speeds.items():
        values = turns[name][0]["speeds"] if len(medians) == 1 else medians
        median = statistics.median(medians)
        row = f"{name:28}{median:10,.0f}{min(values):10,.0f}{max(values):10,.0f}"
        row += f"{median / max(plain):7.2f}{median * flops / peaks[formats[name]]:7.0%}"
        if datasheet:
            row += f"{median * flops / datasheet:7.1%}"
        memory = max(turn["memory"] for turn in turns[name])
        print(f"{row}{turns[name][0]['first']:10.1f} s{memory:7.2f} GB")


# ---- command line -------------------------------------------------------------------------------


def make_variants(config: dict, args: argparse.Namespace) -> dict[str, dict]:
    """Return the variants by name, the plain ones first."""
    variants: dict[str, dict] = {}
    for micro_batch in args.micro:
        if config["training"]["batch_size"] % micro_batch == 0:
            variants[f"plain, micro-batch {micro_batch}"] = {"micro": micro_batch}
    for precision in args.formats:
        if "as it is" in args.ours:
            variants[f"ours, {precision}"] = {"precision": precision, "compile": False}
        if "compiled" in args.ours:
            variants[f"ours, {precision}, compiled"] = {"precision": precision, "compile": True}
    return variants


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default=str(ROOT / "config" / "llama-10M.yaml"), help="YAML file")
    add("--steps", type=int, default=6, help="counted steps of a turn (default 6)")
    add("--repeats", type=int, default=3, help="turns of each variant (default 3)")
    add(
        "--micro",
        type=int,
        nargs="+",
        default=[8, 16, 32],
        help="micro-batches of the plain script",
    )
    formats = ["fp32", "bf16"]
    add("--formats", nargs="+", default=formats, help="number formats of ours")
    add("--ours", nargs="+", choices=OURS, default=OURS, help="variants (default: both)")
    add("--busy", action="store_true", help="beside one other busy process")
    add("--set", action="append", metavar="SECTION.KEY=VALUE", help="any key")
    add("--turn", metavar="VARIANT", help="take one turn here and print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)

    def body() -> None:
        if args.turn and args.turn.startswith("plain"):
            use_default_threads()
        from train import load_config

        check_at_least(args, {"steps": 1, "repeats": 1})
        logging.disable(logging.WARNING)
        config = load_config(args.config, args)
        config["training"]["optimizer"] = "adamw"  # as in the plain script
        tokenizer = tokenizer_or_stand_in(config)
        variants = make_variants(config, args)
        if args.turn:
            print(json.dumps(take_turn(config, variants[args.turn], tokenizer, args.steps)))
        else:
            report(config, tokenizer, measure(config, variants, tokenizer, args, argv))

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
