"""Clips of one recording stay together: held-out val, doctor, intervals, conversion; and near copies are found."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_full, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import convert_dataset
import doctor
import feature_cache
import main
import metrics
import score
from config import parse
from extras import groups, multilabel
from extras.groups import COPY, PER_COMPONENT, crossing_clips, guess, near_copies, shared_recordings, whitened
from readers import ReadError, find_videos, open_video
from runs import prepare
from script import UserError
from VLoader import Sample, hold_out, read_splits


def clip(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.full((4, 3, 16, 16), shade, dtype=torch.uint8), path)


def make_data(folder: Path, names: list[str], groups: dict[str, str] | None = None) -> Path:
    """A data folder with these videos, and with `group` rows for some of them: {name: group}."""
    for number, name in enumerate(names):
        clip(folder / name, number)
    for split in {Path(name).parts[0] for name in groups or {}}:
        rows = [
            {"file_name": name.removeprefix(f"{split}/"), "group": group}
            for name, group in groups.items()
            if name.startswith(f"{split}/")
        ]
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def in_recordings(classes: int = 2, recordings: int = 4, clips: int = 3, split: str = "train") -> list[str]:
    """Names like train/b/v_b_g03_c02.pt; recordings of different classes have different names."""
    return [
        f"{split}/{label}/v_{label}_g{r:02d}_c{c:02d}.pt"
        for label in "abcd"[:classes]
        for r in range(recordings)
        for c in range(clips)
    ]


def recording_in(name: str) -> str:
    return Path(name).name.rsplit("_", 1)[0]


def flags(data: Path, runs: Path, *more: str) -> list[str]:
    fixed = ["--data_dir", str(data), "--output_dir", str(runs), "--num_workers", "0", "--image_size", "16"]
    return [*fixed, "--freeze_visionbackbone", "True", "--num_frames", "2", *more]


# -- val -------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), min_size=4, max_size=80),
    st.integers(0, 1000),
)
def test_no_recording_is_on_both_sides_and_every_class_keeps_training_clips(clips, salt):
    samples = [
        Sample(Path("train", f"{salt}_{i}.mp4"), str(label), group=f"{salt}-{group}" if known else None)
        for i, (group, label, known) in enumerate(clips)
    ]
    units = {s.recording for s in samples}
    if not any(could_leave(samples, unit) for unit in units):
        with pytest.raises(UserError, match="too few"):
            hold_out(samples, Path("train"))
        return
    train, val = hold_out(samples, Path("train"))
    assert sorted(train + val, key=str) == sorted(samples, key=str) and val
    assert not {s.recording for s in train} & {s.recording for s in val}
    assert {s.label for s in train} == {s.label for s in samples}
    assert {*hold_out(samples[::-1], Path("train"))[1]} == {*val}  # the order of the files does not matter


def could_leave(samples: list[Sample], unit: str) -> bool:
    """Whether each of its classes has another recording, and most of its clips in others."""
    for label in {s.label for s in samples if s.recording == unit}:
        own = [s for s in samples if s.label == label]
        inside = [s for s in own if s.recording == unit]
        if len(inside) == len(own) or (inside[0].group is not None and 2 * len(inside) > len(own)):
            return False
    return True


def test_without_groups_the_same_videos_are_held_out_as_ever():
    """These two of 24 are what earlier versions held out."""
    samples = [Sample(Path("train", name), "ab"[i % 2]) for i, name in enumerate(f"{n}.mp4" for n in range(24))]
    assert [s.path.name for s in hold_out(samples, Path("train"))[1]] == ["2.mp4", "19.mp4"]


@pytest.mark.parametrize("rule", ["auto", "column", r"(.+_g\d+)_c\d+", r"g\d+", "parent"])
def test_each_rule_holds_out_whole_recordings(tmp_path, rule):
    names = in_recordings()
    if rule == "parent":
        names = [f"{Path(n).parent}/{recording_in(n)[-3:]}/{Path(n).name}" for n in names]
    rows = {name: recording_in(name) for name in names} if rule in ("auto", "column") else None
    splits = read_splits(make_data(tmp_path, names, rows), group_by=rule)
    # g02 of both classes is one recording to `g\d+` and to folders, and two to the others
    shared = rule in (r"g\d+", "parent")
    expected = {recording_in(s.path.name)[-3:] if shared else recording_in(s.path.name) for s in splits.val}
    assert {s.group for s in splits.val} == expected and not shared_recordings(splits)
    assert len(splits.val) == len(expected) * (6 if shared else 3)
    assert {s.label for s in splits.val} == {s.label for s in splits.train} == {"a", "b"}
    assert "in whole recordings" in splits.note and "none of" not in splits.note


def test_none_ignores_the_groups_in_metadata(tmp_path):
    names = in_recordings()
    data = make_data(tmp_path, names, {name: recording_in(name) for name in names})
    splits = read_splits(data, group_by="none")
    (data / "train" / "metadata.jsonl").unlink()
    plain = read_splits(data)
    assert splits.val == plain.val and splits.train == plain.train and splits.note == plain.note


def test_a_class_with_one_recording_stays_in_train(tmp_path):
    names = [*in_recordings(1), *(f"train/z/v_z_g00_c{c:02d}.pt" for c in range(3))]
    splits = read_splits(make_data(tmp_path, names), group_by=r"(.+_g\d+)_c\d+")
    assert {s.label for s in splits.val} == {"a"} and sum(s.label == "z" for s in splits.train) == 3
    assert splits.note.endswith("; none of z: too few recordings, all stay in train")


def test_an_empty_group_is_none(tmp_path):
    """Tables are often exported with "" where nothing is known."""
    names = in_recordings()
    data = make_data(tmp_path, names, dict.fromkeys(names, ""))
    assert {s.group for s in read_splits(data).train} == {None}
    with pytest.raises(UserError, match=r"--group_by column: 24 of 24 rows of metadata\.jsonl have no group"):
        read_splits(data, group_by="column")
    (data / "train" / "metadata.jsonl").write_text('{"file_name": "a/v_a_g00_c00.pt", "group": 3}')
    with pytest.raises(UserError, match="line 1: group must be a string"):
        read_splits(data)


def test_with_several_labels_the_line_about_val_names_labels(tmp_path):
    """Clips may have `labels`, a class folder, or no label at all."""
    names = in_recordings(1) + [f"train/z/v_z_g00_c{c:02d}.pt" for c in range(3)] + ["train/v_n_g00_c00.pt"]
    data = make_data(tmp_path, names)
    rows = [{"file_name": name.removeprefix("train/"), "labels": ["a", "x"]} for name in names[:12]]
    rows.append({"file_name": "v_n_g00_c00.pt", "labels": []})
    (data / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = read_splits(data, group_by=r"(.+_g\d+)_c\d+")
    assert {s.labels for s in splits.val} == {("a", "x")}
    assert splits.note.endswith("; none of z: too few recordings, all stay in train")


def test_the_class_folder_is_no_recording_of_clips_with_labels(tmp_path):
    names = [f"train/{c}/day{r}/{k}.pt" for c in "ab" for r in range(5) for k in range(2)]
    data = make_data(tmp_path, names)
    rows = [{"file_name": name.removeprefix("train/"), "labels": ["z", name.split("/")[1]]} for name in names]
    (data / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = read_splits(data, group_by="parent")
    assert {s.group for s in [*splits.train, *splits.val]} == {f"day{r}" for r in range(5)}


def test_val_without_a_recording_still_says_that_they_are_kept_whole(tmp_path):
    names = [f"train/a/clip_{i}.pt" for i in range(4)] + [f"train/z/clip_{i}.pt" for i in range(3)]
    data = make_data(tmp_path, names, {name: "one" for name in names[4:]})
    splits = read_splits(data)
    assert {s.label for s in splits.val} == {"a"}
    assert splits.note.endswith("in whole recordings; none of z: too few recordings, all stay in train")


def test_a_recording_with_most_clips_of_a_class_stays_in_train(tmp_path):
    names = [f"train/a/big_{i}.pt" for i in range(9)] + ["train/a/small_0.pt", "train/b/x_0.pt", "train/b/y_0.pt"]
    splits = read_splits(make_data(tmp_path, names), group_by=r"(.+)_\d")
    assert [s.group for s in splits.val if s.label == "a"] == ["small"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("column", "--group_by column: 23 of 24 rows of metadata.jsonl have no group, first"),
        ("parent", "--group_by parent: no video lies in a folder below its class folder"),
        ("nothing(x)", "--group_by nothing(x): no video has a name that it matches"),
        ("(", "--group_by: expected auto, column, parent, none or a regular expression (missing ), unterminated"),
        ("", "--group_by: expected auto, column, parent, none or a regular expression, not ''"),
    ],
)
def test_a_rule_that_does_not_fit_is_one_line(tmp_path, capsys, rule, message):
    data = make_data(tmp_path / "data", in_recordings(), {"train/a/v_a_g00_c00.pt": "one"})
    assert main.main(flags(data, tmp_path / "runs", "--group_by", rule)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_video_with_two_groups_is_one_line(tmp_path):
    data = make_data(tmp_path, in_recordings())
    rows = [
        {"file_name": "a/v_a_g00_c00.pt", "start": i, "end": i + 1, "fps": 1, "group": g} for i, g in enumerate("xy")
    ]
    (data / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"v_a_g00_c00.pt has two groups, 'x' and 'y'; a video has only one"):
        read_splits(data)
    (data / "train" / "metadata.jsonl").write_text(json.dumps(rows[0] | {"group": 7}))
    with pytest.raises(UserError, match="group must be a string"):
        read_splits(data)


# -- recordings in two splits ----------------------------------------------------------------------


def crossing_data(folder: Path) -> Path:
    """g00 of each class is in train and in test; there is no val/."""
    tests = [
        name.replace("train/", "test/") for name in in_recordings(clips=4) if "_g00_c03" in name or "_g03_" in name
    ]
    return make_data(folder, [n for n in in_recordings() if "_g03_" not in n] + tests)


def test_recordings_in_two_splits_fail_the_doctor_and_are_warned_of(tmp_path, capsys):
    data = crossing_data(tmp_path / "data")
    rule = ["--group_by", r"(.+_g\d+)_c\d+"]
    assert doctor.main(flags(data, tmp_path / "runs", *rule)) == 1
    out = capsys.readouterr().out
    assert "FAIL  no recording is in two splits" in out
    assert "2 recordings in train and test: v_a_g00, v_b_g00\n" in out
    assert main.main(flags(data, tmp_path / "runs", *rule, "--epochs", "1", "--run_name", "r")) == 0
    out = capsys.readouterr().out
    assert out.count("warning: 2 recordings in train and test, so these splits are not independent") == 1
    assert "test of epoch 1 on 10 videos of 4 recordings" in out
    # none was moved
    rows = [json.loads(line) for line in (tmp_path / "runs" / "r" / "predictions_test.jsonl").read_text().splitlines()]
    assert sorted(os.path.relpath(row["file"], data) for row in rows) == sorted(
        f"test/{path.parent.name}/{path.name}" for path in find_videos(data / "test")
    )
    assert all(row["group"] == recording_in(row["file"]) for row in rows)

    # metrics.py and score.py find the same intervals as the run
    saved = json.loads((tmp_path / "runs" / "r" / "metrics.json").read_text())["test"]
    assert metrics.main(["--predictions", str(tmp_path / "runs" / "r" / "predictions_test.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recordings"] == saved["recordings"] == 4
    for name in ("accuracy", "macro_f1"):  # exact; confidences are rounded in the rows
        assert found["intervals"][name] == saved["intervals"][name]
    assert score.main(["--checkpoint", str(tmp_path / "runs" / "r"), "--num_workers", "0"]) == 0
    assert json.loads((tmp_path / "runs" / "r" / "metrics.json").read_text())["test"] == saved


def test_the_doctor_guesses_recordings_from_names(tmp_path, capsys):
    data = crossing_data(tmp_path / "data")
    doctor.main(flags(data, tmp_path / "runs"))
    out = capsys.readouterr().out
    assert "WARN  no recording is in two splits" in out
    assert "2 of 10 test clips with train" in out and r"add --group_by '(.+_g\d+)_c\d+'" in out
    held_out = read_splits(data)
    shared = {recording_in(s.path.name) for s in held_out.train}
    count = sum(recording_in(s.path.name) in shared for s in held_out.val)
    assert f"{count} of 2 val clips with train" in out


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("{split}/a/v_a_g{r:02d}_c{c:02d}.avi", r"(.+_g\d+)_c\d+"),
        ("{split}/a/dQw{r}_00{c}000_00{c}010.mp4", r"(.+)_\d+_\d+(\.\w+)?$"),
        ("{split}/a/match {r}-clip{c}.mp4", r"(.+)[ _-][a-z]*\d+(\.\w+)?$"),
        ("{split}/a/April_{r}_brush_u_nm_np1_ba_goo_{c}.avi", r"(.+)[ _-][a-z]*\d+(\.\w+)?$"),
        ("{split}/a/day{r}/{c}.mp4", "parent"),
        ("{split}/a/video_{r}{c}.pt", ""),  # one prefix for all is no recording
        ("{split}/a/{r}{c}.mp4", ""),
        ("{split}/a/dQw{r}{c}_000000_000010.mp4", ""),  # one clip of each
    ],
)
def test_what_names_suggest(tmp_path, name, rule):
    """Train and test have the first and the second two clips of each recording."""
    from VLoader import Splits

    parts = {
        split: [Sample(tmp_path / name.format(split=split, r=r, c=c), "a") for r in range(5) for c in clips]
        for split, clips in (("train", (1, 2)), ("test", (3, 4)))
    }
    splits = Splits(parts["train"], [], parts["test"], ["a"], "")
    found = guess(splits, tmp_path)
    assert found == rule
    if rule:
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
        assert crossing_clips(splits, found, tmp_path) == ["10 of 10 test clips with train"]


# -- intervals -------------------------------------------------------------------------------------


def clustered(seed: int, recordings: int) -> tuple[np.ndarray, list[str]]:
    """Answers that depend on their recording: (right (n,), the recording of each)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 12, recordings)
    easy = rng.beta(0.7, 0.5, recordings)
    names = [f"r{number}" for number, size in enumerate(sizes) for _ in range(size)]
    right = np.concatenate([rng.random(size) < p for size, p in zip(sizes, easy, strict=True)])
    order = rng.permutation(len(names))
    return right[order], [names[i] for i in order]


