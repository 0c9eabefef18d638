"""Saves test videos of a dataset as folders of frames, to try inference.py on.

python create_dummy.py         # frames_see/class_0_video_0/frame_000.png ..., frames_see/metadata.jsonl
"""

import argparse
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from script import Parser, UserError, counted, make_folder, printable, script

if TYPE_CHECKING:
    from VLoader import Sample

CHUNK = 32  # frames in memory at a time


@script
def main(argv: list[str] | None = None) -> int:
    """Writes the frame folders that the command line describes. Raises UserError for a bad flag or unusable folder."""
    # the defaults match those of dummy_data.py and of the README
    parser = Parser(
        description="Save test videos as folders of PNG frames, with their labels, captions and texts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", type=Path, default=Path("synthetic_dataset"), help="dataset with a test/ folder")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("frames_see"),
        help="folder to create; one made by this script earlier is replaced",
    )
    parser.add_argument("--per_class", type=int, default=3, help="number of videos per class")
    args = parser.parse_args(argv)
    if args.per_class < 1:
        raise UserError(f"--per_class must be at least 1, not {args.per_class}")

    # imported late, so that --help is fast
    from tqdm import tqdm

    from dummy_data import save_frames, whole_or_none
    from readers import open_video
    from VLoader import read_folder

    # the first videos of each class, or of each folder if videos have several labels
    by_class = defaultdict(list)
    for sample in read_folder(args.data_dir / "test"):
        by_class[sample.label or sample.path.parent].append(sample)
    samples = [sample for group in by_class.values() for sample in group[: args.per_class]]
    clear_frames(args.output)

    # write frames in chunks, because a video may be too long for memory
    rows: dict[str, dict] = {}
    with whole_or_none(args.output):
        for sample in tqdm(samples, unit="video"):
            name = free_name(f"{sample.label}_{sample.path.stem}" if sample.label else sample.path.stem, rows)
            reader = open_video(sample.path)
            first, count = reader.part(sample.segment)
            for start in range(0, count, CHUNK):
                frames = reader.frames(range(first + start, first + min(start + CHUNK, count)))
                save_frames(frames.numpy(), args.output / name, start)
            rows[name] = metadata_row(name, sample)

        # with labels, captions and lexicon, inference.py can say which of its answers are right
        lines = "".join(json.dumps(row) + "\n" for row in rows.values())
        (args.output / "metadata.jsonl").write_text(lines, encoding="utf-8")
        if (args.data_dir / "lexicon.json").is_file():
            shutil.copyfile(args.data_dir / "lexicon.json", args.output / "lexicon.json")
    count = counted(len(rows), "folder of frames", "folders of frames")
    print(f"wrote {count} and a metadata.jsonl to {printable(args.output)}/")
    return 0


def metadata_row(name: str, sample: "Sample") -> dict[str, Any]:
    """The row of metadata.jsonl for the frames of a sample, without what it lacks."""
    row = {"file_name": name, "label": sample.label, "caption": sample.captions, "text": sample.text}
    row |= {"other_text": sample.other_text, "attributes": sample.objects, "labels": sample.labels}
    for key, *values in zip(("question", "answer", "kind"), *sample.questions, strict=True):
        row[key] = values if values and None not in values else None
    return {k: v for k, v in row.items() if v not in (None, ())}


def free_name(name: str, taken: Collection[str]) -> str:
    """A folder name that is not in `taken`. Replaces slashes and control characters, which a label may contain."""
    name = re.sub(r"[/\\\x00-\x1f]", "_", name)
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def clear_frames(folder: Path) -> None:
    """Empties a folder that this script made. Raises UserError if it contains anything else."""
    if folder.is_dir() and any(folder.iterdir()):
        entries = [path for path in folder.iterdir() if path.name not in ("metadata.jsonl", "lexicon.json")]
        if not all(map(is_frames, entries)) or not (folder / "metadata.jsonl").is_file():
            raise UserError(f"{folder}/ is not empty and was not made by this script; choose another --output")
        shutil.rmtree(folder)
    make_folder(folder)


def is_frames(folder: Path) -> bool:
    """Whether this is a folder that contains only frames written by dummy_data.save_frames()."""
    return folder.is_dir() and all(re.fullmatch(r"frame_\d+\.png", path.name) for path in folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
