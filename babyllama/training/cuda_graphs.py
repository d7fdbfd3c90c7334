"""A batch's forward and backward pass as one launch on a GPU, where Python would start hundreds of kernels.

The kernels of a small model take less time than Python takes to start them (docs/results.md). A CUDA graph is what
was started once, recorded, and can be started again by a single call on other numbers in the same places.

    passes = BatchGraphs(run, model.parameters(), batch_size=32)  # run(ids, items) -> loss, its gradients in p.grad
    loss = passes(ids, items)  # the same; a graph from the first step on that begins after three full batches

It knows no Trainer and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from babyllama.device import is_out_of_memory

WARM_UP = 3  # full batches that run as they are: what is compiled or allocated at first use must be there before


class CudaGraphStep:
    """run(ids (B, T), items ()) and its gradients, recorded: one graph sets them, another adds to what is there."""

    def __init__(self, run: Callable, parameters: Iterable[torch.nn.Parameter], batch_size: int):
        self.run, self.parameters = run, [p for p in parameters if p.requires_grad]
        self.batch_size, self.seen = batch_size, 0
        self.graphs: dict[
            bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]
        ] = {}  # whether it adds: graph, its loss

    def __call__(self, ids: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The loss () of a batch; it holds until the next call."""
        full = len(ids) == self.batch_size
        self.seen += full
        adds = self.parameters[0].grad is not None
        if not full or self.seen <= WARM_UP or (adds and not self._holds_ours()):
            return self.run(ids, items)
        if adds not in self.graphs:
            self._record(adds, ids, items)
        elif not adds:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
        self.ids.copy_(ids)
        self.items.copy_(items)
        graph, loss = self.graphs[adds]
        graph.replay()
        return loss

    def _holds_ours(self) -> bool:
        """Whether the gradients in the parameters are those that the first graph has set."""
        return False in self.graphs and self.parameters[0].grad is self.gradients[0]

    def _record(self, adds: bool, ids: torch.Tensor, items: torch.Tensor) -> None:
        """Record one of the graphs; the gradients of the first are where both leave theirs."""
        if not adds:
            self.ids, self.items = ids.clone(), items.clone()
        graph, pool = torch.cuda.CUDAGraph(), self.graphs[False][0].pool() if adds else None
        try:
            with torch.cuda.graph(
                graph, pool=pool, capture_error_mode="thread_local"
            ):  # workers pin their memory
                loss = self.run(self.ids, self.items)
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream())
            cause = (
                error.__context__ or error
            )  # the end of a recording that failed has an error of its own
            if isinstance(cause, RuntimeError) and is_out_of_memory(cause):
                raise cause from None
            why = str(cause).strip().splitlines()[0]
            raise ValueError(
                f"no CUDA graph of a batch could be made ({why}); use training.cuda_graphs=false"
            ) from error
        self.graphs[adds] = graph, loss
        if not adds:
            self.gradients = [p.grad for p in self.parameters]
