"""benchmark.py on tiny models: the answers computed another way, the command and its errors."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import build_tiny_model, html_errors, svg_pictures

import benchmark
from babyllama.evaluation import candidates, grading, metrics, tasks
from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.evaluation.generation import generate
from babyllama.evaluation.loading import load_model
from benchmark import BenchmarkSuite

SMALL = {
    "tasks": {
        "completion": {
            "items": [
                {"prompt": "The cat sees the", "answer": "dog", "wrong": ["bird", "girl"]},
                {"prompt": "The dog hears the", "answer": "teacher", "wrong": ["cat", "every day"]},
                {"prompt": "The girl likes", "answer": "the boy", "wrong": ["garden", "river"]},
            ]
        },
        "consistency": {
            "max_new_tokens": 6,
            "groups": [
                {
                    "prompts": ["The cat sees the", "A cat sees the", "The cat finds the"],
                    "control": "near the",
                },
                {"prompts": ["The boy helps", "A boy helps"], "control": "every day helps"},
            ],
        },
        "repetition": {"prompts": ["The cat", "The dog", "The bird"], "max_new_tokens": 40},
        "speed": {"batch_sizes": [1, 3], "max_new_tokens": 5, "repeats": 2},
        "pairs": {
            "type": "minimal_pairs",
            "items": [
                {
                    "sentence_good": "The cat sees the dog.",
                    "sentence_bad": "The cat the dog sees.",
                    "UID": "order",
                }
            ],
        },
    }
}


@pytest.fixture(scope="module")
def suite(model_dirs):
    return BenchmarkSuite(model_dirs["Llama"], "cpu", load_tasks(SMALL), seed=3)


@pytest.fixture(scope="module")
def results(suite):
    return suite.run_all_benchmarks()


def naive_score(suite, prefix: str, completion: str) -> float:
    """Return the summed log p of the tokens that end within the completion, in float64."""
    encoding = suite.tokenizer(
        prefix + completion, add_special_tokens=False, return_offsets_mapping=True
    )
    ids = [suite.tokenizer.bos_token_id, *encoding["input_ids"]]
    logits = suite.model(input_ids=torch.tensor([ids])).logits[0].double().detach().numpy()
    score = 0.0
    for i, (_, end) in enumerate(encoding["offset_mapping"]):
        if end > len(prefix):
            row = logits[i]
            score += row[ids[i + 1]] - math.log(np.exp(row - row.max()).sum()) - row.max()
    return score


def naive_item_scores(suite, items) -> np.ndarray:
    """Return the score of every candidate of the items, one text at a time."""
    candidates = [candidate for item in items for candidate in item.candidates]
    return np.array([naive_score(suite, *candidate) for candidate in candidates])


def count_tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- the suite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["completion", "pairs"])
def test_scores_equal_a_naive_loop(suite, name):
    items = suite.tasks[name].items
    scores, baselines = candidates.score_candidates(suite.model, suite.tokenizer, items)
    assert scores == pytest.approx(naive_item_scores(suite, items), rel=1e-5)
    completions = [completion for item in items for _, completion in item.candidates]
    lengths = [count_tokens(suite.tokenizer, completion) for completion in completions]
    assert baselines["shorter"].tolist() == [-length for length in lengths]


def test_means_are_sums_per_token_of_the_completion(suite):
    items = [tasks.Item("s", ("The cat", "The"), (" sees the old dog", " garden"))]
    scores, baselines = candidates.score_candidates(
        suite.model, suite.tokenizer, items, scoring="mean"
    )
    lengths = [count_tokens(suite.tokenizer, text) for text in items[0].completions]
    assert lengths[0] > lengths[1]
    assert scores == pytest.approx(naive_item_scores(suite, items) / lengths, rel=1e-5)
    assert baselines["shorter"].tolist() == [-length for length in lengths]


def test_a_word_of_reading_times_is_scored_as_in_babylms_script(suite):
    """Go through the words as the script does: one text and one softmax for each token."""
    contexts = ("The old man", "The old", "Caf\u00e9", "None")
    words = ("sat", "metro-north", "na\u00efve\u2014", "x")
    items = [tasks.Item("reading", contexts[:2], words[:2])]
    items += [tasks.Item("reading", (contexts[i],), (words[i],)) for i in (2, 3)]
    surprisals = []
    for context, word in zip(contexts, words, strict=True):
        surprisal = 0.0
        for number, token in enumerate(
            suite.tokenizer(word, add_special_tokens=False)["input_ids"]
        ):
            text = suite.tokenizer.decode(token)
            if number > 0:
                token = suite.tokenizer(text, add_special_tokens=False)["input_ids"][0]
            inputs = suite.tokenizer(context, return_tensors="pt")["input_ids"]
            assert inputs[0, 0] == suite.tokenizer.bos_token_id
            probs = suite.model(input_ids=inputs).logits[0, -1].double().softmax(-1)
            surprisal -= math.log(probs[token].item())
            context += text
        surprisals.append(surprisal)
    assert any(count_tokens(suite.tokenizer, word) > 3 for word in words)

    scores, baselines, precision = candidates.score_task(
        suite.model, suite.tokenizer, "reading", items
    )
    assert -scores == pytest.approx(surprisals, rel=1e-5)
    lengths = [count_tokens(suite.tokenizer, word) for word in words]
    assert baselines["shorter"].tolist() == [-length for length in lengths]
    assert precision == {"items": 3, "float32_items": 3}

    # with the space that text has, a word has other tokens
    spaced = [tasks.Item("reading", ("The old man",), (" sat",))]
    (spaced_score,), _ = candidates.score_candidates(suite.model, suite.tokenizer, spaced)
    assert spaced_score == pytest.approx(naive_score(suite, "The old man", " sat"), rel=1e-5)
    assert abs(spaced_score - scores[0]) > 1e-3


def test_without_bos_the_first_token_is_not_scored(suite):
    items = [tasks.Item("s", ("", "The cat"), ("The cat sees", " sees the dog"))]
    without_bos = copy.deepcopy(suite.tokenizer)
    without_bos.bos_token = without_bos.eos_token = None
    ids, starts = candidates.scored_spans(without_bos, items)
    assert starts[0] == 1
    assert ids[0][0] != suite.tokenizer.bos_token_id
    ids_with_bos, starts_with_bos = candidates.scored_spans(suite.tokenizer, items)
    assert [row[1:] for row in ids_with_bos] == ids
    assert starts_with_bos == [1, starts[1] + 1]


def test_results_are_strict_json_with_the_documented_keys(results):
    documented = {
        "completion": {"completion_accuracy", "completion_correct", "completion_total"},
        "consistency": {"avg_consistency_score", "consistency_scores"},
        "repetition": {"avg_repetition_score", "repetition_scores"},
        "speed": {"tokens_per_second", "latency_ms"},
    }
    for name, keys in documented.items():
        assert keys <= set(results[name])
    assert {"overall_score", "pairs"} <= set(results)
    json.dumps(results, allow_nan=False)


def test_completion_counts_the_likeliest_and_the_generated_answers(suite, results):
    chosen = 0
    generated = 0
    for item in suite.tasks["completion"].items:
        scores = naive_item_scores(suite, [item])
        chosen += scores[0] == max(scores)
        prompt = suite.tokenizer(item.prefixes[0], return_tensors="pt")["input_ids"]
        output = suite.model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        text = suite.tokenizer.decode(output[0, prompt.shape[1] :])
        generated += text.strip().lower().startswith(item.completions[0].strip())

    result = results["completion"]
    assert (result["completion_correct"], result["completion_total"]) == (chosen, 3)
    assert result["completion_accuracy"] == pytest.approx(chosen / 3)
    assert result["chance"] == pytest.approx(1 / 3)
    assert result["generation_accuracy"] == pytest.approx(generated / 3)
    low, high = result["completion_accuracy_ci95"]
    assert 0 <= low <= chosen / 3 <= high <= 1


def test_a_generated_answer_counts_if_the_text_starts_with_its_words():
    assert benchmark.begins_with(" Dog and", "dog")
    assert benchmark.begins_with("the boy.", "the boy")
    assert not benchmark.begins_with(" dogs", "dog")
    assert not benchmark.begins_with(" a dog", "dog")


def test_consistency_is_the_mean_word_overlap_of_continuations(suite, results):
    def continue_greedily(prompt):
        options = {"max_new_tokens": 6, "temperature": 0}
        ((text,),) = generate(suite.model, suite.tokenizer, [prompt], **options)
        return text.split()

    overlap = metrics.word_overlap
    a = continue_greedily("The cat sees the")
    b = continue_greedily("A cat sees the")
    c = continue_greedily("The cat finds the")
    control = continue_greedily("near the")
    result = results["consistency"]
    mean_overlap = (overlap(a, b) + overlap(a, c) + overlap(b, c)) / 3
    assert result["consistency_scores"][0] == pytest.approx(mean_overlap)

    d = continue_greedily("The boy helps")
    e = continue_greedily("A boy helps")
    second_control = continue_greedily("every day helps")
    control_overlaps = [
        np.mean([overlap(text, control) for text in (a, b, c)]),
        np.mean([overlap(text, second_control) for text in (d, e)]),
    ]
    assert result["chance"] == pytest.approx(np.mean(control_overlaps))
    assert result["avg_consistency_score"] == pytest.approx(np.mean(result["consistency_scores"]))
    assert result["baselines"]["same ending"]["difference"] == pytest.approx(
        result["avg_consistency_score"] - result["chance"]
    )


def test_a_model_that_ignores_its_prompt_is_no_better_than_the_baselines(model_dirs, tmp_path):
    model, tokenizer = load_model(model_dirs["GPT2"], "cpu")
    model.lm_head.weight.data.zero_()  # uniform logits: the same greedy token everywhere
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    suite = BenchmarkSuite(tmp_path, "cpu", load_tasks(SMALL))

    consistency = suite.run_consistency_benchmark()
    assert consistency["avg_consistency_score"] == consistency["chance"] == 1.0
    assert consistency["baselines"]["same ending"]["noise"]

    # under uniform logits the shorter sentence is the likelier one, and equal lengths tie
    pairs = suite.run_items(suite.tasks["pairs"])
    good = count_tokens(tokenizer, "The cat sees the dog.")
    bad = count_tokens(tokenizer, "The cat the dog sees.")
    assert pairs["subsets"]["order"]["accuracy"] == (good < bad) + (good == bad) / 2
    assert pairs["baselines"]["shorter"]["difference"] == 0
    assert not pairs["better_than_baselines"]


def test_repetition_is_the_share_of_repeated_4_grams(suite, results):
    prompts = suite.tasks["repetition"].options["prompts"]
    texts = generate(suite.model, suite.tokenizer, prompts, max_new_tokens=40, seed=3)
    expected = []
    for (text,) in texts:
        words = text.split()
        counts = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
        expected.append(1 - len(counts) / counts.total() if counts else 0.0)
    assert results["repetition"]["repetition_scores"] == pytest.approx(expected)
    repeated = metrics.ngram_repetition(["a", "b", "c", "d", "a", "b", "c", "d"])
    assert repeated == pytest.approx(1 - 4 / 5)


def test_a_tokenizer_without_bos_and_eos_runs_every_task(bare_model_dir):
    results = BenchmarkSuite(bare_model_dir, "cpu", load_tasks(SMALL)).run_all_benchmarks()
    assert results["speed"]["batches"][1]["generated_tokens"] == 15
    assert results["completion"]["n"] == 3


def test_speed_counts_generated_tokens(results):
    batches = results["speed"]["batches"]
    sizes = [(batch["batch_size"], batch["generated_tokens"]) for batch in batches]
    assert sizes == [(1, 5), (3, 15)]
    for batch in batches:
        assert batch["memory_gb"] > 0
        assert batch["latency_ms"] > 0
        # five tokens of each text: the first one and four more
        seconds = batch["first_token_ms"] / 1000 + 4 * batch["latency_ms"] / 1000
        tokens_per_second = batch["generated_tokens"] / seconds
        # each figure is the median of its runs, so they need not agree exactly
        assert batch["tokens_per_second"] == pytest.approx(tokens_per_second, rel=1.0)
    assert results["speed"]["latency_ms"] == batches[0]["latency_ms"]


def test_a_suite_can_be_subclassed(model_dirs):
    class CustomBenchmarkSuite(BenchmarkSuite):
        def run_domain_specific_benchmark(self):
            scores = []
            for prompt in ["In machine learning, the concept of", "The fundamental principle of"]:
                outputs = self.model.generate(
                    self.tokenizer(prompt, return_tensors="pt")["input_ids"],
                    max_length=50,
                    num_return_sequences=1,
                )
                scores.append(self.calculate_domain_score(outputs[0]))
            return {"domain_accuracy": sum(scores) / len(scores), "domain_scores": scores}

        def calculate_domain_score(self, output):
            return float(len(output) <= 50)

    result = CustomBenchmarkSuite(str(model_dirs["GPT2"])).run_domain_specific_benchmark()
    assert result == {"domain_accuracy": 1.0, "domain_scores": [1.0, 1.0]}


def test_the_unigram_baseline_counts_the_training_text(model_dirs, corpus_dir, tokenizer, tmp_path):
    config = {"data": {"train_path": str(corpus_dir / "train")}}
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    table = candidates.unigram_table(checkpoint, tokenizer, 400)

    # log frequencies with add-one smoothing, from the counts of the documents
    counts = Counter()
    for document in (corpus_dir / "train" / "toy.train").read_text().strip().split("\n\n\n"):
        counts.update(tokenizer(document, add_special_tokens=False)["input_ids"])
    for word in (" cat", " garden", "The"):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        frequency = (counts[token] + 1) / (counts.total() + 400)
        assert table[token] == pytest.approx(math.log(frequency), abs=0.05)
    assert np.exp(table).sum() == pytest.approx(1)

    # no table without a training text, or for a vocabulary that is too small
    assert candidates.unigram_table(model_dirs["Llama"], tokenizer, 400) is None
    message = r"the tokenizer yields token \d+, the model's vocabulary is 0\.\.99"
    with pytest.raises(ValueError, match=message):
        candidates.unigram_table(tmp_path, tokenizer, 100)

    # a candidate's baseline score is the sum of its tokens' entries
    items = [tasks.Item("s", ("The", "The"), (" cat", " dog"))]
    model, _ = load_model(model_dirs["Llama"], "cpu")
    _, baselines = candidates.score_candidates(model, tokenizer, items, table)
    (cat,) = tokenizer(" cat", add_special_tokens=False)["input_ids"]
    (dog,) = tokenizer(" dog", add_special_tokens=False)["input_ids"]
    assert baselines["unigram"] == pytest.approx([table[cat], table[dog]])


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """Return a benchmark file with completion, repetition, speed and eight BLiMP pairs."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "blimp_fast").mkdir()
    pairs = [pair for pair in SMALL["tasks"]["pairs"]["items"] for _ in range(4)]
    lines = [json.dumps({**pair, "field": "syntax"}) for pair in pairs]
    (folder / "blimp_fast" / "order.jsonl").write_text("\n".join(lines))
    declared = {name: SMALL["tasks"][name] for name in ("completion", "repetition", "speed")}
    declared["blimp"] = {"path": str(folder / "blimp_fast")}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": declared}))
    return folder / "suite.yaml"


