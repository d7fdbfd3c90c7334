"""Measure one language model on held-out text.

    python evaluate.py models/quickstart
    python evaluate.py models/quickstart --num-samples 1000 --output-path results.json --device cpu
    python evaluate.py models/quickstart --custom-prompts prompts.txt --eval-data data/dev
    python evaluate.py models/quickstart --surprisal sentences.txt

The report has the perplexity, the probabilities of single tokens with their calibration, and the
diversity of generated samples. With --surprisal the script writes a table with the surprisal of
each word instead. To compare models or to run tasks, use benchmark.py.

Every text is scored after BOS, so that its first token has a probability too; that is not possible
if the tokenizer has neither BOS nor EOS. A text longer than the context is scored in windows that
overlap by half. A rate is a sum over all texts divided by another, so a long text weighs more than
a short one. Intervals (`..._ci95`) resample documents, because passages of one document are alike.
A figure that cannot be computed is NaN, which JSON writes as null.

Hugging Face has a package with the name of this script. Run tools that need that package from
another directory.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import babyllama  # noqa: F401  before numpy, because it names a package that is missing

# isort: split
import numpy as np

from babyllama.cli import Parser, check_at_least, log_to_stderr, run_script, significant
from babyllama.data.documents import new_report, read_documents
from babyllama.data.text_files import domain_of, find_files
from babyllama.evaluation import metrics, word_surprisal
from babyllama.files import (
    check_results_file,
    describe_environment,
    nan_to_null,
    read_utf8,
    write_json,
)
from babyllama.model_dir import check_model_exists, weights_sha256
from babyllama.runs.finished_run import read_metrics, scores_of, training_text_of

log = logging.getLogger(__name__)

LOW_CONFIDENCE = 0.1  # a prediction is unsure if no token has this probability
PASSAGE_CHARS = 2000
SAMPLE_TOKENS = 40  # tokens of one text whose surprisal is plotted
DEFAULT_PROMPTS = 10
# flags of the report, which --surprisal does not write
REPORT_FLAGS = ("num_samples", "temperature", "seed", "custom_prompts", "eval_data")
PROMPT_WORDS = 4
MAX_DOMAINS = 12  # that are printed
FEW_DOCUMENTS = 30  # with fewer of any of these, a note in the report warns about it
FEW_TOKENS = 1000
FEW_PROMPTS = 30


class ModelEvaluator:
    """Evaluate one model directory.

    `seed` determines samples and bootstrap intervals. The default device is "cuda", which warns and
    falls back on a machine without a GPU; "auto" does so without a warning.
    """

    def __init__(self, model_path: str | Path, device: str = "cuda", seed: int = 0):
        from babyllama.evaluation.loading import context_length, has_start_token, load_model

        self.model_path = Path(model_path)
        self.model, self.tokenizer = load_model(model_path, device)
        self.device = self.model.device
        self.seed = seed
        self.bos = has_start_token(self.tokenizer)
        self.context = context_length(self.model)
        self._cached_request: tuple | None = None
        self._cached_scores: list = []

    def calculate_perplexity(
        self,
        texts: Sequence[str],
        batch_size: int = 8,
        documents: Sequence[int] | None = None,
        domains: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Return perplexity per token and word, nats per token and bits per byte, with intervals.

        `documents` names the document that each text is from (default: each text is a document).
        Intervals resample documents, because texts of one document are alike. `std_loss`,
        `min_loss` and `max_loss` describe the mean losses of the texts, in nats per token. Words
        are separated by white space. A forward pass reads at most `batch_size` full contexts.
        `domains` names the domain that each text is from; if there are several, `by_domain` holds
        the figures of each. If bits per byte would change by a tenth or more without one
        document, `dominating_document` names it.
        """
        from babyllama.evaluation.generation import decode

        for name, labels in (("documents", documents), ("domains", domains)):
            if labels is not None and len(labels) != len(texts):
                raise ValueError(f"{name} has {len(labels)} entries for {len(texts)} texts")

        # count nats, tokens, bytes and words of each text
        rows = []
        for text, scores in zip(texts, self._score(texts, batch_size), strict=True):
            if not self.bos:  # the first token has no score, so do not count its bytes
                text = decode(self.tokenizer, scores.ids)
            nats = -scores.logprobs.sum()
            rows.append([nats, len(scores.ids), len(text.encode()), len(text.split())])
        rows = np.array(rows).reshape(-1, 4)

        # keep the texts that have a scored token
        is_scored = rows[:, 1] > 0
        rows = rows[is_scored]
        documents = np.array(range(len(texts)) if documents is None else documents)[is_scored]
        domains = np.array([""] * len(texts) if domains is None else domains)[is_scored]

        # the figures of all texts together, and of each domain
        figures = metrics.perplexity_metrics(rows, documents, self.seed)
        by_domain = {}
        for domain in sorted(set(domains.tolist())):
            inside = domains == domain
            by_domain[domain] = metrics.perplexity_metrics(
                rows[inside], documents[inside], self.seed
            )

        losses = rows[:, 0] / rows[:, 1]  # nats per token of each text
        dominating = metrics.dominating_document(rows, documents)
        return {
            **figures,
            "average_loss": figures["nats_per_token"],
            "std_loss": metrics.std(losses),
            "min_loss": float(losses.min()) if len(losses) else math.nan,
            "max_loss": float(losses.max()) if len(losses) else math.nan,
            "num_sequences": len(rows),
            "num_empty": len(texts) - len(rows),
            **({"by_domain": by_domain} if len(by_domain) > 1 else {}),
            **({"dominating_document": dominating} if dominating else {}),
        }

    def evaluate_generation_quality(
        self,
        prompts: Sequence[str],
        max_length: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        num_return_sequences: int = 3,
    ) -> dict[str, Any]:
        """Return diversity and repetition of continuations of up to `max_length` new tokens.

        Words are separated by white space. The diversity of a text is the share of its n-grams that
        are distinct, averaged over n = 1, 2, 3. Repetition is the share of its 4-grams that have
        occurred before (Welleck et al. 2020). distinct-n is computed over all texts together (Li et
        al. 2016). Self-BLEU compares a text with the other texts of its prompt (Zhu et al. 2018); 1
        means that they are equal. A text that is too short for a figure is left out of its mean.
        """
        from babyllama.evaluation.generation import generate

        _check_strings(prompts, "prompts")
        texts = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_length,
            temperature=temperature,
            top_p=top_p,
            num_return_sequences=num_return_sequences,
            seed=self.seed,
        )

        # score each text, and compare the texts of a prompt with each other
        diversity = []
        repetition = []
        self_bleu = []
        all_words = []
        for group in texts:
            words = [text.split() for text in group]
            diversity.append([metrics.ngram_diversity(text) for text in words])
            repetition.append([metrics.ngram_repetition(text) for text in words])
            self_bleu.append([metrics.self_bleu(words)])
            all_words += words

        def mean(name: str, scores: list[list[float]]) -> dict[str, Any]:
            return metrics.mean_over_groups(name, np.array(scores), self.seed)

        return {
            **mean("avg_diversity_score", diversity),
            **mean("avg_repetition_score", repetition),
            **mean("self_bleu", self_bleu),
            "distinct_1": metrics.distinct(all_words, 1),
            "distinct_2": metrics.distinct(all_words, 2),
            "avg_words": metrics.mean(np.array([len(text) for text in all_words])),
            "num_generations": len(all_words),
            "num_empty_generations": sum(not text for text in all_words),
            "diversity_scores": np.array(diversity).ravel().tolist(),
            "repetition_scores": np.array(repetition).ravel().tolist(),
            "generation_samples": [
                {"prompt": prompt, "generations": group}
                for prompt, group in zip(prompts, texts, strict=True)
            ],
        }

    def evaluate_token_probabilities(
        self, texts: Sequence[str], batch_size: int = 8
    ) -> dict[str, Any]:
        """Return confidence, entropy (nats), rank of the actual token, and calibration.

        `low_confidence_ratio` is the share of places where no token has a probability of 0.1 or
        more. Tokens with equal probability share their mean rank, and a tie of k tokens counts 1/k
        in `top1_accuracy`. `expected_calibration_error` uses 15 bins of equal width of the highest
        probability.
        """
        scores = self._score(texts, batch_size)

        # join the texts: one value per token, over all of them
        def column(name: str) -> np.ndarray:
            return np.concatenate([np.empty(0), *(getattr(text, name) for text in scores)])

        top_probs = column("top_probs")
        entropies = column("entropies")
        ranks = column("ranks")
        hits = column("hits")
        bits = -column("logprobs") / math.log(2)

        # comparisons with NaN are False, and a broken model must not seem sure of itself
        unsure = np.where(np.isnan(top_probs), math.nan, top_probs < LOW_CONFIDENCE)
        bins, calibration_error = metrics.calibration(top_probs, hits)

        # for the plots: a histogram of surprisal, with everything above 24 bits in its last bin,
        # and the surprisal along one text
        counts, edges = np.histogram(bits[np.isfinite(bits)].clip(max=24), bins=np.arange(25))
        sample_ids = []
        sample_bits = np.empty(0)
        for text in scores:
            if len(text.ids) > 1:
                sample_ids = text.ids[:SAMPLE_TOKENS]
                sample_bits = -text.logprobs[:SAMPLE_TOKENS] / math.log(2)
                break
        return {
            "avg_top_token_prob": metrics.mean(top_probs),
            "std_top_token_prob": metrics.std(top_probs),
            "avg_entropy": metrics.mean(entropies),
            "std_entropy": metrics.std(entropies),
            "low_confidence_ratio": metrics.mean(unsure),
            "top1_accuracy": metrics.mean(hits),
            "mean_rank": metrics.mean(ranks),
            "median_rank": float(np.median(ranks)) if len(ranks) else math.nan,
            "mean_reciprocal_rank": metrics.mean(1 / ranks),
            "expected_calibration_error": calibration_error,
            "num_tokens": len(top_probs),
            "reliability": bins,
            "surprisal_histogram_bits": {"edges": edges.tolist(), "counts": counts.tolist()},
            "surprisal_sample": {
                "tokens": [self.tokenizer.decode([token]) for token in sample_ids],
                "bits": sample_bits.tolist(),
            },
        }

    def word_surprisal(self, texts: Sequence[str], batch_size: int = 8) -> list[dict[str, Any]]:
        """Return a row for each word of each text, in order.

        The keys are `sentence` (the number of the text, from 1), `word`, `position` (in the text,
        from 1), `start` and `end` (text[start:end] is the word), `surprisal_bits` (the probability
        of the white space after the word counts for it, not for the next word),
        `uncorrected_bits` (the sum over its tokens), `entropy_bits` (of the prediction of its first
        token), `tokens`, and `log2_frequency` (log2 of the share of the word in the training text,
        counted once more than it occurs). The frequency is None if the model does not record its
        training text, or if that is gone. The formula is in evaluation/word_surprisal.py.
        """
        rows = word_surprisal.word_surprisal(
            self.model, self.tokenizer, texts, self._batch_tokens(texts, batch_size)
        )
        training_text = training_text_of(self.model_path, "train_path")
        frequencies: dict[str, float] = {}
        if training_text and training_text.exists():
            frequencies = word_surprisal.log2_frequencies(
                {row["word"] for row in rows}, training_text
            )
        return [{**row, "log2_frequency": frequencies.get(row["word"])} for row in rows]

    def plot_metrics(
        self, metrics: dict[str, Any], save_path: str | Path = "evaluation_plots.png"
    ) -> None:
        """Plot the result of one method, several results merged, or a dict of results."""
        from babyllama.plots import evaluation_panels, save_panels

        save_panels(evaluation_panels(metrics), Path(save_path), title="")

    def _score(self, texts: Sequence[str], batch_size: int) -> list:
        """Return TokenScores with statistics of each text.

        Perplexity and token probabilities need the same scores, so the last result is cached.
        """
        from babyllama.evaluation.scoring import token_logprobs

        batch_tokens = self._batch_tokens(texts, batch_size)
        # torch counts the in-place changes of a tensor in _version, so weights that changed in the
        # meantime are scored again
        request = (list(texts), [parameter._version for parameter in self.model.parameters()])
        if self._cached_request != request:
            self._cached_scores = token_logprobs(
                self.model,
                self.tokenizer,
                texts,
                bos=self.bos,
                batch_tokens=batch_tokens,
                stats=True,
            )
            self._cached_request = request
        return self._cached_scores

    def _batch_tokens(self, texts: Sequence[str], batch_size: int) -> int:
        """Check a request; return how many tokens a forward pass reads."""
        from babyllama.evaluation.scoring import GPU_BATCH_TOKENS

        _check_strings(texts, "texts")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more")
        return min(batch_size * self.context, GPU_BATCH_TOKENS)


