"""Generate reproducible text from a causal language model.

    generate(model, tokenizer, ["Once upon a time"], max_new_tokens=40, seed=1)[0][0]

`generate` returns finished texts. `generate_steps` yields the tokens of a batch as they are
sampled, so that a caller can print them or measure the time. Prompts are padded on the left, so
that all of them continue in the same column. Keys and values are kept between steps, and everything
runs in float32 unless the weights have another type.
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
from transformers import StaticCache

from babyllama.architectures import MODEL_TYPES
from babyllama.data.tokenizer import adds_prefix_space
from babyllama.evaluation.loading import check_ids, context_length, encode
from babyllama.evaluation.scoring import float32_inference

log = logging.getLogger(__name__)

TOP_P_CANDIDATES = 256  # all tokens are sorted only if the most likely ones do not reach top_p
MIN_GRAPH_STEPS = 8  # a CUDA graph does not pay off for fewer steps
GRAPH_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # do not depend on the sequence length


def generate(
    model,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    num_return_sequences: int = 1,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[str]]:
    """Return `num_return_sequences` continuations of each prompt, without the prompt.

    A text ends at EOS, after `max_new_tokens`, or when the context is full. An empty prompt starts
    from BOS, and a space that the tokenizer would put there is removed. Temperature 0 always takes
    the most likely token. Each text has a random stream to itself, so the result depends on `seed`
    but not on `batch_size`.
    """
    for name, value in {
        "num_return_sequences": num_return_sequences,
        "batch_size": batch_size,
    }.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be 1 or more")

    # one row of ids for each text to generate
    rows = []
    for ids in encode(tokenizer, prompts, bos=None):
        rows += [ids] * num_return_sequences
    rows = _fit_context(rows, max_new_tokens, context_length(model))

    # batches of similar length need less padding
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    texts = [""] * len(rows)
    with float32_inference(model):
        for at in tqdm(range(0, len(order), batch_size), desc="generating", disable=None, delay=5):
            batch = order[at : at + batch_size]
            steps = generate_steps(
                model,
                [rows[row] for row in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                streams=batch,
                stop=stop_ids(model, tokenizer),
            )
            for row, tokens in zip(batch, zip(*steps, strict=True), strict=True):
                new_ids = [token for token in tokens if token is not None]
                texts[row] = decode_continuation(tokenizer, rows[row], new_ids)

    # group the texts by prompt
    starts = range(0, len(texts), num_return_sequences)
    return [texts[start : start + num_return_sequences] for start in starts]


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens and with its spaces unchanged."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_continuation(tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of token ids that continue a prompt.

    After nothing but BOS, the space that the tokenizer puts before a text is removed.
    """
    text = decode(tokenizer, ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if adds_prefix_space(backend) and list(prompt_ids) == [tokenizer.bos_token_id]:
        return text.removeprefix(" ")
    return text


def stop_ids(model, tokenizer) -> set[int]:
    """Return the token ids that end a text, by the generation config and the tokenizer."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return {*eos, tokenizer.eos_token_id} - {None}


@torch.no_grad()
def generate_steps(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    stop: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yield one list per step: the new token id of each prompt, or None for a finished text.

    A text is finished at a token of `stop` (which is not yielded), after `max_new_tokens`, or when
    its context is full. Prompt i draws its random numbers from the stream (seed, streams[i]). By
    default the streams are numbered 0, 1, 2 and so on.
    """
    # check the request, and see how many tokens fit
    context = context_length(model)
    _check_request(prompts, max_new_tokens, temperature, top_p)
    check_ids(model, prompts)
    prompts = _fit_context(prompts, max_new_tokens, context)
    remaining = [min(max_new_tokens, context - len(ids)) for ids in prompts]  # new tokens
    steps = max(remaining)

    # draw all random numbers at once, each text from its own stream
    generators = [
        np.random.default_rng((seed, stream)) for stream in streams or range(len(prompts))
    ]
    draws = np.stack([generator.random(steps, dtype=np.float32) for generator in generators])
    draws = torch.as_tensor(draws, device=model.device)  # (B, steps)

    tokens, mask = _pad_left(prompts, model.device)  # both (B, T)
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T)
    uses_graph = steps >= MIN_GRAPH_STEPS and _supports_cuda_graph(model)
    decoder = GraphDecoder(model, mask, steps) if uses_graph else Decoder(model, mask)
    for step in range(steps):
        logits = decoder(tokens, positions)  # (B, V)
        sampled = _sample(logits, temperature, top_p, draws[:, step])  # (B,)
        new_tokens: list[int | None] = sampled.tolist()
        for row, token in enumerate(new_tokens):
            if remaining[row] == 0 or token in stop:
                new_tokens[row] = None
                remaining[row] = 0
            else:
                remaining[row] -= 1
        yield new_tokens
        if not any(remaining):
            return
        # finished rows stay in the batch and are ignored; clamp to keep them inside the context
        tokens = sampled[:, None]
        positions = (lengths + step).clamp(max=context - 1)


