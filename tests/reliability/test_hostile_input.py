"""Hostile text, models, names and generated text cost a clear line at most: no crash, hang or injection."""

from __future__ import annotations

import gzip
import html.parser
import importlib
import json
import math
import os
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, errors_of, sentences, tiny_config
from runs import Canary

import babyllama.data
import benchmark
import generate
import train
from babyllama.cli import SafeOutput, log_to_stderr, printable, run_script
from babyllama.data import documents, text_check
from babyllama.data.documents import new_report, read_documents
from babyllama.data.text_files import find_files
from babyllama.data.tokenizer import part_backend
from babyllama.evaluation.loading import load_model
from babyllama.plots import save_panels, training_panels
from babyllama.training.results import model_card
from data_utils import DataProcessor

# ---- text ------------------------------------------------------------------------------------------

TEXT = "The cat sees the dog.\nThe boy helps. "
HOSTILE = {
    "invalid bytes": b"a \xff\xfe\x80 cat \xc3( dog \xed\xa0\x80 end " + TEXT.encode(),
    "invalid at the end": TEXT.encode() + b"\xf0\x9f\x98",
    "overlong": b"\xc0\xaf " + TEXT.encode() * 3,
    "bom": b"\xef\xbb\xbf" + TEXT.encode(),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "old mac": TEXT.replace("\n", "\r").encode(),
    "mixed line ends": b"a\r\nb\rc\nd\n\re\r\r\nf",
    "nul": b"a\0b " + TEXT.encode() * 9,
    "line separator": "a\u2028b\u2029c\x85d\x0be\x0cf".encode(),
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe".encode(),
    "right to left": "\u202eabc\u202c \u2067x\u2069 שלום".encode(),
    "combining": ("e" + "\u0301" * 3000).encode(),
    "emoji": "👩‍👩‍👧 🏳️‍🌈 𝒳 \U0010ffff".encode(),
    "private use": "\ue000 \U000f0000".encode(),
    "special tokens": b"<s> </s> <pad> <unk> <|endoftext|> [MASK]",
    "escapes": b"\x1b[31m red \x07 \x08\x08 \x7f",
    "one byte": b"x",
    "only spaces in a line": b"a\n \t \nb",
    "tabs": b"a\tb\t\tc",
    "no last newline": b"a b c",
    "long word": b"x" * 50_000,
    "digits": b"1234567890" * 2_000,
    "markup": b"<script>alert(1)</script> {{ x }} [[y]] &amp; %s {0}",
    "quotes": "'\"`´‘’“”«»".encode(),
    "json text": b'{"text": "a"}',
}  # fmt: skip


def slow_reference(raw: bytes) -> str:
    """Repair a text one byte or character at a time."""
    text = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    characters = []
    for character in text.replace("\r\n", "\n").replace("\r", "\n"):
        if "\ud800" <= character <= "\udfff":
            characters.append("\ufffd")
        elif character != "\0":
            characters.append(character)
    lines = "".join(characters).split("\n")
    return "\n".join("" if not line.strip(" \t") else line for line in lines).strip("\n")


@pytest.mark.promise(11)
def test_hostile_text_has_the_tokens_of_a_slow_reference(tokenizer, corpus_dir, tmp_path, figures):
    backend = part_backend(tokenizer)
    expected_ids = []
    folder = tmp_path / "text"
    folder.mkdir()
    for number, (name, raw) in enumerate(HOSTILE.items()):
        path = folder / f"{number:02}.txt"
        path.write_bytes(raw)
        expected = slow_reference(raw)
        report = new_report()
        read = ["".join(document) for document in read_documents(path, report)]
        assert read == [expected], name
        assert report["words"] == len(expected.split()), name
        expected_ids += [1, *backend.encode(expected, add_special_tokens=False).ids, 2]
    processor = DataProcessor(tokenizer, cache_dir=tmp_path / "cache")
    splits = processor.prepare_dataset(str(folder), str(corpus_dir / "dev"), 1, clean=False)
    assert splits["train"]["input_ids"][:] == [[token] for token in expected_ids]
    figures.count("hostile texts read exactly", len(HOSTILE), len(HOSTILE))


