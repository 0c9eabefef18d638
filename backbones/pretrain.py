"""Pretrains the five tiny backbones in backbones/ on synthetic data, from a fixed seed. Can be stopped and resumed.

    python -m backbones.pretrain                       # all five; hours on one core, downloads nothing
    python -m backbones.pretrain --models gpt2 bert    # only these two

The vision backbones see 6 shapes, 12 colours, 9 motions of constant velocity, a wider range of sizes, gratings in the
background, and a second object in some of the clips. They never see an object turn, stop or reverse: that is what the
dummy dataset's classes are about. Two (shape, motion) pairs are withheld (`WITHHELD`), and the random streams are
disjoint from those of the dataset.

* timesformer: supervised. Weights start larger than usual, and time and position embeddings start as sine waves
  of amplitude 1. With the published initialisation a model this small never learns the order of frames.
  Targets: motion, shape, colour, radius and displacement per frame from the pooled token; coverage, displacement,
  colour and shape from every patch token.
* videomae: masked reconstruction alone, as published.
* vjepa2: only the prediction of hidden tokens in feature space, nearly as published (see draw_hidden_tokens).
* gpt2 and bert: next-token and masked-token prediction on the captions' grammar, with tokenizers trained on it.

These weights are for testing the pipeline. They do not understand real video or language.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import dummy_data
from vision import FAMILIES, to_grid

SEED = 20260
SAVE_EVERY = 500  # steps
IMAGE_SIZE, NUM_FRAMES = 64, 8
PATCH, TUBELET = 8, 2  # of videomae and vjepa2
WITHHELD = (("circle", "up"), ("square", "left"))
COLOURS = dummy_data.COLOURS | {
    "pink": (0.98, 0.60, 0.75),
    "brown": (0.50, 0.30, 0.12),
    "lime": (0.70, 0.98, 0.25),
    "black": (0.01, 0.01, 0.01),
}
# signed distance (dx, dy, r) -> pixels outside the outline, as in dummy_data: negative inside
SHAPES = dummy_data.SHAPES | {
    "triangle": lambda dx, dy, r: np.maximum(np.abs(dx) * 0.866 + dy * 0.5, -dy) - 0.62 * r,
    "diamond": lambda dx, dy, r: (np.abs(dx) + np.abs(dy)) * 0.707 - 0.886 * r,
    "ring": lambda dx, dy, r: np.abs(np.hypot(dx, dy) - 0.75 * r) - 0.27 * r,
    "cross": lambda dx, dy, r: np.minimum(
        np.maximum(np.abs(dx) - 1.1 * r, np.abs(dy) - 0.38 * r), np.maximum(np.abs(dy) - 1.1 * r, np.abs(dx) - 0.38 * r)
    ),
}
# directions of constant velocity
STRAIGHT = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "still": (0, 0)}
DIAGONALS = {"up right": (1, -1), "up left": (-1, -1), "down right": (1, 1), "down left": (-1, 1)}
MOTIONS = STRAIGHT | {name: (x / 2**0.5, y / 2**0.5) for name, (x, y) in DIAGONALS.items()}
SPEEDS = (1.5, 6.5)  # pixels per frame of the clip
RADII = (0.09, 0.22)  # as a fraction of the image side
STEPS = {"timesformer": 10_000, "videomae": 6_000, "vjepa2": 8_000}  # of 32 clips
PAIRS = [(s, m) for s in SHAPES for m in MOTIONS if (s, m) not in WITHHELD]


# -- synthetic clips --------------------------------------------------------------------------------


def draw_objects(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """One random object per clip.

    Returns `shape`, `motion`, `colour` (B,) as class indices, `masks` (B, T, H, W), `radius` (B,) as a fraction of
    the image side, and `displacement` (B, T, 2) to the next frame, in units of the highest speed.
    """
    # shape and motion are drawn as a pair, so that withheld pairs never occur
    pairs = np.array([(list(SHAPES).index(s), list(MOTIONS).index(m)) for s, m in PAIRS])
    shape, motion = pairs[rng.integers(len(pairs), size=count)].T
    colour = rng.integers(len(COLOURS), size=count)
    radius = rng.uniform(*RADII, count) * IMAGE_SIZE

    # directions vary by +-8 degrees: real motion is never exactly horizontal, vertical or diagonal
    direction = np.array(list(MOTIONS.values()))[motion]
    angle = rng.uniform(-0.14, 0.14, count)  # radians
    x, y = direction.T
    direction = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], 1)
    velocity = direction * rng.uniform(*SPEEDS, (count, 1))

    # in half of the clips the frames are unevenly spaced, because sampling in training jitters them too
    jitter = rng.uniform(-0.4, 0.4, (count, NUM_FRAMES)) * (rng.random((count, 1)) < 0.5)
    times = np.arange(NUM_FRAMES) + jitter  # (B, T)
    start = rng.uniform(0, IMAGE_SIZE, (count, 1, 2))
    positions = (start + velocity[:, None] * times[..., None]) % IMAGE_SIZE  # (B, T, 2), wraps around
    masks = np.empty((count, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE), np.float32)  # (B, T, H, W)
    for index, distance in enumerate(SHAPES.values()):
        rows = shape == index
        masks[rows] = dummy_data.draw_masks(distance, positions[rows], radius[rows], IMAGE_SIZE)

    # the last frame has no successor: it repeats the previous time step
    steps = np.diff(times, axis=1, append=times[:, -1:] * 2 - times[:, -2:-1])  # (B, T)
    return {
        "shape": shape,
        "motion": motion,
        "colour": colour,
        "masks": masks,
        "radius": radius / IMAGE_SIZE,
        "displacement": velocity[:, None] * steps[..., None] / SPEEDS[1],
    }


def draw_grounds(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colour gradients, a third of them with a sine grating, so that texture does not mean object: (B, 1, C, H, W)."""
    grounds = dummy_data.draw_backgrounds(rng, count, IMAGE_SIZE)
    axis = np.linspace(0, 2 * np.pi, IMAGE_SIZE, dtype=np.float32)
    waves = rng.uniform(-5, 5, (2, count, 1, 1, 1, 1)).astype(np.float32)
    grating = np.sin(waves[0] * axis[None, :] + waves[1] * axis[:, None])
    strength = rng.uniform(0, 0.12, (count, 1, 1, 1, 1)) * (rng.random((count, 1, 1, 1, 1)) < 0.33)
    return np.clip(grounds + strength.astype(np.float32) * grating, 0, 1)


