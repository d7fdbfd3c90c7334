"""Benchmarks while a model trains: the scores, what training keeps, and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    back_to_checkpoint,
    build_tiny_model,
    errors_of,
    rows_of,
    sentences,
    timeless,
)

import train
from babyllama import plots
from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.evaluation.tasks import READING_FIELDS
from babyllama.training.benchmark import SECONDS_PER_ITEM, TrainingBenchmark
from benchmark import BenchmarkSuite


@pytest.fixture
def benchmark_file(tmp_path) -> Path:
    """Return a file of two tasks, pairs and completion."""
    # both sentences are grammatical, so that the accuracy stays near chance and changes
    pairs = [
        {"sentence_good": good, "sentence_bad": bad, "UID": "any"}
        for good, bad in zip(sentences(40, seed=9), sentences(40, seed=10), strict=True)
    ]
    prompts = [
        {"prompt": "The cat sees the", "answer": "dog", "wrong": ["sees", "under"]},
        {"prompt": "The dog hears the", "answer": "bird", "wrong": ["The", "home"]},
    ]
    tasks = {"pairs": {"type": "minimal_pairs", "items": pairs}, "completion": {"items": prompts}}
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks}))
    return path


def benchmark_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "benchmark_seconds" in row]


def scores_by_suite(model_dir: Path, benchmark_file: Path) -> dict[str, float]:
    """Return the accuracies that benchmark.py finds for a saved model."""
    suite = BenchmarkSuite(model_dir, "cpu", load_tasks(str(benchmark_file)))
    return {
        f"benchmark/{name}": suite.run_items(task)["accuracy"] for name, task in suite.tasks.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_benchmark_reports_the_scores_and_does_not_change_the_training(
    precision, config_file, benchmark_file, tmp_path, capsys
):
    # dropout draws random numbers in every step, and the average is what is evaluated and saved
    path = config_file(
        model__type="GPT2",
        model__resid_pdrop=0.1,
        training__eval_steps=7,
        training__ema=0.9,
        training__precision=precision,
    )
    flags = ["--set", f"training.benchmark={benchmark_file}"]
    assert train.main(["--config", str(path), "--model-name", "without"]) == 0
    capsys.readouterr()
    assert train.main(["--config", str(path), "--model-name", "with", *flags]) == 0
    out = capsys.readouterr().out
    without = tmp_path / "models" / "without"
    run_dir = tmp_path / "models" / "with"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (without / name).read_bytes() == (run_dir / name).read_bytes(), name

    # the log has the same rows, and one more after each evaluation
    rows = rows_of(run_dir)
    scored = benchmark_rows(rows)
    assert timeless([row for row in rows if row not in scored]) == timeless(rows_of(without))
    evaluated_steps = [row["step"] for row in rows if "eval_loss" in row]
    assert [row["step"] for row in scored] == evaluated_steps
    assert len(scored) > 2
    assert len({row["benchmark/pairs"] for row in scored}) > 1, "the weights are current"

    # the results are those of benchmark.py on the saved model
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    expected = scores_by_suite(run_dir, benchmark_file)
    assert {key: metrics["results"][key] for key in expected} == pytest.approx(expected)

    # the plan states the cost, the terminal shows the scores
    cost = metrics["plan"]["benchmark"]
    assert cost["items"] == {"pairs": 40, "completion": 2}
    assert cost["expected_seconds"] > 42 * SECONDS_PER_ITEM
    assert f"items: completion 2, pairs 40; {cost['tokens']:,} tokens, {len(scored)} times" in out
    assert f"benchmark/pairs   {expected['benchmark/pairs']:.4f}" in out


def test_a_resumed_run_has_the_benchmark_rows_of_an_uninterrupted_one(
    config_file, benchmark_file, tmp_path
):
    changes = {"training__eval_steps": 3, "training__save_steps": 4, "training__max_steps": 8}
    path = config_file(training__benchmark=str(benchmark_file), **changes)
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    rows = benchmark_rows(rows_of(run_dir))
    assert back_to_checkpoint(run_dir) == "checkpoint-4"
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert timeless(benchmark_rows(rows_of(run_dir))) == timeless(rows)


def test_each_milestone_is_scored_once(config_file, benchmark_file, tmp_path, monkeypatch):
    from babyllama.training import babylm

    monkeypatch.setattr(babylm, "checkpoint_words", lambda track: [2000, 4000, 10**9])
    monkeypatch.setattr(babylm, "milestone_name", lambda words: f"chck_{words // 1000}M")
    path = config_file(training__benchmark=str(benchmark_file), training__num_epochs=1)
    raw = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**raw, "babylm": {"track": "strict-small"}}))
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    scored = {row["step"]: row for row in benchmark_rows(rows_of(run_dir))}
    assert len(scored) == len(benchmark_rows(rows_of(run_dir))), "no step is scored twice"
    checkpoints = json.loads((run_dir / "compliance.json").read_text())["checkpoints"]
    assert [checkpoint["name"] for checkpoint in checkpoints] == ["chck_2M", "chck_4M"]
    for checkpoint in checkpoints:
        expected = scores_by_suite(run_dir / checkpoint["name"], benchmark_file)
        row = scored[checkpoint["step"]]
        assert {key: row[key] for key in expected} == pytest.approx(expected)


def test_the_scorer_shares_the_weights(benchmark_file, tokenizer):
    model = build_tiny_model("Llama")
    benchmark = TrainingBenchmark(load_tasks(str(benchmark_file)), model, tokenizer)
    benchmark.scores(model)
    weights = zip(benchmark.model.parameters(), model.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in weights)
    texts = [text for task in benchmark.tasks.values() for item in task.items for text in
             (prefix + completion for prefix, completion in item.candidates)]  # fmt: skip
    assert benchmark.tokens == sum(len(ids) for ids in tokenizer(texts)["input_ids"])


def test_a_benchmark_that_cannot_be_scored_is_an_error_before_training(
    config_file, tmp_path, capsys
):
    path = config_file(training__benchmark=str(tmp_path / "tasks.yaml"))
    for text, message in (
        ("tasks: {speed: {}, completion: {}}", "tasks.speed: speed cannot be scored while"),
        ("tasks: {repetition: {}}", "tasks.repetition: repetition cannot be scored while"),
        ("tasks: {blimp: {path: nowhere}}", "nowhere"),
        ("tasks: {blimpp: {path: nowhere}}", "did you mean blimp?"),
        ("tasks: {a: {type: minimal_pairs, items: [{sentence_good: x}]}}", "sentence_bad"),
    ):
        (tmp_path / "tasks.yaml").write_text(text)
        assert train.main(["--config", str(path)]) == 2
        (line,) = errors_of(capsys)
        assert message in line
    (tmp_path / "tasks.yaml").unlink()
    assert train.main(["--config", str(path)]) == 2
    assert "no such file; known: config/benchmark" in errors_of(capsys)[0]
    assert not (tmp_path / "models").exists()


def test_the_curves_have_a_panel_for_the_benchmark(tmp_path):
    row = {"step": 1, "tokens": 10, "loss": 2.0, "learning_rate": 0.1, "tokens_per_second": 5.0}
    held_out = {"step": 1, "tokens": 10, "eval_loss": 2.0}
    scores = {"step": 1, "tokens": 10, "benchmark/a_b": 0.5, "benchmark/c": 0.7}
    for rows, expected in (([row, held_out], 3), ([row, held_out, scores], 4)):
        panels = plots.training_panels(rows)
        assert len(panels) == expected
        plots.save_panels(plots.training_panels(rows), tmp_path / "curves.png", "title")
    _, ((axis,),) = plots.new_figure(1, 1, 5, 4)
    panels[-1](axis)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a_b", "c"]


def test_the_shipped_default_benchmark_is_refused_for_its_generation_tasks(config_file, capsys):
    path = config_file(training__benchmark=str(ROOT / "config" / "benchmark.yaml"))
    assert train.main(["--config", str(path)]) == 2
    lines = errors_of(capsys)
    assert any("tasks.speed: speed cannot be scored" in line for line in lines)


def test_each_way_of_scoring_gives_the_figures_of_benchmark_py(model_dirs, tmp_path):
    """GlobalPIQA compares means, and reading times have BabyLM's own tokens."""
    from babyllama.evaluation.loading import load_model

    texts = sentences(60, seed=3)
    rows = [
        {
            "example_id": f"eng_{number}",
            "prompt": texts[number],
            "solution0": texts[number + 20],
            "solution1": " ".join(texts[number + 40].split()[:2]),
            "label": number % 2,
        }
        for number in range(20)
    ]
    (tmp_path / "eng_latn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = [*READING_FIELDS, "item", "word", "prev_item", "prev_word"]
    lines = [",".join(columns)]
    for number in range(40):
        words = texts[number].split()
        figures = [str((number * place) % 17 + 1) for place in range(1, len(READING_FIELDS) + 1)]
        lines.append(",".join([*figures, words[0] + " " + words[1], words[2], words[0], words[1]]))
    (tmp_path / "reading.csv").write_text("\n".join(lines) + "\n")
    tasks = {
        "global_piqa_nonparallel": {"path": str(tmp_path / "eng_latn.jsonl")},
        "reading": {"path": str(tmp_path / "reading.csv")},
    }
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump({"tasks": tasks}))

    declared = load_tasks(str(file))
    model, tokenizer = load_model(model_dirs["Llama"], "cpu")
    scores = TrainingBenchmark(declared, model, tokenizer).scores(model)
    suite = BenchmarkSuite(model_dirs["Llama"], "cpu", declared)
    for name, task in declared.items():
        result = suite.run_items(task)
        assert scores[f"benchmark/{name}"] == pytest.approx(result[result["metric"]], rel=1e-6)
