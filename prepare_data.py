"""Turn downloaded BabyLM directories into the clean files that training reads, and train the tokenizer on them.

    python prepare_data.py --babylm-10m ./raw/train_10M --babylm-dev ./raw/dev --tokenizer-vocab 16000
    python prepare_data.py --babylm-100m ./raw/train_100M --babylm-dev ./raw/dev --clean-domains open_subtitles,childes
    python prepare_data.py --babylm-dev ./raw/dev --skip-tokenizer

Every document is cleaned by the cleaner of its domain (the name of its file) and then by the general one, and goes to
<output-dir>/train/<domain>.train or <output-dir>/dev/<domain>.dev, two blank lines between documents. A table says what
came out; manifest.json records sources, outputs, counts and hashes. The word budget of the track and the overlap of
train and dev (whole documents, and runs of 13 words) are reported, not enforced. Text streams through in pieces,
nothing in the output directory changes before all of it is ready, and the same input gives the same files.

It does not download, deduplicate or split data, and it does not overwrite a file that it did not write.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from babyllama.data.cleaners import CLEANER_VERSION, clean_text, create_cleaner_registry
from babyllama.data.documents import clean_pieces, domain_of, find_files, new_report, read_documents
from babyllama.data.overlap import NGRAM, Overlap
from babyllama.data.tokenizer import load_tokenizer
from babyllama.files import exclusive_folder, sha256, write_json
from babyllama.schema import TRACKS
from train_tokenizer import check_request, summary_text, train_on_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer


BATCH_PIECES = 128  # handed to the tokenizer at once when tokens are counted
REPAIRS = (
    "empty_files",
    "bom_removed",
    "nul_removed",
    "surrogates_replaced",
    "invalid_bytes",
    "first_invalid",
)
ROW = "{:<18} {:>9} {:>12} {:>13} {:>12} {:>9} {:>9}"


def clean_fully(cleaner: Callable[[str], str] | None, text: str) -> str:
    """`text` after the cleaner of its domain, if there is one, and the general one."""
    return clean_text(cleaner(text) if cleaner else text)


def clean_files(
    files: list[Path], cleaner: Callable | None, target: Path, overlap: Overlap | None, bar
) -> dict:
    """Clean all files of one domain into `target` (no cleaner: copy); returns the record for the manifest."""
    sources, documents, words, kept = [], 0, 0, 0
    with open(target, "wb") as out:
        for path in files:
            report, seen = new_report(), 0
            read = read_documents(path, report)
            for piece in clean_pieces(read, cleaner) if cleaner else read:
                if piece.first:
                    out.write(b"\n\n\n" if documents else b"")
                    documents += 1
                kept += out.write(piece.text.encode())
                lower = piece.text.lower().split()
                words += len(lower)
                if overlap:
                    overlap.add(lower, piece.last)
                bar.update(report["bytes_on_disk"] - seen)
                seen = report["bytes_on_disk"]
            facts = {
                "path": str(path),
                "sha256": sha256(path),
                "bytes": path.stat().st_size,
                "read": report,
            }
            sources.append(facts)
        out.write(b"\n" if documents else b"")
    return {
        "file": f"{target.parent.name}/{target.name}",
        "sha256": sha256(target),
        "bytes": target.stat().st_size,
        "documents": documents,
        "documents_left_empty": sum(source["read"]["documents"] for source in sources) - documents,
        "words": words,
        "tokens": None,
        "text_bytes_read": sum(source["read"]["bytes"] for source in sources),
        "text_bytes_kept": kept,
        "sources": sources,
    }


def count_tokens(path: Path, backend: Tokenizer) -> int:
    """Tokens of the text of one prepared file, read as training reads it; <s> and </s> are not counted."""
    texts = (piece.text for piece in read_documents(path))
    tokens = 0
    while batch := list(islice(texts, BATCH_PIECES)):
        tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return tokens


def find_sources(args: argparse.Namespace) -> dict[str, dict[str, list[Path]]]:
    """The input files by split and domain, dev first as the overlap check wants it; checks the flags on the way."""
    directories = {"dev": args.babylm_dev, "train": args.babylm_10m or args.babylm_100m}
    if not any(directories.values()):
        raise ValueError(
            "nothing to prepare: give --babylm-10m DIR or --babylm-100m DIR, and --babylm-dev DIR"
        )
    sources: dict[str, dict[str, list[Path]]] = {}
    for split, directory in directories.items():
        if directory is None:
            continue
        written = [(args.output_dir / split).resolve() for split in directories]
        if any(folder.is_relative_to(directory.resolve()) for folder in written):
            raise ValueError(f"{directory} holds --output-dir {args.output_dir}, so that what is written would be read "
                             "the next time; choose another --output-dir")  # fmt: skip
        sources[split] = {}
        for path in find_files(directory, split):
            sources[split].setdefault(domain_of(path), []).append(path)
    return sources


def choose_cleaners(
    sources: dict[str, dict[str, list[Path]]], wanted: list[str] | None
) -> dict[str, Callable]:
    """Domain -> its cleaner, for the domains of the input that have one (only the `wanted` ones when given)."""
    registry = create_cleaner_registry()
    domains = sorted({domain for by_domain in sources.values() for domain in by_domain})
    cleaners = {domain: registry[domain] for domain in domains if domain in registry}
    for domain in sorted(set(domains) - set(registry)):
        print(f"note: no cleaner for domain {domain!r}, only the general one", file=sys.stderr)
    if wanted is None:
        return cleaners
    names = [name for name in re.split(r"[,\s]+", " ".join(wanted)) if name]
    if unknown := [name for name in names if name not in cleaners]:
        there = ", ".join(cleaners) or "no domain with a cleaner"
        raise ValueError(
            f"--clean-domains {', '.join(unknown)}: not in the input, which has {there}"
        )
    return {name: cleaners[name] for name in names}


def read_manifest(path: Path) -> tuple[dict, dict[str, str]]:
    """The manifest of an earlier run (or an empty one) and file -> SHA-256 of all that it recorded."""
    if not path.exists():
        return {"splits": {}}, {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        records = [
            record for split in manifest["splits"].values() for record in split["files"].values()
        ]
        return manifest, {record["file"]: record["sha256"] for record in records}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not a manifest of this script; move it or choose another --output-dir"
        ) from None


def earlier_files(output_dir: Path, splits: list[str], recorded: dict[str, str]) -> list[Path]:
    """What an earlier run left in `splits`. Raises ValueError for a file that none wrote, or that was changed since."""
    found = [
        path
        for split in splits
        for path in sorted((output_dir / split).rglob("[!.]*"))
        if path.is_file()
    ]
    foreign = [
        path for path in found if recorded.get(str(path.relative_to(output_dir))) != sha256(path)
    ]
    if foreign:
        names = ", ".join(map(str, foreign))
        raise ValueError(
            f"{names}: not written by this script, or changed since; move away or set another --output-dir"
        )
    return found


def clean_splits(
    sources: dict, cleaners: dict[str, Callable] | None, staging: Path, overlap: Overlap | None
) -> dict:
    """Clean every split into `staging` (`cleaners` None: copy); returns split -> its part of the manifest."""
    from tqdm import tqdm

    splits = {}
    total = sum(
        path.stat().st_size
        for by_domain in sources.values()
        for files in by_domain.values()
        for path in files
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc="cleaning", disable=None) as bar:
        for split, by_domain in sources.items():
            (staging / split).mkdir(parents=True)
            if overlap and split == "train":
                overlap.start_train()
            records = {}
            for domain, files in by_domain.items():
                target = staging / split / f"{domain}.{split}"
                cleaner = None if cleaners is None else partial(clean_fully, cleaners.get(domain))
                records[domain] = clean_files(files, cleaner, target, overlap, bar)
                records[domain]["domain_cleaner"] = domain in (cleaners or {})
            splits[split] = {
                "cleaner_version": None if cleaners is None else CLEANER_VERSION,
                "tokenizer_sha256": None,
                "files": records,
            }
    return splits


def prepare_tokenizer(args: argparse.Namespace, splits: dict, staging: Path) -> dict | None:
    """Train the tokenizer unless told not to, count tokens with it; returns its record, None where there is none."""
    if "train" in splits and not args.skip_tokenizer:
        if not any(record["words"] for record in splits["train"]["files"].values()):
            raise ValueError(
                f"{args.babylm_10m or args.babylm_100m}: no text in it, or none that cleaning left"
            )
        files = [staging / record["file"] for record in splits["train"]["files"].values()]
        print(
            summary_text(
                train_on_files(files, args.tokenizer_vocab, args.tokenizer_output),
                args.tokenizer_vocab,
            )
        )
    elif not args.tokenizer_output.exists():
        return None
    backend = load_tokenizer(args.tokenizer_output).backend_tokenizer
    backend.encode_special_tokens = True  # "</s>" in a text is text
    digest = sha256(args.tokenizer_output)
    for split in splits.values():
        split["tokenizer_sha256"] = digest
        for record in split["files"].values():
            record["tokens"] = count_tokens(staging / record["file"], backend)
    return {
        "path": str(args.tokenizer_output),
        "sha256": digest,
        "vocab_size": backend.get_vocab_size(),
    }


def install(staging: Path, output_dir: Path, splits: dict, earlier: list[Path]) -> None:
    """Move the finished files into place and remove those of an earlier run that have no successor."""
    new = {
        output_dir / record["file"]
        for split in splits.values()
        for record in split["files"].values()
    }
    for path in earlier:
        if path not in new:
            path.unlink()
    for path in sorted(new):
        path.parent.mkdir(exist_ok=True)
        os.replace(staging / path.relative_to(output_dir), path)


def prepare(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Do what the command line asks for; returns the manifest that was written and the splits that are new in it."""
    sources = find_sources(args)
    cleaners = None if args.skip_cleaning else choose_cleaners(sources, args.clean_domains)
    if "train" in sources and not args.skip_tokenizer:
        check_request(args.tokenizer_vocab, args.tokenizer_output)
    with exclusive_folder(args.output_dir, "give another --output-dir"):
        return write_splits(args, sources, cleaners)


