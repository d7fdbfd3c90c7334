"""Turn downloaded BabyLM directories into clean text files and a tokenizer.

    python prepare_data.py --babylm-10m ./raw/train_10M --babylm-dev ./raw/dev
    python prepare_data.py --babylm-100m ./raw/train_100M --clean-domains open_subtitles,childes
    python prepare_data.py --babylm-dev ./raw/dev --skip-tokenizer
    python prepare_data.py --babylm-10m ./my_books --domain novels=gutenberg

The name of a file is its domain, such as childes or open_subtitles. Each document is cleaned by the
cleaner of its domain, if there is one, and then by the general one; --domain chooses a cleaner for
a domain. The results are <output-dir>/train/<domain>.train
and <output-dir>/dev/<domain>.dev, with two empty lines between documents, and manifest.json, which
records sources, outputs, counts and hashes.

The script prints a table for each split. It also reports how the words compare with the budget of
the track, and how much of dev occurs in train (documents, and runs of 13 words). What to do about
either is up to you.

Text is read as a stream, so a corpus can be larger than memory. The output directory only changes
when everything is ready, and the same input gives the same files. Files that the script did not
write are never replaced. It does not download, deduplicate or split data.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path

import babyllama  # noqa: F401  before tokenizers, because it names a package that is missing

# isort: split
from tokenizers import Tokenizer
from tqdm import tqdm

from babyllama.cli import Parser, printable, run_script
from babyllama.config import training_command
from babyllama.data.cleaners import CLEANER_VERSION, clean_text, create_cleaner_registry
from babyllama.data.documents import new_report, read_documents, read_parts, rows_joined_text
from babyllama.data.overlap import NGRAM, Overlap
from babyllama.data.text_files import domain_of, find_files
from babyllama.data.tokenizer import adds_prefix_space, document_parts, load_tokenizer, part_backend
from babyllama.files import check_replaceable, exclusive_folder, read_json, sha256, write_json
from babyllama.schema import TRACKS
from train_tokenizer import check_request, summary_text, train_on_files

Sources = dict[str, dict[str, list[Path]]]  # split -> domain -> input files

DOCUMENT_END = b"\n\n\n"
ONE_WORD = 10  # a document of at least so many words that are all the same is reported
BATCH_PARTS = 128  # parts of documents that the tokenizer counts at a time
REPAIRS = (
    "empty_files",
    "bom_removed",
    "nul_removed",
    "surrogates_replaced",
    "invalid_bytes",
    "first_invalid",
)
ROW = "{:<18} {:>9} {:>12} {:>13} {:>12} {:>9} {:>9}"


def run(args: argparse.Namespace) -> int:
    """Prepare the data, print a summary, and return the exit code."""
    manifest, new_splits = prepare(args)
    for split in new_splits:
        print_table(split, manifest["splits"][split]["files"])
    print_repairs(manifest, new_splits)
    print_budget(manifest["word_budget"])
    print_overlap(manifest["overlap"])
    folders = [f"{args.output_dir / split}/" for split in new_splits]
    written = ", ".join([*folders, str(args.output_dir / "manifest.json")])
    tokenizer = manifest["tokenizer"]
    counted = f"tokens counted with {tokenizer['path']}" if tokenizer else "tokens not counted"
    print(f"wrote {written}; {counted}")
    if command := next_command(args):
        print(f"next  {command}")
    return 0


def next_command(args: argparse.Namespace) -> str | None:
    """Return the command to run next: train a model, or first a tokenizer.

    Return None if there is no text to train on, or none to evaluate on.
    """
    train_path = args.output_dir / "train"
    dev_path = args.output_dir / "dev"
    if not train_path.is_dir():
        return None
    if args.skip_tokenizer or not args.tokenizer_output.is_file():
        return shlex.join(["python", "train_tokenizer.py", "--data-dir", str(train_path)])
    if not dev_path.is_dir():
        return None
    name = "llama-10M.yaml"
    if args.babylm_100m:
        name = "babylm-strict.yaml"
    elif args.babylm_10m and args.tokenizer_prefix_space:  # only BabyLM's tasks need the space
        name = "babylm-strict-small.yaml"
    return training_command(
        name, tokenizer_path=args.tokenizer_output, train_path=train_path, eval_path=dev_path
    )


def prepare(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Write the files that the command line asks for; return the manifest and the new splits."""
    # cleaning takes minutes, so check first everything that can be wrong
    sources = find_sources(args)
    if args.skip_cleaning and args.domain:
        raise ValueError("--domain chooses a cleaner, and --skip-cleaning uses none; remove one")
    cleaners = None
    if not args.skip_cleaning:
        cleaners = choose_cleaners(sources, args.clean_domains, args.domain)
    if "train" in sources and not args.skip_tokenizer:
        check_request(args.tokenizer_vocab, args.tokenizer_output)

    with exclusive_folder(args.output_dir, "give another --output-dir"):
        manifest_file = args.output_dir / "manifest.json"
        manifest = read_manifest(manifest_file)
        earlier_files = check_outputs(args.output_dir, list(sources), manifest)
        overlap = Overlap() if len(sources) == 2 else None

        # clean and count in a temporary folder; the files move into place when all are ready
        with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".") as staging:
            folders = {split: Path(staging, split) for split in sources}
            one_per_row = args.one_document_per_row
            splits = clean_splits(sources, cleaners, folders, overlap, one_per_row)
            if "train" in splits and not args.skip_tokenizer:
                train_tokenizer(args, splits["train"], folders["train"])
            tokenizer = count_tokens(args.tokenizer_output, splits, folders)
            install(folders, args.output_dir, earlier_files)

        # splits that are not prepared this time keep their records
        manifest["splits"] |= splits
        manifest["tokenizer"] = tokenizer
        if "train" in splits:
            track = "strict-small" if args.babylm_10m else "strict"
            manifest["word_budget"] = word_budget(splits["train"], TRACKS[track])
        manifest["overlap"] = None
        if overlap:
            manifest["overlap"] = name_places(overlap.result(), splits["dev"]["files"])
        write_json(manifest_file, manifest)
    return manifest, list(splits)


