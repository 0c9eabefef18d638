"""The CPU time of an extraction, predicted from its parts and then measured.

    python -m benchmarks.extraction --videos DIR --clips 300

The parts are, in CPU seconds per clip, the digest of the file, decoding it, and its share of a batch through the tiny
TimeSformer; and once, starting a process on a few clips. Then extract.py runs on copies of the videos in DIR that can
be read, and its user and system time is compared with the sum. Also decodes one video in several sizes. Everything has
one thread, and CPU time hardly depends on what else the machine does.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import av
import torch

from build_model import VideoModel, build_model
from config import ROOT, Config, parse
from feature_cache import features_of
from readers import ReadError, digest, find_videos, open_video
from train_code import build_accelerator
from transforms import sample_indices

SIZES = [(320, 240), (640, 480), (1280, 720), (1920, 1080)]
FRAMES = 250  # of the video that is decoded in these sizes: 10 s
FLAGS = ["--freeze_visionbackbone", "True", "--num_workers", "0"]
FEW = 16  # clips of the run that shows what starting costs


def cpu_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median CPU time of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return median(seconds)


def read(video: Path, model: VideoModel, config: Config) -> torch.Tensor:
    """A clip as an extraction reads it, uint8 [T, C, H, W]."""
    reader = open_video(video)
    indices = sample_indices(len(reader), config.num_frames, config.frame_stride)
    return reader.frames(indices, model.vision_encoder.preprocessing.pixels)


def readable(folder: Path, model: VideoModel, config: Config) -> list[Path]:
    """The video files in a folder that can be read."""
    found = []
    for path in find_videos(folder):
        try:
            if path.is_file() and path.suffix != ".pt":
                read(path, model, config)
                found.append(path)
        except ReadError as error:
            print(f"left out: {error}")
    return found


def extraction(videos: list[Path], clips: int, folder: Path) -> float:
    """The CPU time of extract.py on that many clips, copies of the videos in turn."""
    for number in range(clips):
        video = videos[number % len(videos)]
        place = folder / "data" / "train" / f"class_{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, place / f"{number}{video.suffix}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [sys.executable, ROOT / "extract.py", *FLAGS, "--data_dir", folder / "data", "--output_dir", folder / "out"]
    done = subprocess.run([*map(str, argv)], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("  " + next(line for line in done.stdout.splitlines() if line.startswith("this process computed")))
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def scaled(video: Path, width: int, height: int, target: Path) -> Path:
    """The start of a video in another size, as H.264 with the settings of the encoder."""
    with av.open(str(video)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _, frame in zip(range(FRAMES), source.decode(video=0), strict=False):
            picture = frame.reformat(width, height, "yuv420p")
            picture.pts = None
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target


def main() -> None:
    """Prints the parts, the prediction and the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder with video files")
    parser.add_argument("--clips", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--sizes_of", help="name of the video to decode in several sizes; default: the first")
    args = parser.parse_args()

    # the model as extract.py builds it
    torch.set_num_threads(1)
    config, _ = parse(FLAGS, "extract")
    model, accelerator = build_model(config, 2), build_accelerator(config)
    config = model.vision_encoder.fill_auto(config)
    encoder = model.vision_encoder.to(accelerator.device).eval()
    videos = readable(args.videos, model, config)

    # the parts, for each clip as often as it is copied
    used = [videos[number % len(videos)] for number in range(args.clips)]
    digests = {video: cpu_seconds(lambda: digest(video)) for video in videos}  # noqa: B023
    decoding = {video: cpu_seconds(lambda: read(video, model, config)) for video in videos}  # noqa: B023
    batch = torch.stack([read(videos[0], model, config)] * config.batch_size)  # (B, T, C, H, W)
    with torch.no_grad():
        features = features_of(encoder, batch, config.token_grid, accelerator)  # (B, 1 + N, D)
        encoding = cpu_seconds(lambda: features_of(encoder, batch, config.token_grid, accelerator), 9) / len(batch)
    parts = {"digest": mean(digests[v] for v in used), "decode": mean(decoding[v] for v in used), "encode": encoding}
    print("CPU ms per clip: " + ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts.items()))
    print(f"features: {features[0].nbytes:,} bytes per clip; {config.num_frames} frames of {config.image_size}²")

    # prediction and measurement
    with tempfile.TemporaryDirectory() as folder:
        few = sum(digests[v] + decoding[v] + encoding for v in used[:FEW])
        start = extraction(videos, FEW, Path(folder) / "few") - few
        predicted = start + sum(digests[v] + decoding[v] + encoding for v in used)
        measured = extraction(videos, args.clips, Path(folder) / "all")
        print(f"start {start:.1f} s; {args.clips} clips: predicted {predicted:.1f} s, measured {measured:.1f} s of CPU")
        print(f"error of the prediction: {100 * (predicted / measured - 1):+.1f} %")

        # one video in several sizes
        chosen = args.videos / args.sizes_of if args.sizes_of else videos[0]
        for width, height in SIZES:
            video = scaled(chosen, width, height, Path(folder) / f"{height}.mp4")
            seconds, size = cpu_seconds(lambda: read(video, model, config)), video.stat().st_size  # noqa: B023
            print(f"{chosen.name} at {width}x{height}: {size / 1e6:.2f} MB, decode {1e3 * seconds:.0f} CPU ms")


if __name__ == "__main__":
    main()
