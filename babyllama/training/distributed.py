"""More than one process (torchrun, accelerate launch): who goes first, who says what, and which chunks each one gets.

Rank 0 prepares the data, writes and talks; the others wait, then do the same work on their own chunks. In one process
everything here does nothing. It knows neither configurations nor models.

    ranks.start()                 # after the command line is parsed
    with ranks.main_first():      # rank 0 runs the block, then the others; a mistake of one ends all
        dataset = prepare()
    if ranks.is_main():
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

import numpy as np

_group = {
    "store": None,
    "block": 0,
}  # the key-value store of the launcher, and how many main_first blocks there were


class OtherRankError(ValueError):
    """What another process said when it failed; every process raises it, so rank 0 alone prints it."""

    on_all_ranks = True


def world_size() -> int:
    """Processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def start() -> None:
    """Join the other processes, with a GPU for each where there are any; from here on rank 0 alone prints and warns.

    ValueError where a machine has fewer GPUs than processes, or where accelerate was told to shard the model its way.
    """
    if world_size() == 1 or _group["store"]:
        return
    for way in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise ValueError(
                f"accelerate launch switched {way} on; leave that out and use --set training.fsdp=true"
            )
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"process {local + 1} of this machine finds {gpus} GPU: use --nproc_per_node={gpus}"
            )
        torch.cuda.set_device(local)
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = (
            "cpu"  # not cpu:0, which older releases cannot load a checkpoint to
        )
    from transformers import Trainer  # noqa: F401  (takes seconds: all processes at once, not in turn)

    store, _, _ = next(dist.rendezvous("env://"))
    options = {
        "store": store,
        "rank": rank(),
        "world_size": world_size(),
        "timeout": datetime.timedelta(hours=1),
    }
    if torch.cuda.is_available():
        dist.init_process_group("nccl", device_id=torch.device("cuda", local), **options)
    else:
        dist.init_process_group("gloo", **options)
    _group["store"] = dist.PrefixStore("babyllama", store)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def require_gpus() -> None:
    """ValueError without GPUs: accelerate's FSDP needs them, and on CPUs it would copy the model to each process.

    In one process there is nothing to share out, which is said in a warning.
    """
    import torch

    if world_size() == 1:
        logging.getLogger(__name__).warning(
            "training.fsdp: true shares nothing out in one process (docs/scaling.md)"
        )
    elif not torch.cuda.is_available():
        raise ValueError("training.fsdp: true needs a GPU for each process; on CPUs leave it out")


def stop() -> None:
    """Leave the others, when all is done."""
    if _group["store"]:
        import torch.distributed as dist

        dist.destroy_process_group()
        _group["store"] = None


def seed_per_rank(seed: int) -> None:
    """Give each process but the first its own random numbers (dropout), which until here were those of all."""
    if not is_main():
        import torch

        torch.manual_seed(seed + rank())


# ---- in turn ------------------------------------------------------------------------------------


