"""If one of several processes ends or hangs, all of them end, and nothing half-done is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from conftest import tiny_config
from forks import signal_before, start_child

import train
from babyllama.runs.checkpoints import MANIFEST, checkpoint_error, checkpoints
from babyllama.runs.run_dir import STATUS_FILE
from babyllama.training import trainer

pytestmark = pytest.mark.promise(9)
TIMEOUT = 6.0  # seconds that a process may be silent in these tests


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, tokenizer_file, corpus_dir) -> Path:
    """Return a configuration of 12 steps in two processes, whose text is in the cache already."""
    root = tmp_path_factory.mktemp("pair")
    keys = {"training__num_epochs": 1, "training__save_steps": 3, "training__batch_size": 4}
    keys |= {"training__gradient_accumulation_steps": 2}
    keys |= {"training__process_timeout_minutes": TIMEOUT / 60, "model__type": "GPT2"}
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(root, tokenizer_file, corpus_dir, **keys)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(path), "--dry-run"]) == 0
    return path


class Pair:
    """Two processes that train together, with the store of a launcher in this process."""

    def __init__(self, config_path: Path, folder: Path):
        self.config_path = config_path
        self.folder = folder
        self.run_dir = folder / "tiny"

    def run(self, *prepare: Callable) -> list[int]:
        """Train; prepare[rank]() comes first. Return the exit codes, once both have ended.

        A process that is stopped is killed as soon as the other one has ended, as by torchrun.
        """
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pids = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BABYLLAMA_CACHE", str(self.config_path.parent / "cache"))
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
            for key, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
                patch.setenv(key, str(value))
            arguments = ["--config", str(self.config_path), "--resume-from-checkpoint", "auto"]
            arguments += ["--set", f"logging.output_dir={self.folder}"]
            for rank in (0, 1):
                patch.setenv("RANK", str(rank))
                act = prepare[rank] if rank < len(prepare) else lambda: None
                pids.append(start_child(arguments, self.folder / f"stderr-{rank}", act))
        codes = {}
        while len(codes) < 2:
            pid, status = os.waitpid(-1, 0) if not codes else self._wait_or_kill(pids, codes)
            codes[pid] = os.waitstatus_to_exitcode(status)
        return [codes[pid] for pid in pids]

    def _wait_or_kill(self, pids: list[int], codes: dict) -> tuple[int, int]:
        (pid,) = set(pids) - set(codes)
        if "T" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]:
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)

    def errors(self, rank: int) -> list[str]:
        return (self.folder / f"stderr-{rank}").read_text().splitlines()

    def status(self) -> dict:
        return json.loads((self.run_dir / STATUS_FILE).read_text())


@pytest.fixture
def pair(config_path, tmp_path) -> Pair:
    return Pair(config_path, tmp_path)


def at_step(step: int, number: int) -> Callable:
    """Return a function that makes a process send itself a signal in this step."""
    return lambda: signal_before(trainer.LMTrainer, "compute_loss", number, call=2 * step)


def nothing() -> None:
    """Prepare nothing."""


# ---- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "step"),
    [
        (nothing, at_step(4, signal.SIGTERM), 4),
        pytest.param(at_step(4, signal.SIGTERM), nothing, 4, marks=pytest.mark.slow),
        pytest.param(at_step(2, signal.SIGUSR1), at_step(2, signal.SIGUSR1), 2, marks=pytest.mark.slow),
        pytest.param(at_step(5, signal.SIGTERM), at_step(6, signal.SIGTERM), 5, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_signal_to_one_process_saves_the_same_step_in_both(first, second, step, pair):
    codes = pair.run(first, second)
    assert codes[0] == codes[1] > 128, pair.errors(0) + pair.errors(1)
    newest = checkpoints(pair.run_dir)[0]
    assert newest.name == f"checkpoint-{step}" and checkpoint_error(newest) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    name = signal.Signals(codes[0] - 128).name
    line = f"interrupted by {name} after step {step}; resume from {newest.name} with --resume-from-checkpoint auto"
    assert pair.errors(0)[-1] == line
    assert not any("interrupted by" in error for error in pair.errors(1))
    assert pair.status()["state"] == "preempted"


# ---- a process that is gone or hangs ---------------------------------------------------------------


def check_lost_process(pair: Pair, codes: list[int], survivor: int) -> None:
    assert codes[survivor] == 2, pair.errors(survivor)
    (error,) = [line for line in pair.errors(survivor) if line.startswith("error: ")]
    assert "lost the connection" in error or "has been silent for" in error
    assert not any("Traceback" in line for line in pair.errors(survivor))
    for folder in checkpoints(pair.run_dir):
        assert checkpoint_error(folder) is None


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])  # fmt: skip
def test_a_process_that_is_stopped_or_killed_ends_the_other(number, rank, pair):
    prepare = [nothing, nothing]
    prepare[rank] = at_step(4, number)
    codes = pair.run(*prepare)
    seconds = time.time() - (pair.run_dir / "checkpoint-3" / MANIFEST).stat().st_mtime
    assert seconds < TIMEOUT + 10
    assert codes[rank] == -signal.SIGKILL
    check_lost_process(pair, codes, 1 - rank)
    assert [folder.name for folder in checkpoints(pair.run_dir)] == ["checkpoint-3"]
    assert pair.status()["state"] == ("failed" if rank else "running")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "name"), [(0, "build_run"), (1, "build_run"), (0, "write_results")]
)
def test_a_process_that_hangs_outside_of_training_ends_the_other(rank, name, pair):
    """One process waits while the other prepares the data, or writes the results."""
    from babyllama import distributed

    def stop() -> None:
        signal_before(train, name, signal.SIGSTOP)

    def short() -> None:  # before it has read the configuration
        distributed.set_timeout(TIMEOUT / 60)

    prepare = [short, short]
    prepare[rank] = stop
    codes = pair.run(*prepare)
    check_lost_process(pair, codes, 1 - rank)
    assert pair.run() == [0, 0]


@pytest.mark.slow
def test_data_that_takes_longer_than_the_timeout_ends_nothing(pair, monkeypatch):
    original = train.load_data

    def slow(*args):
        time.sleep(1.5 * TIMEOUT)
        return original(*args)

    def prepare() -> None:
        from babyllama import distributed

        distributed.set_timeout(TIMEOUT / 60)
        train.load_data = slow

    assert pair.run(prepare, prepare) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_one_process_ends_both(rank, pair):
    def fail() -> None:
        original = trainer.LMTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 4:
                raise ValueError("no more paper")
            return original(self, *args, **kwargs)

        trainer.LMTrainer.compute_loss = compute_loss

    prepare = [nothing, nothing]
    prepare[rank] = fail
    assert pair.run(*prepare) == [2, 2]
    assert any("no more paper" in line for line in pair.errors(rank))
    assert [folder.name for folder in checkpoints(pair.run_dir)] == ["checkpoint-3"]
    assert pair.status()["state"] == "failed"
