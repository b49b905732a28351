"""Bound how long OpenMP's threads spin: set before PyTorch loads the runtime, which reads it once.

By default they spin for some milliseconds after every parallel region. Beside another busy program each of them then
waits on a core that the thread it waits for would need, and a step takes many times as long (docs/benchmarks.md). Where
the user has set GOMP_SPINCOUNT or OMP_WAIT_POLICY, or has imported torch first, nothing is changed.
"""

import os
import sys

SPINS = 2000  # some tens of microseconds; docs/benchmarks.md has what other numbers cost


def bound_spinning() -> bool:
    """Set GOMP_SPINCOUNT for this process and its children; True if it was done."""
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True


bound_spinning()
