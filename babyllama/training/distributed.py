"""Coordinate several processes (torchrun, accelerate launch), each with its share of every step.

Rank 0 prepares the data, writes files and prints; the others wait, then train on their chunks. In
one process everything here does nothing. Knows neither configurations nor models.

    distributed.start()                # after the command line is parsed
    with distributed.main_first():     # rank 0 runs the block, then the others; one error ends all
        dataset = prepare()
    if distributed.is_main():
        write()
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from babyllama import cli

# the launcher's key-value store, and how many main_first blocks have begun
_group = SimpleNamespace(store=None, block=0)


class OtherRankError(ValueError):
    """An error that every process raises, because one of them failed in a main_first block."""

    on_all_ranks = True


# ---- the process group --------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Return True in the process that prints and writes."""
    return rank() == 0


def start() -> None:
    """Join the process group, one GPU per process if there are GPUs, and silence all ranks but 0.

    Raises ValueError if a machine has fewer GPUs than processes, or if accelerate is configured to
    shard the model.
    """
    if world_size() == 1 or _group.store:
        return
    for method in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{method}", "false").lower() == "true":
            raise ValueError(
                f"accelerate launch enabled {method}; disable it and use --set training.fsdp=true"
            )
    import torch
    import torch.distributed as dist

    backend = "gloo"
    device = None
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(
                f"no GPU for process {local_rank + 1} of this machine: "
                f"use --nproc_per_node={n_gpus}"
            )
        backend = "nccl"
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        # accelerate's default is cpu:0, to which older releases of torch cannot load a checkpoint
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # this import takes seconds; do it in all processes at once, before they wait for one another
    from transformers import Trainer  # noqa: F401

    store, _, _ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend,
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=datetime.timedelta(hours=1),
        device_id=device,
    )
    _group.store = dist.PrefixStore("babyllama", store)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def stop() -> None:
    """Leave the process group at the end of a run."""
    if _group.store:
        import torch.distributed as dist

        dist.destroy_process_group()
        _group.store = None


def require_gpus() -> None:
    """Raise ValueError if training.fsdp has no GPUs, and warn if there is only one process.

    accelerate's FSDP does not shard on CPUs; each process would hold the complete model.
    """
    import torch

    if world_size() == 1:
        logging.getLogger(__name__).warning(
            "training.fsdp: true has no effect in one process (docs/scaling.md)"
        )
    elif not torch.cuda.is_available():
        raise ValueError("training.fsdp: true needs one GPU per process; omit it on CPUs")


def seed_per_rank(seed: int) -> None:
    """Reseed all ranks but 0, so that dropout differs between processes."""
    if not is_main():
        import torch

        torch.manual_seed(seed + rank())


# ---- one after the other, with one end for all --------------------------------------------------


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block in rank 0, then in the other ranks; rank 0 waits for them.

    If a rank raises ValueError or OSError, all raise OtherRankError with its message; any other
    exception ends the other ranks with exit code 1. The main_process_first of accelerate and
    transformers does not: after an error in rank 0 the other ranks keep waiting or run the block,
    and rank 0 does not learn of theirs.
    """
    if world_size() == 1:
        yield
        return
    _group.block += 1
    if not is_main():
        _raise_if_failed(_wait_for(f"{_group.block}.0"))
    outcome_key = f"{_group.block}.{rank()}"
    try:
        yield
    except (ValueError, OSError) as error:
        message = _message(error)
        _group.store.set(outcome_key, f"error:{message}")
        raise OtherRankError(message) from None
    except BaseException:
        _group.store.set(outcome_key, "crash")
        raise
    _group.store.set(outcome_key, "ok")
    for other_rank in range(world_size()):
        _raise_if_failed(_wait_for(f"{_group.block}.{other_rank}"))


def _wait_for(key: str) -> str:
    """Return the value of a key in the store as soon as a process sets it.

    Polls: preparing data may take hours, and Ctrl-C does not interrupt a blocking `get`.
    """
    while not _group.store.check([key]):
        time.sleep(0.02)
    return _group.store.get(key).decode()


def _raise_if_failed(outcome: str) -> None:
    """Fail like the process that had this outcome: "ok", "error:message" or "crash"."""
    kind, _, message = outcome.partition(":")
    if kind == "error":
        raise OtherRankError(message)
    if kind == "crash":
        sys.exit(1)


def _message(error: Exception) -> str:
    """Return the message of an error; ranks other than 0 put their number before each line."""
    prefix = "" if is_main() else f"rank {rank()}: "
    return "\n".join(prefix + line for line in str(error).splitlines())


def print_error(error: Exception) -> None:
    """Print an error on stderr; rank 0 alone prints an error that all ranks raise."""
    if not getattr(error, "on_all_ranks", False):
        cli.print_error(ValueError(_message(error)))
        return
    if is_main():
        cli.print_error(error)
    if (
        _group.store
    ):  # the launcher kills all ranks when the first one exits: wait for rank 0's print
        printed_key = f"{_group.block}.printed"
        if is_main():
            _group.store.set(printed_key, "")
        _wait_for(printed_key)


def is_lost_process_error(error: RuntimeError) -> bool:
    """Return True if this error says that the connection to another process broke."""
    signs = ("gloo", "NCCL", "Broken pipe", "Connection")
    return world_size() > 1 and any(sign in str(error) for sign in signs)


# ---- collective operations ----------------------------------------------------------------------


def barrier() -> None:
    """Wait until every process calls this."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_reduce_sum(tensor):
    """Return the sum of a tensor over all processes, in each of them."""
    if world_size() > 1:
        import torch.distributed as dist

        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def forward_through_wrapper(function, model, *args):
    """Return function(inner model, *args), called within the forward pass of the model's wrapper.

    DDP and FSDP gather weights and gradients around their forward pass, so a function that calls
    parts of the model, as the loss does, must run inside it. torch has no public way to do that
    with DDP. For one call the function takes the place of the inner model's forward.
    """
    inner = getattr(model, "module", model)  # DDP has one, FSDP changes the model itself
    own_forward = inner.__dict__.pop("forward", None)  # set by accelerate for autocast

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if own_forward is not None:
            inner.forward = own_forward

    def forward(*args):
        restore()
        return function(inner, *args)

    inner.forward = forward
    try:
        return model(*args)
    finally:
        restore()


