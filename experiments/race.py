"""Race one of our configurations against a plain Trainer script: fixed minutes, the same text.

    python experiments/race.py --raw path/to/raw --blimp path/to/blimp/data --output models/race
    python experiments/race.py --data data --minutes 10 --contestants ours plain tuned
    python experiments/race.py --set training.lr=2e-3 --output models/race-lr --contestants ours

--raw names a folder with raw train/ and dev/. Cleaning it is part of the time of every contestant,
who all read the cleaned text. --data names a folder with train/ and dev/ that prepare_data.py has
made. The time is wall time up to the saved model, and each contestant also trains its tokenizer in
it. Nothing is in a cache beforehand: neither tokens nor compiled code.

    ours    train_tokenizer.py and train.py, with --config and training.max_minutes
    plain   plain_trainer.py: the predecessor's recipe, float32
    tuned   plain_trainer.py with the best of four learning rates, whose other runs are not counted,
            in bf16 if this machine has units for it

Then all models are measured alike, in float32: bits per byte of all held-out text, and BLiMP. A
contestant that is finished is not trained or measured again, so the same command continues a race.
Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, USER_ENVIRONMENT, VOCABULARY, run_child

sys.path.insert(0, str(ROOT))  # before an installed package with the name of evaluate.py

from babyllama.cli import Parser, check_at_least, run_script
from babyllama.config import format_yaml, read_yaml_file, set_key
from babyllama.files import read_json, write_json

CONTESTANTS = ("ours", "plain", "tuned")
BLIMP_ADVICE = (
    "BLiMP is skipped: git clone https://github.com/alexwarstadt/blimp, and add --blimp blimp/data "
    "(or make race BLIMP=blimp/data)"
)


# ---- text ---------------------------------------------------------------------------------------


def prepare_text(args: argparse.Namespace) -> tuple[Path, float]:
    """Return the folder of the cleaned text, and the seconds that cleaning took (0 for --data)."""
    if not args.raw:
        return args.data, 0.0
    record = args.output / "cleaning.json"
    folder = args.output / "data"
    if not record.is_file():
        started = time.perf_counter()
        arguments = ["--babylm-10m", args.raw / "train", "--babylm-dev", args.raw / "dev"]
        arguments += ["--output-dir", folder, "--skip-tokenizer"]
        arguments += ["--tokenizer-output", args.output / "none.json"]
        run_ours("prepare_data.py", arguments)
        write_json(record, {"seconds": time.perf_counter() - started})
    return folder, read_json(record)["seconds"]


def run_ours(script: str, arguments: list, **environment: object) -> None:
    """Run one of the scripts; raise ValueError if it fails. Its output goes to stderr."""
    variables = {name: str(value) for name, value in environment.items()}
    code = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        stdout=2,  # stderr
        env=USER_ENVIRONMENT | variables,
        check=False,
    ).returncode
    if code:
        raise ValueError(f"{script} failed with exit code {code}")


# ---- contestants --------------------------------------------------------------------------------


def race_ours(args: argparse.Namespace, data: Path, seconds: float) -> dict:
    """Train --config in what remains of the time after `seconds`; return the run's figures."""
    config = read_yaml_file(args.config)
    for assignment in args.set or ():
        set_key(config, assignment)
    tokenizer = args.output / "tokenizer.json"
    run_dir = args.output / "ours"
    with tempfile.TemporaryDirectory() as caches:
        began = time.time() - seconds
        vocab_size = config["model"].get("vocab_size") or VOCABULARY
        arguments = ["--data-dir", data / "train", "--output", tokenizer]
        arguments += ["--vocab-size", vocab_size, "--prefix-space"]
        run_ours("train_tokenizer.py", arguments)
        minutes = args.minutes - (time.time() - began) / 60
        if minutes <= 0:
            raise ValueError(f"--minutes {args.minutes:g}: cleaning and the tokenizer take longer")
        assignments = [
            *(args.set or ()),
            f"data.tokenizer_path={tokenizer}",
            f"data.train_path={data / 'train'}",
            f"data.eval_path={data / 'dev'}",
            f"logging.output_dir={args.output}",
            f"training.max_minutes={round(minutes, 3)}",
        ]
        arguments = ["--config", args.config, "--model-name", "ours", "--overwrite"]
        arguments += ["--seed", args.seed]
        for assignment in assignments:
            arguments += ["--set", assignment]
        run_ours(
            "train.py",
            arguments,
            BABYLLAMA_CACHE=Path(caches, "tokens"),
            TORCHINDUCTOR_CACHE_DIR=Path(caches, "compiled"),
        )

    # training started when the run recorded its configuration
    start = (run_dir / "training_config.yaml").stat().st_mtime - began
    stopped = 0.0
    curve = []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "eval_loss" in row:
            point = {"minutes": (start + stopped + row["seconds"]) / 60}
            point |= {"tokens": row["tokens"], "bits_per_byte": row["eval_bits_per_byte"]}
            curve.append(point)
            stopped += row["eval_seconds"]
    results = read_json(run_dir / "training_metrics.json")["results"]
    return {
        "model": str(run_dir),
        "steps": results["steps"],
        "tokens": results["tokens_trained"],
        "words": results["words_trained"],
        "seconds": (run_dir / "model.safetensors").stat().st_mtime - began,
        "curve": curve,
    }


