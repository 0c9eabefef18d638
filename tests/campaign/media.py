"""Damaged videos: each is opened, counted and sampled, and either gives frames or raises ReadError.

Seeds are written with PyAV and PIL; small clips of VIDTUNE_TEST_DATA are added. A case flips bytes, cuts, splices,
writes odd numbers or codec names, repeats chunks, or joins two seeds.
"""

import io
import os
import random
import sys
from pathlib import Path

from tests.campaign import common

FILMS = {
    "mp4": [("libx264", "yuv444p"), ("mpeg4", "yuv420p")],
    "mkv": [("libx264", "yuv420p"), ("ffv1", "yuv420p")],
    "webm": [("libvpx", "yuv420p"), ("libvpx-vp9", "yuv420p")],
    "avi": [("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p"), ("huffyuv", "rgb24")],
    "mov": [("mjpeg", "yuvj420p"), ("png", "rgb24")],
    "gif": [("gif", "rgb8")],
    "mpg": [("mpeg1video", "yuv420p"), ("mpeg2video", "yuv420p")],
    "ts": [("mpeg2video", "yuv420p"), ("libx264", "yuv420p")],
    "flv": [("flv", "yuv420p")],
    "wmv": [("wmv2", "yuv420p")],
}
IMAGES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM"}
LARGEST = 300_000  # size limit for real clips
MEMORY_MB, LIMIT = 2048, 300


def write_film(path: Path, codec: str, pixels: str, size: int) -> bytes:
    import av
    import numpy as np

    rng = np.random.default_rng(size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = pixels
        for index in range(12):
            picture = np.full((size, size, 3), 20 * index, np.uint8) + rng.integers(0, 9, (size, size, 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def make_seeds(folder: Path) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of every seed."""
    import numpy as np
    import torch
    from PIL import Image

    seeds = []
    for suffix, kinds in FILMS.items():
        for codec, pixels in kinds:
            seeds += [(suffix, write_film(folder / f"x.{suffix}", codec, pixels, size)) for size in (32, 48)]
    video = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    huge = torch.zeros(1).expand(8, 3, 200_000, 200_000)  # of one number
    odd = [video.to("meta"), video.to_sparse(), huge, {"video": video}]
    for tensor in [video, video, video / 255.0, (video / 255.0).half(), *odd]:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(tensor, buffer, _use_new_zipfile_serialization=zipped)
            seeds.append(("pt", buffer.getvalue()))
    picture = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    for suffix, form in IMAGES.items():
        buffer = io.BytesIO()
        picture.save(buffer, form)
        seeds += 2 * [(suffix, buffer.getvalue())]
    clips = Path(os.environ.get("VIDTUNE_TEST_DATA", "/nowhere")) / "clips"
    real = sorted(p for p in clips.glob("*.*") if p.stat().st_size < LARGEST) if clips.is_dir() else []
    return seeds + [(p.suffix[1:], p.read_bytes()) for p in real]


# -- damage -----------------------------------------------------------------------------------------


def rename(data: bytes, rng: random.Random) -> bytes:
    """Renames one of the four-letter atoms of the file."""
    places = [i for i in range(min(len(data), 5000) - 4) if data[i : i + 4].isalnum()]
    at = rng.choice(places or [0])
    return data[:at] + rng.choice((b"ZZZZ", b"avc1", b"FMP4", b"\0\0\0\0", b"moov")) + data[at + 4 :]


def damaged(seeds: list[tuple[str, bytes]], rng: random.Random) -> tuple[str, bytes]:
    """(suffix, bytes); one in twenty is undamaged."""
    suffix, data = rng.choice(seeds)
    others = [other for s, other in seeds if s == suffix or rng.random() < 0.05]
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if rng.random() > 0.05 else 0):
        data = rename(data, rng) if rng.random() < 0.1 else common.mutate(data, rng, others)
    return suffix, data


def write_case(seeds: list[tuple[str, bytes]], rng: random.Random, folder: Path) -> Path:
    """The damaged video, a file or a folder of frames."""
    suffix, data = damaged(seeds, rng)
    if suffix not in IMAGES:
        (folder / f"video.{suffix}").write_bytes(data)
        return folder / f"video.{suffix}"
    (folder / "video").mkdir()
    for index in range(4):
        (folder / "video" / f"{index}.{suffix}").write_bytes(dict(seeds)[suffix])
    (folder / "video" / f"{rng.randrange(5)}.{suffix}").write_bytes(data)
    return folder / "video"


def judge(seeds: list[tuple[str, bytes]], rng: random.Random) -> tuple[str, str]:
    import torch

    from readers import ReadError, open_video
    from transforms import sample_indices

    path = write_case(seeds, rng, Path.cwd())
    try:
        reader = open_video(path)
        clip = reader.frames(sample_indices(len(reader), 4, 0))
    except ReadError as error:
        return ("refused", "") if str(path) in str(error) else ("unnamed", str(error))
    good = clip.dtype == torch.uint8 and clip.ndim == 4 and clip.shape[:2] == (4, 3)
    return ("read", "") if good else ("odd frames", f"{clip.dtype} {list(clip.shape)} of {path.name}")


def main(argv: list[str] | None = None) -> int:
    tally = common.Tally(__doc__, 10_000, argv)
    common.warm_up()
    with common.scratch() as work:
        seeds = make_seeds(work)
        judge_number = lambda number: judge(seeds, tally.rng(number))  # noqa: E731
        for case, verdict, text in common.judge_many(tally.total, judge_number, work / "cases", LIMIT, MEMORY_MB):
            folder = tally.add(verdict, text, str(case), bad=verdict not in ("read", "refused"))
            if folder is not None:
                write_case(seeds, tally.rng(case), folder)
            if tally.time_is_up():
                break
    return tally.finish("read", "refused", "exception", "odd frames", "unnamed", "crash", "hang", "memory")


if __name__ == "__main__":
    sys.exit(main())
