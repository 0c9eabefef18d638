"""Trains a model and evaluates it: schedule, optimizer, loop, checks of the first steps, scores.

val selects the best epoch; test is scored once, at the end. Start reading at train(), the whole training of a run;
train_one_epoch() and accumulate_gradients() are the loop.
"""

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
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

from build_model import VideoCaptioner, VideoModel, adapters, body_of, trained_tensors
from checkpoint import STATE, load_state, load_weights, random_states, save_state, save_weights, write_rule
from config import Config, default_rates
from extras.augment import Augment
from extras.multilabel import binary_losses, choose_thresholds, multi_label_result, multi_label_scores
from extras.processes import PATIENCE, GradientSum, gathered, summed
from extras.reject import Rule
from heads import WORD_LOSS, WordLoss
from metrics import attribute_summary, caption_scores, exact_matches, label_scores, question_scores, with_intervals
from script import UserError, counted, keep_freed_memory, make_folder, write_rows
from VLoader import SPLITS, ClipDataset, EpochBatches, Sample, Splits, build_loader, distinct

WARMUP = 0.1  # fraction of all steps
# weight decay is for weight matrices; it would shrink CLS, position and time embeddings, and published poolers' queries
NO_DECAY = re.compile(
    r"\.lora_|cls_token|class_embedding|register_tokens|position|time_embedding|rel_embeddings|\bwpe\b|"
    r"query_tokens|attention_query|\.probe"
)


# -- schedule and optimizer -------------------------------------------------------------------------


def lr_at(step: int, total: int, peak: float) -> float:
    """The learning rate of optimizer step `step` of `total`: linear warmup over 10 % of the steps, then cosine decay to
    zero."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def layers_above(backbone: nn.Module) -> dict[str, int]:
    """The distance of every tensor of a backbone from its output, in layers (BEiT, arXiv:2106.08254): 0 after the last
    layer, 1 in the last layer, number of layers + 1 in the embeddings."""
    # every family names its layers differently, but the largest ModuleList holds them, or for VideoPrism, which has a
    # second stack over time, the two of the same class
    lists = [(name, part) for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList) and part]
    _, largest = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    same_class = [(name, part) for name, part in lists if type(part[0]) is type(largest[0])]
    layers = [f"{name}.{number}." for name, part in same_class for number in range(len(part))]
    above = {}
    for path, module in backbone.named_modules():
        for name, _ in module.named_parameters(path, recurse=False):
            embeds = isinstance(module, nn.Embedding) or re.search(r"embed(?!_out)|project_in|pre_layrnorm", name)
            outside = len(layers) + 1 if embeds else 0
            above[name] = next((len(layers) - k for k, layer in enumerate(layers) if name.startswith(layer)), outside)
    return above


def build_optimizer(model: VideoModel, config: Config) -> torch.optim.AdamW:
    """AdamW with one learning rate per part, and weight decay on weight matrices only.

    Every parameter group has a `peak_lr`, from which the loop computes its learning rate before each step.
    """
    # backbones: the part's rate, lowered with every layer further from the output
    _, scales = default_rates(config)
    scale_of = {}
    for part, backbone in model.backbones().items():
        above = layers_above(backbone)
        scale_of |= {id(p): scales[part] * config.layer_decay ** above[n] for n, p in backbone.named_parameters()}

    # one group per pair of decay and rate: the fused optimizer is faster with few groups
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_tensors(model).items():
        decay = config.weight_decay if parameter.ndim >= 2 and not NO_DECAY.search(name) else 0.0
        peak = config.learning_rate * scale_of.get(id(parameter), scales["new layers"])
        groups.setdefault((decay, peak), []).append(parameter)
    param_groups = [{"params": p, "weight_decay": decay, "peak_lr": peak} for (decay, peak), p in groups.items()]
    return torch.optim.AdamW(param_groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


# -- device -----------------------------------------------------------------------------------------


def build_accelerator(config: Config) -> Any:
    """The accelerator for these options. Raises UserError if the device or precision is not available."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # check the device here: accelerate would silently use another one
    device, cuda = config.device, torch.cuda.is_available()
    if (device == "cuda" and not cuda) or (device == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {device} is not available on this machine; --device auto picks an available device")

    # bf16 needs no loss scaling, so it is the default where the GPU computes it
    on_gpu = cuda and device in ("cuda", "auto")
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    if precision == "fp16" and not on_gpu:
        raise UserError("--mixed_precision fp16 needs an NVIDIA GPU; `bf16` and `no` do not")
    if config.frozen_dtype == "bf16" and precision != "bf16":
        raise UserError("--frozen_dtype bf16 needs --mixed_precision bf16; in 32 bit it would only round the weights")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if on_gpu and processes > gpus:
        raise UserError(f"{processes} processes need as many GPUs, and this machine has {gpus}; start {gpus}")

    # several processes without a GPU: accelerate would look for one
    on_cpu = device == "cpu" or (not on_gpu and "RANK" in os.environ)
    groups = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[groups])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    # cuDNN's fastest convolution gradients are not deterministic, and a resumed run must not differ
    torch.backends.cudnn.deterministic = True
    return accelerator


