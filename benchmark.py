"""Compare language models on a suite of tasks.

The tasks measure completion, consistency, repetition and speed, or compare candidates: minimal
pairs, multiple choice and BabyLM's zero-shot tasks. Nothing is trained or downloaded.

    python benchmark.py models/quickstart
    python benchmark.py models/A models/B models/C --output comparison.json
    python benchmark.py models/A/chck_* --benchmark-config blimp.yaml --output learning.json
    python benchmark.py models/A --benchmark-config custom_benchmarks.yaml --tasks blimp,ewok

If there are several models, each is compared with the first. Runs that differ only in the seed are
also compared as a group, by their mean and standard deviation. Next to the JSON file the script
writes a bar chart (.png) and a page (.html) with the same name. For BabyLM's tasks it also writes
results/.../predictions.json, in the layout that BabyLM's pipeline expects. If the models are the
checkpoints of a run, the page shows their learning curve, and there is a picture with one curve for
each phenomenon of BLiMP.

The default tasks are in config/benchmark.yaml. A file for --benchmark-config looks like this. Its
paths are relative to the working directory, and TASK: {} selects the built-in items:

    tasks:
      completion: {}
      my_pairs: {type: minimal_pairs, path: data/synthetic/minimal_pairs.jsonl}
      blimp: {path: evaluation_data/full_eval/blimp_filtered}

Every text is scored after BOS; if the tokenizer has neither BOS nor EOS, the first token of a text
has no score. babyllama/evaluation/grading.py defines accuracies, intervals and the overall score.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import re
import shlex
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import babyllama  # noqa: F401  before numpy, because it names a package that is missing

# isort: split
import numpy as np

from babyllama import cli
from babyllama.evaluation import grading, metrics
from babyllama.evaluation.benchmark_config import BenchmarkTask, load_tasks
from babyllama.evaluation.model_names import in_training_order, prediction_folders, short_names
from babyllama.evaluation.seed_groups import seed_groups
from babyllama.evaluation.tasks import TASKS
from babyllama.files import check_results_file, describe_environment, read_json, utc_now, write_json
from babyllama.model_dir import weights_sha256
from babyllama.runs.finished_run import (
    describe_run,
    read_metrics,
    run_of_checkpoint,
    scores_of,
    seed_and_config,
)

log = logging.getLogger(__name__)


class BenchmarkSuite:
    """Run benchmark tasks on one model directory.

    `tasks` comes from `load_tasks`; the default is config/benchmark.yaml. `seed` determines samples
    and bootstrap intervals. `scores` keeps what a comparison of models needs from each task: the
    scores of all candidates, or of all groups of prompts.

    The default device is "cuda", which warns and falls back on a machine without a GPU; "auto"
    picks the best device without a warning.
    """

    def __init__(
        self,
        model_path: str | Path,
        device: str = "cuda",
        tasks: dict[str, BenchmarkTask] | None = None,
        seed: int = 0,
    ):
        from babyllama.evaluation.loading import context_length, load_model

        self.model_path = Path(model_path)
        self.seed = seed
        self.tasks = load_tasks() if tasks is None else tasks
        self.model, self.tokenizer = load_model(model_path, device)
        self.device = self.model.device
        self.context = context_length(self.model)
        self.scores: dict[str, np.ndarray] = {}

    def run_completion_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Measure how often the model prefers the right continuation of a prompt, or writes it.

        `completion_accuracy` is the share of prompts whose right continuation is more likely than
        the wrong ones. `generation_accuracy` is the share of greedy texts that begin with it.
        """
        task = task or self._first_task("completion")
        result = self.run_items(task)

        # generate two tokens more than the longest answer needs
        answers = [item.completions[item.gold].strip() for item in task.items]
        answer_ids = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        prompts = [item.prefixes[0] for item in task.items]
        texts = self._generate(prompts, max_new_tokens=max(map(len, answer_ids)) + 2, temperature=0)
        hits = [begins_with(text, answer) for text, answer in zip(texts, answers, strict=True)]
        hit_rate = sum(hits) / len(hits)

        correct = result.pop("correct")
        return {
            **result,
            "metric": "completion_accuracy",
            "completion_accuracy": result["accuracy"],
            "completion_accuracy_ci95": result["accuracy_ci95"],
            "completion_correct": correct,
            "completion_total": result["n"],
            "generation_accuracy": hit_rate,
            "generation_accuracy_ci95": metrics.wilson(hit_rate, len(hits)),
        }

    def run_consistency_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Measure if paraphrased prompts get the same greedy continuation.

        The score of a group is the word overlap between the continuations of two of its prompts,
        averaged over all pairs. A model that only looks at the last words would do well too, so
        each group has a control: a prompt with the same last words and another meaning. `chance` is
        the mean overlap with the continuation of the control.
        """
        task = task or self._first_task("consistency")
        groups = task.options["groups"]
        prompts = []
        for group in groups:
            prompts += [*group["prompts"], group["control"]]
        texts = iter(  # in the order of the prompts
            self._generate(prompts, max_new_tokens=task.options["max_new_tokens"], temperature=0)
        )

        # overlap within each group, and with the continuation of its control
        scores = []
        controls = []
        for group in groups:
            continuations = [next(texts).lower().split() for _ in group["prompts"]]
            control = next(texts).lower().split()
            pairs = combinations(continuations, 2)
            scores.append(statistics.mean(metrics.word_overlap(a, b) for a, b in pairs))
            controls.append(
                statistics.mean(metrics.word_overlap(text, control) for text in continuations)
            )

        gains = np.array(scores) - controls
        chance = statistics.mean(controls)
        self.scores[task.name] = gains  # models are compared by how far they exceed chance
        same_ending = {"score": chance, **grading.compare_means(gains, self.seed)}
        return {
            "metric": "avg_consistency_score",
            **self._mean_over_groups("avg_consistency_score", scores),
            "consistency_scores": scores,
            "chance": chance,
            "baselines": {"same ending": same_ending},
        }

    def run_repetition_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Measure the share of 4-grams in long sampled texts that repeat an earlier one."""
        task = task or self._first_task("repetition")
        prompts = task.options["prompts"]
        options = {key: task.options[key] for key in ("max_new_tokens", "temperature", "top_p")}
        texts = self._generate(prompts, seed=self.seed, **options)
        words = [text.split() for text in texts]
        # a text of fewer than four words has no 4-gram, so it repeats none
        scores = [metrics.ngram_repetition(text) if len(text) >= 4 else 0.0 for text in words]
        self.scores[task.name] = np.array(scores)
        samples = zip(prompts[:3], texts[:3], strict=True)
        return {
            "metric": "avg_repetition_score",
            **self._mean_over_groups("avg_repetition_score", scores),
            "repetition_scores": scores,
            "avg_words": statistics.mean(map(len, words)),
            "short_texts": sum(len(text) < 4 for text in words),
            "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
        }

    def run_speed_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Time greedy generation for each batch size, as the median of `repeats` runs.

        `tokens_per_second` is the number of generated tokens divided by the full time.
        `first_token_ms` is the time until each text has its first token, and `latency_ms` the time
        between two tokens of a text. The result has the figures of the first batch size, and
        `batches` those of all sizes.
        """
        from babyllama.evaluation.speed import time_generation

        task = task or self._first_task("speed")
        batches = time_generation(self.model, self.tokenizer, **task.options)
        n = task.options["repeats"]
        return {"metric": "tokens_per_second", **batches[0], "n": n, "batches": batches}

    def run_items(self, task: BenchmarkTask) -> dict[str, Any]:
        """Score every candidate of a task, and compare the result with trivial baselines."""
        from babyllama.evaluation.candidates import score_task

        scores, baselines, precision = score_task(
            self.model, self.tokenizer, task.type, task.items, self._unigram
        )
        self.scores[task.name] = scores
        result = grading.score_items(task.type, task.items, scores, self.seed)
        result["precision"] = precision
        return result | grading.compare_to_baselines(
            task.type, task.items, result, scores, baselines, self.seed
        )

    def run_task(self, name: str) -> dict[str, Any]:
        """Run one declared task."""
        task = self.tasks[name]
        methods = {
            "completion": self.run_completion_benchmark,
            "consistency": self.run_consistency_benchmark,
            "repetition": self.run_repetition_benchmark,
            "speed": self.run_speed_benchmark,
        }
        start = time.perf_counter()
        result = methods.get(task.type, self.run_items)(task)
        result["seconds"] = time.perf_counter() - start
        metric = result["metric"]
        log.info("  %s: %s %.4g (%.1f s)", name, metric, result[metric], result["seconds"])
        return result

    def run_all_benchmarks(self) -> dict[str, Any]:
        """Run every declared task; add `overall_score` with its parts.

        If the tasks fill two or more columns of BabyLM's leaderboard, `babylm_2026` has the overall
        score of 2026, the columns and the names of those that are missing.
        """
        results = {name: self.run_task(name) for name in self.tasks}
        types = {name: task.type for name, task in self.tasks.items()}
        columns = grading.leaderboard_columns(types, results)
        summary = grading.overall_score(results, self.seed)
        if len(columns) > 1:
            summary["babylm_2026"] = grading.overall_2026(columns)
        return {**results, **summary}

    def _first_task(self, task_type: str) -> BenchmarkTask:
        """Return the first declared task of a type, or the built-in one."""
        for task in self.tasks.values():
            if task.type == task_type:
                return task
        return load_tasks({"tasks": {task_type: {}}})[task_type]

    def _generate(self, prompts: list[str], **options) -> list[str]:
        from babyllama.evaluation.generation import generate

        return [texts[0] for texts in generate(self.model, self.tokenizer, prompts, **options)]

    def _mean_over_groups(self, name: str, scores: list[float]) -> dict[str, Any]:
        mean = metrics.mean_over_groups(name, np.array(scores)[:, None], self.seed)
        return {**mean, "n": len(scores), "interval": "bootstrap by group"}

    @functools.cached_property
    def _unigram(self) -> np.ndarray | None:
        from babyllama.evaluation.candidates import unigram_table

        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        return unigram_table(self.model_path, self.tokenizer, vocab_size)


def begins_with(text: str, answer: str) -> bool:
    """Return True if a text starts with the words of the answer, ignoring case."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


# ---- comparing models ---------------------------------------------------------------------------


def measure_models(
    args: argparse.Namespace, tasks: dict[str, BenchmarkTask], output: Path
) -> tuple[dict, list[Path]]:
    """Measure every model; return the results document and the files that were written last.

    The files are rewritten after each model, so a run that stops early keeps what it has measured.
    A model that fails gets an entry under `failed`, and the others continue.
    """
    from babyllama.evaluation import report

    document = new_document(args, tasks)
    folders = prediction_folders(args.models)
    scores: dict[str, dict] = {}  # by model and task
    written: list[Path] = []
    for path, name in zip(args.models, short_names(args.models), strict=True):
        log.info("%s", name)
        try:
            prediction_folder = output.parent / "results" / folders[path]
            # only models that succeeded have scores; the first of them is the reference
            results, record, scores[name] = measure_model(path, args, tasks, prediction_folder)
            add_model(document, name, results, record, compare_with_first(tasks, scores, args.seed))
        except Exception as error:  # whatever is wrong with this model, keep the other results
            log.debug("%s", path, exc_info=True)
            message = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, ValueError | OSError):
                message = f"{type(error).__name__}: {message}"
            document["failed"][name] = message
            cli.print_error(ValueError(f"{name}: {message}"))
        gc.collect()  # free the memory of this model before the next one is loaded

        if document["results"]:
            written = report.write_files(document, output)
    return document, written


def measure_model(
    path: str, args: argparse.Namespace, tasks: dict[str, BenchmarkTask], prediction_folder: Path
) -> tuple[dict, dict, dict]:
    """Run all tasks on a model; return its results, its record and its scores by task."""
    suite = BenchmarkSuite(path, args.device, tasks, args.seed)
    results = suite.run_all_benchmarks()
    record = describe_model(suite)
    if write_predictions(suite, prediction_folder):
        log.info("  predictions: %s", prediction_folder)
    return results, record, suite.scores


def new_document(args: argparse.Namespace, tasks: dict[str, BenchmarkTask]) -> dict[str, Any]:
    """Return the results document without a model."""
    environment = describe_environment(args.device)
    counts = {name: {"original": task.n, "effective": task.n} for name, task in tasks.items()}
    return {
        "results": {},
        "comparison": {},
        "models": {},
        "failed": {},
        "notes": [],
        "config": {
            "models": args.models,
            "benchmark_config": args.benchmark_config,
            "device": args.device,
            "seed": args.seed,
        },
        "configs": {name: task.describe() for name, task in tasks.items()},
        "versions": dict.fromkeys(tasks, 1),
        "n-samples": counts,
        "date": utc_now(),
        "git_hash": environment.pop("git_hash"),
        "environment": environment,
    }


