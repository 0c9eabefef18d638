"""Checks data, backbone and options before hours are spent on training; takes the flags of main.py, keeps nothing.

python doctor.py --data_dir my_clips --vision_model videomae --use_lora_vision True

Modules that need torch are imported inside the functions, so that --help stays fast.
"""

import copy
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, parse
from extras.shards import data_folder
from script import MAX_MESSAGE, UserError, counted, leave, printable, script

if TYPE_CHECKING:
    from build_model import VideoModel
    from runs import Run
    from VLoader import Splits

# a batch of 8 clips must lose half of its loss in 50 steps
OVERFIT_STEPS, OVERFIT_FRACTION = 50, 0.5
MAX_SEARCH = 120  # seconds that computing features may take to find near copies


@dataclass(frozen=True)
class Finding:
    """One row of the table. A check has failed if there is advice on what to fix, unless it is only a suspicion."""

    check: str
    result: str
    advice: str = ""
    suspicion: bool = False

    @property
    def failed(self) -> bool:
        return bool(self.advice) and not self.suspicion


# -- the data ---------------------------------------------------------------------------------------


def check_readable(splits: "Splits") -> Finding:
    """Decodes every frame of every video; training itself reads a few frames of each."""
    from tqdm import tqdm

    from readers import corner, open_video
    from scan import listed
    from VLoader import distinct

    check, errors = "every frame decodes", []
    samples = distinct([*splits.train, *splits.val, *splits.test])
    for sample in tqdm(samples, desc="decoding all", unit="video", leave=False):
        try:
            reader = open_video(sample.path)
            first, count = reader.part(sample.segment)
            # keeps one pixel of each frame, so that any video fits in memory
            reader.frames(range(first, first + count), corner)
        except UserError as error:
            errors.append(str(error))
    if errors:
        result = f"not in {counted(len(errors), 'video')}: {listed(errors)}"
        return Finding(check, result, "fix or remove them, or add --skip_unreadable True")
    return Finding(check, counted(len(samples), "video"))


def check_classes(splits: "Splits", folder: Path) -> Finding:
    """Looks for class folders without videos, and for classes with a single training video."""
    from readers import SYSTEM_FOLDERS, find_videos

    # read_splits() ignores empty folders, so look at the folders themselves
    check, counts = "classes have videos", Counter(s.label for s in splits.train)
    try:
        classes = [p for p in folder.iterdir() if p.is_dir() and p.name.lower() not in SYSTEM_FOLDERS]
        empty = sorted(p.name for p in classes if p.name[0] != "." and not find_videos(p))
    except (OSError, UserError) as error:
        return Finding(check, str(error), "make this folder readable")

    # one video cannot be in both train and val
    single = sorted(str(label) for label, count in counts.items() if count == 1)
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("empty folders", empty), ("one training video only", single))
        if names
    ]
    if problems:
        return Finding(check, "; ".join(problems), "add videos, or remove the class")
    return Finding(check, f"{len(counts)} classes, {min(counts.values())} to {max(counts.values())} videos each")


def check_labels(splits: "Splits") -> Iterator[Finding]:
    """Counts the videos of each label, and looks for labels with a single training video, and for labels that val or
    test never has, so that they cannot be scored there."""
    counts = {n: Counter(c for s in getattr(splits, n) for c in s.classes if c) for n in ("train", "val", "test")}
    rows = [f"{name} {'/'.join(str(count[name]) for count in counts.values())}" for name in splits.class_names]
    without = sum(not s.labels for s in splits.train)
    result = f"train/val/test {', '.join(rows)}; {without} training videos without any"
    single = [name for name in splits.class_names if counts["train"][name] == 1]
    advice = f"one training video only: {', '.join(single)}; add videos, or remove the label" if single else ""
    yield Finding("videos of each label", result, advice)
    for split in [name for name in ("val", "test") if getattr(splits, name)]:
        unseen = [name for name in splits.class_names if not counts[split][name]]
        result = f"all of {len(splits.class_names)}" if not unseen else f"not {', '.join(unseen)}"
        advice = f"add videos with these labels to {split}: without any they have no score there" if unseen else ""
        yield Finding(f"{split} has every label", result, advice)


