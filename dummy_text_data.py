"""Draws a harder synthetic video dataset: the class is the motion of the object that the clip's text names.

    python dummy_text_data.py                 # synthetic_text_dataset/{train,val,test}/class_k/video_i.pt
    python dummy_text_data.py --ceilings      # the best possible accuracy with less than video and text

Nine classes, one for each motion: moves right, left, down or up; turns clockwise or counterclockwise; reverses; stops;
stands still. Half of the clips have one object, the others two of different colours and motions. Without the text, the
best guess in a clip with two objects is right 1 time in 2. Shape, size, colour, start, speed, background and noise are
random and independent of the class. A text is never false; clips with one object lack it in 15 of 100 cases.

Shapes: T frames, H W pixels. A video is RGB uint8 [T, C, H, W].
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dummy_data import (
    CAPTIONS_PER_VIDEO,
    COLOURS,
    RADII,
    SHAPE_WORDS,
    SHAPES,
    SIZE_WORDS,
    check_flags,
    dataset_parser,
    draw_backgrounds,
    draw_masks,
    paint,
    to_uint8,
    write_dataset,
)
from dummy_data import LEXICON as SIMPLE_LEXICON
from dummy_data import MOTION_PHRASES as SIMPLE_PHRASES
from script import UserError, script

# the angle of each heading in radians, with y pointing down, so that a positive angle turns clockwise on the screen
HEADINGS = {"right": 0.0, "left": np.pi, "down": np.pi / 2, "up": -np.pi / 2}
TURNS = {"clockwise": np.pi / 2, "counterclockwise": -np.pi / 2, "reverses": np.pi}
NAMES = {
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
MOTIONS = tuple(NAMES)
SPEEDS = (0.025, 0.05)  # widths of the frame per frame: 1.6 to 3.2 pixels at 64 x 64
TILT = 0.14  # radians by which a heading may be off, which is 8 degrees
CHANGE = (0.375, 0.625)  # when an object turns, reverses or stops, as a fraction of the video
NO_TEXT = 0.15  # fraction of the clips with one object that have no text
LIMITS = {
    "classes": (2, len(MOTIONS)),
    "videos_per_class": (1, 100_000),
    "val_per_class": (1, 100_000),
    "test_per_class": (1, 100_000),
    "frames": (8, 10_000),
    "size": (16, 2048),
    "seed": (0, 2**63 - 1),
}


# -- words ------------------------------------------------------------------------------------------

MOTION_PHRASES = SIMPLE_PHRASES | {
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
LEXICON = SIMPLE_LEXICON | {
    "motion": SIMPLE_LEXICON["motion"]
    | {
        "clockwise": ["clockwise"],
        "counterclockwise": ["counterclockwise"],
        "reverses": ["reverses", "back"],
        "stops": ["stops", "stop", "halts"],
    }
}


def fill(template: str, item: dict[str, Any], rng: np.random.Generator) -> str:
    """The template with words for an object, each attribute in a random wording."""
    return template.format(
        size=rng.choice(SIZE_WORDS[item["size"]]),
        colour=item["colour"],
        shape=rng.choice(SHAPE_WORDS[item["shape"]]),
        motion=rng.choice(MOTION_PHRASES[item["motion"]]),
    )


def write_captions(items: list[dict[str, Any]], rng: np.random.Generator) -> list[str]:
    """Captions that name all objects, in the order of their colours' names. Each caption uses a different template."""
    ordered = sorted(items, key=lambda item: item["colour"])
    templates = rng.permutation(TEMPLATES)[:CAPTIONS_PER_VIDEO]
    return [" ; ".join(fill(str(template), item, rng) for item in ordered) for template in templates]


def write_texts(items: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, str]:
    """The `text`, which names the first object, and with two objects the `other_text`, which names the second."""
    texts = [fill(str(rng.choice(TEXTS)), item, rng) for item in items]
    if len(items) == 2:
        return {"text": texts[0], "other_text": texts[1]}
    return {"text": "" if rng.random() < NO_TEXT else texts[0]}


# -- motion -----------------------------------------------------------------------------------------