def _wait(key: str) -> str:
    """The text under a key of the store, as soon as some process has put it there: for hours, and Ctrl-C is heard."""
    while not _group["store"].check([key]):
        time.sleep(0.02)
    return _group["store"].get(key).decode()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait; then they run it, and rank 0 waits for them.

    A ValueError or OSError in one process becomes OtherFailed in all; another exception ends the others with code 1.
    """
    if world_size() == 1:
        yield
        return
    _group["block"] += 1
    here = f"{_group['block']}."
    if not is_main():
        _raise_if_failed(_wait(here + "0"))
    try:
        yield
    except BaseException as error:
        known = isinstance(error, ValueError | OSError)
        whose = "" if is_main() else f"rank {rank()}: "
        said = "\n".join(whose + line for line in str(error).splitlines()) if known else "crash"
        _group["store"].set(here + str(rank()), f"{'mistake' if known else 'crash'}:{said}")
        if known:
            raise OtherRankError(said) from None
        raise
    _group["store"].set(here + str(rank()), "well")
    for other in range(world_size()):
        _raise_if_failed(_wait(here + str(other)))


def _raise_if_failed(message: str) -> None:
    """Go on where another process did well, and fail with it where it did not."""
    kind, _, text = message.partition(":")
    if kind == "mistake":
        raise OtherRankError(text)
    if kind == "crash":
        sys.exit(1)


def print_error(error: Exception) -> None:
    """Print an error on stderr, a line each: once where every process raised it, else with the number of this one."""
    shared = getattr(error, "on_all_ranks", False)
    if is_main() or not shared:
        whose = "" if is_main() else f"rank {rank()}: "
        for line in str(error).splitlines():
            print(f"error: {whose}{line}", file=sys.stderr, flush=True)
    if (
        shared and _group["store"]
    ):  # a launcher ends all when the first one ends: not before rank 0 has spoken
        here = f"{_group['block']}.spoken"
        if is_main():
            _group["store"].set(here, "")
        _wait(here)


def is_lost_process_error(error: RuntimeError) -> bool:
    """Whether this error says that another process has gone away."""
    return world_size() > 1 and any(
        sign in str(error) for sign in ("gloo", "NCCL", "Broken pipe", "Connection")
    )


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_reduce_sum(tensor):
    """The sum of a tensor over all processes, for each of them."""
    if world_size() > 1:
        import torch.distributed as dist

        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def forward_through_wrapper(model, function, *args):
    """function(model, *args), from within the forward pass of what the model is wrapped in.

    DDP and FSDP gather weights and gradients around their forward pass; a function that calls parts of the model by
    themselves would pass them by.
    """
    if world_size() == 1:
        return function(model, *args)
    inner = getattr(model, "module", model)
    own = inner.__dict__.get("forward")  # set by accelerate for autocast

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if own is not None:
            inner.forward = own

    def forward(*args):
        restore()
        return function(inner, *args)

    inner.forward = forward
    try:
        return model(*args)
    finally:
        restore()


# ---- who gets what ------------------------------------------------------------------------------


def steps_per_epoch(n: int, per_step: int) -> int:
    """Optimiser steps in an epoch of n chunks, per_step in each. The last takes what is left of the chunks; where that
    is less than one for each process, it joins the step before. ValueError for fewer chunks than processes."""
    if n < world_size():
        raise ValueError(
            f"{n} chunks for {world_size()} processes: use fewer processes or more text"
        )
    full, left = divmod(n, per_step)
    return max(1, full + (left >= world_size()) if left else full)


def chunks_after(steps: int, n: int, per_step: int) -> int:
    """Chunks that all processes together have seen after so many steps, over epochs of n."""
    epochs, rest = divmod(steps, steps_per_epoch(n, per_step))
    return epochs * n + rest * per_step


def batches_per_step(n: int, batch_size: int, at_most: int | None = None) -> int:
    """In how many batches for each process n chunks are dealt: none larger than batch_size, none empty, if possible."""
    rounds = max(1, min(math.ceil(n / (batch_size * world_size())), n // world_size()))
    return min(rounds, at_most) if at_most else rounds


def split_for_rank(chunks: np.ndarray, rounds: int) -> list[np.ndarray]:
    """This process's batches of these chunks, one a round; sizes differ by one at most, and each chunk is in one."""
    return np.array_split(chunks, rounds * world_size())[rank() :: world_size()]


class ExactBatchSampler:
    """A batch sampler for this process: every chunk of the epoch once, in the steps that one process would take.

    accelerate's own would repeat chunks from the beginning of the epoch to fill the last batches.
    """

    drop_last = False

    def __init__(self, sampler, batch_size: int, accumulation: int):
        """`sampler` gives all chunks, in the same order in every process; it has set_epoch."""
        self.sampler, self.batch_size, self.accumulation = sampler, batch_size, accumulation
        n, per_step = len(sampler), batch_size * accumulation * world_size()
        ends = [*range(per_step, steps_per_epoch(n, per_step) * per_step, per_step), n]
        self.steps = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]

    def _rounds(self, step: slice) -> int:
        return batches_per_step(step.stop - step.start, self.batch_size, self.accumulation)

    def __len__(self) -> int:
        return sum(self._rounds(step) for step in self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.fromiter(self.sampler, dtype=np.int64)
        for step in self.steps:
            for batch in split_for_rank(order[step], self._rounds(step)):
                yield batch.tolist()


def train_loader(dataset, args, collate):
    """The loader of this process's batches for a Trainer with TrainingArguments `args`, on its device."""
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
    options = {"put_on_device": True, "non_blocking": torch.cuda.is_available()}
    return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, **options)
