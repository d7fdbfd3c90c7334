"""Train tokenizers, check their promises, and load them in every way that users do."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, sentences
from hypothesis import given
from hypothesis import strategies as st

from babyllama.data.tokenizer import adds_prefix_space, load_tokenizer
from babyllama.files import sha256
from train_tokenizer import main, train_bpe_tokenizer

SAMPLES = [
    "The cat sees the dog.",
    "  two  blanks\n\n and lines\n",
    "<s> is spelled out, so is </s>",
    "caf\u00e9 \u00df \u4f60\u597d \U0001f600",
    "don 't , she said .",
    "",
]


@pytest.fixture(scope="module")
def trained():
    return train_bpe_tokenizer(sentences(500), vocab_size=400)


@pytest.fixture
def text_dir(tmp_path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "toy.train").write_text("\n".join(sentences(300)) + "\n", encoding="utf-8")
    (folder / "more.txt").write_text("\n".join(sentences(200, seed=1)) + "\n", encoding="utf-8")
    return folder


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train_tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


# ---------------------------------------------------------------- the round trip

special_strings = st.sampled_from(
    ["<s>", "</s>", "<pad>", "<|endoftext|>", "\ufeff", "e\u0301", "\u200d", "\x00", "\r\n"]
)
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | special_strings).map("".join)


@given(texts)
def test_decoding_gives_back_any_text(trained, text):
    encoding = trained.encode(text, add_special_tokens=False)
    assert trained.decode(encoding.ids, skip_special_tokens=False) == text


@given(texts)
def test_a_text_read_as_plain_characters_never_gives_a_special_token(trained, text):
    plain = type(trained).from_str(trained.to_str())
    plain.encode_special_tokens = True
    ids = plain.encode(text, add_special_tokens=False).ids
    assert min(ids, default=3) >= 3
    assert plain.decode(ids, skip_special_tokens=False) == text


def test_every_byte_is_a_token_and_specials_come_first(trained):
    vocab = trained.get_vocab()
    assert [vocab["<pad>"], vocab["<s>"], vocab["</s>"]] == [0, 1, 2]
    assert sorted(len(trained.id_to_token(i)) for i in range(3, 259)) == [1] * 256
    assert len({trained.id_to_token(i) for i in range(3, 259)}) == 256
    for byte in range(128):  # an ASCII text of one byte is one token
        assert len(trained.encode(chr(byte), add_special_tokens=False)) == 1
    assert (
        len(trained.encode("\U0001f600", add_special_tokens=False)) == 4
    )  # four bytes, never seen in training


def test_spelled_special_tokens_become_special_tokens(trained):
    assert trained.encode("<s>a</s><pad>", add_special_tokens=False).ids == [
        1,
        trained.token_to_id("a"),
        2,
        0,
    ]


def test_bos_is_prepended_and_eos_is_not_appended(trained):
    inner = trained.encode("The cat", add_special_tokens=False).ids
    assert trained.encode("The cat").ids == [1, *inner]
    assert trained.encode("").ids == [1]
    assert trained.encode("The cat", "The cat").ids == [1, *inner, 1, *inner]


# ---------------------------------------------------------------- the merges


def naive_bpe(texts: list[str], n_merges: int, tokenizer) -> list[tuple[str, str]]:
    """The textbook loop: count all pairs again, take the most frequent, the smaller ids at a tie."""
    words = Counter(
        piece for text in texts for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)
    )
    split = {word: list(word) for word in words}
    ids = {tokenizer.id_to_token(i): i for i in range(259)}
    merges = []
    while len(merges) < n_merges:
        pairs: Counter = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def test_merges_equal_those_of_the_textbook_algorithm():
    texts = [*sentences(60), "a b c a b d", "x"]
    tokenizer = train_bpe_tokenizer(texts, vocab_size=340)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    assert merges == naive_bpe(texts, 340 - 259, tokenizer)


def test_the_order_of_the_texts_does_not_matter():
    texts = sentences(200)
    assert (
        train_bpe_tokenizer(texts, 350).to_str()
        == train_bpe_tokenizer(reversed(texts), 350).to_str()
    )


def test_the_number_of_threads_does_not_change_the_file(text_dir, tmp_path):
    written = []
    for threads in ("1", "2", "5"):
        output = tmp_path / threads / "tokenizer.json"
        done = run(
            "--data-dir",
            text_dir,
            "--vocab-size",
            380,
            "--output",
            output,
            RAYON_NUM_THREADS=threads,
        )
        assert done.returncode == 0, done.stderr
        written.append(output.read_bytes())
    assert written[0] == written[1] == written[2]


# ---------------------------------------------------------------- the ways to load it


def facts(tokenizer) -> tuple:
    ids = [tokenizer(text)["input_ids"] for text in SAMPLES]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAMPLES]
    decoded = [tokenizer.decode(row) for row in plain]
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    numbers = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
    )
    offsets = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for text in SAMPLES]
    return (
        ids,
        plain,
        decoded,
        names,
        numbers,
        offsets,
        tokenizer.model_max_length,
        tokenizer.padding_side,
    )


@pytest.fixture(scope="module", params=[(), ("--prefix-space",)], ids=["plain", "prefix space"])
def written(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    (folder / "toy.train").write_text("\n".join(sentences(500)), encoding="utf-8")
    assert (
        main(
            [
                "--data-dir",
                str(folder),
                "--vocab-size",
                "350",
                "--output",
                str(folder / "m" / "tokenizer.json"),
                *request.param,
            ]
        )
        == 0
    )
    return folder / "m" / "tokenizer.json"


def test_every_way_of_loading_gives_the_same_ids(written, tmp_path):
    from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

    expected = facts(load_tokenizer(written))
    if adds_prefix_space(load_tokenizer(written).backend_tokenizer):
        # the special token divides a text into two, of which the second starts with a space already
        with_space = [f" {text}" if text and text[0] not in " <" else text for text in SAMPLES]
        assert expected[2] == with_space
    else:
        assert expected[2] == SAMPLES
    assert expected[3] == ("<s>", "</s>", "<pad>", None)
    assert expected[4] == (1, 2, 0, 350)
    load_tokenizer(written).save_pretrained(tmp_path / "saved")
    for folder in (written.parent, tmp_path / "saved"):
        for kind in (AutoTokenizer, PreTrainedTokenizerFast, GPT2TokenizerFast):
            tokenizer = kind.from_pretrained(str(folder))
            assert facts(tokenizer) == expected, (kind.__name__, folder.name)
            again = tmp_path / f"{folder.name}-{kind.__name__}"
            tokenizer.save_pretrained(again)  # and what each of them saves is read by the others
            assert facts(AutoTokenizer.from_pretrained(str(again))) == expected, (
                kind.__name__,
                folder.name,
            )


def test_with_a_prefix_space_the_first_word_has_its_token_inside_a_text():
    texts = sentences(500)
    plain = train_bpe_tokenizer(texts, 400)
    spaced = train_bpe_tokenizer(texts, 400, prefix_space=True)
    assert spaced.get_vocab() == plain.get_vocab()
    (inside,) = plain.encode(" cat", add_special_tokens=False).ids
    assert plain.encode("cat", add_special_tokens=False).ids != [inside]
    assert spaced.encode("cat", add_special_tokens=False).ids == [inside]
    assert spaced.encode(" cat", add_special_tokens=False).ids == [inside]
    assert spaced.encode("cat cat").ids == [1, inside, inside]
    assert spaced.encode("").ids == [1]


def test_a_model_directory_of_each_architecture_loads_the_same_tokenizer(model_dirs, tokenizer):
    from transformers import AutoTokenizer

    for folder in model_dirs.values():
        assert facts(AutoTokenizer.from_pretrained(str(folder))) == facts(tokenizer)


def test_transformers_loads_the_file_without_its_directory(written):
    """PreTrainedTokenizerFast reads the file alone: right ids, but the special tokens have no names (transformers)."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(written))
    assert [tokenizer(text)["input_ids"] for text in SAMPLES] == facts(load_tokenizer(written))[0]