def _check_strings(texts: Sequence[str], name: str) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        excerpt = str(texts)[:40]
        raise ValueError(
            f"{name} must be a list of strings, not {type(texts).__name__} {excerpt!r}"
        )


# ---- texts and prompts --------------------------------------------------------------------------


class DrawnPassages(NamedTuple):
    """Passages in the order of the text, with the document and the domain of each."""

    texts: list[str]
    documents: list[int]  # the number of the document, from 1
    domains: list[str]
    total: int  # the number of passages in the complete text


def draw_passages(path: Path, count: int, seed: int) -> DrawnPassages:
    """Draw `count` passages at random from the held-out text at `path`.

    Reservoir sampling gives every passage the same chance without holding the text in memory.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no held-out text at {path}: name a file or a directory with --eval-data"
        )
    rng = random.Random(seed)
    report = new_report()
    reservoir: list[tuple[int, str, int, str]] = []
    total = 0
    for document, domain, text in _document_texts(path, report):
        for passage in passages(text):
            # passage number n, from 0, enters with probability count / (n + 1), in a random place
            place = len(reservoir) if len(reservoir) < count else rng.randrange(total + 1)
            if place < count:
                # appends while the reservoir is not full, then replaces
                reservoir[place : place + 1] = [(total, passage, document, domain)]
            total += 1
    if not total:
        raise ValueError(f"{path} contains no text")
    if report["invalid_bytes"]:
        log.warning(
            "%d bytes are not UTF-8, the first at %s",
            report["invalid_bytes"],
            report["first_invalid"],
        )
    reservoir.sort()
    _, texts, documents, domains = map(list, zip(*reservoir, strict=True))
    return DrawnPassages(texts, documents, domains, total)


def _document_texts(path: Path, report: dict) -> Iterator[tuple[int, str, str]]:
    """Yield the held-out text in parts, each with the number and the domain of its document."""
    document = 0
    for file in find_files(path, "dev"):
        domain = domain_of(file)
        for parts in read_documents(file, report):
            document += 1
            for text in parts:
                yield document, domain, text


def passages(text: str) -> Iterator[str]:
    """Cut a text into passages of at most PASSAGE_CHARS, at a line end or a space if possible."""
    text = text.strip()
    while len(text) > PASSAGE_CHARS:
        cut = text.rfind("\n", 1, PASSAGE_CHARS)
        if cut < 0:
            cut = text.rfind(" ", 1, PASSAGE_CHARS)
        if cut < 0:
            cut = PASSAGE_CHARS
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file that are not empty."""
    text = read_utf8(path, "--custom-prompts takes a file of prompts")
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} contains no prompt: expected one per line")
    return prompts


