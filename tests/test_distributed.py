"""Compare two real processes (gloo on the CPU) with one."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import CLOCK, ROOT, rows_of, timeless, tiny_config

import train
from babyllama import distributed
from babyllama.config import ConfigError, check_config
from babyllama.evaluation.benchmark_config import load_tasks
from babyllama.runs.checkpoints import MANIFEST, checkpoints
from babyllama.runs.run_dir import METRICS_FILE
from benchmark import BenchmarkSuite

LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--main_process_port=0",
    ],
}


def test_one_process_needs_no_process_group():
    with distributed.main_first():
        pass
    distributed.start()
    distributed.barrier()
    assert distributed.all_reduce_sum(3) == 3
    assert distributed.is_main() and distributed.world_size() == 1
    assert not torch.distributed.is_initialized()


# ---- two processes --------------------------------------------------------------------------------


def launch(launcher: str, script: str, *arguments, cache: Path) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "BABYLLAMA_CACHE": str(cache),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, even on a machine with a GPU
    }
    command = [sys.executable, *LAUNCHERS[launcher], str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file, corpus_dir) -> Path:
    """Return a folder with pair.yaml, models/one (one process) and the runs of two_processes.py.

    The one process has twice the accumulation, so its steps are those of the two.
    """
    root = tmp_path_factory.mktemp("two-processes")
    keys = {
        "data__eval_samples": 21,
        "training__batch_size": 4,
        "training__gradient_accumulation_steps": 2,
        "training__logging_steps": 1,
        "training__save_steps": 14,
    }
    config = tiny_config(root, tokenizer_file, corpus_dir, **keys)
    tasks = {"tasks": {"completion": {}}}
    (root / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    path = root / "pair.yaml"
    path.write_text(yaml.safe_dump(config))
    one_process = ["--config", path, "--model-name", "one", "--gradient-accumulation-steps", 4]
    done = launch("python", "train.py", *one_process, cache=root / "cache")
    assert done.returncode == 0, done.stderr[-4000:]
    done = launch("torchrun", "tests/two_processes.py", path, root, cache=root / "cache-two")
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def weights_of(run_dir: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run_dir / "model.safetensors")


@pytest.mark.parametrize("name", ["llama-before", "fsdp-before"])
def test_two_processes_train_like_one_with_twice_the_accumulation(folder, name):
    single_rows = rows_of(folder / "models" / "one")
    pair_rows = rows_of(folder / "models" / name)
    assert [row["step"] for row in single_rows] == [row["step"] for row in pair_rows]
    assert len([row for row in single_rows if "loss" in row]) == 24, "186 chunks by 16, twice"
    for single, pair in zip(single_rows, pair_rows, strict=True):
        for key in single.keys() - CLOCK - {"samples"}:
            assert pair[key] == pytest.approx(single[key], rel=1e-5), (single["step"], key)
    assert pair_rows[-1]["tokens"] == 2 * 186 * 32
    single = weights_of(folder / "models" / "one")
    pair = weights_of(folder / "models" / name)
    assert single.keys() == pair.keys()
    assert max(np.abs(single[key] - pair[key]).max() for key in single) < 1e-4


def test_fsdp_in_bf16_sums_losses_in_float32(folder):
    """A sum over thousands of tokens in bf16 would be off by up to 4e-3 in the first step."""
    one, half = rows_of(folder / "models" / "one")[0], rows_of(folder / "models" / "fsdp-half")[0]
    assert half["loss"] == pytest.approx(one["loss"], rel=5e-4)


def test_two_processes_write_one_set_of_files(folder):
    run_dir = folder / "models" / "llama-before"
    single_run_files = {path.name for path in (folder / "models" / "one").iterdir()}
    assert {path.name for path in run_dir.iterdir()} == single_run_files
    files = {path.name for path in (run_dir / "checkpoint-14").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", MANIFEST} <= files
    sealed_files = json.loads((run_dir / "checkpoint-14" / MANIFEST).read_text())["files"]
    assert set(sealed_files) == files - {MANIFEST}, "sealed before every process wrote its file"
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    assert metrics["plan"]["processes"] == 2
    assert metrics["plan"]["tokens_per_step"] == 4 * 2 * 2 * 32
    assert metrics["plan"]["steps"] == 24
    assert metrics["results"]["tokens_trained"] == 2 * 186 * 32
    assert metrics["results"]["tokens_per_second"] > 0
    assert len(list((folder / "cache-two").glob("*.arrow"))) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "fsdp"])
def test_two_processes_resume_exactly(folder, name):
    """gpt2 has dropout, so each process must restore its random state."""
    before = folder / "models" / f"{name}-before"
    after = folder / "models" / name
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    assert timeless(rows_of(before)) == timeless(rows_of(after))


def test_one_of_two_processes_scores_the_benchmark(folder):
    run_dir = folder / "models" / "rare-rows"
    rows = rows_of(run_dir)
    scored = [row for row in rows if "benchmark/completion" in row]
    assert [row["step"] for row in scored] == [row["step"] for row in rows if "eval_loss" in row]
    (task,) = load_tasks({"tasks": {"completion": {}}}).values()
    result = BenchmarkSuite(run_dir, "cpu").run_items(task)
    assert scored[-1]["benchmark/completion"] == pytest.approx(result["accuracy"])


def test_a_nan_in_one_process_ends_both(folder):
    assert not checkpoints(folder / "models" / "nan")
    rows = rows_of(folder / "models" / "nan")
    assert [(row["step"], row["loss"] is None) for row in rows] == [
        (1, False),
        (2, False),
        (3, True),
    ]


def test_one_process_cannot_resume_a_run_of_two(folder, capsys, monkeypatch):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(folder / "cache"))
    arguments = ["--config", str(folder / "pair.yaml"), "--model-name", "llama"]
    for flags in ([], ["--resume-from-checkpoint", "latest"]):
        assert train.main([*arguments, *flags]) == 2
        assert "processes: was 2, is 1" in capsys.readouterr().err


def test_one_process_may_continue_a_run_of_two_if_it_says_so(folder, monkeypatch):
    """It trains on the other chunks in steps of half the size, and on no chunk twice."""
    monkeypatch.setenv("BABYLLAMA_CACHE", str(folder / "cache"))
    run_dir = folder / "models" / "llama-alone"
    shutil.copytree(folder / "models" / "llama-before", run_dir)
    for name in ("model.safetensors", METRICS_FILE, "README.md"):
        (run_dir / name).unlink()
    newest, earlier = checkpoints(run_dir)
    shutil.rmtree(newest)
    config = yaml.safe_load((run_dir / "training_config.yaml").read_text())
    config["model"]["name"] = run_dir.name
    (run_dir / "training_config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(folder / "pair.yaml"), "--model-name", run_dir.name]
    resume = ["--resume-from-checkpoint", "latest", "--allow-change", "processes"]
    assert train.main([*arguments, *resume]) == 0
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    assert earlier.name == "checkpoint-14"
    # 12 steps of 16 chunks are an epoch of 186; the second one has two of them, then 8 chunks each
    assert metrics["results"]["steps"] == 14 + math.ceil((186 - 2 * 16) / 8)
    assert metrics["results"]["tokens_trained"] == 2 * 186 * 32
    changes = {row["step"]: row["changes"] for row in rows_of(run_dir) if "changes" in row}
    assert changes == {15: {"processes": [2, 1]}}


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_an_error_is_one_line_and_ends_all_processes(launcher, folder):
    """The launcher adds a report with the exit code of each process, and exits with 1."""
    config = folder / "pair.yaml"
    flags = ["--config", config, "--model-name", "no", "--set", "data.train_path=nowhere"]
    done = launch(launcher, "train.py", *flags, cache=folder / "cache")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert f"error: nowhere not found (data.train_path) in {ROOT}: prepare" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (folder / "models" / "no").exists()


def test_fsdp_rejects_ema_and_muon():
    config = yaml.safe_load((ROOT / "config" / "llama-10M.yaml").read_text())
    for key, value in (("ema", 0.99), ("optimizer", "muon")):
        wrong = {**config, "training": {**config["training"], "fsdp": True, key: value}}
        with pytest.raises(
            ConfigError, match=f"training.fsdp: true does not go with training.{key}: {value}"
        ):
            check_config(wrong)


def test_fsdp_configured_in_accelerate_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train.main(["--config", "any.yaml"]) == 2
    assert "use --set training.fsdp=true" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "is_warned"), [(1, False), (2, True)])
def test_accelerate_that_starts_one_process_for_two_is_noticed(
    count, is_warned, monkeypatch, caplog, tmp_path
):
    """The variables are those that accelerate sets; with --cpu it starts one process, always."""
    flags = f"--cpu --num_processes {count} --num_machines 1 --mixed_precision no"
    command = [*flags.split(), "--dynamo_backend", "no", "train.py"]
    _, variables = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(command))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert ("use torchrun --nproc_per_node=N train.py" in caplog.text) == is_warned
