"""Many videos in: a file of answers that can be gone on with, errors beside answers, timelines of long videos."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import counting_frames, write_video

import inference
import main
from config import ROOT
from script import UserError, collector_off
from VLoader import Sample, cut, open_video


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data_dir", str(dataset), "--output_dir", str(folder), "--epochs", "1", "--num_workers", "0"]
    assert main.main([*flags, "--freeze_visionbackbone", "True", "--run_name", "r"]) == 0
    return folder / "r"


@pytest.fixture
def videos(tmp_path) -> Path:
    """24 readable videos, the third of them replaced by one that is not."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(24):
        torch.save(torch.randint(0, 256, (8, 3, 24, 24 + index), dtype=torch.uint8), folder / f"{index}.pt")
    (folder / "2.pt").write_bytes(b"broken")
    return folder


def answer(run: Path, videos: Path, output: Path, *flags: str) -> int:
    argv = ["--checkpoint", str(run), "--video_dir", str(videos), "--output", str(output), "--num_workers", "1", *flags]
    return inference.main(argv)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_videos_get_an_error_row_in_place(run, videos, tmp_path, capsys, workers):
    output = tmp_path / "out.jsonl"
    assert answer(run, videos, output, "--num_workers", workers) == 1
    found = rows(output)
    assert [Path(r["file"]).name for r in found] == [f"{i}.pt" for i in range(24)]
    assert ["error" in r for r in found] == [i == 2 for i in range(24)]
    assert "cannot read" in found[2]["error"] and "label" not in found[2]
    out, err = capsys.readouterr()
    assert "1 of 24 could not be read" in err and "24 answers in" in out


