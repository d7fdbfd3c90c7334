"""Check what each cleaner removes and keeps, and that it is idempotent and linear in time."""

from __future__ import annotations

import gc
import re
import time

import pytest
from conftest import SHARED
from hypothesis import example, given, settings
from hypothesis import strategies as st

from babyllama.data.cleaners import DomainCleaners, clean_text, create_cleaner_registry
from babyllama.data.text_files import domain_of

REGISTRY = create_cleaner_registry()
BABYLM_NAMES = [
    "aochildes",
    "childes",
    "bnc_spoken",
    "cbt",
    "children_stories",
    "gutenberg",
    "open_subtitles",
    "qed",
]
BABYLM_NAMES += ["simple_wiki", "simple_wikipedia", "switchboard", "wikipedia"]
CLEANERS = {
    **{
        name: REGISTRY[name]
        for name in ("wikipedia", "subtitles", "dialogue", "childes", "gutenberg", "default")
    },
    "text": clean_text,
}


def test_the_registry_has_every_babylm_file_name():
    assert set(REGISTRY) == {*BABYLM_NAMES, "subtitles", "dialogue", "default"}
    assert REGISTRY["default"](" a  b ,\n") == " a  b ,\n"
    for name in BABYLM_NAMES:
        assert REGISTRY[domain_of(f"data/{name}.train")] is REGISTRY[name]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Hello , world !", "Hello, world!"),
        ("Hello.World", "Hello. World"),
        ("Hello.World.", "Hello. World."),
        ('He said "Stop.Now" , twice', 'He said "Stop. Now", twice'),
        (
            "one,Two;Three",
            "one,Two;Three",
        ),  # more than one joint in a word: a name, not two sentences
        ("one,Two three", "one, Two three"),
        ("a \t b\u00a0 c", "a b c"),
        ("  a line \n  another  ", "a line\nanother"),
        ("( born 1907 )", "(born 1907)"),
        ("a\n \n\n\nb", "a\n\nb"),
        ("what ? ! no", "what?! no"),
    ],
)
def test_clean_text_repairs_spacing(raw, clean):
    assert clean_text(raw) == clean


@pytest.mark.parametrize("name", [n for n in CLEANERS if n != "default"])
@pytest.mark.parametrize(
    "text",
    [
        "1984",
        "He met her in 1984\n1984\nand again.",
        "Lives in the U.S.A. now.",
        "See www.example.com or https://example.com/A.Html?q=Foo.Bar for more.",
        "Pi is 3.14, e.g. here... or there ...",
        "At 10:30 the train left; it was 10:30:15 exactly.",
        "open file.txt and System.Out.println",
        "Mr.Smith and Dr.No came, i.e. both.",
        "It was (as he had said before) a cold day.",
        "He paid him (something like that) in the morning (evening).",
        "Note: this stays. Remember: so does that.\nNote: this too.",
        "He said: go. The ratio is 3:1, the score 2 : 1.",
        "x < 3 and y > 4",
        "Un café, naïve — “quoted” text… 日本語 😀",
        "first line\nsecond line\n\nnew paragraph",
        "The subtitle of the book is odd.\nI downloaded it.",
    ],
)
def test_cleaners_keep_text_that_only_looks_like_markup(name, text):
    assert CLEANERS[name](text) == text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("= = = Title = = =\nText.", "\nText."),
        (" = Title = \n \n Text here . \n = = Part = = \n More .", "\n\nText here.\n\nMore."),
        ("== Title ==\nText.[12] More[3][4], end[citation needed].", "\nText. More, end."),
        ("A [[cat|kitten]] and [[dog]]s.[[Category:Pets]]", "A kitten and dogs."),
        ("A {{cite|x {{y}} z}}b\n{| class=x\n| cell\n|}\nc", "A b\n\nc"),
        ('x<ref name="a">{{cite}}</ref> y<ref name=b/> z<!-- no --> H<sub>2</sub>O', "x y z H2O"),
        ("a @-@ b 1 @,@ 000 3 @.@ 5 <unk>", "a-b 1,000 3.5 <unk>"),
        ("`` quoted ''", '" quoted "'),
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ('<doc id="1" title="A">\nA\n</doc>', "\nA"),
        ("[https://example.org The page] is [...] here", "The page is [...] here"),
    ],
)
def test_wikipedia_markup_is_removed(raw, clean):
    assert REGISTRY["wikipedia"](raw).strip("\n") == clean.strip("\n")


