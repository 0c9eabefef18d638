"""Convert the annotation files of public datasets to metadata.jsonl. Videos are referenced, never copied.

    python convert_dataset.py --format ucf101 --annotations trainlist01.txt testlist01.txt --videos UCF-101 --output out

extras/annotations.py turns a file into rows. Here, the video of every row is found; missing, unreadable and refused
ones are dropped and listed in <output>/<split>/conversion.json; and the counts are printed. With --answers it goes the
other way: the answers of inference.py become tasks for Label Studio.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from extras.annotations import FORMATS, SPLITS, Row, label_problem, label_studio_tasks, parse_file, read_class_names
from script import Parser, UserError, counted, make_folder, printable, replace_file, script, write_json

if TYPE_CHECKING:
    from VLoader import Key, Sample

PRINTED_NAMES = 5  # of missing, unreadable and refused videos; conversion.json has all of them
PRINTED_CLASSES = 40
PRINTED_LENGTH = 200  # characters of a name
MAX_WORKERS = 256
REPORT = "conversion.json"


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
        from readers import FILE_SUFFIXES

        path = PurePosixPath(name.replace("\\", "/"))
        plain = path.with_suffix("") if path.suffix.lower() in FILE_SUFFIXES else path
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
        exact = [path for path_parts, path in candidates if path_parts == parts or path.as_posix() == name]
        matches = exact or [path for _, path in candidates]
        same_suffix = [path for path in matches if path.name == PurePosixPath(name.replace("\\", "/")).name]
        matches = same_suffix or matches
        if len(matches) > 1:
            return None, f"{len(matches)} files have this name: {matches[0]}, {matches[1]}"
        return (matches[0] if matches else None), ""


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
    if row.label and names and row.label not in names and re.fullmatch(r"\d+(\.0*)?|c\d{3}", row.label):
        return f"--class_names has no class {row.label}"
    return label_problem(row.label)


def find_row(row: Row, index: VideoIndex, output: Path, outcome: Outcome) -> tuple[Path | None, str]:
    """(the video or None, the problem or ""). For a part of a frame folder the video is a folder of links,
    which is noted in outcome.links and made later."""
    path, problem = index.find(row.video)
    if path is None and not problem and row.other_name:
        path, problem = index.find(row.other_name)
    if path is None or row.frames is None:
        return path, problem
    images, complete = images_between(path, row.frames)
    first, last = row.frames
    if not images:
        return None, f"{path} has no images numbered from {first} to {last}"
    if complete:
        return path, ""  # the folder itself will do: no links needed
    links = output / "frames" / path.relative_to(index.folder).parent / f"{path.name}_{first}_{last}"
    outcome.links[links] = images
    return links, ""


def join_rows(group: list[Row], path: Path, outcome: Outcome, multi_label: bool) -> None:
    """Merges the rows of one video or segment into one sample: captions add up; groups and texts must agree, and so
    must labels, unless with `multi_label` or in a format of overlapping segments."""
    from readers import Segment
    from VLoader import Sample

    labels, recordings = (dict.fromkeys(filter(None, (getattr(row, n) for row in group))) for n in ("label", "group"))
    may_differ = multi_label or group[0].may_overlap
    for noun, values in (("labels", () if may_differ else labels), ("groups", recordings)):
        if len(values) > 1:
            problem = f"several {noun} ({', '.join(values)}); a video can have only one"
            problem += " without --multi_label True" if noun == "labels" else ""
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
    if len(labels) > 1 or (multi_label and labels):
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
        lines, root = [], folder.resolve()

        # relative names keep working when the data and the output move together
        for sample in outcome.samples.values():
            outcome.captions += len(sample.captions)
            # resolved, because `..` after a symlinked folder would lead elsewhere
            target = sample.path.parent.resolve() / sample.path.name
            name = Path(os.path.relpath(target, root)).as_posix()
            row = {"file_name": name, "label": sample.label, "caption": list(sample.captions), "text": sample.text}
            row |= {"labels": sample.labels, "group": sample.group}
            row |= sample.segment._asdict() if sample.segment else {}
            lines.append(json.dumps({k: v for k, v in row.items() if v not in (None, [])}) + "\n")
        text = "".join(lines)
        replace_file(folder / "metadata.jsonl", lambda p, text=text: p.write_text(text, encoding="utf-8"))


def report(outcomes: dict[str, Outcome], output: Path) -> None:
    """Prints the counts and writes <split>/conversion.json, which names every video that was left out."""
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

    # overlaps may be mistakes, or several things at once: only the user knows
    overlapping, segments = (sum(counts) for counts in zip(*map(count_overlaps, outcomes.values()), strict=True))
    if overlapping:
        count = f"{overlapping:,} of {segments:,} segments have a moment with another label"
        print(f"overlaps: {count}; main.py takes them with --multi_label True")

    # a few names are enough to see a wrong --videos folder; a long list would bury the table above
    for name in ("missing", "unreadable", "refused"):
        videos = [text for values in counts.values() for text in values[name]]
        more = f" and {len(videos) - PRINTED_NAMES} more, all in {REPORT}" if len(videos) > PRINTED_NAMES else ""
        if videos:
            print(f"{name}: {'; '.join(map(brief, videos[:PRINTED_NAMES]))}{more}")


def count_overlaps(outcome: Outcome) -> tuple[int, int]:
    """(segments that overlap one with another label, or have several themselves; all segments)."""
    from extras.segments import ROUNDING, by_video, times_of

    videos = by_video(outcome.samples.values())
    found = set()
    for samples in videos.values():
        found |= {sample.key for sample in samples if len(sample.classes) > 1}
        ordered = sorted(samples, key=times_of)
        for number, sample in enumerate(ordered):
            end = times_of(sample)[1] - ROUNDING
            later = takewhile(lambda other, end=end: times_of(other)[0] < end, ordered[number + 1 :])
            found |= {key for other in later if other.classes != sample.classes for key in (sample.key, other.key)}
    return len(found & outcome.samples.keys()), sum(map(len, videos.values()))


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

    # the first of each kind usually shows the mistake: a wrong folder, a wrong column, a wrong suffix
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
    classify = f"python main.py --data_dir {shlex.quote(printable(output))} {backbone}"
    caption = f"{classify} --use_vlm True --captioning True --use_lora_llm True"
    if not all(s.captions for s in samples):
        return f"next: {classify}"
    if not all(any(s.classes) for s in samples):
        return f"next: {caption}"
    return f"next: {classify}\nor, for captions: {caption}"


# -- the script -------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot be used."""
    if not 0 <= args.num_workers <= MAX_WORKERS:
        raise UserError(f"--num_workers must be from 0 to {MAX_WORKERS}, not {args.num_workers}")
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise UserError(f"--fps must be above 0, not {args.fps:g}")
    for name in ("fps", "answers"):
        if getattr(args, name) is not None and args.format != "label_studio":
            raise UserError(f"--{name} works with --format label_studio only")
    for file in [*(args.annotations or [args.answers]), *([args.class_names] if args.class_names else [])]:
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    if not args.videos.is_dir():
        raise UserError(f"--videos: no such folder: {args.videos}")


