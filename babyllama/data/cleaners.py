"""Remove what is not language from the files of each BabyLM domain.

    from babyllama.data.cleaners import DomainCleaners, create_cleaner_registry
    DomainCleaners.wikipedia("It began in 1900.[12]\\n= = History = =")     # "It began in 1900.\\n"

The files of each domain have markup that nobody would say or write: citations, time stamps, speaker
labels, licences. A cleaner removes it and repairs the spacing. Cleaners are pure functions from
text to text that know nothing about files or documents, and their time is linear in the length.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable
from html.entities import html5

# It is part of cache keys and manifests: increase it when the output of a cleaner changes.
CLEANER_VERSION = 8

# A pattern that looks far ahead again and again would take minutes on a long line. So each pattern
# either consumes what it looks at or looks at a bounded stretch. Something that is removed within a
# line leaves a space, so that its two sides never join to something that a second pass would remove.

# ---- patterns of several domains ----------------------------------------------------------------

NESTED = 4  # levels of nested brackets that are removed; a limit keeps cleaning linear
_NEWLINES = re.compile(r"\n{3,}")
# "&amp;lt;" is decoded at once: otherwise a second pass would decode more
_ENTITY = re.compile(
    r"&(?:(?:[Aa][Mm][Pp]|#0{0,5}38|#[xX]0{0,5}26);)*(#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});"
)
_SPACES = re.compile(r"  +")
_LOOSE_MARK = re.compile(r" (?:(?=[,.;!?](?:[\s\"'”’]|\Z))|(?<!\d )(?=:(?:\s|\Z)))")
_JUNCTION = re.compile(r"[.!?,;](?<=[a-z]{2}.)(?=[A-Z][a-z])")
_BEFORE = re.compile(r"[\"'“‘(]*[A-Za-z’'-]+\Z")
_AFTER = re.compile(r"[A-Z][A-Za-z’'-]*[.,;:!?…\"'”’)]*\Z")
_TAG = re.compile(r"<(?=[A-Za-z/])[^>\n]*+(>?)")
_MARKUP_NAME = re.compile(
    r"</?\s?(?:i|b|u|s|font|bold|link|span|div|br|sub|sup|small|big|ref|doc|blockquote|nowiki|center)\b",
    re.I,
)
_BRACKET = re.compile(r"\\?\[[^\]\n]*+(\]?)")
_ASIDE = re.compile(r"\([^()\n]*\)|<[^<>\n]*>|\s+")
_PAREN = re.compile(r"\([^)\n]*+(\)?)(?! ?:)")  # Alice (whispering): is a label
_SOUND = re.compile(
    r"\((?:[^()]*\b(?:laugh\w*|chuckl\w+|giggl\w+|sigh(?:s|ing)?|sobs?|gasps?|grunts?|groans?|cough\w*|sniff\w*"
    r"|music|applause|unintelligible|inaudible|indistinct|illegible|static|noise|whoosh\w*|swoosh|yawn\w*|sneeze\w*|sings?)\b[^()]*"
    r"|(?:[\w']+ ){0,3}(?!(?:\w*th|even|morn|spr|k|str|w|mean|build|wedd|dur|includ|accord|regard|consider)ing)\w+ing(?: \w+ly)?\.?)\)",
    re.I,
)

# ---- patterns of wiki pages ---------------------------------------------------------------------

_HEADER = re.compile(r"^ *=[^\n]*= *$", re.M)
_CITATION = re.compile(
    r"\[ *(?:\d{1,3}(?: ?[-–,] ?\d{1,3}){0,9}|[a-z]|(?:note|nb) \d{1,3}|update|who\?|when\?|where\?|which\?|source\?"
    r"|(?:citation|clarification|page|year)(?: \w+)? needed|dubious[^\]\n]{0,20}|verification needed) *\]"
    r"(?! {0,2}[-+*/]?=|\.[a-z])"  # but not the index in array[12] = 3
)
_WIKI_LINK = re.compile(r"\[\[(?:[^\[\]\n]*\|)?([^\[\]|\n]*)\]\]")
_MARKS = tuple("[]{}<>'|")
_WIKI_FILE = re.compile(r"\[\[(?:Category|File|Image):[^\[\]\n]*\]\]", re.I)
_WIKI_REST = re.compile(r"\[\[+|\]\]+")
_WEB_LINK = re.compile(r"\[(?:https?:)?//[^\s\[\]]{1,500}([^\[\]\n]{0,300})\]")
_LIST_MARK = r"(?:[#:;]*+\*[*#:;]*+ *+|[#:;]++(?: ++|$))"
_WIKI_LINE = re.compile(
    rf"^ *{_LIST_MARK}*+(?:[|!][^\n]*$|https?://\S++ *$)|^ *{_LIST_MARK}++", re.M
)
_WIKI_BRACES = re.compile(r"\{\{|\}\}|\{\||\|\}(?!\})|\n\n")
_BRACE_ENDS = {"{{": "}}", "{|": "|}"}
_LATEX_QUOTES = re.compile(r"^[^\n`]*``[^\n]*$", re.M)
_REF = re.compile(r"<ref\b[^<>\n]{0,300}>", re.I)
_COMMENT = re.compile(r"<!--")

# ---- patterns of subtitles ----------------------------------------------------------------------

_TIME = r"\d{1,3} ?: ?\d\d(?: ?: ?\d\d)?(?: ?[.,;:] ?\d{1,3})?"
_CUE = re.compile(
    r"^(?: *\d{1,6} *\n)? *(?:-?\d[-\d:.,; ]*-->[^\n]*|\d+:\d\d:\d\d[.,]\d+,\d+:\d\d:\d\d[.,]\d+"
    r"|(?:\*TC +)?\d\d:\d\d:\d\d[;:]\d\d|WEBVTT\b[^\n]*|Kind: captions|Language: [a-z]{2}(?:-\w{2,8})?|"
    rf"{_TIME} ?(?:-{{1,3}}>|→) ?{_TIME}|{_TIME}) *(?:\n|\Z)",
    re.M,
)
_STYLE = re.compile(r"\{(?:\\[^}\n]{0,200}|\d{1,7})\}")
_CREDIT_WORDS = ("sub", "caption", "sync", "transcri", "ripped", "encoded", "download", "addic7ed", "yify",
    "translat", "correct", "advertise", "osdb", "@")  # fmt: skip
# a line names the maker of subtitles, whereas "by the door" and "by mistake" name none
_NO_MAKER = (
    r"(?!(?:the|an?|my|your|his|her|its|our|their|this|that|these|those|me|you|him|us|them|whom?|some|someone|any\w*"
    r"|every\w*|no|mistake|accident|chance|hand|night|day|law|default|itself|then|all|far)\b)"
)
_CREDIT = re.compile(
    rf"^\W*(?:{_NO_MAKER}\w{{1,20}} ){{0,2}}(?:subs?|subtitles?|subtitling|captions?|captioning|sync|synchro|transcript)"
    rf"(?:,? (?:and|&) [a-z]{{1,20}}|, ?[a-z]{{1,20}})?(?: made possible)? ?(?:by\b(?: {_NO_MAKER}|[^\w ]|$)|for version\b)"
    r"|^\W*(?:subs?|subtitles?|subtitling|captions?|captioning|re-?sync|sync|synchro|transcript) ?(?::|by ?:)"
    r"|^\W*(?:translated|corrected|captioned|ripped|encoded|(?:re-?)?synced)(?:,? (?:and|&) [a-z]{1,20}|, ?[a-z]{1,20})? ?by"
    rf"(?: ?:|\W*$| {_NO_MAKER}[\w.@-]{{1,30}}(?: [\w.@-]{{1,30}})?\W*$)|^\W*re-?sync by\b"
    r"|\bcaptioned by the (?:national|caption)|\bthis subtitle is free|^\W*@\w{2,30}\W*$"
    r"|^\W*subtitles? \w+\W*$|^\W*(?!(?:no|any|a|the|with|without|what|need|more|my|your|these|those)\b)\w+ subtitles?[^\w?]*$"
    r"|\brate this subtitle\b|\bosdb\.link\b|^\W*advertise your product or brand\b"
    r"|\bdownloaded from (?:https?:|[\w-]{1,40}\.[a-z])|^\W*downloaded from\W*$"
    r"|\bopen ?subtitles\b|\baddic7ed\b|\ballsubs\.org\b|\byify\b"
)
_NO_SPEECH = re.compile(r"^[ -]*(?:\((?!I\b)[^()\n?!]{1,60}\)[ -]*)?[.:]?$", re.M)

# ---- patterns of speakers -----------------------------------------------------------------------

_DIRECTION = r" ?\([^()\n]{1,30}\)|, (?:[a-z]{1,15} ){0,3}[a-z]{1,15}(?:ing|ly)"
_CAPS = rf"[A-Z][A-Z0-9_ .'’&#/-]{{%d,30}}(?:{_DIRECTION})?"  # MARY, MRS. CLAUS, CDR (EAGLE)
_NAME_WORD = r"[A-ZÀ-ÖØ-Þ][\w'’&-]{0,20}"
_NAME = (
    rf"(?P<name>(?:(?:Mrs?|Ms|Dr|Prof|Sgt|Capt|Lt|St)\. )?{_NAME_WORD}(?: {_NAME_WORD}){{0,2}})"
    rf"(?P<number> #?\d{{1,3}})?(?P<direction>{_DIRECTION})?"
)
_OFF_SCREEN = r"\((?:[A-Z .]{2,30}|[a-z ]{2,30}(?:ing|ly))\)"  # (ON TV): (whispering):
_LABEL = re.compile(
    r"(?<![ -])[ -]*(?:\*\*[^*:\n]{1,60}(?::\*\*|\*\*:)|(?:\*[A-Z][A-Z0-9]{1,4}|[A-Z]\.\d{1,4}|"
    + f"{_CAPS % 0}|{_OFF_SCREEN}|{_NAME}) *:)(?=\\s|$)"
)
_SCREEN_LABEL = re.compile(
    r"(?<![ -])[ -]*(?:" + f"{_CAPS % 1}|{_OFF_SCREEN}|(?:wo)?man(?: #?\\d+)?|{_NAME}) *:(?=\\s|$)"
)
# speakers who are numbered: Man 2, Speaker 1
_ROLE = re.compile(
    r"\b(?:speaker|(?:wo)?man|(?:fe)?male|boy|girl|child|kid|voice|person|interviewe[er]|reporter|host|guest|caller"
    r"|student|teacher|participant|respondent|moderator|officer|soldier|guard|cop|doctor|nurse|witness|agent|actor"
    r"|player|member|subject)\Z",
    re.I,
)
# words that often stand before a colon and are nobody's name
_NO_NAME = re.compile(
    r"\b(?:notes?|nb|remember|look|listen|imagine|consider|suppose|wait|questions?|answers?|examples?|remarks?|comments?"
    r"|warning|caution|danger|attention|important|tips?|hints?|next|first|second|third|fourth|fifth|finally|last|lastly"
    r"|then|now|so|and|but|or|nor|yes|no|ok|okay|well|also|again|however|therefore|thus|because|besides|still|true"
    r"|false|results?|conclusion|summary|problems?|solution|reasons?|facts?|rules?|steps?|panel|parts?|chapter|section"
    r"|page|fig|figure|table|verse|act|scene|level|lesson|title|subject|date|times?|place|location|names?|address|phone"
    r"|telephone|email|website|price|cost|total|score|ingredients|method|directions|instructions|materials|objective"
    r"|goals?|sources?|update|correction|edit|translation|meaning|definition|moral|contents|index|references|features"
    r"|requirements|conditions|options?|items?|number|topics?|tasks?|pros|cons|advantages?|disadvantages?|re|cc|pp?s"
    r"|this|that|these|those|here|there|i|he|she|it|we|they|you|who|what|when|where|which|why|how|if|for|in|on|at|by"
    r"|with|of|as|from|to|see|before|after|the|an?|my|your|his|her|our|their|its|one|two|three|four|five|six|seven"
    r"|eight|nine|ten|day|week|month|year|(?:mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|may|june"
    r"|july|august|(?:sept|nov|dec)ember|october|today|tomorrow|yesterday|tonight|breakfast|lunch|dinner|right|ah|oh"
    r"|hey|hello|roger|copy|affirmative|negative)\b",
    re.I,
)

# ---- patterns of transcripts --------------------------------------------------------------------

_TRANSCRIPT_LINE = re.compile(
    r"^ *(?:\[-?\d\d:\d\d:\d\d:\d\d\]|_[a-z]+ ?:[^\n]*|@(?:UTF8|Begin|End)|@[A-Z][\w ]{0,30}: [^\n]*|%\w{2,4}: [^\n]*) *$",
    re.M,
)
_UTTERANCE_END = re.compile(
    r" ?(?<!\S)(?<!\+ )(\+(?:\"/?\.|\.\.\?|\.{2,3}|/{1,2}[.?]|!\?))(?=\s|\Z)"
)
_PLAIN_END = {'+"/.': ",", '+".': ".", "+..?": "...?"}  # any other is "..."
_FILLER = re.compile(r"(?<![\w-])(?:&-)++(?=\w)")  # &-um
_EVENT = re.compile(r"(?<!\w)&=[\w:]{1,40}")  # &=laughs
_WORD_FORM = re.compile(  # dog@o
    r"(?<=\w)@(?:[a-z]|fp|lp|nv|ns|pr|sas|si|sl|wp)(?::[a-z]{1,8})?(?![\w@]|\.\w)"
)
_UNSPOKEN = re.compile(  # (be)cause, goin(g)
    r"(?<=[a-z])(?:\([a-z']{1,8}\)){1,9}|(?:\([a-z']{1,8}\)){1,9}(?=[a-z])"
)

# ---- patterns of books --------------------------------------------------------------------------

_BOOK_LINE = re.compile(
    r"^(?:[# ]*+(?:\* (?:License|Text|Illustration|Translation|Language|Photograph|Adaptation|Editor|Author)s?:[^\n]*"
    r"|(?:Release Date|Posting Date|Last Updated|Character set encoding|Language): [^\n]*|Produced by [A-Z][^\n]*"
    r"|(?:\*\*\*)? ?(?:START|END) OF (?:THIS|THE) PROJECT GUTENBERG[^\n]*|\[(?:This file|Most recently)[^\n]*\])"
    r"|#[# ]*)$|^ *#[# ]*(?<= )",
    re.M,
)
_FOOTNOTE = re.compile(r"\[\d{1,3}\]|\{\d{1,3}\}|\[Illustration[^\]\n]{0,200}\]")
_LICENCE = re.compile(
    r"project gutenberg|gutenberg-tm|gutenberg\.(?:org|net)|pglaf|literary archive foundation|^\d\.[A-F]\.|electronic works?\b"
    r"|^[# ]*\*{3}|public domain (?:print )?editions|this etext|this ebook",
    re.I | re.M,
)


# ---- steps of the cleaners ----------------------------------------------------------------------


def _unjoin(match: re.Match) -> str:
    """Add a space in "Hello.World", but not within an address, a file name or a dotted name."""
    text = match.string
    at = match.start()
    before = text[max(0, at - 60) : at].split()
    after = text[at + 1 : at + 61].split()
    are_words = before and after and _BEFORE.match(before[-1]) and _AFTER.match(after[0])
    return match[0] + " " if are_words else match[0]


def _decode_entity(match: re.Match) -> str:
    """Return the character of an HTML entity such as &amp;quot; or &#39;, or an unknown one as is."""
    entity = match[1] + ";"
    return html.unescape("&" + entity) if entity[0] == "#" else html5.get(entity, "&" + entity)


