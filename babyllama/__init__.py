"""The library behind the scripts. Importing it settles how CPU threads wait; import it before torch."""

import os

# GNU's OpenMP spins 300,000 times wherever threads meet. Beside one other busy process on two cores that makes a
# training step five to nine times as long; with 1,000 spins it takes twice as long (docs/results.md). OpenMP reads the
# variable once, when torch loads it. A setting of the user's own is left alone; other OpenMPs ignore the variable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
