"""Interrupted runs end like uninterrupted ones, and every epoch trains on every chunk once."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections import Counter

import pytest
from conftest import added_callback, errors_of, rows_of
from runs import (
    AUTO,
    CopyAt,
    Stop,
    differences,
    final_state,
    in_child,
    ledger_of,
    read_ledger,
    run,
    unfinish,
)
from transformers import TrainerCallback

from babyllama.runs.checkpoints import checkpoint_step, checkpoints
from babyllama.runs.resume import CHANGEABLE
from babyllama.runs.run_dir import DATA_REPORT_FILE, METRICS_FILE
from babyllama.training.trainer import LMTrainer

# ---- each chunk once an epoch -------------------------------------------------------------------


def check_ledger(path, epochs: int) -> tuple[int, int]:
    """Return how many epochs, of those in the ledger, gave every chunk exactly once."""
    chunks = [chunk for _, chunk in read_ledger(path)]
    n, rest = divmod(len(chunks), epochs)
    assert rest == 0
    complete = 0
    for epoch in range(epochs):
        times = Counter(chunks[epoch * n : (epoch + 1) * n])
        complete += len(times) == n and set(times) == set(chunks)
    return complete, epochs


CHANGES = [  # (save and stop at this step, the flags of the next part)
    (3, ["--batch-size", "5", "--gradient-accumulation-steps", "2"]),
    (7, ["--lr", "1e-3", "--set", "training.lr_scheduler=wsd"]),
    (14, ["--gradient-accumulation-steps", "4"]),
]
ALLOW = [word for key in CHANGEABLE for word in ("--allow-change", key)]


@pytest.mark.promise(4)
def test_a_run_whose_settings_change_sees_each_chunk_once(config_file, tmp_path, figures):
    path = config_file(training__save_steps=1, training__logging_steps=1)
    run_dir = tmp_path / "models" / "tiny"
    flags = []
    for step, next_flags in CHANGES:
        with ledger_of(tmp_path / "ledger"), added_callback(Stop(step)):
            assert run(path, *flags, *AUTO, *ALLOW) == 130
        flags += next_flags
    with ledger_of(tmp_path / "ledger"):
        assert run(path, *flags, *AUTO, *ALLOW) == 0

    complete, epochs = check_ledger(tmp_path / "ledger", epochs=2)
    figures.count("epochs with each chunk once", complete, epochs)
    assert complete == epochs
    given = Counter(step for step, _ in read_ledger(tmp_path / "ledger"))
    assert [given[step] for step in (3, 4, 14, 15, 16)] == [24, 10, 10, 4, 20]

    # what the run says about itself
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    results = metrics["results"]
    n_chunks = sum(given.values()) // 2
    assert results["tokens_trained"] == metrics["plan"]["tokens"] == 2 * n_chunks * 32
    assert results["steps"] == metrics["plan"]["steps"] == len(given)
    rows = rows_of(run_dir)
    trained = dict(itertools.accumulate(sorted(given.items()), lambda a, b: (b[0], a[1] + b[1])))
    assert all(row["tokens"] == 32 * trained[row["step"]] for row in rows)
    for row in rows:
        assert row["epoch"] == pytest.approx(trained[row["step"]] / n_chunks, abs=1e-4)
    assert {row["step"]: row["changes"] for row in rows if "changes" in row} == {
        4: {"training.batch_size": [8, 5], "training.gradient_accumulation_steps": [3, 2]},
        8: {"training.lr": [3e-3, 1e-3], "training.lr_scheduler": ["cosine", "wsd"]},
        15: {"training.gradient_accumulation_steps": [2, 4]},
    }
    assert next(row for row in rows if row["step"] == 8)["learning_rate"] == pytest.approx(1e-3)
    history = json.loads((run_dir / DATA_REPORT_FILE).read_text())["history"]
    assert [part["step"] for part in history] == [0, 3, 7, 14]
    assert "From step 14 on: `training.gradient_accumulation_steps` 4 (before: 2)." in (
        run_dir / "README.md"
    ).read_text().replace("\n", " ")


@pytest.mark.promise(4)
def test_a_resume_before_a_change_forgets_it(config_file, tmp_path):
    """The steps after the checkpoint are trained again, with the settings of the resume."""
    path = config_file(training__save_steps=2)
    run_dir = tmp_path / "models" / "tiny"
    change = ["--batch-size", "4", "--allow-change", "training.batch_size", *AUTO]
    with ledger_of(tmp_path / "ledger"), added_callback(Stop(4)):
        assert run(path) == 130
    with ledger_of(tmp_path / "ledger"), added_callback(Stop(6)):
        assert run(path, *change) == 130
    shutil.rmtree(run_dir / "checkpoint-6")
    with ledger_of(tmp_path / "ledger"):
        assert run(path, *change[2:]) == 0
    assert "history" not in json.loads((run_dir / DATA_REPORT_FILE).read_text())
    assert check_ledger(tmp_path / "ledger", epochs=2) == (2, 2)
    state = final_state(run_dir)
    assert run(path, "--overwrite") == 0
    assert not differences(run_dir, state)


@pytest.mark.promise(4)
def test_a_change_that_is_not_allowed_is_refused_with_the_difference(finished_copy, capsys):
    config_path, run_dir = finished_copy
    unfinish(run_dir)
    batch = ["--batch-size", "4"]
    assert run(config_path, *batch, *AUTO) == 2
    (line,) = errors_of(capsys)
    assert "training.batch_size: was 8, is 4" in line
    assert "add --allow-change training.batch_size to continue with the new ones" in line

    # the seed cannot change, so the advice does not offer it
    assert run(config_path, *batch, "--seed", "7", *AUTO) == 2
    (line,) = errors_of(capsys)
    assert "training.seed: was 42, is 7" in line and "--allow-change" not in line
    allow_batch = ["--allow-change", "training.batch_size"]
    assert run(config_path, *batch, "--seed", "7", *AUTO, *allow_batch) == 2
    assert run(config_path, "--seed", "7", *AUTO, "--allow-change", "training.seed") == 2
    error = errors_of(capsys)[-1]
    assert "--allow-change training.seed: a resumed run can only change processes, train" in error
    assert run(config_path, *batch, *allow_batch) == 2
    assert "--allow-change needs --resume-from-checkpoint" in errors_of(capsys)[-1]


@pytest.mark.slow
@pytest.mark.promise(4)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_interruptions_lose_and_repeat_no_chunk(seed, config_file, tmp_path, figures):
    """Children end by SIGTERM or SIGKILL at random steps, and change their settings on the way."""
    rng = random.Random(seed)
    epochs = 4
    path = config_file(
        training__num_epochs=epochs, training__save_steps=2, training__logging_steps=1
    )
    run_dir = tmp_path / "models" / "tiny"
    interruptions = []
    flags = []
    while len(interruptions) < 10:
        done = checkpoint_step(checkpoints(run_dir)[0]) if checkpoints(run_dir) else 0
        stop = done + rng.randint(1, 4)
        kind = rng.choice([signal.SIGTERM, signal.SIGKILL])

        class Interrupt(TrainerCallback):
            def on_substep_end(self, args, state, control, stop=stop, kind=kind, **kwargs):
                if state.global_step == stop:
                    signal.raise_signal(kind)

        def act(flags=tuple(flags), callback=Interrupt):
            with ledger_of(tmp_path / "ledger"), added_callback(callback()):
                return run(path, *flags, *AUTO, *ALLOW)

        code = in_child(act)
        assert code in (128 + signal.SIGTERM, -signal.SIGKILL), code
        interruptions.append(code)
        if len(interruptions) % 3 == 0:
            flags = ["--batch-size", str(rng.randint(2, 6)), "--lr", str(rng.choice([1e-3, 2e-3]))]
            flags += ["--gradient-accumulation-steps", str(rng.randint(2, 3))]
    with ledger_of(tmp_path / "ledger"):
        assert run(path, *flags, *AUTO, *ALLOW) == 0
    complete, _ = check_ledger(tmp_path / "ledger", epochs)
    figures.count("interruptions", len(interruptions), len(interruptions))
    figures.count("epochs with each chunk once", complete, epochs)
    assert complete == epochs
    assert len(set(interruptions)) == 2


# ---- exact resume -------------------------------------------------------------------------------


MATRIX = {
    "training__gradient_accumulation_steps": (1, 3),
    "training__dataloader_num_workers": (0, 2),
    "model__resid_pdrop": (0.0, 0.1),
    "training__optimizer": ("adamw", "muon"),
    "training__lr_scheduler": ("linear", "wsd"),
}
QUICK = [(3, 2, 0.1, "adamw", "linear"), (1, 0, 0.1, "muon", "wsd")]
STOPS = (1, 5, 8, 9)  # the first step, mid-epoch, the last step of an epoch, the first of the next


def half_of_the_matrix() -> list[tuple]:
    """Return 16 of the 32 combinations: any four of the five settings meet in every way."""
    rows = []
    for row in itertools.product(*MATRIX.values()):
        pairs = zip(row, MATRIX.values(), strict=True)
        if sum(value == values[1] for value, values in pairs) % 2 == 1:
            rows.append(row)
    return rows


def check_resumes(values, stops, config_file, tmp_path, figures) -> None:
    keys = dict(zip(MATRIX, values, strict=True))
    path = config_file(
        model__type="GPT2",
        training__batch_size=24 // keys["training__gradient_accumulation_steps"],
        training__save_steps=1,
        training__logging_steps=1,
        training__max_steps=11,
        **keys,
    )
    run_dir = tmp_path / "models" / "tiny"
    with added_callback(CopyAt(stops)):
        assert run(path) == 0
    assert {row["step"] for row in rows_of(run_dir) if "eval_loss" in row} == {8, 11}
    expected = final_state(run_dir)
    exact = 0
    for stop in stops:
        shutil.rmtree(run_dir)
        (tmp_path / "models" / f"tiny-stopped-{stop}").rename(run_dir)
        assert checkpoint_step(checkpoints(run_dir)[0]) == stop
        assert run(path, *AUTO) == 0
        different = differences(run_dir, expected)
        exact += not different
        assert not different, (stop, different)
    figures.count("resumes exact", exact, len(stops))


def label(values: tuple) -> str:
    return "-".join(map(str, values))


@pytest.mark.promise(3)
@pytest.mark.parametrize("values", QUICK, ids=label)
def test_a_stopped_run_ends_like_one_that_is_not(values, config_file, tmp_path, figures):
    check_resumes(values, (5, 8), config_file, tmp_path, figures)


@pytest.mark.slow
@pytest.mark.promise(3)
@pytest.mark.parametrize("values", half_of_the_matrix(), ids=label)
def test_any_run_that_is_stopped_ends_like_one_that_is_not(values, config_file, tmp_path, figures):
    check_resumes(values, STOPS, config_file, tmp_path, figures)


@pytest.mark.promise(3)
def test_without_the_random_state_a_resumed_run_would_differ(config_file, tmp_path, monkeypatch):
    """If this passes without restoring anything, the tests above compare nothing."""
    path = config_file(model__type="GPT2", model__resid_pdrop=0.1, training__save_steps=3,
                       training__max_steps=6)  # fmt: skip
    run_dir = tmp_path / "models" / "tiny"
    with added_callback(CopyAt([3])):
        assert run(path) == 0
    expected = final_state(run_dir)
    shutil.rmtree(run_dir)
    (tmp_path / "models" / "tiny-stopped-3").rename(run_dir)
    monkeypatch.setattr(LMTrainer, "_load_rng_state", lambda self, checkpoint: None)
    assert run(path, *AUTO) == 0
    assert "final weights" in differences(run_dir, expected)
