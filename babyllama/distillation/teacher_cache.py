"""Keep the predictions of teachers on disk, so that later epochs and runs need not run them.

With `distillation.cache: top_k` the teachers score every position of the training text once. A
memory map then keeps the k likeliest tokens of their average. Averages are kept instead of each
teacher's tokens because the loss needs no more, and because logits cannot be averaged once they are
truncated. The tokens that were dropped count as one more outcome, with the probability that is left
over. So the student does not learn that they are impossible, and with k = vocabulary nothing is
lost.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from babyllama.distillation.teachers import DTYPES, Ensemble, SoftTargets, divergence
from babyllama.files import atomic_write, default_cache_dir, read_json, write_json
from babyllama.model_dir import weights_sha256
from babyllama.planning.execution import pick_precision
from babyllama.training.trainer import collate_chunks

ABOUT_FILE = "about.json"
IDS_FILE = "top_ids.npy"
PROBS_FILE = "top_probs.npy"
SAMPLE_CHUNKS = 16  # on which the error of a cache is measured


def cache_key(config: dict, data_key: str, teachers: list[dict[str, str]]) -> dict[str, Any]:
    """Return everything that the content of a cache depends on.

    `data_key` is DataProcessor's key of the dataset, which covers text, tokenizer and seq_length.
    """
    section = config["distillation"]
    return {
        "version": 1,  # raise it if the files change, so that old caches are ignored
        "data": data_key,
        "teachers": teachers,
        "temperature": section["temperature"],
        "average": section["average"],
        "top_k": section["top_k"],
        "dtype": DTYPES[pick_precision(config["training"])[0]],
        "document_mask": config["data"]["document_mask"],
    }


def cache_folder(key: dict[str, Any]) -> Path:
    """Return the folder of a cache, named after a hash of its key.

    The hash covers the teachers' weights but not their paths, so they may be moved.
    """
    content = {**key, "teachers": sorted(teacher["sha256"] for teacher in key["teachers"])}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    return default_cache_dir() / f"teachers-{digest}"


def identify_teachers(paths: list[str]) -> list[dict[str, str]]:
    """Return {"path", "sha256"} for each teacher; sha256 is the hash of its weights."""
    return [{"path": path, "sha256": weights_sha256(path)} for path in paths]


class CachedChunks(Dataset):
    """Add the teachers' best tokens to chunks: input_ids (T,), top_ids (T, K), top_probs (T, K)."""

    def __init__(self, chunks, folder: Path):
        self.chunks = chunks
        try:
            self.ids = np.load(folder / IDS_FILE, mmap_mode="r")
            self.probs = np.load(folder / PROBS_FILE, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is corrupted ({error}); delete it to run the teachers again"
            ) from None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """Return the rows of a batch. DataLoader calls this if it exists."""
        if hasattr(self.chunks, "__getitems__"):
            rows = self.chunks.__getitems__(indices)
        else:
            rows = [self.chunks[index] for index in indices]
        return [
            {**row, "top_ids": self.ids[index], "top_probs": self.probs[index]}
            for index, row in zip(indices, rows, strict=True)
        ]


