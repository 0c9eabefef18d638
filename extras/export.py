"""Exports a run for other programs: a classifier as a Hugging Face model with predict.py, adapters as peft folders."""

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
from extras.reject import Rule
from readers import open_video
from script import (
    UserError,
    cause_of,
    counted,
    give_default_mode,
    make_folder,
    printable,
    remove_leftovers,
    temporary,
    write_json,
)
from transforms import INTERPOLATION, Preprocessing, sample_indices
from vision import VisionEncoder, own_frames, own_size, read_vision_config


def export(
    run_dir: Path, model: VideoModel, config: Config, metadata: dict[str, Any], output: Path
) -> tuple[float, float] | None:
    """Exports a run: its adapters as peft folders, and a classifier, with adapters merged, as a Hugging Face folder.

        output/adapter_{vision,language}/   for PeftModel.from_pretrained(AutoModel.from_pretrained(<backbone>), folder)
        output/                             for AutoModelForVideoClassification.from_pretrained(output); with README.md
                                            and predict.py

    The model is changed: its adapters are merged. Returns what export_classifier returns, or None without a classifier.

    Raises UserError if the output exists or cannot be written, or the run has nothing to export.
    """
    # an existing folder is never mixed with an export
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--export {output}: this folder already exists; choose another")
    lora = [name for name in model.sources if list(adapters(model.backbones()[name]))]
    if config.use_vlm and not lora:
        raise UserError(
            f"--export: {run_dir} joins two models, for which Hugging Face has no class, and has no adapters; only "
            "video classifiers and adapters can be exported"
        )
    if not config.use_vlm and config.head == "attentive":
        raise UserError(
            f"--export: {run_dir} has an attentive head, for which Hugging Face has no class; train with --head linear "
            "to export the classifier"
        )
    if not config.use_vlm and (reason := why_no_class(model.vision_encoder)):
        raise UserError(f"--export: {run_dir} has a linear head on {reason}")

    # adapters first, because exporting the classifier merges them
    with whole_folder(output) as folder:
        for name in lora:
            save_adapters(model, name, config, folder / f"adapter_{name}")
        return None if config.use_vlm else export_classifier(run_dir.name, model, config, metadata, folder)


def why_no_class(vision: VisionEncoder) -> str:
    """Why transformers has no class for a linear head on this encoder; "" if it has one."""
    name = vision.config.model_type
    if vision.family.is_image_encoder:
        return f"the mean over the frames of {name}, and Hugging Face's classes for {name} read one image"
    if vision.family.pooler is not None and vision.pooler is None:
        return (
            f"the mean over the tokens of {name}, and Hugging Face's class for {name} has an attentive pooler instead"
        )
    return ""


