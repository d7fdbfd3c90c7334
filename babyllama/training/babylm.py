"""Save BabyLM's checkpoints by the number of words that a model has seen.

With a `babylm:` section in the configuration, a run saves a model directory chck_<N>M as soon as it
has seen N million words, and writes its budget (budget.py), the checkpoints and a verdict into
compliance.json. Without the section it only counts the words (data/words.py).

    seen = SeenWords(counts, order=lambda epoch: np.arange(n), steps=steps)
    print(seen.words[100], seen.first_step(1_000_000), seen.by_domain(100))
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer, TrainerCallback

from babyllama.data.words import WordCounts
from babyllama.files import atomic_write, git_commit, sha256, utc_now
from babyllama.runs.checkpoints import checkpoint_words, milestone_name, seal_checkpoint
from babyllama.runs.run_dir import CONFIG_FILE
from babyllama.schema import MAX_EPOCHS
from babyllama.training.budget import Budget
from babyllama.training.steps import Steps

log = logging.getLogger(__name__)


# ---- words seen ---------------------------------------------------------------------------------


class SeenWords:
    """The number of words that a run has seen after each step; `words` is int64 (steps + 1,).

    The seed and the epoch determine the order of the chunks, so all words can be counted before the
    first step. Counting them while training would be harder: each chunk would need its word count
    beside it, because only the chunk before tells whether the first token begins a word; every step
    would need a sum over all processes; and every checkpoint would have to store the counts.
    """

    def __init__(
        self,
        counts: WordCounts,
        order: Callable[[int], np.ndarray],
        steps: Steps,
        offset: Callable[[int], int] = lambda epoch: 0,
    ):
        """Count the words of each epoch, from its order of chunks and their first offset."""
        self.counts = counts
        self.order = order
        self.offset = offset
        self.steps = steps
        words_per_step = []  # one array (steps,) for each epoch
        for epoch in range(steps.epochs):
            words = counts.per_chunk(offset(epoch))[order(epoch)]
            first_chunks = [chunks.start for chunks in steps.slices(epoch)]
            words_per_step.append(np.add.reduceat(words, first_chunks))
        self.words = np.cumsum(np.concatenate([[0], *words_per_step]))

    def first_step(self, words: int) -> int | None:
        """Return the first step after which this many words were seen; None if it never happens."""
        step = int(np.searchsorted(self.words, words))
        return step if step < len(self.words) else None

    def words_per_epoch(self, step: int) -> int | float:
        """Return the mean number of words in the chunks of the epochs that were begun by a step.

        With data.random_offset each epoch cuts the text elsewhere, and leaves out other words.
        """
        begun = max(1, int((self.steps.epoch_ends[:-1] < step).sum()))
        offsets = Counter(self.offset(epoch) for epoch in range(begun))
        words = sum(
            times * int(self.counts.per_chunk(offset).sum()) for offset, times in offsets.items()
        )
        return words // begun if words % begun == 0 else words / begun

    def by_domain(self, step: int) -> dict[str, int]:
        """Return the number of words of each domain that were seen after a step."""
        words: Counter[str] = Counter()
        n_seen = int(self.steps.chunks_seen[step])
        n_chunks = self.steps.n_chunks
        for epoch in range(math.ceil(n_seen / n_chunks)):
            chunks = self.order(epoch)[: n_seen - epoch * n_chunks]
            offset = self.offset(epoch)
            times_seen = np.bincount(chunks, minlength=self.counts.n_chunks(offset))
            words.update(self.counts.by_domain(times_seen, offset))
        return dict(words)


def chunk_order(n_chunks: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which Trainer's sampler visits the chunks of an epoch, (N,) int64.

    This is the order over all processes together.
    """
    sampler = SeedableRandomSampler(range(n_chunks), generator=torch.Generator(), data_seed=seed)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, dtype=np.int64, count=n_chunks)


