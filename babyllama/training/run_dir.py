"""What a run directory holds: checkpoints that can be trusted, the marks of a finished run, versions, the model card.

It knows file names and formats only: nothing here trains, scores or imports torch at import. The layout:

    models/<name>/  config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
                    training_config.yaml  data_report.json  metrics.jsonl  training_metrics.json
                    training_curves.png  README.md  checkpoint-<step>/  compliance.json  chck_<N>M/
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from babyllama.files import ROOT, is_model, sha256, write_json, write_text

log = logging.getLogger(__name__)
MANIFEST = "complete.json"
CONFIG_FILE, DATA_REPORT_FILE, LOG_FILE, METRICS_FILE = (
    "training_config.yaml",
    "data_report.json",
    "metrics.jsonl",
    "training_metrics.json",
)
COMPLIANCE_FILE = "compliance.json"
MILLION = 1_000_000  # words, the unit in the names of BabyLM's checkpoints
RESULTS = (
    METRICS_FILE, COMPLIANCE_FILE, "model.safetensors", "config.json", "generation_config.json", "README.md",
    "training_curves.png",
)  # fmt: skip
MEASURED = (
    "evaluation_results.json",
    "evaluation_plots.png",
    "benchmark.json",
    "benchmark.html",
    "benchmark.png",
)
FREE_ON_RESUME = {  # keys that may change when a run is taken up again: they do not touch what was trained so far
    "training.num_epochs", "training.max_steps", "training.logging_steps", "training.dataloader_num_workers",
    "training.save_steps", "training.eval_steps", "training.cuda_graphs", "logging.wandb", "logging.project",
    "logging.output_dir",
}  # fmt: skip


def make_weights_readable(folder: Path) -> None:
    """Weights get the permissions of the other files: safetensors lets nobody but their owner read them."""
    if (folder / "config.json").is_file():
        for file in folder.glob("*.safetensors"):
            file.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))


def seal_checkpoint(folder: Path) -> None:
    """Write complete.json (size and sha256 of every file) as the last act of saving; drop the pickled arguments."""
    make_weights_readable(folder)
    for name in (
        "training_args.bin",
        MANIFEST,
    ):  # the manifest of a checkpoint that was saved here before
        (folder / name).unlink(missing_ok=True)
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.iterdir())
        if p.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def checkpoint_error(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: a missing manifest, a missing or changed file."""
    if not (folder / MANIFEST).is_file():
        return f"it was not saved to its end (no {MANIFEST})"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        facts = [(folder / name, about["bytes"], about["sha256"]) for name, about in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for path, size, digest in facts:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"{path.name} has changed since it was saved"
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint-<step> directories of a run, newest step first."""
    found = [
        p
        for p in run_dir.glob("checkpoint-*")
        if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint-<step> directory."""
    return int(checkpoint.resolve().name.removeprefix("checkpoint-"))


def milestone_name(words: int) -> str:
    """The name of BabyLM's checkpoint at so many words seen, whole millions."""
    return f"chck_{words // MILLION}M"


def milestones(run_dir: Path) -> list[Path]:
    """The chck_<N>M directories of a run, fewest words first."""
    found = {
        int(p.name[5:-1]): p
        for p in run_dir.glob("chck_*M")
        if p.is_dir() and p.name[5:-1].isdigit()
    }
    return [found[millions] for millions in sorted(found)]


def find_checkpoint(which: str, run_dir: Path) -> Path:
    """The checkpoint that `latest` or a path stands for; ValueError or FileNotFoundError where none is whole."""
    if which == "latest":
        for folder in checkpoints(run_dir):
            if not (problem := checkpoint_error(folder)):
                return folder
            log.warning("%s: passed over: %s", folder, problem)
        raise FileNotFoundError(
            f"{run_dir}: no whole checkpoint to resume from; run without --resume_from_checkpoint"
        )
    folder = Path(which)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such checkpoint; give its directory or the word latest"
        )
    if found := checkpoints(folder):
        raise ValueError(
            f"{folder}: is a run, not a checkpoint; give one of its own, such as {found[0]}, or latest"
        )
    if problem := checkpoint_error(folder):
        raise ValueError(f"{folder}: cannot resume from it: {problem}")
    return folder