def _plain_text(text: str) -> str:
    """Decode HTML entities, and make line ends newlines and other white space plain spaces."""
    return _plain_spaces(_ENTITY.sub(_decode_entity, text) if "&" in text else text)


def _plain_spaces(text: str) -> str:
    """Replace tabs, non-breaking and wide spaces with plain spaces, and line ends with newlines."""
    text = text.replace("\t", " ")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.isascii() else text.replace("\xa0", " ").replace("\u3000", " ")


def _no_gaps(text: str) -> str:
    """Leave at most one empty line in a row."""
    return _NEWLINES.sub("\n\n", text) if "\n\n\n" in text else text


def clean_text(text: str) -> str:
    """Collapse runs of spaces and repair the space around punctuation.

    "Hello , world !" becomes "Hello, world!" and "Hello.World" becomes "Hello. World", but U.S.A.,
    www.example.com and 3.14 stay. Newlines stay, with at most one empty line in a row.
    """
    text = (
        _SPACES.sub(" ", _plain_spaces(text)).replace(" \n", "\n").replace("\n ", "\n").strip(" ")
    )
    text = _no_gaps(text)
    if "( " in text or " )" in text:
        text = text.replace("( ", "(").replace(" )", ")")
    return _JUNCTION.sub(_unjoin, _LOOSE_MARK.sub("", text))


