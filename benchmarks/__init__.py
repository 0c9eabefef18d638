"""Benchmarks: each is a module that `python -m benchmarks.NAME --help` tells about; RESULTS.md has what they printed."""

import time
from collections.abc import Callable


def alternate(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, round by round; every round takes all jobs in turn, after one that warms them up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds
