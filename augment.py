"""Random changes of training clips, on the device. One draw per clip: all of its frames change alike.

    light    mild crop, erasing
    strong   wider crop, RandAugment without rotation or flip (arXiv:1909.13719), colour jitter, erasing, then
             mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899), which mix labels as they mix pixels
    flip     mirrors half of the clips

Shapes: B clips, T frames, C channels, H W pixels; clips are uint8 (B, T, C, H, W) before and after. All draws
come from torch's global CPU generator, whose state a stopped run saves.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from script import UserError

ERASED_CLIPS = 0.25  # share of clips with an erased rectangle
OPERATIONS = 2  # of RandAugment, per clip


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(count)


class Augment:
    """Changes a batch as --augment and --flip ask for.

    Raises UserError if strong is asked for and kornia is not installed.
    """

    def __init__(self, level: str, flip: bool):
        self.level, self.flip = level, flip
        if level == "strong":
            try:
                import kornia  # noqa: F401
            except ImportError:
                raise UserError("--augment strong needs kornia: pip install -r requirements-extra.txt") from None

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with other `pixel_values`; mixed clips add `mixed_labels` and `mix`, the share of `labels`."""
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
        return mix(batch) if self.level == "strong" and "labels" in batch and "input_ids" not in batch else batch


def flip(video: torch.Tensor) -> torch.Tensor:
    chosen = (torch.rand(len(video)) < 0.5).to(video.device)
    return torch.where(chosen[:, None, None, None, None], video.flip(-1), video)


def crop(video: torch.Tensor, least_area: float, aspect: float) -> torch.Tensor:
    """A random rectangle of at least this share of the picture, stretched to its full size.

    Its aspect ratio lies between 1 / `aspect` and `aspect` times the picture's.
    """
    count = len(video)
    side = uniform(count, least_area, 1).sqrt()
    stretch = (uniform(count, -1, 1) * math.log(aspect) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    left, top = (1 - width) * uniform(count, -1, 1), (1 - height) * uniform(count, -1, 1)
    zero = torch.zeros(count)
    theta = torch.stack([torch.stack([width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)  # (B, 2, 3)
    flat = video.flatten(1, 2).float()  # (B, T C, H, W): one grid for all frames
    grid = F.affine_grid(theta.to(video.device), list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return to_uint8(moved).view_as(video)


def erase(video: torch.Tensor) -> torch.Tensor:
    """Paints a rectangle of 2 to 25 % of the picture in one random colour, in a quarter of the clips."""
    height, width = video.shape[-2:]
    video = video.clone()
    for clip in video:
        if torch.rand(()) >= ERASED_CLIPS:
            continue
        inside = rectangle(float(uniform(1, 0.02, 0.25)), float(uniform(1, -1, 1).exp()), height, width)
        clip[..., inside[0], inside[1]] = torch.randint(0, 256, (3, 1, 1), dtype=torch.uint8).to(video.device)
    return video


def rectangle(area: float, aspect: float, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a random rectangle with this share of the picture, as far as it fits."""
    rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
    columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
    top, left = int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ()))
    return slice(top, top + rows), slice(left, left + columns)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    return video.round().clamp(0, 255).to(torch.uint8)


def operations() -> list[Callable[[torch.Tensor, float], torch.Tensor]]:
    """RandAugment's, on one clip's frames (T, C, H, W) in [0, 1]; a strength from -1 to 1."""
    from kornia import enhance
    from kornia.geometry import transform

    def sheared(frames: torch.Tensor, x: float, y: float) -> torch.Tensor:
        return transform.shear(frames, frames.new_tensor([[x, y]]).expand(len(frames), 2), padding_mode="border")

    def moved(frames: torch.Tensor, x: float, y: float) -> torch.Tensor:
        size = frames.new_tensor([[x * frames.shape[-1], y * frames.shape[-2]]])
        return transform.translate(frames, size.expand(len(frames), 2), padding_mode="border")

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
    """Two random operations of random strength on every clip."""
    choices = operations()
    clips = []
    for clip in video:
        frames = clip.float() / 255
        for number in torch.randint(len(choices), (OPERATIONS,)).tolist():
            frames = choices[number](frames, float(uniform(1, -1, 1))).clamp(0, 1)
        clips.append(to_uint8(255 * frames))
    return torch.stack(clips)


def jitter(video: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation by up to 40 %, hue by up to a tenth of the circle."""
    from kornia import enhance

    count, times = video.shape[:2]
    frames = video.flatten(0, 1).float() / 255  # (B T, C, H, W)

    def drawn(low: float, high: float) -> torch.Tensor:
        return uniform(count, low, high).repeat_interleave(times).to(video.device)

    frames = enhance.adjust_brightness_accumulative(frames, drawn(0.6, 1.4))
    frames = enhance.adjust_contrast_with_mean_subtraction(frames, drawn(0.6, 1.4))
    frames = enhance.adjust_saturation(frames, drawn(0.6, 1.4))
    frames = enhance.adjust_hue(frames.clamp(0, 1), drawn(-0.2 * math.pi, 0.2 * math.pi))
    return to_uint8(255 * frames).view_as(video)


def mix(batch: dict[str, Any]) -> dict[str, Any]:
    """Mixes every clip with another one of the batch: all by mixup, or all by cutmix.

    `labels` becomes the larger part's, `mixed_labels` the other's, `mix` (B,) the share of the larger part.
    """
    video, labels = batch["video"], batch["labels"]
    count = len(video)
    partners = torch.randperm(count)
    if torch.rand(()) < 0.5:
        share = torch.distributions.Beta(0.8, 0.8).sample((count,))
        weight = share.to(video.device)[:, None, None, None, None]
        mixed = to_uint8(weight * video.float() + (1 - weight) * video[partners].float())
    else:
        mixed, share = video.clone(), torch.ones(count)
        for index, partner in enumerate(partners.tolist()):
            inside = rectangle(float(torch.rand(())), 1.0, *video.shape[-2:])
            mixed[index][..., inside[0], inside[1]] = video[partner][..., inside[0], inside[1]]
            covered = (inside[0].stop - inside[0].start) * (inside[1].stop - inside[1].start)
            share[index] = 1 - covered / math.prod(video.shape[-2:])
    own = (share >= 0.5).to(labels.device)
    other = labels[partners.to(labels.device)]
    return batch | {
        "video": mixed,
        "labels": torch.where(own, labels, other),
        "mixed_labels": torch.where(own, other, labels),
        "mix": torch.maximum(share, 1 - share).to(labels.device),
    }
