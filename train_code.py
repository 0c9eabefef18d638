"""Trains a model and evaluates it: the loop, the schedule, the optimizer, the checks of the first steps.

val selects the best epoch; test is read once, at the end. Evaluation sums over what was really seen.
"""

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import Augment
from build_model import VideoModel, adapters, body_of, trained_tensors
from checkpoint import STATE, load_state, load_weights, save_state, save_weights
from config import Config, default_rates
from metrics import attribute_summary, attributes_in, caption_scores, label_scores, with_intervals
from script import UserError, keep_freed_memory, make_folder, write_rows
from VLoader import SPLITS, ClipDataset, EpochBatches, Splits, build_loader

WARMUP = 0.1  # share of all steps
# weight decay is for weight matrices: it would blur CLS, position and time embeddings
NO_DECAY = re.compile(r"\.lora_|cls_token|position|time_embedding|rel_embeddings|\bwpe\b")


# -- schedule and optimizer -------------------------------------------------------------------------


def lr_at(step: int, total: int, peak: float) -> float:
    """The learning rate of optimizer step `step` of `total`: linear warmup over a tenth, then cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def layers_above(backbone: nn.Module) -> dict[str, int]:
    """For every tensor of a backbone how many layers lie above it, its own included: 1 in the last layer, one more
    than there are layers for what comes before them, 0 for what follows (BEiT, arXiv:2106.08254)."""
    lists = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    prefix, layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    above = {}
    for path, module in backbone.named_modules():
        for name, _ in module.named_parameters(path, recurse=False):
            place = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
            embeds = isinstance(module, nn.Embedding) or re.search(r"embed(?!_out)|project_in", name)
            above[name] = len(layers) - int(place[1]) if place else (len(layers) + 1 if embeds else 0)
    return above


def build_optimizer(model: VideoModel, config: Config) -> torch.optim.AdamW:
    """AdamW: decay on weights of two or more dimensions, none on adapters and on what marks a place; every part by
    its own rate.

    Every group carries `peak_lr`; `lr_at` of it is set before each step.
    """
    _, scales = default_rates(config)
    scale_of = {}
    for part, backbone in model.backbones().items():
        above = layers_above(backbone)
        scale_of |= {id(p): scales[part] * config.layer_decay ** above[n] for n, p in backbone.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_tensors(model).items():
        decay = config.weight_decay if parameter.ndim >= 2 and not NO_DECAY.search(name) else 0.0
        peak = config.learning_rate * scale_of.get(id(parameter), scales["new layers"])
        groups.setdefault((decay, peak), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "peak_lr": peak} for (decay, peak), p in groups.items()],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


# -- one epoch --------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818, no error
    """Training was stopped by the signal `number`, after its state was saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number


@dataclass
class Progress:
    """How far a run is: all that resuming needs beside tensors and random generators. JSON."""

    epoch: int = 0  # the epoch under way, from 0
    step: int = 0  # optimizer steps taken in all
    groups: int = 0  # batches / accumulation steps done in this epoch
    loss: float = 0.0  # sums over this epoch's targets
    count: int = 0
    right: int = 0
    seconds: float = 0.0  # spent training in this epoch
    best: tuple[float, ...] | None = None  # rank of the best epoch
    skipped: list[str] = field(default_factory=list)  # what was wrong with the videos left out so far
    log: list[dict[str, Any]] = field(default_factory=list)

    def next_epoch(self) -> None:
        self.epoch += 1
        self.groups, self.loss, self.count, self.right, self.seconds = 0, 0.0, 0, 0, 0.0


@dataclass
class Engine:
    """What the loop needs beside model and data; `accelerator` owns device and precision."""

    accelerator: Any
    optimizer: torch.optim.Optimizer
    total_steps: int
    accumulate: int
    progress: Progress = field(default_factory=Progress)
    label_smoothing: float = 0.0
    augment: Callable[[dict], dict] = lambda batch: batch
    after_step: Callable[[], None] = lambda: None  # saves, and raises Stopped


