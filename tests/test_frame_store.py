"""The frame store: the frames that it keeps are those it promises, and no run depends on what it held before."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, counting_frames, resolved, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_resume import Killed, assert_same, killed_after

import dummy_data
import feature_cache
import main
import plan
import score
from build_model import VideoModel, build_model
from config import ROOT, Config, parse
from extras import frame_store
from extras.frame_store import POSITIONS, StoredClip, choose, open_frames, store_missing, stored_splits
from readers import Segment, digest, open_video
from scan import prepare_data
from train_code import build_accelerator
from transforms import sample_indices
from VLoader import ClipDataset, Sample, read_splits

LORA = ["--use_lora_vision", "True", "--dropout", "0.3"]
SMALL = ["--image_size", "32", "--num_frames", "4", "--batch_size", "4", "--learning_rate", "1e-3"]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """The classes of `dataset` as mp4 files."""
    folder = tmp_path_factory.mktemp("mp4") / "synthetic_dataset"
    assert dummy_data.main(["--classes", "3", *FEW, "--format", "mp4", "--output", str(folder)]) == 0
    return folder


def setup(data: Path, folder: Path, *flags: str) -> tuple[Config, VideoModel]:
    argv = ["--data_dir", str(data), "--output_dir", str(folder), "--num_workers", "0", *SMALL, "--epochs", "2", *flags]
    config, _ = parse(argv, "main")
    model = build_model(config, 3)
    return resolved(config, model), model


def train(data: Path, folder: Path, *flags: str) -> int:
    argv = ["--data_dir", str(data), "--output_dir", str(folder), "--run_name", "r", "--num_workers", "0", *SMALL]
    return main.main([*argv, "--epochs", "3", *flags])


def shards(folder: Path) -> list[Path]:
    return sorted((folder / ".features" / "frames").glob("*/*.safetensors"))


def fill(data: Path, folder: Path, *flags: str) -> tuple[frame_store.StoredFrames, ClipDataset]:
    """The stored frames of train, and a dataset without them."""
    config, model = setup(data, folder, *flags)
    splits, _, frames = prepare_data(read_splits(data), config, model, build_accelerator(config))
    return frames["train"], dataset_of(splits.train, model, config)


def dataset_of(samples: list[Sample], model: VideoModel, config: Config) -> ClipDataset:
    return ClipDataset(samples, model.vision_encoder.preprocessing, config.num_frames, config.frame_stride, [])


# -- which frames -----------------------------------------------------------------------------------


@given(
    available=st.integers(1, 200), num_frames=st.integers(1, 20), stride=st.integers(-12, 12), seed=st.integers(0, 99)
)
def test_a_draw_is_one_that_training_could_take(available, num_frames, stride, seed):
    """A frame of each segment, in order; or a whole window."""
    indices = np.array([sample_indices(available, num_frames, stride, position=p) for p in POSITIONS["train"]])
    clip = StoredClip(available, np.zeros((*indices.shape, 2)), None)
    drawn = indices[choose(clip, stride, np.random.default_rng(seed)), np.arange(num_frames)]
    assert (np.diff(drawn) >= 0).all()
    if stride > 0 or (stride < 0 and available > (num_frames - 1) * -stride):
        assert drawn.tolist() in indices.tolist()
    elif available >= num_frames:
        edges = np.arange(num_frames + 1) * available / num_frames
        assert (drawn >= edges[:-1].astype(int)).all() and (drawn < np.ceil(edges[1:])).all()
    centred = indices[choose(clip, stride, None), np.arange(num_frames)]
    assert (centred == sample_indices(available, num_frames, stride)).all()


def test_all_three_frames_of_a_segment_are_drawn_independently():
    clip = StoredClip(100, np.zeros((3, 4, 2)), None)
    draws = np.array([choose(clip, 0, np.random.default_rng(seed)) for seed in range(300)])
    assert all(70 < count < 130 for p in range(3) for count in (draws == p).sum(0))
    assert len({*map(tuple, draws)}) > 60  # of 81


def as_jpeg(frame: torch.Tensor) -> torch.Tensor:
    """What a frame [3, H, W] looks like after compression, by PIL alone."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90, subsampling="4:4:4")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@pytest.mark.parametrize("segment", [None, Segment(1.0, 3.0)])
