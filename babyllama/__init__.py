"""Train and evaluate small language models: the library behind the scripts.

Import it before torch: it configures how the CPU threads of torch wait.
"""

import os

# GNU's OpenMP busy-waits for 300,000 spins wherever threads meet. If another process shares two
# cores, that makes a training step five to nine times as slow; with 1,000 spins it is twice as slow
# (docs/results.md). OpenMP reads the variable once, when torch loads it. A setting of the user's
# stays; other OpenMP libraries ignore the variable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
