"""Tokens per second of training, ours beside a plain script on Hugging Face's Trainer, in one run.

    python experiments/training_speed.py --config config/llama-10M.yaml --steps 6 --repeats 3
    python experiments/training_speed.py --config config/llama-10M.yaml --curves curves.png --steps 100

The plain script is what a tutorial gives: DataCollatorForLanguageModeling, float32 (on a GPU bf16), the model's own
loss, at each micro-batch of --micro, accumulated to the configuration's batch. Ours is LMTrainer with each choice of
number format and compilation. Same model, ids, effective batch and seed, both with AdamW; no evaluation, no saving.
On a CPU each turn is a process of its own: memory that an earlier one gave back would be had again at less cost.
Two steps at the beginning (on a GPU ten) do not count, but the seconds of the first are shown. The order: every variant
once, then all again, --repeats times. Prints median, minimum and maximum of the turns (of a single one: of its steps,
on a GPU of ten steps at a time), the ratio of the medians to the best plain one, and the share of the speed at which
this machine multiplies matrices; on a GPU whose datasheet is known also the MFU, and the most memory that was
allocated. --busy keeps one other process counting all the while, as on a machine that is used for other things too.
--curves trains on the configuration's own text and draws the losses of the best plain variant's recipe and of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY, BLOCK = 16000, 10
OURS = ["as it is", "compiled"]


def warm_up() -> int:
    """Steps before those that count; on a GPU the first ones are also recorded (training/cuda_graphs.py)."""
    import torch

    return 10 if torch.cuda.is_available() else 2


# dense bf16 FLOP/s by NVIDIA's datasheets, by the beginning of the card's name
DATASHEET = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}


def tokenizer_of(config: dict):
    """The configuration's tokenizer, or, where it is not there, one of 16,000 made-up words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from babyllama.data.tokenizer import load_tokenizer

    if Path(config["data"]["tokenizer_path"]).exists():
        return load_tokenizer(config["data"]["tokenizer_path"])
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class Clock:
    """A callback that notes the time at which each step ends; a GPU is waited for once in BLOCK steps only."""

    def __new__(cls):
        import torch
        from transformers import TrainerCallback

        class _Clock(TrainerCallback):
            times, losses, steps = [], [], []

            def on_train_begin(self, *args, **kwargs):
                self.times, self.steps = [time.perf_counter()], [0]
                self.losses = []

            def on_step_end(self, *args, **kwargs):
                step, last = args[1].global_step, args[1].max_steps
                if torch.cuda.is_available():
                    if warm_up() < step < last and step % BLOCK:
                        return
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())
                self.steps.append(step)

            def on_log(self, args, state, control, logs=None, **kwargs):
                self.losses += [logs["loss"]] if "loss" in logs else []

        return _Clock()


def train_once(config: dict, variant: dict, tokenizer, rows, folder: Path, log_every: int = 1):
    """Train over the rows; returns the clock. `variant` is {"micro": n} for the plain script, else how ours runs."""
    import torch
    import transformers

    from babyllama.device import keep_freed_memory
    from babyllama.training.loss import NextTokenLoss
    from babyllama.training.trainer import LMTrainer, training_arguments
    from train import create_model

    transformers.set_seed(config["training"]["seed"])
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model, clock = create_model(config, tokenizer), Clock()
    batch = config["training"]["batch_size"]
    arguments = training_arguments(
        config, folder, variant.get("precision", "bf16" if cuda else "fp32")
    )
    arguments.save_strategy = arguments.eval_strategy = "no"
    arguments.num_train_epochs, arguments.load_best_model_at_end = 1, False
    arguments.logging_steps = log_every
    common = {"model": model, "args": arguments, "train_dataset": rows, "callbacks": [clock]}
    if "micro" in variant:
        arguments.per_device_train_batch_size = variant["micro"]
        arguments.gradient_accumulation_steps *= batch // variant["micro"]
        arguments.lr_scheduler_type = config["training"]["lr_scheduler"]
        arguments.warmup_steps, arguments.weight_decay = (
            config["training"]["warmup_steps"],
            config["training"]["weight_decay"],
        )
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = transformers.Trainer(**common, data_collator=collator, processing_class=tokenizer)
    else:
        bf16 = variant["precision"] == "bf16"
        if not cuda:
            keep_freed_memory()
        if bf16 and not cuda:
            model.set_attn_implementation("eager")
        dtype = torch.bfloat16 if bf16 else torch.float32
        loss = NextTokenLoss(
            dtype=dtype,
            batch_size=batch,
            compile=variant["compile"],
            chunked=not cuda,
            recorded=cuda,
        )
        trainer = LMTrainer(
            **common, byte_lengths=[1] * len(tokenizer), training=config["training"], loss=loss
        )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock


