"""Can the loader keep up? Clips per second of the loader, by number of workers, and of the model that consumes them.

    python -m benchmarks.loading --data_dir DIR [training flags]

The loader yields batches as in training, and they are thrown away. The model trains and predicts on one batch that is
already in memory. Rounds alternate. Prints medians and ranges.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import alternate
from build_model import build_model
from config import parse
from script import UserError
from train_code import build_accelerator, build_loaders, build_optimizer, loss_sum
from VLoader import read_splits

WORKERS = (0, 1, 2)
STEPS = 4  # model steps per round


def main(argv: list[str]) -> None:
    """Builds model and loaders as main.py does, times both and prints clips per second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up")
    args, flags = parser.parse_known_args(argv)
    config, _ = parse(flags, "main")

    # the setup of a training run; one loader per number of workers
    splits = read_splits(Path(config.data_dir))
    model = build_model(config, len(splits.class_names))
    config = model.vision_encoder.fill_auto(config)
    accelerator = build_accelerator(config)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, config)
    loaders = {n: build_loaders(model, replace(config, num_workers=n), splits)["train"] for n in WORKERS}
    first = {k: v.to(accelerator.device) for k, v in next(iter(loaders[0])).items()}

    # a new epoch each time: the loader shuffles and jitters as in training
    def load(workers: int) -> None:
        loaders[workers].batch_sampler.epoch += 1
        for _ in loaders[workers]:
            pass

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

    reading = {f"loader, {n} workers": lambda n=n: load(n) for n in WORKERS}
    computing = {"model trains": train, "model predicts": predict}
    clips = dict.fromkeys(reading, len(splits.train)) | dict.fromkeys(computing, STEPS * len(first["index"]))
    seconds = alternate(reading | computing, args.rounds)  # the warm-up round starts the workers
    rates = {name: [clips[name] / s for s in values] for name, values in seconds.items()}
    threads = torch.get_num_threads()
    print(f"{len(splits.train)} clips of {config.num_frames} frames, {config.vision_model}, {threads} threads")
    for name, values in rates.items():
        print(f"{name:<20}{median(values):>8.1f} clips/s  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
