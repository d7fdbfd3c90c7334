"""Whether teachers fit their student, seen from their small files alone, before anything costs time.

It loads no weights and reads no text: distillation.py does, when all fit.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig

import runs
from data_utils import load_tokenizer, vocabulary_difference
from inference import context_length


def check_teachers(config: dict, tokenizer) -> None:
    """Compare the teachers with the student: vocabulary by content, special tokens, output rows, context.

    Reads small files only. FileNotFoundError or ValueError names the teacher that does not fit. With a cache a teacher
    that is not there is passed over: distillation.identify knows whether it is still needed.
    """
    section, rows = config["distillation"], config["model"]["vocab_size"] or len(tokenizer)
    if section["cache"] == "top_k" and section["top_k"] > rows:
        raise ValueError(f"distillation.top_k: {section['top_k']} is more than the vocabulary's {rows} tokens")
    for path in section["teachers"]:
        if section["cache"] == "top_k" and not runs.is_model(path):
            continue
        runs.require_teacher(path)
        if not Path(path, "tokenizer.json").is_file():
            raise FileNotFoundError(f"teacher {path}: has no tokenizer.json, so its vocabulary cannot be compared")
        try:
            facts = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"teacher {path}: its config.json cannot be read: {str(error).splitlines()[0]}") from None
        problem = vocabulary_difference(load_tokenizer(path), tokenizer)
        for name in ("bos", "eos"):
            theirs, ours = getattr(facts, f"{name}_token_id", None), getattr(tokenizer, f"{name}_token_id")
            if not problem and theirs not in (None, ours):
                problem = f"its {name} token is {theirs}, the student's is {ours}"
        if not problem and facts.vocab_size != rows:
            problem = f"it scores {facts.vocab_size} tokens, the student {rows}: set model.vocab_size to the former"
        seq_length, context = config["data"]["seq_length"], context_length(SimpleNamespace(config=facts))
        if not problem and context < seq_length:
            problem = f"its context is {context} tokens, less than data.seq_length ({seq_length})"
        if problem:
            raise ValueError(f"teacher {path}: does not fit the student: {problem}")
