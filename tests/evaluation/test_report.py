"""report.py: the differences, the tables, and a page that is self-contained, escaped and opens in a browser."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from babyllama.evaluation import report
from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.evaluation.report import (
    curves,
    gap_text,
    in_training_order,
    page,
    phenomenon_curves,
    places_of,
    short_names,
    table_rows,
    text_report,
)

EVIL = '<script>alert("x")</script>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1300,1500",
]  # fmt: skip


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
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = (
            [],
            [],
            {"script": "", "style": ""},
            None,
        )
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.inside = tag if tag in self.text else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.text[self.inside] += data


def test_places_of_predictions():
    """By the stem, as BabyLM's pipeline has it, unless two models would share a place."""
    paths = [
        "models/a",
        "models/a/chck_1M",
        "models/b.v1/",
        "models/b.v2",
        "x/c/chck_2M",
        "y/c/chck_2M",
    ]
    assert {path: str(place) for path, place in places_of(paths).items()} == {
        "models/a": "a/main", "models/a/chck_1M": "a/chck_1M", "models/b.v1/": "b.v1/main", "models/b.v2": "b.v2/main",
        "x/c/chck_2M": "x_c/chck_2M", "y/c/chck_2M": "y_c/chck_2M",
    }  # fmt: skip
    assert [str(place) for place in places_of(["models/b.v1"]).values()] == ["b/main"]


def test_short_names():
    assert short_names(["models/A", "models/B/"]) == ["A", "B"]
    assert short_names(["x/a/final", "x/b/final", "c"]) == ["a/final", "b/final", "c"]
    assert short_names(["a/z", "b/a/z"]) != short_names(["b/a/z"]) == ["z"]
    assert len(set(short_names(["a/z", "b/a/z"]))) == 2
    with pytest.raises(ValueError, match="stands twice"):
        short_names(["models/A", "models/../models/A"])


def test_differences_of_groups_equal_a_direct_bootstrap():
    declared = load_tasks({"tasks": {"repetition": {"prompts": ["a", "b", "c", "d"]}}})
    own, other = np.array([0.4, 0.2, 0.9, 0.1]), np.array([0.1, 0.2, 0.3, 0.0])
    found = report.differences(declared, {"repetition": own}, {"repetition": other}, 0)[
        "repetition"
    ]
    rng = np.random.default_rng(7)
    draws = np.array([rng.choice(own - other, 4).mean() for _ in range(20000)])
    draws = 0.25 + (draws - 0.25) * math.sqrt(
        4 / 3
    )  # a mean of four varies so much less when it is drawn from itself
    assert found["difference"] == pytest.approx(0.25)
    assert found["difference_ci95"] == pytest.approx(
        np.percentile(draws, [2.5, 97.5]).tolist(), abs=0.02
    )


def test_table_says_what_is_noise():
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
    assert report.baseline("unigram", {"score": 0.7, "difference": -0.2, "noise": False}) == (
        "unigram 0.700 >", False,
    )  # fmt: skip
    assert len({len(row) for row in table_rows(document())}) == 1
    tiny = {"difference": -1e-9, "difference_ci95": [-0.1, 0.1], "noise": True}
    assert gap_text(tiny) == "+0.000 [-0.100, +0.100] ~"


def test_a_second_figure_has_rows_of_its_own():
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
        row["chance"] is None and row["difference"] is None and row["baselines"] == []
        for row in rows
    )


def test_learning_curve_by_hand():
    (curve,) = curves(document())
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
    assert curves(document(("a", "b", "c"))) == []
    (words,) = curves(document(("run/chck_1M", "run/chck_10M", "run/other")))
    assert words["unit"] == "million words seen"


def test_checkpoints_in_the_order_of_training():
    """As a shell lists them, with other models between; each run's own places are kept."""
    shell = [
        "x/chck_100M",
        "other",
        "x/chck_10M",
        "y/checkpoint-9",
        "x/chck_1M/",
        "x/chck_20M",
        "y/checkpoint-10",
        "x/chck_2M",
    ]
    assert in_training_order(shell) == [
        "x/chck_1M/", "other", "x/chck_2M", "y/checkpoint-9", "x/chck_10M", "x/chck_20M", "y/checkpoint-10", "x/chck_100M"
    ]  # fmt: skip
    assert in_training_order(["b", "a"]) == ["b", "a"]


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


