"""Run our models in the tools of others; a test is skipped if its tool is not installed.

`pip install -r requirements-dev.txt` installs all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT, build_tiny_model

from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.evaluation.generation import generate
from babyllama.evaluation.loading import load_model
from babyllama.evaluation.scoring import token_logprobs
from babyllama.evaluation.word_surprisal import word_surprisal
from benchmark import BenchmarkSuite

GUIDE = (ROOT / "docs" / "other_tools.md").read_text(encoding="utf-8")


def block_of(section: str, language: str) -> str:
    """Return the code block of a section of docs/other_tools.md."""
    text = GUIDE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


def run(workshop, *command: str) -> str:
    """Run Python offline in the folder of a quick start, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=workshop,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_transformers_generates_with_the_snippet(workshop):
    assert run(workshop, "-c", block_of("transformers", "python")).startswith("The cat")


def test_transformers_serves_the_greedy_text(workshop):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"

    def post(path: str, request: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        return json.load(urlopen(Request(url + path, json.dumps(request).encode(), headers)))

    command = f"-m transformers.cli.transformers serve models/quickstart --device cpu --port {port}"
    server = subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=workshop,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(3000):
            with contextlib.suppress(URLError):
                urlopen(f"{url}/health")
                break
            assert server.poll() is None
            time.sleep(0.2)
        request = json.loads(block_of("transformers", "json"))
        answer = post("/v1/completions", request)
        chat = {"model": request["model"], "messages": [{"role": "user", "content": "The cat"}]}
        with pytest.raises(HTTPError):
            post("/v1/chat/completions", chat)
    finally:
        server.terminate()
        server.wait()
    model, tokenizer = load_model(workshop / "models" / "quickstart", "cpu")
    prompts = [request["prompt"]]
    ((expected,),) = generate(
        model, tokenizer, prompts, max_new_tokens=request["max_tokens"], temperature=0
    )
    assert answer["choices"][0]["text"] == expected


# ---- llama.cpp ----------------------------------------------------------------------------------


@pytest.fixture
def export_gguf(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("export_gguf")


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("vocab_size", [400, 410])  # 410 has rows that no token uses
def test_llama_cpp_writes_the_same_greedy_texts(
    kind, vocab_size, export_gguf, tokenizer, tmp_path, capsys
):
    xllamacpp = pytest.importorskip("xllamacpp")
    model = build_tiny_model(kind, vocab_size)
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    file = tmp_path / "model.gguf"
    assert export_gguf.main([str(tmp_path / kind), str(file)]) == 0
    assert f"{file}: " in capsys.readouterr().out

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 64
    params.verbosity = 0
    server = xllamacpp.Server(params)
    for prompt in ("The cat sees", "Ünï 7\n\nA 😀 girl's"):
        request = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
        text = server.handle_completions(request)["choices"][0]["text"]
        ((expected,),) = generate(model, tokenizer, [prompt], max_new_tokens=20, temperature=0)
        assert text == expected


def test_a_model_that_llama_cpp_cannot_read_is_a_one_line_error(
    export_gguf, model_dirs, tmp_path, capsys
):
    file = tmp_path / "model.gguf"
    assert export_gguf.main([str(model_dirs["GPTJ"]), str(file)]) == 2
    assert "no export for GPTJForCausalLM" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    file.write_text("mine")
    assert export_gguf.main([str(model_dirs["Llama"]), str(file)]) == 2
    assert file.read_text() == "mine"


# ---- lm-evaluation-harness and minicons ---------------------------------------------------------


def test_the_harness_finds_the_accuracy_of_benchmark_py(workshop, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    task = block_of("lm-evaluation-harness", "yaml")
    rows = (workshop / "data/synthetic/minimal_pairs.jsonl").read_text().splitlines(True)[:60]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    task = task.replace("data/synthetic/minimal_pairs.jsonl", str(tmp_path / "pairs.jsonl"))
    (tmp_path / "tasks" / "pairs.yaml").write_text(task)
    command = re.search(r"`lm_eval (.*?)`", GUIDE, re.S)[1].split()
    command[command.index("--include_path") + 1] = str(tmp_path / "tasks")
    run(workshop, "-m", "lm_eval", *command, "--output_path", str(tmp_path / "out.json"))
    (output,) = tmp_path.rglob("out_*.json")
    harness = json.loads(output.read_text())["results"]["pairs"]["acc,none"]

    declared = {"type": "minimal_pairs", "path": str(tmp_path / "pairs.jsonl")}
    tasks = load_tasks({"tasks": {"pairs": declared}})
    suite = BenchmarkSuite(workshop / "models" / "quickstart", "cpu", tasks)
    ours = suite.run_task("pairs")
    assert ours["ties"] == 0
    assert harness == pytest.approx(ours["accuracy"])


def test_minicons_finds_the_scores_of_evaluate_py(workshop):
    scorer = pytest.importorskip("minicons.scorer")
    output = run(workshop, "-c", block_of("minicons", "python"))
    scores = json.loads(output.splitlines()[-1])
    model, tokenizer = load_model(workshop / "models" / "quickstart", "cpu")
    texts = ["The cat sees the dog.", "The dog sees cat the."]
    ours = [text.logprobs.sum() for text in token_logprobs(model, tokenizer, texts)]
    assert scores == pytest.approx(ours, abs=1e-4)

    # bits per word; its correction moves the space only, ours all that can end a word
    minicons = scorer.IncrementalLMScorer(str(workshop / "models" / "quickstart"), "cpu")
    theirs = minicons.word_score_tokenized(texts, str.split, surprisal=True, base_two=True)
    rows = word_surprisal(model, tokenizer, texts)
    pairs = [pair for words in theirs for pair in words]
    assert [row["word"] for row in rows] == [word for word, _ in pairs]
    bits = [row["uncorrected_bits"] for row in rows]
    assert bits == pytest.approx([float(bits) for _, bits in pairs], abs=1e-4)