class BabyLMCallback(TrainerCallback):
    """Count the words a run has seen and, with a `budget`, save BabyLM's checkpoints.

    A checkpoint is saved together with the log row of its step, because only then is it certain
    that the loss is finite. A resumed run deletes the checkpoints of later steps and saves them
    again, because it may continue differently; it keeps those of earlier steps.
    """

    def __init__(
        self, trainer: Trainer, counts: WordCounts, config: dict, budget: Budget | None = None
    ):
        self.trainer = trainer
        self.counts = counts
        self.config = config
        self.budget = budget
        self.targets = checkpoint_words(budget.track) if budget else []
        self.seen: SeenWords | None = None  # set when training begins
        self.due: dict[int, list[Path]] = {}  # step -> checkpoints to save after it

    def on_train_begin(self, args, state, control, **kwargs):
        dataset = self.trainer.train_dataset
        self.seen = SeenWords(
            self.counts,
            order=lambda epoch: chunk_order(len(dataset), args.data_seed, epoch),
            steps=self.trainer.steps,
            offset=getattr(dataset, "offset_in", lambda epoch: 0),  # data.random_offset
        )

        # find the step of each checkpoint; those of earlier steps are there if we resume
        for target in self.targets:
            folder = Path(args.output_dir, milestone_name(target))
            step = self.due_step(target)
            if step is not None and step <= state.global_step:
                if not folder.is_dir():
                    log.warning(
                        "%s is missing, and the run resumes after its step %d", folder, step
                    )
                continue
            if args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            if step is not None:
                self.due.setdefault(step, []).append(folder)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.due:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            return  # this row says why the run ends; nothing is saved
        folders = self.due.pop(state.global_step, ())
        for folder in folders:
            # only one process writes, but all of them must help to gather a sharded model's weights
            writing = atomic_write(folder) if args.should_save else contextlib.nullcontext(folder)
            with writing as draft:
                self.trainer.save_plain(draft)
                if args.should_save:
                    seal_checkpoint(draft)
        if folders:
            self.trainer.log_benchmark()

    def due_step(self, target: int) -> int | None:
        """Return the step after which the checkpoint of a target is saved; None if there is none.

        Text below the budget ends shortly before the last target, even after ten epochs, but
        BabyLM's collator ignores age of acquisition unless all checkpoints are there. So the end of
        such a run is its last checkpoint.
        """
        step = self.seen.first_step(target)
        if step is not None or target != self.targets[-1]:
            return step
        steps = self.trainer.steps
        has_all_epochs = steps.epochs == MAX_EPOCHS and steps.total == steps.available
        has_all_others = self.seen.first_step(self.targets[-2]) is not None
        return steps.total if has_all_epochs and has_all_others else None

    def words_seen(self, step: int) -> int:
        """Return the number of words seen after a step."""
        return int(self.seen.words[step])

    def compliance(self) -> dict[str, Any] | None:
        """Return the content of compliance.json, or None without a budget."""
        if self.budget is None:
            return None
        run_dir = Path(self.trainer.args.output_dir)
        last_step = self.trainer.state.global_step
        kept_step = self.trainer.kept_step()

        # list the checkpoints that the run has reached
        checkpoints = []
        notes = []
        for target in self.targets:
            step = self.due_step(target)
            if step is None or step > last_step:
                break
            name = milestone_name(target)
            if self.words_seen(step) < target:
                notes.append(
                    f"{name} is the end of the run, after {self.words_seen(step):,} words: "
                    f"{MAX_EPOCHS} epochs of this text have no more"
                )
            checkpoints.append(
                {
                    "name": name,
                    "words_seen": self.words_seen(step),
                    "step": step,
                    "there": (run_dir / name).is_dir(),
                }
            )

        # count the words, of all steps and of those whose weights are kept
        record = {
            **asdict(self.budget),
            "word": "characters between white space, counted in the chunk in which they begin",
            "text": self.config["data"]["train_path"],
            "words_left_out": self.budget.words - self.seen.words_per_epoch(last_step),
            "epochs": self.trainer.state.epoch,
            "words_seen": self.words_seen(last_step),
            "words_seen_by_domain": self.seen.by_domain(last_step),
            "words_seen_by_kept_weights": self.words_seen(kept_step),
            "checkpoints": checkpoints,
            "date": utc_now(),
            "git_hash": git_commit(),
            "config_sha256": sha256(run_dir / CONFIG_FILE),
        }

        # check them against the rules
        if kept_step < last_step:
            notes.append(
                f"early stopping kept the weights of step {kept_step:,}, which had seen "
                f"{record['words_seen_by_kept_weights']:,} words; the run read on to step "
                f"{last_step:,} and {record['words_seen']:,} words, and these count"
            )
        problems = compliance_problems(record)
        return {"compliant": not problems, "problems": problems, "notes": notes, **record}


def attach_word_counter(
    trainer: Trainer, config: dict, report: dict, budget: Budget | None
) -> BabyLMCallback:
    """Make a trainer count words and, with a budget, save BabyLM's checkpoints.

    `report` is DataProcessor's report on the training text, `budget` comes from check_budget. Raise
    ValueError if there is a budget and the tokenizer changes the words of the text, because they
    cannot be counted then.
    """
    chunks = trainer.train_dataset
    while hasattr(chunks, "chunks"):  # ShiftedChunks and CachedChunks wrap the original chunks
        chunks = chunks.chunks
    counts = WordCounts(chunks, trainer.processing_class, report["sources"])

    # the last, partial chunk is not trained on, so its words may be missing, but no others
    missing = report["words"] - int(counts.per_chunk().sum())
    if budget and not 0 <= missing <= report["tokens_left_out"]:
        path = config["data"]["tokenizer_path"]
        raise ValueError(
            f"{path} changes the words of the text ({missing:,} are missing in its tokens), so the "
            "words that a model sees cannot be counted; use a tokenizer of train_tokenizer.py"
        )
    callback = BabyLMCallback(trainer, counts, config, budget)
    trainer.add_callback(callback)
    return callback


def compliance_problems(record: dict[str, Any]) -> list[str]:
    """Return a sentence for each rule of BabyLM that a run did not follow, or may not have.

    `record` has the keys of compliance.json. Too many words or epochs are an error before training;
    here they are checked again, in what the run really did.
    """
    problems = []
    if record["words_counted"] > record["words_allowed"]:
        problems.append(
            f"the model learned from {record['words_counted']:,} words of text; "
            f"{record['track']} allows {record['words_allowed']:,}"
        )
    if round(record["epochs"], 4) > record["epochs_allowed"]:  # a rounding error breaks no rule
        problems.append(
            f"it was trained for {record['epochs']:.4g} epochs; BabyLM allows "
            f"{record['epochs_allowed']}"
        )
    missing = [row["name"] for row in record["checkpoints"] if not row["there"]]
    if missing:
        problems.append(f"checkpoints are missing: {', '.join(missing)}")
    for path, words in record["other_words_learned_from"].items():
        if words is None:
            problems.append(
                f"the text that {path} was trained on is not recorded, and it counts too"
            )
    return problems
