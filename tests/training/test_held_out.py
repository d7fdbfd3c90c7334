"""Check held-out scores by domain against a loop over tokens."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, sentences
from transformers import AutoModelForCausalLM

import train
from babyllama.data.tokenizer import byte_lengths
from babyllama.runs.finished_run import scores_of
from babyllama.training.held_out import TokenDomains, choose_chunks, evaluate_chunks
from babyllama.training.results import MAX_DOMAINS, domain_lines, model_card
from data_utils import DataProcessor

FILES = {  # name -> its domain; the shards of one domain are not next to each other
    "books-1-of-2.dev": "books",
    "letters.dev": "letters",
    "wiki.dev": "wiki",
    "z/books-2-of-2.dev": "books",
}
LENGTH = 32


@pytest.fixture
def dev(tmp_path) -> Path:
    """Return a folder with held-out text of three domains; books has two files."""
    folder = tmp_path / "held-out"
    folder.mkdir()
    for number, name in enumerate(FILES):
        documents = ["\n".join(sentences(4 + number, seed=10 * number + i)) for i in range(5)]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n\n\n".join(documents) + "\n")
    return folder


def naive_tokens(folder: Path, tokenizer) -> list[tuple[int, str]]:
    """Return the id and the domain of each token of the text."""
    tokens = []
    for name, domain in FILES.items():
        for document in (folder / name).read_text().rstrip("\n").split("\n\n\n"):
            ids = tokenizer.encode(document, add_special_tokens=False)
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            tokens += [(id_, domain) for id_ in ids]
    return tokens


def naive_scores(model, folder: Path, tokenizer, rows) -> dict[str, list[float]]:
    """Return nats, tokens and bytes of each domain in these chunks, one token at a time.

    The rows are token ids only; their domains come from the same chunk of the tokenized files.
    """
    tokens = naive_tokens(folder, tokenizer)
    chunks = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]
    by_ids = {tuple(id_ for id_, _ in chunk): chunk for chunk in chunks}
    assert len(by_ids) == len(chunks), "a text without equal chunks"
    model = model.double()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    sums: dict[str, list[float]] = {}
    for row in rows:
        chunk = by_ids[tuple(row["input_ids"].tolist())]
        ids = torch.tensor([id_ for id_, _ in chunk])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        for i in range(1, LENGTH):
            id_, domain = chunk[i]
            domain_sums = sums.setdefault(domain, [0.0, 0, 0])
            domain_sums[0] -= torch.log_softmax(logits[i - 1], -1)[id_].item()
            domain_sums[1] += 1
            domain_sums[2] += 0 if id_ in special else len(tokenizer.decode([id_]).encode())
    model.float()
    return sums


def check_against_naive(by_domain: dict, expected: dict[str, list[float]]) -> None:
    assert list(by_domain) == sorted(expected) == ["books", "letters", "wiki"]
    for name, (nats, tokens, n_bytes) in expected.items():
        scores = by_domain[name]
        assert (scores["tokens"], scores["bytes"]) == (tokens, n_bytes)
        assert scores["loss"] == pytest.approx(nats / tokens, rel=1e-6)
        assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def check_sums(total: dict, by_domain: dict) -> None:
    """The domains' means, weighted, are the mean of all."""
    for key, weight in (("loss", "tokens"), ("bits_per_byte", "bytes")):
        assert total[weight] == sum(scores[weight] for scores in by_domain.values())
        mean = sum(scores[key] * scores[weight] for scores in by_domain.values()) / total[weight]
        assert total[key] == pytest.approx(mean, rel=1e-12)


