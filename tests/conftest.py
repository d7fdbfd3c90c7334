"""Provide the shared fixtures: a small corpus with its tokenizer, tiny models, finished tiny runs."""

from __future__ import annotations

import base64
import bisect
import contextlib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import hypothesis
import pytest
import yaml

from babyllama.architectures import NAMES
from babyllama.runs.checkpoints import checkpoints

# Draw the same examples in every run, so that a failure can be repeated; BABYLLAMA_FUZZ=1 draws new ones.
hypothesis.settings.register_profile("suite", derandomize=not os.environ.get("BABYLLAMA_FUZZ"))
hypothesis.settings.load_profile("suite")

pytest_plugins = ["promises"]


ROOT = Path(__file__).resolve().parent.parent
# holds corpus/ and blimp/; tests that need them are skipped if it does not exist
SHARED = Path(os.environ.get("BABYLLAMA_TEST_TEXT", ROOT.parent / "shared"))

NOUNS = ["cat", "dog", "girl", "boy", "teacher", "bird", "farmer", "child"]
VERBS = ["sees", "likes", "finds", "hears", "helps", "follows"]
ENDS = [
    "in the garden",
    "near the river",
    "at home",
    "under the old tree",
    "every day",
    "with a smile",
]


CLOCK = {  # keys of a log row that depend on the clock
    "tokens_per_second", "words_per_second", "matmul_share", "memory_gb", "seconds_left", "eval_seconds", "seconds",
    "benchmark_seconds",
}  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Replace lone surrogates in captured output: pytest-xdist cannot send them to its main process."""
    report = yield
    report.sections = [
        (name, text.encode(errors="replace").decode()) for name, text in report.sections
    ]
    return report


def write_file(folder: Path, name: str, data: str | bytes) -> Path:
    """Write a file exactly, also its line ends, and return its path."""
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rows_of(run_dir: Path) -> list[dict]:
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    """Return the rows without the keys that depend on the clock."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def back_to_checkpoint(run_dir: Path) -> str:
    """Take a finished run back to its second last checkpoint; return the checkpoint's name."""
    newest, earlier = checkpoints(run_dir)
    shutil.rmtree(newest)
    for name in ("model.safetensors", "training_metrics.json", "README.md"):
        (run_dir / name).unlink()
    return earlier.name


def sentences(n: int, seed: int = 0) -> list[str]:
    """Return n short English sentences, the same ones for the same seed."""
    rng = random.Random(seed)
    return [
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)} {rng.choice(ENDS)}."
        for _ in range(n)
    ]


def words_in_chunks(tokenizer, chunks: list[list[int]]) -> list[int]:
    """Count the words that begin in each chunk, character by character in the decoded text."""
    # GPT-2's table of characters that stand for bytes; <s> and </s> become a newline
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    bytes_of = {
        token_id: b"\n" if token_id in special else bytes(byte_of.get(c, 0) for c in token)
        for token, token_id in tokenizer.get_vocab().items()
    }
    texts = [b"".join(bytes_of[token_id] for token_id in chunk) for chunk in chunks]

    counts = [0] * len(chunks)
    ends = list(itertools.accumulate(map(len, texts)))
    position = 0
    previous = " "
    # the last chunk may end in the middle of a character
    for character in b"".join(texts).decode(errors="ignore"):
        if previous.isspace() and not character.isspace():
            counts[bisect.bisect(ends, position)] += 1
        position += len(character.encode())
        previous = character
    return counts


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread: more of them slow tiny models down, especially on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """Return a tokenizer.json of 400 tokens, trained on the sentences above."""
    from train_tokenizer import train_bpe_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe_tokenizer(sentences(500), vocab_size=400).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    from babyllama.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def spaced_tokenizer(tmp_path_factory):
    """Return the same tokenizer, trained with prefix_space."""
    from babyllama.data.tokenizer import load_tokenizer
    from train_tokenizer import train_bpe_tokenizer

    path = tmp_path_factory.mktemp("spaced") / "tokenizer.json"
    train_bpe_tokenizer(sentences(500), vocab_size=400, prefix_space=True).save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """Return a folder with train/toy.train and dev/toy.dev: documents of ten sentences."""
    root = tmp_path_factory.mktemp("corpus")
    for split, n, seed in (("train", 60, 1), ("dev", 12, 2)):
        folder = root / split
        folder.mkdir()
        documents = ["\n".join(sentences(10, seed=1000 * seed + i)) for i in range(n)]
        (folder / f"toy.{split}").write_text("\n\n\n".join(documents) + "\n", encoding="utf-8")
    return root


def build_tiny_model(kind: str, vocab_size: int = 400, max_positions: int = 64, seed: int = 0):
    """Return a random two-layer model of width 32; kind is a model.type."""
    import torch
    import transformers

    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind in ("Llama", "Qwen3"):
        llama = dict(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_positions,
            **ids,
        )
        if kind == "Llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)).eval()
        config = transformers.Qwen3Config(num_key_value_heads=4, head_dim=8, **llama)
        return transformers.Qwen3ForCausalLM(config).eval()
    shared = dict(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=max_positions,
        n_inner=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ids,
    )
    if kind == "GPT2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shared)).eval()
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(rotary_dim=8, **shared)).eval()