# ---- checks -------------------------------------------------------------------------------------


def find_sources(args: argparse.Namespace) -> Sources:
    """Return the input files by split and domain; dev comes first, because Overlap needs that."""
    directories = {"dev": args.babylm_dev, "train": args.babylm_10m or args.babylm_100m}
    outputs = [(args.output_dir / split).resolve() for split in directories]
    sources: Sources = {}
    for split, directory in directories.items():
        if directory is None:
            continue
        if any(output.is_relative_to(directory.resolve()) for output in outputs):
            raise ValueError(
                f"{directory} contains --output-dir {args.output_dir}: the next run would read "
                "the output of this one; choose another --output-dir"
            )
        sources[split] = {}
        for path in find_files(directory, split):
            sources[split].setdefault(domain_of(path), []).append(path)
    if not sources:
        raise ValueError(
            "nothing to prepare: give --babylm-10m DIR or --babylm-100m DIR, and --babylm-dev DIR"
        )
    return sources


def choose_cleaners(sources: Sources, only: list[str] | None, choices: list[str]) -> dict[str, str]:
    """Return the name of the cleaner of each domain in the input, or of the domains in `only`.

    A domain is cleaned by the cleaner of its name, unless `choices` has "domain=cleaner" for it.
    """
    # the cleaner of each domain, by its name or by choice
    registry = create_cleaner_registry()
    domains = sorted(set().union(*sources.values()))
    cleaners = {domain: domain for domain in domains if domain in registry}
    for choice in choices:
        domain, _, cleaner = choice.lower().partition("=")
        if cleaner not in registry:
            raise ValueError(
                f"--domain {choice}: expected DOMAIN=CLEANER, and the cleaners are "
                f"{', '.join(registry)}"
            )
        if domain not in domains:
            raise ValueError(
                f"--domain {choice}: the input has no domain {domain}, but {', '.join(domains)}"
            )
        cleaners[domain] = cleaner

    # report the domains without a cleaner
    how_to_choose = f"--domain NAME=CLEANER chooses one of {', '.join(registry)}"
    if without := [domain for domain in domains if domain not in cleaners]:
        print(
            f"note: no cleaner for {', '.join(without)}, using only the general one; "
            f"{how_to_choose}",
            file=sys.stderr,
        )
    for domain in without:
        if has_gutenberg_header(sources, domain):
            print(
                f"note: {domain} begins with Project Gutenberg's header; "
                f"--domain {domain}=gutenberg removes it and the licence at the end",
                file=sys.stderr,
            )

    # keep those of --clean-domains
    if only is None:
        return cleaners
    names = [name for name in re.split(r"[,\s]+", " ".join(only)) if name]
    unknown = [name for name in names if name not in cleaners]
    if unknown:
        available = ", ".join(cleaners) or "no domain with a cleaner"
        raise ValueError(
            f"--clean-domains {', '.join(unknown)}: the input has {available}; {how_to_choose}"
        )
    return {name: cleaners[name] for name in names}


