"""Damage and malice in files that a run reads: each is noticed, named in one line, and runs no code."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import errors_of
from runs import Canary, unfinish

import train
from babyllama.config import format_yaml, parse_yaml
from babyllama.data.tokenizer import load_tokenizer
from babyllama.evaluation.loading import load_model
from babyllama.runs.checkpoints import (
    MANIFEST,
    checkpoint_error,
    checkpoints,
    find_checkpoint,
    seal_checkpoint,
)
from babyllama.runs.run_dir import CONFIG_FILE, DATA_REPORT_FILE, LOG_FILE, METRICS_FILE
from babyllama.training.budget import teacher_sources
from babyllama.training.run_log import RunLog
from babyllama.training.trainer import named_if_unreadable
from data_utils import DataProcessor

RESUME = ["--resume-from-checkpoint", "latest"]
DEEP = "[" * 100_000


def corruptions(content: bytes, flips: int) -> Iterator[bytes | None]:
    """Yield damaged copies of a file: deleted (None), truncated, and with one bit changed."""
    yield None
    for length in {0, len(content) // 2, len(content) - 1}:
        yield content[:length]
    rng = random.Random(0)
    for _ in range(flips):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


# ---- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.promise(2)
@pytest.mark.parametrize("flips", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_every_damage_of_a_checkpoint_is_noticed(flips, finished_copy, figures, caplog):
    _, run_dir = finished_copy
    newest, earlier = checkpoints(run_dir)
    made = detected = 0
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for damaged in corruptions(whole, flips):
            put(file, damaged)
            caplog.clear()
            made += 1
            if find_checkpoint("latest", run_dir) == earlier:
                detected += file.name in caplog.text or file.name == MANIFEST
                with pytest.raises(ValueError, match="cannot resume from it"):
                    find_checkpoint(str(newest), run_dir)
            elif file.name == MANIFEST:  # its last newline means nothing
                detected += json.loads(damaged) == json.loads(whole)
        file.write_bytes(whole)
    figures.count("corruptions detected", detected, made)
    assert made > 60
    assert detected == made
    assert find_checkpoint("latest", run_dir) == newest


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    "manifest", ['{"files": {}}', DEEP, "{}", "5", "[]", '{"files": [1]}', '{"files": {"x": 1}}']
)
def test_a_manifest_that_vouches_for_nothing_is_refused(manifest, tmp_path):
    (tmp_path / MANIFEST).write_text(manifest)
    assert MANIFEST in checkpoint_error(tmp_path)


@pytest.mark.promise(13)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    "kind", ["malicious", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pickle", "cut", "other"))]
)  # fmt: skip
def test_a_sealed_file_that_is_not_ours_is_one_line(
    name, kind, finished_copy, tmp_path, capsys, figures
):
    config_path, run_dir = finished_copy
    unfinish(run_dir)
    last, earlier = checkpoints(run_dir)
    shutil.rmtree(last)  # after the last step nothing draws random numbers
    canary = tmp_path / "canary"
    file = earlier / name
    if kind == "malicious":
        torch.save({"state": Canary(canary), "param_groups": []}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Canary(canary)))
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        torch.save({"a": 1}, file)
    seal_checkpoint(file.parent)
    capsys.readouterr()
    assert train.main(["--config", str(config_path), *RESUME]) == 2
    (line,) = errors_of(capsys)
    assert file.parent.name in line and "weights_only" not in line
    assert not canary.exists()
    figures.count("malicious files refused", 1, 1)


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    "error", [AssertionError("ours"), RuntimeError("gloo: Connection closed"), MemoryError()], ids=repr
)  # fmt: skip
def test_a_checkpoint_is_not_blamed_for_other_errors(error, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(type(error)) as caught, named_if_unreadable("checkpoint-1"):
        raise error
    assert caught.value is error


@pytest.mark.slow
@pytest.mark.promise(13)
def test_no_damage_that_was_sealed_ends_in_a_traceback(finished_copy, capsys, figures):
    """Resuming may succeed: a flipped bit of a weight, sealed, is a weight."""
    config_path, run_dir = finished_copy
    last, newest = checkpoints(run_dir)
    shutil.rmtree(last)
    shutil.copytree(newest, run_dir.parent / "whole")
    tried = 0
    for name in sorted(path.name for path in newest.iterdir() if path.name != MANIFEST):
        for damaged in corruptions((run_dir.parent / "whole" / name).read_bytes(), flips=1):
            unfinish(run_dir)
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(run_dir.parent / "whole", newest)
            put(newest / name, damaged)
            seal_checkpoint(newest)
            tried += 1
            code = train.main(["--config", str(config_path), *RESUME])
            output = capsys.readouterr().err
            assert code == 0 or (code == 2 and output.count("error: ") == 1), (name, output)
            assert "weights_only" not in output
    figures.count("sealed corruptions without a traceback", tried, tried)


# ---- the other files of a run ----------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("name", "content"),
    [(CONFIG_FILE, DEEP), (CONFIG_FILE, BOMB), (CONFIG_FILE, "!!python/object/apply:os.abort []"),
     (CONFIG_FILE, "x" * 2_000_000), (DATA_REPORT_FILE, DEEP), (METRICS_FILE, DEEP), (METRICS_FILE, "[]")],
    ids=["deep yaml", "alias bomb", "python object", "large yaml", "deep report", "deep metrics", "list"],
)  # fmt: skip
def test_a_file_of_a_run_that_is_malicious_is_one_line(
    name, content, finished_copy, capsys, figures
):
    config_path, run_dir = finished_copy
    (run_dir / name).write_text(content)
    capsys.readouterr()
    assert train.main(["--config", str(config_path)]) == 2
    (line,) = errors_of(capsys)
    assert f"{name} is corrupted" in line
    figures.count("malicious files refused", 1, 1)


@pytest.mark.promise(13)
@pytest.mark.parametrize("text", ["1e5", "None", "3e-4", "true", "a: b", "*x", "\udcff", "-.5E+3"])
def test_a_recorded_configuration_reads_back_as_it_was(text):
    config = {"model": {"name": text, "lr": 1e-5}, "none": None}
    assert parse_yaml(format_yaml(config), "test") == config


@pytest.mark.promise(2)
@pytest.mark.parametrize("row", [DEEP, "5", "{}", '{"step": "x", "tokens": 1, "seconds": 2}', "\0"])
def test_a_damaged_row_ends_the_log_that_a_resume_reads(row, tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    path = tmp_path / LOG_FILE
    whole = [{"step": step, "tokens": 8 * step, "seconds": 0.1} for step in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole) + row + "\n" + row)
    run_log = RunLog(path, 1.0, 1.0, 1.0)
    state = TrainerState(global_step=9, max_steps=9)
    run_log.on_train_begin(TrainingArguments(tmp_path), state, TrainerControl())
    assert run_log.rows == whole
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole


@pytest.mark.promise(13)
def test_no_file_of_a_run_is_written_through_a_link(finished_copy, tmp_path, figures):
    config_path, run_dir = finished_copy
    written = [path.name for path in run_dir.iterdir() if path.is_file()]
    target = tmp_path / "important"
    for name in {*written, ".lock-owner"}:
        mine = target / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        if name not in (CONFIG_FILE, DATA_REPORT_FILE):  # a run reads these before it writes them
            (run_dir / name).unlink(missing_ok=True)
            (run_dir / name).symlink_to(mine)
    assert train.main(["--config", str(config_path), "--overwrite"]) == 0
    touched = [path.name for path in target.iterdir() if path.read_text() != "mine"]
    figures.count("links left alone", len(written) - len(touched), len(written))
    assert not touched
    assert not [path.name for path in run_dir.iterdir() if path.is_symlink()]
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]


# ---- models ----------------------------------------------------------------------------------------


def change_json(**keys):
    """Return a change of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("Llama", change_json(num_hidden_layers=10**9), "config.json has 1,000,000,000 layers"),
        ("Llama", change_json(intermediate_size=10**9), "config.json expects [32, 1000000000]"),
        ("GPT2", change_json(n_layer=10**9), "config.json has 1,000,000,000 layers"),
        ("GPT2", change_json(n_embd=10**9), "cannot be loaded"),
        ("GPT2", change_json(vocab_size=10**12), "config.json expects [1000000000000, 32]"),
        ("GPT2", change_json(n_positions=10**9), "config.json expects [1000000000, 32]"),
        ("GPTJ", change_json(n_positions=10**9), ",000,000,000 constants"),
        ("GPT2", lambda folder: (folder / "config.json").write_text(DEEP), "cannot be loaded"),
        ("GPT2", lambda folder: (folder / "tokenizer.json").write_text(DEEP), "cannot be loaded"),
    ],
)
def test_absurd_sizes_are_refused_before_any_memory_is_taken(
    kind, change, reason, model_dirs, tmp_path, figures
):
    import resource
    import time

    shutil.copytree(model_dirs[kind], tmp_path / "model")
    change(tmp_path / "model")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "model", "cpu")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB
    figures.count("malicious files refused", 1, 1)


