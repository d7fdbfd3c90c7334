"""Provide what the experiments share: timing, child processes, random chunks, a tokenizer.

Import it before babyllama. It puts the repository on sys.path, after the installed packages because
lm-eval imports another `evaluate`, and remembers the environment before babyllama changes it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

USER_ENVIRONMENT = dict(os.environ)  # before babyllama sets how OpenMP threads wait
VOCABULARY = 16_000


def use_default_threads() -> None:
    """Undo babyllama's OpenMP setting, for programs of others; call it before torch is imported."""
    if "GOMP_SPINCOUNT" not in USER_ENVIRONMENT:
        os.environ.pop("GOMP_SPINCOUNT", None)


def run_child(script: str, arguments: list[str]) -> dict:
    """Run a script in its own process and return the JSON object on its last line of output."""
    child = subprocess.run(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=USER_ENVIRONMENT,
        check=False,
    )
    if child.returncode:
        raise ValueError(f"{' '.join(arguments)}: failed with exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def seconds_of(call: Callable[[], object], device=None) -> float:
    """Return the time of a call; `device` is the torch device that it computes on, if a GPU."""
    import torch

    on_gpu = device is not None and torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float], form: str = ".2f") -> str:
    """Return the median of some values, with minimum and maximum in brackets."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def chunks_per_step(config: dict) -> int:
    """Return the number of chunks in one optimizer step of one process."""
    training = config["training"]
    return training["batch_size"] * training["gradient_accumulation_steps"]


def random_chunks(config: dict, count: int, vocab_size: int) -> list[dict]:
    """Return chunks of random token ids, none of them special."""
    import numpy as np

    shape = (count, config["data"]["seq_length"])
    ids = np.random.default_rng(0).integers(3, vocab_size, shape)
    return [{"input_ids": row.tolist()} for row in ids]


def tokenizer_or_stand_in(config: dict):
    """Return the configuration's tokenizer; 16,000 invented words if it does not exist."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from babyllama.data.tokenizer import load_tokenizer

    if Path(config["data"]["tokenizer_path"]).exists():
        return load_tokenizer(config["data"]["tokenizer_path"])
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
