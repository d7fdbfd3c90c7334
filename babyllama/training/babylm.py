"""How many words a run has seen after each step, and what BabyLM's rules make of it.

The count is a function of the order of the chunks alone, which every process draws from the same seed: it needs no
communication, and it is the same after a resume. `babylm:` in a configuration adds the rules: a budget of words and
epochs that is checked before anything is made, a model directory chck_<N>M at the first step that crosses N million
words, and compliance.json. Where words begin among the tokens is the business of words.py.

    ledger = Ledger(Words(arrow, report), length=128, order=lambda epoch: ..., chunks_per_step=32, epochs=10)
    print(ledger.after[100], ledger.first_step(1_000_000), ledger.by_domain(100))
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from babyllama.data.documents import find_files, new_report, read_documents, source_of
from babyllama.data.tokenizer import tokenizer_sources
from babyllama.data.words import Words
from babyllama.schema import MAX_EPOCHS, TRACKS
from babyllama.training import distributed
from babyllama.training.run_dir import DATA_REPORT_FILE, MILLION, milestone_name, seal_checkpoint

log = logging.getLogger(__name__)
COUNTS_TOO = "what a tokenizer or a teacher learned from counts too"


def checkpoint_words(track: str) -> list[int]:
    """The word counts at which BabyLM asks for a checkpoint: each million to ten, each ten to 100, each 100 to 1000."""
    millions = [*range(1, 10), *range(10, 101, 10)]
    if track == "strict":
        millions += range(200, 1001, 100)
    return [n * MILLION for n in millions]


# ---- what a run has seen ------------------------------------------------------------------------


class Ledger:
    """Words seen after any step: `after[s]`, int64 (steps + 1,). A step takes the next chunks_per_step of the order."""

    def __init__(
        self, words: Words, length: int, order: Callable[[int], np.ndarray], chunks_per_step: int, epochs: int,
        offset: Callable[[int], int] = lambda epoch: 0,
    ):  # fmt: skip
        """order(epoch): the chunks of an epoch as they come; offset(epoch): the token at which its first one begins."""
        self.words, self.length, self.order, self.offset = words, length, order, offset
        self.chunks_per_step = chunks_per_step
        steps = []
        for epoch in range(epochs):
            seen = words.per_chunk(length, offset(epoch))[order(epoch)]
            n = distributed.steps_per_epoch(
                len(seen), chunks_per_step
            )  # the last one takes what is left
            steps.append(np.add.reduceat(seen, np.arange(n) * chunks_per_step))
        self.ends = np.cumsum([0, *map(len, steps)])  # steps at the end of each epoch
        self.after = np.cumsum(np.concatenate([[0], *steps]))

    def first_step(self, words: int) -> int | None:
        """The first step after which `words` words were seen; None where the run ends before."""
        step = int(np.searchsorted(self.after, words))
        return step if step < len(self.after) else None

    def by_domain(self, step: int) -> dict[str, int]:
        """The words seen after a step, by the domain that they are of."""
        seen: Counter[str] = Counter()
        for epoch, (start, stop) in enumerate(zip(self.ends[:-1], self.ends[1:], strict=True)):
            if start < step:
                chunks = self.order(epoch)
                chunks = chunks if step >= stop else chunks[: (step - start) * self.chunks_per_step]
                offset = self.offset(epoch)
                times = np.bincount(chunks, minlength=(self.words.tokens - offset) // self.length)
                seen.update(self.words.by_domain(times, self.length, offset))
        return dict(seen)


def order_of(loader) -> Callable[[int], np.ndarray]:
    """Epoch -> the chunks of all processes in the order in which a data loader deals them out."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler

    def order(epoch: int) -> np.ndarray:
        sampler = copy.copy(batches.sampler)  # reading the sampler itself would move it on
        sampler.generator = torch.Generator()
        sampler.set_epoch(epoch)
        return np.fromiter(sampler, dtype=np.int64)

    return order


class BabyLMCallback(TrainerCallback):
    """Keeps a run's ledger and, with a `budget` of BabyLM, saves the model at the first step that crosses each target.

    The model is saved when the row of that step is logged: by then Trainer knows that the loss is finite. A resumed run
    drops those of later steps and makes them anew, since it may take another course; what lies before its checkpoint
    stays.
    """

    def __init__(self, trainer: Trainer, words: Words, config: dict, budget: dict | None = None):
        self.trainer, self.words, self.config, self.budget = trainer, words, config, budget
        self.targets = checkpoint_words(budget["track"]) if budget else []
        self.ledger: Ledger | None = None  # from the beginning of training on
        self.due: dict[int, list[Path]] = {}

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        data = self.trainer.train_dataset
        offset = getattr(data, "offset_in", lambda epoch: 0)  # data.random_offset
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        length = self.config["data"]["seq_length"]
        self.ledger = Ledger(
            self.words, length, order_of(train_dataloader), per_step, state.num_train_epochs, offset
        )
        for target in self.targets:
            step, folder = (
                self.ledger.first_step(target),
                Path(args.output_dir, milestone_name(target)),
            )
            later = step is None or step > state.global_step
            if later and args.should_save:
                shutil.rmtree(
                    folder, ignore_errors=True
                )  # of a run that went on from here by another course
            if step is not None and later:
                self.due.setdefault(step, []).append(folder)
            elif step is not None and not folder.is_dir():
                log.warning(
                    "%s is not there, and its step %d lies before the checkpoint", folder, step
                )

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.due:
            control.should_log = True

    def on_log(self, args, state, control, **kwargs):
        for folder in self.due.pop(state.global_step, ()):
            draft = folder.with_name(f".{folder.name}.part")
            if args.should_save:
                shutil.rmtree(draft, ignore_errors=True)  # of a process that died while it wrote
            self.trainer.save_plain(draft)  # all processes: a sharded model is put together
            if args.should_save:
                seal_checkpoint(draft)
                draft.rename(folder)

    def words_seen(self, step: int) -> int:
        """Words seen after a step."""
        return int(self.ledger.after[step])

    def compliance(self) -> dict[str, Any] | None:
        """The content of compliance.json: what the rules ask of a submission, and what this run did; None without."""
        if self.budget is None:
            return None
        last, run_dir = self.trainer.state.global_step, Path(self.trainer.args.output_dir)
        steps = {
            target: step
            for target in self.targets
            if (step := self.ledger.first_step(target)) and step <= last
        }
        made = [
            {
                "name": name,
                "words_seen": self.words_seen(step),
                "step": step,
                "there": (run_dir / name).is_dir(),
            }
            for target, step in steps.items()
            for name in [milestone_name(target)]
        ]
        return {
            **self.budget,
            "word": "characters between white space, counted in the chunk in which they begin",
            "text": self.config["data"]["train_path"],
            "words_left_out": self.budget["words"]
            - int(self.words.per_chunk(self.config["data"]["seq_length"]).sum()),
            "epochs": self.trainer.state.epoch,
            "words_seen": self.words_seen(last),
            "words_seen_by_domain": self.ledger.by_domain(last),
            "checkpoints": made,
        }


