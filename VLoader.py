"""Reads a data folder into samples, and samples into batches of clips.

    <data_dir>/{train,val,test}/<class>/<video>      <video> = x.pt | x.mp4 .avi ... | a folder of frames
    <data_dir>/{train,val,test}/metadata.jsonl       optional: captions, texts, labels; see docs/datasets.md
    <data_dir>/{train,val,test}/<name>.tar           or the videos in tars: see extras/shards.py

read_splits() gives the samples of each split, ClipDataset reads their clips, build_loader() makes batches. A video that
cannot be read is an error with its name; it is never replaced by another video.
"""

import difflib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from extras.groups import grouped, ungrouped_classes
from extras.multilabel import multi_hot
from extras.segments import check_times, refuse_overlaps, segment_of
from extras.shards import is_there, parts_below, read_notes
from metrics import Lexicon
from readers import (
    VIDEO_SUFFIXES,
    Reader,
    ReadError,
    Segment,
    VideoFile,
    as_read_error,
    digest,
    natural_key,
    open_video,
    survey,
)
from script import UserError, cause_of, counted, printable, shown
from transforms import Preprocessing, sample_indices, view_indices

SPLITS = ("train", "val", "test")
VAL_FRACTION, VAL_SALT = 0.1, "val"  # another salt would hold out other videos
MAX_WINDOWS = 100_000  # per video with --timeline
METADATA_FIELDS = {"file_name", "label", "labels", "caption", "text", "other_text", "attributes", "group", "fps"}
METADATA_FIELDS |= {"question", "answer", "kind", "start", "end", "video_digest"}


# identifies what a sample shows within a dataset: the path of a whole video, or (path, segment)
Key = Path | tuple[Path, Segment]


