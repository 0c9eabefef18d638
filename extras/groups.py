"""Which clips come from one recording, and what depends on it: --group_by, recordings in two splits, guesses from
names, near copies.

Clips of one recording show the same people, objects and background. If they are in two splits, scores are too good;
intervals that treat them as independent are too narrow. `samples` are those of VLoader.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from extras.shards import parts_below
from script import UserError, counted, shown

# names of clips that contain the name of their recording: v_Archery_g07_c02, <id>_000010_000020, match3_clip12. The
# first group of each pattern is the recording
NAMES = (r"(.+_g\d+)_c\d+", r"(.+)_\d+_\d+(\.\w+)?$", r"(.+)[ _-][a-z]*\d+(\.\w+)?$")
# clips at least this similar count as near copies. On half of a set of real clips, anything from 0.6 to 0.75 separates
# copies from other clips; this is the strictest of these, because some other clips are very similar too
COPY = 0.75
COMPONENTS = 128  # of whitened features, at most
PER_COMPONENT = 5  # clips that it takes to know the variance of a component
FEWEST = 80  # clips; fewer give too few components, and unrelated clips then are often similar


# -- --group_by -------------------------------------------------------------------------------------


def grouped(splits: dict[str, list[Any]], data_dir: Path, rule: str) -> dict[str, list[Any]]:
    """The samples of each split with their groups, as --group_by says: None for a video without a group.

    Raises UserError if the rule does not fit the data, or if rows of one video name different groups.
    """
    samples = [sample for name in splits for sample in splits[name]]
    if rule == "column" and (without := [s for s in samples if s.group is None]):
        count = f"{len(without)} of {counted(len(samples), 'row')}"
        raise UserError(f"--group_by column: {count} of metadata.jsonl have no group, first {without[0].path}")
    if rule == "auto" and all(s.group is None for s in samples):
        return splits

    # all rows of a video belong to one recording; those that name none get the name that the others have
    names: dict[str, str] = {}
    for folder, sample in ((data_dir / name, s) for name in splits for s in splits[name]):
        group = group_of(sample, rule, folder)
        if group is not None and names.setdefault(os.path.abspath(sample.path), group) != group:
            others = names[os.path.abspath(sample.path)]
            raise UserError(f"{sample.path} has two groups, {shown(others)} and {shown(group)}; a video has only one")
    if not names and rule not in ("auto", "none"):
        where = "lies in a folder below its class folder" if rule == "parent" else "has a name that it matches"
        raise UserError(f"--group_by {rule}: no video {where}; choose another rule, or none")
    return {
        name: [replace(s, group=names.get(os.path.abspath(s.path))) for s in samples]
        for name, samples in splits.items()
    }


def group_of(sample: Any, rule: str, folder: Path) -> str | None:
    """The group that a rule gives a sample of the split in `folder`, or None."""
    if rule in ("auto", "column"):
        return sample.group
    if rule == "none":
        return None
    if rule == "parent":
        # without the class folder, so that one recording may have clips of several classes
        parts = [part for part in parts_below(sample.path, folder)[:-1] if part != os.pardir]
        class_folder = next((number for number, part in enumerate(parts, start=1) if part in sample.classes), 0)
        below = parts[class_folder:]
        return "/".join(below) or None
    match = re.search(rule, sample.path.name)
    return (match[1] if match.re.groups else match[0]) or None if match else None


def ungrouped_classes(train: list[Any], val: list[Any]) -> str:
    """The end of the line about the held-out val: which classes have no clip in it; "" if all have."""
    known, held_out = ({name for s in samples for name in s.classes if name} for samples in (train, val))
    absent = sorted(known - held_out)
    return f"; none of {', '.join(absent)}: too few recordings, all stay in train" if absent else ""


# -- recordings in two splits -----------------------------------------------------------------------


def shared_recordings(splits: Any) -> dict[str, list[str]]:
    """The recordings that are in two splits: {"train and test": their names, sorted}."""
    names = {name: {s.recording for s in getattr(splits, name)} for name in ("train", "val", "test")}
    pairs = {f"{a} and {b}": sorted(names[a] & names[b]) for a, b in combinations(names, 2)}
    return {places: recordings for places, recordings in pairs.items() if recordings}


def crossing_clips(splits: Any, rule: str, data_dir: Path) -> list[str]:
    """How many clips share a recording with another split, if `rule` names the recordings: "3 of 40 val clips with
    train", for each pair of splits."""
    samples = {name: getattr(splits, name) for name in ("train", "val", "test")}
    # a val that was held out lies in train/
    folders = {name: data_dir / (name if (data_dir / name).is_dir() else "train") for name in samples}
    groups = {name: [group_of(s, rule, folders[name]) for s in samples[name]] for name in samples}
    found = []
    for first, second in combinations(samples, 2):
        known = {*groups[first]} - {None}
        count = sum(group in known for group in groups[second])
        if count:
            found.append(f"{count} of {counted(len(groups[second]), f'{second} clip')} with {first}")
    return found