def check_copies(splits: "Splits") -> Iterator[Finding]:
    """Looks for videos of val or test that are in train too, and for videos in two classes, by their contents. Segments
    of one video are copies if they overlap."""
    from extras.segments import first_overlap
    from readers import ReadError, digest

    known = cache(digest)  # a video may have many segments
    copies: dict[str, list[Any]] = defaultdict(list)
    split_of: dict[int, str] = {}  # by id(): two splits may have equal samples
    for name in ("train", "val", "test"):
        for sample in getattr(splits, name):
            split_of[id(sample)] = name
            with suppress(ReadError):  # check_readable reports it
                copies[known(sample.path)].append(sample)

    # copies inflate the scores; one video with two labels cannot be learned
    leaks = "val and test share no video with train", "remove the copies: they make scores too good"
    mixed = "no video is in two classes", "keep each in one class"
    for (check, advice), group in ((leaks, lambda s: split_of[id(s)]), (mixed, lambda s: s.label)):
        pairs = [pair for samples in copies.values() if (pair := first_overlap(samples, group))]
        if pairs:
            first = " = ".join(map(clip_name, pairs[0]))
            yield Finding(check, f"{counted(len(pairs), 'copied video')}, first {first}", advice)
        else:
            yield Finding(check, counted(len(copies), "different video"))


def check_recordings(splits: "Splits", data_dir: Path) -> Finding:
    """Looks for recordings with clips in two splits. If nothing says which clips come from one recording, their names
    may tell."""
    from extras.groups import crossing_clips, guess, shared_recordings

    check = "no recording is in two splits"
    if shared := shared_recordings(splits):
        listed = {where: ", ".join(names[:5]) + ", ..." * (len(names) > 5) for where, names in shared.items()}
        result = "; ".join(f"{counted(len(shared[w]), 'recording')} in {w}: {names}" for w, names in listed.items())
        return Finding(check, result, "move all clips of a recording into one split: scores are too good otherwise")
    samples = [*splits.train, *splits.val, *splits.test]
    if any(s.group is not None or s.segment is not None for s in samples):
        return Finding(check, counted(len({s.recording for s in samples}), "recording"))
    rule = guess(splits, data_dir)
    if not rule:
        return Finding(check, "names and folders suggest none")
    if crossing := crossing_clips(splits, rule, data_dir):
        advice = f"if names like these name recordings, add --group_by '{rule}' and make splits of whole recordings"
        return Finding(check, f"share a recording, by their names: {', '.join(crossing)}", advice, suspicion=True)
    return Finding(check, f"nor by their names (--group_by '{rule}')")


def check_near_copies(run: "Run") -> Finding:
    """Compares the clips of train, val and test by frozen features. Finds copies that are rescaled, compressed again or
    trimmed, which check_copies() does not."""
    from extras.groups import FEWEST, near_copies, whitened
    from VLoader import distinct

    check = "val and test have no near copies"
    samples = {name: distinct(getattr(run.splits, name)) for name in ("train", "val", "test")}
    everything = [sample for own in samples.values() for sample in own]
    if len(everything) < FEWEST:
        return Finding(check, f"not checked: needs {FEWEST} videos")
    rows, problem = signatures_of(run, everything)
    if rows is None:
        return Finding(check, f"not checked: {problem}")

    # clips that cannot be read become zeros, which are similar to nothing
    readable = rows.isfinite().all(1)  # (n,)
    white = whitened(rows[readable])  # (readable, k)
    vectors = white.new_zeros(len(rows), white.shape[1])
    vectors[readable] = white
    parts = dict(zip(samples, vectors.split([len(own) for own in samples.values()]), strict=True))
    found = []
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        for index, other, similarity in near_copies(parts[first], parts[second]):
            found.append((similarity, f"{second} in {first}", samples[second][index], samples[first][other]))
    if not found:
        return Finding(check, f"{counted(int(readable.sum()), 'clip')} compared")
    found.sort(key=lambda row: -row[0])
    counts = ", ".join(f"{count} of {places}" for places, count in Counter(row[1] for row in found).items())
    pairs = "; ".join(f"{clip_name(one)} ~ {clip_name(other)} ({value:.2f})" for value, _, one, other in found[:3])
    advice = "look at these pairs: remove copies, and keep clips of one recording together (--group_by)"
    return Finding(check, f"{counts}, most similar: {pairs}", advice, suspicion=True)


