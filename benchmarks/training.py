"""Training speed: vidtune against Hugging Face's Trainer, with the same weights, clips, batch size and precision.

    python -m benchmarks.training --data_dir synthetic_dataset --vision_model timesformer --kind full lora frozen

Rows of each table:
    vidtune          main.py's training loop on pixels. With --kind frozen also on cached features: cold (computed
                     during the run) and warm (computed before)
    trainer_sample   transformers.Trainer, with its image processor on every clip in the loader, as in its guide
    trainer_batch    the same, but clips are normalised as tensors, batch by batch
Each run has a separate process, and the rows of a round alternate. `train` is clips per second of training, including
feature extraction; `process` is clips per second of the whole process. Prints medians and the spread over the rounds.
MFU (model FLOPs utilisation): FLOPs per second of the model, by torch's counter, divided by those of a large matrix
product in the same precision on the same machine.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("vidtune", "vidtune cold", "vidtune warm", "trainer_sample", "trainer_batch")
# --kind -> flags of main.py
FLAGS = {"full": [], "lora": ["--use_lora_vision", "True"], "frozen": ["--freeze_visionbackbone", "True"]}
BATCH = 16


def peak_memory() -> float:
    """Peak memory of the training process in MB. Loader workers are not counted: all rows have the same ones."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- one run, in a separate process -----------------------------------------------------------------


def build_vidtune(flags: list[str], num_classes: int) -> tuple[Any, Any, Any]:
    """(options without `auto`, model, accelerator) as main.py makes them. The model is still on the CPU."""
    from build_model import build_model
    from config import parse
    from train_code import build_accelerator, cast_frozen

    config, _ = parse(flags, "main")
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    model = build_model(config, num_classes)
    cast_frozen(model, config, accelerator)
    return model.vision_encoder.fill_auto(config), model, accelerator


