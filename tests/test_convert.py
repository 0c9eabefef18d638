"""Every annotation format gives the right rows; missing, broken or ambiguous videos are named, never guessed."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import counting_frames, read_clip, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import convert_dataset
from extras import annotations
from readers import FILE_SUFFIXES, Segment, open_video
from script import UNSAFE
from VLoader import Sample, read_folder, read_splits


def make_videos(folder: Path, *names: str) -> Path:
    """A video for each name: encoded if the name ends in .mp4 or .avi, else a .pt tensor."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".mp4", ".avi"):
            write_video(path, counting_frames(10), codec="mpeg4")
        else:
            torch.save(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), path.with_name(path.name + ".pt"))
    return folder


def convert(tmp_path: Path, name: str, files: dict[str, str], *flags: str, encoding: str = "utf-8") -> int:
    """Writes the annotation files and converts them, from tmp_path/videos to tmp_path/out. Returns the exit status."""
    paths = []
    for file, text in files.items():
        paths.append(tmp_path / file)
        paths[-1].write_bytes(text.encode(encoding))
    argv = ["--format", name, "--annotations", *map(str, paths)]
    return convert_dataset.main(
        [*argv, "--videos", str(tmp_path / "videos"), "--output", str(tmp_path / "out"), *flags]
    )


def rows(tmp_path: Path, split: str) -> list[dict]:
    """The rows of metadata.jsonl, with each file name resolved to a path below tmp_path/videos."""
    folder = tmp_path / "out" / split
    found = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in found:
        row["file_name"] = (folder / row["file_name"]).resolve().relative_to((tmp_path / "videos").resolve()).as_posix()
    return found


def labels(tmp_path: Path, split: str) -> dict[str, str]:
    return {row["file_name"]: row["label"] for row in rows(tmp_path, split)}


@pytest.mark.parametrize(
    "text",
    [
        "a/x.pt run\nb c.mp4 high jump\n",
        "a/x.pt,run\nb c.mp4,high jump\n",
        "a/x.pt\trun\nb c.mp4\thigh jump\n",
        '\ufeff"b c.mp4","high jump"\na/x,run\n',
        "Path,Label,split\na/x.pt,run,train\nb c.mp4,high jump,\n",
        "\ufeffpath;label\na/x.pt;run\nb c.mp4;high jump\n",
    ],
    ids=["spaces", "commas", "tabs", "quotes", "titles", "semicolons"],
)
def test_lists(tmp_path, text):
    make_videos(tmp_path / "videos", "a/x", "b c.mp4")
    assert convert(tmp_path, "list", {"train.txt": text}) == 0
    assert labels(tmp_path, "train") == {"a/x.pt": "run", "b c.mp4": "high jump"}


def test_a_path_with_spaces_ends_at_every_video_suffix():
    for suffix in FILE_SUFFIXES:
        assert annotations.split_at_path(f"b c{suffix} high jump") == [f"b c{suffix}", "high jump"]


@pytest.mark.parametrize(
    "name, text",
    [("names.txt", "run\njump\n"), ("names.csv", "1,jump\n0,run\n"), ("names.json", '{"run": 0, "jump": 1}')],
)
def test_numbered_classes_get_their_names(tmp_path, name, text):
    make_videos(tmp_path / "videos", "x", "y")
    (tmp_path / name).write_text(text)
    assert convert(tmp_path, "list", {"val_list.txt": "x.pt 0\ny.pt 1\n"}, "--class_names", str(tmp_path / name)) == 0
    assert labels(tmp_path, "val") == {"x.pt": "run", "y.pt": "jump"}


def test_without_a_readable_video_nothing_is_written(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "x.mp4").write_bytes(b"broken")
    assert convert(tmp_path, "list", {"train.csv": "x.mp4,a\n"}) == 2
    assert "no video can be read; the first error: cannot read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table_with_captions_texts_and_splits(tmp_path):
    make_videos(tmp_path / "videos", "x", "y")
    table = (
        "video,caption,text,split\nx.pt,a man runs,sports,train\nx.pt,he runs,sports,train\ny.pt,it rains,,validation\n"
    )
    assert convert(tmp_path, "list", {"all.csv": table}) == 0
    assert rows(tmp_path, "train") == [{"file_name": "x.pt", "caption": ["a man runs", "he runs"], "text": "sports"}]
    assert rows(tmp_path, "val") == [{"file_name": "y.pt", "caption": ["it rains"]}]


CLASSIFIER = "--vision_model vjepa2 --weights hub --freeze_visionbackbone True"
CAPTIONER = f"{CLASSIFIER} --use_vlm True --captioning True --use_lora_llm True"


@pytest.mark.parametrize(
    "table, hints",
    [
        ("video,label\nx.pt,a\n", [f"next: {{}} {CLASSIFIER}"]),
        ("video,caption\nx.pt,it rains\n", [f"next: {{}} {CAPTIONER}"]),
        ("video,label,caption\nx.pt,a,it rains\n", [f"next: {{}} {CLASSIFIER}", f"or, for captions: {{}} {CAPTIONER}"]),
    ],
)
def test_the_last_lines_are_the_commands_that_the_data_allows(tmp_path, capsys, table, hints):
    make_videos(tmp_path / "videos", "x")
    assert convert(tmp_path, "list", {"train.csv": table}) == 0
    command = f"python main.py --data_dir {tmp_path / 'out'}"
    assert capsys.readouterr().out.splitlines()[-len(hints) :] == [hint.format(command) for hint in hints]


def test_several_labels_are_refused_by_name(tmp_path, capsys):
    make_videos(tmp_path / "videos", "x", "y", "z", "good", "w")
    text = "x.pt 3 17\ny.pt a\ny.pt b\nz.pt a;b\nw.pt\ngood.pt a\n"
    assert convert(tmp_path, "list", {"train.txt": text}) == 0
    out = capsys.readouterr().out
    assert labels(tmp_path, "train") == {"good.pt": "a"}
    for words in (
        "x.pt: several labels (3, 17)",
        "y.pt: several labels (a, b); a video can have only one without --multi_label True",
        "z.pt: several labels (a;b) in one row; with --multi_label True, each label needs a row of its own",
        "w.pt: no label",
    ):
        assert words in out
    assert json.loads((tmp_path / "out/train/conversion.json").read_text())["refused"][0].startswith("x.pt: several")


def test_ucf101(tmp_path):
    make_videos(
        tmp_path / "videos", "Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g08_c01.avi", "Biking/v_Biking_g09_c02"
    )
    files = {
        "trainlist01.txt": "Archery/v_Archery_g08_c01.avi 3\r\nBiking/v_Biking_g09_c02.avi 11\r\n",
        "testlist01.txt": "Archery/v_Archery_g01_c01.avi\r\n",
    }
    assert convert(tmp_path, "ucf101", files) == 0
    assert labels(tmp_path, "train") == {
        "Archery/v_Archery_g08_c01.avi": "Archery",
        "Biking/v_Biking_g09_c02.pt": "Biking",
    }
    assert labels(tmp_path, "test") == {"Archery/v_Archery_g01_c01.avi": "Archery"}


def test_hmdb51(tmp_path):
    make_videos(tmp_path / "videos", "wave/a", "wave/b", "wave/c", "ride_bike/a")
    files = {"wave_test_split1.txt": "a.avi 1 \nb.avi 2 \nc.avi 0 \n", "ride_bike_test_split1.txt": "a.avi 1 \n"}
    assert convert(tmp_path, "hmdb51", files) == 0
    assert labels(tmp_path, "train") == {"wave/a.pt": "wave", "ride_bike/a.pt": "ride_bike"}
    assert labels(tmp_path, "test") == {"wave/b.pt": "wave"}


