"""Coordinate several processes that train one model.

The processes are started by torchrun or `accelerate launch`. Rank 0 prepares the data, writes files
and prints, while the others wait; then all of them train. In a single process these functions do
nothing, so callers need not ask how many there are. Nothing here knows about configurations or
models.

    distributed.start()                # after the command line is parsed
    with distributed.main_first():     # rank 0 first, then the others; an error ends all of them
        dataset = prepare()
    distributed.connect()              # before the first collective operation
    if distributed.is_main():
        write()
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

from babyllama import cli

log = logging.getLogger(__name__)

_group = SimpleNamespace(
    store=None,  # the launcher's key-value store
    device=None,  # the GPU of this process
    block=0,  # how many main_first blocks have begun
    on_cpu=None,  # the group of processes for tensors on the CPU; None is the default group
    timeout=600.0,  # seconds of silence after which a process counts as lost
    ended=None,  # the event that ends the heartbeat
)
BEAT_SECONDS = 1.0  # how often each process shows in the store that it is alive


class OtherRankError(ValueError):
    """An error that all processes raise because one of them failed in a main_first block."""

    on_all_ranks = True


# ---- the process group --------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of processes that train together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process; the first one is 0."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Return True in rank 0, the only process that prints and writes files."""
    return rank() == 0


def start() -> None:
    """Find the other processes, take a GPU if there is one, and silence all ranks except 0.

    Raise ValueError if this machine has fewer GPUs than processes, or if accelerate is configured
    to shard the model itself. Warn if accelerate was asked for several processes and started one.
    """
    # accelerate launch --cpu --num_processes 2 sets a port for the processes, but starts only one
    several_asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if several_asked and "WORLD_SIZE" not in os.environ:
        log.warning(
            "accelerate launch was asked for several processes but started only one; for N "
            "processes use torchrun --nproc_per_node=N train.py, or accelerate launch --multi_gpu "
            "--num_processes N train.py (also on a CPU)"
        )
    if world_size() == 1 or _group.store:
        return
    for method in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{method}", "false").lower() == "true":
            raise ValueError(
                f"accelerate launch enabled {method}; disable it and use --set training.fsdp=true"
            )

    # give this process its GPU
    import torch

    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(
                f"no GPU for process {local_rank + 1} of this machine: "
                f"use --nproc_per_node={n_gpus}"
            )
        _group.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(_group.device)
    else:
        # accelerate would use cpu:0, but older releases of torch cannot load a checkpoint to it
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    # this import takes seconds, so let all processes do it now, before they wait for one another
    from transformers import Trainer  # noqa: F401

    # meet the other processes at the launcher's store
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    _group.store = torch.distributed.PrefixStore("babyllama", store)
    _group.ended = threading.Event()
    threading.Thread(target=_beat, args=(_group.ended,), daemon=True).start()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def _beat(ended: threading.Event) -> None:
    """Increment a counter in the store, as a heartbeat, until the run has ended."""
    while not ended.wait(BEAT_SECONDS):
        try:
            _group.store.add(f"{rank()}.beats", 1)
        except (RuntimeError, AttributeError):  # the store is gone
            return


def set_timeout(minutes: float) -> None:
    """Set how long another process may be silent; call it before connect()."""
    _group.timeout = 60 * minutes


def connect() -> None:
    """Join the process group, once all processes are ready to train."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=_group.timeout)
    dist.init_process_group(
        "nccl" if _group.device else "gloo",
        store=_group.store,
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
        device_id=_group.device,
    )
    _group.on_cpu = dist.new_group(backend="gloo", timeout=timeout) if _group.device else None


def stop() -> None:
    """Leave the process group, at the end of a run."""
    if _group.store:
        import torch.distributed as dist

        _group.ended.set()
        if dist.is_initialized():
            dist.destroy_process_group()
        _group.store = None


def seed_per_rank(seed: int) -> None:
    """Reseed all ranks except 0, so that each process draws its own dropout masks."""
    if not is_main():
        import torch

        torch.manual_seed(seed + rank())


# ---- rank 0 first, and errors that end all processes --------------------------------------------


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block in rank 0, then in the other ranks, while rank 0 waits for them.

    If one rank raises ValueError or OSError, all ranks raise OtherRankError with its message. Any
    other exception ends the other ranks with exit code 1. We do not use main_process_first of
    accelerate and transformers because it does not handle errors: if rank 0 fails, the other ranks
    wait forever or run the block anyway, and if another rank fails, rank 0 never learns of it.
    """
    if world_size() == 1:
        yield
        return
    _group.block += 1
    if not is_main():
        _raise_if_failed(_wait_for(f"{_group.block}.0", 0))

    # run the block, and tell the others how it ended
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

    # go on only if it ended well everywhere
    for other_rank in range(world_size()):
        _raise_if_failed(_wait_for(f"{_group.block}.{other_rank}", other_rank))


