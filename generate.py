"""Type a prompt and watch the model continue it, token by token.

    python generate.py models/quickstart --prompt "Once upon a time"
    python generate.py models/quickstart --prompt "The cat" --num-samples 3 --temperature 0.7
    python generate.py models/quickstart        # asks for prompts; an empty line ends it

These models only continue text. There is no chat format, and each prompt starts from scratch. A
text ends when the model generates its end-of-text token, after --max-new-tokens, or when the
context is full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from babyllama.cli import Parser, check_at_least, log_to_stderr, run_script


def stream(model, tokenizer, prompt: str, *, stream_number: int = 0, **options) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces of text, each of complete characters.

    `options` are max_new_tokens, temperature, top_p and seed. Joined, the pieces of `stream_number`
    i are the i-th text that evaluation.generation.generate returns for this prompt alone.
    """
    from babyllama.evaluation.generation import decode_continuation, generate_steps, stop_ids
    from babyllama.evaluation.loading import encode

    ids = []
    printed = ""
    prompts = encode(tokenizer, [prompt], bos=None)
    stop = stop_ids(model, tokenizer)
    for (token,) in generate_steps(model, prompts, streams=[stream_number], stop=stop, **options):
        if token is not None:
            ids.append(token)
            text = decode_continuation(tokenizer, prompts[0], ids)
            if not text.endswith("\ufffd"):  # the rest of the last character may still follow
                yield text[len(printed) :]
                printed = text
    yield decode_continuation(tokenizer, prompts[0], ids)[len(printed) :]


def read_prompts() -> Iterator[str]:
    """Yield lines from a person or a pipe, until an empty line or the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("prompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="generate.py", description="Continue a prompt with a language model.")
    add = parser.add_argument
    add("model", help="a model directory, e.g. models/quickstart")
    add("--prompt", help='text to continue; "" starts from BOS (default: ask for prompts)')
    add("--num-samples", type=int, default=1, help="texts for each prompt (default 1)")
    add("--max-new-tokens", type=int, default=100, help="maximum length of a text (default 100)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="share of the probability to sample from (default 0.95)",
    )
    add("--seed", type=int, default=0, help="the same seed gives the same texts (default 0)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log_to_stderr()
    return run_script(
        lambda: run(args),
        interrupted="\ninterrupted",
        memory_advice="use fewer --max-new-tokens, or another --device",
    )


def run(args: argparse.Namespace) -> int:
    """Print `num_samples` continuations of each prompt as they are generated."""
    check_at_least(args, {"num_samples": 1, "seed": 0})

    from babyllama.evaluation.loading import load_model

    model, tokenizer = load_model(args.model, args.device)
    prompts = read_prompts() if args.prompt is None else [args.prompt]
    for prompt in prompts:
        # a shell passes any bytes; those that are not UTF-8 become replacement characters
        prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")
        for number in range(args.num_samples):
            pieces = stream(
                model,
                tokenizer,
                prompt,
                stream_number=number,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                seed=args.seed,
            )
            # print the prompt with the first piece, so that an error comes before any output
            print(prompt + next(pieces), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print("\n" if number < args.num_samples - 1 else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
