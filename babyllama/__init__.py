"""Train and evaluate small language models: the library behind the scripts.

Import it before the packages of others: it names those that are missing, and it configures how the
CPU threads of torch wait.
"""

import os
import sys

# GNU's OpenMP busy-waits for 300,000 spins wherever threads meet. If another process shares two
# cores, that makes a training step five to nine times as slow; with 1,000 spins it is twice as slow
# (docs/results.md). OpenMP reads the variable once, when torch loads it. A setting of the user's
# stays; other OpenMP libraries ignore the variable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _name_missing_package(kind, error, trace) -> None:
    """Print one line instead of the traceback of a package that is not installed, and exit with 2.

    This is Python's hook for exceptions that nobody catches, so notebooks never come here. Python's
    prompt does, and must not end.
    """
    name = getattr(error, "name", None)
    is_missing = issubclass(kind, ModuleNotFoundError) and name and "." not in name
    is_interactive = hasattr(sys, "ps1") or sys.flags.interactive
    if not is_missing or is_interactive or os.environ.get("BABYLLAMA_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
        return
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    requirements = os.path.relpath(os.path.join(root, "requirements.txt"))
    install = f"{sys.executable} -m pip install -r {requirements}"
    advice = f"activate the project's environment, or install the packages: {install}"
    print(f"error: {sys.executable} has no package {name}; {advice}", file=sys.stderr)
    raise SystemExit(2)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _name_missing_package