def _drop(pattern: re.Pattern, text: str, unwanted: Callable[[str], bool]) -> str:
    """Replace each unwanted span with a space; a span is closed if group 1 matched its end."""
    return pattern.sub(lambda match: " " if match[1] and unwanted(match[0]) else match[0], text)


def _short(span: str) -> bool:
    """Return True if a bracket, not counting tags, asides and spaces, is as short as a remark."""
    return len(_ASIDE.sub("", span)) <= 70


def _drop_tags(text: str, unwanted: Callable[[str], bool]) -> str:
    """Replace unwanted <tags> with a space, or with nothing between letters: H<sub>2</sub>O."""

    def replacement(match: re.Match) -> str:
        if not match[1] or "<" in match[0][1:] or not unwanted(match[0]):
            return match[0]
        before = text[max(0, match.start() - 1) : match.start()]
        after = text[match.end() : match.end() + 1]
        return "" if before.isalnum() and after.isalnum() else " "

    return _TAG.sub(replacement, text) if "<" in text else text


def _drop_spans(opening: re.Pattern, closing: str, text: str) -> str:
    """Replace each stretch from a match of `opening` to the next `closing` with a space."""
    parts = []
    done = 0
    for match in opening.finditer(text):
        if match.start() < done:
            continue
        end = text.find(closing, match.end(), match.end() + 5000)
        if end < 0:
            continue
        parts += [text[done : match.start()], " "]
        done = end + len(closing)
    return "".join(parts) + text[done:]