def signatures_of(run: "Run", samples: list[Any]) -> tuple[Any, str]:
    """(signatures (n, d) for near_copies(), NaN where a video cannot be read; "") or (None, why there are none).

    Features come from the cache of an earlier run, or are computed if that does not take long. Nothing is stored.
    """
    import torch
    from tqdm import tqdm

    from extras.groups import FEWEST, signatures
    from feature_cache import features_of, stack_clips
    from train_code import cast_frozen
    from VLoader import ClipDataset, EpochBatches, build_loader

    # the backbone as published, whatever will be trained, so the features that a frozen run has cached are valid
    model, config = copy.deepcopy(run.model), run.config
    cast_frozen(model, config, run.accelerator)
    encoder = model.vision_encoder.to(run.accelerator.device).eval()
    rows = cached_signatures(model, config, samples, run.accelerator)
    missing = [index for index in range(len(samples)) if index not in rows]

    absent = [samples[index] for index in missing]
    dataset = ClipDataset(absent, encoder.preprocessing, config.num_frames, config.frame_stride, [])
    batches = EpochBatches(dataset, 16)
    loader = build_loader(dataset, stack_clips, config.num_workers if len(missing) > 64 else 0, batches)
    started = 0.0
    with tqdm(loader.with_errors(), "near copies", len(batches), leave=False, unit="batch") as bar, torch.no_grad():
        for number, (batch, _) in enumerate(bar):
            # the first batch takes longer than the others, so it says little about how long all will take
            started = started or time.perf_counter()
            expected = (time.perf_counter() - started) / max(1, number) * len(batches)
            if expected > MAX_SEARCH:
                loader.close()
                cached = "a run with --freeze_visionbackbone True stores them"
                return None, f"computing features takes about {expected / 60:.0f} minutes; {cached}"
            if batch is not None:
                features = features_of(encoder, batch["video"], config.token_grid, run.accelerator)
                rows |= zip([missing[i] for i in batch["index"]], signatures(features, encoder.num_times), strict=True)
    loader.close()
    if len(rows) < FEWEST:
        return None, f"needs {FEWEST} readable videos"
    unknown = torch.full_like(next(iter(rows.values())), math.nan)
    return torch.stack([rows.get(index, unknown) for index in range(len(samples))]), ""


def cached_signatures(model: "VideoModel", config: Config, samples: list[Any], accelerator: Any) -> dict[int, Any]:
    """{index of a sample: its signature (d,)} for those whose features an earlier run has cached."""
    from extras.groups import signatures
    from feature_cache import open_store, place_of_store, video_ids
    from readers import ReadError

    if not place_of_store(model, config, accelerator)[0].is_dir():
        return {}
    store, rows = open_store(model, config, accelerator), {}
    for index, sample in enumerate(samples):
        with suppress(ReadError):
            (number,) = store.find(video_ids([sample]))
            if number >= 0:
                rows[index] = signatures(store.read(number)[None], model.vision_encoder.num_times)[0]
    return rows


def check_captions(splits: "Splits") -> Finding:
    """Looks for videos without a caption or answer, also in val and test."""
    check, samples = "every video has a caption", [*splits.train, *splits.val, *splits.test]
    without = [s for s in samples if not s.captions]
    if without:
        result = f"{counted(len(without), 'video')} without one, first {without[0].path}"
        return Finding(check, result, "add captions to metadata.jsonl")
    asked = sum(bool(s.question) for s in samples)
    count = counted(sum(len(s.captions) for s in samples) - asked, "caption")
    return Finding(check, count + (f", {counted(asked, 'answer')}" if asked else ""))


def clip_name(sample: Any) -> str:
    """The path of a sample, for a segment with its times."""
    times = "" if sample.segment is None else f" ({sample.segment.start:g} to {sample.segment.end:g} s)"
    return f"{sample.path}{times}"


