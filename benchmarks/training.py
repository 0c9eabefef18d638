"""Training clips per second: vidtune beside Hugging Face's Trainer on the same weights, clips, batch and precision.

    python -m benchmarks.training --data_dir synthetic_dataset --vision_model timesformer videomae --kind full lora frozen

Rows of every table:
    vidtune          the loop of main.py; with --kind frozen also reading features, cold (computed in the run)
                     and warm (computed before)
    Trainer sample   transformers.Trainer; its image processor on every clip in the loader, as its guide does
    Trainer batch    the same, with clips normalised batch by batch as tensors
Every run is a process of its own, and runs of one round alternate. `train` is clips per second of the training
phase (extraction of features included), `process` of the whole process. Medians, and the spread of the rounds.
MFU: floating-point operations of the model (torch's counter), per second, over the rate of a large matrix
product in the same precision on the same machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from config import fill_auto
from feature_cache import compute_missing

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("vidtune", "vidtune cold", "vidtune warm", "trainer_sample", "trainer_batch")
FLAGS = {"full": [], "lora": ["--use_lora_vision", "True"], "frozen": ["--freeze_visionbackbone", "True"]}
BATCH = 16


def peak_memory() -> float:
    """MB of the training process; its loader's workers, alike in all rows, are not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- one run, in its own process --------------------------------------------------------------------


def run_vidtune(row: str, args: argparse.Namespace) -> dict[str, float]:
    from build_model import build_model
    from config import parse
    from feature_cache import open_store, read_features
    from train_code import Engine, Progress, build_accelerator, build_loaders, build_optimizer, train_one_epoch
    from VLoader import read_splits

    flags = [
        "--data_dir",
        args.data_dir,
        "--vision_model",
        args.backbone,
        "--batch_size",
        str(BATCH),
        *FLAGS[args.kind],
    ]
    config, _ = parse([*flags, "--cache_dir", args.cache_dir, "--num_workers", str(args.num_workers)], "main")
    splits = read_splits(Path(config.data_dir))
    splits = replace(splits, val=[], test=[])
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    model = build_model(config, len(splits.class_names)).to(accelerator.device)
    config = fill_auto(config, model.vision_encoder.config.num_frames, model.vision_encoder.preprocessing.image_size)
    start, features = time.perf_counter(), None
    if row != "vidtune":
        store = open_store(model, config)
        compute_missing(store, model, splits, config, accelerator)
        features = read_features(store, splits, config)
    loader = build_loaders(model, config, splits, features)["train"]
    optimizer = accelerator.prepare(build_optimizer(model, config))
    engine = Engine(accelerator, optimizer, args.epochs * len(loader), 1, progress=Progress())
    for _ in range(args.epochs):
        result = train_one_epoch(model, loader, engine)
        engine.progress.next_epoch()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "clips": args.epochs * len(splits.train),
        "loss": result["loss"],
        "memory": peak_memory(),
    }


def trainer_model(folder: str, kind: str, num_classes: int) -> Any:
    """The published class, frozen by requires_grad or with LoRA by peft."""
    from transformers import AutoModelForVideoClassification

    from build_model import linear_layers

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

    layers = linear_layers(model.base_model)
    settings = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=layers, modules_to_save=["classifier"])
    return get_peft_model(model, settings)


def run_trainer(row: str, args: argparse.Namespace) -> dict[str, float]:
    """As the guide for video classification does it."""
    from transformers import AutoImageProcessor, Trainer, TrainingArguments

    from config import BACKBONES
    from pretrained import tiny_folder
    from readers import open_video
    from transforms import sample_indices
    from VLoader import read_splits

    folder = str(tiny_folder(args.backbone)) if args.backbone in BACKBONES else args.backbone
    splits = read_splits(Path(args.data_dir))
    model = trainer_model(folder, args.kind, len(splits.class_names))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    numbers = {name: number for number, name in enumerate(splits.class_names)}

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(splits.train)

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = splits.train[index]
            reader = open_video(sample.path)
            clip = reader.frames(sample_indices(len(reader), model.config.num_frames))
            if row == "trainer_sample":
                frames = [frame.permute(1, 2, 0).numpy() for frame in clip]
                clip = processor(frames, return_tensors="pt")["pixel_values"][0]
            return {"pixel_values": clip, "labels": numbers[sample.label]}

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        clips = torch.stack([item["pixel_values"] for item in items])
        if row == "trainer_batch":
            clips = (clips.float() * processor.rescale_factor - mean) / std
        return {"pixel_values": clips, "labels": torch.tensor([item["labels"] for item in items])}

    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=BATCH,
            num_train_epochs=args.epochs,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            save_strategy="no",
            report_to=[],
            logging_strategy="epoch",
            dataloader_num_workers=args.num_workers,
            dataloader_persistent_workers=args.num_workers > 0,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=Clips(), data_collator=collate)
        start = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "clips": args.epochs * len(splits.train),
        "loss": result.training_loss,
        "memory": peak_memory(),
    }


