"""Check chunks, weight averages, early stopping and resuming in complete small runs."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, rows_of, tiny_config
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import train
from babyllama.config import check_config
from babyllama.runs.checkpoints import checkpoints
from babyllama.runs.run_dir import RESULTS
from babyllama.training import callbacks
from babyllama.training.batches import ShiftedChunks
from babyllama.training.trainer import LMTrainer


def results_of(run_dir: Path) -> dict:
    """Return the results that a finished run reports."""
    return json.loads((run_dir / "training_metrics.json").read_text())["results"]


def delete_results(run_dir: Path) -> None:
    """Bring a finished run back to the state before its results were written."""
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def test_shifted_chunks_are_slices_of_the_token_stream():
    stream = np.arange(50, dtype=np.uint16)
    rows = [stream[start : start + 10] for start in range(0, 50, 10)]
    chunks = Dataset.from_dict({"input_ids": rows}).with_format("numpy")
    shifted = ShiftedChunks(chunks, seed=3)
    offsets = set()
    for epoch in range(20):
        shifted.set_epoch(epoch)
        offset = shifted.offset
        offsets.add(offset)
        token_ids = np.concatenate([shifted[i]["input_ids"] for i in range(len(shifted))])
        assert token_ids.tolist() == stream[offset : offset + 40].tolist()
        batch = [row["input_ids"].tolist() for row in shifted.__getitems__([3, 0, 3])]
        assert batch == [shifted[i]["input_ids"].tolist() for i in (3, 0, 3)]
    assert len(offsets) > 5


def test_the_offset_of_an_epoch_depends_on_the_seed_alone():
    chunks = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5]] * 3}).with_format("numpy")
    first = ShiftedChunks(chunks, seed=3)
    for epoch in range(7):
        first.set_epoch(epoch)
    second = ShiftedChunks(chunks, seed=3)
    offsets = [first.offset_in(epoch) for epoch in range(20)]
    assert [second.offset_in(epoch) for epoch in range(20)] == offsets


OPTIONS = {
    "training__optimizer": "muon",
    "training__lr_scheduler": "wsd",
    "training__ema": 0.9,
    "training__min_lr": 1e-4,
    "training__warmup_ratio": 0.2,
    "data__random_offset": True,
    "data__document_mask": True,
    "training__gradient_checkpointing": True,
}


def test_resume_is_exact_with_every_option(config_file, tmp_path):
    path = config_file(**OPTIONS)
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    weights = (run_dir / "model.safetensors").read_bytes()
    samples = rows_of(run_dir)[-1]["samples"]
    delete_results(run_dir)
    last, *_ = checkpoints(run_dir)
    assert (last / "average.safetensors").is_file()
    shutil.rmtree(last)  # resume from the checkpoint before it
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert rows_of(run_dir)[-1]["samples"] == samples
    assert len(samples) == 2


@pytest.fixture(scope="module")
def default_weights(tmp_path_factory, tokenizer_file, corpus_dir) -> bytes:
    """Return the weights of a run without any of the options."""
    root = tmp_path_factory.mktemp("plain")
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(root, tokenizer_file, corpus_dir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(root / "tiny.yaml")]) == 0
    return (root / "models" / "tiny" / "model.safetensors").read_bytes()


CHANGES = {
    **OPTIONS,
    "training__min_lr": 1e-3,
    "training__adam_beta1": 0.5,
    "training__adam_beta2": 0.9,
}


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_the_weights(option, config_file, tmp_path, default_weights):
    """Gradient checkpointing must not: it trades time for memory and nothing else."""
    assert train.main(["--config", str(config_file(**{option: CHANGES[option]}))]) == 0
    weights = (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes()
    is_unchanged = weights == default_weights
    assert is_unchanged == (option == "training__gradient_checkpointing")


def test_ema_saves_the_average_of_all_weights(config_file, tmp_path, monkeypatch):
    """The average starts at the first weights: after n steps those still weigh 0.99 ** (n - 1)."""
    weights_by_step = []
    update = callbacks.UpdateAverage.on_step_end

    def collect_weights(self, args, state, control, model=None, **kwargs):
        weights_by_step.append(model.lm_head.weight.detach().cpu().clone())
        return update(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(callbacks.UpdateAverage, "on_step_end", collect_weights)
    assert train.main(["--config", str(config_file(training__ema=0.99))]) == 0
    expected = weights_by_step[0]
    for weights in weights_by_step[1:]:
        expected = 0.99 * expected + 0.01 * weights
    saved = load_file(tmp_path / "models" / "tiny" / "model.safetensors")["lm_head.weight"]
    assert len(weights_by_step) > 10
    assert torch.allclose(saved, expected, atol=1e-6)
    assert not torch.allclose(saved, weights_by_step[-1], atol=1e-4)


@pytest.mark.parametrize("eval_steps", [None, 7])
def test_early_stopping_keeps_the_best_weights(config_file, tmp_path, capsys, eval_steps):
    """The learning rate is too high: the run ends early, with the weights of its best evaluation."""
    too_high = {
        "training__lr": 1e-2,
        "training__lr_scheduler": "constant",
        "training__adam_beta2": 0.5,
        "training__num_epochs": 60,
    }
    early_stopping = {"training__early_stopping_patience": 2, "training__eval_steps": eval_steps}
    assert train.main(["--config", str(config_file(**too_high, **early_stopping))]) == 0

    # the run stops two evaluations after the best one
    run_dir = tmp_path / "models" / "tiny"
    rows = rows_of(run_dir)
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(losses) < 60
    assert eval_steps is None or rows[-1]["step"] % eval_steps == 0
    assert min(losses) not in losses[-2:]

    # the results are those of the best step
    results = results_of(run_dir)
    (best_row,) = (row for row in rows if row.get("eval_loss") == min(losses))
    assert results["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert results["steps"] == best_row["step"]
    assert results["tokens_trained"] == best_row["tokens"]
    assert results["steps_run"] == rows[-1]["step"]
    assert results["epochs"] == pytest.approx(best_row["epoch"], abs=0.1)
    assert f"{best_row['step']} steps of" in (run_dir / "README.md").read_text()
    assert f"stopped early     after step {rows[-1]['step']} of" in capsys.readouterr().out

    # a run that ends at the best step has read the same words
    until_best = config_file(**too_high, training__max_steps=best_row["step"])
    assert train.main(["--config", str(until_best), "--model-name", "until-best"]) == 0
    expected_words = results_of(tmp_path / "models" / "until-best")["words_trained"]
    assert results["words_trained"] == expected_words > 0

    # killed after it had stopped, before its results were written: resuming runs no further step
    weights = (run_dir / "model.safetensors").read_bytes()
    delete_results(run_dir)
    path = config_file(**too_high, **early_stopping)
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert [row["step"] for row in rows_of(run_dir)] == [row["step"] for row in rows]
    assert (run_dir / "model.safetensors").read_bytes() == weights


def test_the_log_holds_speed_memory_and_remaining_time(config_file, tmp_path):
    assert train.main(["--config", str(config_file())]) == 0
    run_dir = tmp_path / "models" / "tiny"
    plan = json.loads((run_dir / "training_metrics.json").read_text())["plan"]
    report = json.loads((run_dir / "data_report.json").read_text())["train"]
    rows = [row for row in rows_of(run_dir) if "loss" in row]
    for row in rows:
        words_per_second = row["tokens_per_second"] * report["words"] / report["tokens"]
        assert row["words_per_second"] == pytest.approx(words_per_second)
        share = row["tokens_per_second"] * plan["flops_per_token"] / plan["matmul_flops"]
        assert row["matmul_share"] == pytest.approx(share)
        assert 0.1 < row["memory_gb"] < 100
        assert {"grad_norm", "learning_rate", "seconds_left"} <= set(row)
    assert rows[-1]["seconds_left"] < rows[0]["seconds_left"]

    # multiply-adds per token with D = 32, F = 88, T = 32: 2 layers of 4 D^2 + 3 D F, a head of D V,
    # and causal attention of 2 layers x D x T
    vocab_size = json.loads((run_dir / "config.json").read_text())["vocab_size"]
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 32 * vocab_size
    assert plan["flops_per_token"] == 6 * (weights + 2 * 32 * 32)


def test_losses_equal_those_of_a_plain_trainer_script(
    tmp_path, tokenizer, corpus_dir, tokenizer_file, monkeypatch
):
    """Compare step by step, at another micro-batch.

    The plain script uses the stock collator, loss, optimizer and schedule of transformers.
    """
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    benchmark = importlib.import_module("training_speed")
    config = check_config(
        tiny_config(tmp_path, tokenizer_file, corpus_dir, training__warmup_steps=3)
    )
    token_ids = np.random.default_rng(0).integers(3, len(tokenizer), (24 * 10, 32))
    rows = [{"input_ids": row.tolist()} for row in token_ids]

    def losses_with(options: dict, name: str) -> list[float]:
        return benchmark.train_once(config, options, tokenizer, rows, tmp_path / name).losses

    plain = losses_with({"micro": 4}, "plain")
    losses = losses_with({"precision": "fp32", "compile": False}, "babyllama")
    assert len(losses) == 10
    assert losses == pytest.approx(plain, abs=1e-4)
    assert max(losses) - min(losses) > 0.01


def test_the_private_methods_that_we_override_exist():
    """If a release of transformers renames one, Trainer would never call ours."""
    trainer_source = inspect.getsource(Trainer)
    overridden = [
        "_init_training_state",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_maybe_log_save_evaluate",
        "_run_epoch",
        "_save_checkpoint",
    ]
    for name in overridden:
        assert name in vars(LMTrainer)
        assert f"self.{name}(" in trainer_source
    assert "self._created_lr_scheduler" in trainer_source
    assert "self._n_gpu" in inspect.getsource(TrainingArguments)
