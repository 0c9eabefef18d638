"""The checks of doctor.py: data, backbone, adapters, first loss, a batch to overfit."""

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from build_model import VideoModel, adapters, trained_tensors
from config import Config
from pretrained import load_preprocessor, read_config
from readers import SYSTEM_FOLDERS, ReadError, corner, digest, find_videos, open_video
from script import LONGEST_MESSAGE, UserError, printable
from train_code import first_steps_checked, loss_sum, to_device
from transforms import Preprocessing
from VLoader import Splits

OVERFIT_STEPS, OVERFIT_SHARE = 50, 0.5  # a batch of 8 must lose half of its loss in 50 steps


@dataclass(frozen=True)
class Finding:
    """One row of the table; `advice` is empty where the check passed."""

    check: str
    result: str
    advice: str = ""


# -- the data ---------------------------------------------------------------------------------------


def check_readable(splits: Splits) -> Finding:
    """Decodes every frame of every video."""
    from tqdm import tqdm

    bad = []
    samples = [*splits.train, *splits.val, *splits.test]
    for sample in tqdm(samples, desc="decoding all", unit="video", leave=False):
        try:
            reader = open_video(sample.path)
            reader.frames(range(len(reader)), corner)
        except UserError as error:
            bad.append(str(error))
    if bad:
        return Finding(
            "every frame decodes",
            f"{len(bad)} videos do not: {bad[0]}",
            "fix or remove them, or add --skip_unreadable True",
        )
    return Finding("every frame decodes", f"{len(samples)} videos")


def check_classes(splits: Splits, folder: Path) -> Finding:
    """No class folder without videos, no class with a single training video."""
    counts = Counter(s.label for s in splits.train)
    try:
        classes = [p for p in folder.iterdir() if p.is_dir() and p.name.lower() not in SYSTEM_FOLDERS]
        empty = sorted(p.name for p in classes if p.name[0] != "." and not find_videos(p))
    except (OSError, UserError) as error:
        return Finding("classes have videos", str(error), "this folder must be readable")
    single = sorted(str(label) for label, count in counts.items() if count == 1)
    if empty or single:
        result = "; ".join(
            f"{kind}: {', '.join(names)}"
            for kind, names in (("empty folders", empty), ("one video only", single))
            if names
        )
        return Finding("classes have videos", result, "add videos, or remove the class")
    return Finding(
        "classes have videos", f"{len(counts)} classes, {min(counts.values())} to {max(counts.values())} videos each"
    )


def check_twins(splits: Splits) -> Iterator[Finding]:
    """No video of val or test in train, no video in two classes; by content. Unreadable ones are passed over."""
    places: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for name in ("train", "val", "test"):
        for sample in getattr(splits, name):
            with suppress(ReadError):  # check_readable names it
                places[digest(sample.path)].append((name, sample))
    leaked = [p for p in places.values() if len({n for n, _ in p}) > 1]
    mixed = [p for p in places.values() if len({s.label for _, s in p}) > 1]
    for check, found, advice in (
        ("val and test share no video with train", leaked, "remove the copies: scores on them mean nothing"),
        ("no video lies in two classes", mixed, "keep each in its one class"),
    ):
        if found:
            pair = " = ".join(str(sample.path) for _, sample in found[0][:2])
            yield Finding(check, f"{len(found)} do, first {pair}", advice)
        else:
            yield Finding(check, f"{len(places)} different videos")


def check_captions(splits: Splits) -> Finding:
    samples = [*splits.train, *splits.val, *splits.test]
    lacking = [s for s in samples if not s.captions]
    if lacking:
        return Finding(
            "every video has a caption",
            f"{len(lacking)} have none, first {lacking[0].path}",
            "add them to metadata.jsonl",
        )
    return Finding("every video has a caption", f"{sum(len(s.captions) for s in samples)} captions")


# -- the model --------------------------------------------------------------------------------------


def check_preprocessing(model: VideoModel) -> Finding:
    """Mean and std in use are those of the backbone's own file."""
    used = model.vision_encoder.preprocessing
    values = load_preprocessor(model.sources["vision"], model.vision_encoder.config.model_type)
    own = Preprocessing.from_dict(values, used.image_size)
    if (used.mean, used.std, used.rescale_factor) != (own.mean, own.std, own.rescale_factor):
        result = f"mean {used.mean}, std {used.std}; the backbone's file says {own.mean}, {own.std}"
        return Finding("mean and std are the backbone's", result, "use the backbone's preprocessor_config.json")
    return Finding("mean and std are the backbone's", f"mean {used.mean}, std {used.std}")


