"""Groups of runs that differ only in the seed: who belongs together, means, spreads and the page."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

import benchmark
from babyllama.evaluation import report
from babyllama.evaluation.seed_groups import seed_groups
from babyllama.runs.finished_run import read_metrics, seed_and_config
from babyllama.runs.run_dir import METRICS_FILE


def document_of(scores: dict[str, tuple[str, int, float]]) -> dict:
    """Return the parts of a results document that grouping reads, from (config, seed, accuracy)."""
    return {
        "configs": {"pairs": {"type": "minimal_pairs"}},
        "models": {
            name: {"run": {"config": config, "seed": seed}}
            for name, (config, seed, _) in scores.items()
        },
        "results": {
            name: {"pairs": {"metric": "accuracy", "accuracy": value}, "overall_score": None}
            for name, (_, _, value) in scores.items()
        },
    }


def test_groups_have_mean_deviation_and_a_spread_from_both():
    a = [0.50, 0.52, 0.54]
    b = [0.60, 0.70]
    runs = {f"a-seed{i}": ("A", i, value) for i, value in enumerate(a)}
    runs |= {f"b-seed{i}": ("B", i, value) for i, value in enumerate(b)}
    first, second = seed_groups(document_of(runs))
    assert (first["name"], second["name"]) == ("a", "b")
    assert first["seeds"] == [0, 1, 2]
    assert first["scores"]["pairs"] == {
        "mean": pytest.approx(np.mean(a)),
        "standard_deviation": pytest.approx(np.std(a, ddof=1)),
        "n": 3,
    }
    score = second["scores"]["pairs"]
    residuals = [*(np.array(a) - np.mean(a)), *(np.array(b) - np.mean(b))]
    assert score["spread"] == pytest.approx(math.sqrt(sum(r**2 for r in residuals) / (5 - 2)))
    assert score["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    assert not score["noise"], "0.13 is above 2 x 0.044"
    runs["b-seed0"] = ("B", 0, 0.54)
    assert seed_groups(document_of(runs))[1]["scores"]["pairs"]["noise"]


def test_only_runs_that_differ_in_the_seed_alone_are_grouped():
    runs = {"a": ("A", 1, 0.5), "b": ("B", 2, 0.6)}
    assert seed_groups(document_of(runs)) == []
    runs["copy"] = ("A", 1, 0.5)
    assert seed_groups(document_of(runs)) == [], "the same seed twice has no spread"
    runs["other"] = ("A", 3, 0.7)
    groups = seed_groups(document_of(runs))
    assert [group["models"] for group in groups] == [["a", "other"], ["b"], ["copy"]]
    assert groups[1]["scores"]["pairs"]["standard_deviation"] is None
    assert groups[1]["scores"]["pairs"]["spread"] == pytest.approx(np.std([0.5, 0.7], ddof=1))


def test_benchmark_groups_runs_and_shows_the_spread(finished, tmp_path, capsys):
    paths = []
    for seed, changes in ((1, {}), (2, {}), (3, {"lr": 0.5})):
        folder = tmp_path / f"tiny-seed{seed}"
        shutil.copytree(finished[1], folder)
        metrics = json.loads((folder / METRICS_FILE).read_text())
        metrics["config"]["model"]["name"] = folder.name
        metrics["config"]["training"] |= {"seed": seed, **changes}
        metrics["results"]["eval_bits_per_byte"] = 1.0 + seed
        (folder / METRICS_FILE).write_text(json.dumps(metrics))
        paths.append(str(folder))
    first, second, third = (seed_and_config(read_metrics(path)) for path in paths)
    assert first["config"] == second["config"] != third["config"]
    assert [first["seed"], second["seed"]] == [1, 2]

    output = tmp_path / "results.json"
    command = [*paths, "--tasks", "completion", "--device", "cpu", "--output", str(output)]
    assert benchmark.main(command) == 0
    document = json.loads(output.read_text())
    group, other = document["seed_groups"]
    assert group["models"] == ["tiny-seed1", "tiny-seed2"]
    bits = group["scores"]["held-out bits per byte"]
    assert bits == {"mean": 2.5, "standard_deviation": pytest.approx(math.sqrt(0.5)), "n": 2}
    assert not other["scores"]["held-out bits per byte"]["noise"], "1.5 is above 2 x 0.707"
    out = capsys.readouterr().out
    line = f"tiny, held-out bits per byte: {report.seed_text(bits)}"
    assert line in out
    page = output.with_suffix(".html").read_text()
    assert "Over seeds" in page
    assert report.seed_text(bits) in page
