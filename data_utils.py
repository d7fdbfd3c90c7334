"""Text files -> token chunks: the tokenizer, and DataProcessor, which prepares datasets for training.

    from data_utils import DataProcessor, load_tokenizer
    processor = DataProcessor(load_tokenizer("models/tokenizer.json"))
    datasets = processor.prepare_dataset("data/train", "data/dev", max_length=128)

Files are read as a stream (documents.py) and cleaned by cleaners.py, so that a file may be larger than memory. Names of
both that users need can be imported from here. It trains no tokenizer (train_tokenizer.py) and downloads nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cleaners import DomainCleaners, clean_text, cleaner_for, create_cleaner_registry
from documents import Piece, clean_documents, domain_of, find_files, new_report, read_documents

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "DataProcessor", "DomainCleaners", "Piece", "byte_lengths", "clean_documents", "clean_text", "cleaner_for",
    "create_cleaner_registry", "domain_of", "find_files", "load_tokenizer", "new_report", "read_documents",
]  # fmt: skip
log = logging.getLogger(__name__)
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2
CLEANER_VERSION = "1"  # part of every cache key: raise it when a cleaner or the reader changes what comes out
BATCH_CHARS = 2_000_000  # text handed to the tokenizer's threads at a time


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a tokenizer.json, or in a directory that holds one, padding on the right.

    FileNotFoundError names the command that makes one; ValueError a file that is not a tokenizer.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} not found: train a tokenizer first: "
            f"python train_tokenizer.py --data-dir ./data/train --output {file}"
        )
    try:
        backend = Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a damaged file may panic in Rust, which is no Exception
        raise ValueError(f"{file} is not a tokenizer: {str(error).strip().splitlines()[0]}") from None
    known = {name: token for name, token in SPECIAL_TOKENS.items() if backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **known)


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes of text that each token of a byte-level tokenizer stands for: int64 (V,); 0 for special tokens."""
    import numpy as np

    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if index in special else len(token)  # a byte-level token has one character for each byte
    return lengths


# ---- the processor ------------------------------------------------------------------------------


