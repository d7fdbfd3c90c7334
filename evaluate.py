"""Measure one language model: perplexity, bits per byte, token probabilities, calibration, the quality of its samples.

It compares no models and knows no benchmark tasks (benchmark.py does), and it needs no network.

    python evaluate.py models/quickstart
    python evaluate.py models/quickstart --num-samples 1000 --output-path results.json --device cpu
    python evaluate.py models/quickstart --custom-prompts prompts.txt --temperature 0.8 --eval-data data/dev

How figures are defined. A text is scored with BOS in front, so each of its tokens has a probability (a tokenizer with
neither BOS nor EOS leaves the first one out); beyond the context windows slide by half of it. Rates are sums over all
texts divided by sums, so a long text counts for more; their intervals (`..._ci95`) resample the documents that the
texts are pieces of. An empty text has no token: it counts in `num_empty` alone. What cannot be computed (no text, one
document for an interval) is NaN, null in JSON.

Hugging Face has a package of this name. This file is not it: run tools that need that one from another directory.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from babyllama.data.documents import find_files, new_report, read_document_parts
from babyllama.files import nan_to_null

log = logging.getLogger(__name__)
LOW_CONFIDENCE = 0.1  # a prediction whose likeliest token has less probability than this
FEW_TEXTS, FEW_TOKENS, FEW_PROMPTS = (
    30,
    1000,
    30,
)  # below these the printed figures come with a note
SAMPLE_TOKENS = 40  # of one text, whose surprisal is drawn
PASSAGE_CHARS = 2000


def passages(text: str) -> Iterator[str]:
    """The text cut at line ends (else at a blank, else anywhere) into at most PASSAGE_CHARS characters each."""
    text = text.strip()
    while len(text) > PASSAGE_CHARS:
        cuts = (text.rfind(mark, 1, PASSAGE_CHARS) for mark in "\n ")
        at = next((cut for cut in cuts if cut > 0), PASSAGE_CHARS)
        yield text[:at].rstrip()
        text = text[at:].lstrip()
    if text:
        yield text


def _numbered_parts(path: Path, report: dict) -> Iterator[tuple[int, str]]:
    """Yield the parts of all held-out documents, each with the number of its document, from 1."""
    number = 0
    for file in find_files(path, "dev"):
        for parts in read_document_parts(file, report):
            number += 1
            for text in parts:
                yield number, text


def draw_passages(path: Path, count: int, seed: int) -> tuple[list[str], list[int], int]:
    """(`count` passages drawn evenly from all held-out documents, in their order; the number of the document that each
    is of; how many passages there are)."""
    if not path.exists():
        raise FileNotFoundError(
            f"no held-out text at {path}: name a file or a directory with --eval-data"
        )
    rng, kept, total, report = random.Random(seed), [], 0, new_report()
    for document, text in _numbered_parts(path, report):
        for passage in passages(text):
            place = (
                len(kept) if len(kept) < count else rng.randrange(total + 1)
            )  # reservoir sampling
            if place < count:
                kept[place : place + 1] = [(total, passage, document)]
            total += 1
    if not total:
        raise ValueError(f"{path} holds no text")
    if report["invalid_bytes"]:
        log.warning(
            "%d bytes not UTF-8, first at %s", report["invalid_bytes"], report["first_invalid"]
        )
    kept.sort()
    return [passage for _, passage, _ in kept], [document for _, _, document in kept], total


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"evaluate.{name} does not exist: this is BabyLlama's {__file__}, not Hugging Face's package of the same name; "
        "run the tool that needs the package from another directory"
    )


class ModelEvaluator:
    """The metrics of one model directory; `seed` settles samples and bootstrap."""

    def __init__(self, model_path: str | Path, device: str = "cuda", seed: int = 0):
        from babyllama.evaluation.loading import load_model

        self.model, self.tokenizer = load_model(model_path, device)
        self.device, self.seed = self.model.device, seed
        self.bos = not (self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None)
        self._scored: tuple = (None, [])

    def calculate_perplexity(
        self, texts: Sequence[str], batch_size: int = 8, documents: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Perplexity per token and word, nats per token, bits per UTF-8 byte; each with a 95 % interval.

        The interval resamples documents: `documents` tells of which each text is a piece (default: each is one), since
        pieces of the same are alike. A forward pass takes `batch_size` full contexts at most. `std_loss`, `min_loss`
        and `max_loss` are of the texts' own mean losses (nats per token); words are what whitespace separates.
        """
        import numpy as np

        from babyllama.evaluation import metrics
        from babyllama.evaluation.generation import decode

        documents = range(len(texts)) if documents is None else documents
        found = zip(texts, self._scores(texts, batch_size), documents, strict=True)
        scored, owners = [], []
        for text, scores, document in found:
            if len(scores.ids):
                scored.append((text, scores))
                owners.append(document)
        if not self.bos:  # the first token has no score, so it counts in no rate
            scored = [(decode(self.tokenizer, s.ids), s) for _, s in scored]
        rows = np.array(
            [[-s.logprobs.sum(), len(s.ids), len(t.encode()), len(t.split())] for t, s in scored]
        )
        rows = rows.reshape(-1, 4)  # nats, tokens, bytes, words of each text
        figures = metrics.perplexity_metrics(rows, owners, self.seed)
        losses = rows[:, 0] / rows[:, 1]
        spread = (
            {"std_loss": losses.std(), "min_loss": losses.min(), "max_loss": losses.max()}
            if scored
            else {}
        )
        return {
            **figures,
            "average_loss": figures["nats_per_token"],
            **{
                key: float(spread.get(key, math.nan))
                for key in ("std_loss", "min_loss", "max_loss")
            },
            "num_sequences": len(scored),
            "num_documents": len(set(owners)),
            "num_empty": len(texts) - len(scored),
            "total_tokens": int(rows[:, 1].sum()),
            "total_bytes": int(rows[:, 2].sum()),
            "total_words": int(rows[:, 3].sum()),
        }

    def evaluate_generation_quality(
        self, prompts: Sequence[str], max_length: int = 100, temperature: float = 0.8, top_p: float = 0.95,
        num_return_sequences: int = 3,
    ) -> dict[str, Any]:  # fmt: skip
        """Diversity and repetition of `num_return_sequences` continuations of each prompt, of `max_length` new tokens.

        Over words (split at whitespace): diversity is the mean over n = 1, 2, 3 of distinct n-grams per n-gram of one
        text; repetition the share of its 4-grams that occurred before (Welleck et al. 2020); distinct-n is over all
        texts together (Li et al. 2016); self-BLEU compares a text with the others of its prompt (Zhu et al. 2018), 1
        where they are the same. A text too short for a figure does not count in it.
        """
        import numpy as np

        from babyllama.evaluation import metrics
        from babyllama.evaluation.generation import generate

        _check_texts(prompts, "prompts")
        texts = generate(
            self.model, self.tokenizer, prompts, max_new_tokens=max_length, temperature=temperature, top_p=top_p,
            num_return_sequences=num_return_sequences, seed=self.seed,
        )  # fmt: skip
        words = [[text.split() for text in group] for group in texts]
        diversity = np.array([[metrics.ngram_diversity(text) for text in group] for group in words])
        repetition = np.array(
            [[metrics.ngram_repetition(text) for text in group] for group in words]
        )
        bleu = [metrics.self_bleu(group) for group in words]
        flat = [text for group in words for text in group]
        return {
            **metrics.mean_over_groups("avg_diversity_score", diversity, self.seed),
            **metrics.mean_over_groups("avg_repetition_score", repetition, self.seed),
            **metrics.mean_over_groups("self_bleu", np.array(bleu).reshape(-1, 1), self.seed),
            "distinct_1": metrics.distinct(flat, 1),
            "distinct_2": metrics.distinct(flat, 2),
            "avg_words": float(np.mean([len(text) for text in flat])) if flat else math.nan,
            "num_generations": len(flat),
            "num_empty_generations": sum(not text for text in flat),
            "diversity_scores": diversity.ravel().tolist(),
            "repetition_scores": repetition.ravel().tolist(),
            "generation_samples": [
                {"prompt": prompt, "generations": group}
                for prompt, group in zip(prompts, texts, strict=True)
            ],
        }

    def evaluate_token_probabilities(
        self, texts: Sequence[str], batch_size: int = 8
    ) -> dict[str, Any]:
        """The model's confidence, its entropy (nats), the rank of the true token, and calibration, over all tokens.

        `low_confidence_ratio`: share of places where the likeliest token has a probability below 0.1. Tokens of equal
        probability share the mean of their ranks, and a guess among k of them counts 1/k in `top1_accuracy`.
        `expected_calibration_error` is over 15 equal bins of the likeliest token's probability.
        """
        import numpy as np

        from babyllama.evaluation import metrics

        scores = self._scores(texts, batch_size)
        columns = ("logprobs", "top_probs", "entropies", "ranks", "hits")
        all_of = {
            name: np.concatenate([np.empty(0), *(getattr(s, name) for s in scores)])
            for name in columns
        }
        top, ranks, bits = all_of["top_probs"], all_of["ranks"], -all_of["logprobs"] / math.log(2)
        bins, error = metrics.calibration(top, all_of["hits"])
        counts, edges = np.histogram(
            bits[np.isfinite(bits)].clip(max=24), bins=np.arange(25)
        )  # the last: and above
        shown = next((s.ids[:SAMPLE_TOKENS] for s in scores if len(s.ids) > 1), [])
        shown_bits = next(
            (-s.logprobs[:SAMPLE_TOKENS] / math.log(2) for s in scores if len(s.ids) > 1),
            np.empty(0),
        )
        return {
            "avg_top_token_prob": metrics.mean(top),
            "std_top_token_prob": float(top.std()) if len(top) else math.nan,
            "avg_entropy": metrics.mean(all_of["entropies"]),
            "std_entropy": float(all_of["entropies"].std()) if len(top) else math.nan,
            "low_confidence_ratio": metrics.mean(
                np.where(np.isnan(top), top, top < LOW_CONFIDENCE)
            ),
            "top1_accuracy": metrics.mean(all_of["hits"]),
            "mean_rank": metrics.mean(ranks),
            "median_rank": float(np.median(ranks)) if len(ranks) else math.nan,
            "mean_reciprocal_rank": metrics.mean(1 / ranks),
            "expected_calibration_error": error,
            "num_tokens": len(top),
            "reliability": bins,
            "surprisal_histogram_bits": {"edges": edges.tolist(), "counts": counts.tolist()},
            "surprisal_sample": {
                "tokens": [self.tokenizer.decode([token]) for token in shown],
                "bits": shown_bits.tolist(),
            },
        }

    def plot_metrics(
        self, metrics: dict[str, Any], save_path: str | Path = "evaluation_plots.png"
    ) -> None:
        """Draw what `metrics` holds: the dict of one method, several merged, or a dict of such dicts."""
        from babyllama.plots import plot_evaluation

        Path(save_path).parent.mkdir(parents=True, exist_ok=True)
        plot_evaluation(metrics, Path(save_path))

    def _scores(self, texts: Sequence[str], batch_size: int) -> list:
        """TokenScores with statistics of each text; the last texts are remembered, so that two methods score once."""
        from babyllama.evaluation.loading import context_length
        from babyllama.evaluation.scoring import GPU_BATCH_TOKENS, token_logprobs

        _check_texts(texts, "texts")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more")
        what = (
            list(texts),
            [p._version for p in self.model.parameters()],
        )  # which change where weights are written
        if self._scored[0] != what:
            most = min(batch_size * context_length(self.model), GPU_BATCH_TOKENS)
            options = {"batch_tokens": most, "stats": True}
            self._scored = (
                what,
                token_logprobs(self.model, self.tokenizer, texts, bos=self.bos, **options),
            )
        return self._scored[1]