SRT = """1
00:00:11,178 --> 00:00:12,972
<i>I will talk</i> to you of art,

2
00:00:13,139 --> 00:00:16,308  X1:20
1984
<font color="#0000ff">was a year</font>

3
00:00:17,000 --> 00:00:18,000
[Music]

4
00:00:19,000 --> 00:00:20,000
- {\\an8}POPEYE: (laughing) Hey!
♪ la la ♪
5
00:00:21,000 --> 00:00:22,000
Subtitles by Somebody
www.OpenSubtitles.org
"""


def test_subtitle_cues_tags_and_sounds_are_removed():
    lines = REGISTRY["subtitles"](SRT).split("\n")
    assert [line for line in lines if line] == [
        "I will talk to you of art,",
        "1984",
        "was a year",
        "Hey!",
        "la la",
    ]


def test_a_short_credit_is_removed():
    assert REGISTRY["subtitles"]("Sub by John\nHello there.") == "Hello there."


@pytest.mark.parametrize(
    "timing", ["0:00:01.500,0:00:02.500", "*TC 00:01:02;03", "00:00:-1,-50 --> 00:00:02,000"]
)
def test_other_formats_of_times_are_removed(timing):
    assert REGISTRY["subtitles"](f"{timing}\nHello\n").strip() == "Hello"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("*CHI:\toh Mama .\n*MOT:\twhat's this Laura ?", "oh Mama.\nwhat's this Laura?"),
        ("*MOT:\tI'll butter +...\n*CHI:\tno +/.", "I'll butter...\nno..."),
        ("MARY: Come in.\nA.1: Uh, yes.\nB.22: Okay.", "Come in.\nUh, yes.\nOkay."),
        ("CDR (EAGLE): Roger. 10:30 it is.", "Roger. 10:30 it is."),
        ("**Ann Lee:** Hi. \\[laughter\\] Bye.\n**Break**: \\[01:44\\]", "Hi. Bye."),
        ("Yes [laughs] (smiling) I do (sighs).", "Yes I do."),
        (
            "[00:00:11:42]\n_page : 6\nCC: [glossary:SECO] at [time:00:01|1 plus 20].",
            "SECO at 1 plus 20.",
        ),
        ("P: Fuel 102 [percent].", "Fuel 102 percent."),
        ("see [our blog](https://example.com/x) now <laughter> ok", "see our blog now ok"),
        ("@Begin\n*CHI:\tmore .\n%mor:\tqn|more .\n@End", "more."),
    ],
)
def test_speaker_labels_and_stage_directions_are_removed(raw, clean):
    assert REGISTRY["dialogue"](raw).strip() == clean


def test_project_gutenberg_frames_are_removed():
    header = "The Project Gutenberg EBook of Emma, by Jane\n\nThis eBook is for the use of anyone\n\nTitle: Emma\n\n"
    start, end = (
        "*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***",
        "*** END OF THIS PROJECT GUTENBERG EBOOK EMMA ***",
    )
    licence = "1.A.  By reading or using any part of this\nelectronic work you agree.\n\nThe Project Gutenberg-tm License."
    book = f"{header}{start}\n\nProduced by Ann\n\nEmma Woodhouse,[1] handsome.\n\n[Illustration: Emma]\n\nShe had lived.\n\n{end}\n\n{licence}"
    assert REGISTRY["gutenberg"](book).split() == [
        "Emma",
        "Woodhouse,",
        "handsome.",
        "She",
        "had",
        "lived.",
    ]
    story = "# The Dog\n##\nA dog ran.\n##\n* License: [CC-BY]\n* Text: Ann\n* Language: en"
    assert REGISTRY["children_stories"](story).strip("\n") == "The Dog\n\nA dog ran."


