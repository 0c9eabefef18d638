"""Vision backbones: one table of how their families differ, and the encoder that makes all of them look alike.

    uint8 clip (B, T, C, H, W)  ->  pooled token (B, D), and a grid of tokens (B, N, D) in (t, h, w) order

Shapes: B batch, T frames, C channels, H W pixels, N video tokens, D width. t, h and w are the numbers of tokens along
time, height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from config import Config, fill_auto
from extras.fused import fuse_backbone
from pretrained import Source, fingerprint, load_backbone, load_preprocessor, read_config
from script import UserError
from transforms import Preprocessing

# -- families of vision backbones --------------------------------------------------------------------


def patch_shape(config: Any) -> tuple[int, int]:
    """The size of the patch that becomes a token: (frames, pixels along each side).

    The families say it differently: image encoders and TimeSformer have patches of one frame and no tubelet_size,
    VideoMAE and V-JEPA 2 have both numbers, and ViViT has one list [frames, height, width] and no patch_size.
    """
    tubelet = getattr(config, "tubelet_size", 1)
    tubelet, *sides = [tubelet] if isinstance(tubelet, int) else tubelet
    return tubelet, side_of(sides or config.patch_size)


def own_frames(config: Any) -> int:
    """The number of frames that a backbone was trained with."""
    name = FAMILIES[config.model_type].frames
    return FRAMES_OF_IMAGES if name is None else getattr(config, name)


def own_size(config: Any) -> int:
    """The image size that a backbone was trained with, or is fitted to."""
    return side_of(getattr(config, FAMILIES[config.model_type].size))


def grid_shape(config: Any) -> tuple[int, int]:
    """The numbers of tokens along time, t, and along each side of a frame, h = w."""
    tubelet, patch = patch_shape(config)
    return own_frames(config) // tubelet, own_size(config) // patch


def side_of(size: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square, which a configuration gives as one number or as two."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"only square frames and patches are supported, not {list(size)}")
    return size[0]


def fit_embeddings(backbone: nn.Module, num_frames: int, image_size: int) -> None:
    """Makes a backbone accept another number of frames or another image size: changes its position and time embeddings
    as its family requires, and the sizes in its configuration.

    Raises UserError if image_size is not a multiple of the patch size, or num_frames of the tubelet size.
    """
    config = backbone.config
    family, (tubelet, patch) = FAMILIES[config.model_type], patch_shape(config)

    # a convolution would silently drop the pixels of an incomplete patch, and the frames of an incomplete tubelet
    if image_size % patch:
        raise UserError(f"--image_size {image_size}: this backbone needs a multiple of its patch size, {patch}")
    if num_frames % tubelet:
        raise UserError(f"--num_frames {num_frames}: this backbone needs a multiple of its tubelet size, {tubelet}")

    # the embeddings first, because their old grid is that of the configuration; TimeSformer's layers read the new one
    family.fit(backbone, num_frames // tubelet, image_size // patch)
    config.update({family.size: image_size} | ({family.frames: num_frames} if family.frames else {}))


def fit_nothing(backbone: nn.Module, times: int, side: int) -> None:
    """Changes nothing: positions are rotary and follow the input, or every forward interpolates the table itself."""


def fit_rotary(backbone: nn.Module, times: int, side: int) -> None:
    """Gives V-JEPA 2's layers the new grid. Their positions are rotary, but each layer computes a token's row and
    column from the grid it was built with. At another size it would be wrong without an error."""
    for module in backbone.modules():
        if hasattr(module, "grid_size"):
            module.grid_size, module.grid_depth = side, times


def fit_space_and_time(backbone: nn.Module, times: int, side: int) -> None:
    """Resizes TimeSformer's tables: one for space, which starts with the CLS token, and one for time."""
    embeddings, (_, old_side) = backbone.embeddings, grid_shape(backbone.config)
    space = embeddings.position_embeddings.data  # (1, 1 + h w, D)
    grid = resize_grid(space[:, 1:].unflatten(1, (1, old_side, old_side)), (1, side, side))
    embeddings.position_embeddings.data = torch.cat([space[:, :1], grid.flatten(1, 3)], dim=1)
    time = embeddings.time_embeddings.data[:, :, None, None]  # (1, t, 1, 1, D)
    embeddings.time_embeddings.data = resize_grid(time, (times, 1, 1)).flatten(1, 3)
    set_input_size(backbone, side, side**2)


