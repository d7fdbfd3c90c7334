"""The steps of a model that generates: logits of each prompt's next token, from a cache of keys and values.

    decoder = Decoder(model, mask, steps=64)        # mask (B, T): 0 for the padding on the left of the prompts
    logits = decoder(tokens, positions)             # (B, V): first of the prompts (B, T), then of each new token (B, 1)

On a GPU all steps of Llama, GPT-2 and GPT-J but the first two are one launch each (a CUDA graph): Python takes longer
to start the kernels of a small model than they take. Whether a text ends, and which token comes, evaluation/scoring.py decides.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from babyllama.evaluation.loading import check_ids, context_length, encode
from babyllama.evaluation.scoring import float32_inference

log = logging.getLogger(__name__)
TOP_P_CANDIDATES = (
    256  # nucleus sampling sorts the whole vocabulary only where these do not suffice
)


def generate(
    model, tokenizer, prompts: Sequence[str | Sequence[int]], *, max_new_tokens: int = 100, temperature: float = 0.8,
    top_p: float = 0.95, num_return_sequences: int = 1, seed: int = 0, batch_size: int = 32,
) -> list[list[str]]:  # fmt: skip
    """`num_return_sequences` continuations (without the prompt) of each prompt; temperature 0: the likeliest token.

    An empty prompt is BOS alone. A text ends at EOS, after `max_new_tokens`, or where the context is full. The same
    seed gives the same texts for any `batch_size`, since each draws from a random stream of its own.
    """
    if num_return_sequences < 1 or batch_size < 1:
        raise ValueError(
            f"num_return_sequences {num_return_sequences} and batch_size {batch_size} must be 1 or more"
        )
    rows = [
        ids for ids in encode(tokenizer, prompts, bos=None) for _ in range(num_return_sequences)
    ]
    rows = _fit_context(rows, max_new_tokens, context_length(model))
    order = sorted(
        range(len(rows)), key=lambda i: -len(rows[i])
    )  # like lengths together: less padding
    made: list[list[int]] = [[] for _ in rows]
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    options["stop"] = stop_ids(model, tokenizer)
    with float32_inference(model):
        for at in tqdm(range(0, len(order), batch_size), desc="generating", disable=None, delay=5):
            batch = order[at : at + batch_size]
            steps = generate_steps(model, [rows[i] for i in batch], streams=batch, **options)
            for i, column in zip(batch, zip(*steps, strict=True), strict=True):
                made[i] = [token for token in column if token is not None]
    texts = iter([decode(tokenizer, ids) for ids in made])
    return [[next(texts) for _ in range(num_return_sequences)] for _ in prompts]


def decode(tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens and without tidying up."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(model, tokenizer) -> set[int]:
    """The token ids that end a text, from the model's generation settings and the tokenizer."""
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


@torch.no_grad()
def generate_steps(
    model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.8, top_p: float = 0.95,
    seed: int = 0, streams: Sequence[int] | None = None, stop: Collection[int] = (),
) -> Iterator[list[int | None]]:  # fmt: skip
    """One batch of prompts (ids), step by step: yields each one's new token, None for one that has ended.

    A prompt ends at a token of `stop` (not given out), after `max_new_tokens`, or where its context is full. Prompt i
    draws its random numbers from stream (seed, streams[i]); the streams default to 0, 1, 2...
    """
    context = context_length(model)
    _check_sampling(prompts, max_new_tokens, temperature, top_p)
    check_ids(model, prompts)
    prompts = _fit_context(prompts, max_new_tokens, context)
    room = [
        min(max_new_tokens, context - len(ids)) for ids in prompts
    ]  # tokens that each may still make
    generators = [
        np.random.default_rng((seed, stream)) for stream in streams or range(len(prompts))
    ]
    draws = [generator.random(max(room), dtype=np.float32) for generator in generators]
    draws = torch.as_tensor(
        np.array(draws), device=model.device
    )  # (B, steps); no row depends on another
    tokens, mask = (part.to(model.device) for part in _pad_left(prompts))  # (B, T) both
    lengths, positions = mask.sum(1, keepdim=True), (mask.cumsum(1) - 1).clamp(min=0)
    decoder = Decoder(model, mask, draws.shape[1])
    for step in range(draws.shape[1]):
        chosen = _sample(decoder(tokens, positions), temperature, top_p, draws[:, step])  # (B,)
        new = [
            t if left and t not in stop else None
            for t, left in zip(chosen.tolist(), room, strict=True)
        ]
        room = [0 if token is None else left - 1 for token, left in zip(new, room, strict=True)]
        yield new
        if not any(room):
            return
        tokens = chosen[:, None]
        positions = (lengths + step).clamp(
            max=context - 1
        )  # one that has ended goes on unheard, within the context