def write_tasks(args: argparse.Namespace) -> int:
    """Writes the tasks for Label Studio with the answers in --answers as predictions. Returns the exit status."""
    from extras.segments import read_json_rows

    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists: add --overwrite to replace it")
    answers = read_json_rows(args.answers)
    try:
        tasks = label_studio_tasks(answers, args.videos, args.fps, args.tag)
    except (KeyError, TypeError, ValueError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{args.answers} was not written by inference.py --output: {cause}") from None
    if not tasks:
        raise UserError(f"{args.answers} has neither labels nor captions")
    write_json(tasks, args.output)
    count = sum(len(prediction["result"]) for task in tasks for prediction in task["predictions"])
    print(printable(f"wrote {args.output}: {counted(len(tasks), 'task')} with {counted(count, 'answer')}"))
    return 0


def format_table() -> str:
    """The formats, each with the first paragraph of its generator's docstring."""
    lines = {name: " ".join((f.__doc__ or "").split("\n\n")[0].split()) for name, f in FORMATS.items()}
    return "\n".join(f"  {name:<12} {line}" for name, line in lines.items())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(
        prog="convert_dataset.py",
        description="Convert annotation files to metadata.jsonl. Videos are referenced, not copied. Or convert answers of "
        "inference.py to tasks for Label Studio.",
        epilog=f"formats:\n{format_table()}\n\nA row's split: its own, else --split, else the one in the file name, else train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--format", required=True, choices=FORMATS, help="format of the annotation files, see below")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", type=Path, nargs="+", metavar="FILE", help="one or more annotation files")
    source.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="with --format label_studio: a file of inference.py --output, to be written to --output as tasks with "
        "predictions. Label Studio finds the videos if the parent of --videos is its LOCAL_FILES_DOCUMENT_ROOT",
    )
    add("--videos", required=True, type=Path, metavar="DIR", help="folder of the videos, searched recursively")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="PATH",
        help="data folder to write, for main.py --data_dir; with --answers a file",
    )
    add(
        "--class_names",
        type=Path,
        metavar="FILE",
        help="class names for numeric labels: `3 jumping` lines, one name per line, or json {name: number}",
    )
    add(
        "--fps",
        type=float,
        metavar="N",
        help="frameRate of Label Studio's <Video> tag, because timeline labels have frame numbers (default: each task's "
        "`fps`)",
    )
    add(
        "--tag",
        default="label",
        metavar="NAME",
        help="with --answers: name of the <Choices>, <TimelineLabels> or <TextArea> tag (default: label)",
    )
    add("--split", choices=SPLITS, help="split of all rows that do not name one")
    add("--num_workers", type=int, default=2, help="processes that check the videos (default: 2)")
    add("--no_scan", action="store_true", help="do not check that the videos can be read; training checks it anyway")
    add(
        "--multi_label",
        choices=("True", "False"),
        default="False",
        help="True: several rows of one video with different labels become its `labels`, instead of being refused",
    )
    add("--overwrite", action="store_true", help="replace existing metadata.jsonl files in --output")
    return parser.parse_args(argv)


