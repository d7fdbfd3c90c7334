"""What a finished run leaves in its directory: the model, its scores in float32, metrics, curves and card."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from babyllama.config import (
    check_config,
    check_model_section,
    read_yaml_file,
    set_key,
    set_value,
    unusual_values,
    with_defaults,
)
from babyllama.files import describe_environment, exclusive_folder, write_json
from babyllama.schema import SECTIONS
from babyllama.training import distributed
from babyllama.training.run_dir import (
    COMPLIANCE_FILE,
    LOG_FILE,
    MANIFEST,
    METRICS_FILE,
    check_checkpoint_step,
    check_output_dir,
    checkpoint_step,
    checkpoints,
    find_checkpoint,
    finished_metrics,
    make_weights_readable,
    model_card,
    print_summary,
    require_teacher,
    resolve_checkpoint,
    start_run_dir,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


log = logging.getLogger("train")
OF_TRAINING = (
    "lr", "batch_size", "gradient_accumulation_steps", "num_epochs", "fp16", "bf16", "torch_compile",
    "dataloader_num_workers", "seed",
)  # fmt: skip
FLAGS = {  # attribute of the command line -> key of the configuration
    **{name: f"training.{name}" for name in OF_TRAINING},
    "model_name": "model.name",
    "wandb": "logging.wandb",
    "wandb_project": "logging.project",
}
EXIT_INTERRUPTED = 130


# ---- configuration ------------------------------------------------------------------------------


def load_config(config_path: str, args: Any = None) -> dict:
    """Read, override and check a YAML configuration; returns a plain dict with every default filled in.

    `args` is any namespace; attributes that are missing or None override nothing. The command line beats the file, and
    --fp16 or --bf16 there switches the file's other one off. Raises FileNotFoundError for a missing file and
    settings.ConfigError (a ValueError) that lists every problem. Values that are unusual are warned of, a line each.
    """
    raw = read_yaml_file(config_path)
    given = {k: v for k, v in (vars(args) if args is not None else {}).items() if v is not None}
    for name, dotted in FLAGS.items():
        if name in given:
            set_value(raw, *dotted.split("."), given[name])
    for on, off in (("fp16", "bf16"), ("bf16", "fp16")):
        if given.get(on) is True and not given.get(off):
            set_value(raw, "training", off, False)
            set_value(raw, "training", "precision", "auto")
    training = raw.get("training") if isinstance(raw, dict) else None
    for off, other in (
        ("fp16", "bf16"),
        ("bf16", "fp16"),
    ):  # precision may be what was switched off
        if given.get(off) is False and isinstance(training, dict) and not training.get(other):
            chosen = training.get("precision", "auto")
            training["precision"] = (
                "fp32" if chosen == off or (off, chosen) == ("bf16", "auto") else chosen
            )
    for assignment in given.get("set") or ():
        set_key(raw, assignment)
    config = check_config(raw, str(config_path))
    for line in unusual_values(config):
        log.warning("%s: %s", config_path, line)
    return config


def check_inputs(config: dict) -> dict | None:
    """Raise FileNotFoundError with the command that makes it if the tokenizer or a text is not there.

    With a babylm section: what counts toward its budget (ledger.check_budget), or ValueError where that is too much.
    """
    data = config["data"]
    size = "100m" if config.get("babylm", {}).get("track") == "strict" else "10m"
    where = f"--output-dir {Path(data['train_path']).parent} --tokenizer-output {data['tokenizer_path']}"
    for key in ("train_path", "eval_path"):
        if not Path(data[key]).exists():
            raise FileNotFoundError(
                f"{data[key]} not found (data.{key}): prepare the text first: python prepare_data.py "
                f"--babylm-{size} DIR --babylm-dev DIR {where}, or python create_synthetic_data.py"
            )
    if not Path(data["tokenizer_path"]).exists():
        raise FileNotFoundError(
            f"{data['tokenizer_path']} not found (data.tokenizer_path): train a tokenizer first: python "
            f"train_tokenizer.py --data-dir {data['train_path']} --output {data['tokenizer_path']}"
        )
    section = config.get("distillation", {"teachers": (), "cache": "none"})
    for teacher in (
        section["teachers"] if section["cache"] == "none" else ()
    ):  # a cache may do without its teachers
        require_teacher(teacher)
    if "babylm" not in config:
        return None
    from babyllama.training.babylm import check_budget

    return check_budget(config)


def checked_config(args: argparse.Namespace) -> dict:
    """The configuration of a command line, after the inputs that it names were found."""
    config = load_config(args.config, args)
    check_inputs(config)
    return config


# ---- model and data -----------------------------------------------------------------------------


def create_model(config: dict, tokenizer) -> torch.nn.Module:
    """A randomly initialised LlamaForCausalLM, GPT2LMHeadModel or GPTJForCausalLM.

    `config` is a full configuration or {"model": {...}} alone; model.vocab_size defaults to len(tokenizer), and the
    context is data.seq_length (128 where there is no data section). The weights come from torch's global generator,
    which the caller seeds. ValueError for a wrong section or a vocabulary that the tokenizer does not fit into.
    """
    import transformers

    model = check_model_section(config.get("model"))
    vocab_size = model["vocab_size"] or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size: {vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    shared = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": model["tie_word_embeddings"],
        "use_cache": True,
        **{
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None)
            for name in ("bos", "eos", "pad")
        },
    }
    context = config.get("data", {}).get("seq_length", 128)
    if model["type"] == "Llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=model["hidden_size"],
                intermediate_size=model["intermediate_size"],
                num_hidden_layers=model["n_layer"],
                num_attention_heads=model["n_head"],
                max_position_embeddings=context,
                **shared,
            )
        )
    shared |= {
        "n_embd": model["hidden_size"],
        "n_inner": model["intermediate_size"],
        "n_layer": model["n_layer"],
        "n_head": model["n_head"],
        "n_positions": context,
        **{key: model[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    }
    if model["type"] == "GPT2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shared))
    head_size = model["hidden_size"] // model["n_head"]
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(rotary_dim=min(64, head_size), **shared)
    )


def _prepare_datasets(config: dict, tokenizer) -> tuple[Dataset, Dataset, dict]:
    """prepare_datasets_modern, and what the data processor counted: {"train": {...}, "validation": {...}}."""
    import numpy as np

    from data_utils import DataProcessor

    data = with_defaults("data", config.get("data"))
    processor = DataProcessor(tokenizer)
    both = processor.prepare_dataset(
        data["train_path"], data["eval_path"], max_length=data["seq_length"], clean=False
    )
    held_out = both["validation"]
    if (
        len(held_out) > data["eval_samples"]
    ):  # a fixed subset: the same chunks for every model and seed
        chosen = np.random.default_rng(0).choice(len(held_out), data["eval_samples"], replace=False)
        held_out = held_out.select(sorted(chosen.tolist()))
    train = both["train"].with_format("numpy")
    if data["random_offset"]:
        from babyllama.training.trainer import ShiftedChunks

        train = ShiftedChunks(train, with_defaults("training", config.get("training"))["seed"])
    return train, held_out.with_format("numpy"), processor.reports


def prepare_datasets_modern(config: dict, tokenizer) -> tuple[Dataset, Dataset]:
    """(train, held-out) datasets of full chunks: column input_ids, seq_length small integers in each row.

    The text is read as it is (prepare_data.py cleans). The held-out set is a fixed choice of data.eval_samples chunks.
    `config` needs no more than data.train_path and data.eval_path; other keys have their defaults.
    """
    train, held_out, _ = _prepare_datasets(config, tokenizer)
    return train, held_out


def _prepare_inputs(config: dict, tokenizer) -> tuple[Dataset, Dataset, dict]:
    """_prepare_datasets; teachers are compared with the tokenizer before, and their identity is in the report."""
    if "distillation" not in config:
        return _prepare_datasets(config, tokenizer)
    from babyllama.training.distillation import check_teachers, identify

    check_teachers(config, tokenizer)
    train_data, held_out, report = _prepare_datasets(config, tokenizer)
    return train_data, held_out, {**report, "teachers": identify(config, report["train"]["key"])}


def warn_about_leaks(report: dict) -> None:
    """A warning for held-out files that are training files too: scores on them say nothing of other text."""
    nothing = hashlib.sha256(b"").hexdigest()
    known = {s["sha256"]: s["file"] for s in report["train"]["sources"] if s["sha256"] != nothing}
    for source in report["validation"]["sources"]:
        if source["sha256"] in known:
            log.warning(
                "%s: the held-out text is training text too: %s",
                source["file"],
                known[source["sha256"]],
            )


# ---- the run ------------------------------------------------------------------------------------


def fit(trainer, run_dir: Path, checkpoint: Path | None) -> bool:
    """Train to the end; False where the user interrupted it, having said how to go on."""
    from babyllama.training.callbacks import save_when_interrupted

    try:
        with save_when_interrupted(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (KeyboardInterrupt, BrokenPipeError):  # who read the output has gone: `| head`
        saved = [folder for folder in checkpoints(run_dir) if (folder / MANIFEST).is_file()]
        further = (
            f"go on from {saved[0].name} with --resume_from_checkpoint latest"
            if saved
            else "nothing was saved yet"
        )
        if distributed.is_main():
            print(f"interrupted after step {trainer.state.global_step}; {further}", file=sys.stderr)
        return False
    trainer.graphs = None  # whose memory the final evaluation may want
    return True


def setup_run(args: argparse.Namespace, held: contextlib.ExitStack) -> SimpleNamespace | None:
    """Check all and make what a run needs, its directory held; None where nothing is to be trained (--dry-run)."""
    config = load_config(args.config, args)
    budget = check_inputs(config)
    run_dir = Path(config["logging"]["output_dir"]) / config["model"]["name"]
    if args.overwrite and args.resume_from_checkpoint:
        raise ValueError(
            "--overwrite, --resume_from_checkpoint: one begins anew, the other goes on; choose one"
        )
    check_output_dir(run_dir, config.get("distillation", {}).get("teachers", ()))
    if config["logging"]["wandb"]:
        from babyllama.training.callbacks import prepare_wandb

        prepare_wandb(config)
    if config["training"]["fsdp"]:
        distributed.require_gpus()
    from babyllama.data.tokenizer import byte_lengths, load_tokenizer
    from create_synthetic_data import grammar_floor

    tokenizer = load_tokenizer(config["data"]["tokenizer_path"])
    tokenizer.model_max_length, lengths = config["data"]["seq_length"], byte_lengths(tokenizer)
    floor = grammar_floor(config["data"]["eval_path"])
    train_data, held_out, data_report = _prepare_inputs(config, tokenizer)
    data_report |= {"processes": distributed.world_size()} if distributed.world_size() > 1 else {}
    warn_about_leaks(data_report)
    if not args.overwrite and (metrics := finished_metrics(run_dir, config, data_report)):
        if args.resume_from_checkpoint not in (None, "latest"):
            find_checkpoint(args.resume_from_checkpoint, run_dir)
        print(
            f"{run_dir}: already trained with this configuration on this text (--overwrite trains again)"
        )
        print_summary(run_dir, metrics)
        return None
    import transformers

    from babyllama.training.kernels import build_loss, choose_precision_and_kernels
    from babyllama.training.plan import describe_run, print_plan

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if distributed.is_main() and not args.dry_run:
        held.enter_context(exclusive_folder(run_dir, "choose another --model_name"))
    checkpoint = resolve_checkpoint(
        run_dir, config, data_report, args.resume_from_checkpoint, args.overwrite
    )
    transformers.set_seed(config["training"]["seed"])
    model = create_model(config, tokenizer)
    plan = describe_run(config, model, data_report["train"], len(train_data))
    plan |= choose_precision_and_kernels(config, plan)
    loss = build_loss(config, model, plan, tokenizer.bos_token_id)
    print_plan(config, plan, tokenizer.decode(train_data[0]["input_ids"][:48]))
    check_checkpoint_step(checkpoint, plan["steps"])
    if args.dry_run:
        print("dry run: nothing was trained; the chunks are kept for the run")
        return None
    return SimpleNamespace(
        config=config, run_dir=run_dir, checkpoint=checkpoint, tokenizer=tokenizer, train_data=train_data,
        held_out=held_out, data_report=data_report, floor=floor, model=model, plan=plan, loss=loss,
        lengths=lengths, budget=budget,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Config -> datasets -> model -> trainer -> run directory."""
    with contextlib.ExitStack() as held:
        with distributed.main_first():
            job = setup_run(args, held)
            if job and distributed.is_main():
                start_run_dir(job.run_dir, job.config, job.data_report, job.checkpoint)
        return train_and_save(job) if job else 0


