"""Whether decoding keeps up: clips per second of the loader, by worker processes, beside what models consume.

    python -m benchmarks.loading --data_dir DIR [the flags of a training]

The loader gives batches as in training, and nobody reads them; the model trains on, and answers for, one batch
that is already in memory. Rounds alternate; medians.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from build_model import build_model
from config import UserError, parse
from main import resolve
from train_code import build_accelerator, build_loaders, build_optimizer, loss_sum
from VLoader import read_splits

WORKERS = (0, 1, 2)
STEPS = 4  # of the model in one round


def clips_per_second(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args, flags = parser.parse_known_args(argv)
    config, _ = parse(flags, "main")
    splits = read_splits(Path(config.data_dir))
    model = build_model(config, len(splits.class_names))
    config = resolve(config, model)
    accelerator = build_accelerator(config)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, config)
    loaders = {n: build_loaders(model, replace(config, num_workers=n), splits)["train"] for n in WORKERS}
    first = {k: v.to(accelerator.device) for k, v in next(iter(loaders[0])).items()}

    def load(workers: int) -> int:
        loaders[workers].batch_sampler.epoch += 1
        return sum(len(batch["index"]) for batch in loaders[workers])

    def train() -> int:
        model.train()
        for _ in range(STEPS):
            with accelerator.autocast():
                loss, _, _ = loss_sum(model, first)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return STEPS * len(first["index"])

    @torch.inference_mode()
    def answer() -> int:
        model.eval()
        for _ in range(STEPS):
            loss_sum(model, first)[0].item()
        return STEPS * len(first["index"])

    jobs = {f"loader, {n} workers": lambda n=n: load(n) for n in WORKERS} | {
        "model trains": train,
        "model answers": answer,
    }
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(args.rounds + 1):  # the first starts the workers and warms up
        for name, job in jobs.items():
            rate = clips_per_second(job)
            if number:
                rates[name].append(rate)
    print(
        f"{len(splits.train)} clips of {config.num_frames} frames, {config.vision_model}, {torch.get_num_threads()} threads"
    )
    for name, values in rates.items():
        print(f"{name:<20}{median(values):>8.1f} clips/s  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
