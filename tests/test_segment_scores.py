"""Segments made of the windows of a timeline, and their scores, against slow references written apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import in_full

import metrics
import score
from extras.segments import (
    F1_OVERLAPS,
    MAP_OVERLAPS,
    Event,
    Recording,
    average_precision,
    merge_windows,
    read_recordings,
    segment_scores,
    segment_summary,
)

# -- references -------------------------------------------------------------------------------------


def iou(a: Event, b: Event) -> float:
    inter = min(a.end, b.end) - max(a.start, b.start)
    return max(inter, 0) / (max(a.end, b.end) - min(a.start, b.start)) if inter > 0 else 0.0


def activitynet_map(recordings: list[Recording], least: float) -> float:
    """ActivityNet's evaluation, step by step: one list of predictions per class, the best true segment first, a lock on
    each, then precision and recall after each prediction, and the area below the interpolated curve."""
    precisions = []
    for label in sorted({e.label for r in recordings for e in r.truth}):
        truth = {n: [e for e in r.truth if e.label == label] for n, r in enumerate(recordings)}
        predicted = [(e.score, n, e) for n, r in enumerate(recordings) for e in r.predicted if e.label == label]
        predicted.sort(key=lambda row: -row[0])
        locked, hits = set(), []
        for _, number, event in predicted:
            hit = False
            for place in sorted(range(len(truth[number])), key=lambda i: -iou(event, truth[number][i])):
                if iou(event, truth[number][place]) < least:
                    break
                if (number, place) not in locked:
                    locked.add((number, place))
                    hit = True
                    break
            hits.append(hit)
        total, area, recall = sum(map(len, truth.values())), 0.0, 0.0
        curve = [(sum(hits[:i]) / total, sum(hits[:i]) / i) for i in range(1, len(hits) + 1)]
        for i, (at, _) in enumerate(curve):
            area += (at - recall) * max(p for _, p in curve[i:])
            recall = at
        precisions.append(area)
    return sum(precisions) / len(precisions)


def segmental_f1(recordings: list[Recording], least: float) -> float:
    """Lea's F1 as MS-TCN counts it."""
    tp = fp = fn = 0
    for r in recordings:
        truth, hits = sorted(r.truth), [0] * len(r.truth)
        for event in sorted(r.predicted):
            overlaps = [iou(event, t) * (event.label == t.label) for t in truth]
            if overlaps and max(overlaps) >= least and not hits[overlaps.index(max(overlaps))]:
                tp += 1
                hits[overlaps.index(max(overlaps))] = 1
            else:
                fp += 1
        fn += len(truth) - sum(hits)
    return 2 * tp / max(1, 2 * tp + fp + fn)


def random_recordings(seed: int, count: int = 6) -> list[Recording]:
    """True segments, and predictions that are near them, elsewhere, doubled or of another label."""
    rng = np.random.default_rng(seed)
    recordings = []
    for number in range(count):
        recording = Recording(f"v{number}", seconds=100.0)
        for _ in range(rng.integers(0, 5)):
            start, length = rng.uniform(0, 90), rng.uniform(1, 10)
            recording.truth.append(Event(start, start + length, "abc"[rng.integers(3)]))
        for event in recording.truth * 2:
            start = event.start + rng.normal(0, 2)
            label = event.label if rng.random() < 0.8 else "abcd"[rng.integers(4)]
            recording.predicted.append(Event(start, start + rng.uniform(0.5, 12), label, rng.random()))
        for _ in range(rng.integers(0, 3)):
            start = rng.uniform(0, 90)
            recording.predicted.append(Event(start, start + 3, "abcd"[rng.integers(4)], rng.random()))
        recordings.append(recording)
    recordings[0].truth.append(Event(0, 5, "a"))
    return recordings


# random_recordings(seed, 10): mAP at 0.1, 0.25, 0.5 and its mean over 0.5 to 0.95, computed by ActivityNet's own code
# (Evaluation/eval_detection.py of activitynet/ActivityNet, commit 82304fa); F1 at 0.1, 0.25, 0.5 by MS-TCN's (eval.py
# of yabufarha/ms-tcn, commit 33ed91c)
PUBLISHED = [
    (0, [0.75, 0.597176, 0.289286], 0.11956, [0.6, 0.533333, 0.333333]),
    (1, [0.660244, 0.477203, 0.340344], 0.137712, [0.492308, 0.430769, 0.338462]),
    (2, [0.596459, 0.45757, 0.293875], 0.088332, [0.447761, 0.38806, 0.268657]),
]


