"""Compare our scores with Hugging Face's strided perplexity and lm-evaluation-harness.

    python experiments/agreement.py models/llama-10M --text data/dev/children_stories.dev

The strided recipe is that of https://huggingface.co/docs/transformers/perplexity, with each token
counted once. Its last window begins at a multiple of the stride and ours is always full, so both
are compared on a text whose last window is full in both, and on all of the text.
lm-evaluation-harness (pip install lm-eval, in a separate environment) uses windows of one context
that do not overlap; it is configured not to add a second <s>.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common  # noqa: F401  puts the repository on sys.path
import torch

from babyllama.cli import Parser, run_script
from babyllama.data.documents import read_documents
from babyllama.evaluation.loading import context_length, encode, load_model
from babyllama.evaluation.scoring import ids_logprobs, token_logprobs


@torch.no_grad()
def strided_loss(model, ids: list[int], length: int, stride: int) -> float:
    """Return nats per token by the recipe, in float64.

    Windows of `length` ids begin at each multiple of `stride`.
    """
    total = 0.0
    scored_to = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        window = torch.tensor([ids[begin:end]], device=model.device)
        logprobs = model(window).logits[0].double().log_softmax(-1)  # (T, V)
        for position in range(max(scored_to, begin + 1), end):
            total -= logprobs[position - 1 - begin, ids[position]].item()
        scored_to = end
        if end == len(ids):
            return total / (len(ids) - 1)
    raise AssertionError("no window reached the end")


def rolling_logprobs(path: str, texts: list[str]) -> list[float]:
    """Return the summed log-probability of each text by lm-evaluation-harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=path, device="cpu", dtype="float32", batch_size=1, add_bos_token=False
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return harness.loglikelihood_rolling(requests, disable_tqdm=True)


def compare_strided(model, ids: list[int]) -> None:
    """Print the perplexity of both programs for several windows and strides."""
    context = context_length(model)
    for length, stride in (
        (context, context // 2),
        (context, context // 4),
        (context // 2, context // 8),
    ):
        full_windows = ids[: len(ids) - (len(ids) - length) % stride]
        for name, row in (("full windows", full_windows), ("all of the text", ids)):
            recipe = math.exp(strided_loss(model, row, length, stride))
            (scores,) = ids_logprobs(model, [row], context=length - 1, stride=stride)
            ours = math.exp(-scores.logprobs.mean())
            print(
                f"strided {length}, {stride}, {name}: recipe {recipe:.9g} ours {ours:.9g} "
                f"relative {ours / recipe - 1:.1e}"
            )


def compare_rolling(path: str, model, tokenizer, texts: list[str]) -> None:
    """Print bits per byte and word perplexity of both programs."""
    scores = token_logprobs(model, tokenizer, texts, stride=context_length(model))
    ours = -sum(score.logprobs.sum() for score in scores)
    harness = -sum(rolling_logprobs(path, texts))
    n_bits = math.log(2) * sum(len(text.encode()) for text in texts)
    n_words = sum(len(text.split()) for text in texts)
    print(f"rolling, {len(texts)} texts, {sum(len(score.ids) for score in scores):,} tokens:")
    print(f"bits per byte: harness {harness / n_bits:.9g} ours {ours / n_bits:.9g}")
    print(
        f"word perplexity: harness {math.exp(harness / n_words):.9g} "
        f"ours {math.exp(ours / n_words):.9g}"
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to score")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        model, tokenizer = load_model(args.model, "cpu")
        documents = ["".join(parts).strip() for parts in read_documents(args.text)]
        texts = [text for text in documents if text]
        ids = encode(tokenizer, ["\n\n".join(texts)])[0]
        compare_strided(model, ids[: 40 * context_length(model) + 7])
        compare_rolling(args.model, model, tokenizer, texts)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
