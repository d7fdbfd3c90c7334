"""Text files -> chunks of tokens: the tokenizer, and DataProcessor, which prepares datasets for training.

Documents are read by documents.py and cleaned by cleaners.py, as a stream: memory does not grow with a file. What users
need of those two can be imported from here. It trains no tokenizer (train_tokenizer.py) and writes no cleaned text
(prepare_data.py).

    processor = DataProcessor(load_tokenizer("models/tokenizer.json"))
    dataset = processor.prepare_dataset("data/train", "data/dev", max_length=128)
    print(len(dataset["train"]), processor.reports["train"])
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from babyllama.data.cleaners import (
    CLEANER_VERSION,
    DomainCleaners,
    clean_text,
    create_cleaner_registry,
)
from babyllama.data.documents import (
    PIECE,
    READER_VERSION,
    Piece,
    clean_pieces,
    cut,
    domain_of,
    find_files,
    new_report,
    read_documents,
    replace_surrogates,
    source_of,
)

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerFast
from babyllama.data.tokenizer import (
    SPECIAL_TOKENS,
    byte_lengths,
    load_tokenizer,
    vocabulary_difference,
)
from babyllama.files import default_cache_dir

__all__ = [
    "CLEANER_VERSION", "SPECIAL_TOKENS", "DataProcessor", "DomainCleaners", "Piece", "byte_lengths",
    "clean_text", "create_cleaner_registry", "default_cache_dir", "domain_of", "find_files",
    "load_tokenizer", "new_report", "read_documents", "source_of", "vocabulary_difference",
]  # fmt: skip
logger = logging.getLogger(__name__)
BATCH = 48  # pieces given to the tokenizer in one go
CACHE_VERSION = 2  # a new number when what lies in the cache changes


def _check_length(max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(
            f"max_length: {max_length!r} is not a number of tokens in a chunk; use 1 or more"
        )


class DataProcessor:
    """Text files -> datasets of token chunks. `reports` holds the counts of each split that was prepared."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, cache_dir: str | os.PathLike | None = None
    ):
        """A fast tokenizer with bos and eos tokens; cache_dir is $BABYLLAMA_CACHE or data/cache beside this file."""
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: use load_tokenizer(path)"
            )
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no bos_token or eos_token, which mark where documents begin and end"
            )
        self.tokenizer = tokenizer
        self.cache_dir = Path(cache_dir or default_cache_dir())
        self.reports: dict[str, dict] = {}
        self._backend = Tokenizer.from_str(
            tokenizer.backend_tokenizer.to_str()
        )  # a copy, to set as we need it
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = (
            True  # "</s>" in a text is four characters, not the end of a document
        )
        self._dtype = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
        try:
            self._lengths = byte_lengths(tokenizer)
        except (
            ValueError
        ):  # not byte-level: text can be cut with it, but its words cannot be located
            self._lengths = None

    def load_text_files(self, data_dir: str, split: str = "train") -> Dataset:
        """The documents of a split as they are: a row each, columns text and source (the file's name), in memory."""
        from datasets import Dataset

        rows: dict[str, list[str]] = {"text": [], "source": []}
        for path in find_files(data_dir, split):
            parts: list[str] = []
            for piece in read_documents(path):
                parts.append(piece.text)
                if piece.last:
                    rows["text"].append("".join(parts))
                    rows["source"].append(path.name)
                    parts = []
        return Dataset.from_dict(rows)

    def clean_text(self, example: dict[str, str]) -> dict[str, str]:
        """The example with its text mended: single blanks, no blank before a mark, one after it; newlines stay."""
        return {**example, "text": clean_text(example["text"])}

    def tokenize_and_chunk(
        self, example: dict[str, str], max_length: int = 128
    ) -> dict[str, list[list[int]]]:
        """The full chunks of max_length ids of BOS, text, EOS; what does not fill one is left out."""
        _check_length(max_length)
        text, cuts = replace_surrogates(example["text"]), [0]
        while cuts[-1] < len(text) or len(cuts) == 1:
            cuts.append(cut(text, cuts[-1]))
        texts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        pieces = [Piece(part, i == 0, i == len(texts) - 1) for i, part in enumerate(texts)]
        ids = [
            int(i) for _, batch, _ in self._encode((0, piece) for piece in pieces) for i in batch
        ]
        return {
            "input_ids": [
                ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)
            ]
        }

    def prepare_dataset(
        self,
        train_data_dir: str,
        eval_data_dir: str,
        max_length: int = 128,
        clean: bool = True,
        num_proc: int = 4,
    ) -> DatasetDict:
        """Full chunks of max_length token ids, column input_ids: 'train' and 'validation', mapped from Arrow files.

        A split is BOS, text, EOS for each document in turn; what the last chunk leaves out is in `reports`. `clean`
        applies clean_text. The files in cache_dir are named by a hash of all that they depend on; beside the chunks
        lie the report and, in .words, how many words begin in each token (words.py). num_proc bounds the tokenizer's
        threads unless $RAYON_NUM_THREADS is set or they run already; no process is forked.
        ValueError when a split does not fill one chunk, FileNotFoundError when it has no files.
        """
        from datasets import Dataset, DatasetDict

        _check_length(max_length)
        os.environ.setdefault(
            "RAYON_NUM_THREADS", str(max(1, min(num_proc or 1, os.cpu_count() or 1)))
        )
        folders = {"train": train_data_dir, "validation": eval_data_dir}
        inputs = {split: find_files(folder, split) for split, folder in folders.items()}
        prepared = DatasetDict()
        for split, files in inputs.items():
            root = Path(folders[split])
            sources = [
                source_of(path, path.relative_to(root).as_posix() if path != root else "")
                for path in files
            ]
            arrow = self.cache_dir / f"{split}-{self._key(sources, max_length, clean)}.arrow"
            if not arrow.is_file():
                self._write(arrow, split, files, sources, max_length, clean)
            try:
                self.reports[split] = report = json.loads(
                    arrow.with_suffix(".json").read_text(encoding="utf-8")
                )
                prepared[split] = Dataset.from_file(str(arrow))
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{arrow}: damaged ({error}); delete it, and the text is read again"
                ) from None
            counts = ", ".join(
                f"{report[key]:,} {key}"
                for key in ("files", "documents", "words", "tokens", "chunks")
            )
            left_out, invalid = report["tokens_left_out"], report["invalid_bytes"]
            logger.info("%s: %s of %d (%d tokens left out)", split, counts, max_length, left_out)
            if invalid:
                logger.warning(
                    "%s: %d bytes not UTF-8, first at %s", split, invalid, report["first_invalid"]
                )
        return prepared

    def _key(self, sources: list[dict], max_length: int, clean: bool) -> str:
        """A hash of the files' names and contents, the tokenizer, and what is done to them."""
        parts = [
            self._backend.to_str(),
            CLEANER_VERSION,
            READER_VERSION,
            CACHE_VERSION,
            PIECE,
            max_length,
            clean,
        ]
        parts += [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        parts += [[source["file"], source["sha256"]] for source in sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _encode(
        self, pieces: Iterator[tuple[int, Piece]]
    ) -> Iterator[tuple[list, np.ndarray, list[int]]]:
        """Numbered pieces -> batches of them, their token ids with BOS and EOS around documents, and ids of each piece.

        One thread waits for the Rust threads; in this one the next batch is read and the last one collected meanwhile.
        """
        import numpy as np

        def collect(batch: list, encodings: list) -> tuple[list, np.ndarray, list[int]]:
            ids: list[int] = []
            ends = [0]
            for (_, piece), encoding in zip(batch, encodings, strict=True):
                if piece.first:
                    ids.append(self.tokenizer.bos_token_id)
                ids += encoding.ids
                if piece.last:
                    ids.append(self.tokenizer.eos_token_id)
                ends.append(len(ids))
            return (
                batch,
                np.array(ids, dtype=self._dtype),
                [b - a for a, b in itertools.pairwise(ends)],
            )

        with ThreadPoolExecutor(1) as pool:
            running = None
            while batch := list(itertools.islice(pieces, BATCH)):
                texts = [piece.text for _, piece in batch]
                future = pool.submit(
                    self._backend.encode_batch_fast, texts, add_special_tokens=False
                )
                if running:
                    yield collect(running[0], running[1].result())
                running = batch, future
            if running:
                yield collect(running[0], running[1].result())

    def _pieces_of(
        self, files: list[Path], split: str, clean: bool, report: dict
    ) -> Iterator[tuple[int, Piece]]:
        """The number of each file with the pieces of its documents, counted, with a progress bar in bytes."""
        from tqdm import tqdm

        total = sum(path.stat().st_size for path in files)
        with tqdm(
            total=total, desc=f"tokenising {split}", unit="B", unit_scale=True, disable=None
        ) as bar:
            for number, path in enumerate(files):
                pieces = read_documents(path, report)
                for piece in clean_pieces(pieces, clean_text) if clean else pieces:
                    bar.update(report["bytes_on_disk"] - bar.n)
                    yield number, piece
            bar.update(report["bytes_on_disk"] - bar.n)

    def _write(
        self,
        arrow: Path,
        split: str,
        files: list[Path],
        sources: list[dict],
        max_length: int,
        clean: bool,
    ):
        """Write the chunks of a split and, beside them, words and report; under their names only when complete."""
        import numpy as np
        import pyarrow as pa
        from datasets import Features, List, Value

        from babyllama.data.words import WordFile

        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        report = {
            **new_report(),
            "key": arrow.stem,
            "tokens": 0,
            "chunks": 0,
            "tokens_left_out": 0,
            "sources": sources,
        }
        schema = Features({"input_ids": List(Value(self._dtype), length=max_length)}).arrow_schema
        rest = np.empty(0, dtype=self._dtype)
        arrow.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arrow.parent, prefix=".writing-") as folder:
            draft = Path(folder, arrow.name)
            words = WordFile(draft.with_suffix(".words"), self._lengths, bos, eos, sources)
            with (
                pa.OSFile(str(draft), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as stream,
                words,
            ):
                for batch, ids, sizes in self._encode(self._pieces_of(files, split, clean, report)):
                    report["tokens"] += len(ids)
                    words.add(batch, ids, sizes)
                    rest = np.concatenate([rest, ids])
                    full = len(rest) // max_length * max_length
                    column = pa.FixedSizeListArray.from_arrays(
                        pa.array(rest[:full]), type=schema.field(0).type
                    )
                    stream.write_batch(pa.record_batch([column], schema=schema))
                    rest = rest[full:]
            report["chunks"] = report["tokens"] // max_length
            report["tokens_left_out"] = len(rest)
            if not report["chunks"]:
                where = ", ".join(map(str, files[:3]))
                raise ValueError(
                    f"{split}: {report['tokens']} tokens in {where} do not fill one chunk of {max_length}"
                )
            draft.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            for file in (
                words.path,
                draft.with_suffix(".json"),
                draft,
            ):  # the chunks last: they say that all is there
                if file.is_file():
                    file.replace(arrow.with_name(file.name))