# ---------------------------------------------------------------- the command


def test_summary_and_record_of_a_trained_tokenizer(text_dir, tmp_path, capsys):
    output = tmp_path / "new" / "tokenizer.json"
    assert main(["--data-dir", str(text_dir), "--vocab-size", "300", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    text = "".join((text_dir / name).read_text().strip() for name in ("toy.train", "more.txt"))
    tokens = len(load_tokenizer(output)(text, add_special_tokens=False)["input_ids"])
    assert "2 files" in said and "300 tokens" in said and "note" not in said
    assert float(said.split(" bytes per token")[0].split()[-1]) == pytest.approx(
        len(text.encode()) / tokens, rel=0.01
    )
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "tokenizer.json", "tokenizer.source.json", "tokenizer_config.json"
    ]  # fmt: skip
    record = json.loads(output.with_name("tokenizer.source.json").read_text())
    words = {name: len((text_dir / name).read_text().split()) for name in ("more.txt", "toy.train")}
    assert {source["file"]: source["words"] for source in record["sources"]} == words
    assert record["tokenizer_sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()


def test_compressed_and_json_lines_give_the_same_tokenizer(text_dir, tmp_path):
    text = (text_dir / "toy.train").read_text()
    for name, write in {
        "plain/a.train": lambda path: path.write_text(text),
        "gzip/a.train.gz": lambda path: path.write_bytes(gzip.compress(text.encode())),
        "json/a.jsonl": lambda path: path.write_text(json.dumps({"text": text}) + "\n"),
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        write(path)
        assert (
            main(
                [
                    "--data-dir",
                    str(path.parent),
                    "--vocab-size",
                    "300",
                    "--output",
                    str(path.parent / "t.out"),
                ]
            )
            == 0
        )
    assert (tmp_path / "plain/t.out").read_bytes() == (tmp_path / "gzip/t.out").read_bytes()
    assert (tmp_path / "plain/t.out").read_bytes() == (tmp_path / "json/t.out").read_bytes()
    assert not (
        tmp_path / "plain/tokenizer_config.json"
    ).exists()  # transformers would not look for it there


def test_a_note_says_how_many_merges_a_small_text_gives(text_dir, tmp_path, capsys):
    output = tmp_path / "tokenizer.json"
    assert main(["--data-dir", str(text_dir), "--vocab-size", "5000", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    size = load_tokenizer(output).backend_tokenizer.get_vocab_size()
    assert size < 5000
    assert f"only {size - 259} merges instead of {5000 - 259}" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--vocab-size", "258"], "at least 259"),
        (["--data-dir", "missing"], "missing"),
        (["--data-dir", "empty"], "empty"),
        (["--data-dir", "blank"], "blank"),
        (["--output", "empty"], "directory"),
        (["--output", "/dev/null"], "was not written by this script"),
        (["--vocab-size", "99999999999999999999"], "at most 1,000,000; "),
    ],
)
def test_a_mistake_gives_one_error_line_and_changes_no_file(
    arguments, expected, text_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.train").write_text("")
    output = tmp_path / "tokenizer.json"
    output.write_text("the old one")
    record = {"tokenizer_sha256": sha256(output), "sources": []}
    output.with_suffix(".source.json").write_text(json.dumps(record))
    flags = {"--data-dir": str(text_dir), "--vocab-size": "300", "--output": str(output)}
    flags |= dict([arguments])
    assert main([word for flag in flags.items() for word in flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert output.read_text() == "the old one"


def test_a_tokenizer_that_the_script_did_not_write_is_not_replaced(text_dir, tmp_path, capsys):
    output = tmp_path / "tokenizer.json"
    argv = ["--data-dir", str(text_dir), "--output", str(output), "--vocab-size"]
    assert main([*argv, "300"]) == main([*argv, "300"]) == 0  # our own, and the same again
    assert "replaced" not in capsys.readouterr().out
    assert main([*argv, "310"]) == 0
    assert "replaced a different tokenizer" in capsys.readouterr().out
    changed = output.read_text() + "\n"
    output.write_text(changed)
    assert main([*argv, "300"]) == 2
    assert "exists and was not written by this script" in capsys.readouterr().err
    assert output.read_text() == changed
    output.unlink()
    assert main([*argv, "300"]) == 0
    for damaged in ("{", "{}", "[]"):
        output.with_suffix(".source.json").write_text(damaged)
        assert (
            main([*argv, "300"]) == 2
            and "was not written by this script" in capsys.readouterr().err
        )
    for name in ("v1.0", "v1.1", "v1.0"):  # each has a record of its own
        assert (
            main(
                [
                    "--data-dir",
                    str(text_dir),
                    "--vocab-size",
                    "300",
                    "--output",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
