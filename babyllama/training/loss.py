"""Compute the next-token loss: the sum of -log p(token | tokens before it), in nats.

    loss = NextTokenLoss(dtype=torch.bfloat16, chunked=True)
    loss(model, input_ids).backward()        # input_ids (B, T)

It is a plain sum, so that the caller decides what to divide by. Trainer, teachers and the
configuration are not its business.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from babyllama.training.attention import attention_mask

# How many logits are in memory at a time. On a CPU it is 16 MB in bf16 and 32 MB in float32, which
# fits into its caches.
SLICE_ELEMENTS = 2**23
GPU_SLICE_ELEMENTS = 2**26
NO_TARGET = -100  # instead of a token id; what F.cross_entropy ignores


def next_token_nll(
    logits: torch.Tensor, input_ids: torch.Tensor, reduction: str = "sum"
) -> torch.Tensor:
    """Return the loss in float32 from logits (B, T, V) and input_ids (B, T).

    With reduction="none", return the loss of each position (B * T,); it is 0 at the end of a chunk.
    """
    # padding the targets is cheap, whereas logits[:, :-1] would copy the logits
    targets = F.pad(input_ids[:, 1:], (0, 1), value=NO_TARGET)  # (B, T)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def token_nlls(
    model: torch.nn.Module, input_ids: torch.Tensor, document_bos_id: int | None
) -> torch.Tensor:
    """Return -log p of tokens 1 to T - 1 of chunks (B, T), in nats: float32 (B, T - 1)."""
    mask = attention_mask(model, input_ids, document_bos_id, torch.float32)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return next_token_nll(logits, input_ids, reduction="none").view(input_ids.shape)[:, :-1]


def slice_nll(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of logits (N, V), and its gradient as factors G (N, V) and s (N, 1).

    targets (N,) holds NO_TARGET for positions that predict nothing. With m the largest logit of a
    row:

        Z = sum of exp(logit - m)
        G = exp(logit - m), minus Z at the target
        s = 1 / Z
        dloss/dlogit = G s

    One exponential per logit is enough for both results this way. s stays separate because it is
    cheaper to scale the matrix products that follow than G.
    """
    is_target = (targets >= 0)[:, None]  # (N, 1)
    columns = targets.clamp(min=0)[:, None]  # (N, 1)
    top = logits.amax(-1, keepdim=True).float()
    powers = (logits - top).exp_()  # (N, V) float32
    total = powers.sum(-1, keepdim=True)
    nll = (total.log() - (logits.gather(1, columns) - top)) * is_target  # (N, 1)
    at_target = (-nll).expm1() * total  # (p - 1) Z, accurate even if p is close to 1
    gradient = powers.to(logits.dtype).scatter_(1, columns, at_target.to(logits.dtype))
    return nll.sum(), gradient, is_target / total


