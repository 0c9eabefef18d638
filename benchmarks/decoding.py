"""CPU time to read a clip from a video file: vidtune's reader against torchcodec, decord2 and OpenCV.

    pip install torchcodec==0.13.0 decord2==3.4.0 opencv-python-headless==5.0.0.93   (torchcodec needs FFmpeg, too)
    python -m benchmarks.decoding --videos DIR

Each reader runs in a separate process, because decord2 and torchcodec crash in the same one. The process is pinned to
one core, as a loader's worker effectively is. All readers return the same frames (segment centres) as uint8 RGB in the
size of the video. Rounds alternate between the readers. Videos that some reader cannot read do not count, and readers
that are not installed are left out. Prints medians in ms of CPU time, geometric means over the videos, and ratios to
the fastest reader.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median

import numpy as np

from readers import ReadError, VideoFile, find_videos
from transforms import sample_indices

LIBRARIES = {"vidtune": "av", "torchcodec": "torchcodec", "decord2": "decord", "opencv": "cv2"}
REPEATS = 3  # timed reads per clip and round


# Readers: (path, frame indices) -> uint8 (n, H, W, C).
def read_vidtune(path: str, indices: list[int]) -> np.ndarray:
    return VideoFile(Path(path)).frames(np.array(indices)).permute(0, 2, 3, 1).numpy()


def read_torchcodec(path: str, indices: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder  # ty: ignore[import-not-found]

    return VideoDecoder(path, dimension_order="NHWC").get_frames_at(indices).data.numpy()


def read_decord2(path: str, indices: list[int]) -> np.ndarray:
    import decord  # ty: ignore[import-not-found]

    return decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()


def read_opencv(path: str, indices: list[int]) -> np.ndarray:
    """Counts grabbed frames up to each index, because OpenCV's seeking is wrong if the frame rate varies."""
    import cv2  # ty: ignore[import-not-found]

    video = cv2.VideoCapture(path)
    frames, position = [], -1
    for index in indices:
        while position < index:
            if not video.grab():
                raise OSError("no more frames")
            position += 1
        frames.append(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


READERS = {"vidtune": read_vidtune, "torchcodec": read_torchcodec, "decord2": read_decord2, "opencv": read_opencv}


def measure(reader: str, jobs: dict[str, list[int]]) -> dict[str, dict]:
    """{video: {"seconds": CPU seconds of each read, "mean": mean of each frame}}, or {video: {"error": message}}."""
    read = READERS[reader]
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    results = {}
    for path, indices in jobs.items():
        try:
            # the first read is not timed: it brings the file into the page cache
            frames, seconds = read(path, indices), []
            for _ in range(REPEATS):
                start = time.process_time()
                read(path, indices)
                seconds.append(time.process_time() - start)
            results[path] = {"seconds": seconds, "mean": frames.mean(axis=(1, 2, 3)).tolist()}
        except Exception as error:  # each library raises its own exceptions
            results[path] = {"error": str(error)}
    return results


def measure_in_process(reader: str, jobs: dict[str, list[int]]) -> dict[str, dict]:
    """measure() in a new process, which gets the jobs on stdin and prints the results as JSON."""
    # one thread: several threads on one core would mostly wait for each other
    command = [sys.executable, "-m", "benchmarks.decoding", "--reader", reader]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENCV_FFMPEG_CAPTURE_OPTIONS": "threads;1"}
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: {reader} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def compare(folder: Path, num_frames: int, readers: list[str], rounds: int) -> None:
    """Times all readers on all videos and prints a table: a line per video, then means and ratios."""
    jobs = clips(folder, num_frames)
    results: dict[str, list[dict]] = {reader: [] for reader in readers}
    for _ in range(rounds):
        for reader in readers:
            results[reader].append(measure_in_process(reader, jobs))

    # compare on the videos that every reader can read
    common = [p for p in jobs if all("seconds" in r[p] for rows in results.values() for r in rows)]
    left_out = {Path(p).name for p in jobs} - {Path(p).name for p in common}
    print(f"\n{num_frames} frames, CPU ms (median of {rounds} x {REPEATS})  left out: {', '.join(sorted(left_out))}")
    width = max(len(Path(p).name) for p in common)
    print(
        f"{'':<{width}}" + "".join(f"{r:>12}" for r in readers) + "   frames that differ from vidtune's in brightness"
    )

    # a fast reader may return the wrong frames: a mean more than 2 grey levels off counts as another frame
    times = {r: {p: 1000 * median(s for row in results[r] for s in row[p]["seconds"]) for p in common} for r in readers}
    for path in common:
        own = np.array(results[readers[0]][0][path]["mean"])
        other = {r: int((np.abs(np.array(results[r][0][path]["mean"]) - own) > 2).sum()) for r in readers[1:]}
        wrong = ", ".join(f"{r} {n}" for r, n in other.items() if n)
        print(f"{Path(path).name:<{width}}" + "".join(f"{times[r][path]:>12.1f}" for r in readers) + f"   {wrong}")

    # geometric, so that long videos do not outweigh short ones
    means = {r: geometric_mean(times[r].values()) for r in readers}
    print(f"{'geometric mean':<{width}}" + "".join(f"{means[r]:>12.1f}" for r in readers))
    print(f"{'ratio to fastest':<{width}}" + "".join(f"{means[r] / min(means.values()):>12.2f}" for r in readers))


def main() -> None:
    """Compares the installed readers. With --reader it is the child process, which measures one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="folder of video files")
    parser.add_argument("--num_frames", type=int, nargs="+", default=[8, 16], help="frames per clip, one table each")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--reader", choices=LIBRARIES, help=argparse.SUPPRESS)  # for the child process
    args = parser.parse_args()
    if args.reader:
        print(json.dumps(measure(args.reader, json.load(sys.stdin))))
        return
    if args.videos is None or not args.videos.is_dir():
        sys.exit("error: --videos must name a folder of video files")
    readers = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)]
    for num_frames in args.num_frames:
        compare(args.videos, num_frames, readers, args.rounds)


if __name__ == "__main__":
    main()
