"""Annotation files as people have them, to metadata.jsonl; the videos stay where they are, rows lead to them.

    python convert_dataset.py --format ucf101 --annotations trainlist01.txt testlist01.txt --videos UCF-101 --output data

One generator per format turns a file into rows; one writer finds the videos, leaves out what is missing,
unreadable or refused, names all of that in <output>/<split>/conversion.json, and prints the counts.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from script import Parser, UserError, make_folder, printable, replace_file, run_script, shown

if TYPE_CHECKING:
    from VLoader import Sample

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
SHOWN = 5  # names of missing, unreadable and refused videos that are printed
SHOWN_CLASSES = 40
MOST_WORKERS = 256
LONGEST = 200  # characters of a name that are printed
REPORT = "conversion.json"


@dataclass(frozen=True)
class Row:
    """What one line of an annotation file says of one video."""

    video: str  # a path, or a file's name without suffix
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    split: str | None = None  # None: the file's name tells
    frames: tuple[int, int] | None = None  # numbers of the first and the last image of a folder of frames
    problem: str = ""  # why the row cannot be taken
    unused: bool = False  # the list itself says that this split does without it

    def __post_init__(self) -> None:
        texts = [text for text in (self.video, self.label, *self.captions, self.text) if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names, labels and captions must be texts")


# -- one generator per format -----------------------------------------------------------------------


def read_text(file: Path) -> str:
    """UTF-8, or what a byte order mark says, else cp1252. Raises UserError if it cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def plain_text(file: Path) -> str:
    """The text of a format that is no JSON. Raises ValueError if the file is."""
    if file.suffix.lower() in (".json", ".jsonl"):
        raise ValueError("it is JSON, where lines of text are expected")
    return read_text(file)


def lines_of(file: Path) -> Iterator[str]:
    """The lines that hold something. They end at line feeds alone: a caption may hold any other separator."""
    return (line.strip() for line in plain_text(file).split("\n") if line.strip())


def cells_of(file: Path, separator: str = ",") -> list[list[str]]:
    """The rows of a csv file, without empty lines; quoted cells may hold line breaks. Raises ValueError."""
    reader = csv.reader(io.StringIO(plain_text(file), newline=""), delimiter=separator, strict=True)
    try:
        return [[cell.strip() for cell in row] for row in reader if len(row) > 1 or "".join(row).strip()]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def table_of(cells: list[list[str]]) -> Iterator[dict[str, str]]:
    """A table's rows by its first line's titles. Raises ValueError for a row of more cells than titles."""
    titles = cells[0] if cells else []
    for row in cells[1:]:
        if any(row[len(titles) :]):
            raise ValueError(
                f"{len(row)} cells under {len(titles)} titles: {shown(', '.join(row))}; put quotes around cells that hold commas"
            )
        yield dict(zip(titles, row + [""] * (len(titles) - len(row)), strict=False))


def split_facts(word: str) -> dict[str, str | None]:
    """The split of a row that names one, and what is wrong with it, as arguments of Row."""
    split = split_of(word)
    return {"split": split, "problem": f"unknown split {word}" if word and split is None else ""}


PATH_TITLES = ("file_name", "filename", "path", "video_path", "video", "file", "video_name", "clip", "video_id", "name")
LABEL_TITLES = ("label", "class", "category", "class_name", "action", "target")
CAPTION_TITLES = ("caption", "sentence", "description")


def list_rows(file: Path) -> Iterator[Row]:
    """`path label`, separated by tab, comma or spaces; or a table with a line of titles such as
    path, label, caption, text, split."""
    first = next(lines_of(file), "")
    separator = "\t" if "\t" in first else "," if "," in first else None
    cells = cells_of(file, separator) if separator else [split_at_path(line) for line in lines_of(file)]
    titles = [cell.lower() for cell in cells[0]] if cells else []
    if separator and any(title in PATH_TITLES for title in titles):
        yield from table_rows(table_of([titles, *cells[1:]]))
        return
    for row in cells:
        if len(row) == 2 and row[1]:
            yield Row(row[0], label=row[1])
        elif not any(row[1:]):
            yield Row(row[0], problem="no label")
        else:
            yield Row(row[0], problem=f"several labels ({', '.join(row[1:])}); frame lists are --format frames")