# -- samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One video, or one segment of a video, and its annotations. `label` is the one in metadata.jsonl, else the name of
    the class folder, and None if the sample has `labels`."""

    path: Path
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    other_text: str | None = None  # a text about another object in the same clip, for extras/controls.py
    objects: tuple[dict[str, str], ...] = field(default=(), hash=False)  # the attributes of each object
    segment: Segment | None = None  # None: the whole video
    questions: tuple[tuple[str, str | None, str | None], ...] = ()  # (question, answer, kind) of each; see by_question
    question: str | None = None  # what a captioner is asked; `captions` then has the answer
    kind: str | None = None  # of the question, for the scores
    group: str | None = None  # the recording that it comes from, if that is known; see extras/groups.py
    # of the whole video; set by identified(), or from metadata.jsonl if the video is not here
    digest: str | None = field(default=None, compare=False)
    labels: tuple[str, ...] | None = None  # everything that the clip shows, with --multi_label True

    def has_attributes(self, lexicon: Lexicon) -> bool:
        """Whether all attributes of the lexicon are known."""
        return bool(self.objects) and all(item.keys() == lexicon.keys() for item in self.objects)

    @property
    def classes(self) -> tuple[str | None, ...]:
        """Its label or labels; (None,) if there are none."""
        return self.labels or (self.label,)

    @property
    def key(self) -> Key:
        """Identifies what the sample shows within its dataset. Questions about one video or segment share it."""
        return self.path if self.segment is None else (self.path, self.segment)

    @property
    def times(self) -> dict[str, float]:
        """{"start", "end"} of a segment in seconds, {} for a whole video."""
        return {} if self.segment is None else {"start": self.segment.start, "end": self.segment.end}

    @property
    def recording(self) -> str:
        """The recording that the clip comes from: its group or, without one, the path of its video."""
        return os.path.abspath(self.path) if self.group is None else self.group

    @property
    def place(self) -> dict[str, Any]:
        """What says in a row of predictions which clip it is about: file, group if it has one, times of a segment."""
        return {"file": str(self.path)} | ({} if self.group is None else {"group": self.group}) | self.times

    @property
    def identity(self) -> str:
        """32 hex digits for the content: the digest of the video, of a segment combined with its times.

        The digest is computed now unless it is already set. Raises ReadError.
        """
        content = self.digest or digest(self.path)
        if self.segment is None:
            return content
        return hashlib.blake2b(repr((content, *self.segment)).encode(), digest_size=16).hexdigest()


def split_into_windows(sample: Sample, seconds: float, stride: float = 0) -> list[tuple[Sample, float, float]]:
    """Splits a video into windows of `seconds`: (sample with the window as its segment, start, end in seconds).

    A window starts every `stride` seconds; 0 means that windows do not overlap. The last window may be shorter.
    Raises ReadError for a video that cannot be read, and for frame folders and tensors, which have no timestamps.
    """
    # only video files know when a frame is shown
    reader = open_video(sample.path)
    if not isinstance(reader, VideoFile):
        raise ReadError(sample.path, "no timestamps; --timeline needs a video file")
    with as_read_error(sample.path):
        times = reader.seconds()

    # how long the last frame is shown is unknown: assume the median
    end = max(1e-9, float(times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0)))
    stride = stride or seconds
    if end > MAX_WINDOWS * stride:
        raise ReadError(sample.path, f"{end:g} s would make more than {MAX_WINDOWS} windows of {seconds:g} s")

    # a window contains the frames with start <= time < start + seconds; empty windows have nothing to predict
    windows = []
    for start in np.arange(0, max(end - (seconds - stride), 1e-9), stride):  # the last one reaches the end
        first, after = np.searchsorted(times, [start - 1e-6, start + seconds - 1e-6])
        if after > first:
            window = replace(sample, segment=Segment(float(start), float(start + seconds)))
            windows.append((window, round(float(start), 3), round(min(start + seconds, end), 3)))
    return windows


# -- one folder of videos ---------------------------------------------------------------------------


def read_folder(folder: Path, answered: bool = False) -> list[Sample]:
    """A sample for every video in a folder or in its metadata.jsonl, sorted by name; for a video with segments one for
    each of them, in the order of the file. Prints how many other files were ignored.

    Raises:
        UserError: the folder is missing or has no videos, or metadata.jsonl is malformed or names a missing file, or
            with `answered` a question has no answer.
    """
    if not folder.exists():
        raise UserError(f"no such file or folder: {folder}")
    videos, ignored = survey(folder)
    # metadata may also list videos outside the folder
    rows = read_metadata(folder, answered, videos)
    if ignored:
        count = counted(len(ignored), "entry that is not a video", "entries that are not videos")
        print(printable(f"ignored in {folder}: {count}, for example {ignored[0]}"))
    paths = sorted({*rows, *videos}, key=natural_key)
    if not paths:
        kinds = ", ".join(sorted(VIDEO_SUFFIXES))
        raise UserError(f"no videos in {folder}: expected files ({kinds}, .pt) or folders of images")
    return [make_sample(path, row, folder) for path in paths for row in rows.get(path, [{}])]


def read_metadata(
    folder: Path, answered: bool = False, videos: Iterable[Path] = ()
) -> dict[Path, list[dict[str, Any]]]:
    """{path: its rows} of a folder's metadata.jsonl, if it has one, and of the descriptions of those `videos` that are
    in tars. Several rows of one video are segments of it.

    Raises UserError naming the line.
    """
    # check every row before any video is opened, because opening all videos takes long
    known, real_paths = {*videos}, {}
    rows: dict[Path, dict[Segment | None, dict[str, Any]]] = {}
    missing: list[Path] = []
    names: set[str] = set()
    for where, row in chain(metadata_rows(folder / "metadata.jsonl"), rows_in_tars(folder, videos)):
        path = folder / check_row(row, where)
        if path not in known and exists(path, where):  # outside the folder, or another name for one of its videos
            real_paths = real_paths or {os.path.realpath(video): video for video in known}
            path = real_paths.get(os.path.realpath(path), path)
        check_questions(row, where, answered)
        segment = segment_of(row)
        others = rows.setdefault(path, {})
        if segment in others:
            times = f" with start {segment.start:g} and end {segment.end:g}" if segment else ""
            hint = (
                "; write one row with all of its `labels`" if others[segment].get("label") != row.get("label") else ""
            )
            raise UserError(f"{where}: file_name {shown(row['file_name'])}{times} appears twice{hint}")
        if others and None in (segment, *others):
            raise UserError(f"{where}: file_name {shown(row['file_name'])} mixes rows with and without start and end")
        if not others and "video_digest" not in row and not exists(path, where):
            missing.append(path)
        others[segment] = row
        names |= row.keys()
    note_misspelt(folder / "metadata.jsonl", names)

    # count all of them: many missing files mean that the metadata was written for another folder layout
    if missing:
        raise UserError(
            f"{folder}/metadata.jsonl names {counted(len(missing), 'missing file')}, for example {missing[0]}"
        )
    return {path: [*segments.values()] for path, segments in rows.items()}


def metadata_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where it is, row) for every row of metadata.jsonl, which may not exist. Raises UserError."""
    # a byte order mark, as Windows programs write it, is ignored (utf-8-sig)
    if not file.is_file():
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028 in a caption
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {cause_of(error)}") from None
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            if line.strip():
                yield where, json.loads(line, strict=False)  # accepts tabs in texts
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None