def test_kinetics_pads_times_and_keeps_leading_dashes(tmp_path):
    make_videos(tmp_path / "videos", "abseiling/-x_7Rz0_000007_000017", "y1_000120_000130")
    text = 'label,youtube_id,time_start,time_end,split,is_cc\nabseiling,-x_7Rz0,7,17,train,0\n"air, drumming",y1,120,130,validate,0\n'
    assert convert(tmp_path, "kinetics", {"k.csv": text}) == 0
    assert labels(tmp_path, "train") == {"abseiling/-x_7Rz0_000007_000017.pt": "abseiling"}
    assert labels(tmp_path, "val") == {"y1_000120_000130.pt": "air, drumming"}


def test_something_something_drops_the_brackets(tmp_path):
    make_videos(tmp_path / "videos", "12", "13")
    items = [
        {"id": "12", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
        {"id": 13},
    ]
    assert convert(tmp_path, "ssv2", {"something-something-v2-validation.json": json.dumps(items)}) == 0
    assert rows(tmp_path, "val") == [{"file_name": "12.pt", "label": "Holding something", "caption": ["holding a cup"]}]


def test_msrvtt(tmp_path):
    make_videos(tmp_path / "videos", "video0.mp4", "video1")
    values = {
        "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "validate"}],
        "sentences": [
            {"video_id": "video0", "caption": "a café"},
            {"video_id": "video1", "caption": "b"},
            {"video_id": "video0", "caption": "c"},
        ],
    }
    assert convert(tmp_path, "msrvtt", {"train_val_videodatainfo.json": json.dumps(values)}) == 0
    assert rows(tmp_path, "train") == [{"file_name": "video0.mp4", "caption": ["a café", "c"]}]
    assert rows(tmp_path, "val") == [{"file_name": "video1.pt", "caption": ["b"]}]


@pytest.mark.parametrize(
    "file, text",
    [
        ("AllVideoDescriptions.txt", "# header\n\nab_c_1_11 a bird sings\nab_c_1_11 it sings\nzz_2_12 rain\n"),
        (
            "corpus.csv",
            "VideoID,Start,End,Language,Description\nab_c,1,11,English,a bird sings\nab_c,1,11,German,ein Vogel\n"
            "ab_c,1,11,English,it sings\nzz,2,12,English,rain\n",
        ),
    ],
)
def test_msvd(tmp_path, file, text):
    make_videos(tmp_path / "videos", "ab_c_1_11", "zz_2_12")
    assert convert(tmp_path, "msvd", {file: text}, "--split", "test") == 0
    assert [r["caption"] for r in rows(tmp_path, "test")] == [["a bird sings", "it sings"], ["rain"]]


def test_vatex_in_cp1252(tmp_path):
    make_videos(tmp_path / "videos", "id_000001_000011")
    assert convert(tmp_path, "vatex", {"test.csv": "id_000001_000011|a man’s hat|un café|\n"}, encoding="cp1252") == 0
    assert rows(tmp_path, "test")[0]["caption"] == ["a man’s hat", "un café"]


def test_frame_lists_link_the_frames_between_start_and_end(tmp_path):
    for folder in ("jumping/0001", "running/0001"):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        for index in range(1, 11):
            Image.new("RGB", (16, 16), (20 * index, 0, 0)).save(tmp_path / "videos" / folder / f"img_{index:05d}.png")
    text = "jumping/0001 1 10 0\nrunning/0001 3 6 1\nrunning/0001 7 10 1\n"
    assert convert(tmp_path, "frames", {"annotations.txt": text}) == 0
    samples = {s.path.name: s for s in read_folder(tmp_path / "out" / "train")}
    assert {name: s.label for name, s in samples.items()} == {"0001": "0", "0001_3_6": "1", "0001_7_10": "1"}
    clip = read_clip(samples["0001_3_6"].path, 4)
    assert clip[:, 0, 0, 0].tolist() == [60, 80, 100, 120]
    assert len(open_video(samples["0001"].path)) == 10


def test_chat(tmp_path):
    make_videos(tmp_path / "videos", "demo/1.mp4", "demo/2.avi")
    turn = [{"role": "user", "content": "<video>What is it?"}, {"role": "assistant", "content": "A cat."}]
    items = [{"messages": turn, "videos": ["demo/1.mp4"]}, {"messages": turn * 2, "videos": ["demo/2.avi"]}]
    assert convert(tmp_path, "chat", {"chat.json": json.dumps(items)}) == 0
    assert rows(tmp_path, "train") == [{"file_name": "demo/1.mp4", "caption": ["A cat."], "text": "What is it?"}]


def test_videofolder_takes_the_split_from_the_folder_and_the_video_beside_the_file(tmp_path):
    make_videos(tmp_path / "videos", "train/a", "test/a", "train/dog/b", "a")
    files = {
        "videos/train/metadata.csv": "File_Name,label\na.pt,cat\ndog/b.pt,dog\n",
        "videos/test/metadata.csv": "video_file_name,text\na.pt,a cat sleeps\n",
    }
    assert convert(tmp_path, "videofolder", files) == 0
    assert labels(tmp_path, "train") == {"train/a.pt": "cat", "train/dog/b.pt": "dog"}
    assert rows(tmp_path, "test") == [{"file_name": "test/a.pt", "caption": ["a cat sleeps"]}]


def test_videofolder_takes_the_split_from_the_folder_that_it_is_started_in(tmp_path, monkeypatch):
    make_videos(tmp_path / "videos", "test/a")
    (tmp_path / "videos" / "test" / "metadata.csv").write_text("file_name,label\na.pt,cat\n")
    monkeypatch.chdir(tmp_path / "videos" / "test")
    argv = [
        "--format",
        "videofolder",
        "--annotations",
        "metadata.csv",
        "--videos",
        ".",
        "--output",
        str(tmp_path / "out"),
    ]
    assert convert_dataset.main(argv) == 0
    assert [row["label"] for row in rows(tmp_path, "test")] == ["cat"]


def test_videofolder_with_one_file_above_the_splits(tmp_path):
    make_videos(tmp_path / "videos", "train/a", "validation/a")
    text = "file_name,label,text\ntrain/a.pt,cat,indoors\nvalidation/a.pt,dog,\n"
    assert convert(tmp_path, "videofolder", {"videos/metadata.csv": text}) == 0
    assert rows(tmp_path, "train") == [{"file_name": "train/a.pt", "label": "cat", "text": "indoors"}]
    assert rows(tmp_path, "val") == [{"file_name": "validation/a.pt", "label": "dog"}]


def test_parquet_gives_the_rows_of_the_same_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    make_videos(tmp_path / "videos", "train/a", "train/b")
    columns = {"file_name": ["a.pt", "b.pt"], "label": [3, None], "caption": [None, ["it rains"]], "start": [0.5, None]}
    columns |= {"end": [2.0, None], "fps": [10, None]}
    file = tmp_path / "videos/train/metadata.parquet"
    parquet.write_table(table.from_pydict(columns), file)
    argv = ["--format", "videofolder", "--videos", str(tmp_path / "videos"), "--no_scan", "--overwrite"]
    argv += ["--output", str(tmp_path / "out"), "--annotations"]
    assert convert_dataset.main([*argv, str(file)]) == 0
    found = rows(tmp_path, "train")
    assert found[0]["label"] == "3" and found[0]["start"] == 0.5 and found[1]["caption"] == ["it rains"]
    columns["caption"][1] = "it rains"
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in zip(*columns.values(), strict=True)]
    file.with_suffix(".csv").write_text("\n".join([",".join(columns), *lines]))
    assert convert_dataset.main([*argv, str(file.with_suffix(".csv"))]) == 0
    assert rows(tmp_path, "train") == found