def draw_world(rng: np.random.Generator, count: int, two_objects: float) -> dict[str, torch.Tensor]:
    """A batch of clips, `video` uint8 (B, T, C, H, W), with their labels: `single` (B,), true for clips with one
    object, and the fields of draw_objects as `first_*` and `second_*`."""
    # this share of the clips has a second object; the others get one with an empty mask
    first, second = draw_objects(rng, count), draw_objects(rng, count)
    has_second = rng.random(count) < two_objects
    second["masks"] *= has_second[:, None, None, None]

    # colours and noise vary a little: exact values must not identify a class
    frames = draw_grounds(rng, count).repeat(NUM_FRAMES, axis=1)  # (B, T, C, H, W)
    for item in (first, second):
        shades = np.array(list(COLOURS.values()))[item["colour"]] + rng.uniform(-0.04, 0.04, (count, 3))
        dummy_data.paint(frames, item["masks"], np.clip(shades, 0, 1))
    video = dummy_data.to_uint8(frames, rng, noise=rng.uniform(0, 12))

    # the second object is painted last, so it hides part of the first one
    first["masks"] *= 1 - second["masks"]
    batch = {"video": torch.from_numpy(video), "single": torch.from_numpy(~has_second)}
    for name, item in (("first", first), ("second", second)):
        batch |= {f"{name}_{k}": torch.as_tensor(v) for k, v in item.items()}
    return batch


class AttributeHeads(nn.Module):
    """Linear heads that predict the attributes from the pooled token (B, D) and the patch tokens (B, t, h, w, D)."""

    def __init__(self, width: int):
        super().__init__()
        kinds = len(SHAPES) + len(COLOURS)
        self.clip = nn.Linear(width, kinds + 1 + 2 * NUM_FRAMES)
        self.patch = nn.Linear(width, 1 + 2 + kinds)

    def clip_loss(self, pooled: torch.Tensor, motion_logits: torch.Tensor, batch: dict) -> torch.Tensor:
        """Loss of the pooled token (B, D), over clips with one object: with two, "the" shape is ambiguous."""
        single = batch["single"]
        sizes = [len(SHAPES), len(COLOURS), 1, 2 * NUM_FRAMES]
        shape, colour, radius, displacement = self.clip(pooled[single]).split(sizes, dim=-1)

        # the factors bring the regression losses, of values below 1, to the scale of the cross entropies
        return (
            F.cross_entropy(motion_logits[single], batch["first_motion"][single])
            + F.cross_entropy(shape, batch["first_shape"][single])
            + F.cross_entropy(colour, batch["first_colour"][single])
            + 10 * F.smooth_l1_loss(radius[:, 0], batch["first_radius"][single].float())
            + 5 * F.smooth_l1_loss(displacement, batch["first_displacement"][single].flatten(1).float())
        )

    def patch_loss(self, tokens: torch.Tensor, batch: dict) -> torch.Tensor:
        """Loss of the patch tokens (B, t, h, w, D): coverage of every patch, and the object in the busy ones.

        The projector reads the patch tokens, so they must say where things are and how they move.
        """
        # a patch belongs to the object that covers more of it; below a quarter it belongs to the background
        covers = [pool_masks(batch[f"{name}_masks"], tokens.shape[1:4]) for name in ("first", "second")]
        covers = torch.stack(covers)  # (2, B, t, h, w)
        owner = covers.argmax(0)  # (B, t, h, w), 0 or 1
        busy = covers.amax(0) > 0.25  # (B, t, h, w)

        # targets of the busy patches, looked up by (object, clip, time)
        sizes = [1, 2, len(SHAPES), len(COLOURS)]
        coverage, displacement, shape, colour = self.patch(tokens).split(sizes, dim=-1)
        steps = torch.stack([pool_steps(batch[f"{n}_displacement"], tokens.shape[1]) for n in ("first", "second")])
        which, clip, time = owner[busy], *busy.nonzero().T[:2]
        kinds = {k: torch.stack([batch[f"first_{k}"], batch[f"second_{k}"]]) for k in ("shape", "colour")}  # (2, B)
        return (
            F.binary_cross_entropy_with_logits(coverage[..., 0], covers.sum(0).clamp(0, 1))
            + 5 * F.smooth_l1_loss(displacement[busy], steps[which, clip, time].float())
            + 0.5 * F.cross_entropy(shape[busy], kinds["shape"][which, clip])
            + 0.5 * F.cross_entropy(colour[busy], kinds["colour"][which, clip])
        )


