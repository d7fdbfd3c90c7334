"""Files that are written completely or not at all, and folders that one process writes to."""

import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from babyllama import files
from babyllama.runs.run_dir import check_output_dir


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old\n")
    with pytest.raises(RuntimeError), files.atomic_write(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_a_folder(tmp_path):
    for content in ("old", "new"):
        with files.atomic_write(tmp_path / "out") as draft:
            draft.mkdir()
            (draft / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": math.nan})
    assert not (tmp_path / "a.json").exists()
    undefined = []
    value = {"a": {"b": math.inf, "c": 1.5}, "d": [math.nan, 2.0]}
    clean = files.nan_to_null(value, "", undefined)
    assert clean == {"a": {"b": None, "c": 1.5}, "d": [None, 2.0]}
    assert undefined == ["a.b", "d"]


@pytest.mark.parametrize(
    ("content", "is_replaced"),
    [
        (None, True),
        ("", True),
        ('{"results": {}}', True),
        ('{"other": 1}', False),
        ("3", False),
        ("my notes", False),
    ],
)
def test_only_results_are_replaced_by_results(tmp_path, content, is_replaced):
    file = tmp_path / "new" / "results.json"
    if content is not None:
        file.parent.mkdir()
        file.write_text(content)
    if is_replaced:
        files.check_results_file(file, "--output")
        assert file.parent.is_dir()
    else:
        with pytest.raises(ValueError, match="not written by this script; name another file with"):
            files.check_results_file(file, "--output")


def test_a_folder_is_locked_while_the_block_runs(tmp_path):
    folder = tmp_path / "new"
    with files.exclusive_folder(folder, ""):
        with (
            pytest.raises(ValueError, match=rf"is writing there \(process {os.getpid()} on "),
            files.exclusive_folder(folder, ""),
        ):
            pass
        assert folder.is_dir(), "the second call must not delete it"
        check_output_dir(folder, [])  # the lock is not taken for somebody's file
    with files.exclusive_folder(folder, ""):
        pass


def test_the_lock_leaves_no_file_and_no_empty_folder(tmp_path):
    with files.exclusive_folder(tmp_path / "empty", ""):
        pass
    with files.exclusive_folder(tmp_path / "filled", ""):
        (tmp_path / "filled" / "a").touch()
    (tmp_path / "older").mkdir()
    with files.exclusive_folder(tmp_path / "older", ""):
        pass
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "filled",
        "filled/a",
        "older",
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_orphaned_workers_do_not_hold_the_lock(tmp_path):
    """Workers of a data loader outlive a run that was killed; they do not inherit it."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from babyllama.files import exclusive_folder\n"
        "reader, writer = os.pipe()\n"
        "with exclusive_folder(Path(sys.argv[1]), ''):\n"
        "    if os.fork() == 0: os.write(writer, b'1'); time.sleep(3); os._exit(0)\n"
        "    os.read(reader, 1)\n"  # the worker runs
        "    os._exit(9)"
    )
    folder = tmp_path / "run"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=False)
    with files.exclusive_folder(folder, ""):
        assert str(os.getpid()) in (folder / files.OWNER_FILE).read_text()


def test_the_environment_is_json():
    environment = json.loads(json.dumps(files.describe_environment("cpu")))
    assert environment["device"].startswith("CPU, ")
    assert {"python", "torch", "transformers", "platform", "git_hash"} <= environment.keys()
