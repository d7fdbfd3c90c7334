"""Everything done with a trained causal model: load it, score text with it, generate text from it.

The only place that samples (`generate`), and the one that computes log-probabilities (`token_logprobs`; choices.py has
a fast pass for where only the best counts). It opens local model directories only, no remote code and no pickles.

    from inference import generate, load_model, token_logprobs
    model, tokenizer = load_model("models/quickstart")
    generate(model, tokenizer, ["Once upon a time"], max_new_tokens=40, seed=1)[0][0]
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from decoding import Decoder
from machine import keep_freed_memory, pick_device

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32768  # in one forward pass, padding included
HEAD_ELEMENTS = 2**23  # logits held at a time: 32 MB in float32
TOP_P_CANDIDATES = 256  # nucleus sampling sorts the whole vocabulary only where these do not suffice


def load_model(path: str | Path, device: str | None = "auto", dtype: str = "float32"):
    """(model in eval mode, tokenizer) from a local Hugging Face model directory, ours or not.

    Raises FileNotFoundError where there is no model, or its weights are pickles only, and ValueError where it cannot be
    read, lacks weights that the architecture needs, or lets tokens look at later ones.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    path = Path(path)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f'dtype "{dtype}" is unknown: use float32, bfloat16 or float16')
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: expected a directory with config.json, weights, tokenizer.json")
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{path} has no .safetensors weights (pickled .bin files are not opened)")
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{path} has no tokenizer.json: the tokenizer belongs beside the weights")
    if (target := pick_device(device)).type == "cpu":
        keep_freed_memory()
    loudness, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # else a table of all weights before the line that says what is wrong with them
    hf_logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True, **options, **local)
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a damaged tokenizer.json panics in Rust, which is no Exception
        raise ValueError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    finally:
        hf_logging.set_verbosity(loudness)
        (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise ValueError(f"{path}: the weights {name} are {list(found)}, by config.json {list(wanted)}")
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}")
    if more := sorted(info["unexpected_keys"]):
        log.warning("%s: %d weights without a place by config.json are left out: %s", path, len(more), more[:3])
    model = model.to(target).eval()
    with torch.no_grad():  # the first token's logits in two texts that differ in the second
        a, b, *_ = (i for i in range(3) if i != getattr(model.config, "pad_token_id", None))  # padding is warned of
        ids = torch.tensor([[a, a], [a, b]], device=target)
        first, other = model(input_ids=ids, use_cache=False).logits[:, 0].float()
    if (first - other).abs().max() > (1e-5 if dtype == "float32" else 1e-2) * first.abs().max():
        raise ValueError(f"{path}: {type(model).__name__} looks at later tokens: not a causal language model")
    return model, tokenizer


