"""Train a student on teachers' distributions besides the text (Hinton, Vinyals and Dean, 2015).

    loss = alpha x cross-entropy + (1 - alpha) x T^2 x KL(teachers || student)

Teachers are local model directories with the student's vocabulary. They score each batch or, with
`cache: top_k`, each position of the text once: a memory map keeps the k likeliest tokens of the
teachers' average, and later epochs and runs load no teacher. The average is kept instead of each
teacher because it is all that the loss needs, and because logits cannot be averaged once truncated.
Together the dropped tokens are one more outcome with the dropped mass as its probability. So the
student does not learn that they are impossible, and k = vocabulary drops nothing.

This module reads no YAML and builds no student (train.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
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
from babyllama.files import atomic_write, default_cache_dir, is_model, weights_sha256, write_json
from babyllama.training import distributed
from babyllama.training.chunks import collate_chunks
from babyllama.training.kernels import eager_is_faster, pick_precision
from babyllama.training.loss import attention_mask, next_token_nll, prepare_for_chunks, slice_nll
from babyllama.training.run_dir import check_teacher_exists
from babyllama.training.trainer import LMTrainer

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ABOUT_FILE = "about.json"
IDS_FILE = "top_ids.npy"
PROBS_FILE = "top_probs.npy"
SAMPLE_CHUNKS = 16  # on which the error of a cache is measured


# ---- the loss -----------------------------------------------------------------------------------


class SoftTargets(NamedTuple):
    """Teachers' probabilities (..., K) of the tokens `ids` (..., K), or of all tokens (None)."""

    probs: torch.Tensor
    ids: torch.Tensor | None = None


def average_teachers(
    logits: Iterable[torch.Tensor], temperature: float, average: str
) -> torch.Tensor:
    """Return the average (..., V) of teachers' probabilities, float32, from the logits of each.

    `average` is "probabilities" for the mean of softmax(logits / T), or "logits" for softmax(mean
    of logits / T), which is a geometric mean.
    """
    total = 0.0
    n_teachers = 0
    for teacher_logits in logits:
        scaled = teacher_logits.float() / temperature
        total = total + (scaled.softmax(-1) if average == "probabilities" else scaled)
        n_teachers += 1
    mean = total / n_teachers
    return mean if average == "probabilities" else mean.softmax(-1)


def divergence(
    student_logits: torch.Tensor, targets: SoftTargets, temperature: float
) -> torch.Tensor:
    """Return KL(teachers || student) in nats (...), from logits (..., V) and targets (..., K)."""
    scaled = student_logits.float() / temperature
    probs, ids = targets
    outcomes = scaled
    if ids is not None:
        outcomes = scaled.gather(-1, ids)  # (..., K)
        if ids.shape[-1] < scaled.shape[-1]:
            # all other tokens are one outcome
            rest = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            outcomes = torch.cat([outcomes, rest], -1)
            probs = _with_dropped_mass(probs)
    return F.kl_div(outcomes.log_softmax(-1), probs, reduction="none").sum(-1)


def _with_dropped_mass(probs: torch.Tensor) -> torch.Tensor:
    dropped = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([probs, dropped], -1)