def split_at_path(line: str) -> list[str]:
    """`a path.mp4 jumping jack` -> [path, label]; without a video's suffix the path ends at the first space.
    Several numbers behind the path stay apart."""
    found = re.match(r"(.*?\.(?:mp4|avi|mkv|webm|mov|gif|m4v|mpe?g|wmv|flv|3gp|ogv|pt))\s+(.*)", line, re.IGNORECASE)
    path, rest = found.groups() if found else [*line.split(maxsplit=1), ""][:2]
    numbers = rest.split()
    return [path, *numbers] if all(n.lstrip("-").isdigit() for n in numbers) else [path, rest]


def table_rows(rows: Iterator[dict[str, str]]) -> Iterator[Row]:
    def cell(row: dict[str, str], titles: tuple[str, ...]) -> str | None:
        return next((row[t] for t in titles if row.get(t)), None)

    for row in rows:
        caption = cell(row, CAPTION_TITLES)
        yield Row(
            cell(row, PATH_TITLES) or "",
            label=cell(row, LABEL_TITLES),
            captions=(caption,) if caption else (),
            text=cell(row, ("text",)),
            **split_facts(cell(row, ("split", "subset")) or ""),
        )


def ucf101_rows(file: Path) -> Iterator[Row]:
    """`Class/v_Class_g01_c01.avi 1` in training lists, without the number in test lists."""
    for line in lines_of(file):
        name = re.sub(r"\s+\d+$", "", line)
        yield Row(name, label=PurePosixPath(name).parent.name or None)


def hmdb51_rows(file: Path) -> Iterator[Row]:
    """<class>_test_split<n>.txt: `video.avi 1`; 1 trains, 2 tests, 0 is not used in this split."""
    label, found, _ = file.stem.partition("_test_split")
    if not found:
        raise UserError(f"{file}: HMDB51's lists are named <class>_test_split<n>.txt; name those of one split")
    for line in lines_of(file):
        name, number = line.rsplit(maxsplit=1)
        split = {"0": "train", "1": "train", "2": "test"}[number]
        yield Row(f"{label}/{name}", label=label, split=split, unused=number == "0")


def kinetics_rows(file: Path) -> Iterator[Row]:
    """Lines under label, youtube_id, time_start, time_end, split; files <id>_<start>_<end>, six digits each."""
    for row in table_of(cells_of(file)):
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        yield Row(name, label=row.get("label") or None, **split_facts(row.get("split", "")))


def ssv2_rows(file: Path) -> Iterator[Row]:
    """[{"id", "label", "template"}]: the class is the template without brackets, the label its caption."""
    for row in json.loads(read_text(file)):
        if "template" not in row:
            yield Row(str(row["id"]), problem="no template (the published test list has none)")
            continue
        label = row["template"].replace("[", "").replace("]", "")
        yield Row(str(row["id"]), label=label, captions=(row["label"],) if row.get("label") else ())


def msrvtt_rows(file: Path) -> Iterator[Row]:
    """videodatainfo: `videos` with their splits, `sentences` with their captions."""
    values = json.loads(read_text(file))
    captions: dict[str, list[str]] = {}
    for sentence in values["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"].strip())
    for video in values["videos"]:
        mine = tuple(filter(None, captions.pop(video["video_id"], [])))
        yield Row(video["video_id"], captions=mine, **split_facts(video["split"]))
    for name in captions:
        yield Row(name, problem="it has sentences, but does not stand in `videos`")


def msvd_rows(file: Path) -> Iterator[Row]:
    """`<id>_<start>_<end> a caption` lines (those that begin with # are comments), or the corpus's csv (VideoID, Start,
    End, Language, Description), of which the English ones count."""
    captions: dict[str, list[str]] = {}
    if file.suffix.lower() == ".csv":
        for row in table_of(cells_of(file)):
            mine = captions.setdefault(f"{row['VideoID']}_{row['Start']}_{row['End']}", [])
            mine += [row["Description"]] if row["Language"] == "English" else []
    else:
        for line in lines_of(file):
            name, _, caption = line.partition(" ")
            if not name.startswith("#"):
                captions.setdefault(name, []).append(caption.strip())
    for name, mine in captions.items():
        yield Row(name, captions=tuple(filter(None, mine)))


