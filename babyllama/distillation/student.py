"""Train a student to match teachers' predictions as well as the text.

    loss = alpha x cross-entropy + (1 - alpha) x T^2 x KL(teachers || student)

Hinton, Vinyals and Dean (2015) describe the idea. teachers.py loads the teachers, and
teacher_cache.py keeps their predictions on disk. train.py builds the student.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from babyllama import distributed
from babyllama.distillation.teacher_cache import (
    CachedChunks,
    cache_folder,
    cache_key,
    collate_cached,
    describe_cache,
    write_cache,
)
from babyllama.distillation.teachers import (
    SoftTargets,
    average_teachers,
    divergence,
    load_teachers,
    with_dropped_mass,
)
from babyllama.training.loss import next_token_nll, slice_nll
from babyllama.training.trainer import LMTrainer

# ---- the loss -----------------------------------------------------------------------------------


def distillation_loss(
    student_logits: torch.Tensor,
    targets: SoftTargets,
    input_ids: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the mean loss per predicted token: the definition, which slice_loss computes faster.

    It takes student_logits (B, T, V), targets (B, T, K) and input_ids (B, T). Gradients of the KL
    shrink with 1 / T^2, so the factor T^2 keeps the balance of both terms when T changes (Hinton et
    al.). The last position of a chunk predicts no token of it and does not count.

    Reduction "batchmean" reproduces the published BabyLlama, which used torch's
    KLDivLoss("batchmean") on (B, T, V): it sums the KL over all T positions of a chunk, the last
    one included, and averages over chunks only.
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
    probs: torch.Tensor,
    ids: torch.Tensor | None = None,
    *,
    temperature: float,
    alpha: float,
    kl_weight: float,
    last_positions: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums (loss, nll, KL) of logits (N, V), and factors of the loss's gradient.

    The loss is alpha x nll + kl_weight x KL. The teachers give `probs` (N, K) to the tokens `ids`
    (N, K), or to all tokens. next_ids (N,) holds NO_TARGET at the last position of a chunk, whose
    KL counts only with `last_positions`. HeadLoss calls this for each slice and expects the
    gradient as G x s; here s = 1.

    The gradient is written out by hand because autograd through the definition takes 116 ms instead
    of 55 ms for a slice of 512 tokens (bf16, top_k 64 of 16,000; one AVX512-BF16 core).
    """
    nll, nll_gradient, nll_scale = slice_nll(logits, next_ids)
    ones = torch.ones_like(nll_scale)  # (N, 1)
    position_weight = ones if last_positions else (next_ids >= 0)[:, None].float()
    kl, gradient = _kl_and_gradient(logits, probs, ids, temperature, position_weight, kl_weight)
    gradient.addcmul_(nll_gradient, nll_scale, value=alpha)
    sums = torch.stack([alpha * nll + kl_weight * kl, nll, kl])
    return sums, gradient.to(logits.dtype), ones