def distillation_loss(
    student_logits: torch.Tensor,
    targets: SoftTargets,
    input_ids: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the mean loss per predicted token of chunks: the definition that slice_loss speeds up.

    The loss is alpha x cross-entropy + (1 - alpha) x T^2 x KL, from student_logits (B, T, V),
    targets (B, T, K) and input_ids (B, T). T^2 keeps the size of the gradients when T changes
    (Hinton et al.). The last position of a chunk predicts no token of it. Reduction "batchmean" is
    the scale of the published BabyLlama, torch's KLDivLoss("batchmean") on (B, T, V): the KL is
    summed over all T positions of a chunk, the last one included, and averaged over chunks only.
    """
    chunks, length = input_ids.shape
    predicted = chunks * (length - 1)
    kl = divergence(student_logits, targets, temperature)  # (B, T)
    kl = kl.sum() / chunks if reduction == "batchmean" else kl[:, :-1].sum() / predicted
    cross_entropy = next_token_nll(student_logits, input_ids) / predicted
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * kl


def slice_loss(
    logits: torch.Tensor,
    next_ids: torch.Tensor,
    targets: SoftTargets,
    *,
    temperature: float,
    alpha: float,
    kl_weight: float,
    last_positions: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums (loss, nll, KL) of logits (N, V), and factors of the loss's gradient.

    The loss is alpha x nll + kl_weight x KL. next_ids (N,) holds -1 at the last position of a
    chunk, whose KL counts only with `last_positions`; targets are (N, K). The gradient is written
    out by hand: autograd through the definition takes 116 ms instead of 55 ms for a slice of 512
    tokens (bf16, top_k 64 of 16,000; one AVX512-BF16 core).
    """
    nll, nll_gradient, nll_scale = slice_nll(logits, next_ids)
    n_columns = logits.shape[1]
    scaled = logits.to(torch.float32, copy=True).div_(temperature)  # (N, V), reused below
    probs, ids = targets
    is_truncated = ids is not None and ids.shape[1] < n_columns

    # log-probabilities of the outcomes: all tokens, or the kept ones and the rest
    outcomes = scaled if ids is None else scaled.gather(-1, ids)
    if is_truncated:
        top = scaled.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True)
        rest = scaled.sub_(top).exp_().sum(-1, keepdim=True)  # (N, 1), times exp(top)
        outcomes = torch.cat([outcomes, rest.log() + top], -1)
        probs = _with_dropped_mass(probs)
    log_q = outcomes.log_softmax(-1)
    counts = torch.ones_like(nll_scale) if last_positions else (next_ids >= 0)[:, None].float()
    kl = (F.kl_div(log_q, probs, reduction="none").sum(-1, keepdim=True) * counts).sum()

    # the gradient of a KL by logits / T is q - p for each outcome
    gradient = log_q.exp_().sub_(probs).mul_(counts * kl_weight / temperature)
    if ids is not None:
        by_kept = gradient[:, : ids.shape[1]]
        # a token of the rest gets its share of that outcome's gradient
        by_rest = scaled.mul_(gradient[:, -1:] / rest) if is_truncated else scaled
        gradient = by_rest.scatter_(-1, ids, by_kept)
    gradient.addcmul_(nll_gradient, nll_scale, value=alpha)
    sums = torch.stack([alpha * nll + kl_weight * kl, nll, kl])
    return sums, gradient.to(logits.dtype), torch.ones_like(nll_scale)


def _loss_from_logits(logits, next_ids, *teacher_logits, average: str, **options):
    """Return slice_loss for the logits (N, V) of each teacher."""
    probs = average_teachers(teacher_logits, options["temperature"], average)
    return slice_loss(logits, next_ids, SoftTargets(probs), **options)


def _loss_from_cache(logits, next_ids, top_ids, top_probs, **options):
    """Return slice_loss for cached tokens (N, K) and their probabilities (N, K)."""
    return slice_loss(logits, next_ids, SoftTargets(top_probs, top_ids.long()), **options)


def make_kernel(section: dict[str, Any], length: int, cached: bool) -> Callable:
    """Return the kernel of HeadLoss for a distillation section and chunks of `length` tokens."""
    alpha = section["alpha"]
    batchmean = section["reduction"] == "batchmean"
    # Trainer divides by the predicted tokens: chunks are 1 / (length - 1) of them
    kl_weight = (1 - alpha) * section["temperature"] ** 2 * (length - 1 if batchmean else 1)
    options = {
        "temperature": section["temperature"],
        "alpha": alpha,
        "kl_weight": kl_weight,
        "last_positions": batchmean,
    }
    if cached:
        return functools.partial(_loss_from_cache, **options)
    return functools.partial(_loss_from_logits, average=section["average"], **options)