def test_parquet_with_an_empty_list_is_a_row_that_is_refused(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    make_videos(tmp_path / "videos", "train/a", "train/b")
    file = tmp_path / "videos/train/metadata.parquet"
    parquet.write_table(table.from_pydict({"file_name": ["a.pt", "b.pt"], "caption": [["it rains"], []]}), file)
    argv = ["--format", "videofolder", "--videos", str(tmp_path / "videos"), "--no_scan"]
    assert convert_dataset.main([*argv, "--output", str(tmp_path / "out"), "--annotations", str(file)]) == 0
    assert [row["caption"] for row in rows(tmp_path, "train")] == [["it rains"]]
    assert "b.pt: it has neither a label nor a caption" in capsys.readouterr().out


def test_parquet_without_pyarrow_is_one_line(tmp_path, capsys, monkeypatch):
    make_videos(tmp_path / "videos", "a")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert convert(tmp_path, "videofolder", {"metadata.parquet": ""}) == 2
    err = capsys.readouterr().err
    assert "needs pyarrow: pip install -r requirements-extra.txt" in err and err.count("\n") == 1


def test_segments_in_the_columns_of_create_ml(tmp_path):
    make_videos(tmp_path / "videos", "match.mp4")
    text = "video,label,start,end\nmatch.mp4,pass,0,0.4\nmatch.mp4,shot,0.4,0.9\n"
    assert convert(tmp_path, "list", {"train.csv": text}) == 0
    assert rows(tmp_path, "train") == [
        {"file_name": "match.mp4", "label": "pass", "start": 0.0, "end": 0.4},
        {"file_name": "match.mp4", "label": "shot", "start": 0.4, "end": 0.9},
    ]


def test_activitynet_names_videos_with_or_without_a_prefix(tmp_path, capsys):
    make_videos(tmp_path / "videos", "v_one", "two")
    segments = [{"segment": [0.5, 9], "label": "Diving"}, {"segment": [9, 12.5], "label": "Swimming"}]
    database = {
        "one": {"subset": "training", "duration": 20, "annotations": segments},
        "two": {"subset": "Validation", "annotations": [{"segment": [3, 2], "label": "Diving"}, segments[0]]},
        "three": {"subset": "testing", "annotations": []},
    }
    text = json.dumps({"version": "1.3", "database": database})
    assert convert(tmp_path, "activitynet", {"activity_net.json": text}, "--no_scan") == 0
    assert [(r["file_name"], r["label"], r["start"], r["end"]) for r in rows(tmp_path, "train")] == [
        ("v_one.pt", "Diving", 0.5, 9.0),
        ("v_one.pt", "Swimming", 9.0, 12.5),
    ]
    assert len(rows(tmp_path, "val")) == 1
    out = capsys.readouterr().out
    assert "two: start and end must be seconds with 0 <= start < end" in out and "three: no segments" in out
    assert "overlaps" not in out


def test_charades_has_a_row_per_segment_and_counts_overlaps(tmp_path, capsys):
    make_videos(tmp_path / "videos", "46GP8.mp4", "N11GT.mp4")
    text = (
        'id,script,actions,length\n46GP8,"A person, at home.",c092 0.10 0.70;c147 0.00 0.30;c009 0.70 0.90,1\n'
        "N11GT,x,c098 0.00 0.50;c075 0.00 0.50,1\n#0000,x,,1\n"
    )
    (tmp_path / "classes.txt").write_text(
        "c009 Putting a table\nc075 Tidying\nc092 Watching\nc098 Holding\nc147 Sitting\n"
    )
    flags = ("--class_names", str(tmp_path / "classes.txt"))
    assert convert(tmp_path, "charades", {"Charades_v1_train.csv": text}, *flags) == 0
    assert rows(tmp_path, "train") == [
        {"file_name": "46GP8.mp4", "label": "Watching", "start": 0.1, "end": 0.7},
        {"file_name": "46GP8.mp4", "label": "Sitting", "start": 0.0, "end": 0.3},
        {"file_name": "46GP8.mp4", "label": "Putting a table", "start": 0.7, "end": 0.9},
        {"file_name": "N11GT.mp4", "labels": ["Holding", "Tidying"], "start": 0.0, "end": 0.5},
    ]
    out = capsys.readouterr().out
    overlaps = (
        "overlaps: 3 of 4 segments have a moment with another label; main.py takes them with --multi_label True\n"
    )
    assert overlaps in out and "#0000: no actions" in out
    report = json.loads((tmp_path / "out/train/conversion.json").read_text())
    assert report["classes"]["Tidying"] == {"rows": 1, "videos": 1} and report["found"] == 5


def test_charades_without_a_name_for_a_class_is_refused(tmp_path, capsys):
    make_videos(tmp_path / "videos", "46GP8.mp4")
    text = "id,actions\n46GP8,c009 0.10 0.70;c777 0.00 0.30\n"
    (tmp_path / "classes.txt").write_text("c009 Putting a table\n")
    flags = ("--class_names", str(tmp_path / "classes.txt"))
    assert convert(tmp_path, "charades", {"Charades_v1_train.csv": text}, *flags) == 0
    assert [row["label"] for row in rows(tmp_path, "train")] == ["Putting a table"]
    assert "46GP8: --class_names has no class c777" in capsys.readouterr().out


TIMES = st.tuples(st.integers(0, 8), st.integers(1, 5), st.sampled_from("abc"))


@given(st.lists(TIMES, min_size=1, max_size=8, unique_by=lambda t: t[:2]))
def test_overlaps_are_those_of_every_pair(parts):
    parts = [(start, start + length, label) for start, length, label in parts]
    samples = [Sample(Path("x"), label, segment=Segment(start, end)) for start, end, label in parts]
    outcome = convert_dataset.Outcome(samples={sample.key: sample for sample in samples})
    expected = [a for a in parts if any(a[0] < b[1] and b[0] < a[1] and a[2] != b[2] for b in parts)]
    assert convert_dataset.count_overlaps(outcome) == (len(expected), len(parts))


# -- Label Studio -----------------------------------------------------------------------------------


def task(video: str, *results: list[dict], number: int = 1, **annotation: bool) -> dict:
    """A task of a JSON export: each of `results` is the result of one annotation."""
    annotations = [{"id": 10 * number + i, "result": result} | annotation for i, result in enumerate(results)]
    return {"id": number, "data": {"video": video}, "annotations": annotations}


def result(kind: str, **value: object) -> dict:
    return {"id": "x", "from_name": "label", "to_name": "video", "type": kind, "value": value}


def timeline(label: str, start: int, end: int) -> dict:
    return result("timelinelabels", ranges=[{"start": start, "end": end}], timelinelabels=[label])


def test_label_studio_timeline_labels_are_the_frames_from_start_to_end(tmp_path):
    """Frames are counted from 1. The videos have 10 frames per second."""
    make_videos(tmp_path / "videos", "match.mp4")
    export = [task("/data/local-files/?d=videos%2Fmatch.mp4", [timeline("pass", 1, 4), timeline("shot", 5, 10)])]
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps(export)}, "--fps", "10") == 0
    samples = read_folder(tmp_path / "out" / "train")
    reader = open_video(samples[0].path)
    assert [(s.label, *reader.part(s.segment)) for s in samples] == [("pass", 0, 4), ("shot", 4, 6)]


