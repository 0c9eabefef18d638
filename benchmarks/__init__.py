"""Benchmarks. `python -m benchmarks.NAME --help` describes each one; RESULTS.md has the results."""

import time
from collections.abc import Callable


def alternate(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """{name: seconds of each round}. Every round runs all jobs in turn, after one warm-up round that does not count."""
    # alternating, because the load of the machine drifts: it then hits all jobs alike
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:  # not the warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds
