"""The report: its tables, and a page that is self-contained and escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from conftest import html_errors, svg_pictures
from lxml import etree

from babyllama.evaluation import report
from babyllama.evaluation.benchmark_config import TYPES
from babyllama.evaluation.report import difference_text, page, table_rows, text_report

EVIL = '<script>alert("x")</script>'


def make_result(accuracy: float, noise: bool = False) -> dict:
    """Return the result of a task with 100 items, chance 0.5 and two baselines."""
    difference = {"difference": accuracy - 0.5, "difference_ci95": [-0.1, 0.1], "noise": noise}
    return {
        "metric": "accuracy",
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - 0.05, accuracy + 0.05],
        "n": 100,
        "chance": 0.5,
        "ties": 2,
        "baselines": {
            "random": {"score": 0.5, **difference},
            "shorter": {"score": 0.4, **difference},
        },
    }


def make_speed() -> dict:
    batches = []
    for batch_size in (1, 4):
        batches.append(
            {
                "batch_size": batch_size,
                "tokens_per_second": 100.0 * batch_size,
                "latency_ms": 9.0,
                "first_token_ms": 11.0,
                "memory_gb": 0.5,
            }
        )
    return {"metric": "tokens_per_second", "tokens_per_second": 1234.5, "n": 3, "batches": batches}


def make_repetition() -> dict:
    text = 'and "><img src=http://x onerror=alert(1)>\x00\x1b[31m\u202e'
    return {
        "metric": "avg_repetition_score",
        "avg_repetition_score": 0.2,
        "avg_repetition_score_ci95": [0.1, 0.3],
        "n": 20,
        "samples": [{"prompt": EVIL, "text": text}],
    }


def make_document(models=("run/checkpoint-100", "run/checkpoint-400", EVIL)) -> dict:
    """Return results of models; by default two checkpoints of a run and a hostile name.

    The accuracy of the models is 0.6, 0.7, ... and only the first one may be noise.
    """
    results = {}
    facts = {}
    for i, model in enumerate(models):
        results[model] = {
            "blimp": make_result(0.6 + 0.1 * i, noise=i == 0),
            "repetition": make_repetition(),
            "speed": make_speed(),
            "overall_score": 0.3 - 0.1 * i,
            "overall_score_ci95": [0.1, 0.4],
            "overall_parts": {"blimp": 0.25, "one_minus_repetition": 0.8},
        }
        facts[model] = {
            "path": f"models/{model}",
            "architecture": "LlamaForCausalLM",
            "parameters": 10**7,
            "vocab_size": 16000,
            "context": 128,
            "device": "cpu",
            "bos": True,
            "weights_sha256": [],
            "training": None,
            "trained": None,
            "run": None,
        }
    noise = {"difference": 0.1, "difference_ci95": [-0.05, 0.25], "noise": True}
    significant = {"difference": 0.2, "difference_ci95": [0.15, 0.25], "noise": False}
    reference, second, third = list(models)[:3]
    return {
        "results": results,
        "models": facts,
        "failed": {"broken": f"cannot be read {EVIL}"},
        "notes": [f"a and {EVIL} have the same weights"],
        "seed_groups": [],
        "comparison": {
            "reference": reference,
            "differences": {second: {"blimp": noise}, third: {"blimp": significant}},
        },
        "configs": {
            "blimp": {"type": "blimp"},
            "repetition": {"type": "repetition"},
            "speed": {"type": "speed"},
        },
        "config": {"seed": 0},
        "date": "2026-01-01T00:00:00+00:00",
        "git_hash": None,
        "environment": {"device": "CPU"},
    }


class PageParser(HTMLParser):
    """Collect the tags and the attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_marks_differences_that_may_be_noise():
    lines = text_report(make_document()).splitlines()
    header, first, second, third = lines[:4]
    columns = "task model figure score 95% interval n chance ties baselines"
    assert header.split() == f"{columns} minus run/checkpoint-100".split()
    assert "random 0.500 ~, shorter 0.400 ~" in first
    assert "0.600" in first
    assert "0.550 .. 0.650" in first
    assert "+0.100 [-0.050, +0.250] ~" in second
    assert "random 0.500, shorter 0.400 " in second
    assert third.endswith("+0.200 [+0.150, +0.250]")
    score = "overall score of run/checkpoint-400: 0.200 [0.100, 0.400]"
    assert f"{score} = mean of blimp 0.250; times 0.800 (1 - repetition)" in lines
    assert lines[-1] == f"note: a and {EVIL} have the same weights"
    assert len({len(row) for row in table_rows(make_document())}) == 1


