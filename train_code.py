"""Trains a model and evaluates it: schedule, optimizer, loop, checks of the first steps, scores.

val selects the best epoch; test is read once, at the end. Evaluation sums over the clips that were really read.
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

WARMUP = 0.1  # fraction of all steps
# weight decay is for weight matrices; it would blur CLS, position and time embeddings
NO_DECAY = re.compile(r"\.lora_|cls_token|position|time_embedding|rel_embeddings|\bwpe\b")


# -- schedule and optimizer -------------------------------------------------------------------------


def lr_at(step: int, total: int, peak: float) -> float:
    """The learning rate of optimizer step `step` of `total`: linear warmup over a tenth, then cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def layers_above(backbone: nn.Module) -> dict[str, int]:
    """For every tensor of a backbone, how many layers it is from the output: 1 in the last layer, the number of layers
    plus 1 for the embeddings, 0 for what follows the layers (BEiT, arXiv:2106.08254)."""
    # the largest ModuleList holds the layers, whatever the family calls it
    lists = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    prefix, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    above = {}
    for path, module in backbone.named_modules():
        for name, _ in module.named_parameters(path, recurse=False):
            layer = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
            embeds = isinstance(module, nn.Embedding) or re.search(r"embed(?!_out)|project_in", name)
            above[name] = len(layers) - int(layer[1]) if layer else (len(layers) + 1 if embeds else 0)
    return above


def build_optimizer(model: VideoModel, config: Config) -> torch.optim.AdamW:
    """AdamW with a learning rate of its own for each part, and weight decay on weight matrices alone.

    Every parameter group has a `peak_lr`; lr_at of it is set before each step.
    """
    # a backbone's rate, slower with every layer further from the output
    _, scales = default_rates(config)
    scale_of = {}
    for part, backbone in model.backbones().items():
        above = layers_above(backbone)
        scale_of |= {id(p): scales[part] * config.layer_decay ** above[n] for n, p in backbone.named_parameters()}

    # as few groups as there are pairs of decay and rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_tensors(model).items():
        decay = config.weight_decay if parameter.ndim >= 2 and not NO_DECAY.search(name) else 0.0
        peak = config.learning_rate * scale_of.get(id(parameter), scales["new layers"])
        groups.setdefault((decay, peak), []).append(parameter)
    param_groups = [{"params": p, "weight_decay": decay, "peak_lr": peak} for (decay, peak), p in groups.items()]
    return torch.optim.AdamW(param_groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


# -- device and processes: each process takes a part of every batch; sums and gradients are added up --------


def build_accelerator(config: Config) -> Any:
    """The accelerator for these options. Raises UserError if the device or precision is not available."""
    from accelerate import Accelerator

    # accelerate would fall back to another device silently
    device = config.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable NVIDIA GPU; --device auto picks an available device")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; --device auto picks an available device")
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


def summed(accelerator: Any, *values: float) -> list[float]:
    """The sum of each value over all processes."""
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
    """Adds up the gradients of all processes; one whose part of the batch was empty adds zeros.

    Losses are divided by the targets of all processes, so this is the gradient of the whole batch, bit for bit the same
    in every process, whatever tensors a step leaves unused; DDP promises neither. It takes one copy of all gradients.
    """
    if accelerator.num_processes == 1:
        return
    parameters = list(trained_tensors(model).values())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def device_name(accelerator: Any) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} {accelerator.device.type.upper()} thread{'s' if threads > 1 else ''}"


def peak_memory(accelerator: Any) -> float | None:
    """MB, of the GPU or else of this process without its loader's workers; None where the system does not tell."""
    if accelerator.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