# ---- whose directory it is ----------------------------------------------------------------------


def _read(path: Path, parse: Callable[[str], Any]) -> dict:
    """A file of a run; ValueError where it is damaged."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
        sections = {CONFIG_FILE: value.values(), METRICS_FILE: [value.get("results")]}.get(
            path.name, ()
        )
        if all(isinstance(part, dict) for part in sections):
            return value
    except (ValueError, AttributeError, OSError, yaml.YAMLError):
        pass
    raise ValueError(
        f"{path}: is damaged; bring it back, or train anew with --overwrite or another --model_name"
    )


def _flat(config: dict) -> dict[str, Any]:
    return {
        f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()
    }


def config_diff(run_dir: Path, config: dict, report: dict) -> dict[str, str]:
    """What differs between the run in run_dir and this configuration and text: {key: "key: was ..., is ..."}."""
    old, new = _flat(_read(run_dir / CONFIG_FILE, yaml.safe_load)), _flat(config)
    lines = {
        k: f"{k}: was {old.get(k)!r}, is {new.get(k)!r}"
        for k in old | new
        if old.get(k) != new.get(k)
    }
    old_report, report = _read(run_dir / DATA_REPORT_FILE, json.loads), dict(report)
    was, now = (r.pop("processes", 1) for r in (old_report, report))
    if was != now:
        lines["processes"] = f"processes: was {was}, is {now}"
    if old_report != report:
        what = (
            "the text, the tokenizer or a teacher"
            if "distillation" in config
            else "the text or the tokenizer"
        )
        lines["data"] = f"data: {what} has changed since ({DATA_REPORT_FILE})"
    return lines


def finished_metrics(run_dir: Path, config: dict, report: dict) -> dict | None:
    """The metrics of a finished run of this very configuration on this very text, else None."""
    if not (run_dir / METRICS_FILE).is_file() or config_diff(run_dir, config, report):
        return None
    return _read(run_dir / METRICS_FILE, json.loads)


def check_output_dir(run_dir: Path, teachers: Sequence[str]) -> None:
    """ValueError where a run's directory holds files of something else, or a teacher, which the run would replace."""
    for teacher in teachers:
        if Path(teacher).resolve().is_relative_to(run_dir.resolve()):
            raise ValueError(f"{teacher}: a teacher (distillation.teachers) in the run's own directory {run_dir}, "
                             "whose files this run would replace; choose another --model_name")  # fmt: skip
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run_dir}: holds files, but no run of train.py; choose another --model_name"
        )


def resolve_checkpoint(
    run_dir: Path, config: dict, report: dict, resume: str | None, overwrite: bool
) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run; ValueError where something would be lost or mixed."""
    if resume:
        checkpoint = find_checkpoint(resume, run_dir)
        if checkpoint.parent.resolve() != run_dir.resolve():
            raise ValueError(f"{checkpoint}: is not of this run, which is in {run_dir}")
        changed = config_diff(checkpoint.parent, config, report)
        if bad := [line for key, line in changed.items() if key not in FREE_ON_RESUME]:
            remedy = (
                "resume with what it was, or train anew with --overwrite or another --model_name"
            )
            raise ValueError(f"{checkpoint}: belongs to another run ({', '.join(bad)}); {remedy}")
        return checkpoint
    saved = checkpoints(run_dir)
    if (
        saved or milestones(run_dir) or any((run_dir / name).exists() for name in RESULTS)
    ) and not overwrite:
        changed = config_diff(run_dir, config, report)
        state = ", ".join(changed.values()) or "the same configuration, not finished"
        goes_on = bool(saved) and changed.keys() <= FREE_ON_RESUME
        raise ValueError(
            f"{run_dir}: holds another run ({state}); add "
            + "--resume_from_checkpoint latest to go on with it, " * goes_on
            + "--overwrite to replace it, or choose another --model_name"
        )
    return None


def check_checkpoint_step(checkpoint: Path | None, steps: int) -> None:
    """ValueError where a checkpoint has gone further than the run is to go."""
    if checkpoint and checkpoint_step(checkpoint) > steps:
        remedy = "ask for more, or train anew with --overwrite or another --model_name"
        raise ValueError(f"{checkpoint}: is past the {steps} steps that are asked for; {remedy}")


def start_run_dir(run_dir: Path, config: dict, report: dict, checkpoint: Path | None) -> None:
    """Write what the run is before its first step; an older run's results go, and its checkpoints.

    Of a run that goes on from a `checkpoint` only the later ones go: what follows them is another course.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (*RESULTS, *MEASURED):  # of weights that are no longer here
        (run_dir / name).unlink(missing_ok=True)
    gone = [*checkpoints(run_dir), *milestones(run_dir)]
    if checkpoint is not None:
        gone = [p for p in checkpoints(run_dir) if checkpoint_step(p) > checkpoint_step(checkpoint)]
    for folder in gone:
        shutil.rmtree(folder)
    write_json(run_dir / DATA_REPORT_FILE, report)
    write_text(run_dir / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))


