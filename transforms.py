"""Temporal sampling (which frames of a video) and spatial preprocessing (resize, crop, normalise).

    sample_indices(available, num_frames, stride)     the frames of a clip
    Preprocessing.pixels(clip), .normalise(video)     a clip as a backbone expects it

Shapes: B batch, T frames, C channels, H W pixels. Clips stay RGB uint8 [T, C, H, W] until they are on the device, where
they become normalised floats.
"""

import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

LARGEST = 8192  # longest side in a preprocessor_config.json, in pixels
LARGEST_PICTURE = 256 * 10**6  # pixels of a frame, before and after resizing
# keys: PIL's codes, used by preprocessor_config.json. 1 is Lanczos, which torch lacks and VideoPrism was trained with
INTERPOLATION = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}


def sample_indices(
    available: int, num_frames: int, stride: int = 0, rng: np.random.Generator | None = None, position: float = 0.5
) -> np.ndarray:
    """Ascending indices of `num_frames` out of `available` frames. [num_frames]

    Stride 0 divides the whole video into `num_frames` segments (TSN, arXiv:1608.00859) and takes the centre of each, or
    with `rng` a random frame of each. Stride S takes every S-th frame of the window in the middle, or with `rng` of a
    random window. A video that is too short repeats its last frame. Stride -S is S for videos that have such a window,
    and 0 for shorter ones. `position` moves the centre: 0 is the first frame of each segment or the first window, 1 the
    last.

    Raises ValueError unless both counts are at least 1.
    """
    # an empty video has no frame to repeat
    if available < 1 or num_frames < 1:
        raise ValueError(f"cannot take {num_frames} of {available} frames")

    stride = window_stride(available, num_frames, stride)

    # segments over the whole video, as long as each has a frame of its own
    if stride == 0 and available >= num_frames:
        edges = np.arange(num_frames + 1) * available / num_frames
        if rng is None:
            return np.minimum(edges[:-1] + position * available / num_frames, available - 1).astype(int)
        low, high = edges[:-1].astype(int), np.ceil(edges[1:]).astype(int)
        # neighbouring segments may share a frame, so two draws can be out of order
        return np.maximum.accumulate(rng.integers(low, high))

    # one window; with stride 0 the video is too short for segments, so take all frames and repeat the last one
    step = stride or 1
    slack = max(0, available - (num_frames - 1) * step - 1)
    start = int(position * slack) if rng is None else int(rng.integers(slack + 1))
    return np.minimum(start + np.arange(num_frames) * step, available - 1)


def window_stride(available: int, num_frames: int, stride: int) -> int:
    """The stride of the window that sample_indices() takes, 0 if it divides the whole video into segments."""
    if stride >= 0:
        return stride
    return -stride if available > (num_frames - 1) * -stride else 0


