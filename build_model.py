"""Backbones, the projector, the three models, and the one function that decides what is trained.

    video classifier                vision encoder -> pooled token -> head
    video + language classifier     [CLS] video tokens [SEP] text [SEP] -> BERT-like encoder -> head on [CLS]
    video captioner                 video tokens, BOS, caption, EOS -> causal language model

Shapes: B batch, T frames, C channels, H W pixels, N video tokens, L text tokens, D width, V vocabulary,
K classes; t h w count a clip's tokens over time, height and width.
`pixel_values` are RGB uint8 (B, T, C, H, W): the vision encoder normalises them on the device.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from config import ROOT, Config, family
from script import UserError, collector_off
from transforms import Preprocessing

FAMILIES = ("timesformer", "videomae")
LONGEST_TEXT = 128  # tokens of a text or caption; a longer one is cut


# -- backbones --------------------------------------------------------------------------------------


@dataclass
class Source:
    """Where a tower comes from: a folder or hub id. Without weights only its configuration is read,
    because a checkpoint brings all its tensors."""

    path: str
    revision: str | None = None
    weights: bool = True
    fingerprint: str = field(default="", compare=False)

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    def arguments(self) -> dict[str, Any]:
        """For every from_pretrained: never code from a checkpoint."""
        pinned = {} if self.local or self.revision is None else {"revision": self.revision}
        return {"pretrained_model_name_or_path": self.path, "trust_remote_code": False} | pinned


def locate(name: str, weights: str) -> Source:
    """The source of a --vision_model or --language_model: a short name, a folder, or a hub id."""
    known = family(name)
    if known is None:
        return Source(name)
    if weights == "hub":
        return Source(known.hub, known.revision)
    return Source(str(ROOT / known.tiny))


def from_source(loader: Any, source: Source, what: str, **more: Any) -> Any:
    """loader.from_pretrained(source, ...), its failures as a UserError with the ways out."""
    try:
        return loader.from_pretrained(**source.arguments(), **more)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, UnpicklingError ...
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        if source.local:
            raise UserError(f"cannot load the {what} in {source.path}: {cause}") from None
        raise UserError(
            f"cannot load the {what} of {source.path} from the hub: {cause} -- "
            "ways out: --weights tiny, or name a folder that holds a copy of it"
        ) from None


def read_config(source: Source) -> Any:
    from transformers import AutoConfig

    return from_source(AutoConfig, source, "configuration (config.json)")


def fingerprint(module: nn.Module) -> str:
    """Of a tower's tensors: names, shapes and bytes, whatever file format they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_tower(auto_class: Any, source: Source, config: Any, new_layers: tuple[str, ...], **more: Any) -> nn.Module:
    """A float32 tower with pretrained weights, or with random ones where the source has no weights.

    Raises:
        UserError: a tensor is missing that is not of `new_layers`, or does not fit.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading takes a moment, not minutes
    if not source.weights:
        return auto_class.from_config(config, dtype=torch.float32, **more)
    model, report = from_source(
        auto_class, source, "weights",
        config=config, dtype=torch.float32, weights_only=True, output_loading_info=True, **more,
    )  # fmt: skip
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(new_layers))
    misfits = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report["mismatched_keys"])
    if missing or misfits:
        names = ", ".join((missing + misfits)[:4])
        raise UserError(f"{source.path}: {len(missing)} tensors missing and {len(misfits)} of another shape: {names}")
    return model


def load_preprocessor(source: Source, model_type: str) -> dict[str, Any]:
    """The fields of preprocessor_config.json; without that file, what transformers assumes for the family."""
    from transformers import AutoImageProcessor
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained(**source.arguments(), backend="pil").to_dict()
    except (OSError, ValueError):
        values = VideoMAEImageProcessorPil().to_dict()
        print(
            f"warning: {source.path} has no preprocessor_config.json; using transformers' default for "
            f"{model_type}: mean {values['image_mean']}, std {values['image_std']}"
        )
        return values


def patch_side(config: Any) -> int:
    """How many patches a frame has on each side."""
    return side_of(config.image_size) // side_of(config.patch_size)


def side_of(size: int | list[int] | tuple[int, int]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"only square frames and patches are supported, not {list(size)}")
    return size[0]


def fit_embeddings(backbone: nn.Module, num_frames: int, image_size: int) -> None:
    """Makes a backbone take another number of frames or another image size: interpolates its position and
    time embeddings and updates its configuration, which TimeSformer's layers reshape by.

    Raises:
        UserError: image_size is no multiple of the patch size, or num_frames of the tubelet size.
    """
    config = backbone.config
    patch, tubelet = side_of(config.patch_size), getattr(config, "tubelet_size", 1)
    if image_size % patch:
        raise UserError(f"--image_size {image_size}: this backbone needs a multiple of its patch size, {patch}")
    if num_frames % tubelet:
        raise UserError(f"--num_frames {num_frames}: this backbone needs a multiple of its tubelet size, {tubelet}")
    side, times = patch_side(config), config.num_frames // tubelet
    new_side, new_times = image_size // patch, num_frames // tubelet
    embeddings = backbone.embeddings
    if config.model_type == "timesformer":
        space = embeddings.position_embeddings.data  # (1, 1 + h w, D)
        grid = resize_grid(space[:, 1:].unflatten(1, (1, side, side)), (1, new_side, new_side))
        embeddings.position_embeddings = nn.Parameter(torch.cat([space[:, :1], grid.flatten(1, 3)], dim=1))
        time = embeddings.time_embeddings.data[:, :, None, None]  # (1, t, 1, 1, D)
        embeddings.time_embeddings = nn.Parameter(resize_grid(time, (new_times, 1, 1)).flatten(1, 3))
    else:
        table = embeddings.position_embeddings.unflatten(1, (times, side, side))  # (1, t, h, w, D)
        embeddings.position_embeddings = resize_grid(table, (new_times, new_side, new_side)).flatten(1, 3)
    config.num_frames, config.image_size = num_frames, image_size
    patches = embeddings.patch_embeddings
    patches.image_size = (image_size, image_size)
    patches.num_patches = embeddings.num_patches = new_side**2 * new_times if tubelet > 1 else new_side**2


def fuse_attention(backbone: nn.Module) -> None:
    """Gives TimeSformer, which transformers computes step by step, torch's fused attention; same weights, same
    values to rounding. Backbones that have it already stay as they are."""
    from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention

    for module in backbone.modules():
        if isinstance(module, TimesformerSelfAttention):
            module.forward = MethodType(fused_attention, module)


def fused_attention(self: Any, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor]:
    """Stands for TimesformerSelfAttention.forward: (B, N, D) -> ((B, N, D),)."""
    query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    dropout = self.attn_drop.p if self.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
    return (context.transpose(1, 2).flatten(2),)


def resize_grid(grid: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Linear interpolation of embeddings (1, t, h, w, D) over t, h and w; the same tensor at its own size."""
    if tuple(grid.shape[1:4]) == size:
        return grid.clone()
    grid = F.interpolate(grid.permute(0, 4, 1, 2, 3), size=size, mode="trilinear", align_corners=False)
    return grid.permute(0, 2, 3, 4, 1)


