"""Fill in what the form of BabyLM's leaderboard asks, from what a run directory knows.

answers = form_answers(run_dir, read_run(run_dir))
answers["unknown"]  # the questions that only the team can answer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from babyllama.files import read_json
from babyllama.model_dir import weights_sha256
from babyllama.runs.run_dir import METRICS_FILE


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return training_metrics.json of a finished run that followed BabyLM's rules.

    Raise FileNotFoundError if the run is not finished, ValueError if it has no babylm section.
    """
    file = run_dir / METRICS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run_dir} is not a finished run: it has no {METRICS_FILE}")
    run = read_json(file)
    if not run.get("babylm"):
        raise ValueError(
            f"{run_dir} was trained without a babylm section; add `babylm: {{track: strict-small}}`"
            " to its configuration (config/babylm-strict-small.yaml has it) and train it again"
        )
    return run


def form_answers(
    run_dir: Path, run: dict[str, Any], repository: str | None = None
) -> dict[str, Any]:
    """Return an answer for each question, None if the run does not know it, and `unknown`.

    `run` is the content of training_metrics.json, `repository` the model's name on the Hub.
    """
    config = run["config"]
    model = config["model"]
    training = config["training"]
    plan = run["plan"]
    results = run["results"]
    babylm = run["babylm"]
    model_config = read_json(run_dir / "config.json")
    vocabulary = model_config["vocab_size"]
    hours = results["training_seconds"] / 3600
    on_gpu = not run["environment"]["device"].startswith("CPU")
    teachers = config.get("distillation", {}).get("teachers", [])
    answers = {
        # who and what
        "model_name": model["name"],
        "team_name": None,
        "contact_email": None,
        "paper_title": None,
        "huggingface_repository": repository,
        "revision": "main",
        "track": babylm["track"],
        # the model
        "base_architecture": f"decoder ({model_config['model_type']})",
        "objective": plan["loss"],
        "parameters": plan["parameters"],
        "layers": model["n_layer"],
        "hidden_size": model["hidden_size"],
        "attention_heads": model["n_head"],
        "context_length": config["data"]["seq_length"],
        "vocabulary_size": vocabulary,
        "tokenizer": "byte-level BPE",
        # the text
        "dataset": config["data"]["train_path"],
        "words_of_text": babylm["words"],
        "words_of_text_by_domain": babylm["words_by_domain"],
        "words_seen": babylm["words_seen"],
        "epochs": babylm["epochs"],
        "other_words_learned_from": babylm["other_words_learned_from"],
        "rules_followed": babylm.get("compliant"),
        "rule_problems": babylm.get("problems"),
        "teachers": teachers,
        # how it was trained
        "optimizer": training["optimizer"],
        "learning_rate": training["lr"],
        "learning_rate_scheduler": training["lr_scheduler"],
        "warmup_steps": training["warmup_steps"],
        "weight_decay": training["weight_decay"],
        "batch_tokens": plan["tokens_per_step"],
        "steps": results["steps"],
        "seed": training["seed"],
        "precision": plan["precision"],
        "flops": plan["flops_per_token"] * results["tokens_trained"]
        + plan["optimizer_flops_per_step"] * results["steps"],
        # where, and for how long
        "hardware": run["environment"]["device"],
        "training_hours": hours,
        "gpu_hours": hours * plan["processes"] if on_gpu else 0.0,
        "weights_sha256": weights_sha256(run_dir),
        "code": f"BabyLlama, commit {run['environment']['git_hash']}",
        "description": None,
    }
    return answers | {"unknown": [name for name, value in answers.items() if value is None]}
