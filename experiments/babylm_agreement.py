"""Compare submit.py with BabyLM's own evaluation pipeline, on the same weights and data.

    python experiments/babylm_agreement.py models/babylm-strict-small --eval-data evaluation_data \\
        --official ../babylm-eval/strict --interpreter ../official/bin/python3 --output agreement

`--official` is the folder strict/ of a checkout of babylm-org/babylm-eval, `--interpreter` the
Python of an environment with its requirements (transformers 4.51.3). Each piece of work is done by
their pipeline and by submit.py in turn. With `--collate`, both programs collate and score the
predictions that `--output` holds, for example those that submit.py wrote.

Each program runs in one process, so the seconds do not include the start of a process for each task
and checkpoint, as in the shell scripts of the pipeline. CPU seconds count all threads. Fine-tuning
is without LoRA, which finds no layers in our models. Texts longer than the context would differ:
their pipeline does not cut them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np

import submit
from babyllama.cli import Parser, run_script
from babyllama.evaluation.tasks import TASKS
from babyllama.submission import collate, official
from babyllama.submission.form import read_run
from babyllama.submission.glue_tasks import GLUE_TASKS
from babyllama.submission.hub import lay_out_hub_cache

EVERY = 10  # items whose scores are compared; predictions are compared for all

# runs scripts of the official pipeline, one for each line of input; keeps the scores of zero-shot
# tasks, which they do not write, and asks age of acquisition only of the given checkpoints
WORKER = """
import contextlib, json, runpy, sys, time, torch
from evaluation_pipeline.AoA_word import eval_util
from evaluation_pipeline.sentence_zero_shot import compute_results
scores = {}
rank = compute_results.rank_and_evaluate
def rank_and_keep(args, stats, log_probs, sentences, labels, metadatas, uids, predictions):
    for uid, row in zip(uids, torch.stack(log_probs[1.0], dim=1).tolist()):
        scores.setdefault(uid, []).append(row)
    rank(args, stats, log_probs, sentences, labels, metadatas, uids, predictions)
compute_results.rank_and_evaluate = rank_and_keep
names = sys.argv[1:]
words = [int(name[5:-1]) * 10**6 for name in names]
eval_util.StepConfig.generate_checkpoint_steps = lambda self, track: (names, words)
answers = sys.stdout
for line in sys.stdin:
    module, *sys.argv[1:] = json.loads(line)
    scores.clear()
    started = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        runpy.run_module("evaluation_pipeline." + module, run_name="__main__")
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    print(json.dumps([*seconds, scores]), file=answers, flush=True)
"""

# scores a collated file by the functions of their calculate_results_from_pred.py, which asks for a
# file and keys of other names; GlobalPIQA by those of collate_preds.py. Their scorer counts rows of
# entity tracking with an answer "nothing", which their predictions do not have: it gets a copy
# without them
SCORES = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, "evaluation_pipeline")
import calculate_results_from_pred as scorer
import collate_preds
from transformers import AutoTokenizer
collated = json.loads(Path(sys.argv[1]).read_text())
data = Path(sys.argv[2])
scores = {
    "blimp": scorer._calculate_blimp_results(collated["blimp"], data / "blimp_filtered"),
    "supplement": scorer._calculate_blimp_results(
        collated["blimp_supplement"], data / "supplement_filtered"
    ),
    "ewok": scorer._calculate_ewok_results(collated["ewok"], data / "ewok_filtered"),
    "comps": scorer._calculate_comps_results(collated["comps"], data / "comps"),
}
for part in ("parallel", "nonparallel"):
    name = "global_piqa_" + part
    file = data / name / "eng_latn.jsonl"
    scores[name] = 100 * collate_preds._calculate_global_piqa_results(
        collated[name], file, name
    )[name]
with tempfile.TemporaryDirectory() as folder:
    for file in (data / "entity_tracking").glob("*.jsonl"):
        rows = [
            line
            for line in file.read_text().splitlines()
            if not any("nothing" in option for option in json.loads(line)["options"])
        ]
        Path(folder, file.name).write_text("\\n".join(rows))
    scores["entity_tracking"] = scorer._calculate_entity_tracking_results(
        collated["entity_tracking_filtered"], Path(folder)
    )
for name, content in collated["glue"].items():
    scores[name + " accuracy"] = scorer._calculate_glue_results(
        {name: content}, data / "glue_filtered"
    )
scores["glue accuracy"] = scorer._calculate_glue_results(collated["glue"], data / "glue_filtered")
if collated["aoa_surprisals"]:
    scores["aoa"] = 100 * scorer._calculate_aoa_results(
        collated["aoa_surprisals"],
        data / "aoa" / "cdi_human.csv",
        AutoTokenizer.from_pretrained(sys.argv[3]),
    )
pace, eyes = scorer._calculate_reading_results(
    collated["reading"], data / "reading" / "reading_data.csv"
)
print(json.dumps(scores | {"self_paced_reading": pace, "eye_tracking": eyes}))
"""


