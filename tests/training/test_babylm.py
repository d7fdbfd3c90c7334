"""training/babylm.py: words seen against what the model was really given, BabyLM's checkpoints, its rules, and what is stated."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_words import walk

import train
import train_tokenizer
from babyllama import schema
from babyllama.config import read_yaml_file
from babyllama.data.words import Words
from babyllama.training import babylm, distributed, run_dir
from babyllama.training.babylm import Ledger, checkpoint_words, order_of
from babyllama.training.run_dir import (
    CONFIG_FILE,
    DATA_REPORT_FILE,
    checkpoint_error,
    checkpoint_step,
    checkpoints,
    milestone_name,
    milestones,
)
from babyllama.training.trainer import LMTrainer


@pytest.fixture
def shop(tmp_path, corpus_dir, monkeypatch) -> Path:
    """A directory with train/ of two domains, dev/, a tokenizer trained on train/, and checkpoints at thousands of words."""
    (tmp_path / "train").mkdir()
    lines = (corpus_dir / "train" / "toy.train").read_text().split("\n\n\n")
    (tmp_path / "train" / "books.train").write_text("\n\n\n".join(lines[:35]))
    (tmp_path / "train" / "talk.train").write_text("\n\n\n".join(lines[35:]))
    shutil.copytree(corpus_dir / "dev", tmp_path / "dev")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_dir, "MILLION", 1000)
    monkeypatch.setattr(babylm, "MILLION", 1000)
    assert (
        train_tokenizer.main(
            ["--data-dir", "train", "--vocab-size", "400", "--output", "tokenizer.json"]
        )
        == 0
    )
    config = {
        "data": {"tokenizer_path": "tokenizer.json", "train_path": "train", "eval_path": "dev", "seq_length": 32,
                 "eval_samples": 8},
        "model": {"type": "Llama", "name": "tiny", "hidden_size": 32, "n_layer": 1, "n_head": 4},
        "training": {"lr": 3e-3, "batch_size": 7, "num_epochs": 3, "precision": "fp32", "logging_steps": 4,
                     "gradient_accumulation_steps": 3, "save_steps": 5},
        "logging": {"output_dir": "models"},
        "babylm": {"track": "strict-small"},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


RUN = ["--config", "c.yaml"]


def words_of(counts: list[int], tmp_path: Path) -> Words:
    """A text of chunks of one token, each with so many words."""
    (tmp_path / "x.words").write_bytes(np.array(counts, dtype=np.uint8).tobytes())
    sources = [{"domain": "a", "tokens": 1}, {"domain": "b", "tokens": len(counts) - 1}]
    return Words(
        tmp_path / "x.arrow", {"tokens": len(counts), "tokens_left_out": 0, "sources": sources}
    )


# ---- the sums -----------------------------------------------------------------------------------


def test_milestones_are_babylms():
    small, strict = (
        [milestone_name(n) for n in checkpoint_words(track)] for track in ("strict-small", "strict")
    )
    assert len(small) == 19 and len(strict) == 28
    assert strict[:19] == small
    assert small[:2] + small[8:11] + small[-1:] == [
        "chck_1M",
        "chck_2M",
        "chck_9M",
        "chck_10M",
        "chck_20M",
        "chck_100M",
    ]
    assert strict[19:21] + strict[-1:] == ["chck_200M", "chck_300M", "chck_1000M"]


class Loader:
    """What order_of looks at of a process's data loader."""

    def __init__(self, n: int, batch: int, accumulation: int):
        sampler = SeedableRandomSampler(range(n), generator=torch.Generator(), data_seed=7)
        self.batch_sampler = distributed.ExactBatchSampler(sampler, batch, accumulation)

    def steps(self, epoch: int) -> list[list[int]]:
        """The chunks that this process is dealt for each step."""
        self.batch_sampler.sampler.set_epoch(epoch)
        batches = iter(self.batch_sampler)
        rounds = map(self.batch_sampler._rounds, self.batch_sampler.steps)
        return [sum((next(batches) for _ in range(n)), []) for n in rounds]


@hypothesis_settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=3, max_size=40), batch=st.integers(1, 5),
       accumulation=st.integers(1, 4), world=st.integers(1, 3), epochs=st.integers(1, 3))  # fmt: skip
