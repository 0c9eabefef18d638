"""Segments of long videos: reading, caching, checking and converting them."""

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import counting_frames, write_video
from PIL import Image

import convert_dataset
import doctor
import inference
import main
import metrics
import readers
import score
from answers import list_jobs
from extras.segments import BACKGROUND, add_background, refuse_overlaps
from feature_cache import compute_missing, open_store, read_features, video_ids
from readers import ReadError, Segment, open_video
from runs import prepare
from script import UserError
from transforms import Preprocessing, view_indices
from VLoader import ClipDataset, Sample, Splits, fingerprint_data, hold_out, read_folder, read_splits

AS_IS = Preprocessing(32, None, "bilinear", 1 / 255, (0.0,) * 3, (1.0,) * 3)


def write_rows(folder: Path, *rows: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def refused(capsys, status: int) -> str:
    (line,) = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert status == 2
    return line


def decoded_between(path: Path, start: float, end: float) -> list[np.ndarray]:
    """The frames with start <= time < end, by decoding the file from the start and looking at every frame's time."""
    container: Any = av.open(str(path))
    with container:
        frames = [(frame.pts * frame.time_base, frame) for frame in container.decode(container.streams.best("video"))]
    first = min(time for time, _ in frames)
    return [
        np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90)
        for time, f in sorted(frames, key=lambda pair: pair[0])
        if start <= float(time - first) < end
    ]


REAL = ["arm_wrestling.mp4", "bikes.mp4", "flipping_a_pancake.mkv", "no_duration.webm", "fire2.mp4", "nasa_13013.mp4"]


@pytest.mark.parametrize("name", REAL)
def test_a_segment_of_a_real_video_has_the_frames_that_decoding_finds(real_data, name):
    path = real_data / "clips" / name
    length = open_video(path).seconds()[-1]
    for start, end in ((0, 0.31), (0.331 * length, 0.513 * length), (length - 0.2013, length + 5)):
        wanted = decoded_between(path, start, end)
        reader = open_video(path)
        first, count = reader.part(Segment(start, end))
        assert count == len(wanted) > 0
        some = np.linspace(0, count - 1, min(count, 6)).astype(int)
        frames = reader.frames(first + some)
        assert all(np.array_equal(frames[i].permute(1, 2, 0), wanted[n]) for i, n in enumerate(some))