def fit_one_table(backbone: nn.Module, times: int, side: int) -> None:
    """Resizes the table of VideoMAE or ViViT, which is for all tokens; ViViT's starts with the CLS token."""
    embeddings, (old_times, old_side) = backbone.embeddings, grid_shape(backbone.config)
    table, first = embeddings.position_embeddings.data, first_patch(backbone.config)
    grid = table[:, first:].unflatten(1, (old_times, old_side, old_side))  # (1, t, h, w, D)
    grid = resize_grid(grid, (times, side, side)).flatten(1, 3)
    embeddings.position_embeddings.data = torch.cat([table[:, :first], grid], dim=1)
    set_input_size(backbone, side, times * side**2)


def set_input_size(backbone: nn.Module, side: int, num_patches: int) -> None:
    """Sets the sizes that the embeddings check their input against."""
    embeddings, size = backbone.embeddings, side * patch_shape(backbone.config)[1]
    embeddings.image_size = embeddings.patch_embeddings.image_size = (size, size)
    embeddings.num_patches = embeddings.patch_embeddings.num_patches = num_patches


def resize_grid(grid: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Interpolates embeddings (1, t, h, w, D) linearly over t, h and w. At the same size their values do not change."""
    if tuple(grid.shape[1:4]) == size:
        return grid.clone()
    grid = F.interpolate(grid.permute(0, 4, 1, 2, 3), size=size, mode="trilinear", align_corners=False)
    return grid.permute(0, 2, 3, 4, 1)


def layer_lists(backbone: nn.Module) -> list[nn.ModuleList]:
    """The lists of a backbone's layers in the order of forward: one, or VideoPrism's two, over space and over time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = (module for module in backbone.modules() if isinstance(module, nn.ModuleList))
    return [layers for layers in lists if layers and isinstance(layers[0], GradientCheckpointingLayer)]


class VideoPrismPooler(nn.Module):
    """The attentive pooler of transformers' VideoPrism classifier: (B, N, D) -> (B, D)."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.head, self.norm = classifier.head, classifier.head_layernorm

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.head(tokens)[0]).squeeze(1)


FRAMES_OF_IMAGES = 8  # `auto` for image encoders, which were trained with single frames
HALF, CLIP_MEAN, CLIP_STD = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Family:
    """How a family of backbones differs from the others."""

    # what stands for the whole video, or for a frame of an image encoder:
    #   cls        the CLS token
    #   mean       the mean of the patch tokens, then a norm if the published classifier has one
    #   pooler     the backbone's pooler_output; the mean if its configuration leaves the pooler out
    #   attentive  the attentive pooler of a published classifier; the mean if the weights are without a classifier
    pooling: str
    starts_with_cls: bool  # whether the tokens start with CLS; registers follow it
    fit: Callable[[nn.Module, int, int], None] = fit_nothing  # makes the embeddings fit (times, side)
    frames: str | None = "num_frames"  # the configuration's field; None: an image encoder, one frame at a time
    size: str = "image_size"  # the configuration's field
    stride: int = 0  # published training took every stride-th frame; 0: spread them over the video, or one image
    auto_size: int = 2048  # `auto` takes no larger one
    token_order: str = "thw"  # order of the patch tokens: "hwt" or "thw"
    input: str = "pixel_values"  # what forward calls the video
    arguments: dict[str, Any] = field(default_factory=dict)  # of every forward
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of the configuration to change before loading
    unused: tuple[str, ...] = ()  # modules and tensors that forward never reaches; they are removed
    pooler: Callable[[nn.Module], nn.Module] | None = None  # takes the attentive pooler from the published classifier
    preprocessing: dict[str, Any] = field(default_factory=dict)  # without a preprocessor_config.json; default: ImageNet

    @property
    def is_image_encoder(self) -> bool:
        return self.frames is None


INTERPOLATE = {"interpolate_pos_encoding": True}
# DINOv2's table has 518 pixels, from the end of its training; its preprocessing has 224
DINO = Family("cls", starts_with_cls=True, frames=None, auto_size=224, unused=("embeddings.mask_token",))
# the key is transformers' model_type; to add a family, add a row
FAMILIES = {
    # stride of the base models: 8 x 32 frames; it is 16 for HR and 4 for L
    "timesformer": Family("cls", starts_with_cls=True, token_order="hwt", fit=fit_space_and_time, stride=32),
    # self-supervised checkpoints come without the norm after mean pooling; it is then trained as a new layer
    "videomae": Family(
        "mean", starts_with_cls=False, fit=fit_one_table, stride=4, overrides={"use_mean_pooling": True}
    ),
    "vivit": Family(
        "cls",
        starts_with_cls=True,
        fit=fit_one_table,  # transformers' own interpolation forgets the time axis and fails
        stride=2,
        preprocessing={"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 127.5, "offset": True},
    ),
    "vjepa2": Family(
        "attentive",
        starts_with_cls=False,
        fit=fit_rotary,
        frames="frames_per_clip",
        size="crop_size",
        stride=4,
        input="pixel_values_videos",
        arguments={"skip_predictor": True},
        unused=("predictor",),
        pooler=lambda classifier: classifier.pooler,
        preprocessing={"size": {"shortest_edge": 292}, "do_center_crop": True, "crop_size": 256},
    ),
    "videoprism_vision_model": Family(
        "attentive",
        starts_with_cls=False,
        input="pixel_values_videos",
        arguments=INTERPOLATE,
        pooler=VideoPrismPooler,
        preprocessing={"do_normalize": False, "size": {"height": 288, "width": 288}},
    ),
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_vit": DINO,
    "siglip_vision_model": Family(
        "pooler",
        starts_with_cls=False,
        frames=None,
        arguments=INTERPOLATE,
        preprocessing={"image_mean": HALF, "image_std": HALF, "resample": 3, "size": {"height": 224, "width": 224}},
    ),
    "clip_vision_model": Family(
        "pooler",
        starts_with_cls=True,
        frames=None,
        arguments=INTERPOLATE,
        preprocessing={"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3},
    ),
}


def first_patch(config: Any) -> int:
    """How many tokens come before the patches: CLS and registers."""
    return int(FAMILIES[config.model_type].starts_with_cls) + getattr(config, "num_register_tokens", 0)


def pooling_of(config: Any) -> str:
    """The pooling of a backbone: that of its family, or the mean if it has no pooler."""
    pooling = FAMILIES[config.model_type].pooling
    trained = any(name.endswith("ForVideoClassification") for name in config.architectures or ())
    absent = {"attentive": not trained, "pooler": not getattr(config, "vision_use_head", True)}  # SigLIP's field
    return "mean" if absent.get(pooling) else pooling


def to_grid(tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """Brings the patch tokens of any family into one order, without CLS and registers: (B, N, D) -> (B, t, h, w, D).
    Those of an image encoder are (B, t, N, D)."""
    family, (_, side) = FAMILIES[config.model_type], grid_shape(config)
    patches = tokens[..., first_patch(config) :, :]
    if family.is_image_encoder:
        return patches.unflatten(2, (side, side))
    if family.token_order == "hwt":
        return patches.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2, 4)
    return patches.unflatten(1, (-1, side, side))


# -- the vision encoder -----------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """A backbone with its preprocessing and its pooling. An image encoder gives one time step per frame."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module, preprocessing: Preprocessing, num_frames: int):
        """`classifier` is the published model around the backbone, or the backbone itself."""
        super().__init__()
        self.backbone, self.preprocessing, self.num_frames = backbone, preprocessing, num_frames
        self.family, self.pooling = FAMILIES[backbone.config.model_type], pooling_of(backbone.config)
        self.fc_norm = getattr(classifier, "fc_norm", None)
        self.pooler = self.family.pooler(classifier) if self.pooling == "attentive" else None
        self.frozen = False
        self.layer = self.depth = sum(map(len, layer_lists(backbone)))  # the layer that is read, and the last

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def has_pooled_token(self) -> bool:
        """Whether one token stands for the whole video: CLS, or what a pooler makes."""
        return self.pooling != "mean"

    @property
    def num_times(self) -> int:
        """Time steps of the tokens: one per tubelet, that is, frames / tubelet size."""
        return self.num_frames // patch_shape(self.config)[0]

    def read_layer(self, layer: int) -> None:
        """Removes the layers above this one; 1 is the first. The final norm stays, as in DINOv2 (arXiv:2304.07193), and
        the mean replaces a published pooler, which knows the last layer only.

        Raises UserError if the backbone has no such layer, or it sees single frames only.
        """
        *before, layers = layer_lists(self.backbone)
        first = sum(map(len, before))  # VideoPrism's layers over space come first
        if not first < layer <= self.depth:
            note = f", of which the first {first} see single frames and cannot be read" if first else ""
            raise UserError(f"there is no layer {layer} to read: this backbone has {self.depth} layers{note}")
        if layer == self.depth:
            return
        del layers[layer - first :]
        self.layer = self.config.num_hidden_layers = layer
        if self.pooling == "attentive" or getattr(self.backbone, "use_head", False):
            self.pooling, self.pooler = "mean", None
            self.backbone.use_head, self.backbone.head = False, None  # SigLIP's pooler

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, T, C, H, W) -> pooled (B, D) before the norm that follows mean pooling, and patches
        (B, t, h, w, D); without gradients if the backbone is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels, image = self.preprocessing.normalise(pixel_values), self.family.is_image_encoder
            inputs = {self.family.input: pixels.flatten(0, 1) if image else pixels}  # (B T, C, H, W) for images
            output = self.backbone(**inputs, **self.family.arguments)
            pooled, tokens = self.pooled(output), output.last_hidden_state
            if image:
                pooled, tokens = (x.unflatten(0, pixels.shape[:2]) for x in (pooled, tokens))
                pooled = pooled.mean(1)  # over the frames
            return pooled, to_grid(tokens, self.config)

    def pooled(self, output: Any) -> torch.Tensor:
        """The output of the backbone -> (B, D); (B T, D) for images."""
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        if self.pooling == "pooler":
            return output.pooler_output
        if self.pooling == "attentive":
            return self.pooler(output.last_hidden_state)
        return output.last_hidden_state[:, first_patch(self.config) :].mean(1)

    def fill_auto(self, config: Config) -> Config:
        """The options with every `auto` that depends on the model filled in."""
        _, side = grid_shape(self.config)
        config = replace(config, vision_layer=self.layer)
        return fill_auto(config, self.num_frames, self.preprocessing.image_size, side, self.family.stride)

    def num_tokens(self, grid: int) -> int:
        """The number of tokens that encode_video returns: num_times * grid^2, and the pooled token if it is not a
        mean."""
        return int(self.has_pooled_token) + self.num_times * grid**2

    def features(self, pixel_values: torch.Tensor, grid: int) -> torch.Tensor:
        """uint8 (B, T, C, H, W) -> features (B, 1 + N, D): pooled token before its norm, then encode_video's tokens.

        This is all that the three models need from a frozen backbone, so it can be computed once and cached. forward
        and encode_video accept it instead of pixels.
        """
        pooled, patches = self.encode(pixel_values)
        return torch.cat([pooled[:, None], self.grid_tokens(pooled, patches, grid)], dim=1)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """A video -> (B, D), pooled as in the published classifier."""
        pooled = self.encode(video)[0] if is_clip(video) else video[:, 0].float()
        return pooled if self.fc_norm is None else self.fc_norm(pooled)

    def encode_video(self, video: torch.Tensor, grid: int) -> torch.Tensor:
        """A video -> (B, N, D): the pooled token unless it is a mean, then grid x grid averaged tokens per time step in
        (t, h, w) order. N is num_tokens(grid)."""
        return self.grid_tokens(*self.encode(video), grid) if is_clip(video) else video[:, 1:].float()

    def grid_tokens(self, pooled: torch.Tensor, patches: torch.Tensor, grid: int) -> torch.Tensor:
        # a language model's time grows with its tokens: average blocks of patches to a coarser grid
        batch, times, *_ = patches.shape  # (B, t, h, w, D)
        blocks = F.adaptive_avg_pool2d(patches.flatten(0, 1).permute(0, 3, 1, 2), grid)  # (B t, D, g, g)
        blocks = blocks.permute(0, 2, 3, 1).reshape(batch, times * grid * grid, -1)  # (B, t g g, D)
        return torch.cat([pooled[:, None], blocks], dim=1) if self.has_pooled_token else blocks


