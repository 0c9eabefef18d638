"""Estimates what a training will take before it starts: with the vision backbone frozen, with LoRA, and in full.

python plan.py --data_dir my_clips --vision_model vjepa2 --weights hub

Each way is tried on some of the videos, in a process of its own, because peak memory belongs to a process. The measured
times are then scaled to all videos and epochs. Nothing is kept.
"""

import multiprocessing
import random
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, parse
from extras.shards import data_folder
from script import UserError, leave, script, silence

if TYPE_CHECKING:
    from runs import Run
    from VLoader import Key, Sample

TRIAL_SECONDS = 8.0  # of training steps; a frozen backbone's features are computed for as long
MIN_STEPS = 4  # even if they take longer
# how the vision backbone is trained: the flags of main.py that say so
MODES = {
    "frozen": {"freeze_visionbackbone": True, "use_lora_vision": False},
    "LoRA": {"freeze_visionbackbone": False, "use_lora_vision": True},
    "in full": {"freeze_visionbackbone": False, "use_lora_vision": False},
}


@dataclass(frozen=True)
class Estimate:
    """What one way of training takes. Times are in seconds."""

    epochs: int
    videos: str  # how many there are in each split
    memory: float  # peak, in MB: of the GPU, or of the process
    available: float  # in MB
    once: float  # before the first epoch: start, reading every video, features of a frozen backbone, stored frames
    epoch: float  # training and validation
    scores: float  # after the last epoch
    videos_per_second: float  # in training

    @property
    def total(self) -> float:
        return self.once + self.epochs * self.epoch + self.scores


# -- one trial --------------------------------------------------------------------------------------


def subset(samples: list["Sample"], count: int) -> list["Sample"]:
    """At most `count` samples, in random order: folders are sorted by class, and classes may differ in length."""
    return random.Random(0).sample(samples, min(count, len(samples)))


def try_training(config: Config, started: float) -> Estimate:
    """Runs a part of everything that a run does. `started` is when its process was started, as time.time() gives it.

    Raises UserError for anything that would stop a run, also for running out of memory.
    """
    from extras.frame_store import stored_splits
    from runs import memory_advice, prepare
    from scan import prepare_frames, without_unreadable
    from train_code import cast_frozen, peak_memory
    from VLoader import SPLITS

    data_folder(config.data_dir, config.output_dir)  # a remote one is not copied into the temporary folder
    with tempfile.TemporaryDirectory() as folder, memory_advice():
        run = prepare(replace(config, output_dir=folder, cache_dir=folder), Path(folder))
        cast_frozen(run.model, run.config, run.accelerator)
        start = time.time() - started

        # before the first epoch
        sizes = {name: len(getattr(run.splits, name)) for name in SPLITS}
        stored = stored_splits(run.splits, run.model, run.config)
        read, features, bad = time_reading(run, stored)
        tested = [s for s in subset(run.splits.val, 4 * run.config.batch_size) if s.key not in bad]
        run.splits = without_unreadable(run.splits, bad, run.config)
        if features is not None:
            trained = [s for s in run.splits.train if s.key in features]
            run.splits = replace(run.splits, train=trained, val=tested)
            run.features = {n: [features[s.key] for s in getattr(run.splits, n)] for n in ("train", "val")}
        if stored:
            run.splits = replace(run.splits, train=subset(run.splits.train, 8 * run.config.batch_size), val=tested)
            clock = time.perf_counter()
            run.splits, run.frames = prepare_frames(run.splits, stored, {}, run.config, run.model, run.accelerator)
            tested = run.splits.val
            storing = (time.perf_counter() - clock) / (len(run.splits.train) + len(tested))
            start += storing * (sizes["train"] + sizes["val"])

        # every epoch, and the end
        train = time_steps(run)
        run.splits = replace(run.splits, train=[], val=tested, test=[])
        validate, score, report = time_scores(run)
        memory = peak_memory(run.accelerator) or 0.0
        if features is not None and run.accelerator.device.type == "cpu":
            one = next(iter(features.values()))
            memory += (sum(sizes.values()) - len(features)) * one.nbytes / 2**20  # features are mapped into memory

    return Estimate(
        run.config.epochs,
        ", ".join(f"{count} {name}" for name, count in sizes.items()),
        memory,
        available_memory(run.accelerator),
        start + read * sum(sizes.values()),
        train * sizes["train"] + validate * sizes["val"],
        score * (sizes["val"] + sizes["test"]) + report,
        1 / train,
    )


