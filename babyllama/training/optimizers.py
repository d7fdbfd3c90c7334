"""Update the weights: AdamW or Muon, the learning-rate schedule, a moving average of the weights.

Everything here follows from the keys of the `training` section; Trainer only calls it.

    optimizer = make_optimizer(model, config["training"])
    factor = schedule(config["training"], total_steps=1000)  # learning rate = lr x factor(step)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from babyllama.device import fast_dtype

# wsd decays in this share of all steps. Hu et al. 2024 (MiniCPM) found 8 to 20% enough.
WSD_DECAY = 0.2
NEWTON_SCHULZ_STEPS = 5  # torch's default
# Muon orthogonalizes at most this many weights together: 170 MB at the peak in float32
STACK_ELEMENTS = 2**23


def warmup_steps(training: dict[str, Any], total_steps: int) -> int:
    """Return the number of steps of warm-up, which may be given as a share of all steps."""
    return training["warmup_steps"] or math.ceil((training["warmup_ratio"] or 0) * total_steps)


def schedule(training: dict[str, Any], total_steps: int) -> Callable[[int], float]:
    """Return a function that maps a step (0, 1, ...) to a factor of `lr`.

    The learning rate rises linearly from 0 during warm-up, as Hugging Face's schedules do, and then
    falls to `min_lr` as `lr_scheduler` says. wsd (warm-up, stable, decay) keeps `lr` and falls
    linearly over the last fifth of all steps.
    """
    warmup = warmup_steps(training, total_steps)
    kind = training["lr_scheduler"]
    min_factor = training["min_lr"] / training["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if kind == "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * progress))
        elif kind == "linear":
            decay = 1 - progress
        elif kind == "wsd":
            decay = min(1.0, max(0, total_steps - step) / max(1, WSD_DECAY * total_steps))
        else:
            assert kind == "constant", kind
            return 1.0
        return min_factor + (1 - min_factor) * decay

    return factor


def decay_steps(training: dict[str, Any]) -> float | None:
    """Return over how many steps the weights forget at the peak learning rate, or None.

    Each step multiplies a weight by 1 - lr x weight_decay. So the update of n steps ago counts
    exp(-n / steps), with steps = 1 / (lr x weight_decay) (Wang and Aitchison 2024).
    """
    decay_per_step = training["lr"] * training["weight_decay"]
    return 1 / decay_per_step if decay_per_step else None


# ---- Muon ---------------------------------------------------------------------------------------


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Move the singular values of each matrix (n, A, B) close to 1, keeping its singular vectors.

    This is the quintic Newton-Schulz iteration of Jordan et al. (2024):

        x <- a x + (b x x' + c (x x')^2) x
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    # with A <= B, x x' is the smaller of the two possible gram matrices
    x = matrices.mT if is_tall else matrices  # (n, A, B)
    # the iteration needs singular values of at most 1, and the Frobenius norm bounds the largest
    norms = x.flatten(1).norm(dim=1).clamp(min=eps)  # (n,)
    x = x / norms[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT  # (n, A, A)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (n, A, A)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (n, A, B)
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """Compute torch's Muon step faster, for all matrices of a shape together.

    torch orthogonalizes one matrix at a time and always in bfloat16, even if the machine has no
    units for it. On such a CPU, torch's step for llama-10M takes 5,985 ms, longer than the 3,745 ms
    of both passes of a batch; ours takes 361 ms. With bfloat16 units it takes 82 ms, ours 39 ms
    (docs/results.md). State and settings are torch's.

    Updates are scaled to the size of AdamW's (match_rms_adamw, Liu et al. 2025), so that both can
    share one `lr`.
    """

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(
            params, lr, weight_decay, ns_steps=NEWTON_SCHULZ_STEPS, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "gradients are computed before the step"
        for group in self.param_groups:
            for weights in _stacks(group["params"]):
                self._update(group, weights)

    def _update(self, group: dict[str, Any], weights: list[torch.nn.Parameter]) -> None:
        """Update n matrices that all have the shape (A, B)."""
        gradients = [p.grad for p in weights]
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in weights]

        # Nesterov momentum
        momentum = group["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        directions = torch.stack(torch._foreach_lerp(gradients, momenta, momentum))  # (n, A, B)

        directions = orthogonalize(
            directions.to(fast_dtype(directions.device)),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        ).to(weights[0].dtype)

        # decoupled weight decay, then the step
        lr = float(group["lr"])
        step_size = 0.2 * lr * math.sqrt(max(weights[0].shape))
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, list(directions.unbind()), alpha=-step_size)


def _stacks(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield the parameters that have a gradient, in lists of one shape and of bounded size."""
    by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for shape, weights in by_shape.items():
        n = max(1, STACK_ELEMENTS // shape.numel())
        for start in range(0, len(weights), n):
            yield weights[start : start + n]


class MuonAdamW(torch.optim.Optimizer):
    """Combine Muon for some parameters and AdamW for others into one optimizer."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = {"muon": muon, "adamw": adamw}
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Share the groups with the parts, so that a scheduler that sets ours sets theirs."""
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()


# ---- which weights get which optimizer ----------------------------------------------------------


class Weights(NamedTuple):
    """The trainable weights of a model, by how they are optimized."""

    matrices: list[torch.nn.Parameter]  # inside the layers
    embeddings: list[torch.nn.Parameter]  # and the output layer
    vectors: list[torch.nn.Parameter]  # of norms and biases


def split_weights(model: torch.nn.Module) -> Weights:
    """Return the trainable weights of a model in three groups."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    outer_ids = {id(weight) for weight in [*embeddings, model.get_output_embeddings().weight]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Weights(
        matrices=[p for p in trainable if p.ndim >= 2 and id(p) not in outer_ids],
        embeddings=[p for p in trainable if p.ndim >= 2 and id(p) in outer_ids],
        vectors=[p for p in trainable if p.ndim < 2],
    )


def make_optimizer(model: torch.nn.Module, training: dict[str, Any]) -> torch.optim.Optimizer:
    """Return AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest.

    Matrices and embeddings decay by `weight_decay`; vectors (norms, biases) do not.
    """
    weights = split_weights(model)
    common = {"lr": training["lr"], "weight_decay": training["weight_decay"]}

    def adamw(decayed: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [{"params": decayed}, {"params": weights.vectors, "weight_decay": 0.0}],
            betas=(training["adam_beta1"], training["adam_beta2"]),
            eps=training["adam_epsilon"],
            fused=True,
            **common,
        )

    if training["optimizer"] == "muon":
        return MuonAdamW(Muon(weights.matrices, **common), adamw(weights.embeddings))
    # in the model's order, because checkpoints store optimizer states by position
    return adamw([p for p in model.parameters() if p.requires_grad and p.ndim >= 2])


def state_elements(model: torch.nn.Module, training: dict[str, Any]) -> int:
    """Return how many numbers the optimizer keeps: two for each weight, but Muon keeps one."""
    elements = 2 * sum(p.numel() for p in model.parameters())
    if training["optimizer"] == "muon":
        elements -= sum(p.numel() for p in split_weights(model).matrices)
    return elements


def flops_per_step(model: torch.nn.Module, training: dict[str, Any]) -> int:
    """Return the number of floating-point operations of an optimizer step, in matrix products.

    AdamW has none. A Newton-Schulz step for a matrix (m, n) with m <= n has two products
    m x m x n and one m x m x m.
    """
    if training["optimizer"] != "muon":
        return 0
    shapes = [sorted(p.shape) for p in split_weights(model).matrices]
    return NEWTON_SCHULZ_STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in shapes)


# ---- average of the weights ---------------------------------------------------------------------


class WeightAverage:
    """Keep an exponential moving average of the weights in a copy of the model, `module`.

    torch's AveragedModel would do the same, but it counts its updates in a tensor, and reading that
    makes the CPU wait for the GPU at every step.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.begun = False  # the first update copies the weights

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Update the average with the current weights."""
        averages = list(self.module.parameters())
        weights = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.decay if self.begun else 1.0)
        self.begun = True
