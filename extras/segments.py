"""Segments of long videos: the rows that name them, what overlaps, clips of the background between them, segments made
of the windows of a timeline, and scores of such segments.

A segment is a part of a video with a label: the frames with start <= time < end, in seconds. `samples` are those of
VLoader.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metrics import Summary, with_intervals
from readers import Segment, natural_key
from script import UserError, cause_of, counted, printable, shown

BACKGROUND = "background"  # the class of clips without any segment
ROUNDING = 1e-6  # seconds: times that were computed may differ by less, and no frame is so short

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
            if name != own and times_of(other)[1] > start + ROUNDING:
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
                f"{pair[0].path}: {names} overlap; a segment can have only one label: shorten or remove one, or add "
                "--multi_label True"
            )


# -- the background ---------------------------------------------------------------------------------


def add_background(splits: Any, share: float) -> Any:
    """Adds clips of a class "background" to each split: `share` times as many as it has segments. Where samples have
    `labels`, the clips have none of them instead.

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
        raise UserError("--background needs segments: rows of metadata.jsonl with start and end; without them use 0")
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
    if splits.train and len(changed["train"]) == len(splits.train):
        cause = "no gap before or between segments is as long as a segment, or the share is too small"
        raise UserError(f"--background {share:g} gives train no clip: {cause}; use 0")
    own_class = {s.label for samples in changed.values() for s in samples} & {BACKGROUND}
    return replace(splits, **changed, class_names=sorted({*splits.class_names} | own_class, key=natural_key))


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
    """Up to `count` samples of the background of `videos`, in the order of the videos. Their times go from `free`."""
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
    nothing = {"captions": (), "text": None, "other_text": None, "objects": (), "questions": ()}
    label = {"label": BACKGROUND} if sample.labels is None else {"labels": ()}
    return replace(sample, **label, segment=segment, **nothing)


# -- windows to segments ----------------------------------------------------------------------------


