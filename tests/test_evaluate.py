"""evaluate.py against naive loops, worked examples and exact properties."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from conftest import sentences

import evaluate
from babyllama.cli import significant
from evaluate import ModelEvaluator

BOS = 1


@pytest.fixture(scope="module")
def evaluator(model_dirs):
    return ModelEvaluator(str(model_dirs["GPT2"]), device="cpu")


@pytest.fixture(scope="module")
def texts():
    """Return 44 texts; one is empty and the last one exceeds the context of 64."""
    short = sentences(40, seed=5)
    long = " ".join(short[:12])
    return [*short, "", "a", "Ünïcode 🙂 text.", long]


def naive_nats(evaluator, text: str) -> tuple[float, int]:
    """Return (nats, tokens) of a text within the context, one float64 softmax at a time."""
    ids = [BOS, *evaluator.tokenizer.encode(text, add_special_tokens=False)]
    assert len(ids) <= 65
    with torch.no_grad():
        logits = evaluator.model(torch.tensor([ids[:-1]])).logits[0].double()
    nats = 0.0
    for row, token in zip(logits, ids[1:], strict=True):
        nats -= row.log_softmax(-1)[token].item()
    return nats, len(ids) - 1


# ---- perplexity ----------------------------------------------------------------------------------


def test_perplexity_equals_a_sum_over_tokens(evaluator, texts):
    short_texts = [text for text in texts[:-1] if text]
    nats_and_tokens = [naive_nats(evaluator, text) for text in short_texts]
    nats = sum(nats for nats, _ in nats_and_tokens)
    tokens = sum(tokens for _, tokens in nats_and_tokens)
    num_bytes = sum(len(text.encode()) for text in short_texts)
    num_words = sum(len(text.split()) for text in short_texts)

    result = evaluator.calculate_perplexity(short_texts)
    assert result["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["average_loss"] == result["nats_per_token"]
    assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / num_words), rel=1e-4)

    losses = [nats / tokens for nats, tokens in nats_and_tokens]
    assert result["std_loss"] == pytest.approx(np.std(losses), rel=1e-4)
    assert result["min_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert result["max_loss"] == pytest.approx(max(losses), rel=1e-5)
    assert result["num_sequences"] == len(short_texts)
    assert result["total_tokens"] == tokens
    assert result["num_empty"] == 0
    low, high = result["perplexity_ci95"]
    assert low < result["perplexity"] < high


def test_figures_by_domain_are_those_of_its_texts_alone(model_dirs, evaluator, texts):
    domains = ["abc"[i % 3] for i in range(len(texts))]
    documents = [i // 2 for i in range(len(texts))]
    result = evaluator.calculate_perplexity(texts, 8, documents, domains)
    by_domain = result["by_domain"]
    assert list(by_domain) == ["a", "b", "c"]
    for domain, figures in by_domain.items():
        inside = [i for i, name in enumerate(domains) if name == domain]
        domain_texts = [texts[i] for i in inside]
        domain_documents = [documents[i] for i in inside]
        alone = ModelEvaluator(model_dirs["GPT2"], "cpu").calculate_perplexity(
            domain_texts, documents=domain_documents
        )
        assert figures == {key: pytest.approx(alone[key], rel=1e-5) for key in figures}
    for rate, weight in (("bits_per_byte", "total_bytes"), ("nats_per_token", "total_tokens")):
        assert result[weight] == sum(figures[weight] for figures in by_domain.values())
        mean = sum(figures[rate] * figures[weight] for figures in by_domain.values())
        assert result[rate] == pytest.approx(mean / result[weight], rel=1e-12)
    assert "by_domain" not in evaluator.calculate_perplexity(texts, domains=["a"] * len(texts))


def test_one_text_has_figures_but_no_interval(evaluator):
    result = evaluator.calculate_perplexity(["a"])
    assert (result["num_sequences"], result["total_tokens"]) == (1, 1)
    assert result["std_loss"] == 0.0
    nats, _ = naive_nats(evaluator, "a")
    assert result["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert all(math.isnan(bound) for bound in result["perplexity_ci95"])


def test_empty_texts_are_counted_and_do_not_change_the_figures(evaluator):
    result = evaluator.calculate_perplexity(["", "a", ""])
    assert (result["num_sequences"], result["num_empty"]) == (1, 2)
    assert result["perplexity"] == evaluator.calculate_perplexity(["a"])["perplexity"]


@pytest.mark.parametrize("no_text", [[], [""]])
def test_without_text_every_figure_is_nan(evaluator, no_text):
    result = evaluator.calculate_perplexity(no_text)
    assert (result["num_sequences"], result["total_tokens"]) == (0, 0)
    assert result["num_empty"] == len(no_text)
    for key in ("perplexity", "average_loss", "std_loss", "bits_per_byte"):
        assert math.isnan(result[key])
    low, high = result["perplexity_ci95"]
    assert math.isnan(low)
    assert math.isnan(high)

    probabilities = evaluator.evaluate_token_probabilities(no_text)
    assert probabilities["num_tokens"] == 0
    assert math.isnan(probabilities["avg_entropy"])
    assert math.isnan(probabilities["expected_calibration_error"])


def test_a_string_instead_of_a_list_is_refused(evaluator):
    with pytest.raises(ValueError, match="texts must be a list of strings, not str 'The cat'"):
        evaluator.calculate_perplexity("The cat")
    with pytest.raises(ValueError, match="prompts must be a list"):
        evaluator.evaluate_generation_quality("The cat")


@pytest.mark.parametrize("name", ["documents", "domains"])
@pytest.mark.parametrize("labels", [[1], [1, 2, 3]])
def test_one_label_is_needed_for_each_text(evaluator, name, labels):
    with pytest.raises(ValueError, match=f"{name} has {len(labels)} entries for 2 texts"):
        evaluator.calculate_perplexity(["The cat", "A dog"], **{name: labels})


def test_a_batch_size_of_zero_is_refused(evaluator):
    with pytest.raises(ValueError, match="batch_size 0"):
        evaluator.calculate_perplexity(["The cat"], batch_size=0)


def test_a_model_with_nan_weights_gives_no_finite_figure(model_dirs):
    broken = ModelEvaluator(model_dirs["Llama"], "cpu")
    with torch.no_grad():
        broken.model.lm_head.weight[7] = math.nan
    result = broken.calculate_perplexity(["The cat", "A dog"])
    result |= broken.evaluate_token_probabilities(["The cat"])
    finite = set()
    for key, value in result.items():
        if isinstance(value, float | int) and math.isfinite(value):
            finite.add(key)
    assert finite <= {
        "num_sequences",
        "num_documents",
        "num_empty",
        "num_tokens",
        "total_tokens",
        "total_bytes",
        "total_words",
    }


def test_without_bos_and_eos_the_first_token_does_not_count(bare_model_dir):
    evaluator = ModelEvaluator(bare_model_dir, "cpu")
    result = evaluator.calculate_perplexity(["cat dog girl", "bird"])
    with torch.no_grad():
        logprobs = evaluator.model(torch.tensor([[1, 2, 3]])).logits[0].double().log_softmax(-1)
    nats = -(logprobs[0, 2] + logprobs[1, 3]).item()
    counts = (result["total_tokens"], result["total_words"], result["total_bytes"])
    assert counts == (2, 2, len("dog girl"))
    assert result["average_loss"] == pytest.approx(nats / 2, rel=1e-5)

    options = {"max_length": 4, "num_return_sequences": 2}
    generation = evaluator.evaluate_generation_quality(["cat dog", "bird"], **options)
    assert generation["num_generations"] == 4
    with pytest.raises(ValueError, match="no BOS to start from"):
        evaluator.evaluate_generation_quality([""])


# ---- token probabilities -------------------------------------------------------------------------


def test_changed_weights_are_scored_again(model_dirs):
    evaluator = ModelEvaluator(model_dirs["Llama"], "cpu")
    texts = ["The cat sat"]
    evaluator.calculate_perplexity(texts)
    with torch.no_grad():
        evaluator.model.lm_head.weight.zero_()
    uniform = pytest.approx(math.log(evaluator.model.config.vocab_size), rel=1e-6)
    assert evaluator.calculate_perplexity(texts)["nats_per_token"] == uniform
    assert evaluator.evaluate_token_probabilities(texts)["avg_entropy"] == uniform


def test_token_probabilities_equal_a_loop_over_the_vocabulary(evaluator):
    texts = sentences(6, seed=9)
    top_probs = []
    entropies = []
    ranks = []
    hits = []
    for text in texts:
        ids = [BOS, *evaluator.tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            rows = evaluator.model(torch.tensor([ids])).logits[0].double().softmax(-1).tolist()
        for row, token in zip(rows[:-1], ids[1:], strict=True):
            top_probs.append(max(row))
            entropies.append(-sum(p * math.log(p) for p in row))
            ranks.append(1 + sum(p > row[token] for p in row))
            hits.append(row[token] == max(row))

    result = evaluator.evaluate_token_probabilities(texts)
    assert result["num_tokens"] == len(top_probs)
    assert result["avg_top_token_prob"] == pytest.approx(np.mean(top_probs), rel=1e-5)
    assert result["std_top_token_prob"] == pytest.approx(np.std(top_probs), rel=1e-4)
    assert result["avg_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert result["std_entropy"] == pytest.approx(np.std(entropies), rel=1e-3)
    assert result["low_confidence_ratio"] == np.mean(np.array(top_probs) < 0.1)
    assert result["top1_accuracy"] == np.mean(hits)
    assert result["mean_rank"] == np.mean(ranks)
    assert result["median_rank"] == np.median(ranks)
    assert result["mean_reciprocal_rank"] == pytest.approx(np.mean(1 / np.array(ranks)))
    assert sum(result["surprisal_histogram_bits"]["counts"]) == len(top_probs)
    assert texts[0].startswith("".join(result["surprisal_sample"]["tokens"]))


# ---- generation ----------------------------------------------------------------------------------


def test_generation_quality_measures_the_samples_that_it_returns(evaluator):
    prompts = ["The cat", "", "A dog"]
    result = evaluator.evaluate_generation_quality(prompts, max_length=12, num_return_sequences=3)
    samples = result["generation_samples"]
    assert [sample["prompt"] for sample in samples] == prompts
    assert [len(sample["generations"]) for sample in samples] == [3, 3, 3]

    generations = []
    for sample in samples:
        generations += [text.split() for text in sample["generations"]]
    word_counts = Counter()
    for words in generations:
        word_counts.update(words)
    assert result["num_generations"] == 9
    assert result["num_empty_generations"] == generations.count([])
    assert result["distinct_1"] == pytest.approx(len(word_counts) / word_counts.total())
    assert result["avg_diversity_score"] == pytest.approx(np.nanmean(result["diversity_scores"]))
    assert result["avg_words"] == pytest.approx(np.mean([len(words) for words in generations]))


def test_samples_are_repeatable_and_follow_temperature_and_top_p(evaluator):
    def sample(**options):
        prompts = ["The cat", "", "A dog"]
        result = evaluator.evaluate_generation_quality(prompts, max_length=12, **options)
        return result["generation_samples"]

    defaults = sample()
    assert sample(temperature=0.8, top_p=0.95, num_return_sequences=3) == defaults
    assert sample(temperature=1.2, top_p=0.5) != defaults


def test_greedy_generations_of_a_prompt_are_equal(evaluator):
    options = {"max_length": 12, "temperature": 0}
    result = evaluator.evaluate_generation_quality(["The cat", "A dog"], **options)
    assert result["self_bleu"] == pytest.approx(1.0)


def test_without_prompts_the_diversity_is_nan(evaluator):
    assert math.isnan(evaluator.evaluate_generation_quality([])["avg_diversity_score"])


# ---- plots and passages --------------------------------------------------------------------------


def test_any_subset_of_the_figures_can_be_plotted(evaluator, texts, tmp_path):
    probabilities = evaluator.evaluate_token_probabilities([r"a $\frac{ <script> cat", *texts])
    perplexity = evaluator.calculate_perplexity(texts)
    generation = {"generation_samples": [{"prompt": "a", "generations": ["b"]}]}
    without_interval = evaluator.calculate_perplexity(texts[:1])
    # matplotlib would read a formula
    domains = [r"$\frac{", *["b"] * 3, *["c"] * (len(texts) - 4)]  # one of one document
    by_domain = evaluator.calculate_perplexity(texts, domains=domains)
    assert len(by_domain["by_domain"]) == 3
    for i, metrics in enumerate(
        [
            probabilities,
            {"probabilities": probabilities, "generation": generation},
            {**probabilities, **perplexity},
            perplexity,
            {**perplexity, **by_domain},
            {"results": {"perplexity": without_interval}},
        ]
    ):
        path = tmp_path / "pictures" / f"{i}.png"
        evaluator.plot_metrics(metrics, str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    for nothing in ({"perplexity": 3.0}, generation):  # texts are not figures
        with pytest.raises(ValueError, match="nothing to draw"):
            evaluator.plot_metrics(nothing, tmp_path / "none.png")


def test_passages_lose_no_word():
    rng = random.Random(0)
    words = ["word" * rng.randint(1, 9) for _ in range(3000)]
    text = "".join(word + rng.choice(["\n", " ", " ", " "]) for word in words)
    passages = list(evaluate.passages(text))
    assert " ".join(passages).split() == words
    assert all(0 < len(passage) <= evaluate.PASSAGE_CHARS for passage in passages)


def test_a_word_longer_than_a_passage_is_cut():
    assert [len(passage) for passage in evaluate.passages("x" * 4500)] == [2000, 2000, 500]


def test_white_space_is_no_passage():
    assert list(evaluate.passages(" \n ")) == []


def test_passages_are_drawn_evenly_and_by_seed(corpus_dir):
    drawn = evaluate.draw_passages(corpus_dir / "dev", 10**6, seed=0)
    everything = drawn.texts
    assert len(everything) == drawn.total == 12
    assert drawn.documents == list(range(1, 13))
    assert drawn.domains == ["toy"] * 12
    from_file = evaluate.draw_passages(corpus_dir / "dev" / "toy.dev", 10**6, seed=5)
    assert from_file.texts == everything

    draws = [evaluate.draw_passages(corpus_dir / "dev", 3, seed) for seed in range(400)]
    assert draws[0] == evaluate.draw_passages(corpus_dir / "dev", 3, 0)
    counts = Counter()
    for draw in draws:
        counts.update(draw.texts)
        assert draw.texts == sorted(draw.texts, key=everything.index)
    assert set(counts) == set(everything)
    assert min(counts.values()) > 60  # 100 each are expected


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run_dir(model_dirs, corpus_dir, tmp_path):
    """Return a directory with what evaluate.py reads of a training run."""
    folder = tmp_path / "run"
    shutil.copytree(model_dirs["Llama"], folder)
    shutil.copytree(corpus_dir / "dev", tmp_path / "text")
    config = {"data": {"eval_path": str(tmp_path / "text")}}
    (folder / "training_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_command_writes_strict_json_and_plots(run_dir, finished, capsys):
    metrics = json.loads((finished[1] / "training_metrics.json").read_text())
    del metrics["weights_sha256"]  # of other weights
    in_training = {"eval_loss": 2.0, "eval_perplexity": 7.4, "eval_bits_per_byte": 0.98764}
    in_training["floor_bits_per_byte"] = 0.82414
    metrics["results"] |= in_training
    (run_dir / "training_metrics.json").write_text(json.dumps(metrics))
    assert evaluate.main([str(run_dir), "--device", "cpu", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    text = (run_dir / "evaluation_results.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)  # fails on NaN and Infinity
    assert set(report) == {
        "results",
        "config",
        "versions",
        "n-samples",
        "undefined",
        "notes",
        "git_hash",
        "environment",
    }
    assert set(report["results"]) == set(report["versions"]) == set(report["n-samples"])
    assert report["n-samples"]["perplexity"] == {"original": 12, "effective": 12}
    assert f" {significant(report['results']['perplexity']['bits_per_byte'])} " in out
    assert "note: only 12 documents" in out
    assert "note: training measured 0.9876 bits per byte on this text" in out
    assert "end of each document; compare that figure with the best possible, 0.8241" in out
    assert report["notes"]
    assert (run_dir / "evaluation_plots.png").stat().st_size > 5000

    # the figures are those of the method
    texts = evaluate.draw_passages(run_dir.parent / "text", 500, 0).texts
    perplexity = ModelEvaluator(run_dir, "cpu").calculate_perplexity(texts)
    for key, value in report["results"]["perplexity"].items():
        assert value == pytest.approx(perplexity[key], rel=1e-5)


def test_the_command_reports_each_domain(run_dir, capsys):
    text = run_dir.parent / "text"
    (text / "letters.dev").write_text("\n\n\n".join(sentences(5, seed=3)))
    assert evaluate.main([str(run_dir), "--device", "cpu"]) == 0
    report = json.loads((run_dir / "evaluation_results.json").read_text())
    by_domain = report["results"]["perplexity"]["by_domain"]
    assert {name: row["num_documents"] for name, row in by_domain.items()} == {
        "letters": 5,
        "toy": 12,
    }
    toy = evaluate.draw_passages(text / "toy.dev", 500, 0)
    alone = ModelEvaluator(run_dir, "cpu").calculate_perplexity(toy.texts, 8, toy.documents)
    assert by_domain["toy"]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    place = lines.index(
        next(line for line in lines if line[:4] == ["bits", "per", "UTF-8", "byte"])
    )
    for line, (name, figures) in zip(lines[place + 1 :], by_domain.items(), strict=False):
        value, low, high = map(
            significant, (figures["bits_per_byte"], *figures["bits_per_byte_ci95"])
        )
        assert line == [name, value, low, "..", high]


def test_a_checkpoint_is_evaluated_on_the_held_out_text_of_its_run(run_dir, capsys, caplog):
    checkpoint = run_dir / "checkpoint-5"
    checkpoint.mkdir()
    for file in (*run_dir.glob("*.json"), run_dir / "model.safetensors"):
        shutil.copy(file, checkpoint)
    (run_dir.parent / "text" / "toy.dev").write_bytes(b"The cat sees a caf\xe9.\n\n\nThe dog.\n")
    assert evaluate.main([str(checkpoint), "--device", "cpu"]) == 0
    assert "2 of 2 passages" in capsys.readouterr().out
    warning = r"1 bytes are not UTF-8, the first at .*toy.dev: line 1"
    assert re.fullmatch(warning, caplog.messages[0])


def test_the_flags_reach_the_results(run_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\n\nA dog sees\n")
    text = tmp_path / "text.dev"
    text.write_text("a")
    output = tmp_path / "deep" / "results.json"
    flags = [
        *("--num-samples", "5"),
        *("--output-path", str(output)),
        *("--seed", "3"),
        *("--temperature", "0"),
        *("--custom-prompts", str(prompts)),
        *("--eval-data", str(text)),
        *("--device", "cpu"),
    ]
    assert evaluate.main([str(run_dir), *flags]) == 0
    report = json.loads(output.read_text(), parse_constant=pytest.fail)
    samples = report["results"]["generation"]["generation_samples"]
    assert [sample["prompt"] for sample in samples] == ["The cat", "A dog sees"]
    assert report["config"]["seed"] == 3
    assert report["config"]["temperature"] == 0
    assert report["results"]["perplexity"]["perplexity_ci95"] == [None, None]  # one text
    assert "perplexity.perplexity_ci95" in report["undefined"]
    assert output.with_name("evaluation_plots.png").is_file()
    assert not (run_dir / "evaluation_results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: no model at nowhere: expected a directory with config.json, weights"),
        (["RUN", "--eval-data", "nowhere"], "error: no held-out text at nowhere"),
        (["RUN", "--num-samples", "0"], "error: --num-samples 0 must be 1 or more"),
        (
            ["RUN", "--custom-prompts", "nowhere.txt"],
            "error: nowhere.txt: No such file or directory; --custom-prompts",
        ),
        (["RUN", "--custom-prompts", "EMPTY"], "error: EMPTY contains no prompt"),
        (["RUN", "--eval-data", "EMPTY"], "error: EMPTY contains no text"),
        (["RUN", "--seed", "-1"], "error: --seed -1 must be 0 or more"),
        (
            ["RUN", "--temperature", "nan"],
            "error: --temperature nan must be a finite number, 0 or more",
        ),
        (
            ["RUN", "--temperature", "inf"],
            "error: --temperature inf must be a finite number, 0 or more",
        ),
        (["RUN", "--output-path", "ODD"], "error: --output-path ODD is a directory: name a file"),
        (["RUN", "--custom-prompts", "LATIN"], "error: LATIN: not UTF-8 (byte 3)"),
        (["MODEL"], "error: MODEL does not record its held-out text: name text with --eval-data"),
        (["ODD"], "error: ODD/training_config.yaml has no data.eval_path"),
        (["RUN", "--device", "tpu"], 'error: device "tpu" is unknown'),
    ],
)
def test_a_mistake_gets_one_error_line(run_dir, model_dirs, tmp_path, capsys, arguments, message):
    empty = tmp_path / "empty.dev"
    empty.write_text("\n\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "training_config.yaml").write_text("data: 3\n")
    (odd / "config.json").write_text("{}")
    paths = {
        "ODD": str(odd),
        "RUN": str(run_dir),
        "MODEL": str(model_dirs["GPT2"]),
        "EMPTY": str(empty),
        "LATIN": str(latin),
    }
    for name, path in paths.items():
        message = message.replace(name, path)
    assert evaluate.main([paths.get(argument, argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_model_is_not_overwritten_by_the_results(run_dir, capsys, name):
    file = run_dir / name
    content = file.read_bytes()
    assert evaluate.main([str(run_dir), "--output-path", str(file)]) == 2
    assert f"{file} exists and was not written by this script" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_an_output_that_cannot_be_written_fails_before_the_work(run_dir, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert evaluate.main([str(run_dir), "--output-path", str(file / "results.json")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written" in err
    assert "--output-path" in err
