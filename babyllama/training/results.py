"""Write the results of a run at its end.

train.py calls these functions one after the other: save the model, score it, describe the training,
draw samples, and write the metrics, the curves and the model card. Nothing here trains.
"""

from __future__ import annotations

import math
import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from babyllama.cli import printable
from babyllama.device import peak_memory_gb
from babyllama.evaluation.generation import generate
from babyllama.evaluation.report import enumeration, run_text
from babyllama.files import DRAFT, write_json, write_text
from babyllama.model_dir import make_weights_readable
from babyllama.plots import save_panels, training_panels
from babyllama.runs.finished_run import describe_run
from babyllama.runs.resume import changes_at
from babyllama.runs.run_dir import (
    BENCHMARK_PREFIX,
    COMPLIANCE_FILE,
    CURVES_FILE,
    METRICS_FILE,
    RETRAIN,
)
from babyllama.training.held_out import TokenDomains

MAX_DOMAINS = 12  # domains in a list of them; training_metrics.json has all of them


def save_model(run_dir: Path, model, tokenizer, run_log) -> None:
    """Save the model and its tokenizer as a plain directory that from_pretrained can load.

    Raise ValueError if the log is empty, because without it there is no speed and no curve to
    report. That happens if a finished run is resumed after somebody deleted its log.
    """
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".model.", suffix=DRAFT) as draft:
        model.save_pretrained(draft)
        make_weights_readable(Path(draft))
        tokenizer.save_pretrained(draft)
        for file in Path(draft).iterdir():  # a move never leaves half a file, nor follows a link
            file.replace(run_dir / file.name)
    if not run_log.rows:
        raise ValueError(
            f"{run_log.path} is missing, and there is no step left to train that would write it: "
            f"the model is saved, but without metrics and model card; {RETRAIN}"
        )


def measure_model(trainer, model, domains: TokenDomains) -> dict[str, float | dict]:
    """Return the scores on the held-out text, in float32, each with the prefix "eval_".

    `domains` are those of the tokens of the held-out chunks.
    """
    scores = trainer.score_held_out(model, domains=domains)
    return {f"eval_{name}": score for name, score in scores.items()}


def measure_benchmark(trainer, model) -> dict[str, float]:
    """Return the scores of training.benchmark on the final model, or {} without a benchmark."""
    if trainer.benchmark is None:
        return {}
    # the last scores are of other weights if early stopping has gone back to an earlier step
    step, scores = trainer.benchmarked or (None, {})
    if step != trainer.kept_step():
        scores = trainer.benchmark.scores(model)
    return {key: value for key, value in scores.items() if key.startswith(BENCHMARK_PREFIX)}


def measure_training(trainer, run_log, word_counter, seq_length: int) -> dict[str, float]:
    """Return the speed and memory of the training, and how much text the model has seen.

    With early stopping the amounts of text are those of the weights that were kept; `steps_run`
    counts all steps.
    """
    steps = trainer.kept_step()
    chunks = int(trainer.steps.chunks_seen[steps])
    return {
        "tokens_per_second": run_log.tokens_per_second(),
        "training_seconds": run_log.seconds,
        "first_step_seconds": run_log.rows[0]["seconds"],
        "peak_memory_gb": peak_memory_gb(trainer.args.device),
        "steps": steps,
        "steps_run": trainer.state.global_step,
        "epochs": round(chunks / trainer.steps.n_chunks, 4),
        "tokens_trained": chunks * seq_length,
        "words_trained": word_counter.words_seen(steps),
    }


def draw_samples(model, tokenizer, config: dict) -> list[str]:
    """Return three texts that the model writes without a prompt."""
    samples = generate(
        model.eval(),
        tokenizer,
        [""] * 3,
        max_new_tokens=min(48, config["data"]["seq_length"] - 1),
        temperature=0.8,
        top_p=0.95,
        seed=config["training"]["seed"],
    )
    return [text for texts in samples for text in texts]


def write_documents(run_dir: Path, metrics: dict, rows: list[dict]) -> None:
    """Write the training curves, the model card, BabyLM's compliance.json and the metrics.

    `metrics` is the content of training_metrics.json, `rows` the training log.
    """
    title = metrics["config"]["model"]["name"]
    panels = training_panels(rows, _floor_loss(metrics["results"]))
    save_panels(panels, run_dir / CURVES_FILE, title)
    write_text(run_dir / "README.md", model_card(metrics))
    if metrics["babylm"]:
        write_json(run_dir / COMPLIANCE_FILE, metrics["babylm"])
    # this file marks the run as finished, so it must be the last one
    write_json(run_dir / METRICS_FILE, metrics)