def cast_frozen(model: VideoModel, config: Config, accelerator: Any) -> None:
    """Casts the frozen weights of linear layers to bf16 if --frozen_dtype says so, in place.

    Autocast would make bf16 copies of just these at each use, so results are the same bit for bit. All else stays in
    fp32: adapters, norms, biases, embeddings with the output layers that share their weights, and the convolution that
    makes patches, because DINOv3 derives the dtype of its positions from it.
    """
    from transformers.pytorch_utils import Conv1D

    on_gpu = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
    if config.frozen_dtype == "fp32" or (config.frozen_dtype == "auto" and not on_gpu):
        return
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for backbone in model.backbones().values():
        weights = (m.weight for m in backbone.modules() if isinstance(m, (nn.Linear, Conv1D)))
        for weight in (w for w in weights if not w.requires_grad and id(w) not in shared):
            weight.data = weight.data.bfloat16()


class HostCopy:
    """A copy of a tensor in the host's memory. Only read() waits for it; until then the GPU can be given more work."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self.done = torch.cuda.Event() if tensor.is_cuda else None
        if self.done:
            self.done.record()

    def read(self) -> torch.Tensor:
        if self.done:
            self.done.synchronize()
        return self.tensor


def device_name(accelerator: Any) -> str:
    """The GPU's name, or the number of CPU threads, for metrics.json."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name()
    return counted(torch.get_num_threads(), f"{accelerator.device.type.upper()} thread")


def peak_memory(accelerator: Any) -> float | None:
    """Peak memory in MB: of the GPU, or else of this process without its loader's workers. None on Windows."""
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
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class DivergedError(UserError):
    """The loss is not a finite number."""


@dataclass
class Progress:
    """How far a run is: everything that --resume needs besides tensors and random generators. It is saved as JSON."""

    epoch: int = 0  # the current epoch, from 0
    step: int = 0  # optimizer steps so far
    groups: int = 0  # groups of batches (one per optimizer step) done in this epoch
    loss: float = 0.0  # summed over the targets of this epoch so far
    count: int = 0  # of these targets
    right: int = 0  # correct predictions among them
    seconds: float = 0.0  # training time of this epoch
    run_seconds: float = 0.0  # time of the whole run when it was saved, with evaluation
    best: tuple[float, ...] | None = None  # rank of the best epoch
    skipped: list[str] = field(default_factory=list)  # errors of the videos skipped so far
    scaler: dict[str, Any] = field(default_factory=dict)  # the state of fp16's loss scaling; other precisions have none
    log: list[dict[str, Any]] = field(default_factory=list)  # one row per evaluation on val

    def next_epoch(self) -> None:
        """Starts the sums of a new epoch."""
        self.epoch += 1
        self.groups, self.loss, self.count, self.right, self.seconds = 0, 0.0, 0, 0, 0.0


@dataclass
class StepReport:
    """The losses of one optimizer step, in this process."""

    step: int
    count: int  # of targets
    files: list[list[str]]  # of each batch
    values: list[HostCopy]  # of each batch: (summed loss, number of correct predictions)


@dataclass
class Engine:
    """What the loop needs besides model and data. The accelerator owns device and precision."""

    accelerator: Any
    optimizer: torch.optim.Optimizer
    total_steps: int
    accumulate: int  # batches per optimizer step
    progress: Progress = field(default_factory=Progress)
    started: float = field(
        default_factory=time.perf_counter
    )  # after --resume, shifted back by the time of the earlier parts
    trained: list[nn.Parameter] = field(default_factory=list)  # set in the first step, because finding them takes long
    gradient_sum: GradientSum | None = None  # with several processes
    reports: list[StepReport] = field(default_factory=list)  # of steps that are not in `progress` yet
    label_smoothing: float = 0.0
    word_loss: WordLoss | None = None  # of captioners
    augment: Callable[[dict], dict] = lambda batch: batch
    after_step: Callable[[], None] = lambda: None  # saves when it is time, and raises Stopped

    def read_reports(self, keep: int = 0) -> None:
        """Adds the reports of all steps but the last `keep` ones to the sums of the epoch. Raises DivergedError for a
        loss that is not finite, naming step and files."""
        while len(self.reports) > keep:
            report = self.reports.pop(0)
            loss_total, correct, error = 0.0, 0.0, ""
            for copy, files in zip(report.values, report.files, strict=True):
                loss, right = copy.read().tolist()
                if not math.isfinite(loss):
                    error = error or f"the loss is {loss} at step {report.step}; the batch: {', '.join(files)}"
                loss_total += loss
                correct += right

            # summed over all processes: the log covers them, and an error in one stops them all
            sums = (loss_total, correct, report.count, bool(error))
            loss_total, correct, count, errors = summed(self.accelerator, *sums)
            if errors:
                raise DivergedError(error or f"the loss of another process is not finite at step {report.step}")
            self.progress.loss += loss_total
            self.progress.right += int(correct)
            self.progress.count += int(count)


