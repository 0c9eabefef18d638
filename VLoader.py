"""What a data folder holds, and how its clips become batches.

    <data_dir>/{train,val,test}/<class>/<video>      <video> = x.pt | x.mp4 .avi ... | a folder of frames
    <data_dir>/{train,val,test}/metadata.jsonl       optional: captions, texts, labels; see README.md

A video that cannot be read is an error that names it; it is never replaced by another one.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from metrics import Lexicon
from readers import VIDEO_SUFFIXES, Reader, ReadError, VideoFile, as_read_error, digest, natural_key, open_video, survey
from script import UserError, printable, shown
from transforms import Preprocessing, sample_indices, view_indices

SPLITS = ("train", "val", "test")
VAL_FRACTION, VAL_SALT = 0.1, "val"
MOST_WINDOWS = 100_000  # per video, with --timeline


# -- samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One video and its annotations; `label` is the name of the class folder, or the label in metadata.jsonl."""

    path: Path
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    attributes: dict[str, str] = field(default_factory=dict, hash=False)
    span: tuple[int, int] | None = None  # first and last frame, if only a part of the video is meant
    digest: str | None = field(default=None, compare=False)  # filled in by identified()

    @property
    def identity(self) -> str:
        """The video's digest, computed now if it is not known. Raises ReadError."""
        return self.digest or digest(self.path)


def split_into_windows(sample: Sample, seconds: float) -> list[tuple[Sample, float, float]]:
    """(sample with its frames as span, start, end in seconds) of a video's windows; the last one may be shorter.

    Raises ReadError for a video that cannot be read, and for one without timestamps: frame folders and tensors.
    """
    reader = open_video(sample.path)
    if not isinstance(reader, VideoFile):
        raise ReadError(sample.path, "it has no timestamps; a timeline needs a video file")
    with as_read_error(sample.path):
        times = reader.seconds()
    # the last frame is shown for as long as a typical one
    end = max(1e-9, float(times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0)))
    if end > MOST_WINDOWS * seconds:
        raise ReadError(sample.path, f"{end:g} s are more than {MOST_WINDOWS} windows of {seconds:g} s")

    # a window holds the frames whose time is in [start, start + seconds); an empty one is dropped
    windows = []
    for start in np.arange(0, end, seconds):
        first, after = np.searchsorted(times, [start, start + seconds - 1e-6])
        if after > first:
            window = replace(sample, span=(int(first), int(after) - 1))
            windows.append((window, round(float(start), 3), round(min(start + seconds, end), 3)))
    return windows


# -- one folder of videos ---------------------------------------------------------------------------


def read_folder(folder: Path) -> list[Sample]:
    """Every video of a folder with its class folder and its row of metadata.jsonl, sorted by name. Prints how many
    other files were ignored.

    Raises:
        UserError: the folder is missing or empty, or metadata.jsonl is malformed or names a missing file.
    """
    if not folder.exists():
        raise UserError(f"no such file or folder: {folder}")
    rows = read_metadata(folder) if folder.is_dir() else {}
    videos, ignored = survey(folder)
    if ignored:
        print(printable(f"ignored {len(ignored)} files or folders in {folder} that are not videos, first {ignored[0]}"))
    paths = sorted({*rows, *videos}, key=natural_key)
    if not paths:
        kinds = ", ".join(sorted(VIDEO_SUFFIXES))
        raise UserError(f"no videos in {folder}: expected {kinds}, .pt or folders of images")
    return [make_sample(path, rows.get(path, {}), folder) for path in paths]


def read_metadata(folder: Path) -> dict[Path, dict[str, Any]]:
    """metadata.jsonl of a folder as {path: row}, {} if there is none. Errors name the line."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 in a caption too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None

    # every row is checked before any video is opened
    rows: dict[Path, dict[str, Any]] = {}
    missing: list[Path] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line, strict=False)  # tabs inside texts are accepted
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        path = folder / check_row(row, where)
        if path in rows:
            raise UserError(f"{where}: file_name {shown(row['file_name'])} is given twice")
        rows[path] = row
        if not exists(path, where):
            missing.append(path)

    # files are listed together: metadata is often copied from elsewhere with another folder layout
    if missing:
        raise UserError(f"{file} names {len(missing)} files that do not exist, first {missing[0]}")
    return rows


def check_row(row: Any, where: str) -> str:
    """The file_name of a row of metadata.jsonl. Raises UserError for a field of the wrong type."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise UserError(f'{where}: expected {{"file_name": "...", ...}}')
    for key in ("text", "label"):
        if row.get(key) is not None and not is_text(row[key]):
            raise UserError(f"{where}: {key} must be a text")
    captions = row.get("caption", [])
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(is_text(c) and c.strip() for c in captions):
        raise UserError(f"{where}: caption must be a text or a list of texts, none of them empty")
    if not isinstance(row.get("attributes", {}), dict):
        raise UserError(f'{where}: attributes must be {{"name": "value"}}')
    return row["file_name"]


