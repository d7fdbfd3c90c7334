"""Prepare small real files and count everything that the script reports another way."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import sentences
from datasets import Dataset

from babyllama import schema
from babyllama.data.cleaners import create_cleaner_registry
from babyllama.data.tokenizer import load_tokenizer
from babyllama.files import exclusive_folder
from prepare_data import main

VOCAB = 300


def stories(n: int, seed: int) -> list[str]:
    return ["\n".join(sentences(8, seed=100 * seed + i)) for i in range(n)]


@pytest.fixture
def raw(tmp_path) -> Path:
    """raw/train and raw/dev with one domain in each form that people have."""
    root = tmp_path / "raw"
    for split, n, seed in (("train", 12, 1), ("dev", 4, 2)):
        folder = root / split
        folder.mkdir(parents=True)
        (folder / f"gutenberg.{split}").write_text("\n\n\n".join(stories(n, seed)) + "\n")
        wiki = "".join(
            f"= = = Page {i} = = =\n\n{text}\n\n\n" for i, text in enumerate(stories(n, seed + 10))
        )
        (folder / f"wikipedia.{split}.gz").write_bytes(gzip.compress(wiki.encode(), mtime=0))
        rows = [json.dumps({"text": text}) for text in stories(n, seed + 20)]
        (folder / "children_stories.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "letters.txt").write_text("\n\n\n".join(stories(n, seed + 30)))
    return root


@pytest.fixture
def run(raw, tmp_path):
    """run(extra flags) prepares raw/ into out/ and returns the exit code."""

    def call(
        *extra: object, train: Path | None = raw / "train", dev: Path | None = raw / "dev"
    ) -> int:
        argv = [
            "--output-dir",
            tmp_path / "out",
            "--tokenizer-output",
            tmp_path / "m" / "tokenizer.json",
        ]
        argv += ["--tokenizer-vocab", VOCAB]
        argv += ["--babylm-10m", train] if train else []
        argv += ["--babylm-dev", dev] if dev else []
        return main([str(word) for word in (*argv, *extra)])

    return call


def manifest_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(said: str, split: str) -> dict[str, list[str]]:
    """The printed table of one split: first column -> the other cells."""
    lines = said.split("\n")
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == [split, "documents"])
    rows = {}
    for line in lines[start + 1 :]:
        name, *cells = line.split()
        rows[name] = cells
        if name == "total":
            return rows
    raise AssertionError("no total row")


# ---------------------------------------------------------------- files and figures


def test_every_domain_gets_a_clean_file_per_split(run, tmp_path):
    assert run() == 0
    domains = ["children_stories", "gutenberg", "letters", "wikipedia"]
    expected = [
        "manifest.json",
        *(f"{split}/{domain}.{split}" for split in ("dev", "train") for domain in domains),
    ]
    assert set(tree(tmp_path / "out")) == set(expected)
    text = (tmp_path / "out" / "train" / "wikipedia.train").read_text()
    assert (
        text == "\n\n\n".join(stories(12, 11)) + "\n"
    )  # the title lines are gone, nothing else is
    assert (tmp_path / "out" / "train" / "letters.train").read_text() == "\n\n\n".join(
        stories(12, 31)
    ) + "\n"


def test_a_folder_that_another_process_writes_to_is_refused(run, tmp_path, capsys):
    with exclusive_folder(tmp_path / "out", ""):
        assert run() == 2
    error = capsys.readouterr().err
    assert "out: another process is writing there (process " in error
    assert error.endswith("wait until it ends, or give another --output-dir\n")
    assert not tree(tmp_path / "out")
    assert run() == 0


def test_table_and_manifest_have_the_counts_of_the_files(run, raw, tmp_path, capsys):
    assert run() == 0
    captured = capsys.readouterr()
    assert "letters" in captured.err and "no cleaner" in captured.err
    manifest = manifest_of(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "m" / "tokenizer.json")
    for split in ("train", "dev"):
        rows = table(captured.out, split)
        totals = [0, 0, 0, 0]
        for domain, record in manifest["splits"][split]["files"].items():
            path = tmp_path / "out" / record["file"]
            text = path.read_text()
            documents = text.strip().split("\n\n\n")
            tokens = sum(
                len(tokenizer(document, add_special_tokens=False)["input_ids"])
                for document in documents
            )
            counts = [len(documents), len(text.split()), len(text.encode()), tokens]
            assert [record[key] for key in ("documents", "words", "bytes", "tokens")] == counts
            assert rows[domain][:4] == [f"{count:,}" for count in counts]
            kept = sum(len(document.encode()) for document in documents)
            assert float(rows[domain][4]) == pytest.approx(kept / tokens, abs=6e-4)
            assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            for source in record["sources"]:
                data = Path(source["path"]).read_bytes()
                assert (source["sha256"], source["bytes"]) == (
                    hashlib.sha256(data).hexdigest(),
                    len(data),
                )
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
        assert rows["total"][:4] == [f"{count:,}" for count in totals]
    entry = manifest["tokenizer"]
    assert (
        entry["sha256"]
        == hashlib.sha256((tmp_path / "m" / "tokenizer.json").read_bytes()).hexdigest()
    )
    assert entry["vocab_size"] == VOCAB == len(tokenizer)


def test_the_table_shows_the_percentage_that_cleaning_removed(run, raw, tmp_path, capsys):
    assert run("--skip-tokenizer", dev=None) == 0
    rows = table(capsys.readouterr().out, "train")
    read = sum(
        len(f"= = = Page {i} = = =\n\n{text}".encode()) for i, text in enumerate(stories(12, 11))
    )
    kept = sum(len(text.encode()) for text in stories(12, 11))
    assert float(rows["wikipedia"][5]) == pytest.approx(100 * (1 - kept / read), abs=0.4)
    assert rows["gutenberg"][5] == "0.00"
    assert rows["wikipedia"][3:5] == ["-", "-"]  # no tokenizer, no tokens


def test_the_same_input_gives_the_same_files(run, tmp_path):
    assert run() == 0
    first = tree(tmp_path / "out"), tree(tmp_path / "m")
    assert run() == 0
    assert (tree(tmp_path / "out"), tree(tmp_path / "m")) == first


def test_preparing_prepared_text_gives_the_same_files(run, tmp_path):
    assert run("--skip-tokenizer") == 0
    once = tree(tmp_path / "out")
    argv = [
        "--babylm-10m",
        tmp_path / "out" / "train",
        "--babylm-dev",
        tmp_path / "out" / "dev",
        "--skip-tokenizer",
    ]
    assert main([str(word) for word in (*argv, "--output-dir", tmp_path / "again")]) == 0
    twice = tree(tmp_path / "again")
    del once["manifest.json"], twice["manifest.json"]
    assert once == twice


def test_two_empty_lines_separate_documents(run, raw, tmp_path):
    (raw / "train" / "letters.txt").write_text("\n\n one\n\ntwo  \nthree\n\n\n\n\nfour\n \n\n\n")
    for flags in ((), ("--skip-cleaning",)):
        assert run("--skip-tokenizer", *flags) == 0
        text = (tmp_path / "out" / "train" / "letters.train").read_text()
        assert [[line.strip() for line in part.split("\n")] for part in text.split("\n\n\n")] == [
            ["one", "", "two", "three"], ["four", ""],
        ]  # fmt: skip


# ---------------------------------------------------------------- flags


def test_clean_domains_and_skip_cleaning(run, raw, tmp_path, capsys):
    assert "wikipedia" in create_cleaner_registry()
    assert run("--skip-tokenizer", "--clean-domains", "gutenberg,", "children_stories") == 0
    assert "Page 3" in (tmp_path / "out" / "train" / "wikipedia.train").read_text()
    assert run("--skip-tokenizer", "--clean-domains", "wikipedia") == 0
    assert "Page 3" not in (tmp_path / "out" / "train" / "wikipedia.train").read_text()
    assert manifest_of(tmp_path)["splits"]["train"]["files"]["gutenberg"]["cleaner"] is None
    (raw / "train" / "gutenberg.train").write_text("a  b ,  c\n\n\n\n\nd")
    assert run("--skip-tokenizer", "--skip-cleaning") == 0
    assert (tmp_path / "out" / "train" / "gutenberg.train").read_text().startswith("a  b ,  c\n\n")
    assert manifest_of(tmp_path)["splits"]["train"]["cleaner_version"] is None
    capsys.readouterr()
    before = tree(tmp_path / "out")
    assert run("--clean-domains", "wikipedia,poems") == 2
    error = capsys.readouterr().err
    assert "poems" in error and "gutenberg, wikipedia" in error
    assert tree(tmp_path / "out") == before


def test_domain_chooses_the_cleaner_of_a_domain(run, raw, tmp_path, capsys):
    (raw / "train" / "letters.txt").write_text("= One =\na b\n= Two =\nc d\n")
    assert (
        run("--skip-tokenizer", "--domain", "Letters=wikipedia", "--domain", "gutenberg=cbt") == 0
    )
    assert "no cleaner" not in capsys.readouterr().err
    assert (tmp_path / "out" / "train" / "letters.train").read_text() == "a b\n\n\nc d\n"
    records = manifest_of(tmp_path)["splits"]["train"]["files"]
    assert {name: record["cleaner"] for name, record in records.items()} == {
        "children_stories": "children_stories",
        "gutenberg": "cbt",
        "letters": "wikipedia",
        "wikipedia": "wikipedia",
    }


def test_a_gutenberg_book_under_another_name_gets_the_flag_that_cleans_it(
    run, raw, tmp_path, capsys
):
    start, end = (
        f"*** {word} OF THE PROJECT GUTENBERG EBOOK ALICE ***" for word in ("START", "END")
    )
    header = (
        f"The Project Gutenberg eBook of Alice\n\nThis eBook is for the use of anyone.\n\n{start}"
    )
    licence = f"{end}\n\nProject Gutenberg-tm electronic works are free."
    book = "\n\n".join([header, *stories(3, 5), licence])
    (raw / "train" / "book.txt").write_text(book)
    assert run("--skip-tokenizer") == 0
    notes = capsys.readouterr().err
    assert "note: book begins with Project Gutenberg's header; --domain book=gutenberg" in notes
    assert notes.count("Project Gutenberg") == 1  # none about letters
    assert "Gutenberg" in (tmp_path / "out" / "train" / "book.train").read_text()
    assert run("--skip-tokenizer", "--domain", "book=gutenberg") == 0
    assert "Gutenberg" not in capsys.readouterr().err
    text = (tmp_path / "out" / "train" / "book.train").read_text()
    assert text == "\n\n".join(stories(3, 5)) + "\n"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--domain", "letters=poems"], "DOMAIN=CLEANER, and the cleaners are wikipedia, simple"),
        (["--domain", "letters"], "DOMAIN=CLEANER, and the cleaners are wikipedia, simple"),
        (["--domain", "novels=cbt"], "no domain novels, but children_stories, gutenberg, letters"),
        (["--clean-domains", "letters"], "--domain NAME=CLEANER chooses one of wikipedia, simple"),
        (["--domain", "letters=cbt", "--skip-cleaning"], "remove one"),
    ],
)
def test_an_unknown_domain_or_cleaner_is_an_error_that_lists_the_cleaners(
    run, tmp_path, capsys, flags, problem
):
    assert run(*flags) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_documents_that_repeat_one_word_are_counted(run, raw, tmp_path, capsys):
    documents = ["No no NO\n" * 20_000, "yes " * 10, "yes " * 9, "yes " * 10 + "no"]
    (raw / "train" / "letters.txt").write_text("\n\n\n".join(documents))
    assert run("--skip-tokenizer", dev=None) == 0
    assert "letters.train: 2 documents are one word repeated" in capsys.readouterr().out
    assert (
        manifest_of(tmp_path)["splits"]["train"]["files"]["letters"]["documents_of_one_word"] == 2
    )


def test_one_document_per_row_keeps_short_rows_apart(run, raw, tmp_path, capsys):
    tweets = sentences(20)
    Dataset.from_dict({"text": tweets}).to_parquet(raw / "train" / "tweets.parquet")
    assert run("--skip-tokenizer", dev=None) == 0
    assert "20 rows of tables look like lines" in capsys.readouterr().out
    written = tmp_path / "out" / "train" / "tweets.train"
    assert written.read_text() == "\n".join(tweets) + "\n"
    assert run("--skip-tokenizer", "--one-document-per-row", dev=None) == 0
    assert "rows of tables" not in capsys.readouterr().out
    assert written.read_text() == "\n\n\n".join(tweets) + "\n"
    record = manifest_of(tmp_path)["splits"]["train"]
    assert record["files"]["tweets"]["documents"] == 20 and record["one_document_per_row"]


def test_skip_tokenizer_counts_with_the_existing_tokenizer(run, tmp_path, capsys):
    assert run() == 0
    with_new = table(capsys.readouterr().out, "dev")
    tokenizer_before = tree(tmp_path / "m")
    assert run("--skip-tokenizer") == 0
    assert table(capsys.readouterr().out, "dev") == with_new
    assert tree(tmp_path / "m") == tokenizer_before


def test_preparing_one_split_keeps_the_other_and_its_record(run, tmp_path, capsys):
    assert run() == 0
    before = manifest_of(tmp_path)
    assert "earlier run" not in capsys.readouterr().out
    assert run("--skip-cleaning", train=None) == 0
    output = capsys.readouterr().out
    assert "note: train is from an earlier run" in output
    assert "next  python train.py" in output
    after = manifest_of(tmp_path)
    assert after["splits"]["train"] == before["splits"]["train"]
    assert after["word_budget"] == before["word_budget"]
    assert after["splits"]["dev"]["cleaner_version"] is None and after["overlap"] is None


def test_the_next_command_follows_the_track_and_the_tokenizer(run, capsys):
    for flags, name in (([], "llama-10M"), (["--tokenizer-prefix-space"], "babylm-strict-small")):
        assert run(*flags) == 0
        assert f"next  python train.py --config config/{name}.yaml" in capsys.readouterr().out


def test_no_command_is_printed_that_would_miss_a_split(run, tmp_path, capsys):
    assert run(train=None) == 0
    assert "next  " not in capsys.readouterr().out  # there is nothing to train on
    shutil.rmtree(tmp_path / "out")
    assert run(dev=None) == 0
    assert "next  " not in capsys.readouterr().out  # nor here to evaluate on
    assert run(train=None) == 0
    assert f"--set data.eval_path={tmp_path / 'out' / 'dev'}" in capsys.readouterr().out


def test_the_word_budget_of_the_track_is_reported(run, raw, tmp_path, capsys, monkeypatch):
    assert run("--skip-tokenizer") == 0
    captured = capsys.readouterr()
    words = sum(
        len(data.split())
        for name, data in tree(tmp_path / "out").items()
        if name.startswith("train/")
    )
    assert manifest_of(tmp_path)["word_budget"] == {
        "limit_words": 10_000_000,
        "words": words,
        "over_budget": False,
    }
    assert f"{words:,} of 10,000,000" in captured.out and "over the budget" not in captured.err
    monkeypatch.setitem(schema.TRACKS, "strict", words - 7)
    argv = ["--babylm-100m", raw / "train", "--output-dir", tmp_path / "out", "--skip-tokenizer"]
    assert main([str(word) for word in argv]) == 0
    assert "7 words over the budget" in capsys.readouterr().err
    assert manifest_of(tmp_path)["word_budget"]["over_budget"] is True


# ---------------------------------------------------------------- overlap


def test_overlap_of_a_worked_example(run, raw, tmp_path, capsys):
    for split in ("train", "dev"):
        for path in (raw / split).iterdir():
            path.unlink()
    count = [f"w{i}" for i in range(20)]
    train = [" ".join(count), "one two three", "The  SAME\ndocument."]
    dev = [
        " ".join([*count[:14], "different"]),  # 3 runs of 13 words: two of them lie in train
        "the same document.",  # the same but for case and white space
        "one two",
    ]
    (raw / "train" / "letters.train").write_text("\n\n\n".join(train))
    (raw / "dev" / "letters.dev").write_text("\n\n\n".join(dev))
    assert run("--skip-tokenizer") == 0
    assert manifest_of(tmp_path)["overlap"] == {
        "ngram_words": 13, "dev_documents": 3, "dev_documents_in_train": 1, "dev_ngrams": 3, "dev_ngrams_in_train": 2,
        "places": ["dev/letters.dev 2"],
    }  # fmt: skip
    captured = capsys.readouterr()
    assert "1 of 3 documents of dev are in train, 2 of 3 runs of 13 words (66.667%)" in captured.out
    assert (
        "warning: dev documents in train, which inflate held-out scores: dev/letters.dev 2"
        in captured.err
    )
    written, command = captured.out.splitlines()[-2:]
    assert written.startswith(f"wrote {tmp_path / 'out' / 'dev'}/, {tmp_path / 'out' / 'train'}/, ")
    assert command == f"next  python train_tokenizer.py --data-dir {tmp_path / 'out' / 'train'}"


# ---------------------------------------------------------------- what goes wrong


def test_files_that_the_script_did_not_write_are_not_replaced(run, tmp_path, capsys):
    (tmp_path / "out" / "train").mkdir(parents=True)
    mine = tmp_path / "out" / "train" / "gutenberg.train"
    mine.write_text("my own text")
    assert run("--skip-tokenizer") == 2
    error = capsys.readouterr().err
    assert "gutenberg.train" in error and error.count("error: ") == 1
    assert tree(tmp_path / "out") == {"train/gutenberg.train": b"my own text"}
    mine.unlink()
    assert run("--skip-tokenizer") == 0
    mine.write_text(
        mine.read_text() + "edited\n"
    )  # a result that was changed by hand is not thrown away either
    before = tree(tmp_path / "out")
    assert run("--skip-tokenizer") == 2
    assert tree(tmp_path / "out") == before


def test_files_of_an_earlier_run_are_replaced_or_deleted(run, raw, tmp_path):
    assert run("--skip-tokenizer") == 0
    (raw / "train" / "letters.txt").unlink()
    assert run("--skip-tokenizer") == 0
    assert not (tmp_path / "out" / "train" / "letters.train").exists()
    assert (tmp_path / "out" / "dev" / "letters.dev").exists()
    assert "letters" not in manifest_of(tmp_path)["splits"]["train"]["files"]


def test_several_files_of_one_domain_become_one(run, raw, tmp_path):
    (raw / "train" / "gutenberg.txt").write_text("one more story")
    assert run("--skip-tokenizer") == 0
    record = manifest_of(tmp_path)["splits"]["train"]["files"]["gutenberg"]
    assert record["documents"] == 13 and len(record["sources"]) == 2


@pytest.mark.parametrize(
    "case", ["missing", "empty", "no text", "broken", "vocab", "nothing", "in place", "manifest"]
)
def test_a_mistake_gives_one_error_line_and_changes_no_file(case, run, raw, tmp_path, capsys):
    assert run("--skip-tokenizer") == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "letters.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    if case == "manifest":
        (tmp_path / "out" / "manifest.json").write_text("[]")
    before = tree(tmp_path / "out")
    capsys.readouterr()
    code = {
        "missing": lambda: run(train=tmp_path / "nowhere"),
        "empty": lambda: run(train=tmp_path / "empty"),
        "no text": lambda: run(dev=tmp_path / "other"),
        "broken": lambda: run(train=tmp_path / "bad"),
        "vocab": lambda: run("--tokenizer-vocab", "100"),
        "nothing": lambda: run(train=None, dev=None),
        "in place": lambda: run(train=tmp_path / "out" / "train"),
        "manifest": lambda: run(),
    }[case]()
    error = capsys.readouterr().err
    said = {"missing": "nowhere", "empty": "empty", "no text": "other", "broken": "letters.jsonl", "vocab": "259",
            "nothing": "--babylm-10m", "in place": "the next run would read", "manifest": "manifest.json"}  # fmt: skip
    assert code == 2
    assert error.split("error: ")[1].count("\n") == 1 and said[case] in error
    assert "Traceback" not in error
    assert tree(tmp_path / "out") == before


def test_both_tracks_at_once_are_refused(run, raw):
    with pytest.raises(SystemExit) as stopped:
        run("--babylm-100m", raw / "train")
    assert stopped.value.code == 2
