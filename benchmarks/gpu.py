"""The GPU in one command: vidtune beside transformers' Trainer, on the same clips, with backbones of published size.

    make gpu                                the tests that need a GPU, then this
    python -m benchmarks.gpu --minutes 6    only this; writes benchmarks/GPU.md, again after every cell

Weights are random, made from transformers' configurations. Each cell is timed for a few seconds after warm-up steps,
all in one process besides the loader's workers. Columns of the tables:
    vidtune              main.py's training step, or the computation of features, on clips from its loader
    synthetic            the same, on one batch that is on the GPU already
    Trainer, tuned       bf16, worker processes, clips normalised batch by batch, fused attention if there is one
    Trainer, documented  fp32, and the image processor on every clip in the main process, as in its guide
Without a GPU the same code runs with tiny models on the CPU, and all figures of the GPU are "not measured".
"""

import gc
import importlib.util
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, product, repeat
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import peft
import torch
import transformers
from accelerate.state import AcceleratorState

import dummy_data
from benchmarks.training import FLAGS, build_trainer, build_vidtune, matmul_rate, operations_per_clip
from config import ROOT
from feature_cache import features_of
from scan import prepare_data
from script import Parser, UserError, counted, replace_file, script
from train_code import build_engine, build_loaders, to_device, train_step
from vision import own_size
from VLoader import Splits, read_splits

GPU = torch.cuda.is_available()
# name -> transformers' class, fields in which its configuration differs from the default, clips per batch
MODELS: dict[str, tuple[str, dict[str, int], int]] = {
    "TimeSformer-base": ("TimesformerForVideoClassification", {}, 24),
    "VideoMAE-base": ("VideoMAEForVideoClassification", {}, 24),
    "V-JEPA 2 large": ("VJEPA2ForVideoClassification", {"frames_per_clip": 16}, 8),
}
TINY = {"num_frames": 4, "frames_per_clip": 4, "image_size": 32, "crop_size": 32, "patch_size": 8, "hidden_size": 48}
TINY |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_pooler_layers": 1}
TINY |= {"pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
# --kind of benchmarks/training.py -> rows of the tables
ROWS = {"full": ("full",), "lora": ("LoRA",), "frozen": ("frozen, extraction", "frozen, warm")}
COLUMNS = ("vidtune", "synthetic", "Trainer, tuned", "Trainer, documented")
# the most important cells first, because the time may run out
ORDER = [("full", "vidtune", "tuned"), ("lora", "vidtune", "tuned"), ("full", "documented"), ("lora", "documented")]
ORDER += [("frozen", "vidtune", "tuned"), ("frozen", "documented")]
REPEATS = 200  # of each clip in an epoch: a loader pauses at its end
MISSING = "not measured"


class Figures(NamedTuple):
    """What a window measured."""

    speed: float  # clips/s
    memory: float | None  # peak GPU memory in GB
    mfu: float | None = None  # model FLOPs utilisation; None for cached features, which skip the backbone


class Window(transformers.TrainerCallback):
    """Measures steps of `batch` clips for `seconds`, after those on batches that a loader may have read `ahead`."""

    def __init__(self, batch: int, seconds: float, ahead: int = 0):
        self.batch, self.seconds = batch, seconds
        self.steps, self.start = -3 - ahead, 0.0
        self.figures: Figures | None = None

    def is_over(self) -> bool:
        """To be called after every step."""
        self.steps += 1
        if self.steps <= 0:
            self.start = clock()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
        elif time.perf_counter() - self.start >= self.seconds:
            speed = self.steps * self.batch / (clock() - self.start)
            self.figures = Figures(speed, torch.cuda.max_memory_allocated() / 1e9 if GPU else None)
        return self.figures is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer."""
        control.should_training_stop = self.is_over()

    def measure(self, step: Callable[[dict], object], batches: Iterable[dict]) -> Figures | None:
        """Takes steps, each on the next batch, until the window is over."""
        for batch in batches:
            step(batch)
            if self.is_over():
                break
        return self.figures


def clock() -> float:
    """The time when the GPU has done all that it was asked to do: kernels run asynchronously."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def precision(column: str) -> torch.dtype:
    """What the model's arithmetic is in."""
    return torch.bfloat16 if GPU and column != COLUMNS[3] else torch.float32


# -- the cells --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What the cells share, and what they found."""

    folder: Path  # clips, and weights by the name of the model
    models: dict[str, tuple[str, dict[str, int], int]]
    seconds: float  # of a window
    workers: int  # processes that read clips
    limits: dict[torch.dtype, float]  # FLOP/s of a large matrix product
    flops: dict[tuple[str, str], float] = field(default_factory=dict)  # per clip, by model and row
    figures: dict[tuple[str, str, str], Figures] = field(default_factory=dict)  # by model, row, column

    def keep(self, figures: Figures | None, model: str, row: str, column: str) -> None:
        """Adds a cell, with its MFU."""
        if flops := self.flops.get((model, row)):
            figures = figures._replace(mfu=figures.speed * flops / self.limits[precision(column)])
        self.figures[model, row, column] = figures

    def run(self, model: str, kind: str, system: str) -> None:
        """Measures a model that is trained in this way, in vidtune or in the Trainer, "tuned" or "documented"."""
        # accelerate keeps the precision of a process, and the Trainer does not ask cuDNN to be deterministic
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.backends.cudnn.deterministic = False
        splits = replace(read_splits(self.folder / "clips"), val=[], test=[])
        if system == "vidtune":
            self.run_vidtune(model, kind, splits)
        else:
            self.run_trainer(model, kind, splits, f"Trainer, {system}")

    def run_trainer(self, model: str, kind: str, splits: Splits, column: str) -> None:
        """The Trainer has no cached features, so both frozen rows get the same speed."""
        documented, batch = column == COLUMNS[3], self.models[model][2]
        workers = 0 if documented else self.workers
        options = {"per_device_train_batch_size": batch, "dataloader_num_workers": workers, "num_train_epochs": 1000}
        options |= {"bf16": precision(column) == torch.bfloat16, "logging_strategy": "no", "disable_tqdm": True}
        options |= {"dataloader_prefetch_factor": 1} if workers else {}  # by default 2: twice the steps before a window
        splits = replace(splits, train=splits.train * REPEATS)
        output, weights = str(self.folder / "trainer"), str(self.folder / model)
        trainer = build_trainer(weights, kind, splits, documented, output, **options)
        window = Window(batch, self.seconds, ahead=workers)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(window)
        trainer.train()
        for row in ROWS[kind]:
            self.keep(window.figures, model, row, column)

    def run_vidtune(self, model: str, kind: str, splits: Splits) -> None:
        """vidtune on clips and on synthetic input, and with a frozen backbone also on cached features."""
        # two epochs: for one, main.py would not store the frames of video files
        flags = ["--data_dir", self.folder / "clips", "--output_dir", self.folder / "runs", "--epochs", "2"]
        flags += ["--vision_model", self.folder / model, "--batch_size", self.models[model][2], *FLAGS[kind]]
        flags = [*map(str, flags), "--num_workers", str(self.workers)]
        config, network, accelerator = build_vidtune(flags, len(splits.class_names))
        row, *warm_row = ROWS[kind]
        self.flops[model, row] = operations_per_clip(network)
        network.to(accelerator.device).train()
        splits, features, frames = prepare_data(splits, config, network, accelerator)
        splits, batch = replace(splits, train=splits.train * REPEATS), config.batch_size

        def extract(batch: dict) -> None:
            features_of(network.vision_encoder, batch["video"], config.token_grid, accelerator)

        def training_on(loader: Any) -> Callable[[dict], object]:
            engine = build_engine(network, loader, config, accelerator)

            def step(batch: dict) -> None:
                train_step(network, [batch], loader, engine)
                engine.read_reports(keep=1)  # as in main.py, where the GPU already works on the next step

            return step

        # the batch of the synthetic input is the loader's first
        with closing(build_loaders(network, config, splits, frames=repeated(frames))["train"]) as loader:
            step = extract if kind == "frozen" else training_on(loader)
            clips = chain.from_iterable(repeat(loader))
            there = repeat(to_device(next(clips), accelerator.device))
            self.keep(Window(batch, self.seconds).measure(step, there), model, row, COLUMNS[1])
            self.keep(Window(batch, self.seconds, ahead=2 * self.workers).measure(step, clips), model, row, COLUMNS[0])
        for row in warm_row:
            loader = build_loaders(network, config, splits, repeated(features))["train"]
            step, clips = training_on(loader), chain.from_iterable(repeat(loader))
            self.keep(Window(batch, self.seconds).measure(step, clips), model, row, COLUMNS[0])


def repeated(stored: dict[str, Any] | None) -> dict[str, Any]:
    """The stored frames or features of samples that are repeated."""
    return {name: replace(split, rows=np.tile(split.rows, REPEATS)) for name, split in (stored or {}).items()}


def measure(bench: Bench, deadline: float, save: Callable[[list[str]], None]) -> list[str]:
    """Measures all cells for which there is time, and saves after each. Returns the errors."""
    cells = [(model, kind, system) for kind, *systems in ORDER for model in bench.models for system in systems]
    failed, longest = [], 0.0
    for number, cell in enumerate(cells, start=1):
        start = time.monotonic()
        if start + longest > deadline:
            print(f"the time is up: the last {len(cells) - number + 1} of {len(cells)} cells are not measured")
            break
        try:
            bench.run(*cell)
        except Exception as error:  # the other cells can still be measured
            traceback.print_exc()
            failed.append(f"{', '.join(cell)}: {type(error).__name__}")
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - start)
        save(failed)
        print(f"{number} of {len(cells)}: {', '.join(cell)}, {time.monotonic() - start:.1f} s", flush=True)
    return failed