def is_clip(video: torch.Tensor) -> bool:
    """Whether a `video` argument is pixels (B, T, C, H, W) rather than features (B, 1 + N, D)."""
    return video.ndim == 5


def read_vision_config(source: Source) -> Any:
    """The configuration of a vision backbone: its own, or that of the vision part of a SigLIP, CLIP or VideoPrism
    with text.

    Raises UserError if the source is not a backbone of one of FAMILIES.
    """
    hf_config = read_config(source)
    hf_config = getattr(hf_config, "vision_config", hf_config)
    if hf_config.model_type not in FAMILIES:
        raise UserError(f"{source.path} is a {hf_config.model_type}; vision backbones are {', '.join(FAMILIES)}")
    return hf_config


def vision_preprocessor(source: Source, hf_config: Any) -> dict[str, Any]:
    """The fields of a vision backbone's preprocessor_config.json; without that file those of its family."""
    return load_preprocessor(source, hf_config.model_type, FAMILIES[hf_config.model_type].preprocessing)


def load_vision(source: Source, config: Config) -> VisionEncoder:
    """Loads the vision encoder of a source and fits it to the frames, image size and layer in `config`.

    Raises UserError if it cannot be loaded, is not a backbone of one of FAMILIES, or does not have that layer.
    """
    from transformers import AutoModel, AutoModelForVideoClassification

    # load the classifier, not the bare backbone: only the classifier has the norm or pooler that follows
    hf_config = read_vision_config(source)
    family = FAMILIES[hf_config.model_type]
    hf_config.update(family.overrides)
    new_layers = ["classifier.", "fc_norm."]
    if family.pooling == "attentive" and pooling_of(hf_config) == "mean":
        new_layers += ["pooler.", "head.", "head_layernorm."]
    auto_class = AutoModel if family.is_image_encoder else AutoModelForVideoClassification
    classifier = load_backbone(auto_class, source, hf_config, tuple(new_layers))
    backbone = classifier if family.is_image_encoder else classifier.base_model
    for name in family.unused:
        parent, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, None)

    # backbones differ in mean, std and interpolation; a wrong mean costs accuracy without any error
    num_frames = own_frames(hf_config) if config.num_frames == "auto" else config.num_frames
    image_size = min(own_size(hf_config), family.auto_size) if config.image_size == "auto" else config.image_size
    try:
        preprocessing = Preprocessing.from_dict(vision_preprocessor(source, hf_config), image_size)
    except ValueError as error:
        raise UserError(f"{source.path}: preprocessor_config.json: {error}") from None

    # the fingerprint is taken first: it must not depend on the frames, size and layer of this run
    encoder = VisionEncoder(backbone, classifier, preprocessing, num_frames)
    if source.weights:
        source.fingerprint = fingerprint(nn.ModuleList([backbone, encoder.pooler]) if encoder.pooler else backbone)
    if config.vision_layer != "auto":
        encoder.read_layer(config.vision_layer)
    fit_embeddings(backbone, num_frames, image_size)
    fuse_backbone(backbone, layer_lists(backbone))  # last: V-JEPA 2's tables need the final grid
    return encoder
