"""Messy data folders: symlink loops, special files, odd names, odd metadata; and what identifies a video."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import inference
import main
import readers
from readers import ReadError, digest, find_videos, natural_key, stamp, survey
from runs import texts_missing
from scan import read_records, scan_videos, write_records
from script import UserError
from VLoader import Sample, Splits, read_display_names, read_folder, read_metadata, read_splits


def clip(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.full((4, 3, 16, 16), shade, dtype=torch.uint8), path)
    return path


def frames(folder: Path, shade: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        Image.fromarray(np.full((16, 16, 3), shade + number, np.uint8)).save(folder / f"{number}.bmp")
    return folder


def train(data: Path, runs: Path, *flags: str) -> int:
    fixed = ["--data_dir", str(data), "--output_dir", str(runs), "--epochs", "1", "--num_workers", "0"]
    fixed += ["--freeze_visionbackbone", "True", "--image_size", "16", "--num_frames", "2", "--batch_size", "4"]
    return main.main([*fixed, *flags])


def refused(capsys, status: int) -> str:
    """The one-line error."""
    lines = [
        line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line
    ]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def names(videos: list[Path], folder: Path) -> list[str]:
    return [video.relative_to(folder).as_posix() for video in videos]


# -- what is found -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of two videos, in a folder whose name needs escaping."""
    for place, name in enumerate(("a/1.pt", "a/2.pt", "b/1.pt", "b/2.pt")):
        clip(tmp_path / "data" / "train" / name, 50 * place)
    return tmp_path / "data" / "train"


REAL = ["a/1.pt", "a/2.pt", "b/1.pt", "b/2.pt"]
CIRCLES = {
    "to the folder itself": lambda f: (f / "a" / "l1").symlink_to("."),
    "twice to the folder itself": lambda f: [(f / "a" / name).symlink_to(".") for name in ("l1", "l2")],
    "to the folder above": lambda f: (f / "a" / "up").symlink_to(".."),
    "to the data folder": lambda f: (f / "a" / "up").symlink_to(Path("..", "..")),
    "to the root": lambda f: (f / "a" / "up").symlink_to("/"),
    "to each other": lambda f: [
        (f / "a" / "x").symlink_to(Path("..", "b")),
        (f / "b" / "y").symlink_to(Path("..", "a")),
    ],
    "to itself": lambda f: (f / "a" / "x.mp4").symlink_to("x.mp4"),
    "to itself by another": lambda f: [(f / "a" / "x.mp4").symlink_to("y"), (f / "a" / "y").symlink_to("x.mp4")],
    "a class before what it leads to": lambda f: (f / "0").symlink_to("a"),
}


@pytest.mark.parametrize("case", CIRCLES)
def test_symlink_loops_end_and_list_no_video_twice(folder, case):
    CIRCLES[case](folder)
    videos, passed = survey(folder)
    assert names(videos, folder) == REAL and passed and "link" in passed[0]


def test_many_folders_that_link_to_each_other_are_read_once(folder):
    """There are 10! paths through them."""
    outside = folder.parent / "outside"
    for number in range(10):
        clip(outside / str(number) / "v.pt")
        for other in range(10):
            (outside / str(number) / f"to_{other}").symlink_to(Path("..", str(other)))
    (folder / "a" / "more").symlink_to(outside)
    assert len(find_videos(folder)) == len(REAL) + 10


def test_links_to_folders_elsewhere_are_followed(folder):
    clip(folder.parent / "outside" / "v.pt")
    frames(folder.parent / "disk" / "f")
    (folder / "c").symlink_to(folder.parent / "outside")
    (folder / "a" / "frames").symlink_to(folder.parent / "disk" / "f")
    videos, passed = survey(folder)
    assert names(videos, folder) == ["a/1.pt", "a/2.pt", "a/frames", "b/1.pt", "b/2.pt", "c/v.pt"] and not passed
    (folder.parent / "disk" / "f" / "up").symlink_to("..")  # a link in a frame folder
    (folder.parent / "disk" / "f" / "here").symlink_to(".")
    assert names(survey(folder.parent / "disk")[0], folder.parent) == ["disk/f"]


def test_folders_may_be_nested_deeply(folder):
    """A thousand nested folders are read; a path too long for the system is a one-line error."""
    code = (
        "import os, sys; os.chdir(sys.argv[1]); [(os.mkdir('d'), os.chdir('d')) for _ in range({})]; open('x.mp4', 'w')"
    )
    subprocess.run([sys.executable, "-c", code.format(1000), str(folder / "a")], check=True)
    assert find_videos(folder)[2:3] == [folder.joinpath("a", *["d"] * 1000, "x.mp4")]
    deep = "import os, sys; os.chdir(sys.argv[1]); [(os.mkdir('d' * 250), os.chdir('d' * 250)) for _ in range(20)]"
    subprocess.run([sys.executable, "-c", deep, str(folder / "b")], check=True)
    try:
        with pytest.raises(ReadError, match="File name too long"):
            find_videos(folder)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)  # deeper than pytest can clean up


