"""Trackers: what Weights & Biases, TensorBoard and Trainer's own trackers are sent."""

from __future__ import annotations

import json
import shutil
import struct
import sys
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


class SpiedRun:
    """Keep what a run of W&B is sent, and pass it on."""

    def __init__(self, run):
        self.run = run
        self.rows = []  # (step, values)
        self._log = run.log
        self._finish = run.finish
        run.log = self.log
        run.finish = self.finish

    def log(self, values: dict, step: int | None = None) -> None:
        self.rows.append((step, values))
        self._log(values, step=step)

    def finish(self, exit_code: int) -> None:
        self.config = dict(self.run.config)
        self.summary = dict(self.run.summary)
        self.exit_code = exit_code
        self._finish(exit_code=exit_code)


def spy_on_wandb(patch, folder: Path) -> list[SpiedRun]:
    """Return the list that will hold every run of W&B; none finds a login of the user or prints."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        patch.delenv(name, raising=False)
    patch.setenv("NETRC", str(folder / "netrc"))
    patch.setenv("WANDB_CONFIG_DIR", str(folder / "wandb-config"))
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    patch.setenv("WANDB_CONSOLE", "off")
    patch.setenv("WANDB_SILENT", "true")
    runs = []
    init = wandb.init

    def start(**options):
        assert options["mode"] == "offline"
        run = init(**options)
        runs.append(SpiedRun(run))
        return run

    patch.setattr(wandb, "init", start)
    return runs


@pytest.fixture(scope="module")
def tracked_runs(tmp_path_factory, tokenizer_file, corpus_dir) -> tuple[Path, list[SpiedRun]]:
    """Return a finished run with both trackers and a benchmark, and its runs of W&B."""
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
        wandb_runs = spy_on_wandb(patch, root)
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(root / "tiny.yaml")]) == 0
    return root / "models" / "tracked", wandb_runs


@pytest.fixture
def tracked(tracked_runs) -> Path:
    return tracked_runs[0]


@pytest.fixture
def wandb_run(tracked_runs) -> SpiedRun:
    (run,) = tracked_runs[1]
    return run


# ---- Weights & Biases ---------------------------------------------------------------------------


def test_wandb_gets_the_configuration_of_the_run(wandb_run, tracked):
    config = yaml.safe_load((tracked / "training_config.yaml").read_text())
    metrics = json.loads((tracked / "training_metrics.json").read_text())
    assert {section: wandb_run.config[section] for section in config} == config
    assert set(wandb_run.config) == {*config, "plan", "data_report", "environment"}
    assert wandb_run.config["training"]["optimizer"] == "muon"
    assert wandb_run.config["plan"]["warmup_steps"] == 2  # 0.3 x 4 steps, rounded up
    assert wandb_run.config["environment"] == metrics["environment"]
    (source,) = wandb_run.config["data_report"]["train"]["sources"]
    assert source["sha256"] == metrics["data"]["train"]["sources"][0]["sha256"]
    assert (wandb_run.run.project, wandb_run.run.name) == ("babies", "tracked")
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
    for step, values in wandb_run.rows[:-1]:  # the last one has the results
        numbers = {key: value for key, value in values.items() if key != "samples"}
        history.setdefault(step, {}).update(numbers)
    assert history == expected
    assert list(history) == [1, 2, 3, 4]
    assert {"train/tokens_per_second", "train/words_per_second", "train/memory_gb"} <= set(
        history[1]
    )
    assert {"eval/bits_per_byte", "benchmark/pairs"} <= set(history[2])


def test_wandb_gets_samples_as_tables_and_the_results_in_the_summary(wandb_run, tracked):
    metrics = json.loads((tracked / "training_metrics.json").read_text())
    samples = [(row["step"], text) for row in rows_of(tracked) for text in row.get("samples", ())]
    *rows, (_, results_row) = wandb_run.rows
    tables = [values["samples"] for _, values in rows if "samples" in values]
    assert tables[-1].data == [list(sample) for sample in samples]
    assert results_row["final/samples"].data == [[text] for text in metrics["samples"]]
    assert results_row.keys() == {"final/samples", "training_curves"}
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


def test_a_resumed_run_continues_its_wandb_run_and_a_failed_one_is_marked(
    tmp_path, monkeypatch, caplog
):
    runs = spy_on_wandb(monkeypatch, tmp_path)
    config = {
        "model": {"name": "mine"},
        "logging": {"wandb": True, "tensorboard": False, "project": "p"},
    }
    with pytest.raises(KeyboardInterrupt), open_trackers(config, tmp_path, {}) as (tracker,):
        tracker.log_row({"step": 1, "loss": 3.0})
        raise KeyboardInterrupt
    shutil.rmtree(tmp_path / "wandb")  # W&B names folders by the second
    with open_trackers(config, tmp_path, {}) as (tracker,):
        # RunLog sends the rows before the checkpoint once more
        for step in (1, 2):
            tracker.log_row({"step": step, "loss": 3.0 / step})
    first, second = runs
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.run.id == second.run.id
    assert [values["train/loss"] for _, values in second.rows] == [3.0, 1.5]
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
        ("flyte", "logging.report_to: FlyteCallback requires flytekit to be installed"),
        ("trackyo", "logging.report_to: trackyo is not supported, only"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(name, error, config_file, capsys):
    assert train.main(["--config", str(config_file(logging__report_to=[name])), "--dry-run"]) == 2
    (line,) = errors_of(capsys)
    assert error in line


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line_before_any_text_is_read(
    package, config_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    config = config_file(**{f"logging__{package}": True, "logging__project": "babies"})
    assert train.main(["--config", str(config)]) == 2
    (line,) = errors_of(capsys)
    assert f"logging.{package}: true, but {package} is not installed: pip install" in line
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "models").exists()


def test_trainers_own_trackers_get_our_configuration(tmp_path, tokenizer_file, corpus_dir):
    config = check_config(tiny_config(tmp_path, tokenizer_file, corpus_dir))
    arguments = training_arguments(config, tmp_path, "fp32")
    arguments.hyperparameters = {**config, "plan": {"steps": 9}}
    recorded = arguments.to_dict()
    assert recorded["training.weight_decay"] == config["training"]["weight_decay"]
    assert recorded["plan.steps"] == 9
    assert "weight_decay" not in recorded


def test_trainers_own_trackers_get_the_plan_of_a_run(config_file, monkeypatch):
    trainers = []
    make_trainer = train.make_trainer

    def make_and_keep(*args):
        trainers.append(make_trainer(*args))
        return trainers[-1]

    monkeypatch.setattr(train, "make_trainer", make_and_keep)
    assert train.main(["--config", str(config_file(training__max_steps=2))]) == 0
    assert trainers[-1].args.to_dict()["plan.steps"] == 2