def train_one_epoch(model: VideoModel, loader: DataLoader, engine: Engine) -> None:
    """Trains the current epoch from where it is to its end; engine.progress has its loss and accuracy.

    Raises DivergedError for a loss that is not finite, naming step and files.
    """
    # a resumed epoch skips the batches that were trained before it was stopped
    model.train()
    progress, total = engine.progress, math.ceil(len(loader) / engine.accumulate)
    loader.batch_sampler.epoch = progress.epoch
    loader.batch_sampler.start = progress.groups * engine.accumulate
    clock = time.perf_counter()
    groups = groups_of(loader, engine.accumulate)
    with tqdm(groups, f"epoch {progress.epoch + 1}", total, leave=False, initial=progress.groups, unit="step") as bar:
        for group in bar:
            train_step(model, group, loader, engine)

            # the GPU may still work on this step, so the loss is that of the step before
            engine.read_reports(keep=1)
            progress.seconds += time.perf_counter() - clock
            if progress.count:
                bar.set_postfix(loss=f"{progress.loss / progress.count:.3f}", refresh=False)
            engine.after_step()  # its own time is not training time
            clock = time.perf_counter()
    engine.read_reports()
    progress.seconds += time.perf_counter() - clock


def train_step(model: VideoModel, group: list[dict], loader: DataLoader, engine: Engine) -> None:
    """One optimizer step on a group of batches, at the learning rate of this step."""
    if not engine.trained:
        engine.trained = [*trained_tensors(model).values()]
        engine.gradient_sum = GradientSum(engine.trained) if engine.accelerator.num_processes > 1 else None

    # the schedule is a pure function of the step, so it has no state to save
    progress = engine.progress
    for param_group in engine.optimizer.param_groups:
        param_group["lr"] = lr_at(progress.step, engine.total_steps, param_group["peak_lr"])
    if accumulate_gradients(model, group, loader, engine):
        optimizer_step(model, engine)
    progress.groups += 1


def groups_of(loader: DataLoader, size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yields the loader's batches in lists of `size`, one list per optimizer step; the last may be shorter. Batches
    without any readable video are dropped from their list."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield [batch for batch in group if batch is not None]


def accumulate_gradients(model: VideoModel, group: list[dict], loader: DataLoader, engine: Engine) -> bool:
    """Runs the backward passes of one optimizer step, and adds its StepReport to the engine. Returns whether any
    process had a target.

    The loss is the mean over all targets of the step, so accumulated batches equal one large batch.
    """
    # count the targets of the whole step first: the mean of the batches' means would weight short captions more
    accelerator, samples = engine.accelerator, loader.dataset.samples
    count = sum(int((model.targets(batch) != -100).sum()) for batch in group)
    indices = [batch["index"].tolist() for batch in group]
    (num_targets,) = summed(accelerator, count)
    if not num_targets:
        return False

    # one backward pass per batch; the gradients add up
    batches = [engine.augment(to_device(batch, accelerator.device)) for batch in group]
    values: list[HostCopy] = []
    for number, (batch, clips) in enumerate(zip(batches, indices, strict=True), 1):
        with accelerator.autocast():
            loss, logits, targets = loss_sum(model, batch, engine.label_smoothing)
        if engine.gradient_sum:
            engine.gradient_sum.last_batch = number == len(batches)
        objective = loss
        if engine.word_loss:  # clips are weighted by their targets, as in the loss
            objective = loss + WORD_LOSS * (engine.word_loss(clips) * (targets != -100).sum(1)).sum()
        accelerator.backward(objective / num_targets)

        # with several labels, the log has no accuracy
        correct = (logits.argmax(-1) == targets).sum() if targets.dtype != torch.bool else loss.new_zeros(())
        values.append(HostCopy(torch.stack([loss, correct])))
    files = [[str(samples[i].path) for i in clips] for clips in indices]
    engine.reports.append(StepReport(engine.progress.step, count, files, values))
    return True


def loss_sum(
    model: VideoModel, batch: dict[str, torch.Tensor], smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed cross-entropy, logits (..., K or V), targets (...)) of a batch. Targets of -100 are ignored. With several
    labels per clip, each class is a target of its own, (B, K) bool.

    A mixed clip has two labels, weighted like its two videos (mixup, arXiv:1710.09412).
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "mixed_labels", "mix", "prompt_tokens", "index")}
    logits = model.scores(**inputs)
    targets = model.targets(batch)

    def losses(labels: torch.Tensor) -> torch.Tensor:
        if labels.dtype == torch.bool:
            return binary_losses(logits, labels, smoothing)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing)

    loss = losses(targets)
    if "mix" in batch:
        loss = batch["mix"] * loss + (1 - batch["mix"]) * losses(batch["mixed_labels"])
    return loss.sum(), logits, targets


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def optimizer_step(model: VideoModel, engine: Engine) -> None:
    """Waits for the sum of the gradients over all processes, clips them, and steps; the first two steps are checked."""
    if engine.gradient_sum:
        engine.gradient_sum.finish()
    engine.accelerator.clip_grad_norm_(engine.trained, 1.0)
    with first_steps_checked(model, engine.progress.step):
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    engine.progress.step += not engine.accelerator.optimizer_step_was_skipped  # fp16 skips steps that overflow