def slice_rows(vocab_size: int, length: int, on_gpu: bool = False) -> int:
    """Return how many positions, of complete chunks, have their logits in memory at a time."""
    elements = GPU_SLICE_ELEMENTS if on_gpu else SLICE_ELEMENTS
    return max(1, elements // (vocab_size * length)) * length


class HeadLoss(torch.autograd.Function):
    """Compute output layer and loss for a few chunks at a time, to save memory.

    The logits of a batch are usually the largest tensor of a step. Here only those of a slice exist
    at a time, and the forward pass computes the gradients from them before it drops them. On a CPU
    this also saves time, because a slice fits into the caches. For the head of llama-10M:

                                    float32   bf16     bf16, compiled
        ours, in slices             505 ms    360 ms   148 ms
        logits of the batch         659 ms    473 ms   166 ms
        F.linear_cross_entropy      593 ms    664 ms, with a loss that is 4% off

    (torch 2.13, two AVX512-BF16 cores, 32 x 128 tokens)
    """

    @staticmethod
    def forward(ctx, states, weight, bias, input_ids, dtype, slice_loss, *slice_inputs):
        """Return the loss as a scalar; with another slice loss, its vector of sums, loss first.

        The head has a weight (V, D) and maybe a bias (V,); states are (B, T, D). Products are in
        `dtype` and sums in float32. slice_loss(logits, targets, *slice_inputs) computes a slice as
        slice_nll does. `slice_inputs` are tensors (B, T, ...), of which it gets the rows of its
        slice.
        """
        n, length = input_ids.shape
        rows = slice_rows(len(weight), length, states.is_cuda)
        targets = F.pad(input_ids[:, 1:], (0, 1), value=NO_TARGET)
        x = states.flatten(0, 1).to(dtype)  # (N, D)
        w = weight.to(dtype)  # (V, D)
        b = None if bias is None else bias.to(dtype)
        grad_x = torch.empty_like(x)
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        grad_b = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        total = 0.0

        # compute the loss and the gradients, one slice of rows at a time
        parts = [part.flatten(0, 1).split(rows) for part in (targets, *slice_inputs)]
        # autocast would run some of these products in half precision and others not
        with torch.autocast(x.device.type, enabled=False):
            for x_slice, grad_slice, *inputs in zip(
                x.split(rows), grad_x.split(rows), *parts, strict=True
            ):
                logits = F.linear(x_slice, w, b)  # (rows, V)
                sums, gradient, scale = slice_loss(logits, *inputs)
                total = total + sums
                torch.mm(gradient, w, out=grad_slice).mul_(scale)
                scaled = (x_slice * scale).to(dtype)
                if dtype == torch.float32:
                    grad_w.addmm_(gradient.t(), scaled)
                else:
                    grad_w += gradient.t() @ scaled
                if bias is not None:
                    grad_b += torch.mv(gradient.t().float(), scale.squeeze(1))

        ctx.save_for_backward(grad_x.view(states.shape), grad_w, grad_b)
        bias_dtype = None if bias is None else bias.dtype
        ctx.dtypes = (states.dtype, weight.dtype, bias_dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, factors):
        """Return the gradients that forward has computed, times the gradient of the loss."""
        factor = factors.flatten()[0]
        gradients = [
            None if saved is None else (saved * factor).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


def _nll_from_logits(model, input_ids, mask):
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return next_token_nll(logits, input_ids)


def _hidden_states(model, input_ids, mask):
    outputs = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    return outputs.last_hidden_state


# returns the same compiled function each time, because that keeps what it has compiled
_compiled = functools.cache(functools.partial(torch.compile, dynamic=False))


class NextTokenLoss:
    """Sum -log p of tokens 1 to T - 1 of each chunk, in nats: loss(model, input_ids (B, T)).

    With `compile`, batches of `batch_size` chunks go through torch.compile. Other batches, such as
    the last one of an epoch, do not: torch would compile again for each new shape. With `chunked`,
    HeadLoss computes the output layer in slices, with matrix products in `dtype`; with_slice_loss
    replaces the loss of a slice. `document_bos_id` is the id of BOS if documents must not see each
    other.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 0,
        compile: bool = False,
        chunked: bool = False,
        document_bos_id: int | None = None,
    ):
        self.dtype = dtype
        self.batch_size = batch_size
        self.compile = compile
        self.document_bos_id = document_bos_id
        self.slice_loss = slice_nll if chunked else None

    def with_slice_loss(self, slice_loss: Callable) -> NextTokenLoss:
        """Return a copy that computes the loss in slices, each with `slice_loss`."""
        loss = copy.copy(self)
        loss.slice_loss = slice_loss
        return loss

    def __call__(self, model, input_ids: torch.Tensor, *slice_inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss as a scalar; with another slice loss, its vector of sums, loss first.

        `slice_inputs` are tensors (B, T, ...) for the slice loss.
        """
        use_compiled = self.compile and len(input_ids) == self.batch_size
        fast = _compiled if use_compiled else lambda function: function
        mask = attention_mask(model, input_ids, self.document_bos_id, self.dtype)
        if self.slice_loss is None:
            return fast(_nll_from_logits)(model, input_ids, mask)
        states = fast(_hidden_states)(model, input_ids, mask)  # (B, T, D)
        head = model.get_output_embeddings()
        slice_loss = fast(self.slice_loss)
        return HeadLoss.apply(
            states, head.weight, head.bias, input_ids, self.dtype, slice_loss, *slice_inputs
        )
