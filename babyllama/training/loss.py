"""Compute the next-token loss: the sum of -log p(token | tokens before it), in nats.

    loss = NextTokenLoss(dtype=torch.bfloat16, chunked=True)
    prepare_for_chunks(model)                # once: faster on chunks without padding
    loss(model, input_ids).backward()        # input_ids (B, T)

It is a plain sum, so that the caller decides what to divide by. Trainer, teachers and the
configuration are not its business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from babyllama.architectures import MODEL_TYPES

# How many logits are in memory at a time. On a CPU it is 16 MB in bf16 and 32 MB in float32, which
# fits into its caches.
SLICE_ELEMENTS = 2**23
GPU_SLICE_ELEMENTS = 2**26

# The same attention as "sdpa" under a name of ours. For "sdpa" transformers looks in each batch for
# packed texts, which waits for the GPU, and builds a mask in compiled code. For a function that it
# does not know it builds none, and torch's fused kernels need none, because they can be causal
# without one.
CAUSAL = "causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


# ---- attention and positions --------------------------------------------------------------------


def prepare_for_chunks(model: torch.nn.Module) -> None:
    """Make a model faster on chunks without padding, without changing its weights or its files.

    Afterwards its attention ignores 2-D masks, so padded batches of prompts would be wrong. Eager
    attention stays eager and needs the mask of attention_mask. A teacher may have an architecture
    that we do not know, whose attention may have a sliding window, so it stays as it is.
    """
    if model.config.model_type not in MODEL_TYPES:
        return
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CAUSAL)
    rotary = getattr(model.base_model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) == "default":
        model.base_model.rotary_emb = RotaryTable(rotary, model.config.max_position_embeddings)


class RotaryTable(torch.nn.Module):
    """Look up the cosines and sines of Llama's rotary embedding instead of computing them.

    torch.compile fuses the original into every layer, which then computes them again for each
    element of its queries and keys, forward and backward. Together with keeping freed memory, the
    table made training 1.16 times as fast on a CPU (docs/results.md).
    """

    def __init__(self, rotary: torch.nn.Module, length: int):
        super().__init__()
        positions = torch.arange(length, device=rotary.inv_freq.device)[None]
        with torch.autocast(rotary.inv_freq.device.type, enabled=False):
            cos, sin = rotary(rotary.inv_freq, position_ids=positions)  # (1, length, D) float32
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        """Return cosines and sines (B, T, D) in the dtype of x for position_ids (B, T)."""
        if position_ids.shape == (1, len(self.cos)):
            # a full chunk, whose positions are 0 to T - 1: a gather is slow in compiled code
            return self.cos[None].to(x.dtype), self.sin[None].to(x.dtype)
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


@functools.cache
def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the mask (1, 1, T, T) of causal attention.

    Attention adds a mask to its scores, so it is 0 where a token may look.
    """
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return _additive(visible[None, None], dtype)


