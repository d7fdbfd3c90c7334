"""From a YAML file to a run directory, with real tiny models: what is built, trained, saved, resumed and refused."""

import gc
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, build_tiny_model, rows_of, timeless, tiny_config

import create_synthetic_data
import train
from babyllama.config import check_config, read_yaml_file, unusual_values
from babyllama.files import exclusive_folder, is_model
from babyllama.training.callbacks import RunLog
from babyllama.training.kernels import memory_advice, pick_precision
from babyllama.training.loss import NextTokenLoss
from babyllama.training.run_dir import (
    CONFIG_FILE,
    DATA_REPORT_FILE,
    LOG_FILE,
    MANIFEST,
    MEASURED,
    METRICS_FILE,
    RESULTS,
    checkpoint_error,
    checkpoint_step,
    checkpoints,
    find_checkpoint,
    resolve_checkpoint,
    seal_checkpoint,
    start_run_dir,
)
from babyllama.training.trainer import (
    LMTrainer,
    TrainingError,
    collate_chunks,
    evaluate_chunks,
    training_arguments,
)

SHIPPED = {
    p.stem: p
    for p in sorted((ROOT / "config").glob("*.yaml"))
    if not p.stem.startswith("benchmark")
}


class Words:
    """A tokenizer's size and special ids, for models that are only built."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self):
        return 16000


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_file, corpus_dir) -> tuple[Path, Path]:
    """(config file, run directory) of a finished tiny run; tests that change it copy it first."""
    root = tmp_path_factory.mktemp("finished")
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(root, tokenizer_file, corpus_dir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(path)]) == 0
    return path, root / "models" / "tiny"


@pytest.fixture
def finished_copy(finished, tmp_path, monkeypatch) -> tuple[Path, Path]:
    config_path, run_dir = finished
    shutil.copytree(config_path.parent, tmp_path / "copy")
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "copy" / "cache"))
    moved = tmp_path / "copy" / "models" / "tiny"
    config = read_yaml_file(config_path)
    config["logging"]["output_dir"] = str(moved.parent)
    (tmp_path / "copy" / "tiny.yaml").write_text(yaml.safe_dump(config))
    (moved / CONFIG_FILE).write_text(yaml.safe_dump(check_config(config), sort_keys=False))
    return tmp_path / "copy" / "tiny.yaml", moved


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_build_with_the_size_of_their_name(name):
    config = train.load_config(SHIPPED[name])
    assert config["model"]["name"] == name
    with torch.device("meta"):
        model = train.create_model(config, Words())
    if size := re.search(r"-(\d+)M", name):
        millions = float(size[1])
        assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.05)
    published = [
        "model.intermediate_size: 1024 is 2.00 x hidden_size; 2.67 x is usual for Llama (1368)"
    ]
    expected = published if name == "distill-58M" else []
    assert unusual_values(config) == expected, "a shipped config should not be warned of"


def test_the_promised_configs_are_shipped():
    promised = ["babylm-strict-small", "babylm-strict"]
    promised += [
        "quickstart",
        "llama-10M",
        "llama-16M",
        "llama-95M",
        "llama-360M",
        "gpt2-97M",
        "gpt2-705M",
        "gptj-97M",
    ]
    assert set(promised) <= set(SHIPPED)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_create_model_uses_every_key(kind):
    section = {"type": kind, "hidden_size": 48, "intermediate_size": 80, "n_layer": 3, "n_head": 4, "vocab_size": 320,
               "tie_word_embeddings": True}  # fmt: skip
    if kind != "Llama":
        section |= {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3}
    torch.manual_seed(0)
    tokenizer = Words()
    type(tokenizer).__len__, old = lambda self: 300, type(tokenizer).__len__
    try:
        model = train.create_model({"model": section}, tokenizer)
    finally:
        type(tokenizer).__len__ = old
    config = model.config
    assert (
        type(model).__name__
        == {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel", "GPTJ": "GPTJForCausalLM"}[kind]
    )
    assert (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    ) == (320, 48, 3, 4)
    assert config.max_position_embeddings == 128
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    widths = {p.shape for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    assert any(80 in shape for shape in widths), "intermediate_size is not used"
    if kind != "Llama":
        assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("kind", ["GPT2", "GPTJ"])
@pytest.mark.parametrize("key", [None, "resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_key_drops_something(kind, key):
    section = {
        "type": kind,
        "hidden_size": 48,
        "n_layer": 2,
        "n_head": 4,
        **({key: 0.5} if key else {}),
    }
    model, ids = train.create_model({"model": section}, Words()).train(), torch.arange(20)[None]
    first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(first, second) == (key is None)


def test_the_partial_config_of_a_notebook():
    config = {"model": {"type": "Llama", "hidden_size": 384, "intermediate_size": 1024, "n_layer": 8, "n_head": 8,
                        "vocab_size": 16000}}  # fmt: skip
    # by hand: 2 embeddings, 8 layers of (4 attention + 3 feed-forward matrices + 2 norms), 1 norm
    expected = 2 * 16000 * 384 + 8 * (4 * 384 * 384 + 3 * 384 * 1024 + 2 * 384) + 384
    assert train.create_model(config, Words()).num_parameters() == expected


def test_the_smallest_config_of_a_notebook(corpus_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path))
    config = {
        "data": {
            key: str(corpus_dir / "train" / "toy.train") for key in ("train_path", "eval_path")
        }
    }
    train_data, held_out = train.prepare_datasets_modern(config, tokenizer)
    assert len(train_data[0]["input_ids"]) == 128 and 0 < len(held_out) <= 256
    shifted, _ = train.prepare_datasets_modern(
        {"data": {**config["data"], "random_offset": True}}, tokenizer
    )
    assert len(shifted) == len(train_data) - 1
    with pytest.raises(
        ValueError, match=r"data.seq_len: unknown key; did you mean data.seq_length\?"
    ):
        train.prepare_datasets_modern({"data": {**config["data"], "seq_len": 3}}, tokenizer)


def test_create_model_refuses():
    with pytest.raises(ValueError, match="Unknown model type: 'BERT'; known: Llama, GPT2, GPTJ"):
        train.create_model({"model": {"type": "BERT"}}, Words())
    small = {"type": "Llama", "hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    with pytest.raises(ValueError, match="100 is less than the tokenizer's 16000 tokens"):
        train.create_model({"model": small}, Words())


# ---- loss and evaluation ------------------------------------------------------------------------


def chunks(n: int, length: int = 32, seed: int = 0) -> list[dict]:
    ids = np.random.default_rng(seed).integers(3, 400, (n, length)).astype(np.uint16)
    return [{"input_ids": row} for row in ids]


def naive_nll(model, rows) -> float:
    """Sum of -log p in float64, one chunk and one position at a time."""
    model, total = model.double().eval(), 0.0
    for row in rows:
        ids = torch.tensor(row["input_ids"].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        for i in range(1, len(ids)):
            total -= torch.log_softmax(logits[i - 1], -1)[ids[i]].item()
    model.float()
    return total


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_evaluation_is_exact_for_any_batch_size(kind):
    model, rows = build_tiny_model(kind), chunks(11)
    n_bytes = np.random.default_rng(1).integers(0, 9, 400)
    expected = naive_nll(build_tiny_model(kind), rows)
    for batch_size in (1, 2, 7, 64):
        found = evaluate_chunks(model, rows, torch.as_tensor(n_bytes), batch_size)
        assert found["tokens"] == 11 * 31
        assert found["loss"] == pytest.approx(expected / (11 * 31), rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(expected / (11 * 31)), rel=1e-5)
        count = sum(int(n_bytes[t]) for row in rows for t in row["input_ids"][1:])
        assert found["bytes"] == count
        assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) / count, rel=1e-6)


def make_trainer(tmp_path, model, rows, loss=None, **training) -> LMTrainer:
    config = check_config(tiny_config(tmp_path, tmp_path, tmp_path))
    config["training"] |= training
    run_log = RunLog(
        tmp_path / "metrics.jsonl", words_per_token=0.5, flops_per_token=100.0, matmul_flops=1e9
    )
    return LMTrainer(
        model=model, args=training_arguments(config, tmp_path, "fp32"), train_dataset=rows, eval_dataset=rows[:2],
        byte_lengths=np.ones(400, dtype=np.int64), callbacks=[run_log], training=config["training"],
        loss=loss or NextTokenLoss(),
    )  # fmt: skip


def test_uneven_accumulation_is_one_big_batch(tmp_path):
    """7 chunks as 3 + 3 + 1 move the weights exactly as one batch of 7 does (to rounding)."""
    weights = []
    for batch_size, accumulation in ((3, 3), (7, 1)):
        model = build_tiny_model("Llama").train()
        make_trainer(tmp_path / str(batch_size), model, chunks(7), batch_size=batch_size, num_epochs=1,
                     gradient_accumulation_steps=accumulation, lr_scheduler="constant").train()  # fmt: skip
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in build_tiny_model("Llama").parameters()])
    assert (weights[0] - start).abs().max() > 1e-4
    # Adam's first step is lr * sign(gradient): gradients of rounding size may flip, all others must agree
    assert ((weights[0] - weights[1]).abs() > 1e-5).float().mean() < 0.01


def test_the_log_holds_the_exact_loss_of_each_step(tmp_path):
    rows = chunks(7)
    trainer = make_trainer(
        tmp_path, build_tiny_model("GPT2").train(), rows, batch_size=3, num_epochs=1
    )
    trainer.train()
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(
        naive_nll(build_tiny_model("GPT2"), rows) / (7 * 31), rel=1e-6
    )
    assert first["tokens"] == 7 * 32


def test_pinned_loss(tmp_path):
    """The path from text to gradient: a refactoring that moves this number is wrong."""
    torch.manual_seed(0)
    model = build_tiny_model("Llama", seed=1).train()
    rows = [
        {"input_ids": ((7 * (np.arange(32) + i)) % 390 + 3).astype(np.uint16)} for i in range(40)
    ]
    trainer = make_trainer(tmp_path, model, rows, batch_size=8, gradient_accumulation_steps=1, num_epochs=1,
                           logging_steps=1)  # fmt: skip
    trainer.train()
    losses = [
        row["loss"] for row in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "loss" in row
    ]
    assert len(losses) == 5
    assert losses[0] == pytest.approx(PINNED[0], abs=2e-5)
    assert losses[-1] == pytest.approx(PINNED[1], abs=2e-5)


PINNED = (6.02206, 5.48683)


def test_nan_stops_the_run_and_saves_nothing(tmp_path):
    model = build_tiny_model("Llama").train()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    trainer = make_trainer(tmp_path, model, chunks(30), num_epochs=1, save_steps=1)
    with pytest.raises(
        TrainingError, match="NaN or infinite at or before step 1; nothing was saved"
    ):
        trainer.train()
    assert not checkpoints(tmp_path)


def test_collate_gives_no_mask_and_no_first_label():
    batch = collate_chunks(chunks(3))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == torch.int64
    assert (batch["labels"][:, 0] == -100).all()
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_fp16_without_cuda_is_replaced_and_said():
    training = check_config(tiny_config(Path(), Path(), Path()))["training"]
    precision, reason = pick_precision({**training, "fp16": True, "precision": "auto"})
    assert precision in ("bf16", "fp32")
    assert reason.startswith("fp16 needs CUDA")
    assert pick_precision({**training, "precision": "fp32"}) == ("fp32", "as requested")
    assert pick_precision({**training, "precision": "auto"})[0] == precision


# ---- the run directory --------------------------------------------------------------------------


def test_a_finished_run_is_a_plain_model_directory(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config_path, run_dir = finished
    names = {p.name for p in run_dir.iterdir() if p.is_file()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training_config.yaml", "data_report.json", "metrics.jsonl", "training_metrics.json", "training_curves.png",
        "README.md",
    }  # fmt: skip
    assert not list(run_dir.rglob("training_args.bin"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run_dir),
        AutoTokenizer.from_pretrained(run_dir),
    )
    assert model.config.use_cache is True
    assert model.generation_config.eos_token_id in (2, [2])  # a list in older releases
    assert tokenizer("The cat")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.model_max_length == 32

    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    metrics = json.loads((run_dir / "training_metrics.json").read_text(), parse_constant=refuse)
    results = metrics["results"]
    rows = [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").open()]
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert rows[-1]["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert (
        rows[-1]["tokens"]
        == results["tokens_trained"]
        == metrics["data"]["train"]["chunks"] * 32 * 2
    )
    assert results["eval_loss"] < 0.9 * math.log(400), (
        "a tiny model should learn something of this text"
    )
    assert len(metrics["samples"]) == 3
    assert (
        train.load_config(run_dir / "training_config.yaml")
        == train.load_config(config_path)
        == metrics["config"]
    )
    card = (run_dir / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    values = {m["type"]: m["value"] for m in header["model-index"][0]["results"][0]["metrics"]}
    assert values["loss"] == round(results["eval_loss"], 4)
    assert f"{results['eval_bits_per_byte']:.4f}" in card.split("---\n", 2)[2]
    assert (run_dir / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_has_the_reported_loss(finished, tokenizer):
    """The held-out loss is computed again from the files alone, by a plain float64 loop."""
    from transformers import AutoModelForCausalLM

    config_path, run_dir = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(config_path.parent / "cache"))
        _, held_out = train.prepare_datasets_modern(train.load_config(config_path), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    results = json.loads((run_dir / "training_metrics.json").read_text())["results"]
    assert naive_nll(model, held_out) / results["eval_tokens"] == pytest.approx(
        results["eval_loss"], rel=1e-5
    )
    texts = [tokenizer.decode(row["input_ids"][1:], skip_special_tokens=True) for row in held_out]
    assert results["eval_bytes"] == pytest.approx(sum(len(t.encode()) for t in texts), rel=1e-3)


def test_running_again_shows_what_is_there(finished_copy, capsys):
    config_path, run_dir = finished_copy
    before = {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    assert train.main(["--config", str(config_path)]) == 0
    assert "already trained" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()} == before
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    for key in ("steps", "steps_run", "epochs"):  # which runs of before did not note
        del metrics["results"][key]
    (run_dir / METRICS_FILE).write_text(json.dumps(metrics))
    assert train.main(["--config", str(config_path)]) == 0


def test_another_run_of_the_same_name_is_refused(finished_copy, capsys):
    config_path, run_dir = finished_copy
    weights = (run_dir / "model.safetensors").read_bytes()
    assert train.main(["--config", str(config_path), "--lr", "1e-3"]) == 2
    error = capsys.readouterr().err
    assert "training.lr: was 0.003, is 0.001" in error
    assert "--overwrite" in error
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert train.main(["--config", str(config_path), "--lr", "1e-3", "--overwrite"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() != weights


def test_resuming_is_offered_only_where_it_would_be_accepted(finished_copy, capsys):
    config_path, run_dir = finished_copy
    assert train.main(["--config", str(config_path), "--lr", "1e-3"]) == 2
    assert "--resume_from_checkpoint" not in capsys.readouterr().err
    assert train.main(["--config", str(config_path), "--num-epochs", "3"]) == 2
    assert "add --resume_from_checkpoint latest to go on" in capsys.readouterr().err
    assert (
        train.main(
            [
                "--config",
                str(config_path),
                "--num-epochs",
                "3",
                "--resume_from_checkpoint",
                "latest",
            ]
        )
        == 0
    )


@pytest.mark.parametrize("name", [CONFIG_FILE, DATA_REPORT_FILE, METRICS_FILE])
@pytest.mark.parametrize("text", ["", "a: [", "- a", '{"a": 1'])
def test_a_damaged_run_directory_is_one_line(finished_copy, name, text, capsys):
    config_path, run_dir = finished_copy
    (run_dir / name).write_text(text)
    assert train.main(["--config", str(config_path)]) == 2
    (line,) = errors_of(capsys)
    assert f"{run_dir / name}: is damaged" in line and "--overwrite" in line


def test_what_was_measured_goes_with_the_weights(finished_copy):
    config_path, run_dir = finished_copy
    for name in MEASURED:
        (run_dir / name).write_text("of the old weights")
    (run_dir / "thesis.txt").write_text("mine")
    assert train.main(["--config", str(config_path), "--overwrite", "--num-epochs", "1"]) == 0
    assert (
        not any((run_dir / name).exists() for name in MEASURED)
        and (run_dir / "thesis.txt").is_file()
    )


def test_weights_are_for_whom_the_rest_is_for(finished):
    _, run_dir = finished
    weights = list(run_dir.rglob("*.safetensors"))
    assert len(weights) > 1
    assert {path.stat().st_mode for path in weights} == {(run_dir / "config.json").stat().st_mode}


@pytest.mark.parametrize("most", [5, 1000])
def test_max_steps_ends_the_run(most, config_file, tmp_path, capsys):
    """In the middle of an epoch, or not at all; the learning rate comes to its end either way; later it may go on."""
    path = config_file(training__logging_steps=1)
    assert train.main(["--config", str(path), "--set", f"training.max_steps={most}"]) == 0
    run_dir = tmp_path / "models" / "tiny"
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    rows = [json.loads(line) for line in (run_dir / LOG_FILE).read_text().splitlines()]
    steps = metrics["plan"]["steps"]
    assert (steps == 5) == (most == 5) and rows[-1]["step"] == steps and "eval_loss" in rows[-1]
    assert metrics["results"]["tokens_trained"] == metrics["plan"]["tokens"] == rows[-1]["tokens"]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates[-1] < 0.2 * max(rates)
    if most == 5:
        assert (
            metrics["plan"]["tokens"] == 5 * metrics["plan"]["tokens_per_step"]
            and metrics["plan"]["epochs"] < 1
        )
        whole = ["--config", str(path), "--resume_from_checkpoint", "latest"]
        assert train.main(whole) == 0
        assert json.loads((run_dir / METRICS_FILE).read_text())["plan"]["epochs"] == 2
        assert "epochs, about" in capsys.readouterr().out


def test_a_run_at_its_end_trains_no_further(config_file, tmp_path, capsys):
    """Killed after its last checkpoint, with nothing written; and one that has gone further than is asked for now."""
    path = str(config_file(training__lr_scheduler="constant"))
    run_dir, steps = (
        tmp_path / "models" / "tiny",
        ["--set", "training.max_steps=10"],
    )  # in the second epoch
    assert train.main(["--config", path, *steps]) == 0
    weights = (run_dir / "model.safetensors").read_bytes()
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    assert train.main(["--config", path, *steps, "--resume_from_checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    assert metrics["results"]["tokens_trained"] == metrics["plan"]["tokens"]
    fewer = ["--set", "training.max_steps=3", "--resume_from_checkpoint", "latest"]
    assert train.main(["--config", path, *fewer]) == 2
    assert "checkpoint-10: is past the 3 steps that are asked for" in capsys.readouterr().err
    assert (run_dir / METRICS_FILE).is_file()


def test_a_run_at_its_end_whose_log_is_gone_is_one_line(config_file, tmp_path, capsys):
    path, run_dir = str(config_file()), tmp_path / "models" / "tiny"
    assert train.main(["--config", path]) == 0
    for name in (*RESULTS, LOG_FILE):
        (run_dir / name).unlink(missing_ok=True)
    assert train.main(["--config", path, "--resume_from_checkpoint", "latest"]) == 2
    (line,) = errors_of(capsys)
    assert "metrics.jsonl: its rows are lost" in line and is_model(run_dir)


def test_workers_that_live_on_hold_no_directory(config_file):
    arguments = [
        "--config",
        str(config_file(training__num_epochs=1)),
        "--dataloader-num-workers",
        "1",
    ]
    gc.disable()  # what keeps the workers is a cycle
    try:
        assert train.main(arguments) == 0
        assert train.main([*arguments, "--overwrite"]) == 0
    finally:
        gc.enable()


def test_a_folder_that_stayed_empty_goes_again(tmp_path):
    one = tmp_path / "one"
    with exclusive_folder(one, ""):
        with pytest.raises(ValueError, match="another process"), exclusive_folder(one, ""):
            pass
        assert one.is_dir()  # it is not the second one's
    with exclusive_folder(tmp_path / "two", ""):
        (tmp_path / "two" / "a").touch()
    (tmp_path / "three").mkdir()
    with exclusive_folder(tmp_path / "three", ""):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"two", "three"}


def test_a_directory_where_another_process_trains_is_left_alone(finished_copy, capsys):
    config_path, run_dir = finished_copy
    back_to_checkpoint(run_dir)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for flags in (["--overwrite"], ["--resume_from_checkpoint", "latest"]):
        with exclusive_folder(
            run_dir, ""
        ):  # each opening of a directory is a holder of its own, also in one process
            assert train.main(["--config", str(config_path), *flags]) == 2
        (line,) = errors_of(capsys)
        assert (
            "another process is writing there; wait for its end, or choose another --model_name"
            in line
        )
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert train.main(["--config", str(config_path), *flags]) == 0


def test_held_out_text_that_is_training_text_is_pointed_out(
    config_file, corpus_dir, tmp_path, caplog
):
    path = config_file(data__eval_path=str(corpus_dir / "train" / "toy.train"))
    assert train.main(["--config", str(path), "--dry-run"]) == 0
    assert "the held-out text is training text too: toy.train" in caplog.text
    caplog.clear()
    for split in ("train", "dev"):
        shutil.copytree(corpus_dir / split, tmp_path / split)
        (tmp_path / split / f"empty.{split}").write_text("")
    apart = config_file(
        data__train_path=str(tmp_path / "train"), data__eval_path=str(tmp_path / "dev")
    )
    assert train.main(["--config", str(apart), "--dry-run"]) == 0
    assert "training text too" not in caplog.text


def test_a_warm_up_longer_than_the_run_is_pointed_out(config_file, caplog):
    assert train.main(["--config", str(config_file(training__warmup_steps=900)), "--dry-run"]) == 0
    assert "training.warmup_steps: 900, but the run has" in caplog.text


def test_more_steps_than_the_epochs_have_are_pointed_out(config_file, caplog):
    assert train.main(["--config", str(config_file(training__max_steps=900)), "--dry-run"]) == 0
    assert "training.max_steps: 900, but 2 epochs have only 16 steps" in caplog.text


def test_fsdp_in_one_process_is_pointed_out(config_file, caplog):
    assert (
        train.main(["--config", str(config_file()), "--dry-run", "--set", "training.fsdp=true"])
        == 0
    )
    assert "training.fsdp: true has no effect in one process" in caplog.text


def test_a_directory_with_other_things_is_left_alone(config_file, tmp_path, capsys):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "thesis.tex").write_text("years of work")
    assert train.main(["--config", str(config_file()), "--overwrite"]) == 2
    assert "holds files, but no run of train.py" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "models" / "tiny").iterdir()] == ["thesis.tex"]


def test_dry_run_writes_nothing(config_file, tmp_path, capsys):
    assert train.main(["--config", str(config_file()), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "768 tokens" in out  # 8 x 3 x 32
    assert "<s>The " in out
    assert not (tmp_path / "models").exists()


def test_the_seed_decides_the_weights_and_the_order(config_file, tmp_path):
    path = config_file(training__num_epochs=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train.main(["--config", str(path), "--model_name", name, "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / "models" / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


# ---- resuming -----------------------------------------------------------------------------------


def back_to_checkpoint(run_dir: Path) -> str:
    """Take a finished run back to the moment after its second last checkpoint was saved."""
    newest, earlier = checkpoints(run_dir)
    shutil.rmtree(newest)
    for name in ("model.safetensors", "training_metrics.json", "README.md"):
        (run_dir / name).unlink()
    return earlier.name


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_resume_is_exact(kind, config_file, tmp_path):
    dropout = {"model__resid_pdrop": 0.1, "model__embd_pdrop": 0.1} if kind == "GPT2" else {}
    path, run_dir = config_file(model__type=kind, **dropout), tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    weights, log = (run_dir / "model.safetensors").read_bytes(), rows_of(run_dir)
    results = json.loads((run_dir / "training_metrics.json").read_text())["results"]
    back_to_checkpoint(run_dir)
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights

    assert timeless(rows_of(run_dir)) == timeless(log)
    again = json.loads((run_dir / "training_metrics.json").read_text())["results"]
    assert again["eval_loss"] == results["eval_loss"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(number, config_file, tmp_path):
    """A real signal in a real process: the step is saved; then latest: the same weights as of a run left alone."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    path = config_file(training__num_epochs=6, training__logging_steps=1, training__save_steps=1000)
    command = [sys.executable, "train.py", "--config", str(path)]
    run_dir = tmp_path / "models" / "tiny"
    hears = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # a background job may not
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **hears
    )
    deadline, log = time.monotonic() + 120, run_dir / "metrics.jsonl"
    while (
        child.poll() is None
        and time.monotonic() < deadline
        and not (log.is_file() and log.read_text().count("\n") > 2)
    ):
        time.sleep(0.005)
    child.send_signal(number)
    error = child.communicate(timeout=120)[1]
    assert child.returncode == 130, error
    (saved,) = checkpoints(run_dir)
    assert (
        f"interrupted after step {checkpoint_step(saved)}; go on from {saved.name} with --resume_from"
        in error
    )
    assert checkpoint_error(saved) is None and not (run_dir / "training_metrics.json").exists()
    assert train.main(["--config", str(path)]) == 2  # neither forgotten nor overwritten
    assert train.main(["--config", str(path), "--resume_from_checkpoint", "latest"]) == 0
    assert train.main(["--config", str(path), "--model_name", "whole"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == (
        run_dir.parent / "whole" / "model.safetensors"
    ).read_bytes()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before, (
        "what was there comes back"
    )


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip", "unsealed"])
def test_a_damaged_checkpoint_is_passed_over(finished_copy, harm, caplog):
    _, run_dir = finished_copy
    newest, earlier = checkpoints(run_dir)
    for victim in [p.name for p in newest.iterdir() if p.name != MANIFEST]:
        copy = run_dir.parent / "victim"
        shutil.copytree(run_dir, copy)
        path = copy / newest.name / (MANIFEST if harm == "unsealed" else victim)
        content = bytearray(path.read_bytes())
        if harm in ("delete", "unsealed"):
            path.unlink()
        elif harm == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 3] ^= 1
            path.write_bytes(content)
        assert find_checkpoint("latest", copy).name == earlier.name, victim
        with pytest.raises(ValueError, match="cannot resume from it"):
            find_checkpoint(str(copy / newest.name), copy)
        shutil.rmtree(copy)
    assert "passed over" in caplog.text


@pytest.mark.parametrize("content", ["[]", '{"files": [1]}', '{"files": {"model.safetensors": 3}}'])
def test_a_manifest_that_is_none_is_passed_over(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    assert checkpoint_error(tmp_path) == f"{MANIFEST} cannot be read"


def test_results_that_are_none_are_one_line(finished_copy, capsys):
    (finished_copy[1] / METRICS_FILE).write_text('{"results": 3}')
    assert train.main(["--config", str(finished_copy[0])]) == 2
    assert "training_metrics.json: is damaged" in capsys.readouterr().err


def test_bf16_can_be_switched_off(config_file):
    """A flag that is given rules, also over what the machine would choose."""

    def chosen(**flags) -> str:
        path = config_file(training__precision="auto")
        return pick_precision(train.load_config(str(path), SimpleNamespace(**flags))["training"])[0]

    assert chosen(bf16=False) == "fp32"
    assert chosen(bf16=True) == "bf16"
    assert (
        train.load_config(str(config_file()), SimpleNamespace(bf16=False))["training"]["precision"]
        == "fp32"
    )
    fp16 = str(config_file(training__precision="fp16"))
    assert train.load_config(fp16, SimpleNamespace(fp16=False))["training"]["precision"] == "fp32"
    assert train.load_config(fp16, SimpleNamespace(bf16=False))["training"]["precision"] == "fp16"
    auto = str(config_file(training__precision="auto"))
    assert train.load_config(auto, SimpleNamespace(fp16=False))["training"]["precision"] == "auto"
    both = SimpleNamespace(bf16=False, set=["training.precision=bf16"])
    assert (
        train.load_config(auto, both)["training"]["precision"] == "bf16"
    )  # --set beats the other flags


def test_resuming_another_run_is_refused(finished_copy, capsys):
    config_path, run_dir = finished_copy
    back_to_checkpoint(run_dir)
    resume = ["--config", str(config_path), "--resume_from_checkpoint", "latest"]
    assert train.main([*resume, "--batch-size", "4", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "training.batch_size: was 8, is 4" in error
    assert "training.seed: was 42, is 1" in error
    assert train.main([*resume[:-1], "no/such/place"]) == 2
    assert "no such checkpoint; give its directory or the word latest" in capsys.readouterr().err
    assert train.main([*resume[:-1], str(run_dir)]) == 2
    assert "is a run, not a checkpoint; give one of its own, such as " in capsys.readouterr().err
    assert train.main([*resume, "--overwrite"]) == 2
    assert "choose one" in capsys.readouterr().err and checkpoints(run_dir)


@pytest.mark.parametrize("flag", ["--overwrite", "--dry-run"])
def test_a_tokenizer_without_bytes_is_refused_before_anything_goes(
    finished_copy, tmp_path, flag, capsys
):
    from tokenizers import Tokenizer, models, pre_tokenizers

    config_path, run_dir = finished_copy
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "The",
        "naïve cat",
    ]  # a blank is no character of byte-level tokens
    backend = Tokenizer(
        models.WordLevel(dict(zip(words, range(5), strict=True)), unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "words.json"))
    weights = (run_dir / "model.safetensors").read_bytes()
    set_it = ["--set", f"data.tokenizer_path={tmp_path / 'words.json'}"]
    assert train.main(["--config", str(config_path), *set_it, flag]) == 2
    assert "byte-level" in errors_of(capsys)[0]
    assert (run_dir / "model.safetensors").read_bytes() == weights and checkpoints(run_dir)


def test_a_reader_that_goes_away_ends_the_run_like_ctrl_c(config_file, monkeypatch, capsys):
    def gone(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(RunLog, "on_log", gone)
    assert train.main(["--config", str(config_file())]) == 130
    assert "interrupted after step 1; nothing was saved yet" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step(config_file, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "create_model", interrupted)
    assert train.main(["--config", str(config_file())]) == train.EXIT_INTERRUPTED
    assert capsys.readouterr().err.endswith(
        "where a checkpoint is, go on with --resume_from_checkpoint latest\n"
    )


def test_another_course_from_an_earlier_checkpoint(config_file, tmp_path):
    """What was saved after it goes, and what is saved in its place is whole."""
    path, run_dir = config_file(), tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    newest, earlier = checkpoints(run_dir)
    (run_dir / "training_metrics.json").unlink()
    resume = [
        "--resume_from_checkpoint",
        str(earlier),
        "--num-epochs",
        "3",
        "--set",
        "training.save_steps=3",
    ]
    assert train.main(["--config", str(path), *resume, "--set", "training.logging_steps=2"]) == 0
    assert not newest.exists() or checkpoint_step(newest) % 3 == 0
    assert all(checkpoint_error(folder) is None for folder in checkpoints(run_dir))
    steps = [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    later = [step for step in steps if step > checkpoint_step(earlier)]
    assert {step for step in later if step % 2 == 0} >= set(range(later[0], later[-1], 2)), (
        "the new interval rules"
    )


def test_a_checkpoint_that_is_saved_again_is_whole(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"first")
    seal_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"second")
    assert checkpoint_error(tmp_path) == "model.safetensors has changed since it was saved"
    seal_checkpoint(tmp_path)
    assert checkpoint_error(tmp_path) is None


def test_nothing_to_resume(config_file, capsys):
    assert train.main(["--config", str(config_file()), "--resume_from_checkpoint", "latest"]) == 2
    assert "no whole checkpoint to resume from" in capsys.readouterr().err


# ---- mistakes -----------------------------------------------------------------------------------


def errors_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_a_missing_tokenizer_names_the_command(config_file, capsys):
    assert (
        train.main(["--config", str(config_file(data__tokenizer_path="nowhere/tokenizer.json"))])
        == 2
    )
    (line,) = errors_of(capsys)
    assert "nowhere/tokenizer.json not found" in line
    assert "python train_tokenizer.py --data-dir" in line


def test_missing_text_and_too_little_text(config_file, tmp_path, capsys):
    assert train.main(["--config", str(config_file(data__train_path="nowhere"))]) == 2
    assert "nowhere not found (data.train_path)" in errors_of(capsys)[0]
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.train").write_text("Only this.")
    assert train.main(["--config", str(config_file(data__train_path=str(tmp_path / "few")))]) == 2
    assert "32" in errors_of(capsys)[0]


def test_a_wrong_config_is_answered_before_torch(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("data: {}\nmodel: {type: Lama}\ntraining: {lr: 1, epochs: 2}\n")
    for arguments in (["--config", str(bad)], ["--config", "nowhere.yaml"]):
        code = (
            f"import sys, train\nassert train.main({arguments!r}) == 2\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_out_of_memory_says_what_helps(config_file, capsys):
    """The error that torch raises, at the first step; then the flags of the message are used as they stand."""

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    path = str(config_file(training__num_epochs=1, training__precision="fp32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "training_step", full)
        assert train.main(["--config", path]) == 2
    (line,) = errors_of(capsys)
    assert "--batch-size 4 --gradient-accumulation-steps 6 --fp16 (or --bf16) --overwrite; " in line
    less, further = line.split("less with ")[1].split("; ")
    flags = [
        *less.replace("(or --bf16)", "").split(),
        *further.removesuffix(" save more").replace(" and ", " ").split(),
    ]
    assert flags[-4:] == [
        "--set",
        "training.gradient_checkpointing=true",
        "--set",
        "training.chunked_loss=true",
    ]
    assert train.main(["--config", path, *flags]) == 0
    one = {"batch_size": 1, "gradient_accumulation_steps": 1, "fp16": False, "bf16": False}
    assert "; so do --fp16 (or --bf16), a smaller model" in memory_advice(
        {**one, "precision": "fp32"}
    )
    assert "; so do a smaller model" in memory_advice({**one, "precision": "bf16"})
    assert "fp16" not in memory_advice({"batch_size": 8, "gradient_accumulation_steps": 1, "precision": "bf16",
                                                "fp16": False, "bf16": True})  # fmt: skip


def test_a_run_that_saved_nothing_is_in_nobodys_way(config_file, tmp_path):
    config = train.load_config(config_file())
    run_dir = tmp_path / "models" / "tiny"
    start_run_dir(run_dir, config, {"train": {}}, checkpoint=None)
    assert (
        resolve_checkpoint(run_dir, config, {"train": {"words": 1}}, resume=None, overwrite=False)
        is None
    )


def test_a_checkpoint_that_is_not_there_is_said_of_a_finished_run_too(finished_copy, capsys):
    resume = ["--resume_from_checkpoint", str(finished_copy[1] / "checkpoint-9999")]
    assert train.main(["--config", str(finished_copy[0]), *resume]) == 2
    assert "checkpoint-9999: no such checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_another_directory_is_refused(finished_copy, capsys):
    config_path, run_dir = finished_copy
    checkpoint = str(checkpoints(run_dir)[0])
    assert (
        train.main(
            [
                "--config",
                str(config_path),
                "--model-name",
                "new",
                "--resume_from_checkpoint",
                checkpoint,
            ]
        )
        == 2
    )
    assert "is not of this run" in capsys.readouterr().err


def test_an_infinite_gradient_norm_is_logged_as_null(tmp_path):
    """fp16's loss scaler skips such steps; the log stays strict JSON."""
    from transformers import TrainerControl, TrainerState

    run_log = RunLog(tmp_path / "metrics.jsonl", 0.5, 100.0, 1e9)
    args = SimpleNamespace(device=torch.device("cpu"))
    run_log.on_train_begin(args, TrainerState(), TrainerControl())
    run_log.on_log(
        args,
        TrainerState(),
        TrainerControl(),
        {"loss": 2.0, "grad_norm": math.inf, "learning_rate": 1e-3},
    )
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert row["grad_norm"] is None


def test_each_checkpoint_has_a_row_to_go_on_from(config_file, tmp_path):
    """Seconds and tokens of a resumed run begin with those of its checkpoint, however seldom the log is written."""
    path = config_file(training__logging_steps=1000, training__save_steps=3, training__num_epochs=2)
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    rows = [json.loads(line) for line in (run_dir / LOG_FILE).read_text().splitlines()]
    timed = {row["step"]: row["tokens"] for row in rows if "tokens_per_second" in row}
    steps = [checkpoint_step(folder) for folder in checkpoints(run_dir)]
    assert len(steps) == 2 and set(steps) <= set(timed)
    assert set(range(3, max(steps) + 1, 3)) <= set(timed)


def test_a_log_that_was_torn_or_is_gone_stops_no_run(config_file, tmp_path):
    path, run_dir = config_file(), tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    log = (run_dir / "metrics.jsonl").read_text()
    for text in (log[: log.index("\n", len(log) // 3) + 40], None):  # in the middle of a line
        from_step = int(back_to_checkpoint(run_dir).partition("-")[2])
        (run_dir / "metrics.jsonl").unlink()
        if text is not None:
            (run_dir / "metrics.jsonl").write_text(text)
        assert train.main(["--config", str(path), "--resume_from_checkpoint", "latest"]) == 0
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        kept = [json.loads(line) for line in (text or "").splitlines()[:-1]]
        assert rows[: len(kept)] == kept and rows[len(kept)]["step"] > from_step
        before = next(
            row["tokens"] for row in map(json.loads, log.splitlines()) if row["step"] == from_step
        )
        timed = rows[-1]["tokens"] - before + (kept[-1]["tokens"] if kept else 0)
        found = json.loads((run_dir / "training_metrics.json").read_text())["results"][
            "tokens_per_second"
        ]
        assert found == pytest.approx(timed / rows[-1]["seconds"], rel=0.01)


@pytest.mark.parametrize("every", [2, 3])
def test_evaluation_leaves_the_dropout_alone(every, config_file, tmp_path):
    dropout = {"model__resid_pdrop": 0.1, "model__embd_pdrop": 0.1}
    losses = []
    for name, steps in (("often", every), ("seldom", 100)):
        path = config_file(
            model__type="GPT2",
            model__name=name,
            training__eval_steps=steps,
            training__logging_steps=1,
            **dropout,
        )
        assert train.main(["--config", str(path)]) == 0
        rows = map(json.loads, (tmp_path / "models" / name / "metrics.jsonl").open())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1]


def test_the_last_two_checkpoints_stay_whichever_was_the_best(config_file, tmp_path):
    """A learning rate that soon does harm: the checkpoint of the best evaluation takes no later one's place."""
    harmful = {
        "training__lr": 1e-2,
        "training__lr_scheduler": "constant",
        "training__adam_beta2": 0.5,
    }
    path = config_file(
        **harmful, training__save_steps=7, training__eval_steps=7, training__num_epochs=40
    )
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {
        row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"] % 7 == 0
    }
    kept = [checkpoint_step(folder) for folder in checkpoints(run_dir)]
    assert min(losses, key=losses.get) < min(kept)
    saved = sorted({*losses, rows[-1]["step"]})
    assert kept == saved[: -len(kept) - 1 : -1] and len(kept) == 2


def test_the_floor_of_a_file_is_that_of_its_folder(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "synthetic.dev").write_text("The cat sleeps.")
    assert create_synthetic_data.grammar_floor(str(tmp_path / "dev")) is None
    (tmp_path / "grammar.json").write_text('{"floor": {"bits_per_byte": 0.8}}')
    assert [
        create_synthetic_data.grammar_floor(str(tmp_path / p)) for p in ("dev", "dev/synthetic.dev")
    ] == [0.8, 0.8]
    (tmp_path / "dev" / "own.dev").write_text("Other text.")
    assert [
        create_synthetic_data.grammar_floor(str(tmp_path / p)) for p in ("dev", "dev/own.dev")
    ] == [None, None]
    (tmp_path / "dev" / "synthetic.dev").unlink()
    assert create_synthetic_data.grammar_floor(str(tmp_path / "dev")) is None


def test_a_foreign_grammar_is_named_before_anything_is_trained(
    config_file, corpus_dir, tmp_path, capsys
):
    for split in ("train", "dev"):
        shutil.copytree(corpus_dir / split, tmp_path / "own" / split)
    next((tmp_path / "own" / "dev").iterdir()).rename(tmp_path / "own" / "dev" / "synthetic.dev")
    (tmp_path / "own" / "grammar.json").write_text("{}")
    assert (
        train.main(["--config", str(config_file(data__eval_path=str(tmp_path / "own" / "dev")))])
        == 2
    )
    assert "grammar.json: is not of create_synthetic_data.py" in errors_of(capsys)[0]
    assert not (tmp_path / "models").exists()
