"""Write what a finished run leaves in its directory: the model, its metrics, curves and card."""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from jinja2 import Template

from babyllama.device import peak_memory_gb
from babyllama.evaluation.generation import generate
from babyllama.files import describe_environment, write_json, write_text
from babyllama.plots import plot_training
from babyllama.training import distributed
from babyllama.training.held_out import evaluate_chunks
from babyllama.training.run_dir import (
    COMPLIANCE_FILE,
    METRICS_FILE,
    RETRAIN,
    checkpoint_step,
    make_weights_readable,
)


def kept_step(trainer) -> int:
    """Return the step whose weights the run keeps: the last, or with early stopping the best."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return checkpoint_step(Path(best)) if best else trainer.state.global_step


def write_results(run, trainer, model, run_log) -> dict:
    """Evaluate the trained model in float32 and save it with its metrics, curves and card.

    `run` is a train.Run. Return the content of training_metrics.json.
    """
    config = run.config
    run_dir = run.run_dir
    seq_length = config["data"]["seq_length"]
    scores = evaluate_chunks(
        model,
        run.data.held_out,
        trainer.byte_lengths,
        config["training"]["batch_size"],
        trainer.mask_from,
    )

    # a plain model directory that from_pretrained loads
    model.save_pretrained(run_dir)
    make_weights_readable(run_dir)
    run.data.tokenizer.save_pretrained(run_dir)
    if not run_log.rows:
        raise ValueError(
            f"{run_log.path} is missing, and no step is left that would write it: "
            f"the model is saved, but without metrics and card; {RETRAIN}"
        )

    samples = generate(
        model.eval(),
        run.data.tokenizer,
        [""] * 3,
        max_new_tokens=min(48, seq_length - 1),
        temperature=0.8,
        top_p=0.95,
        seed=config["training"]["seed"],
    )

    # with early stopping, the results describe the step that was kept
    steps = kept_step(trainer)
    n_chunks = len(trainer.train_dataset)
    chunks_per_step = trainer.get_total_train_batch_size(trainer.args)
    chunks = distributed.chunks_after(steps, n_chunks, chunks_per_step)
    word_log = trainer.word_log
    metrics = {
        "results": {
            **{f"eval_{key}": value for key, value in scores.items()},
            "floor_bits_per_byte": run.data.floor,
            "tokens_per_second": run_log.tokens_per_second(),
            "training_seconds": run_log.seconds,
            "first_step_seconds": run_log.rows[0]["seconds"],
            "peak_memory_gb": peak_memory_gb(model.device),
            "steps": steps,
            "steps_run": trainer.state.global_step,
            "epochs": round(chunks / n_chunks, 4),
            "tokens_trained": chunks * seq_length,
            "words_trained": word_log.words_seen(steps),
        },
        "babylm": word_log.compliance(),
        "plan": run.plan,
        "samples": [text for texts in samples for text in texts],
        "data": run.data.report,
        "config": config,
        "environment": describe_environment(),
    }

    curves = run_dir / "training_curves.png"
    plot_training(
        run_log.rows, curves, config["model"]["name"], _floor_loss(run.data.floor, scores)
    )
    write_text(run_dir / "README.md", model_card(metrics))
    if metrics["babylm"]:
        write_json(run_dir / COMPLIANCE_FILE, metrics["babylm"])
    write_json(run_dir / METRICS_FILE, metrics)  # last: it marks the run as finished
    return metrics


def _floor_loss(bits_per_byte: float | None, scores: dict) -> float | None:
    """Convert the entropy of the grammar from bits per byte to nats per token."""
    if bits_per_byte is None:
        return None
    return bits_per_byte * math.log(2) * scores["bytes"] / scores["tokens"]


def print_summary(run_dir: Path, metrics: dict) -> None:
    """Print the scores and samples of a finished run."""
    results = metrics["results"]
    steps = metrics["plan"]["steps"]
    floor = results["floor_bits_per_byte"]
    note = f" (the best possible on this grammar is {floor:.4f} on average)" if floor else ""
    print(f"\nheld-out loss     {results['eval_loss']:.4f} nats per token")
    print(f"perplexity        {results['eval_perplexity']:.2f} per token")
    print(f"bits per byte     {results['eval_bits_per_byte']:.4f}{note}")
    if results.get("steps", steps) < steps:  # runs of older versions have no "steps"
        print(
            f"stopped early     after step {results['steps_run']:,} of {steps:,}; "
            f"kept the weights of step {results['steps']:,}"
        )
    device = metrics["environment"]["device"]
    print(f"tokens per second {results['tokens_per_second']:,.0f} ({device})")
    for number, sample in enumerate(metrics["samples"], 1):
        print(f"sample {number}          {sample!r}")
    print(f"model, metrics, curves and card: {run_dir}/ (start with {run_dir / 'README.md'})")


def model_card(metrics: dict) -> str:
    """Return the README.md of a run: metadata for model hubs, scores, and how it was trained."""
    config = metrics["config"]
    scores = [
        {"type": key, "value": round(metrics["results"][f"eval_{key}"], 4)}
        for key in ("loss", "perplexity", "bits_per_byte")
    ]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "text", "name": config["data"]["eval_path"]},
        "metrics": scores,
    }
    track = [metrics["babylm"]["track"]] if metrics["babylm"] else []
    header = {
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["babylm", *track, "trained-from-scratch", config["model"]["type"].lower()],
        "model-index": [{"name": config["model"]["name"], "results": [result]}],
    }
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    return Template(template, keep_trailing_newline=True).render(
        **metrics, header=yaml.safe_dump(header, sort_keys=False).strip()
    )