def race_plain(
    args: argparse.Namespace, data: Path, seconds: float, name: str, flags: list[str]
) -> dict:
    """Train the plain script in what remains of the time; return the run's figures."""
    run_dir = args.output / name
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    arguments = ["--train", data / "train", "--dev", data / "dev", "--output", run_dir]
    arguments += ["--minutes", args.minutes - seconds / 60, "--seed", args.seed, *flags]
    if args.plain_steps:
        arguments += ["--steps", args.plain_steps]
    figures = run_child(str(ROOT / "experiments/plain_trainer.py"), [*map(str, arguments)])
    curve = read_json(run_dir / "curve.json")
    for point in curve:
        point["minutes"] += seconds / 60
    figures["seconds"] += seconds
    return {**figures, "model": str(run_dir), "curve": curve}


def race_tuned(args: argparse.Namespace, data: Path, seconds: float) -> dict:
    """Train the plain script with every learning rate; return the figures of the best run."""
    import torch

    from babyllama.device import fast_dtype, pick_device

    half = ["--bf16"] if fast_dtype(pick_device()) == torch.bfloat16 else []
    runs = []
    for lr in args.lrs:
        name = f"tuned-{lr:g}"
        flags = ["--lr", str(lr), *half]
        runs.append(finished(args, name, race_plain, args, data, seconds, name, flags))
    return min(runs, key=lambda run: run["curve"][-1]["bits_per_byte"])


def finished(args: argparse.Namespace, name: str, train, *arguments) -> dict:
    """Return the record of a contestant; train it first if there is none."""
    record = args.output / f"{name}.json"
    if not record.is_file():
        print(f"{name}: training", file=sys.stderr)
        write_json(record, train(*arguments))
    return read_json(record)


# ---- measuring ----------------------------------------------------------------------------------


def bits_per_byte(model: Path, dev: Path, passages: int) -> dict:
    """Return bits per byte of the held-out text, in float32, and its interval."""
    from evaluate import ModelEvaluator, draw_passages

    drawn = draw_passages(dev, passages, 0)
    scores = ModelEvaluator(model).calculate_perplexity(drawn.texts, documents=drawn.documents)
    return {key: scores[key] for key in ("bits_per_byte", "bits_per_byte_ci95", "total_bytes")}