def draw_items(motions: Sequence[str], num_frames: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """One object for each motion: its attributes; radius, start and speed in widths of the frame; heading in radians;
    and the last frame before it turns, reverses or stops."""
    first, last = (round(share * num_frames) for share in CHANGE)
    items = []
    for motion in motions:
        heading = HEADINGS.get(motion, rng.choice(list(HEADINGS.values()))) + rng.uniform(-TILT, TILT)
        kind = str(rng.choice(list(RADII)))
        items.append(
            {
                "size": kind,
                "shape": str(rng.choice(list(SHAPES))),
                "motion": motion,
                "radius": rng.uniform(*RADII[kind]),
                "start": rng.random(2).tolist(),
                "heading": float(heading),
                "speed": rng.uniform(*SPEEDS),
                "change": int(rng.integers(first, last)),
            }
        )
    return items


def draw_pair(label: int, two: bool, args: argparse.Namespace, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The object of the class and, if there are two, one of another class and colour."""
    others = [motion for motion in MOTIONS[: args.classes] if motion != MOTIONS[label]]
    items = draw_items([MOTIONS[label], str(rng.choice(others))], args.frames, rng)
    for item, colour in zip(items, rng.choice(list(COLOURS), 2, replace=False), strict=True):
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


def draw_video(items: list[dict[str, Any]], args: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
    """Draws one or two objects, the later one on top. Returns uint8 [T, C, H, W]."""
    frames = draw_backgrounds(rng, 1, args.size)
    for item in items:
        positions = trajectory(item, args.frames)[None] % 1 * args.size  # (1, T, 2)
        masks = draw_masks(item["shape"], positions, np.array([item["radius"] * args.size]), args.size)
        shade = COLOURS[item["colour"]] + rng.uniform(-0.04, 0.04, 3)
        frames = paint(frames, masks, np.clip(shade, 0, 1)[None])  # (1, T, C, H, W)
    return to_uint8(frames, rng)[0]


def draw_rows(label: int, split: str, count: int, args: argparse.Namespace) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields `count` videos of one class, uint8 [T, C, H, W], each with its row of metadata.jsonl."""
    rng = np.random.default_rng([args.seed, *split.encode(), label])
    for index in range(count):
        items = draw_pair(label, index % 2 == 1, args, rng)
        video = draw_video(items[:: rng.choice((1, -1))], args, rng)  # the named object is on top as often as below
        attributes = [{name: item[name] for name in LEXICON} for item in items]
        row = {"caption": write_captions(items, rng), **write_texts(items, rng)}
        yield video, row | {"attributes": attributes, "objects": items}


# -- ceilings ---------------------------------------------------------------------------------------


def ceilings(folder: Path) -> dict[str, float]:
    """The accuracy of the best possible observers of the test videos in this dataset. Raises UserError.

    They know each object's path without noise. What text alone and a single frame tell is counted in the training
    videos: the class is guessed from words, or from place and looks, as if these were independent (naive Bayes).
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

    def counted(features: Any) -> float:
        """Accuracy of naive Bayes on the features of a row."""
        motions = [row["objects"][0]["motion"] for row in train]
        return accuracy(naive_bayes([features(row) for row in train], motions, [features(row) for row in test]))

    return {
        "video and text": accuracy([votes(row["objects"][:1], classes) for row in test]),
        "video without text": accuracy([votes(row["objects"], classes) for row in test]),
        "frames in any order, and text": accuracy([votes(row["objects"][:1], classes, ordered=False) for row in test]),
        "frames in any order, without text": accuracy([votes(row["objects"], classes, ordered=False) for row in test]),
        "one frame, and text": counted(lambda row: looks(row["objects"][0])),
        "text alone": counted(lambda row: row["text"].split()),
    }


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl. Raises UserError if the folder has none, or if they don't describe objects."""
    try:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    if not rows or not all("objects" in row for row in rows):
        raise UserError(f"{folder}/ has no dataset of dummy_text_data.py: draw it first, without --ceilings")
    return rows


def votes(items: list[dict[str, Any]], classes: set[str], ordered: bool = True) -> Counter:
    """One vote for each object, shared by the classes that could have made its path. In a set of frames without order,
    a path may as well have been the other way round."""
    result: Counter = Counter()
    for item in items:
        path = trajectory(item, num_frames=item["change"] + 3)  # one step after the change is enough
        motions = {motion_of(path)} if ordered else {motion_of(path), motion_of(path[::-1])} & classes
        for motion in motions:
            result[motion] += 1 / len(motions)
    return result


def looks(item: dict[str, Any], cells: int = 4) -> list[Hashable]:
    """What the first frame alone shows of an object: its attributes, and where it is on a coarse grid."""
    place = [(axis, int(position * cells)) for axis, position in zip("xy", item["start"], strict=True)]
    return [item["size"], item["colour"], item["shape"], *place]


def naive_bayes(
    features: list[list[Hashable]], classes: list[str], questions: list[list[Hashable]]
) -> list[dict[str, float]]:
    """The log probability of each class for each of the questions, from the counts of features in each class."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row, name in zip(features, classes, strict=True):
        counts[name].update({*row})
    total = Counter(classes)

    # one more of each count, because a feature that was never seen with a class is not impossible; each feature counts
    # once, in the row's order: that of a set differs from process to process, and with it the rounding of the sum
    def log_probability(row: list[Hashable], name: str) -> float:
        odds = [np.log((counts[name][f] + 1) / (total[name] + 2)) for f in dict.fromkeys(row)]
        return np.log(total[name]) + sum(odds)

    return [{name: log_probability(row, name) for name in total} for row in questions]


# -- the script -------------------------------------------------------------------------------------


@script
def main(argv: list[str] | None = None) -> None:
    """Draws the dataset, or prints its ceilings. Raises UserError for a bad flag or an unusable folder."""
    parser = dataset_parser(
        "Draw a synthetic video dataset whose class is the motion of the object that the clip's text names.",
        classes=len(MOTIONS),
        counts={"train": 320, "val": 40, "test": 100},
        output="synthetic_text_dataset",
    )
    parser.add_argument(
        "--ceilings",
        action="store_true",
        help="draw nothing; print how well one could do on the test videos in --output with less than video and text",
    )
    args = parser.parse_args(argv)
    check_flags(args, LIMITS)
    if not args.ceilings:
        return write_dataset(args, draw_rows, list(NAMES.values()), LEXICON)
    for observer, accuracy in ceilings(args.output).items():
        print(f"{observer:<36}{100 * accuracy:5.1f} %")


if __name__ == "__main__":
    sys.exit(main())