def context_length(model) -> int:
    """Tokens that the model can look at together, from its config; 2048 where the config states no limit."""
    limits = (getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((limit for limit in limits if limit), 2048)


def encode(tokenizer, texts: Sequence[str | Sequence[int]], bos: bool | None = True) -> list[list[int]]:
    """Token ids of each text (a list of ids passes through), with BOS in front exactly once where `bos`.

    Nothing is appended. A tokenizer without BOS uses its EOS; with neither, True is an error and None adds nothing.
    """
    strings = [text for text in texts if isinstance(text, str)]  # in bulk: the tokenizer works in parallel
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        where = repr(error.object[: error.end][-20:])
        raise ValueError(f"a text holds half of a surrogate pair, which is no character: ...{where}") from None
    if rust := getattr(tokenizer, "backend_tokenizer", None):  # alone: more than twice as fast
        rust.no_truncation(), rust.no_padding()
        encoded = (encoding.ids for encoding in rust.encode_batch_fast(strings, add_special_tokens=False))
    else:
        encoded = iter(tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"] if strings else ())
    sequences = [next(encoded) if isinstance(text, str) else list(text) for text in texts]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is False or (bos is None and start is None):
        return sequences
    if start is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token: use bos=False")
    return [ids if ids[:1] == [start] else [start, *ids] for ids in sequences]


@dataclass(frozen=True)
class TokenScores:
    """The scored tokens of one text, in order: arrays of the same length (float64 values of float32 precision)."""

    ids: np.ndarray  # the tokens, without the one(s) that only serve as context
    logprobs: np.ndarray  # natural log of p(token | tokens before it)
    top_probs: np.ndarray | None = None  # the highest probability at that place
    entropies: np.ndarray | None = None  # of the whole distribution, in nats
    ranks: np.ndarray | None = None  # of the token, 1 is the best; equal logits share the mean of their ranks
    hits: np.ndarray | None = None  # 1 where the token has the highest logit, 1/k where k tokens share it


def token_logprobs(model, tokenizer, texts: Sequence, *, bos: bool = True, **options) -> list[TokenScores]:
    """Log-probabilities of every token of each text (or list of ids), in the order given.

    With `bos` the text's first token is scored given BOS; without it the first token is context only and has no score.
    `options` are those of `ids_logprobs`.
    """
    return ids_logprobs(model, encode(tokenizer, texts, bos), **options)


def ids_logprobs(
    model, sequences: Sequence[Sequence[int]], *, starts: Sequence[int] | None = None, context: int | None = None,
    stride: int | None = None, batch_tokens: int | None = None, stats: bool = False,
) -> list[TokenScores]:  # fmt: skip
    """log p(ids[i] | ids[:i]) for i from `starts` (default 1) on, for each sequence of ids, as TokenScores.

    A sequence longer than `context` (default and limit: the model's) is scored in windows that move by `stride`
    (default half the context). Each token counts once, in the first window that reaches it, so it has at least
    context - stride + 1 tokens before it; the last window is a full one. `batch_tokens` bounds a forward pass and
    changes nothing else. Logits are float32 products also where the weights are bfloat16 (except what an architecture
    with a head of its own returns). `stats` fills the optional arrays. Equal sequences share their arrays.
    """
    context = context_length(model) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    sequences = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    starts = [1] * len(sequences) if starts is None else starts
    _check(model, sequences, starts, context, stride)
    windows, places, known, total = [], [], {}, 0
    for ids, start in zip(sequences, starts, strict=True):
        key = (ids.tobytes(), start)
        if key not in known:  # identical requests are scored once
            known[key] = total
            windows += _windows(ids, start, context, stride, total)
            total += len(ids[start:])
        places.append(known[key])
    columns = np.empty((5 if stats else 1, total))
    windows.sort(key=lambda w: w.begin - w.end)  # longest first: a batch too large for the memory fails at once
    if windows:
        batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS)
        with exact(model):
            body, head = _split_head(model, windows[0].ids[:16])
            for batch in tqdm(list(_batches(windows, batch_tokens)), desc="scoring", disable=None, delay=5):
                for window, values in zip(batch, _score(body, head, model, batch, stats), strict=True):
                    columns[:, window.at : window.at + values.shape[1]] = values
    return [
        TokenScores(ids[start:], *columns[:, at : at + len(ids[start:])])
        for ids, start, at in zip(sequences, starts, places, strict=True)
    ]


def _check(model, sequences: Sequence[np.ndarray], starts: Sequence[int], context: int, stride: int) -> None:
    longest = context_length(model)
    if not 1 <= context <= longest:
        raise ValueError(f"context {context} is outside 1..{longest}, what the model can look at")
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride} is outside 1..{context}, the context: tokens would be left out")
    if (low := min(starts, default=1)) < 1:
        where = f"starts[{list(starts).index(low)}] is {low}"
        raise ValueError(f"{where}: the token at 0 has nothing before it, so use 1 or more")
    check_ids(model, sequences)


def check_ids(model, sequences: Sequence[Sequence[int]]) -> None:
    """ValueError for a token id that the model has no embedding of (a GPU would only say that it failed)."""
    rows = model.get_input_embeddings().weight.shape[0]
    for index, ids in enumerate(sequences):
        if len(ids) and not 0 <= min(ids) <= max(ids) < rows:
            raise ValueError(f"text {index}: token ids {min(ids)}..{max(ids)}, the model knows 0..{rows - 1}")