@pytest.fixture
def blimp_flags(small_file):
    """Return the flags of a benchmark that runs in a moment."""
    return ["--benchmark-config", str(small_file), "--tasks", "blimp", "--device", "cpu"]


def test_a_broken_model_does_not_lose_the_results_of_the_others(
    model_dirs, small_file, tmp_path, capsys
):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    other = tmp_path / "other" / "Llama"
    build_tiny_model("Llama", seed=9).save_pretrained(other)
    load_model(model_dirs["Llama"], "cpu")[1].save_pretrained(other)
    output = tmp_path / "out" / "comparison.json"
    models = [str(model_dirs["Llama"]), str(other), str(broken)]
    flags = ["--output", str(output), "--benchmark-config", str(small_file), "--device", "cpu"]
    assert benchmark.main([*models, *flags]) == 2

    # both models have results, the broken one its reason
    document = json.loads(output.read_text())
    first_name, second_name = document["results"]
    assert first_name.endswith("/Llama")
    assert second_name == "other/Llama"
    assert "safetensors" in document["failed"]["broken"]
    task_keys = {"completion", "repetition", "speed", "blimp"}
    summary_keys = {"overall_score", "overall_score_ci95", "overall_parts"}
    assert set(document["results"][first_name]) == task_keys | summary_keys
    assert {"config", "configs", "n-samples", "versions"} <= set(document)
    assert {"date", "environment", "git_hash"} <= set(document)
    assert document["n-samples"]["blimp"] == {"original": 4, "effective": 4}

    # the second model is compared with the first
    items = load_tasks(small_file)["blimp"].items
    first_scores = naive_item_scores(BenchmarkSuite(models[0], "cpu", {}), items)
    second_scores = naive_item_scores(BenchmarkSuite(models[1], "cpu", {}), items)
    expected = grading.compare("blimp", items, second_scores, first_scores)
    assert document["comparison"]["reference"] == first_name
    difference = document["comparison"]["differences"][second_name]["blimp"]["difference"]
    assert difference == pytest.approx(expected["difference"])

    # the page, the chart, the printed report and BabyLM's file of predictions
    assert output.with_suffix(".html").is_file()
    assert output.with_suffix(".png").stat().st_size > 5000
    out, err = capsys.readouterr()
    assert "error: broken: " in err
    assert "Traceback" not in err
    assert "completion" in out
    assert "other/Llama" in out
    assert f"next  python generate.py {other} --prompt" in out, "the last model that works"
    assert "~" in out
    folder = output.parent / "results/other_Llama/main/zero_shot/causal/blimp/blimp_fast"
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions["order"]["predictions"]) == 4


