"""Means over seeds and clips with 95 % intervals, and paired differences between two rows.

Scores are arrays (S, n): one row for each seed, one column for each test clip. All seeds, and all rows of the study,
are tested on the same clips.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from metrics import bounds, mcnemar, wilson

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means, its 95 % interval, and for a mean the value of each seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...] = ()

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@lru_cache(maxsize=4)
def drawn_clips(count: int) -> np.ndarray:
    """How often each of `count` clips is drawn, in DRAWS draws with replacement. (DRAWS, count)"""
    # a fixed seed, so that the same predictions always get the same intervals
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)


def bootstrap_means(*groups: np.ndarray) -> list[np.ndarray]:
    """The hierarchical bootstrap over seeds and clips: the means of scores (S, n), (DRAWS,) for each group.

    Each draw takes S seeds and n clips, both with replacement (Owen 2007, doi 10.1214/07-AOAS122). The clips are the
    same for all groups, which makes their differences paired. The seeds are drawn for every group by itself: seed 0 of
    one model has nothing in common with seed 0 of another one.
    """
    rng = np.random.default_rng(1)
    clips = drawn_clips(groups[0].shape[1])  # (DRAWS, n)
    means = []
    for scores in groups:
        count = len(scores)
        seeds = rng.multinomial(count, np.full(count, 1 / count), DRAWS)  # (DRAWS, S)
        means.append((seeds * (clips @ scores.T)).sum(1) / scores.size)
    return means


def estimate(scores: np.ndarray, proportion: bool = True) -> Estimate:
    """The mean of scores (S, n). The bootstrap has no width if all scores are equal, so a proportion of exactly 0 or 1
    gets the Wilson interval of n clips; the seeds share these clips, so they do not count as more."""
    scores = scores.astype(float)
    low, high = bounds(bootstrap_means(scores)[0])
    if proportion and scores.mean() in (0, 1):
        low, high = wilson(round(scores[0].sum()), scores.shape[1])
    return Estimate(float(scores.mean()), low, high, tuple(scores.mean(1).tolist()))


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The mean of `first` minus that of `second`, proportions of the same clips: (S, n) each.

    If both are exactly 0 or 1, the interval is the one that Newcombe (1998, method 10) makes of two Wilson intervals.
    """
    first, second = first.astype(float), second.astype(float)
    point = float(first.mean() - second.mean())
    one, two = bootstrap_means(first, second)
    low, high = bounds(one - two)
    if first.mean() in (0, 1) and second.mean() in (0, 1):
        a, b = estimate(first), estimate(second)
        low = point - float(np.hypot(a.mean - a.low, b.high - b.mean))
        high = point + float(np.hypot(a.high - a.mean, b.mean - b.low))
    return Estimate(point, low, high)


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact test on each seed of one row with each seed of the other: the largest p. (S, n) bool each.

    To count the clips of all seeds together would treat each clip as several.
    """
    return max(mcnemar(a.tolist(), b.tolist())["p"] for a in first for b in second)