def add_model(
    document: dict, name: str, results: dict, record: dict, differences: dict | None
) -> None:
    """Add a model's results, and its differences from the first model, to the document."""
    for other, other_record in document["models"].items():
        if other_record["weights_sha256"] == record["weights_sha256"]:
            document["notes"].append(f"{name} and {other} have the same weights")
    if differences is not None:
        document["comparison"].setdefault("differences", {})[name] = differences
        document["comparison"]["reference"] = next(iter(document["results"]))
    document["results"][name] = results
    document["models"][name] = record
    document["seed_groups"] = seed_groups(document)


def compare_with_first(
    tasks: dict[str, BenchmarkTask], scores: dict[str, dict], seed: int
) -> dict[str, Any] | None:
    """Return how much better the last model is than the first on each task; None for the first."""
    if len(scores) == 1:
        return None
    reference = next(iter(scores.values()))
    last = scores[next(reversed(scores))]
    differences = {}
    for name, task_scores in last.items():
        task = tasks[name]
        if task.items:
            differences[name] = grading.compare(
                task.type, task.items, task_scores, reference[name], seed
            )
        else:
            differences[name] = grading.compare_means(task_scores - reference[name], seed)
    return differences


def describe_model(suite: BenchmarkSuite) -> dict[str, Any]:
    """Describe a model: path, size, hash of the weights, and scores from its training."""
    from babyllama.evaluation.loading import has_start_token

    model_metrics = read_metrics(suite.model_path)
    run_dir = run_of_checkpoint(suite.model_path)
    run_metrics = read_metrics(run_dir) if run_dir else model_metrics
    return {
        "path": str(suite.model_path),
        "architecture": type(suite.model).__name__,
        "parameters": suite.model.num_parameters(),
        "vocab_size": len(suite.tokenizer),
        "context": suite.context,
        "bos": has_start_token(suite.tokenizer),
        "device": str(suite.device),
        "weights_sha256": weights_sha256(suite.model_path),
        "training": scores_of(model_metrics) if model_metrics else None,
        "trained": describe_run(run_metrics) if run_metrics else None,
        "run": seed_and_config(model_metrics) if model_metrics else None,
    }


def write_predictions(suite: BenchmarkSuite, folder: Path) -> int:
    """Write predictions.json of each BabyLM task into the folder of the model; return how many."""
    written = 0
    for name, task in suite.tasks.items():
        official = TASKS[task.type].official if task.type in TASKS else ""
        if not official or "path" not in task.options:
            continue
        task_folder = folder / "zero_shot" / "causal" / official
        if official != "reading":
            task_folder /= Path(task.options["path"]).stem
        predictions = grading.official_predictions(
            task.type, task.items, suite.scores[name], suite.seed
        )
        write_json(task_folder / "predictions.json", predictions)
        written += 1
    return written