def check_frames(model: VideoModel, config: Config) -> Finding:
    """The backbone's configuration and embeddings agree with the clips' frames; other than trained is said."""
    settings, embeddings = model.vision_encoder.config, model.vision_encoder.backbone.embeddings
    held = settings.num_frames
    if hasattr(embeddings, "time_embeddings"):
        held = embeddings.time_embeddings.shape[1]
    if len({settings.num_frames, held, config.num_frames}) > 1:
        result = (
            f"clips have {config.num_frames} frames, the configuration {settings.num_frames}, the embeddings {held}"
        )
        return Finding("frames fit the backbone", result, "these must agree, or the backbone mixes up space and time")
    trained = read_config(model.sources["vision"]).num_frames
    note = "" if trained == held else f" (trained with {trained}: its time embeddings are interpolated)"
    return Finding("frames fit the backbone", f"{held} frames{note}")


@torch.no_grad()
def check_first_loss(model: VideoModel, batch: dict[str, torch.Tensor], num_classes: int) -> Finding:
    """An untrained head guesses: its loss is ln K, give or take a quarter."""
    loss, _, targets = loss_sum(model.eval(), batch)
    mean, expected = loss.item() / len(targets), math.log(num_classes)
    result = f"{mean:.3f}, ln {num_classes} = {expected:.3f}"
    if not abs(mean - expected) < 0.25 * expected:
        return Finding("the first loss is that of guessing", result, "look at the inputs' scale: mean, std, weights")
    return Finding("the first loss is that of guessing", result)


def check_adapters(model: VideoModel, batch: dict[str, torch.Tensor], config: Config) -> Finding:
    """The checks of a training's first two steps: gradients everywhere they should be, nowhere else."""
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-4)
    what = f"{len(trained_tensors(model))} trained tensors, {len(list(adapters(model)))} adapters"
    try:
        for step in range(2):
            loss_sum(model.train(), batch)[0].backward()
            with first_steps_checked(model, step):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except (UserError, RuntimeError) as error:  # a loss that needs no gradient at all is a RuntimeError
        return Finding("what is trained gets gradients", str(error), "this training would not learn; do not start it")
    return Finding("what is trained gets gradients", what)


def check_overfit(model: VideoModel, batch: dict[str, torch.Tensor], config: Config) -> Finding:
    """A model that cannot learn eight clips by heart will not learn from thousands."""
    rate = config.learning_rate
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=rate, weight_decay=0)
    losses = []
    for _ in range(OVERFIT_STEPS):
        loss, _, targets = loss_sum(model.train(), batch)
        losses.append(loss.item() / int((targets != -100).sum()))
        (loss / (targets != -100).sum()).backward()
        nn.utils.clip_grad_norm_(trained_tensors(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    result = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {OVERFIT_STEPS} steps at learning rate {rate:g}"
    if not losses[-1] < OVERFIT_SHARE * losses[0]:
        return Finding(
            "a batch of 8 can be learned by heart", result, "try another --learning_rate; look at labels and clips"
        )
    return Finding("a batch of 8 can be learned by heart", result)


# -- all of them ------------------------------------------------------------------------------------


def first_batch(model: VideoModel, loader: Any, device: torch.device) -> dict[str, torch.Tensor] | None:
    """Eight training clips, of as many classes as there are; None if no video can be read."""
    samples = loader.dataset.samples
    seen: Counter = Counter()
    rank = []
    for index, sample in enumerate(samples):
        rank.append((seen[sample.label], index))
        seen[sample.label] += 1
    items = (loader.dataset[0, index] for _, index in sorted(rank))
    readable = list(islice((item for item in items if "error" not in item), 8))
    return to_device(model.collator()(readable), device) if readable else None


def examine(model: VideoModel, loader: Any, splits: Splits, config: Config, device: torch.device) -> list[Finding]:
    """Every check that fits the task; of the data alone if no training video can be read. The model is left as it was."""
    model = copy.deepcopy(model).to(device)
    findings = [check_readable(splits), *check_twins(splits)]
    if config.captioning:
        findings.append(check_captions(splits))
    else:
        findings.append(check_classes(splits, Path(config.data_dir) / "train"))
    batch = first_batch(model, loader, device)
    if batch is None:
        return findings
    findings += [check_preprocessing(model), check_frames(model, config)]
    if not config.captioning:
        findings.append(check_first_loss(model, batch, len(splits.class_names)))
    trials: list[Callable[..., Finding]] = [check_adapters, check_overfit]
    findings += [trial(copy.deepcopy(model), batch, config) for trial in trials]
    return findings


def table(findings: list[Finding]) -> str:
    width = max(len(f.check) for f in findings)
    lines = []
    for f in findings:
        result = printable(f.result)[:LONGEST_MESSAGE]  # it may hold names of files
        lines.append(f"{'FAIL' if f.advice else 'ok':<5} {f.check:<{width}}  {result}")
        if f.advice:
            lines.append(f"{'':<5} {'':<{width}}  -> {f.advice}")
    return "\n".join(lines)
