"""Work with the tokenizers that train_tokenizer.py trains: load, encode, compare."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from babyllama.files import read_json, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2


def tokenizer_sources(path: str | Path) -> list[dict] | None:
    """Return the files that a tokenizer was trained on, or None if there is no matching record."""
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        record = read_json(tokenizer_record_path(file))
        return record["sources"] if record["tokenizer_sha256"] == sha256(file) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def tokenizer_record_path(file: Path) -> Path:
    """Return the path at which train_tokenizer.py records the training files of a tokenizer."""
    return file.with_name(file.name.removesuffix(".json") + ".source.json")


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load the tokenizer in a tokenizer.json file, or in a directory that has one.

    It pads on the right, and of the SPECIAL_TOKENS it has those that are in the file. Raise
    FileNotFoundError if there is no such file and ValueError if it cannot be read.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        command = f"python train_tokenizer.py --data-dir ./data/train --output {file}"
        raise FileNotFoundError(f"{file}: no such tokenizer; train one with: {command}")
    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        ids = backend.get_vocab().values()
        if max(ids) >= len(ids):  # the library would take memory or time for all ids between
            raise ValueError(f"it has {len(ids)} tokens, but one with the id {max(ids)}")
        present = {
            name: token
            for name, token in SPECIAL_TOKENS.items()
            if backend.token_to_id(token) is not None
        }
        return tokenizer_class()(
            tokenizer_object=backend,
            padding_side="right",
            clean_up_tokenization_spaces=False,
            add_prefix_space=adds_prefix_space(backend),
            unk_token=None,
            **present,
        )
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the Rust code is not an Exception
        raise ValueError(f"{file}: not a valid tokenizer.json ({error})") from None


@functools.cache
def tokenizer_class() -> type[PreTrainedTokenizerFast]:
    """Return PreTrainedTokenizerFast, under the name that every release of transformers knows.

    A saved tokenizer names its class. Transformers 5 calls this one TokenizersBackend, and BabyLM's
    pipeline, which uses 4.51.3, cannot load a tokenizer of that name.
    """
    import transformers

    return type("PreTrainedTokenizerFast", (transformers.PreTrainedTokenizerFast,), {})


def adds_prefix_space(backend: Tokenizer | None) -> bool:
    """Return True if a byte-level tokenizer puts a space before a text that has none there."""
    return getattr(getattr(backend, "pre_tokenizer", None), "add_prefix_space", False)


def part_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the tokenizer's backend that encodes parts of documents as they are.

    It truncates and pads nothing, reads "</s>" as text, and adds no space before a part. See
    document_parts for the space before a document.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    if adds_prefix_space(backend):
        backend.pre_tokenizer.add_prefix_space = False
    return backend


def document_parts(parts: Iterable[str], prefix_space: bool) -> Iterator[str]:
    """Yield the parts of a document; with `prefix_space` the first one starts with a space."""
    for number, part in enumerate(parts):
        adds_space = prefix_space and number == 0 and not part.startswith(" ")
        yield " " + part if adds_space else part


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Return the bytes of text that each token id stands for; empty for special tokens.

    Raise ValueError for a tokenizer that is not byte-level.
    """
    # GPT-2 writes a printable byte as itself, and the other bytes as U+0100, U+0101 and so on
    alphabet = set(ByteLevel.alphabet())
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    byte_of = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(others)}

    added = tokenizer.added_tokens_decoder
    texts = [b""] * len(tokenizer)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            texts[token_id] = b"" if added[token_id].special else token.encode()
        elif alphabet.issuperset(token):
            texts[token_id] = bytes(byte_of[character] for character in token)
        else:
            raise ValueError(
                f"token {token_id} ({token!r}) is not made of bytes; use a byte-level tokenizer"
            )
    return texts


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return how many bytes of text each token id stands for: int64 (V,), 0 for special tokens.

    The lengths of a text's tokens, BOS included, add up to its length in UTF-8. So BOS has length
    -1 if the tokenizer adds a space after it. (A text that starts with a space has the same tokens
    as without; that space is not counted.) Raise ValueError for a tokenizer that is not byte-level.
    """
    lengths = np.array([len(text) for text in token_bytes(tokenizer)], dtype=np.int64)
    if adds_prefix_space(tokenizer.backend_tokenizer) and tokenizer.bos_token_id is not None:
        lengths[tokenizer.bos_token_id] = -1
    return lengths


def vocabulary_difference(
    theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast
) -> str | None:
    """Describe how ids or special tokens of two tokenizers differ; return None if they agree."""
    their_ids = theirs.get_vocab()
    our_ids = ours.get_vocab()
    tokens = their_ids.keys() | our_ids.keys()
    differing = [token for token in tokens if their_ids.get(token) != our_ids.get(token)]
    if differing:
        first = min(differing, key=lambda token: (our_ids.get(token, len(our_ids)), token))
        ids = f"id {their_ids.get(first)} instead of {our_ids.get(first)}"
        return (
            f"another vocabulary: {len(differing):,} tokens differ, the first is {first!r} ({ids})"
        )
    their_special = _special_tokens(theirs)
    our_special = _special_tokens(ours)
    if their_special != our_special:
        return f"its special tokens are {their_special}, not {our_special}"
    return None


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder
    return {index: token.content for index, token in added.items() if token.special}