def test_a_baseline_that_beats_the_model_is_marked():
    better = {"score": 0.7, "difference": -0.2, "noise": False}
    assert report.baseline_text("unigram", better) == "unigram 0.700 >"


def test_no_difference_is_printed_as_minus_zero():
    tiny = {"difference": -1e-9, "difference_ci95": [-0.1, 0.1], "noise": True}
    assert difference_text(tiny) == "+0.000 [-0.100, +0.100] ~"


def test_a_second_metric_of_a_task_has_separate_rows():
    document = make_document()
    for results in document["results"].values():
        results["blimp"] |= {
            "metric": "completion_accuracy",
            "completion_accuracy": 0.6,
            "completion_accuracy_ci95": [0.5, 0.7],
            "generation_accuracy": 0.25,
            "generation_accuracy_ci95": [0.2, 0.3],
        }
    rows = [row for row in table_rows(document) if row["task"] == "blimp (generated)"]
    assert [row["model"] for row in rows] == list(document["results"])
    for row in rows:
        assert (row["value"], row["low"], row["high"]) == (0.25, 0.2, 0.3)
        assert row["chance"] is None
        assert row["difference"] is None
        assert row["baselines"] == {}


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_is_valid_loads_nothing_and_runs_nothing():
    text = page(make_document())
    assert html_errors(text.replace("</table>", "", 1))  # the parser would notice
    assert not html_errors(text)
    parser = PageParser(text)
    assert not {"script", "link", "iframe"} & set(parser.tags)
    for tag, name, _ in parser.attributes:
        assert name not in ("href", "srcset", "action")
        assert name != "src" or tag == "img"
        assert not name.startswith("on")
    for svg in svg_pictures(text):
        assert "<script" not in svg
        assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))


def test_pictures_are_drawn_for_light_and_dark_pages():
    (svg, _) = svg_pictures(page(make_document()))
    tree = etree.fromstring(svg.encode())
    style = tree.findtext(".//{*}style")
    light, dark = re.findall(r"svg { color: (#\w+)", style)
    assert "prefers-color-scheme: dark" in style[style.index(light) : style.index(dark)]
    texts = tree.findall(".//{*}text")
    assert {"blimp", "score", "training steps"} <= {text.text for text in texts}
    for text in texts:
        assert "fill: currentColor" in text.get("style")


def test_the_page_says_what_each_task_asks():
    assert set(report.ASKS) == set(TYPES)
    text = page(make_document())
    assert f"<li><b>blimp</b>: {report.ASKS['blimp']} Chance is 0.500.</li>" in text


def test_names_and_generated_text_are_escaped():
    text = page(make_document())
    assert "&lt;script&gt;" in text
    assert EVIL not in text
    assert "\x00" not in text
    assert "\x1b" not in text and "\u202e" not in text


def test_failed_models_are_at_the_top_of_the_page():
    text = page(make_document())
    assert text.index("failed: cannot be read") < text.index("<h2>Models</h2>")


@pytest.fixture
def trained_document(tmp_path):
    """Return results whose first model is a run in tmp_path with scores and a log."""
    row = {"tokens": 9, "loss": 3.0, "learning_rate": 0.1, "tokens_per_second": 5.0, "step": 1}
    last = {"tokens": 9, "eval_loss": 2.2151}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(last)}\n")
    document = make_document()
    facts = next(iter(document["models"].values()))
    facts["path"] = str(tmp_path)
    facts["training"] = {
        "eval_loss": 2.2151,
        "eval_perplexity": 9.163,
        "eval_bits_per_byte": 0.8425,
        "eval_by_domain": {},
        "floor_bits_per_byte": 0.8241,
        "words_trained": 600_000,
    }
    return document


def test_the_page_has_a_picture_of_the_training(trained_document):
    alone = trained_document["models"]["run/checkpoint-100"]
    loss, gap, *_ = svg_pictures(
        page({**trained_document, "models": {"run/checkpoint-100": alone}})
    )
    # the entropy in nats per token follows from the ratio of the two held-out losses
    assert f"entropy of the grammar, {0.8241 * 2.2151 / 0.8425:.3f}" in loss
    assert f">held-out, {2.2151 - 0.8241 * 2.2151 / 0.8425:.3f}<" in gap


@pytest.mark.parametrize(("weights", "is_drawn"), [("these", True), ("others", False)])
def test_an_evaluation_of_other_weights_is_not_drawn(
    weights, is_drawn, trained_document, tmp_path, caplog
):
    trained_document["models"]["run/checkpoint-100"]["weights_sha256"] = "these"
    results = {"surprisal_histogram_bits": {"edges": [0, 1, 2], "counts": [3, 4]}}
    evaluation = {"config": {"weights_sha256": weights}, "results": results}
    (tmp_path / "evaluation_results.json").write_text(json.dumps(evaluation))
    assert ("Held-out text of" in page(trained_document)) == is_drawn
    assert not caplog.messages


