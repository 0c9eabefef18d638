"""Convert the annotation files of public datasets to metadata.jsonl. Videos are referenced, never copied.

    python convert_dataset.py --format ucf101 --annotations trainlist01.txt testlist01.txt --videos UCF-101 --output out

Each format has one generator that turns a file into rows. The rest is shared: find the video of every row, drop the
missing, unreadable and refused ones, list them in <output>/<split>/conversion.json, and print the counts.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from script import Parser, UserError, counted, make_folder, printable, replace_file, script, shown

if TYPE_CHECKING:
    from VLoader import Key, Sample

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
PRINTED_NAMES = 5  # of missing, unreadable and refused videos; conversion.json has all of them
PRINTED_CLASSES = 40
PRINTED_LENGTH = 200  # characters of a name
MAX_WORKERS = 256
REPORT = "conversion.json"


@dataclass(frozen=True)
class Row:
    """One line of an annotation file: a video and its labels."""

    video: str  # a path, or a file name without its suffix
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    split: str | None = None  # None: inferred from the file name
    frames: tuple[int, int] | None = None  # first and last image number, if the video is part of a frame folder
    times: tuple[float, float, float | None] | None = None  # start and end in seconds, fps; None: the whole video
    problem: str = ""  # why the row is refused
    unused: bool = False  # the list itself excludes the video from this split
    group: str | None = None  # the recording that the video comes from

    def __post_init__(self) -> None:
        # JSON may hold anything: a wrong type is caught here, where the file that holds it is still known
        texts = [text for text in (self.video, self.label, *self.captions, self.text, self.group) if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names, labels and captions must be strings")


# -- one generator per format -----------------------------------------------------------------------


def read_text(file: Path) -> str:
    """The file decoded as UTF-8, as UTF-16 if a byte order mark says so, else as cp1252 (VATEX's encoding).
    Raises UserError if it cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def plain_text(file: Path) -> str:
    """The text of a file in a line-based format. Raises ValueError for a JSON file."""
    if file.suffix.lower() in (".json", ".jsonl"):
        raise ValueError("expected lines of text, not JSON")
    return read_text(file)


def lines_of(file: Path) -> Iterator[str]:
    """The non-empty lines. Only a line feed ends a line: captions may contain U+2028 and other separators."""
    return (line.strip() for line in plain_text(file).split("\n") if line.strip())


def cells_of(file: Path, separator: str = ",") -> list[list[str]]:
    """The non-empty rows of a csv file. Quoted cells may contain line breaks. Raises ValueError if it is malformed."""
    reader = csv.reader(io.StringIO(plain_text(file), newline=""), delimiter=separator, strict=True)
    try:
        return [[cell.strip() for cell in row] for row in reader if len(row) > 1 or "".join(row).strip()]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def table_of(cells: list[list[str]]) -> Iterator[dict[str, str]]:
    """The rows of a table as {column: cell}. The first row is the header; missing cells become "".
    Raises ValueError for a row with more cells than the header."""
    titles = cells[0] if cells else []
    for row in cells[1:]:
        if any(row[len(titles) :]):
            raise ValueError(
                f"a row has {len(row)} cells for {counted(len(titles), 'column')}: {shown(', '.join(row))}; "
                "put quotes around cells that contain commas"
            )
        yield dict(zip(titles, row + [""] * (len(titles) - len(row)), strict=False))


def split_fields(word: str) -> dict[str, str | None]:
    """The `split` and `problem` fields of a Row whose split column contains `word`."""
    split = split_of(word)
    return {"split": split, "problem": f"unknown split {word}" if word and split is None else ""}


PATH_TITLES = ("file_name", "filename", "path", "video_path", "video", "file", "video_name", "clip", "video_id", "name")
LABEL_TITLES = ("label", "class", "category", "class_name", "action", "target")
CAPTION_TITLES = ("caption", "sentence", "description")


def list_rows(file: Path) -> Iterator[Row]:
    """`path label`, separated by a tab, comma or spaces; or a table with a header (path, label, caption, text, split,
    group, start, end)

    Other common column names work too: PATH_TITLES, LABEL_TITLES, CAPTION_TITLES.
    """
    # the first line decides on the separator
    first = next(lines_of(file), "")
    separator = "\t" if "\t" in first else "," if "," in first else None
    cells = cells_of(file, separator) if separator else [split_at_path(line) for line in lines_of(file)]

    # a header is a first line that names a path column
    titles = [cell.lower() for cell in cells[0]] if cells else []
    if separator and any(title in PATH_TITLES for title in titles):
        yield from table_rows(table_of([titles, *cells[1:]]))
        return

    # without a header, exactly one label must follow the path: more than one is ambiguous, so never guess
    for row in cells:
        if len(row) == 2 and row[1]:
            yield Row(row[0], label=row[1])
        elif not any(row[1:]):
            yield Row(row[0], problem="no label")
        else:
            yield Row(row[0], problem=f"several labels ({', '.join(row[1:])}); lists of frames need --format frames")


def split_at_path(line: str) -> list[str]:
    """`a path.mp4 jumping jack` -> ["a path.mp4", "jumping jack"].

    Without a video suffix the path ends at the first space. Several numbers after the path stay separate cells,
    so that list_rows can report them as several labels."""
    match = re.match(r"(.*?\.(?:mp4|avi|mkv|webm|mov|gif|m4v|mpe?g|wmv|flv|3gp|ogv|pt))\s+(.*)", line, re.IGNORECASE)
    path, rest = match.groups() if match else [*line.split(maxsplit=1), ""][:2]
    numbers = rest.split()
    return [path, *numbers] if all(n.lstrip("-").isdigit() for n in numbers) else [path, rest]


def table_rows(rows: Iterator[dict[str, str]]) -> Iterator[Row]:
    """The rows of a table with a header. Columns have many names: the first known one that is filled wins."""

    def cell(row: dict[str, str], titles: tuple[str, ...]) -> str | None:
        return next((row[t] for t in titles if row.get(t)), None)

    for row in rows:
        caption = cell(row, CAPTION_TITLES)
        yield Row(
            cell(row, PATH_TITLES) or "",
            label=cell(row, LABEL_TITLES),
            captions=(caption,) if caption else (),
            text=cell(row, ("text",)),
            group=cell(row, ("group",)),
            **split_fields(cell(row, ("split", "subset")) or "") | times_fields(row),
        )


def times_fields(row: dict[str, str]) -> dict[str, Any]:
    """The `times` or `problem` field of a Row, from the columns start and end (in seconds) and fps."""
    start, end, fps = (row.get(key, "") for key in ("start", "end", "fps"))
    if not start and not end:
        return {}
    try:
        times = float(start), float(end), float(fps) if fps else None
    except ValueError:
        times = (0.0, 0.0, None)
    if 0 <= times[0] < times[1] < math.inf and (times[2] is None or 0 < times[2] < math.inf):
        return {"times": times}
    return {
        "problem": f"start and end must be seconds with 0 <= start < end, and fps above 0, not {start}, {end}, {fps}"
    }


def ucf101_rows(file: Path) -> Iterator[Row]:
    """`Class/v_Class_g01_c01.avi 1`; test lists have no number. The folder is the class, v_Class_g01 the recording"""
    for line in lines_of(file):
        name = re.sub(r"\s+\d+$", "", line)  # the class number of a training list
        recording = re.match(r"(.+_g\d+)_c\d+", PurePosixPath(name).name)
        yield Row(name, label=PurePosixPath(name).parent.name or None, group=recording[1] if recording else None)


def hmdb51_rows(file: Path) -> Iterator[Row]:
    """<class>_test_split<n>.txt with `video.avi 1`: 1 = train, 2 = test, 0 = not used in this split"""
    label, marker, _ = file.stem.partition("_test_split")
    if not marker:
        raise UserError(f"{file} is not an HMDB51 list: pass the <class>_test_split<n>.txt files of one split")
    for line in lines_of(file):
        name, number = line.rsplit(maxsplit=1)
        split = {"0": "train", "1": "train", "2": "test"}[number]
        yield Row(f"{label}/{name}", label=label, split=split, unused=number == "0")


def kinetics_rows(file: Path) -> Iterator[Row]:
    """csv with label, youtube_id, time_start, time_end, split; videos are named <id>_<start>_<end>, six digits each"""
    for row in table_of(cells_of(file)):
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        yield Row(name, label=row.get("label") or None, **split_fields(row.get("split", "")))


def ssv2_rows(file: Path) -> Iterator[Row]:
    """[{"id", "label", "template"}]: the template without its brackets is the class, the label is the caption"""
    for row in json.loads(read_text(file)):
        if "template" not in row:
            yield Row(str(row["id"]), problem="no template (the published test list has none)")
            continue
        # "[Something] falling": the brackets mark what the label names, and are not part of the class
        label = row["template"].replace("[", "").replace("]", "")
        yield Row(str(row["id"]), label=label, captions=(row["label"],) if row.get("label") else ())


def msrvtt_rows(file: Path) -> Iterator[Row]:
    """videodatainfo.json: `videos` have the splits, `sentences` have the captions"""
    values = json.loads(read_text(file))
    captions: dict[str, list[str]] = {}
    for sentence in values["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"].strip())
    for video in values["videos"]:
        video_captions = tuple(filter(None, captions.pop(video["video_id"], [])))
        yield Row(video["video_id"], captions=video_captions, **split_fields(video["split"]))
    for name in captions:
        yield Row(name, problem="it has sentences but is missing from `videos`")