def random_rows(config: dict, n: int, vocabulary: int) -> list[dict]:
    import numpy as np

    ids = np.random.default_rng(0).integers(3, vocabulary, (n, config["data"]["seq_length"]))
    return [{"input_ids": row.tolist()} for row in ids]


def plot_losses(losses: dict[str, list[float]], path: Path) -> None:
    """Draw the training loss of each run against steps, and its difference from the first run."""
    from babyllama.plots import BLUE, GREEN, GREY, ORANGE, label, new_figure

    figure, ((loss_axis, difference_axis),) = new_figure(1, 2, 11, 4)
    first_name = next(iter(losses))
    for (name, values), colour in zip(losses.items(), (GREY, BLUE, ORANGE, GREEN), strict=False):
        steps = range(1, len(values) + 1)
        loss_axis.plot(steps, values, color=colour, lw=1.2, label=label(name))
        if name != first_name:
            differences = [a - b for a, b in zip(values, losses[first_name], strict=True)]
            difference_axis.plot(steps, differences, color=colour, lw=1.2)
    loss_axis.set(xlabel="step", ylabel="training loss (nats per token)")
    loss_axis.legend(frameon=False)
    difference_axis.set(
        xlabel="step", ylabel="difference (nats per token)", title=f"minus {label(first_name)}"
    )
    figure.savefig(path, dpi=120)


def curves(
    config: dict, variants: dict[str, dict], tokenizer, n: int, folder: Path, picture: Path
) -> None:
    """Train each variant on the first n chunks of the configuration's text, and draw their losses."""
    from train import prepare_datasets_modern

    rows = [
        {"input_ids": row["input_ids"].tolist()}
        for row in prepare_datasets_modern(config, tokenizer)[0].select(range(n))
    ]
    found = {
        name: train_once(config, variant, tokenizer, rows, folder).losses
        for name, variant in variants.items()
    }
    plot_losses(found, picture)
    names = list(found)
    gaps = [abs(a - b) for a, b in zip(found[names[0]], found[names[1]], strict=True)]
    last = {name: statistics.fmean(losses[-10:]) for name, losses in found.items()}
    print(
        f"loss of the last 10 of {len(gaps)} steps: {last}; largest difference of a step {max(gaps):.1e}; {picture}"
    )


def one_turn(config: dict, variant: dict, tokenizer, rows: list[dict]) -> dict[str, float]:
    """One variant in this process: tokens per second of each step or block after the warm-up, the seconds of the first
    step, memory in GB."""
    from babyllama.device import peak_memory_gb, pick_device, reset_peak_memory

    device = pick_device()
    reset_peak_memory(device)
    with tempfile.TemporaryDirectory() as folder:
        clock = train_once(
            config, variant, tokenizer, rows, Path(folder), log_every=BLOCK
        )  # a row waits for a GPU
    marks = list(zip(clock.times, clock.steps, strict=True))
    seconds = [(b - a) / (n - m) for (a, m), (b, n) in itertools.pairwise(marks)]  # of a step
    tokens = step_of(config) * config["data"]["seq_length"]
    speeds = [tokens / one for one in seconds[warm_up() :]]
    return {"speeds": speeds, "first": seconds[0], "memory": peak_memory_gb(device)}


@contextlib.contextmanager
def other_work(wanted: bool):
    """One process that counts without end, while the block runs."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def turn_of(
    name: str, variants: dict[str, dict], config: dict, tokenizer, steps: int, argv: list[str]
) -> dict:
    """one_turn of the variant of this name: on a GPU here, else in a process of its own."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        return one_turn(
            config,
            variants[name],
            tokenizer,
            random_rows(config, step_of(config) * steps, len(tokenizer)),
        )
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--turn", name], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise ValueError(f"{name}: failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def step_of(config: dict) -> int:
    """Chunks in one step."""
    return config["training"]["batch_size"] * config["training"]["gradient_accumulation_steps"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "config" / "llama-10M.yaml"))
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a turn (default 6)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each variant (default 3)")
    parser.add_argument(
        "--micro",
        type=int,
        nargs="+",
        default=[8, 16, 32],
        help="micro-batches of the plain script",
    )
    parser.add_argument(
        "--formats", nargs="+", default=["fp32", "bf16"], help="number formats of ours"
    )
    parser.add_argument(
        "--ours", nargs="+", choices=OURS, default=OURS, help="how ours runs (default: both)"
    )
    parser.add_argument("--busy", action="store_true", help="beside one other busy process")
    parser.add_argument(
        "--curves", type=Path, metavar="PNG", help="draw losses on the configuration's text instead"
    )
    parser.add_argument(
        "--set", action="append", metavar="SECTION.KEY=VALUE", help="any key of the configuration"
    )
    parser.add_argument("--turn", metavar="VARIANT", help="one turn, here, printed as JSON")
    return parser


