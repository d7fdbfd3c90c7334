"""Run every experiment on models and texts too small for its figures to mean anything."""

from __future__ import annotations

import importlib
import json
import logging
import os

import pytest
import torch
from conftest import ROOT, sentences

from babyllama.evaluation.loading import load_model
from babyllama.evaluation.scoring import ids_logprobs


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a module of experiments/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    yield importlib.import_module
    logging.disable(logging.NOTSET)


def test_training_speed_prints_a_row_for_each_variant(script, config_file, capsys):
    options = ["--steps", "1", "--repeats", "1", "--micro", "8", "--formats", "fp32"]
    options += ["--ours", "as it is", "--config", str(config_file())]
    assert script("training_speed").main(options) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    plain, ours = (next(row for row in rows if row[:1] == [name]) for name in ("plain,", "ours,"))
    assert float(plain[3].replace(",", "")) > 0 and float(plain[6]) == 1
    assert float(ours[2].replace(",", "")) > 0


def test_children_get_the_threads_of_the_user(script, tmp_path, monkeypatch):
    """babyllama's setting must not reach the plain script that it is compared with."""
    common = script("common")
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os; print(json.dumps({'spins': os.environ.get('GOMP_SPINCOUNT')}))"
    )
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(common, "USER_ENVIRONMENT", dict(os.environ))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert common.run_child(str(child), []) == {"spins": None}
    common.use_default_threads()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_distillation_speed_measures_all_ways(script, config_file, capsys):
    path = str(config_file())
    assert script("distillation_speed").main(
        ["--config", path, "--teacher", path, "--steps", "1", "--repeats", "1", "--top-k", "4"]
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "two teachers, cached" in out
    assert "the cache was written at" in out


def test_optimizer_speed_measures_our_muon(script, config_file, capsys):
    assert script("optimizer_speed").main(["--config", str(config_file()), "--repeats", "1"]) == 0
    assert "Muon of train.py" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loop", "choose", "generation"])
def test_scoring_speed_measures_one_thing(script, model_dirs, tmp_path, capsys, what):
    rows = [{"sentence_good": a, "sentence_bad": b, "UID": "x", "field": "syntax", "linguistics_term": "y", "pairID": str(i)}
            for i, (a, b) in enumerate(zip(sentences(9, seed=1), sentences(9, seed=2), strict=True))]  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [str(model_dirs["Llama"]), str(data), "--repeats", "1", "--measure", what]
    assert script("scoring_speed").main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    if what == "generation":
        assert result["prompts"] == 9 and len(result["loop"]) == len(result["ours"]) == 1
    else:
        assert result["work"] > 0 and len(result["choices"]) == 9


@pytest.mark.parametrize("way", ["bare", "raw", "clean"])
def test_data_speed_measures_one_way(script, corpus_dir, tokenizer_file, capsys, way):
    folder = corpus_dir / "train"
    arguments = ["--data-dir", str(folder), "--tokenizer", str(tokenizer_file), "--measure", way]
    assert script("data_speed").main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert result["seconds"] > 0


def test_distillation_quality_trains_teachers_and_students(
    script, corpus_dir, tmp_path, monkeypatch, capsys
):
    module = script("distillation_quality")
    tiny = {"type": "Llama", "hidden_size": 16, "n_layer": 1, "n_head": 2}
    monkeypatch.setattr(module, "TEACHERS", dict.fromkeys(module.TEACHERS, tiny))
    monkeypatch.setattr(module, "STUDENT", tiny)
    options = ["--seeds", "1", "--teacher-epochs", "1", "--epochs", "2"]
    options += ["--words", "3000", "--top-k", "8"]
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


def test_strided_recipe_equals_our_windows(script, model_dirs):
    """Compare the recipe in float64 with evaluation/scoring.py on a text of full windows."""
    model, _ = load_model(model_dirs["GPT2"], "cpu")
    ids = torch.randint(3, 400, (16 + 8 * 5,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = script("agreement").strided_loss(model, ids, 16, 8)
    (scores,) = ids_logprobs(model, [ids], context=15, stride=8)
    assert -scores.logprobs.mean() == pytest.approx(expected, rel=1e-6)


PAIR = {"sentence_good": "The cat sees the dog.", "sentence_bad": "The cat see the dog.", "UID": "x",
        "field": "syntax", "linguistics_term": "y", "pairID": "0"}  # fmt: skip


@pytest.fixture
def blimp(tmp_path):
    """Return a folder with a minimal pair in BLiMP's format."""
    folder = tmp_path / "blimp"
    folder.mkdir()
    (folder / "x.jsonl").write_text(json.dumps(PAIR))
    return folder


def test_race_measures_finished_contestants(
    script, model_dirs, corpus_dir, blimp, tmp_path, capsys
):
    race = script("race")
    figures = {"steps": 7, "tokens": 28_672, "words": 20_000, "seconds": 90.0}
    curve = [{"minutes": 1.0, "bits_per_byte": 3.0}, {"minutes": 1.5, "bits_per_byte": 2.5}]
    for name, kind in (("ours", "Llama"), ("plain", "GPT2")):
        record = {**figures, "model": str(model_dirs[kind]), "curve": curve}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    options = ["--data", str(corpus_dir), "--blimp", str(blimp), "--output", str(tmp_path)]
    assert race.main(options) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " 1.5 " in line]
    measured = json.loads((tmp_path / "race.json").read_text())
    assert [row[0] for row in rows] == ["| ours", "| plain"]
    for name, row in zip(measured, rows, strict=True):
        assert row[1:4] == ["1.5", "7", "20,000"]
        assert row[4].startswith(f"{measured[name]['bits_per_byte']:.4f} (")
        assert row[5].split()[0] in ("0.0", "100.0")
        assert measured[name]["total_bytes"] > 4000
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_race_refuses_a_number_of_steps_below_one(script, capsys):
    assert script("race").main(["--plain-steps", "0"]) == 2
    assert "--plain-steps 0 must be 1 or more" in capsys.readouterr().err


def test_race_chooses_the_best_learning_rate_of_the_plain_script(script, corpus_dir, tmp_path):
    rates = ["1e-9", "1e-3"]  # the best is not the first
    options = ["--data", str(corpus_dir), "--output", str(tmp_path), "--contestants", "tuned"]
    assert script("race").main([*options, "--plain-steps", "3", "--lrs", *rates]) == 0
    tuned = json.loads((tmp_path / "race.json").read_text())["tuned"]
    assert tuned["lr"] == 1e-3 and tuned["steps"] == 3
    best = json.loads((tmp_path / "tuned-0.001" / "curve.json").read_text())
    other = json.loads((tmp_path / "tuned-1e-09" / "curve.json").read_text())
    assert best[-1]["bits_per_byte"] < other[-1]["bits_per_byte"]
    assert tuned["curve"][-1] == best[-1]


@pytest.mark.slow
def test_race_trains_and_measures_both(script, corpus_dir, blimp, tmp_path, capsys, monkeypatch):
    race = script("race")
    monkeypatch.setitem(race.USER_ENVIRONMENT, "OMP_NUM_THREADS", "1")
    for split, times in (("train", 4), ("dev", 1)):
        (tmp_path / "raw" / split).mkdir(parents=True)
        text = (corpus_dir / split / f"toy.{split}").read_text()
        (tmp_path / "raw" / split / f"toy.{split}").write_text("\n\n".join([text] * times))
    output = tmp_path / "race"
    options = ["--raw", str(tmp_path / "raw"), "--minutes", "1", "--output", str(output)]
    for key in ("model.vocab_size=300", "model.hidden_size=48", "model.n_layer=1"):
        options += ["--set", key]
    assert race.main(options) == 0
    assert "git clone https://github.com/alexwarstadt/blimp" in capsys.readouterr().out
    runs = json.loads((output / "race.json").read_text())
    cleaning = json.loads((output / "cleaning.json").read_text())["seconds"]
    for run in runs.values():
        assert cleaning < run["seconds"] < 75
        minutes = [point["minutes"] for point in run["curve"]]
        assert minutes == sorted(minutes) and cleaning < 60 * minutes[0]
        assert 60 * minutes[-1] <= run["seconds"]
        assert run["curve"][-1]["tokens"] == run["tokens"]
        # the held-out text is like the training text, so a sample of it tells about all of it
        assert run["curve"][-1]["bits_per_byte"] == pytest.approx(run["bits_per_byte"], rel=0.1)
        model, tokenizer = load_model(run["model"], "cpu")
        assert model.config.vocab_size == len(tokenizer)


def test_document_figures_draws_a_finished_run(script, workshop, tmp_path):
    module = script("document_figures")
    module.draw_quickstart(workshop / "models" / "quickstart", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_of_two_programs_are_compared_row_by_row(script):
    experiment = script("babylm_agreement")
    row = experiment.Row()
    ours = [{"id": "a_0", "pred": "x"}, {"id": "a_1", "pred": "y"}]
    experiment.compare_rows(row, ours, [ours[0], {"id": "a_1", "pred": "z"}], ("pred",))
    assert (row.items, row.different) == (2, 1)
    ours = [{"id": 0, "pred": 1.0, "prev_pred": None}]
    theirs = [{"id": 0, "pred": 1.5, "prev_pred": float("nan")}]
    experiment.compare_rows(row, ours, theirs, ("pred", "prev_pred"))
    assert (row.items, row.different, row.score_difference) == (3, 1, 0.5)

    first = {"same": [1, 2], "near": 0.1, "far": [{"a": 0.1}], "ours": 1}
    second = {"same": [1, 2], "near": 0.1 + 1e-12, "far": [{"a": 0.2}], "theirs": 1}
    differences = sorted(experiment.find_differences(first, second))
    assert differences == [
        "/far/0/a: 0.1, official 0.2",
        "/ours: only ours",
        "/theirs: only official",
    ]
