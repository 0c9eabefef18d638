"""Options for small and imbalanced datasets, and tests with several views, each against a plain computation."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import counting_frames, read_clip, resolved, write_video
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import inference
import main
import score
from answers import fingerprint_answers
from build_model import build_model, trained_tensors
from config import Config, parse
from train_code import (
    build_accelerator,
    build_loaders,
    build_optimizer,
    cast_frozen,
    evaluate,
    layers_above,
    loss_sum,
    out_of_patience,
)
from transforms import Preprocessing, resize_frames, sample_indices, view_indices
from VLoader import ClipDataset, EpochBatches, Sample, build_loader, read_splits

SQUARE = Preprocessing(16, (16,), "bilinear", 1 / 255, (0.5,) * 3, (0.5,) * 3)


# -- balanced classes -------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 5))
def test_an_epoch_draws_every_class_equally_often(sizes, epoch):
    classes = [k for k, size in enumerate(sizes) for _ in range(size)]
    samples = [Sample(Path("v"), str(k)) for k in classes]
    dataset = ClipDataset(samples, SQUARE, 4, 0, [str(k) for k in range(len(sizes))], train=True, seed=1)
    batches = EpochBatches(dataset, 4, balance=True)
    batches.epoch = epoch
    order = [item for batch in batches for item in batch]
    assert len(order) == len(classes) and len(set(order)) == len(order)  # a repeated clip is another draw
    counts = Counter(classes[place] for _, place in order)
    assert max(counts.values()) - min(counts.get(k, 0) for k in range(len(sizes))) <= 1
    for k, size in enumerate(sizes):  # no clip of a class is drawn twice before all were drawn once
        drawn = Counter(place for _, place in order if classes[place] == k)
        assert not drawn or max(drawn.values()) - min(drawn[p] for p in drawn) <= 1
        assert len(drawn) == min(size, counts.get(k, 0))
    batches.epoch = epoch + 1
    assert not {item for batch in batches for item in batch} & set(order)  # the next epoch's order is different, too


def test_a_repeated_clip_shows_other_frames(tmp_path):
    write_video(tmp_path / "v.mp4", counting_frames(60))
    dataset = ClipDataset([Sample(tmp_path / "v.mp4", "a")], SQUARE, 4, 0, ["a"], train=True)
    clips = {dataset[draw, 0]["video"].numpy().tobytes() for draw in range(6)}
    assert len(clips) == 6


def test_balanced_training_sees_the_rare_class_as_often(dataset, tmp_path):
    """With the loader of a real run: two of three classes have one training video each."""
    config, _ = parse(["--data_dir", str(dataset), "--class_balance", "True", "--num_workers", "0"], "main")
    config = replace(config, num_frames=8, frame_stride=0, batch_size=4)
    splits = read_splits(dataset)
    rare = [s for s in splits.train if s.label == "class_0"] + [
        next(s for s in splits.train if s.label == name) for name in ("class_1", "class_2")
    ]
    loader = build_loaders(build_model(config, 3), config, replace(splits, train=rare))["train"]
    labels = Counter(label for batch in loader for label in batch["labels"].tolist())
    assert sum(labels.values()) == len(rare) and max(labels.values()) - min(labels.values()) <= 1


# -- captions of like length ------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 7), st.integers(2, 4), st.integers(0, 3))
def test_clips_are_sorted_within_an_optimizer_step_and_no_further(lengths, size, group, epoch):
    def length(item):
        return lengths[item[1]]

    samples = [Sample(Path("v"), captions=("word " * n,)) for n in lengths]
    dataset = ClipDataset(samples, SQUARE, 4, 0, [], train=True, seed=5)
    plain, batches = (EpochBatches(dataset, size, group=g) for g in (1, group))
    plain.epoch = batches.epoch = epoch
    assert [len(batch) for batch in batches] == [len(batch) for batch in plain]
    for k in range(0, len(plain), group):
        unsorted, found = (list(itertools.chain(*list(b)[k : k + group])) for b in (plain, batches))
        assert sorted(found) == sorted(unsorted)
        assert [length(item) for item in found] == sorted(length(item) for item in unsorted)


def test_accumulated_batches_of_captions_need_less_padding(dataset):
    config = replace(Config(), use_vlm=True, language_model="gpt2", captioning=True, num_workers=0)
    config = replace(config, batch_size=3, gradient_accumulation_steps=4)
    splits = read_splits(dataset)
    model = build_model(config, len(splits.class_names))
    loader = build_loaders(model, resolved(config, model), splits)["train"]
    batches, padding = loader.batch_sampler, []
    for batches.group in (4, 1):
        masks = []
        for batches.epoch in range(5):
            masks += [batch["attention_mask"] for batch in loader]
        padding.append(1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))
    assert padding[0] < padding[1] / 2


def test_which_caption_is_drawn_is_known_before_the_video_is_read(tmp_path):
    captions = ("one", "two words", "three words here")
    torch.save(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), tmp_path / "v.pt")
    samples = [Sample(tmp_path / "v.pt", "a", captions=captions)]
    dataset, first = (ClipDataset(samples, SQUARE, 4, 0, ["a"], train=t) for t in (True, False))
    drawn = [dataset[(draw, 0)]["caption"] for draw in range(30)]
    assert drawn == [dataset.caption(draw, 0) for draw in range(30)]
    assert set(drawn) == set(captions)
    assert {first.caption(draw, 0) for draw in range(30)} == {"one"}


# -- patience ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "best, patience, stop",
    [
        ("TFF", 2, True),
        ("TFF", 3, False),
        ("TFT", 2, False),
        ("TFFF", 0, False),
        ("T", 1, False),
        ("TTF", 1, True),
        ("", 1, False),
    ],
)
def test_patience_counts_epochs_since_the_best(best, patience, stop):
    log = [{"epoch": epoch, "best": b == "T"} for epoch, b in enumerate(best, start=1)]
    assert out_of_patience(log, patience) is stop
    twice = [row | {"best": row["best"] and whole} for row in log for whole in (False, True)]
    assert out_of_patience(twice, patience) is stop  # with another evaluation in the middle of every epoch


def test_patience_ends_a_run_early_and_keeps_its_best(dataset, tmp_path, capsys):
    """A rate this small changes no prediction, so no epoch beats the first."""
    flags = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--num_workers", "0", "--epochs", "6"]
    assert (
        main.main(
            [
                *flags,
                "--learning_rate",
                "1e-30",
                "--freeze_visionbackbone",
                "True",
                "--run_name",
                "r",
                "--patience",
                "2",
            ]
        )
        == 0
    )
    assert "stopped after epoch 3: val has not improved for 2 epochs" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [row["best"] for row in log] == [True, False, False]
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["best_epoch"] == 1


# -- losses and rates -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return build_model(Config(), 5).eval()


def batch_of(count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    clips = torch.randint(0, 256, (count, 8, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return {"video": clips, "labels": torch.arange(count) % 5, "index": torch.arange(count)}


def test_label_smoothing_and_mixed_labels_are_soft_targets(classifier):
    batch = batch_of() | {"mixed_labels": torch.tensor([3, 3, 4, 0]), "mix": torch.tensor([0.9, 0.6, 1.0, 0.5])}
    with torch.no_grad():
        logits = classifier(batch["video"])
        loss, _, _ = loss_sum(classifier, batch, smoothing=0.1)
        plain, _, _ = loss_sum(classifier, batch_of())
    first, second = F.one_hot(batch["labels"], 5), F.one_hot(batch["mixed_labels"], 5)
    soft = batch["mix"][:, None] * first + (1 - batch["mix"][:, None]) * second
    soft = 0.9 * soft + 0.1 / 5
    assert torch.allclose(loss, -(soft * logits.log_softmax(-1)).sum(), rtol=1e-5)
    assert torch.allclose(plain, F.cross_entropy(logits, batch["labels"], reduction="sum"), rtol=1e-5)


@pytest.mark.parametrize("name, layers", [("timesformer", 4), ("videomae", 4)])
def test_layer_decay_slows_lower_layers(name, layers):
    plain = Config(vision_model=name, head="linear")
    model = build_model(plain, 3)
    base = {
        id(p): g["peak_lr"] for g in build_optimizer(model, resolved(plain, model)).param_groups for p in g["params"]
    }
    config = replace(plain, layer_decay=0.5)
    decayed = {
        id(p): g["peak_lr"] for g in build_optimizer(model, resolved(config, model)).param_groups for p in g["params"]
    }
    assert model.vision_encoder.config.num_hidden_layers == layers
    for parameter, power in (
        (model.head.weight, 0),
        (model.vision_encoder.backbone.encoder.layer[layers - 1].output.dense.weight, 1),
        (model.vision_encoder.backbone.encoder.layer[0].output.dense.weight, layers),
        (next(model.vision_encoder.backbone.embeddings.parameters()), layers + 1),
    ):
        assert decayed[id(parameter)] == pytest.approx(base[id(parameter)] * 0.5**power)


def test_layers_of_language_models_are_found_too():
    model = build_model(Config(use_vlm=True, captioning=True, language_model="gpt2", use_lora_llm=True), 3)
    backbone, count = model.language_model, model.language_model.config.num_hidden_layers
    above = layers_above(backbone)
    assert {above[n] for n, p in backbone.named_parameters() if p.requires_grad} == set(range(1, count + 1))
    assert above["transformer.wte.weight"] == count + 1 and above["transformer.ln_f.weight"] == 0


# -- several views ----------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 16), st.integers(0, 5), st.integers(1, 5))
def test_clips_of_a_video_spread_around_the_one_that_evaluation_takes(available, num_frames, stride, clips):
    rows = view_indices(available, num_frames, stride, clips).reshape(clips, num_frames)
    assert (np.diff(rows, axis=1) >= 0).all() and (np.diff(rows, axis=0) >= 0).all()
    assert rows.min() >= 0 and rows.max() < available
    if clips % 2:
        assert (rows[clips // 2] == sample_indices(available, num_frames, stride)).all()
    if stride == 0 and available >= num_frames * clips:
        assert len(np.unique(rows)) == rows.size  # no frame twice


def test_views_are_the_clips_and_crops_that_a_plain_loop_takes(tmp_path):
    path = write_video(tmp_path / "wide.mp4", counting_frames(40, height=32, width=80))
    dataset = ClipDataset([Sample(path, "a")], SQUARE, 4, 0, ["a"], views=(2, 3))
    views = dataset[0, 0]["video"]  # [6, 4, 3, 16, 16]
    assert views.shape[0] == 6
    reader_frames = read_clip(path, 40)
    row = 0
    for clip in range(2):
        indices = sample_indices(40, 4, position=(clip + 0.5) / 2)
        resized = SQUARE.pixels(reader_frames[indices], 0.5)
        for left in (0, 12, 24):  # an image of 16 x 40
            expected = resize_frames(reader_frames[indices], (16, 40))[..., left : left + 16]
            assert torch.equal(views[row], expected)
            row += 1
        assert torch.equal(views[row - 2], resized)


def test_scores_of_views_are_their_mean_probabilities(classifier):
    clips = torch.randint(0, 256, (2, 3, 8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        scores = classifier.scores(clips)
        expected = torch.stack([classifier(clips[:, v]).softmax(-1) for v in range(3)]).mean(0)
        assert torch.allclose(scores.softmax(-1), expected, atol=1e-6)
        assert torch.allclose(scores.exp().sum(-1), torch.ones(2), atol=1e-5)
        same = classifier.scores(clips[:, :1].expand(-1, 4, -1, -1, -1, -1))
        assert torch.allclose(same.softmax(-1), classifier(clips[:, 0]).softmax(-1), atol=1e-6)


def test_a_run_tested_with_views_says_so_and_inference_agrees(dataset, tmp_path, capsys):
    flags = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--num_workers", "0", "--epochs", "1"]
    views = ["--test_clips", "2", "--test_crops", "3"]
    assert main.main([*flags, "--freeze_visionbackbone", "True", "--run_name", "r"]) == 0
    assert score.main(["--checkpoint", str(tmp_path / "r"), "--num_workers", "0", *views]) == 0
    assert "on 6 videos, 2 clips x 3 crops of each" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["test"]["views"] == {"clips": 2, "crops": 3} and metrics["test"]["count"] == 6
    output = tmp_path / "answers.jsonl"
    argv = [
        "--checkpoint",
        str(tmp_path / "r"),
        "--video_dir",
        str(dataset / "test"),
        "--output",
        str(output),
        "--num_workers",
        "0",
    ]
    assert inference.main([*argv, *views]) == 0
    right = [json.loads(line)["right"] for line in output.read_text().splitlines()]
    assert np.mean(right) == pytest.approx(metrics["test"]["accuracy"])


def test_evaluation_with_views_counts_every_video_once(classifier, tmp_path):
    paths = [write_video(tmp_path / f"{i}.mp4", counting_frames(20 + i, 64, 96)) for i in range(3)]
    samples = [Sample(path, "abcde"[i]) for i, path in enumerate(paths)]
    preprocessing = classifier.vision_encoder.preprocessing
    dataset = ClipDataset(samples, preprocessing, 8, 0, list("abcde"), views=(3, 2))
    loader = build_loader(dataset, classifier.collator(), 0, EpochBatches(dataset, 2))
    result = evaluate(classifier, loader, build_accelerator(Config(device="cpu")))
    assert result["count"] == 3 and result["ranked"].shape == (3, 5)


@pytest.mark.parametrize(
    "script, flag", [(inference, "test_clips"), (inference, "test_crops"), (main, "class_balance")]
)
def test_captioners_refuse_options_of_classifiers(dataset, capsys, script, flag):
    argv = ["--use_vlm", "True", "--captioning", "True", "--video_dir", str(dataset / "test")]
    argv = argv if script is inference else [*argv[:-2], "--data_dir", str(dataset)]
    assert script.main([*argv, f"--{flag}", "True" if flag == "class_balance" else "2"]) == 2
    assert f"--{flag} works with classifiers only" in capsys.readouterr().err


# -- frozen weights in bf16 -------------------------------------------------------------------------

BF16 = {"device": "cpu", "mixed_precision": "bf16", "num_workers": 0, "num_frames": 4, "frame_stride": 0}
CAPTIONER = {"use_vlm": True, "language_model": "gpt2", "captioning": True, "freeze_visionbackbone": True}


@pytest.fixture(autouse=True)
def any_precision():
    """Lets a test choose the precision: accelerate keeps the first one of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def held(dtype: str, **options):
    """A model whose frozen weights are held in this dtype, and its options and accelerator."""
    config = Config(**(BF16 | options | {"frozen_dtype": dtype}))
    torch.manual_seed(0)
    model = build_model(config, 3)
    accelerator = build_accelerator(config)
    cast_frozen(model, config, accelerator)
    return model, resolved(config, model), accelerator


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_visionbackbone": True},
        {"vision_model": "videomae", "use_lora_vision": True},
        CAPTIONER | {"freeze_llmbackbone": True},
        CAPTIONER | {"use_lora_llm": True},
    ],
)
def test_frozen_weights_in_bf16_change_neither_loss_nor_gradients(dataset, options):
    """Autocast computes with bf16 copies of them anyway. What is trained, and embeddings, stay in fp32."""
    results = []
    for dtype in ("fp32", "bf16"):
        model, config, accelerator = held(dtype, dropout=0.0, **options)
        loader = build_loaders(model, config, read_splits(dataset))["train"]
        with accelerator.autocast():
            loss = loss_sum(model.train(), next(iter(loader)))[0]
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in trained_tensors(model).items()}))
        loader.close()
    (expected, gradients), (found, found_gradients) = results
    assert found == expected
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())

    # the second model: half the memory of almost all that is frozen
    assert all(p.dtype == torch.float32 for p in trained_tensors(model).values())
    frozen = [p for b in model.backbones().values() for p in b.parameters() if not p.requires_grad]
    halved = sum(p.numel() for p in frozen if p.dtype == torch.bfloat16)
    assert halved > 0.7 * sum(p.numel() for p in frozen)


