"""Train a Llama, GPT-2 or GPT-J language model from scratch, as a YAML file says.

    python train.py --config config/quickstart.yaml
    python train.py --config config/llama-10M.yaml --lr 5e-4 --batch-size 16 --model_name my-model
    python train.py --config config/llama-10M.yaml --resume_from_checkpoint latest
    python train.py --config config/llama-10M.yaml --set training.weight_decay=0.05 --dry-run
    python train.py --config config/llama-10M.yaml --sweep sweep.yaml
    torchrun --nproc_per_node=2 train.py --config config/llama-95M.yaml

It reads text and a tokenizer that are there already (prepare_data.py and train_tokenizer.py make them) and writes the
run directory <logging.output_dir>/<model.name>: a plain Hugging Face model with the resolved configuration, the
metrics, the curves and a model card. It does not clean text and does not fine-tune existing weights.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ranks
import runs
import settings
import threads
from lock import alone_in

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
    raw = settings.read_yaml_file(config_path)
    given = {k: v for k, v in (vars(args) if args is not None else {}).items() if v is not None}
    for name, dotted in FLAGS.items():
        if name in given:
            settings.put(raw, *dotted.split("."), given[name])
    for on, off in (("fp16", "bf16"), ("bf16", "fp16")):
        if given.get(on) is True and not given.get(off):
            settings.put(raw, "training", off, False)
            settings.put(raw, "training", "precision", "auto")
    training = raw.get("training") if isinstance(raw, dict) else None
    for off, other in (("fp16", "bf16"), ("bf16", "fp16")):  # precision may be what was switched off
        if given.get(off) is False and isinstance(training, dict) and not training.get(other):
            chosen = training.get("precision", "auto")
            training["precision"] = "fp32" if chosen == off or (off, chosen) == ("bf16", "auto") else chosen
    for assignment in given.get("set") or ():
        settings.set_key(raw, assignment)
    config = settings.check(raw, str(config_path))
    for line in settings.warnings_of(config):
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
    for teacher in section["teachers"] if section["cache"] == "none" else ():  # a cache may do without its teachers
        runs.require_teacher(teacher)
    if "babylm" not in config:
        return None
    from ledger import check_budget

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

    model = settings.check_model_section(config.get("model"))
    vocab_size = model["vocab_size"] or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ValueError(f"model.vocab_size: {vocab_size} is less than the tokenizer's {len(tokenizer)} tokens")
    shared = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": model["tie_word_embeddings"],
        "use_cache": True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")},
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
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(rotary_dim=min(64, head_size), **shared))


def _prepare_datasets(config: dict, tokenizer) -> tuple[Dataset, Dataset, dict]:
    """prepare_datasets_modern, and what the data processor counted: {"train": {...}, "validation": {...}}."""
    import numpy as np

    from data_utils import DataProcessor

    data = settings.with_defaults("data", config.get("data"))
    processor = DataProcessor(tokenizer)
    both = processor.prepare_dataset(data["train_path"], data["eval_path"], max_length=data["seq_length"], clean=False)
    held_out = both["validation"]
    if len(held_out) > data["eval_samples"]:  # a fixed subset: the same chunks for every model and seed
        chosen = np.random.default_rng(0).choice(len(held_out), data["eval_samples"], replace=False)
        held_out = held_out.select(sorted(chosen.tolist()))
    train = both["train"].with_format("numpy")
    if data["random_offset"]:
        from trainer import ShiftedChunks

        train = ShiftedChunks(train, settings.with_defaults("training", config.get("training"))["seed"])
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
    from distillation import identify
    from teachers import check_teachers

    check_teachers(config, tokenizer)
    train_data, held_out, report = _prepare_datasets(config, tokenizer)
    return train_data, held_out, {**report, "teachers": identify(config, report["train"]["key"])}


# ---- the run ------------------------------------------------------------------------------------


def fit(trainer, run_dir: Path, checkpoint: Path | None) -> bool:
    """Train to the end; False where the user interrupted it, having said how to go on."""
    from interrupt import saved_when_interrupted

    try:
        with saved_when_interrupted(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (KeyboardInterrupt, BrokenPipeError):  # who read the output has gone: `| head`
        saved = [folder for folder in runs.checkpoints(run_dir) if (folder / runs.MANIFEST).is_file()]
        further = (
            f"go on from {saved[0].name} with --resume_from_checkpoint latest" if saved else "nothing was saved yet"
        )
        if ranks.is_main():
            print(f"interrupted after step {trainer.state.global_step}; {further}", file=sys.stderr)
        return False
    trainer.graphs = None  # whose memory the final evaluation may want
    return True


def prepare(args: argparse.Namespace, held: contextlib.ExitStack) -> SimpleNamespace | None:
    """Check all and make what a run needs, its directory held; None where nothing is to be trained (--dry-run)."""
    config = load_config(args.config, args)
    budget = check_inputs(config)
    run_dir = Path(config["logging"]["output_dir"]) / config["model"]["name"]
    if args.overwrite and args.resume_from_checkpoint:
        raise ValueError("--overwrite, --resume_from_checkpoint: one begins anew, the other goes on; choose one")
    runs.require_own(run_dir, config.get("distillation", {}).get("teachers", ()))
    if config["logging"]["wandb"]:
        runs.prepare_wandb(config)
    if config["training"]["fsdp"]:
        ranks.require_gpus()
    from data_utils import byte_lengths, load_tokenizer
    from documents import floor_bits_per_byte

    tokenizer = load_tokenizer(config["data"]["tokenizer_path"])
    tokenizer.model_max_length, lengths = config["data"]["seq_length"], byte_lengths(tokenizer)
    floor = floor_bits_per_byte(config["data"]["eval_path"])
    train_data, held_out, data_report = _prepare_inputs(config, tokenizer)
    data_report |= {"processes": ranks.count()} if ranks.count() > 1 else {}
    runs.warn_of_leaks(data_report)
    if not args.overwrite and (metrics := runs.finished_metrics(run_dir, config, data_report)):
        if args.resume_from_checkpoint not in (None, "latest"):
            runs.find_checkpoint(args.resume_from_checkpoint, run_dir)
        print(f"{run_dir}: already trained with this configuration on this text (--overwrite trains again)")
        runs.print_summary(run_dir, metrics)
        return None
    import transformers

    from plan import describe, fit_to_machine, print_plan

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if ranks.is_main() and not args.dry_run:
        held.enter_context(alone_in(run_dir, "choose another --model_name"))
    checkpoint = runs.claim(run_dir, config, data_report, args.resume_from_checkpoint, args.overwrite)
    transformers.set_seed(config["training"]["seed"])
    model = create_model(config, tokenizer)
    plan = describe(config, model, data_report["train"], len(train_data))
    loss = fit_to_machine(config, model, plan, tokenizer.bos_token_id)
    print_plan(config, plan, tokenizer.decode(train_data[0]["input_ids"][:48]))
    runs.require_ahead(checkpoint, plan["steps"])
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
        with ranks.main_first():
            job = prepare(args, held)
            if job and ranks.is_main():
                runs.begin(job.run_dir, job.config, job.data_report, job.checkpoint)
        return carry_out(job) if job else 0


def carry_out(job: SimpleNamespace) -> int:
    """Train what `prepare` put together, and write the run directory."""
    from distillation import make_trainer
    from ledger import follow
    from results import write_results
    from run_log import RunLog
    from trainer import training_arguments

    config, plan, words = job.config, job.plan, job.data_report["train"]
    words_per_token = words["words"] / words["tokens"]
    run_log = RunLog(job.run_dir / runs.LOG, words_per_token, plan["flops_per_token"], plan["matmul_flops"])
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
        callbacks=[run_log] if ranks.is_main() else [],
    )
    trainer.word_log = follow(trainer, config, words, job.budget)
    ranks.own_dropout(config["training"]["seed"])
    if not fit(trainer, job.run_dir, job.checkpoint):
        return EXIT_INTERRUPTED
    model = trainer.best_model()
    with ranks.main_first():
        if ranks.is_main():
            runs.print_summary(job.run_dir, write_results(job, trainer, model, run_log))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a language model from scratch, as a YAML file says.",
        epilog="Every flag can be written with hyphens or underscores. The command line beats the file.",
    )  # fmt: skip

    def add(name: str, **options) -> None:
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        parser.add_argument(*spellings, **options)

    add("config", required=True, metavar="FILE", help="the YAML configuration, e.g. config/quickstart.yaml")
    for name, dotted in FLAGS.items():
        section, key = dotted.split(".")
        field = settings.SECTIONS[section].model_fields[key]
        kind = {"type": field.annotation if field.annotation in (int, float) else str}
        if field.annotation in (bool, bool | None):
            kind = {"action": argparse.BooleanOptionalAction, "default": None}
        add(name.replace("_", "-"), help=f"{dotted}: {field.description}", **kind)
    add("resume-from-checkpoint", metavar="PATH", help="a checkpoint directory of this run, or the word latest")
    add("set", action="append", metavar="SECTION.KEY=VALUE", help="any key of the configuration; may be repeated")
    add("sweep", metavar="FILE", help="train every combination of the values in this YAML file (section.key: [values])")
    add("overwrite", action="store_true", help="replace a run of the same name")
    add("dry-run", action="store_true", help="prepare everything, print the derived numbers, train nothing")
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
        if ranks.lost_another(error):
            why = str(error).strip().splitlines()[0]
            return 2, OSError(f"lost another process: killed (out of memory?), or its own error is above ({why})")
        from machine import memory_advice, out_of_memory

        if not out_of_memory(error):
            raise
        what = "CUDA out of memory" if "cuda" in str(error).lower() else "out of memory"
        return 2, MemoryError(f"{what}: {memory_advice(load_config(args.config, args)['training'])}")


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    threads.sleep_soon()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        ranks.start()
        if args.sweep:
            from sweep import run_sweep

            return run_sweep(args, checked_config, attempt)
        code, error = attempt(args)
    except KeyboardInterrupt:
        code, error = EXIT_INTERRUPTED, None
    except (ValueError, OSError) as mistake:
        code, error = 2, mistake
    if error:
        ranks.print_error(error)
    if not code:
        ranks.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