def test_other_files_are_counted_and_named(folder, capsys):
    """Special files and system folders, also inside frame folders. Hidden files are ignored, and nothing hangs."""
    os.mkfifo(folder / "a" / "pipe.mp4")
    os.mkfifo(frames(folder / "a" / "f") / "9.png")
    (folder / "a" / "zero.avi").symlink_to("/dev/zero")
    for place in (
        "@eaDir/1.jpg",
        "a/@eaDir/v/1.jpg",
        "a/f/@eaDir/1.jpg",
        "__MACOSX/a/1.pt",
        "lost+found/1.pt",
        "$RECYCLE.BIN/1.pt",
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).touch()
    for place in ("a/Thumbs.db", "b/notes.txt", "b/cover.jpg"):
        (folder / place).touch()
    for place in (".DS_Store", "a/.DS_Store", "a/f/.DS_Store", "a/._1.pt", "metadata.csv"):
        (folder / place).touch()
    videos = [sample.path for sample in read_folder(folder)]
    assert names(videos, folder) == ["a/1.pt", "a/2.pt", "a/f", "b/1.pt", "b/2.pt"]
    out = capsys.readouterr().out
    assert f"ignored in {folder}: 12 entries that are not videos, for example {folder}" in out
    assert out.count("\n") == 1


def test_suffixes_may_be_upper_case(folder, tmp_path, capsys):
    (folder / "a" / "1.pt").rename(folder / "a" / "1.PT")
    shutil.copytree(frames(tmp_path / "f"), folder / "b" / "f")
    for image in (folder / "b" / "f").iterdir():
        image.rename(image.with_suffix(".BMP"))
    assert names(find_videos(folder), folder) == ["a/1.PT", "a/2.pt", "b/1.pt", "b/2.pt", "b/f"]
    assert train(folder.parent, tmp_path / "runs", "--run_name", "r") == 0


def test_a_folder_that_cannot_be_read_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def scandir(path):
        if not isinstance(path, int) and Path(path).name == "b":  # an integer if a folder is removed
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    error = refused(capsys, train(folder.parent, tmp_path / "runs"))
    assert error == f"error: cannot read {folder / 'b'}: Permission denied"


def test_half_a_character_is_not_text(folder, tmp_path, capsys):
    (folder / "metadata.jsonl").write_text('{"file_name": "a/0.pt", "caption": "\\ud800"}\n')
    assert "line 1: caption must be a string" in refused(capsys, train(folder.parent, tmp_path / "runs"))


ODD = ["①", "1²", "$", "line\nbreak", "\x1b[31mred\x07", "-c", "a b", "C:"]


def test_odd_names_train_and_answer(tmp_path, capsys):
    """Any class and file name works. None reaches the terminal unescaped, and an error is one line."""
    for place, name in enumerate(ODD):
        for number in range(2):
            clip(tmp_path / "data" / "train" / name / f"{name}{number}.pt", 20 * place + number)
    clip(tmp_path / "data" / "train" / "①" / os.fsdecode(b"\xff\xfe.pt"))
    clip(tmp_path / "data" / "train" / "①" / "$_$.pt")
    assert train(tmp_path / "data", tmp_path / "runs", "--run_name", "r") == 0
    output = tmp_path / "answers.jsonl"
    flags = ["--checkpoint", str(tmp_path / "runs" / "r"), "--video_dir", str(tmp_path / "data" / "train")]
    assert inference.main([*flags, "--output", str(output)]) == 0
    labels = {json.loads(line)["label"] for line in output.read_text(encoding="utf-8").split("\n") if line}
    assert labels <= {*ODD}
    capsys.readouterr()
    (tmp_path / "data" / "train" / "line\nbreak" / "x\x1b[2J.mp4").symlink_to("nowhere")
    error = refused(capsys, train(tmp_path / "data", tmp_path / "runs", "--run_name", "s"))
    assert "line\\nbreak/x\\x1b[2J.mp4: No such file or directory" in error


@given(st.lists(st.text(st.sampled_from("0129a²①/-"), max_size=6), max_size=6))
def test_natural_order_is_total_and_counts(parts):
    """It follows the numbers in the names, never fails, and only equal names tie."""
    ordered = sorted(parts, key=natural_key)
    assert sorted(reversed(parts), key=natural_key) == ordered
    numbers = [part for part in ordered if part.isascii() and part.isdigit()]
    assert [int(n) for n in numbers] == sorted(int(n) for n in numbers)


# -- what identifies a video -------------------------------------------------------------------------