def rows_in_tars(folder: Path, videos: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where it is, row) for the descriptions of videos in tars. Raises UserError."""
    for video in videos:
        for row in read_notes(video):
            yield f"the description of {video}", row | {"file_name": os.path.relpath(video, folder)}


def check_row(row: Any, where: str) -> str:
    """Checks the types of a row of metadata.jsonl and returns its file_name. Raises UserError."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise UserError(f'{where}: expected {{"file_name": "...", ...}}')
    for key in ("text", "other_text", "label", "group"):
        if row.get(key) is not None and not is_text(row[key]):
            raise UserError(f"{where}: {key} must be a string")
    if not all(is_text(c) and c.strip() for c in as_list(row.get("caption", []))):
        raise UserError(f"{where}: caption must be a string or a list of strings, none of them empty")
    labels, label = row.get("labels"), row.get("label")
    if labels is not None and not (isinstance(labels, list) and all(map(is_text, labels)) and label is None):
        raise UserError(f"{where}: labels must be a list of strings; a row with labels cannot also have label")
    if any(name is not None and not name.strip() for name in labels or [label]):
        raise UserError(f"{where}: a label must not be empty")
    items = as_list(row.get("attributes", []))
    if not all(isinstance(item, dict) and all(map(is_text, item.values())) for item in items):
        raise UserError(f'{where}: attributes must be {{"name": "value"}}, or a list of these, one for each object')
    if not re.fullmatch("[0-9a-f]{32}", str(row.get("video_digest", "0" * 32))):
        raise UserError(f"{where}: video_digest must be 32 hex digits, as feature_cache.py writes them")
    check_times(row, where)
    return row["file_name"]


def note_misspelt(file: Path, names: set[str]) -> None:
    """Prints which of the fields in a metadata.jsonl are not read, but look like one that is."""
    for name in sorted(names - METADATA_FIELDS):
        if meant := difflib.get_close_matches(name.lower(), METADATA_FIELDS, 1, 0.8):
            print(printable(f"note: {file}: the field {shown(name)} is not read; did you mean {meant[0]!r}?"))


def check_questions(row: dict[str, Any], where: str, answered: bool) -> None:
    """Checks the questions of a row: all different, with as many answers, which are required if `answered`, and as many
    kinds if there are any. Raises UserError."""
    questions, answers, kinds = (as_list(row.get(key, [])) for key in ("question", "answer", "kind"))
    kinds = kinds if questions else []  # without a question, `kind` belongs to another program
    if not all(is_text(text) and text.strip() for text in (*questions, *answers, *kinds)):
        raise UserError(f"{where}: question, answer and kind must be strings or lists of strings, none of them empty")
    for noun, values, required in (("answer", answers, answered), ("kind", kinds, False)):
        if len(values) != len(questions) and (values or required):
            raise UserError(f"{where}: {counted(len(questions), 'question')}, but {counted(len(values), noun)}")
    if len({*questions}) < len(questions):
        raise UserError(f"{where}: a question appears twice")


