"""CPU time to read a clip from a video file: vidtune's reader against torchcodec, decord2 and OpenCV.

    pip install torchcodec==0.13.0 decord2==3.4.0 opencv-python-headless==5.0.0.93   (torchcodec needs FFmpeg, too)
    python -m benchmarks.decoding --videos DIR
    python -m benchmarks.decoding --draw DIR      draws test videos: 240p to 1080p, a keyframe every 12 to 600 frames

Each reader runs in a separate process, because decord2 and torchcodec crash in the same one. The process is pinned to
one core, as a loader's worker effectively is; with --workers 2, two of them read at the same time. Every reader opens
the file for each read and returns the same frames (segment centres) as uint8 RGB. Frames keep the size of the video;
with --size, the same function resizes them for all readers. Rounds alternate between the readers. Videos that any
reader cannot read are left out, and so are readers that are not installed. Prints medians in ms of CPU time, geometric
means over the videos, and speeds relative to the fastest other reader.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import readers
from readers import ReadError, VideoFile, find_videos
from script import counted, make_folder
from transforms import resize_frames, sample_indices

LIBRARIES = {"vidtune": "av", "torchcodec": "torchcodec", "decord2": "decord", "opencv": "cv2"}
REPEATS = 3  # timed reads per clip and round


def resized(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Frames uint8 [n, 3, H, W] with their shorter side resized to `size`; 0 leaves them as they are."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    return resize_frames(frames, (size * height // short, size * width // short)) if size else frames


# Readers: (path, frame indices, size) -> uint8 [n, 3, H, W].
def read_vidtune(path: str, indices: list[int], size: int) -> torch.Tensor:
    readers.INDEXES.clear()  # as if the file were read for the first time
    return VideoFile(Path(path)).frames(np.array(indices), partial(resized, size=size))


def read_torchcodec(path: str, indices: list[int], size: int) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder  # ty: ignore[import-not-found]

    return resized(VideoDecoder(path).get_frames_at(indices).data, size)


def read_decord2(path: str, indices: list[int], size: int) -> torch.Tensor:
    import decord  # ty: ignore[import-not-found]

    frames = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    return resized(torch.from_numpy(frames).permute(0, 3, 1, 2), size)


def read_opencv(path: str, indices: list[int], size: int) -> torch.Tensor:
    """Counts grabbed frames up to each index, because OpenCV's seeking is wrong if the frame rate varies."""
    import cv2  # ty: ignore[import-not-found]

    video = cv2.VideoCapture(path)
    frames, position = [], -1
    for index in indices:
        while position < index:
            if not video.grab():
                raise OSError("no more frames")
            position += 1
        frame = torch.from_numpy(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB))
        frames.append(resized(frame.permute(2, 0, 1)[None], size))
    return torch.cat(frames)


READERS = {"vidtune": read_vidtune, "torchcodec": read_torchcodec, "decord2": read_decord2, "opencv": read_opencv}


def measure(reader: str, jobs: dict[str, list[int]], size: int, core: int) -> dict[str, dict]:
    """{video: {"seconds": CPU seconds of each read, "mean": mean of each frame}}, or {video: {"error": message}}."""
    read, cores = READERS[reader], sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)
    results = {}
    for path, indices in jobs.items():
        try:
            # the first read is not timed: it brings the file into the page cache
            frames, seconds = read(path, indices, size), []
            for _ in range(REPEATS):
                start = time.process_time()
                read(path, indices, size)
                seconds.append(time.process_time() - start)
            results[path] = {"seconds": seconds, "mean": frames.float().mean((1, 2, 3)).tolist()}
        except Exception as error:  # each library raises its own exceptions
            results[path] = {"error": str(error)}
    return results


