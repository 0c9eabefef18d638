"""Which videos can be read: each is tried once before training, and remembered until it changes."""

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
from script import UserError, is_main, make_folder, printable, remove_leftovers, write_json
from transforms import view_indices
from VLoader import Splits, WorkerLoader, identified

LISTED = 20  # unreadable videos that an error names


SCAN_CACHE = ".videos.json"  # in --output_dir


#: what is remembered of a readable video: {"stamp": ..., "digest": ..., "decoded": ["frames/stride/clips", ...]}
Record = dict[str, Any]


# -- before training --------------------------------------------------------------------------------


def prepare_data(
    splits: Splits, config: Config, model: VideoModel, accelerator: Any
) -> tuple[Splits, dict[str, CachedFeatures] | None]:
    """(the splits without unreadable videos, the cached features of splits that are read from the feature cache).

    Every video is read once: those that go into the cache when their features are computed, the others by the scan.
    Raises UserError listing the unreadable ones, unless --skip_unreadable True.
    """
    cached = cached_splits(config) if use_cache(model, config) else ()
    with accelerator.main_process_first():  # the other processes then find what the first one remembered
        splits, bad = scan(splits, config, cached)
    if not cached:
        return without_unreadable(splits, bad, config), None
    with accelerator.main_process_first():
        store = open_store(model, config)
    sound = {name: [s for s in getattr(splits, name) if s.path not in bad] for name in cached}
    bad |= compute_missing(store, model, replace(splits, **sound), config, accelerator)
    splits = without_unreadable(splits, bad, config)
    return splits, read_features(store, splits, config)


def scan(splits: Splits, config: Config, cached: Sequence[str] = ()) -> tuple[Splits, dict[Path, str]]:
    """(the splits with the digest of every video, {path: error} of the unreadable ones)."""
    jobs = clips_to_decode(splits, config.test_clips, cached)
    file = Path(config.output_dir) / SCAN_CACHE
    known = read_records(file)
    bad, good = scan_videos(jobs, config.num_frames, config.frame_stride, config.num_workers, known)
    records = {os.path.abspath(path): record for path, record in good.items()}
    # where unreadable videos will stop the run, it leaves nothing behind
    if is_main() and not records.items() <= known.items() and (not bad or config.skip_unreadable):
        write_records(file, records)
    return identified(splits, {path: record["digest"] for path, record in good.items()}), bad


def clips_to_decode(splits: Splits, test_clips: int, cached: Sequence[str] = ()) -> dict[Path, int | None]:
    """The jobs of ScanDataset: of val and test, all frames that evaluation takes; of train, two frames of each video; of
    the `cached` splits, which are decoded later, none."""
    counts = {"train": 0, "val": 1, "test": test_clips}
    return {s.path: None if name in cached else n for name, n in counts.items() for s in getattr(splits, name)}


def without_unreadable(splits: Splits, bad: dict[Path, str], config: Config) -> Splits:
    """The splits without these videos. Raises UserError listing them unless --skip_unreadable True."""
    if bad and not config.skip_unreadable:
        causes = "; ".join([*bad.values()][:LISTED]) + (f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else "")
        raise UserError(f"{causes} -- fix or remove them, or add --skip_unreadable True to skip them")
    if bad:
        splits = leave_out(splits, bad)
        first = printable(splits.unreadable[0])
        print(f"skipped {len(bad)} unreadable videos (listed in metrics.json at the end), first: {first}")
    return splits


def leave_out(splits: Splits, bad: dict[Path, str]) -> Splits:
    """The splits without the unreadable videos. Raises UserError if a split or a class loses its last video."""
    kept = {n: [s for s in getattr(splits, n) if s.path not in bad] for n in ("train", "val", "test")}
    for name, samples in kept.items():
        if getattr(splits, name) and not samples:
            raise UserError(f"no video of {name} can be read; the first: {next(iter(bad.values()))}")
    lost = set(splits.class_names) - {s.label for s in kept["train"]}
    if lost:
        raise UserError(f"no training video of class {min(lost)} can be read")
    return replace(splits, **kept, unreadable=tuple(bad.values()))


# -- the scan ---------------------------------------------------------------------------------------


def scan_videos(
    jobs: dict[Path, int | None], num_frames: int, stride: int, num_workers: int, known: dict[str, Record]
) -> tuple[dict[Path, str], dict[Path, Record]]:
    """({path: error} of the unreadable videos, {path: record} of the others). `jobs` are those of ScanDataset.

    `known` holds earlier records by absolute path; a video that has not changed since, and was decoded at these frames,
    is not read again.
    """
    bad: dict[Path, str] = {}
    records: dict[Path, Record] = {}
    unknown: list[tuple[Path, int | None]] = []
    for path, clips in jobs.items():
        needed = set() if clips is None else {f"{num_frames}/{stride}/{clips}" if clips else "two frames"}
        try:
            now = stamp(path)
        except ReadError as error:
            bad[path] = str(error)
            continue
        record = known.get(os.path.abspath(path), {"stamp": None})
        if record["stamp"] != now or not needed <= {*record["decoded"]}:
            unknown.append((path, clips))
            decoded = record["decoded"] if record["stamp"] == now else []
            record = {"stamp": now, "decoded": sorted({*decoded, *needed})}
        records[path] = record

    # a few videos are read faster without worker processes
    workers = num_workers if len(unknown) > 64 else 0
    dataset = ScanDataset(unknown, num_frames, stride)
    loader = WorkerLoader(dataset, batch_size=16, num_workers=workers, collate_fn=list)
    results: list[tuple[str, str]] = []
    with tqdm(total=len(unknown), desc="reading videos", unit="video", leave=False, disable=not unknown) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))
    for (path, _), (error, content) in zip(unknown, results, strict=True):
        if error:
            bad[path] = error
            del records[path]
        else:
            records[path] |= {"digest": content}
    return bad, records


class ScanDataset(Dataset):
    """Item i is (the error of video i or "", its digest).

    `jobs` give for each video the number of clips whose frames are all decoded; 0: the first and last frame of one;
    None: no frame.
    """

    def __init__(self, jobs: list[tuple[Path, int | None]], num_frames: int, stride: int):
        self.jobs, self.num_frames, self.stride = jobs, num_frames, stride

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        path, clips = self.jobs[index]
        try:
            content = digest(path)
            if clips is not None:
                self.decode(path, clips)
        except ReadError as error:
            return str(error), ""
        return "", content

    def decode(self, path: Path, clips: int) -> None:
        reader = open_video(path)
        indices = view_indices(len(reader), self.num_frames, self.stride, max(1, clips))
        reader.frames(indices if clips else indices[[0, -1]], corner)


# -- what is remembered -----------------------------------------------------------------------------


def read_records(file: Path) -> dict[str, Record]:
    """The records of earlier scans by absolute path; anything else in the file is ignored."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {path: record for path, record in known.items() if is_record(record)} if isinstance(known, dict) else {}


def is_record(value: Any) -> bool:
    """Whether a value from a file is what a scan wrote of one video."""
    if not isinstance(value, dict) or value.keys() != {"stamp", "digest", "decoded"}:
        return False
    marks, decoded = (value["stamp"], value["digest"]), value["decoded"]
    sound = all(isinstance(mark, str) and re.fullmatch("[0-9a-f]{32}", mark) for mark in marks)
    return sound and isinstance(decoded, list) and all(isinstance(frames, str) for frames in decoded)


def write_records(file: Path, found: dict[str, Record]) -> None:
    """Adds to what is remembered; other runs may have written since it was read."""
    make_folder(file.parent)
    remove_leftovers(file.parent)
    write_json(read_records(file) | found, file)