def check_nothing_is_lost(output: Path, models: list[str], tasks: dict[str, BenchmarkTask]) -> None:
    """Raise ValueError if the file holds results of models or tasks that this run does not measure.

    Results cannot be added to the file, because a comparison needs the scores of all items.
    """
    if not output.is_file() or not output.stat().st_size:
        return
    earlier = read_json(output)
    lost = [task for task in earlier.get("configs", ()) if task not in tasks]
    if isinstance(earlier["results"], dict):
        lost += [model for model in earlier["results"] if model not in models]
    if lost:
        raise ValueError(
            f"{output} has results that this run would delete ({', '.join(lost)}); name another "
            "file with --output, or add --overwrite"
        )


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="benchmark.py", description="Benchmark models and compare them.")
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="model directories; the others are compared with the first",
    )
    add(
        "--output",
        metavar="FILE",
        help="the JSON file (default: MODEL/benchmark.json; several models: ./benchmark.json)",
    )
    add(
        "--benchmark-config",
        metavar="FILE",
        help="a YAML file of tasks (default: config/benchmark.yaml)",
    )
    add("--tasks", nargs="+", metavar="TASK", help="run only these of the declared tasks")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--seed", type=int, default=0, help="seed of samples and intervals (default 0)")
    add(
        "--overwrite",
        action="store_true",
        help="replace a file that has results of other tasks or models",
    )
    return parser


def select_tasks(config: str | None, names: list[str] | None) -> dict[str, BenchmarkTask]:
    """Return the declared tasks, or those named by --tasks (separated by spaces or commas)."""
    declared = load_tasks(config)
    if names is None:
        return declared
    selected = [name for name in ",".join(names).split(",") if name]
    if not selected:
        raise ValueError(f"--tasks is empty; declared: {', '.join(declared)}")
    for name in selected:
        if name not in declared:
            raise ValueError(f"--tasks {name}: not declared; declared: {', '.join(declared)}")
    return {name: declared[name] for name in selected}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = make_parser().parse_args(argv)
    cli.log_to_stderr("%(message)s")
    log.setLevel(logging.INFO)
    finished = f"{output_file(args)} holds the models that were finished, if any"
    return cli.run_script(lambda: run(args), interrupted=f"interrupted; {finished}")


def output_file(args: argparse.Namespace) -> Path:
    """Return --output, or benchmark.json in the directory of a single model, or else here."""
    if args.output:
        return Path(args.output)
    folder = Path(args.models[0])
    is_single = len(args.models) == 1 and folder.is_dir()
    return (folder if is_single else Path()) / "benchmark.json"


def run(args: argparse.Namespace) -> int:
    """Check the request, measure the models, print the report, and return the exit code."""
    # check everything before the first model is opened
    output = output_file(args)
    tasks = select_tasks(args.benchmark_config, args.tasks)
    cli.check_at_least(args, {"seed": 0})
    if output.suffix != ".json" or output.is_dir():
        raise ValueError(
            f"--output {output} is not a .json file; the page and the chart get its name"
        )
    args.models = in_training_order(args.models)
    names = short_names(args.models)  # raises ValueError if a model is named twice
    check_results_file(output, "--output")
    if not args.overwrite:
        check_nothing_is_lost(output, names, tasks)

    # only now import torch, which takes seconds
    from babyllama.device import pick_device
    from babyllama.evaluation.report import text_report

    pick_device(args.device)  # raises ValueError for an unknown one

    document, written = measure_models(args, tasks, output)
    if document["results"]:
        print(text_report(document))
        print(f"\nresults: {', '.join(map(str, written))}")
        last = list(document["models"].values())[-1]["path"]
        command = ["python", "generate.py", last, "--prompt", "Once upon a time"]
        print(f"next  {shlex.join(command)}")
    return cli.EXIT_BAD_INPUT if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
