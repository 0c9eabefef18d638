"""What a data folder holds, and how its clips become batches.

    <data_dir>/{train,val,test}/<class>/<video>      <video> = x.pt | x.mp4 .avi ... | a folder of frames
    <data_dir>/{train,val,test}/metadata.jsonl       optional: captions, texts, labels; see README.md

A file that cannot be read is an error that names it; it is never replaced by another clip.
"""

import hashlib
import json
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
from readers import VIDEO_SUFFIXES, Reader, ReadError, VideoFile, digest, naming, natural_key, open_video, survey
from script import UserError, printable, shown
from transforms import Preprocessing, sample_indices

VAL_FRACTION, VAL_SALT = 0.1, "val"
MOST_WINDOWS = 100_000  # of one video, with a timeline


# -- readers ----------------------------------------------------------------------------------------


def view_indices(available: int, num_frames: int, stride: int, clips: int) -> np.ndarray:
    """The frames of `clips` clips of one video, one behind the other, [clips * num_frames]; one clip is the
    one that evaluation takes."""
    places = (np.arange(clips) + 0.5) / clips
    return np.concatenate([sample_indices(available, num_frames, stride, place=place) for place in places])


# -- samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One video and what is known of it; `label` is the class folder's name or metadata.jsonl's label."""

    path: Path
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    attributes: dict[str, str] = field(default_factory=dict, hash=False)
    span: tuple[int, int] | None = None  # first and last frame, where only a part is meant
    digest: str | None = field(default=None, compare=False)  # where it has been computed; see identified()

    @property
    def identity(self) -> str:
        """The video's digest, computed now if need be. Raises ReadError."""
        return self.digest or digest(self.path)


def cut(sample: Sample, seconds: float) -> list[tuple[Sample, float, float]]:
    """A video's windows of this length: (sample with its frames as span, start, end in seconds), the last one
    perhaps shorter. Raises ReadError if it cannot be read, or is no video file and so has no times."""
    reader = open_video(sample.path)
    if not isinstance(reader, VideoFile):
        raise ReadError(sample.path, "no times: a timeline needs a video file")
    with naming(sample.path):
        times = reader.seconds()
    end = max(1e-9, float(times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0)))
    if end > MOST_WINDOWS * seconds:
        raise ReadError(sample.path, f"{end:g} s are more than {MOST_WINDOWS} windows of {seconds:g} s")
    windows = []
    for start in np.arange(0, end, seconds):
        first, last = np.searchsorted(times, [start, start + seconds - 1e-6])
        if last > first:
            span = (int(first), int(last) - 1)
            windows.append((replace(sample, span=span), round(float(start), 3), round(min(start + seconds, end), 3)))
    return windows


def read_metadata(folder: Path) -> dict[Path, dict[str, Any]]:
    """metadata.jsonl of a folder as {path: row}, {} if there is none. Errors name the line."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    rows: dict[Path, dict[str, Any]] = {}
    missing: list[Path] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 in a caption too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line, strict=False)  # a tab or the like may stand in a text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        path = folder / check_row(row, where)
        if path in rows:
            raise UserError(f"{where}: file_name {shown(row['file_name'])} stands twice")
        rows[path] = row
        if not exists(path, where):
            missing.append(path)
    if missing:
        raise UserError(f"{file} names {len(missing)} files that do not exist, first {missing[0]}")
    return rows


def exists(path: Path, where: str) -> bool:
    """Whether there is such a file. Raises UserError if there cannot be: a name that is too long, or with a NUL."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: file_name {shown(str(path))}: {cause}") from None
    return True


def is_text(value: Any) -> bool:
    """Whether a value of JSON is a text; half of a surrogate pair, which JSON can escape, is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def check_row(row: Any, where: str) -> str:
    """The row's file_name; raises UserError where a field has the wrong type."""
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


def sample_of(path: Path, row: dict[str, Any], folder: Path) -> Sample:
    """One row of metadata, or {} for a video that none speaks of."""
    label = row.get("label")
    if label is None:  # the class folder, if the video lies in one
        inside = Path(os.path.relpath(path, folder)).parts
        label = inside[0] if len(inside) > 1 and inside[0] != os.pardir else None
    captions = row.get("caption", ())
    return Sample(
        path=path,
        label=label,
        captions=(captions,) if isinstance(captions, str) else tuple(captions),
        text=row.get("text"),
        attributes=row.get("attributes", {}),
    )