def time_check(run: "Run", cached: tuple[str, ...], stored: tuple[str, ...]) -> tuple[float, dict["Key", str]]:
    """(Seconds per video to check that it can be read, {key: error} of those that cannot). A few come first, because
    the workers take time to start."""
    from scan import scan
    from VLoader import SPLITS

    chosen = {name: subset(getattr(run.splits, name), 128) for name in SPLITS}
    times, counts, bad = [], [], {}
    for part in (slice(32), slice(32, None)):
        splits = replace(run.splits, **{name: chosen[name][part] for name in SPLITS})
        clock = time.perf_counter()
        bad |= scan(splits, run.config, cached, stored)[1]
        times.append(time.perf_counter() - clock)
        counts.append(sum(len(getattr(splits, name)) for name in SPLITS))
    more = counts[1] - counts[0]
    return max(0.0, times[1] - times[0]) / more if more > 0 else sum(times) / sum(counts), bad


def time_reading(run: "Run", stored: tuple[str, ...]) -> tuple[float, dict["Key", Any] | None, dict["Key", str]]:
    """(Seconds per video to check it before training and, with a frozen backbone, to compute its features; these
    features by the samples' keys, or None; {key: error} of the unreadable ones). The check decodes no videos of
    `stored` splits."""
    from feature_cache import computed_features, use_cache
    from VLoader import SPLITS, distinct

    cached = SPLITS if use_cache(run.model, run.config) else ()
    seconds, bad = time_check(run, cached, stored)
    if not cached:
        return seconds, None, bad

    # features, first of val, which needs all of them; the first batch warms up and is not measured
    batch = run.config.batch_size
    samples = distinct(subset(run.splits.val, 4 * batch) + subset(run.splits.train, len(run.splits.train)))
    features: dict[Key, Any] = {}
    first = clock = time.perf_counter()
    for computed, errors in computed_features(run.model.vision_encoder, samples, run.config, run.accelerator):
        features |= {samples[index].key: value for index, value in computed}
        bad |= {samples[index].key: error for index, error in errors.items()}
        if len(features) <= batch:
            first = time.perf_counter()
        if len(features) >= 8 * batch and time.perf_counter() - clock > TRIAL_SECONDS:
            break
    measured = max(1, len(features) - batch)
    return seconds + (time.perf_counter() - first) / measured, features, bad


class Enough(Exception):  # noqa: N818, not an error
    """Enough steps were measured."""


