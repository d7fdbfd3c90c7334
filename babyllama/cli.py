"""Make every script behave alike on the command line: its flags, error lines, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
TRACEBACK = "BABYLLAMA_TRACEBACK"  # the variable that adds a traceback to errors
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell shows it
# control characters, marks that reverse text, and the bytes of a file name that are not UTF-8
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
ERROR_FILE = "BABYLLAMA_ERROR_FILE"  # the variable that names a file for errors; a sweep sets it


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean X?" with the nearest known word, or a list of all known words.

    A known word that has the initials of `word` is near too: learning_rate means lr.
    """
    known = list(known)
    initials = "".join(part[:1] for part in re.split("[-_]", word))
    nearest = difflib.get_close_matches(word, known, n=1) or [w for w in known if w == initials]
    if nearest:
        return f"did you mean {prefix}{nearest[0]}?"
    return f"known: {', '.join(prefix + name for name in known)}"


class Parser(argparse.ArgumentParser):
    """Parse a command line; report a mistake in one line, as the scripts report all others.

    People may write --some_flag for --some-flag. `settings` maps names that are not flags, but that
    people try as flags, to what they may mean.
    """

    def __init__(self, *args, settings: Mapping[str, str] | None = None, **options):
        super().__init__(*args, **options)
        self.settings = settings or {}

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        end_of_flags = args.index("--") if "--" in args else len(args)
        for index, arg in enumerate(args[:end_of_flags]):
            # a value may begin with -- too, but then it has a space
            args[index] = re.sub(r"^--[\w-]+(?==|$)", lambda flag: flag[0].replace("_", "-"), arg)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help lists the flags"
        unknown = re.match(r"unrecognized arguments: (--)?([^\s=]+)", message)
        if unknown and unknown[1]:
            name = unknown[2]
            flags = re.findall(r"--([a-z0-9-]+)(?![\w-])", self.format_usage())
            settings = difflib.get_close_matches(name, self.settings, n=1, cutoff=0.8)
            hint = suggest(name, dict.fromkeys(flags), "--")
            if settings:
                hint = f"did you mean {self.settings[settings[0]]}?"
        elif unknown and self.settings:
            hint = "--set takes SECTION.KEY=VALUE, in quotes if VALUE has spaces"
        print_error(ValueError(f"{message}; {hint}"))
        sys.exit(EXIT_BAD_INPUT)


def check_at_least(args: argparse.Namespace, minimum: dict[str, float]) -> None:
    """Raise ValueError if a numeric flag is below its minimum, infinite or not a number (NaN)."""
    for name, least in minimum.items():
        value = getattr(args, name)
        if least <= value < float("inf"):
            continue
        finite = "" if math.isfinite(value) else "a finite number, "
        raise ValueError(f"--{name.replace('_', '-')} {value} must be {finite}{least} or more")


def duration(seconds: float) -> str:
    """Format a time for people: '42 s', '7 min' or '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def time_left(seconds: float, done: float) -> str:
    """Return ", about 7 min left" if a share `done` of the work took `seconds`; "" for 0 or 1."""
    return f", about {duration(seconds * (1 - done) / done)} left" if 0 < done < 1 else ""


def significant(value: float) -> str:
    """Format a number with four significant digits, but at most four decimals: 0.0352, 16,750."""
    if not value or not math.isfinite(value):
        return f"{value:.4f}"
    if abs(value) >= 1e7:
        return f"{value:.3e}"
    rounded = float(f"{value:.3e}")
    decimals = 3 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{min(4, max(0, decimals))}f}"


def printable(text: str) -> str:
    r"""Return a text with escapes, such as \x1b, for all that could control a terminal."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class SafeOutput:
    """Write text to a stream as `printable` returns it."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def log_to_stderr(form: str = "%(levelname)s: %(message)s", level: int = logging.WARNING) -> None:
    """Show log messages of this level and above on stderr."""
    logging.basicConfig(level=level, format=form, stream=SafeOutput(sys.stderr))


def print_error(error: BaseException) -> None:
    """Print an error on stderr: one line, starting with "error: ", for each problem it lists.

    A sweep also reads it from the file that $BABYLLAMA_ERROR_FILE names.
    """
    if path := os.environ.get(ERROR_FILE):
        Path(path).write_text(printable(str(error)), encoding="utf-8")
    for line in printable(str(error)).splitlines() or [type(error).__name__]:
        _print_last_words(f"error: {line}")


def _print_last_words(line: str) -> None:
    """Print a line on stderr, or nothing if that is on a full disk too."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def run_script(
    body: Callable[[], int | None],
    *,
    interrupted: str = "interrupted; nothing was written",
    memory_advice: str | Callable[[], str] = "use a smaller batch, or another --device",
    print_error: Callable[[BaseException], None] = print_error,
) -> int:
    """Run the body of a script and return its exit code, 0 if the body returns None.

    A ValueError or OSError is a mistake of the user's. It is printed without a traceback, and the
    exit code is 2; running out of memory is reported the same way, with `memory_advice`. Ctrl-C
    gives exit code 130 and one line, either the message of the KeyboardInterrupt or `interrupted`;
    an empty string prints nothing. Any other exception is a bug of ours, so it keeps its traceback.
    If nobody reads the output any more, as after `| head`, it ends silently. Names of files and
    generated text reach stdout without control characters.
    """
    try:
        with contextlib.redirect_stdout(SafeOutput(sys.stdout)):
            code = body() or 0
        sys.stdout.flush()  # so that a full disk is an error, and not only an exit code of Python's
        return code
    except BrokenPipeError:
        # `| head` has read enough; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        print_error(error)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as error:
        message = str(error) or interrupted
        if message:
            _print_last_words(message)
        return getattr(error, "exit_code", EXIT_INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        # this imports torch, which the body has certainly done before it can run out of memory
        from babyllama.device import is_out_of_memory

        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        cuda = "CUDA " if "cuda" in str(error).lower() else ""
        advice = memory_advice if isinstance(memory_advice, str) else memory_advice()
        print_error(MemoryError(f"{cuda}out of memory: {advice}"))
        return EXIT_BAD_INPUT
