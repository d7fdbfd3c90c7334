"""Sweeps over real tiny models: the grid, what is refused, what is kept, resumed and shown."""

import argparse
import gc
import json
import shutil

import pytest
import torch
import yaml
from test_train import errors_of

import train
from babyllama.config import ConfigError, set_key
from babyllama.training import sweep
from babyllama.training.run_dir import LOG_FILE, MANIFEST, METRICS_FILE, RESULTS, checkpoints
from babyllama.training.trainer import LMTrainer


@pytest.fixture
def swept(config_file, tmp_path):
    """swept({"training.lr": [...]}, "--flag"): runs train.py with this grid; swept.folder is where its runs lie."""
    path = config_file(training__num_epochs=1, training__gradient_accumulation_steps=1)

    def run(grid: dict, *flags: str) -> int:
        (tmp_path / "sweep.yaml").write_text(
            grid if isinstance(grid, str) else yaml.safe_dump(grid, sort_keys=False)
        )
        return train.main(["--config", str(path), "--sweep", str(tmp_path / "sweep.yaml"), *flags])

    run.config, run.folder = path, tmp_path / "models" / "tiny-sweep"
    return run


def test_the_grid_is_every_combination_by_name(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "training.lr: [3e-4, 1e-3]\ndata.train_path: [a/b, c]\nmodel.tie_word_embeddings: [true]\n"
    )
    grid = sweep.read_grid(path)
    points = sweep.points_of(grid)
    assert [tuple(point.values()) for point in points] == [
        (3e-4, "a/b", True), (3e-4, "c", True), (1e-3, "a/b", True), (1e-3, "c", True)
    ]  # fmt: skip
    names = [sweep.name_of("tiny", point) for point in points]
    assert names[0] == "tiny-lr0.0003-train_patha-b-tie_word_embeddingstrue"
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training.lr: 1e-3", "training.lr: 0.001 is not a list of values"),
        ("training.lr: [1e-3, 0.001]", "training.lr: a value stands twice"),
        ("lr: [1e-3]", "lr: is not of the form section.key"),
        ("model.name: [a, b]", "model.name: cannot be swept over"),
        ("[1, 2]", "not a sweep; it holds lines such as"),
        ("data.train_path: [a/b, a-b]", "several runs would be named tiny-train_patha-b"),
    ],
)
def test_a_malformed_sweep_is_refused(swept, text, said, capsys):
    assert swept(text) == 2
    (line,) = errors_of(capsys)
    assert said in line


def test_every_configuration_is_checked_before_the_first_run(swept, capsys):
    grid = {
        "training.lr": [1e-3, 2.0],
        "model.n_head": [4, 5],
        "training.epochs": [1],
        "data.eval_path": ["nowhere"],
    }
    assert swept(grid) == 2
    lines = errors_of(capsys)
    assert sum("training.epochs: unknown key" in line for line in lines) == 1, "said once, for all"
    assert not any("nowhere not found" in line for line in lines), (
        "a wrong configuration is not looked at further"
    )
    (lr,) = (line for line in lines if "training.lr: 2.0 is not allowed" in line)
    assert lr.startswith(
        f"error: {swept.folder.parent.parent / 'sweep.yaml'}: training.lr=2, model.n_head=4, "
    )
    assert any(
        "model.hidden_size: 32: hidden_size must be divisible by n_head (5)" in line
        for line in lines
    )
    assert len(lines) == 3
    assert not swept.folder.exists()