def test_the_learning_curve_of_each_phenomenon_by_hand(tmp_path):
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


def test_phenomena_come_from_the_rows(tmp_path):
    pair = {"sentence_good": "a", "sentence_bad": "b"}
    rows = [
        pair | {"UID": "x", "linguistics_term": "binding"},
        pair | {"UID": "y", "linguistics_term": "agreement"},
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*rows, pair])))
    (task,) = load_tasks({"tasks": {"blimp": {"path": str(tmp_path)}}}).values()
    assert task.describe()["phenomena"] == {"x": "binding", "y": "agreement"}


def test_words_seen_are_drawn_on_a_log_axis():
    (curve,) = curves(milestones(1, 10, 100))
    first, middle, last = (x for x, *_ in curve["lines"][0]["points"])
    assert middle - first == pytest.approx(last - middle) and [at for _, at in curve["ticks"]] == [
        1,
        10,
        100,
    ]


def test_a_curve_can_begin_before_the_first_word():
    for first in ("chck_0M", "chck_01M"):  # no logarithm, and two checkpoints at one place
        (curve,) = curves(document((f"run/{first}", "run/chck_1M", "other")))
        places = [x for x, *_ in curve["lines"][0]["points"]]
        assert all(np.isfinite(places)) and places == sorted(places)


def test_page_is_self_contained_and_escaped():
    text = page(document())
    reader = Reader(text)
    assert (
        reader.tags.count("script") == 1 and "img" not in reader.tags and "link" not in reader.tags
    )
    assert not [
        a
        for a in reader.attributes
        if a[1] in ("src", "href", "srcset", "action", "style") or a[1].startswith("on")
    ]
    assert (
        "&lt;script&gt;" in text and EVIL not in text and "\x00" not in text and "\x1b" not in text
    )
    (policy,) = [
        a[2]
        for a in reader.attributes
        if a[0] == "meta" and a[1] == "content" and "default-src" in a[2]
    ]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for kind in ("script", "style"):
        assert report.digest(reader.text[kind]) in policy
    assert "prefers-color-scheme: dark" in text
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


def test_what_a_run_left_stands_on_the_page(tmp_path):
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


def test_a_file_of_an_earlier_release_is_drawn(tmp_path):
    made = document()
    for results, facts in zip(made["results"].values(), made["models"].values(), strict=True):
        del results["overall_score_ci95"], facts["training"]
    assert "= mean of blimp 0.250" in text_report(made) and "Held-out text" not in page(made)


def test_subsets_stand_below_the_task():
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


def test_the_files_beside_the_json(tmp_path):
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


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_opens_in_a_browser_and_sorts(tmp_path):
    html = tmp_path / "benchmark.html"
    made = document()
    with_a_run(made, tmp_path)
    html.write_text(page(made), encoding="utf-8")
    flags = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    picture = tmp_path / "page.png"
    shot = subprocess.run(
        [*flags, f"--screenshot={picture}", html.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000, (
        shot.stderr
    )
    assert (
        "Refused to" not in shot.stderr
        and "violates the following Content Security Policy" not in shot.stderr
    )
    # The policy forbids a click from a second script: take it away in a copy, click twice on `overall score`.
    copy = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html.read_text(encoding="utf-8")
    )
    click = "<script>const b = document.querySelectorAll('th button')[1]; b.click(); CLICKS</script></body>"
    for clicks, expected in (
        ("", ["0.100", "0.200", "0.300"]),
        ("b.click();", ["0.300", "0.200", "0.100"]),
    ):
        html.write_text(copy.replace("</body>", click.replace("CLICKS", clicks)), encoding="utf-8")
        dom = subprocess.run(
            [*flags, "--dump-dom", html.as_uri()], capture_output=True, text=True, timeout=120
        ).stdout
        table = dom[dom.index("<h2>Models") : dom.index("<h2>Held-out")]
        assert re.findall(r'<td class="num"[^>]*>(0\.\d00)</td>', table) == expected