@script
def main(argv: list[str] | None = None) -> int:
    """Converts the annotation files. Writes nothing before every row has been checked. Returns the exit status."""
    # mistakes in the command line first, before the slow search for videos
    args = parse_args(argv)
    check_args(args)
    if args.answers:
        return write_tasks(args)
    try:
        names = read_class_names(args.class_names) if args.class_names else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--class_names {args.class_names}: {error}") from None

    # annotations to samples
    index = VideoIndex(args.videos)
    rows = (row for file in args.annotations for row in parse_file(args.format, file, args.split, args.fps))
    outcomes = sort_rows(rows, index, names, args.output, args.multi_label == "True")
    check_outcomes(outcomes, index)

    # only the splits of this call are replaced: train and test lists may be converted one after the other
    existing = [file for split in outcomes if (file := args.output / split / "metadata.jsonl").exists()]
    if existing and not args.overwrite:
        raise UserError(f"{existing[0]} exists: add --overwrite to replace it")
    for outcome in outcomes.values():
        for folder, images in outcome.links.items():
            link_images(folder, images)
    if not args.no_scan:
        drop_unreadable(outcomes, args.num_workers)
    write_rows(outcomes, args.output)
    report(outcomes, args.output)
    print(f"wrote {', '.join(printable(args.output / s / 'metadata.jsonl') for s in SPLITS if s in outcomes)}")
    print(next_command(outcomes, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
