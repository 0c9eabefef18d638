"""Several labels per clip: reading, loss, thresholds, scores against scikit-learn, runs, segments, export."""

import json
import re
import runpy
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import counting_frames, write_video
from sklearn.metrics import average_precision_score, f1_score
from test_resume import assert_resumed_exactly
from torch.nn import functional as F

import convert_dataset
import create_dummy
import doctor
import dummy_data
import inference
import main
import preview
import score
import sweep_heads
from answers import fingerprint_answers
from build_model import build_model
from checkpoint import load_run
from config import Config
from extras.augment import mix
from extras.multilabel import (
    all_labels,
    binary_losses,
    choose_thresholds,
    labels_of,
    multi_hot,
    multi_label_result,
    multi_label_scores,
    multi_label_summary,
    resolve_labels,
)
from extras.segments import Recording, add_background, merge_windows, read_recordings, refuse_overlaps, segment_summary
from inference import Predictor
from metrics import resampled
from readers import Segment
from script import UserError, read_rows
from train_code import build_accelerator, build_engine, build_loaders, groups_of, loss_sum, train_step
from VLoader import Sample, Splits, hold_out, read_folder, read_splits

slow = pytest.mark.slow
NAMES = ["class_0", "class_1", "class_2"]


# -- scores and thresholds --------------------------------------------------------------------------