def first_words(texts: Sequence[str]) -> list[str]:
    """Return the first words of ten texts, evenly spaced, as prompts."""
    texts = texts[:: max(1, len(texts) // DEFAULT_PROMPTS)][:DEFAULT_PROMPTS]
    return [" ".join(text.split()[:PROMPT_WORDS]) for text in texts]


# ---- report -------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the model; return a report with the top-level keys of lm-evaluation-harness."""
    # read text and prompts first, so that a wrong path is an error before the model is loaded
    model_path = Path(args.model)
    source = Path(args.eval_data) if args.eval_data else training_text_of(model_path, "eval_path")
    if source is None:
        raise ValueError(
            f"{model_path} does not record its held-out text: name text with --eval-data"
        )
    prompts = read_prompts(Path(args.custom_prompts)) if args.custom_prompts else None
    drawn = draw_passages(source, args.num_samples, args.seed)
    texts = drawn.texts
    prompts = prompts or first_words(texts)

    # measure
    evaluator = ModelEvaluator(model_path, args.device, args.seed)
    results = {
        "perplexity": evaluator.calculate_perplexity(
            texts, args.batch_size, drawn.documents, drawn.domains
        ),
        "token_probabilities": evaluator.evaluate_token_probabilities(texts, args.batch_size),
        "generation": evaluator.evaluate_generation_quality(prompts, temperature=args.temperature),
    }

    # the run's own scores, if they are of the same text
    run_metrics = None if args.eval_data else read_metrics(model_path)
    in_training = scores_of(run_metrics) if run_metrics else None

    undefined: list[str] = []  # the figures that are NaN
    environment = describe_environment(args.device)
    passage_counts = {"original": drawn.total, "effective": len(texts)}
    return {
        "results": nan_to_null(results, "", undefined),
        "config": {
            "model": str(model_path),
            "eval_data": str(source),
            "device": str(evaluator.device),
            "dtype": "float32",
            "weights_sha256": weights_sha256(model_path),
            "parameters": evaluator.model.num_parameters(),
            "bos": evaluator.bos,
            "passage_chars": PASSAGE_CHARS,
            "seed": args.seed,
            "temperature": args.temperature,
            "batch_size": args.batch_size,
        },
        "versions": dict.fromkeys(results, 1),
        "n-samples": {
            "perplexity": passage_counts,
            "token_probabilities": passage_counts,
            "generation": {"original": len(prompts), "effective": len(prompts)},
        },
        "undefined": undefined,
        "notes": [*notes(results), *notes_on_text(results["perplexity"], drawn, in_training)],
        "git_hash": environment.pop("git_hash"),
        "environment": environment,
    }


def notes(results: dict[str, dict]) -> Iterator[str]:
    """Yield a sentence for everything that makes the figures less reliable."""
    num_documents = results["perplexity"]["num_documents"]
    num_tokens = results["token_probabilities"]["num_tokens"]
    num_prompts = len(results["generation"]["generation_samples"])
    if num_documents < FEW_DOCUMENTS:
        yield f"only {num_documents} documents: the intervals of the text figures are rough"
    if num_tokens < FEW_TOKENS:
        yield f"only {num_tokens} tokens: the token figures are rough, above all calibration"
    if num_prompts < FEW_PROMPTS:
        yield f"only {num_prompts} prompts: the intervals of the generation figures are rough"
    if not math.isfinite(results["perplexity"]["nats_per_token"]):
        yield "the model's probabilities are not finite numbers: its weights are broken"


def notes_on_text(figures: dict, drawn: DrawnPassages, in_training: dict | None) -> Iterator[str]:
    """Yield what a reader must know of the text to compare bits per byte."""
    if dominating := figures.get("dominating_document"):
        number = drawn.documents.index(dominating["document"])
        start = " ".join(drawn.texts[number][:200].split())[:60]
        yield (
            f"one document has {dominating['share_of_loss']:.0%} of the loss; without it bits per "
            f"byte would be {significant(dominating['bits_per_byte_without'])}: document "
            f"{dominating['document']}, domain {drawn.domains[number]}: {start!r}"
        )
    if in_training:
        floor = in_training["floor_bits_per_byte"]  # None for natural text
        best = f"; compare that figure with the best possible, {floor:.4f}" if floor else ""
        yield (
            f"training measured {in_training['eval_bits_per_byte']:.4f} bits per byte on this text:"
            f" it reads chunks that cut documents, and counts the end of each document{best}"
        )


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
    """Print the model, the text, a table of figures with intervals, three samples and the notes."""
    config = report["config"]
    results = report["results"]
    counts = report["n-samples"]["perplexity"]
    print(
        f"{config['model']}: {config['parameters']:,} parameters, float32, {config['device']},"
        f" seed {config['seed']}"
    )
    print(
        f"text {config['eval_data']}: {counts['effective']:,} of {counts['original']:,} passages,"
        f" {results['perplexity']['total_tokens']:,} tokens,"
        f" {results['perplexity']['num_documents']:,} documents\n"
    )

    # the figures, and bits per byte for each domain too
    print(f"{'':32}{'value':>10}   95% interval")
    by_domain = results["perplexity"].get("by_domain", {})
    for group, key, label in TABLE:
        _print_figure(label, results[group], key)
        if key == "bits_per_byte":
            for domain in list(by_domain)[:MAX_DOMAINS]:
                _print_figure(f"  {domain}", by_domain[domain], key)
    if len(by_domain) > MAX_DOMAINS:
        print(f"\n{len(by_domain) - MAX_DOMAINS} more domains are in the results file")

    for sample in results["generation"]["generation_samples"][:3]:
        text = f"{sample['prompt']}|{sample['generations'][0]}"
        print(f"\n> {' '.join(text.split())}")
    for note in report["notes"]:
        print(f"\nnote: {note}")


def _print_figure(label: str, figures: dict, key: str) -> None:
    """Print a figure and its interval, which may be missing or unknown (None)."""
    value = figures[key]
    number = "undefined" if value is None else significant(value)
    low, high = figures.get(f"{key}_ci95") or (None, None)
    interval = ""
    if low is not None and high is not None:
        interval = f"   {significant(low)} .. {significant(high)}"
    print(f"{label:32}{number:>10}{interval}")


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="evaluate.py", description="Measure one language model on held-out text.")
    add = parser.add_argument
    add("model", help="a model directory, e.g. models/quickstart")
    add(
        "--num-samples",
        type=int,
        default=500,
        help="passages of held-out text to score (default 500)",
    )
    add(
        "--output-path",
        metavar="FILE",
        help="JSON file (default MODEL/evaluation_results.json), with the plots next to it; with "
        "--surprisal a CSV file (default MODEL/word_surprisal.csv)",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add(
        "--custom-prompts",
        metavar="FILE",
        help="prompts, one per line (default: the first words of ten passages)",
    )
    add(
        "--surprisal",
        metavar="FILE",
        help="only write a CSV row for each word of these sentences: one per line, or the column "
        "text or sentence of a .csv or .tsv file",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="temperature of sampling; 0 is greedy (default 0.8)",
    )
    add(
        "--eval-data",
        metavar="FILE_OR_DIR",
        help="held-out text (default: that of the training run)",
    )
    add("--seed", type=int, default=0, help="seed of passages, samples and intervals (default 0)")
    add(
        "--batch-size",
        type=int,
        default=8,
        help="full contexts in a forward pass (default 8); fewer take less memory",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log_to_stderr()
    return run_script(
        lambda: run(args), memory_advice="use a smaller --batch-size, or another --device"
    )


def run(args: argparse.Namespace) -> int:
    """Check the request, evaluate, write the JSON file and the plots, and print the report."""
    parser = make_parser()
    for name in REPORT_FLAGS:
        if args.surprisal and getattr(args, name) != parser.get_default(name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} does not go with --surprisal, which scores only its FILE")
    check_at_least(args, {"num_samples": 1, "batch_size": 1, "temperature": 0, "seed": 0})
    check_model_exists(Path(args.model))

    # choose the output, and check that it may be replaced before the model is loaded
    default_name = "word_surprisal.csv" if args.surprisal else "evaluation_results.json"
    output = Path(args.output_path or Path(args.model) / default_name)
    if output.is_dir():
        raise ValueError(f"--output-path {output} is a directory: name a file")
    if args.surprisal:
        return write_surprisal(args, output)
    check_results_file(output, "--output-path")

    report = evaluate(args)

    from babyllama.plots import evaluation_panels, save_panels

    plots = output.with_name("evaluation_plots.png")
    write_json(output, report)
    save_panels(evaluation_panels(report["results"]), plots, Path(args.model).resolve().name)
    print_report(report)
    print(f"\nresults in {output}, plots in {plots}")
    print(f"next  {shlex.join(['python', 'benchmark.py', args.model])}")
    return 0


def write_surprisal(args: argparse.Namespace, output: Path) -> int:
    """Write the CSV file of --surprisal and print a summary."""
    check_results_file(output, "--output-path", word_surprisal.holds_rows)
    sentences = word_surprisal.read_sentences(Path(args.surprisal))
    evaluator = ModelEvaluator(args.model, args.device)
    rows = evaluator.word_surprisal(sentences, args.batch_size)
    word_surprisal.write_rows(output, rows)

    bits = [row["surprisal_bits"] for row in rows if not math.isnan(row["surprisal_bits"])]
    n_sentences = len({row["sentence"] for row in rows})
    mean = f"{sum(bits) / len(bits):.3f}" if bits else "undefined"
    print(f"{n_sentences:,} sentences, {len(rows):,} words, mean surprisal {mean} bits per word")
    if len(bits) < len(rows):
        print(f"note: {len(rows) - len(bits):,} words have no surprisal")
    if rows[0]["log2_frequency"] is None:
        print("note: no frequencies, because the model's training text is not recorded or not here")
    print(f"rows in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
