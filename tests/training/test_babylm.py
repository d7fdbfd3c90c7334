"""training/babylm.py: words seen against what the model was given, checkpoints, budget, record."""

import datetime
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import SeedableRandomSampler
from conftest import added_callback, words_in_chunks
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import TrainerCallback

import train
import train_tokenizer
from babyllama import schema
from babyllama.config import read_yaml_file
from babyllama.data.text_files import source_of
from babyllama.data.tokenizer import load_tokenizer
from babyllama.data.words import WordCounts
from babyllama.files import describe_environment
from babyllama.runs.checkpoints import (
    checkpoint_error,
    checkpoint_step,
    checkpoint_words,
    checkpoints,
    milestone_name,
    milestones,
)
from babyllama.runs.run_dir import CONFIG_FILE, DATA_REPORT_FILE
from babyllama.training import babylm
from babyllama.training.babylm import SeenWords, chunk_order, compliance_problems
from babyllama.training.batches import ExactBatchSampler, batches_per_step
from babyllama.training.budget import Budget, check_budget
from babyllama.training.steps import Steps
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
    monkeypatch.setattr("babyllama.runs.checkpoints.MILLION", 1000)
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


def word_counts(tokenizer, words: list[int], length: int = 9) -> WordCounts:
    """A text of chunks of `length` tokens; every 9 tokens begin the next number of words."""
    word, newline = (tokenizer.encode(t, add_special_tokens=False)[0] for t in (" cat", "\n"))
    ids = [[word] * n + [newline] * (9 - n) for n in words]
    rows = np.array(ids, dtype=np.uint16).reshape(-1, length)
    sources = [{"domain": "a", "tokens": 9}, {"domain": "b", "tokens": 9 * len(words) - 9}]
    return WordCounts(Dataset.from_dict({"input_ids": rows}), tokenizer, sources)


# ---- words seen ---------------------------------------------------------------------------------


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


def steps_of_process(
    n: int, batch: int, accumulation: int, layout: Steps, epoch: int
) -> list[list[int]]:
    """The chunks that this process gets in each step of an epoch."""
    order = SeedableRandomSampler(range(n), generator=torch.Generator(), data_seed=7)
    order.set_epoch(epoch)
    batches = iter(ExactBatchSampler(order, layout, batch, accumulation))
    steps = []
    for step in layout.slices(epoch):
        n_batches = batches_per_step(step.stop - step.start, batch, accumulation)
        steps.append(sum((next(batches) for _ in range(n_batches)), []))
    return steps


@hypothesis_settings(max_examples=60, deadline=None)
@given(words=st.lists(st.integers(0, 9), min_size=3, max_size=40), batch=st.integers(1, 5),
       accumulation=st.integers(1, 4), world=st.integers(1, 3), epochs=st.integers(1, 3))  # fmt: skip
