"""Check that a training text fits the budget of words of a BabyLM track.

The text that a tokenizer or a teacher was trained on counts too.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from babyllama.data.tokenizer import tokenizer_sources
from babyllama.files import read_json
from babyllama.runs.run_dir import DATA_REPORT_FILE
from babyllama.schema import MAX_EPOCHS, TRACKS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """A track's allowance and the words that count toward it, as compliance.json has them."""

    track: str
    words_allowed: int
    epochs_allowed: int
    words: int  # of the training text
    words_by_domain: dict[str, int]
    other_words_learned_from: dict[str, int | None]  # by tokenizer or teacher; None: no record
    words_counted: int


def teacher_sources(path: str) -> list[dict] | None:
    """Return the files that the teacher at `path` was trained on, or None if it has no record."""
    try:
        return read_json(Path(path, DATA_REPORT_FILE))["train"].get("sources")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def check_budget(config: dict, sources: list[dict]) -> Budget:
    """Count the words that count toward the track's budget; raise ValueError if they are too many.

    These are the words of the training text, whose `sources` are in its data report, and of any
    other text that the tokenizer or a teacher was trained on, because the model learns from it too.
    If there is no record of that text, warn.
    """
    track = config["babylm"]["track"]
    data = config["data"]

    # count the training text
    words = sum(source["words"] for source in sources)
    words_by_domain: Counter[str] = Counter()
    for source in sources:
        words_by_domain[source["domain"]] += source["words"]

    # add the text that only the tokenizer or a teacher was trained on
    learned_from = {data["tokenizer_path"]: tokenizer_sources(data["tokenizer_path"])}
    for teacher in config.get("distillation", {}).get("teachers", ()):
        learned_from[teacher] = teacher_sources(teacher)
    training_hashes = {source["sha256"] for source in sources}
    words_of_file = {}  # sha256 -> words, so that a file that several learned from counts once
    other_words: dict[str, int | None] = {}
    for path, recorded_sources in learned_from.items():
        files = {source["sha256"]: source["words"] for source in recorded_sources or ()}
        other_files = {sha: n for sha, n in files.items() if sha not in training_hashes}
        if recorded_sources is None or None in other_files.values():
            log.warning(
                "%s: the text it was trained on is not recorded; it counts toward BabyLM's budget",
                path,
            )
            other_words[path] = None
            continue
        other_words[path] = sum(other_files.values())
        words_of_file |= other_files

    # compare the sum with what the track allows
    total = words + sum(words_of_file.values())
    budget = Budget(
        track=track,
        words_allowed=TRACKS[track],
        epochs_allowed=MAX_EPOCHS,
        words=words,
        words_by_domain=dict(words_by_domain),
        other_words_learned_from=other_words,
        words_counted=total,
    )
    if total > TRACKS[track]:
        raise ValueError(budget_error(budget, data["train_path"]))
    log.info("babylm: %s, %s of %s words", track, f"{words:,}", f"{TRACKS[track]:,}")
    return budget


def budget_error(budget: Budget, train_path: str) -> str:
    """Explain in one line why the words that count are too many, and what to do about it."""
    words = budget.words
    allowed = budget.words_allowed
    excess = budget.words_counted - allowed
    domains = Counter(budget.words_by_domain).most_common()
    listed = ", ".join(f"{name} {count:,}" for name, count in domains[:10])
    if len(domains) > 10:
        listed += f", {len(domains) - 10} more"
    line = (
        f"babylm.track: {budget.track} allows {allowed:,} words of training text; "
        f"{train_path} has {words:,} ({listed})"
    )
    remedies = []
    if words > allowed:
        remedies.append("remove or shorten files")
        if budget.track == "strict-small":
            remedies[0] += ", or train on the strict track (--set babylm.track=strict)"
    for path, count in budget.other_words_learned_from.items():
        if count:
            line += f", and {path} was trained on {count:,} other words, which count too"
            remedies.append(f"train {path} on this text only")
    return f"{line}: {excess:,} too many; {', and '.join(remedies)}"