@pytest.mark.parametrize(("seed", "precisions", "mean", "f1"), PUBLISHED)
def test_scores_equal_the_published_code(seed, precisions, mean, f1):
    scores = segment_summary(random_recordings(seed, 10))(np.arange(10))
    assert [scores[f"mAP@{least:g}"] for least in F1_OVERLAPS] == pytest.approx(precisions, abs=1e-6)
    assert scores["mAP"] == pytest.approx(mean, abs=1e-6)
    assert [scores[f"F1@{least:g}"] for least in F1_OVERLAPS] == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_slow_references(seed):
    recordings = random_recordings(seed)
    scores = segment_summary(recordings)(np.arange(len(recordings)))
    for least in F1_OVERLAPS:
        assert scores[f"F1@{least:g}"] == pytest.approx(segmental_f1(recordings, least), abs=1e-12)
        assert scores[f"mAP@{least:g}"] == pytest.approx(activitynet_map(recordings, least), abs=1e-12)
    mean = np.mean([activitynet_map(recordings, least) for least in MAP_OVERLAPS])
    assert scores["mAP"] == pytest.approx(mean, abs=1e-12)


def test_a_draw_of_the_bootstrap_scores_like_these_recordings_written_out():
    """Recordings that are drawn twice count twice; those that are not drawn count nowhere."""
    recordings = random_recordings(3)
    summary, rng = segment_summary(recordings), np.random.default_rng(0)
    for _ in range(20):
        drawn = rng.integers(0, len(recordings), len(recordings))
        drawn[0] = 0
        copies = [recordings[i] for i in drawn]
        written = segment_summary(copies)(np.arange(len(copies)))
        assert summary(drawn) == pytest.approx(written, abs=1e-12)
        assert written["mAP@0.5"] == pytest.approx(activitynet_map(copies, 0.5), abs=1e-12)


def test_the_average_precision_of_a_known_ranking():
    """right, wrong, right, of 4: recall 1/4 at precision 1, 2/4 at 2/3; the others are never found."""
    (value,) = average_precision(np.array([[True, False, True]]), np.ones(3, int), 4)
    assert value == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3)


def test_scores_of_known_predictions():
    truth = [Event(0, 10, "a"), Event(20, 30, "b")]
    recordings = [
        Recording("x", truth, list(truth), 1800),
        Recording("y", truth, [Event(0, 5, "a"), Event(5, 10, "a"), Event(50, 60, "b", 0.1)], 1800),
    ]
    scores = segment_summary(recordings)(np.arange(2))
    assert scores["F1@0.5"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))  # a is found once, and once more in vain
    assert scores["false_alarms_per_hour"] == 2
    perfect = segment_summary(recordings[:1])(np.array([0]))
    assert perfect == {name: 0.0 if "false" in name else 1.0 for name in perfect}


def test_intervals_hold_the_score_and_false_alarms_may_exceed_one():
    with in_full():
        scores = segment_scores(random_recordings(1, 12))
    for name, (low, high) in scores["intervals"].items():
        assert low <= scores[name] <= high and low < high, name
    assert scores["false_alarms_per_hour"] > 1 and scores["recordings"] == 12
    assert {"false_alarms_per_hour"} <= metrics.UNBOUNDED


# -- windows to segments ----------------------------------------------------------------------------


def window(start: float, end: float, **scores: float) -> dict:
    top = sorted(({"label": k, "name": k.upper(), "score": v} for k, v in scores.items()), key=lambda b: -b["score"])
    return {"file": "v.mp4", "path": "/v.mp4", "start": start, "end": end, "top_k": top, **top[0]}


def test_windows_that_follow_each_other_become_segments():
    rows = [window(0, 2, a=0.9, b=0.1), window(2, 4, a=0.7, b=0.3), window(4, 6, background=0.8), window(6, 7, b=0.6)]
    found = merge_windows(rows, 2)
    assert [(r["start"], r["end"], r["label"], r["name"], r["score"]) for r in found] == [
        (0, 4, "a", "A", 0.8),
        (6, 7, "b", "B", 0.6),
    ]
    assert all(r["segment"] is True and r["path"] == "/v.mp4" for r in found)


def test_overlapping_windows_are_averaged():
    """One window that is wrong between two that are right changes nothing: at 1 to 2 s a has (0.8 + 0.4) / 2 > b."""
    rows = [window(0, 2, a=0.8, b=0.2), window(1, 3, b=0.6, a=0.4), window(2, 4, a=0.9, b=0.1)]
    assert [(r["start"], r["end"], r["label"], r["score"]) for r in merge_windows(rows, 1)] == [
        (0, 4, "a", pytest.approx((0.8 + 0.6 + 0.65 + 0.9) / 4))
    ]


