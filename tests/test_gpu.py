"""A GPU gives the results of the CPU: losses, logits, answers, features and resumed runs. Skipped unless
VIDTUNE_TEST_GPU is set and there is a GPU."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_options import CAPTIONER
from test_resume import assert_resumed_exactly
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForVideoClassification

import inference
import main
from build_model import VideoModel, build_model, trained_tensors
from config import Config
from pretrained import Source, tiny_folder
from script import read_rows
from train_code import (
    build_accelerator,
    build_engine,
    build_loaders,
    cast_frozen,
    loss_sum,
    resumed_progress,
    save_progress,
    to_device,
    train_step,
)
from vision import load_vision
from VLoader import read_splits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="VIDTUNE_TEST_GPU is not set, or there is no GPU")

# no dropout anywhere: the CPU and a GPU draw other random numbers
JOBS = {
    "full": [],
    "lora": ["--vision_model", "videomae", "--use_lora_vision", "True"],
    "frozen": ["--freeze_visionbackbone", "True"],
    "attentive": ["--freeze_visionbackbone", "True", "--vision_model", "videomae"],
    "text": ["--use_vlm", "--freeze_visionbackbone", "--use_text", "--freeze_llmbackbone", "True"],
    "caption": ["--use_vlm", "--captioning", "--freeze_visionbackbone", "--freeze_llmbackbone", "True"],
}
EXACT = ["--mixed_precision", "no", "--frozen_dtype", "fp32"]
GPU = torch.device("cuda")
BACKBONES = pytest.mark.parametrize("name", ["timesformer", "videomae", "vjepa2"])


@pytest.fixture(autouse=True)
def any_device():
    """Lets a test choose device and precision: accelerate keeps the first ones of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(dataset: Path, folder: Path, *flags: str) -> tuple[list[dict], dict]:
    """Log and metrics of a run in folder/r."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--data_dir", str(dataset), "--output_dir", str(folder), "--run_name", "r", "--dropout", "0"]
    argv += [
        "--epochs",
        "2",
        "--batch_size",
        "3",
        "--learning_rate",
        "3e-4",
        "--num_workers",
        "0",
        "--controls",
        "True",
    ]
    assert main.main([*argv, *flags]) == 0
    rows = [json.loads(line) for line in (folder / "r" / "log.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "r" / "metrics.json").read_text())


def clips(num_frames: int, size: int = 64) -> torch.Tensor:
    """Two clips, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, num_frames, 3, size, size), dtype=torch.uint8, generator=generator)


@BACKBONES
def test_logits_of_a_gpu_equal_those_of_the_cpu(name):
    """Up to TF32, in which cuDNN computes the convolution that makes patches."""
    model = build_model(Config(vision_model=name), 3).eval()
    video = clips(model.vision_encoder.num_frames)
    with torch.no_grad():
        expected = model.scores(video)  # (B, K)
        found = model.to(GPU).scores(video.to(GPU)).cpu()
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


@BACKBONES
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_fused_attention_gives_the_eager_result(name, dtype, tolerance):
    vision = load_vision(Source(str(tiny_folder(name))), Config()).eval().to(GPU)
    native = AutoModelForVideoClassification.from_pretrained(tiny_folder(name), attn_implementation="eager")
    inputs = {vision.family.input: vision.preprocessing.normalise(clips(vision.num_frames).to(GPU))}
    with torch.no_grad(), torch.autocast(GPU.type, dtype, enabled=dtype != torch.float32):
        eager = native.base_model.eval().to(GPU)(**inputs, **vision.family.arguments).last_hidden_state
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # not the unfused one
            fused = vision.backbone(**inputs, **vision.family.arguments).last_hidden_state  # (B, N, D)
    assert (fused - eager).abs().max() <= tolerance * eager.abs().max()


@pytest.mark.parametrize("job", JOBS)
def test_a_gpu_trains_as_the_cpu_does(dataset, tmp_path, job):
    expected, _ = train(dataset, tmp_path / "cpu", *JOBS[job], *EXACT, "--device", "cpu")
    found, metrics = train(dataset, tmp_path / "gpu", *JOBS[job], *EXACT)
    assert metrics["device"] == torch.cuda.get_device_name()
    rounded, _ = train(dataset, tmp_path / "bf16", *JOBS[job])  # what --mixed_precision auto means on this GPU
    for cpu, gpu, bf16 in zip(expected, found, rounded, strict=True):
        for name in ("train_loss", "val_loss"):
            assert gpu[name] == pytest.approx(cpu[name], rel=1e-3)
            assert bf16[name] == pytest.approx(cpu[name], rel=5e-2)


@pytest.mark.parametrize("job", ["full", "lora", "text", "caption"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_resumed_on_a_gpu_equals_an_uninterrupted_one(dataset, tmp_path, monkeypatch, job, precision):
    more = [*JOBS[job], "--num_workers", "0", "--mixed_precision", precision]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, more, 5, 2)


def training(config: Config, dataset: Path) -> tuple[VideoModel, Any, Any]:
    """(model, loader, engine) of a new run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = build_accelerator(config)
    model = build_model(config, 3).to(accelerator.device).train()
    config = model.vision_encoder.fill_auto(config)
    loader = build_loaders(model, config, read_splits(dataset))["train"]
    return model, loader, build_engine(model, loader, config, accelerator)


def test_the_state_of_an_fp16_run_has_its_loss_scale(dataset, tmp_path):
    config = Config(mixed_precision="fp16", num_workers=0, epochs=2, batch_size=3)
    model, loader, engine = training(config, dataset)
    scaler = engine.accelerator.scaler
    scaler.scale(torch.ones(1, device=GPU))  # makes its tensors
    scaler.update(128.0)  # not the scale that it starts with
    train_step(model, [next(iter(loader))], loader, engine)
    save_progress(model, loader, engine, tmp_path)
    model, loader, engine = training(config, dataset)
    assert engine.accelerator.scaler.get_scale() != 128.0
    engine.progress = resumed_progress(model, engine, config.epochs, tmp_path)
    assert engine.progress.scaler["scale"] == engine.accelerator.scaler.get_scale() == 128.0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_wait_in_pinned_memory(dataset, workers):
    _, loader, _ = training(Config(num_workers=workers, epochs=1, batch_size=3), dataset)
    with closing(loader):
        batch = next(iter(loader))
    there = to_device(batch, GPU)
    assert all(tensor.is_pinned() for tensor in batch.values())
    assert all(torch.equal(there[name].cpu(), tensor) for name, tensor in batch.items())


@pytest.mark.skipif(shutil.which("cc") is None, reason="torch.compile needs a C compiler")
def test_a_compiled_run_has_the_losses_of_an_eager_one(dataset, tmp_path):
    expected, _ = train(dataset, tmp_path / "eager", *EXACT, "--controls", "False")
    found, _ = train(dataset, tmp_path / "compiled", *EXACT, "--controls", "False", "--compile", "True")
    for eager, compiled in zip(expected, found, strict=True):
        for name in ("train_loss", "val_loss"):
            assert compiled[name] == pytest.approx(eager[name], rel=1e-3)


def test_more_processes_than_gpus_are_refused(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert main.main(["--data_dir", str(dataset), "--output_dir", str(tmp_path)]) == 2
    assert "99 processes need as many GPUs, and this machine has " in capsys.readouterr().err


@pytest.mark.parametrize("job", ["full", "caption"])
def test_a_checkpoint_of_a_gpu_answers_on_the_cpu(dataset, tmp_path, job):
    train(dataset, tmp_path, *JOBS[job])
    answers = {}
    for device in ("cuda", "cpu"):
        AcceleratorState._reset_state(reset_partial_state=True)
        output = tmp_path / f"{device}.jsonl"
        argv = ["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test"), "--output", str(output)]
        assert inference.main([*argv, *EXACT[:2], "--num_workers", "0", "--device", device]) == 0
        answers[device] = {row["file"]: row for row in read_rows(output)}
    assert answers["cuda"].keys() == answers["cpu"].keys()
    for video, row in answers["cuda"].items():
        other = answers["cpu"][video]
        if job == "caption":
            assert row["caption"] == other["caption"]
        else:
            scores = [{top["label"]: top["score"] for top in r["top_k"]} for r in (row, other)]
            assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_frozen_weights_in_bf16_take_less_memory_and_give_the_same_gradients(dataset):
    """Bit for bit the gradients of bf16 autocast on fp32 weights."""
    used, results = {}, []
    for dtype in ("fp32", "auto"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = Config(**CAPTIONER, use_lora_llm=True, dropout=0.0, num_workers=0, frozen_dtype=dtype)
        torch.manual_seed(0)
        model = build_model(config, 3)
        accelerator = build_accelerator(config)
        cast_frozen(model, config, accelerator)
        before = torch.cuda.memory_allocated()
        model.to(accelerator.device)
        used[dtype] = torch.cuda.memory_allocated() - before
        config = model.vision_encoder.fill_auto(config)
        loader = build_loaders(model, config, read_splits(dataset))["train"]
        batch = to_device(next(iter(loader)), accelerator.device)
        with accelerator.autocast():
            loss = loss_sum(model.train(), batch)[0]
        loss.backward()
        results.append((loss.item(), {n: p.grad.cpu() for n, p in trained_tensors(model).items()}))
        loader.close()
    (expected, gradients), (found, found_gradients) = results
    assert found == expected
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())
    assert used["auto"] < 0.75 * used["fp32"]
