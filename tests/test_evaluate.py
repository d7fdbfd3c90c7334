"""evaluate.py against naive loops, worked examples and exact properties."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, sentences

import evaluate
from evaluate import ModelEvaluator

BOS = 1


@pytest.fixture(scope="module")
def evaluator(model_dirs):
    return ModelEvaluator(str(model_dirs["GPT2"]), device="cpu")


@pytest.fixture(scope="module")
def texts():
    base = sentences(40, seed=5)
    return [
        *base,
        "",
        "a",
        "Ünïcode 🙂 text.",
        " ".join(base[:12]),
    ]  # the last is longer than the context of 64


def naive_nats(evaluator, text: str) -> tuple[float, int]:
    """(nats, tokens) of a text within the context, one float64 softmax at a time."""
    ids = [BOS, *evaluator.tokenizer.encode(text, add_special_tokens=False)]
    assert len(ids) <= 65
    with torch.no_grad():
        logits = evaluator.model(torch.tensor([ids[:-1]])).logits[0].double()
    return -sum(
        row.log_softmax(-1)[token].item() for row, token in zip(logits, ids[1:], strict=True)
    ), len(ids) - 1


# ---- perplexity ----------------------------------------------------------------------------------


def test_perplexity_equals_a_sum_over_tokens(evaluator, texts):
    short = [text for text in texts[:-1] if text]
    nats, tokens = map(sum, zip(*(naive_nats(evaluator, text) for text in short), strict=True))
    got = evaluator.calculate_perplexity(short)
    assert got["nats_per_token"] == got["average_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(t.encode()) for t in short), rel=1e-5
    )
    assert got["word_perplexity"] == pytest.approx(
        math.exp(nats / sum(len(t.split()) for t in short)), rel=1e-4
    )
    losses = [n / k for n, k in (naive_nats(evaluator, text) for text in short)]
    assert got["std_loss"] == pytest.approx(np.std(losses), rel=1e-4)
    assert (got["min_loss"], got["max_loss"]) == pytest.approx((min(losses), max(losses)), rel=1e-5)
    assert (got["num_sequences"], got["total_tokens"], got["num_empty"]) == (len(short), tokens, 0)
    low, high = got["perplexity_ci95"]
    assert low < got["perplexity"] < high


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_figures_do_not_depend_on_batch_size_or_order(model_dirs, evaluator, texts, batch_size):
    other = ModelEvaluator(model_dirs["GPT2"], "cpu")
    shuffled = random.Random(batch_size).sample(texts, len(texts))
    a, b = (
        evaluator.calculate_perplexity(texts),
        other.calculate_perplexity(shuffled, batch_size=batch_size),
    )
    for key in (
        "perplexity",
        "bits_per_byte",
        "word_perplexity",
        "std_loss",
        "num_sequences",
        "total_tokens",
    ):
        assert b[key] == pytest.approx(a[key], rel=1e-5)


def test_empty_texts_are_counted_and_do_not_change_the_figures(evaluator, texts):
    one = evaluator.calculate_perplexity(["a"])
    assert (one["num_sequences"], one["total_tokens"], one["std_loss"]) == (1, 1, 0.0)
    assert one["nats_per_token"] == pytest.approx(naive_nats(evaluator, "a")[0], rel=1e-5)
    assert all(math.isnan(x) for x in one["perplexity_ci95"])  # one text says nothing about others
    mixed = evaluator.calculate_perplexity(["", "a", ""])
    assert (mixed["num_sequences"], mixed["num_empty"], mixed["perplexity"]) == (
        1,
        2,
        one["perplexity"],
    )
    long = evaluator.calculate_perplexity([texts[-1]])
    assert (
        long["total_tokens"]
        == len(evaluator.tokenizer.encode(texts[-1], add_special_tokens=False))
        > 64
    )
    for nothing in ([], [""]):
        got = evaluator.calculate_perplexity(nothing)
        assert (got["num_sequences"], got["total_tokens"], got["num_empty"]) == (0, 0, len(nothing))
        assert all(
            math.isnan(got[key])
            for key in ("perplexity", "average_loss", "std_loss", "bits_per_byte")
        )
        assert all(math.isnan(got["perplexity_ci95"][i]) for i in (0, 1))
        probabilities = evaluator.evaluate_token_probabilities(nothing)
        assert probabilities["num_tokens"] == 0 and math.isnan(probabilities["avg_entropy"])
        assert math.isnan(probabilities["expected_calibration_error"])


def test_a_string_instead_of_a_list_is_refused(evaluator):
    with pytest.raises(ValueError, match="texts must be a list of strings, not str 'The cat'"):
        evaluator.calculate_perplexity("The cat")
    with pytest.raises(ValueError, match="prompts must be a list"):
        evaluator.evaluate_generation_quality("The cat")
    with pytest.raises(ValueError, match="batch_size 0"):
        evaluator.calculate_perplexity(["The cat"], batch_size=0)


def test_a_broken_model_gives_no_finite_figure(model_dirs):
    broken = ModelEvaluator(model_dirs["Llama"], "cpu")
    with torch.no_grad():
        broken.model.lm_head.weight[7] = math.nan
    got = {
        **broken.calculate_perplexity(["The cat", "A dog"]),
        **broken.evaluate_token_probabilities(["The cat"]),
    }
    counts = {
        "num_sequences",
        "num_documents",
        "num_empty",
        "num_tokens",
        "total_tokens",
        "total_bytes",
        "total_words",
    }
    numbers = {
        key: value
        for key, value in got.items()
        if isinstance(value, float | int) and key not in counts
    }
    assert {key for key, value in numbers.items() if math.isfinite(value)} == set()


def test_without_bos_and_eos_the_first_token_does_not_count(bare_model_dir):
    evaluator = ModelEvaluator(bare_model_dir, "cpu")
    got = evaluator.calculate_perplexity(["cat dog girl", "bird"])
    with torch.no_grad():
        logits = evaluator.model(torch.tensor([[1, 2, 3]])).logits[0].double().log_softmax(-1)
    counts = got["total_tokens"], got["total_words"], got["total_bytes"]
    assert counts == (2, 2, len("dog girl"))  # the first one has nothing before it
    assert got["average_loss"] == pytest.approx(-(logits[0, 2] + logits[1, 3]).item() / 2, rel=1e-5)
    made = evaluator.evaluate_generation_quality(
        ["cat dog", "bird"], max_length=4, num_return_sequences=2
    )
    assert made["num_generations"] == 4
    with pytest.raises(ValueError, match="no BOS to start from"):
        evaluator.evaluate_generation_quality([""])


# ---- token probabilities -------------------------------------------------------------------------


def test_changed_weights_are_scored_again(model_dirs):
    evaluator, text = ModelEvaluator(model_dirs["Llama"], "cpu"), ["The cat sat"]
    evaluator.calculate_perplexity(text)
    with torch.no_grad():
        evaluator.model.lm_head.weight.zero_()
    uniform = math.log(evaluator.model.config.vocab_size)
    assert evaluator.calculate_perplexity(text)["nats_per_token"] == pytest.approx(
        uniform, rel=1e-6
    )
    assert evaluator.evaluate_token_probabilities(text)["avg_entropy"] == pytest.approx(
        uniform, rel=1e-6
    )


def test_token_probabilities_equal_a_loop(evaluator):
    chosen = sentences(6, seed=9)
    top, entropies, ranks, hits = [], [], [], []
    for text in chosen:
        ids = [BOS, *evaluator.tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            rows = evaluator.model(torch.tensor([ids])).logits[0].double().softmax(-1).tolist()
        for row, token in zip(rows, ids[1:], strict=False):
            top.append(max(row))
            entropies.append(-sum(p * math.log(p) for p in row))
            ranks.append(1 + sum(p > row[token] for p in row))
            hits.append(row[token] == max(row))
    got = evaluator.evaluate_token_probabilities(chosen)
    assert got["num_tokens"] == len(top)
    assert got["avg_top_token_prob"] == pytest.approx(np.mean(top), rel=1e-5)
    assert got["std_top_token_prob"] == pytest.approx(np.std(top), rel=1e-4)
    assert got["avg_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert got["std_entropy"] == pytest.approx(np.std(entropies), rel=1e-3)
    assert got["low_confidence_ratio"] == np.mean(np.array(top) < 0.1)
    assert got["top1_accuracy"] == np.mean(hits)
    assert (got["mean_rank"], got["median_rank"]) == (np.mean(ranks), np.median(ranks))
    assert got["mean_reciprocal_rank"] == pytest.approx(np.mean(1 / np.array(ranks)))
    assert sum(got["surprisal_histogram_bits"]["counts"]) == len(top)
    assert (
        "".join(got["surprisal_sample"]["tokens"])
        == chosen[0][: len("".join(got["surprisal_sample"]["tokens"]))]
    )


def test_a_uniform_model_is_calibrated(model_dirs):
    uniform = ModelEvaluator(model_dirs["Llama"], "cpu")
    torch.nn.init.zeros_(uniform.model.lm_head.weight)
    got = uniform.evaluate_token_probabilities(["The cat sleeps.", "A dog"])
    assert got["top1_accuracy"] == pytest.approx(1 / 400, rel=1e-4)  # ties are not credited in full
    assert got["expected_calibration_error"] == pytest.approx(0, abs=1e-6)
    assert uniform.calculate_perplexity(["The cat sleeps."])["perplexity"] == pytest.approx(
        400, rel=1e-5
    )


# ---- generation ----------------------------------------------------------------------------------


def test_generation_quality_measures_its_own_samples(evaluator):
    prompts = ["The cat", "", "A dog"]
    got = evaluator.evaluate_generation_quality(prompts, max_length=12, num_return_sequences=3)
    samples = [sample["generations"] for sample in got["generation_samples"]]
    assert [sample["prompt"] for sample in got["generation_samples"]] == prompts
    assert [len(group) for group in samples] == [3, 3, 3]
    words = [text.split() for group in samples for text in group]
    assert got["num_generations"] == 9 and got["num_empty_generations"] == words.count([])
    ones = Counter(word for text in words for word in text)
    assert got["distinct_1"] == pytest.approx(len(ones) / sum(ones.values()))
    assert got["avg_diversity_score"] == pytest.approx(np.nanmean(got["diversity_scores"]))
    assert got["avg_words"] == pytest.approx(np.mean([len(text) for text in words]))
    again = evaluator.evaluate_generation_quality(prompts, 12, 0.8, 0.95, 3)
    assert again["generation_samples"] == got["generation_samples"]
    other = evaluator.evaluate_generation_quality(prompts, 12, 1.2, 0.5, 3)
    assert other["generation_samples"] != got["generation_samples"]
    greedy = evaluator.evaluate_generation_quality(
        ["The cat", "A dog"], max_length=12, temperature=0
    )
    assert greedy["self_bleu"] == pytest.approx(1.0)
    assert math.isnan(evaluator.evaluate_generation_quality([])["avg_diversity_score"])


# ---- passages, plots, command line ---------------------------------------------------------------


def test_any_subset_of_the_figures_can_be_plotted(evaluator, texts, tmp_path):
    text = evaluator.evaluate_token_probabilities([r"a $\frac{ <script> cat", *texts])
    hostile = {"generation_samples": [{"prompt": r"$\frac{", "generations": ["_^$\n\x00 <b>"]}]}
    for number, what in enumerate(
        [
            text,
            hostile,
            {"probabilities": text, "generation": hostile},
            {**text, **evaluator.calculate_perplexity(texts)},
            evaluator.calculate_perplexity(texts),
            {"results": {"perplexity": evaluator.calculate_perplexity(texts[:1])}},
        ]
    ):
        path = tmp_path / "pictures" / f"{number}.png"
        evaluator.plot_metrics(what, str(path))
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        evaluator.plot_metrics({"perplexity": 3.0}, tmp_path / "none.png")


def test_passages_lose_no_word():
    rng = random.Random(0)
    words = ["word" * rng.randint(1, 9) for _ in range(3000)]
    text = "".join(word + rng.choice(["\n", " ", " ", " "]) for word in words)
    cut = list(evaluate.passages(text))
    assert " ".join(cut).split() == words
    assert all(0 < len(passage) <= evaluate.PASSAGE_CHARS for passage in cut)
    assert [len(p) for p in evaluate.passages("x" * 4500)] == [2000, 2000, 500]
    assert list(evaluate.passages(" \n ")) == []


def test_passages_are_drawn_evenly_and_by_seed(corpus_dir):
    everything, owners, total = evaluate.draw_passages(corpus_dir / "dev", 10**6, seed=0)
    assert len(everything) == total == 12 and owners == list(range(1, 13))
    assert evaluate.draw_passages(corpus_dir / "dev" / "toy.dev", 10**6, seed=5)[0] == everything
    drawn = [evaluate.draw_passages(corpus_dir / "dev", 3, seed) for seed in range(400)]
    assert drawn[0] == evaluate.draw_passages(corpus_dir / "dev", 3, 0)
    counts = Counter(text for chosen, _, _ in drawn for text in chosen)
    assert set(counts) == set(everything) and min(counts.values()) > 60  # 100 each are expected
    assert all(sorted(chosen, key=everything.index) == chosen for chosen, _, _ in drawn)


@pytest.fixture
def run_dir(model_dirs, corpus_dir, tmp_path):
    """A model directory as a training run leaves it, for what evaluate.py reads."""
    folder = tmp_path / "run"
    shutil.copytree(model_dirs["Llama"], folder)
    shutil.copytree(corpus_dir / "dev", tmp_path / "text")
    (folder / "training_config.yaml").write_text(
        yaml.safe_dump({"data": {"eval_path": str(tmp_path / "text")}})
    )
    return folder


def test_the_command_writes_strict_json_and_plots(run_dir, capsys):
    assert evaluate.main([str(run_dir), "--device", "cpu", "--batch-size", "4"]) == 0
    out = capsys.readouterr()
    report = json.loads(
        (run_dir / "evaluation_results.json").read_text(), parse_constant=pytest.fail
    )
    assert set(report) == {
        "results", "config", "versions", "n-samples", "undefined", "notes", "git_hash", "environment",
    }  # fmt: skip
    assert set(report["results"]) == set(report["versions"]) == set(report["n-samples"])
    assert report["n-samples"]["perplexity"] == {"original": 12, "effective": 12}
    assert f"{report['results']['perplexity']['bits_per_byte']:.4f}" in out.out
    assert "note: the text figures rest on 12 documents only" in out.out and report["notes"]
    assert (run_dir / "evaluation_plots.png").stat().st_size > 5000
    texts, _, _ = evaluate.draw_passages(run_dir.parent / "text", 500, 0)
    again = ModelEvaluator(run_dir, "cpu").calculate_perplexity(texts)
    for key, value in report["results"]["perplexity"].items():
        assert value == pytest.approx(again[key], rel=1e-5)


def test_a_checkpoint_is_evaluated_on_the_held_out_text_of_its_run(run_dir, capsys, caplog):
    for file in (*run_dir.glob("*.json"), run_dir / "model.safetensors"):
        (run_dir / "checkpoint-5").mkdir(exist_ok=True)
        shutil.copy(file, run_dir / "checkpoint-5")
    (run_dir.parent / "text" / "toy.dev").write_bytes(b"The cat sees a caf\xe9.\n\n\nThe dog.\n")
    assert evaluate.main([str(run_dir / "checkpoint-5"), "--device", "cpu"]) == 0
    assert "2 of 2 passages" in capsys.readouterr().out
    assert re.fullmatch(
        r"1 bytes are not UTF-8, the first at .*toy.dev: line 1", caplog.messages[0]
    )


def test_the_flags_reach_the_results(run_dir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("The cat\n\nA dog sees\n")
    (tmp_path / "text.dev").write_text("a")
    output = tmp_path / "deep" / "results.json"
    arguments = [
        str(run_dir),
        "--num_samples",
        "5",
        "--output-path",
        str(output),
        "--seed",
        "3",
        "--temperature",
        "0",
    ]
    files = [
        "--custom-prompts",
        str(tmp_path / "prompts.txt"),
        "--eval-data",
        str(tmp_path / "text.dev"),
    ]
    assert evaluate.main([*arguments, *files, "--device", "cpu"]) == 0
    report = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert [s["prompt"] for s in report["results"]["generation"]["generation_samples"]] == [
        "The cat",
        "A dog sees",
    ]
    assert (report["config"]["seed"], report["config"]["temperature"]) == (3, 0)
    assert report["results"]["perplexity"]["perplexity_ci95"] == [None, None]  # one text
    assert "perplexity.perplexity_ci95" in report["undefined"]
    assert output.with_name("evaluation_plots.png").is_file()
    assert not (run_dir / "evaluation_results.json").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere"],
            "error: no model at nowhere: expected a directory with config.json and weights",
        ),
        (["RUN", "--eval-data", "nowhere"], "error: no held-out text at nowhere"),
        (["RUN", "--num-samples", "0"], "error: --num-samples 0 must be 1 or more"),
        (
            ["RUN", "--custom-prompts", "nowhere.txt"],
            "error: nowhere.txt: No such file or directory; --custom-prompts",
        ),
        (["RUN", "--custom-prompts", "EMPTY"], "error: EMPTY contains no prompt"),
        (["RUN", "--eval-data", "EMPTY"], "error: EMPTY contains no text"),
        (["RUN", "--seed", "-1"], "error: --seed -1 must be 0 or more"),
        (["RUN", "--temperature", "nan"], "error: --temperature nan must be a finite number, 0 or more"),
        (["RUN", "--temperature", "inf"], "error: --temperature inf must be a finite number, 0 or more"),
        (["RUN", "--output-path", "ODD"], "error: --output-path ODD is a directory: name a file"),
        (["RUN", "--custom-prompts", "LATIN"], "error: LATIN: not UTF-8 (byte 3)"),
        (["MODEL"], "error: MODEL does not record its held-out text: name text with --eval-data"),
        (["ODD"], "error: ODD/training_config.yaml has no data.eval_path"),
        (["RUN", "--device", "tpu"], 'error: device "tpu" is unknown'),
    ],
)
def test_a_mistake_gets_one_error_line(run_dir, model_dirs, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.dev").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "training_config.yaml").write_text("data: 3\n")
    (tmp_path / "odd" / "config.json").write_text("{}")
    names = {
        "ODD": str(tmp_path / "odd"),
        "RUN": str(run_dir),
        "MODEL": str(model_dirs["GPT2"]),
        "EMPTY": str(tmp_path / "empty.dev"),
        "LATIN": str(tmp_path / "latin.txt"),
    }
    for name, path in names.items():
        message = message.replace(name, path)
    assert evaluate.main([names.get(word, word) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


def test_ctrl_c_prints_one_line_and_writes_nothing(run_dir, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelEvaluator, "evaluate_token_probabilities", interrupted)
    assert evaluate.main([str(run_dir), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert not (run_dir / "evaluation_results.json").exists()


def test_a_missing_cuda_device_is_one_warning_line(model_dirs):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code = f"from evaluate import ModelEvaluator; print(ModelEvaluator({str(model_dirs['Llama'])!r}).device)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "cpu\n" and done.stderr == "CUDA is not available; using the CPU\n"


# ---- imports and outputs -------------------------------------------------------------------------


def test_importing_the_scripts_imports_nothing_heavy():
    code = (
        "import sys, evaluate, generate\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'tqdm', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_output_that_cannot_be_written_fails_before_the_work(run_dir, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert evaluate.main([str(run_dir), "--output-path", str(blocked / "results.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written" in error and "--output-path" in error
    before = (run_dir / "config.json").read_bytes()
    for there in (run_dir / "config.json", run_dir / "model.safetensors"):
        assert evaluate.main([str(run_dir), "--output-path", str(there)]) == 2
        assert f"{there} exists and was not written by this script" in capsys.readouterr().err
    assert (run_dir / "config.json").read_bytes() == before
