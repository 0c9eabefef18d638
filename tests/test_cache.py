"""The feature cache: same training as from pixels, no stale features, and a kill loses little work."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import resolved
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import feature_cache
import main
import runs
import score
import train_code
from build_model import build_model
from checkpoint import load_run
from config import ROOT, parse
from feature_cache import FeatureIndex, FeatureStore, compute_missing, open_store, read_features, video_ids
from pretrained import fingerprint
from script import read_rows
from train_code import build_accelerator
from VLoader import Sample, read_splits

FROZEN = ["--freeze_visionbackbone", "True"]
ATTENTIVE = [*FROZEN, "--head", "attentive"]
BERT = [*FROZEN, "--use_vlm", "True", "--language_model", "bert", "--use_text", "True"]
GPT2 = [*FROZEN, "--use_vlm", "True", "--captioning", "True", "--use_lora_llm", "True"]


def train(dataset: Path, folder: Path, *flags: str) -> int:
    argv = ["--data_dir", str(dataset), "--output_dir", str(folder / "runs"), "--cache_dir", str(folder / "cache")]
    return main.main([*argv, "--epochs", "2", "--num_workers", "0", "--batch_size", "4", *flags])


OFTEN = {("classifier", "videomae"), ("attentive", "timesformer"), ("gpt2", "timesformer")}


def log_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "vision, job",
    [
        pytest.param(vision, job, id=f"{name}-{vision}", marks=[pytest.mark.slow] * ((name, vision) not in OFTEN))
        for vision in ("timesformer", "videomae")
        for name, job in (("classifier", FROZEN), ("attentive", ATTENTIVE), ("bert", BERT), ("gpt2", GPT2))
    ],
)
def test_training_from_the_cache_equals_training_from_pixels(dataset, tmp_path, monkeypatch, vision, job):
    """The same clips, batches and captions: the log agrees to 1e-3. Not closer: the features are fp16, 5e-4 off at
    most, and training magnifies that (hence a small rate here; with fp32 features the logs agree to 1e-6)."""
    flags = [*job, "--vision_model", vision, "--learning_rate", "3e-4"]
    assert train(dataset, tmp_path, *flags, "--run_name", "cached") == 0
    original = train_code.build_loaders

    def without_jitter(*args, **kwargs):
        loaders = original(*args, **kwargs)
        if "train" in loaders:
            loaders["train"].dataset.jitter = False
        return loaders

    monkeypatch.setattr(runs, "build_loaders", without_jitter)
    assert train(dataset, tmp_path, *flags, "--run_name", "pixels", "--cache_features", "False") == 0
    for a, b in zip(log_of(tmp_path, "cached"), log_of(tmp_path, "pixels"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)
    model, config, _ = load_run(tmp_path / "runs" / "cached")  # the same weights, tested from pixels
    config, accelerator = resolved(config, model), build_accelerator(config)
    loader = original(model, config, read_splits(dataset))["test"]
    again, rows = train_code.final_scores(model, loader, accelerator, config, "test")
    scores = json.loads((tmp_path / "runs" / "cached" / "metrics.json").read_text())["test"]
    assert scores["loss"] == pytest.approx(again["loss"], rel=1e-3)
    assert scores.get("accuracy") == again.get("accuracy")
    assert [r.get("caption") for r in read_rows(tmp_path / "runs" / "cached" / "predictions_test.jsonl")] == [
        r.get("caption") for r in rows
    ]


def test_later_runs_reuse_the_features_of_the_first(dataset, tmp_path, capsys, monkeypatch):
    """Another head, seed, text setting or language model computes nothing; another token_grid or length does."""
    asked: list[int] = []
    original = feature_cache.features_of
    monkeypatch.setattr(feature_cache, "features_of", lambda e, p, *a: asked.append(len(p)) or original(e, p, *a))
    small = ["--epochs", "1", "--image_size", "32", "--run_name"]
    assert train(dataset, tmp_path, *FROZEN, *small, "a") == 0
    assert sum(asked) == 18
    asked.clear()
    for number, flags in enumerate((BERT, GPT2, [*FROZEN, "--seed", "3", "--dropout", "0"])):
        assert train(dataset, tmp_path, *flags, *small, f"b{number}") == 0
    assert not asked and "18 of 18 videos in" in capsys.readouterr().out
    assert train(dataset, tmp_path, *FROZEN, "--token_grid", "1", *small, "c") == 0
    assert train(dataset, tmp_path, *FROZEN, "--num_frames", "4", *small, "d") == 0
    assert train(dataset, tmp_path, *FROZEN, "--frame_stride", "2", *small, "e") == 0
    assert sum(asked) == 3 * 18


@pytest.fixture
def parts(dataset, tmp_path):
    """(store of an empty folder, model, splits, resolved config, accelerator)."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    config, _ = parse(
        ["--data_dir", str(data), "--cache_dir", str(tmp_path / "cache"), *FROZEN, "--num_workers", "0"], "main"
    )
    model = build_model(config, 3)
    config = resolved(replace(config, batch_size=4), model)
    accelerator = build_accelerator(config)
    return open_store(model, config, accelerator), model, read_splits(data), config, accelerator


