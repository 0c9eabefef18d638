"""Checks before training that every video can be read, and remembers the result until the video changes.

A run calls prepare_data(), which returns the splits without unreadable videos, with cached features or stored frames if
the run uses them.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from build_model import VideoModel
from config import Config
from extras.frame_store import StoredFrames, open_frames, read_frames, store_missing, stored_splits
from feature_cache import (
    CachedFeatures,
    FeatureStore,
    cached_splits,
    compute_missing,
    open_store,
    read_features,
    use_cache,
    video_ids,
)
from readers import Reader, ReadError, Segment, corner, digest, open_video, stamp
from script import UserError, counted, is_main, make_folder, printable, remove_leftovers, write_json
from transforms import view_indices
from VLoader import SPLITS, Key, Sample, Splits, WorkerLoader, identified

MAX_LISTED = 20  # unreadable videos that an error message lists
SCAN_CACHE = ".videos.json"  # in --output_dir

# the result for a readable video: {"stamp": ..., "digest": ..., "decoded": ["frames/stride/clips", ...]}; for a
# segment, its times are appended
Record = dict[str, Any]
# what to read of a video: (a segment or None for the whole video, the number of clips to decode)
Part = tuple[Segment | None, int | None]


# -- before training --------------------------------------------------------------------------------


def prepare_data(
    splits: Splits, config: Config, model: VideoModel, accelerator: Any
) -> tuple[Splits, dict[str, CachedFeatures] | None, dict[str, StoredFrames] | None]:
    """Checks every video. Returns (the splits without unreadable videos, the cached features by split or None, the
    stored frames by split or None).

    Videos of cached splits are decoded when their features are computed, those of stored splits when their frames are
    stored, all others by the scan.
    Raises UserError with a list of the unreadable videos, unless --skip_unreadable True.
    """
    # rank 0 goes first, so that the other processes find its results instead of reading the videos again
    cached = cached_splits(config) if use_cache(model, config) else ()
    stored = stored_splits(splits, model, config)
    with accelerator.main_process_first():
        splits, bad = scan(splits, config, cached, stored)
    if stored:
        splits, frames = prepare_frames(splits, stored, bad, config, model, accelerator)
        return splits, None, frames
    if not cached:
        return without_unreadable(splits, bad, config), None, None

    # computing features can find more unreadable videos, so the error that lists them comes last
    with accelerator.main_process_first():
        store = open_store(model, config, accelerator)
    readable = {name: [s for s in getattr(splits, name) if s.key not in bad] for name in cached}
    bad |= compute_missing(store, model, replace(splits, **readable), config, accelerator)
    splits = without_unreadable(splits, bad, config)
    return splits, read_features(store, splits, config), None


def prepare_frames(
    splits: Splits, stored: Sequence[str], bad: dict[Key, str], config: Config, model: VideoModel, accelerator: Any
) -> tuple[Splits, dict[str, StoredFrames]]:
    """Stores the frames of these splits that are missing. Returns (the splits without the samples in `bad` and the
    unreadable ones found here, the stored frames by split)."""
    with accelerator.main_process_first():
        stores = {name: open_frames(model, config, name) for name in stored}
    for name, store in stores.items():
        readable = [s for s in getattr(splits, name) if s.key not in bad]
        bad |= store_missing(store, readable, model, config, accelerator)
    splits = without_unreadable(splits, bad, config)
    return splits, read_frames(stores, splits)


def scan(
    splits: Splits, config: Config, cached: Sequence[str] = (), stored: Sequence[str] = ()
) -> tuple[Splits, dict[Key, str]]:
    """Returns (the splits with the digest of every video, {key: error} of the unreadable samples)."""
    # videos that are not here, but whose features may be cached
    absent = {s.path: s.digest for name in cached for s in getattr(splits, name) if s.digest}
    if absent and config.controls:
        raise UserError(f"--controls True needs the videos, and {next(iter(absent))} is not here")

    # records of all runs in --output_dir are shared
    jobs = clips_to_decode(splits, config.test_clips, cached, stored)
    file = Path(config.output_dir) / SCAN_CACHE
    known = read_records(file)
    bad, good = scan_videos(jobs, config.num_frames, config.frame_stride, config.num_workers, known)
    records = {os.path.abspath(path): record for path, record in good.items()}
    # write only what is new, and nothing if the run is about to stop because of unreadable videos
    if is_main() and not records.items() <= known.items() and (not bad or config.skip_unreadable):
        write_records(file, records)
    return identified(splits, absent | {path: record["digest"] for path, record in good.items()}), bad


def clips_to_decode(
    splits: Splits, test_clips: int, cached: Sequence[str] = (), stored: Sequence[str] = ()
) -> dict[Key, int | None]:
    """What the scan has to read: {key: clips}.

    For val and test these are all clips that evaluation uses; for train 0, which means two frames; for the `cached` and
    `stored` splits None, because their videos are decoded later. Those of `cached` splits need not be here: only
    features of them are needed.
    """
    counts = {"train": 0, "val": 1, "test": test_clips} | dict.fromkeys((*cached, *stored))
    return {s.key: n for name, n in counts.items() for s in getattr(splits, name) if name not in cached or not s.digest}


def without_unreadable(splits: Splits, bad: dict[Key, str], config: Config) -> Splits:
    """The splits without the samples in `bad`. Raises UserError with a list of them unless --skip_unreadable True."""
    errors = [*dict.fromkeys(bad.values())]  # the segments of an unreadable file share one
    if bad and not config.skip_unreadable:
        raise UserError(f"{listed(errors)} -- fix or remove them, or add --skip_unreadable True to skip them")
    if bad:
        splits = drop_unreadable(splits, bad)
        first = printable(splits.unreadable[0])
        print(f"skipped {counted(len(splits.unreadable), 'unreadable video')} (listed in metrics.json), first: {first}")
    return splits


def listed(errors: list[str]) -> str:
    """The first errors, and how many more there are."""
    more = f"; and {len(errors) - MAX_LISTED} more" if len(errors) > MAX_LISTED else ""
    return "; ".join(errors[:MAX_LISTED]) + more


def drop_unreadable(splits: Splits, bad: dict[Key, str]) -> Splits:
    """The splits without the samples in `bad`. Raises UserError if a split or a class loses its last video."""
    kept = {name: [s for s in getattr(splits, name) if s.key not in bad] for name in SPLITS}
    for name, samples in kept.items():
        if getattr(splits, name) and not samples:
            raise UserError(f"no video of {name} can be read; the first error: {next(iter(bad.values()))}")
    # a class without training videos cannot be learned, so this is an error even with --skip_unreadable
    lost = set(splits.class_names) - {c for s in kept["train"] for c in s.classes}
    if lost:
        raise UserError(f"no training video of class {min(lost)} can be read")
    return replace(splits, **kept, unreadable=tuple(dict.fromkeys(bad.values())))


def features_to_compute(
    samples: list[Sample], config: Config, known: dict[str, Record], store: FeatureStore
) -> tuple[list[Sample], np.ndarray, dict[Key, str], dict[Path, Record]]:
    """What is missing of the features of samples: (the samples, their ids (n, 16) uint8, {key: error} of those whose
    files cannot be read, {path: record} of the others). Decodes nothing. `known` has earlier records."""
    # the digests of the videos first, from an earlier scan if they have not changed
    nothing = {sample.key: None for sample in samples}
    bad, records = scan_videos(nothing, config.num_frames, config.frame_stride, config.num_workers, known)
    readable = [replace(s, digest=records[s.path]["digest"]) for s in samples if s.key not in bad]

    # then those features that no earlier run has computed
    ids = video_ids(readable)
    missing = np.flatnonzero(store.find(ids) < 0)
    return [readable[i] for i in missing], ids[missing], bad, records


# -- the scan ---------------------------------------------------------------------------------------


def scan_videos(
    jobs: Mapping[Any, int | None], num_frames: int, stride: int, num_workers: int, known: dict[str, Record]
) -> tuple[dict[Key, str], dict[Path, Record]]:
    """Returns ({key: error} of the unreadable samples, {path: record} of the others).

    `jobs` is {Key: clips}, the number of clips to decode of each sample. 0 decodes only the first and last frame of one
    clip, and None decodes nothing. `known` has earlier records by absolute path. A video that has not changed since
    then, and of which the same frames were decoded, is not read again.
    """
    # a file is read once for all of its segments
    videos: dict[Path, list[Part]] = {}
    for key, clips in jobs.items():
        path, segment = key if isinstance(key, tuple) else (key, None)
        videos.setdefault(path, []).append((segment, clips))

    # compare stamps first: for unchanged videos that is all the work
    bad: dict[Key, str] = {}
    records: dict[Path, Record] = {}
    to_read: list[tuple[Path, list[Part]]] = []
    for path, parts in videos.items():
        needed = {name_part(part, num_frames, stride) for part in parts if part[1] is not None}
        try:
            current = stamp(path)
        except ReadError as error:
            bad |= {key_of(path, part): str(error) for part in parts}
            continue
        record = known.get(os.path.abspath(path))
        unchanged = record is not None and record["stamp"] == current
        decoded = {*record["decoded"]} if unchanged else set()
        if not unchanged or not needed <= decoded:
            to_read.append((path, parts))
            record = {"stamp": current, "decoded": sorted(decoded | needed)}
        records[path] = record

    # a record is complete only once its video was read
    results = read_videos(ScanDataset(to_read, num_frames, stride), num_workers)
    for (path, parts), (errors, content) in zip(to_read, results, strict=True):
        failed = {part: error for part, error in zip(parts, errors, strict=True) if error}
        bad |= {key_of(path, part): error for part, error in failed.items()}
        if len(failed) == len(parts):
            del records[path]
        else:
            missing = {name_part(part, num_frames, stride) for part in failed}
            records[path] |= {"digest": content, "decoded": sorted({*records[path]["decoded"]} - missing)}
    return bad, records


def key_of(path: Path, part: Part) -> Key:
    """The key of the sample that a part of a video belongs to."""
    return path if part[0] is None else (path, part[0])


def name_part(part: Part, num_frames: int, stride: int) -> str:
    """What a record calls a decoded part of a video."""
    segment, clips = part
    name = f"{num_frames}/{stride}/{clips}" if clips else "two frames"
    return name if segment is None else f"{name} of {[*segment]}"


def read_videos(dataset: "ScanDataset", num_workers: int) -> list[tuple[list[str], str]]:
    """All items of the dataset, in order."""
    # for a few videos, starting worker processes takes longer than reading
    count, results = len(dataset), []
    loader = WorkerLoader(dataset, batch_size=16, num_workers=num_workers if count > 64 else 0, collate_fn=list)
    with tqdm(total=count, desc="checking videos", unit="video", leave=False, disable=not count) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))
    return results


class ScanDataset(Dataset):
    """Item i is (the error of each part of video i, "" for none; the digest of video i). `jobs` gives its parts."""

    def __init__(self, jobs: list[tuple[Path, list[Part]]], num_frames: int, stride: int):
        self.jobs, self.num_frames, self.stride = jobs, num_frames, stride

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[list[str], str]:
        # an exception in a worker process would arrive as a traceback, so return the error
        path, parts = self.jobs[index]
        try:
            content = digest(path)
            reader = open_video(path) if any(clips is not None for _, clips in parts) else None
        except ReadError as error:
            return [str(error)] * len(parts), ""
        return [self.error_of(reader, part) for part in parts], content

    def error_of(self, reader: Reader | None, part: Part) -> str:
        """Decodes the frames of a part that a run will use. Returns the error, or ""."""
        segment, clips = part
        if reader is None or clips is None:
            return ""
        try:
            first, count = reader.part(segment)
            indices = first + view_indices(count, self.num_frames, self.stride, max(1, clips))
            reader.frames(indices if clips else indices[[0, -1]], corner)
        except ReadError as error:
            return str(error)
        return ""


# -- results of earlier scans -----------------------------------------------------------------------


def read_records(file: Path) -> dict[str, Record]:
    """The records of earlier scans by absolute path. A damaged file counts as empty, since it is only a cache."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {path: record for path, record in content.items() if is_record(record)} if isinstance(content, dict) else {}


def is_record(value: Any) -> bool:
    """Whether a value from the file is a complete Record."""
    if not isinstance(value, dict) or value.keys() != {"stamp", "digest", "decoded"}:
        return False
    digests, decoded = (value["stamp"], value["digest"]), value["decoded"]
    valid = all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) for digest in digests)
    return valid and isinstance(decoded, list) and all(isinstance(frames, str) for frames in decoded)


def write_records(file: Path, records: dict[str, Record]) -> None:
    """Adds records to the file. It is read again first, because other runs may have written to it since."""
    make_folder(file.parent)
    remove_leftovers(file.parent)
    write_json(read_records(file) | records, file)