def test_words_seen_are_those_of_the_batches_of_all_processes(
    tmp_path_factory, counts, batch, accumulation, world, epochs
):
    """Each process's own batches are summed up step by step: in the end words x epochs, whatever the batches."""
    words = words_of(counts, tmp_path_factory.mktemp("words"))
    seen, by_domain, after = 0, {"a": 0, "b": 0}, [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        loader = Loader(len(counts), batch, accumulation)
        found = Ledger(words, 1, order_of(loader), batch * accumulation * world, epochs)
        for epoch in range(epochs):
            shares = []
            for rank in range(world):
                patch.setenv("RANK", str(rank))
                shares.append(loader.steps(epoch))
            for step in zip(*shares, strict=True):
                for chunk in sum(step, []):
                    seen += counts[chunk]
                    by_domain["a" if chunk == 0 else "b"] += counts[chunk]
                after.append(seen)
                assert found.by_domain(len(after) - 1) == by_domain
    assert found.after.tolist() == after
    assert found.after[-1] == epochs * sum(counts)
    for target in {1, seen // 2, seen, seen + 1} - {0}:
        crossing = next((step for step, words in enumerate(after) if words >= target), None)
        assert found.first_step(target) == crossing


def test_chunks_that_begin_elsewhere_in_each_epoch(tmp_path):
    """By hand: epoch 0 has the chunks 3+1, 4+1, 5+9, 2+6, the others 1+4, 1+5, 9+2; each goes from last to first."""
    words = words_of([3, 1, 4, 1, 5, 9, 2, 6], tmp_path)
    found = Ledger(
        words,
        2,
        lambda epoch: np.arange(3 if epoch else 4)[::-1],
        2,
        3,
        offset=lambda epoch: min(epoch, 1),
    )
    assert found.after.tolist() == [0, 8 + 14, 31, 31 + 11 + 6, 53, 53 + 11 + 6, 75]
    assert found.by_domain(6) == {"a": 3, "b": 72}


@pytest.fixture
def spy(monkeypatch) -> list[tuple[int, int]]:
    """(step that is being made, its chunk's bytes) of every chunk that any training step was given."""
    given_chunks, original = [], LMTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        given_chunks.extend(
            (self.state.global_step + 1, row.numpy().tobytes()) for row in inputs["input_ids"].cpu()
        )
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", record)
    return given_chunks


def crossings(spied: list[tuple[int, bytes]], tokenizer) -> tuple[list[int], dict[str, int]]:
    """Words given to the model after each step, by a walk over the text of the chunks, and where thousands are crossed."""
    dataset, _ = train.prepare_datasets_modern(train.load_config("c.yaml"), tokenizer)
    chunks = [row["input_ids"] for row in dataset]
    table = {
        chunk.astype(np.int64).tobytes(): count
        for chunk, count in zip(
            chunks, walk(tokenizer, [chunk.tolist() for chunk in chunks]), strict=True
        )
    }
    assert len(table) == len(chunks), "no chunk stands twice in this text"
    after = [0] * (1 + max(step for step, _ in spied))
    for step, chunk in spied:
        after[step] += table[chunk]
    after = np.cumsum(after).tolist()
    return after, {
        f"chck_{n}M": next(step for step, words in enumerate(after) if words >= 1000 * n)
        for n in [*range(1, 10), *range(10, 101, 10)]
        if after[-1] >= 1000 * n
    }


def test_a_run_by_the_rules(shop, spy, tokenizer_of_shop):
    """What the ledger says is what the model was given; a checkpoint for each thousand words; papers that say so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train.main(RUN) == 0
    after, crossed = crossings(spy, tokenizer_of_shop)
    run_dir = Path("models/tiny")
    text = {
        name: len((shop / "train" / f"{name}.train").read_text().split())
        for name in ("books", "talk")
    }
    facts = json.loads((run_dir / "compliance.json").read_text())
    made = {
        row["name"]: (row["step"], row["words_seen"], row["there"])
        for row in facts.pop("checkpoints")
    }
    assert made == {name: (step, after[step], True) for name, step in crossed.items()}
    assert [path.name for path in milestones(run_dir)] == list(crossed) and len(crossed) >= 10
    left_out = sum(text.values()) - after[-1] // 3
    assert facts["words_left_out"] == left_out < 32
    by_domain = facts.pop("words_seen_by_domain")
    assert by_domain == {"books": 3 * text["books"], "talk": 3 * (text["talk"] - left_out)}
    assert facts == {
        "track": "strict-small", "words_allowed": 10_000_000, "epochs_allowed": 10, "epochs": 3.0, "text": "train",
        "words": sum(text.values()), "words_by_domain": text, "words_seen": sum(by_domain.values()),
        "other_words_learned_from": {"tokenizer.json": 0}, "words_left_out": left_out, "word": facts["word"],
    }  # fmt: skip
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    assert metrics["results"]["words_trained"] == after[-1] == facts["words_seen"]
    card = (run_dir / "README.md").read_text()
    assert (
        f"Track strict-small: {sum(text.values()):,} words of training text, of 10,000,000 allowed"
        in card
    )
    assert (
        "`tokenizer.json` learned from this text alone." in card
        and f"`chck_10M` {made['chck_10M'][1]:,}" in card
    )
    assert "strict-small" in yaml.safe_load(card.split("---")[1])["tags"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert set(crossed.values()) <= {row["step"] for row in rows if "loss" in row}
    for name in crossed:
        model = AutoModelForCausalLM.from_pretrained(run_dir / name)
        assert model.config.use_cache and model.generation_config.eos_token_id in (2, [2])
        assert AutoTokenizer.from_pretrained(run_dir / name)("The cat")["input_ids"][0] == 1
        files = {path.name for path in (run_dir / name).iterdir()}
        assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                         "tokenizer_config.json", "complete.json"}  # fmt: skip
    assert not list(run_dir.glob(".*"))


@pytest.fixture
def tokenizer_of_shop(shop):
    from babyllama.data.tokenizer import load_tokenizer

    return load_tokenizer("tokenizer.json")


def test_resumed_runs_keep_what_lies_before_and_miss_none(
    shop, spy, monkeypatch, tokenizer_of_shop
):
    """A run that dies in the middle of an epoch, at a step that crosses a thousand, goes on as if nothing had been."""
    assert train.main([*RUN, "--model-name", "whole"]) == 0
    after, crossed = crossings(spy, tokenizer_of_shop)
    whole, run_dir = Path("models/whole"), Path("models/tiny")
    original = LMTrainer._save_checkpoint

    def dies(self, *args):
        original(self, *args)
        if self.state.global_step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LMTrainer, "_save_checkpoint", dies)
        assert train.main(RUN) == 130
    before = {path.name: path.stat().st_ino for path in milestones(run_dir)}
    assert set(before) == {name for name, step in crossed.items() if step <= 10} and 0 < len(
        before
    ) < len(crossed)
    shutil.rmtree(
        run_dir / "checkpoint-10"
    )  # one step further back: some checkpoints are there, and come again
    last = max(map(checkpoint_step, checkpoints(run_dir)))
    kept = {name: inode for name, inode in before.items() if crossed[name] <= last}
    assert 0 < len(kept) < len(before)
    (run_dir / ".chck_9M.part").mkdir()  # a process that died while it wrote
    assert train.main([*RUN, "--resume-from-checkpoint", "latest"]) == 0
    assert [path.name for path in milestones(run_dir)] == list(crossed)
    assert {name: (run_dir / name).stat().st_ino for name in kept} == kept
    for name in crossed:
        assert (run_dir / name / "model.safetensors").read_bytes() == (
            whole / name / "model.safetensors"
        ).read_bytes()
        assert checkpoint_error(run_dir / name) is None
    papers = [json.loads((folder / "compliance.json").read_text()) for folder in (whole, run_dir)]
    assert papers[0] == papers[1]
    assert len({(run_dir / name / "model.safetensors").read_bytes() for name in crossed}) == len(
        set(crossed.values())
    )


def test_a_checkpoint_that_was_taken_away_is_said(shop, caplog):
    assert train.main(RUN) == 0
    run_dir = Path("models/tiny")
    shutil.rmtree(run_dir / "chck_1M")
    (run_dir / "training_metrics.json").unlink()
    assert train.main([*RUN, "--resume-from-checkpoint", "latest"]) == 0
    assert "chck_1M is not there, and its step" in caplog.text
    first, *others = json.loads((run_dir / "compliance.json").read_text())["checkpoints"]
    assert not first["there"] and all(row["there"] for row in others)


def test_another_course_keeps_no_checkpoint_of_the_former(shop):
    """A run that is taken up again and ends earlier has the checkpoints of its compliance.json, and no others."""
    assert train.main([*RUN, "--set", "training.max_steps=10"]) == 0
    run_dir = Path("models/tiny")
    former = milestones(run_dir)
    (run_dir / "training_metrics.json").unlink()
    newest, earlier = checkpoints(run_dir)
    shutil.rmtree(newest)
    resume = [
        "--resume-from-checkpoint",
        "latest",
        "--set",
        f"training.max_steps={checkpoint_step(earlier)}",
    ]
    assert train.main([*RUN, *resume]) == 0
    stated = [
        row["name"] for row in json.loads((run_dir / "compliance.json").read_text())["checkpoints"]
    ]
    assert [path.name for path in milestones(run_dir)] == stated
    assert 0 < len(stated) < len(former)


def test_checkpoints_are_not_lost_unasked(shop, capsys):
    """A run that was stopped before its first resumable checkpoint still has what the rules ask for."""
    assert train.main(RUN) == 0
    run_dir = Path("models/tiny")
    for path in run_dir.iterdir():
        if not path.name.startswith("chck_") and path.name not in (CONFIG_FILE, DATA_REPORT_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train.main(RUN) == 2
    error = capsys.readouterr().err
    assert "--overwrite to replace it" in error and "--resume_from_checkpoint" not in error
    assert train.main([*RUN, "--overwrite", "--set", "training.num_epochs=1"]) == 0
    assert len(milestones(run_dir)) < 10  # those of the run before are gone


def test_without_the_section_nothing_is_saved_or_stated(shop, spy):
    config = read_yaml_file("c.yaml")
    del config["babylm"]
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert train.main(RUN) == 0
    run_dir = Path("models/tiny")
    assert not milestones(run_dir) and not (run_dir / "compliance.json").exists()
    assert "BabyLM\n" not in (run_dir / "README.md").read_text()
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    assert metrics["babylm"] is None and metrics["results"]["words_trained"] > 0
    assert "babylm" not in (run_dir / "training_config.yaml").read_text()


# ---- refusals -----------------------------------------------------------------------------------


def refused(capsys, *more: str) -> str:
    """The one line with which train.py refuses; nothing was tokenised or written."""
    assert train.main([*RUN, *more]) == 2
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("INFO", "WARNING"))
    ]
    assert not Path("models").exists() and not Path("cache").exists()
    return line.removeprefix("error: ")


def test_too_many_epochs(shop, capsys):
    assert refused(capsys, "--num-epochs", "12") == (
        "c.yaml: training.num_epochs: 12: BabyLM allows 10 epochs; use 10 or fewer, or remove the babylm section"
    )
    assert train.main([*RUN, "--num-epochs", "10", "--dry-run"]) == 0


def test_too_many_words(shop, monkeypatch, capsys):
    books, talk = (
        len(Path("train", f"{name}.train").read_text().split()) for name in ("books", "talk")
    )
    monkeypatch.setitem(schema.TRACKS, "strict-small", books + talk - 1)
    assert refused(capsys) == (
        f"babylm.track: strict-small allows {books + talk - 1:,} words of training text; train has {books + talk:,} "
        f"(books {books:,}, talk {talk:,}): 1 too many; leave files out of the text or shorten one, or train on the "
        "strict track (--set babylm.track=strict)"
    )
    assert train.main([*RUN, "--set", "babylm.track=strict", "--dry-run"]) == 0
    monkeypatch.setitem(schema.TRACKS, "strict-small", books + talk)
    assert train.main([*RUN, "--dry-run"]) == 0


def test_a_tokenizer_of_other_text_counts(shop, monkeypatch, capsys, caplog):
    """Learned on train/ and one more file; then a copy that nothing is known of."""
    Path("more").mkdir()
    for name in ("books", "talk"):
        shutil.copy(Path("train", f"{name}.train"), "more")
    Path("more", "news.train").write_text("The dog sees the bird today. " * 50)
    assert (
        train_tokenizer.main(
            ["--data-dir", "more", "--vocab-size", "400", "--output", "tokenizer.json"]
        )
        == 0
    )
    words = sum(len(path.read_text().split()) for path in Path("train").iterdir())
    monkeypatch.setitem(schema.TRACKS, "strict-small", words + 299)
    line = refused(capsys)
    assert (
        "and tokenizer.json learned from 300 other words (what a tokenizer or a teacher learned from counts"
        in line
    )
    assert line.endswith(": 1 too many; make tokenizer.json anew from this text alone")
    monkeypatch.setitem(schema.TRACKS, "strict-small", words + 300)
    assert train.main([*RUN, "--dry-run"]) == 0
    assert "is not recorded" not in caplog.text
    record = Path("tokenizer.source.json")
    record.write_text(record.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    assert train.main([*RUN, "--dry-run"]) == 0
    assert "tokenizer.json: which text it learned from is not recorded" in caplog.text


def test_teachers_are_looked_up(shop, capsys):
    """A teacher of the same text adds nothing, one of other text its words; what is unknown is None."""
    assert train.main([*RUN, "--num-epochs", "1"]) == 0
    report = json.loads(Path("models/tiny/data_report.json").read_text())
    report["train"]["sources"].append(
        {"file": "x", "sha256": "0", "domain": "x", "words": 77, "tokens": 99}
    )
    Path("other").mkdir()
    Path("other/data_report.json").write_text(json.dumps(report))
    config = train.load_config("c.yaml")
    report["train"]["sources"][-1]["words"] = None  # its tokenizer changed the text
    Path("uncounted").mkdir()
    Path("uncounted/data_report.json").write_text(json.dumps(report))
    config["distillation"] = {"teachers": ["models/tiny", "other", "uncounted", "nowhere"]}
    learned = babylm.check_budget(config)["other_words_learned_from"]
    assert learned == {
        "tokenizer.json": 0,
        "models/tiny": 0,
        "other": 77,
        "uncounted": None,
        "nowhere": None,
    }


def test_what_two_teachers_learned_from_counts_once(shop, monkeypatch):
    config = train.load_config("c.yaml")
    files = [{"file": name, "sha256": name, "domain": "x", "words": 70} for name in "abc"]
    for name, sources in {"one": files[:2], "two": files[1:]}.items():
        Path(name).mkdir()
        Path(name, "data_report.json").write_text(json.dumps({"train": {"sources": sources}}))
    config["distillation"] = {"teachers": ["one", "two"]}
    budget = babylm.check_budget(config)
    assert [budget["other_words_learned_from"][name] for name in ("one", "two")] == [140, 140]
    monkeypatch.setitem(schema.TRACKS, "strict-small", budget["words"] + 210)  # of three files
    babylm.check_budget(config)
    monkeypatch.setitem(schema.TRACKS, "strict-small", budget["words"] + 209)
    with pytest.raises(ValueError, match=": 1 too many"):
        babylm.check_budget(config)


def test_a_tokenizer_that_changes_the_text_is_refused(shop, capsys):
    """Words can then not be located; without the section it trains, and counts none."""
    tokenizer = json.loads(Path("tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    Path("tokenizer.json").write_text(json.dumps(tokenizer))
    with Path("train/talk.train").open("a") as file:
        file.write(" cafe\u0301")
    assert train.main(RUN) == 2
    assert (
        "its words are not located, because the tokenizer is not byte-level or changes the text"
        in capsys.readouterr().err
    )
    config = read_yaml_file("c.yaml")
    del config["babylm"]
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert train.main([*RUN, "--num-epochs", "1", "--overwrite"]) == 0
    assert (
        json.loads(Path("models/tiny/training_metrics.json").read_text())["results"][
            "words_trained"
        ]
        is None
    )