def test_a_file_with_unreliable_times_counts_frames(real_data):
    """apply_eye_makeup.avi: packets have no presentation times, the decoder's order is right."""
    reader = open_video(real_data / "clips" / "apply_eye_makeup.avi")
    rate = float(reader.stream.average_rate)
    assert reader.part(Segment(1.0, 2.0)) == (int(np.ceil(rate)), int(np.ceil(2 * rate)) - int(np.ceil(rate)))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    """40 frames, 10 a second, with B-frames and a keyframe every 12."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", counting_frames(40, 32, 32), g="12", bf="2")


def clips_of(dataset: ClipDataset) -> list[torch.Tensor]:
    return [dataset[0, i]["video"] for i in range(len(dataset))]


@pytest.mark.parametrize("views", [(1, 1), (3, 1)])
def test_clips_are_those_of_the_segment_cut_out(long_video, tmp_path, views):
    """In training and evaluation, with one view and several, whatever was read before."""
    spans = [(0.0, 1.2), (2.05, 3.0), (1.2, 2.05), (3.5, 60.0)]
    frames = open_video(long_video).frames(range(40))
    parts = [(0, 12), (21, 30), (12, 21), (35, 40)]
    for number, (a, b) in enumerate(parts):
        torch.save(frames[a:b], tmp_path / f"{number}.pt")
    segments = [Sample(long_video, segment=Segment(*span)) for span in spans]
    files = [Sample(tmp_path / f"{number}.pt") for number in range(4)]
    for train in (False, True):
        one, two = (ClipDataset(s, AS_IS, 4, -2, [], train=train, views=views) for s in (segments, files))
        assert all(torch.equal(a, b) for a, b in zip(clips_of(one), clips_of(two), strict=True))


def test_an_index_is_read_once_and_never_stale(tmp_path, monkeypatch):
    calls = []
    index = readers.VideoFile._index
    monkeypatch.setattr(readers.VideoFile, "_index", lambda self: calls.append(self.path) or index(self))
    path = write_video(tmp_path / "v.mp4", counting_frames(30))
    assert [len(open_video(path)) for _ in range(3)] == [30] * 3 and len(calls) == 1
    write_video(path, counting_frames(20))
    assert len(open_video(path)) == 20 and len(calls) == 2

    # those of the oldest files are forgotten when there are too many frames, or files
    monkeypatch.setattr(readers, "INDEXED_FRAMES", 50)
    others = [tmp_path / f"{number}.mp4" for number in range(3)]
    for other in others:
        other.write_bytes(path.read_bytes())
        open_video(other)
    assert [key[0] for key in readers.INDEXES] == others[1:]
    monkeypatch.setattr(readers, "INDEXED_FILES", 1)
    open_video(others[0])
    assert [key[0] for key in readers.INDEXES] == others[:1]
    monkeypatch.setattr(readers, "INDEXED_FRAMES", 5)
    assert len(open_video(others[1])) == 20  # a file with more frames than that can still be read


def test_frame_folders_and_tensors_need_a_frame_rate(tmp_path):
    frames = counting_frames(20, 32, 32)
    torch.save(torch.from_numpy(frames).permute(0, 3, 1, 2), tmp_path / "a.pt")
    (tmp_path / "b").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "b" / f"{number}.png")
    for name in ("a.pt", "b"):
        row = {"file_name": name, "start": 1, "end": 3}
        (sample,) = read_folder(write_rows(tmp_path / f"with_{name}", row | {"file_name": f"../{name}", "fps": 4}))
        (clip,) = clips_of(ClipDataset([sample], AS_IS, 8, 0, []))
        assert torch.equal(clip, torch.from_numpy(frames[4:12]).permute(0, 3, 1, 2))
        with pytest.raises(ReadError, match=r'add "fps" \(frames per second\) to its row in metadata.jsonl'):
            open_video(tmp_path / name).part(Segment(1, 3))


BAD_ROWS = {
    "start without end": ({"start": 1}, "start and end must be seconds with 0 <= start < end, not 1 and None"),
    "no length": ({"start": 2, "end": 2}, "0 <= start < end, not 2 and 2"),
    "negative": ({"start": -1, "end": 2}, "not -1 and 2"),
    "text": ({"start": "0:10", "end": "0:20"}, "not '0:10' and '0:20'"),
    "true": ({"start": False, "end": True}, "not False and True"),
    "infinite": ({"start": 0, "end": float("inf")}, "not 0 and inf"),
    "fps": ({"start": 0, "end": 1, "fps": 0}, "fps must be a number above 0, not 0"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_times_are_one_line(tmp_path, case):
    extra, words = BAD_ROWS[case]
    with pytest.raises(UserError) as error:
        read_folder(write_rows(tmp_path / "d", {"file_name": "a.mp4"} | extra))
    assert words in str(error.value) and "line 1" in str(error.value) and "\n" not in str(error.value)


def test_rows_of_one_file_are_segments_or_one_whole(tmp_path, long_video):
    row = {"file_name": str(long_video), "label": "a"}
    times = [{"start": 0, "end": 1}, {"start": 1, "end": 2.5}, {"start": 0.5, "end": 1}]
    samples = read_folder(write_rows(tmp_path / "a", *(row | t for t in times)))
    assert [s.segment for s in samples] == [Segment(0, 1), Segment(1, 2.5), Segment(0.5, 1)]
    with pytest.raises(UserError, match=r"line 2: .* appears twice$"):
        read_folder(write_rows(tmp_path / "b", row | times[0], row | {"start": 0.0, "end": 1.0}))
    with pytest.raises(
        UserError, match=r"line 2: .* with start 0 and end 1 appears twice; write one row with all of its"
    ):
        read_folder(write_rows(tmp_path / "b", row | times[0], row | {"start": 0.0, "end": 1.0, "label": "b"}))
    for pair in ([row, row | times[0]], [row | times[0], row]):
        with pytest.raises(UserError, match=r"line 2: .* mixes rows with and without start and end"):
            read_folder(write_rows(tmp_path / "c", *pair))


def test_whole_videos_keep_their_identity_and_segments_have_their_own(long_video, tmp_path):
    whole = Sample(long_video)
    assert whole.identity == readers.digest(long_video)
    parts = [Segment(0.0, 1.0), Segment(0.0, 1.5), Segment(1.0, 1.5), Segment(0.0, 1.0, 10.0)]
    ids = [Sample(long_video, segment=s).identity for s in parts]
    assert len({whole.identity, *ids}) == 5
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(long_video.read_bytes())
    assert Sample(copy, segment=parts[0]).identity == ids[0]
    assert video_ids([Sample(long_video, segment=s) for s in parts]).shape == (4, 16)


def test_windows_read_the_text_of_the_first_row(long_video):
    rows = [Sample(long_video, "a", text=text, segment=Segment(i, i + 1)) for i, text in enumerate("xyz")]
    jobs = list_jobs(rows, str(long_video.parent), 2)
    assert [(job.times["start"], job.sample.text, job.sample.label) for job in jobs] == [(0, "x", None), (2, "x", None)]


# -- the share held out for val ---------------------------------------------------------------------


def samples_of(files: dict[str, str]) -> list[Sample]:
    """Segments of a second each; a letter for the class of each."""
    return [
        Sample(Path("d", name), label, segment=Segment(i, i + 1))
        for name, labels in files.items()
        for i, label in enumerate(labels)
    ]


def test_segments_of_a_video_stay_together():
    files = {f"{i}.mp4": "aabbc" for i in range(20)} | {"only_c.mp4": "c", "only_d.mp4": "dd"}
    train, val = hold_out(samples_of(files), Path("d"))
    names = [{s.path.name for s in part} for part in (train, val)]
    assert not names[0] & names[1] and len(names[1]) == 2
    assert {s.label for s in train} == set("abcd") and {s.label for s in val} == set("abc")
    assert "only_d.mp4" in names[0]
    assert {s.path.name for s in hold_out(samples_of(files)[::-1], Path("d"))[1]} == names[1]


def test_a_class_in_one_video_keeps_it():
    """Each video has a class of its own, so none may go."""
    with pytest.raises(UserError, match="too few videos to hold any out"):
        hold_out(samples_of({"x.mp4": "ab", "y.mp4": "ac"}), Path("d"))
    train, val = hold_out(samples_of({"x.mp4": "ab", "y.mp4": "a"}), Path("d"))
    assert {s.path.name for s in train} == {"x.mp4"} and {s.path.name for s in val} == {"y.mp4"}


# -- runs -------------------------------------------------------------------------------------------


def make_data(folder: Path) -> Path:
    """Three training videos and a test video of 6 s: bright in the seconds 1 and 2, dark in the seconds 4 and 5."""
    for name, split in (("a", "train"), ("b", "train"), ("c", "train"), ("d", "test")):
        frames = np.full((60, 32, 32, 3), 128, np.uint8)
        frames[10:30] += np.uint8(100 + ord(name) % 4)
        frames[40:60] -= np.uint8(100 + ord(name) % 4)
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", frames)
        file = folder / split / "metadata.jsonl"
        file.parent.mkdir(exist_ok=True)
        with file.open("a") as rows:
            for label, start in (("bright", 1), ("bright", 2), ("dark", 4), ("dark", 5)):
                row = {"file_name": f"../{name}.mp4", "label": label, "start": start, "end": start + 1}
                rows.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("segments") / "data")


FIXED = ["--num_workers", "0", "--image_size", "32", "--num_frames", "2", "--freeze_visionbackbone", "True"]


def train(data: Path, runs: Path, *flags: str) -> int:
    return main.main(["--data_dir", str(data), "--output_dir", str(runs), "--epochs", "30", *FIXED, *flags])


def test_a_run_learns_segments_scores_them_and_answers_them(data, tmp_path, capsys):
    assert train(data, tmp_path, "--run_name", "r", "--learning_rate", "0.01") == 0
    out = capsys.readouterr().out
    assert "feature cache: 0 of 16 videos" in out and "accuracy 100.0 %" in out
    rows = [json.loads(line) for line in (tmp_path / "r" / "predictions_test.jsonl").read_text().splitlines()]
    assert [(r["start"], r["end"], r["label"]) for r in rows] == [
        (1, 2, "bright"),
        (2, 3, "bright"),
        (4, 5, "dark"),
        (5, 6, "dark"),
    ]
    assert metrics.main(["--predictions", str(tmp_path / "r" / "predictions_test.jsonl")]) == 0
    assert '"count": 4' in capsys.readouterr().out

    # several views come from pixels, and stay within the segment
    argv = ["--checkpoint", str(tmp_path / "r"), "--num_workers", "0"]
    assert score.main([*argv, "--test_clips", "2"]) == 0
    assert "accuracy 100.0 %" in capsys.readouterr().out

    # inference answers the segments of a metadata.jsonl; a timeline splits each video once, whatever its segments
    output = tmp_path / "out.jsonl"
    argv += ["--video_dir", str(data / "test"), "--output", str(output)]
    assert inference.main(argv) == 0
    assert "4 of 4 right" in capsys.readouterr().out
    before = output.read_bytes()
    assert inference.main(argv) == 0 and output.read_bytes() == before
    assert inference.main([*argv[:-1], str(tmp_path / "line.jsonl"), "--timeline", "2"]) == 0
    windows = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [(w["start"], w["end"]) for w in windows] == [(0, 2), (2, 4), (4, 6)]
    assert all("right" not in w for w in windows)


def test_cached_features_are_those_of_each_segment(data, tmp_path):
    from config import parse

    argv = ["--data_dir", str(data), "--output_dir", str(tmp_path), *FIXED]
    run = prepare(parse(argv, "main")[0], tmp_path)
    store = open_store(run.model, run.config, run.accelerator)
    assert compute_missing(store, run.model, run.splits, run.config, run.accelerator) == {}
    features = read_features(store, run.splits, run.config)
    for name, samples in (("train", run.splits.train), ("test", run.splits.test)):
        for index, sample in enumerate(samples):
            reader = open_video(sample.path)
            first = int(sample.segment.start * 10)
            frames = reader.frames(first + view_indices(10, 2, run.config.frame_stride, 1))
            pixels = run.model.vision_encoder.preprocessing.pixels(frames)[None]
            alone = run.model.vision_encoder.features(pixels, run.config.token_grid)[0]
            assert torch.allclose(alone.half(), features[name][index], atol=1e-2)
    again = compute_missing(store, run.model, run.splits, run.config, run.accelerator)
    assert again == {} and len(store.shards) == 1


def test_the_fingerprint_of_data_sees_a_moved_segment(data):
    splits = read_splits(data)
    before = fingerprint_data(splits, data)
    splits.train[0] = Sample(splits.train[0].path, splits.train[0].label, segment=Segment(1.5, 2))
    assert fingerprint_data(splits, data)[:32] != before[:32]


def test_a_segment_that_cannot_be_read_is_named_and_skipped_alone(data, tmp_path, capsys):
    copy = make_data(tmp_path / "data")
    with (copy / "train" / "metadata.jsonl").open("a") as rows:
        rows.write(json.dumps({"file_name": "../a.mp4", "label": "dark", "start": 8, "end": 9}) + "\n")
    for flags in ([], ["--cache_features", "False"]):
        runs = tmp_path / f"runs{len(flags)}"
        error = refused(capsys, train(copy, runs, *flags))
        assert "a.mp4: no frame between 8 and 9 s; its last one is at 5.90 s -- fix or remove" in error
        assert train(copy, runs, "--skip_unreadable", "True", "--epochs", "1", *flags) == 0
        assert "skipped 1 unreadable video" in capsys.readouterr().out
        record = json.loads(next(runs.glob("*/metrics.json")).read_text())
        assert len(record["skipped"]) == 1


def test_the_doctor_names_segments_that_do_not_fit(tmp_path, capsys):
    copy = make_data(tmp_path / "data")
    argv = ["--data_dir", str(copy), "--output_dir", str(tmp_path), *FIXED]
    doctor.main(argv)
    out = capsys.readouterr().out
    assert "ok    segments end within their video" in out and "ok    segments are as long as a clip" in out
    assert "ok    val and test share no video with train" in out and "ok    no video is in two classes" in out
    with (copy / "train" / "metadata.jsonl").open("a") as rows:
        for name, label, start, end in (
            ("a", "dark", 5.5, 9),
            ("b", "dark", 0, 0.1),
            ("b", "dark", 50, 60),
            ("copy", "bright", 4.5, 5.5),
        ):
            row = {"file_name": f"../{name}.mp4", "label": label, "start": start, "end": end}
            rows.write(json.dumps(row) + "\n")
    (copy / "copy.mp4").write_bytes((copy / "c.mp4").read_bytes())
    with (copy / "test" / "metadata.jsonl").open("a") as rows:
        rows.write(json.dumps({"file_name": "../a.mp4", "label": "dark", "start": 4.2, "end": 4.6}) + "\n")
    assert doctor.main(argv) == 1
    out = capsys.readouterr().out
    assert "FAIL  segments end within their video" in out and "a.mp4 (5.5 to 9 s); the last frame is at 5.90 s" in out
    assert "not 2 segments" in out  # also the one that lies wholly behind the end
    assert "FAIL  segments are as long as a clip" in out and "b.mp4 (0 to 0.1 s) has 1 frame" in out
    assert "FAIL  no video is in two classes" in out and "c.mp4 (4 to 5 s)" in out
    assert "FAIL  val and test share no video with train" in out and "a.mp4 (4.2 to 4.6 s)" in out


# -- the background ---------------------------------------------------------------------------------


def splits_of(**samples: list[Sample]) -> Splits:
    filled = {"train": [], "val": [], "test": []} | samples
    return Splits(**filled, class_names=["a", "b"], note="")


def some_segments(seed: int, files: str = "xyz") -> list[Sample]:
    """Up to 20 segments without overlaps in each of some files, with gaps between most of them."""
    rng = np.random.default_rng(seed)
    samples = []
    for name in files:
        edges = np.sort(rng.uniform(0, 300, 2 * rng.integers(2, 20))).round(2)
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if end > start:
                segment = Segment(float(start), float(end))
                samples.append(Sample(Path(f"{name}.mp4"), "ab"[rng.integers(2)], ("c",), "t", segment=segment))
    return samples


@pytest.mark.parametrize("seed", range(8))
def test_background_never_overlaps_a_segment(seed):
    """Of any split, or another clip of the background, also if the splits share videos."""
    splits = splits_of(train=some_segments(seed), test=some_segments(seed + 100, "xw"))
    # the test segments of x overlap its training segments, which is allowed with the same label only
    more = add_background(splits, 0.3)
    everything = more.train + more.test
    added = [s for s in everything if s.label == BACKGROUND]
    assert more.class_names == ["a", "b", "background"] and added
    assert all(s.captions == () and s.text is None and s.digest is None for s in added)
    for clip in added:
        for other in everything:
            if other is not clip and other.path == clip.path:
                assert other.segment.end <= clip.segment.start or clip.segment.end <= other.segment.start
    for name in ("train", "test"):
        before, after = getattr(splits, name), getattr(more, name)
        lengths = {round(s.segment.end - s.segment.start, 6) for s in before}
        clips = after[len(before) :]
        assert after[: len(before)] == before and len(clips) <= round(0.3 * len(before))
        assert {round(s.segment.end - s.segment.start, 6) for s in clips} <= lengths
    assert add_background(splits, 0.3) == more  # the same in every run


def test_as_many_background_clips_as_asked_for():
    samples = [Sample(Path("v.mp4"), "a", segment=Segment(100 * i + 50, 100 * i + 51)) for i in range(20)]
    more = add_background(splits_of(train=samples), 0.3)
    assert len(more.train) == 26
    starts = [s.segment.start for s in more.train[20:]]
    assert len(set(starts)) == 6 and starts == sorted(starts)
    assert add_background(splits_of(train=samples), 0) == splits_of(train=samples)


def test_gaps_that_are_too_few_or_absent_are_said(capsys):
    close = [Sample(Path("v.mp4"), "a", segment=Segment(3.0 * i + 2, 3.0 * i + 4)) for i in range(10)]
    more = add_background(splits_of(train=close), 2)  # one gap of 2 s, nine of 1 s
    assert len(more.train) == 11 and "background of train: 1 of 20 clips" in capsys.readouterr().out
    full = [Sample(Path("v.mp4"), "a", segment=Segment(i, i + 1.0)) for i in range(4)]
    with pytest.raises(UserError, match="no gap before or between segments"):
        add_background(splits_of(train=full), 0.5)
    with pytest.raises(UserError, match="--background needs segments"):
        add_background(splits_of(train=[Sample(Path("v.mp4"), "a")]), 0.5)


def test_overlapping_segments_of_two_labels_are_one_line(data, tmp_path, capsys):
    copy = make_data(tmp_path / "data")
    with (copy / "train" / "metadata.jsonl").open("a") as rows:
        rows.write(json.dumps({"file_name": "../a.mp4", "label": "bright", "start": 4.5, "end": 5.5}) + "\n")
    error = refused(capsys, train(copy, tmp_path / "runs"))
    assert "a.mp4: dark (4 to 5 s) and bright (4.5 to 5.5 s) overlap; a segment can have only one label" in error


def test_times_may_be_rounded(tmp_path):
    """0.1 + 0.2 is above 0.3, but no frame lies between them."""
    parts = [Sample(tmp_path, "a", segment=Segment(0, 0.1 + 0.2)), Sample(tmp_path, "b", segment=Segment(0.3, 1))]
    refuse_overlaps(parts)
    with pytest.raises(UserError, match=r"a \(0 to 0.3 s\) and b \(0.299 to 1 s\) overlap"):
        refuse_overlaps([parts[0], Sample(tmp_path, "b", segment=Segment(0.299, 1))])


def test_scoring_without_a_background_class_refuses_one_and_keeps_what_training_measured(
    data, tmp_path, capsys, monkeypatch
):
    assert train(data, tmp_path, "--run_name", "r", "--epochs", "1") == 0
    argv = ["--checkpoint", str(tmp_path / "r"), "--num_workers", "0"]
    assert score.main([*argv, "--background", "1"]) == 2
    assert f"--background 1: {tmp_path / 'r'} was trained without it and has no such class" in capsys.readouterr().err

    # the same folder, named in two ways
    before = json.loads((tmp_path / "r" / "metrics.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert score.main(["--checkpoint", "r", "--num_workers", "0", "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text()).keys() == before.keys()


def test_a_run_learns_the_background_and_finds_segments_again(data, tmp_path, capsys):
    """Seconds 0 and 3 are grey; a timeline gives the bright and the dark seconds as segments, and score.py agrees."""
    argv = ["--background", "0.5", "--run_name", "r", "--learning_rate", "0.01", "--epochs", "60"]
    assert train(data, tmp_path, *argv) == 0
    assert "accuracy 100.0 %" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "r" / "predictions_test.jsonl").read_text().splitlines()]
    assert [r["truth"] for r in rows] == ["bright", "bright", "dark", "dark", "background", "background"]
    assert score.main(["--checkpoint", str(tmp_path / "r"), "--num_workers", "0"]) == 0
    assert "on 6 videos" in capsys.readouterr().out

    output = tmp_path / "line.jsonl"
    argv = ["--checkpoint", str(tmp_path / "r"), "--video_dir", str(data / "d.mp4"), "--output", str(output)]
    argv += ["--timeline", "1", "--timeline_stride", "0.5"]
    assert inference.main(argv) == 0
    assert "segment: d.mp4" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    windows, segments = ([r for r in rows if r["segment"] is merged] for merged in (False, True))
    assert [w["start"] for w in windows] == [0.5 * i for i in range(11)] and windows[-1]["end"] == 6
    assert [r["label"] for r in segments] == ["bright", "dark"] and rows[-2:] == segments
    for row, (start, end) in zip(segments, ((1, 3), (4, 6)), strict=True):
        assert abs(row["start"] - start) <= 0.5 and abs(row["end"] - end) <= 0.5

    # a finished file stays as it is, and an unfinished one ends the same
    before = output.read_bytes()
    assert inference.main(argv) == 0 and output.read_bytes() == before
    output.write_bytes(b"".join(before.splitlines(keepends=True)[:5]))
    assert inference.main(argv) == 0 and output.read_bytes() == before
    capsys.readouterr()
    assert score.main(["--segments", str(data / "test" / "metadata.jsonl"), str(output)]) == 0
    scores = json.loads(capsys.readouterr().out)
    # two true seconds in a row are one prediction
    assert scores["F1@0.1"] == pytest.approx(2 / 3) and scores["false_alarms_per_hour"] == 0
    assert inference.main([*argv[:-1], "2"]) == 2
    assert "--timeline_stride must not be above --timeline" in capsys.readouterr().err


# -- csv --------------------------------------------------------------------------------------------


def test_a_table_with_times_becomes_segments(tmp_path, capsys, long_video):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(long_video.read_bytes())
    torch.save(torch.zeros(40, 3, 16, 16, dtype=torch.uint8), videos / "b.pt")
    (tmp_path / "train.csv").write_text(
        "path,label,start,end,fps\na.mp4,jump,0,1.5,\na.mp4,run,1.5,3,\na.mp4,run,3,2,\na.mp4,run,,,\n"
        "a.mp4,run,x,2,\na.mp4,jump,1.5,3,\nb.pt,jump,0,2,10\nb.pt,jump,2,3,\na.mp4,run,30,40,\n"
    )
    argv = ["--format", "list", "--annotations", str(tmp_path / "train.csv"), "--videos", str(videos)]
    assert convert_dataset.main([*argv, "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()]
    found = [(Path(r["file_name"]).name, r["label"], r["start"], r["end"], r.get("fps")) for r in rows]
    assert found == [("a.mp4", "jump", 0, 1.5, None), ("b.pt", "jump", 0, 2, 10)]
    report = json.loads((tmp_path / "out" / "train" / "conversion.json").read_text())
    assert len(report["refused"]) == 5 and len(report["unreadable"]) == 2
    assert (
        "a.mp4: several labels (run, jump); a video can have only one without --multi_label True" in report["refused"]
    )
    assert "a.mp4: no start and end, which other rows of this video have" in report["refused"]
    assert any("0 <= start < end" in text and "not x, 2" in text for text in report["refused"])
    assert [s.segment for s in read_folder(tmp_path / "out" / "train")] == [Segment(0, 1.5), Segment(0, 2, 10)]