# ---- teachers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble:
    """Teachers that score chunks together, document by document if `mask_from` is the id of BOS."""

    models: Sequence[torch.nn.Module]
    temperature: float
    average: str
    mask_from: int | None = None

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return each teacher's logits (B, T, V) for chunks (B, T)."""
        return [self.logits_of(model, input_ids) for model in self.models]

    def logits_of(self, model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) of one model with the teachers' mask."""
        ids = input_ids.to(model.device)
        mask = attention_mask(model, ids, self.mask_from, model.dtype)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def targets(self, logits: list[torch.Tensor], rows: slice = slice(None)) -> SoftTargets:
        """Return the teachers' average for some rows of a batch, from each one's logits."""
        selected = [teacher_logits[rows] for teacher_logits in logits]
        return SoftTargets(average_teachers(selected, self.temperature, self.average))


def load_teachers(config: dict, mask_from: int | None) -> Ensemble:
    """Load the teachers of a configuration, in the number format that training uses here."""
    section = config["distillation"]
    precision = pick_precision(config["training"])[0]
    models = [load_model(path, dtype=DTYPES[precision])[0] for path in section["teachers"]]
    for model in models:
        if eager_is_faster(precision, config["data"]["seq_length"]):
            model.set_attn_implementation("eager")
        prepare_for_chunks(model)
    return Ensemble(models, section["temperature"], section["average"], mask_from)


def check_teachers(config: dict, tokenizer) -> None:
    """Raise an error that names a teacher which does not fit the student.

    Compares vocabulary by content, special tokens, output rows and context, and reads small files
    only. With a cache, a missing teacher is skipped: identify_teachers knows if it is needed.
    """
    section = config["distillation"]
    uses_cache = section["cache"] == "top_k"
    n_rows = config["model"]["vocab_size"] or len(tokenizer)
    if uses_cache and section["top_k"] > n_rows:
        raise ValueError(
            f"distillation.top_k: {section['top_k']} is more than the vocabulary's {n_rows} tokens"
        )
    for path in section["teachers"]:
        if uses_cache and not is_model(path):
            continue
        check_teacher_exists(path)
        if not Path(path, "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"teacher {path}: has no tokenizer.json, so its vocabulary cannot be compared"
            )
        problem = _mismatch(path, tokenizer, n_rows, config["data"]["seq_length"])
        if problem:
            raise ValueError(f"teacher {path}: does not fit the student: {problem}")


def _mismatch(path: str, tokenizer, n_rows: int, seq_length: int) -> str | None:
    """Return the first difference between a teacher and the student, or None."""
    try:
        teacher = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"teacher {path}: its config.json cannot be read: {reason}") from None
    difference = vocabulary_difference(load_tokenizer(path), tokenizer)
    if difference:
        return difference
    for name in ("bos", "eos"):
        teacher_id = getattr(teacher, f"{name}_token_id", None)
        student_id = getattr(tokenizer, f"{name}_token_id")
        if teacher_id not in (None, student_id):
            return f"its {name} token is {teacher_id}, the student's is {student_id}"
    if teacher.vocab_size != n_rows:
        return (
            f"it scores {teacher.vocab_size} tokens, the student {n_rows}: set model.vocab_size to "
            "the former"
        )
    context = context_length(SimpleNamespace(config=teacher))
    if context < seq_length:
        return f"its context is {context} tokens, less than data.seq_length ({seq_length})"
    return None


# ---- the cache ----------------------------------------------------------------------------------


def cache_facts(config: dict, data_key: str, teachers: list[dict[str, str]]) -> dict[str, Any]:
    """Return all that a cache depends on.

    `data_key` stands for text, tokenizer and seq_length (DataProcessor).
    """
    section = config["distillation"]
    return {
        "version": 1,  # of the files' content
        "data": data_key,
        "teachers": teachers,
        "temperature": section["temperature"],
        "average": section["average"],
        "top_k": section["top_k"],
        "dtype": DTYPES[pick_precision(config["training"])[0]],
        "document_mask": config["data"]["document_mask"],
    }


def cache_folder(facts: dict[str, Any]) -> Path:
    """Return the folder of a cache, named by a hash of its facts (not the teachers' paths)."""
    content = {**facts, "teachers": sorted(teacher["sha256"] for teacher in facts["teachers"])}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    return default_cache_dir() / f"teachers-{digest}"


