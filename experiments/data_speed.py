"""How fast text becomes chunks of tokens on disk, against the bare tokenizer on the same text in the same run.

    python experiments/data_speed.py --data-dir data/train --tokenizer models/tokenizer.json --repeats 5

Three ways, one after the other, each in a process of its own, --repeats times over: the tokenizer alone on pieces
that are in memory already; DataProcessor.prepare_dataset from files to an Arrow file, nothing cached, as the text is;
the same with clean=True. Prints median, minimum and maximum of MB/s, the ratio to the tokenizer alone and the peak
memory. It says nothing of training or of prepare_data.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WAYS = {"bare": "tokenizer alone", "raw": "prepare_dataset", "clean": "prepare_dataset, clean=True"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", "--data_dir", default="data/train", help="folder with training text"
    )
    parser.add_argument(
        "--tokenizer", help="tokenizer.json (default: one of 16,000 tokens is trained on the data)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often each way is measured")
    parser.add_argument(
        "--measure", choices=WAYS, help="measure one way in this process and print it as JSON"
    )
    return parser


def measure(way: str, data_dir: str, tokenizer_file: str) -> dict:
    """{"seconds", "bytes", "peak_rss_bytes"} of one way; bytes are those of the files' text, as read."""
    import datasets  # noqa: F401  importing it is no part of what is timed

    from babyllama.data.documents import find_files, read_documents
    from babyllama.data.tokenizer import load_tokenizer
    from data_utils import BATCH, DataProcessor

    tokenizer = load_tokenizer(tokenizer_file)
    n_bytes = sum(path.stat().st_size for path in find_files(data_dir, "train"))
    with tempfile.TemporaryDirectory() as folder:
        if way == "bare":
            texts = [
                piece.text
                for path in find_files(data_dir, "train")
                for piece in read_documents(path)
            ]
            start = time.perf_counter()
            for i in range(0, len(texts), BATCH):
                tokenizer.backend_tokenizer.encode_batch_fast(
                    texts[i : i + BATCH], add_special_tokens=False
                )
        else:
            held_out = Path(folder, "held_out.dev")
            held_out.write_text("a few words of text. " * 100, encoding="utf-8")
            processor = DataProcessor(tokenizer, cache_dir=folder)
            start = time.perf_counter()
            processor.prepare_dataset(data_dir, str(held_out), clean=way == "clean")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"seconds": seconds, "bytes": n_bytes, "peak_rss_bytes": peak}


def train_tokenizer(data_dir: str, file: Path) -> None:
    from babyllama.data.documents import find_files, read_documents
    from train_tokenizer import train_bpe_tokenizer

    print("training a tokenizer of 16,000 tokens", file=sys.stderr)
    texts = (piece.text for path in find_files(data_dir, "train") for piece in read_documents(path))
    train_bpe_tokenizer(texts, vocab_size=16_000).save(str(file))


def compare(data_dir: str, tokenizer_file: str, repeats: int) -> None:
    """Measure the ways in turn and print the table."""
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            print(f"{repeat + 1}/{repeats}: {WAYS[way]}", file=sys.stderr)
            command = [
                sys.executable,
                __file__,
                "--measure",
                way,
                "--data-dir",
                data_dir,
                "--tokenizer",
                tokenizer_file,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise ValueError(f"measuring {WAYS[way]} failed with exit code {done.returncode}")
            found[way].append(json.loads(done.stdout))
    print(f"{found['bare'][0]['bytes'] / 1e6:.1f} MB of text, {repeats} repeats: median (min-max)")
    base = [run["bytes"] / 1e6 / run["seconds"] for run in found["bare"]]
    for way, runs in found.items():
        speeds = [run["bytes"] / 1e6 / run["seconds"] for run in runs]
        ratio = statistics.median(ours / bare for ours, bare in zip(speeds, base, strict=True))
        print(
            f"{WAYS[way]:28} {statistics.median(speeds):6.2f} ({min(speeds):.2f}-{max(speeds):.2f}) MB/s   "
            f"ratio {ratio:.2f}   peak RSS {max(run['peak_rss_bytes'] for run in runs) / 1e6:.0f} MB"
        )


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        if args.repeats < 1:
            raise ValueError(f"--repeats {args.repeats}: at least 1 is needed")
        if args.measure:
            print(json.dumps(measure(args.measure, args.data_dir, args.tokenizer)))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            tokenizer_file = args.tokenizer or str(Path(folder, "tokenizer.json"))
            if not args.tokenizer:
                train_tokenizer(args.data_dir, Path(tokenizer_file))
            compare(args.data_dir, tokenizer_file, args.repeats)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
