"""Train the byte-level BPE tokenizer that every model of this project uses.

    python train_tokenizer.py --data-dir ./data/train --vocab-size 16000
    python train_tokenizer.py --data-dir ./my_text --output ./models/mine/tokenizer.json

The input is the training files of a directory (.train, .txt and .jsonl, gzipped or not), the output
one tokenizer.json. All 256 bytes are in the alphabet and nothing is normalized, so decoding returns
exactly the text that was encoded. <pad>, <s> and </s> have the ids 0, 1 and 2. <s> is added at the
start of every text, and </s> is never added. The same text gives the same file, byte for byte.

With --prefix-space a text that does not start with a space gets one, so that its first word has the
token that it has inside a sentence. The vocabulary is the same; decoding returns the space too.

BabyLM counts the words that a tokenizer was trained on, so <name>.source.json records the files and
their words. If the output is called tokenizer.json, a tokenizer_config.json next to it names the
special tokens. AutoTokenizer, PreTrainedTokenizerFast and GPT2TokenizerFast then load the same
tokenizer from the *directory*.

Text is not cleaned here; use prepare_data.py for that. Note that every Hugging Face tokenizer reads
"</s>" in a text as the special token. To read it as plain characters, set `encode_special_tokens =
True` on a tokenizers.Tokenizer, or pass `split_special_tokens=True` to one of transformers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import babyllama  # noqa: F401  before tokenizers, because it names a package that is missing

# isort: split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from babyllama.cli import Parser, run_script
from babyllama.config import training_command
from babyllama.data.documents import new_report, read_parts
from babyllama.data.text_files import find_files, source_of
from babyllama.data.tokenizer import (
    SPECIAL_TOKENS,
    adds_prefix_space,
    tokenizer_record_path,
    tokenizer_sources,
)
from babyllama.files import check_replaceable, sha256, write_json, write_text

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1_000_000
SAMPLE_BYTES = 4_000_000  # text kept in memory to measure bytes per token afterwards


def run(args: argparse.Namespace) -> int:
    """Train the tokenizer, print a summary, and return the exit code."""
    files = find_files(args.data_dir, "train")
    summary = train_on_files(files, args.vocab_size, args.output, args.prefix_space)
    print(summary_text(summary, args.vocab_size))
    print(f"wrote {args.output}")
    data = {"tokenizer_path": args.output, "train_path": args.data_dir}
    dev = args.data_dir.with_name("dev")
    if dev.is_dir():
        data["eval_path"] = dev
    is_synthetic = args.data_dir.with_name("grammar.json").is_file()
    name = "quickstart.yaml" if is_synthetic else "llama-10M.yaml"
    print(f"next  {training_command(name, **data)}")
    return 0


def check_request(vocab_size: int, output: Path) -> None:
    """Raise ValueError if the vocabulary size is impossible or the output must not be replaced."""
    _check_vocab_size(vocab_size)
    if output.is_dir():
        example = output / "tokenizer.json"
        raise ValueError(f"{output} is a directory; name a file, such as {example}")
    is_ours = output.is_file() and tokenizer_sources(output) is not None
    check_replaceable(output, is_ours, "move it away or name another file")


def _check_vocab_size(vocab_size: int) -> None:
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is not possible: it needs at least "
            f"{MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens) and has at "
            f"most {MAX_VOCAB_SIZE:,}; use 8,000 to 16,000 for 10M words"
        )


def train_on_files(
    files: list[Path], vocab_size: int, output: Path, prefix_space: bool = False
) -> dict[str, float]:
    """Train on the documents of `files`, write `output` and its record, and return a summary.

    The summary has files, bytes (of the text in UTF-8), vocab_size, bytes_per_token (measured on
    about 4 MB, sampled evenly), seconds, and replaces (True if a different tokenizer had this
    name). Raise ValueError if the files have no text, and in the cases of check_request.
    """
    check_request(vocab_size, output)

    # train, and collect the counts and a sample while the text is read
    started = time.monotonic()
    reports: list[dict] = []
    sample: list[str] = []
    tokenizer = train_bpe_tokenizer(_read_texts(files, reports, sample), vocab_size, prefix_space)
    n_bytes = sum(report["bytes"] for report in reports)
    if not n_bytes:
        raise ValueError(f"no text to train on: all files in {files[0].parent} are empty")

    # save the tokenizer with a record of the words it was trained on
    old_text = output.read_text(encoding="utf-8") if output.is_file() else ""
    save_tokenizer(tokenizer, output)
    sources = []
    for file, report in zip(files, reports, strict=True):
        sources.append({**source_of(file), "words": report["words"]})
    record = {"tokenizer_sha256": sha256(output), "sources": sources}
    write_json(tokenizer_record_path(output), record)

    # measure it on the sample
    encodings = tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    return {
        "files": len(files),
        "bytes": n_bytes,
        "vocab_size": tokenizer.get_vocab_size(),
        "bytes_per_token": sum(len(text.encode()) for text in sample) / sum(map(len, encodings)),
        "seconds": time.monotonic() - started,
        "replaces": old_text not in ("", tokenizer.to_str()),
    }


def _read_texts(files: list[Path], reports: list[dict], sample: list[str]) -> Iterator[str]:
    """Yield the text of all files in parts.

    The text is read only once, so on the way the counts of each file are appended to `reports`, and
    an even sample of the parts to `sample`.
    """
    n_bytes = sum(file.stat().st_size for file in files)
    n_sampled = 0
    n_read = 0  # bytes on disk
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for file in files:
            report = new_report()
            file_start = n_read
            for text in read_parts(file, report):
                n_read = file_start + report["bytes_on_disk"]
                bar.update(n_read - bar.n)
                # is the sample behind its share of the bytes read? (bar.n stays 0 without a bar)
                if n_sampled * n_bytes <= SAMPLE_BYTES * n_read:
                    sample.append(text)
                    n_sampled += len(text.encode())
                yield text
            reports.append(report)
        bar.set_description("merging")


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, prefix_space: bool = False
) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, the special ones included.

    The result does not depend on the order of `texts` or on the number of threads, because merges
    with the same count are sorted by token id. A merge needs a pair that occurs twice, so a small
    text can give fewer tokens than `vocab_size`. With `prefix_space` it puts a space before a text
    that does not start with one; the vocabulary is the same. Raise ValueError if `vocab_size` is
    below 259.
    """
    _check_vocab_size(vocab_size)

    # train
    tokenizer = Tokenizer(models.BPE())
    # the GPT-2 split separates "<", "s" and ">", so no merge can spell a special token
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    # the prefix space comes after training, whose texts are parts of documents that need none
    tokenizer.pre_tokenizer.add_prefix_space = prefix_space
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer file and, if it is called tokenizer.json, a tokenizer_config.json.

    transformers only looks for the config next to a file of that name. `unk_token` is null because
    every byte has a token, and because GPT2TokenizerFast would otherwise add "<|endoftext|>".
    Transformers 4 resets `add_prefix_space` in the tokenizer file to the value in this one.
    """
    write_text(path, tokenizer.to_str())
    if path.name == "tokenizer.json":
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **SPECIAL_TOKENS,
            "add_prefix_space": adds_prefix_space(tokenizer),
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
        }
        write_json(path.with_name("tokenizer_config.json"), config)


def summary_text(summary: dict[str, float], vocab_size: int) -> str:
    """Return the lines to print about a tokenizer for which `vocab_size` tokens were requested."""
    lines = [
        f"{summary['files']} files, {summary['bytes'] / 1e6:.2f} MB of text, "
        f"{summary['seconds']:.1f} s",
        f"{summary['vocab_size']} tokens, {summary['bytes_per_token']:.3f} bytes per token (on a "
        f"sample of up to {SAMPLE_BYTES / 1e6:.0f} MB of the training text)",
    ]
    actual_size = summary["vocab_size"]
    if actual_size < vocab_size:
        lines.append(
            f"note: the text gives only {actual_size - MIN_VOCAB_SIZE} merges instead of "
            f"{vocab_size - MIN_VOCAB_SIZE}: choose a vocabulary of {actual_size}, or more text"
        )
    if summary["replaces"]:
        lines.append("note: replaced a different tokenizer; runs that use it cannot be resumed")
    return "\n".join(lines)


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(
        description="Train a byte-level BPE tokenizer on the training files of a directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        default=Path("./data/train"),
        help="directory with the training text",
    )
    add(
        "--vocab-size", type=int, default=16000, help=f"number of tokens, at least {MIN_VOCAB_SIZE}"
    )
    add("--output", type=Path, default=Path("./models/tokenizer.json"), help="file to write")
    add("--prefix-space", action="store_true", help="put a space before the first word of a text")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)
    return run_script(lambda: run(args), memory_advice="use less text")


if __name__ == "__main__":
    sys.exit(main())
