"""Train a language model from scratch, from one YAML file to a plain Hugging Face model directory.

    python train.py --config config/quickstart.yaml
    python train.py --config config/llama-10M.yaml --lr 5e-4 --model-name my-model
    python train.py --config config/llama-10M.yaml --set training.num_epochs=3 --dry-run
    python train.py --config config/llama-10M.yaml --resume-from-checkpoint latest
    python train.py --config config/llama-10M.yaml --sweep sweep.yaml
    python train.py --config config/llama-10M.yaml --seeds 1 2 3

The first function tells the story: it checks the configuration, tokenizes the text, creates the
model, trains it and writes the results. The others follow in about the order of their calls. torch
is imported inside functions, so that --help and the errors of a configuration appear at once.
The text must be clean and have a tokenizer already (prepare_data.py makes both), and comparing the
finished models is benchmark.py's task.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babyllama import distributed
from babyllama.architectures import ARCHITECTURES
from babyllama.cli import Parser, log_to_stderr, run_script
from babyllama.config import (
    check_config,
    check_model_section,
    read_yaml_file,
    set_key,
    set_value,
    unusual_values,
    with_defaults,
)
from babyllama.files import describe_environment, exclusive_folder
from babyllama.model_dir import weights_sha256
from babyllama.planning.checks import check_inputs, check_request, warn_about_leaks
from babyllama.runs import ending
from babyllama.runs.checkpoints import checkpoint_step, checkpoints, find_checkpoint
from babyllama.runs.resume import (
    check_checkpoint_step,
    finished_metrics,
    recorded_config,
    resolve_checkpoint,
    run_history,
)
from babyllama.runs.run_dir import CURVES_FILE, LOG_FILE, start_run_dir
from babyllama.runs.sweep import run_sweep
from babyllama.schema import SECTIONS
from babyllama.training.tracking import open_trackers, run_hyperparameters
from create_synthetic_data import grammar_floor

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from babyllama.planning.execution import Execution
    from babyllama.planning.plan import Plan
    from babyllama.training.benchmark import TrainingBenchmark
    from babyllama.training.budget import Budget
    from babyllama.training.loss import NextTokenLoss
    from babyllama.training.trainer import LMTrainer
    from data_utils import DataProcessor

log = logging.getLogger("train")

# Flags for the keys that people change most, beside --set for all of them.
FLAGS = {  # name of the flag -> key of the configuration
    "lr": "training.lr",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "num_epochs": "training.num_epochs",
    "fp16": "training.fp16",
    "bf16": "training.bf16",
    "torch_compile": "training.torch_compile",
    "dataloader_num_workers": "training.dataloader_num_workers",
    "seed": "training.seed",
    "model_name": "model.name",
    "wandb": "logging.wandb",
    "wandb_project": "logging.project",
}


# ---- 1. a run from its start to its end ---------------------------------------------------------


def prepare_and_train(args: argparse.Namespace) -> None:
    """Prepare a run and train it; stop early for a dry run, or if it is finished already."""
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        with distributed.main_first():
            # check first what does not need the text, because reading it may take long
            config = load_config(args.config, args)
            check_inputs(config)
            distributed.set_timeout(config["training"]["process_timeout_minutes"])
            run_dir = run_dir_of(config)
            check_request(args, config, run_dir)

            # read the text, which tells if this run was started or finished before
            data = load_data(config)
            if show_finished_run(args, run_dir, config, data.report):
                return

            # set up the run and start its directory, which no other process may use meanwhile
            writes = distributed.is_main() and not args.dry_run
            if writes:
                stack.enter_context(exclusive_folder(run_dir, "choose another --model-name"))
            checkpoint = resolve_checkpoint(
                run_dir,
                config,
                data.report,
                args.resume_from_checkpoint,
                args.overwrite,
                args.allow_change or (),
            )
            if checkpoint:
                restore_settings(run_dir, config, data.report, checkpoint)
            run = build_run(config, data, checkpoint)
            plan_run(run, started)
            if args.dry_run:
                print("dry run: nothing was trained; the tokenized text is cached for the real run")
                return
            step = checkpoint_step(checkpoint) if checkpoint else 0
            status = stack.enter_context(ending.recorded(run_dir, step))
            if writes:
                start_run_dir(run_dir, config, data.report, checkpoint)

        # train, in all processes together
        distributed.connect()
        hyperparameters = run_hyperparameters(config, run.plan_record(), data.report)
        with open_trackers(config, run_dir, hyperparameters) as trackers:
            train_and_save(run, status, trackers, hyperparameters)


# ---- 2. the configuration -----------------------------------------------------------------------


def load_config(config_path: str, args: Any = None) -> dict:
    """Read a YAML configuration, apply the command line, check it, and fill in every default.

    The command line beats the file, and --set beats the other flags. `args` may be any namespace:
    attributes that are missing or None override nothing. Values that are allowed but unusual are
    logged as warnings. Raise FileNotFoundError for a missing file, or one ConfigError (a
    ValueError) that lists every problem.
    """
    # apply the flags of single keys, then --set, which beats them
    raw = read_yaml_file(config_path)
    flags = {} if args is None else vars(args)
    for name, dotted in FLAGS.items():
        if flags.get(name) is not None:
            section, key = dotted.split(".")
            set_value(raw, section, key, flags[name])
    override_precision(raw, flags.get("fp16"), flags.get("bf16"))
    for assignment in flags.get("set") or ():
        set_key(raw, assignment)

    # check the result, and warn about what is allowed but unusual
    config = check_config(raw, str(config_path))
    for line in unusual_values(config):
        log.warning("%s: %s", config_path, line)
    return config


def override_precision(raw: Any, fp16: bool | None, bf16: bool | None) -> None:
    """Apply --fp16 and --bf16 to the three keys that choose the number format in the file."""
    training = raw.get("training") if isinstance(raw, dict) else None
    if not isinstance(training, dict):  # check_config will report this
        return
    precision = training.get("precision", "auto")
    if fp16 or bf16:
        training["fp16"] = bool(fp16)
        training["bf16"] = bool(bf16)
        training["precision"] = "auto"
        return
    # --no-bf16 also rules out auto, which might choose bf16. --no-fp16 only contradicts fp16: on a
    # GPU without bf16, auto may still choose fp16
    no_fp16 = fp16 is False and precision == "fp16"
    no_bf16 = bf16 is False and precision in ("auto", "bf16") and not training.get("fp16")
    if no_fp16 or no_bf16:
        training["precision"] = "fp32"


def run_dir_of(config: dict) -> Path:
    """Return the directory of the run that a configuration describes."""
    return Path(config["logging"]["output_dir"]) / config["model"]["name"]


# ---- 3. the data --------------------------------------------------------------------------------


@dataclass
class Data:
    """The tokenized text of a run and what is known about it."""

    tokenizer: Any
    byte_lengths: Any  # (V,) number of UTF-8 bytes of each token
    train: Dataset  # full chunks: column input_ids, seq_length integers in each row
    held_out: Dataset
    report: dict  # what data_report.json will contain
    entropy_floor: float | None  # of the grammar behind the held-out text, in bits per byte
    budget: Budget | None  # the words that BabyLM allows, with a babylm section


def prepare_datasets_modern(
    config: dict, tokenizer, processor: DataProcessor | None = None
) -> tuple[Dataset, Dataset]:
    """Return the (train, held-out) datasets: column input_ids, seq_length integers in each row.

    This is the entry point for notebooks. The text is not cleaned again, because prepare_data.py
    has done that. The held-out set is a fixed choice of data.eval_samples chunks. `config` needs
    only data.train_path and data.eval_path. A `processor` has the counts of both in its `reports`.
    """
    from babyllama.training.batches import ShiftedChunks
    from babyllama.training.held_out import choose_chunks
    from data_utils import DataProcessor

    data = with_defaults("data", config.get("data"))
    processor = processor or DataProcessor(tokenizer)
    splits = processor.prepare_dataset(
        data["train_path"], data["eval_path"], max_length=data["seq_length"], clean=False
    )
    train = splits["train"].with_format("numpy")
    if data["random_offset"]:
        seed = with_defaults("training", config.get("training"))["seed"]
        train = ShiftedChunks(train, seed)

    held_out = splits["validation"]
    held_out = held_out.select(choose_chunks(len(held_out), data["eval_samples"]))
    return train, held_out.with_format("numpy")


def load_data(config: dict) -> Data:
    """Load the tokenizer, check that the teachers share its vocabulary, and tokenize the text.

    With a babylm section, raise ValueError if the text has too many words.
    """
    from babyllama.data.tokenizer import byte_lengths, load_tokenizer
    from babyllama.training.budget import check_budget
    from data_utils import DataProcessor

    # tokenizing may take long, so first do everything else that can fail
    tokenizer = load_tokenizer(config["data"]["tokenizer_path"])
    tokenizer.model_max_length = config["data"]["seq_length"]
    lengths = byte_lengths(tokenizer)
    entropy_floor = grammar_floor(config["data"]["eval_path"])
    if "distillation" in config:
        from babyllama.distillation import teacher_cache, teachers

        teachers.check_teachers(config, tokenizer)

    processor = DataProcessor(tokenizer)
    train, held_out = prepare_datasets_modern(config, tokenizer, processor)
    report = processor.reports
    budget = check_budget(config, report["train"]["sources"]) if "babylm" in config else None

    # record what else the run learns from
    if "distillation" in config:
        identities = teacher_cache.identify_teachers(config["distillation"]["teachers"])
        report = {**report, "teachers": identities}
    if distributed.world_size() > 1:
        report = {**report, "processes": distributed.world_size()}
    warn_about_leaks(report)
    return Data(tokenizer, lengths, train, held_out, report, entropy_floor, budget)


# ---- 4. the model -------------------------------------------------------------------------------


def create_model(config: dict, tokenizer) -> torch.nn.Module:
    """Create a randomly initialized language model of one of the ARCHITECTURES.

    `config` is a full configuration or {"model": {...}} alone. The vocabulary is model.vocab_size
    (default len(tokenizer)), the context data.seq_length (default 128). Weights are drawn from
    torch's global generator, which the caller seeds. Raise ValueError for a wrong section or a
    vocabulary smaller than the tokenizer's.
    """
    import transformers

    # check the sizes
    model = check_model_section(config.get("model"))
    vocab_size = model["vocab_size"] or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size: {vocab_size} is less than the tokenizer's {len(tokenizer)} "
            "tokens; use at least as many, or leave the key out"
        )

    # translate our keys into those of the architecture
    architecture = ARCHITECTURES[model["type"]]
    head_size = model["hidden_size"] // model["n_head"]
    settings = model | {
        "n_kv_head": model["n_head"],
        "head_size": head_size,
        "seq_length": config.get("data", {}).get("seq_length", 128),
    }
    options = {theirs: settings[ours] for ours, theirs in architecture.config_keys.items()}
    if architecture.max_rotary_dim:
        options["rotary_dim"] = min(architecture.max_rotary_dim, head_size)

    # describe the model, and draw its weights
    model_config = transformers.AutoConfig.for_model(
        architecture.model_type,
        vocab_size=vocab_size,
        tie_word_embeddings=model["tie_word_embeddings"],
        use_cache=True,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        **options,
    )
    language_model = transformers.AutoModelForCausalLM.from_config(model_config)
    # where other tools stop by default: GPT-2 and GPT-J cannot go past their context
    language_model.generation_config.max_length = settings["seq_length"]
    return language_model


# ---- 5. the run ---------------------------------------------------------------------------------


@dataclass
class PreparedRun:
    """Everything that training needs, checked and ready to start."""

    config: dict
    run_dir: Path
    data: Data
    checkpoint: Path | None  # the checkpoint to resume from
    model: torch.nn.Module
    plan: Plan
    execution: Execution
    loss: NextTokenLoss
    benchmark: TrainingBenchmark | None  # only the main process has it

    def plan_record(self) -> dict[str, Any]:
        """Return the plan as training_metrics.json and the trackers record it."""
        return asdict(self.plan) | asdict(self.execution)


def show_finished_run(args: argparse.Namespace, run_dir: Path, config: dict, report: dict) -> bool:
    """Print the results if this very run is finished already, and return True if it is."""
    metrics = None if args.overwrite else finished_metrics(run_dir, config, report)
    if metrics is None:
        return False
    if args.resume_from_checkpoint not in (None, "latest", "auto"):
        find_checkpoint(args.resume_from_checkpoint, run_dir)  # so that a wrong path is an error
    from babyllama.training import results

    print(
        f"{run_dir} is already trained with this configuration and text; these are its results "
        "(--overwrite trains it again)"
    )
    results.print_summary(run_dir, metrics)
    return True


def restore_settings(run_dir: Path, config: dict, report: dict, checkpoint: Path) -> None:
    """Give a resumed run its length, and its data report the history of its settings."""
    if history := run_history(run_dir, config, report, checkpoint):
        report["history"] = history
    # training.max_minutes chose the steps when the run started, however fast the machine is now
    training = config["training"]
    if training["max_minutes"] and not training["max_steps"]:
        training["max_steps"] = recorded_config(run_dir)["training"].get("max_steps")


def build_run(config: dict, data: Data, checkpoint: Path | None) -> PreparedRun:
    """Create the model and its loss, and choose precision and kernels for this machine."""
    import transformers

    from babyllama.planning.execution import build_loss, choose_execution, use_fast_kernels
    from babyllama.planning.memory import estimate_memory
    from babyllama.planning.plan import make_plan
    from babyllama.training.benchmark import make_benchmark

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(config["training"]["seed"])
    model = create_model(config, data.tokenizer)
    plan = make_plan(config, model, data.report, len(data.train))
    execution = choose_execution(config, plan)
    use_fast_kernels(config, model, execution.precision)
    loss = build_loss(config, data.tokenizer.bos_token_id, execution.precision, execution.compile)
    memory_bytes = estimate_memory(config, model, loss)
    benchmark = make_benchmark(config, model, data.tokenizer)
    one_process_flops = execution.matmul_flops / plan.processes
    execution = replace(
        execution,
        memory_bytes=memory_bytes,
        benchmark=benchmark and benchmark.cost(plan.flops_per_token, one_process_flops),
    )
    return PreparedRun(
        config, run_dir_of(config), data, checkpoint, model, plan, execution, loss, benchmark
    )


def plan_run(run: PreparedRun, started: float) -> None:
    """Choose how many steps fit into the time, print what the run will do, and check that it can.

    training.max_minutes counts from `started`, a time.perf_counter().
    """
    from babyllama.planning.plan import check_disk_space, make_plan
    from babyllama.planning.printout import print_plan
    from babyllama.planning.time_limit import choose_max_steps

    training = run.config["training"]
    if training["max_minutes"] and not training["max_steps"]:
        training["max_steps"] = choose_max_steps(
            run.config, run.plan, run.execution, functools.partial(make_trainer, run), started
        )
        run.plan = make_plan(run.config, run.model, run.data.report, len(run.data.train))
    example = run.data.tokenizer.decode(run.data.train[0]["input_ids"][:48])
    print_plan(run.config, run.plan, run.execution, run.checkpoint, example)
    check_checkpoint_step(run.checkpoint, run.plan.steps)
    if distributed.is_main():
        check_disk_space(run.config, run.plan, run.run_dir)


# ---- 6. training --------------------------------------------------------------------------------


def make_trainer(
    run: PreparedRun, config: dict, folder: Path, callbacks: Sequence[TrainerCallback]
) -> LMTrainer:
    """Return the trainer of a run.

    `config` and `folder` are those of the run, except when time_limit.py times a few steps.
    """
    from babyllama.distillation.student import make_distillation_trainer
    from babyllama.training.arguments import training_arguments
    from babyllama.training.trainer import LMTrainer

    trainer_class = LMTrainer
    if "distillation" in config:
        trainer_class = functools.partial(make_distillation_trainer, config, run.data.report)
    return trainer_class(
        model=run.model,
        args=training_arguments(config, folder, run.execution.precision),
        train_dataset=run.data.train,
        eval_dataset=run.data.held_out,
        processing_class=run.data.tokenizer,
        byte_lengths=run.data.byte_lengths,
        training=config["training"],
        loss=run.loss,
        cuda_graphs=run.execution.cuda_graphs,
        benchmark=run.benchmark,
        history=run.data.report.get("history", ()),
        callbacks=callbacks,
    )


def train_and_save(
    run: PreparedRun, status: ending.Status, trackers: list, hyperparameters: dict
) -> None:
    """Train the model, then write and print the results.

    The `trackers` get the same rows and results; Trainer's own ones get the `hyperparameters`.
    """
    from babyllama.training import babylm, results
    from babyllama.training.callbacks import SaveWhenInterrupted
    from babyllama.training.run_log import RunLog

    config = run.config
    counts = run.data.report["train"]

    # create the log and the trainer
    run_log = RunLog(
        run.run_dir / LOG_FILE,
        counts["words"] / counts["tokens"],
        run.plan.flops_per_token,
        run.execution.matmul_flops,
        run.data.report.get("history", ()),
        trackers,
    )
    callbacks = [SaveWhenInterrupted(status)]
    if distributed.is_main():
        callbacks.insert(0, run_log)
    trainer = make_trainer(run, config, run.run_dir, callbacks)
    trainer.args.hyperparameters = hyperparameters
    word_counter = babylm.attach_word_counter(trainer, config, counts, run.data.budget)

    # train, from the checkpoint if there is one
    distributed.seed_per_rank(config["training"]["seed"])
    with ending.deferred_signals():  # they save the step first
        checkpoint = str(run.checkpoint) if run.checkpoint else None
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.release_graphs()  # the final evaluation may need their memory

    # write the results
    model = trainer.best_model()
    with distributed.main_first():
        if distributed.is_main():
            metrics = write_results(run, trainer, model, run_log, word_counter)
            for tracker in trackers:
                tracker.log_results(metrics, [run.run_dir / CURVES_FILE])
            results.print_summary(run.run_dir, metrics)


# ---- 7. the results -----------------------------------------------------------------------------


def write_results(run: PreparedRun, trainer, model, run_log, word_counter) -> dict:
    """Save and measure the trained model; return the content of training_metrics.json."""
    from babyllama.training import results
    from babyllama.training.held_out import TokenDomains, choose_chunks

    # save first: if anything below fails, the trained model is not lost
    with ending.deferred_signals():
        results.save_model(run.run_dir, model, run.data.tokenizer, run_log)

    # measure
    data = run.config["data"]
    held_out_report = run.data.report["validation"]
    chunks = choose_chunks(held_out_report["chunks"], data["eval_samples"])
    domains = TokenDomains(held_out_report["sources"], chunks, data["seq_length"])
    metrics = {
        "results": {
            **results.measure_model(trainer, model, domains),
            "floor_bits_per_byte": run.data.entropy_floor,
            **results.measure_benchmark(trainer, model),
            **results.measure_training(trainer, run_log, word_counter, data["seq_length"]),
        },
        "babylm": word_counter.compliance(),
        "plan": run.plan_record(),
        "samples": results.draw_samples(model, run.data.tokenizer, run.config),
        "data": run.data.report,
        "config": run.config,
        "weights_sha256": weights_sha256(run.run_dir),
        "environment": describe_environment(),
    }
    results.write_documents(run.run_dir, metrics, run_log.rows)
    return metrics


# ---- 8. the command line ------------------------------------------------------------------------


def run_command(args: argparse.Namespace) -> int:
    """Do what a command line asks for, as one of several processes if a launcher started us."""
    distributed.start()
    prepare_and_train(args)
    distributed.stop()
    return 0


def load_checked_config(args: argparse.Namespace) -> dict:
    """Load the configuration that a command line describes, and check that its inputs exist."""
    config = load_config(args.config, args)
    check_inputs(config)
    return config


def memory_advice(args: argparse.Namespace) -> str:
    """Return advice on how a run needs less memory, which never costs a checkpoint."""
    from babyllama.planning import memory

    config = load_config(args.config, args)
    saved = checkpoints(run_dir_of(config))
    return memory.memory_advice(config["training"], saved[0].name if saved else None)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line; most flags take their meaning from the schema."""
    settings = {
        key.replace("_", "-"): f"--set {section}.{key}=VALUE"
        for section, model in SECTIONS.items()
        for key in model.model_fields
        if f"{section}.{key}" not in FLAGS.values()
    }
    parser = Parser(
        prog="train.py",
        settings=settings,
        description="Train a language model from scratch, as a YAML file describes it.",
        epilog="Flags beat the YAML file. They may be written with hyphens or with underscores.",
    )
    add = parser.add_argument

    # the configuration, and flags for single keys of it
    add("--config", required=True, metavar="FILE", help="YAML file, e.g. config/quickstart.yaml")
    for name, dotted in FLAGS.items():
        section, key = dotted.split(".")
        field = SECTIONS[section].model_fields[key]
        kind = field.annotation if field.annotation in (int, float) else str
        options = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        if field.annotation in (bool, bool | None):
            options = {"action": argparse.BooleanOptionalAction, "default": None}
        add(f"--{name.replace('_', '-')}", help=f"{dotted}: {field.description}", **options)

    # what to do with it: resume, sweep, overwrite
    resume_help = (
        "continue from a checkpoint directory of this run, or from the latest one; auto starts the "
        "run if there is nothing to resume"
    )
    add("--resume-from-checkpoint", metavar="PATH|latest|auto", help=resume_help)
    allow_help = (
        "let a resumed run continue with another value of this key, such as training.batch_size; "
        "may be repeated"
    )
    add("--allow-change", action="append", metavar="KEY", help=allow_help)
    set_help = "change any key of the configuration, listed in API_REFERENCE.md; may be repeated"
    add("--set", action="append", metavar="SECTION.KEY=VALUE", help=set_help)
    sweep_help = "train every combination of the values in this YAML file (section.key: [values])"
    add("--sweep", metavar="FILE", help=sweep_help)
    seeds_help = "train once with each of these seeds; report mean and standard deviation"
    add("--seeds", nargs="+", type=int, metavar="N", help=seeds_help)
    add("--overwrite", action="store_true", help="replace an earlier run of the same name")
    dry_run_help = "prepare everything and print the plan of the run, but do not train"
    add("--dry-run", action="store_true", help=dry_run_help)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    log_to_stderr(level=logging.INFO)
    if args.sweep or args.seeds:
        body = functools.partial(run_sweep, args, argv, load_checked_config)
        advice = "the same command continues"
    else:
        body = functools.partial(run_command, args)
        advice = "nothing has changed; the same command starts again"
    with ending.catch_signals():
        return run_script(
            body,
            interrupted=f"interrupted; {advice}" if distributed.is_main() else "",
            memory_advice=functools.partial(memory_advice, args),
            print_error=distributed.print_error,
        )


if __name__ == "__main__":
    sys.exit(main())