@pytest.mark.promise(11)
def test_no_hostile_file_hangs_or_ends_in_a_traceback(tmp_path, figures):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "good\nname\x1b[31m.train").write_text(TEXT)
    (folder / os.fsdecode(b"n\xfft.train")).write_text(TEXT)
    (folder / "directory.txt").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    os.mkfifo(folder / "fifo.txt")
    broken = {
        "cut.train.gz": gzip.compress(TEXT.encode() * 99)[:-9],
        "damaged.train.gz": gzip.compress(os.urandom(999))[:200] + b"xx" * 99,
        "not.train.gz": TEXT.encode(),
        "utf16.train": TEXT.encode("utf-16"),
        "binary.train": os.urandom(5000),
        "zip.train": b"PK\x03\x04" + b"\0" * 99,
        "surrogate.jsonl": b'{"text": "\\ud800 x"}\n{"text": 5}\n',
        "deep.jsonl": b"[" * 100_000,
        "list.jsonl": b"[]\n",
        "cut.parquet": b"PAR1" + b"\0" * 50,
        "cut.arrow": b"\xff\xff\xff\xff" + b"\0" * 50,
    }
    assert [path.name for path in find_files(folder, "train")] == sorted(
        ["good\nname\x1b[31m.train", os.fsdecode(b"n\xfft.train")]
    )
    named = 0
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            for document in read_documents(path):
                "".join(document)
        assert "\n" not in str(caught.value)
        named += str(path) in str(caught.value)
    figures.count("broken files named", named, len(broken))
    assert named == len(broken)


