"""The cleaners: what each BabyLM domain's files carry that is not text, and the mending of blanks and punctuation.

    from data_utils import DomainCleaners, create_cleaner_registry
    DomainCleaners.wikipedia("= = History = =\\nIt began in 1900.[12]\\n")     # "It began in 1900.\\n"

Pure functions from text to text, linear in its length. They know nothing of files and documents (data_utils.py does).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

log = logging.getLogger(__name__)


# Patterns are linear by construction: no quantifier stands over another one that can match the same text.


def _line(pattern: str, flags: int = 0) -> re.Pattern:
    """A pattern for whole lines: what matches is removed with its newline."""
    return re.compile(rf"^[ \t]*+(?:{pattern})[ \t]*+(?:\n|\Z)", re.MULTILINE | flags)


_TIME = r"\d{1,2}:\d{2}:\d{2}[,.]\d{1,3}"
_CUE_HEAD = rf"^(?:[ \t]*+\d{{1,7}}[ \t]*+\n)?[ \t]*+{_TIME} ?(?:-->|,) ?{_TIME}"
_CREDIT_WORDS = (
    r"subtitles?(?: by|:)|subtitled by|synchro for|synchroni[sz]ed by|synced|corrected by|captions? by|captioned by|"
    r"captioning by|transcribed by|transcript by|translated by|translation by|opensubtitles|addic7ed|ripped by|"
    r"this subtitle is|subtitles? downloaded"
)
_DIRECTIONS = (
    "laughs|laughter|laugh|sighs|sigh|coughs|cough|cries|gasps|giggles|chuckles|whispers|shouts|screams|yawns|smiles|"
    "nods|applause|music|pause|silence|beat|inaudible|unintelligible|indistinct|unclear|crosstalk|aside|exit|exits|enters"
)
_NO_DIRECTION = "(?!(?:be|includ|mean|accord|depend|follow|dur|regard|consider|someth|noth|anyth|everyth|hav|do|go)ing)"
_HOW = r"(?: (?:[a-z]{2,12}ly|(?:to|at|in|on|up|off|out) [a-z ]{1,24}))?"
WIKI_STEPS = [
    (re.compile(r"</?(?:doc|ref|br|nowiki)(?: [^<>\n]*+)?/?>"), ""),
    (re.compile(r"\{\{[^{}\n]*+\}\}"), ""),
    (re.compile(r"\[\[(?:[^\[\]|\n]*+\|)?([^\[\]|\n]*+)\]\]"), r"\1"),
    (_line(r"=[^\n]*(?<==)"), ""),
    (re.compile(r" ?\[(?:\d{1,4}|citation needed|note \d{1,3}|[a-z])\]"), ""),
    (re.compile(r" @([-,.])@ "), r"\1"),
]
CUE_STEPS = [
    (re.compile(rf"(?:^[ \t]*+\n)?{_CUE_HEAD}[^\n]*+(?:\n|\Z)", re.M), ""),
    (re.compile(r"\{\\[^{}\n]*+\}"), ""),
    (re.compile(r"</?(?:i|b|u|font|c|em|strong|span|br)(?: [^<>\n]*+)?/?>", re.I), ""),
    (re.compile("[\u266a\u266b]"), ""),
    (re.compile(rf"^[^\n]*(?:{_CREDIT_WORDS})[^\n]*+(?:\n|\Z)", re.M | re.I), ""),
]
SPEECH_STEPS = [
    (re.compile(r"\\++([\[\]])"), r"\1"),
    (re.compile(r"\[(?:glossary|time|continuity|clock):([^\[\]|\n]*+)(?:\|[^\[\]\n]*+)?\]"), r"\1"),
    (_line(r"_(?:page|tape|note|ship|extra) ?:[^\n]*+|\[\d{2}(?::\d{2}){1,3}\]"), ""),
    (re.compile(r"^[ \t]*+\*[A-Z][A-Z0-9]{1,3}:[ \t]*+", re.M), ""),
    (re.compile(r"^[ \t]*+\*\*[^*:\n]{1,60}:\*\*[ \t]*+", re.M), ""),
    (re.compile(r"^[ \t]*+(-? ?)(?:[AB]\.\d{1,4}|[A-Z][A-Z0-9 .'&#/-]{0,38}):(?![\d/])[ \t]*+", re.M), r"\1"),
    (re.compile(rf" ?\({_NO_DIRECTION}(?:[a-z]{{2,12}}ing|{_DIRECTIONS}){_HOW}\)"), ""),
    (re.compile(r"\+\.\.\."), "..."),
    (re.compile(r"\+/{1,2}([.?!])"), r"\1"),
    (re.compile(r"&[=~+-][A-Za-z:_]++|\b(?:xxx|yyy)\b"), ""),
]
STORY_STEPS = [
    (_line(r"\*[ \t](?:License|Text|Illustration|Language|Translation|Author|Source)\b[^\n]*+"), ""),
    (_line(r"#{1,6}"), ""),
    (re.compile(r"^#{1,6}[ \t]++", re.M), ""),
]


def _drop_brackets(text: str) -> str:
    """Remove what stands in square brackets within a line, nested ones too; unpaired brackets stay."""
    if "[" not in text:
        return text
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if "[" in line:
            open_at, kept, at = [], [], 0
            for mark in re.finditer(r"[\[\]]", line):
                if mark[0] == "[":
                    open_at.append(mark.start())
                elif open_at and (start := open_at.pop()) >= at and not open_at:
                    kept.append(line[at:start])
                    at = mark.end()
            lines[i] = "".join([*kept, line[at:]])
    return "\n".join(lines)


_START = re.compile(r"^\*{3,} ?START OF (?:THIS|THE) PROJECT[^\n]*+", re.M)
_LEGAL = re.compile(
    r"Project Gutenberg|gutenberg\.(?:org|net)|^1\.[A-F](?:\.\d)?\.? |^\*{3,} ?(?:START|END)|"
    r"^(?:THE FULL|END:) [A-Z ]*LICENSE",
    re.M,
)


def _drop_licence(text: str) -> str:
    """Remove Project Gutenberg's header (from its first line to START) and, paragraph by paragraph, its licence."""
    if "Gutenberg" not in text and "GUTENBERG" not in text and "\n1." not in text:
        return text
    kept, at = [], 0
    for mark in _START.finditer(text):
        head = text.find("Project Gutenberg", max(at, mark.start() - 6000), mark.start())
        kept.append(text[at : text.rfind("\n", 0, head) + 1 if head >= 0 else mark.start()])
        at = mark.end()
    text = "".join([*kept, text[at:]])
    return "\n\n".join(part for part in text.split("\n\n") if not _LEGAL.search(part))