def view_indices(available: int, num_frames: int, stride: int, clips: int) -> np.ndarray:
    """Indices of several clips spread over one video, clip after clip. [clips * num_frames]

    With clips = 1 these are the frames of ordinary evaluation.
    """
    positions = (np.arange(clips) + 0.5) / clips
    return np.concatenate([sample_indices(available, num_frames, stride, position=p) for p in positions])


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a backbone's preprocessor_config.json prescribes, scaled to the model's `image_size`."""

    image_size: int
    resize: tuple[int, ...] | None  # (shortest edge,) or (height, width); None: no resizing
    interpolation: str
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any], image_size: int) -> "Preprocessing":
        """Reads the fields of a preprocessor_config.json, in current and older spellings.

        All sizes are scaled so that the crop becomes image_size. Lanczos interpolation becomes bicubic, as in
        transformers without a recent torchvision. Raises ValueError for an invalid field, and for an interpolation
        other than these, nearest and bilinear.
        """
        # keep the file's ratio of resize to crop: many backbones resize to 256 and crop 224
        resize = _sizes("size", values.get("size", 224)) if values.get("do_resize", True) else None
        cropped = values.get("do_center_crop") and "crop_size" in values
        crop = _sizes("crop_size", values["crop_size"]) if cropped else resize
        if resize is not None:
            scale = image_size / min(crop)
            resize = _sizes("size / crop_size", [round(s * scale) for s in resize])

        # a backbone gives its best results with the interpolation that it was trained with
        code = values.get("resample", 2)
        if not isinstance(code, int) or code not in INTERPOLATION:
            raise ValueError(f"resample {reprlib.repr(code)} is not supported; 0, 1, 2 and 3 are")

        # normalise() computes (pixels * rescale_factor - mean) / std, so std must not be 0
        rescale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
        if not _is_number(rescale) or rescale <= 0:
            raise ValueError(f"rescale_factor must be a number above 0, not {reprlib.repr(rescale)}")
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if values.get("do_normalize", True):
            mean, std = _channels(values, "image_mean"), _channels(values, "image_std")
        if values.get("offset"):  # ViViT subtracts 1 before the mean
            if not values.get("do_rescale", True):
                raise ValueError("offset needs do_rescale")
            mean = tuple(m + 1.0 for m in mean)
        if min(std) <= 0:
            raise ValueError(f"image_std must be above 0, not {std}")
        return cls(image_size, resize, INTERPOLATION[code], float(rescale), mean, std)

    def pixels(self, clip: torch.Tensor, position: float | None = None) -> torch.Tensor:
        """Resizes and crops uint8 [T, C, H, W] to [T, C, image_size, image_size].

        The crop is centred. `position` (0 to 1) moves it along the longer side of the frame; the frame then keeps its
        aspect ratio even if the backbone's preprocessing squeezes it.
        """
        resized = self._resized(clip, keep_aspect=position is not None)
        return crop_square(resized, self.image_size, 0.5 if position is None else position)

    def crops(self, clip: torch.Tensor, count: int) -> torch.Tensor:
        """Several crops along the longer side, [T, count, C, image_size, image_size]. A single one equals pixels()."""
        if count == 1:
            return self.pixels(clip)[:, None]
        resized = self._resized(clip, keep_aspect=True)
        positions = np.linspace(0, 1, count).tolist()
        return torch.stack([crop_square(resized, self.image_size, position) for position in positions], dim=1)

    def _resized(self, clip: torch.Tensor, keep_aspect: bool) -> torch.Tensor:
        """[T, C, H, W] before the crop; `keep_aspect` overrides a size of (height, width)."""
        if self.resize is None:
            return clip
        height, width = clip.shape[-2:]
        target = (min(self.resize),) if keep_aspect else self.resize
        if len(target) == 1:  # of the shorter side; the longer one follows
            short = min(height, width)
            target = (target[0] * height // short, target[0] * width // short)
        return resize_frames(clip, target, self.interpolation)

    def normalise(self, video: torch.Tensor) -> torch.Tensor:
        """Turns uint8 (B, T, C, H, W) into normalised float32 of the same shape, on the same device."""
        mean, std = (torch.tensor(v, device=video.device).view(-1, 1, 1) for v in (self.mean, self.std))
        # work in place on one new tensor: allocating three would take longer than the arithmetic
        pixels = video.to(torch.float32, copy=True)  # (B, T, C, H, W)
        return pixels.mul_(self.rescale_factor).sub_(mean).div_(std)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """Reads a size in any spelling: 224, [224, 224], {"shortest_edge": 224}, {"height": 224, "width": 224}."""
    if isinstance(value, dict):
        keys = ("shortest_edge",) if "shortest_edge" in value else ("height", "width")
        value = [value.get(k) for k in keys]
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(sizes) not in (1, 2) or not all(_is_number(s) and 1 <= s <= LARGEST for s in sizes):
        raise ValueError(f"{name} must be one or two numbers from 1 to {LARGEST}, not {reprlib.repr(value)}")
    return tuple(int(s) for s in sizes)


def _channels(values: dict[str, Any], name: str) -> tuple[float, ...]:
    """Reads three numbers, one per colour channel."""
    channels = values.get(name)
    if not isinstance(channels, list | tuple) or len(channels) != 3 or not all(map(_is_number, channels)):
        raise ValueError(f"{name} must be three numbers, not {reprlib.repr(channels)}")
    return tuple(channels)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6  # False for NaN


def resize_frames(clip: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Resizes uint8 [T, C, H, W] to (height, width) with antialiasing. The result equals PIL's within one grey level.

    Raises ValueError if the result would be too large, as for a frame of 100000x1 pixels that keeps its aspect ratio.
    """
    if tuple(clip.shape[-2:]) == tuple(size):
        return clip
    if size[0] * size[1] > LARGEST_PICTURE:
        (h, w), (height, width) = clip.shape[-2:], size
        raise ValueError(f"{w}x{h} pixels would become {width}x{height} before the crop, which is too large")
    if mode == "nearest-exact":
        return F.interpolate(clip, size=size, mode=mode)
    clip = clip.contiguous(memory_format=torch.channels_last)  # 3 times as fast for uint8
    return F.interpolate(clip, size=size, mode=mode, antialias=True).contiguous()


def crop_square(clip: torch.Tensor, size: int, position: float = 0.5) -> torch.Tensor:
    """Crops [T, C, H, W] to size x size, at `position` (0 to 1) along the longer side and centred across the other."""
    # pad smaller frames with black first, because a crop must not reach beyond the frame
    height, width = clip.shape[-2:]
    if height < size or width < size:
        pad_h, pad_w = max(0, size - height), max(0, size - width)
        clip = F.pad(clip, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        height, width = clip.shape[-2:]

    # the margin before the crop, from 0 to all of what is cut off
    along_height, along_width = (position, 0.5) if height > width else (0.5, position)
    top, left = int((height - size) * along_height), int((width - size) * along_width)
    return clip[..., top : top + size, left : left + size]