def has_gutenberg_header(sources: Sources, domain: str) -> bool:
    """Return True if a file of this domain begins as the books of Project Gutenberg do."""
    paths = [path for split in sources.values() for path in split.get(domain, ())]
    return any("Project Gutenberg" in next(read_parts(path), "") for path in paths)


def read_manifest(path: Path) -> dict:
    """Return the manifest of an earlier run, or an empty one."""
    if not path.exists():
        return {"splits": {}, "tokenizer": None, "word_budget": None, "overlap": None}
    try:
        manifest = read_json(path)
        recorded_hashes(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not a manifest of this script; move it away or choose another --output-dir"
        ) from None
    return manifest


def recorded_hashes(manifest: dict) -> dict[str, str]:
    """Return the SHA-256 of every file in a manifest, by its path in the output directory."""
    hashes = {}
    for split in manifest["splits"].values():
        for record in split["files"].values():
            hashes[record["file"]] = record["sha256"]
    return hashes


def check_outputs(output_dir: Path, splits: list[str], manifest: dict) -> list[Path]:
    """Return the files that an earlier run left in these splits; hidden files are not ours.

    Raise ValueError if one of them was not written by this script, or was edited since.
    """
    hashes = recorded_hashes(manifest)
    earlier_files = []
    for split in splits:
        for path in sorted((output_dir / split).rglob("[!.]*")):
            if path.is_file():
                earlier_files.append(path)
                recorded = hashes.get(path.relative_to(output_dir).as_posix())
                is_ours = recorded == sha256(path)
                check_replaceable(
                    path,
                    is_ours,
                    "if you wrote or edited it, move it away or choose another --output-dir",
                )
    return earlier_files


def install(folders: dict[str, Path], output_dir: Path, earlier_files: list[Path]) -> None:
    """Move the finished files of each split into place; delete earlier ones without a successor.

    Files are replaced one by one because data/train may be a mount point, or hold hidden files.
    """
    new_files = {}
    for split, folder in folders.items():
        for path in sorted(folder.iterdir()):
            new_files[output_dir / split / path.name] = path
    for path in earlier_files:
        if path not in new_files:
            path.unlink()
    for path, draft in new_files.items():
        path.parent.mkdir(exist_ok=True)
        draft.replace(path)


# ---- cleaning -----------------------------------------------------------------------------------


def clean_splits(
    sources: Sources,
    cleaners: dict[str, str] | None,
    folders: dict[str, Path],
    overlap: Overlap | None,
    one_per_row: bool,
) -> dict[str, dict]:
    """Write every split, cleaned unless `cleaners` is None, to its folder; return the records."""
    registry = create_cleaner_registry()
    splits = {}
    n_bytes = 0
    for files_by_domain in sources.values():
        for files in files_by_domain.values():
            n_bytes += sum(path.stat().st_size for path in files)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="cleaning", disable=None) as bar:
        for split, files_by_domain in sources.items():
            folders[split].mkdir()
            if overlap and split == "train":
                overlap.start_train()  # dev has been added, because find_sources puts it first
            records = {}
            for domain, files in files_by_domain.items():
                target = folders[split] / f"{domain}.{split}"
                name = (cleaners or {}).get(domain)
                cleaner = None
                if cleaners is not None:
                    cleaner = partial(clean_fully, registry.get(name))
                record = clean_domain(files, cleaner, name, target, overlap, one_per_row, bar)
                record["cleaner"] = name
                records[domain] = {"file": f"{split}/{target.name}", **record}
            splits[split] = {
                "cleaner_version": None if cleaners is None else CLEANER_VERSION,
                "one_document_per_row": one_per_row,
                "tokenizer_sha256": None,
                "files": records,
            }
    return splits


def clean_fully(cleaner: Callable[[str], str] | None, text: str) -> str:
    """Return the text after the cleaner of its domain, if there is one, and the general one."""
    return clean_text(cleaner(text) if cleaner else text)


