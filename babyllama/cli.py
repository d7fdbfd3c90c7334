"""Give every script the same flags, error lines and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def add_flag(parser: Any, name: str, **options) -> argparse.Action:
    """Add --some-flag to a parser or group of flags; --some_flag is accepted too."""
    return parser.add_argument(
        *dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **options
    )


def check_at_least(args: argparse.Namespace, minimum: dict[str, float]) -> None:
    """Raise ValueError if a numeric flag is below its minimum, not a number, or infinite."""
    for name, least in minimum.items():
        value = getattr(args, name)
        if not least <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {least} or more")


def duration(seconds: float) -> str:
    """Return a time such as '42 s', '7 min' or '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def print_error(error: BaseException) -> None:
    """Print an error on stderr, one line for each problem that it lists."""
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"error: {line}", file=sys.stderr, flush=True)


def run_script(
    body: Callable[[], int],
    *,
    interrupted: str = "interrupted; nothing was written",
    memory_advice: str | Callable[[], str] = "use a smaller batch, or another --device",
    print_error: Callable[[BaseException], None] = print_error,
) -> int:
    """Run the body of a script and return its exit code.

    A mistake of the user's (ValueError, OSError) or a lack of memory becomes one line on stderr and
    exit code 2. Ctrl-C becomes exit code 130 and one line: the text of the KeyboardInterrupt if it
    has one, else `interrupted`, if that is not empty. Anything else is a bug of ours and keeps its
    traceback.
    """
    try:
        return body()
    except (ValueError, OSError) as error:
        print_error(error)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as error:
        message = str(error) or interrupted
        if message:
            print(message, file=sys.stderr)
        return EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        from babyllama.device import is_out_of_memory  # imports torch, which the body has done

        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        cuda = "CUDA " if "cuda" in str(error).lower() else ""
        advice = memory_advice if isinstance(memory_advice, str) else memory_advice()
        print_error(MemoryError(f"{cuda}out of memory: {advice}"))
        return EXIT_BAD_INPUT