def vatex_rows(file: Path) -> Iterator[Row]:
    """`<id>|caption|caption ...` lines, or the published json ([{"videoID", "enCap"}])."""
    if file.suffix.lower() == ".json":
        rows = ((row["videoID"], row.get("enCap", [])) for row in json.loads(read_text(file)))
    else:
        rows = ((name, rest.split("|")) for name, _, rest in (line.partition("|") for line in lines_of(file)))
    for name, captions in rows:
        mine = tuple(re.sub("[ \t]+", " ", c).strip() for c in captions if c.strip())
        yield Row(name.strip(), captions=mine)


def frames_rows(file: Path) -> Iterator[Row]:
    """`folder start end label` with the numbers of the first and last image, or `folder count label`."""
    for line in lines_of(file):
        found = re.fullmatch(r"(.+?)\s+(\d+)\s+(\d+)\s+(\S+)", line)
        if found:
            folder, start, end, label = found.groups()
            yield Row(folder, label=label, frames=(int(start), int(end)))
            continue
        found = re.fullmatch(r"(.+?)\s+(\d+)\s+(\S+)", line)
        if found is None:
            yield Row(line, problem="expected `folder start end label` or `folder count label`")
            continue
        yield Row(found[1], label=found[3])


def chat_rows(file: Path) -> Iterator[Row]:
    """[{"messages": [user, assistant], "videos": [path]}]: the question becomes the text, the answer the caption."""
    for row in json.loads(read_text(file)):
        name = str(row["videos"][0]) if row.get("videos") else "(none)"
        turns = [m for m in row["messages"] if m["role"] != "system"]
        if [m["role"] for m in turns] != ["user", "assistant"]:
            yield Row(name, problem="more or less than one question and one answer")
        elif len(row.get("videos", ())) != 1:
            yield Row(name, problem=f"{len(row.get('videos', ()))} videos in one conversation")
        else:
            question, answer = (m["content"].replace("<video>", "").strip() for m in turns)
            yield Row(name, captions=(answer,), text=question or None, problem="" if answer else "no answer")


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
    """The split that a word or a file's name speaks of; None if it speaks of none, or of several."""
    words = re.findall(r"(?<![a-z])(train(?:ing)?|val(?:id(?:ate|ation)?)?|dev|test(?:ing)?)(?![a-km-z])", name.lower())
    found = {SPLIT_WORDS[word] for word in words}
    return found.pop() if len(found) == 1 else None


def read_class_names(file: Path) -> dict[str, str]:
    """{number: name} of a list of classes: `3 jumping` lines, or one name a line (from 0), or {"jumping": 3}."""
    if file.suffix.lower() == ".json":
        values = json.loads(read_text(file))
        if not isinstance(values, dict) or not all(re.fullmatch(r"\d+", str(number)) for number in values.values()):
            raise ValueError('expected {"jumping": 3, ...}')
        pairs = [(str(number), name) for name, number in values.items()]
    else:
        lines = list(lines_of(file))
        numbered = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
        whole = lines and all(numbered)
        pairs = [found.groups() for found in numbered] if whole else [(str(i), line) for i, line in enumerate(lines)]
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a number stands twice")
    return names


def several_labels(label: str | None) -> str:
    """What is wrong with a label that names several classes: `3,17`, `a;b`, `a|b`, `[1, 2]`; else ""."""
    if label and re.fullmatch(r".*[|;].*|\[.*\]|\d+(?:[,\s]+\d+)+", label, re.DOTALL):
        return f"several labels ({label}); one video has one"
    return ""


def parse_file(name: str, file: Path, default_split: str | None) -> Iterator[Row]:
    """A file's rows, each with a split. Raises UserError if the file is not of this format."""
    split = default_split or split_of(file.stem) or "train"
    try:
        for row in FORMATS[name](file):
            yield row if row.split else replace(row, split=split)
    except RecursionError:
        raise UserError(f"{file} is not of --format {name}: it is nested too deep") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{file} is not of --format {name}: {what}") from None