def msvd_rows(file: Path) -> Iterator[Row]:
    """`<id>_<start>_<end> caption` lines, # for comments; or the published csv, whose English captions are used

    Columns of the csv: VideoID, Start, End, Language, Description.
    """
    captions: dict[str, list[str]] = {}
    if file.suffix.lower() == ".csv":
        for row in table_of(cells_of(file)):
            video_captions = captions.setdefault(f"{row['VideoID']}_{row['Start']}_{row['End']}", [])
            video_captions += [row["Description"]] if row["Language"] == "English" else []
    else:
        for line in lines_of(file):
            name, _, caption = line.partition(" ")
            if not name.startswith("#"):
                captions.setdefault(name, []).append(caption.strip())
    for name, video_captions in captions.items():
        yield Row(name, captions=tuple(filter(None, video_captions)))


def vatex_rows(file: Path) -> Iterator[Row]:
    """`<id>|caption|caption ...`, or the published json ([{"videoID", "enCap"}])"""
    if file.suffix.lower() == ".json":
        rows = ((row["videoID"], row.get("enCap", [])) for row in json.loads(read_text(file)))
    else:
        rows = ((name, rest.split("|")) for name, _, rest in (line.partition("|") for line in lines_of(file)))
    for name, captions in rows:
        yield Row(name.strip(), captions=tuple(re.sub("[ \t]+", " ", c).strip() for c in captions if c.strip()))


