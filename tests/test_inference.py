"""Many videos: an output file that can be resumed, error rows among answers, and timelines of long videos."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import counting_frames, write_video

import answers
import inference
import main
import score
import VLoader
from checkpoint import WEIGHTS, load_run, read_tensors, save_tensors
from config import ROOT
from readers import open_video
from script import UserError, gc_disabled
from VLoader import Sample, split_into_windows


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data_dir", str(dataset), "--output_dir", str(folder), "--epochs", "1", "--num_workers", "0"]
    assert main.main([*flags, "--freeze_visionbackbone", "True", "--run_name", "r"]) == 0
    return folder / "r"


@pytest.fixture
def videos(tmp_path) -> Path:
    """24 videos, the third of them unreadable."""
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
    assert "1 of 24 could not be read" in err and "23 clips in" in out


def test_an_unfinished_output_is_resumed(run, videos, tmp_path, capsys, monkeypatch):
    """Finished answers are kept and not computed again, errors are retried, and a torn last line is dropped."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer(run, videos, whole)
    lines = whole.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:10]) + lines[10][:30])
    torch.save(torch.zeros(8, 3, 24, 24, dtype=torch.uint8), videos / "2.pt")  # repaired
    asked: list[str] = []
    original = inference.Predictor.predict_many

    def predict_many(self, samples):
        asked.extend(s.path.name for s in samples)
        return original(self, samples)

    monkeypatch.setattr(inference.Predictor, "predict_many", predict_many)
    capsys.readouterr()
    assert answer(run, videos, output) == 0
    assert "already has 9 of 24 answers" in capsys.readouterr().out
    assert asked == ["2.pt", *(f"{i}.pt" for i in range(10, 24))]
    found = {Path(r["file"]).name: r for r in rows(output)}
    assert len(found) == len(rows(output)) == 24
    for row in rows(whole):
        name = Path(row["file"]).name
        assert name == "2.pt" or found[name]["top_k"] == row["top_k"]
    before = output.read_bytes()
    capsys.readouterr()
    assert answer(run, videos, output) == 0 and output.read_bytes() == before
    out = capsys.readouterr().out
    assert "already has 24 of 24 answers" in out and "wrote" not in out and "other videos" not in out
    assert answer(run, videos / "3.pt", output) == 0 and output.read_bytes() == before
    assert "also has 23 answers about other videos, which are kept" in capsys.readouterr().out


