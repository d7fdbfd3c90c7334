"""benchmark.py: the suite on real tiny models, answers recomputed another way; the command, broken models, mistakes."""

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
from conftest import build_tiny_model

import benchmark
from babyllama.config import ConfigError, read_yaml_file
from babyllama.device import keep_freed_memory, peak_memory_gb, reset_peak_memory
from babyllama.evaluation import grading, metrics, minimal_pairs, tasks
from babyllama.evaluation.benchmark_config import BUILT_IN, TYPES, load_tasks
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
                },
                {
                    "sentence_good": "The boy helps the girl.",
                    "sentence_bad": "The boy helps the girl.",
                    "UID": "same",
                },
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


def naive_score(suite, prefix, completion):
    """Sum of log p over the tokens that end after the start of the completion, one text at a time, in float64."""
    encoding = suite.tokenizer(
        prefix + completion, add_special_tokens=False, return_offsets_mapping=True
    )
    ids = [suite.tokenizer.bos_token_id, *encoding["input_ids"]]
    logits = suite.model(input_ids=torch.tensor([ids])).logits[0].double().detach().numpy()
    total = 0.0
    for place, (_, end) in enumerate(encoding["offset_mapping"]):
        if end > len(prefix):
            row = logits[place]
            total += row[ids[place + 1]] - math.log(np.exp(row - row.max()).sum()) - row.max()
    return total


def test_scores_equal_a_naive_loop(suite):
    for name in ("completion", "pairs"):
        items = suite.tasks[name].items
        scores, baselines = minimal_pairs.score_candidates(
            suite.model, suite.tokenizer, items, suite.bos
        )
        pairs = [pair for item in items for pair in item.candidates]
        assert scores == pytest.approx([naive_score(suite, *pair) for pair in pairs], rel=1e-5)
        tokens = [len(suite.tokenizer(c, add_special_tokens=False)["input_ids"]) for _, c in pairs]
        assert baselines["shorter"].tolist() == [-n for n in tokens]


def test_without_bos_the_first_token_is_context(suite):
    items = [tasks.Item("s", ("", "The cat"), ("The cat sees", " sees the dog"))]
    ids, starts = minimal_pairs.scored_spans(suite.tokenizer, items, bos=False)
    assert starts[0] == 1 and ids[0][0] != suite.tokenizer.bos_token_id
    with_bos, starts_bos = minimal_pairs.scored_spans(suite.tokenizer, items, bos=True)
    assert [row[1:] for row in with_bos] == ids and starts_bos == [1, starts[1] + 1]


def test_keys_of_the_results(results):
    expected = {
        "completion": {"completion_accuracy", "completion_correct", "completion_total"},
        "consistency": {"avg_consistency_score", "consistency_scores"},
        "repetition": {"avg_repetition_score", "repetition_scores"},
        "speed": {"tokens_per_second", "latency_ms"},
    }
    for name, keys in expected.items():
        assert keys <= set(results[name])
    assert {"overall_score", "pairs"} <= set(results)
    json.dumps(results, allow_nan=False)


def test_completion(suite, results):
    result, items = results["completion"], suite.tasks["completion"].items
    right, written = 0, 0
    for item in items:
        scores = [naive_score(suite, *pair) for pair in item.candidates]
        right += scores[0] == max(scores)
        ids = suite.tokenizer(item.prefixes[0], return_tensors="pt")["input_ids"]
        out = suite.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        written += (
            suite.tokenizer.decode(out).strip().lower().startswith(item.completions[0].strip())
        )
    assert (result["completion_correct"], result["completion_total"]) == (right, 3)
    assert result["completion_accuracy"] == pytest.approx(right / 3) and result[
        "chance"
    ] == pytest.approx(1 / 3)
    assert result["generation_accuracy"] == pytest.approx(written / 3)
    low, high = result["completion_accuracy_ci95"]
    assert 0 <= low <= right / 3 <= high <= 1


def test_begins_with_wants_whole_words():
    assert benchmark.begins_with(" Dog and", "dog") and benchmark.begins_with("the boy.", "the boy")
    assert not benchmark.begins_with(" dogs", "dog") and not benchmark.begins_with(" a dog", "dog")


