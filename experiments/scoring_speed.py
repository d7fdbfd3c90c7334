"""How fast minimal pairs are scored and texts generated, against the usual way of doing it in the same run.

    python experiments/scoring_speed.py models/llama-10M evaluation_data/blimp_filtered --repeats 3

Scoring: `loop` is the usual way, written out here (files in order, 64 pairs at a time, the good sentences in one padded
forward pass and the bad ones in another, each tokenized alone, log-softmax of everything); `exact` is
likelihood.score, `choose` is likelihood.choose, which benchmark.py uses. Each in a process of its own, in turn,
--repeats times over, on --device (default the CPU); the time is that of the whole process: interpreter, imports,
loading, tokenizing, scoring, and beside it without interpreter and imports. Decisions are compared. The limit is what
the needed matrix products would take at the speed measured for large ones: for `loop` in float32 for every token, for
`choose` in its fast format once for each distinct prefix.

Generation: 64 prompts x 64 tokens, greedy, Hugging Face's `generate` for one prompt at a time and inference.generate
for all, in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WAYS, BATCH = ("loop", "exact", "choose"), 64
PROMPTS, NEW_TOKENS, GEMM = 64, 64, 2048


def loop(
    model_path: str, data: str, every: int, device: str
) -> tuple[list[int], list[float], dict]:
    """The yardstick, for each pair: 0 or 1 for the sentence chosen; the difference of its sums of log p; third, {}."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device).eval()
    pairs = []
    for file in sorted(Path(data).glob("*.jsonl")):
        pairs += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs, margins = pairs[::every], []
    for at in range(0, len(pairs), BATCH):
        sums = []
        for side in ("sentence_good", "sentence_bad"):
            rows = [[tokenizer.bos_token_id, *tokenizer(pair[side], add_special_tokens=False)["input_ids"]]
                    for pair in pairs[at : at + BATCH]]  # fmt: skip
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
            mask = torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
            )
            with torch.no_grad():
                logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(
                    -1
                )  # (B, T, V)
            own = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            sums.append((own * mask[:, 1:]).sum(1))
        margins += (sums[0] - sums[1]).tolist()
    return [int(margin < 0) for margin in margins], margins, {}


def ours(
    way: str, model_path: str, data: str, every: int, device: str
) -> tuple[list[int], list[float], dict]:
    """The same with likelihood.score or likelihood.choose; third, the precision."""
    from babyllama.evaluation import grading, minimal_pairs, tasks
    from babyllama.evaluation.loading import load_model

    model, tokenizer = load_model(model_path, device)
    items = tasks.read_items("blimp", data)[::every]
    if way == "exact":
        (scores, _), precision = minimal_pairs.score_candidates(model, tokenizer, items), {}
    else:
        scores, _, precision = minimal_pairs.score_choices(model, tokenizer, items)
    return (
        grading.grade(items, scores).choice.tolist(),
        (scores[::2] - scores[1::2]).tolist(),
        precision,
    )


def limit(model_path: str, data: str, every: int, device: str) -> dict:
    """Seconds that the matrix products alone take: of every token in float32, and of what `choose` has to compute."""
    import numpy as np
    import torch

    from babyllama.device import fast_dtype
    from babyllama.evaluation import minimal_pairs, tasks
    from babyllama.evaluation.loading import context_length, load_model

    model, tokenizer = load_model(model_path, device)
    items = tasks.read_items("blimp", data)[::every]
    ids, starts = minimal_pairs.scored_spans(tokenizer, items, True)
    begins = minimal_pairs._begins(ids, starts, np.full(len(items), 2), context_length(model))
    prefixes = {tuple(text[:end]) for text in ids for end in range(1, len(text))}
    contexts = {
        tuple(text[:end])
        for text, begin in zip(ids, begins, strict=True)
        for end in range(begin, len(text))
    }
    head = model.get_output_embeddings().weight.numel()
    body = (
        sum(p.numel() for p in model.base_model.parameters())
        - model.get_input_embeddings().weight.numel()
    )
    fast, tokens, rates = fast_dtype(model.device), sum(len(text) - 1 for text in ids), {}
    for dtype in (torch.float32, fast):
        a, b = (torch.randn(GEMM, GEMM, device=device).to(dtype) for _ in range(2))
        times = [timed(lambda a=a, b=b: (a @ b)[0, 0].item()) for _ in range(12)][
            2:
        ]  # a number read is waited for
        rates[dtype] = 2 * GEMM**3 / statistics.median(times)
    return {
        "pairs": len(items), "tokens": tokens, "prefixes": len(prefixes), "contexts": len(contexts),
        "fast": str(fast), "gflops_float32": rates[torch.float32] / 1e9, "gflops_fast": rates[fast] / 1e9,
        "loop": 2 * tokens * (body + head) / rates[torch.float32],
        "choose": 2 * (len(prefixes) * body + len(contexts) * head) / rates[fast],
    }  # fmt: skip