def write_splits(
    args: argparse.Namespace, sources: dict, cleaners: dict | None
) -> tuple[dict, list[str]]:
    """The work of `prepare`, after its checks."""
    manifest_file = args.output_dir / "manifest.json"
    manifest, recorded = read_manifest(manifest_file)
    earlier = earlier_files(args.output_dir, list(sources), recorded)
    overlap = Overlap() if len(sources) == 2 else None
    staging = args.output_dir / ".prepare_data"  # nothing outside it changes before all is ready
    shutil.rmtree(staging, ignore_errors=True)
    try:
        splits = clean_splits(sources, cleaners, staging, overlap)
        tokenizer = prepare_tokenizer(args, splits, staging)
        install(staging, args.output_dir, splits, earlier)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    budget = manifest.get("word_budget")  # what this run did not touch keeps its record
    if "train" in splits:
        limit = TRACKS["strict-small" if args.babylm_10m else "strict"]
        words = sum(record["words"] for record in splits["train"]["files"].values())
        budget = {"limit_words": limit, "words": words, "over_budget": words > limit}
    manifest = {
        "splits": manifest["splits"] | splits,
        "tokenizer": tokenizer,
        "word_budget": budget,
        "overlap": name_places(overlap.result(), splits["dev"]["files"]) if overlap else None,
    }
    write_json(manifest_file, manifest)
    return manifest, list(splits)