FRAGMENTS = ['=', '= ', '== ', '\n', '\n\n', '\n\n\n', ' ', '\t', '\xa0', '[', ']', '[[', ']]', '[12]', '\\[', '[laughs]', '[glossary:', '[[File:', '[http://x', '{', '}', '{{', '}}', '{|', '|}', '{\\an8}', '(', ')', '(laughing)', '(x ', '<i>', '</i>', '<b ', '<ref>', '</ref>', '<!--', '-->', '<', '>', "''", "'''", '``', '|', '*', '#', '## ', '* License:', ':', ';', ',', '.', '...', '!', '?', 'MARY:', '*CHI:', 'A.1:', '**Ann:**', '1\n', '00:00:01,000', ' --> ', '12', '- ', '+', '+...', '♪', 'Subtitles by ', '_page :', 'http://a.B/c', 'Hello.World', 'ab.Cd!Ef', 'word', 'a', 'B', ' @-@ ', '***', 'Mary:', 'Mary: ', 'Speaker 1: ', 'Bob (laughing): ', '&amp;', '&lt;', 'lt;', '&-um', 'dog@o', '(be)', '# ', '1:23', '+"/.', 'gutenberg', 'START OF THIS PROJECT GUTENBERG']  # fmt: skip
fragment_text = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@pytest.mark.parametrize("name", CLEANERS)
@settings(max_examples=400, deadline=None)
@given(text=st.one_of(fragment_text, st.text(max_size=30)))
@example(text="[glossary:[glossary:[glossary:==(laughing)http://a.B/cSubtitles by =gutenberg[12]")
@example(text="<b [http://x[glossary: {START OF THIS PROJECT GUTENBERG#(laughing) -->=}a[[")
@example(text="[glossary:a|[glossary:+...</i>]]+")
@example(text="[http://x[http://x]=]")
@example(text="dog@o@o")
@example(text="m(x )")
@example(text="(ghing): # y")
@example(text="(ghing): # MARY: y")
@example(text="&=(be)cause &-(be)cause (be)&-cause")
def test_cleaning_twice_changes_nothing_more(name, text):
    once = CLEANERS[name](text)
    assert CLEANERS[name](once) == once


@pytest.mark.parametrize("name", [n for n in CLEANERS if n != "default"])
@given(words=st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=30))
def test_plain_lines_stay_unchanged(name, words):
    text = "\n".join(words)
    assert CLEANERS[name](text) == text


ATTACKS = ["a", " ", "\n", "=", "<", "[", "[[", "{{", "(", "*", "#", "-", ":", ".", "1", "`", "'", "= ", "\n=", "[1", "<ref>", "<!--",
           "[[a|", "A.", "a.B", "MARY", "A: ", "**A", "_a :", "1\n", "00:00:01,0", "-->", "subtitles ", "(a ", "(aing ", "sub and a",
           "\\[", "{\\", "{1", "[http://a", "+.", " \n", "\u0301", "A ", "*** ", "gutenberg\n\n", "@A", "%ab:\t", "**A:** ",
           "Mary: ", "Mary: \n", "Mary (", "Mary, a ", "&amp;", "(a)", "&-", "# ", "1: 1", "a@", "*a\n", "sync, "]  # fmt: skip


def growth(function, attack: str, size: int) -> float:
    """CPU time on 8 * size characters over that on size, at least 1 ms counted: 8 when linear, 64 when quadratic."""

    def seconds(n: int) -> float:
        text, start = (attack * n)[:n], time.process_time()
        function(text)
        return time.process_time() - start

    gc.disable()  # as timeit does: a collection takes long in a process that has loaded torch
    try:
        return seconds(8 * size) / max(seconds(size), 0.001)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CLEANERS)