def test_the_page_of_a_run_on_natural_text_says_what_was_trained(
    finished, corpus_dir, tmp_path, monkeypatch
):
    _, run_dir = finished
    monkeypatch.chdir(tmp_path)
    Path("tasks.yaml").write_text(yaml.safe_dump({"tasks": {"pairs": SMALL["tasks"]["pairs"]}}))
    flags = ["--benchmark-config", "tasks.yaml", "--output", "tiny.json", "--device", "cpu"]
    assert benchmark.main([str(run_dir), *flags]) == 0
    page = Path("tiny.html").read_text()
    words = len((corpus_dir / "train/toy.train").read_text().split())
    model = load_model(run_dir, "cpu")[0]
    last_row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        f"<p>tiny is a Llama model with {model.num_parameters():,} parameters, trained from "
        f"scratch in {last_row['step']} steps. It read {words:,} words 2 times: toy.</p>"
    ) in page
    assert "<title>Benchmark of tiny</title>" in page
    pictures = svg_pictures(page)
    assert f"held-out, {last_row['eval_loss']:.3f}" in pictures[0]
    assert not re.search("floor|entropy|grammar", page + "".join(pictures))
    assert not html_errors(page)


def test_an_interrupted_benchmark_keeps_the_models_that_were_finished(
    model_dirs, blimp_flags, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "b.json"
    models = [str(model_dirs["GPT2"]), str(model_dirs["GPTJ"])]
    argv = [*models, *blimp_flags, "--output", str(output)]
    describe_model = benchmark.describe_model

    def interrupt_the_second_model(suite):
        if suite.model_path == model_dirs["GPTJ"]:
            raise KeyboardInterrupt
        return describe_model(suite)

    monkeypatch.setattr(benchmark, "describe_model", interrupt_the_second_model)
    assert benchmark.main(argv) == 130
    assert list(json.loads(output.read_text())["results"]) == ["GPT2"]
    assert "GPT2" in output.with_suffix(".html").read_text()
    assert output.with_suffix(".png").is_file()
    message = f"interrupted; {output} holds the models that were finished, if any\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_single_model_gets_its_results_in_its_directory(
    model_dirs, blimp_flags, tmp_path, caplog
):
    model = tmp_path / "run" / "chck_2M"
    build_tiny_model("GPT2").save_pretrained(model)
    load_model(model_dirs["GPT2"], "cpu")[1].save_pretrained(model)
    assert benchmark.main([str(model), *blimp_flags]) == 0
    assert (model / "benchmark.json").is_file()
    assert (model / "benchmark.html").is_file()
    folder = model / "results/run/chck_2M/zero_shot/causal/blimp/blimp_fast"
    assert (folder / "predictions.json").is_file()
    assert f"predictions: {folder.parents[3]}" in caplog.text