def build_accelerator(config: Config) -> Any:
    """The accelerator of `config`. Raises UserError if the device or precision is not to be had."""
    from accelerate import Accelerator

    device = config.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable NVIDIA GPU; --device auto takes what there is")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; --device auto takes what there is")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    if precision == "fp16" and not on_gpu:
        raise UserError("--mixed_precision fp16 needs an NVIDIA GPU; bf16 or no work everywhere")
    accelerator = Accelerator(cpu=device == "cpu" or (not on_gpu and "RANK" in os.environ), mixed_precision=precision)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


# -- several processes: every one takes its share of each batch; sums and gradients are added up ----------


def summed(accelerator: Any, *values: float) -> list[float]:
    """Each value's sum over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum").tolist()


def gathered(accelerator: Any, rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    if accelerator.num_processes == 1:
        return rows
    from accelerate.utils import gather_object

    return gather_object(rows)


def sum_gradients(model: VideoModel, accelerator: Any) -> None:
    """Adds up the gradients of all processes; one whose share of the batch was empty adds nothing.

    With the losses divided by the targets of all processes this is the gradient of the whole batch, the same on
    every process to the bit, whatever tensors a step leaves unused.
    """
    if accelerator.num_processes == 1:
        return
    parameters = list(trained_tensors(model).values())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def loss_sum(
    model: VideoModel, batch: dict[str, torch.Tensor], smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed cross-entropy, logits (..., classes or V), targets (...)) of a batch; -100 does not count.

    Of a mixed clip both labels count, each by its share of the clip.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "mixed_labels", "mix", "index")}
    logits = model.scores(**inputs)
    targets = model.targets(batch)

    def losses(truth: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2), truth.flatten(), reduction="none", label_smoothing=smoothing)

    loss = losses(targets)
    if "mix" in batch:
        loss = batch["mix"] * loss + (1 - batch["mix"]) * losses(batch["mixed_labels"])
    return loss.sum(), logits, targets


def groups_of(loader: DataLoader, size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The loader's batches in lists of `size`, the last perhaps shorter: one list per optimizer step. Batches
    without any readable video are left out of their list."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield [batch for batch in group if batch is not None]


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def train_one_epoch(model: VideoModel, loader: DataLoader, engine: Engine) -> dict[str, float]:
    """The rest of the epoch under way. A step's loss is the mean over all targets of its batches, however
    many they are. Raises UserError for a loss that is not finite, naming step and files."""
    model.train()
    optimizer, progress = engine.optimizer, engine.progress
    loader.batch_sampler.epoch = progress.epoch
    loader.batch_sampler.start = progress.groups * engine.accumulate
    clock = time.perf_counter()
    with tqdm(
        groups_of(loader, engine.accumulate),
        initial=progress.groups,
        total=-(-len(loader) // engine.accumulate),
        desc=f"epoch {progress.epoch + 1}",
        leave=False,
        unit="step",
    ) as bar:
        for group in bar:
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr_at(progress.step, engine.total_steps, param_group["peak_lr"])
            if accumulate_gradients(model, group, loader, engine):
                optimizer_step(model, engine)
            progress.groups += 1
            progress.seconds, clock = progress.seconds + time.perf_counter() - clock, time.perf_counter()
            bar.set_postfix(loss=f"{progress.loss / max(1, progress.count):.3f}", refresh=False)
            engine.after_step()
    return {"loss": progress.loss / progress.count, "accuracy": progress.right / progress.count}


def optimizer_step(model: VideoModel, engine: Engine) -> None:
    """Clips the gradients, steps, and checks the first two steps."""
    sum_gradients(model, engine.accelerator)
    engine.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with first_steps_checked(model, engine.progress.step):
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    engine.progress.step += not engine.accelerator.optimizer_step_was_skipped  # fp16 skips steps that overflow


def accumulate_gradients(model: VideoModel, group: list[dict], loader: DataLoader, engine: Engine) -> bool:
    """Backward of one optimizer step's batches; adds to the epoch's sums. Whether there was anything to learn."""
    accelerator, progress = engine.accelerator, engine.progress
    group = [engine.augment(to_device(batch, accelerator.device)) for batch in group]
    (targets,) = summed(accelerator, sum(int((model.targets(batch) != -100).sum()) for batch in group))
    sums = [0.0, 0, 0]  # loss, targets, right ones
    for batch in group:
        with accelerator.autocast():
            loss, logits, truth = loss_sum(model, batch, engine.label_smoothing)
        if not torch.isfinite(loss):
            files = [str(loader.dataset.samples[i].path) for i in batch["index"].tolist()]
            raise UserError(f"the loss is {loss.item()} at step {progress.step}; the batch: {', '.join(files)}")
        accelerator.backward(loss / targets)
        sums[0] += loss.item()
        sums[1] += int((truth != -100).sum())
        sums[2] += int((logits.argmax(-1) == truth).sum())
    loss, count, right = summed(accelerator, *sums)
    progress.loss, progress.count, progress.right = progress.loss + loss, progress.count + count, progress.right + right
    return targets > 0


class first_steps_checked:  # noqa: N801, used as a context like torch.no_grad
    """Around the first two optimizer steps: every trained tensor has a gradient, every adapter is live
    (lora_B in step 0, lora_A in step 1, since B starts at zero), and no frozen tensor moves.

    Raises UserError naming the tensor.
    """

    def __init__(self, model: VideoModel, step: int):
        self.active = step < 2
        self.model, self.step = model, step

    def __enter__(self) -> None:
        if not self.active:
            return
        for name, parameter in trained_tensors(self.model).items():
            if parameter.grad is None:
                raise UserError(f"{name} is to be trained but gets no gradient")
        half = ("lora_B", "lora_A")[self.step]
        for name, adapter in adapters(self.model):
            if not any(p.grad.abs().max() > 0 for p in getattr(adapter, half).parameters()):
                raise UserError(f"the adapter {name} is dead: no gradient reaches its {half}")
        self.frozen = {n: (p, p._version) for n, p in self.model.named_parameters() if not p.requires_grad}

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self.active or kind is not None:
            return
        for name, (parameter, version) in self.frozen.items():
            if parameter.grad is not None or parameter._version != version:
                raise UserError(f"{name} is frozen but was changed by the optimizer")


# -- evaluation -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: VideoModel, loader: DataLoader, accelerator: Any, desc: str = "val") -> dict[str, Any]:
    """Mean loss over all targets, and count; for classifiers accuracy, and of every clip `truth` (n,), the
    likeliest classes `ranked` (n, min(5, K)) and their `probabilities`, best first."""
    model.eval()
    total, count = 0.0, 0
    rows: list[tuple] = []  # place, and for classifiers true class, likeliest ones, their probabilities
    for batch in tqdm(loader, desc=desc, leave=False, unit="batch"):
        if batch is None:  # this process's share of a small last batch
            continue
        batch = to_device(batch, accelerator.device)
        with accelerator.autocast():
            loss, logits, targets = loss_sum(model, batch)
        total += loss.item()
        count += int((targets != -100).sum())
        columns = [batch["index"].tolist()]
        if targets.ndim == 1:
            best = logits.softmax(-1).topk(min(5, logits.shape[-1]))
            columns += [targets.tolist(), best.indices.tolist(), best.values.tolist()]
        rows += zip(*columns, strict=True)
    total, count = summed(accelerator, total, count)
    seen, *columns = zip(*sorted(gathered(accelerator, rows)), strict=True)
    if list(seen) != list(range(len(loader.dataset))):
        raise AssertionError(f"{desc}: {len(seen)} clips evaluated, the split has {len(loader.dataset)}")
    result: dict[str, Any] = {"loss": total / count, "count": len(seen)}
    if columns:
        truth, ranked, probabilities = map(np.array, columns)
        result |= {"accuracy": float((ranked[:, 0] == truth).mean())}
        result |= {"truth": truth, "ranked": ranked, "probabilities": probabilities}
    return result


@torch.no_grad()
def caption_all(model: VideoModel, loader: DataLoader, accelerator: Any, config: Config) -> list[str]:
    """The generated caption of every sample, in their order."""
    model.eval()
    captions: dict[int, str] = {}
    for batch in tqdm(loader, desc="captions", leave=False, unit="batch"):
        if batch is None:
            continue
        batch = to_device(batch, accelerator.device)
        with accelerator.autocast():
            texts = model.generate(batch["video"], config.max_new_tokens, config.num_beams)
        captions |= dict(zip(batch["index"].tolist(), texts, strict=True))
    captions = dict(gathered(accelerator, list(captions.items())))
    return [captions[i] for i in range(len(loader.dataset))]


def score_captions(captions: list[str], dataset: ClipDataset) -> dict[str, Any]:
    """Bleu, ROUGE-L, CIDEr, exact match and, where the data set has a lexicon, the share of captions that name each
    attribute rightly."""
    scores: dict[str, Any] = caption_scores(captions, [s.captions for s in dataset.samples])
    if dataset.lexicon and all(s.attributes.keys() == dataset.lexicon.keys() for s in dataset.samples):
        named = [attributes_in(caption, dataset.lexicon) for caption in captions]
        summary = attribute_summary(named, [s.attributes for s in dataset.samples])
        scores["attributes"] = with_intervals(summary, len(captions))
    return scores


def final_scores(
    model: VideoModel, loader: DataLoader, accelerator: Any, config: Config, split: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what metrics.json says of a split, a row for each of its clips); after training the test split is read here
    and nowhere else."""
    result = evaluate(model, loader, accelerator, desc=split)
    dataset = loader.dataset
    if config.captioning:
        captions = caption_all(model, loader, accelerator, config)
        rows = [
            {"file": str(s.path), "caption": c, "references": list(s.captions)}
            for s, c in zip(dataset.samples, captions, strict=True)
        ]
        return result | score_captions(captions, dataset), rows
    truth, ranked, probabilities = (result.pop(name) for name in ("truth", "ranked", "probabilities"))
    names = list(dataset.class_index)
    rows = [
        {
            "file": str(sample.path),
            "truth": names[t],
            "label": names[best[0]],
            "score": round(p[0], 4),
            "top_k": [{"label": names[k], "score": round(q, 4)} for k, q in zip(best, p, strict=True)],
        }
        for sample, t, best, p in zip(dataset.samples, truth, ranked.tolist(), probabilities.tolist(), strict=True)
    ]
    return result | label_scores(truth, ranked, probabilities[:, 0], names), rows