def _link_text(match: re.Match) -> str:
    """Return the text of a [[link|text]], with a space if it could join with a mark next to it."""
    if _WIKI_FILE.match(match[0]):
        return match[0]
    before = match.string[max(0, match.start() - 1) : match.start()]
    after = match.string[match.end() : match.end() + 1]
    return " " * (before in _MARKS) + match[1] + " " * (after in _MARKS)


def _drop_braces(text: str) -> str:
    """Replace each {{template}} and {|table|} with a space, unless it contains an empty line."""
    # find the outermost pairs of braces
    opened: list[tuple[int, str]] = []  # position of the opening mark, and the mark that closes it
    spans: list[tuple[int, int]] = []
    for match in _WIKI_BRACES.finditer(text):
        mark = match[0]
        if mark in _BRACE_ENDS:
            opened.append((match.start(), _BRACE_ENDS[mark]))
        elif mark == "\n\n":
            opened.clear()
        elif opened and opened[-1][1] == mark:
            start = opened.pop()[0]
            while spans and spans[-1][0] > start:  # within this pair
                spans.pop()
            spans.append((start, match.end()))

    # replace them
    parts = []
    done = 0
    for start, end in spans:
        parts += [text[done:start], " "]
        done = end
    return "".join(parts) + text[done:]