def collate_cached(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return a batch of CachedChunks.

    It holds what collate_chunks returns, top_ids (B, T, K) int32 and top_probs (B, T, K) float32.
    """
    batch = collate_chunks(rows)
    batch["top_ids"] = torch.from_numpy(np.stack([row["top_ids"] for row in rows]).astype(np.int32))
    batch["top_probs"] = torch.from_numpy(np.stack([row["top_probs"] for row in rows]))
    return batch


def write_cache(
    folder: Path, key: dict[str, Any], chunks, ensemble: Ensemble, student, batch_size: int
) -> None:
    """Run the teachers over all chunks and keep their likeliest tokens at each position.

    Write top_ids.npy (N, T, K), top_probs.npy (N, T, K) float32, and about.json with the key
    and the measured error. Raise ValueError if the disk has too little space.
    """
    # find out now if the cache does not fit: a memory map on a full disk kills the process
    k = key["top_k"]
    shape = (len(chunks), len(chunks[0]["input_ids"]), k)
    id_type = np.dtype(np.uint16 if student.config.vocab_size <= 1 << 16 else np.int32)
    n_bytes = int(np.prod(shape)) * (id_type.itemsize + 4)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * n_bytes:
        raise ValueError(
            f"{folder.parent}: the teachers' {k} best tokens for {shape[0]:,} chunks take "
            f"{n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; a smaller distillation.top_k, "
            "or BABYLLAMA_CACHE on another disk"
        )

    # run the teachers, a batch at a time
    with atomic_write(folder, keep_existing=True) as draft:
        draft.mkdir(exist_ok=True)
        ids = np.lib.format.open_memmap(draft / IDS_FILE, "w+", id_type, shape)
        probs = np.lib.format.open_memmap(draft / PROBS_FILE, "w+", np.float32, shape)
        dropped = 0.0
        start = 0
        with tqdm(
            total=len(chunks), desc="running the teachers", unit="chunk", disable=None
        ) as bar:
            for batch in DataLoader(chunks, batch_size, collate_fn=collate_chunks):
                logits = ensemble.logits(batch["input_ids"])
                n = len(batch["input_ids"])
                # on a CPU, average one chunk at a time, which fits into its caches
                step = n if logits[0].is_cuda else 1
                for i in range(0, n, step):
                    top = ensemble.targets(logits, slice(i, i + step)).probs.topk(k)
                    rows = slice(start + i, start + i + step)
                    ids[rows] = top.indices.cpu().numpy()
                    probs[rows] = top.values.cpu().numpy()
                    dropped += (1 - top.values.sum(-1)).clamp(min=0).sum().item()
                start += n
                bar.update(n)

        # measure what truncation loses, and record it
        ids.flush()
        probs.flush()
        # existing caches have their key under "facts"
        about = {"facts": key, "bytes": n_bytes, "dropped_mass": dropped / (shape[0] * shape[1])}
        error = measure_error(CachedChunks(chunks, draft), ensemble, student)
        write_json(draft / ABOUT_FILE, about | error)


@torch.no_grad()
def measure_error(cached: CachedChunks, ensemble: Ensemble, student) -> dict[str, float]:
    """Return the student's KL in nats per token on some chunks, with and without the cache.

    The difference is what truncation hides. The KL with the cache is the lower one, because it does
    not see how the student distributes probability among the tokens that were dropped.
    """
    was_training = student.training
    student.to(ensemble.models[0].device).eval()
    n = min(SAMPLE_CHUNKS, len(cached))
    kl = 0.0
    kl_cached = 0.0
    for index in np.linspace(0, len(cached) - 1, n).astype(int).tolist():
        batch = collate_cached([cached[index]])
        batch = {key: tensor.to(student.device) for key, tensor in batch.items()}
        logits = ensemble.logits_of(student, batch["input_ids"])
        complete = ensemble.targets(ensemble.logits(batch["input_ids"]))
        truncated = SoftTargets(batch["top_probs"], batch["top_ids"].long())
        kl += divergence(logits, complete, ensemble.temperature).mean().item()
        kl_cached += divergence(logits, truncated, ensemble.temperature).mean().item()
    student.train(was_training)
    return {"sample_chunks": n, "sample_kl": kl / n, "sample_kl_cached": kl_cached / n}


def describe_cache(folder: Path) -> str:
    """Return a sentence about what a cache holds and what truncation lost."""
    about = read_json(folder / ABOUT_FILE)
    megabytes = about["bytes"] / 1e6
    kl = about["sample_kl"]
    kl_cached = about["sample_kl_cached"]
    content = f"{about['facts']['top_k']} tokens per position, {megabytes:,.0f} MB in {folder}"
    return (
        f"{content}; dropped mass {about['dropped_mass']:.4f} on average. The untrained student's "
        f"KL on {about['sample_chunks']} chunks: {kl_cached:.4f} nats per token with the cache, "
        f"{kl:.4f} without, so the cache keeps {kl_cached / max(kl, 1e-9):.0%} of it "
        "(more with a larger distillation.top_k)"
    )
