"""Load tokenizers and compare them. train_tokenizer.py trains them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from babyllama.files import sha256

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast


def tokenizer_sources(path: str | Path) -> list[dict] | None:
    """The files that train_tokenizer.py trained the tokenizer at `path` on; None without a record of this very file."""
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        facts = json.loads(tokenizer_record_path(file).read_text(encoding="utf-8"))
        return facts["sources"] if facts["tokenizer_sha256"] == sha256(file) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def tokenizer_record_path(file: Path) -> Path:
    """Where train_tokenizer.py says what the tokenizer in `file` learned from."""
    return file.with_name(file.name.removesuffix(".json") + ".source.json")


SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer in a tokenizer.json file, or in a directory that holds one; padding on the right.

    FileNotFoundError when there is none, ValueError for a damaged one. Special tokens are set where the file has them.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        command = f"python train_tokenizer.py --data-dir ./data/train --output {file}"
        raise FileNotFoundError(f"{file}: no tokenizer here; make one with: {command}")
    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the Rust code is not an Exception
        raise ValueError(f"{file}: not a tokenizer.json that can be read ({error})") from None
    present = {
        name: token
        for name, token in SPECIAL_TOKENS.items()
        if backend.token_to_id(token) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        unk_token=None,
        **present,
    )


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Return the bytes of text that each token id stands for; none for special tokens.

    Raises ValueError for a tokenizer that is not byte-level.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    # GPT-2's alphabet: a printable byte is its own character, the others are U+0100, U+0101, ...
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
                f"token {token_id} ({token!r}) is not made of bytes: a byte-level tokenizer is needed"
            )
    return texts


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return how many bytes of text each token id stands for: int64 (V,), 0 for special tokens.

    The lengths of a text's tokens add up to its length in UTF-8.
    """
    import numpy as np

    return np.array([len(text) for text in token_bytes(tokenizer)], dtype=np.int64)


def vocabulary_difference(
    theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast
) -> str | None:
    """How the content of two tokenizers differs (token -> id, special tokens), in words, or None."""
    found, wanted = theirs.get_vocab(), ours.get_vocab()
    other = [
        token for token in found.keys() | wanted.keys() if found.get(token) != wanted.get(token)
    ]
    if other:
        first = min(other, key=lambda token: (wanted.get(token, len(wanted)), token))
        ids = f"id {found.get(first)} there, {wanted.get(first)} here"
        return f"another vocabulary: {len(other):,} tokens differ, the first is {first!r} ({ids})"
    special = [
        {i: t.content for i, t in one.added_tokens_decoder.items() if t.special}
        for one in (theirs, ours)
    ]
    return (
        None
        if special[0] == special[1]
        else f"its special tokens are {special[0]}, not {special[1]}"
    )
