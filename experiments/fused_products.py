"""Time Llama's products with fused weights: query, key and value together, gate and up together.

    python experiments/fused_products.py --width 192 --feed-forward 512 --tokens 4096
    OMP_NUM_THREADS=1 python experiments/fused_products.py --bf16

Forward and backward pass of one layer's products, with separate weights and with weights that are
concatenated in each step, so that what is saved stays plain. Both take turns, --repeats times.
Prints the CPU seconds of the separate products, and of each pair the ratio of fused to separate:
median, minimum and maximum. CPU time suits a machine that does other work too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from common import spread

from babyllama.cli import Parser, add_flag, check_at_least, run_script


def make_passes(n_tokens: int, width: int, outputs: list[int], dtype):
    """Return two functions that add to the gradients of some tensors, and these tensors.

    The first one computes the products of an input with each weight separately, the second fused.
    """
    import torch
    import torch.nn.functional as F

    def random(*shape: int):
        return torch.randn(shape).to(dtype)

    x = random(n_tokens, width).requires_grad_()
    weights = [random(size, width).requires_grad_() for size in outputs]
    gradients = [random(n_tokens, size) for size in outputs]

    def separate() -> None:
        torch.autograd.backward([F.linear(x, w) for w in weights], gradients)

    def fused() -> None:
        products = F.linear(x, torch.cat(weights)).split(outputs, dim=1)
        torch.autograd.backward(products, gradients)

    return separate, fused, [x, *weights]


def cpu_seconds(call: Callable) -> float:
    """Return the CPU time of a call, of all threads together."""
    started = time.process_time()
    call()
    return time.process_time() - started


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_flag(parser, "tokens", type=int, default=4096, help="of a step (default 4,096)")
    add_flag(parser, "width", type=int, default=192, help="of the model (default 192)")
    add_flag(parser, "feed-forward", type=int, default=512, help="width (default 512)")
    add_flag(parser, "repeats", type=int, default=9, help="pairs (default 9)")
    add_flag(parser, "bf16", action="store_true", help="instead of float32")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> int:
        check_at_least(args, dict.fromkeys(("tokens", "width", "feed_forward", "repeats"), 1))
        import torch

        dtype = torch.bfloat16 if args.bf16 else torch.float32
        cases = {"query, key, value": [args.width] * 3, "gate, up": [args.feed_forward] * 2}
        for name, outputs in cases.items():
            separate, fused, _ = make_passes(args.tokens, args.width, outputs, dtype)
            pairs = [(cpu_seconds(separate), cpu_seconds(fused)) for _ in range(args.repeats + 1)]
            pairs = pairs[1:]  # the first one warms up
            ratios = spread([second / first for first, second in pairs], ".3f")
            milliseconds = 1000 * statistics.median(first for first, _ in pairs)
            print(f"{name:18} separate {milliseconds:.1f} ms, fused / separate {ratios}")
        return 0

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