def merge_windows(
    windows: list[dict[str, Any]], stride: float, thresholds: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """The segments of one video, as rows {"file", "path", "segment", "start", "end", "label", "name", "score"}.

    Args:
        windows: one answer per window of this video, with its times, its `top_k` and, if a window may have several
            labels, its `labels`. Windows may overlap.
        stride: seconds from the start of a window to the start of the next.
        thresholds: the threshold of each class, if a window may have several labels.

    Every `stride` seconds the scores of all windows around that time are averaged; classes that a window does not name
    count as 0 there. Neighbouring times with the same best class become a segment, unless it is the background. With
    `thresholds`, neighbouring times at which a class reaches its threshold become a segment, and segments may overlap.
    The score of a segment is the mean over its times.
    """
    # a window that is none of the classes is background
    empty = [{"label": BACKGROUND, "name": BACKGROUND, "score": 1.0}]
    windows = [row | {"top_k": empty} if row.get("label", "") is None else row for row in windows]
    scored = [{best["label"]: best for best in row["top_k"] + row.get("labels", [])} for row in windows]
    names = {label: best["name"] for row in scored for label, best in row.items()}
    labels = [*names]
    end = max(row["end"] for row in windows)
    edges = np.append(np.arange(0, end - 1e-6, stride), end)
    middles = (edges[:-1] + edges[1:]) / 2

    # the mean scores at each time; zero where there is no window, because the video has no frames there
    scores, counts = np.zeros((len(middles), len(labels))), np.zeros((len(middles), 1))
    for window, row in zip(windows, scored, strict=True):
        first, after = np.searchsorted(middles, (window["start"], window["end"]))
        counts[first:after] += 1
        for label, best in row.items():
            scores[first:after, labels.index(label)] += best["score"]
    scores /= np.maximum(counts, 1)

    # which classes are on at each time: the best one, or all that reach their thresholds
    if thresholds is None:
        on = (np.arange(len(labels)) == scores.argmax(1)[:, None]) & (counts > 0)
        on &= np.array([label != BACKGROUND for label in labels])
    else:
        on = (scores >= [thresholds[label] for label in labels]) & (counts > 0)

    # a segment from each time at which a class comes on to the next at which it is off
    rows = []
    for number, label in enumerate(labels):
        changes = np.flatnonzero(np.diff(on[:, number], prepend=False, append=False)).tolist()
        for first, after in zip(changes[::2], changes[1::2], strict=True):
            times = {"start": round(float(edges[first]), 3), "end": round(float(edges[after]), 3)}
            score = round(float(scores[first:after, number].mean()), 4)
            video = {"file": windows[0]["file"], "path": windows[0]["path"], "segment": True}
            rows.append(video | times | {"label": label, "name": names[label], "score": score})
    return sorted(rows, key=lambda row: (row["start"], row["end"]))


def merged_segments(
    rows: list[dict[str, Any]], stride: float, thresholds: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """The segments of all videos whose windows are among the answers, in the order of their paths; [] for stride 0. See
    merge_windows()."""
    windows: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if stride and "error" not in row:
            windows.setdefault(row["path"], []).append(row)
    return [segment for path in sorted(windows) for segment in merge_windows(windows[path], stride, thresholds)]


# -- scores of segments -----------------------------------------------------------------------------

F1_OVERLAPS = (0.1, 0.25, 0.5)
MAP_OVERLAPS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())  # of ActivityNet
OVERLAPS = tuple(dict.fromkeys(F1_OVERLAPS + MAP_OVERLAPS))


class Event(NamedTuple):
    """A segment with a label, in seconds. `score` is 1 for the truth."""

    start: float
    end: float
    label: str
    score: float = 1.0


@dataclass
class Recording:
    """The true and the predicted segments of one video."""

    name: str
    truth: list[Event] = field(default_factory=list)
    predicted: list[Event] = field(default_factory=list)
    seconds: float = 0.0  # how long the video is, as far as the files tell
    group: str | None = None  # the recording that this video is a part of


def overlap(one: Event, other: Event) -> float:
    """Intersection over union of two segments in time."""
    shared = max(0.0, min(one.end, other.end) - max(one.start, other.start))
    return shared / (one.end - one.start + other.end - other.start - shared)


def count_matches(truth: list[Event], predicted: list[Event], least: float) -> tuple[int, int, int]:
    """(true positives, false positives, false negatives) of one video, as in segmental F1 (Lea 2017).

    In the order of time, each prediction is compared with the true segment of its label that it overlaps most. It is
    right if the overlap is at least `least` and no earlier prediction has matched that segment.
    """
    truth, matched = sorted(truth), set()
    for event in sorted(predicted):
        overlaps = [overlap(event, other) if other.label == event.label else 0.0 for other in truth]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] >= least:
            matched.add(best)
    return len(matched), len(predicted) - len(matched), len(truth) - len(matched)


def right_predictions(truth: list[Event], predicted: list[Event], least: float) -> list[bool]:
    """Whether each prediction of one video and one label is right, as ActivityNet's evaluation decides it.

    `predicted` is in the order of falling scores. A prediction takes the true segment that it overlaps most, of those
    that are still free and that it overlaps by at least `least`.
    """
    free, right = {*range(len(truth))}, []
    for event in predicted:
        best = max(free, key=lambda i: overlap(event, truth[i]), default=None)
        right.append(best is not None and overlap(event, truth[best]) >= least)
        if right[-1]:
            free.remove(best)
    return right


def average_precision(right: np.ndarray, weights: np.ndarray, total: float) -> np.ndarray:
    """Interpolated average precision at several overlaps. (O,)

    Args:
        right: whether each prediction is right at each overlap, (O, n), in the order of falling scores.
        weights: how often each prediction counts, (n,): in the bootstrap, recordings are drawn several times.
        total: how many true segments there are.
    """
    found = np.cumsum(right * weights, axis=1)  # (O, n)
    precision = found / np.maximum(np.cumsum(weights), 1)
    # a precision counts for all recalls up to its own: the best precision at this recall or a higher one
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return (np.diff(found, axis=1, prepend=0) * best).sum(1) / total


