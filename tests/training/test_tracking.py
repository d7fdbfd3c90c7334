"""Trackers: what Weights & Biases, TensorBoard and Trainer's own trackers are sent."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import yaml
from conftest import errors_of, rows_of, sentences, tiny_config

import train
from babyllama.config import check_config
from babyllama.training.arguments import training_arguments
from babyllama.training.tracking import open_trackers, row_scalars

SETTINGS = {
    "model__name": "tracked",
    "training__optimizer": "muon",
    "training__lr_scheduler": "wsd",
    "training__weight_decay": 0.03,
    "training__warmup_ratio": 0.3,
    "training__max_steps": 4,
    "training__eval_steps": 2,
    "training__logging_steps": 1,
    "training__ema": 0.5,
    "logging__wandb": True,
    "logging__project": "babies",
    "logging__tensorboard": True,
}


def isolate_wandb(patch, folder: Path) -> None:
    """Make W&B find no login of the user, and print nothing."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        patch.delenv(name, raising=False)
    patch.setenv("NETRC", str(folder / "netrc"))
    patch.setenv("WANDB_CONFIG_DIR", str(folder / "wandb-config"))
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    patch.setenv("WANDB_CONSOLE", "off")
    patch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tokenizer_file, corpus_dir) -> Path:
    """Return the directory of a finished run with both trackers and a benchmark."""
    root = tmp_path_factory.mktemp("tracked")
    pairs = [
        {"sentence_good": good, "sentence_bad": bad, "UID": "any"}
        for good, bad in zip(sentences(20, seed=9), sentences(20, seed=10), strict=True)
    ]
    tasks = {"tasks": {"pairs": {"type": "minimal_pairs", "items": pairs}}}
    (root / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    (root / "dev").mkdir()
    for seed, domain in enumerate(("childes", "toy")):  # each domain has its scores
        (root / "dev" / f"{domain}.dev").write_text("\n".join(sentences(60, seed=seed)))
    config = tiny_config(
        root,
        tokenizer_file,
        corpus_dir,
        data__eval_path=str(root / "dev"),
        training__benchmark=str(root / "tasks.yaml"),
        **SETTINGS,
    )
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        isolate_wandb(patch, root)
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(root / "tiny.yaml")]) == 0
    return root / "models" / "tracked"


# ---- Weights & Biases ---------------------------------------------------------------------------


