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


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes of text that each token id stands for: int64 (V,), 0 for special tokens.

    Over the ids of a text they sum to its length in UTF-8. ValueError for a tokenizer that is not byte-level.
    """
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())  # 256 characters, one for each byte
    added = tokenizer.added_tokens_decoder
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif alphabet.issuperset(token):
            lengths[index] = len(token)
        else:
            raise ValueError(
                f"token {index} ({token!r}) is not made of bytes: a byte-level tokenizer is needed"
            )
    return lengths


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
