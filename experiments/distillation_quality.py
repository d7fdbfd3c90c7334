"""Does a student with teachers learn more from the same words? Held-out bits per byte, with and without, over seeds.

    python experiments/distillation_quality.py --data-dir data --output models/distillation-quality --seeds 1 2 3

Takes the first words of each text (--words of train, a fifth of it of dev), makes a tokenizer of 4,000 tokens, and
trains, with train.py's own main: two teachers, a Llama and a GPT-2; then for each seed students of half their size over
the same words: alone, with the teachers (alpha 0.5, T 2, mean per token), and with the teachers in the published scale
(average of logits, batchmean). Finished runs in --output are shown, not repeated, and one that was interrupted goes on
from its last epoch. Prints a table; it compares students of one size on one text, nothing else.

Text that is read many times over is learned by heart, so beside the last epoch stands the best one of each run, what
a student would have got that had stopped there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEACHERS = {
    "teacher-llama": {"type": "Llama", "hidden_size": 192, "n_layer": 5, "n_head": 6},
    "teacher-gpt2": {"type": "GPT2", "hidden_size": 192, "n_layer": 5, "n_head": 6, "tie_word_embeddings": True,
                     "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}  # fmt: skip
STUDENT = {"type": "Llama", "hidden_size": 128, "n_layer": 4, "n_head": 4}
VOCABULARY = 4000
WAYS = {
    "alone": None,
    "teachers": {},
    "teachers-published": {"average": "logits", "reduction": "batchmean"},
}


def cut(source: Path, target: Path, words: int) -> None:
    """Write the first `words` of each file of a folder under the same name."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        kept, left = [], words
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if (n := len(line.split())) > left:
                    kept.append(" ".join(line.split(" ")[:left]) + "\n")
                    break
                kept.append(line)
                left -= n
        (target / file.name).write_text("".join(kept), encoding="utf-8")


def prepare(args) -> None:
    """The text and the tokenizer of all runs, in --output."""
    import train_tokenizer

    for split, words in (("train", args.words), ("dev", args.words // 5)):
        cut(args.data_dir / split, args.output / split, words)
    tokenizer = ["--output", str(args.output / "tokenizer.json"), "--vocab-size", str(VOCABULARY)]
    if code := train_tokenizer.main(["--data-dir", str(args.output / "train"), *tokenizer]):
        sys.exit(code)


def bits_by_epoch(folder: Path) -> list[float]:
    """Held-out bits per byte after each epoch of a run."""
    from babyllama.training.run_dir import LOG_FILE

    rows = map(json.loads, (folder / LOG_FILE).read_text(encoding="utf-8").splitlines())
    return [row["eval_bits_per_byte"] for row in rows if "eval_bits_per_byte" in row]


def train(
    args, name: str, model: dict, epochs: int, seed: int, distillation: dict | None = None
) -> dict:
    """The results of a run of this name, trained now unless it is finished."""
    from babyllama.training.run_dir import METRICS_FILE, checkpoint_error, checkpoints
    from train import main

    out = args.output
    config = {
        "data": {"tokenizer_path": str(out / "tokenizer.json"), "train_path": str(out / "train"),
                 "eval_path": str(out / "dev"), "seq_length": 128, "eval_samples": 100_000},
        "model": {"name": name, **model},
        "training": {"lr": args.lr, "batch_size": 8, "num_epochs": epochs, "warmup_ratio": 0.05, "seed": seed,
                     "logging_steps": 50},
        "logging": {"output_dir": str(args.output)},
    }  # fmt: skip
    if distillation is not None:
        teachers = [str(args.output / teacher) for teacher in TEACHERS]
        config["distillation"] = {
            "teachers": teachers,
            "cache": "top_k",
            "top_k": args.top_k,
            **distillation,
        }
    file = args.output / f"{name}.json"  # JSON is YAML
    file.write_text(json.dumps(config), encoding="utf-8")
    going_on = any(not checkpoint_error(folder) for folder in checkpoints(args.output / name))
    finished = (args.output / name / METRICS_FILE).is_file()
    if code := main(
        [
            "--config",
            str(file),
            *(["--resume_from_checkpoint", "latest"] * (going_on and not finished)),
        ]
    ):
        sys.exit(code)
    return json.loads((args.output / name / METRICS_FILE).read_text(encoding="utf-8"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds train/ and dev/")
    parser.add_argument(
        "--words", type=int, default=20_000, help="of each file in train/ (default 20,000)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("models/distillation-quality"), help="where the runs go"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=6, help="default 6")
    parser.add_argument("--epochs", type=int, default=10, help="of the students (default 10)")
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="of teachers and students (default 1e-3)"
    )
    parser.add_argument(
        "--top-k", type=int, default=128, help="tokens kept for each place (default 128)"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which students"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    prepare(args)
    rows = {
        name: [train(args, name, model, args.teacher_epochs, 0)] for name, model in TEACHERS.items()
    }
    for way in args.ways:
        rows[way] = [
            train(args, f"{way}-{seed}", STUDENT, args.epochs, seed, WAYS[way])
            for seed in args.seeds
        ]
    print(
        f"\n{'':20}{'parameters':>11}{'words seen':>12}   bits per byte after the last epoch (the best epoch)"
    )
    for name, found in rows.items():
        names = [name] if name in TEACHERS else [f"{name}-{seed}" for seed in args.seeds]
        curves = [bits_by_epoch(args.output / one) for one in names]
        each = ", ".join(f"{curve[-1]:.4f} ({min(curve):.4f})" for curve in curves)
        last, best = (
            statistics.fmean(pick(curve) for curve in curves)
            for pick in (lambda curve: curve[-1], min)
        )
        plan = found[0]["plan"]
        print(
            f"{name:20}{plan['parameters']:11,}{plan['words']:12,}   {last:.4f} ({best:.4f}): {each}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
