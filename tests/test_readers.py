"""Every reader gives the same clip; nothing unreadable is replaced."""

import gc
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import counting_frames, read_clip, write_video
from PIL import Image

import dummy_data
import VLoader
from script import UserError
from transforms import Preprocessing
from VLoader import (
    ClipDataset,
    Sample,
    VideoFile,
    build_loader,
    find_videos,
    hold_out,
    natural_key,
    open_video,
    read_folder,
    read_splits,
    upright,
)


def full_decode(path: Path) -> np.ndarray:
    """Every frame in the decoder's order, the slow way: uint8 [T, C, H, W]."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return torch.stack([upright(f) for f in container.decode(stream)]).permute(0, 3, 1, 2).numpy()


def all_frames(path: Path) -> np.ndarray:
    reader = open_video(path)
    return reader.frames(np.arange(len(reader))).numpy()


def test_readers_agree(tmp_path):
    video, _ = dummy_data.draw_class(3, 1, 12, 64, np.random.default_rng(0))
    paths = [dummy_data.save_video(video[0], tmp_path / name) for name in ("v.pt", "v", "v.mp4")]
    tensor, folder, file = (read_clip(path, 8).numpy().astype(int) for path in paths)
    assert (tensor == folder).all()
    assert np.abs(tensor - file).mean() < 4  # lossy, but the same frames in the same channel order
    assert np.abs(tensor - file[::-1]).mean() > 2 * np.abs(tensor - file).mean()


@pytest.mark.parametrize("kind", ["pt", "float", "png", "jpg", "mp4", "avi", "gif"])
def test_pure_red_stays_red(tmp_path, kind):
    red = np.zeros((6, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    path = tmp_path / f"v.{kind}"
    if kind in ("pt", "float"):
        path = tmp_path / "v.pt"
        tensor = torch.from_numpy(red).permute(0, 3, 1, 2)
        torch.save(tensor if kind == "pt" else tensor.float() / 255, path)
    elif kind in ("png", "jpg"):
        path = tmp_path / "frames"
        path.mkdir()
        for index, frame in enumerate(red):
            Image.fromarray(frame).save(path / f"{index}.{kind}")
    elif kind == "gif":
        Image.fromarray(red[0]).save(path, save_all=True, append_images=[Image.fromarray(f) for f in red[1:]])
    else:
        write_video(path, red, codec="libx264" if kind == "mp4" else "mpeg4")
    clip = read_clip(path, 4).float().mean(dim=(0, 2, 3))
    assert clip[0] > 245 and clip[1] < 12 and clip[2] < 12


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("b_frames.mp4", "libx264", {"g": "12", "bf": "3"}),
        ("long_gop.mkv", "libx264", {"g": "250"}),
        ("mpeg4.avi", "mpeg4", {"g": "8"}),
        ("b_frames.avi", "mpeg4", {"g": "8", "bf": "2"}),
        ("vp9.webm", "libvpx-vp9", {"g": "10"}),
    ],
)
def test_any_frames_equal_a_full_decode(tmp_path, name, codec, options):
    path = write_video(tmp_path / name, counting_frames(60), codec, **options)
    reference = full_decode(path)
    reader = open_video(path)
    assert len(reader) == len(reference) == 60
    for indices in ([0], [59], [30, 31], [5, 17, 40, 41, 59], list(range(60)), [7, 7, 58, 58]):
        assert (reader.frames(np.array(indices)).numpy() == reference[indices]).all(), indices


def test_a_clip_cut_without_encoding_anew(tmp_path):
    """`ffmpeg -ss ... -c copy` starts at the keyframe before the cut and marks what lies between as not shown."""
    whole = write_video(tmp_path / "whole.mp4", counting_frames(60), g="20", bf="2")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        shown_from = sorted(p.pts for p in packets)[25]
        keyframe = max(i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= shown_from)
        for packet in packets[keyframe:]:
            packet.pts, packet.dts, packet.stream = packet.pts - shown_from, packet.dts - shown_from, copy
            target.mux(packet)
    reference = full_decode(tmp_path / "cut.mp4")
    assert keyframe < 25 and (reference == full_decode(whole)[25:]).all()
    reader = open_video(tmp_path / "cut.mp4")
    assert len(reader) == len(reference) == 35
    for indices in ([0], [34], [3, 4, 20], list(range(35))):
        assert (reader.frames(np.array(indices)).numpy() == reference[indices]).all(), indices


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path, rotation):
    plain = write_video(tmp_path / "plain.mp4", counting_frames(4))
    with av.open(str(plain)) as source, av.open(str(tmp_path / "turned.mp4"), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])  # the same packets: the encoder may vary
        copy.set_display_rotation(rotation)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    turned, expected = all_frames(tmp_path / "turned.mp4"), np.rot90(all_frames(plain), rotation // 90, axes=(2, 3))
    assert turned.shape == expected.shape and (turned == expected).all()


def test_workers_survive_videos_that_were_decoded_before_they_were_forked(tmp_path, monkeypatch):
    """Decoding threads of the main process must be gone by then, even where the garbage collector never ran."""
    monkeypatch.setattr(VLoader, "LARGE", 0)  # several threads for small pictures too
    samples = [Sample(write_video(tmp_path / f"{i}.mp4", counting_frames(60, 64, 64)), "a") for i in range(12)]
    dataset = ClipDataset(samples, Preprocessing(16, (16,), "bilinear", 1 / 255, (0.5,) * 3, (0.5,) * 3), 8, 0, ["a"])

    def make_batch(items):
        gc.collect()  # in the worker
        return [item["pixel_values"] for item in items]

    gc.disable()
    try:
        expected = [dataset[0, i]["pixel_values"] for i in range(12)]
        clips = [clip for batch in build_loader(dataset, make_batch, 2, 2) for clip in batch]
    finally:
        gc.enable()
    assert len(clips) == 12 and all(torch.equal(a, b) for a, b in zip(clips, expected, strict=True))


def test_frames_in_natural_order_and_of_one_size(tmp_path):
    for index in range(12):
        Image.new("RGB", (16, 16), (20 * index, 0, 0)).save(tmp_path / f"frame_{index}.png")
    assert all_frames(tmp_path)[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    Image.new("RGB", (16, 20)).save(tmp_path / "frame_12.png")
    with pytest.raises(UserError, match=r"frame_12.png: it is 16x20 pixels, frame_0.png is 16x16"):
        all_frames(tmp_path)
    assert sorted(["f10", "f9", "f1a"], key=natural_key) == ["f1a", "f9", "f10"]


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmful_ran"),))


@pytest.mark.parametrize(
    "content, cause",
    [
        (torch.zeros(4, 3, 8), r"expected a tensor \[T, 3, H, W\], not \[4, 3, 8\]"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), r"not \[4, 8, 8, 3\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), "torch.int64"),
        (torch.full((4, 3, 8, 8), 1.5), r"\[0, 1\]"),
        (torch.full((4, 3, 8, 8), float("nan")), r"\[0, 1\]"),
        ({"video": 1}, "dict"),
        (Harmful(), "not a tensor"),
    ],
)
def test_bad_tensors_are_named(tmp_path, monkeypatch, content, cause):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(UserError, match=rf"v\.pt.*{cause}"):
        open_video(tmp_path / "v.pt")
    assert not (tmp_path / "harmful_ran").exists()


def test_unreadable_files_are_named(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", counting_frames(30))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:600])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.webm").write_bytes(b"")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps([1]))
    for name in ("cut.mp4", "text.mp4", "empty.webm", "raw.pt", "missing.mp4"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read_clip(tmp_path / name, 8)


def test_one_frame_is_repeated(tmp_path):
    torch.save(torch.full((1, 3, 8, 8), 9, dtype=torch.uint8), tmp_path / "v.pt")
    assert (read_clip(tmp_path / "v.pt", 5) == 9).all() and len(read_clip(tmp_path / "v.pt", 5)) == 5


# -- what a folder holds ----------------------------------------------------------------------------


def test_val_is_the_same_tenth_whatever_the_order(dataset):
    samples = read_folder(dataset / "train")
    train, val = hold_out(samples, dataset / "train")
    again = hold_out(samples[::-1], dataset / "train")[1]
    assert {s.path for s in val} == {s.path for s in again}
    assert {s.label for s in val} == {"class_0", "class_1", "class_2"} and len(train) + len(val) == len(samples)


def test_metadata_labels_need_no_class_folders(tmp_path):
    for split, names in (("train", "abcd"), ("test", "ab")):
        (tmp_path / split).mkdir()
        rows = []
        for index, name in enumerate(names):
            torch.save(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / f"{split}_{name}.pt")
            rows.append(f'{{"file_name": "../{split}_{name}.pt", "label": "{"xy"[index % 2]}", "caption": "one"}}\n')
        (tmp_path / split / "metadata.jsonl").write_text("".join(rows))
    splits = read_splits(tmp_path)
    assert splits.class_names == ["x", "y"] and len(splits.val) == 2 and len(splits.test) == 2


@pytest.mark.parametrize(
    "line, cause",
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected"),
        ('{"file_name": 3}', "line 2: expected"),
        ('{"file_name": "b.pt", "caption": ""}', "line 2: caption must be"),
        ('{"file_name": "b.pt", "text": 3}', "line 2: text must be"),
        ('{"file_name": "a.pt"}', "line 2: file_name 'a.pt' stands twice"),
        ('{"file_name": "b.pt"}', "names 1 files that do not exist"),
    ],
)
def test_bad_metadata_names_the_line(tmp_path, line, cause):
    torch.save(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path / "a.pt")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.pt"}\n' + line + "\n")
    with pytest.raises(UserError, match=cause):
        read_folder(tmp_path)


# -- real clips -------------------------------------------------------------------------------------


def test_real_clips_equal_a_full_decode(real_data):
    broken = {"zero_bytes.webm", "corrupted.mp4"}
    videos = [v for v in find_videos(real_data / "clips") if v.suffix != ".pt" and v.name not in broken]
    assert len(videos) >= 17
    for path in videos:
        reference, reader = full_decode(path), VideoFile(path)
        assert len(reader) == len(reference), path
        count = len(reference)
        for indices in ([0, count - 1], [count // 2], [*range(0, count, max(1, count // 7))]):
            assert (reader.frames(np.array(indices)).numpy() == reference[indices]).all(), (path, indices)


@pytest.mark.parametrize("name", ["nasa_13013.mp4.stream3.frame000015", "nasa_13013.mp4.stream3.frame000386", "h265_video.mp4.stream0.frame000005"])  # fmt: skip
def test_real_frames_equal_those_that_ffmpeg_extracted(real_data, name):
    expected = torch.load(real_data / "clips" / f"{name}.pt", weights_only=True)
    path = real_data / "clips" / name.split(".stream")[0]
    frame = open_video(path).frames(np.array([int(name[-6:])]))[0]
    assert torch.equal(frame, expected.permute(2, 0, 1))  # stored as [H, W, C]


def test_real_damaged_files_are_named(real_data):
    for name in ("zero_bytes.webm", "corrupted.mp4"):
        with pytest.raises(UserError, match=name):
            read_clip(real_data / "clips" / name, 16)
