"""Every command of the README runs: with a small dataset, one epoch, and folders of the test's own."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import counting_frames, read_clip, write_video

import create_dummy
import dummy_data
import inference
import main
from config import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!-- test: own clips -->\n)?```bash\n(.*?)```", README, flags=re.DOTALL)
SCRIPTS = {"main.py": main.main, "inference.py": inference.main, "dummy_data.py": dummy_data.main, "create_dummy.py": create_dummy.main}  # fmt: skip


def commands(own_clips: bool) -> list[list[str]]:
    """The README's python commands as [script, *flags]; each training directly before its inferences."""
    lines = [line for mark, text in BLOCKS if bool(mark) == own_clips for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def run(script: str, *flags: str) -> int:
    return SCRIPTS[script](list(flags))


def pairs() -> list[list[list[str]]]:
    """Each training command with the inference commands that follow it."""
    groups: list[list[list[str]]] = []
    for command in commands(own_clips=False):
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
    drawing = [c for c in commands(own_clips=False) if c[0] in ("dummy_data.py", "create_dummy.py")]
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


def test_your_own_clips(tmp_path, monkeypatch, capsys):
    """The section's two commands on mp4 files in the layout it shows; tiny weights stand in for the hub's."""
    for place in ("train/jumping", "train/running", "test/jumping", "test/running"):
        (tmp_path / "my_clips" / place).mkdir(parents=True)
        for index in range(3):
            frames = counting_frames(12 + index)
            write_video(tmp_path / "my_clips" / place / f"{index}.mp4", frames if "jumping" in place else frames[::-1])
    monkeypatch.chdir(tmp_path)
    training, answering = commands(own_clips=True)
    assert run(*training, "--weights", "tiny", "--epochs", "1", "--num_workers", "0") == 0
    out = capsys.readouterr().out
    assert "2 classes" in out and "add --weights hub" in out
    assert run(*answering) == 0
    assert "of 6 right" in capsys.readouterr().out


def test_the_table_of_learning_rates_is_the_code_s():
    from train_code import LEARNING_RATES

    cells = r"\| ([0-9.e-]+) \(× (\d+)\) " * 3
    for weights, title in (("tiny", "tiny"), ("hub", "hub, folders")):
        found = re.search(rf"\| {title} {cells}\|", README).groups()
        shown = [(float(found[i]), float(found[i + 1])) for i in (0, 2, 4)]
        assert shown == [LEARNING_RATES[weights, kind] for kind in ("full", "lora", "frozen")]