def is_text(value: Any) -> bool:
    """Whether a JSON value is text; half a surrogate pair, which JSON can escape, is not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def exists(path: Path, where: str) -> bool:
    """Whether the file exists. Raises UserError if it cannot: a name that is too long, or with a NUL."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: file_name {shown(str(path))}: {cause}") from None
    return True


def make_sample(path: Path, row: dict[str, Any], folder: Path) -> Sample:
    """A sample from its row of metadata, {} for a video that is not in metadata.jsonl."""
    label = row.get("label")
    if label is None:  # then the class folder, if the video is in one
        parts = Path(os.path.relpath(path, folder)).parts
        label = parts[0] if len(parts) > 1 and parts[0] != os.pardir else None
    captions = row.get("caption", ())
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    return Sample(path, label, captions, row.get("text"), row.get("attributes", {}))


# -- the splits of a data folder --------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The samples of each split, and what the data folder says about all of them."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    class_names: list[str]
    note: str  # how val was made, "" if the folder has its own
    lexicon: Lexicon | None = None  # the words that name the samples' attributes
    unreadable: tuple[str, ...] = ()  # the errors of the videos that were skipped


def read_splits(data_dir: Path, class_names: list[str] | None = None) -> Splits:
    """train, val and test of a data folder. Without val/, a tenth of each class of train is held out.

    The classes are those of train/, or `class_names` if given; then train/ may be missing.
    Raises UserError if there is no train/.
    """
    if not data_dir.is_dir():
        hint = "; python dummy_data.py draws one" if data_dir.name == "synthetic_dataset" else ""
        raise UserError(f"no data folder {data_dir}{hint}")
    splits = {name: read_folder(data_dir / name) for name in SPLITS if (data_dir / name).is_dir()}
    if "train" not in splits and (class_names is None or not splits):
        raise UserError(f"{data_dir} has no folder train/ (expected {data_dir}/train/<class>/<video>)")

    # val selects the best epoch, so there must be one
    note = ""
    if "train" in splits and "val" not in splits:
        splits["train"], splits["val"] = hold_out(splits["train"], data_dir / "train")
        note = f"no val/ folder: {len(splits['val'])} training videos are held out for it, the same ones every time"
    if class_names is None:
        class_names = sorted({s.label for s in splits["train"] if s.label is not None}, key=natural_key)
    return Splits(*(splits.get(name, []) for name in SPLITS), class_names, note, read_lexicon(data_dir))


def hold_out(samples: list[Sample], folder: Path) -> tuple[list[Sample], list[Sample]]:
    """(train, val): a tenth of each class, at least one video where the class has two or more.

    Videos are ranked by a hash of their names: the split does not depend on machine, seed or order of files.
    """

    def rank(sample: Sample) -> str:
        name = Path(os.path.relpath(sample.path, folder)).as_posix()
        return hashlib.sha256(f"{VAL_SALT}/{name}".encode("utf-8", "surrogateescape")).hexdigest()

    # class by class, so that small classes are in val too
    held: set[Path] = set()
    for label in {s.label for s in samples}:
        ranked = sorted((s for s in samples if s.label == label), key=rank)
        count = max(1, round(VAL_FRACTION * len(ranked))) if len(ranked) > 1 else 0
        held |= {s.path for s in ranked[:count]}
    if not held:
        raise UserError(f"{folder}: too few videos to hold any out for val; add a folder val/ next to it")
    return [s for s in samples if s.path not in held], [s for s in samples if s.path in held]


def read_display_names(data_dir: Path, class_names: list[str]) -> dict[str, str]:
    """The display name of every class from classes.json; the class's own name if it has none."""
    file = data_dir / "classes.json"
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f'{file}: expected {{"class": "display name", ...}}')
    return {name: names.get(name, name) for name in class_names}


def read_lexicon(folder: Path) -> Lexicon | None:
    """lexicon.json of a data folder: which words name which attribute. None if there is none."""
    file = folder / "lexicon.json"
    if not file.is_file():
        return None
    try:
        lexicon = json.loads(file.read_text(encoding="utf-8-sig"))
        valid = all(is_text(word) for values in lexicon.values() for words in values.values() for word in words)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f'{file}: expected {{"attribute": {{"value": ["word", ...]}}}}')
    return lexicon