def token_grid(tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """A backbone's patch tokens in one order, (B, N, D) -> (B, t, h, w, D), without the CLS token.

    TimeSformer gives CLS first, then (h, w, t); VideoMAE gives (t, h, w) with `tubelet_size` frames a step.
    """
    side = patch_side(config)
    if config.model_type == "timesformer":
        return tokens[:, 1:].unflatten(1, (side, side, config.num_frames)).permute(0, 3, 1, 2, 4)
    return tokens.unflatten(1, (config.num_frames // config.tubelet_size, side, side))


class VisionEncoder(nn.Module):
    """A video backbone with its own preprocessing and its own pooling rule (CLS, or mean + norm)."""

    def __init__(self, backbone: nn.Module, fc_norm: nn.Module | None, preprocessing: Preprocessing):
        super().__init__()
        self.backbone = backbone
        self.fc_norm = fc_norm
        self.preprocessing = preprocessing
        self.frozen = False

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def has_cls(self) -> bool:
        return self.config.model_type == "timesformer"

    @property
    def num_times(self) -> int:
        """Time steps of the tokens: frames / tubelet size."""
        return self.config.num_frames // getattr(self.config, "tubelet_size", 1)

    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """uint8 (B, T, C, H, W) -> the backbone's own tokens (B, N', D); no graph is kept if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(self.preprocessing.normalise(pixel_values)).last_hidden_state

    def num_tokens(self, grid: int) -> int:
        """How many tokens encode_video gives: [1 +] num_times grid^2."""
        return int(self.has_cls) + self.num_times * grid**2

    def features(self, pixel_values: torch.Tensor, grid: int) -> torch.Tensor:
        """uint8 (B, T, C, H, W) -> (B, 1 + N, D): all that the models read of a frozen backbone, the pooled token
        before its norm, then encode_video's tokens. Stands for `pixel_values` in forward and encode_video."""
        tokens = self.tokens(pixel_values)
        return torch.cat([self.pooled(tokens)[:, None], self.grid_tokens(tokens, grid)], dim=1)

    def pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0] if self.has_cls else tokens.mean(1)

    def forward(self, pixel_values: torch.Tensor | None = None, features: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (B, T, C, H, W), or features of it -> the pooled token (B, D), as the published classifier pools."""
        pooled = self.pooled(self.tokens(pixel_values)) if features is None else features[:, 0].float()
        return pooled if self.has_cls else self.fc_norm(pooled)

    def encode_video(
        self, pixel_values: torch.Tensor | None, grid: int, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """uint8 (B, T, C, H, W), or features of it -> (B, N, D): CLS where there is one, then grid x grid averaged
        tokens per time step in (t, h, w) order; N = num_tokens(grid)."""
        return self.grid_tokens(self.tokens(pixel_values), grid) if features is None else features[:, 1:].float()

    def grid_tokens(self, tokens: torch.Tensor, grid: int) -> torch.Tensor:
        patches = token_grid(tokens, self.config)  # (B, t, h, w, D)
        batch, times, *_ = patches.shape
        pooled = F.adaptive_avg_pool2d(patches.flatten(0, 1).permute(0, 3, 1, 2), grid)  # (B t, D, g, g)
        pooled = pooled.permute(0, 2, 3, 1).reshape(batch, times * grid * grid, -1)  # (B, t g g, D)
        return torch.cat([tokens[:, :1], pooled], dim=1) if self.has_cls else pooled


def load_vision(source: Source, config: Config) -> VisionEncoder:
    """The vision encoder of a source, at the number of frames and the size that `config` asks for."""
    from transformers import AutoModelForVideoClassification

    settings = read_config(source)
    if settings.model_type not in FAMILIES:
        raise UserError(f"{source.path} is a {settings.model_type}; video backbones are {' and '.join(FAMILIES)}")
    if settings.model_type == "videomae":
        settings.use_mean_pooling = True  # self-supervised checkpoints lack the norm: it starts anew
    classifier = load_tower(AutoModelForVideoClassification, source, settings, new_layers=("classifier.", "fc_norm."))
    backbone = classifier.base_model
    source.fingerprint = fingerprint(backbone) if source.weights else source.fingerprint
    num_frames = settings.num_frames if config.num_frames == "auto" else config.num_frames
    image_size = side_of(settings.image_size) if config.image_size == "auto" else config.image_size
    fit_embeddings(backbone, num_frames, image_size)
    fuse_attention(backbone)
    values = load_preprocessor(source, settings.model_type)
    try:
        preprocessing = Preprocessing.from_dict(values, image_size)
    except ValueError as error:
        raise UserError(f"{source.path}: preprocessor_config.json: {error}") from None
    return VisionEncoder(backbone, getattr(classifier, "fc_norm", None), preprocessing)


def load_language(source: Source, captioning: bool) -> tuple[nn.Module, Any]:
    """(causal language model or BERT-like encoder, tokenizer). The encoder comes without its pooler."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    settings = read_config(source)
    tokenizer = from_source(AutoTokenizer, source, "tokenizer")
    if captioning:
        if settings.model_type in ("bert", "roberta", "distilbert", "electra"):
            raise UserError(f"captioning needs a causal language model such as gpt2, not {source.path}")
        model = load_tower(AutoModelForCausalLM, source, settings, new_layers=("lm_head.",))
    else:
        if settings.model_type not in ("bert", "roberta", "electra"):
            raise UserError(
                f"{source.path} is a {settings.model_type}; to classify, take a BERT-like encoder, or add --captioning True"
            )
        pooler = {"add_pooling_layer": False} if settings.model_type != "electra" else {}
        model = load_tower(AutoModel, source, settings, new_layers=("pooler.",), **pooler)
    source.fingerprint = fingerprint(model) if source.weights else source.fingerprint
    return model, tokenizer


# -- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextCodec:
    """Texts to right-padded (input_ids, attention_mask), (B, L) each: bos + tokens, cut to length, + eos."""

    tokenizer: Any
    bos: tuple[int, ...]  # what leads every text
    eos: int
    max_tokens: int  # of the text itself

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [[*self.bos, *ids[: self.max_tokens], self.eos] for ids in tokens]
        longest = max(map(len, rows))
        return {
            # what stands in the padding is never read: the mask says so
            "input_ids": torch.tensor([row + [self.eos] * (longest - len(row)) for row in rows]),  # (B, L)
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }


@dataclass(frozen=True)
class Collator:
    """Items to a batch of the model's arguments, plus `index` (the samples' places)."""

    codec: TextCodec | None  # None: the model reads no text
    source: str  # which text the model reads: "caption" or "text"

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        video = "features" if "features" in items[0] else "pixel_values"
        batch = {
            video: torch.stack([item[video] for item in items]),  # (B, 1 + N, D) fp16 or (B, T, C, H, W) uint8
            "index": torch.tensor([item["index"] for item in items]),
        }
        if self.source != "caption":
            batch["labels"] = torch.tensor([item["label"] for item in items])
        if self.codec is not None:
            batch |= self.codec([item[self.source] for item in items])
        return batch


# -- models -----------------------------------------------------------------------------------------


class Projector(nn.Module):
    """Video tokens into a language model's width: norm, 2-layer MLP, plus a learned time embedding."""

    def __init__(self, vision: VisionEncoder, width: int, grid: int, dropout: float):
        super().__init__()
        if grid > patch_side(vision.config):
            raise UserError(
                f"--token_grid {grid}: this backbone has {patch_side(vision.config)} x {patch_side(vision.config)} patches at this size"
            )
        self.mlp = nn.Sequential(
            nn.LayerNorm(vision.config.hidden_size),
            nn.Linear(vision.config.hidden_size, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
        )
        self.num_tokens = vision.num_tokens(grid)
        times = torch.arange(vision.num_times).repeat_interleave(grid**2) + int(vision.has_cls)
        times = torch.cat([times.new_zeros(int(vision.has_cls)), times])  # CLS has an entry of its own
        self.register_buffer("times", times, persistent=False)  # (N,)
        self.time_embedding = nn.Embedding(int(times.max()) + 1, width)
        nn.init.normal_(self.time_embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp(tokens) + self.time_embedding(self.times)  # (B, N, D)


class VideoModel(nn.Module):
    """What the three models share: a vision encoder, sources to reload from, frozen towers in eval()."""

    task: str
    text_source: str | None = None  # what the loader tokenises: "caption", "text" or nothing

    def __init__(self, vision_encoder: VisionEncoder):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.tokenizer: Any = None
        self.sources: dict[str, Source] = {}
        self._frozen: list[nn.Module] = []

    def towers(self) -> dict[str, nn.Module]:
        language = {"language": self.language_model} if hasattr(self, "language_model") else {}
        return {"vision": self.vision_encoder} | language

    def freeze(self, tower: nn.Module) -> None:
        """No gradients for the tower's own weights, and no dropout in it, whatever train() says."""
        tower.requires_grad_(False)
        self._frozen.append(tower)
        if tower is self.vision_encoder:
            tower.frozen = True

    def train(self, mode: bool = True) -> "VideoModel":
        super().train(mode)
        for tower in self._frozen:
            tower.eval()
        return self

    def collator(self) -> Collator:
        """Makes batches of this model's arguments."""
        return Collator(self.codec() if self.text_source else None, self.text_source or "text")

    def codec(self) -> TextCodec:
        raise NotImplementedError

    def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the logits are scored against: (B,) or (B, L); -100 does not count."""
        return batch["labels"]

    def scores(self, pixel_values: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """The logits of uint8 (B, T, C, H, W), or of `features`; of several views of each video,
        (B, V, T, C, H, W), the log of the views' mean probabilities (B, K), one view at a time."""
        if pixel_values is None or pixel_values.ndim == 5:
            return self(pixel_values=pixel_values, **inputs).float()
        views = [self(pixel_values=view, **inputs).float().log_softmax(-1) for view in pixel_values.unbind(1)]
        return torch.stack(views).logsumexp(0) - math.log(len(views))

    def room_for_text(self, taken: int) -> int:
        """Text tokens that fit behind `taken` other positions. Raises UserError if none do."""
        settings = self.language_model.config
        positions = getattr(settings, "max_position_embeddings", None) or LONGEST_TEXT + taken
        if settings.model_type == "roberta":
            positions -= settings.pad_token_id + 1  # its positions start behind the padding index
        if positions - taken < 1:
            raise UserError(
                f"{taken} positions for video and special tokens leave no room for text: the language model has "
                f"{positions}; lower --token_grid or --num_frames"
            )
        return min(LONGEST_TEXT, positions - taken)


class VideoClassifier(VideoModel):
    """Vision encoder, its own pooling, dropout, linear head."""

    task = "classification"

    def __init__(self, vision_encoder: VisionEncoder, num_classes: int, dropout: float):
        super().__init__(vision_encoder)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(vision_encoder.config.hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixel_values: torch.Tensor | None = None, features: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (B, T, C, H, W), or features of it -> logits (B, K)."""
        return self.head(self.dropout(self.vision_encoder(pixel_values, features)))


class VisionLanguageModel(VideoModel):
    """A projector into a language model, and video tokens behind it."""

    def __init__(
        self, vision_encoder: VisionEncoder, language_model: nn.Module, tokenizer: Any, grid: int, dropout: float
    ):
        super().__init__(vision_encoder)
        vision_encoder.fc_norm = None  # it belongs to the pooled token, which is not used here
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.grid = grid
        self.projector = Projector(vision_encoder, language_model.config.hidden_size, grid, dropout)

    def video_tokens(self, pixel_values: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        """uint8 (B, T, C, H, W), or features of it -> (B, N, D) in the language model's width."""
        return self.projector(self.vision_encoder.encode_video(pixel_values, self.grid, features))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model.get_input_embeddings()(input_ids)


class VisionLanguageClassifier(VisionLanguageModel):
    """[CLS] video [SEP] text [SEP] through a BERT-like encoder; the head reads [CLS]."""

    task = "vision-language classification"

    def __init__(self, vision_encoder, language_model, tokenizer, grid: int, num_classes: int, use_text: bool, dropout: float):  # fmt: skip
        super().__init__(vision_encoder, language_model, tokenizer, grid, dropout)
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise UserError("the language model's tokenizer has no [CLS] or [SEP] token")
        self.text_source = "text" if use_text else None
        self.room_for_text(self.projector.num_tokens + 2 + int(use_text))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(language_model.config.hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def codec(self) -> TextCodec:
        room = self.room_for_text(self.projector.num_tokens + 3)
        return TextCodec(self.tokenizer, bos=(), eos=self.tokenizer.sep_token_id, max_tokens=room)

    def forward(
        self, pixel_values: torch.Tensor | None = None, input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, features: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """uint8 (B, T, C, H, W), or features of it, and text ids ending in [SEP], right-padded (B, L) -> logits (B, K)."""
        video = self.video_tokens(pixel_values, features)  # (B, N, D)
        batch, device = len(video), video.device
        marks = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id], device=device)
        cls, sep = self.embed(marks).to(video.dtype).expand(batch, 2, -1).split(1, dim=1)
        embeds, mask = [cls, video, sep], torch.ones(batch, video.shape[1] + 2, dtype=torch.long, device=device)
        types = torch.zeros_like(mask)
        if input_ids is not None:
            embeds.append(self.embed(input_ids))
            types = torch.cat([types, torch.ones_like(input_ids)], dim=1)
            mask = torch.cat([mask, attention_mask], dim=1)
        inputs = {"inputs_embeds": torch.cat(embeds, dim=1), "attention_mask": mask}  # (B, N + 2 + L, D)
        if getattr(self.language_model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = types
        hidden = self.language_model(**inputs).last_hidden_state
        return self.head(self.dropout(hidden[:, 0]))


class VideoCaptioner(VisionLanguageModel):
    """video tokens, BOS, caption, EOS through a causal language model."""

    task = "captioning"
    text_source = "caption"

    def __init__(self, vision_encoder, language_model, tokenizer, grid: int, dropout: float):
        super().__init__(vision_encoder, language_model, tokenizer, grid, dropout)
        if tokenizer.eos_token_id is None:
            raise UserError("the language model's tokenizer has no end-of-text token")
        self.codec()

    @property
    def bos(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def codec(self) -> TextCodec:
        room = self.room_for_text(self.projector.num_tokens + 2)
        return TextCodec(self.tokenizer, bos=(self.bos,), eos=self.tokenizer.eos_token_id, max_tokens=room)

    def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The ids behind BOS, EOS among them; padding by the mask, since EOS may be the padding id."""
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]  # (B, L - 1)

    def forward(
        self, pixel_values: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """uint8 (B, T, C, H, W), or features of it, and BOS, caption, EOS, right-padded (B, L) -> logits of
        `targets` (B, L - 1, V)."""
        video = self.video_tokens(pixel_values, features)  # (B, N, D)
        seen = torch.ones(video.shape[:2], dtype=attention_mask.dtype, device=video.device)
        logits = self.language_model(
            inputs_embeds=torch.cat([video, self.embed(input_ids)], dim=1),
            attention_mask=torch.cat([seen, attention_mask], dim=1),
            logits_to_keep=input_ids.shape[1],
            use_cache=False,
        ).logits  # (B, L, V)
        return logits[:, :-1]

    @torch.no_grad()
    def generate(
        self, pixel_values: torch.Tensor | None, max_new_tokens: int, num_beams: int = 1,
        features: torch.Tensor | None = None,
    ) -> list[str]:  # fmt: skip
        """One caption per clip of uint8 (B, T, C, H, W), or of features; greedy, or the best of `num_beams` beams.

        Raises UserError if prefix and caption exceed the language model's positions.
        """
        video = self.video_tokens(pixel_values, features)  # (B, N, D)
        positions = getattr(self.language_model.config, "max_position_embeddings", None)
        if positions and video.shape[1] + 1 + max_new_tokens > positions:
            raise UserError(
                f"--max_new_tokens {max_new_tokens}: at most {positions - video.shape[1] - 1} fit behind the video"
            )
        bos = self.embed(torch.full((len(video), 1), self.bos, device=video.device))
        embeds = torch.cat([video, bos.to(video.dtype)], dim=1)
        ids = self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=video.device),
            max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


# -- what is trained --------------------------------------------------------------------------------


def linear_layers(tower: nn.Module) -> list[str]:
    """Names of all linear layers of a tower (attention and MLP), found in the model itself; adapters are seen through."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, LoraLayer)
    found = (n for n, m in tower.named_modules() if isinstance(m, kinds) and "pooler" not in n)
    return [n for n in found if "lora_" not in n and not n.endswith(".base_layer")]


def tower_body(tower: nn.Module) -> nn.Module:
    """What AutoModel loads of a tower: the backbone, without output head."""
    return tower.backbone if isinstance(tower, VisionEncoder) else tower.base_model


def lora_settings(body: nn.Module, rank: int) -> Any:
    """LoRA, arXiv:2106.09685, on every linear layer; rank r, alpha 2 r, dropout 0.05."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in body.modules())  # GPT-2 stores weights so
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=linear_layers(body), fan_in_fan_out=transposed
    )


def add_lora(tower: nn.Module, rank: int) -> None:
    """Adapters on every linear layer of a tower, in place; the tower's own weights are frozen."""
    from peft import inject_adapter_in_model

    tower.requires_grad_(False)
    inject_adapter_in_model(lora_settings(tower_body(tower), rank), tower_body(tower))


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to its layer's weights and takes the adapter away."""
    for name, adapter in list(adapters(model)):
        adapter.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter.get_base_layer())


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that carry a LoRA adapter, by name; a model without any is told without importing peft."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def choose_trained(model: VideoModel, config: Config) -> None:
    """The one place that decides what is trained: LoRA, else frozen, else in full; new layers always."""
    freeze = {"vision": config.freeze_visionbackbone, "language": config.freeze_llmbackbone}
    lora = {"vision": config.use_lora_vision, "language": config.use_lora_llm}
    for name, tower in model.towers().items():
        if lora[name]:
            add_lora(tower, config.lora_r)
        elif freeze[name]:
            model.freeze(tower)
        if config.gradient_checkpointing and not (freeze[name] and not lora[name] and name == "vision"):
            body = tower.backbone if name == "vision" else tower
            body.activation_checkpointing_enable({"use_reentrant": False})


def fully_trained(config: Config) -> dict[str, bool]:
    """For each tower whether all its tensors are trained, so that a checkpoint holds them."""
    return {
        "vision": not (config.freeze_visionbackbone or config.use_lora_vision),
        "language": not (config.freeze_llmbackbone or config.use_lora_llm),
    }


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """(part, trained, total) parameters of every part of the model, and of all of it."""
    rows = []
    for name, part in [*model.named_children(), ("all", model)]:
        sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
        if sizes:
            rows.append((name, sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)))
    return rows


@collector_off()  # it imports transformers' models
def build_model(
    config: Config, num_classes: int, vision: Source | None = None, language: Source | None = None
) -> VideoModel:
    """The model that `config` describes, on the CPU, with what is trained decided.

    `vision` and `language` replace the sources that the config's names lead to.
    Raises UserError where a backbone cannot be loaded or an option does not fit it.
    """
    vision = vision or locate(config.vision_model, config.weights)
    vision_encoder = load_vision(vision, config)
    if not config.use_vlm:
        model: VideoModel = VideoClassifier(vision_encoder, num_classes, config.dropout)
    else:
        language = language or locate(config.language_model, config.weights)
        parts = (vision_encoder, *load_language(language, config.captioning), config.token_grid)
        if config.captioning:
            model = VideoCaptioner(*parts, config.dropout)
        else:
            model = VisionLanguageClassifier(*parts, num_classes, config.use_text, config.dropout)
    model.sources = {"vision": vision} | ({"language": language} if config.use_vlm else {})
    choose_trained(model, config)
    return model