TASKS_OF_2026 = {
    "ewok": ("ewok_fast", {"Context1": "A cat.", "Context2": "A dog.", "Target1": "It sees.", "Domain": "d"}),
    "entity_tracking": ("entity_tracking_fast", {"input_prefix": "A cat", "options": [" sees", " runs"], "numops": 1}),
    "global_piqa_nonparallel": (
        "global_piqa_nonparallel",
        {"example_id": "eng-3", "prompt": "A", "solution0": "cat", "solution1": "old dog", "label": 1},
    ),
    "wug_adj": ("wug_adj_nominalization", {"sentences": "a cat\ta dog", "ratio": 0.5}),
}  # fmt: skip


def test_predictions_of_2026_are_where_its_collator_looks_and_the_report_marks_old_tasks(
    model_dirs, tmp_path, capsys
):
    declared = {}
    for task, (folder, row) in TASKS_OF_2026.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "regular.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
        declared[task] = {"path": str(tmp_path / folder)}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": declared}))
    output = tmp_path / "out" / "b.json"
    flags = ["--benchmark-config", str(tmp_path / "suite.yaml"), "--output", str(output)]
    assert benchmark.main([str(model_dirs["Llama"]), *flags, "--device", "cpu"]) == 0

    def predictions(path):
        file = output.parent / "results/Llama/main/zero_shot/causal" / path / "predictions.json"
        return json.loads(file.read_text())

    ewok = predictions("ewok/ewok_fast")["d"]["predictions"]
    assert [row["id"] for row in ewok] == ["d_0", "d_1", "d_2"]
    assert {row["pred"] for row in ewok} <= {"A cat. It sees.", "A dog. It sees."}
    entities = predictions("entity_tracking/entity_tracking_fast")["regular_1_ops"]["predictions"]
    assert {row["pred"] for row in entities} <= {" sees", " runs"}
    piqa = predictions("global_piqa_nonparallel/global_piqa_nonparallel")["eng-3"]["predictions"]
    assert {row["pred"] for row in piqa} <= {" cat", " old dog"}

    results = json.loads(output.read_text())["results"]["Llama"]
    columns = results["babylm_2026"]["columns"]
    assert columns["ewok"] == pytest.approx(100 * results["ewok"]["accuracy"])
    assert columns["global_piqa"] == 100 * results["global_piqa_nonparallel"]["accuracy"]
    measured = [columns["ewok"], columns["entity_tracking"], columns["global_piqa"]]
    assert results["babylm_2026"]["overall_2026"] == pytest.approx(sum(measured) / 9)

    out = capsys.readouterr().out
    page = output.with_suffix(".html").read_text()
    for text in (out, page):
        assert "wug_adj (BabyLM 2025)" in text
        assert "ewok (BabyLM 2025)" not in text
        assert "missing and counted as 0: blimp, supplement, comps, glue, reading, aoa" in text