@pytest.mark.promise(13)
@pytest.mark.parametrize("token_id", [5000, 2**31, 2**32 - 1])
def test_a_token_id_without_a_place_is_one_line(token_id, tokenizer_file, tmp_path, figures):
    content = json.loads(tokenizer_file.read_text())
    content["model"]["vocab"]["zzz"] = token_id
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer.json: .* but one with the id {token_id}"):
        load_tokenizer(path)
    figures.count("malicious files refused", 1, 1)


@pytest.mark.promise(2)
def test_a_finished_model_with_a_changed_bit_is_refused(finished_copy, capsys):
    config_path, run_dir = finished_copy
    weights = run_dir / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert train.main(["--config", str(config_path)]) == 2
    (line,) = errors_of(capsys)
    assert str(run_dir) in line and "have changed since they were trained" in line
    with pytest.raises(ValueError, match="have changed since they were trained"):
        load_model(run_dir, "cpu")
    (run_dir / METRICS_FILE).unlink()  # nothing to compare with
    load_model(run_dir, "cpu")


# ---- the cache -------------------------------------------------------------------------------------


@pytest.mark.promise(2)
@pytest.mark.parametrize("flips", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_damaged_cache_is_named_and_prepared_again(
    flips, tokenizer, corpus_dir, tmp_path, caplog, figures
):
    def prepare() -> tuple:
        processor = DataProcessor(tokenizer, cache_dir=tmp_path)
        splits = processor.prepare_dataset(str(corpus_dir / "train"), str(corpus_dir / "dev"), 32)
        return {name: split[:]["input_ids"] for name, split in splits.items()}, processor.reports

    expected = prepare()
    made = detected = 0
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for damaged in corruptions(whole, flips):
            put(file, damaged)
            caplog.clear()
            assert prepare() == expected
            made += 1
            if file.with_suffix(".arrow").name in caplog.text:
                detected += file.read_bytes() == whole
            elif damaged is None:
                detected += file.suffix == ".arrow"  # without it there is no cache
            else:
                detected += damaged == whole.rstrip()  # the last newline means nothing
    figures.count("corruptions of a cache detected", detected, made)
    assert made >= 4 * (4 + flips)
    assert detected == made


@pytest.mark.promise(2)
@pytest.mark.parametrize("content", [DEEP, "[]", "{}", '{"train": 5}', "{", "\0"])
def test_a_damaged_record_of_a_teacher_counts_as_none(content, tmp_path):
    (tmp_path / DATA_REPORT_FILE).write_text(content)
    assert teacher_sources(str(tmp_path)) is None