def clean_domain(
    files: list[Path],
    cleaner: Callable[[str], str] | None,
    cleaner_name: str | None,
    target: Path,
    overlap: Overlap | None,
    one_per_row: bool,
    bar: tqdm,
) -> dict:
    """Join the files of a domain in one, cleaned if there is a cleaner; return its record."""
    sources = []
    documents = 0
    documents_of_one_word = 0
    words = 0
    text_bytes = 0
    with target.open("wb") as out:
        for path in files:
            report = new_report()
            bar_start = bar.n
            for parts in read_documents(path, report, cleaner, cleaner_name, one_per_row):
                # write a document part by part, and count on the way; it may not fit into memory
                out.write(DOCUMENT_END if documents else b"")
                documents += 1
                words_before = words
                vocabulary: set[str] = set()  # complete only while it has one word
                for part in parts:
                    text_bytes += out.write(part.encode())
                    part_words = part.lower().split()
                    words += len(part_words)
                    if len(vocabulary) < 2:
                        vocabulary.update(part_words)
                    if overlap:
                        overlap.add(part_words)
                    bar.update(bar_start + report["bytes_on_disk"] - bar.n)

                if overlap:
                    overlap.end_document()
                if len(vocabulary) == 1 and words - words_before >= ONE_WORD:
                    documents_of_one_word += 1
            sources.append(
                {
                    "path": str(path),
                    "sha256": sha256(path),
                    "bytes": path.stat().st_size,
                    "read": report,
                }
            )
        out.write(b"\n" if documents else b"")

    documents_read = sum(source["read"]["documents"] for source in sources)
    return {
        "sha256": sha256(target),
        "bytes": target.stat().st_size,
        "documents": documents,
        "documents_left_empty": documents_read - documents,
        "documents_of_one_word": documents_of_one_word,
        "words": words,
        "tokens": None,
        "text_bytes_read": sum(source["read"]["bytes"] for source in sources),
        "text_bytes_kept": text_bytes,
        "sources": sources,
    }


def word_budget(train: dict, limit: int) -> dict:
    """Return the number of words in the train split and the limit of its track."""
    words = sum(record["words"] for record in train["files"].values())
    return {"limit_words": limit, "words": words, "over_budget": words > limit}


def name_places(overlap: dict, files: dict[str, dict]) -> dict:
    """Return the result of Overlap, naming shared documents by file and number (from 1)."""
    names = []
    for record in files.values():
        names += [f"{record['file']} {i}" for i in range(1, record["documents"] + 1)]
    return {**overlap, "places": [names[place] for place in overlap["places"]]}


# ---- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(args: argparse.Namespace, train: dict, folder: Path) -> None:
    """Train the tokenizer on the cleaned train split in `folder`."""
    if not any(record["words"] for record in train["files"].values()):
        source = args.babylm_10m or args.babylm_100m
        raise ValueError(f"{source} has no text, or cleaning left none")
    files = [folder / Path(record["file"]).name for record in train["files"].values()]
    summary = train_on_files(
        files, args.tokenizer_vocab, args.tokenizer_output, args.tokenizer_prefix_space
    )
    print(summary_text(summary, args.tokenizer_vocab))


def count_tokens(path: Path, splits: dict[str, dict], folders: dict[str, Path]) -> dict | None:
    """Add the tokens of each file to its record; describe the tokenizer, if it exists."""
    if not path.exists():
        return None
    tokenizer = load_tokenizer(path)
    backend = part_backend(tokenizer)
    prefix_space = adds_prefix_space(tokenizer.backend_tokenizer)
    digest = sha256(path)
    for split, entry in splits.items():
        entry["tokenizer_sha256"] = digest
        for record in entry["files"].values():
            file = folders[split] / Path(record["file"]).name
            record["tokens"] = tokens_in(file, backend, prefix_space)
    return {"path": str(path), "sha256": digest, "vocab_size": backend.get_vocab_size()}


def tokens_in(path: Path, backend: Tokenizer, prefix_space: bool) -> int:
    """Return the tokens of the text of a prepared file, without <s> and </s>."""
    tokens = 0
    documents = read_documents(path)
    parts = chain.from_iterable(document_parts(parts, prefix_space) for parts in documents)
    while batch := list(islice(parts, BATCH_PARTS)):
        tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return tokens


# ---- printing -----------------------------------------------------------------------------------


def print_table(split: str, files: dict[str, dict]) -> None:
    """Print the table of a split: a row for each domain, and the total."""
    keys = ("documents", "words", "bytes", "tokens", "text_bytes_read", "text_bytes_kept")
    rows = {}
    for domain, record in files.items():
        rows[domain] = {key: record[key] or 0 for key in keys}
    rows["total"] = {key: sum(row[key] for row in rows.values()) for key in keys}

    header = ("documents", "words", "bytes", "tokens", "bytes/tok", "removed %")
    print("\n" + ROW.format(split, *header))
    for domain, row in rows.items():
        tokens = f"{row['tokens']:,}" if row["tokens"] else "-"
        bytes_per_token = "-"
        if row["tokens"]:
            bytes_per_token = f"{row['text_bytes_kept'] / row['tokens']:.3f}"
        removed = 100 * (1 - row["text_bytes_kept"] / max(1, row["text_bytes_read"]))
        counts = [f"{row[key]:,}" for key in ("documents", "words", "bytes")]
        print(ROW.format(domain, *counts, tokens, bytes_per_token, f"{removed:.2f}"))