def prepare(folder: Path, corpus_dir: Path, tokenizer, samples: int):
    """Return the chosen chunks, and their domains."""
    section = {
        "train_path": str(corpus_dir / "train"),
        "eval_path": str(folder),
        "seq_length": LENGTH,
        "eval_samples": samples,
    }
    processor = DataProcessor(tokenizer)
    _, rows = train.prepare_datasets_modern({"data": section}, tokenizer, processor)
    report = processor.reports["validation"]
    chosen = choose_chunks(report["chunks"], samples)
    return rows, TokenDomains(report["sources"], chosen, LENGTH)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_by_domain_equal_a_loop_over_tokens(
    batch_size, dev, corpus_dir, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    rows, domains = prepare(dev, corpus_dir, tokenizer, samples=17)
    assert len(rows) == 17
    lengths = torch.as_tensor(byte_lengths(tokenizer))
    scores = evaluate_chunks(build_tiny_model("Llama"), rows, lengths, batch_size, domains=domains)
    by_domain = scores.pop("by_domain")
    check_against_naive(by_domain, naive_scores(build_tiny_model("Llama"), dev, tokenizer, rows))
    check_sums(scores, by_domain)
    assert scores == evaluate_chunks(build_tiny_model("Llama"), rows, lengths, batch_size)


def test_a_text_of_one_domain_has_no_scores_by_domain(
    dev, corpus_dir, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    rows, domains = prepare(dev / "wiki.dev", corpus_dir, tokenizer, samples=8)
    lengths = torch.as_tensor(byte_lengths(tokenizer))
    scores = evaluate_chunks(build_tiny_model("Llama"), rows, lengths, 8, domains=domains)
    assert "by_domain" not in scores


def test_a_domain_without_bytes_has_no_bits_per_byte():
    """Its only predicted token in these chunks is a </s>."""
    sources = [{"domain": "a", "tokens": 7}, {"domain": "b", "tokens": 9}]
    rows = [{"input_ids": np.array([1, 5, 5, 5, 5, 5, 2, 2])}]
    lengths = torch.arange(400).clamp(max=3)
    lengths[2] = 0
    domains = TokenDomains(sources, np.array([0]), 8)
    scores = evaluate_chunks(build_tiny_model("GPT2"), rows, lengths, 8, domains=domains)
    assert scores["by_domain"]["b"]["bits_per_byte"] is None
    assert scores["by_domain"]["b"]["tokens"] == 1
    assert scores["by_domain"]["a"]["bytes"] == scores["bytes"] == 15
    assert domain_lines({"eval_by_domain": scores["by_domain"]})[1].split() == [
        "b",
        "-",
        "(0",
        "bytes)",
    ]


def test_a_run_reports_its_domains(dev, config_file, tokenizer, tmp_path, capsys):
    path = config_file(data__eval_path=str(dev), training__max_steps=2)
    assert train.main(["--config", str(path)]) == 0
    run_dir = tmp_path / "models" / "tiny"
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    results = metrics["results"]
    by_domain = results["eval_by_domain"]
    assert scores_of(metrics)["eval_by_domain"] == by_domain  # for the page of benchmark.py
    _, rows = train.prepare_datasets_modern(metrics["config"], tokenizer)
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    check_against_naive(by_domain, naive_scores(model, dev, tokenizer, rows))
    check_sums({key.removeprefix("eval_"): value for key, value in results.items()}, by_domain)

    out = capsys.readouterr().out
    card = (run_dir / "README.md").read_text()
    for name, scores in by_domain.items():
        bits = f"{scores['bits_per_byte']:.4f}"
        assert f"  {name:<15} {bits} ({scores['bytes']:,} bytes)" in out
        held_out = f"{bits} | {scores['loss']:.4f} | {scores['bytes']:,}"
        assert f"| {name} | 0 | {held_out} |\n" in card  # none of the training text

    # a long list is cut
    metrics["results"]["eval_by_domain"] = {f"d{i}": by_domain["wiki"] for i in range(30)}
    assert len(domain_lines(metrics["results"])) == MAX_DOMAINS + 1
    assert model_card(metrics).count("| d") == MAX_DOMAINS + 1  # and the head of the table


def test_a_run_on_one_domain_has_no_table(finished):
    _, run_dir = finished
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    assert "eval_by_domain" not in metrics["results"]
    assert "| domain |" not in (run_dir / "README.md").read_text()
    assert not domain_lines(metrics["results"])