def check_samples(splits: Splits, captioning: bool, use_text: bool) -> None:
    """Raises UserError unless every sample has what the task needs: a known class, or captions; texts."""
    for name in SPLITS:
        samples = getattr(splits, name)
        if captioning:
            unusable, problem = [s for s in samples if not s.captions], "no caption in metadata.jsonl"
        else:
            unusable = [s for s in samples if s.label not in splits.class_names]
            problem = "no class: no folder, no label"
            if unusable and unusable[0].label:
                problem = f"a class that is not in train ({unusable[0].label})"
        if unusable:
            raise UserError(
                f"{len(unusable)} of {len(samples)} videos of {name} have {problem}, first {unusable[0].path}"
            )
        if use_text and not captioning and samples and all(s.text is None for s in samples):
            raise UserError(f"--use_text True: no video of {name} has a text in metadata.jsonl")
    if not captioning and len(splits.class_names) < 2:
        raise UserError(f"classification needs at least two classes, train has {splits.class_names}")


def identified(splits: Splits, digests: dict[Path, str]) -> Splits:
    """The splits with every sample's digest, where known."""
    return replace(splits, **{n: [replace(s, digest=digests.get(s.path)) for s in getattr(splits, n)] for n in SPLITS})


def fingerprint_data(splits: Splits, data_dir: Path) -> str:
    """32 hex digits of the annotations (names below data_dir, labels, captions, texts), then 32 of the contents."""
    annotations, contents = hashlib.sha256(), hashlib.sha256()
    for name in SPLITS:
        for s in getattr(splits, name):
            relative = Path(os.path.relpath(s.path, data_dir)).as_posix()
            row = repr((name, relative, s.label, s.captions, s.text))
            annotations.update(row.encode("utf-8", "surrogateescape"))
            contents.update(s.identity.encode())
    return annotations.hexdigest()[:32] + contents.hexdigest()[:32]


# -- dataset ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class ClipDataset(Dataset):
    """Clips of samples. Item (draw, index) depends on (seed, draw, index) alone.

    In training, frames are jittered (unless `jitter` is off) and one of the captions is drawn; else frames are centred
    and the first caption is taken. `features`, if given, replace the pixels of item i by features[i].
    `views` (clips, crops) other than (1, 1) gives videos [clips * crops, T, C, H, W].
    """

    samples: list[Sample]
    preprocessing: Preprocessing
    num_frames: int
    stride: int
    class_names: list[str]
    lexicon: Lexicon | None = None
    train: bool = False
    seed: int = 0
    views: tuple[int, int] = (1, 1)
    features: Any = None
    jitter: bool = True

    def __post_init__(self) -> None:
        self.class_index = {name: i for i, name in enumerate(self.class_names)}
        self.opened: tuple[Path, Reader] | None = None  # kept open: windows of one video follow each other

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> list[int]:
        """The class of every sample, -100 if unknown."""
        return [self.class_index.get(sample.label, -100) for sample in self.samples]

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        draw, index = item
        sample = self.samples[index]
        # a generator per item: results do not depend on which worker reads it, or when
        rng = np.random.default_rng([self.seed, draw, index]) if self.train else None
        try:
            if self.features is not None:
                video = self.features[index]  # [1 + N, D] fp16
            else:
                video = self.pixels(sample, rng if self.jitter else None)
        except ReadError as error:  # ClipLoader raises it: an exception in a worker would arrive as a traceback
            return {"error": str(error), "index": index}
        return {
            "video": video,
            "label": self.class_index.get(sample.label, -100),
            "caption": self.caption(draw, index),
            "text": sample.text or "",
            "index": index,
        }

    def pixels(self, sample: Sample, rng: np.random.Generator | None) -> torch.Tensor:
        """uint8 [T, C, H, W], or [V, T, C, H, W] of several views. Raises ReadError."""
        reader = self.reader(sample)
        # with a span, indices count from its first frame
        first, last = sample.span or (0, len(reader) - 1)
        available, (clips, crops) = last - first + 1, self.views
        if self.views == (1, 1):
            indices = sample_indices(available, self.num_frames, self.stride, rng)
            return reader.frames(first + indices, self.preprocessing.pixels)
        indices = view_indices(available, self.num_frames, self.stride, clips)
        views = reader.frames(first + indices, partial(self.preprocessing.crops, count=crops))
        return views.unflatten(0, (clips, -1)).transpose(1, 2).flatten(0, 1)

    def reader(self, sample: Sample) -> Reader:
        if sample.span is None:
            return open_video(sample.path)
        if self.opened is None or self.opened[0] != sample.path:
            self.opened = (sample.path, open_video(sample.path))
        return self.opened[1]

    def caption(self, draw: int, index: int) -> str:
        """The caption of an item, "" if it has none; the video is not read."""
        captions = self.samples[index].captions or ("",)
        if len(captions) == 1 or not self.train:
            return captions[0]
        return captions[int(np.random.default_rng([self.seed, draw, index, 1]).integers(len(captions)))]

    def caption_length(self, item: tuple[int, int]) -> tuple[int, int]:
        """(words, characters) of the caption of item (draw, index)."""
        caption = self.caption(*item)
        return len(caption.split()), len(caption)