def random_set(seed: int, count: int = 40, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(truth, probabilities), (n, K) each: every third set has many ties, every other one a class without positives."""
    rng = np.random.default_rng(seed)
    truth = rng.random((count, classes)) < rng.uniform(0.05, 0.7, classes)
    truth[:, 0] &= bool(seed % 2)
    scores = np.clip(rng.random((count, classes)) + 0.3 * truth, 0, 1)
    return truth, scores.round(1) if seed % 3 == 0 else scores


def by_sklearn(truth: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    found = [k for k in range(truth.shape[1]) if truth[:, k].any()]
    precisions = {k: average_precision_score(truth[:, k], probabilities[:, k]) for k in found}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are neither true nor predicted
        f1 = {
            "micro_f1": f1_score(truth, predicted, average="micro", zero_division=0),
            "macro_f1": f1_score(truth, predicted, average="macro", zero_division=np.nan),
        }
    return {"mAP": np.mean([*precisions.values()])} | f1 | {f"AP {k}": value for k, value in precisions.items()}


@pytest.mark.parametrize("seed", range(12))
def test_scores_equal_scikit_learn(seed):
    truth, probabilities = random_set(seed)
    predicted = probabilities >= 0.6
    summary = multi_label_summary(truth, probabilities, predicted, [*map(str, range(5))])
    rng = np.random.default_rng(seed)
    for drawn in (np.arange(40), *rng.integers(0, 40, (5, 40))):  # as they are, and draws of the bootstrap
        expected = by_sklearn(truth[drawn], probabilities[drawn], predicted[drawn])
        found = {name: value for name, value in summary(drawn).items() if not np.isnan(value)}
        assert found == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_threshold_has_a_better_f1(seed):
    truth, probabilities = random_set(seed, 20)
    thresholds = choose_thresholds(truth, probabilities, range(5))
    for k in np.flatnonzero(truth.any(0)):
        candidates = np.unique(probabilities[:, k])
        f1 = [f1_score(truth[:, k], probabilities[:, k] >= t, zero_division=0) for t in candidates]
        assert f1_score(truth[:, k], probabilities[:, k] >= thresholds[k]) == pytest.approx(max(f1), abs=1e-12)
        assert np.abs(probabilities[:, k] - thresholds[k]).min() > 1e-6  # rounding changes no answer
    assert seed % 2 or thresholds[0] == 0.5  # without positives


def scored(truth: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, float] | None) -> dict[str, Any]:
    names = "abcde"[: truth.shape[1]]
    samples = [Sample(Path(f"{i}.mp4"), labels=()) for i in range(len(truth))]
    return multi_label_scores(multi_label_result(truth, probabilities), samples, names, thresholds)[0]


def test_scores_of_each_class():
    truth, probabilities = random_set(2)
    truth[:, 1] = probabilities[:, 1] > 0.5  # a perfect ranking
    thresholds = choose_thresholds(truth, probabilities, "abcde")
    scores = scored(truth, probabilities, thresholds)
    json.dumps(scores, allow_nan=False)
    assert scores["intervals"].keys() == {"mAP", "micro_f1", "macro_f1"}
    (draws,) = resampled([multi_label_summary(truth, probabilities, truth, "abcde")], 40)
    assert scores["classes"]["c"]["interval"] == np.nanquantile(draws["AP c"], [0.025, 0.975]).tolist()
    assert scores["classes"]["a"] == {"count": 0, "share": 0.0, "average_precision": None, "threshold": 0.5}
    perfect = scores["classes"]["b"]
    assert perfect["average_precision"] == perfect["interval"][1] == 1 and 0.5 < perfect["interval"][0] < 1
    assert scores["mAP"] == pytest.approx(np.mean([scores["classes"][n]["average_precision"] for n in "bcde"]))


def test_clips_without_any_label_have_scores():
    nothing, probabilities = np.zeros((4, 2), bool), np.full((4, 2), 0.2)
    scores = scored(nothing, probabilities, None)
    assert scores["mAP"] == scores["micro_f1"] == scores["macro_f1"] == 0


# -- loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_one_classifier_per_class(smoothing):
    """A yes or no is a softmax of (0, logit), whose label smoothing is known."""
    logits, targets = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4) < 0.5
    pairs = torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)
    expected = F.cross_entropy(pairs, targets.long().flatten(), reduction="none", label_smoothing=smoothing)
    assert torch.allclose(binary_losses(logits, targets, smoothing), expected.view(6, 4).sum(1))


def test_views_average_probabilities():
    model = build_model(Config(multi_label="True", head="linear", freeze_visionbackbone=True), 3).eval()
    video = torch.randint(0, 256, (2, 3, 8, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        mean = torch.stack([model.scores(view) for view in video.unbind(1)]).sigmoid().mean(0)
        assert torch.allclose(model.scores(video).sigmoid(), mean, atol=1e-6)


def test_accumulated_batches_train_like_one(labels):
    weights = []
    for size, steps in ((9, 1), (3, 3)):
        config = Config(
            multi_label="True", dropout=0.0, head="linear", batch_size=size, gradient_accumulation_steps=steps, epochs=1
        )
        config = replace(config, num_workers=0, device="cpu", freeze_visionbackbone=True)
        torch.manual_seed(0)
        model = build_model(config, 3)
        config = model.vision_encoder.fill_auto(config)
        splits, _ = resolve_labels(read_splits(labels), config)
        accelerator = build_accelerator(config)
        loader = build_loaders(model, config, splits)["train"]
        engine = build_engine(model, loader, config, accelerator)
        train_step(model, next(iter(groups_of(loader, steps))), loader, engine)
        weights.append(model.head.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_mixed_clips_have_mixed_losses():
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (4, 2, 3, 8, 8), dtype=torch.uint8)
    batch = mix({"video": clips, "labels": torch.rand(4, 3) < 0.5})
    model = build_model(Config(multi_label="True", head="linear"), 3)
    logits = torch.randn(4, 3)
    model.forward = lambda video: logits
    loss, _, _ = loss_sum(model, batch)
    weight = batch["mix"][:, None]
    wanted = weight * batch["labels"] + (1 - weight) * batch["mixed_labels"].float()  # as mixup defines it
    assert loss == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")), rel=1e-5)


# -- rows of metadata.jsonl -------------------------------------------------------------------------


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / row["file_name"]).touch()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_labels_come_from_rows_and_class_folders(tmp_path):
    rows = [{"file_name": "a/1.mp4", "labels": ["b", "c", "b"]}, {"file_name": "a/2.mp4", "labels": []}]
    write_rows(tmp_path / "train", *rows, {"file_name": "3.mp4", "label": "d"}, {"file_name": "a/4.mp4"})
    write_rows(tmp_path / "val", {"file_name": "5.mp4", "labels": ["a"]})
    splits = read_splits(tmp_path)
    assert splits.class_names == ["a", "b", "c", "d"]
    splits, config = resolve_labels(splits, Config())
    labels = {s.path.name: s.labels for s in splits.train + splits.val}
    assert labels == {"1.mp4": ("b", "c"), "2.mp4": (), "3.mp4": ("d",), "4.mp4": ("a",), "5.mp4": ("a",)}
    assert config.multi_label == "True"
    assert multi_hot(labels.values(), splits.class_names).sum(0).tolist() == [2, 1, 1, 1]


def test_one_label_each_is_not_several(tmp_path):
    write_rows(tmp_path / "train", {"file_name": "1.mp4", "labels": ["a"]}, {"file_name": "2.mp4", "label": "b"})
    write_rows(tmp_path / "val", {"file_name": "3.mp4", "label": "b"})
    splits, config = resolve_labels(read_splits(tmp_path), Config(multi_label="False"))
    assert [s.label for s in splits.train] == ["a", "b"] and config.multi_label == "False"
    write_rows(tmp_path / "train", {"file_name": "1.mp4", "label": "a"})
    assert resolve_labels(read_splits(tmp_path), Config())[1].multi_label == "False"


BAD = {
    "a string": ({"labels": "a"}, [], "labels must be a list of strings"),
    "a number": ({"labels": ["a", 1]}, [], "labels must be a list of strings"),
    "an empty string": ({"labels": ""}, [], "labels must be a list of strings"),
    "an empty label": ({"labels": ["a", " "]}, [], "a label must not be empty"),
    "one empty label": ({"label": ""}, [], "a label must not be empty"),
    "none and one": ({"labels": [], "label": "a"}, [], "a row with labels cannot also have label"),
    "both": ({"labels": ["a"], "label": "a"}, [], "a row with labels cannot also have label"),
    "several, refused": ({"labels": ["a", "b"]}, ["--multi_label", "False"], "has 2 labels in metadata.jsonl"),
    "none, refused": ({"labels": []}, ["--multi_label", "False"], "has 0 labels in metadata.jsonl"),
    "balance": ({"labels": ["a", "b"]}, ["--class_balance", "True"], "--class_balance True needs one label per clip"),
    "reject": ({"labels": ["a", "b"]}, ["--reject", "0.1"], "--reject needs one label per clip"),
    "captioner": ({"labels": ["a"]}, ["--multi_label", "True", "--use_vlm", "--captioning"], "with classifiers only"),
    "sweep": ({"labels": ["a", "b"]}, ["sweep"], "a sweep is for clips with one label each"),
    "unknown": ({"labels": ["a", "b"]}, ["val"], "a class that is not in train (z)"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_one_line(tmp_path, capsys, case):
    row, flags, message = BAD[case]
    write_rows(tmp_path / "train", {"file_name": "1.mp4", "label": "b"}, {"file_name": "2.mp4"} | row)
    write_rows(tmp_path / "val", {"file_name": "3.mp4", "labels": ["a", "z"] if flags == ["val"] else ["a"]})
    script = sweep_heads.main if flags == ["sweep"] else main.main
    flags = flags if "--" in "".join(flags) else []
    assert script(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "runs"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_val_has_every_label_and_train_keeps_it():
    rng = np.random.default_rng(0)
    samples = [Sample(Path(f"{i}.mp4"), labels=tuple(name for name in "abcd" if rng.random() < 0.3)) for i in range(60)]
    train, val = hold_out([*samples, Sample(Path("x.mp4"), labels=("rare", "a"))], Path())
    for name in "abcd":
        assert any(name in s.labels for s in val) and any(name in s.labels for s in train)
    assert any("rare" in s.labels for s in train) and len(val) < 20


# -- segments ---------------------------------------------------------------------------------------


def segment(start: float, end: float, *labels: str) -> Sample:
    return Sample(Path("v.mp4"), labels=labels, segment=Segment(start, end))


def test_a_segment_shows_what_covers_half_of_it():
    found = all_labels([segment(0, 4, "a"), segment(2, 10, "b"), segment(2.1, 6.1, "c"), segment(20, 21, "d")])
    # b covers exactly half of a, and c less; a covers a quarter of b, c half; a covers less than half of c, b all of it
    assert [set(s.labels) for s in found] == [{"a", "b"}, {"b", "c"}, {"c", "b"}, {"d"}]
    refuse_overlaps(found)
    with pytest.raises(UserError, match="--multi_label True"):
        refuse_overlaps(replace(s, label=s.labels[0], labels=None) for s in found)


def test_labels_of_overlaps_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 50, 40)
    samples = [segment(a, a + rng.integers(1, 20), str(i % 7)) for i, a in enumerate(starts)]
    for one, found in zip(samples, all_labels(samples), strict=True):
        (a, b, _), expected = one.segment, set()
        for other in samples:
            if min(b, other.segment.end) - max(a, other.segment.start) >= (b - a) / 2:
                expected |= {*other.labels}
        assert {*found.labels} == expected


def test_background_clips_have_no_label():
    train = [segment(10, 12, "a"), segment(20, 22, "b"), segment(30, 32, "a", "b")]
    splits = add_background(Splits(train, [], [], ["a", "b"], ""), 1.0)
    assert [s.labels for s in splits.train[3:]] == [(), (), ()] and splits.class_names == ["a", "b"]


def window(start: float, end: float, **scores: float) -> dict[str, Any]:
    top = [{"label": k, "name": k, "score": v} for k, v in sorted(scores.items(), key=lambda item: -item[1])]
    return {"file": "v", "path": "v", "start": start, "end": end, "top_k": top[:1], "labels": top}


def test_windows_become_segments_that_overlap():
    windows = [window(0, 2, a=0.9), window(1, 3, a=0.5, b=0.7), window(2, 4, b=0.9), window(3, 5)]
    found = merge_windows(windows, 1, {"a": 0.3, "b": 0.5})
    # a: 0.9, 0.7, 0.25, 0, 0; b: 0, 0.35, 0.8, 0.45, 0
    rows = [(row["label"], row["start"], row["end"], row["score"]) for row in found]
    assert rows == [("a", 0.0, 2.0, 0.8), ("b", 2.0, 3.0, 0.8)]
    lower = merge_windows(windows, 1, {"a": 0.2, "b": 0.3})
    assert [(row["label"], row["start"], row["end"]) for row in lower] == [("a", 0.0, 3.0), ("b", 1.0, 4.0)]


def test_rows_with_labels_are_scored_like_single_ones(tmp_path):
    def rows(several: bool, kind: dict) -> list[dict]:
        found = [{"start": 0, "end": 4}, {"start": 6, "end": 9}]
        if several:
            return [{"file_name": "v.mp4", **times, "labels": ["a", "b"]} | kind for times in found]
        return [{"file_name": "v.mp4", **times, "label": name} | kind for times in found for name in "ab"]

    tables = []
    for several in (True, False):
        folder = tmp_path / str(several)
        truth, answers = folder / "truth.jsonl", folder / "answers.jsonl"
        folder.mkdir()
        truth.write_text("".join(json.dumps(row) + "\n" for row in rows(several, {})))
        entries = [{"label": "a", "score": 0.7}] if several else {}
        windows = [{"file_name": "v.mp4", "start": 8, "end": 20, "segment": False, "labels": entries or "x"}]
        predicted = [{"file_name": "v.mp4", "start": 1, "end": 4, "label": "a", "score": 0.8, "segment": True}]
        windows = windows if several else [{**windows[0], "labels": None, "label": "a"}]
        answers.write_text("".join(json.dumps(row) + "\n" for row in windows + predicted))
        tables.append(read_recordings(truth, answers))
    (one,), (other,) = tables
    assert [one.truth, one.predicted, one.seconds] == [other.truth, other.predicted, other.seconds]
    assert isinstance(one, Recording) and segment_summary([one])(np.arange(1))["F1@0.5"] == pytest.approx(0.4)


# -- runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """As `dataset` of conftest.py, with the motions of all objects as labels; half of the clips have two objects."""
    folder = tmp_path_factory.mktemp("labels") / "data"
    few = ["--videos_per_class", "6", "--val_per_class", "4", "--test_per_class", "4"]
    assert dummy_data.main(["--multi_label", "--classes", "3", *few, "--output", str(folder)]) == 0
    return folder


def train(labels: Path, folder: Path, *flags: str) -> Path:
    argv = ["--data_dir", str(labels), "--output_dir", str(folder), "--run_name", "run", "--num_workers", "0", *flags]
    assert main.main(argv) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(labels, tmp_path_factory) -> Path:
    flags = ["--freeze_visionbackbone", "True", "--epochs", "4", "--controls", "True"]
    return train(labels, tmp_path_factory.mktemp("run"), *flags)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def score_table(rows: list[dict]) -> np.ndarray:
    """The scores of all classes in rows of predictions, (n, K)."""
    return np.array([[next(t["score"] for t in row["top_k"] if t["label"] == name) for name in NAMES] for row in rows])


def test_a_run_selects_scores_and_stores(run, labels):
    metrics, thresholds = read(run / "metrics.json"), read(run / "metadata.json")["thresholds"]
    log, rows = read_rows(run / "log.jsonl"), read_rows(run / "predictions_test.jsonl")
    assert "multi_label: 'True'" in (run / "config.yaml").read_text()
    # the best epoch has the highest mAP on val, and among equals the lowest loss
    best = max(log, key=lambda row: (row["val_mAP"], -row["val_loss"]))
    assert metrics["best_epoch"] == best["epoch"] and metrics["val"]["mAP"] == pytest.approx(best["val_mAP"])

    # scores of test from its predictions, which are rounded to four digits
    truth = multi_hot([row["truth"] for row in rows], NAMES)
    assert [tuple(row["truth"]) for row in rows] == [s.labels for s in read_folder(labels / "test")]
    predicted = multi_hot([labels_of(row) for row in rows], NAMES)
    expected = by_sklearn(truth, score_table(rows), predicted)
    assert metrics["test"]["micro_f1"] == pytest.approx(expected["micro_f1"])
    assert metrics["test"]["macro_f1"] == pytest.approx(expected["macro_f1"])
    assert metrics["test"]["mAP"] == pytest.approx(expected["mAP"], abs=0.03)

    # the thresholds are those of val with the best F1, and decide on test
    val = read_rows(run / "predictions_val.jsonl")
    chosen = choose_thresholds(multi_hot([row["truth"] for row in val], NAMES), score_table(val), NAMES)
    assert thresholds == pytest.approx(chosen, abs=1e-4)
    limits = np.array([thresholds[name] for name in NAMES])
    assert ((score_table(rows) >= limits) == predicted)[np.abs(score_table(rows) - limits) > 1e-4].all()


def test_controls_of_a_run(run, labels):
    table, splits = read(run / "metrics.json")["controls"], resolve_labels(read_splits(labels), Config())[0]
    share = multi_hot([s.labels for s in splits.test], NAMES).mean()
    assert table["majority"]["mAP"] == pytest.approx(share)  # equal scores rank nothing
    assert table["blank_video"]["mAP"] == pytest.approx(share)
    assert table["as_it_is"]["mAP"] == pytest.approx(read(run / "metrics.json")["test"]["mAP"], abs=1e-6)
    assert {path.name for path in run.glob("*.png")} == {"classes.png", "worst.png", "curves.png", "occlusion.png"}


def test_inference_answers_as_the_run_was_scored(run, labels, tmp_path, capsys):
    argv = ["--checkpoint", str(run), "--video_dir", str(labels / "test"), "--num_workers", "0"]
    assert inference.main([*argv, "--output", str(tmp_path / "out.jsonl"), "--top_k", "3"]) == 0
    answers, rows = read_rows(tmp_path / "out.jsonl"), read_rows(run / "predictions_test.jsonl")
    for answer, row in zip(answers, rows, strict=True):
        assert labels_of(answer) == labels_of(row) and answer["right"] == (labels_of(row) == {*row["truth"]})
        assert [t["score"] for t in answer["top_k"]] == pytest.approx([t["score"] for t in row["top_k"]], abs=2e-4)
    assert f"{sum(a['right'] for a in answers)} of 12 right" in capsys.readouterr().out
    (answer,) = [a for a in answers if a["file"] == rows[0]["file"]]
    one = Predictor.from_checkpoint(run, top_k=2).predict(rows[0]["file"])
    assert one["labels"] == answer["labels"] and one["top_k"] == answer["top_k"][:2] and "label" not in one


def test_thresholds_can_be_changed_by_hand(run, labels, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    metadata = read(run / "metadata.json") | {"thresholds": {"class_0": 0.0, "class_1": 1.1, "class_2": 1.1}}
    (tmp_path / "run" / "metadata.json").write_text(json.dumps(metadata))
    video = next((labels / "test").rglob("*.pt"))
    assert labels_of(Predictor.from_checkpoint(tmp_path / "run").predict(video)) == {"class_0"}

    # an unfinished file of answers must not mix both
    prints = [fingerprint_answers(run, Config(), None, t) for t in (read(run / "metadata.json")["thresholds"], None)]
    assert fingerprint_answers(run, Config(), None, metadata["thresholds"]) not in prints and len({*prints}) == 2
    del metadata["thresholds"]["class_1"]
    (tmp_path / "run" / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="a class has no threshold"):
        Predictor.from_checkpoint(tmp_path / "run")


def test_a_run_scores_again_with_its_own_thresholds(run, labels, tmp_path):
    argv = ["--checkpoint", str(run), "--num_workers", "0", "--output_dir", str(tmp_path)]
    assert score.main(argv) == 0
    again, first = read(tmp_path / "run" / "metrics.json"), read(run / "metrics.json")
    for split in ("val", "test"):
        assert again[split]["mAP"] == pytest.approx(first[split]["mAP"], abs=1e-6)
        for name in NAMES:
            assert again[split]["classes"][name]["threshold"] == first[split]["classes"][name]["threshold"]

    # other videos: the old test split as val must not choose new thresholds
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "val").symlink_to(labels / "test")
    assert score.main([*argv, "--data_dir", str(tmp_path / "other")]) == 0
    other = read(tmp_path / "run" / "evaluation_other" / "metrics.json")["val"]
    assert other["micro_f1"] == pytest.approx(first["test"]["micro_f1"])


@slow
def test_a_resumed_run_equals_an_uninterrupted_one(labels, tmp_path, monkeypatch):
    assert_resumed_exactly(labels, tmp_path, monkeypatch, ["--freeze_visionbackbone", "True", "--num_workers", "0"], 7)


MODES = {
    "text": ["--use_vlm", "True", "--use_text", "True", "--freeze_visionbackbone", "True"],
    "attentive": ["--head", "attentive", "--freeze_visionbackbone", "True", "--label_smoothing", "0.1"],
    "linear language": ["--use_vlm", "True", "--head", "linear", "--use_lora_llm", "True"],
    "full": ["--augment", "light", "--gradient_accumulation_steps", "2"],
    "lora": ["--vision_model", "videomae", "--use_lora_vision", "True"],
}


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[slow] * (m != "text")) for m in MODES])
def test_every_model_and_mode_learns(labels, tmp_path, mode):
    run = train(labels, tmp_path, "--epochs", "3", *MODES[mode])
    log = read_rows(run / "log.jsonl")
    assert log[-1]["train_loss"] < log[0]["train_loss"] < 1
    assert read(run / "metadata.json")["thresholds"].keys() == {*NAMES}


def test_an_export_answers_as_inference_does(run, tmp_path):
    video = write_video(tmp_path / "v.mp4", counting_frames(30, 64, 64))
    assert inference.main(["--checkpoint", str(run), "--export", str(tmp_path / "out")]) == 0
    exported = runpy.run_path(str(tmp_path / "out" / "predict.py"))
    answer = Predictor.from_checkpoint(run).predict(video)
    assert exported["predict"](video) == pytest.approx({t["name"]: t["score"] for t in answer["top_k"]}, abs=1e-4)
    assert [*exported["answer"](video)] == [entry["name"] for entry in answer["labels"]]
    config = read(tmp_path / "out" / "config.json")
    assert config["problem_type"] == "multi_label_classification"


def test_a_timeline_has_overlapping_segments(run, tmp_path, capsys):
    """Thresholds of 0: every class is on everywhere."""
    model, config, metadata = load_run(run)
    model.thresholds = dict.fromkeys(NAMES, 0.0)
    video = write_video(tmp_path / "v.mp4", counting_frames(40, 64, 64))
    config = replace(config, video_dir=str(video), timeline=2.0, timeline_stride=1.0, output=str(tmp_path / "o.jsonl"))
    config = replace(config, num_workers=0)
    assert inference.answer_all(Predictor(model, config, metadata), [Sample(video)], run) == 0
    rows = [row for row in read_rows(tmp_path / "o.jsonl") if row["segment"]]
    assert [(row["label"], row["start"], row["end"]) for row in rows] == [(n, 0.0, 4.0) for n in sorted(NAMES)]
    assert len(re.findall("segment: ", capsys.readouterr().out)) == 3


# -- the other scripts ------------------------------------------------------------------------------


def test_the_doctor_counts_labels(labels, tmp_path, capsys):
    shutil.copytree(labels, tmp_path / "data")
    rows = read_rows(labels / "val" / "metadata.jsonl")
    for row in rows:
        row["labels"] = [name for name in row["labels"] if name != "class_2"]
    (tmp_path / "data" / "val" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--freeze_visionbackbone", "True", "--image_size", "32", "--num_frames", "4", "--num_workers", "0"]
    assert doctor.main(["--data_dir", str(tmp_path / "data"), *flags]) == 1
    out = capsys.readouterr().out
    counts = [
        sum("class_2" in row["labels"] for row in read_rows(labels / s / "metadata.jsonl")) for s in ("train", "test")
    ]
    assert f"class_2 {counts[0]}/0/{counts[1]}; 0 training videos without any" in out
    (failed,) = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert "val has every label" in failed and "not class_2" in failed
    assert "ln 2 = 0.693" in out


def test_rows_of_one_video_are_merged(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "videos" / f"{name}.mp4", counting_frames(8))
    (tmp_path / "train.csv").write_text("a.mp4,run\na.mp4,jump\nb.mp4,run\n")
    argv = ["--format", "list", "--annotations", str(tmp_path / "train.csv"), "--videos", str(tmp_path / "videos")]
    argv += ["--num_workers", "0", "--output"]
    assert convert_dataset.main([*argv, str(tmp_path / "several"), "--multi_label", "True"]) == 0
    rows = read_rows(tmp_path / "several" / "train" / "metadata.jsonl")
    assert [row["labels"] for row in rows] == [["run", "jump"], ["run"]] and "label" not in rows[0]
    assert read(tmp_path / "several" / "train" / "conversion.json")["classes"] == {
        "jump": {"rows": 1, "videos": 1},
        "run": {"rows": 2, "videos": 2},
    }
    assert convert_dataset.main([*argv, str(tmp_path / "one")]) == 0
    assert [row["label"] for row in read_rows(tmp_path / "one" / "train" / "metadata.jsonl")] == ["run"]
    out = capsys.readouterr().out
    assert "several labels (run, jump)" in out and "overlaps" not in out  # these are whole videos


def test_drawn_labels_are_the_motions_of_all_objects(labels):
    for row in read_rows(labels / "train" / "metadata.jsonl"):
        names = [dummy_data.MOTIONS[int(name.removeprefix("class_"))] for name in row["labels"]]
        assert names == [item["motion"] for item in row["objects"]]
        assert row["labels"][0] == row["file_name"].split("/")[0]


def test_saved_frames_keep_their_labels_and_previews_name_them(labels, run, tmp_path, capsys):
    assert create_dummy.main(["--data_dir", str(labels), "--output", str(tmp_path / "f"), "--per_class", "2"]) == 0
    rows, expected = read_rows(tmp_path / "f" / "metadata.jsonl"), read_rows(labels / "test" / "metadata.jsonl")
    assert [row["labels"] for row in rows] == [row["labels"] for row in expected if int(row["file_name"][-4]) < 2]

    titles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("figures.plot_clips", lambda clips, path: titles.extend(title for _, title in clips) or path)
        argv = ["--data_dir", str(labels), "--output_dir", str(tmp_path), "--num_workers", "0", "--count", "12"]
        assert preview.main(argv) == 0
    assert any(re.search(r"\|  moves \w+, moves \w+$", title) for title in titles)