@dataclasses.dataclass
class Row:
    """Hold the comparison of one task; the checkpoints of a fast task are one row."""

    items: int = 0
    different: int | None = None
    score_difference: float = math.nan
    official_seconds: float = 0.0
    our_seconds: float = 0.0
    official_cpu_seconds: float = 0.0
    our_cpu_seconds: float = 0.0

    def add(self, other: Row) -> None:
        self.items += other.items
        if other.different is not None:
            self.different = (self.different or 0) + other.different
        self.score_difference = float(np.fmax(self.score_difference, other.score_difference))
        self.official_seconds += other.official_seconds
        self.our_seconds += other.our_seconds
        self.official_cpu_seconds += other.official_cpu_seconds
        self.our_cpu_seconds += other.our_cpu_seconds


class Comparison:
    """Run pieces of work by both programs and compare what they write."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.run_dir = Path(args.run).resolve()
        self.name = self.run_dir.stem
        self.output = Path(args.output).resolve()
        self.data = Path(args.eval_data).resolve()
        self.theirs = self.output / "official" / self.name  # results of the official pipeline
        self.ours = self.output / "results" / self.name  # as submit.py names it
        self.track = read_run(self.run_dir)["babylm"]["track"]
        self.needed = official.requirements(self.track)
        self.checkpoints = [
            self.run_dir / name
            for name in self.needed.checkpoints
            if (self.run_dir / name).is_dir()
        ]
        lay_out_hub_cache(self.run_dir, self.output / "hub", f"local/{self.name}")

        self.environment = common.USER_ENVIRONMENT | {
            "HF_HUB_CACHE": str(self.output / "hub"),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }

    def start_official(self) -> None:
        """Start the process that does the work of the official pipeline."""
        names = [path.name for path in self.checkpoints]
        self.log = (self.output / "official.log").open("w")
        self.worker = subprocess.Popen(
            [self.args.interpreter, "-c", WORKER, *names],
            cwd=self.args.official,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def run_official(self, command: list[str]) -> tuple[float, float, dict]:
        """Run a module of the pipeline; return seconds, CPU seconds and scores by subset."""
        self.worker.stdin.write(json.dumps(command) + "\n")
        self.worker.stdin.flush()
        answer = self.worker.stdout.readline()
        if not answer:
            raise ValueError(f"the official pipeline failed: see {self.log.name}")
        return json.loads(answer)

    def run_once(self, arguments: list[str]) -> tuple[float, str]:
        """Run a Python process of the official pipeline; return its seconds and its output."""
        started = time.perf_counter()
        child = subprocess.run(
            [self.args.interpreter, *arguments],
            cwd=self.args.official,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise ValueError(f"the official pipeline failed:\n{child.stderr[-2000:]}")
        return time.perf_counter() - started, child.stdout

    def jobs(self) -> Iterator[submit.Job]:
        """Yield the jobs of submit.py whose data exist, and all of age of acquisition as one."""
        flags = ["--eval-data", str(self.data), "--output", str(self.output)]
        if self.args.only:
            flags += ["--only", *self.args.only]
        args = submit.make_parser().parse_args([str(self.run_dir), *flags, "--device", "cpu"])
        args.stages = submit.select_stages(args)
        planned = submit.plan_jobs(args, self.ours, self.checkpoints, self.needed)
        ready = [job for job in planned if all(path.exists() for path in job.data)]
        acquisition = [job for job in ready if job.stage == "aoa"]

        def acquire() -> None:
            for job in acquisition:
                job.run()

        for job in ready:
            if job.stage != "aoa":
                yield job
            elif job is acquisition[-1]:
                yield dataclasses.replace(job, run=acquire)

    def compare(self, job: submit.Job) -> Row:
        """Do one job with both programs."""
        commands = {"aoa": self.acquisition, "glue": self.fine_tuning}
        command = commands.get(job.stage, self.zero_shot)(job)
        seconds, cpu_seconds, scores = self.run_official(command)
        row = Row(official_seconds=seconds, official_cpu_seconds=cpu_seconds)
        started = time.perf_counter(), time.process_time()
        job.run()
        row.our_seconds = time.perf_counter() - started[0]
        row.our_cpu_seconds = time.process_time() - started[1]

        our_file = job.outputs[0]
        their_file = self.theirs / our_file.relative_to(self.ours)
        our_content = json.loads(our_file.read_text())
        their_content = json.loads(their_file.read_text())
        if job.stage == "aoa":
            compare_rows(row, our_content["results"], their_content["results"], ("surprisal",))
            return row
        if our_content.keys() != their_content.keys():
            raise ValueError(f"{our_file} and {their_file} have different subsets")
        for key, value in our_content.items():
            rows = value["predictions"]
            compare_rows(row, rows, their_content[key]["predictions"], ("pred", "prev_pred"))
        if scores:
            row.score_difference = self.score_difference(job, scores)
        return row

    def zero_shot(self, job: submit.Job) -> list[str]:
        """Return the official module and options for a zero-shot task."""
        revision, task = job.name.split()
        options = ["--model_path_or_name", f"local/{self.name}", "--backend", "causal"]
        options += ["--data_path", str(job.data[0]), "--output_dir", str(self.theirs.parent)]
        options += ["--revision_name", revision]
        if task == "reading":
            return ["reading.run", *options]
        options += ["--task", TASKS[task].official, "--save_predictions"]
        return ["sentence_zero_shot.run", *options]

    def score_difference(self, job: submit.Job, official_scores: dict) -> float:
        """Return the largest difference of the scores of every EVERYth item, in nats."""
        from babyllama.evaluation.candidates import score_candidates

        revision, task = job.name.split()
        model = self.run_dir if revision == "main" else self.run_dir / revision
        lm, tokenizer = submit.open_model(model, "cpu")
        numbers: dict[str, int] = defaultdict(int)
        sample = []
        wanted: list[float] = []
        for item in collate.read_task(task, job.data[0]):
            key = item.key or item.subset
            if numbers[key] % EVERY == 0:
                sample.append(item)
                wanted += official_scores[key][numbers[key]]
            numbers[key] += 1
        scoring = TASKS[task].scoring
        scores, _ = score_candidates(lm, tokenizer, sample, scoring=scoring)
        return float(np.abs(scores - np.array(wanted)).max())

    def acquisition(self, job: submit.Job) -> list[str]:
        """Return the official module and options for age of acquisition."""
        options = ["--model_name", f"local/{self.name}", "--word_path", str(job.data[0])]
        return ["AoA_word.run", *options, "--output_dir", str(self.theirs.parent)]

    def fine_tuning(self, job: submit.Job) -> list[str]:
        """Return the official module for fine-tuning, with the settings of its shell script."""
        task = GLUE_TASKS[job.name]
        config = json.loads((self.run_dir / "config.json").read_text())
        length = min(task.max_length, config["max_position_embeddings"])
        options = ["--model_name_or_path", f"local/{self.name}", "--task", job.name]
        for name, path in zip(("train", "valid", "predict"), (*job.data, job.data[1]), strict=True):
            options += [f"--{name}_data", str(path)]
        options += ["--num_labels", str(task.labels), "--batch_size", str(task.batch_size)]
        options += ["--num_epochs", str(task.epochs), "--sequence_length", str(length)]
        options += ["--metrics", "accuracy", *(["f1", "mcc"] if task.labels == 2 else [])]
        options += ["--metric_for_valid", task.metric, "--padding_side", "left", "--take_final"]
        options += ["--no-lora", "--results_dir", str(self.theirs.parent)]
        return ["finetune.run", *options]

    def collate(self) -> None:
        """Let both programs collate and score the predictions of submit.py; print differences."""
        copy = self.output / "collated" / self.name  # their script writes into the folder it reads
        shutil.copytree(self.ours, copy, dirs_exist_ok=True)
        options = ["--model_path_or_name", self.name, "--backend", "causal", "--fast"]
        options += ["--track", self.track, "--fast_eval_dir", str(self.data / "fast_eval")]
        options += ["--results_dir", str(copy.parent)]
        seconds, _ = self.run_once(["-m", "evaluation_pipeline.collate_preds", *options])
        their_content = json.loads(official.collated_file(copy).read_text())
        started = time.perf_counter()
        content, problems = collate.collate(self.ours, self.data, self.needed)
        our_seconds = time.perf_counter() - started
        differences = list(find_differences(content, their_content))
        print(f"collate: official {seconds:.1f} s, ours {our_seconds:.1f} s")
        print(f"{len(differences)} differences, {len(problems)} problems by ours")
        for line in differences[:20] + problems[:20]:
            print(f"  {line}")

        file = official.collated_file(copy)
        arguments = ["-c", SCORES, str(file), str(self.data / "full_eval"), str(self.run_dir)]
        seconds, output = self.run_once(arguments)
        their_scores = json.loads(output.splitlines()[-1])
        started = time.perf_counter()
        scores = collate.score(their_content, self.data)
        our_seconds = time.perf_counter() - started
        print(f"score: official {seconds:.1f} s, ours {our_seconds:.1f} s")
        results = scores["results"]
        ours = {name: column["percent"] for name, column in scores["columns"].items() if column}
        ours |= {f"{name} accuracy": 100 * row.get("accuracy", 0) for name, row in results.items()}
        glue = [ours[f"{name} accuracy"] for name in their_content["glue"]]
        ours["glue accuracy"] = sum(glue) / max(1, len(glue))
        for part in ("global_piqa_parallel", "global_piqa_nonparallel"):
            ours[part] = 100 * results[part]["accuracy"]
        for part in ("self_paced_reading", "eye_tracking"):
            ours[part] = results["reading"][f"{part}_percent"]
        for name, value in their_scores.items():
            print(f"  {name}: official {value:.8f}, ours {ours[name]:.8f}")


def compare_rows(row: Row, ours: list[dict], theirs: list[dict], numbers: tuple[str, ...]) -> None:
    """Compare predictions row by row: numbers by their difference, all else for equality."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours):,} rows of ours, {len(theirs):,} official ones")
    row.items += len(ours)
    row.different = row.different or 0
    for our_row, their_row in zip(ours, theirs, strict=True):
        equal = True
        for key, value in our_row.items():
            other = their_row[key]
            if key in numbers and isinstance(value, float) and isinstance(other, float):
                difference = abs(value - other)
                row.score_difference = float(np.fmax(row.score_difference, difference))
            elif value != other and not (value is None and math.isnan(other)):
                equal = False
        row.different += not equal