def test_label_studio_without_a_frame_rate_takes_that_of_the_task(tmp_path, capsys):
    make_videos(tmp_path / "videos", "a.mp4", "b.mp4")
    export = [task("a.mp4", [timeline("up", 3, 5)]), task("b.mp4", [timeline("up", 3, 5)], number=2)]
    export[0]["data"]["fps"] = "10"
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps(export)}) == 0
    assert rows(tmp_path, "train") == [{"file_name": "a.mp4", "label": "up", "start": 0.2, "end": 0.5}]
    assert "b.mp4: its times are frame numbers: add --fps" in capsys.readouterr().out


def test_label_studio_reads_choices_texts_and_labels_in_seconds(tmp_path, capsys):
    make_videos(tmp_path / "videos", "a", "b.mp4", "c", "d", "e", "f", "g", "h")
    export = [
        task("/data/upload/7/0f4b2c1d-a.pt", [result("choices", choices=["run"])], number=1),
        task("s3://bucket/b.mp4", [result("labels", start=0.1, end=0.5, labels=["jump"], channel=0)], number=2),
        task("https://host/c.pt?sign=1", [result("textarea", text=["it rains", "rain"])], number=3),
        task("d.pt", [result("choices", choices=["run", "jump"])], number=4),
        task("e.pt", [result("choices", choices=["run"])], [result("choices", choices=["run"])], number=5),
        task("f.pt", [result("choices", choices=["run"])], number=6, was_cancelled=True),
        task("g.pt", [result("videorectangle", labels=["man"], sequence=[{"frame": 1}])], number=7),
        task("h.pt", [result("rating", rating=4)], number=8),
        task("<video src='a.mp4'>", [result("choices", choices=["run"])], number=9),
    ]
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps(export)}) == 0
    assert rows(tmp_path, "train") == [
        {"file_name": "a.pt", "label": "run"},
        {"file_name": "b.mp4", "label": "jump", "start": 0.1, "end": 0.5},
        {"file_name": "c.pt", "caption": ["it rains", "rain"]},
        {"file_name": "e.pt", "label": "run"},
    ]
    report = json.loads((tmp_path / "out/train/conversion.json").read_text())
    problems = [text.partition(": ")[2][:20] for text in report["refused"]]
    assert problems == ["a box that follows a", "not annotated", "it names no video", *["several labels (run,"] * 2]
    assert report["unused"] == 1


def test_label_studio_segments_come_from_one_annotation(tmp_path, capsys):
    make_videos(tmp_path / "videos", "a.mp4", "b.mp4")
    twice = [timeline("up", 1, 4)], [timeline("up", 1, 5)]
    export = [task("a.mp4", *twice), task("b.mp4", *twice, number=2)]
    export[1]["annotations"][1]["ground_truth"] = True
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps(export)}, "--fps", "10") == 0
    assert rows(tmp_path, "train") == [{"file_name": "b.mp4", "label": "up", "start": 0.0, "end": 0.5}]
    assert "a.mp4: 2 annotations have segments; mark one" in capsys.readouterr().out


def test_label_studio_json_min_gives_the_same_rows(tmp_path):
    make_videos(tmp_path / "videos", "a.mp4", "b.mp4", "c.mp4")
    export = [
        task("a.mp4", [timeline("up", 1, 4), timeline("down", 3, 9)], number=1),
        task("b.mp4", [result("choices", choices=["run"])], number=2),
        task("c.mp4", [result("textarea", text=["it rains"])], number=3),
    ]
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps(export)}, "--fps", "10") == 0
    full = rows(tmp_path, "train")
    fields = [{"tricks": [r["value"] for r in export[0]["annotations"][0]["result"]]}, {"choice": "run"}]
    fields += [{"caption": "it rains"}]
    short = [
        {"video": item["data"]["video"], "id": item["id"], "annotator": 1, "annotation_id": 5, "lead_time": 2.5} | own
        for item, own in zip(export, fields, strict=True)
    ]
    flags = ("--fps", "10", "--overwrite")
    assert convert(tmp_path, "label_studio", {"export_min.json": json.dumps(short)}, *flags) == 0
    assert rows(tmp_path, "train") == full and len(full) == 4


def answers_to_tasks(tmp_path: Path, answers: list[dict], *flags: str) -> int:
    """Writes the answers about videos in tmp_path/videos and converts them to tmp_path/tasks.json."""
    lines = [json.dumps(row | {"path": str(tmp_path / "videos" / row["file"]), "run": "my_run 0f"}) for row in answers]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    argv = ["--format", "label_studio", "--answers", str(tmp_path / "answers.jsonl"), *flags]
    return convert_dataset.main([*argv, "--videos", str(tmp_path / "videos"), "--output", str(tmp_path / "tasks.json")])


SEGMENTS = [
    {"file": "x y#1.mp4", "start": 0.0, "end": 1.0, "label": "down", "score": 0.4, "segment": False},
    {"file": "x y#1.mp4", "start": 0.0, "end": 0.42, "label": "up", "score": 0.5, "segment": True},
    {"file": "x y#1.mp4", "start": 0.42, "end": 0.83, "label": "down", "score": 0.75, "segment": True},
    {"file": "gone.mp4", "error": "cannot read it"},
]


def test_answers_become_predictions_that_label_studio_imports(tmp_path, capsys):
    make_videos(tmp_path / "videos", "x y#1.mp4")
    assert answers_to_tasks(tmp_path, SEGMENTS, "--fps", "24", "--tag", "tricks") == 0
    names = {"from_name": "tricks", "to_name": "video", "type": "timelinelabels"}
    results = [
        {"id": "answer1", **names, "value": {"ranges": [{"start": 1, "end": 10}], "timelinelabels": ["up"]}},
        {"id": "answer2", **names, "value": {"ranges": [{"start": 11, "end": 20}], "timelinelabels": ["down"]}},
    ]
    prediction = {
        "model_version": "my_run 0f",
        "result": [results[0] | {"score": 0.5}, results[1] | {"score": 0.75}],
        "score": 0.625,
    }
    expected = {"data": {"video": "/data/local-files/?d=videos/x%20y%231.mp4", "fps": 24.0}}
    assert json.loads((tmp_path / "tasks.json").read_text()) == [expected | {"predictions": [prediction]}]
    assert "1 task with 2 answers" in capsys.readouterr().out


@pytest.mark.parametrize("fps", [10.0, 24.0, 25.0, 29.97])
def test_answers_that_are_accepted_come_back_as_the_same_segments(tmp_path, fps):
    make_videos(tmp_path / "videos", "x y#1.mp4")
    assert answers_to_tasks(tmp_path, SEGMENTS, "--fps", str(fps)) == 0
    (item,) = json.loads((tmp_path / "tasks.json").read_text())
    item["annotations"] = item.pop("predictions")
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps([item])}) == 0
    found = rows(tmp_path, "train")
    assert [(r["file_name"], r["label"]) for r in found] == [("x y#1.mp4", "up"), ("x y#1.mp4", "down")]
    times = [time for r in found for time in (r["start"], r["end"])]
    assert times == pytest.approx([0, 0.42, 0.42, 0.83], abs=0.5 / fps + 1e-6)
    assert times[1] == times[2]