# -- where the videos are ---------------------------------------------------------------------------


class VideoIndex:
    """All videos below a folder, by path and by name."""

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
        """A path's parts, the last one without a video's suffix."""
        from readers import VIDEO_SUFFIXES

        path = PurePosixPath(name.replace("\\", "/"))
        plain = path.with_suffix("") if path.suffix.lower() in {*VIDEO_SUFFIXES, ".pt"} else path
        return tuple(p for p in plain.parts if p not in (".", "/"))

    def find(self, name: str) -> tuple[Path | None, str]:
        """(the video, what is wrong): the file of that name whose folders agree as far as both name them."""
        parts = self.parts(name)
        close = [
            (have, path)
            for have, path in self.by_name.get(parts[-1] if parts else "", [])
            if all(a == b for a, b in zip(reversed(have), reversed(parts), strict=False))
        ]
        exact = [path for have, path in close if have == parts]
        found = exact or [path for _, path in close]
        same = [path for path in found if path.name == PurePosixPath(name.replace("\\", "/")).name]
        found = same or found
        if len(found) > 1:
            return None, f"{len(found)} files are of this name: {found[0]}, {found[1]}"
        return (found[0], "") if found else (None, "")


def images_between(folder: Path, frames: tuple[int, int]) -> tuple[list[Path], bool]:
    """(the images whose numbers lie between, whether these are all of the folder)."""
    from readers import list_images

    def number(path: Path) -> int:
        digits = re.findall(r"\d+", path.stem)
        return int(digits[-1]) if digits else -1

    images = list_images(folder) if folder.is_dir() else []
    chosen = [image for image in images if frames[0] <= number(image) <= frames[1]]
    return chosen, len(chosen) == len(images)


def link_images(folder: Path, images: list[Path]) -> None:
    """A folder of links to these images, and no others."""
    make_folder(folder)
    try:
        for old in folder.iterdir():
            if old.is_symlink():
                old.unlink()
        for image in images:
            (folder / image.name).symlink_to(image.resolve())
    except OSError as error:
        raise UserError(f"cannot link {images[0]} in {folder}: {error.strerror}") from None


# -- the writer -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one split's rows."""

    rows: int = 0
    found: int = 0
    unused: int = 0
    captions: int = 0
    samples: dict[Path, "Sample"] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wanted: Counter = field(default_factory=Counter)  # rows of each class
    links: dict[Path, list[Path]] = field(default_factory=dict)  # folders to make, of links to images


def sort_rows(rows: Iterator[Row], index: VideoIndex, names: dict[str, str], output: Path) -> dict[str, Outcome]:
    """Every row found, missing, refused or unused, by split; rows of one video join."""
    outcomes: dict[str, Outcome] = {}
    groups: dict[tuple[str, Path], list[Row]] = {}
    for row in rows:
        outcome = outcomes.setdefault(row.split, Outcome())
        outcome.rows += 1
        if row.unused:
            outcome.unused += 1
            continue
        problem = problem_of(row, names)
        row = replace(row, label=names.get(row.label, row.label))
        outcome.wanted[row.label] += 1
        path, problem = (None, problem) if problem else find_row(row, index, output, outcome)
        if problem:
            outcome.refused.append(f"{row.video}: {problem}")
        elif path is None:
            outcome.missing.append(row.video)
        else:
            groups.setdefault((row.split, path), []).append(row)
    for (split, path), group in groups.items():
        join_rows(group, path, outcomes[split])
    return outcomes


def problem_of(row: Row, names: dict[str, str]) -> str:
    """Why the row cannot be taken, wherever its video lies; else ""."""
    if row.problem:
        return row.problem
    if not row.video.strip():
        return "no video is named"
    if not row.label and not row.captions:
        return "neither label nor caption"
    if row.label and row.label.isdecimal() and names and row.label not in names:
        return f"--class_names has no number {row.label}"
    return several_labels(row.label)


