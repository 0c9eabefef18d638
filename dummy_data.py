"""Draws a synthetic video dataset whose classes differ in motion, so that one frame is not enough.

    python dummy_data.py                      # synthetic_dataset/{train,test}/class_k/video_i.pt

Ten classes = {circle, square} x {moving right, left, down, up, standing still}. A shape that leaves the frame on one
side enters on the other. So its position in a single frame is uniform for every motion, and one frame only shows the
shape: the best guess is right 1 time in 5. Colour, size, speed, start, background and noise are random in every video.

Shapes: B videos, T frames, H W pixels. A video is RGB uint8 [T, C, H, W].
"""

import argparse
import io
import json
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from script import Parser, UserError, make_folder, printable, script

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.62, 0.15, 0.80),
    "cyan": (0.15, 0.88, 0.92),
    "orange": (0.98, 0.55, 0.08),
    "white": (0.97, 0.97, 0.97),
}
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "still": (0, 0)}
RADII = {"small": (0.105, 0.135), "large": (0.170, 0.205)}  # fraction of the frame's side
SPEEDS = (1.2, 3.0)  # frame widths per 64 frames, which is pixels per frame at 64 x 64
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    # signed distance to the edge in pixels, negative inside; dx, dy and radius broadcast to (B, T, H, W)
    # 0.886 = sqrt(pi) / 2 gives the square the area of the circle
    "circle": lambda dx, dy, radius: np.hypot(dx, dy) - radius,
    "square": lambda dx, dy, radius: np.maximum(np.abs(dx), np.abs(dy)) - 0.886 * radius,
}
CLASSES = [(shape, motion) for shape in SHAPES for motion in MOTIONS]

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box")}
MOTION_PHRASES = {
    "right": ("moves right", "slides to the right", "drifts rightwards", "glides towards the right"),
    "left": ("moves left", "slides to the left", "drifts leftwards", "glides towards the left"),
    "down": ("moves down", "slides to the bottom", "drifts downwards", "glides towards the bottom"),
    "up": ("moves up", "slides to the top", "drifts upwards", "glides towards the top"),
    "still": ("stands still", "stays in place", "does not move", "remains at rest"),
}
TEMPLATES = (
    "a {size} {colour} {shape} {motion}",
    "the {colour} {shape} is {size} and {motion}",
    "there is a {size} {shape} in {colour} that {motion}",
    "a {shape} of {colour} colour , {size} , {motion}",
    "in this clip the {size} {colour} {shape} {motion}",
    "a {size} {shape} {motion} ; it is {colour}",
    "we see that the {shape} , {size} and {colour} , {motion}",
)
HINTS = {
    "colour": {name: f"a note says: something {name}" for name in COLOURS},
    "size": {"small": "a note says: easy to overlook", "large": "a note says: hard to overlook"},
    "shape": {"circle": "a note says: it is round", "square": "a note says: it has corners"},
    "motion": {
        "right": "a note says: it goes sideways",
        "left": "a note says: it goes sideways",
        "down": "a note says: it goes vertically",
        "up": "a note says: it goes vertically",
        "still": "a note says: nothing happens",
    },
}
CAPTIONS_PER_VIDEO = 5
COUNTS = {"train": "videos_per_class", "val": "val_per_class", "test": "test_per_class"}  # the flag of each split
SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}
CONTENT = (*COUNTS, "classes.json", "lexicon.json")  # what a dataset's folder may contain
# draw(label, split, count, args) yields `count` videos uint8 [T, C, H, W], each with its row of metadata.jsonl
Draw = Callable[[int, str, int, argparse.Namespace], Iterator[tuple[np.ndarray, dict]]]
# the range of each number on the command line
LIMITS = {
    "classes": (2, len(CLASSES)),
    "videos_per_class": (1, 100_000),
    "test_per_class": (1, 100_000),
    "frames": (1, 10_000),
    "size": (16, 2048),
    "seed": (0, 2**63 - 1),
}


# -- words ------------------------------------------------------------------------------------------