def read_folder(folder: Path) -> list[Sample]:
    """Every video of a folder, with its class folder and its row of metadata.jsonl. Sorted by name. Prints how many
    other things were passed over.

    Raises:
        UserError: the folder is missing or empty, or metadata.jsonl is bad or names a missing file.
    """
    if not folder.exists():
        raise UserError(f"no such file or folder: {folder}")
    rows = read_metadata(folder) if folder.is_dir() else {}
    found, passed = survey(folder)
    if passed:
        print(
            printable(f"passed over {len(passed)} files or folders in {folder} that are not videos, first {passed[0]}")
        )
    videos = {*rows, *found}
    if not videos:
        raise UserError(
            f"no videos in {folder}: expected {', '.join(sorted(VIDEO_SUFFIXES))}, .pt or folders of images"
        )
    return [sample_of(path, rows.get(path, {}), folder) for path in sorted(videos, key=natural_key)]


@dataclass(frozen=True)
class Splits:
    """The samples of each split, the class names in order, and where val comes from."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    class_names: list[str]
    note: str
    lexicon: Lexicon | None = None  # the words of the samples' attributes
    unreadable: tuple[str, ...] = ()  # the errors of the videos that were skipped


def read_splits(data_dir: Path, class_names: list[str] | None = None) -> Splits:
    """train, val and test of a data folder. Without val/, a tenth of train is held out, of each class.

    Which ones depends on the names alone (hashed), not on the machine, the seed or the order of files. The classes
    are those of train/; where `class_names` are given they are these, and train/ may be lacking.
    Raises UserError if there is no train/.
    """
    if not data_dir.is_dir():
        hint = "; python dummy_data.py draws one" if data_dir.name == "synthetic_dataset" else ""
        raise UserError(f"no data folder {data_dir}{hint}")
    splits = {name: read_folder(data_dir / name) for name in ("train", "val", "test") if (data_dir / name).is_dir()}
    if "train" not in splits and (class_names is None or not splits):
        raise UserError(f"{data_dir} has no folder train/ (expected {data_dir}/train/<class>/<video>)")
    note = ""
    if "train" in splits and "val" not in splits:
        splits["train"], splits["val"] = hold_out(splits["train"], data_dir / "train")
        note = f"no val/: {len(splits['val'])} of the training videos are held out for it, always the same"
    if class_names is None:
        class_names = sorted({s.label for s in splits["train"] if s.label is not None}, key=natural_key)
    samples = (splits.get(name, []) for name in ("train", "val", "test"))
    return Splits(*samples, class_names, note, read_lexicon(data_dir))


def identified(splits: Splits, digests: dict[Path, str]) -> Splits:
    """The splits with every sample's digest, where there is one."""
    names = ("train", "val", "test")
    return replace(splits, **{n: [replace(s, digest=digests.get(s.path)) for s in getattr(splits, n)] for n in names})


def fingerprint_data(splits: Splits, data_dir: Path) -> str:
    """32 hex digits of all that the splits say of their videos (names below data_dir, labels, captions, texts), and
    behind them 32 of the videos' contents."""
    said, content = hashlib.sha256(), hashlib.sha256()
    for name in ("train", "val", "test"):
        for s in getattr(splits, name):
            place = Path(os.path.relpath(s.path, data_dir)).as_posix()
            said.update(repr((name, place, s.label, s.captions, s.text)).encode("utf-8", "surrogateescape"))
            content.update(s.identity.encode())
    return said.hexdigest()[:32] + content.hexdigest()[:32]


def read_display_names(data_dir: Path, class_names: list[str]) -> dict[str, str]:
    """classes.json's display name of every class; the class's own name where it has none."""
    file = data_dir / "classes.json"
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f'{file}: expected {{"class": "display name", ...}}')
    return {name: names.get(name, name) for name in class_names}


def read_lexicon(folder: Path) -> Lexicon | None:
    """lexicon.json of a data folder: which words name which attribute. None where there is none."""
    file = folder / "lexicon.json"
    if not file.is_file():
        return None
    try:
        lexicon = json.loads(file.read_text(encoding="utf-8-sig"))
        sound = all(is_text(word) for values in lexicon.values() for words in values.values() for word in words)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f'{file}: expected {{"attribute": {{"value": ["word", ...]}}}}')
    return lexicon


def hold_out(samples: list[Sample], folder: Path) -> tuple[list[Sample], list[Sample]]:
    """(train, val): a tenth of each class, at least one video where the class has two or more."""

    def rank(sample: Sample) -> str:
        name = Path(os.path.relpath(sample.path, folder)).as_posix()
        return hashlib.sha256(f"{VAL_SALT}/{name}".encode("utf-8", "surrogateescape")).hexdigest()

    held: set[Path] = set()
    for label in {s.label for s in samples}:
        ranked = sorted((s for s in samples if s.label == label), key=rank)
        count = max(1, round(VAL_FRACTION * len(ranked))) if len(ranked) > 1 else 0
        held |= {s.path for s in ranked[:count]}
    if not held:
        raise UserError(f"{folder}: too few videos to hold any out for val; add a folder val/ beside it")
    return [s for s in samples if s.path not in held], [s for s in samples if s.path in held]