@pytest.mark.parametrize("tail", ["", "x"])
def test_cleaners_are_linear_in_time(name, tail):
    for attack in ATTACKS:
        grown = growth(lambda text: CLEANERS[name](text + tail), attack, 2**14)
        if grown >= 40:  # another program may have slowed one of the two calls down
            grown = growth(lambda text: CLEANERS[name](text + tail), attack, 2**14)
        assert grown < 40, (attack, grown)


ARTEFACTS = {
    "open_subtitles": r"-->|</?(?:i|font)\b|^Subtitles:|\[Music\]|OpenSubtitles\.org",
    "qed": r"-->|^\*TC|\[applause\]|\d:\d\d:\d\d\.\d+,",
    "childes": r"^\*[A-Z]{3}:",
    "switchboard": r"^\[\d\d:\d\d:\d\d:\d\d\]|^_page|glossary:|^[AB]\.\d+:|^CC:",
    "bnc_spoken": r"^\*\*[^*\n]+:\*\*|\\\[laughter|unintelligible \d",
    "simple_wiki": r"^ ?=.*=$",
    "wikipedia": r"^ ?=.*=$|\[\[|</?ref|</?doc|@-@|^\|-",
    "children_stories": r"^##$|^\* License:|^# ",
}


@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="needs the shared corpus")
@pytest.mark.parametrize("domain", ARTEFACTS)
def test_markup_of_a_real_corpus_is_removed(domain):
    text = (SHARED / "corpus" / "dev" / f"{domain}.dev").read_text(encoding="utf-8")
    found = re.compile(ARTEFACTS[domain], re.M)
    clean = REGISTRY[domain](text)
    assert found.search(text) and not found.findall(clean)
    assert REGISTRY[domain](clean) == clean
    kept = len(clean) / len(text)
    assert kept > 0.4 if domain in ("open_subtitles", "qed") else kept > 0.65


@pytest.mark.parametrize(
    "line",
    ["Sync & corrections by explosiveskull", "Corrected by X", "Translated by: Bob", "Resync: Xenzai", "English subtitles",
     "Please rate this subtitle at www.osdb.link/abc", "Advertise your product or brand here",
     "== sync, corrected by elderman ==", "@elder_man", "Downloaded from www.AllSubs.org", "Captioned by",
     "Captioned by the National Captioning Institute", "Ripped by: X", "Closed captions by Sam"],
)  # fmt: skip
def test_credits_are_removed(line):
    assert DomainCleaners.subtitles(f"Hello.\n{line}\nGood day.") == "Hello.\nGood day."


@pytest.mark.parametrize(
    "line",
    ["You have to advertise your product.", "Translated by my grandmother", "Corrected by the teacher, I was ashamed",
     "Corrected: the bearing is 270", "Translated: 'I love you'", "No subtitles.", "Any subtitles?", "The subtitle",
     "I downloaded from the net yesterday", "the subtitles by the door", "He was captioned by mistake",
     "Encoded by mistake, the file", "Encoded by mistake", "Mail me @home", "(I don't know.)", "(Really?)", "We are #1", "At 10:30"],
)  # fmt: skip
def test_sentences_that_only_sound_like_credits_stay(line):
    assert DomainCleaners.subtitles(f"Hello.\n{line}\nGood day.") == f"Hello.\n{line}\nGood day."


@pytest.mark.parametrize(
    "line",
    ["7\n00: 18: 26,040 -> 00: 18: 28.240", "00:01:02", "12\n1:23", "00:01.500 --> 00:02.000 align:start",
     "WEBVTT", "WEBVTT - Some title\nKind: captions\nLanguage: en"],
)  # fmt: skip
def test_loosely_written_timings_and_their_numbers_are_removed(line):
    assert DomainCleaners.subtitles(f"{line}\nHello.").strip() == "Hello."