def test_several_labels_of_a_window_come_back_as_labels_of_one_segment(tmp_path):
    make_videos(tmp_path / "videos", "x.mp4")
    several = [{"label": "run", "name": "run", "score": 0.8}, {"label": "jump", "name": "jump", "score": 0.6}]
    answers = [
        {"file": "x.mp4", "start": 0.0, "end": 0.5, "labels": several, "top_k": several},
        {"file": "x.mp4", "start": 0.5, "end": 0.9, "labels": [], "top_k": several},
    ]
    assert answers_to_tasks(tmp_path, answers, "--fps", "10") == 0
    (item,) = json.loads((tmp_path / "tasks.json").read_text())
    assert [r["score"] for r in item["predictions"][0]["result"]] == [0.8, 0.6]
    assert [r["id"] for r in item["predictions"][0]["result"]] == ["answer1", "answer2"]
    item["annotations"] = item.pop("predictions")
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps([item])}) == 0
    assert rows(tmp_path, "train") == [{"file_name": "x.mp4", "labels": ["run", "jump"], "start": 0.0, "end": 0.5}]


def test_answers_about_whole_videos_are_choices_and_texts(tmp_path):
    make_videos(tmp_path / "videos", "a", "b", "c", "d")
    several = [{"label": "run", "name": "run", "score": 0.8}, {"label": "jump", "name": "jump", "score": 0.6}]
    answers = [
        {"file": "c.pt", "label": None, "name": "none of these", "score": 0.2, "top_k": several},
        {"file": "d.pt", "labels": [], "top_k": several},
        {"file": "a.pt", "label": "run", "score": 0.9, "top_k": [{"label": "run", "score": 0.9}]},
        {"file": "b.pt", "caption": "it rains"},
        {"file": "b.pt", "question": "who?", "answer": "a man"},
    ]
    assert answers_to_tasks(tmp_path, answers) == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    predictions = [item["predictions"][0] for item in tasks]
    assert [p["result"][0]["value"] for p in predictions] == [{"choices": ["run"]}, {"text": ["it rains"]}]
    assert [p["result"][0]["type"] for p in predictions] == ["choices", "textarea"]
    assert predictions[0]["score"] == 0.9 and "score" not in predictions[1]
    both = annotations.results_of({"file": "d.pt", "labels": several}, None)
    assert both == [{"type": "choices", "value": {"choices": ["run", "jump"]}, "score": 0.6}]
    for item in tasks:
        item["annotations"] = item.pop("predictions")
    assert convert(tmp_path, "label_studio", {"export.json": json.dumps(tasks)}) == 0
    assert rows(tmp_path, "train") == [
        {"file_name": "a.pt", "label": "run"},
        {"file_name": "b.pt", "caption": ["it rains"]},
    ]


@pytest.mark.parametrize(
    "answers, flags, words",
    [
        (SEGMENTS, (), "Label Studio counts frames, not seconds: add --fps"),
        (SEGMENTS, ("--fps", "0"), "--fps must be above 0, not 0"),
        (SEGMENTS, ("--fps", "nan"), "--fps must be above 0, not nan"),
        ([{"file": "../x.mp4", "label": "a", "score": 1}], (), "x.mp4 is not in --videos"),
        ([{"file": "x.mp4", "label": "a"}], (), "answers.jsonl was not written by inference.py --output: no 'score'"),
        ([{"file": "x.mp4", "error": "e"}], (), "answers.jsonl has neither labels nor captions"),
        (SEGMENTS, ("--format", "list"), "--answers works with --format label_studio only"),
        (SEGMENTS, ("--annotations", "x"), "not allowed with argument"),
    ],
)
def test_bad_answers_are_one_line(tmp_path, capsys, answers, flags, words):
    (tmp_path / "videos").mkdir()
    assert answers_to_tasks(tmp_path, answers, *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "tasks.json").exists()


def test_tasks_are_not_replaced_without_overwrite(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "tasks.json").write_text("mine")
    assert answers_to_tasks(tmp_path, SEGMENTS, "--fps", "24") == 2
    assert "exists: add --overwrite" in capsys.readouterr().err and (tmp_path / "tasks.json").read_text() == "mine"
    assert answers_to_tasks(tmp_path, SEGMENTS, "--fps", "24", "--overwrite") == 0


# -- any file ---------------------------------------------------------------------------------------

