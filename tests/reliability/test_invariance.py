"""A reported number does not depend on batch size, order or the number of processes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, sentences
from runs import in_child

from babyllama import distributed
from babyllama.evaluation.scoring import token_logprobs
from babyllama.training.held_out import evaluate_chunks

BATCH_SIZES = (1, 2, 7, 64)


def chunks(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": row} for row in rng.integers(3, 400, (n, 32)).astype(np.uint16)]


def relative_spread(values) -> float:
    """Return how far apart the values are, relative to the largest one."""
    values = np.array(values, dtype=np.float64)
    return float((values.max(0) - values.min(0)).max() / np.abs(values).max())


@pytest.mark.promise(10)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_a_held_out_loss_is_the_same_for_any_batch_size_and_order(kind, figures):
    model = build_tiny_model(kind)
    rows = chunks(33)
    losses = []
    for batch_size in BATCH_SIZES:
        for seed in (None, 1):
            order = range(33) if seed is None else np.random.default_rng(seed).permutation(33)
            ordered = [rows[i] for i in order]
            losses.append(evaluate_chunks(model, ordered, torch.arange(400), batch_size)["loss"])
    figures.count("settings tried", len(losses), len(losses))
    figures.worst("relative spread", relative_spread(losses))
    assert relative_spread(losses) <= 1e-6


@pytest.mark.promise(10)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ"])
def test_scores_and_decisions_are_the_same_for_any_batch_size_and_order(kind, tokenizer, figures):
    """Texts of many lengths are padded together; pairs of texts stand for items of a benchmark."""
    model = build_tiny_model(kind)
    texts = [" ".join(sentences(1 + i % 4, seed=i)) for i in range(60)]
    tables = []
    for batch_size in BATCH_SIZES:
        for seed in (None, 1):
            order = list(range(60)) if seed is None else np.random.default_rng(1).permutation(60)
            scores = token_logprobs(
                model, tokenizer, [texts[i] for i in order], batch_tokens=64 * batch_size
            )
            sums = np.empty(60)
            sums[order] = [score.logprobs.sum(dtype=np.float64) for score in scores]
            tables.append(sums)
    figures.worst("relative spread", relative_spread(tables))
    assert relative_spread(tables) <= 1e-6

    gaps = np.array(tables)[:, 0::2] - np.array(tables)[:, 1::2]  # (settings, pairs)
    decided = np.abs(gaps).max(0) > 1e-4
    same = (np.sign(gaps) == np.sign(gaps[0])).all(0) & decided
    figures.count("decisions the same", int(same.sum()), int(decided.sum()))
    assert decided.sum() > 20 and (same == decided).all()


def in_two_processes(act) -> None:
    """Call `act` in two forked processes of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> int:
        os.environ |= {
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        act()
        torch.distributed.destroy_process_group()
        return 0

    def both() -> int:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = member(1)
            finally:
                os._exit(code)
        code = member(0)
        return code or os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_child(both) == 0


@pytest.mark.promise(10)
def test_two_processes_report_the_loss_of_one(tmp_path: Path, figures):
    model = build_tiny_model("Llama")
    rows = chunks(33)
    lengths = torch.arange(400)
    losses = [evaluate_chunks(model, rows, lengths, 7)["loss"]]

    def act() -> None:
        for batch_size in BATCH_SIZES:
            scores = evaluate_chunks(model, rows, lengths, batch_size, across_ranks=True)
            name = f"{distributed.rank()}-{batch_size}.json"
            (tmp_path / name).write_text(json.dumps(scores))

    in_two_processes(act)
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(results) == 2 * len(BATCH_SIZES)
    assert {result["tokens"] for result in results} == {33 * 31}
    losses += [result["loss"] for result in results]
    figures.worst("relative spread, 1 and 2 processes", relative_spread(losses))
    assert relative_spread(losses) <= 1e-6
