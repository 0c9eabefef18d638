"""The dataset is as documented: seeded, without duplicates; the text decides, and nothing else gives the class away."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, read_clip

import dummy_data
import main
from dummy_data import (
    CLASS_NAMES,
    COLOURS,
    LEXICON,
    MOTION_PHRASES,
    MOTIONS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEMPLATES,
    ceilings,
    draw_pair,
    motion_of,
    trajectory,
)
from extras import controls
from metrics import attribute_summary, attributes_in, right_attributes
from VLoader import read_splits


@pytest.fixture(scope="module")
def nine_classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nine") / "d"
    counts = ["--videos_per_class", "12", "--val_per_class", "2", "--test_per_class", "4"]
    assert dummy_data.main([*counts, "--output", str(folder)]) == 0
    return folder


def videos_of(folder):
    return [torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.pt"))]


def rows_of(folder, split="train"):
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def test_the_seed_determines_all_and_no_video_occurs_twice(tmp_path, dataset):
    for name, seed in (("same", "0"), ("other", "1")):
        assert dummy_data.main(["--classes", "3", *FEW, "--seed", seed, "--output", str(tmp_path / name)]) == 0
    ours = videos_of(dataset)
    assert len({video.numpy().tobytes() for video in ours}) == len(ours) == 18
    assert all(map(torch.equal, ours, videos_of(tmp_path / "same")))
    assert not any(map(torch.equal, ours, videos_of(tmp_path / "other")))
    assert rows_of(tmp_path / "same") == rows_of(dataset)


def test_layout(dataset):
    video = torch.load(dataset / "train" / "class_1" / "video_0.pt", weights_only=True)
    assert video.dtype == torch.uint8 and video.shape == (16, 3, 64, 64)
    names = json.loads((dataset / "classes.json").read_text())
    assert names == {"class_0": "moves right", "class_1": "moves left", "class_2": "moves down"}
    assert {path.name for path in dataset.iterdir()} == {"train", "val", "test", "classes.json", "lexicon.json"}


def test_fewer_classes_are_the_first_ones_for_both_objects(dataset):
    motions = {item["motion"] for row in rows_of(dataset) for item in row["attributes"]}
    assert motions == {"right", "left", "down"} and len([*(dataset / "train").iterdir()]) == 4


# -- words ------------------------------------------------------------------------------------------


def test_the_text_names_the_object_whose_motion_is_the_class(nine_classes):
    names = json.loads((nine_classes / "classes.json").read_text())
    assert [*names.values()] == [*CLASS_NAMES.values()]
    rows = rows_of(nine_classes)
    assert len(rows) == 9 * 12 and sum(len(row["objects"]) == 2 for row in rows) == 9 * 6
    assert {item["colour"] for row in rows for item in row["objects"]} == COLOURS.keys()
    for row in rows:
        label = int(row["file_name"].split("/")[0].removeprefix("class_"))
        assert row["attributes"][0]["motion"] == MOTIONS[label]
        for text, item in zip([row["text"], row.get("other_text")], row["attributes"], strict=False):
            named = attributes_in(text, LEXICON)
            assert named["motion"] is None and named["colour"] == (item["colour"] if text else None)
        if len(row["objects"]) == 2:
            assert row["text"] and row["other_text"]
            for attribute in ("colour", "motion"):
                assert row["attributes"][0][attribute] != row["attributes"][1][attribute]


def test_texts_are_missing_in_clips_with_one_object_only():
    rng = np.random.default_rng(0)
    args = argparse.Namespace(classes=9, frames=16)
    for two, share in ((False, 0.15), (True, 0)):
        texts = [dummy_data.write_texts(draw_pair(0, two, args, rng), rng)["text"] for _ in range(800)]
        assert abs(texts.count("") / 800 - share) < 0.04
        assert two or len({text.replace("circle", "disc") for text in texts}) > 50  # the words vary


def test_captions_name_every_object_and_all_of_its_attributes(nine_classes):
    for row in rows_of(nine_classes):
        assert len({*row["caption"]}) == 5
        for caption in row["caption"]:
            assert right_attributes(caption, row["attributes"], LEXICON) == dict.fromkeys([*LEXICON, "all"], True)


def test_every_wording_names_its_attributes():
    for template, shape, motion in itertools.product(TEMPLATES, SHAPE_WORDS, MOTION_PHRASES):
        for words in itertools.product(SIZE_WORDS["large"], ["cyan"], SHAPE_WORDS[shape], MOTION_PHRASES[motion]):
            caption = template.format(**dict(zip(("size", "colour", "shape", "motion"), words, strict=True)))
            truth = {"size": "large", "colour": "cyan", "shape": shape, "motion": motion}
            assert attributes_in(caption, LEXICON) == truth and ";" not in caption
    assert attributes_in("", LEXICON) == dict.fromkeys(("size", "colour", "shape", "motion"))
    assert attributes_in("A RED or blue circle", LEXICON)["colour"] is None  # two colours are ambiguous
    assert attributes_in("A RED thing", LEXICON)["colour"] == "red"


def test_a_caption_with_the_motions_exchanged_is_wrong_about_the_objects_only():
    objects = [
        {"size": "small", "colour": "red", "shape": "circle", "motion": "left"},
        {"size": "large", "colour": "blue", "shape": "square", "motion": "stops"},
    ]
    right = "a huge blue box halts on its way ; a small red disc moves left"  # the order of objects is free
    exchanged = "a huge blue box moves left ; a small red disc halts on its way"
    one_missing = "a small red disc moves left"
    summary = attribute_summary([right, exchanged, one_missing], [objects] * 3, LEXICON)
    everything = summary(np.arange(3))
    assert everything == dict.fromkeys(LEXICON, pytest.approx(2 / 3)) | {"all": pytest.approx(1 / 3)}


# -- motion and pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [8, 16, 33])
def test_a_path_shows_its_motion(frames):
    rng = np.random.default_rng(1)
    args = argparse.Namespace(classes=9, frames=frames)
    for label in range(9):
        for _ in range(50):
            item = draw_pair(label, False, args, rng)[0]
            assert motion_of(trajectory(item, frames)) == MOTIONS[label]
    stands, moves = [0.5, 0.5], [0.6, 0.5]
    assert motion_of(np.array([stands, stands, moves])) is None  # nothing starts late


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_pixels_follow_the_path(motion):
    rng = np.random.default_rng(2)
    args = argparse.Namespace(classes=9, frames=16, size=64)
    item = draw_pair(MOTIONS.index(motion), False, args, rng)[0] | {"colour": "white", "size": "large", "radius": 0.18}
    video = dummy_data.draw_video([item], args, rng)  # (T, C, H, W)
    bright = (video.min(1) > 180).astype(float)  # (T, H, W)
    wave = np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)
    seen = np.stack([np.angle(bright.sum(1) @ wave), np.angle(bright.sum(2) @ wave)], axis=1)  # (T, 2)
    expected = 2 * np.pi * trajectory(item, 16)
    assert np.abs(np.angle(np.exp(1j * (seen - expected)))).max() < 2 * np.pi / 64  # one pixel


def test_place_and_looks_say_nothing_about_the_class():
    rng = np.random.default_rng(3)
    args = argparse.Namespace(classes=9, frames=16)
    labels = np.repeat(np.arange(9), 300)
    items = [draw_pair(label, True, args, rng)[0] for label in labels]
    features = [dummy_data.looks(item) for item in items]
    motions = [item["motion"] for item in items]
    guesses = dummy_data.naive_bayes(features[::2], motions[::2], features[1::2])
    right = np.mean([max(g, key=g.__getitem__) == m for g, m in zip(guesses, motions[1::2], strict=True)])
    assert right < 0.15  # chance is 0.111, with a standard error of 0.009
    speeds = np.array([item["speed"] for item in items]).reshape(9, 300)
    assert np.ptp(speeds.mean(1)) < 0.003  # of 0.025 to 0.05; the standard error of a mean is 0.0004


def test_a_single_frame_shows_no_motion():
    """The place in any frame has the same distribution for every motion."""
    rng = np.random.default_rng(4)
    args = argparse.Namespace(classes=9, frames=16)
    items = [[draw_pair(label, False, args, rng)[0] for _ in range(400)] for label in range(9)]
    places = np.array([[trajectory(item, 16) for item in row] for row in items]) % 1  # (9, 400, T, 2)
    for statistic in (places.mean(1), places.std(1)):
        assert np.ptp(statistic, axis=0).max() < 0.1  # widths of the frame; the standard error of a mean is 0.014


@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_all_formats_have_the_same_videos(tmp_path, dataset, kind):
    few = ["--videos_per_class", "2", "--val_per_class", "1", "--test_per_class", "1"]
    assert dummy_data.main(["--classes", "3", *few, "--format", kind, "--output", str(tmp_path / "d")]) == 0
    folder, suffix = Path("train", "class_1"), ".mp4" if kind == "mp4" else ""
    video = read_clip(tmp_path / "d" / folder / f"video_1{suffix}", 16).float()
    tensor = torch.load(dataset / folder / "video_1.pt", weights_only=True).float()
    assert (video - tensor).abs().mean() < (4 if kind == "mp4" else 1e-9)


# -- ceilings ---------------------------------------------------------------------------------------


def test_ceilings(nine_classes):
    values = ceilings(nine_classes)
    assert values["video and text"] == 1
    assert values["video without text"] == 0.75  # half of the clips have two objects, and one of them is meant
    # played backwards, right is left, down is up and clockwise is counterclockwise; the other three stay as they are
    assert values["frames in any order, and text"] == pytest.approx(6 / 9)
    assert values["frames in any order, without text"] < 0.6
    assert values["one frame, and text"] < 0.35 and values["text alone"] < 0.35  # 36 clips


def test_ceilings_with_fewer_classes(dataset):
    """Right is left backwards, but with three classes nothing moves up, so down is known without order."""
    assert ceilings(dataset)["frames in any order, and text"] == pytest.approx(2 / 3)


def test_ceilings_of_another_dataset_are_one_line(tmp_path, capsys):
    for lines in (None, "", '{"file_name": "a.pt", "label": "x"}\n', "{"):
        if lines is not None:
            (tmp_path / "train").mkdir(exist_ok=True)
            (tmp_path / "train" / "metadata.jsonl").write_text(lines)
        assert dummy_data.main(["--ceilings", "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "draw it first" in error and error.count("\n") == 1


# -- the script -------------------------------------------------------------------------------------


def test_a_run_scores_clips_of_two_objects_with_the_text_of_the_other_one(tmp_path, dataset, monkeypatch):
    scored = []
    evaluate = controls.evaluate
    monkeypatch.setattr(
        controls, "evaluate", lambda model, loader, *a, **k: scored.append(loader) or evaluate(model, loader, *a, **k)
    )
    paths = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--run_name", "run"]
    flags = "--use_vlm True --language_model bert --use_text True --freeze_visionbackbone True"
    more = "--freeze_llmbackbone True --epochs 1 --controls True --num_workers 0 --device cpu"
    assert main.main([*paths, *flags.split(), *more.split()]) == 0

    # the last two evaluations read the same clips, with the text of one object and then of the other
    test = [sample for sample in read_splits(dataset).test if sample.other_text]
    several, other = (loader.dataset.samples for loader in scored[-2:])
    assert [s.path for s in several] == [s.path for s in other] == [s.path for s in test]
    assert [s.text for s in several] == [s.text for s in test] and [s.text for s in other] == [
        s.other_text for s in test
    ]

    # the score of the clips as they are equals that of the run's own predictions
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    table = metrics["controls"]
    assert table["several_objects"]["count"] == table["text_other_object"]["count"] == len(test) == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions_test.jsonl").read_text().splitlines()]
    names = {f"{s.path.parent.name}/{s.path.name}" for s in test}
    right = [row["label"] == row["truth"] for row in rows if "/".join(row["file"].split("/")[-2:]) in names]
    assert len(right) == 3 and table["several_objects"]["accuracy"] == pytest.approx(np.mean(right))


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
        ["--classes", "10"],
        ["--classes", "1"],
        ["--frames", "7"],
        ["--val_per_class", "0"],
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
    path = {"PYTHONPATH": os.getcwd(), "PATH": os.environ["PATH"]}
    for command in (["-c", "import dummy_data"], ["-m", "dummy_data", "--help"]):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True, env=path)
    assert not list(tmp_path.iterdir())
