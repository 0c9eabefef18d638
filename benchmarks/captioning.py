"""Training speed of a captioner with a frozen vision backbone: from pixels, from cached features, and at best.

    python -m benchmarks.captioning --data_dir synthetic_dataset [training flags]

    pixels     main.py's training loop; the backbone encodes every clip in every epoch
    features   the same loop, reading from a filled feature cache
    ceiling    the same optimizer steps on batches in memory: no loader, no running sums, no progress bar
    unsorted   the ceiling without sorting the clips of an optimizer step by caption length. Sorting saves padding
               when --gradient_accumulation_steps splits a step into several batches
One round is one epoch of each, alternating in one process. Prints medians over the rounds; ratios are medians of
the ratios within a round.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import alternate
from build_model import VideoModel, build_model
from config import parse
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
    """The fraction of text positions that are padding."""
    masks = [batch["attention_mask"] for group in steps for batch in group]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def train_on(steps: list[list[dict]], model: VideoModel, accelerator: Any, optimizer: torch.optim.Optimizer) -> None:
    """main.py's optimizer steps and nothing else, so the gap to `features` is the cost of loader and loop."""
    model.train()
    for group in steps:
        # the loss of a step is the mean over all its targets, however many batches it is split into
        targets = sum(int((model.targets(batch) != -100).sum()) for batch in group)
        for batch in group:
            with accelerator.autocast():
                loss, _, _ = loss_sum(model, batch)
            accelerator.backward(loss / targets)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def print_rates(jobs: dict[str, Callable[[], None]], rounds: int, clips: int) -> None:
    """Runs the jobs in alternating rounds and prints their clips per second."""
    rates = {name: [clips / s for s in seconds] for name, seconds in alternate(jobs, rounds).items()}
    print(f"{'':<10}{'clips/s':>9}{'spread':>14}{'x pixels':>10}{'x ceiling':>11}")

    # ratios within a round are steadier than ratios of medians: both jobs of a pair met the same load
    for name, values in rates.items():
        ratios = [median(a / b for a, b in zip(values, rates[other], strict=True)) for other in ("pixels", "ceiling")]
        spread = f"{min(values):.0f}-{max(values):.0f}"
        print(f"{name:<10}{median(values):>9.1f}{spread:>14}{ratios[0]:>10.2f}{ratios[1]:>11.2f}")


def compare(argv: list[str], cache: str) -> None:
    """Builds model and loaders as main.py does, and times the four jobs. `cache` is a folder for the features."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captioning", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up")
    args, flags = parser.parse_known_args(argv)
    config, _ = parse([*JOB, *flags, "--cache_dir", cache], "main")

    # the same seed for every call, so that two versions of the code can be compared
    splits = read_splits(Path(config.data_dir))
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    model = build_model(config, len(splits.class_names)).to(accelerator.device)
    config = model.vision_encoder.fill_auto(config)

    # fill the feature cache before timing: the warm cache is what every epoch but the first reads
    store = open_store(model, config, accelerator)
    compute_missing(store, model, splits, config, accelerator)
    features = read_features(store, splits, config)

    # two loaders that differ only in where a clip comes from
    loaders = {
        "pixels": build_loaders(model, config, splits)["train"],
        "features": build_loaders(model, config, splits, features)["train"],
    }
    optimizer = accelerator.prepare(build_optimizer(model, config))
    accumulate = config.gradient_accumulation_steps
    progress = Progress(step=2)  # past the gradient checks of the first two steps
    engine = Engine(accelerator, optimizer, 10**9, accumulate, progress=progress)

    # the batches of the ceiling are read once, sorted and unsorted, and kept on the device
    unsorted = build_loaders(model, config, splits, features)["train"]
    unsorted.batch_sampler.length = None
    steps, unsorted_steps = (
        [[to_device(batch, accelerator.device) for batch in group] for group in groups_of(loader, accumulate)]
        for loader in (loaders["features"], unsorted)
    )

    # all jobs train the same model: its weights do not change the speed
    def loop(name: str) -> None:
        train_one_epoch(model, loaders[name], engine)
        engine.progress.next_epoch()

    # the padding is printed with the rates: it explains the gap between ceiling and unsorted
    jobs: dict[str, Callable[[], None]] = {
        "pixels": lambda: loop("pixels"),
        "features": lambda: loop("features"),
        "ceiling": lambda: train_on(steps, model, accelerator, optimizer),
        "unsorted": lambda: train_on(unsorted_steps, model, accelerator, optimizer),
    }
    padded, padded_unsorted = (f"{100 * padding(batches):.1f} %" for batches in (steps, unsorted_steps))
    print(
        f"{config.vision_model} + {config.language_model}: {len(splits.train)} clips, "
        f"batch {config.batch_size} x {accumulate}, "
        f"{padded} of the text positions are padding, {padded_unsorted} if unsorted"
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