def test_a_digest_depends_only_on_the_content(tmp_path):
    video, folder = clip(tmp_path / "v.pt"), frames(tmp_path / "f")
    before = digest(video), digest(folder)
    assert digest(Path(shutil.move(video, tmp_path / "w.pt"))) == before[0]
    (folder / ".DS_Store").touch()
    (folder / "notes.txt").touch()
    assert digest(Path(shutil.copytree(folder, tmp_path / "g"))) == before[1]
    images = sorted(folder.glob("*.bmp"))
    images[0].rename(folder / "9.bmp")  # another order
    assert digest(folder) != before[1]


def test_a_stamp_changes_with_any_image_and_any_write(tmp_path):
    folder = frames(tmp_path / "f")
    before = stamp(folder)
    assert stamp(folder) == before
    frames(folder, 100)  # same names and sizes; the time of the folder does not change
    assert stamp(folder) != before
    video = clip(tmp_path / "v.pt")
    before, info = stamp(video), video.stat()
    clip(video, 9)
    os.utime(video, ns=(info.st_atime_ns, info.st_mtime_ns))  # anybody can set a file's modification time
    assert video.stat().st_size == info.st_size and stamp(video) != before


@pytest.mark.parametrize("case", ["missing", "dangling image", "no images", "fifo", "loop"])
def test_a_video_that_cannot_be_read_has_no_digest(tmp_path, case):
    path = tmp_path / "v"
    if case == "dangling image":
        (frames(path) / "5.png").symlink_to("nowhere")
    elif case == "no images":
        path.mkdir()
    elif case == "fifo":
        os.mkfifo(path)
    elif case == "loop":
        path.symlink_to(path)
    with pytest.raises(ReadError, match=f"cannot read {path}"):
        digest(path)
    bad, good = scan_videos({path: 0}, 8, 0, 0, {})
    assert list(bad) == [path] and not good


def test_every_new_video_is_read_once_and_remembered(folder, tmp_path, monkeypatch):
    """By runs with and without the cache. Another folder of runs starts from scratch; copies keep their digests."""
    read: list[Path] = []
    original = readers.file_digest
    monkeypatch.setattr(readers, "file_digest", lambda file: read.append(file) or original(file))
    runs = tmp_path / "runs"
    assert train(folder.parent, runs, "--run_name", "cached") == 0 and len(read) == 4
    remembered = read_records(runs / ".videos.json")
    assert {*remembered} == {str(folder / name) for name in REAL}
    assert all(record["digest"] == digest(Path(path)) for path, record in remembered.items())
    read.clear()
    assert train(folder.parent, runs, "--run_name", "again") == 0 and not read
    assert train(folder.parent, runs, "--run_name", "pixels", "--cache_features", "False") == 0 and len(read) == 4
    read.clear()
    for flags in (["--run_name", "b"], ["--run_name", "c", "--cache_features", "False"]):
        assert train(folder.parent, runs, *flags) == 0 and not read
    clip(folder / "a" / "1.pt", 77)
    assert train(folder.parent, runs, "--run_name", "changed") == 0 and read == [folder / "a" / "1.pt"]


def test_records_are_merged_with_those_of_other_processes(tmp_path):
    file = tmp_path / "runs" / ".videos.json"
    first = {"/a": {"stamp": "0" * 32, "digest": "1" * 32, "decoded": ["two frames"]}}
    second = {os.fsdecode(b"/\xff"): {"stamp": "2" * 32, "digest": "3" * 32, "decoded": []}}
    write_records(file, first)
    write_records(file, second)
    assert read_records(file) == first | second


JUNK = [
    "",
    "no json",
    "[]",
    "3",
    "[" * 100_000,
    '{"/a": 3}',
    '{"/a": {"stamp": "x"}}',
    '{"/a": {"stamp": 1, "digest": 2, "decoded": 3}}',
    json.dumps({"/a": {"stamp": "0" * 32, "digest": "no digest", "decoded": []}}),
    json.dumps({"/a": {"stamp": "0" * 32, "digest": "1" * 32, "decoded": [[]]}}),
]


@pytest.mark.parametrize("content", JUNK, ids=range(len(JUNK)))
def test_junk_in_the_records_is_ignored(tmp_path, content):
    file = tmp_path / ".videos.json"
    file.write_text(content)
    assert read_records(file) == {}


def test_resume_takes_moved_videos_and_refuses_changed_ones(folder, tmp_path, capsys, monkeypatch):
    import signal

    import train_code

    original = train_code.train_one_epoch

    def stopped(model, loader, engine):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(model, loader, engine)

    with monkeypatch.context() as patch:
        patch.setattr(train_code, "train_one_epoch", stopped)
        for name in ("moved", "changed"):
            assert train(folder.parent, tmp_path / "runs", "--run_name", name) == 128 + signal.SIGTERM
    moved = Path(shutil.move(folder.parent, tmp_path / "elsewhere"))
    assert train(moved, tmp_path / "runs", "--run_name", "moved", "--resume", "True") == 0
    clip(moved / "train" / "b" / "2.pt", 33)
    capsys.readouterr()
    error = refused(capsys, train(moved, tmp_path / "runs", "--run_name", "changed", "--resume", "True"))
    assert "the content of a video has changed" in error