# ---- which chunks each process gets -------------------------------------------------------------


def steps_per_epoch(n_chunks: int, chunks_per_step: int) -> int:
    """Return the number of optimizer steps in an epoch.

    The last step takes the remaining chunks. If there is less than one per process, they join the
    step before. Raises ValueError if there are fewer chunks than processes.
    """
    if n_chunks < world_size():
        raise ValueError(
            f"{n_chunks} chunks for {world_size()} processes: use fewer processes or more text"
        )
    full_steps, rest = divmod(n_chunks, chunks_per_step)
    if rest >= world_size():
        return full_steps + 1
    return max(1, full_steps)


def chunks_after(steps: int, n_chunks: int, chunks_per_step: int) -> int:
    """Return how many chunks all processes together have seen after some steps of any epoch."""
    epochs, steps_of_epoch = divmod(steps, steps_per_epoch(n_chunks, chunks_per_step))
    return epochs * n_chunks + steps_of_epoch * chunks_per_step


def batches_per_step(n_chunks: int, batch_size: int, at_most: int | None = None) -> int:
    """Return how many batches of at most `batch_size` each process makes of `n_chunks`.

    Fewer and larger ones if a batch would be empty or if there would be more than `at_most`.
    """
    needed = math.ceil(n_chunks / (batch_size * world_size()))
    batches = max(1, min(needed, n_chunks // world_size()))
    return min(batches, at_most) if at_most else batches


def split_for_rank(chunks: np.ndarray, n_batches: int) -> list[np.ndarray]:
    """Return this process's share of the chunks in `n_batches` batches.

    Every chunk is in one batch of one process; batch sizes differ by one at most.
    """
    return np.array_split(chunks, n_batches * world_size())[rank() :: world_size()]


class ExactBatchSampler:
    """Yield this process's batches of an epoch: every chunk once, in the steps of a single process.

    accelerate's sampler and torch's DistributedSampler repeat or drop chunks to make the processes'
    shares equal.
    """

    drop_last = False

    def __init__(self, sampler, batch_size: int, accumulation: int):
        """Split the order of `sampler` (all chunks, the same in every process; has set_epoch)."""
        self.sampler = sampler
        self.batch_size = batch_size
        self.accumulation = accumulation
        n_chunks = len(sampler)
        chunks_per_step = batch_size * accumulation * world_size()
        n_steps = steps_per_epoch(n_chunks, chunks_per_step)
        # the last step also takes chunks that are too few for a step of their own
        bounds = [step * chunks_per_step for step in range(n_steps)] + [n_chunks]
        self.steps = [slice(start, end) for start, end in itertools.pairwise(bounds)]

    def _n_batches(self, step: slice) -> int:
        return batches_per_step(step.stop - step.start, self.batch_size, self.accumulation)

    def __len__(self) -> int:
        return sum(self._n_batches(step) for step in self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.fromiter(self.sampler, dtype=np.int64)
        for step in self.steps:
            for batch in split_for_rank(order[step], self._n_batches(step)):
                yield batch.tolist()


def train_loader(dataset, args, collate):
    """Return this process's DataLoader for a Trainer with TrainingArguments `args`."""
    import torch
    from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader

    order = SeedableRandomSampler(dataset, generator=torch.Generator(), data_seed=args.data_seed)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=ExactBatchSampler(
            order, args.per_device_train_batch_size, args.gradient_accumulation_steps
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    # accelerate moves batches to the device and sets the epoch; as if for one process, because the
    # batches are already this process's share
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=torch.cuda.is_available(),
    )