@pytest.mark.parametrize("log", ["", '{"tokens": 9, "lo', "[1]", '{"tokens": 9}', None])
def test_a_damaged_log_or_evaluation_is_not_drawn(log, trained_document, tmp_path, caplog):
    (tmp_path / "evaluation_results.json").write_text('{"results": {"perplexity": {}}}')
    (tmp_path / "metrics.jsonl").unlink()
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    text = page(trained_document)
    assert "Training of" not in text
    assert "Held-out text of" not in text
    assert [line.split(" of ")[0] for line in caplog.messages] == ["Training", "Held-out text"]


def test_the_page_shows_the_held_out_scores_of_a_run(trained_document):
    text = page(trained_document)
    held_out = text[text.index("<h2>Held-out text") : text.index("<h2>Scores")]
    assert held_out.count("<tr>") == 2  # the header and this model
    assert "run/checkpoint-100</td>" in held_out
    for figure in (">2.215<", ">9.163<", ">0.8425<", ">0.8241<", ">600,000<"):
        assert figure in held_out

    # the entropy of the grammar and the number of words may be unknown
    training = trained_document["models"]["run/checkpoint-100"]["training"]
    training |= {"floor_bits_per_byte": None, "words_trained": None}
    text = page(trained_document)
    assert not re.search("0.8241|entropy|grammar", text + "".join(svg_pictures(text)))
    assert "Held-out text" not in page(make_document())


def test_the_page_shows_the_held_out_scores_of_each_domain(trained_document):
    assert "by domain" not in page(trained_document)  # of a text of one domain
    training = trained_document["models"]["run/checkpoint-100"]["training"]
    training["eval_by_domain"] = {
        EVIL: {"bits_per_byte": 1.23456},
        "wiki": {"bits_per_byte": None},  # no bytes
    }
    second = list(trained_document["models"].values())[1]
    second["training"] = {
        **training,
        "eval_by_domain": {"wiki": {"bits_per_byte": 2.5}, "talk": {"bits_per_byte": 3.5}},
    }
    text = page(trained_document)
    text = text[text.index("by domain</h3>") : text.index("<h2>Scores")]
    rows = re.findall(r"<tr><td>(.*)</td><td.*>(.*)</td><td.*>(.*)</td></tr>", text)
    assert rows[1:] == [("talk", "-", "3.5000"), ("wiki", "-", "2.5000")]
    assert rows[0][1:] == ("1.2346", "-")
    assert "&lt;script&gt;" in rows[0][0] and EVIL not in text


def test_the_page_lists_the_subsets_of_a_task():
    document = make_document()
    subset = {**make_result(0.9), "accuracy_ci95": [0.8, 0.95]}
    for name, results in document["results"].items():
        subsets = {f"kind {i}": subset for i in range(3)}
        subsets[EVIL] = make_result(0.1 if name == EVIL else 0.2)
        results["blimp"]["subsets"] = subsets
    text = page(document)
    assert "<summary>blimp: 4 subsets</summary>" in text
    assert "<details open>" in text  # 4 subsets x 3 models are few
    assert text.count("<td>kind 1</td>") == 3
    assert "0.800 to 0.950" in text
    assert EVIL not in text


def test_a_long_list_of_subsets_is_folded():
    document = make_document()
    for results in document["results"].values():
        results["blimp"]["subsets"] = {f"kind {i}": make_result(0.5) for i in range(33)}
    assert "<details><summary>blimp: 33 subsets" in page(document)


# ---- the files ----------------------------------------------------------------------------------


def test_page_and_chart_are_written_beside_the_json_file(tmp_path):
    document = make_document(("a", "b", "$\\frac{$"))  # matplotlib would read a formula
    written = report.write_files(document, tmp_path / "comparison.json")
    names = [path.name for path in written]
    assert names == ["comparison.json", "comparison.html", "comparison.png"]
    assert json.loads(written[0].read_text()) == document
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_a_perfect_score_can_be_drawn(tmp_path):
    document = make_document()
    for results in document["results"].values():
        results["blimp"] |= {"accuracy": 1.0, "accuracy_ci95": [0.9, 1.0]}
    assert len(report.write_files(document, tmp_path / "perfect.json")) == 3


def test_results_without_scores_have_no_chart(tmp_path):
    document = make_document()
    document["configs"] = {"speed": {"type": "speed"}}
    written = report.write_files(document, tmp_path / "speed.json")
    assert [path.suffix for path in written] == [".json", ".html"]