# -- the run ----------------------------------------------------------------------------------------


def build_loaders(
    model: VideoModel, config: Config, splits: Splits, features: dict[str, Any] | None = None, accelerator: Any = None
) -> dict[str, DataLoader]:
    """A loader for every split that has samples; `config` has no auto. Splits in `features` are read from these. With an
    `accelerator` of several processes, each takes its part of every batch."""
    loaders, features = {}, features or {}
    for name in (n for n in SPLITS if getattr(splits, n)):
        train = name == "train"
        dataset = ClipDataset(
            getattr(splits, name),
            model.vision_encoder.preprocessing,
            config.num_frames,
            config.frame_stride,
            splits.class_names,
            splits.lexicon,
            train,
            config.seed,
            views=(config.test_clips, config.test_crops) if name == "test" else (1, 1),
            features=features.get(name),
        )
        batches = EpochBatches(dataset, config.batch_size)
        if accelerator is not None:
            batches.rank, batches.world_size = accelerator.process_index, accelerator.num_processes
        skipping = {}
        if train:
            batches.balance = config.class_balance
            batches.group = config.gradient_accumulation_steps if config.captioning else 1
            # the scan has read all frames of evaluation; the jitter of training may still find a bad one
            skipping = {"skip_unreadable": config.skip_unreadable, "skipped": splits.unreadable}
        workers = 0 if name in features else config.num_workers  # for features, workers cost more than they save
        loaders[name] = build_loader(dataset, model.collator(), workers, batches, **skipping)
    return loaders


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"train loss {row['train_loss']:.3f}", f"val loss {row['val_loss']:.3f}"]
    if "val_accuracy" in row:
        parts.append(f"val accuracy {100 * row['val_accuracy']:.1f} %")
    return "  ".join([*parts, f"{row['seconds']:.1f} s", *(["best so far"] if row["best"] else [])])


