"""Distillation: a student that learns from teachers' distributions besides the text (Hinton, Vinyals and Dean, 2015).

    loss = alpha x cross-entropy + (1 - alpha) x T^2 x KL(teachers || student), the KL at temperature T

Teachers are local model directories with the student's vocabulary (teachers.py compares). They are asked for each
batch, or, with `cache: top_k`, once for each place of the text: the k likeliest tokens of the teachers' average
go to a memory map, and no later epoch or run needs the teachers. The average is kept, not each teacher: it is what the
loss wants, it takes one share of the disk, and an average of logits cannot be had from truncated distributions. The
tokens that were not kept are one outcome more, whose probability is the teachers' dropped mass: so the student is not
taught that they are impossible, and k = vocabulary drops nothing.

This file reads no YAML and builds no student (train.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig

from babyllama.data.tokenizer import load_tokenizer, vocabulary_difference
from babyllama.evaluation.loading import context_length, load_model
from babyllama.files import default_cache_dir, is_model, weights_sha256, write_json
from babyllama.training import distributed
from babyllama.training.kernels import eager_is_faster, pick_precision
from babyllama.training.loss import (
    chunks_are_whole,
    document_mask,
    head_nll,
    next_token_nll,
    slice_nll,
)
from babyllama.training.run_dir import check_teacher_exists
from babyllama.training.trainer import LMTrainer, collate_chunks

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ABOUT, IDS, PROBS = "about.json", "top_ids.npy", "top_probs.npy"
SAMPLE = 16  # chunks on which the error of a cache is measured


# ---- the loss -----------------------------------------------------------------------------------


class SoftTargets(NamedTuple):
    """What the teachers say of each place: probabilities (B, T, K) of the tokens `ids` (B, T, K), or of all (None)."""

    probs: torch.Tensor
    ids: torch.Tensor | None = None


def average_teachers(
    logits: Iterable[torch.Tensor], temperature: float, average: str
) -> torch.Tensor:
    """The teachers' probabilities (..., V) at a temperature, float32, from the logits (..., V) of each.

    average "probabilities": the mean of softmax(logits / T); "logits": softmax(mean of logits / T), a geometric mean.
    """
    total, n = 0.0, 0
    for one in logits:
        total = total + (
            (one.float() / temperature).softmax(-1) if average == "probabilities" else one.float()
        )
        n += 1
    return total / n if average == "probabilities" else (total / (n * temperature)).softmax(-1)


def _outcomes(scaled: torch.Tensor, targets: SoftTargets) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, probabilities) of what the teachers tell apart: the kept tokens and, where some were not, all others."""
    if targets.ids is None:
        return scaled, targets.probs
    kept = scaled.gather(-1, targets.ids)
    if kept.shape[-1] == scaled.shape[-1]:
        return kept, targets.probs
    rest = scaled.scatter(-1, targets.ids, -torch.inf).logsumexp(-1, keepdim=True)
    dropped = (1 - targets.probs.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([kept, rest], -1), torch.cat([targets.probs, dropped], -1)


def divergence(
    student_logits: torch.Tensor, targets: SoftTargets, temperature: float
) -> torch.Tensor:
    """KL(teachers || student) in nats at a temperature, (...), from logits (..., V) and targets (..., K)."""
    outcomes, probs = _outcomes(student_logits.float() / temperature, targets)
    return F.kl_div(outcomes.log_softmax(-1), probs, reduction="none").sum(-1)


def distillation_loss(
    student_logits: torch.Tensor, targets: SoftTargets, input_ids: torch.Tensor, *, temperature: float, alpha: float,
    reduction: str = "mean",
) -> torch.Tensor:  # fmt: skip
    """The loss of chunks, mean per predicted token: student logits (B, T, V), targets (B, T, K), input_ids (B, T).

    alpha x cross-entropy + (1 - alpha) x T^2 x KL; T^2 keeps the gradients' size when T changes (Hinton et al.). The
    last place of a chunk predicts no token of it. This is the definition; training takes slice_loss, which is faster.

    reduction "batchmean" is the published scale of BabyLlama, torch's KLDivLoss("batchmean") on (B, T, V): the KL is
    summed over all T places of a chunk, the last included, and averaged over chunks only.
    """
    chunks, length = input_ids.shape
    predicted = chunks * (length - 1)
    kl = divergence(student_logits, targets, temperature)  # (B, T)
    kl = kl.sum() / chunks if reduction == "batchmean" else kl[:, :-1].sum() / predicted
    return (
        alpha * next_token_nll(student_logits, input_ids) / predicted
        + (1 - alpha) * temperature**2 * kl
    )


def slice_loss(
    logits: torch.Tensor, targets: SoftTargets, next_ids: torch.Tensor, temperature: float, alpha: float,
    kl_weight: float, last_places: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(alpha x nll + kl_weight x KL, its gradient by the logits, (nll, KL)), summed: logits (N, V), targets (N, K).

    next_ids (N,) holds -1 for the last place of a chunk; its KL counts if `last_places`. The gradient of a KL by
    logits / T is q - p for each outcome; that of the rest is shared out as the student shares out the rest.
    """
    nll, gradient, scale = slice_nll(logits, next_ids)
    scaled = logits.to(torch.float32, copy=True).div_(temperature)
    outcomes, probs, ids, total = scaled, targets.probs, targets.ids, 1.0
    if ids is not None:
        outcomes = scaled.gather(-1, ids)
        if (
            ids.shape[1] < scaled.shape[1]
        ):  # all other tokens are one outcome, of which each has its part of `total`
            top = scaled.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True)
            total = scaled.sub_(top).exp_().sum(-1, keepdim=True)
            outcomes = torch.cat([outcomes, total.log() + top], -1)
            probs = torch.cat([probs, (1 - probs.sum(-1, keepdim=True)).clamp(min=0)], -1)
    logq = outcomes.log_softmax(-1)
    wanted = torch.ones_like(scale) if last_places else (next_ids >= 0)[:, None].float()
    kl = (F.kl_div(logq, probs, reduction="none").sum(-1, keepdim=True) * wanted).sum()
    by_outcome = logq.exp_().sub_(probs).mul_(wanted * kl_weight / temperature)
    if ids is not None:
        by_outcome = scaled.mul_(by_outcome[:, -1:] / total).scatter_(
            -1, ids, by_outcome[:, : ids.shape[1]]
        )
    by_outcome.addcmul_(gradient, scale, value=alpha)
    return alpha * nll + kl_weight * kl, by_outcome.to(logits.dtype), torch.stack([nll, kl])


# ---- teachers -----------------------------------------------------------------------------------


def _load_teachers(config: dict) -> list[torch.nn.Module]:
    """The teachers in eval mode, in the run's number format: half precision where the machine has units for it."""
    precision = pick_precision(config["training"])[0]
    teachers = [
        load_model(path, dtype=DTYPES[precision])[0] for path in config["distillation"]["teachers"]
    ]
    if eager_is_faster(precision, config["data"]["seq_length"]):
        for teacher in teachers:
            teacher.set_attn_implementation("eager")
    return teachers


@dataclass(frozen=True)
class Ensemble:
    """Teachers that are asked together; with `mask_from` (the id of BOS) each document of a chunk by itself."""

    models: Sequence[torch.nn.Module]
    temperature: float
    average: str
    mask_from: int | None = None

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Each teacher's logits (B, T, V) for chunks (B, T)."""
        with chunks_are_whole():
            return [self.ask(model, input_ids) for model in self.models]

    def ask(self, model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits (B, T, V) of a teacher, or of the student where it is to see what they see."""
        ids, mask = input_ids.to(model.device), {}
        if self.mask_from is not None:
            mask = {"attention_mask": document_mask(ids, self.mask_from, model.dtype)}
        return model(input_ids=ids, use_cache=False, **mask).logits

    def targets(self, logits: list[torch.Tensor], here: slice = slice(None)) -> SoftTargets:
        """What they say together of some chunks of a batch, from each one's logits for the whole of it."""
        return SoftTargets(
            average_teachers([one[here] for one in logits], self.temperature, self.average)
        )


# ---- the cache ----------------------------------------------------------------------------------


def cache_facts(config: dict, data_key: str, teachers: list[dict[str, str]]) -> dict[str, Any]:
    """All that a cache depends on; `data_key` stands for text, tokenizer and seq_length (DataProcessor)."""
    section = config["distillation"]
    return {
        "version": 1,  # of what is in the files
        "data": data_key,
        "teachers": teachers,
        **{key: section[key] for key in ("temperature", "average", "top_k")},
        "dtype": DTYPES[pick_precision(config["training"])[0]],
        "document_mask": config["data"]["document_mask"],
    }


def cache_folder(facts: dict[str, Any]) -> Path:
    """Where the cache of these facts lies; the teachers count by content, not by path."""
    content = {**facts, "teachers": sorted(teacher["sha256"] for teacher in facts["teachers"])}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    return default_cache_dir() / f"teachers-{digest}"


def identify(config: dict, data_key: str) -> list[dict[str, str]]:
    """[{"path", "sha256"}] of the teachers; of one that is gone, from the cache that it left for this very text.

    FileNotFoundError where a teacher is gone and no cache, or more than one, knows it.
    """
    paths = config["distillation"]["teachers"]
    known = {path: weights_sha256(path) for path in paths if is_model(path)}
    if gone := [path for path in paths if path not in known]:
        wanted, found = cache_facts(config, data_key, []), {}
        for file in default_cache_dir().glob(f"teachers-*/{ABOUT}"):
            facts = json.loads(file.read_text(encoding="utf-8"))["facts"]
            teachers = {teacher["path"]: teacher["sha256"] for teacher in facts["teachers"]}
            same = list(teachers) == paths and all(
                teachers[path] == sha for path, sha in known.items()
            )
            if same and {**facts, "teachers": []} == wanted:
                found[tuple(teachers.values())] = teachers
        if len(found) != 1:
            check_teacher_exists(gone[0])
        (known,) = found.values()
    return [{"path": path, "sha256": known[path]} for path in paths]


class CachedChunks(Dataset):
    """Chunks with what the teachers said of them: rows of input_ids (T,), top_ids (T, K), top_probs (T, K)."""

    def __init__(self, chunks, folder: Path):
        self.chunks = chunks
        try:
            self.ids, self.probs = (np.load(folder / name, mmap_mode="r") for name in (IDS, PROBS))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: damaged ({error}); delete it, and the teachers are asked again"
            ) from None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {**self.chunks[index], "top_ids": self.ids[index], "top_probs": self.probs[index]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """The rows of a batch, which a DataLoader asks for: chunks that can be read together are."""
        together = getattr(
            self.chunks, "__getitems__", lambda indices: [self.chunks[i] for i in indices]
        )
        ids, probs = self.ids[indices], self.probs[indices]
        return [
            {**row, "top_ids": ids[i], "top_probs": probs[i]}
            for i, row in enumerate(together(indices))
        ]


def collate_cached(rows: list[dict]) -> dict[str, torch.Tensor]:
    """What collate_chunks makes of the chunks, and top_ids (B, T, K) int32, top_probs (B, T, K) float32."""
    batch = collate_chunks(rows)
    batch["top_ids"] = torch.from_numpy(np.stack([row["top_ids"] for row in rows]).astype(np.int32))
    batch["top_probs"] = torch.from_numpy(np.stack([row["top_probs"] for row in rows]))
    return batch


def cached_targets(batch: dict[str, torch.Tensor], here: slice = slice(None)) -> SoftTargets:
    """What the teachers said of some chunks of a batch of cached chunks."""
    return SoftTargets(batch["top_probs"][here], batch["top_ids"][here].long())


def write_cache(
    folder: Path, facts: dict[str, Any], chunks, ensemble: Ensemble, student, batch_size: int
) -> None:
    """Ask the teachers about every place of every chunk and keep the best tokens; under its name only when whole.

    top_ids.npy (N, T, K) and top_probs.npy (N, T, K) float32, and about.json with the facts and the measured error.
    ValueError where the disk has too little room.
    """
    k, shape = facts["top_k"], (len(chunks), len(chunks[0]["input_ids"]), facts["top_k"])
    id_type = np.dtype(np.uint16 if student.config.vocab_size <= 1 << 16 else np.int32)
    n_bytes = int(np.prod(shape)) * (id_type.itemsize + 4)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (
        free := shutil.disk_usage(folder.parent).free
    ) < 1.05 * n_bytes:  # a full disk kills who writes to a map of it
        raise ValueError(
            f"{folder.parent}: the teachers' {k} best tokens for {shape[0]:,} chunks take {n_bytes / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; a smaller distillation.top_k, or BABYLLAMA_CACHE on another disk"
        )
    dropped, row = 0.0, 0
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as draft:
        part = Path(draft, folder.name)
        part.mkdir()
        ids = np.lib.format.open_memmap(part / IDS, "w+", id_type, shape)
        probs = np.lib.format.open_memmap(part / PROBS, "w+", np.float32, shape)
        with tqdm(total=len(chunks), desc="asking the teachers", unit="chunk", disable=None) as bar:
            for batch in DataLoader(chunks, batch_size, collate_fn=collate_chunks):
                n, logits = len(batch["input_ids"]), ensemble.logits(batch["input_ids"])
                step = n if logits[0].is_cuda else 1  # one at a time stays in a CPU's cache
                for i in range(0, n, step):
                    top = ensemble.targets(logits, slice(i, i + step)).probs.topk(k)
                    here = slice(row + i, row + i + step)
                    ids[here], probs[here] = top.indices.cpu().numpy(), top.values.cpu().numpy()
                    dropped += (1 - top.values.sum(-1)).clamp(min=0).sum().item()
                row += n
                bar.update(n)
        ids.flush(), probs.flush()
        about = {"facts": facts, "bytes": n_bytes, "dropped_mass": dropped / (shape[0] * shape[1])}
        write_json(
            part / ABOUT, about | measure_error(CachedChunks(chunks, part), ensemble, student)
        )
        if not folder.exists():
            part.rename(folder)


@torch.no_grad()
def measure_error(cached: CachedChunks, ensemble: Ensemble, student) -> dict[str, float]:
    """The student's KL in nats per token on a sample of chunks, against the teachers and against the cache.

    The cached one is the lower: it does not see how the student shares out the rest.
    """
    was_training, device = student.training, ensemble.models[0].device
    student.to(device).eval()
    sums = np.zeros(2)
    sample = np.linspace(0, len(cached) - 1, min(SAMPLE, len(cached))).astype(int)
    for index in sample.tolist():
        batch = {key: value.to(device) for key, value in collate_cached([cached[index]]).items()}
        logits = ensemble.ask(student, batch["input_ids"])
        whole, kept = ensemble.targets(ensemble.logits(batch["input_ids"])), cached_targets(batch)
        sums += [
            divergence(logits, targets, ensemble.temperature).mean().item()
            for targets in (whole, kept)
        ]
    student.train(was_training)
    whole, kept = (sums / len(sample)).tolist()
    return {"sample_chunks": len(sample), "sample_kl": whole, "sample_kl_cached": kept}


# ---- training -----------------------------------------------------------------------------------


class DistillationTrainer(LMTrainer):
    """LMTrainer whose training loss is distillation_loss; without an `ensemble` its chunks are CachedChunks.

    The rows of the log carry ce_loss and kd_loss: the means of the parts over the steps since the last row, before
    alpha and T^2. Held-out evaluation is LMTrainer's.
    """

    def __init__(
        self, *args, distillation: dict[str, Any], ensemble: Ensemble | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.ensemble, self.distillation = ensemble, distillation
        if ensemble is None:
            self.data_collator = collate_cached
        self._fused_slice_loss = torch.compile(
            slice_loss, dynamic=False
        )  # nothing is compiled before it is called
        self._parts, self._parts_since = torch.zeros(2, device=self.args.device), None

    def batch_loss(self, model, inputs, items):
        ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
        if self.ensemble:
            targets = functools.partial(self.ensemble.targets, self.ensemble.logits(ids))
        else:
            targets = functools.partial(cached_targets, inputs)
        if self._parts_since is None:
            self._parts_since = self.state.global_step
        alpha, temperature = self.distillation["alpha"], self.distillation["temperature"]
        batchmean = self.distillation["reduction"] == "batchmean"
        kl_weight = (
            (1 - alpha) * temperature**2 * (length - 1 if batchmean else 1)
        )  # items / (T - 1) is chunks
        done, one_slice = 0, self._fused_slice_loss if self.loss.is_fast(ids) else slice_loss

        def kernel(logits: torch.Tensor, next_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nonlocal done
            here, done = slice(done, done + len(logits) // length), done + len(logits) // length
            some = SoftTargets(
                *(None if part is None else part.flatten(0, 1) for part in targets(here))
            )
            loss, gradient, parts = one_slice(
                logits, some, next_ids, temperature, alpha, kl_weight, batchmean
            )
            self._parts += parts / items
            return loss, gradient, torch.ones(len(logits), 1, device=logits.device)

        def both(model, ids: torch.Tensor) -> torch.Tensor:
            with self.loss.whole_chunks(model, ids):
                states = self.loss.states(model, ids)
            return head_nll(states, model.get_output_embeddings(), ids, self.loss.dtype, kernel)

        return distributed.forward_through_wrapper(model, both, ids) / items

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._parts_since is not None:
            parts = self.accelerator.reduce(self._parts, "sum") / (
                self.state.global_step - self._parts_since
            )
            logs |= zip(("ce_loss", "kd_loss"), parts.tolist(), strict=True)
            self._parts.zero_()
            self._parts_since = None
        super().log(logs, *args, **kwargs)


def make_trainer(config: dict, report: dict, *, model, train_dataset, loss, **options) -> LMTrainer:
    """The trainer of a run; with its teachers, or with their cache, which is written first where there is none.

    `report` is the data report, with `identify`'s teachers where there are any; the rest are LMTrainer's arguments.
    """
    if "distillation" not in config:
        return LMTrainer(model=model, train_dataset=train_dataset, loss=loss, **options)
    section = config["distillation"]
    facts, cached = (
        cache_facts(config, report["train"]["key"], report["teachers"]),
        section["cache"] == "top_k",
    )
    folder = cache_folder(facts)

    def teach() -> Ensemble:
        return Ensemble(
            _load_teachers(config), section["temperature"], section["average"], loss.mask_from
        )

    if cached:
        with distributed.main_first():
            if not folder.is_dir():
                write_cache(
                    folder, facts, train_dataset, teach(), model, config["training"]["batch_size"]
                )
        train_dataset = CachedChunks(train_dataset, folder)
        print("cache       " + cache_words(folder), flush=True)
    options |= {"model": model, "train_dataset": train_dataset, "loss": loss}
    return DistillationTrainer(
        distillation=section, ensemble=None if cached else teach(), **options
    )


def cache_words(folder: Path) -> str:
    """What a cache holds, where, and what was lost."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return (
        f"{about['facts']['top_k']} tokens of each place, {about['bytes'] / 1e6:,.0f} MB in {folder}; dropped mass "
        f"{about['dropped_mass']:.4f} on average; the student's KL before training on {about['sample_chunks']} chunks: "
        f"{about['sample_kl_cached']:.4f} nats per token, uncached {about['sample_kl']:.4f}: the cache tells "
        f"{about['sample_kl_cached'] / max(about['sample_kl'], 1e-9):.0%} of it, a larger distillation.top_k more"
    )


def check_teachers(config: dict, tokenizer) -> None:
    """Compare the teachers with the student: vocabulary by content, special tokens, output rows, context.

    Reads small files only. FileNotFoundError or ValueError names the teacher that does not fit. With a cache a teacher
    that is not there is passed over: distillation.identify knows whether it is still needed.
    """
    section, rows = config["distillation"], config["model"]["vocab_size"] or len(tokenizer)
    if section["cache"] == "top_k" and section["top_k"] > rows:
        raise ValueError(
            f"distillation.top_k: {section['top_k']} is more than the vocabulary's {rows} tokens"
        )
    for path in section["teachers"]:
        if section["cache"] == "top_k" and not is_model(path):
            continue
        check_teacher_exists(path)
        if not Path(path, "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"teacher {path}: has no tokenizer.json, so its vocabulary cannot be compared"
            )
        try:
            facts = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(
                f"teacher {path}: its config.json cannot be read: {str(error).splitlines()[0]}"
            ) from None
        problem = vocabulary_difference(load_tokenizer(path), tokenizer)
        for name in ("bos", "eos"):
            theirs, ours = (
                getattr(facts, f"{name}_token_id", None),
                getattr(tokenizer, f"{name}_token_id"),
            )
            if not problem and theirs not in (None, ours):
                problem = f"its {name} token is {theirs}, the student's is {ours}"
        if not problem and facts.vocab_size != rows:
            problem = f"it scores {facts.vocab_size} tokens, the student {rows}: set model.vocab_size to the former"
        seq_length, context = (
            config["data"]["seq_length"],
            context_length(SimpleNamespace(config=facts)),
        )
        if not problem and context < seq_length:
            problem = f"its context is {context} tokens, less than data.seq_length ({seq_length})"
        if problem:
            raise ValueError(f"teacher {path}: does not fit the student: {problem}")