def check_segments(splits: "Splits", config: Config) -> Iterator[Finding]:
    """Looks for segments that end after their video, or are shorter than a clip."""
    from readers import ReadError, open_video
    from VLoader import distinct

    beyond, short = [], []
    stride = max(1, config.frame_stride)  # 0 or less: frames are spread over the whole segment, so any number will do
    for sample in [s for s in distinct([*splits.train, *splits.val, *splits.test]) if s.segment is not None]:
        with suppress(ReadError):  # check_readable reports it
            reader = open_video(sample.path)
            times = reader.seconds(sample.segment.fps)
            # nothing says how long the last frame is shown: half a second more is a rounded time, not a mistake
            if sample.segment.end > times[-1] + 0.5:
                beyond.append(f"{clip_name(sample)}; the last frame is at {times[-1]:.2f} s")
            _, count = reader.part(sample.segment)
            if count <= (config.num_frames - 1) * stride:
                short.append(f"{clip_name(sample)} has {counted(count, 'frame')}")

    for check, found, advice in (
        ("segments end within their video", beyond, "correct start and end in metadata.jsonl: they are in seconds"),
        ("segments are as long as a clip", short, "their last frame is repeated: lower --num_frames or --frame_stride"),
    ):
        if found:
            yield Finding(check, f"not {counted(len(found), 'segment')}, first {found[0]}", advice)
        else:
            yield Finding(check, "all of them")


# -- the model --------------------------------------------------------------------------------------


def check_preprocessing(model: "VideoModel") -> Finding:
    """Compares mean and std with those in the backbone's own file."""
    from transforms import Preprocessing
    from vision import vision_preprocessor

    check, used = "mean and std are the backbone's", model.vision_encoder.preprocessing
    values = vision_preprocessor(model.sources["vision"], model.vision_encoder.config)
    own = Preprocessing.from_dict(values, used.image_size)
    if (used.mean, used.std, used.rescale_factor) != (own.mean, own.std, own.rescale_factor):
        result = f"mean {used.mean}, std {used.std}; the backbone's file has {own.mean}, {own.std}"
        return Finding(check, result, "use the backbone's preprocessor_config.json")
    return Finding(check, f"mean {used.mean}, std {used.std}")


def check_frames(model: "VideoModel", config: Config) -> Finding:
    """Compares the number of frames in clips, the backbone's configuration and its embeddings. TimeSformer would run
    with any number, and be wrong without an error."""
    from vision import own_frames, read_vision_config

    check, vision = "frames fit the backbone", model.vision_encoder
    if vision.family.is_image_encoder:
        return Finding(check, f"{counted(vision.num_frames, 'frame')}, encoded one at a time")
    configured = embedded = own_frames(vision.config)
    time_embeddings = getattr(getattr(vision.backbone, "embeddings", None), "time_embeddings", None)
    if time_embeddings is not None:
        embedded = time_embeddings.shape[1]
    if len({configured, embedded, config.num_frames}) > 1:
        counts = f"clips have {counted(config.num_frames, 'frame')}, the configuration {configured}"
        advice = "these must agree, or the backbone mixes up space and time"
        return Finding(check, f"{counts}, the embeddings {embedded}", advice)
    pretrained = own_frames(read_vision_config(model.sources["vision"]))
    note = "" if pretrained == embedded else f" (pretrained with {pretrained}: its positions in time are adapted)"
    return Finding(check, f"{counted(embedded, 'frame')}{note}")


def check_first_loss(model: "VideoModel", batch: dict[str, Any], num_classes: int) -> Finding:
    """An untrained head guesses, so its loss is about ln K. Much more or less means that inputs have a wrong scale."""
    import torch

    from train_code import loss_sum

    with torch.no_grad():
        loss, _, targets = loss_sum(model.eval(), batch)
    num_classes = 2 if model.multi_label else num_classes  # each class is a yes or no
    mean, expected = loss.item() / targets.numel(), math.log(num_classes)
    result = f"{mean:.3f}, ln {num_classes} = {expected:.3f}"
    near = abs(mean - expected) < 0.25 * expected  # False for NaN
    advice = "" if near else "check the scale of the inputs: mean, std, weights"
    return Finding("the first loss is at chance level", result, advice)


def check_gradients(model: "VideoModel", batch: dict[str, Any]) -> Finding:
    """Makes the first two steps of a training, with its checks: gradients where they should be, and nowhere else."""
    import torch

    from build_model import adapters, trained_tensors
    from train_code import first_steps_checked, loss_sum

    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-4)
    check = "trained tensors get gradients"
    try:
        for step in range(2):
            loss_sum(model.train(), batch)[0].backward()
            with first_steps_checked(model, step):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except (UserError, RuntimeError) as error:  # torch raises RuntimeError if nothing at all needs a gradient
        return Finding(check, str(error), "this training would not learn; do not start it")
    return Finding(check, f"{len(trained_tensors(model))} trained tensors, {len([*adapters(model)])} adapters")