def test_a_changed_video_is_computed_again_and_never_read_stale(parts):
    store, model, splits, config, accelerator = parts
    assert compute_missing(store, model, splits, config, accelerator) == {}
    before = read_features(store, splits, config)["test"][0]
    sample = splits.test[0]
    info = sample.path.stat()
    torch.save(255 - torch.load(sample.path, weights_only=True), sample.path)  # the same size
    os.utime(sample.path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert store.index.find(video_ids([sample])).tolist() == [-1]
    fresh = open_store(model, config, accelerator)
    assert compute_missing(fresh, model, splits, config, accelerator) == {}
    after = read_features(fresh, splits, config)["test"][0]
    assert not torch.allclose(before, after)
    with torch.no_grad():
        clip = model.vision_encoder.preprocessing.pixels(torch.load(sample.path, weights_only=True)[1::2])
        expected = model.vision_encoder.features(clip[None], config.token_grid)[0]
    assert torch.allclose(after.float(), expected, atol=2e-3)


def test_moved_and_copied_videos_hit_the_cache_and_frames_rewritten_in_place_miss_it(tmp_path, capsys, monkeypatch):
    """The size and time of a frame folder do not change when its images are rewritten."""
    from PIL import Image

    def draw(folder: Path, shade: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(4):
            Image.fromarray(np.full((16, 16, 3), shade + number, np.uint8)).save(folder / f"{number}.bmp")

    for place in range(8):
        draw(tmp_path / "data" / "train" / "ab"[place % 2] / f"v{place}", 20 * place)
    asked: list[int] = []
    original = feature_cache.features_of
    monkeypatch.setattr(feature_cache, "features_of", lambda e, p, *a: asked.append(len(p)) or original(e, p, *a))
    flags = [*FROZEN, "--image_size", "16", "--num_frames", "2", "--epochs", "1"]
    assert train(tmp_path / "data", tmp_path, *flags, "--run_name", "a") == 0 and sum(asked) == 8
    asked.clear()
    shutil.move(tmp_path / "data", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for name in ("moved", "copied"):
        assert train(tmp_path / name, tmp_path, *flags, "--run_name", name) == 0
    assert not asked and "8 of 8 videos in" in capsys.readouterr().out
    draw(tmp_path / "moved" / "train" / "a" / "v0", 200)
    assert train(tmp_path / "moved", tmp_path, *flags, "--run_name", "rewritten") == 0
    assert sum(asked) == 1 and "7 of 8 videos in" in capsys.readouterr().out


def test_another_backbone_has_another_store(parts):
    store, model, _, config, accelerator = parts
    with torch.no_grad():
        next(model.vision_encoder.backbone.parameters()).add_(1e-3)
    model.sources["vision"].fingerprint = fingerprint(model.vision_encoder.backbone)
    assert open_store(model, config, accelerator).folder != store.folder
    assert open_store(model, replace(config, token_grid=1), accelerator).folder != store.folder


@pytest.mark.parametrize("length", [8, 100])
def test_other_sampled_frames_have_another_store(parts, monkeypatch, length):
    """A change of the sampling itself, even if it concerns only short or only long videos."""
    store, model, _, config, accelerator = parts
    assert open_store(model, config, accelerator).folder == store.folder
    original = feature_cache.sample_indices
    monkeypatch.setattr(
        feature_cache, "sample_indices", lambda n, *args: original(n, *args) // (1 + ((n < 50) == (length < 50)))
    )
    assert open_store(model, config, accelerator).folder != store.folder


def test_damaged_and_unfinished_shards_are_ignored(parts):
    store, model, splits, config, accelerator = parts
    compute_missing(store, model, splits, config, accelerator)
    shard = next(store.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    (store.folder / "1-1.safetensors.tmp").write_bytes(b"half")
    again = open_store(model, config, accelerator)
    assert len(again.shards) == 0
    assert compute_missing(again, model, splits, config, accelerator) == {}
    assert (again.index.find(video_ids(splits.train)) >= 0).all()


SHARD = {"ids": torch.zeros(2, 16, dtype=torch.uint8), "features": torch.zeros(2, 3, 4, dtype=torch.float16)}
FOREIGN = {
    "another width": SHARD | {"features": torch.zeros(2, 3, 5, dtype=torch.float16)},
    "fewer rows": SHARD | {"features": torch.zeros(1, 3, 4, dtype=torch.float16)},
    "another type": SHARD | {"features": torch.zeros(2, 3, 4)},
    "bfloat16": SHARD | {"features": torch.zeros(2, 3, 4, dtype=torch.bfloat16)},
    "short ids": SHARD | {"ids": torch.zeros(2, 8, dtype=torch.uint8)},
    "ids of another type": SHARD | {"ids": torch.zeros(2, 16, dtype=torch.int64)},
    "flat ids": SHARD | {"ids": torch.zeros(16, dtype=torch.uint8)},
    "a number": SHARD | {"ids": torch.tensor(1, dtype=torch.uint8)},
    "more tensors": SHARD | {"more": torch.zeros(1)},
    "no features": {"ids": SHARD["ids"]},
    "no ids": {"features": SHARD["features"]},
    "nothing": {},
}


@pytest.mark.parametrize("case", [*FOREIGN, "fifo", "folder", "text", "dangling"])
def test_files_that_are_not_shards_of_this_store_are_ignored(tmp_path, case):
    path = tmp_path / "1.safetensors"
    if case in FOREIGN:
        save_file(FOREIGN[case], path)
    elif case == "fifo":
        os.mkfifo(path)
    elif case == "folder":
        path.mkdir()
    elif case == "text":
        path.write_text("no shard")
    else:
        path.symlink_to("nowhere")
    save_file(SHARD | {"ids": SHARD["ids"] + 1}, tmp_path / "2.safetensors")  # as older versions wrote them: no digest
    store = FeatureStore(tmp_path, {}, (3, 4))
    assert [*store.ignored] == [path]
    assert (store.find(SHARD["ids"].numpy()) == -1).all() and (store.find(SHARD["ids"].numpy() + 1) >= 0).all()


@pytest.mark.parametrize("damage", ["features exchanged", "ids exchanged", "one bit"])
def test_changed_shards_are_noticed_and_their_videos_computed_again(parts, capsys, damage):
    """The files are complete and well-formed, but their values are wrong."""
    store, model, splits, config, accelerator = parts
    compute_missing(store, model, splits, config, accelerator)
    expected = torch.stack([read_features(store, splits, config)["train"][i] for i in range(len(splits.train))])
    shard = next(store.folder.glob("*.safetensors"))
    with safe_open(shard, framework="pt") as stored:
        tensors, header = {name: stored.get_tensor(name) for name in ("ids", "features")}, stored.metadata()
    if damage == "one bit":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        name = damage.split()[0]
        save_file(tensors | {name: tensors[name].flip(0).contiguous()}, shard, metadata=header)
    again = open_store(model, config, accelerator)
    capsys.readouterr()
    assert compute_missing(again, model, splits, config, accelerator) == {}
    out = capsys.readouterr().out
    assert f"ignored 1 damaged or foreign file, for example {shard}" in out and "0 of 18 videos in" in out
    found = read_features(again, splits, config)["train"]
    assert torch.equal(torch.stack([found[i] for i in range(len(splits.train))]), expected)


def test_only_shards_that_are_used_are_read(tmp_path, monkeypatch):
    """At the start only the ids are read, and then the features of one shard out of three."""
    store = FeatureStore(tmp_path, {}, (3, 4))
    ids = [np.full((2, 16), number, np.uint8) for number in range(3)]
    for part in ids:
        store.write(part, [torch.ones(3, 4).half(), torch.zeros(3, 4).half()])
    checked: list[Path] = []
    original = FeatureStore.is_intact
    monkeypatch.setattr(FeatureStore, "is_intact", lambda s, path: checked.append(path) or original(s, path))
    store = FeatureStore(tmp_path, {}, (3, 4))
    for _ in range(2):
        assert (store.find(ids[1]) >= 0).all()
    assert checked == [store.shards[store.find(ids[1])[0] >> 32]]


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".1.safetensors.{platform.node()}.{dead.pid}.tmp"
    own = tmp_path / f".2.safetensors.{platform.node()}.{os.getpid()}.tmp"
    for folder in (left, own):
        folder.mkdir()
        (folder / "half").touch()
    FeatureStore(tmp_path, {}, (3, 4))
    assert not left.exists() and own.exists()


def test_unreadable_videos_are_named_or_left_out(dataset, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    broken = data / "train" / "class_1" / "video_1.pt"
    broken.write_bytes(b"no tensor")
    assert train(data, tmp_path, *FROZEN, "--run_name", "r") == 2
    assert f"cannot read {broken}" in capsys.readouterr().err
    assert train(data, tmp_path, *FROZEN, "--run_name", "r", "--skip_unreadable", "True") == 0
    metrics = json.loads((tmp_path / "runs" / "r" / "metrics.json").read_text())
    assert len(metrics["skipped"]) == 1 and str(broken) in metrics["skipped"][0]


def test_a_killed_extraction_continues_after_its_last_shard(dataset, tmp_path, monkeypatch, capsys):
    """SIGKILL while features are computed: the second run computes only those missing from finished shards."""
    code = (
        "import sys, time, feature_cache, main\n"
        "feature_cache.SHARD = 4\n"
        "original = feature_cache.features_of\n"
        "feature_cache.features_of = lambda *a: (time.sleep(0.3), original(*a))[1]\n"
        "sys.exit(main.main(sys.argv[1:]))\n"
    )
    argv = ["--data_dir", str(dataset), "--output_dir", str(tmp_path / "runs"), "--cache_dir", str(tmp_path / "cache")]
    argv += ["--num_workers", "0", "--batch_size", "2", "--epochs", "1", *FROZEN]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list((tmp_path / "cache").glob("*/*.safetensors"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = 4 * len(list((tmp_path / "cache").glob("*/*.safetensors")))
    assert 8 <= finished < 18
    asked: list[int] = []
    original = feature_cache.features_of
    monkeypatch.setattr(feature_cache, "features_of", lambda e, p, *a: asked.append(len(p)) or original(e, p, *a))
    assert main.main(argv) == 0
    assert sum(asked) == 18 - finished
    assert f"{finished} of 18 videos in" in capsys.readouterr().out


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=60),
    st.integers(1, 5),
    st.lists(st.integers(0, 500), max_size=30),
)
def test_the_index_finds_exactly_what_was_added(names, shards, asked):
    def ids(numbers):
        return video_ids([Sample(Path(), digest=f"{n:032x}"[::-1]) for n in numbers])

    parts = [part for part in np.array_split(np.array(names), shards) if len(part)]
    index, where = FeatureIndex(), {}
    for number, part in enumerate(parts):
        index.add([(number, ids(part))])
        for row, name in enumerate(part):
            where.setdefault(int(name), (number << 32) + row)
    found = index.find(ids(asked)).tolist()
    for name, place in zip(asked, found, strict=True):
        if name in where:
            number, row = place >> 32, place & 0xFFFFFFFF
            assert parts[number][row] == name
        else:
            assert place == -1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--cache_features", "True"], "needs --freeze_visionbackbone True"),
        (["--cache_features", "True", *FROZEN, "--augment", "light"], "--augment none"),
        (["--cache_features", "True", *FROZEN, "--use_lora_vision", "True"], "without LoRA"),
        ([*FROZEN, "--cache_dir", "/dev/null/x"], "cannot create the folder"),
    ],
)
def test_an_impossible_cache_is_an_error(dataset, tmp_path, capsys, flags, words):
    argv = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache"), *flags]
    assert main.main(argv) == 2
    assert words in capsys.readouterr().err


def test_auto_caches_only_features_that_never_change(dataset, tmp_path):
    for number, flags in enumerate(
        (["--use_lora_vision", "True"], [*FROZEN, "--flip", "True"], [*FROZEN, "--augment", "light"])
    ):
        small = ["--epochs", "1", "--image_size", "32", "--run_name", f"r{number}"]
        assert train(dataset, tmp_path, *flags, *small) == 0
    assert not (tmp_path / "cache").exists()


def test_several_test_views_are_read_from_pixels(dataset, tmp_path):
    assert train(dataset, tmp_path, *FROZEN, "--run_name", "r") == 0
    assert score.main(["--checkpoint", str(tmp_path / "runs" / "r"), "--test_clips", "2"]) == 0
    metrics = json.loads((tmp_path / "runs" / "r" / "metrics.json").read_text())
    assert metrics["test"]["views"] == {"clips": 2, "crops": 1} and metrics["test"]["count"] == 6
    assert (tmp_path / "cache").is_dir()


def test_resuming_a_cached_run_is_exact(dataset, tmp_path):
    """Stopped by a signal in the second epoch and resumed, it has the log and weights of an uninterrupted run."""
    flags = [*BERT, "--epochs", "3", "--save_every", "1"]
    assert train(dataset, tmp_path, *flags, "--run_name", "whole") == 0
    original = train_code.train_one_epoch

    def stop_in_second(model, loader, engine):
        if engine.progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, loader, engine)

    train_code.train_one_epoch = stop_in_second
    try:
        assert train(dataset, tmp_path, *flags, "--run_name", "stopped") == 128 + signal.SIGTERM
    finally:
        train_code.train_one_epoch = original
    assert train(dataset, tmp_path, "--run_name", "stopped", "--resume", "True", *flags) == 0
    weights = [(tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    timed = ("seconds", "clips_per_second")
    logs = [
        [{k: v for k, v in row.items() if k not in timed} for row in log_of(tmp_path, n)] for n in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]


# -- caches that travel -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory):
    """(folder with a dataset without val/, a run and its cache; a pack of the dataset)."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(dataset, folder / "data")
    shutil.rmtree(folder / "data" / "val")
    assert train(folder / "data", folder, *BERT, "--run_name", "r") == 0
    assert feature_cache.main(pack_flags(folder)) == 0
    return folder, folder / "pack.zip"


def pack_flags(folder: Path) -> list[str]:
    return f"pack --data_dir {folder / 'data'} --cache_dir {folder / 'cache'} --output {folder / 'pack.zip'}".split()


def scores_of(run: Path) -> dict:
    passing = ("seconds", "seconds_per_epoch", "peak_mb")
    return {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k not in passing}


def test_a_pack_trains_like_its_videos(packed, tmp_path, capsys):
    """On a machine without the videos: the same weights, scores and answers, bit for bit."""
    folder, pack = packed
    shutil.copy(pack, tmp_path / "p")
    argv = ["merge", str(tmp_path / "p"), "--cache_dir", str(tmp_path / "cache"), "--data_dir", str(tmp_path / "data")]
    assert feature_cache.main(argv) == 0
    assert "added features of 15 videos" in capsys.readouterr().out
    assert not [*(tmp_path / "data").rglob("*.pt")]
    assert train(tmp_path / "data", tmp_path, *BERT, "--run_name", "r") == 0
    assert "15 of 15 videos in" in capsys.readouterr().out
    one, other = folder / "runs" / "r", tmp_path / "runs" / "r"
    assert scores_of(one) == scores_of(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    rows = [read_rows(run / "predictions_test.jsonl") for run in (one, other)]
    for a, b in zip(*rows, strict=True):
        assert a | {"file": ""} == b | {"file": ""} and Path(a["file"]).name == Path(b["file"]).name
    data = [json.loads((run / "metadata.json").read_text())["data"] for run in (one, other)]
    assert data[0] == data[1]  # a run may even be resumed elsewhere


def test_packing_and_merging_again_changes_nothing(packed, tmp_path, capsys):
    folder, pack = packed
    before = pack.read_bytes()
    assert feature_cache.main(pack_flags(folder)) == 0 and pack.read_bytes() == before
    files = {path.name for path in folder.glob("cache/*/*")}
    assert feature_cache.main(["merge", str(pack), "--cache_dir", str(folder / "cache")]) == 0
    assert feature_cache.main(["merge", str(folder / "cache"), "--cache_dir", str(folder / "cache")]) == 0
    assert capsys.readouterr().out.count("added features of 0 videos") == 2
    assert {path.name for path in folder.glob("cache/*/*")} == files
    for source in (pack, folder / "cache"):
        assert feature_cache.main(["info", str(source)]) == 0
        out = capsys.readouterr().out
        assert ": 15 videos, 1 shard, " in out and "num_frames: 8" in out
        assert feature_cache.main(["verify", str(source)]) == 0
        assert "features of 15 videos are intact" in capsys.readouterr().out


def test_merging_caches_keeps_every_video_once(tmp_path, capsys):
    """Of two caches that share a video."""
    description = {"backbone": "somewhere", "fingerprint": "f"}
    folders = [tmp_path / name / feature_cache.key_of(description) for name in "ab"]
    ids, features = (
        np.arange(48, dtype=np.uint8).reshape(3, 16),
        [torch.full((3, 4), n).half() for n in (1.0, 2.0, 3.0)],
    )
    FeatureStore(folders[0], description, (3, 4)).write(ids[:2], features[:2])
    FeatureStore(folders[1], description, (3, 4)).write(ids[1:], features[1:])
    assert feature_cache.main(["merge", str(tmp_path / "a"), "--cache_dir", str(tmp_path / "b")]) == 0
    assert "added features of 1 video " in capsys.readouterr().out
    merged = FeatureStore(folders[1], description, (3, 4))
    assert sorted(len(merged.read_ids(path)) for path in merged.shards) == [1, 2]
    assert [merged.read(number)[0, 0].item() for number in merged.find(ids)] == [1, 2, 3]


def test_verify_names_damaged_shards_and_merge_leaves_them_out(packed, tmp_path, capsys):
    folder, pack = packed
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (shard,) = tmp_path.glob("cache/*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert feature_cache.main(["verify", str(tmp_path / "cache")]) == 1
    out = capsys.readouterr().out
    assert f"damaged: {shard.name}" in out and "features of 0 videos are intact" in out
    assert feature_cache.main(["merge", str(tmp_path / "cache"), "--cache_dir", str(tmp_path / "new")]) == 1
    assert f"damaged: {shard.name}" in capsys.readouterr().out and not [*tmp_path.glob("new/*/*.safetensors")]
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "p").write_bytes(content)
    assert feature_cache.main(["verify", str(tmp_path / "p")]) == 2
    assert f"cannot read {tmp_path / 'p'}" in capsys.readouterr().err


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "{}")
    return path


def test_only_packs_are_read(packed, tmp_path, capsys):
    """No file of an archive is written under a name that it chose."""
    folder, pack = packed
    for number, name in enumerate(("../../evil", "data/train/../../evil", "features/0123456789abcdef/x.py", "/etc/x")):
        argv = ["merge", str(archive(tmp_path / str(number), name)), "--cache_dir", str(tmp_path / "cache")]
        assert feature_cache.main(argv) == 2
        assert "is not a pack of features" in capsys.readouterr().err
    (tmp_path / "text").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "4", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("features/0123456789abcdef/a.safetensors", bytes(1000))
    archive(tmp_path / "5", "features/0123456789abcdef/a.safetensors")
    for argv, words in (
        (["merge", str(tmp_path / "4")], "is not a pack of features"),
        (["verify", str(tmp_path / "5")], "There is no item named 'features/0123456789abcdef/about.json'"),
        (["merge", str(tmp_path / "text")], "cannot read"),
        (["info", str(tmp_path / "none")], "no such file or folder"),
        (["merge", str(pack), "--data_dir", str(folder)], "exists already"),
        (["merge", str(folder / "cache"), "--data_dir", str(tmp_path / "d")], "needs a pack"),
        (["pack", "--data_dir", str(folder / "data"), "--output", "p", "--cache_dir", str(tmp_path)], "extract.py"),
        (["pack", "--data_dir", str(tmp_path), "--output", "p"], "has neither train/"),
    ):
        assert feature_cache.main(argv) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4", "5", "text"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ([*FROZEN, "--num_frames", "4"], "15 videos not found"),
        ([*FROZEN, "--controls", "True"], "--controls True needs the videos"),
        ([], "No such file or directory"),
    ],
)
def test_what_needs_the_videos_says_so(packed, tmp_path, capsys, flags, words):
    _, pack = packed
    argv = ["merge", str(pack), "--cache_dir", str(tmp_path / "cache"), "--data_dir", str(tmp_path / "data")]
    assert feature_cache.main(argv) == 0
    assert train(tmp_path / "data", tmp_path, *flags, "--run_name", "r") == 2
    assert words in capsys.readouterr().err
    row = tmp_path / "data" / "test" / "metadata.jsonl"
    row.write_text(row.read_text().replace('"video_digest": "', '"video_digest": "x', 1))
    assert train(tmp_path / "data", tmp_path, *flags, "--run_name", "r") == 2
    assert "video_digest must be 32 hex digits" in capsys.readouterr().err