@contextmanager
def stop_signals() -> Generator[list[int]]:
    """A list that SIGINT and SIGTERM append to, instead of ending the process; a second SIGINT interrupts."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if number in seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield seen
        return
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, accelerator: Any, run_dir: Path
) -> dict[str, Any]:
    """Trains to config.epochs, keeps the epoch that is best on val, tests it once, writes log and predictions.

    With config.resume it goes on from the run's saved state, bit for bit as if it had not been stopped.
    Returns what metrics.json will hold, and the log.

    Raises:
        UserError: a loss that is not finite, a dead adapter, a video that cannot be read, a full disk.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    started = time.perf_counter()
    model.to(accelerator.device)
    if config.compile:
        for backbone in model.backbones().values():
            body_of(backbone).compile()  # in place: names of tensors stay
    steps = config.epochs * -(-len(loaders["train"]) // config.gradient_accumulation_steps)
    optimizer = accelerator.prepare(build_optimizer(model, config))
    engine = Engine(
        accelerator,
        optimizer,
        steps,
        config.gradient_accumulation_steps,
        label_smoothing=config.label_smoothing,
        augment=Augment(config.augment, config.flip),
    )
    if config.resume and (run_dir / STATE).exists():  # else it was stopped before anything was saved
        engine.progress = resumed_progress(model, engine, config.epochs, run_dir)
        loaders["train"].skipped.update(engine.progress.skipped)
        if accelerator.is_main_process:
            write_rows(engine.progress.log, run_dir / "log.jsonl")
    with stop_signals() as signals:

        def save_or_stop(due: bool) -> None:
            (stopped,) = summed(accelerator, len(signals))  # all processes stop behind the same step
            if stopped or due:
                save_progress(model, loaders["train"], engine, run_dir)
            if stopped:
                raise Stopped(signals[0] if signals else signal.SIGTERM)

        engine.after_step = lambda: save_or_stop(
            config.save_every > 0 and engine.progress.step % config.save_every == 0
        )
        while engine.progress.epoch < config.epochs and not out_of_patience(engine.progress.log, config.patience):
            one_epoch(model, loaders, engine, config, run_dir)
            engine.progress.next_epoch()
            save_or_stop(due=True)
    if engine.progress.epoch < config.epochs:
        print(f"stopped after epoch {engine.progress.epoch}: val has not improved for {config.patience} epochs")
    metrics = test_best(model, loaders, config, accelerator, run_dir)
    metrics["skipped"] = engine.progress.skipped
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    log = engine.progress.log
    metrics["peak_mb"] = peak_memory(accelerator)
    metrics["device"] = device_name(accelerator)
    metrics["seconds_per_epoch"] = round(sum(row["seconds"] for row in log) / len(log), 2)
    return metrics | {"log": log}


def resumed_progress(model: VideoModel, engine: Engine, epochs: int, run_dir: Path) -> Progress:
    """Restores the saved state. Raises UserError if it is not one of this run."""
    accelerator = engine.accelerator
    values = load_state(run_dir, model, engine.optimizer, accelerator.process_index, accelerator.num_processes)
    try:
        progress = Progress(**values)
        fits = values.keys() == asdict(progress).keys()
        counts = (progress.epoch, progress.step, progress.groups, progress.count, progress.right)
        fits = fits and progress.epoch <= epochs and progress.step <= engine.total_steps and min(counts) >= 0
        fits = fits and progress.groups * epochs <= engine.total_steps and len(progress.log) == progress.epoch
    except TypeError:
        fits = False
    if not fits:
        raise UserError(f"{run_dir / STATE} holds no state of this run")
    return progress


def device_name(accelerator: Any) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} {accelerator.device.type.upper()} thread{'s' if threads > 1 else ''}"