@contextmanager
def first_steps_checked(model: VideoModel, step: int) -> Generator[None]:
    """Checks the first two optimizer steps: every trained tensor has a gradient, every adapter is live, and no frozen
    tensor changes. Raises UserError naming the tensor, or all dead adapters.

    lora_B starts at zero, so lora_A gets a gradient in the second step only. With several processes, a tensor without a
    gradient has zeros instead and is not noticed.
    """
    if step >= 2:
        yield
        return

    # before the step: does a gradient reach everything that should learn?
    half = ("lora_B", "lora_A")[step]
    gradients = {name: [p.grad for p in getattr(a, half).parameters()] for name, a in adapters(model)}
    if dead := [name for name, own in gradients.items() if not any(g is not None and g.any() for g in own)]:
        count = f"{len(dead)} of {len(gradients)} adapters are dead"
        raise UserError(f"{count}, no gradient reaches {half}: {', '.join(dead)}")
    for name, parameter in trained_tensors(model).items():
        if parameter.grad is None:
            raise UserError(f"{name} should be trained but gets no gradient")
    versions = {n: p._version for n, p in model.named_parameters() if not p.requires_grad}  # counts in-place changes
    yield

    # after it: has anything frozen moved?
    for name, parameter in model.named_parameters():
        if name in versions and (parameter.grad is not None or parameter._version != versions[name]):
            raise UserError(f"{name} is frozen but was changed by the optimizer")


# -- evaluation -------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: VideoModel) -> Generator[None]:
    """Inside, the model is in eval() and without gradients. Afterwards it is in its old mode, so training can go on."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate(model: VideoModel, loader: DataLoader, accelerator: Any, desc: str = "val") -> dict[str, Any]:
    """The mean `loss` over all targets and the `count` of clips. For classifiers also `accuracy` and, for every clip,
    `truth` (n,), `logits` (n, K), the most likely classes `ranked` (n, min(5, K)) and their `probabilities`, best
    first. With several labels per clip `mAP`, `truth` (n, K) bool and the `probabilities` of all classes (n, K)."""

    def forward(batch: dict[str, torch.Tensor]) -> tuple[dict, HostCopy, HostCopy | None]:
        with accelerator.autocast():
            loss, logits, _ = loss_sum(model, to_device(batch, accelerator.device))
        # a captioner's logits are large, and only its loss is needed
        return batch, HostCopy(loss), None if isinstance(model, VideoCaptioner) else HostCopy(logits)

    # this process scores its part of every batch; the loss is summed, since a mean of means would weight small batches
    total, num_targets = 0.0, 0
    rows: list[tuple] = []  # index; for classifiers also true class, logits, most likely classes, their probabilities
    with evaluating(model):
        # a small last batch may have nothing for this process
        bar = tqdm(loader, desc=desc, leave=False, unit="batch")
        for batch, loss, logits in lagged(forward(batch) for batch in bar if batch is not None):
            targets = model.targets(batch)
            total += loss.read().item()
            num_targets += int((targets != -100).sum())
            columns = [batch["index"].tolist()]
            if logits is not None:
                columns += score_columns(targets, logits.read())
            rows += zip(*columns, strict=True)

    # every clip must have been scored exactly once, by whichever process
    total, num_targets = summed(accelerator, total, num_targets)
    indices, *columns = zip(*sorted(gathered(accelerator, rows)), strict=True)
    if list(indices) != list(range(len(loader.dataset))):
        raise AssertionError(f"{desc}: {len(indices)} clips evaluated, the split has {len(loader.dataset)}")
    result: dict[str, Any] = {"loss": total / num_targets, "count": len(indices)}
    if model.multi_label:
        result |= multi_label_result(*columns)
    elif columns:
        truth, logits, ranked, probabilities = map(np.array, columns)
        result |= {"accuracy": float((ranked[:, 0] == truth).mean())}
        result |= {"truth": truth, "logits": logits, "ranked": ranked, "probabilities": probabilities}
    return result


def score_columns(targets: torch.Tensor, logits: torch.Tensor) -> list[list]:
    """What evaluate() keeps of a batch: with several labels, targets and probabilities of all classes; otherwise true
    classes, logits, most likely classes and their probabilities."""
    if targets.dtype == torch.bool:
        return [targets.tolist(), logits.sigmoid().tolist()]
    best = logits.softmax(-1).topk(min(5, logits.shape[-1]))
    return [targets.tolist(), [*logits.numpy()], best.indices.tolist(), best.values.tolist()]


def lagged(items: Iterable[Any]) -> Iterator[Any]:
    """Yields each item after making the next one, so that a GPU works on that one while this one is read."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def caption_all(model: VideoModel, loader: DataLoader, accelerator: Any, config: Config) -> list[str]:
    """Generates a caption for every sample, or the answer to its question. Returns them in the order of the samples."""
    captions: dict[int, str] = {}
    samples = loader.dataset.samples
    with evaluating(model):
        for batch in tqdm(loader, desc="captions", leave=False, unit="batch"):
            if batch is None:
                continue
            batch = to_device(batch, accelerator.device)
            indices = batch["index"].tolist()
            with accelerator.autocast():
                texts = model.generate(batch["video"], config, [samples[i].question or "" for i in indices])
            captions |= dict(zip(indices, texts, strict=True))
    captions = dict(gathered(accelerator, list(captions.items())))
    return [captions[i] for i in range(len(loader.dataset))]