@pytest.mark.parametrize(
    ("raw", "clean"),
    [("(saxophone solo)", ""), ("-(gunfire)", ""), ("# la la la #", "la la la"), ("# la la", "la la"), ("#la la#", "la la"),
     ("(ON TV): Hi, kids.", "Hi, kids."), ("&lt;i&gt;Hi&lt;/i&gt; &amp; bye", "Hi & bye"), ("YAK: [INAUDIBLE].", "")],
)  # fmt: skip
def test_sounds_songs_and_entities_of_subtitles_are_removed(raw, clean):
    assert DomainCleaners.subtitles(f"Hello.\n{raw}").removeprefix("Hello.").strip() == clean


@pytest.mark.parametrize("clean", [DomainCleaners.dialogue, DomainCleaners.subtitles])
@pytest.mark.parametrize(
    "names",
    [("Mary", "John"), ("Speaker 1", "Speaker 2"), ("SPEAKER_01", "SPEAKER_02"), ("Interviewer", "Mrs. Smith"),
     ("Mary-Ann O'Brien", "José"), ("Alice (whispering)", "Bob, laughing"), ("Alice (to Bob)", "Bob (to Alice)")],
)  # fmt: skip
def test_names_that_recur_at_line_starts_are_speaker_labels(clean, names):
    lines = ["Hello there.", "Hi: it is me.", "Go.", "Yes."]
    labelled = [f"{names[number % 2]}: {line}" for number, line in enumerate(lines)]
    assert clean("\n".join(labelled)) == "\n".join(lines)


def test_a_spoken_direction_makes_one_name_a_label():
    assert DomainCleaners.dialogue("Alice (whispering): hi") == "hi"
    assert DomainCleaners.dialogue("ALICE, whispering: hi") == "hi"


@pytest.mark.parametrize("clean", [DomainCleaners.dialogue, DomainCleaners.subtitles])
@pytest.mark.parametrize(
    "text",
    ["Mary: Hello.\nMary: Go.",  # two lines
     "Mary: Hello.\nJohn: Go.\nSue: No.",  # no name recurs
     "Note: this.\n" * 5 + "End.",
     "First: go.\nSecond: stop.\n" * 4 + "End.",
     "Panel 8: on.\nPanel 8: off.\nPanel 5: on.",
     "Step 1: go.\nStep 2: stop.\nStep 1: go.",
     "I said: go.\nI said: go.\nI said: go.",
     "Look: here.\nThe Question: why?\nLook: there.\nThe Question: how?",
     "He asked Mary: who?\n" * 3 + "End."],
)  # fmt: skip
def test_ordinary_words_before_a_colon_stay(clean, text):
    assert clean(text) == text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [('he said +"/.', "he said,"), ("how long +..?", "how long...?"), ("he goes &-um &-uh no", "he goes um uh no"),
     ("a dog@o there", "a dog there"), ("woof@si.", "woof."), ("(be)cause goin(g) s(up)pose", "because going suppose"),
     ("no &=laughs yes", "no yes"), ("ask a@b.com (or not) R&D", "ask a@b.com (or not) R&D")],
)  # fmt: skip
def test_marks_of_chat_transcripts_become_words(raw, clean):
    assert REGISTRY["childes"](f"*CHI:\t{raw}") == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [("*item\n** other\n:*third", "item\nother\nthird"), ("1985&ndash;1989, 11&nbsp;million", "1985–1989, 11 million"),
     ("R&amp;D &#39;x&#x27; &amp;quot;", "R&D 'x' \""), ("array[12] = 3", "array[12] = 3"), ("a[i] += 1", "a[i] += 1"),
     ("It ended.[12] Then", "It ended. Then"), ("Mark&foo; AT&T;", "Mark&foo; AT&T;")],
)  # fmt: skip
def test_lists_entities_and_indexes_of_wikipedia(raw, clean):
    assert DomainCleaners.wikipedia(raw) == clean


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_windows_and_old_macs_count_as_newlines(end):
    for clean, text in ((DomainCleaners.wikipedia, "x\n== T ==\ny"), (clean_text, "a , b \nc\n\n\n\nd"),
                        (DomainCleaners.subtitles, "1\n00:00:01,000 --> 00:00:02,000\nHi\n")):  # fmt: skip
        assert clean(text.replace("\n", end)) == clean(text)
