"""Sweeps over real tiny models: the grid, the checks, and what is kept, resumed and shown."""

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, errors_of, rows_of
from forks import Fork

import train
from babyllama.config import ConfigError, set_key
from babyllama.runs import sweep, sweep_results
from babyllama.runs.checkpoints import MANIFEST, checkpoint_error, checkpoints
from babyllama.runs.resume import resolve_checkpoint
from babyllama.runs.run_dir import LOG_FILE, METRICS_FILE, RESULTS


@pytest.fixture
def run_sweep(config_file, tmp_path):
    """Return a function that runs train.py over a grid; `folder` holds its runs."""
    path = config_file(training__num_epochs=1, training__gradient_accumulation_steps=1)
    sweep_file = tmp_path / "sweep.yaml"

    def run(grid: dict | str, *flags: str) -> int:
        text = grid if isinstance(grid, str) else yaml.safe_dump(grid, sort_keys=False)
        sweep_file.write_text(text)
        return train.main([*run.arguments, *flags])

    run.arguments = ["--config", str(path), "--sweep", str(sweep_file)]
    run.file = sweep_file
    run.folder = tmp_path / "models" / "tiny-sweep"
    return run


@pytest.fixture
def forked(monkeypatch, finished):
    """Fork this process for each run of a sweep; `finished` has imported torch into it."""
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(Popen=Fork))


def read_rows(folder) -> list[dict]:
    """Return the rows of sweep.json."""
    return json.loads((folder / sweep_results.RESULTS).read_text())["runs"]


# ---- the grid and its checks --------------------------------------------------------------------


def test_the_grid_is_every_combination_with_its_name(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "training.lr: [3e-4, 1e-3]\ndata.train_path: [a/b, c]\nmodel.tie_word_embeddings: [true]\n"
    )
    grid = sweep.read_grid(path)
    combinations = sweep.combinations(grid)
    assert [tuple(values.values()) for values in combinations] == [
        (3e-4, "a/b", True),
        (3e-4, "c", True),
        (1e-3, "a/b", True),
        (1e-3, "c", True),
    ]
    names = [sweep.run_name("tiny", values) for values in combinations]
    assert names[0] == "tiny-lr0.0003-train_patha-b-tie_word_embeddingstrue"
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.lr: 1e-3", "training.lr: 0.001 is not a list of values"),
        ("training.lr: [1e-3, 0.001]", "training.lr: a value appears twice"),
        ("lr: [1e-3]", "lr: not of the form section.key"),
        ("model.name: [a, b]", "model.name: cannot be swept"),
        ("[1, 2]", "not a sweep; write lines such as"),
        ("data.train_path: [a/b, a-b]", "several runs would be named tiny-train_patha-b"),
    ],
)
def test_a_malformed_sweep_is_a_one_line_error(run_sweep, text, message, capsys):
    assert run_sweep(text) == 2
    (line,) = errors_of(capsys)
    assert message in line