def score_captions(texts: list[str], dataset: ClipDataset) -> dict[str, Any]:
    """Scores captions by BLEU, ROUGE-L, CIDEr and exact match and, if the dataset has a lexicon, by the fraction that
    name each attribute correctly. Scores answers to questions by exact match, in total and by kind."""
    scores: dict[str, Any] = {}
    (samples, captions), (asked, answers) = split_by_question(dataset.samples, texts)
    if samples:
        scores |= caption_scores(captions, [s.captions for s in samples], [s.recording for s in samples])
    if samples and dataset.lexicon and all(s.has_attributes(dataset.lexicon) for s in samples):
        summary = attribute_summary(captions, [s.objects for s in samples], dataset.lexicon)
        scores["attributes"] = with_intervals(summary, len(captions), [s.recording for s in samples])
    if asked:
        right = exact_matches(answers, [s.captions for s in asked])
        scores["answers"] = question_scores(right, [s.kind for s in asked], [s.recording for s in asked])
        scores["count"] = len(distinct(dataset.samples))
    return scores


def split_by_question(samples: list[Sample], texts: list[str]) -> tuple[tuple[list, list], tuple[list, list]]:
    """((samples, texts) without a question, (samples, texts) with one)."""

    def part(asked: bool) -> tuple[list, list]:
        pairs = [(s, t) for s, t in zip(samples, texts, strict=True) if bool(s.question) == asked]
        return [s for s, _ in pairs], [t for _, t in pairs]

    return part(False), part(True)