def peak_memory(accelerator: Any) -> float | None:
    """MB: of this process, its loader's workers not counted, or on a GPU of that; None where it is not told."""
    if accelerator.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def all_skipped(loader: DataLoader, accelerator: Any) -> list[str]:
    """What was wrong with the videos that any process left out."""
    return sorted({cause for causes in gathered(accelerator, [sorted(loader.skipped)]) for cause in causes})


def save_progress(model: VideoModel, loader: DataLoader, engine: Engine, run_dir: Path) -> None:
    """Writes what --resume needs, with every process's random generator."""
    accelerator, progress = engine.accelerator, engine.progress
    progress.skipped = all_skipped(loader, accelerator)
    random = dict(gathered(accelerator, [(accelerator.process_index, torch.get_rng_state())]))
    if accelerator.is_main_process:
        save_state(run_dir, model, engine.optimizer, asdict(progress), random)


def one_epoch(model: VideoModel, loaders: dict[str, DataLoader], engine: Engine, config: Config, run_dir: Path) -> None:
    """Trains the epoch under way to its end, evaluates on val, saves the weights if they are the best, logs."""
    progress = engine.progress
    trained = train_one_epoch(model, loaders["train"], engine)
    seconds = progress.seconds
    val = evaluate(model, loaders["val"], engine.accelerator)
    rank = (val.get("accuracy", 0.0), -val["loss"])
    row = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": trained["loss"], "val_loss": val["loss"]}
    if "accuracy" in val:
        row |= {"train_accuracy": trained["accuracy"], "val_accuracy": val["accuracy"]}
    row["best"] = progress.best is None or rank > tuple(progress.best)
    row |= {
        "skipped": len(all_skipped(loaders["train"], engine.accelerator)),
        "seconds": round(seconds, 2),
        "clips_per_second": round(len(loaders["train"].dataset) / seconds, 1),
    }
    if row["best"]:
        progress.best = rank
    progress.log.append(row)
    if engine.accelerator.is_main_process:
        if row["best"]:
            save_weights(run_dir, model, {k: row[k] for k in ("epoch", "step", "val_loss")})
        write_rows(progress.log, run_dir / "log.jsonl")
        if config.tensorboard:
            tensorboard_row(row, run_dir / "tensorboard")
    tqdm.write(epoch_line(row, config.epochs))