def test_a_missing_or_empty_sweep_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml: no such file; --sweep takes"):
        sweep.read_grid(str(tmp_path / "none.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError):
        sweep.read_grid(str(tmp_path / "empty.yaml"))


def test_every_configuration_is_checked_before_the_first_run(run_sweep, capsys):
    grid = {
        "training.lr": [1e-3, 2.0],
        "model.n_head": [4, 5],
        "training.epochs": [1],
        "data.eval_path": ["nowhere"],
    }
    assert run_sweep(grid) == 2
    lines = errors_of(capsys)
    assert len(lines) == 3
    assert sum("training.epochs: unknown key" in line for line in lines) == 1, "listed once"
    assert not any("nowhere not found" in line for line in lines), "inputs of wrong configurations"
    (lr,) = (line for line in lines if "training.lr: 2.0 is not allowed" in line)
    assert lr.startswith(f"error: {run_sweep.file}: training.lr=2, model.n_head=4, ")
    (heads,) = (line for line in lines if "model.hidden_size" in line)
    assert "hidden_size must be divisible by n_head (5)" in heads
    assert not run_sweep.folder.exists()


def test_a_sweep_resumes_by_itself_and_runs_in_one_process(run_sweep, capsys, monkeypatch):
    assert run_sweep({"training.lr": [1e-3]}, "--resume-from-checkpoint", "latest") == 2
    assert "--sweep resumes its runs itself" in errors_of(capsys)[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_sweep({"training.lr": [1e-3]}) == 2
    assert "--sweep: runs in one process, not in 2" in errors_of(capsys)[0]


def test_values_reach_the_runs_unchanged(tmp_path):
    text = 'a "path" with 😀, é and \\'
    point = sweep.Point({"data.train_path": text}, tmp_path / "run")
    raw = {}
    for assignment in point.assignments():
        set_key(raw, assignment)
    assert raw == {
        "data": {"train_path": text},
        "model": {"name": "run"},
        "logging": {"output_dir": str(tmp_path)},
    }


def test_the_command_of_a_point_keeps_the_other_flags(tmp_path):
    argv = ["--config", "c.yaml", "--sweep=s.yaml", "--no-fp16", "--set", "training.ema=0.9"]
    point = sweep.Point({"training.lr": 0.1}, tmp_path / "run")
    _, script, *flags = sweep.train_command(argv, point, overwrite=False, kind="sweep")
    args = train.make_parser().parse_args(flags)
    assert script == str(ROOT / "train.py")
    assert (args.config, args.fp16, args.sweep) == ("c.yaml", False, None)
    assert args.set[:2] == ["training.ema=0.9", "training.lr=0.1"]
    assert (args.overwrite, args.resume_from_checkpoint) == (False, "auto")


# ---- runs ---------------------------------------------------------------------------------------


def test_a_sweep_trains_every_point_and_shows_a_table(run_sweep, forked, capfd):
    grid = {"training.lr": [1e-3, 5e-3], "model.n_layer": [2]}
    assert run_sweep(grid, "--dry-run") == 0
    assert "tiny-lr0.005-n_layer2: training.lr=0.005, model.n_layer=2" in capfd.readouterr().out
    assert not run_sweep.folder.exists()

    assert run_sweep(grid) == 0
    out = capfd.readouterr().out
    assert "run 1 of 2: training.lr=0.001, model.n_layer=2" in out
    assert "run 2 of 2, about " in out

    # sweep.json holds the values and the figures of each run
    document = json.loads((run_sweep.folder / sweep_results.RESULTS).read_text())
    assert document["grid"] == grid
    assert document["environment"]["torch"]
    rows = document["runs"]
    points = [(1e-3, 2), (5e-3, 2)]
    assert [tuple(row["values"].values()) for row in rows] == points
    for row in rows:
        metrics = json.loads((run_sweep.folder / row["name"] / METRICS_FILE).read_text())
        assert metrics["config"]["training"]["lr"] == row["values"]["training.lr"]
        assert metrics["config"]["model"]["n_layer"] == row["values"]["model.n_layer"]
        assert all(row[key] == metrics["results"][key] for key in sweep_results.COLUMNS)
    losses = {row["name"]: row["eval_bits_per_byte"] for row in rows}
    assert losses[document["best"]] == min(losses.values())

    # so does the table
    lines = (run_sweep.folder / sweep_results.TABLE).read_text().splitlines()
    assert lines[0].split() == [
        "lr",
        "n_layer",
        "held-out",
        "loss",
        "bits",
        "per",
        "byte",
        "tokens/s",
    ]
    assert [line.split()[:2] for line in lines[1:]] == [[f"{lr:g}", str(n)] for lr, n in points]
    best = [line.endswith("best") for line in lines[1:]]
    assert best == [row["name"] == document["best"] for row in rows]
    assert "\n".join(lines) in out
    assert (run_sweep.folder / sweep_results.PLOT).read_bytes().startswith(b"\x89PNG")

    # a point is trained like the same configuration without a sweep
    alone = ["--lr", "5e-3", "--set", "model.n_layer=2", "--model-name", "alone"]
    script = [sys.executable, str(ROOT / "train.py")]
    subprocess.run([*script, *run_sweep.arguments[:2], *alone], check=True)
    point_weights = (run_sweep.folder / rows[1]["name"] / "model.safetensors").read_bytes()
    alone_weights = (run_sweep.folder.parent / "alone" / "model.safetensors").read_bytes()
    assert point_weights == alone_weights

    # started again, the sweep shows the finished runs
    before = {path: path.stat().st_mtime_ns for path in run_sweep.folder.glob("*/*")}
    assert run_sweep(grid) == 0
    assert capfd.readouterr().out.count("already trained") == 2
    assert {path: path.stat().st_mtime_ns for path in run_sweep.folder.glob("*/*")} == before


def make_unfinished(run_dir) -> None:
    """Take a finished run back to the moment before its last checkpoint."""
    shutil.rmtree(checkpoints(run_dir)[0])
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def test_unfinished_runs_are_resumed_or_restarted(run_sweep, forked):
    grid = {"training.seed": [1, 2]}
    first = run_sweep.folder / "tiny-seed1"
    second = run_sweep.folder / "tiny-seed2"
    # train in this process, which is faster
    for seed, run_dir in enumerate((first, second), 1):
        values = sweep.Point({"training.seed": seed}, run_dir).assignments()
        flags = [flag for value in values for flag in ("--set", value)]
        assert train.main([*run_sweep.arguments[:2], *flags]) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] != weights[1]

    # one has a checkpoint to resume from, the other only one that was not saved completely
    make_unfinished(first)
    make_unfinished(second)
    (checkpoints(second)[0] / MANIFEST).unlink()
    assert run_sweep(grid) == 0
    assert [(folder / "model.safetensors").read_bytes() for folder in (first, second)] == weights
    steps = [row["step"] for row in rows_of(first)]
    assert steps == sorted(steps)

    # a different run of the same name is not replaced, and a finished one not continued
    table = run_sweep.folder / sweep_results.TABLE
    assert run_sweep({"training.seed": [1]}, "--lr", "1e-3") == 2
    assert "training.lr: was 0.003, is 0.001" in table.read_text()
    assert run_sweep({"training.seed": [1]}, "--num-epochs", "9") == 2
    assert "is 9" in table.read_text()
    assert (first / "model.safetensors").read_bytes() == weights[0]


def test_seeds_are_trained_and_summarized(run_sweep, forked, capfd):
    arguments = [*run_sweep.arguments[:2], "--num-epochs", "1", "--seeds", "3", "7"]
    folder = run_sweep.folder.with_name("tiny-seeds")
    assert train.main([*arguments, "--dry-run"]) == 0
    assert "tiny-seed7: training.seed=7" in capfd.readouterr().out
    assert train.main(arguments) == 0
    out = capfd.readouterr().out

    # the summary follows from the results of the runs
    document = json.loads((folder / sweep_results.RESULTS).read_text())
    results = []
    for seed in (3, 7):
        metrics = json.loads((folder / f"tiny-seed{seed}" / METRICS_FILE).read_text())
        assert metrics["config"]["training"]["seed"] == seed
        results.append(metrics["results"])
    for key, figures in document["over_seeds"].items():
        values = np.array([result[key] for result in results])
        assert figures["mean"] == pytest.approx(values.mean())
        assert figures["standard_deviation"] == pytest.approx(values.std(ddof=1))
        assert figures["n"] == 2
    assert document["over_seeds"]["eval_loss"]["standard_deviation"] > 0

    # no seed is the best one, and there is nothing to plot
    assert document["best"] is None
    assert "best" not in (folder / sweep_results.TABLE).read_text()
    assert not (folder / sweep_results.PLOT).exists()
    *_, mean, deviation = (folder / sweep_results.TABLE).read_text().splitlines()
    loss = document["over_seeds"]["eval_loss"]
    assert mean.split()[:2] == ["mean", f"{loss['mean']:.4f}"]
    assert deviation.split()[:3] == ["standard", "deviation", f"{loss['standard_deviation']:.4f}"]
    assert deviation in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds 1: a spread needs two or more seeds"),
        (["--seeds", "1", "2", "1"], "--seeds 1 2 1: a seed appears twice"),
        (["--seeds", "1", "-2"], "--seeds: training.seed=-2: training.seed: -2 is not allowed"),
        (["--seeds", "1", "2", "--seed", "3"], "--seed, --seeds: choose one"),
        (["--seeds", "1", "2", "--sweep", "s.yaml"], "write training.seed: [1, 2] into s.yaml"),
    ],
)
def test_seeds_that_cannot_be_trained_are_a_one_line_error(flags, message, run_sweep, capsys):
    assert train.main([*run_sweep.arguments[:2], *flags]) == 2
    (line,) = errors_of(capsys)
    assert message in line