def test_times_without_a_window_are_in_no_segment():
    rows = [window(0, 2, a=0.9), window(8, 10, a=0.9)]
    assert [(r["start"], r["end"]) for r in merge_windows(rows, 2)] == [(0, 2), (8, 10)]


# -- files ------------------------------------------------------------------------------------------


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_matched_by_path_or_name_and_drawn(tmp_path, capsys):
    truth = write(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.mp4", "label": "jump", "start": 0, "end": 4},
        {"file_name": "a.mp4", "label": "background", "start": 5, "end": 6},
        {"file_name": "empty.mp4"},
    )
    segment = {"segment": True, "label": "jump", "score": 0.5}
    for folder in (tmp_path, Path("/elsewhere")):
        windows = [window(0, 4, jump=0.5) | {"path": str(folder / name)} for name in ("a.mp4", "empty.mp4")]
        rows = [{"path": str(folder / "a.mp4"), "start": 0, "end": 3} | segment]
        answers = write(tmp_path / "answers.jsonl", *windows, *rows, {"path": str(folder / "c.mp4"), "error": "broken"})
        a, empty = read_recordings(truth, answers)
        assert a.truth == [Event(0, 4, "jump")] and a.predicted == [Event(0, 3, "jump", 0.5)] and a.seconds == 6
        assert not empty.truth and not empty.predicted and empty.seconds == 4
        with in_full():
            assert score.main(["--segments", str(truth), str(answers)]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["F1@0.5"] == 1 and printed["mAP@0.5"] == 1 and printed["recordings"] == 2
        assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")


def test_a_video_without_truth_is_mentioned(tmp_path, capsys):
    truth = write(tmp_path / "metadata.jsonl", {"file_name": "a.mp4", "label": "jump", "start": 0, "end": 4})
    rows = [window(0, 4, jump=0.9) | {"path": str(tmp_path / name)} for name in ("a.mp4", "more.mp4")]
    read_recordings(truth, write(tmp_path / "answers.jsonl", *rows))
    err = capsys.readouterr().err
    assert f"1 video of {tmp_path / 'answers.jsonl'} not in {truth}: taken as without true segments; first " in err


def test_windows_alone_count_one_by_one(tmp_path, capsys):
    truth = write(tmp_path / "t.jsonl", {"file_name": "v.mp4", "label": "a", "start": 0, "end": 4})
    answers = write(
        tmp_path / "a.jsonl", *(window(i, i + 2, a=0.9) | {"path": str(tmp_path / "v.mp4")} for i in (0, 2))
    )
    (recording,) = read_recordings(truth, answers)
    printed = capsys.readouterr()
    assert len(recording.predicted) == 2 and "each window counts as one" in printed.err
    assert not printed.out  # it has only the JSON


def test_merged_windows_without_a_segment_predict_nothing(tmp_path, capsys):
    truth = write(tmp_path / "t.jsonl", {"file_name": "v.mp4", "label": "a", "start": 0, "end": 4})
    row = window(0, 2, a=0.9) | {"path": str(tmp_path / "v.mp4"), "segment": False}
    (recording,) = read_recordings(truth, write(tmp_path / "a.jsonl", row))
    assert recording.predicted == [] and recording.seconds == 4 and not capsys.readouterr().err


BAD = {
    "no label": ([{"file_name": "a", "start": 0, "end": 1}], [], "a segment needs a label"),
    "no length": ([{"file_name": "a", "label": "x", "start": 1, "end": 1}], [], "0 <= start < end"),
    "no name": ([{"label": "x", "start": 0, "end": 1}], [], "names no video"),
    "nothing true": ([{"file_name": "a"}], [{"file": "a", "label": "x", "start": 0, "end": 1}], "has no segments"),
    "other videos": (None, [{"file": "b", "label": "x", "start": 0, "end": 1}], "no video in common"),
    "odd score": (None, [{"file": "a", "label": "x", "start": 0, "end": 1, "score": "high"}], "score must be a number"),
    "no rows": (None, [], "is empty"),
    "errors": (None, [{"file": "a", "error": "cannot read a"}], "has only errors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    true, answered, words = BAD[case]
    good = {"file": "a", "file_name": "a", "label": "x", "start": 0, "end": 1}
    truth, answers = write(Path("t"), *(true or [good])), write(Path("p"), *answered or [good][: case != "no rows"])
    assert score.main(["--segments", str(truth), str(answers)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