@pytest.fixture(scope="session")
def tiny_model():
    """Return build_tiny_model."""
    return build_tiny_model


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Return a saved model directory, with a tokenizer, for each architecture."""
    root = tmp_path_factory.mktemp("models")
    for kind in NAMES:
        build_tiny_model(kind).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: root / kind for kind in NAMES}


@pytest.fixture(scope="session")
def bare_model_dir(tmp_path_factory) -> Path:
    """Return a GPT-2 whose tokenizer has neither a BOS nor an EOS token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bare")
    bare = Tokenizer(
        models.WordLevel({"?": 0, **{word: i for i, word in enumerate(NOUNS, 1)}}, unk_token="?")
    )
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    build_tiny_model("GPT2", vocab_size=9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """Return a working directory after a quick start with less text and a smaller model.

    It holds config, data/synthetic, data/train, data/dev and models/quickstart. The commands are
    those of the Makefile, run in this process.
    """
    import create_synthetic_data
    import train
    import train_tokenizer

    root = tmp_path_factory.mktemp("workshop")
    (root / "config").symlink_to(ROOT / "config")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        for script, arguments in quickstart_commands():
            arguments = [{"300000": "15000", "700": "400"}.get(word, word) for word in arguments]
            if script == "train.py":
                arguments += [
                    "--set",
                    "model.hidden_size=32",
                    "--set",
                    "model.n_layer=2",
                    "--num-epochs",
                    "1",
                ]
            main = {"create_synthetic_data.py": create_synthetic_data.main, "train_tokenizer.py": train_tokenizer.main,
                    "train.py": train.main}[script]  # fmt: skip
            assert main(arguments) == 0, (script, arguments)
        (root / "models" / "tokenizer.json").write_bytes(
            (root / "models" / "quickstart-tokenizer.json").read_bytes()
        )
        for split in ("train", "dev"):
            (root / "data" / split).symlink_to(root / "data" / "synthetic" / split)
    return root


def quickstart_commands() -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of each training command of `make quickstart`."""
    import shlex

    recipe = (
        (ROOT / "Makefile")
        .read_text(encoding="utf-8")
        .split("\nquickstart:", 1)[1]
        .split("\n\n", 1)[0]
    )
    lines = re.sub(r"\$\((?:if|wildcard) .*\)", "", recipe).splitlines()[1:]
    commands = [shlex.split(line.replace("$(PY)", "python"))[1:] for line in lines]
    return [(words[0], words[1:]) for words in commands if words[0] in TRAINING_SCRIPTS]


TRAINING_SCRIPTS = ("create_synthetic_data.py", "train_tokenizer.py", "train.py")


def tiny_config(root: Path, tokenizer_file: Path, corpus: Path, **changes) -> dict:
    """Return a configuration that trains in a second; training__lr=1 changes training.lr."""
    config = {
        "data": {"tokenizer_path": str(tokenizer_file), "train_path": str(corpus / "train"),
                 "eval_path": str(corpus / "dev"), "seq_length": 32, "eval_samples": 20},
        "model": {"type": "Llama", "name": "tiny", "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "training": {"lr": 3e-3, "batch_size": 8, "num_epochs": 2, "precision": "fp32", "logging_steps": 5,
                     "gradient_accumulation_steps": 3, "save_steps": 10},
        "logging": {"output_dir": str(root / "models")},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        config[section][key] = value
    return config


@pytest.fixture
def config_file(tmp_path, tokenizer_file, corpus_dir, monkeypatch):
    """Return a function that writes tiny_config, with changes, and returns its path."""
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))

    def write(**changes) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(
            yaml.safe_dump(tiny_config(tmp_path, tokenizer_file, corpus_dir, **changes))
        )
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tokenizer_file, corpus_dir) -> tuple[Path, Path]:
    """Return (config file, run directory) of a finished tiny run, which no test may change."""
    import train

    root = tmp_path_factory.mktemp("finished")
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(root, tokenizer_file, corpus_dir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        assert train.main(["--config", str(path)]) == 0
    return path, root / "models" / "tiny"


@pytest.fixture
def finished_copy(finished, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Return a copy of `finished` that a test may change."""
    from babyllama.config import check_config, read_yaml_file

    config_path, run_dir = finished
    shutil.copytree(config_path.parent, tmp_path / "copy")
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "copy" / "cache"))
    moved = tmp_path / "copy" / "models" / "tiny"
    config = read_yaml_file(config_path)
    config["logging"]["output_dir"] = str(moved.parent)
    (tmp_path / "copy" / "tiny.yaml").write_text(yaml.safe_dump(config))
    (moved / "training_config.yaml").write_text(
        yaml.safe_dump(check_config(config), sort_keys=False)
    )
    return tmp_path / "copy" / "tiny.yaml", moved


@contextlib.contextmanager
def added_callback(callback):
    """Give every trainer that is made inside the block one more callback."""
    from babyllama.training.trainer import LMTrainer

    original = LMTrainer.__init__

    def with_callback(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(callback)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "__init__", with_callback)
        yield


def html_errors(text: str) -> list[str]:
    """Return what a parser of HTML finds wrong with a page."""
    from lxml import etree

    parser = etree.HTMLParser()
    etree.fromstring(text, parser)
    return [error.message for error in parser.error_log]


def svg_pictures(text: str) -> list[str]:
    """Return the SVG pictures in a page."""
    sources = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="[^"]+">', text)
    assert len(sources) == text.count("<img")
    return [base64.b64decode(source).decode() for source in sources]


def errors_of(capsys) -> list[str]:
    """Return the lines on stderr that report an error."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
