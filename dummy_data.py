"""Draws a synthetic video dataset. The class of a clip is the motion of the object that its text names.

    python dummy_data.py                      # synthetic_dataset/{train,val,test}/class_k/video_i.pt
    python dummy_data.py --questions --output synthetic_questions    # the same videos, with questions for captioners
    python dummy_data.py --multi_label --output synthetic_labels     # the same videos; two objects are two labels
    python dummy_data.py --ceilings           # the best possible accuracy with less than video and text

Nine classes, one for each motion: moves right, left, down or up; turns clockwise or counterclockwise; reverses; stops;
stands still. Half of the clips have one object, the others two of different colours and motions. Without the text, one
can only guess which of the two is meant. Shape, size, colour, start, speed, background and noise are random and
independent of the class. Every text is true; 15 % of the clips with one object have none. An object that leaves the
frame on one side enters on the other, so its place in a single frame says nothing about its motion.

Shapes: B videos, T frames, C channels, H W pixels. A video is RGB uint8 [T, C, H, W].
"""

import argparse
import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
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
Distance = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Distance] = {
    # signed distance to the edge in pixels, negative inside; dx, dy and radius broadcast to (..., T, H, W)
    # 0.886 = sqrt(pi) / 2 gives the square the area of the circle
    "circle": lambda dx, dy, radius: np.hypot(dx, dy) - radius,
    "square": lambda dx, dy, radius: np.maximum(np.abs(dx), np.abs(dy)) - 0.886 * radius,
}
RADII = {"small": (0.105, 0.135), "large": (0.170, 0.205)}  # in widths of the frame
CLASS_NAMES = {
    "right": "moves right",
    "left": "moves left",
    "down": "moves down",
    "up": "moves up",
    "clockwise": "turns clockwise",
    "counterclockwise": "turns counterclockwise",
    "reverses": "reverses",
    "stops": "stops",
    "still": "stands still",
}
MOTIONS = tuple(CLASS_NAMES)  # the motion of class_0, class_1, ...
# the angle of each heading in radians, with y pointing down, so that a positive angle turns clockwise on the screen
HEADINGS = {"right": 0.0, "left": np.pi, "down": np.pi / 2, "up": -np.pi / 2}
TURNS = {"clockwise": np.pi / 2, "counterclockwise": -np.pi / 2, "reverses": np.pi}
SPEEDS = (0.025, 0.05)  # widths of the frame per frame: 1.6 to 3.2 pixels at 64 x 64
TILT = 0.14  # radians by which a heading may be off, which is 8 degrees
CHANGE = (0.375, 0.625)  # when an object turns, reverses or stops, as a fraction of the video
NO_TEXT = 0.15  # fraction of the clips with one object that have no text

# the flag and the default number of videos per class of each split
COUNTS = {"train": ("videos_per_class", 320), "val": ("val_per_class", 40), "test": ("test_per_class", 100)}
CONTENT = (*COUNTS, "classes.json", "lexicon.json")  # what a dataset's folder may contain
# the range of each number on the command line
LIMITS = {
    "classes": (2, len(MOTIONS)),
    **{flag: (1, 100_000) for flag, _ in COUNTS.values()},
    "frames": (8, 10_000),
    "size": (16, 2048),
    "seed": (0, 2**63 - 1),
}


def choose(options: Sequence, rng: np.random.Generator) -> Any:
    """One of the options at random, the same one as rng.choice() but several times faster."""
    return options[rng.integers(len(options))]