@pytest.mark.promise(11)
@pytest.mark.parametrize("threshold", [10**6, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["bomb.train.gz", "bomb.jsonl.gz"])
def test_a_compressed_bomb_is_refused(name, threshold, tmp_path, monkeypatch, figures):
    threshold = threshold or text_check.SAFE_CHARS
    monkeypatch.setattr(text_check, "SAFE_CHARS", threshold)
    block = b"the cat sees the dog\n" if ".train" in name else b"the cat sees the dog "
    member = gzip.compress(block * 50_000)
    path = tmp_path / name
    path.write_bytes(member * (2 * threshold // len(block * 50_000) + 1))
    started = time.process_time()
    with pytest.raises(ValueError, match=f"{name}: its text is more than 200 times as large"):
        for document in read_documents(path):
            for _ in document:
                pass
    assert time.process_time() - started < 20
    figures.count("compressed bombs refused", 1, 1)


@pytest.mark.promise(11)
def test_well_compressed_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_check, "SAFE_CHARS", 10**5)
    path = tmp_path / "a.train.gz"
    path.write_bytes(gzip.compress("\n".join(sentences(20_000)).encode()))
    report = new_report()
    for document in read_documents(path, report):
        for _ in document:
            pass
    assert report["words"] == sum(len(line.split()) for line in sentences(20_000))


@pytest.mark.promise(11)
@pytest.mark.parametrize("length", [10, 100, 1000, 1003])
def test_a_long_json_text_in_pieces_is_the_same_text(length, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 100)
    monkeypatch.setattr(documents, "LONG_LINE", 100)
    text = ("ab" * 73 + " " + "cat dog " * 20 + "\nx " + "y" * 99 + "\n" + "z" * 101)[:length]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(text * 3) + "\n")
    report = new_report()
    (parts,) = read_documents(path, report)
    assert "".join(parts) == (text * 3).strip("\n")
    assert report["words"] == len((text * 3).split())


MEASURE = """
import re, sys, train
code = train.main(["--config", sys.argv[1], "--dry-run"])
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
print(code, peak)
"""


@pytest.mark.slow
@pytest.mark.promise(11)
@pytest.mark.parametrize("name", ["line.train", "line.jsonl", "word.train"])
def test_a_line_of_50_mb_takes_less_than_600_mb(
    name, tokenizer_file, corpus_dir, tmp_path, figures
):
    text = "x" * 10_000_000 if name == "word.train" else "the cat sees the dog " * 2_400_000
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    config = tiny_config(tmp_path, tokenizer_file, corpus_dir, data__train_path=str(folder))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "BABYLLAMA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    code, peak = done.stdout.split()[-2:]
    figures.worst("MB for a line of 50 MB", float(peak))
    assert code == "0", done.stderr
    assert float(peak) < 600


# ---- patterns --------------------------------------------------------------------------------------

ATTACKS = ["a", " ", "\n", "=", "<", "[", "{{", "(", "*", "-", ":", ".", "1", "'", '"', "= ", "\n=", "<ref>", "<!--", "[[a|", "A.",
           "a.B", "A: ", "1\n", "00:00:01,0", "-->", "(a ", "\u0301", " \n", "\t", "a-", ".a", "_1", "/", "\\", "%", "A\u0301 "]  # fmt: skip
# asked only about a word, a bracket or a name of at most 90 characters
BOUNDED = {"_BEFORE", "_AFTER", "_SOUND", "_MARKUP_NAME"}


def patterns_in(value) -> list[re.Pattern]:
    """Return the patterns in a value, which may be a collection."""
    if isinstance(value, re.Pattern):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [pattern for item in value for pattern in patterns_in(item)]
    return []


def patterns_of_texts() -> list[tuple[str, re.Pattern]]:
    """Return the patterns that read or clean texts, with their names."""
    patterns = []
    for info in pkgutil.iter_modules(babyllama.data.__path__, "babyllama.data."):
        for name, value in vars(importlib.import_module(info.name)).items():
            patterns += [(name, pattern) for pattern in patterns_in(value)]
    return patterns


def seconds(pattern: re.Pattern, text: str) -> float:
    started = time.process_time()
    for _ in pattern.finditer(text):
        pass
    return time.process_time() - started


@pytest.mark.promise(12)
@pytest.mark.parametrize(
    "size", [2**12, pytest.param(2**18, marks=pytest.mark.slow)], ids=["short", "256k"]
)
def test_every_pattern_of_texts_is_linear_in_time(size, figures):
    """A time that is eight times the text's has a slope of 1; one of 64 times has a slope of 2."""
    linear = tried = 0
    patterns = patterns_of_texts()
    assert len(patterns) > 40 and {name for name, _ in patterns} > BOUNDED
    for name, pattern in patterns:
        for attack in ATTACKS:
            for tail in ("", "x"):
                length = 90 if name in BOUNDED else size
                text = (attack * length)[:length]
                tried += 1
                for _ in range(4):  # the machine may be busy
                    long = seconds(pattern, text + tail)
                    short = seconds(pattern, text[: length // 8] + tail)
                    slope = math.log(max(long, 0.02) / max(short, 0.0025), 8)
                    if long < (2 if size > 2**12 else 0.2) and slope <= 1.15:
                        linear += 1
                        break
                else:
                    print(name, repr(attack), tail, long, slope)
    figures.count("patterns in linear time", linear, tried)
    assert linear == tried


# ---- malicious files -------------------------------------------------------------------------------


def header(**tensors) -> bytes:
    """Return a safetensors file with this header and 64 bytes of data."""
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


WEIGHT = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
HEADERS = {
    "empty": b"",
    "longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "not json": (4).to_bytes(8, "little") + b"[[[[",
    "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "offset outside": header(a={**WEIGHT, "data_offsets": [0, 2**40]}),
    "negative offset": header(a={**WEIGHT, "data_offsets": [64, 0]}),
    "overlap": header(a=WEIGHT, b=WEIGHT),
    "overflow": header(a={**WEIGHT, "shape": [2**33, 2**33]}),
    "unknown type": header(a={**WEIGHT, "dtype": "X9"}),
    "no tensors": header(),
}


@pytest.mark.promise(13)
@pytest.mark.parametrize("kind", HEADERS)
def test_a_malicious_header_of_weights_is_one_line(kind, model_dirs, tmp_path, figures):
    shutil.copytree(model_dirs["GPT2"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "model", "cpu")
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)
    figures.count("malicious files refused", 1, 1)


@pytest.mark.promise(13)
def test_no_code_of_a_model_directory_runs(model_dirs, tmp_path, figures):
    canary = tmp_path / "canary"
    folder = tmp_path / "model"
    shutil.copytree(model_dirs["GPT2"], folder)
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    code = f"open({str(canary)!r}, 'w')\n"
    for name in ("code.py", "custom_generate/generate.py", "modeling_gpt2.py", "tokenization.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name, auto in {
        "config.json": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["code.T", "code.T"]},
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": auto}))
    try:
        load_model(folder, "cpu")
    except ValueError as error:
        assert "\n" not in str(error)
    assert generate.main([str(folder), "--prompt", "a", "--max-new-tokens", "2"]) in (0, 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(ValueError):
        load_model(folder, "cpu")
    assert not canary.exists()
    figures.count("malicious files refused", 9, 9)


BOMB = "a: &a [x,x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcde", "bcdef", strict=True))  # fmt: skip


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    "text",
    [BOMB, "!!python/object/apply:os.system ['true']", "data: {}\ndata: {}", "[" * 100_000, "{" * 100_000, "- " * 100_000,
     "a: " * 50_000, "\0", "\udcff", "%YAML 9.9\n--- {}", "? ? ? {}", "&a [*a]", "1", "x" * 2_000_000],
)  # fmt: skip
def test_a_malicious_configuration_is_refused_within_two_seconds(text, tmp_path, capsys, figures):
    path = tmp_path / "a.yaml"
    path.write_text(text, errors="surrogateescape")
    started = time.process_time()
    assert train.main(["--config", str(path)]) == 2
    assert time.process_time() - started < 2
    lines = errors_of(capsys)
    assert lines and all(str(path) in line for line in lines)
    figures.count("malicious files refused", 1, 1)


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "..", ".", "a\\b", "a\nb", "a\0b", "\x1b[31m", "-rf", "\udcff"]
)  # fmt: skip
def test_a_name_of_a_run_never_leaves_its_folder(name, config_file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    path = config_file()
    assert train.main(["--config", str(path), f"--model-name={name}"]) == 2
    assert errors_of(capsys)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


# ---- reports and the terminal ----------------------------------------------------------------------

EVIL = "<script>alert(1)</script>\"><img src=x onerror=alert(1)>$\\frac{ =HYPERLINK() \x1b[31m\x07\x9b2J\r\u202e\udcff"  # fmt: skip


def raw_controls(text: str) -> list[str]:
    return re.findall("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


class Injections(html.parser.HTMLParser):
    """Collect the tags and attributes of a page that run code."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [tag] * (tag in ("script", "iframe", "object"))
        self.found += [name for name, value in attributes if name.startswith("on")]


def injections(page: str) -> list[str]:
    parser = Injections()
    parser.feed(page)
    return parser.found


@pytest.mark.promise(14)
def test_names_that_are_evil_or_not_utf8_cost_no_result(
    model_dirs, tmp_path, monkeypatch, capsys, figures
):
    tasks = {"pairs": {"type": "minimal_pairs", "items": [
        {"sentence_good": "The cat sees.", "sentence_bad": "The sees cat.", "UID": EVIL.replace("\udcff", "")},
        {"sentence_good": "The boy helps.", "sentence_bad": "The helps boy.", "UID": "b"}]}}  # fmt: skip
    names = [
        os.fsdecode(b"m\xffd\x1b[31m"),
        "<script>alert(1)<" + "x" * 200,
        '"><img onerror=1>$\\frac{',
    ]
    monkeypatch.chdir(tmp_path)
    for name in names:
        shutil.copytree(model_dirs["GPT2"], name)
    Path("tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    capsys.readouterr()
    assert benchmark.main([*names, "--benchmark-config", "tasks.yaml", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not raw_controls(out + err)
    assert "error: m\\udcffd\\x1b[31m: m\\udcffd\\x1b[31m: the name is not UTF-8" in err
    document = json.loads(Path("benchmark.json").read_text())
    assert list(document["results"]) == names[1:] and list(document["failed"]) == names[:1]
    page = Path("benchmark.html").read_text()
    assert not injections(page)
    assert Path("benchmark.png").stat().st_size > 1000
    figures.count("reports without injection", 1, 1)


@pytest.mark.promise(14)
def test_a_model_card_and_its_plot_show_evil_text_as_text(finished, tmp_path, figures):
    metrics = json.loads((finished[1] / "training_metrics.json").read_text())
    metrics["samples"] = [EVIL, EVIL * 2000]
    metrics["config"]["model"]["name"] = EVIL
    metrics["config"]["data"]["eval_path"] = EVIL
    metrics["config"]["data"]["train_path"] = EVIL
    card = model_card(metrics)
    assert "alert(1)" in card
    assert not raw_controls(card)
    assert not injections(card)
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["trained-from-scratch", "llama"]
    rows = [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]
    save_panels(training_panels(rows), tmp_path / "a.png", EVIL)
    assert (tmp_path / "a.png").stat().st_size > 1000
    figures.count("reports without injection", 2, 2)


@pytest.mark.promise(14)
def test_generated_text_reaches_the_terminal_without_control_characters(
    model_dirs, capsys, figures
):
    """An untrained model generates all bytes."""
    flags = ["--num-samples", "8", "--max-new-tokens", "40", "--temperature", "2", "--top-p", "1"]
    assert generate.main([str(model_dirs["GPT2"]), "--prompt", "\x1b[31m", *flags]) == 0
    out = capsys.readouterr().out
    assert not raw_controls(out)
    assert out.count("\\x") > 8
    figures.count("reports without injection", 1, 1)


@pytest.mark.promise(14)
def test_all_that_a_script_says_is_printable(capsys, monkeypatch):
    def body():
        print("out", EVIL)
        raise ValueError(f"in {EVIL}\nnext")

    stdout = sys.stdout
    assert run_script(body) == 2
    assert sys.stdout is stdout
    out, err = capsys.readouterr()
    assert not raw_controls(out + err)
    assert out.startswith("out <script>") and out.endswith(
        "\\x1b[31m\\x07\\x9b2J\\r\\u202e\\udcff\n"
    )
    assert err.count("error: ") == 2
    assert printable("naïve\tcafé\n日本 👍") == "naïve\tcafé\n日本 👍"

    streams = []
    monkeypatch.setattr("logging.basicConfig", lambda **options: streams.append(options["stream"]))
    log_to_stderr()
    assert isinstance(streams[0], SafeOutput)
    streams[0].write("\x1b[31m")
    assert capsys.readouterr().err == "\\x1b[31m"