def frames_rows(file: Path) -> Iterator[Row]:
    """`folder start end label`, where start and end are image numbers; or `folder count label`"""
    for line in lines_of(file):
        match = re.fullmatch(r"(.+?)\s+(\d+)\s+(\d+)\s+(\S+)", line)
        if match:
            folder, start, end, label = match.groups()
            yield Row(folder, label=label, frames=(int(start), int(end)))
            continue
        # the count is not needed: without start and end all images of the folder are used
        match = re.fullmatch(r"(.+?)\s+(\d+)\s+(\S+)", line)
        if match is None:
            yield Row(line, problem="expected `folder start end label` or `folder count label`")
            continue
        yield Row(match[1], label=match[3])


def chat_rows(file: Path) -> Iterator[Row]:
    """[{"messages": [user, assistant], "videos": [path]}]: the question is the text, the answer is the caption"""
    for row in json.loads(read_text(file)):
        name = str(row["videos"][0]) if row.get("videos") else "(none)"
        # longer conversations have no single caption
        turns = [m for m in row["messages"] if m["role"] != "system"]
        if [m["role"] for m in turns] != ["user", "assistant"]:
            yield Row(name, problem="expected exactly one question and one answer")
        elif len(row.get("videos", ())) != 1:
            yield Row(name, problem=f"{len(row.get('videos', ()))} videos in one conversation")
        else:
            question, answer = (m["content"].replace("<video>", "").strip() for m in turns)
            yield Row(name, captions=(answer,), text=question or None, problem="" if answer else "no answer")