class _Window(NamedTuple):
    ids: np.ndarray  # of the whole sequence
    begin: int  # inputs are ids[begin : end - 1]
    first: int  # tokens scored are ids[first : end]
    end: int
    at: int  # where the scores go in the columns of all results


def _windows(ids: np.ndarray, start: int, context: int, stride: int, at: int) -> Iterator[_Window]:
    """The windows that score ids[start:], each token in exactly one; inputs are at most `context` tokens."""
    first, end = 1, min(len(ids), context + 1)
    while first < end:
        scored_from = max(first, start)
        if scored_from < end:
            yield _Window(ids, max(0, end - 1 - context), scored_from, end, at + scored_from - start)
        first, end = end, min(len(ids), end + stride)


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[Sequence[_Window]]:
    """Runs of windows (sorted by length, longest first) whose padded size stays within `batch_tokens`."""
    while windows:
        rows = max(1, batch_tokens // (windows[0].end - 1 - windows[0].begin))
        yield windows[:rows]
        windows = windows[rows:]


@contextmanager
def exact(model) -> Iterator[None]:
    """No dropout, no gradients, no reduced-precision matrix products; what was set before comes back."""
    training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)


def _split_head(model, probe: np.ndarray):
    """(body, head): body(input_ids) gives states (B, T, D), head(states) float32 logits (N, V).

    The head is applied by us, to the rows and in the pieces we want, where it is a linear layer on the last hidden
    state; that is tried on `probe`. Where it is not (logits scaled or capped), the body returns the model's own logits.
    """
    linear = model.get_output_embeddings()
    if isinstance(linear, torch.nn.Linear) and model.base_model is not model:
        ids = torch.as_tensor(probe, device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        if torch.allclose(linear(hidden).float(), logits.float(), rtol=1e-5, atol=1e-6, equal_nan=True):
            weight, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
            body = functools.partial(model.base_model, use_cache=False)
            return lambda ids: body(ids).last_hidden_state, lambda states: F.linear(states.float(), weight, bias)
    return lambda ids: model(input_ids=ids, use_cache=False).logits, torch.Tensor.float


def _score(body, head, model, batch: Sequence[_Window], stats: bool) -> list[np.ndarray]:
    """For each window an array (1, n) of log-probabilities, or (5, n) with the statistics in TokenScores' order."""
    width, device = max(window.end - 1 - window.begin for window in batch), model.device
    # Padding on the right, without a mask: a causal model cannot look at it, and its rows are left out below.
    inputs = np.full((len(batch), width), batch[0].ids[0])  # (B, T)
    for row, window in zip(inputs, batch, strict=True):
        row[: window.end - 1 - window.begin] = window.ids[window.begin : window.end - 1]
    places = [np.arange(w.first - 1 - w.begin, w.end - 1 - w.begin) + i * width for i, w in enumerate(batch)]
    targets = torch.as_tensor(np.concatenate([w.ids[w.first : w.end] for w in batch]), device=device)  # (N,)
    states = body(torch.as_tensor(inputs, device=device)).flatten(0, 1)  # (B*T, D)
    states = states[torch.as_tensor(np.concatenate(places), device=device)]  # (N, D)
    rows = max(1, HEAD_ELEMENTS // model.get_input_embeddings().weight.shape[0])
    pairs = zip(states.split(rows), targets.split(rows), strict=True)
    values = torch.cat([_reduce(head(some), gold, stats) for some, gold in pairs], dim=1).cpu().numpy()
    return np.split(values, np.cumsum([w.end - w.first for w in batch])[:-1], axis=1)


def _reduce(logits: torch.Tensor, gold: torch.Tensor, stats: bool) -> torch.Tensor:
    """Logits (N, V) and targets (N,) to (1, N) log-probabilities or (5, N) with the statistics."""
    if not stats:
        return -F.cross_entropy(logits, gold, reduction="none")[None]
    probs, own = logits.softmax(-1), logits.gather(1, gold[:, None])  # (N, V) and (N, 1)
    above, equal = (logits > own).sum(1), (logits == own).sum(1)
    ranks, hits = 1 + above + (equal - 1) / 2, (above == 0) / equal
    logprobs, entropies = -F.cross_entropy(logits, gold, reduction="none"), -torch.xlogy(probs, probs).sum(1)
    values = torch.stack([logprobs, probs.amax(1), entropies, ranks, hits])
    return torch.where(logprobs.isnan(), logprobs, values)  # NaN compares as false: no rank comes from it


def generate(
    model, tokenizer, prompts: Sequence[str | Sequence[int]], *, max_new_tokens: int = 100, temperature: float = 0.8,
    top_p: float = 0.95, num_return_sequences: int = 1, seed: int = 0, batch_size: int = 32,
) -> list[list[str]]:  # fmt: skip
    """`num_return_sequences` continuations (without the prompt) of each prompt; temperature 0: the likeliest token.

    An empty prompt is BOS alone. A text ends at EOS, after `max_new_tokens`, or where the context is full. The same
    seed gives the same texts for any `batch_size`, since each draws from a random stream of its own.
    """
    if num_return_sequences < 1 or batch_size < 1:
        raise ValueError(f"num_return_sequences {num_return_sequences} and batch_size {batch_size} must be 1 or more")
    rows = [ids for ids in encode(tokenizer, prompts, bos=None) for _ in range(num_return_sequences)]
    rows = _fit_context(rows, max_new_tokens, context_length(model))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # like lengths together: less padding
    made: list[list[int]] = [[] for _ in rows]
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    options["stop"] = stop_ids(model, tokenizer)
    with exact(model):
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
    room = [min(max_new_tokens, context - len(ids)) for ids in prompts]  # tokens that each may still make
    generators = [np.random.default_rng((seed, stream)) for stream in streams or range(len(prompts))]
    draws = [generator.random(max(room), dtype=np.float32) for generator in generators]
    draws = torch.as_tensor(np.array(draws), device=model.device)  # (B, steps); no row depends on another
    tokens, mask = (part.to(model.device) for part in _pad_left(prompts))  # (B, T) both
    lengths, positions = mask.sum(1, keepdim=True), (mask.cumsum(1) - 1).clamp(min=0)
    decoder = Decoder(model, mask, draws.shape[1])
    for step in range(draws.shape[1]):
        chosen = _sample(decoder(tokens, positions), temperature, top_p, draws[:, step])  # (B,)
        new = [t if left and t not in stop else None for t, left in zip(chosen.tolist(), room, strict=True)]
        room = [0 if token is None else left - 1 for token, left in zip(new, room, strict=True)]
        yield new
        if not any(room):
            return
        tokens = chosen[:, None]
        positions = (lengths + step).clamp(max=context - 1)  # one that has ended goes on unheard, within the context


def _check_sampling(prompts, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    if not prompts or not all(len(ids) for ids in prompts):
        raise ValueError("a batch needs a prompt, and a prompt a token: put BOS in front")


def _fit_context(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> list[Sequence[int]]:
    """Prompts cut from the left to leave room for `max_new_tokens`, but never below half the context."""
    most = max(context - max_new_tokens, context // 2, 1)
    if any(len(ids) > most for ids in prompts):
        log.warning("a prompt is cut to its last %d tokens: the model's context is %d tokens", most, context)
    return [ids[-most:] for ids in prompts]


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T)."""
    width = max(map(len, prompts))
    tokens = [[ids[0]] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(tokens), torch.tensor(mask)


def _sample(logits: torch.Tensor, temperature: float, top_p: float, draws: torch.Tensor) -> torch.Tensor:
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
    place = torch.searchsorted(total, draws[:, None] * total.gather(1, last), right=True).minimum(last)  # (B, 1)
    return (place if order is None else order.gather(1, place))[:, 0]