def blimp_score(model: Path, blimp: Path) -> dict:
    """Return the accuracy on a folder of BLiMP's files, and its interval."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "blimp.yaml")
        config.write_text(format_yaml({"tasks": {"blimp": {"path": str(blimp.absolute())}}}))
        report = Path(folder, "report.json")
        run_ours("benchmark.py", [model, "--benchmark-config", config, "--output", report])
        (results,) = read_json(report)["results"].values()
    return {key: results["blimp"][key] for key in ("accuracy", "accuracy_ci95", "n")}


def measure(args: argparse.Namespace, run: dict, data: Path) -> dict:
    """Return the figures of a run with those of its model; measure it only once."""
    model = Path(run["model"])
    record = args.output / f"{model.name}-measured.json"
    scores = read_json(record) if record.is_file() else {}
    if "bits_per_byte" not in scores:
        scores |= bits_per_byte(model, data / "dev", args.passages)
        write_json(record, scores)
    if args.blimp and "blimp" not in scores:
        scores["blimp"] = blimp_score(model, args.blimp)
        write_json(record, scores)
    return run | scores


def print_table(runs: dict[str, dict]) -> None:
    """Print the rows that docs/experiments.md takes."""
    print("| contestant | minutes | steps | words | bits per byte | BLiMP |")
    print("|---|---|---|---|---|---|")
    for name, run in runs.items():
        low, high = run["bits_per_byte_ci95"]
        blimp = "-"
        if "blimp" in run:
            accuracy, *ends = (
                f"{100 * value:.1f}"
                for value in (run["blimp"]["accuracy"], *run["blimp"]["accuracy_ci95"])
            )
            blimp = f"{accuracy} ({' to '.join(ends)})"
        print(
            f"| {name} | {run['seconds'] / 60:.1f} | {run['steps']:,} | {run['words']:,} | "
            f"{run['bits_per_byte']:.4f} ({low:.4f} to {high:.4f}) | {blimp} |"
        )


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--raw", type=Path, help="folder with raw train/ and dev/")
    default = Path("data")
    text.add_argument(
        "--data", type=Path, default=default, help="folder with prepared train/ and dev/"
    )
    add("--blimp", type=Path, help="folder of BLiMP's .jsonl files")
    default = ROOT / "config" / "race-30min.yaml"
    add("--config", type=Path, default=default, help="YAML file of ours")
    add("--set", action="append", metavar="SECTION.KEY=VALUE", help="any key of ours")
    add("--minutes", type=float, default=30.0, help="of each contestant (default 30)")
    default = Path("models", "race")
    add("--output", type=Path, default=default, help=f"folder (default {default})")
    add("--picture", type=Path, help="PNG file (default OUTPUT/race.png)")
    default = ["ours", "plain"]
    add("--contestants", nargs="+", choices=CONTESTANTS, default=default, help="who")
    default = [3e-4, 1e-3, 2e-3, 4e-3]
    add("--lrs", type=float, nargs="+", default=default, help="that tuned tries")
    add("--plain-steps", type=int, help="of plain and tuned, instead of as many as fit in the time")
    add("--seed", type=int, default=42, help="of the models (default 42)")
    default = sys.maxsize
    add("--passages", type=int, default=default, help="of held-out text (default all)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the race and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        check_at_least(args, {"minutes": 0, "seed": 0, "passages": 1})
        if args.plain_steps is not None:
            check_at_least(args, {"plain_steps": 1})
        folder = args.raw or args.data
        for path in (folder / "train", folder / "dev", *([args.blimp] if args.blimp else [])):
            if not path.is_dir():
                raise FileNotFoundError(f"{path}: no such folder")
        args.output.mkdir(parents=True, exist_ok=True)
        data, seconds = prepare_text(args)
        runs = {}
        for name in args.contestants:
            if name == "plain":
                arguments = [race_plain, args, data, seconds, name, []]
            else:
                arguments = [race_ours if name == "ours" else race_tuned, args, data, seconds]
            runs[name] = measure(args, finished(args, name, *arguments), data)

        from babyllama.plots import plot_race

        picture = args.picture or args.output / "race.png"
        plot_race({name: run["curve"] for name, run in runs.items()}, picture)
        write_json(args.output / "race.json", runs)
        print_table(runs)
        print(f"curves {picture}, figures {args.output / 'race.json'}")
        if not args.blimp:
            print(BLIMP_ADVICE)

    return run_script(body, interrupted="interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