# to add a format, write a generator whose docstring starts with one line of help, and list it here
FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "list": list_rows,
    "ucf101": ucf101_rows,
    "hmdb51": hmdb51_rows,
    "kinetics": kinetics_rows,
    "ssv2": ssv2_rows,
    "msrvtt": msrvtt_rows,
    "msvd": msvd_rows,
    "vatex": vatex_rows,
    "frames": frames_rows,
    "chat": chat_rows,
}


def split_of(name: str) -> str | None:
    """The split named in a word or file name; None if there is none, or more than one."""
    # a whole word; the letter l may follow, as in UCF101's trainlist01.txt
    words = re.findall(r"(?<![a-z])(train(?:ing)?|val(?:id(?:ate|ation)?)?|dev|test(?:ing)?)(?![a-km-z])", name.lower())
    splits = {SPLIT_WORDS[word] for word in words}
    return splits.pop() if len(splits) == 1 else None


def read_class_names(file: Path) -> dict[str, str]:
    """{number: name} from `3 jumping` lines, one name per line (numbered from 0), or json {"jumping": 3}.
    Raises ValueError for other json and for a number that is listed twice."""
    if file.suffix.lower() == ".json":
        values = json.loads(read_text(file))
        if not isinstance(values, dict) or not all(re.fullmatch(r"\d+", str(number)) for number in values.values()):
            raise ValueError('expected {"jumping": 3, ...}')
        pairs = [(str(number), name) for name, number in values.items()]
    else:
        lines = list(lines_of(file))
        numbered = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
        # a single line without a number means that digits are part of the names ("100 m sprint")
        all_numbered = lines and all(numbered)
        pairs = [m.groups() for m in numbered] if all_numbered else [(str(i), line) for i, line in enumerate(lines)]
    names = dict(pairs)
    if len(names) < len(pairs):  # two names for one number: either may be wrong
        raise ValueError("a class number is listed twice")
    return names


def several_labels(label: str | None) -> str:
    """The problem with a label that lists several classes (`3,17`, `a;b`, `a|b`, `[1, 2]`); else ""."""
    if label and re.fullmatch(r".*[|;].*|\[.*\]|\d+(?:[,\s]+\d+)+", label, re.DOTALL):
        return f"several labels ({label}); a video can have only one"
    return ""


def parse_file(name: str, file: Path, default_split: str | None) -> Iterator[Row]:
    """The rows of a file, each with a split. Raises UserError if the file is not in this format."""
    split = default_split or split_of(file.stem) or "train"
    try:
        for row in FORMATS[name](file):
            yield row if row.split else replace(row, split=split)
    except RecursionError:
        raise UserError(f"{file} is not in --format {name}: it is nested too deeply") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # whatever a parser trips over means that the file has another format; a KeyError is a missing field
        cause = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{file} is not in --format {name}: {cause}") from None


# -- finding the videos -----------------------------------------------------------------------------


class VideoIndex:
    """All videos below a folder, searchable by file name or by any part of the path."""

    def __init__(self, folder: Path):
        from readers import find_videos

        self.folder = folder
        self.by_name: dict[str, list[tuple[tuple[str, ...], Path]]] = {}
        self.videos = find_videos(folder)
        for path in self.videos:
            parts = self.parts(path.relative_to(folder).as_posix())
            self.by_name.setdefault(parts[-1] if parts else "", []).append((parts, path))

    @staticmethod
    def parts(name: str) -> tuple[str, ...]:
        """The parts of a path, the last one without its video suffix."""
        from readers import VIDEO_SUFFIXES

        path = PurePosixPath(name.replace("\\", "/"))
        plain = path.with_suffix("") if path.suffix.lower() in {*VIDEO_SUFFIXES, ".pt"} else path
        return tuple(p for p in plain.parts if p not in (".", "/"))

    def find(self, name: str) -> tuple[Path | None, str]:
        """(the video or None, the problem or ""). Several equally good matches are a problem: never guess.

        Paths are compared from their end, as far as both go: `running/0001` matches `some/prefix/running/0001.mp4`
        but not `jumping/0001`.
        """
        parts = self.parts(name)
        candidates = [
            (path_parts, path)
            for path_parts, path in self.by_name.get(parts[-1] if parts else "", [])
            if all(a == b for a, b in zip(reversed(path_parts), reversed(parts), strict=False))
        ]

        # prefer the full path over a partial one, then the same suffix (a.mp4 over a.avi)
        exact = [path for path_parts, path in candidates if path_parts == parts]
        matches = exact or [path for _, path in candidates]
        same_suffix = [path for path in matches if path.name == PurePosixPath(name.replace("\\", "/")).name]
        matches = same_suffix or matches
        if len(matches) > 1:
            return None, f"{len(matches)} files have this name: {matches[0]}, {matches[1]}"
        return (matches[0], "") if matches else (None, "")


