"""Can the loader keep up? Clips per second of the loader, by number of workers, and of the model that consumes them.

    python -m benchmarks.loading --data_dir DIR [training flags]
    python -m benchmarks.loading --data_dir DIR --codecs [training flags]    ways to compress stored frames

The loader yields batches as in training, and they are thrown away: first from videos, then from stored frames. The
model trains and predicts on one batch that is already in memory. Rounds alternate. Prints medians and ranges.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from benchmarks import alternate
from build_model import build_model
from config import Config, parse
from extras.frame_store import POSITIONS
from readers import ReadError, open_video
from scan import prepare_data
from script import UserError
from train_code import build_accelerator, build_loaders, build_optimizer, loss_sum
from transforms import sample_indices
from VLoader import read_splits

WORKERS = (0, 1, 2)
STEPS = 4  # model steps per round
CODECS: dict[str, dict[str, Any]] = {
    f"JPEG {quality}, {colours}": {"format": "JPEG", "quality": quality, "subsampling": colours}
    for quality in (75, 85, 90, 95)
    for colours in ("4:2:0", "4:4:4")
}
CODECS |= {f"WebP {quality}": {"format": "WEBP", "quality": quality, "method": 0} for quality in (75, 85, 90, 95)}
CODECS |= {"WebP, lossless": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}}
BY_PYAV = "JPEG 90, 4:4:4"  # also read with FFmpeg's decoder


# -- ways to compress frames ------------------------------------------------------------------------


def compress(frame: np.ndarray, options: dict[str, Any]) -> bytes:
    """A frame uint8 [H, W, 3] as an image file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, **options)
    return file.getvalue()


def read_with_pil(data: bytes) -> np.ndarray:
    """The frame in an image file, uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)))


def read_with_pyav(decoder: av.CodecContext, data: bytes) -> np.ndarray:
    """The frame in a JPEG file, uint8 [H, W, 3]."""
    (frame,) = decoder.decode(av.Packet(data))
    return frame.to_ndarray(format="rgb24")


def timed(job: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """(CPU milliseconds, result)"""
    start = time.process_time()
    result = job()
    return 1000 * (time.process_time() - start), result


def compare_codecs(config: Config, rounds: int) -> None:
    """Prints what it takes to keep the frames of the training videos, by codec: means over the videos."""
    model = build_model(config, 2)
    config, pixels = model.vision_encoder.fill_auto(config), model.vision_encoder.preprocessing.pixels
    clips, decoding = [], []
    for path in (sample.path for sample in read_splits(Path(config.data_dir)).train):
        try:
            count = len(open_video(path))
            indices = [sample_indices(count, config.num_frames, position=p) for p in POSITIONS["train"]]
            times = [timed(lambda p=path, i=indices: [open_video(p).frames(i[1], pixels)])[0] for _ in range(rounds)]
            clips.append(open_video(path).frames(np.concatenate(indices), pixels).permute(0, 2, 3, 1).numpy())
            decoding.append(median(times))
        except ReadError:
            continue
    size = f"{config.image_size}², {config.num_frames} frames x {len(POSITIONS['train'])}"
    print(f"{len(clips)} videos, {size}; decoding {config.num_frames} frames takes {np.mean(decoding):.1f} ms\n")
    print(
        "| | kB per clip | PSNR, dB (lowest) | ms to compress | ms to read | x faster than the video |\n|---|---|---|---|---|---|"
    )

    readers = {name: read_with_pil for name in CODECS}
    decoder = av.CodecContext.create("mjpeg", "r")
    readers[f"{BY_PYAV}, PyAV"] = partial(read_with_pyav, decoder)
    for name, read in readers.items():
        options = CODECS[name.removesuffix(", PyAV")]
        sizes, noise, writing, reading = [], [], [], []
        for clip in clips:
            took, files = timed(lambda clip=clip, options=options: [compress(frame, options) for frame in clip])
            reads = [timed(lambda files=files, read=read: [read(data) for data in files]) for _ in range(rounds)]
            writing.append(took)
            reading.append(median(took for took, _ in reads) / len(POSITIONS["train"]))
            sizes.append(sum(map(len, files)) / 1000)
            error = np.square(np.stack(reads[0][1]).astype(np.float32) - clip).mean()
            noise.append(10 * np.log10(255**2 / error) if error else np.inf)
        print(
            f"| {name} | {np.mean(sizes):.0f} | {np.mean(noise):.1f} ({min(noise):.1f}) | {np.mean(writing):.1f} "
            f"| {np.mean(reading):.1f} | {np.mean(decoding) / np.mean(reading):.1f} |"
        )


# -- the loader -------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Builds model and loaders as main.py does, times both and prints clips per second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up")
    parser.add_argument("--codecs", action="store_true", help="compare ways to compress stored frames")
    args, flags = parser.parse_known_args(argv)
    config, _ = parse(flags, "main")
    if args.codecs:
        compare_codecs(config, args.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare_loaders(replace(config, output_dir=folder, cache_dir=folder, preread="True"), args.rounds)


def compare_loaders(config: Config, rounds: int) -> None:
    """Prints clips per second of loaders and model. Frames are stored in config.cache_dir."""
    # the setup of a training run; one loader per number of workers
    splits = read_splits(Path(config.data_dir))
    model = build_model(config, len(splits.class_names))
    config = model.vision_encoder.fill_auto(config)
    accelerator = build_accelerator(config)
    splits, _, frames = prepare_data(splits, config, model, accelerator)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, config)
    loaders = {}
    for number in WORKERS:
        options = replace(config, num_workers=number)
        loaders[f"loader, {number} workers"] = build_loaders(model, options, splits)["train"]
        loaders[f"stored, {number} workers"] = build_loaders(model, options, splits, frames=frames)["train"]
    first = {k: v.to(accelerator.device) for k, v in next(iter(loaders["loader, 0 workers"])).items()}

    # a new epoch each time: the loader shuffles and jitters as in training
    cpu: dict[str, list[float]] = {name: [] for name in loaders}  # ms per clip, of this process

    def load(name: str) -> None:
        loaders[name].batch_sampler.epoch += 1
        took, _ = timed(lambda: [None for _ in loaders[name]])
        cpu[name].append(took / len(splits.train))

    def train() -> None:
        model.train()
        for _ in range(STEPS):
            with accelerator.autocast():
                loss, _, _ = loss_sum(model, first)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # .item() waits for the device
    @torch.inference_mode()
    def predict() -> None:
        model.eval()
        for _ in range(STEPS):
            loss_sum(model, first)[0].item()

    reading = {name: partial(load, name) for name in loaders}
    computing = {"model trains": train, "model predicts": predict}
    clips = dict.fromkeys(reading, len(splits.train)) | dict.fromkeys(computing, STEPS * len(first["index"]))
    seconds = alternate(reading | computing, rounds)  # the warm-up round starts the workers
    rates = {name: [clips[name] / s for s in values] for name, values in seconds.items()}
    threads = torch.get_num_threads()
    print(f"{len(splits.train)} clips of {config.num_frames} frames, {config.vision_model}, {threads} threads")
    for name, values in rates.items():
        alone = f"  {median(cpu[name][1:]):.2f} ms of CPU time per clip" if "0 workers" in name else ""
        print(f"{name:<20}{median(values):>8.1f} clips/s  ({min(values):.1f} to {max(values):.1f}){alone}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
