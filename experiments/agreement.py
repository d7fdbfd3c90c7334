"""The same model and text scored by others: Hugging Face's strided perplexity and lm-evaluation-harness.

    python experiments/agreement.py models/llama-10M --text data/dev/children_stories.dev

The strided recipe is that of https://huggingface.co/docs/transformers/perplexity, each token counted once. Its last
window begins at a multiple of the stride while ours is a full one, so the two are compared on a text whose last window
is full in both, and on the whole text. lm-evaluation-harness (pip install lm-eval, in an environment of its own) uses
windows of one context that do not overlap; it is told not to put a second <s> in front.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind the packages: lm-eval imports the other `evaluate`
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from babyllama.data.documents import read_documents  # noqa: E402
from babyllama.evaluation.loading import context_length, encode, load_model
from babyllama.evaluation.scoring import ids_logprobs, token_logprobs  # noqa: E402


@torch.no_grad()
def strided_loss(model, ids: list[int], length: int, stride: int) -> float:
    """Nats per token by the recipe: windows of `length` ids begin at each multiple of `stride`, in float64."""
    total, scored_to = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        logprobs = (
            model(torch.tensor([ids[begin:end]], device=model.device))
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        for place in range(max(scored_to, begin + 1), end):
            total -= logprobs[place - 1 - begin, ids[place]].item()
        scored_to = end
        if end == len(ids):
            return total / (len(ids) - 1)
    raise AssertionError("no window reached the end")


def rolling_logprobs(path: str, texts: list[str]) -> list[float]:
    """Summed log-probability of each text by lm-evaluation-harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    other = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return other.loglikelihood_rolling(requests, disable_tqdm=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to score")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    args = make_parser().parse_args(argv)
    model, tokenizer = load_model(args.model, "cpu")
    texts = [piece.text.strip() for piece in read_documents(args.text) if piece.text.strip()]
    context = context_length(model)

    ids = encode(tokenizer, ["\n\n".join(texts)])[0][: 40 * context + 7]
    for length, stride in (
        (context, context // 2),
        (context, context // 4),
        (context // 2, context // 8),
    ):
        for name, row in (
            ("full", ids[: len(ids) - (len(ids) - length) % stride]),
            ("whole text", ids),
        ):
            theirs = math.exp(strided_loss(model, row, length, stride))
            (scores,) = ids_logprobs(model, [row], context=length - 1, stride=stride)
            ours = math.exp(-scores.logprobs.mean())
            print(
                f"strided {length}, {stride}, {name}: {theirs:.9g} ours {ours:.9g} relative {ours / theirs - 1:.1e}"
            )

    scored = token_logprobs(model, tokenizer, texts, stride=context)
    ours, theirs = -sum(s.logprobs.sum() for s in scored), -sum(rolling_logprobs(args.model, texts))
    size, words = (
        sum(len(text.encode()) for text in texts),
        sum(len(text.split()) for text in texts),
    )
    print(f"rolling, {len(texts)} texts, {sum(len(s.ids) for s in scored):,} tokens:")
    print(f"bits per byte {theirs / math.log(2) / size:.9g} ours {ours / math.log(2) / size:.9g}")
    print(f"word perplexity {math.exp(theirs / words):.9g} ours {math.exp(ours / words):.9g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