def find_differences(ours, theirs, where: str = "") -> Iterator[str]:
    """Yield a line for each place at which two JSON values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() | theirs.keys():
            if key in ours and key in theirs:
                yield from find_differences(ours[key], theirs[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}: only {'ours' if key in ours else 'official'}"
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (our_value, their_value) in enumerate(zip(ours, theirs, strict=True)):
            yield from find_differences(our_value, their_value, f"{where}/{number}")
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=0, abs_tol=1e-9) and ours == ours:
            yield f"{where}: {ours}, official {theirs}"
    elif ours != theirs:
        yield f"{where}: {str(ours)[:60]}, official {str(theirs)[:60]}"


def print_table(rows: dict[tuple[str, str], Row]) -> None:
    """Print a Markdown table with a line for each task, and the sums of the seconds."""
    print(
        "| stage | task | items | different | scores within | official, s | ours, s | ratio ",
        end="",
    )
    print("| official, CPU s | ours, CPU s | ratio |")
    print("|" + "---|" * 11)
    total = Row()
    for (stage, task), row in [*rows.items(), (("all", ""), total)]:
        within = "-" if math.isnan(row.score_difference) else f"{row.score_difference:.1e}"
        print(
            f"| {stage} | {task} | {row.items:,} | {row.different} | {within} "
            f"| {row.official_seconds:.1f} | {row.our_seconds:.1f} "
            f"| {row.official_seconds / row.our_seconds:.1f} "
            f"| {row.official_cpu_seconds:.1f} | {row.our_cpu_seconds:.1f} "
            f"| {row.official_cpu_seconds / row.our_cpu_seconds:.1f} |"
        )
        total.add(row)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory with a babylm section")
    parser.add_argument("--eval-data", required=True, metavar="DIR", help="evaluation_data")
    parser.add_argument("--official", required=True, metavar="DIR", help="babylm-eval/strict")
    parser.add_argument("--interpreter", required=True, metavar="FILE", help="their Python")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder to fill")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages of submit.py")
    parser.add_argument("--collate", action="store_true", help="collate and score what is there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        import torch

        comparison = Comparison(args)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        if args.collate:
            comparison.collate()
            return
        comparison.start_official()
        rows: dict[tuple[str, str], Row] = {}
        for job in comparison.jobs():
            row = comparison.compare(job)
            print(f"{job.stage} {job.name}: {row}", flush=True)
            rows.setdefault((job.stage, job.name.split()[-1]), Row()).add(row)
        print_table(rows)

    return run_script(body)


if __name__ == "__main__":
    raise SystemExit(main())