def images_between(folder: Path, frames: tuple[int, int]) -> tuple[list[Path], bool]:
    """(the images numbered from frames[0] to frames[1], whether they are all images of the folder)."""
    from readers import list_images

    def number(path: Path) -> int:
        digits = re.findall(r"\d+", path.stem)
        return int(digits[-1]) if digits else -1

    images = list_images(folder) if folder.is_dir() else []
    chosen = [image for image in images if frames[0] <= number(image) <= frames[1]]
    return chosen, len(chosen) == len(images)


def link_images(folder: Path, images: list[Path]) -> None:
    """Makes a folder of symlinks to exactly these images. Raises UserError if it cannot."""
    make_folder(folder)
    try:
        # links of an earlier conversion; real files are never touched
        for old in folder.iterdir():
            if old.is_symlink():
                old.unlink()
        for image in images:
            (folder / image.name).symlink_to(image.resolve())
    except OSError as error:
        raise UserError(f"cannot link {images[0]} in {folder}: {error.strerror}") from None


# -- sorting and writing the rows -------------------------------------------------------------------


@dataclass
class Outcome:
    """What happened to the rows of one split."""

    rows: int = 0
    found: int = 0
    unused: int = 0
    captions: int = 0
    samples: dict["Key", "Sample"] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    class_rows: Counter = field(default_factory=Counter)  # rows per class, with or without a video
    links: dict[Path, list[Path]] = field(default_factory=dict)  # {folder to make: images to link in it}


def sort_rows(
    rows: Iterator[Row], index: VideoIndex, names: dict[str, str], output: Path, multi_label: bool = False
) -> dict[str, Outcome]:
    """{split: outcome}. Each row counts once: as found, missing, refused or unused. Rows of one video are merged, or of
    one segment of it.

    `names` maps class numbers to class names; `output` is where folders of linked frames will be made; `multi_label`
    says whether a video may have several labels.
    """
    outcomes: dict[str, Outcome] = {}
    groups: dict[tuple[str, Path, Any], list[Row]] = {}
    for row in rows:
        # rows that the list itself excludes are counted and need no video
        outcome = outcomes.setdefault(row.split, Outcome())
        outcome.rows += 1
        if row.unused:
            outcome.unused += 1
            continue

        # refused rows count for their class too: the table of classes shows how many rows gave how many videos
        problem = problem_of(row, names)
        row = replace(row, label=names.get(row.label, row.label))
        outcome.class_rows[row.label] += 1
        path, problem = (None, problem) if problem else find_row(row, index, output, outcome)
        if problem:
            outcome.refused.append(f"{row.video}: {problem}")
        elif path is None:
            outcome.missing.append(row.video)
        else:
            groups.setdefault((row.split, path, row.times), []).append(row)

    # only now are all captions and labels of a video known
    with_segments = {(split, path) for split, path, times in groups if times}
    for (split, path, times), group in groups.items():
        if times is None and (split, path) in with_segments:
            problem = "no start and end, which other rows of this video have"
            outcomes[split].refused += [f"{row.video}: {problem}" for row in group]
            continue
        join_rows(group, path, outcomes[split], multi_label)
    return outcomes