@pytest.mark.parametrize("stride", [0, 2])
def test_stored_frames_are_those_of_the_video(tmp_path, segment, stride):
    """Frame by frame one of the three that the sampling rule gives, after JPEG, and close to the original."""
    path = write_video(tmp_path / "v.mp4", counting_frames(40))
    config, model = setup(tmp_path, tmp_path, "--frame_stride", str(stride))
    samples = [Sample(path, segment=segment)]
    store = open_frames(model, config, "train")
    assert store_missing(store, samples, model, config, build_accelerator(config)) == {}
    dataset = dataset_of(samples, model, config)
    (row,) = store.find(feature_cache.video_ids(samples))
    frames = frame_store.StoredFrames(store, np.array([row]))

    first, count = (0, 40) if segment is None else (10, 20)
    own = [
        open_video(path).frames(first + sample_indices(count, 4, stride, position=p), dataset.preprocessing.pixels)
        for p in (1 / 6, 1 / 2, 5 / 6)
    ]
    expected = torch.stack([torch.stack([as_jpeg(f) for f in clip]) for clip in own])  # [3, T, C, H, W]
    seen = set()
    for seed in range(20):
        clip = frames.clip(dataset, 0, np.random.default_rng(seed))
        matches = [[p for p in range(3) if (clip[t] == expected[p, t]).all()] for t in range(4)]
        assert clip.dtype == torch.uint8 and all(matches)
        seen.add(tuple(m[0] for m in matches))
    assert len(seen) > 10 if stride == 0 else seen == {(p,) * 4 for p in range(3)}
    centred = frames.clip(dataset, 0, None)
    assert (centred == expected[1]).all() and (centred.float() - own[1].float()).pow(2).mean() < 255**2 / 10**3.8


def test_the_key_has_all_that_changes_the_frames_and_nothing_else(videos, tmp_path):
    config, model = setup(videos, tmp_path)
    pixels = model.vision_encoder.preprocessing

    def key(preprocessing=pixels, split="train", **options) -> str:
        model.vision_encoder.preprocessing = preprocessing
        return open_frames(model, replace(config, **options), split).folder.name

    keys = [key(), key(num_frames=8), key(frame_stride=2), key(split="val")]
    keys += [key(replace(pixels, **{k: v})) for k, v in [("image_size", 64), ("resize", (36,)), ("interpolation", "x")]]
    assert len({*keys}) == len(keys)
    assert key(replace(pixels, mean=(0.1, 0.2, 0.3), rescale_factor=1.0), seed=5, learning_rate=1.0) == keys[0]


def test_a_store_follows_the_content_of_videos(videos, tmp_path, monkeypatch):
    """Copied and renamed videos are found; a changed one is stored again."""
    fill(videos, tmp_path / "out")
    data = shutil.copytree(videos, tmp_path / "copy")
    (data / "train" / "metadata.jsonl").unlink()
    old, new = data / "train" / "class_0" / "video_0.mp4", data / "train" / "class_0" / "renamed.mp4"
    old.rename(new)
    write_video(data / "train" / "class_1" / "video_0.mp4", counting_frames(20, 64, 64))
    stored = counted_clips(monkeypatch)
    fill(data, tmp_path / "out")
    assert [path.relative_to(data).as_posix() for path in stored] == ["train/class_1/video_0.mp4"]


def counted_clips(monkeypatch) -> list[Path]:
    """A list to which the path of every compressed video is added."""
    paths: list[Path] = []
    original = frame_store.compress_clip

    def compress_clip(dataset, sample, positions) -> StoredClip:
        paths.append(sample.path)
        return original(dataset, sample, positions)

    monkeypatch.setattr(frame_store, "compress_clip", compress_clip)
    return paths


# -- damage -----------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_shards_are_stored_again(videos, tmp_path, monkeypatch, damage):
    """Only their videos, with the same bytes."""
    monkeypatch.setattr(frame_store, "SHARD", 4)
    monkeypatch.setattr(frame_store, "BATCH", 4)
    frames, dataset = fill(videos, tmp_path)
    before = [frames.clip(dataset, i, np.random.default_rng(i)) for i in range(9)]
    train = [path for path in shards(tmp_path) if path.parent == frames.store.folder]
    assert len(train) == 3
    held = len(frames.store.read_ids(train[0]))
    damage(train[0])
    stored = counted_clips(monkeypatch)
    frames, dataset = fill(videos, tmp_path)
    assert len(stored) == held in (1, 4)
    assert all((frames.clip(dataset, i, np.random.default_rng(i)) == before[i]).all() for i in range(9))
    fill(videos, tmp_path)
    assert len(stored) == held