def test_a_begun_file_is_gone_on_with(run, videos, tmp_path, capsys, monkeypatch):
    """Done answers stay as they are and are not computed again; errors are tried again; a torn line is dropped."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer(run, videos, whole)
    lines = whole.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:10]) + lines[10][:30])
    torch.save(torch.zeros(8, 3, 24, 24, dtype=torch.uint8), videos / "2.pt")  # mended
    asked: list[str] = []
    original = inference.Predictor.predict_many

    def predict_many(self, samples):
        asked.extend(s.path.name for s in samples)
        return original(self, samples)

    monkeypatch.setattr(inference.Predictor, "predict_many", predict_many)
    capsys.readouterr()
    assert answer(run, videos, output) == 0
    assert "has 9 of the 24 answers already" in capsys.readouterr().out
    assert asked == ["2.pt", *(f"{i}.pt" for i in range(10, 24))]
    found = {Path(r["file"]).name: r for r in rows(output)}
    assert len(found) == len(rows(output)) == 24
    for row in rows(whole):
        name = Path(row["file"]).name
        assert name == "2.pt" or found[name]["top_k"] == row["top_k"]
    before = output.read_bytes()
    assert answer(run, videos, output) == 0 and output.read_bytes() == before


def test_answers_of_another_run_or_with_other_options_are_not_mixed(run, videos, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    answer(run, videos, output)
    before = output.read_bytes()
    assert answer(run, videos, output, "--top_k", "1") == 2
    assert "holds answers of another run or with other options" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.write_text("a note of mine\n")
    assert answer(run, videos, output) == 2
    assert "line 1 is no answer of this program" in capsys.readouterr().err
    assert output.read_text() == "a note of mine\n"
    output.write_text("a note without an end of line")
    assert answer(run, videos, output) == 2
    assert output.read_text() == "a note without an end of line"


def test_odd_captions_are_printed_and_read_again(tmp_path):
    row = {"file": "a.mp4", "caption": "one\u2028two\x85", "run": "r 1"}
    output = tmp_path / "out.jsonl"
    output.write_text(inference.as_line(row) + '{"fi', encoding="utf-8")
    assert list(inference.begun(output, "r 1").values()) == [row]
    assert output.read_text(encoding="utf-8") == inference.as_line(row)
    assert inference.answer_line({"file": "a.mp4", "caption": ""}, 8).strip() == "a.mp4"


def test_a_killed_inference_ends_as_if_it_had_not_been(run, videos, tmp_path):
    for index in range(24, 400):
        os.link(videos / "0.pt", videos / f"{index}.pt")
    output = tmp_path / "out.jsonl"
    argv = ["--checkpoint", str(run), "--video_dir", str(videos), "--output", str(output), "--num_workers", "1"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "inference.py"), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and (not output.is_file() or output.read_bytes().count(b"\n") < 40):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = output.read_bytes().count(b"\n")
    assert begun >= 40
    assert inference.main(argv) == 1  # 2.pt
    answer(run, videos, tmp_path / "whole.jsonl")
    expected = {r["file"]: r for r in rows(tmp_path / "whole.jsonl")}
    assert len(rows(output)) == 400 and {r["file"] for r in rows(output)} == set(expected)
    assert all(r.get("label") == expected[r["file"]].get("label") for r in rows(output))


def test_a_timeline_answers_for_every_window(run, tmp_path, capsys):
    """Frames 0 to 29 and 30 to 59 show two things; each window is answered as a video of those frames alone."""
    bright, dark = np.full((30, 32, 48, 3), 250, np.uint8), counting_frames(30)
    write_video(tmp_path / "long.mkv", np.concatenate([bright, dark]))
    output = tmp_path / "out.jsonl"
    argv = ["--checkpoint", str(run), "--video_dir", str(tmp_path / "long.mkv"), "--output", str(output)]
    assert inference.main([*argv, "--timeline", "3"]) == 0
    found = rows(output)
    assert [(r["start"], r["end"]) for r in found] == [(0.0, 3.0), (3.0, 6.0)]
    assert "0.0-3.0 s" in capsys.readouterr().out
    predictor = inference.Predictor.from_checkpoint(run)
    reader_frames = open_video(tmp_path / "long.mkv").frames(np.arange(60))
    for row, part in zip(found, (reader_frames[:30], reader_frames[30:]), strict=True):
        torch.save(part, tmp_path / "part.pt")
        alone = predictor.predict(tmp_path / "part.pt")
        assert row["label"] == alone["label"] and row["score"] == pytest.approx(alone["score"], abs=1e-3)
    before = output.read_bytes()
    assert inference.main([*argv, "--timeline", "3"]) == 0 and output.read_bytes() == before


def test_windows_cover_every_frame_once(tmp_path):
    path = write_video(tmp_path / "v.mp4", counting_frames(47))  # 10 frames a second
    for seconds in (0.7, 1.0, 2.5, 100.0):
        windows = cut(Sample(path), seconds)
        spans = [sample.span for sample, _, _ in windows]
        assert [i for first, last in spans for i in range(first, last + 1)] == list(range(47))
        assert windows[0][1] == 0 and windows[-1][2] == pytest.approx(4.7)
        assert all(end == pytest.approx(start) for (_, _, end), (_, start, _) in pairwise(windows))


def test_a_timeline_of_something_without_times_is_an_error_row(run, videos, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert (
        inference.main(
            ["--checkpoint", str(run), "--video_dir", str(videos / "0.pt"), "--output", str(output), "--timeline", "2"]
        )
        == 1
    )
    assert "a timeline needs a video file" in rows(output)[0]["error"]


def test_captions_of_a_timeline(dataset, tmp_path):
    flags = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--epochs", "1", "--num_workers", "0"]
    job = [
        "--use_vlm",
        "True",
        "--captioning",
        "True",
        "--freeze_visionbackbone",
        "True",
        "--freeze_llmbackbone",
        "True",
    ]
    assert main.main([*flags, *job, "--run_name", "c"]) == 0
    write_video(tmp_path / "v.mp4", counting_frames(40))
    output = tmp_path / "out.jsonl"
    argv = ["--checkpoint", str(tmp_path / "c"), "--video_dir", str(tmp_path / "v.mp4"), "--output", str(output)]
    assert inference.main([*argv, "--timeline", "1.5"]) == 0
    assert [(r["start"], r["end"], isinstance(r["caption"], str)) for r in rows(output)] == [
        (0, 1.5, True),
        (1.5, 3.0, True),
        (3.0, 4.0, True),
    ]
    assert inference.main([*argv[:4], "--test_clips", "3"]) == 2


def test_predict_raises_for_an_unreadable_video(run, videos):
    from script import UserError

    with pytest.raises(UserError, match=r"2\.pt"):
        inference.Predictor.from_checkpoint(run).predict(videos / "2.pt")


def test_the_collector_rests_only_while_a_model_is_built(run, videos, capsys):
    assert inference.main(["--checkpoint", str(run), "--video_dir", str(videos / "0.pt")]) == 0
    assert gc.isenabled()
    with pytest.raises(UserError), collector_off():
        assert not gc.isenabled()
        raise UserError
    assert gc.isenabled()
    gc.disable()  # as a program that uses Predictor may have done
    try:
        with collector_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