def attach_word_counter(
    trainer: Trainer, config: dict, report: dict, budget: dict | None
) -> BabyLMCallback | None:
    """Have the trainer count words and, with a budget of check_budget, save BabyLM's checkpoints.

    `report` is the training split's. None where the tokenizer does not let words be located; ValueError with a budget.
    """
    if budget is None and report["sources"][0]["words"] is None:
        return None
    chunks = trainer.train_dataset
    while not hasattr(chunks, "cache_files"):  # shifted, or with what teachers said
        chunks = chunks.chunks
    words = Words(Path(chunks.cache_files[0]["filename"]), report)
    word_log = BabyLMCallback(trainer, words, config, budget)
    trainer.add_callback(word_log)
    return word_log


# ---- BabyLM's rules -----------------------------------------------------------------------------


def count_text(folder: str) -> list[dict]:
    """The files of a training text: `file`, `sha256`, `domain` and `words` of each."""
    found = []
    for path in find_files(folder, "train"):
        report = new_report()
        for _ in read_documents(path, report):
            pass
        found.append({**source_of(path), "words": report["words"]})
    return found


def teacher_sources(path: str) -> list[dict] | None:
    """The files that train.py trained the teacher at `path` on; None where its directory does not say."""
    report = Path(path, DATA_REPORT_FILE)
    if not report.is_file():
        return None
    return json.loads(report.read_text(encoding="utf-8"))["train"].get("sources")


def check_budget(config: dict) -> dict[str, Any]:
    """What the track allows and what counts toward it; ValueError, with the arithmetic, where that is more.

    The words of the training text, and those of other text that the tokenizer or a teacher learned from. What is not
    recorded is warned of. It reads the text once.
    """
    track, data = config["babylm"]["track"], config["data"]
    allowed, text = TRACKS[track], count_text(data["train_path"])
    own = {source["sha256"] for source in text}
    learned = {data["tokenizer_path"]: tokenizer_sources(data["tokenizer_path"])}
    learned |= {
        path: teacher_sources(path) for path in config.get("distillation", {}).get("teachers", ())
    }
    other = {}  # what each one learned from besides, where that is recorded: {sha256: words}
    for path, sources in learned.items():
        if sources is not None:
            files = {
                source["sha256"]: source["words"]
                for source in sources
                if source["sha256"] not in own
            }
            other |= {path: files} if None not in files.values() else {}
    extra = sum(
        {sha: count for files in other.values() for sha, count in files.items()}.values()
    )  # each file once
    words, domains = sum(source["words"] for source in text), Counter()
    for source in text:
        domains[source["domain"]] += source["words"]
    budget = {
        "track": track, "words_allowed": allowed, "epochs_allowed": MAX_EPOCHS, "words": words,
        "words_by_domain": dict(domains),
        "other_words_learned_from": {path: sum(other[path].values()) if path in other else None for path in learned},
    }  # fmt: skip
    for path in learned.keys() - other.keys():
        log.warning(
            "%s: which text it learned from is not recorded; %s toward BabyLM's budget",
            path,
            COUNTS_TOO,
        )
    if words + extra > allowed:
        raise ValueError(budget_error(budget, data, words + extra))
    log.info("babylm: %s, %s of %s words", track, f"{words:,}", f"{allowed:,}")
    return budget


def budget_error(budget: dict[str, Any], data: dict, total: int) -> str:
    """Why `total` words are more than the track allows, in one line, and what to do."""
    words, allowed, domains = budget["words"], budget["words_allowed"], budget["words_by_domain"]
    largest = sorted(domains.items(), key=lambda item: -item[1])[:10]
    listed = ", ".join(f"{name} {count:,}" for name, count in largest)
    listed += f", {len(domains) - 10} more" if len(domains) > 10 else ""
    line = f"babylm.track: {budget['track']} allows {allowed:,} words of training text; "
    line += f"{data['train_path']} has {words:,} ({listed})"
    remedies = []
    if words > allowed:
        larger = ", or train on the strict track (--set babylm.track=strict)"
        remedies.append(
            "leave files out of the text or shorten one"
            + larger * (budget["track"] == "strict-small")
        )
    for path, count in budget["other_words_learned_from"].items():
        if count:
            line += f", and {path} learned from {count:,} other words ({COUNTS_TOO})"
            remedies.append(f"make {path} anew from this text alone")
    return f"{line}: {total - allowed:,} too many; {', and '.join(remedies)}"