def segment_summary(recordings: list[Recording]) -> Summary:
    """F1, mAP and false alarms per hour. The summary takes indices of recordings.

    F1 counts matches over all recordings, see count_matches(). mAP is the mean over the labels that have true segments,
    see average_precision(); "mAP" without a number is ActivityNet's, the mean over the overlaps 0.5, 0.55 … 0.95. A
    false alarm is a prediction without a match at the lowest overlap of F1.
    """
    # everything that depends on one recording is computed once: the bootstrap calls the summary a thousand times
    counts = np.array([[count_matches(r.truth, r.predicted, o) for o in F1_OVERLAPS] for r in recordings])  # (n, 3, 3)
    hours = np.array([r.seconds for r in recordings]) / 3600
    labels = sorted({event.label for r in recordings for event in r.truth})
    tables = [label_table(recordings, label) for label in labels]

    def summary(indices: np.ndarray) -> dict[str, float]:
        drawn = np.bincount(indices, minlength=len(recordings))  # (n,)
        right, wrong, missed = np.tensordot(drawn, counts, 1).T  # (3,) each
        precisions = [
            average_precision(right, drawn[owners], drawn @ totals)
            for owners, right, totals in tables
            if drawn @ totals
        ]
        means = dict(zip(OVERLAPS, np.mean(precisions or [[0.0] * len(OVERLAPS)], axis=0).tolist(), strict=True))
        f1 = 2 * right / np.maximum(2 * right + wrong + missed, 1)
        return (
            {f"F1@{o:g}": float(value) for o, value in zip(F1_OVERLAPS, f1, strict=True)}
            | {f"mAP@{o:g}": means[o] for o in F1_OVERLAPS}
            | {"mAP": float(np.mean([means[o] for o in MAP_OVERLAPS]))}
            | {"false_alarms_per_hour": float(wrong[0] / max(drawn @ hours, 1e-9))}
        )

    return summary


