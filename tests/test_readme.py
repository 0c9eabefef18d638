"""Every command of the README runs: with a small dataset, one epoch, and folders of the test's own."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import counting_frames, read_clip, write_video
from PIL import Image

import convert_dataset
import create_dummy
import dummy_data
import inference
import main
from config import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- test: ([a-z0-9 ]+) -->\n)?```bash\n(.*?)```", README, flags=re.DOTALL)
SCRIPTS = {
    "main.py": main.main,
    "inference.py": inference.main,
    "dummy_data.py": dummy_data.main,
    "create_dummy.py": create_dummy.main,
    "convert_dataset.py": convert_dataset.main,
}


def commands(use: str = "") -> list[list[str]]:
    """The README's python commands for a use (none: the synthetic dataset's) as [script, *flags]; each
    training directly before its inferences."""
    lines = [line for mark, text in BLOCKS if mark == use for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def run(script: str, *flags: str) -> int:
    return SCRIPTS[script](list(flags))


def pairs() -> list[list[list[str]]]:
    """Each training command with the inference commands that follow it."""
    groups: list[list[list[str]]] = []
    for command in commands():
        if command[0] == "main.py":
            groups.append([command])
        elif command[0] == "inference.py":
            groups[-1].append(command)
    return groups


PAIRS = pairs()


def test_the_readme_has_every_promised_command():
    trained = {tuple(group[0][1:]) for group in PAIRS}
    assert len(trained) == 6 + 8 + 6
    assert all(len(group) >= 2 for group in PAIRS)


@pytest.fixture(scope="module")
def frames(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "frames_see"
    assert run("create_dummy.py", "--data_dir", str(dataset), "--output", str(folder), "--per_class", "1") == 0
    return folder


@pytest.mark.parametrize("group", PAIRS, ids=lambda g: " ".join(g[0][1:]).replace("--", ""))
def test_commands_train_and_answer(group, dataset, frames, tmp_path, capsys):
    runs = ["--output_dir", str(tmp_path)]
    assert run(*group[0], "--data_dir", str(dataset), "--epochs", "1", "--num_workers", "0", *runs) == 0
    for command in group[1:]:
        capsys.readouterr()
        assert run(*command, *runs, "--video_dir", str(frames)) == 0
        assert "of 3 right" in capsys.readouterr().out


def test_drawing_commands_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing = [c for c in commands() if c[0] in ("dummy_data.py", "create_dummy.py")]
    assert drawing == [["dummy_data.py"], ["create_dummy.py"]]
    assert [run(*command) for command in drawing] == [0, 0]
    videos = {path: torch.load(path, weights_only=True) for path in Path("synthetic_dataset").rglob("*.pt")}
    assert len(videos) == len({v.numpy().tobytes() for v in videos.values()}) == 1000  # none occurs twice
    rows = [json.loads(line) for line in Path("frames_see/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and all({"label", "caption", "text", "attributes"} <= row.keys() for row in rows)
    for row in rows:
        split, number = row["label"], row["file_name"].removeprefix(f"{row['label']}_")
        original = videos[Path("synthetic_dataset/test", split, f"{number}.pt")]
        assert torch.equal(read_clip(Path("frames_see", row["file_name"]), 16), original)  # RGB stays RGB


# -- one section per use, on a stand-in with the real structure -------------------------------------


def clip(path: str, kind: int) -> None:
    """A video that brightens (kind 0) or darkens."""
    frames = counting_frames(10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_video(Path(path), frames[::-1] if kind else frames, codec="mpeg4")


def make_class_folders() -> None:
    for split in ("train", "test"):
        for index in range(6):
            clip(f"my_clips/{split}/{('jumping', 'running')[index % 2]}/{index}.mp4", index % 2)


def make_csv() -> None:
    for split, count in (("train", 8), ("test", 4)):
        rows = [(f"{split}/{index}.mp4", ("jump", "run")[index % 3 > 0]) for index in range(count)]
        for path, label in rows:
            clip(f"my_videos/{path}", label == "run")
        Path(f"{split}.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))


def make_frames() -> None:
    lines = []
    for index in range(8):
        folder = f"{('jumping', 'running')[index % 2]}/{index:04d}"
        Path("my_frames", folder).mkdir(parents=True)
        for number, frame in enumerate(counting_frames(6 + index), start=1):
            Image.fromarray(frame).save(Path("my_frames", folder, f"img_{number:05d}.jpg"))
        lines.append(f"{folder} 1 {6 + index} {index % 2}\n")
    Path("annotations.txt").write_text("".join(lines))


def make_ucf101() -> None:
    Path("ucfTrainTestlist").mkdir()
    lists: dict[str, list[str]] = {"trainlist01": [], "testlist01": []}
    for number, name in enumerate(("ApplyEyeMakeup", "Archery"), start=1):
        for group in range(1, 5):
            path = f"{name}/v_{name}_g{group:02d}_c01.avi"
            clip(f"UCF-101/{path}", number % 2)
            lists["testlist01" if group == 1 else "trainlist01"].append(path if group == 1 else f"{path} {number}")
    for name, lines in lists.items():
        Path("ucfTrainTestlist", f"{name}.txt").write_text("\n".join(lines) + "\n")


def make_ssv2() -> None:
    Path("labels").mkdir()
    for split, ids in (("train", range(8)), ("validation", range(8, 12))):
        items = []
        for index in ids:
            clip(f"20bn-something-something-v2/{index}.avi", index % 2)
            template = ("Closing [something]", "Pushing [something] from left to right")[index % 2]
            items.append({"id": str(index), "label": "closing a box", "template": template, "placeholders": ["a box"]})
        Path("labels", f"{split}.json").write_text(json.dumps(items))


def make_msrvtt() -> None:
    for name, folder, splits in (
        ("train_val", "TrainValVideo", ["train"] * 6 + ["validate"] * 2),
        ("test", "TestVideo", ["test"] * 2),
    ):
        videos = [{"video_id": f"video_{name}{i}", "split": split, "category": 1} for i, split in enumerate(splits)]
        for index, video in enumerate(videos):
            clip(f"MSRVTT/{folder}/{video['video_id']}.mp4", index % 2)
        sentences = [{"video_id": v["video_id"], "caption": f"a bar is shown {i}"} for v in videos for i in range(3)]
        Path(f"{name}_videodatainfo.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))


USES = {
    "class folders": (make_class_folders, "of 6 right"),
    "csv": (make_csv, "wrote answers.jsonl"),
    "frames": (make_frames, "8 videos in"),
    "ucf101": (make_ucf101, "wrote ucf101.jsonl"),
    "ssv2": (make_ssv2, "wrote ssv2.jsonl"),
    "msrvtt": (make_msrvtt, "wrote captions.jsonl"),
}


def test_every_use_of_the_readme_has_a_stand_in():
    assert {mark for mark, _ in BLOCKS if mark} == USES.keys()


@pytest.mark.parametrize("use", USES)
def test_the_section_s_commands_work(use, tmp_path, monkeypatch, capsys):
    """As they stand; tiny weights stand in for the hub's, and one epoch for ten."""
    monkeypatch.chdir(tmp_path)
    make, words = USES[use]
    make()
    for command in commands(use):
        more = ["--weights", "tiny", "--epochs", "1", "--num_workers", "0"] if command[0] == "main.py" else []
        capsys.readouterr()
        assert run(*command, *more) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        if command[0] == "main.py":
            assert "add --weights hub" in out and ("2 classes" in out or use == "msrvtt")
    assert words in out


def test_the_table_of_learning_rates_is_the_code_s():
    from config import LEARNING_RATES

    cells = r"\| ([0-9.e-]+) \(× (\d+)\) " * 3
    for weights, title in (("tiny", "tiny"), ("hub", "hub, folders")):
        found = re.search(rf"\| {title} {cells}\|", README).groups()
        shown = [(float(found[i]), float(found[i + 1])) for i in (0, 2, 4)]
        assert shown == [LEARNING_RATES[weights, kind] for kind in ("full", "lora", "frozen")]
