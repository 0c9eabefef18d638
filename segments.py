"""Segments of long videos: what overlaps.

A segment is a part of a video with a label: the frames with start <= time < end, in seconds.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any


def times_of(sample: Any) -> tuple[float, float]:
    """(start, end) of a sample in seconds; a whole video has no end."""
    return (0.0, math.inf) if sample.segment is None else sample.segment[:2]


def first_overlap(samples: Iterable[Any], group: Callable[[Any], Any]) -> tuple[Any, Any] | None:
    """The first two samples of one video that overlap in time and are in different groups; None if there are none."""
    # it is enough to remember the sample of each group that ends last
    latest: dict[Any, Any] = {}
    for sample in sorted(samples, key=times_of):
        start, end = times_of(sample)
        own = group(sample)
        for name, other in latest.items():
            if name != own and times_of(other)[1] > start:
                return other, sample
        if own not in latest or end > times_of(latest[own])[1]:
            latest[own] = sample
    return None