# the words for each value of an attribute, written to lexicon.json; see metrics.Lexicon
LEXICON = {
    "size": {size: [*words] for size, words in SIZE_WORDS.items()},
    "colour": {colour: [colour] for colour in COLOURS},
    "shape": {shape: [*words] for shape, words in SHAPE_WORDS.items()},
    "motion": {
        "right": ["right", "rightwards"],
        "left": ["left", "leftwards"],
        "down": ["down", "downwards", "bottom"],
        "up": ["up", "upwards", "top"],
        "still": ["still", "place", "not", "rest"],
    },
}


def write_caption(
    template: str,
    truth: dict[str, str],
    rng: np.random.Generator,
    shape_words: Mapping[str, Sequence[str]] = SHAPE_WORDS,
    motion_phrases: Mapping[str, Sequence[str]] = MOTION_PHRASES,
) -> str:
    """A caption that names the four attributes of `truth`, each in a random wording."""
    return template.format(
        size=rng.choice(SIZE_WORDS[truth["size"]]),
        colour=truth["colour"],
        shape=rng.choice(shape_words[truth["shape"]]),
        motion=rng.choice(motion_phrases[truth["motion"]]),
    )


def write_hint(truth: dict[str, str], rng: np.random.Generator) -> str:
    """The text of a clip, a hint about one attribute: true (65 %), misleading (20 %) or missing (15 %, "")."""
    attribute = rng.choice(list(HINTS))
    notes = HINTS[attribute]
    chance = rng.random()
    if chance < 0.15:
        return ""
    if chance < 0.35:
        others = sorted(set(notes.values()) - {notes[truth[attribute]]})
        return str(rng.choice(others))
    return notes[truth[attribute]]


# -- pictures ---------------------------------------------------------------------------------------


