"""What a run is written to for other programs gives our answers there."""

from pathlib import Path

import pytest
import torch

import inference
import main
from build_model import adapters
from checkpoint import load_run

RUNS = {
    "timesformer": ["--num_frames", "4", "--image_size", "48"],
    "timesformer_lora": ["--use_lora_vision", "True"],
    "videomae_lora": ["--vision_model", "videomae", "--use_lora_vision", "True"],
    "videomae_frozen": ["--vision_model", "videomae", "--freeze_visionbackbone", "True"],
    "captioner": ["--use_vlm", "--captioning", "--freeze_visionbackbone", "True", "--use_lora_llm", "True"],
    "text": ["--use_vlm", "--use_text", "True", "--use_lora_vision", "True", "--freeze_llmbackbone", "True"],
}


def train(dataset: Path, folder: Path, name: str, *more: str) -> Path:
    flags = [
        "--data_dir",
        str(dataset),
        "--output_dir",
        str(folder),
        "--run_name",
        name,
        "--epochs",
        "2",
        "--num_workers",
        "0",
    ]
    assert main.main([*flags, "--learning_rate", "3e-3", *RUNS.get(name, []), *more]) == 0
    return folder / name


def clips(model) -> torch.Tensor:
    size = model.vision_encoder.preprocessing.image_size
    shape = (2, model.vision_encoder.config.num_frames, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["timesformer", "timesformer_lora", "videomae_lora", "videomae_frozen"])
def test_a_classifier_as_a_hugging_face_folder(dataset, tmp_path, capsys, name):
    from transformers import AutoImageProcessor, AutoModelForVideoClassification

    run, out = train(dataset, tmp_path, name), tmp_path / "out"
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 0
    assert "differ by at most" in capsys.readouterr().out
    model, _, _ = load_run(run)
    native = AutoModelForVideoClassification.from_pretrained(out).eval()
    assert native.config.id2label == {0: "circle moving right", 1: "circle moving left", 2: "circle moving down"}
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    video = clips(model)
    pixel_values = processor(
        [list(clip.numpy()) for clip in video], return_tensors="pt", input_data_format="channels_first"
    )
    with torch.no_grad():
        assert (native(**pixel_values).logits - model(video)).abs().max() < 1e-5
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, tower",
    [("timesformer_lora", "vision"), ("videomae_lora", "vision"), ("captioner", "language"), ("text", "vision")],
)
def test_adapters_as_a_peft_folder(dataset, tmp_path, name, tower):
    from peft import PeftModel
    from transformers import AutoModel

    run, out = train(dataset, tmp_path, name), tmp_path / "out"
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 0
    model, _, _ = load_run(run)
    body = model.vision_encoder.backbone if tower == "vision" else model.language_model.base_model
    base = AutoModel.from_pretrained(model.sources[tower].path).eval()
    inputs = {"pixel_values": model.vision_encoder.preprocessing.normalise(clips(model))} if tower == "vision" else {"input_ids": torch.arange(1, 9)[None]}  # fmt: skip
    with torch.no_grad():
        plain = base(**inputs).last_hidden_state
        expected = body(**inputs).last_hidden_state
        found = PeftModel.from_pretrained(base, out / f"adapter_{tower}").eval()(**inputs).last_hidden_state
    if name == "videomae_lora":  # AutoModel puts its own norm behind; compare before it
        assert len(list(adapters(model))) == 24
    assert (found - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-3


def test_what_cannot_be_exported_says_why(dataset, tmp_path, capsys):
    odd = train(
        dataset, tmp_path, "odd", "--vision_model", "videomae", "--freeze_visionbackbone", "True", "--num_frames", "4"
    )
    both = train(
        dataset, tmp_path, "both", "--use_vlm", "--freeze_visionbackbone", "True", "--freeze_llmbackbone", "True"
    )
    for run, message in ((odd, "cannot hold the interpolated one"), (both, "no Hugging Face class holds")):
        capsys.readouterr()
        assert inference.main(["--checkpoint", str(run), "--export", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_library_s_pipeline_runs_on_the_export(dataset, tmp_path):
    import transformers
    from conftest import counting_frames, write_video

    out = tmp_path / "out"
    assert inference.main(["--checkpoint", str(train(dataset, tmp_path, "timesformer")), "--export", str(out)]) == 0
    answers = transformers.pipeline("video-classification", str(out))(
        str(write_video(tmp_path / "v.mp4", counting_frames(20)))
    )
    assert {a["label"] for a in answers} == {"circle moving right", "circle moving left", "circle moving down"}
