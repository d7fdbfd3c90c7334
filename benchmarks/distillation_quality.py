"""Does a student with teachers learn more from the same words? Held-out bits per byte, with and without, over seeds.

    python benchmarks/distillation_quality.py --data-dir data --output models/distillation-quality --seeds 1 2 3

Trains, with train.py's own main: two teachers, a Llama and a GPT-2; then for each seed students of half their size over
the same words: alone, with the teachers (alpha 0.5, T 2, mean per token), and with the teachers in the published scale
(average of logits, batchmean). --data-dir holds train/, dev/ and tokenizer.json; a vocabulary of 4,000 suits the sizes.
Finished runs in --output are shown, not repeated, and one that was interrupted goes on from its last epoch. Prints a
table; it compares students of one size on one text, nothing else.
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
WAYS = {"alone": None, "teachers": {}, "teachers-published": {"average": "logits", "reduction": "batchmean"}}


def train(args, name: str, model: dict, epochs: int, seed: int, distillation: dict | None = None) -> dict:
    """The results of a run of this name, trained now unless it is finished."""
    import runs
    from train import main

    data = args.data_dir
    config = {
        "data": {"tokenizer_path": str(data / "tokenizer.json"), "train_path": str(data / "train"),
                 "eval_path": str(data / "dev"), "seq_length": 128, "eval_samples": 100_000},
        "model": {"name": name, **model},
        "training": {"lr": args.lr, "batch_size": 32, "num_epochs": epochs, "warmup_ratio": 0.05, "seed": seed,
                     "logging_steps": 50},
        "logging": {"output_dir": str(args.output)},
    }  # fmt: skip
    if distillation is not None:
        teachers = [str(args.output / teacher) for teacher in TEACHERS]
        config["distillation"] = {"teachers": teachers, "cache": "top_k", "top_k": args.top_k, **distillation}
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{name}.json"  # JSON is YAML
    file.write_text(json.dumps(config), encoding="utf-8")
    going_on = any(not runs.damage(folder) for folder in runs.checkpoints(args.output / name))
    finished = (args.output / name / runs.METRICS).is_file()
    if code := main(["--config", str(file), *(["--resume_from_checkpoint", "latest"] * (going_on and not finished))]):
        sys.exit(code)
    return json.loads((args.output / name / runs.METRICS).read_text(encoding="utf-8"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds train/, dev/ and tokenizer.json")
    parser.add_argument("--output", type=Path, default=Path("models/distillation-quality"), help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=3, help="default 3")
    parser.add_argument("--epochs", type=int, default=2, help="of the students, with and without teachers (default 2)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of teachers and students (default 1e-3)")
    parser.add_argument("--top-k", type=int, default=128, help="tokens kept for each place (default 128)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which students")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    rows = {name: [train(args, name, model, args.teacher_epochs, 0)] for name, model in TEACHERS.items()}
    for way in args.ways:
        rows[way] = [train(args, f"{way}-{seed}", STUDENT, args.epochs, seed, WAYS[way]) for seed in args.seeds]
    print(f"\n{'':20}{'parameters':>11}{'words seen':>12}   held-out bits per byte: mean, each seed")
    for name, found in rows.items():
        bits = [one["results"]["eval_bits_per_byte"] for one in found]
        each = ", ".join(f"{value:.4f}" for value in bits)
        plan = found[0]["plan"]
        print(f"{name:20}{plan['parameters']:11,}{plan['words']:12,}   {statistics.fmean(bits):.4f}: {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