def _tidy(text: str) -> str:
    """Runs of blanks become one, lines lose the blanks at their ends, and at most one empty line follows another."""
    if "\t" in text or "\u00a0" in text:
        text = text.replace("\t", " ").replace("\u00a0", " ")
    if "  " in text:
        text = re.sub(" {2,}", " ", text)
    text = text.replace(" \n", "\n").replace("\n ", "\n").strip(" ")
    return re.sub("\n{4,}", "\n\n\n", text) if "\n\n\n\n" in text else text


def _cleaner(*steps) -> Callable[[str], str]:
    """Apply steps (pattern and replacement, or function) until nothing changes, so that the result is idempotent."""

    def clean(text: str) -> str:
        for _ in range(20):
            before = text
            for step in steps:
                text = step(text) if callable(step) else step[0].sub(step[1], text)
            text = _tidy(text)
            if text == before:
                break
        return text

    return clean


_wikipedia = _cleaner(*WIKI_STEPS)
_subtitles = _cleaner(*CUE_STEPS, *SPEECH_STEPS[:-3], _drop_brackets)
_dialogue = _cleaner(*SPEECH_STEPS, _drop_brackets)
_books = _cleaner(_drop_licence, *STORY_STEPS)


class DomainCleaners:
    """What each domain's files carry that is not text. Every cleaner is pure, idempotent and keeps newlines."""

    @staticmethod
    def wikipedia(text: str) -> str:
        """Remove headings (== Title ==, = = Title = =), citation marks ([12]), templates and link markup."""
        return _wikipedia(text)

    @staticmethod
    def subtitles(text: str) -> str:
        """Remove cue numbers with their timings, tags, credits, speakers in capitals and [sounds]."""
        return _subtitles(text)

    @staticmethod
    def dialogue(text: str) -> str:
        """Remove speaker labels (*CHI:, MARY:, A.1:, **Name:**), [actions], (smiling), and CHAT's codes."""
        return _dialogue(text)

    @staticmethod
    def books(text: str) -> str:
        """Remove Project Gutenberg's header and licence, Markdown's marks and the credit lines of picture books."""
        return _books(text)

    @staticmethod
    def default(text: str) -> str:
        """Leave the text as it is."""
        return text


def create_cleaner_registry() -> dict[str, Callable[[str], str]]:
    """Domain name -> cleaner: every file name of BabyLM 2023 to 2026, and wikipedia, subtitles, dialogue, default."""
    kinds = {
        DomainCleaners.wikipedia: "wikipedia simple_wiki simple_wikipedia",
        DomainCleaners.subtitles: "subtitles open_subtitles qed",
        DomainCleaners.dialogue: "dialogue aochildes childes bnc_spoken switchboard",
        DomainCleaners.books: "cbt children_stories gutenberg",
        DomainCleaners.default: "default",
    }
    return {name: cleaner for cleaner, names in kinds.items() for name in names.split()}


def cleaner_for(domain: str) -> Callable[[str], str]:
    """The cleaner of a domain; one that the registry does not know is announced and left uncleaned."""
    registry = create_cleaner_registry()
    if domain not in registry:
        log.warning(
            "domain %s has no cleaner of its own (known: %s): its text is left as it is", domain, ", ".join(registry)
        )
    return registry.get(domain, DomainCleaners.default)


_SPACE_BEFORE = re.compile(r"(?<=\S) ([,;:!?.])(?=[\s\"\u201d\u2019]|\Z)")
_NO_SPACE_AFTER = re.compile(r"(?<=[a-z][a-z])([.!?])(?=[A-Z][a-z])")


def clean_text(text: str) -> str:
    """Collapse runs of blanks and mend the space around punctuation; newlines stay. Idempotent.

    "Hello , world !" -> "Hello, world!"; "Hello.World" -> "Hello. World"; U.S.A., www.example.com and 3.14 are left.
    """
    text = _tidy(text)
    text = _SPACE_BEFORE.sub(r"\1", text)
    return _NO_SPACE_AFTER.sub(lambda m: m[1] if _in_address(text, m.start()) else m[1] + " ", text)


def _in_address(text: str, at: int) -> bool:
    """Whether the blank-free run of text before `at` is the beginning of a web or mail address."""
    word = text[max(0, at - 200) : at + 1].split()[-1]
    return "www." in word or "://" in word or "@" in word