def _drop_licence(text: str) -> str:
    """Remove the paragraphs of Project Gutenberg's header and licence from a book."""
    kept: list[str] = []
    header = 0  # index in `kept` at which the header began
    for paragraph in text.split("\n\n"):
        if "START OF TH" in paragraph and len(kept) - header < 30:
            del kept[header:]
        elif not _LICENCE.search(paragraph):
            kept.append(paragraph)
        elif "EBook of" in paragraph or "This eBook is for the use" in paragraph:
            header = len(kept)
    return "\n\n".join(kept)


def _without_credits(text: str) -> str:
    """Remove the lines that credit or advertise the makers of subtitles."""
    lower = text.lower()
    if not any(word in lower for word in _CREDIT_WORDS):
        return text
    return "\n".join(line for line in text.split("\n") if not _CREDIT.search(line.lower()))


def _is_name(label: re.Match) -> bool:
    """Return True if the words of a label can be the name of a speaker."""
    if label["number"]:
        return bool(_ROLE.search(label["name"]))
    return not _NO_NAME.search(label["name"])


def _drop_labels(label: re.Pattern, text: str) -> str:
    """Remove the speaker labels at the start of lines.

    "Mary:" may be a label, or a word before a colon. Names count as labels if they start at least 2
    lines of this text, and if such names start at least 3 lines together.
    """
    # find what may be labels; a line can start with several
    lines = _SPACES.sub(" ", text).split("\n")
    labels_of: dict[int, list[re.Match]] = {}  # by the number of the line
    for number, line in enumerate(lines):
        end = 0
        while ":" in line and (match := label.match(line, end)):
            labels_of.setdefault(number, []).append(match)
            end = match.end()

    # count the lines of each name; those with two labels count for both
    counts: Counter[str] = Counter()
    for labels in labels_of.values():
        counts.update({match["name"] for match in labels if match["name"] and _is_name(match)})
    speakers = {name for name, count in counts.items() if count >= 2}
    if sum(any(match["name"] in speakers for match in labels) for labels in labels_of.values()) < 3:
        speakers.clear()

    # remove the labels of each line, up to the first that is not a speaker
    for number, labels in labels_of.items():
        end = 0
        for match in labels:
            is_word = match["name"] and match["name"] not in speakers
            if is_word and not _SOUND.fullmatch((match["direction"] or "").strip()):
                break
            end = match.end()
        if end:
            lines[number] = lines[number][end:].lstrip(" ")
    return "\n".join(lines)