def test_two_models_with_the_same_weights_get_a_note(model_dirs, blimp_flags, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model_dirs["GPT2"], copy)
    output = tmp_path / "b.json"
    models = [str(model_dirs["GPT2"]), str(copy)]
    assert benchmark.main([*models, *blimp_flags, "--output", str(output)]) == 0
    assert "note: copy and GPT2 have the same weights" in capsys.readouterr().out
    comparison = json.loads(output.read_text())["comparison"]
    no_difference = {"difference": 0.0, "difference_ci95": [0.0, 0.0], "noise": True}
    assert comparison["differences"]["copy"]["blimp"] == no_difference


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "completon"],
            "--tasks completon: not declared; declared: completion, consistency",
        ),
        (["--benchmark-config", "no.yaml"], "no.yaml: no such file in "),
        (["--benchmark-config", "bnchmark.yaml"], "config/benchmark.yaml?"),
        (["MODEL"], "this model is named twice"),
        (["--output", "x.txt"], "is not a .json file"),
        (["--output", "folder.json"], "is not a .json file"),
        (["--device", "tpu"], 'device "tpu" is unknown'),
        (["--seed", "-1"], "--seed -1 must be 0 or more"),
        (["--tasks", ","], "--tasks is empty; declared: completion"),
        (
            ["--benchmark-config", "wrong.yaml"],
            "wrong.yaml: tasks.b.type: 'blmp' is unknown; did you mean blimp?",
        ),
    ],
)
def test_a_mistake_gets_only_error_lines(
    model_dirs, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("tasks:\n  a: 3\n  b: {type: blmp}\n")
    (tmp_path / "folder.json").mkdir()
    model = str(model_dirs["Llama"])
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    assert benchmark.main([model, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert not (model_dirs["Llama"] / "benchmark.json").exists()


def test_results_of_other_tasks_or_models_are_not_deleted_unasked(
    model_dirs, blimp_flags, tmp_path, capsys
):
    output = tmp_path / "b.json"
    flags = ["--output", str(output), "--device", "cpu"]
    llama = str(model_dirs["Llama"])
    assert benchmark.main([llama, *blimp_flags, *flags]) == 0
    assert benchmark.main([llama, *blimp_flags, *flags]) == 0  # the same tasks are measured again
    before = output.read_bytes()
    capsys.readouterr()
    repetition = ["--tasks", "repetition"]
    assert benchmark.main([llama, *repetition, *flags]) == 2
    assert "has results that this run would delete (blimp); name" in capsys.readouterr().err
    assert benchmark.main([str(model_dirs["GPT2"]), *blimp_flags, *flags]) == 2
    assert "has results that this run would delete (Llama); name" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert benchmark.main([llama, *repetition, *flags, "--overwrite"]) == 0
    assert "repetition" in json.loads(output.read_text())["results"]["Llama"]


def test_earlier_results_stay_if_every_model_fails(tmp_path, capsys):
    output = tmp_path / "b.json"
    output.write_text('{"results": "of before"}')
    assert benchmark.main([str(tmp_path / "none"), "--output", str(output)]) == 2
    assert output.read_text() == '{"results": "of before"}'
    assert not output.with_suffix(".html").exists()
    out, err = capsys.readouterr()
    assert "error: none: no model at" in err
    assert out == ""