def test_a_shard_of_another_shape_is_ignored(videos, tmp_path):
    frames, _ = fill(videos, tmp_path)
    other, _ = fill(videos, tmp_path / "other", "--num_frames", "8")
    for path in frames.store.folder.glob("*.safetensors"):
        shutil.copy(shards(tmp_path / "other")[0], path)
    again, _ = fill(videos, tmp_path)
    assert again.store.ignored and again.store.shape == (3, 4) and other.store.shape == (3, 8)


def test_a_store_that_is_deleted_during_a_run_changes_nothing(videos, tmp_path):
    frames, dataset = fill(videos, tmp_path)
    before = [frames.clip(dataset, i, np.random.default_rng(i)) for i in range(9)]
    frames.store.handles.clear()  # as in a worker process that has not opened the shards yet
    shutil.rmtree(frames.store.folder)
    assert all((frames.clip(dataset, i, np.random.default_rng(i)) == before[i]).all() for i in range(9))


# -- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [LORA, pytest.param(["--augment", "light"], marks=pytest.mark.slow)])
def test_a_run_does_not_depend_on_what_the_store_held(videos, tmp_path, monkeypatch, more):
    """Cold without workers; warm with them; half-filled and damaged, killed, damaged again and resumed."""
    monkeypatch.setattr(frame_store, "SHARD", 4)
    monkeypatch.setattr(frame_store, "BATCH", 4)
    assert train(videos, tmp_path / "cold", *more) == 0
    shutil.copytree(tmp_path / "cold" / ".features", tmp_path / "warm" / ".features")
    assert train(videos, tmp_path / "warm", *more, "--num_workers", "2") == 0
    assert_same(tmp_path / "cold" / "r", tmp_path / "warm" / "r")

    shutil.copytree(tmp_path / "cold" / ".features", tmp_path / "half" / ".features")
    for damage, path in zip([flip, Path.unlink], shards(tmp_path / "half"), strict=False):
        damage(path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 4)  # in the second epoch of three steps
        train(videos, tmp_path / "half", *more)
    shutil.rmtree(tmp_path / "half" / ".features")
    assert main.main(["--resume", "True", "--run_name", "r", "--output_dir", str(tmp_path / "half")]) == 0
    assert_same(tmp_path / "cold" / "r", tmp_path / "half" / "r")


