"""report.py: the tables, the learning curves, and a page that is self-contained and escaped."""

import base64
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from babyllama.evaluation import report
from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.evaluation.report import (
    difference_text,
    page,
    phenomenon_curves,
    score_curves,
    table_rows,
    text_report,
)

EVIL = '<script>alert("x")</script>'


def result(value, chance=0.5, noise=False, **more):
    gap = {"difference": value - chance, "difference_ci95": [-0.1, 0.1], "noise": noise}
    return {
        "metric": "accuracy", "accuracy": value, "accuracy_ci95": [value - 0.05, value + 0.05], "n": 100,
        "chance": chance, "ties": 2, "accuracy_official": value + 0.01,
        "baselines": {"random": {"score": chance, **gap}, "shorter": {"score": 0.4, **gap}}, **more,
    }  # fmt: skip


def document(models=("run/checkpoint-100", "run/checkpoint-400", EVIL)):
    """A result of three models, two of them checkpoints of one run and one with a hostile name."""
    results, facts = {}, {}
    for i, model in enumerate(models):
        speed = {"metric": "tokens_per_second", "tokens_per_second": 1234.5, "n": 3, "batches": [
            {"batch_size": b, "tokens_per_second": 100.0 * b, "latency_ms": 9.0, "first_token_ms": 11.0, "memory_gb": 0.5}
            for b in (1, 4)]}  # fmt: skip
        samples = [
            {"prompt": EVIL, "text": 'and "><img src=http://x onerror=alert(1)>\x00\x1b[31m'}
        ]
        repetition = {
            "metric": "avg_repetition_score",
            "avg_repetition_score": 0.2,
            "avg_repetition_score_ci95": [0.1, 0.3],
        }
        results[model] = {
            "blimp": result(0.6 + 0.1 * i, noise=i == 0), "repetition": {**repetition, "n": 20, "samples": samples},
            "speed": speed, "overall_score": 0.3 - 0.1 * i, "overall_score_ci95": [0.1, 0.4],
            "overall_parts": {"blimp": 0.25, "one_minus_repetition": 0.8},
        }  # fmt: skip
        facts[model] = {
            "path": f"models/{model}", "architecture": "LlamaForCausalLM", "parameters": 10**7, "vocab_size": 16000,
            "context": 128, "device": "cpu", "bos": True, "weights_sha256": [], "training": None,
        }  # fmt: skip
    gap = {"difference": 0.1, "difference_ci95": [-0.05, 0.25], "noise": True}
    sure = {"difference": 0.2, "difference_ci95": [0.15, 0.25], "noise": False}
    names = list(results)
    return {
        "results": results, "models": facts, "failed": {"broken": f"cannot be read {EVIL}"}, "notes": [f"a and {EVIL} have the same weights"],
        "comparison": {"reference": names[0], "differences": {names[1]: {"blimp": gap}, names[2]: {"blimp": sure}}},
        "configs": {"blimp": {"type": "blimp"}, "repetition": {"type": "repetition"}, "speed": {"type": "speed"}},
        "config": {"seed": 0}, "date": "2026-01-01T00:00:00+00:00", "git_hash": None, "environment": {"device": "CPU"},
    }  # fmt: skip