def run_vidtune(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains with main.py's loop. Returns seconds of training, clips trained on, last epoch's loss and peak memory."""
    from feature_cache import compute_missing, open_store, read_features
    from train_code import build_engine, build_loaders, train_one_epoch
    from VLoader import read_splits

    # only the training split: evaluation is not measured
    flags = ["--data_dir", args.data_dir, "--vision_model", args.backbone, "--batch_size", str(BATCH)]
    flags += [*FLAGS[args.kind], "--cache_dir", args.cache_dir, "--num_workers", str(args.num_workers)]
    splits = replace(read_splits(Path(args.data_dir)), val=[], test=[])
    config, model, accelerator = build_vidtune([*flags, "--epochs", str(args.epochs)], len(splits.class_names))
    model.to(accelerator.device)

    # the clock includes feature extraction, which is most of a cold run and nothing of a warm one
    start, features = time.perf_counter(), None
    if row != "vidtune":
        store = open_store(model, config, accelerator)
        compute_missing(store, model, splits, config, accelerator)
        features = read_features(store, splits, config)

    # the Trainer does not validate either, so both run nothing but training epochs
    loader = build_loaders(model, config, splits, features)["train"]
    engine = build_engine(model, loader, config, accelerator)
    for _ in range(args.epochs):
        train_one_epoch(model, loader, engine)
        loss = engine.progress.loss / engine.progress.count
        engine.progress.next_epoch()
    seconds = time.perf_counter() - start
    clips = args.epochs * len(splits.train)
    return {"seconds": seconds, "clips": clips, "loss": loss, "memory": peak_memory()}


def trainer_model(folder: str, kind: str, num_classes: int) -> Any:
    """The published model class as users of transformers train it: frozen by requires_grad, or with peft's LoRA."""
    from transformers import AutoModelForVideoClassification

    from build_model import linear_layers

    # the same initial head in every round
    torch.manual_seed(0)
    model = AutoModelForVideoClassification.from_pretrained(
        folder, num_labels=num_classes, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    if kind == "full":
        return model
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    if kind == "frozen":
        return model
    from peft import LoraConfig, get_peft_model

    # the same layers, rank and alpha as vidtune's adapters
    layers = linear_layers(model.base_model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=layers, modules_to_save=["classifier"])
    return get_peft_model(model, lora)


class TrainerClips(torch.utils.data.Dataset):
    """The training clips for transformers.Trainer. vidtune's reader and frame sampling, so that only preprocessing and
    the loop differ: `by_sample` the image processor gets each clip, otherwise they are normalised batch by batch."""

    def __init__(self, splits: Any, folder: str, model_config: Any, by_sample: bool):
        from transformers import VideoMAEImageProcessorPil

        from transforms import Preprocessing
        from vision import FAMILIES, own_frames, own_size

        self.samples, self.by_sample = splits.train, by_sample
        self.label_ids = {name: number for number, name in enumerate(splits.class_names)}
        self.num_frames, self.input = own_frames(model_config), FAMILIES[model_config.model_type].input
        # the class that all these folders name; AutoImageProcessor needed torchvision in some versions
        self.processor = VideoMAEImageProcessorPil.from_pretrained(folder)
        self.pixels = Preprocessing.from_dict(self.processor.to_dict(), own_size(model_config)).pixels
        values = self.processor.image_mean, self.processor.image_std
        self.mean, self.std = (torch.tensor(value).view(-1, 1, 1) for value in values)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from readers import open_video
        from transforms import sample_indices

        sample = self.samples[index]
        reader = open_video(sample.path)
        indices = sample_indices(len(reader), self.num_frames)
        if self.by_sample:
            frames = [frame.permute(1, 2, 0).numpy() for frame in reader.frames(indices)]
            clip = self.processor(frames, return_tensors="pt")["pixel_values"][0]  # [T, C, H, W]
        else:
            clip = reader.frames(indices, self.pixels)  # [T, C, H, W]
        return {"video": clip, "labels": self.label_ids[sample.label]}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch. Normalising all of it at once is the strongest simple variant of the guide."""
        clips = torch.stack([item["video"] for item in items])  # (B, T, C, H, W)
        if not self.by_sample:
            clips = (clips.float() * self.processor.rescale_factor - self.mean) / self.std
        return {self.input: clips, "labels": torch.tensor([item["labels"] for item in items])}


def build_trainer(folder: str, kind: str, splits: Any, by_sample: bool, output: str, **arguments: Any) -> Any:
    """transformers.Trainer as its video classification guide sets it up, with vidtune's schedule, and nothing saved or
    reported. `arguments` are more TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    fixed = {"output_dir": output, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    fixed |= {"save_strategy": "no", "report_to": [], "use_cpu": not torch.cuda.is_available()}
    fixed |= {"remove_unused_columns": False}  # there are none
    model = trainer_model(folder, kind, len(splits.class_names))
    clips = TrainerClips(splits, folder, model.config, by_sample)
    arguments = TrainingArguments(**fixed, **arguments)
    return Trainer(model=model, args=arguments, train_dataset=clips, data_collator=clips.collate)


def run_trainer(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains with transformers.Trainer. Returns the same as run_vidtune."""
    from config import BACKBONES
    from pretrained import tiny_folder
    from VLoader import read_splits

    # the same folder of weights, training clips, batch size and precision as vidtune
    folder = str(tiny_folder(args.backbone)) if args.backbone in BACKBONES else args.backbone
    splits = read_splits(Path(args.data_dir))
    same = {"per_device_train_batch_size": BATCH, "num_train_epochs": args.epochs, "bf16": torch.cuda.is_available()}
    same |= {"dataloader_num_workers": args.num_workers, "dataloader_persistent_workers": args.num_workers > 0}
    with tempfile.TemporaryDirectory() as output:
        by_sample = row == "trainer_sample"
        trainer = build_trainer(folder, args.kind, splits, by_sample, output, logging_strategy="epoch", **same)
        start = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - start
    clips = args.epochs * len(splits.train)
    return {"seconds": seconds, "clips": clips, "loss": result.training_loss, "memory": peak_memory()}


# -- the limit of the machine -----------------------------------------------------------------------


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of 10: what the machine can reach in practice."""
    # large enough to be limited by arithmetic, small enough to be quick
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        c = a @ b
        if device.type == "cuda":  # kernels run asynchronously
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    del c
    return best


def operations_per_clip(model: Any) -> float:
    """FLOPs of one training step of a vidtune model, forward and backward, per clip."""
    from torch.utils.flop_counter import FlopCounterMode

    # the meta device computes nothing, and there the counter sees attention too; on a CPU it does not
    model, encoder = copy.deepcopy(model).to("meta", torch.float32), model.vision_encoder
    size = encoder.preprocessing.image_size
    clips = torch.zeros(2, encoder.num_frames, 3, size, size, dtype=torch.uint8, device="meta")
    # two clips: a batch of one could take another code path. What masks leave out of packed attention is not counted
    with patch("extras.fused.TILE", 1), FlopCounterMode(display=False) as counter:
        model(clips).sum().backward()
    return counter.get_total_flops() / 2


# -- the table --------------------------------------------------------------------------------------


def run_in_process(row: str, args: argparse.Namespace, backbone: str, kind: str, cache: str) -> dict[str, float]:
    """One run in a new process. Returns what the run returns, and the seconds of the whole `process`."""
    # the child is this script with --row; it prints its result as the last line
    command = [sys.executable, "-m", "benchmarks.training", "--row", row, "--backbone", backbone, "--kind", kind]
    command += ["--data_dir", args.data_dir, "--epochs", str(args.epochs), "--cache_dir", cache]
    command += ["--num_workers", str(args.num_workers)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"error: {row}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}


def compare(args: argparse.Namespace, backbone: str, kind: str) -> None:
    """Runs all rows of one backbone and kind in alternating rounds and prints their table."""
    rows = ["trainer_sample", "trainer_batch", "vidtune"]
    rows += ["vidtune cold", "vidtune warm"] if kind == "frozen" else []
    rows = [row for row in rows if args.only is None or row in args.only]

    # a new cache in every round: its cold row computes the features, its warm row reads them
    results: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as caches:
        for number in range(args.rounds):
            for row in rows:
                results[row].append(run_in_process(row, args, backbone, kind, os.path.join(caches, str(number))))
    _, model, _ = build_vidtune(["--vision_model", backbone, *FLAGS[kind]], 10)
    flops = operations_per_clip(model)
    limit = matmul_rate(torch.device("cpu"), torch.float32)
    print_table(args, f"{backbone}, {kind}", results, flops, limit)


def print_table(
    args: argparse.Namespace, title: str, results: dict[str, list[dict[str, float]]], flops: float, limit: float
) -> None:
    """Prints a line per row. `flops` are those of one clip, `limit` is the FLOP/s of the machine."""
    speeds = {row: [r["clips"] / r["seconds"] for r in runs] for row, runs in results.items()}
    process_speeds = {row: median(r["clips"] / r["process"] for r in runs) for row, runs in results.items()}
    print(
        f"\n{title}: {args.epochs} epochs, batch {BATCH}, {args.rounds} rounds; "
        f"{flops / 1e9:.2f} GFLOP per clip, matmul {limit / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'':<16}{'train':>9}{'spread':>16}{'x sample':>10}{'x batch':>9}{'process':>9}{'x sample':>10}"
        f"{'memory MB':>11}{'MFU':>7}{'loss':>8}"
    )

    # ratios within a round, because both runs met the same load; rows left out by --only show as nan
    missing = float("nan")
    for row, runs in results.items():
        speed, spread = median(speeds[row]), f"{min(speeds[row]):.0f}-{max(speeds[row]):.0f}"
        ratios = {name: median(a / b for a, b in zip(speeds[row], speeds[name], strict=True)) for name in results}
        to_sample, to_batch = (ratios.get(name, missing) for name in ("trainer_sample", "trainer_batch"))
        memory, loss = (median(r[key] for r in runs) for key in ("memory", "loss"))
        mfu = "" if " " in row else f"{100 * speed * flops / limit:.0f} %"  # cached features skip the backbone
        to_sample_process = process_speeds[row] / process_speeds.get("trainer_sample", missing)
        print(
            f"{row:<16}{speed:>9.1f}{spread:>16}{to_sample:>10.2f}{to_batch:>9.2f}"
            f"{process_speeds[row]:>9.1f}{to_sample_process:>10.2f}{memory:>11.0f}{mfu:>7}{loss:>8.3f}",
            flush=True,
        )


def main() -> None:
    """Prints a table per backbone and kind. With --row it is the child process, which trains one run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="synthetic_dataset", help="data folder with training videos")
    parser.add_argument("--vision_model", nargs="+", default=["timesformer", "videomae"], help="short names or folders")
    parser.add_argument("--kind", nargs="+", choices=FLAGS, default=list(FLAGS), help="how the backbone is trained")
    parser.add_argument("--epochs", type=int, default=10, help="epochs per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per row")
    parser.add_argument("--num_workers", type=int, default=2, help="loader workers of every run")
    parser.add_argument("--only", nargs="+", choices=ROWS, help="run only these rows")
    for hidden in ("--row", "--backbone", "--cache_dir"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)  # for the child process
    args = parser.parse_args()

    # the child prints one line of JSON, which run_in_process reads
    if args.row:
        args.kind = args.kind[0]
        run = run_vidtune if args.row.startswith("vidtune") else run_trainer
        print(json.dumps(run(args.row, args)))
        return
    for backbone in args.vision_model:
        for kind in args.kind:
            compare(args, backbone, kind)


if __name__ == "__main__":
    main()
