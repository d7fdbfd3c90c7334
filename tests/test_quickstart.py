"""The quick start: which commands `make` runs, and a benchmark whose answers follow the grammar."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, html_errors, svg_pictures
from safetensors.torch import load_file

import benchmark
from babyllama.config import read_yaml_file
from babyllama.evaluation.benchmark_config import load_tasks
from create_synthetic_data import build_grammar, sample_document

TASKS = read_yaml_file(ROOT / "config" / "benchmark-quickstart.yaml")["tasks"]
REPORT = "models/quickstart/report.html"
SCRIPTS = [
    "create_synthetic_data.py",
    "train_tokenizer.py",
    "train.py",
    "evaluate.py",
    "benchmark.py",
]

# Replaces Python to show what make decides: records each call, creates the files that make checks,
# and fails if there is a file named `fail`.
STAND_IN = """
import sys
from pathlib import Path
run = Path("models/quickstart")
with open("calls", "a") as calls:
    print(sys.argv[1], file=calls)
run.mkdir(parents=True, exist_ok=True)
if sys.argv[1] == "train.py" and not (run / "model.safetensors").exists():
    (run / "model.safetensors").write_text("weights")
    (run / "training_metrics.json").write_text("{}")
if sys.argv[1] == "benchmark.py":
    Path(sys.argv[sys.argv.index("--output") + 1]).with_suffix(".html").write_text("page")
    sys.exit(2 if Path("fail").exists() else 0)
"""


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the Makefile, the files in its rules, and the stand-in for Python."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for name in ("Makefile", "requirements.txt", "babyllama/evaluation/report.html.j2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return tmp_path


def quickstart(folder, changed="", status=0) -> tuple[list[str], list[str]]:
    """Run `make quickstart` a minute after the last time, with one file changed since then.

    Return its lines of output and the scripts it called.
    """
    for path in (path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    if changed:
        (folder / changed).touch()
    (folder / "calls").unlink(missing_ok=True)
    command = [
        "make",
        "-o",
        ".venv/.installed",
        f"PY={shlex.join([sys.executable, 'stand_in.py'])}",
        "quickstart",
    ]
    alone = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=alone
    )  # even below `make test`
    assert done.returncode == status, done.stderr
    return done.stdout.splitlines(), (folder / "calls").read_text().split()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_measures_again_only_if_something_changed(folder):
    first, called = quickstart(folder)
    assert called == SCRIPTS
    assert REPORT in first[0] and (folder / REPORT).is_file()
    again, called = quickstart(folder)
    assert called == SCRIPTS[:3]  # train.py shows the finished run
    assert again[0] == first[0]
    for name in ("models/quickstart/model.safetensors", "config/benchmark-quickstart.yaml", "config/benchmark.yaml",
                 "requirements.txt", "stand_in.py", "babyllama/evaluation/report.html.j2"):  # fmt: skip
        assert quickstart(folder, name)[1] == SCRIPTS, name
    assert quickstart(folder)[1] == SCRIPTS[:3]
    (folder / "fail").touch()
    quickstart(folder, "stand_in.py", status=2)
    assert not (folder / REPORT).exists()  # it would look finished
    (folder / "fail").unlink()
    assert quickstart(folder)[1] == SCRIPTS


def derivations(grammar, words: list[str]) -> set[tuple[str, ...]]:
    """Return every stack of symbols that may follow these first words of a sentence."""

    def expand(stacks) -> set[tuple[str, ...]]:
        """Replace the first symbol of each stack until it is a word."""
        expanded = set()
        queue = list(stacks)
        while queue:
            first, *rest = queue.pop() or ("",)
            if first in grammar.rules:
                queue += [(*right, *rest) for _, right in grammar.rules[first]]
            else:
                expanded.add((first, *rest))
        return expanded

    stacks = expand({("SENTENCE",)})
    for word in words:
        stacks = expand({stack[1:] for stack in stacks if stack[0] == word})
    return stacks


@pytest.fixture(scope="module")
def grammar():
    return build_grammar("medium")


def grammar_words(grammar, text: str) -> list[str]:
    """Split the start of a sentence into the grammar's words: lowercase except names, commas apart."""
    first, *rest = text.replace(",", " ,").split()
    names = {word for _, right in grammar.rules["NAME"] for word in right}
    return [first if first in names else first.lower(), *rest]


def test_derivations_accept_what_the_grammar_generates(grammar):
    for seed in range(20):
        text, _ = sample_document(grammar, random.Random(seed))
        sentence = text.split("\n")[0].rstrip(".")
        stacks = derivations(grammar, grammar_words(grammar, sentence))
        assert ("",) in stacks, sentence  # the sentence may end
    assert not derivations(grammar, ["the", "dog", "sleep"])


def test_only_the_correct_answer_follows_the_grammar(grammar):
    items = load_tasks({"tasks": {"continuation": TASKS["continuation"]}})["continuation"].items
    assert len(items) >= 20
    for item in items:
        allowed = {
            stack[0] for stack in derivations(grammar, grammar_words(grammar, item.prefixes[0]))
        }
        answer, *wrong = (completion.strip() for completion in item.completions)
        assert (
            item.gold == 0 and answer in allowed and not allowed & set(wrong) and len(wrong) == 3
        ), item


def test_paraphrases_have_the_same_continuations_and_the_control_has_others(grammar):
    for group in TASKS["consistency"]["groups"]:
        states = [
            derivations(grammar, grammar_words(grammar, prompt)) for prompt in group["prompts"]
        ]
        assert states[0] and all(state == states[0] for state in states), group
        control = derivations(grammar, grammar_words(grammar, group["control"]))
        assert control and {stack[0] for stack in control} != {stack[0] for stack in states[0]}, (
            group
        )
    for prompt in TASKS["repetition"]["prompts"]:
        assert derivations(grammar, grammar_words(grammar, prompt)), prompt


def test_the_report_of_a_small_quick_start(workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    recipe = (ROOT / "Makefile").read_text().split("benchmark.py ", 1)[1].splitlines()[0]
    arguments = shlex.split(recipe.replace("$(RUN)", "models/quickstart"))
    assert benchmark.main([*arguments, "--device", "cpu"]) == 0
    document = json.loads((workshop / "models/quickstart/report.json").read_text())
    agreement = document["results"]["quickstart"]["agreement"]
    assert agreement["n"] == 2000 and len(agreement["subsets"]) == 10
    assert set(agreement["baselines"]) == {
        "random",
        "shorter",
        "unigram",
    }  # the run knows its training text
    page = (workshop / REPORT).read_text()
    run_dir = workshop / "models/quickstart"
    assert all(f"<td>{kind}</td>" in page for kind in agreement["subsets"])

    # what was trained and asked, and how close the loss came to the entropy
    words = len((workshop / "data/synthetic/train/synthetic.train").read_text().split())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    weights = load_file(run_dir / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in weights.values())
    assert (
        f"<p>quickstart is a Llama model with {parameters:,} parameters, trained from scratch in "
        f"{rows[-1]['step']} steps. It read {words:,} words once: sentences of a grammar whose "
        "entropy is known.</p>"
    ) in page
    assert "<b>agreement</b>: Which of two sentences that differ in a word or two is right?" in page
    floor = json.loads((workshop / "data/synthetic/grammar.json").read_text())["floor"]
    assert f"{floor['bits_per_byte']:.4f}" in page
    (loss, gap, *_) = svg_pictures(page)
    assert "entropy of the grammar" in loss and "above the entropy" in gap
    assert not html_errors(page)
    assert "report.html" in capsys.readouterr().out
