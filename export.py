"""Writes a run for other programs: a merged Hugging Face model with predict.py, adapters as peft folders."""

import copy
import os
import runpy
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from build_model import VideoModel, adapters, body_of, lora_config, merge_adapters
from config import ROOT, Config
from pretrained import read_config
from readers import open_video
from script import UserError, make_folder, printable, remove_leftovers, temporary, write_json
from transforms import INTERPOLATION, Preprocessing, sample_indices


def export(
    run_dir: Path, model: VideoModel, config: Config, metadata: dict[str, Any], output: Path
) -> tuple[float, float] | None:
    """Writes a run for other programs: adapters as peft folders, a classifier as a merged Hugging Face folder.

        output/adapter_<tower>/   PeftModel.from_pretrained(AutoModel.from_pretrained(<backbone>), folder)
        output/                   AutoModelForVideoClassification.from_pretrained(output), README.md, predict.py

    Everything is written to a temporary folder beside `output`, which is then renamed.
    Returns what export_classifier returns, None if there is no classifier. Changes the model: its adapters are merged.

    Raises:
        UserError: the output exists or cannot be written, or the run is of a kind that has nothing to export.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--export {output}: this folder exists already; choose another")
    lora = [name for name in model.sources if list(adapters(model.backbones()[name]))]
    if config.use_vlm and not lora:
        raise UserError(f"--export: {run_dir} joins two models, which no Hugging Face class holds, and has no adapters")
    with whole_folder(output) as folder:
        for name in lora:
            save_adapters(model, name, config, folder / f"adapter_{name}")
        return None if config.use_vlm else export_classifier(run_dir.name, model, config, metadata, folder)


@contextmanager
def whole_folder(output: Path) -> Generator[Path]:
    """A temporary folder beside `output` that becomes `output` at the end, or is removed if that fails.

    Raises UserError if it cannot be written.
    """
    output = Path(os.path.realpath(output))
    make_folder(output.parent)
    remove_leftovers(output.parent)
    folder = temporary(output)
    try:
        folder.mkdir()
        yield folder
        os.replace(folder, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--export: cannot write {output}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_adapters(model: VideoModel, name: str, config: Config, folder: Path) -> None:
    """A tower's adapters as a peft folder for the tower's AutoModel."""
    from peft import get_peft_model_state_dict

    body = body_of(model.backbones()[name])
    settings = lora_config(body, config.lora_r)
    settings.base_model_name_or_path = model.sources[name].path
    settings.save_pretrained(folder)
    tensors = get_peft_model_state_dict(body)
    tensors = {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def export_classifier(
    run: str, model: VideoModel, config: Config, metadata: dict[str, Any], folder: Path
) -> tuple[float, float]:
    """The classifier as its published class, with adapters merged and the classes' names, and a program beside it.

    Reloads it and returns (the largest difference of a logit, of a probability that predict.py gives for a video).
    """
    from transformers import AutoModelForVideoClassification

    vision = model.vision_encoder
    check_position_table(model)
    size = (2, vision.config.num_frames, 3, vision.config.image_size, vision.config.image_size)
    clips = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = draw_video(folder / "video.mp4", vision.config.num_frames)
    reader = open_video(video)
    frames = reader.frames(sample_indices(len(reader), config.num_frames, config.frame_stride))
    with torch.no_grad():  # through the adapters
        expected = model.eval()(clips)  # (2, K)
        chances = model(vision.preprocessing.pixels(frames)[None])[0].softmax(-1)  # (K,)
    merge_adapters(model)
    native_model(model, metadata).save_pretrained(folder)
    values = preprocessor_fields(vision.preprocessing) | {"frame_stride": config.frame_stride}
    write_json(values, folder / "preprocessor_config.json")
    shutil.copyfile(ROOT / "exported" / "predict.py", folder / "predict.py")
    reloaded = AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = float((reloaded(vision.preprocessing.normalise(clips)).logits - expected).abs().max())
    found = runpy.run_path(str(folder / "predict.py"))["predict"](video)
    video.unlink()
    difference = max(abs(a - b) for a, b in zip(found.values(), chances.tolist(), strict=True))
    describe_export(folder / "README.md", run, config, logits, difference)
    return logits, difference


def check_position_table(model: VideoModel) -> None:
    """Raises UserError if the published class cannot hold the run's position table."""
    vision = model.vision_encoder
    native = read_config(model.sources["vision"])
    own_size = (native.num_frames, native.image_size) == (vision.config.num_frames, vision.config.image_size)
    if not vision.has_cls and not own_size:
        raise UserError(
            "--export: VideoMAE's class computes its position table and cannot hold the interpolated one of this run; "
            f"train with --num_frames {native.num_frames} --image_size {native.image_size} to export"
        )


def native_model(model: VideoModel, metadata: dict[str, Any]) -> torch.nn.Module:
    """A classifier without adapters as transformers' own class. Its labels are the display names where these differ."""
    from transformers import AutoModelForVideoClassification

    vision = model.vision_encoder
    names = [metadata["display_names"][name] for name in metadata["class_names"]]
    if len(set(names)) < len(names):
        names = metadata["class_names"]
    settings = copy.deepcopy(vision.config)
    settings.id2label, settings.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    native = AutoModelForVideoClassification.from_config(settings)
    native.base_model.load_state_dict(vision.backbone.state_dict())
    if vision.fc_norm is not None:
        native.fc_norm.load_state_dict(vision.fc_norm.state_dict())
    native.classifier.load_state_dict(model.head.state_dict())
    return native


def draw_video(path: Path, num_frames: int) -> Path:
    """A video of noise that brightens, longer than the model needs, wider than high."""
    import av

    generator = np.random.default_rng(0)
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for brightness in np.linspace(64, 255, 3 * num_frames + 1):
            picture = generator.integers(0, brightness, (96, 160, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def describe_export(file: Path, run: str, config: Config, logits: float, probabilities: float) -> None:
    rule = "the middle ones of equally long parts"
    if config.frame_stride:
        rule = f"one in {config.frame_stride}, from the middle of the video"
    text = Template((ROOT / "exported" / "README.md").read_text(encoding="utf-8")).substitute(
        run=printable(run),
        frames=f"{config.num_frames} frames",
        rule=rule,
        count=config.num_frames,
        logits=f"{logits:.1e}",
        probabilities=f"{probabilities:.1e}",
    )
    file.write_text(text, encoding="utf-8")


def preprocessor_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """The fields of a preprocessor_config.json."""
    names = ("shortest_edge",) if preprocessing.resize and len(preprocessing.resize) == 1 else ("height", "width")
    size = preprocessing.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": preprocessing.resize is not None,
        "size": dict(zip(names, preprocessing.resize or (size, size), strict=True)),
        "resample": {mode: code for code, mode in INTERPOLATION.items()}[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": preprocessing.rescale_factor,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
