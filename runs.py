"""What a run directory holds: checkpoints that can be trusted, the marks of a finished run, versions, the model card.

It knows file names and formats only: nothing here trains, scores or imports torch at import. The layout:

    models/<name>/  config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
                    training_config.yaml  data_report.json  metrics.jsonl  training_metrics.json
                    training_curves.png  README.md  checkpoint-<step>/  compliance.json  chck_<N>M/
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)
MANIFEST = "complete.json"
CONFIG, DATA_REPORT, LOG, METRICS = "training_config.yaml", "data_report.json", "metrics.jsonl", "training_metrics.json"
COMPLIANCE = "compliance.json"
MILLION = 1_000_000  # words, the unit in the names of BabyLM's checkpoints
RESULTS = (
    METRICS, COMPLIANCE, "model.safetensors", "config.json", "generation_config.json", "README.md",
    "training_curves.png",
)  # fmt: skip
MEASURED = ("evaluation_results.json", "evaluation_plots.png", "benchmark.json", "benchmark.html", "benchmark.png")
FREE_ON_RESUME = {  # keys that may change when a run is taken up again: they do not touch what was trained so far
    "training.num_epochs", "training.max_steps", "training.logging_steps", "training.dataloader_num_workers",
    "training.save_steps", "training.eval_steps", "training.cuda_graphs", "logging.wandb", "logging.project",
    "logging.output_dir",
}  # fmt: skip


# ---- checkpoints --------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), as write_text does."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def share_weights(folder: Path) -> None:
    """Weights get the permissions of the other files: safetensors lets nobody but their owner read them."""
    if (folder / "config.json").is_file():
        for file in folder.glob("*.safetensors"):
            file.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))


def require_writable(file: Path, flag: str) -> None:
    """Make the folder of a file of results; ValueError, before any work, where it cannot be written there.

    What stands there already is replaced only if it is a file of results.
    """
    if file.exists() and not _holds_results(file):
        raise ValueError(f"{file}: is there already and holds no results; name another file with {flag}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error.strerror}); name another file with {flag}") from None


def _holds_results(file: Path) -> bool:
    try:
        return file.is_file() and (not file.stat().st_size or "results" in json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        return False


def seal_checkpoint(folder: Path) -> None:
    """Write complete.json (size and sha256 of every file) as the last act of saving; drop the pickled arguments."""
    share_weights(folder)
    for name in ("training_args.bin", MANIFEST):  # the manifest of a checkpoint that was saved here before
        (folder / name).unlink(missing_ok=True)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir()) if p.is_file()}
    write_json(folder / MANIFEST, {"files": files})


def damage(folder: Path) -> str | None:
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
    found = [p for p in run_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint-<step> directory."""
    return int(checkpoint.resolve().name.removeprefix("checkpoint-"))


def milestone(words: int) -> str:
    """The name of BabyLM's checkpoint at so many words seen, whole millions."""
    return f"chck_{words // MILLION}M"


def milestones(run_dir: Path) -> list[Path]:
    """The chck_<N>M directories of a run, fewest words first."""
    found = {int(p.name[5:-1]): p for p in run_dir.glob("chck_*M") if p.is_dir() and p.name[5:-1].isdigit()}
    return [found[millions] for millions in sorted(found)]


def find_checkpoint(which: str, run_dir: Path) -> Path:
    """The checkpoint that `latest` or a path stands for; ValueError or FileNotFoundError where none is whole."""
    if which == "latest":
        for folder in checkpoints(run_dir):
            if not (problem := damage(folder)):
                return folder
            log.warning("%s: passed over: %s", folder, problem)
        raise FileNotFoundError(f"{run_dir}: no whole checkpoint to resume from; run without --resume_from_checkpoint")
    folder = Path(which)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint; give its directory or the word latest")
    if found := checkpoints(folder):
        raise ValueError(f"{folder}: is a run, not a checkpoint; give one of its own, such as {found[0]}, or latest")
    if problem := damage(folder):
        raise ValueError(f"{folder}: cannot resume from it: {problem}")
    return folder


# ---- whose directory it is ----------------------------------------------------------------------