def label_table(recordings: list[Recording], label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What average_precision() needs of one label, with its predictions in the order of falling scores: (the recording
    of each, (n,); whether it is right at each overlap, (O, n); the number of true segments of each recording)."""
    owners, scores, totals = [], [], []
    right: list[list[bool]] = [[] for _ in OVERLAPS]
    for number, recording in enumerate(recordings):
        truth = [event for event in recording.truth if event.label == label]
        predicted = [event for event in recording.predicted if event.label == label]
        predicted.sort(key=lambda event: -event.score)
        totals.append(len(truth))
        owners += [number] * len(predicted)
        scores += [event.score for event in predicted]
        for row, least in zip(right, OVERLAPS, strict=True):
            row += right_predictions(truth, predicted, least)
    order = np.argsort(-np.array(scores), kind="stable")
    return np.array(owners, int)[order], np.array(right, bool)[:, order], np.array(totals)


def segment_scores(recordings: list[Recording]) -> dict[str, Any]:
    """segment_summary() with intervals from the bootstrap over recordings, or the groups that they are in, and
    counts."""
    totals = Counter(event.label for r in recordings for event in r.truth)
    return {
        "recordings": len(recordings),
        "hours": sum(r.seconds for r in recordings) / 3600,
        "segments": sum(totals.values()),
        "predicted": sum(len(r.predicted) for r in recordings),
    } | with_intervals(segment_summary(recordings), len(recordings), [r.group or r.name for r in recordings])


# -- files of segments ------------------------------------------------------------------------------


def read_recordings(truth_file: Path, answers_file: Path) -> list[Recording]:
    """The recordings of a metadata.jsonl and of an --output of inference.py. Segments of the background are left out.

    A recording that only one of the files names has no segments in the other. Files are matched by their paths, or by
    their names if no path is in both. Raises UserError.
    """
    truth, answers = read_json_rows(truth_file), read_json_rows(answers_file)
    if not truth or not answers:
        raise UserError(f"{truth_file if not truth else answers_file} is empty")
    answers = [row for row in answers if "error" not in row]
    if not answers:
        raise UserError(f"{answers_file} has only errors")

    # windows that were merged say so, even if no segment came of it; only others count as segments themselves
    merged = any(isinstance(row.get("segment"), bool) for row in answers)
    if not merged and any("top_k" in row for row in answers):
        note = "has no merged segments (--timeline_stride), so each window counts as one"
        print(f"note: {printable(answers_file)} {note}", file=sys.stderr)
    true_names = [name_of(row, truth_file, truth_file.parent) for row in truth]
    names = {id(row): name_of(row, answers_file, Path()) for row in answers}
    if not {*true_names} & {*names.values()}:
        true_names, names = by_file_name(true_names, names, truth_file, answers_file)

    if more := {*names.values()} - {*true_names}:
        note = f"{counted(len(more), 'video')} of {answers_file} not in {truth_file}: taken as without true segments"
        print(printable(f"note: {note}; first {min(more)}"), file=sys.stderr)

    found: dict[str, Recording] = {}
    for name, row in zip(true_names, truth, strict=True):
        recording = found.setdefault(name, Recording(name))
        recording.group = row["group"] if isinstance(row.get("group"), str) else recording.group
        add_event(recording, row, truth_file, "truth")
    for row in answers:  # windows too, because they tell how long the video is
        recording = found.setdefault(names[id(row)], Recording(names[id(row)]))
        add_event(recording, row, answers_file, "predicted" if not merged or row.get("segment") is True else "")
    if not any(r.truth for r in found.values()):
        raise UserError(f"{truth_file} has no segments: rows with label, start and end")
    return sorted(found.values(), key=lambda r: natural_key(r.name))


def read_json_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. Raises UserError."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {cause_of(error)}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: expected one JSON object per line")
    return rows


def name_of(row: dict[str, Any], file: Path, folder: Path) -> str:
    """The real path of the video that a row names, relative to `folder`. Raises UserError."""
    name = row.get("path", row.get("file_name", row.get("file")))
    if not isinstance(name, str):
        raise UserError(f"{file}: a row names no video (path, file_name or file): {shown(row)}")
    return os.path.realpath(folder / name)


def by_file_name(
    truth: list[str], answers: dict[int, str], truth_file: Path, answers_file: Path
) -> tuple[list[str], dict[int, str]]:
    """The names without their folders. Raises UserError if that makes two videos one, or if still none is in both."""
    for names in ({*truth}, {*answers.values()}):
        if len({Path(name).name for name in names}) < len(names):
            raise UserError(
                f"{truth_file} and {answers_file} have no path in common, and two videos have the same name"
            )
    short = [Path(name).name for name in truth], {key: Path(name).name for key, name in answers.items()}
    if not {*short[0]} & {*short[1].values()}:
        raise UserError(
            f"{truth_file} and {answers_file} have no video in common: {shown(truth[0])} and "
            f"{shown(next(iter(answers.values()), None))}"
        )
    return short


def add_event(recording: Recording, row: dict[str, Any], file: Path, kind: str) -> None:
    """Adds a row to the `kind` of a recording, "truth", "predicted" or "" for neither. A row with `labels`, names or
    answers with scores, counts once for each of them. Raises UserError."""
    if isinstance(row.get("labels"), list):
        rest = {key: value for key, value in row.items() if key != "labels"}
        for label in row["labels"] or [BACKGROUND]:  # of the background, only the time counts
            add_event(recording, rest | (label if isinstance(label, dict) else {"label": label}), file, kind)
        return
    if kind == "truth" and row.get("start") is None and row.get("end") is None and row.get("label") is None:
        return  # a recording without segments
    start, end, label, score = (row.get(key) for key in ("start", "end", "label", "score"))
    if kind != "truth" and "label" in row and label is None:
        label = BACKGROUND  # the answer was "none of these"
    if not (is_number(start) and is_number(end) and 0 <= start < end and isinstance(label, str)):
        raise UserError(f"{file}: a segment needs a label, and start and end with 0 <= start < end: {shown(row)}")
    score = 1.0 if score is None or kind == "truth" else score
    if not is_number(score):
        raise UserError(f"{file}: score must be a number: {shown(row)}")
    recording.seconds = max(recording.seconds, end)
    if kind and label != BACKGROUND:
        getattr(recording, kind).append(Event(float(start), float(end), label, float(score)))
