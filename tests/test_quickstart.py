"""The quick start: what `make quickstart` runs and when, and a benchmark whose answers are the grammar's own."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

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

# Stands for Python, so that what make decides can be seen: it notes each call, leaves the files that make looks at, and
# fails where a file of the name `fail` lies.
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
    """The Makefile, what its rules look at, and the stand-in."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for name in ("Makefile", "requirements.txt", "babyllama/evaluation/report.html.j2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return tmp_path


def quickstart(folder, changed="", status=0) -> tuple[list[str], list[str]]:
    """(lines of output, scripts called) of one `make quickstart`, a minute after the last; `changed` is a file."""
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
def test_what_make_does_again(folder):
    first, called = quickstart(folder)
    assert called == SCRIPTS
    assert REPORT in first[0] and (folder / REPORT).is_file()
    again, called = quickstart(folder)
    assert called == SCRIPTS[:3]  # train.py finds the run finished; what was measured stands
    assert again[0] == first[0]
    for name in ("models/quickstart/model.safetensors", "config/benchmark-quickstart.yaml", "config/benchmark.yaml",
                 "requirements.txt", "stand_in.py", "babyllama/evaluation/report.html.j2"):  # fmt: skip
        assert quickstart(folder, name)[1] == SCRIPTS, name
    assert quickstart(folder)[1] == SCRIPTS[:3]
    (folder / "fail").touch()
    quickstart(folder, "stand_in.py", status=2)
    assert not (folder / REPORT).exists()  # else the next one would take it for finished
    (folder / "fail").unlink()
    assert quickstart(folder)[1] == SCRIPTS


def derivations(grammar, words: list[str]) -> set[tuple[str, ...]]:
    """Every stack of symbols that can stand before the next word, once a sentence began with these words."""

    def opened(stacks) -> set[tuple[str, ...]]:  # the first symbol of each expanded down to a word
        found, queue = set(), list(stacks)
        while queue:
            top, *rest = queue.pop() or ("",)
            if top in grammar.rules:
                queue += [(*right, *rest) for _, right in grammar.rules[top]]
            else:
                found.add((top, *rest))
        return found

    stacks = opened({("SENTENCE",)})
    for word in words:
        stacks = opened({stack[1:] for stack in stacks if stack[0] == word})
    return stacks


@pytest.fixture(scope="module")
def grammar():
    return build_grammar("medium")


def as_written(grammar, text: str) -> list[str]:
    """The grammar's words of the beginning of a sentence: commas apart, no capital unless the word is a name."""
    first, *rest = text.replace(",", " ,").split()
    names = {word for _, right in grammar.rules["NAME"] for word in right}
    return [first if first in names else first.lower(), *rest]


def test_derivations_know_what_the_grammar_says(grammar):
    for seed in range(20):
        sentence = sample_document(grammar, random.Random(seed)).text.split("\n")[0].rstrip(".")
        stacks = derivations(grammar, as_written(grammar, sentence))
        assert ("",) in stacks, sentence  # it may end here
    assert not derivations(grammar, ["the", "dog", "sleep"])


def test_the_answer_is_what_the_grammar_allows(grammar):
    items = load_tasks({"tasks": {"continuation": TASKS["continuation"]}})["continuation"].items
    assert len(items) >= 20
    for item in items:
        allowed = {
            stack[0] for stack in derivations(grammar, as_written(grammar, item.prefixes[0]))
        }
        answer, *wrong = (completion.strip() for completion in item.completions)
        assert (
            item.gold == 0 and answer in allowed and not allowed & set(wrong) and len(wrong) == 3
        ), item


def test_paraphrases_are_the_same_to_the_grammar_and_the_control_is_not(grammar):
    for group in TASKS["consistency"]["groups"]:
        states = [derivations(grammar, as_written(grammar, prompt)) for prompt in group["prompts"]]
        assert states[0] and all(state == states[0] for state in states), group
        control = derivations(grammar, as_written(grammar, group["control"]))
        assert control and {stack[0] for stack in control} != {stack[0] for stack in states[0]}, (
            group
        )
    for prompt in TASKS["repetition"]["prompts"]:
        assert derivations(grammar, as_written(grammar, prompt)), prompt


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
    assert all(f"<td>{kind}</td>" in page for kind in agreement["subsets"])
    assert "report.html" in capsys.readouterr().out