def measure_in_processes(reader: str, jobs: dict[str, list[int]], size: int, workers: int) -> list[dict[str, dict]]:
    """measure() in new processes at the same time, which get the jobs in a file and print the results as JSON."""
    # one thread: several threads on one core would mostly wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENCV_FFMPEG_CAPTURE_OPTIONS": "threads;1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps(jobs))
        command = [
            sys.executable,
            "-m",
            "benchmarks.decoding",
            "--reader",
            reader,
            "--videos",
            str(file),
            "--size",
            str(size),
        ]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        children = [subprocess.Popen([*command, "--core", str(core)], **pipes) for core in range(workers)]
        outputs = [child.communicate() for child in children]
    if any(child.returncode for child in children):
        sys.exit(f"error: {reader} failed: {outputs[0][1].strip().splitlines()[-1:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def clips(folder: Path, num_frames: int) -> dict[str, list[int]]:
    """{video file: frame indices} for all video files below the folder that vidtune can read."""
    jobs = {}
    for path in find_videos(folder):
        # damaged files are skipped here; .pt tensors need no decoding
        try:
            indices = sample_indices(len(VideoFile(path)), num_frames).tolist() if path.suffix != ".pt" else []
        except ReadError:
            continue
        if indices:
            jobs[str(path)] = indices
    return jobs


def compare(jobs: dict[str, list[int]], size: int, workers: int, names: list[str], rounds: int) -> None:
    """Times all readers on all videos and prints a table: a line per video, then means and ratios."""
    results: dict[str, list[dict]] = {reader: [] for reader in names}
    for _ in range(rounds):
        for reader in names:
            results[reader] += measure_in_processes(reader, jobs, size, workers)

    # compare on the videos that every reader can read
    common = [p for p in jobs if all("seconds" in r[p] for rows in results.values() for r in rows)]
    left_out = sorted({Path(p).name for p in jobs} - {Path(p).name for p in common})
    frames = counted(len(next(iter(jobs.values()))), "frame")
    print(
        f"\n{frames}, size {size or 'of the video'}, {counted(workers, 'worker')}; CPU ms, medians of {rounds} x {REPEATS}; "
        f"left out: {', '.join(left_out) or 'none'}\n"
    )
    print(f"| video | {' | '.join(names)} | speed, vidtune / fastest other | other frames |")
    print("|---" * (len(names) + 3) + "|")

    # a fast reader may return the wrong frames: a mean more than 2 grey levels off counts as another frame
    times = {r: {p: 1000 * median(s for row in results[r] for s in row[p]["seconds"]) for p in common} for r in names}
    for path in common:
        own = np.array(results[names[0]][0][path]["mean"])
        other = {r: int((np.abs(np.array(results[r][0][path]["mean"]) - own) > 2).sum()) for r in names[1:]}
        wrong = ", ".join(f"{r} {n}" for r, n in other.items() if n)
        print(table_row(Path(path).name, {r: times[r][path] for r in names}, wrong))

    # geometric, so that long videos do not outweigh short ones
    print(table_row("geometric mean", {r: geometric_mean(times[r].values()) for r in names}, ""))


def table_row(name: str, times: dict[str, float], note: str) -> str:
    """A line of the table. vidtune is the first reader."""
    own, *others = times.values()
    ratio = f"{min(others) / own:.2f}" if others else ""
    return f"| {name} | {' | '.join(f'{t:.1f}' for t in times.values())} | {ratio} | {note} |"


def draw_videos(folder: Path) -> None:
    """Draws H.264 videos of 600 frames in four sizes, with a keyframe every 12, 60, 250 and 600 frames: squares that
    move on a moving gradient, with noise."""
    import av

    make_folder(folder)
    rng = np.random.default_rng(0)
    for width, height in ((426, 240), (854, 480), (1280, 720), (1920, 1080)):
        y, x = np.mgrid[:height, :width]
        gradient = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
        noise = rng.integers(-12, 13, (8, height, width, 1))
        for distance in (12, 60, 250, 600):
            options = {
                "g": str(distance),
                "keyint_min": str(distance),
                "sc_threshold": "0",
                "preset": "veryfast",
                "bf": "2",
            }
            with av.open(str(folder / f"{height}p_{distance}.mp4"), "w") as container:
                stream = container.add_stream("libx264", rate=30, options=options | {"crf": "24"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                for time in tqdm(range(600), f"{height}p, {distance}", leave=False, unit="frame"):
                    picture = np.roll(gradient, (time * width // 300, time * height // 500), (1, 0)) + noise[time % 8]
                    for k, side in enumerate(range(height // 10, height // 4, height // 40)):
                        left = int((0.4 + 0.3 * np.sin(time / 20 + k)) * width)
                        top = int((0.4 + 0.3 * np.cos(time / (15 + k))) * height)
                        picture[top : top + side, left : left + side] = 40 * k, 255 - 40 * k, 90 * k % 255
                    frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())


def main() -> None:
    """Compares the installed readers. With --reader it is the child process, which measures one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="folder of video files")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="draw test videos in this folder, and compare nothing")
    parser.add_argument("--num_frames", type=int, nargs="+", default=[8, 16], help="frames per clip, one table each")
    parser.add_argument("--size", type=int, default=0, help="resize the shorter side to this; 0: not at all")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="processes that read, one table each")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    # for the child process, which reads its jobs from the file --videos
    parser.add_argument("--reader", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw_videos(args.draw)
        return
    if args.reader:
        print(json.dumps(measure(args.reader, json.loads(args.videos.read_text()), args.size, args.core)))
        return
    if args.videos is None or not args.videos.is_dir():
        sys.exit("error: --videos must name a folder of video files")
    installed = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)]
    for num_frames, workers in itertools.product(args.num_frames, args.workers):
        compare(clips(args.videos, num_frames), args.size, workers, installed, args.rounds)


if __name__ == "__main__":
    main()
