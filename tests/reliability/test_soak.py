"""Long runs, wrong clocks and two processes in one directory."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import added_callback, rows_of
from runs import run
from transformers import TrainerCallback

from babyllama.files import exclusive_folder
from babyllama.runs.checkpoints import checkpoint_error, checkpoint_step, checkpoints
from babyllama.runs.run_dir import check_output_dir

TINY = {"model__n_layer": 1, "training__batch_size": 1, "training__gradient_accumulation_steps": 1,
        "training__logging_steps": 1, "training__num_epochs": 80, "training__eval_steps": 100_000}  # fmt: skip


def memory() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Watch(TrainerCallback):
    """Measure memory, open files and the time of each step, and count the checkpoints kept.

    With `shuffle` it gives the checkpoints new times after each save, up to an hour wrong.
    """

    def __init__(self, shuffle: bool):
        self.rng = random.Random(0) if shuffle else None
        self.most_checkpoints = 0
        self.memory = []
        self.files = []
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)
        if state.global_step % 50 == 0:
            self.memory.append(memory())
            self.files.append(len(os.listdir("/proc/self/fd")))

    def on_save(self, args, state, control, **kwargs):
        folders = checkpoints(Path(args.output_dir))
        self.most_checkpoints = max(self.most_checkpoints, len(folders))
        if self.rng:
            for folder in folders:
                moment = time.time() + self.rng.uniform(-3600, 3600)
                os.utime(folder, (moment, moment))

    def report(self, figures) -> None:
        """Compare the end of the run with its beginning, without the first tenth's warm-up."""
        tenth = len(self.memory) // 10
        growth = self.memory[-1] / self.memory[tenth] - 1
        figures.worst("memory growth, percent", 100 * growth)
        figures.worst("open files more", self.files[-1] - self.files[tenth])
        tenth = len(self.seconds) // 10
        slowest = [sorted(part)[int(0.99 * tenth)] for part in (self.seconds[:tenth], self.seconds[-tenth:])]  # fmt: skip
        figures.worst("p99 of steps, end to begin", slowest[1] / slowest[0])
        assert self.files[-1] == self.files[tenth // 50]
        assert growth < 0.05


@pytest.mark.slow
@pytest.mark.promise(15)
def test_two_thousand_checkpoints_leave_two(config_file, tmp_path, figures):
    path = config_file(training__save_steps=1, training__max_steps=2000, **TINY)
    watch = Watch(shuffle=True)
    with added_callback(watch):
        assert run(path) == 0
    run_dir = tmp_path / "models" / "tiny"
    kept = checkpoints(run_dir)
    assert [checkpoint_step(folder) for folder in kept] == [2000, 1999]
    assert not any(checkpoint_error(folder) for folder in kept)
    assert watch.most_checkpoints == 2
    figures.count("checkpoints saved", 2000, 2000)
    watch.report(figures)


@pytest.mark.slow
@pytest.mark.promise(15)
def test_ten_thousand_rows_of_the_log_are_all_there(config_file, tmp_path, figures):
    path = config_file(training__save_steps=10_000, training__max_steps=10_000, **TINY)
    watch = Watch(shuffle=False)
    with added_callback(watch):
        assert run(path) == 0
    steps = [row["step"] for row in rows_of(tmp_path / "models" / "tiny") if "loss" in row]
    figures.count("log rows", len(set(steps)), 10_000)
    assert steps == list(range(1, 10_001))
    watch.report(figures)


@pytest.mark.promise(15)
def test_a_lock_names_its_owner_and_dies_with_it(tmp_path, figures):
    folder = tmp_path / "run"
    folder.mkdir()
    reader, writer = os.pipe()

    def hold() -> int:
        with exclusive_folder(folder, "choose another name"):
            os.write(writer, f"{os.getpid()}\n".encode())
            signal.pause()
        return 0

    pid = os.fork()
    if pid == 0:
        hold()
        os._exit(0)
    os.read(reader, 100)
    refused = pytest.raises(ValueError, match=rf"\(process {pid} on {os.uname().nodename}\)")
    with refused, exclusive_folder(folder, "choose another name"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check_output_dir(folder, [])  # the files that it left are not taken for somebody's
    with exclusive_folder(folder, "choose another name"):
        pass
    figures.count("second processes refused", 1, 1)
    figures.count("locks of dead processes taken over", 1, 1)


@pytest.mark.promise(15)
def test_of_several_processes_that_start_together_one_gets_the_directory(tmp_path, figures):
    folder = tmp_path / "run"
    folder.mkdir()

    def race() -> int:
        try:
            with exclusive_folder(folder, "choose another name"):
                time.sleep(1)
        except ValueError:
            return 2
        return 0

    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os._exit(race())
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    figures.count("simultaneous starts refused", codes.count(2), 3)
    assert sorted(codes) == [0, 2, 2, 2]