def test_consistency(suite, results):
    def words(prompt):
        return generate(suite.model, suite.tokenizer, [prompt], max_new_tokens=6, temperature=0)[0][
            0
        ].split()

    a, b, c, control = map(
        words, ["The cat sees the", "A cat sees the", "The cat finds the", "near the"]
    )
    dice = metrics.word_overlap
    result = results["consistency"]
    assert result["consistency_scores"][0] == pytest.approx(
        (dice(a, b) + dice(a, c) + dice(b, c)) / 3
    )
    second = [words(p) for p in ["The boy helps", "A boy helps", "every day helps"]]
    against = [
        np.mean([dice(x, control) for x in (a, b, c)]),
        np.mean([dice(x, second[2]) for x in second[:2]]),
    ]
    assert result["chance"] == pytest.approx(np.mean(against))
    assert result["avg_consistency_score"] == pytest.approx(np.mean(result["consistency_scores"]))
    assert result["baselines"]["same ending"]["difference"] == pytest.approx(
        result["avg_consistency_score"] - result["chance"]
    )


def test_a_model_that_always_says_the_same_is_no_better_than_its_control(model_dirs, tmp_path):
    model, tokenizer = load_model(model_dirs["GPT2"], "cpu")
    model.lm_head.weight.data.zero_()  # uniform logits: the same greedy token everywhere
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    constant = BenchmarkSuite(tmp_path, "cpu", load_tasks(SMALL))
    result = constant.run_consistency_benchmark()
    assert result["avg_consistency_score"] == result["chance"] == 1.0
    assert result["baselines"]["same ending"]["noise"]
    pairs = constant.run_items(constant.tasks["pairs"])
    lengths = [
        len(tokenizer(t, add_special_tokens=False)["input_ids"])
        for t in ("The cat sees the dog.", "The cat the dog sees.")
    ]
    assert (
        pairs["subsets"]["order"]["accuracy"]
        == (lengths[0] < lengths[1]) + (lengths[0] == lengths[1]) / 2
    )
    assert pairs["baselines"]["shorter"]["difference"] == 0 and not pairs["better_than_baselines"]


def test_repetition(suite, results):
    task = suite.tasks["repetition"]
    texts = generate(
        suite.model, suite.tokenizer, task.options["prompts"], max_new_tokens=40, seed=3
    )
    expected = []
    for (text,) in texts:
        grams = Counter(tuple(text.split()[i : i + 4]) for i in range(len(text.split()) - 3))
        expected.append(1 - len(grams) / grams.total() if grams else 0.0)
    assert results["repetition"]["repetition_scores"] == pytest.approx(expected)
    assert metrics.ngram_repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(
        1 - 4 / 5
    )


def test_the_peak_of_the_memory_can_be_forgotten():
    device = torch.device("cpu")
    keep_freed_memory()  # what is kept has to go as well
    held = np.ones(30_000_000)  # 0.24 GB
    before = peak_memory_gb(device)
    assert held.nbytes / 1e9 < before < 100
    del held
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this machine does not let a process forget its peak")
    reset_peak_memory(device)
    assert peak_memory_gb(device) < before - 0.15


def test_a_tokenizer_without_bos_and_eos(bare_model_dir):
    bare = BenchmarkSuite(bare_model_dir, "cpu", load_tasks(SMALL))
    results = bare.run_all_benchmarks()
    assert (
        results["speed"]["batches"][1]["generated_tokens"] == 15 and results["completion"]["n"] == 3
    )


def test_speed_counts_generated_tokens(results):
    rows = results["speed"]["batches"]
    assert [(row["batch_size"], row["generated_tokens"]) for row in rows] == [(1, 5), (3, 15)]
    for row in rows:
        assert row["memory_gb"] > 0 and row["latency_ms"] > 0
        seconds = (
            row["first_token_ms"] / 1000 + 4 * row["latency_ms"] / 1000
        )  # all five tokens of each text
        assert row["tokens_per_second"] == pytest.approx(
            row["generated_tokens"] / seconds, rel=1.0
        )  # medians apart
    assert results["speed"]["latency_ms"] == rows[0]["latency_ms"]


def test_ties_count_one_half(results):
    same = results["pairs"]["subsets"]["same"]
    assert (same["accuracy"], same["accuracy_official"], same["ties"]) == (0.5, 1.0, 1)


def test_a_suite_can_be_subclassed(model_dirs):
    class CustomBenchmarkSuite(BenchmarkSuite):
        def run_domain_specific_benchmark(self):
            results = []
            for prompt in ["In machine learning, the concept of", "The fundamental principle of"]:
                outputs = self.model.generate(
                    self.tokenizer(prompt, return_tensors="pt")["input_ids"],
                    max_length=50,
                    num_return_sequences=1,
                )
                results.append(self.calculate_domain_score(outputs[0]))
            return {"domain_accuracy": sum(results) / len(results), "domain_scores": results}

        def calculate_domain_score(self, output):
            return float(len(output) <= 50)

    found = CustomBenchmarkSuite(str(model_dirs["GPT2"])).run_domain_specific_benchmark()
    assert found == {"domain_accuracy": 1.0, "domain_scores": [1.0, 1.0]}