class DataProcessor:
    """Text files -> datasets of token chunks, with one tokenizer.

    `reports` holds, after prepare_dataset, what was read, repaired and left out: {"train": {...}, "validation": {...}}.
    Prepared chunks are kept under `cache_dir` (default: the environment's BABYLLAMA_CACHE, else data/cache beside this
    file), named by the content of everything that they depend on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path | None = None):
        self.tokenizer = tokenizer
        default = os.environ.get("BABYLLAMA_CACHE") or Path(__file__).resolve().parent / "data" / "cache"
        self.cache_dir = Path(cache_dir or default)
        self.reports: dict[str, dict] = {}

    def load_text_files(self, data_dir: str, split: str = "train") -> Dataset:
        """The documents of a split: columns text and source (the file's path), a row for each document."""
        from datasets import Dataset

        texts, sources, parts = [], [], []
        for path in find_files(data_dir, split):
            for piece in read_documents(path):
                parts.append(piece.text)
                if piece.last:
                    texts.append("".join(parts))
                    sources.append(str(path))
                    parts = []
        return Dataset.from_dict({"text": texts, "source": sources})

    def clean_text(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with its text cleaned by `clean_text`; other fields are left as they are."""
        return {**example, "text": clean_text(example["text"])}

    def tokenize_and_chunk(self, example: dict[str, Any], max_length: int = 128) -> dict[str, list[list[int]]]:
        """{"input_ids": full chunks of max_length ids} of one document: BOS, text, EOS; the rest is dropped."""
        ids = self.tokenizer(example["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        return {"input_ids": [ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)]}

    def prepare_dataset(
        self, train_data_dir: str, eval_data_dir: str, max_length: int = 128, clean: bool = True, num_proc: int = 4
    ) -> DatasetDict:
        """Datasets "train" and "validation" of full chunks: column input_ids, max_length ids in each row.

        Documents are joined as BOS, text, EOS and cut into chunks; `clean` applies clean_text first. `num_proc` bounds
        the tokenizer's threads, if RAYON_NUM_THREADS does not and they have not started yet; there are no further
        processes. ValueError where a split has not one full chunk.
        """
        from datasets import Dataset, DatasetDict

        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, min(num_proc, os.cpu_count() or 1))))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        splits = {}
        for name, folder in (("train", train_data_dir), ("validation", eval_data_dir)):
            files = find_files(folder, name)
            target = self.cache_dir / self._key(files, max_length, clean)
            if not (target / "report.json").is_file():
                self._write_chunks(files, target, name, max_length, clean)
            self.reports[name] = json.loads((target / "report.json").read_text(encoding="utf-8"))
            splits[name] = Dataset.from_file(str(target / "chunks.arrow"))
            r = self.reports[name]
            log.info("%s: %s documents, %s words, %s tokens, %s chunks of %d (%d tokens left out)", name,
                     *(f"{r[k]:,}" for k in ("documents", "words", "tokens", "chunks")), max_length,
                     r["tokens_left_out"])  # fmt: skip
        return DatasetDict(splits)

    def _key(self, files: list[Path], max_length: int, clean: bool) -> str:
        digest = hashlib.sha256(f"{CLEANER_VERSION} {max_length} {clean} ".encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for path in files:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
        return digest.hexdigest()[:32]

    def _write_chunks(self, files: list[Path], target: Path, name: str, max_length: int, clean: bool) -> None:
        """Tokenise the files into target/chunks.arrow and target/report.json; report.json comes last."""
        import numpy as np
        import pyarrow as pa

        report = new_report() | {"tokens": 0, "chunks": 0, "tokens_left_out": 0}
        kind = np.uint16 if len(self.tokenizer) <= 2**16 else np.int32
        column = pa.list_(pa.from_numpy_dtype(kind), max_length)
        schema = pa.schema([("input_ids", column)])
        target.mkdir(parents=True, exist_ok=True)
        part = target / f"chunks.{os.getpid()}.part"
        rest = np.empty(0, dtype=kind)
        try:
            with pa.ipc.new_stream(str(part), schema) as writer:
                for ids in self._token_batches(files, clean, report, kind, name):
                    report["tokens"] += len(ids)
                    ids = np.concatenate([rest, ids])
                    whole = len(ids) // max_length * max_length
                    rest = ids[whole:].copy()
                    if whole:
                        chunks = pa.FixedSizeListArray.from_arrays(pa.array(ids[:whole]), type=column)
                        writer.write_batch(pa.record_batch([chunks], schema=schema))
                        report["chunks"] += len(chunks)
            report["tokens_left_out"] = len(rest)
            if not report["chunks"]:
                raise ValueError(
                    f"{name}: {report['tokens']} tokens in {', '.join(map(str, files[:3]))} are less than one chunk of "
                    f"{max_length}; give more text or a smaller seq_length"
                )
            part.replace(target / "chunks.arrow")
        finally:
            part.unlink(missing_ok=True)
        facts = json.dumps(report, indent=1)
        (target / "report.part").write_text(facts, encoding="utf-8")
        (target / "report.part").replace(target / "report.json")

    def _token_batches(self, files, clean: bool, report: dict, kind, name: str) -> Iterator[np.ndarray]:
        """Arrays of token ids, in the order of the text: one thread reads and cleans while the tokenizer's encode."""
        import numpy as np
        from tqdm.auto import tqdm

        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        batches: queue.Queue = queue.Queue(maxsize=3)
        stop = threading.Event()

        def read() -> None:
            try:
                for batch in _batched(files, clean, report):
                    batches.put(batch)
                    if stop.is_set():
                        return
                batches.put(None)
            except BaseException as error:  # handed over to the thread that waits
                batches.put(error)

        threading.Thread(target=read, daemon=True).start()
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        total = sum(path.stat().st_size for path in files)
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenising {name}", disable=None) as bar:
                while (batch := batches.get()) is not None:
                    if isinstance(batch, BaseException):
                        raise batch
                    encoded = encode([piece.text for piece in batch], add_special_tokens=False)
                    arrays = []
                    for piece, encoding in zip(batch, encoded, strict=True):
                        ids = encoding.ids
                        arrays.append(np.array([bos] * piece.first + ids + [eos] * piece.last, dtype=kind))
                    yield np.concatenate(arrays)
                    bar.update(sum(len(piece.text) for piece in batch))
        finally:
            stop.set()
            while not batches.empty():
                batches.get_nowait()


def _batched(files: list[Path], clean: bool, report: dict) -> Iterator[list[Piece]]:
    """Lists of pieces of about BATCH_CHARS characters; long pieces first come first, the order of the text is kept."""
    batch, size = [], 0
    for path in files:
        for piece in clean_documents(path, clean_text, report) if clean else read_documents(path, report):
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
