"""How the threads of a CPU wait for each other. To be settled before torch is imported.

threads.sleep_soon()
import torch
"""

from __future__ import annotations

import os


def sleep_soon() -> None:
    """Have threads that wait sleep after some microseconds, unless the user's environment says otherwise.

    Left to itself GNU's OpenMP spins for a millisecond at each of a step's hundreds of meetings, because it takes the
    cores for its own: with one other busy process on two cores a step takes five to nine times as long, so it takes
    two (docs/benchmarks.md). 1000 turns is what it spins itself once it knows of too few cores. Others have no such
    variable and are left alone.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
