"""Time a step of AdamW, of torch.optim.Muon and of our Muon, beside a batch's two passes.

    python experiments/optimizer_speed.py --config config/llama-10M.yaml --repeats 5

The model is randomly initialised and has the gradients of one batch of random ids. All optimizers
move the same weights, one after the other, --repeats times after a round that does not count.
Prints median, minimum and maximum, the ratio to torch's Muon, and the time of the forward and
backward pass in float32, not compiled.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from common import ROOT, seconds_of, spread, tokenizer_or_stand_in

from babyllama.cli import Parser, check_at_least, run_script

TITLES = {"adamw": "AdamW", "torch": "torch.optim.Muon", "muon": "Muon of train.py"}


def make_optimizers(model, training: dict) -> dict:
    """Return an optimizer for each name in TITLES, over the same weights."""
    import torch

    from babyllama.training import optimizers

    muon = optimizers.make_optimizer(model, {**training, "optimizer": "muon"})
    group = muon.parts["muon"].param_groups[0]
    torch_muon = torch.optim.Muon(
        group["params"], lr=group["lr"], adjust_lr_fn=group["adjust_lr_fn"]
    )
    return {
        "adamw": optimizers.make_optimizer(model, {**training, "optimizer": "adamw"}),
        "torch": optimizers.MuonAdamW(torch_muon, muon.parts["adamw"]),
        "muon": muon,
    }


def measure(config: dict, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each turn of the two passes and of each optimizer."""
    import torch

    from babyllama.device import pick_device
    from babyllama.training.loss import NextTokenLoss
    from train import create_model

    device = pick_device()
    torch.manual_seed(0)
    model = create_model(config, tokenizer_or_stand_in(config)).to(device).train()
    shape = (config["training"]["batch_size"], config["data"]["seq_length"])
    ids = torch.randint(3, model.config.vocab_size, shape, device=device)
    loss = NextTokenLoss(chunked=True)
    optimizers = make_optimizers(model, config["training"])

    def passes() -> None:
        (loss(model, ids) / ids[:, 1:].numel()).backward()

    seconds: dict[str, list[float]] = {name: [] for name in ("passes", *optimizers)}
    for _ in range(repeats + 1):
        model.zero_grad()
        seconds["passes"].append(seconds_of(passes, device))
        for name, optimizer in optimizers.items():
            seconds[name].append(seconds_of(optimizer.step, device))
    return {name: values[1:] for name, values in seconds.items()}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    default = str(ROOT / "config" / "llama-10M.yaml")
    parser.add_argument("--config", default=default, help="model and batch")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default 5)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        from train import load_config

        check_at_least(args, {"repeats": 1})
        config = load_config(args.config)
        seconds = measure(config, args.repeats)
        milliseconds = {name: [1000 * s for s in values] for name, values in seconds.items()}
        batch = f"{config['training']['batch_size']} x {config['data']['seq_length']}"
        print(f"passes of a batch of {batch} tokens: {spread(milliseconds['passes'], '.1f')} ms")
        torch_median = statistics.median(seconds["torch"])
        for name, title in TITLES.items():
            ratio = torch_median / statistics.median(seconds[name])
            print(f"{title:20}{spread(milliseconds[name], '.1f')} ms, ratio {ratio:.2f}")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