def name_places(overlap: dict, files: dict[str, dict]) -> dict:
    """The result of Overlap with the shared documents by file and number (from 1) instead of by number alone."""
    names = [
        f"{record['file']} {i}"
        for record in files.values()
        for i in range(1, record["documents"] + 1)
    ]
    return {**overlap, "places": [names[place] for place in overlap["places"]]}


def print_split(split: str, entry: dict) -> None:
    """Print the table of one split: a row for each domain and the total."""
    keys = ("documents", "words", "bytes", "tokens", "text_bytes_read", "text_bytes_kept")
    rows = {
        domain: {key: record[key] or 0 for key in keys} for domain, record in entry["files"].items()
    }
    rows["total"] = {key: sum(row[key] for row in rows.values()) for key in keys}
    print(
        "\n" + ROW.format(split, "documents", "words", "bytes", "tokens", "bytes/tok", "removed %")
    )
    for domain, row in rows.items():
        tokens = f"{row['tokens']:,}" if row["tokens"] else "-"
        ratio = f"{row['text_bytes_kept'] / row['tokens']:.3f}" if row["tokens"] else "-"
        removed = 100 * (1 - row["text_bytes_kept"] / max(1, row["text_bytes_read"]))
        counts = (f"{row[key]:,}" for key in ("documents", "words", "bytes"))
        print(ROW.format(domain, *counts, tokens, ratio, f"{removed:.2f}"))