def problem_of(row: Row, names: dict[str, str]) -> str:
    """Why the row is refused, whether or not its video exists; else ""."""
    if row.problem:
        return row.problem
    if not row.video.strip():
        return "it names no video"
    if not row.label and not row.captions:
        return "it has neither a label nor a caption"
    if row.label and row.label.isdecimal() and names and row.label not in names:
        return f"--class_names has no class {row.label}"
    return several_labels(row.label)


def find_row(row: Row, index: VideoIndex, output: Path, outcome: Outcome) -> tuple[Path | None, str]:
    """(the video or None, the problem or ""). For a part of a frame folder the video is a folder of links,
    which is noted in outcome.links and made later."""
    path, problem = index.find(row.video)
    if path is None or row.frames is None:
        return path, problem
    images, complete = images_between(path, row.frames)
    first, last = row.frames
    if not images:
        return None, f"{path} has no images numbered from {first} to {last}"
    if complete:
        return path, ""  # the folder itself serves: no links needed
    links = output / "frames" / path.relative_to(index.folder).parent / f"{path.name}_{first}_{last}"
    outcome.links[links] = images
    return links, ""


def join_rows(group: list[Row], path: Path, outcome: Outcome, multi_label: bool) -> None:
    """Merges the rows of one video or segment into one sample: captions add up, with `multi_label` labels too; else
    they must agree, as groups and texts must."""
    from readers import Segment
    from VLoader import Sample

    labels, recordings = (dict.fromkeys(filter(None, (getattr(row, n) for row in group))) for n in ("label", "group"))
    for noun, values in (("labels", () if multi_label else labels), ("groups", recordings)):
        if len(values) > 1:
            problem = f"several {noun} ({', '.join(values)}); a video can have only one"
            outcome.refused += [f"{row.video}: {problem}" for row in group]
            return

    # a sample has one text: rows with another one are refused, captions included, because a caption that answers
    # another question would be wrong
    text = next((row.text for row in group if row.text is not None), None)
    taken = [row for row in group if row.text in (None, text)]
    outcome.refused += [f"{row.video}: text differs from an earlier row" for row in group if row not in taken]
    outcome.found += len(taken)
    captions = tuple(caption for row in taken for caption in row.captions)
    segment = Segment(*group[0].times) if group[0].times else None
    recording = next(iter(recordings), None)
    sample = Sample(path, next(iter(labels), None), captions, text, segment=segment, group=recording)
    if multi_label and labels:
        sample = replace(sample, label=None, labels=tuple(labels))
    outcome.samples[sample.key] = sample


def drop_unreadable(outcomes: dict[str, Outcome], workers: int) -> None:
    """Moves videos that cannot be read to `unreadable`. Decodes first and last frame, as the scan before training.

    Raises UserError if none can be read.
    """
    from scan import scan_videos

    # 0 clips: only the first and the last frame are decoded, so num_frames and stride do not matter
    jobs = {key: 0 for outcome in outcomes.values() for key in outcome.samples}
    bad, _ = scan_videos(jobs, num_frames=8, stride=0, num_workers=workers, known={})
    for outcome in outcomes.values():
        outcome.unreadable += [bad[key] for key in outcome.samples if key in bad]
        outcome.samples = {key: s for key, s in outcome.samples.items() if key not in bad}
    if not any(outcome.samples for outcome in outcomes.values()):
        raise UserError(f"no video can be read; the first error: {next(iter(bad.values()))}")


def write_rows(outcomes: dict[str, Outcome], output: Path) -> None:
    """Writes <output>/<split>/metadata.jsonl. File names are relative to that folder."""
    for split, outcome in outcomes.items():
        folder = output / split
        make_folder(folder)
        lines = []

        # relative names keep working when the data and the output move together
        for sample in outcome.samples.values():
            outcome.captions += len(sample.captions)
            # resolved, because `..` after a symlinked folder would lead elsewhere
            target = sample.path.parent.resolve() / sample.path.name
            name = Path(os.path.relpath(target, folder.resolve())).as_posix()
            row = {"file_name": name, "label": sample.label, "caption": list(sample.captions), "text": sample.text}
            row |= {"labels": sample.labels, "group": sample.group}
            row |= sample.segment._asdict() if sample.segment else {}
            lines.append(json.dumps({k: v for k, v in row.items() if v not in (None, [])}) + "\n")
        text = "".join(lines)
        replace_file(folder / "metadata.jsonl", lambda p, text=text: p.write_text(text, encoding="utf-8"))


