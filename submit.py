"""Turn a finished BabyLM run into a submission: predictions, collated file, scores, form, page.

    python submit.py models/babylm-strict-small --eval-data evaluation_data --output submission
    python submit.py models/babylm-strict-small --eval-data evaluation_data --output submission \\
        --skip glue --dry-run
    python submit.py models/babylm-strict-small --eval-data evaluation_data --output submission \\
        --push me/my-model
    python submit.py --check all_full_preds_and_fast_scores_causal.json

It runs what BabyLM 2026 asks of the tracks strict and strict-small, in stages: `zero_shot` scores
the final model on the full tasks, `fast` every checkpoint chck_<N>M on the fast tasks, `aoa`
compares when the model and children learn words, and `glue` fine-tunes the final model on seven
tasks. The same command resumes an interrupted submission: a file is only remade if the weights or
the data have changed.

The output folder gets results/MODEL/ in the layout of BabyLM's pipeline, with the file to submit,
all_full_preds_and_fast_scores_causal.json; scores.json, form.json and index.html. Nothing is
downloaded: if data are missing, the script lists the commands that fetch them, and goes on without
them. Nothing is uploaded without --push. The run directory does not change.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from pathlib import Path

from babyllama import cli
from babyllama.evaluation import grading
from babyllama.evaluation.tasks import DOWNLOAD, download_command
from babyllama.files import exclusive_folder, git_commit, read_json, utc_now, write_json, write_text
from babyllama.model_dir import is_model, weights_sha256
from babyllama.submission import collate, form, hub, official
from babyllama.submission.glue_tasks import GLUE_TASKS
from babyllama.submission.jobs import Job, joint_hash, run_jobs, size_of, weights_hash
from babyllama.submission.official import Requirements

log = logging.getLogger(__name__)
STAGES = ("zero_shot", "fast", "aoa", "glue")


# ---- jobs ---------------------------------------------------------------------------------------


def plan_jobs(
    args: argparse.Namespace, results: Path, checkpoints: list[Path], needed: Requirements
) -> list[Job]:
    """Return the jobs of the selected stages in order, even if their data are missing."""
    jobs = []
    for stage in args.stages:
        if stage == "zero_shot":
            for name, task in needed.zero_shot.items():
                jobs.append(zero_shot_job(args, results, Path(args.run), "main", name, task.full))
        elif stage == "fast":
            for model in checkpoints:
                for name, task in needed.zero_shot.items():
                    if task.fast is not None:
                        jobs.append(
                            zero_shot_job(args, results, model, model.name, name, task.fast)
                        )
        elif stage == "aoa":
            if checkpoints:
                jobs += [surprisal_job(args, results, path) for path in checkpoints]
                jobs.append(acquisition_job(args, results, checkpoints))
        else:
            jobs += [glue_job(args, results, name) for name in needed.glue_sizes]
    return jobs


def zero_shot_job(
    args: argparse.Namespace, results: Path, model: Path, revision: str, name: str, source: str
) -> Job:
    """Return the job that scores a task: the full data for the revision main, else the fast."""
    is_full = revision == "main"
    data = Path(args.eval_data, "full_eval" if is_full else "fast_eval", source)
    output = official.predictions_file(results, name, revision)
    command = download_command(name)
    if source == "ewok_fast":
        command = f"{DOWNLOAD}, and unzip fast_eval/ewok_fast.zip (its README has the password)"

    def run() -> None:
        from babyllama.evaluation.candidates import score_task

        lm, tokenizer = open_model(model, args.device)
        items = collate.read_task(name, data)
        scores, _, _ = score_task(lm, tokenizer, name, items)
        write_json(output, grading.official_predictions(name, items, scores, args.seed))

    return Job(
        stage="zero_shot" if is_full else "fast",
        name=f"{revision} {name}",
        outputs=[output],
        data=[data],
        download_command=command,
        weights_hash=weights_hash(model),
        cost=size_of(data),
        run=run,
    )


def acquisition_data(args: argparse.Namespace) -> list[Path]:
    """Return the files of contexts and of the ages at which children learn words."""
    folder = Path(args.eval_data, "full_eval")
    return [folder / official.AOA_CONTEXTS, folder / official.AOA_AGES]


def surprisal_job(args: argparse.Namespace, results: Path, checkpoint: Path) -> Job:
    """Return the job that measures the surprisals of all words at one checkpoint."""
    data = acquisition_data(args)
    output = official.surprisals_file(results, checkpoint.name)

    def run() -> None:
        from babyllama.submission.age_of_acquisition import measure_surprisals, read_contexts

        output.unlink(missing_ok=True)  # if this fails, those of other weights must not be used
        contexts = read_contexts(data[0])
        write_json(output, measure_surprisals(checkpoint, contexts, checkpoint.name, args.device))

    return Job(
        stage="aoa",
        name=checkpoint.name,
        outputs=[output],
        data=data,
        download_command=DOWNLOAD,
        weights_hash=weights_hash(checkpoint),
        cost=size_of(data[0]),
        run=run,
    )


def acquisition_job(args: argparse.Namespace, results: Path, checkpoints: list[Path]) -> Job:
    """Return the job that joins the surprisals of all checkpoints and scores them."""
    data = acquisition_data(args)
    folder = official.acquisition_folder(results)
    outputs = [folder / "surprisal.json", folder / "aoa_score.json", folder / "acquisition.json"]
    files = {path.name: official.surprisals_file(results, path.name) for path in checkpoints}

    def run() -> None:
        from transformers import AutoTokenizer

        from babyllama.submission.age_of_acquisition import acquisition_score, surprisal_file

        for output in outputs:
            output.unlink(missing_ok=True)  # of other weights
        missing = [name for name, file in files.items() if not file.is_file()]
        if missing:
            raise ValueError(f"the surprisals of {', '.join(missing)} are missing")
        rows_of = {name: read_json(file) for name, file in files.items()}
        hashes = {path.name: weights_hash(path) for path in checkpoints}
        surprisals = surprisal_file(rows_of, hashes, results.name)
        write_json(outputs[0], surprisals)
        tokenizer = AutoTokenizer.from_pretrained(args.run, local_files_only=True)
        write_json(outputs[2], acquisition_score(surprisals, data[1], tokenizer, outputs[1]))

    return Job(
        stage="aoa",
        name="age of acquisition",
        outputs=outputs,
        data=data,
        download_command=DOWNLOAD,
        weights_hash=joint_hash(map(weights_hash, checkpoints)),
        cost=0,  # next to the surprisals
        run=run,
    )


def glue_job(args: argparse.Namespace, results: Path, name: str) -> Job:
    run_dir = Path(args.run)
    data_dir = Path(args.eval_data, "full_eval", official.GLUE_DATA)
    data = [data_dir / f"{name}.{split}.jsonl" for split in ("train", "valid")]
    predictions = official.glue_file(results, name)
    outputs = [predictions, predictions.with_name("fine_tuning.json")]

    def run() -> None:
        from babyllama.submission.finetuning import fine_tune

        folder = predictions.parent
        result = fine_tune(run_dir, name, data_dir, folder, seed=args.seed, device=args.device)
        write_json(outputs[1], result)

    return Job(
        stage="glue",
        name=name,
        outputs=outputs,
        data=data,
        download_command=DOWNLOAD,
        weights_hash=weights_hash(run_dir),
        # a backward pass costs two forward passes
        cost=GLUE_TASKS[name].epochs * (3 * size_of(data[0]) + size_of(data[1])),
        run=run,
    )


@functools.lru_cache(maxsize=1)
def open_model(path: Path, device: str):
    """Return a model and its tokenizer.

    The tasks of one model follow one another, so the last one is kept.
    """
    from babyllama.evaluation.loading import load_model

    return load_model(path, device)


# ---- results ------------------------------------------------------------------------------------


def write_results(
    args: argparse.Namespace, run: dict, results: Path, output: Path, needed: Requirements
) -> list[str]:
    """Write the collated file, scores.json, form.json and index.html; return the problems."""
    from babyllama.submission import page

    # the file to submit, and its scores by our own count
    eval_data = Path(args.eval_data)
    collated, problems = collate.collate(results, eval_data, needed)
    write_json(official.collated_file(results), collated)
    acquisition = official.acquisition_folder(results) / "acquisition.json"
    acquisition_scores = read_json(acquisition) if acquisition.is_file() else None
    scores = {
        "model": args.run,
        "track": run["babylm"]["track"],
        "weights_sha256": weights_sha256(args.run),
        "date": utc_now(),
        **collate.score(collated, eval_data, acquisition_scores),
        "git_hash": git_commit(),
    }
    write_json(output / "scores.json", scores)

    # for people: the answers to the form, and a page
    write_json(output / "form.json", form.form_answers(Path(args.run), run, args.push))
    document = page.fast_document(results, eval_data, needed)
    write_text(output / "index.html", page.page(results.name, scores, problems, document))

    print_scores(scores)
    return problems


def print_scores(scores: dict) -> None:
    """Print the nine columns of the leaderboard with their intervals, and the overall score."""
    for name, column in scores["columns"].items():
        if column is None:
            print(f"{name:<16} missing, counts 0")
            continue
        low_high = "[{:.2f}, {:.2f}]".format(*column["ci95"]) if column["ci95"] else ""
        print(f"{name:<16} {column['percent']:6.2f}  {low_high}")
    print(f"{'overall':<16} {scores['overall_2026']:6.2f}")


def check_file(path: str) -> int:
    """Print a line for each problem of a collated file; return the exit code."""
    collated = read_json(Path(path))
    track = collate.track_of(collated)
    problems = collate.check(collated, official.requirements(track))
    for problem in problems:
        print(problem)
    print(f"{path}: {len(problems) or 'no'} problems for the track {track}")
    return cli.EXIT_BAD_INPUT if problems else 0


# ---- command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="submit.py", description="Turn a finished BabyLM run into a submission."
    )
    add = parser.add_argument
    stages = ", ".join(STAGES)
    add("run", nargs="?", metavar="RUN", help="the run directory")
    add("--eval-data", metavar="DIR", help="BabyLM's folder evaluation_data")
    add("--output", metavar="DIR", help="the folder of the submission")
    choice = {"nargs": "+", "choices": STAGES, "metavar": "STAGE", "default": []}
    add("--only", **choice, help=f"run only these stages ({stages})")
    add("--skip", **choice, help="run all stages but these")
    add("--dry-run", action="store_true", help="list what would be done")
    add("--push", metavar="USER/NAME", help="upload the model and its checkpoints to the Hub")
    add("--private", action="store_true", help="with --push, make the repository private")
    add("--license", metavar="NAME", help="with --push, the licence on the model card")
    add("--language", metavar="CODE", help="with --push, the language on the model card")
    add("--hub-cache", metavar="DIR", help="lay the model out as an offline cache of the Hub")
    add("--check", metavar="FILE", help="check a collated file; needs no RUN")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--seed", type=int, default=42, help="seed of fine-tuning and ties (default 42)")
    return parser


def select_stages(args: argparse.Namespace) -> list[str]:
    """Return the stages that --only and --skip leave, in order."""
    return [stage for stage in args.only or STAGES if stage not in args.skip]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = make_parser().parse_args(argv)
    cli.log_to_stderr("%(message)s")
    for name in (__name__, "babyllama.submission"):
        logging.getLogger(name).setLevel(logging.INFO)

    return cli.run_script(lambda: run(args), interrupted="interrupted; the same command continues")


def run(args: argparse.Namespace) -> int:
    """Check a file of predictions, or check the request and submit; return the exit code."""
    if args.check:
        return check_file(args.check)
    if None in (args.run, args.eval_data, args.output):
        raise ValueError("submit.py needs RUN, --eval-data DIR and --output DIR (or --check)")
    args.stages = select_stages(args)
    if args.push:
        hub.check_repo_id(args.push)
    return submit(args)


def submit(args: argparse.Namespace) -> int:
    """Run what is missing, write the results and publish the model; return the exit code."""
    # check the run and the data, and find the checkpoints
    run_dir = Path(args.run)
    output = Path(args.output)
    run = form.read_run(run_dir)
    if not Path(args.eval_data).is_dir():
        raise FileNotFoundError(
            f"--eval-data {args.eval_data}: no such folder; {DOWNLOAD} makes it"
        )
    needed = official.requirements(run["babylm"]["track"])
    checkpoints = [run_dir / name for name in needed.checkpoints if is_model(run_dir / name)]
    reached = [checkpoint["name"] for checkpoint in run["babylm"]["checkpoints"]]
    absent = [name for name in reached if run_dir / name not in checkpoints]
    if absent:
        log.warning(
            "%s has no %s; BabyLM asks for all up to the end of training",
            run_dir,
            ", ".join(absent),
        )

    # plan, and with --dry-run stop there
    results = output / "results" / run_dir.resolve().stem
    jobs = plan_jobs(args, results, checkpoints, needed)
    if args.dry_run:
        run_jobs(jobs, output, args.seed, dry_run=True)
        if args.push:
            publish(args)
        return 0

    with exclusive_folder(output, "name another --output"):
        failed = run_jobs(jobs, output, args.seed)
        problems = write_results(args, run, results, output, needed)
    for problem in problems:
        log.warning("%s", problem)
    print(f"submit {official.collated_file(results)}; see {output / 'index.html'}")

    if args.hub_cache:
        lay_out_cache(args)
    if args.push:
        publish(args)
    return cli.EXIT_BAD_INPUT if failed else 0


def lay_out_cache(args: argparse.Namespace) -> None:
    """Lay the run out as a cache of the Hub, and say how to use it."""
    name = args.push or f"local/{Path(args.run).resolve().stem}"
    hub.lay_out_hub_cache(Path(args.run), Path(args.hub_cache), name)
    print(f"to load {name} and its revisions: HF_HUB_CACHE={args.hub_cache} HF_HUB_OFFLINE=1")


def publish(args: argparse.Namespace) -> None:
    """Upload the run to the Hub, or list what would be uploaded."""
    hub.push(
        Path(args.run),
        args.push,
        private=args.private,
        license=args.license,
        language=args.language,
        dry_run=args.dry_run,
    )


if __name__ == "__main__":
    sys.exit(main())