def print_checks(manifest: dict, splits: list[str]) -> None:
    """Print what was repaired or left out, the word budget and the overlap; warnings go to stderr."""
    for record in [
        record for split in splits for record in manifest["splits"][split]["files"].values()
    ]:
        if record["documents_left_empty"]:
            print(
                f"note: {record['file']}: {record['documents_left_empty']:,} documents were empty after cleaning"
            )
        for source in record["sources"]:
            if repaired := ", ".join(
                f"{key} {source['read'][key]}" for key in REPAIRS if source["read"].get(key)
            ):
                print(f"note: {source['path']}: {repaired}")
    for split in manifest["splits"].keys() - set(splits):
        print(f"note: {split} is that of an earlier run, which this one did not touch")
    if budget := manifest["word_budget"]:
        words, limit = budget["words"], budget["limit_words"]
        print(f"word budget: {words:,} of {limit:,} words")
        if budget["over_budget"]:
            print(
                f"warning: train is {words - limit:,} words over the budget of {limit:,}",
                file=sys.stderr,
            )
    if overlap := manifest["overlap"]:
        shared, total = overlap["dev_documents_in_train"], overlap["dev_documents"]
        print(f"overlap: {shared:,} of {total:,} documents of dev are in train,", end=" ")
        shared, total = overlap["dev_ngrams_in_train"], overlap["dev_ngrams"]
        print(
            f"{shared:,} of {total:,} runs of {NGRAM} words ({100 * shared / max(1, total):.3f} %)"
        )
        if shared > total / 2:
            print(
                "warning: most of dev stands in train too, on which held-out scores flatter",
                file=sys.stderr,
            )
        if overlap["places"]:
            shown = ", ".join(overlap["places"][:10]) + ", ..." * (len(overlap["places"]) > 10)
            print(
                f"warning: documents of dev in train, on which held-out scores flatter: {shown}",
                file=sys.stderr,
            )


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description="Clean BabyLM data, train the tokenizer.")
    add = parser.add_argument
    train = parser.add_mutually_exclusive_group()
    train.add_argument(
        "--babylm-10m",
        "--babylm_10m",
        type=Path,
        metavar="DIR",
        help="train text, strict-small track",
    )
    train.add_argument(
        "--babylm-100m", "--babylm_100m", type=Path, metavar="DIR", help="train text, strict track"
    )
    add("--babylm-dev", "--babylm_dev", type=Path, metavar="DIR", help="held-out text")
    add(
        "--output-dir",
        "--output_dir",
        type=Path,
        default=Path("./data"),
        metavar="DIR",
        help="default ./data",
    )
    add(
        "--tokenizer-vocab",
        "--tokenizer_vocab",
        type=int,
        default=16000,
        metavar="N",
        help="tokens; default 16000",
    )
    add("--tokenizer-output", "--tokenizer_output", type=Path, default=Path("./models/tokenizer.json"), metavar="FILE",
        help="default ./models/tokenizer.json")  # fmt: skip
    cleaning = parser.add_mutually_exclusive_group()
    cleaning.add_argument("--clean-domains", "--clean_domains", nargs="+", metavar="DOMAIN",
        help="clean only these with the cleaner of their domain (commas or spaces between); default all")  # fmt: skip
    cleaning.add_argument(
        "--skip-cleaning", "--skip_cleaning", action="store_true", help="copy the text as it is"
    )
    add(
        "--skip-tokenizer",
        "--skip_tokenizer",
        action="store_true",
        help="train none; count with the existing one",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        manifest, splits = prepare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the output directory is as it was", file=sys.stderr)
        return 130
    for split in splits:
        print_split(split, manifest["splits"][split])
    print_checks(manifest, splits)
    written = [f"{args.output_dir / split}/" for split in splits] + [
        str(args.output_dir / "manifest.json")
    ]
    print(
        f"wrote {', '.join(written)}; tokens are of {(manifest['tokenizer'] or {'path': 'no tokenizer'})['path']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