def report(outcomes: dict[str, Outcome], output: Path) -> dict[str, Any]:
    """Prints the counts and writes <split>/conversion.json, which names every video that was left out."""
    from script import write_json

    # the header of the printed table; the same words are the keys of conversion.json
    counts, print_width = {}, 11
    titles = ("rows", "found", "missing", "refused", "unused", "unreadable", "videos", "classes", "captions")
    print(f"{'split':<7}" + "".join(f"{t:>{print_width}}" for t in titles))

    # one line and one file per split; every row is in exactly one of found, missing, refused, unused
    for split in (s for s in SPLITS if s in outcomes):
        outcome = outcomes[split]
        kept = Counter(c for s in outcome.samples.values() for c in s.classes)
        lists = {name: getattr(outcome, name) for name in ("missing", "unreadable", "refused")}
        values = (
            outcome.rows,
            outcome.found,
            len(outcome.missing),
            len(outcome.refused),
            outcome.unused,
            len(outcome.unreadable),
            len(outcome.samples),
            len(set(kept) - {None}),
            outcome.captions,
        )
        print(f"{split:<7}" + "".join(f"{v:>{print_width},}" for v in values))
        by_class = sorted(outcome.class_rows.items(), key=str)
        classes = {str(c): {"rows": n, "videos": kept[c]} for c, n in by_class if c is not None}
        counts[split] = dict(zip(titles, values, strict=True)) | {"classes": classes} | lists
        write_json(counts[split], output / split / REPORT)
    print_classes({split: values["classes"] for split, values in counts.items()})

    # a few names are enough to see a wrong --videos folder; a long list would bury the table above
    for name in ("missing", "unreadable", "refused"):
        videos = [text for values in counts.values() for text in values[name]]
        more = f" and {len(videos) - PRINTED_NAMES} more, all in {REPORT}" if len(videos) > PRINTED_NAMES else ""
        if videos:
            print(f"{name}: {'; '.join(map(brief, videos[:PRINTED_NAMES]))}{more}")
    return counts


def brief(name: str) -> str:
    """A name, shortened and escaped for the terminal."""
    return printable(name)[:PRINTED_LENGTH]


def print_classes(counts: dict[str, dict[str, dict[str, int]]]) -> None:
    """Prints how many rows of each class have a usable video, per split."""
    # a class that is missing in a split shows here, before anything is trained
    names = sorted({name for classes in counts.values() for name in classes})
    for number, name in enumerate(names):
        if number == PRINTED_CLASSES:
            print(f"  and {counted(len(names) - PRINTED_CLASSES, 'more class', 'more classes')}, in {REPORT}")
            break
        parts = (f"{s} {c[name]['videos']} of {c[name]['rows']}" for s, c in counts.items() if name in c)
        print(f"  {brief(name)}: {', '.join(parts)}")


def check_outcomes(outcomes: dict[str, Outcome], index: VideoIndex) -> None:
    """Raises UserError if no row is usable; warns about videos that are in two splits."""
    if not outcomes:
        raise UserError("the annotation files contain no rows")

    # naming the first of each kind mostly shows the mistake: a wrong folder, a wrong column, a wrong suffix
    if not any(o.samples for o in outcomes.values()):
        refused = [text for o in outcomes.values() for text in o.refused]
        missing = [name for o in outcomes.values() for name in o.missing]
        causes = [f"{len(refused)} refused, first {refused[0]}"] if refused else []
        contents = f"{counted(len(index.videos), 'video')}, first {index.videos[0]}" if index.videos else "no videos"
        if missing:
            causes.append(f"{len(missing)} not found in {index.folder}, first {missing[0]}; it contains {contents}")
        raise UserError(f"no row could be converted: {'; '.join(causes)}")

    # an overlap between train and test makes scores too good, but the lists of some datasets have one: only warn
    split_counts = Counter(path for o in outcomes.values() for path in {s.path for s in o.samples.values()})
    overlap = [path for path, count in split_counts.items() if count > 1]
    if overlap:
        print(f"warning: {counted(len(overlap), 'video')} in two splits, first {printable(overlap[0])}")


