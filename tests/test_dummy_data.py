"""The dataset is as documented: seeded, without duplicates, and no single frame shows the class."""

import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import dummy_data
from dummy_data import CLASSES, HINTS, LEXICON, MOTION_PHRASES, MOTIONS, SHAPE_WORDS, SIZE_WORDS, TEMPLATES
from metrics import attributes_in


def hashes(folder):
    return [
        hashlib.sha256(torch.load(p, weights_only=True).numpy().tobytes()).hexdigest() for p in folder.rglob("*.pt")
    ]


def test_no_video_occurs_twice_and_the_seed_determines_all(tmp_path, dataset):
    ours = hashes(dataset)
    assert len(ours) == 18 and len(set(ours)) == 18
    args = ["--classes", "3", "--videos_per_class", "4", "--test_per_class", "2", "--output"]
    dummy_data.main([*args, str(tmp_path / "same")])
    dummy_data.main([*args, str(tmp_path / "other"), "--seed", "1"])
    assert sorted(hashes(tmp_path / "same")) == sorted(ours)
    assert not set(hashes(tmp_path / "other")) & set(ours)
    same = (tmp_path / "same" / "train" / "metadata.jsonl").read_text()
    assert same == (dataset / "train" / "metadata.jsonl").read_text()


def test_layout(dataset):
    video = torch.load(dataset / "train" / "class_1" / "video_0.pt", weights_only=True)
    assert video.dtype == torch.uint8 and video.shape == (16, 3, 64, 64)
    names = json.loads((dataset / "classes.json").read_text())
    assert names == {"class_0": "circle moving right", "class_1": "circle moving left", "class_2": "circle moving down"}


def test_captions_name_all_attributes_and_texts_do_not_give_the_label(dataset):
    rows = [json.loads(line) for line in (dataset / "train" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        assert len(set(row["caption"])) == 5
        assert all(attributes_in(caption, LEXICON) == row["attributes"] for caption in row["caption"])
        named = attributes_in(row["text"], LEXICON)
        assert named["motion"] is None and named["shape"] is None


def test_attributes_of_all_wordings_and_of_other_texts():
    for template, (shape, motion) in itertools.product(TEMPLATES, CLASSES):
        for words in itertools.product(SIZE_WORDS["large"], ["cyan"], SHAPE_WORDS[shape], MOTION_PHRASES[motion]):
            caption = template.format(**dict(zip(("size", "colour", "shape", "motion"), words, strict=True)))
            assert attributes_in(caption, LEXICON) == {
                "size": "large",
                "colour": "cyan",
                "shape": shape,
                "motion": motion,
            }
    assert attributes_in("", LEXICON) == dict.fromkeys(("size", "colour", "shape", "motion"))
    assert attributes_in("A RED or blue circle", LEXICON)["colour"] is None  # two colours are ambiguous
    assert attributes_in("A RED thing", LEXICON)["colour"] == "red"


def test_hints_are_true_missing_or_misleading():
    truth = {"size": "small", "colour": "red", "shape": "circle", "motion": "up"}
    true_notes = {HINTS[name][value] for name, value in truth.items()}
    rng = np.random.default_rng(0)
    notes = [dummy_data.write_hint(truth, rng) for _ in range(2000)]
    missing = notes.count("") / 2000
    honest = sum(note in true_notes for note in notes) / 2000
    assert 0.12 < missing < 0.18 and 0.60 < honest < 0.70


def centroid(masks: np.ndarray) -> np.ndarray:
    """Circular mean position (B, T, 2) of masks (B, T, H, W) on the torus, as angles."""
    size = masks.shape[-1]
    wave = np.exp(2j * np.pi * np.arange(size) / size)
    return np.stack([np.angle(masks.sum(2) @ wave), np.angle(masks.sum(3) @ wave)], -1)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_shape_moves_as_its_class_name_says(motion):
    label = CLASSES.index(("square", motion))
    videos, _ = dummy_data.draw_class(label, 12, 16, 64, np.random.default_rng(5))
    spread = videos.astype(float).std(axis=2)  # (B, T, H, W): the background is nearly grey, most shapes are not
    positions = centroid((spread > 40).astype(float))
    steps = np.angle(np.exp(1j * np.diff(positions, axis=1))) * 64 / (2 * np.pi)  # pixels
    steps = np.median(steps[[(s > 40).any() for s in spread]], axis=(0, 1))
    expected = np.array(MOTIONS[motion])
    assert np.allclose(np.sign(np.round(steps)), expected), steps


def test_one_frame_shows_no_motion():
    """The position in any single frame has the same distribution for every motion."""
    for frame in (0, 8, 15):
        means = []
        for motion in MOTIONS:
            rng = np.random.default_rng(3)
            start = rng.uniform(0, 64, (4000, 2))
            speed = rng.uniform(*dummy_data.SPEEDS, (4000, 1))
            positions = dummy_data.trajectories(start, speed * MOTIONS[motion], np.arange(16), 64)[:, frame]
            means.append([*positions.mean(0), *positions.std(0)])
        assert np.ptp(np.array(means), axis=0).max() < 1.5  # pixels; 4000 draws


@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_all_formats_have_the_same_videos(tmp_path, dataset, kind):
    from conftest import read_clip

    dummy_data.main(
        [
            "--classes",
            "2",
            "--videos_per_class",
            "1",
            "--test_per_class",
            "1",
            "--format",
            kind,
            "--output",
            str(tmp_path / "d"),
        ]
    )
    suffix = ".mp4" if kind == "mp4" else ""
    other = read_clip(tmp_path / "d" / "train" / "class_1" / f"video_0{suffix}", 16).float()
    dummy_data.main(
        ["--classes", "2", "--videos_per_class", "1", "--test_per_class", "1", "--output", str(tmp_path / "p")]
    )
    tensor = read_clip(tmp_path / "p" / "train" / "class_1" / "video_0.pt", 16).float()
    assert (other - tensor).abs().mean() < (4 if kind == "mp4" else 1e-9)


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for extra in ([], ["--overwrite"]):
        assert dummy_data.main(["--output", str(tmp_path / "mine"), *extra]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "flags",
    [
        ["--classes", "11"],
        ["--classes", "1"],
        ["--frames", "0"],
        ["--format", "avi"],
        ["--size", "8"],
        ["--size", "33", "--format", "mp4"],
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags):
    assert dummy_data.main([*flags, "--output", str(tmp_path / "d")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_importing_and_help_draw_nothing(tmp_path):
    import os

    path = {"PYTHONPATH": os.getcwd(), "PATH": os.environ["PATH"]}
    for command in (["-c", "import dummy_data"], ["-m", "dummy_data", "--help"]):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True, env=path)
    assert not list(tmp_path.iterdir())