def final_scores(
    model: VideoModel, loader: DataLoader, accelerator: Any, config: Config, split: str, rule: Rule | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the scores of a split for metrics.json, one row per clip for predictions_<split>.jsonl). `rule` says which clips
    are answered; accuracy and the other scores are about all clips."""
    # captioners: the loss, and the generated captions and answers against the references
    result = evaluate(model, loader, accelerator, desc=split)
    samples, rows = loader.dataset.samples, []
    if config.captioning:
        texts = caption_all(model, loader, accelerator, config)
        for sample, text in zip(samples, texts, strict=True):
            written = {"question": sample.question, "answer": text} if sample.question else {"caption": text}
            rows.append({**sample.place, **written, "references": list(sample.captions)})
        return result | score_captions(texts, loader.dataset), rows

    # classifiers: the arrays become rows; metrics.json keeps only the scores
    names = loader.dataset.class_names
    if model.multi_label:
        if model.thresholds is None and split == "val":
            model.thresholds = choose_thresholds(result["truth"], result["probabilities"], names)
        return multi_label_scores(result, samples, names, model.thresholds)
    groups = [sample.recording for sample in samples]
    if rule is not None:
        rule.apply(result, split, groups)
    arrays = ("truth", "logits", "ranked", "probabilities", "answered")
    truth, _, ranked, probabilities, answered = (result.pop(name, None) for name in arrays)
    for sample, label, best, scores in zip(samples, truth, ranked.tolist(), probabilities.tolist(), strict=True):
        top = [{"label": names[k], "score": round(score, 4)} for k, score in zip(best, scores, strict=True)]
        rows.append({**sample.place, "truth": names[label], **top[0], "top_k": top})
    if answered is not None:
        rows = [row | {"answered": bool(answer)} for row, answer in zip(rows, answered, strict=True)]
    return result | label_scores(truth, ranked, probabilities[:, 0], names, groups), rows


def score_splits(
    model: VideoModel,
    loaders: dict[str, DataLoader],
    config: Config,
    accelerator: Any,
    folder: Path,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """The scores on val and, if there is one, on test. Writes predictions_{val,test}.jsonl. Without the `rule` of a
    trained run, --reject chooses one on val, and writes it to a run's metadata.json."""
    metrics: dict[str, Any] = {}
    rule = rule or (Rule(config.reject) if config.reject else None)
    for split in ("val", "test"):
        if split in loaders:
            metrics[split], rows = final_scores(model, loaders[split], accelerator, config, split, rule)
            recordings = len({sample.recording for sample in loaders[split].dataset.samples})
            if recordings < len(distinct(loaders[split].dataset.samples)):
                metrics[split]["recordings"] = recordings
            if accelerator.is_main_process:
                write_rows(rows, folder / f"predictions_{split}.jsonl")
    if "test" in metrics:
        metrics["test"]["views"] = {"clips": config.test_clips, "crops": config.test_crops}
    if accelerator.is_main_process:
        write_rule(folder, asdict(rule) if rule and rule.threshold is not None else None)
    return metrics | ({"reject": asdict(rule)} if rule else {})


# -- the run ----------------------------------------------------------------------------------------


def build_loaders(
    model: VideoModel,
    config: Config,
    splits: Splits,
    features: dict[str, Any] | None = None,
    accelerator: Any = None,
    frames: dict[str, Any] | None = None,
) -> dict[str, DataLoader]:
    """A loader for every split that has samples. `features` holds the cached features of some splits, `frames` the
    stored frames of some; the videos of the others are decoded. With an `accelerator` of several processes, each
    process gets its part of every batch. `config` has no `auto`."""
    loaders, features, frames = {}, features or {}, frames or {}
    for name in (n for n in SPLITS if getattr(splits, n)):
        # only test is seen in several views: val is evaluated after every epoch
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
            with_captions=config.captioning,
            features=features.get(name),
            frames=frames.get(name),
            jitter=name not in features,
        )

        # each of n processes takes every n-th clip of a batch, so batches do not depend on n
        batches = EpochBatches(dataset, config.batch_size)
        if accelerator is not None:
            batches.rank, batches.world_size = accelerator.process_index, accelerator.num_processes
        skipping = {}
        if train:
            batches.balance = config.class_balance
            batches.group = config.gradient_accumulation_steps if config.captioning else 1
            # the scan has decoded every frame that evaluation takes, but training with jitter may meet a damaged one
            skipping = {"skip_unreadable": config.skip_unreadable, "skipped": splits.unreadable}

        # reading features is so fast that worker processes cost more than they save
        workers = 0 if name in features else config.num_workers
        loaders[name] = build_loader(dataset, model.collator(), workers, batches, **skipping)
    return loaders


