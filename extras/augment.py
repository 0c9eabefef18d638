"""Data augmentation of training clips, on the device. All frames of a clip get the same random change.

    light    mild cropping, erasing
    strong   more cropping, RandAugment without rotation or flip (arXiv:1909.13719), colour jitter, erasing, then
             mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899), which mix the labels in the same ratio as the pixels
    flip     mirrors half of the clips

Shapes: B clips, T frames, C channels, H W pixels. Clips are uint8 (B, T, C, H, W) before and after. All random numbers
come from torch's global CPU generator, because its state is saved for --resume.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from script import UserError

ERASED_CLIPS = 0.25  # fraction of clips with an erased rectangle
OPERATIONS = 2  # RandAugment operations per clip


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    """Uniform random numbers on the CPU. (count,)"""
    return low + (high - low) * torch.rand(count)


class Augment:
    """Augments batches according to --augment (`level`) and --flip.

    Raises UserError for level strong if kornia is not installed.
    """

    def __init__(self, level: str, flip: bool):
        self.level, self.flip = level, flip
        if level == "strong":
            try:
                import kornia  # noqa: F401
            except ImportError:
                raise UserError("--augment strong needs kornia: pip install -r requirements-extra.txt") from None

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with an augmented `video`. If clips are mixed, it also gets `mixed_labels` and `mix`; see mix()."""
        if self.level == "none" and not self.flip:
            return batch
        video = batch["video"]  # (B, T, C, H, W) uint8
        if self.flip:
            video = flip(video)
        if self.level == "light":
            video = erase(crop(video, least_area=0.8, aspect=1.1))
        if self.level == "strong":
            video = crop(video, least_area=0.5, aspect=4 / 3)
            video = erase(jitter(rand_augment(video)))
        batch = batch | {"video": video}
        # clips with texts are not mixed: each text is about one of them
        return mix(batch) if self.level == "strong" and "labels" in batch and "input_ids" not in batch else batch


def flip(video: torch.Tensor) -> torch.Tensor:
    """Mirrors half of the clips."""
    chosen = (torch.rand(len(video)) < 0.5).to(video.device)
    return torch.where(chosen[:, None, None, None, None], video.flip(-1), video)


