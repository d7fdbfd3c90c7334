"""Replay a batch's forward and backward pass on a GPU with one launch.

    step = CudaGraphStep(run, model.parameters(), batch_size=32)
    loss = step(input_ids, n_predicted)  # as run(input_ids, n_predicted): gradients are in p.grad

A small model leaves the GPU waiting, because Python takes longer to start a kernel than the kernel
takes to run (docs/results.md). A CUDA graph is a recording of many kernels, and one call starts all
of them. They read and write the same addresses every time, so each batch is first copied to where
the recorded one was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from babyllama.device import is_out_of_memory

# The first full batches run as usual, because they still compile and allocate memory.
WARM_UP_BATCHES = 3


class CudaGraphStep:
    """Replay run(input_ids (B, T), n_predicted ()), which computes a loss and gradients.

    There are two graphs. The first batch of a step sets the gradients, and with accumulation later
    batches add to them. A batch runs as usual if it is smaller, or if it would add to gradients
    that no graph has written.
    """

    def __init__(self, run: Callable, parameters: Iterable[torch.nn.Parameter], batch_size: int):
        self.run = run
        self.parameters = [p for p in parameters if p.requires_grad]
        self.batch_size = batch_size
        self.full_batches = 0
        # {False: graph that sets the gradients, True: graph that adds to them}, each with its loss
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __call__(self, input_ids: torch.Tensor, n_predicted: torch.Tensor) -> torch.Tensor:
        """Return the loss () of a batch, in a tensor that the next call overwrites."""
        is_full = len(input_ids) == self.batch_size
        self.full_batches += is_full
        adds = self.parameters[0].grad is not None
        can_replay = is_full and self.full_batches > WARM_UP_BATCHES
        if not can_replay or (adds and not self._has_recorded_gradients()):
            return self.run(input_ids, n_predicted)
        if adds not in self.graphs:
            self._record(adds, input_ids, n_predicted)
        elif not adds:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
        self.input_ids.copy_(input_ids)
        self.n_predicted.copy_(n_predicted)
        graph, loss = self.graphs[adds]
        graph.replay()
        return loss

    def _has_recorded_gradients(self) -> bool:
        """Return True if the gradients are the tensors that the first graph writes."""
        return False in self.graphs and self.parameters[0].grad is self.gradients[0]

    def _record(self, adds: bool, input_ids: torch.Tensor, n_predicted: torch.Tensor) -> None:
        """Record one of the two graphs. Both write to the gradients that the first one made."""
        pool = None
        if adds:
            pool = self.graphs[False][0].pool()
        else:
            self.input_ids = input_ids.clone()
            self.n_predicted = n_predicted.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local" because meanwhile DataLoader's thread pins memory, which is fine
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss = self.run(self.input_ids, self.n_predicted)
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream())
            # a failed recording raises a second error when it ends; the first one is the cause
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