def train_and_save(job: SimpleNamespace) -> int:
    """Train what `prepare` put together, and write the run directory."""
    from babyllama.training.babylm import attach_word_counter
    from babyllama.training.distillation import make_trainer

    pass
    from babyllama.training.callbacks import RunLog
    from babyllama.training.trainer import training_arguments

    config, plan, words = job.config, job.plan, job.data_report["train"]
    words_per_token = words["words"] / words["tokens"]
    run_log = RunLog(
        job.run_dir / LOG_FILE, words_per_token, plan["flops_per_token"], plan["matmul_flops"]
    )
    trainer = make_trainer(
        config,
        job.data_report,
        model=job.model,
        args=training_arguments(config, job.run_dir, plan["precision"], plan["steps"]),
        train_dataset=job.train_data,
        eval_dataset=job.held_out,
        processing_class=job.tokenizer,
        byte_lengths=job.lengths,
        training=config["training"],
        loss=job.loss,
        callbacks=[run_log] if distributed.is_main() else [],
    )
    trainer.word_log = attach_word_counter(trainer, config, words, job.budget)
    distributed.seed_per_rank(config["training"]["seed"])
    if not fit(trainer, job.run_dir, job.checkpoint):
        return EXIT_INTERRUPTED
    model = trainer.best_model()
    with distributed.main_first():
        if distributed.is_main():
            print_summary(job.run_dir, write_results(job, trainer, model, run_log))
    return 0


