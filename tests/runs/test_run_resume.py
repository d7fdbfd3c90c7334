"""Runs that find an earlier run in their directory: shown, refused, replaced or resumed."""

import json

import pytest
import yaml
from conftest import back_to_checkpoint, errors_of, rows_of, timeless

import train
from babyllama.model_dir import is_model
from babyllama.runs.checkpoints import checkpoint_error, checkpoint_step, checkpoints
from babyllama.runs.resume import resolve_checkpoint
from babyllama.runs.run_dir import (
    CONFIG_FILE,
    DATA_REPORT_FILE,
    LOG_FILE,
    METRICS_FILE,
    RESULTS,
    start_run_dir,
)


def test_running_again_shows_the_finished_run(finished_copy, capsys):
    config_path, run_dir = finished_copy
    before = {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    assert train.main(["--config", str(config_path)]) == 0
    assert "already trained" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()} == before
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    for key in ("steps", "steps_run", "epochs"):  # runs of older versions lack them
        del metrics["results"][key]
    (run_dir / METRICS_FILE).write_text(json.dumps(metrics))
    assert train.main(["--config", str(config_path)]) == 0


def test_a_different_run_of_the_same_name_needs_overwrite(finished_copy, capsys):
    config_path, run_dir = finished_copy
    weights = (run_dir / "model.safetensors").read_bytes()
    assert train.main(["--config", str(config_path), "--lr", "1e-3"]) == 2
    error = capsys.readouterr().err
    assert "training.lr: was 0.003, is 0.001" in error
    assert "--overwrite" in error
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert train.main(["--config", str(config_path), "--lr", "1e-3", "--overwrite"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() != weights


def test_a_run_from_before_a_key_existed_had_its_default(finished_copy, capsys):
    config_path, run_dir = finished_copy
    config = yaml.safe_load((run_dir / CONFIG_FILE).read_text())
    del config["training"]["max_grad_norm"]
    (run_dir / CONFIG_FILE).write_text(yaml.safe_dump(config))
    assert train.main(["--config", str(config_path)]) == 0
    assert "already trained" in capsys.readouterr().out
    other = ["--config", str(config_path), "--set", "training.max_grad_norm=2"]
    assert train.main(other) == 2
    assert "training.max_grad_norm: was 1.0, is 2.0" in capsys.readouterr().err


def test_resume_is_suggested_only_if_it_would_work(finished_copy, capsys):
    config_path, run_dir = finished_copy
    assert train.main(["--config", str(config_path), "--lr", "1e-3"]) == 2
    assert "--resume-from-checkpoint" not in capsys.readouterr().err
    assert train.main(["--config", str(config_path), "--num-epochs", "3"]) == 2
    assert "add --resume-from-checkpoint latest to resume it" in capsys.readouterr().err
    resume = ["--num-epochs", "3", "--resume-from-checkpoint", "latest"]
    assert train.main(["--config", str(config_path), *resume]) == 0


@pytest.mark.parametrize("name", [CONFIG_FILE, DATA_REPORT_FILE, METRICS_FILE])
@pytest.mark.parametrize("text", ["", "a: [", "- a", '{"a": 1'])
def test_a_corrupted_run_file_is_a_one_line_error(finished_copy, name, text, capsys):
    config_path, run_dir = finished_copy
    (run_dir / name).write_text(text)
    assert train.main(["--config", str(config_path)]) == 2
    (line,) = errors_of(capsys)
    assert f"{run_dir / name} is corrupted" in line and "--overwrite" in line


def test_metrics_without_results_are_a_one_line_error(finished_copy, capsys):
    (finished_copy[1] / METRICS_FILE).write_text('{"results": 3}')
    assert train.main(["--config", str(finished_copy[0])]) == 2
    assert "training_metrics.json is corrupted" in capsys.readouterr().err


def test_a_run_that_saved_nothing_can_be_replaced(config_file, tmp_path):
    config = train.load_config(config_file())
    run_dir = tmp_path / "models" / "tiny"
    start_run_dir(run_dir, config, {"train": {}}, checkpoint=None)
    report = {"train": {"words": 1}}
    assert resolve_checkpoint(run_dir, config, report, resume=None, overwrite=False) is None


# ---- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_resume_is_exact(kind, config_file, tmp_path):
    dropout = {"model__resid_pdrop": 0.1, "model__embd_pdrop": 0.1} if kind == "GPT2" else {}
    path = config_file(model__type=kind, **dropout)
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    weights = (run_dir / "model.safetensors").read_bytes()
    log = rows_of(run_dir)
    results = json.loads((run_dir / "training_metrics.json").read_text())["results"]
    back_to_checkpoint(run_dir)
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights

    assert timeless(rows_of(run_dir)) == timeless(log)
    again = json.loads((run_dir / "training_metrics.json").read_text())["results"]
    assert again["eval_loss"] == results["eval_loss"]


def test_resume_at_the_last_step_only_writes_the_results(config_file, tmp_path, capsys):
    """The run was killed after its last checkpoint; fewer steps than that are refused."""
    path = str(config_file(training__lr_scheduler="constant"))
    run_dir = tmp_path / "models" / "tiny"
    steps = ["--set", "training.max_steps=10"]  # in the second epoch
    assert train.main(["--config", path, *steps]) == 0
    assert "\nresume " not in capsys.readouterr().out
    weights = (run_dir / "model.safetensors").read_bytes()
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)
    assert train.main(["--config", path, *steps, "--resume-from-checkpoint", "latest"]) == 0
    assert f"\nresume      from {run_dir / 'checkpoint-10'}; the time" in capsys.readouterr().out
    assert (run_dir / "model.safetensors").read_bytes() == weights
    metrics = json.loads((run_dir / METRICS_FILE).read_text())
    assert metrics["results"]["tokens_trained"] == metrics["plan"]["tokens"]
    fewer = ["--set", "training.max_steps=3", "--resume-from-checkpoint", "latest"]
    assert train.main(["--config", path, *fewer]) == 2
    assert "checkpoint-10 is past the last step of this run, 3" in capsys.readouterr().err
    assert (run_dir / METRICS_FILE).is_file()


def test_resume_at_the_last_step_without_a_log_is_a_one_line_error(config_file, tmp_path, capsys):
    path = str(config_file())
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", path]) == 0
    for name in (*RESULTS, LOG_FILE):
        (run_dir / name).unlink(missing_ok=True)
    assert train.main(["--config", path, "--resume-from-checkpoint", "latest"]) == 2
    (line,) = errors_of(capsys)
    assert "metrics.jsonl is missing" in line
    assert is_model(run_dir)


def test_resume_survives_a_truncated_or_missing_log(config_file, tmp_path):
    path = config_file()
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    log = (run_dir / "metrics.jsonl").read_text()
    for text in (log[: log.index("\n", len(log) // 3) + 40], None):  # in the middle of a line
        from_step = int(back_to_checkpoint(run_dir).partition("-")[2])
        (run_dir / "metrics.jsonl").unlink()
        if text is not None:
            (run_dir / "metrics.jsonl").write_text(text)
        assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        kept = [json.loads(line) for line in (text or "").splitlines()[:-1]]
        assert rows[: len(kept)] == kept
        assert rows[len(kept)]["step"] > from_step

        # tokens between the last kept row and the checkpoint have no time, so they do not count
        tokens = {row["step"]: row["tokens"] for row in map(json.loads, log.splitlines())}
        timed = rows[-1]["tokens"] - tokens[from_step] + (kept[-1]["tokens"] if kept else 0)
        results = json.loads((run_dir / "training_metrics.json").read_text())["results"]
        speed = timed / rows[-1]["seconds"]
        assert results["tokens_per_second"] == pytest.approx(speed, rel=0.01)


def test_resume_from_an_earlier_checkpoint_deletes_later_ones(config_file, tmp_path):
    """The resumed run saves, logs and stops as its new configuration says."""
    path = config_file()
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    newest, earlier = checkpoints(run_dir)
    (run_dir / "training_metrics.json").unlink()
    resume = ["--resume-from-checkpoint", str(earlier), "--num-epochs", "3"]
    intervals = ["--set", "training.save_steps=3", "--set", "training.logging_steps=2"]
    assert train.main(["--config", str(path), *resume, *intervals]) == 0
    assert not newest.exists() or checkpoint_step(newest) % 3 == 0
    assert all(checkpoint_error(folder) is None for folder in checkpoints(run_dir))
    steps = [row["step"] for row in rows_of(run_dir)]
    later = [step for step in steps if step > checkpoint_step(earlier)]
    assert set(later) >= {step for step in range(later[0], later[-1]) if step % 2 == 0}


def test_resume_refuses_a_different_run(finished_copy, capsys):
    config_path, run_dir = finished_copy
    back_to_checkpoint(run_dir)
    resume = ["--config", str(config_path), "--resume-from-checkpoint", "latest"]
    assert train.main([*resume, "--batch-size", "4", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "training.batch_size: was 8, is 4" in error
    assert "training.seed: was 42, is 1" in error
    assert train.main([*resume[:-1], "no/such/place"]) == 2
    assert "no such checkpoint; give its directory or latest" in capsys.readouterr().err
    assert train.main([*resume[:-1], str(run_dir)]) == 2
    assert (
        "is a run directory, not a checkpoint; give one of its checkpoints, such as "
        in capsys.readouterr().err
    )
    assert train.main([*resume, "--overwrite"]) == 2
    assert "choose one" in capsys.readouterr().err
    assert checkpoints(run_dir)


def test_a_checkpoint_of_another_directory_is_refused(finished_copy, capsys):
    config_path, run_dir = finished_copy
    checkpoint = str(checkpoints(run_dir)[0])
    resume = ["--model-name", "new", "--resume-from-checkpoint", checkpoint]
    assert train.main(["--config", str(config_path), *resume]) == 2
    assert "does not belong to this run" in capsys.readouterr().err


def test_a_missing_checkpoint_is_an_error_for_a_finished_run_too(finished_copy, capsys):
    resume = ["--resume-from-checkpoint", str(finished_copy[1] / "checkpoint-9999")]
    assert train.main(["--config", str(finished_copy[0]), *resume]) == 2
    assert "checkpoint-9999: no such checkpoint" in capsys.readouterr().err


def test_resume_without_a_checkpoint_is_an_error(config_file, capsys):
    assert train.main(["--config", str(config_file()), "--resume-from-checkpoint", "latest"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
