"""Turn text files into chunks of token ids that a model can be trained on.

    processor = DataProcessor(load_tokenizer("models/tokenizer.json"))
    dataset = processor.prepare_dataset("data/train", "data/dev", max_length=128)
    print(len(dataset["train"]), processor.reports["train"])

A corpus can be larger than memory, so prepare_dataset never holds a complete file. Each step is a
generator that takes a little from the step before it and hands it on:

    documents.read_lines       file      -> lines, with invalid bytes repaired
    documents._number_lines    lines     -> (number of the document, line)
    documents.text_parts       pieces    -> parts of at most 32,768 characters
    documents.clean_parts      parts     -> cleaned parts, if there is a cleaner
    documents.read_documents   file      -> documents, each an iterator over parts, by these four
    DataProcessor._batches     documents -> lists of <s>, parts, </s>, half a million characters
    DataProcessor._tokenize    documents -> arrays of token ids, by way of these lists

DataProcessor._write_chunks joins the arrays, cuts them into chunks, and writes them to the cache.
train_tokenizer.py trains tokenizers, and prepare_data.py writes cleaned text files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import babyllama  # noqa: F401  before numpy, because it names a package that is missing

# isort: split
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from babyllama.data.cleaners import (
    CLEANER_VERSION,
    DomainCleaners,
    clean_text,
    create_cleaner_registry,
)
from babyllama.data.documents import (
    PART,
    READER_VERSION,
    new_report,
    read_documents,
    replace_surrogates,
    rows_joined_text,
    text_parts,
)
from babyllama.data.text_files import find_files, source_of
from babyllama.data.tokenizer import (
    adds_prefix_space,
    byte_lengths,
    document_parts,
    load_tokenizer,
    part_backend,
)
from babyllama.files import (
    atomic_write,
    default_cache_dir,
    read_json,
    remove_abandoned_drafts,
    sha256,
    write_json,
)

__all__ = [
    "DataProcessor",
    "DomainCleaners",
    "byte_lengths",
    "clean_text",
    "create_cleaner_registry",
    "load_tokenizer",
]
logger = logging.getLogger(__name__)
BATCH = 1 << 19  # characters that the tokenizer gets at a time
CACHE_VERSION = 2  # increase it whenever the content of a cached file changes


class DataProcessor:
    """Turn text files into datasets of token chunks.

    After prepare_dataset, `reports` has the counts of each split, such as words and tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, cache_dir: str | os.PathLike | None = None
    ):
        """Take a fast tokenizer with BOS and EOS; cache in $BABYLLAMA_CACHE or data/cache."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: use load_tokenizer(path)"
            )
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer needs a bos_token and an eos_token to mark documents")
        self.tokenizer = tokenizer
        self.cache_dir = Path(cache_dir or default_cache_dir())
        self.reports: dict[str, dict] = {}
        self._dtype = "uint16" if len(tokenizer) <= 1 << 16 else "int32"

        self._backend = part_backend(tokenizer)
        self._prefix_space = adds_prefix_space(tokenizer.backend_tokenizer)

    def prepare_dataset(
        self,
        train_data_dir: str,
        eval_data_dir: str,
        max_length: int = 128,
        clean: bool = True,
        num_proc: int = 4,
    ) -> DatasetDict:
        """Return the chunks of 'train' and 'validation': column input_ids, max_length ids each.

        All documents form one row of tokens, BOS, text, EOS, BOS, text, EOS, so no chunk is padded
        and a chunk may contain the end of one document and the start of the next. The last partial
        chunk is dropped and counted in `reports`. `clean` applies clean_text; train.py leaves it
        off, because prepare_data.py has cleaned its text.

        Preparing a corpus can take minutes, so chunks and report are cached in cache_dir under a
        hash of everything they depend on; a damaged cache is prepared again. num_proc limits the
        threads of the tokenizer, unless $RAYON_NUM_THREADS is set or the threads have already
        started. Raise ValueError if a split does not fill one chunk, and FileNotFoundError if it
        has no files.
        """
        _check_max_length(max_length)
        n_threads = max(1, min(num_proc or 1, os.cpu_count() or 1))
        os.environ.setdefault("RAYON_NUM_THREADS", str(n_threads))

        # find the files of both splits first, so that a missing one is an error before any work
        folders = {"train": Path(train_data_dir), "validation": Path(eval_data_dir)}
        files = {split: find_files(folder, split) for split, folder in folders.items()}

        remove_abandoned_drafts(self.cache_dir)
        datasets = DatasetDict()
        for split, folder in folders.items():
            sources = [_source_in(folder, path) for path in files[split]]
            arrow = self.cache_dir / f"{split}-{self._cache_key(sources, max_length, clean)}.arrow"
            report = _cached_report(arrow)
            if report is None:
                report = self._write_chunks(arrow, split, files[split], sources, max_length, clean)
            self.reports[split] = report
            datasets[split] = Dataset.from_file(str(arrow))
            _log_report(split, self.reports[split], max_length)
        return datasets

    def _cache_key(self, sources: list[dict], max_length: int, clean: bool) -> str:
        """Return a hash of the files (name, domain, content), the tokenizer, and all settings."""
        versions = [CLEANER_VERSION if clean else None, READER_VERSION, CACHE_VERSION]
        special_ids = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        files = [[source["file"], source["domain"], source["sha256"]] for source in sources]
        parts = [self._backend.to_str(), *versions, PART, max_length, clean, *special_ids, *files]
        if self._prefix_space:
            parts.append("prefix space")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _write_chunks(
        self,
        arrow: Path,
        split: str,
        files: list[Path],
        sources: list[dict],
        max_length: int,
        clean: bool,
    ) -> dict:
        """Write the chunks of a split to an Arrow file, and a report to a JSON file next to it.

        Return the report.
        """
        report = {**new_report(), "key": arrow.stem, "tokens": 0, "sources": sources}
        schema = Features({"input_ids": List(Value(self._dtype), length=max_length)}).arrow_schema
        rest = np.empty(0, dtype=self._dtype)  # ids that do not fill a chunk yet
        n_bytes = sum(path.stat().st_size for path in files)
        bar = tqdm(
            total=n_bytes, desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=None
        )
        with bar, atomic_write(arrow) as draft:
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
                for path, source in zip(files, sources, strict=True):
                    tokens_before = report["tokens"]
                    words_before = report["words"]
                    documents = read_documents(path, report, clean_text if clean else None)
                    for token_ids in self._tokenize(documents):
                        # write the chunks that are full, and keep the rest for the next batch
                        report["tokens"] += len(token_ids)
                        rest = np.concatenate([rest, token_ids])
                        n_full = len(rest) // max_length * max_length
                        chunks = pa.FixedSizeListArray.from_arrays(
                            pa.array(rest[:n_full]), type=schema.field(0).type
                        )
                        stream.write_batch(pa.record_batch([chunks], schema=schema))
                        rest = rest[n_full:]
                        bar.update(report["bytes_on_disk"] - bar.n)
                    source["tokens"] = report["tokens"] - tokens_before
                    source["words"] = report["words"] - words_before

            report["chunks"] = report["tokens"] // max_length
            report["tokens_left_out"] = len(rest)
            if not report["chunks"]:
                names = ", ".join(map(str, files[:3]))
                raise ValueError(
                    f"{split}: the {report['tokens']} tokens of {names} do not fill one chunk of "
                    f"{max_length}; use more text or shorter chunks (data.seq_length)"
                )
            # the Arrow file appears when this block ends, so its presence means that both exist
            cached = {"sha256": _checksum(draft, report), "report": report}
            write_json(arrow.with_suffix(".json"), cached)
        return report

    def _batches(self, documents: Iterable[Iterable[str]]) -> Iterator[list[str | int]]:
        """Yield lists of about BATCH characters: the id of BOS, the parts of a document, EOS."""
        batch: list[str | int] = []
        n_chars = 0
        for document in documents:
            parts = document_parts(document, self._prefix_space)
            for item in itertools.chain(
                [self.tokenizer.bos_token_id], parts, [self.tokenizer.eos_token_id]
            ):
                batch.append(item)
                n_chars += len(item) if isinstance(item, str) else 0
                if n_chars >= BATCH:
                    yield batch
                    batch = []
                    n_chars = 0
        if batch:
            yield batch

    def _tokenize(self, documents: Iterable[Iterable[str]]) -> Iterator[np.ndarray]:
        """Yield the token ids of documents, each between BOS and EOS, a batch at a time."""
        # Encoding runs in Rust, so Python can read and clean the next batch in the meantime. By an
        # estimate from the CPU time of reading and encoding, that is up to 14% faster on 2 cores
        # and 44% on 4.
        with ThreadPoolExecutor(1) as thread:
            running = None
            for batch in self._batches(documents):
                submitted = thread.submit(self._tokenize_batch, batch)
                if running:
                    yield running.result()
                running = submitted
            if running:
                yield running.result()

    def _tokenize_batch(self, items: list[str | int]) -> np.ndarray:
        """Return one row of token ids: those of the texts, and the single ids between them."""
        texts = [item for item in items if isinstance(item, str)]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        token_ids: list[int] = []
        for item in items:
            token_ids += next(encodings).ids if isinstance(item, str) else [item]
        return np.array(token_ids, dtype=self._dtype)

    # ---- for notebooks: training does not use these ----

    def load_text_files(self, data_dir: str, split: str = "train") -> Dataset:
        """Return the documents of a split as they are, with columns text and source (file name)."""
        rows: dict[str, list[str]] = {"text": [], "source": []}
        for path in find_files(data_dir, split):
            for document in read_documents(path):
                rows["text"].append("".join(document))
                rows["source"].append(path.name)
        return Dataset.from_dict(rows)

    def clean_text(self, example: dict[str, str]) -> dict[str, str]:
        """Return the example with the spacing of its text repaired; newlines stay."""
        return {**example, "text": clean_text(example["text"])}

    def tokenize_and_chunk(
        self, example: dict[str, str], max_length: int = 128
    ) -> dict[str, list[list[int]]]:
        """Return BOS, text, EOS as chunks of max_length ids, dropping the last partial chunk."""
        _check_max_length(max_length)
        text, _ = replace_surrogates(example["text"])
        token_ids: list[int] = []
        for batch in self._tokenize([text_parts([text])]):
            token_ids += batch.tolist()
        starts = range(0, len(token_ids) - max_length + 1, max_length)
        return {"input_ids": [token_ids[start : start + max_length] for start in starts]}


def _check_max_length(max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length must be 1 token or more, not {max_length!r}")


def _cached_report(arrow: Path) -> dict | None:
    """Return the report of cached chunks, or None if there are none; warn if they are damaged."""
    if not arrow.is_file():
        return None
    try:
        cached = read_json(arrow.with_suffix(".json"))
        if cached["sha256"] == _checksum(arrow, cached["report"]):
            return cached["report"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    logger.warning("%s is corrupted, or from an older version: tokenizing the text again", arrow)
    return None


def _checksum(arrow: Path, report: dict) -> str:
    """Return one hash of an Arrow file and its report; it takes 0.3 s for 100M words."""
    return hashlib.sha256((sha256(arrow) + json.dumps(report)).encode()).hexdigest()


def _source_in(folder: Path, path: Path) -> dict:
    """Return the record of a file, named by its path within the folder."""
    return source_of(path, path.relative_to(folder).as_posix() if path != folder else "")


def _log_report(split: str, report: dict, max_length: int) -> None:
    keys = ("files", "documents", "words", "tokens", "chunks")
    counts = ", ".join(f"{report[key]:,} {key}" for key in keys)
    logger.info(
        "%s: %s of %d (dropped %d tokens)", split, counts, max_length, report["tokens_left_out"]
    )
    if report["rows_joined"]:
        logger.info("%s: %s", split, rows_joined_text(report))
    if report["invalid_bytes"]:
        logger.warning(
            "%s: replaced %d bytes that are not UTF-8, the first in %s",
            split,
            report["invalid_bytes"],
            report["first_invalid"],
        )