def guess(splits: Any, data_dir: Path) -> str:
    """The --group_by that most likely names the recordings, or "" if names and folders suggest none."""
    samples = [*splits.train, *splits.val, *splits.test]
    for rule in (*NAMES, "parent"):
        classes: dict[str | None, Counter[str | None]] = {}
        for sample in samples:
            group = group_of(sample, rule, data_dir / "train")
            classes.setdefault(sample.label, Counter())[group] += 1
        if sum(map(looks_grouped, classes.values())) * 2 > len(classes):
            return rule
    return ""


def looks_grouped(groups: Counter[str | None]) -> bool:
    """Whether the clips of a class, counted by group, look like several clips of each of several recordings."""
    sizes = [count for group, count in groups.items() if group is not None]
    total = groups.total()
    several = sum(size for size in sizes if size > 1)
    return len(sizes) >= 3 and max(sizes) * 2 <= total and several * 2 >= total


# -- near copies ------------------------------------------------------------------------------------


def signatures(features: torch.Tensor, times: int) -> torch.Tensor:
    """What identifies a clip even if it is rescaled, compressed or trimmed: (B, 4 D) from features (B, 1 + N, D).

    The last times * grid^2 tokens, averaged over time and over the quarters of the picture; (B, D) if grid is 1.
    """
    per_time = (features.shape[1] - 1) // times
    side = int(per_time**0.5)
    tokens = features[:, -times * side * side :].float().unflatten(1, (times, side, side)).mean(1)  # (B, g, g, D)
    return F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), min(2, side)).flatten(1)


def whitened(rows: torch.Tensor) -> torch.Tensor:
    """Signatures (n, d) -> unit vectors (n, k), scaled so that each of the k main components has the same variance.

    What all clips share, or all clips of a class, then weighs no more than what sets a single clip apart (Jegou and
    Chum 2012). Dot products are similarities.
    """
    sample = rows[:: max(1, len(rows) // 4096)]  # enough to know the components
    count = min(COMPONENTS, len(sample) // PER_COMPONENT, rows.shape[1])
    centre = sample.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the random start of the decomposition
        _, scales, components = torch.svd_lowrank(sample - centre, q=count, niter=8)  # (k,), (d, k)
    # no more than the rank: the scale of the others is rounding error
    kept = scales > 1e-4 * scales[0]
    return F.normalize((rows - centre) @ components[:, kept] / scales[kept])


def near_copies(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[int, int, float]]:
    """For each of the whitened `second` (m, k) that has a near copy in `first` (n, k): (its index, the index of the
    most similar one, the similarity). In blocks, because all similarities at once could be huge."""
    size = max(1, 2**24 // max(1, len(first)))
    for start in range(0, len(second) if len(first) else 0, size):
        best = (second[start : start + size] @ first.T).max(1)
        for row in (best.values >= COPY).nonzero().flatten().tolist():
            yield start + row, int(best.indices[row]), float(best.values[row])