#: an annotation file per format, and how many of its rows are found, missing, refused and unused
COUNTED = {
    "list": ({"train.csv": "#1.pt,run\n#2.pt,run\ngone.pt,run\n# 3.pt,\na.pt,run\na.pt,jump\n"}, (2, 1, 3, 0)),
    "list, spaces": ({"train.txt": "#1.pt run\n#2.pt run\n# a remark\n\na.pt run\n"}, (3, 1, 0, 0)),
    "list, titles": (
        {"train.csv": "path,label,split\n#1.pt,run,train\na.pt,run,unheard\n,run,\n,,\ngone,run\n"},
        (1, 1, 3, 0),
    ),
    "ucf101": ({"trainlist01.txt": "c/#1.avi 1\nc/a.avi 1\nc/gone.avi 1\na.avi 1\n"}, (2, 1, 1, 0)),
    "hmdb51": ({"c_test_split1.txt": "#1.avi 1\na.avi 1\ngone.avi 1\n#2.avi 0\n"}, (2, 1, 0, 1)),
    "kinetics": (
        {
            "train.csv": "label,youtube_id,time_start,time_end,split\nx,#1,0,1,train\n,a,0,1,train\nx,g,0,1,train\nx,a,0,1,odd\n"
        },
        (0, 2, 2, 0),
    ),
    "ssv2": (
        {"train.json": '[{"id": "#1", "template": "[x]"}, {"id": "a"}, {"id": "gone", "template": "y"}]'},
        (1, 1, 1, 0),
    ),
    "msrvtt": (
        {
            "x.json": '{"videos": [{"video_id": "#1", "split": "train"}, {"video_id": "a", "split": "train"}], "sentences": '
            '[{"video_id": "#1", "caption": "c"}, {"video_id": "a", "caption": " "}, {"video_id": "b", "caption": "c"}]}'
        },
        (1, 0, 2, 0),
    ),
    "msvd": ({"x.txt": "# a header\na one\na two\ngone three\nc/#1 four\nc/a\n"}, (2, 1, 1, 0)),
    "msvd, csv": (
        {"x.csv": "VideoID,Start,End,Language,Description\na,1,2,English,one\na,1,2,German,eins\nb,1,2,German,zwei\n"},
        (0, 1, 1, 0),
    ),
    "vatex": ({"x.txt": "#1|one|two\na|\ngone|three\n"}, (1, 1, 1, 0)),
    "videofolder": ({"x.csv": "file_name,text\n#1.pt,one\n#1.pt,\n,two\ngone.pt,three\na.pt,four\n"}, (2, 1, 2, 0)),
    "activitynet": (
        {
            "x.json": json.dumps(
                {
                    "database": {
                        "#1": {"subset": "training", "annotations": [{"segment": [0, 1.5], "label": "x"}] * 2},
                        "a": {"subset": "odd", "annotations": [{"segment": [1, 0], "label": "y"}]},
                        "g": {"subset": "training", "annotations": [{"segment": [1, 2], "label": "y"}]},
                        "t": {"subset": "training", "annotations": []},
                    }
                }
            )
        },
        (2, 1, 2, 0),
    ),
    "charades": ({"x.csv": "id,actions\n#1,c001 0 1;c002 0 1;c003 2 1\na,\ngone,c001 0 1\n"}, (2, 1, 2, 0)),
    "label_studio": (
        {
            "x.json": json.dumps(
                [
                    task("#1.pt", [timeline("a", 1, 2), timeline("b", 2, 3), timeline("b", 4, 3)], number=1),
                    task("a.pt", [result("choices", choices=["a"])], number=2),
                    task("gone.pt", [result("labels", start=1, end=2, labels=["a"])], number=3),
                    task("#2.pt", [result("choices", choices=["a"])], number=4, was_cancelled=True),
                    task("#2.pt", number=5),
                ]
            ).replace('"data": {', '"data": {"fps": 5, ')
        },
        (3, 1, 2, 1),
    ),
    "label_studio, JSON_MIN": (
        {
            "x.json": '[{"id": 1, "video": "#1.pt", "choice": "a"}, {"id": 2, "video": "gone.pt", "t": [{"start": 1, '
            '"end": 2, "labels": ["a", "b"]}]}, {"id": 3, "video": "a.pt"}]'
        },
        (1, 2, 1, 0),
    ),
    "frames": ({"x.txt": "f 1 2 run\nf 3 3 run\nf 7 9 run\n#g 2 run\nf run\n#1.pt 0 1 run\n"}, (2, 1, 3, 0)),
    "chat": (
        {
            "x.json": json.dumps(
                [
                    {"videos": [v], "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "a"}]}
                    for v, q in (("#1.pt", "q"), ("a.pt", "q"), ("a.pt", "q"), ("a.pt", "other"), ("gone", "q"))
                ]
            )
        },
        (3, 1, 1, 0),
    ),
}


def test_items_of_json_min_with_several_choices_or_texts(tmp_path):
    """A dict of choices, and a list of strings, as Label Studio writes them."""
    make_videos(tmp_path / "videos", "x", "y", "z")
    items = [
        {"id": 1, "video": "x.pt", "choice": {"choices": ["run", "jump"]}, "caption": ["a bike", "two bikes"]},
        {"id": 2, "video": "y.pt", "choice": "run", "caption": "a horse"},
        {"id": 3, "video": "z.pt", "choice": ["jump"]},
    ]
    files = {"x.json": json.dumps(items)}
    assert convert(tmp_path, "label_studio", files, "--multi_label", "True", "--split", "train") == 0
    found = {s.path.name: (sorted(s.labels), s.captions) for s in read_folder(tmp_path / "out" / "train")}
    assert found["x.pt"] == (["jump", "run"], ("a bike", "two bikes"))
    assert found["y.pt"] == (["run"], ("a horse",)) and found["z.pt"] == (["jump"], ())


@pytest.mark.parametrize("case", COUNTED)
def test_every_row_is_counted_once(tmp_path, capsys, case):
    files, expected = COUNTED[case]
    make_videos(tmp_path / "videos", "#1", "#2", "a", "c/#1", "c/#2", "c/a")
    (tmp_path / "videos" / "f").mkdir()
    for index in (1, 2, 3):
        Image.new("RGB", (16, 16)).save(tmp_path / "videos" / "f" / f"{index}.png")
    status = convert(tmp_path, case.partition(",")[0], files, "--split", "train", "--no_scan")
    if expected[0] == 0:  # nothing to write, so it is an error that has the counts
        assert status == 2 and f"{expected[2]} refused" in capsys.readouterr().err
        return
    assert status == 0
    report = json.loads((tmp_path / "out" / "train" / "conversion.json").read_text())
    names = ("found", "missing", "refused", "unused")
    assert tuple(report[n] if isinstance(report[n], int) else len(report[n]) for n in names) == expected
    assert report["rows"] == sum(expected)


HOSTILE = (
    "\0",
    "\x1b[2J",
    "\u2028",
    "\x85",
    "\r",
    "\n",
    "\t",
    '"',
    "'",
    ",",
    "|",
    "#",
    "[",
    "{",
    "]",
    "}",
    " ",
    "..",
    "/",
    "9" * 5000,
    "1e999",
    "nan",
    "-1",
    "²",
    "\udcff",
    "\ufeff",
    "\u202e",
    "null",
    "x" * 300,
    "[" * 3000,
)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 5), st.sampled_from(HOSTILE)), min_size=1, max_size=3)


@given(st.sampled_from(list(COUNTED)), EDITS)
def test_any_annotation_file_is_counted_or_refused(tmp_path_factory, capsys, case, edits):
    """A valid file with cuts and hostile insertions: status 0 and counts that add up, or one line and status 2."""
    folder = tmp_path_factory.mktemp("any")
    ((file, text),) = COUNTED[case][0].items()
    for place, length, piece in edits:
        text = text[: place % len(text)] + piece + text[place % len(text) + length :]
    make_videos(folder / "videos", "#1", "a", "c/a")
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    argv = ["--annotations", str(folder / file), "--videos", str(folder / "videos"), "--output", str(folder / "out")]
    status = convert_dataset.main(["--format", case.partition(",")[0], *argv, "--no_scan"])
    out, err = capsys.readouterr()
    assert status == (2 if err else 0) and err.count("\n") == (1 if err else 0) and err[:7] in ("", "error: ")
    assert not UNSAFE.search((out + err).replace("\n", ""))
    for report in folder.glob("out/*/conversion.json"):
        values = json.loads(report.read_text(encoding="utf-8"))
        counts = [values["found"], len(values["missing"]), len(values["refused"]), values["unused"]]
        assert sum(counts) == values["rows"]


def test_clips_of_hmdb51_whose_names_begin_like_comments(tmp_path):
    make_videos(tmp_path / "videos", "chew/#20_Gum_chew_h_nm_np1.avi", "chew/a.avi")
    assert convert(tmp_path, "hmdb51", {"chew_test_split1.txt": "#20_Gum_chew_h_nm_np1.avi 1 \na.avi 2 \n"}) == 0
    assert labels(tmp_path, "train") == {"chew/#20_Gum_chew_h_nm_np1.avi": "chew"}


SEPARATED = "one\u2028two\x85three\x0bfour\x0cfive\x1csix"