def test_an_epoch_with_frozen_weights_in_bf16_ends_at_the_loss_of_fp32(dataset, tmp_path):
    # the epoch has three steps, so at higher rates the loss depends on the rounding of each; in an epoch of the
    # synthetic dataset (180 steps at 1e-3) losses differ by 0.3 to 0.5 %
    options = CAPTIONER | {"use_lora_llm": True, "epochs": 1, "batch_size": 3, "learning_rate": 3e-4, "num_workers": 0}
    options |= {"data_dir": dataset, "output_dir": tmp_path, "device": "cpu"}
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main.main([*argv, "--run_name", "a"]) == 0
    AcceleratorState._reset_state()
    assert main.main([*argv, "--run_name", "b", "--mixed_precision", "bf16", "--frozen_dtype", "bf16"]) == 0
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("a", "b")]
    for name in ("train_loss", "val_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-2)

    # features computed in bf16 are kept apart, and the run loads without them
    about = [json.loads(path.read_text()) for path in (tmp_path / ".features").rglob("about.json")]
    assert sorted(row.get("mixed_precision", "no") for row in about) == ["bf16", "no"]
    run = tmp_path / "b"
    AcceleratorState._reset_state()
    flags = ["--checkpoint", str(run), "--video_dir", str(dataset / "test" / "class_0"), "--num_workers", "0"]
    assert inference.main([*flags, "--device", "cpu"]) == 0
    prints = [
        fingerprint_answers(run, Config(**o)) for o in ({}, {"frozen_dtype": "bf16"}, {"mixed_precision": "bf16"})
    ]
    assert len({*prints}) == 3


@pytest.mark.parametrize(
    "dtype, precision, expected", [("auto", "bf16", torch.float32), ("bf16", "bf16", torch.bfloat16)]
)
def test_a_cpu_holds_frozen_weights_in_fp32_unless_asked(dtype, precision, expected):
    model, _, _ = held(dtype, freeze_visionbackbone=True, mixed_precision=precision)
    layers = [m for m in model.vision_encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {expected}


def test_frozen_weights_in_bf16_need_bf16(dataset, tmp_path, capsys):
    argv = ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--device", "cpu", "--frozen_dtype", "bf16"]
    assert main.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: --frozen_dtype bf16 needs --mixed_precision bf16; ")
