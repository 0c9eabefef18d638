"""Augmentation: all frames of a clip change alike, labels are mixed like pixels, and preview shows the result."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import in_full
from PIL import Image

import preview
from build_model import build_model
from config import parse
from extras import augment
from extras.augment import Augment
from script import UserError
from train_code import build_loaders
from VLoader import read_splits


def still_batch(count: int = 12, times: int = 4, size: int = 32) -> dict[str, torch.Tensor]:
    """Clips in which every frame is the same image."""
    pictures = torch.randint(
        0, 256, (count, 1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return {"video": pictures.expand(-1, times, -1, -1, -1).contiguous(), "labels": torch.arange(count)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("level, flip", [("light", False), ("strong", False), ("none", True), ("strong", True)])
def test_all_frames_of_a_clip_change_alike(level, flip):
    batch = still_batch()
    changed = Augment(level, flip)(batch)["video"]
    assert changed.dtype == torch.uint8 and changed.shape == batch["video"].shape
    assert (changed == changed[:, :1]).all()
    different = (changed != batch["video"]).flatten(1).any(1)
    assert different.float().mean() >= (0.25 if level == "none" else 0.9)
    assert len({clip.numpy().tobytes() for clip in changed - batch["video"]}) > 4  # one draw per clip


def test_none_changes_nothing_and_draws_nothing():
    batch, state = still_batch(), torch.get_rng_state()
    assert torch.equal(Augment("none", False)(batch)["video"], batch["video"])
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_mirrors_and_nothing_else_does():
    batch = still_batch(40)
    video = batch["video"]
    flipped = Augment("none", True)(batch)["video"]
    mirrored = (flipped == video.flip(-1)).flatten(1).all(1)
    same = (flipped == video).flatten(1).all(1)
    assert (mirrored ^ same).all() and 5 < mirrored.sum() < 35


@pytest.mark.parametrize("level", ["light", "strong"])
def test_no_mirror_and_no_rotation_without_flip(level, monkeypatch):
    """A bright left half stays left and a bright upper half stays up, whatever else is drawn."""
    monkeypatch.setattr(augment, "mix", lambda batch: batch)
    monkeypatch.setattr(augment, "erase", lambda video: video)
    video = torch.full((200, 1, 3, 32, 32), 40, dtype=torch.uint8)
    video[:100, ..., :16] = 200
    video[100:, ..., :16, :] = 200
    changed = Augment(level, False)({"video": video, "labels": torch.zeros(200, dtype=torch.long)})["video"].float()
    contrast = torch.cat(
        [
            changed[:100, ..., :8].mean((1, 2, 3, 4)) - changed[:100, ..., -8:].mean((1, 2, 3, 4)),
            changed[100:, ..., :8, :].mean((1, 2, 3, 4)) - changed[100:, ..., -8:, :].mean((1, 2, 3, 4)),
        ]
    )
    # solarize may invert the brightness, but nothing may mirror the image
    assert (contrast > 0).float().mean() == 1 if level == "light" else (contrast > 0).float().mean() > 0.8


def test_a_crop_of_the_whole_image_changes_nothing():
    video = still_batch()["video"]
    assert torch.equal(augment.crop(video, least_area=1.0, aspect=1.0), video)
    ramp = torch.arange(64, dtype=torch.uint8).expand(50, 1, 3, 64, 64).contiguous()
    cropped = augment.crop(ramp, least_area=0.5, aspect=4 / 3).float()[:, 0, 0, 0]  # (B, W)
    width = (cropped[:, -1] - cropped[:, 0]) / 63
    assert (cropped.diff() >= 0).all() and width.min() >= 0.5**0.5 / (4 / 3) ** 0.5 - 0.03 and width.max() <= 1


def test_erasing_paints_a_quarter_of_the_clips_in_one_colour():
    video = torch.full((400, 2, 3, 20, 20), 7, dtype=torch.uint8)
    changed = augment.erase(video)
    touched = (changed != 7).any(dim=2).flatten(1)  # of each pixel
    share = touched.float().mean(1)
    assert 0.15 < (share > 0).float().mean() < 0.35 and share.max() <= 0.4
    assert (video == 7).all()  # not in place
    for clip in changed[share > 0]:
        assert len(clip.permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)) == 2


def test_labels_are_mixed_like_the_pixels():
    """Every pixel of clip k has the value k, so the pixels show which clips were mixed and how much."""
    ways = set()
    for _ in range(20):
        video = (20 * torch.arange(8, dtype=torch.uint8)).view(8, 1, 1, 1, 1).expand(8, 2, 3, 40, 40).contiguous()
        mixed = augment.mix({"video": video, "labels": torch.arange(8)})
        assert (mixed["mix"] >= 0.5).all() and (mixed["mix"] <= 1).all()
        expected = 20 * (mixed["mix"] * mixed["labels"] + (1 - mixed["mix"]) * mixed["mixed_labels"])
        assert torch.allclose(mixed["video"].float().mean((1, 2, 3, 4)), expected, atol=0.5)
        ways.add(max(len(clip.unique()) for clip in mixed["video"]))
    assert ways == {1, 2}  # mixup gives one new value, cutmix keeps both old ones


def test_only_classifiers_without_text_are_mixed():
    batch = still_batch()
    assert "mix" in Augment("strong", False)(batch)
    text = torch.ones(12, 3, dtype=torch.long)
    assert "mix" not in Augment("strong", False)(batch | {"input_ids": text})
    assert "mix" not in Augment("strong", False)({"video": batch["video"], "input_ids": text})


def test_the_same_seed_draws_the_same():
    states = [(torch.manual_seed(3), Augment("strong", True)(still_batch()))[1] for _ in range(2)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_strong_without_kornia_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extra.txt"):
        Augment("strong", False)


def test_preview_without_a_readable_video_is_one_line(tmp_path, capsys):
    for name in ("a/0.mp4", "a/1.mp4", "b/0.mp4", "b/1.mp4"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"broken")
    argv = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    assert preview.main([*argv, "--skip_unreadable", "True"]) == 2
    assert "no training video can be read; the first error: cannot read" in capsys.readouterr().err


def test_preview_shows_what_the_model_sees(dataset, tmp_path, capsys):
    flags = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--num_workers", "0", "--num_frames", "4"]
    with in_full():
        assert preview.main([*flags, "--count", "3"]) == 0
        assert preview.main([*flags, "--count", "3", "--augment", "light", "--run_name", "other"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preview_other.png", "preview_timesformer.png"]  # no run
    plain, changed = (np.asarray(Image.open(tmp_path / f"preview_{n}.png")) for n in ("timesformer", "other"))
    assert plain.shape == changed.shape == (3 * (128 + 22), max(4 * 130, 640), 3)
    # the first row starts with the first frame of the first clip of epoch 1
    config, _ = parse(flags, "main")
    model = build_model(config, 3)
    config = replace(config, num_frames=4, frame_stride=0, batch_size=16)
    batch = next(iter(build_loaders(model, config, read_splits(dataset))["train"]))
    frame = Image.fromarray(batch["video"][0, 0].permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.BICUBIC)
    assert (plain[22:150, :128] == np.asarray(frame)).all() and (plain != changed).any()
    assert "3 training clips, 4 frames each" in capsys.readouterr().out
