"""Damaged videos: each is opened, counted and sampled, and either answers or raises ReadError.

Seeds are written with PyAV and PIL, and the small clips of VIDTUNE_TEST_DATA join them. A case flips bytes, cuts,
splices, edits the header, repeats or moves chunks, or joins two seeds.
"""

import io
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.campaign.common import Tally, judge_many, scratch, warm_up

FILMS = {
    "mp4": [("libx264", "yuv444p"), ("mpeg4", "yuv420p")], "mkv": [("libx264", "yuv420p"), ("ffv1", "yuv420p")],
    "webm": [("libvpx", "yuv420p"), ("libvpx-vp9", "yuv420p")], "avi": [("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p"), ("huffyuv", "rgb24")],
    "mov": [("mjpeg", "yuvj420p"), ("png", "rgb24")], "gif": [("gif", "rgb8")], "mpg": [("mpeg1video", "yuv420p"), ("mpeg2video", "yuv420p")],
    "ts": [("mpeg2video", "yuv420p"), ("libx264", "yuv420p")], "flv": [("flv", "yuv420p")], "wmv": [("wmv2", "yuv420p")],
}  # fmt: skip
IMAGES = ("png", "jpg", "webp", "bmp", "tif", "ppm")
LARGEST = 300_000  # bytes of a real clip that is used
MEMORY_MB, LIMIT = 2048, 30
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000)


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
    for tensor in (
        video,
        video,
        video / 255.0,
        (video / 255.0).half(),
        video.to("meta"),
        video.to_sparse(),
        huge,
        {"video": video},
    ):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(tensor, buffer, _use_new_zipfile_serialization=zipped)
            seeds.append(("pt", buffer.getvalue()))
    for form in IMAGES:
        buffer = io.BytesIO()
        Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(
            buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(form, form)
        )
        seeds += 2 * [(form, buffer.getvalue())]
    clips = Path(os.environ.get("VIDTUNE_TEST_DATA", "/nowhere")) / "clips"
    real = sorted(p for p in clips.glob("*.*") if p.stat().st_size < LARGEST) if clips.is_dir() else []
    return seeds + [(p.suffix[1:], p.read_bytes()) for p in real]


# -- damage -----------------------------------------------------------------------------------------


def place(data: bytes, rng: random.Random) -> tuple[int, int]:
    """A random piece [start, end), mostly short."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(len(data) ** rng.random()))


def flip(data: bytes, rng: random.Random, head: int = 1 << 40) -> bytes:
    changed = bytearray(data)
    for _ in range(int(30 ** rng.random())):
        changed[rng.randrange(min(head, len(data)))] ^= rng.randrange(1, 256)
    return bytes(changed)


def number(data: bytes, rng: random.Random) -> bytes:
    """A size, count or offset becomes an extreme one."""
    at, width = rng.randrange(min(len(data), 2000)), rng.choice((1, 2, 4))
    value = rng.choice(NUMBERS) & (256**width - 1)
    return data[:at] + value.to_bytes(width, rng.choice(("big", "little"))) + data[at + width :]


def fourcc(data: bytes, rng: random.Random) -> bytes:
    """One of the four-letter names in the file becomes another."""
    places = [i for i in range(min(len(data), 5000) - 4) if data[i : i + 4].isalnum()]
    at = rng.choice(places or [0])
    return data[:at] + rng.choice((b"ZZZZ", b"avc1", b"FMP4", b"\0\0\0\0", b"moov")) + data[at + 4 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = place(data, rng)
    return data[:end] + data[start:end] * int(20 ** rng.random()) + data[end:]


def remove(data: bytes, rng: random.Random) -> bytes:
    start, end = place(data, rng)
    return data[:start] + bytes(rng.choice((0, end - start))) + data[end:]


def splice(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    (start, end), (first, last) = place(data, rng), place(other, rng)
    return data[:start] + other[first:last] + data[rng.choice((start, end)) :]


def join(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data + rng.choice(others)


def damaged(seeds: list[tuple[str, bytes]], rng: random.Random) -> tuple[str, bytes, str]:
    """(suffix, bytes, what was done)."""
    suffix, data = rng.choice(seeds)
    alike = [other for s, other in seeds if s == suffix]
    kinds: dict[str, Callable] = {
        "flip": flip, "header": partial(flip, head=200), "number": number, "fourcc": fourcc, "cut": cut, "repeat": repeat,
        "remove": remove, "splice": partial(splice, others=alike), "strange": partial(splice, others=[d for _, d in seeds]),
        "join": partial(join, others=alike), "none": lambda data, rng: data,
    }  # fmt: skip
    done = [rng.choice(list(kinds)) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for kind in done:
        data = kinds[kind](data, rng) if data else data
    return suffix, data, " + ".join(done)


def write_case(seeds: list[tuple[str, bytes]], rng: random.Random, folder: Path) -> tuple[Path, str]:
    """The damaged video, a file or a folder of frames."""
    suffix, data, done = damaged(seeds, rng)
    if suffix in IMAGES:
        video = folder / "frames"
        video.mkdir()
        for index in range(4):
            (video / f"{index}.{suffix}").write_bytes(dict(seeds)[suffix])
        (video / f"{rng.randrange(5)}.{suffix}").write_bytes(data)
        return video, done
    (folder / f"video.{suffix}").write_bytes(data)
    return folder / f"video.{suffix}", done


def judge(seeds: list[tuple[str, bytes]], rng: random.Random) -> tuple[str, str]:
    import torch

    import VLoader
    from script import UserError
    from transforms import sample_indices

    path, done = write_case(seeds, rng, Path.cwd())
    try:
        reader = VLoader.open_video(path)
        clip = reader.frames(sample_indices(len(reader), 4, 0))
    except VLoader.ReadError as error:
        return ("refused", "") if isinstance(error, UserError) and path.stem in str(error) else ("unnamed", str(error))
    good = clip.dtype == torch.uint8 and clip.ndim == 4 and clip.shape[:2] == (4, 3)
    return ("read", "") if good else ("odd frames", f"{clip.dtype} {list(clip.shape)} after {done}")


def main(argv: list[str] | None = None) -> int:
    tally = Tally(__doc__, 10_000, argv)
    warm_up()
    with scratch() as work:
        seeds = make_seeds(work)
        judge_number = lambda number: judge(seeds, tally.rng(number))  # noqa: E731
        for case, verdict, text in judge_many(tally.total, judge_number, work / "cases", LIMIT, MEMORY_MB):
            folder = tally.add(verdict, text, str(case), bad=verdict not in ("read", "refused"))
            if folder is not None and not (folder / "frames").exists():
                write_case(seeds, tally.rng(case), folder)
    return tally.finish(["read", "refused", "exception", "odd frames", "unnamed", "crash", "hang", "memory"])


if __name__ == "__main__":
    sys.exit(main())