def _read(path: Path, parse: Callable[[str], Any]) -> dict:
    """A file of a run; ValueError where it is damaged."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
        sections = {CONFIG: value.values(), METRICS: [value.get("results")]}.get(path.name, ())
        if all(isinstance(part, dict) for part in sections):
            return value
    except (ValueError, AttributeError, OSError, yaml.YAMLError):
        pass
    raise ValueError(f"{path}: is damaged; bring it back, or train anew with --overwrite or another --model_name")


def _flat(config: dict) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}


def differences(run_dir: Path, config: dict, report: dict) -> dict[str, str]:
    """What differs between the run in run_dir and this configuration and text: {key: "key: was ..., is ..."}."""
    old, new = _flat(_read(run_dir / CONFIG, yaml.safe_load)), _flat(config)
    lines = {k: f"{k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in old | new if old.get(k) != new.get(k)}
    old_report, report = _read(run_dir / DATA_REPORT, json.loads), dict(report)
    was, now = (r.pop("processes", 1) for r in (old_report, report))
    if was != now:
        lines["processes"] = f"processes: was {was}, is {now}"
    if old_report != report:
        what = "the text, the tokenizer or a teacher" if "distillation" in config else "the text or the tokenizer"
        lines["data"] = f"data: {what} has changed since ({DATA_REPORT})"
    return lines


def finished_metrics(run_dir: Path, config: dict, report: dict) -> dict | None:
    """The metrics of a finished run of this very configuration on this very text, else None."""
    if not (run_dir / METRICS).is_file() or differences(run_dir, config, report):
        return None
    return _read(run_dir / METRICS, json.loads)


def require_own(run_dir: Path, teachers: Sequence[str]) -> None:
    """ValueError where a run's directory holds files of something else, or a teacher, which the run would replace."""
    for teacher in teachers:
        if Path(teacher).resolve().is_relative_to(run_dir.resolve()):
            raise ValueError(f"{teacher}: a teacher (distillation.teachers) in the run's own directory {run_dir}, "
                             "whose files this run would replace; choose another --model_name")  # fmt: skip
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / CONFIG).is_file():
        raise ValueError(f"{run_dir}: holds files, but no run of train.py; choose another --model_name")


