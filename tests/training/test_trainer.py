"""The trainer: chunks, averages, early stopping and resume, seen in complete small runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of, tiny_config
from datasets import Dataset
from safetensors.torch import load_file

import train
from babyllama.config import check_config
from babyllama.training import trainer
from babyllama.training.chunks import ShiftedChunks
from babyllama.training.run_dir import RESULTS, checkpoints


def results_of(run_dir) -> dict:
    return json.loads((run_dir / "training_metrics.json").read_text())["results"]


def test_shifted_chunks_are_slices_of_the_stream():
    stream = np.arange(50, dtype=np.uint16)
    chunks = Dataset.from_dict(
        {"input_ids": [stream[i : i + 10] for i in range(0, 50, 10)]}
    ).with_format("numpy")
    shifted, offsets = ShiftedChunks(chunks, seed=3), set()
    for epoch in range(20):
        shifted.offset = shifted.offset_in(epoch)
        offsets.add(shifted.offset)
        rows = np.concatenate([shifted[i]["input_ids"] for i in range(len(shifted))])
        assert rows.tolist() == stream[shifted.offset : shifted.offset + 40].tolist()
        assert [r["input_ids"].tolist() for r in shifted.__getitems__([3, 0, 3])] == [
            shifted[i]["input_ids"].tolist() for i in (3, 0, 3)
        ]
    assert len(offsets) > 5
    other = ShiftedChunks(chunks, seed=3)
    other.offset, shifted.offset = other.offset_in(7), shifted.offset_in(7)
    assert other.offset == shifted.offset


OPTIONS = {"training__optimizer": "muon", "training__lr_scheduler": "wsd", "training__ema": 0.9, "training__min_lr": 1e-4,
           "training__warmup_ratio": 0.2, "data__random_offset": True, "data__document_mask": True,
           "training__gradient_checkpointing": True}  # fmt: skip


def test_resume_is_exact_with_every_option(config_file, tmp_path):
    path, run_dir = config_file(**OPTIONS), tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    weights, samples = (run_dir / "model.safetensors").read_bytes(), rows_of(run_dir)[-1]["samples"]
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    last, *_ = checkpoints(run_dir)
    assert (last / "average.safetensors").is_file()
    for name in [last]:
        import shutil

        shutil.rmtree(name)
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert rows_of(run_dir)[-1]["samples"] == samples
    assert len(samples) == 2


@pytest.mark.parametrize("option", [*OPTIONS, "training__adam_beta1", "training__adam_beta2"])
def test_each_option_moves_the_weights(option, config_file, tmp_path, finished_weights):
    if option == "training__min_lr":
        value = 1e-3
    else:
        value = {**OPTIONS, "training__adam_beta1": 0.5, "training__adam_beta2": 0.9}[option]
    assert train.main(["--config", str(config_file(**{option: value}))]) == 0
    weights = (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes()
    same = (
        option == "training__gradient_checkpointing"
    )  # that one trades time for memory and changes nothing else
    assert (weights == finished_weights) == same


@pytest.fixture(scope="module")
def finished_weights(tmp_path_factory, tokenizer_file, corpus_dir) -> bytes:
    import yaml

    root = tmp_path_factory.mktemp("plain")
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(root, tokenizer_file, corpus_dir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(root / "tiny.yaml")]) == 0
    return (root / "models" / "tiny" / "model.safetensors").read_bytes()


def test_ema_saves_the_average_of_all_weights(config_file, tmp_path, monkeypatch):
    """The average starts at the first weights: after n steps those still weigh 0.99 ** (n - 1)."""
    weights_by_step = []
    update = trainer._UpdateAverage.on_step_end

    def collect_weights(self, args, state, control, model=None, **kwargs):
        weights_by_step.append(model.lm_head.weight.detach().cpu().clone())
        return update(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(trainer._UpdateAverage, "on_step_end", collect_weights)
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
    harmful = {
        "training__lr": 1e-2,
        "training__lr_scheduler": "constant",
        "training__adam_beta2": 0.5,
    }
    path = config_file(
        **harmful,
        training__num_epochs=60,
        training__early_stopping_patience=2,
        training__eval_steps=eval_steps,
    )
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    losses = [row["eval_loss"] for row in rows_of(run_dir) if "eval_loss" in row]
    assert len(losses) < 60 and (
        eval_steps is None or rows_of(run_dir)[-1]["step"] % eval_steps == 0
    )
    assert min(losses) not in losses[-2:]
    assert results_of(run_dir)["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    kept, ran = results_of(run_dir), rows_of(run_dir)[-1]
    (best,) = (row for row in rows_of(run_dir) if row.get("eval_loss") == min(losses))
    assert (kept["steps"], kept["tokens_trained"], kept["steps_run"]) == (
        best["step"],
        best["tokens"],
        ran["step"],
    )
    assert kept["epochs"] == pytest.approx(best["epoch"], abs=0.1)
    # a run that ends at the best step has read the same words
    until_best = config_file(**harmful, training__num_epochs=60, training__max_steps=best["step"])
    assert train.main(["--config", str(until_best), "--model-name", "until-best"]) == 0
    expected_words = results_of(tmp_path / "models" / "until-best")["words_trained"]
    assert kept["words_trained"] == expected_words > 0
    assert f"{best['step']} steps of" in (run_dir / "README.md").read_text()
    assert f"stopped early     after step {ran['step']} of" in capsys.readouterr().out
    # killed after it had stopped, before its results were written: resuming runs no further step
    path = config_file(
        **harmful,
        training__num_epochs=60,
        training__early_stopping_patience=2,
        training__eval_steps=eval_steps,
    )
    rows, weights = rows_of(run_dir), (run_dir / "model.safetensors").read_bytes()
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    assert train.main(["--config", str(path), "--resume_from_checkpoint", "latest"]) == 0
    assert [row["step"] for row in rows_of(run_dir)] == [row["step"] for row in rows]
    assert (run_dir / "model.safetensors").read_bytes() == weights


def test_the_log_holds_speed_memory_and_remaining_time(config_file, tmp_path):
    assert train.main(["--config", str(config_file())]) == 0
    run_dir = tmp_path / "models" / "tiny"
    made, report = (
        json.loads((run_dir / name).read_text())
        for name in ("training_metrics.json", "data_report.json")
    )
    made, rows = made["plan"], [row for row in rows_of(run_dir) if "tokens_per_second" in row]
    for row in rows:
        words = row["tokens_per_second"] * report["train"]["words"] / report["train"]["tokens"]
        assert row["words_per_second"] == pytest.approx(words)
        share = row["tokens_per_second"] * made["flops_per_token"] / made["matmul_flops"]
        assert row["matmul_share"] == pytest.approx(share)
        assert 0.1 < row["memory_gb"] < 100
        assert {"grad_norm", "learning_rate", "seconds_left"} <= set(row)
    assert rows[-1]["seconds_left"] < rows[0]["seconds_left"]
    # 2 layers of 4 D^2 + 3 D F with D = 32, F = 88, a head of D V; causal attention 2 layers x D x T
    vocab_size = json.loads((run_dir / "config.json").read_text())["vocab_size"]
    products = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 32 * vocab_size
    assert made["flops_per_token"] == 6 * (products + 2 * 32 * 32)


def test_our_losses_equal_those_of_a_plain_trainer_script(
    tmp_path, tokenizer, corpus_dir, tokenizer_file
):
    """Step by step, at another micro-batch, with the stock collator, loss, optimizer and schedule on the other side."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "training_speed", ROOT / "experiments" / "training_speed.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    config = check_config(
        tiny_config(tmp_path, tokenizer_file, corpus_dir, training__warmup_steps=3)
    )
    ids = np.random.default_rng(0).integers(3, len(tokenizer), (24 * 10, 32))
    rows = [{"input_ids": row.tolist()} for row in ids]
    plain = benchmark.train_once(config, {"micro": 4}, tokenizer, rows, tmp_path / "a").losses
    ours = benchmark.train_once(
        config, {"precision": "fp32", "compile": False}, tokenizer, rows, tmp_path / "b"
    ).losses
    assert len(ours) == 10
    assert ours == pytest.approx(plain, abs=1e-4)
    assert max(ours) - min(ours) > 0.01