def crop(video: torch.Tensor, least_area: float, aspect: float) -> torch.Tensor:
    """Crops a random rectangle and stretches it to the full frame.

    The rectangle has at least the fraction `least_area` of the frame's area, and between 1 / `aspect` and `aspect`
    times its aspect ratio.
    """
    # width, height and centre of the rectangle; the frame spans [-1, 1]
    count = len(video)
    side = uniform(count, least_area, 1).sqrt()
    stretch = (uniform(count, -1, 1) * math.log(aspect) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    left, top = (1 - width) * uniform(count, -1, 1), (1 - height) * uniform(count, -1, 1)

    # the affine map from output to input pixels, sampled once for all frames of a clip
    zero = torch.zeros(count)
    theta = torch.stack([torch.stack([width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)  # (B, 2, 3)
    flat = video.flatten(1, 2).float()  # (B, T C, H, W)
    grid = F.affine_grid(theta.to(video.device), list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return to_uint8(moved).view_as(video)


def erase(video: torch.Tensor) -> torch.Tensor:
    """Paints a rectangle of 2 to 25 % of the frame in a random colour, in a quarter of the clips."""
    height, width = video.shape[-2:]
    video = video.clone()  # the caller may still use its own
    for clip in video:
        if torch.rand(()) >= ERASED_CLIPS:
            continue
        rows, columns = rectangle(float(uniform(1, 0.02, 0.25)), float(uniform(1, -1, 1).exp()), height, width)
        clip[..., rows, columns] = torch.randint(0, 256, (3, 1, 1), dtype=torch.uint8).to(video.device)
    return video


def rectangle(area: float, aspect: float, height: int, width: int) -> tuple[slice, slice]:
    """(rows, columns) of a random rectangle with this fraction of the frame's area, cut to the frame if necessary."""
    rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
    columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
    top, left = int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ()))
    return slice(top, top + rows), slice(left, left + columns)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Rounds pixels from 0 to 255 to uint8."""
    return video.round().clamp(0, 255).to(torch.uint8)


def operations() -> list[Callable[[torch.Tensor, float], torch.Tensor]]:
    """The operations of RandAugment. Each takes the frames of one clip, (T, C, H, W) in [0, 1], and a strength from -1
    to 1, and returns frames of the same shape."""
    # kornia takes seconds to import and is optional
    from kornia import enhance
    from kornia.geometry import transform

    # shearing and shifting take one value per frame, here the same for all frames of the clip
    def sheared(frames: torch.Tensor, x: float, y: float) -> torch.Tensor:
        return transform.shear(frames, frames.new_tensor([[x, y]]).expand(len(frames), 2), padding_mode="border")

    def moved(frames: torch.Tensor, x: float, y: float) -> torch.Tensor:
        size = frames.new_tensor([[x * frames.shape[-1], y * frames.shape[-2]]])
        return transform.translate(frames, size.expand(len(frames), 2), padding_mode="border")

    # RandAugment without rotation; a negative strength darkens, or shears and shifts the other way
    return [
        lambda frames, s: enhance.adjust_brightness_accumulative(frames, 1 + 0.6 * s),
        lambda frames, s: enhance.adjust_contrast_with_mean_subtraction(frames, 1 + 0.6 * s),
        lambda frames, s: enhance.adjust_saturation(frames, 1 + 0.8 * s),
        lambda frames, s: enhance.sharpness(frames, 1 + 0.9 * s),
        lambda frames, s: enhance.posterize(frames, 8 - round(4 * abs(s))),
        lambda frames, s: enhance.solarize(frames, 1 - 0.5 * abs(s)),
        lambda frames, _: enhance.equalize(frames),
        lambda frames, s: sheared(frames, 0.3 * s, 0),
        lambda frames, s: sheared(frames, 0, 0.3 * s),
        lambda frames, s: moved(frames, 0.2 * s, 0),
        lambda frames, s: moved(frames, 0, 0.2 * s),
    ]


def rand_augment(video: torch.Tensor) -> torch.Tensor:
    """Applies two random operations of random strength to every clip."""
    # clip by clip, because each clip gets other operations
    choices = operations()
    clips = []
    for clip in video:
        frames = clip.float() / 255  # (T, C, H, W)
        for number in torch.randint(len(choices), (OPERATIONS,)).tolist():
            frames = choices[number](frames, float(uniform(1, -1, 1))).clamp(0, 1)
        clips.append(to_uint8(255 * frames))
    return torch.stack(clips)


def jitter(video: torch.Tensor) -> torch.Tensor:
    """Changes brightness, contrast and saturation by up to 40 %, and hue by up to a tenth of the colour circle."""
    from kornia import enhance

    count, times = video.shape[:2]
    frames = video.flatten(0, 1).float() / 255  # (B T, C, H, W)

    def per_frame(low: float, high: float) -> torch.Tensor:  # one random factor per clip, repeated for its frames
        return uniform(count, low, high).repeat_interleave(times).to(video.device)

    frames = enhance.adjust_brightness_accumulative(frames, per_frame(0.6, 1.4))
    frames = enhance.adjust_contrast_with_mean_subtraction(frames, per_frame(0.6, 1.4))
    frames = enhance.adjust_saturation(frames, per_frame(0.6, 1.4))
    frames = enhance.adjust_hue(frames.clamp(0, 1), per_frame(-0.2 * math.pi, 0.2 * math.pi))
    return to_uint8(255 * frames).view_as(video)


def mix(batch: dict[str, Any]) -> dict[str, Any]:
    """Mixes every clip with another one of the batch, all by mixup or all by cutmix.

    `labels` becomes the label of the larger part, `mixed_labels` that of the smaller one, and `mix` (B,) the weight of
    the larger part, so that the loss is mix * loss(labels) + (1 - mix) * loss(mixed_labels).
    """
    # a clip may be its own partner; it then stays as it is
    video, labels = batch["video"], batch["labels"]
    count = len(video)
    partners = torch.randperm(count)

    # mixup blends all pixels; cutmix replaces a rectangle by that of the partner
    if torch.rand(()) < 0.5:
        weight = torch.distributions.Beta(0.8, 0.8).sample((count,))  # (B,)
        factor = weight.to(video.device)[:, None, None, None, None]
        mixed = to_uint8(factor * video.float() + (1 - factor) * video[partners].float())
    else:
        mixed, weight = video.clone(), torch.ones(count)
        for index, partner in enumerate(partners.tolist()):
            rows, columns = rectangle(float(torch.rand(())), 1.0, *video.shape[-2:])
            mixed[index, ..., rows, columns] = video[partner, ..., rows, columns]
            covered = (rows.stop - rows.start) * (columns.stop - columns.start)
            weight[index] = 1 - covered / math.prod(video.shape[-2:])

    # `labels` must name the larger part, because training accuracy is measured against it
    own = (weight >= 0.5).to(labels.device).view(-1, *[1] * (labels.ndim - 1))  # (B,), or (B, 1) for several labels
    other = labels[partners.to(labels.device)]
    return batch | {
        "video": mixed,
        "labels": torch.where(own, labels, other),
        "mixed_labels": torch.where(own, other, labels),
        "mix": torch.maximum(weight, 1 - weight).to(labels.device),
    }