# -- words ------------------------------------------------------------------------------------------

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box")}
MOTION_PHRASES = {
    "right": ("moves right", "slides to the right", "drifts rightwards", "glides towards the right"),
    "left": ("moves left", "slides to the left", "drifts leftwards", "glides towards the left"),
    "down": ("moves down", "slides to the bottom", "drifts downwards", "glides towards the bottom"),
    "up": ("moves up", "slides to the top", "drifts upwards", "glides towards the top"),
    "still": ("stands still", "stays in place", "does not move", "remains at rest"),
    "clockwise": ("turns clockwise", "makes a clockwise turn", "bends clockwise"),
    "counterclockwise": ("turns counterclockwise", "makes a counterclockwise turn", "bends counterclockwise"),
    "reverses": ("reverses", "turns back", "comes back again"),
    "stops": ("stops", "comes to a stop", "halts on its way"),
}
# metrics.attributes_in() splits a caption at ";", so the phrase of one object has none
TEMPLATES = (
    "a {size} {colour} {shape} {motion}",
    "the {colour} {shape} is {size} and {motion}",
    "there is a {size} {shape} in {colour} that {motion}",
    "a {shape} of {colour} colour , {size} , {motion}",
    "we see that the {size} {colour} {shape} {motion}",
)
TEXTS = (
    "a note says: something {colour}",
    "watch the {colour} one",
    "what does the {colour} {shape} do ?",
    "look at the {size} {colour} {shape}",
    "only the {colour} {shape} matters",
)
# every motion and colour is that of one object only, so it says which one is meant
QUESTIONS = {
    "colour": (
        "which colour is the object that {motion} ?",
        "what is the colour of the one that {motion} ?",
        "the object that {motion} : which colour is it ?",
    ),
    "motion": (
        "what does the {colour} {shape} do ?",
        "how does the {colour} object move ?",
        "how would you describe the motion of the {size} {colour} {shape} ?",
    ),
    "count": (
        "how many objects are there ?",
        "how many shapes do we see ?",
        "is there one object , or are there two ?",
    ),
}
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
        "clockwise": ["clockwise"],
        "counterclockwise": ["counterclockwise"],
        "reverses": ["reverses", "back"],
        "stops": ["stops", "stop", "halts"],
    },
}


def fill(
    template: str,
    item: dict[str, Any],
    rng: np.random.Generator,
    shape_words: Mapping[str, Sequence[str]] = SHAPE_WORDS,
    motion_phrases: Mapping[str, Sequence[str]] = MOTION_PHRASES,
) -> str:
    """The template with words for an object, each attribute in a random wording."""
    return template.format(
        size=choose(SIZE_WORDS[item["size"]], rng),
        colour=item["colour"],
        shape=choose(shape_words[item["shape"]], rng),
        motion=choose(motion_phrases[item["motion"]], rng),
    )


def write_caption(template: str, items: list[dict[str, Any]], rng: np.random.Generator, *words: Mapping) -> str:
    """A caption that names all objects, in the order of their colours' names. `words` are those of fill()."""
    ordered = sorted(items, key=lambda item: item["colour"])
    return " ; ".join(fill(template, item, rng, *words) for item in ordered)


def write_captions(items: list[dict[str, Any]], rng: np.random.Generator) -> list[str]:
    """The captions of a clip, one for each template, in random order."""
    return [write_caption(TEMPLATES[index], items, rng) for index in rng.permutation(len(TEMPLATES))]


def write_texts(items: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, str]:
    """The `text`, which names the first object, and with two objects the `other_text`, which names the second."""
    texts = [fill(choose(TEXTS, rng), item, rng) for item in items]
    if len(items) == 2:
        return {"text": texts[0], "other_text": texts[1]}
    return {"text": "" if rng.random() < NO_TEXT else texts[0]}


def write_questions(items: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, list[str]]:
    """A question of each kind, in random wording, each about one of the objects: `question`, `answer` and `kind`."""
    rows = []
    for kind, templates in QUESTIONS.items():
        item = choose(items, rng)
        answer_to = {
            "colour": item["colour"],
            "motion": CLASS_NAMES[item["motion"]],
            "count": ("one", "two")[len(items) - 1],
        }
        rows.append((fill(choose(templates, rng), item, rng), answer_to[kind], kind))
    questions, answers, kinds = zip(*rows, strict=True)
    return {"question": [*questions], "answer": [*answers], "kind": [*kinds]}


# -- motion -----------------------------------------------------------------------------------------


