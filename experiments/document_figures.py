"""Draw the pictures of README.md and TRAINING_GUIDE.md from the logs of real runs.

    make quickstart
    python train.py --config config/quickstart.yaml --model-name learning-rates \\
        --set training.optimizer=adamw --sweep experiments/learning_rates.yaml
    python experiments/document_figures.py

Reads metrics.jsonl and training_metrics.json of the finished runs under models/ and writes
docs/quickstart_curve.png and docs/learning_rates.png. It trains nothing itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from common import ROOT

from babyllama.cli import Parser, run_script
from babyllama.plots import BLUE, GREEN, GREY, ORANGE, draw_gap, draw_loss, new_figure


def read_log(run_dir: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def entropy_in_nats(run_dir: Path) -> float:
    """Return the entropy of the grammar of a run's text, in nats per token."""
    results = json.loads((run_dir / "training_metrics.json").read_text(encoding="utf-8"))["results"]
    bytes_per_token = results["eval_bytes"] / results["eval_tokens"]
    return results["floor_bits_per_byte"] * math.log(2) * bytes_per_token


def save(figure, file: Path) -> None:
    """Save a small PNG and print its size."""
    figure.savefig(file, dpi=90)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def draw_quickstart(run_dir: Path, file: Path) -> None:
    """Draw the loss of the quick start against tokens, and how close it comes to the entropy."""
    rows = read_log(run_dir)
    entropy = entropy_in_nats(run_dir)
    figure, ((loss_axis, gap_axis),) = new_figure(1, 2, 8.5, 3)
    draw_loss(loss_axis, rows, entropy)
    draw_gap(gap_axis, rows, entropy)
    save(figure, file)


def draw_learning_rates(sweep_dir: Path, file: Path) -> None:
    """Draw the training loss of each run of a sweep over training.lr, against steps."""
    sweep = json.loads((sweep_dir / "sweep.json").read_text(encoding="utf-8"))
    figure, ((axis,),) = new_figure(1, 1, 8.5, 3)
    for run, colour in zip(sweep["runs"], (GREY, BLUE, GREEN, ORANGE), strict=True):
        rows = [row for row in read_log(sweep_dir / run["name"]) if "loss" in row]
        name = f"{run['values']['training.lr']:g}: held-out {run['eval_bits_per_byte']:.3f}"
        steps = [row["step"] for row in rows]
        axis.plot(steps, [row["loss"] for row in rows], color=colour, label=name)
    entropy = entropy_in_nats(sweep_dir / sweep["best"])
    axis.axhline(entropy, color="black", ls="--", lw=1, label="entropy of the grammar")
    axis.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(1.5, None))
    title = "peak learning rate: bits per byte"
    axis.legend(frameon=False, title=title, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, file)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default=str(ROOT / "docs"), help="where the PNG files go")
    parser.add_argument("--models-dir", default=str(ROOT / "models"), help="where the runs are")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        models = Path(args.models_dir)
        draw_quickstart(models / "quickstart", Path(args.output_dir) / "quickstart_curve.png")
        draw_learning_rates(
            models / "learning-rates-sweep", Path(args.output_dir) / "learning_rates.png"
        )

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
