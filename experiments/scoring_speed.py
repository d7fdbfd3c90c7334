"""Time minimal pairs and generation beside the usual way of doing both.

    python experiments/scoring_speed.py models/llama-10M evaluation_data/blimp_filtered

Minimal pairs: `loop` is the usual way, written out here (files in order, 64 pairs at a time, the
good sentences in one padded forward pass and the bad ones in another, log-softmax of everything);
`choose` is candidates.score_task, which benchmark.py uses. Each runs in its own process, one
after the other, --repeats times, on --device. The time is that of the complete process; the time
without start-up is printed below it. Decisions are compared.

Generation: 64 prompts, 64 tokens each, greedy: Hugging Face's `generate` one prompt at a time, and
ours for all prompts together, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from common import run_child, seconds_of, spread, use_default_threads

from babyllama.cli import Parser, check_at_least, run_script

WAYS = ("loop", "choose")
BATCH = 64  # pairs
PROMPTS = 64
NEW_TOKENS = 64


def score_by_loop(args: argparse.Namespace) -> tuple[list[int], list[float], dict]:
    """Score the pairs the usual way.

    Returns for each pair the choice (0: good) and the difference of its summed log-probabilities,
    and an empty dict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.to(args.device).eval()
    pairs = []
    for file in sorted(Path(args.data).glob("*.jsonl")):
        pairs += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = pairs[:: args.every]

    def sums_of(sentences: list[str]) -> torch.Tensor:
        texts = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        rows = [[tokenizer.bos_token_id, *ids] for ids in texts]
        width = max(map(len, rows))
        padded = [row + [0] * (width - len(row)) for row in rows]
        lengths = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        ids = torch.tensor(padded, device=args.device)  # (B, T)
        mask = torch.tensor(lengths, device=args.device)
        with torch.no_grad():
            logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)  # (B, T, V)
        scores = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # (B, T - 1)
        return (scores * mask[:, 1:]).sum(1)

    margins = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        good = sums_of([pair["sentence_good"] for pair in batch])
        bad = sums_of([pair["sentence_bad"] for pair in batch])
        margins += (good - bad).tolist()
    return [int(margin < 0) for margin in margins], margins, {}


def score_by_ours(args: argparse.Namespace) -> tuple[list[int], list[float], dict]:
    """Score the pairs with babyllama; returns choices, differences and the number formats."""
    from babyllama.evaluation import candidates, grading, tasks
    from babyllama.evaluation.loading import load_model

    model, tokenizer = load_model(args.model, args.device)
    items = tasks.read_items("blimp", args.data)[:: args.every]
    scores, _, precision = candidates.score_task(model, tokenizer, "blimp", items)
    choices = grading.grade(items, scores).choice.tolist()
    return choices, (scores[::2] - scores[1::2]).tolist(), precision


def time_generation(args: argparse.Namespace) -> dict:
    """Return the seconds of both ways for each repeat, and how many texts are equal."""
    import torch
    from transformers.utils import logging

    from babyllama.evaluation import tasks
    from babyllama.evaluation.generation import decode, generate
    from babyllama.evaluation.loading import encode, load_model

    logging.set_verbosity_error()
    model, tokenizer = load_model(args.model, args.device)
    items = tasks.read_items("blimp", args.data)
    chosen = items[:: max(1, len(items) // PROMPTS)][:PROMPTS]
    beginnings = [" ".join(item.completions[0].split()[:4]) for item in chosen]
    prompts = encode(tokenizer, beginnings)
    texts: dict[str, list[str]] = {}

    def one_at_a_time() -> None:
        texts["loop"] = []
        for ids in prompts:
            prompt = torch.tensor([ids], device=args.device)
            output = model.generate(
                prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
            texts["loop"].append(decode(tokenizer, output[0, len(ids) :]))

    def together() -> None:
        outputs = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, temperature=0)
        texts["ours"] = [text for (text,) in outputs]

    together()  # warm-up
    seconds: dict[str, list[float]] = {"loop": [], "ours": []}
    for _ in range(args.repeats):
        seconds["loop"].append(seconds_of(one_at_a_time, args.device))
        seconds["ours"].append(seconds_of(together, args.device))
    same = sum(a == b for a, b in zip(texts["loop"], texts["ours"], strict=True))
    return {**seconds, "prompts": len(prompts), "same": same}


def measure(args: argparse.Namespace) -> dict:
    """Return the result of --measure; for a way of scoring, `work` is its time after start-up."""
    if args.measure == "loop":
        use_default_threads()
    import torch
    import transformers

    torch.zeros(1, device=args.device)
    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # imports them
    if args.measure == "generation":
        return time_generation(args)
    score = score_by_loop if args.measure == "loop" else score_by_ours
    start = time.perf_counter()
    choices, margins, precision = score(args)
    work = time.perf_counter() - start
    return {"choices": choices, "margins": margins, "precision": precision, "work": work}


def measure_in_child(args: argparse.Namespace, name: str) -> dict:
    """Return measure(name) of a new process, and the time of the process as `seconds`."""
    flags = {"--every": args.every, "--repeats": args.repeats, "--device": args.device}
    arguments = [args.model, args.data, "--measure", name]
    arguments += [str(part) for pair in flags.items() for part in pair]
    start = time.perf_counter()
    result = run_child(__file__, arguments)
    return {"seconds": time.perf_counter() - start, **result}


def print_way(way: str, runs: list[dict], base_runs: list[dict]) -> None:
    """Print the times of one way of scoring, and its decisions beside those of the loop."""
    seconds = [run["seconds"] for run in runs]
    median = statistics.median(seconds)
    base = statistics.median(run["seconds"] for run in base_runs)
    print(f"{way:8}{spread(seconds)} s, ratio {base / median:.2f}")

    work = statistics.median(run["work"] for run in runs)
    base_work = statistics.median(run["work"] for run in base_runs)
    print(f"        without start-up {work:.2f} s, ratio {base_work / work:.2f}")

    decisions = zip(
        base_runs[0]["choices"], runs[0]["choices"], base_runs[0]["margins"], strict=True
    )
    margins = [margin for a, b, margin in decisions if a != b]
    precision = runs[0]["precision"] or "float32"
    print(f"        {precision}; {len(margins)} other decisions, at margins {margins[:5]}")


def compare(args: argparse.Namespace) -> None:
    """Measure everything and print the table."""
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats):
        for way in WAYS:
            runs[way].append(measure_in_child(args, way))
            seconds = runs[way][-1]["seconds"]
            print(f"{repeat + 1}/{args.repeats} {way}: {seconds:.2f} s", file=sys.stderr)
    base_runs = runs["loop"]
    print(f"{len(base_runs[0]['choices']):,} pairs")
    for way in WAYS:
        print_way(way, runs[way], base_runs)

    texts = measure_in_child(args, "generation")
    ratio = statistics.median(texts["loop"]) / statistics.median(texts["ours"])
    print(
        f"generate: one at a time {spread(texts['loop'])} s, together {spread(texts['ours'])} s, "
        f"ratio {ratio:.1f}; {texts['same']} of {texts['prompts']} texts are equal"
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="model directory")
    add("data", help="directory of BLiMP's .jsonl files")
    add("--repeats", type=int, default=3, help="turns of each way (default 3)")
    add("--every", type=int, default=1, help="only every n-th pair")
    add("--device", default="cpu", help="cpu (default) or cuda")
    ways = [*WAYS, "generation"]
    add("--measure", choices=ways, help="measure one thing here and print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        check_at_least(args, {"repeats": 1, "every": 1})
        if args.measure:
            print(json.dumps(measure(args)))
        else:
            compare(args)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
