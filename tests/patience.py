"""Deadlines by how busy the machine is: short ones, that a test has to sit out, must not be too short for it."""

import time
from functools import cache


@cache
def patience() -> float:
    """By how much longer than on an idle machine work takes here now, at least 1 and at most 8: one measurement."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.1:
        pass
    return min(8.0, max(1.0, (time.perf_counter() - wall) / 0.1))