def _floor_loss(results: dict) -> float | None:
    """Convert the entropy of the grammar, if it is known, from bits per byte to nats per token."""
    bits_per_byte = results["floor_bits_per_byte"]
    if bits_per_byte is None:
        return None
    return bits_per_byte * math.log(2) * results["eval_bytes"] / results["eval_tokens"]


def print_summary(run_dir: Path, metrics: dict) -> None:
    """Print the scores and the samples of a finished run."""
    results = metrics["results"]
    steps = metrics["plan"]["steps"]
    entropy = results["floor_bits_per_byte"]

    note = f" (the best possible on this grammar is {entropy:.4f} on average)" if entropy else ""
    print(f"\nheld-out loss     {results['eval_loss']:.4f} nats per token")
    print(f"perplexity        {results['eval_perplexity']:.2f} per token")
    print(f"bits per byte     {results['eval_bits_per_byte']:.4f}{note}")
    for line in domain_lines(results):
        print(line)
    for key, value in results.items():
        if key.startswith(BENCHMARK_PREFIX):
            print(f"{key:<17} {value:.4f}")

    if results.get("steps", steps) < steps:  # older versions wrote no "steps"
        print(
            f"stopped early     after step {results['steps_run']:,} of {steps:,}; "
            f"kept the weights of step {results['steps']:,}"
        )
    print_verdict(metrics.get("babylm"))
    device = metrics["environment"]["device"]
    print(f"tokens per second {results['tokens_per_second']:,.0f} ({device})")

    # what the model writes, and where to go on
    for number, sample in enumerate(metrics["samples"], 1):
        print(f"sample {number}          {sample!r}")
    print(f"model, metrics, curves and card: {run_dir}/ (start with {run_dir / 'README.md'})")
    command = ["python", "submit.py" if metrics["babylm"] else "evaluate.py", str(run_dir)]
    if metrics["babylm"]:
        command += ["--eval-data", "evaluation_data", "--output", "submission"]
    print(f"next  {shlex.join(command)}")


def print_verdict(compliance: dict | None) -> None:
    """Print if a run followed BabyLM's rules; nothing without a babylm section."""
    if compliance is None or "compliant" not in compliance:  # older versions wrote no verdict
        return
    if compliance["compliant"]:
        print(f"BabyLM's rules    followed, track {compliance['track']} ({COMPLIANCE_FILE})")
    for problem in compliance["problems"]:
        print(f"BabyLM's rules    {problem}")
    for note in compliance["notes"]:
        print(f"note              {note}")


def domain_lines(results: dict) -> list[str]:
    """Return a line for each domain of the held-out text; none if there is only one domain."""
    by_domain = results.get("eval_by_domain", {})  # older versions wrote none
    shown = list(by_domain)[:MAX_DOMAINS]
    width = max([15, *map(len, shown)])
    lines = []
    for name in shown:
        scores = by_domain[name]
        value = scores["bits_per_byte"]
        bits = "-" if value is None else f"{value:.4f}"
        lines.append(f"  {name:<{width}} {bits:<6} ({scores['bytes']:,} bytes)")
    if len(by_domain) > len(shown):
        lines.append(f"  {len(by_domain) - len(shown)} more domains in {METRICS_FILE}")
    return lines


def model_card(metrics: dict) -> str:
    """Return the README.md of a run: metadata for model hubs, the scores, and the training."""
    config = metrics["config"]
    run = describe_run(metrics)
    held_out = metrics["results"].get("eval_by_domain", {})  # none if there is only one
    held_out_domains = dict.fromkeys(
        source["domain"] for source in metrics["data"]["validation"]["sources"]
    )

    # the header, which model hubs read
    scores = [
        {"type": key, "value": round(metrics["results"][f"eval_{key}"], 4)}
        for key in ("loss", "perplexity", "bits_per_byte")
    ]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "text", "name": f"held-out {enumeration(list(held_out_domains))}"},
        "metrics": scores,
    }
    track = ["babylm", metrics["babylm"]["track"]] if metrics["babylm"] else []
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*track, "trained-from-scratch", config["model"]["type"].lower()],
        "model-index": [{"name": config["model"]["name"], "results": [result]}],
    }

    # the text
    history = metrics["data"].get("history", [])
    changes = {part["step"]: changes_at(history, part["step"]) for part in history[1:]}
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(finalize=_as_markdown, keep_trailing_newline=True)
    return environment.from_string(template).render(
        **metrics,
        description=run_text(run),
        domains=dict.fromkeys(held_out, 0) | run["domains"],
        held_out=held_out,
        changes=changes,
        max_domains=MAX_DOMAINS,
        header=yaml.safe_dump(header, sort_keys=False).strip(),
    )


def _as_markdown(value: Any) -> Any:
    """Return a value so that Markdown shows it as text: a `<` would start a tag."""
    return printable(value).replace("<", "&lt;") if isinstance(value, str) else value
