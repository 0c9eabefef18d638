"""An exported run gives the same predictions in other programs."""

import ast
import errno
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import pytest
import torch
from conftest import counting_frames, write_video

import inference
import main
from build_model import adapters
from checkpoint import load_run
from config import ROOT
from extras import export as export_module
from extras.export import native_model, preprocessor_fields
from readers import open_video
from transforms import Preprocessing, sample_indices
from VLoader import Sample

slow = pytest.mark.slow
RUNS = {
    "timesformer": ["--num_frames", "4", "--image_size", "48"],
    "timesformer_lora": ["--use_lora_vision", "True"],
    "videomae_lora": ["--vision_model", "videomae", "--head", "linear", "--use_lora_vision", "True"],
    "videomae_frozen": ["--vision_model", "videomae", "--head", "linear", "--freeze_visionbackbone", "True"],
    "captioner": ["--use_vlm", "--captioning", "--freeze_visionbackbone", "True", "--use_lora_llm", "True"],
    "text": ["--use_vlm", "--use_text", "True", "--use_lora_vision", "True", "--freeze_llmbackbone", "True"],
}


@pytest.fixture(scope="module")
def train(dataset, tmp_path_factory) -> Callable[..., Path]:
    """train(name, *flags) is the folder of a run, which is trained only once."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data_dir", str(dataset), "--output_dir", str(folder), "--epochs", "2", "--num_workers", "0"]

    @cache
    def trained(name: str, *more: str) -> Path:
        run = "_".join([name, *more]).replace("--", "")
        job = RUNS.get(name, [])
        assert main.main([*flags, "--run_name", run, "--learning_rate", "3e-3", *job, *more]) == 0
        return folder / run

    return trained


def check_card(out: Path) -> None:
    """The table in an export's README lists exactly what is in the folder."""
    card = (out / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \|", card, re.MULTILINE)
    names = {name.rstrip("/") for row in rows for name in re.findall("`(.+?)`", row)}
    assert "$" not in card and names == {p.name for p in out.iterdir()} - {"README.md", "__pycache__"}


def clips(model) -> torch.Tensor:
    size = model.vision_encoder.preprocessing.image_size
    shape = (2, model.vision_encoder.config.num_frames, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "name",
    ["timesformer_lora", "videomae_lora", *(pytest.param(n, marks=slow) for n in ("timesformer", "videomae_frozen"))],
)
def test_a_classifier_as_a_hugging_face_folder(train, tmp_path, capsys, name):
    from transformers import AutoImageProcessor, AutoModelForVideoClassification

    run, out = train(name), tmp_path / "out"
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 0
    assert "differ by at most" in capsys.readouterr().out
    check_card(out)
    model, _, _ = load_run(run)
    native = AutoModelForVideoClassification.from_pretrained(out).eval()
    assert native.config.id2label == {0: "moves right", 1: "moves left", 2: "moves down"}
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    video = clips(model)
    pixel_values = processor(
        [list(clip.numpy()) for clip in video], return_tensors="pt", input_data_format="channels_first"
    )
    with torch.no_grad():
        assert (native(**pixel_values).logits - model(video)).abs().max() < 1e-5
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, part",
    [
        ("timesformer_lora", "vision"),
        ("videomae_lora", "vision"),
        ("captioner", "language"),
        pytest.param("text", "vision", marks=slow),
    ],
)
def test_adapters_as_a_peft_folder(train, tmp_path, name, part):
    from peft import PeftModel
    from transformers import AutoModel

    run, out = train(name), tmp_path / "out"
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 0
    model, _, _ = load_run(run)
    body = model.vision_encoder.backbone if part == "vision" else model.language_model.base_model
    base = AutoModel.from_pretrained(model.sources[part].path).eval()
    inputs = (
        {"pixel_values": model.vision_encoder.preprocessing.normalise(clips(model))}
        if part == "vision"
        else {"input_ids": torch.arange(1, 9)[None]}
    )
    with torch.no_grad():
        plain = base(**inputs).last_hidden_state
        expected = body(**inputs).last_hidden_state
        found = PeftModel.from_pretrained(base, out / f"adapter_{part}").eval()(**inputs).last_hidden_state
    if name == "videomae_lora":  # AutoModel adds its own norm; compare before it
        assert len(list(adapters(model))) == 24
    assert (found - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-3


def test_runs_that_cannot_be_exported_say_why(train, tmp_path, capsys):
    odd = train("odd", *RUNS["videomae_frozen"], "--num_frames", "4")
    both = train("both", "--use_vlm", "--freeze_visionbackbone", "True", "--freeze_llmbackbone", "True")
    for run, message in (
        (odd, "cannot load the interpolated position embeddings"),
        (both, "Hugging Face has no class"),
    ):
        capsys.readouterr()
        assert inference.main(["--checkpoint", str(run), "--export", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


# -- predict.py, next to an exported classifier -----------------------------------------------------


def export(run: Path, out: Path):
    """The exported predict.py's function."""
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 0
    return runpy.run_path(str(out / "predict.py"))["predict"]


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory) -> tuple[Path, Path]:
    """(a run, the folder it is exported to)."""
    folder = tmp_path_factory.mktemp("plain")
    run = train("timesformer")
    export(run, folder / "out")
    return run, folder / "out"


def differences(run: Path, predict, videos: list[Path]) -> dict[str, float]:
    """The largest difference of a probability over all videos that inference reads. The labels must be equal."""
    predictor = inference.Predictor.from_checkpoint(run, top_k=99, num_workers=0)
    found = {}
    for video, answer in zip(videos, predictor.predict_many([Sample(v) for v in videos]), strict=True):
        if "error" in answer:
            with pytest.raises((av.FFmpegError, OSError, ValueError)):
                predict(video)
            continue
        other = predict(video)
        assert max(other, key=other.get) == answer["name"], video
        assert other.keys() == {top["name"] for top in answer["top_k"]}
        found[video.name] = max(abs(other[top["name"]] - top["score"]) for top in answer["top_k"])
    return found


@pytest.mark.parametrize("name", ["timesformer", pytest.param("videomae_lora", marks=slow)])
def test_predict_answers_as_inference_does_on_real_clips(real_data, train, tmp_path, name):
    run = train(name)
    clips = sorted(p for p in (real_data / "clips").iterdir() if p.suffix != ".pt")
    found = differences(run, export(run, tmp_path / "out"), clips)
    assert len(found) >= 15 and max(found.values()) < 1e-3, found


def turned(path: Path, source: Path, angle: int) -> Path:
    """A copy of a video with a display matrix."""
    with av.open(str(source)) as video, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(video.streams.video[0])
        stream.set_display_rotation(angle)
        for packet in video.demux(video.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    return path


def without_start(path: Path, source: Path) -> Path:
    """A copy of a video that starts after its first keyframe, as when a stream is recorded from its middle."""
    with av.open(str(source)) as video, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(video.streams.video[0])
        for packet in [p for p in video.demux(video.streams.video[0]) if p.size][7:]:
            packet.stream = stream
            copy.mux(packet)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """Rotated, short, wide, tall, small and cut videos, one with a name like a URL, and one that is not a video."""
    folder = tmp_path_factory.mktemp("made")
    wide = write_video(folder / "wide.mp4", counting_frames(41, 64, 200))
    turns = [turned(folder / f"turned{angle}.mp4", wide, angle) for angle in (90, 180, 270)]
    others = [
        write_video(folder / "short.mkv", counting_frames(2)),
        write_video(folder / "high.avi", counting_frames(23, 200, 64), codec="mpeg4"),
        write_video(folder / "small.mp4", counting_frames(9, 16, 24)),
        write_video(folder / "12:30.mp4", counting_frames(30)[::-1]),
        *(
            without_start(
                folder / f"cut_{codec}.mkv", write_video(folder / "whole.mp4", counting_frames(60), codec, g="20")
            )
            for codec in ("libx264", "mpeg4")
        ),
    ]
    (folder / "broken.mp4").write_bytes(b"broken")
    return [wide, *turns, *others, folder / "broken.mp4", folder / "none.mp4"]


@pytest.mark.parametrize(
    "name, stride", [("timesformer", "3"), pytest.param("timesformer", "0", marks=slow), ("videomae_lora", "-2")]
)
def test_predict_answers_as_inference_does_on_made_clips(train, tmp_path, made, name, stride):
    run = train(name, "--frame_stride", stride)
    found = differences(run, export(run, tmp_path / "out"), made)
    assert len(found) == 10 and max(found.values()) < 1e-3, found


def test_every_rule_of_resizing(plain, made):
    predict = runpy.run_path(str(plain[1] / "predict.py"))["predict"]
    model, _, _ = load_run(plain[0])
    for size, code in (({"shortest_edge": 60}, 3), ({"height": 224, "width": 224}, 2), (50, 0), (None, 2)):
        values = {
            "size": size or 40,
            "do_resize": size is not None,
            "resample": code,
            "do_center_crop": True,
            "crop_size": 40,
            "image_mean": [0.5] * 3,
            "image_std": [0.3] * 3,
        }
        rules = Preprocessing.from_dict(values, 48)
        predict.__globals__["RULES"].update(preprocessor_fields(rules))
        for video in made[:-2]:
            reader = open_video(video)
            clip = rules.pixels(reader.frames(sample_indices(len(reader), 4)))
            with torch.no_grad():
                model.vision_encoder.preprocessing = rules
                expected = model(clip[None])[0].softmax(-1)
            assert list(predict(video).values()) == pytest.approx(expected.tolist(), abs=1e-5), (video, size)


def test_predict_as_a_script(plain, made):
    """From another folder, and with names that FFmpeg could misread. Every unreadable video is one line."""
    predict = runpy.run_path(str(plain[1] / "predict.py"))["predict"]
    names = ["12:30.mp4", "broken.mp4", "no\nsuch", "wide.mp4"]
    command = [sys.executable, str(plain[1] / "predict.py"), *names]
    done = subprocess.run(command, cwd=made[0].parent, capture_output=True, text=True)
    assert done.returncode == 1
    answers = {name: predict(made[0].parent / name) for name in (names[0], names[3])}
    lines = [f"{name!r} {max(a, key=a.get)!r} {max(a.values()):.4f}" for name, a in answers.items()]
    assert done.stdout.splitlines() == lines
    errors = [line for line in done.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert errors == [
        "error: cannot read 'broken.mp4': Invalid data found when processing input",
        "error: cannot read 'no\\nsuch': No such file or directory",
    ]


def test_predict_needs_nothing_of_this_repository(plain):
    _, out = plain
    source = (out / "predict.py").read_text(encoding="utf-8")
    assert source == (ROOT / "exported" / "predict.py").read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)} | {
        a.name for n in nodes if isinstance(n, ast.Import) for a in n.names
    }
    assert {m.partition(".")[0] for m in modules} <= {"av", "json", "numpy", "pathlib", "sys", "torch", "transformers"}
    check_card(out)


# -- whole or not at all ----------------------------------------------------------------------------


def test_an_export_is_complete_or_not_written(train, tmp_path, capsys, monkeypatch):
    run, out = train("timesformer_lora"), tmp_path / "exports" / "out"

    def full(values, path):
        assert any(path.parent.parent.glob(".out.*/adapter_vision"))  # it got this far
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_json", full)
        capsys.readouterr()
        assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 2
    assert capsys.readouterr().err == f"error: --export: cannot write {out}: No space left on device\n"
    assert not list(out.parent.iterdir())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    half = out.parent / f".out.{platform.node()}.{dead.pid}.tmp"  # the leftovers of a killed export
    (half / "adapter_vision").mkdir(parents=True)
    out.mkdir()  # an empty folder is filled
    assert inference.main(["--checkpoint", str(run), "--export", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert {"adapter_vision", "config.json", "model.safetensors", "predict.py", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    modes = {file.stat().st_mode for file in (out / "config.json", *out.rglob("*.safetensors"))}
    assert len(modes) == 1  # safetensors alone would let only the owner read its files


@pytest.mark.parametrize("place", ["/dev/null/x", "file/x", "file"])
def test_a_folder_that_cannot_be_written_is_one_line(plain, tmp_path, capsys, place):
    (tmp_path / "file").touch()
    assert inference.main(["--checkpoint", str(plain[0]), "--export", str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_classes_of_one_display_name_stay_two(plain):
    model, _, metadata = load_run(plain[0])
    metadata["display_names"] = {name: "the same" for name in metadata["class_names"]}
    assert set(native_model(model, metadata).config.label2id) == {"class_0", "class_1", "class_2"}