def document_mask(input_ids: torch.Tensor, bos_token_id: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask (B, 1, T, T) of causal attention within documents.

    A document begins at each BOS, and a token sees only itself and the earlier tokens of its
    document.
    """
    document = (input_ids == bos_token_id).cumsum(1)  # (B, T)
    same = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    return _additive(same.tril(), dtype)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 for visible tokens and the lowest number of `dtype` for the others."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, hidden
    )


def attention_mask(
    model: torch.nn.Module, input_ids: torch.Tensor, document_bos_id: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what to pass to a model as attention_mask for chunks (B, T) without padding.

    `document_bos_id` is the id of BOS if documents must not see each other. The result is None for
    architectures that we do not know, for which transformers builds the right mask.
    """
    if document_bos_id is not None:
        return document_mask(input_ids, document_bos_id, dtype)
    if model.config.model_type not in MODEL_TYPES:
        return None
    if model.config._attn_implementation == CAUSAL:
        # without a mask, GPT-2 would look for padding, which waits for the GPU
        return torch.ones_like(input_ids)
    # as transformers would build it: in the dtype of the weights, also under autocast
    return causal_mask(input_ids.shape[1], model.dtype, input_ids.device)


# ---- the loss -----------------------------------------------------------------------------------


def next_token_nll(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the loss in float32 from logits (B, T, V) and input_ids (B, T)."""
    # padding the targets is cheap, whereas logits[:, :-1] would copy the logits
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # (B, T)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def slice_nll(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of logits (N, V), and its gradient as factors G (N, V) and s (N, 1).

    targets (N,) holds -1 for positions that predict nothing. With m the largest logit of a row:

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


class HeadLoss(torch.autograd.Function):
    """Compute output layer and loss for a few chunks at a time, to save memory.

    The logits of a batch are usually the largest tensor of a step. Here only those of a slice exist
    at a time, and the forward pass computes the gradients from them before it drops them. On a CPU
    this also saves time, because a slice fits into the caches. For the head of llama-10M:

                                    float32   bf16     bf16, compiled
        ours, in slices             505 ms    360 ms   148 ms
        logits of the batch         659 ms    473 ms   166 ms
        F.linear_cross_entropy      593 ms    664 ms, with a loss that is 4 % off

    (torch 2.13, two AVX512-BF16 cores, 32 x 128 tokens)
    """

    @staticmethod
    def forward(ctx, states, weight, bias, input_ids, dtype, kernel, *kernel_inputs):
        """Return the loss as a scalar; with a custom kernel, its vector of sums, loss first.

        The head has a weight (V, D) and maybe a bias (V,); states are (B, T, D). Products are in
        `dtype` and sums in float32. kernel(logits, targets, *kernel_inputs) computes a slice as
        slice_nll does. `kernel_inputs` are tensors (B, T, ...), of which it gets the rows of its
        slice.
        """
        n, length = input_ids.shape
        elements = GPU_SLICE_ELEMENTS if states.is_cuda else SLICE_ELEMENTS
        rows = max(1, elements // (len(weight) * length)) * length  # complete chunks
        targets = F.pad(input_ids[:, 1:], (0, 1), value=-1)
        x = states.flatten(0, 1).to(dtype)  # (N, D)
        w = weight.to(dtype)  # (V, D)
        b = None if bias is None else bias.to(dtype)
        grad_x = torch.empty_like(x)
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        grad_b = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        total = 0.0

        # compute the loss and the gradients, one slice of rows at a time
        parts = [part.flatten(0, 1).split(rows) for part in (targets, *kernel_inputs)]
        # autocast would run some of these products in half precision and others not
        with torch.autocast(x.device.type, enabled=False):
            for x_slice, grad_slice, *inputs in zip(
                x.split(rows), grad_x.split(rows), *parts, strict=True
            ):
                logits = F.linear(x_slice, w, b)  # (rows, V)
                sums, gradient, scale = kernel(logits, *inputs)
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


class NextTokenLoss:
    """Sum -log p of tokens 1 to T - 1 of each chunk, in nats: loss(model, input_ids (B, T)).

    With `compile`, batches of `batch_size` chunks go through torch.compile. Other batches, such as
    the last one of an epoch, do not: torch would compile again for each new shape. With `chunked`,
    HeadLoss computes the output layer in slices, with matrix products in `dtype`. `document_bos_id`
    is the id of BOS if documents must not see each other.
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
        self.plain = (_hidden_states, _nll_from_logits)
        self.fast = tuple(map(self._compiled, self.plain))
        self.kernel = None
        self.fast_kernel = None
        if chunked:
            self.set_kernel(slice_nll)

    def set_kernel(self, kernel: Callable) -> None:
        """Compute the output layer in slices from now on, with `kernel` for each of them."""
        self.kernel = kernel
        self.fast_kernel = self._compiled(kernel)

    def _compiled(self, function: Callable) -> Callable:
        """Wrap a function so that its first call compiles it, if compilation is on."""
        return torch.compile(function, dynamic=False) if self.compile else function

    def __call__(
        self, model, input_ids: torch.Tensor, *kernel_inputs: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss as a scalar; with a custom kernel, its vector of sums, loss first.

        `kernel_inputs` are tensors (B, T, ...) for the kernel.
        """
        mask = attention_mask(model, input_ids, self.document_bos_id, self.dtype)
        is_fast = self.compile and len(input_ids) == self.batch_size
        hidden_states, nll_from_logits = self.fast if is_fast else self.plain
        if self.kernel is None:
            return nll_from_logits(model, input_ids, mask)
        states = hidden_states(model, input_ids, mask)  # (B, T, D)
        head = model.get_output_embeddings()
        kernel = self.fast_kernel if is_fast else self.kernel
        return HeadLoss.apply(
            states, head.weight, head.bias, input_ids, self.dtype, kernel, *kernel_inputs
        )