def test_the_command_of_a_seed_has_no_flag_for_seeds(tmp_path):
    argv = ["--seeds", "1", "2", "--config", "c.yaml", "--lr", "1e-3", "--overwrite"]
    point = sweep.Point({"training.seed": 2}, tmp_path / "run")
    _, _, *flags = sweep.train_command(argv, point, overwrite=True, kind="seeds")
    args = train.make_parser().parse_args(flags)
    assert (args.config, args.lr, args.seeds, args.seed) == ("c.yaml", 1e-3, None, None)
    assert args.set[0] == "training.seed=2"
    assert (args.overwrite, args.resume_from_checkpoint) == (True, None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent")
def test_a_run_ends_when_its_sweep_is_killed(tmp_path):
    # the run writes its process id, and answers SIGTERM, which gives it time to save
    run = (
        "import os, pathlib, signal, sys, time\n"
        "def save(number, frame):\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('draft').write_text(str(os.getpid()))\n"
        "os.rename('draft', 'pid')\n"
        "time.sleep(100)\n"
    )
    parent = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from babyllama.runs.sweep import train_point\n"
        f"train_point([sys.executable, '-c', {run!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    assert wait_until((tmp_path / "pid").exists)
    process.kill()
    process.wait()
    assert wait_until((tmp_path / "saved").exists)


def wait_until(condition, seconds: float = 60) -> bool:
    """Return True as soon as a condition is true, or False if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_run_with_only_milestones_is_restarted(tmp_path):
    (tmp_path / "chck_1M").mkdir()
    assert resolve_checkpoint(tmp_path, {}, {}, resume="auto", overwrite=False) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_saves_its_step(number, run_sweep, tmp_path):
    """The sweep alone gets the signal, as from a terminal, a job scheduler or `kill`."""
    flags = ["--num-epochs", "6", "--set", "training.logging_steps=1"]
    run_sweep.file.write_text("training.seed: [1, 2]\n")
    command = [sys.executable, str(ROOT / "train.py"), *run_sweep.arguments, *flags]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a background job would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = run_sweep.folder / "tiny-seed1" / LOG_FILE
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text().count("\n") > 2:
            break
        time.sleep(0.005)
    process.send_signal(number)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1].endswith(
        "sweep.yaml: interrupted in run 1 of 2; the same command continues"
    )
    assert checkpoint_error(checkpoints(log.parent)[0]) is None, errors


def test_a_failed_run_does_not_stop_the_others(run_sweep, forked, corpus_dir, tmp_path, capfd):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.train").write_text("Only this.")
    grid = {"data.train_path": [str(tmp_path / "few"), str(corpus_dir / "train")]}
    assert run_sweep(grid) == 2
    failed, finished = read_rows(run_sweep.folder)
    assert "do not fill one chunk of 32" in failed["error"]
    assert finished["eval_loss"] > 0
    assert "error" not in finished
    lines = (run_sweep.folder / sweep_results.TABLE).read_text().splitlines()
    assert "failed: train: " in lines[1]
    assert lines[2].endswith("best")
    assert len(errors_of(capfd)) == 1


def test_a_crashed_run_shows_its_traceback_and_is_reported_with_its_exit_code(capfd):
    crash = "raise RuntimeError('no memory')"
    assert sweep.train_point([sys.executable, "-c", crash]) == "train.py ended with exit code 1"
    assert "RuntimeError: no memory" in capfd.readouterr().err
    silent = "import os; os._exit(7)"
    assert sweep.train_point([sys.executable, "-c", silent]) == "train.py ended with exit code 7"
    assert sweep.train_point([sys.executable, "-c", ""]) is None
