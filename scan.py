"""Checks before training that every video can be read, and remembers the result until the video changes.

A run calls prepare_data(), which returns the splits without unreadable videos, and cached features if it uses them.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from build_model import VideoModel
from config import Config
from feature_cache import CachedFeatures, cached_splits, compute_missing, open_store, read_features, use_cache
from readers import ReadError, corner, digest, open_video, stamp
from script import UserError, counted, is_main, make_folder, printable, remove_leftovers, write_json
from transforms import view_indices
from VLoader import Splits, WorkerLoader, identified

LISTED = 20  # unreadable videos that an error message lists
SCAN_CACHE = ".videos.json"  # in --output_dir

# the result for a readable video: {"stamp": ..., "digest": ..., "decoded": ["frames/stride/clips", ...]}
Record = dict[str, Any]


# -- before training --------------------------------------------------------------------------------


def prepare_data(
    splits: Splits, config: Config, model: VideoModel, accelerator: Any
) -> tuple[Splits, dict[str, CachedFeatures] | None]:
    """Reads every video once. Returns (the splits without unreadable videos, the cached features by split or None).

    Videos of cached splits are decoded when their features are computed, all others by the scan.
    Raises UserError with a list of the unreadable videos, unless --skip_unreadable True.
    """
    # rank 0 goes first, so that the other processes find its results instead of reading the videos again
    cached = cached_splits(config) if use_cache(model, config) else ()
    with accelerator.main_process_first():
        splits, bad = scan(splits, config, cached)
    if not cached:
        return without_unreadable(splits, bad, config), None

    # computing features can find more unreadable videos, so the error that lists them comes last
    with accelerator.main_process_first():
        store = open_store(model, config)
    readable = {name: [s for s in getattr(splits, name) if s.path not in bad] for name in cached}
    bad |= compute_missing(store, model, replace(splits, **readable), config, accelerator)
    splits = without_unreadable(splits, bad, config)
    return splits, read_features(store, splits, config)


def scan(splits: Splits, config: Config, cached: Sequence[str] = ()) -> tuple[Splits, dict[Path, str]]:
    """Returns (the splits with the digest of every video, {path: error} of the unreadable videos)."""
    # records of all runs in --output_dir are shared
    jobs = clips_to_decode(splits, config.test_clips, cached)
    file = Path(config.output_dir) / SCAN_CACHE
    known = read_records(file)
    bad, good = scan_videos(jobs, config.num_frames, config.frame_stride, config.num_workers, known)
    records = {os.path.abspath(path): record for path, record in good.items()}
    # write only what is new, and nothing if the run is about to stop because of unreadable videos
    if is_main() and not records.items() <= known.items() and (not bad or config.skip_unreadable):
        write_records(file, records)
    return identified(splits, {path: record["digest"] for path, record in good.items()}), bad


def clips_to_decode(splits: Splits, test_clips: int, cached: Sequence[str] = ()) -> dict[Path, int | None]:
    """The jobs of ScanDataset: {path: clips}.

    For val and test these are all clips that evaluation uses; for train 0, which means two frames; for the `cached`
    splits None, because their videos are decoded later.
    """
    counts = {"train": 0, "val": 1, "test": test_clips}
    return {s.path: None if name in cached else n for name, n in counts.items() for s in getattr(splits, name)}


def without_unreadable(splits: Splits, bad: dict[Path, str], config: Config) -> Splits:
    """The splits without the videos in `bad`. Raises UserError with a list of them unless --skip_unreadable True."""
    if bad and not config.skip_unreadable:
        causes = "; ".join([*bad.values()][:LISTED]) + (f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else "")
        raise UserError(f"{causes} -- fix or remove them, or add --skip_unreadable True to skip them")
    if bad:
        splits = drop_unreadable(splits, bad)
        first = printable(splits.unreadable[0])
        print(f"skipped {counted(len(bad), 'unreadable video')} (listed in metrics.json), first: {first}")
    return splits


def drop_unreadable(splits: Splits, bad: dict[Path, str]) -> Splits:
    """The splits without the videos in `bad`. Raises UserError if a split or a class loses its last video."""
    kept = {n: [s for s in getattr(splits, n) if s.path not in bad] for n in ("train", "val", "test")}
    for name, samples in kept.items():
        if getattr(splits, name) and not samples:
            raise UserError(f"no video of {name} can be read; the first error: {next(iter(bad.values()))}")
    # a class without training videos cannot be learned, so this is an error even with --skip_unreadable
    lost = set(splits.class_names) - {s.label for s in kept["train"]}
    if lost:
        raise UserError(f"no training video of class {min(lost)} can be read")
    return replace(splits, **kept, unreadable=tuple(bad.values()))


# -- the scan ---------------------------------------------------------------------------------------


def scan_videos(
    jobs: dict[Path, int | None], num_frames: int, stride: int, num_workers: int, known: dict[str, Record]
) -> tuple[dict[Path, str], dict[Path, Record]]:
    """Returns ({path: error} of the unreadable videos, {path: record} of the others). `jobs` is as in ScanDataset.

    `known` has earlier records by absolute path. A video that has not changed since then, and of which the same frames
    were decoded, is not read again.
    """
    # compare stamps first: for unchanged videos that is all the work
    bad: dict[Path, str] = {}
    records: dict[Path, Record] = {}
    to_read: list[tuple[Path, int | None]] = []
    for path, clips in jobs.items():
        needed = set() if clips is None else {f"{num_frames}/{stride}/{clips}" if clips else "two frames"}
        try:
            current = stamp(path)
        except ReadError as error:
            bad[path] = str(error)
            continue
        record = known.get(os.path.abspath(path), {"stamp": None})
        if record["stamp"] != current or not needed <= {*record["decoded"]}:
            to_read.append((path, clips))
            decoded = record["decoded"] if record["stamp"] == current else []
            record = {"stamp": current, "decoded": sorted({*decoded, *needed})}
        records[path] = record

    # for a few videos, starting worker processes takes longer than reading
    workers = num_workers if len(to_read) > 64 else 0
    dataset = ScanDataset(to_read, num_frames, stride)
    loader = WorkerLoader(dataset, batch_size=16, num_workers=workers, collate_fn=list)
    results: list[tuple[str, str]] = []
    with tqdm(total=len(to_read), desc="checking videos", unit="video", leave=False, disable=not to_read) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))

    # a record is complete only once its video was read
    for (path, _), (error, content) in zip(to_read, results, strict=True):
        if error:
            bad[path] = error
            del records[path]
        else:
            records[path] |= {"digest": content}
    return bad, records


class ScanDataset(Dataset):
    """Item i is (error of video i or "", digest of video i).

    `jobs` gives for each video the number of clips to decode. 0 decodes only the first and last frame of one clip, and
    None decodes nothing.
    """

    def __init__(self, jobs: list[tuple[Path, int | None]], num_frames: int, stride: int):
        self.jobs, self.num_frames, self.stride = jobs, num_frames, stride

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        # an exception in a worker process would arrive as a traceback, so return the error
        path, clips = self.jobs[index]
        try:
            content = digest(path)
            if clips is not None:
                self.decode(path, clips)
        except ReadError as error:
            return str(error), ""
        return "", content

    def decode(self, path: Path, clips: int) -> None:
        """Decodes the frames that a run will use. Raises ReadError."""
        reader = open_video(path)
        indices = view_indices(len(reader), self.num_frames, self.stride, max(1, clips))
        reader.frames(indices if clips else indices[[0, -1]], corner)


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