@contextmanager
def stop_signals() -> Generator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM are appended, instead of ending the process, so that the current step
    can finish and be saved. The same signal a second time interrupts at once."""
    signals: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        if number in signals:
            raise KeyboardInterrupt
        signals.append(number)

    # Python allows only the main thread to set handlers
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, accelerator: Any, run_dir: Path
) -> dict[str, Any]:
    """Trains for config.epochs, keeps the weights of the epoch that is best on val, and scores them once on test.

    With config.resume it continues from the run's saved state, bit for bit as if it had not been stopped.
    Writes weights, state, log and predictions to `run_dir`; returns the contents of metrics.json, and the log.

    Raises:
        UserError: a loss that is not finite, a dead adapter, a video that cannot be read, a full disk.
        Stopped: SIGINT or SIGTERM was received; the state is saved.
    """
    # set up: model on the device, optimizer, schedule
    model.to(accelerator.device)
    if config.compile:
        for backbone in model.backbones().values():
            body_of(backbone).compile()  # in place, so that tensors keep their names in checkpoints
    engine = build_engine(model, loaders["train"], config, accelerator)

    # resume: restore the saved state; there is none if the run was stopped before its first save
    if config.resume and (run_dir / STATE).exists():
        engine.progress = resumed_progress(model, engine, config.epochs, run_dir)
        engine.started -= engine.progress.run_seconds
        loaders["train"].skipped.update(engine.progress.skipped)
        if accelerator.is_main_process:
            write_rows(engine.progress.log, run_dir / "log.jsonl")

    # train; save what --resume needs after each epoch, every `save_every` steps, and when a signal asks to stop
    with stop_signals() as signals:

        def save_or_stop(due: bool) -> None:
            (stopped,) = summed(accelerator, len(signals))  # so that all processes stop after the same step
            if stopped or due:
                save_progress(model, loaders["train"], engine, run_dir)
            if stopped:
                raise Stopped(signals[0] if signals else signal.SIGTERM)

        every = config.save_every
        engine.after_step = lambda: save_or_stop(every > 0 and engine.progress.step % every == 0)
        while engine.progress.epoch < config.epochs and not out_of_patience(engine.progress.log, config.patience):
            train_one_epoch(model, loaders["train"], engine)
            evaluate_and_log(model, loaders, engine, config, run_dir)
            engine.progress.next_epoch()
            save_or_stop(due=True)
    if engine.progress.epoch < config.epochs:
        patience = counted(config.patience, "epoch")
        print(f"stopped after epoch {engine.progress.epoch}: val has not improved for {patience}")

    # the weights of the best epoch are on disk once the main process has written them
    accelerator.wait_for_everyone()
    return score_best_epoch(model, loaders, config, engine, run_dir)


def score_best_epoch(
    model: VideoModel, loaders: dict[str, DataLoader], config: Config, engine: Engine, run_dir: Path
) -> dict[str, Any]:
    """Scores the weights in `run_dir` on val and test, and writes the predictions. Returns the contents of
    metrics.json, and the log."""
    accelerator, progress = engine.accelerator, engine.progress
    best_epoch = load_weights(run_dir, model)["epoch"]
    loaders["val"].decode_again()  # scores and thresholds are about the videos as inference sees them
    metrics = {"best_epoch": best_epoch} | score_splits(model, loaders, config, accelerator, run_dir)
    return metrics | {
        "skipped": all_skipped(loaders["train"], accelerator),
        "seconds": round(time.perf_counter() - engine.started, 1),
        "peak_mb": peak_memory(accelerator),
        "device": device_name(accelerator),
        "seconds_per_epoch": seconds_per_epoch(progress.log),
        "log": progress.log,
    }


def seconds_per_epoch(log: list[dict[str, Any]]) -> float:
    """The mean time per epoch. An epoch may have several rows in the log; the last one has its whole time."""
    seconds = {row["epoch"]: row["seconds"] for row in log}
    return round(sum(seconds.values()) / log[-1]["epoch"], 2)


def build_engine(model: VideoModel, loader: DataLoader, config: Config, accelerator: Any) -> Engine:
    """The engine of a new run, with its optimizer and the length of its schedule."""
    steps = config.epochs * math.ceil(len(loader) / config.gradient_accumulation_steps)
    optimizer = build_optimizer(model, config)
    if accelerator.scaler:  # accelerate's optimizer adds nothing else, and searches for a package twice a step
        optimizer = accelerator.prepare(optimizer)
    engine = Engine(accelerator, optimizer, steps, config.gradient_accumulation_steps)
    engine.label_smoothing, engine.augment = config.label_smoothing, Augment(config.augment, config.flip)
    if isinstance(model, VideoCaptioner):
        engine.word_loss = WordLoss(model, [sample.captions for sample in loader.dataset.samples])
    return engine


def evaluate_and_log(
    model: VideoModel, loaders: dict[str, DataLoader], engine: Engine, config: Config, run_dir: Path
) -> None:
    """Evaluates on val, saves the weights if they are the best so far, and writes a row of the log.

    It may be called after any step. The row then describes the current epoch so far.
    """
    row = evaluate_epoch(model, loaders, engine, config)
    if engine.accelerator.is_main_process:
        save_epoch(model, row, engine.progress.log, run_dir)
        if config.tensorboard:
            tensorboard_row(row, run_dir / "tensorboard")
    tqdm.write(epoch_line(row, config.epochs))


def save_epoch(model: VideoModel, row: dict[str, Any], log: list[dict[str, Any]], run_dir: Path) -> None:
    """Writes the log, and the weights if the epoch of this row of the log is the best so far."""
    # only the best weights are kept, so the file on disk is always the one to score
    if row["best"]:
        save_weights(run_dir, model, {k: row[k] for k in ("epoch", "step", "val_loss")})
    write_rows(log, run_dir / "log.jsonl")


def evaluate_epoch(model: VideoModel, loaders: dict[str, DataLoader], engine: Engine, config: Config) -> dict[str, Any]:
    """Evaluates on val and adds a row to the log. Returns the row; its `best` says whether it is better than all
    before. Raises DivergedError for a loss that is not finite."""
    engine.read_reports()
    progress = engine.progress
    val = evaluate(model, loaders["val"], engine.accelerator)
    if not math.isfinite(val["loss"]):  # the last step may have broken the weights, or overflowed only here
        raise DivergedError(f"the loss on val is {val['loss']} after step {progress.step}: lower --learning_rate")
    train_loss = progress.loss / progress.count
    row = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": train_loss, "val_loss": val["loss"]}
    if "accuracy" in val:
        row |= {"train_accuracy": progress.right / progress.count, "val_accuracy": val["accuracy"]}
    row |= {"val_mAP": val["mAP"]} if "mAP" in val else {}

    # classifiers are ranked by accuracy or mAP, then by loss, since small val splits have many ties; captioners by loss
    rank = (val.get("accuracy", val.get("mAP", 0.0)), -val["loss"])
    row["best"] = progress.best is None or rank > tuple(progress.best)
    row["skipped"] = len(all_skipped(loaders["train"], engine.accelerator))
    row["seconds"] = round(progress.seconds, 2)
    clips = min(progress.groups * engine.accumulate * config.batch_size, len(loaders["train"].dataset))
    row["clips_per_second"] = round(clips / progress.seconds, 1)

    if row["best"]:
        progress.best = rank
    progress.log.append(row)
    return row


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """What is printed after an epoch."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"train loss {row['train_loss']:.3f}", f"val loss {row['val_loss']:.3f}"]
    for name in (name for name in ("accuracy", "mAP") if f"val_{name}" in row):
        parts.append(f"val {name} {100 * row[f'val_{name}']:.1f} %")
    return "  ".join([*parts, f"{row['seconds']:.1f} s", *(["best so far"] if row["best"] else [])])