def test_scores_are_about_the_videos_themselves(videos, tmp_path, capsys):
    """After every epoch val is read from the store, but what metrics.json says equals what score.py finds."""
    assert train(videos, tmp_path, "--epochs", "2") == 0
    assert "frame store: 9 more videos" in capsys.readouterr().out
    run = tmp_path / "r"
    metrics = json.loads((run / "metrics.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[metrics["best_epoch"] - 1]["val_loss"] != metrics["val"]["loss"]
    assert log[metrics["best_epoch"] - 1]["val_loss"] == pytest.approx(metrics["val"]["loss"], rel=0.05)
    before = len(shards(tmp_path))
    assert score.main(["--checkpoint", str(run), "--output_dir", str(tmp_path / "again"), "--num_workers", "0"]) == 0
    (again,) = (tmp_path / "again").rglob("metrics.json")
    again = json.loads(again.read_text())
    assert again["val"]["loss"] == metrics["val"]["loss"] and again["test"]["loss"] == metrics["test"]["loss"]
    assert len(shards(tmp_path)) == before


@pytest.mark.parametrize(
    "kind, flags, expected",
    [
        ("mp4", [], ("train", "val")),
        ("mp4", LORA, ("train", "val")),
        ("mp4", ["--epochs", "1"], ()),
        ("mp4", ["--preread", "False"], ()),
        ("mp4", ["--freeze_visionbackbone", "True"], ()),
        ("mp4", ["--freeze_visionbackbone", "True", "--augment", "light"], ("train", "val")),
        ("pt", [], ()),
        ("pt", ["--preread", "True"], ("train", "val")),
    ],
)
def test_what_auto_means(videos, dataset, tmp_path, kind, flags, expected):
    data = videos if kind == "mp4" else dataset
    config, model = setup(data, tmp_path, *flags)
    assert stored_splits(read_splits(data), model, config) == expected


def test_an_estimate_reads_stored_frames_too(videos, tmp_path, monkeypatch):
    """It decodes each video once, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.1)
    stored = counted_clips(monkeypatch)
    config = Config(data_dir=str(videos), epochs=7, batch_size=4, num_workers=0, image_size=32, num_frames=4)
    found = plan.try_training(config, time.time())
    assert found.videos == "9 train, 3 val, 6 test" and len(stored) == len({*stored}) == 12
    assert not list(tmp_path.iterdir())


def test_frames_of_tensors_are_stored_on_request(dataset, tmp_path, capsys):
    assert train(dataset, tmp_path, "--preread", "True", "--epochs", "1") == 0
    assert "frame store: 0 of 9 videos" in capsys.readouterr().out and len(shards(tmp_path)) == 2


def refused(capsys) -> str:
    err = capsys.readouterr().err.split("\r")[-1].strip()  # without the progress bars
    assert err.startswith("error: ") and "\n" not in err
    return err


def test_mistakes_are_explained(videos, tmp_path, monkeypatch, capsys):
    frozen = ["--preread", "True", "--freeze_visionbackbone", "True"]
    assert train(videos, tmp_path, *frozen) == 2 and "--cache_features False" in refused(capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert train(videos, tmp_path) == 2 and "--preread False" in refused(capsys)
    assert not shards(tmp_path)


def test_unreadable_videos_stop_the_run_or_are_skipped(videos, tmp_path, capsys):
    data = shutil.copytree(videos, tmp_path / "data")
    broken = data / "train" / "class_0" / "video_1.mp4"
    broken.write_bytes(broken.read_bytes()[:500])
    assert train(data, tmp_path) == 2 and "video_1.mp4" in refused(capsys)
    assert train(data, tmp_path, "--skip_unreadable", "True", "--epochs", "2") == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert len(metrics["skipped"]) == 1 and "video_1.mp4" in metrics["skipped"][0]


def test_videos_that_are_not_here_are_missed_before_training(videos, tmp_path, capsys):
    """metadata.jsonl may give the digest of a video that is elsewhere; frames of it are no replacement."""
    fill(videos, tmp_path)
    data = shutil.copytree(videos, tmp_path / "data")
    metadata = data / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    video = data / "train" / rows[0]["file_name"]
    rows[0]["video_digest"] = digest(video)
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    video.unlink()
    assert train(data, tmp_path) == 2 and "No such file" in refused(capsys)
    assert train(data, tmp_path, "--skip_unreadable", "True", "--epochs", "2") == 0
    assert "skipped 1 unreadable video" in capsys.readouterr().out


def test_info_lists_stored_frames_and_other_commands_leave_them_alone(videos, tmp_path, capsys):
    fill(videos, tmp_path)
    capsys.readouterr()
    for command in ("info", "verify"):
        assert feature_cache.main([command, str(tmp_path / ".features")]) == 0
    out = capsys.readouterr().out
    assert out.count("frames of videos in") == 2 and "1 shard, 0." in out and "features of 0 videos are intact" in out


def started(data: Path, folder: Path, name: str) -> subprocess.Popen:
    argv = ["--data_dir", str(data), "--output_dir", str(folder), "--run_name", name, *SMALL, "--epochs", "2"]
    code = "import main; from extras import frame_store; frame_store.SHARD = frame_store.BATCH = 1; main.main()"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_runs_that_fill_a_store_together_and_kills(videos, tmp_path):
    """Three at once, one of which is killed when it has written a shard; then it is started again."""
    assert started(videos, tmp_path / "alone", "r").wait(300) == 0
    processes = {name: started(videos, tmp_path / "shared", name) for name in "abc"}
    while not shards(tmp_path / "shared"):
        time.sleep(0.01)
    processes["a"].send_signal(signal.SIGKILL)
    assert [p.wait(300) for p in processes.values()] == [-signal.SIGKILL, 0, 0]
    assert started(videos, tmp_path / "shared", "a").wait(300) == 0
    for name in "abc":
        assert_same(tmp_path / "alone" / "r", tmp_path / "shared" / name)
    assert not [p for p in (tmp_path / "shared" / ".features").rglob("*") if "tmp" in p.name]
