"""Replay a batch's forward and backward pass on a GPU with one launch.

    step = CudaGraphStep(run, model.parameters(), batch_size=32)
    loss = step(input_ids, items)     # the same as run(input_ids, items): gradients are in p.grad

Python takes longer to start the kernels of a small model than they take to run (docs/results.md).
A CUDA graph is a recording of all kernels, which one call starts again on new numbers at the same
addresses. This module knows no Trainer and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from babyllama.device import is_out_of_memory

# Full batches that run as usual before the recording: the first ones compile and allocate.
WARM_UP_BATCHES = 3


class CudaGraphStep:
    """Replay run(input_ids (B, T), items ()) from two graphs: one sets gradients, one adds to them.

    Smaller batches, and batches that find gradients of another origin, run as usual.
    """

    def __init__(self, run: Callable, parameters: Iterable[torch.nn.Parameter], batch_size: int):
        self.run = run
        self.parameters = [p for p in parameters if p.requires_grad]
        self.batch_size = batch_size
        self.full_batches = 0
        # by "adds to gradients": the graph and its loss
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __call__(self, input_ids: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Return the loss () of a batch. The next call overwrites it."""
        is_full = len(input_ids) == self.batch_size
        self.full_batches += is_full
        adds = self.parameters[0].grad is not None
        can_replay = is_full and self.full_batches > WARM_UP_BATCHES
        if not can_replay or (adds and not self._has_recorded_gradients()):
            return self.run(input_ids, items)
        if adds not in self.graphs:
            self._record(adds, input_ids, items)
        elif not adds:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
        self.input_ids.copy_(input_ids)
        self.items.copy_(items)
        graph, loss = self.graphs[adds]
        graph.replay()
        return loss

    def _has_recorded_gradients(self) -> bool:
        """Return True if the parameters hold the gradients that the first graph writes."""
        return False in self.graphs and self.parameters[0].grad is self.gradients[0]

    def _record(self, adds: bool, input_ids: torch.Tensor, items: torch.Tensor) -> None:
        """Record one of the graphs. Both write to the gradients of the first."""
        pool = None
        if adds:
            pool = self.graphs[False][0].pool()
        else:
            self.input_ids = input_ids.clone()
            self.items = items.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: workers of the DataLoader pin memory meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss = self.run(self.input_ids, self.items)
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream())
            # ending a failed recording raises an error of its own
            cause = error.__context__ or error
            if isinstance(cause, RuntimeError) and is_out_of_memory(cause):
                raise cause from None
            reason = str(cause).strip().splitlines()[0]
            raise ValueError(
                f"recording a CUDA graph failed ({reason}); use training.cuda_graphs=false"
            ) from error
        self.graphs[adds] = graph, loss
        if not adds:
            self.gradients = [p.grad for p in self.parameters]
