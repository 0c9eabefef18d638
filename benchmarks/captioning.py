"""Training clips per second of a captioner with a frozen vision backbone: from pixels, from features, and at most.

    python -m benchmarks.captioning --data_dir synthetic_dataset [the flags of a training]

    pixels     the loop of main.py, the backbone run on every clip of every epoch
    features   the same loop on a warm feature cache
    ceiling    the same optimizer steps on batches that lie in memory: no loader, no sums, no progress bar
    unsorted   the ceiling without sorting the clips of an optimizer step by the length of their captions, which
               changes what --gradient_accumulation_steps needs
Rounds of one epoch alternate in one process; medians, and the medians of the ratios within a round.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks import alternate
from build_model import build_model
from config import fill_auto, parse
from feature_cache import compute_missing, open_store, read_features
from script import UserError
from train_code import (
    Engine,
    Progress,
    build_accelerator,
    build_loaders,
    build_optimizer,
    groups_of,
    loss_sum,
    to_device,
    train_one_epoch,
)
from VLoader import read_splits

JOB = ["--use_vlm", "True", "--captioning", "True", "--freeze_visionbackbone", "True", "--use_lora_llm", "True"]


def padding(steps: list[list[dict[str, torch.Tensor]]]) -> float:
    masks = [batch["attention_mask"] for group in steps for batch in group]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def print_rates(jobs: dict[str, Callable[[], None]], rounds: int, clips: int) -> None:
    """Clips per second of each job, in alternating rounds."""
    rates = {name: [clips / s for s in seconds] for name, seconds in alternate(jobs, rounds).items()}
    print(f"{'':<10}{'clips/s':>9}{'spread':>14}{'x pixels':>10}{'x ceiling':>11}")
    for name, values in rates.items():
        against = [median(a / b for a, b in zip(values, rates[other], strict=True)) for other in ("pixels", "ceiling")]
        print(
            f"{name:<10}{median(values):>9.1f}{f'{min(values):.0f}-{max(values):.0f}':>14}{against[0]:>10.2f}{against[1]:>11.2f}"
        )


def compare(argv: list[str], cache: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captioning", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args, flags = parser.parse_known_args(argv)
    config, _ = parse([*JOB, *flags, "--cache_dir", cache], "main")
    splits = read_splits(Path(config.data_dir))
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    model = build_model(config, len(splits.class_names)).to(accelerator.device)
    config = fill_auto(config, model.vision_encoder.config.num_frames, model.vision_encoder.preprocessing.image_size)
    store = open_store(model, config)
    compute_missing(store, model, splits, config, accelerator)
    features = read_features(store, splits, config)
    loaders = {
        "pixels": build_loaders(model, config, splits)["train"],
        "features": build_loaders(model, config, splits, features)["train"],
    }
    optimizer = accelerator.prepare(build_optimizer(model, config))
    accumulate = config.gradient_accumulation_steps
    begun = Progress(step=2)  # past the checks of the first steps
    engine = Engine(accelerator, optimizer, 10**9, accumulate, progress=begun)
    unsorted = build_loaders(model, config, splits, features)["train"]
    unsorted.batch_sampler.length = None
    steps, unsorted_steps = (
        [[to_device(batch, accelerator.device) for batch in group] for group in groups_of(loader, accumulate)]
        for loader in (loaders["features"], unsorted)
    )

    def loop(name: str) -> None:
        train_one_epoch(model, loaders[name], engine)
        engine.progress.next_epoch()

    def ceiling(steps: list[list[dict]]) -> None:
        model.train()
        for group in steps:
            targets = sum(int((model.targets(batch) != -100).sum()) for batch in group)
            for batch in group:
                with accelerator.autocast():
                    loss, _, _ = loss_sum(model, batch)
                accelerator.backward(loss / targets)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    jobs: dict[str, Callable[[], None]] = {
        "pixels": lambda: loop("pixels"),
        "features": lambda: loop("features"),
        "ceiling": lambda: ceiling(steps),
        "unsorted": lambda: ceiling(unsorted_steps),
    }
    shares = [f"{100 * padding(found):.1f} %" for found in (steps, unsorted_steps)]
    print(
        f"{config.vision_model} + {config.language_model}: {len(splits.train)} clips, batch {config.batch_size} x {accumulate}, "
        f"{shares[0]} of the text positions are padding, unsorted {shares[1]}"
    )
    print_rates(jobs, args.rounds, len(splits.train))
    for loader in loaders.values():
        loader.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try:
            compare(sys.argv[1:], folder)
        except UserError as error:
            sys.exit(f"error: {error}")
