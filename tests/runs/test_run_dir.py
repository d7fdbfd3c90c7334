"""Run directories of real tiny runs: what a new run replaces, and what it leaves alone."""

import gc

from conftest import back_to_checkpoint, errors_of

import train
from babyllama.files import exclusive_folder
from babyllama.runs.run_dir import MEASURED


def test_overwrite_deletes_old_measurements_but_no_other_files(finished_copy):
    config_path, run_dir = finished_copy
    for name in MEASURED:
        (run_dir / name).write_text("of the old weights")
    (run_dir / "thesis.txt").write_text("mine")
    assert train.main(["--config", str(config_path), "--overwrite", "--num-epochs", "1"]) == 0
    assert not any((run_dir / name).exists() for name in MEASURED)
    assert (run_dir / "thesis.txt").is_file()


def test_weights_get_the_permissions_of_the_other_files(finished):
    _, run_dir = finished
    weights = list(run_dir.rglob("*.safetensors"))
    assert len(weights) > 1
    assert {path.stat().st_mode for path in weights} == {(run_dir / "config.json").stat().st_mode}


def test_a_directory_with_other_files_is_not_replaced(config_file, tmp_path, capsys):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "thesis.tex").write_text("years of work")
    assert train.main(["--config", str(config_file()), "--overwrite"]) == 2
    assert "was not written by this script" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "models" / "tiny").iterdir()] == ["thesis.tex"]


def test_hidden_files_of_the_user_stay(config_file, tmp_path):
    folder = tmp_path / "models" / "tiny" / ".git.disabled"
    folder.mkdir(parents=True)
    files = [folder / "HEAD", folder.with_name(".gitkeep")]
    for file in files:
        file.write_text("mine")
    assert train.main(["--config", str(config_file(training__max_steps=1))]) == 0
    assert [file.read_text() for file in files] == ["mine", "mine"]


def test_a_directory_locked_by_another_process_stays_untouched(finished_copy, capsys):
    config_path, run_dir = finished_copy
    back_to_checkpoint(run_dir)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for flags in (["--overwrite"], ["--resume-from-checkpoint", "latest"]):
        with exclusive_folder(run_dir, ""):  # a second lock fails, in the same process too
            assert train.main(["--config", str(config_path), *flags]) == 2
        (line,) = errors_of(capsys)
        assert "another process is writing there (process " in line
        assert "wait until it ends, or choose another --model-name" in line
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert train.main(["--config", str(config_path), *flags]) == 0


def test_persistent_workers_do_not_keep_the_lock(config_file):
    path = config_file(training__num_epochs=1)
    arguments = ["--config", str(path), "--dataloader-num-workers", "1"]
    gc.disable()  # the workers are in a reference cycle
    try:
        assert train.main(arguments) == 0
        assert train.main([*arguments, "--overwrite"]) == 0
    finally:
        gc.enable()