def wandb_records(file: Path) -> list:
    """Return the records of an offline file of W&B.

    After 7 bytes of its own, it is a log of LevelDB: blocks of 32 KiB, in which each piece has a
    checksum of 4 bytes, a length of 2 and a type of 1: a whole record, or its first, middle or
    last part.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    records = []
    parts = b""
    position = 7
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        if position + 7 + length > len(content):
            break
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def finished_records(file: Path) -> list:
    """Return the records once the file is complete: W&B writes its end a moment after finish()."""
    deadline = time.monotonic() + 60
    records = wandb_records(file)
    while not records or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "W&B did not finish its file"
        time.sleep(0.1)
        records = wandb_records(file)
    return records


def add_values(values: dict, items) -> None:
    """Add the keys and values of the items of a record, which may be nested, to a dict."""
    for item in items:
        *parents, key = [item.key] if item.key else item.nested_key
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = json.loads(item.value_json)


class OfflineRun:
    """What W&B has recorded of one run."""

    def __init__(self, file: Path):
        self.config = {}
        self.summary = {}
        self.history = []
        for record in finished_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                add_values(self.config, record.run.config.update)
            elif kind == "config":
                add_values(self.config, record.config.update)
            elif kind == "summary":
                add_values(self.summary, record.summary.update)
            elif kind == "history":
                self.history.append({})
                add_values(self.history[-1], record.history.item)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def offline_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


@pytest.fixture(scope="module")
def wandb_run(tracked) -> OfflineRun:
    (file,) = offline_files(tracked)
    return OfflineRun(file)


def test_wandb_gets_the_configuration_of_the_run(wandb_run, tracked):
    config = yaml.safe_load((tracked / "training_config.yaml").read_text())
    metrics = json.loads((tracked / "training_metrics.json").read_text())
    assert {section: wandb_run.config[section] for section in config} == config
    assert set(wandb_run.config) - {"_wandb"} == {*config, "plan", "data_report", "environment"}
    assert wandb_run.config["training"]["optimizer"] == "muon"
    assert wandb_run.config["plan"]["warmup_steps"] == 2  # 0.3 x 4 steps, rounded up
    assert wandb_run.config["environment"] == metrics["environment"]
    (source,) = wandb_run.config["data_report"]["train"]["sources"]
    assert source["sha256"] == metrics["data"]["train"]["sources"][0]["sha256"]
    assert (wandb_run.run.project, wandb_run.run.display_name) == ("babies", "tracked")
    assert wandb_run.exit_code == 0


def test_wandb_gets_every_row_of_the_log(wandb_run, tracked):
    expected = {}
    for row in rows_of(tracked):
        values = {key: value for key, value in row.items() if key not in ("step", "samples")}
        for key, value in values.items():
            name = key.replace("eval_", "eval/") if "eval_" in key else f"train/{key}"
            name = key if key.startswith("benchmark/") else name
            expected.setdefault(row["step"], {})[name] = value
    history = {}
    for row in wandb_run.history:
        step = row["_step"]
        kept = {k: v for k, v in row.items() if not k.startswith("_") and not isinstance(v, dict)}
        history.setdefault(step, {}).update(kept)
    assert history == expected
    assert list(history) == [1, 2, 3, 4]
    assert {"train/tokens_per_second", "train/words_per_second", "train/memory_gb"} <= set(
        history[1]
    )
    assert {"eval/bits_per_byte", "benchmark/pairs"} <= set(history[2])


def test_wandb_gets_samples_as_tables_and_the_results_in_the_summary(wandb_run, tracked):
    def table(entry: dict) -> dict:
        (folder,) = tracked.glob("wandb/offline-run-*/files")
        return json.loads((folder / entry["path"]).read_text())

    metrics = json.loads((tracked / "training_metrics.json").read_text())
    samples = [(row["step"], text) for row in rows_of(tracked) for text in row.get("samples", ())]
    assert table(wandb_run.summary["samples"])["data"] == [list(sample) for sample in samples]
    final_samples = [[text] for text in metrics["samples"]]
    assert table(wandb_run.summary["final/samples"])["data"] == final_samples
    final = {
        key.removeprefix("final/"): value
        for key, value in wandb_run.summary.items()
        if key.startswith("final/") and key != "final/samples"
    }
    results = metrics["results"]
    for domain, scores in results.pop("eval_by_domain").items():
        results |= {f"eval_by_domain/{domain}/{key}": score for key, score in scores.items()}
    assert final == {key: value for key, value in results.items() if value is not None}
    assert {"eval_loss", "eval_by_domain/toy/bits_per_byte", "benchmark/pairs"} <= set(final)
    assert wandb_run.summary["training_curves"]["path"].endswith(".png")


def test_a_resumed_run_continues_its_wandb_run_and_a_failed_one_is_marked(
    tmp_path, monkeypatch, caplog
):
    isolate_wandb(monkeypatch, tmp_path)
    config = {
        "model": {"name": "mine"},
        "logging": {"wandb": True, "tensorboard": False, "project": "p"},
    }
    with pytest.raises(KeyboardInterrupt), open_trackers(config, tmp_path, {}) as (tracker,):
        tracker.log_row({"step": 1, "loss": 3.0})
        raise KeyboardInterrupt
    first = OfflineRun(*offline_files(tmp_path))
    shutil.rmtree(tmp_path / "wandb")  # W&B names folders by the second
    with open_trackers(config, tmp_path, {}) as (tracker,):
        # RunLog sends the rows before the checkpoint once more
        for step in (1, 2):
            tracker.log_row({"step": step, "loss": 3.0 / step})
    second = OfflineRun(*offline_files(tmp_path))
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.run.run_id == second.run.run_id
    assert [row["train/loss"] for row in second.history] == [3.0, 1.5]
    assert "wandb: not logged in (wandb login); logging to files in" in caplog.text


# ---- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_shows_curves_samples_and_figures(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    rows = rows_of(tracked)
    for row in rows:
        for key, value in row_scalars(row).items():
            by_step = {event.step: event.value for event in events.Scalars(key)}
            assert by_step[row["step"]] == pytest.approx(value, rel=1e-6), key
    metrics = json.loads((tracked / "training_metrics.json").read_text())
    (final_loss,) = events.Scalars("final/eval_loss")
    assert final_loss.value == pytest.approx(metrics["results"]["eval_loss"])

    def texts(name: str) -> list[str]:
        tensors = [event.tensor_proto.string_val[0] for event in events.Tensors(name)]
        return [tensor.decode() for tensor in tensors]

    samples = [row["samples"][0] for row in rows if "samples" in row]
    assert texts("samples/1/text_summary") == [
        "    " + sample.replace("\n", "\n    ") for sample in samples
    ]
    assert json.loads(texts("config/text_summary")[0])["training"]["optimizer"] == "muon"
    (picture,) = events.Images("training_curves")
    png = (tracked / "training_curves.png").read_bytes()
    assert (picture.width, picture.height) == struct.unpack(">II", png[16:24])


# ---- other trackers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("comet_ml", "logging.report_to: CometCallback requires comet-ml"),
        ("trackyo", "logging.report_to: trackyo is not supported, only"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(name, error, config_file, capsys):
    assert train.main(["--config", str(config_file(logging__report_to=[name])), "--dry-run"]) == 2
    (line,) = errors_of(capsys)
    assert error in line


def test_trainers_own_trackers_get_our_configuration(tmp_path, tokenizer_file, corpus_dir):
    config = check_config(tiny_config(tmp_path, tokenizer_file, corpus_dir))
    arguments = training_arguments(config, tmp_path, "fp32", facts={**config, "plan": {"steps": 9}})
    recorded = arguments.to_dict()
    assert recorded["training.weight_decay"] == config["training"]["weight_decay"]
    assert recorded["plan.steps"] == 9
    assert "weight_decay" not in recorded
