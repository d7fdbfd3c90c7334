"""What a finished run leaves in its directory: the model, its scores in float32, metrics, curves and card."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import ranks
import runs
from inference import generate
from machine import peak_memory_gb
from plots import plot_training
from trainer import evaluate_chunks


def kept_step(trainer) -> int:
    """The step whose weights a run leaves: the last, or with early stopping that of the best evaluation."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return runs.step_of(Path(best)) if best else trainer.state.global_step


def write_results(job: SimpleNamespace, trainer, model, run_log) -> dict:
    """Evaluate the trained model in float32, save it as a plain model directory, and write metrics, curves and card.

    `job` is what train.prepare put together; returns the content of training_metrics.json.
    """
    config, run_dir, tokenizer, floor = job.config, job.run_dir, job.tokenizer, job.floor
    final = evaluate_chunks(
        model, trainer.eval_dataset, trainer.byte_lengths, config["training"]["batch_size"], trainer.loss.mask_from
    )
    model.save_pretrained(run_dir)
    runs.share_weights(run_dir)
    tokenizer.save_pretrained(run_dir)
    if not run_log.rows:
        raise ValueError(f"{run_log.path}: its rows are lost, and no step is left that would tell of the run: the "
                         "model is saved, but no metrics and no card; train anew with --overwrite")  # fmt: skip
    samples = generate(model.eval(), tokenizer, [""] * 3, max_new_tokens=min(48, config["data"]["seq_length"] - 1),
                       temperature=0.8, top_p=0.95, seed=config["training"]["seed"])  # fmt: skip
    steps = kept_step(trainer)
    chunks = ranks.chunks_after(steps, len(trainer.train_dataset), trainer.get_total_train_batch_size(trainer.args))
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
        "environment": runs.environment(),
    }
    floor_nats = floor * math.log(2) * final["bytes"] / final["tokens"] if floor else None
    plot_training(run_log.rows, run_dir / "training_curves.png", config["model"]["name"], floor_nats)
    (run_dir / "README.md").write_text(runs.model_card(metrics), encoding="utf-8")
    if metrics["babylm"]:
        runs.write_json(run_dir / runs.COMPLIANCE, metrics["babylm"])
    runs.write_json(run_dir / runs.METRICS, metrics)  # last: its presence says that the run is finished
    return metrics