# -- metadata.jsonl, classes.json --------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_captions_may_contain_any_character(folder, ends, mark):
    captions = ["one\u2028two", "one\x85two", "one\u2029two", "one\x0b\x0c\x1ctwo"]
    rows = [json.dumps({"file_name": n, "caption": c}, ensure_ascii=False) for n, c in zip(REAL, captions, strict=True)]
    (folder / "metadata.jsonl").write_bytes((mark + ends.join(rows)).encode())
    assert [s.captions for s in read_folder(folder)] == [(caption,) for caption in captions]


BAD_ROWS = {
    "nested deeply": ("[" * 100_000, "not JSON"),
    "nested inside": ('{"file_name": "a/1.pt", "x": ' + "[" * 100_000, "not JSON"),
    "a long number": ('{"file_name": "a/1.pt", "x": ' + "1" * 5000 + "}", "not JSON"),
    "a long name": ('{"file_name": "' + "x" * 5000 + '"}', "File name too long"),
    "a long path": ('{"file_name": "' + "x/" * 5000 + '"}', "File name too long"),
    "a NUL": ('{"file_name": "a/1.pt\\u0000"}', "null byte"),
    "half a character": ('{"file_name": "\\ud800"}', "surrogates"),
    "a loop": ('{"file_name": "loop"}', "Too many levels"),
    "no name": ('{"file_name": {"a": 1}}', "expected"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_metadata_is_one_short_line_that_names_file_and_line(folder, tmp_path, capsys, case):
    text, cause = BAD_ROWS[case]
    (folder / "loop").symlink_to("loop")
    (folder / "metadata.jsonl").write_text('{"file_name": "a/2.pt"}\n' + text)
    with pytest.raises(UserError) as caught:
        read_metadata(folder)
    message = str(caught.value)
    assert f"{folder / 'metadata.jsonl'}, line 2: " in message and cause in message and len(message) < 600


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"a": 1}', "[]"])
def test_bad_display_names_are_one_line(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        read_display_names(tmp_path, ["a"])
    (tmp_path / "classes.json").write_text('\ufeff{"a": "A"}', encoding="utf-8")
    assert read_display_names(tmp_path, ["a"]) == {"a": "A"}


def test_misspelt_fields_are_mentioned_and_others_are_not(folder, capsys):
    rows = [{"file_name": "a/1.pt", "Label": "b", "score": 0.5}, {"file_name": "a/2.pt", "grup": "x", "text": "y"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_folder(folder)
    notes = capsys.readouterr().out.splitlines()
    assert [note.split(": ", 2)[2] for note in notes] == [
        "the field 'Label' is not read; did you mean 'label'?",
        "the field 'grup' is not read; did you mean 'group'?",
    ]


def test_videos_without_a_text_are_counted_once_each():
    videos = [Sample(Path(str(k)), "a", text=text) for k, text in enumerate(("red", "", None, None))]
    asked = [replace(videos[3], question=question) for question in ("what?", "where?")]  # one video
    splits = Splits([*videos, *asked], videos[:2], videos[2:3], ["a"], "")
    assert texts_missing(splits) == "2 of 4 train videos, 1 of 1 test videos"


@pytest.mark.parametrize("name", ["absolute", "../train/a/1.pt", "linked/1.pt", "../../elsewhere/1.pt"])
def test_metadata_may_call_a_video_by_another_name(folder, monkeypatch, name):
    """It is one sample, not two that could end in train and val."""
    (folder.parent.parent / "elsewhere").symlink_to(folder / "a")
    (folder / "linked").symlink_to("a")
    name = str(folder / "a" / "1.pt") if name == "absolute" else name
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "red"}) + "\n")
    monkeypatch.chdir(folder.parent)
    for path in (folder, Path("train")):
        samples = read_folder(path)
        assert len({os.path.realpath(s.path) for s in samples}) == len(samples) == 4
        (sample,) = (s for s in samples if s.text == "red")
        assert os.path.samefile(sample.path, folder / "a" / "1.pt") and sample.label == "a"


def test_the_same_file_in_two_splits_is_left_to_the_doctor(folder):
    (folder.parent / "test" / "a").mkdir(parents=True)
    (folder.parent / "test" / "a" / "1.pt").symlink_to(folder / "a" / "1.pt")
    assert len(read_splits(folder.parent).test) == 1