def test_words_seen_are_those_in_the_batches_of_all_processes(
    tokenizer, words, batch, accumulation, world, epochs
):
    counts = word_counts(tokenizer, words)
    seen = 0
    after = [0]
    by_domain = {"a": 0, "b": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        training = {"batch_size": batch, "gradient_accumulation_steps": accumulation,
                    "num_epochs": epochs, "max_steps": None}  # fmt: skip
        layout = Steps(len(words), training)
        words_seen = SeenWords(counts, lambda epoch: chunk_order(len(words), 7, epoch), layout)
        for epoch in range(epochs):
            shares = []
            for rank in range(world):
                patch.setenv("RANK", str(rank))
                shares.append(steps_of_process(len(words), batch, accumulation, layout, epoch))
            for step in zip(*shares, strict=True):
                for chunk in sum(step, []):
                    seen += words[chunk]
                    by_domain["a" if chunk == 0 else "b"] += words[chunk]
                after.append(seen)
                assert words_seen.by_domain(len(after) - 1) == by_domain
    assert words_seen.words.tolist() == after
    assert words_seen.words[-1] == epochs * sum(words)
    for target in {1, seen // 2, seen, seen + 1} - {0}:
        crossing = next((step for step, words in enumerate(after) if words >= target), None)
        assert words_seen.first_step(target) == crossing


def test_words_seen_with_another_offset_in_each_epoch(tokenizer):
    """Epoch 0 has the chunks 3+1, 4+1, 5+9, the others 1+4, 1+5, 9+2; the last comes first."""
    training = {"batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 3, "max_steps": None}  # fmt: skip
    words_seen = SeenWords(
        word_counts(tokenizer, [3, 1, 4, 1, 5, 9, 2, 6], length=18),
        order=lambda epoch: np.arange(3)[::-1],
        steps=Steps(3, training),
        offset=lambda epoch: 9 * min(epoch, 1),
    )
    assert words_seen.words.tolist() == [0, 14 + 5, 23, 23 + 11 + 6, 45, 45 + 11 + 6, 67]
    assert words_seen.by_domain(6) == {"a": 3, "b": 64}


@pytest.mark.parametrize(
    ("words", "training", "last_step"),
    [
        ([9] * 10 + [7], {}, 60),  # 970 words, so the end of the run is the last checkpoint
        ([9] * 11 + [1], {}, 60),  # 1,000 words
        ([9] * 10 + [7], {"max_steps": 59}, None),
        ([9] * 10 + [7], {"num_epochs": 9}, None),
        ([9] * 9 + [7], {}, None),  # 880 words: chck_90M is missing too
    ],
)
def test_ten_epochs_end_with_the_last_checkpoint(
    tokenizer, words, training, last_step, monkeypatch
):
    monkeypatch.setattr("babyllama.runs.checkpoints.MILLION", 10)
    training = {"batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 10, "max_steps": None} | training  # fmt: skip
    counts = word_counts(tokenizer, words)
    steps = Steps(len(words), training)
    trainer = SimpleNamespace(steps=steps)
    budget = Budget("strict-small", 1000, 10, 1000, {}, {}, 1000)
    callback = babylm.BabyLMCallback(trainer, counts, {}, budget)
    callback.seen = SeenWords(counts, lambda epoch: np.arange(len(words)), steps)
    *others, last = map(callback.due_step, checkpoint_words("strict-small"))
    assert last == last_step
    assert others == [callback.seen.first_step(n) for n in checkpoint_words("strict-small")[:-1]]


@pytest.fixture
def spy(monkeypatch) -> list[tuple[int, bytes]]:
    """(step, chunk) for every chunk that a training step is given."""
    given_chunks = []
    original = LMTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        given_chunks.extend(
            (self.state.global_step + 1, row.numpy().tobytes()) for row in inputs["input_ids"].cpu()
        )
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", record)
    return given_chunks


def crossings(given: list[tuple[int, bytes]]) -> tuple[list[int], dict[str, int]]:
    """Words given to the model after each step, and the first step after each checkpoint's words."""
    tokenizer = load_tokenizer("tokenizer.json")
    dataset, _ = train.prepare_datasets_modern(train.load_config("c.yaml"), tokenizer)
    chunks = [row["input_ids"] for row in dataset]
    words = words_in_chunks(tokenizer, [chunk.tolist() for chunk in chunks])
    keys = [chunk.astype(np.int64).tobytes() for chunk in chunks]
    words_of_chunk = dict(zip(keys, words, strict=True))
    assert len(words_of_chunk) == len(chunks), "a text without equal chunks"
    after = [0] * (1 + max(step for step, _ in given))
    for step, chunk in given:
        after[step] += words_of_chunk[chunk]
    after = np.cumsum(after).tolist()
    return after, {
        f"chck_{n}M": next(step for step, words in enumerate(after) if words >= 1000 * n)
        for n in [*range(1, 10), *range(10, 101, 10)]
        if after[-1] >= 1000 * n
    }


def test_a_run_counts_what_the_model_was_given(shop, spy):
    """A checkpoint at each thousand words, and compliance.json, metrics and card agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train.main(RUN) == 0
    after, crossed = crossings(spy)
    run_dir = Path("models/tiny")
    text = {
        name: len((shop / "train" / f"{name}.train").read_text().split())
        for name in ("books", "talk")
    }
    facts = json.loads((run_dir / "compliance.json").read_text())
    assert list(facts)[:3] == ["compliant", "problems", "notes"]
    date = datetime.datetime.fromisoformat(facts.pop("date"))
    assert 0 <= (datetime.datetime.now(datetime.UTC) - date).total_seconds() < 3600
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
        "compliant": True, "problems": [], "notes": [], "words_counted": sum(text.values()),
        "words_seen_by_kept_weights": sum(by_domain.values()), "git_hash": describe_environment()["git_hash"],
        "config_sha256": hashlib.sha256((run_dir / "training_config.yaml").read_bytes()).hexdigest(),
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


def test_a_resumed_run_has_the_checkpoints_of_an_uninterrupted_one(shop, spy, monkeypatch):
    """It dies within an epoch, and its newest resumable checkpoint is lost."""
    assert train.main([*RUN, "--model-name", "whole"]) == 0
    after, crossed = crossings(spy)
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
    shutil.rmtree(run_dir / "checkpoint-10")  # checkpoints after the one before are saved again
    last = max(map(checkpoint_step, checkpoints(run_dir)))
    kept = {name: inode for name, inode in before.items() if crossed[name] <= last}
    assert 0 < len(kept) < len(before)
    (run_dir / ".chck_9M.k1ll3d_0~").mkdir()  # a process that was killed while it saved
    assert train.main([*RUN, "--resume-from-checkpoint", "latest"]) == 0
    assert [path.name for path in milestones(run_dir)] == list(crossed)
    assert not list(run_dir.glob(".*"))
    assert {name: (run_dir / name).stat().st_ino for name in kept} == kept
    for name in crossed:
        assert (run_dir / name / "model.safetensors").read_bytes() == (
            whole / name / "model.safetensors"
        ).read_bytes()
        assert checkpoint_error(run_dir / name) is None
    papers = [json.loads((folder / "compliance.json").read_text()) for folder in (whole, run_dir)]
    for paper in papers:
        del paper["date"], paper["config_sha256"]  # the runs have different names
    assert papers[0] == papers[1]
    assert len({(run_dir / name / "model.safetensors").read_bytes() for name in crossed}) == len(
        set(crossed.values())
    )


def test_each_broken_rule_has_a_sentence():
    facts = {
        "track": "strict-small",
        "words_allowed": 10_000_000,
        "words_counted": 10_000_000,
        "epochs_allowed": 10,
        "epochs": 10.000000001,  # a rounding error
        "checkpoints": [{"name": "chck_1M", "there": True}],
        "other_words_learned_from": {"tokenizer.json": 0, "teacher": 77},
    }
    assert compliance_problems(facts) == []
    checkpoints = [{"name": f"chck_{n}M", "there": n == 2} for n in (1, 2, 3)]
    broken = {
        "the model learned from 10,000,001 words of text; strict-small allows 10,000,000": {
            "words_counted": 10_000_001
        },
        "it was trained for 10.5 epochs; BabyLM allows 10": {"epochs": 10.5},
        "checkpoints are missing: chck_1M, chck_3M": {"checkpoints": checkpoints},
        "the text that teacher was trained on is not recorded, and it counts too": {
            "other_words_learned_from": {"tokenizer.json": 0, "teacher": None}
        },
    }
    for sentence, change in broken.items():
        assert compliance_problems(facts | change) == [sentence]
    everything = {key: value for change in broken.values() for key, value in change.items()}
    assert compliance_problems(facts | everything) == list(broken)


def test_compliance_explains_early_stopping(shop, capsys):
    """The learning rate is too high: the best weights are not the last ones."""
    config = read_yaml_file("c.yaml")
    config["training"] |= {"early_stopping_patience": 1, "eval_steps": 4, "num_epochs": 10}
    config["training"] |= {"lr": 0.01, "lr_scheduler": "constant", "adam_beta2": 0.5}
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert train.main(RUN) == 0
    run_dir = Path("models/tiny")
    facts = json.loads((run_dir / "compliance.json").read_text())
    metrics = json.loads((run_dir / "training_metrics.json").read_text())
    results = metrics["results"]
    assert results["steps"] < results["steps_run"]
    kept, seen = facts["words_seen_by_kept_weights"], facts["words_seen"]
    assert kept == results["words_trained"] < seen
    note = (
        f"early stopping kept the weights of step {results['steps']}, which had seen {kept:,} words; "
        f"the run read on to step {results['steps_run']} and {seen:,} words, and these count"
    )
    assert (facts["compliant"], facts["notes"]) == (True, [note])
    assert note in capsys.readouterr().out
    assert note in (run_dir / "README.md").read_text()


def test_words_and_checkpoints_stay_exact_if_the_batch_size_changes(shop, spy):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with added_callback(Stop()):  # at step 5, within the first epoch
        assert train.main(RUN) == 130
    allow = ["--resume-from-checkpoint", "latest", "--allow-change", "training.batch_size"]
    assert train.main([*RUN, "--batch-size", "2", *allow]) == 0
    words, crossed = crossings(spy)
    record = json.loads(Path("models/tiny/compliance.json").read_text())
    assert {row["name"]: row["step"] for row in record["checkpoints"]} == crossed
    assert all(row["words_seen"] == words[row["step"]] for row in record["checkpoints"])
    assert [path.name for path in milestones(Path("models/tiny"))] == list(crossed)
    assert min(crossed.values()) <= 5 < max(crossed.values())
    assert record["words_seen"] == sum(record["words_seen_by_domain"].values()) == words[-1]
    assert record["epochs"] == 3


def test_a_resumed_run_warns_about_a_missing_checkpoint(shop, caplog, capsys):
    assert train.main(RUN) == 0
    run_dir = Path("models/tiny")
    shutil.rmtree(run_dir / "chck_1M")
    (run_dir / "training_metrics.json").unlink()
    assert train.main([*RUN, "--resume-from-checkpoint", "latest"]) == 0
    assert "chck_1M is missing, and the run resumes after its step" in caplog.text
    facts = json.loads((run_dir / "compliance.json").read_text())
    first, *others = facts["checkpoints"]
    assert not first["there"] and all(row["there"] for row in others)
    problem = "checkpoints are missing: chck_1M"
    assert (facts["compliant"], facts["problems"]) == (False, [problem])
    assert f"BabyLM's rules    {problem}\n" in capsys.readouterr().out
    assert f"did not follow all rules: {problem}.\n" in (run_dir / "README.md").read_text()


def test_a_resumed_run_that_ends_earlier_deletes_later_checkpoints(shop):
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


def test_a_new_run_does_not_delete_checkpoints_without_overwrite(shop, capsys):
    """A run that was stopped before its first resumable checkpoint still has what the rules ask for."""
    assert train.main(RUN) == 0
    run_dir = Path("models/tiny")
    for path in run_dir.iterdir():
        if not path.name.startswith("chck_") and path.name not in (CONFIG_FILE, DATA_REPORT_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train.main(RUN) == 2
    error = capsys.readouterr().err
    assert "--overwrite to replace it" in error and "--resume-from-checkpoint" not in error
    assert train.main([*RUN, "--overwrite", "--set", "training.num_epochs=1"]) == 0
    assert len(milestones(run_dir)) < 10  # those of the first run were deleted


def test_without_the_section_words_are_counted_and_nothing_is_saved(shop):
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


# ---- the budget ---------------------------------------------------------------------------------


def refused(capsys, *more: str) -> str:
    """The error line of train.py, which has not started a run."""
    assert train.main([*RUN, *more]) == 2
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("INFO", "WARNING"))
    ]
    assert not Path("models").exists()
    return line.removeprefix("error: ")


def text_sources() -> list[dict]:
    """The files of the training text as a data report lists them."""
    files = sorted(Path("train").iterdir())
    return [{**source_of(file), "words": len(file.read_text().split())} for file in files]


def test_too_many_epochs_are_an_error(shop, capsys):
    assert refused(capsys, "--num-epochs", "12") == (
        "c.yaml: training.num_epochs: 12: BabyLM allows 10 epochs; use 10 or fewer, or remove the babylm section"
    )
    assert train.main([*RUN, "--num-epochs", "10", "--dry-run"]) == 0


def test_too_many_words_are_an_error(shop, monkeypatch, capsys):
    books, talk = (
        len(Path("train", f"{name}.train").read_text().split()) for name in ("books", "talk")
    )
    monkeypatch.setitem(schema.TRACKS, "strict-small", books + talk - 1)
    assert refused(capsys) == (
        f"babylm.track: strict-small allows {books + talk - 1:,} words of training text; train has {books + talk:,} "
        f"(books {books:,}, talk {talk:,}): 1 too many; remove or shorten files, or train on the "
        "strict track (--set babylm.track=strict)"
    )
    assert train.main([*RUN, "--set", "babylm.track=strict", "--dry-run"]) == 0
    monkeypatch.setitem(schema.TRACKS, "strict-small", books + talk)
    assert train.main([*RUN, "--dry-run"]) == 0


def test_other_text_of_the_tokenizer_counts(shop, monkeypatch, capsys, caplog):
    """Trained on train/ and one more file, then without a valid record."""
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
    assert "and tokenizer.json was trained on 300 other words, which count too" in line
    assert line.endswith(": 1 too many; train tokenizer.json on this text only")
    monkeypatch.setitem(schema.TRACKS, "strict-small", words + 300)
    assert train.main([*RUN, "--dry-run"]) == 0
    assert "is not recorded" not in caplog.text
    record = Path("tokenizer.source.json")
    record.write_text(record.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    assert train.main([*RUN, "--dry-run"]) == 0
    assert "tokenizer.json: the text it was trained on is not recorded" in caplog.text


def test_other_text_of_teachers_counts(shop, capsys):
    """A teacher of the same text adds nothing, one of other text its words; what is unknown is None."""
    assert train.main([*RUN, "--num-epochs", "1"]) == 0
    report = json.loads(Path("models/tiny/data_report.json").read_text())
    report["train"]["sources"].append(
        {"file": "x", "sha256": "0", "domain": "x", "words": 77, "tokens": 99}
    )
    Path("other").mkdir()
    Path("other/data_report.json").write_text(json.dumps(report))
    config = train.load_config("c.yaml")
    report["train"]["sources"][-1]["words"] = None  # in reports of older versions
    Path("uncounted").mkdir()
    Path("uncounted/data_report.json").write_text(json.dumps(report))
    config["distillation"] = {"teachers": ["models/tiny", "other", "uncounted", "nowhere"]}
    learned = check_budget(config, text_sources()).other_words_learned_from
    assert learned == {
        "tokenizer.json": 0,
        "models/tiny": 0,
        "other": 77,
        "uncounted": None,
        "nowhere": None,
    }


def test_text_of_two_teachers_counts_once(shop, monkeypatch):
    config = train.load_config("c.yaml")
    files = [{"file": name, "sha256": name, "domain": "x", "words": 70} for name in "abc"]
    for name, sources in {"one": files[:2], "two": files[1:]}.items():
        Path(name).mkdir()
        Path(name, "data_report.json").write_text(json.dumps({"train": {"sources": sources}}))
    config["distillation"] = {"teachers": ["one", "two"]}
    budget = check_budget(config, text_sources())
    assert [budget.other_words_learned_from[name] for name in ("one", "two")] == [140, 140]
    monkeypatch.setitem(schema.TRACKS, "strict-small", budget.words + 210)  # of three files
    check_budget(config, text_sources())
    monkeypatch.setitem(schema.TRACKS, "strict-small", budget.words + 209)
    with pytest.raises(ValueError, match=": 1 too many"):
        check_budget(config, text_sources())


def test_a_tokenizer_that_changes_words_is_an_error(shop, capsys):
    """Without the section it trains, and counts the words that its tokens have."""
    tokenizer = json.loads(Path("tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
    Path("tokenizer.json").write_text(json.dumps(tokenizer))
    assert train.main(RUN) == 2
    assert "tokenizer.json changes the words of the text" in capsys.readouterr().err
    config = read_yaml_file("c.yaml")
    del config["babylm"]
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert train.main([*RUN, "--num-epochs", "1", "--overwrite"]) == 0
    metrics = json.loads(Path("models/tiny/training_metrics.json").read_text())
    assert 0 < metrics["results"]["words_trained"] < metrics["data"]["train"]["words"]


def test_words_left_out_are_those_of_the_epochs_that_were_cut_elsewhere(shop):
    """With data.random_offset each epoch loses other words at its start and end."""
    assert train.main([*RUN, "--set", "data.random_offset=true"]) == 0
    facts = json.loads(Path("models/tiny/compliance.json").read_text())
    lost = 3 * facts["words"] - facts["words_seen"]
    assert lost > 0
    assert facts["words_left_out"] == pytest.approx(lost / 3)


def test_no_milestone_is_saved_with_a_nan_weight(shop):
    """The row of a NaN is logged, and milestones are saved with the row of their step."""

    class Corrupt(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                return  # the first step is always logged
            with torch.no_grad():
                next(model.parameters()).view(-1)[7] = float("nan")

    with added_callback(Corrupt()):
        # nothing but a milestone is due before step 5
        assert train.main([*RUN, "--set", "training.logging_steps=1000"]) == 2
    last = json.loads(Path("models/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert 1 < last["step"] < 5 and last["loss"] is None
    assert not milestones(Path("models/tiny"))