@contextmanager
def whole_folder(output: Path) -> Generator[Path]:
    """Yields a temporary folder next to `output`. At the end it is renamed to `output`, or removed after an error: an
    export is complete or does not exist.

    Raises UserError if it cannot be written.
    """
    # os.replace cannot put a folder in place of a link, so follow it
    output = Path(os.path.realpath(output))
    make_folder(output.parent)
    remove_leftovers(output.parent)
    folder = temporary(output)
    try:
        folder.mkdir()
        yield folder
        for file in folder.rglob("*.safetensors"):
            give_default_mode(file)
        os.replace(folder, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--export: cannot write {output}: {cause_of(error)}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_adapters(model: VideoModel, name: str, config: Config, folder: Path) -> None:
    """Writes the adapters of one backbone as a peft folder."""
    from peft import get_peft_model_state_dict

    body = body_of(model.backbones()[name])
    peft_config = lora_config(body, config.lora_r)
    peft_config.base_model_name_or_path = model.sources[name].path
    peft_config.save_pretrained(folder)

    # we inject adapters without peft's wrapper, so its prefix is missing in the names
    tensors = get_peft_model_state_dict(body)
    tensors = {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def export_classifier(
    run: str, model: VideoModel, config: Config, metadata: dict[str, Any], folder: Path
) -> tuple[float, float]:
    """Writes a classifier as transformers' own class, with adapters merged and class names, and predict.py with it.

    Then loads the result and returns the largest differences from the run: of the logits of random clips, and of the
    probabilities that predict.py computes for a video.
    """
    from transformers import AutoModelForVideoClassification

    # two random clips, and a video to be read from a file
    vision = model.vision_encoder
    check_position_table(model)
    side = vision.preprocessing.image_size
    size = (2, vision.num_frames, 3, side, side)
    clips = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = draw_video(folder / "video.mp4", vision.num_frames)
    reader = open_video(video)
    frames = reader.frames(sample_indices(len(reader), config.num_frames, config.frame_stride))

    # what the run answers, before its adapters are merged
    rule = Rule(**metadata["reject"]) if "reject" in metadata else Rule(0)
    with torch.no_grad():
        expected = model.eval()(clips)  # (2, K)
        logits = model(vision.preprocessing.pixels(frames)[None])  # (1, K)
    scores = logits.sigmoid().numpy() if model.multi_label else rule.probabilities(logits.numpy())  # (1, K)

    # predict.py reads the choice of frames from preprocessor_config.json, too, and the thresholds of several labels
    merge_adapters(model)
    native_model(model, metadata).save_pretrained(folder)
    choice = {"num_frames": config.num_frames, "frame_stride": config.frame_stride}
    choice |= {"reject": metadata["reject"]} if "reject" in metadata else {}
    if model.multi_label:
        thresholds = model.thresholds or dict.fromkeys(metadata["class_names"], 0.5)
        choice["thresholds"] = [thresholds[name] for name in metadata["class_names"]]
    write_json(preprocessor_fields(vision.preprocessing) | choice, folder / "preprocessor_config.json")
    shutil.copyfile(ROOT / "exported" / "predict.py", folder / "predict.py")

    # what the export answers, as its users will run it
    reloaded = AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = reloaded(vision.preprocessing.normalise(clips)).logits.flatten(1)  # VideoPrism's are (B, 1, K)
    logit_difference = float((logits - expected).abs().max())
    predicted = runpy.run_path(str(folder / "predict.py"))["predict"](video)
    difference = max(abs(a - b) for a, b in zip(predicted.values(), scores[0].tolist(), strict=True))
    video.unlink()
    write_readme(folder, run, config, metadata, logit_difference, difference)
    return logit_difference, difference


def check_position_table(model: VideoModel) -> None:
    """Raises UserError if transformers' class cannot hold the run's position embeddings."""
    vision = model.vision_encoder
    native = read_vision_config(model.sources["vision"])
    frames, size = own_frames(native), own_size(native)
    if (frames, size) == (own_frames(vision.config), own_size(vision.config)):
        return

    # tables that are parameters can have any length, but VideoMAE computes its table from the configuration; and
    # VideoPrism interpolates its own only when forward is told to
    table = getattr(getattr(vision.backbone, "embeddings", None), "position_embeddings", None)
    computed = table is not None and not isinstance(table, torch.nn.Parameter)
    if computed or "interpolate_pos_encoding" in vision.family.arguments:
        raise UserError(
            f"--export: transformers' {vision.config.model_type} cannot load the interpolated position embeddings of "
            f"this run; to export, train with --num_frames {frames} --image_size {size}"
        )


def native_model(model: VideoModel, metadata: dict[str, Any]) -> torch.nn.Module:
    """A classifier whose adapters are merged, as transformers' own class. Its labels are the display names; if two
    classes share one, the class names."""
    from transformers import AutoModelForVideoClassification

    vision = model.vision_encoder
    # label2id cannot hold the same name twice
    names = [metadata["display_names"][name] for name in metadata["class_names"]]
    if len(set(names)) < len(names):
        names = metadata["class_names"]
    hf_config = copy.deepcopy(vision.config)
    hf_config.id2label, hf_config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    if model.multi_label:
        hf_config.problem_type = "multi_label_classification"

    # parts that a classifier never reaches, such as V-JEPA 2's predictor, become zeros
    native = AutoModelForVideoClassification.from_config(hf_config)
    zeros = {
        name: torch.zeros_like(tensor)
        for name, tensor in native.base_model.state_dict().items()
        if name.startswith(vision.family.unused)
    }

    # backbone, the norm that follows mean pooling (VideoMAE only) or the attentive pooler, head
    native.base_model.load_state_dict(zeros | vision.backbone.state_dict())
    if vision.fc_norm is not None:
        native.fc_norm.load_state_dict(vision.fc_norm.state_dict())
    if vision.pooler is not None:
        vision.family.pooler(native).load_state_dict(vision.pooler.state_dict())
    native.classifier.load_state_dict(model.head.state_dict())
    return native


def draw_video(path: Path, num_frames: int) -> Path:
    """Writes a video of noise that gets brighter, wider than it is high and longer than the model needs, so that
    another choice of frames or another crop changes the answer."""
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


def write_readme(
    folder: Path, run: str, config: Config, metadata: dict[str, Any], logits: float, probabilities: float
) -> None:
    """Writes the export's README: its files, how it chooses frames, which videos it rejects, how much its logits and
    probabilities differ, and the licence of its backbone."""
    adapter_row, reject, backbone = "", "", metadata["backbones"]["vision"]
    if rule := metadata.get("reject"):
        reject = (
            f"\nThe best probability must be at least {rule['threshold']:.4g}; otherwise the video is none of these "
            "classes, and `answer` returns {}. The probabilities are calibrated: the logits are divided by "
            f"{rule['temperature']:.4g} first.\n"
        )
    if (folder / "adapter_vision").is_dir():
        adapter_row = "| `adapter_vision/` | the adapters alone, for `PeftModel.from_pretrained` |\n"
    choice = parts = "the middle frames of equally long parts"
    if config.frame_stride:
        choice = f"one frame in {abs(config.frame_stride)}, from the middle of the video"
    if config.frame_stride < 0:
        choice += f", or {parts} if the video is too short for that"
    text = Template((ROOT / "exported" / "README.md").read_text(encoding="utf-8")).substitute(
        run=printable(run),
        adapters=adapter_row,
        reject=reject,
        frames=counted(config.num_frames, "frame"),
        rule=choice,
        count=config.num_frames,
        logits=f"{logits:.1e}",
        probabilities=f"{probabilities:.1e}",
        backbone=printable(backbone["source"]),
        licence=backbone.get("licence", "unknown: read its card"),  # earlier versions did not record it
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def preprocessor_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """The fields of preprocessor_config.json: the inverse of Preprocessing.from_dict."""
    # transformers keeps the proportions with shortest_edge, and stretches to height and width
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
