"""Prepare a model for chunks without padding: faster attention, masks and rotary tables.

    prepare_for_chunks(model)                                            # once
    mask = attention_mask(model, input_ids, document_bos_id, dtype)      # for each batch (B, T)

In a chunk every token is real, so no model has to look for padding.
"""

from __future__ import annotations

import functools

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from babyllama.architectures import MODEL_TYPES

# The same attention as "sdpa" under a name of ours. For "sdpa" transformers looks in each batch for
# packed texts, which waits for the GPU, and builds a mask in compiled code. For a function that it
# does not know it builds none, and torch's fused kernels need none, because they can be causal
# without one.
CAUSAL = "causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


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