def next_command(outcomes: dict[str, Outcome], output: Path) -> str:
    """What to do next, with the commands that train on the converted data."""
    if not (output / "train").is_dir():
        hint = "its file name contains `train`, or pass --split train"
        return f"next: convert the training list into {printable(output)} too ({hint})"

    # with labels and captions both are possible; a classifier is the cheaper first run
    samples = [s for o in outcomes.values() for s in o.samples.values()]
    backbone = "--vision_model vjepa2 --weights hub --freeze_visionbackbone True"
    classify = f"python main.py --data_dir {printable(output)} {backbone}"
    caption = f"{classify} --use_vlm True --captioning True --use_lora_llm True"
    if not all(s.captions for s in samples):
        return f"next: {classify}"
    return (
        f"next: {classify}\nor, for captions: {caption}" if all(any(s.classes) for s in samples) else f"next: {caption}"
    )


@script
def main(argv: list[str] | None = None) -> int:
    """Converts the annotation files. Writes nothing before every row has been checked. Returns the exit status."""
    # mistakes in the command line first, before the slow search for videos
    args = parse_args(argv)
    if not 0 <= args.num_workers <= MAX_WORKERS:
        raise UserError(f"--num_workers must be from 0 to {MAX_WORKERS}, not {args.num_workers}")
    for file in args.annotations + ([args.class_names] if args.class_names else []):
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    if not args.videos.is_dir():
        raise UserError(f"--videos: no such folder: {args.videos}")
    try:
        names = read_class_names(args.class_names) if args.class_names else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--class_names {args.class_names}: {error}") from None

    # annotations to samples
    index = VideoIndex(args.videos)
    rows = (row for file in args.annotations for row in parse_file(args.format, file, args.split))
    outcomes = sort_rows(rows, index, names, args.output, args.multi_label == "True")
    check_outcomes(outcomes, index)

    # only the splits of this call are replaced: train and test lists may be converted one after the other
    existing = [file for split in outcomes if (file := args.output / split / "metadata.jsonl").exists()]
    if existing and not args.overwrite:
        raise UserError(f"{existing[0]} exists: add --overwrite to replace it")
    for folder, images in {f: i for o in outcomes.values() for f, i in o.links.items()}.items():
        link_images(folder, images)
    if not args.no_scan:
        drop_unreadable(outcomes, args.num_workers)
    write_rows(outcomes, args.output)
    report(outcomes, args.output)
    print(f"wrote {', '.join(printable(args.output / s / 'metadata.jsonl') for s in SPLITS if s in outcomes)}")
    print(next_command(outcomes, args.output))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line. The help of each format is the first line of its generator's docstring."""
    # formats first: the epilog lists them, and a new entry in FORMATS documents itself
    about = "\n".join(f"  {name:<9} {(f.__doc__ or '').splitlines()[0]}" for name, f in FORMATS.items())
    parser = Parser(
        prog="convert_dataset.py",
        description="Convert annotation files to metadata.jsonl. Videos are referenced, not copied.",
        epilog=f"formats:\n{about}\n\nA row's split: its own, else --split, else the one in the file name, else train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the annotation files, see below")
    parser.add_argument(
        "--annotations", required=True, type=Path, nargs="+", metavar="FILE", help="one or more annotation files"
    )
    parser.add_argument(
        "--videos", required=True, type=Path, metavar="DIR", help="folder of the videos, searched recursively"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="data folder to write, for main.py --data_dir"
    )
    parser.add_argument(
        "--class_names",
        type=Path,
        metavar="FILE",
        help="class names for numeric labels: `3 jumping` lines, one name per line, or json {name: number}",
    )
    parser.add_argument("--split", choices=SPLITS, help="split of all rows that do not name one")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that check the videos (default: 2)")
    parser.add_argument(
        "--no_scan", action="store_true", help="do not check that the videos can be read; training checks it anyway"
    )
    parser.add_argument(
        "--multi_label",
        choices=("True", "False"),
        default="False",
        help="True: several rows of one video with different labels become its `labels`, instead of being refused",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing metadata.jsonl files in --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
