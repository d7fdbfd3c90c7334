"""Train real tiny models from YAML files, and check models, losses, runs and errors."""

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, build_tiny_model, errors_of, rows_of, tiny_config

import create_synthetic_data
import train
from babyllama.cli import EXIT_INTERRUPTED
from babyllama.config import check_config
from babyllama.data.tokenizer import byte_lengths
from babyllama.planning.execution import pick_precision
from babyllama.planning.memory import memory_advice
from babyllama.runs.checkpoints import checkpoints
from babyllama.runs.run_dir import METRICS_FILE
from babyllama.training.arguments import training_arguments
from babyllama.training.held_out import evaluate_chunks
from babyllama.training.loss import NextTokenLoss
from babyllama.training.run_log import RunLog
from babyllama.training.trainer import LMTrainer, collate_chunks
from data_utils import DataProcessor


class TokenizerSize:
    """Stand in for a tokenizer: create_model needs only its size and special ids."""

    bos_token_id = 1
    eos_token_id = 2
    pad_token_id = 0

    def __init__(self, size=16000):
        self.size = size

    def __len__(self):
        return self.size


# ---- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ", "Qwen3"])
def test_create_model_uses_every_key(kind):
    section = {
        "type": kind,
        "hidden_size": 48,
        "intermediate_size": 80,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 320,
        "tie_word_embeddings": True,
    }
    has_dropout = kind in ("GPT2", "GPTJ")
    if has_dropout:
        section |= {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3}
    model = train.create_model({"model": section}, TokenizerSize(300))
    config = model.config
    endings = {"GPT2": "LMHeadModel"}
    assert type(model).__name__ == kind + endings.get(kind, "ForCausalLM")
    assert config.vocab_size == 320
    assert config.hidden_size == 48
    assert config.num_hidden_layers == 3
    assert config.num_attention_heads == 4
    assert config.max_position_embeddings == 128
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    matrices = {p.shape for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    assert any(80 in shape for shape in matrices), "intermediate_size is not used"
    if kind == "Qwen3":
        assert {p.shape for n, p in model.named_parameters() if "k_proj" in n} == {(48, 48)}
        assert {p.shape for n, p in model.named_parameters() if "k_norm" in n} == {(12,)}
    if has_dropout:
        assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("kind", ["GPT2", "GPTJ"])
@pytest.mark.parametrize("key", [None, "resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_key_has_an_effect(kind, key):
    section = {"type": kind, "hidden_size": 48, "n_layer": 2, "n_head": 4}
    if key:
        section[key] = 0.5
    model = train.create_model({"model": section}, TokenizerSize()).train()
    ids = torch.arange(20)[None]
    first = model(input_ids=ids).logits
    second = model(input_ids=ids).logits
    assert torch.equal(first, second) == (key is None)


def test_create_model_needs_only_the_model_section():
    section = {
        "type": "Llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "n_layer": 8,
        "n_head": 8,
        "vocab_size": 16000,
    }
    # 2 embeddings, 8 layers of (4 attention + 3 feed-forward matrices + 2 norms), 1 norm
    expected = 2 * 16000 * 384 + 8 * (4 * 384 * 384 + 3 * 384 * 1024 + 2 * 384) + 384
    assert train.create_model({"model": section}, TokenizerSize()).num_parameters() == expected


def test_prepare_datasets_modern_needs_only_two_paths(corpus_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path))
    path = str(corpus_dir / "train" / "toy.train")
    section = {"train_path": path, "eval_path": path}
    train_data, eval_data = train.prepare_datasets_modern({"data": section}, tokenizer)
    assert len(train_data[0]["input_ids"]) == 128
    assert 0 < len(eval_data) <= 256
    shifted_config = {"data": {**section, "random_offset": True}}
    shifted, _ = train.prepare_datasets_modern(shifted_config, tokenizer)
    assert len(shifted) == len(train_data) - 1
    with pytest.raises(
        ValueError, match=r"data.seq_len: unknown key; did you mean data.seq_length\?"
    ):
        train.prepare_datasets_modern({"data": {**section, "seq_len": 3}}, tokenizer)


def test_an_unknown_model_type_or_too_small_a_vocabulary_is_an_error():
    with pytest.raises(
        ValueError, match="Unknown model type: 'BERT'; known: Llama, GPT2, GPTJ, Qwen3"
    ):
        train.create_model({"model": {"type": "BERT"}}, TokenizerSize())
    small = {"type": "Llama", "hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    with pytest.raises(ValueError, match="100 is less than the tokenizer's 16000 tokens; use"):
        train.create_model({"model": small}, TokenizerSize())


# ---- loss and evaluation --------------------------------------------------------------------------


def chunks(n: int, length: int = 32, seed: int = 0) -> list[dict]:
    ids = np.random.default_rng(seed).integers(3, 400, (n, length)).astype(np.uint16)
    return [{"input_ids": row} for row in ids]


def naive_nll(model, rows) -> float:
    """Return the sum of -log p in float64, one chunk and one position at a time."""
    model = model.double().eval()
    total = 0.0
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
    model = build_tiny_model(kind)
    rows = chunks(11)
    n_bytes = np.random.default_rng(1).integers(0, 9, 400)
    expected = naive_nll(build_tiny_model(kind), rows)
    for batch_size in (1, 2, 7, 64):
        scores = evaluate_chunks(model, rows, torch.as_tensor(n_bytes), batch_size)
        assert scores["tokens"] == 11 * 31
        assert scores["loss"] == pytest.approx(expected / (11 * 31), rel=1e-6)
        assert scores["perplexity"] == pytest.approx(math.exp(expected / (11 * 31)), rel=1e-5)
        count = sum(int(n_bytes[t]) for row in rows for t in row["input_ids"][1:])
        assert scores["bytes"] == count
        assert scores["bits_per_byte"] == pytest.approx(expected / math.log(2) / count, rel=1e-6)


def test_held_out_bytes_are_those_of_the_text_without_the_added_spaces(
    spaced_tokenizer, corpus_dir, tmp_path
):
    processor = DataProcessor(spaced_tokenizer, tmp_path)
    folders = (str(corpus_dir / "train"), str(corpus_dir / "dev"))
    rows = processor.prepare_dataset(*folders, max_length=7, clean=False)["validation"]
    lengths = torch.as_tensor(byte_lengths(spaced_tokenizer))
    scores = evaluate_chunks(build_tiny_model("Llama"), rows.with_format("numpy"), lengths, 64)

    # count in the decoded text, in which <s> stands before the added space
    first_tokens = [row[0] for row in rows["input_ids"]]
    token_ids = np.concatenate(rows["input_ids"])
    text = spaced_tokenizer.decode(token_ids).replace("<s> ", "").replace("</s>", "")
    expected = len(text.encode())
    for previous, token_id in zip([2, *token_ids[6::7]], first_tokens, strict=False):
        token = spaced_tokenizer.decode([token_id], skip_special_tokens=True)
        expected -= len(token.encode()) - (previous == 1)
    assert scores["bytes"] == expected
    assert 1 in first_tokens and 1 in token_ids[6::7], "a chunk starts and one ends with <s>"


def make_trainer(tmp_path, model, rows, loss=None, **training) -> LMTrainer:
    config = check_config(tiny_config(tmp_path, tmp_path, tmp_path))
    config["training"] |= training
    run_log = RunLog(
        tmp_path / "metrics.jsonl", words_per_token=0.5, flops_per_token=100.0, matmul_flops=1e9
    )
    return LMTrainer(
        model=model,
        args=training_arguments(config, tmp_path, "fp32"),
        train_dataset=rows,
        eval_dataset=rows[:2],
        byte_lengths=np.ones(400, dtype=np.int64),
        callbacks=[run_log],
        training=config["training"],
        loss=loss or NextTokenLoss(),
    )


def test_uneven_accumulation_equals_one_large_batch(tmp_path):
    """7 chunks as 3 + 3 + 1 change the weights like one batch of 7, up to rounding."""
    weights = []
    for batch_size, accumulation in ((3, 3), (7, 1)):
        model = build_tiny_model("Llama").train()
        trainer = make_trainer(
            tmp_path / str(batch_size),
            model,
            chunks(7),
            batch_size=batch_size,
            num_epochs=1,
            gradient_accumulation_steps=accumulation,
            lr_scheduler="constant",
        )
        trainer.train()
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in build_tiny_model("Llama").parameters()])
    assert (weights[0] - start).abs().max() > 1e-4
    # Adam's first step is lr * sign(gradient): only signs of tiny gradients may differ
    assert ((weights[0] - weights[1]).abs() > 1e-5).float().mean() < 0.01


def test_the_log_holds_the_exact_loss_of_each_step(tmp_path):
    rows = chunks(7)
    trainer = make_trainer(
        tmp_path, build_tiny_model("GPT2").train(), rows, batch_size=3, num_epochs=1
    )
    trainer.train()
    first_row = rows_of(tmp_path)[0]
    expected = naive_nll(build_tiny_model("GPT2"), rows) / (7 * 31)
    assert first_row["loss"] == pytest.approx(expected, rel=1e-6)
    assert first_row["tokens"] == 7 * 32


PINNED = (6.02206, 5.48683)  # losses of the first and the last step


def test_pinned_loss(tmp_path):
    """Guard the path from text to gradient: a refactoring that changes these numbers is wrong."""
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_plain_loop_has_the_same_losses(
    config_file, tokenizer, tmp_path, monkeypatch, optimizer
):
    """Compare from text to loss, to the last bit, also in the short last step of an epoch."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    changes = {"optimizer": optimizer, "warmup_steps": 3, "logging_steps": 1}
    path = config_file(**{f"training__{key}": value for key, value in changes.items()})
    config = train.load_config(str(path))
    rows = list(train.prepare_datasets_modern(config, tokenizer)[0])
    torch.manual_seed(config["training"]["seed"])
    model = train.create_model(config, tokenizer).train()
    make_trainer(tmp_path, model, rows, **changes).train()

    assert len(rows) % 24
    expected = [row["loss"] for row in rows_of(tmp_path) if "loss" in row]
    assert importlib.import_module("plain_loop").train(config) == expected


def test_the_first_token_of_a_chunk_is_no_label_and_there_is_no_attention_mask():
    batch = collate_chunks(chunks(3))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == torch.int64
    assert (batch["labels"][:, 0] == -100).all()
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


def test_an_infinite_gradient_norm_is_logged_as_null(tmp_path):
    """The loss scaler of fp16 skips such steps; the log stays strict JSON."""
    from transformers import TrainerControl, TrainerState

    run_log = RunLog(tmp_path / "metrics.jsonl", 0.5, 100.0, 1e9)
    args = SimpleNamespace(device=torch.device("cpu"))
    run_log.on_train_begin(args, TrainerState(), TrainerControl())
    values = {"loss": 2.0, "grad_norm": math.inf, "learning_rate": 1e-3}
    run_log.on_log(args, TrainerState(), TrainerControl(), values)
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert row["grad_norm"] is None


@pytest.mark.parametrize("eval_steps", [2, 3])
def test_evaluation_does_not_change_dropout(eval_steps, config_file, tmp_path):
    losses = {}
    for name, steps in (("often", eval_steps), ("rarely", 100)):
        path = config_file(
            model__type="GPT2",
            model__name=name,
            model__resid_pdrop=0.1,
            model__embd_pdrop=0.1,
            training__eval_steps=steps,
            training__logging_steps=1,
        )
        assert train.main(["--config", str(path)]) == 0
        rows = rows_of(tmp_path / "models" / name)
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert losses["often"] == losses["rarely"]


# ---- runs -----------------------------------------------------------------------------------------


def test_a_finished_run_is_a_plain_model_directory(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config_path, run_dir = finished
    names = {path.name for path in run_dir.iterdir() if path.is_file()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_config.yaml",
        "data_report.json",
        "metrics.jsonl",
        "training_metrics.json",
        "training_curves.png",
        "README.md",
        "status.json",
    }
    assert not list(run_dir.rglob("training_args.bin"))
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    assert model.config.use_cache is True
    assert model.generation_config.eos_token_id in (2, [2])  # a list in older releases
    assert tokenizer("The cat")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.model_max_length == 32

    def refuse_constant(name):
        raise AssertionError(f"{name} in JSON")

    metrics = json.loads(
        (run_dir / "training_metrics.json").read_text(), parse_constant=refuse_constant
    )
    results = metrics["results"]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert rows[-1]["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert rows[-1]["tokens"] == results["tokens_trained"]
    assert results["tokens_trained"] == metrics["data"]["train"]["chunks"] * 32 * 2
    assert results["eval_loss"] < 0.9 * math.log(400), "the model learned nothing"
    assert len(metrics["samples"]) == 3
    assert train.load_config(run_dir / "training_config.yaml") == metrics["config"]
    assert train.load_config(config_path) == metrics["config"]
    card = (run_dir / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    values = {m["type"]: m["value"] for m in header["model-index"][0]["results"][0]["metrics"]}
    assert values["loss"] == round(results["eval_loss"], 4)
    assert f"{results['eval_bits_per_byte']:.4f}" in card.split("---\n", 2)[2]
    assert (run_dir / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_card_is_valid_and_its_example_runs(finished, corpus_dir, monkeypatch, capsys):
    from huggingface_hub import ModelCard

    _, run_dir = finished
    card = ModelCard.load(run_dir / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.language is None and card.data.license is None  # nobody said which
    assert card.data.tags == ["trained-from-scratch", "llama"]
    words = len((corpus_dir / "train" / "toy.train").read_text().split())
    assert f"It read {words:,} words 2 times: toy." in card.text
    (loss, *_) = card.data.eval_results
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    assert loss.metric_value == round(metrics["results"]["eval_loss"], 4)
    assert loss.dataset_name == "held-out toy"
    (example,) = re.findall(r"^```python\n(.*?)^```", card.text, re.M | re.S)
    monkeypatch.chdir(run_dir.parent)
    capsys.readouterr()
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_pipelines_stop_at_the_context(kind, tokenizer, tmp_path):
    from transformers import pipeline

    torch.manual_seed(0)
    section = {"type": kind, "name": "tiny", "hidden_size": 32, "n_layer": 1, "n_head": 4}
    model = train.create_model({"data": {"seq_length": 32}, "model": section}, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    never = [[tokenizer.eos_token_id]]  # so that only the context ends the text
    (text,) = generator("The cat", return_tensors=True, bad_words_ids=never)
    assert len(text["generated_token_ids"]) == 32


def test_the_saved_model_has_the_reported_loss(finished, tokenizer):
    """Compute the held-out loss from the saved files with a plain float64 loop."""
    from transformers import AutoModelForCausalLM

    config_path, run_dir = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(config_path.parent / "cache"))
        _, eval_data = train.prepare_datasets_modern(train.load_config(config_path), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    results = json.loads((run_dir / "training_metrics.json").read_text())["results"]
    expected = naive_nll(model, eval_data) / results["eval_tokens"]
    assert expected == pytest.approx(results["eval_loss"], rel=1e-5)
    texts = [tokenizer.decode(row["input_ids"][1:], skip_special_tokens=True) for row in eval_data]
    n_bytes = sum(len(text.encode()) for text in texts)
    assert results["eval_bytes"] == pytest.approx(n_bytes, rel=1e-3)


def test_runs_are_equal_if_and_only_if_their_seeds_are(config_file, tmp_path):
    path = config_file(training__num_epochs=1)
    weights = {}
    for name, seed in (("first", 1), ("repeated", 1), ("other", 2)):
        assert train.main(["--config", str(path), "--model-name", name, "--seed", str(seed)]) == 0
        weights[name] = (tmp_path / "models" / name / "model.safetensors").read_bytes()
    assert weights["first"] == weights["repeated"]
    assert weights["first"] != weights["other"]


@pytest.mark.parametrize("max_steps", [5, 1000])
def test_max_steps_ends_the_run(max_steps, config_file, tmp_path, capsys):
    """The learning rate decays with a limit within an epoch (5) and beyond the last (1000)."""
    path = config_file(training__logging_steps=1)
    assert train.main(["--config", str(path), "--set", f"training.max_steps={max_steps}"]) == 0
    run_dir = tmp_path / "models" / "tiny"
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    rows = rows_of(run_dir)
    steps = metrics["plan"]["steps"]
    assert (steps == 5) == (max_steps == 5)
    assert rows[-1]["step"] == steps
    assert "eval_loss" in rows[-1]
    assert metrics["results"]["tokens_trained"] == metrics["plan"]["tokens"] == rows[-1]["tokens"]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates[-1] < 0.2 * max(rates)
    if max_steps == 5:
        assert metrics["plan"]["tokens"] == 5 * metrics["plan"]["tokens_per_step"]
        assert metrics["plan"]["epochs"] < 1
        # without the key, the run can be resumed to the end of its epochs
        assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
        assert json.loads((run_dir / METRICS_FILE).read_text())["plan"]["epochs"] == 2
        assert "epochs, about" in capsys.readouterr().out


def test_dry_run_writes_nothing(config_file, tmp_path, capsys):
    assert train.main(["--config", str(config_file()), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "768 tokens" in out  # 8 x 3 x 32
    assert "<s>The " in out
    assert not (tmp_path / "models").exists()


def test_ctrl_c_before_training_exits_with_130(config_file, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "create_model", interrupted)
    assert train.main(["--config", str(config_file())]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err.endswith("the same command starts again\n")


# ---- precision ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_fp16_falls_back_without_cuda():
    training = check_config(tiny_config(Path(), Path(), Path()))["training"]
    precision, reason = pick_precision({**training, "fp16": True, "precision": "auto"})
    assert precision in ("bf16", "fp32")
    assert reason.startswith("fp16 needs CUDA")
    assert pick_precision({**training, "precision": "fp32"}) == ("fp32", "as requested")
    assert pick_precision({**training, "precision": "auto"})[0] == precision


def test_precision_flags_override_the_config(config_file):
    """Flags also override what the machine would choose, and --set overrides the other flags."""

    def precision(value: str, **flags) -> str:
        path = str(config_file(training__precision=value))
        return train.load_config(path, SimpleNamespace(**flags))["training"]["precision"]

    assert precision("fp32", bf16=False) == "fp32"
    assert precision("fp16", fp16=False) == "fp32"
    assert precision("fp16", bf16=False) == "fp16"
    assert precision("auto", fp16=False) == "auto"
    assert precision("auto", bf16=False, set=["training.precision=bf16"]) == "bf16"

    def picked(**flags) -> str:
        path = str(config_file(training__precision="auto"))
        return pick_precision(train.load_config(path, SimpleNamespace(**flags))["training"])[0]

    assert picked(bf16=False) == "fp32"
    assert picked(bf16=True) == "bf16"


# ---- warnings -------------------------------------------------------------------------------------


def test_held_out_text_in_the_training_text_gets_a_warning(
    config_file, corpus_dir, tmp_path, caplog
):
    path = config_file(data__eval_path=str(corpus_dir / "train" / "toy.train"))
    assert train.main(["--config", str(path), "--dry-run"]) == 0
    assert "held-out text is training text too: toy.train" in caplog.text
    caplog.clear()
    for split in ("train", "dev"):
        shutil.copytree(corpus_dir / split, tmp_path / split)
        (tmp_path / split / f"empty.{split}").write_text("")
    apart = config_file(
        data__train_path=str(tmp_path / "train"), data__eval_path=str(tmp_path / "dev")
    )
    assert train.main(["--config", str(apart), "--dry-run"]) == 0
    assert "training text too" not in caplog.text


def test_a_warm_up_longer_than_the_run_gets_a_warning(config_file, caplog):
    assert train.main(["--config", str(config_file(training__warmup_steps=900)), "--dry-run"]) == 0
    assert "training.warmup_steps: 900, but the run has" in caplog.text


def test_more_steps_than_the_epochs_have_get_a_warning(config_file, caplog):
    assert train.main(["--config", str(config_file(training__max_steps=900)), "--dry-run"]) == 0
    assert "training.max_steps: 900, but 2 epochs have only 16 steps" in caplog.text


def test_the_plan_says_over_how_many_epochs_weights_forget(config_file, caplog, capsys):
    """An epoch has 8 steps, and 1 / (3e-3 x 0.1) = 3,333 steps are 3,333 / 8 epochs."""
    ten_epochs = config_file(training__num_epochs=10)
    assert train.main(["--config", str(ten_epochs), "--dry-run"]) == 0
    assert "forget over 3,333 steps, 4" in capsys.readouterr().out
    (warning,) = [line for line in caplog.messages if "weight_decay" in line]
    better = warning.split()[-1]
    caplog.clear()
    flags = ["--dry-run", "--set", f"training.weight_decay={better}"]
    assert train.main(["--config", str(ten_epochs), *flags]) == 0
    assert " steps, 2 epochs" in capsys.readouterr().out
    flags = ["--dry-run", "--set", "training.weight_decay=0"]
    assert train.main(["--config", str(ten_epochs), *flags]) == 0
    assert "decay       none" in capsys.readouterr().out
    assert train.main(["--config", str(config_file(training__num_epochs=4)), "--dry-run"]) == 0
    assert "weight_decay" not in caplog.text


def test_fsdp_in_one_process_gets_a_warning(config_file, caplog):
    flags = ["--dry-run", "--set", "training.fsdp=true"]
    assert train.main(["--config", str(config_file()), *flags]) == 0
    assert "training.fsdp: true has no effect in one process" in caplog.text


# ---- errors ---------------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_an_error_with_the_command_that_trains_it(config_file, capsys):
    path = config_file(data__tokenizer_path="nowhere/tokenizer.json")
    assert train.main(["--config", str(path)]) == 2
    (line,) = errors_of(capsys)
    assert "nowhere/tokenizer.json not found" in line
    assert "python train_tokenizer.py --data-dir" in line
    assert "--vocab-size" not in line
    path = config_file(data__tokenizer_path="nowhere/tokenizer.json", model__vocab_size=300)
    assert train.main(["--config", str(path)]) == 2
    assert errors_of(capsys)[0].endswith("--vocab-size 300")
    path = config_file(data__train_path="nowhere/train", model__vocab_size=300)
    assert train.main(["--config", str(path)]) == 2
    assert errors_of(capsys)[0].endswith("--tokenizer-vocab 300")


def test_a_missing_path_suggests_a_similar_one_that_exists(config_file, tmp_path, capsys):
    text = tmp_path / "own" / "train"
    text.mkdir(parents=True)
    path = config_file(data__train_path=str(tmp_path / "owm" / "train"))
    assert train.main(["--config", str(path)]) == 2
    assert errors_of(capsys)[0].endswith(f"; did you mean {text}?")
    path = config_file(data__train_path=str(tmp_path / "owm" / "dev"))
    assert train.main(["--config", str(path)]) == 2
    assert "did you mean" not in errors_of(capsys)[0], "own/dev does not exist either"


def test_missing_text_or_too_little_text_is_an_error(config_file, tmp_path, capsys):
    assert train.main(["--config", str(config_file(data__train_path="nowhere"))]) == 2
    assert f"nowhere not found (data.train_path) in {Path.cwd()}: " in errors_of(capsys)[0]
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.train").write_text("Only this.")
    assert train.main(["--config", str(config_file(data__train_path=str(tmp_path / "few")))]) == 2
    assert "32" in errors_of(capsys)[0]


def test_a_wrong_config_is_reported_before_torch_is_imported(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("data: {}\nmodel: {type: Lama}\ntraining: {lr: 1, epochs: 2}\n")
    for arguments in (["--config", str(bad)], ["--config", "nowhere.yaml"]):
        code = (
            f"import sys, train\nassert train.main({arguments!r}) == 2\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
        )
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        assert "Traceback" not in process.stderr
        assert all(line.startswith("error: ") for line in process.stderr.splitlines())


def test_out_of_memory_suggests_flags_that_work(config_file, capsys):
    """Raise torch's error at the first step, then train with the flags of the message."""

    def run_out_of_memory(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    path = str(config_file(training__num_epochs=1, training__precision="fp32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "training_step", run_out_of_memory)
        assert train.main(["--config", path]) == 2
    (line,) = errors_of(capsys)
    assert "--batch-size 4 --gradient-accumulation-steps 6 --fp16 (or --bf16); " in line
    first_advice, second_advice = line.split("less with ")[1].split("; ")
    flags = first_advice.replace("(or --bf16)", "").split()
    flags += second_advice.removesuffix(" save more").replace(" and ", " ").split()
    settings = "--set training.gradient_checkpointing=true --set training.chunked_loss=true"
    assert flags[-4:] == settings.split()
    assert train.main(["--config", path, *flags]) == 0


def test_memory_advice_suggests_only_flags_that_save_memory():
    smallest = {"batch_size": 1, "gradient_accumulation_steps": 1, "fp16": False, "bf16": False}
    fp32_advice = memory_advice({**smallest, "precision": "fp32"})
    assert "; so do --fp16 (or --bf16), a smaller model" in fp32_advice
    assert "; so do a smaller model" in memory_advice({**smallest, "precision": "bf16"})
    large = {**smallest, "batch_size": 8, "precision": "bf16", "bf16": True}
    assert "fp16" not in memory_advice(large)


@pytest.mark.parametrize("flag", ["--overwrite", "--dry-run"])
def test_a_word_level_tokenizer_is_refused_before_anything_is_deleted(
    finished_copy, tmp_path, flag, capsys
):
    from tokenizers import Tokenizer, models, pre_tokenizers

    config_path, run_dir = finished_copy
    # no byte-level token has a blank
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "The": 3, "naïve cat": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "words.json"))
    weights = (run_dir / "model.safetensors").read_bytes()
    setting = f"data.tokenizer_path={tmp_path / 'words.json'}"
    assert train.main(["--config", str(config_path), "--set", setting, flag]) == 2
    assert "byte-level" in errors_of(capsys)[0]
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert checkpoints(run_dir)


def test_a_wrong_grammar_file_is_an_error_before_training(
    config_file, corpus_dir, tmp_path, capsys
):
    edited = tmp_path / "edited"
    for split in ("train", "dev"):
        shutil.copytree(corpus_dir / split, edited / split)
    next((edited / "dev").iterdir()).rename(edited / "dev" / "synthetic.dev")
    (edited / "grammar.json").write_text("{}")
    path = config_file(data__eval_path=str(edited / "dev"))
    assert train.main(["--config", str(path)]) == 2
    assert "grammar.json: was not written by create_synthetic_data.py" in errors_of(capsys)[0]
    assert not (tmp_path / "models").exists()


def test_only_synthetic_text_alone_has_the_floor_of_its_grammar(tmp_path):
    folder = tmp_path / "dev"
    folder.mkdir()
    synthetic = folder / "synthetic.dev"
    synthetic.write_text("The cat sleeps.")
    assert create_synthetic_data.grammar_floor(str(folder)) is None
    (tmp_path / "grammar.json").write_text('{"floor": {"bits_per_byte": 0.8}}')
    assert create_synthetic_data.grammar_floor(str(folder)) == 0.8
    assert create_synthetic_data.grammar_floor(str(synthetic)) == 0.8
    other = folder / "other.dev"
    other.write_text("Other text.")
    assert create_synthetic_data.grammar_floor(str(folder)) is None
    assert create_synthetic_data.grammar_floor(str(other)) is None
    synthetic.unlink()
    assert create_synthetic_data.grammar_floor(str(folder)) is None
