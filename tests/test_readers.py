"""All readers return the same clip, and an unreadable video is an error, never replaced."""

import gc
import http.server
import os
import pickle
import re
import signal
import socket
import struct
import threading
import weakref
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import counting_frames, drawn, read_clip, write_video
from PIL import Image

import dummy_data
import main
import readers
import scan
from readers import ReadError, VideoFile, find_videos, natural_key, open_video, upright
from scan import scan_videos
from script import UserError
from transforms import Preprocessing, view_indices
from VLoader import (
    ClipDataset,
    EpochBatches,
    Sample,
    build_loader,
    hold_out,
    read_folder,
    read_splits,
    split_into_windows,
)

SMALL = Preprocessing(16, (16,), "bilinear", 1 / 255, (0.5,) * 3, (0.5,) * 3)


def full_decode(path: Path) -> np.ndarray:
    """All frames in decoder order, the slow way: uint8 [T, C, H, W]."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return torch.stack([upright(f) for f in container.decode(stream)]).permute(0, 3, 1, 2).numpy()


def all_frames(path: Path) -> np.ndarray:
    reader = open_video(path)
    return reader.frames(np.arange(len(reader))).numpy()


def test_readers_agree(tmp_path):
    video = drawn(3, frames=12)[0]
    paths = [dummy_data.save_video(video, tmp_path / name) for name in ("v.pt", "v", "v.mp4")]
    tensor, folder, file = (read_clip(path, 8).numpy().astype(int) for path in paths)
    assert (tensor == folder).all()
    assert np.abs(tensor - file).mean() < 4  # lossy, but with the same frames and channel order
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


def test_a_clip_cut_without_reencoding(tmp_path):
    """`ffmpeg -ss ... -c copy` starts at the keyframe before the cut and marks the frames up to it as hidden."""
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


@pytest.mark.parametrize(
    "name, codec, bf", [("v.ts", "libx264", "2"), ("v.mp4", "libx264", "2"), ("v.mkv", "mpeg4", "0")]
)
def test_a_recording_that_starts_between_two_keyframes(tmp_path, name, codec, bf):
    """As when a stream is recorded from its middle: the video starts at the first keyframe. Decoders return nothing of
    what comes before, or, for mpeg4, damaged frames."""
    whole = write_video(tmp_path / f"whole_{name}", counting_frames(60), codec, g="20", bf=bf)
    with av.open(str(whole)) as source, av.open(str(tmp_path / name), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in [p for p in source.demux(video=0) if p.size][7:]:
            packet.stream = copy
            target.mux(packet)
    reader = open_video(tmp_path / name)
    reference = full_decode(whole)[-len(reader) :]
    assert len(reference) in (40, 41)
    assert codec == "mpeg4" or len(full_decode(tmp_path / name)) == len(reader)
    for indices in ([0], [len(reference) - 1], [3, 4, 20], list(range(len(reference)))):
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
    """Decoding threads of the main process must have ended by then, even if the garbage collector never ran."""
    monkeypatch.setattr(readers, "LARGE", 0)  # several threads even for small frames
    samples = [Sample(write_video(tmp_path / f"{i}.mp4", counting_frames(60, 64, 64)), "a") for i in range(12)]
    dataset = ClipDataset(samples, SMALL, 8, 0, ["a"])

    def make_batch(items):
        gc.collect()  # in the worker
        return [item["video"] for item in items]

    gc.disable()
    try:
        expected = [dataset[0, i]["video"] for i in range(12)]
        clips = [clip for batch in build_loader(dataset, make_batch, 2, EpochBatches(dataset, 2)) for clip in batch]
    finally:
        gc.enable()
    assert len(clips) == 12 and all(torch.equal(a, b) for a, b in zip(clips, expected, strict=True))


def test_frames_in_natural_order_and_of_one_size(tmp_path):
    for index in range(12):
        Image.new("RGB", (16, 16), (20 * index, 0, 0)).save(tmp_path / f"frame_{index}.png")
    assert all_frames(tmp_path)[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    Image.new("RGB", (16, 20)).save(tmp_path / "frame_12.png")
    with pytest.raises(UserError, match=r"frame_12.png is 16x20 pixels, frame_0.png is 16x16"):
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
        (torch.zeros(4, 3, 8, 8).to_sparse(), "expected a dense CPU tensor"),
        (torch.zeros(4, 3, 8, 8, device="meta"), "expected a dense CPU tensor"),
        (torch.zeros(1).expand(8, 3, 200_000, 200_000), "200000x200000 pixels"),
        (torch.zeros(1).expand(10**6, 3, 100, 100), r"\[3, 100, 100\] take 111.8 GiB"),
    ],
)
def test_bad_tensors_are_named(tmp_path, monkeypatch, content, cause):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(UserError, match=rf"v\.pt.*{cause}"):
        open_video(tmp_path / "v.pt")
    assert not (tmp_path / "harmful_ran").exists()


def test_files_of_huge_tensors_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2 * 10**6))
    with (tmp_path / "long.pt").open("wb") as file:
        file.truncate(2 * 10**6)
    monkeypatch.setattr(readers, "LARGEST_CLIP", 10**4)
    for name in ("packed.pt", "long.pt"):
        with pytest.raises(ReadError, match=rf"{name}: it holds 0\.0 GiB"):
            open_video(tmp_path / name)


# -- whatever a file does, one error names it -------------------------------------------------------

KINDS = [AttributeError, RuntimeError, NotImplementedError, MemoryError, RecursionError, PermissionError, KeyError]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_library_raises_names_the_file(tmp_path, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("something odd")

    file, folder = write_video(tmp_path / "v.mp4", counting_frames(8)), tmp_path / "folder"
    dummy_data.save_frames(np.zeros((2, 3, 8, 8), np.uint8), folder)
    dataset = ClipDataset([Sample(file), Sample(folder)], SMALL, 2, 0, [])
    with monkeypatch.context() as patched:
        patched.setattr(readers, "upright", fail)
        patched.setattr(Image, "open", fail)
        for place, name in enumerate(("v.mp4", "frame_000.png")):
            assert re.search(f"cannot read .*{name}.*something odd", dataset[0, place]["error"])
        assert len(scan_videos({file: 0, folder: 1}, 2, 0, 0, {})[0]) == 2
    monkeypatch.setattr(av, "open", fail)
    monkeypatch.setattr(os, "scandir", fail)
    for path in (file, folder):
        with pytest.raises(ReadError, match=f"cannot read {path}: .*something odd"):
            open_video(path)


def test_a_codec_that_ffmpeg_does_not_know(tmp_path):
    path = write_video(tmp_path / "v.avi", counting_frames(8), "mpeg4")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    with pytest.raises(ReadError, match=r"v\.avi: this FFmpeg does not know its codec"):
        open_video(path)


def test_a_video_whose_picture_size_changes(tmp_path):
    parts = [write_video(tmp_path / f"{h}.ts", counting_frames(20, h, 64), "mpeg2video", g="5") for h in (32, 48)]
    (tmp_path / "v.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    reader = open_video(tmp_path / "v.ts")
    with pytest.raises(ReadError, match=r"v\.ts: frame \d+ is 64x48 pixels, frame 0 is 64x32"):
        reader.frames(range(len(reader)))
    assert reader.frames([0, 1]).shape == (2, 3, 32, 64)


def big_png(path: Path, width: int, height: int) -> Path:
    """A PNG file with a header and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.parent.mkdir(exist_ok=True)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def test_images_and_clips_have_a_maximum_size(tmp_path, monkeypatch, recwarn):
    big_png(tmp_path / "big" / "0.png", 17_000, 16_000)
    with pytest.raises(ReadError, match="17000x16000 pixels; at most 256 million"):
        read_clip(tmp_path / "big", 1)
    big_png(tmp_path / "big" / "0.png", 30_000, 20_000)
    with pytest.raises(ReadError, match=r"0\.png: .*600000000 pixels"):
        read_clip(tmp_path / "big", 1)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (100_000, 1)).save(tmp_path / "flat" / "0.png")
    large = ClipDataset(
        [Sample(tmp_path / "flat")], Preprocessing(224, (224,), *list(vars(SMALL).values())[2:]), 2, 0, []
    )
    assert "100000x1 pixels would become 22400000x224" in large[0, 0]["error"]
    path = write_video(tmp_path / "v.mp4", counting_frames(40))
    monkeypatch.setattr(readers, "LARGEST_CLIP", 10**5)
    with pytest.raises(ReadError, match=r"v\.mp4: 40 frames of shape \[3, 32, 48\] take 0.0 GiB"):
        read_clip(path, 40)
    assert ClipDataset([Sample(path)], SMALL, 40, 0, [])[0, 0]["video"].shape == (40, 3, 16, 16)
    assert scan_videos({path: 1}, 40, 0, 0, {})[0] == {}
    assert not recwarn.list


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames" / "0.png")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "dangling.pt").symlink_to("nowhere.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
        for name in ("pipe.mp4", "frames", "loop.mp4", "dangling.pt", "device.pt", "socket.mp4"):
            with pytest.raises(ReadError, match=f"cannot read .*{name}"):
                read_clip(tmp_path / name, 2)