def _drop_song_marks(text: str) -> str:
    """Remove the marks of songs from subtitles: ♪ la la ♪ and # la la #."""
    text = text.replace("♪", " ").replace("♫", " ")
    if "#" not in text:
        return text
    lines = [line.strip(" ") for line in text.split("\n")]
    for number, line in enumerate(lines):
        if line.startswith("# ") or line.endswith(" #") or line[:1] == line[-1:] == "#":
            lines[number] = line.strip("# ")
    return "\n".join(lines)


# ---- the cleaners -------------------------------------------------------------------------------


class DomainCleaners:
    """Clean text of one domain, with pure, idempotent functions that keep newlines.

    All of them except `default` leave at most one empty line in a row.
    """

    @staticmethod
    def default(text: str) -> str:
        """Return the text unchanged."""
        return text

    @staticmethod
    def wikipedia(text: str) -> str:
        """Remove headers (== Title ==), citations [12], references, templates, tables, markup.

        WikiText's <unk> stays: it replaces a rare word, and without it the sentence would be wrong.
        """
        text = _plain_text(text)
        if "``" in text:
            text = _LATEX_QUOTES.sub(
                lambda line: line[0].replace("``", '"').replace("''", '"'), text
            )

        # comments, references, templates and tables
        if "<" in text:
            text = _drop_braces(_drop_spans(_COMMENT, "-->", text))
            text = _drop_spans(_REF, "</ref>", re.sub(r"<ref\b[^<>\n]{0,300}/>", " ", text))
        if "{" in text:
            text = _drop_braces(text)

        # emphasis, links, citations and tags
        text = re.sub(r"''+", " ", text)
        if "[" in text:
            text = _WIKI_LINK.sub(_link_text, text)
            text = _WIKI_REST.sub(" ", _WIKI_FILE.sub(" ", text))
            for _ in range(NESTED):
                shorter = _WEB_LINK.sub(r" \1 ", _CITATION.sub(" ", text))
                if shorter == text:
                    break
                text = shorter
        text = _CITATION.sub(" ", _drop_tags(text, lambda tag: bool(_MARKUP_NAME.match(tag))))

        # WikiText's marks, then headers and lists
        for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
            text = text.replace(mark, plain)
        return _no_gaps(_HEADER.sub("", _WIKI_LINE.sub("", clean_text(text))))

    @staticmethod
    def subtitles(text: str) -> str:
        """Remove cue numbers, timings, credits, tags, [sounds], (sounds) and speaker labels."""
        # styles, [sounds], tags and (sounds)
        text = _drop(_BRACKET, _STYLE.sub(" ", _plain_text(text)), _short)
        text = _drop_tags(text, lambda tag: bool(_MARKUP_NAME.match(tag)))
        text = _drop(
            _PAREN,
            text,
            lambda span: len(span) <= 60 and (span.isupper() or bool(_SOUND.fullmatch(span))),
        )

        for _ in range(NESTED):  # a label may hide the mark of a song, and the mark another label
            earlier = text
            text = _drop_labels(_SCREEN_LABEL, _drop_song_marks(text))
            if "#" not in text or text == earlier:
                break

        # cues, lines without speech, and credits
        text = clean_text(text)
        shorter = _CUE.sub("", _NO_SPEECH.sub("", text))
        if shorter != text:
            text = re.sub(r"\n\n+", "\n", shorter)
        return _no_gaps(_without_credits(text))

    @staticmethod
    def dialogue(text: str) -> str:
        """Remove speaker labels (*CHI: MARY: Mary: A.1:), [action], (smiling) and time stamps."""
        # of marks in brackets that hold words, keep the words
        text = _plain_text(text)
        if "[" in text:
            for _ in range(NESTED):
                text = re.sub(r"\[(?:glossary|time):(?:[^\[\]|\n]*\|)?([^\[\]|\n]*)\]", r"\1", text)
            text = re.sub(r"(?<=\d )\[(percent|degrees)\]", r"\1", text)
            text = re.sub(
                r"(?<!\\)\[([^\[\]\n]{1,200})\]\((?:https?:)?[^()\s]{1,300}\)", r"\1", text
            )

        # other brackets and tags, (sounds), speakers and time stamps
        text = _drop(_BRACKET, text, _short)
        text = _drop_tags(text, lambda tag: len(_ASIDE.sub("", tag[1:-1])) <= 55)
        text = _drop(_PAREN, text, lambda span: len(span) <= 60 and bool(_SOUND.fullmatch(span)))
        text = _TRANSCRIPT_LINE.sub("", clean_text(_drop_labels(_LABEL, text)))
        text = _UTTERANCE_END.sub(lambda end: _PLAIN_END.get(end[1], "..."), text)
        return _no_gaps(text)

    @staticmethod
    def childes(text: str) -> str:
        """Resolve the marks of CHAT transcripts, &-um dog@o (be)cause, and clean as dialogue."""
        text = clean_text(_plain_text(text))
        for _ in range(NESTED):  # a mark that is removed may complete another one
            earlier = text
            text = _WORD_FORM.sub("", _EVENT.sub(" ", _FILLER.sub("", text)))
            text = _UNSPOKEN.sub(lambda match: re.sub("[()]", "", match[0]), text)
            if text == earlier:
                break
        return DomainCleaners.dialogue(text)

    @staticmethod
    def books(text: str) -> str:
        """Remove Project Gutenberg's header and licence, credit lines, page and footnote marks."""
        text = _FOOTNOTE.sub(" ", _plain_text(text))
        if "gutenberg" in text.lower():
            text = _drop_licence(text)
        return _no_gaps(_BOOK_LINE.sub("", clean_text(text)))


def create_cleaner_registry() -> dict[str, Callable[[str], str]]:
    """Return the cleaner of each domain: BabyLM's file names of 2023 to 2026, four general names."""
    domains = {
        DomainCleaners.wikipedia: ("wikipedia", "simple_wiki", "simple_wikipedia"),
        DomainCleaners.subtitles: ("subtitles", "open_subtitles", "qed"),
        DomainCleaners.dialogue: ("dialogue", "bnc_spoken", "switchboard"),
        DomainCleaners.childes: ("aochildes", "childes"),
        DomainCleaners.books: ("cbt", "children_stories", "gutenberg"),
        DomainCleaners.default: ("default",),
    }
    registry = {}
    for cleaner, names in domains.items():
        registry |= dict.fromkeys(names, cleaner)
    return registry
