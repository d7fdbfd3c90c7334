"""What moves the weights: AdamW or Muon, the course of the learning rate, and an average of the weights.

    optimizer = make_optimizer(model, config["training"])
    factor = schedule(config["training"], total_steps=1000)     # factor(step) x lr is the learning rate

It knows the keys of the `training` section and no Trainer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from babyllama.device import fast_dtype

WSD_DECAY = (
    0.2  # share of the steps in which wsd falls: Hu et al. 2024 (MiniCPM) found 8 to 20 % enough
)
ITERATIONS = 5  # of Newton and Schulz: torch's default
STACK_ELEMENTS = (
    2**23
)  # of matrices that are orthogonalised together; in float32 that takes 170 MB at its peak


def schedule(training: dict[str, Any], total_steps: int) -> Callable[[int], float]:
    """The learning rate at each step (0, 1, ...) as a fraction of `lr`: linear warm-up, then lr_scheduler to min_lr.

    wsd (warm-up, stable, decay) stays at `lr` and falls linearly over the last fifth of all steps.
    """
    warmup = training["warmup_steps"] or math.ceil((training["warmup_ratio"] or 0) * total_steps)
    kind, low = training["lr_scheduler"], training["min_lr"] / training["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if kind == "cosine":
            high = 0.5 * (1 + math.cos(math.pi * done))
        elif kind == "linear":
            high = 1 - done
        elif kind == "wsd":
            high = min(1.0, max(0, total_steps - step) / max(1, WSD_DECAY * total_steps))
        else:
            return 1.0
        return low + (1 - low) * high

    return factor


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
):
    """Each matrix (n, A, B) with its singular values near 1: a quintic Newton-Schulz iteration (Jordan et al. 2024)."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT  # (n, A, A)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon, taking all matrices of a shape together, in the number format that the machine has units for.

    torch's own takes each by itself, always in bfloat16: many small products on a GPU, slow ones on a CPU without units
    for it (docs/results.md). The step is scaled to the size of AdamW's (match_rms_adamw, Liu et al. 2025), so that
    both take the same `lr`.
    """

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(
            params, lr, weight_decay, ns_steps=ITERATIONS, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, own in alike.items():
                at_once = max(1, STACK_ELEMENTS // shape.numel())
                for at in range(0, len(own), at_once):
                    self._move(group, own[at : at + at_once])

    def _move(self, group: dict[str, Any], weights: list[torch.nn.Parameter]) -> None:
        """One step for matrices of one shape (A, B): momentum, Nesterov's, orthogonalised; weight decay."""
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        lr, decay, momentum = (float(group[key]) for key in ("lr", "weight_decay", "momentum"))
        gradients, momenta = (
            [p.grad for p in weights],
            [self.state[p]["momentum_buffer"] for p in weights],
        )
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        stack = torch.stack(torch._foreach_lerp(gradients, momenta, momentum))  # (n, A, B)
        stack = stack.to(fast_dtype(stack.device))
        made = orthogonal(stack, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(
            weights[0].dtype
        )
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(
            weights, list(made.unbind()), alpha=-lr * 0.2 * math.sqrt(max(stack.shape[1:]))
        )


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on matrices, AdamW on the rest, as one optimizer with the groups of both."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = (muon, adamw)
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """One list of groups, the same objects as the parts', so that a learning rate set here is set there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])
        self._share()


class WeightAverage:
    """An exponential moving average of a model's weights, in a copy of it: `module`. The first update copies.

    torch's AveragedModel does the same, but keeps its count on the CPU and so waits for the GPU at each step.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.module, self.decay, self.begun = copy.deepcopy(model), decay, False

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Let the present weights in."""
        own, new = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(own, new, 1 - self.decay if self.begun else 1.0)
        self.begun = True


def _kinds(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], ...]:
    """(matrices of the layers, embeddings and output layer, vectors) of a model."""
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    tables.add(id(model.get_output_embeddings().weight))
    weights = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in weights if p.ndim >= 2]
    inner, outer = (
        [p for p in matrices if id(p) not in tables],
        [p for p in matrices if id(p) in tables],
    )
    return inner, outer, [p for p in weights if p.ndim < 2]


def flops_per_step(model: torch.nn.Module, training: dict[str, Any]) -> int:
    """Floating-point operations of the matrix products of an optimiser's step: three for each of Muon's iterations."""
    if training["optimizer"] != "muon":
        return 0
    sizes = [sorted(p.shape) for p in _kinds(model)[0]]
    return ITERATIONS * sum(4 * m * m * n + 2 * m**3 for m, n in sizes)


def make_optimizer(model: torch.nn.Module, training: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over all weights, or Muon over the matrices of the layers and AdamW over embeddings, head and vectors.

    Matrices decay by training.weight_decay, vectors (norms, biases) do not.
    """
    inner, outer, vectors = _kinds(model)
    common = {"lr": training["lr"], "weight_decay": training["weight_decay"]}
    betas = training["adam_beta1"], training["adam_beta2"]
    adamw = {**common, "betas": betas, "eps": training["adam_epsilon"], "fused": True}
    if training["optimizer"] == "adamw":
        matrices = [
            p for p in model.parameters() if p.requires_grad and p.ndim >= 2
        ]  # in one order, for resuming
        return torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **adamw
        )
    muon = Muon(inner, **common)
    return MuonAdamW(
        muon,
        torch.optim.AdamW([{"params": outer}, {"params": vectors, "weight_decay": 0.0}], **adamw),
    )
