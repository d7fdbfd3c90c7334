"""The scripts that measure speed run to their end, on models and texts too small for what they print to mean anything."""

from __future__ import annotations

import importlib
import json
import logging

import pytest
from conftest import ROOT, sentences


@pytest.fixture
def script(monkeypatch, tmp_path):
    """script("scoring_speed") is that module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    yield importlib.import_module
    logging.disable(logging.NOTSET)


def test_training(script, config_file, capsys):
    options = ["--steps", "1", "--repeats", "1", "--micro", "8", "--formats", "fp32", "--ours", "as it is"]
    assert script("training_speed").main(["--config", str(config_file()), *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    plain, ours = (next(row for row in rows if row[:1] == [name]) for name in ("plain,", "ours,"))
    assert float(plain[3].replace(",", "")) > 0 and float(plain[6]) == 1
    assert float(ours[2].replace(",", "")) > 0


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