def _wait_for(key: str, other_rank: int) -> str:
    """Wait until another process sets this key in the store, and return its value.

    Preparing the data may take hours, so this waits as long as the other process has a heartbeat;
    raise ConnectionError if it has been silent for the timeout. It polls, because Ctrl-C
    cannot interrupt the store's blocking `get`.
    """
    beats = None
    heard_at = time.monotonic()
    try:
        while not _group.store.check([key]):
            count = _group.store.add(f"{other_rank}.beats", 0)
            if count != beats:
                beats = count
                heard_at = time.monotonic()
            if time.monotonic() - heard_at > _group.timeout:
                raise ConnectionError(
                    f"process {other_rank} has been silent for {_group.timeout / 60:g} minutes "
                    "(training.process_timeout_minutes): it hangs, or was stopped or killed"
                )
            time.sleep(0.02)
        return _group.store.get(key).decode()
    except RuntimeError as error:  # the process that holds the store is gone
        raise lost_process_error(error) from None


def _raise_if_failed(outcome: str) -> None:
    """Fail in the same way as another process, given its outcome.

    The outcome is "ok", "error:" with a message, or "crash".
    """
    kind, _, message = outcome.partition(":")
    if kind == "error":
        raise OtherRankError(message)
    if kind == "crash":
        sys.exit("another process has crashed; its error is printed above" if is_main() else 1)


def _message(error: Exception) -> str:
    """Return the message of an error, with the rank before each line unless it is rank 0."""
    prefix = "" if is_main() else f"rank {rank()}: "
    return "\n".join(prefix + line for line in str(error).splitlines())


def print_error(error: Exception) -> None:
    """Print an error on stderr; if all ranks raise the same one, only rank 0 prints it."""
    if not getattr(error, "on_all_ranks", False):
        cli.print_error(ValueError(_message(error)))
        return
    if is_main():
        cli.print_error(error)
    # the launcher kills all ranks as soon as one exits, so wait until rank 0 has printed
    if _group.store:
        printed_key = f"{_group.block}.printed"
        if is_main():
            _group.store.set(printed_key, "")
        _wait_for(printed_key, 0)


def is_lost_process_error(error: Exception) -> bool:
    """Return True if this error means that the connection to another process broke."""
    signs = ("gloo", "NCCL", "Broken pipe", "Connection")
    return world_size() > 1 and any(sign in str(error) for sign in signs)


def lost_process_error(error: RuntimeError) -> ConnectionError:
    """Return the error to report instead of one that is_lost_process_error."""
    reason = str(error).strip().splitlines()[0]
    return ConnectionError(
        "lost the connection to another process: it was killed, perhaps because memory ran out, it "
        "was silent for longer than training.process_timeout_minutes, or its own error is printed "
        f"above ({reason})"
    )


# ---- collective operations ----------------------------------------------------------------------


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_reduce_sum(tensor):
    """Return the sum of a tensor over all processes; each of them gets it."""
    if world_size() > 1:
        import torch.distributed as dist

        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """Return the largest of the numbers of all processes, without waiting for their GPUs."""
    if world_size() > 1:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_group.on_cpu)
        number = int(tensor)
    return number


def forward_through_wrapper(function, model, *args):
    """Return function(inner model, *args), called inside the forward pass of DDP or FSDP.

    DDP and FSDP gather weights and gradients around their own forward pass. Our loss calls parts of
    the model instead of the whole, so it has to run inside that pass, and torch has no public way
    to ask DDP for this. So, for the duration of one call, the function takes the place of the
    inner model's forward.
    """
    inner = getattr(model, "module", model)  # DDP wraps the model, FSDP changes it in place
    # accelerate sets a forward of its own on the instance, for autocast
    accelerate_forward = inner.__dict__.pop("forward", None)

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if accelerate_forward is not None:
            inner.forward = accelerate_forward

    def forward(*args):
        restore()
        return function(inner, *args)

    inner.forward = forward
    try:
        return model(*args)
    finally:
        restore()
