"""The doctor passes a healthy setup, and finds each sabotage with the right check."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import build_model
import doctor
import vision

FROZEN = ["--freeze_visionbackbone", "True"]  # fast
HEALTHY = {
    "classifier": [],
    "lora": ["--vision_model", "videomae", "--use_lora_vision", "True"],
    "text": ["--use_vlm", "--use_text", "True", "--freeze_visionbackbone", "True"],
    "captioner": ["--use_vlm", "--captioning", "--freeze_visionbackbone", "True", "--use_lora_llm", "True"],
}


def examine(data: Path, tmp_path: Path, *flags: str) -> int:
    argv = ["--data_dir", str(data), "--output_dir", str(tmp_path / "runs"), "--num_workers", "0"]
    argv += ["--image_size", "32", "--num_frames", "4"]  # eight times as fast
    status = doctor.main([*argv, *flags])
    assert not (tmp_path / "runs").exists()  # it leaves nothing behind
    return status


@pytest.mark.parametrize("job", HEALTHY)
def test_a_healthy_setup_passes(dataset, tmp_path, capsys, job):
    assert examine(dataset, tmp_path, *HEALTHY[job]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and f"all {10 if job == 'captioner' else 11} checks passed" in out


@pytest.fixture
def data(dataset, tmp_path) -> Path:
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data"


def failed_checks(out: str) -> list[str]:
    return [line.removeprefix("FAIL").strip().split("  ")[0] for line in out.splitlines() if line.startswith("FAIL")]


def dead_adapter(monkeypatch, data: Path) -> list[str]:
    """A layer that bypasses its adapter, as in transformers before 5.6 with VideoMAE's queries."""
    original = build_model.add_lora

    def add_lora(backbone, rank):
        original(backbone, rank)
        adapter = next(m for n, m in build_model.adapters(backbone) if n.endswith("query"))
        adapter.forward = adapter.get_base_layer().forward

    monkeypatch.setattr(build_model, "add_lora", add_lora)
    return HEALTHY["lora"]


def wrong_mean(monkeypatch, data: Path) -> list[str]:
    original = build_model.load_vision

    def load_vision(*args):
        encoder = original(*args)
        encoder.preprocessing = replace(encoder.preprocessing, mean=(0.0, 0.0, 0.0))
        return encoder

    monkeypatch.setattr(build_model, "load_vision", load_vision)
    return FROZEN


def leaked_video(monkeypatch, data: Path) -> list[str]:
    shutil.copy(data / "train" / "class_1" / "video_2.pt", data / "test" / "class_1" / "copy.pt")
    return FROZEN


def identical_classes(monkeypatch, data: Path) -> list[str]:
    shutil.copy(data / "train" / "class_1" / "video_2.pt", data / "train" / "class_2" / "copy.pt")
    return FROZEN


def frame_mismatch(monkeypatch, data: Path) -> list[str]:
    """The config keeps the old length, by which TimeSformer's layers reshape."""
    original = vision.fit_embeddings

    def fit_embeddings(backbone, num_frames, image_size):
        before = backbone.config.num_frames
        original(backbone, num_frames, image_size)
        backbone.config.num_frames = before

    monkeypatch.setattr(vision, "fit_embeddings", fit_embeddings)
    return []


def damaged_middle(monkeypatch, data: Path) -> list[str]:
    (data / "train" / "class_0" / "bad.mp4").write_text("no video")
    return FROZEN


def empty_class(monkeypatch, data: Path) -> list[str]:
    (data / "train" / "class_9").mkdir()
    return FROZEN


def no_rate(monkeypatch, data: Path) -> list[str]:
    return ["--learning_rate", "1e-9"]


SABOTAGE = [
    (dead_adapter, "trained tensors get gradients"),
    (wrong_mean, "mean and std are the backbone's"),
    (leaked_video, "val and test share no video with train"),
    (identical_classes, "no video is in two classes"),
    (frame_mismatch, "frames fit the backbone"),
    (damaged_middle, "every frame decodes"),
    (empty_class, "classes have videos"),
    (no_rate, "a batch of 8 can be overfitted"),
]


@pytest.mark.parametrize("sabotage, check", SABOTAGE, ids=[s.__name__ for s, _ in SABOTAGE])
def test_each_sabotage_is_found_by_its_check(data, tmp_path, monkeypatch, capsys, sabotage, check):
    flags = sabotage(monkeypatch, data)
    assert examine(data, tmp_path, *flags) == 1
    out = capsys.readouterr().out
    assert check in failed_checks(out) and "-> " in out
    assert len(failed_checks(out)) == 1, out


def test_odd_files_are_rows_of_the_table(data, tmp_path, capsys):
    for name in ("zz.pt", "zzz.pt"):
        (data / "train" / "class_0" / name).symlink_to("nowhere.pt")
    os.mkfifo(data / "test" / "class_0" / "pipe.mp4")
    assert examine(data, tmp_path, *FROZEN) == 1
    out = capsys.readouterr().out
    assert failed_checks(out) == ["every frame decodes"] and "not in 2 videos: cannot read" in out and "zzz.pt" in out
    assert "pipe.mp4 (a special file)" in out  # not a video: ignored


def test_odd_names_do_not_steer_the_terminal(data, tmp_path, capsys):
    (data / "train" / "class_0" / "a\x1b[31m\n.pt").write_bytes(b"junk")
    assert examine(data, tmp_path, *FROZEN) == 1
    out = capsys.readouterr().out
    assert "a\\x1b[31m\\n.pt" in out and "\x1b" not in out


def test_without_any_readable_video_the_data_is_still_examined(data, tmp_path, capsys):
    for path in (data / "train").rglob("*.pt"):
        path.write_bytes(b"junk " + path.name.encode() + path.parent.name.encode())
    assert examine(data, tmp_path) == 1
    assert "every frame decodes" in failed_checks(capsys.readouterr().out)


def test_a_first_loss_far_from_guessing_is_found(data, tmp_path, monkeypatch, capsys):
    original = build_model.VideoClassifier.__init__

    def init(self, *args):
        original(self, *args)
        torch.nn.init.normal_(self.head.weight, std=3.0)

    monkeypatch.setattr(build_model.VideoClassifier, "__init__", init)
    assert examine(data, tmp_path) == 1
    assert "the first loss is at chance level" in failed_checks(capsys.readouterr().out)


def test_videos_without_captions_are_found(data, tmp_path, capsys):
    from doctor import check_captions
    from VLoader import read_splits

    splits = read_splits(data)
    assert not check_captions(splits).advice
    lacking = replace(splits, test=[replace(splits.test[0], captions=())])
    assert "1 video without one, first" in check_captions(lacking).result and check_captions(lacking).advice