def report(config: dict, tokenizer, turns: dict[str, list[dict[str, float]]]) -> None:
    """Print a row for each variant: its speed, against the best plain one and against products of matrices."""
    import torch

    from babyllama.device import matmul_flops
    from babyllama.training.plan import describe_run
    from train import create_model

    with torch.device("meta"):  # only its shapes are wanted
        model = create_model(config, tokenizer)
    work = describe_run(config, model, {"words": 0, "tokens": 1}, step_of(config))[
        "flops_per_token"
    ]
    speeds = {
        name: [statistics.median(turn["speeds"]) for turn in found] for name, found in turns.items()
    }
    ends = {
        name: [speed for turn in found for speed in turn["speeds"]] for name, found in turns.items()
    }
    best = max(
        statistics.median(found) for name, found in speeds.items() if name.startswith("plain")
    )
    cuda = torch.cuda.is_available()
    used = {
        name: "bf16" if "bf16" in name or (cuda and "plain" in name) else "fp32" for name in speeds
    }
    peaks = {form: matmul_flops(form) for form in sorted(set(used.values()), reverse=True)}
    sheet = next(
        (
            peak
            for part, peak in DATASHEET.items()
            if cuda and torch.cuda.get_device_name().startswith(part)
        ),
        None,
    )
    print(
        "products of matrices: "
        + ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
    )
    print(f"{config['model']['name']}, {model.num_parameters():,} parameters; {work / 1e6:,.1f} MFLOP a token: 6 x "
          "(weights in products + layers x width x seq_length); "
          f"{step_of(config) * config['data']['seq_length']:,} tokens a step")  # fmt: skip
    if sheet:
        print(
            f"MFU: tokens per second x FLOP a token / {sheet / 1e12:.0f} TFLOP/s ({torch.cuda.get_device_name()})"
        )
    mfu = "    MFU" if sheet else ""
    print(
        f"{'':28}{'median':>10}{'min':>10}{'max':>10}{'ratio':>7}{'share':>7}{mfu}{'first step':>12}{'memory':>10}"
    )
    for name, found in speeds.items():
        middle, peak = statistics.median(found), peaks[used[name]]
        low, high = (
            (min(ends[name]), max(ends[name])) if len(found) == 1 else (min(found), max(found))
        )
        figures = f"{middle:10,.0f}{low:10,.0f}{high:10,.0f}{middle / best:7.2f}{middle * work / peak:7.0%}"
        figures += f"{middle * work / sheet:7.1%}" if sheet else ""
        memory = max(turn["memory"] for turn in turns[name])
        print(f"{name:28}{figures}{turns[name][0]['first']:10.1f} s{memory:7.2f} GB")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    logging.disable(logging.WARNING)
    spin_count = os.environ.get("GOMP_SPINCOUNT")
    from train import load_config

    if args.turn and not args.turn.startswith("ours") and spin_count is None:
        os.environ.pop(
            "GOMP_SPINCOUNT", None
        )  # what importing train.py has set, before torch reads it

    config = load_config(args.config, args)
    config["training"]["optimizer"] = "adamw"  # as the plain script has it
    tokenizer = tokenizer_of(config)
    plain = {
        f"plain, micro-batch {m}": {"micro": m}
        for m in args.micro
        if config["training"]["batch_size"] % m == 0
    }
    ways = [
        (p, c)
        for p in args.formats
        for c in (False, True)
        if ("compiled" if c else "as it is") in args.ours
    ]
    ours = {f"ours, {p}{', compiled' * c}": {"precision": p, "compile": c} for p, c in ways}
    variants, step = {**plain, **ours}, step_of(config)
    if args.turn:
        rows = random_rows(config, step * (warm_up() + args.steps), len(tokenizer))
        print(json.dumps(one_turn(config, variants[args.turn], tokenizer, rows)))
        return 0
    if args.curves:
        two = dict([next(iter(plain.items())), list(ours.items())[-1]])
        with tempfile.TemporaryDirectory() as folder:
            curves(config, two, tokenizer, step * args.steps, Path(folder), args.curves)
        return 0
    turns: dict[str, list[dict]] = {name: [] for name in variants}
    with other_work(args.busy):
        for name in [*variants] * args.repeats:
            turns[name].append(
                turn_of(name, variants, config, tokenizer, warm_up() + args.steps, argv)
            )
            print(
                f"{name}: {statistics.median(turns[name][-1]['speeds']):,.0f} tokens/s",
                file=sys.stderr,
            )
    report(config, tokenizer, turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
