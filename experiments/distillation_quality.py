"""Compare students with and without teachers after the same words, over several seeds.

    python experiments/distillation_quality.py --data-dir data --seeds 1 2 3

Takes the first --words words of each training file and a fifth of that of each held-out file,
trains a tokenizer of 4,000 tokens, and then runs train.py's main: two teachers, a Llama and a
GPT-2, and for each seed students of half their size: alone, with the teachers (alpha 0.5, T 2,
mean per token), and with the teachers in the published scale (average of logits, batchmean).
Finished runs in --output are not repeated and interrupted ones resume. Prints held-out bits per
byte after the last epoch and after the best one, because small models overfit text that they read
many times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import common  # noqa: F401  puts the repository on sys.path

import train as train_script
import train_tokenizer
from babyllama.cli import Parser, check_at_least, run_script
from babyllama.runs.checkpoints import checkpoint_error, checkpoints
from babyllama.runs.run_dir import LOG_FILE, METRICS_FILE

VOCABULARY = 4000
TEACHERS = {
    "teacher-llama": {"type": "Llama", "hidden_size": 192, "n_layer": 5, "n_head": 6},
    "teacher-gpt2": {
        "type": "GPT2",
        "hidden_size": 192,
        "n_layer": 5,
        "n_head": 6,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
}
STUDENT = {"type": "Llama", "hidden_size": 128, "n_layer": 4, "n_head": 4}
WAYS = {
    "alone": None,
    "teachers": {},
    "teachers-published": {"average": "logits", "reduction": "batchmean"},
}


def copy_first_words(source: Path, target: Path, words: int) -> None:
    """Write the first `words` words of each file of a folder under the same name."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        kept = []
        remaining = words
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                in_line = len(line.split())
                if in_line > remaining:
                    kept.append(" ".join(line.split(" ")[:remaining]) + "\n")
                    break
                kept.append(line)
                remaining -= in_line
        (target / file.name).write_text("".join(kept), encoding="utf-8")


def prepare(args: argparse.Namespace) -> None:
    """Write the text and the tokenizer of all runs to --output."""
    copy_first_words(args.data_dir / "train", args.output / "train", args.words)
    copy_first_words(args.data_dir / "dev", args.output / "dev", args.words // 5)
    flags = {
        "--data-dir": args.output / "train",
        "--output": args.output / "tokenizer.json",
        "--vocab-size": VOCABULARY,
    }
    if train_tokenizer.main([str(part) for pair in flags.items() for part in pair]):
        raise ValueError("the tokenizer was not trained")


def make_config(
    args: argparse.Namespace, name: str, model: dict, epochs: int, seed: int, teachers: dict | None
) -> dict:
    """Return the configuration of one run; `teachers` holds keys of the distillation section."""
    out = args.output
    config = {
        "data": {
            "tokenizer_path": str(out / "tokenizer.json"),
            "train_path": str(out / "train"),
            "eval_path": str(out / "dev"),
            "seq_length": 128,
            "eval_samples": 100_000,
        },
        "model": {"name": name, **model},
        "training": {
            "lr": args.lr,
            "batch_size": 8,
            "num_epochs": epochs,
            "warmup_ratio": 0.05,
            "seed": seed,
            "logging_steps": 50,
        },
        "logging": {"output_dir": str(out)},
    }
    if teachers is not None:
        config["distillation"] = {
            "teachers": [str(out / teacher) for teacher in TEACHERS],
            "cache": "top_k",
            "top_k": args.top_k,
            **teachers,
        }
    return config


def train(config: dict) -> None:
    """Train a run, or resume it, unless it is finished."""
    run_dir = Path(config["logging"]["output_dir"], config["model"]["name"])
    if (run_dir / METRICS_FILE).is_file():
        return
    file = run_dir.with_name(f"{run_dir.name}.json")  # JSON is YAML
    file.write_text(json.dumps(config), encoding="utf-8")
    flags = ["--config", str(file)]
    if any(not checkpoint_error(folder) for folder in checkpoints(run_dir)):
        flags += ["--resume-from-checkpoint", "latest"]
    if train_script.main(flags):
        raise ValueError(f"{run_dir}: the run failed")


def bits_by_epoch(run_dir: Path) -> list[float]:
    """Return held-out bits per byte after each epoch of a run."""
    lines = (run_dir / LOG_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["eval_bits_per_byte"] for row in rows if "eval_bits_per_byte" in row]


def print_row(title: str, run_dirs: list[Path]) -> None:
    """Print the means over some runs, and each run's last and best epoch."""
    curves = [bits_by_epoch(run_dir) for run_dir in run_dirs]
    last = statistics.fmean(curve[-1] for curve in curves)
    best = statistics.fmean(min(curve) for curve in curves)
    each = ", ".join(f"{curve[-1]:.4f} ({min(curve):.4f})" for curve in curves)
    plan = json.loads((run_dirs[0] / METRICS_FILE).read_text(encoding="utf-8"))["plan"]
    print(
        f"{title:20}{plan['parameters']:11,}{plan['words']:12,}   {last:.4f} ({best:.4f}): {each}"
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    output = Path("models/distillation-quality")
    add("--data-dir", type=Path, default=Path("data"), help="holds train/ and dev/")
    add("--words", type=int, default=20_000, help="of each training file")
    add("--output", type=Path, default=output, help="directory of the runs")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the students")
    add("--teacher-epochs", type=int, default=6, help="default 6")
    add("--epochs", type=int, default=10, help="of the students (default 10)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--top-k", type=int, default=128, help="tokens kept per position (default 128)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which students")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        check_at_least(args, {"words": 5, "teacher_epochs": 1, "epochs": 1, "top_k": 1})
        prepare(args)
        for name, model in TEACHERS.items():
            train(make_config(args, name, model, args.teacher_epochs, 0, None))
        rows = {name: [args.output / name] for name in TEACHERS}
        for way in args.ways:
            rows[way] = [args.output / f"{way}-{seed}" for seed in args.seeds]
            for seed, run_dir in zip(args.seeds, rows[way], strict=True):
                train(make_config(args, run_dir.name, STUDENT, args.epochs, seed, WAYS[way]))

        columns = f"\n{'':20}{'parameters':>11}{'words seen':>12}"
        print(f"{columns}   bits per byte after the last epoch (the best epoch)")
        for title, run_dirs in rows.items():
            print_row(title, run_dirs)

    return run_script(body, interrupted="interrupted; run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