# -- batches ----------------------------------------------------------------------------------------


@dataclass
class EpochBatches:
    """Yields batches as lists of (draw, index). In training their order comes from (seed, epoch), else it is that of
    the samples.

    With `balance`, an epoch draws equally many clips of every class, else every clip once.
    With `group` above 1, the clips of every `group` batches are sorted by caption length, which saves padding. These
    batches make one optimizer step, which learns the same from its clips in any order.
    `rank`, `world_size`: of each batch only every world_size-th clip from the rank-th on; this may be none.
    `epoch` and `start`, the number of batches to skip, are set before each pass.
    """

    dataset: ClipDataset
    batch_size: int
    balance: bool = False
    group: int = 1
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order()
        for first in range(self.start * self.batch_size, len(order), self.batch_size):
            yield order[first : first + self.batch_size][self.rank :: self.world_size]

    def order(self) -> list[tuple[int, int]]:
        """All items of the epoch."""
        count = len(self.dataset)
        if not self.dataset.train:
            return [(self.epoch, index) for index in range(count)]
        rng = np.random.default_rng([self.dataset.seed, self.epoch])
        if self.balance:
            order = balanced_order(np.array(self.dataset.labels), self.epoch, rng)
        else:
            order = [(self.epoch, int(index)) for index in rng.permutation(count)]
        if self.group == 1:
            return order
        # sort inside each optimizer step only: a wider sort would change which clips are learned together
        step, length = self.group * self.batch_size, self.dataset.caption_length
        return [item for first in range(0, count, step) for item in sorted(order[first : first + step], key=length)]


def balanced_order(classes: np.ndarray, epoch: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """As many (draw, index) as there are clips, equally many of every class (give or take one). A class with too few
    clips repeats them, each time as another draw."""
    groups = [np.flatnonzero(classes == k) for k in np.unique(classes)]
    quota, rest = divmod(len(classes), len(groups))
    draws = math.ceil((quota + 1) / min(map(len, groups)))  # of one clip in one epoch, at most
    extra = set(rng.permutation(len(groups))[:rest].tolist())  # classes that get one clip more
    # every clip of a class once, then every clip a second time, and so on, until the quota is full
    order: list[tuple[int, int]] = []
    for number, group in enumerate(groups):
        items = [(epoch * draws + d, int(i)) for d in range(draws) for i in rng.permutation(group)]
        order += items[: quota + (number in extra)]
    return [order[i] for i in rng.permutation(len(order))]


class WorkerLoader(DataLoader):
    """A DataLoader that raises UserError when a worker process was killed."""

    def __iter__(self):
        # torch's own handler would raise wherever the main process is at that moment; without it, the wait for the dead
        # worker's batch raises
        signal_handling._SIGCHLD_handler_set = True
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not re.match(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
                raise
            raise UserError(
                "a process that reads videos was killed, most likely because the machine ran out of memory: lower "
                "--num_workers, --batch_size or --num_frames"
            ) from None


class ClipLoader(WorkerLoader):
    """Yields the batches of its collator, None for a batch without any readable video.

    A video that cannot be read raises UserError, or with `skip_unreadable` is skipped and its error added to `skipped`.
    """

    def __init__(self, *args, skip_unreadable: bool = False, skipped: Iterable[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_unreadable, self.skipped = skip_unreadable, set(skipped)

    def close(self) -> None:
        """Ends the worker processes at once; the garbage collector would wait up to 5 seconds for each."""
        if self.num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def with_errors(self) -> Iterator[tuple[dict[str, Any] | None, dict[int, str]]]:
        """Every batch with {index: error} of its unreadable videos."""
        for item in super().__iter__():
            yield item["batch"], item["errors"]

    def __iter__(self):
        for batch, errors in self.with_errors():
            if errors and not self.skip_unreadable:
                raise UserError(next(iter(errors.values())))
            self.skipped.update(errors.values())
            yield batch


def collate(items: list[dict[str, Any]], make_batch: Callable[[list[dict[str, Any]]], dict]) -> dict[str, Any]:
    """A batch of the readable items, and the errors of the others."""
    readable = [item for item in items if "error" not in item]
    errors = {item["index"]: item["error"] for item in items if "error" in item}
    return {"batch": make_batch(readable) if readable else None, "errors": errors}


def build_loader(
    dataset: ClipDataset, make_batch: Callable, num_workers: int, batches: EpochBatches, **skipping: Any
) -> ClipLoader:
    """A loader of `batches` of the dataset, collated by `make_batch`; `skipping` are ClipLoader's own arguments."""
    return ClipLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, make_batch=make_batch),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(dataset.seed),  # an iterator then draws nothing from the global one
        **skipping,
    )