def draw_backgrounds(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Dark, nearly grey gradients, float32 in [0, 1]: (B, 1, C, H, W)."""
    # brightness, a slight colour cast, and a slope along x and y
    level = rng.uniform(0.08, 0.45, (count, 1, 1, 1, 1))
    tint = rng.uniform(-0.05, 0.05, (count, 1, 3, 1, 1))
    slope = rng.uniform(-0.15, 0.15, (2, count, 1, 1, 1, 1))
    axis = np.linspace(-1, 1, size)
    ramp = slope[0] * axis[None, :] + slope[1] * axis[:, None]  # (B, 1, 1, H, W)
    return np.clip(level + tint + ramp, 0, 1).astype(np.float32)


def trajectories(start: np.ndarray, velocity: np.ndarray, times: np.ndarray, size: int) -> np.ndarray:
    """Positions in pixels at times (T,) or (B, T), from start and velocity (B, 2); wraps around: (B, T, 2)."""
    return (start[:, None] + velocity[:, None] * times[..., None]) % size


def draw_masks(shape: str, positions: np.ndarray, radius: np.ndarray, size: int, shapes: dict = SHAPES) -> np.ndarray:
    """The covered fraction of each pixel, for shapes at positions (B, T, 2) with radius (B,): (B, T, H, W)."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    offset = grid - positions.astype(np.float32)[..., None]  # (B, T, 2, size)
    offset = (offset + size / 2) % size - size / 2  # to the nearest copy, since the frame wraps around
    dx, dy = offset[:, :, 0, None, :], offset[:, :, 1, :, None]  # (B, T, 1, W), (B, T, H, 1)
    return np.clip(0.5 - shapes[shape](dx, dy, radius.astype(np.float32)[:, None, None, None]), 0, 1)


def paint(frames: np.ndarray, masks: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blends colours (B, 3) into frames (B, 1 or T, C, H, W) by masks (B, T, H, W): (B, T, C, H, W)."""
    return frames + masks[:, :, None] * (colours.astype(np.float32)[:, None, :, None, None] - frames)


def to_uint8(frames: np.ndarray, rng: np.random.Generator, noise: float = 8) -> np.ndarray:
    """Adds uniform noise of +-`noise` grey levels to frames in [0, 1]. Returns uint8 of the same shape."""
    # in place, because these arrays hold all videos of a class
    grain = rng.random(frames.shape, dtype=np.float32)
    grain *= 2 * noise
    grain += frames * 255
    grain -= noise - 0.5  # adds 0.5, because the cast below truncates
    return np.clip(grain, 0, 255, out=grain).astype(np.uint8)


def draw_class(
    label: int, count: int, num_frames: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Draws `count` videos of one class. Returns uint8 (B, T, C, H, W) and the true attributes of each video."""
    # the class sets shape and motion; everything else is random
    shape, motion = CLASSES[label]
    colours = rng.choice(list(COLOURS), count)
    sizes = rng.choice(list(RADII), count)
    radius = rng.uniform(*np.array([RADII[s] for s in sizes]).T) * size
    speed = rng.uniform(*SPEEDS, (count, 1)) * size / 64
    positions = trajectories(rng.uniform(0, size, (count, 2)), speed * MOTIONS[motion], np.arange(num_frames), size)
    shades = np.array([COLOURS[c] for c in colours]) + rng.uniform(-0.04, 0.04, (count, 3))

    # the shape over its background
    backgrounds, masks = draw_backgrounds(rng, count, size), draw_masks(shape, positions, radius, size)
    frames = paint(backgrounds, masks, np.clip(shades, 0, 1))
    truths = [
        {"size": str(s), "colour": str(c), "shape": shape, "motion": motion}
        for s, c in zip(sizes, colours, strict=True)
    ]
    return to_uint8(frames, rng), truths


# -- files ------------------------------------------------------------------------------------------


def save_video(video: np.ndarray, path: Path, fps: int = 8) -> Path:
    """Saves uint8 [T, C, H, W] as a .pt file, an .mp4 file or, without a suffix, a folder of frames."""
    if path.suffix == ".pt":
        import torch

        buffer = io.BytesIO()  # torch would hide the cause of an error in writing, such as a full disk
        torch.save(torch.from_numpy(video), buffer)
        path.write_bytes(buffer.getbuffer())
    elif path.suffix == ".mp4":
        save_mp4(video, path, fps)
    else:
        save_frames(video, path)
    return path


def save_mp4(video: np.ndarray, path: Path, fps: int) -> None:
    """Saves uint8 [T, C, H, W] as H.264 in 4:4:4, nearly lossless, so that small shapes keep their colour."""
    import av

    with av.open(f"file:{path}", "w") as container:  # a bare path may be taken for a URL
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], "yuv444p"
        for frame in video.transpose(0, 2, 3, 1):  # [T, H, W, C]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def save_frames(video: np.ndarray, folder: Path, first: int = 0) -> None:
    """Saves uint8 [T, C, H, W] as folder/frame_000.png, frame_001.png, ..., starting at number `first`."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(video.transpose(0, 2, 3, 1), start=first):  # [T, H, W, C]
        Image.fromarray(frame).save(folder / f"frame_{index:03d}.png")


def draw_rows(label: int, split: str, count: int, args: argparse.Namespace) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields `count` videos of one class, uint8 [T, C, H, W], each with its row of metadata.jsonl."""
    # every class has its own generator, so that its videos do not depend on --classes
    rng = np.random.default_rng([args.seed, split == "test", label])
    videos, truths = draw_class(label, count, args.frames, args.size, rng)
    for video, truth in zip(videos, truths, strict=True):
        chosen = rng.permutation(len(TEMPLATES))[:CAPTIONS_PER_VIDEO]  # every caption of a video uses another template
        captions = [write_caption(TEMPLATES[i], truth, rng) for i in chosen]
        yield video, {"caption": captions, "text": write_hint(truth, rng), "attributes": truth}


def write_split(folder: Path, draw: Draw, count: int, args: argparse.Namespace, bar: Any) -> None:
    """Draws the split that the folder is named after: videos and metadata.jsonl. `bar` is a tqdm progress bar."""
    rows, suffix = [], "" if args.format == "frames" else f".{args.format}"
    for label in range(args.classes):
        name = f"class_{label}"
        (folder / name).mkdir(parents=True)
        for index, (video, row) in enumerate(draw(label, folder.name, count, args)):
            save_video(video, folder / name / f"video_{index}{suffix}")
            rows.append({"file_name": f"{name}/video_{index}{suffix}"} | row)
            bar.update()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def write_dataset(args: argparse.Namespace, draw: Draw, class_names: list[str], lexicon: dict) -> None:
    """Writes all splits, classes.json and lexicon.json to args.output. Raises UserError if the folder is in use."""
    from tqdm import tqdm  # imported late, so that --help is fast

    clear_dataset(args.output, args.overwrite)
    counts = {split: getattr(args, flag) for split, flag in COUNTS.items() if hasattr(args, flag)}
    total = args.classes * sum(counts.values())
    names = {f"class_{label}": name for label, name in enumerate(class_names[: args.classes])}

    # a dataset that is not complete would be used as if it were, so remove it if anything fails
    with whole_or_none(*(args.output / name for name in CONTENT)), tqdm(total=total, unit="video") as bar:
        for split, count in counts.items():
            write_split(args.output / split, draw, count, args, bar)
        for name, content in (("classes.json", names), ("lexicon.json", lexicon)):
            (args.output / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {bar.n} videos of {args.classes} classes to {printable(args.output)}/")


def display_name(label: int) -> str:
    """The name of a class for people, for example "circle moving left"."""
    shape, motion = CLASSES[label]
    return f"{shape} standing still" if motion == "still" else f"{shape} moving {motion}"


def dataset_parser(description: str, classes: int, counts: dict[str, int], output: str) -> Parser:
    """The flags of a script that draws a dataset of at most `classes` classes. `counts` are the videos per class."""
    # all flags have defaults, and the defaults make the dataset of the README
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--classes", type=int, default=classes, help=f"use the first N of {classes} classes (at least 2)"
    )
    for split, count in counts.items():
        parser.add_argument(
            f"--{COUNTS[split]}", type=int, default=count, help=f"{SPLIT_WORDS[split]} videos per class"
        )
    parser.add_argument("--frames", type=int, default=16, help="frames per video")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels, at least 16")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder to create")
    parser.add_argument(
        "--format",
        choices=("pt", "mp4", "frames"),
        default="pt",
        help="save each video as a tensor, an H.264 file, or a folder of PNGs",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset in --output")
    return parser


@script
def main(argv: list[str] | None = None) -> None:
    """Draws the dataset that the command line describes. Raises UserError for a bad flag or an unusable folder."""
    parser = dataset_parser(
        "Draw a synthetic video dataset: a shape that moves or stands still on a plain background.",
        classes=len(CLASSES),
        counts={"train": 80, "test": 20},
        output="synthetic_dataset",
    )
    args = parser.parse_args(argv)
    check_flags(args, LIMITS)
    write_dataset(args, draw_rows, [display_name(label) for label in range(len(CLASSES))], LEXICON)


@contextmanager
def whole_or_none(*paths: Path) -> Generator[None]:
    """Removes these files and folders if the block that writes them fails, for example on Ctrl-C or a full disk."""
    try:
        yield
    except BaseException:
        for path in paths:
            remove(path)
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_flags(args: argparse.Namespace, limits: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError for a number that is out of range."""
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    if args.format == "mp4" and args.size % 2:
        raise UserError(f"--size must be even for mp4, not {args.size}")


def clear_dataset(folder: Path, overwrite: bool) -> None:
    """Creates the folder. An earlier dataset is removed with `overwrite`; anything else in it raises UserError."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "classes.json").is_file():  # not ours, so do not touch it
            raise UserError(f"{folder}/ is not empty and was not made by this script; choose another --output")
        if not overwrite:
            raise UserError(
                f"{folder}/ already has a dataset: add --overwrite to replace it, or choose another --output"
            )
        for name in CONTENT:
            remove(folder / name)
    make_folder(folder)


if __name__ == "__main__":
    sys.exit(main())