# -- what they need ---------------------------------------------------------------------------------


def clip_format() -> str:
    """mp4, of which main.py stores frames; without PyAV .pt files."""
    return "mp4" if importlib.util.find_spec("av") else "pt"


def write_clips(folder: Path) -> None:
    """Draws the clips. Raises UserError if that fails."""
    classes, videos, size = ("4", "16", "256") if GPU else ("2", "4", "40")
    argv = ["--classes", classes, "--videos_per_class", videos, "--val_per_class", "1", "--test_per_class", "1"]
    if dummy_data.main([*argv, "--size", size, "--format", clip_format(), "--output", str(folder)]):
        raise UserError("the clips could not be written")


def write_weights(folder: Path, class_name: str, fields: dict[str, int]) -> None:
    """Random weights of one of transformers' classes, and the preprocessing of its input."""
    model_class = getattr(transformers, class_name)
    with torch.device("cuda" if GPU else "cpu"):  # a CPU takes long to draw hundreds of millions of numbers
        model = model_class(model_class.config_class(**fields))
    model.save_pretrained(folder)
    size = own_size(model.config)
    values = {"image_processor_type": "VideoMAEImageProcessor", "do_resize": True, "size": {"shortest_edge": size}}
    values |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    values |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


# -- GPU.md -----------------------------------------------------------------------------------------


def shown(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form).replace("%", " %")


def cell(figures: Figures | None) -> str:
    if figures is None:
        return MISSING
    mfu = "" if figures.mfu is None else f", {shown(figures.mfu, '.1%')}"
    return f"{figures.speed:.1f}, {shown(figures.memory, '.1f')}{mfu}"


def ratio(bench: Bench, model: str, row: str, other: str) -> float | None:
    """The speed of vidtune as a multiple of another column's."""
    first, second = (bench.figures.get((model, row, column)) for column in (COLUMNS[0], other))
    return first.speed / second.speed if first and second else None