def pool_masks(masks: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Masks (B, T, H, W), averaged over the patch of each token: (B, t, h, w)."""
    return F.adaptive_avg_pool3d(masks[:, None], tuple(grid))[:, 0]


def pool_steps(displacement: torch.Tensor, times: int) -> torch.Tensor:
    """Displacement per frame (B, T, 2), averaged over the tubelet of each token: (B, t, 2)."""
    return displacement.unflatten(1, (times, -1)).mean(2)


# -- vision backbones -------------------------------------------------------------------------------


def sine_table(count: int, width: int) -> torch.Tensor:
    """Sine-cosine embeddings of positions 0 .. count-1: (count, width).

    Periods run from 4 to 64 positions, not to 10,000 as in Vaswani et al. 2017: there are at most 8 frames or patches
    in a row, and longer waves would hardly change over them.
    """
    periods = torch.logspace(math.log10(4), math.log10(64), width // 2)
    phase = 2 * math.pi * torch.arange(count)[:, None] / periods
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def new_timesformer() -> nn.Module:
    """A TimeSformer with 9 motion classes: patch 16, width 128, depth 4, about 1.2 M parameters."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    # no dropout: every batch is new, so nothing can be memorised
    width = 128
    config = TimesformerConfig(
        image_size=IMAGE_SIZE,
        patch_size=16,
        num_frames=NUM_FRAMES,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=width**-0.5,  # 0.09; the published 0.02 is for width 768
        **motion_labels(),
    )
    model = TimesformerForVideoClassification(config)

    # start with embeddings that tell frames and patches apart: published ones start at zero or near it, and then
    # temporal attention sees no order to learn from; half of the width encodes the row, half the column
    embeddings = model.timesformer.embeddings
    side = IMAGE_SIZE // config.patch_size
    rows, columns = sine_table(side, width // 2), sine_table(side, width // 2)
    grid = torch.cat([rows[:, None].expand(-1, side, -1), columns[None].expand(side, -1, -1)], dim=-1)  # (h, w, D)
    with torch.no_grad():
        embeddings.time_embeddings.copy_(sine_table(NUM_FRAMES, width)[None])
        embeddings.position_embeddings[:, 1:].copy_(grid.flatten(0, 1)[None])
    return model


def new_videomae() -> nn.Module:
    """A VideoMAE with its decoder: patch 8, tubelet 2, width 128, depth 4, about 0.8 M parameters in the encoder."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    # a narrow and shallow decoder, as in the paper: the encoder has to do the work
    config = VideoMAEConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        num_frames=NUM_FRAMES,
        tubelet_size=TUBELET,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=256,
        use_mean_pooling=True,
        norm_pix_loss=False,  # normalising a patch of plain background would leave only its noise
    )
    return VideoMAEForPreTraining(config)


def new_vjepa2() -> nn.Module:
    """A V-JEPA 2 with its predictor: patch 8, tubelet 2, width 128, depth 4, about 0.8 M parameters in the encoder."""
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        crop_size=IMAGE_SIZE,
        patch_size=PATCH,
        frames_per_clip=NUM_FRAMES,
        tubelet_size=TUBELET,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        pred_hidden_size=96,
        pred_num_hidden_layers=3,
        pred_num_attention_heads=2,
        pred_num_mask_tokens=1,
        pred_zero_init_mask_tokens=False,
        initializer_range=128**-0.5,  # 0.09; with the published 0.02 the tokens tell less about motion
    )
    return VJEPA2Model(config)


NEW = {"timesformer": new_timesformer, "videomae": new_videomae, "vjepa2": new_vjepa2}


def motion_labels() -> dict:
    """The motions as class names of a Hugging Face config: they set the size of the head too."""
    return {"id2label": dict(enumerate(MOTIONS)), "label2id": {m: i for i, m in enumerate(MOTIONS)}}


def encode(model: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pooled token (B, D), which is CLS for TimeSformer and the mean for the others, and the patch tokens
    (B, t, h, w, D)."""
    family = FAMILIES[model.config.model_type]
    tokens = model.base_model(**{family.input: pixel_values}, **family.arguments).last_hidden_state
    pooled = tokens[:, 0] if model.config.model_type == "timesformer" else tokens.mean(1)
    return pooled, to_grid(tokens, model.config)


# those of the published checkpoints, so that tiny and published backbones expect the same inputs
MEAN_STD = {
    "timesformer": ([0.45, 0.45, 0.45], [0.225, 0.225, 0.225]),
    "videomae": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "vjepa2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def normalise(video: torch.Tensor, family: str) -> torch.Tensor:
    """uint8 clips (B, T, C, H, W) -> the floats that the family expects, same shape."""
    mean, std = (torch.tensor(v, device=video.device).view(3, 1, 1) for v in MEAN_STD[family])
    return (video.float() / 255 - mean) / std


def supervised_loss(model: nn.Module, heads: AttributeHeads, batch: dict) -> torch.Tensor:
    """Loss of the pooled token and of the patch tokens. The motion head is the model's own classifier."""
    pooled, tokens = encode(model, normalise(batch["video"], model.config.model_type))
    return heads.clip_loss(pooled, model.classifier(pooled), batch) + heads.patch_loss(tokens, batch)


def draw_tubes(rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
    """The tokens of videomae-tiny to mask, 75 % of the patches: `masked`, bool (B, N)."""
    # the same patches at every time: otherwise a masked patch could be copied from the next frame
    patches = (IMAGE_SIZE // PATCH) ** 2
    hidden = rng.random((count, patches)).argsort(1) < int(0.75 * patches)
    return {"masked": torch.from_numpy(hidden).repeat(1, NUM_FRAMES // TUBELET)}


def reconstruction_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """VideoMAE's objective (Tong et al. 2022): reconstruct the pixels of masked tubes."""
    return model(normalise(batch["video"], "videomae"), bool_masked_pos=batch["masked"]).loss


class Jepa(nn.Module):
    """V-JEPA's objective (Bardes et al. 2024): predict the features that the teacher, an exponential moving average of
    the encoder, computes for the hidden tokens. The teacher sees the whole clip, the encoder the visible tokens."""

    def __init__(self, model: nn.Module, momentum: float = 0.998):
        super().__init__()
        self.model, self.momentum = model, momentum
        self.teacher = copy.deepcopy(model.encoder).requires_grad_(False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """L1 loss for the clips `video` (B, T, C, H, W); `visible` (B, n) and `hidden` (B, m) are indices of tokens."""
        pixel_values = normalise(batch["video"], "vjepa2")
        visible, hidden = batch["visible"], batch["hidden"]
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.model.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.momentum)
            targets = take(self.teacher(pixel_values).last_hidden_state, hidden)  # (B, m, D)
            targets = F.layer_norm(targets, targets.shape[-1:])
        return F.l1_loss(self.predict(self.encode(pixel_values, visible), visible, hidden), targets)

    def encode(self, pixel_values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """The encoder's outputs (B, n, D) for the visible tokens. transformers' own forward encodes all of them."""
        encoder = self.model.encoder
        tokens = take(encoder.embeddings(pixel_values), visible)
        for layer in encoder.layer:
            tokens = layer(tokens, visible)[0]
        return encoder.layernorm(tokens)

    def predict(self, tokens: torch.Tensor, visible: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The predictor's outputs (B, m, D) for the hidden tokens, from those of the visible ones (B, n, D)."""
        predictor = self.model.predictor
        tokens, positions = predictor.embeddings(tokens, [visible], [hidden])  # (B, n + m, d), (B, n + m)
        for layer in predictor.layer:
            tokens = layer(tokens, positions)[0]
        return predictor.proj(predictor.layernorm(tokens[:, visible.shape[1] :]))


def take(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens (B, N, D) at these indices (B, n): (B, n, D)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def draw_hidden_tokens(rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
    """Indices of the visible and the hidden tokens of vjepa2-tiny, `visible` (B, n) and `hidden` (B, m).

    In half of the batches, the later time steps are hidden. The published recipe does not do this; here it makes the
    model predict motion. In the other batches, the same blocks are hidden in every frame: 8 small or 2 large ones, of
    the published sizes. Unlike there, exactly a quarter of the cells is visible, and all others are predicted.
    """
    times, side = NUM_FRAMES // TUBELET, IMAGE_SIZE // PATCH
    if rng.random() < 0.5:
        seen = int(rng.integers(1, 3)) * side * side
        order = torch.arange(times * side * side).expand(count, -1)
        return {"visible": order[:, :seen], "hidden": order[:, seen:]}

    # a quarter of the cells is visible in every clip, so that a batch is one tensor: those outside the blocks first
    blocks, share = ((8, 0.15), (2, 0.7))[rng.integers(2)]
    covered = np.zeros((count, side, side))
    for clip in covered:
        for _ in range(blocks):
            aspect = math.exp(rng.uniform(math.log(0.75), math.log(1.5)))
            height, width = (min(side, round(side * math.sqrt(share * ratio))) for ratio in (aspect, 1 / aspect))
            y, x = rng.integers(side - height + 1), rng.integers(side - width + 1)
            clip[y : y + height, x : x + width] = 1
    order = (covered + 0.5 * rng.random(covered.shape)).reshape(count, -1).argsort(1)
    parts = {"visible": order[:, : side * side // 4], "hidden": order[:, side * side // 4 :]}
    starts = side * side * np.arange(times)[None, :, None]  # (1, t, 1)
    return {k: torch.from_numpy((starts + cells[:, None]).reshape(count, -1)) for k, cells in parts.items()}


# -- training ---------------------------------------------------------------------------------------


def lr_scale(step: int, steps: int, warmup: int) -> float:
    """Factor on the peak learning rate: linear warmup, then cosine decay to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Batches(Dataset):
    """Batch number i is `draw` of a random generator that depends only on (seed, name, i), so a resumed run sees the
    same batches, and worker processes can draw them."""

    def __init__(self, name: str, draw: Callable[[np.random.Generator], dict[str, torch.Tensor]]):
        self.name, self.draw = name, draw

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.draw(np.random.default_rng([SEED, *self.name.encode(), index]))


def train(
    name: str, modules: nn.ModuleList, draw, loss_of, steps: int, peak_lr: float, args: argparse.Namespace
) -> None:
    """Minimises `loss_of(draw(rng)) -> loss` for `steps` steps, times `args.scale`, on a GPU if there is one.

    Continues from args.state_dir/<name>.pt if it exists. Exits with an error if that state belongs to a run of another
    length.
    """
    from tqdm import tqdm

    steps = int(steps * args.scale)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modules.to(device)

    # no weight decay on biases and norms
    trained = [p for p in modules.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim >= 2]
    rest = [p for p in trained if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)

    # resume; another number of steps means another schedule, so the state would not fit
    state_file = args.state_dir / f"{name}.pt"
    start = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True, map_location=device)
        if state["steps"] != steps:
            raise SystemExit(f"error: {state_file} is from a run of {state['steps']} steps; delete it to start over")
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    # the printed loss is an exponential average: batches of random clips differ a lot
    average = None
    batches = DataLoader(Batches(name, draw), batch_size=None, sampler=range(start, steps), num_workers=args.workers)
    bar = tqdm(batches, initial=start, total=steps, desc=name, mininterval=10)
    for step, batch in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_scale(step, steps, warmup=min(500, steps // 5 + 1))
        torch.manual_seed(SEED + step)  # for dropout
        loss = loss_of({key: value.to(device) for key, value in batch.items()})
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)

        # written to a temporary file first: a kill while saving must not destroy the last state
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "steps": steps}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    modules.cpu()


def draw_masked_clips(rng: np.random.Generator, masks: Callable) -> dict[str, torch.Tensor]:
    """The pixels of a batch of 32 clips, half of them with two objects, and what is hidden of them."""
    batch = {"video": draw_world(rng, 32, two_objects=0.5)["video"]}
    return batch | masks(rng, 32)


def pretrain_timesformer(args: argparse.Namespace) -> nn.Module:
    """Supervised, in bfloat16 autocast."""
    model = new_timesformer()
    heads = AttributeHeads(model.config.hidden_size)

    def loss_of(batch: dict) -> torch.Tensor:
        with torch.autocast(batch["video"].device.type, torch.bfloat16):
            return supervised_loss(model, heads, batch)

    draw = partial(draw_world, count=32, two_objects=0.25)
    train("timesformer", nn.ModuleList([model, heads]), draw, loss_of, STEPS["timesformer"], 2e-3, args)
    return model


def pretrain_videomae(args: argparse.Namespace) -> nn.Module:
    """By masked reconstruction. Only the encoder is kept."""
    model = new_videomae()
    draw, loss_of = partial(draw_masked_clips, masks=draw_tubes), partial(reconstruction_loss, model)
    train("videomae", nn.ModuleList([model]), draw, loss_of, STEPS["videomae"], 1e-3, args)
    return model.videomae


def pretrain_vjepa2(args: argparse.Namespace) -> nn.Module:
    """By prediction of features. The teacher is kept as the encoder, as published."""
    model = new_vjepa2()
    jepa = Jepa(model)
    draw = partial(draw_masked_clips, masks=draw_hidden_tokens)
    train("vjepa2", nn.ModuleList([jepa]), draw, jepa, STEPS["vjepa2"], 1e-3, args)
    model.encoder = jepa.teacher
    return model


PRETRAIN = {"timesformer": pretrain_timesformer, "videomae": pretrain_videomae, "vjepa2": pretrain_vjepa2}


# -- language backbones -----------------------------------------------------------------------------

# the words of the additional shapes and motions; those of the dummy dataset stay as they are
SHAPE_WORDS = dummy_data.SHAPE_WORDS | {
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "ring": ("ring", "loop"),
    "cross": ("cross", "plus"),
}
MOTION_PHRASES = dummy_data.MOTION_PHRASES | {
    name: tuple(f"{verb} diagonally {name.replace(' ', ' and ')}" for verb in ("moves", "slides", "drifts", "glides"))
    for name in DIAGONALS
}
PHRASE_PAIRS = [(s, m) for s in SHAPES for m in MOTION_PHRASES if (s, m) not in WITHHELD]
POSITIONS = 256  # of gpt2-tiny and bert-tiny
MAX_START = 160  # texts start at random positions below this, because video tokens will come before them


def draw_truth(rng: np.random.Generator, most: int = 2) -> list[dict[str, str]]:
    """The attributes of the objects of a random clip, at `most` two, which differ in colour and motion. Withheld
    (shape, motion) pairs never occur."""
    colours = sorted(rng.choice(list(COLOURS), rng.integers(1, most + 1), replace=False))
    items: list[dict[str, str]] = []
    for colour in colours:
        pairs = PHRASE_PAIRS if not items else other_motions(items[0]["motion"])
        shape, motion = pairs[rng.integers(len(pairs))]
        size = str(rng.choice(list(dummy_data.SIZE_WORDS)))
        items.append({"size": size, "colour": str(colour), "shape": shape, "motion": motion})
    return items


def other_motions(motion: str) -> list[tuple[str, str]]:
    """The (shape, motion) pairs of another motion."""
    return [pair for pair in PHRASE_PAIRS if pair[1] != motion]


def draw_caption(truth: list[dict[str, str]], rng: np.random.Generator) -> str:
    """A random caption of a clip with these objects."""
    template = dummy_data.TEMPLATES[rng.integers(len(dummy_data.TEMPLATES))]
    return dummy_data.write_caption(template, truth, rng, SHAPE_WORDS, MOTION_PHRASES)


def caption_surprise(truth: list[dict[str, str]]) -> float:
    """-log probability, in nats, of any caption of `truth`.

    The same for all of them: every choice of the grammar is uniform, and no two derivations give the same words.
    """
    choices = [2, math.comb(len(COLOURS), len(truth)), len(dummy_data.TEMPLATES), len(PHRASE_PAIRS)]
    if len(truth) == 2:
        choices.append(len(other_motions(truth[0]["motion"])))
    for item in truth:
        words = (dummy_data.SIZE_WORDS[item["size"]], SHAPE_WORDS[item["shape"]], MOTION_PHRASES[item["motion"]])
        choices += [len(dummy_data.SIZE_WORDS), *map(len, words)]
    return sum(math.log(n) for n in choices)


def draw_note(rng: np.random.Generator) -> str:
    """A caption or the text of a clip, half and half: both are texts that bert-tiny will read."""
    truth = draw_truth(rng)
    if rng.random() < 0.5:
        return draw_caption(truth, rng)
    template = dummy_data.TEXTS[rng.integers(len(dummy_data.TEXTS))]
    return dummy_data.fill(template, truth[0], rng, SHAPE_WORDS, MOTION_PHRASES)


def corpus(name: str, count: int = 20_000) -> list[str]:
    """Texts to train a tokenizer on."""
    rng = np.random.default_rng([SEED, *f"{name}-tokenizer".encode()])
    return [draw_note(rng) for _ in range(count)]


def gpt2_tokenizer() -> Any:
    """A byte-level BPE tokenizer: any text has tokens, so there are no unknown ones."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus("gpt2"), vocab_size=512, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, unk_token=end, model_max_length=POSITIONS
    )


def bert_tokenizer() -> Any:
    """A WordPiece tokenizer, trained on captions, texts and single characters."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    # the characters make sure that any plain text can be tokenised, not only the words of the captions
    pieces = BertWordPieceTokenizer()
    letters = ["abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()"]
    pieces.train_from_iterator(corpus("bert") + letters * 10, vocab_size=512, min_frequency=1, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=POSITIONS,
    )


def load_or_train_tokenizer(name: str, state_dir: Path) -> Any:
    """The tokenizer of a stopped run if state_dir has one, else a new one, which is saved there.

    Training a WordPiece tokenizer twice can give the same pieces other ids, and the model learns the ids.
    """
    from transformers import AutoTokenizer

    folder = state_dir / f"{name}-tokenizer"
    if not folder.is_dir():
        {"gpt2": gpt2_tokenizer, "bert": bert_tokenizer}[name]().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def new_gpt2(tokenizer: Any) -> nn.Module:
    """A GPT-2 of width 128 and depth 4, without dropout: every batch is new, so nothing can be memorised."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def new_bert(tokenizer: Any) -> nn.Module:
    """A BERT of width 128 and depth 4."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForMaskedLM(config)


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of ids, padded at the end to the longest: (B, L)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


def shifted_positions(input_ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Position ids (B, L) that start at random: otherwise only the first positions would be trained."""
    return torch.arange(input_ids.shape[1]) + torch.from_numpy(rng.integers(MAX_START, size=(len(input_ids), 1)))


def draw_caption_pairs(rng: np.random.Generator, tokenizer: Any, objects: int) -> dict[str, torch.Tensor]:
    """16 rows of two captions of the same clip with at most this many `objects`, as arguments of GPT-2.

    The second caption can be predicted from the first one. This teaches the model to read its context, which is where
    the video tokens will be.
    """
    end, rows = tokenizer.eos_token_id, []
    for _ in range(16):
        truth = draw_truth(rng, objects)
        texts = [draw_caption(truth, rng) for _ in range(2)]
        rows.append([end] + [i for ids in tokenizer(texts)["input_ids"] for i in [*ids, end]])
    ids = pad(rows, end)
    return {"input_ids": ids, "position_ids": shifted_positions(ids, rng), "labels": pad(rows, -100)}


def draw_masked_notes(rng: np.random.Generator, tokenizer: Any) -> dict[str, torch.Tensor]:
    """64 rows of [CLS] text [SEP], with a fifth of the tokens masked, as arguments of BERT."""
    rows = [
        [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        for ids in tokenizer([draw_note(rng) for _ in range(64)], add_special_tokens=False)["input_ids"]
    ]
    ids, labels = pad(rows, tokenizer.pad_token_id), pad(rows, -100)

    # never mask padding or [CLS]; [SEP] may be masked, so the model learns where a text ends
    masked = torch.from_numpy(rng.random(ids.shape) < 0.2) & (labels != -100) & (ids != tokenizer.cls_token_id)
    return {
        "input_ids": ids.masked_fill(masked, tokenizer.mask_token_id),
        "attention_mask": (ids != tokenizer.pad_token_id).long(),  # (B, L)
        "position_ids": shifted_positions(ids, rng),
        "labels": labels.masked_fill(~masked, -100),
    }


def pretrain_language(name: str, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """(the pretrained language model, its tokenizer)."""
    tokenizer = load_or_train_tokenizer(name, args.state_dir)
    model = {"gpt2": new_gpt2, "bert": new_bert}[name](tokenizer)
    module = nn.ModuleList([model])

    def loss_of(batch: dict) -> torch.Tensor:
        return model(**batch).loss

    if name == "bert":
        train(name, module, partial(draw_masked_notes, tokenizer=tokenizer), loss_of, 1_500, 2e-3, args)
        return model, tokenizer

    # one object first: with two from the start, it learns the words but for thousands of steps not to read its context
    for objects, steps, rate in ((1, 6_000, 2e-3), (2, 2_000, 1e-3)):
        draw = partial(draw_caption_pairs, tokenizer=tokenizer, objects=objects)
        train(f"{name}-{objects}", module, draw, loss_of, steps, rate, args)
    return model, tokenizer


# -- evaluation and cards ---------------------------------------------------------------------------


@torch.no_grad()
def pooled_features(model: nn.Module, split: str, per_class: int, still: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled tokens (B, D) and labels (B,) of videos with one object. `still` repeats one frame."""
    # drawn as dummy_data.py draws them, but with another seed: no card has seen a clip of its val or test split
    features, labels = [], []
    args = argparse.Namespace(classes=len(dummy_data.MOTIONS), frames=16, size=IMAGE_SIZE, seed=SEED)
    indices = [8] * NUM_FRAMES if still else list(range(1, 16, 2))  # segment centres
    for label in range(args.classes):
        videos = [video[indices] for video, row in dummy_data.draw_rows(label, split, 2 * per_class, args)][::2]
        video = normalise(torch.from_numpy(np.stack(videos)), model.config.model_type)
        features.append(encode(model.eval(), video)[0])
        labels += [label] * per_class
    return torch.cat(features), torch.tensor(labels)


def probe(model: nn.Module, still: bool = False) -> float:
    """Accuracy of a linear head on frozen features. `still` repeats one frame, which hides the motion."""
    # standardised with training statistics, so that one regularisation fits every backbone
    x, y = pooled_features(model, "probe-train", 80, still)
    x_test, y_test = pooled_features(model, "probe-test", 40, still)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std

    # a convex problem, so L-BFGS finds the optimum and the number does not depend on a learning rate
    head = nn.Linear(x.shape[1], len(dummy_data.MOTIONS))
    nn.init.zeros_(head.weight)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(head(x), y) + 5e-3 * head.weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return (head(x_test).argmax(1) == y_test).float().mean().item()


@torch.no_grad()
def held_out_perplexity(model: nn.Module, tokenizer, count: int = 2000) -> tuple[float, float]:
    """(perplexity per token of the model, the best possible one) on `count` held-out captions.

    The best possible perplexity is exp(entropy of the grammar per token).
    """
    rng = np.random.default_rng([SEED, *b"gpt2-held-out"])
    nats, surprise, tokens, end = 0.0, 0.0, 0, tokenizer.eos_token_id
    for _ in range(count // 50):
        truths = [draw_truth(rng) for _ in range(50)]
        rows = [[end, *ids, end] for ids in tokenizer([draw_caption(t, rng) for t in truths])["input_ids"]]
        labels = pad(rows, -100)
        number = int((labels[:, 1:] != -100).sum())
        nats += model.eval()(input_ids=pad(rows, end), labels=labels).loss.item() * number
        surprise += sum(caption_surprise(t) for t in truths)
        tokens += number
    return math.exp(nats / tokens), math.exp(surprise / tokens)


CARD = """# {name}-tiny

Made by `python -m backbones.pretrain --models {name}` (seed {seed}) on a synthetic world of coloured shapes.
These weights are for testing the pipeline. They do not understand real {what}. Licence: Apache-2.0, like the project.

{how}

Withheld from pretraining: {withheld}. The random streams are disjoint from those of dummy_data.py.

{figures}
"""


def vision_figures(name: str, model: nn.Module) -> str:
    """The card's table of linear probes: the model, random weights, and the model on one repeated frame."""
    torch.manual_seed(SEED + 1)
    new = NEW[name]().base_model
    rows = {
        "pretrained": probe(model),
        "random weights": probe(new),
        "pretrained, one frame repeated": probe(model, still=True),
    }
    table = "".join(f"| {title} | {100 * accuracy:.1f} % |\n" for title, accuracy in rows.items())
    return (
        "Linear head on the frozen pooled token, nine motions, one object, 720 training and 360 test videos of a seed\n"
        f"that no dataset uses:\n\n| backbone | test accuracy |\n|---|---|\n{table}"
    )


def perplexity_figures(model: nn.Module, tokenizer: Any) -> str:
    """The card's sentence on the perplexity of gpt2-tiny."""
    perplexity, best = held_out_perplexity(model, tokenizer)
    return (
        f"Perplexity per token on 2,000 held-out captions: {perplexity:.3f}. The best possible, exp of the grammar's\n"
        f"entropy per token, is {best:.3f} (ratio {perplexity / best:.3f})."
    )


HOW = {
    "timesformer": """\
Supervised: motion, shape, colour, radius and displacement per frame from CLS; coverage, displacement, colour and shape
from every patch token. It has seen only objects that keep their velocity: none that turns, stops or reverses.
Patch 16, width 128, depth 4, 8 frames of 64 x 64. {clips:,} clips.""",
    "videomae": """\
Masked reconstruction alone, 75 % of the patches as tubes: it has seen no label. Its objects keep their velocity: none
turns, stops or reverses. Patch 8, tubelet 2, width 128, depth 4, 8 frames of 64 x 64. {clips:,} clips.""",
    "vjepa2": """\
Self-supervised: it only predicts the features of hidden tokens (V-JEPA's objective; in half of the batches the later
time steps are hidden), and has seen no labels. Its objects keep their velocity: none turns, stops or reverses. Patch 8,
tubelet 2, width 128, depth 4, 8 frames of 64 x 64. {clips:,} clips.""",
    "gpt2": """\
Next-token prediction on several captions of the same clip, starting at a random position below 160: 6,000 steps on
clips with one object, then 2,000 on clips with one or two. It knows the words for all motions. (The first stage and the
tokenizer come from an earlier version of the script, whose captions had other wordings and no turns.) Byte-level BPE
tokenizer. Width 128, depth 4, 256 positions.""",
    "bert": """\
Masked-token prediction on captions and texts, starting at a random position below 160. It knows the words for all
motions. WordPiece tokenizer trained on the same grammar. Width 128, depth 4, 256 positions.""",
}


def save_vision(name: str, model: nn.Module, folder: Path) -> None:
    """Saves a vision backbone with its preprocessor_config.json, in the format of published checkpoints."""
    model.save_pretrained(folder)

    # the fields that transforms.Preprocessing reads
    mean, std = MEAN_STD[name]
    values = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 2,  # bilinear, in PIL's numbering
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def pretrain(name: str, args: argparse.Namespace) -> None:
    """Pretrains one backbone, saves it as a Hugging Face folder, evaluates it and writes its CARD.md."""
    torch.manual_seed(SEED)
    folder, how = args.output / f"{name}-tiny", HOW[name]
    if name in STEPS:
        model = PRETRAIN[name](args)
        save_vision(name, model, folder)
        how = how.format(clips=int(STEPS[name] * args.scale) * 32)
        figures = vision_figures(name, model)
    else:
        model, tokenizer = pretrain_language(name, args)
        (model.bert if name == "bert" else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        figures = perplexity_figures(model, tokenizer) if name == "gpt2" else ""

    # the card's numbers are measured here, on the weights just saved, and never typed by hand
    withheld = " and ".join(f"{shape} moving {motion}" for shape, motion in WITHHELD)
    what = "video" if name in STEPS else "language"
    card = CARD.format(name=name, seed=SEED, what=what, how=how, withheld=withheld, figures=figures)
    (folder / "CARD.md").write_text(card.rstrip() + "\n")
    print(f"wrote {folder}/\n{figures}")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and pretrains the chosen backbones, one after the other."""
    parser = argparse.ArgumentParser(
        description="Pretrain the tiny backbones on synthetic data. A stopped run continues where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    names = (*STEPS, "gpt2", "bert")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which backbones")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("backbones"),
        help="folder to write to; backbones of the same name are replaced",
    )
    parser.add_argument(
        "--state_dir", type=Path, default=Path("pretraining_state"), help="folder for the state that resuming needs"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on the number of steps; 0.01 is a quick test of the whole script",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches; 8 keep a GPU busy")
    args = parser.parse_args(argv)

    # one backbone at a time: each training uses all threads
    if args.threads:
        torch.set_num_threads(args.threads)
    args.state_dir.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        pretrain(name, args)


if __name__ == "__main__":
    main()
