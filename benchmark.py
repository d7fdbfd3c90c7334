"""Compare language models on a suite of tasks: completion, consistency, repetition, speed, minimal pairs, BabyLM's.

It trains nothing and downloads nothing. The items of the built-in tasks lie in config/benchmark.yaml.

    python benchmark.py models/quickstart
    python benchmark.py models/A models/B models/C --output comparison.json
    python benchmark.py models/A/chck_* --benchmark-config blimp.yaml --output learning.json
    python benchmark.py models/A --benchmark-config custom_benchmarks.yaml --tasks blimp,ewok --device cpu

Written: the JSON file, a bar chart (.png) and a page (.html) of the same name, and predictions.json of the BabyLM tasks
under results/ beside them, as BabyLM's pipeline lays them out. Several models are compared with the first one; of a
run's checkpoints the page has a learning curve, and a picture beside it one for each phenomenon of BLiMP.

A file for --benchmark-config (paths are seen from the working directory; TASK: {} takes the built-in items):

    tasks:
      completion: {}
      my_pairs: {type: minimal_pairs, path: data/synthetic/minimal_pairs.jsonl}
      blimp: {path: evaluation_data/full_eval/blimp_filtered}

How figures are defined. Texts are scored with BOS in front (a tokenizer with neither BOS nor EOS leaves out the first
token). grading.score_items defines accuracies and their intervals, grading.overall_score the overall score, of quality alone.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import logging
import os
import re
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.evaluation import grading, metrics, tasks
from babyllama.evaluation.benchmark_config import BenchmarkTask, load_tasks

log = logging.getLogger(__name__)
BY_GROUP = "bootstrap by group"
SPEED_PROMPT = "Once upon a time there was a little"


class BenchmarkSuite:
    """Benchmark tasks for one model directory: those of `load_tasks(...)`, or the built-in ones; seeded."""

    def __init__(
        self,
        model_path: str | Path,
        device: str = "cuda",
        tasks: dict[str, BenchmarkTask] | None = None,
        seed: int = 0,
    ):
        from babyllama.evaluation.loading import load_model

        self.model_path, self.seed = Path(model_path), seed
        self.tasks = load_tasks() if tasks is None else tasks
        self.model, self.tokenizer = load_model(model_path, device)
        self.device = self.model.device
        self.bos = not (self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None)
        self.scores: dict[
            str, Any
        ] = {}  # by task: what a comparison needs, scores of candidates or of groups

    def run_completion_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Which of several continuations of a prompt the model holds likeliest, and whether it writes the right one.

        `completion_accuracy` is by likelihood (chance is stated); `generation_accuracy` counts greedy texts that begin
        with the right answer.
        """
        from babyllama.evaluation.generation import generate

        task = task or self._declared("completion")
        result = self.run_items(task)
        answers = [item.completions[item.gold].strip() for item in task.items]
        longest = max(
            len(ids) for ids in self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        )
        prompts = [item.prefixes[0] for item in task.items]
        options = {"max_new_tokens": longest + 2, "temperature": 0}
        texts = [group[0] for group in generate(self.model, self.tokenizer, prompts, **options)]
        hits = [begins_with(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return {
            "metric": "completion_accuracy",
            "completion_accuracy": result["accuracy"],
            "completion_accuracy_ci95": result["accuracy_ci95"],
            "completion_correct": result["correct"],
            "completion_total": result["n"],
            "generation_accuracy": sum(hits) / len(hits),
            "generation_accuracy_ci95": metrics.wilson(sum(hits) / len(hits), len(hits)),
            **{key: value for key, value in result.items() if key not in ("metric", "correct")},
        }

    def run_consistency_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Whether prompts that say the same get the same greedy continuation.

        A group's score is the mean over its pairs of prompts of the `word_overlap` of their continuations. `chance` is
        the mean overlap with the continuation of the group's control, which says something else and ends in the same
        words: a model that sees no further back has no higher score than that.
        """
        from babyllama.evaluation.generation import generate

        task = task or self._declared("consistency")
        groups = [[*group["prompts"], group["control"]] for group in task.options["groups"]]
        options = {"max_new_tokens": task.options["max_new_tokens"], "temperature": 0}
        texts = iter(
            generate(self.model, self.tokenizer, [p for group in groups for p in group], **options)
        )
        words = [[next(texts)[0].lower().split() for _ in group] for group in groups]
        scores = [
            statistics.mean(metrics.word_overlap(a, b) for a, b in combinations(own[:-1], 2))
            for own in words
        ]
        controls = [
            statistics.mean(metrics.word_overlap(a, own[-1]) for a in own[:-1]) for own in words
        ]
        chance = statistics.mean(controls)
        return {
            "metric": "avg_consistency_score",
            **self._mean_of_groups(task, "avg_consistency_score", scores, less=controls),
            "consistency_scores": scores,
            "chance": chance,
            "baselines": {
                "same ending": {
                    "score": chance,
                    **grading.compare_means(np.array(scores) - controls, self.seed),
                }
            },
        }

    def run_repetition_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """The share of a long sampled text's 4-grams of words that stood in it before; 0 is none (lower is better)."""
        from babyllama.evaluation.generation import generate

        task = task or self._declared("repetition")
        options = {key: task.options[key] for key in ("max_new_tokens", "temperature", "top_p")}
        prompts = task.options["prompts"]
        texts = [
            group[0]
            for group in generate(self.model, self.tokenizer, prompts, seed=self.seed, **options)
        ]
        words = [text.split() for text in texts]
        scores = [metrics.ngram_repetition(text) if len(text) >= 4 else 0.0 for text in words]
        return {
            "metric": "avg_repetition_score",
            **self._mean_of_groups(task, "avg_repetition_score", scores),
            "repetition_scores": scores,
            "avg_words": statistics.mean(map(len, words)),
            "short_texts": sum(len(text) < 4 for text in words),
            "samples": [
                {"prompt": prompt, "text": text}
                for prompt, text in zip(prompts[:3], texts, strict=False)
            ],
        }

    def run_speed_benchmark(self, task: BenchmarkTask | None = None) -> dict[str, Any]:
        """Greedy generation, for each batch size: median of `repeats` runs after a warm-up run of the same size.

        tokens_per_second counts tokens that were generated, the wait for the first one included; latency_ms is the
        time between two tokens of a text, first_token_ms the time to the first. Beside `batches` stand the figures of
        the first batch size.
        """
        from babyllama.evaluation.loading import context_length, encode

        task = task or self._declared("speed")
        prompt = encode(self.tokenizer, [SPEED_PROMPT], self.bos)[0][:8]
        room = context_length(self.model) - len(prompt)
        steps = min(task.options["max_new_tokens"], room)
        batches = [
            self._time_batch(prompt, size, steps, task.options["repeats"])
            for size in task.options["batch_sizes"]
        ]
        return {
            "metric": "tokens_per_second",
            **batches[0],
            "n": task.options["repeats"],
            "batches": batches,
        }

    def run_all_benchmarks(self) -> dict[str, Any]:
        """Every declared task by name, then `overall_score` (None where no task measures quality) and its parts.

        `babylm_macro_average` stands beside them where two or more tasks are BabyLM's (tasks.macro_average).
        """
        results = {name: self.run_task(name) for name in self.tasks}
        average = grading.babylm_macro_average(
            {name: task.type for name, task in self.tasks.items()}, results
        )
        return {
            **results,
            **grading.overall_score(results, self.seed),
            **({} if average is None else {"babylm_macro_average": average}),
        }

    def run_task(self, name: str) -> dict[str, Any]:
        """The figures of one declared task."""
        task, started = self.tasks[name], time.perf_counter()
        own = {
            "completion": self.run_completion_benchmark, "consistency": self.run_consistency_benchmark,
            "repetition": self.run_repetition_benchmark, "speed": self.run_speed_benchmark,
        }  # fmt: skip
        result = own.get(task.type, self.run_items)(task)
        seconds = time.perf_counter() - started
        log.info(
            "  %s: %s %.4g (%.1f s)", name, result["metric"], result[result["metric"]], seconds
        )
        return {**result, "seconds": seconds}

    def run_items(self, task: BenchmarkTask) -> dict[str, Any]:
        """Score every candidate of every item in one call, and set the result beside trivial baselines."""
        from babyllama.evaluation import minimal_pairs

        wanted = (self.model, self.tokenizer, task.items, self.bos, self._unigram)
        if (
            tasks.TASKS[task.type].metric == "accuracy"
        ):  # so only the best candidate of each item counts
            scores, others, precision = minimal_pairs.score_choices(*wanted)
        else:
            (scores, others), precision = (
                minimal_pairs.score_candidates(*wanted),
                {"items": task.n, "float32_items": task.n},
            )
        self.scores[task.name] = scores
        result = grading.score_items(task.type, task.items, scores, self.seed) | {
            "precision": precision
        }
        return result | grading.compare_to_baselines(
            task.type, task.items, result, scores, others, self.seed
        )

    def _declared(self, kind: str) -> BenchmarkTask:
        """The first declared task of a type, else the built-in one."""
        return (
            next((t for t in self.tasks.values() if t.type == kind), None)
            or load_tasks({"tasks": {kind: {}}})[kind]
        )

    def _mean_of_groups(
        self, task: BenchmarkTask, key: str, scores: list[float], less: Any = 0.0
    ) -> dict[str, Any]:
        """The mean with its interval; models are compared by the scores `less` what is chance for each."""
        self.scores[task.name] = np.array(scores) - less
        return {
            **metrics.mean_over_groups(key, np.array([scores]).T, self.seed),
            "n": len(scores),
            "interval": BY_GROUP,
        }

    def _time_batch(
        self, prompt: list[int], size: int, steps: int, repeats: int
    ) -> dict[str, float]:
        import torch

        from babyllama.device import peak_memory_gb, reset_peak_memory
        from babyllama.evaluation.generation import generate_steps

        reset_peak_memory(self.device)
        timings = []
        for length in [min(8, steps)] + [steps] * repeats:  # the first one warms up
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            clock, made = [time.perf_counter()], 0
            for tokens in generate_steps(
                self.model, [prompt] * size, max_new_tokens=length, temperature=0
            ):
                made += sum(
                    token is not None for token in tokens
                )  # the tokens are here: the device has finished them
                clock.append(time.perf_counter())
            timings.append(
                (
                    made / (clock[-1] - clock[0]),
                    (clock[-1] - clock[1]) / max(1, steps - 1),
                    clock[1] - clock[0],
                )
            )
        rate, gap, first = (statistics.median(column) for column in zip(*timings[1:], strict=True))
        return {
            "batch_size": size, "tokens_per_second": rate, "latency_ms": 1000 * gap, "first_token_ms": 1000 * first,
            "generated_tokens": made, "memory_gb": peak_memory_gb(self.device),
        }  # fmt: skip

    @functools.cached_property
    def _unigram(self) -> np.ndarray | None:
        from babyllama.evaluation import minimal_pairs

        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        return minimal_pairs.unigram_table(self.model_path, self.tokenizer, vocab_size)


def begins_with(text: str, answer: str) -> bool:
    """Whether a generated text starts with the answer as whole words, upper or lower case."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def identify(suite: BenchmarkSuite) -> dict[str, Any]:
    """What was measured: path, size, and a digest of the weights (two names for the same model show)."""
    from babyllama.evaluation.loading import context_length
    from babyllama.files import weights_sha256
    from babyllama.training.run_dir import training_scores

    return {
        "path": str(suite.model_path), "architecture": type(suite.model).__name__,
        "parameters": suite.model.num_parameters(), "vocab_size": len(suite.tokenizer),
        "context": context_length(suite.model), "bos": suite.bos, "device": str(suite.device),
        "weights_sha256": weights_sha256(suite.model_path), "training": training_scores(suite.model_path),
    }  # fmt: skip


def write_predictions(suite: BenchmarkSuite, folder: Path) -> None:
    """predictions.json of each BabyLM task, in the folder of a model."""
    from babyllama.files import write_json

    for task in suite.tasks.values():
        official = tasks.TASKS[task.type].official if task.type in tasks.TASKS else ""
        if official and "path" in task.options:
            home = folder / "zero_shot" / "causal" / official
            home = home if official == "reading" else home / Path(task.options["path"]).stem
            home.mkdir(parents=True, exist_ok=True)
            write_json(
                home / "predictions.json",
                grading.official_predictions(task.type, task.items, suite.scores[task.name]),
            )


def run(
    args: argparse.Namespace, declared: dict[str, BenchmarkTask], output: Path
) -> tuple[dict, list[Path]]:
    """(what was found, files written anew after each model); a model that fails leaves a line in `failed`."""
    from babyllama.evaluation import report
    from babyllama.files import describe_environment

    environment, names = describe_environment(args.device), report.short_names(args.models)
    config = {key: getattr(args, key) for key in ("models", "benchmark_config", "device", "seed")}
    document = {
        "results": {}, "comparison": {}, "models": {}, "failed": {}, "notes": [], "config": config,
        "configs": {name: task.describe() for name, task in declared.items()},
        "versions": dict.fromkeys(declared, 1),
        "n-samples": {name: {"original": task.n, "effective": task.n} for name, task in declared.items()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_hash": environment.pop("git_hash"), "environment": environment,
    }  # fmt: skip
    scores: dict[str, dict] = {}
    written: list[Path] = []
    for path, name in zip(args.models, names, strict=True):
        suite = None
        log.info("%s", name)
        try:
            suite = BenchmarkSuite(path, args.device, declared, args.seed)
            results, facts = suite.run_all_benchmarks(), identify(suite)
            write_predictions(
                suite, output.parent / "results" / report.places_of(args.models)[path]
            )
            if first := next(iter(scores), None):
                gaps = report.differences(declared, suite.scores, scores[first], args.seed)
                document["comparison"].setdefault("differences", {})[name] = gaps
                document["comparison"]["reference"] = first
            for other, known in document["models"].items():
                if known["weights_sha256"] == facts["weights_sha256"]:
                    document["notes"].append(f"{name} and {other} have the same weights")
            document["results"][name], document["models"][name], scores[name] = (
                results,
                facts,
                suite.scores,
            )
        except (
            Exception
        ) as error:  # whatever is wrong with one model, the results of the others are kept
            log.debug("%s", path, exc_info=True)
            line = " ".join(str(error).split()) or type(error).__name__
            known = isinstance(error, ValueError | OSError)
            document["failed"][name] = line if known else f"{type(error).__name__}: {line}"
            print(f"error: {name}: {document['failed'][name]}", file=sys.stderr)
        if document["results"]:
            try:
                written = report.write_files(document, output)
            except OSError:  # nothing can be written there
                raise
            except (
                Exception
            ) as error:  # a figure that cannot be drawn costs no other model its results
                log.debug("report", exc_info=True)
                document["notes"].append(
                    f"after {name} the report could not be written whole: {error}"
                )
                written = []
        del suite
        gc.collect()
    return document, written


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description="Benchmark models and compare them."
    )

    def add(name: str, **options) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **options)

    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="model directories; the first is compared with"
    )
    add(
        "output",
        metavar="FILE",
        help="the JSON file (default: MODEL/benchmark.json; several models: ./benchmark.json)",
    )
    add(
        "benchmark-config",
        metavar="FILE",
        help="a YAML file of tasks (default: config/benchmark.yaml)",
    )
    add("tasks", nargs="+", metavar="TASK", help="only these of the declared tasks")
    add("device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("seed", type=int, default=0, help="of samples and bootstrap (default 0)")
    return parser


def chosen_tasks(config: str | None, names: list[str] | None) -> dict[str, BenchmarkTask]:
    """The declared tasks, or those of them that --tasks names (with blanks or commas between)."""
    declared = load_tasks(config)
    wanted = (
        list(declared)
        if names is None
        else [name for words in names for name in words.split(",") if name]
    )
    if not wanted:
        raise ValueError(f"--tasks: none named; there are {', '.join(declared)}")
    if unknown := [name for name in wanted if name not in declared]:
        raise ValueError(f"--tasks {unknown[0]}: not declared; there are {', '.join(declared)}")
    return {name: declared[name] for name in wanted}


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    alone = (
        Path(args.models[0]) if len(args.models) == 1 and os.path.isdir(args.models[0]) else Path()
    )
    output = Path(args.output or alone / "benchmark.json")
    try:
        declared = chosen_tasks(args.benchmark_config, args.tasks)
        if output.suffix != ".json" or output.is_dir():
            raise ValueError(
                f"--output {output}: name a .json file; the page and the chart get its name"
            )
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed} must be 0 or more")
        from babyllama.device import pick_device
        from babyllama.evaluation import report
        from babyllama.files import check_results_file

        check_results_file(output, "--output")

        pick_device(args.device)
        args.models = report.in_training_order(args.models)
        document, written = run(args, declared, output)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"interrupted; the models that had ended are in {output}, if any had", file=sys.stderr
        )
        return 130
    if document["results"]:
        print(report.text_report(document))
        print(
            f"\nresults in {', '.join(map(str, written))}"
            if written
            else "\nthe report is not whole: see the note"
        )
    return 2 if document["failed"] or not written else 0


if __name__ == "__main__":
    sys.exit(main())