def identify_teachers(config: dict, data_key: str) -> list[dict[str, str]]:
    """Return [{"path", "sha256"}] of the teachers.

    A deleted teacher is identified by the cache that it left for this text. Raises
    FileNotFoundError if there is no such cache, or more than one.
    """
    paths = config["distillation"]["teachers"]
    hashes = {path: weights_sha256(path) for path in paths if is_model(path)}
    missing = [path for path in paths if path not in hashes]
    if missing:
        candidates = [
            cached
            for cached in _cached_teachers(cache_facts(config, data_key, []))
            if list(cached) == paths and hashes.items() <= cached.items()
        ]
        if len(candidates) != 1:
            check_teacher_exists(missing[0])
        (hashes,) = candidates
    return [{"path": path, "sha256": hashes[path]} for path in paths]


def _cached_teachers(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return {path: sha256} of each cache's teachers, for caches with these facts otherwise."""
    cached = []
    for file in default_cache_dir().glob(f"teachers-*/{ABOUT_FILE}"):
        others = json.loads(file.read_text(encoding="utf-8"))["facts"]
        if {**others, "teachers": []} == facts:
            cached.append({teacher["path"]: teacher["sha256"] for teacher in others["teachers"]})
    return cached


class CachedChunks(Dataset):
    """Chunks with the teachers' best tokens: input_ids (T,), top_ids (T, K), top_probs (T, K)."""

    def __init__(self, chunks, folder: Path):
        self.chunks = chunks
        try:
            self.ids = np.load(folder / IDS_FILE, mmap_mode="r")
            self.probs = np.load(folder / PROBS_FILE, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is corrupted ({error}); delete it, and the teachers are asked again"
            ) from None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """Return the rows of a batch (called by DataLoader)."""
        if hasattr(self.chunks, "__getitems__"):
            rows = self.chunks.__getitems__(indices)
        else:
            rows = [self.chunks[index] for index in indices]
        return [
            {**row, "top_ids": self.ids[index], "top_probs": self.probs[index]}
            for index, row in zip(indices, rows, strict=True)
        ]


def collate_cached(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return collate_chunks' tensors, top_ids (B, T, K) int32 and top_probs (B, T, K) float32."""
    batch = collate_chunks(rows)
    batch["top_ids"] = torch.from_numpy(np.stack([row["top_ids"] for row in rows]).astype(np.int32))
    batch["top_probs"] = torch.from_numpy(np.stack([row["top_probs"] for row in rows]))
    return batch


def write_cache(
    folder: Path, facts: dict[str, Any], chunks, ensemble: Ensemble, student, batch_size: int
) -> None:
    """Score each position of each chunk with the teachers and keep the likeliest tokens.

    Writes top_ids.npy (N, T, K), top_probs.npy (N, T, K) float32, and about.json with the facts
    and the measured error. Raises ValueError if the disk has too little room.
    """
    k = facts["top_k"]
    shape = (len(chunks), len(chunks[0]["input_ids"]), k)
    id_type = np.dtype(np.uint16 if student.config.vocab_size <= 1 << 16 else np.int32)
    n_bytes = int(np.prod(shape)) * (id_type.itemsize + 4)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * n_bytes:  # writing to a memory map on a full disk kills the process
        raise ValueError(
            f"{folder.parent}: the teachers' {k} best tokens for {shape[0]:,} chunks take "
            f"{n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; a smaller distillation.top_k, "
            "or BABYLLAMA_CACHE on another disk"
        )
    with atomic_write(folder) as draft:
        draft.mkdir(exist_ok=True)
        ids = np.lib.format.open_memmap(draft / IDS_FILE, "w+", id_type, shape)
        probs = np.lib.format.open_memmap(draft / PROBS_FILE, "w+", np.float32, shape)
        dropped = 0.0
        start = 0
        with tqdm(total=len(chunks), desc="asking the teachers", unit="chunk", disable=None) as bar:
            for batch in DataLoader(chunks, batch_size, collate_fn=collate_chunks):
                logits = ensemble.logits(batch["input_ids"])
                n = len(batch["input_ids"])
                step = n if logits[0].is_cuda else 1  # one chunk at a time fits a CPU's cache
                for i in range(0, n, step):
                    top = ensemble.targets(logits, slice(i, i + step)).probs.topk(k)
                    rows = slice(start + i, start + i + step)
                    ids[rows] = top.indices.cpu().numpy()
                    probs[rows] = top.values.cpu().numpy()
                    dropped += (1 - top.values.sum(-1)).clamp(min=0).sum().item()
                start += n
                bar.update(n)
        ids.flush()
        probs.flush()
        about = {"facts": facts, "bytes": n_bytes, "dropped_mass": dropped / (shape[0] * shape[1])}
        error = measure_error(CachedChunks(chunks, draft), ensemble, student)
        write_json(draft / ABOUT_FILE, about | error)


@torch.no_grad()
def measure_error(cached: CachedChunks, ensemble: Ensemble, student) -> dict[str, float]:
    """Return the student's KL in nats per token on sampled chunks, with the cache and without.

    The cached KL is lower: it cannot see how the student distributes the mass of the dropped
    tokens.
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
    """Return one line on the content of a cache and on what truncation lost."""
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
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


# ---- training -----------------------------------------------------------------------------------


class DistillationTrainer(LMTrainer):
    """LMTrainer with the distillation loss. Without an `ensemble`, its chunks are CachedChunks.

    The rows of the log carry ce_loss and kd_loss: the means of both parts since the last row,
    before alpha and T^2. Evaluation on held-out text is LMTrainer's.
    """

    def __init__(self, *args, loss, distillation: dict[str, Any], ensemble=None, **kwargs):
        super().__init__(*args, loss=loss, **kwargs)
        self.ensemble = ensemble
        if ensemble is None:
            self.data_collator = collate_cached
        length = len(self.train_dataset[0]["input_ids"])
        loss.set_kernel(make_kernel(distillation, length, cached=ensemble is None))
        self._parts = torch.zeros(2, device=self.args.device)  # sums of ce_loss and kd_loss
        self._parts_since = None  # the step of the last row

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this batch's part of the step's loss (LMTrainer.compute_loss)."""
        if self._parts_since is None:
            self._parts_since = self.state.global_step
        input_ids = inputs["input_ids"]
        with self.accelerator.autocast():
            if self.ensemble is None:
                targets = inputs["top_ids"], inputs["top_probs"]
            else:
                targets = self.ensemble.logits(input_ids)
            sums = self.loss(model, input_ids, *targets) / num_items_in_batch  # loss, nll, KL
        self._parts += sums[1:].detach()
        loss = sums[0] * self.accelerator.num_processes
        self._note_batch(loss.detach(), input_ids.shape[1])
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._parts_since is not None:
            n_steps = self.state.global_step - self._parts_since
            ce_loss, kd_loss = (self.accelerator.reduce(self._parts, "sum") / n_steps).tolist()
            logs |= {"ce_loss": ce_loss, "kd_loss": kd_loss}
            self._parts.zero_()
            self._parts_since = None
        super().log(logs, *args, **kwargs)


def make_distillation_trainer(
    config: dict, report: dict, *, model, train_dataset, loss, **options
) -> DistillationTrainer:
    """Return the trainer of a run with teachers, or with their cache, which is written if missing.

    `report` is the data report with identify_teachers' result; `options` are LMTrainer's arguments.
    """
    section = config["distillation"]
    if section["cache"] == "none":
        ensemble = load_teachers(config, loss.mask_from)
    else:
        ensemble = None
        facts = cache_facts(config, report["train"]["key"], report["teachers"])
        folder = cache_folder(facts)
        with distributed.main_first():
            if not folder.is_dir():
                teachers = load_teachers(config, loss.mask_from)
                batch_size = config["training"]["batch_size"]
                write_cache(folder, facts, train_dataset, teachers, model, batch_size)
        train_dataset = CachedChunks(train_dataset, folder)
        print("cache       " + describe_cache(folder), flush=True)
    return DistillationTrainer(
        model=model,
        train_dataset=train_dataset,
        loss=loss,
        distillation=section,
        ensemble=ensemble,
        **options,
    )