@pytest.mark.parametrize(
    "name, file, text",
    [
        ("list", "train.csv", f"path,caption\r\nx.pt,{SEPARATED}\r\n"),
        ("list", "train.tsv", f"path\tcaption\nx.pt\t{SEPARATED}\n"),
        ("msvd", "train.txt", f"x {SEPARATED}\r\n"),
        ("msvd", "train.csv", f"VideoID,Start,End,Language,Description\nx,1,2,English,{SEPARATED}\n"),
        ("vatex", "train.txt", f"x|{SEPARATED}\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_only_line_feeds_end_a_line(tmp_path, name, file, text, encoding):
    make_videos(tmp_path / "videos", "x", "x_1_2")
    assert convert(tmp_path, name, {file: text}, encoding=encoding) == 0
    assert rows(tmp_path, "train")[0]["caption"] == [SEPARATED]
    (sample,) = [s for s in read_folder(tmp_path / "out" / "train") if s.captions]
    assert sample.captions == (SEPARATED,)


def test_quoted_cells_hold_line_breaks_and_commas(tmp_path):
    make_videos(tmp_path / "videos", "x")
    assert convert(tmp_path, "list", {"train.csv": 'path,caption\n"x.pt","first line\nsecond, line"\n'}) == 0
    assert rows(tmp_path, "train")[0]["caption"] == ["first line\nsecond, line"]


def test_odd_names_cannot_control_the_terminal(tmp_path, capsys):
    make_videos(tmp_path / "videos", "x")
    text = 'path,label\nx.pt,red \x1b[31m\n"gone\x07\n",a\n\x1b]0;t\x07,\n' + "long" * 5000 + ",a\n"
    assert convert(tmp_path, "list", {"train.csv": text}) == 0
    out = capsys.readouterr().out
    assert not UNSAFE.search(out.replace("\n", "")) and max(map(len, out.splitlines())) < 1500
    assert labels(tmp_path, "train") == {"x.pt": "red \x1b[31m"}


@pytest.mark.parametrize(
    "names, words",
    [
        ({"names.json": '{"run": 0, "jump": 0}'}, "a class number is listed twice"),
        ({"names.json": '{"0": "run"}'}, 'expected {"jumping": 3, ...}'),
        ({"names.json": '["run"]'}, 'expected {"jumping": 3, ...}'),
        ({"names.json": "[" * 100_000}, "names.json"),
        ({"names.txt": "0 run\n0 jump\n"}, "a class number is listed twice"),
        ({"names.txt": "run\n"}, "--class_names has no class 1"),
        ({"names.txt": "run\njump\n"}, "--class_names has no class 1.0"),
    ],
)
def test_ambiguous_class_names_are_refused(tmp_path, capsys, names, words):
    make_videos(tmp_path / "videos", "x")
    ((file, text),) = names.items()
    (tmp_path / file).write_text(text)
    number = "1.0" if words.endswith("1.0") else "1"  # pandas writes whole numbers so, if one of a column is missing
    assert convert(tmp_path, "list", {"train.txt": f"x.pt {number}\n"}, "--class_names", str(tmp_path / file)) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_class_names_may_begin_with_a_hash(tmp_path):
    make_videos(tmp_path / "videos", "x", "y")
    (tmp_path / "names.txt").write_text("#one\n#two\n")
    flags = ("--class_names", str(tmp_path / "names.txt"))
    assert convert(tmp_path, "list", {"train.txt": "x.pt 0\ny.pt 1\n"}, *flags) == 0
    assert labels(tmp_path, "train") == {"x.pt": "#one", "y.pt": "#two"}


def test_missing_and_unreadable_are_counted_and_named(tmp_path, capsys):
    make_videos(tmp_path / "videos", "a.mp4", "b.mp4")
    (tmp_path / "videos/b.mp4").write_bytes((tmp_path / "videos/b.mp4").read_bytes()[:100])
    assert convert(tmp_path, "list", {"train.txt": "a.mp4 x\nb.mp4 x\ngone.mp4 y\n"}) == 0
    out = capsys.readouterr().out
    assert labels(tmp_path, "train") == {"a.mp4": "x"}
    assert "gone.mp4" in out and "b.mp4" in out
    report = json.loads((tmp_path / "out/train/conversion.json").read_text())
    numbers = {k: report[k] for k in ("rows", "found", "videos", "classes", "missing")}
    assert numbers == {
        "rows": 3,
        "found": 2,
        "videos": 1,
        "missing": ["gone.mp4"],
        "classes": {"x": {"rows": 2, "videos": 1}, "y": {"rows": 1, "videos": 0}},
    }
    assert len(report["unreadable"]) == 1 and "b.mp4" in report["unreadable"][0]


def test_a_name_with_another_folder_is_another_video(tmp_path, capsys):
    """jumping/0001 must not become running/0001. An id without a folder is found anywhere, if it is unique."""
    make_videos(tmp_path / "videos", "running/0001", "deep/down/id7", "one/twice", "two/twice")
    text = "jumping/0001 a\nid7 b\nsome/prefix/running/0001.mp4 c\ntwice d\none/twice e\n"
    assert convert(tmp_path, "list", {"train.txt": text}) == 0
    assert labels(tmp_path, "train") == {"deep/down/id7.pt": "b", "running/0001.pt": "c", "one/twice.pt": "e"}
    assert "twice: 2 files have this name" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, files, words",
    [
        ("msrvtt", {"x.json": "{}"}, "x.json is not in --format msrvtt: no 'sentences'"),
        ("ssv2", {"x.json": "not json"}, "x.json is not in --format ssv2"),
        ("kinetics", {"x.csv": "a,b\n1,2\n"}, "x.csv is not in --format kinetics: no 'time_start'"),
        ("hmdb51", {"x.txt": "a.avi 1\n"}, "<class>_test_split<n>.txt"),
        ("list", {"train.txt": ""}, "the annotation files contain no rows"),
        ("list", {"train.txt": "gone.mp4 a\n"}, "1 not found in"),
        ("list", {"train.txt": "x.pt 1 2\n"}, "1 refused, first x.pt: several labels"),
        ("list", {"train.csv": "path,label\nx.pt,a,b\n"}, "3 cells for 2 columns: 'x.pt, a, b'; put quotes"),
        ("list", {"train.csv": "path,label,label\nx.pt,a,b\n"}, "--format list: two columns are named label"),
        ("list", {"train.csv": 'path,label\nx.pt,"a\n'}, "train.csv is not in --format list: line 2: unexpected end"),
        ("list", {"train.csv": "x.pt," + "a" * 200_000}, "line 1: field larger than field limit"),
        ("list", {"train.csv": "x\0.pt,a\n"}, "1 not found in"),
        ("list", {"train.json": "[]"}, "train.json is not in --format list: expected lines of text, not JSON"),
        (
            "msvd",
            {"x.json": '{"x": ["a caption"]}'},
            "x.json is not in --format msvd: expected lines of text, not JSON",
        ),
        ("kinetics", {"x.csv": "label,youtube_id,time_start,time_end\na,b,inf,1\n"}, "cannot convert float infinity"),
        ("frames", {"x.txt": f"x {'9' * 5000} 1 a\n"}, "x.txt is not in --format frames: Exceeds the limit"),
        ("frames", {"x.txt": "x 1 2 a\n"}, "x.pt has no images numbered from 1 to 2"),
        ("ssv2", {"x.json": "[" * 100_000}, "x.json is not in --format ssv2: it is nested too deeply"),
        ("ssv2", {"x.json": '[{"id": "x", "template": "a", "label": ["b"]}]'}, "must be strings"),
        ("activitynet", {"x.json": '{"database": {"x": {"subset": "train", "annotations": [{}]}}}'}, "no 'segment'"),
        ("activitynet", {"x.json": "[]"}, "x.json is not in --format activitynet"),
        ("charades", {"x.csv": "id,actions\nx,c001 1\n"}, "x.csv is not in --format charades: not enough values"),
        ("label_studio", {"x.json": '{"data": {}}'}, "x.json is not in --format label_studio"),
        ("label_studio", {"x.json": '[{"data": {"video": "x.pt"}, "annotations": [3]}]'}, "--format label_studio"),
        ("videofolder", {"metadata.csv": "path,label\nx.pt,a\n"}, "--format videofolder: no column file_name"),
        ("videofolder", {"metadata.jsonl": "{}"}, "expected lines of text, not JSON"),
        ("chat", {"x.json": '{"messages": []}'}, "x.json is not in --format chat"),
        ("vatex", {"x.json": '[{"videoID": 7, "enCap": ["a"]}]'}, "x.json is not in --format vatex"),
    ],
)
def test_bad_annotations_are_one_line(tmp_path, capsys, name, files, words):
    make_videos(tmp_path / "videos", "x")
    assert convert(tmp_path, name, files) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*/metadata.jsonl"))


@pytest.mark.parametrize("place", ["a full disk", "beneath a file", "NUL"])
def test_an_output_that_cannot_be_written_leaves_no_files(tmp_path, capsys, monkeypatch, place):
    make_videos(tmp_path / "videos", "x")
    (tmp_path / "file").write_text("x")
    output = {"a full disk": "out", "beneath a file": "file/out", "NUL": "a\0b"}[place]

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "a full disk":
        monkeypatch.setattr(os, "fsync", no_space)
    assert convert(tmp_path, "list", {"train.txt": "x.pt a\n"}, "--no_scan", "--output", str(tmp_path / output)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot ") and err.count("\n") == 1 and "\0" not in err
    assert not [path for path in tmp_path.glob("out/**/*") if path.is_file()]


def test_splits_are_added_and_nothing_is_replaced_without_overwrite(tmp_path, capsys):
    make_videos(tmp_path / "videos", "a", "b", "c", "d")
    assert convert(tmp_path, "list", {"test.csv": "a.pt,x\n"}) == 0
    assert "convert the training list" in capsys.readouterr().out
    assert convert(tmp_path, "list", {"train.csv": "b.pt,x\nc.pt,y\nd.pt,y\n"}) == 0
    splits = read_splits(tmp_path / "out")
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (3, 1)
    assert convert(tmp_path, "list", {"train.csv": "a.pt,x\n"}) == 2
    assert "exists: add --overwrite" in capsys.readouterr().err
    assert convert(tmp_path, "list", {"train.csv": "a.pt,x\n"}, "--overwrite") == 0
    assert labels(tmp_path, "train") == {"a.pt": "x"}


def stand_ins(folder: Path, name: str, files: list[Path]) -> Path:
    """Writes a tensor video for every row of real annotation files."""
    video = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for file in files:
        for row in convert_dataset.FORMATS[name](file):
            path = folder / Path(row.video).with_suffix(".pt")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(video, path)
    return folder


@pytest.mark.parametrize(
    "name, places, expected",
    [
        (
            "ucf101",
            ["ucf101/trainlist01_head600.txt", "ucf101/testlist01.txt"],
            {"train": (600, 7, 0), "test": (3783, 101, 0)},
        ),
        ("kinetics", ["kinetics/k400_val_head300.csv"], {"val": (300, 7, 0)}),
        ("ssv2", ["ssv2/finetune_5shot_training.json"], {"train": (430, 86, 430)}),
        (
            "msrvtt",
            ["msrvtt/videodatainfo_sample.json"],
            {"train": (10, 0, 200), "val": (10, 0, 200), "test": (10, 0, 200)},
        ),
        ("vatex", ["vatex/vatex_test_sample_cp1252.csv"], {"test": (47, 0, 470)}),
        ("chat", ["chat/mllm_video_demo.json"], {"train": (3, 0, 3)}),
    ],
)
def test_real_annotation_files(real_data, tmp_path, name, places, expected):
    """Rows, classes and captions of published files, against counts made with other tools."""
    files = [real_data / "annotations" / place for place in places]
    videos = stand_ins(tmp_path / "videos", name, files)
    argv = ["--format", name, "--annotations", *map(str, files), "--videos", str(videos)]
    assert convert_dataset.main([*argv, "--output", str(tmp_path / "out"), "--no_scan"]) == 0
    for split, (count, classes, captions) in expected.items():
        samples = read_folder(tmp_path / "out" / split)
        assert len(samples) == count
        assert len({s.label for s in samples} - {None}) == classes
        assert sum(len(s.captions) for s in samples) == captions
        assert not any("�" in c or "[" in (s.label or "") for s in samples for c in (*s.captions, ""))
    if name == "ssv2":
        known = json.loads((real_data / "annotations/ssv2/finetune_labels.json").read_text())
        assert {s.label for s in read_folder(tmp_path / "out/train")} <= set(known)


def test_real_frame_list(real_data, tmp_path):
    argv = ["--format", "frames", "--annotations", str(real_data / "frames/annotations.txt")]
    assert convert_dataset.main([*argv, "--videos", str(real_data / "frames"), "--output", str(tmp_path)]) == 0
    samples = read_folder(tmp_path / "train")
    assert [(s.path.resolve().parent.name, s.label) for s in samples] == [("jumping", "0")] * 2 + [("running", "1")] * 2
    assert [len(open_video(s.path)) for s in samples][:3] == [17, 18, 15]
    assert np.diff([len(open_video(s.path)) for s in samples[2:]]) == 0


PUBLISHED = [
    *(
        ("ucf101", f"ucf101/t*list0{split}.txt", {"train": (train, 101), "test": (test, 101)})
        for split, train, test in ((1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696))
    ),
    *(("hmdb51", f"hmdb51/*_test_split{split}.txt", {"train": (3570, 51), "test": (1530, 51)}) for split in (1, 2, 3)),
    ("kinetics", "kinetics-400_val.csv", {"val": (19906, 400)}),
    ("kinetics", "kinetics-600_val.csv", {"val": (30000, 600)}),
    ("msvd", "msvd/msvd_*.txt", {"train": (1200, 0), "val": (100, 0), "test": (670, 0)}),
    ("charades", "Charades_v1_t*.csv", {"train": (49809 - 7, 157), "test": (16691, 157)}),  # 7 end before they start
    ("activitynet", "thumos14.json", {"val": (3007, 20), "test": (3358, 20)}),
    ("vatex", "vatex_test.csv", {"test": (5336, 0, 53360)}),
    # the Italian list has captions for 100 of the 2,990 test videos only
    ("msrvtt", "msrvtt_it.json", {"train": (6513, 0, 130260), "val": (497, 0, 9940), "test": (100, 0, 2000)}),
    (
        "activitynet",
        "activitynet13.json",
        {"train": (14850, 200), "val": (7290, 200)},
    ),  # 12 do not end after they start
]


@pytest.mark.slow
@pytest.mark.parametrize("name, places, expected", PUBLISHED, ids=[f"{name} {places}" for name, places, _ in PUBLISHED])
def test_published_lists_have_the_published_counts(real_data, tmp_path, name, places, expected):
    """Rows with a video, classes, and for some the captions, of whole lists, all of whose videos exist."""
    files = sorted((real_data / "lists").glob(places))
    if not files:
        pytest.skip(f"VIDTUNE_TEST_DATA has no lists/{places}")
    for row in (row for file in files for row in convert_dataset.FORMATS[name](file)):
        path = tmp_path / "videos" / (row.video if row.video.endswith(".avi") else f"{row.video}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    argv = ["--format", name, "--annotations", *map(str, files), "--videos", str(tmp_path / "videos")]
    assert convert_dataset.main([*argv, "--output", str(tmp_path / "out"), "--no_scan"]) == 0
    for split, counts in expected.items():
        report = json.loads((tmp_path / "out" / split / "conversion.json").read_text())
        found = (report["found"], len(report["classes"]), report["captions"])
        assert found[: len(counts)] == counts and not report["missing"]
