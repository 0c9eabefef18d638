"""Classifies videos: python predict.py VIDEO... Needs torch, transformers, av and numpy."""

import json
import sys
from pathlib import Path

import av
import numpy as np
import torch
from transformers import AutoModelForVideoClassification

RULES = json.loads(Path(__file__).resolve().with_name("preprocessor_config.json").read_text(encoding="utf-8"))
MODEL = AutoModelForVideoClassification.from_pretrained(Path(__file__).resolve().parent).eval()


def read(path: str | Path) -> torch.Tensor:
    """The frames for the model, upright: uint8 [T, 3, H, W]. Raises ValueError or av.FFmpegError."""
    url, count, stride, pictures = f"file:{path}", RULES["num_frames"], RULES["frame_stride"], {}  # never http:
    with av.open(url) as packets, av.open(url) as frames:
        if (stream := packets.streams.best("video")) is None:
            raise ValueError("this file has no video")
        length, start = count_frames([packet for packet in packets.demux(stream) if packet.size])
        if stride < 0:  # -S: S, but 0 for a video that is too short for it
            stride = -stride if length > (count - 1) * -stride else 0
        indices = (np.arange(count) * length / count + 0.5 * length / count).astype(int)  # middles of equal parts
        if stride or length < count:  # every stride-th frame in the middle of the video; repeats the last if too short
            steps = np.arange(count) * (stride or 1)
            indices = np.minimum(max(0, length - steps[-1] - 1) // 2 + steps, length - 1)
        decoded = frames.decode(frames.streams.best("video"))
        for index, frame in enumerate(f for f in decoded if start is None or f.pts is None or f.pts >= start):
            if index in indices:
                pictures[index] = np.rot90(frame.to_rgb().to_ndarray(), frame.rotation // 90)
            if index == indices[-1]:
                return torch.from_numpy(np.stack([pictures[i] for i in indices])).permute(0, 3, 1, 2)
    raise ValueError(f"not all of its {length} frames can be decoded")


def count_frames(packets: list[av.Packet]) -> tuple[int, int | None]:
    """(the number of frames from the first keyframe on, without hidden ones; its timestamp if others precede it)."""
    first = next((number for number, packet in enumerate(packets) if packet.is_keyframe), 0)
    start = packets[first].pts if first else None
    shown = [packet for packet in packets[first:] if start is None or packet.pts is None or packet.pts >= start]
    return sum(not packet.is_discard for packet in shown), start


def predict(path: str | Path) -> dict[str, float]:
    """{label: probability}, the best of which may be too low to count: see answer. Raises ValueError or av.FFmpegError
    if the video cannot be read."""
    clip, side, size = read(path), RULES["crop_size"]["height"], RULES["size"]
    if RULES["do_resize"]:
        edge, shape = size.get("shortest_edge"), clip.shape[-2:]  # shortest_edge keeps the proportions
        shape = [edge * n // min(shape) for n in shape] if edge else (size["height"], size["width"])
        mode = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}[RULES["resample"]]
        clip = torch.nn.functional.interpolate(clip, shape, mode=mode, antialias=mode != "nearest-exact")
    high, wide = (side - n for n in clip.shape[-2:])  # pad() crops where these are negative, else adds black
    clip = torch.nn.functional.pad(clip, (int(wide / 2), wide - int(wide / 2), int(high / 2), high - int(high / 2)))
    mean, std = (torch.tensor(RULES[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.inference_mode():
        logits = MODEL(((clip * RULES["rescale_factor"] - mean) / std)[None]).logits.flatten()
    scores = logits.sigmoid() if "thresholds" in RULES else logits.softmax(-1)
    if "reject" in RULES:  # in double precision, as where the threshold was chosen
        scores = (logits.double() / RULES["reject"]["temperature"]).softmax(-1)
    return {MODEL.config.id2label[k]: probability for k, probability in enumerate(scores.tolist())}


def answer(path: str | Path) -> dict[str, float]:
    """Those of predict() that count: the best one or, with several labels, all that reach their thresholds; {} if the
    video is none of these."""
    best = sorted(predict(path).items(), key=lambda item: -item[1])
    if "thresholds" in RULES:
        limits = dict(zip(MODEL.config.id2label.values(), RULES["thresholds"], strict=True))
        return {label: p for label, p in best if p >= limits[label]}
    return {label: p for label, p in best[:1] if p >= RULES.get("reject", {}).get("threshold", 0)}


if __name__ == "__main__":
    failed: int | str = 0 if sys.argv[1:] else str(__doc__)  # without a video, exit with the usage
    for path in sys.argv[1:]:
        try:
            answers = " ".join(f"{label!r} {probability:.4f}" for label, probability in answer(path).items())
            print(repr(path), answers or "none of these")
        except (av.FFmpegError, OSError, ValueError) as error:
            failed = 1
            cause = getattr(error, "strerror", None) or error  # without FFmpeg's number and its own name of the file
            print(f"error: cannot read {path!r}: {cause}", file=sys.stderr)
    sys.exit(failed)
