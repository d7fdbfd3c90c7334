"""Type a prompt, read what the model says, token by token as it is made.

It does nothing else: no chat format and no history. Each text starts anew, and ends where the model ends it, at
--max-new-tokens, or where the context is full.

    python generate.py models/quickstart --prompt "Once upon a time"
    python generate.py models/quickstart --prompt "The cat" --num-samples 3 --temperature 0.7 --seed 1
    python generate.py models/quickstart        # asks for prompts; an empty line ends it
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator


def stream(model, tokenizer, prompt: str, *, stream_number: int = 0, **options) -> Iterator[str]:
    """The continuation of a prompt in pieces of text, none of which ends inside a character.

    `options` are max_new_tokens, temperature, top_p and seed of inference.generate; the pieces of `stream_number` i
    together are its i-th text for a single prompt.
    """
    from babyllama.evaluation.generation import decode, generate_steps, stop_ids
    from babyllama.evaluation.loading import encode

    ids, shown = [], ""
    stop = stop_ids(model, tokenizer)
    rows = encode(tokenizer, [prompt], bos=None)
    for (token,) in generate_steps(model, rows, streams=[stream_number], stop=stop, **options):
        if token is not None:
            ids.append(token)
            text = decode(tokenizer, ids)
            if not text.endswith(
                "\ufffd"
            ):  # else the bytes of its last character are still to come
                yield text[len(shown) :]
                shown = text
    yield decode(tokenizer, ids)[len(shown) :]


def prompts_typed() -> Iterator[str]:
    """Lines that a person types or a pipe holds, until an empty one or the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("prompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Continue a prompt with a language model."
    )

    def add(name: str, **options) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **options)

    parser.add_argument("model", help="a model directory, e.g. models/quickstart")
    add("prompt", help='text to continue; "" starts from nothing (default: ask for prompts)')
    add("num-samples", type=int, default=1, help="texts for each prompt (default 1)")
    add("max-new-tokens", type=int, default=100, help="most tokens of a text (default 100)")
    add("temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    add(
        "top-p",
        type=float,
        default=0.95,
        help="share of the probability that is sampled from (default 0.95)",
    )
    add("seed", type=int, default=0, help="the same seed gives the same texts (default 0)")
    add("device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    try:
        for name, least in {"num_samples": 1, "seed": 0}.items():
            if getattr(args, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(args, name)} must be {least} or more"
                )
        from babyllama.evaluation.loading import load_model

        model, tokenizer = load_model(args.model, args.device)
        options = {
            name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")
        }
        for typed in prompts_typed() if args.prompt is None else [args.prompt]:
            prompt = typed.encode(errors="surrogateescape").decode(
                errors="replace"
            )  # a shell passes on any bytes
            for number in range(args.num_samples):
                pieces = stream(model, tokenizer, prompt, stream_number=number, **options)
                print(prompt + next(pieces), end="", flush=True)
                for piece in pieces:
                    print(piece, end="", flush=True)
                print("\n" if number < args.num_samples - 1 else "")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from babyllama.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory: fewer --max-new-tokens take less, or another --device has more",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