def find_row(row: Row, index: VideoIndex, output: Path, outcome: Outcome) -> tuple[Path | None, str]:
    """(the row's video, what is wrong); for a part of a folder of frames a folder of links, to be made."""
    path, problem = index.find(row.video)
    if path is None or row.frames is None:
        return path, problem
    images, whole = images_between(path, row.frames)
    first, last = row.frames
    if not images:
        return None, f"{path} has no images with numbers from {first} to {last}"
    if whole:
        return path, ""
    links = output / "frames" / path.relative_to(index.folder).parent / f"{path.name}_{first}_{last}"
    outcome.links[links] = images
    return links, ""


def join_rows(group: list[Row], path: Path, outcome: Outcome) -> None:
    """One sample of all rows of one video: captions add up; labels must agree, and texts."""
    from VLoader import Sample

    labels = dict.fromkeys(row.label for row in group if row.label)
    if len(labels) > 1:
        problem = f"several labels ({', '.join(labels)}); one video has one"
        outcome.refused += [f"{row.video}: {problem}" for row in group]
        return
    text = next((row.text for row in group if row.text is not None), None)
    taken = [row for row in group if row.text in (None, text)]
    outcome.refused += [f"{row.video}: another text than its first row has" for row in group if row not in taken]
    outcome.found += len(taken)
    captions = tuple(caption for row in taken for caption in row.captions)
    outcome.samples[path] = Sample(path, next(iter(labels), None), captions, text)


def drop_unreadable(outcomes: dict[str, Outcome], workers: int) -> None:
    """Opens every video and decodes its first and last frame, as main.py's scan does."""
    from scan import scan_videos

    jobs = {path: 0 for outcome in outcomes.values() for path in outcome.samples}
    bad, _ = scan_videos(jobs, num_frames=8, stride=0, num_workers=workers, known={})
    for outcome in outcomes.values():
        outcome.unreadable += [bad[path] for path in outcome.samples if path in bad]
        outcome.samples = {path: s for path, s in outcome.samples.items() if path not in bad}


def write_rows(outcomes: dict[str, Outcome], output: Path) -> None:
    """<output>/<split>/metadata.jsonl, with file names relative to that folder."""
    for split, outcome in outcomes.items():
        folder = output / split
        make_folder(folder)
        lines = []
        for path, sample in outcome.samples.items():
            outcome.captions += len(sample.captions)
            place = path.parent.resolve() / path.name  # `..` behind a linked folder would lead elsewhere
            name = Path(os.path.relpath(place, folder.resolve())).as_posix()
            row = {"file_name": name, "label": sample.label, "caption": list(sample.captions), "text": sample.text}
            lines.append(json.dumps({k: v for k, v in row.items() if v not in (None, [])}) + "\n")
        text = "".join(lines)
        replace_file(folder / "metadata.jsonl", lambda p, text=text: p.write_text(text, encoding="utf-8"))


def report(outcomes: dict[str, Outcome], output: Path) -> dict[str, Any]:
    """Prints the counts and writes <split>/conversion.json, which names every video that was left out."""
    from script import write_json

    counts, print_width = {}, 11
    titles = ("rows", "found", "missing", "refused", "unused", "unreadable", "videos", "classes", "captions")
    print(f"{'split':<7}" + "".join(f"{t:>{print_width}}" for t in titles))
    for split in (s for s in SPLITS if s in outcomes):
        outcome = outcomes[split]
        kept = Counter(s.label for s in outcome.samples.values())
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
        classes = {
            str(c): {"rows": n, "videos": kept[c]} for c, n in sorted(outcome.wanted.items(), key=str) if c is not None
        }
        counts[split] = dict(zip(titles, values, strict=True)) | {"classes": classes} | lists
        write_json(counts[split], output / split / REPORT)
    print_classes({split: values["classes"] for split, values in counts.items()})
    for name in ("missing", "unreadable", "refused"):
        named = [text for values in counts.values() for text in values[name]]
        more = f" and {len(named) - SHOWN} more, all in {REPORT}" if len(named) > SHOWN else ""
        if named:
            print(f"{name}: {'; '.join(map(brief, named[:SHOWN]))}{more}")
    return counts


def brief(name: str) -> str:
    """A name as the terminal shows it."""
    return printable(name)[:LONGEST]