def test_unigram_table_is_the_counts_of_the_training_text(
    model_dirs, corpus_dir, tokenizer, tmp_path
):
    config = {"data": {"train_path": str(corpus_dir / "train")}}
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "checkpoint-5").mkdir()
    text = (corpus_dir / "train" / "toy.train").read_text()
    counts = Counter(
        i
        for doc in text.strip().split("\n\n\n")
        for i in tokenizer(doc, add_special_tokens=False)["input_ids"]
    )
    table = minimal_pairs.unigram_table(tmp_path / "checkpoint-5", tokenizer, 400)
    for word in (" cat", " garden", "The"):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert table[token] == pytest.approx(
            math.log((counts[token] + 1) / (counts.total() + 400)), abs=0.05
        )
    assert np.exp(table).sum() == pytest.approx(1)
    assert minimal_pairs.unigram_table(model_dirs["Llama"], tokenizer, 400) is None
    with pytest.raises(ValueError, match=r"the tokenizer yields token \d+, the model's vocabulary is 0\.\.99"):
        minimal_pairs.unigram_table(tmp_path, tokenizer, 100)
    items = [tasks.Item("s", ("The", "The"), (" cat", " dog"))]
    model, _ = load_model(model_dirs["Llama"], "cpu")
    _, baselines = minimal_pairs.score_candidates(model, tokenizer, items, True, table)
    ids = [tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (" cat", " dog")]
    assert baselines["unigram"] == pytest.approx(table[ids])


# ---- the declared tasks -------------------------------------------------------------------------


def test_built_in_items():
    raw = read_yaml_file(BUILT_IN)["tasks"]
    built = load_tasks()
    assert (
        len(built["completion"].items) >= 100
        and built["consistency"].n >= 20
        and built["repetition"].n >= 20
    )
    rows = raw["completion"]["items"]
    assert len({row["prompt"].lower() for row in rows}) == len(rows)
    for row in rows:
        assert (
            len(row["wrong"]) == 3
            and len({row["answer"].lower(), *map(str.lower, row["wrong"])}) == 4
        ), row
        assert row["prompt"] == row["prompt"].strip() and row["answer"] == row["answer"].strip()
        assert not re.search(rf"\b{re.escape(row['answer'])}\b", row["prompt"]), (
            row
        )  # the prompt gives nothing away
    assert len({row["category"] for row in rows}) >= 8
    prompts = raw["repetition"]["prompts"] + [
        p for g in raw["consistency"]["groups"] for p in [*g["prompts"], g["control"]]
    ]
    assert len({p.lower() for p in prompts}) == len(prompts)
    for group in raw["consistency"]["groups"]:
        endings = {
            tuple(prompt.lower().split()[-2:]) for prompt in [*group["prompts"], group["control"]]
        }
        assert len(endings) == 1, group
    assert built["speed"].options["batch_sizes"] == [1, 4, 8, 16]


def test_a_task_without_items_has_the_built_in_ones(tmp_path):
    file = tmp_path / "mine.yaml"
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n')
    text = f"tasks:\n  completion:\n  quick: {{type: speed, repeats: 1}}\n  pairs: {{type: minimal_pairs, path: {tmp_path}}}\n"
    file.write_text(text)
    declared = load_tasks(file)
    assert declared["completion"].n == load_tasks()["completion"].n
    assert declared["quick"].options == {
        "batch_sizes": [1, 4, 8, 16],
        "max_new_tokens": 64,
        "repeats": 1,
    }
    assert declared["pairs"].describe() == {"type": "minimal_pairs", "path": str(tmp_path)}