class Reader(HTMLParser):
    """Collect the tags and the attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def test_table_marks_noise():
    lines = text_report(document()).splitlines()
    head = "task model figure score 95 % interval n chance ties baselines minus run/checkpoint-100"
    assert lines[0].split() == head.split()
    assert (
        "random 0.500 ~, shorter 0.400 ~" in lines[1]
        and "0.600" in lines[1]
        and "0.550 .. 0.650" in lines[1]
    )
    assert "+0.100 [-0.050, +0.250] ~" in lines[2] and "random 0.500, shorter 0.400 " in lines[2]
    assert lines[3].endswith("+0.200 [+0.150, +0.250]")
    assert (
        "overall score of run/checkpoint-400: 0.200 [0.100, 0.400] = mean of blimp 0.250; times 0.800 (1 - repetition)"
        in lines
    )
    assert lines[-1] == f"note: a and {EVIL} have the same weights"
    worse = {"score": 0.7, "difference": -0.2, "noise": False}
    assert report.baseline_text("unigram", worse) == "unigram 0.700 >"
    assert len({len(row) for row in table_rows(document())}) == 1
    tiny = {"difference": -1e-9, "difference_ci95": [-0.1, 0.1], "noise": True}
    assert difference_text(tiny) == "+0.000 [-0.100, +0.100] ~"


def test_a_second_figure_has_separate_rows():
    made = document()
    for results in made["results"].values():
        results["blimp"] |= {
            "metric": "completion_accuracy", "completion_accuracy": 0.6, "completion_accuracy_ci95": [0.5, 0.7],
            "generation_accuracy": 0.25, "generation_accuracy_ci95": [0.2, 0.3],
        }  # fmt: skip
    rows = [row for row in table_rows(made) if row["task"] == "blimp (generated)"]
    assert [(row["model"], row["value"], row["low"], row["high"]) for row in rows] == [
        (model, 0.25, 0.2, 0.3) for model in made["results"]
    ]  # fmt: skip
    assert all(
        row["chance"] is None and row["difference"] is None and row["baselines"] == {}
        for row in rows
    )


def test_points_of_a_learning_curve_by_hand():
    (curve,) = score_curves(document())
    assert (curve["run"], curve["unit"]) == ("models/run", "training steps")
    blimp = next(line for line in curve["lines"] if line["task"] == "blimp")
    chart = report.CHART
    bottom, right = chart["height"] - chart["bottom"], chart["width"] - chart["right"]
    height = bottom - chart["top"]
    want = [(x, *(bottom - share * height for share in shares)) for x, shares in (
        (chart["left"], (0.6, 0.55, 0.65)), (right, (0.7, 0.65, 0.75)),  # value, low, high
    )]  # fmt: skip
    assert [list(point) for point in blimp["points"]] == [pytest.approx(point) for point in want]
    assert [line["task"] for line in curve["lines"]] == ["blimp", "repetition"]
    assert score_curves(document(("a", "b", "c"))) == []
    (words,) = score_curves(document(("run/chck_1M", "run/chck_10M", "run/other")))
    assert words["unit"] == "million words seen"


def milestones(*millions):
    """A result of checkpoints of one run on four paradigms of two phenomena; the accuracy is known by the number."""
    made = document(tuple(f"run/chck_{n}M" for n in millions))
    made["configs"]["blimp"]["phenomena"] = {
        "a": "agreement",
        "b": "agreement",
        "c": "binding",
        "d": "binding",
    }
    for n, results in zip(millions, made["results"].values(), strict=True):
        subsets = {"a": n / 100, "b": n / 200, "c": 0.5, "d": 1.0}
        results["blimp"]["subsets"] = {name: result(value) for name, value in subsets.items()}
    return made


def test_learning_curves_of_phenomena_by_hand(tmp_path):
    made = milestones(10, 1, 20)
    (curve,) = phenomenon_curves(made)
    assert (curve["run"], curve["task"], curve["words"], curve["at"]) == (
        "models/run",
        "blimp",
        True,
        [1, 10, 20],
    )
    assert curve["lines"]["agreement"] == pytest.approx([0.0075, 0.075, 0.15])
    assert curve["lines"]["binding"] == [0.75] * 3
    assert curve["mean"] == pytest.approx([0.7, 0.6, 0.8])
    written = report.write_files(made, tmp_path / "learning.json")
    assert [path.name for path in written] == [
        "learning.json",
        "learning.html",
        "learning.png",
        "learning-run-blimp.png",
    ]
    assert written[-1].read_bytes().startswith(b"\x89PNG")
    assert not phenomenon_curves(document())
    by_steps = milestones(1, 2, 3, 4)
    for facts, name in zip(
        by_steps["models"].values(),
        ("chck_1M", "chck_2M", "checkpoint-5", "checkpoint-9"),
        strict=True,
    ):
        facts["path"] = f"models/run/{name}"
    written = report.write_files(by_steps, tmp_path / "both.json")
    assert [path.name for path in written[3:]] == ["both-run-blimp.png", "both-run-blimp-steps.png"]


def test_phenomena_are_read_from_the_rows(tmp_path):
    pair = {"sentence_good": "a", "sentence_bad": "b"}
    rows = [
        pair | {"UID": "x", "linguistics_term": "binding"},
        pair | {"UID": "y", "linguistics_term": "agreement"},
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*rows, pair])))
    (task,) = load_tasks({"tasks": {"blimp": {"path": str(tmp_path)}}}).values()
    assert task.describe()["phenomena"] == {"x": "binding", "y": "agreement"}


def test_words_are_on_a_log_axis():
    (curve,) = score_curves(milestones(1, 10, 100))
    first, middle, last = (x for x, *_ in curve["lines"][0]["points"])
    assert middle - first == pytest.approx(last - middle) and [at for _, at in curve["ticks"]] == [
        1,
        10,
        100,
    ]


def test_a_curve_can_start_at_zero_words():
    for first in ("chck_0M", "chck_01M"):  # 0 has no logarithm; two checkpoints of 1M coincide
        (curve,) = score_curves(document((f"run/{first}", "run/chck_1M", "other")))
        places = [x for x, *_ in curve["lines"][0]["points"]]
        assert all(np.isfinite(places)) and places == sorted(places)


def test_the_page_loads_nothing_and_runs_nothing():
    reader = Reader(page(document()))
    assert not {"script", "img", "link", "iframe"} & set(reader.tags)
    for _, name, _ in reader.attributes:
        assert name not in ("src", "href", "srcset", "action") and not name.startswith("on")


def test_names_and_generated_text_are_escaped():
    text = page(document())
    assert "&lt;script&gt;" in text
    assert EVIL not in text
    assert "\x00" not in text and "\x1b" not in text


def test_failed_models_are_at_the_top_of_the_page():
    text = page(document())
    assert text.index("failed: cannot be read") < text.index("<h2>Models</h2>")


def with_a_run(made: dict, folder: Path) -> str:
    """The document with its first model a run in folder, with pictures of which one is old; the name of that model."""
    from matplotlib.figure import Figure

    name = next(iter(made["models"]))
    for file, age in (
        ("evaluation_plots.png", 100),
        ("model.safetensors", 50),
        ("training_curves.png", 0),
    ):
        figure = Figure(figsize=(1, 1))
        figure.savefig(folder / file, format="png")
        os.utime(folder / file, (1e9 - age, 1e9 - age))
    scores = {
        "eval_loss": 2.2151,
        "eval_perplexity": 9.163,
        "eval_bits_per_byte": 0.8425,
        "floor_bits_per_byte": 0.8241,
    }
    made["models"][name] |= {"path": str(folder), "training": {**scores, "words_trained": 600_000}}
    return name


def test_the_page_shows_the_scores_and_pictures_of_training(tmp_path):
    made = document()
    name = with_a_run(made, tmp_path)
    reader = Reader(page(made))
    (source,) = [
        value for tag, key, value in reader.attributes if (tag, key) == ("img", "src")
    ]  # the old one is not
    kind, _, data = source.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "training_curves.png").read_bytes()
    text = page(made)
    held_out = text[text.index("<h2>Held-out text") : text.index("<h2>Scores")]
    assert held_out.count("<tr>") == 2 and f"{name}</td>" in held_out  # the head and this model
    assert all(
        shown in held_out for shown in (">2.215<", ">9.163<", ">0.8425<", ">0.8241<", ">600,000<")
    )
    made["models"][name]["training"]["floor_bits_per_byte"] = made["models"][name]["training"][
        "words_trained"
    ] = None
    assert "0.8241" not in page(made) and "Held-out text" not in page(document())


def test_a_results_file_of_an_earlier_release_is_shown(tmp_path):
    made = document()
    for results, facts in zip(made["results"].values(), made["models"].values(), strict=True):
        del results["overall_score_ci95"], facts["training"]
    assert "= mean of blimp 0.250" in text_report(made) and "Held-out text" not in page(made)


def test_the_page_lists_the_subsets_of_a_task():
    made = document()
    rows = {f"kind {i}": {**result(0.9), "accuracy_ci95": [0.8, 0.95]} for i in range(3)}
    for name, results in made["results"].items():
        results["blimp"]["subsets"] = {**rows, EVIL: result(0.1 if name == EVIL else 0.2)}
    text = page(made)
    assert "<summary>blimp: 4 subsets</summary>" in text and "<details open>" in text  # 4 x 3 rows
    assert text.count("<td>kind 1</td>") == 3 and "0.800 to 0.950" in text and EVIL not in text
    rows |= {f"more {i}": result(0.5) for i in range(30)}
    for results in made["results"].values():
        results["blimp"]["subsets"] = rows
    assert "<details><summary>blimp: 33 subsets" in page(made)


def test_page_and_chart_are_written_beside_the_json_file(tmp_path):
    made = json.loads(json.dumps(document(("a", "b", "$\\frac{$"))))
    written = report.write_files(made, tmp_path / "comparison.json")
    assert [p.name for p in written] == ["comparison.json", "comparison.html", "comparison.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    for results in made["results"].values():  # a bar that ends at 1 by less than a rounding error
        results["blimp"] |= {"accuracy": 1.0, "accuracy_ci95": [0.9, 1.0]}
    assert len(report.write_files(made, tmp_path / "perfect.json")) == 3
    only_speed = {**made, "configs": {"speed": {"type": "speed"}}}
    assert [p.suffix for p in report.write_files(only_speed, tmp_path / "s.json")] == [
        ".json",
        ".html",
    ]
