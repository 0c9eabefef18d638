"""Controls against the same computation by hand, and score.py against the scores of the training run."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_full, resolved
from PIL import Image

import figures
import main
import metrics
import score
from build_model import build_model
from checkpoint import load_run
from config import ROOT, Config, fill_auto
from extras import controls
from script import UserError, read_rows
from train_code import build_accelerator, build_loaders
from VLoader import Sample, read_splits

FLAGS = ["--epochs", "2", "--num_workers", "0", "--freeze_visionbackbone", "True", "--controls", "True"]
JOBS = {
    "classifier": [],
    "text": ["--use_vlm", "True", "--use_text", "True", "--freeze_llmbackbone", "True"],
    "captioner": ["--use_vlm", "True", "--captioning", "True", "--vision_model", "videomae"],
}


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("controls")
    for name, flags in JOBS.items():
        argv = ["--data_dir", str(dataset), "--output_dir", str(folder), "--run_name", name, *FLAGS, *flags]
        with in_full():
            assert main.main(argv) == 0
    return {name: folder / name for name in JOBS}


def read(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def accuracy_by_hand(run: Path, dataset: Path, change) -> float:
    """Clip by clip, with `change` applied to each clip after it is read."""
    model, config, metadata = load_run(run)
    splits = read_splits(dataset)
    data = build_loaders(model, resolved(config, model), splits)["test"].dataset
    right = 0
    for place, sample in enumerate(splits.test):
        item = data[(0, place)]
        batch = model.collator()([item | {"video": change(item["video"])}])
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
        with torch.no_grad():
            right += metadata["class_names"][int(model.scores(**inputs).argmax())] == sample.label
    return right / len(splits.test)


@pytest.mark.parametrize("job", ["classifier", "text"])
def test_controls_are_the_accuracies_on_changed_clips(runs, dataset, job):
    table = read(runs[job])["controls"]
    by_hand = {
        "as_it_is": lambda clip: clip,
        "one_frame": lambda clip: clip[4:5].repeat(8, 1, 1, 1),
        "reversed": lambda clip: torch.stack(list(clip)[::-1]),
        "blank_video": lambda clip: torch.zeros_like(clip) + round_mean(runs[job]),
    }
    for name, change in by_hand.items():
        assert table[name]["accuracy"] == pytest.approx(accuracy_by_hand(runs[job], dataset, change)), name
    assert table["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert ({"text_only", "text_shuffled"} <= table.keys()) == (job == "text")


def round_mean(run: Path) -> torch.Tensor:
    model, _, _ = load_run(run)
    mean = torch.tensor(model.vision_encoder.preprocessing.mean)
    return (mean * 255).round().to(torch.uint8)[:, None, None]


def test_a_blank_clip_is_zero_after_normalisation(runs):
    model, _, _ = load_run(runs["classifier"])
    preprocessing = model.vision_encoder.preprocessing
    clip = torch.randint(0, 256, (1, 8, 3, 64, 64), dtype=torch.uint8)
    normalised = preprocessing.normalise(controls.blank(preprocessing)(clip, None))
    assert normalised.abs().max() < 0.5 / 255 / min(preprocessing.std) + 1e-6


def test_shuffled_frames_are_the_same_frames_in_another_order(runs):
    clips = torch.arange(3 * 8).view(3, 8, 1, 1, 1).expand(3, 8, 3, 4, 4)
    index = torch.tensor([5, 6, 7])
    shuffled = controls.shuffled_frames(clips, index)
    orders = [tuple((row[:, 0, 0, 0] - row[:, 0, 0, 0].min()).tolist()) for row in shuffled]
    assert all(sorted(order) == list(range(8)) for order in orders) and len({*orders, tuple(range(8))}) == 4
    assert torch.equal(shuffled[1:2], controls.shuffled_frames(clips[1:2], index[1:2]))  # in any batch


def test_every_clip_gets_the_text_of_another():
    samples = [Sample(Path(f"{i}.pt"), text=f"text {i}") for i in range(7)]
    given = controls.with_texts_of_others(samples)
    assert sorted(s.text for s in given) == sorted(s.text for s in samples)
    assert all(a.text != b.text and a.path == b.path for a, b in zip(given, samples, strict=True))


@pytest.mark.parametrize("job", ["classifier", "captioner"])
def test_the_nearest_neighbour_is_the_nearest(runs, dataset, tmp_path, job):
    """By cosine similarity of centred pooled tokens of the pretrained backbone, in float64; the cache is fp16."""
    _, config, _ = load_run(runs[job])
    plain = build_model(Config(vision_model=config.vision_model, freeze_visionbackbone=True), 3).eval()
    splits, config = read_splits(dataset), replace(resolved(config, plain), cache_dir=str(tmp_path))
    found = controls.nearest_neighbours(splits, splits.test, config, build_accelerator(config))

    def pooled(samples: list[Sample]) -> np.ndarray:
        only = replace(splits, train=[], val=[], test=samples)
        data = build_loaders(plain, config, only)["test"].dataset
        clips = torch.stack([data[(0, i)]["video"] for i in range(len(samples))])
        with torch.no_grad():
            encoder = plain.vision_encoder
            return encoder.encode(clips)[0].double().numpy()

    known, asked = pooled(splits.train), pooled(splits.test)
    known, asked = known - known.mean(0), asked - known.mean(0)
    cosine = (asked @ known.T) / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(known, axis=1)
    assert np.allclose(cosine[range(6), found], cosine.max(1), atol=1e-3)


def test_a_neighbour_that_cannot_be_read_is_named_or_left_out(dataset, tmp_path):
    """Training reads other frames of a video than the neighbours do, so it may have missed the damaged one."""
    config = Config(data_dir=str(dataset), cache_dir=str(tmp_path), num_workers=0)
    config = fill_auto(config, num_frames=8, image_size=64, side=4)
    splits = read_splits(dataset)
    whole = controls.nearest_neighbours(splits, splits.test, config, build_accelerator(config))
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    splits = replace(splits, train=[replace(splits.train[0], path=junk), *splits.train])
    with pytest.raises(UserError, match=r"cannot read .*junk\.pt"):
        controls.nearest_neighbours(splits, splits.test, config, build_accelerator(config))
    config = replace(config, skip_unreadable=True)
    assert (
        controls.nearest_neighbours(splits, splits.test, config, build_accelerator(config)).tolist()
        == (whole + 1).tolist()
    )


def test_the_line_says_how_much_motion_and_text_matter():
    table = {
        "split": "test",
        "as_it_is": {"accuracy": 0.9},
        "majority": {"accuracy": 0.1},
        "nearest_neighbour": {"accuracy": 0.5},
        "one_frame": {"accuracy": 0.3},
        "shuffled": {"accuracy": 0.5},
        "reversed": {"accuracy": 0.2},
        "blank_video": {"accuracy": 0.15},
        "text_only": {"accuracy": 0.15},
        "text_shuffled": {"accuracy": 0.85},
    }
    line = controls.control_line(table)
    assert "one frame repeated costs 60.0, frames shuffled 40.0, reversed 70.0 points" in line
    assert "text: shuffled costs 5.0, alone it gives 15.0 %" in line


@pytest.mark.parametrize("job", JOBS)
def test_an_occlusion_map_is_the_loss_of_confidence(runs, dataset, monkeypatch, job):
    monkeypatch.setattr(controls, "CELLS", 6)
    model, config, _ = load_run(runs[job])
    loader = build_loaders(model, resolved(config, model), read_splits(dataset))["test"]
    rows = read_rows(runs[job] / "predictions_test.jsonl")
    clip, fall, row = controls.occlusion_maps(model, loader, rows, build_accelerator(config))[0]
    item = loader.dataset[(0, rows.index(row))]
    assert torch.equal(clip, item["video"])
    item |= {"caption": row["caption"]} if job == "captioner" else {"label": loader.dataset.class_index[row["label"]]}
    covered = clip.clone()
    covered[2:4, :, 21:32, 53:64] = controls.background(clip)[:, 21:32, 53:64]
    with torch.no_grad():
        before, after = (score_by_hand(model, item | {"video": c}) for c in (clip, covered))
    assert fall[1, 2, 5] == pytest.approx(before - after, abs=2e-3)


def score_by_hand(model, item: dict) -> float:
    batch = model.collator()([item])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "prompt_tokens", "index")}
    logits = model(**inputs)[0].double()
    if logits.ndim == 1:
        others = torch.cat([logits[: item["label"]], logits[item["label"] + 1 :]])
        return float(logits[item["label"]] - others.logsumexp(0))
    ids = batch["input_ids"][0, 1:]
    return float(logits.log_softmax(-1)[range(len(ids)), ids].sum())


def test_cells_cover_every_pixel_once(monkeypatch):
    monkeypatch.setattr(controls, "background", lambda clip: torch.ones_like(clip[0]))
    counts = sum(c.int() for c in controls.occluded(torch.zeros(5, 3, 30, 40, dtype=torch.uint8)))
    assert (counts == 1).all()


def test_the_cover_is_the_clips_own_background(monkeypatch):
    """It matches a brightening background within one grey level, and no still or moving object stays visible."""
    monkeypatch.setattr(controls, "CELLS", 6)
    ground = torch.linspace(60, 160, 64).round().to(torch.uint8).expand(8, 3, 64, 64)
    moving, still = ground.clone(), ground.clone()
    for time in range(8):
        moving[time, :, 20:30, 8 * time : 8 * time + 8] = 255
    still[:, :, 27:35, 28:36] = 255
    plain, without, ghost = (controls.background(clip).int() for clip in (ground, moving, still))
    inner = slice(11, 53)  # the border is more than half a coarse cell from the next one
    assert (plain - ground[0].int())[..., inner].abs().max() <= 1
    assert (without - plain).abs().max() <= 1
    assert 0 < (ghost - plain).max() < 30  # of 145: 8 x 8 pixels are spread over 21 x 21
    steps = max((ghost - plain).diff(dim=d).abs().max() for d in (1, 2))
    assert steps <= 2  # no edge


ROWS = [
    {"file": f"test/class_{k}/video_{i}.pt", "truth": f"class_{k}", "label": f"class_{k if i else 0}", "score": 0.5}
    for k in range(5)
    for i in range(3)
]
CAPTIONED = [{"file": r["file"], "caption": r["label"], "references": [r["truth"]]} for r in ROWS]


@pytest.mark.parametrize("rows", [ROWS, CAPTIONED])
def test_a_wrong_and_a_right_answer_of_different_classes_are_mapped(monkeypatch, rows):
    monkeypatch.setattr(controls, "SHOWN", 2)
    wrong, right = (rows[place] for place in controls.chosen(rows))
    assert not controls.is_right(wrong) and controls.is_right(right)
    assert controls.truth(wrong) != controls.truth(right)
    assert controls.chosen(rows) == controls.chosen(rows) != [0, 1]


def test_if_all_answers_are_right_two_classes_are_mapped(monkeypatch):
    monkeypatch.setattr(controls, "SHOWN", 2)
    rows = [row for row in ROWS if row["label"] == row["truth"]]
    first, second = (rows[place] for place in controls.chosen(rows))
    assert first["truth"] != second["truth"]
    assert len(controls.chosen(rows[:1])) == 1


# -- score.py -------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS)
def test_score_gives_the_scores_of_the_training(runs, tmp_path, job):
    copy = Path(shutil.copytree(runs[job], tmp_path / job))
    before = read(copy)
    for name in ("metrics.json", "predictions_test.jsonl"):
        (copy / name).unlink()
    (copy / "metrics.json").write_text(json.dumps(before | {"test": {}, "controls": {}}))
    with in_full():
        assert score.main(["--checkpoint", str(copy), "--controls", "True", "--num_workers", "0"]) == 0
    assert read(copy) == before
    assert read_rows(copy / "predictions_test.jsonl") == read_rows(runs[job] / "predictions_test.jsonl")


@pytest.mark.parametrize("job", JOBS)
def test_the_predictions_give_the_same_scores_again(runs, capsys, job):
    with in_full():
        assert metrics.main(["--predictions", str(runs[job] / "predictions_test.jsonl")]) == 0
    found, scores = json.loads(capsys.readouterr().out), read(runs[job])["test"]
    names = set(found["intervals"])
    assert names == set(scores["intervals"]) and len(names) >= 5
    for name in names - {"calibration_error"}:  # probabilities are written with four digits
        assert found[name] == pytest.approx(scores[name]) and found["intervals"][name] == pytest.approx(
            scores["intervals"][name]
        )


def test_pictures_are_drawn(runs):
    for job in JOBS:
        assert (runs[job] / "curves.png").stat().st_size > 5000
    drawn = {job: {p.name for p in runs[job].glob("*.png") if p.stat().st_size > 3000} - {"curves.png"} for job in JOBS}
    assert (
        drawn["text"]
        == drawn["classifier"]
        == {"confusion.png", "classes.png", "reliability.png", "worst.png", "occlusion.png"}
    )
    assert drawn["captioner"] == {"captions.png", "attributes.png", "occlusion.png"}


def test_scores_on_other_videos_are_written_next_to_the_run(runs, dataset, tmp_path):
    copy = Path(shutil.copytree(runs["classifier"], tmp_path / "run"))
    before = (copy / "metrics.json").read_bytes()
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    shutil.rmtree(other / "test" / "class_0")
    (other / "test" / "metadata.jsonl").unlink()
    shutil.rmtree(other / "train")
    shutil.rmtree(other / "val")
    assert score.main(["--checkpoint", str(copy), "--data_dir", str(other), "--num_workers", "0"]) == 0
    assert (copy / "metrics.json").read_bytes() == before
    scored = json.loads((copy / "evaluation_other" / "metrics.json").read_text())
    assert "val" not in scored
    assert scored["test"]["count"] == 4 and scored["test"]["classes"]["class_0"] == {
        "count": 0,
        "recall": None,
        "predicted": {},
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "3"], "--epochs has no effect here"),
        (["--vision_model", "videomae"], "was trained with other flags"),
        (["--data_dir", "absent"], "absent"),
    ],
)
def test_score_refuses_options_it_cannot_use(runs, capsys, flags, message):
    assert score.main(["--checkpoint", str(runs["classifier"]), *flags]) == 2
    assert message in capsys.readouterr().err


def test_score_refuses_other_classes_and_a_missing_run(runs, dataset, tmp_path, capsys):
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    (other / "test" / "metadata.jsonl").unlink()
    (other / "test" / "class_0").rename(other / "test" / "class_9")
    assert score.main(["--checkpoint", str(runs["classifier"]), "--data_dir", str(other)]) == 2
    assert "a class that is not in train (class_9)" in capsys.readouterr().err
    assert score.main(["--checkpoint", str(tmp_path)]) == 2
    assert "is not a vidtune run" in capsys.readouterr().err
    provided = sorted((ROOT / "checkpoints" / "provided").glob("*/metadata.json"))
    if provided:
        assert score.main(["--checkpoint", str(provided[0].parent), "--data_dir", str(dataset)]) == 2
        assert "is read-only: add --output_dir" in capsys.readouterr().err


def test_tensorboard_gets_the_log(dataset, tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]

    argv = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--run_name", "r", *FLAGS[:-2]]
    assert main.main([*argv, "--tensorboard", "True"]) == 0
    found: dict[tuple[str, int], float] = {}
    for file in (tmp_path / "r" / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # records of the TFRecord format: length, its checksum, bytes, their checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[16 + length :]
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    for row in log:
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert found[name, row["step"]] == pytest.approx(row[name], rel=1e-6)


def test_tensorboard_without_its_package_is_one_line(monkeypatch, capsys):
    import config

    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    assert main.main(["--tensorboard", "True"]) == 2
    assert "needs tensorboardX" in capsys.readouterr().err


def test_the_worst_clips_are_confident_errors_then_unsure_hits():
    rows = [
        {"file": f"v/{i}.mp4", "truth": "a", "label": label, "score": score}
        for i, (label, score) in enumerate([("a", 0.9), ("b", 0.6), ("a", 0.4), ("b", 0.95)])
    ]
    found = figures.worst_clips(rows, {"a": "running", "b": "jumping"})
    assert [place for place, _ in found] == [3, 1, 2, 0]
    assert (
        found[0][1] == "v/3.mp4: jumping 95 %, wrong, truth: running" and found[2][1] == "v/2.mp4: running 40 %, right"
    )


def test_pictures_name_clips_by_folder_answer_and_truth(tmp_path, monkeypatch):
    """captions.png and occlusion.png."""
    titles, headings = [], []

    def plot_clips(clips, path, heading=""):
        titles.extend(title for _, title in clips)
        headings.append(heading)

    monkeypatch.setattr(figures, "plot_clips", plot_clips)
    rows = [
        {"file": f"test/class_{k}/video_6.pt", "caption": f"a {k}", "references": [f"a {k % 2}", "b"]} for k in range(3)
    ]
    figures.draw_captioner(rows, {}, lambda place: None, tmp_path)
    assert sorted(titles) == [
        "class_0/video_6.pt: a 0  |  equals a reference",
        "class_1/video_6.pt: a 1  |  equals a reference",
        "class_2/video_6.pt: a 2  |  reference: a 0",
    ]
    assert "lowest ROUGE-L" in headings[0] and "n = 3" in headings[0]
    titles.clear()
    clip, fall = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 2, 2)
    labelled = {"file": "test/class_3/video_6.pt", "truth": "b", "label": "a", "score": 0.9}
    figures.plot_occlusion([(clip, fall, labelled), (clip, fall, rows[2])], {"a": "running", "b": "jumping"}, tmp_path)
    assert titles[0] == "class_3/video_6.pt: running 90 %, wrong, truth: jumping"
    assert titles[2] == "class_2/video_6.pt: a 2  |  reference: a 0"


def test_a_heading_moves_the_clips_down_by_a_line(tmp_path):
    clip = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    with in_full():
        plain, headed = (
            np.asarray(Image.open(figures.plot_clips([(clip, "a")], tmp_path / "sheet.png", heading)))
            for heading in ("", "worst of all")
        )
    assert (plain == headed[22:]).all() and (headed[:22] < 100).any()


def test_the_occlusion_picture_is_red_where_covering_costs(tmp_path):
    """Two frames of 40 x 40 black pixels. Only covering the lower right quarter of the second one costs confidence."""
    fall = torch.full((2, 2, 2), -1.0)
    fall[1, 1, 1] = 3.0
    clip = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    row = {"file": "v/3.mp4", "truth": "b", "label": "a", "score": 0.9}
    with in_full():
        path = figures.plot_occlusion([(clip, fall, row)], {"a": "running", "b": "jumping"}, tmp_path / "o.png")
    pixels = np.asarray(Image.open(path)).astype(int)
    red = (pixels[..., 0] > 120) & (pixels[..., 1] < 40)
    rows, columns = np.nonzero(red)
    first, second = 80, 82  # frames are drawn at twice their size, two pixels apart
    top = 2 * 22 + 80  # below two titles and the plain frames
    assert abs(rows.min() - (top + 40)) <= 3 and abs(rows.max() - (top + 79)) <= 3
    assert abs(columns.min() - (second + 40)) <= 3 and abs(columns.max() - (second + first - 1)) <= 3