def test_all_mistakes_of_a_file_at_once(tmp_path):
    raw = {
        "blimpp": {}, "blimp": {"path": str(tmp_path / "none")}, "ewok": None, "x/y": {}, "n": 3, "list": {"type": ["blimp"]},
        "speed": {"batch_sizes": [0], "repeat": 3}, "two": {"type": "wug_adj", "path": "a", "items": []},
        "mine": {"type": "completion", "items": [{"prompt": "a", "answer": "b"}]},
        "consistency": {"groups": [{"prompts": ["a"], "control": ""}]}, "babylm_macro_average": {"type": "speed"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_tasks({"tasks": raw})
    message = str(caught.value)
    for part in (
        "tasks.blimpp.type: 'blimpp' is unknown; did you mean blimp?", f"tasks.blimp: {tmp_path / 'none'} does not exist",
        "tasks.list.type: ['blimp'] is unknown",
        "tasks.ewok: ewok needs either `path` or `items`", "tasks.n: 3 is not a task",
        "tasks.speed.batch_sizes.0: 0 is not allowed", "tasks.speed.repeat: unknown key; did you mean tasks.speed.repeats?",
        "tasks.mine: items: item 1: missing fields: wrong", "tasks.two: wug_adj needs either", "tasks.x/y: not a name",
        "tasks.babylm_macro_average: this name is reserved",
        "tasks.consistency.groups.0.prompts:",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(ConfigError, match="one section, `tasks`"):
        load_tasks({"task": {}})
    assert set(TYPES) == {*tasks.TASKS, "consistency", "repetition", "speed"}


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "blimp_fast").mkdir()
    rows = [item for item in SMALL["tasks"]["pairs"]["items"] for _ in range(4)]
    lines = [json.dumps({**row, "field": "syntax"}) for row in rows]
    (folder / "blimp_fast" / "order.jsonl").write_text("\n".join(lines))
    raw = {name: SMALL["tasks"][name] for name in ("completion", "repetition", "speed")}
    raw["blimp"] = {"path": str(folder / "blimp_fast")}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": raw}))
    return folder / "suite.yaml"


def test_one_broken_model_does_not_lose_the_others(model_dirs, small_file, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    other = tmp_path / "other" / "Llama"
    build_tiny_model("Llama", seed=9).save_pretrained(other)
    load_model(model_dirs["Llama"], "cpu")[1].save_pretrained(other)
    output = tmp_path / "out" / "comparison.json"
    models = [str(model_dirs["Llama"]), str(broken), str(other)]
    assert (
        benchmark.main(
            [
                *models,
                "--output",
                str(output),
                "--benchmark_config",
                str(small_file),
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    document = json.loads(output.read_text())
    names = list(document["results"])
    assert len(names) == 2 and names[0].endswith("/Llama") and names[1] == "other/Llama"
    assert "safetensors" in document["failed"]["broken"]
    assert document["comparison"]["reference"] == names[0]
    items = load_tasks(small_file)["blimp"].items
    suites = [BenchmarkSuite(path, "cpu", {}) for path in (models[0], models[2])]
    first, second = (
        np.array([naive_score(s, *pair) for item in items for pair in item.candidates])
        for s in suites
    )
    expected = grading.compare("blimp", items, second, first)
    found = document["comparison"]["differences"]["other/Llama"]["blimp"]
    assert found["difference"] == pytest.approx(expected["difference"])
    assert set(document["results"][names[0]]) == {
        "completion",
        "repetition",
        "speed",
        "blimp",
        "overall_score",
        "overall_score_ci95",
        "overall_parts",
    }
    assert {"versions", "n-samples", "config", "configs", "git_hash", "environment", "date"} <= set(
        document
    )
    assert document["n-samples"]["blimp"] == {"original": 8, "effective": 8}
    assert (
        output.with_suffix(".html").is_file() and output.with_suffix(".png").stat().st_size > 5000
    )
    out, err = capsys.readouterr()
    assert "error: broken: " in err and "Traceback" not in err
    assert "completion" in out and "other/Llama" in out and "~" in out
    official = (
        output.parent
        / "results"
        / "other_Llama"
        / "main"
        / "zero_shot"
        / "causal"
        / "blimp"
        / "blimp_fast"
    )
    assert len(json.loads((official / "predictions.json").read_text())["order"]["predictions"]) == 4


def test_what_was_measured_survives_an_interruption(
    model_dirs, small_file, tmp_path, capsys, monkeypatch
):
    output, models = tmp_path / "b.json", [str(model_dirs["GPT2"]), str(model_dirs["GPTJ"])]
    model_facts = benchmark.model_facts

    def interrupted(suite):
        if suite.model_path == model_dirs["GPTJ"]:
            raise KeyboardInterrupt
        return model_facts(suite)

    monkeypatch.setattr(benchmark, "model_facts", interrupted)
    argv = [*models, "--benchmark-config", str(small_file), "--tasks", "blimp", "--device", "cpu"]
    assert benchmark.main([*argv, "--output", str(output)]) == 130
    assert list(json.loads(output.read_text())["results"]) == ["GPT2"]
    assert (
        "GPT2" in output.with_suffix(".html").read_text() and output.with_suffix(".png").is_file()
    )
    ended = f"interrupted; {output} holds the models that were finished, if any\n"
    assert capsys.readouterr().err.endswith(ended)

    def early(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "load_tasks", early)  # while the tasks are read
    assert benchmark.main([*argv, "--output", str(output)]) == 130
    assert capsys.readouterr().err == ended


def test_a_report_that_cannot_be_drawn_is_no_success(
    model_dirs, small_file, tmp_path, capsys, monkeypatch
):
    def broken(rows, path):
        raise RuntimeError("no font")

    monkeypatch.setattr("babyllama.plots.plot_comparison", broken)
    argv = [
        str(model_dirs["GPT2"]),
        "--benchmark-config",
        str(small_file),
        "--tasks",
        "blimp",
        "--device",
        "cpu",
    ]
    assert benchmark.main([*argv, "--output", str(tmp_path / "b.json")]) == 2
    out = capsys.readouterr().out
    assert "the report after GPT2 is incomplete: no font" in out and "results:" not in out
    assert list(json.loads((tmp_path / "b.json").read_text())["results"]) == ["GPT2"]


def test_one_model_writes_into_its_own_directory(model_dirs, small_file, tmp_path, capsys):
    model = tmp_path / "run" / "chck_2M"
    build_tiny_model("GPT2").save_pretrained(model)
    load_model(model_dirs["GPT2"], "cpu")[1].save_pretrained(model)
    assert (
        benchmark.main(
            [
                str(model),
                "--benchmark-config",
                str(small_file),
                "--tasks",
                "blimp",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (model / "benchmark.json").is_file() and (model / "benchmark.html").is_file()
    assert (
        model / "results/run/chck_2M/zero_shot/causal/blimp/blimp_fast/predictions.json"
    ).is_file()
    capsys.readouterr()


def test_the_same_weights_under_two_names_are_pointed_out(model_dirs, small_file, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model_dirs["GPT2"], copy)
    argv = [
        str(model_dirs["GPT2"]),
        str(copy),
        "--benchmark-config",
        str(small_file),
        "--tasks",
        "blimp",
        "--device",
        "cpu",
    ]
    assert benchmark.main([*argv, "--output", str(tmp_path / "b.json")]) == 0
    assert "note: copy and GPT2 have the same weights" in capsys.readouterr().out
    gap = json.loads((tmp_path / "b.json").read_text())["comparison"]["differences"]["copy"][
        "blimp"
    ]
    assert gap == {"difference": 0.0, "difference_ci95": [0.0, 0.0], "noise": True}


def test_mistakes_get_one_line(model_dirs, tmp_path, capsys):
    model, wrong = str(model_dirs["Llama"]), tmp_path / "wrong.yaml"
    wrong.write_text("tasks:\n  a: 3\n  b: {type: blmp}\n")
    (tmp_path / "folder.json").mkdir()
    for argv, said in (
        (
            [model, "--tasks", "completon"],
            "--tasks completon: not declared; declared: completion, consistency",
        ),
        ([model, "--benchmark-config", str(tmp_path / "no.yaml")], "no such configuration file"),
        ([model, model], "this model is named twice"),
        ([model, "--output", str(tmp_path / "x.txt")], "is not a .json file"),
        ([model, "--output", str(tmp_path / "folder.json")], "is not a .json file"),
        ([model, "--device", "tpu"], 'device "tpu" is unknown'),
        ([model, "--seed", "-1"], "--seed -1 must be 0 or more"),
        ([model, "--tasks", ","], "--tasks is empty; declared: completion"),
        (
            [model, "--benchmark-config", str(wrong)],
            f"{wrong}: tasks.b.type: 'blmp' is unknown; did you mean blimp?",
        ),
    ):
        assert benchmark.main(argv) == 2
        err = capsys.readouterr().err
        assert said in err and all(line.startswith("error: ") for line in err.splitlines())
    assert not (model_dirs["Llama"] / "benchmark.json").exists()


def test_where_every_model_fails_the_files_of_before_stay(tmp_path, capsys):
    output = tmp_path / "b.json"
    output.write_text('{"results": "of before"}')
    assert benchmark.main([str(tmp_path / "none"), "--output", str(output)]) == 2
    assert (
        output.read_text() == '{"results": "of before"}'
        and not output.with_suffix(".html").exists()
    )
    out, err = capsys.readouterr()
    assert "error: none: no model at" in err and out == ""
