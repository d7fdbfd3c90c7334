"""Load teachers, the models that a student learns from.

Teachers are local model directories with the student's vocabulary. This module loads them, checks
that they fit, and averages what they predict. It does not train (student.py) and stores
nothing (teacher_cache.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoConfig

from babyllama.data.tokenizer import load_tokenizer, vocabulary_difference
from babyllama.evaluation.loading import context_length, load_model
from babyllama.planning.checks import check_teacher_exists
from babyllama.planning.execution import eager_is_faster, pick_precision
from babyllama.training.attention import attention_mask, prepare_for_chunks

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


# ---- predictions --------------------------------------------------------------------------------


class SoftTargets(NamedTuple):
    """The predictions of teachers: the probabilities (..., K) of the tokens `ids` (..., K).

    Without `ids`, K is the vocabulary and the probabilities are those of all tokens in order.
    """

    probs: torch.Tensor
    ids: torch.Tensor | None = None


def average_teachers(
    logits: Iterable[torch.Tensor], temperature: float, average: str
) -> torch.Tensor:
    """Return the average (..., V) of the teachers' probabilities in float32.

    `logits` holds the logits (..., V) of each teacher. `average` is "probabilities" for the mean of
    softmax(logits / T), or "logits" for the softmax of the mean of logits / T. The latter is a
    geometric mean of probabilities, so one teacher alone can rule a token out.
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
    """Return KL(teachers || student) in nats for each position (...).

    It takes logits (..., V) and targets (..., K). If the targets hold only some tokens, all others
    together count as one outcome, so the student learns how likely they are as a group.
    """
    scaled = student_logits.float() / temperature
    probs, ids = targets
    outcomes = scaled
    if ids is not None:
        outcomes = scaled.gather(-1, ids)  # (..., K)
        if ids.shape[-1] < scaled.shape[-1]:
            # the log of the sum over all other tokens, which are one more outcome
            rest = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            outcomes = torch.cat([outcomes, rest], -1)
            probs = with_dropped_mass(probs)
    return F.kl_div(outcomes.log_softmax(-1), probs, reduction="none").sum(-1)


def with_dropped_mass(probs: torch.Tensor) -> torch.Tensor:
    """Append to probabilities (..., K) what is missing to 1, as one more outcome."""
    dropped = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([probs, dropped], -1)


# ---- models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble:
    """Let several teachers score the same chunks.

    If `document_bos_id` is the id of BOS, they attend within documents only, like the student.
    """

    models: Sequence[torch.nn.Module]
    temperature: float
    average: str
    document_bos_id: int | None = None

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return each teacher's logits (B, T, V) for chunks (B, T)."""
        return [self.logits_of(model, input_ids) for model in self.models]

    def logits_of(self, model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) of one model, with the mask that all teachers get."""
        ids = input_ids.to(model.device)
        mask = attention_mask(model, ids, self.document_bos_id, model.dtype)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def targets(self, logits: list[torch.Tensor], rows: slice = slice(None)) -> SoftTargets:
        """Return the teachers' average for some rows of a batch, given the logits of each."""
        selected = [teacher_logits[rows] for teacher_logits in logits]
        return SoftTargets(average_teachers(selected, self.temperature, self.average))


def load_teachers(config: dict, document_bos_id: int | None) -> Ensemble:
    """Load the teachers of a configuration in the number format that the student trains in."""
    section = config["distillation"]
    precision = pick_precision(config["training"])[0]
    models = [load_model(path, dtype=DTYPES[precision])[0] for path in section["teachers"]]
    for model in models:
        if eager_is_faster(precision, config["data"]["seq_length"]):
            model.set_attn_implementation("eager")
        prepare_for_chunks(model)
    return Ensemble(models, section["temperature"], section["average"], document_bos_id)


def check_teachers(config: dict, tokenizer) -> None:
    """Raise an error that names the first teacher which does not fit the student.

    A token must mean the same to both, so this compares the content of the vocabularies, the
    special tokens, the number of output rows and the context. It reads no weights.
    """
    section = config["distillation"]
    n_rows = config["model"]["vocab_size"] or len(tokenizer)
    if section["cache"] == "top_k" and section["top_k"] > n_rows:
        raise ValueError(
            f"distillation.top_k: {section['top_k']} is more than the vocabulary's {n_rows} tokens"
        )
    for path in section["teachers"]:
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