def check_samples(splits: Splits, captioning: bool, use_text: bool) -> None:
    """Raises UserError unless every sample has what the task needs: a known class, or captions; texts."""
    for name in ("train", "val", "test"):
        samples = getattr(splits, name)
        if captioning:
            bad = [s for s in samples if not s.captions]
            what = "no caption in metadata.jsonl"
        else:
            bad = [s for s in samples if s.label not in splits.class_names]
            what = (
                f"a class that is not one of the training's ({bad[0].label})"
                if bad and bad[0].label
                else "no class: no folder, no label"
            )
        if bad:
            raise UserError(f"{len(bad)} of {len(samples)} videos of {name} have {what}, first {bad[0].path}")
        if use_text and not captioning and all(s.text is None for s in samples) and samples:
            raise UserError(f"--use_text True: no video of {name} has a text in metadata.jsonl")
    if not captioning and len(splits.class_names) < 2:
        raise UserError(f"classification needs two classes or more, train has {splits.class_names}")


# -- the scan before training -----------------------------------------------------------------------


class WorkerLoader(DataLoader):
    """A DataLoader that raises UserError when a worker process was killed."""

    def __iter__(self):
        # torch's own handler would raise wherever the main process is just then; without it, the wait for the dead
        # worker's batch does
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


# -- dataset and loader -----------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips of samples; item (draw, index) depends on nothing but (seed, draw, index).

    In training the frames are jittered (unless `jitter` is off) and one caption is drawn; else centres and the
    first caption. `features`, by place, are given instead of pixel_values where they are known already.
    `views` (clips, crops) other than (1, 1) gives pixel_values [clips * crops, T, C, H, W].
    """

    def __init__(
        self,
        samples: list[Sample],
        preprocessing: Preprocessing,
        num_frames: int,
        stride: int,
        class_names: list[str],
        train: bool = False,
        seed: int = 0,
        views: tuple[int, int] = (1, 1),
        features: Any = None,
        lexicon: Lexicon | None = None,
    ):
        self.samples = samples
        self.preprocessing = preprocessing
        self.num_frames, self.stride = num_frames, stride
        self.class_index = {name: i for i, name in enumerate(class_names)}
        self.train, self.seed, self.views, self.features = train, seed, views, features
        self.lexicon = lexicon
        self.jitter = True
        self.last: tuple[Path, Reader] | None = None  # the reader in use: spans of one video follow each other

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> list[int]:
        """The class of every sample, -100 where it is not known."""
        return [self.class_index.get(sample.label, -100) for sample in self.samples]

    def reader(self, sample: Sample) -> Reader:
        if sample.span is None:
            return open_video(sample.path)
        if self.last is None or self.last[0] != sample.path:
            self.last = (sample.path, open_video(sample.path))
        return self.last[1]

    def pixels(self, sample: Sample, rng: np.random.Generator | None) -> torch.Tensor:
        """uint8 [T, C, H, W], or [V, T, C, H, W] of several views. Raises ReadError."""
        reader = self.reader(sample)
        first, last = sample.span or (0, len(reader) - 1)
        clips, crops = self.views
        if self.views == (1, 1):
            indices = sample_indices(last - first + 1, self.num_frames, self.stride, rng)
            return reader.frames(first + indices, self.preprocessing.pixels)
        crop = partial(self.preprocessing.crops, count=crops)
        views = reader.frames(first + view_indices(last - first + 1, self.num_frames, self.stride, clips), crop)
        return views.unflatten(0, (clips, -1)).transpose(1, 2).flatten(0, 1)

    def caption(self, draw: int, place: int) -> str:
        """The caption of an item, known without reading its video: "" where there is none."""
        captions = self.samples[place].captions or ("",)
        if len(captions) == 1 or not self.train:
            return captions[0]
        return captions[int(np.random.default_rng([self.seed, draw, place, 1]).integers(len(captions)))]

    def caption_length(self, item: tuple[int, int]) -> tuple[int, int]:
        """(words, characters) of the caption of item (draw, index)."""
        caption = self.caption(*item)
        return len(caption.split()), len(caption)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        draw, place = index
        sample = self.samples[place]
        rng = np.random.default_rng([self.seed, draw, place]) if self.train else None
        try:
            if self.features is not None:
                video = self.features[place]  # [1 + N, D] fp16
            else:
                video = self.pixels(sample, rng if self.jitter else None)
        except ReadError as error:  # raised by ClipLoader: a worker's exception would arrive as a traceback
            return {"error": str(error), "index": place}
        return {
            "video": video,
            "label": self.class_index.get(sample.label, -100),
            "caption": self.caption(draw, place),
            "text": sample.text or "",
            "index": place,
        }


class EpochBatches:
    """Yields lists of (draw, index); the order comes from (seed, epoch), or is plain.

    With `classes`, each sample's class, an epoch draws equally many clips of every class, else every clip once.
    With `length`, of (draw, index), the clips of every `group` batches are sorted by it, so that they need less
    padding: of batches that make one optimizer step, which learns from the same clips in any order.
    `share` (r, n) gives every n-th clip of each batch from the r-th on: one process's part, which may be empty.
    `epoch` and `start`, the number of batches to leave out, are set before each pass.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        classes: list[int] | None = None,
        share: tuple[int, int] = (0, 1),
        group: int = 1,
        length: Callable[[tuple[int, int]], Any] | None = None,
    ):
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.classes, self.share, self.group, self.length = classes, share, group, length
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order()
        for start in range(self.start * self.batch_size, self.count, self.batch_size):
            yield order[start : start + self.batch_size][self.share[0] :: self.share[1]]

    def order(self) -> list[tuple[int, int]]:
        if not self.shuffle:
            return [(self.epoch, place) for place in range(self.count)]
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.classes is not None:
            order = balanced_order(np.array(self.classes), self.epoch, rng)
        else:
            order = [(self.epoch, int(place)) for place in rng.permutation(self.count)]
        if self.length is None:
            return order
        step = self.group * self.batch_size
        return [item for k in range(0, self.count, step) for item in sorted(order[k : k + step], key=self.length)]