def kept_step(trainer) -> int:
    """The step whose weights a run leaves: the last, or with early stopping that of the best evaluation."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return checkpoint_step(Path(best)) if best else trainer.state.global_step


def write_results(job: SimpleNamespace, trainer, model, run_log) -> dict:
    """Evaluate the trained model in float32, save it as a plain model directory, and write metrics, curves and card.

    `job` is what train.prepare put together; returns the content of training_metrics.json.
    """
    from babyllama.device import peak_memory_gb
    from babyllama.evaluation.generation import generate
    from babyllama.plots import plot_training
    from babyllama.training.trainer import evaluate_chunks

    config, run_dir, tokenizer, floor = job.config, job.run_dir, job.tokenizer, job.floor
    final = evaluate_chunks(
        model,
        trainer.eval_dataset,
        trainer.byte_lengths,
        config["training"]["batch_size"],
        trainer.loss.mask_from,
    )
    model.save_pretrained(run_dir)
    make_weights_readable(run_dir)
    tokenizer.save_pretrained(run_dir)
    if not run_log.rows:
        raise ValueError(f"{run_log.path}: its rows are lost, and no step is left that would tell of the run: the "
                         "model is saved, but no metrics and no card; train anew with --overwrite")  # fmt: skip
    samples = generate(model.eval(), tokenizer, [""] * 3, max_new_tokens=min(48, config["data"]["seq_length"] - 1),
                       temperature=0.8, top_p=0.95, seed=config["training"]["seed"])  # fmt: skip
    steps = kept_step(trainer)
    chunks = distributed.chunks_after(
        steps, len(trainer.train_dataset), trainer.get_total_train_batch_size(trainer.args)
    )
    metrics = {
        "results": {
            **{f"eval_{key}": value for key, value in final.items()},
            "floor_bits_per_byte": floor,
            "tokens_per_second": run_log.tokens_per_second(),
            "training_seconds": run_log.seconds,
            "first_step_seconds": run_log.rows[0]["seconds"],
            "peak_memory_gb": peak_memory_gb(model.device),
            "steps": steps,
            "steps_run": trainer.state.global_step,
            "epochs": round(chunks / len(trainer.train_dataset), 4),
            "tokens_trained": chunks * config["data"]["seq_length"],
            "words_trained": trainer.word_log.words_seen(steps) if trainer.word_log else None,
        },
        "babylm": trainer.word_log.compliance() if trainer.word_log else None,
        "plan": job.plan,
        "samples": [sample for group in samples for sample in group],
        "data": job.data_report,
        "config": config,
        "environment": describe_environment(),
    }
    floor_nats = floor * math.log(2) * final["bytes"] / final["tokens"] if floor else None
    plot_training(
        run_log.rows, run_dir / "training_curves.png", config["model"]["name"], floor_nats
    )
    (run_dir / "README.md").write_text(model_card(metrics), encoding="utf-8")
    if metrics["babylm"]:
        write_json(run_dir / COMPLIANCE_FILE, metrics["babylm"])
    write_json(run_dir / METRICS_FILE, metrics)  # last: its presence says that the run is finished
    return metrics


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a language model from scratch, as a YAML file says.",
        epilog="Every flag can be written with hyphens or underscores. The command line beats the file.",
    )  # fmt: skip

    def add(name: str, **options) -> None:
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        parser.add_argument(*spellings, **options)

    add(
        "config",
        required=True,
        metavar="FILE",
        help="the YAML configuration, e.g. config/quickstart.yaml",
    )
    for name, dotted in FLAGS.items():
        section, key = dotted.split(".")
        field = SECTIONS[section].model_fields[key]
        kind = {"type": field.annotation if field.annotation in (int, float) else str}
        if field.annotation in (bool, bool | None):
            kind = {"action": argparse.BooleanOptionalAction, "default": None}
        add(name.replace("_", "-"), help=f"{dotted}: {field.description}", **kind)
    add(
        "resume-from-checkpoint",
        metavar="PATH",
        help="a checkpoint directory of this run, or the word latest",
    )
    add(
        "set",
        action="append",
        metavar="SECTION.KEY=VALUE",
        help="any key of the configuration; may be repeated",
    )
    add(
        "sweep",
        metavar="FILE",
        help="train every combination of the values in this YAML file (section.key: [values])",
    )
    add("overwrite", action="store_true", help="replace a run of the same name")
    add(
        "dry-run",
        action="store_true",
        help="prepare everything, print the derived numbers, train nothing",
    )
    return parser


def attempt(args: argparse.Namespace) -> tuple[int, Exception | None]:
    """run(args): the exit code, and the error where the user can mend it; others are raised."""
    try:
        return run(args), None
    except KeyboardInterrupt:  # fit says more where there is something to go on from
        print(
            "interrupted outside the training steps; where a checkpoint is, go on with --resume_from_checkpoint latest",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED, None
    except (ValueError, OSError) as error:
        return 2, error
    except RuntimeError as error:
        if distributed.is_lost_process_error(error):
            why = str(error).strip().splitlines()[0]
            return 2, OSError(
                f"lost another process: killed (out of memory?), or its own error is above ({why})"
            )
        from babyllama.device import is_out_of_memory
        from babyllama.training.kernels import memory_advice

        if not is_out_of_memory(error):
            raise
        what = "CUDA out of memory" if "cuda" in str(error).lower() else "out of memory"
        return 2, MemoryError(
            f"{what}: {memory_advice(load_config(args.config, args)['training'])}"
        )


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        distributed.start()
        if args.sweep:
            from babyllama.training.sweep import run_sweep

            return run_sweep(args, checked_config, attempt)
        code, error = attempt(args)
    except KeyboardInterrupt:
        code, error = EXIT_INTERRUPTED, None
    except (ValueError, OSError) as mistake:
        code, error = 2, mistake
    if error:
        distributed.print_error(error)
    if not code:
        distributed.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
