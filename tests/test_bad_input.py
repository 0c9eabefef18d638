"""User mistakes: one line `error: ...`, exit status 2, no traceback, nothing written."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, counting_frames, in_full, read_clip, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import create_dummy
import dummy_data
import figures
import inference
import main
import metrics
import preview
import train_code
from config import ROOT
from readers import open_video
from script import UNSAFE, UserError
from VLoader import read_folder, read_metadata


def refused(capsys, status: int) -> str:
    """The one-line error."""
    err = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line
    ]
    assert status == 2 and len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


def train(data: Path, runs: Path, *flags: str, script=main) -> int:
    fixed = ["--data_dir", str(data), "--output_dir", str(runs), "--epochs", "1", "--num_workers", "0"]
    return script.main([*fixed, "--freeze_visionbackbone", "True", "--cache_features", "False", *flags])


def clip_file(path: Path, frames: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.randint(0, 256, (frames, 3, 16, 16), dtype=torch.uint8), path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of random clips."""
    for name in ("a", "b"):
        for index in range(3):
            clip_file(tmp_path / "data" / "train" / name / f"{index}.pt")
    return tmp_path / "data"


def bad_image_size(folder: Path) -> None:
    (folder / "frames").mkdir()
    for index, size in enumerate([(16, 16), (16, 16), (20, 16)]):
        Image.new("RGB", size).save(folder / "frames" / f"{index}.png")


def truncated(folder: Path) -> None:
    whole = write_video(folder / "cut.mp4", counting_frames(30)).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])