def draw_items(motions: Sequence[str], num_frames: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """One object for each motion: its attributes; radius, start and speed in widths of the frame; heading in radians;
    and the last frame before it turns, reverses or stops."""
    first, last = (round(share * num_frames) for share in CHANGE)
    items = []
    for motion in motions:
        heading = HEADINGS.get(motion, choose([*HEADINGS.values()], rng)) + rng.uniform(-TILT, TILT)
        size = choose([*RADII], rng)
        items.append(
            {
                "size": size,
                "shape": choose([*SHAPES], rng),
                "motion": motion,
                "radius": rng.uniform(*RADII[size]),
                "start": rng.random(2).tolist(),
                "heading": heading,
                "speed": rng.uniform(*SPEEDS),
                "change": int(rng.integers(first, last)),
            }
        )
    return items


def draw_pair(label: int, two: bool, args: argparse.Namespace, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The object of the class and, if there are two, one of another class and colour."""
    others = [motion for motion in MOTIONS[: args.classes] if motion != MOTIONS[label]]
    items = draw_items([MOTIONS[label], choose(others, rng)], args.frames, rng)
    for item, colour in zip(items, rng.choice([*COLOURS], 2, replace=False), strict=True):
        item["colour"] = str(colour)

    # half a frame apart at the start, so that neither hides the other throughout the video
    items[1]["start"] = ((items[0]["start"] + rng.uniform(0.35, 0.65, 2)) % 1).tolist()
    return items if two else items[:1]


def trajectory(item: dict[str, Any], num_frames: int) -> np.ndarray:
    """The object's positions (x, y) in widths of the frame, before they wrap around at its edge: (T, 2)."""
    motion, changed = item["motion"], np.arange(num_frames - 1) >= item["change"]
    heading = item["heading"] + changed * TURNS.get(motion, 0)  # (T-1,)
    speed = item["speed"] * (motion != "still") * ~(changed & (motion == "stops"))
    steps = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)  # (T-1, 2)
    return np.array(item["start"]) + np.concatenate([np.zeros((1, 2)), steps.cumsum(0)])


def motion_of(path: np.ndarray) -> str | None:
    """The motion that makes this path (T, 2), from its first and last step. None if no motion does."""
    first, last = path[1] - path[0], path[-1] - path[-2]
    moves_first, moves_last = np.linalg.norm(first) > 1e-6, np.linalg.norm(last) > 1e-6
    if not moves_first:
        return None if moves_last else "still"
    if not moves_last:
        return "stops"

    # multiples of 90 degrees by which it turns, and its heading to the nearest 90 degrees
    angles = np.arctan2([first[1], last[1]], [first[0], last[0]])
    turn = round((angles[1] - angles[0]) / (np.pi / 2)) % 4
    if turn:
        return ("clockwise", "reverses", "counterclockwise")[turn - 1]
    return ("right", "down", "left", "up")[round(angles[0] / (np.pi / 2)) % 4]


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


def draw_masks(distance: Distance, positions: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel that a shape covers, at positions (B, T, 2) in pixels with radius (B,): (B, T, H, W)."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    offset = grid - positions.astype(np.float32)[..., None]  # (B, T, 2, size)
    offset = (offset + size / 2) % size - size / 2  # to the nearest copy, since the frame wraps around
    dx, dy = offset[:, :, 0, None, :], offset[:, :, 1, :, None]  # (B, T, 1, W), (B, T, H, 1)
    return np.clip(0.5 - distance(dx, dy, radius.astype(np.float32)[:, None, None, None]), 0, 1)


def paint(frames: np.ndarray, masks: np.ndarray, colours: np.ndarray) -> None:
    """Blends colours (B, 3) into frames (B, T, C, H, W), in place, by masks (B, T, H, W)."""
    colours = colours.astype(np.float32)[:, :, None, None]  # (B, C, 1, 1)
    # one frame at a time, because small arrays stay in the processor's cache
    for video, frame in np.ndindex(masks.shape[:2]):
        target = frames[video, frame]  # (C, H, W)
        target += masks[video, frame] * (colours[video] - target)


def to_uint8(frames: np.ndarray, rng: np.random.Generator, noise: float = 8) -> np.ndarray:
    """Adds uniform noise of +-`noise` grey levels to frames (..., C, H, W) in [0, 1]. Returns uint8 of that shape."""
    result = np.empty(frames.shape, np.uint8)
    grain = np.empty(frames.shape[-3:], np.float32)
    for index in np.ndindex(frames.shape[:-3]):
        rng.random(dtype=np.float32, out=grain)
        grain *= 2 * noise
        grain += frames[index] * 255
        grain -= noise - 0.5  # adds 0.5, because the cast below truncates
        result[index] = np.clip(grain, 0, 255, out=grain)
    return result


def draw_video(items: list[dict[str, Any]], args: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
    """Draws one or two objects, the later one on top. Returns uint8 [T, C, H, W]."""
    frames = draw_backgrounds(rng, 1, args.size).repeat(args.frames, axis=1)  # (1, T, C, H, W)
    for item in items:
        positions = trajectory(item, args.frames)[None] % 1 * args.size  # (1, T, 2)
        masks = draw_masks(SHAPES[item["shape"]], positions, np.array([item["radius"] * args.size]), args.size)
        shade = COLOURS[item["colour"]] + rng.uniform(-0.04, 0.04, 3)
        paint(frames, masks, np.clip(shade, 0, 1)[None])
    return to_uint8(frames, rng)[0]


def draw_rows(label: int, split: str, count: int, args: argparse.Namespace) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields `count` videos of one class, uint8 [T, C, H, W], each with its row of metadata.jsonl."""
    rng = np.random.default_rng([args.seed, *split.encode(), label])
    for index in range(count):
        items = draw_pair(label, index % 2 == 1, args, rng)
        video = draw_video(items[:: choose((1, -1), rng)], args, rng)  # the named object is on top as often as below
        attributes = [{name: item[name] for name in LEXICON} for item in items]
        row = {"caption": write_captions(items, rng), **write_texts(items, rng)}
        yield video, row | {"attributes": attributes, "objects": items}


# -- ceilings ---------------------------------------------------------------------------------------


def ceilings(folder: Path) -> dict[str, float]:
    """The accuracy of the best possible observers of the test videos in this dataset. Raises UserError.

    They know each object's path without noise. What the text alone or a single frame tells is estimated on the training
    videos by naive Bayes: the class is guessed from words, or from place and looks, as if these were independent.
    """
    train, test = (read_rows(folder / split) for split in ("train", "test"))
    truths = [row["objects"][0]["motion"] for row in test]
    classes = {row["objects"][0]["motion"] for row in train}

    def accuracy(guesses: list[dict[str, float]]) -> float:
        """Mean accuracy of choosing a motion with the most votes, at random among equals."""
        right = 0.0
        for guess, motion in zip(guesses, truths, strict=True):
            best = [m for m, score in guess.items() if score == max(guess.values())]
            right += (motion in best) / len(best)
        return right / len(truths)

    def bayes_accuracy(features: Any) -> float:
        """Accuracy of naive Bayes on the features of a row."""
        motions = [row["objects"][0]["motion"] for row in train]
        return accuracy(naive_bayes([features(row) for row in train], motions, [features(row) for row in test]))

    return {
        "video and text": accuracy([votes(row["objects"][:1], classes) for row in test]),
        "video without text": accuracy([votes(row["objects"], classes) for row in test]),
        "frames in any order, and text": accuracy([votes(row["objects"][:1], classes, ordered=False) for row in test]),
        "frames in any order, without text": accuracy([votes(row["objects"], classes, ordered=False) for row in test]),
        "one frame, and text": bayes_accuracy(lambda row: looks(row["objects"][0])),
        "text alone": bayes_accuracy(lambda row: row["text"].split()),
    }


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl. Raises UserError if the folder has none, or if they don't describe objects."""
    try:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    if not rows or not all("objects" in row for row in rows):
        raise UserError(f"{folder}/ has no dataset of dummy_data.py: draw it first, without --ceilings")
    return rows


def votes(items: list[dict[str, Any]], classes: set[str], ordered: bool = True) -> Counter:
    """One vote for each object, shared by the classes that could have made its path. Without the order of the frames,
    the object may just as well have moved along its path backwards."""
    result: Counter = Counter()
    for item in items:
        path = trajectory(item, num_frames=item["change"] + 3)  # one step after the change is enough
        motions = {motion_of(path)} if ordered else {motion_of(path), motion_of(path[::-1])} & classes
        for motion in motions:
            result[motion] += 1 / len(motions)
    return result


def looks(item: dict[str, Any]) -> list[Hashable]:
    """What the first frame alone shows of an object: its attributes, and where it is on a grid of 4 x 4 cells."""
    place = [(axis, int(4 * position)) for axis, position in zip("xy", item["start"], strict=True)]
    return [item["size"], item["colour"], item["shape"], *place]


def naive_bayes(
    features: list[list[Hashable]], classes: list[str], queries: list[list[Hashable]]
) -> list[dict[str, float]]:
    """The log probability of each class for each of the queries, from the counts of features in each class."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row, name in zip(features, classes, strict=True):
        counts[name].update({*row})
    total = Counter(classes)

    # one more of each count, because a feature that was never seen with a class is not impossible; each feature counts
    # once, in the row's order: that of a set differs from process to process, and with it the rounding of the sum
    def log_probability(row: list[Hashable], name: str) -> float:
        odds = [np.log((counts[name][f] + 1) / (total[name] + 2)) for f in dict.fromkeys(row)]
        return np.log(total[name]) + sum(odds)

    return [{name: log_probability(row, name) for name in total} for row in queries]


# -- writing ----------------------------------------------------------------------------------------


def save_video(video: np.ndarray, path: Path) -> Path:
    """Saves uint8 [T, C, H, W] as a .pt file, an .mp4 file or, without a suffix, a folder of frames."""
    if path.suffix == ".pt":
        import torch

        buffer = io.BytesIO()  # torch would hide the cause of an error in writing, such as a full disk
        torch.save(torch.from_numpy(video), buffer)
        path.write_bytes(buffer.getbuffer())
    elif path.suffix == ".mp4":
        save_mp4(video, path)
    else:
        save_frames(video, path)
    return path


def save_mp4(video: np.ndarray, path: Path) -> None:
    """Saves uint8 [T, C, H, W] as H.264 in 4:4:4, nearly lossless, so that small shapes keep their colour."""
    import av

    with av.open(f"file:{path}", "w") as container:  # a bare path may be taken for a URL
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
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


def write_split(folder: Path, count: int, args: argparse.Namespace, bar: Any) -> None:
    """Draws the split that the folder is named after: videos and metadata.jsonl. `bar` is a tqdm progress bar."""
    rows, suffix = [], "" if args.format == "frames" else f".{args.format}"
    rng = np.random.default_rng([args.seed, *f"{folder.name} questions".encode()])  # changes no video and no caption
    for label in range(args.classes):
        name = f"class_{label}"
        (folder / name).mkdir(parents=True)
        for index, (video, row) in enumerate(draw_rows(label, folder.name, count, args)):
            save_video(video, folder / name / f"video_{index}{suffix}")
            if args.questions:
                row |= write_questions(row["objects"], rng)
            if args.multi_label:
                row["labels"] = [f"class_{MOTIONS.index(item['motion'])}" for item in row["objects"]]
            rows.append({"file_name": f"{name}/video_{index}{suffix}"} | row)
            bar.update()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def write_dataset(args: argparse.Namespace) -> None:
    """Writes all splits, classes.json and lexicon.json to args.output. Raises UserError if the folder is in use."""
    from tqdm import tqdm  # imported late, so that --help is fast

    clear_dataset(args.output, args.overwrite)
    counts = {split: getattr(args, flag) for split, (flag, _) in COUNTS.items()}
    total = args.classes * sum(counts.values())
    names = {f"class_{label}": CLASS_NAMES[motion] for label, motion in enumerate(MOTIONS[: args.classes])}

    # a dataset that is not complete would be used as if it were, so remove it if anything fails
    with whole_or_none(*(args.output / name for name in CONTENT)), tqdm(total=total, unit="video") as bar:
        for split, count in counts.items():
            write_split(args.output / split, count, args, bar)
        for name, content in (("classes.json", names), ("lexicon.json", LEXICON)):
            (args.output / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {total} videos of {args.classes} classes to {printable(args.output)}/")


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


# -- the script -------------------------------------------------------------------------------------


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags. All have defaults, and the defaults make the dataset of the README. Raises UserError for a bad one."""
    parser = Parser(
        description="Draw a synthetic video dataset: the class is the motion of the object that a clip's text names.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--classes", type=int, default=len(MOTIONS), help=f"use the first N of {len(MOTIONS)} classes (at least 2)"
    )
    for split, (flag, count) in COUNTS.items():
        parser.add_argument(f"--{flag}", type=int, default=count, help=f"videos per class in {split}/")
    parser.add_argument("--frames", type=int, default=16, help="frames per video, at least 8")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels, at least 16")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--output", type=Path, default=Path("synthetic_dataset"), help="folder to create")
    parser.add_argument(
        "--format",
        choices=("pt", "mp4", "frames"),
        default="pt",
        help="save each video as a tensor, an H.264 file, or a folder of PNGs",
    )
    parser.add_argument(
        "--questions", action="store_true", help="add questions about colour, motion and number of objects"
    )
    parser.add_argument(
        "--multi_label", action="store_true", help="add `labels`: the motions of all objects, not only of the named one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset in --output")
    parser.add_argument(
        "--ceilings",
        action="store_true",
        help="draw nothing; print how well one could do on the test videos in --output with less than video and text",
    )
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    if args.format == "mp4" and args.size % 2:
        raise UserError(f"--size must be even for mp4, not {args.size}")
    return args


@script
def main(argv: list[str] | None = None) -> None:
    """Draws the dataset, or prints its ceilings. Raises UserError for a bad flag or an unusable folder."""
    args = parse_flags(argv)
    if not args.ceilings:
        return write_dataset(args)
    for observer, accuracy in ceilings(args.output).items():
        print(f"{observer:<36}{100 * accuracy:5.1f} %")


if __name__ == "__main__":
    sys.exit(main())