def test_the_clustered_bootstrap_is_that_of_explicit_draws_and_of_the_formula():
    right, names = clustered(0, 80)
    with in_full():
        (draws,) = metrics.resampled([lambda i: {"accuracy": float(right[i].mean())}], len(right), groups=names)
        found = metrics.with_intervals(lambda i: {"accuracy": float(right[i].mean())}, len(right), names)
        plain = metrics.with_intervals(lambda i: {"accuracy": float(right[i].mean())}, len(right))

    # the same draws, clip by clip
    rng, unique = np.random.default_rng(0), list(dict.fromkeys(names))
    for value in draws["accuracy"][:100]:
        answers = []
        for g in rng.integers(0, 80, 80):
            answers += [bool(r) for r, name in zip(right, names, strict=True) if name == unique[g]]
        assert value == pytest.approx(sum(answers) / len(answers))

    # the cluster-robust standard error of a mean: residuals are summed within each recording
    sums = [sum(right[i] - right.mean() for i, name in enumerate(names) if name == g) for g in unique]
    error = np.sqrt(np.sum(np.square(sums))) / len(right)
    assert draws["accuracy"].std() == pytest.approx(error, rel=0.1)
    low, high = found["intervals"]["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    plain_low, plain_high = plain["intervals"]["accuracy"]
    assert high - low > 1.5 * (plain_high - plain_low)


def test_clips_that_are_all_independent_get_the_intervals_as_before():
    right, _ = clustered(1, 20)
    summary = lambda i: {"accuracy": float(right[i].mean())}  # noqa: E731
    alone = [str(i) for i in range(len(right))]
    assert metrics.with_intervals(summary, len(right), alone) == metrics.with_intervals(summary, len(right))
    assert metrics.fraction_interval(right, alone) == metrics.wilson(right.sum(), len(right))


def test_perfect_scores_and_single_recordings_count_each_recording_once():
    perfect = metrics.with_intervals(lambda i: {"accuracy": 1.0}, 100, [str(i % 5) for i in range(100)])
    assert perfect["intervals"]["accuracy"] == metrics.wilson(5, 5)
    alone = metrics.with_intervals(lambda i: {"accuracy": 0.7}, 100, ["one"] * 100)
    low, high = alone["intervals"]["accuracy"]
    assert low < 0.3 and high > 0.9  # one recording says little


def test_answers_about_one_recording_count_once():
    right = np.array([True, False, True, True])
    for names in (["a"] * 4, ["a", "a", "b", "b"]):
        scores = metrics.question_scores(right, [None] * 4, names)
        expected = metrics.with_intervals(lambda i: {"accuracy": float(right[i].mean())}, 4, names)["intervals"]
        assert scores["accuracy"] == 0.75 and scores["interval"] == expected["accuracy"]
    low, high = metrics.question_scores(right, [None] * 4, ["a"] * 4)["interval"]
    assert [low, high] == metrics.wilson(0.75, 1)


def test_a_perfect_ranking_counts_each_recording_once():
    """With several labels per clip."""
    truth, samples = np.array([[1, 0]] * 4 + [[0, 1]] * 4, bool), []
    for number in range(8):
        samples.append(Sample(Path(f"{number}.pt"), group=f"match {number // 2}", labels=("ab"[number // 4],)))
    result = {"truth": truth, "probabilities": np.where(truth, 0.9, 0.1)}
    scores, _ = multilabel.multi_label_scores(result, samples, "ab", None)
    assert scores["classes"]["a"]["interval"] == metrics.wilson(2, 2)


def test_the_difference_of_two_models_draws_recordings_and_leaves_out_mcnemar(tmp_path, capsys):
    right, names = clustered(2, 12)
    rows = [
        {"file": f"{i}.mp4", "group": g, "truth": "a", "label": "ab"[not r], "score": 0.9}
        | {"top_k": [{"label": "ab"[not r], "score": 0.9}, {"label": "ba"[not r], "score": 0.1}]}
        for i, (r, g) in enumerate(zip(right.tolist(), names, strict=True))
    ]
    better = [
        row | {"label": "a", "top_k": [{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}]} for row in rows
    ]
    for name, content in (("p", rows), ("q", better)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    argv = ["--predictions", str(tmp_path / "p.jsonl"), "--compare", str(tmp_path / "q.jsonl")]
    assert metrics.main(argv) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "mcnemar" not in found["compare"] and "without McNemar's test" in err and found["recordings"] == 12
    summaries = [lambda i: {"accuracy": float(right[i].mean())}, lambda i: {"accuracy": 1.0}]
    expected = metrics.compared(*summaries, len(right), names)["accuracy"]
    assert found["compare"]["accuracy"] == pytest.approx(expected)

    # without groups the clips count as independent
    for name, content in (("p", rows), ("q", better)):
        plain = [{k: v for k, v in row.items() if k != "group"} for row in content]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    assert metrics.main(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["compare"]["mcnemar"]["only_second_right"] == (~right).sum() and not err


def test_segments_of_grouped_recordings_are_drawn_by_group(tmp_path, capsys):
    def scores(group: bool) -> dict:
        truth, answers = [], []
        for video in range(8):
            rows = [{"file_name": f"{video}.mp4", "start": i, "end": i + 1, "label": "x"} for i in range(3)]
            truth += [row | ({"group": f"g{video // 2}"} if group else {}) for row in rows]
            answers += [{"file": str(tmp_path / row["file_name"]), **row} for row in rows[: 1 + 2 * (video // 2 % 2)]]
        for name, content in (("metadata", truth), ("answers", answers)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        argv = ["--segments", str(tmp_path / "metadata.jsonl"), str(tmp_path / "answers.jsonl")]
        assert score.main(argv) == 0
        return json.loads(capsys.readouterr().out)

    with in_full():
        alone, together = scores(False), scores(True)
    assert alone["F1@0.5"] == together["F1@0.5"]
    widths = [high - low for low, high in (x["intervals"]["F1@0.5"] for x in (alone, together))]
    assert widths[1] > 1.2 * widths[0]


# -- conversion ------------------------------------------------------------------------------------


def convert(form: str, annotations: Path, videos: Path, output: Path) -> int:
    argv = ["--format", form, "--annotations", str(annotations), "--videos", str(videos), "--output", str(output)]
    return convert_dataset.main([*argv, "--no_scan"])


def test_ucf101_lists_and_tables_give_groups(tmp_path, capsys):
    names = [name.removeprefix("train/") for name in in_recordings()]
    make_data(tmp_path / "videos", names)
    (tmp_path / "trainlist01.txt").write_text("".join(f"{name} 1\n" for name in names))
    assert convert("ucf101", tmp_path / "trainlist01.txt", tmp_path / "videos", tmp_path / "ucf") == 0
    splits = read_splits(tmp_path / "ucf")
    assert all(s.group == recording_in(s.path.name) for s in splits.train + splits.val)
    assert {s.group for s in splits.val} and not shared_recordings(splits)

    lines = [f"{name},{Path(name).parent},r{number % 5}\n" for number, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("path,label,group\n" + "".join(lines))
    assert convert("list", tmp_path / "train.csv", tmp_path / "videos", tmp_path / "table") == 0
    rows = [json.loads(line) for line in (tmp_path / "table/train/metadata.jsonl").read_text().splitlines()]
    assert [row["group"] for row in rows] == [f"r{number % 5}" for number in range(len(names))]

    (tmp_path / "train.csv").write_text("path,label,group\n" + "".join(lines) + f"{names[0]},a,other\n")
    assert convert("list", tmp_path / "train.csv", tmp_path / "videos", tmp_path / "two") == 0
    assert f"{names[0]}: several groups (r0, other); a video can have only one" in capsys.readouterr().out


# -- near copies -----------------------------------------------------------------------------------


def test_near_copies_are_those_of_all_similarities():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 40, generator=rng) + 5 * torch.randn(40, generator=rng)
    copies = rows[:50] + 0.1 * torch.randn(50, 40, generator=rng)
    white = whitened(torch.cat([rows, copies]))
    first, second = white[:300], white[300:]
    found = {index: (other, value) for index, other, value in near_copies(first, second)}
    similarity = second @ first.T
    assert found.keys() == {i for i in range(50) if similarity[i].max() >= COPY} and len(found) == 50
    assert all(found[i][0] == i and found[i][1] == pytest.approx(float(similarity[i].max())) for i in found)
    assert not [*near_copies(first[:150], first[150:])]
    assert white.shape[1] == min(40, 350 // PER_COMPONENT)
    torch.testing.assert_close(white, whitened(torch.cat([rows, copies])))  # the same in every run


def examined(data: Path, runs: Path) -> tuple[str, torch.Tensor | None]:
    """(what the doctor's check says, the signatures of train and test)."""
    run = prepare(parse(flags(data, runs, "--num_frames", "4"), "doctor")[0], runs)
    return doctor.check_near_copies(run).result, doctor.signatures_of(run, [*run.splits.train, *run.splits.test])[0]


def test_the_doctor_reads_cached_features_and_computes_others(dataset, tmp_path, monkeypatch):
    assert examined(dataset, tmp_path)[0] == "not checked: needs 80 videos"
    monkeypatch.setattr(groups, "FEWEST", 10)
    result, computed = examined(dataset, tmp_path)
    assert "not checked" not in result and not any(tmp_path.iterdir())
    monkeypatch.setattr(doctor, "MAX_SEARCH", 0)
    assert examined(dataset, tmp_path)[0].startswith("not checked: computing features takes about")

    # after a run nothing has to be computed
    assert main.main(flags(dataset, tmp_path, "--num_frames", "4", "--epochs", "1")) == 0
    monkeypatch.setattr(feature_cache, "features_of", None)
    again, cached = examined(dataset, tmp_path)
    assert again == result
    torch.testing.assert_close(cached, computed, atol=1e-2, rtol=1e-2)


def pieces(folder: Path, count: int = 40) -> dict[str, list[np.ndarray]]:
    """{name of a clip: its pieces of 40 frames, 240 pixels high}, uint8 (T, H, W, C)."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix != ".pt"):
        try:
            reader = open_video(path)
            frames = reader.frames(range(min(len(reader), 320)), lambda x: shrunk(x, 240))
        except ReadError:
            continue
        video = frames.permute(0, 2, 3, 1).numpy()
        starts = range(0, max(1, len(video) - count // 2 + 1), count)
        found[path.stem] = [video[start : start + count] for start in starts]
    return found


def shrunk(frames: torch.Tensor, height: int) -> torch.Tensor:
    """uint8 (T, C, H, W) with this height and an even width."""
    width = max(2, height * frames.shape[-1] // frames.shape[-2] // 2 * 2)
    return torch.nn.functional.interpolate(frames, (height, width), mode="bilinear", antialias=True)


def copies_of(video: np.ndarray, path: Path) -> None:
    """Writes three near copies: half the size, low quality, and the middle 80 %."""
    half = [np.asarray(Image.fromarray(f).resize((f.shape[1] // 4 * 2, 120), Image.Resampling.BILINEAR)) for f in video]
    cut = len(video) // 10
    variants = {"half": np.stack(half), "low": video, "trim": video[cut : len(video) - cut]}
    for name, frames in variants.items():
        write_video(path.with_name(f"{path.name}+{name}.mp4"), frames, crf="38" if name == "low" else "18")


@pytest.fixture(scope="module")
def copied(real_data, tmp_path_factory) -> Path:
    """train/ has pieces of every second clip, those that COPY was not chosen on; test/ has three near copies of each;
    val/ has pieces of the other clips."""
    folder = tmp_path_factory.mktemp("copies") / "data"
    for number, (name, videos) in enumerate(pieces(real_data / "clips").items()):
        for index, video in enumerate(videos):
            homes = {split: folder / split / "ab"[index % 2] for split in ("train", "val", "test")}
            for home in homes.values():
                home.mkdir(parents=True, exist_ok=True)
            write_video(homes["train" if number % 2 else "val"] / f"{name}@{index}.mp4", video, crf="18")
            if number % 2:
                copies_of(video, homes["test"] / f"{name}@{index}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["timesformer", "videomae"])
def test_copies_of_real_clips_are_found(copied, tmp_path, backbone):
    """Pieces of one clip are not copies of each other, but may look the same."""
    argv = ["--data_dir", str(copied), "--vision_model", backbone, "--freeze_visionbackbone", "True"]
    run = prepare(parse([*argv, "--num_workers", "0"], "doctor")[0], tmp_path)
    parts = {name: getattr(run.splits, name) for name in ("train", "val", "test")}
    rows, _ = doctor.signatures_of(run, [s for part in parts.values() for s in part])
    white = dict(zip(parts, whitened(rows).split([len(part) for part in parts.values()]), strict=True))
    found = [(parts["test"][i].path, parts["train"][j].path) for i, j, _ in near_copies(white["train"], white["test"])]
    right = sum(copy.name.startswith(f"{original.stem}+") for copy, original in found)
    same_clip = sum(copy.name.split("@")[0] == original.name.split("@")[0] for copy, original in found)
    assert right >= 0.9 * len(parts["test"]) and same_clip == len(found)
    for other in ("train", "test"):
        assert not [*near_copies(white[other], white["val"])]
    assert f"{len(found)} of test in train" in doctor.check_near_copies(run).result