def test_a_path_is_never_used_as_a_url(tmp_path, monkeypatch):
    """A folder named "http:" contains a text file; a server would return a video for the same name."""
    (tmp_path / "served").mkdir()
    write_video(tmp_path / "served" / "v.ts", counting_frames(8), "mpeg2video")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            asked.append(args)
            super().__init__(*args, directory=tmp_path / "served")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = Path("http:", f"127.0.0.1:{server.server_port}", "v.ts")
        monkeypatch.chdir(tmp_path)
        path.parent.mkdir(parents=True)
        path.write_text("junk")
        with pytest.raises(ReadError):
            read_clip(path, 2)
        server.shutdown()
    assert not asked
    write_video(tmp_path / "v.mp4", counting_frames(8)).rename("12:30:05.mp4")
    assert len(read_clip(Path("12:30:05.mp4"), 2)) == 2


def test_a_list_of_other_videos_is_no_video(tmp_path):
    write_video(tmp_path / "v.mp4", counting_frames(8))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile v.mp4\n")
    with pytest.raises(ReadError, match=r"list\.mp4: a list of other files \(concat\), not a video"):
        open_video(tmp_path / "list.mp4")


def test_a_title_need_not_be_text(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        container.metadata["title"] = "Caf##"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    (tmp_path / "v.mkv").write_bytes((tmp_path / "v.mkv").read_bytes().replace(b"Caf##", b"Caf\xe9s"))
    assert len(open_video(tmp_path / "v.mkv")) == 1


def test_grey_pictures_of_16_bit_keep_their_greys_and_32_bit_is_refused(tmp_path):
    """PIL's own conversion makes every value above 255 white."""
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for name, values in {"a.png": grey, "a.tif": grey, "b.tif": grey.astype(">u2")}.items():
        Image.fromarray(values).save(tmp_path / name)
        assert (readers.read_picture(tmp_path / name).numpy() == (grey >> 8)[..., None]).all()
    for values in (grey.astype(np.int32), grey.astype(np.float32) / 65535):
        Image.fromarray(values).save(tmp_path / "c.tif")
        with pytest.raises(ReadError, match=r"c\.tif: 32-bit grey values have no fixed range"):
            readers.read_picture(tmp_path / "c.tif")


def test_the_number_of_windows_is_limited(tmp_path):
    path = write_video(tmp_path / "v.mp4", counting_frames(8))
    for seconds in (1e-9, 1e-300):
        with pytest.raises(ReadError, match=r"v\.mp4: 0\.8 s would make more than 100000 windows"):
            split_into_windows(Sample(path), seconds)
    with av.open(str(path)) as source, av.open(str(tmp_path / "jump.mkv"), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        packets[-1].pts = packets[-1].dts = 2**45
        for packet in packets:
            packet.stream = copy
            target.mux(packet)
    with pytest.raises(ReadError, match=r"jump\.mkv: .* s would make more than 100000 windows of 1 s"):
        split_into_windows(Sample(tmp_path / "jump.mkv"), 1)


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def write_tensor(path: Path) -> Path:
    torch.save(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), path)
    return path


def test_a_killed_worker_is_one_error(dataset, tmp_path, monkeypatch, capsys):
    """Killed as by the OOM killer, during training and during the scan."""
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))  # seconds between two checks of the workers, instead of 5
    monkeypatch.setattr(ClipDataset, "pixels", killed)
    flags = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--image_size", "16", "--num_workers", "1"]
    assert main.main([*flags, "--cache_features", "False"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: a worker process was killed")
    monkeypatch.setattr(scan, "open_video", killed)
    with pytest.raises(UserError, match="lower --num_workers, --batch_size"):
        scan_videos({write_tensor(tmp_path / f"{i}.pt"): 0 for i in range(65)}, 2, 0, 1, {})


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


# -- frames are resized as they are read ------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> list[Path]:
    """One video as each kind of file. The frames differ, and none is square."""
    folder = tmp_path_factory.mktemp("wide")
    frames = counting_frames(24, 40, 64)
    torch.save(torch.from_numpy(frames).permute(0, 3, 1, 2), folder / "v.pt")
    dummy_data.save_frames(frames.transpose(0, 3, 1, 2), folder / "v")
    return [folder / "v.pt", folder / "v", write_video(folder / "v.mp4", frames)]


@pytest.mark.parametrize(
    "resize, mode", [((24,), "bilinear"), ((20, 20), "bicubic"), ((30,), "nearest-exact"), (None, "bilinear")]
)
@pytest.mark.parametrize("views", [(1, 1), (3, 1), (2, 3)])
def test_clips_equal_those_resized_as_a_whole(wide, resize, mode, views):
    preprocessing = Preprocessing(20, resize, mode, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    clips, crops = views
    for path in wide:
        found = ClipDataset([Sample(path)], preprocessing, 10, 0, [], views=views)[0, 0]["video"]
        frames = open_video(path).frames(view_indices(24, 10, 0, clips))  # with 30 of 24 frames, some twice
        places = [None] if crops == 1 else [0, 0.5, 1]
        expected = [preprocessing.pixels(clip, place) for clip in frames.split(10) for place in places]
        assert torch.equal(found, expected[0] if views == (1, 1) else torch.stack(expected))


def test_only_one_frame_is_held_at_full_size(wide):
    for path in wide[1:]:
        alive: list[weakref.ref] = []

        def halve(frames, alive=alive):
            assert len(frames) == 1 and not any(ref() is not None for ref in alive[:-1])
            alive.append(weakref.ref(frames.untyped_storage()))
            return frames[..., ::2, ::2]

        reader = open_video(path)
        assert torch.equal(reader.frames([3, 9, 3, 20], halve), reader.frames([3, 9, 3, 20])[..., ::2, ::2])
        assert len(alive) == 3


def moving_cells() -> np.ndarray:
    """Moving and still cells whose textures change every second: [60, H, W, C]."""
    rng = np.random.default_rng(7)
    textures = rng.integers(0, 256, (4, 55, 63, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    frames = np.empty((60, 64, 96, 3), np.uint8)
    for y, x in np.ndindex(4, 6):
        start, step = int(rng.integers(10)), 2 * int(rng.integers(2))
        for t in range(60):
            texture, shift = textures[(t + start) // 10 % 4], t * step
            cell = texture[16 * y + shift : 16 * y + shift + 16, 16 * x + shift : 16 * x + shift + 16]
            frames[t, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = cell
    return frames


def test_bugs_of_old_encoders_are_emulated_after_a_seek(tmp_path):
    """FFmpeg decodes video of x264 builds up to 33 differently, if it has seen the build number (first packet)."""
    options = {"g": "20", "bf": "7", "x264-params": "b-pyramid=normal:direct=spatial:b-adapt=0:scenecut=0"}
    path, frames = tmp_path / "old.mp4", moving_cells()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    modern = full_decode(path)
    path.write_bytes(re.sub(rb"x264 - core \d{3}", b"x264 - core 030", path.read_bytes()))
    reference = full_decode(path)
    assert (modern[40:] != reference[40:]).any()
    assert (open_video(path).frames(range(40, 60)).numpy() == reference[40:]).all()


# -- what a folder holds ----------------------------------------------------------------------------


def test_val_is_the_same_tenth_in_any_order(dataset):
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
        ('{"file_name": "a.pt"}', "line 2: file_name 'a.pt' appears twice"),
        ('{"file_name": "b.pt"}', "names 1 missing file, for example"),
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


@pytest.mark.parametrize(
    "name",
    ["nasa_13013.mp4.stream3.frame000015", "nasa_13013.mp4.stream3.frame000386", "h265_video.mp4.stream0.frame000005"],
)
def test_real_frames_equal_those_that_ffmpeg_extracted(real_data, name):
    expected = torch.load(real_data / "clips" / f"{name}.pt", weights_only=True)
    path = real_data / "clips" / name.split(".stream")[0]
    frame = open_video(path).frames(np.array([int(name[-6:])]))[0]
    assert torch.equal(frame, expected.permute(2, 0, 1))  # stored as [H, W, C]


def test_real_damaged_files_are_named(real_data):
    for name in ("zero_bytes.webm", "corrupted.mp4"):
        with pytest.raises(UserError, match=name):
            read_clip(real_data / "clips" / name, 16)