def training_scores(folder: str | Path) -> dict[str, float | None] | None:
    """What a run of train.py found on its held-out text, and how many words it read; None where that cannot be read."""
    try:
        results = json.loads(Path(folder, METRICS_FILE).read_text(encoding="utf-8"))["results"]
        found = {
            key: float(results[key])
            for key in ("eval_loss", "eval_perplexity", "eval_bits_per_byte")
        }
        return found | {key: results.get(key) for key in ("floor_bits_per_byte", "words_trained")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def require_teacher(folder: str) -> None:
    """FileNotFoundError where no trained model is in folder; names the command that trains one, if a config has it."""
    if not is_model(folder):
        config = Path("config", f"{Path(folder).name}.yaml")
        shipped = (ROOT / config).is_file()
        remedy = (
            f"python train.py --config {config}"
            if shipped
            else "it needs config.json and .safetensors weights"
        )
        raise FileNotFoundError(
            f"{folder}: no trained model here (distillation.teachers); train it first: {remedy}"
        )


def model_card(metrics: dict) -> str:
    """README.md of a run directory: metadata for model hubs, the measured scores, and how the model came about."""
    from jinja2 import Template

    config, results = metrics["config"], metrics["results"]
    scores = [
        {"type": key, "value": round(results[f"eval_{key}"], 4)}
        for key in ("loss", "perplexity", "bits_per_byte")
    ]
    dataset = {"type": "text", "name": config["data"]["eval_path"]}
    measured = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": scores}]
    track = [metrics["babylm"]["track"]] if metrics["babylm"] else []
    header = {
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["babylm", *track, "trained-from-scratch", config["model"]["type"].lower()],
        "model-index": [{"name": config["model"]["name"], "results": measured}],
    }
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    return Template(template, keep_trailing_newline=True).render(
        **metrics, header=yaml.safe_dump(header, sort_keys=False).strip()
    )


# ---- what a run says of itself -------------------------------------------------------------------


def print_summary(run_dir: Path, metrics: dict) -> None:
    """What a finished run came to, on stdout."""
    results = metrics["results"]
    print(f"\nheld-out loss     {results['eval_loss']:.4f} nats per token")
    print(f"perplexity        {results['eval_perplexity']:.2f} per token")
    floor = results["floor_bits_per_byte"]
    known = (
        f" (no model pays less than {floor:.4f} on average over texts of this grammar)"
        if floor
        else ""
    )
    print(f"bits per byte     {results['eval_bits_per_byte']:.4f}{known}")
    if results.get("steps", math.inf) < metrics["plan"]["steps"]:  # not in files of before
        print(f"stopped early     after step {results['steps_run']:,} of {metrics['plan']['steps']:,}; "
              f"the weights of step {results['steps']:,} are kept")  # fmt: skip
    print(
        f"tokens per second {results['tokens_per_second']:,.0f} ({metrics['environment']['device']})"
    )
    for number, sample in enumerate(metrics["samples"], 1):
        print(f"sample {number}          {sample!r}")
    print(f"model, metrics, curves and card: {run_dir}/ (begin with {run_dir / 'README.md'})")