def measured(args: argparse.Namespace) -> dict:
    """What --measure asks for; of a way of scoring also `work`, its seconds after starting up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401  (where the imports are)

    torch.zeros(1, device=args.device)
    what, start = (args.model, args.data, args.every, args.device), time.perf_counter()
    if args.measure == "limit":
        return limit(*what)
    if args.measure == "generation":
        return generation(args.model, args.data, args.repeats, args.device)
    chosen, margins, precision = (
        loop(*what) if args.measure == "loop" else ours(args.measure, *what)
    )
    work = time.perf_counter() - start
    return {"choices": chosen, "margins": margins, "precision": precision, "work": work}


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def generation(model_path: str, data: str, repeats: int, device: str) -> dict:
    """Seconds of both ways for each repeat, and how many of the texts are the same."""
    import torch
    from transformers.utils import logging

    from babyllama.evaluation import tasks
    from babyllama.evaluation.generation import decode, generate
    from babyllama.evaluation.loading import encode, load_model

    logging.set_verbosity_error()
    model, tokenizer = load_model(model_path, device)
    items = tasks.read_items("blimp", data)
    sentences = [item.completions[0] for item in items[:: max(1, len(items) // PROMPTS)]][:PROMPTS]
    prompts = encode(tokenizer, [" ".join(sentence.split()[:4]) for sentence in sentences])
    texts: dict[str, list[str]] = {}

    def one_at_a_time(some: list[list[int]]) -> None:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        made = [
            model.generate(torch.tensor([ids], device=device), **options)[0, len(ids) :]
            for ids in some
        ]
        texts["loop"] = [decode(tokenizer, ids) for ids in made]

    def together(some: list[list[int]]) -> None:
        made = generate(model, tokenizer, some, max_new_tokens=NEW_TOKENS, temperature=0)
        texts["ours"] = [text for (text,) in made]

    one_at_a_time(prompts[:4]), together(prompts)  # to warm up
    times = [
        (timed(lambda: one_at_a_time(prompts)), timed(lambda: together(prompts)))
        for _ in range(repeats)
    ]
    same = sum(a == b for a, b in zip(texts["loop"], texts["ours"], strict=True))
    return {
        "loop": [a for a, _ in times],
        "ours": [b for _, b in times],
        "prompts": len(prompts),
        "same": same,
    }


def in_a_process(measure: str, args: argparse.Namespace) -> dict:
    """What --measure prints, and the time of the whole process as `seconds`."""
    command = [
        sys.executable,
        __file__,
        args.model,
        args.data,
        "--every",
        str(args.every),
        "--measure",
        measure,
    ]
    command += ["--repeats", str(args.repeats), "--device", args.device]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"measuring {measure} failed with exit code {done.returncode}")
    return {"seconds": time.perf_counter() - start, **json.loads(done.stdout)}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f}) s"


def report(args: argparse.Namespace) -> None:
    bound, found = in_a_process("limit", args), {way: [] for way in args.ways}
    counted = "{pairs:,} pairs, {tokens:,} tokens; {prefixes:,} distinct prefixes, {contexts:,} to predict from"
    print(counted.format(**bound))
    print(
        "matrix products: float32 {gflops_float32:.0f}, {fast} {gflops_fast:.0f} GFLOP/s".format(
            **bound
        )
    )
    for repeat in range(args.repeats):
        for way in args.ways:
            found[way].append(in_a_process(way, args))
            print(
                f"{repeat + 1}/{args.repeats} {way}: {found[way][-1]['seconds']:.2f} s",
                file=sys.stderr,
            )
    seconds = {way: [run["seconds"] for run in runs] for way, runs in found.items()}
    base = statistics.median(seconds[args.ways[0]])
    base_work = statistics.median(run["work"] for run in found[args.ways[0]])
    for way in args.ways:
        middle = statistics.median(seconds[way])
        share = ""
        if way in bound and args.device == "cpu":  # on a GPU choose may score all in float32
            share = f"; limit {bound[way]:.1f} s, {bound[way] / middle:.0%} of it reached"
        print(f"{way:8}{spread(seconds[way])}, ratio {base / middle:.2f}{share}")
        work = statistics.median(run["work"] for run in found[way])
        print(f"        without starting up {work:.2f} s, ratio {base_work / work:.2f}")
        first, own = found[args.ways[0]][0], found[way][0]
        other = [
            m
            for a, b, m in zip(first["choices"], own["choices"], first["margins"], strict=True)
            if a != b
        ]
        print(
            f"        {own.get('precision') or 'float32'}; {len(other)} other decisions, at margins {other[:5]}"
        )
    texts = in_a_process("generation", args)
    ratio = statistics.median(texts["loop"]) / statistics.median(texts["ours"])
    print(
        f"generate: one at a time {spread(texts['loop'])}, together {spread(texts['ours'])}, ratio {ratio:.1f}"
    )
    print(f"          {texts['same']} of {texts['prompts']} texts are the same")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("data", help="folder with BLiMP's .jsonl files")
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often each way is measured (default 3)"
    )
    parser.add_argument("--every", type=int, default=1, help="only every n-th pair")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        help="compared with the first (default: all)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--measure", choices=[*WAYS, "limit", "generation"], help="one thing, here, printed as JSON"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        if args.measure:
            print(json.dumps(measured(args)))
        else:
            report(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