def test_answers_of_another_run_or_with_other_options_are_not_mixed(run, videos, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    answer(run, videos, output)
    before = output.read_bytes()
    assert answer(run, videos, output, "--top_k", "1") == 2
    assert "holds answers of another run or with other options" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.write_text("a note of mine\n")
    assert answer(run, videos, output) == 2
    assert "line 1 is not an answer" in capsys.readouterr().err
    assert output.read_text() == "a note of mine\n"
    output.write_text("a note without an end of line")
    assert answer(run, videos, output) == 2
    assert output.read_text() == "a note without an end of line"


def test_odd_captions_are_printed_and_read_again(tmp_path):
    row = {"file": "a.mp4", "caption": "one\u2028two\x85", "run": "r 1"}
    output = tmp_path / "out.jsonl"
    output.write_text(answers.as_line(row) + '{"fi', encoding="utf-8")
    assert list(answers.read_answers(output, "r 1", ".").values()) == [row]
    assert output.read_text(encoding="utf-8") == answers.as_line(row)
    assert inference.answer_line("a.mp4", {"caption": ""}).strip() == "a.mp4"


def test_a_killed_inference_ends_with_the_same_output(run, videos, tmp_path):
    for index in range(24, 200):
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
    assert len(rows(output)) == 200 and {r["file"] for r in rows(output)} == set(expected)
    assert all(r.get("label") == expected[r["file"]].get("label") for r in rows(output))


def test_a_timeline_has_an_answer_for_every_window(run, tmp_path, capsys):
    """Frames 0 to 29 and 30 to 59 differ. Each window gets the answer of a video with only those frames."""
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
        windows = split_into_windows(Sample(path), seconds)
        parts = [open_video(path).part(sample.segment) for sample, _, _ in windows]
        assert [i for first, count in parts for i in range(first, first + count)] == list(range(47))
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
    assert "--timeline needs a video file" in rows(output)[0]["error"]


def test_a_timeline_keeps_the_order_of_the_videos(run, videos, tmp_path):
    folder, output = tmp_path / "mixed", tmp_path / "out.jsonl"
    folder.mkdir()
    for name in ("a", "c"):
        write_video(folder / f"{name}.mkv", counting_frames(20))
    shutil.copy(videos / "0.pt", folder / "b.pt")
    assert answer(run, folder, output, "--timeline", "1") == 1
    assert [(Path(r["file"]).name, "error" in r) for r in rows(output)] == [
        ("a.mkv", False),
        ("a.mkv", False),
        ("b.pt", True),
        ("c.mkv", False),
        ("c.mkv", False),
    ]


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
    with pytest.raises(UserError, match=r"2\.pt"):
        inference.Predictor.from_checkpoint(run).predict(videos / "2.pt")


def test_the_garbage_collector_is_off_only_while_a_model_is_built(run, videos, capsys):
    assert inference.main(["--checkpoint", str(run), "--video_dir", str(videos / "0.pt")]) == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(UserError), gc_disabled():
        assert not gc.isenabled()
        raise UserError("stop")
    assert gc.isenabled()
    gc.disable()  # as a program that uses Predictor might
    try:
        with gc_disabled():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_leave_runs_exit_handlers_and_writes_all_output():
    program = "import script, atexit; atexit.register(print, 'closed'); print('written'); script.leave(3)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("written\nclosed\n", 3), done.stderr


# -- the file of answers ----------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith((".lock", ".tmp"))]


def test_a_file_in_use_is_refused(run, videos, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert answer(run, videos, output) == 1
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:5]) + lines[5][:20])  # as left by a process that is writing it
    (tmp_path / "link.jsonl").symlink_to(output)
    code = "import sys; from answers import *; lock = FileLock(Path(sys.argv[1]), 'x'); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".out.jsonl.lock")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    before = output.read_bytes()
    for name in ("out.jsonl", "link.jsonl"):
        capsys.readouterr()
        assert answer(run, videos, tmp_path / name) == 2
        error = capsys.readouterr().err
        assert f"in use by process {holder.pid}" in error and error.count("\n") == 1
    assert output.read_bytes() == before
    holder.kill()  # the system releases its lock
    holder.communicate()
    assert answer(run, videos, tmp_path / "link.jsonl") == 1
    assert len({r["file"] for r in rows(output)}) == len(rows(output)) == 24
    assert not leftovers(tmp_path) and (tmp_path / "link.jsonl").is_symlink()


def test_outputs_that_are_not_regular_files(run, videos, tmp_path, capsys):
    video = videos / "0.pt"
    os.mkfifo(tmp_path / "pipe")
    cases = {"/dev/null": 0, "/dev/full": 2, tmp_path: 2, tmp_path / "pipe": 2, tmp_path / "no" / "out.jsonl": 2}
    for output, status in cases.items():
        capsys.readouterr()
        assert answer(run, video, Path(output)) == status, output
        error = capsys.readouterr().err
        assert error.count("\n") == (status > 0) and (not status or str(output) in error)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    while answer(run, video, tmp_path / "pipe") == 2:  # until a reader opens it
        time.sleep(0.1)
    reader.join(timeout=60)
    assert json.loads(read[0])["file"] == str(video)
    assert not leftovers(tmp_path) and not list(Path("/dev").glob("*.lock"))


