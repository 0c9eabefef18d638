"""Every command of README.md and docs/ runs: with a small dataset, one epoch, and temporary folders."""

import json
import os
import re
import shlex
import subprocess
import sys
from glob import glob
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import counting_frames, one_of_each_job, read_clip, write_video
from PIL import Image

import convert_dataset
import create_dummy
import doctor
import dummy_data
import extract
import feature_cache
import inference
import main
import metrics
import preview
import score
import sweep_heads
from config import BACKBONES, LEARNING_RATES, ROOT, parse, run_name

PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
README = PAGES["README.md"]
TEXTS = PAGES | {"CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}
SCRIPTS = {
    "main.py": main.main,
    "sweep_heads.py": sweep_heads.main,
    "inference.py": inference.main,
    "score.py": score.main,
    "doctor.py": doctor.main,
    "extract.py": extract.main,
    "feature_cache.py": feature_cache.main,
    "preview.py": preview.main,
    "metrics.py": metrics.main,
    "dummy_data.py": dummy_data.main,
    "create_dummy.py": create_dummy.main,
    "convert_dataset.py": convert_dataset.main,
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(mark, code) of a page's bash blocks; a mark names the stand-in for the data that the block needs."""
    return re.findall(r"(?:<!-- test: ([a-z0-9 ]+) -->\n)?```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands(page: str, mark: str = "") -> list[list[str]]:
    """The commands under a mark (none: those on the synthetic dataset) as [script, *flags]."""
    lines = [line for m, text in blocks(page) if m == mark for line in text.splitlines()]
    parts = [part for line in lines for part in shlex.split(line.replace("&&", "\n"), comments=True) if line]
    starts = [i for i, part in enumerate(parts) if part in ("python", "torchrun")] + [len(parts)]
    return [parts[a + (parts[a] == "python") : b] for a, b in pairwise(starts)]


def run(script: str, *flags: str) -> int:
    return SCRIPTS[script](list(flags))


def pairs() -> dict[tuple[str, ...], list[list[str]]]:
    """The flags of each training command of the README, and the inference commands that follow it."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for command in commands("README.md"):
        if command[0] == "main.py":
            group = groups.setdefault(tuple(command[1:]), [])
        elif command[0] == "inference.py" and command not in group:
            group.append(command)
    return groups


PAIRS = pairs()


def test_the_readme_trains_and_uses_every_configuration():
    rows = [path.stem for path in (ROOT / "experiments").glob("*.yaml") if not path.stem.startswith("vjepa2")]
    assert sorted(NAMES.values()) == sorted(rows)
    assert len(NAMES) == 24 and all(PAIRS.values())


@pytest.fixture(scope="module")
def frames(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "frames_see"
    assert run("create_dummy.py", "--data_dir", str(dataset), "--output", str(folder), "--per_class", "1") == 0
    return folder


NAMES = {flags: run_name(parse(list(flags), "main")[0]) for flags in PAIRS}
OFTEN = one_of_each_job(NAMES.values())


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=" ".join(flags).replace("--", ""), marks=[pytest.mark.slow] * (name not in OFTEN))
        for flags, name in NAMES.items()
    ],
)
def test_commands_train_and_predict(flags, dataset, frames, tmp_path, capsys):
    runs = ["--output_dir", str(tmp_path)]
    assert run("main.py", *flags, "--data_dir", str(dataset), "--epochs", "1", "--num_workers", "0", *runs) == 0
    for command in PAIRS[flags]:
        capsys.readouterr()
        assert run(*command, *runs, "--video_dir", str(frames)) == 0
        assert "of 3 right" in capsys.readouterr().out


@pytest.mark.parametrize("small", [pytest.param(False, marks=pytest.mark.slow), True])
def test_drawing_commands_run_as_they_stand(tmp_path, monkeypatch, small):
    """With the default numbers of videos, or with smaller defaults."""
    if small:
        few = {"train": ("videos_per_class", 3), "val": ("val_per_class", 1), "test": ("test_per_class", 4)}
        monkeypatch.setattr(dummy_data, "COUNTS", few)
    monkeypatch.chdir(tmp_path)
    drawing = [c for c in commands("README.md") if c[0] in ("dummy_data.py", "create_dummy.py")]
    assert drawing == [["dummy_data.py"], ["create_dummy.py"]]
    assert [run(*command) for command in drawing] == [0, 0]
    videos = {path: torch.load(path, weights_only=True) for path in Path("synthetic_dataset").rglob("*.pt")}
    count = 72 if small else 4140
    assert len(videos) == len({v.numpy().tobytes() for v in videos.values()}) == count  # none occurs twice
    rows = [json.loads(line) for line in Path("frames_see/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 27 and all({"label", "caption", "text", "attributes"} <= row.keys() for row in rows)
    for row in rows:
        split, number = row["label"], row["file_name"].removeprefix(f"{row['label']}_")
        original = videos[Path("synthetic_dataset/test", split, f"{number}.pt")]
        assert torch.equal(read_clip(Path("frames_see", row["file_name"]), 16), original)  # RGB stays RGB


# -- one block per use, on a stand-in with the real structure ---------------------------------------


def clip(path: str, kind: int, count: int = 10) -> None:
    """A video that brightens (kind 0) or darkens."""
    frames = counting_frames(count)
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


def make_segments() -> None:
    for split, videos in (("train", 3), ("test", 2)):
        rows = []
        for index in range(videos):
            clip(f"recordings/{split}{index}.mp4", index % 2, 60)
            rows += [f"{split}{index}.mp4,{label},{start},{start + 1.5}\n" for label, start in (("up", 1), ("down", 4))]
        Path(f"{split}.csv").write_text("path,label,start,end\n" + "".join(rows))


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


def make_hmdb51() -> None:
    Path("splits").mkdir()
    for kind, name in enumerate(("cartwheel", "catch")):
        files = [f"{name}_{index}.avi" for index in range(4)]
        for file in files:
            clip(f"hmdb51_videos/{name}/{file}", kind)
        lines = [f"{file} {number}\n" for file, number in zip(files, (1, 1, 1, 2), strict=True)]
        Path("splits", f"{name}_test_split1.txt").write_text("".join(lines))


def make_other_formats() -> None:
    for split in ("train", "test"):
        for index in range(2):
            clip(f"k400/{split}{index}_000001_000011.mp4", index)
        rows = [f"{name},{split}{index},1,11,{split}\n" for index, name in enumerate(("abseiling", "zumba"))]
        Path(f"k400_{split}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(rows))
        clip(f"YouTubeClips/{split}_1_11.avi", 0)
        Path(f"msvd_{split}.txt").write_text(f"{split}_1_11 a bar grows\n{split}_1_11 a bar becomes longer\n")
        clip(f"vatex_videos/{split}_000001_000011.mp4", 0)
        rows = [{"videoID": f"{split}_000001_000011", "enCap": ["a bar grows"]}]
        Path(f"vatex_{split}.json").write_text(json.dumps(rows))
    make_more_other_formats()
    clip("chat_videos/a.mp4", 0)
    messages = [{"role": "user", "content": "<video>What grows?"}, {"role": "assistant", "content": "A bar."}]
    Path("chat_train.json").write_text(json.dumps([{"messages": messages, "videos": ["a.mp4"]}]))


def make_more_other_formats() -> None:
    segments = [{"segment": [0, 0.4], "label": "Diving"}, {"segment": [0.5, 0.9], "label": "Surfing"}]
    for split in ("train", "test"):
        clip(f"my_dataset/{split}/a.mp4", 0)
        Path(f"my_dataset/{split}/metadata.csv").write_text("file_name,label\na.mp4,grow\n")
        clip(f"anet_videos/v_{split}.mp4", 0)
        clip(f"Charades_v1_480/{split.upper()}.mp4", 0)
        actions = "c000 0.00 0.50;c001 0.20 0.90"
        Path(f"Charades_v1_{split}.csv").write_text(f"id,script,actions\n{split.upper()},a bar,{actions}\n")
    Path("Charades_v1_classes.txt").write_text("c000 Holding a bar\nc001 Putting a bar somewhere\n")
    subsets = {"train": "training", "test": "validation"}
    database = {name: {"subset": subset, "annotations": segments} for name, subset in subsets.items()}
    Path("activity_net.v1-3.min.json").write_text(json.dumps({"database": database}))


def make_label_studio() -> None:
    tasks = []
    for index in range(3):
        clip(f"recordings/{index}.mp4", index % 2, 60)
        clip(f"new_videos/{index}.mp4", index % 2, 60)
        values = [
            {"ranges": [{"start": 26, "end": 75}], "timelinelabels": ["up"]},
            {"ranges": [{"start": 76, "end": 125}], "timelinelabels": ["down"]},
        ]
        result = [{"from_name": "label", "to_name": "video", "type": "timelinelabels", "value": v} for v in values]
        data = {"video": f"/data/local-files/?d=recordings/{index}.mp4"}
        tasks.append({"id": index, "data": data, "annotations": [{"id": index, "result": result}]})
    Path("export.json").write_text(json.dumps(tasks))


def make_caption_files() -> None:
    Path("captions.json").write_text(json.dumps({"1": ["a bar grows", "a growing bar"], "2": ["a bar shrinks"]}))
    for name in ("mine", "other"):
        Path(f"{name}.json").write_text(json.dumps({"1": f"{name} bar grows", "2": "a bar shrinks"}))


#: page and mark -> what makes the stand-in, and what the last command prints
USES = {
    ("README.md", "class folders"): (make_class_folders, "of 6 right"),
    ("README.md", "texts"): (lambda: None, "with another object's text"),
    ("README.md", "csv"): (make_csv, "next: python main.py --data_dir my_data"),
    ("datasets.md", "csv"): (make_csv, "wrote predictions.jsonl"),
    ("datasets.md", "segments"): (make_segments, '"false_alarms_per_hour"'),
    ("datasets.md", "frames"): (make_frames, "8 videos in"),
    ("datasets.md", "ucf101"): (make_ucf101, "wrote ucf101.jsonl"),
    ("datasets.md", "hmdb51"): (make_hmdb51, "wrote hmdb51.jsonl"),
    ("datasets.md", "ssv2"): (make_ssv2, "wrote ssv2.jsonl"),
    ("datasets.md", "msrvtt"): (make_msrvtt, "wrote captions.jsonl"),
    ("datasets.md", "label studio"): (make_label_studio, "wrote tasks.json: 3 tasks with"),
    ("datasets.md", "other formats"): (make_other_formats, "wrote chat/train/metadata.jsonl"),
    ("datasets.md", "look first"): (make_class_folders, "4 training clips"),
    ("scaling.md", "scaling"): (lambda: None, "wrote predictions.jsonl"),
    ("scaling.md", "stored frames"): (make_class_folders, "frames of videos in"),
    ("scaling.md", "sharing"): (lambda: None, "18 of 18 videos in other_cache"),
    ("scaling.md", "timeline"): (lambda: clip("long_video.mp4", 0, 80), "wrote timeline.jsonl"),
    ("runs.md", "runs"): (make_caption_files, "exported checkpoints/timesformer to exported_model/"),
}


def test_every_block_has_a_stand_in():
    marks = {(page, mark) for page in PAGES for mark, _ in blocks(page)}
    assert marks - {("README.md", ""), ("scaling.md", "torchrun")} == USES.keys()


@pytest.fixture
def workplace(dataset, frames, tmp_path, monkeypatch) -> Path:
    """A working directory with a small synthetic_dataset/ and frames_see/."""
    monkeypatch.chdir(tmp_path)
    Path("synthetic_dataset").symlink_to(dataset)
    Path("frames_see").symlink_to(frames)
    return tmp_path


@pytest.mark.parametrize("use", USES, ids=" ".join)
def test_the_commands_of_a_block_work(use, workplace, capsys):
    """As they stand; tiny weights stand in for the hub's, and one epoch for ten."""
    make, words = USES[use]
    make()
    for script, *flags in commands(*use):
        if script in ("dummy_data.py", "create_dummy.py"):  # drawn before, and smaller
            continue
        flags = [name for flag in flags for name in (sorted(glob(flag)) if "*" in flag else [flag])]
        more = {
            "main.py": ["--weights", "tiny", "--epochs", "1", "--num_workers", "0"],
            "sweep_heads.py": ["--epochs", "1", "--num_workers", "0"],
            "doctor.py": ["--weights", "tiny", "--num_workers", "0", "--image_size", "32"],
            "preview.py": ["--weights", "tiny", "--num_workers", "0"],
        }
        capsys.readouterr()
        status = run(script, *flags, *more.get(script, []))
        out, err = capsys.readouterr()
        if "--resume" in flags:  # the run before it was not stopped
            assert status == 2 and "nothing to resume" in err
        elif script == "doctor.py":  # its status says whether this data passes
            assert status in (0, 1) and "every frame decodes" in out
        else:
            assert status == 0, err
        if script == "main.py" and "--resume" not in flags:
            assert "add --weights hub" in out
    assert words in out


@pytest.mark.slow
def test_the_command_for_several_processes_works(workplace):
    (command,) = commands("scaling.md", "torchrun")
    command = [str(ROOT / "main.py") if part == "main.py" else part for part in command]
    command = [sys.executable, "-m", "torch.distributed.run", *command[1:], "--epochs", "1", "--num_workers", "0"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "run: checkpoints/two_processes/" in done.stdout, done.stderr


# -- what the pages say ------------------------------------------------------------------------------


def test_the_learning_rates_are_the_code_s():
    cells = r"\| ([0-9.e-]+) \(× (\d+)\) " * 3
    for weights, title in (("tiny", "tiny"), ("hub", "hub, folders")):
        values = re.search(rf"\| {title} {cells}\|", PAGES["runs.md"]).groups()
        shown = [(float(values[i]), float(values[i + 1])) for i in (0, 2, 4)]
        assert shown == [LEARNING_RATES[weights, kind] for kind in ("full", "lora", "frozen")]
        assert f"{title.split(',')[0]}: {' / '.join(values[::2])}" in README.replace(" and folders", "")


def test_the_short_names_are_the_code_s():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| [^|]+\| [^|]*\| (.+) \|$", PAGES["runs.md"], re.MULTILINE)
    assert sorted(rows) == sorted((name, b.hub, b.licence) for name, b in BACKBONES.items())


def test_the_results_are_those_of_the_study():
    """Each row: a model, its score, and the mean over the seeds in full, with LoRA and frozen."""
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    cell = r" \| (\*{0,2}[\d.]+\*{0,2})"
    rows = re.findall(rf"^\| (\S.*?)(, text)?(?: \(CIDEr\))?{cell * 3} \|$", README, re.MULTILINE)
    assert len(rows) == 9
    for model, text, *values in rows:
        for mode, value in zip(("in full", "LoRA", "frozen"), values, strict=True):
            number = value.strip("*")
            row = rf"^\| {re.escape(model)} {mode}{text} \| [123] of 3 \| {number} \["
            assert re.search(row, results, re.MULTILINE)
        best = max(float(value.strip("*")) for value in values)
        assert all(("*" in value) == (float(value.strip("*")) == best) for value in values)


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_lead_somewhere(page):
    folder = ROOT / "docs" if (ROOT / "docs" / page).is_file() else ROOT
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) + re.findall(r'src="([^"]+)"', TEXTS[page])
    for target in targets:
        path, _, title = target.partition("#")
        if not target.startswith("https://"):
            assert not path or (folder / path).exists(), target
            assert not title or title in titles(Path(path).name or page), target


def titles(page: str) -> set[str]:
    """The titles of a page, as links to them spell them."""
    found = re.findall(r"^#+ (.+)$", TEXTS[page], re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in found}


def test_the_tree_names_every_file_of_the_root_and_of_extras():
    tree = re.search(r"```\n(main\.py .*?)```", README, re.DOTALL)[1]
    names = re.findall(r"(?:^|  )([A-Za-z_]+(?:\.py|/))(?= |$)", tree, re.MULTILINE)
    files = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/[a-z]*.py")]}
    assert files <= {*names} and all((ROOT / name).exists() for name in {*names} - files)