def _check_texts(texts: Sequence[str], name: str) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{name} must be a list of strings, not {type(texts).__name__} {str(texts)[:40]!r}"
        )


# ---- command line -------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        prompts = [
            line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; --custom-prompts takes a file of prompts"
        ) from None
    if not prompts:
        raise ValueError(f"{path} holds no prompt: one on each line is expected")
    return prompts


def notes(results: dict[str, dict]) -> list[str]:
    """What a reader should know before trusting the figures."""
    text, tokens, made = (
        results["perplexity"],
        results["token_probabilities"],
        results["generation"],
    )
    prompts, lines = len(made["generation_samples"]), []
    if text["num_documents"] < FEW_TEXTS:
        lines.append(
            f"the text figures rest on {text['num_documents']} documents only: their intervals are rough"
        )
    if tokens["num_tokens"] < FEW_TOKENS:
        lines.append(
            f"the token figures, calibration above all, rest on {tokens['num_tokens']} tokens only"
        )
    if prompts < FEW_PROMPTS:
        lines.append(
            f"the generation figures rest on {prompts} prompts only: their intervals are rough"
        )
    if not math.isfinite(text["nats_per_token"]):
        lines.append("the model's probabilities are not finite numbers: its weights are broken")
    return lines


TABLE = [
    ("perplexity", "nats_per_token", "loss, nats per token"),
    ("perplexity", "perplexity", "perplexity per token"),
    ("perplexity", "word_perplexity", "perplexity per word"),
    ("perplexity", "bits_per_byte", "bits per UTF-8 byte"),
    ("token_probabilities", "top1_accuracy", "share of tokens guessed right"),
    ("token_probabilities", "median_rank", "median rank of the token"),
    ("token_probabilities", "avg_top_token_prob", "mean probability of the guess"),
    ("token_probabilities", "avg_entropy", "entropy, nats"),
    ("token_probabilities", "expected_calibration_error", "calibration error"),
    ("generation", "avg_diversity_score", "diversity of a sample"),
    ("generation", "avg_repetition_score", "repetition in a sample"),
    ("generation", "distinct_2", "distinct-2 of all samples"),
    ("generation", "self_bleu", "self-BLEU, 0 to 1"),
]