def claim(run_dir: Path, config: dict, report: dict, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run; ValueError where something would be lost or mixed."""
    if resume:
        checkpoint = find_checkpoint(resume, run_dir)
        if checkpoint.parent.resolve() != run_dir.resolve():
            raise ValueError(f"{checkpoint}: is not of this run, which is in {run_dir}")
        changed = differences(checkpoint.parent, config, report)
        if bad := [line for key, line in changed.items() if key not in FREE_ON_RESUME]:
            remedy = "resume with what it was, or train anew with --overwrite or another --model_name"
            raise ValueError(f"{checkpoint}: belongs to another run ({', '.join(bad)}); {remedy}")
        return checkpoint
    saved = checkpoints(run_dir)
    if (saved or milestones(run_dir) or any((run_dir / name).exists() for name in RESULTS)) and not overwrite:
        changed = differences(run_dir, config, report)
        state = ", ".join(changed.values()) or "the same configuration, not finished"
        goes_on = bool(saved) and changed.keys() <= FREE_ON_RESUME
        raise ValueError(
            f"{run_dir}: holds another run ({state}); add "
            + "--resume_from_checkpoint latest to go on with it, " * goes_on
            + "--overwrite to replace it, or choose another --model_name"
        )
    return None


def require_ahead(checkpoint: Path | None, steps: int) -> None:
    """ValueError where a checkpoint has gone further than the run is to go."""
    if checkpoint and step_of(checkpoint) > steps:
        remedy = "ask for more, or train anew with --overwrite or another --model_name"
        raise ValueError(f"{checkpoint}: is past the {steps} steps that are asked for; {remedy}")


def begin(run_dir: Path, config: dict, report: dict, checkpoint: Path | None) -> None:
    """Write what the run is before its first step; an older run's results go, and its checkpoints.

    Of a run that goes on from a `checkpoint` only the later ones go: what follows them is another course.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (*RESULTS, *MEASURED):  # of weights that are no longer here
        (run_dir / name).unlink(missing_ok=True)
    gone = [*checkpoints(run_dir), *milestones(run_dir)]
    if checkpoint is not None:
        gone = [p for p in checkpoints(run_dir) if step_of(p) > step_of(checkpoint)]
    for folder in gone:
        shutil.rmtree(folder)
    write_json(run_dir / DATA_REPORT, report)
    write_text(run_dir / CONFIG, yaml.safe_dump(config, sort_keys=False))


def tokenizer_sources(path: str | Path) -> list[dict] | None:
    """The files that train_tokenizer.py trained the tokenizer at `path` on; None without a record of this very file."""
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        facts = json.loads(tokenizer_record(file).read_text(encoding="utf-8"))
        return facts["sources"] if facts["tokenizer_sha256"] == sha256(file) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def tokenizer_record(file: Path) -> Path:
    """Where train_tokenizer.py says what the tokenizer in `file` learned from."""
    return file.with_name(file.name.removesuffix(".json") + ".source.json")


def warn_of_leaks(report: dict) -> None:
    """A warning for held-out files that are training files too: scores on them say nothing of other text."""
    nothing = hashlib.sha256(b"").hexdigest()
    known = {s["sha256"]: s["file"] for s in report["train"]["sources"] if s["sha256"] != nothing}
    for source in report["validation"]["sources"]:
        if source["sha256"] in known:
            log.warning("%s: the held-out text is training text too: %s", source["file"], known[source["sha256"]])


def training_scores(folder: str | Path) -> dict[str, float | None] | None:
    """What a run of train.py found on its held-out text, and how many words it read; None where that cannot be read."""
    try:
        results = json.loads(Path(folder, METRICS).read_text(encoding="utf-8"))["results"]
        found = {key: float(results[key]) for key in ("eval_loss", "eval_perplexity", "eval_bits_per_byte")}
        return found | {key: results.get(key) for key in ("floor_bits_per_byte", "words_trained")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_model(folder: str | Path) -> bool:
    """Whether a directory holds a model that can be loaded: a config.json and weights."""
    return (Path(folder) / "config.json").is_file() and any(Path(folder).glob("*.safetensors"))


def weights_sha256(folder: str | Path) -> str:
    """One hash of a model's weights and config.json."""
    files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def require_teacher(folder: str) -> None:
    """FileNotFoundError where no trained model is in folder; names the command that trains one, if a config has it."""
    if not is_model(folder):
        config = Path("config", f"{Path(folder).name}.yaml")
        shipped = (Path(__file__).parent / config).is_file()
        remedy = f"python train.py --config {config}" if shipped else "it needs config.json and .safetensors weights"
        raise FileNotFoundError(f"{folder}: no trained model here (distillation.teachers); train it first: {remedy}")


# ---- where a figure comes from ------------------------------------------------------------------


def environment(device: str | None = None) -> dict[str, str | None]:
    """Versions, machine (what `device` stands for in inference.pick_device) and git commit, for a file of results."""
    import torch

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:  # no git here
        git = ""
    asked = str(device or "auto")
    on_gpu = torch.cuda.is_available() and asked.startswith(("auto", "cuda"))
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(asked.replace("auto", "cuda"))
        if on_gpu
        else f"CPU, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}",
        "git_hash": git or None,
    }


def model_card(metrics: dict) -> str:
    """README.md of a run directory: metadata for model hubs, the measured scores, and how the model came about."""
    from jinja2 import Template

    config, results = metrics["config"], metrics["results"]
    scores = [
        {"type": key, "value": round(results[f"eval_{key}"], 4)} for key in ("loss", "perplexity", "bits_per_byte")
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
    known = f" (no model pays less than {floor:.4f} on average over texts of this grammar)" if floor else ""
    print(f"bits per byte     {results['eval_bits_per_byte']:.4f}{known}")
    if results.get("steps", math.inf) < metrics["plan"]["steps"]:  # not in files of before
        print(f"stopped early     after step {results['steps_run']:,} of {metrics['plan']['steps']:,}; "
              f"the weights of step {results['steps']:,} are kept")  # fmt: skip
    print(f"tokens per second {results['tokens_per_second']:,.0f} ({metrics['environment']['device']})")
    for number, sample in enumerate(metrics["samples"], 1):
        print(f"sample {number}          {sample!r}")
    print(f"model, metrics, curves and card: {run_dir}/ (begin with {run_dir / 'README.md'})")


def prepare_wandb(config: dict) -> None:
    """Check that wandb is installed, and keep it from asking for a login: without a key it logs to files."""
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb: true, but the wandb package is not installed: pip install wandb")
    os.environ["WANDB_PROJECT"] = config["logging"]["project"]
    keys = Path.home() / ".netrc"
    logged_in = os.environ.get("WANDB_API_KEY") or (keys.is_file() and "wandb" in keys.read_text(errors="replace"))
    if not logged_in and "WANDB_MODE" not in os.environ:
        os.environ["WANDB_MODE"] = "offline"
        log.warning("wandb: no key on this machine: the log stays on disk (wandb sync sends it later)")