def out_of_patience(log: list[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` epochs were all no better than one before them; patience 0 has no end."""
    return 0 < patience < len(log) and not any(row["best"] for row in log[-patience:])


def tensorboard_row(row: dict[str, Any], folder: Path) -> None:
    """The numbers of a finished epoch, for TensorBoard, over optimizer steps."""
    from tensorboardX.event_file_writer import EventsWriter  # not SummaryWriter: its thread prints a full disk's trace
    from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
    from tensorboardX.summary import scalar

    make_folder(folder)
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "clips_per_second")
    try:
        events = EventsWriter(str(folder / "events"), f".epoch{row['epoch']}")
        for name in (n for n in names if n in row):
            events.write_event(Event(summary=scalar(name, row[name]), step=row["step"], wall_time=time.time()))
        events.close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def test_best(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, accelerator: Any, run_dir: Path
) -> dict[str, Any]:
    """The scores of the best epoch's weights on val, and on test where there is one."""
    accelerator.wait_for_everyone()  # the main process writes them
    facts = load_weights(run_dir, model)
    return {"best_epoch": facts["epoch"]} | score_splits(model, loaders, config, accelerator, run_dir)


def score_splits(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, accelerator: Any, folder: Path
) -> dict[str, Any]:
    """The scores on val and, where there is one, test; writes predictions_{val,test}.jsonl."""
    metrics: dict[str, Any] = {}
    for split in ("val", "test"):
        if split in loaders:
            metrics[split], rows = final_scores(model, loaders[split], accelerator, config, split)
            if accelerator.is_main_process:
                write_rows(rows, folder / f"predictions_{split}.jsonl")
    if "test" in metrics:
        metrics["test"]["views"] = {"clips": config.test_clips, "crops": config.test_crops}
    return metrics