def _check_request(prompts, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature {temperature} must be a finite number, 0 (most likely token) or more"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    if not prompts or not all(len(ids) for ids in prompts):
        raise ValueError("a prompt has no token, and the tokenizer has no BOS to start from")


def _fit_context(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int
) -> list[Sequence[int]]:
    """Truncate prompts on the left to make room for new tokens, but keep half of the context."""
    limit = max(context - max_new_tokens, context // 2, 1)
    if any(len(ids) > limit for ids in prompts):
        log.warning("truncating a prompt to its last %d tokens: the context is %d", limit, context)
    return [ids[-limit:] for ids in prompts]


def _pad_left(prompts: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T) and a mask (B, T) that is 0 on the padding."""
    width = max(len(ids) for ids in prompts)
    tokens = [[ids[0]] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _sample(
    logits: torch.Tensor, temperature: float, top_p: float, draws: torch.Tensor
) -> torch.Tensor:
    """Sample one token (B,) from each row of logits (B, V), given uniform random numbers (B,).

    Top-p sampling (Holtzman et al. 2020) keeps the fewest most likely tokens whose probabilities
    add up to `top_p`. The random number picks a place in their cumulative distribution.
    """
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN: its weights are broken")
    if temperature == 0:
        return logits.argmax(-1)

    # top-p needs the most likely tokens in descending order; the best 256 are usually enough
    probs = (logits / temperature).softmax(-1)  # (B, V)
    token_ids = None  # probs are in the order of the vocabulary
    if top_p < 1:
        best = probs.topk(min(TOP_P_CANDIDATES, probs.shape[1]))
        too_few = (best.values.sum(-1) < top_p).any()
        probs, token_ids = probs.sort(descending=True) if too_few else best  # (B, K)

    # find where the random number falls in the cumulative distribution up to top_p
    cumulative = probs.cumsum(-1)  # (B, K)
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[1] - 1)  # (B, 1)
    target = draws[:, None] * cumulative.gather(1, last)
    place = torch.searchsorted(cumulative, target, right=True).minimum(last)  # (B, 1)
    return (place if token_ids is None else token_ids.gather(1, place))[:, 0]


# ---- one step of the model ----------------------------------------------------------------------


class Decoder:
    """Compute the logits of the next token of each text, keeping keys and values between calls.

        decoder = Decoder(model, mask)          # (B, T), 0 on the left padding
        logits = decoder(tokens, positions)     # (B, V); prompts (B, T) first, then tokens (B, 1)

    `model.generate` of transformers has no random stream per text, and on a CPU it is no faster:
    llama-10M with 64 new tokens takes 1.03 times as long for 32 prompts and 1.23 times as long for
    one (1.00 and 1.12 with cache_implementation="static").
    """

    def __init__(self, model, mask: torch.Tensor):
        arguments = inspect.signature(model.forward).parameters
        # transformers 5.24 renamed past_key_values to cache, in the call and in the output
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"
        if self.cache_name not in arguments:
            raise ValueError(
                f"{type(model).__name__} has no key-value cache, which generation needs"
            )
        # a model without this argument derives positions from the mask
        self.takes_positions = "position_ids" in arguments
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
        self.model = model
        self.mask = mask
        self.cache = None  # the model creates it in the first call

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.cache is not None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens, positions, self.mask)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        options = self.options | ({"position_ids": positions} if self.takes_positions else {})
        options[self.cache_name] = self.cache
        output = self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **options)
        self.cache = output[self.cache_name]
        return output.logits[:, -1].float()  # (B, V)


class GraphDecoder(Decoder):
    """Decode on a GPU with one launch per step: capture a step as a CUDA graph and replay it.

    The kernels of a small model finish faster than Python can start them, so a GPU mostly waits.
    For one text of llama-10M, the graph raises 193 tokens per second to 1,126 (docs/results.md,
    "Generation on a GPU").

    A replay runs the same kernels on the same addresses. So everything that changes from step to
    step is a tensor that is updated in place: keys and values (a StaticCache with room for all
    steps), the attention mask, and the place of the next token.
    """

    def __init__(self, model, mask: torch.Tensor, steps: int):
        super().__init__(model, mask)
        width = mask.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=width + steps)
        # added to the attention scores of a new token; hides padding and places not yet written
        self.hidden = torch.finfo(model.dtype).min
        visible = F.pad(mask.bool(), (0, steps))[:, None, None]  # (B, 1, 1, T + steps)
        self.step_mask = torch.zeros(visible.shape, dtype=model.dtype, device=mask.device)
        self.step_mask.masked_fill_(~visible, self.hidden)
        self.place = torch.tensor([width], device=mask.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            return self._read_prompts(tokens, positions)
        if self.calls == 2:
            return self._step(tokens, positions)  # warms up the kernels that are captured next
        if self.graph is None:
            self._capture(tokens, positions)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits

    def _read_prompts(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        width = tokens.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
        visible = causal & self.mask.bool()[:, None]  # (B, T, T)
        # padding attends to itself, because every row of a softmax needs a visible place
        visible.diagonal(dim1=1, dim2=2).fill_(True)
        mask = self.step_mask.expand(-1, -1, width, -1).clone()  # (B, 1, T, T + steps)
        mask[..., :width] = 0
        mask[..., :width].masked_fill_(~visible[:, None], self.hidden)
        return self._forward(tokens, positions, mask)

    def _step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.step_mask.index_fill_(3, self.place, 0)
        self.place += 1
        return self._forward(tokens, positions, self.step_mask)

    def _capture(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Record a step without running it."""
        self.tokens = tokens.clone()
        self.positions = positions.clone()
        self.graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            # "thread_local" allows other threads to use the device in the meantime
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.logits = self._step(self.tokens, self.positions)
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream(tokens.device).wait_stream(stream)


def _supports_cuda_graph(model) -> bool:
    rotary = getattr(model.base_model, "rotary_emb", None)
    return (
        model.device.type == "cuda"
        and model.config.model_type in MODEL_TYPES
        and getattr(rotary, "rope_type", "default") in GRAPH_ROPE_TYPES
    )


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that captures all graphs: cuBLAS keeps 32 MB per stream."""
    return torch.cuda.Stream(device)