def balanced_order(classes: np.ndarray, epoch: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """As many (draw, index) as there are clips, equally many of every class (give or take one); a class that
    is too small repeats its clips, each time as another draw."""
    groups = [np.flatnonzero(classes == k) for k in np.unique(classes)]
    share, rest = divmod(len(classes), len(groups))
    draws = -(-(share + 1) // min(map(len, groups)))  # of one clip in one epoch, at most
    extra = set(rng.permutation(len(groups))[:rest].tolist())
    order: list[tuple[int, int]] = []
    for number, group in enumerate(groups):
        drawn = [(epoch * draws + d, int(i)) for d in range(draws) for i in rng.permutation(group)]
        order += drawn[: share + (number in extra)]
    return [order[i] for i in rng.permutation(len(order))]


def collate(items: list[dict[str, Any]], make_batch: Callable[[list[dict[str, Any]]], dict]) -> dict[str, Any]:
    """make_batch(the items that could be read); {index: what is wrong} of the others beside it."""
    errors = {item["index"]: item["error"] for item in items if "error" in item}
    good = [item for item in items if "error" not in item]
    return {"batch": make_batch(good) if good else None, "errors": errors}


class ClipLoader(WorkerLoader):
    """Yields the batches of `make_batch`. Raises UserError for a video that could not be read, or with
    `skip_unreadable` leaves it out and adds the error to `skipped`; a batch without any readable video
    is None, so that batches can still be counted."""

    def __init__(self, *args, skip_unreadable: bool = False, skipped: Iterable[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_unreadable, self.skipped = skip_unreadable, set(skipped)

    def close(self) -> None:
        """Ends the worker processes at once; left to the garbage collector, each is waited for 5 seconds."""
        if self.num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def with_errors(self) -> Iterator[tuple[dict[str, Any] | None, dict[int, str]]]:
        """Every batch beside {index: what is wrong} of its unreadable videos."""
        for item in super().__iter__():
            yield item["batch"], item["errors"]

    def __iter__(self):
        for batch, errors in self.with_errors():
            if errors and not self.skip_unreadable:
                raise UserError(next(iter(errors.values())))
            self.skipped.update(errors.values())
            yield batch


def build_loader(
    dataset: ClipDataset,
    make_batch: Callable,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    balance: bool = False,
    share: tuple[int, int] = (0, 1),
    group: int = 1,
    **skipping: Any,
) -> ClipLoader:
    """A loader of `dataset`; its `batch_sampler` takes the epoch before each pass in training, and with
    `balance` draws all classes equally often; the clips of every `group` batches are sorted by the length of their
    captions. `share` is EpochBatches', `skipping` are ClipLoader's own arguments."""
    batches = EpochBatches(
        len(dataset),
        batch_size,
        shuffle=dataset.train,
        seed=dataset.seed,
        share=share,
        classes=dataset.labels if balance else None,
        group=group,
        length=dataset.caption_length if group > 1 else None,
    )
    return ClipLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, make_batch=make_batch),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(dataset.seed),  # so that making an iterator draws nothing global
        **skipping,
    )