# -- one epoch --------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818, not an error
    """Training was stopped by the signal `number`, after its state was saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number


@dataclass
class Progress:
    """How far a run is: all that resuming needs apart from tensors and random generators. JSON."""

    epoch: int = 0  # the current one, from 0
    step: int = 0  # optimizer steps so far
    groups: int = 0  # of batches, one per optimizer step, done in this epoch
    loss: float = 0.0  # sums over this epoch's targets
    count: int = 0
    right: int = 0
    seconds: float = 0.0  # of training in this epoch
    best: tuple[float, ...] | None = None  # rank of the best epoch
    skipped: list[str] = field(default_factory=list)  # the errors of the videos skipped so far
    log: list[dict[str, Any]] = field(default_factory=list)

    def next_epoch(self) -> None:
        self.epoch += 1
        self.groups, self.loss, self.count, self.right, self.seconds = 0, 0.0, 0, 0, 0.0


@dataclass
class Engine:
    """What the loop needs apart from model and data; `accelerator` owns device and precision."""

    accelerator: Any
    optimizer: torch.optim.Optimizer
    total_steps: int
    accumulate: int  # batches per optimizer step
    progress: Progress = field(default_factory=Progress)
    label_smoothing: float = 0.0
    augment: Callable[[dict], dict] = lambda batch: batch
    after_step: Callable[[], None] = lambda: None  # saves, and raises Stopped


def train_one_epoch(model: VideoModel, loader: DataLoader, engine: Engine) -> dict[str, float]:
    """Trains the current epoch from where it is to its end, and returns its mean loss and accuracy.

    Raises UserError for a loss that is not finite, naming step and files.
    """
    # a resumed epoch starts behind the batches that it has seen
    model.train()
    progress, total = engine.progress, math.ceil(len(loader) / engine.accumulate)
    loader.batch_sampler.epoch = progress.epoch
    loader.batch_sampler.start = progress.groups * engine.accumulate
    clock = time.perf_counter()
    groups = groups_of(loader, engine.accumulate)
    with tqdm(groups, f"epoch {progress.epoch + 1}", total, False, initial=progress.groups, unit="step") as bar:
        for group in bar:
            # the schedule is a pure function of the step: nothing of it has to be saved
            for param_group in engine.optimizer.param_groups:
                param_group["lr"] = lr_at(progress.step, engine.total_steps, param_group["peak_lr"])
            if accumulate_gradients(model, group, loader, engine):
                optimizer_step(model, engine)
            progress.groups += 1
            progress.seconds, clock = progress.seconds + time.perf_counter() - clock, time.perf_counter()
            bar.set_postfix(loss=f"{progress.loss / max(1, progress.count):.3f}", refresh=False)
            engine.after_step()
    return {"loss": progress.loss / progress.count, "accuracy": progress.right / progress.count}


def groups_of(loader: DataLoader, size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The loader's batches in lists of `size`, one list per optimizer step; the last may be shorter. Batches without
    any readable video are dropped from their list."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield [batch for batch in group if batch is not None]


def accumulate_gradients(model: VideoModel, group: list[dict], loader: DataLoader, engine: Engine) -> bool:
    """Backward pass of one optimizer step's batches. Adds to the epoch's sums; returns whether there was any target.

    The loss is the mean over all targets of the step, so accumulated batches equal one large batch.
    """
    # the number of targets in the whole step, before the first backward pass needs it
    accelerator, progress = engine.accelerator, engine.progress
    group = [engine.augment(to_device(batch, accelerator.device)) for batch in group]
    (num_targets,) = summed(accelerator, sum(int((model.targets(batch) != -100).sum()) for batch in group))

    # one backward pass per batch; gradients add up
    loss_total, count, correct = 0.0, 0, 0
    for batch in group:
        with accelerator.autocast():
            loss, logits, targets = loss_sum(model, batch, engine.label_smoothing)
        if not torch.isfinite(loss):
            files = [str(loader.dataset.samples[i].path) for i in batch["index"].tolist()]
            raise UserError(f"the loss is {loss.item()} at step {progress.step}; the batch: {', '.join(files)}")
        accelerator.backward(loss / num_targets)
        loss_total += loss.item()
        count += int((targets != -100).sum())
        correct += int((logits.argmax(-1) == targets).sum())

    # the log shows sums over all processes
    loss_total, count, correct = summed(accelerator, loss_total, count, correct)
    progress.loss += loss_total
    progress.count += count
    progress.right += correct
    return num_targets > 0


def loss_sum(
    model: VideoModel, batch: dict[str, torch.Tensor], smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed cross-entropy, logits (..., K or V), targets (...)) of a batch; targets of -100 do not count.

    The two labels of a mixed clip count by their weights in it (mixup, arXiv:1710.09412).
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "mixed_labels", "mix", "index")}
    logits = model.scores(**inputs)
    targets = model.targets(batch)

    def losses(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing)

    loss = losses(targets)
    if "mix" in batch:
        loss = batch["mix"] * loss + (1 - batch["mix"]) * losses(batch["mixed_labels"])
    return loss.sum(), logits, targets


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def optimizer_step(model: VideoModel, engine: Engine) -> None:
    """Clips the gradients, steps, and checks the first two steps."""
    sum_gradients(model, engine.accelerator)
    engine.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with first_steps_checked(model, engine.progress.step):
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    engine.progress.step += not engine.accelerator.optimizer_step_was_skipped  # fp16 skips steps that overflow


@contextmanager
def first_steps_checked(model: VideoModel, step: int) -> Generator[None]:
    """Around the first two optimizer steps: every trained tensor has a gradient, every adapter is live (lora_B in step
    0, lora_A in step 1, since B starts at zero), and no frozen tensor changes. Raises UserError naming the tensor."""
    if step >= 2:
        yield
        return
    # before the step: everything that should learn can
    for name, parameter in trained_tensors(model).items():
        if parameter.grad is None:
            raise UserError(f"{name} should be trained but gets no gradient")
    half = ("lora_B", "lora_A")[step]
    for name, adapter in adapters(model):
        if not any(p.grad.abs().max() > 0 for p in getattr(adapter, half).parameters()):
            raise UserError(f"the adapter {name} is dead: no gradient reaches its {half}")
    versions = {n: p._version for n, p in model.named_parameters() if not p.requires_grad}  # counts changes in place
    yield
    # after it: nothing else has moved
    for name, parameter in model.named_parameters():
        if name in versions and (parameter.grad is not None or parameter._version != versions[name]):
            raise UserError(f"{name} is frozen but was changed by the optimizer")


# -- evaluation -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: VideoModel, loader: DataLoader, accelerator: Any, desc: str = "val") -> dict[str, Any]:
    """Mean loss over all targets, and count. For classifiers also accuracy, and for every clip `truth` (n,), the most
    likely classes `ranked` (n, min(5, K)) and their `probabilities`, best first."""
    # sums and rows of this process's part of every batch
    model.eval()
    total, count = 0.0, 0
    rows: list[tuple] = []  # index; for classifiers also true class, most likely classes, their probabilities
    for batch in tqdm(loader, desc=desc, leave=False, unit="batch"):
        if batch is None:  # this process's part of a small last batch is empty
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

    # every clip must have been scored exactly once, whichever process read it
    total, count = summed(accelerator, total, count)
    indices, *columns = zip(*sorted(gathered(accelerator, rows)), strict=True)
    if list(indices) != list(range(len(loader.dataset))):
        raise AssertionError(f"{desc}: {len(indices)} clips evaluated, the split has {len(loader.dataset)}")
    result: dict[str, Any] = {"loss": total / count, "count": len(indices)}
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
    """Bleu, ROUGE-L, CIDEr, exact match and, if the data set has a lexicon, the fraction of captions that name each
    attribute correctly."""
    scores: dict[str, Any] = caption_scores(captions, [s.captions for s in dataset.samples])
    if dataset.lexicon and all(s.attributes.keys() == dataset.lexicon.keys() for s in dataset.samples):
        named = [attributes_in(caption, dataset.lexicon) for caption in captions]
        summary = attribute_summary(named, [s.attributes for s in dataset.samples])
        scores["attributes"] = with_intervals(summary, len(captions))
    return scores


def final_scores(
    model: VideoModel, loader: DataLoader, accelerator: Any, config: Config, split: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the scores of a split for metrics.json, one row per clip). Only here is test read after training."""
    result = evaluate(model, loader, accelerator, desc=split)
    samples, rows = loader.dataset.samples, []
    if config.captioning:
        captions = caption_all(model, loader, accelerator, config)
        for sample, caption in zip(samples, captions, strict=True):
            rows.append({"file": str(sample.path), "caption": caption, "references": list(sample.captions)})
        return result | score_captions(captions, loader.dataset), rows

    # arrays become rows of predictions; metrics.json has the scores alone
    truth, ranked, probabilities = (result.pop(name) for name in ("truth", "ranked", "probabilities"))
    names = loader.dataset.class_names
    for sample, label, best, scores in zip(samples, truth, ranked.tolist(), probabilities.tolist(), strict=True):
        top = [{"label": names[k], "score": round(score, 4)} for k, score in zip(best, scores, strict=True)]
        rows.append({"file": str(sample.path), "truth": names[label], **top[0], "top_k": top})
    return result | label_scores(truth, ranked, probabilities[:, 0], names), rows


