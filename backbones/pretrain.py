"""Makes the four tiny backbones in backbones/ from a fixed seed, on a synthetic world. Resumable.

    python -m backbones.pretrain                       # all four; hours on one core, nothing to download
    python -m backbones.pretrain --models gpt2 bert    # some of them

The world is wider than the dummy dataset: 6 shapes, 12 colours, 9 motions, any size between the dummy
set's extremes and beyond, gratings behind, a second object in a quarter of the clips. Two of the dummy
set's ten (shape, motion) pairs never occur in it (`WITHHELD`), and its random streams are its own.

* videomae: masked reconstruction, then a supervised stage, since the first alone is a weak frozen backbone.
* timesformer: supervised. Its weights start larger and its time and position embeddings as sine waves
  of amplitude 1: from the published initialisation a model this small stays blind to frame order.
* The supervised targets: motion, shape, colour, radius and per-frame displacement from the pooled
  token; coverage, displacement, colour and shape from every patch token.
* gpt2 and bert: the captions' grammar (next token; masked token), tokenizers trained on it.

These weights test the pipeline; they are no video understanding.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dummy_data
from build_model import token_grid

SEED = 20260
IMAGE_SIZE, NUM_FRAMES = 64, 8
WITHHELD = (("circle", "up"), ("square", "left"))
COLOURS = dummy_data.COLOURS | {
    "pink": (0.98, 0.60, 0.75),
    "brown": (0.50, 0.30, 0.12),
    "lime": (0.70, 0.98, 0.25),
    "black": (0.01, 0.01, 0.01),
}
SHAPES = dummy_data.SHAPES | {
    "triangle": lambda dx, dy, r: np.maximum(np.abs(dx) * 0.866 + dy * 0.5, -dy) - 0.62 * r,
    "diamond": lambda dx, dy, r: (np.abs(dx) + np.abs(dy)) * 0.707 - 0.886 * r,
    "ring": lambda dx, dy, r: np.abs(np.hypot(dx, dy) - 0.75 * r) - 0.27 * r,
    "cross": lambda dx, dy, r: np.minimum(
        np.maximum(np.abs(dx) - 1.1 * r, np.abs(dy) - 0.38 * r), np.maximum(np.abs(dy) - 1.1 * r, np.abs(dx) - 0.38 * r)
    ),
}
DIAGONALS = {"up right": (1, -1), "up left": (-1, -1), "down right": (1, 1), "down left": (-1, 1)}
MOTIONS = dummy_data.MOTIONS | {name: (x / 2**0.5, y / 2**0.5) for name, (x, y) in DIAGONALS.items()}
SPEEDS = (1.5, 6.5)  # pixels per frame of the clip
RADII = (0.09, 0.22)  # of the picture's side
PAIRS = [(s, m) for s in SHAPES for m in MOTIONS if (s, m) not in WITHHELD]
STILL = list(MOTIONS).index("still")


# -- the world in pictures --------------------------------------------------------------------------


def draw_objects(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """One object per clip: its indices into PAIRS and COLOURS, positions, displacements and masks."""
    pairs = np.array([(list(SHAPES).index(s), list(MOTIONS).index(m)) for s, m in PAIRS])
    shape, motion = pairs[rng.integers(len(pairs), size=count)].T
    colour = rng.integers(len(COLOURS), size=count)
    radius = rng.uniform(*RADII, count) * IMAGE_SIZE
    direction = np.array(list(MOTIONS.values()))[motion]
    angle = rng.uniform(-0.14, 0.14, count)  # +-8 degrees
    x, y = direction.T
    direction = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], 1)
    velocity = direction * rng.uniform(*SPEEDS, (count, 1))
    uneven = rng.uniform(-0.4, 0.4, (count, NUM_FRAMES)) * (rng.random((count, 1)) < 0.5)
    times = np.arange(NUM_FRAMES) + uneven  # as training's jittered sampling gives
    positions = dummy_data.trajectories(rng.uniform(0, IMAGE_SIZE, (count, 2)), velocity, times, IMAGE_SIZE)
    masks = np.empty((count, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        masks[rows] = dummy_data.draw_masks(name, positions[rows], radius[rows], IMAGE_SIZE, SHAPES)
    steps = np.diff(times, axis=1, append=times[:, -1:] * 2 - times[:, -2:-1])  # to the next frame
    return {
        "shape": shape,
        "motion": motion,
        "colour": colour,
        "masks": masks,
        "radius": radius / IMAGE_SIZE,
        "displacement": velocity[:, None] * steps[..., None] / SPEEDS[1],
    }


def draw_grounds(rng: np.random.Generator, count: int) -> np.ndarray:
    """Gradients, a third of them with a grating: (B, 1, C, H, W)."""
    grounds = dummy_data.draw_backgrounds(rng, count, IMAGE_SIZE)
    axis = np.linspace(0, 2 * np.pi, IMAGE_SIZE, dtype=np.float32)
    waves = rng.uniform(-5, 5, (2, count, 1, 1, 1, 1)).astype(np.float32)
    grating = np.sin(waves[0] * axis[None, :] + waves[1] * axis[:, None])
    strength = rng.uniform(0, 0.12, (count, 1, 1, 1, 1)) * (rng.random((count, 1, 1, 1, 1)) < 0.33)
    return np.clip(grounds + strength.astype(np.float32) * grating, 0, 1)


def draw_world(rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
    """A batch of the world: `video` uint8 (B, T, C, H, W) and what is true of its clips and pixels."""
    first, second = draw_objects(rng, count), draw_objects(rng, count)
    two = rng.random(count) < 0.25
    second["masks"] *= two[:, None, None, None]
    frames = draw_grounds(rng, count)
    for one in (first, second):
        shades = np.array(list(COLOURS.values()))[one["colour"]] + rng.uniform(-0.04, 0.04, (count, 3))
        frames = dummy_data.paint(frames, one["masks"], np.clip(shades, 0, 1))
    video = dummy_data.to_uint8(frames, rng, noise=rng.uniform(0, 12))
    first["masks"] *= 1 - second["masks"]
    batch = {"video": torch.from_numpy(video), "single": torch.from_numpy(~two)}
    for name, one in (("first", first), ("second", second)):
        batch |= {f"{name}_{k}": torch.as_tensor(v) for k, v in one.items()}
    return batch


class AttributeHeads(nn.Module):
    """Reads the world's attributes off the pooled token (B, D) and the patch tokens (B, t, h, w, D)."""

    def __init__(self, width: int):
        super().__init__()
        kinds = len(SHAPES) + len(COLOURS)
        self.clip = nn.Linear(width, kinds + 1 + 2 * NUM_FRAMES)
        self.patch = nn.Linear(width, 1 + 2 + kinds)

    def clip_loss(self, pooled: torch.Tensor, motion_logits: torch.Tensor, batch: dict) -> torch.Tensor:
        """Over clips with one object, where 'the' motion, shape and colour exist."""
        one = batch["single"]
        sizes = [len(SHAPES), len(COLOURS), 1, 2 * NUM_FRAMES]
        shape, colour, radius, displacement = self.clip(pooled[one]).split(sizes, dim=-1)
        return (
            F.cross_entropy(motion_logits[one], batch["first_motion"][one])
            + F.cross_entropy(shape, batch["first_shape"][one])
            + F.cross_entropy(colour, batch["first_colour"][one])
            + 10 * F.smooth_l1_loss(radius[:, 0], batch["first_radius"][one].float())
            + 5 * F.smooth_l1_loss(displacement, batch["first_displacement"][one].flatten(1).float())
        )

    def patch_loss(self, tokens: torch.Tensor, batch: dict) -> torch.Tensor:
        covers = [pool_masks(batch[f"{name}_masks"], tokens.shape[1:4]) for name in ("first", "second")]
        covers = torch.stack(covers)  # (2, B, t, h, w)
        owner = covers.argmax(0)  # which object fills more of the patch
        busy = covers.amax(0) > 0.25
        sizes = [1, 2, len(SHAPES), len(COLOURS)]
        coverage, displacement, shape, colour = self.patch(tokens).split(sizes, dim=-1)
        steps = torch.stack([pool_steps(batch[f"{n}_displacement"], tokens.shape[1]) for n in ("first", "second")])
        which, clip, time = owner[busy], *busy.nonzero().T[:2]
        kinds = {k: torch.stack([batch[f"first_{k}"], batch[f"second_{k}"]]) for k in ("shape", "colour")}
        return (
            F.binary_cross_entropy_with_logits(coverage[..., 0], covers.sum(0).clamp(0, 1))
            + 5 * F.smooth_l1_loss(displacement[busy], steps[which, clip, time].float())
            + 0.5 * F.cross_entropy(shape[busy], kinds["shape"][which, clip])
            + 0.5 * F.cross_entropy(colour[busy], kinds["colour"][which, clip])
        )


