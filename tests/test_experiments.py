"""The scripts that measure run to their end, on models and texts too small for what they print to mean anything."""

from __future__ import annotations

import importlib
import json
import logging

import pytest
import torch
from conftest import ROOT, sentences

from babyllama.evaluation.loading import load_model
from babyllama.evaluation.scoring import ids_logprobs


@pytest.fixture
def script(monkeypatch, tmp_path):
    """script("scoring_speed") is that module of experiments/."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    yield importlib.import_module
    logging.disable(logging.NOTSET)


def test_training(script, config_file, capsys):
    options = [
        "--steps",
        "1",
        "--repeats",
        "1",
        "--micro",
        "8",
        "--formats",
        "fp32",
        "--ours",
        "as it is",
    ]
    assert script("training_speed").main(["--config", str(config_file()), *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    plain, ours = (next(row for row in rows if row[:1] == [name]) for name in ("plain,", "ours,"))
    assert float(plain[3].replace(",", "")) > 0 and float(plain[6]) == 1
    assert float(ours[2].replace(",", "")) > 0


def test_other_work_lasts_as_long_as_its_block(script, monkeypatch):
    module, started = script("training_speed"), []
    popen = module.subprocess.Popen
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda command: started.append(popen(command)) or started[-1]
    )
    with module.other_work(True):
        assert started[0].poll() is None
    assert started[0].poll() is not None
    with module.other_work(False):
        assert len(started) == 1


def test_teachers(script, config_file, capsys):
    path = str(config_file())
    assert script("distillation_speed").main(
        ["--config", path, "--teacher", path, "--steps", "1", "--repeats", "1", "--top-k", "4"]
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "two teachers, cached" in out and "the cache was written at" in out


def test_optimizers(script, config_file, capsys):
    assert script("optimizer_speed").main(["--config", str(config_file()), "--repeats", "1"]) == 0
    assert "Muon, ours" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["limit", "loop", "exact", "choose", "generation"])
def test_scoring(script, model_dirs, tmp_path, capsys, what):
    rows = [{"sentence_good": a, "sentence_bad": b, "UID": "x", "field": "syntax", "linguistics_term": "y", "pairID": str(i)}
            for i, (a, b) in enumerate(zip(sentences(9, seed=1), sentences(9, seed=2), strict=True))]  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [str(model_dirs["Llama"]), str(data), "--repeats", "1", "--measure", what]
    assert script("scoring_speed").main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    if what in ("loop", "exact", "choose"):
        assert found["work"] > 0 and len(found["choices"]) == 9
    elif what == "limit":
        assert found["pairs"] == 9 and found["prefixes"] <= found["tokens"]
    else:
        assert found["prompts"] == 9 and len(found["loop"]) == len(found["ours"]) == 1


@pytest.mark.parametrize("way", ["bare", "raw", "clean"])
def test_data(script, corpus_dir, tokenizer_file, capsys, way):
    folder = corpus_dir / "train"
    arguments = ["--data-dir", str(folder), "--tokenizer", str(tokenizer_file), "--measure", way]
    assert script("data_speed").main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        and found["seconds"] > 0
    )


def test_students_and_teachers(script, corpus_dir, tmp_path, monkeypatch, capsys):
    module, tiny = (
        script("distillation_quality"),
        {"type": "Llama", "hidden_size": 16, "n_layer": 1, "n_head": 2},
    )
    monkeypatch.setattr(module, "TEACHERS", dict.fromkeys(module.TEACHERS, tiny))
    monkeypatch.setattr(module, "STUDENT", tiny)
    options = [
        "--seeds",
        "1",
        "--teacher-epochs",
        "1",
        "--epochs",
        "2",
        "--words",
        "3000",
        "--top-k",
        "8",
    ]
    options += ["--data-dir", str(corpus_dir), "--output", str(tmp_path / "runs")]
    assert module.main(options) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[-5:]] == [
        "teacher-llama",
        "teacher-gpt2",
        "alone",
        "teachers",
        "teachers-published",
    ]
    assert all(float(row[3]) > 0 for row in rows[-5:])


def test_the_strided_recipe_is_ours(script, model_dirs):
    """agreement.py's recipe, in float64, against evaluation/scoring.py, on windows that are full to the last."""
    model, _ = load_model(model_dirs["GPT2"], "cpu")
    ids = torch.randint(3, 400, (16 + 8 * 5,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = script("agreement").strided_loss(model, ids, 16, 8)
    (ours,) = ids_logprobs(model, [ids], context=15, stride=8)
    assert -ours.logprobs.mean() == pytest.approx(theirs, rel=1e-6)
