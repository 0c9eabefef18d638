"""Faster forms of what transformers and peft compute: the same weights, and the same outputs up to rounding.

Shapes: B batch, N tokens, D width, C channels; t, h and w are the numbers of patches along time, height and width.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TILE = 64  # tokens that a GPU's attention kernel computes at once


def fuse_backbone(backbone: nn.Module, layer_lists: list[nn.ModuleList]) -> None:
    """Replaces the slow parts of a vision backbone, in place. `layer_lists` are its layers.

    Classes are compared by name: importing those that are not used would take a second.
    """
    for path, module in backbone.named_modules():
        name = type(module).__name__
        if name == "TimesformerSelfAttention":
            over_time = "temporal_attention" in path
            module.sequences = (backbone.config.image_size // backbone.config.patch_size) ** 2 if over_time else 1
            module.forward = MethodType(fused_attention, module)
        elif name == "VJEPA2RopeAttention":
            add_rotation(module)
        # no family's patch embedding has padding, groups or dilation
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size == module.stride:
            module.forward = MethodType(patch_embedding_forward, module)

    # in these layers only linear layers read a norm's output, and autocast would cast it there
    norms = (m for layers in layer_lists for m in layers.modules() if isinstance(m, nn.LayerNorm))
    for norm in norms:
        norm.register_forward_hook(cast_once)


def fused_attention(self: Any, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor]:
    """Replaces TimesformerSelfAttention.forward by torch's fused attention: (B, N, D) -> ((B, N, D),).

    In attention over time a sequence is short: it has one token per frame. A GPU's kernel computes TILE tokens at once,
    so several of a clip's `sequences` are packed into one, and a mask keeps them apart.
    """
    batch, length, width = hidden_states.shape
    count = max((n for n in range(1, TILE // length + 1) if self.sequences % n == 0), default=1)
    qkv = self.qkv(hidden_states).view(batch // count, count * length, 3, self.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B / count, heads, count x N, D of a head)
    mask = None
    if count > 1:
        owner = torch.arange(count, device=qkv.device).repeat_interleave(length)
        mask = owner == owner[:, None]  # (count x N, count x N)
    dropout = self.attn_drop.p if self.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=self.scale)
    return (context.transpose(1, 2).reshape(batch, length, width),)


def patch_embedding_forward(self: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of a patch embedding, a convolution whose patches do not overlap: GPUs are slow at these."""
    return type(self).forward(self, pixels) if pixels.device.type == "cpu" else patches_as_matmul(self, pixels)


def patches_as_matmul(layer: nn.Conv2d | nn.Conv3d, pixels: torch.Tensor) -> torch.Tensor:
    """The convolution as one matrix product: (B, C, H, W) -> (B, D, h, w), or (B, C, T, H, W) -> (B, D, t, h, w)."""
    for number, size in enumerate(layer.kernel_size):
        pixels = pixels.unflatten(2 + 2 * number, (-1, size))
    axes = range(2, pixels.ndim, 2)
    patches = pixels.permute(0, *axes, 1, *(axis + 1 for axis in axes)).flatten(1 + len(axes))  # (B, ..., C x size)
    return F.linear(patches, layer.weight.flatten(1), layer.bias).movedim(-1, 1)


def cast_once(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook that casts a norm's output to autocast's type. A norm returns fp32 under autocast, so query, key
    and value would each cast the same tensor."""
    kind = output.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return output
    return output.to(torch.get_autocast_dtype(kind))


# -- V-JEPA 2's rotary embeddings -------------------------------------------------------------------


def add_rotation(attention: Any) -> None:
    """Stores the tables of V-JEPA 2's rotary embeddings, (N, D of a head) each: the cosines, and the sines with
    alternating signs. transformers computes them in every call, separately for time, height and width.

    The first three parts of a head encode time, height and width; the rest is not rotated. As in the published code,
    the list of a part's frequencies is repeated as a whole: f1 f2 f1 f2, not f1 f1 f2 f2.
    """
    side, width = attention.grid_size, attention.attention_head_size
    if width % 2:  # it has no pairs; no published head is odd
        return
    token = torch.arange(attention.grid_depth * side**2)
    sizes = attention.d_dim, attention.h_dim, attention.w_dim
    angles = []
    for size, positions in zip(sizes, (token // side**2, token // side % side, token % side), strict=True):
        frequencies = 1.0 / 10000 ** (torch.arange(size // 2) / (size / 2.0))
        angles.append((positions.unsqueeze(-1) * frequencies).repeat(1, 2))  # (N, size)
    angle = F.pad(torch.cat(angles, dim=-1), (0, width - sum(sizes)))  # (N, D of a head)
    signs = torch.tensor([-1.0, 1.0]).repeat(width // 2)
    attention.register_buffer("cos", angle.cos(), persistent=False)
    attention.register_buffer("signed_sin", angle.sin() * signs, persistent=False)
    attention.apply_rotary_embeddings = MethodType(apply_rotary, attention)


def apply_rotary(self: Any, states: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Replaces VJEPA2RopeAttention.apply_rotary_embeddings: queries or keys (B, heads, N, D of a head) -> the same
    shape. It ignores `positions`: the tables are for all N tokens in their order."""
    swapped = states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return states * self.cos.to(states.dtype) + swapped * self.signed_sin.to(states.dtype)


# -- LoRA -------------------------------------------------------------------------------------------


def fuse_adapter(layer: Any) -> None:
    """Replaces the forward of peft's LoRA layer, in place."""
    layer.forward = MethodType(lora_forward, layer)


def lora_forward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of a peft LoRA layer with one adapter and no dropout: (..., D in) -> (..., D out).

    One product multiplies by B and adds the result. peft multiplies, scales and adds in three steps, and under autocast
    it casts its inputs to fp32 and back.
    """
    if self.disable_adapters and self.merged:
        self.unmerge()
    output = self.base_layer(inputs)
    if self.merged or self.disable_adapters:
        return output
    (name,) = self.active_adapters
    down = self.scaling[name] * self.lora_A[name](inputs)  # (..., r)
    total = torch.addmm(output.flatten(0, -2), down.flatten(0, -2), self.lora_B[name].weight.t())
    return total.view_as(output)