def _kl_and_gradient(
    logits: torch.Tensor,
    probs: torch.Tensor,
    ids: torch.Tensor | None,
    temperature: float,
    position_weight: torch.Tensor,
    kl_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the KL summed over positions with weights (N, 1), and its gradient x kl_weight.

    A tensor of N x V numbers takes a lot of memory, so the copy of the logits is reused twice:
    `scaled` holds the logits / T first, then the powers of all tokens outside `ids`, and in the end
    the gradient.
    """
    scaled = logits.to(torch.float32, copy=True).div_(temperature)  # (N, V)
    is_truncated = ids is not None and ids.shape[1] < scaled.shape[1]
    if ids is not None:
        ids = ids.long()  # the cache has smaller integers

    # log-probabilities of the outcomes: all tokens, or the kept ones and the rest as one outcome
    outcomes = scaled if ids is None else scaled.gather(-1, ids)
    if is_truncated:
        # `scaled` becomes -inf at the kept tokens, and then exp(scaled - top), which is 0 for them
        top = scaled.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True)
        rest = scaled.sub_(top).exp_().sum(-1, keepdim=True)  # (N, 1), times exp(top)
        outcomes = torch.cat([outcomes, rest.log() + top], -1)
        probs = with_dropped_mass(probs)
    log_q = outcomes.log_softmax(-1)
    kl = F.kl_div(log_q, probs, reduction="none").sum(-1, keepdim=True)  # (N, 1)
    kl = (kl * position_weight).sum()

    # the gradient of a KL by the logits / T is q - p for each outcome; log_q has served its purpose
    gradient = log_q.exp_().sub_(probs).mul_(position_weight * kl_weight / temperature)
    if ids is None:
        return kl, gradient
    if is_truncated:
        # the gradient of the rest is shared out among its tokens by their probability
        scaled.mul_(gradient[:, -1:] / rest)
    # `scaled` becomes the gradient (N, V) when the kept tokens get theirs
    return kl, scaled.scatter_(-1, ids, gradient[:, : ids.shape[1]])


def _slice_loss_from_teachers(logits, next_ids, *teacher_logits, average: str, **options):
    """Return slice_loss, given the logits (N, V) of each teacher.

    Averaging here, a slice at a time, keeps the average of a batch out of memory.
    """
    probs = average_teachers(teacher_logits, options["temperature"], average)
    return slice_loss(logits, next_ids, probs, **options)


def make_slice_loss(section: dict[str, Any], length: int, cached: bool) -> Callable:
    """Return the loss of a slice for a distillation section and chunks of `length` tokens."""
    alpha = section["alpha"]
    batchmean = section["reduction"] == "batchmean"
    # Trainer divides the sum by the number of predicted tokens, length - 1 in each chunk, but
    # "batchmean" is a mean over chunks
    kl_weight = (1 - alpha) * section["temperature"] ** 2 * (length - 1 if batchmean else 1)
    options = {
        "temperature": section["temperature"],
        "alpha": alpha,
        "kl_weight": kl_weight,
        "last_positions": batchmean,
    }
    if cached:
        return functools.partial(slice_loss, **options)
    return functools.partial(_slice_loss_from_teachers, average=section["average"], **options)


# ---- training -----------------------------------------------------------------------------------


class DistillationTrainer(LMTrainer):
    """Train with the distillation loss.

    The `ensemble` scores every batch; without one, the training chunks must be CachedChunks. Rows
    of the log also hold ce_loss and kd_loss, the means of both terms since the last row, before
    alpha and T^2 weigh them. Evaluation on held-out text needs no teachers, so it is LMTrainer's.
    """

    def __init__(
        self, *args, train_dataset, loss, distillation: dict[str, Any], ensemble=None, **kwargs
    ):
        length = len(train_dataset[0]["input_ids"])
        slice_loss = make_slice_loss(distillation, length, cached=ensemble is None)
        loss = loss.with_slice_loss(slice_loss)
        super().__init__(*args, train_dataset=train_dataset, loss=loss, **kwargs)
        self.ensemble = ensemble
        if ensemble is None:
            self.data_collator = collate_cached
        self._parts = torch.zeros(2, device=self.args.device)  # sums of ce_loss and kd_loss
        self._parts_since = None  # the step of the last row

    def slice_inputs(self, inputs) -> Sequence[torch.Tensor]:
        """Return the teachers' predictions for a batch."""
        if self.ensemble is None:
            return inputs["top_probs"], inputs["top_ids"]
        return self.ensemble.logits(inputs["input_ids"])

    def keep_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Return the loss, the first of the parts (3,), and add up the nll and the KL."""
        if self._parts_since is None:
            self._parts_since = self.state.global_step
        self._parts += parts[1:].detach()
        return parts[0]

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
    """Return the trainer of a run with teachers.

    With a cache the teachers are loaded only if it does not exist yet, to write it. `report` is the
    data report with the result of identify_teachers, and `options` are arguments of LMTrainer.
    """
    section = config["distillation"]
    if section["cache"] == "none":  # the teachers score every batch
        ensemble = load_teachers(config, loss.document_bos_id)
    else:  # they score the text once, or have done so in an earlier run
        ensemble = None
        key = cache_key(config, report["train"]["key"], report["teachers"])
        folder = cache_folder(key)
        with distributed.main_first():
            if not folder.is_dir():
                teachers = load_teachers(config, loss.document_bos_id)
                batch_size = config["training"]["batch_size"]
                write_cache(folder, key, train_dataset, teachers, model, batch_size)
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