def print_classes(counts: dict[str, dict[str, dict[str, int]]]) -> None:
    """Videos / rows of every class in every split."""
    names = sorted({name for classes in counts.values() for name in classes})
    for number, name in enumerate(names):
        if number == SHOWN_CLASSES:
            print(f"  and {len(names) - SHOWN_CLASSES} more classes, in {REPORT}")
            break
        parts = (f"{s} {c[name]['videos']} of {c[name]['rows']}" for s, c in counts.items() if name in c)
        print(f"  {brief(name)}: {', '.join(parts)}")


def check_outcomes(outcomes: dict[str, Outcome], index: VideoIndex) -> None:
    """Raises UserError if nothing could be taken; warns of videos that stand in two splits."""
    if not outcomes:
        raise UserError("the annotations hold no rows")
    if not any(o.samples for o in outcomes.values()):
        refused = [text for o in outcomes.values() for text in o.refused]
        missing = [name for o in outcomes.values() for name in o.missing]
        causes = [f"{len(refused)} refused, first {refused[0]}"] if refused else []
        have = (
            f"; it holds {len(index.videos)} videos, first {index.videos[0]}"
            if index.videos
            else "; it holds no videos"
        )
        causes += [f"{len(missing)} not found in {index.folder}, first {missing[0]}{have}"] if missing else []
        raise UserError(f"no row could be converted: {'; '.join(causes)}")
    places = Counter(path for o in outcomes.values() for path in o.samples)
    twice = [path for path, count in places.items() if count > 1]
    if twice:
        print(f"warning: {len(twice)} videos stand in two splits, first {printable(twice[0])}")


def next_command(outcomes: dict[str, Outcome], output: Path) -> str:
    if not (output / "train").is_dir():
        return f"next: convert the training list into {printable(output)} as well (its name, or --split train, says which it is)"
    captions = all(s.captions and s.label is None for o in outcomes.values() for s in o.samples.values())
    task = " --use_vlm True --captioning True --freeze_visionbackbone True --use_lora_llm True" if captions else ""
    return f"next: python main.py --data_dir {printable(output)} --weights hub{task}"


def run(argv: list[str] | None) -> int:
    args = parse_args(argv)
    if not 0 <= args.num_workers <= MOST_WORKERS:
        raise UserError(f"--num_workers must be from 0 to {MOST_WORKERS}, not {args.num_workers}")
    for file in args.annotations + ([args.class_names] if args.class_names else []):
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    if not args.videos.is_dir():
        raise UserError(f"--videos: no such folder: {args.videos}")
    try:
        names = read_class_names(args.class_names) if args.class_names else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--class_names {args.class_names}: {error}") from None
    index = VideoIndex(args.videos)
    rows = (row for file in args.annotations for row in parse_file(args.format, file, args.split))
    outcomes = sort_rows(rows, index, names, args.output)
    check_outcomes(outcomes, index)
    there = [file for split in outcomes if (file := args.output / split / "metadata.jsonl").exists()]
    if there and not args.overwrite:
        raise UserError(f"{there[0]} exists: add --overwrite to replace it")
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
    about = "\n".join(f"  {name:<9} {(f.__doc__ or '').splitlines()[0]}" for name, f in FORMATS.items())
    parser = Parser(
        prog="convert_dataset.py",
        description="Make metadata.jsonl files from annotation files; videos are linked, not copied.",
        epilog=f"formats:\n{about}\n\nA row's split is its own, or --split, or what its file's name speaks of, or train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="what the annotation files are; see below")
    parser.add_argument(
        "--annotations", required=True, type=Path, nargs="+", metavar="FILE", help="one or more annotation files"
    )
    parser.add_argument(
        "--videos", required=True, type=Path, metavar="DIR", help="folder that the videos lie in, at any depth"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="data folder to write: --data_dir of main.py"
    )
    parser.add_argument(
        "--class_names",
        type=Path,
        metavar="FILE",
        help="names of numbered classes: `3 jumping` lines, one name a line, or json {name: number}",
    )
    parser.add_argument("--split", choices=SPLITS, help="split of rows that do not name theirs")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that try the videos (default: 2)")
    parser.add_argument(
        "--no_scan", action="store_true", help="do not try whether the videos can be read; training does"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace metadata.jsonl files that lie in --output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())