def pool_masks(masks: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Masks (B, T, H, W) averaged over each token's patch: (B, t, h, w)."""
    return F.adaptive_avg_pool3d(masks[:, None], tuple(grid))[:, 0]


def pool_steps(displacement: torch.Tensor, times: int) -> torch.Tensor:
    """Displacement per frame (B, T, 2) averaged over each token's tubelet: (B, t, 2)."""
    return displacement.unflatten(1, (times, -1)).mean(2)


# -- the vision towers ------------------------------------------------------------------------------


def sine_table(count: int, width: int) -> torch.Tensor:
    """Sine-cosine embedding of 0 .. count-1 with periods from 4 to 64 positions: (count, width)."""
    periods = torch.logspace(math.log10(4), math.log10(64), width // 2)
    phase = 2 * math.pi * torch.arange(count)[:, None] / periods
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def new_timesformer() -> nn.Module:
    from transformers import TimesformerConfig, TimesformerForVideoClassification

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
        initializer_range=width**-0.5,
        **motion_labels(),
    )
    model = TimesformerForVideoClassification(config)
    embeddings = model.timesformer.embeddings
    side = IMAGE_SIZE // config.patch_size
    rows, columns = sine_table(side, width // 2), sine_table(side, width // 2)
    grid = torch.cat([rows[:, None].expand(-1, side, -1), columns[None].expand(side, -1, -1)], dim=-1)
    with torch.no_grad():
        embeddings.time_embeddings.copy_(sine_table(NUM_FRAMES, width)[None])
        embeddings.position_embeddings[:, 1:].copy_(grid.flatten(0, 1)[None])
    return model


def new_videomae_config(**more):
    from transformers import VideoMAEConfig

    return VideoMAEConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_frames=NUM_FRAMES,
        tubelet_size=2,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        use_mean_pooling=True,
        **more,
    )


def new_videomae() -> nn.Module:
    from transformers import VideoMAEForVideoClassification

    return VideoMAEForVideoClassification(new_videomae_config(**motion_labels()))


def motion_labels() -> dict:
    return {"id2label": dict(enumerate(MOTIONS)), "label2id": {m: i for i, m in enumerate(MOTIONS)}}


def encode(model: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled token (B, D) by the family's own rule, and patch tokens (B, t, h, w, D)."""
    tokens = model.base_model(pixel_values).last_hidden_state
    pooled = tokens[:, 0] if model.config.model_type == "timesformer" else model.fc_norm(tokens.mean(1))
    return pooled, token_grid(tokens, model.config)


MEAN_STD = {
    "timesformer": ([0.45, 0.45, 0.45], [0.225, 0.225, 0.225]),
    "videomae": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def normalise(video: torch.Tensor, family: str) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in MEAN_STD[family])
    return (video.float() / 255 - mean) / std


def supervised_loss(model: nn.Module, heads: AttributeHeads, batch: dict) -> torch.Tensor:
    pooled, tokens = encode(model, normalise(batch["video"], model.config.model_type))
    return heads.clip_loss(pooled, model.classifier(pooled), batch) + heads.patch_loss(tokens, batch)


def reconstruction_loss(model: nn.Module, batch: dict, rng: np.random.Generator) -> torch.Tensor:
    """VideoMAE's own objective: normalised pixels of tubes (75 % of the patches, the same at every time)."""
    config = model.config
    side = config.image_size // config.patch_size
    hidden = rng.random((len(batch["video"]), side * side)).argsort(1) < int(0.75 * side * side)
    masked = torch.from_numpy(hidden).repeat(1, config.num_frames // config.tubelet_size)  # (B, N)
    return model(normalise(batch["video"], "videomae"), bool_masked_pos=masked).loss


# -- training ---------------------------------------------------------------------------------------


def lr_scale(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    name: str, modules: nn.ModuleList, loss_of, steps: int, peak_lr: float, state_dir: Path, save_every: int = 500
) -> None:
    """Runs `loss_of(rng) -> loss` for `steps` steps; goes on from state_dir/<name>.pt if that exists.

    The generator of a step depends on (seed, name, step) alone, so a resumed run sees the same batches.
    """
    from tqdm import tqdm

    decay = [p for p in modules.parameters() if p.ndim >= 2]
    rest = [p for p in modules.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    saved = state_dir / f"{name}.pt"
    start = 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        if state["steps"] != steps:
            raise SystemExit(f"error: {saved} belongs to a run of {state['steps']} steps; delete it to start anew")
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    average = None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_scale(step, steps, warmup=min(500, steps // 5 + 1))
        torch.manual_seed(SEED + step)  # dropout's
        loss = loss_of(np.random.default_rng([SEED, *name.encode(), step]))
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "steps": steps}, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)


def supervise(model: nn.Module, name: str, steps: int, peak_lr: float, state_dir: Path) -> None:
    """The supervised stage of a vision tower: batches of 32 clips, bfloat16 where that is fast."""
    heads = AttributeHeads(model.config.hidden_size)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return supervised_loss(model, heads, draw_world(rng, 32))

    train(name, nn.ModuleList([model, heads]), loss_of, steps, peak_lr, state_dir)


def pretrain_timesformer(state_dir: Path, scale: float) -> nn.Module:
    model = new_timesformer()
    supervise(model, "timesformer", int(10_000 * scale), 2e-3, state_dir)
    return model


def pretrain_videomae(state_dir: Path, scale: float) -> nn.Module:
    from transformers import VideoMAEForPreTraining

    decoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    reconstructor = VideoMAEForPreTraining(
        new_videomae_config(
            **{f"decoder_{name}": value for name, value in decoder.items()},
            norm_pix_loss=False,  # normalised, a patch of plain ground would be nothing but its noise
        )
    )

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return reconstruction_loss(reconstructor, draw_world(rng, 32), rng)

    train("videomae-masked", nn.ModuleList([reconstructor]), loss_of, int(2_000 * scale), 1e-3, state_dir)
    model = new_videomae()
    model.videomae.load_state_dict(reconstructor.videomae.state_dict())
    supervise(model, "videomae", int(4_000 * scale), 1e-3, state_dir)
    return model


# -- the world in words -----------------------------------------------------------------------------

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
POSITIONS = 256  # of gpt2-tiny and bert-tiny
FURTHEST = 160  # texts start anywhere up to here: in use, video tokens stand before them


def draw_truth(rng: np.random.Generator) -> dict[str, str]:
    shape, motion = PAIRS[rng.integers(len(PAIRS))]
    size, colour = rng.choice(list(dummy_data.SIZE_WORDS)), rng.choice(list(COLOURS))
    return {"size": str(size), "colour": str(colour), "shape": shape, "motion": motion}


def draw_caption(truth: dict[str, str], rng: np.random.Generator) -> str:
    template = dummy_data.TEMPLATES[rng.integers(len(dummy_data.TEMPLATES))]
    return dummy_data.write_caption(template, truth, rng, SHAPE_WORDS, MOTION_PHRASES)


def caption_surprise(truth: dict[str, str]) -> float:
    """-log probability, in nats, of any caption of `truth`: every choice of the grammar is uniform and
    no two derivations give the same words."""
    choices = (
        len(PAIRS),
        len(COLOURS),
        len(dummy_data.SIZE_WORDS),
        len(dummy_data.TEMPLATES),
        len(dummy_data.SIZE_WORDS[truth["size"]]),
        len(SHAPE_WORDS[truth["shape"]]),
        len(MOTION_PHRASES[truth["motion"]]),
    )
    return sum(math.log(n) for n in choices)


def draw_note(rng: np.random.Generator) -> str:
    """A hint of the dummy dataset, or a caption: what bert-tiny reads."""
    truth = draw_truth(rng)
    if rng.random() < 0.5:
        return draw_caption(truth, rng)
    notes = dummy_data.HINTS[str(rng.choice(list(dummy_data.HINTS)))]
    return str(rng.choice(list(notes.values())))


def corpus(name: str, count: int = 20_000) -> list[str]:
    """Texts that a tokenizer is trained on."""
    rng = np.random.default_rng([SEED, *f"{name}-tokenizer".encode()])
    return [draw_note(rng) for _ in range(count)]


def gpt2_tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus("gpt2"), vocab_size=512, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, unk_token=end, model_max_length=POSITIONS
    )


def bert_tokenizer() -> Any:
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = BertWordPieceTokenizer()
    letters = ["abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()"]  # so that any plain text has tokens
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


def kept_tokenizer(name: str, state_dir: Path) -> Any:
    """The tokenizer of a stopped run, or a new one, kept in state_dir: training a WordPiece tokenizer twice
    can number the same pieces differently, and the model learns the numbers."""
    from transformers import AutoTokenizer

    folder = state_dir / f"{name}-tokenizer"
    if not folder.is_dir():
        {"gpt2": gpt2_tokenizer, "bert": bert_tokenizer}[name]().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def new_gpt2(tokenizer: Any) -> nn.Module:
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
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


def place(input_ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Position ids (B, L) from a random start: every position gets trained."""
    return torch.arange(input_ids.shape[1]) + torch.from_numpy(rng.integers(FURTHEST, size=(len(input_ids), 1)))


def next_token_loss(model: nn.Module, tokenizer, rng: np.random.Generator) -> torch.Tensor:
    """Captions of one video after one another, so that the model learns to say again what came before."""
    end, rows = tokenizer.eos_token_id, []
    for _ in range(32):
        truth = draw_truth(rng)
        texts = [draw_caption(truth, rng) for _ in range(rng.integers(1, 4))]
        rows.append([end] + [i for ids in tokenizer(texts)["input_ids"] for i in [*ids, end]])
    ids, labels = pad(rows, end), pad(rows, -100)
    return model(input_ids=ids, position_ids=place(ids, rng), labels=labels).loss


def masked_token_loss(model: nn.Module, tokenizer, rng: np.random.Generator) -> torch.Tensor:
    """[CLS] text [SEP], a fifth of its tokens behind [MASK]."""
    rows = [
        [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        for ids in tokenizer([draw_note(rng) for _ in range(64)], add_special_tokens=False)["input_ids"]
    ]
    ids, labels = pad(rows, tokenizer.pad_token_id), pad(rows, -100)
    hidden = torch.from_numpy(rng.random(ids.shape) < 0.2) & (labels != -100) & (ids != tokenizer.cls_token_id)
    inputs = ids.masked_fill(hidden, tokenizer.mask_token_id)
    seen = (ids != tokenizer.pad_token_id).long()
    labels = labels.masked_fill(~hidden, -100)
    return model(input_ids=inputs, attention_mask=seen, position_ids=place(ids, rng), labels=labels).loss


def pretrain_language(name: str, state_dir: Path, scale: float) -> tuple[nn.Module, Any]:
    new, loss, steps, rate = {
        "gpt2": (new_gpt2, next_token_loss, 6_000, 2e-3),
        "bert": (new_bert, masked_token_loss, 3_000, 1e-3),
    }[name]
    tokenizer = kept_tokenizer(name, state_dir)
    model = new(tokenizer)
    loss_of = partial(loss, model, tokenizer)
    train(name, nn.ModuleList([model]), loss_of, int(steps * scale), rate, state_dir)
    return model, tokenizer


# -- proof ------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled_features(model: nn.Module, split: str, still: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled tokens and labels of a split of the default dummy dataset; `still` repeats one frame."""
    features, labels = [], []
    for label in range(len(dummy_data.CLASSES)):
        rng = np.random.default_rng([0, split == "test", label])  # as dummy_data.py draws it
        videos, _ = dummy_data.draw_class(label, 20 if split == "test" else 80, 16, IMAGE_SIZE, rng)
        indices = [8] * NUM_FRAMES if still else list(range(1, 16, 2))  # segment centres
        video = torch.from_numpy(videos[:, indices])
        features.append(encode(model.eval(), normalise(video, model.config.model_type))[0])
        labels += [label] * len(videos)
    return torch.cat(features), torch.tensor(labels)


def probe(model: nn.Module, still: bool = False) -> dict[str, float]:
    """Test accuracy of a linear head on frozen, standardised features, ridge-regularised, fitted by L-BFGS."""
    x, y = pooled_features(model, "train", still)
    x_test, y_test = pooled_features(model, "test", still)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    head = nn.Linear(x.shape[1], len(dummy_data.CLASSES))
    nn.init.zeros_(head.weight)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(head(x), y) + 5e-3 * head.weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    right = head(x_test).argmax(1) == y_test
    withheld = torch.tensor([CLASS in WITHHELD for CLASS in dummy_data.CLASSES])[y_test]
    return {
        "all": right.float().mean().item(),
        "withheld": right[withheld].float().mean().item(),
        "seen": right[~withheld].float().mean().item(),
    }


@torch.no_grad()
def held_out_perplexity(model: nn.Module, tokenizer, count: int = 2000) -> tuple[float, float]:
    """(the model's perplexity per token, exp of the grammar's entropy per token) on captions never trained on."""
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
These weights test the pipeline; they are no {what} understanding. Licence: Apache-2.0, as the project.

{how}

Withheld from pretraining: {withheld}. The random streams are disjoint from dummy_data.py's.

{figures}
"""


def vision_figures(name: str, model: nn.Module) -> str:
    torch.manual_seed(SEED + 1)
    rows = {
        "pretrained": probe(model),
        "random weights": probe({"timesformer": new_timesformer, "videomae": new_videomae}[name]()),
    }
    rows["pretrained, one frame repeated"] = probe(model, still=True)
    table = "".join(
        f"| {title} | {100 * r['all']:.1f} % | {100 * r['seen']:.1f} % | {100 * r['withheld']:.1f} % |\n"
        for title, r in rows.items()
    )
    return (
        "Linear head on frozen features, dummy dataset (seed 0), 800 training and 200 test videos:\n\n"
        f"| tower | test accuracy | 8 pairs seen | 2 withheld pairs |\n|---|---|---|---|\n{table}"
    )


def perplexity_figures(model: nn.Module, tokenizer: Any) -> str:
    ours, best = held_out_perplexity(model, tokenizer)
    return (
        f"Perplexity per token on 2,000 held-out captions: {ours:.3f}; exp of the grammar's entropy per token: "
        f"{best:.3f};\nratio {ours / best:.3f}."
    )


HOW = {
    "timesformer": "Supervised: motion, shape, colour, radius and displacement per frame from CLS; coverage, displacement,\ncolour and shape from every patch token. Patch 16, width 128, depth 4, 8 frames of 64 x 64. {clips:,} clips.",
    "videomae": "Masked reconstruction (75 % tubes, 64,000 clips), then, since that alone is a weak frozen backbone, the same\nsupervised targets as timesformer-tiny from the mean token and from every patch token ({clips:,} clips).\nPatch 8, tubelet 2, width 128, depth 4, 8 frames of 64 x 64.",
    "gpt2": "Next token on captions of the grammar, one to three captions of a video after one another, starting at any\nof the first 160 positions. Byte-level BPE of its own. Width 128, depth 4, 256 positions.",
    "bert": "Masked tokens of captions and hints, starting at any of the first 160 positions. WordPiece of its own.\nWidth 128, depth 4, 256 positions.",
}


def save_vision(name: str, model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    mean, std = MEAN_STD[name]
    values = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def pretrain(name: str, state_dir: Path, output: Path, scale: float) -> None:
    """Trains one backbone, saves it as a Hugging Face folder, measures it and writes its card."""
    torch.manual_seed(SEED)
    folder, how = output / f"{name}-tiny", HOW[name]
    if name in MEAN_STD:
        model = {"timesformer": pretrain_timesformer, "videomae": pretrain_videomae}[name](state_dir, scale)
        save_vision(name, model, folder)
        how = how.format(clips=int({"timesformer": 10_000, "videomae": 4_000}[name] * scale) * 32)
        figures = vision_figures(name, model)
    else:
        model, tokenizer = pretrain_language(name, state_dir, scale)
        (model.bert if name == "bert" else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        figures = perplexity_figures(model, tokenizer) if name == "gpt2" else ""
    withheld = " and ".join(f"{shape} moving {motion}" for shape, motion in WITHHELD)
    what = "video" if name in MEAN_STD else "language"
    card = CARD.format(name=name, seed=SEED, what=what, how=how, withheld=withheld, figures=figures)
    (folder / "CARD.md").write_text(card.rstrip() + "\n")
    print(f"wrote {folder}/\n{figures}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Pretrain the tiny backbones on a synthetic world. A stopped run goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    names = ("timesformer", "videomae", "gpt2", "bert")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which backbones")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("backbones"),
        help="folder of the backbones; those of the same name are replaced",
    )
    parser.add_argument(
        "--state_dir", type=Path, default=Path("pretraining_state"), help="where to keep what a stopped run needs"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the number of steps; 0.01 tries the whole path out"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.state_dir.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        pretrain(name, args.state_dir, args.output, args.scale)


if __name__ == "__main__":
    main()