BAD_VIDEOS = {
    "zero bytes": (lambda f: (f / "v.webm").touch(), "the file is empty"),
    "truncated mp4": (truncated, "cut.mp4"),
    "text named mp4": (lambda f: (f / "v.mp4").write_text("text"), "Invalid data"),
    "image of another size": (bad_image_size, "2.png is 20x16 pixels"),
    "rank 3": (lambda f: torch.save(torch.zeros(4, 16, 16), f / "v.pt"), "[T, 3, H, W], not [4, 16, 16]"),
    "int64": (lambda f: torch.save(torch.zeros(4, 3, 16, 16, dtype=torch.int64), f / "v.pt"), "not torch.int64"),
    "object": (lambda f: torch.save({"a": {1, 2}}, f / "v.pt"), "v.pt"),
    "NaN": (lambda f: torch.save(torch.full((4, 3, 16, 16), float("nan")), f / "v.pt"), "[0, 1]"),
    "above 1": (lambda f: torch.save(torch.full((4, 3, 16, 16), 255.0), f / "v.pt"), "[0, 1]"),
    "bad metadata line": (lambda f: (f.parent / "metadata.jsonl").write_text("\n{]\n"), "line 2: not JSON"),
    "missing file": (
        lambda f: (f.parent / "metadata.jsonl").write_text('{"file_name": "a/9.pt"}'),
        "names 1 missing file",
    ),
    "empty caption": (
        lambda f: (f.parent / "metadata.jsonl").write_text('{"file_name": "a/0.pt", "caption": [" "]}'),
        "none of them empty",
    ),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_videos_and_lists(data, tmp_path, capsys, case):
    make, message = BAD_VIDEOS[case]
    make(data / "train" / "a")
    assert message in refused(capsys, train(data, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_an_output_dir_inside_a_file(data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "cannot create the folder" in refused(capsys, train(data, tmp_path / "file" / "runs"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--mixed_precision", "fp16"]])
def test_an_unavailable_device_or_precision(data, tmp_path, capsys, flags):
    assert re.search("GPU|--device cuda is not available", refused(capsys, train(data, tmp_path / "runs", *flags)))
    assert not (tmp_path / "runs").exists()


def test_out_of_memory_says_which_flags_lower_it(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_code, "loss_sum", full)
    error = refused(capsys, train(data, tmp_path / "runs"))
    assert all(
        flag in error for flag in ("--batch_size", "--num_frames", "--image_size", "--gradient_checkpointing True")
    )


def test_a_checkpoint_of_another_task(data, tmp_path, capsys):
    assert train(data, tmp_path, "--run_name", "r") == 0
    capsys.readouterr()
    flags = ["--checkpoint", str(tmp_path / "r"), "--video_dir", str(data), "--use_vlm", "True", "--captioning", "True"]
    assert "--captioning True (it has False)" in refused(capsys, inference.main(flags))


def test_odd_but_sound_files_are_read(data, tmp_path, capsys):
    """One frame, one pixel, a leading dash, a name that is not UTF-8: training and inference work."""
    folder = data / "train" / "a"
    clip_file(folder / "one_frame.pt", frames=1)
    torch.save(torch.zeros(5, 3, 1, 1, dtype=torch.uint8), folder / "-one-pixel.pt")
    write_video(folder / "plain.mp4", counting_frames(6)).rename(
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.mp4"))
    )
    assert train(data, tmp_path, "--run_name", "r") == 0
    output = tmp_path / "out.jsonl"
    assert inference.main(["--checkpoint", str(tmp_path / "r"), "--video_dir", str(data), "--output", str(output)]) == 0
    assert len([json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]) == 9
    assert (read_clip(folder / "-one-pixel.pt", 8) == 0).all()


# -- names that steer a terminal or a picture ---------------------------------------------------------

ODD_NAMES = {
    "$_$": "$\\frac{$",
    "esc\x1b]0;title\x07": "red \x1b[31m",
    "中文\u202e": "中文\nline",
    "same": "中文\nline",
}


def test_odd_names_are_drawn_and_printed_harmlessly(tmp_path, capsys, recwarn):
    """matplotlib reads `$` as math and warns about letters missing in its font; a terminal obeys \\x1b."""
    for name in ODD_NAMES:
        for index in range(3):
            clip_file(tmp_path / "data" / "train" / name / f"\x1b[2J{index}.pt")
    (tmp_path / "data" / "classes.json").write_text(json.dumps(ODD_NAMES))
    (tmp_path / "data" / "train" / "$_$" / "\x1b[2Junreadable.pt").write_text("x")
    flags = ["--run_name", "r", "--image_size", "16", "--num_frames", "2", "--skip_unreadable", "True"]
    with in_full():
        assert train(tmp_path / "data", tmp_path, *flags) == 0
    pictures = ("confusion", "classes", "reliability", "worst", "curves")
    assert all((tmp_path / "r" / f"{name}.png").is_file() for name in pictures)
    assert not [w for w in recwarn if "lyph" in str(w.message)]
    out, err = capsys.readouterr()
    assert not UNSAFE.search(out.replace("\n", "") + err.replace("\n", "").replace("\r", ""))


def test_classes_that_are_displayed_alike_keep_a_bar_each(tmp_path):
    bars = {name: (share, [share, share]) for name, share in (("a", 0.0), ("b", 1.0), ("c", 1.0))}
    images = []
    for display in ({}, dict.fromkeys(bars, "x")):
        with in_full():
            path = figures.plot_bars(bars, "t", tmp_path / "bars.png", display_names=display)
        images.append((np.asarray(Image.open(path).convert("RGB")) == (0x33, 0x63, 0x8D)).all(-1).any(1).sum())
    assert images[0] == images[1] > 0  # rows of pixels covered by a bar


# -- places that cannot be written ---------------------------------------------------------------------


def full_disk(monkeypatch) -> None:
    """From here on, nothing can be flushed to disk."""

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)


@pytest.mark.parametrize("place", ["a full disk", "beneath a file", "read-only"])
def test_a_preview_that_cannot_be_written_leaves_nothing(data, tmp_path, capsys, monkeypatch, place):
    runs = tmp_path / "runs"
    if place == "a full disk":
        full_disk(monkeypatch)
    elif place == "beneath a file":
        runs.write_text("x")
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        runs.mkdir(mode=0o500)
    assert "cannot" in refused(capsys, train(data, runs, "--count", "2", script=preview))
    assert not runs.is_dir() or not [*runs.iterdir()]


@pytest.mark.parametrize("script, saver", [(dummy_data, "save_video"), (create_dummy, "save_frames")])
def test_a_dataset_is_written_completely_or_not_at_all(dataset, tmp_path, capsys, monkeypatch, script, saver):
    """The disk is full at the third video: one line, nothing left behind, and the next attempt starts from scratch."""
    save, calls = getattr(dummy_data, saver), []

    def until_full(*args):
        calls.append(save(*args))
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.pt")

    flags = ["--classes", "2", *FEW]
    argv = [*(flags if script is dummy_data else ["--data_dir", str(dataset)]), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(dummy_data, saver, until_full)
    assert "x.pt: No space left on device" in refused(capsys, script.main(argv))
    assert not [*tmp_path.glob("out/*")]
    monkeypatch.undo()
    assert script.main(argv) == 0
    assert len(read_folder(tmp_path / "out" / "train" if script is dummy_data else tmp_path / "out")) >= 4


@pytest.mark.parametrize("script", [dummy_data, create_dummy])
@pytest.mark.parametrize("output", ["file/below", "a\0b"])
def test_outputs_that_cannot_be_made(dataset, tmp_path, capsys, script, output):
    (tmp_path / "file").write_text("x")
    flags = ["--data_dir", str(dataset)] if script is create_dummy else []
    assert "cannot create the folder" in refused(capsys, script.main([*flags, "--output", str(tmp_path / output)]))


@pytest.mark.parametrize(
    "flags",
    [
        ["--size", "9" * 30],
        ["--size", "9" * 5000],
        ["--seed", "9" * 30],
        ["--frames", "10001"],
        ["--classes", "\x1b[2J"],
    ],
)
def test_impossibly_large_numbers(tmp_path, capsys, flags):
    error = refused(capsys, dummy_data.main([*flags, "--output", str(tmp_path / "d")]))
    assert flags[0] in error and not UNSAFE.search(error) and not (tmp_path / "d").exists()


def test_a_dataset_larger_than_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(dummy_data, "draw_video", full)
    assert "out of memory" in refused(capsys, dummy_data.main(["--output", str(tmp_path / "d")]))
    assert not [*tmp_path.glob("d/*")]


def test_frames_never_replace_a_folder_of_videos(data, capsys):
    """A split with its metadata.jsonl looks like an output of create_dummy, except for its videos."""
    (data / "train").rename(data / "test")
    for folder in (data / "test", data / "test" / "a"):
        (folder / "metadata.jsonl").touch()
        before = sorted(data.rglob("*"))
        status = create_dummy.main(["--data_dir", str(data), "--output", str(folder)])
        assert "was not made by this script" in refused(capsys, status) and sorted(data.rglob("*")) == before


def test_frames_stay_in_their_folder_and_apart(tmp_path):
    """Labels with path separators, and two videos with the same name."""
    rows = [{"file_name": f"{folder}/v.pt", "label": "../../up"} for folder in ("a", "b")]
    for row in rows:
        clip_file(tmp_path / "data" / "test" / row["file_name"])
    (tmp_path / "data/test/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--data_dir", str(tmp_path / "data"), "--output", str(tmp_path / "deep" / "out")]
    assert create_dummy.main(argv) == 0 and create_dummy.main(argv) == 0
    assert [s.path.name for s in read_folder(tmp_path / "deep" / "out")] == [".._.._up_v", ".._.._up_v_2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "deep"]


def test_frames_of_classes_that_alternate_in_one_folder(tmp_path):
    rows = [{"file_name": f"{number}.pt", "label": "ab"[number % 2]} for number in range(6)]
    for row in rows:
        clip_file(tmp_path / "data" / "test" / row["file_name"])
    (tmp_path / "data/test/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--data_dir", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--per_class", "2"]
    assert create_dummy.main(argv) == 0
    assert [s.path.name for s in read_folder(tmp_path / "out")] == ["a_0", "a_2", "b_1", "b_3"]


def test_a_log_for_tensorboard_on_a_full_disk_is_one_line(tmp_path):
    """In a separate process with a file size limit: its background threads must not print tracebacks either."""
    code = (
        "import pathlib, resource, signal, sys; from script import script; from train_code import tensorboard_row\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "row = {'epoch': 1, 'step': 1, 'train_loss': 1.0}\n"
        "sys.exit(script(lambda _: tensorboard_row(row, pathlib.Path(sys.argv[1])))())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: cannot write to {tmp_path / 'log'}: File too large\n")


# -- scores of files -------------------------------------------------------------------------------------

LABEL_ROW = {"file": "a", "truth": "x", "label": "x", "score": 0.5, "top_k": [{"label": "x"}, {"label": "y"}]}


def label_rows(*changes: dict) -> bytes:
    return "\n".join(json.dumps(LABEL_ROW | {"file": str(i)} | change) for i, change in enumerate(changes)).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "neither a JSON object"),
        (b'{"file": ' * 100_000, "neither a JSON object"),
        (b"\xff\xfe\x00", "cannot read"),
        (b'{"file": ["a"]}', "has no truth for 'file'"),
        (b'["a"]', "neither a JSON object"),
        (b'{"file": "a"}\n{"file": 3}', "neither a JSON object"),
        (b'{"file": "a"}\n{"file": "a"}', "several rows for 'a'"),
        (b'{"a\\u001b[2J": 1}', "has no truth for"),
        (label_rows({"top_k": []}), "a row needs `score`"),
        (label_rows({"top_k": "x"}), "a row needs `score`"),
        (label_rows({"top_k": [{"label": 1}]}), "a row needs `score`"),
        (label_rows({}, {"top_k": [{"label": "x"}]}), "as many labels as the others"),
        (label_rows({"score": "x"}), "a row needs `score`"),
        (label_rows({"score": float("nan")}), "a row needs `score`"),
        (label_rows({"score": -1}), "a row needs `score`"),
        (label_rows({"label": {"a" * 9999: 1}}), "neither a string nor a row"),
    ],
)
def test_predictions_that_cannot_be_scored(tmp_path, capsys, content, message):
    (tmp_path / "p.jsonl").write_bytes(content)
    error = refused(capsys, metrics.main(["--predictions", str(tmp_path / "p.jsonl")]))
    assert message in error and not UNSAFE.search(error) and len(error) < 1000


def test_flags_of_metrics_are_one_line(capsys):
    assert "--predictions" in refused(capsys, metrics.main([]))
    assert "cannot read" in refused(capsys, metrics.main(["--predictions", "a\0b"]))


def test_files_with_byte_order_marks_are_scored_and_compared(tmp_path, capsys):
    """A run's rows have probabilities; compared with plain labels, fewer scores are left."""
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + label_rows({}, {"truth": "y"}))
    (tmp_path / "q.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"0": "x", "1": "y"}).encode())
    argv = ["--predictions", str(tmp_path / "p.jsonl"), "--compare", str(tmp_path / "q.json")]
    assert metrics.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 0.5 and found["compare"]["accuracy"]["difference"] == 0.5


# -- no unplanned exception -------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
)
ROWS = st.dictionaries(
    st.sampled_from(
        [
            "file_name",
            "caption",
            "text",
            "label",
            "attributes",
            "start",
            "end",
            "fps",
            "question",
            "answer",
            "kind",
            "x",
        ]
    ),
    JSON,
    max_size=5,
)


@given(st.lists(ROWS.map(json.dumps) | st.text(max_size=20), max_size=4))
def test_any_metadata_is_read_or_refused_naming_the_line(tmp_path, lines):
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        rows = read_metadata(tmp_path)
        assert all(isinstance(row["file_name"], str) for found in rows.values() for row in found)
        read_folder(tmp_path)
    except UserError as error:
        assert "metadata.jsonl" in str(error) or "no videos" in str(error)


TENSORS = st.builds(
    lambda shape, dtype, scale: (torch.rand(shape) * scale).to(dtype),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([0.0, 1.0, 1.5, float("inf"), -1.0]),
)


@given(TENSORS | st.binary(max_size=50) | JSON)
def test_any_pt_file_is_read_or_refused(tmp_path, content):
    path = tmp_path / "v.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    try:
        reader = open_video(path)
        assert reader.frames([0]).dtype == torch.uint8 and reader.video.shape[1] == 3
    except UserError as error:
        assert "v.pt" in str(error)