def table(bench: Bench, model: str) -> str:
    """The Markdown table of a model."""
    lines = ["| clips/s, GB, MFU |", "|---" * 8 + "|"]
    lines[0] += f" vidtune | {' | '.join(f'{name} | vidtune / {name.split()[-1]}' for name in COLUMNS[1:])} |"
    for row in (row for rows in ROWS.values() for row in rows):
        cells = [cell(bench.figures.get((model, row, COLUMNS[0])))]
        for other in COLUMNS[1:]:
            cells += [cell(bench.figures.get((model, row, other))), shown(ratio(bench, model, row, other), ".2f")]
        if row == "frozen, warm":  # it reads no pixels
            cells[1:3] = "", ""
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(bench: Bench) -> str:
    """What was aimed at, and what was reached: a Markdown table."""
    first, synthetic, tuned, documented = COLUMNS
    wanted = [(f"{first} / {tuned}", 1.0, ".2f", tuned), (f"{first} / {documented}", 1.5, ".2f", documented)]
    wanted += [
        ("MFU on synthetic input", 0.45, ".0%", None),
        ("MFU on clips / on synthetic input", 0.85, ".0%", synthetic),
    ]
    lines = ["| full and LoRA | at least | reached by | figures |", "|---|---|---|---|"]
    for text, least, form, other in wanted:
        found: dict[str, float | None] = {}
        for row, model in product(("full", "LoRA"), MODELS):
            figures = bench.figures.get((model, row, synthetic))
            value = ratio(bench, model, row, other) if other else figures and figures.mfu
            found[f"{model}, {row}"] = value
        values = [value for value in found.values() if value is not None]
        reached = f"{sum(value >= least for value in values)} of {len(values)}" if values else MISSING
        figures = "; ".join(f"{name} {shown(value, form)}" for name, value in found.items() if values)
        lines.append(f"| {text} | {shown(least, form)} | {reached} | {figures} |")
    return "\n".join(lines)


def report(bench: Bench, command: str, failed: list[str]) -> str:
    """GPU.md."""
    packages = ", ".join(f"{p.__name__} {p.__version__}" for p in (torch, transformers, accelerate, peft))
    machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if GPU else "no GPU"
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {str(t).split('.')[1]}" for t, rate in bench.limits.items())
    lines = [
        "# vidtune and transformers' Trainer on one GPU",
        f"`{command}`: {machine}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}.",
        "A cell has clips per second, peak GPU memory in GB, and MFU: the FLOP/s of the model divided by those of a large\n"
        f"matrix product in the same precision ({rates if GPU else MISSING}). Clips are synthetic, as {clip_format()}"
        f"{', and vidtune trains on stored frames of them (`--preread`)' * (clip_format() == 'mp4')}.\n"
        f"{counted(bench.workers, 'process', 'processes')} of a loader read clips, except in the column Trainer, documented.\n"
        "Weights are random. `python -m benchmarks.gpu --help` says what the columns are."
        f"{'' if GPU else ' The tables of tiny models only show that the code runs.'}",
        bars(bench),
    ]
    for model in MODELS | bench.models:
        lines += [f"## {model}", table(bench, model)]
    return "\n\n".join([*lines, *(f"failed: {error}" for error in failed)]) + "\n"


@script
def main(argv: list[str] | None = None) -> int:
    """Measures and writes GPU.md. Returns 1 if a cell failed."""
    start, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    parser = Parser("python -m benchmarks.gpu", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="time for all of it (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="seconds to time each cell (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "GPU.md", help="default: %(default)s")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *argv])

    # without a GPU, tiny models only test this code
    models = MODELS if GPU else {f"{name}, tiny, on the CPU": (c, TINY, 4) for name, (c, _, _) in MODELS.items()}
    device, workers = torch.device("cuda" if GPU else "cpu"), min(14, max(1, os.cpu_count() - 2)) if GPU else 0
    limits = {dtype: matmul_rate(device, dtype) for dtype in dict.fromkeys(map(precision, COLUMNS))}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), models, args.seconds, workers, limits)
        write_clips(bench.folder / "clips")
        for model, (class_name, fields, _) in models.items():
            write_weights(bench.folder / model, class_name, fields)

        def save(failed: list[str]) -> None:
            text = report(bench, command, failed)
            replace_file(args.output, lambda p: p.write_text(text, encoding="utf-8"))

        save([])
        failed = measure(bench, start + 60 * args.minutes, save)
    print(f"\n{args.output.read_text(encoding='utf-8')}\nwritten to {args.output}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
