"""Time the path from text files to token chunks on disk, beside the bare tokenizer.

    python experiments/data_speed.py --data-dir data/train --tokenizer models/tokenizer.json

Three ways, each in its own process, one after the other, --repeats times: the tokenizer alone on
text in memory; DataProcessor.prepare_dataset from files to an Arrow file with an empty cache; the
same with clean=True. Prints median, minimum and maximum of MB/s, the ratio to the tokenizer alone
and the peak memory. It measures neither training nor prepare_data.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import VOCABULARY, run_child, spread

from babyllama.cli import Parser, check_at_least, run_script

WAYS = {"bare": "tokenizer alone", "raw": "prepare_dataset", "clean": "prepare_dataset, clean=True"}
BATCH = 48  # texts that the tokenizer encodes at a time


def read_texts(data_dir: str) -> list[str]:
    """Return the text of all training files, in parts of bounded size."""
    from babyllama.data.documents import read_parts
    from babyllama.data.text_files import find_files

    return [text for path in find_files(data_dir, "train") for text in read_parts(path)]


def measure(way: str, data_dir: str, tokenizer_file: str) -> dict:
    """Return {"seconds", "bytes", "peak_rss_bytes"} of one way; bytes are those of the files."""
    import datasets  # noqa: F401  its import is not timed

    from babyllama.data.text_files import find_files
    from babyllama.data.tokenizer import load_tokenizer
    from data_utils import DataProcessor

    tokenizer = load_tokenizer(tokenizer_file)
    n_bytes = sum(path.stat().st_size for path in find_files(data_dir, "train"))
    with tempfile.TemporaryDirectory() as folder:
        if way == "bare":
            texts = read_texts(data_dir)
            encode = tokenizer.backend_tokenizer.encode_batch_fast
            start = time.perf_counter()
            for i in range(0, len(texts), BATCH):
                encode(texts[i : i + BATCH], add_special_tokens=False)
        else:
            held_out = Path(folder, "held_out.dev")
            held_out.write_text("a few words of text. " * 100, encoding="utf-8")
            processor = DataProcessor(tokenizer, cache_dir=folder)
            start = time.perf_counter()
            processor.prepare_dataset(data_dir, str(held_out), clean=way == "clean")
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"seconds": seconds, "bytes": n_bytes, "peak_rss_bytes": peak}


def train_stand_in(data_dir: str, file: Path) -> None:
    """Train a tokenizer of 16,000 tokens on the data."""
    from train_tokenizer import train_bpe_tokenizer

    print(f"training a tokenizer of {VOCABULARY:,} tokens", file=sys.stderr)
    train_bpe_tokenizer(read_texts(data_dir), vocab_size=VOCABULARY).save(str(file))


def compare(data_dir: str, tokenizer_file: str, repeats: int) -> None:
    """Measure the three ways and print the table."""
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way, title in WAYS.items():
            print(f"{repeat + 1}/{repeats}: {title}", file=sys.stderr)
            paths = ["--data-dir", data_dir, "--tokenizer", tokenizer_file]
            runs[way].append(run_child(__file__, ["--measure", way, *paths]))

    megabytes = runs["bare"][0]["bytes"] / 1e6
    print(f"{megabytes:.1f} MB of text, {repeats} repeats: median (minimum to maximum)")
    speeds = {way: [megabytes / run["seconds"] for run in runs[way]] for way in WAYS}
    for way, title in WAYS.items():
        pairs = zip(speeds[way], speeds["bare"], strict=True)
        ratio = statistics.median(ours / bare for ours, bare in pairs)
        peak = max(run["peak_rss_bytes"] for run in runs[way]) / 1e6
        print(f"{title:28} {spread(speeds[way])} MB/s, ratio {ratio:.2f}, peak {peak:.0f} MB")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-dir", default="data/train", help="directory of training text")
    add("--tokenizer", help="tokenizer.json (default: trained on the data)")
    add("--repeats", type=int, default=3, help="turns of each way (default 3)")
    add("--measure", choices=WAYS, help="measure one way here and print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        check_at_least(args, {"repeats": 1})
        if args.measure:
            print(json.dumps(measure(args.measure, args.data_dir, args.tokenizer)))
            return
        with tempfile.TemporaryDirectory() as folder:
            tokenizer_file = args.tokenizer
            if tokenizer_file is None:
                tokenizer_file = str(Path(folder, "tokenizer.json"))
                train_stand_in(args.data_dir, Path(tokenizer_file))
            compare(args.data_dir, tokenizer_file, args.repeats)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