def as_list(value: Any) -> list[Any]:
    """A value of metadata.jsonl that may be one or several."""
    return value if isinstance(value, list) else [value]


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string of valid text: JSON can also escape half a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def exists(path: Path, where: str) -> bool:
    """Whether the file exists. Raises UserError for an impossible name: too long, or with a NUL."""
    try:
        return is_there(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: file_name {shown(str(path))}: {cause_of(error)}") from None


def make_sample(path: Path, row: dict[str, Any], folder: Path) -> Sample:
    """A sample from its row of metadata.jsonl; the row is {} for a video that is not listed there."""
    label, labels = row.get("label"), row.get("labels")
    if label is None and labels is None:  # use the class folder, if the video is in one
        parts = parts_below(path, folder)
        label = parts[0] if len(parts) > 1 and parts[0] != os.pardir else None
    captions, objects, questions = (tuple(as_list(row.get(key, []))) for key in ("caption", "attributes", "question"))
    answers, kinds = (as_list(row.get(key) or [None] * len(questions)) for key in ("answer", "kind"))
    asked = tuple(zip(questions, answers, kinds, strict=False))  # a kind without a question means nothing
    return Sample(
        path,
        label,
        captions,
        row.get("text"),
        row.get("other_text"),
        objects,
        segment_of(row),
        asked,
        group=row.get("group") or None,
        # a video that is here is hashed when its digest is needed; the row's may be out of date
        digest=row["video_digest"] if "video_digest" in row and not is_there(path) else None,
        labels=None if labels is None else tuple(dict.fromkeys(labels)),
    )


def by_question(samples: list[Sample]) -> list[Sample]:
    """What a captioner is asked about the videos or segments: a sample for every question, with its answer as the only
    caption, and one without a question for each that has captions, or has no question."""
    asked = []
    for sample in samples:
        if sample.captions or not sample.questions:
            asked.append(sample)
        for question, answer, kind in sample.questions:
            captions = () if answer is None else (answer,)
            asked.append(replace(sample, question=question, kind=kind, captions=captions, objects=()))
    return asked


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """One sample of each video or segment, which may have several questions."""
    return [*{sample.key: sample for sample in samples}.values()]


# -- the splits of a data folder --------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The samples of each split, and what they have in common."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    class_names: list[str]
    note: str  # how val was made; "" if the folder has its own
    lexicon: Lexicon | None = None  # words that name the samples' attributes
    unreadable: tuple[str, ...] = ()  # errors of the videos that were skipped


def read_splits(
    data_dir: Path, class_names: list[str] | None = None, questions: bool = False, group_by: str = "auto"
) -> Splits:
    """Reads train/, val/ and test/ of a data folder. Without val/, a tenth of each training class is held out.

    The classes are those of train/, unless `class_names` lists them; then train/ is optional. With `questions`, a video
    has a sample for each of its questions: see by_question(). `group_by` says which clips come from one recording: see
    grouped(). Raises UserError if train/ is required and missing, or if `group_by` does not fit the data.
    """
    # only train/ is required: a dataset without test/ can be trained on, and one without train/ can be scored
    if not data_dir.is_dir():
        hint = "; create it with python dummy_data.py" if data_dir.name == "synthetic_dataset" else ""
        raise UserError(f"no data folder {data_dir}{hint}")
    splits = {name: read_folder(data_dir / name, questions) for name in SPLITS if (data_dir / name).is_dir()}
    if "train" not in splits and (class_names is None or not splits):
        raise UserError(f"{data_dir} has no folder train/ (expected {data_dir}/train/<class>/<video>)")

    splits = grouped(splits, data_dir, group_by)

    # every run needs val, because it selects the best epoch
    note = ""
    if "train" in splits and "val" not in splits:
        splits["train"], splits["val"] = hold_out(splits["train"], data_dir / "train")
        note = "no val/ folder: a tenth of each training class is held out (at least one video), the same in every run"
        if any(s.group is not None for s in splits["train"] + splits["val"]):
            note = "no val/ folder: about a tenth of each training class is held out, in whole recordings"
            note += ungrouped_classes(splits["train"], splits["val"])
    if class_names is None:
        class_names = sorted({c for s in splits["train"] for c in s.classes if c is not None}, key=natural_key)
    if questions:  # only now, so that all questions about a video stay in one split
        splits = {name: by_question(samples) for name, samples in splits.items()}
    return Splits(*(splits.get(name, []) for name in SPLITS), class_names, note, read_lexicon(data_dir))


def hold_out(samples: list[Sample], folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Splits training samples into (train, val). val gets a tenth of each class, at least one of two or more videos.

    Videos are ranked by a hash of their names, so the split does not depend on machine, seed or order of files. All
    segments of a video stay together, and all videos of a group; a group with more than half of the clips of a class
    stays in train. Raises UserError if every class has only one video or group.
    """

    def rank(sample: Sample) -> str:
        name = "/".join(parts_below(sample.path, folder)) if sample.group is None else sample.group
        return hashlib.sha256(f"{VAL_SALT}/{name}".encode("utf-8", "surrogateescape")).hexdigest()

    def whole(sample: Sample) -> Path | str:
        return sample.path if sample.group is None else sample.group

    # how many samples of each class a video has: one, or its segments; or those of a group. Without any label, the
    # class is None
    samples_of: dict[Path | str, Counter[str | None]] = {}
    for sample in sorted(samples, key=rank):
        samples_of.setdefault(whole(sample), Counter()).update(sample.classes)

    # class by class, so that val also has the small classes. With segments, the videos of one class may bring enough of
    # another class too; no class may lose its last video
    total, taken = Counter(c for s in samples for c in s.classes), Counter()
    left = Counter(label for labels in samples_of.values() for label in labels)  # videos or groups that remain
    held_out: set[Path | str] = set()

    def spared(unit: Path | str) -> bool:
        counts = samples_of[unit].items()
        small = isinstance(unit, Path) or all(2 * n <= total[name] for name, n in counts)
        return small and all(left[name] > 1 for name, _ in counts)

    for label, count in sorted(total.items(), key=lambda item: (item[1], str(item[0]))):  # the smallest class first
        for unit in (unit for unit, labels in samples_of.items() if label in labels):
            if taken[label] >= max(1, round(VAL_FRACTION * count)):
                break
            if unit not in held_out and spared(unit):
                held_out.add(unit)
                taken += samples_of[unit]
                left.subtract([*samples_of[unit]])
    if not held_out:
        few = "videos" if all(s.group is None for s in samples) else "recordings"
        raise UserError(f"{folder}: too few {few} to hold any out for val; add a folder val/ next to it")
    return [s for s in samples if whole(s) not in held_out], [s for s in samples if whole(s) in held_out]


def read_display_names(data_dir: Path, class_names: list[str]) -> dict[str, str]:
    """{class: display name} from classes.json. A class that is not listed there keeps its name. Raises UserError."""
    file = data_dir / "classes.json"
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {cause_of(error)}") from None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f'{file}: expected {{"class": "display name", ...}}')
    return {name: names.get(name, name) for name in class_names}


def read_lexicon(folder: Path) -> Lexicon | None:
    """lexicon.json of a data folder: the words for each value of each attribute. None without one. Raises UserError."""
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
    """Raises UserError unless every sample has what the task needs: captions or a known class, and texts if used."""
    for name in SPLITS:
        samples = getattr(splits, name)
        if captioning:
            unusable, problem = [s for s in samples if not s.captions], "no caption in metadata.jsonl"
            if unusable and not unusable[0].questions:  # only a run with questions can use them
                problem = "no caption and no question in metadata.jsonl"
        else:
            known = splits.class_names
            unusable = [s for s in samples if s.labels != () and not all(c in known for c in s.classes)]
            problem = "no class folder and no label"
            if unusable and (unknown := [c for c in unusable[0].classes if c and c not in known]):
                problem = f"a class that is not in train ({unknown[0]})"
        if unusable:
            count, example = f"{len(distinct(unusable))} of {len(distinct(samples))}", unusable[0].path
            raise UserError(f"{count} videos of {name} have {problem}, for example {example}")

        # some samples may lack a text, but if all do, --use_text has nothing to read
        if use_text and not captioning and samples and all(s.text is None for s in samples):
            raise UserError(f"--use_text True: no video of {name} has a text in metadata.jsonl")
    if not captioning:
        refuse_overlaps(splits.train + splits.val + splits.test)
    if not captioning and len(splits.class_names) < 2:
        raise UserError(f"classification needs at least two classes; train has {splits.class_names}")


def identified(splits: Splits, digests: dict[Path, str]) -> Splits:
    """The splits with the digest of every sample filled in, None for paths that are not in `digests`."""
    return replace(splits, **{n: [replace(s, digest=digests.get(s.path)) for s in getattr(splits, n)] for n in SPLITS})


def fingerprint_data(splits: Splits, data_dir: Path) -> str:
    """64 hex digits: 32 identify the annotations (relative paths, labels, captions, texts), 32 the videos' contents."""
    # two digests, so that a changed label can be told from a changed video
    annotations, contents = hashlib.sha256(), hashlib.sha256()
    for name in SPLITS:
        for s in getattr(splits, name):
            relative = Path(os.path.relpath(s.path, data_dir)).as_posix()
            asked = [s.question] if s.question else []
            label = s.label if s.labels is None else s.labels
            row = repr((name, relative, label, s.captions, s.text, *(s.segment or ()), *asked))
            annotations.update(row.encode("utf-8", "surrogateescape"))
            contents.update(s.identity.encode())
    return annotations.hexdigest()[:32] + contents.hexdigest()[:32]


# -- dataset ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class ClipDataset(Dataset):
    """The clips of samples. Item (draw, index) depends only on (seed, draw, index).

    In training, frames are jittered (unless `jitter` is False) and one of the captions is drawn. Otherwise frames are
    centred and the first caption is used. With `features`, item i has features[i] instead of pixels. With `frames`, a
    StoredFrames of extras/frame_store.py, pixels come from there.
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
    with_captions: bool = True  # False: items have none, since drawing one takes longer than reading features
    features: Any = None
    jitter: bool = True
    frames: Any = None

    def __post_init__(self) -> None:
        self.class_index = {name: i for i, name in enumerate(self.class_names)}
        self.labels: Any = [self.class_index.get(sample.label, -100) for sample in self.samples]  # -100: unknown
        if any(sample.labels is not None for sample in self.samples):
            self.labels = multi_hot((sample.labels or () for sample in self.samples), self.class_names)  # (n, K)
        self.opened: tuple[Path, Reader] | None = None  # the last video with segments: more of them often come next

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:  # ty: ignore[lost-keyword-for-regular-parameter]
        draw, index = item
        sample = self.samples[index]
        # one generator per item, so that results do not depend on which worker reads it, or when
        rng = np.random.default_rng([self.seed, draw, index]) if self.train and self.jitter else None
        try:
            if self.features is not None:
                video = self.features[index]  # [1 + N, D] fp16
            elif self.frames is not None:
                video = self.frames.clip(self, index, rng)  # [T, C, H, W] uint8
            else:
                video = self.pixels(sample, rng)
        except ReadError as error:  # ClipLoader raises it; raised here, it would end in the worker's traceback
            return {"error": str(error), "index": index}
        caption = self.caption(draw, index) if self.with_captions else ""
        annotations = {"label": self.labels[index], "caption": caption, "text": sample.text or ""}
        return {"video": video, "index": index, "question": sample.question or ""} | annotations

    def pixels(self, sample: Sample, rng: np.random.Generator | None) -> torch.Tensor:
        """Reads a clip as uint8 [T, C, H, W], or several views as [V, T, C, H, W]. Raises ReadError."""
        reader = self.reader(sample)
        # within a segment, indices count from its first frame
        first, available = reader.part(sample.segment)
        clips, crops = self.views
        if self.views == (1, 1):
            indices = sample_indices(available, self.num_frames, self.stride, rng)
            return reader.frames(first + indices, self.preprocessing.pixels)
        indices = view_indices(available, self.num_frames, self.stride, clips)
        views = reader.frames(first + indices, partial(self.preprocessing.crops, count=crops))
        # [clips * T, crops, C, H, W] -> [clips, T, crops, ...] -> [clips, crops, T, ...] -> [clips * crops, T, ...]
        return views.unflatten(0, (clips, -1)).transpose(1, 2).flatten(0, 1)

    def reader(self, sample: Sample) -> Reader:
        """The opened video of a sample. Segments of one video that follow each other share it."""
        if sample.segment is None:
            return open_video(sample.path)
        if self.opened is None or self.opened[0] != sample.path:
            self.opened = (sample.path, open_video(sample.path))
        return self.opened[1]

    def caption(self, draw: int, index: int) -> str:
        """The caption of an item, "" if it has none. Does not read the video."""
        captions = self.samples[index].captions or ("",)
        if len(captions) == 1 or not self.train:
            return captions[0]
        return captions[int(np.random.default_rng([self.seed, draw, index, 1]).integers(len(captions)))]

    def caption_length(self, item: tuple[int, int]) -> tuple[int, int]:
        """(words, characters) of the question and caption of an item, for sorting."""
        text = f"{self.samples[item[1]].question or ''} {self.caption(*item)}"
        return len(text.split()), len(text)


# -- batches ----------------------------------------------------------------------------------------


@dataclass
class EpochBatches:
    """Yields batches as lists of (draw, index). Training shuffles them by (seed, epoch); evaluation keeps the order.

    balance      draw equally many clips of every class in each epoch, instead of every clip once
    group        batches per optimizer step. Above 1, the clips of a step are sorted by caption length, which saves
                 padding and changes nothing else, because a step sums over its clips
    rank, world_size    yield only every world_size-th clip of a batch, starting at `rank`; this may be none
    epoch, start        set before each pass; `start` is the number of batches to skip
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
        """All items of the epoch as (draw, index)."""
        count = len(self.dataset)
        if not self.dataset.train:
            return [(self.epoch, index) for index in range(count)]
        # depends on seed and epoch only, so that a resumed run continues with the same order
        rng = np.random.default_rng([self.dataset.seed, self.epoch])
        if self.balance:
            order = balanced_order(np.array(self.dataset.labels), self.epoch, rng)
        else:
            order = [(self.epoch, int(index)) for index in rng.permutation(count)]
        if self.group == 1:
            return order
        # sort only within a step: sorting across steps would change which clips are in a step together
        step, length = self.group * self.batch_size, self.dataset.caption_length
        return [item for first in range(0, count, step) for item in sorted(order[first : first + step], key=length)]


def balanced_order(classes: np.ndarray, epoch: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """As many items (draw, index) as there are clips, equally many of every class, give or take one.

    A class with too few clips repeats them. Each repetition is another draw, so it gets other frames and captions.
    """
    groups = [np.flatnonzero(classes == k) for k in np.unique(classes)]
    quota, rest = divmod(len(classes), len(groups))
    draws = math.ceil((quota + 1) / min(map(len, groups)))  # most draws of one clip in an epoch
    extra = set(rng.permutation(len(groups))[:rest].tolist())  # classes that get one more clip

    # take all clips of a class once before any of them a second time
    order: list[tuple[int, int]] = []
    for number, group in enumerate(groups):
        items = [(epoch * draws + d, int(i)) for d in range(draws) for i in rng.permutation(group)]
        order += items[: quota + (number in extra)]
    return [order[i] for i in rng.permutation(len(order))]


class WorkerLoader(DataLoader):
    """A DataLoader that raises UserError if a worker process is killed."""

    def __iter__(self):
        # torch's signal handler would raise at any point of the main process. This flag keeps torch from installing it;
        # the error then comes from waiting for the next batch, inside this try block
        signal_handling._SIGCHLD_handler_set = True
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not re.match(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
                raise
            advice = "lower --num_workers, --batch_size or --num_frames"
            raise UserError(f"a worker process was killed, probably out of memory: {advice}") from None


class ClipLoader(WorkerLoader):
    """Yields batches, None for a batch without any readable video.

    A video that cannot be read raises UserError. With `skip_unreadable` it is skipped and its error added to `skipped`.
    """

    def __init__(self, *args, skip_unreadable: bool = False, skipped: Iterable[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_unreadable, self.skipped = skip_unreadable, set(skipped)

    def close(self) -> None:
        """Stops the worker processes now. The garbage collector would wait up to 5 seconds for each."""
        if self.num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def decode_again(self) -> None:
        """Decodes the videos from now on, even if their frames are stored."""
        if self.dataset.frames is not None:
            self.close()  # worker processes have a copy of the dataset
            self.dataset.frames = None

    def with_errors(self) -> Iterator[tuple[dict[str, Any] | None, dict[int, str]]]:
        """Yields every batch with the errors of its unreadable videos: (batch, {index: error})."""
        for item in super().__iter__():
            yield item["batch"], item["errors"]

    def __iter__(self):
        for batch, errors in self.with_errors():
            if errors and not self.skip_unreadable:
                raise UserError(next(iter(errors.values())))
            self.skipped.update(errors.values())
            yield batch


def collate(items: list[dict[str, Any]], make_batch: Callable[[list[dict[str, Any]]], dict]) -> dict[str, Any]:
    """{"batch": the readable items as a batch, or None; "errors": {index: error} of the others}."""
    readable = [item for item in items if "error" not in item]
    errors = {item["index"]: item["error"] for item in items if "error" in item}
    return {"batch": make_batch(readable) if readable else None, "errors": errors}


def build_loader(
    dataset: ClipDataset, make_batch: Callable, num_workers: int, batches: EpochBatches, **skipping: Any
) -> ClipLoader:
    """A loader of the dataset's `batches`, collated by `make_batch`. `skipping` are ClipLoader's own arguments."""
    return ClipLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, make_batch=make_batch),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(dataset.seed),  # keeps iterators from using the global one
        **skipping,
    )