def time_steps(run: "Run") -> float:
    """Seconds per video of training steps, with their loading."""
    from train_code import build_engine, train_one_epoch

    loader = run.loaders("train")["train"]
    engine = build_engine(run.model.to(run.accelerator.device), loader, run.config, run.accelerator)
    started = time.perf_counter()
    ends: list[float] = []  # of the steps of an epoch
    steps: list[float] = []  # seconds of all steps but the first of each epoch, which waits for the loader to start
    epochs: list[float] = []  # the ends of epochs

    def after_step() -> None:
        ends.append(time.perf_counter())
        if len(ends) > 1:
            steps.append(ends[-1] - ends[-2])
        if len(steps) >= MIN_STEPS and ends[-1] - started > TRIAL_SECONDS:
            raise Enough

    # a small dataset has few steps in an epoch, or only one
    engine.after_step = after_step
    try:
        while time.perf_counter() - started < TRIAL_SECONDS:
            ends.clear()
            train_one_epoch(run.model, loader, engine)
            engine.progress.next_epoch()
            epochs.append(time.perf_counter())
    except Enough:
        pass
    finally:
        loader.close()
    videos = min(run.config.batch_size * engine.accumulate, len(loader.dataset))
    warm = steps[len(steps) // 4 :]  # the first steps are slower
    if not warm:  # epochs of one step, of which the first is slower
        first, *others = epochs
        return ((epochs[-1] - first) / len(others) if others else first - started) / videos
    return sum(warm) / len(warm) / videos


def time_scores(run: "Run") -> tuple[float, float, float]:
    """Seconds per video to evaluate it after an epoch, and to score it at the end; seconds for the pictures."""
    from runs import report
    from train_code import evaluate, score_splits

    loader = run.loaders("val")["val"]
    count = len(loader.dataset)
    try:
        times = [time.perf_counter()]
        for _ in range(2):  # the first time warms up
            evaluate(run.model, loader, run.accelerator)
            times.append(time.perf_counter())
        loader.decode_again()
        metrics = score_splits(run.model, {"val": loader}, run.config, run.accelerator, run.folder)
        times.append(time.perf_counter())
        run.config = replace(run.config, controls=False)
        report(run, metrics | {"best_epoch": 1})
        times.append(time.perf_counter())
    finally:
        loader.close()
    return (times[2] - times[1]) / count, (times[3] - times[2]) / count, times[4] - times[3]


def available_memory(accelerator: Any) -> float:
    """Memory in MB: all of the GPU, or what is available on this machine."""
    import psutil
    import torch

    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory / 2**20
    return psutil.virtual_memory().available / 2**20


# -- a process for each -----------------------------------------------------------------------------


def try_in_process(config: Config) -> Estimate | str:
    """The estimate of a trial in a new process, or why there is none."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=send_trial, args=(config, time.time(), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # the process has ended without an answer: the system stops one that takes too much memory
        process.join()
        return f"the trial was killed (exit status {process.exitcode}), perhaps for want of memory"
    finally:
        process.join()


def send_trial(config: Config, started: float, sender: Connection) -> None:
    """Sends the estimate, or the message of an error that the user can fix."""
    try:
        with silence():
            answer: Estimate | str = try_training(config, started)
    except UserError as error:
        answer = str(error)
    sender.send(answer)


# -- the script -------------------------------------------------------------------------------------


def command(argv: list[str], mode: str) -> str:
    """The command that trains in this way: the flags as typed, but for those of the mode."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            name = word.removeprefix("--").split("=")[0]
            skip = name in MODES[mode]
        if not skip:
            kept.append(word)
    config, _ = parse(kept, "plan")  # config_file.yaml may set a mode too
    flags = [(f"--{name}", str(value)) for name, value in MODES[mode].items() if getattr(config, name) != value]
    return shlex.join(["python", "main.py", *kept, *chain.from_iterable(flags)])


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`"""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def table(estimates: dict[str, Estimate | str]) -> str:
    """One line per way of training."""
    lines = [
        f"{'backbone':<9}{'memory':>9}{'fits':>6}{'videos/s':>10}{'first':>9}{'epoch':>9}{'epochs':>8}{'in all':>9}"
    ]
    for mode, e in estimates.items():
        if isinstance(e, str):
            lines.append(f"{mode:<9}{e}")
            continue
        fits = "yes" if e.memory < e.available else "no"
        times = "".join(f"{duration(t):>9}" for t in (e.once, e.epoch))
        rate = f"{e.videos_per_second:,.0f}" if e.videos_per_second >= 10 else f"{e.videos_per_second:.2g}"
        lines.append(
            f"{mode:<9}{e.memory / 1024:>6.2f} GB{fits:>6}{rate:>10}{times}{e.epochs:>8}{duration(e.total):>9}"
        )
    return "\n".join(lines)


@script
def main(argv: list[str] | None = None) -> int:
    """Prints the estimates and the commands. Returns 1 if no way of training fits."""
    from tqdm import tqdm

    argv = sys.argv[1:] if argv is None else argv
    config, _ = parse(argv, "plan")
    estimates: dict[str, Estimate | str] = {}
    with tqdm(MODES, "trying", unit="way", leave=False) as bar:
        for mode in bar:
            bar.set_description(f"trying {mode}")
            estimates[mode] = try_in_process(replace(config, **MODES[mode]))

    # a mistake in the options or the data stops all three in the same way
    found = [e for e in estimates.values() if isinstance(e, Estimate)]
    if not found:
        raise UserError(str(next(iter(estimates.values()))))
    print(f"{found[0].videos} videos in {config.data_dir}; {found[0].available / 1024:.1f} GB of memory are free")
    print(table(estimates))
    print("first: start, reading every video, computing features or storing frames; in all: without early stopping\n")
    for mode, estimate in estimates.items():
        if isinstance(estimate, Estimate) and estimate.memory < estimate.available:
            print(f"{mode}: {command(argv, mode)}")
    return int(all(e.memory >= e.available for e in found))


if __name__ == "__main__":
    leave(main())