def check_overfit(model: "VideoModel", batch: dict[str, Any], learning_rate: float) -> Finding:
    """Trains on one batch only. A model that cannot overfit eight clips will not learn from thousands."""
    import torch

    from build_model import trained_tensors
    from train_code import loss_sum

    # no weight decay, no schedule, no validation: nothing here keeps the model from memorising
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=learning_rate, weight_decay=0)
    losses = []
    for _ in range(OVERFIT_STEPS):
        loss, _, targets = loss_sum(model.train(), batch)
        mean = loss / (targets != -100).sum()
        losses.append(mean.item())
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained_tensors(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    result = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {OVERFIT_STEPS} steps at learning rate {learning_rate:g}"
    learned = losses[-1] < OVERFIT_FRACTION * losses[0]  # False for NaN
    advice = "" if learned else "try another --learning_rate; look at labels and clips"
    return Finding("a batch of 8 can be overfitted", result, advice)


# -- all of them ------------------------------------------------------------------------------------


def first_batch(model: "VideoModel", dataset: Any, device: Any) -> dict[str, Any] | None:
    """Eight training clips of as many classes, or sets of labels, as possible; None if no video can be read."""
    from train_code import to_device

    # the first clip of every class, then the second of every class, and so on
    counts: Counter = Counter()
    order = []
    for index, sample in enumerate(dataset.samples):
        order.append((counts[sample.classes], index))
        counts[sample.classes] += 1
    items = (dataset[0, index] for _, index in sorted(order))
    readable = list(islice((item for item in items if "error" not in item), 8))
    return to_device(model.collator()(readable), device) if readable else None


def examine(run: "Run") -> list[Finding]:
    """The results of all checks that fit the task. The model is left as it was."""
    # the data
    splits, config, device = run.splits, run.config, run.accelerator.device
    data_dir = data_folder(config.data_dir, config.output_dir)
    findings = [check_readable(splits), *check_copies(splits), check_recordings(splits, data_dir)]
    findings.append(check_near_copies(run))
    if config.captioning:
        findings.append(check_captions(splits))
    elif run.model.multi_label:
        findings += check_labels(splits)
    else:
        findings.append(check_classes(splits, data_dir / "train"))
    if any(s.segment is not None for s in splits.train + splits.val + splits.test):
        findings += check_segments(splits, config)

    # the model needs a batch; without one, the data has to be fixed first
    model = copy.deepcopy(run.model).to(device)
    batch = first_batch(model, run.loaders("train")["train"].dataset, device)
    if batch is None:
        return findings
    findings += [check_preprocessing(model), check_frames(model, config)]
    if not config.captioning:
        findings.append(check_first_loss(model, batch, len(splits.class_names)))

    # these two train, so each gets a fresh copy
    findings.append(check_gradients(copy.deepcopy(model), batch))
    findings.append(check_overfit(copy.deepcopy(model), batch, config.learning_rate))
    return findings


def table(findings: list[Finding]) -> str:
    """The findings as text, with the advice below each failed check and each suspicion."""
    width = max(len(f.check) for f in findings)
    lines = []
    for f in findings:
        result = printable(f.result)[:MAX_MESSAGE]  # it may contain file names
        lines.append(f"{'FAIL' if f.failed else 'WARN' if f.advice else 'ok':<5} {f.check:<{width}}  {result}")
        if f.advice:
            lines.append(f"{'':<5} {'':<{width}}  -> {f.advice}")
    return "\n".join(lines)


@script
def main(argv: list[str] | None = None) -> int:
    """Prints a table of check, result and what to fix; returns 1 if a check failed, else 0."""
    config, _ = parse(argv, "doctor")
    from runs import prepare, print_backbones

    run = prepare(config, Path(config.output_dir))
    print_backbones(run)
    findings = examine(run)
    failed = sum(finding.failed for finding in findings)
    print(table(findings))
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    if warned := sum(finding.suspicion for finding in findings):
        print(f"{counted(warned, 'warning')}: look at the clips")
    return int(failed > 0)


if __name__ == "__main__":
    leave(main())