def test_what_does_not_go_with_a_sweep(swept, capsys, monkeypatch):
    assert swept({"training.lr": [1e-3]}, "--resume_from_checkpoint", "latest") == 2
    assert "a sweep goes on by itself" in errors_of(capsys)[0]
    args = train.make_parser().parse_args(["--config", str(swept.config), "--sweep", "sweep.yaml"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--sweep: runs in one process, not in 2"):
        sweep.run_sweep(args, train.checked_config, train.attempt)


def test_a_sweep_from_the_first_run_to_the_table(swept, capsys):
    grid = {"training.lr": [1e-3, 5e-3], "model.n_layer": [1, 2]}
    assert swept(grid, "--dry-run") == 0
    assert "tiny-lr0.005-n_layer1: training.lr=0.005, model.n_layer=1" in capsys.readouterr().out
    assert not swept.folder.exists()

    gc.collect()
    gc.disable()  # what is free after the sweep was freed by it
    try:
        assert swept(grid) == 0
        alive = {type(o).__name__ for o in gc.get_objects()}
    finally:
        gc.enable()
    assert not {"LMTrainer", "LlamaForCausalLM"} & alive, "a model of the sweep is still in memory"
    out = capsys.readouterr().out
    assert "run 1 of 4: training.lr=0.001, model.n_layer=1" in out
    assert "run 4 of 4, about " in out
    document = json.loads((swept.folder / sweep.RESULTS).read_text())
    assert document["grid"] == grid
    rows = document["runs"]
    assert [tuple(row["values"].values()) for row in rows] == [
        (1e-3, 1),
        (1e-3, 2),
        (5e-3, 1),
        (5e-3, 2),
    ]
    for row in rows:
        metrics = json.loads((swept.folder / row["name"] / METRICS_FILE).read_text())
        assert {
            key: metrics["config"][key.split(".")[0]][key.split(".")[1]] for key in grid
        } == row["values"]
        assert all(row[key] == metrics["results"][key] for key in sweep.COLUMNS)
    losses = {row["name"]: row["eval_bits_per_byte"] for row in rows}
    assert losses[document["best"]] == min(losses.values())
    lines = (swept.folder / sweep.TABLE).read_text().splitlines()
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
    assert [line.split()[:2] for line in lines[1:]] == [
        ["0.001", "1"],
        ["0.001", "2"],
        ["0.005", "1"],
        ["0.005", "2"],
    ]
    assert [line.endswith("best") for line in lines[1:]] == [
        row["name"] == document["best"] for row in rows
    ]
    assert "\n".join(lines) in out
    assert (swept.folder / sweep.PLOT).read_bytes().startswith(b"\x89PNG")

    # the run of a grid point is the run that the same configuration makes alone
    alone = ["--lr", "5e-3", "--set", "model.n_layer=2", "--model-name", "alone"]
    assert train.main(["--config", str(swept.config), *alone]) == 0
    weights = [
        folder / "model.safetensors"
        for folder in (swept.folder / rows[3]["name"], swept.folder.parent / "alone")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    # again: all are shown, none is trained
    before = {path: path.stat().st_mtime_ns for path in swept.folder.glob("*/*")}
    assert swept(grid) == 0
    assert capsys.readouterr().out.count("already trained") == 4
    assert {path: path.stat().st_mtime_ns for path in swept.folder.glob("*/*")} == before


def test_a_best_value_at_the_edge_is_pointed_out():
    grid = {
        "training.lr": [1e-3, 3e-3, 1e-2],
        "model.n_layer": [1, 2, 3],
        "training.optimizer": ["a", "b", "c"],
    }
    points = sweep.points_of(grid)
    for lr, layers, expected in ((1e-2, 2, ["training.lr: the largest value, 0.01,"]), (3e-3, 2, []),
                                 (1e-3, 3, ["training.lr: the smallest", "model.n_layer: the largest value, 3,"])):  # fmt: skip
        rows = [
            {"name": str(i), "values": p, "eval_bits_per_byte": 1.0} for i, p in enumerate(points)
        ]
        at = points.index({"training.lr": lr, "model.n_layer": layers, "training.optimizer": "a"})
        rows[at]["eval_bits_per_byte"] = 0.5
        lines = sweep.edges(grid, [*rows, {"name": "x", "values": points[0], "error": "no memory"}])
        assert len(lines) == len(expected)
        assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert sweep.edges(grid, [{"name": "x", "values": points[0], "error": "no memory"}]) == []


def unfinished(run_dir) -> None:
    """A finished run as it was before its last checkpoint."""
    shutil.rmtree(checkpoints(run_dir)[0])
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def test_interrupted_runs_go_on_or_begin_anew(swept, capsys):
    grid = {"training.seed": [1, 2]}
    assert swept(grid) == 0
    first, second = (swept.folder / f"tiny-seed{seed}" for seed in (1, 2))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] != weights[1]
    unfinished(first)
    unfinished(second)
    (checkpoints(second)[0] / MANIFEST).unlink()  # not saved to its end
    capsys.readouterr()
    assert swept(grid) == 0
    assert [(folder / "model.safetensors").read_bytes() for folder in (first, second)] == weights
    steps = [json.loads(line)["step"] for line in (first / LOG_FILE).read_text().splitlines()]
    assert steps == sorted(steps)
    unfinished(second)
    for folder in checkpoints(second):  # only a milestone of BabyLM's is left
        shutil.rmtree(folder)
    (second / "chck_1M").mkdir()
    assert swept(grid) == 0
    assert (second / "model.safetensors").read_bytes() == weights[1]
    assert swept({"training.seed": [1]}, "--lr", "1e-3") == 2
    assert "training.lr: was 0.003, is 0.001" in (swept.folder / sweep.TABLE).read_text()


def test_values_reach_the_runs_as_they_are(tmp_path):
    text = 'a "path" with 😀, é and \\'
    (first, *_) = sweep.variant(
        argparse.Namespace(set=None), {"data.train_path": text}, "x", tmp_path
    ).set
    raw = {}
    set_key(raw, first)
    assert raw == {"data": {"train_path": text}}


def test_ctrl_c_ends_the_sweep_and_keeps_what_is_done(swept, capsys, monkeypatch):
    step, steps = LMTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if steps.count(3) == 2:  # in the second run
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", interrupted)
    assert swept({"training.seed": [1, 2, 3]}) == 130
    assert "interrupted in run 2 of 3; the same command goes on" in capsys.readouterr().out
    assert [
        row["name"] for row in json.loads((swept.folder / sweep.RESULTS).read_text())["runs"]
    ] == ["tiny-seed1"]


def test_a_failed_run_does_not_lose_the_others(swept, corpus_dir, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.train").write_text("Only this.")
    grid = {"data.train_path": [str(tmp_path / "few"), str(corpus_dir / "train")]}
    assert swept(grid) == 2
    failed, done = json.loads((swept.folder / sweep.RESULTS).read_text())["runs"]
    assert "do not fill one chunk of 32" in failed["error"]
    assert done["eval_loss"] > 0 and "error" not in done
    lines = (swept.folder / sweep.TABLE).read_text().splitlines()
    assert "failed: train: " in lines[1] and lines[2].endswith("best")
    assert len(errors_of(capsys)) == 1


def test_a_run_without_memory_is_one_that_failed(swept, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LMTrainer, "training_step", full)
    assert swept({"training.seed": [1, 2]}) == 2
    assert len(errors_of(capsys)) == 2
    assert (swept.folder / sweep.TABLE).read_text().count(
        "the same step fits in less with --batch-size 4"
    ) == 2
    assert not (swept.folder / sweep.PLOT).exists()


def test_a_sweep_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such"):
        sweep.read_grid(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError):
        (tmp_path / "empty.yaml").write_text("")
        sweep.read_grid(str(tmp_path / "empty.yaml"))
