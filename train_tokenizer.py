"""Train the byte-level BPE tokenizer that every model of this project uses.

    python train_tokenizer.py --data-dir ./data/train --vocab-size 16000 --output ./models/tokenizer.json

It reads the training files of a directory (.train, .txt, .jsonl, each also gzipped) and writes one tokenizer.json. All
256 bytes are in the alphabet and nothing is normalised, so any Unicode text survives the round trip. <pad>, <s>, </s>
are the ids 0, 1, 2; <s> is put in front of every text, </s> is never appended. The same text gives the same file, byte
for byte. <name>.source.json beside it lists the files it was learned from and their words, which BabyLM counts. By a
file called tokenizer.json lies also a small tokenizer_config.json that names the special tokens, so that AutoTokenizer,
PreTrainedTokenizerFast and GPT2TokenizerFast load the *directory* of the file to the same ids.

It does not clean text (prepare_data.py does). A text that spells a special token, such as "</s>", is read as that
token, as with every Hugging Face tokenizer; `encode_special_tokens = True` on a tokenizers.Tokenizer, or
`split_special_tokens=True` in transformers, has it read as plain characters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from babyllama.data.documents import find_files, new_report, read_documents, source_of
from babyllama.data.tokenizer import SPECIAL_TOKENS, tokenizer_record_path, tokenizer_sources
from babyllama.files import sha256, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer


MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1_000_000
SAMPLE_BYTES = 4_000_000  # text kept in memory to measure bytes per token afterwards


def check_request(vocab_size: int, output: Path | None = None) -> None:
    """Raise ValueError for a vocabulary that cannot hold the bytes, or an output that is a folder or another's file."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocabulary of {vocab_size} tokens: it must be at least {MIN_VOCAB_SIZE} (256 bytes and the "
            f"{len(SPECIAL_TOKENS)} special tokens) and at most {MAX_VOCAB_SIZE:,}; 8,000 to 16,000 suit 10M words"
        )
    if output is not None and output.exists() and not output.is_file():
        what = "a directory" if output.is_dir() else "no regular file"
        raise ValueError(
            f"{output} is {what}; name the tokenizer file, such as {output / 'tokenizer.json'}"
        )
    if (
        output is not None
        and output.is_file()
        and output.stat().st_size
        and tokenizer_sources(output) is None
    ):
        raise ValueError(
            f"{output}: no record that this script wrote it as it is; move it away or name another file"
        )


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens (256 bytes and the special tokens included).

    The order of `texts` does not matter and merges of equal count are settled by token id, so equal text gives an equal
    tokenizer whatever the number of threads. A merge needs a pair that occurs twice: a small text can give fewer tokens
    than asked for, see `tokenizer.get_vocab_size()`. Raises ValueError when `vocab_size` is below 259.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    check_request(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    # The GPT-2 split: it keeps "<", "s" and ">" apart, so that no merge can build the string of a special token.
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
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer file and, where transformers can find it, the configuration that names the special tokens.

    transformers looks for tokenizer_config.json only beside a file called tokenizer.json. `unk_token` is null because
    every byte is known, and because GPT2TokenizerFast would otherwise add "<|endoftext|>", one token too many.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, tokenizer.to_str())
    if path.name == "tokenizer.json":
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **SPECIAL_TOKENS,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
        }
        write_text(path.with_name("tokenizer_config.json"), json.dumps(config, indent=2) + "\n")


def train_on_files(files: list[Path], vocab_size: int, output: Path) -> dict[str, float]:
    """Train on the documents of `files` and write `output`; returns what was read and what came out.

    Keys: files, bytes (UTF-8 bytes of the text read), vocab_size, bytes_per_token (on an even sample of about 4 MB),
    seconds, and replaces (whether another tokenizer had this name). Raises ValueError when there is no text; see also
    `check_request`.
    """
    check_request(vocab_size, output)
    started = time.monotonic()
    sample: list[str] = []
    counted = {"bytes": 0, "sources": []}
    tokenizer = train_bpe_tokenizer(_texts_with_progress(files, sample, counted), vocab_size)
    if not counted["bytes"]:
        raise ValueError(f"no text to train on: {files[0].parent} has only empty files")
    replaces = output.is_file() and output.read_text(encoding="utf-8") not in (
        "",
        tokenizer.to_str(),
    )
    save_tokenizer(tokenizer, output)
    record = {"tokenizer_sha256": sha256(output), "sources": counted["sources"]}
    write_text(tokenizer_record_path(output), json.dumps(record, indent=1) + "\n")
    tokens = sum(
        len(encoding) for encoding in tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    )
    return {
        "files": len(files),
        "bytes": counted["bytes"],
        "vocab_size": tokenizer.get_vocab_size(),
        "bytes_per_token": sum(len(text.encode()) for text in sample) / tokens,
        "seconds": time.monotonic() - started,
        "replaces": replaces,
    }


def _texts_with_progress(files: list[Path], sample: list[str], counted: dict) -> Iterator[str]:
    """Yield the pieces of all documents, keep an even sample of them and count bytes, and words by file, on the way."""
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in files)
    sampled = before = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for file in files:
            report = new_report()
            for piece in read_documents(file, report):
                n_bytes, read = (
                    len(piece.text.encode()),
                    before + report["bytes_on_disk"],
                )  # less where compressed
                if sampled * total <= SAMPLE_BYTES * read:
                    sample.append(piece.text)
                    sampled += n_bytes
                counted["bytes"] += n_bytes
                bar.update(read - bar.n)
                yield piece.text
            before += report["bytes_on_disk"]
            counted["sources"].append({**source_of(file), "words": report["words"]})
        bar.set_description("merging")


def summary_text(summary: dict[str, float], vocab_size: int) -> str:
    """The lines that say what came out of `train_on_files` when `vocab_size` tokens were asked for."""
    lines = [
        f"{summary['files']} files, {summary['bytes'] / 1e6:.2f} MB of text, {summary['seconds']:.1f} s",
        f"{summary['vocab_size']} tokens, {summary['bytes_per_token']:.3f} bytes per token"
        f" (on a sample of up to {SAMPLE_BYTES / 1e6:.0f} MB of the training text)",
    ]
    if (reached := summary["vocab_size"]) < vocab_size:
        lines.append(
            f"note: {vocab_size} tokens were asked for, but the text gives only {reached - MIN_VOCAB_SIZE} merges"
            f" instead of {vocab_size - MIN_VOCAB_SIZE}: ask for {reached} tokens or use more text"
        )
    if summary["replaces"]:
        lines.append(
            "note: another tokenizer had this name: runs that were made with it cannot be taken up again"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer on the training files of a directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir",
        "--data_dir",
        type=Path,
        default=Path("./data/train"),
        help="directory with the training text",
    )
    parser.add_argument(
        "--vocab-size",
        "--vocab_size",
        type=int,
        default=16000,
        help="number of tokens, at least 259",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("./models/tokenizer.json"), help="file to write"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        summary = train_on_files(find_files(args.data_dir, "train"), args.vocab_size, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary_text(summary, args.vocab_size))
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
