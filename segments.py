"""Segments of long videos: the rows that name them, what overlaps, and clips of the background between them.

A segment is a part of a video with a label: the frames with start <= time < end, in seconds. `samples` are those of
VLoader.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from readers import Segment, natural_key
from script import UserError, counted, shown

BACKGROUND = "background"  # the class of clips without any segment

# -- rows of metadata.jsonl -------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def check_times(row: dict[str, Any], where: str) -> None:
    """Checks start, end and fps of a row of metadata.jsonl. Raises UserError."""
    start, end, fps = (row.get(key) for key in ("start", "end", "fps"))
    if (start, end) == (None, None):
        return
    if not (is_number(start) and is_number(end) and 0 <= start < end):
        times = f"{shown(start)} and {shown(end)}"
        raise UserError(f"{where}: start and end must be seconds with 0 <= start < end, not {times}")
    if fps is not None and not (is_number(fps) and fps > 0):
        raise UserError(f"{where}: fps must be a number above 0, not {shown(fps)}")


def segment_of(row: dict[str, Any]) -> Segment | None:
    """The segment that a checked row of metadata.jsonl names; None for the whole video."""
    if row.get("start") is None:
        return None
    fps = row.get("fps")
    return Segment(float(row["start"]), float(row["end"]), None if fps is None else float(fps))


# -- overlaps ---------------------------------------------------------------------------------------


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


def by_video(samples: Iterable[Any]) -> dict[str, list[Any]]:
    """{real path: its segments} of the samples that are segments."""
    videos: dict[str, list[Any]] = {}
    for sample in samples:
        if sample.segment is not None:
            videos.setdefault(os.path.realpath(sample.path), []).append(sample)
    return videos


def refuse_overlaps(samples: Iterable[Any]) -> None:
    """Raises UserError if segments of one video overlap and have different labels."""
    for segments in by_video(samples).values():
        if pair := first_overlap(segments, lambda s: s.label):
            names = " and ".join(f"{s.label} ({s.segment.start:g} to {s.segment.end:g} s)" for s in pair)
            raise UserError(
                f"{pair[0].path}: {names} overlap; a segment can have only one label: shorten or remove one"
            )


# -- the background ---------------------------------------------------------------------------------


def add_background(splits: Any, share: float) -> Any:
    """Adds clips of a class "background" to each split: `share` times as many as it has segments.

    They are drawn from the gaps before and between the segments of a video, as long as segments of the split, and
    overlap neither a segment of any split nor each other. They are the same in every run. The time after the last
    segment is not used, because only opening the video would tell how long it is.
    Raises UserError if there are no segments, or no gap for a single clip.
    """
    names = ("train", "val", "test")
    if not share:
        return splits
    videos = by_video(sample for name in names for sample in getattr(splits, name))
    if not videos:
        raise UserError("--background needs segments: rows of metadata.jsonl with start and end; leave it out")
    free = {video: gaps_between(samples) for video, samples in videos.items()}

    # the same clips whatever --seed is, so that runs with several seeds are scored on the same test clips
    changed = {}
    for number, name in enumerate(names):
        samples = getattr(splits, name)
        own = by_video(samples)
        wanted = round(share * sum(map(len, own.values())))
        clips = draw_clips(own, free, wanted, np.random.default_rng(number))
        if len(clips) < wanted:
            count = f"{len(clips)} of {counted(wanted, 'clip')}"
            print(f"background of {name}: {count}; no gap between segments is long enough for more")
        changed[name] = samples + clips
    if splits.train and not any(s.label == BACKGROUND for s in changed["train"]):
        cause = "no gap before or between segments is as long as a segment, or the share is too small"
        raise UserError(f"--background {share:g} gives train no clip: {cause}; leave it out")
    return replace(splits, **changed, class_names=sorted({*splits.class_names, BACKGROUND}, key=natural_key))


def gaps_between(samples: list[Any]) -> list[tuple[float, float]]:
    """The times of a video before and between its segments, as (start, end)."""
    gaps, position = [], 0.0
    for start, end in sorted(map(times_of, samples)):
        if start > position:
            gaps.append((position, start))
        position = max(position, end)
    return gaps


def draw_clips(
    videos: dict[str, list[Any]], free: dict[str, list[tuple[float, float]]], count: int, rng: np.random.Generator
) -> list[Any]:
    """Up to `count` samples of the background of `videos`, in the order of the videos; takes their times from `free`."""
    # arrays with room for the pieces that drawing a clip leaves of a gap; unused places have no length
    gaps = [(video, gap) for video in videos for gap in free[video]]
    names = [video for video, _ in gaps] + [""] * count
    times = np.zeros((len(names), 2))
    times[: len(gaps)] = np.array([gap for _, gap in gaps]).reshape(-1, 2)
    lengths = np.array([end - start for samples in videos.values() for start, end in map(times_of, samples)])

    clips: list[tuple[str, float, float]] = []
    for place, length in enumerate(rng.choice(lengths, count) if count else [], start=len(gaps)):
        sizes = times[:, 1] - times[:, 0]
        fitting = np.flatnonzero(sizes >= length)
        if not len(fitting):
            continue
        chosen = rng.choice(fitting, p=sizes[fitting] / sizes[fitting].sum())
        first, last = times[chosen]
        # whole milliseconds, to be read by people
        low, high = math.ceil(first * 1000), math.floor((last - length) * 1000)
        start = int(rng.integers(low, high + 1)) / 1000 if low <= high else float(first)
        end = min(start + float(length), float(last))
        clips.append((names[chosen], start, end))
        times[chosen], times[place], names[place] = (first, start), (end, last), names[chosen]

    # what is left, for the other splits
    free |= {video: [] for video in videos}
    for name, (start, end) in zip(names, times.tolist(), strict=True):
        if end > start:
            free[name].append((start, end))
    order = {video: number for number, video in enumerate(videos)}
    return [background_of(videos[v][0], start, end) for v, start, end in sorted(clips, key=lambda c: (order[c[0]], c))]


def background_of(sample: Any, start: float, end: float) -> Any:
    """A clip of the background of a sample's video."""
    segment = Segment(start, end, sample.segment.fps)
    nothing = {"captions": (), "text": None, "other_text": None, "objects": ()}
    return replace(sample, label=BACKGROUND, segment=segment, **nothing)