def out_of_patience(log: list[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` epochs brought no improvement on val. Never with patience 0."""
    best = max((row["epoch"] for row in log if row["best"]), default=math.inf)
    return 0 < patience <= max((row["epoch"] for row in log), default=0) - best


def all_skipped(loader: DataLoader, accelerator: Any) -> list[str]:
    """The errors of all videos that were skipped, by any process."""
    return sorted({error for errors in gathered(accelerator, [sorted(loader.skipped)]) for error in errors})


def save_progress(model: VideoModel, loader: DataLoader, engine: Engine, run_dir: Path) -> None:
    """Writes what --resume needs, including the random generator of every process."""
    engine.read_reports()
    accelerator, progress = engine.accelerator, engine.progress
    progress.skipped = all_skipped(loader, accelerator)
    progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
    progress.run_seconds = time.perf_counter() - engine.started
    generators = dict(gathered(accelerator, [*random_states(accelerator.process_index).items()]))
    if accelerator.is_main_process:
        save_state(run_dir, model, engine.optimizer, asdict(progress), generators)


def resumed_progress(model: VideoModel, engine: Engine, epochs: int, run_dir: Path) -> Progress:
    """Restores the saved state. Raises UserError if it is not a state of this run."""
    # a wrong field would otherwise fail hours later, or not at all
    accelerator = engine.accelerator
    values = load_state(run_dir, model, engine.optimizer, accelerator.process_index, accelerator.num_processes)
    try:
        progress = Progress(**values)
        counts = (progress.epoch, progress.step, progress.groups, progress.count, progress.right)
        # val was evaluated in every finished epoch, perhaps more than once, and perhaps in the current one
        evaluated = {row["epoch"] for row in progress.log} - {progress.epoch + 1}
        fits = (
            values.keys() == asdict(progress).keys()
            and progress.epoch <= epochs
            and progress.step <= engine.total_steps
            and progress.groups * epochs <= engine.total_steps
            and min(counts) >= 0
            and evaluated == {*range(1, progress.epoch + 1)}
        )
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(progress.scaler)
    except (TypeError, KeyError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(f"{run_dir / STATE} does not hold a state of this run")
    return progress


def tensorboard_row(row: dict[str, Any], folder: Path) -> None:
    """Writes the numbers of an evaluation for TensorBoard, over optimizer steps."""
    # not SummaryWriter: it writes in a thread, which would print a traceback when the disk is full
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
    from tensorboardX.summary import scalar

    make_folder(folder)
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_mAP", "clips_per_second")
    try:
        events = EventsWriter(str(folder / "events"), f".step{row['step']}")
        for name in (n for n in names if n in row):
            events.write_event(Event(summary=scalar(name, row[name]), step=row["step"], wall_time=time.time()))
        events.close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