def print_repairs(manifest: dict, new_splits: list[str]) -> None:
    """Print repairs, dropped documents, and the splits that are from an earlier run."""
    for split in new_splits:
        for record in manifest["splits"][split]["files"].values():
            if record["documents_left_empty"]:
                n_empty = record["documents_left_empty"]
                print(f"note: {record['file']}: dropped {n_empty:,} documents, empty when cleaned")
            if record["documents_of_one_word"]:
                n_documents = record["documents_of_one_word"]
                print(f"note: {record['file']}: {n_documents:,} documents are one word repeated")
            for source in record["sources"]:
                if source["read"]["rows_joined"]:
                    print(f"note: {source['path']}: {rows_joined_text(source['read'])}")
                counts = [f"{key} {source['read'][key]}" for key in REPAIRS if source["read"][key]]
                if counts:
                    print(f"note: {source['path']}: {', '.join(counts)}")
    for split in manifest["splits"]:
        if split not in new_splits:
            print(f"note: {split} is from an earlier run; this run did not change it")


def print_budget(budget: dict | None) -> None:
    """Print the words of the train split, and a warning if they exceed the track's limit."""
    if budget is None:
        return
    words = budget["words"]
    limit = budget["limit_words"]
    print(f"word budget: {words:,} of {limit:,} words")
    if budget["over_budget"]:
        print(
            f"warning: train is {words - limit:,} words over the budget of {limit:,}",
            file=sys.stderr,
        )


def print_overlap(overlap: dict | None) -> None:
    """Print how much of dev is also in train, and warnings if held-out scores suffer from it."""
    if overlap is None:
        return
    documents = overlap["dev_documents_in_train"]
    ngrams = overlap["dev_ngrams_in_train"]
    n_ngrams = overlap["dev_ngrams"]
    percent = 100 * ngrams / max(1, n_ngrams)
    print(
        f"overlap: {documents:,} of {overlap['dev_documents']:,} documents of dev are in train, "
        f"{ngrams:,} of {n_ngrams:,} runs of {NGRAM} words ({percent:.3f}%)"
    )
    if ngrams > n_ngrams / 2:
        print(
            "warning: most of dev is also in train, which inflates held-out scores", file=sys.stderr
        )
    if overlap["places"]:
        places = ", ".join(overlap["places"][:10]) + ", ..." * (len(overlap["places"]) > 10)
        print(
            f"warning: dev documents in train, which inflate held-out scores: {printable(places)}",
            file=sys.stderr,
        )


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(description="Clean BabyLM data and train the tokenizer.")
    add = parser.add_argument
    train = parser.add_mutually_exclusive_group()
    train.add_argument(
        "--babylm-10m", type=Path, metavar="DIR", help="train text, strict-small track"
    )
    train.add_argument("--babylm-100m", type=Path, metavar="DIR", help="train text, strict track")
    add("--babylm-dev", type=Path, metavar="DIR", help="held-out text")
    add("--output-dir", type=Path, default=Path("./data"), metavar="DIR", help="default ./data")
    add("--tokenizer-vocab", type=int, default=16000, metavar="N", help="tokens; default 16000")
    add(
        "--tokenizer-output",
        type=Path,
        default=Path("./models/tokenizer.json"),
        metavar="FILE",
        help="default ./models/tokenizer.json",
    )
    add(
        "--tokenizer-prefix-space",
        action="store_true",
        help="put a space before the first word of a text",
    )
    add(
        "--domain",
        action="append",
        default=[],
        metavar="DOMAIN=CLEANER",
        help="use the cleaner of another domain, such as novels=gutenberg; may be repeated",
    )
    add(
        "--one-document-per-row",
        action="store_true",
        help="never join the rows of a table, however short; for tweets and the like",
    )
    cleaning = parser.add_mutually_exclusive_group()
    cleaning.add_argument(
        "--clean-domains",
        nargs="+",
        metavar="DOMAIN",
        help="use only the cleaners of these domains (separated by commas or spaces); default all",
    )
    cleaning.add_argument("--skip-cleaning", action="store_true", help="copy the text as it is")
    add(
        "--skip-tokenizer",
        action="store_true",
        help="train no tokenizer; count tokens with the existing one",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)
    return run_script(
        lambda: run(args),
        interrupted="interrupted; the output directory is unchanged",
        memory_advice="close other programs",
    )


if __name__ == "__main__":
    sys.exit(main())