def print_report(report: dict) -> None:
    config, counts = report["config"], report["n-samples"]
    print(
        f"{config['model']}: {config['parameters']:,} parameters, float32, {config['device']}, seed {config['seed']}"
    )
    print(f"text {config['eval_data']}: {counts['perplexity']['effective']:,} of {counts['perplexity']['original']:,} "
          f"passages, {report['results']['perplexity']['total_tokens']:,} tokens, "
          f"{report['results']['perplexity']['num_documents']:,} documents\n")  # fmt: skip
    print(f"{'':32}{'value':>10}   95 % interval")
    for group, key, label in TABLE:
        value, interval = report["results"][group][key], report["results"][group].get(f"{key}_ci95")
        between = (
            f"   {interval[0]:.4f} .. {interval[1]:.4f}"
            if interval and None not in interval
            else ""
        )
        print(f"{label:32}{'undefined' if value is None else format(value, '.4f'):>10}{between}")
    for sample in report["results"]["generation"]["generation_samples"][:3]:
        text = " ".join(f"{sample['prompt']}|{sample['generations'][0]}".split())
        print("\n> " + "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
    for line in report["notes"]:
        print(f"\nnote: {line}")


def run(args: argparse.Namespace) -> dict:
    """Read text and prompts, measure, and return the report in the shape of lm-evaluation-harness."""
    from babyllama.files import describe_environment, weights_sha256

    pass
    from babyllama.evaluation.loading import training_text_of

    model_path = Path(args.model)
    source = Path(args.eval_data) if args.eval_data else training_text_of(model_path, "eval_path")
    if source is None:
        raise ValueError(
            f"{model_path} does not say what its run held out: name text with --eval-data FILE_OR_DIR"
        )
    custom = read_prompts(Path(args.custom_prompts)) if args.custom_prompts else None
    texts, owners, total = draw_passages(source, args.num_samples, args.seed)
    prompts = custom or [
        " ".join(text.split()[:4]) for text in texts[:: max(1, len(texts) // 10)][:10]
    ]

    evaluator = ModelEvaluator(model_path, args.device, args.seed)
    results = {
        "perplexity": evaluator.calculate_perplexity(texts, args.batch_size, owners),
        "token_probabilities": evaluator.evaluate_token_probabilities(texts, args.batch_size),
        "generation": evaluator.evaluate_generation_quality(prompts, temperature=args.temperature),
    }
    undefined, environment, counts = (
        [],
        describe_environment(args.device),
        {"original": total, "effective": len(texts)},
    )
    config = {
        "model": str(model_path),
        "eval_data": str(source),
        "device": str(evaluator.device),
        "dtype": "float32",
    }
    config |= {
        "weights_sha256": weights_sha256(model_path),
        "parameters": evaluator.model.num_parameters(),
    }
    config |= {"bos": evaluator.bos, "passage_chars": PASSAGE_CHARS}
    config |= {key: getattr(args, key) for key in ("seed", "temperature", "batch_size")}
    return {
        "results": nan_to_null(results, "", undefined),
        "config": config,
        "versions": dict.fromkeys(results, 1),
        "n-samples": {
            **dict.fromkeys(("perplexity", "token_probabilities"), counts),
            "generation": {"original": len(prompts), "effective": len(prompts)},
        },
        "undefined": undefined,
        "notes": notes(results),
        "git_hash": environment.pop("git_hash"),
        "environment": environment,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Measure one language model on held-out text."
    )

    def add(name: str, **options) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **options)

    parser.add_argument("model", help="a model directory, e.g. models/quickstart")
    add(
        "num-samples",
        type=int,
        default=500,
        help="passages of held-out text to score (default 500)",
    )
    add(
        "output-path",
        metavar="FILE",
        help="the JSON file (default MODEL/evaluation_results.json), plots beside it",
    )
    add("device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add(
        "custom-prompts",
        metavar="FILE",
        help="prompts, one on a line (default: beginnings of ten passages)",
    )
    add(
        "temperature",
        type=float,
        default=0.8,
        help="of sampling; 0 takes the likeliest token (default 0.8)",
    )
    add(
        "eval-data",
        metavar="FILE_OR_DIR",
        help="held-out text (default: what the training run held out)",
    )
    add(
        "seed",
        type=int,
        default=0,
        help="of the choice of passages, the samples and the intervals (default 0)",
    )
    add(
        "batch-size",
        type=int,
        default=8,
        help="full contexts in a forward pass (default 8); fewer take less memory",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    try:
        for name, least in {"num_samples": 1, "batch_size": 1, "temperature": 0, "seed": 0}.items():
            if not least <= getattr(args, name) < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(args, name)} must be {least} or more"
                )
        output = Path(args.output_path or Path(args.model) / "evaluation_results.json")
        if output.is_dir():
            raise ValueError(f"--output-path {output} is a directory: name a file")
        from babyllama import plots
        from babyllama.files import check_results_file, write_json

        if not Path(args.model, "config.json").is_file():
            raise FileNotFoundError(
                f"no model at {args.model}: expected a directory with config.json and weights"
            )
        check_results_file(output, "--output-path")
        report = run(args)
        write_json(output, report)
        plots.plot_evaluation(
            report["results"], output.with_name("evaluation_plots.png"), args.model
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from babyllama.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory: a smaller --batch-size takes less, or another --device has more",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print_report(report)
    print(f"\nresults in {output}, pictures in {output.with_name('evaluation_plots.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
