"""The loss of a language model: -log p of each token given those before it, in nats, summed.

`next_token_nll` is the plain form, from logits. `head_nll` never holds all logits: it takes the output layer's product
a slice of the batch at a time and computes the gradients on the way, which on a CPU is also the faster form.
`document_mask` keeps the tokens of a chunk from seeing other documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, masking_utils

SLICE_ELEMENTS = (
    2**23
)  # logits held at a time: 16 MB in bf16, 32 MB in float32, which a CPU's caches help with
GPU_SLICE_ELEMENTS = 2**26


def next_token_nll(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of -log p(token | tokens before it), in nats, in float32: logits (B, T, V), ids (B, T)."""
    targets = F.pad(
        input_ids[:, 1:], (0, 1), value=-100
    )  # (B, T): all logits as they lie, without a copy of most
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def slice_nll(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of -log softmax(logits)[target]; G (N, V) and s (N, 1), whose product is its gradient by the logits.

    logits (N, V), targets (N,), -1 for none. With m the largest logit of a row and Z the sum of its exp(logit - m), G
    is exp(logit - m), less Z at the target, and s is 1 / Z: one exponential of each logit gives both results, and the
    products of G with other matrices are scaled instead of G. The target's own, (p - 1) Z, is worked out from its loss.
    """
    wanted, places = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]  # (N, 1) both
    top = logits.amax(-1, keepdim=True).float()
    powers = (logits - top).exp_()  # (N, V) float32
    total = powers.sum(-1, keepdim=True)
    nll = (total.log() - (logits.gather(1, places) - top)) * wanted  # (N, 1)
    gradient = powers.to(logits.dtype).scatter_(
        1, places, ((-nll).expm1() * total).to(logits.dtype)
    )
    return nll.sum(), gradient, wanted / total


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, rows, dtype, kernel):
        x, w = states.to(dtype), weight.to(dtype)  # (N, D), (V, D)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        by_states, by_weight = (
            torch.empty_like(x),
            torch.zeros(w.shape, dtype=torch.float32, device=w.device),
        )
        by_bias = (
            None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=w.device)
        )
        for some, own, out in zip(
            x.split(rows), targets.split(rows), by_states.split(rows), strict=True
        ):
            logits = F.linear(some, w, None if bias is None else bias.to(dtype))  # (rows, V)
            nll, gradient, scale = kernel(logits, own)
            total += nll
            torch.mm(gradient, w, out=out).mul_(scale)
            scaled = (some * scale).to(dtype)
            if dtype == torch.float32:
                by_weight.addmm_(gradient.t(), scaled)
            else:
                by_weight += gradient.t() @ scaled
            if bias is not None:
                by_bias += torch.mv(gradient.t().float(), scale.squeeze(1))
        ctx.save_for_backward(by_states, by_weight, *([] if bias is None else [by_bias]))
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, factor):
        gradients = [
            (saved * factor).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)
        ]
        return (*gradients, *([None] * (7 - len(gradients))))


def head_nll(
    states: torch.Tensor, head: torch.nn.Linear, input_ids: torch.Tensor, dtype: torch.dtype,
    kernel: Callable = slice_nll,
) -> torch.Tensor:  # fmt: skip
    """next_token_nll(head(states), input_ids) from the last hidden states (B, T, D), without all the logits at once.

    Matrix products are in `dtype`, sums and softmax in float32. `kernel` is slice_nll or another loss that gives what
    it gives, for slices of a few whole chunks in order.
    """
    n, length = input_ids.shape
    targets = torch.cat(
        [input_ids[:, 1:], input_ids.new_full((n, 1), -1)], dim=1
    ).flatten()  # (B*T,)
    elements = GPU_SLICE_ELEMENTS if states.is_cuda else SLICE_ELEMENTS
    chunks = max(1, elements // (head.out_features * length))  # in a slice
    with torch.autocast(
        states.device.type, enabled=False
    ):  # which would halve some of the products and not others
        return _HeadNLL.apply(
            states.flatten(0, 1), head.weight, head.bias, targets, chunks * length, dtype, kernel
        )


def _nothing(*args) -> None:
    return None


def _no() -> bool:
    return False


_is_tracing = getattr(masking_utils, "is_tracing", None)


def _a_mask_is_traced(mask=None) -> bool:
    return mask is not None and _is_tracing(mask)


@contextmanager
def chunks_are_whole(*more: tuple[object, str, Callable]) -> Iterator[None]:
    """In here transformers builds no mask where causal attention alone will do, and does not wait for the device.

    In a forward pass without mask and cache it looks, by their positions, for texts packed into a row: on a GPU that
    waits for the device, and compiled it puts a mask in the place of causal attention, as releases before 5.23 do in
    any compiled pass. Our chunks carry no such positions (data.document_mask goes by the tokens). Some torch releases
    say of any compiled pass that it is an export. GPT-2 looks for padding in the tokens, which waits as well. `more`:
    further replacements, each a place, a name and a function.
    """
    ours = [
        (masking_utils, "find_packed_sequence_indices", _nothing),
        (masking_utils, "is_tracing", _a_mask_is_traced),
        (masking_utils, "is_torchdynamo_exporting", _no),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask", _nothing),
        *more,
    ]
    ours = [
        (place, name, function) for place, name, function in ours if hasattr(place, name)
    ]  # not all have all
    own = [(place, name, vars(place).get(name)) for place, name, _ in ours]
    for place, name, function in ours:
        setattr(place, name, function)
    try:
        yield
    finally:
        for place, name, function in own:
            if function is None:  # it was the class's
                delattr(place, name)
            else:
                setattr(place, name, function)


def rotation_table(rotary: torch.nn.Module, length: int) -> Callable:
    """A forward of Llama's rotary embedding for whole chunks, which looks up the cosines and sines of 0 to T - 1.

    Compiled, the embedding's own works them out again for each element of each layer's queries and keys, forward and
    backward: a sixth of a step on a CPU (docs/results.md).
    """
    with torch.autocast(rotary.inv_freq.device.type, enabled=False):
        positions = torch.arange(length, device=rotary.inv_freq.device)[None]
        cos, sin = type(rotary).forward(
            rotary, rotary.inv_freq, position_ids=positions
        )  # (1, T, D) float32

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos.to(x.dtype), sin.to(x.dtype)

    return forward


def document_mask(input_ids: torch.Tensor, bos_token_id: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask (B, 1, T, T): 0 for tokens of the same document at or before one's own, else the lowest
    number of `dtype`. A document begins at each BOS."""
    document = (input_ids == bos_token_id).cumsum(1)  # (B, T)
    same = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    seen = (
        torch.ones(input_ids.shape[1:] * 2, dtype=torch.bool, device=input_ids.device).tril() & same
    )
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


class NextTokenLoss:
    """nll(model, input_ids (B, T)) -> summed -log p of tokens 1 to T - 1, in nats: masked, compiled or sliced as asked.

    With `compile` the batches of `batch_size` chunks go through torch.compile and others, such as the last of an epoch,
    do not: each new shape would be compiled anew. `chunked` takes the output layer a slice at a time (loss.head_nll).
    `recorded` is for the trainer, which then records a batch's passes (training/cuda_graphs.py).
    """

    def __init__(
        self, *, dtype=torch.float32, batch_size=0, compile=False, chunked=False, mask_from: int | None = None,
        recorded=False,
    ):  # fmt: skip
        self.dtype, self.batch_size, self.compile, self.mask_from = (
            dtype,
            batch_size,
            compile,
            mask_from,
        )
        self.recorded = recorded
        self.plain = functools.partial(self._sliced, slice_nll) if chunked else self._whole
        self.fast, self.body = self.plain, None
        self._tables: dict[tuple[torch.nn.Module, int], Callable] = {}
        if compile and chunked:
            self.fast = functools.partial(self._sliced, torch.compile(slice_nll, dynamic=False))
        elif compile:
            self.fast = torch.compile(self._whole, dynamic=False)

    def __call__(self, model, input_ids: torch.Tensor) -> torch.Tensor:
        with self.whole_chunks(model, input_ids):
            return (self.fast if self.is_fast(input_ids) else self.plain)(model, input_ids)

    def whole_chunks(self, model, input_ids: torch.Tensor):
        """chunks_are_whole for a pass of this model over chunks (B, T), with a table for Llama's rotary embedding."""
        rotary, length = getattr(model.base_model, "rotary_emb", None), input_ids.shape[1]
        if not hasattr(rotary, "inv_freq"):  # GPT-J's of some releases is a table already
            return chunks_are_whole()
        if (rotary, length) not in self._tables:
            self._tables[rotary, length] = rotation_table(rotary, length)
        return chunks_are_whole((rotary, "forward", self._tables[rotary, length]))

    def _mask(self, input_ids):
        return (
            {}
            if self.mask_from is None
            else {"attention_mask": document_mask(input_ids, self.mask_from, self.dtype)}
        )

    def is_fast(self, input_ids: torch.Tensor) -> bool:
        """Whether a batch goes through what is compiled."""
        return self.compile and len(input_ids) == self.batch_size

    def _whole(self, model, input_ids):
        return next_token_nll(
            model(input_ids=input_ids, use_cache=False, **self._mask(input_ids)).logits, input_ids
        )

    def states(self, model, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (B, T, D), from the compiled model where that was asked for and the batch is full."""
        body = model.base_model
        if self.is_fast(input_ids):
            if self.body is None:
                self.body = torch.compile(model.base_model, dynamic=False)
            body = self.body
        return body(input_ids=input_ids, use_cache=False, **self._mask(input_ids)).last_hidden_state

    def _sliced(self, kernel, model, input_ids):
        states, head = self.states(model, input_ids), model.get_output_embeddings()
        return head_nll(states, head, input_ids, self.dtype, kernel)