def _check_sampling(prompts, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    if not prompts or not all(len(ids) for ids in prompts):
        raise ValueError("a batch needs a prompt, and a prompt a token: put BOS in front")


def _fit_context(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int
) -> list[Sequence[int]]:
    """Prompts cut from the left to leave room for `max_new_tokens`, but never below half the context."""
    most = max(context - max_new_tokens, context // 2, 1)
    if any(len(ids) > most for ids in prompts):
        log.warning(
            "a prompt is cut to its last %d tokens: the model's context is %d tokens", most, context
        )
    return [ids[-most:] for ids in prompts]


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T)."""
    width = max(map(len, prompts))
    tokens = [[ids[0]] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(tokens), torch.tensor(mask)


def _sample(
    logits: torch.Tensor, temperature: float, top_p: float, draws: torch.Tensor
) -> torch.Tensor:
    """One token (B,) for each row of logits (B, V), by the inverse of the distribution function at `draws` (B,).

    Nucleus sampling (Holtzman et al. 2020): the likeliest tokens whose probabilities first reach `top_p` together.
    """
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN: its weights are broken")
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1), None
    if top_p < 1:
        best = probs.topk(min(TOP_P_CANDIDATES, probs.shape[1]))
        probs, order = probs.sort(descending=True) if (best.values.sum(-1) < top_p).any() else best
    total = probs.cumsum(-1)  # (B, K)
    last = (total < top_p).sum(-1, keepdim=True).clamp(max=total.shape[1] - 1)
    place = torch.searchsorted(total, draws[:, None] * total.gather(1, last), right=True).minimum(
        last
    )  # (B, 1)
    return (place if order is None else order.gather(1, place))[:, 0]


RECORDED = ("llama", "gpt2", "gptj")  # model types whose cache is no more than keys and values
FIXED_ANGLES = (
    "default",
    "linear",
    "llama3",
    "yarn",
)  # kinds of rotary embedding that do not look at the length first
LEAST_STEPS = 8  # below these a recording is not won back


class Decoder:
    """One batch's way through a model; see above."""

    def __init__(self, model, mask: torch.Tensor, steps: int):
        known = inspect.signature(model.forward).parameters
        self.held = (
            "cache" if "cache" in known else "past_key_values"
        )  # its name from transformers 5.24 on, and before
        if self.held not in known:
            raise ValueError(
                "this architecture keeps no key-value cache, which generation here needs"
            )
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known  # others count from the mask
        self.model, self.mask = model, mask
        self.room = (
            StaticKVCache(mask, steps, model.dtype)
            if _can_be_recorded(model) and steps >= LEAST_STEPS
            else None
        )
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

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        options = self.options | ({"position_ids": positions} if self.takes_positions else {})
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=True,
            **{self.held: self.cache},
            **options,
        )
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
            self.graph.capture_begin(
                capture_error_mode="thread_local"
            )  # other threads may use the device
            try:
                self.logits = self._in_room(self.tokens, self.positions)
            finally:
                self.graph.capture_end()
        own.wait_stream(stream)


def _can_be_recorded(model) -> bool:
    angles = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", FIXED_ANGLES[0])
    return (
        model.device.type == "cuda"
        and model.config.model_type in RECORDED
        and angles in FIXED_ANGLES
    )


@functools.cache  # cuBLAS keeps 32 MB for each stream that it ever saw
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class StaticKVCache:
    """Keys and values (B, H, L, D) of each layer with room for all steps, in the manner of transformers' caches.

    Places that are not written yet, or that are padding, are hidden by the mask.
    """

    def __init__(self, mask: torch.Tensor, steps: int, dtype: torch.dtype):
        n, width = mask.shape
        self.layers: list[tuple[torch.Tensor, ...]] = []
        self.length, self.columns = width + steps, torch.arange(width, device=mask.device)
        seen = (
            torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
            & mask.bool()[:, None]
        )  # (B, T, T)
        seen |= torch.eye(
            width, dtype=torch.bool, device=mask.device
        )  # padding sees itself: a row of none has no mean
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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ):
        """What transformers' layers call with new keys and values (B, H, n, D): all of them (B, H, L, D)."""
        both = (key_states, value_states)
        if layer_idx == len(self.layers):
            self.layers.append(
                tuple(new.new_zeros(*new.shape[:2], self.length, new.shape[3]) for new in both)
            )
        for kept, new in zip(self.layers[layer_idx], both, strict=True):
            kept.index_copy_(2, self.columns, new)
        return self.layers[layer_idx]

    def get_seq_length(self, layer: int = 0) -> int:
        """How many places are written, as transformers asks where it is given no positions; it is given them."""
        return 0