# -- the machine's limit ----------------------------------------------------------------------------


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a 2048 x 2048 matrix product, the best of 10."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        c = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    del c
    return best


def operations_per_clip(backbone: str, kind: str, num_classes: int) -> float:
    """Of one training step, forward and backward, divided by its clips."""
    from torch.utils.flop_counter import FlopCounterMode

    from build_model import build_model
    from config import parse

    config, _ = parse(["--vision_model", backbone, *FLAGS[kind]], "main")
    model = build_model(config, num_classes)
    encoder = model.vision_encoder
    clips = torch.zeros(2, encoder.config.num_frames, 3, *(2 * (encoder.preprocessing.image_size,)), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model(clips).sum().backward()
    return counter.get_total_flops() / 2


# -- the table --------------------------------------------------------------------------------------


def in_own_process(row: str, args: argparse.Namespace, backbone: str, kind: str, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training", "--row", row, "--backbone", backbone, "--kind", kind]
    command += [
        "--data_dir",
        args.data_dir,
        "--epochs",
        str(args.epochs),
        "--cache_dir",
        cache,
        "--num_workers",
        str(args.num_workers),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"error: {row}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}


def table(args: argparse.Namespace, backbone: str, kind: str) -> None:
    rows = [
        "trainer_sample",
        "trainer_batch",
        "vidtune",
        *(("vidtune cold", "vidtune warm") if kind == "frozen" else ()),
    ]
    rows = [row for row in rows if args.only is None or row in args.only]
    results: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as caches:
        for number in range(args.rounds):
            for row in rows:  # the warm row reads what the cold one of its round computed
                results[row].append(in_own_process(row, args, backbone, kind, os.path.join(caches, str(number))))
    flops = operations_per_clip(backbone, kind, 10)
    limit = matmul_rate(torch.device("cpu"), torch.float32)
    rate: Callable[[dict, str], float] = lambda r, key: r["clips"] / r[key]  # noqa: E731
    speeds = {row: [rate(r, "seconds") for r in results[row]] for row in rows}
    wholes = {row: median(rate(r, "process") for r in results[row]) for row in rows}
    print(
        f"\n{backbone}, {kind}: {args.epochs} epochs, batch {BATCH}, {args.rounds} rounds; {flops / 1e9:.2f} GFLOP a clip, matmul {limit / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'':<16}{'train':>9}{'spread':>16}{'x sample':>10}{'x batch':>9}{'process':>9}{'x sample':>10}{'memory MB':>11}{'MFU':>7}{'loss':>8}"
    )
    for row in rows:
        speed, spread = median(speeds[row]), f"{min(speeds[row]):.0f}-{max(speeds[row]):.0f}"
        against = {name: median(a / b for a, b in zip(speeds[row], speeds[name], strict=True)) for name in rows}
        memory, loss = (median(r[key] for r in results[row]) for key in ("memory", "loss"))
        mfu = "" if " " in row else f"{100 * speed * flops / limit:.0f} %"
        whole = wholes[row] / wholes.get("trainer_sample", float("nan"))
        print(
            f"{row:<16}{speed:>9.1f}{spread:>16}{against.get('trainer_sample', float('nan')):>10.2f}"
            f"{against.get('trainer_batch', float('nan')):>9.2f}{wholes[row]:>9.1f}{whole:>10.2f}{memory:>11.0f}{mfu:>7}{loss:>8.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="synthetic_dataset")
    parser.add_argument("--vision_model", nargs="+", default=["timesformer", "videomae"], help="short names or folders")
    parser.add_argument("--kind", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=ROWS, help="leave the other rows out")
    for hidden in ("--row", "--backbone", "--cache_dir"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)  # of one run in its own process
    args = parser.parse_args()
    if args.row:
        args.kind = args.kind[0]
        run = run_vidtune if args.row.startswith("vidtune") else run_trainer
        print(json.dumps(run(args.row, args)))
        return
    for backbone in args.vision_model:
        for kind in args.kind:
            table(args, backbone, kind)


if __name__ == "__main__":
    main()
