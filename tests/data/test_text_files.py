"""Files of a split are found by their names, and a name gives the domain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_file

from babyllama.data.text_files import domain_of, find_files


def test_find_files_returns_the_files_of_a_split_sorted(tmp_path):
    names = "b.train a/z.train a/y.TRAIN.gz c.dev d.test e.txt f.jsonl .hidden.train x.train/in.txt"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.train")

    def find_names(split):
        return [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, split)]

    train_names = "a/y.TRAIN.gz a/z.train b.train e.txt f.jsonl x.train/in.txt"
    assert find_names("train") == train_names.split()
    dev_names = ["c.dev", "e.txt", "f.jsonl", "x.train/in.txt"]
    assert find_names("dev") == dev_names
    assert find_names("validation") == dev_names
    (tmp_path / "c.dev").unlink()
    assert find_names("validation")[0] == "d.test"
    assert find_files(tmp_path / "b.train", "dev") == [tmp_path / "b.train"]


INTERRUPTED_WRITE = """
import os, signal, sys
from pathlib import Path
from babyllama.files import atomic_write
with atomic_write(Path(sys.argv[1])) as draft:
    draft.write_text("half a text")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_find_files_ignores_what_a_killed_process_left_behind(tmp_path):
    text_file = write_file(tmp_path, "synthetic.train", "a text")
    command = [sys.executable, "-c", INTERRUPTED_WRITE, str(text_file)]
    process = subprocess.run(command, cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("synthetic.train"))) == 2
    assert find_files(tmp_path, "train") == [text_file]


def test_find_files_lists_expected_and_existing_files(tmp_path):
    write_file(tmp_path, "notes.md", "x")
    with pytest.raises(FileNotFoundError, match=r"\.dev.*\.test.*\.txt.*\.jsonl.*notes\.md"):
        find_files(tmp_path, "validation")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_files(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("Open_Subtitles.train.gz", "open_subtitles"),
        ("qed.dev", "qed"),
        ("my.book.txt", "my.book"),
        ("a.jsonl.gz", "a"),
        ("b", "b"),
    ],
)
def test_the_domain_is_the_file_name_without_its_endings(name, domain):
    assert domain_of(Path("x.train", name)) == domain


@pytest.mark.parametrize("name", [
    "childes.train", "childes.train.txt", "CHILDES.dev.txt", "childes.test", "childes.train.jsonl",
    "childes.train.txt.gz", "childes.txt", "childes.jsonl.gz", "childes.train.parquet",
    "childes-00000-of-00003.parquet",
])  # fmt: skip
def test_every_name_of_babylm_has_its_domain(name):
    assert domain_of(Path("some.dir", name)) == "childes"


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("corpora/Stories/train/data-00000-of-00001.arrow", "stories"),
        ("corpora/stories/data/train-00000-of-00001.parquet", "stories"),
        ("corpora/stories/validation-00000-of-00002-a09b74b3ef9c3b56.parquet", "stories"),
        ("corpora/stories/test.parquet", "stories"),
        ("corpora/stories/data/poems-00000-of-00001.parquet", "poems"),
        ("corpora/stories/train.txt", "train"),
        ("/data/train/data.arrow", "data"),
    ],
)
def test_the_domain_of_a_saved_dataset_is_the_name_of_its_folder(path, domain):
    assert domain_of(path) == domain


@pytest.mark.parametrize("name", ["a.valid", "a.validation", "a.validation.txt", "a.valid.jsonl.gz",
                                  "validation.parquet", "valid-00000-of-00001.parquet"])  # fmt: skip
def test_validation_in_a_name_is_the_dev_split(name, tmp_path):
    write_file(tmp_path, name, "text")
    assert [path.name for path in find_files(tmp_path, "dev")] == [name]
    with pytest.raises(FileNotFoundError):
        find_files(tmp_path, "train")


def test_a_split_in_the_name_keeps_a_txt_file_out_of_the_other_split(tmp_path):
    for name in ("a.train.txt", "a.dev.txt", "b.txt", "c.test.jsonl"):
        write_file(tmp_path, name, "text")
    names = {split: [p.name for p in find_files(tmp_path, split)] for split in ("train", "dev")}
    assert names == {"train": ["a.train.txt", "b.txt"], "dev": ["a.dev.txt", "b.txt"]}
