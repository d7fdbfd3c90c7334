"""Several processes: who gets which chunks, and two real ones (gloo, on the CPU) against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLOCK, ROOT, rows_of, timeless, tiny_config

import train
from babyllama.config import ConfigError, check_config
from babyllama.training import distributed
from babyllama.training.run_dir import MANIFEST, METRICS_FILE, checkpoints

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


@pytest.fixture
def processes(monkeypatch):
    """processes(4, rank=1): this process takes itself for the second of four."""

    def pretend(count, rank=0):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", str(rank))

    return pretend


# ---- who gets what ------------------------------------------------------------------------------


class Shuffled:
    """The numbers 0 to n - 1 in a fixed order."""

    def __init__(self, n):
        self.order = np.random.default_rng(n).permutation(n).tolist()

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


def by_step(dealt: list[list[list[int]]], accumulation: int) -> list[list[int]]:
    """The chunks of each optimiser step, of all processes together, from the batches of each."""
    rounds = len(dealt[0])
    return [
        sorted(
            i for batches in dealt for batch in batches[start : start + accumulation] for i in batch
        )
        for start in range(0, rounds, accumulation)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (3, 1), (1, 3), (1, 1)])
def test_each_chunk_goes_to_one_process_once(processes, count, batch_size, accumulation):
    per_step = count * batch_size * accumulation
    for n in range(count, 3 * per_step + count + 2):
        order, dealt = Shuffled(n), []
        for rank in range(count):
            processes(count, rank)
            dealer = distributed.ExactBatchSampler(order, batch_size, accumulation)
            dealt.append(list(dealer))
            assert len(dealer) == len(dealt[-1])
        assert len({len(batches) for batches in dealt}) == 1, (
            "all processes take the same number of batches"
        )
        assert sorted(i for batches in dealt for batch in batches for i in batch) == list(range(n))
        assert all(batch for batches in dealt for batch in batches), "an empty batch"
        left = n % per_step
        largest = max(len(batch) for batches in dealt for batch in batches)
        assert largest <= batch_size + (0 < left < count or batch_size == 1)
        steps = by_step(dealt, accumulation)
        expected = [sorted(order.order[i : i + per_step]) for i in range(0, n, per_step)]
        if 0 < left < count and len(expected) > 1:  # too few for a step of their own
            expected[-2:] = [sorted(expected[-2] + expected[-1])]
        assert steps == expected
        assert len(steps) == distributed.steps_per_epoch(n, per_step)
        for done in range(2 * len(steps) + 1):
            assert distributed.chunks_after(done, n, per_step) == sum(
                len(step) for step in (2 * steps)[:done]
            )


def test_more_processes_than_chunks(processes):
    processes(4)
    with pytest.raises(ValueError, match="3 chunks for 4 processes"):
        distributed.ExactBatchSampler(Shuffled(3), 1, 1)


def test_one_process_needs_nothing():
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
        "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, also where there is a GPU
    }
    command = [sys.executable, *LAUNCHERS[launcher], str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file, corpus_dir) -> Path:
    """A folder with pair.yaml, models/one (one process, twice the accumulation) and the runs of two_processes.py."""
    root = tmp_path_factory.mktemp("ranks")
    config = tiny_config(root, tokenizer_file, corpus_dir, data__eval_samples=21, training__batch_size=4,
                         training__gradient_accumulation_steps=2, training__logging_steps=1, training__save_steps=14)  # fmt: skip
    path = root / "pair.yaml"
    path.write_text(yaml.safe_dump(config))
    one = ["--config", path, "--model-name", "one", "--gradient-accumulation-steps", 4]
    done = launch("python", "train.py", *one, cache=root / "cache")
    assert done.returncode == 0, done.stderr[-4000:]
    done = launch("torchrun", "tests/training/two_processes.py", path, root, cache=root / "cache-two")
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def weights_of(run_dir: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run_dir / "model.safetensors")


@pytest.mark.parametrize("name", ["llama-before", "fsdp-before"])
def test_two_processes_are_one_with_twice_the_accumulation(folder, name):
    one, two = rows_of(folder / "models" / "one"), rows_of(folder / "models" / name)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert len([row for row in one if "loss" in row]) == 24, "186 chunks by 16, twice"
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - CLOCK - {"epoch", "samples"}:  # an epoch is counted in batches
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
    assert two[-1]["tokens"] == 2 * 186 * 32
    a, b = weights_of(folder / "models" / "one"), weights_of(folder / "models" / name)
    assert a.keys() == b.keys()
    assert max(np.abs(a[key] - b[key]).max() for key in a) < 1e-4


def test_shards_in_half_precision_have_sums_in_float32(folder):
    """The mean loss of the first step: a sum over some thousand tokens in bf16 would be off by up to 4e-3."""
    one, half = rows_of(folder / "models" / "one")[0], rows_of(folder / "models" / "fsdp-half")[0]
    assert half["loss"] == pytest.approx(one["loss"], rel=5e-4)


def test_two_processes_leave_one_set_of_files(folder):
    one, two = (
        {p.name for p in (folder / "models" / name).iterdir()} for name in ("one", "llama-before")
    )
    assert one == two
    files = {p.name for p in (folder / "models" / "llama-before" / "checkpoint-14").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", MANIFEST} <= files
    sealed = json.loads(
        (folder / "models" / "llama-before" / "checkpoint-14" / MANIFEST).read_text()
    )["files"]
    assert set(sealed) == files - {MANIFEST}, "sealed before every process had written"
    metrics = json.loads((folder / "models" / "llama-before" / METRICS_FILE).read_text())
    assert metrics["plan"]["processes"] == 2
    assert metrics["plan"]["tokens_per_step"] == 4 * 2 * 2 * 32
    assert metrics["plan"]["steps"] == 24
    assert metrics["results"]["tokens_trained"] == 2 * 186 * 32
    assert metrics["results"]["tokens_per_second"] > 0
    assert len(list((folder / "cache-two").glob("*.arrow"))) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "fsdp"])
def test_two_processes_resume_exactly(folder, name):
    """gpt2 has dropout: each process must find its own random numbers again."""
    before, after = folder / "models" / f"{name}-before", folder / "models" / name
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    first, second = (timeless(rows_of(folder)) for folder in (before, after))
    assert first == second


def test_a_nan_in_one_process_ends_both(folder):
    assert not checkpoints(folder / "models" / "nan")
    assert [row["step"] for row in rows_of(folder / "models" / "nan")] == [1, 2]


def test_one_process_does_not_go_on_with_the_run_of_two(folder, capsys, monkeypatch):
    monkeypatch.setenv("BABYLLAMA_CACHE", str(folder / "cache"))
    arguments = ["--config", str(folder / "pair.yaml"), "--model-name", "llama"]
    for flags in ([], ["--resume_from_checkpoint", "latest"]):
        assert train.main([*arguments, *flags]) == 2
        assert "processes: was 2, is 1" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_mistake_is_one_line_and_ends_all(launcher, folder):
    """The launcher adds its own report, with the code of each process, and exits with 1."""
    config = folder / "pair.yaml"
    done = launch(launcher, "train.py", "--config", config, "--model-name", "no", "--set", "data.train_path=nowhere",
                  cache=folder / "cache")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "error: nowhere not found (data.train_path): prepare the text first" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (folder / "models" / "no").exists()


def test_sharding_goes_with_what_was_tried():
    config = yaml.safe_load((ROOT / "config" / "llama-10M.yaml").read_text())
    for key, value in (("ema", 0.99), ("optimizer", "muon")):
        wrong = {**config, "training": {**config["training"], "fsdp": True, key: value}}
        with pytest.raises(
            ConfigError, match=f"training.fsdp: true does not go with training.{key}: {value}"
        ):
            check_config(wrong)


def test_accelerate_does_not_shard_its_own_way(processes, monkeypatch, capsys):
    processes(2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train.main(["--config", "any.yaml"]) == 2
    assert "use --set training.fsdp=true" in capsys.readouterr().err
