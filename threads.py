"""How the threads of a CPU wait for each other.

    threads.sleep_soon()
    import torch

In this order: OpenMP reads its environment once, when it is loaded with torch.
"""

from __future__ import annotations

import os


def sleep_soon() -> None:
    """Have threads that wait sleep after some microseconds, unless the user's environment says how they wait.

    Left to itself GNU's OpenMP spins 300,000 times wherever threads meet, hundreds of times in a step, as if the cores
    were its own: beside one other busy process on two cores a step then takes five to nine times as long, and so it
    takes twice as long (docs/benchmarks.md). 1,000 is the larger of the counts that OpenMP itself takes once there are
    more threads than cores (libgomp's manual, GOMP_SPINCOUNT). Other OpenMPs do not read the variable.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