def score_splits(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, accelerator: Any, folder: Path
) -> dict[str, Any]:
    """The scores on val and, if there is one, test; writes predictions_{val,test}.jsonl."""
    metrics: dict[str, Any] = {}
    for split in ("val", "test"):
        if split in loaders:
            metrics[split], rows = final_scores(model, loaders[split], accelerator, config, split)
            if accelerator.is_main_process:
                write_rows(rows, folder / f"predictions_{split}.jsonl")
    if "test" in metrics:
        metrics["test"]["views"] = {"clips": config.test_clips, "crops": config.test_crops}
    return metrics


# -- the run ----------------------------------------------------------------------------------------


def build_loaders(
    model: VideoModel, config: Config, splits: Splits, features: dict[str, Any] | None = None, accelerator: Any = None
) -> dict[str, DataLoader]:
    """A loader for every split that has samples. Splits in `features` are read from there. With an `accelerator` of
    several processes, each process takes its part of every batch. `config` has no `auto`."""
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
        # every process takes every n-th clip of each batch, so that n changes no result
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


@contextmanager
def stop_signals() -> Generator[list[int]]:
    """A list that SIGINT and SIGTERM append to instead of ending the process; the same signal again interrupts."""
    signals: list[int] = []

    def note(number: int, _: Any) -> None:
        if number in signals:
            raise KeyboardInterrupt
        signals.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield signals
        return
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, accelerator: Any, run_dir: Path
) -> dict[str, Any]:
    """Trains to config.epochs, keeps the epoch that is best on val, tests it once, writes log and predictions.

    With config.resume it continues from the run's saved state, bit for bit as if it had not been stopped.
    Returns the contents of metrics.json, and the log.

    Raises:
        UserError: a loss that is not finite, a dead adapter, a video that cannot be read, a full disk.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    # model and optimizer
    started = time.perf_counter()
    model.to(accelerator.device)
    if config.compile:
        for backbone in model.backbones().values():
            body_of(backbone).compile()  # in place: the names of tensors stay
    engine = build_engine(model, loaders["train"], config, accelerator)

    # continue where a stopped run was
    if config.resume and (run_dir / STATE).exists():  # else it was stopped before anything was saved
        engine.progress = resumed_progress(model, engine, config.epochs, run_dir)
        loaders["train"].skipped.update(engine.progress.skipped)
        if accelerator.is_main_process:
            write_rows(engine.progress.log, run_dir / "log.jsonl")

    # train, and save what --resume needs after each epoch, every `save_every` steps, and before stopping
    with stop_signals() as signals:

        def save_or_stop(due: bool) -> None:
            (stopped,) = summed(accelerator, len(signals))  # all processes stop after the same step
            if stopped or due:
                save_progress(model, loaders["train"], engine, run_dir)
            if stopped:
                raise Stopped(signals[0] if signals else signal.SIGTERM)

        every = config.save_every
        engine.after_step = lambda: save_or_stop(every > 0 and engine.progress.step % every == 0)
        while engine.progress.epoch < config.epochs and not out_of_patience(engine.progress.log, config.patience):
            one_epoch(model, loaders, engine, config, run_dir)
            engine.progress.next_epoch()
            save_or_stop(due=True)
    if engine.progress.epoch < config.epochs:
        print(f"stopped after epoch {engine.progress.epoch}: val has not improved for {config.patience} epochs")

    # the best epoch's weights are on disk; the main process wrote them
    accelerator.wait_for_everyone()
    best_epoch = load_weights(run_dir, model)["epoch"]
    metrics = {"best_epoch": best_epoch} | score_splits(model, loaders, config, accelerator, run_dir)
    log = engine.progress.log
    return metrics | {
        "skipped": engine.progress.skipped,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mb": peak_memory(accelerator),
        "device": device_name(accelerator),
        "seconds_per_epoch": round(sum(row["seconds"] for row in log) / len(log), 2),
        "log": log,
    }


def build_engine(model: VideoModel, loader: DataLoader, config: Config, accelerator: Any) -> Engine:
    steps = config.epochs * math.ceil(len(loader) / config.gradient_accumulation_steps)
    optimizer = accelerator.prepare(build_optimizer(model, config))
    engine = Engine(accelerator, optimizer, steps, config.gradient_accumulation_steps)
    engine.label_smoothing, engine.augment = config.label_smoothing, Augment(config.augment, config.flip)
    return engine


def one_epoch(model: VideoModel, loaders: dict[str, DataLoader], engine: Engine, config: Config, run_dir: Path) -> None:
    """Trains the current epoch to its end, evaluates on val, saves the weights if they are the best so far, logs."""
    # ties in accuracy are broken by the loss; a captioner has the loss alone
    progress = engine.progress
    trained = train_one_epoch(model, loaders["train"], engine)
    seconds = progress.seconds
    val = evaluate(model, loaders["val"], engine.accelerator)
    rank = (val.get("accuracy", 0.0), -val["loss"])
    row = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": trained["loss"], "val_loss": val["loss"]}
    if "accuracy" in val:
        row |= {"train_accuracy": trained["accuracy"], "val_accuracy": val["accuracy"]}
    row["best"] = progress.best is None or rank > tuple(progress.best)
    row["skipped"] = len(all_skipped(loaders["train"], engine.accelerator))
    row["seconds"] = round(seconds, 2)
    row["clips_per_second"] = round(len(loaders["train"].dataset) / seconds, 1)

    # only the best weights are kept
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


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"train loss {row['train_loss']:.3f}", f"val loss {row['val_loss']:.3f}"]
    if "val_accuracy" in row:
        parts.append(f"val accuracy {100 * row['val_accuracy']:.1f} %")
    return "  ".join([*parts, f"{row['seconds']:.1f} s", *(["best so far"] if row["best"] else [])])


def out_of_patience(log: list[dict[str, Any]], patience: int) -> bool:
    """Whether none of the last `patience` epochs was better than all before it; never with patience 0."""
    return 0 < patience < len(log) and not any(row["best"] for row in log[-patience:])


def all_skipped(loader: DataLoader, accelerator: Any) -> list[str]:
    """The errors of the videos that any process skipped."""
    return sorted({error for errors in gathered(accelerator, [sorted(loader.skipped)]) for error in errors})


def save_progress(model: VideoModel, loader: DataLoader, engine: Engine, run_dir: Path) -> None:
    """Writes what --resume needs, with every process's random generator."""
    accelerator, progress = engine.accelerator, engine.progress
    progress.skipped = all_skipped(loader, accelerator)
    generators = dict(gathered(accelerator, [(accelerator.process_index, torch.get_rng_state())]))
    if accelerator.is_main_process:
        save_state(run_dir, model, engine.optimizer, asdict(progress), generators)


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
        raise UserError(f"{run_dir / STATE} does not hold a state of this run")
    return progress


def tensorboard_row(row: dict[str, Any], folder: Path) -> None:
    """The numbers of a finished epoch, for TensorBoard, over optimizer steps."""
    from tensorboardX.event_file_writer import (
        EventsWriter,
    )  # SummaryWriter's thread would print a full disk's traceback
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