def test_rows_and_text_on_one_redirected_output(run, videos, capfd):
    """Standard output is a file here, and neither overwrites the other."""
    assert answer(run, videos / "0.pt", Path("/dev/stdout")) == 0
    found = capfd.readouterr().out.splitlines()
    assert len([line for line in found if line.startswith('{"file"')]) == 1
    assert sum("1 video in" in line for line in found) == 1 and found[-1] == "wrote /dev/stdout"


def test_a_full_disk_leaves_complete_rows(run, videos, tmp_path, capsys, monkeypatch):
    output, write, room = tmp_path / "out.jsonl", os.write, [2500]

    def limited(file: int, data: bytes) -> int:
        """Like a disk that fills up: the first bytes are written, the rest is not."""
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: room[0]])
        room[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(answers.os, "write", limited)
        assert answer(run, videos, output, "--num_workers", "0") == 2
    error = capsys.readouterr().err
    assert f"cannot write {output}: No space left on device" in error
    assert 2 <= len(rows(output)) < 24 and output.read_bytes().endswith(b"\n") and not leftovers(tmp_path)
    assert answer(run, videos, output) == 1
    assert [Path(r["file"]).name for r in rows(output) if "error" not in r] == [f"{i}.pt" for i in range(24) if i != 2]


def test_the_same_videos_by_other_names(run, videos, tmp_path, monkeypatch):
    (videos / "2.pt").unlink()
    (videos / "deeper").mkdir()
    torch.save(torch.zeros(8, 3, 24, 24, dtype=torch.uint8), videos / "deeper" / "30.pt")
    (videos / "again.pt").symlink_to(videos / "0.pt")  # treated as another video
    (tmp_path / "link").symlink_to(videos)
    monkeypatch.chdir(tmp_path)
    assert answer(run, Path("videos"), tmp_path / "out.jsonl") == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    found = rows(tmp_path / "out.jsonl")
    assert len(found) == 25 and all(r["path"] == str(tmp_path / r["file"]) for r in found)
    assert found[0]["file"] == "videos/0.pt"
    for folder, name in (
        (videos, "../videos"),
        (tmp_path, "link"),
        (videos, "."),
        (tmp_path, "link/../videos"),
        (tmp_path, "link/deeper"),
        (tmp_path, "link/0.pt"),
    ):
        monkeypatch.chdir(folder)
        assert answer(run, Path(name), tmp_path / "out.jsonl") == 0
        assert (tmp_path / "out.jsonl").read_bytes() == before, name


def test_duplicate_answers_and_answers_without_a_path(run, videos, tmp_path, monkeypatch, capsys):
    (videos / "2.pt").unlink()
    output = tmp_path / "out.jsonl"
    monkeypatch.chdir(tmp_path)
    assert answer(run, Path("videos"), output) == 0
    expected = rows(output)
    old = [{k: v for k, v in row.items() if k != "path"} for row in expected[:10]]
    output.write_text("".join(map(answers.as_line, [*old, *expected[5:20], *expected[12:15]])))
    capsys.readouterr()
    assert answer(run, Path("videos"), output) == 0
    assert "already has 20 of 23 answers" in capsys.readouterr().out
    assert [r["file"] for r in rows(output)] == [r["file"] for r in expected]


@pytest.mark.parametrize(
    "text",
    [
        '{"file": "a.mp4", "label": "x"}',
        '{"file": "a.mp4", "lab',
        "[1]\n",
        '{"run": "r 1"}\n',
        '{"run": "r 1", "path": []}\n',
        '{"run": "r 1", "file": 3}\n',
        "[" * 100_000,
        '"text"\n',
        '{"file": "a.mp4", "path": "/a.mp4", "run": "other"}\n{"file": "b',
    ],
    ids=lambda t: t[:30],
)
def test_a_file_of_another_program_is_not_changed(tmp_path, text):
    output = tmp_path / "out.jsonl"
    output.write_text(text)
    with pytest.raises(UserError, match="choose another file"):
        answers.read_answers(output, "r 1", ".")
    assert output.read_text() == text


# -- what is said of answers ------------------------------------------------------------------------


def test_right_means_the_same_label():
    swapped = {"a": "b", "b": "a", "c": "running"}
    cases = [
        ("a", "a", True),
        ("a", "b", False),
        ("b", "a", False),
        ("running", "c", True),
        ("running", "a", False),
        ("c", "c", True),
        ("camera_1", "a", None),
        (None, "a", None),
    ]
    for truth, label, expected in cases:
        assert inference.is_right({"label": label}, Sample(Path("x"), label=truth), swapped, None) is expected


def test_names_cannot_control_the_terminal(run, videos, tmp_path, capsys):
    name = "two\nlines\x1b[31m\udcff.pt"
    folder = tmp_path / "odd\n\x1b[1m"
    folder.mkdir()
    shutil.copy(videos / "0.pt", folder / name)
    (folder / "bad\r.pt").write_bytes(b"broken")
    capsys.readouterr()
    assert answer(run, folder, tmp_path / "out\n.jsonl") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and "two\\nlines\\x1b[31m" in out
    assert not {"\x1b", "\r"} & {*out, *err} and err.count("\n") == 1
    assert rows(tmp_path / "out\n.jsonl")[1]["file"] == str(folder / name)
    assert inference.answer_line("a.mp4", {"caption": "a\nb\x1b]0;"}) == "a.mp4  a\\nb\\x1b]0;"


def test_tiny_weights_say_once_that_they_do_not_understand_real_videos(run, dataset, videos, tmp_path, capsys):
    without = Path(shutil.copytree(dataset, tmp_path / "data"))
    (without / "lexicon.json").unlink()
    for script, flags, times in (
        (inference, ["--video_dir", str(videos / "0.pt")], 1),
        (inference, ["--video_dir", str(dataset / "test")], 0),
        (inference, ["--video_dir", str(videos / "0.pt"), "--export", str(tmp_path / "both")], 1),
        (inference, ["--export", str(tmp_path / "export")], 1),
        (score, ["--data_dir", str(without), "--output_dir", str(tmp_path / "scores"), "--num_workers", "0"], 1),
    ):
        capsys.readouterr()
        assert script.main(["--checkpoint", str(run), *flags]) == 0
        assert capsys.readouterr().out.count("do not understand real videos") == times, flags


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_give_no_answer(run, videos, tmp_path, capsys, value):
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    tensors, header = read_tensors(damaged / WEIGHTS)
    save_tensors(tensors | {"head.weight": torch.full_like(tensors["head.weight"], value)}, header, damaged / WEIGHTS)
    output = tmp_path / "out"
    for script, *flags in (
        (inference, "--video_dir", str(videos)),
        (inference, "--export", str(output)),
        (score, "--output_dir", str(output)),
    ):
        assert script.main(["--checkpoint", str(damaged), *flags]) == 2
        assert "the weights are damaged: head.weight" in capsys.readouterr().err


def test_scores_that_are_not_finite_are_no_answer(run, videos):
    model, config, metadata = load_run(run)
    with torch.no_grad():
        model.head.weight.fill_(1e38)
    with pytest.raises(UserError, match="weights are damaged"):
        inference.Predictor(model, config, metadata).predict(videos / "0.pt")


def test_any_error_of_a_timeline_is_a_row(run, tmp_path, monkeypatch):
    def split_into_windows(sample, seconds, stride):
        raise UserError("too many windows")

    monkeypatch.setattr(VLoader, "split_into_windows", split_into_windows)
    write_video(tmp_path / "v.mp4", counting_frames(10))
    output = tmp_path / "out.jsonl"
    assert answer(run, tmp_path / "v.mp4", output, "--timeline", "1") == 1
    assert [(r["error"], r["path"]) for r in rows(output)] == [("too many windows", str(tmp_path / "v.mp4"))]
