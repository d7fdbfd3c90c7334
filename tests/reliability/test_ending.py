"""A run that is interrupted, fails or finishes says so: exit code, one line, status.json."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import added_callback, errors_of
from forks import acting_before, run_in_child, signal_before
from runs import AUTO
from transformers import TrainerCallback

import data_utils
import train
from babyllama.files import atomic_write, drafts
from babyllama.runs.checkpoints import checkpoint_error, checkpoints
from babyllama.runs.ending import SIGNALS
from babyllama.runs.run_dir import METRICS_FILE, STATUS_FILE
from babyllama.training import results, trainer

NAMES = [signal.Signals(number).name for number in SIGNALS]


def status_of(run_dir: Path) -> dict:
    return json.loads((run_dir / STATUS_FILE).read_text())


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tokenizer_file, corpus_dir) -> tuple[Path, Path]:
    """Return the configuration and the directory of a run that nothing interrupts: 8 steps."""
    import yaml
    from conftest import tiny_config

    root = tmp_path_factory.mktemp("calm")
    keys = {"training__num_epochs": 1, "training__save_steps": 3, "training__eval_steps": 4}
    config = tiny_config(root, tokenizer_file, corpus_dir, **keys)
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(path)]) == 0
    return path, root / "models" / "tiny"


@pytest.fixture
def command(calm, tmp_path, monkeypatch) -> list[str]:
    """Return the command line of `calm` in a directory of its own."""
    monkeypatch.setenv("BABYLLAMA_CACHE", str(calm[0].parent / "cache"))
    return ["--config", str(calm[0]), "--set", f"logging.output_dir={tmp_path}", *AUTO]


def assert_equal_runs(run_dir: Path, calm_dir: Path) -> None:
    """Check that a run has the weights of another."""
    weights = (run_dir / "model.safetensors").read_bytes()
    assert weights == (calm_dir / "model.safetensors").read_bytes()


# ---- signals ---------------------------------------------------------------------------------------

PLACES = {  # where the signal comes -> (object, function, number of the call, steps done by then)
    "configuration": (train, "load_config", 1, None),
    "tokenizing": (data_utils.DataProcessor, "_write_chunks", 2, None),
    "model": (train, "create_model", 1, None),
    "run directory": (train, "start_run_dir", 1, 0),
    "step": (trainer.LMTrainer, "compute_loss", 5, 2),
    "evaluation": (trainer, "evaluate_chunks", 1, 5),
    "saving": (trainer, "seal_checkpoint", 1, 4),
    "last step": (trainer.LMTrainer, "compute_loss", 24, 8),
    "final save": (results, "save_model", 1, 8),
    "final evaluation": (results, "measure_model", 1, 8),
    "documents": (results, "write_documents", 1, 8),
}


def check_interrupted(place: str, number: int, command: list[str], tmp_path: Path) -> None:
    """Send a signal at a place; check the exit code, the last line, the status and the cache."""
    target, name, call, step = PLACES[place]
    run_dir = tmp_path / "tiny"
    if place == "tokenizing":
        os.environ["BABYLLAMA_CACHE"] = str(tmp_path / "cache")  # empty; the fixture resets it
    code, errors = run_in_child(
        command, tmp_path, lambda: signal_before(target, name, number, call)
    )
    assert code == 128 + number, errors
    assert errors[-1].startswith("interrupted"), errors
    assert not any("Traceback" in line for line in errors)
    assert not drafts(tmp_path / "cache")
    assert not (run_dir / METRICS_FILE).exists()
    if step is None:
        assert not run_dir.exists()
        assert errors[-1] == "interrupted; nothing has changed; the same command starts again"
        return
    status = status_of(run_dir)
    assert status["state"] == "preempted" and status["step"] == step
    remedy = "nothing was saved yet; the same command starts again"
    if step:
        newest = checkpoints(run_dir)[0]
        assert newest.name == f"checkpoint-{step}" and checkpoint_error(newest) is None
        remedy = f"resume from checkpoint-{step} with --resume-from-checkpoint auto"
    line = f"interrupted by {signal.Signals(number).name} after step {step}; {remedy}"
    assert errors[-1] == line == status["message"]


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("place", "number"),
    zip(("tokenizing", "run directory", "step", "final save"), SIGNALS, strict=False),
)
def test_a_signal_ends_the_run_with_one_line(place, number, command, tmp_path):
    check_interrupted(place, number, command, tmp_path)


@pytest.mark.promise(7)
@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_run_ends_like_one_that_is_not(place, number, command, calm, tmp_path):
    check_interrupted(place, number, command, tmp_path)
    assert train.main(command) == 0
    assert status_of(tmp_path / "tiny")["state"] == "finished"
    assert_equal_runs(tmp_path / "tiny", calm[1])


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    "second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_second_signal_during_the_save_corrupts_nothing(second, command, calm, tmp_path):
    """SIGTERM lets the save finish; Ctrl-C stops at once, and the checkpoint does not count."""
    run_dir = tmp_path / "tiny"

    def prepare():
        signal_before(trainer.LMTrainer, "compute_loss", signal.SIGUSR1, call=14)  # step 5
        signal_before(trainer, "seal_checkpoint", second, call=2)

    code, errors = run_in_child(command, tmp_path, prepare)
    saved = 5 if second == signal.SIGTERM else 3
    assert code == 128 + signal.SIGUSR1
    assert errors[-1].endswith(
        f"after step 5; resume from checkpoint-{saved} with --resume-from-checkpoint auto"
    )
    assert status_of(run_dir)["state"] == "preempted"
    assert train.main(command) == 0
    assert_equal_runs(run_dir, calm[1])


@pytest.mark.promise(7)
def test_signals_that_are_ignored_stay_ignored(command, tmp_path):
    """Under nohup a closed terminal does not end the run."""

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal_before(trainer.LMTrainer, "compute_loss", signal.SIGHUP)

    code, errors = run_in_child([*command, "--set", "training.max_steps=1"], tmp_path, prepare)
    assert code == 0, errors
    status = status_of(tmp_path / "tiny")
    assert status["state"] == "finished" and status["step"] == 1


@pytest.mark.promise(7)
def test_signal_handlers_are_restored_after_a_run():
    before = [signal.getsignal(number) for number in SIGNALS]
    assert train.main(["--config", "nowhere.yaml"]) == 2
    assert [signal.getsignal(number) for number in SIGNALS] == before


# ---- kill -9 ---------------------------------------------------------------------------------------


@pytest.mark.promise(7)
def test_a_killed_run_leaves_running_and_a_dead_process(command, tmp_path):
    def prepare():
        signal_before(trainer.LMTrainer, "compute_loss", signal.SIGKILL, call=11)

    code, _ = run_in_child(command, tmp_path, prepare)
    assert code == -signal.SIGKILL
    status = status_of(tmp_path / "tiny")
    assert status["state"] == "running" and status["step"] == 3  # the last one that was saved
    assert status["host"] == platform.node()
    with pytest.raises(ProcessLookupError):
        os.kill(status["pid"], 0)


@pytest.mark.promise(7)
def test_the_next_run_removes_what_a_killed_one_left_in_the_cache(command, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("BABYLLAMA_CACHE", str(cache))

    def prepare():
        signal_before(data_utils.DataProcessor, "_tokenize_batch", signal.SIGKILL)

    code, _ = run_in_child(command, tmp_path, prepare)
    assert code == -signal.SIGKILL and len(drafts(cache)) == 1
    with atomic_write(cache / "other.arrow") as draft:  # of a process that lives
        draft.write_text("half")
        assert train.main([*command, "--dry-run"]) == 0
        assert drafts(cache) == [draft.parent]


# ---- status.json -----------------------------------------------------------------------------------


@pytest.mark.promise(7)
def test_status_is_that_of_the_run_and_not_of_a_refused_one(calm, capsys):
    path, run_dir = calm
    status = status_of(run_dir)
    assert status["state"] == "finished" and status["step"] == 8 and status["message"] == ""
    assert status["pid"] == os.getpid()
    assert train.main(["--config", str(path), "--lr", "1e-3"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert status_of(run_dir) == status


@pytest.mark.promise(7)
def test_a_failed_run_says_why(command, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise ValueError("no more\npaper")

    with added_callback(Fail()):
        assert train.main(command) == 2
    status = status_of(tmp_path / "tiny")
    assert status["state"] == "failed" and status["message"] == "no more"


@pytest.mark.promise(7)
def test_a_run_whose_summary_cannot_be_printed_is_finished(command, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(results, "print_summary", fail)
    assert train.main([*command, "--set", "training.max_steps=1"]) == 2
    assert status_of(tmp_path / "tiny")["state"] == "finished"


# ---- memory ----------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "python": MemoryError(),
    "cpu": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


def check_out_of_memory(
    error, place: str, command, calm, tmp_path, capsys, follow_flags=False
) -> None:
    """Run out of memory, and follow one half of the advice."""
    target, name, call = {
        "step": (trainer.LMTrainer, "compute_loss", 20),  # of step 7
        "evaluation": (trainer, "evaluate_chunks", 1),  # of step 4
    }[place]

    def fail():
        raise error

    function = acting_before(getattr(target, name), fail, call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, function)
        assert train.main(command) == 2
    (line,) = errors_of(capsys)
    saved = checkpoints(tmp_path / "tiny")[0].name
    assert saved == {"step": "checkpoint-6", "evaluation": "checkpoint-3"}[place]
    assert "out of memory: " + saved in line and "--resume-from-checkpoint auto" in line
    assert "--overwrite" not in line
    assert status_of(tmp_path / "tiny")["state"] == "failed"
    # the advice: the unchanged run, or one with less memory
    flags = line.split("you also add ")[1].split()
    assert flags[:4] == ["--batch-size", "4", "--gradient-accumulation-steps", "6"]
    if follow_flags:
        assert train.main([*command, *flags]) == 0
        assert status_of(tmp_path / "tiny")["step"] == 8
    else:
        assert train.main(command) == 0
        assert_equal_runs(tmp_path / "tiny", calm[1])


@pytest.mark.promise(8)
def test_out_of_memory_costs_no_checkpoint(command, calm, tmp_path, capsys):
    check_out_of_memory(OUT_OF_MEMORY["python"], "step", command, calm, tmp_path, capsys)


@pytest.mark.promise(8)
@pytest.mark.slow
@pytest.mark.parametrize("follow_flags", [False, True])
@pytest.mark.parametrize("place", ["step", "evaluation"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_anywhere(kind, place, follow_flags, command, calm, tmp_path, capsys):
    error = OUT_OF_MEMORY[kind]
    check_out_of_memory(error, place, command, calm, tmp_path, capsys, follow_flags)


# ---- disk space ------------------------------------------------------------------------------------


def free_bytes(monkeypatch, n: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(n, 0, n))


@pytest.mark.promise(5)
def test_a_disk_that_is_too_small_is_found_before_the_first_step(
    command, calm, tmp_path, monkeypatch, capsys
):
    parameters = 48_032  # of the tiny Llama, as the run prints it
    needed = 3 * 12 * parameters + 4 * parameters
    free_bytes(monkeypatch, needed - 1)
    assert train.main([*command, "--dry-run"]) == 2
    (line,) = errors_of(capsys)
    assert f"the run needs {needed:,} bytes" in line and f"has {needed - 1:,} free" in line
    assert not (tmp_path / "tiny").exists()
    free_bytes(monkeypatch, needed)
    assert train.main([*command, "--dry-run"]) == 0
    # a run that is resumed replaces its checkpoints, so their space counts as free
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed // 2)
    )
    assert train.main(["--config", str(calm[0]), "--overwrite", "--dry-run"]) == 0


@pytest.mark.promise(5)
@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "optimizer": "muon"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"ema": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(changes, command, tmp_path):
    """The state of the run and the tokenizer come on top: some ten kilobytes."""
    flags = [f"training.{key}={value}" for key, value in changes.items()]
    flags = ["--set", "training.max_steps=1", *(word for flag in flags for word in ("--set", flag))]
    assert train.main([*command, *flags]) == 0
    (folder,) = checkpoints(tmp_path / "tiny")
    written = sum(file.stat().st_size for file in folder.iterdir())
    expected = json.loads((tmp_path / "tiny" / METRICS_FILE).read_text())["plan"][
        "checkpoint_bytes"
    ]
    assert 0 < written - expected < 60_000


@pytest.mark.promise(5)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=[] if size == 122_000 else pytest.mark.slow)
        for size in range(2_000, 400_000, 40_000)
    ],
)
def test_a_disk_that_is_full_at_any_byte_costs_no_checkpoint(size, command, calm, tmp_path):
    """A limit on the size of files stands in for a full disk; the optimizer's is 390 kB."""
    run_dir = tmp_path / "tiny"

    def prepare():
        def seal(folder):
            original(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # after the first checkpoint

        original = trainer.seal_checkpoint
        trainer.seal_checkpoint = seal

    code, errors = run_in_child(command, tmp_path, prepare)
    assert code == 2, errors
    assert not any("Traceback" in line for line in errors)
    (error,) = [line for line in errors if line.startswith("error: ")]
    if size > 2_000:  # the log of this run is longer than that
        assert "cannot be saved: it needs" in error and "bytes free" in error
    (saved,) = checkpoints(run_dir)
    assert saved.name == "checkpoint-3" and checkpoint_error(saved) is None
    assert train.main(command) == 0
    assert_equal_runs(run_dir, calm[1])
