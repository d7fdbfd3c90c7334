"""The steps of a model that generates: logits of each prompt's next token, from a cache of keys and values.

    decoder = Decoder(model, mask, steps=64)        # mask (B, T): 0 for the padding on the left of the prompts
    logits = decoder(tokens, positions)             # (B, V): first of the prompts (B, T), then of each new token (B, 1)

On a GPU all steps of Llama, GPT-2 and GPT-J but the first two are one launch each (a CUDA graph): Python takes longer
to start the kernels of a small model than they take. Whether a text ends, and which token comes, inference.py decides.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch.nn import functional as F

RECORDED = ("llama", "gpt2", "gptj")  # model types whose cache is no more than keys and values
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # kinds of rotary embedding that do not look at the length first
LEAST_STEPS = 8  # below these a recording is not won back


class Decoder:
    """One batch's way through a model; see above."""

    def __init__(self, model, mask: torch.Tensor, steps: int):
        known = inspect.signature(model.forward).parameters
        self.held = "cache" if "cache" in known else "past_key_values"  # its name from transformers 5.24 on, and before
        if self.held not in known:
            raise ValueError("this architecture keeps no key-value cache, which generation here needs")
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known  # others count from the mask
        self.model, self.mask = model, mask
        self.room = Room(mask, steps, model.dtype) if _can_be_recorded(model) and steps >= LEAST_STEPS else None
        self.cache = self.room  # or, from the first call on, the model's own
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.room is None:
            if self.calls > 1:
                self.mask = F.pad(self.mask, (0, 1), value=1)
            return self._forward(tokens, positions, self.mask)
        if self.calls <= 2:  # the prompts; a step that warms up what is recorded at the next
            return self._in_room(tokens, positions)
        if self.graph is None:
            self.tokens, self.positions = tokens.clone(), positions.clone()
            self._record()
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        options = self.options | ({"position_ids": positions} if self.takes_positions else {})
        out = self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **{self.held: self.cache}, **options)
        self.cache = out[self.held]
        return out.logits[:, -1].float()

    def _in_room(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = self._forward(tokens, positions, self.room.open(tokens.shape[1]))
        self.room.close(tokens.shape[1])
        return logits

    def _record(self) -> None:
        """Record a step; what it writes and where it writes next move on with each replay."""
        device = self.tokens.device
        own, stream = torch.cuda.current_stream(device), _recording_stream(device)
        stream.wait_stream(own)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.graph.capture_begin(capture_error_mode="thread_local")  # other threads may use the device
            try:
                self.logits = self._in_room(self.tokens, self.positions)
            finally:
                self.graph.capture_end()
        own.wait_stream(stream)


def _can_be_recorded(model) -> bool:
    angles = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", FIXED_ANGLES[0])
    return model.device.type == "cuda" and model.config.model_type in RECORDED and angles in FIXED_ANGLES


@functools.cache  # cuBLAS keeps 32 MB for each stream that it ever saw
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Room:
    """Keys and values (B, H, L, D) of each layer with room for all steps, in the manner of transformers' caches.

    Places that are not written yet, or that are padding, are hidden by the mask.
    """

    def __init__(self, mask: torch.Tensor, steps: int, dtype: torch.dtype):
        n, width = mask.shape
        self.layers: list[tuple[torch.Tensor, ...]] = []
        self.length, self.columns = width + steps, torch.arange(width, device=mask.device)
        seen = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril() & mask.bool()[:, None]  # (B, T, T)
        seen |= torch.eye(width, dtype=torch.bool, device=mask.device)  # padding sees itself: a row of none has no mean
        hidden = torch.finfo(dtype).min
        self.mask = torch.full((n, 1, width, self.length), hidden, dtype=dtype, device=mask.device)
        self.mask[:, 0, :, :width].masked_fill_(seen, 0)

    def open(self, n: int) -> torch.Tensor:
        """The mask (B, 1, n, L) with which the next n tokens of each text are read."""
        if n == 1:
            self.mask.index_fill_(3, self.columns, 0)
        return self.mask

    def close(self, n: int) -> None:
        """Go on to where the next single token is written."""
        if n > 1:
            self.mask, self.columns = self.mask[:, :, -1:].clone(), self.columns[-1:].clone()
        self.columns += 1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """What transformers' layers call with new keys and values (B, H, n, D): all of them (B, H, L, D)."""
        both = (key_states, value_states)
        if layer_idx == len(self.layers):
            self.layers.append(tuple(new.new_zeros(*new.shape[:2], self.length, new.shape[3]) for new in both))
        for kept, new in zip(self.layers[layer_idx], both, strict=True):
            kept.index_copy_(2, self.columns, new)
        return self.layers[layer_idx]

    def get_seq_length(self, layer: int = 0) -> int:
        """How many places are written, as transformers asks where it is given no positions; it is given them."""
        return 0
