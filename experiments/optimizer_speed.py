"""Seconds of a step of AdamW, of Muon as torch has it, and of Muon as train.py takes it, beside a batch's two passes.

    python experiments/optimizer_speed.py --config config/llama-10M.yaml --repeats 5

The model is randomly initialised and has the gradients of one batch of random ids; each way moves the same weights, in
turn, --repeats times over after a first round that does not count. Prints median, minimum and maximum, the ratio to
torch's Muon, and the time of the forward and backward pass of that one batch in float32, not compiled.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training_speed import tokenizer_of  # noqa: E402

WAYS = {"adamw": "AdamW", "torch": "Muon, torch's own", "muon": "Muon, ours"}


def optimizers_of(model, training: dict) -> dict:
    """An optimiser for each way, over the same weights."""
    import torch

    from babyllama.training import optimizers

    muon = optimizers.make_optimizer(model, {**training, "optimizer": "muon"})
    group = muon.parts["muon"].param_groups[0]
    own = torch.optim.Muon(group["params"], lr=group["lr"], adjust_lr_fn=group["adjust_lr_fn"])
    return {
        "adamw": optimizers.make_optimizer(model, {**training, "optimizer": "adamw"}),
        "torch": optimizers.MuonAdamW(own, muon.parts["adamw"]),
        "muon": muon,
    }


def seconds_of(call, device) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{statistics.median(values) * 1000:9.1f} ms ({min(values) * 1000:.1f} to {max(values) * 1000:.1f})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default=str(ROOT / "config" / "llama-10M.yaml"), help="whose model and batch"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="how often each way is measured (default 5)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    import torch

    import train
    from babyllama.device import pick_device
    from babyllama.training.loss import NextTokenLoss

    try:
        config = train.load_config(args.config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = pick_device()
    torch.manual_seed(0)
    model = train.create_model(config, tokenizer_of(config)).to(device).train()
    shape = config["training"]["batch_size"], config["data"]["seq_length"]
    ids, loss = (
        torch.randint(3, model.config.vocab_size, shape, device=device),
        NextTokenLoss(chunked=True),
    )
    ways = optimizers_of(model, config["training"])
    times: dict[str, list[float]] = {name: [] for name in ("passes", *ways)}
    for _ in range(args.repeats + 1):
        model.zero_grad()
        times["passes"].append(
            seconds_of(lambda: (loss(model, ids) / ids[:, 1:].numel()).backward(), device)
        )
        for name, optimizer in ways.items():
            times[name].append(seconds_of(optimizer.step, device))
    base = statistics.median(times["torch"][1:])
    print(
        f"forward and backward pass of a batch of {shape[0]} x {shape[1]} tokens {spread(times['passes'][1:])}"
    )
    for name, title in WAYS.items():
        some = times[name][1:]
        print(f"{title:20}{spread(some)}, ratio {base / statistics.median(some):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
